"""The plain mode does what the compiled code does, and leaves the real modules alone."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plain import World, plain
from tests.plain_probe import probe

PLAIN = plain("tests.plain_probe")
WORDS = st.integers(-(1 << 63), (1 << 63) - 1)


@given(WORDS, WORDS)
def test_intrinsics_agree(a, b):
    compiled, mem = np.zeros(1024, np.uint8), bytearray(1024)
    assert PLAIN.probe(mem, a, b) == probe(compiled, a, b)
    assert compiled.tobytes() == bytes(mem)


def test_modules_are_apart():
    before = dict(sys.modules)
    lane = plain("dataplane.rings.lane")
    real = sys.modules.get("dataplane.rings.lane")
    assert lane is not real and callable(lane.lane_stage) and type(lane.lane_stage).__name__ == "function"
    assert lane.__file__ == str(lane.lane_stage.__code__.co_filename)
    assert {name for name in sys.modules if name.startswith("dataplane.rings")} <= set(before)


def test_a_world_is_one():
    world = World()
    assert plain("dataplane.shm.lock", world) is plain("dataplane.shm.lock", world)
    assert plain("dataplane.shm.lock") is not plain("dataplane.shm.lock", world)


@pytest.mark.parametrize("call", [
    lambda m: m.ld64(bytearray(8), -8),
    lambda m: m.st8(bytearray(8), -1, 0),
    lambda m: m.st64(bytearray(8), 0, 1.0),
    lambda m: m.st64(bytearray(8), 1, 0),
    lambda m: m.copy(bytearray(8), 0, 1, 4),
    lambda m: m.copy(bytearray(8), 0, 5, 4),
    lambda m: m.copy(bytearray(8), 0, 5, -1),
    lambda m: m.fill(bytearray(8), 5, 0, 4),
])
def test_mistakes_are_found(call):
    with pytest.raises((IndexError, ValueError, TypeError, struct.error)):
        call(plain("dataplane.shm.atomics"))
