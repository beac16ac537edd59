"""What an RX worker does when there is nothing to do: spin, sleep, or first one and then the other.

Called by `rx`: after each step without work, `Duty.tired` says whether to sleep now, and `nap` is the sleep.
A sleeping worker is woken by its netifs' descriptors, by its doorbell (a consumer has put something into a
transmit lane, or the supervisor wants it to look), by an order, and by the time when something is due.
"""

from __future__ import annotations

import time

from dataplane.inet.step import all_ended, may_sleep, woke
from dataplane.jit import kernel
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64, st64
from dataplane.shm.libc import ppoll, read

POLLIN = 1
NAP_BYTES = 4096            # what `nap` needs: pollfds, and behind them room for a timespec and a read
NAP_ORDERS, NAP_DOORBELL, NAP_NETIFS = 0, 8, 16
_SCRATCH = 2048
assert NAP_NETIFS + 24 * L.NIF_MAX <= _SCRATCH


class Duty:
    """One idle strategy: `busy` never sleeps, `poll` at once, `adaptive` after `spin_us` without work."""

    def __init__(self, idle: str, spin_us: int) -> None:
        self._never = idle == "busy"
        self._spin_ns = spin_us * 1000 if idle == "adaptive" else 0
        self._idle_since = 0

    def worked(self) -> None:
        """There was something to do."""
        self._idle_since = 0

    def tired(self) -> bool:
        """There was nothing to do; True when it is time to sleep."""
        if self._never:
            return False
        if not self._spin_ns:
            return True
        now = time.monotonic_ns()
        if not self._idle_since:
            self._idle_since = now
        return now - self._idle_since >= self._spin_ns


def pollfd(fd: int) -> int:
    """A struct pollfd that waits for input, as the int64 that `nap` finds at its first places."""
    return (POLLIN << 32) | fd


@kernel("i64(mem, i64, i64, i64)")
def nap(mem, w, fds, timeout_ns):
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


# What `rest` tells.
ENDED, ORDERS = 1, 2

_all_ended, _may_sleep, _nap, _woke = (one.inner for one in (all_ended, may_sleep, nap, woke))


@kernel("i64(mem, i64, i64, i64)")
def rest(mem, w, fds, longest_ns):
    """All of a sleep in one call, since a call from Python costs more than a packet: unless there is something to
    do, sleeps as `nap`. ENDED: no frame will ever come; ORDERS: the order channel has something, or has ended."""
    told = ENDED if _all_ended(mem, w) else 0
    wait = _may_sleep(mem, w)
    if wait != 0:
        _nap(mem, w, fds, min(wait, longest_ns) if wait > 0 else longest_ns)
        _woke(mem, w)
        if ld64(mem, fds + NAP_ORDERS) >> 48 != 0:
            told |= ORDERS
    return told
