"""The wheel against a dictionary that is searched: same entries, same times, never early, never lost."""

from __future__ import annotations

import struct

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dataplane.kcont import area as K
from tests.plain import plain

wheel = plain("dataplane.kcont.wheel")
PCBS = 24
AREA, ENTRIES = 64, 64 + K.K_BYTES
FAR_AHEAD = [1, 63, 64, 65, 4095, 4096, 4097, 262143, 262144, 1 << 24, (1 << 30) + 77, 1 << 36]


class Naive:
    """What the wheel should be."""

    def __init__(self, now: int) -> None:
        self.now = now
        self.when: dict[int, int] = {}

    def insert(self, number: int, when: int) -> None:
        when = max(when, self.now)
        self.when[number] = min(when, self.when.get(number, when))

    def expire(self, now: int) -> list[tuple[int, int]]:
        due = sorted((when, number) for number, when in self.when.items() if when <= now)
        for _, number in due:
            del self.when[number]
        self.now = max(self.now, now)
        return due


class Wheel(RuleBasedStateMachine):
    @initialize(start=st.integers(0, 1 << 40))
    def begin(self, start: int) -> None:
        self.mem = bytearray(ENTRIES + PCBS * K.E_BYTES)
        struct.pack_into("<q", self.mem, AREA + K.K_TICK, start)
        struct.pack_into("<q", self.mem, AREA + K.K_ENTRIES, ENTRIES)
        self.naive = Naive(start)

    @rule(number=st.integers(0, PCBS - 1),
          ahead=st.integers(-5, 200) | st.sampled_from(FAR_AHEAD) | st.integers(0, 1 << 34))
    def insert(self, number: int, ahead: int) -> None:
        wheel.wheel_insert(self.mem, AREA, number, self.naive.now + ahead)
        self.naive.insert(number, self.naive.now + ahead)

    @rule(number=st.integers(0, PCBS - 1))
    def remove(self, number: int) -> None:
        wheel.wheel_remove(self.mem, AREA, number)
        self.naive.when.pop(number, None)

    @rule(ahead=st.integers(0, 300) | st.sampled_from(FAR_AHEAD))
    def turn(self, ahead: int) -> None:
        now = self.naive.now + ahead
        times = dict(self.naive.when)
        taken = []
        while (number := wheel.wheel_expire(self.mem, AREA, now)) >= 0:
            taken.append((times[number], number))
        assert [when for when, _ in taken] == sorted(when for when, _ in taken)
        assert sorted(taken) == self.naive.expire(now)

    @rule()
    def sleep(self) -> None:
        """Goes on from one wheel_next to the following: few steps, none behind the earliest entry."""
        if not self.naive.when:
            return
        earliest = min(self.naive.when.values())
        for _ in range(K.LEVELS):
            now = wheel.wheel_next(self.mem, AREA)
            assert now <= earliest
            number = wheel.wheel_expire(self.mem, AREA, now)
            self.naive.now = now
            if number >= 0:
                break
        assert now == earliest and self.naive.when.pop(number) == earliest

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "naive"):
            first = wheel.wheel_next(self.mem, AREA)
            times = self.naive.when.values()
            assert self.naive.now <= first <= min(times) if times else first == wheel.FAR


TestWheel = Wheel.TestCase
TestWheel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_ticks_never_fire_early() -> None:
    for ns in (0, 1, 999_999, 1_000_000, 1_000_001, 123_456_789_012_345):
        assert wheel.tick_after(ns) * 1_000_000 >= ns > (wheel.tick_after(ns) - 1) * 1_000_000
        assert wheel.tick_at(ns) * 1_000_000 <= ns
    for never in ((1 << 63) - 1, 1 << 62):
        assert wheel.tick_after(never) == wheel.FAR - 1
    assert wheel.tick_after(-5) == 0


