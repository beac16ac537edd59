"""Capture files, record by record: classic pcap and pcapng, in both byte orders.

Called by the `pcap` netif only. `next_record` reads what stands at the cursor of a *reader*, a
few words of the netif queue's private memory; the file lies in the arena. Formats:

    classic  draft-ietf-opsawg-pcap: a header of 24 bytes, then records
    pcapng   draft-ietf-opsawg-pcapng: blocks; a section header block begins a section with a
             byte order and interfaces of its own

The file is hostile: each length is compared with what is left before it is followed, and every
call either moves on by at least 12 bytes, or stops at the cursor.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from dataplane.jit import inlined
from dataplane.shm import layout as L
from dataplane.shm.atomics import bswap16, bswap32, ld16, ld32, ld64, shr, st64

# -- the reader: its words, from the beginning of a netif queue's private memory -----------------------------
F_FILE = 0              # the file's place in the arena, and its bytes
F_SIZE = 8
F_KIND = 16             # CLASSIC | PCAPNG
F_SWAP = 24             # 1: written in the other byte order
F_UNIT = 32             # classic: ns of one step of the fraction: 1000 or 1
F_LINK = 40             # classic: LINK_... of all its packets
F_TABLE = 48            # pcapng: place of this section's interfaces, I_BYTES each
F_BEGIN = 56            # where the first record stands
F_POSITION = 64         # the cursor: offset in the file, packets before it, interfaces before it
F_PACKET = 72
F_INTERFACES = 80
R_FRAME = 88            # the packet that `next_record` found: its place in the arena,
R_LENGTH = 96           # bytes there,
R_WIRE = 104            # bytes it had on the wire,
R_TIME = 112            # ns since the epoch, or NO_TIME,
R_LINK = 120            # LINK_...,
R_NEXT = 128            # where the next record stands
E_AT = 136              # the damage that it found: offset in the file, and two numbers for the sentence
E_SAID = 144
E_HAS = 152
READER_BYTES = 160

CLASSIC, PCAPNG = 1, 2
NO_TIME = -1

I_LINK = 0              # an interface: LINK_..., or -1: none of ours
I_NUMBER = 8            # the link type as the file numbers it
I_SNAPLEN = 16
I_RESOLUTION = 24       # if_tsresol
I_FACTOR = 32           # ns of a unit; resolutions finer than ns: units of a ns
I_OFFSET = 40           # if_tsoffset in ns
I_BYTES = 64
INTERFACES_MAX = 4096

# What `next_record` returns; damage is a negative D_...
END, PACKET, SKIPPED = 0, 1, 2

D_HEADER, D_RECORD, D_LONG, D_BLOCK, D_BLOCK_SIZE, D_BLOCK_ENDS, D_BYTE_ORDER, D_VERSION = range(1, 9)
D_CAPTURED, D_INTERFACE, D_LINK, D_OPTION, D_RESOLUTION, D_INTERFACES = range(9, 15)

DAMAGES = {
    D_HEADER: "a header of {said} bytes begins here, the file has {has}",
    D_RECORD: "record says {said} bytes, the file has {has}",
    D_LONG: "record says {said} bytes, no packet is longer than {has}",
    D_BLOCK: "block says {said} bytes, the file has {has}",
    D_BLOCK_SIZE: "block says {said} bytes, expected a multiple of 4 of at least {has}",
    D_BLOCK_ENDS: "block says {said} bytes at its beginning and {has} at its end",
    D_BYTE_ORDER: "section header has the byte-order magic {said:#010x}, expected 0x1a2b3c4d",
    D_VERSION: "section is of pcapng version {said}, expected {has}",
    D_CAPTURED: "record says {said} bytes, its block has {has}",
    D_INTERFACE: "record is of interface {said}, the section has described {has}",
    D_LINK: "interface {has} has link type {link}",
    D_OPTION: "option says {said} bytes, its block has {has}",
    D_RESOLUTION: "interface {has} has an unusable time stamp resolution (if_tsresol {said})",
    D_INTERFACES: "section describes more than {has} interfaces",
}

# -- numbers of the formats --------------------------------------------------------------------------------

_MAGIC_US, _MAGIC_NS = 0xA1B2C3D4, 0xA1B23C4D
_SECTION, _INTERFACE, _OLD_PACKET, _SIMPLE, _ENHANCED = 0x0A0D0D0A, 1, 2, 3, 6
_BYTE_ORDER = 0x1A2B3C4D
_CLASSIC_HEADER, _RECORD_HEADER = 24, 16
_SECTION_BYTES, _INTERFACE_BYTES, _SIMPLE_BYTES, _ENHANCED_BYTES = 28, 20, 16, 32   # without what varies
_BLOCK_BYTES = 12
_OPTION_END, _OPTION_TSRESOL, _OPTION_TSOFFSET = 0, 9, 14
_OPTIONS_MAX = 1024         # looked at: gigabytes of empty options must not hold up the worker
_FRAME_MAX = 262144         # libpcap's MAXIMUM_SNAPLEN
_SECOND = 1_000_000_000

# The LINKTYPE registry, www.tcpdump.org/linktypes.html. 12 and 14 are systems' own numbers of raw IP,
# which some programs write to files; 108 differs from 0 in the byte order of the address family.
_LINKS = (
    (1, L.LINK_ETHERNET), (101, L.LINK_RAW), (12, L.LINK_RAW), (14, L.LINK_RAW), (228, L.LINK_RAW),
    (229, L.LINK_RAW), (113, L.LINK_SLL), (276, L.LINK_SLL2), (0, L.LINK_NULL), (108, L.LINK_NULL),
)
SUPPORTED = "Ethernet (1), raw IP (101, 228, 229), Linux cooked (113, 276), BSD loopback (0, 108)"
LINK_NAMES = {
    3: "AX.25", 6: "Token Ring", 7: "ARCNET", 8: "SLIP", 9: "PPP", 10: "FDDI", 50: "PPP over HDLC",
    51: "PPPoE", 104: "Cisco HDLC", 105: "IEEE 802.11", 107: "Frame Relay", 117: "OpenBSD pflog", 119: "Prism",
    122: "IP over Fibre Channel", 127: "radiotap", 143: "DOCSIS", 147: "private use 0", 163: "AVS",
    187: "Bluetooth", 189: "Linux USB", 192: "PPI", 195: "IEEE 802.15.4", 201: "Bluetooth", 220: "Linux USB",
    227: "CAN", 239: "NFLOG", 247: "InfiniBand", 249: "USBPcap", 251: "Bluetooth LE", 253: "netlink",
}


def link_name(number: int) -> str:
    """A link type for an error message."""
    name = LINK_NAMES.get(number)
    return f"{number} ({name})" if name else str(number)


# -- opening -----------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """What the beginning of a file says: F_KIND, F_SWAP, F_UNIT, F_LINK and F_BEGIN."""

    kind: int
    swap: int
    unit: int
    link: int
    begin: int


HEADER_BYTES = 28   # what `inspect` wants to see of a file


def inspect(start: bytes) -> Header:
    """Understands the first HEADER_BYTES of a file; ValueError says what is wrong with it."""
    if not start:
        raise ValueError("the file is empty")
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd":
        raise ValueError("the file is compressed, unpack it first")
    for order in "<>":
        swap = int(order == ">")    # the host is little-endian
        magic = int.from_bytes(start[:4], "little" if order == "<" else "big")
        if magic == _SECTION:
            if len(start) < _SECTION_BYTES:
                break
            return Header(PCAPNG, 0, 0, 0, 0)   # byte order and version: next_record looks at them
        if magic in (_MAGIC_US, _MAGIC_NS):
            if len(start) < _CLASSIC_HEADER:
                break
            major, minor, _, _, _, network = struct.unpack_from(f"{order}HHIIII", start, 4)
            if (major, minor) != (2, 4):
                raise ValueError(f"pcap version {major}.{minor}, expected 2.4")
            number = network & 0xFFFF   # above: whether and how long a frame check sequence there is
            link = dict(_LINKS).get(number)
            if link is None:
                raise ValueError(f"link type {link_name(number)}, expected one of {SUPPORTED}")
            return Header(CLASSIC, swap, 1000 if magic == _MAGIC_US else 1, link, _CLASSIC_HEADER)
    else:
        raise ValueError(f"neither a pcap nor a pcapng file (begins with {start[:4].hex(' ')})")
    raise ValueError(f"too short for a capture: {len(start)} bytes")


# -- walking -----------------------------------------------------------------------------------------------


@inlined
def _u16(mem, at, swap):
    return bswap16(ld16(mem, at)) if swap else ld16(mem, at)


@inlined
def _u32(mem, at, swap):
    return bswap32(ld32(mem, at)) if swap else ld32(mem, at)


@inlined
def _damaged(mem, s, damage, at, said, has):
    st64(mem, s + E_AT, at)
    st64(mem, s + E_SAID, said)
    st64(mem, s + E_HAS, has)
    return -damage


@inlined
def _skip(mem, s, size):
    st64(mem, s + F_POSITION, ld64(mem, s + F_POSITION) + size)
    return SKIPPED


@inlined
def _packet(mem, s, frame, length, wire, size):
    """The packet in the record of `size` bytes at the cursor; time and link are set already.

    A packet cannot have been shorter on the wire than what was captured of it; programs that
    rewrite captures get this wrong.
    """
    if length > _FRAME_MAX:
        return _damaged(mem, s, D_LONG, ld64(mem, s + F_POSITION), length, _FRAME_MAX)
    st64(mem, s + R_FRAME, frame)
    st64(mem, s + R_LENGTH, length)
    st64(mem, s + R_WIRE, max(length, wire))
    st64(mem, s + R_NEXT, ld64(mem, s + F_POSITION) + size)
    return PACKET


@inlined
def _classic(mem, s, at, left):
    """A record of a classic file: draft-ietf-opsawg-pcap section 5."""
    place, swap = ld64(mem, s + F_FILE) + at, ld64(mem, s + F_SWAP)
    if left < _RECORD_HEADER:
        return _damaged(mem, s, D_HEADER, at, _RECORD_HEADER, left)
    length, wire = _u32(mem, place + 8, swap), _u32(mem, place + 12, swap)
    if length > left - _RECORD_HEADER and length <= _FRAME_MAX:
        return _damaged(mem, s, D_RECORD, at, length, left - _RECORD_HEADER)
    seconds, fraction = _u32(mem, place, swap), _u32(mem, place + 4, swap)
    st64(mem, s + R_TIME, seconds * _SECOND + fraction * ld64(mem, s + F_UNIT))
    st64(mem, s + R_LINK, ld64(mem, s + F_LINK))
    return _packet(mem, s, place + _RECORD_HEADER, length, wire, _RECORD_HEADER + length)


@inlined
def _block_size(mem, s, at, least):
    """Bytes of the block at `at`, of which 12 are there; or damage. Section 3.1."""
    place, swap, left = ld64(mem, s + F_FILE) + at, ld64(mem, s + F_SWAP), ld64(mem, s + F_SIZE) - at
    size = _u32(mem, place + 4, swap)
    if size < least or size & 3:
        return _damaged(mem, s, D_BLOCK_SIZE, at, size, least)
    if size > left:
        return _damaged(mem, s, D_BLOCK, at, size, left)
    if _u32(mem, place + size - 4, swap) != size:
        return _damaged(mem, s, D_BLOCK_ENDS, at, size, _u32(mem, place + size - 4, swap))
    return size


@inlined
def _section(mem, s, at, left):
    """Section header block, section 4.1: from here on another byte order, and no interfaces."""
    place = ld64(mem, s + F_FILE) + at
    if left < _SECTION_BYTES:
        return _damaged(mem, s, D_HEADER, at, _SECTION_BYTES, left)
    magic = ld32(mem, place + 8)
    swap = 1 if bswap32(magic) == _BYTE_ORDER else 0
    if magic != _BYTE_ORDER and swap == 0:
        return _damaged(mem, s, D_BYTE_ORDER, at, magic, 0)
    if _u16(mem, place + 12, swap) != 1:
        return _damaged(mem, s, D_VERSION, at, _u16(mem, place + 12, swap), 1)
    st64(mem, s + F_SWAP, swap)
    st64(mem, s + F_INTERFACES, 0)
    size = _block_size(mem, s, at, _SECTION_BYTES)
    return size if size < 0 else _skip(mem, s, size)


@inlined
def _set_link(mem, interface, number):
    """One that is none of ours is damage only when a packet of the interface comes."""
    st64(mem, interface + I_NUMBER, number)
    st64(mem, interface + I_LINK, -1)
    for i in range(len(_LINKS)):
        if _LINKS[i][0] == number:
            st64(mem, interface + I_LINK, _LINKS[i][1])


@inlined
def _set_resolution(mem, interface, resolution):
    """if_tsresol, section 4.2: units of a second are 10**n, or 2**n if the highest bit is set.
    0 if times in it do not fit our arithmetic."""
    power = resolution & 0x7F
    if power > (63 if resolution & 0x80 else 27):
        return 0
    factor = 1
    for _ in range(abs(power - 9) if resolution < 0x80 else 0):
        factor *= 10
    st64(mem, interface + I_RESOLUTION, resolution)
    st64(mem, interface + I_FACTOR, factor)
    return 1


@inlined
def _interface_options(mem, s, at, size, interface):
    """Options of the interface description block of `size` bytes at `at`: SKIPPED, or damage. Section 3.5."""
    place, swap = ld64(mem, s + F_FILE), ld64(mem, s + F_SWAP)
    option, end = at + _INTERFACE_BYTES - 4, at + size - 4
    for _ in range(_OPTIONS_MAX):
        if end - option < 4:
            break
        code, length = _u16(mem, place + option, swap), _u16(mem, place + option + 2, swap)
        if code == _OPTION_END:
            break
        if length > end - option - 4:
            return _damaged(mem, s, D_OPTION, at, length, end - option - 4)
        if code == _OPTION_TSRESOL and length == 1:
            resolution = ld16(mem, place + option + 4) & 0xFF   # padded to 4 bytes
            if not _set_resolution(mem, interface, resolution):
                return _damaged(mem, s, D_RESOLUTION, at, resolution, ld64(mem, s + F_INTERFACES))
        elif code == _OPTION_TSOFFSET and length == 8:
            first, second = _u32(mem, place + option + 4, swap), _u32(mem, place + option + 8, swap)
            seconds = (first << 32) | second if swap else (second << 32) | first
            st64(mem, interface + I_OFFSET, seconds * _SECOND)
        option += 4 + ((length + 3) & -4)
    return SKIPPED


@inlined
def _interface(mem, s, at, size):
    """Interface description block, section 4.2."""
    place, swap, count = ld64(mem, s + F_FILE) + at, ld64(mem, s + F_SWAP), ld64(mem, s + F_INTERFACES)
    if size < _INTERFACE_BYTES:
        return _damaged(mem, s, D_BLOCK_SIZE, at, size, _INTERFACE_BYTES)
    if count >= INTERFACES_MAX:
        return _damaged(mem, s, D_INTERFACES, at, count, INTERFACES_MAX)
    interface = ld64(mem, s + F_TABLE) + count * I_BYTES
    _set_link(mem, interface, _u16(mem, place + 8, swap))
    st64(mem, interface + I_SNAPLEN, _u32(mem, place + 12, swap))
    st64(mem, interface + I_OFFSET, 0)
    _set_resolution(mem, interface, 6)      # microseconds, where no option says otherwise
    state = _interface_options(mem, s, at, size, interface)
    if state != SKIPPED:
        return state
    st64(mem, s + F_INTERFACES, count + 1)
    return _skip(mem, s, size)


@inlined
def _divide(ticks, divisor):
    """`ticks`, unsigned, by `divisor`, which is positive and not above 10**18."""
    quotient = (shr(ticks, 1) // divisor) << 1
    rest = ticks - quotient * divisor       # below 2 * divisor, which fits
    return quotient + (1 if rest >= divisor else 0)


@inlined
def _nanoseconds(mem, interface, ticks):
    """A time stamp of 64 unsigned bits in ns; exact, rounded down."""
    resolution, factor = ld64(mem, interface + I_RESOLUTION), ld64(mem, interface + I_FACTOR)
    if resolution <= 9:
        return ticks * factor
    if resolution < 0x80:
        return _divide(ticks, factor)
    power = resolution & 0x7F
    fraction = ticks & ((1 << power) - 1)
    if power <= 32:
        return shr(ticks, power) * _SECOND + ((fraction * _SECOND) >> power)
    # The product has up to 93 bits: in two parts.
    parts = (fraction >> 32) * _SECOND + (((fraction & 0xFFFFFFFF) * _SECOND) >> 32)
    return shr(ticks, power) * _SECOND + (parts >> (power - 32))


@inlined
def _set_interface(mem, s, at, number):
    """Link type of the packet at `at`, which is of interface `number`: PACKET, or damage."""
    if number >= ld64(mem, s + F_INTERFACES):
        return _damaged(mem, s, D_INTERFACE, at, number, ld64(mem, s + F_INTERFACES))
    interface = ld64(mem, s + F_TABLE) + number * I_BYTES
    if ld64(mem, interface + I_LINK) < 0:
        return _damaged(mem, s, D_LINK, at, ld64(mem, interface + I_NUMBER), number)
    st64(mem, s + R_LINK, ld64(mem, interface + I_LINK))
    return PACKET


@inlined
def _enhanced(mem, s, at, size, kind):
    """Enhanced packet block, section 4.3, and the obsolete packet block, appendix A, which
    differs in the interface's number only."""
    place, swap = ld64(mem, s + F_FILE) + at, ld64(mem, s + F_SWAP)
    if size < _ENHANCED_BYTES:
        return _damaged(mem, s, D_BLOCK_SIZE, at, size, _ENHANCED_BYTES)
    number = _u16(mem, place + 8, swap) if kind == _OLD_PACKET else _u32(mem, place + 8, swap)
    state = _set_interface(mem, s, at, number)
    if state != PACKET:
        return state
    length = _u32(mem, place + 20, swap)
    if length > size - _ENHANCED_BYTES:
        return _damaged(mem, s, D_CAPTURED, at, length, size - _ENHANCED_BYTES)
    interface = ld64(mem, s + F_TABLE) + number * I_BYTES
    ticks = (_u32(mem, place + 12, swap) << 32) | _u32(mem, place + 16, swap)
    st64(mem, s + R_TIME, _nanoseconds(mem, interface, ticks) + ld64(mem, interface + I_OFFSET))
    return _packet(mem, s, place + 28, length, _u32(mem, place + 24, swap), size)


@inlined
def _simple(mem, s, at, size):
    """Simple packet block, section 4.4: of the first interface, cut by its snap length, without a time."""
    place, swap = ld64(mem, s + F_FILE) + at, ld64(mem, s + F_SWAP)
    if size < _SIMPLE_BYTES:
        return _damaged(mem, s, D_BLOCK_SIZE, at, size, _SIMPLE_BYTES)
    state = _set_interface(mem, s, at, 0)
    if state != PACKET:
        return state
    wire, snaplen = _u32(mem, place + 8, swap), ld64(mem, ld64(mem, s + F_TABLE) + I_SNAPLEN)
    length = min(wire, size - _SIMPLE_BYTES)
    if snaplen > 0:
        length = min(length, snaplen)
    st64(mem, s + R_TIME, NO_TIME)
    return _packet(mem, s, place + 12, length, wire, size)


@inlined
def _block(mem, s, at, left):
    """A block of a pcapng file; those that hold no packet and no interface are passed over."""
    place = ld64(mem, s + F_FILE) + at
    if left < _BLOCK_BYTES:
        return _damaged(mem, s, D_HEADER, at, _BLOCK_BYTES, left)
    if ld32(mem, place) == _SECTION:        # reads the same in both byte orders
        return _section(mem, s, at, left)
    size = _block_size(mem, s, at, _BLOCK_BYTES)
    if size < 0:
        return size
    kind = _u32(mem, place, ld64(mem, s + F_SWAP))
    if kind in (_ENHANCED, _OLD_PACKET):
        return _enhanced(mem, s, at, size, kind)
    if kind == _SIMPLE:
        return _simple(mem, s, at, size)
    if kind == _INTERFACE:
        return _interface(mem, s, at, size)
    return _skip(mem, s, size)


@inlined
def next_record(mem, s):
    """Reads what stands at the cursor of the reader `s`.

    PACKET: R_... describe it, and the cursor still stands before it (`advance` moves on).
    SKIPPED: it was something else, and the cursor is behind it. END: of the file. Below 0: damage,
    E_... say which, and the cursor stands before it.
    """
    at = ld64(mem, s + F_POSITION)
    left = ld64(mem, s + F_SIZE) - at
    if left <= 0:
        return END
    if ld64(mem, s + F_KIND) == CLASSIC:
        return _classic(mem, s, at, left)
    return _block(mem, s, at, left)


@inlined
def advance(mem, s):
    """Moves the cursor behind the packet that `next_record` found."""
    st64(mem, s + F_POSITION, ld64(mem, s + R_NEXT))
    st64(mem, s + F_PACKET, ld64(mem, s + F_PACKET) + 1)


@inlined
def restart(mem, s):
    """Moves the cursor to the first record."""
    st64(mem, s + F_POSITION, ld64(mem, s + F_BEGIN))
    st64(mem, s + F_PACKET, 0)
    st64(mem, s + F_INTERFACES, 0)


@inlined
def section_ahead(mem, s):
    """Whether a new section begins at the cursor. A cursor must not be moved back over its
    beginning: byte order and interfaces of the section before are forgotten there."""
    at = ld64(mem, s + F_POSITION)
    if ld64(mem, s + F_KIND) == CLASSIC or ld64(mem, s + F_SIZE) - at < _BLOCK_BYTES:
        return False
    return ld32(mem, ld64(mem, s + F_FILE) + at) == _SECTION
