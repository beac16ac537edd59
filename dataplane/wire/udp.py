"""UDP (RFC 768; over IPv6 RFC 8200 section 8.1)."""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm.atomics import be16, be32, put_be16, st16
from dataplane.wire.checksum import finish, ones_sum

__all__ = [
    "BYTES", "CHECKSUM", "PAYLOAD4_MAX", "PAYLOAD6_MAX", "PROTOCOL", "build", "checksum", "destination_port",
    "length", "ports", "seal", "source_port",
]

PROTOCOL = 17
SOURCE_PORT = 0
DESTINATION_PORT = 2
LENGTH = 4              # of header and data
CHECKSUM = 6            # 0: none was computed, allowed over IPv4 only
BYTES = 8
PAYLOAD4_MAX = 65535 - 20 - 8
PAYLOAD6_MAX = 65535 - 8


@inlined
def ports(mem, at):
    """source:16 | destination:16, the destination in the lower half."""
    return be32(mem, at)


@inlined
def source_port(mem, at):
    return be16(mem, at + SOURCE_PORT)


@inlined
def destination_port(mem, at):
    return be16(mem, at + DESTINATION_PORT)


@inlined
def length(mem, at):
    return be16(mem, at + LENGTH)


@inlined
def checksum(mem, at):
    return be16(mem, at + CHECKSUM)


@inlined
def build(mem, at, origin, destination, size):
    """Writes ports and length; `size` is of header and data. The data follow, then `seal`."""
    put_be16(mem, at + SOURCE_PORT, origin)
    put_be16(mem, at + DESTINATION_PORT, destination)
    put_be16(mem, at + LENGTH, size)


@inlined
def seal(mem, at, size, pseudo):
    """Writes the checksum over `size` bytes and the pseudo-header's sum. One that comes out as
    0 is sent as 0xFFFF, since 0 says that there is none (RFC 768)."""
    st16(mem, at + CHECKSUM, 0)
    value = finish(pseudo + ones_sum(mem, at, size))
    st16(mem, at + CHECKSUM, value if value != 0 else 0xFFFF)
