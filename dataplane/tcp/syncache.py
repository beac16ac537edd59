"""The SYN cache: handshakes that wait for their last ACK, in bounded memory.

Private to one RX worker; called by inet/tcp_listen. A hash table of buckets of eight:

    header | bucket 0 | bucket 1 ... | entry 0 | entry 1 | ...

A bucket is one cache line with 16 bits of hash (0: empty) and the deadline of each entry, so that looking for one
that is not there, and for those that are due, touches one line. Entries are handshake.E_..., two lines each.

An entry saves what a cookie has no room for (the exact MSS; window scale and SACK without timestamps) and
has its SYN-ACK sent again after 1, 3 and 7 seconds; after 15 it is dropped (RFC 6298 section 5.5's backoff, from its
1 s). Nothing depends on it: every SYN-ACK carries a cookie. So a full bucket is no loss: the entry that
was sent again most often, the oldest of these, gives way; but one in its first second, in which
nearly all honest peers answer, stays, and then the new handshake goes on by its cookie alone. A flood of
SYNs thus replaces each entry at most once a second, and costs a look at one line the rest of the time.

Floor 2, sans I/O: time is an argument, what to send is a return value. A crash loses it all, and nothing with it.
"""

from __future__ import annotations

from dataplane.jit import inlined, kernel, shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import copy, ctz, fold, ld16, ld32, ld64, match8, shr, st16, st32, st64
from dataplane.tcp.cookie import COUNTER_NS, cookie_keys
from dataplane.tcp.handshake import (
    E_BYTES,
    E_HASH,
    E_PORTS,
    E_SOURCE_HI,
    E_SOURCE_LO,
    E_TARGET_HI,
    E_TARGET_LO,
    E_TRIES,
)

__all__ = [
    "RETRIES", "SC_COUNT", "SC_EVICTED", "SC_KEYS", "SC_SCRATCH", "syn_add", "syn_area_bytes", "syn_crowded", "syn_due",
    "syn_find", "syn_init", "syn_key", "syn_remove", "syn_wait",
]

WAYS = 8
RETRIES = 3
_FIRST_MS = 1000
_SWEEP = 64             # buckets looked at in one call
_PAUSE_NS = 50_000_000  # between two sweeps over all buckets
_NEVER = 0x7FFF_FFFF_FFFF_FFFF
_MS = 1_000_000

SC_MASK = 0             # buckets - 1
SC_COUNT = 8            # entries
SC_NEXT = 16            # CLOCK_MONOTONIC ns: none is due before
SC_CURSOR = 24          # bucket at which the sweep goes on
SC_SEEN = 32            # earliest deadline that it has met
SC_EVICTED = 40         # statistics
SC_CROWDED = 48         # CLOCK_MONOTONIC ns: when an entry last gave way, or found no room; 0: never
SC_KEYS = 64            # cookies' keys
SC_SCRATCH = 128        # the caller's: 1024 bytes
SC_BUCKETS = 1152

B_TAGS = 0              # u16 [8]
B_DEADLINES = 32        # u32 [8]: CLOCK_MONOTONIC ms
B_BYTES = 64


def syn_area_bytes(entries: int) -> int:
    """Memory for `entries` handshakes, a power of two from 8 on."""
    if entries < WAYS or entries & (entries - 1):
        raise ValueError(f"the SYN cache's size must be a power of two from {WAYS} on, not {entries}")
    return SC_BUCKETS + entries // WAYS * B_BYTES + entries * E_BYTES


@kernel("i64(mem, i64, i64, i64)")
def syn_init(mem, c, entries, table):
    """Makes the zeroed memory at `c` an empty cache, with the keys of the table's cookies."""
    st64(mem, c + SC_MASK, entries // WAYS - 1)
    st64(mem, c + SC_NEXT, _NEVER)
    st64(mem, c + SC_SEEN, _NEVER)
    cookie_keys(mem, table, c + SC_KEYS)
    return 0


# -- places ------------------------------------------------------------------------------------------------------


@inlined
def _bucket(mem, c, value):
    return c + SC_BUCKETS + (value & ld64(mem, c + SC_MASK)) * B_BYTES


@inlined
def _entry(mem, c, bucket, way):
    index = (bucket - c - SC_BUCKETS) // B_BYTES * WAYS + way
    return c + SC_BUCKETS + (ld64(mem, c + SC_MASK) + 1) * B_BYTES + index * E_BYTES


@inlined
def _tag(value):
    return shr(value, 49) + 1


@inlined
def _left(mem, bucket, way, now_ms):
    """Milliseconds until the entry's deadline; it is never further away than 2**31."""
    ahead = (ld32(mem, bucket + B_DEADLINES + 4 * way) - now_ms) & 0xFFFF_FFFF
    return ahead - 0x1_0000_0000 if ahead & 0x8000_0000 else ahead


@inlined
def _set_deadline(mem, c, bucket, way, ms):
    st32(mem, bucket + B_DEADLINES + 4 * way, ms)
    st64(mem, c + SC_NEXT, min(ld64(mem, c + SC_NEXT), ms * _MS))
    st64(mem, c + SC_SEEN, min(ld64(mem, c + SC_SEEN), ms * _MS))


# -- find, add, remove -------------------------------------------------------------------------------------------


@inlined
def syn_key(mem, f, p):
    """Fills the key of the facts at `f` from the packet descriptor at `p`."""
    st64(mem, f + E_SOURCE_HI, ld64(mem, p + L.P_SOURCE_HI))
    st64(mem, f + E_SOURCE_LO, ld64(mem, p + L.P_SOURCE_LO))
    st64(mem, f + E_TARGET_HI, ld64(mem, p + L.P_TARGET_HI))
    st64(mem, f + E_TARGET_LO, ld64(mem, p + L.P_TARGET_LO))
    st64(mem, f + E_PORTS, ld64(mem, p + L.P_PORTS) | ld64(mem, p + L.P_FAMILY) << 32)


@inlined
def _hash(mem, c, f):
    k0, k1 = ld64(mem, c + SC_KEYS), ld64(mem, c + SC_KEYS + 8)
    low = fold(k0 ^ (ld64(mem, f + E_SOURCE_LO) + (ld64(mem, f + E_TARGET_LO) << 32)), k1 ^ ld64(mem, f + E_PORTS))
    return fold(low ^ ld64(mem, f + E_SOURCE_HI), k0 ^ ld64(mem, f + E_TARGET_HI))


@inlined
def _same(mem, e, f):
    return (ld64(mem, e + E_SOURCE_LO) == ld64(mem, f + E_SOURCE_LO)
            and ld64(mem, e + E_PORTS) == ld64(mem, f + E_PORTS)
            and ld64(mem, e + E_TARGET_LO) == ld64(mem, f + E_TARGET_LO)
            and ld64(mem, e + E_SOURCE_HI) == ld64(mem, f + E_SOURCE_HI)
            and ld64(mem, e + E_TARGET_HI) == ld64(mem, f + E_TARGET_HI))


@inlined
def syn_find(mem, c, f):
    """Place of the entry with the key of the facts at `f`, or 0. Fills E_HASH there."""
    value = _hash(mem, c, f)
    st64(mem, f + E_HASH, value)
    bucket = _bucket(mem, c, value)
    hits = match8(mem, bucket + B_TAGS, _tag(value))
    while hits != 0:
        e = _entry(mem, c, bucket, ctz(hits))
        if _same(mem, e, f):
            return e
        hits &= hits - 1
    return 0


@inlined
def _victim(mem, c, bucket, now_ms):
    """Way of the entry that gives way: of those sent again most often, the one that is due first; -1: none was."""
    found = -1
    most = 0
    least = 0
    for way in range(WAYS):
        tries = ld64(mem, _entry(mem, c, bucket, way) + E_TRIES)
        left = _left(mem, bucket, way, now_ms)
        if tries > most or (tries == most and tries > 0 and left < least):
            found, most, least = way, tries, left
    return found


@inlined
def _none_was_sent_again(mem, bucket, now_ms):
    """Whether all deadlines lie within the first second: one line tells, in place of eight entries. Wrong about
    entries that are due again in less than that; they are met a second later."""
    most = 0
    for way in range(WAYS):
        most = max(most, _left(mem, bucket, way, now_ms))
    return most <= _FIRST_MS


@inlined
def syn_add(mem, c, f, now):
    """Puts the facts at `f`, which syn_find did not find, into the cache, their SYN-ACK being sent at `now` (ns).
    The entry's place, or 0 if there is no room."""
    value = ld64(mem, f + E_HASH)
    bucket = _bucket(mem, c, value)
    now_ms = now // _MS
    free = match8(mem, bucket + B_TAGS, 0)
    if free != 0:
        way = ctz(free)
        st64(mem, c + SC_COUNT, ld64(mem, c + SC_COUNT) + 1)
    else:
        st64(mem, c + SC_CROWDED, now)
        if _none_was_sent_again(mem, bucket, now_ms):
            return 0
        way = _victim(mem, c, bucket, now_ms)
        if way < 0:
            return 0
        st64(mem, c + SC_EVICTED, ld64(mem, c + SC_EVICTED) + 1)
    e = _entry(mem, c, bucket, way)
    copy(mem, e, f, E_BYTES)
    st64(mem, e + E_TRIES, 0)
    st16(mem, bucket + B_TAGS + 2 * way, _tag(value))
    _set_deadline(mem, c, bucket, way, now_ms + _FIRST_MS)
    return e


@inlined
def syn_crowded(mem, c, now):
    """Whether there may be cookies without an entry that are still good."""
    crowded = ld64(mem, c + SC_CROWDED)
    return crowded != 0 and now - crowded < 2 * COUNTER_NS


@shared
def syn_remove(mem, c, e):
    """Takes the entry at `e` out."""
    index = (e - c - SC_BUCKETS - (ld64(mem, c + SC_MASK) + 1) * B_BYTES) // E_BYTES
    st16(mem, c + SC_BUCKETS + index // WAYS * B_BYTES + B_TAGS + 2 * (index % WAYS), 0)
    st64(mem, c + SC_COUNT, ld64(mem, c + SC_COUNT) - 1)


# -- time ----------------------------------------------------------------------------------------------------------


@shared
def _due_in(mem, c, bucket, now_ms):
    """Place of an entry of the bucket whose SYN-ACK is due again, its next deadline set; or 0. Drops those whose
    last one is over."""
    for way in range(WAYS):
        if ld16(mem, bucket + B_TAGS + 2 * way) == 0:
            continue
        left = _left(mem, bucket, way, now_ms)
        if left > 0:
            st64(mem, c + SC_SEEN, min(ld64(mem, c + SC_SEEN), (now_ms + left) * _MS))
            continue
        e = _entry(mem, c, bucket, way)
        tries = ld64(mem, e + E_TRIES) + 1
        if tries > RETRIES:
            syn_remove(mem, c, e)
            continue
        st64(mem, e + E_TRIES, tries)
        _set_deadline(mem, c, bucket, way, now_ms + (_FIRST_MS << tries))
        return e
    return 0


@shared
def syn_due(mem, c, now):
    """Place of an entry whose SYN-ACK is to be sent again at `now`, or 0: none is found in this call. To be called
    until it gives 0. All buckets are looked at in turn, some in each call, while something is due."""
    if now < ld64(mem, c + SC_NEXT):
        return 0
    cursor = ld64(mem, c + SC_CURSOR)
    last = ld64(mem, c + SC_MASK)
    for _ in range(_SWEEP):
        if cursor > last:
            # Deadlines come at any time: without a pause one sweep would follow the other.
            earliest = ld64(mem, c + SC_SEEN)
            st64(mem, c + SC_NEXT, max(earliest, now + _PAUSE_NS) if ld64(mem, c + SC_COUNT) != 0 else _NEVER)
            st64(mem, c + SC_SEEN, _NEVER)
            st64(mem, c + SC_CURSOR, 0)
            return 0
        st64(mem, c + SC_CURSOR, cursor)
        e = _due_in(mem, c, c + SC_BUCKETS + cursor * B_BYTES, now // _MS)
        if e != 0:
            return e
        cursor += 1
    st64(mem, c + SC_CURSOR, cursor)
    return 0


@inlined
def syn_wait(mem, c, now):
    """Nanoseconds from `now` until syn_due may find something; -1: nothing waits."""
    following = ld64(mem, c + SC_NEXT)
    return -1 if following == _NEVER else max(following - now, 0)
