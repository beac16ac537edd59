"""No order of a waiter's and its notifiers' steps loses a wakeup; those that the barriers forbid would."""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.rings import wake as module
from dataplane.shm import layout as L
from tests.interleavings.explorer import DEAD, STUCK, End, Explorer
from tests.interleavings.source import actors

MODELS = ("sc", "tso", "pso")
WAKE = 1000
RINGS = (1, 2)      # words: packets published by notifier 0 and 1


def notifier(wake: Any, ring: int, packets: int, fence: bool = True) -> Any:
    """An RX worker: publishes one packet per burst, then notifies."""
    for published in range(1, packets + 1):
        yield "release", ring, published
        if fence:
            yield ("fence",)
        yield from wake.wake_notify(None, WAKE)


def waiter(wake: Any, rings: tuple[int, ...], packets: int, look_again: bool = True,
           impatient: bool = False) -> Any:
    """A consumer: takes all `packets`, sleeping when there is nothing. `impatient`: one sleep may time out."""
    taken, timeouts = 0, int(impatient)
    while True:
        taken = yield from _count(rings)
        if taken == packets:
            return taken
        yield from wake.wake_arm(None, WAKE, L.WAKE_FUTEX)
        if not look_again or (yield from _count(rings)) == taken:
            if timeouts and (yield "choose", 2):
                timeouts -= 1
            else:
                yield from wake.wake_sleep(None, WAKE, 0, 0)
        yield from wake.wake_disarm(None, WAKE)


def _count(rings: tuple[int, ...]) -> Any:
    total = 0
    for ring in rings:
        total += yield "load", ring
    return total


def outcome(end: End) -> Any:
    return end.results["waiter"]


def explore(*changes: tuple[str, str], model: str, notifiers: int = 1, packets: int = 2, fence: bool = True,
            mortal: bool = False, ringer: bool = False, **waits: bool) -> Explorer:
    wake = actors(module, *changes)
    rings = RINGS[:notifiers]
    parts: dict[str, Any] = {"waiter": lambda: waiter(wake, rings, notifiers * packets, **waits)}
    for ring in rings:
        parts[f"notifier{ring}"] = lambda ring=ring: notifier(wake, ring, packets, fence)
    if ringer:
        parts["ringer"] = lambda: ring_after_death(wake)
    return Explorer({}, parts, outcome, model=model, mortal=("notifier1",) if mortal else ())


def ring_after_death(wake: Any) -> Any:
    yield "dead", "notifier1"
    # The replacement publishes what is left, without a word to anybody.
    yield "release", RINGS[0], 1
    yield ("fence",)
    yield from wake.wake_ring(None, WAKE)


@pytest.mark.parametrize("model", MODELS)
def test_one_notifier(model: str) -> None:
    assert set(explore(model=model).outcomes) == {2}


@pytest.mark.parametrize("model", MODELS)
def test_two_notifiers(model: str) -> None:
    assert set(explore(model=model, notifiers=2, packets=1).outcomes) == {2}


def test_timeouts_lose_nothing() -> None:
    assert set(explore(model="tso", packets=3, impatient=True).outcomes) == {3}


@pytest.mark.parametrize("model", ["tso", "pso"])
def test_without_the_notifiers_fence_a_wakeup_is_lost(model: str) -> None:
    assert STUCK in explore(model=model, fence=False).outcomes


def test_without_store_buffers_the_fence_would_not_matter() -> None:
    assert STUCK not in explore(model="sc", fence=False).outcomes


def test_without_the_waiters_barrier_a_wakeup_is_lost() -> None:
    change = ("    exchange(mem, wake + L.WAKE_STATE, mode)\n",
              "    store_relaxed(mem, wake + L.WAKE_STATE, mode)\n")
    assert STUCK in explore(change, model="tso").outcomes
    assert STUCK not in explore(change, model="sc").outcomes


@pytest.mark.parametrize("model", MODELS)
def test_without_the_second_look_a_wakeup_is_lost(model: str) -> None:
    assert STUCK in explore(model=model, look_again=False).outcomes


@pytest.mark.parametrize("model", MODELS)
def test_if_the_kernel_did_not_compare_a_wakeup_would_be_lost(model: str) -> None:
    change = ("futex_wait(mem, wake + L.WAKE_STATE, L.WAKE_FUTEX, deadline_ns, scratch)",
              "futex_wait(mem, wake + L.WAKE_STATE, load_relaxed(mem, wake + L.WAKE_STATE), 0, 0)")
    assert STUCK in explore(change, model=model).outcomes


@pytest.mark.parametrize("model", MODELS)
def test_a_notifier_that_dies_swallows_a_wakeup_unless_the_bell_is_rung(model: str) -> None:
    assert set(explore(model=model, packets=1, mortal=True, ringer=True).outcomes) == {1}
    # It published, took the state and died before it woke.
    wake = actors(module)
    parts = {"waiter": lambda: waiter(wake, RINGS[:1], 1), "notifier1": lambda: notifier(wake, RINGS[0], 1)}

    def who(end: End) -> Any:
        return end.results["notifier1"], end.results["waiter"], end.memory.get(RINGS[0], 0)

    assert (DEAD, STUCK, 1) in Explorer({}, parts, who, model=model, mortal=("notifier1",)).outcomes
