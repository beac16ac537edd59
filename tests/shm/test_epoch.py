"""Epochs: who holds reclamation up and who does not; and nothing is used after it was reclaimed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dataplane.jit import kernel
from dataplane.shm import epoch
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import ld64, load_acquire, pause, st64, store_release
from dataplane.shm.libc import sched_yield
from tests.children import Child

WORKERS = 2
POINTER = L.T_HEADER                    # of the table: place of the present object
STOP = L.T_HEADER + 64
OBJECTS = L.T_HEADER + 4096             # 64 bytes each: eight times the same number, 0 once it is reclaimed
BLOCKS = 1 << 16                        # worker blocks
SIZE = BLOCKS + WORKERS * L.W_BYTES
advance, passed = epoch.advance.inner, epoch.passed.inner


@kernel("i64(mem, i64)")
def report(mem, w):
    epoch.quiescent(mem, w)
    return ld64(mem, w + L.W_EPOCH)


@kernel("i64(mem, i64, i64)")
def look_up(mem, w, every):
    """A worker until STOP: bursts of lookups, asleep after every so many. Returns lookups that saw a
    reclaimed or a torn object; bursts are counted in its W_STEPS."""
    table = ld64(mem, w + L.W_TABLE)
    wrong = 0
    bursts = 0
    epoch.online(mem, w)
    while load_acquire(mem, table + STOP) == 0:
        for _ in range(16):
            place = load_acquire(mem, table + POINTER)
            first = load_acquire(mem, place)
            for word in range(8):
                if load_acquire(mem, place + 8 * word) != first or first == 0:
                    wrong += 1
        bursts += 1
        st64(mem, w + L.W_STEPS, bursts)
        if bursts % every == 0:
            epoch.offline(mem, w)
            for _ in range(bursts % 64):
                pause()
            epoch.online(mem, w)
        else:
            epoch.quiescent(mem, w)
    epoch.offline(mem, w)
    return wrong


@kernel("i64(mem, i64, i64, i64)")
def reclaim(mem, table, first, times):
    """Puts a new object in the place of the present one and clears that one's memory, `times` times."""
    place = ld64(mem, table + POINTER)
    for number in range(first, first + times):
        new = table + OBJECTS + number % 2 * 64
        for word in range(8):
            st64(mem, new + 8 * word, number)
        store_release(mem, table + POINTER, new)
        goal = advance(mem, table)
        while passed(mem, table, goal) == 0:
            sched_yield()
        for word in range(8):
            store_release(mem, place + 8 * word, 0)
        place = new
    return 0


@pytest.fixture
def table() -> Iterator[tuple[Any, int, list[int]]]:
    """`mem`, the table's place, the worker blocks' places; all offline."""
    arena = Arena(1 << 24)
    at = arena.map_anonymous(SIZE, shared=True)
    words = arena.mem[at:at + SIZE].view(np.int64)
    blocks = [at + BLOCKS + i * L.W_BYTES for i in range(WORKERS)]
    words[L.T_WORKERS // 8], words[L.T_WORKER_AT // 8] = WORKERS, blocks[0]
    for block in blocks:
        words[(block - at + L.W_TABLE) // 8] = at
        epoch.mark_offline(arena.mem, block)
    yield arena.mem, at, blocks


def test_nobody_online_holds_nothing_up(table: tuple[Any, int, list[int]]) -> None:
    mem, at, _ = table
    assert [epoch.advance(mem, at) for _ in range(3)] == [1, 2, 3]
    assert epoch.passed(mem, at, 3) == 1


def test_each_worker_has_to_report(table: tuple[Any, int, list[int]]) -> None:
    mem, at, (one, two) = table
    epoch.mark_online(mem, one)
    epoch.mark_online(mem, two)
    goal = epoch.advance(mem, at)
    assert epoch.passed(mem, at, goal) == 0
    assert report(mem, one) == goal and epoch.passed(mem, at, goal) == 0
    assert report(mem, two) == goal and epoch.passed(mem, at, goal) == 1
    later = epoch.advance(mem, at)
    assert epoch.passed(mem, at, goal) == 1 and epoch.passed(mem, at, later) == 0


def test_a_worker_that_sleeps_or_died_counts_as_passed(table: tuple[Any, int, list[int]]) -> None:
    mem, at, (one, two) = table
    epoch.mark_online(mem, one)
    epoch.mark_online(mem, two)
    goal = epoch.advance(mem, at)
    report(mem, one)
    epoch.mark_offline(mem, two)
    assert epoch.passed(mem, at, goal) == 1
    epoch.mark_online(mem, two)         # it found nothing from before the epoch
    assert epoch.passed(mem, at, goal) == 1
    assert epoch.passed(mem, at, epoch.advance(mem, at)) == 0


@pytest.mark.parametrize("every", [1 << 40, 2], ids=["awake", "sleeping now and then"])
def test_nothing_is_used_after_it_was_reclaimed(table: tuple[Any, int, list[int]], every: int) -> None:
    mem, at, (one, _) = table
    words = mem[at:at + SIZE].view(np.int64)
    words[POINTER // 8] = at + OBJECTS
    words[OBJECTS // 8:][:8] = 1
    look_up.compile()
    reclaim.compile()

    def work() -> None:
        assert look_up(mem, one, every) == 0

    with Child(work) as worker:
        reclaim(mem, at, 1, 20_000)
        # Until the worker has really run at the same time.
        while words[(one - at + L.W_STEPS) // 8] < 1000 and worker.status is None:
            reclaim(mem, at, 2 + int(words[POINTER // 8] == at + OBJECTS), 1000)    # into the other place first
        words[STOP // 8] = 1
        assert worker.join() == 0
