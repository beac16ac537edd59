#!/usr/bin/env python3
"""Packets a second that one Python process takes from one UDP socket, by the call it takes them with.

    python -m bench.client --call recvfrom          one packet a call: bytes and address
    python -m bench.client --call recv_batch        batches, looked at with NumPy: lengths, one byte of each payload
    python -m bench.client --call payloads          batches, each payload as a memoryview: its length, one byte
    python -m bench.client --call async             batches with `async for`, looked at with NumPy
    python -m bench.client --call consume           a jitted function for each packet: its length, one byte
    python -m bench.client --of kernel              a kernel socket's recvfrom, or its recv_into with --call
    python -m bench.client --of recvmmsg            recvmmsg in C, 64 at a time; lengths, one byte of each payload
    python -m bench.client --of asyncio             a DatagramProtocol

Ours: a dataplane whose `synthetic` netif waits for the ring of the socket (nothing is lost); the RX worker on the first
core, idle `busy`, the consumer on the second. All repeats are of the same dataplane, one after the other, behind a
warm-up. What was taken is checked after each repeat: that the last payload is, byte by byte, that of the packet with
this number, or the sum over a byte that counts the packets; the sum of lengths; in the end that the ledger has as many
packets as were taken.
A consumer that is faster than the RX worker (consume, batches) waits for it: then the figure is the worker's.

The peers are in `client_kernel`: a sender on the first core that is faster than the receiver on the second.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from numba import njit

import dataplane
from bench import client_kernel, harness
from dataplane.netif import synthetic

CALLS = {
    "dataplane": ("recvfrom", "recv_batch", "payloads", "async", "consume"),
    "kernel": ("recvfrom", "recv_into"),
    "recvmmsg": ("recv_batch",),
    "asyncio": ("async",),
}
PACKETS = {
    ("dataplane", "recvfrom"): 800_000, ("dataplane", "recv_batch"): 4_000_000, ("dataplane", "payloads"): 1_000_000,
    ("dataplane", "async"): 2_000_000, ("dataplane", "consume"): 6_000_000, ("kernel", "recvfrom"): 300_000,
    ("kernel", "recv_into"): 300_000, ("recvmmsg", "recv_batch"): 600_000, ("asyncio", "async"): 60_000,
}
"""Of a repeat: about half a second."""

PORT, FLOWS = 5000, 1024
IP_AND_UDP = 28
MARK = 3        # the last byte of the flow's number, with which a payload begins: the k-th packet has k & 255 there
SPARE = 1 << 17
NOBODY = ("192.0.2.254", 9)     # of the socket whose opening releases the packets

CONFIG = """
name = "{name}"
[rx]
cores = [%(core)d]
idle = "busy"
[sockets]
ring_bytes = %(ring_bytes)d
[[netif]]
kind = "synthetic"
flows = %(flows)d
local_ports = [%(port)d, %(port)d]
size = %(size)d
count = %(count)d
backpressure = true
start = 2
"""


class Taken(NamedTuple):
    """Packets, bytes of payload, and the last payload or the sum of all marks. `calls`: batches."""

    packets: int
    octets: int
    last: bytes | None = None
    marks: int | None = None
    calls: int = 0


# -- the calls: each takes at least so many packets ---------------------------------------------------------------


def take_recvfrom(sock: Any, packets: int, most: int) -> Taken:
    """One at a time."""
    recvfrom, octets, data = sock.recvfrom, 0, b""
    for _ in repeat(None, packets):
        data, _address = recvfrom()
        octets += len(data)
    return Taken(packets, octets, data)


def take_batches(sock: Any, packets: int, most: int) -> Taken:
    """NumPy on each batch."""
    count = octets = marks = calls = 0
    while count < packets:
        with sock.recv_batch(most) as batch:
            count += len(batch)
            octets += int(batch.lengths.sum())
            marks += int(batch.data[batch.offsets + MARK].sum())
        calls += 1
    return Taken(count, octets, None, marks, calls)


def take_payloads(sock: Any, packets: int, most: int) -> Taken:
    """A memoryview of each payload."""
    count = octets = marks = calls = 0
    while count < packets:
        with sock.recv_batch(most) as batch:
            count += len(batch)
            for payload in batch:
                octets += len(payload)
                marks += payload[MARK]
        calls += 1
    return Taken(count, octets, None, marks, calls)


async def iterate(sock: Any, packets: int) -> Taken:
    """NumPy on each batch that the event loop brings."""
    count = octets = marks = calls = 0
    async for batch in sock:
        count += len(batch)
        octets += int(batch.lengths.sum())
        marks += int(batch.data[batch.offsets + MARK].sum())
        calls += 1
        if count >= packets:
            break
    return Taken(count, octets, None, marks, calls)


@njit
def tally(payload: Any, info: Any, state: Any) -> None:
    """Bytes, and the sum of marks."""
    state[0] += payload.size
    state[1] += payload[MARK]


def take_consume(sock: Any, packets: int, most: int) -> Taken:
    """The jitted function."""
    state, count = np.zeros(2, np.int64), 0
    while count < packets:
        count += sock.consume(tally, state, packets - count)
    return Taken(count, int(state[0]), None, int(state[1]))


# -- the consumer --------------------------------------------------------------------------------------------


def consumer(name: str, options: argparse.Namespace) -> tuple[list[float], int, float]:
    """Its process: packets a second of each repeat, packets taken in all, packets of a batch on average."""
    with asyncio.Runner() as runner, dataplane.attach(name) as dp, dp.udp("0.0.0.0", PORT) as sock:
        calls: dict[str, Callable[[Any, int, int], Taken]] = {
            "recvfrom": take_recvfrom, "recv_batch": take_batches, "payloads": take_payloads, "consume": take_consume,
            "async": lambda sock, packets, most: runner.run(iterate(sock, packets))}
        sock.consume(tally, np.zeros(2, np.int64), timeout=0)   # compiled before the packets come
        with dp.udp(remote=NOBODY):
            return take_all(sock, calls[options.call], options)


def take_all(sock: Any, take: Callable[[Any, int, int], Taken], options: argparse.Namespace) \
        -> tuple[list[float], int, float]:
    """Warm-up, repeats, and what is left."""
    rates, position, packets, calls = [], 0, 0, 0
    payloads = expected_payloads(options.size)
    for number in range(options.repeats + 1):
        begin = time.perf_counter()
        taken = take(sock, options.packets if number else options.packets // 4, options.max_packets)
        seconds = time.perf_counter() - begin
        check(taken, position, payloads)
        position += taken.packets
        if number:
            rates.append(taken.packets / seconds)
            packets, calls = packets + taken.packets, calls + taken.calls
    for batch in sock.batches(4096):
        position += len(batch)
    return rates, position, packets / calls if calls else 0.0


def expected_payloads(size: int) -> list[bytes]:
    """Of each flow."""
    settings = synthetic.Settings(flows=FLOWS, local_ports=(PORT, PORT), size=size)
    return [row[IP_AND_UDP:].tobytes() for row in synthetic.frames(settings, np.arange(FLOWS), size)]


def check(taken: Taken, position: int, payloads: list[bytes]) -> None:
    """Flows take turns and one worker keeps their order: it is known what packet `position` and those behind are."""
    end = position + taken.packets
    assert taken.octets == taken.packets * len(payloads[0]), taken
    assert taken.last is None or taken.last == payloads[(end - 1) % FLOWS], taken
    assert taken.marks is None or taken.marks == _marks(end) - _marks(position), taken


def _marks(packets: int) -> int:
    """The sum of k & 255 over the first packets."""
    rounds, rest = divmod(packets, 256)
    return rounds * 32640 + rest * (rest - 1) // 2


def measure(options: argparse.Namespace) -> tuple[list[float], dict[str, Any]]:
    """Ours: packets a second of each repeat; packets of a batch on average."""
    count = options.packets * (options.repeats + 1) + SPARE + (options.repeats + 1) * options.max_packets
    config = CONFIG % {"core": harness.CORES[0], "ring_bytes": options.ring_bytes, "flows": FLOWS, "port": PORT,
                       "size": options.size, "count": count}
    with harness.running(config) as running:
        rates, taken, batch = harness.fork(harness.CORES[1], consumer, running.name, options).result(100)
        running.wait()
        ledger = running.ledger
    assert taken == count == ledger["offered"] == ledger["delivered"] == ledger["consumed"], (taken, ledger)
    assert not ledger["dropped"] and ledger["unread"] == 0, ledger
    return rates, {"packets_per_call": round(batch, 1)} if batch else {}


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--of", choices=CALLS, default="dataplane")
    parser.add_argument("--call", choices=sorted({call for calls in CALLS.values() for call in calls}))
    parser.add_argument("--size", type=int, default=60, help="bytes of the IP packet")
    parser.add_argument("--packets", type=int, help="of a repeat")
    parser.add_argument("--max-packets", type=int, default=1024, help="of a batch (recv_batch, payloads)")
    parser.add_argument("--ring-bytes", type=int, default=262144, help="of our socket")
    options = parser.parse_args()
    options.call = options.call or CALLS[options.of][0]
    if options.call not in CALLS[options.of]:
        parser.error(f"--of {options.of} has --call {', '.join(CALLS[options.of])}")
    options.packets = options.packets or PACKETS[options.of, options.call]
    return options


def main() -> None:
    if len(harness.CORES) < 2:
        raise harness.Missing("a second core")
    options = arguments()
    rates, more = measure(options) if options.of == "dataplane" else client_kernel.measure(options)
    suffix = "" if options.of == "dataplane" else f".{options.of}"
    harness.report(f"client.{options.call}{suffix}", "Mpps", [rate / 1e6 for rate in rates], options, **more)


if __name__ == "__main__":
    harness.run(main)
