"""How a handshake's last ACK becomes a connection: a slot, a PCB, a record for accept().

Called by tcp_listen (`open_connection`, `has_room`, `ring_bytes`), and for the replacement of a dead worker by
worker.attach_private (`listen_recover`).

A connection is made in this order, every step by stores of this worker:

    1  the control block in the slot, the words of the PCB, PCB_PREVIOUS = UNTOLD     the slot is free still
    2  PCB_STATE = PCB_OPEN
    3  the entry in the bucket                                      others find it, and may run its protocol
    4  the slot leaves the head of this worker's list
    5  the record for accept() in the listener's lane (staged)
    6  PCB_PREVIOUS = where in the lane it ends                     the lane is published behind the burst

A worker that dies before 2 has done nothing. Between 2 and 4 the slot is open and still at the head of the list:
`listen_recover` does 3, if it was not done, and 4. Behind 4, and until the lane is published, nobody has been
told: a staged record is forgotten (rings/lane.py). PCB_PREVIOUS then says UNTOLD, or an end behind what was
published, and the record is staged again. It names the listener's generation besides: a later listener with the
same number is told nothing.

Slots come as pcb/slots.py says. The backlog alone bounds the queue of connections to be accepted: a worker that has
fewer free slots than its share of the backlog asks the supervisor for more (PCB_WANT, W_WANT). A third segment that
finds no slot is dropped, and it takes the peer long to bring another one.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.inet.deliver import stage
from dataplane.inet.tcp_input import TCP
from dataplane.inet.tcp_service import tcp_bind
from dataplane.jit import inlined, kernel, shared
from dataplane.pcb.lookup import insert_unique, key_word, replace_entry
from dataplane.pcb.slots import slots_take
from dataplane.rings.lane import lane_room
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import cas, fill, ld32, ld64, load_acquire, load_relaxed, pause, shr, st64, store_release
from dataplane.shm.epoch import offline, online
from dataplane.shm.libc import CLOCK_REALTIME, clock_ns
from dataplane.tcp.handshake import (
    E_BYTES,
    E_FLAGS,
    E_IRS,
    E_ISS,
    E_MSS,
    E_SHIFT,
    E_TS_OFFSET,
    E_TSVAL,
    EF_SCALE,
    EF_TIMESTAMPS,
)
from dataplane.tcp.opening import conn_establish
from dataplane.tcp.service import service_install
from dataplane.tcp.syncache import SC_SCRATCH
from dataplane.tcp.window import receive_shift

__all__ = [
    "ELSEWHERE", "FACTS", "INTAKE", "PACKET", "PORTS", "RECORD", "SEGMENT", "has_room", "listen_recover",
    "open_connection", "ring_bytes",
]

# In the SYN cache's scratch memory, for tcp_listen and tcp_time_wait as well:
SEGMENT = SC_SCRATCH            # the segment, parsed: S_BYTES
FACTS = SC_SCRATCH + 192        # its handshake: E_BYTES
RECORD = SC_SCRATCH + 320       # what is to be sent: O_BYTES
ACCEPT = SC_SCRATCH + 512       # the listener's record: A_BYTES
PACKET = SC_SCRATCH + 576       # a packet to be answered that is long gone: P_BYTES
PORTS = PACKET + L.P_BYTES      # and its ports

INTAKE = 64                     # slots moved from the queue at a time
ELSEWHERE = 1 << 40             # flag beside a PCB's number: another worker has made this connection
_TRIES = 64                     # looks at a bucket that another writer has locked

_GENERATION = 0x7F_FFFF         # PCB_PREVIOUS of a connection: listener's generation:23 | lane position / 16:40
_UNTOLD = 0xFF_FFFF_FFFF

assert SEGMENT + T.S_BYTES <= FACTS and FACTS + E_BYTES <= RECORD and RECORD + T.O_BYTES <= ACCEPT
assert ACCEPT + T.A_BYTES <= PACKET and PORTS + 8 <= SC_SCRATCH + 1024


@inlined
def _pcb(mem, w, number):
    return ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS) + number * L.PCB_BYTES


# -- slots -----------------------------------------------------------------------------------------


@inlined
def _head(mem, w, listener):
    """Place of the head of this worker's list of the listener's slots."""
    table = ld64(mem, w + L.W_TABLE)
    row = ld64(mem, w + L.W_INDEX) * ld64(mem, table + L.T_SOCKETS)
    return ld64(mem, table + L.T_SLOT_HEADS) + (row + listener) * 8


@inlined
def _free(mem, w, listener):
    """How many free slots of the listener's this worker has."""
    first = ld64(mem, _head(mem, w, listener))
    return ld64(mem, _pcb(mem, w, first - 1) + L.PCB_DEPTH) if first > 0 else 0


@shared
def _slot(mem, w, listener):
    """The listener's first free slot, or -1. It stays in the list."""
    head = _head(mem, w, listener)
    if ld64(mem, head) <= 0:
        slots_take(mem, w, INTAKE)
    return max(ld64(mem, head) - 1, -1)


@shared
def _want(mem, w, listener):
    """Asks for slots if fewer are left than this worker's share of the backlog. Slots that are in the queue already
    count: the supervisor takes PCB_WANT back behind them."""
    pcb = _pcb(mem, w, listener)
    workers = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_WORKERS)
    share = (ld64(mem, pcb + L.PCB_BACKLOG) + workers - 1) // workers
    if load_relaxed(mem, pcb + L.PCB_WANT) != 0 or _free(mem, w, listener) >= share:
        return
    while slots_take(mem, w, INTAKE) == INTAKE and _free(mem, w, listener) < share:
        pass
    if _free(mem, w, listener) < share:
        st64(mem, pcb + L.PCB_WANT, 1)
        st64(mem, w + L.W_WANT, 1)


@shared
def _waiting(mem, w, listener):
    """Connections that the listener has not accepted yet, over all workers' lanes. What its owner says to have
    taken is believed up to what was given."""
    table = ld64(mem, w + L.W_TABLE)
    state = ld64(mem, table + L.T_LANES) + listener * L.LS_BYTES
    total = 0
    for _ in range(ld64(mem, table + L.T_WORKERS)):
        lane = ld64(mem, state + L.LS_BASE)
        if lane != 0:
            given = load_relaxed(mem, state + L.LS_COUNT)
            total += given - min(max(load_relaxed(mem, lane + L.LANE_CONSUMED), 0), given)
        state += ld64(mem, table + L.T_SOCKETS) * L.LS_BYTES
    return total


@inlined
def has_room(mem, w, listener):
    """Whether one more connection may wait to be accepted."""
    state = ld64(mem, w + L.W_LANES) + listener * L.LS_BYTES
    if ld64(mem, state + L.LS_BASE) == 0 or lane_room(mem, state, T.A_BYTES) != 1:
        return False
    return _waiting(mem, w, listener) < ld64(mem, _pcb(mem, w, listener) + L.PCB_BACKLOG)


@shared
def ring_bytes(mem, w, listener):
    """Bytes of the receive ring that a connection of this listener will have: the same for all."""
    slot = _slot(mem, w, listener)
    return 1 << (shr(ld64(mem, _pcb(mem, w, slot if slot >= 0 else listener) + L.PCB_BUFFERS), 8) & 0x3F)


# -- the connection ---------------------------------------------------------------------------------


@shared
def _establish(mem, w, nif, p, f, slot):
    """Step 1, the slot: its control block."""
    s = ld64(mem, w + L.W_SYN_CACHE) + SEGMENT
    x = ld64(mem, w + L.W_TCP_EXCHANGE)
    tcp_bind(mem, w, x, slot)
    t = x + T.X_TCB
    fill(mem, t, 0, T.TCB_BYTES)
    flags = ld64(mem, f + E_FLAGS)
    shift = ld64(mem, f + E_SHIFT) if flags & EF_SCALE else 0
    ring = ld64(mem, x + T.X_RCV_MASK) + 1
    st64(mem, t + T.T_ISS, ld32(mem, f + E_ISS))
    st64(mem, t + T.T_IRS, ld32(mem, f + E_IRS))
    st64(mem, t + T.T_TS_OFFSET, ld32(mem, f + E_TS_OFFSET))
    if flags & EF_TIMESTAMPS:
        # RFC 7323 section 4.3: this segment's, which is the first behind the SYN.
        has = ld64(mem, s + T.S_OPTIONS) & T.SO_TIMESTAMPS
        st64(mem, t + T.T_TS_RECENT, ld64(mem, s + T.S_TSVAL) if has else ld32(mem, f + E_TSVAL))
        st64(mem, t + T.T_TS_RECENT_AT, ld64(mem, x + T.X_NOW))
    st64(mem, t + T.T_FLAGS, flags)
    st64(mem, t + T.T_SND_SHIFT, shift)
    st64(mem, t + T.T_RCV_SHIFT, receive_shift(ring) if flags & EF_SCALE else 0)
    st64(mem, t + T.T_PEER_MSS, ld32(mem, f + E_MSS))
    st64(mem, t + T.T_MTU, ld64(mem, nif + L.N_MTU))
    st64(mem, t + T.T_IP_BYTES, 20 if ld64(mem, p + L.P_FAMILY) == 4 else 40)
    st64(mem, t + T.T_SND_WND, ld64(mem, s + T.S_WINDOW) << shift)
    st64(mem, x + T.X_EVENTS, 0)
    conn_establish(mem, x)
    service_install(mem, x)


@shared
def _fill(mem, w, p, slot, listener):
    """Step 1, the PCB. Its owner, memory and lanes are the slot's; the former connection's numbers are not."""
    pcb = _pcb(mem, w, slot)
    family = L.KEY_FAMILY4 if ld64(mem, p + L.P_FAMILY) == 4 else L.KEY_FAMILY6
    st64(mem, pcb + L.PCB_GENERATION, (ld64(mem, pcb + L.PCB_GENERATION) + 1) & 0x7FFF_FFFF)
    st64(mem, pcb + L.PCB_LOCAL_HI, ld64(mem, p + L.P_TARGET_HI))
    st64(mem, pcb + L.PCB_LOCAL_LO, ld64(mem, p + L.P_TARGET_LO))
    st64(mem, pcb + L.PCB_REMOTE_HI, ld64(mem, p + L.P_SOURCE_HI))
    st64(mem, pcb + L.PCB_REMOTE_LO, ld64(mem, p + L.P_SOURCE_LO))
    st64(mem, pcb + L.PCB_KEY, key_word(L.CLASS_CONNECTED, TCP, ld64(mem, p + L.P_PORTS)) | family << 48)
    st64(mem, pcb + L.PCB_GROUP, 0)
    st64(mem, pcb + L.PCB_DUE, 0)
    generation = ld64(mem, _pcb(mem, w, listener) + L.PCB_GENERATION) & _GENERATION
    st64(mem, pcb + L.PCB_PREVIOUS, generation << 40 | _UNTOLD)


@shared
def _insert(mem, w, slot):
    """Step 3: 1; else as insert_unique. A connection of this key that is in TIME_WAIT gives its entry up: its
    state says so first, so that the continuation worker, which may be about to remove the entry, does not
    (whoever changes the state may touch the entry); then it is told to end."""
    table = ld64(mem, w + L.W_TABLE)
    result = -1
    for _ in range(_TRIES):
        result = insert_unique(mem, table, slot, ld64(mem, w + L.W_STAMP))
        if result != -1:
            break
        pause()
    if result > -2:
        return result
    other = _pcb(mem, w, -2 - result)
    # SYNC time-wait-end: one of the two gets it; pairs with the cas of the continuation worker (kcont).
    if ld64(mem, other + L.PCB_KIND) != L.PK_TIME_WAIT or cas(mem, other + L.PCB_STATE, L.PCB_OPEN, L.PCB_CLOSING) == 0:
        return result
    replace_entry(mem, table, -2 - result, slot)
    st64(mem, other + L.PCB_TW_UNTIL, ld64(mem, w + L.W_MONOTONIC))
    return 1


@shared
def _tell(mem, w, slot, listener):
    """Steps 5 and 6: the record for accept(). 1, or 0 if the lane has no room."""
    pcb = _pcb(mem, w, slot)
    a = ld64(mem, w + L.W_SYN_CACHE) + ACCEPT
    key = ld64(mem, pcb + L.PCB_KEY)
    st64(mem, a + T.A_PCB, slot | ld64(mem, pcb + L.PCB_GENERATION) << 32)
    st64(mem, a + T.A_SEGMENT, ld64(mem, pcb + L.PCB_SEGMENT))
    st64(mem, a + T.A_SLOT, ld64(mem, pcb + L.PCB_SLOT_AT))
    family = 4 if (key >> 48) & L.KEY_FAMILY4 else 6
    st64(mem, a + T.A_FAMILY, family | (key >> 16 & 0xFFFF) << 16 | (key & 0xFFFF) << 32)
    st64(mem, a + T.A_REMOTE_HI, ld64(mem, pcb + L.PCB_REMOTE_HI))
    st64(mem, a + T.A_REMOTE_LO, ld64(mem, pcb + L.PCB_REMOTE_LO))
    st64(mem, a + T.A_LOCAL_HI, ld64(mem, pcb + L.PCB_LOCAL_HI))
    st64(mem, a + T.A_LOCAL_LO, ld64(mem, pcb + L.PCB_LOCAL_LO))
    state = ld64(mem, w + L.W_LANES) + listener * L.LS_BYTES
    if stage(mem, w, state, 0, clock_ns(mem, w + L.W_SCRATCH, CLOCK_REALTIME), a, T.A_BYTES) == 1:
        generation = ld64(mem, _pcb(mem, w, listener) + L.PCB_GENERATION) & _GENERATION
        st64(mem, pcb + L.PCB_PREVIOUS, generation << 40 | ld64(mem, state + L.LS_HEAD) >> 4)
        return 1
    return 0


@shared
def open_connection(mem, w, nif, p, f, listener):
    """Makes the connection: its PCB's number, or -reason. If another worker was first it is that one's | ELSEWHERE."""
    slot = _slot(mem, w, listener)
    if slot < 0 or not has_room(mem, w, listener):
        _want(mem, w, listener)
        return -ledger.TCP_BACKLOG
    pcb = _pcb(mem, w, slot)
    _establish(mem, w, nif, p, f, slot)
    _fill(mem, w, p, slot, listener)
    # SYNC slot-open: release, so that whoever finds the slot open finds all of it; pairs with the acquire
    # in listen_recover of a replacement.
    store_release(mem, pcb + L.PCB_STATE, L.PCB_OPEN)
    inserted = _insert(mem, w, slot)
    if inserted != 1:
        # Nobody has found it: free again, at the head of the list as before.
        st64(mem, pcb + L.PCB_STATE, L.PCB_SLOT)
        if inserted <= -2 and ld64(mem, _pcb(mem, w, -2 - inserted) + L.PCB_KIND) == L.PK_CONNECTION:
            return -2 - inserted | ELSEWHERE
        return -ledger.TCP_BACKLOG
    st64(mem, _head(mem, w, listener), ld64(mem, pcb + L.PCB_NEXT))
    _tell(mem, w, slot, listener)
    _want(mem, w, listener)
    return slot


# -- after a death -----------------------------------------------------------------------------------------------


@shared
def _finish_open(mem, w, listener):
    """Steps 3 and 4, for a slot that is open and still at the head of the list."""
    head = _head(mem, w, listener)
    slot = ld64(mem, head) - 1
    pcb = _pcb(mem, w, slot)
    # SYNC slot-open: acquire pairs with the release in open_connection of the dead worker.
    if slot < 0 or load_acquire(mem, pcb + L.PCB_STATE) != L.PCB_OPEN:
        return
    found = _insert(mem, w, slot)
    if found == 1 or found == -2 - slot:
        st64(mem, head, ld64(mem, pcb + L.PCB_NEXT))
    else:
        st64(mem, pcb + L.PCB_STATE, L.PCB_SLOT)


@shared
def _tell_again(mem, w, slot):
    """Steps 5 and 6, unless the record was published."""
    pcb = _pcb(mem, w, slot)
    listener = ld64(mem, pcb + L.PCB_LISTENER) - 1
    if listener < 0 or ld64(mem, pcb + L.PCB_WORKER) != ld64(mem, w + L.W_INDEX):
        return 0
    above = _pcb(mem, w, listener)
    state = ld64(mem, w + L.W_LANES) + listener * L.LS_BYTES
    told = ld64(mem, pcb + L.PCB_PREVIOUS)
    if ld64(mem, above + L.PCB_STATE) != L.PCB_OPEN or ld64(mem, above + L.PCB_KIND) != L.PK_LISTEN:
        return 0
    if told >> 40 != ld64(mem, above + L.PCB_GENERATION) & _GENERATION:
        return 0
    if told & _UNTOLD <= ld64(mem, state + L.LS_PUBLISHED) >> 4:
        return 0
    # Its segment is lost with the dead worker's burst; the record is a delivery all the same.
    st64(mem, w + L.W_DELIVERIES, ld64(mem, w + L.W_DELIVERIES) + _tell(mem, w, slot, listener))
    return 1


@kernel("i64(mem, i64)")
def listen_recover(mem, w):
    """For the replacement of a dead worker, behind step.recover and buckets_unlock: connections that were being made
    are made. Returns how many are staged for accept() again; the first step publishes them."""
    online(mem, w)
    table = ld64(mem, w + L.W_TABLE)
    told = 0
    for number in range(ld64(mem, table + L.T_TIME_WAIT_AT)):
        if ld64(mem, _pcb(mem, w, number) + L.PCB_KIND) == L.PK_LISTEN:
            _finish_open(mem, w, number)
    for number in range(ld64(mem, table + L.T_TIME_WAIT_AT)):
        pcb = _pcb(mem, w, number)
        if ld64(mem, pcb + L.PCB_KIND) == L.PK_CONNECTION and ld64(mem, pcb + L.PCB_STATE) == L.PCB_OPEN:
            told += _tell_again(mem, w, number)
    offline(mem, w)
    return told
