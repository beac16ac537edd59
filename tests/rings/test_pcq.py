"""The pcq: FIFO, exact capacity, many producers at once, and producers and consumers that are killed."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dataplane.jit import kernel
from dataplane.rings import pcq
from dataplane.rings.pcq import Pcq, pcq_bytes, pcq_claim, pcq_get, pcq_publish, pcq_put
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import ld64, st64
from dataplane.shm.libc import sched_yield
from tests.children import Child

# Where positions start: at 0, where the 32 bits that most words carry wrap, and close to the last one.
STARTS = [0, 5, 2**32 - 2, 2**33 - 1, 2**61 - 10_000]
CAPACITIES = [1, 2, 3, 7, 64]
STAMP_SHIFT = 40        # an item of the stress tests: stamp and sequence number


@kernel("i64(mem, i64, i64)")
def claim(mem, q, stamp):
    """The first step of a put, after which a producer may die."""
    return pcq_claim(mem, q, stamp)


@kernel("i64(mem, i64, i64, i64, i64)")
def publish(mem, q, position, stamp, item):
    pcq_publish(mem, q, position, stamp, item)
    return 0


@kernel("i64(mem, i64, i64, i64, i64)")
def produce(mem, q, stamp, first, last):
    """Puts the sequence numbers first ... last - 1, waiting while the queue is full; counts at 8 * stamp."""
    for number in range(first, last):
        while pcq_put(mem, q, stamp << STAMP_SHIFT | number, stamp) == 0:
            sched_yield()
        st64(mem, q - 4096 + 8 * stamp, number + 1)
    return last


@kernel("i64(mem, i64, i64, i64)")
def consume(mem, q, seen, tries):
    """Up to `tries` gets; the last sequence number + 1 of each stamp is at seen + 8 * stamp. Returns how
    many were taken, or -1 - item for the first that is out of order."""
    taken = 0
    for _ in range(tries):
        if pcq_get(mem, q, seen) == 0:
            sched_yield()
        else:
            item = ld64(mem, seen)
            place = seen + 8 * (item >> STAMP_SHIFT)
            if ld64(mem, place) != item & ((1 << STAMP_SHIFT) - 1):
                return -1 - item
            st64(mem, place, ld64(mem, place) + 1)
            taken += 1
    return taken


def make(capacity: int, start: int = 0) -> tuple[Any, Pcq]:
    mem = np.full(pcq_bytes(capacity) + 64, 0xEE, np.uint8)     # what was there before does not matter
    return mem, Pcq.create(mem, 64, capacity, stamp=1, start=start)


# -- alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_capacity_is_exact_on_every_lap(capacity: int, start: int) -> None:
    _, queue = make(capacity, start)
    assert queue.maxitems == capacity and queue.get() is None and queue.peek() is None
    for lap in range(5):
        items = [lap * 1000 + i for i in range(capacity)]
        assert all(queue.put(item) for item in items)
        assert not queue.put(-1) and queue.peek() == items[0]
        assert [queue.get() for _ in items] == items
        assert queue.get() is None
        # From another slot on the next lap.
        assert queue.put(-7) and queue.get() == -7


def test_any_item() -> None:
    _, queue = make(2)
    for item in (0, -1, 2**63 - 1, -(2**63)):
        assert queue.put(item) and queue.peek() == item and queue.get() == item


def test_a_large_one() -> None:
    capacity = 1_000_003
    mem, queue = make(capacity, start=2**32 - 500_000)
    assert sum(queue.put(i) for i in range(1000)) == 1000
    assert [queue.get() for _ in range(1000)] == list(range(1000))
    put = pcq._put.compile()
    assert sum(put(mem, 64, i, 1) for i in range(capacity + 5)) == capacity
    assert queue.get() == 0 and queue.put(1) and not queue.put(2)


def test_sizes() -> None:
    assert pcq_bytes(1) == L.PCQ_SLOTS + 16
    assert pcq_bytes(L.PCQ_MAX_CAPACITY) > 1 << 34
    for capacity in (0, -1, L.PCQ_MAX_CAPACITY + 1):
        with pytest.raises(ValueError):
            pcq_bytes(capacity)
    mem, _ = make(1)
    for stamp in (-1, L.STAMP_MAX + 1):
        with pytest.raises(ValueError):
            Pcq(mem, 64, stamp)
    with pytest.raises(ValueError):
        Pcq(mem, 64).put(1)     # no stamp, no put


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("stamp", [1, 2, L.STAMP_MAX])
def test_a_reserved_slot_holds_up_until_it_is_repaired(stamp: int, start: int) -> None:
    mem, queue = make(3, start)
    assert queue.put(1)
    assert claim(mem, 64, stamp) == start + 1
    assert queue.put(2) and not queue.put(3)        # a slot is taken all the same
    assert queue.stuck() == 0 and queue.get() == 1
    assert queue.get() is None and queue.peek() is None and queue.stuck() == stamp
    assert queue.repair(stamp - 1) == 0 and queue.stuck() == stamp
    assert queue.repair(stamp) == 1 and queue.repair(stamp) == 0
    assert queue.stuck() == 0 and queue.peek() == 2 and queue.get() == 2 and queue.get() is None
    assert [queue.put(i) for i in range(4)] == [True, True, True, False]
    assert [queue.get() for _ in range(4)] == [0, 1, 2, None]


def test_a_consumer_that_died_between_freeing_and_moving_on() -> None:
    for capacity in (1, 2, 5):
        for refill in range(capacity + 1):
            mem, queue = make(capacity, 2**32 - 1)
            assert queue.put(1) and queue.get() == 1
            words = mem[64:].view(np.int64)
            words[L.PCQ_TAIL // 8] -= 1     # the store that it did not get to
            assert [queue.put(i) for i in range(refill)] == [True] * refill
            successor = Pcq(mem, 64)
            assert [successor.get() for _ in range(refill + 1)] == [*range(refill), None]


def test_a_producer_that_died_before_it_moved_the_head_is_helped() -> None:
    mem, queue = make(2)
    position = claim(mem, 64, 9)
    publish(mem, 64, position, 9, 90)
    assert mem[64:].view(np.int64)[L.PCQ_HEAD // 8] == 0
    assert queue.get() == 90                        # before anybody else put
    assert queue.put(1) and queue.put(2) and not queue.put(3)
    assert [queue.get(), queue.get(), queue.get()] == [1, 2, None]


class Model(RuleBasedStateMachine):
    """Against a deque. Puts are done in their two steps, by three producers, which may die in between."""

    @initialize(capacity=st.sampled_from([1, 2, 3, 7]), start=st.sampled_from(STARTS))
    def begin(self, capacity: int, start: int) -> None:
        self.mem, self.queue = make(capacity, start)
        self.capacity = capacity
        self.model: deque[list[Any]] = deque()      # [position, stamp, item], item None: only reserved
        self.stamps = [11, 12, 13]
        self.count = 0

    def full(self) -> bool:
        return len(self.model) == self.capacity

    def free_stamps(self) -> list[int]:
        busy = {stamp for _, stamp, item in self.model if item is None}
        return [stamp for stamp in self.stamps if stamp not in busy]

    @rule()
    def put(self) -> None:
        self.count += 1
        full = self.full()
        assert self.queue.put(self.count) == (not full)
        if not full:
            self.model.append([None, 1, self.count])

    @precondition(lambda self: self.free_stamps())
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        stamp = data.draw(st.sampled_from(self.free_stamps()))
        full = self.full()
        position = claim(self.mem, 64, stamp)
        assert (position < 0) == full
        if not full:
            self.model.append([position, stamp, None])

    @precondition(lambda self: any(item is None for _, _, item in self.model))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from([entry for entry in self.model if entry[2] is None]))
        self.count += 1
        publish(self.mem, 64, entry[0], entry[1], self.count)
        entry[2] = self.count

    @precondition(lambda self: any(item is None for _, _, item in self.model))
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from([entry for entry in self.model if entry[2] is None]))
        assert self.queue.repair(entry[1]) == 1
        self.stamps[self.stamps.index(entry[1])] = max(self.stamps) + 1     # never used again
        entry[2] = "skip"
        # Its slot is free only once the consumer has passed over it.

    def pass_over(self) -> None:
        while self.model and self.model[0][2] == "skip":
            self.model.popleft()

    def front(self) -> Any:
        self.pass_over()
        return self.model[0][2] if self.model else None

    @rule()
    def peek(self) -> None:
        assert self.queue.peek() == self.front()

    @rule()
    def get(self) -> None:
        expected = self.front()
        assert self.queue.get() == expected
        if expected is not None:
            self.model.popleft()

    @rule()
    def ask(self) -> None:
        stuck = self.model and self.model[0][2] is None
        assert self.queue.stuck() == (self.model[0][1] if stuck else 0)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=60)


# -- processes ---------------------------------------------------------------------------------


class Shared:
    """A queue and a page of counters in memory that children share."""

    def __init__(self, capacity: int, start: int = 0) -> None:
        arena = Arena(1 << 28)
        self.mem = arena.mem
        base = arena.map_anonymous(4096 + pcq_bytes(capacity), shared=True)
        self.produced = self.mem[base:base + 4096].view(np.int64)       # by stamp; kept by the producers
        self.q = base + 4096
        self.queue = Pcq.create(self.mem, self.q, capacity, start=start)
        self.seen_at = arena.map_anonymous(4096)
        self.seen = self.mem[self.seen_at:self.seen_at + 4096].view(np.int64)     # by stamp; [0]: the last item
        for entry in (claim, publish, produce, consume, pcq._repair, pcq._stuck):
            entry.compile()

    def take(self, tries: int = 10_000) -> int:
        taken = int(consume(self.mem, self.q, self.seen_at, tries))
        assert taken >= 0, f"out of order: stamp {-1 - taken >> STAMP_SHIFT}, after {self.seen[:8]}"
        return taken


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("capacity, start", [(1, 0), (3, 2**32 - 1000), (1000, 2**32 - 1000)])
def test_every_item_of_every_producer_in_its_order(capacity: int, start: int) -> None:
    shared = Shared(capacity, start)
    count, stamps = 40_000, (1, 2, 3)
    children = [Child(lambda s=stamp: produce(shared.mem, shared.q, s, 0, count)) for stamp in stamps]
    taken = 0
    while taken < count * len(stamps):
        taken += shared.take()
    assert [child.join() for child in children] == [0, 0, 0]
    assert shared.seen[1:4].tolist() == [count] * 3 and shared.queue.get() is None


def test_a_producer_killed_between_reserving_and_publishing(pipe: tuple[int, int]) -> None:
    shared = Shared(4)

    def die() -> None:
        claim(shared.mem, shared.q, 7)
        os.write(pipe[1], b"x")
        signal.pause()

    with Child(die) as child:
        os.read(pipe[0], 1)
        producer = Pcq(shared.mem, shared.q, 8)
        assert [producer.put(i) for i in range(4)] == [True, True, True, False]
        assert shared.queue.get() is None and shared.queue.stuck() == 7
        assert child.kill() == -signal.SIGKILL
    assert shared.queue.repair(7) == 1
    assert [shared.queue.get() for _ in range(4)] == [0, 1, 2, None]
    assert [producer.put(i) for i in range(5)] == [True] * 4 + [False]


@pytest.mark.parametrize("capacity", [1, 5])
def test_producers_killed_at_any_moment(capacity: int) -> None:
    """One lives on; the others' items come without a gap up to where each died, one of them lost at most."""
    shared = Shared(capacity)
    rounds = range(2, 22)
    with Child(lambda: produce(shared.mem, shared.q, 1, 0, 1 << 30)) as survivor:
        for stamp in rounds:
            with Child(lambda s=stamp: produce(shared.mem, shared.q, s, 0, 1 << 30)) as victim:
                while shared.seen[stamp] < 200 + 37 * stamp:
                    shared.take(100)
                victim.kill()
            lost = shared.queue.repair(stamp)
            goal = shared.seen[1] + 100
            while shared.seen[1] < goal:        # the survivor gets on
                shared.take(100)
            # It counted up to `produced`; one more may have got in, or been given up.
            assert lost in (0, 1) and 0 <= shared.seen[stamp] - shared.produced[stamp] <= 1 - lost
        survivor.kill()
    shared.queue.repair(1)
    while shared.take(capacity + 2):
        pass
    assert 0 <= shared.seen[1] - shared.produced[1] <= 1
    assert [Pcq(shared.mem, shared.q, 99).put(i) for i in range(capacity + 1)] == [True] * capacity + [False]
