"""No order of steps lets a worker use what was reclaimed: a worker that may sleep or die, and a reclaimer."""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.shm import epoch as module
from dataplane.shm import layout as L
from tests.interleavings.explorer import DEAD, MODELS, STUCK, End, Explorer, run
from tests.interleavings.source import Ordering, actors, orderings

TABLE, WORKER = 0, 10_000
ENTRY, PCB = 20_000, 30_000         # the entry points to the PCB, or to nothing
ALIVE, REUSED = 7, 8
CONSTANTS = {TABLE + L.T_WORKERS: 1, TABLE + L.T_WORKER_AT: WORKER, WORKER + L.W_TABLE: TABLE}
BURSTS = 2


def worker(epoch: Any, sleeps: bool, bursts: int = BURSTS) -> Any:
    """Looks up and uses what it found, a few bursts long; returns how often it found the PCB."""
    found = 0
    if not sleeps:
        yield from epoch.online(None, WORKER)
    for _ in range(bursts):
        if sleeps:
            yield from epoch.online(None, WORKER)
        if (yield "load", ENTRY):
            yield "read", PCB
            found += 1
        if sleeps:
            yield from epoch.offline(None, WORKER)
        else:
            yield from epoch.quiescent(None, WORKER)
    yield from epoch.offline(None, WORKER)
    return found


def replacement(epoch: Any) -> Any:
    yield "dead", "worker"
    return (yield from worker(epoch, False, 1))


def reclaimer(epoch: Any, waits: bool = True, buries: bool = False) -> Any:
    """Unlinks the PCB and uses its memory again once the epoch has passed; gives up after some looks. `buries`: puts
    a dead worker offline."""
    yield "release", ENTRY, 0
    number = yield from epoch.advance(None, TABLE)
    if buries:
        yield "dead", "worker"
        yield from epoch.mark_offline(None, WORKER)
    for _ in range(3):
        if not waits or (yield from epoch.passed(None, TABLE, number)):
            yield "store", PCB, REUSED
            return True
    return False


def outcomes(*changes: tuple[str, str], model: str, sleeps: bool, waits: bool = True,
             weaken: Ordering | None = None) -> set[Any]:
    """What the worker read, and whether the memory was reclaimed."""
    epoch = actors(module, *changes, constants=CONSTANTS, weaken=weaken)
    memory, _ = run({ENTRY: 1, PCB: ALIVE}, lambda: epoch.offline(None, WORKER))
    parts = {"worker": lambda: worker(epoch, sleeps), "reclaimer": lambda: reclaimer(epoch, waits)}
    found = Explorer(memory, parts, lambda end: (end.reads["worker"], end.results["reclaimer"]), model=model)
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


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("buries", [True, False], ids=["", "not put offline"])
def test_a_dead_worker_holds_nothing_up_once_it_is_put_offline(buries: bool, model: str) -> None:
    """Before its replacement is forked. Without that, memory would not be reclaimed."""
    epoch = actors(module, constants=CONSTANTS)
    memory, _ = run({ENTRY: 1, PCB: ALIVE}, lambda: epoch.offline(None, WORKER))
    parts = {"worker": lambda: worker(epoch, False), "reclaimer": lambda: reclaimer(epoch, buries=buries)}

    def outcome(end: End) -> Any:
        return end.results["worker"] == DEAD, end.results["reclaimer"]

    found = set(Explorer(memory, parts, outcome, model=model, mortal=("worker",)).outcomes)
    # The one that buries waits for a death.
    assert found == ({(True, True), (False, STUCK)} if buries else {(died, done) for died in (True, False)
                                                                    for done in (True, False)})


@pytest.mark.parametrize("model", MODELS)
def test_nor_does_its_replacement_use_what_was_reused(model: str) -> None:
    epoch = actors(module, constants=CONSTANTS)
    memory, _ = run({ENTRY: 1, PCB: ALIVE}, lambda: epoch.offline(None, WORKER))
    parts = {"worker": lambda: worker(epoch, True, 1), "reclaimer": lambda: reclaimer(epoch),
             "replacement": lambda: replacement(epoch)}
    found = Explorer(memory, parts, lambda end: end.reads["replacement"], model=model, mortal=("worker",))
    assert set(found.outcomes) == {(), (ALIVE,)}


def test_without_waiting_it_would_be() -> None:
    assert used_after_reuse(outcomes(model="sc", sleeps=False, waits=False))


def test_without_store_buffers_the_barriers_would_not_matter() -> None:
    change = ("    fence()\n", "    pass\n")
    assert not used_after_reuse(outcomes(change, model="sc", sleeps=True))
    assert used_after_reuse(outcomes(change, model="tso", sleeps=True))


CLAIMS = list(orderings(module))
NEEDLESS = {
    # The fence behind both orders what comes after them, and the release of the `offline` before them what came before.
    "epoch.online: load_acquire is plain", "epoch.online: store_release is plain",
    # Only stores stand behind it that a branch on what it found decides about: no processor makes them earlier. It is
    # for the compiler.
    "epoch.passed: load_acquire is plain",
}


def fails(sleeps: bool, claim: Ordering) -> bool:
    """Whether it is found that this is missing."""
    return used_after_reuse(outcomes(model="weak", sleeps=sleeps, weaken=claim))


CHECKS = (False, True)


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_each_ordering_matters(claim: Ordering) -> None:
    assert any(fails(sleeps, claim) for sleeps in CHECKS) == (str(claim) not in NEEDLESS)
