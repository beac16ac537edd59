"""Synthetic packets at full speed into many sockets and one consumer: every one is accounted for.

The same way of a packet that bench/endtoend.py measures.
"""

from __future__ import annotations

import os

import pytest

from bench import endtoend
from tests.dataplane_fixture import running
from tests.netns import Forked

SOCKETS, SIZE = 1024, 60
CORES = (sorted(os.sched_getaffinity(0)) * 2)[:2]


def pinned(name: str) -> tuple[list[int], list[int]]:
    """The consumer: packets and bytes of each socket."""
    os.sched_setaffinity(0, [CORES[1]])
    _, counts, octets = endtoend.consume_all(name, SOCKETS)
    return counts.tolist(), octets.tolist()


def every_packet_is_accounted_for(packets: int, backpressure: bool, ring_bytes: int) -> None:
    config = endtoend.configuration(packets, SOCKETS, SIZE, ring_bytes, backpressure, CORES[0])
    with running(config.replace('name = "{name}"', "")) as process:
        consumer = Forked(lambda: pinned(process.name))
        try:
            counts, octets = consumer.result(100 + packets / 1e6)
        finally:
            consumer.kill()
        ledger = process.wait()
    endtoend.check(ledger, counts, octets, packets, SIZE, backpressure)


@pytest.mark.parametrize("ring_bytes", [65536, 4096])
@pytest.mark.parametrize("backpressure", [True, False], ids=["backpressure", "dropping"])
def test_every_packet_is_accounted_for(backpressure: bool, ring_bytes: int) -> None:
    every_packet_is_accounted_for(3_000_000, backpressure, ring_bytes)


@pytest.mark.stress
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backpressure", [True, False], ids=["backpressure", "dropping"])
def test_every_packet_is_accounted_for_for_long(backpressure: bool) -> None:
    every_packet_is_accounted_for(200_000_000, backpressure, 65536)
