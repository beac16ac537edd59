"""No order of steps loses a continuation: RX workers publish and schedule, a continuation worker takes and sleeps;
either may die.

The source is kcont/schedule.py's own. The pcq and the bell have tests of their own: here the one is a word that says
whether the number is in it, the other a word and a sleeper.
"""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.kcont import schedule as module
from dataplane.shm import layout as L
from tests.interleavings.explorer import DEAD, STUCK, End, Explorer
from tests.interleavings.source import Ordering, actors

MODELS = ("sc", "tso", "pso")
TABLE, W, PCBS, QUEUE, BELL = 0, 10_000, 20_000, 777, 888
HEADS = (1, 2)          # words: how much each RX worker has published in its lane
CONSTANTS = {W + L.W_TABLE: TABLE, TABLE + L.T_PCBS: PCBS}
WAKE = "mem, table + L.T_KCONT_WAKE"
PUT = "exchange(mem, 777, 1) == 9"
MODEL = (
    ("    if wake_notify(mem, table + L.T_KCONT_WAKE) == L.WAKE_PIPE:\n        st64(mem, w + _ONE, 1)\n"
     "        write(mem, ld64(mem, table + L.T_KCONT_ROPE), w + _ONE, 8)\n",
     f"    if load_relaxed({WAKE}) != 0 and exchange({WAKE}, 0) != 0:\n"
     "        exchange(mem, 888, 1)\n        futex_wake(mem, 888)\n"),
    ("pcq_peek(mem, ld64(mem, table + L.T_KCONT), w + L.W_SCRATCH)", "load_acquire(mem, 777)"),
    ("        wake_disarm(mem, wake)\n", "        store_relaxed(mem, wake, 0)\n"),
    ("    wake_disarm(mem, ld64(mem, w + L.W_TABLE) + L.T_KCONT_WAKE)\n",
     "    store_relaxed(mem, ld64(mem, w + L.W_TABLE) + L.T_KCONT_WAKE, 0)\n"),
)
ARM = ("wake_arm(mem, wake, L.WAKE_PIPE)", "exchange(mem, wake, 2)")
TRY = "pcq_put(mem, ld64(mem, table + L.T_KCONT), number, ld64(mem, w + L.W_STAMP)) == 0"
MOURN = ("    lost = pcq_repair(mem, ld64(mem, table + L.T_KCONT), dead)\n", "    lost = 0\n")
Change = tuple[str, str]


def rx_worker(kcont: Any, head: int, segments: int, fence: bool = True) -> Any:
    """Publishes a segment, and wants it to be seen to by a time that is near."""
    for published in range(1, segments + 1):
        yield "release", head, published
        if fence:
            yield ("fence",)
        yield from kcont.kcont_schedule(None, W, 0, 5)


def continuation_worker(kcont: Any, heads: tuple[int, ...], segments: int, every: bool = False) -> Any:
    """Until it has seen all segments. Time passes: what is in its wheel is due. It sleeps without an end. `every`: it
    looks at every connection once before, as a replacement does."""
    while True:
        announced = yield "exchange", QUEUE, 0
        if every:
            yield from kcont.kcont_lower(None, PCBS + L.PCB_DUE, 1)
            announced, every = 1, False
        if announced or (yield from kcont.kcont_swept(None, W)):
            if (yield "load", PCBS + L.PCB_DUE):
                yield from kcont.kcont_take(None, TABLE, 0)
                seen = 0
                for head in heads:
                    seen += yield "load", head
                if seen == segments:
                    return seen
        if not (yield from kcont.kcont_arm(None, W, module.NEVER)):
            continue
        if (yield "park", BELL, 0):
            yield "parked", BELL
        yield "exchange", BELL, 0
        yield from kcont.kcont_disarm(None, W)


def mourner(kcont: Any) -> Any:
    """The supervisor, when the RX worker is dead."""
    yield "dead", f"rx{HEADS[0]}"
    yield from kcont.kcont_mourn(None, TABLE, 2)
    yield "exchange", BELL, 1
    yield "unpark", BELL


def heir(kcont: Any, segments: int) -> Any:
    """The continuation worker's replacement: continue_recover begins with the wake word."""
    yield "dead", "kcont"
    yield "store", TABLE + L.T_KCONT_WAKE, 0
    return (yield from continuation_worker(kcont, HEADS[:1], segments, every=True))


def deaths(who: str, *, model: str, put: str = PUT, weaken: Ordering | None = None, mourns: bool = True) -> set[Any]:
    """Whether the segments were seen to, and whether one that nobody sees to was left for whom nothing is due."""
    kcont = actors(module, *MODEL, ARM, (TRY, put), MOURN, constants=CONSTANTS, weaken=weaken)
    rx = f"rx{HEADS[0]}"
    parts: dict[str, Any] = {"kcont": lambda: continuation_worker(kcont, HEADS[:1], 1),
                             rx: lambda: rx_worker(kcont, HEADS[0], 1)}
    if who == "kcont":
        parts["heir"] = lambda: heir(kcont, 1)
    elif mourns:
        parts["mourner"] = lambda: mourner(kcont)

    def outcome(end: End) -> Any:
        last = end.results["heir" if end.results["kcont"] == DEAD else "kcont"]
        # An RX worker that died before it had made anything due: the peer sends the segment again.
        early = end.results[rx] == DEAD and end.memory.get(PCBS + L.PCB_DUE, 0) == 0
        return "early" if last == STUCK and early else last

    return set(Explorer({}, parts, outcome, model=model, mortal=(rx if who == "rx" else who,)).outcomes)


def outcomes(*changes: Change, model: str, workers: int = 1, segments: int = 2, fence: bool = True,
             arm: Change = ARM, put: str = PUT, weaken: Ordering | None = None) -> set[Any]:
    kcont = actors(module, *MODEL, arm, (TRY, put), *changes, constants=CONSTANTS, weaken=weaken)
    heads = HEADS[:workers]
    parts: dict[str, Any] = {"kcont": lambda: continuation_worker(kcont, heads, workers * segments)}
    for head in heads:
        parts[f"rx{head}"] = lambda head=head: rx_worker(kcont, head, segments, fence)

    def outcome(end: End) -> Any:
        return end.results["kcont"]

    return set(Explorer({}, parts, outcome, model=model).outcomes)


@pytest.mark.parametrize("model", MODELS)
def test_none_is_lost(model: str) -> None:
    assert outcomes(model=model) == {2}


@pytest.mark.parametrize("model", ["sc", "tso"])
def test_none_is_lost_of_two_workers(model: str) -> None:
    assert outcomes(model=model, workers=2, segments=1) == {2}


@pytest.mark.parametrize("model", MODELS)
def test_none_is_lost_when_the_queue_is_always_full(model: str) -> None:
    assert outcomes(model=model, put="0 == 0") == {2}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("put", [PUT, "0 == 0"], ids=["", "full"])
def test_none_is_lost_with_a_worker_that_dies(put: str, model: str) -> None:
    assert deaths("rx", model=model, put=put) == {1, "early"}
    assert STUCK in deaths("rx", model=model, put=put, mourns=False)


@pytest.mark.parametrize("model", ["sc", "tso"])
def test_none_is_lost_with_the_continuation_worker(model: str) -> None:
    assert deaths("kcont", model=model) == {1}


@pytest.mark.parametrize("model", ["tso", "pso"])
def test_without_the_fence_behind_the_publish_one_is_lost(model: str) -> None:
    assert STUCK in outcomes(model=model, fence=False)


def test_without_the_sleepers_barrier_one_is_lost() -> None:
    assert STUCK in outcomes(model="tso", arm=(ARM[0], "store_relaxed(mem, wake, 2)"))


FOUND = ("kcont_take", "exchange", 1, "is a load and a store"), ("kcont_schedule", "fence", 1, "is gone")


@pytest.mark.parametrize("claim", FOUND, ids=str)
def test_these_orderings_matter(claim: tuple[str, str, int, str]) -> None:
    """The others of this module have no model yet that tells."""
    ordering = Ordering(module.__name__, *claim)
    assert {STUCK} & (outcomes(model="tso", weaken=ordering)
                      | outcomes(model="tso", put="0 == 0", segments=1, weaken=ordering))
