"""How a connection gets its continuation: one word per PCB says when, a pcq says who, and nobody is lost.

PCB_DUE is the truth: the time at which the continuation worker will run the connection at the latest,
0 if it will not. The pcq T_KCONT only carries PCB numbers to it, as hints; the same number may be in it
many times, and one for nothing costs a look.

    RX worker                                     continuation worker
      publish segments in the connection's lane     kcont_collect: take numbers, put them into the wheel
      one fence for the whole burst                   at their PCB_DUE
      kcont_schedule:                               PCB due:
        PCB_DUE set and early enough: done            kcont_take: exchange PCB_DUE <- 0
        cas PCB_DUE <- deadline                       drain the lanes, run the protocol
        pcq_put; fence; wake if it sleeps longer      kcont_rearm for the connection's own next timer

Invariants.
 I1  PCB_DUE moves from 0 to a time, or to an earlier time, by compare-and-swap: by any worker. To 0 by
     the continuation worker only, before it reads the lanes. So whoever finds it set *after* a full
     barrier behind its publish knows that the drain is still to come; without that barrier its look could
     be done before its head is visible, and the segment would wait for the next one. That is why a caller that has
     staged something calls this behind publish_lanes, never before it.
 I2  A PCB whose PCB_DUE is set is in the wheel at that time or earlier, or its number is in the pcq, or
     T_KCONT_SWEEP is set or about to be by the one who set PCB_DUE. So a full pcq loses nobody: the sweep looks
     at every PCB.
 I3  Who sleeps says until when (T_KCONT_UNTIL), arms its wake object, and looks at the pcq and at
     T_KCONT_SWEEP once more; the other side writes these, then a full barrier, then looks at the two words. One sees
     the other. A deadline behind T_KCONT_UNTIL needs no wake: the sleeper looks at the pcq by then.

Deaths. A worker that dies between PCB_DUE and the pcq, or holding a slot of the pcq, leaves a PCB that
nobody announces: so the supervisor calls `kcont_mourn` for every dead worker: the slot is given up, and
the continuation worker sweeps. While a worker is only slow (stopped) in there, the queue behind it cannot be
read: `kcont_stuck`, and the continuation worker sweeps every now and then. If the continuation worker itself dies, its
replacement looks at every connection once (reaper.py), whatever its PCB_DUE says: what was taken and not
done is done again, and one for nothing is harmless.

Floor 3. `w` is the calling worker's block.
"""

from __future__ import annotations

from dataplane.jit import inlined, kernel, shared
from dataplane.rings.pcq import pcq_get, pcq_peek, pcq_put, pcq_repair, pcq_stuck
from dataplane.rings.wake import wake_arm, wake_disarm, wake_notify
from dataplane.shm import layout as L
from dataplane.shm.atomics import (
    cas,
    exchange,
    fence,
    ld64,
    load_acquire,
    load_relaxed,
    st64,
    store_relaxed,
    store_release,
)
from dataplane.shm.libc import write

__all__ = [
    "kcont_arm", "kcont_disarm", "kcont_lower", "kcont_mourn", "kcont_next", "kcont_schedule", "kcont_stuck",
    "kcont_swept", "kcont_take",
]

NEVER = (1 << 63) - 1
_RACES = 64             # each lost one means that somebody else has changed PCB_DUE: to what it will be run at
_ONE = L.W_SCRATCH + 240


# -- any worker --------------------------------------------------------------------------------------


@inlined
def _due(mem, table, number):
    return ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES + L.PCB_DUE


@inlined
def kcont_lower(mem, due, deadline):
    """Makes the PCB_DUE at `due` this deadline, unless it is as early already; 1 if it was changed."""
    for _ in range(_RACES):
        # SYNC kcont-due: behind the caller's full barrier, pairs with the exchange in kcont_take; else a
        # continuation that is just being taken could be counted on for what it does not see.
        before = load_acquire(mem, due)
        if before != 0 and before <= deadline:
            return 0
        # SYNC kcont-due: pairs with the same in other workers and with the exchange in kcont_take; else a
        # deadline could be replaced by a later one.
        if cas(mem, due, before, deadline):
            return 1
    return 0


@shared
def _ring(mem, w, table):
    """Wakes the continuation worker if it sleeps."""
    if wake_notify(mem, table + L.T_KCONT_WAKE) == L.WAKE_PIPE:
        st64(mem, w + _ONE, 1)
        write(mem, ld64(mem, table + L.T_KCONT_ROPE), w + _ONE, 8)


@shared
def kcont_schedule(mem, w, number, deadline):
    """The continuation worker will run connection `number` at `deadline` (CLOCK_MONOTONIC ns) at the latest;
    0: no need. It is armed if it is not pending, or moved to an earlier time, never to a later one.

    Whoever calls this for what it has put into the connection's lane has published that, with a full barrier
    behind it (I1). Costs one load when the continuation is pending.
    """
    table = ld64(mem, w + L.W_TABLE)
    if deadline <= 0 or kcont_lower(mem, _due(mem, table, number), deadline) == 0:
        return
    if pcq_put(mem, ld64(mem, table + L.T_KCONT), number, ld64(mem, w + L.W_STAMP)) == 0:
        # SYNC kcont-sweep: release, behind PCB_DUE; pairs with the exchange in kcont_swept; else the sweep
        # could come by before PCB_DUE is set.
        store_release(mem, table + L.T_KCONT_SWEEP, 1)
    # SYNC kcont-sleep: full barrier between the queue and the words of who sleeps; pairs with the exchange of
    # wake_arm in kcont_arm; else it could fall asleep on this number while we still see it awake.
    fence()
    if deadline < load_relaxed(mem, table + L.T_KCONT_UNTIL):
        _ring(mem, w, table)


@kernel("i64(mem, i64, i64)")
def kcont_mourn(mem, table, dead):
    """Supervisor: the worker stamped `dead` is dead. What it had reserved in the pcq is given up, and the
    continuation worker will look at every PCB. The caller rings its doorbell."""
    lost = pcq_repair(mem, ld64(mem, table + L.T_KCONT), dead)
    # SYNC kcont-sweep: release, as in kcont_schedule, in the place of the dead.
    store_release(mem, table + L.T_KCONT_SWEEP, 1)
    return lost


# -- the continuation worker -------------------------------------------------------------------------


@inlined
def kcont_next(mem, w):
    """Takes the next number from the pcq: -1 if there is none, -2 for one that cannot be."""
    table = ld64(mem, w + L.W_TABLE)
    if pcq_get(mem, ld64(mem, table + L.T_KCONT), w + L.W_SCRATCH) == 0:
        return -1
    number = ld64(mem, w + L.W_SCRATCH)
    return number if 0 <= number < ld64(mem, table + L.T_TIME_WAIT_AT) else -2


@inlined
def kcont_swept(mem, w):
    """1 if a sweep is asked for; whoever asks again from now on wants another one."""
    place = ld64(mem, w + L.W_TABLE) + L.T_KCONT_SWEEP
    if load_relaxed(mem, place) == 0:
        return 0
    # SYNC kcont-sweep: full barrier between this and the looks at PCB_DUE, pairs with the release in
    # kcont_schedule; else a number could be announced while we have already been past its PCB.
    return exchange(mem, place, 0)


@inlined
def kcont_stuck(mem, w):
    """Stamp of the worker that has reserved the front of the pcq and not filled it yet; 0: none."""
    return pcq_stuck(mem, ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_KCONT))


@inlined
def kcont_take(mem, table, number):
    """Before the lanes are read: from here on, whoever has published something arms anew."""
    # SYNC kcont-due: full barrier between this and the reads of the lanes, pairs with the load in kcont_lower;
    # else a segment that its worker believes to be covered could be missed.
    return exchange(mem, _due(mem, table, number), 0)


@shared
def kcont_arm(mem, w, until):
    """About to sleep until `until`: 1, or 0 if there is something to do after all. After 1, `kcont_disarm`."""
    table = ld64(mem, w + L.W_TABLE)
    wake = table + L.T_KCONT_WAKE
    store_relaxed(mem, table + L.T_KCONT_UNTIL, until)
    # SYNC kcont-sleep: the exchange in here stands between T_KCONT_UNTIL and the looks below, pairs with the fence
    # in kcont_schedule.
    wake_arm(mem, wake, L.WAKE_PIPE)
    if pcq_peek(mem, ld64(mem, table + L.T_KCONT), w + L.W_SCRATCH) or load_relaxed(mem, table + L.T_KCONT_SWEEP):
        wake_disarm(mem, wake)
        return 0
    return 1


@inlined
def kcont_disarm(mem, w):
    """Awake again."""
    wake_disarm(mem, ld64(mem, w + L.W_TABLE) + L.T_KCONT_WAKE)
