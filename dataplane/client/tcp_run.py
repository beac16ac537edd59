"""The consumer's kernels for TCP: the protocol's routine (tcp/service.py) as this process runs it.

Called by `tcp` and `transport`. A consumer processes its connections' segments in its own time, when it calls in:
each of these kernels first looks at what is there already, and runs the routine only if that is not enough. What the
routine puts out goes as records into the attachment's transmit lane, to the worker that builds packets of them.

Two pieces of private memory are used, which nobody else maps:

    bench    one per attachment: the exchange block and what goes with it. Used by one thread at a time: whoever
             has the lock of the transmit lane, whose only producer this process is
    handle   one per connection: where it is, and how far the application has come

No wakeup is lost. A worker that has put segments into a lane, or that has run the routine, publishes, passes a full
barrier and then looks at CONN_WAKE. Whoever waits here arms CONN_WAKE (an exchange: a full barrier), and then
looks at the lanes and at what the routine told. So either the worker sees it armed, or it sees what the worker
published. One case is left: the routine could not be run here since a worker had the connection's lock (BUSY). Then
the lanes may be full all the time, and are not looked at; but CONN_PENDING is set, so that this worker will run the
routine again, for everything published before, and look at CONN_WAKE behind that.

Two threads may wait for one connection, one that reads and one that writes, on one wake object. They are counted
(H_SLEEPERS), and a notifier wakes one of them. So whoever wakes up passes that on to the other, who looks, and arms
again; and who leaves takes nothing back while the other still sleeps.
"""

from __future__ import annotations

from dataplane.client.transmit import TX_BODY, tx_door
from dataplane.jit import inlined, kernel, shared
from dataplane.rings.lane import lane_peek, lane_publish, lane_stage
from dataplane.rings.wake import wake_arm, wake_disarm, wake_notify, wake_sleep
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import (
    copy,
    fence,
    fetch_add,
    fill,
    ld64,
    load_acquire,
    load_relaxed,
    pause,
    st64,
    store_relaxed,
    store_release,
)
from dataplane.shm.libc import CLOCK_MONOTONIC, clock_ns, futex_wake
from dataplane.tcp.service import lane_place, service_begin, service_bind, service_commit, service_more, service_run

__all__ = [
    "BENCH_BYTES", "BUSY", "DIRECT", "END", "FLAGS", "FULL", "HANDLE_BYTES", "OPEN", "POKE", "READ", "RECEIVE",
    "RECEIVE_INTO", "RELEASE", "REQUEST", "ROOM", "SENT", "STATUS", "STOPPED", "SWITCH", "WRITE", "WROTE", "arm",
    "call", "facts", "wait", "wake",
]

# -- bench ---------------------------------------------------------------------------------------
B_TX = 0                # the transmit lane's private state (client/transmit.py)
B_STOPPED = 8           # place of HOME_STOPPED
B_CLOCK = 16            # scratch for clock_gettime
B_BUFFER = 32           # RECEIVE_INTO: place of the application's buffer, and its bytes
B_ROOM = 40
B_X = 64                # the exchange block
BENCH_BYTES = B_X + T.X_BYTES

# -- handle ----------------------------------------------------------------------------------------
H_CONN = 0              # the slot
H_PCB = 8               # number | generation << 32: the first word of a transmit record
H_FAMILY = 16           # the second word
H_LANE_BYTES = 24
H_WORKERS = 32
H_SEND_BYTES = 40
H_RECEIVE_BYTES = 48
H_READ = 56             # position up to which the application has read
H_WRITTEN = 64          # ... up to which it has written
H_TOLD = 72             # when the continuation worker will run the connection, as far as we told it; 0: never
H_SLEEPERS = 80         # threads that wait
H_ENTRY = 88            # place of its entry in an event loop's table (`collect`); 0: none
H_BUSY = 96             # the last run found the connection locked
H_UNTIL = 104           # scratch of wake_sleep: 16 bytes for readers, 16 for writers
HANDLE_BYTES = 192

# -- what the kernels return: bytes, or a negative errno, or
END = -4000             # no bytes will come any more
STOPPED = -4001         # the dataplane has ended
FULL = 1 << 40          # flag: the transmit lane is full, and something is left to be sent: run again
SWITCH = 1 << 41        # flag: an event loop was to be told something, by us
BUSY = 1 << 42          # flag: somebody else was processing the connection
DIRECT = 1 << 43        # flag of RECEIVE_INTO: so many bytes are in the buffer, and have never been in the ring
FLAGS = FULL | SWITCH | BUSY | DIRECT

# -- the application's calls (`call`) ------------------------------------------------------------------
RECEIVE, RELEASE, ROOM, WROTE, REQUEST, STATUS, POKE, RECEIVE_INTO = range(8)

# -- what is waited for ------------------------------------------------------------------------------
READ, WRITE, OPEN, SENT = 1, 2, 4, 8

_TURNS = 256            # times X_OUT is filled in one run
_RECORD = L.RECORD_DATA + L.TX_PAYLOAD + T.O_BYTES      # a multiple of RECORD_ALIGN
_SOON = 90_000_000      # ns: workers let the continuation worker run after 100 ms whatever we say
_ROOM_NS = 500_000      # how long a run waits for the worker to make room in the transmit lane
_TOLD = T.EV_READABLE | T.EV_WRITABLE | T.EV_STATE

_EPIPE = 32

assert _RECORD % L.RECORD_ALIGN == 0


# -- out ---------------------------------------------------------------------------------------------


@inlined
def _fits(mem, tx):
    """How many records the transmit lane has room for, whatever the padding, and one to spare."""
    lane = ld64(mem, tx + L.LS_BASE)
    # SYNC tx-tail: acquire pairs with the worker's release of the tail, as in `transmit`.
    used = ld64(mem, tx + L.LS_HEAD) - load_acquire(mem, lane + L.LANE_TAIL)
    return max((ld64(mem, tx + L.LS_MASK) + 1 - used) // _RECORD - 3, 0)


@shared
def _await_room(mem, bench):
    """Sets X_OUT_MAX. Waits a moment if the lane is full: the worker is just emptying it."""
    tx, x = ld64(mem, bench + B_TX), bench + B_X
    fits = _fits(mem, tx)
    if fits == 0:
        end = clock_ns(mem, bench + B_CLOCK, CLOCK_MONOTONIC) + _ROOM_NS
        while fits == 0 and clock_ns(mem, bench + B_CLOCK, CLOCK_MONOTONIC) < end:
            for _ in range(16):
                pause()
            fits = _fits(mem, tx)
    st64(mem, x + T.X_OUT_MAX, min(fits, T.OUT_MAX))
    return fits


@inlined
def _header(mem, body, handle):
    st64(mem, body + L.TX_PCB, ld64(mem, handle + H_PCB))
    st64(mem, body + L.TX_FAMILY, ld64(mem, handle + H_FAMILY))
    st64(mem, body + L.TX_ADDRESS_HI, 0)
    st64(mem, body + L.TX_ADDRESS_LO, 0)


@shared
def _emit(mem, bench, handle):
    """Publishes what is in X_OUT; returns how many segments."""
    tx, x = ld64(mem, bench + B_TX), bench + B_X
    count = ld64(mem, x + T.X_OUT_COUNT)
    if count == 0:
        return 0
    body = tx + TX_BODY
    _header(mem, body, handle)
    for i in range(count):
        copy(mem, body + L.TX_PAYLOAD, x + T.X_OUT + i * T.O_BYTES, T.O_BYTES)
        st64(mem, body + L.TX_PAYLOAD + T.O_DEADLINE, ld64(mem, x + T.X_DEADLINE))
        lane_stage(mem, tx, 0, 0, body, L.TX_PAYLOAD + T.O_BYTES)
    lane_publish(mem, tx)
    tx_door(mem, tx)
    return count


@shared
def _kick(mem, bench, handle, deadline):
    """Tells the continuation worker of `deadline` with a record that is no segment. 1: done."""
    tx = ld64(mem, bench + B_TX)
    body = tx + TX_BODY
    _header(mem, body, handle)
    fill(mem, body + L.TX_PAYLOAD, 0, T.O_BYTES)
    st64(mem, body + L.TX_PAYLOAD + T.O_DEADLINE, deadline)
    if lane_stage(mem, tx, 0, 0, body, L.TX_PAYLOAD + T.O_BYTES) != 1:
        return 0
    lane_publish(mem, tx)
    tx_door(mem, tx)
    return 1


@shared
def _tell(mem, bench, handle, sent, must):
    """Sees to it that the continuation worker runs the connection at X_DEADLINE at the latest; it then finds the
    next deadline by itself, so that one that is still to come needs no other. 1 if it could not be told."""
    x = bench + B_X
    deadline, now = ld64(mem, x + T.X_DEADLINE), ld64(mem, x + T.X_NOW)
    told = ld64(mem, handle + H_TOLD)
    if must and deadline == 0:
        deadline = now
    if deadline == 0 or (told > now and told <= deadline and not must):
        return 0
    if sent == 0 and (must or deadline < now + _SOON) and _kick(mem, bench, handle, deadline) == 0:
        return 1
    if sent != 0 or must or deadline < now + _SOON:
        st64(mem, handle + H_TOLD, min(told, deadline) if told > now else deadline)
    return 0


# -- the run -----------------------------------------------------------------------------------------------


@shared
def _turns(mem, bench, handle):
    """Runs the routine once, with all its output; how many segments went out."""
    x = bench + B_X
    service_run(mem, x)
    sent = _emit(mem, bench, handle)
    for _ in range(_TURNS):
        if ld64(mem, x + T.X_EVENTS) & T.EV_MORE == 0 or _await_room(mem, bench) == 0:
            break
        service_more(mem, x)
        sent += _emit(mem, bench, handle)
    return sent


@shared
def _run_into(mem, bench, handle, must, direct):
    """Runs the routine for the connection: flags. `must`: the continuation worker has to look at it now. `direct`:
    data may go into the application's buffer."""
    x = bench + B_X
    conn = ld64(mem, handle + H_CONN)
    service_bind(mem, x, conn, ld64(mem, handle + H_LANE_BYTES), ld64(mem, handle + H_WORKERS),
                 ld64(mem, handle + H_SEND_BYTES), ld64(mem, handle + H_RECEIVE_BYTES))
    now = clock_ns(mem, bench + B_CLOCK, CLOCK_MONOTONIC)
    st64(mem, x + T.X_NOW, now)
    store_relaxed(mem, conn + T.CONN_CALLED, now)
    if direct:
        st64(mem, x + T.X_DIRECT, ld64(mem, bench + B_BUFFER))
        st64(mem, x + T.X_DIRECT_LEFT, ld64(mem, bench + B_ROOM))
    if _await_room(mem, bench) == 0:
        return FULL
    if service_begin(mem, x) == 0:
        st64(mem, handle + H_BUSY, 1)
        if must and _kick(mem, bench, handle, ld64(mem, x + T.X_NOW)) == 0:
            return BUSY | FULL
        return BUSY
    st64(mem, handle + H_BUSY, 0)
    sent = 0
    again = 1
    while again:
        sent += _turns(mem, bench, handle)
        if ld64(mem, x + T.X_READ) > ld64(mem, handle + H_READ):    # some of it went past the ring
            st64(mem, handle + H_READ, ld64(mem, x + T.X_READ))
            # SYNC conn-read: as in _release. Before the commit, which may load it again.
            store_release(mem, conn + T.CONN_READ, ld64(mem, x + T.X_READ))
        again = service_commit(mem, x)
    flags = FULL if ld64(mem, x + T.X_EVENTS) & T.EV_MORE else 0
    if _tell(mem, bench, handle, sent, must):
        flags |= FULL
    if ld64(mem, x + T.X_EVENTS) & _TOLD:
        # SYNC wake-state: between what was committed and the look at the wake word; pairs with the exchange in
        # wake_arm. Another thread, or an event loop, may wait for what this run has found.
        fence()
        if wake_notify(mem, conn + T.CONN_WAKE) == L.WAKE_PIPE:
            flags |= SWITCH
    return flags


@shared
def _run(mem, bench, handle, must):
    return _run_into(mem, bench, handle, must, 0)


# -- what is there ------------------------------------------------------------------------------------------


@inlined
def _status(mem, handle):
    # SYNC conn-status: acquire pairs with the release in the routine's commit: who sees the end sees all bytes
    # before it.
    return load_acquire(mem, ld64(mem, handle + H_CONN) + T.CONN_STATUS)


@inlined
def _readable(mem, handle):
    """Bytes that can be read. 0: none yet; END, or a negative errno: none will come."""
    status = _status(mem, handle)
    # SYNC conn-received: acquire pairs with the release in the routine's commit; else bytes could be copied that
    # are not there yet.
    have = load_acquire(mem, ld64(mem, handle + H_CONN) + T.CONN_RECEIVED) - ld64(mem, handle + H_READ)
    if have > 0:
        return min(have, ld64(mem, handle + H_RECEIVE_BYTES))
    if status >> T.ST_ERRNO != 0:
        return -(status >> T.ST_ERRNO)
    if status & T.ST_EOF or status & 0xFF == T.CLOSED:
        return END
    return 0


@inlined
def _free(mem, handle):
    """Bytes of the send ring that are free, or a negative errno."""
    status = _status(mem, handle)
    if status >> T.ST_ERRNO != 0:
        return -(status >> T.ST_ERRNO)
    if status & T.ST_SHUT or status & 0xFF == T.CLOSED:
        return -_EPIPE
    # SYNC conn-acked: acquire pairs with the release in the routine's commit; else bytes could be overwritten
    # that are still to be sent.
    acked = load_acquire(mem, ld64(mem, handle + H_CONN) + T.CONN_ACKED)
    size = ld64(mem, handle + H_SEND_BYTES)
    return max(0, min(size, size - (ld64(mem, handle + H_WRITTEN) - acked)))


@inlined
def _queued(mem, handle):
    """Whether segments wait in the lanes."""
    for worker in range(ld64(mem, handle + H_WORKERS)):
        lane = lane_place(ld64(mem, handle + H_CONN), ld64(mem, handle + H_LANE_BYTES), worker)
        if lane_peek(mem, lane) != load_relaxed(mem, lane + L.LANE_TAIL):
            return True
    return False


@inlined
def _opening(mem, handle):
    status = _status(mem, handle)
    state = status & 0xFF
    return (state == T.CLOSED or state == T.SYN_SENT or state == T.SYN_RECEIVED) and status >> T.ST_ERRNO == 0


@inlined
def _unsent(mem, handle):
    """Whether there are bytes that the peer has not acknowledged, and may still."""
    status = _status(mem, handle)
    if status >> T.ST_ERRNO != 0 or status & 0xFF == T.CLOSED:
        return False
    # SYNC conn-acked: as in _free.
    return load_acquire(mem, ld64(mem, handle + H_CONN) + T.CONN_ACKED) < ld64(mem, handle + H_WRITTEN)


@inlined
def _ready(mem, handle, want):
    """Whether there is something to do for who waits for `want`."""
    if want & READ and _readable(mem, handle) != 0:
        return True
    if want & WRITE:
        free = _free(mem, handle)
        if free < 0 or 3 * free >= ld64(mem, handle + H_SEND_BYTES):
            return True
    if want & OPEN and not _opening(mem, handle):
        return True
    if want & SENT and not _unsent(mem, handle):
        return True
    return ld64(mem, handle + H_BUSY) == 0 and _queued(mem, handle)


# -- the application's calls ------------------------------------------------------------------------------------


@inlined
def _release(mem, handle, count):
    """Gives `count` bytes of the receive ring back; 1 if the window should open."""
    conn = ld64(mem, handle + H_CONN)
    read = ld64(mem, handle + H_READ) + count
    st64(mem, handle + H_READ, read)
    # SYNC conn-read: release pairs with the acquire in the routine; else the ring could be written while we still
    # copy out of it.
    store_release(mem, conn + T.CONN_READ, read)
    size = ld64(mem, handle + H_RECEIVE_BYTES)
    block = conn + T.CONN_BLOCKS + (load_relaxed(mem, conn + T.CONN_CURRENT) & 1) * T.TCB_BYTES
    # RFC 9293 section 3.8.6.2.2, and not for every segment: two of them, or half of the ring.
    worth = min(size // 2, 2 * max(ld64(mem, block + T.T_RCV_MSS), 536))
    return 1 if read + size - load_relaxed(mem, conn + T.CONN_RIGHT) >= worth else 0


@shared
def _receive(mem, bench, handle, count):
    """The application has read `count` bytes more. Bytes that can be read now: 0, END or a negative errno if there
    are none."""
    flags, ran = 0, 0
    if count > 0 and _release(mem, handle, count):
        flags, ran = _run(mem, bench, handle, 0), 1
    have = _readable(mem, handle)
    # Without a segment there is nothing to do but timers, and those are the continuation worker's.
    if have == 0 and ran == 0 and _queued(mem, handle):
        flags = _run(mem, bench, handle, 0)
        have = _readable(mem, handle)
    return have | flags if have >= 0 else have


@shared
def _receive_into(mem, bench, handle, count):
    """As _receive; what comes now may go into the buffer at B_BUFFER: DIRECT and how many bytes did."""
    if count > 0 and _release(mem, handle, count):
        return _receive(mem, bench, handle, 0) if _readable(mem, handle) != 0 else _fetch(mem, bench, handle)
    if _readable(mem, handle) == 0 and _queued(mem, handle):
        return _fetch(mem, bench, handle)
    return _receive(mem, bench, handle, 0)


@shared
def _fetch(mem, bench, handle):
    before = ld64(mem, handle + H_READ)
    flags = _run_into(mem, bench, handle, 0, 1)
    direct = ld64(mem, handle + H_READ) - before
    if direct > 0:
        return direct | flags | DIRECT
    have = _readable(mem, handle)
    return have | flags if have >= 0 else have


@shared
def _room(mem, bench, handle, enough):
    """Free bytes of the send ring, or a negative errno. The routine is run if there are less than `enough`."""
    free = _free(mem, handle)
    if free < 0 or free >= enough or not _queued(mem, handle):
        return free
    flags = _run(mem, bench, handle, 0)
    free = _free(mem, handle)
    return free | flags if free >= 0 else free


@shared
def _wrote(mem, bench, handle, count):
    """The application has put `count` bytes into the send ring, and they go. Free bytes there now; or a negative
    errno: then they do not."""
    free = _free(mem, handle)
    if free < 0:
        return free
    written = ld64(mem, handle + H_WRITTEN) + count
    st64(mem, handle + H_WRITTEN, written)
    # SYNC conn-written: release pairs with the acquire in the routine; else bytes could be sent that are not in
    # the ring yet.
    store_release(mem, ld64(mem, handle + H_CONN) + T.CONN_WRITTEN, written)
    flags = _run(mem, bench, handle, 0)
    free = _free(mem, handle)
    return free | flags if free >= 0 else flags


@shared
def _request(mem, bench, handle, bits):
    """The application asks for REQ_... `bits`: flags."""
    conn = ld64(mem, handle + H_CONN)
    # SYNC conn-request: release pairs with the acquire in the routine; else a close could be seen before the
    # last bytes that were written.
    store_release(mem, conn + T.CONN_REQUEST, ld64(mem, conn + T.CONN_REQUEST) | bits)
    return _run(mem, bench, handle, 1)


@kernel("i64(mem, i64, i64, i64, i64)")
def call(mem, bench, handle, what, argument):
    """One of the application's calls, with the lock of the bench. All in one kernel, so that there is one copy of
    the protocol.

    RECEIVE     see _receive
    RECEIVE_INTO  see _receive_into
    RELEASE     has read `argument` bytes more: flags
    ROOM        see _room
    WROTE       see _wrote; bytes
    REQUEST     see _request; REQ_...
    STATUS      runs the routine: CONN_STATUS
    POKE        runs the routine, which may have been told something new: flags. `argument`: the continuation
                worker is to look at it, too
    """
    if what == RECEIVE:
        return _receive(mem, bench, handle, argument)
    if what == RECEIVE_INTO:
        return _receive_into(mem, bench, handle, argument)
    if what == RELEASE:
        return _run(mem, bench, handle, 0) if _release(mem, handle, argument) else 0
    if what == REQUEST:
        return _request(mem, bench, handle, argument)
    if what == POKE:
        return _run(mem, bench, handle, argument)
    if what == STATUS:
        flags = _run(mem, bench, handle, 0)
        return _status(mem, handle) | flags
    if load_relaxed(mem, ld64(mem, bench + B_STOPPED)) != 0:
        return STOPPED
    return _room(mem, bench, handle, argument) if what == ROOM else _wrote(mem, bench, handle, argument)


@kernel("none(mem, i64, vec)")
def facts(mem, handle, out):
    """Copies the application's and the protocol's words, up to CONN_BLOCKS, and then the current control block."""
    conn = ld64(mem, handle + H_CONN)
    for i in range(T.CONN_BLOCKS // 8):
        out[i] = load_relaxed(mem, conn + 8 * i)
    for _ in range(16):
        # SYNC conn-commit: acquire pairs with the release in the routine's commit, which writes the other block.
        current = load_acquire(mem, conn + T.CONN_CURRENT)
        block = conn + T.CONN_BLOCKS + (current & 1) * T.TCB_BYTES
        for i in range(T.TCB_BYTES // 8):
            out[T.CONN_BLOCKS // 8 + i] = load_relaxed(mem, block + 8 * i)
        if load_relaxed(mem, conn + T.CONN_CURRENT) == current:
            break


# -- waiting ------------------------------------------------------------------------------------------------------


@inlined
def _spin(mem, handle, want, spin_ns, deadline):
    clock = handle + (H_UNTIL if want == READ else H_UNTIL + 16)
    now = clock_ns(mem, clock, CLOCK_MONOTONIC)
    store_relaxed(mem, ld64(mem, handle + H_CONN) + T.CONN_CALLED, now)
    end = min(now + spin_ns, deadline)
    while True:
        if _ready(mem, handle, want):
            return True
        for _ in range(16):
            pause()
        if clock_ns(mem, clock, CLOCK_MONOTONIC) >= end:
            return False


@inlined
def _leave(mem, handle, wake):
    """Awake again. See above: another thread that still sleeps must neither be disarmed nor be forgotten."""
    # SYNC sleepers: full barrier between this and the looks behind it, pairs with the fetch_add in `wait` before
    # wake_arm: either we see the other thread, or it arms behind our disarming.
    others = fetch_add(mem, handle + H_SLEEPERS, -1) - 1
    if others == 0:
        wake_disarm(mem, wake)
        fence()     # SYNC sleepers: one that has come and armed since
        if load_relaxed(mem, handle + H_SLEEPERS) > 0:
            futex_wake(mem, wake + L.WAKE_STATE)
    elif load_relaxed(mem, wake + L.WAKE_STATE) == L.WAKE_AWAKE:
        futex_wake(mem, wake + L.WAKE_STATE)


@kernel("i64(mem, i64, i64, i64, i64)")
def wait(mem, handle, want, spin_ns, deadline):
    """Spins, then sleeps until there is something to do for `want` (1), or until `deadline` (ns of
    CLOCK_MONOTONIC), a signal or a false alarm (0). Without the bench."""
    if spin_ns > 0 and _spin(mem, handle, want, spin_ns, deadline):
        return 1
    wake = ld64(mem, handle + H_CONN) + T.CONN_WAKE
    # SYNC sleepers: full barrier before the arming, pairs with the one in _leave.
    fetch_add(mem, handle + H_SLEEPERS, 1)
    # SYNC wake-state: full barrier before the look, pairs with the notifier's fence; else this could sleep
    # on what was just published.
    wake_arm(mem, wake, L.WAKE_FUTEX)
    found = _ready(mem, handle, want)
    if not found:
        wake_sleep(mem, wake, deadline, handle + (H_UNTIL if want == READ else H_UNTIL + 16))
    _leave(mem, handle, wake)
    return 1 if found or _ready(mem, handle, want) else 0


@kernel("none(mem, i64)")
def wake(mem, handle):
    """Ends the sleep of other threads of this process."""
    word = ld64(mem, handle + H_CONN) + T.CONN_WAKE + L.WAKE_STATE
    store_relaxed(mem, word, L.WAKE_AWAKE)
    fence()     # SYNC sleepers: pairs with the fetch_add in `wait`: who arms behind this looks behind it, too
    futex_wake(mem, word)


@kernel("i64(mem, i64, i64)")
def arm(mem, handle, want):
    """From now on the event loop's bell announces what `want` says. 1 if it is there already: then it does not."""
    wake = ld64(mem, handle + H_CONN) + T.CONN_WAKE
    # SYNC wake-state: as in `wait`.
    wake_arm(mem, wake, L.WAKE_PIPE)
    if _ready(mem, handle, want):
        wake_disarm(mem, wake)
        return 1
    st64(mem, ld64(mem, handle + H_ENTRY), wake)
    return 0
