"""Free slots: how memory for accepted connections gets to the RX workers, and how it is called back.

A slot is a PCB in PCB_SLOT with room in its listener's owner segment. The supervisor (new ones) and the
continuation worker (used ones) put its number into the queue of the RX worker that it belongs to,
PCB_WORKER; that worker alone moves it into its list of the slot's listener, T_SLOT_HEADS[worker][listener],
linked by PCB_NEXT, and takes it from there for a new connection. The list is a stack: the slot that was used last is
used next, so that of many slots few have memory. PCB_DEPTH of each says how many there are from it on.

Invariant: a PCB in PCB_SLOT is in exactly one queue or list, or about to be moved from the one to the other by
its worker. `slots_take` puts it into the list before it leaves the queue, and does not link what stands at the
head already: a worker that dies between the two has moved it or has not, and its replacement goes on.

The end of a listener. (1) The supervisor takes it out of its bucket and lets every worker pass an epoch:
nobody takes from its lists any more. (2) The continuation worker obeys `Unlisten`: whatever it has put into a
queue for this listener is there by now, and nothing follows, since it looks at the listener's state before it
puts. (3) Each RX worker obeys `Unlisten` (`forget`): all of its queue goes into lists, and the listener's list
gets the head FORGOTTEN, which is how the supervisor knows that it was done, by this process or by its
replacement. Now all slots in PCB_SLOT of that listener are in nobody's hands: the supervisor's. (4) The others,
with live connections, lose their PCB_LISTENER, and (5) once the continuation worker has answered once more, it
does not hold the listener's number in any variable either: the number may be used again.

Floor 2. Called by RX workers between bursts, and by the order `Unlisten`.
"""

from __future__ import annotations

from dataplane.jit import inlined, kernel, shared
from dataplane.rings.pcq import pcq_get, pcq_peek
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64, st64, store_release

__all__ = ["FORGOTTEN", "forget", "slots_take"]

FORGOTTEN = -1
"""Head of a closed listener's list. Nobody looks there: the listener is not found any more."""


@inlined
def _head(mem, w, listener):
    table = ld64(mem, w + L.W_TABLE)
    row = ld64(mem, w + L.W_INDEX) * ld64(mem, table + L.T_SOCKETS)
    return ld64(mem, table + L.T_SLOT_HEADS) + (row + listener) * 8


@inlined
def _link(mem, table, head, number):
    """Puts the slot in front, once."""
    first = ld64(mem, head)
    if first != number + 1:
        pcbs = ld64(mem, table + L.T_PCBS)
        pcb = pcbs + number * L.PCB_BYTES
        depth = ld64(mem, pcbs + (first - 1) * L.PCB_BYTES + L.PCB_DEPTH) if first > 0 else 0
        st64(mem, pcb + L.PCB_NEXT, max(first, 0))
        st64(mem, pcb + L.PCB_DEPTH, depth + 1)
        # SYNC slot-head: release; a replacement, which looks once we are dead, finds the link behind every head.
        store_release(mem, head, number + 1)


@shared
def slots_take(mem, w, most):
    """Moves up to `most` slots from the worker's queue into its lists; returns how many."""
    table = ld64(mem, w + L.W_TABLE)
    queue = ld64(mem, table + L.T_SLOT_QUEUES) + ld64(mem, w + L.W_INDEX) * ld64(mem, table + L.T_SLOT_QUEUE_BYTES)
    target = queue + L.PCQ_TAKEN
    for taken in range(most):
        if pcq_peek(mem, queue, target) == 0:
            return taken
        number = ld64(mem, target)
        pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
        listener = ld64(mem, pcb + L.PCB_LISTENER) - 1
        # One in use: a dead predecessor had linked it, and it was taken from the list before we came here.
        if ld64(mem, pcb + L.PCB_STATE) == L.PCB_SLOT and listener >= 0:
            _link(mem, table, _head(mem, w, listener), number)
        pcq_get(mem, queue, target)
    return most


@kernel("i64(mem, i64, i64)")
def forget(mem, w, listener):
    """The worker knows nothing of this listener's slots any more; 0."""
    slots_take(mem, w, ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_SOCKETS) + 1)
    # SYNC slot-head: release, for the supervisor's look at it (Table.forgotten): the queue is empty by then.
    store_release(mem, _head(mem, w, listener), FORGOTTEN)
    return 0
