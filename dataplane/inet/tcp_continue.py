"""The continuation worker's step: connections whose time has come are run, and those that are over come to their end.

Called by the continuation worker's Python loop (workers/continuation.py). The queue and its protocol are
kcont/schedule.py, the end of connections is kcont/reaper.py, the protocol tcp/service.py, of which this is the
third caller. What the protocol puts out goes as records into a transmit lane of our own, to RX worker 0, just as
a consumer's does: this process has no netif. When that lane is full, connections wait until it is not: nothing
is put out that would be lost here.

A slot is hostile memory. A lock that its owner holds costs a look every RETRY_NS and nothing else. A run is
bounded (tcp/service.py), and so is what it may put out. Nothing here waits for anybody.

An owner that has died leaves connections behind (`continue_abandon`): those that it had closed may still send
what is in their rings, for LINGER_NS; the others are reset now. What does not end by that is ended by force: its
lock, whoever's stamp stands there, is not waited for beyond that time.
"""

from __future__ import annotations

from dataplane.inet.deliver import wake_waiter
from dataplane.inet.tcp_service import tcp_bind
from dataplane.jit import inlined, kernel, shared
from dataplane.kcont import area as K
from dataplane.kcont.reaper import reap, reap_again, reap_recover, reap_settle, time_wait_due
from dataplane.kcont.schedule import (
    NEVER,
    kcont_arm,
    kcont_disarm,
    kcont_lower,
    kcont_next,
    kcont_stuck,
    kcont_swept,
    kcont_take,
)
from dataplane.kcont.wheel import FAR, tick_after, tick_at, wheel_expire, wheel_insert, wheel_next
from dataplane.rings.lane import lane_peek, lane_publish, lane_stage, record_bytes
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import (
    cas,
    copy,
    exchange,
    fence,
    ld64,
    load_acquire,
    load_relaxed,
    shr,
    st64,
    store_relaxed,
    store_release,
)
from dataplane.shm.libc import CLOCK_MONOTONIC, clock_ns, write
from dataplane.tcp.service import service_begin, service_commit, service_more, service_run

__all__ = [
    "continue_abandon", "continue_may_sleep", "continue_recover", "continue_reset", "continue_step",
    "continue_unlisten", "continue_woke",
]

RETRY_NS = 10_000_000           # when the connection is locked
LINGER_NS = 60_000_000_000      # what a dead owner had closed may take so long to end
FORCE_NS = 1_000_000_000        # what is reset, so long
_STUCK_NS = 20_000_000          # between two sweeps while the queue's front is reserved
_MOMENT_NS = 1_000_000
_COLLECT = 4096
_TURNS = 16
_ROOM_LEAST = 8                 # records that a run may want
_RECORD = L.TX_PAYLOAD + T.O_BYTES
_TOLD = T.EV_READABLE | T.EV_WRITABLE | T.EV_STATE
_CONSUMER_STAMP = 1 << 40       # stamps in connections' locks from here on are consumers'


@inlined
def _pcb(mem, w, number):
    return ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS) + number * L.PCB_BYTES


@inlined
def _read_clock(mem, w):
    st64(mem, w + L.W_MONOTONIC, clock_ns(mem, w + L.W_SCRATCH, CLOCK_MONOTONIC))


# -- the transmit lane -------------------------------------------------------------------------------


@inlined
def _room(mem, k):
    """Records that fit into the transmit lane now."""
    state = ld64(mem, k + K.K_LANE)
    # SYNC tx-tail: acquire pairs with worker 0's release; else a record that it still reads could be overwritten.
    tail = load_acquire(mem, ld64(mem, state + L.LS_BASE) + L.LANE_TAIL)
    free = ld64(mem, state + L.LS_MASK) + 1 - (ld64(mem, state + L.LS_HEAD) - tail)
    return max(free // record_bytes(_RECORD) - 1, 0)


@shared
def _flush(mem, w):
    """Hands to worker 0 what was put out, and rings its doorbell if it sleeps."""
    k = ld64(mem, w + L.W_KCONT)
    state = ld64(mem, k + K.K_LANE)
    if ld64(mem, state + L.LS_HEAD) == ld64(mem, state + L.LS_PUBLISHED):
        return
    # SYNC tx-head: release in here pairs with worker 0's acquire of the head.
    lane_publish(mem, state)
    # SYNC doorbell: full barrier between the head and this look, pairs with the one in may_sleep.
    fence()
    sleeping = ld64(mem, k + K.K_SLEEPING)
    if load_relaxed(mem, sleeping) and exchange(mem, sleeping, 0):
        st64(mem, w + L.W_SCRATCH + 240, 1)
        write(mem, ld64(mem, k + K.K_ROPE), w + L.W_SCRATCH + 240, 8)


@shared
def _emit(mem, w, x, number):
    """What the run has put out, into the transmit lane: there is room (X_OUT_MAX)."""
    k = ld64(mem, w + L.W_KCONT)
    body = ld64(mem, k + K.K_BODY)
    st64(mem, body + L.TX_PCB, number | ld64(mem, _pcb(mem, w, number) + L.PCB_GENERATION) << 32)
    st64(mem, body + L.TX_FAMILY, 0)
    state = ld64(mem, k + K.K_LANE)
    for i in range(ld64(mem, x + T.X_OUT_COUNT)):
        copy(mem, body + L.TX_PAYLOAD, x + T.X_OUT + i * T.O_BYTES, T.O_BYTES)
        lane_stage(mem, state, 0, 0, body, _RECORD)
        st64(mem, ld64(mem, k + K.K_SENT) + 8 * number, ld64(mem, state + L.LS_HEAD))
    st64(mem, x + T.X_OUT_MAX, min(_room(mem, k), T.OUT_MAX))


# -- one connection ----------------------------------------------------------------------------------


@shared
def _rearm(mem, w, number, deadline):
    """Runs the connection at this time, or earlier if somebody wants that."""
    due = _pcb(mem, w, number) + L.PCB_DUE
    kcont_lower(mem, due, max(deadline, 1))
    armed = load_relaxed(mem, due)
    wheel_insert(mem, ld64(mem, w + L.W_KCONT), number, tick_after(armed if armed > 0 else deadline))


@shared
def _press(mem, w, conn, number, now):
    """An abandoned connection: resets it, if it was not closed or has lingered long enough, and takes the lock
    from the dead. Returns when it ends by force."""
    place = ld64(mem, ld64(mem, w + L.W_KCONT) + K.K_ORPHANS) + 8 * number
    until = ld64(mem, place)
    request = load_relaxed(mem, conn + T.CONN_REQUEST)
    if request & T.REQ_CLOSED == 0 or (now >= until and request & T.REQ_ABORT == 0):
        st64(mem, conn + T.CONN_REQUEST, request | T.REQ_ABORT | T.REQ_CLOSED | T.REQ_SHUTDOWN)
        until = now + FORCE_NS
        st64(mem, place, until)
    # SYNC lock-word: acquire, pairs with the cas in try_lock; consumers' stamps only, and this one's owner is dead.
    holder = load_acquire(mem, conn + T.CONN_LOCK)
    if holder >= _CONSUMER_STAMP or holder < 0:
        # SYNC lock-word: taken from the dead, as in lock.recover.
        cas(mem, conn + T.CONN_LOCK, holder, 0)
    return until


@shared
def _turns(mem, w, x, number):
    service_run(mem, x)
    _emit(mem, w, x, number)
    for _ in range(_TURNS):
        if ld64(mem, x + T.X_EVENTS) & T.EV_MORE == 0 or ld64(mem, x + T.X_OUT_MAX) < _ROOM_LEAST:
            break
        service_more(mem, x)
        _emit(mem, w, x, number)


@shared
def _run(mem, w, number):
    """Runs the connection if its lock is free; 1 if so. What follows of it is in the exchange block."""
    k = ld64(mem, w + L.W_KCONT)
    x = ld64(mem, w + L.W_TCP_EXCHANGE)
    if service_begin(mem, x) == 0:
        return 0
    again = 1
    while again:
        st64(mem, x + T.X_OUT_MAX, min(_room(mem, k), T.OUT_MAX))
        _turns(mem, w, x, number)
        again = service_commit(mem, x)
    if ld64(mem, x + T.X_EVENTS) & _TOLD:
        # SYNC wake-state: between what was committed and the look at the wake word; pairs with the exchange in
        # wake_arm. Without it the owner could arm and find nothing while we still see it awake.
        fence()
        wake_waiter(mem, w, ld64(mem, x + T.X_CONN) + T.CONN_WAKE, ld64(mem, _pcb(mem, w, number) + L.PCB_OWNER))
    return 1


@inlined
def _all_sent(mem, w, number):
    """Whether worker 0 has taken all that we put out for the connection. Before that it is not taken apart: its
    last segment, perhaps the RST, could no longer be sent. What is put out for others meanwhile does not matter."""
    k = ld64(mem, w + L.W_KCONT)
    tail = load_relaxed(mem, ld64(mem, ld64(mem, k + K.K_LANE) + L.LS_BASE) + L.LANE_TAIL)
    return tail >= ld64(mem, ld64(mem, k + K.K_SENT) + 8 * number)


@inlined
def _is_over(mem, x):
    state = ld64(mem, x + T.X_TCB + T.T_STATE)
    gone = ld64(mem, x + T.X_REQUEST) & (T.REQ_CLOSED | T.REQ_ABORT) != 0
    return gone and (state == T.CLOSED or state == T.TIME_WAIT) and ld64(mem, x + T.X_EVENTS) & T.EV_MORE == 0


@shared
def _continue(mem, w, number, now):
    """The connection's time has come."""
    k = ld64(mem, w + L.W_KCONT)
    x = ld64(mem, w + L.W_TCP_EXCHANGE)
    kcont_take(mem, ld64(mem, w + L.W_TABLE), number)
    tcp_bind(mem, w, x, number)
    until = 0
    if ld64(mem, ld64(mem, k + K.K_ORPHANS) + 8 * number) != 0:
        until = _press(mem, w, ld64(mem, x + T.X_CONN), number, now)
    if _run(mem, w, number):
        if _is_over(mem, x):
            if not _all_sent(mem, w, number) or reap(mem, w, number, x, now) == 0:
                _rearm(mem, w, number, now + _MOMENT_NS)
            return
        deadline = ld64(mem, x + T.X_DEADLINE)
        if ld64(mem, x + T.X_EVENTS) & T.EV_MORE:
            deadline = now + _MOMENT_NS
    else:
        deadline = now + RETRY_NS
    if until != 0:
        if now >= until:
            reap_again(mem, w, number)
            return
        deadline = min(deadline, until) if deadline != 0 else until
    if deadline != 0:
        _rearm(mem, w, number, deadline)


@inlined
def _fire(mem, w, number, now):
    table = ld64(mem, w + L.W_TABLE)
    if number >= ld64(mem, table + L.T_TIME_WAIT_AT):
        time_wait_due(mem, w, number, now)
        return
    pcb = _pcb(mem, w, number)
    if ld64(mem, pcb + L.PCB_KIND) == L.PK_CONNECTION and ld64(mem, pcb + L.PCB_STATE) == L.PCB_OPEN:
        if _room(mem, ld64(mem, w + L.W_KCONT)) < _ROOM_LEAST:
            _flush(mem, w)
            wheel_insert(mem, ld64(mem, w + L.W_KCONT), number, tick_at(now) + 1)
        else:
            _continue(mem, w, number, now)


# -- the step ----------------------------------------------------------------------------------------


@inlined
def _note(mem, w, number):
    """Puts the connection into the wheel if it is armed."""
    # SYNC kcont-due: acquire, pairs with the cas in kcont_lower of whoever announced it.
    due = load_acquire(mem, _pcb(mem, w, number) + L.PCB_DUE)
    if due > 0:
        wheel_insert(mem, ld64(mem, w + L.W_KCONT), number, tick_after(due))


@shared
def _sweep(mem, w):
    """Every connection that is armed, announced or not."""
    for number in range(ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_TIME_WAIT_AT)):
        if ld64(mem, _pcb(mem, w, number) + L.PCB_KIND) == L.PK_CONNECTION:
            _note(mem, w, number)


@shared
def _collect(mem, w, now):
    """Takes what is in the queue; returns how many."""
    k = ld64(mem, w + L.W_KCONT)
    count = 0
    while count < _COLLECT:
        number = kcont_next(mem, w)
        if number == -1:
            break
        count += 1
        if number >= 0 and ld64(mem, _pcb(mem, w, number) + L.PCB_KIND) == L.PK_CONNECTION:
            _note(mem, w, number)
    if kcont_swept(mem, w):
        _sweep(mem, w)
    elif kcont_stuck(mem, w) != 0 and now - ld64(mem, k + K.K_SWEPT) >= _STUCK_NS:
        st64(mem, k + K.K_SWEPT, now)
        _sweep(mem, w)
    return count


@kernel("i64(mem, i64, i64)")
def continue_step(mem, w, budget):
    """Runs up to `budget` connections; returns how much there was to do. The numbers at K_DONE, K_DONE_COUNT
    of them, are the caller's to report."""
    k = ld64(mem, w + L.W_KCONT)
    _read_clock(mem, w)
    now = ld64(mem, w + L.W_MONOTONIC)
    handled = _collect(mem, w, now)
    for _ in range(budget):
        number = wheel_expire(mem, k, tick_at(now))
        if number < 0:
            break
        _fire(mem, w, number, now)
        handled += 1
    if ld64(mem, k + K.K_WAIT_HEAD) != ld64(mem, k + K.K_WAIT_TAIL):
        handled += reap_settle(mem, w)
    _flush(mem, w)
    st64(mem, w + L.W_STEPS, ld64(mem, w + L.W_STEPS) + 1)
    return handled


@kernel("i64(mem, i64)")
def continue_may_sleep(mem, w):
    """Nanoseconds that may be slept on the doorbell and the order channel; 0: not at all. Unless 0, the
    doorbell is rung for what is due before, and `continue_woke` must follow."""
    k = ld64(mem, w + L.W_KCONT)
    _read_clock(mem, w)
    now = ld64(mem, w + L.W_MONOTONIC)
    tick = wheel_next(mem, k)
    until = tick * _MOMENT_NS if tick < FAR else NEVER
    if ld64(mem, k + K.K_WAIT_HEAD) != ld64(mem, k + K.K_WAIT_TAIL):
        until = min(until, now + max(ld64(mem, k + K.K_LOOK), _MOMENT_NS))
    if kcont_stuck(mem, w) != 0:
        until = min(until, now + _STUCK_NS)
    if until <= now or load_relaxed(mem, w + L.W_MAILBOX) != 0 or kcont_arm(mem, w, until) == 0:
        return 0
    st64(mem, w + L.W_SLEPT, ld64(mem, w + L.W_SLEPT) + 1)
    return until - now


@kernel("i64(mem, i64)")
def continue_woke(mem, w):
    """After a sleep: nobody needs to ring."""
    kcont_disarm(mem, w)
    return 0


@kernel("i64(mem, i64)")
def continue_recover(mem, w):
    """Before the first step: whatever a predecessor left goes on (kcont/reaper.py)."""
    _read_clock(mem, w)
    store_relaxed(mem, ld64(mem, w + L.W_TABLE) + L.T_KCONT_WAKE, L.WAKE_AWAKE)
    st64(mem, ld64(mem, w + L.W_KCONT) + K.K_TICK, tick_at(ld64(mem, w + L.W_MONOTONIC)))
    reap_recover(mem, w, ld64(mem, w + L.W_MONOTONIC))
    return 0


# -- orders ------------------------------------------------------------------------------------------


@shared
def _orphan(mem, w, number, until):
    """Marks a connection as abandoned; it is run at once."""
    k = ld64(mem, w + L.W_KCONT)
    st64(mem, ld64(mem, k + K.K_ORPHANS) + 8 * number, until)
    wheel_insert(mem, k, number, tick_at(ld64(mem, w + L.W_MONOTONIC)))


@kernel("i64(mem, i64, i64)")
def continue_abandon(mem, w, consumer):
    """The consumer is gone: its connections come to their end. Returns how many there are."""
    _read_clock(mem, w)
    until = ld64(mem, w + L.W_MONOTONIC) + LINGER_NS
    count = 0
    for number in range(ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_TIME_WAIT_AT)):
        pcb = _pcb(mem, w, number)
        if ld64(mem, pcb + L.PCB_KIND) != L.PK_CONNECTION or ld64(mem, pcb + L.PCB_OWNER) != consumer:
            continue
        state = ld64(mem, pcb + L.PCB_STATE)
        if state == L.PCB_OPEN:
            _orphan(mem, w, number, until)
            count += 1
        elif state == L.PCB_CLOSING:
            st64(mem, ld64(mem, ld64(mem, w + L.W_KCONT) + K.K_ORPHANS) + 8 * number, until)
            count += 1
    return count


@kernel("i64(mem, i64, i64)")
def continue_reset(mem, w, number):
    """The connection, opened by connect, is reset. 1, or 0 if it is over already."""
    _read_clock(mem, w)
    pcb = _pcb(mem, w, number)
    if ld64(mem, pcb + L.PCB_KIND) != L.PK_CONNECTION or ld64(mem, pcb + L.PCB_STATE) != L.PCB_OPEN:
        return 0
    _orphan(mem, w, number, ld64(mem, w + L.W_MONOTONIC) + FORCE_NS)
    return 1


@inlined
def _unaccepted(mem, w, listener, body):
    """Resets the connection that a record in a listener's lane tells of, if it is one of its owner's. What
    stands there is hostile."""
    table = ld64(mem, w + L.W_TABLE)
    word = load_relaxed(mem, body + T.A_PCB)
    number = word & 0xFFFFFFFF
    if number >= ld64(mem, table + L.T_TIME_WAIT_AT):
        return 0
    pcb = _pcb(mem, w, number)
    if (ld64(mem, pcb + L.PCB_KIND) != L.PK_CONNECTION or ld64(mem, pcb + L.PCB_STATE) != L.PCB_OPEN
            or ld64(mem, pcb + L.PCB_GENERATION) != shr(word, 32) or ld64(mem, pcb + L.PCB_LISTENER) != listener + 1):
        return 0
    place = ld64(mem, pcb + L.PCB_PLACE) + T.CONN_REQUEST
    # SYNC conn-request: release, in the application's place; pairs with the acquire in _read_application.
    store_release(mem, place, load_relaxed(mem, place) | T.REQ_ABORT | T.REQ_CLOSED | T.REQ_SHUTDOWN)
    _orphan(mem, w, number, ld64(mem, w + L.W_MONOTONIC) + FORCE_NS)
    return 1


@kernel("i64(mem, i64, i64)")
def continue_unlisten(mem, w, listener):
    """The listener is closed: the connections that nobody has accepted are reset. Returns how many."""
    _read_clock(mem, w)
    table = ld64(mem, w + L.W_TABLE)
    count = 0
    for worker in range(ld64(mem, table + L.T_WORKERS)):
        state = ld64(mem, table + L.T_LANES) + (worker * ld64(mem, table + L.T_SOCKETS) + listener) * L.LS_BYTES
        lane = ld64(mem, state + L.LS_BASE)
        size = ld64(mem, state + L.LS_MASK) + 1
        if lane == 0:
            continue
        head = lane_peek(mem, lane)
        tail = load_relaxed(mem, lane + L.LANE_TAIL)
        if head - tail < 0 or head - tail > size or tail & (L.RECORD_ALIGN - 1):
            continue
        while tail < head:
            at = tail & (size - 1)
            word = load_relaxed(mem, lane + L.LANE_DATA + at)
            need = record_bytes(word & 0xFFFFFF)
            if need > head - tail or at + need > size:
                break
            if not word & (L.RECORD_PAD << 24) and word & 0xFFFFFF >= T.A_BYTES:
                count += _unaccepted(mem, w, listener, lane + L.LANE_DATA + at + L.RECORD_DATA)
            tail += need
    return count
