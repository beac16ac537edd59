"""The spsc against a deque, after deaths, and between two processes."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dataplane.jit import kernel
from dataplane.rings import spsc
from dataplane.rings.spsc import Spsc, spsc_bytes
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import ld64, st64
from dataplane.shm.libc import sched_yield
from tests.children import Child

CAPACITIES = [1, 2, 8, 64]
STARTS = [0, 5, 2**32 - 2, 2**62]
Q, BATCH, GUARD = 128, 1024, 0xEE
_SPIN = 2000        # rounds of a kernel's call: bounded, so that a hung partner is noticed in Python


@kernel("i64(mem, i64, i64, i64, i64)")
def put_many(mem, q, source, least, most):
    return spsc.spsc_put_many(mem, q, source, least, most)


@kernel("i64(mem, i64, i64, i64, i64)")
def take_many(mem, q, target, least, most):
    return spsc.spsc_take_many(mem, q, target, least, most)


class Ring:
    """A ring between guards; behind it a batch to put and room for one that is taken."""

    def __init__(self, capacity: int, start: int = 0) -> None:
        self.capacity, self.end = capacity, Q + spsc_bytes(capacity)
        self.source = (self.end + 255) & ~127
        self.target = self.source + 8 * BATCH
        self.mem: Any = np.full(self.target + 8 * BATCH, GUARD, np.uint8)
        self.ring = Spsc.create(self.mem, Q, capacity, start=start)

    def put_many(self, items: list[int], least: int) -> int:
        self.mem[self.source:self.source + 8 * len(items)] = np.array(items, np.int64).view(np.uint8)
        return int(put_many(self.mem, Q, self.source, least, len(items)))

    def take_many(self, least: int, most: int) -> list[int]:
        self.mem[self.target:] = GUARD
        count = int(take_many(self.mem, Q, self.target, least, most))
        behind = self.target + 8 * count
        assert (self.mem[behind:] == GUARD).all(), "written beyond what was taken"
        return [int(item) for item in self.mem[self.target:behind].view(np.int64)]

    def check_guards(self) -> None:
        assert (self.mem[:Q] == GUARD).all() and (self.mem[self.end:self.source] == GUARD).all()


# -- alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("start", STARTS)
def test_capacity_is_exact_on_every_lap(capacity: int, start: int) -> None:
    ring = Ring(capacity, start).ring
    assert ring.maxitems == capacity and ring.take() is None
    for lap in range(5):
        for i in range(capacity):
            assert ring.put(100 * lap + i)
        assert not ring.put(-1)
        for i in range(capacity):
            assert ring.take() == 100 * lap + i
        assert ring.take() is None
        assert ring.put(7) and ring.take() == 7     # the next lap begins one further on


@pytest.mark.parametrize("item", [0, 1, -1, 2**63 - 1, -2**63])
def test_any_item(item: int) -> None:
    ring = Ring(2).ring
    assert ring.put(item) and ring.take() == item


def test_a_batch_that_does_not_fit_is_put_in_part_or_not_at_all() -> None:
    ring = Ring(8)
    assert ring.put_many([1, 2, 3, 4, 5], 1) == 5
    assert ring.put_many([6, 7, 8, 9], 4) == 0
    assert ring.put_many([6, 7, 8, 9], 1) == 3
    assert ring.put_many([9], 1) == 0
    assert ring.take_many(9, 20) == []
    assert ring.take_many(2, 3) == [1, 2, 3]
    assert ring.put_many([9, 10, 11], 3) == 3
    assert ring.take_many(1, 20) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert ring.take_many(1, 20) == []


def test_sizes() -> None:
    assert spsc_bytes(1) + 8 == spsc_bytes(2)
    for wrong in (0, -1, 3, 2 * spsc.SPSC_MAX_CAPACITY):
        with pytest.raises(ValueError, match="capacity"):
            spsc_bytes(wrong)


class SpscMachine(RuleBasedStateMachine):
    """Model: a deque."""

    @initialize(capacity=st.sampled_from(CAPACITIES), start=st.sampled_from(STARTS))
    def make(self, capacity: int, start: int) -> None:
        self.ring, self.model, self.next = Ring(capacity, start), deque[int](), 0

    @rule(count=st.integers(1, 100), least=st.integers(1, 100))
    def put_many(self, count: int, least: int) -> None:
        least = min(least, count)
        fits = min(count, self.ring.capacity - len(self.model))
        done = self.ring.put_many(list(range(self.next, self.next + count)), least)
        assert done == (fits if fits >= least else 0)
        self.model.extend(range(self.next, self.next + done))
        self.next += done

    @rule(most=st.integers(1, 100), least=st.integers(1, 100))
    def take_many(self, most: int, least: int) -> None:
        least = min(least, most)
        there = min(most, len(self.model))
        expected = [self.model.popleft() for _ in range(there)] if there >= least else []
        assert self.ring.take_many(least, most) == expected

    @rule()
    def put(self) -> None:
        done = self.ring.ring.put(self.next)
        assert done == (len(self.model) < self.ring.capacity)
        if done:
            self.model.append(self.next)
            self.next += 1

    @rule()
    def take(self) -> None:
        assert self.ring.ring.take() == (self.model.popleft() if self.model else None)

    @invariant()
    def guards(self) -> None:
        if hasattr(self, "ring"):
            self.ring.check_guards()


TestSpscMachine = SpscMachine.TestCase
TestSpscMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


# -- two processes -----------------------------------------------------------------------------


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def send(mem, q, source, first, last, batch):
    """Puts the numbers first ... last - 1, a batch of 0 one at a time; returns the first that was not put, when the
    ring was full for long."""
    number = first
    for _ in range(_SPIN):
        if number >= last:
            return number
        if batch == 0:
            number += spsc.spsc_put(mem, q, number)
        else:
            count = min(batch, last - number)
            for i in range(count):
                st64(mem, source + 8 * i, number + i)
            number += spsc.spsc_put_many(mem, q, source, 1, count)
    sched_yield()
    return number


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def take(mem, q, target, first, last, batch):
    """Takes numbers until `last`, or until none came for long: the next one, or -1 - the first that is wrong."""
    number = first
    for _ in range(_SPIN):
        if number >= last:
            return number
        count = spsc.spsc_take(mem, q, target) if batch == 0 else spsc.spsc_take_many(mem, q, target, 1, batch)
        for i in range(count):
            if ld64(mem, target + 8 * i) != number:
                return -1 - number
            number += 1
    sched_yield()
    return number


def make_shared(capacity: int) -> tuple[Any, int, int]:
    """The memory, where in it the ring is, and where there is room for a batch."""
    for one in (send, take):
        one.compile()
    arena = Arena(1 << 30)
    q, room = arena.map_anonymous(spsc_bytes(capacity), shared=True), arena.map_anonymous(8 * BATCH)
    Spsc.create(arena.mem, q, capacity)
    return arena.mem, q, room


@pytest.mark.parametrize(("capacity", "batch"), [(1, 0), (1, 1), (64, 0), (64, 5), (64, 100), (4096, 32), (4096, 256)])
def test_none_is_lost_or_doubled(capacity: int, batch: int) -> None:
    mem, q, room = make_shared(capacity)
    last = 20_000 if capacity == 1 else 1_000_000

    def produce() -> None:
        number = 0
        while number < last:
            number = send(mem, q, room, number, last, batch)

    with Child(produce) as producer:
        number = 0
        while number < last:
            number = take(mem, q, room, number, last, batch)
            assert number >= 0, f"number {-1 - number} was lost or doubled"
        assert producer.join() == 0


def test_producers_are_killed_and_replaced() -> None:
    """Wherever each of them dies, the consumer sees all that it published, and the next one goes on behind it."""
    mem, q, room = make_shared(64)
    for generation in range(50):
        number = first = generation << 40

        def produce(first: int = first) -> None:
            number = first
            while True:
                number = send(mem, q, room, number, 1 << 60, 5)

        with Child(produce) as producer:
            while number < first + 100 * (generation % 7):
                number = take(mem, q, room, number, number + 1, 5 if generation % 2 else 0)
                assert number >= 0
            assert producer.kill() < 0
        while True:
            before, number = number, take(mem, q, room, number, 1 << 60, 5)
            assert number >= 0, "lost or doubled over a death"
            if number == before:
                break
