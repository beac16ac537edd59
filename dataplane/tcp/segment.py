"""Segments: from the wire to S_ words, and from O_ words to the wire (RFC 9293 section 3.1).

Called by tcp/input for every record of a lane, and by inet/tcp_input and inet/tcp_transmit. The checksum and the
ports belong to inet: they are verified before we see a segment, and filled in behind us.

Options are taken where they mean something: maximum segment size, window scale and "SACK permitted" only on a
segment with SYN (RFC 9293 section 3.7.1, RFC 7323 section 2.2, RFC 2018 section 2). Unknown ones, and known ones of
a wrong length, are skipped by their length (MUST-6). An option whose length cannot be (below 2, or over the end)
ends the list: what came before it counts, the segment too (MUST-7).
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import be16, be32, ld8, ld64, put_be16, put_be32, st8, st16, st32, st64

__all__ = ["HEADER", "HEADER_MAX", "SACKS_MAX", "SHIFT_MAX", "segment_build", "segment_header_bytes", "segment_parse"]

HEADER = 20
HEADER_MAX = 60
SACKS_MAX = 4           # what 40 bytes of options have room for
SHIFT_MAX = 14          # RFC 7323 section 2.3

_SEQUENCE, _ACKNOWLEDGMENT, _OFFSET, _FLAGS, _WINDOW, _CHECKSUM = 4, 8, 12, 13, 14, 16
_END, _NOP, _MSS, _SCALE, _SACK_OK, _SACK, _TIMESTAMPS = 0, 1, 2, 3, 4, 5, 8
_NOP_NOP = 0x0101


# -- received ----------------------------------------------------------------------------------------------


@inlined
def _parse_sacks(mem, at, size, s):
    """SACK option of `size` bytes (RFC 2018 section 3)."""
    for i in range((size - 2) // 8):
        count = ld64(mem, s + T.S_SACK_COUNT)
        if count < SACKS_MAX:
            st64(mem, s + T.S_SACKS + 16 * count, be32(mem, at + 2 + 8 * i))
            st64(mem, s + T.S_SACKS + 16 * count + 8, be32(mem, at + 6 + 8 * i))
            st64(mem, s + T.S_SACK_COUNT, count + 1)


@inlined
def _parse_option(mem, at, size, s, syn):
    """One option with a length; returns its SO_ bit, or 0."""
    kind = ld8(mem, at)
    if kind == _TIMESTAMPS and size == 10:
        st64(mem, s + T.S_TSVAL, be32(mem, at + 2))
        st64(mem, s + T.S_TSECR, be32(mem, at + 6))
        return T.SO_TIMESTAMPS
    if kind == _SACK and size >= 10 and size % 8 == 2:
        _parse_sacks(mem, at, size, s)
        return T.SO_SACK
    if not syn:
        return 0
    if kind == _MSS and size == 4:
        st64(mem, s + T.S_MSS, be16(mem, at + 2))
        return T.SO_MSS
    if kind == _SCALE and size == 3:
        st64(mem, s + T.S_SHIFT, min(ld8(mem, at + 2), SHIFT_MAX))
        return T.SO_SHIFT
    return T.SO_SACK_OK if kind == _SACK_OK and size == 2 else 0


@shared
def _parse_options(mem, at, end, s, syn):
    """All options in [at, end); returns their SO_ bits."""
    found = 0
    while at < end:
        kind = ld8(mem, at)
        if kind == _END:
            break
        if kind == _NOP:
            at += 1
            continue
        if at + 2 > end:
            break
        size = ld8(mem, at + 1)
        if size < 2 or at + size > end:
            break
        found |= _parse_option(mem, at, size, s, syn)
        at += size
    return found


@shared
def segment_parse(mem, at, length, s):
    """Reads the segment of `length` bytes at `at` into the S_ words at `s` (all but S_TIME): 1, or 0 if its header
    does not fit into it. Words of options that it does not have are 0."""
    if length < HEADER:
        return 0
    header = (ld8(mem, at + _OFFSET) >> 4) * 4
    if header < HEADER or header > length:
        return 0
    flags = ld8(mem, at + _FLAGS)
    st64(mem, s + T.S_SEQ, be32(mem, at + _SEQUENCE))
    st64(mem, s + T.S_ACK, be32(mem, at + _ACKNOWLEDGMENT))
    st64(mem, s + T.S_FLAGS, flags)
    st64(mem, s + T.S_WINDOW, be16(mem, at + _WINDOW))
    st64(mem, s + T.S_DATA, at + header)
    st64(mem, s + T.S_LENGTH, length - header)
    for word in range(T.S_MSS, T.S_SACKS, 8):
        st64(mem, s + word, 0)
    found = 0
    if header == 32 and be32(mem, at + HEADER) == (_NOP_NOP << 16 | _TIMESTAMPS << 8 | 10):
        # What nearly every segment of a transfer has (RFC 7323 appendix A).
        st64(mem, s + T.S_TSVAL, be32(mem, at + HEADER + 4))
        st64(mem, s + T.S_TSECR, be32(mem, at + HEADER + 8))
        found = T.SO_TIMESTAMPS
    elif header > HEADER:
        found = _parse_options(mem, at + HEADER, at + header, s, flags & T.SYN)
    st64(mem, s + T.S_OPTIONS, found)
    return 1


# -- to be sent --------------------------------------------------------------------------------------------


@inlined
def _other_bytes(options):
    """Bytes of all options but SACK. "SACK permitted" takes the place of the timestamps' padding."""
    size = 0
    if options & T.SO_MSS:
        size += 4
    if options & T.SO_TIMESTAMPS:
        size += 12
    elif options & T.SO_SACK_OK:
        size += 4
    if options & T.SO_SHIFT:
        size += 4
    return size


@inlined
def _sacks(mem, o, options, others):
    """SACK blocks that are sent: as many of O_SACK_COUNT as there is room for."""
    if not options & T.SO_SACK:
        return 0
    return max(0, min(ld64(mem, o + T.O_SACK_COUNT), (HEADER_MAX - HEADER - others - 4) // 8))


@shared
def segment_header_bytes(mem, o):
    """Bytes of the header of the O_ record at `o`, options and all: a multiple of 4, at most HEADER_MAX.

    A record in memory that a consumer can write must have been copied before: otherwise this and
    `segment_build` could see different ones. Its values may be anything.
    """
    options = ld64(mem, o + T.O_OPTIONS)
    others = _other_bytes(options)
    blocks = _sacks(mem, o, options, others)
    return HEADER + others + (4 + 8 * blocks if blocks else 0)


@inlined
def _build_fixed(mem, o, at, options):
    """The options whose length does not vary; returns the place behind them."""
    if options & T.SO_MSS:
        put_be32(mem, at, _MSS << 24 | 4 << 16 | (ld64(mem, o + T.O_MSS) & 0xFFFF))
        at += 4
    if options & T.SO_TIMESTAMPS:
        # Padded in front, so that the numbers are aligned (RFC 7323 appendix A).
        put_be16(mem, at, _SACK_OK << 8 | 2 if options & T.SO_SACK_OK else _NOP_NOP)
        put_be16(mem, at + 2, _TIMESTAMPS << 8 | 10)
        put_be32(mem, at + 4, ld64(mem, o + T.O_TSVAL))
        put_be32(mem, at + 8, ld64(mem, o + T.O_TSECR))
        at += 12
    elif options & T.SO_SACK_OK:
        put_be32(mem, at, _NOP_NOP << 16 | _SACK_OK << 8 | 2)
        at += 4
    if options & T.SO_SHIFT:
        shift = max(0, min(ld64(mem, o + T.O_SHIFT), SHIFT_MAX))
        put_be32(mem, at, _NOP << 24 | _SCALE << 16 | 3 << 8 | shift)
        at += 4
    return at


@inlined
def _build_sacks(mem, o, at, blocks):
    put_be32(mem, at, _NOP_NOP << 16 | _SACK << 8 | (2 + 8 * blocks))
    for i in range(blocks):
        put_be32(mem, at + 4 + 8 * i, ld64(mem, o + T.O_SACKS + 16 * i))
        put_be32(mem, at + 8 + 8 * i, ld64(mem, o + T.O_SACKS + 16 * i + 8))
    return at + 4 + 8 * blocks


@shared
def segment_build(mem, o, at, seq, flags):
    """Writes the header of the O_ record at `o` to `at`, with `seq` and `flags` in place of its own (a record may
    become several segments). Ports, checksum and urgent pointer are 0. Returns its bytes, as
    segment_header_bytes."""
    options = ld64(mem, o + T.O_OPTIONS)
    end = _build_fixed(mem, o, at + HEADER, options)
    blocks = _sacks(mem, o, options, end - at - HEADER)
    if blocks:
        end = _build_sacks(mem, o, end, blocks)
    st32(mem, at, 0)
    put_be32(mem, at + _SEQUENCE, seq)
    put_be32(mem, at + _ACKNOWLEDGMENT, ld64(mem, o + T.O_ACK) if flags & T.ACK else 0)
    st8(mem, at + _OFFSET, (end - at) // 4 << 4)
    st8(mem, at + _FLAGS, flags)
    put_be16(mem, at + _WINDOW, max(0, min(ld64(mem, o + T.O_WINDOW), 0xFFFF)))
    st16(mem, at + _CHECKSUM, 0)
    st16(mem, at + _CHECKSUM + 2, 0)
    return end - at
