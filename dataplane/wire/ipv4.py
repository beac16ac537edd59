"""The IPv4 header (RFC 791 section 3.1) and the classes of addresses (RFC 1122, RFC 1112)."""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm.atomics import be16, be32, ld8, put_be16, put_be32, st8, st16
from dataplane.wire.checksum import finish, ones_sum, pseudo4

__all__ = [
    "BROADCAST", "BYTES", "DONT_FRAGMENT", "HEADER_MAX", "MORE_FRAGMENTS", "OFFSET_MASK", "PACKET_MAX",
    "build", "flags_and_offset", "header_length", "identification", "is_group", "is_loopback", "protocol",
    "pseudo", "seal", "source", "target", "total_length", "ttl", "version",
]

VERSION_IHL = 0
TOS = 1
LENGTH = 2              # of header and data
IDENTIFICATION = 4
FRAGMENT = 6            # flags:3 | offset in units of 8 bytes:13
TTL = 8
PROTOCOL = 9
CHECKSUM = 10
SOURCE = 12
TARGET = 16
BYTES = 20              # without options
HEADER_MAX = 60
PACKET_MAX = 65535

DONT_FRAGMENT = 0x4000
MORE_FRAGMENTS = 0x2000
OFFSET_MASK = 0x1FFF

BROADCAST = 0xFFFF_FFFF


@inlined
def version(mem, at):
    """4 here, 6 for IPv6: the first four bits of both."""
    return ld8(mem, at) >> 4


@inlined
def header_length(mem, at):
    """Bytes of the header with options; less than 20 is an error that the caller checks."""
    return (ld8(mem, at) & 15) << 2


@inlined
def total_length(mem, at):
    return be16(mem, at + LENGTH)


@inlined
def identification(mem, at):
    return be16(mem, at + IDENTIFICATION)


@inlined
def flags_and_offset(mem, at):
    """DONT_FRAGMENT | MORE_FRAGMENTS | offset in units of 8 bytes."""
    return be16(mem, at + FRAGMENT)


@inlined
def ttl(mem, at):
    return ld8(mem, at + TTL)


@inlined
def protocol(mem, at):
    return ld8(mem, at + PROTOCOL)


@inlined
def source(mem, at):
    return be32(mem, at + SOURCE)


@inlined
def target(mem, at):
    return be32(mem, at + TARGET)


@inlined
def is_group(address):
    """224.0.0.0/4 (RFC 1112 section 4)."""
    return address >> 28 == 14


@inlined
def is_loopback(address):
    """127.0.0.0/8, never on a wire (RFC 1122 section 3.2.1.3 g)."""
    return address >> 24 == 127


@inlined
def build(mem, at, length, proto, origin, destination):
    """Writes 20 bytes: not a fragment, may be fragmented, TTL 64 (RFC 1700), identification 0.

    The caller changes what it wants otherwise, then calls `seal`.
    """
    st8(mem, at + VERSION_IHL, 0x45)
    st8(mem, at + TOS, 0)
    put_be16(mem, at + LENGTH, length)
    put_be32(mem, at + IDENTIFICATION, 0)
    st8(mem, at + TTL, 64)
    st8(mem, at + PROTOCOL, proto)
    put_be32(mem, at + SOURCE, origin)
    put_be32(mem, at + TARGET, destination)


@inlined
def seal(mem, at):
    """Writes the header checksum, which covers the options too."""
    st16(mem, at + CHECKSUM, 0)
    st16(mem, at + CHECKSUM, finish(ones_sum(mem, at, header_length(mem, at))))


@inlined
def pseudo(mem, at, proto, size):
    """Partial sum of the pseudo-header, addresses taken from the header at `at` (RFC 768)."""
    return ones_sum(mem, at + SOURCE, 8) + pseudo4(0, 0, proto, size)
