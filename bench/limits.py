#!/usr/bin/env python3
"""What the machine can do: bounds that no program of this kind can exceed here, to hold the other figures against.

    python -m bench.limits --what copy --size 60 --sockets 1024
    python -m bench.limits --what copy --size 1500 --sockets 1 --ring-bytes 16777216
    python -m bench.limits --what cores --size 60
    python -m bench.limits --what instructions [--of dpdk]
    python -m bench.limits --what call
    python -m bench.limits --what clock

copy: one core copies packets into the rings of their sockets, the other one takes them out; nothing is parsed,
verified or looked up (native/limits.c). Packets, records and rings have the same sizes as in bench.demux, and the
consumer reads the same bytes of each. It is what the caches and the memory allow for anything that copies each packet
into its socket's ring. Ways of copying (memcpy, vectors, prefetching, non-temporal stores), lengths of the consumer's
rests and sizes of pages are tried, in that order, and the best of all is measured: `best` says which, `tried` how fast
each was.

cores: the producer's part of it on one core, then on the other one, then on both at once, as two processes that share
nothing: times the mean of one. What is missing to 2 is the machine's.

instructions: of the RX worker of bench.demux, or of the RX lcore of its peer, for each packet. native/steps.c stops the
process and lets it go on one instruction at a time, over about five hundred packets, while the consumer runs. One
repeat is one process, stepped once; it is the median of its bursts, so that a timer in one of them, or a full ring from
before it was stopped, is not in it. The figure is a count; it does not depend on the load of the machine.

call: packets a second that a Python process can take when there is no network stack: a method that pops (bytes,
(address, port)) from a deque, which is filled again by cutting payloads out of a buffer, with the very loop of
bench.client. `call_ns` is the part of it that the caller pays for each packet if somebody else has filled the deque.

clock: the first core's frequency, from which cycles are computed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import struct
import subprocess
import time
from collections import deque
from pathlib import Path

from bench import client, demux, demux_dpdk, harness
from dataplane.inet.step import step
from dataplane.shm import layout as L

METHODS = ("memcpy", "vector", "burst", "ahead", "stream", "demote")
GATHER, PAGES = (16, 0, 4, 32), ("small", "huge")
TRY_SECONDS = 0.15
STEPPED = 512           # packets
SETTLED = 0.7           # s, before a process is stepped
FOUND = 256             # packets that a deque is filled with
RECORD, PAYLOAD = 80, 32        # bytes of a record of 60-byte packets, and of its payload

# -- the program in C ----------------------------------------------------------------------------------------------


def _ask(options: argparse.Namespace, what: str, method: str, gather: int, pages: str, repeats: int, seconds: float
         ) -> list[list[float]]:
    """Its lines."""
    if len(harness.CORES) < 2:
        raise harness.Missing("it needs two cores")
    numbers = (*harness.CORES[:2], options.size, options.sockets, options.ring_bytes)
    return _run("limits", what, *numbers, method, pages, gather, repeats, seconds)


def _run(program: str, *arguments: object) -> list[list[float]]:
    """Numbers that a program in C prints, a list for each line."""
    command = [str(harness.native(program)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode} {done.stderr}")
    return [[float(word) for word in line.split()] for line in done.stdout.splitlines()]


class Trials:
    """Rates of short runs, by how they were done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.rates: dict[tuple[str, int, str], float] = {}

    def best(self, ways: itertools.product[tuple[str, int, str]]) -> tuple[str, int, str]:
        """The fastest so far, these ones tried as well."""
        for way in ways:
            if way not in self.rates:
                self.rates[way] = max(line[0] for line in _ask(self._options, "copy", *way, 2, TRY_SECONDS))
        return max(self.rates, key=lambda way: self.rates[way])


def copy(options: argparse.Namespace) -> None:
    """Tries the ways, one property after the other, and reports the best."""
    trials = Trials(options)
    method, gather, pages = trials.best(itertools.product(METHODS, GATHER[:1], PAGES[:1]))
    method, gather, pages = trials.best(itertools.product((method,), GATHER, (pages,)))
    way = trials.best(itertools.product((method,), (gather,), PAGES))
    mpps = [line[0] for line in _ask(options, "copy", *way, options.repeats, options.seconds)]
    tried = {" ".join(map(str, one)): round(rate, 2) for one, rate in trials.rates.items()}
    harness.report("limits.copy", "Mpps", mpps, options, ns=round(1e3 / statistics.median(mpps), 2),
                   best=" ".join(map(str, way)), tried=tried)


def cores(options: argparse.Namespace) -> None:
    """Both cores at once, in terms of one."""
    lines = _ask(options, "cores", "vector", 0, "small", options.repeats, options.seconds)
    alone = [[first, second] for first, second, _, _ in lines]
    both = [[first, second] for _, _, first, second in lines]
    times = [2 * sum(two) / sum(one) for one, two in zip(alone, both, strict=True)]
    harness.report("limits.cores", "times", times, options, alone_Mpps=alone, both_Mpps=both)


def clock(options: argparse.Namespace) -> None:
    """Of the first core."""
    values = [line[0] for line in _run("limits", "clock", harness.CORES[0], options.repeats)]
    harness.report("limits.clock", "GHz", values, options)


# -- instructions --------------------------------------------------------------------------------------------------


def _stepped(pid: int, counter: int) -> float:
    """Instructions a packet, of a process with a word that counts packets."""
    harness.need_root()
    return statistics.median(count / packets for count, packets in _run("steps", pid, counter, STEPPED)[1:]
                             if packets == L.BURST)


def _of_worker(options: argparse.Namespace) -> list[float]:
    """Of the RX worker: its ledger counts."""
    chosen = argparse.Namespace(sockets=options.sockets, size=str(options.size), ring_bytes=options.ring_bytes,
                                kind="wildcard")
    bed = demux.Bed(chosen)
    for one in (demux.open_copies, step):
        one.compile()
    values = []
    for _ in range(options.repeats):
        crew = demux.Crew(bed)
        try:
            pid = crew.begin()
            time.sleep(SETTLED)
            values.append(_stepped(pid, bed.mem.ctypes.data + bed.nif + L.N_LEDGER + L.L_OFFERED))
        finally:
            crew.close()
    return values


def _of_lcore(options: argparse.Namespace) -> list[float]:
    """Of the peer's RX lcore, which is its main thread: `rx.sent` counts."""
    program = harness.native("demux_dpdk", ("libdpdk",), demux_dpdk.INSTALL)
    told = subprocess.run(["nm", str(program)], capture_output=True, text=True, check=True).stdout
    [place] = [int(line.split()[0], 16) for line in told.splitlines() if line.split()[-1] == "rx"]
    command = [str(program), "--cores", f"{harness.CORES[0]},{harness.CORES[1]}", "--sockets", str(options.sockets),
               "--size", str(options.size), "--kind", "wildcard", "--source", "copy", "--udp-checksum",
               "--seconds", "60", "--repeats", "1"]
    values = []
    for _ in range(options.repeats):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                time.sleep(2 * SETTLED)
                mapped = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
                base = next(int(line.partition("-")[0], 16) for line in mapped if line.endswith(program.name))
                values.append(_stepped(process.pid, base + place))
            finally:
                process.kill()
    return values


def instructions(options: argparse.Namespace) -> None:
    values = (_of_worker if options.of == "dataplane" else _of_lcore)(options)
    suffix = "" if options.of == "dataplane" else f".{options.of}"
    harness.report(f"limits.instructions{suffix}", "instructions/packet", values, options)


# -- Python --------------------------------------------------------------------------------------------------------


class Floor:
    """A socket without anything behind it: `recvfrom` as the client library has it, and memory instead of a ring."""

    def __init__(self) -> None:
        self._buffer = memoryview(os.urandom(FOUND * RECORD))
        self._cut = struct.Struct(f"{PAYLOAD}s{RECORD - PAYLOAD}x").iter_unpack
        self._addresses = [(f"10.0.{i >> 8}.{i & 255}", 1024 + i) for i in range(FOUND)]
        self._found: deque[tuple[bytes, tuple[str, int]]] = deque()
        self._found_next = self._found.popleft

    def recvfrom(self, timeout: float | None = None) -> tuple[bytes, tuple[str, int]]:
        """The next one."""
        try:
            return self._found_next()
        except IndexError:
            self.fill(1)
            return self._found_next()

    def fill(self, times: int) -> None:
        """Makes the results of so many times FOUND packets."""
        for _ in range(times):
            payloads = [payload for payload, in self._cut(self._buffer)]
            self._found.extend(zip(payloads, self._addresses, strict=True))


def _taking(sock: Floor, packets: int) -> float:
    """Seconds, by the loop of the benchmark."""
    start = time.perf_counter()
    taken = client.take_recvfrom(sock, packets, 0)
    took = time.perf_counter() - start
    assert taken.octets == packets * PAYLOAD, taken
    return took


def call(options: argparse.Namespace) -> None:
    """All of it, and the call alone."""
    harness.pin(harness.CORES[-1])
    sock, packets, filled = Floor(), 1_000_000 // FOUND * FOUND, 64
    _taking(sock, packets)
    mpps = [packets / _taking(sock, packets) / 1e6 for _ in range(options.repeats)]
    alone = []
    for _ in range(options.repeats):
        sock.fill(filled)
        alone.append(_taking(sock, filled * FOUND) / (filled * FOUND) * 1e9)
    harness.report("limits.call", "Mpps", mpps, options, ns=round(1e3 / statistics.median(mpps), 1),
                   call_ns=round(statistics.median(alone), 1))


# -- the figure ----------------------------------------------------------------------------------------------------

WHAT = {"copy": copy, "cores": cores, "instructions": instructions, "call": call, "clock": clock}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--what", choices=list(WHAT), default="copy")
    parser.add_argument("--of", choices=["dataplane", "dpdk"], default="dataplane", help="whose instructions")
    parser.add_argument("--size", type=int, default=60, help="bytes of the IP packet")
    parser.add_argument("--sockets", type=int, default=1024, help="a power of two")
    parser.add_argument("--ring-bytes", type=int, help="of each socket's ring; default: as bench.demux")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each repeat")
    options = parser.parse_args()
    if options.ring_bytes is None:
        options.ring_bytes = demux.ring_bytes(options.sockets, str(options.size))
    WHAT[options.what](options)


if __name__ == "__main__":
    harness.run(main)
