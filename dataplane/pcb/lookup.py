"""Finding a PCB: the hash table that every packet of every RX worker passes.

Readers (RX workers) write nothing and never wait. Writers are the supervisor and, for new TCP
connections, RX workers.

A bucket is one cache line: lock, overflow count, eight 16-bit tags, eight PCB numbers. An entry
whose home bucket is full lives in the next one that has room, and every bucket that it passed
counts it in its overflow word; a lookup goes on while that count is not zero.

Invariants.
 I1  An entry appears by one store of its tag, after its PCB number and the whole PCB were
     written, and disappears by one store of 0 to it. It never moves. A reader therefore sees an
     entry or does not; there is nothing to tear, and no version is needed to notice it.
 I2  Overflow counts of the buckets that an entry passes are raised before its tag is stored and
     lowered after it is cleared: a reader never stops too early.
 I3  A match is decided by the PCB's own key, not by the tag. A PCB number is used again only
     after every worker has passed an epoch since its entry was cleared (shm/epoch.py), so that
     a number read from a bucket means the same socket until the burst ends.
 I4  A writer changes a bucket only under its lock word, which holds the writer's stamp. A writer
     that dies inside leaves at worst an overflow count that is too high (a slower lookup, never a
     wrong one), since I1 makes every change a single store; its lock is taken over.

The design asked for an optimistic versioned read; since entries never move, the version would
guard nothing, and its two loads and its retry loop (a stopped writer!) are gone.
"""

from __future__ import annotations

from dataplane.jit import inlined, kernel, shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import (
    acquire,
    cas,
    ctz,
    fetch_add,
    fold,
    ld8,
    ld32,
    ld64,
    match8,
    shr,
    st16,
    st32,
    st64,
    store_release,
    store_release16,
    store_release32,
)

__all__ = [
    "PROBE_LIMIT", "bucket_insert", "bucket_remove", "bucket_replace", "class_hash", "classes_on_port", "find",
    "buckets_unlock", "chain_push", "chain_remove", "find_exact", "insert_unique", "key_word", "likely", "lookup",
    "probe", "replace_entry",
]

PROBE_LIMIT = 128
"""Buckets that one lookup visits at most. Insertion refuses to go further, so none is missed."""


@inlined
def key_word(cls, proto, ports):
    """The lower 48 bits of PCB_KEY. `ports`: local | remote << 16."""
    return ports | (proto << 32) | (cls << 40)


@inlined
def class_hash(mem, table, key, local_hi, local_lo, remote_hi, remote_lo):
    """64-bit hash of a key. Two secrets make collisions unpredictable to a remote sender.

    An IPv4 key takes one multiplication. Families need not enter: addresses differ enough,
    and the PCB's own key decides.
    """
    secret0 = ld64(mem, table + L.T_SECRET0)
    secret1 = ld64(mem, table + L.T_SECRET1)
    if local_hi == 0 and remote_hi == 0:
        return fold(secret0 ^ (local_lo << 32) ^ remote_lo, secret1 ^ key)
    local = fold(secret0 ^ local_hi, secret1 ^ local_lo)
    remote = fold(secret1 ^ remote_hi, secret0 ^ remote_lo)
    return fold(local ^ key, secret1 ^ remote)


@inlined
def _tag(value):
    """16 bits that are never 0, from the end of the hash that the bucket number does not use."""
    return shr(value, 49) + 1


@inlined
def _same(mem, pcb, key, family, local_hi, local_lo, remote_hi, remote_lo):
    word = ld64(mem, pcb + L.PCB_KEY)
    return (((word ^ key) & 0xFFFF_FFFF_FFFF) == 0 and (word >> 48) & family != 0
            and ld64(mem, pcb + L.PCB_LOCAL_LO) == local_lo and ld64(mem, pcb + L.PCB_REMOTE_LO) == remote_lo
            and ld64(mem, pcb + L.PCB_LOCAL_HI) == local_hi and ld64(mem, pcb + L.PCB_REMOTE_HI) == remote_hi)


@inlined
def probe(mem, table, value, key, family, local_hi, local_lo, remote_hi, remote_lo):
    """Number of the PCB with this key, or -1. `value` is its class_hash, `family` KEY_FAMILY4 or 6."""
    mask = ld64(mem, table + L.T_BUCKETS)
    first = ld64(mem, table + L.T_BUCKET_AT)
    pcbs = ld64(mem, table + L.T_PCBS)
    tag = _tag(value)
    for step in range(PROBE_LIMIT):
        bucket = first + ((value + step) & mask) * L.BUCKET_BYTES
        hits = match8(mem, bucket + L.BUCKET_TAGS, tag)
        # SYNC bucket-entry: acquire pairs with bucket_insert's release of the tag; else the
        # PCB's number and key could be read from before they were written.
        acquire()
        while hits != 0:
            number = ld32(mem, bucket + L.BUCKET_PCBS + 4 * ctz(hits))
            if _same(mem, pcbs + number * L.PCB_BYTES, key, family, local_hi, local_lo, remote_hi, remote_lo):
                return number
            hits &= hits - 1
        if ld64(mem, bucket + L.BUCKET_OVERFLOW) == 0:
            return -1
    return -1


@inlined
def likely(mem, table, value):
    """Number of the PCB that a probe for this hash looks at first, or -1: to be prefetched, not to be relied upon."""
    bucket = ld64(mem, table + L.T_BUCKET_AT) + (value & ld64(mem, table + L.T_BUCKETS)) * L.BUCKET_BYTES
    hits = match8(mem, bucket + L.BUCKET_TAGS, _tag(value))
    return ld32(mem, bucket + L.BUCKET_PCBS + 4 * ctz(hits)) if hits != 0 else -1


@inlined
def classes_on_port(mem, table, proto, port):
    """Bits (1 << class) of the lookups that can succeed for this local port; those of the
    any-port sockets included. Written by the supervisor after insertion, before removal."""
    row = 0 if proto == 17 else 65536
    return ld8(mem, ld64(mem, table + L.T_PORTS) + row + port) | ld8(mem, table + L.T_ANY + (proto != 17))


@inlined
def find(mem, table, cls, proto, family, ports, local_hi, local_lo, remote_hi, remote_lo):
    """The PCB of one lookup class for a packet's addresses. `ports`: local | remote << 16."""
    if cls >= L.CLASS_BOUND:
        remote_hi = remote_lo = 0
        ports &= 0xFFFF
    if cls == L.CLASS_HALF or cls >= L.CLASS_WILDCARD:
        local_hi = local_lo = 0
    if cls == L.CLASS_ANY:
        ports = 0
    key = key_word(cls, proto, ports)
    value = class_hash(mem, table, key, local_hi, local_lo, remote_hi, remote_lo)
    return probe(mem, table, value, key, family, local_hi, local_lo, remote_hi, remote_lo)


@inlined
def lookup(mem, table, proto, family, ports, local_hi, local_lo, remote_hi, remote_lo):
    """The PCB that a packet belongs to, or -1: connected, connected with any local address,
    bound to the address, bound to the wildcard, any port."""
    classes = classes_on_port(mem, table, proto, ports & 0xFFFF)
    while classes != 0:
        cls = ctz(classes)
        found = find(mem, table, cls, proto, family, ports, local_hi, local_lo, remote_hi, remote_lo)
        if found >= 0:
            return found
        classes &= classes - 1
    return -1


@kernel("i64(mem, i64, i64, i64, i64)")
def find_exact(mem, table, key, family, addresses):
    """The PCB with exactly this key in any of `family`'s bits, or -1: for the writer. `addresses`:
    place of local hi, lo, remote hi, lo."""
    a, b, c, d = (ld64(mem, addresses), ld64(mem, addresses + 8), ld64(mem, addresses + 16),
                  ld64(mem, addresses + 24))
    return probe(mem, table, class_hash(mem, table, key, a, b, c, d), key, family, a, b, c, d)


# -- writers -------------------------------------------------------------------------------


@inlined
def _hash_of(mem, table, pcb):
    return class_hash(mem, table, ld64(mem, pcb + L.PCB_KEY) & 0xFFFF_FFFF_FFFF,
                      ld64(mem, pcb + L.PCB_LOCAL_HI), ld64(mem, pcb + L.PCB_LOCAL_LO),
                      ld64(mem, pcb + L.PCB_REMOTE_HI), ld64(mem, pcb + L.PCB_REMOTE_LO))


@inlined
def _place(mem, bucket, number, tag):
    """Puts the entry in a free place of the bucket, whose lock is held: 1, or 0 if it is full."""
    free = match8(mem, bucket + L.BUCKET_TAGS, 0)
    if free == 0:
        return 0
    place = ctz(free)
    st32(mem, bucket + L.BUCKET_PCBS + 4 * place, number)
    # SYNC bucket-entry: release pairs with the acquire in probe (I1).
    store_release16(mem, bucket + L.BUCKET_TAGS + 2 * place, tag)
    return 1


@inlined
def _claim(mem, bucket, number, tag, stamp):
    """Puts the entry in a free place of the bucket: 1, 0 if it is full, -1 if it is locked."""
    # SYNC bucket-lock: pairs with the release below, in another writer; else two writers could
    # take the same place.
    if cas(mem, bucket + L.BUCKET_LOCK, 0, stamp) == 0:
        return -1
    placed = _place(mem, bucket, number, tag)
    # SYNC bucket-lock: release pairs with the cas above.
    store_release(mem, bucket + L.BUCKET_LOCK, 0)
    return placed


@inlined
def _insert_from(mem, table, number, value, stamp, passed):
    """Puts the entry into the first bucket with room, `passed` buckets behind its home or further on; their
    overflow counts up to there are raised already. As bucket_insert."""
    mask = ld64(mem, table + L.T_BUCKETS)
    first = ld64(mem, table + L.T_BUCKET_AT)
    result = 0
    while result == 0 and passed < min(PROBE_LIMIT, mask + 1):
        bucket = first + ((value + passed) & mask) * L.BUCKET_BYTES
        result = _claim(mem, bucket, number, _tag(value), stamp)
        if result == 0:
            # Raised before the entry appears (I2). A death here leaves it too high: slower, not wrong.
            # SYNC bucket-overflow: pairs with bucket_remove, and with probe through bucket-entry.
            fetch_add(mem, bucket + L.BUCKET_OVERFLOW, 1)
            passed += 1
    if result != 1:
        _lower(mem, first, mask, value, passed)
    return result


@kernel("i64(mem, i64, i64, i64)")
def bucket_insert(mem, table, number, stamp):
    """Makes PCB `number` findable: 1; 0 when no bucket within reach has room; -1 when a bucket is
    locked by another writer (the caller decides whether to try again)."""
    value = _hash_of(mem, table, ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES)
    return _insert_from(mem, table, number, value, stamp, 0)


@shared
def insert_unique(mem, table, number, stamp):
    """The same for kernels, unless a PCB has this key already: -2 - its number then. All who insert a key in this
    way hold the lock of its home bucket while they look and put: of two workers that complete the same
    handshake, one finds the other's connection."""
    pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
    value = _hash_of(mem, table, pcb)
    home = ld64(mem, table + L.T_BUCKET_AT) + (value & ld64(mem, table + L.T_BUCKETS)) * L.BUCKET_BYTES
    # SYNC bucket-lock: pairs with the release below and in _claim.
    if cas(mem, home + L.BUCKET_LOCK, 0, stamp) == 0:
        return -1
    key = ld64(mem, pcb + L.PCB_KEY)
    found = probe(mem, table, value, key & 0xFFFF_FFFF_FFFF, key >> 48 & 0xFF,
                  ld64(mem, pcb + L.PCB_LOCAL_HI), ld64(mem, pcb + L.PCB_LOCAL_LO),
                  ld64(mem, pcb + L.PCB_REMOTE_HI), ld64(mem, pcb + L.PCB_REMOTE_LO))
    result = 1
    if found >= 0:
        result = -2 - found
    elif _place(mem, home, number, _tag(value)) == 0:
        # SYNC bucket-overflow: as in _insert_from.
        fetch_add(mem, home + L.BUCKET_OVERFLOW, 1)
        result = _insert_from(mem, table, number, value, stamp, 1)
    # SYNC bucket-lock: release pairs with the cas above.
    store_release(mem, home + L.BUCKET_LOCK, 0)
    return result


@inlined
def _lower(mem, first, mask, value, passed):
    for step in range(passed):
        # SYNC bucket-overflow: pairs with bucket_insert.
        fetch_add(mem, first + ((value + step) & mask) * L.BUCKET_BYTES + L.BUCKET_OVERFLOW, -1)


@inlined
def _locate(mem, table, number, value):
    """(buckets passed) * 8 + place of the entry of PCB `number`, or -1."""
    mask = ld64(mem, table + L.T_BUCKETS)
    first = ld64(mem, table + L.T_BUCKET_AT)
    for step in range(PROBE_LIMIT):
        bucket = first + ((value + step) & mask) * L.BUCKET_BYTES
        hits = match8(mem, bucket + L.BUCKET_TAGS, _tag(value))
        while hits != 0:
            place = ctz(hits)
            if ld32(mem, bucket + L.BUCKET_PCBS + 4 * place) == number:
                return step * 8 + place
            hits &= hits - 1
        if ld64(mem, bucket + L.BUCKET_OVERFLOW) == 0:
            return -1
    return -1


@kernel("i64(mem, i64, i64)")
def bucket_remove(mem, table, number):
    """PCB `number` is no longer found: 1, or 0 if it was not there. Only one process at a time
    removes a given PCB, and clearing one tag needs no lock: `_claim` never touches a taken place."""
    mask = ld64(mem, table + L.T_BUCKETS)
    first = ld64(mem, table + L.T_BUCKET_AT)
    value = _hash_of(mem, table, ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES)
    where = _locate(mem, table, number, value)
    if where < 0:
        return 0
    bucket = first + ((value + where // 8) & mask) * L.BUCKET_BYTES
    st16(mem, bucket + L.BUCKET_TAGS + 2 * (where % 8), 0)
    # SYNC bucket-overflow: the tag is cleared before these atomics (I2).
    _lower(mem, first, mask, value, where // 8)
    return 1


@shared
def replace_entry(mem, table, number, other):
    """As bucket_replace, for kernels. The PCB `other` is complete: the store of its number releases it."""
    first = ld64(mem, table + L.T_BUCKET_AT)
    value = _hash_of(mem, table, ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES)
    where = _locate(mem, table, number, value)
    if where < 0:
        return 0
    bucket = first + ((value + where // 8) & ld64(mem, table + L.T_BUCKETS)) * L.BUCKET_BYTES
    # SYNC bucket-entry: release pairs with the acquire in probe; a reader that has loaded the tag long
    # before still reaches the PCB through the number, whose words it then depends on.
    store_release32(mem, bucket + L.BUCKET_PCBS + 4 * (where % 8), other)
    return 1


@kernel("i64(mem, i64, i64, i64)")
def bucket_replace(mem, table, number, other):
    """The entry of PCB `number` means PCB `other` from now on (same key: the next member of a
    reuseport group, or a connection in the place of one in TIME_WAIT). One store: readers find the one or
    the other. Only one process at a time replaces or removes a given PCB."""
    return replace_entry(mem, table, number, other)


@kernel("i64(mem, i64, i64)")
def buckets_unlock(mem, table, dead):
    """Takes the locks of a dead writer away; returns how many. What they protected is whole (I4)."""
    count = 0
    first = ld64(mem, table + L.T_BUCKET_AT)
    for i in range(ld64(mem, table + L.T_BUCKETS) + 1):
        # SYNC bucket-lock: a dead holder cannot release it; pairs with _claim of the next one.
        count += cas(mem, first + i * L.BUCKET_BYTES + L.BUCKET_LOCK, dead, 0)
    return count


@kernel("i64(mem, i64, i64, i64, i64)")
def chain_push(mem, table, head, width, number):
    """Puts PCB `number` at the front of the chain whose head word (of `width` bytes) is at `head`."""
    pcbs = ld64(mem, table + L.T_PCBS)
    pcb = pcbs + number * L.PCB_BYTES
    first = ld32(mem, head) if width == 4 else ld64(mem, head)
    st64(mem, pcb + L.PCB_NEXT, first)
    st64(mem, pcb + L.PCB_PREVIOUS, 0)
    if first != 0:
        st64(mem, pcbs + (first - 1) * L.PCB_BYTES + L.PCB_PREVIOUS, number + 1)
    # SYNC chain: release pairs with the acquire in the walkers (inet/demux.py); else they could
    # follow PCB_NEXT from before it was written.
    if width == 4:
        store_release32(mem, head, number + 1)
    else:
        store_release(mem, head, number + 1)
    return 0


@kernel("i64(mem, i64, i64, i64, i64)")
def chain_remove(mem, table, head, width, number):
    """Takes PCB `number` out of its chain. Its own PCB_NEXT stays: a walker that stands on it goes on."""
    pcbs = ld64(mem, table + L.T_PCBS)
    pcb = pcbs + number * L.PCB_BYTES
    following = ld64(mem, pcb + L.PCB_NEXT)
    before = ld64(mem, pcb + L.PCB_PREVIOUS)
    if following != 0:
        st64(mem, pcbs + (following - 1) * L.PCB_BYTES + L.PCB_PREVIOUS, before)
    if before != 0:
        # SYNC chain: release pairs with the walkers' acquire.
        store_release(mem, pcbs + (before - 1) * L.PCB_BYTES + L.PCB_NEXT, following)
    elif width == 4:
        store_release32(mem, head, following)
    else:
        store_release(mem, head, following)
    return 0
