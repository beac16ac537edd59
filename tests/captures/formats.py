"""Writes capture files byte by byte, so that every corner of the formats can be made on purpose.

Used by `make.py` and by tests. Formats: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng. `order` is
"<" or ">" as in `struct`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

ETHERNET, RAW, SLL, SLL2, NULL, LOOP = 1, 101, 113, 276, 0, 108


def classic(
    packets: Iterable[tuple[int, bytes]], link: int = ETHERNET, order: str = "<", nano: bool = False,
    snaplen: int = 262144,
) -> bytes:
    """A classic file of packets `(ns, bytes)`, cut to `snaplen`."""
    magic, unit = (0xA1B23C4D, 1) if nano else (0xA1B2C3D4, 1000)
    out = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, snaplen, link)]
    for time, data in packets:
        seconds, rest = divmod(time, 10**9)
        kept = data[:snaplen]
        out.append(struct.pack(order + "IIII", seconds, rest // unit, len(kept), len(data)) + kept)
    return b"".join(out)


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    """Any block of a pcapng file."""
    body += bytes(-len(body) % 4)
    size = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + size + body + size


def options(values: Sequence[tuple[int, bytes]], order: str = "<") -> bytes:
    """Options with their end; nothing for none."""
    if not values:
        return b""
    heads = (struct.pack(order + "HH", code, len(data)) for code, data in values)
    packed = (head + data + bytes(-len(data) % 4) for head, (_, data) in zip(heads, values, strict=True))
    return b"".join(packed) + bytes(4)


def section(order: str = "<", extra: Sequence[tuple[int, bytes]] = ()) -> bytes:
    """Section header block."""
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1) + options(extra, order), order)


def interface(
    link: int = ETHERNET, order: str = "<", snaplen: int = 0, resolution: int | None = None,
    offset: int | None = None,
) -> bytes:
    """Interface description block; `resolution` and `offset` are if_tsresol and if_tsoffset."""
    values = [(2, b"eth0")]
    if resolution is not None:
        values.append((9, bytes([resolution])))
    if offset is not None:
        values.append((14, struct.pack(order + "q", offset)))
    return block(1, struct.pack(order + "HHI", link, 0, snaplen) + options(values, order), order)


def enhanced(
    data: bytes, ticks: int, number: int = 0, order: str = "<", wire: int | None = None,
    extra: Sequence[tuple[int, bytes]] = (),
) -> bytes:
    """Enhanced packet block."""
    head = struct.pack(order + "IIIII", number, ticks >> 32, ticks & 0xFFFFFFFF, len(data), wire or len(data))
    return block(6, head + data + bytes(-len(data) % 4) + options(extra, order), order)


def simple(data: bytes, wire: int | None = None, order: str = "<") -> bytes:
    """Simple packet block."""
    return block(3, struct.pack(order + "I", wire or len(data)) + data, order)


def old_packet(data: bytes, ticks: int, number: int = 0, order: str = "<") -> bytes:
    """The obsolete packet block."""
    head = struct.pack(order + "HHIIII", number, 7, ticks >> 32, ticks & 0xFFFFFFFF, len(data), len(data))
    return block(2, head + data, order)
