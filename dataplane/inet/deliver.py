"""Putting packets into sockets' lanes, and publishing them once a burst.

Called by the inputs and by demux. A result says how a packet fared with all the sockets that it
was meant for: the number of deliveries in the lower bits, and flags; `merge` adds two of them.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.rings.lane import LANE_FULL, lane_publish, lane_room, lane_stage
from dataplane.rings.wake import wake_armed, wake_notify
from dataplane.shm import layout as L
from dataplane.shm.atomics import acquire, fence, ld64, load_relaxed, st64, store_release
from dataplane.shm.libc import write

__all__ = [
    "CHECK", "COUNT", "FULL", "MATCHED", "NEVER", "STAGE", "count_reason", "merge", "offer", "publish", "record_word",
    "stage", "tap_input", "wake_waiter",
]

CHECK, STAGE = 0, 1
"""Modes of a visit: only look whether there is room (netifs with backpressure), or do it."""

COUNT = (1 << 32) - 1
MATCHED = 1 << 40       # somebody wanted it
FULL = 1 << 41          # somebody's ring was full
NEVER = 1 << 42         # somebody's ring is too small for it


@inlined
def merge(a, b):
    """Two results as one: deliveries add up, flags stay."""
    return ((a & COUNT) + (b & COUNT)) | ((a | b) & ~COUNT)


@shared
def wake_waiter(mem, w, wake, owner):
    """Wakes whoever sleeps on the wake object, if somebody does. A bell's number comes from memory that the
    consumer can write: only one that was given to the consumer `owner` is used. `w`: worker block, also the
    continuation worker's."""
    if wake_notify(mem, wake) != L.WAKE_PIPE:
        return
    number = load_relaxed(mem, wake + L.WAKE_EVENT)     # hostile: read once, then checked
    if number < 0 or number >= L.EVENTS_MAX:
        return
    event = ld64(mem, w + L.W_EVENTS) + 16 * number
    if ld64(mem, event) >= 0 and ld64(mem, event + 8) == owner:
        st64(mem, w + L.W_SCRATCH + 240, 1)
        write(mem, ld64(mem, event), w + L.W_SCRATCH + 240, 8)


@shared
def _wake(mem, w, state):
    """Wakes the socket's waiter, which sleeps."""
    table = ld64(mem, w + L.W_TABLE)
    pcb = ld64(mem, table + L.T_PCBS) + (state - ld64(mem, w + L.W_LANES)) // L.LS_BYTES * L.PCB_BYTES
    wake_waiter(mem, w, ld64(mem, state + L.LS_WAKE), ld64(mem, pcb + L.PCB_OWNER))


@inlined
def _book(mem, w, row):
    """Lets the burst's deliveries enter the ledger."""
    st64(mem, row + L.L_DELIVERED, ld64(mem, row + L.L_DELIVERED) + ld64(mem, w + L.W_DELIVERED))
    st64(mem, row + L.L_DELIVERIES, ld64(mem, row + L.L_DELIVERIES) + ld64(mem, w + L.W_DELIVERIES))
    st64(mem, w + L.W_DELIVERED, 0)
    st64(mem, w + L.W_DELIVERIES, 0)


@shared
def publish_lanes(mem, w, row):
    """Hands everything that was staged to its consumers, books it in the ledger's `row` (0: in none), and
    wakes those that sleep. In this order: waking takes by far the longest, and what a worker that dies
    there had published shall not count as lost."""
    count = ld64(mem, w + L.W_DIRTY_COUNT)
    dirty = ld64(mem, w + L.W_DIRTY)
    for i in range(count):
        lane_publish(mem, ld64(mem, dirty + 16 * i))
    if row != 0:
        _book(mem, w, row)
    # SYNC wake-state: one full barrier for the whole burst, between the heads just published
    # and the wake words about to be read; pairs with the exchange in wake_arm. Without it a
    # consumer could arm and find its ring empty while we still see it awake: a lost wakeup.
    fence()
    for i in range(count):
        state = ld64(mem, dirty + 16 * i)
        wake = ld64(mem, state + L.LS_WAKE)     # 0: a TCP connection's, whose time comes later (tcp_service.py)
        if wake != 0 and wake_armed(mem, wake):
            _wake(mem, w, state)
    st64(mem, w + L.W_DIRTY_COUNT, 0)


@inlined
def _mark_dirty(mem, w, state):
    """The lane has something to publish; the list has room for every lane once. Its packet count stands
    beside it, so that the replacement of a worker that dies now can take back what was never published."""
    count = ld64(mem, w + L.W_DIRTY_COUNT)
    entry = ld64(mem, w + L.W_DIRTY) + 16 * count
    st64(mem, entry, state)
    st64(mem, entry + 8, ld64(mem, state + L.LS_COUNT))
    # SYNC lane-recover: release, so that the entry comes before the count that includes it; pairs with the acquire
    # in step.recover of a replacement.
    store_release(mem, w + L.W_DIRTY_COUNT, count + 1)


@inlined
def stage(mem, w, state, word, time, source, length):
    """Stages a packet in one lane: 1, LANE_FULL or LANE_NEVER. The socket's counters are kept."""
    clean = ld64(mem, state + L.LS_HEAD) == ld64(mem, state + L.LS_PUBLISHED)
    done = lane_stage(mem, state, word, time, source, length)
    if done != 1:
        st64(mem, state + L.LS_DROPPED, ld64(mem, state + L.LS_DROPPED) + 1)
        return done
    if clean:
        _mark_dirty(mem, w, state)
    # SYNC lane-recover: release, behind the entry that has the count before; pairs with the acquire in step.recover;
    # else the compiler could count first, and what a death in between leaves could not be taken back.
    store_release(mem, state + L.LS_COUNT, ld64(mem, state + L.LS_COUNT) + 1)
    return 1


@inlined
def offer(mem, w, number, mode, word, time, source, length):
    """Visits one socket: stages the packet, or only looks for room. A result."""
    state = ld64(mem, w + L.W_LANES) + number * L.LS_BYTES
    if ld64(mem, state + L.LS_BASE) == 0:
        return 0
    if mode == CHECK:
        done = lane_room(mem, state, length)
    else:
        done = stage(mem, w, state, word, time, source, length)
    if done == 1:
        return MATCHED | 1
    return MATCHED | (FULL if done == LANE_FULL else NEVER)


@inlined
def record_word(mem, p, payload):
    """First word of an IP packet's record, without its length. `payload`: offset in the packet."""
    word = payload << 32
    vlan = ld64(mem, p + L.P_VLAN)
    if vlan >= 0:
        word |= vlan << 48 | L.RECORD_VLAN << 24
    if ld64(mem, p + L.P_FLAGS) & L.PF_REASSEMBLED:
        word |= L.RECORD_REASSEMBLED << 24
    return word


@shared
def tap_input(mem, w, p, mode):
    """A copy of the frame as it was on the wire for every tap. A result."""
    table = ld64(mem, w + L.W_TABLE)
    pcbs = ld64(mem, table + L.T_PCBS)
    word = ld64(mem, p + L.P_WIRE) << 32 | L.RECORD_FRAME << 24
    result = 0
    following = ld64(mem, table + L.T_TAPS)
    # SYNC chain: acquire pairs with chain_push and chain_remove; else a PCB could be seen
    # before it was written.
    acquire()
    while following != 0:
        number = following - 1
        result = merge(result, offer(mem, w, number, mode, word, ld64(mem, p + L.P_TIME),
                                     ld64(mem, p + L.P_FRAME), ld64(mem, p + L.P_LENGTH)))
        following = ld64(mem, pcbs + number * L.PCB_BYTES + L.PCB_NEXT)
    return result


@inlined
def count_reason(mem, nif, code, frames):
    """Counts `frames` of the netif's queue under a reason of the ledger."""
    place = nif + L.N_LEDGER + L.L_REASONS + 8 * code
    st64(mem, place, ld64(mem, place) + frames)


@inlined
def publish(mem, w, nif):
    """End of a burst of `nif`: what was staged is published, and enters the ledger."""
    if ld64(mem, w + L.W_DIRTY_COUNT) != 0:
        publish_lanes(mem, w, nif + L.N_LEDGER)
