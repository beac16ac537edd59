"""The SYN cache: against a dictionary, its times, and what a flood does to it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dataplane.shm import layout as L
from tests.plain import World

WORLD = World()
S = WORLD.load("dataplane.tcp.syncache")
H = WORLD.load("dataplane.tcp.handshake")
MS, SECOND = 1_000_000, 1_000_000_000


class Cache:
    """A cache in plain memory, and its user: facts in, entries out."""

    def __init__(self, entries: int = 64, now: int = 5 * SECOND) -> None:
        table = S.syn_area_bytes(entries)
        self.mem = bytearray(table + L.T_HEADER + H.E_BYTES)
        self.facts = table + L.T_HEADER
        S.syn_init(self.mem, 0, entries, table)
        self.now = now

    def _facts(self, peer: int, irs: int = 0) -> None:
        struct.pack_into("<qqqqq", self.mem, self.facts, peer >> 40, peer, 0, 1, peer << 16 & 0xFFFFFFFF | 4 << 32)
        struct.pack_into("<I", self.mem, self.facts + H.E_IRS, irs)

    def find(self, peer: int) -> int:
        self._facts(peer)
        return S.syn_find(self.mem, 0, self.facts)

    def add(self, peer: int, irs: int = 0) -> int:
        assert self.find(peer) == 0
        self._facts(peer, irs)
        return S.syn_add(self.mem, 0, self.facts, self.now)

    def irs(self, entry: int) -> int:
        return struct.unpack_from("<I", self.mem, entry + H.E_IRS)[0]

    def peer(self, entry: int) -> int:
        return struct.unpack_from("<q", self.mem, entry + H.E_SOURCE_LO)[0]

    def word(self, place: int) -> int:
        return struct.unpack_from("<q", self.mem, place)[0]

    @property
    def count(self) -> int:
        return self.word(S.SC_COUNT)

    def due(self, calls: int = 4) -> list[int]:
        """Peers whose SYN-ACK is sent again now. A sweep may take some calls."""
        found = []
        while calls:
            entry = S.syn_due(self.mem, 0, self.now)
            found += [self.peer(entry)] if entry else []
            calls -= not entry
        return found

    def wait(self) -> int:
        return S.syn_wait(self.mem, 0, self.now)


def test_sizes():
    assert S.syn_area_bytes(8) == S.SC_BUCKETS + 64 + 8 * H.E_BYTES
    for wrong in (0, 4, 24):
        with pytest.raises(ValueError, match="power of two"):
            S.syn_area_bytes(wrong)


def test_a_syn_ack_is_sent_again_after_1_3_and_7_seconds_and_given_up_after_15():
    cache = Cache()
    assert cache.wait() == -1 and cache.due() == []
    start = cache.now
    cache.add(9)
    assert cache.wait() == SECOND
    times = []
    while cache.wait() >= 0:
        cache.now += max(cache.wait(), MS)      # just when it says
        times += [(cache.now - start) / SECOND for _ in cache.due()]
    assert times == pytest.approx([1, 3, 7], abs=0.06)
    assert (cache.now - start) / SECOND == pytest.approx(15, abs=0.06)
    assert cache.count == 0 and cache.find(9) == 0


def test_none_is_missed_by_a_sweep_that_takes_many_calls():
    cache = Cache(4096)     # 512 buckets: eight calls
    added = []
    for peer in range(2000):
        added += [peer] if cache.add(peer) else []
        cache.now += MS // 2
    assert len(added) > 1900
    cache.now += SECOND
    assert sorted(cache.due(20)) == added
    assert cache.due(20) == []


def test_an_entry_in_its_first_second_stays():
    """The flood goes on by cookies, whoever came first may finish."""
    cache = Cache(8)
    assert all(cache.add(peer) for peer in range(8))
    for _ in range(5):
        cache.now += 199 * MS
        assert [cache.add(peer) for peer in range(100, 200)] == [0] * 100
        cache.due()
    assert all(cache.find(peer) for peer in range(8)) and cache.count == 8


def test_the_oldest_that_was_sent_again_gives_way():
    cache = Cache(8)
    for peer in range(8):
        cache.add(peer)
        cache.now += 20 * MS
    cache.now += 940 * MS       # 0 to 5 were sent more than a second ago
    assert sorted(cache.due()) == [0, 1, 2, 3, 4, 5]
    assert cache.add(100) and cache.find(0) == 0 and cache.count == 8
    assert cache.word(S.SC_EVICTED) == 1
    assert cache.add(101) and cache.find(1) == 0
    assert all(cache.find(peer) for peer in (2, 3, 4, 5, 6, 7, 100, 101))


def test_a_flood_turns_each_entry_over_at_most_once_a_second():
    cache = Cache(64)
    added = again = 0
    for number in range(40_000):        # four seconds
        cache.now += MS // 10
        added += cache.add(1000 + number) != 0
        again += len(cache.due(1))
    assert 64 <= added <= 5 * 64 and again <= 5 * 64
    assert cache.count <= 64


@pytest.mark.parametrize("ms", [1 << 32, 1 << 31, 1000])
def test_the_clock_may_wrap_in_milliseconds(ms):
    cache = Cache(now=(ms - 300) * MS)
    cache.add(9)
    cache.now += 999 * MS
    assert cache.due() == []
    cache.now += 2 * MS
    assert cache.due() == [9]


class AgainstADictionary(RuleBasedStateMachine):
    """Whatever is in the cache is in the dictionary, unless it was told that there is no room, or time took it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache(16)
        self.known: dict[int, tuple[int, int]] = {}     # peer: IRS, time

    peers = st.integers(0, 40)

    @rule(peer=peers, irs=st.integers(0, (1 << 32) - 1))
    def add(self, peer, irs):
        cache = self.cache
        if cache.find(peer):
            return
        before = {one for one in self.known if cache.find(one)}
        if cache.add(peer, irs):
            lost = {one for one in before if not cache.find(one)}
            assert len(lost) <= 1
            assert all(cache.now - self.known[one][1] >= SECOND for one in lost)
            self.known[peer] = irs, cache.now
            assert cache.find(peer)
        else:
            assert len(before) >= 8

    @rule(peer=peers)
    def remove(self, peer):
        if entry := self.cache.find(peer):
            S.syn_remove(self.cache.mem, 0, entry)
            assert self.cache.find(peer) == 0

    @rule(ms=st.integers(1, 2500))
    def wait(self, ms):
        self.cache.now += ms * MS
        for peer in self.cache.due():
            assert self.cache.now - self.known[peer][1] >= SECOND
            assert self.cache.find(peer)

    @invariant()
    def what_is_found_is_right(self):
        found = [peer for peer in range(41) if self.cache.find(peer)]
        assert len(found) == self.cache.count <= 16
        for peer in found:
            assert self.cache.irs(self.cache.find(peer)) == self.known[peer][0]
            assert self.cache.now - self.known[peer][1] < 30 * SECOND
        assert not found or self.cache.wait() >= 0


AgainstADictionary.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstADictionary = AgainstADictionary.TestCase
