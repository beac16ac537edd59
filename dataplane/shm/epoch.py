"""Epochs: how a closed PCB's memory is reclaimed while RX workers read the table without a lock.

Quiescent-state-based reclamation. Between two bursts a worker holds no reference into the table: a
*quiescent state*. The supervisor unlinks a PCB, advances the global epoch, and uses the memory
again once every worker has reported a quiescent state in that epoch. A worker that sleeps holds no
reference either and is *offline*; a dead one is put offline by the supervisor.

Words: T_EPOCH (global; only `advance` changes it, by one; starts at 0) and each worker's W_EPOCH (its own;
EPOCH_IDLE, more than any epoch, while offline). The supervisor puts every worker block offline when
it makes it: a worker that has not started yet must not be waited for.

Invariant: when `passed(epoch)` was 1 for the epoch that `advance` returned after an unlink, no
worker holds a reference that it found before the unlink, and none will find one.

Proof sketch. Let U be the unlinking stores, A the advance to e, and let P read W_EPOCH >= e from a
worker's store S.

  1. S is a `quiescent` that read T_EPOCH = e' >= e. Whatever the worker looked up earlier it used before S
     (release) and P (acquire) sees S, so those uses happened before the memory is used again.
     What it looks up later comes after its load of e', which synchronises with A or a later
     advance, and so with U: it finds nothing.
  2. S is an `offline`. Earlier uses: as in 1. Later there is an `online` with a store O, a fence F, and
     then lookups. A full barrier (the fetch_add) stands between U and P, and F between O and
     the lookups. So either P sees O (or something later: not this case), or the lookups see U. This
     is the store-buffer pattern: without either barrier both could read the old value.
  3. S is an `online` that read T_EPOCH = e' >= e: its lookups see U as in 1.

An online worker that gets stuck holds reclamation up and nothing else: closed PCBs stay closed.

Floor 1. Workers call `online`, `quiescent`, `offline` from their kernels (or `mark_...` from Python),
the supervisor calls `advance`, `passed` and, for a dead worker or a new block, `mark_offline`.
"""

from __future__ import annotations

from dataplane.jit import inlined, kernel
from dataplane.shm import layout as L
from dataplane.shm.atomics import fence, fetch_add, ld64, load_acquire, store_release

__all__ = ["advance", "mark_offline", "mark_online", "offline", "online", "passed", "quiescent"]


@inlined
def quiescent(mem, w):
    """The worker at `w` holds no reference into the table now. Called at the end of each burst."""
    # SYNC epoch-global: acquire, pairs with the fetch_add in advance; else a lookup of the next burst could
    # find what was unlinked before.
    epoch = load_acquire(mem, ld64(mem, w + L.W_TABLE) + L.T_EPOCH)
    # SYNC epoch-worker: release, pairs with the load in passed; else a read of this burst could be done
    # after the memory is somebody else's.
    store_release(mem, w + L.W_EPOCH, epoch)


@inlined
def offline(mem, w):
    """The worker at `w` holds no reference and will look nothing up before `online`. Called before
    it sleeps; by the supervisor for a worker that is dead or not started."""
    # SYNC epoch-worker: release, as in quiescent, pairs with the load in passed.
    store_release(mem, w + L.W_EPOCH, L.EPOCH_IDLE)


@inlined
def online(mem, w):
    """The worker at `w` may look things up from here on."""
    # SYNC epoch-global: acquire, as in quiescent, pairs with the fetch_add in advance.
    epoch = load_acquire(mem, ld64(mem, w + L.W_TABLE) + L.T_EPOCH)
    # SYNC epoch-worker: pairs with the load in passed, through the two barriers below.
    store_release(mem, w + L.W_EPOCH, epoch)
    # SYNC epoch-online: full barrier, pairs with the fetch_add in advance; else our lookups could be done
    # while the store above is still in our store buffer: the reclaimer would see us offline.
    fence()


@kernel("i64(mem, i64)")
def advance(mem, table):
    """Begins a new epoch and returns it: after an unlink, what `passed` has to be asked for."""
    # SYNC epoch-global: releases what was unlinked, pairs with the loads in quiescent and in online.
    # SYNC epoch-online: is also the full barrier between the unlink and the loads in passed, pairs with
    # the fence in online.
    return fetch_add(mem, table + L.T_EPOCH, 1) + 1


@kernel("i64(mem, i64, i64)")
def passed(mem, table, epoch):
    """1 if every worker has reported a quiescent state in `epoch` or later, or is offline."""
    worker = ld64(mem, table + L.T_WORKER_AT)
    for _ in range(ld64(mem, table + L.T_WORKERS)):
        # SYNC epoch-worker: acquire, pairs with the releases in quiescent and in offline; else the
        # reclaimer's writes could be done before the worker's last reads.
        if load_acquire(mem, worker + L.W_EPOCH) < epoch:
            return 0
        worker += L.W_BYTES
    return 1


@kernel("i64(mem, i64)")
def mark_offline(mem, w):
    """`offline` for callers in Python; 0."""
    offline(mem, w)
    return 0


@kernel("i64(mem, i64)")
def mark_online(mem, w):
    """`online` for callers in Python; 0."""
    online(mem, w)
    return 0
