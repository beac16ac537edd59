"""The owner-stamped lock: one holder at a time, and a dead one's is taken over once."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest

from dataplane.jit import kernel
from dataplane.shm import lock
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import ld64, pause, st64
from dataplane.shm.libc import sched_yield
from tests.children import Child

WORD, FIRST, SECOND = 64, 128, 136      # the lock and what it protects


@kernel("i64(mem, i64, i64, i64, i64)")
def do(mem, what, word, a, b):
    if what == 0:
        return lock.try_lock(mem, word, a)
    if what == 1:
        return lock.unlock(mem, word, a)
    if what == 2:
        return lock.holder(mem, word)
    return lock.recover(mem, word, a, b)


@kernel("i64(mem, i64, i64, i64)")
def increment(mem, base, stamp, times):
    """Increments the two protected words, not atomically, `times` times; returns how often they differed."""
    torn = 0
    for _ in range(times):
        while lock.try_lock(mem, base + WORD, stamp) == 0:
            for _ in range(100):
                pause()
            sched_yield()
        first, second = ld64(mem, base + FIRST), ld64(mem, base + SECOND)
        torn += first != second
        st64(mem, base + FIRST, first + 1)
        st64(mem, base + SECOND, second + 1)
        lock.unlock(mem, base + WORD, stamp)
    return torn


def word(mem: Any, at: int) -> int:
    return int(mem[at:at + 8].view(np.int64)[0])


def test_one_holder() -> None:
    mem = np.zeros(256, np.uint8)
    assert do(mem, 2, WORD, 0, 0) == 0
    assert do(mem, 0, WORD, 7, 0) == 1 and do(mem, 2, WORD, 0, 0) == 7
    assert do(mem, 0, WORD, 7, 0) == 0 and do(mem, 0, WORD, 8, 0) == 0
    assert do(mem, 1, WORD, 8, 0) == 0 and do(mem, 2, WORD, 0, 0) == 7      # not ours
    assert do(mem, 1, WORD, 7, 0) == 1 and do(mem, 2, WORD, 0, 0) == 0
    assert do(mem, 0, WORD, 8, 0) == 1


def test_only_the_dead_ones_lock_is_taken_over_and_once() -> None:
    mem = np.zeros(256, np.uint8)
    assert do(mem, 3, WORD, 7, 9) == 0      # nobody holds it
    do(mem, 0, WORD, 7, 0)
    assert do(mem, 3, WORD, 6, 9) == 0
    assert do(mem, 3, WORD, 7, 9) == 1 and do(mem, 3, WORD, 7, 10) == 0
    assert do(mem, 1, WORD, 7, 0) == 0 and do(mem, 1, WORD, 9, 0) == 1


@pytest.fixture
def shared() -> tuple[Any, int]:
    arena = Arena(1 << 24)
    do.compile()
    increment.compile()
    return arena.mem, arena.map_anonymous(4096, shared=True)


def test_processes_exclude_each_other(shared: tuple[Any, int]) -> None:
    mem, base = shared
    times = 50_000

    def work(stamp: int) -> None:
        assert increment(mem, base, stamp, times) == 0

    with Child(lambda: work(1)) as one, Child(lambda: work(2)) as two:
        assert (one.join(), two.join()) == (0, 0)
    assert word(mem, base + FIRST) == word(mem, base + SECOND) == 2 * times


def test_a_holder_that_is_killed(shared: tuple[Any, int]) -> None:
    """It dies in the middle of its change; whoever takes over repairs that and goes on."""
    mem, base = shared
    reader, writer = os.pipe()

    def die() -> None:
        do(mem, 0, base + WORD, 5, 0)
        mem[base + FIRST] = 1
        os.write(writer, b"x")
        signal.pause()

    with Child(die) as child:
        os.read(reader, 1)
        assert do(mem, 0, base + WORD, 6, 0) == 0
        assert child.kill() == -signal.SIGKILL
    assert do(mem, 2, base + WORD, 0, 0) == 5
    assert do(mem, 3, base + WORD, 5, 6) == 1
    mem[base + SECOND] = mem[base + FIRST]
    assert do(mem, 1, base + WORD, 6, 0) == 1
    assert increment(mem, base, 6, 10) == 0
    os.close(reader)
    os.close(writer)


def test_a_process_killed_at_any_moment(shared: tuple[Any, int]) -> None:
    mem, base = shared
    with Child(lambda: increment(mem, base, 99, 1 << 40)) as rival:
        for stamp in range(1, 21):
            before = word(mem, base + FIRST)
            with Child(lambda stamp=stamp: increment(mem, base, stamp, 1 << 40)) as victim:
                while word(mem, base + FIRST) < before + 1000:
                    os.sched_yield()
                victim.kill()
            if do(mem, 3, base + WORD, stamp, 100):
                # At most the second increment is missing.
                first, second = word(mem, base + FIRST), word(mem, base + SECOND)
                assert first - second in (0, 1)
                mem[base + SECOND:][:8].view(np.int64)[0] = first
                assert do(mem, 1, base + WORD, 100, 0) == 1
        rival.kill()
    do(mem, 3, base + WORD, 99, 100)
    assert word(mem, base + FIRST) - word(mem, base + SECOND) in (0, 1)
