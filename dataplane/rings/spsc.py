"""The spsc: a bounded FIFO of int64 items for one producer and one consumer, made for batches.

For where there is one process at either end. An item is a plain copy, and a batch of them is published by one store;
the `pcq` needs a compare-and-swap for each item, and a `lane` a header.

    head | seen tail | tail | seen head | mask | item 0 | item 1 | ...

Positions count from the start and never wrap (63 bits); position p lives in item p & mask. Roles:

    producer   spsc_put_many, spsc_put
    consumer   spsc_take_many, spsc_take

Nobody ever waits: what does not fit is not put, what is not there is not taken.

Invariants.
 I1  Head and tail have one writer each and never shrink; 0 <= head - tail <= capacity.
 I2  Items [tail, head) belong to the consumer, all others to the producer. Each side writes or reads only
     its own, and hands them over by one release store of its position.
 I3  "Seen tail" is a tail that was, known to the producer alone, and thus at most the tail; "seen head" is the
     same for the consumer. Each side goes by what it has seen while that is enough for the whole batch, so that
     the line of the other's position moves between the cores once in many batches, not once in each.

Each of the four words has two cache lines of its own, since the adjacent-line prefetcher moves lines in pairs.

Deaths. Whichever side dies, its successor goes on from the same words: what was copied but not published was never
in the ring, what was copied out but not released is taken again.

Both sides are trusted: processes of the dataplane itself. (From a consumer that may lie use a `lane`.)

Floor 2. `spsc_*` are for kernels; `Spsc` is the same for Python, one item at a time. `q` is an offset in `mem`,
128-aligned.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dataplane.jit import inlined, kernel
from dataplane.shm.atomics import copy, ld64, load_acquire, st64, store_release

__all__ = [
    "SPSC_MAX_CAPACITY", "Spsc", "spsc_bytes", "spsc_init", "spsc_maxitems", "spsc_put", "spsc_put_many", "spsc_take",
    "spsc_take_many",
]

SPSC_HEAD = 0               # positions put since the start. Written by the producer
SPSC_SEEN_TAIL = 128        # the producer's own: the tail when it last looked
SPSC_TAIL = 256             # positions taken since the start. Written by the consumer
SPSC_SEEN_HEAD = 384        # the consumer's own: the head when it last looked
SPSC_TAKEN = 392            # the consumer's own: where Python finds the item that it took
SPSC_MASK = 512             # capacity - 1
SPSC_ITEMS = 640
SPSC_MAX_CAPACITY = 1 << 30


def spsc_bytes(capacity: int) -> int:
    """Memory that a ring of `capacity` items takes: a power of two from 1 to SPSC_MAX_CAPACITY."""
    if not 1 <= capacity <= SPSC_MAX_CAPACITY or capacity & (capacity - 1):
        raise ValueError(f"capacity must be a power of two from 1 to {SPSC_MAX_CAPACITY}, not {capacity}")
    return SPSC_ITEMS + 8 * capacity


@inlined
def spsc_init(mem, q, capacity, start):
    """Makes an empty ring whose first position is `start` (0 but in tests), before any other process knows of it."""
    for word in (SPSC_HEAD, SPSC_SEEN_TAIL, SPSC_TAIL, SPSC_SEEN_HEAD):
        st64(mem, q + word, start)
    st64(mem, q + SPSC_MASK, capacity - 1)


@inlined
def spsc_maxitems(mem, q):
    """How many items fit."""
    return ld64(mem, q + SPSC_MASK) + 1


# -- the producer ------------------------------------------------------------------------------


@inlined
def _room(mem, q, head, wanted):
    """How many items can be put: looks at the consumer's word only if it must for `wanted`."""
    capacity = ld64(mem, q + SPSC_MASK) + 1
    room = ld64(mem, q + SPSC_SEEN_TAIL) + capacity - head
    if room >= wanted:
        return room
    # SYNC spsc-tail: acquire, pairs with the release in _release; else an item could be overwritten while the
    # consumer's read of it is still under way.
    tail = load_acquire(mem, q + SPSC_TAIL)
    st64(mem, q + SPSC_SEEN_TAIL, tail)
    return tail + capacity - head


@inlined
def _publish(mem, q, head):
    """What stands before `head` is the consumer's."""
    # SYNC spsc-head: release, pairs with the acquire in _there; else the consumer could read what stood in the
    # place of an item before.
    store_release(mem, q + SPSC_HEAD, head)


@inlined
def spsc_put_many(mem, q, source, least, most):
    """Puts the first of the `most` items at `source`, as many as fit, but none if fewer than `least` (1 or more) do:
    how many."""
    head = ld64(mem, q + SPSC_HEAD)
    count = min(_room(mem, q, head, most), most)
    if count < least:
        return 0
    mask = ld64(mem, q + SPSC_MASK)
    at = head & mask
    first = min(count, mask + 1 - at)
    copy(mem, q + SPSC_ITEMS + 8 * at, source, 8 * first)
    if first < count:
        copy(mem, q + SPSC_ITEMS, source + 8 * first, 8 * (count - first))
    _publish(mem, q, head + count)
    return count


@inlined
def spsc_put(mem, q, item):
    """1 if the item is in the ring, 0 if the ring is full."""
    head = ld64(mem, q + SPSC_HEAD)
    if _room(mem, q, head, 1) < 1:
        return 0
    st64(mem, q + SPSC_ITEMS + 8 * (head & ld64(mem, q + SPSC_MASK)), item)
    _publish(mem, q, head + 1)
    return 1


# -- the consumer ------------------------------------------------------------------------------


@inlined
def _there(mem, q, tail, wanted):
    """How many items can be taken: looks at the producer's word only if it must for `wanted`."""
    there = ld64(mem, q + SPSC_SEEN_HEAD) - tail
    if there >= wanted:
        return there
    # SYNC spsc-head: acquire, pairs with the release in _publish.
    head = load_acquire(mem, q + SPSC_HEAD)
    st64(mem, q + SPSC_SEEN_HEAD, head)
    return head - tail


@inlined
def _release(mem, q, tail):
    """What stands before `tail` is the producer's."""
    # SYNC spsc-tail: release, pairs with the acquire in _room; else our reads could happen after the items were
    # overwritten.
    store_release(mem, q + SPSC_TAIL, tail)


@inlined
def spsc_take_many(mem, q, target, least, most):
    """Takes the oldest items, up to `most`, to `target`, but none if fewer than `least` (1 or more) are there: how
    many."""
    tail = ld64(mem, q + SPSC_TAIL)
    count = min(_there(mem, q, tail, most), most)
    if count < least:
        return 0
    mask = ld64(mem, q + SPSC_MASK)
    at = tail & mask
    first = min(count, mask + 1 - at)
    copy(mem, target, q + SPSC_ITEMS + 8 * at, 8 * first)
    if first < count:
        copy(mem, target + 8 * first, q + SPSC_ITEMS, 8 * (count - first))
    _release(mem, q, tail + count)
    return count


@inlined
def spsc_take(mem, q, target):
    """1, and the oldest item is taken and stored at `target`; or 0."""
    tail = ld64(mem, q + SPSC_TAIL)
    if _there(mem, q, tail, 1) < 1:
        return 0
    st64(mem, target, ld64(mem, q + SPSC_ITEMS + 8 * (tail & ld64(mem, q + SPSC_MASK))))
    _release(mem, q, tail + 1)
    return 1


# -- Python ------------------------------------------------------------------------------------


@kernel("i64(mem, i64, i64, i64)")
def _init(mem, q, capacity, start):
    spsc_init(mem, q, capacity, start)
    return 0


@kernel("i64(mem, i64, i64)")
def _put(mem, q, item):
    return spsc_put(mem, q, item)


@kernel("i64(mem, i64)")
def _take(mem, q):
    return spsc_take(mem, q, q + SPSC_TAKEN)


class Spsc:
    """The ring at `offset` of `mem`, one item at a time. `put` is the one producer's, `take` the one consumer's."""

    def __init__(self, mem: npt.NDArray[np.uint8], offset: int) -> None:
        self._mem, self._offset = mem, offset
        self._taken = mem[offset + SPSC_TAKEN:][:8].view(np.int64)
        self._mask = mem[offset + SPSC_MASK:][:8].view(np.int64)

    @classmethod
    def create(cls, mem: npt.NDArray[np.uint8], offset: int, capacity: int, *, start: int = 0) -> Spsc:
        """Makes an empty ring in the `spsc_bytes(capacity)` bytes at `offset`."""
        spsc_bytes(capacity)    # checks it
        _init(mem, offset, capacity, start)
        return cls(mem, offset)

    @property
    def maxitems(self) -> int:
        """How many items fit."""
        return int(self._mask[0]) + 1

    def put(self, item: int) -> bool:
        """False when the ring is full."""
        return bool(_put(self._mem, self._offset, item))

    def take(self) -> int | None:
        """Takes the oldest item; None when there is none."""
        return int(self._taken[0]) if _take(self._mem, self._offset) else None
