"""The end of a connection: out of the table, TIME_WAIT without its owner's memory, the slot back to where it is used.

Called by the continuation worker's step, which alone does any of this. A connection is over when its state is CLOSED
or TIME_WAIT and its application is gone. Then, each arrow one store:

    PCB_OPEN ─ 1 ─► out of its bucket, or its entry names a TIME_WAIT PCB
             ─ 2 ─► PCB_CLOSING, and waits for the epoch: no worker stages into its lanes any more
             ─ 3 ─► lanes emptied, what was in them is counted as consumed; then either
                      PCB_RETURN, PCB_SLOT ─► in the slot queue of its RX worker (pcb/slots.py), or
                      reported to the supervisor, still PCB_CLOSING

TIME_WAIT PCBs (numbers from T_TIME_WAIT_AT on): PCB_FREE ─► filled, PCB_OPEN ─► in a bucket in place of the
connection ─► claimed: PCB_CLOSING ─► out of the bucket ─► epoch ─► PCB_FREE. Two may claim one, by compare-and-swap
of PCB_STATE: this worker, when its time is up or when the pool is short (the oldest goes first), or an RX worker,
which replaces the entry by a new connection's (inet/tcp_accept.py). So never do two change one entry. What an RX
worker has claimed is looked at when its time would have been up: the entry is removed, should it still be there,
an epoch later, for by then that worker is past it, or dead.

What a replacement finds after the death of this worker at any instruction, and does (`reap_recover`):

    PCB_OPEN                 runs it once: timers that were taken, ends that were not begun, all come out of that. If
                             it is out of its bucket already (death between 1 and 2), it ends again: removal and
                             replacement say that there was nothing, and the spare TIME_WAIT PCB is freed
    PCB_CLOSING              removes it from its bucket (nothing, if it was) and waits for a new epoch
    PCB_SLOT and PCB_RETURN  puts it into its queue, unless it is there, or in its worker's list, or in use. Looked at
                             in this order, it cannot slip through: it only moves that way (`_is_held`)
    TIME_WAIT, PCB_OPEN      waits for its time, whether its entry is there or not yet: removing what is not there
                             does nothing
    TIME_WAIT, PCB_CLOSING   takes it for one that an RX worker has claimed
    TIME_WAIT, PCB_FREE      is in the pool
    reported, not heard      the supervisor reads a dead worker's last words before it forks the replacement, and by
                             then the PCB is no longer PCB_CLOSING; else it is reported again

Floor 3. `w` is the continuation worker's block, W_KCONT in it the place `k` of its private area.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.kcont import area as K
from dataplane.kcont.wheel import tick_after, wheel_insert, wheel_remove
from dataplane.pcb.lookup import bucket_remove, bucket_replace
from dataplane.rings.pcq import pcq_put
from dataplane.shm import epoch
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import cas, fence, ld64, load_acquire, load_relaxed, st64, store_release

__all__ = ["reap", "reap_again", "reap_settle", "reap_recover", "time_wait_due"]

_advance, _passed = epoch.advance.inner, epoch.passed.inner
_bucket_remove, _bucket_replace = bucket_remove.inner, bucket_replace.inner

_CLAIMED = 1 << 32      # beside a number in the ring: an RX worker has claimed this TIME_WAIT PCB
_LOOK_MIN, _LOOK_MAX = 1_000_000, 50_000_000    # ns between two looks at an epoch that does not pass
_SETTLE = 1024          # PCBs settled in one step


@inlined
def _pcb(mem, w, number):
    return ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS) + number * L.PCB_BYTES


# -- waiting for an epoch ----------------------------------------------------------------------------


@shared
def _wait(mem, w, item):
    """`item` is looked at again when all RX workers have passed a new epoch. There is room: each PCB is in once."""
    k = ld64(mem, w + L.W_KCONT)
    head = ld64(mem, k + K.K_WAIT_HEAD)
    entry = ld64(mem, k + K.K_WAIT) + 16 * (head & ld64(mem, k + K.K_WAIT_MASK))
    st64(mem, entry, item)
    st64(mem, entry + 8, _advance(mem, ld64(mem, w + L.W_TABLE)))
    st64(mem, k + K.K_WAIT_HEAD, head + 1)


@shared
def reap_settle(mem, w):
    """Finishes what has waited long enough; returns how many."""
    k = ld64(mem, w + L.W_KCONT)
    table = ld64(mem, w + L.W_TABLE)
    settled = 0
    for _ in range(_SETTLE):
        tail = ld64(mem, k + K.K_WAIT_TAIL)
        if tail == ld64(mem, k + K.K_WAIT_HEAD):
            break
        entry = ld64(mem, k + K.K_WAIT) + 16 * (tail & ld64(mem, k + K.K_WAIT_MASK))
        if _passed(mem, table, ld64(mem, entry + 8)) == 0:
            break
        st64(mem, k + K.K_WAIT_TAIL, tail + 1)
        _settle(mem, w, ld64(mem, entry))
        settled += 1
    look = ld64(mem, k + K.K_LOOK)
    st64(mem, k + K.K_LOOK, _LOOK_MIN if settled else min(max(2 * look, _LOOK_MIN), _LOOK_MAX))
    return settled


@inlined
def _settle(mem, w, item):
    number = item & 0xFFFFFFFF
    pcb = _pcb(mem, w, number)
    if ld64(mem, pcb + L.PCB_KIND) == L.PK_CONNECTION:
        _give_back(mem, w, number)
    elif item & _CLAIMED:
        _bucket_remove(mem, ld64(mem, w + L.W_TABLE), number)
        _wait(mem, w, number)
    else:
        st64(mem, pcb + L.PCB_STATE, L.PCB_FREE)
        _pool_put(mem, w, number)


# -- connections -------------------------------------------------------------------------------------


@shared
def reap(mem, w, number, x, now):
    """Connection `number`, with its control block in `x`, is over: 1, or 0 if it has to be tried again in a moment
    (no TIME_WAIT PCB is free)."""
    table = ld64(mem, w + L.W_TABLE)
    pool = ld64(mem, table + L.T_SOCKETS) - ld64(mem, table + L.T_TIME_WAIT_AT)
    if ld64(mem, x + T.X_TCB + T.T_STATE) == T.TIME_WAIT and pool > 0:
        entry = _pool_take(mem, w, now)
        if entry < 0:
            return 0
        _time_wait_fill(mem, w, entry, number, x)
        # SYNC bucket-entry: the PCB comes before the entry that names it; pairs with the acquire in probe.
        fence()
        if _bucket_replace(mem, table, number, entry):
            _age_push(mem, w, entry)
            until = ld64(mem, _pcb(mem, w, entry) + L.PCB_TW_UNTIL)
            wheel_insert(mem, ld64(mem, w + L.W_KCONT), entry, tick_after(until))
        else:               # a predecessor died just here: this one was never seen
            st64(mem, _pcb(mem, w, entry) + L.PCB_STATE, L.PCB_FREE)
            _pool_put(mem, w, entry)
    _close(mem, w, number)
    return 1


@shared
def reap_again(mem, w, number):
    """Takes a connection out without a look at its state."""
    _close(mem, w, number)


@shared
def _close(mem, w, number):
    _bucket_remove(mem, ld64(mem, w + L.W_TABLE), number)
    # SYNC reap-state: release; a replacement finds a PCB that says so out of its bucket or takes it out.
    store_release(mem, _pcb(mem, w, number) + L.PCB_STATE, L.PCB_CLOSING)
    wheel_remove(mem, ld64(mem, w + L.W_KCONT), number)
    _wait(mem, w, number)


@inlined
def _discard(mem, table, number):
    """Empties the lanes: what is in them counts as consumed. What counts here stands in the table; the slot is
    only written."""
    state = ld64(mem, table + L.T_LANES) + number * L.LS_BYTES
    for _ in range(ld64(mem, table + L.T_WORKERS)):
        lane = ld64(mem, state + L.LS_BASE)
        if lane != 0:
            st64(mem, lane + L.LANE_CONSUMED, ld64(mem, state + L.LS_COUNT))
            # SYNC lane-tail: in the place of the application; pairs with _refresh_tail in the RX worker.
            store_release(mem, lane + L.LANE_TAIL, ld64(mem, state + L.LS_PUBLISHED))
        state += ld64(mem, table + L.T_SOCKETS) * L.LS_BYTES


@inlined
def _is_wanted(mem, w, pcb, number):
    """Whether the slot goes to its RX worker: its listener is open, its owner is there."""
    listener = ld64(mem, pcb + L.PCB_LISTENER) - 1
    table = ld64(mem, w + L.W_TABLE)
    if listener < 0 or ld64(mem, ld64(mem, ld64(mem, w + L.W_KCONT) + K.K_ORPHANS) + 8 * number) != 0:
        return False
    if ld64(mem, pcb + L.PCB_WORKER) >= ld64(mem, table + L.T_WORKERS):
        return False
    place = _pcb(mem, w, listener)
    # Closed meanwhile? Then the supervisor's Unlisten, which we answer between two steps, comes behind our put.
    return load_relaxed(mem, place + L.PCB_STATE) == L.PCB_OPEN and ld64(mem, place + L.PCB_KIND) == L.PK_LISTEN


@inlined
def _queue(mem, w, pcb):
    table = ld64(mem, w + L.W_TABLE)
    return (ld64(mem, table + L.T_SLOT_QUEUES)
            + ld64(mem, pcb + L.PCB_WORKER) * ld64(mem, table + L.T_SLOT_QUEUE_BYTES))


@shared
def _give_back(mem, w, number):
    """No worker can find the connection any more: empties its lanes, and the slot is free."""
    pcb = _pcb(mem, w, number)
    if ld64(mem, pcb + L.PCB_STATE) != L.PCB_CLOSING:
        return              # the supervisor was just making it when we looked (reap_recover)
    _discard(mem, ld64(mem, w + L.W_TABLE), number)
    st64(mem, pcb + L.PCB_DUE, 0)
    given = 0
    if _is_wanted(mem, w, pcb, number):
        # SYNC reap-return: release, before PCB_SLOT, for a replacement's look in _return.
        store_release(mem, pcb + L.PCB_RETURN, 1)
        # SYNC reap-state: release, before the slot is in the queue; pairs with the RX worker's look at it.
        store_release(mem, pcb + L.PCB_STATE, L.PCB_SLOT)
        given = pcq_put(mem, _queue(mem, w, pcb), number, ld64(mem, w + L.W_STAMP))
        if given == 0:
            # SYNC reap-state: taken back; nobody has seen it.
            store_release(mem, pcb + L.PCB_STATE, L.PCB_CLOSING)
        # SYNC reap-return: release, behind the queue.
        store_release(mem, pcb + L.PCB_RETURN, 0)
    k = ld64(mem, w + L.W_KCONT)
    if given == 0:
        count = ld64(mem, k + K.K_DONE_COUNT)
        st64(mem, ld64(mem, k + K.K_DONE) + 8 * count, number)
        st64(mem, k + K.K_DONE_COUNT, count + 1)
    st64(mem, ld64(mem, k + K.K_ORPHANS) + 8 * number, 0)


# -- TIME_WAIT ---------------------------------------------------------------------------------------


@shared
def _time_wait_fill(mem, w, entry, number, x):
    """Makes TIME_WAIT PCB `entry` what is left of connection `number`. Nobody can find it yet."""
    pcb = _pcb(mem, w, entry)
    source = _pcb(mem, w, number)
    t = x + T.X_TCB
    for word in (L.PCB_LOCAL_HI, L.PCB_LOCAL_LO, L.PCB_REMOTE_HI, L.PCB_REMOTE_LO, L.PCB_KEY):
        st64(mem, pcb + word, ld64(mem, source + word))
    for word in (L.PCB_GROUP, L.PCB_NEXT, L.PCB_PREVIOUS, L.PCB_OWNER):
        st64(mem, pcb + word, 0)
    st64(mem, pcb + L.PCB_KIND, L.PK_TIME_WAIT)
    st64(mem, pcb + L.PCB_GENERATION, (ld64(mem, pcb + L.PCB_GENERATION) + 1) & 0x7FFFFFFF)
    received = (ld64(mem, t + T.T_IRS) + ld64(mem, t + T.T_RCV_NXT)) & 0xFFFFFFFF
    sent = (ld64(mem, t + T.T_ISS) + ld64(mem, t + T.T_SND_MAX)) & 0xFFFFFFFF
    st64(mem, pcb + L.PCB_TW_NUMBERS, received | sent << 32)
    st64(mem, pcb + L.PCB_TW_STAMPS,
         (ld64(mem, t + T.T_TS_RECENT) & 0xFFFFFFFF) | (ld64(mem, t + T.T_TS_OFFSET) & 0xFFFFFFFF) << 32)
    window = (ld64(mem, t + T.T_RCV_RIGHT) - ld64(mem, t + T.T_RCV_NXT)) >> ld64(mem, t + T.T_RCV_SHIFT)
    st64(mem, pcb + L.PCB_TW_FLAGS, (ld64(mem, t + T.T_FLAGS) & 0xFFFF) | min(max(window, 0), 65535) << 16)
    now = ld64(mem, x + T.X_NOW)
    latest = now + ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_TIME_WAIT_NS)
    end = ld64(mem, t + T.T_END_AT)
    st64(mem, pcb + L.PCB_TW_UNTIL, end if now < end < latest else latest)
    # SYNC reap-state: release, behind all of the above; what a replacement finds open is complete.
    store_release(mem, pcb + L.PCB_STATE, L.PCB_OPEN)


@shared
def _time_wait_end(mem, w, number):
    """Claims the entry and takes it out, whatever the time."""
    pcb = _pcb(mem, w, number)
    _age_remove(mem, w, number)
    wheel_remove(mem, ld64(mem, w + L.W_KCONT), number)
    # SYNC time-wait-end: one of the two gets it; pairs with the cas of an RX worker (inet/tcp_accept.py).
    if cas(mem, pcb + L.PCB_STATE, L.PCB_OPEN, L.PCB_CLOSING):
        _bucket_remove(mem, ld64(mem, w + L.W_TABLE), number)
        _wait(mem, w, number)
    else:
        _wait(mem, w, number | _CLAIMED)


@shared
def time_wait_due(mem, w, number, now):
    """The wheel's time for a TIME_WAIT PCB has come."""
    pcb = _pcb(mem, w, number)
    until = load_relaxed(mem, pcb + L.PCB_TW_UNTIL)     # RX workers set it anew for each FIN that comes again
    if until > now:
        wheel_insert(mem, ld64(mem, w + L.W_KCONT), number, tick_after(until))
    else:
        _time_wait_end(mem, w, number)


@shared
def _pool_put(mem, w, number):
    k = ld64(mem, w + L.W_KCONT)
    count = ld64(mem, k + K.K_POOL_COUNT)
    st64(mem, ld64(mem, k + K.K_POOL) + 8 * count, number)
    st64(mem, k + K.K_POOL_COUNT, count + 1)


@shared
def _pool_take(mem, w, now):
    """A free TIME_WAIT PCB, or -1. When few are left, the oldest in use goes: it is free an epoch later."""
    k = ld64(mem, w + L.W_KCONT)
    table = ld64(mem, w + L.W_TABLE)
    count = ld64(mem, k + K.K_POOL_COUNT)
    reserve = min(64, (ld64(mem, table + L.T_SOCKETS) - ld64(mem, table + L.T_TIME_WAIT_AT)) // 4)
    oldest = ld64(mem, k + K.K_OLDEST)
    # Not more than the reserve at a time: who asks again and again while an epoch does not pass evicts nobody more.
    waiting = ld64(mem, k + K.K_WAIT_HEAD) - ld64(mem, k + K.K_WAIT_TAIL)
    if count <= reserve and oldest != 0 and (count > 0 or waiting == 0):
        _time_wait_end(mem, w, oldest - 1)
    if count == 0:
        return -1
    st64(mem, k + K.K_POOL_COUNT, count - 1)
    return ld64(mem, ld64(mem, k + K.K_POOL) + 8 * (count - 1))


@inlined
def _age(mem, w, number):
    first = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_TIME_WAIT_AT)
    return ld64(mem, ld64(mem, w + L.W_KCONT) + K.K_AGE) + 16 * (number - first)


@shared
def _age_push(mem, w, number):
    """The youngest of those in use."""
    k = ld64(mem, w + L.W_KCONT)
    newest = ld64(mem, k + K.K_NEWEST)
    st64(mem, _age(mem, w, number), 0)
    st64(mem, _age(mem, w, number) + 8, newest)
    if newest != 0:
        st64(mem, _age(mem, w, newest - 1), number + 1)
    else:
        st64(mem, k + K.K_OLDEST, number + 1)
    st64(mem, k + K.K_NEWEST, number + 1)


@shared
def _age_remove(mem, w, number):
    k = ld64(mem, w + L.W_KCONT)
    following = ld64(mem, _age(mem, w, number))
    before = ld64(mem, _age(mem, w, number) + 8)
    if before != 0:
        st64(mem, _age(mem, w, before - 1), following)
    else:
        st64(mem, k + K.K_OLDEST, following)
    if following != 0:
        st64(mem, _age(mem, w, following - 1) + 8, before)
    else:
        st64(mem, k + K.K_NEWEST, before)


# -- after a death -----------------------------------------------------------------------------------


@shared
def _in_queue(mem, queue, number):
    """Whether the number is in a pcq that others take from meanwhile."""
    for index in range(ld64(mem, queue + L.PCQ_CAPACITY)):
        slot = queue + L.PCQ_SLOTS + index * L.PCQ_SLOT_BYTES
        # SYNC pcq-item: acquire, pairs with the release in pcq_publish.
        if load_acquire(mem, slot + L.PCQ_WORD) & 3 == L.PCQ_FULL and ld64(mem, slot + L.PCQ_ITEM) == number:
            return True
    return False


@shared
def _is_held(mem, w, pcb, number):
    """Whether the slot is in its worker's queue or list, or in use: it moves from one to the next, in this order,
    and each time is in the next before it leaves the former. Nothing but us brings it back."""
    table = ld64(mem, w + L.W_TABLE)
    if _in_queue(mem, _queue(mem, w, pcb), number):
        return True
    row = ld64(mem, pcb + L.PCB_WORKER) * ld64(mem, table + L.T_SOCKETS)
    listener = ld64(mem, pcb + L.PCB_LISTENER) - 1
    # SYNC slot-head: acquire, pairs with the release of the worker that links.
    following = load_acquire(mem, ld64(mem, table + L.T_SLOT_HEADS) + (row + listener) * 8)
    for _ in range(ld64(mem, table + L.T_SOCKETS)):
        if following <= 0:
            break
        if following == number + 1:
            return True
        following = ld64(mem, _pcb(mem, w, following - 1) + L.PCB_NEXT)
    # SYNC reap-state: acquire, pairs with the release of the worker that opens it before it leaves the list.
    return load_acquire(mem, pcb + L.PCB_STATE) != L.PCB_SLOT


@shared
def _return(mem, w, number):
    """A predecessor died while it gave this slot back."""
    pcb = _pcb(mem, w, number)
    if _is_wanted(mem, w, pcb, number) and not _is_held(mem, w, pcb, number):
        pcq_put(mem, _queue(mem, w, pcb), number, ld64(mem, w + L.W_STAMP))
    # SYNC reap-return: release, behind the queue.
    store_release(mem, pcb + L.PCB_RETURN, 0)


@shared
def reap_recover(mem, w, now):
    """For a worker that has just started, after whoever: every PCB gets on. See the module's head."""
    k = ld64(mem, w + L.W_KCONT)
    table = ld64(mem, w + L.W_TABLE)
    first = ld64(mem, table + L.T_TIME_WAIT_AT)
    for number in range(first):
        pcb = _pcb(mem, w, number)
        if ld64(mem, pcb + L.PCB_KIND) != L.PK_CONNECTION:
            continue
        # SYNC reap-state: acquire, pairs with the releases of a dead predecessor.
        state = load_acquire(mem, pcb + L.PCB_STATE)
        if state == L.PCB_CLOSING:
            _bucket_remove(mem, table, number)
            _wait(mem, w, number)
        elif state == L.PCB_OPEN:
            wheel_insert(mem, k, number, tick_after(now))
        elif state == L.PCB_SLOT and ld64(mem, pcb + L.PCB_RETURN) != 0:
            _return(mem, w, number)
    for number in range(first, ld64(mem, table + L.T_SOCKETS)):
        pcb = _pcb(mem, w, number)
        # SYNC reap-state: acquire, as above.
        state = load_acquire(mem, pcb + L.PCB_STATE)
        if state == L.PCB_OPEN:
            _age_push(mem, w, number)
            wheel_insert(mem, k, number, tick_after(max(ld64(mem, pcb + L.PCB_TW_UNTIL), 0)))
        elif state == L.PCB_CLOSING:
            _wait(mem, w, number | _CLAIMED)
        else:
            _pool_put(mem, w, number)
