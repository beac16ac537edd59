"""The pcq's own source in every order of its steps: producers, consumer, deaths after each step, repair."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from dataplane.rings import pcq as module
from dataplane.shm import layout as L
from tests.interleavings.explorer import DEAD, Explorer, run
from tests.interleavings.source import Ordering, actors

Q, TARGET = 0, 1 << 20
MODELS = ("sc", "tso", "pso")
Change = tuple[str, str]
LATE_PUBLISH = ("    store_release(mem, slot + L.PCQ_WORD, _word(position, stamp, L.PCQ_FULL))",
                "    st64(mem, slot + L.PCQ_WORD, _word(position, stamp, L.PCQ_FULL))")
TAIL_FIRST = ("""    store_release(mem, slot + L.PCQ_WORD, _free(position + ld64(mem, q + L.PCQ_CAPACITY)))
    # SYNC pcq-tail: release, for the successor's load in _front (and pcq_stuck's, anywhere).
    store_release(mem, q + L.PCQ_TAIL, position + 1)""",
              """    store_release(mem, q + L.PCQ_TAIL, position + 1)
    store_release(mem, slot + L.PCQ_WORD, _free(position + ld64(mem, q + L.PCQ_CAPACITY)))""")
NO_HELP = ("            _help(mem, q, head)\n", "            return -1\n")
BLIND_CLAIM = ("            if cas(mem, slot + L.PCQ_WORD, word, _word(head, stamp, L.PCQ_RESERVED)) == 1:",
               "            store_release(mem, slot + L.PCQ_WORD, _word(head, stamp, L.PCQ_RESERVED))\n"
               "            if True:")


class Queue:
    """The queue's functions as actors, and what tests do with them."""

    def __init__(self, capacity: int, *changes: Change, start: int = 0, weaken: Ordering | None = None) -> None:
        self.capacity = capacity
        self.of = actors(module, *changes, constants={Q + L.PCQ_CAPACITY: capacity}, weaken=weaken)
        self.empty, _ = run({}, lambda: self.of.pcq_init(None, Q, capacity, start))

    def producer(self, stamp: int, items: int) -> Any:
        """Puts stamp * 10, stamp * 10 + 1, ...; returns which of them went in."""
        accepted = []
        for number in range(items):
            if (yield from self.of.pcq_put(None, Q, stamp * 10 + number, stamp)):
                accepted.append(stamp * 10 + number)
        return tuple(accepted)

    def consumer(self, tries: int) -> Any:
        """Gets so many times; returns what it got."""
        taken = []
        for _ in range(tries):
            if (yield from self.of.pcq_get(None, Q, TARGET)):
                taken.append((yield "load", TARGET))
        return tuple(taken)

    def repairer(self, stamp: int) -> Any:
        yield "dead", f"producer{stamp}"
        return (yield from self.of.pcq_repair(None, Q, stamp))

    def drain(self, memory: Any) -> tuple[Any, tuple[int, ...]]:
        return run(memory, lambda: self.consumer(2 * self.capacity + 1))

    def still_works(self, memory: Any) -> bool:
        """Whether the queue, emptied, takes exactly `capacity` items and gives them back."""
        memory, _ = self.drain(memory)
        memory, accepted = run(memory, lambda: self.producer(9, self.capacity + 1))
        memory, got = self.drain(memory)
        return accepted == got and len(got) == self.capacity


def in_order(items: tuple[int, ...]) -> bool:
    """None twice, and those of each producer as it put them."""
    by_producer: dict[int, list[int]] = {}
    for item in items:
        by_producer.setdefault(item // 10, []).append(item)
    return all(a < b for list_ in by_producer.values() for a, b in pairwise(list_))


def explore(queue: Queue, puts: dict[int, int], gets: int, *, model: str, mortal: tuple[str, ...] = (),
            repair: int = 0, stop: bool = False) -> set[str]:
    """What went wrong, over all orders. `puts`: items by stamp."""
    parts: dict[str, Any] = {f"producer{stamp}": lambda s=stamp, n=items: queue.producer(s, n)
                             for stamp, items in puts.items()}
    parts["consumer"] = lambda: queue.consumer(gets)
    if repair:
        parts["repairer"] = lambda: queue.repairer(repair)

    def judge(end: Any) -> str:
        taken = () if end.results["consumer"] == DEAD else end.results["consumer"]
        memory, rest = queue.drain(end.memory)
        got = taken + rest
        put = [end.results[f"producer{stamp}"] for stamp in puts]
        sure = {item for items in put if items != DEAD for item in items}
        dead = {stamp for stamp, items in zip(puts, put, strict=True) if items == DEAD}
        if not in_order(got):
            return f"order: {got}"
        if end.results["consumer"] == DEAD:
            # What it had freed is gone with it; the rest is there, and at most one can come twice.
            if not set(rest) <= sure or len(sure - set(rest)) > gets:
                return f"consumer died: {rest} of {sure}"
        elif sure - set(got):
            return f"lost: {sure - set(got)}"
        if any(item not in sure and item // 10 not in dead for item in got):
            return f"never put: {got} of {sure}"
        if not queue.still_works(memory):
            return "broken afterwards"
        return ""

    found = Explorer(queue.empty, parts, judge, model=model, mortal=mortal, bad=bool if stop else None)
    return {str(outcome) for outcome in found.outcomes} - {""}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("capacity", [1, 2])
def test_two_producers_and_a_consumer(capacity: int, model: str) -> None:
    assert explore(Queue(capacity), {1: 1, 2: 1}, 2, model=model) == set()


@pytest.mark.stress
def test_several_laps_of_one_slot() -> None:
    assert explore(Queue(1), {1: 2, 2: 1}, 2, model="tso") == set()


def test_positions_beyond_what_taken_words_carry() -> None:
    assert explore(Queue(1, start=(1 << 32) - 1), {1: 1, 2: 1}, 2, model="tso") == set()


@pytest.mark.parametrize("model", ["tso", "pso"])
@pytest.mark.parametrize("capacity", [1, 2])
def test_a_producer_dies_anywhere_and_is_repaired(capacity: int, model: str) -> None:
    queue = Queue(capacity)
    assert explore(queue, {1: 1, 2: 1}, 1, model=model, mortal=("producer1",), repair=1) == set()


@pytest.mark.parametrize("capacity", [1, 2])
def test_a_consumer_dies_anywhere(capacity: int) -> None:
    assert explore(Queue(capacity), {1: 2}, 2, model="tso", mortal=("consumer",)) == set()


def test_without_repair_the_queue_is_stuck() -> None:
    assert "broken afterwards" in explore(Queue(2), {1: 1}, 0, model="tso", mortal=("producer1",))


@pytest.mark.parametrize("change, model", [(LATE_PUBLISH, "pso"), (BLIND_CLAIM, "tso")],
                         ids=["publish without release", "claim without compare-and-swap"])
def test_mutations_of_the_producer_are_found(change: Change, model: str) -> None:
    assert explore(Queue(2, change), {1: 1, 2: 1}, 2, model=model) != set()


def test_freeing_after_moving_the_tail_is_found() -> None:
    assert explore(Queue(1, TAIL_FIRST), {1: 1}, 1, model="tso", mortal=("consumer",)) != set()


def test_producers_that_do_not_help_are_found() -> None:
    """A producer died between its claim and the move of head: nobody could ever put again."""
    assert explore(Queue(2, NO_HELP), {1: 1}, 0, model="tso", mortal=("producer1",), repair=1) != set()


FOUND = (("pcq_claim", "cas", 1, "is a load and a store"), ("pcq_publish", "store_release", 1, "is plain"),
         ("_pass", "store_release", 2, "is plain"), ("_front", "load_acquire", 2, "is plain"))


@pytest.mark.parametrize("claim", FOUND, ids=str)
def test_these_orderings_matter(claim: tuple[str, str, int, str]) -> None:
    """The others of this module have no model yet that tells."""
    queue = Queue(1, weaken=Ordering(module.__name__, *claim))
    assert (explore(queue, {1: 1}, 1, model="weak", stop=True)
            | explore(queue, {1: 1, 2: 1}, 1, model="tso", stop=True)
            | explore(queue, {1: 1}, 1, model="weak", mortal=("consumer",), stop=True))


def test_a_producer_and_a_consumer_of_stale_words() -> None:
    assert explore(Queue(1), {1: 1}, 1, model="weak") == set()
    assert explore(Queue(1), {1: 1}, 1, model="weak", mortal=("consumer",)) == set()
    assert explore(Queue(1), {1: 1}, 0, model="weak", mortal=("producer1",), repair=1) == set()
