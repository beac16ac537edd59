"""What an RX worker does between two looks at its process's own affairs: steps, spins, sleeps.

Called by `rx`: `serve` is one kernel for all of that, since a call from Python costs more than a packet, and a worker
that sleeps may be woken a thousand times a second. It comes back when there is something that only Python can do, and
at least each PATIENCE_NS, for signals have to wait so long. A sleeping worker is woken by its netifs' descriptors, by
its doorbell (a consumer has put something into a transmit lane, or the supervisor wants it to look), by an order, by
a signal, and by the time when something is due.
"""

from __future__ import annotations

from dataplane.inet.step import all_ended, may_sleep, step, woke
from dataplane.jit import inlined, kernel
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64, load_relaxed, st64
from dataplane.shm.libc import ppoll, read

BUDGET = 256                # rounds of a step: some milliseconds at most
PATIENCE_NS = 5_000_000     # without a look at Python's signals; a sleep they end by themselves
NAP_NS = 500_000_000        # longest sleep: a signal that came just before it is served then

POLLIN = 1
NAP_BYTES = 4096            # what `serve` needs: pollfds, and behind them room for a timespec and a read
NAP_ORDERS, NAP_DOORBELL, NAP_NETIFS = 0, 8, 16
_SCRATCH = 2048
assert NAP_NETIFS + 24 * L.NIF_MAX <= _SCRATCH

NEVER = -1                  # `spin` of a worker that does not sleep
ENDED, ORDERS, SIGNAL = 1, 2, 4     # what `serve` tells


def spin_ns(idle: str, spin_us: int) -> int:
    """How long a worker without work spins before it sleeps: `busy` for ever, `poll` not at all, `adaptive`
    `spin_us`."""
    return {"busy": NEVER, "poll": 0}.get(idle, spin_us * 1000)


def pollfd(fd: int) -> int:
    """A struct pollfd that waits for input, as the int64 that `serve` finds at its first places."""
    return (POLLIN << 32) | fd


@inlined
def _nap(mem, w, fds, timeout_ns):
    """Sleeps for `timeout_ns` or until a descriptor is readable; how many are, or -errno.

    `fds`: NAP_BYTES bytes, the pollfds of the order channel and of the doorbell at their places.
    """
    count = NAP_NETIFS // 8
    for i in range(ld64(mem, w + L.W_NIF_COUNT)):
        nif = ld64(mem, w + L.W_NIF + 8 * i)
        if ld64(mem, nif + L.N_STATUS) != L.NS_RUNNING:
            continue
        for at in (L.N_FD, L.N_FDS_SYN, L.N_FDS_SYN + 8):
            fd = ld64(mem, nif + at)
            if fd >= 0:
                st64(mem, fds + 8 * count, (POLLIN << 32) | fd)
                count += 1
    ready = ppoll(mem, fds, count, timeout_ns, fds + _SCRATCH)
    doorbell = ld64(mem, fds + NAP_DOORBELL)
    if ready > 0 and (doorbell >> 48) & POLLIN:
        read(mem, doorbell & 0x7FFFFFFF, fds + _SCRATCH, NAP_BYTES - _SCRATCH)
    return ready


_step, _all_ended, _may_sleep, _woke = (one.inner for one in (step, all_ended, may_sleep, woke))


@inlined
def _rest(mem, w, fds):
    """Sleeps, unless there is something to do; ORDERS: the order channel has something, or has ended."""
    wait = _may_sleep(mem, w)
    if wait == 0:
        return 0
    ready = _nap(mem, w, fds, min(wait, NAP_NS) if wait > 0 else NAP_NS)
    _woke(mem, w)
    if ready < 0:
        return SIGNAL       # or, at any rate, nothing that could be handled here
    return ORDERS if ld64(mem, fds + NAP_ORDERS) >> 48 != 0 else 0


@inlined
def _idle(mem, w, fds, spins):
    """There was nothing to do: ENDED as well, when no frame will ever come."""
    told = ENDED if _all_ended(mem, w) else 0
    return told if spins else told | _rest(mem, w, fds)


@kernel("i64(mem, i64, i64, i64)")
def serve(mem, w, fds, spin):
    """The worker's work, until Python has something to do: ENDED, ORDERS and SIGNAL say what, if it is not to be seen
    in the mailbox or in W_WANT.

    `fds`: NAP_BYTES bytes, the pollfds of the order channel and of the doorbell at their places. `spin`: ns without
    work before it sleeps.
    """
    told = 0
    began = idle_since = -1
    while told == 0 and load_relaxed(mem, w + L.W_MAILBOX) == 0 and ld64(mem, w + L.W_WANT) == 0:
        handled = _step(mem, w, BUDGET)
        now = ld64(mem, w + L.W_MONOTONIC)
        if began < 0:
            began = now
        if now - began > PATIENCE_NS:
            break
        if handled != 0:
            idle_since = -1
            continue
        if idle_since < 0:
            idle_since = now
        told = _idle(mem, w, fds, spin < 0 or now - idle_since < spin)
    return told
