"""Positions and sequence numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plain import plain

S = plain("dataplane.tcp.sequence")
WIRE = st.integers(0, (1 << 32) - 1)
POSITIONS = st.integers(0, 1 << 61)


@given(WIRE, POSITIONS, st.integers(-(1 << 31), (1 << 31) - 1))
def test_what_is_near_is_found(initial, near, distance):
    assert S.unwrap(near, initial, S.wire(initial, near + distance)) == near + distance


@given(WIRE, POSITIONS, WIRE)
def test_nearest(initial, near, number):
    position = S.unwrap(near, initial, number)
    assert S.wire(initial, position) == number
    assert -(1 << 31) <= position - near < 1 << 31


@pytest.mark.parametrize("near, initial, number, position", [
    (0, 0xFFFFFFFF, 0xFFFFFFFF, 0),     # the SYN, and the first byte on the other side of the wrap
    (0, 0xFFFFFFFF, 0, 1),
    (1, 0, 0xFFFFFFFF, -1),             # before the SYN
    (1 << 32, 5, 4, (1 << 32) - 1),
])
def test_the_wrap(near, initial, number, position):
    assert S.unwrap(near, initial, number) == position


@given(WIRE, st.integers(1, (1 << 31) - 1))
def test_precedes(a, distance):
    b = (a + distance) % (1 << 32)
    assert S.precedes(a, b) and not S.precedes(b, a) and not S.precedes(a, a)
