"""The IPv6 header, its extension headers (RFC 8200) and kinds of addresses (RFC 4291).

An address is two int64: `hi` the first eight bytes, `lo` the last eight. Both may be negative:
only bits count, never the order of numbers.
"""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm.atomics import be16, be64, ld8, put_be16, put_be32, put_be64, shr, st8
from dataplane.wire.checksum import ones_sum, pseudo4

__all__ = [
    "ALL_NODES_HI", "ALL_NODES_LO", "AUTHENTICATION", "BYTES", "DESTINATION", "FRAGMENT", "FRAGMENT_BYTES",
    "HOP_BY_HOP", "MTU_MIN", "NO_NEXT_HEADER", "ROUTING", "build", "extension_length", "hop_limit",
    "is_extension", "is_group", "is_link_local", "is_loopback", "is_unspecified", "next_header",
    "payload_length", "pseudo", "put_addresses", "solicited_node_lo", "source_hi", "source_lo",
    "target_hi", "target_lo",
]

VERSION_CLASS_FLOW = 0
PAYLOAD_LENGTH = 4      # of all that follows the 40 bytes
NEXT_HEADER = 6
HOP_LIMIT = 7
SOURCE = 8
TARGET = 24
BYTES = 40
PAYLOAD_MAX = 65535
MTU_MIN = 1280          # RFC 8200 section 5

# Extension headers (section 4): next header, length in units of 8 bytes behind the first 8.
HOP_BY_HOP = 0
ROUTING = 43
FRAGMENT = 44
AUTHENTICATION = 51     # RFC 4302 section 2.2: length in units of 4 bytes, minus 2
NO_NEXT_HEADER = 59
DESTINATION = 60
MOBILITY = 135          # RFC 6275 section 6.1
HIP = 139               # RFC 7401 section 5.1
SHIM6 = 140             # RFC 5533 section 5
EXTENSION_NEXT = 0
EXTENSION_LENGTH = 1

# The Fragment header (section 4.5).
FRAGMENT_NEXT = 0
FRAGMENT_OFFSET = 2     # offset in bytes, always a multiple of 8, | reserved:2 | more:1
FRAGMENT_ID = 4
FRAGMENT_BYTES = 8
FRAGMENT_MORE = 1
FRAGMENT_OFFSET_MASK = 0xFFF8

ALL_NODES_HI = (0xFF02 << 48) - (1 << 64)        # ff02::1 as a signed number (RFC 4291 section 2.7.1)
ALL_NODES_LO = 1
SOLICITED_NODE_HI = ALL_NODES_HI                # ff02::1:ff00:0/104
_SOLICITED_NODE_LO = 0x0000_0001_FF00_0000


@inlined
def payload_length(mem, at):
    return be16(mem, at + PAYLOAD_LENGTH)


@inlined
def next_header(mem, at):
    return ld8(mem, at + NEXT_HEADER)


@inlined
def hop_limit(mem, at):
    return ld8(mem, at + HOP_LIMIT)


@inlined
def source_hi(mem, at):
    return be64(mem, at + SOURCE)


@inlined
def source_lo(mem, at):
    return be64(mem, at + SOURCE + 8)


@inlined
def target_hi(mem, at):
    return be64(mem, at + TARGET)


@inlined
def target_lo(mem, at):
    return be64(mem, at + TARGET + 8)


@inlined
def is_group(hi):
    """ff00::/8 (RFC 4291 section 2.7)."""
    return shr(hi, 56) == 0xFF


@inlined
def is_link_local(hi):
    """fe80::/10 (RFC 4291 section 2.5.6)."""
    return shr(hi, 54) == 0x3FA


@inlined
def is_unspecified(hi, lo):
    """:: (RFC 4291 section 2.5.2)."""
    return hi | lo == 0


@inlined
def is_loopback(hi, lo):
    """::1, never on a wire (RFC 4291 section 2.5.3)."""
    return hi == 0 and lo == 1


@inlined
def solicited_node_lo(lo):
    """Lower half of the solicited-node group of an address (RFC 4291 section 2.7.1); the upper
    one is SOLICITED_NODE_HI."""
    return _SOLICITED_NODE_LO | (lo & 0xFF_FFFF)


@inlined
def is_extension(kind):
    """Whether `kind` is an extension header that another header follows and whose length is
    known without understanding it. The Fragment header is not among them: its length field
    is reserved."""
    return kind in (HOP_BY_HOP, ROUTING, DESTINATION, AUTHENTICATION, MOBILITY, HIP, SHIM6)


@inlined
def extension_length(mem, at, kind):
    """Bytes of the extension header at `at`: at least 8."""
    units = ld8(mem, at + EXTENSION_LENGTH)
    if kind == AUTHENTICATION:
        return (units + 2) << 2
    return (units + 1) << 3


@inlined
def build(mem, at, length, proto, hops):
    """Writes the first 8 bytes; `length` is of what follows the header. Addresses are
    `put_addresses`'."""
    put_be32(mem, at + VERSION_CLASS_FLOW, 0x6000_0000)
    put_be16(mem, at + PAYLOAD_LENGTH, length)
    st8(mem, at + NEXT_HEADER, proto)
    st8(mem, at + HOP_LIMIT, hops)


@inlined
def put_addresses(mem, at, origin_hi, origin_lo, other_hi, other_lo):
    """Writes source and destination."""
    put_be64(mem, at + SOURCE, origin_hi)
    put_be64(mem, at + SOURCE + 8, origin_lo)
    put_be64(mem, at + TARGET, other_hi)
    put_be64(mem, at + TARGET + 8, other_lo)


@inlined
def pseudo(mem, at, proto, size):
    """Partial sum of the pseudo-header, addresses taken from the header at `at` (section 8.1)."""
    return ones_sum(mem, at + SOURCE, 32) + pseudo4(0, 0, proto, size)
