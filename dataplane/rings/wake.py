"""Wake objects: how a consumer sleeps without missing a packet, and is woken without a syscall when awake.

One wake object belongs to one waiter (a thread in the client library); one or many sockets point
to it, so that blocking on one socket and polling ten thousand are the same thing. Its state word
says how the waiter sleeps:

    WAKE_AWAKE      it will look by itself: nothing to do
    WAKE_FUTEX      it sleeps, or is about to, on the state word itself
    WAKE_PIPE    its event loop watches the bell (shm/bell.py) whose number is in WAKE_EVENT

    waiter                                      notifier (RX worker, at the end of a burst)
      wake_arm:     exchange state <- how         publish all lanes
      look at the rings once more                 one fence for the whole burst
      nothing there: wake_sleep                   wake_notify: load state; AWAKE: done
      wake_disarm:  state <- AWAKE                  exchange state <- AWAKE; was armed: wake

No wakeup is lost: the waiter stores its state and then reads the rings, the notifier stores the
rings and then reads the state, and a full barrier stands between the two on either side. So one
of them sees the other. Without either barrier both reads may be done before the stores have
left the store buffers, and the waiter sleeps on a full ring: `tests/interleavings` shows it. And
the kernel puts the waiter to sleep only if the state is still WAKE_FUTEX, so that nothing is lost
between its look and its sleep either.

At most one notifier wakes for each time that the waiter armed, since the exchange lets one through. If it
is late, it wakes a later sleep for nothing: that costs one look at empty rings.

A notifier that dies between its exchange and its wake has swallowed a wakeup. So whoever finds a
dead worker calls `wake_ring` for every wake object that it could reach. A waiter can die anywhere.

The object stands in the waiter's own segment: to a worker its content is hostile. The state only
chooses between three actions. That is why this is a futex and not a POSIX semaphore, which is the
same inside: glibc's sem_post takes flags of its system call from the `sem_t`, and ends the whole
process when the kernel refuses them (glibc 2.36, `futex_fatal_error`).

Floor 2. `wake_*` are for kernels, `init_wake`, `ring_wake` for Python. `wake` is an offset in `mem`.
"""

from __future__ import annotations

import errno

from dataplane.jit import inlined, kernel
from dataplane.shm import layout as L
from dataplane.shm.atomics import exchange, ld64, load_relaxed, st64, store_relaxed
from dataplane.shm.libc import futex_wait, futex_wake

__all__ = [
    "init_wake", "ring_wake", "wake_arm", "wake_armed", "wake_disarm", "wake_init", "wake_notify", "wake_ring",
    "wake_sleep",
]

_EAGAIN = errno.EAGAIN


@inlined
def wake_init(mem, wake):
    """Makes a wake object of WAKE_BYTES bytes, before any other process knows of it. Zeros are one already."""
    st64(mem, wake + L.WAKE_STATE, L.WAKE_AWAKE)
    st64(mem, wake + L.WAKE_EVENT, 0)


@inlined
def wake_arm(mem, wake, mode):
    """Waiter: from now on a notifier wakes, as `mode` says. The caller looks at its rings once more
    **after** this and before it sleeps: what was published before was not announced."""
    # SYNC wake-state: full barrier between this store and the caller's look at the rings, pairs with the
    # notifier's fence between publishing and wake_notify; else the waiter could sleep on a full ring.
    exchange(mem, wake + L.WAKE_STATE, mode)


@inlined
def wake_disarm(mem, wake):
    """Waiter: awake again. Called once for each `wake_arm`, whatever ended the sleep."""
    # A notifier that does not see this yet wakes nobody.
    store_relaxed(mem, wake + L.WAKE_STATE, L.WAKE_AWAKE)


@inlined
def wake_sleep(mem, wake, deadline_ns, scratch):
    """Waiter, armed with WAKE_FUTEX: sleeps until it is woken (0, also if a notifier has come already, and
    rarely for no reason), until `deadline_ns` of CLOCK_MONOTONIC (-ETIMEDOUT), or until a signal (-EINTR).
    `scratch`: 16 bytes of its own."""
    result = futex_wait(mem, wake + L.WAKE_STATE, L.WAKE_FUTEX, deadline_ns, scratch)
    return 0 if result == -_EAGAIN else result


@inlined
def wake_armed(mem, wake):
    """Notifier: whether wake_notify has something to do. The caller has published and issued a fence before."""
    # SYNC wake-state: as in wake_notify.
    return load_relaxed(mem, wake + L.WAKE_STATE) != L.WAKE_AWAKE


@inlined
def wake_notify(mem, wake):
    """Notifier: wakes the waiter if it sleeps or is about to. WAKE_PIPE when the caller has to
    ring the bell of WAKE_EVENT, else 0. The caller has published and issued a fence before."""
    # SYNC wake-state: behind the notifier's fence, pairs with the exchange in wake_arm; else an armed
    # waiter could be taken for an awake one.
    if load_relaxed(mem, wake + L.WAKE_STATE) == L.WAKE_AWAKE:
        return 0
    # SYNC wake-claim: pairs with the same in the other notifiers; else each of them would make the syscall.
    mode = exchange(mem, wake + L.WAKE_STATE, L.WAKE_AWAKE)
    if mode == L.WAKE_FUTEX:
        futex_wake(mem, wake + L.WAKE_STATE)
        return 0
    return L.WAKE_PIPE if mode == L.WAKE_PIPE else 0


@inlined
def wake_ring(mem, wake):
    """Wakes the waiter whatever the state says: after a notifier's death, and at the end of the
    dataplane. WAKE_PIPE when the caller has to ring the bell of WAKE_EVENT too, else 0."""
    # SYNC wake-claim: pairs with the exchange in wake_notify of the dead, who may not have got to the wake.
    exchange(mem, wake + L.WAKE_STATE, L.WAKE_AWAKE)
    futex_wake(mem, wake + L.WAKE_STATE)
    return L.WAKE_PIPE if ld64(mem, wake + L.WAKE_EVENT) > 0 else 0


@kernel("i64(mem, i64)")
def init_wake(mem, wake):
    """`wake_init` for callers in Python; 0."""
    wake_init(mem, wake)
    return 0


@kernel("i64(mem, i64)")
def ring_wake(mem, wake):
    """`wake_ring` for callers in Python."""
    return wake_ring(mem, wake)
