"""What a passive netif's frame is, read slowly and obviously: the oracle for ip_input and udp_input."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from dataplane.shm import layout as L
from tests.traffic import internet_checksum

TAGS = (0x8100, 0x88A8, 0x9100)
EXTENSIONS = (0, 43, 51, 60)


class Bad(Exception):
    """The frame is dropped for this reason."""


@dataclass
class Packet:
    """An IP packet: its bytes, where the transport header begins, and the tag it came with."""

    data: bytes
    family: int
    proto: int
    at: int
    vlan: int | None
    fragment: bool = False


def need(condition: bool, reason: str) -> None:
    if not condition:
        raise Bad(reason)


def number(data: bytes, at: int, size: int = 2) -> int:
    return int.from_bytes(data[at:at + size], "big")


def packet(frame: bytes, link: int) -> Packet:
    """The IP packet in the frame; raises Bad."""
    kind, rest, vlan = _link(frame, link)
    need(kind != 0x0806, "arp")
    need(kind in (0x0800, 0x86DD), "not_ip")
    return _ipv4(rest, vlan) if kind == 0x0800 else _ipv6(rest, vlan)


def _link(frame: bytes, link: int) -> tuple[int, bytes, int | None]:
    if link == L.LINK_RAW:
        need(len(frame) >= 1, "truncated")
        need(frame[0] >> 4 in (4, 6), "bad_ip_version")
        return (0x0800 if frame[0] >> 4 == 4 else 0x86DD), frame, None
    if link == L.LINK_NULL:
        need(len(frame) >= 4, "truncated")
        family = min(int.from_bytes(frame[:4], "little"), int.from_bytes(frame[:4], "big"))
        return {2: 0x0800, 24: 0x86DD, 28: 0x86DD, 30: 0x86DD}.get(family, 0), frame[4:], None
    size, at = {L.LINK_ETHERNET: (14, 12), L.LINK_SLL: (16, 14), L.LINK_SLL2: (20, 0)}[link]
    need(len(frame) >= size, "truncated")
    kind, rest, vlan, tags = number(frame, at), frame[size:], None, 0
    while kind in TAGS:
        need(tags < 2, "vlan_depth")
        need(len(rest) >= 4, "truncated")
        vlan = number(rest, 0) if vlan is None else vlan
        kind, rest, tags = number(rest, 2), rest[4:], tags + 1
    return kind, rest, vlan


def _ipv4(data: bytes, vlan: int | None) -> Packet:
    need(len(data) >= 20, "truncated")
    need(data[0] >> 4 == 4, "bad_ip_version")
    header, total = (data[0] & 15) * 4, number(data, 2)
    need(20 <= header <= total, "bad_ip_header")
    need(total <= len(data), "truncated")
    need(internet_checksum(data[:header]) == 0, "bad_ip_checksum")
    _options4(data[20:header])
    return Packet(data[:total], 4, data[9], header, vlan, number(data, 6) & 0x3FFF != 0)


def _options4(options: bytes) -> None:
    while options and options[0] != 0:
        if options[0] == 1:
            options = options[1:]
            continue
        need(len(options) >= 2 and options[0] not in (131, 137) and 2 <= options[1] <= len(options), "bad_ip_options")
        options = options[options[1]:]


def _ipv6(data: bytes, vlan: int | None) -> Packet:
    need(len(data) >= 40, "truncated")
    need(data[0] >> 4 == 6, "bad_ip_version")
    total = 40 + number(data, 4)
    need(total <= len(data), "truncated")
    data, kind, at = data[:total], data[6], 40
    for count in range(9):
        if kind == 44:
            need(at + 8 <= total, "bad_extension_header")
            return Packet(data, 6, kind, at, vlan, True)
        if kind not in EXTENSIONS:
            return Packet(data, 6, kind, at, vlan)
        need(count < 8 and at + 8 <= total and (kind != 0 or count == 0), "bad_extension_header")
        size = (data[at + 1] + 2) * 4 if kind == 51 else (data[at + 1] + 1) * 8
        need(at + size <= total, "bad_extension_header")
        if kind in (0, 60):
            _options6(data[at + 2:at + size])
        need(kind != 43 or data[at + 3] == 0, "bad_extension_header")
        kind, at = data[at], at + size
    raise AssertionError


def _options6(options: bytes) -> None:
    while options:
        if options[0] == 0:
            options = options[1:]
            continue
        need(len(options) >= 2 and 2 + options[1] <= len(options) and options[0] >> 6 == 0, "bad_extension_header")
        options = options[2 + options[1]:]


def datagram(one: Packet) -> tuple[bytes, int]:
    """(record, offset of the payload) of a UDP packet; raises Bad."""
    udp = one.data[one.at:]
    need(len(udp) >= 8, "bad_udp_length")
    length = number(udp, 4)
    need(8 <= length <= len(udp), "bad_udp_length")
    if number(udp, 6) == 0:
        need(one.family == 4, "bad_udp_checksum")
    else:
        ends = one.data[12:20] if one.family == 4 else one.data[8:40]
        pseudo = ends + struct.pack("!IHH", length, 0, 17)
        need(internet_checksum(pseudo + udp[:length]) == 0, "bad_udp_checksum")
    return one.data[:one.at + length], one.at + 8
