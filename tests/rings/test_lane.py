"""The lane against a deque, against a consumer that lies, after a death, and between two processes."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataplane.jit import kernel
from dataplane.rings import lane
from dataplane.rings.lane import LANE_FULL, LANE_NEVER, lane_bytes
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import ld64, pause, shr, st64
from dataplane.shm.libc import sched_yield
from tests.children import Child

SIZES = (4096, 8192, 65536)
GUARD = 0xA5
GUARD_BYTES = 512
STATE, SOURCE, LANE = 1024, 4096, 1 << 18       # places in the memory of a Ring
STAGE, PUBLISH, RECOVER, ROOM = range(4)
WORD = 0x1234 << 48 | 28 << 32 | L.RECORD_VLAN << 24


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def produce(mem, what, state, word, source, length):
    if what == STAGE:
        return lane.lane_stage(mem, state, word, length * 3, source, length)
    if what == PUBLISH:
        lane.lane_publish(mem, state)
    elif what == RECOVER:
        lane.lane_recover(mem, state)
    else:
        return lane.lane_room(mem, state, length)
    return 0


@kernel("i64(mem, i64, i64, i64, i64)")
def consume(mem, what, at, mask, packets):
    """0: position of the next packet, 1: that behind the packet at the tail, 2: release up to `packets`."""
    head, tail = lane.lane_peek(mem, at), ld64(mem, at + L.LANE_TAIL)
    position = lane.lane_next(mem, at, mask, tail, head)
    if what == 0:
        return position if position < head else -1
    word = ld64(mem, at + L.LANE_DATA + (position & mask))
    end = position + lane.record_bytes(word & 0xFFFFFF)
    if what == 2:
        lane.lane_release(mem, at, end, packets)
    return end


class Ring:
    """A lane between guards, with its state elsewhere."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.mem: Any = np.full(LANE + lane_bytes(size) + GUARD_BYTES, GUARD, np.uint8)
        self.mem[STATE:STATE + L.LS_BYTES] = 0
        self.mem[LANE:LANE + L.LANE_DATA] = 0
        self.words = self.mem.view(np.int64)
        self.put(STATE + L.LS_BASE, LANE)
        self.put(STATE + L.LS_MASK, size - 1)

    def put(self, at: int, value: int) -> None:
        self.words[at // 8] = value

    def get(self, at: int) -> int:
        return int(self.words[at // 8])

    def do(self, what: int, length: int = 0, word: int = WORD) -> int:
        return int(produce(self.mem, what, STATE, word, SOURCE, length))

    def stage(self, data: bytes, word: int = WORD) -> int:
        self.mem[SOURCE:SOURCE + len(data)] = np.frombuffer(data, np.uint8)
        return self.do(STAGE, len(data), word)

    def take(self) -> tuple[int, int, bytes] | None:
        """(word without length, time, data) of the next packet, which is released."""
        position = consume(self.mem, 0, LANE, self.size - 1, 0)
        if position < 0:
            return None
        record = LANE + L.LANE_DATA + position % self.size
        word = self.get(record)
        length = word & 0xFFFFFF
        assert position % self.size + L.RECORD_DATA + length <= self.size, "a record wraps"
        data = self.mem[record + L.RECORD_DATA:record + L.RECORD_DATA + length].tobytes()
        result = (word - length, self.get(record + L.RECORD_TIME), data)
        consume(self.mem, 2, LANE, self.size - 1, 1)
        return result

    def check_guards(self) -> None:
        assert (self.mem[LANE - GUARD_BYTES:LANE] == GUARD).all()
        assert (self.mem[LANE + 8:LANE + L.LANE_TAIL] == 0).all(), "written beside the head"
        assert (self.mem[LANE + lane_bytes(self.size):] == GUARD).all()


def need(length: int) -> int:
    return -(-(length + L.RECORD_DATA) // L.RECORD_ALIGN) * L.RECORD_ALIGN


class LaneMachine(RuleBasedStateMachine):
    """Model: what is staged, what is published, and how many bytes of the ring that takes."""

    @initialize(size=st.sampled_from(SIZES))
    def begin(self, size: int) -> None:
        self.ring = Ring(size)
        self.staged: list[tuple[bytes, int]] = []                   # data, end in the ring
        self.published: deque[tuple[bytes, int]] = deque()
        self.head = self.tail = self.publication = self.count = 0

    def expected(self, length: int) -> tuple[int, int]:
        """What staging a packet must give, and the head behind it."""
        if 2 * need(length) > self.ring.size:
            return LANE_NEVER, self.head
        left = self.ring.size - self.head % self.ring.size
        end = self.head + need(length) + (left if need(length) > left else 0)
        return (1, end) if end - self.tail <= self.ring.size else (LANE_FULL, self.head)

    @rule(data=st.data(), fraction=st.floats(0, 0.6))
    def stage(self, data: st.DataObject, fraction: float) -> None:
        length = data.draw(st.one_of(st.integers(0, 200), st.just(int(fraction * self.ring.size))))
        packet = bytes([(self.count + i) & 0xFF for i in range(min(length, 64))]) + bytes(max(length - 64, 0))
        result, end = self.expected(length)
        assert self.ring.do(ROOM, length) == result
        assert self.ring.stage(packet) == result
        if result == 1:
            self.head = end
            self.count += 1
            self.staged.append((packet, end))

    @rule()
    def publish(self) -> None:
        self.ring.do(PUBLISH)
        self.published.extend(self.staged)
        self.staged.clear()
        self.publication = self.head

    @rule()
    def die_and_recover(self) -> None:
        """The producer dies with packets staged; its replacement forgets them."""
        self.ring.do(RECOVER)
        self.staged.clear()
        self.head = self.publication

    @rule(count=st.integers(1, 20))
    def take(self, count: int) -> None:
        for _ in range(count):
            found = self.ring.take()
            if not self.published:
                assert found is None
                return
            data, self.tail = self.published.popleft()
            assert found == (WORD, 3 * len(data), data)

    @precondition(lambda self: not self.published and not self.staged)
    @rule()
    def half_fits_an_empty_ring(self) -> None:
        """The promise of LANE_NEVER: what is not refused for ever fits, wherever the head stands."""
        assert self.ring.do(ROOM, self.ring.size // 2 - L.RECORD_DATA) == 1

    @invariant()
    def nothing_else_is_written(self) -> None:
        if hasattr(self, "ring"):
            self.ring.check_guards()
            assert self.ring.get(LANE + L.LANE_HEAD) == self.publication


TestLane = LaneMachine.TestCase
TestLane.settings = settings(max_examples=100, stateful_step_count=50, deadline=None,
                             suppress_health_check=[HealthCheck.too_slow])


def test_a_packet_of_any_length_is_refused_or_whole() -> None:
    ring = Ring(4096)
    for length in [*range(2100), (1 << 24) - 1, 1 << 24, 1 << 40]:
        fits = 2 * need(length) <= ring.size
        if not fits:
            assert ring.do(STAGE, length) == LANE_NEVER
            continue
        data = bytes(i * 7 & 0xFF for i in range(length))
        assert ring.stage(data) == 1
        ring.do(PUBLISH)
        found = ring.take()
        assert found is not None and found[2] == data
    ring.check_guards()


@settings(max_examples=200)
@given(st.lists(st.one_of(
    st.tuples(st.just("tail"), st.integers(-2**63, 2**63 - 1)),
    st.tuples(st.just("near"), st.integers(-200, 200)),             # a tail near the head
    st.tuples(st.integers(0, 2200), st.booleans())), max_size=60))  # a packet, and whether to publish
def test_a_lying_consumer_hurts_itself_only(history: list[tuple[Any, Any]]) -> None:
    ring = Ring(4096)
    believed = published = head = 0
    for length, publish in history:
        if isinstance(length, str):
            ring.put(LANE + L.LANE_TAIL, publish + (head if length == "near" else 0))
            continue
        claimed = ring.get(LANE + L.LANE_TAIL)
        result = ring.stage(bytes(length))
        tail = ring.get(STATE + L.LS_TAIL)
        assert tail in (believed, claimed) and believed <= tail <= published
        believed = tail
        assert ring.get(STATE + L.LS_HEAD) - tail <= ring.size, "more than a ring is in use"
        assert ring.get(STATE + L.LS_HEAD) % L.RECORD_ALIGN == 0
        if result == 1:
            head = ring.get(STATE + L.LS_HEAD)
        if publish:
            ring.do(PUBLISH)
            published = head
        ring.check_guards()
        assert ring.get(LANE + L.LANE_HEAD) == published


@pytest.mark.parametrize("distance", [-4096, -1024, -16, -1, 0, 1, 16, 64, 512, 1 << 62])
def test_a_tail_is_believed_up_to_what_was_published(distance: int) -> None:
    """Beyond it stand packets that are staged and not the consumer's yet."""
    ring = Ring(4096)
    for _ in range(6):
        assert ring.stage(bytes(496)) == 1
    ring.do(PUBLISH)
    published = ring.get(STATE + L.LS_HEAD)
    for _ in range(2):
        assert ring.stage(bytes(496)) == 1
    ring.put(LANE + L.LANE_TAIL, published + distance)
    believed = 0 <= published + distance <= published
    room = believed and published + distance >= need(496)
    assert ring.stage(bytes(496)) == (1 if room else LANE_FULL)
    assert ring.get(STATE + L.LS_TAIL) == (published + distance if believed else 0)


def test_hostile_data_and_head_are_not_read_by_the_producer() -> None:
    ring = Ring(4096)
    for number in range(500):
        rng = np.random.default_rng(number)
        ring.mem[LANE:LANE + L.LANE_TAIL] = rng.integers(0, 256, L.LANE_TAIL)
        ring.mem[LANE + L.LANE_DATA:LANE + lane_bytes(4096)] = rng.integers(0, 256, 4096)
        assert ring.stage(bytes(100)) in (1, LANE_FULL)
        ring.do(PUBLISH)
        assert ring.get(LANE + L.LANE_HEAD) == ring.get(STATE + L.LS_HEAD)
        ring.put(LANE + L.LANE_TAIL, ring.get(STATE + L.LS_PUBLISHED))
    assert ring.get(STATE + L.LS_HEAD) > 4096


@pytest.mark.parametrize("stored", [False, True])
def test_recovery_after_a_death_between_the_two_stores_of_a_publication(stored: bool) -> None:
    """Once LS_PUBLISHED is written the packets are the consumer's, whether LANE_HEAD was or not."""
    ring = Ring(4096)
    ring.stage(b"first")
    ring.do(PUBLISH)
    ring.stage(b"second")
    if stored:
        ring.put(STATE + L.LS_PUBLISHED, ring.get(STATE + L.LS_HEAD))
    ring.do(RECOVER)
    ring.stage(b"third")
    ring.do(PUBLISH)
    found = [ring.take() for _ in range(4)]
    data = [one[2] for one in found if one is not None]
    assert data == ([b"first", b"second", b"third"] if stored else [b"first", b"third"])


# -- two processes -----------------------------------------------------------------------------------------


_SPIN = 2000        # rounds of a kernel's call: bounded, so that a hung partner is noticed in Python


@kernel("i64(i64)")
def packet_words(stamp):
    """How many words the packet with this stamp has: 1 ... 32, as if at random."""
    return 1 + (shr(stamp * 0x1E3779B97F4A7C15, 57) & 31)


words_of = packet_words.inner


@kernel("i64(mem, i64, i64, i64, i64)")
def send_stamped(mem, state, first, last, burst):
    """Publishes packets first ... last - 1 in bursts, every word of each its stamp; returns the first one that was
    not staged, when the ring was full for long. Packets are made behind the state."""
    stamp, source = first, state + L.LS_BYTES
    for _ in range(_SPIN):
        end = min(stamp + burst, last)
        while stamp < end:
            words = words_of(stamp)
            for i in range(words):
                st64(mem, source + 8 * i, stamp)
            if lane.lane_stage(mem, state, 0, stamp, source, 8 * words) != 1:
                break
            stamp += 1
        lane.lane_publish(mem, state)
        if stamp == last:
            return stamp
        if stamp < end:
            for _ in range(20):
                pause()
    sched_yield()
    return stamp


@kernel("i64(mem, i64, i64, i64, i64)")
def take_stamped(mem, at, mask, first, last):
    """Takes packets until `last` or a little more, or until none came for long: the next stamp, or -1 - stamp of the
    first packet that is not as it must be."""
    stamp = first
    for _ in range(_SPIN):
        head, tail = lane.lane_peek(mem, at), ld64(mem, at + L.LANE_TAIL)
        position = lane.lane_next(mem, at, mask, tail, head)
        before = stamp
        while position < head:
            record = at + L.LANE_DATA + (position & mask)
            length = ld64(mem, record) & 0xFFFFFF
            wrong = (ld64(mem, record + L.RECORD_TIME) ^ stamp) | (length ^ 8 * words_of(stamp))
            for i in range(length >> 3):
                wrong |= ld64(mem, record + L.RECORD_DATA + 8 * i) ^ stamp
            if wrong != 0:
                return -1 - stamp
            stamp += 1
            position = lane.lane_next(mem, at, mask, position + lane.record_bytes(length), head)
        if head != tail:
            lane.lane_release(mem, at, head, stamp - before)
        if stamp >= last:
            return stamp
        for _ in range(20):
            pause()
    sched_yield()
    return stamp


def make_shared(size: int) -> tuple[Any, int, int]:
    """The memory, and where in it the lane and the producer's state are."""
    for one in (send_stamped, take_stamped, produce):
        one.compile()
    arena = Arena(1 << 30)
    ring, state = arena.map_anonymous(lane_bytes(size), shared=True), arena.map_anonymous(4096, shared=True)
    words = arena.mem[state:state + L.LS_BYTES].view(np.int64)
    words[L.LS_BASE // 8], words[L.LS_MASK // 8] = ring, size - 1
    return arena.mem, ring, state


def exchange(packets: int, size: int, burst: int) -> float:
    """So many packets from another process to this one; packets a second."""
    mem, ring, state = make_shared(size)

    def send() -> None:
        stamp = 0
        while stamp < packets:
            stamp = send_stamped(mem, state, stamp, packets, burst)

    start = time.perf_counter()
    with Child(send) as producer:
        stamp = 0
        while stamp < packets:
            stamp = take_stamped(mem, ring, size - 1, stamp, packets)
            assert stamp >= 0, f"packet {-1 - stamp} was lost, doubled or torn"
        assert producer.join() == 0
    elapsed = time.perf_counter() - start
    assert int(mem[ring + L.LANE_CONSUMED:ring + L.LANE_CONSUMED + 8].view(np.int64)[0]) == packets
    return packets / elapsed


@pytest.mark.parametrize(("size", "burst"), [(4096, 1), (4096, 7), (65536, 64), (1 << 20, 64)])
def test_none_is_lost_doubled_or_torn(size: int, burst: int) -> None:
    exchange(500_000, size, burst)


@pytest.mark.parametrize("size", [4096, 65536])
def test_producers_are_killed_and_replaced(size: int) -> None:
    """Wherever each of them dies, the consumer sees a beginning of what it sent, whole and in order."""
    mem, ring, state = make_shared(size)
    for generation in range(100):
        first = generation << 40
        stamp = first

        def send(stamp: int = first) -> None:
            while True:
                stamp = send_stamped(mem, state, stamp, 1 << 60, 5)

        with Child(send) as producer:
            while stamp < first + 100 * (generation % 7):
                stamp = take_stamped(mem, ring, size - 1, stamp, stamp + 1 + generation)
                assert stamp >= 0
            assert producer.kill() < 0
        produce(mem, RECOVER, state, 0, 0, 0)
        while True:
            before, stamp = stamp, take_stamped(mem, ring, size - 1, stamp, 1 << 60)
            assert stamp >= 0, "torn, lost or doubled over a death"
            if stamp == before:
                break


@pytest.mark.stress
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("size", "burst"), [(4096, 3), (65536, 64)])
def test_none_of_a_hundred_million_is_lost_doubled_or_torn(size: int, burst: int, capsys: Any) -> None:
    rate = exchange(100_000_000, size, burst)
    with capsys.disabled():
        print(f" {rate / 1e6:.1f} M packets/s", end="")
