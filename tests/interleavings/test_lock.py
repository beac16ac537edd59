"""The owner-stamped lock's own source in every order of its steps: contenders, a holder that dies, and two who take the
lock over from it at once."""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.shm import lock as module
from tests.interleavings.explorer import DEAD, MODELS, End, Explorer
from tests.interleavings.source import Ordering, actors, orderings

WORD, A, B = 0, 8, 16           # the lock, and what it protects: two words that are equal whenever nobody holds it
OWNER, RESCUERS, OTHER = 2, (3, 4), 5


def contender(lock: Any, stamp: int, tries: int = 1) -> Any:
    """Adds 1 to both words if it gets the lock; how often, or -1 if it found the words unequal."""
    done = 0
    for _ in range(tries):
        if not (yield from lock.try_lock(None, WORD, stamp)):
            continue
        a = yield "load", A
        b = yield "load", B
        yield "store", A, a + 1
        yield "store", B, b + 1
        if not (yield from lock.unlock(None, WORD, stamp)) or a != b:
            return -1
        done += 1
    return done


def rescuer(lock: Any, stamp: int) -> Any:
    """Once the owner is dead: takes the lock from it, repairs, unlocks. Whether it did."""
    yield "dead", "owner"
    holder = yield from lock.holder(None, WORD)
    if not (yield from lock.recover(None, WORD, OWNER, stamp)):
        return 0
    b = yield "load", B
    yield "store", A, b
    unlocked = yield from lock.unlock(None, WORD, stamp)
    return 1 if holder == OWNER and unlocked else -1


def stranger(lock: Any) -> Any:
    """Gives up a lock that it does not hold."""
    return (yield from lock.unlock(None, WORD, OTHER))


def sound(end: End, *, took: int = 0) -> str:
    """What is wrong, if nobody holds the lock and `took` have added 1."""
    found = end.memory.get(WORD, 0), end.memory.get(A, 0), end.memory.get(B, 0)
    return "" if found == (0, took, took) else f"{found}, but {took} took it: {end.results}"


def contention(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True) -> Explorer:
    lock = actors(module, weaken=weaken)
    parts: dict[str, Any] = {"owner": lambda: contender(lock, OWNER), "other": lambda: contender(lock, OTHER, 2)}

    def judge(end: End) -> str:
        done = list(end.results.values())
        return f"{done}" if -1 in done or sum(done) == 0 else sound(end, took=sum(done))

    return Explorer({}, parts, judge, model=model, bad=bool if stop else None)


def death(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True, tries: int = 1) -> Explorer:
    """The owner dies anywhere; two take over from it; another one tries to get the lock all the time."""
    lock = actors(module, weaken=weaken)
    parts: dict[str, Any] = {"owner": lambda: contender(lock, OWNER)}
    parts |= {f"rescuer{stamp}": lambda stamp=stamp: rescuer(lock, stamp) for stamp in RESCUERS}
    parts["other"] = lambda: contender(lock, OTHER, tries)

    def judge(end: End) -> str:
        took = [end.results[f"rescuer{stamp}"] for stamp in RESCUERS]
        if end.results["owner"] != DEAD:
            return sound(end, took=end.results["owner"] + end.results["other"])
        if sum(map(bool, took)) > 1 or -1 in (*took, end.results["other"]):
            return f"{end.results}"
        owners = end.memory.get(B, 0) - end.results["other"]
        return sound(end, took=owners + end.results["other"]) if owners in (0, 1) else f"{owners}: {end.results}"

    return Explorer({}, parts, judge, model=model, mortal=("owner",), bad=bool if stop else None)


@pytest.mark.parametrize("model", MODELS)
def test_one_at_a_time(model: str) -> None:
    assert set(contention(model=model).outcomes) == {""}


@pytest.mark.parametrize("model", ["tso", "pso", "weak"])
def test_one_takes_over_from_a_dead_owner(model: str) -> None:
    assert set(death(model=model).outcomes) == {""}


def test_without_a_takeover_the_lock_is_held_for_ever() -> None:
    lock = actors(module)
    parts = {"owner": lambda: contender(lock, OWNER), "other": lambda: contender(lock, OTHER)}
    found = Explorer({}, parts, lambda end: end.memory.get(WORD, 0), model="tso", mortal=("owner",))
    assert set(found.outcomes) == {0, OWNER}


@pytest.mark.parametrize("model", MODELS)
def test_nobody_unlocks_what_another_one_holds(model: str) -> None:
    lock = actors(module)
    parts = {"owner": lambda: contender(lock, OWNER), "stranger": lambda: stranger(lock),
             "other": lambda: contender(lock, RESCUERS[0])}

    def judge(end: End) -> str:
        done = end.results["owner"] + end.results["other"]
        return sound(end, took=done) if end.results["stranger"] == 0 and done > 0 else f"{end.results}"

    assert set(Explorer({}, parts, judge, model=model).outcomes) == {""}


CHECKS = (contention, death)
CLAIMS = list(orderings(module))
NEEDLESS = {
    # Whatever it finds but its own stamp is somebody else's, and its own it has written itself.
    "lock.unlock: load_acquire is plain",
    # What it finds is old news at once; whoever acts on it hears of the death first, which orders all.
    "lock.holder: load_acquire is plain",
    # The death, reported by the kernel, is the barrier. That it is one step is what counts, and is found.
    "lock.recover: cas is no barrier",
}


def fails(check: Any, claim: Ordering) -> bool:
    """Whether the check finds that this is missing."""
    return set(check(claim).outcomes) != {""}


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_each_ordering_matters(claim: Ordering) -> None:
    assert any(fails(check, claim) for check in CHECKS) == (str(claim) not in NEEDLESS)
