"""Packets that wait for their neighbour's link-layer address (RFC 1122 section 2.3.2.2).

Used by packets, which fills it, and neighbour, which empties it. The store is one worker's own
memory, of a fixed size: SMALL_SLOTS for packets of an ordinary MTU and LARGE_SLOTS for datagrams
that will be fragmented when they go. A packet waits for WAIT_NS at most. When there is no room the
new packet is refused: the older ones are nearer to their answer.

    count | order: slot numbers, the oldest first | slots: words, packet
"""

from __future__ import annotations

from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import copy, ld64, st64

__all__ = [
    "SLOT_PACKET", "pending_bytes", "pending_count", "pending_drop", "pending_expired", "pending_hold",
    "pending_keep", "pending_slot", "pending_trim",
]

WAIT_NS = 1_000_000_000
SMALL_SLOTS = 64
LARGE_SLOTS = 4

COUNT = 0
ORDER = 64
SLOT_USED = 0
SLOT_NIF = 8
SLOT_HI = 16            # the neighbour
SLOT_LO = 24
SLOT_LENGTH = 32
SLOT_DEADLINE = 40
SLOT_PACKET = 64
SMALL_BYTES = 2048
LARGE_BYTES = 65664     # SLOT_PACKET and the largest IPv6 packet, 65,575
_SLOTS = ORDER + 8 * (SMALL_SLOTS + LARGE_SLOTS) + 32

assert _SLOTS % 64 == 0


def pending_bytes() -> int:
    """Size of a store. Fresh, zero-filled memory is an empty one."""
    return _SLOTS + SMALL_SLOTS * SMALL_BYTES + LARGE_SLOTS * LARGE_BYTES


@shared
def _slot(store, number):
    """Place of slot `number`: the small ones come first."""
    large = max(number - SMALL_SLOTS, 0)
    return store + _SLOTS + (number - large) * SMALL_BYTES + large * LARGE_BYTES


@shared
def _vacant(mem, store, size):
    """Number of a free slot for a packet of `size` bytes, or -1."""
    first = 0 if size <= SMALL_BYTES - SLOT_PACKET else SMALL_SLOTS
    for number in range(first, SMALL_SLOTS + LARGE_SLOTS):
        if ld64(mem, _slot(store, number) + SLOT_USED) == 0:
            return number
    return -1


@shared
def pending_count(mem, w):
    """How many packets wait."""
    return ld64(mem, ld64(mem, w + L.W_PENDING) + COUNT)


@shared
def pending_hold(mem, w, nif, hi, lo, packet, size):
    """Copies the packet to wait for the neighbour (hi, lo): 1, or 0 if there is no room."""
    store = ld64(mem, w + L.W_PENDING)
    number = _vacant(mem, store, size)
    if number < 0:
        return 0
    slot = _slot(store, number)
    st64(mem, slot + SLOT_USED, 1)
    st64(mem, slot + SLOT_NIF, nif)
    st64(mem, slot + SLOT_HI, hi)
    st64(mem, slot + SLOT_LO, lo)
    st64(mem, slot + SLOT_LENGTH, size)
    st64(mem, slot + SLOT_DEADLINE, ld64(mem, w + L.W_MONOTONIC) + WAIT_NS)
    copy(mem, slot + SLOT_PACKET, packet, size)
    count = ld64(mem, store + COUNT)
    st64(mem, store + ORDER + 8 * count, number)
    st64(mem, store + COUNT, count + 1)
    return 1


@shared
def pending_slot(mem, w, index):
    """Place of the slot that is number `index` in order of arrival."""
    store = ld64(mem, w + L.W_PENDING)
    return _slot(store, ld64(mem, store + ORDER + 8 * index))


@shared
def pending_expired(mem, w, slot):
    """Whether the packet has waited long enough."""
    return ld64(mem, w + L.W_MONOTONIC) >= ld64(mem, slot + SLOT_DEADLINE)


@shared
def pending_drop(mem, slot):
    """Frees the slot. Its place in the order goes with `pending_trim`."""
    st64(mem, slot + SLOT_USED, 0)


@shared
def pending_keep(mem, w, kept, index):
    """Moves number `index` up to be number `kept`: closes the gaps of those that went."""
    order = ld64(mem, w + L.W_PENDING) + ORDER
    st64(mem, order + 8 * kept, ld64(mem, order + 8 * index))


@shared
def pending_trim(mem, w, count):
    """So many are left."""
    st64(mem, ld64(mem, w + L.W_PENDING) + COUNT, count)
