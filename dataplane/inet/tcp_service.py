"""What an RX worker does for its connections behind a burst: wake their owners, or process them itself.

Called by the step once the burst's segments are published (`tcp_burst`), with the connections that
tcp_input noted. Lazy receiver processing: a lone segment is left to the owner, who is woken if it
waits, or else to the continuation worker. When an ACK is due, that is when two segments or more wait
(RFC 9293 section 3.8.6.3, RFC 5681 section 4.2), or when the owner is gone, the worker runs the protocol itself if
it gets the lock at once: all that waits is processed, one ACK goes out, and the owner is woken for what came of it.
It never waits for a lock: who holds it looks again (tcp/service.py).

Bulk data are the exception. To process them is to copy them, and an owner who has called a moment ago is about to do
that on its own core, ACK and all. So they are left to it, until they are _PILE of a lane, or for _PATIENCE_NS:
then the continuation worker comes. Measured on two cores, against the kernel's own: 0.78 instead of 0.66.
"""

from __future__ import annotations

from dataplane.inet.deliver import wake_waiter
from dataplane.inet.tcp_transmit import tcp_emit
from dataplane.jit import inlined, kernel, shared
from dataplane.kcont import kcont_schedule
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import cas, fence, ld64, load_relaxed, shr, st64
from dataplane.tcp.service import service_begin, service_bind, service_commit, service_more, service_run

__all__ = ["tcp_bind", "tcp_burst", "tcp_run", "tcp_unlock"]

_TURNS = 16             # times X_OUT is filled in one run: what is left then has to wait a moment
_SEGMENTS_DUE = 2
_BYTES_DUE = 3000       # a super-segment stands for several
_PILE = 4               # a lane's part that may wait for an owner who is about to call
_ACTIVE_NS = 1_000_000  # ... because it has called so short a time ago
_PATIENCE_NS = 2_000_000
_LAZY_NS = 100_000_000  # when the continuation worker sees to what nobody has processed
_TOLD = T.EV_READABLE | T.EV_WRITABLE | T.EV_STATE


@shared
def tcp_bind(mem, w, x, number):
    """Points the exchange block at `x` at the connection of PCB `number`, by what the table says."""
    table = ld64(mem, w + L.W_TABLE)
    pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
    buffers = ld64(mem, pcb + L.PCB_BUFFERS)
    service_bind(mem, x, ld64(mem, pcb + L.PCB_PLACE), ld64(mem, pcb + L.PCB_RING), ld64(mem, table + L.T_WORKERS),
                 1 << (buffers & 0xFF), 1 << (shr(buffers, 8) & 0xFF))
    st64(mem, x + T.X_STAMP, ld64(mem, w + L.W_STAMP))
    st64(mem, x + T.X_NOW, ld64(mem, w + L.W_MONOTONIC))
    st64(mem, x + T.X_TIME_WAIT, ld64(mem, table + L.T_TIME_WAIT_NS))


@inlined
def _emit(mem, w, x, number):
    for i in range(ld64(mem, x + T.X_OUT_COUNT)):
        tcp_emit(mem, w, number, x + T.X_OUT + i * T.O_BYTES)


@shared
def _turns(mem, w, x, number):
    service_run(mem, x)
    _emit(mem, w, x, number)
    for _ in range(_TURNS):
        if ld64(mem, x + T.X_EVENTS) & T.EV_MORE == 0:
            break
        service_more(mem, x)
        _emit(mem, w, x, number)


@shared
def tcp_run(mem, w, number):
    """Runs the protocol of the connection, if its lock is free, and wakes its owner for what came of it."""
    x = ld64(mem, w + L.W_TCP_EXCHANGE)
    tcp_bind(mem, w, x, number)
    if service_begin(mem, x) == 0:
        kcont_schedule(mem, w, number, ld64(mem, w + L.W_MONOTONIC) + _LAZY_NS)     # should its holder never look
        return
    again = 1
    while again:
        _turns(mem, w, x, number)
        again = service_commit(mem, x)
    table = ld64(mem, w + L.W_TABLE)
    deadline = ld64(mem, x + T.X_DEADLINE)
    state = ld64(mem, x + T.X_TCB + T.T_STATE)
    if state == T.CLOSED or state == T.TIME_WAIT or ld64(mem, x + T.X_EVENTS) & T.EV_MORE:
        deadline = ld64(mem, x + T.X_NOW)
    if deadline != 0:
        kcont_schedule(mem, w, number, deadline)
    if ld64(mem, x + T.X_EVENTS) & _TOLD:
        pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
        # SYNC wake-state: between what was committed and the look at the wake word; pairs with the exchange in
        # wake_arm. Without it the owner could arm and find nothing while we still see it awake.
        fence()
        wake_waiter(mem, w, ld64(mem, x + T.X_CONN) + T.CONN_WAKE, ld64(mem, pcb + L.PCB_OWNER))


@inlined
def _when(mem, w, number, place):
    """When the protocol is to be run by us: 0: now; else by the continuation worker, so many ns from now, should the
    owner not have come. The owner's words are hostile: whatever they say, it is one of these."""
    state = ld64(mem, w + L.W_LANES) + number * L.LS_BYTES
    lane = ld64(mem, state + L.LS_BASE)
    segments = ld64(mem, state + L.LS_COUNT) - load_relaxed(mem, lane + L.LANE_CONSUMED)
    octets = ld64(mem, state + L.LS_PUBLISHED) - load_relaxed(mem, lane + L.LANE_TAIL)
    if load_relaxed(mem, place + T.CONN_REQUEST) & (T.REQ_CLOSED | T.REQ_ABORT):
        return 0
    if octets < _BYTES_DUE:
        return 0 if segments >= _SEGMENTS_DUE else _LAZY_NS
    if octets * _PILE > ld64(mem, state + L.LS_MASK):
        return 0
    silent = ld64(mem, w + L.W_MONOTONIC) - load_relaxed(mem, place + T.CONN_CALLED)
    return _PATIENCE_NS if silent < _ACTIVE_NS else 0


@shared
def tcp_burst(mem, w):
    """Runs or wakes the connections that got segments in this burst, all of them published by now."""
    pcbs = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS)
    dirty = ld64(mem, w + L.W_TCP_DIRTY)
    count = ld64(mem, w + L.W_TCP_COUNT)
    st64(mem, w + L.W_TCP_COUNT, 0)
    for i in range(count):
        number = ld64(mem, dirty + 8 * i)
        pcb = pcbs + number * L.PCB_BYTES
        place = ld64(mem, pcb + L.PCB_PLACE)
        wait = _when(mem, w, number, place)
        if wait == 0:
            tcp_run(mem, w, number)
        else:
            # The fence of publish_lanes stands between the heads and this look. Who is woken will come.
            if load_relaxed(mem, place + T.CONN_WAKE + L.WAKE_STATE) != L.WAKE_AWAKE:
                wait = _LAZY_NS
                wake_waiter(mem, w, place + T.CONN_WAKE, ld64(mem, pcb + L.PCB_OWNER))
            # Behind that fence, too: else a continuation that is just running could be counted on.
            kcont_schedule(mem, w, number, ld64(mem, w + L.W_MONOTONIC) + wait)


@kernel("i64(mem, i64, i64)")
def tcp_unlock(mem, table, dead):
    """Takes the locks of a dead worker away; returns how many. What it was doing never happened
    (tcp/service.py, I2), and the continuation worker looks at every connection with something to do."""
    count = 0
    pcb = ld64(mem, table + L.T_PCBS)
    for _ in range(ld64(mem, table + L.T_TIME_WAIT_AT)):
        if ld64(mem, pcb + L.PCB_KIND) == L.PK_CONNECTION and ld64(mem, pcb + L.PCB_STATE) == L.PCB_OPEN:
            # SYNC lock-word: a dead holder cannot release it; pairs with the try_lock of the next one.
            count += cas(mem, ld64(mem, pcb + L.PCB_PLACE) + T.CONN_LOCK, dead, 0)
        pcb += L.PCB_BYTES
    return count
