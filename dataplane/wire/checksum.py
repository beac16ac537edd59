"""The Internet checksum (RFC 1071, RFC 1624) of bytes in `mem`.

Called by everything that verifies or builds a header. A partial sum is a non-negative int64
whose value modulo 0xFFFF counts; sums of parts are added with `+`, and `finish` makes the 16
bits of it. An odd part must be the last one of its checksum.

All sums are of 16-bit words as this (little-endian) host loads them: the ones' complement sum
does not care about byte order (RFC 1071 section 2 B) as long as the result is stored the same
way. So a checksum is stored with `st16`, and a verified range gives `finish(...) == 0`.
"""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm.atomics import bswap16, copy, ld8, ld16, ld32, ld64, plus, remainder, shr, st64

__all__ = [
    "copy_sum", "finish", "good", "header4_sum", "ones_sum", "partial", "pseudo4", "pseudo4_at", "pseudo6", "replaced",
]

_LOW32 = 0xFFFF_FFFF


@inlined
def _halves(word):
    """Both 32-bit halves of a word, added."""
    return (word & _LOW32) + shr(word, 32)


@inlined
def _pair(mem, at):
    """Both 32-bit halves of the 8 bytes at `at`, added."""
    return _halves(ld64(mem, at))


@inlined
def _tail_sum(mem, at, size):
    """Partial sum of less than 64 bytes, without a loop: headers are this short, and the
    entry and exit of the vector loop would cost several times the sum."""
    words = 0
    if size & 32:
        words = plus(plus(ld64(mem, at), ld64(mem, at + 8)), plus(ld64(mem, at + 16), ld64(mem, at + 24)))
        at += 32
    if size & 16:
        words = plus(words, plus(ld64(mem, at), ld64(mem, at + 8)))
        at += 16
    if size & 8:
        words = plus(words, ld64(mem, at))
        at += 8
    total = _halves(words)
    if size & 4:
        total += ld32(mem, at)
        at += 4
    if size & 2:
        total += ld16(mem, at)
        at += 2
    if size & 1:
        total += ld8(mem, at)
    return total


@inlined
def ones_sum(mem, at, size):
    """Partial sum of the `size` bytes at `at`; an odd last byte counts as if a zero followed.

    Summing 32 bits at a time is allowed since 2**16 = 1 modulo 0xFFFF (RFC 1071 section 2 C),
    and in 64 bits no carry is lost below 16 GB. LLVM makes vector adds of the loop.
    """
    total = _tail_sum(mem, at + (size & ~63), size & 63)
    if size < 64:
        return total
    for i in range((size >> 6) << 3):
        total += _pair(mem, at + 8 * i)
    return total


@inlined
def header4_sum(mem, at):
    """Partial sum of an IPv4 header without options: 20 bytes, and no branch."""
    return _halves(plus(ld64(mem, at), ld64(mem, at + 8))) + ld32(mem, at + 16)


@inlined
def copy_sum(mem, target, source, size):
    """Copies `size` bytes to `target` and returns the partial sum of what it copied: each word is read once,
    so that the sum is right even if somebody changes the source meanwhile. A third faster than copy and sum
    one after the other, since the copy is still in registers. The ranges must not overlap."""
    total = 0
    for i in range((size >> 6) << 3):
        word = ld64(mem, source + 8 * i)
        st64(mem, target + 8 * i, word)
        total += (word & _LOW32) + shr(word, 32)
    done, rest = size & ~63, size & 63
    copy(mem, target + done, source + done, rest)
    return total + _tail_sum(mem, target + done, rest)


@inlined
def _fold(total):
    """A non-negative sum to 16 bits, carries added back in (RFC 1071 section 4.1)."""
    total = (total & _LOW32) + (total >> 32)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


@inlined
def finish(total):
    """The checksum of a sum: 16 bits, to be stored with `st16`. 0 if a range was good."""
    return _fold(total) ^ 0xFFFF


@inlined
def good(total):
    """Whether a sum that includes the checksum says that nothing is damaged: finish(total) == 0, in one
    multiplication. Of a range that is not all zeros (RFC 1071 section 1: then the sum would be 0 as well)."""
    return remainder(total, 0xFFFF) == 0


@inlined
def partial(pseudo):
    """What stands in the checksum's place when a device is to complete it: the pseudo-header's sum, 16 bits, not
    complemented; to be stored with `st16`."""
    return _fold(pseudo)


@inlined
def pseudo4(source, target, protocol, length):
    """Partial sum of the IPv4 pseudo-header (RFC 768; RFC 9293 section 3.1)."""
    return bswap16(_fold(source + target + protocol + length))


@inlined
def pseudo4_at(mem, header, protocol, length_at):
    """The same from the IPv4 header at `header`, with the length that stands at `length_at`."""
    return _pair(mem, header + 12) + (protocol << 8) + ld16(mem, length_at)


@inlined
def pseudo6(source_hi, source_lo, target_hi, target_lo, protocol, length):
    """Partial sum of the IPv6 pseudo-header (RFC 8200 section 8.1)."""
    source = (source_hi & _LOW32) + shr(source_hi, 32) + (source_lo & _LOW32) + shr(source_lo, 32)
    target = (target_hi & _LOW32) + shr(target_hi, 32) + (target_lo & _LOW32) + shr(target_lo, 32)
    return bswap16(_fold(source + target + protocol + length))


@inlined
def replaced(checksum, old, new):
    """`checksum` after one 16-bit word changed: RFC 1624 equation 3. All as loaded by `ld16`."""
    return finish((checksum ^ 0xFFFF) + (old ^ 0xFFFF) + new)
