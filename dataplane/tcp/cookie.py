"""SYN cookies: the facts of a handshake in the numbers that its last segment brings back.

Called by inet/tcp_listen for every SYN that is answered and for every ACK that no connection and no entry of the
SYN cache (syncache.py) explains. The initial sequence number of *every* SYN-ACK is a cookie, so that it never
matters whether the entry is still there, or which worker gets the ACK.

    ISS     MAC:29 | class of the peer's MSS, masked:3
    TSval   our clock, its last 6 bits replaced by: reserved:1 | SACK permitted:1 | peer's window shift:4

The hash is SipHash-2-4 over both addresses, both ports, the peer's initial sequence number and a counter that
goes on every COUNTER_NS. Three bits of it mask the class, and its upper half is what is added to the clock in
TSval, so that neither tells anything. A cookie is good in the counter's period in which it was made and in the
next one. Without timestamps a connection that is opened by a cookie alone has neither window scaling nor SACK.

What it is worth. For given addresses, ports and peer's number, 16 of 2^32 values are good at any time (2 periods, 8
classes): a sender that cannot see our packets opens one connection in 2^27 guesses on average (an ACK's number is
taken for the peer's initial one and for the next), as many as it can from one whose SYN it sent under a false
address. The keys come from the table's secrets through the same one-way
function: whoever should find out the secrets of the lookup (a fast hash, not a cryptographic one) from timing has
the keys, whoever finds a key has not the secrets. They live as long as the table. As with all cookies, numbers of
successive connections between the same two ends are unrelated instead of growing (RFC 6528 section 3 wants
growth for peers in TIME-WAIT; RFC 7323 timestamps serve these).

Floor 2, sans I/O: `f` is the place of handshake facts (syncache.E_...), `keys` of the two words of `cookie_keys`.
The values in TSval follow Linux (net/ipv4/syncookies.c), since Linux peers are what it was tried with.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld32, ld64, shr, st32, st64
from dataplane.tcp.handshake import (
    E_FLAGS,
    E_IRS,
    E_ISS,
    E_MSS,
    E_PORTS,
    E_SHIFT,
    E_SOURCE_HI,
    E_SOURCE_LO,
    E_TARGET_HI,
    E_TARGET_LO,
    E_TS_OFFSET,
    EF_SACK,
    EF_SCALE,
    EF_TIMESTAMPS,
)

__all__ = [
    "COUNTER_NS", "CLASSES", "KEYS_BYTES", "STAMP_MASK", "class_mss", "cookie_check", "cookie_keys", "cookie_make",
    "mss_class", "siphash", "stamp", "stamp_facts",
]

COUNTER_NS = 64_000_000_000
KEYS_BYTES = 16
CLASSES = (88, 536, 1220, 1360, 1400, 1440, 1460, 8960)
"""What a cookie can say about the peer's MSS; the largest that is not above it counts. 88: the least that we
believe; 536 and 1220: the defaults (RFC 9293 section 3.7.1, RFC 8200 section 5); then tunnels, PPPoE, IPv6 and
IPv4 over Ethernet, jumbo frames."""
STAMP_MASK = 63
_NO_SHIFT = 15
_STAMP_SACK = 16
_WRAP = 0xFFFF_FFFF

_I0, _I1, _I2, _I3 = 0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573


# -- SipHash-2-4 (Aumasson and Bernstein 2012) ---------------------------------------------------------------------


@inlined
def _rotate(value, bits):
    return (value << bits) | shr(value, 64 - bits)


@inlined
def _round(a, b, c, d):
    a += b
    c += d
    b = _rotate(b, 13) ^ a
    d = _rotate(d, 16) ^ c
    a = _rotate(a, 32)
    c += b
    a += d
    b = _rotate(b, 17) ^ c
    d = _rotate(d, 21) ^ a
    c = _rotate(c, 32)
    return a, b, c, d


@inlined
def _absorb(a, b, c, d, word):
    d ^= word
    a, b, c, d = _round(a, b, c, d)
    a, b, c, d = _round(a, b, c, d)
    return a ^ word, b, c, d


@inlined
def _result(a, b, c, d):
    c ^= 0xFF
    for _ in range(4):
        a, b, c, d = _round(a, b, c, d)
    return a ^ b ^ c ^ d


@shared
def siphash(mem, keys, first, last):
    """SipHash-2-4 of 15 bytes: `first`, and `last` with 7 bytes."""
    k0, k1 = ld64(mem, keys), ld64(mem, keys + 8)
    a, b, c, d = _I0 ^ k0, _I1 ^ k1, _I2 ^ k0, _I3 ^ k1
    a, b, c, d = _absorb(a, b, c, d, first)
    a, b, c, d = _absorb(a, b, c, d, last | 15 << 56)
    return _result(a, b, c, d)


@shared
def _hash(mem, keys, f, count):
    """SipHash-2-4 of the handshake at `f`: addresses (8 bytes for IPv4, 32 for IPv6), then ports and the peer's
    number, then 6 bytes of counter and 1 of family."""
    k0, k1 = ld64(mem, keys), ld64(mem, keys + 8)
    a, b, c, d = _I0 ^ k0, _I1 ^ k1, _I2 ^ k0, _I3 ^ k1
    ports = ld64(mem, f + E_PORTS)
    family = ports >> 32
    length = 23
    if family == 4:
        a, b, c, d = _absorb(a, b, c, d, ld64(mem, f + E_SOURCE_LO) << 32 | ld64(mem, f + E_TARGET_LO))
    else:
        length = 47
        a, b, c, d = _absorb(a, b, c, d, ld64(mem, f + E_SOURCE_HI))
        a, b, c, d = _absorb(a, b, c, d, ld64(mem, f + E_SOURCE_LO))
        a, b, c, d = _absorb(a, b, c, d, ld64(mem, f + E_TARGET_HI))
        a, b, c, d = _absorb(a, b, c, d, ld64(mem, f + E_TARGET_LO))
    a, b, c, d = _absorb(a, b, c, d, (ports & _WRAP) << 32 | ld32(mem, f + E_IRS))
    a, b, c, d = _absorb(a, b, c, d, length << 56 | (count & 0xFFFF_FFFF_FFFF) << 8 | family)
    return _result(a, b, c, d)


@shared
def cookie_keys(mem, table, keys):
    """Makes the cookies' two keys of the table's secrets, at `keys`. All workers make the same."""
    secrets = table + L.T_SECRET0
    st64(mem, keys, siphash(mem, secrets, 0x636F6F6B6965, 0))          # "cookie"
    st64(mem, keys + 8, siphash(mem, secrets, 0x636F6F6B6965, 1))


# -- the peer's MSS -------------------------------------------------------------------------------------------


@inlined
def mss_class(mss):
    """Number of the largest class that is not above `mss`."""
    found = 0
    for number in range(1, 8):
        if mss >= CLASSES[number]:
            found = number
    return found


@inlined
def class_mss(number):
    """Bytes that the class stands for."""
    return CLASSES[number & 7]


# -- the cookie ----------------------------------------------------------------------------------------------


@inlined
def cookie_make(mem, keys, f, now):
    """Fills E_ISS and E_TS_OFFSET of the handshake at `f`. `now`: CLOCK_MONOTONIC ns."""
    value = _hash(mem, keys, f, now // COUNTER_NS)
    number = mss_class(ld32(mem, f + E_MSS))
    st32(mem, f + E_ISS, (value ^ number) & _WRAP)
    st32(mem, f + E_TS_OFFSET, shr(value, 32))


@shared
def cookie_check(mem, keys, f, number, now):
    """1 if the 32-bit `number` is a cookie of ours for the handshake at `f`, of which addresses, ports and E_IRS
    are known: E_ISS, E_TS_OFFSET and E_MSS are filled then. Else 0."""
    count = now // COUNTER_NS
    for ago in range(2):
        value = _hash(mem, keys, f, count - ago)
        if (value ^ number) & _WRAP & ~7 == 0:
            st32(mem, f + E_ISS, number)
            st32(mem, f + E_TS_OFFSET, shr(value, 32))
            st32(mem, f + E_MSS, class_mss(value ^ number))
            return 1
    return 0


# -- the timestamp --------------------------------------------------------------------------------------------


@inlined
def stamp(mem, f, now):
    """TSval of a SYN-ACK at `now` (ns): not later than the clock, so that all that follow are not earlier; its last
    bits tell what the peer's SYN offered."""
    clock = (now // 1_000_000 + ld32(mem, f + E_TS_OFFSET)) & _WRAP
    flags = ld64(mem, f + E_FLAGS)
    bits = ld64(mem, f + E_SHIFT) if flags & EF_SCALE else _NO_SHIFT
    if flags & EF_SACK:
        bits |= _STAMP_SACK
    value = (clock & ~STAMP_MASK) | bits
    return (value - (STAMP_MASK + 1) if value > clock else value) & _WRAP


@inlined
def stamp_facts(mem, f, echoed):
    """Fills E_FLAGS and E_SHIFT from the TSval of our SYN-ACK that an ACK echoes."""
    shift = echoed & 15
    flags = EF_TIMESTAMPS
    if echoed & _STAMP_SACK:
        flags |= EF_SACK
    if shift != _NO_SHIFT:
        flags |= EF_SCALE
    st64(mem, f + E_FLAGS, flags)
    st64(mem, f + E_SHIFT, shift if shift != _NO_SHIFT else 0)
