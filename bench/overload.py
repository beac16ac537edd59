"""A socket that gets more than its consumer takes: what the consumer still gets, and what others notice.

    python -m bench.overload                    offered load from 0.1 to 10 times what the consumer takes
    python -m bench.overload --case stopped     the same socket while its consumer is stopped by SIGSTOP

An RX worker on the first core; on the second one eight consumers, each a process with one UDP socket. One of them is
flooded: its kernel works for some microseconds on each packet, so that what it takes is known and far below what
the worker can offer. The other seven get a modest fixed load and take it with `batches`.

First the flooded socket is offered ten times a guess: what it takes then is its capacity. Then comes a dataplane with a
synthetic netif of its own for each load and repeat, released one after the other by the opening of one more
socket. The netif's seed chooses the remote port, by which the consumer's kernel knows what a packet belongs to.

The figure of `flood`: what is delivered at the highest load, in each repeat, as a part of the best of the curve, whose
points are medians of all repeats. That of `stopped`: what the other seven get of what they are offered, while a
stopped consumer's socket is flooded. With both: the others' rate, drops and latency, from the netif to their process,
at the highest load. Every packet is accounted for: taken, or dropped since a ring was full. What the other seven have
not got is counted as their drops.

A rate is what was taken of a phase, over the time in which that was received. What is in the ring when the load ends is
taken as well: with an overload that is about 500 packets too many, less than 0.5 %.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import select
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

import dataplane
from bench import harness
from tests.netns import Forked

LOADS = {"flood": (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0), "stopped": (1.0, 10.0)}
"""Offered packets, as multiples of what the consumer takes."""

FLOODED, FIRST_OTHER, OTHERS = 5000, 5001, 7
WORK = 1500                 # turns of the kernel's loop for each packet: about 3 µs
GUESS = 3_000_000           # packets a second that are more than it takes
PAUSE = 0.1                 # seconds between two loads: everything has been taken
SETTLE_NS = 20_000_000      # not counted after a change of load

Words = npt.NDArray[np.int64]

CONFIG = """
name = "{name}"
[rx]
cores = [{core}]
idle = "busy"
[sockets]
max = 256
"""

NETIF = """
[[netif]]
kind = "synthetic"
flows = {flows}
local_ports = [{first}, {last}]
rate = {rate}
count = {count}
start = {start}
seed = {seed}
"""


@dataclass
class Phase:
    """One load of one repeat."""

    load: float
    repeat: int
    rate: int               # packets a second offered
    count: int              # packets offered


@dataclass
class Outcome:
    """What a run has shown."""

    taken: Words                                # by the flooded consumer, in each phase
    span: Words                                 # ns from the reception of the first of them to that of the last
    windows: list[tuple[int, int]]              # of each phase, ns since the epoch
    others: list[tuple[Words, Words]]           # each one's packets: when received, and how much later taken, ns
    missing: int                                # packets that the others have not got
    ledger: dict[str, Any]


# -- consumers ---------------------------------------------------------------------------------------------------


@njit
def work(payload: Any, info: Any, state: Any) -> None:
    """Counts the packet under its phase, and is busy for a while."""
    counts, first, last, sink = state
    phase = info.remote_port - 1024
    if counts[phase] == 0:
        first[phase] = info.timestamp_ns
    counts[phase] += 1
    last[phase] = info.timestamp_ns
    x = info.timestamp_ns | 1
    for _ in range(WORK):
        x ^= x << 13
        x ^= x >> 7
        x ^= x << 17
    sink[0] += x


def flooded(name: str, phases: int, ready: int) -> tuple[Words, Words]:
    """The flooded consumer, until the dataplane has ended: packets of each phase, and their span."""
    state = tuple(np.zeros(size, np.int64) for size in (phases, phases, phases, 1))
    with dataplane.attach(name) as dp, dp.udp("0.0.0.0", FLOODED) as sock:
        sock.consume(work, state, timeout=0)    # compiled before the clock runs
        os.write(ready, b"x")
        with contextlib.suppress(dataplane.Stopped):
            while True:
                sock.consume(work, state, max_packets=1 << 22)
    return state[0], state[2] - state[1]


def other(name: str, port: int, ready: int) -> tuple[Words, Words]:
    """One of the seven: when each packet was received by the worker, and how much later it was here."""
    times, latencies = [], []
    with dataplane.attach(name, spin_us=0) as dp, dp.udp("0.0.0.0", port) as sock:
        os.write(ready, b"x")
        for batch in sock.batches():
            now = time.time_ns()
            times.append(batch.timestamps_ns.copy())
            latencies.append(now - times[-1])
    return np.concatenate(times), np.concatenate(latencies)


# -- a run -------------------------------------------------------------------------------------------------------


def configuration(phases: list[Phase], others: int, rate: int) -> str:
    """The netif of the other seven, released with the first phase, and one for each phase."""
    text = CONFIG.replace("{core}", str(harness.CORES[0])) + NETIF.format(
        flows=OTHERS, first=FIRST_OTHER, last=FIRST_OTHER + OTHERS - 1, rate=rate * OTHERS, count=others * OTHERS,
        start=OTHERS + 2, seed=0)
    return text + "".join(
        NETIF.format(flows=1, first=FLOODED, last=FLOODED, rate=phase.rate, count=phase.count,
                     start=OTHERS + 2 + number, seed=number) for number, phase in enumerate(phases))


def run(phases: list[Phase], options: argparse.Namespace, stop: bool = False) -> Outcome:
    """All phases, one after the other, in one dataplane."""
    core = (harness.CORES * 2)[1]
    count = int(options.rate * (len(phases) * (options.seconds + PAUSE) * 1.03 + 0.2))
    listen, ready = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, listen)
        stack.callback(os.close, ready)
        at = stack.enter_context(harness.running(configuration(phases, count, options.rate)))
        flood = harness.fork(core, flooded, at.name, len(phases), ready)
        stack.callback(flood.kill)
        others = [harness.fork(core, other, at.name, FIRST_OTHER + i, ready) for i in range(OTHERS)]
        for one in others:
            stack.callback(one.kill)
        wait_for(listen, 1 + OTHERS)
        windows = drive(at.name, len(phases), options.seconds, flood if stop else None)
        taken, span = flood.result(60)
        heard = [one.result(60) for one in others]
        at.wait()
        missing = sum(count - len(times) for times, _ in heard)
        outcome = Outcome(taken, span, windows, heard, missing, at.ledger)
    check(phases, count * OTHERS, outcome)
    return outcome


def wait_for(listen: int, count: int) -> None:
    """Until so many consumers have said that they are ready."""
    for _ in range(count):
        if not select.select([listen], [], [], 60)[0]:
            raise TimeoutError("the consumers did not start")
        os.read(listen, 1)


def drive(name: str, phases: int, seconds: float, stopped: Forked | None) -> list[tuple[int, int]]:
    """Releases one phase after the other; returns from when to when each lasted, ns since the epoch."""
    windows = []
    with dataplane.attach(name) as dp, contextlib.ExitStack() as releases:
        for number in range(phases):
            with halted(stopped):
                releases.enter_context(dp.udp(remote=("192.0.2.254", 1 + number)))
                begin = time.time_ns()
                time.sleep(seconds)
                windows.append((begin + SETTLE_NS, begin + int(seconds * 1e9)))
            time.sleep(PAUSE)
        while not dp.ended:     # until then its sockets stay open
            time.sleep(0.01)
    return windows


@contextlib.contextmanager
def halted(process: Forked | None) -> Iterator[None]:
    """The process is stopped meanwhile, if there is one."""
    if process is not None:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if process is not None:
            os.kill(process.pid, signal.SIGCONT)


def check(phases: list[Phase], others: int, outcome: Outcome) -> None:
    """Every packet was offered, and taken or dropped because a ring was full."""
    ledger, taken = outcome.ledger, int(outcome.taken.sum()) + others - outcome.missing
    offered = sum(phase.count for phase in phases) + others
    assert ledger["offered"] == offered and ledger["consumed"] == taken and ledger["unread"] == 0, ledger
    assert ledger["dropped"].get("pcq_full", 0) == offered - taken and set(ledger["dropped"]) <= {"pcq_full"}, ledger


# -- figures -----------------------------------------------------------------------------------------------------


def capacity(options: argparse.Namespace) -> float:
    """What the flooded consumer takes, packets a second, with the seven beside it."""
    phases = [Phase(10, repeat, GUESS, int(GUESS * options.seconds)) for repeat in range(2)]
    outcome = run(phases, options)
    return float(delivered(outcome, 1))


def delivered(outcome: Outcome, phase: int) -> float:
    """Packets a second that the flooded consumer has taken in a phase."""
    return float((outcome.taken[phase] - 1) / max(1, outcome.span[phase]) * 1e9)


def share(outcome: Outcome, phase: int, rate: int) -> float:
    """What the seven have received in a phase, as a part of what they were offered."""
    begin, end = outcome.windows[phase]
    got = sum(int(((times >= begin) & (times < end)).sum()) for times, _ in outcome.others)
    return got / (rate * OTHERS * (end - begin) / 1e9)


def latency(outcome: Outcome, phases: list[int], percentile: float) -> float:
    """Of the seven, in these phases: µs."""
    found = [late[(times >= begin) & (times < end)] for times, late in outcome.others
             for begin, end in (outcome.windows[phase] for phase in phases)]
    return float(np.percentile(np.concatenate(found), percentile) / 1e3)


def curve(phases: list[Phase], outcome: Outcome) -> tuple[list[float], list[float]]:
    """Offered and delivered, thousands of packets a second: the median of all repeats. Offered is what the worker
    has really received, if that is less than it should be."""
    offered, found = [], []
    for load in dict.fromkeys(phase.load for phase in phases):
        mine = [i for i, phase in enumerate(phases) if phase.load == load]
        real = [min(phases[i].rate, phases[i].count / max(1, outcome.span[i]) * 1e9) for i in mine]
        offered.append(round(statistics.median(real) / 1e3, 1))
        found.append(round(statistics.median(delivered(outcome, i) for i in mine) / 1e3, 1))
    return offered, found


def measure(options: argparse.Namespace) -> None:
    """Both runs, and the line."""
    most, loads = capacity(options), LOADS[options.case]
    phases = [Phase(load, repeat, int(most * load), int(most * load * options.seconds))
              for repeat in range(-1, options.repeats) for load in (loads if repeat >= 0 else [0.5])]
    outcome = run(phases, options, options.case == "stopped")
    highest = [i for i, phase in enumerate(phases) if phase.load == loads[-1]]
    shares = [share(outcome, i, options.rate) for i in highest]
    more: dict[str, Any] = {
        "others_rate": round(min(shares), 4), "others_drops": outcome.missing,
        "others_p50_us": round(latency(outcome, highest, 50), 1),
        "others_p99_us": round(latency(outcome, highest, 99), 1),
        "others_p99_us_at_least_load": round(
            latency(outcome, [i for i, phase in enumerate(phases) if phase.load == loads[0]], 99), 1),
        "capacity_kpps": round(most / 1e3, 1)}
    if options.case == "stopped":
        harness.report("overload.stopped", "of offered", shares, options, loads=loads, **more)
        return
    offered, found = curve(phases[1:], dataclasses.replace(
        outcome, taken=outcome.taken[1:], span=outcome.span[1:]))
    best = max(found) * 1e3
    harness.report("overload.flood", "of the best", [delivered(outcome, i) / best for i in highest], options,
                   loads=loads, offered_kpps=offered, delivered_kpps=found, **more)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--case", choices=list(LOADS), default="flood")
    parser.add_argument("--rate", type=int, default=1000, help="packets a second of each of the other seven")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each load and repeat")
    measure(parser.parse_args())


if __name__ == "__main__":
    harness.run(main)
