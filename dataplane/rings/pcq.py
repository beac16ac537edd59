"""The pcq: a bounded multi-producer single-consumer FIFO of int64 items that survives its producers.

The proposal's producer-consumer queue, for where the producers really are many: the workers that
schedule continuations. (A socket's packets go through one `lane` per worker instead.) Nobody ever
waits: `put` says 0 when the queue is full, `get` says 0 when there is nothing to take.

    head | tail, taken | capacity | slot 0: word, item | slot 1 | ...

Positions count from the start and never wrap (62 bits); position p lives in slot p % capacity. The
slot's word is the truth; head only tells producers where to look, tail the consumer.

       FREE(p) ──claim──► RESERVED(p, stamp) ──publish──► FULL(p, stamp) ──take──► FREE(p + capacity)
               a producer        │            same producer               consumer      ▲
                                 └──────────repair──────────► SKIP(p, stamp) ──pass over─┘
                                  (its producer is dead)                     consumer

A claim is one compare-and-swap that writes position, state and the claimant's stamp together: a slot
that is reserved always says by whom. The claimant then moves head on; if it is late (or dead),
any other producer does it.

Invariant, for h = head, t = tail, n = capacity, as of any moment:

 I1  The word of slot h % n is FREE(h) (nobody has claimed h), or anything of position h but FREE, or
     FREE(h + n) (h was claimed, even taken, and head is late), or not FREE and of h - n (full).
     Head moves from h to h + 1 only by compare-and-swap, after h was claimed.
 I2  The word of slot t % n is of position t, or of t + n if a consumer died between freeing t and
     moving tail, or FREE(t): nothing there yet. It never is further on: only the consumer frees.
 I3  An item is written only by the claimant of its position, while RESERVED.
 I4  FREE words carry the whole position, so a claim that comes late, however late, finds
     another word and fails. (Others carry 32 bits of it, enough to tell p - n, p and p + n apart.)

Deaths. Producer: before the claim, nothing happened. After it, `stuck` shows its stamp once the
consumer gets there, and `repair` turns the slot to SKIP: one item, which nobody had been promised,
is lost. After publishing: nothing is lost, head may be late. Consumer: before freeing, its
successor takes the same item; after, the next one (I2). To survive that, look with `peek`, do the
work, then `get`. Repairer: repairing again does the rest.

A stamp is a worker's number for its whole life, 1 ... STAMP_MAX, never given to another one; repair
is only for a stamp whose process is known to be dead.

Floor 2. `pcq_*` are for kernels; `Pcq` is the same for Python. `q` is an offset in `mem`, 64-aligned.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dataplane.jit import inlined, kernel
from dataplane.shm import layout as L
from dataplane.shm.atomics import cas, ld64, load_acquire, load_relaxed, shr, st64, store_release

__all__ = [
    "Pcq", "pcq_bytes", "pcq_claim", "pcq_get", "pcq_init", "pcq_maxitems", "pcq_peek", "pcq_publish",
    "pcq_put", "pcq_repair", "pcq_stuck",
]

MAX_RACES = 1000
"""Lost races after which a put gives up: each means that some other producer got on."""

_POSITION = 0xFFFF_FFFF     # the bits of a position that words other than FREE carry


def pcq_bytes(capacity: int) -> int:
    """Memory that a queue of `capacity` items takes. Any capacity from 1 to PCQ_MAX_CAPACITY."""
    if not 1 <= capacity <= L.PCQ_MAX_CAPACITY:
        raise ValueError(f"capacity must be 1 to {L.PCQ_MAX_CAPACITY}, not {capacity}")
    return L.PCQ_SLOTS + capacity * L.PCQ_SLOT_BYTES


# -- words -------------------------------------------------------------------------------------


@inlined
def _free(position):
    return position << 2 | L.PCQ_FREE


@inlined
def _word(position, stamp, state):
    return stamp << 34 | (position & _POSITION) << 2 | state


@inlined
def _is(word, position, state):
    """Whether a word other than FREE is of this position and state, whoever's it is."""
    return word & (_POSITION << 2 | 3) == (position & _POSITION) << 2 | state


@inlined
def _taken(word, position):
    """Whether the word is of this position, claimed and not yet freed."""
    return word & 3 != L.PCQ_FREE and shr(word, 2) & _POSITION == position & _POSITION


@inlined
def _slot(mem, q, position):
    return q + L.PCQ_SLOTS + position % ld64(mem, q + L.PCQ_CAPACITY) * L.PCQ_SLOT_BYTES


@inlined
def pcq_init(mem, q, capacity, start):
    """Makes an empty queue whose first position is `start` (0 but in tests), before any other
    process knows of it."""
    st64(mem, q + L.PCQ_HEAD, start)
    st64(mem, q + L.PCQ_TAIL, start)
    st64(mem, q + L.PCQ_TAKEN, 0)
    st64(mem, q + L.PCQ_CAPACITY, capacity)
    for position in range(start, start + capacity):
        st64(mem, _slot(mem, q, position) + L.PCQ_WORD, _free(position))


@inlined
def pcq_maxitems(mem, q):
    """How many items fit."""
    return ld64(mem, q + L.PCQ_CAPACITY)


# -- producers ---------------------------------------------------------------------------------


@inlined
def _help(mem, q, position):
    """Position is claimed: head goes on, if it still stands there."""
    # SYNC pcq-head: pairs with the load in pcq_claim; else two producers could move it on for one claim.
    cas(mem, q + L.PCQ_HEAD, position, position + 1)


@inlined
def pcq_claim(mem, q, stamp):
    """First half of a put: reserves a slot and returns its position, or -1 if the queue is full."""
    capacity = ld64(mem, q + L.PCQ_CAPACITY)
    for _ in range(MAX_RACES):
        # SYNC pcq-head: acquire, pairs with the cas in _help; else the word could be older than the head.
        head = load_acquire(mem, q + L.PCQ_HEAD)
        slot = _slot(mem, q, head)
        # SYNC pcq-word: acquire, pairs with every store to it. Before the check of head below.
        word = load_acquire(mem, slot + L.PCQ_WORD)
        if word == _free(head):
            # SYNC pcq-word: acquires from the consumer's release in _pass; else our item could be written
            # while the former one is still being read.
            if cas(mem, slot + L.PCQ_WORD, word, _word(head, stamp, L.PCQ_RESERVED)) == 1:
                return head
        elif not _taken(word, head - capacity):
            _help(mem, q, head)
        # SYNC pcq-head: pairs with the cas in _help. Full only if head still stands there: a stale
        # head's slot says nothing.
        elif load_acquire(mem, q + L.PCQ_HEAD) == head:
            return -1
    return -1


@inlined
def pcq_publish(mem, q, position, stamp, item):
    """Second half of a put: the consumer may have the item."""
    slot = _slot(mem, q, position)
    st64(mem, slot + L.PCQ_ITEM, item)
    # SYNC pcq-item: release, pairs with the load in _front; else the consumer could read the former item.
    store_release(mem, slot + L.PCQ_WORD, _word(position, stamp, L.PCQ_FULL))


@inlined
def pcq_put(mem, q, item, stamp):
    """1 if the item is in the queue, 0 if the queue is full (or a thousand races were lost)."""
    position = pcq_claim(mem, q, stamp)
    if position < 0:
        return 0
    _help(mem, q, position)
    pcq_publish(mem, q, position, stamp, item)
    return 1


# -- the consumer ------------------------------------------------------------------------------


@inlined
def _pass(mem, q, position, slot):
    """The slot is free for the next lap. In this order: a death in between leaves tail late (I2),
    the other order would leave the slot taken for ever."""
    # SYNC pcq-word: release, pairs with the cas in pcq_claim.
    store_release(mem, slot + L.PCQ_WORD, _free(position + ld64(mem, q + L.PCQ_CAPACITY)))
    # SYNC pcq-tail: release, for the successor's load in _front (and pcq_stuck's, anywhere).
    store_release(mem, q + L.PCQ_TAIL, position + 1)


@inlined
def _front(mem, q):
    """Position of the oldest item that can be taken, or -1. Passes over what was repaired."""
    capacity = ld64(mem, q + L.PCQ_CAPACITY)
    for _ in range(capacity + 1):
        # SYNC pcq-tail: ours, or our dead predecessor's in _pass.
        tail = load_acquire(mem, q + L.PCQ_TAIL)
        slot = _slot(mem, q, tail)
        # SYNC pcq-item: acquire, pairs with the release in pcq_publish.
        word = load_acquire(mem, slot + L.PCQ_WORD)
        if _is(word, tail, L.PCQ_FULL):
            return tail
        if _is(word, tail, L.PCQ_SKIP):
            _pass(mem, q, tail, slot)
        elif word == _free(tail + capacity) or _taken(word, tail + capacity):
            # SYNC pcq-tail: as in _pass, in the place of the predecessor who died there.
            store_release(mem, q + L.PCQ_TAIL, tail + 1)
        else:
            return -1
    return -1


@inlined
def pcq_peek(mem, q, target):
    """1, and the oldest item is stored at `target`; or 0. It stays in the queue."""
    position = _front(mem, q)
    if position < 0:
        return 0
    st64(mem, target, ld64(mem, _slot(mem, q, position) + L.PCQ_ITEM))
    return 1


@inlined
def pcq_get(mem, q, target):
    """1, and the oldest item is taken and stored at `target`; or 0."""
    position = _front(mem, q)
    if position < 0:
        return 0
    slot = _slot(mem, q, position)
    st64(mem, target, ld64(mem, slot + L.PCQ_ITEM))
    _pass(mem, q, position, slot)
    return 1


# -- after a death -----------------------------------------------------------------------------


@inlined
def pcq_stuck(mem, q):
    """Stamp of the producer that the consumer waits for, 0 if for none. It may just be slow."""
    # SYNC pcq-tail: acquire, pairs with the release in _pass.
    tail = load_acquire(mem, q + L.PCQ_TAIL)
    # SYNC pcq-word: acquire, pairs with the cas in pcq_claim.
    word = load_acquire(mem, _slot(mem, q, tail) + L.PCQ_WORD)
    return shr(word, 34) if _is(word, tail, L.PCQ_RESERVED) else 0


@inlined
def pcq_repair(mem, q, dead_stamp):
    """Gives up all slots that the dead producer had reserved; returns how many. Any process may do
    it while others put and get. The caller wakes the consumer."""
    given_up = 0
    for index in range(ld64(mem, q + L.PCQ_CAPACITY)):
        place = q + L.PCQ_SLOTS + index * L.PCQ_SLOT_BYTES + L.PCQ_WORD
        # SYNC pcq-word: pairs with the cas in pcq_claim; old news at worst, which the cas below tells.
        word = load_relaxed(mem, place)
        if word & 3 == L.PCQ_RESERVED and shr(word, 34) == dead_stamp:
            # SYNC pcq-word: pairs with the load in _front. Fails only against another repairer.
            given_up += cas(mem, place, word, word - L.PCQ_RESERVED + L.PCQ_SKIP)
    return given_up


# -- Python ------------------------------------------------------------------------------------


@kernel("i64(mem, i64, i64, i64)")
def _init(mem, q, capacity, start):
    pcq_init(mem, q, capacity, start)
    return 0


@kernel("i64(mem, i64, i64, i64)")
def _put(mem, q, item, stamp):
    return pcq_put(mem, q, item, stamp)


@kernel("i64(mem, i64)")
def _get(mem, q):
    return pcq_get(mem, q, q + L.PCQ_TAKEN)


@kernel("i64(mem, i64)")
def _peek(mem, q):
    return pcq_peek(mem, q, q + L.PCQ_TAKEN)


@kernel("i64(mem, i64)")
def _stuck(mem, q):
    return pcq_stuck(mem, q)


@kernel("i64(mem, i64, i64)")
def _repair(mem, q, dead_stamp):
    return pcq_repair(mem, q, dead_stamp)


class Pcq:
    """The queue at `offset` of `mem`, for the supervisor and for tests.

    `stamp` is what this process puts with; a process that never puts needs none. `get` and
    `peek` are the one consumer's.
    """

    def __init__(self, mem: npt.NDArray[np.uint8], offset: int, stamp: int = 0) -> None:
        if not 0 <= stamp <= L.STAMP_MAX:
            raise ValueError(f"stamp must be 0 to {L.STAMP_MAX}, not {stamp}")
        self._mem, self._offset, self._stamp = mem, offset, stamp
        self._taken = mem[offset + L.PCQ_TAKEN:][:8].view(np.int64)
        self._capacity = mem[offset + L.PCQ_CAPACITY:][:8].view(np.int64)

    @classmethod
    def create(cls, mem: npt.NDArray[np.uint8], offset: int, capacity: int, stamp: int = 0, *,
               start: int = 0) -> Pcq:
        """Makes an empty queue in the `pcq_bytes(capacity)` bytes at `offset`."""
        pcq_bytes(capacity)     # checks it
        _init(mem, offset, capacity, start)
        return cls(mem, offset, stamp)

    @property
    def maxitems(self) -> int:
        """How many items fit."""
        return int(self._capacity[0])

    def put(self, item: int) -> bool:
        """False when the queue is full."""
        if not self._stamp:
            raise ValueError("a producer needs a stamp")
        return bool(_put(self._mem, self._offset, item, self._stamp))

    def get(self) -> int | None:
        """Takes the oldest item; None when there is none."""
        return int(self._taken[0]) if _get(self._mem, self._offset) else None

    def peek(self) -> int | None:
        """The oldest item, which stays; None when there is none."""
        return int(self._taken[0]) if _peek(self._mem, self._offset) else None

    def stuck(self) -> int:
        """Stamp of the producer that the consumer waits for; 0: for none."""
        return int(_stuck(self._mem, self._offset))

    def repair(self, dead_stamp: int) -> int:
        """Gives up what a dead producer had reserved; returns how many items are lost with it."""
        return int(_repair(self._mem, self._offset, dead_stamp))
