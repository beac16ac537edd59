#!/usr/bin/env python3
"""Packets a second, end to end: synthetic frames through a running dataplane into one consumer process.

    python -m bench.endtoend                        60-byte IP packets, 1024 sockets, two cores
    python -m bench.endtoend --packets 10000000 --sockets 16 --size 1500 --backpressure

One RX worker on the first core; a consumer on the second, which takes everything with `Poller.consume`. The
clock runs from just before the first packet is released until the consumer has taken the last one. Each repeat
is a dataplane of its own, started and ended. In each the ledger has to balance, and the consumer has to have got
exactly what was delivered, in sockets, packets and bytes, or there is no figure.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from typing import Any

import numpy as np
from numba import njit

import dataplane
from bench import harness

FIRST_PORT = 5000
IP_AND_UDP = 28
NOBODY = ("192.0.2.254", 9)     # of the socket whose opening releases the packets

CONFIG = """
name = "{name}"
[rx]
cores = [{core}]
idle = "busy"
[sockets]
max = {most}
ring_bytes = {ring_bytes}
[[netif]]
kind = "synthetic"
flows = {flows}
local_ports = [{first}, {last}]
size = {size}
count = {packets}
backpressure = {backpressure}
start = {start}
"""


@njit
def tally(payload: Any, info: Any, state: Any) -> None:
    """Per socket: packets, bytes, and the sum of first and last byte, so that the payload was really read."""
    counts, octets, ends = state
    counts[info.socket] += 1
    octets[info.socket] += payload.size
    ends[info.socket] += payload[0] + payload[-1]


def consume_all(name: str, sockets: int, spin_us: float = 20.0) -> tuple[float, Any, Any]:
    """Opens one socket for each port, lets the packets come, and takes them until the dataplane has ended:
    seconds, packets and bytes of each socket."""
    state = tuple(np.zeros(sockets, np.int64) for _ in range(3))
    with dataplane.attach(name, spin_us=spin_us) as dp:
        socks = [dp.udp("0.0.0.0", FIRST_PORT + i) for i in range(sockets)]
        with dp.poller(socks) as poller:
            poller.consume(tally, state, timeout=0)     # compiled before the clock runs
            start = last = time.monotonic()
            with dp.udp(remote=NOBODY), contextlib.suppress(dataplane.Stopped):
                while poller.consume(tally, state, max_packets=1 << 22):
                    last = time.monotonic()
    return last - start, state[0], state[1]


def consumer(name: str, sockets: int, core: int, pipe: Any) -> None:
    """The consumer's process."""
    os.sched_setaffinity(0, [core])
    seconds, counts, octets = consume_all(name, sockets)
    pipe.send((seconds, counts.tolist(), octets.tolist()))


def configuration(packets: int, sockets: int, size: int, ring_bytes: int, backpressure: bool,
                  core: int) -> str:
    """As many flows as sockets, but about 1024 at least, spread evenly; they begin with one socket more."""
    flows = max(sockets, 1024 // sockets * sockets)
    return CONFIG.format(
        name="{name}", core=core, most=2 * sockets + 16, ring_bytes=ring_bytes, flows=flows,
        first=FIRST_PORT, last=FIRST_PORT + sockets - 1, size=size, packets=packets,
        backpressure=str(backpressure).lower(), start=sockets + 1)


def check(ledger: dict[str, Any], counts: list[int], octets: list[int], packets: int, size: int,
          backpressure: bool) -> None:
    """Everything offered is delivered or counted, everything delivered was consumed."""
    got = sum(counts)
    assert ledger["balanced"] and ledger["offered"] == packets, ledger
    assert got == ledger["delivered"] == ledger["consumed"] and ledger["unread"] == 0, (got, ledger)
    assert got + ledger["dropped"].get("pcq_full", 0) == packets and set(ledger["dropped"]) <= {"pcq_full"}, ledger
    assert octets == [count * (size - IP_AND_UDP) for count in counts]
    if backpressure:
        assert not ledger["dropped"] and max(counts) - min(counts) <= max(1, 1024 // len(counts)), counts


def measure(options: argparse.Namespace) -> float:
    """One run: delivered packets a second, in millions."""
    core, far = (harness.CORES * 2)[:2]
    config = configuration(options.packets, options.sockets, options.size, options.ring_bytes, options.backpressure,
                           core)
    context = multiprocessing.get_context("spawn")
    with harness.running(config) as running:
        mine, theirs = context.Pipe()
        child = context.Process(target=consumer, args=(running.name, options.sockets, far, theirs))
        child.start()
        theirs.close()
        seconds, counts, octets = mine.recv()
        child.join()
        running.wait()
    check(running.ledger, counts, octets, options.packets, options.size, options.backpressure)
    return float(sum(counts) / seconds / 1e6)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--packets", type=int, default=40_000_000, help="in each repeat")
    parser.add_argument("--sockets", type=int, default=1024)
    parser.add_argument("--size", type=int, default=60, help="bytes of the IP packet")
    parser.add_argument("--ring-bytes", type=int, default=4096, help="of each socket")
    parser.add_argument("--backpressure", action="store_true", help="wait for full rings instead of dropping")
    options = parser.parse_args()
    measure(argparse.Namespace(**{**vars(options), "packets": options.packets // 10}))      # caches are warm then
    harness.report("endtoend", "Mpps", [measure(options) for _ in range(options.repeats)], options)


if __name__ == "__main__":
    harness.run(main)
