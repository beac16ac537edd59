"""No order of steps lets a worker use what was reclaimed: a worker that may sleep, and a reclaimer."""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.shm import epoch as module
from dataplane.shm import layout as L
from tests.interleavings.explorer import STUCK, Explorer, run
from tests.interleavings.source import actors

TABLE, WORKER = 0, 10_000
ENTRY, PCB = 20_000, 30_000         # the entry points to the PCB, or to nothing
ALIVE, REUSED = 7, 8
MODELS = ("sc", "tso", "pso")
CONSTANTS = {TABLE + L.T_WORKERS: 1, TABLE + L.T_WORKER_AT: WORKER, WORKER + L.W_TABLE: TABLE}
BURSTS = 2


def worker(epoch: Any, sleeps: bool) -> Any:
    """Looks up and uses what it found, a few bursts long; returns what it saw in the PCB."""
    seen = []
    if not sleeps:
        yield from epoch.online(None, WORKER)
    for _ in range(BURSTS):
        if sleeps:
            yield from epoch.online(None, WORKER)
        if (yield "load", ENTRY):
            seen.append((yield "load", PCB))
        if sleeps:
            yield from epoch.offline(None, WORKER)
        else:
            yield from epoch.quiescent(None, WORKER)
    yield from epoch.offline(None, WORKER)
    return tuple(seen)


def reclaimer(epoch: Any, waits: bool = True) -> Any:
    """Unlinks the PCB and uses its memory again once the epoch has passed; gives up after some looks."""
    yield "release", ENTRY, 0
    number = yield from epoch.advance(None, TABLE)
    for _ in range(3):
        if not waits or (yield from epoch.passed(None, TABLE, number)):
            yield "store", PCB, REUSED
            return True
    return False


def outcomes(*changes: tuple[str, str], model: str, sleeps: bool, waits: bool = True) -> set[Any]:
    epoch = actors(module, *changes, constants=CONSTANTS)
    memory, _ = run({ENTRY: 1, PCB: ALIVE}, lambda: epoch.offline(None, WORKER))
    parts = {"worker": lambda: worker(epoch, sleeps), "reclaimer": lambda: reclaimer(epoch, waits)}
    found = Explorer(memory, parts, lambda end: (end.results["worker"], end.results["reclaimer"]), model=model)
    assert not any(STUCK in outcome for outcome in found.outcomes)
    return set(found.outcomes)


def used_after_reuse(found: set[Any]) -> bool:
    return any(REUSED in seen for seen, _ in found)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sleeps", [False, True], ids=["online", "sleeping"])
def test_nothing_is_used_after_its_reuse(sleeps: bool, model: str) -> None:
    found = outcomes(model=model, sleeps=sleeps)
    assert not used_after_reuse(found)
    assert {done for _, done in found} == {True, False}     # reclaimed at once, and held up


def test_without_waiting_it_would_be() -> None:
    assert used_after_reuse(outcomes(model="sc", sleeps=False, waits=False))


def test_without_the_fence_of_online_it_would_be() -> None:
    change = ("    fence()\n", "    pass\n")
    assert used_after_reuse(outcomes(change, model="tso", sleeps=True))
    assert not used_after_reuse(outcomes(change, model="sc", sleeps=True))


def test_without_the_barrier_of_advance_it_would_be() -> None:
    change = ("    return fetch_add(mem, table + L.T_EPOCH, 1) + 1\n",
              "    e = load_acquire(mem, table + L.T_EPOCH) + 1\n"
              "    store_release(mem, table + L.T_EPOCH, e)\n    return e\n")
    assert used_after_reuse(outcomes(change, model="tso", sleeps=True))
