"""Lookups while the table changes: a socket that stays is found always, one that comes and goes only as itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dataplane.jit import kernel
from dataplane.pcb import lookup
from dataplane.pcb.table import SocketSpec, Table
from dataplane.shm import epoch
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import fence, ld64, load_acquire, st64, store_release
from tests.children import Child

STABLE, CYCLING, PRESENT, KEYS = 500, 64, 32, 512
SOCKETS = STABLE + CYCLING + 36
# Words shared by the two processes: cycles begun and done, the end, and what the reader found.
INSERTED, REMOVING, STOP, WRONG, LOOKUPS, CERTAIN = (64 * i for i in range(6))
TARGETS = 1024                      # the epoch after which each cycling PCB may be used again
FOUND = 2048                        # the reader's own: what one burst found
insert, remove = lookup.bucket_insert.inner, lookup.bucket_remove.inner
advance, passed = epoch.advance.inner, epoch.passed.inner


# -- the sockets -------------------------------------------------------------------------------------------


def spec(number: int) -> SocketSpec:
    """One of the stable sockets: all classes, both families, any two with different keys."""
    family = (L.KEY_FAMILY4, L.KEY_FAMILY6)[number & 1]
    local = (0, 0x0A000001 + number) if family == L.KEY_FAMILY4 else (0xFD00 << 48, number)
    remote = (*((0, 0xC0000201) if family == L.KEY_FAMILY4 else (0xFD01 << 48, 1)), 1000 + number)
    kind = number >> 1 & 3
    return SocketSpec("udp", family, port=2000 + number, local=None if kind & 1 else local,
                      remote=None if kind & 2 else remote)


@kernel("i64(mem, i64, i64)")
def find_as_packet(mem, table, pcb):
    """What a packet finds that matches this PCB in every field. Wildcards are filled with something."""
    key = ld64(mem, pcb + L.PCB_KEY)
    local_hi, local_lo = ld64(mem, pcb + L.PCB_LOCAL_HI), ld64(mem, pcb + L.PCB_LOCAL_LO)
    remote_hi, remote_lo = ld64(mem, pcb + L.PCB_REMOTE_HI), ld64(mem, pcb + L.PCB_REMOTE_LO)
    ports = key & 0xFFFFFFFF
    if local_hi | local_lo == 0:
        local_lo = 0x0A0A0A0A
    if ports >> 16 == 0:
        ports |= 77 << 16
        remote_lo = 0x0B0B0B0B
    family = (key >> 48) & 3
    return lookup.lookup(mem, table, 17, family, ports, local_hi, local_lo, remote_hi, remote_lo)


find = find_as_packet.inner


@kernel("i64(mem, i64, i64)")
def find_cycling(mem, table, key):
    """The bound socket with number `key` of KEYS: half of them have IPv6 addresses."""
    hi = (key & 1) * 0x7D00_0000_0000_0000
    return lookup.find(mem, table, L.CLASS_BOUND, 17, 1 + (key & 1), 9000 + (key & 7), hi, 0x0B000000 + key, 0, 0)


find_key = find_cycling.inner


# -- the writer --------------------------------------------------------------------------------------------


@kernel("i64(mem, i64, i64, i64)")
def cycle(mem, table, shared, last):
    """Cycles: insert a socket, remove the one that was inserted PRESENT cycles ago. Returns the next cycle: `last`, or
    the one for which no PCB is free yet; -1 if the table was full."""
    now = ld64(mem, shared + INSERTED)
    while now < last:
        number = STABLE + now % CYCLING
        if passed(mem, table, ld64(mem, shared + TARGETS + 8 * (now % CYCLING))) == 0:
            return now
        pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
        key = now % KEYS
        st64(mem, pcb + L.PCB_LOCAL_HI, (key & 1) * 0x7D00_0000_0000_0000)
        st64(mem, pcb + L.PCB_LOCAL_LO, 0x0B000000 + key)
        st64(mem, pcb + L.PCB_KEY, lookup.key_word(L.CLASS_BOUND, 17, 9000 + (key & 7)) | (1 + (key & 1)) << 48)
        st64(mem, pcb + L.PCB_GENERATION, now)
        if insert(mem, table, number, 1) != 1:
            return -1
        store_release(mem, shared + INSERTED, now + 1)
        leaving = now - PRESENT
        if leaving >= 0:
            store_release(mem, shared + REMOVING, leaving + 1)
            fence()
            if remove(mem, table, STABLE + leaving % CYCLING) != 1:
                return -1
            st64(mem, shared + TARGETS + 8 * (leaving % CYCLING), advance(mem, table))
        now += 1
    return now


# -- the reader --------------------------------------------------------------------------------------------


@kernel("i64(mem, i64, i64, i64)")
def check_stable(mem, table, first, count):
    """The first stable socket of these that is not found as itself, or -1."""
    for i in range(count):
        number = (first + i) % STABLE
        if find(mem, table, ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES) != number:
            return number
    return -1


@kernel("i64(mem, i64, i64, i64)")
def check_cycling(mem, table, shared, count):
    """Looks for the newest sockets: 0, or what is wrong: 1 a miss of one that was there all the time, 2 a socket
    that is not the one looked for."""
    newest = load_acquire(mem, shared + INSERTED) - 1
    for i in range(count):
        wanted = newest - i
        if wanted < 0:
            return 0
        number = find_key(mem, table, wanted % KEYS)
        pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
        if number >= 0 and (ld64(mem, pcb + L.PCB_GENERATION) % KEYS != wanted % KEYS or number < STABLE):
            return 2
        st64(mem, shared + FOUND + 16 * i, number)
        st64(mem, shared + FOUND + 16 * i + 8, ld64(mem, pcb + L.PCB_GENERATION) if number >= 0 else 0)
        fence()
        if load_acquire(mem, shared + REMOVING) <= wanted:       # not even now on its way out
            if number < 0 or ld64(mem, pcb + L.PCB_GENERATION) != wanted:
                return 1
            st64(mem, shared + CERTAIN, ld64(mem, shared + CERTAIN) + 1)
    return 0


@kernel("i64(mem, i64, i64, i64)")
def still_the_same(mem, table, shared, count):
    """Whether what this burst found is, at its end, what it was: no number was used again meanwhile."""
    for i in range(count):
        number = ld64(mem, shared + FOUND + 16 * i)
        pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
        if number >= 0 and ld64(mem, pcb + L.PCB_GENERATION) != ld64(mem, shared + FOUND + 16 * i + 8):
            return 0
    return 1


stable, cycling, same = check_stable.inner, check_cycling.inner, still_the_same.inner


@kernel("i64(mem, i64, i64, i64)")
def look(mem, w, shared, bursts):
    """A worker's bursts of lookups, until the writer has ended or something is wrong: 0, or the code in WRONG."""
    table = ld64(mem, w + L.W_TABLE)
    for burst in range(bursts):
        for i in range(48):
            st64(mem, shared + FOUND + 16 * i, -1)
        wrong = cycling(mem, table, shared, 48)
        if wrong == 0 and stable(mem, table, burst * 16, 16) >= 0:
            wrong = 3
        if wrong == 0 and same(mem, table, shared, 48) == 0:
            wrong = 4
        st64(mem, shared + LOOKUPS, ld64(mem, shared + LOOKUPS) + 64)
        epoch.quiescent(mem, w)
        if wrong != 0:
            store_release(mem, shared + WRONG, wrong)
            return wrong
        if load_acquire(mem, shared + STOP) != 0:
            return -1
    return 0


# -- the race ----------------------------------------------------------------------------------------------


class Race:
    """The table with the stable sockets, and the words that the two share."""

    def __init__(self) -> None:
        self.arena = Arena(1 << 32)
        self.mem: Any = self.arena.mem
        size = Table.size(SOCKETS, 1, 1, 4, 64)
        self.table = Table(self.mem, self.arena.map_anonymous(size, shared=True), SOCKETS, 1, 1, 4, 64)
        self.shared = self.arena.map_anonymous(8192, shared=True)
        self.w = self.table.worker(0)
        for number in range(STABLE):
            assert self.table.open(spec(number)) == number

    def word(self, at: int) -> int:
        return self.table.get(self.shared + at)

    def put(self, at: int, value: int) -> None:
        self.table.put(self.shared + at, value)

    def read(self) -> None:
        """The reader's process."""
        while look(self.mem, self.w, self.shared, 10_000) == 0:
            pass

    def write(self, cycles: int) -> None:
        done = 0
        while done < cycles:
            done = cycle(self.mem, self.table.offset, self.shared, cycles)
            assert done >= 0, "the table was full"
            assert self.word(WRONG) == 0
            if done < cycles:
                os.sched_yield()


@pytest.fixture
def race() -> Iterator[Race]:
    for one in (cycle, look, epoch.mark_online, lookup.find_exact):
        one.compile()
    yield Race()


def test_every_socket_is_found(race: Race) -> None:
    assert check_stable(race.mem, race.table.offset, 0, STABLE) == -1


def run(race: Race, cycles: int) -> float:
    """Cycles a second."""
    epoch.mark_online(race.mem, race.w)
    with Child(race.read) as reader:
        while race.word(LOOKUPS) == 0:
            os.sched_yield()
        start = time.perf_counter()
        race.write(cycles)
        elapsed = time.perf_counter() - start
        race.put(STOP, 1)
        assert reader.join() == 0
    assert race.word(WRONG) == 0, "1: false miss, 2: false hit, 3: stable socket missed, 4: number used again too early"
    assert race.word(INSERTED) == cycles and race.word(CERTAIN) > 0
    return cycles / elapsed


def test_no_false_hit_and_no_false_miss(race: Race) -> None:
    run(race, 50_000)


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_no_false_hit_and_no_false_miss_in_a_million_cycles(race: Race, capsys: Any) -> None:
    rate = run(race, 1_000_000)
    with capsys.disabled():
        print(f" {rate / 1e3:.0f} k cycles/s against {race.word(LOOKUPS) / 1e6:.1f} M lookups,"
              f" {race.word(CERTAIN) / 1e6:.1f} M of them had to find a cycling socket", end="")


# -- a writer that died ------------------------------------------------------------------------------------


def buckets(table: Table) -> tuple[int, int]:
    """Where they are, and how many."""
    return table.get(table.offset + L.T_BUCKET_AT), table.get(table.offset + L.T_BUCKETS) + 1


def test_the_lock_of_a_dead_writer_is_taken_away(race: Race) -> None:
    """A writer dies with its stamp in every bucket: readers do not care, and after the repair writers neither."""
    first, count = buckets(race.table)
    for bucket in range(count):
        race.table.put(first + bucket * L.BUCKET_BYTES + L.BUCKET_LOCK, 99)
    assert check_stable(race.mem, race.table.offset, 0, STABLE) == -1
    with pytest.raises(OSError):
        race.table.open(SocketSpec("udp", 3, port=1))
    assert lookup.buckets_unlock(race.mem, race.table.offset, 98) == 0
    assert lookup.buckets_unlock(race.mem, race.table.offset, 99) == count
    assert race.table.open(SocketSpec("udp", 3, port=1)) >= 0


def test_overflow_counts_that_are_too_high_cost_time_only(race: Race) -> None:
    """What a writer leaves that dies between raising the counts and inserting, or between clearing and lowering."""
    first, count = buckets(race.table)
    words = race.mem[first:first + count * L.BUCKET_BYTES].view(np.int64).reshape(count, -1)
    words[:, L.BUCKET_OVERFLOW // 8] += 1
    assert check_stable(race.mem, race.table.offset, 0, STABLE) == -1
    assert find_cycling(race.mem, race.table.offset, 5) == -1
