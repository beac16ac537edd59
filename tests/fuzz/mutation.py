"""How inputs are changed: bytes as any fuzzer does, frames with an eye for what a frame is.

A frame is a byte string of its own: link (an index of LINKS), flags of the netif (PF_...) and RELATIVE, then the
frame. After most changes its lengths and checksums are made right again (`sealed`), since nearly all of what is behind
them would else never be seen.
"""

from __future__ import annotations

import random
import struct

from dataplane.shm import layout as L
from tests.fuzz.engine import Input
from tests.traffic import internet_checksum

__all__ = ["BURST_MAX", "LINKS", "RELATIVE", "cut", "frame", "mutate_bytes", "mutate_frames", "network", "sealed",
           "sized"]

LINKS = (L.LINK_ETHERNET, L.LINK_RAW, L.LINK_SLL, L.LINK_SLL2, L.LINK_NULL)
RELATIVE = 0x40         # flags: an acknowledgment number counts from what the bed's connection has sent
BURST_MAX = 8           # frames of an input
_SIZES = (14, 0, 16, 20, 4)
_EDGES = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 20, 39, 40, 41, 59, 60, 63, 64, 127, 128, 129, 131, 137, 254, 255)
_WORDS = (0, 1, 7, 8, 20, 40, 0x45, 0x0800, 0x0806, 0x8100, 0x88A8, 0x9100, 0x86DD, 0x1FFF, 0x2000, 0x2001, 0x3FFF,
          0x4000, 0x7FFF, 0x8000, 0xFFF0, 0xFFF8, 0xFFFE, 0xFFFF, 1280, 1500, 5000, 8080, 40000)
_PROTOS = (0, 1, 6, 17, 43, 44, 50, 51, 58, 59, 60, 135, 255)


def frame(data: bytes, link: int = L.LINK_ETHERNET, flags: int = 0) -> bytes:
    """A frame as a part of an input."""
    return bytes([LINKS.index(link), flags]) + data


# -- bytes ---------------------------------------------------------------------------------------------------


def mutate_bytes(dice: random.Random, data: bytes, other: bytes = b"", words: tuple[int, ...] = _WORDS) -> bytes:
    """One change of a few bytes."""
    at = dice.randrange(len(data) + 1)
    if dice.random() < 0.5:
        at = min(at, dice.randrange(64))    # headers are in front
    size = dice.choice((1, 1, 2, 2, 4, 8, dice.randrange(1, 64)))
    match dice.randrange(10):
        case 0 | 1 if data:
            at = min(at, len(data) - 1)
            return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1:]
        case 2 | 3 if data:
            at = min(at, len(data) - 1)
            value = dice.choice(_EDGES) if dice.random() < 0.6 else data[at] + dice.choice((-1, 1, -8, 8))
            return data[:at] + bytes([value & 0xFF]) + data[at + 1:]
        case 4:
            word = dice.choice(words) if dice.random() < 0.7 else dice.getrandbits(16)
            new = struct.pack(dice.choice("<>") + "H", word & 0xFFFF)
            return data[:at] + new + data[at + 2:]
        case 5:
            word = dice.choice((dice.getrandbits(32), dice.choice(words), 0xFFFFFFFF, 1 << dice.randrange(32)))
            return data[:at] + struct.pack(dice.choice("<>") + "I", word & 0xFFFFFFFF) + data[at + 4:]
        case 6:
            return data[:at] + data[at + size:]
        case 7:
            return data[:at] + (dice.randbytes(size) if dice.random() < 0.5 else data[at:at + size]) + data[at:]
        case 8:
            return data[:at]
        case _:
            place = dice.randrange(len(other) + 1)
            return data[:at] + other[place:place + size] + data[at + (size if dice.random() < 0.7 else 0):]


# -- frames --------------------------------------------------------------------------------------------------


def network(part: bytes) -> int:
    """Where the IP header of a frame is, or what would be one; 0: nowhere."""
    if len(part) < 2:
        return 0
    link = part[0] % len(LINKS)
    at = 2 + _SIZES[link]
    if link in (0, 2, 3):
        kind_at = {0: 14, 2: 16, 3: 2}[link]
        kind = part[kind_at:kind_at + 2]
        for _ in range(2):
            if kind in (b"\x81\x00", b"\x88\xa8", b"\x91\x00"):
                kind, at = part[at + 2:at + 4], at + 4
    return at if len(part) > at + 20 else 0


def sized(part: bytes) -> bytes:
    """The frame with the length fields of IP and UDP that say what is there."""
    at = network(part)
    if not at:
        return part
    rest = bytearray(part[at:])
    if rest[0] >> 4 == 4:
        rest[2:4] = min(len(rest), 65535).to_bytes(2, "big")
        proto, l4 = rest[9], (rest[0] & 15) * 4
    elif rest[0] >> 4 == 6 and len(rest) >= 40:
        rest[4:6] = min(len(rest) - 40, 65535).to_bytes(2, "big")
        proto, l4 = _upper(rest)
    else:
        return part
    if proto == 17 and l4 + 8 <= len(rest):
        rest[l4 + 4:l4 + 6] = min(len(rest) - l4, 65535).to_bytes(2, "big")
    return part[:at] + bytes(rest)


def _upper(packet: bytes | bytearray) -> tuple[int, int]:
    """What is behind the extension headers of an IPv6 packet, and where."""
    proto, at = packet[6], 40
    for _ in range(10):
        if proto not in (0, 43, 44, 51, 60) or at + 8 > len(packet):
            break
        size = 8 if proto == 44 else (packet[at + 1] + 2) * 4 if proto == 51 else (packet[at + 1] + 1) * 8
        proto, at = packet[at], at + size
    return proto, at


def sealed(part: bytes) -> bytes:
    """The frame with right checksums of IP and of what is in it, as far as that can be said."""
    at = network(part)
    if not at:
        return part
    packet = bytearray(part[at:])
    if packet[0] >> 4 == 4:
        header, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
        if header < 20 or header > len(packet):
            return part
        packet[10:12] = b"\0\0"
        packet[10:12] = internet_checksum(bytes(packet[:header])).to_bytes(2, "big")
        if int.from_bytes(packet[6:8], "big") & 0x3FFF == 0:
            _seal(packet, packet[9], header, min(total, len(packet)), bytes(packet[12:20]))
    elif packet[0] >> 4 == 6 and len(packet) >= 40:
        proto, l4 = _upper(packet)
        _seal(packet, proto, l4, min(40 + int.from_bytes(packet[4:6], "big"), len(packet)), bytes(packet[8:40]))
    return part[:at] + bytes(packet)


def _seal(packet: bytearray, proto: int, l4: int, end: int, ends: bytes) -> None:
    field = {1: 2, 6: 16, 17: 6, 58: 2}.get(proto, -1)
    if proto == 17:
        end = min(end, l4 + int.from_bytes(packet[l4 + 4:l4 + 6], "big"))
    if field < 0 or l4 + field + 2 > end:
        return
    packet[l4 + field:l4 + field + 2] = b"\0\0"
    pseudo = b"" if proto == 1 else ends + struct.pack("!II", end - l4, proto)
    value = internet_checksum(pseudo + bytes(packet[l4:end]))
    packet[l4 + field:l4 + field + 2] = (value or (0xFFFF if proto == 17 else 0)).to_bytes(2, "big")


def cut(dice: random.Random, part: bytes, most: int = 4) -> list[bytes]:
    """The frame's packet in fragments; sometimes they overlap, or leave something out."""
    at = network(part)
    if not at:
        return [part]
    packet, version = part[at:], part[at] >> 4
    header = (packet[0] & 15) * 4 if version == 4 else 40
    body = packet[header:]
    if version not in (4, 6) or not 20 <= header <= len(packet) or len(body) < 9:
        return [part]
    bounds = sorted({0, *(8 * dice.randrange(1, (len(body) + 7) // 8) for _ in range(dice.randrange(1, most)))})
    ident, pieces = dice.choice((1, 2, dice.getrandbits(16))), []
    for first, end in zip(bounds, [*bounds[1:], len(body)], strict=True):
        if dice.random() < 0.1:
            end += dice.choice((-8, 8))
        more = first != bounds[-1] if dice.random() < 0.97 else dice.random() < 0.5
        if version == 4:
            piece = packet[:4] + struct.pack("!HH", ident, first >> 3 | more << 13) + packet[8:header] + body[first:end]
        else:
            extension = struct.pack("!BBHI", packet[6], 0, first | more, ident)
            piece = packet[:6] + b"\x2c" + packet[7:40] + extension + body[first:end]
        pieces.append(sealed(sized(part[:at] + piece)))
    return pieces


def mutate_frames(dice: random.Random, one: Input, other: Input, links: bool = True) -> Input:
    """One change of a sequence of frames. `links`: of their link type as well."""
    parts = list(one) or [b"\0\0"]
    index = dice.randrange(len(parts))
    part, stranger = parts[index], dice.choice(other) if other else b""
    choice = dice.random()
    if choice < 0.06:
        parts.insert(dice.randrange(len(parts) + 1), stranger)
    elif choice < 0.10:
        parts.insert(dice.randrange(len(parts) + 1), part)
    elif choice < 0.14 and len(parts) > 1:
        del parts[index]
    elif choice < 0.17:
        dice.shuffle(parts)
    elif choice < 0.22:
        parts[index:index + 1] = [sealed(part) for part in cut(dice, sealed(sized(part)))]
    else:
        parts[index] = _mutated(dice, part, stranger, links)
    return tuple(parts[:BURST_MAX])


def _mutated(dice: random.Random, part: bytes, stranger: bytes, links: bool) -> bytes:
    """One frame, changed in one way, and mended in some."""
    head, data = part[:2].ljust(2, b"\0"), part[2:]
    at, choice = network(part), dice.random()
    if choice < 0.04:
        flags = head[1] ^ (1 << dice.randrange(8) if not links else 0)
        head = bytes([dice.randrange(len(LINKS)) if links else head[0], flags])
    elif choice < 0.10 and head[0] == 0 and len(data) >= 14:
        tag = struct.pack("!HH", dice.choice((0x8100, 0x88A8, 0x9100)), dice.choice((0, 5, 0xFFFF)))
        data = data[:12] + tag + data[12:]
    elif choice < 0.22 and at:
        data = (part[:at] + _inserted(dice, part[at:]))[2:]
    elif choice < 0.28:
        data = data + dice.randbytes(dice.choice((1, 7, 8, 40, 700)))
    elif choice < 0.55 and at:
        data = part[2:at] + mutate_bytes(dice, part[at:], stranger[at:])
    else:
        data = mutate_bytes(dice, data, stranger[2:])
    part = head + data
    if dice.random() < 0.5:
        part = sized(part)
    return sealed(part) if dice.random() < 0.85 else part


def _inserted(dice: random.Random, packet: bytes) -> bytes:
    """The packet with another IPv4 option or IPv6 extension header, or another protocol."""
    if packet[0] >> 4 == 4 and (packet[0] & 15) < 15:
        size = dice.choice((4, 4, 8, 12))
        size = min(size, (15 - (packet[0] & 15)) * 4)
        body = bytes([dice.choice((0, 1, 7, 68, 131, 137, 148, 82)), dice.choice((size, size, 2, 3, 0, 255))])
        return bytes([packet[0] + size // 4]) + packet[1:20] + (body + dice.randbytes(size))[:size] + packet[20:]
    if packet[0] >> 4 == 6 and len(packet) >= 40:
        kind, units = dice.choice((0, 43, 44, 51, 60)), dice.choice((0, 0, 1, 3, 255))
        body = dice.choice((bytes(6), b"\1\4\0\0\0\0", b"\5\2\0\0\1\0", dice.randbytes(6)))
        size = 8 if kind == 44 else (units + 2) * 4 if kind == 51 else (units + 1) * 8
        header = bytes([packet[6], 0 if kind == 44 else units]) + body + bytes(max(0, min(size, 64) - 8))
        return packet[:6] + bytes([kind]) + packet[7:40] + header + packet[40:]
    return packet[:9] + bytes([dice.choice(_PROTOS)]) + packet[10:]
