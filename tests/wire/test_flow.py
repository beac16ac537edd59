"""The flow hash against a slow oracle: what is one flow, whatever carries it and whichever way it goes."""

from __future__ import annotations

import struct
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Dot1AD, Dot1Q

from dataplane.jit import kernel
from dataplane.shm import layout as L
from dataplane.shm.arena import PAGE, Arena
from dataplane.wire import flow
from tests.captures import make

LINKS = (L.LINK_ETHERNET, L.LINK_RAW, L.LINK_SLL, L.LINK_SLL2, L.LINK_NULL)


@kernel("i64(mem, i64, i64, i64, i64)")
def _flow(mem, link, frame, length, queues):
    """The hash, or with `queues` the queue."""
    if queues > 0:
        return flow.flow_queue(mem, link, frame, length, queues)
    return flow.flow_hash(mem, link, frame, length)


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena(1 << 36)


@pytest.fixture(scope="module")
def end(arena: Arena) -> int:
    """Behind this byte there is no memory."""
    return arena.map_anonymous(17 * PAGE) + 17 * PAGE


def fast(arena: Arena, end: int, link: int, frame: bytes, queues: int = 0) -> int:
    place = end - len(frame)
    arena.mem[place:end] = np.frombuffer(frame, np.uint8)
    return int(_flow(arena.mem, link, place, len(frame), queues))


# -- the oracle --------------------------------------------------------------------------------------------


Flow = tuple[tuple[bytes, int], tuple[bytes, int], int]    # two ends, protocol


def slow_flow(link: int, frame: bytes) -> Flow | None:
    """The ends of the frame's flow, None if it is not IP."""
    if link in (L.LINK_RAW, L.LINK_NULL):
        packet = frame[0 if link == L.LINK_RAW else 4:]
        kind = {4: 0x0800, 6: 0x86DD}.get(packet[0] >> 4 if packet else 0)
    else:
        at, size = {L.LINK_ETHERNET: (12, 14), L.LINK_SLL: (14, 16), L.LINK_SLL2: (0, 20)}[link]
        if len(frame) < size:
            return None
        kind, packet = int.from_bytes(frame[at:at + 2], "big"), frame[size:]
        for _ in range(2):
            if kind in (0x8100, 0x88A8, 0x9100) and len(packet) >= 4:
                kind, packet = int.from_bytes(packet[2:4], "big"), packet[4:]
    if kind == 0x0800:
        return slow4(packet)
    if kind == 0x86DD:
        return slow6(packet)
    return None


def slow4(packet: bytes) -> Flow | None:
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    header, total = packet[0] % 16 * 4, int.from_bytes(packet[2:4], "big")
    if header < 20 or header > len(packet):
        return None
    if total >= header:
        packet = packet[:total]
    source, target = packet[12:16], packet[16:20]
    if packet[6] & 0x3F or packet[7]:
        return (source, 0), (target, 0), 0
    return with_ports(source, target, packet[9], packet[header:])


def slow6(packet: bytes) -> Flow | None:
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return None
    if total := int.from_bytes(packet[4:6], "big"):
        packet = packet[:40 + total]
    source, target, kind, rest = packet[8:24], packet[24:40], packet[6], packet[40:]
    for _ in range(16):
        if kind not in (0, 43, 44, 51, 60, 135, 139, 140) or len(rest) < 8:
            break
        if kind == 44:
            if int.from_bytes(rest[2:4], "big") & 0xFFF9:
                return (source, 0), (target, 0), 0
            size = 8
        else:
            size = (rest[1] + 2) * 4 if kind == 51 else (rest[1] + 1) * 8
        kind, rest = rest[0], rest[size:]
    return with_ports(source, target, kind, rest)


def with_ports(source: bytes, target: bytes, kind: int, rest: bytes) -> Flow:
    ports = struct.unpack(">HH", rest[:4]) if kind in (6, 17, 33, 132, 136) and len(rest) >= 4 else (0, 0)
    return (source, ports[0]), (target, ports[1]), kind


def crc32c(crc: int, word: bytes) -> int:
    for byte in word:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc


def slow_hash(found: Flow | None) -> int:
    """CRC-32C of the lower end, the higher end, ports and protocol as little-endian words of 64 bits."""
    if found is None:
        return 0

    def signed(end: tuple[bytes, int]) -> tuple[int, int, int]:
        address = end[0].rjust(16, b"\0")
        high, low = struct.unpack(">qq", address)
        return high, low, end[1]

    low, high = sorted((signed(found[0]), signed(found[1])))
    crc = 0xFFFFFFFF
    for word in (low[0], low[1], high[0], high[1], low[2] << 16 | high[2] | found[2] << 32):
        crc = crc32c(crc, struct.pack("<q", word))
    product = crc * 0x2545F4914F6CDD1D
    return (product >> 64 ^ product) & 0xFFFFFFFF


# -- tests -------------------------------------------------------------------------------------------------


def wrapped(packet: object) -> list[tuple[int, bytes]]:
    """The IP packet on every link type, and with tags."""
    return [
        (L.LINK_RAW, bytes(packet)),
        (L.LINK_ETHERNET, make.ether(packet)),
        (L.LINK_ETHERNET, make.ether(packet) + bytes(18)),
        (L.LINK_ETHERNET, make.ether(packet, Dot1Q(vlan=5))),
        (L.LINK_ETHERNET, make.ether(packet, Dot1AD(vlan=5), Dot1Q(vlan=6))),
        (L.LINK_SLL, make.cooked(packet)),
        (L.LINK_SLL2, make.cooked2(packet)),
        (L.LINK_NULL, make.loopback(packet, "<")),
        (L.LINK_NULL, make.loopback(packet, ">")),
    ]


@pytest.mark.parametrize("index", range(len(make.mixed())))
def test_equal_on_all_link_types(arena: Arena, end: int, index: int) -> None:
    found = {fast(arena, end, link, frame) for link, frame in wrapped(make.mixed()[index])}
    assert len(found) == 1 and found != {0}


def test_both_directions_are_one_flow(arena: Arena, end: int) -> None:
    packets = [fast(arena, end, L.LINK_RAW, bytes(packet)) for packet in make.mixed()]
    assert packets[0] == packets[1] and packets[2] == packets[3]
    assert len(set(packets)) == 6  # UDP, TCP and ICMP, of both families; the last two are the first flow
    same = IP(src="192.0.2.1", dst="192.0.2.1")
    assert fast(arena, end, L.LINK_RAW, bytes(same / UDP(sport=1, dport=2))) == fast(
        arena, end, L.LINK_RAW, bytes(same / UDP(sport=2, dport=1)))


def test_fragments_stay_together(arena: Arena, end: int) -> None:
    frames = make.fragments()
    *fragments, atomic = (fast(arena, end, L.LINK_RAW, frame) for frame in frames)
    assert len(set(fragments)) == 2  # one for each family
    assert atomic == fast(arena, end, L.LINK_RAW, bytes(make.udp6()))


def test_options_and_extension_headers_change_nothing(arena: Arena, end: int) -> None:
    frames = make.options()
    four = {fast(arena, end, L.LINK_RAW, frame) for frame in frames[:4]}
    six = {fast(arena, end, L.LINK_RAW, frame) for frame in frames[4:10]}
    assert four == {fast(arena, end, L.LINK_RAW, bytes(make.udp4()))}
    assert six == {fast(arena, end, L.LINK_RAW, bytes(make.udp6()))}


@pytest.mark.parametrize("frames", [make.malformed, make.vlan])
def test_cut_and_malformed_frames(arena: Arena, end: int, frames: object) -> None:
    for frame in frames():
        for size in range(len(frame) + 1):
            assert fast(arena, end, L.LINK_ETHERNET, frame[:size]) == slow_hash(
                slow_flow(L.LINK_ETHERNET, frame[:size])), (frame.hex(), size)


START = st.sampled_from([bytes(frame) for packet in make.mixed() for _, frame in wrapped(packet)[:6]]
                        + make.options() + make.fragments())


CHANGE = st.tuples(st.integers(0, 99), st.integers(0, 255))


@given(st.sampled_from(LINKS), START, st.lists(CHANGE, max_size=6), st.integers(0, 200))
def test_any_bytes(
    arena: Arena, end: int, link: int, frame: bytes, changes: list[tuple[int, int]], size: int
) -> None:
    data = bytearray(frame)
    for at, value in changes:
        if at < len(data):
            data[at] = value
    data = data[:size]
    assert fast(arena, end, link, bytes(data)) == slow_hash(slow_flow(link, bytes(data)))


def test_flows_spread_evenly_over_queues_and_group_slots(arena: Arena, end: int) -> None:
    """Also flows that differ in a few bits only, and the slots of a group within one queue."""
    queues: Counter[int] = Counter()
    slots: Counter[int] = Counter()
    for i in range(8192):
        packet = bytearray(bytes(make.udp4(b"")))
        packet[12:16] = (0x0A000000 + i).to_bytes(4, "big")
        queue = fast(arena, end, L.LINK_RAW, bytes(packet), 4)
        queues[queue] += 1
        if queue == 0:
            slots[fast(arena, end, L.LINK_RAW, bytes(packet)) % 8] += 1
    assert sorted(queues) == [0, 1, 2, 3] and min(queues.values()) > 8192 / 4 * 0.9
    assert sorted(slots) == list(range(8)) and min(slots.values()) > queues[0] / 8 * 0.8
