#!/usr/bin/env python3
"""Packets a second that come from a capture file into Python.

    python -m bench.offline                             a jitted function for each packet (consume)
    python -m bench.offline --call recv_batch           batches, looked at with NumPy
    python -m bench.offline --of pcapy-ng               loop, dispatch or next: --call; the fastest is loop
    python -m bench.offline --of scapy                  RawPcapReader, or PcapReader with --call; fewer packets

The file, made once by this benchmark: UDP over IPv4 over Ethernet, 1024 flows to one port, all of one size. Everybody
gets each packet and sums the lengths of the payloads (pcapy-ng, scapy: of the frames) and the byte that counts the
flows (modulo 256); both sums must be right.

Ours: a `pcap` netif with pace `fast`, loop 1, on the first core, one socket with that port, the consumer on the
second. Checksums are verified, the socket is looked up, nothing may be lost. The clock runs from just before the
socket is opened that releases the first packet until the last is consumed; each repeat is a dataplane of its own.

The peers have the second core alone; they need no more. Their clock runs from before the first packet until behind the
last; the file is open. pcapy-ng selects with a BPF filter what our socket gets. Before the first repeat everybody has
read the file once, so that it comes from memory.
"""

from __future__ import annotations

import argparse
import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

import dataplane
from bench import harness
from dataplane.client.sweep import CURSOR_WORDS, sweep_for
from dataplane.netif import synthetic

CALLS = {
    "dataplane": ("consume", "recv_batch"),
    "pcapy-ng": ("loop", "dispatch", "next"),
    "scapy": ("RawPcapReader", "PcapReader"),
}
PACKETS = {"dataplane": 1000 * 1024, "pcapy-ng": 1000 * 1024}
SCAPY_PACKETS = {"RawPcapReader": 100 * 1024, "PcapReader": 10 * 1024}

PORT, FLOWS = 5000, 1024
ETHERNET, IP_AND_UDP = 14, 28
HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 1)     # of a classic pcap with Ethernet frames
RECORD = 16
MARK = 3            # the last byte of the flow's number, with which a payload begins
MARK_OF_FRAME = ETHERNET + IP_AND_UDP + MARK
BEGIN = 1_700_000_000   # seconds since the epoch
NOBODY = ("192.0.2.254", 9)     # of the socket whose opening releases the packets

CONFIG = """
name = "{name}"
[rx]
cores = [%(core)d]
idle = "busy"
[sockets]
ring_bytes = %(ring_bytes)d
[[netif]]
kind = "pcap"
path = "%(path)s"
pace = "fast"
loop = 1
start = 2
"""


class Taken(NamedTuple):
    """Packets, seconds, the sum of lengths and that of marks."""

    packets: int
    seconds: float
    octets: int
    marks: int


# -- the file ------------------------------------------------------------------------------------------------


def capture(packets: int, size: int) -> Path:
    """The file with so many packets of `size` bytes of IP, a whole number of times all flows."""
    target = Path(tempfile.gettempdir(), f"dataplane-bench-{os.getuid()}", f"udp-{packets}-{size}.pcap")
    if target.exists():
        return target
    target.parent.mkdir(mode=0o700, exist_ok=True)
    made = target.with_suffix(f".{os.getpid()}")
    records = one_round(size)
    with made.open("wb") as file:
        file.write(HEADER)
        for turn in range(packets // FLOWS):
            times = turn * FLOWS + np.arange(FLOWS)     # one packet each µs
            records["sec"], records["usec"] = BEGIN + times // 1_000_000, times % 1_000_000
            file.write(records.tobytes())
    made.rename(target)
    return target


def one_round(size: int) -> Any:
    """One packet of each flow."""
    length = ETHERNET + size
    kind = np.dtype([("sec", "<u4"), ("usec", "<u4"), ("captured", "<u4"), ("wire", "<u4"), ("frame", "u1", length)])
    assert kind.itemsize == RECORD + length
    records = np.zeros(FLOWS, kind)
    records["captured"] = records["wire"] = length
    settings = synthetic.Settings(flows=FLOWS, local_ports=(PORT, PORT), size=size)
    records["frame"][:, :ETHERNET] = np.frombuffer(bytes.fromhex("020000000001 020000000002 0800"), np.uint8)
    records["frame"][:, ETHERNET:] = synthetic.frames(settings, np.arange(FLOWS), size)
    return records


def check(taken: Taken, packets: int, length: int) -> None:
    """All packets, all bytes."""
    assert taken.packets == packets, taken
    assert taken.octets == packets * length, taken
    assert taken.marks == packets // FLOWS * sum(i & 255 for i in range(FLOWS)), taken


# -- ours ------------------------------------------------------------------------------------------------------


@njit
def tally(payload: Any, info: Any, state: Any) -> None:
    """Bytes, and the sum of marks."""
    state[0] += payload.size
    state[1] += payload[MARK]


def compile_sweep() -> None:
    """For all processes that are forked later: what `consume` would compile when it is first called."""
    rows, memory = np.empty(0, np.int64), np.zeros(64, np.uint8)
    sweep_for(tally)(memory, rows, rows, np.zeros(CURSOR_WORDS, np.int64), 0, 1, np.zeros(2, np.int64))


def take_consume(sock: Any, packets: int, most: int) -> tuple[int, int, int]:
    """The jitted function."""
    state, count = np.zeros(2, np.int64), 0
    while count < packets:
        count += sock.consume(tally, state, packets - count)
    return count, int(state[0]), int(state[1])


def take_batches(sock: Any, packets: int, most: int) -> tuple[int, int, int]:
    """NumPy on each batch."""
    count = octets = marks = 0
    while count < packets:
        with sock.recv_batch(most) as batch:
            count += len(batch)
            octets += int(batch.lengths.sum())
            marks += int(batch.data[batch.offsets + MARK].sum())
    return count, octets, marks


def consumer(name: str, options: argparse.Namespace) -> Taken:
    """Its process."""
    take = {"consume": take_consume, "recv_batch": take_batches}[options.call]
    with dataplane.attach(name) as dp, dp.udp("0.0.0.0", PORT) as sock:
        begin = time.perf_counter()
        with dp.udp(remote=NOBODY):
            count, octets, marks = take(sock, options.packets, options.max_packets)
            seconds = time.perf_counter() - begin
            for batch in sock.batches():        # there are no more: until the dataplane has ended
                count += len(batch)
        return Taken(count, seconds, octets, marks)


def run_dataplane(path: Path, options: argparse.Namespace) -> Taken:
    """One dataplane that plays the file once."""
    config = CONFIG % {"core": harness.CORES[0], "ring_bytes": options.ring_bytes, "path": path}
    with harness.running(config) as running:
        taken: Taken = harness.fork(harness.CORES[1], consumer, running.name, options).result(60)
        running.wait()
        ledger = running.ledger
    packets = options.packets
    assert ledger["offered"] == ledger["delivered"] == ledger["consumed"] == packets and not ledger["dropped"], ledger
    return taken


# -- peers -----------------------------------------------------------------------------------------------------


def read_pcapy(path: Path, options: argparse.Namespace) -> Taken:
    """libpcap's own loop with a Python function for each packet, or one packet a call."""
    import pcapy

    reader = pcapy.open_offline(str(path))
    if options.filter:
        reader.setfilter(options.filter)
    count = octets = marks = 0

    def packet(header: Any, data: bytes) -> None:
        nonlocal count, octets, marks
        count += 1
        octets += len(data)
        marks += data[MARK_OF_FRAME]

    begin = time.perf_counter()
    if options.call == "loop":
        reader.loop(-1, packet)
    elif options.call == "dispatch":
        reader.dispatch(-1, packet)
    else:
        following = reader.next
        while (got := following())[0] is not None:
            packet(*got)
    return Taken(count, time.perf_counter() - begin, octets, marks)


def read_scapy(path: Path, options: argparse.Namespace) -> Taken:
    """RawPcapReader: bytes. PcapReader: dissected packets."""
    from scapy.layers import inet, l2  # noqa: F401  what PcapReader dissects
    from scapy.utils import PcapReader, RawPcapReader

    count = octets = marks = 0
    with {"RawPcapReader": RawPcapReader, "PcapReader": PcapReader}[options.call](str(path)) as reader:
        begin = time.perf_counter()
        for packet in reader:
            data = packet[0] if options.call == "RawPcapReader" else packet.original
            count += 1
            octets += len(data)
            marks += data[MARK_OF_FRAME]
        seconds = time.perf_counter() - begin
    return Taken(count, seconds, octets, marks)


def run_peer(path: Path, options: argparse.Namespace) -> Taken:
    """In a process of its own."""
    read: Callable[[Path, argparse.Namespace], Taken] = {"pcapy-ng": read_pcapy, "scapy": read_scapy}[options.of]
    taken: Taken = harness.fork(harness.CORES[1], read, path, options).result(100)
    return taken


def need(peer: str) -> None:
    """Whether it is installed."""
    try:
        __import__({"pcapy-ng": "pcapy", "scapy": "scapy.utils", "dataplane": "dataplane"}[peer])
    except ImportError:
        raise harness.Missing(f"pip install {peer}") from None


# -- all of it -------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--of", choices=CALLS, default="dataplane")
    parser.add_argument("--call", choices=[call for calls in CALLS.values() for call in calls])
    parser.add_argument("--size", type=int, default=200, help="bytes of the IP packet")
    parser.add_argument("--packets", type=int, help="in the file: made a multiple of 1024")
    parser.add_argument("--max-packets", type=int, default=1024, help="of a batch")
    parser.add_argument("--ring-bytes", type=int, default=262144, help="of our socket")
    parser.add_argument("--filter", default=f"udp dst port {PORT}", help="pcapy-ng's; empty: none")
    options = parser.parse_args()
    options.call = options.call or CALLS[options.of][0]
    if options.call not in CALLS[options.of]:
        parser.error(f"--of {options.of} has --call {', '.join(CALLS[options.of])}")
    most = options.packets or PACKETS.get(options.of) or SCAPY_PACKETS[options.call]
    options.packets = max(1, most // FLOWS) * FLOWS
    return options


def main() -> None:
    if len(harness.CORES) < 2:
        raise harness.Missing("a second core")
    options = arguments()
    need(options.of)
    path = capture(options.packets, options.size)
    ours = options.of == "dataplane"
    if ours and options.call == "consume":
        compile_sweep()
    length = options.size - IP_AND_UDP if ours else options.size + ETHERNET
    rates = []
    for number in range(options.repeats + 1):
        taken = (run_dataplane if ours else run_peer)(path, options)
        check(taken, options.packets, length)
        if number:
            rates.append(taken.packets / taken.seconds / 1e6)
    harness.report(f"offline.{options.call}" + ("" if ours else f".{options.of}"), "Mpps", rates, options)


if __name__ == "__main__":
    harness.run(main)
