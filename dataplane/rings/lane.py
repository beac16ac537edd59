"""The lane: a single-producer single-consumer ring of packets, as bytes.

The producer is an RX worker, the consumer a process that may be hostile. Roles:

    producer   lane_stage (many times), then lane_publish (once a burst)
    consumer   lane_peek, lane_next (many times), then lane_release

Invariants.
 I1  LANE_HEAD and LANE_TAIL count bytes since the start, never shrink, and have one writer each.
 I2  Bytes [tail, head) belong to the consumer, all others to the producer; the producer writes
     only bytes it owns, and they become the consumer's by one release store of the head.
 I3  A record is contiguous and aligned to 16 bytes; the bytes before a wrap that are too few
     for the next record are a padding record.
 I4  What the producer decides by (head, tail as last seen, mask, base) lives in the table, where
     no consumer can write. The only word it takes from the consumer's memory is the tail, which
     is believed only if it lies in [tail as last seen, published head]: a consumer that lies can
     lose its own packets and nothing else.

A record needs up to its own size again for padding, so that only records of up to half the ring
are certain to fit an empty ring; larger ones are refused (`LANE_NEVER`), wherever the head happens to
stand: what fits now and then would be lost now and then. No netif has frames of 16 MB, what a
record's length has room for.
"""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm import layout as L
from dataplane.shm.atomics import copy, ld64, load_acquire, st64, store_release

__all__ = [
    "LANE_FULL", "LANE_NEVER", "lane_bytes", "lane_next", "lane_peek", "lane_publish", "lane_recover",
    "lane_release", "lane_room", "lane_stage", "record_bytes",
]

LANE_FULL = 0       # no room now
LANE_NEVER = -1     # the record is too large for this ring
_PAD = L.RECORD_PAD << 24


def lane_bytes(ring_bytes: int) -> int:
    """Memory that a lane with a ring of `ring_bytes` takes."""
    return L.LANE_DATA + ring_bytes


@inlined
def record_bytes(length):
    """Bytes of the ring that a packet of `length` bytes takes, without padding at a wrap."""
    return (length + L.RECORD_DATA + L.RECORD_ALIGN - 1) & -L.RECORD_ALIGN


@inlined
def _refresh_tail(mem, state):
    """Takes the consumer's word for what it has released, if it can be true (I4)."""
    # SYNC lane-tail: acquire pairs with lane_release in the consumer; else the producer could
    # overwrite a record while the consumer's last reads of it are still under way.
    tail = load_acquire(mem, ld64(mem, state + L.LS_BASE) + L.LANE_TAIL)
    if ld64(mem, state + L.LS_TAIL) <= tail <= ld64(mem, state + L.LS_PUBLISHED):
        st64(mem, state + L.LS_TAIL, tail)
    return ld64(mem, state + L.LS_TAIL)


@inlined
def lane_room(mem, state, length):
    """1 if a packet of `length` bytes can be staged now, LANE_FULL, or LANE_NEVER."""
    need = record_bytes(length)
    head = ld64(mem, state + L.LS_HEAD)
    size = ld64(mem, state + L.LS_MASK) + 1
    if 2 * need > size:
        return LANE_NEVER
    left = size - (head & (size - 1))
    if need > left:
        need += left
    if head + need - ld64(mem, state + L.LS_TAIL) <= size:
        return 1
    return 1 if head + need - _refresh_tail(mem, state) <= size else LANE_FULL


@inlined
def lane_stage(mem, state, word, time, source, length):
    """Copies a packet behind the last staged one; nothing is visible before lane_publish.

    `state` is the lane state in the table, `word` the record's first word without the length.
    Returns 1, LANE_FULL or LANE_NEVER.
    """
    room = lane_room(mem, state, length)
    if room != 1:
        return room
    need = record_bytes(length)
    head = ld64(mem, state + L.LS_HEAD)
    mask = ld64(mem, state + L.LS_MASK)
    data = ld64(mem, state + L.LS_BASE) + L.LANE_DATA
    at = head & mask
    left = mask + 1 - at
    if need > left:
        st64(mem, data + at, (left - L.RECORD_DATA) | _PAD)
        head += left
        at = 0
    record = data + at
    st64(mem, record + L.RECORD_WORD, word | length)
    st64(mem, record + L.RECORD_TIME, time)
    copy(mem, record + L.RECORD_DATA, source, length)
    st64(mem, state + L.LS_HEAD, head + need)
    return 1


@inlined
def lane_publish(mem, state):
    """Hands all staged records to the consumer."""
    head = ld64(mem, state + L.LS_HEAD)
    # Before the head itself: a replacement of this worker publishes LS_PUBLISHED again, so
    # that a death between the two stores can only make records visible that are complete.
    # SYNC lane-recover: release, so that the records come before this word for the replacement
    # too (lane_recover); else it could publish a record that was never written.
    store_release(mem, state + L.LS_PUBLISHED, head)
    # SYNC lane-head: release pairs with lane_peek in the consumer; else it could read a
    # record's bytes from before they were written.
    store_release(mem, ld64(mem, state + L.LS_BASE) + L.LANE_HEAD, head)


@inlined
def lane_recover(mem, state):
    """For the replacement of a dead producer: what was published stays, what was only staged is
    forgotten. Its memory is ours again, and no consumer has seen it (I2)."""
    # SYNC lane-recover: acquire pairs with lane_publish of the dead worker.
    head = load_acquire(mem, state + L.LS_PUBLISHED)
    st64(mem, state + L.LS_HEAD, head)
    # SYNC lane-head: as in lane_publish, pairs with lane_peek.
    store_release(mem, ld64(mem, state + L.LS_BASE) + L.LANE_HEAD, head)


# -- consumer ------------------------------------------------------------------------------


@inlined
def lane_peek(mem, lane):
    """The published head: records in [tail, head) may be read."""
    # SYNC lane-head: acquire pairs with lane_publish; else a record could be read half written.
    return load_acquire(mem, lane + L.LANE_HEAD)


@inlined
def lane_next(mem, lane, mask, position, head):
    """Position of the first packet record at or behind `position`, padding skipped; `head` when
    there is none."""
    while position < head:
        word = ld64(mem, lane + L.LANE_DATA + (position & mask))
        if not word & _PAD:
            return position
        position += record_bytes(word & 0xFFFFFF)
    return head


@inlined
def lane_release(mem, lane, position, packets):
    """Gives everything before `position` back to the producer; `packets` are counted."""
    st64(mem, lane + L.LANE_CONSUMED, ld64(mem, lane + L.LANE_CONSUMED) + packets)
    # SYNC lane-tail: release pairs with _refresh_tail in the producer; else our reads of these
    # records could happen after they were overwritten.
    store_release(mem, lane + L.LANE_TAIL, position)
