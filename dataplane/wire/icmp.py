"""ICMP (RFC 792, RFC 1122 section 3.2.2), ICMPv6 (RFC 4443), neighbour discovery (RFC 4861)."""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm.atomics import be32, ld8, put_be32, st8, st16
from dataplane.wire.checksum import finish, ones_sum

__all__ = [
    "BYTES", "PROTOCOL4", "PROTOCOL6", "build", "code", "find_link_option", "is_error4", "is_error6", "kind",
    "options_valid", "rest", "seal",
]

PROTOCOL4 = 1
PROTOCOL6 = 58
TYPE = 0
CODE = 1
CHECKSUM = 2
REST = 4                # echo: identifier and sequence number; errors: unused, or a pointer
BYTES = 8

# ICMP
ECHO_REPLY = 0
UNREACHABLE = 3
UNREACHABLE_PROTOCOL = 2
UNREACHABLE_PORT = 3
UNREACHABLE_TOO_BIG = 4     # fragmentation needed and DF set; RFC 1191 section 4: rest is the next hop's MTU
ECHO = 8

# ICMPv6
UNREACHABLE6 = 1
UNREACHABLE6_PORT = 4
TOO_BIG6 = 2                # RFC 4443 section 3.2: rest is the next hop's MTU
PARAMETER6 = 4
PARAMETER6_NEXT_HEADER = 1  # unrecognized Next Header type
ECHO6 = 128
ECHO_REPLY6 = 129
MLD_QUERY, MLD_REPORT, MLD_DONE, MLD2_REPORT = 130, 131, 132, 143   # RFC 2710, RFC 3810
ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT = 133, 134
SOLICITATION, ADVERTISEMENT = 135, 136
REDIRECT = 137

# Neighbour solicitation and advertisement (RFC 4861 sections 4.3 and 4.4)
ND_TARGET = 8
ND_BYTES = 24           # then options: type, length in units of 8 bytes
NA_SOLICITED = 0x4000_0000
NA_OVERRIDE = 0x2000_0000
OPTION_SOURCE_LINK, OPTION_TARGET_LINK = 1, 2   # RFC 2464 section 6: 6 bytes of MAC behind them
LINK_OPTION_BYTES = 8


@inlined
def kind(mem, at):
    """The message's type."""
    return ld8(mem, at + TYPE)


@inlined
def code(mem, at):
    return ld8(mem, at + CODE)


@inlined
def rest(mem, at):
    """The second four bytes of the header."""
    return be32(mem, at + REST)


@inlined
def is_error4(message):
    """Whether no error may be sent about it (RFC 1122 section 3.2.2): unreachable, source
    quench, redirect, time exceeded, parameter problem."""
    return message in (3, 4, 5, 11, 12)


@inlined
def is_error6(message):
    """Types below 128 are errors (RFC 4443 section 2.1). A redirect gets none either (2.4 e 2)."""
    return message < 128 or message == REDIRECT


@inlined
def build(mem, at, message, detail, remainder):
    """Writes the 8 bytes of a header; the body follows, then `seal`."""
    st8(mem, at + TYPE, message)
    st8(mem, at + CODE, detail)
    put_be32(mem, at + REST, remainder)


@inlined
def seal(mem, at, size, pseudo):
    """Writes the checksum over `size` bytes and `pseudo`: 0 for ICMP, the pseudo-header's sum
    for ICMPv6 (RFC 4443 section 2.3)."""
    st16(mem, at + CHECKSUM, 0)
    st16(mem, at + CHECKSUM, finish(pseudo + ones_sum(mem, at, size)))


@inlined
def options_valid(mem, at, size):
    """Whether the neighbour discovery options in `size` bytes each have a length above 0
    (RFC 4861 section 7.1.1) and end where the message ends."""
    while size >= 8:
        length = ld8(mem, at + 1) << 3
        if length == 0 or length > size:
            return False
        at += length
        size -= length
    return size == 0


@inlined
def find_link_option(mem, at, size, option):
    """Place of the MAC in the first such option of 8 bytes, or -1. The options are valid."""
    while size >= 8:
        length = ld8(mem, at + 1) << 3
        if ld8(mem, at) == option and length == LINK_OPTION_BYTES:
            return at + 2
        at += length
        size -= length
    return -1
