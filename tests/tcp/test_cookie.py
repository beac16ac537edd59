"""SYN cookies: SipHash against a second implementation, every fact that comes back, what is refused, how long."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.shm import layout as L
from tests.plain import World

WORLD = World()
C = WORLD.load("dataplane.tcp.cookie")
H = WORLD.load("dataplane.tcp.handshake")
F, KEYS, TABLE = 0, 128, 192
SECOND = 1_000_000_000
WORD = st.integers(0, (1 << 32) - 1)
LONG = st.integers(-(1 << 63), (1 << 63) - 1)
MASK = (1 << 64) - 1


def reference(key: bytes, data: bytes) -> int:
    """SipHash-2-4 as its paper says it."""
    k0, k1 = struct.unpack("<2Q", key)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rounds(count: int) -> None:
        for _ in range(count):
            for a, b, turn, half in ((0, 1, 13, True), (2, 3, 16, False), (0, 3, 21, False), (2, 1, 17, True)):
                v[a] = (v[a] + v[b]) & MASK
                v[b] = (v[b] << turn | v[b] >> (64 - turn)) & MASK
                v[b] ^= v[a]
                if half:
                    v[a] = (v[a] << 32 | v[a] >> 32) & MASK
    data += bytes(7 - len(data) % 8) + bytes([len(data) & 0xFF])
    for (word,) in struct.iter_unpack("<Q", data):
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def memory(irs=7, mss=1460, family=4, source=0xC0000201, target=0x0A000001, ports=7 << 16 | 80, flags=0, shift=0):
    mem = bytearray(TABLE + L.T_HEADER)
    struct.pack_into("<2Q", mem, TABLE + L.T_SECRET0, 1, 2)
    C.cookie_keys(mem, TABLE, KEYS)
    hi, lo = (0, source) if family == 4 else (source - (1 << 63), source)
    struct.pack_into("<qqqqq", mem, F, hi, lo, 0, target, ports | family << 32)
    struct.pack_into("<I", mem, F + H.E_IRS, irs)
    struct.pack_into("<I", mem, F + H.E_MSS, mss)
    struct.pack_into("<qq", mem, F + H.E_FLAGS, flags, shift)
    return mem


def u32(mem, place):
    return struct.unpack_from("<I", mem, place)[0]


def made(mem, now):
    """(ISS, offset of the timestamps)."""
    C.cookie_make(mem, KEYS, F, now)
    return u32(mem, F + H.E_ISS), u32(mem, F + H.E_TS_OFFSET)


def test_the_reference_is_siphash():
    assert reference(bytes(range(16)), bytes(range(15))) == 0xA129CA6149BE45E5      # the paper, appendix A


@given(st.binary(min_size=16, max_size=16), LONG, st.integers(0, (1 << 56) - 1))
def test_siphash(key, first, last):
    mem = bytearray(key)
    wanted = reference(key, struct.pack("<q", first) + last.to_bytes(7, "little"))
    assert C.siphash(mem, 0, first, last) & MASK == wanted


def test_keys_are_derived():
    mem = memory()
    keys = struct.unpack_from("<2Q", mem, KEYS)
    assert len({1, 2, *keys}) == 4
    secret = struct.pack("<2Q", 1, 2)
    assert keys == tuple(reference(secret, b"eikooc\0\0" + bytes([i]) + bytes(6)) for i in (0, 1))


@pytest.mark.parametrize("mss, wanted", [(88, 88), (535, 88), (536, 536), (1219, 536), (1220, 1220), (1459, 1440),
                                         (1460, 1460), (8959, 1460), (8960, 8960), (65495, 8960)])
def test_classes(mss, wanted):
    assert C.class_mss(C.mss_class(mss)) == wanted


@given(WORD, st.sampled_from((4, 6)), st.integers(88, 65495), st.integers(0, 1 << 62), st.integers(0, 63))
def test_what_was_made_is_known(irs, family, mss, now, later):
    mem = memory(irs, mss, family)
    iss, offset = made(mem, now)
    again = memory(irs, 0, family)
    assert C.cookie_check(again, KEYS, F, iss, now + later * SECOND) == 1
    assert (u32(again, F + H.E_ISS), u32(again, F + H.E_TS_OFFSET)) == (iss, offset)
    assert u32(again, F + H.E_MSS) == C.class_mss(C.mss_class(mss)) <= mss


def test_it_lasts_one_period_and_what_is_left_of_the_first():
    mem = memory()
    period = C.COUNTER_NS
    for now in (0, period - 1, 5 * period):
        iss, _ = made(mem, now)
        last = (now // period + 2) * period - 1
        assert C.cookie_check(mem, KEYS, F, iss, last) == 1
        assert C.cookie_check(mem, KEYS, F, iss, last + 1) == 0
        assert now < period or C.cookie_check(mem, KEYS, F, iss, now - period) == 0


def test_anything_else_is_refused():
    iss, _ = made(memory(), SECOND)
    for other in ({"irs": 8}, {"source": 0xC0000202}, {"target": 0x0A000002}, {"ports": 8 << 16 | 80},
                  {"ports": 7 << 16 | 81}, {"family": 6}):
        assert C.cookie_check(memory(**other), KEYS, F, iss, SECOND) == 0, other
    good = [number for number in range(1 << 14) if C.cookie_check(memory(), KEYS, F, iss ^ number, SECOND)]
    assert good == list(range(8))       # the classes


@given(WORD, st.integers(0, 1 << 62), st.booleans(), st.one_of(st.none(), st.integers(0, 14)))
def test_options_survive_in_the_timestamp(offset, now, sack, shift):
    flags = H.EF_TIMESTAMPS | (H.EF_SACK if sack else 0) | (0 if shift is None else H.EF_SCALE)
    mem = memory(flags=flags, shift=shift or 0)
    struct.pack_into("<I", mem, F + H.E_TS_OFFSET, offset)
    value = C.stamp(mem, F, now)
    clock = now // 1_000_000 + offset
    assert 0 <= (clock - value) & 0xFFFFFFFF <= 2 * C.STAMP_MASK + 1 and 0 <= value < 1 << 32
    again = memory()
    C.stamp_facts(again, F, value)
    assert struct.unpack_from("<qq", again, F + H.E_FLAGS) == (flags, shift or 0)
