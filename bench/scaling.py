"""How the running dataplane scales with its RX workers, and what a packet costs with larger rings.

    python -m bench.scaling                         1 to N RX workers on N cores: times the throughput of one
    python -m bench.scaling --separate              the same with a dataplane of its own for each worker
    python -m bench.scaling --consumers 1           a consumer on a core of its own for each worker
    python -m bench.scaling --what ring --ring-bytes 4096       ns per packet with rings of that size

The supervisor, workers, table, rings and ledger are those of `dataplane run`; packets come from the synthetic netif, as
fast as they are taken. Each worker is pinned to a core of its own, 1024 sockets are open, and everything is delivered
into their rings.

Somebody has to empty these rings. A consumer that reads packets takes about as long for it as a worker, and on a
machine of N cores with N workers it would take that from one of them. So without `--consumers` the rings are emptied
by a process that reads no packet: every few milliseconds it sets each ring's tail to its head, one load and two stores
a ring, whatever is in it. It shares the first worker's core (for one worker as for N of them), and takes about one
percent of it; how much is measured, and printed as `emptying`. Workers do all that they do for packets that are
read: parse, look up, copy, publish, count. Rings are never full, or there is no figure. A ring's records all have one
size, so the number of packets in it follows from head and tail exactly, and is counted as consumed: at the end the
ledger must balance, and published packets be consumed ones and unread ones.

`--separate` measures what is the machine's (caches, memory, a hypervisor's threads): as many dataplanes as workers,
which share nothing at all, at the same time. The difference is what workers of one dataplane cost each other.

With `--consumers 1` packets are consumed by real consumers, on cores that no worker has; that needs two cores for each
worker.

1 and 2, ... N workers take turns, each time with a dataplane of its own; the figure is the median of the ratios within
a turn. N workers on N cores leave no core for anything else, and any other process costs them what it takes; one worker
it costs nothing. So a turn in which the scheduler gave some worker less than 95 % of its core, or so little to the
emptying that a ring was full, is taken again, up to as many times as there are repeats. `disturbed` says how often,
`worker_had` the least part in the turns that count.

The Universal Scalability Law (bench/usl.py) is fitted to all throughputs. On two cores it has one parameter besides the
rate, and what it says of 64 cores is an upper bound and not a measurement: kappa cannot be known, and the worst and the
best turn are fitted as well, to show how far apart their predictions are.

Rings of different sizes (`--what ring`): one worker, 64 sockets with backpressure, so that nothing is lost, and the
same process on another core, where it does not sleep; it empties rings when about a third of them is full.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

import dataplane
from bench import harness, usl
from dataplane.client.drain import ROW_LANE, ROW_MASK, ROW_POSITION, ROW_TAIL
from dataplane.client.poller import Poller
from dataplane.jit import kernel
from dataplane.rings.lane import lane_peek, lane_release
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64, prefetch, st64

FIRST_PORT = 5000
NOBODY = ("192.0.2.254", 9)     # of the socket whose opening releases the packets
WARM = 0.3                      # s, before the first window
PREDICT = 64                    # workers
UNDISTURBED = 0.95              # of its core a worker has when nothing else runs there

CONFIG = """
name = "{{name}}"
[rx]
cores = {cores}
idle = "busy"
[sockets]
max = {most}
ring_bytes = {ring_bytes}
[[netif]]
kind = "synthetic"
flows = {flows}
local_ports = [{first}, {last}]
size = {size}
backpressure = {backpressure}
start = {start}
"""


@kernel("i64(mem, vec, i64, vec)")
def discard(mem, rows, record, most):
    """Gives all rings back as they are, unread. Each record takes `record` bytes; the piece at a ring's end that is
    too small for one is padding. Returns how many packets that was; `most` keeps the most bytes that were in a ring."""
    total = 0
    for i in range(rows.size):
        prefetch(mem, ld64(mem, rows[min(i + 8, rows.size - 1)] + ROW_LANE) + L.LANE_HEAD)
        row = rows[i]
        size = ld64(mem, row + ROW_MASK) + 1
        position, head = ld64(mem, row + ROW_POSITION), lane_peek(mem, ld64(mem, row + ROW_LANE))
        if head == position:
            continue
        most[0] = max(most[0], head - position)
        packets = (head // size - position // size) * (size // record)
        packets += head % size // record - position % size // record
        st64(mem, row + ROW_TAIL, head)
        st64(mem, row + ROW_POSITION, head)
        lane_release(mem, ld64(mem, row + ROW_LANE), head, packets)
        total += packets
    return total


@njit
def tally(payload: Any, info: Any, state: Any) -> None:
    """Packets of each socket, and something of each payload, so that it was really read."""
    state[0][info.socket] += 1
    state[1][0] += payload[0] + payload[-1]


def record_bytes(size: int) -> int:
    """What a packet takes in a ring."""
    return -(-(size + L.RECORD_DATA) // L.RECORD_ALIGN) * L.RECORD_ALIGN


@dataclass(frozen=True)
class Outcome:
    """Packets a second of each window; the part of a core that emptying took; the least part that a worker had of its
    own; whether some ring was full."""

    rates: list[float]
    emptying: float
    worker: float
    full: bool


class Discarder:
    """Empties rings without reading them, every `pause` seconds. `spin`: it does not sleep in between."""

    def __init__(self, poller: Poller, size: int, pause: float, spin: bool) -> None:
        self._poller, self._record, self._pause, self._spin = poller, record_bytes(size), pause, spin
        self._most = np.zeros(1, np.int64)

    def take(self) -> int:
        """Waits, then empties; how many packets."""
        if not self._spin:
            time.sleep(self._pause)
        until = time.monotonic() + self._pause
        while self._spin and time.monotonic() < until:
            pass
        return int(discard(self._poller.session.memory.mem, self._poller.rows, self._record, self._most))

    def full(self, ring_bytes: int) -> bool:
        """Whether some ring can have been full: a worker that found no room leaves less than two records free."""
        return bool(self._most[0] > ring_bytes - 2 * self._record)


class Reader:
    """A consumer that reads all packets."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._state = np.zeros(len(poller), np.int64), np.zeros(1, np.int64)
        self.take(0)

    def take(self, timeout: float = 0.01) -> int:
        """What comes within that time; compiled by the first call."""
        return self._poller.consume(tally, self._state, timeout=timeout)

    def full(self, ring_bytes: int) -> bool:
        """Nobody asks: what counts is what it took."""
        return False


def empty(name: str, ports: range, options: argparse.Namespace, pause: float, windows: int,
          ready: int) -> Outcome:
    """A process that empties the rings of sockets it opens."""
    with dataplane.attach(name) as dp, dp.poller([dp.udp("0.0.0.0", port) for port in ports]) as poller:
        taker = Reader(poller) if options.consumers else Discarder(
            poller, options.size, pause, spin=options.what == "ring")
        pids = [os.getpid(), *(worker["pid"] for worker in dp.stats()["workers"])]
        os.write(ready, b"1")
        while not taker.take():
            time.sleep(0.001)
        _window(taker, WARM)
        began, before = time.monotonic(), ran(pids)
        rates = [_window(taker, options.seconds) for _ in range(windows)]
        own, *workers = (ran(pids) - before) / (time.monotonic() - began)
        full = taker.full(options.ring_bytes)
    return Outcome(rates, float(own), float(min(workers)), full)


def ran(pids: list[int]) -> Any:
    """Seconds for which each of these processes has had a core."""
    return np.array([int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids]) / 1e9


def _window(taker: Discarder | Reader, seconds: float) -> float:
    """Empties for so long: packets a second, from one emptying to another."""
    taker.take()
    began = now = time.monotonic()
    total = 0
    while now - began < seconds:
        total += taker.take()
        now = time.monotonic()
    return total / (now - began)


def configuration(options: argparse.Namespace, cores: list[int], backpressure: bool) -> str:
    """As many flows for each worker as there are sockets."""
    last = FIRST_PORT + options.sockets - 1
    return CONFIG.format(
        cores=cores, most=2 * options.sockets + 16, ring_bytes=options.ring_bytes,
        flows=len(cores) * options.sockets, first=FIRST_PORT, last=last, size=options.size,
        backpressure=str(backpressure).lower(), start=options.sockets + 1)


def measure(options: argparse.Namespace, workers: list[list[int]], cores: list[int], pause: float, windows: int = 1,
            backpressure: bool = False) -> Outcome:
    """Dataplanes at the same time, with workers on these cores each (usually it is one). A process on each of `cores`
    empties its share of the sockets' rings of each."""
    ready, theirs = os.pipe()
    ports = np.array_split(np.arange(FIRST_PORT, FIRST_PORT + options.sockets), len(cores))
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(harness.running(configuration(options, own, backpressure))) for own in workers]
        children = [
            harness.fork(core, empty, run.name, range(int(some[0]), int(some[-1]) + 1), options, pause, windows, theirs)
            for run in runs for core, some in zip(cores, ports, strict=True)]
        try:
            for _ in children:
                assert os.read(ready, 1) == b"1"
            gates = [stack.enter_context(dataplane.attach(run.name)) for run in runs]
            for gate in gates:
                gate.udp(remote=NOBODY)
            results = [child.result(60) for child in children]
            for gate in gates:
                gate.close()
        finally:
            for child in children:
                child.kill()
            os.close(ready)
            os.close(theirs)
        for run in runs:
            run.process.send_signal(signal.SIGINT)
        for run in runs:
            run.wait()
            check(run.ledger)
    return Outcome([sum(some) for some in zip(*(one.rates for one in results), strict=True)],
                   max(one.emptying for one in results), min(one.worker for one in results),
                   any(one.full for one in results))


def check(ledger: dict[str, Any]) -> None:
    """What was delivered was consumed or is unread. While the sockets are closed, one after the other, rings fill and
    packets find no socket; before that no ring was full (`Outcome.full`)."""
    assert ledger["balanced"] and set(ledger["dropped"]) <= {"no_socket", "pcq_full"}, ledger
    assert ledger["delivered"] == ledger["consumed"] + ledger["unread"], ledger


def scale(options: argparse.Namespace) -> None:
    """Times the throughput of one worker, with as many as there is room for."""
    most = options.workers or len(harness.CORES) // (1 + options.consumers)
    if most < 2:
        raise harness.Missing(f"{2 * (1 + options.consumers)} cores")
    counts = sorted({1, most} | {n for n in range(2, most) if most <= 8 or n & (n - 1) == 0})
    found: dict[int, list[Outcome]] = {n: [] for n in counts}
    disturbed = 0
    while len(found[1]) < options.repeats:
        turn = {n: one_turn(options, n) for n in counts}
        if any(one.full or one.worker < UNDISTURBED for one in turn.values()) and disturbed < options.repeats:
            disturbed += 1
            continue
        assert not any(one.full for one in turn.values()), "rings were full: too much else runs here"
        for n, outcome in turn.items():
            found[n].append(outcome)
    rates = {n: [outcome.rates[0] / 1e6 for outcome in some] for n, some in found.items()}
    ratios = [many / one for many, one in zip(rates[most], rates[1], strict=True)]
    harness.report("scaling.separate" if options.separate else "scaling.workers", "times", ratios, options,
                   disturbed=disturbed, speedup=speedups(rates), **described(rates),
                   emptying={str(n): round(max(one.emptying for one in some), 4) for n, some in found.items()},
                   worker_had={str(n): round(min(one.worker for one in some), 4) for n, some in found.items()})


def one_turn(options: argparse.Namespace, workers: int) -> Outcome:
    """With so many workers."""
    own = harness.CORES[:workers]
    cores = harness.CORES[workers:2 * workers] if options.consumers else own[:1]
    return measure(options, [[core] for core in own] if options.separate else [own], cores, options.pause)


def speedups(rates: dict[int, list[float]]) -> dict[str, float]:
    """The median of the ratios within a turn."""
    return {str(n): round(statistics.median(a / b for a, b in zip(some, rates[1], strict=True)), 3)
            for n, some in rates.items()}


def described(rates: dict[int, list[float]]) -> dict[str, Any]:
    """Throughputs, efficiency and the law fitted to them; predictions of the worst, the middle and the best turn."""
    turns = [usl.fit(list(zip(rates, turn, strict=True))).at(PREDICT) for turn in zip(*rates.values(), strict=True)]
    fitted = usl.fit([(n, rate) for n, values in rates.items() for rate in values])
    middle = {n: statistics.median(values) for n, values in rates.items()}
    return {
        "Mpps": {str(n): [float(f"{rate:.4g}") for rate in values] for n, values in rates.items()},
        "efficiency": {str(n): round(rate / n / middle[1], 3) for n, rate in middle.items()},
        "usl": fitted.as_dict(),
        "predicted_workers": PREDICT,
        "predicted_Mpps": [float(f"{value:.4g}") for value in (min(turns), fitted.at(PREDICT), max(turns))],
    }


def ring(options: argparse.Namespace) -> None:
    """Nanoseconds for a packet, with one worker and rings of this size."""
    if len(harness.CORES) < 2:
        raise harness.Missing("two cores")
    # A third of what a worker, at 20 million packets a second, takes to fill them.
    pause = options.sockets * options.ring_bytes / record_bytes(options.size) / 20e6 / 3
    for _ in range(3):
        found = measure(options, [harness.CORES[:1]], harness.CORES[1:2], pause, options.repeats, backpressure=True)
        if found.emptying > UNDISTURBED:
            break   # else something ran on its core, and the worker may have waited for small rings to be emptied
    harness.report("scaling.ring", "ns", [1e9 / rate for rate in found.rates], options,
                   emptying=round(found.emptying, 3))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--what", choices=["workers", "ring"], default="workers")
    parser.add_argument("--consumers", type=int, choices=[0, 1], default=0, help="for each RX worker")
    parser.add_argument("--separate", action="store_true", help="a dataplane of its own for each worker")
    parser.add_argument("--workers", type=int, help="the most; default: as many as there are cores for")
    parser.add_argument("--sockets", type=int, help="default: 1024; for rings 64")
    parser.add_argument("--size", type=int, default=60, help="bytes of the IP packet")
    parser.add_argument("--ring-bytes", type=int, default=65536, help="of each socket and worker")
    parser.add_argument("--seconds", type=float, help="of a window; default: 0.7; for rings 0.4")
    parser.add_argument("--pause", type=float, default=0.025, help="seconds between two emptyings")
    options = parser.parse_args()
    of_rings = options.what == "ring"
    options.sockets = options.sockets or (64 if of_rings else 1024)
    options.seconds = options.seconds or (0.4 if of_rings else 0.7)
    # Compiled, or loaded, before anybody forks.
    discard(np.zeros(64, np.uint8), np.empty(0, np.int64), 64, np.zeros(1, np.int64))
    (ring if of_rings else scale)(options)


if __name__ == "__main__":
    harness.run(main)
