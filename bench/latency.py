"""Latency: from a frame's arrival in the RX worker to the consumer's hands.

    python -m bench.latency --mode busy                     the consumer spins
    python -m bench.latency --mode sleeping                 the consumer sleeps on its futex
    python -m bench.latency --mode busy --of raw            half a round trip of one cache line between two cores
    python -m bench.latency --mode sleeping --of raw        half a round trip of two POSIX semaphores

The RX worker is on the first core, the consumer on the second. Frames come from the synthetic netif, one at a time: it
reads CLOCK_REALTIME when the worker asks it and a frame is due, and that is the record's timestamp. The consumer is a
jitted function in `consume`, which reads the same clock and subtracts. The worker never sleeps (`idle = "busy"`) in
both modes, so that the consumer's wake alone is in the way: in the mode `sleeping` the consumer attaches with
`spin_us=0` and frames are so rare that it sleeps before each.

The references have the same two cores. busy: one process writes a number, the other one answers with the same number
in another line, each spinning (the project's own atomics). sleeping: native/semaphores.c, sem_post and sem_wait, each
process asleep when the other one posts. Trips begin at the rate of the frames, so that a core has slept as long
before it is woken; --back-to-back begins each when the last has ended.

Median of each repeat; beside it the percentiles of all repeats together, from an HDR histogram.
"""

from __future__ import annotations

import argparse
import mmap
import subprocess
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

import dataplane
from bench import harness
from dataplane.jit import kernel
from dataplane.shm.atomics import load_acquire, st64, store_release, view
from dataplane.shm.libc import CLOCK_MONOTONIC, CLOCK_REALTIME, clock_ns

PORT = 5000
NOBODY = ("192.0.2.254", 9)
RATES = {"busy": 20_000, "sleeping": 2_000}
PERCENTILES = (50, 90, 99, 99.9, 99.99)
LONGEST_NS = 10_000_000_000     # a longer one is an error

CONFIG = """
name = "{name}"
[rx]
cores = [%d]
idle = "busy"
[sockets]
max = 16
[[netif]]
kind = "synthetic"
flows = 16
local_ports = [5000, 5000]
size = 60
rate = %d
count = %d
start = 2
"""


@njit
def stamp(payload: Any, info: Any, state: Any) -> None:
    """Notes how old the packet is."""
    ages, count, scratch = state
    ages[count[0]] = clock_ns(view(scratch, 0, 16), 0, CLOCK_REALTIME) - info.timestamp_ns
    count[0] += 1


# -- ours --------------------------------------------------------------------------------------------------------


def consumer(name: str, spin_us: float, runs: int, size: int) -> npt.NDArray[np.int64]:
    """The consumer's process: the ages of `size` packets, `runs` times. The first run is the warm-up."""
    ages, count, scratch = np.zeros((runs, size), np.int64), np.zeros(1, np.int64), np.zeros(16, np.uint8)
    with dataplane.attach(name, spin_us=spin_us) as dp, dp.udp(port=PORT) as sock:
        sock.consume(stamp, (ages[0], count, scratch), timeout=0)       # compiled
        with dp.udp(remote=NOBODY):     # the second socket: frames come
            for row in ages:
                count[0] = 0
                assert sock.consume(stamp, (row, count, scratch), max_packets=size, timeout=60) == size
    return ages


def ours(options: argparse.Namespace) -> list[npt.NDArray[np.int64]]:
    """Ages in ns, an array for each repeat."""
    size, runs = run_of(options), options.repeats + 1
    spin_us = 1e5 if options.mode == "busy" else 0.0
    config = CONFIG % (harness.CORES[0], options.rate, size * runs)
    with harness.running(config) as running:
        child = harness.fork(harness.CORES[1], consumer, running.name, spin_us, runs, size)
        try:
            found = child.result(100)
            running.wait()
        finally:
            child.kill()
        ledger = running.ledger
    assert ledger["offered"] == ledger["delivered"] == size * runs and not ledger["dropped"], ledger
    return list(found[1:])


# -- references --------------------------------------------------------------------------------------------------

_GO, _BACK, _SCRATCH, _TIMES = 0, 64, 128, 192      # two cache lines of their own; the clock's scratch; the results


@kernel("none(mem, i64, i64)")
def ping(mem, size, every_ns):
    """Writes the numbers from 1 to `size`, one every so many ns, each when the last has come back. Notes how long each
    was under way."""
    due = clock_ns(mem, _SCRATCH, CLOCK_MONOTONIC)
    for i in range(1, size + 1):
        now = clock_ns(mem, _SCRATCH, CLOCK_MONOTONIC)
        while now < due:
            now = clock_ns(mem, _SCRATCH, CLOCK_MONOTONIC)
        store_release(mem, _GO, i)
        while load_acquire(mem, _BACK) != i:
            pass
        st64(mem, _TIMES + 8 * i, clock_ns(mem, _SCRATCH, CLOCK_MONOTONIC) - now)
        due = now + every_ns


@kernel("none(mem, i64)")
def pong(mem, size):
    """Answers them."""
    for i in range(1, size + 1):
        while load_acquire(mem, _GO) != i:
            pass
        store_release(mem, _BACK, i)


def spinning(every_ns: int, size: int) -> npt.NDArray[np.int64]:
    """Round trips of a cache line between two processes that spin."""
    room = mmap.mmap(-1, _TIMES + 8 * (size + 1))
    mem = np.frombuffer(room, np.uint8)
    pong.compile()
    child = harness.fork(harness.CORES[1], pong, mem, size)
    try:
        harness.fork(harness.CORES[0], ping, mem, size, every_ns).result(100)
        child.result(10)
    finally:
        child.kill()
    return mem[_TIMES + 8:].view(np.int64).copy()


def sleeping(every_ns: int, size: int) -> npt.NDArray[np.int64]:
    """Round trips between two processes that sleep on POSIX semaphores; native/semaphores.c."""
    cores = [str(core) for core in harness.CORES[:2]]
    command = [str(harness.native("semaphores")), *cores, str(size), str(every_ns)]
    return np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.int64)


def raw(options: argparse.Namespace) -> list[npt.NDArray[np.int64]]:
    """Half of each round trip in ns, an array for each repeat."""
    every_ns = 0 if options.back_to_back else round(1e9 / options.rate)
    trip = spinning if options.mode == "busy" else sleeping
    ping.compile()
    return [trip(every_ns, run_of(options)) // 2 for _ in range(options.repeats + 1)][1:]


# -- the figure --------------------------------------------------------------------------------------------------


def run_of(options: argparse.Namespace) -> int:
    """Packets, or round trips, of one repeat."""
    return int(options.rate * options.seconds)


def percentiles(ages: list[npt.NDArray[np.int64]]) -> dict[str, float]:
    """Of all of them, by an HDR histogram of three digits, in µs."""
    try:
        from hdrh.histogram import HdrHistogram
    except ImportError:
        raise harness.Missing("pip install hdrhistogram") from None
    histogram = HdrHistogram(1, LONGEST_NS, 3)
    for age in np.concatenate(ages).tolist():
        assert histogram.record_value(max(age, 1)), f"{age} ns"
    named = {f"p{value:g}": histogram.get_value_at_percentile(value) for value in PERCENTILES}
    return {name: round(value / 1000, 3) for name, value in (named | {"max": histogram.get_max_value()}).items()}


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--mode", choices=list(RATES), default="busy")
    parser.add_argument("--of", choices=["dataplane", "raw"], default="dataplane")
    parser.add_argument("--rate", type=int, help="frames a second; 20,000 busy, 2,000 sleeping")
    parser.add_argument("--seconds", type=float, default=0.8, help="of each repeat")
    parser.add_argument("--back-to-back", action="store_true", help="of raw: no pause between round trips")
    options = parser.parse_args()
    options.rate = options.rate or RATES[options.mode]
    return options


def main() -> None:
    options = arguments()
    ages = ours(options) if options.of == "dataplane" else raw(options)
    suffix = "" if options.of == "dataplane" else f".{options.of}"
    values = [float(np.median(one)) / 1000 for one in ages]
    harness.report(f"latency.{options.mode}{suffix}", "µs", values, options, **percentiles(ages))


if __name__ == "__main__":
    harness.run(main)
