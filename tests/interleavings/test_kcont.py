"""No order of steps loses a continuation: RX workers publish and schedule, a continuation worker takes and sleeps.

The source is kcont/schedule.py's own. The pcq and the bell have tests of their own: here the one is a word that says
whether the number is in it, the other a word and a sleeper.
"""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.kcont import schedule as module
from dataplane.shm import layout as L
from tests.interleavings.explorer import STUCK, End, Explorer
from tests.interleavings.source import actors

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
Change = tuple[str, str]


def rx_worker(kcont: Any, head: int, segments: int, fence: bool = True) -> Any:
    """Publishes a segment, and wants it to be seen to by a time that is near."""
    for published in range(1, segments + 1):
        yield "release", head, published
        if fence:
            yield ("fence",)
        yield from kcont.kcont_schedule(None, W, 0, 5)


def continuation_worker(kcont: Any, heads: tuple[int, ...], segments: int) -> Any:
    """Until it has seen all segments. Time passes: what is in its wheel is due. It sleeps without an end."""
    while True:
        announced = yield "exchange", QUEUE, 0
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


def outcomes(*changes: Change, model: str, workers: int = 1, segments: int = 2, fence: bool = True,
             arm: Change = ARM, put: str = PUT) -> set[Any]:
    kcont = actors(module, *MODEL, arm, (TRY, put), *changes, constants=CONSTANTS)
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


@pytest.mark.parametrize("model", ["tso", "pso"])
def test_without_the_fence_behind_the_publish_one_is_lost(model: str) -> None:
    assert STUCK in outcomes(model=model, fence=False)


@pytest.mark.parametrize("model", ["tso", "pso"])
def test_without_the_fence_before_the_look_at_who_sleeps_one_is_lost_if_the_queue_is_full(model: str) -> None:
    """With room the queue's own compare-and-swap is that barrier, on machines where it is one."""
    change = ("    fence()\n", "    pass\n")
    assert STUCK in outcomes(change, model=model, put="0 == 0")
    assert STUCK not in outcomes(change, model="sc", put="0 == 0")


def test_without_the_sleepers_barrier_one_is_lost() -> None:
    assert STUCK in outcomes(model="tso", arm=(ARM[0], "store_relaxed(mem, wake, 2)"))


def test_if_taking_were_no_barrier_one_would_be_lost() -> None:
    change = ("    return exchange(mem, _due(mem, table, number), 0)\n",
              "    return store_relaxed(mem, _due(mem, table, number), 0)\n")
    assert STUCK in outcomes(change, model="tso")
