"""Reassembly against an oracle that keeps one byte string and a set of positions, in both modes at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dataplane.shm import layout_tcp as T
from tests.tcp.rig import MODES, End

RING = 4096
WRAP = 1 << 32
STREAM = random.Random(7).randbytes(1 << 16)


def stream(start, end):
    """Bytes of positions [start, end)."""
    at, size = start % len(STREAM), end - start
    return (STREAM[at:] + STREAM * (1 + size // len(STREAM)))[:size]


class Receiver(End):
    """An end of which only the receiving side is used."""

    def __init__(self, mode, nxt=1, irs=0):
        super().__init__(mode, send=4096, receive=RING)
        self.read_to = nxt
        self["RCV_NXT"], self["RCV_RIGHT"], self["IRS"] = nxt, nxt + RING, irs

    def insert(self, start, end, data=None):
        """Offer the bytes of [start, end) and return the verdict."""
        data = stream(start, end) if data is None else data
        at = self.buffer + 1
        self.memory[at:at + len(data)] = data
        result = self.p.reassembly_insert(self.mem, self.x, at, start, end)
        self.memory[at:at + len(data)] = b"\xee" * len(data)
        return result

    def sacks(self, timestamps=False):
        """The SACK blocks of the next ACK, as positions."""
        o = self.x + T.X_OUT
        self.set(o + T.O_OPTIONS, T.SO_TIMESTAMPS if timestamps else 0)
        self.p.reassembly_sacks(self.mem, self.x, o)
        count = self.word(o + T.O_SACK_COUNT)
        assert bool(count) == bool(self.word(o + T.O_OPTIONS) & T.SO_SACK)
        words = [self.word(o + T.O_SACKS + 8 * i) for i in range(2 * count)]
        return [((words[i] - self["IRS"]) % WRAP, (words[i + 1] - self["IRS"]) % WRAP) for i in range(0, 2 * count, 2)]

    def open_window(self):
        self["RCV_RIGHT"] = max(self["RCV_RIGHT"], self.read_to + RING)


class Oracle:
    """What has been received, position by position."""

    def __init__(self, nxt):
        self.nxt, self.right, self.have = nxt, nxt + RING, set()

    @property
    def ranges(self):
        out = []
        for position in sorted(self.have):
            if out and out[-1][1] == position:
                out[-1][1] = position + 1
            else:
                out.append([position, position + 1])
        return [tuple(one) for one in out]

    def insert(self, start, end):
        start, end = max(start, self.nxt), min(end, self.right)
        new = set(range(start, end)) - self.have
        if not new:
            return -1
        before = self.have
        self.have = self.have | new
        if start > self.nxt:
            if len(self.ranges) > T.RA_MAX:
                self.have = before
                return -1
            return 0
        while self.nxt in self.have:
            self.have.remove(self.nxt)
            self.nxt += 1
        return 1


class Reassembly(RuleBasedStateMachine):
    """Random segments around the window; the application reads now and then."""

    @initialize(nxt=st.sampled_from([1, 2, RING - 3, (1 << 32) - 5, (1 << 61) + 17]), irs=st.integers(0, WRAP - 1))
    def begin(self, nxt, irs):
        self.ends = [Receiver(mode, nxt, irs) for mode in MODES]
        self.oracle = Oracle(nxt)
        self.last = None

    def insert(self, start, end):
        verdicts = {end_.insert(start, end) for end_ in self.ends}
        verdict = self.oracle.insert(start, end)
        assert verdicts == {verdict}, (start, end)
        if verdict == 0 or (verdict == -1 and self.oracle.nxt <= start < min(end, self.oracle.right)
                            and start in self.oracle.have):
            self.last = start

    @rule(offset=st.integers(-100, RING + 100), size=st.integers(0, 1500))
    def anywhere(self, offset, size):
        self.insert(self.oracle.nxt + offset, self.oracle.nxt + offset + size)

    @rule(slot=st.integers(0, 40), size=st.integers(1, 60))
    def early(self, slot, size):
        self.insert(self.oracle.nxt // 64 * 64 + 64 * slot + 10, self.oracle.nxt // 64 * 64 + 64 * slot + 10 + size)

    @rule(size=st.integers(1, 3000))
    def in_order(self, size):
        self.insert(self.oracle.nxt, self.oracle.nxt + size)

    @rule(index=st.integers(0, T.RA_MAX), before=st.integers(0, 3), behind=st.integers(0, 3))
    def around_a_range(self, index, before, behind):
        if self.oracle.ranges:
            start, end = self.oracle.ranges[index % len(self.oracle.ranges)]
            self.insert(start - before, end + behind)

    @rule(index=st.integers(0, T.RA_MAX))
    def fill_a_gap(self, index):
        edges = [self.oracle.nxt] + [edge for one in self.oracle.ranges for edge in one]
        if len(edges) > 1:
            index %= len(edges) // 2
            self.insert(edges[2 * index], edges[2 * index + 1])

    @rule(size=st.integers(0, 2 * RING))
    def read(self, size):
        for end in self.ends:
            start = end.read_to
            assert end.read(size) == stream(start, end.read_to)
            end.open_window()
            self.oracle.right = end["RCV_RIGHT"]

    @rule(timestamps=st.booleans())
    def tell(self, timestamps):
        told = [end.sacks(timestamps) for end in self.ends]
        assert told[0] == told[1]
        for end in self.ends:       # a duplicate comes first, and only once
            again = end.sacks(timestamps)
        ranges = [tuple(edge % WRAP for edge in one) for one in self.oracle.ranges]
        most = 3 if timestamps else 4
        assert len(again) == min(len(ranges), most) and len(told[0]) <= most
        assert told[0] == again or told[0][1:] == again[:most - 1]
        latest = self.ends[0]["RA_LATEST"] % WRAP
        rest = sorted((one for one in ranges if one[0] != latest), key=self.distance, reverse=True)
        assert again == ([one for one in ranges if one[0] == latest] + rest)[:most]

    def distance(self, block):
        return (block[0] - self.oracle.nxt) % WRAP

    @rule()
    def latest(self):
        """The range that is told first has the last segment in it."""
        if self.last is not None and self.last > self.oracle.nxt:
            holding = [one for one in self.oracle.ranges if one[0] <= self.last < one[1]]
            assert [one[0] for one in holding] == [self.ends[0]["RA_LATEST"]]

    @invariant()
    def agreement(self):
        for end in getattr(self, "ends", ()):
            assert end["RCV_NXT"] == self.oracle.nxt
            assert end.ranges == self.oracle.ranges
            end.check_guards()


Reassembly.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestReassembly = Reassembly.TestCase


@pytest.fixture(params=MODES)
def receiver(request):
    return Receiver(request.param)


def test_what_is_there_is_never_written_again(receiver):
    assert receiver.insert(11, 21) == 0
    assert receiver.insert(1, 31, b"?" * 30) == 1
    assert receiver.read() == b"?" * 10 + stream(11, 21) + b"?" * 10


def test_a_full_table_drops_only_what_needs_a_new_range(receiver):
    for i in range(T.RA_MAX):
        assert receiver.insert(11 + 20 * i, 21 + 20 * i) == 0
    assert receiver.insert(1001, 1011) == -1 and len(receiver.ranges) == T.RA_MAX
    assert receiver.insert(21, 25) == 0 and receiver.insert(25, 31) == 0
    assert len(receiver.ranges) == T.RA_MAX - 1
    assert receiver.insert(1001, 1011) == 0 and receiver.insert(1, 11) == 1
    assert receiver["RCV_NXT"] == 41


def test_the_ring_wraps_in_the_middle_of_a_segment(receiver):
    assert receiver.insert(1, RING - 99) == 1 and len(receiver.read()) == RING - 100
    receiver.open_window()
    assert receiver.insert(RING + 50, RING + 500) == 0
    assert receiver.insert(RING - 99, RING + 200) == 1
    assert receiver.read() == stream(RING - 99, RING + 500)


def test_nothing_outside_of_the_window(receiver):
    assert receiver.insert(1 + RING, 1 + RING + 10) == -1
    assert receiver.insert(RING - 9, RING + 100) == 0
    assert receiver.ranges == [(RING - 9, RING + 1)]
    assert receiver.insert(-50, 1) == -1 and receiver.insert(-50, 11) == 1 and receiver.read() == stream(1, 11)
    assert receiver.insert(20, 20) == -1 and receiver.insert(30, 20) == -1


def test_sack_order_without_reordering(receiver):
    """Each range is told in several ACKs running, the newest first (RFC 2018 section 4)."""
    for i in range(6):
        receiver.insert(11 + 20 * i, 21 + 20 * i)
        expected = [(11 + 20 * j, 21 + 20 * j) for j in range(i, -1, -1)]
        assert receiver.sacks() == expected[:4]
        assert receiver.sacks(timestamps=True) == expected[:3]
    receiver.insert(31 + 10, 31 + 15)
    assert receiver.sacks() == [(31, 46), (111, 121), (91, 101), (71, 81)]


def test_duplicates_are_told_once(receiver):
    receiver.insert(11, 21)
    assert receiver.insert(12, 20) == -1
    assert receiver.sacks() == [(12, 20), (11, 21)]
    assert receiver.sacks() == [(11, 21)]
    receiver.insert(1, 11)
    receiver.p.reassembly_duplicate(receiver.mem, receiver.x, 5, 9)
    assert receiver.sacks() == [(5, 9)] and receiver.sacks() == []


@pytest.mark.parametrize("count", [-1, 15, 1 << 40, -(1 << 62)])
def test_a_hostile_control_block_harms_only_its_own(receiver, count):
    """Random words in the table of ranges: nothing is written outside of the ring and the block."""
    dice = random.Random(count)
    for _ in range(50):
        receiver["RA_COUNT"] = count
        for i in range(2 * T.RA_MAX):
            value = dice.choice([dice.randrange(-(1 << 62), 1 << 62), receiver["RCV_NXT"] + dice.randrange(-50, 5000)])
            receiver.set(receiver.t + T.T_RA + 8 * i, value)
        start = receiver["RCV_NXT"] + dice.randrange(-10, RING)
        receiver.insert(start, start + dice.randrange(1, 1500))
        receiver.sacks()
        receiver["RCV_NXT"] = min(max(receiver["RCV_NXT"], 1), 1 << 40)     # as service does it between two runs
        receiver["RCV_RIGHT"] = receiver["RCV_NXT"] + RING
        receiver.check_guards()
