"""Where the continuation worker keeps what is its own: private memory, made anew by each replacement.

Numbers and the function that makes it. Nothing in here has to survive: all of it can be made again from the
table (reaper.py). Bounded: so many bytes for each PCB, none for a timer.
"""

from __future__ import annotations

from typing import Any

from dataplane.shm import layout as L

__all__ = ["attach_area"]

LEVELS = 7              # of 64 slots each: 2^42 ms are 139 years of uptime

K_TICK = 0              # ms up to which the wheel has turned
K_ENTRIES = 8           # place of the wheel's entries, [PCB] of E_BYTES
K_DONE = 16             # place of the numbers to be reported as freed, [PCB]; and how many
K_DONE_COUNT = 24
K_WAIT = 32             # place of the ring of those that wait for an epoch: (number, epoch) each
K_WAIT_MASK = 40
K_WAIT_HEAD = 48        # next free place, next to be looked at
K_WAIT_TAIL = 56
K_POOL = 64             # place of the stack of free TIME_WAIT PCBs; and how many
K_POOL_COUNT = 72
K_AGE = 80              # place of the list of TIME_WAIT PCBs in use by age, [PCB - T_TIME_WAIT_AT] of (next, previous)
K_OLDEST = 88           # its ends: PCB + 1, 0: empty
K_NEWEST = 96
K_ORPHANS = 104         # place of [PCB]: when an abandoned connection is ended by force, ns; 0: not abandoned
K_LANE = 112            # place of the state of our transmit lane: LS_...
K_SLEEPING = 120        # place of HOME_SLEEPING of the worker that transmits for us
K_ROPE = 128            # ringing end of its doorbell
K_BODY = 136            # place of a transmit record's body
K_SWEPT = 144           # ns: last sweep because of a queue that is stuck
K_LOOK = 152            # ns to wait until the next look at the epochs
K_SENT = 160            # place of [PCB]: head of our transmit lane behind the last record about the connection
K_BITS = 192            # [LEVELS] slots that are not empty
K_HEADS = 256           # [LEVELS][64] first entry: PCB + 1
K_BYTES = K_HEADS + LEVELS * 64 * 8

E_NEXT = 0              # PCB + 1
E_PREVIOUS = 8
E_WHEN = 16             # ms
E_SLOT = 24             # level * 64 + slot + 1; 0: not in the wheel
E_BYTES = 32


def attach_area(arena: Any, table: Any, home: int, tx_ring_bytes: int, rope: int, stamp: int) -> int:
    """Makes the private area, and fills the continuation worker's block. `home`: what stands in for a home segment,
    with the transmit lane; `rope`: rings worker 0. Returns the block's offset."""
    block: int = table.worker(table.workers)
    sockets, first = table.get(table.offset + L.T_SOCKETS), table.get(table.offset + L.T_TIME_WAIT_AT)
    ring = 1 << (2 * sockets).bit_length()
    k: int = arena.map_anonymous(K_BYTES)
    areas = [(K_ENTRIES, sockets * E_BYTES), (K_DONE, sockets * 8), (K_WAIT, ring * 16),
             (K_POOL, (sockets - first + 1) * 8), (K_AGE, (sockets - first + 1) * 16), (K_ORPHANS, sockets * 8),
             (K_SENT, sockets * 8), (K_LANE, L.LS_BYTES), (K_BODY, 4096)]
    for word, size in areas:
        table.put(k + word, arena.map_anonymous(size))
    table.put(k + K_WAIT_MASK, ring - 1)
    table.put(k + K_SLEEPING, home + L.HOME_SLEEPING)
    table.put(k + K_ROPE, rope)
    lane, state = home + L.HOME_TX, table.get(k + K_LANE)
    for word, value in ((L.LS_HEAD, table.get(lane + L.LANE_HEAD)), (L.LS_PUBLISHED, table.get(lane + L.LANE_HEAD)),
                        (L.LS_TAIL, table.get(lane + L.LANE_TAIL)), (L.LS_BASE, lane),
                        (L.LS_MASK, tx_ring_bytes - 1)):
        table.put(state + word, value)
    sent = table.get(k + K_SENT)        # a predecessor's records may be about any of them
    arena.mem[sent:sent + sockets * 8].view("i8")[:] = table.get(lane + L.LANE_HEAD)
    events: int = arena.map_anonymous(L.EVENTS_MAX * 16)
    arena.mem[events:events + L.EVENTS_MAX * 16].view("i8")[:] = -1
    table.put(block + L.W_EVENTS, events)
    table.put(block + L.W_INDEX, table.workers)
    table.put(block + L.W_TABLE, table.offset)
    table.put(block + L.W_STAMP, stamp)
    table.put(block + L.W_KCONT, k)
    return block
