"""No order of a waiter's and its notifiers' steps loses a wakeup; those that the barriers forbid would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dataplane.inet import deliver
from dataplane.rings import wake as module
from dataplane.shm import layout as L
from tests.interleavings.explorer import DEAD, MODELS, STUCK, End, Explorer
from tests.interleavings.source import Ordering, actors, orderings

WAKE = 1000
RINGS = (10_000, 20_000)    # packets published by notifier 1 and 2; each ring in the place of its lane's state
CONSTANTS: dict[int, int] = {}
for _ring in RINGS:         # a ring's worker has its block behind it, and this lane in its list
    CONSTANTS |= {_ring + L.LS_WAKE: WAKE, _ring + 1000 + L.W_DIRTY: _ring + 5000,
                  _ring + 1000 + L.W_DIRTY_COUNT: 1, _ring + 5000: _ring}


def notifiers(weaken: Ordering | None, *changes: tuple[str, str]) -> Any:
    """The end of a burst, of packets that are one word; and the wake object's functions."""
    wake = actors(module, *changes, weaken=weaken)

    def publish(mem: None, state: int) -> Any:
        yield "release", state, (yield "load", state) + 1       # test_lane.py has the lane itself

    def ring(mem: None, w: int, state: int) -> Any:
        yield from wake.wake_notify(None, WAKE)

    use = SimpleNamespace(lane_publish=publish, _wake=ring, wake_armed=wake.wake_armed)
    return wake, actors(deliver, constants=CONSTANTS, weaken=weaken, use=use)


def notifier(burst: Any, ring: int, packets: int) -> Any:
    """An RX worker: one packet in each burst."""
    for _ in range(packets):
        yield from burst.publish_lanes(None, ring + 1000, 0)


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


def explore(*changes: tuple[str, str], model: str, count: int = 1, packets: int = 2, mortal: bool = False,
            ringer: bool = False, weaken: Ordering | None = None, **waits: bool) -> Explorer:
    wake, burst = notifiers(weaken, *changes)
    rings = RINGS[:count]
    parts: dict[str, Any] = {"waiter": lambda: waiter(wake, rings, count * packets, **waits)}
    for ring in rings:
        parts[f"notifier{ring}"] = lambda ring=ring: notifier(burst, ring, packets)
    if ringer:
        parts["ringer"] = lambda: ring_after_death(wake)
    return Explorer({}, parts, outcome, model=model, mortal=(f"notifier{RINGS[0]}",) if mortal else ())


def ring_after_death(wake: Any) -> Any:
    yield "dead", f"notifier{RINGS[0]}"
    # The replacement publishes what is left, without a word to anybody.
    yield "release", RINGS[0], 1
    yield from wake.wake_ring(None, WAKE)


@pytest.mark.parametrize("model", MODELS)
def test_one_notifier(model: str) -> None:
    assert set(explore(model=model).outcomes) == {2}


@pytest.mark.parametrize("model", ["sc", "tso", "pso"])
def test_two_notifiers(model: str) -> None:
    assert set(explore(model=model, count=2, packets=1).outcomes) == {2}


def test_timeouts_lose_nothing() -> None:
    assert set(explore(model="tso", packets=2, impatient=True).outcomes) == {2}


FENCE = Ordering(deliver.__name__, "publish_lanes", "fence", 1, "is gone")
ARM = Ordering(module.__name__, "wake_arm", "exchange", 1, "is a load and a store")


@pytest.mark.parametrize("claim", [FENCE, ARM], ids=str)
def test_without_store_buffers_the_barriers_would_not_matter(claim: Ordering) -> None:
    assert STUCK not in explore(model="sc", weaken=claim).outcomes
    assert STUCK in explore(model="tso", weaken=claim).outcomes


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
    first = f"notifier{RINGS[0]}"
    wake, burst = notifiers(None)
    parts = {"waiter": lambda: waiter(wake, RINGS[:1], 1), first: lambda: notifier(burst, RINGS[0], 1)}

    def who(end: End) -> Any:
        return end.results[first], end.results["waiter"], end.memory.get(RINGS[0], 0)

    assert (DEAD, STUCK, 1) in Explorer({}, parts, who, model=model, mortal=(first,)).outcomes


def test_a_waiter_can_die_anywhere() -> None:
    """Another one has its place: it finds the state as the dead one left it."""
    wake, burst = notifiers(None)

    def heir() -> Any:
        yield "dead", "waiter"
        return (yield from waiter(wake, RINGS[:1], 1))

    parts = {"waiter": lambda: waiter(wake, RINGS[:1], 1), "heir": heir,
             "notifier": lambda: notifier(burst, RINGS[0], 1)}

    def who(end: End) -> Any:
        return end.results["heir" if end.results["waiter"] == DEAD else "waiter"], end.results["notifier"]

    assert set(Explorer({}, parts, who, model="tso", mortal=("waiter",)).outcomes) == {(1, None)}


CLAIMS = [*orderings(module), *orderings(deliver, "publish_lanes")]
NEEDLESS = {
    # The burst's fence stands before it, and a system call, a barrier, behind it. That it is one step is what counts.
    "wake.wake_notify: exchange is no barrier",
}
CHECKS: tuple[dict[str, Any], ...] = ({}, {"packets": 1, "mortal": True, "ringer": True})


def fails(check: dict[str, Any], claim: Ordering) -> bool:
    """Whether the check finds that this is missing."""
    return STUCK in explore(model="weak", weaken=claim, **check).outcomes


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_each_ordering_matters(claim: Ordering) -> None:
    assert any(fails(check, claim) for check in CHECKS) == (str(claim) not in NEEDLESS)
