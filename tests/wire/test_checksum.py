"""The Internet checksum against scapy's and against a sum of 16-bit words."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.utils import checksum as scapy_checksum

from dataplane.jit import kernel
from dataplane.wire.checksum import copy_sum, finish, good, ones_sum, partial, pseudo4, pseudo6, replaced


@kernel("i64(mem, i64, i64)")
def whole(mem, at, size):
    return finish(ones_sum(mem, at, size))


@kernel("i64(mem, i64, i64, i64)")
def split(mem, at, first, size):
    return finish(ones_sum(mem, at, first) + ones_sum(mem, at + first, size - first))


@kernel("i64(mem, i64, i64, i64)")
def copied(mem, target, source, size):
    return finish(copy_sum(mem, target, source, size))


@kernel("i64(i64)")
def accepted(total):
    return 1 if good(total) else 0


@kernel("i64(i64)")
def finished(total):
    return finish(total)


@kernel("i64(i64)")
def left_open(total):
    return partial(total)


@kernel("i64(i64, i64, i64)")
def renewed(checksum, old, new):
    return replaced(checksum, old, new)


@kernel("i64(i64, i64, i64, i64)")
def of_pseudo4(source, target, proto, length):
    return finish(pseudo4(source, target, proto, length))


@kernel("i64(vec)")
def of_pseudo6(words):
    return finish(pseudo6(words[0], words[1], words[2], words[3], words[4], words[5]))


def stored(value: int) -> bytes:
    """What `st16` writes."""
    return struct.pack("<H", value)


def expected(data: bytes) -> bytes:
    return struct.pack(">H", scapy_checksum(data))


@pytest.fixture(scope="module")
def mem() -> Any:
    return np.zeros(1 << 17, np.uint8)


@given(st.binary(max_size=300), st.integers(0, 17))
def test_equals_scapy_at_any_size_and_alignment(mem: Any, data: bytes, at: int) -> None:
    mem[:400] = 0xFF        # a read past either end would change the sum
    mem[at:at + len(data)] = np.frombuffer(data, np.uint8)
    assert stored(whole(mem, at, len(data))) == expected(data)


@pytest.mark.parametrize("size", [1480, 9000, 65507, 65535])
@pytest.mark.parametrize("byte", [None, 0x00, 0xFF])
def test_large(mem: Any, size: int, byte: int | None) -> None:
    data = np.random.default_rng(size).bytes(size) if byte is None else bytes([byte]) * size
    mem[:] = 0xFF
    mem[3:3 + size] = np.frombuffer(data, np.uint8)
    assert stored(whole(mem, 3, size)) == expected(data)


@given(st.binary(min_size=2, max_size=200), st.integers(0, 100))
def test_sums_of_even_parts_add_up(mem: Any, data: bytes, cut: int) -> None:
    mem[:len(data)] = np.frombuffer(data, np.uint8)
    first = min(2 * cut, len(data) & ~1)
    assert split(mem, 0, first, len(data)) == whole(mem, 0, len(data))


@given(st.binary(min_size=20, max_size=20), st.integers(0, 8), st.integers(0, 65535))
def test_replaced_word_equals_a_new_sum(mem: Any, data: bytes, word: int, new: int) -> None:
    mem[:20] = np.frombuffer(data, np.uint8)
    mem[18:20] = [1, 0]     # RFC 1624: an all-zero sum has two checksums
    before, old = whole(mem, 0, 20), int(mem[2 * word]) | int(mem[2 * word + 1]) << 8
    mem[2 * word:2 * word + 2] = [new & 0xFF, new >> 8]
    assert renewed(before, old, new) == whole(mem, 0, 20)


@given(st.binary(min_size=8, max_size=8), st.integers(0, 255), st.integers(0, 65535))
def test_pseudo_header4(addresses: bytes, proto: int, length: int) -> None:
    source, target = struct.unpack(">II", addresses)
    header = addresses + struct.pack(">BBH", 0, proto, length)
    assert stored(of_pseudo4(source, target, proto, length)) == expected(header)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 255), st.integers(0, 65575))
def test_pseudo_header6(addresses: bytes, proto: int, length: int) -> None:
    words = np.array([*struct.unpack(">4q", addresses), proto, length], np.int64)
    header = addresses + struct.pack(">II", length, proto)
    assert stored(of_pseudo6(words)) == expected(header)


@given(st.binary(max_size=3000), st.integers(0, 9), st.integers(0, 9))
def test_copy_and_sum_at_once(data: bytes, source: int, target: int) -> None:
    mem = np.full(8192, 0xA5, np.uint8)
    mem[source:source + len(data)] = np.frombuffer(data, np.uint8)
    at = 4096 + target
    assert copied(mem, at, source, len(data)) == whole(mem, source, len(data))
    assert mem[at:at + len(data)].tobytes() == data
    assert (mem[4096:at] == 0xA5).all() and (mem[at + len(data):] == 0xA5).all()     # and nothing else


@given(st.integers(0, (1 << 40) - 1))
def test_a_checksum_left_open_is_the_sum(total: int) -> None:
    assert left_open(total) % 0xFFFF == total % 0xFFFF and 0 <= left_open(total) <= 0xFFFF


@given(st.integers(1, (1 << 62) - 1))
def test_good_is_what_finish_makes_zero(total: int) -> None:
    multiple = max(1, total // 0xFFFF) * 0xFFFF
    assert accepted(multiple) == 1 and finished(multiple) == 0
    assert accepted(total) == (finished(total) == 0)
    assert accepted(multiple + 1) == accepted(multiple - 1) == 0


@pytest.mark.parametrize("size", range(64))
def test_carries_of_a_short_range(mem: Any, size: int) -> None:
    """Words of ones carry in every addition."""
    mem[:size] = 0xFF
    assert stored(whole(mem, 0, size)) == expected(b"\xff" * size)
