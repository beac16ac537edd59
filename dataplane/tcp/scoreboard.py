"""The scoreboard: what the peer has SACKed above SND_UNA (RFC 2018, RFC 6675 section 3).

Called by recovery.py; `sack_update` by input for every acceptable ACK, before `ack_process`.
Writes T_SB_COUNT, T_SB and T_DSACKED of the private control block.

Invariants.
 S1  Ranges ascend, neither overlap nor touch, and lie in (SND_UNA, SND_NXT].
 S2  Every byte in a range has been reported by the peer. There is room for SB_MAX ranges; when that is not
     enough, the smallest one but for the highest is forgotten. To forget is safe: it makes more of the data
     count as in flight, or sends some of it once more than needed. To join two ranges over a hole would not be.
     The highest range stays, since it says what was sent before data that have arrived.
 S3  A block that cannot be true is ignored as a whole: reversed, above SND_NXT, or with SND_UNA in it.
"""

from __future__ import annotations

from dataplane.jit import shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.sequence import unwrap

__all__ = ["sack_highest", "sack_update", "sacked_bytes", "scoreboard_add", "scoreboard_advance", "scoreboard_clear"]

_BLOCKS_MAX = 4         # RFC 2018 section 3: what fits in a header


@shared
def _from(mem, t, i):
    return ld64(mem, t + T.T_SB + 16 * i)


@shared
def _to(mem, t, i):
    return ld64(mem, t + T.T_SB + 16 * i + 8)


@shared
def _put(mem, t, i, left, right):
    st64(mem, t + T.T_SB + 16 * i, left)
    st64(mem, t + T.T_SB + 16 * i + 8, right)


@shared
def scoreboard_clear(mem, t):
    st64(mem, t + T.T_SB_COUNT, 0)


@shared
def sacked_bytes(mem, t):
    """Bytes in all ranges."""
    total = 0
    for i in range(ld64(mem, t + T.T_SB_COUNT)):
        total += _to(mem, t, i) - _from(mem, t, i)
    return total


@shared
def sack_highest(mem, t):
    """End of the highest range; SND_UNA if there is none."""
    count = ld64(mem, t + T.T_SB_COUNT)
    return _to(mem, t, count - 1) if count > 0 else ld64(mem, t + T.T_SND_UNA)


@shared
def _remove(mem, t, first, last):
    """Takes ranges [first, last) out."""
    count = ld64(mem, t + T.T_SB_COUNT)
    for i in range(last, count):
        _put(mem, t, first + i - last, _from(mem, t, i), _to(mem, t, i))
    st64(mem, t + T.T_SB_COUNT, count - (last - first))


@shared
def _insert(mem, t, at, left, right):
    """Puts a range in at index `at`; there is room."""
    count = ld64(mem, t + T.T_SB_COUNT)
    for n in range(count - at):
        i = count - 1 - n
        _put(mem, t, i + 1, _from(mem, t, i), _to(mem, t, i))
    _put(mem, t, at, left, right)
    st64(mem, t + T.T_SB_COUNT, count + 1)


@shared
def _smallest(mem, t, count):
    """Index of the smallest of the first `count` ranges."""
    best = 0
    for i in range(1, count):
        if _to(mem, t, i) - _from(mem, t, i) < _to(mem, t, best) - _from(mem, t, best):
            best = i
    return best


@shared
def scoreboard_add(mem, t, left, right):
    """Adds what lies between; returns how many bytes more are known now, at least 0."""
    count = ld64(mem, t + T.T_SB_COUNT)
    first = 0
    while first < count and _to(mem, t, first) < left:
        first += 1
    last = first
    known = 0
    while last < count and _from(mem, t, last) <= right:
        known += _to(mem, t, last) - _from(mem, t, last)
        left = min(left, _from(mem, t, last))
        right = max(right, _to(mem, t, last))
        last += 1
    if last > first:
        _put(mem, t, first, left, right)
        _remove(mem, t, first + 1, last)
        return right - left - known
    forgotten = 0
    if count >= T.SB_MAX:
        # S2. The highest of all, which may be the new one, is no candidate.
        small = _smallest(mem, t, count if first == count else count - 1)
        forgotten = _to(mem, t, small) - _from(mem, t, small)
        if first < count and right - left <= forgotten:
            return 0
        _remove(mem, t, small, small + 1)
        if small < first:
            first -= 1
    _insert(mem, t, first, left, right)
    return max(right - left - forgotten, 0)


@shared
def scoreboard_advance(mem, t, ack):
    """Everything before `ack` is acknowledged; returns how many of these bytes were SACKed.

    A range that `ack` stands in or touches was given up again by the peer, since it would have acknowledged all
    of it (RFC 2018 section 8): forgotten.
    """
    count = ld64(mem, t + T.T_SB_COUNT)
    gone = 0
    below = 0
    while gone < count and _from(mem, t, gone) <= ack:
        below += min(_to(mem, t, gone), ack) - _from(mem, t, gone)
        gone += 1
    if gone > 0:
        _remove(mem, t, 0, gone)
    return below


@shared
def _block(mem, x, i, side):
    """Position of the left (0) or right (1) edge of block `i` of the current segment."""
    t = x + T.X_TCB
    return unwrap(ld64(mem, t + T.T_SND_UNA), ld64(mem, t + T.T_ISS),
                  ld64(mem, x + T.X_SEGMENT + T.S_SACKS + 16 * i + 8 * side))


@shared
def _duplicate(mem, x, count, acked):
    """Bytes that the first block reports as received twice: D-SACK, RFC 2883 section 4. 0: it is no such block."""
    left = _block(mem, x, 0, 0)
    right = _block(mem, x, 0, 1)
    if left < 1 or right <= left:
        return 0
    if right <= acked:
        return right - left
    if count > 1 and _block(mem, x, 1, 0) <= left and right <= _block(mem, x, 1, 1):
        return right - left
    return 0


@shared
def sack_update(mem, x):
    """Takes the SACK blocks of the current segment; returns how many bytes they report that were not known
    to have arrived, and leaves in T_DSACKED how many were received twice."""
    t = x + T.X_TCB
    s = x + T.X_SEGMENT
    st64(mem, t + T.T_DSACKED, 0)
    if ld64(mem, t + T.T_FLAGS) & T.TF_SACK == 0 or ld64(mem, s + T.S_OPTIONS) & T.SO_SACK == 0:
        return 0
    una = ld64(mem, t + T.T_SND_UNA)
    top = ld64(mem, t + T.T_SND_NXT)
    acked = max(unwrap(una, ld64(mem, t + T.T_ISS), ld64(mem, s + T.S_ACK)), una)
    count = min(max(ld64(mem, s + T.S_SACK_COUNT), 0), _BLOCKS_MAX)
    first = 0
    if count > 0:
        duplicate = _duplicate(mem, x, count, acked)
        st64(mem, t + T.T_DSACKED, duplicate)
        first = 1 if duplicate > 0 else 0
    fresh = 0
    for i in range(first, count):
        left = _block(mem, x, i, 0)
        right = _block(mem, x, i, 1)
        if acked < left < right <= top:         # S3
            fresh += scoreboard_add(mem, t, left, right)
    return fresh
