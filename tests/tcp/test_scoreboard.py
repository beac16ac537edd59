"""The scoreboard against sets of bytes, and against peers that lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.shm import layout_tcp as T
from tests.tcp.sender import Sender

TOP = 400


def sender(top: int = TOP) -> Sender:
    s = Sender(mss=10)
    s.send(top - 1)
    return s


def ranges(numbers: set[int]) -> list[tuple[int, int]]:
    """Return maximal runs, half open."""
    out: list[tuple[int, int]] = []
    for one in sorted(numbers):
        if out and out[-1][1] == one:
            out[-1] = (out[-1][0], one + 1)
        else:
            out.append((one, one + 1))
    return out


blocks = st.lists(st.tuples(st.integers(2, TOP - 1), st.integers(1, 60)).map(lambda p: (p[0], min(p[0] + p[1], TOP))),
                  min_size=1, max_size=4)


@given(st.lists(blocks, min_size=1, max_size=25))
def test_is_a_set_of_what_was_reported(acks: list[list[tuple[int, int]]]) -> None:
    """As long as there is room it is exactly that; beyond, a subset with the highest range whole."""
    s = sender()
    known: set[int] = set()
    exact = True
    for one in acks:
        before = {n for a, b in s.sacked for n in range(a, b)}
        fresh = s.ack(1, one)
        reported = one[1:] if len(one) > 1 and one[1][0] <= one[0][0] and one[0][1] <= one[1][1] else one
        for a, b in reported:
            known |= set(range(a, b))
        kept = {n for a, b in s.sacked for n in range(a, b)}
        assert kept <= known
        assert ranges(kept) == s.sacked
        exact = exact and len(ranges(known)) < T.SB_MAX - 4
        if exact:
            assert kept == known and fresh == len(kept - before)
        assert s.sacked[-1][1] == max(known) + 1


@given(st.lists(blocks, min_size=1, max_size=4), st.integers(1, TOP))
def test_advance(acks: list[list[tuple[int, int]]], ack: int) -> None:
    s = sender()
    for one in acks:
        s.ack(1, one)
    before = {n for a, b in s.sacked for n in range(a, b)}
    s.ack(ack)
    # A range that the acknowledgement stands in or touches has been given up by the peer.
    expected = [(a, b) for a, b in ranges(before) if a > ack]
    assert s.sacked == expected


@pytest.mark.parametrize("block", [
    (300, 200), (300, 300), (350, TOP + 1), (TOP, TOP + 100), (1, 50), (-50, 50), (TOP + 5, TOP + 9),
    (200, 200 - (1 << 31)), (2, 2 + (1 << 31) - 1),
], ids=str)
def test_blocks_that_cannot_be_true(block: tuple[int, int]) -> None:
    s = sender()
    assert s.ack(1, [block]) == 0
    assert s.sacked == [] and s["PHASE"] == T.PHASE_OPEN and s["DUPACKS"] == 0
    assert s.ack(1, [block, (100, 120)]) == 20      # the others count


def test_blocks_below_the_acknowledgement() -> None:
    s = sender()
    s.ack(200)
    assert s.ack(200, [(100, 150)]) == 0 and s.sacked == []
    assert s.ack(250, [(240, 260), (300, 310)]) == 10 and s.sacked == [(300, 310)]


def test_not_negotiated() -> None:
    s = Sender(sack=False)
    s.send(20_000)
    assert s.ack(1, [(1001, 2001)]) == 0 and s.sacked == []


def test_count_of_blocks_is_bounded() -> None:
    s = sender()
    s.set(s.X + T.X_SEGMENT + T.S_OPTIONS, T.SO_SACK)
    s.set(s.X + T.X_SEGMENT + T.S_SACK_COUNT, 1 << 40)
    s.do("sack_update")
    s.set(s.X + T.X_SEGMENT + T.S_SACK_COUNT, -1)
    assert s.do("sack_update") == 0


def test_overflow_forgets_the_smallest_but_never_the_highest() -> None:
    s = sender()
    s["REORDER_WND"] = 1 << 40      # stay in the open phase
    s.ack(1, [(20, 40)])
    for i in range(T.SB_MAX - 1):
        s.ack(1, [(60 + 20 * i, 70 + 20 * i)])
    assert len(s.sacked) == T.SB_MAX
    assert s.ack(1, [(390, 391)]) == 0          # new and highest: taken, though small
    assert len(s.sacked) == T.SB_MAX and s.sacked[-1] == (390, 391) and s.sacked[0] == (20, 40)
    assert s.ack(1, [(45, 50)]) == 0            # new and the smallest: not taken
    assert (45, 50) not in s.sacked
    assert s.ack(1, [(340, 360)]) == 10         # instead of one of 10 bytes
    assert (340, 360) in s.sacked and len(s.sacked) == T.SB_MAX
    assert s.ack(1, [(20, 391)]) == 371 - sum(b - a for a, b in [(20, 40), (340, 360), (390, 391)]) - 110
    assert s.sacked == [(20, 391)]


def test_d_sack() -> None:
    """RFC 2883 section 4: below the acknowledgement, or within the second block."""
    s = sender()
    s.ack(101)
    s.set(s.X + T.X_SEGMENT + T.S_SACK_COUNT, 0)
    for reported, found in (([(51, 61)], 10), ([(151, 161), (141, 181)], 10), ([(151, 161), (201, 211)], 0)):
        s.ack(101, reported)
        # ack_process has used it up; look at what sack_update says.
        s.do("sack_update")
        assert s["DSACKED"] == found
