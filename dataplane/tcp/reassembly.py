"""What arrives goes into the receive ring at once, in order or not (RFC 9293 section 3.10.7.4), and becomes SACK.

Called by tcp/input with data that is trimmed to the window, and by tcp/output for every ACK. Byte p of the stream
stands at p & mask in the ring, so that a segment that comes early lies where it belongs and is never moved; T_RA
lists which ranges behind RCV_NXT are there already. Only data that are in order, while the application has read all
there was and waits with a buffer of its own (X_DIRECT), go there at once, past the ring, and count as read.

Invariants: T_RA holds T_RA_COUNT ranges (from, to), ascending, with a gap before each; all lie in
(RCV_NXT, RCV_RIGHT]. A byte that is there is never written again: the application may not have seen two
versions of it, and whether an attacker's copy or the real one wins must not depend on timing. When there are RA_MAX
ranges, a segment that would need one more is dropped; it was never acknowledged, so it comes again.

The control block may have been written by a hostile consumer, and service clamps only single words: whatever the
ranges are, nothing but the receive ring and T_RA is written here.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import copy, ld64, st64
from dataplane.tcp.sequence import wire

__all__ = ["reassembly_duplicate", "reassembly_insert", "reassembly_sacks"]


@inlined
def _range(x, index):
    return x + T.X_TCB + T.T_RA + 16 * index


@inlined
def _count(mem, x):
    return max(0, min(ld64(mem, x + T.X_TCB + T.T_RA_COUNT), T.RA_MAX))


@inlined
def _covers(mem, entry, start, end):
    return ld64(mem, entry) <= start and end <= ld64(mem, entry + 8)


@inlined
def _put(mem, x, place, start, end):
    """Copies the bytes of positions [start, end) from `place` into the ring, in two pieces at the wrap."""
    size = end - start
    if size <= 0:
        return
    ring = ld64(mem, x + T.X_RCV)
    mask = ld64(mem, x + T.X_RCV_MASK)
    at = start & mask
    first = min(size, mask + 1 - at)
    copy(mem, ring + at, place, first)
    if first < size:
        copy(mem, ring, place + first, size - first)


@inlined
def _take(mem, x, place, start, end):
    """The common case: [start, end) is next, and nothing waits behind it. To the application's own buffer if it
    is waiting with one, what does not fit there into the ring."""
    room = ld64(mem, x + T.X_DIRECT_LEFT)
    if room > 0 and ld64(mem, x + T.X_READ) == start:
        size = min(room, end - start)
        buffer = ld64(mem, x + T.X_DIRECT)
        copy(mem, buffer, place, size)
        st64(mem, x + T.X_DIRECT, buffer + size)
        st64(mem, x + T.X_DIRECT_LEFT, room - size)
        st64(mem, x + T.X_READ, start + size)
        place += size
        start += size
    _put(mem, x, place, start, end)


@inlined
def _put_missing(mem, x, place, start, end, first, last):
    """Copies what of [start, end) is in none of the ranges first ... last - 1."""
    at = start
    for index in range(first, last):
        lower = min(ld64(mem, _range(x, index)), end)
        if lower > at:
            _put(mem, x, place + at - start, at, lower)
        at = max(at, min(ld64(mem, _range(x, index) + 8), end))
    _put(mem, x, place + at - start, at, end)


@inlined
def _move(mem, x, source, target, count):
    """Moves the ranges from `source` on to index `target`, which makes `count` of them `count + target - source`."""
    t = x + T.X_TCB
    if target > source:
        for index in range(count - 1, source - 1, -1):
            st64(mem, _range(x, index + target - source), ld64(mem, _range(x, index)))
            st64(mem, _range(x, index + target - source) + 8, ld64(mem, _range(x, index) + 8))
    elif target < source:
        for index in range(source, count):
            st64(mem, _range(x, index + target - source), ld64(mem, _range(x, index)))
            st64(mem, _range(x, index + target - source) + 8, ld64(mem, _range(x, index) + 8))
    st64(mem, t + T.T_RA_COUNT, count + target - source)


@shared
def _insert_among(mem, x, place, start, end):
    """The general case: there are ranges, or there is a gap before `start`."""
    t = x + T.X_TCB
    count = _count(mem, x)
    first = 0
    while first < count and ld64(mem, _range(x, first) + 8) < start:
        first += 1
    last = first        # the ranges first ... last - 1 overlap [start, end), or touch it
    lower, upper = start, end
    while last < count and ld64(mem, _range(x, last)) <= end:
        lower = min(lower, ld64(mem, _range(x, last)))
        upper = max(upper, ld64(mem, _range(x, last) + 8))
        last += 1
    if start == ld64(mem, t + T.T_RCV_NXT):
        _put_missing(mem, x, place, start, end, first, last)
        _move(mem, x, last, 0, count)
        st64(mem, t + T.T_RCV_NXT, upper)
        return 1
    if last == first + 1 and _covers(mem, _range(x, first), start, end):
        st64(mem, t + T.T_RA_LATEST, lower)
        reassembly_duplicate(mem, x, start, end)
        return -1
    if first == last and count == T.RA_MAX:
        return -1
    _put_missing(mem, x, place, start, end, first, last)
    _move(mem, x, last, first + 1, count)
    st64(mem, _range(x, first), lower)
    st64(mem, _range(x, first) + 8, upper)
    st64(mem, t + T.T_RA_LATEST, lower)
    return 0


@shared
def reassembly_insert(mem, x, data_place, from_, to_):
    """Takes the bytes of positions [from_, to_), which lie at `data_place`, into the receive ring.

    1: RCV_NXT went on, over them and over what was waiting behind them. 0: kept, out of order. -1: nothing new in
    them, or no range left (dropped). What lies outside of [RCV_NXT, RCV_RIGHT) is passed over.
    """
    t = x + T.X_TCB
    nxt = ld64(mem, t + T.T_RCV_NXT)
    start = max(from_, nxt)
    end = min(to_, min(ld64(mem, t + T.T_RCV_RIGHT), nxt + ld64(mem, x + T.X_RCV_MASK) + 1))
    if start >= end:
        return -1
    place = data_place + start - from_
    if start == nxt and ld64(mem, t + T.T_RA_COUNT) == 0:
        _take(mem, x, place, start, end)
        st64(mem, t + T.T_RCV_NXT, end)
        return 1
    return _insert_among(mem, x, place, start, end)


# -- what the sender is told -------------------------------------------------------------------------------


@inlined
def reassembly_duplicate(mem, x, from_, to_):
    """Notes that [from_, to_) came once more: the next ACK says so (D-SACK, RFC 2883), from which the sender
    learns that it had sent it again in vain. To be called for what was trimmed because it lies before RCV_NXT."""
    st64(mem, x + T.X_TCB + T.T_DSACK_FROM, from_)
    st64(mem, x + T.X_TCB + T.T_DSACK_TO, to_)


@inlined
def _block(mem, x, o, number, start, end):
    initial = ld64(mem, x + T.X_TCB + T.T_IRS)
    st64(mem, o + T.O_SACKS + 16 * number, wire(initial, start))
    st64(mem, o + T.O_SACKS + 16 * number + 8, wire(initial, end))
    return number + 1


@shared
def reassembly_sacks(mem, x, o):
    """Fills O_SACKS, O_SACK_COUNT and the SO_SACK of O_OPTIONS of the segment `o`; O_OPTIONS says already whether it
    has timestamps, which leave room for one block less.

    First a duplicate (RFC 2883 section 4), told once. Then the range that the last segment went to, and the others from
    the highest down: without reordering that is the order in which they were told before (RFC 2018 section 4), so
    that each is repeated in a few ACKs, without a list of what was told.
    """
    t = x + T.X_TCB
    options = ld64(mem, o + T.O_OPTIONS)
    most = 3 if options & T.SO_TIMESTAMPS else 4
    blocks = 0
    if ld64(mem, t + T.T_DSACK_TO) > ld64(mem, t + T.T_DSACK_FROM):
        blocks = _block(mem, x, o, blocks, ld64(mem, t + T.T_DSACK_FROM), ld64(mem, t + T.T_DSACK_TO))
        reassembly_duplicate(mem, x, 0, 0)
    latest = ld64(mem, t + T.T_RA_LATEST)
    count = _count(mem, x)
    for index in range(count):
        if ld64(mem, _range(x, index)) == latest and blocks < most:
            blocks = _block(mem, x, o, blocks, latest, ld64(mem, _range(x, index) + 8))
    for index in range(count - 1, -1, -1):
        start = ld64(mem, _range(x, index))
        if start != latest and blocks < most:
            blocks = _block(mem, x, o, blocks, start, ld64(mem, _range(x, index) + 8))
    st64(mem, o + T.O_SACK_COUNT, blocks)
    st64(mem, o + T.O_OPTIONS, options | T.SO_SACK if blocks else options & ~T.SO_SACK)
