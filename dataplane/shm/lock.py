"""The owner-stamped lock: one word that says who holds it, so that a dead holder's can be taken over.

Taken by writers of the table (a bucket, a neighbour entry), never waited for on the RX path: there
is only a trylock. The word is 0 or the holder's *stamp*, a number that the supervisor gives to one
worker for its whole life and to no other one after it. That is what makes taking over safe: a
stamp read in a word means this very worker, not a later one with the same pid.

Invariant: the word is changed from 0 to s by the process stamped s only; from s to 0 by that
process while it lives; from s to t by the process stamped t, after s's process is known to be dead
(its parent reaped it). Two processes that recover the same lock at once: the compare-and-swap
lets one through.

Whoever recovers a lock finds what it protects in any state that the dead holder's code can leave
between two of its stores, and repairs it before the unlock.

Floor 1. All of these are for kernels; `word` is a byte offset in `mem`, 8-aligned.
"""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm.atomics import cas, load_acquire, store_release

__all__ = ["holder", "recover", "try_lock", "unlock"]


@inlined
def try_lock(mem, word, stamp):
    """1 if the lock is now held by `stamp`, 0 if somebody holds it (also `stamp` itself)."""
    # SYNC lock-word: acquires, pairs with the release in unlock; else what the former holder wrote
    # could be seen half done.
    return cas(mem, word, 0, stamp)


@inlined
def unlock(mem, word, stamp):
    """Gives the lock up; 1, or 0 if `stamp` did not hold it (and nothing was done)."""
    # SYNC lock-word: only ourselves can have written our own stamp, so any order does for this load.
    if load_acquire(mem, word) != stamp:
        return 0
    # SYNC lock-word: release, pairs with the cas in try_lock and in recover; else the next holder could see
    # our writes later than the free lock.
    store_release(mem, word, 0)
    return 1


@inlined
def holder(mem, word):
    """The holder's stamp, 0 if there is none. Old news at once, unless the holder is dead."""
    # SYNC lock-word: acquire, pairs with the cas in try_lock; else a reader that finds a dead holder's
    # stamp could see the protected words as they were before.
    return load_acquire(mem, word)


@inlined
def recover(mem, word, dead_stamp, stamp):
    """Takes the lock over for `stamp` if `dead_stamp` holds it; 1 if so, and the caller then repairs
    what it protects and unlocks. Only for a stamp whose process is known to be dead."""
    # SYNC lock-word: takes over from the cas in try_lock of the dead; all of its stores were done
    # before its death was reported.
    return cas(mem, word, dead_stamp, stamp)
