"""One connection's protocol, run by whoever holds its lock: the same routine for all three callers.

    RX worker             behind a burst, if the lock is free and an ACK is due (inet/tcp_service.py)
    consumer              when it calls in (client/tcp_run.py)
    continuation worker   when a timer is due, or for an owner that does not call (kcont)

    if service_begin(mem, x):              # lock, copy, clamp
        while True:
            service_run(mem, x)            # lanes, requests, timers, output
            ... send what is in X_OUT ...
            while ld64(mem, x + T.X_EVENTS) & T.EV_MORE:
                service_more(mem, x)
                ... send what is in X_OUT ...
            if not service_commit(mem, x): # copy back, unlock; 1: locked again, somebody had come meanwhile
                break

The slot is its owner's memory, and the owner may be hostile: it may write anything at any time, lock word
and all. What a worker computes on is its own copy of the control block, which `_clamp` made such that no
loop runs long and no access leaves the rings, whatever stood there. Where slot and rings are and how
large they are comes from the PCB (`service_bind`), never from the slot.

Invariants.
 I1  Only the holder of CONN_LOCK writes control blocks, the receive ring, lanes' tails and what the
     protocol tells the application. (An owner that breaks this harms its own connection.)
 I2  The control block that CONN_CURRENT names is complete: a commit writes the other one and then
     stores CONN_CURRENT. A holder that dies before that store has changed nothing that counts: bytes in
     the receive ring behind RCV_NXT are written again from the lanes, segments that it sent will look
     like segments of an earlier life, which TCP allows for.
 I3  Lanes are released behind that store. Records between are processed twice at worst: duplicates.
     So data are acknowledged only while they are in a lane or in the receive ring, and are never dropped.
 I4  Whoever fails to get the lock sets CONN_PENDING and tries once more; the holder looks at
     CONN_PENDING behind its unlock. With a full barrier between the two steps on both sides, one of them
     sees the other: what was published before service_begin is processed by somebody.

Floor 2. `x` is the caller's exchange block, `place` a slot. Nothing here blocks or calls the system.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.rings.lane import lane_peek, lane_release, record_bytes
from dataplane.rings.wake import wake_init
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import copy, exchange, fence, ld64, load_acquire, load_relaxed, st64, store_release
from dataplane.shm.lock import try_lock, unlock
from dataplane.tcp.connection import tcp_finish
from dataplane.tcp.input import tcp_arrive, tcp_control

__all__ = [
    "SLOT_ALIGN", "lane_place", "receive_ring", "send_ring", "service_begin", "service_bind", "service_commit",
    "service_discard", "service_install", "service_load", "service_more", "service_run", "slot_bytes",
]

SLOT_ALIGN = 4096
_FAR = 1 << 62
_MSS_MIN, _MSS_MAX = 48, 65495
_WINDOW_MAX = 1 << 30           # RFC 7323 section 2.3
_RTO_MAX = 120_000_000_000
_RUNS = 4                       # how often a holder looks again before it leaves the rest to others


# -- where things are ------------------------------------------------------------------------


def slot_bytes(lane_bytes: int, send_bytes: int, receive_bytes: int, workers: int) -> int:
    """Bytes of a connection's slot: ring bytes of each lane, of the send and of the receive ring."""
    size = T.CONN_LANES + workers * (L.LANE_DATA + lane_bytes) + send_bytes + receive_bytes
    return -(-size // SLOT_ALIGN) * SLOT_ALIGN


@inlined
def lane_place(place, lane_bytes, worker):
    """Where the lane of an RX worker is."""
    return place + T.CONN_LANES + worker * (L.LANE_DATA + lane_bytes)


@inlined
def send_ring(place, lane_bytes, workers):
    """Where the send ring is."""
    return lane_place(place, lane_bytes, workers)


@inlined
def receive_ring(place, lane_bytes, workers, send_bytes):
    """Where the receive ring is."""
    return lane_place(place, lane_bytes, workers) + send_bytes


@shared
def service_bind(mem, x, place, lane_bytes, workers, send_bytes, receive_bytes):
    """Points the exchange block at a slot. The sizes come from whom the caller trusts."""
    st64(mem, x + T.X_CONN, place)
    st64(mem, x + T.X_LANE_BYTES, lane_bytes)
    st64(mem, x + T.X_WORKERS, workers)
    st64(mem, x + T.X_SND, send_ring(place, lane_bytes, workers))
    st64(mem, x + T.X_SND_MASK, send_bytes - 1)
    st64(mem, x + T.X_RCV, receive_ring(place, lane_bytes, workers, send_bytes))
    st64(mem, x + T.X_RCV_MASK, receive_bytes - 1)
    st64(mem, x + T.X_OUT_MAX, T.OUT_MAX)
    st64(mem, x + T.X_DIRECT_LEFT, 0)


# -- a control block that nobody vouches for ------------------------------------------------------


@inlined
def _within(mem, word, low, high):
    st64(mem, word, min(max(ld64(mem, word), low), high))


@shared
def _clamp_ranges(mem, count, first, most, low, high):
    """Ascending, disjoint, within (low, high]; else none at all."""
    n = ld64(mem, count)
    if n < 0 or n > most:
        n = 0
    edge = low
    for i in range(n):
        start = ld64(mem, first + 16 * i)
        end = ld64(mem, first + 16 * i + 8)
        if start <= edge or end <= start or end > high:
            n = 0
            break
        edge = end
    st64(mem, count, n)


@shared
def _clamp(mem, x):
    """Makes a control block that anybody may have written one that the protocol can run on: positions in
    their order, sizes in their bounds, counts within their tables."""
    t = x + T.X_TCB
    _within(mem, t + T.T_STATE, T.CLOSED, T.TIME_WAIT)
    _within(mem, t + T.T_SND_UNA, 0, _FAR)
    una = ld64(mem, t + T.T_SND_UNA)
    room = ld64(mem, x + T.X_SND_MASK) + 3          # SYN, data, FIN
    _within(mem, t + T.T_SND_MAX, una, una + room)
    _within(mem, t + T.T_SND_NXT, una, ld64(mem, t + T.T_SND_MAX))
    _within(mem, t + T.T_RCV_NXT, 0, _FAR)
    nxt = ld64(mem, t + T.T_RCV_NXT)
    _within(mem, t + T.T_RCV_RIGHT, nxt, nxt + ld64(mem, x + T.X_RCV_MASK) + 1)
    for word in (T.T_SND_WND, T.T_MAX_WND):
        _within(mem, t + word, 0, _WINDOW_MAX)
    for word in (T.T_SND_SHIFT, T.T_RCV_SHIFT):
        _within(mem, t + word, 0, 14)
    for word in (T.T_MSS, T.T_PEER_MSS):
        _within(mem, t + word, _MSS_MIN, _MSS_MAX)
    _within(mem, t + T.T_RCV_MSS, 0, _MSS_MAX)
    _within(mem, t + T.T_MTU, 68, 65535)
    _within(mem, t + T.T_IP_BYTES, 20, 40)
    _within(mem, t + T.T_CWND, ld64(mem, t + T.T_MSS), _WINDOW_MAX)
    _within(mem, t + T.T_SSTHRESH, ld64(mem, t + T.T_MSS), _FAR)
    for word in (T.T_SRTT, T.T_RTTVAR, T.T_RTO, T.T_MIN_RTT):
        _within(mem, t + word, 0, _RTO_MAX)
    for word in (T.T_BACKOFF, T.T_PERSIST_SHIFT, T.T_KEEP_PROBES, T.T_TIMEOUTS):
        _within(mem, t + word, 0, 64)
    _clamp_ranges(mem, t + T.T_SB_COUNT, t + T.T_SB, T.SB_MAX, una, ld64(mem, t + T.T_SND_MAX))
    _clamp_ranges(mem, t + T.T_RA_COUNT, t + T.T_RA, T.RA_MAX, nxt, ld64(mem, t + T.T_RCV_RIGHT))


@shared
def _read_application(mem, x):
    """The application's words, each read once."""
    conn = ld64(mem, x + T.X_CONN)
    t = x + T.X_TCB
    # SYNC conn-request: acquire pairs with the application's release behind whatever it wrote for it;
    # else a close could be seen before the last bytes that were written.
    st64(mem, x + T.X_REQUEST, load_acquire(mem, conn + T.CONN_REQUEST))
    # SYNC conn-written: acquire pairs with the release in the client's send; else bytes could be sent
    # that are not in the ring yet.
    written = load_acquire(mem, conn + T.CONN_WRITTEN)
    una = max(ld64(mem, t + T.T_SND_UNA), 1)
    st64(mem, x + T.X_WRITTEN, min(max(written, una), una + ld64(mem, x + T.X_SND_MASK) + 1))
    # SYNC conn-read: acquire pairs with the release in the client's recv; else the ring could be written
    # while the application still copies out of it.
    read = load_acquire(mem, conn + T.CONN_READ)
    nxt = ld64(mem, t + T.T_RCV_NXT)
    st64(mem, x + T.X_READ, min(max(read, nxt - ld64(mem, x + T.X_RCV_MASK) - 1), nxt))
    st64(mem, x + T.X_OPTIONS, load_relaxed(mem, conn + T.CONN_OPTIONS))
    st64(mem, x + T.X_KEEP_IDLE, load_relaxed(mem, conn + T.CONN_KEEP_IDLE))
    st64(mem, x + T.X_KEEP_INTERVAL, load_relaxed(mem, conn + T.CONN_KEEP_INTERVAL))
    st64(mem, x + T.X_KEEP_COUNT, load_relaxed(mem, conn + T.CONN_KEEP_COUNT))
    st64(mem, x + T.X_USER_TIMEOUT, load_relaxed(mem, conn + T.CONN_USER_TIMEOUT))


@shared
def service_load(mem, x):
    """Copies the current control block into the exchange block, and makes it sound."""
    conn = ld64(mem, x + T.X_CONN)
    # SYNC conn-commit: acquire pairs with the release in _store; else the block could be read half written.
    current = load_acquire(mem, conn + T.CONN_CURRENT) & 1
    copy(mem, x + T.X_TCB, conn + T.CONN_BLOCKS + current * T.TCB_BYTES, T.TCB_BYTES)
    _clamp(mem, x)
    _read_application(mem, x)


# -- the run ---------------------------------------------------------------------------------------


@shared
def service_begin(mem, x):
    """1: the connection is locked and loaded. 0: somebody else holds it, and will look again (I4)."""
    conn = ld64(mem, x + T.X_CONN)
    stamp = ld64(mem, x + T.X_STAMP)
    if try_lock(mem, conn + T.CONN_LOCK, stamp) == 0:
        # SYNC conn-pending: full barrier between this store and the second try, pairs with the one between
        # unlock and the look in service_commit; else both could miss each other.
        exchange(mem, conn + T.CONN_PENDING, 1)
        if try_lock(mem, conn + T.CONN_LOCK, stamp) == 0:
            return 0
    if load_relaxed(mem, conn + T.CONN_PENDING) != 0:
        # SYNC conn-pending: before the lanes are read, so that whoever set it needs no second run.
        exchange(mem, conn + T.CONN_PENDING, 0)
    st64(mem, x + T.X_EVENTS, 0)
    st64(mem, x + T.X_AGAIN, 0)
    service_load(mem, x)
    return 1


@inlined
def _record(mem, x, at, length, control):
    if not control:
        tcp_arrive(mem, x, at, length)
    elif length >= T.CTL_BYTES:
        tcp_control(mem, x, ld64(mem, at + T.CTL_KIND), ld64(mem, at + T.CTL_VALUE), ld64(mem, at + T.CTL_SEQ))


@shared
def _drain(mem, x, worker):
    """Processes all records of one lane. What cannot be a record ends it: the rest is dropped."""
    size = ld64(mem, x + T.X_LANE_BYTES)
    lane = lane_place(ld64(mem, x + T.X_CONN), size, worker)
    tail = load_relaxed(mem, lane + L.LANE_TAIL)
    head = lane_peek(mem, lane)
    taken = 0
    if head - tail < 0 or head - tail > size or tail & (L.RECORD_ALIGN - 1):
        tail = head
    while tail < head:
        at = tail & (size - 1)
        word = load_relaxed(mem, lane + L.LANE_DATA + at)
        length = word & 0xFFFFFF
        need = record_bytes(length)
        if need > head - tail or at + need > size:
            tail = head
            break
        if not word & (L.RECORD_PAD << 24):
            control = word & (T.RECORD_CONTROL << 24)
            _record(mem, x, lane + L.LANE_DATA + at + L.RECORD_DATA, length, control)
            if not control:         # else it is no packet, and was never counted as one
                taken += 1
        tail += need
    st64(mem, x + T.X_TAILS + 16 * worker, tail)
    st64(mem, x + T.X_TAILS + 16 * worker + 8, taken)


@shared
def service_run(mem, x):
    """Processes what is in the lanes, what the application asks for, and the timers that are due. What is to
    be sent is in X_OUT then; while EV_MORE is in X_EVENTS there is more (`service_more`)."""
    for worker in range(ld64(mem, x + T.X_WORKERS)):
        _drain(mem, x, worker)
    service_more(mem, x)


@shared
def service_more(mem, x):
    """Fills X_OUT again."""
    st64(mem, x + T.X_OUT_COUNT, 0)
    st64(mem, x + T.X_EVENTS, ld64(mem, x + T.X_EVENTS) & ~T.EV_MORE)
    tcp_finish(mem, x)


# -- its end -----------------------------------------------------------------------------------------


@inlined
def _status(mem, t):
    status = ld64(mem, t + T.T_STATE) | ld64(mem, t + T.T_ERROR) << T.ST_ERRNO
    fin = ld64(mem, t + T.T_PEER_FIN_AT)
    if fin != 0 and ld64(mem, t + T.T_RCV_NXT) > fin:
        status |= T.ST_EOF
    if ld64(mem, t + T.T_FIN_AT) != 0:
        status |= T.ST_SHUT
    return status


@inlined
def _received(mem, t):
    """Position behind the last byte of data that is in order."""
    fin = ld64(mem, t + T.T_PEER_FIN_AT)
    nxt = max(ld64(mem, t + T.T_RCV_NXT), 1)
    return min(nxt, fin) if fin != 0 else nxt


@inlined
def _acked(mem, t):
    """Position of the first byte of data that is not acknowledged."""
    fin = ld64(mem, t + T.T_FIN_AT)
    una = max(ld64(mem, t + T.T_SND_UNA), 1)
    return min(una, fin) if fin != 0 else una


@shared
def _store(mem, x):
    """Makes the exchange block's state the connection's (I2), then releases the lanes (I3)."""
    conn = ld64(mem, x + T.X_CONN)
    t = x + T.X_TCB
    other = 1 - (load_relaxed(mem, conn + T.CONN_CURRENT) & 1)
    copy(mem, conn + T.CONN_BLOCKS + other * T.TCB_BYTES, t, T.TCB_BYTES)
    # SYNC conn-commit: release pairs with the acquire in service_load; else a successor could take a block
    # that is not all there.
    store_release(mem, conn + T.CONN_CURRENT, other)
    # SYNC conn-received: release pairs with the acquire in the client's recv; else the application could
    # copy bytes that are not in the receive ring yet.
    store_release(mem, conn + T.CONN_RECEIVED, _received(mem, t))
    # SYNC conn-acked: release pairs with the acquire in the client's send; else the application could
    # overwrite bytes that we still may send.
    store_release(mem, conn + T.CONN_ACKED, _acked(mem, t))
    st64(mem, conn + T.CONN_RIGHT, ld64(mem, t + T.T_RCV_RIGHT))
    st64(mem, conn + T.CONN_DEADLINE, ld64(mem, x + T.X_DEADLINE))
    # SYNC conn-status: release pairs with the acquire in the client; behind CONN_RECEIVED, so that whoever
    # sees the end sees all bytes before it.
    store_release(mem, conn + T.CONN_STATUS, _status(mem, t))
    _release_lanes(mem, x, conn)


@inlined
def _release_lanes(mem, x, conn):
    for worker in range(ld64(mem, x + T.X_WORKERS)):
        lane = lane_place(conn, ld64(mem, x + T.X_LANE_BYTES), worker)
        tail = ld64(mem, x + T.X_TAILS + 16 * worker)
        taken = ld64(mem, x + T.X_TAILS + 16 * worker + 8)
        if taken != 0 or load_relaxed(mem, lane + L.LANE_TAIL) != tail:
            lane_release(mem, lane, tail, taken)


@shared
def service_commit(mem, x):
    """Commits and unlocks. 1: somebody had come meanwhile, and the connection is locked and loaded again: run
    again. Bounded; what is left after that is the continuation worker's."""
    conn = ld64(mem, x + T.X_CONN)
    stamp = ld64(mem, x + T.X_STAMP)
    _store(mem, x)
    unlock(mem, conn + T.CONN_LOCK, stamp)
    # SYNC conn-pending: full barrier between the unlock and this look, pairs with the exchange in service_begin
    # of whoever did not get the lock; else both could miss each other.
    fence()
    if load_relaxed(mem, conn + T.CONN_PENDING) == 0:
        return 0
    again = ld64(mem, x + T.X_AGAIN) + 1
    if again >= _RUNS or try_lock(mem, conn + T.CONN_LOCK, stamp) == 0:
        return 0
    exchange(mem, conn + T.CONN_PENDING, 0)     # SYNC conn-pending: before the lanes are read again
    st64(mem, x + T.X_AGAIN, again)
    service_load(mem, x)
    return 1


# -- a slot's beginning and end --------------------------------------------------------------------------


@shared
def service_install(mem, x):
    """Makes the control block in the exchange block a new connection of its slot, before anybody else can
    find it. Lanes stay as they are: empty, their positions going on from the slot's former connection."""
    conn = ld64(mem, x + T.X_CONN)
    t = x + T.X_TCB
    for word in range(T.CONN_LOCK, T.CONN_BLOCKS, 8):
        st64(mem, conn + word, 0)
    wake_init(mem, conn + T.CONN_WAKE)
    st64(mem, conn + T.CONN_READ, 1)
    st64(mem, conn + T.CONN_WRITTEN, 1)
    copy(mem, conn + T.CONN_BLOCKS, t, T.TCB_BYTES)
    st64(mem, conn + T.CONN_RECEIVED, _received(mem, t))
    st64(mem, conn + T.CONN_ACKED, _acked(mem, t))
    st64(mem, conn + T.CONN_RIGHT, ld64(mem, t + T.T_RCV_RIGHT))
    st64(mem, conn + T.CONN_STATUS, _status(mem, t))


@shared
def service_discard(mem, x):
    """Empties the lanes of a connection that is over and that no worker can find any more. What they hold
    counts as consumed. Returns the number of records."""
    conn = ld64(mem, x + T.X_CONN)
    size = ld64(mem, x + T.X_LANE_BYTES)
    total = 0
    for worker in range(ld64(mem, x + T.X_WORKERS)):
        lane = lane_place(conn, size, worker)
        head = lane_peek(mem, lane)
        tail = load_relaxed(mem, lane + L.LANE_TAIL)
        taken = 0
        if head - tail < 0 or head - tail > size or tail & (L.RECORD_ALIGN - 1):
            tail = head
        while tail < head:
            at = tail & (size - 1)
            word = load_relaxed(mem, lane + L.LANE_DATA + at)
            need = record_bytes(word & 0xFFFFFF)
            if need > head - tail or at + need > size:
                break
            if not word & ((L.RECORD_PAD | T.RECORD_CONTROL) << 24):
                taken += 1
            tail += need
        lane_release(mem, lane, head, taken)
        total += taken
    return total
