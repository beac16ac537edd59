"""The fuzzer's loop: mutate an input that has shown something new, run it, keep it if it shows something new again.

What an input "shows" are its target's *features*, a set of numbers. Targets whose code exists as Python (all kernels
do: see tracing.py) give the edges of its control flow, so that this is coverage-guided in the sense of AFL and
libFuzzer: an edge that was never taken, or taken twice as often as ever, is new. A target whose decoder is a library in
C gives the class of its answer instead; that target says so.

    report = campaign(Frames, seed=1, inputs=2000)          # in a process of its own

An input is a tuple of byte strings. Everything is drawn from the seed, so that a run of so many inputs is the same each
time. The process that runs the target writes each input to shared memory first: when it dies (a guard page, a hang),
the input is still known. All that fails is reported as the line to be put into the corpus, whose lines are run first
ever after. What a target promises is in its own module.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.children import Child

__all__ = ["CORPUS", "Failed", "Fuzzer", "Input", "Report", "Target", "campaign", "corpus", "line", "unline"]

Input = tuple[bytes, ...]
CORPUS = Path(__file__).parent / "corpus"
HANG = 20.0         # seconds of processor time after which one input is a hang; the slowest takes some milliseconds
_SHARED = 1 << 20
_INPUT_MAX = 300_000


class Failed(AssertionError):
    """A property did not hold, or the process died."""


class Target(Protocol):
    """What is fuzzed. `run` returns the input's features, or raises what it found."""

    name: str

    def seeds(self) -> Iterable[Input]: ...

    def mutate(self, dice: random.Random, one: Input, other: Input) -> Input: ...

    def run(self, one: Input) -> set[int]: ...


@dataclass
class Report:
    """A campaign's figures. `seconds` are of processor time. `kept`: inputs that showed something new, seeds included.
    `notes`: the target's own."""

    target: str
    inputs: int
    seconds: float
    features: int
    kept: int
    notes: dict[str, int]

    def __str__(self) -> str:
        notes = "".join(f", {name} {count}" for name, count in self.notes.items())
        return (f"{self.target}: {self.inputs} inputs, {self.inputs / max(self.seconds, 1e-9):.0f}/s, "
                f"{self.features} features, {self.kept} kept{notes}")


def line(one: Input) -> str:
    """An input as a line of a corpus file."""
    return " ".join(part.hex() or "-" for part in one)


def unline(text: str) -> Input:
    return tuple(b"" if part == "-" else bytes.fromhex(part) for part in text.split())


def corpus(name: str) -> list[Input]:
    """The inputs of `corpus/NAME.hex`; # begins a comment."""
    path = CORPUS / f"{name}.hex"
    lines = (text.partition("#")[0].strip() for text in path.read_text().splitlines()) if path.exists() else ()
    return [unline(text) for text in lines if text]


class Fuzzer:
    """A target, what is known of it, and the dice."""

    def __init__(self, target: Target, seed: int, watch: Callable[[Input], None] = lambda one: None) -> None:
        self.target, self.dice, self.watch = target, random.Random(f"{target.name} {seed}"), watch
        self.seen: set[int] = set()
        self.pool: list[Input] = []
        self.inputs = 0

    def try_one(self, one: Input, keep: bool = False) -> bool:
        """Runs it; whether it showed something new. `keep` it in any case."""
        self.watch(one)
        features = self.target.run(one)
        self.inputs += 1
        new = not features <= self.seen
        if new or keep:
            self.seen |= features
            self.pool.append(one)
        return new

    def begin(self) -> None:
        """Runs the corpus and the seeds."""
        for one in (*corpus(self.target.name), *self.target.seeds()):
            self.try_one(one, keep=True)

    def go_on(self) -> bool:
        """Runs a new input; whether it showed something new. What was found last is tried most."""
        dice, pool = self.dice, self.pool
        newest = int(len(pool) * max(dice.random(), dice.random()))
        one = pool[newest] if dice.random() < 0.5 else dice.choice(pool)
        for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
            one = self.target.mutate(dice, one, dice.choice(pool))
        return sum(map(len, one)) <= _INPUT_MAX and self.try_one(one)


def campaign(make: Callable[[], Target], seed: int, inputs: int = 0, seconds: float = 0.0,
             harvest: Path | None = None, hang: float = HANG) -> Report:
    """Fuzzes so many inputs, those of corpus and seeds included, or for so long, in a forked process; raises Failed.

    harvest: where to write a small corpus of what was kept.
    """
    shared = mmap.mmap(-1, _SHARED)
    with tempfile.TemporaryDirectory() as folder:
        def work() -> None:
            tempfile.tempdir = folder       # whatever way the process ends, its files are removed here
            _work(shared, make, seed, inputs, seconds, harvest, hang)

        with Child(work) as child:
            status = child.join(seconds + 100.0)
    size, kind = struct.unpack_from("<II", shared)
    said = bytes(shared[8:8 + size])
    if status == 0 and kind == _REPORT:
        return Report(**json.loads(said))
    how = "hung" if status == -signal.SIGPROF else f"died of signal {-status}" if status < 0 else "failed"
    text = said.decode() if kind != _INPUT else f"corpus line: {said.decode()}"
    raise Failed(f"seed {seed}: the target {how}\n{text}")


_INPUT, _TEXT, _REPORT = 1, 2, 3


def _tell(shared: Any, kind: int, text: str) -> None:
    data = text.encode()[:_SHARED - 8]
    shared[8:8 + len(data)] = data
    struct.pack_into("<II", shared, 0, len(data), kind)


def _work(shared: Any, make: Callable[[], Target], seed: int, inputs: int, seconds: float,
          harvest: Path | None, hang: float) -> None:
    def watch(one: Input) -> None:
        # Nothing handles the signal: it ends the process in the middle of compiled code as well.
        signal.setitimer(signal.ITIMER_PROF, hang)
        _tell(shared, _INPUT, line(one))
        last[0] = one

    last: list[Input] = [()]
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        report = _fuzz(Fuzzer(make(), seed, watch), inputs, seconds, harvest)
    except BaseException:
        _tell(shared, _TEXT, f"corpus line: {line(last[0])}\n{traceback.format_exc()}")
        os._exit(1)
    signal.setitimer(signal.ITIMER_PROF, 0)
    _tell(shared, _REPORT, json.dumps(vars(report)))


def _fuzz(fuzzer: Fuzzer, inputs: int, seconds: float, harvest: Path | None) -> Report:
    begin = time.process_time()
    fuzzer.begin()
    end = time.monotonic() + seconds
    while fuzzer.inputs < inputs or time.monotonic() < end:
        fuzzer.go_on()
    notes = dict(getattr(fuzzer.target, "notes", {}))
    took = time.process_time() - begin
    if harvest:
        _harvest(fuzzer, harvest)
    return Report(fuzzer.target.name, fuzzer.inputs, took, len(fuzzer.seen), len(fuzzer.pool), notes)


def _harvest(fuzzer: Fuzzer, path: Path, most: int = 40) -> None:
    """Writes the kept inputs that together show the most, shortest first, and none that the seeds make needless."""
    target = fuzzer.target
    known: set[int] = set().union(*(target.run(one) for one in target.seeds()))
    left = [(one, target.run(one)) for one in fuzzer.pool]
    chosen: list[Input] = []
    while left and len(chosen) < most:
        one, features = max(left, key=lambda pair: (len(pair[1] - known), -sum(map(len, pair[0]))))
        if not features - known:
            break
        known |= features
        chosen.append(one)
        left = [pair for pair in left if not pair[1] <= known]
    path.write_text("".join(f"{line(one)}\n" for one in chosen))

