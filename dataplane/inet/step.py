"""One bounded step of an RX worker: receive, demultiplex, publish, transmit.

Called by `serve` (workers/duty.py), which looks after spinning and sleep between steps; signals and
messages are for the worker's Python. All kernels here run on the worker's own core; nothing in them blocks.

Order inside a burst, and why: frames are counted as offered; their bytes are copied into lanes
(staged); the netif is told that it may reuse its memory (`done`); then lanes are published and
deliveries counted. A worker that dies anywhere in between loses the frames of one burst, and the
ledger knows how many; none is ever delivered twice.
"""

from __future__ import annotations

from dataplane.inet.deliver import publish, publish_lanes
from dataplane.inet.demux import input_burst
from dataplane.inet.fragments import fragment_expire, fragment_flush
from dataplane.inet.neighbour import tx_retry
from dataplane.inet.output import tx_flush
from dataplane.inet.tcp_listen import syn_sleep, syn_timers
from dataplane.inet.tcp_service import tcp_burst
from dataplane.inet.transmit import transmit
from dataplane.jit import inlined, kernel
from dataplane.rings.lane import lane_recover
from dataplane.shm import layout as L
from dataplane.shm.atomics import call2, call3, fence, ld64, load_acquire, load_relaxed, st64, store_relaxed
from dataplane.shm.epoch import offline, online, quiescent
from dataplane.shm.libc import CLOCK_MONOTONIC, clock_ns

__all__ = ["all_ended", "finish", "may_sleep", "recover", "step", "woke"]

BLOCKED_NS = 50_000
"""How long to leave consumers alone when a netif waits for room in a ring."""

WAITING_NS = 5_000_000
"""How often a sleeping worker looks whether a netif may start (enough sockets are open)."""

TIMER_NS = 20_000_000
"""How often timers are looked at while frames are held for reassembly or for an address."""


@inlined
def _read_clock(mem, w):
    st64(mem, w + L.W_MONOTONIC, clock_ns(mem, w + L.W_SCRATCH, CLOCK_MONOTONIC))


@inlined
def _is_due(mem, w, nif):
    """Whether this queue may be asked for frames now."""
    if ld64(mem, nif + L.N_STATUS) != L.NS_RUNNING:
        return False
    start = ld64(mem, nif + L.N_START)
    if start != 0:
        if load_relaxed(mem, ld64(mem, w + L.W_TABLE) + L.T_OPEN) < start:
            return False
        st64(mem, nif + L.N_START, 0)
    return ld64(mem, nif + L.N_NEXT) <= ld64(mem, w + L.W_MONOTONIC)


@inlined
def _receive(mem, w, nif):
    """One burst of one queue; returns the frames handled."""
    burst = ld64(mem, w + L.W_BURST)
    count = call3(ld64(mem, nif + L.N_RX), mem, nif, burst, L.BURST)
    if count <= 0:
        if count == L.NIF_ENDED:
            st64(mem, nif + L.N_STATUS, L.NS_ENDED)
        elif count == L.NIF_FAILED:
            st64(mem, nif + L.N_STATUS, L.NS_FAILED)
        return 0
    row = nif + L.N_LEDGER
    offered = ld64(mem, row + L.L_OFFERED)
    st64(mem, row + L.L_OFFERED, offered + count)
    taken = input_burst(mem, w, nif, count)
    if taken != count:
        st64(mem, row + L.L_OFFERED, offered + taken)
        st64(mem, w + L.W_BLOCKED, 1)
    call2(ld64(mem, nif + L.N_DONE), mem, nif, taken)
    publish(mem, w, nif)
    if ld64(mem, w + L.W_TCP_COUNT) != 0:
        tcp_burst(mem, w)
    return taken


@inlined
def _timers(mem, w):
    fragment_expire(mem, w, ld64(mem, w + L.W_MONOTONIC))
    tx_retry(mem, w)
    syn_timers(mem, w)


@kernel("i64(mem, i64, i64)", alone=False)
def step(mem, w, budget):
    """Up to `budget` rounds over all queues; returns the frames handled, received and transmitted.

    Ends early when a round found nothing, or when there is something to read or to say to the supervisor.
    """
    total = 0
    for _ in range(budget):
        handled = 0
        st64(mem, w + L.W_BLOCKED, 0)
        _read_clock(mem, w)
        for index in range(ld64(mem, w + L.W_NIF_COUNT)):
            nif = ld64(mem, w + L.W_NIF + 8 * index)
            if _is_due(mem, w, nif):
                handled += _receive(mem, w, nif)
        _timers(mem, w)     # what waited for a neighbour goes before what a consumer sent later
        handled += transmit(mem, w)
        tx_flush(mem, w)
        quiescent(mem, w)
        total += handled
        if handled == 0 or load_relaxed(mem, w + L.W_MAILBOX) != 0 or ld64(mem, w + L.W_WANT) != 0:
            break
    st64(mem, w + L.W_STEPS, ld64(mem, w + L.W_STEPS) + 1)
    return total


# -- sleep ---------------------------------------------------------------------------------


@inlined
def _sooner(a, b):
    """The earlier of two waits in ns, -1 meaning no limit."""
    if a < 0:
        return b
    return a if b < 0 else min(a, b)


@inlined
def _queue_wait(mem, w, nif):
    """Nanoseconds until this queue may have something; -1: its descriptor will tell."""
    if ld64(mem, nif + L.N_STATUS) != L.NS_RUNNING:
        return -1
    if ld64(mem, nif + L.N_START) > load_relaxed(mem, ld64(mem, w + L.W_TABLE) + L.T_OPEN):
        return WAITING_NS
    wait = ld64(mem, nif + L.N_NEXT) - ld64(mem, w + L.W_MONOTONIC)
    if wait > 0:
        return wait
    return -1 if ld64(mem, nif + L.N_FD) >= 0 else 0


@inlined
def _wait(mem, w):
    wait = -1
    for index in range(ld64(mem, w + L.W_NIF_COUNT)):
        nif = ld64(mem, w + L.W_NIF + 8 * index)
        one = _queue_wait(mem, w, nif)
        if one == 0 and ld64(mem, w + L.W_BLOCKED):
            one = BLOCKED_NS
        wait = _sooner(wait, one)
        if ld64(mem, nif + L.N_LEDGER + L.L_HELD) != 0:
            wait = _sooner(wait, TIMER_NS)
    if ld64(mem, ld64(mem, w + L.W_PENDING)) != 0:
        wait = _sooner(wait, TIMER_NS)
    return _sooner(wait, syn_sleep(mem, w))


@inlined
def _say_sleeping(mem, w, sleeping):
    for index in range(ld64(mem, w + L.W_CONSUMER_COUNT)):
        home = ld64(mem, ld64(mem, w + L.W_CONSUMERS) + 8 * index)
        # SYNC doorbell: followed by the fence in may_sleep; pairs with sendto's exchange behind
        # its own fence; else a record could be published unseen, and no doorbell rung.
        store_relaxed(mem, home + L.HOME_SLEEPING, sleeping)


@inlined
def _transmit_waits(mem, w):
    size = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_TX_RING)
    for index in range(ld64(mem, w + L.W_CONSUMER_COUNT)):
        home = ld64(mem, ld64(mem, w + L.W_CONSUMERS) + 8 * index)
        mine = ld64(mem, ld64(mem, w + L.W_TX_LANES) + 16 * index)
        # SYNC doorbell: behind the fence in may_sleep, pairs with the publish in sendto.
        queued = load_acquire(mem, home + L.HOME_TX + L.LANE_HEAD) - mine
        if 0 < queued <= size:      # a head that cannot be keeps nobody awake (transmit.py)
            return True
    return False


@kernel("i64(mem, i64)", alone=False)
def may_sleep(mem, w):
    """Nanoseconds that the worker may sleep on its descriptors: -1 no limit, 0 not at all. Unless 0,
    consumers ring its doorbell from now on, epochs pass without it, and `woke` must follow."""
    _read_clock(mem, w)
    wait = _wait(mem, w)
    if wait == 0 or load_relaxed(mem, w + L.W_MAILBOX) != 0:
        return 0
    _say_sleeping(mem, w, 1)
    # SYNC doorbell: our word, then their lanes; pairs with the fence in sendto.
    fence()
    if _transmit_waits(mem, w):
        _say_sleeping(mem, w, 0)
        return 0
    st64(mem, w + L.W_SLEPT, ld64(mem, w + L.W_SLEPT) + 1)
    offline(mem, w)
    return wait


@kernel("i64(mem, i64)", alone=False)
def woke(mem, w):
    """After a sleep: epochs wait for this worker again, doorbells need not be rung."""
    online(mem, w)
    _say_sleeping(mem, w, 0)
    return 0


# -- the ends ------------------------------------------------------------------------------


@kernel("i64(mem, i64)", alone=False)
def all_ended(mem, w):
    """1 when no frame will ever come again from any of this worker's queues."""
    for index in range(ld64(mem, w + L.W_NIF_COUNT)):
        if ld64(mem, ld64(mem, w + L.W_NIF + 8 * index) + L.N_STATUS) == L.NS_RUNNING:
            return 0
    return 1


@kernel("i64(mem, i64)")
def finish(mem, w):
    """The last thing that a worker does: what is staged is published, what is still in reassembly
    is counted as unfinished."""
    if ld64(mem, w + L.W_DIRTY_COUNT) != 0:
        publish_lanes(mem, w, ld64(mem, w + L.W_NIF) + L.N_LEDGER)
    fragment_flush(mem, w)
    tx_flush(mem, w)
    return 0


@kernel("i64(mem, i64)")
def recover(mem, w):
    """For the replacement of a dead worker, before its first step: lanes go on where they were
    published, counts of packets that were only staged are taken back.

    Online meanwhile: else a socket could be closed and its memory given to another one between our
    look at it and our write into its lane."""
    online(mem, w)
    table = ld64(mem, w + L.W_TABLE)
    pcbs = ld64(mem, table + L.T_PCBS)
    dirty = ld64(mem, w + L.W_DIRTY)
    lanes = ld64(mem, w + L.W_LANES)
    # SYNC lane-recover: acquire pairs with _mark_dirty in the dead worker; else an entry could be
    # read that it had not yet written.
    for index in range(load_acquire(mem, w + L.W_DIRTY_COUNT)):
        state = ld64(mem, dirty + 16 * index)
        if ld64(mem, state + L.LS_HEAD) != ld64(mem, state + L.LS_PUBLISHED):
            st64(mem, state + L.LS_COUNT, ld64(mem, dirty + 16 * index + 8))
    st64(mem, w + L.W_DIRTY_COUNT, 0)
    st64(mem, w + L.W_DELIVERED, 0)
    st64(mem, w + L.W_DELIVERIES, 0)
    for number in range(ld64(mem, table + L.T_SOCKETS)):
        state = lanes + number * L.LS_BYTES
        if ld64(mem, pcbs + number * L.PCB_BYTES + L.PCB_STATE) == L.PCB_OPEN and ld64(mem, state + L.LS_BASE) != 0:
            lane_recover(mem, state)
    offline(mem, w)
    return 0
