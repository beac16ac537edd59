"""Wake objects: what each side does to the state, hostile content, and two processes that race for it."""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Any

import numpy as np
import psutil
import pytest

from dataplane.jit import kernel
from dataplane.rings import wake
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import fence, ld64, load_acquire, pause, st64, store_release
from dataplane.shm.libc import CLOCK_MONOTONIC, clock_ns, sched_yield
from tests.children import Child

ETIMEDOUT, EINTR = errno.ETIMEDOUT, errno.EINTR
ARM, DISARM, NOTIFY, SLEEP = range(4)
PATIENCE = 60_000_000_000       # ns after which a sleep on a full ring is a lost wakeup, and not a slow machine
WAKE, RING, TAKEN, SCRATCH, SCRATCH2, STATE = 0, 128, 256, 384, 512, 640


@kernel("i64(mem, i64, i64, i64)")
def do(mem, what, at, argument):
    if what == ARM:
        wake.wake_arm(mem, at, argument)
        return 0
    if what == DISARM:
        wake.wake_disarm(mem, at)
        return 0
    if what == NOTIFY:
        return wake.wake_notify(mem, at)
    return wake.wake_sleep(mem, at, clock_ns(mem, at + SCRATCH, CLOCK_MONOTONIC) + argument, at + SCRATCH)


@kernel("i64(mem, i64, i64)")
def linger(mem, seed, longest):
    """Spins a random while, short ones as likely as long ones; the state of the generator is at `seed`."""
    x = ld64(mem, seed)
    x ^= (x << 13) & 0x7FFF_FFFF_FFFF_FFFF
    x ^= x >> 7
    x ^= (x << 17) & 0x7FFF_FFFF_FFFF_FFFF
    st64(mem, seed, x)
    for _ in range((x >> 20) % (1 << (1 + (x >> 8) % longest))):
        pause()
    return x


spin = linger.inner


@kernel("i64(mem, i64, i64, i64)")
def notify_rounds(mem, base, first, last):
    """Publishes the numbers first + 1 ... last, each a random while after the former was taken."""
    for number in range(first, last):
        while load_acquire(mem, base + TAKEN) != number:
            pause()
            if spin(mem, base + STATE, 2) & 15 == 0:
                sched_yield()
        spin(mem, base + STATE, 14)
        store_release(mem, base + RING, number + 1)
        fence()
        wake.wake_notify(mem, base + WAKE)
    return 0


@kernel("i64(mem, i64, i64, i64)")
def wait_rounds(mem, base, first, last):
    """Takes the numbers first + 1 ... last, asleep in between. How often it slept, or -1 - n: a wakeup was
    lost before n."""
    slept = 0
    taken = first
    while taken < last:
        spin(mem, base + STATE + 64, 13)
        if load_acquire(mem, base + RING) == taken:
            wake.wake_arm(mem, base + WAKE, L.WAKE_FUTEX)
            if load_acquire(mem, base + RING) == taken:
                slept += 1
                deadline = clock_ns(mem, base + SCRATCH, CLOCK_MONOTONIC) + PATIENCE
                result = wake.wake_sleep(mem, base + WAKE, deadline, base + SCRATCH2)
                if result == -ETIMEDOUT and load_acquire(mem, base + RING) != taken:
                    return -1 - taken
            wake.wake_disarm(mem, base + WAKE)
        if load_acquire(mem, base + RING) != taken:
            taken += 1
            store_release(mem, base + TAKEN, taken)
    return slept


@pytest.fixture
def mem() -> Any:
    memory = np.full(1024, 0xEE, np.uint8)
    assert wake.init_wake(memory, 0) == 0
    return memory


def state(mem: Any) -> int:
    return int(mem[:8].view(np.int64)[0])


def test_nobody_sleeps_nothing_is_done(mem: Any) -> None:
    assert state(mem) == L.WAKE_AWAKE and do(mem, NOTIFY, 0, 0) == 0 and state(mem) == L.WAKE_AWAKE


def test_a_sleep_that_comes_after_the_notification_ends_at_once(mem: Any) -> None:
    do(mem, ARM, 0, L.WAKE_FUTEX)
    assert [do(mem, NOTIFY, 0, 0) for _ in range(3)] == [0, 0, 0]
    assert state(mem) == L.WAKE_AWAKE and do(mem, SLEEP, 0, PATIENCE) == 0


def test_an_event_loop_is_told_once_through_its_eventfd(mem: Any) -> None:
    do(mem, ARM, 0, L.WAKE_PIPE)
    assert [do(mem, NOTIFY, 0, 0) for _ in range(2)] == [L.WAKE_PIPE, 0]


def test_disarmed_it_is_awake(mem: Any) -> None:
    for mode in (L.WAKE_FUTEX, L.WAKE_PIPE):
        do(mem, ARM, 0, mode)
        assert state(mem) == mode
        do(mem, DISARM, 0, 0)
        assert state(mem) == L.WAKE_AWAKE and do(mem, NOTIFY, 0, 0) == 0


def test_sleeping_ends_at_the_deadline(mem: Any) -> None:
    before = time.monotonic()
    do(mem, ARM, 0, L.WAKE_FUTEX)
    assert do(mem, SLEEP, 0, 20_000_000) == -ETIMEDOUT
    assert time.monotonic() - before >= 0.02


def test_sleeping_ends_at_a_signal(mem: Any) -> None:
    seen: list[int] = []
    former = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        do(mem, ARM, 0, L.WAKE_FUTEX)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        assert do(mem, SLEEP, 0, PATIENCE) == -EINTR
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert seen


def test_the_bell_rings_for_an_event_loop_whatever_the_state_says(mem: Any) -> None:
    assert wake.ring_wake(mem, 0) == 0      # it has no eventfd
    mem[L.WAKE_EVENT] = 3
    mem[L.WAKE_EVENT + 1:L.WAKE_EVENT + 8] = 0
    assert wake.ring_wake(mem, 0) == L.WAKE_PIPE and state(mem) == L.WAKE_AWAKE


@pytest.mark.parametrize("seed", range(50))
def test_hostile_content_hurts_nobody(seed: int) -> None:
    """A worker that notifies or rings through random bytes does nothing outside of the object and ends."""
    generator = np.random.default_rng(seed)
    mem = np.full(1024, 0xEE, np.uint8)
    mem[:L.WAKE_BYTES] = generator.integers(0, 256, L.WAKE_BYTES, np.uint8)
    if seed % 2:
        mem[:8].view(np.int64)[0] = L.WAKE_FUTEX    # else the wake is hardly ever tried
    assert do(mem, NOTIFY, 0, 0) in (0, L.WAKE_PIPE)
    assert wake.ring_wake(mem, 0) in (0, L.WAKE_PIPE)
    assert (mem[L.WAKE_BYTES:] == 0xEE).all()


@pytest.fixture
def shared() -> tuple[Any, int]:
    arena = Arena(1 << 24)
    base = arena.map_anonymous(4096, shared=True)
    assert wake.init_wake(arena.mem, base + WAKE) == 0
    words = arena.mem[base:base + 4096].view(np.int64)
    words[STATE // 8], words[STATE // 8 + 8] = 88172645463325252, 36243606984302312
    do.compile()
    notify_rounds.compile()
    wait_rounds.compile()
    return arena.mem, base


def race(shared: tuple[Any, int], rounds: int) -> int:
    """How often the waiter slept in so many rounds."""
    mem, base = shared
    slept, step = 0, 20_000
    with Child(lambda: notify_rounds(mem, base, 0, rounds)) as notifier:
        for first in range(0, rounds, step):
            result = wait_rounds(mem, base, first, min(first + step, rounds))
            assert result >= 0, f"the wakeup before {-1 - result} was lost"
            slept += result
        assert notifier.join() == 0
    assert state(mem[base:]) == L.WAKE_AWAKE
    return slept


def test_no_wakeup_is_lost(shared: tuple[Any, int]) -> None:
    assert race(shared, 50_000) > 0


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_no_wakeup_is_lost_in_a_million_sleeps(shared: tuple[Any, int]) -> None:
    rounds = int(os.environ.get("DATAPLANE_WAKE_ROUNDS", 1_000_000))
    assert race(shared, rounds) > 0


def test_another_process_wakes_a_sleeper(shared: tuple[Any, int]) -> None:
    mem, base = shared

    def notify_once_it_sleeps() -> None:
        while state(mem[base:]) != L.WAKE_FUTEX:
            os.sched_yield()
        do(mem, NOTIFY, base, 0)

    with Child(notify_once_it_sleeps) as child:
        do(mem, ARM, base, L.WAKE_FUTEX)
        assert do(mem, SLEEP, base, PATIENCE) == 0
        do(mem, DISARM, base, 0)
        assert child.join() == 0


def test_a_notifier_that_died_before_its_wake_is_made_up_for(shared: tuple[Any, int]) -> None:
    mem, base = shared
    reader, writer = os.pipe()

    def wait() -> None:
        do(mem, ARM, base, L.WAKE_FUTEX)
        os.write(writer, b"x")
        assert do(mem, SLEEP, base, PATIENCE) == 0

    with Child(wait) as waiter:
        os.read(reader, 1)
        while psutil.Process(waiter.pid).status() != psutil.STATUS_SLEEPING:
            os.sched_yield()
        mem[base:base + 8] = 0      # a notifier took the state, and that was the last thing that it did
        wake.ring_wake(mem, base)
        assert waiter.join() == 0
    os.close(reader)
    os.close(writer)
