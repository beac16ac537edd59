"""Reassembly against a slow oracle and against scapy; its memory and its ledger."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP, defragment
from scapy.layers.inet import fragment as fragment4
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    defragment6,
    fragment6,
)
from scapy.packet import Raw

from dataplane import ledger
from dataplane.inet.fragments import FRAGMENT_COMPLETE, FRAGMENT_HELD
from dataplane.shm import layout as L
from tests.inet import rig as kernels
from tests.inet.naive_reassembly import Datagram, Fragment
from tests.inet.rig import SECOND, Rig

RELEASE, RESTORE, EXPIRE, FLUSH = range(4)


@pytest.fixture(scope="module")
def shared() -> Rig:
    return Rig()


def feed(rig: Rig, packet: bytes, flags: int = 0, nif: int = 0) -> int:
    rig.describe(packet, flags=flags)
    return int(kernels.fragment(rig.mem, rig.w, nif or rig.tun, rig.p))


def result(rig: Rig) -> bytes:
    """The packet that the descriptor now describes."""
    return rig.read(rig.get(rig.p + L.P_L3), rig.get(rig.p + L.P_L3_LENGTH))


def after(rig: Rig, what: int, p: int = 0) -> int:
    return int(kernels.fragment_after(rig.mem, rig.w, p or rig.p, what))


def reason(rig: Rig, name: str) -> int:
    return rig.get(rig.tun + L.N_LEDGER + L.L_REASONS + 8 * ledger.CODE[name])


def held(rig: Rig) -> int:
    return rig.get(rig.tun + L.N_LEDGER + L.L_HELD)


def packet(family: int, fragment: Fragment, ident: int, proto: int = 17) -> bytes:
    offset, data, more = fragment
    if family == 4:
        return bytes(IP(src="10.1.0.2", dst="10.1.0.1", id=ident, proto=proto, frag=offset // 8,
                        flags="MF" if more else 0) / Raw(data))
    return bytes(IPv6(src="fd01::2", dst="fd01::1")
                 / IPv6ExtHdrFragment(id=ident, offset=offset // 8, m=int(more), nh=proto) / Raw(data))


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, Fragment]]:
    """Fragments of two datagrams in any order, with repetitions and some that do not fit."""
    stream = []
    for ident in (1, 2):
        size = draw(st.integers(9, 200))
        data = draw(st.binary(min_size=size, max_size=size))
        cuts = sorted(draw(st.sets(st.integers(1, (size - 1) // 8), max_size=8)))
        bounds = [0, *(8 * cut for cut in cuts), size]
        if len(bounds) == 2:
            bounds = [0, 8, size]
        parts = [(a, data[a:b], b != size) for a, b in pairwise(bounds)]
        parts += draw(st.lists(st.sampled_from(parts), max_size=3))
        if draw(st.booleans()):
            at = 8 * draw(st.integers(0, 26))
            parts.append((at, draw(st.binary(min_size=1, max_size=40)), draw(st.booleans())))
        stream += [(ident, part) for part in parts if part[0] or part[2]]
    return draw(st.permutations(stream))


@settings(max_examples=300)
@given(st.sampled_from((4, 6)), histories())
def test_agrees_with_the_oracle(shared: Rig, family: int, history: list[tuple[int, Fragment]]) -> None:
    rig = shared
    after(rig, FLUSH)
    oracle: dict[int, Datagram] = {}
    counted = held(rig)
    for ident, part in history:
        datagram = oracle.setdefault(ident, Datagram(65515 if family == 4 else 65535))
        expected = datagram.add(part)
        verdict = feed(rig, packet(family, part, ident, proto=99))
        if isinstance(expected, bytes):
            assert verdict == FRAGMENT_COMPLETE
            assert result(rig)[20 if family == 4 else 40:] == expected
            assert rig.get(rig.p + L.P_FRAMES) == len(datagram.fragments)
            after(rig, RELEASE)
            del oracle[ident]
        else:
            assert verdict == (FRAGMENT_HELD if expected == "held" else -ledger.CODE[expected])
        waiting = [one for one in oracle.values() if not one.poisoned]
        counted = sum(len(one.fragments) for one in waiting)
        assert held(rig) == counted
    after(rig, FLUSH)
    assert held(rig) == 0
    rig.check_guards()


@settings(max_examples=40)
@given(st.integers(0, 65507), st.integers(16, 3000), st.randoms(use_true_random=False), st.booleans())
def test_ipv4_equals_scapy(shared: Rig, size: int, step: int, order: random.Random, options: bool) -> None:
    rig = shared
    after(rig, FLUSH)
    nops = [IPOption_NOP()] * 4 if options else []
    data = order.randbytes(min(size, 65535 - 24 - 8))
    whole = (IP(src="10.1.0.2", dst="10.1.0.1", id=order.randrange(65536), options=nops)
             / UDP(sport=1, dport=2) / Raw(data))
    parts = [IP(bytes(part)) for part in fragment4(whole, fragsize=step)]
    if len(parts) == 1:
        return
    order.shuffle(parts)
    verdicts = [feed(rig, bytes(part)) for part in parts]
    assert verdicts == [FRAGMENT_HELD] * (len(parts) - 1) + [FRAGMENT_COMPLETE]
    whole = defragment(sorted(parts, key=lambda part: part.frag))[0]   # it wants the last one last
    assert result(rig) == bytes(whole)
    assert rig.get(rig.p + L.P_PROTO) == 17 and rig.get(rig.p + L.P_FRAMES) == len(parts)
    after(rig, RELEASE)
    rig.check_guards()


@settings(max_examples=40)
@given(st.integers(1400, 20000), st.integers(1280, 3000), st.randoms(use_true_random=False),
       st.integers(0, 3))
def test_ipv6_equals_scapy(shared: Rig, size: int, mtu: int, order: random.Random, chain: int) -> None:
    rig = shared
    after(rig, FLUSH)
    base = IPv6(src="fd01::2", dst="fd01::1")
    if chain & 1:
        base = base / IPv6ExtHdrHopByHop()
    base = base / IPv6ExtHdrFragment(id=order.randrange(1 << 32))
    if chain & 2:
        base = base / IPv6ExtHdrDestOpt()
    whole = base / UDP(sport=1, dport=2) / Raw(order.randbytes(size))
    parts = [IPv6(bytes(part)) for part in fragment6(whole, mtu)]
    order.shuffle(parts)
    verdicts = [feed(rig, bytes(part)) for part in parts]
    if len(parts) > 1:
        assert verdicts == [FRAGMENT_HELD] * (len(parts) - 1) + [FRAGMENT_COMPLETE]
        assert result(rig) == bytes(defragment6(parts))
        assert rig.get(rig.p + L.P_L4) - rig.get(rig.p + L.P_L3) == (48 if chain & 1 else 40)
        after(rig, RELEASE)
    rig.check_guards()


def test_atomic_fragment_is_whole_at_once_and_apart() -> None:
    rig = Rig()
    udp = UDP(sport=1, dport=2) / Raw(b"alone")
    assert feed(rig, packet(6, (0, bytes(16), True), 7)) == FRAGMENT_HELD
    alone = IPv6(src="fd01::2", dst="fd01::1") / IPv6ExtHdrFragment(id=7) / udp
    assert feed(rig, bytes(alone)) == FRAGMENT_COMPLETE
    assert result(rig) == bytes(IPv6(src="fd01::2", dst="fd01::1") / udp)
    after(rig, RELEASE)
    assert feed(rig, packet(6, (16, b"end", False), 7)) == FRAGMENT_COMPLETE
    assert rig.get(rig.p + L.P_FRAMES) == 2 and held(rig) == 0


@pytest.mark.parametrize("fragments", [
    [(0, bytes(12), True)],                                 # not a multiple of 8
    [(65528, bytes(9), False)],                             # ping of death
    [(65520, bytes(16), False)],
    [(8, b"", True)],
])
def test_impossible_lengths(fragments: list[Fragment]) -> None:
    rig = Rig()
    for part in fragments:
        assert feed(rig, packet(4, part, 1)) == -ledger.FRAGMENT_INVALID
    assert held(rig) == 0


def test_first_fragment_must_show_the_transport_header() -> None:
    rig = Rig()
    tcp = bytes(TCP(sport=1, dport=2))
    assert feed(rig, packet(4, (0, tcp[:8], True), 1, proto=6)) == -ledger.FRAGMENT_INVALID
    assert feed(rig, packet(4, (8, tcp[8:16], True), 1, proto=6)) == -ledger.FRAGMENT_INVALID
    assert feed(rig, packet(4, (0, tcp[:16], True), 1, proto=6)) == FRAGMENT_HELD
    assert feed(rig, packet(6, (0, tcp[:16], True), 1, proto=6)) == -ledger.FRAGMENT_INVALID
    assert feed(rig, packet(6, (0, tcp + bytes(4), True), 1, proto=6)) == FRAGMENT_HELD
    options = bytes(IPv6ExtHdrDestOpt(nh=17))
    assert feed(rig, packet(6, (0, options, True), 2, proto=60)) == -ledger.FRAGMENT_INVALID
    assert feed(rig, packet(6, (0, options + bytes(8), True), 2, proto=60)) == FRAGMENT_HELD


def test_header_that_makes_the_whole_too_long() -> None:
    """The last fragment fits behind a header of 20 bytes, not behind the first one's 60."""
    rig = Rig()
    last = 65504
    assert feed(rig, packet(4, (last, bytes(8), False), 1)) == FRAGMENT_HELD
    assert feed(rig, packet(4, (40, bytes(last - 40), True), 1)) == FRAGMENT_HELD
    first = IP(src="10.1.0.2", dst="10.1.0.1", id=1, proto=17, flags="MF", options=[IPOption_NOP()] * 40)
    assert feed(rig, bytes(first / Raw(bytes(40)))) == -ledger.FRAGMENT_INVALID
    assert reason(rig, "fragment_invalid") == 2 and held(rig) == 0


def test_timeout_eviction_and_end() -> None:
    rig = Rig(entries=2, timeout_ns=30 * SECOND)
    now = rig.get(rig.w + L.W_MONOTONIC)
    for ident in (1, 2, 3):
        rig.put(rig.w + L.W_MONOTONIC, now + ident * SECOND)
        assert feed(rig, packet(4, (0, bytes(16), True), ident)) == FRAGMENT_HELD
        assert feed(rig, packet(4, (32, bytes(16), True), ident)) == FRAGMENT_HELD
    assert reason(rig, "fragment_evicted") == 2 and held(rig) == 4
    assert after(rig, EXPIRE, now + 31 * SECOND) == 0
    assert after(rig, EXPIRE, now + 32 * SECOND) == 1
    assert reason(rig, "fragment_timeout") == 2 and held(rig) == 2
    assert after(rig, FLUSH) == 1
    assert reason(rig, "fragment_unfinished") == 2 and held(rig) == 0


def test_complete_datagrams_are_not_evicted_and_not_leaked() -> None:
    rig = Rig(entries=1)
    alone = bytes(IPv6(src="fd01::2", dst="fd01::1") / IPv6ExtHdrFragment(id=7) / UDP() / b"a")
    assert feed(rig, alone) == FRAGMENT_COMPLETE
    assert feed(rig, alone) == -ledger.FRAGMENT_EVICTED
    after(rig, EXPIRE, rig.get(rig.w + L.W_MONOTONIC) + 60 * SECOND)
    assert feed(rig, alone) == FRAGMENT_COMPLETE


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_restore_is_as_before(family: int, last: int) -> None:
    rig = Rig()
    parts = [(0, b"a" * 16, True), (16, b"b" * 8, True), (24, b"ccc", False)]
    again = parts.pop(last)
    for part in parts:
        assert feed(rig, packet(family, part, 5)) == FRAGMENT_HELD
    for _ in range(3):
        assert feed(rig, packet(family, again, 5)) == FRAGMENT_COMPLETE
        whole = result(rig)
        assert whole.endswith(b"a" * 16 + b"b" * 8 + b"ccc")
        assert held(rig) == 0 and rig.get(rig.p + L.P_FRAMES) == 3
        after(rig, RESTORE)
        assert held(rig) == 2
        assert feed(rig, packet(family, parts[0], 5)) == -ledger.FRAGMENT_DUPLICATE
    assert feed(rig, packet(family, again, 5)) == FRAGMENT_COMPLETE
    assert result(rig) == whole
    after(rig, RELEASE)


@pytest.mark.parametrize(("tapped", "frames", "still"), [
    ((), 3, False), ((0, 1), 1, False), ((2,), 2, False), ((0, 1, 2), 0, True),
])
def test_frames_that_a_tap_got_are_not_counted_again(
        tapped: tuple[int, ...], frames: int, still: bool) -> None:
    rig = Rig()
    parts = [(0, b"a" * 16, True), (16, b"b" * 8, True), (24, b"ccc", False)]
    for index, part in enumerate(parts):
        feed(rig, packet(4, part, 5), flags=L.PF_DELIVERED if index in tapped else 0)
    assert rig.get(rig.p + L.P_FRAMES) == frames and held(rig) == 0
    flags = rig.get(rig.p + L.P_FLAGS)
    assert bool(flags & L.PF_DELIVERED) == still and flags & L.PF_REASSEMBLED


@pytest.mark.parametrize("again", [
    (0, b"a" * 8 + b"b" * 8, True),         # two fragments' bytes in one
    (16, b"c" * 8, True),                   # the first half of one
    (24, b"c" * 8, True),                   # the second half
    (8, b"b" * 8 + b"c" * 8, True),
    (0, b"A" * 8, True),                    # other bytes in the same place
    (40, b"dd", True), (40, b"d", False), (32, b"c" * 8 + b"ddd", False), (40, b"ddd", True),
])
def test_the_same_bytes_with_other_bounds_overlap(again: Fragment) -> None:
    rig = Rig()
    parts = [(0, b"a" * 8, True), (8, b"b" * 8, True), (16, b"c" * 16, True), (40, b"ddd", False)]
    for part in parts:
        assert feed(rig, packet(4, part, 5, proto=99)) == FRAGMENT_HELD
    for part in parts:
        assert feed(rig, packet(4, part, 5, proto=99)) == -ledger.FRAGMENT_DUPLICATE
    verdict = feed(rig, packet(4, again, 5, proto=99))
    odd = again[2] and len(again[1]) % 8
    assert verdict == (-ledger.FRAGMENT_INVALID if odd else -ledger.FRAGMENT_OVERLAP)
    if not odd:
        assert held(rig) == 0 and reason(rig, "fragment_overlap") == 4
        assert feed(rig, packet(4, (32, b"c" * 8, True), 5, proto=99)) == -ledger.FRAGMENT_OVERLAP


def test_netifs_do_not_mix() -> None:
    rig = Rig()
    assert feed(rig, packet(4, (0, bytes(16), True), 1)) == FRAGMENT_HELD
    assert feed(rig, packet(4, (16, bytes(1), False), 1), nif=rig.ethernet) == FRAGMENT_HELD
    assert feed(rig, packet(4, (16, bytes(1), False), 1)) == FRAGMENT_COMPLETE
