"""`consume`: the user's jitted function for every packet, and no Python between.

A sweep (see `sweep`) handles a bounded number of packets and returns here, so that signals, timeouts and
closing are served.

A consumer that is as fast as its RX worker would find one packet in each lane, over and over, and each of these takes
four cache lines from the one core to the other and back. So above _BUSY_NS a packet, where that costs the RX worker
its speed, it lets packets gather: it rests between two sweeps until there are about _GATHERED in each lane that had
any, but never for longer than _REST_NS, nor when a ring was filled by a quarter. Measured with 1024 sockets: 1.7 times
the packets.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dataplane.client import drain
from dataplane.client.sweep import CURSOR_CROWDED, CURSOR_LANES, CURSOR_WORDS, sweep_for
from dataplane.client.waiting import NEVER, Waiter, deadline_of
from dataplane.errors import Stopped

__all__ = ["Pace", "run"]

Rows = npt.NDArray[np.int64]

_FIRST_BUDGET, _LARGEST_BUDGET = 1 << 12, 1 << 20
_SHORT_NS, _LONG_NS = 500_000, 2_000_000    # of a sweep: then the next may handle more, or fewer, packets
_BUSY_NS = 500                              # for each packet: at a lower rate packets are taken as they come
_GATHERED = 16
_LOOK_NS, _LOOKS_MAX = 20_000, 1 << 12      # for so long, and so often, a sweep looks for packets by itself
_REST_NS = 200_000


class Source(Protocol):
    """A socket or a poller whose turn the caller has."""

    waiter: Waiter
    rows: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]

    def check(self) -> None:
        """Raises when it was closed."""


def run(source: Source, kernel: Any, state: Any, max_packets: int | None, timeout: float | None) -> int:
    """Handles packets until `max_packets` were, or `timeout` seconds have passed, or the dataplane has
    ended; how many. Stopped when there was none and never will be."""
    sweep = sweep_for(kernel)
    deadline = deadline_of(timeout)
    waiter = source.waiter
    mem = waiter.session.memory.mem
    pace = Pace(0 if timeout == 0 else waiter.session.spin_ns)
    wanted = _count(max_packets)
    taken = 0
    try:
        while taken < wanted:
            step, now = pace.step(sweep, mem, source.rows, source.numbers, wanted - taken, state)
            taken += step
            if not step:
                if pace.spins(now) and now < deadline:
                    waiter.interlude(source)
                elif not waiter.wait(source, deadline):
                    break
            elif now >= deadline and not (timeout == 0 and pace.full):      # 0: all that is there now
                break
            else:
                if pace.rest:
                    waiter.rest(pace.rest)
                waiter.interlude(source)
    except Stopped:
        if not taken:
            raise
    finally:
        drain.release_rows(mem, source.rows)
    return taken


def _count(max_packets: int | None) -> int:
    if max_packets is not None and max_packets < 0:
        raise ValueError(f"max_packets must not be negative: {max_packets}")
    return NEVER if max_packets is None else max_packets


class Pace:
    """How many packets the next sweep may handle, how often it may look for some, and how long to rest before it:
    `rest`, in ns. `spin_ns`: how long to go on sweeping when there are none. A sweep that looks again by itself finds a
    packet in a third of the time that it takes Python to start another one."""

    def __init__(self, spin_ns: int) -> None:
        self.rest = 0
        self.full = False       # whether the last sweep handled as many as it was allowed to
        self._spin_ns = spin_ns
        self._looks = 1
        self._found = 0
        self._budget = _FIRST_BUDGET
        self._cursor = np.zeros(CURSOR_WORDS, np.int64)
        self._before = 0

    def step(self, sweep: Any, mem: Any, rows: Rows, numbers: Rows, limit: int, state: Any) -> tuple[int, int]:
        """One sweep over up to `limit` packets: how many it handled, and when it ended, in ns."""
        start = time.monotonic_ns()
        allowed = min(self._budget, limit)
        count = int(sweep(mem, rows, numbers, self._cursor, allowed, self._looks, state))
        self.full = count == allowed
        now = time.monotonic_ns()
        if count:
            self._found = now
        else:
            self._looks = max(1, min(_LOOKS_MAX, self._looks * min(self._spin_ns, _LOOK_NS) // max(now - start, 1)))
        self.rest = self._rest_after(count, now - self._before, now - start)
        self._budget = self._next_budget(count, now - start)
        self._before = now
        return count, now

    def spins(self, now: int) -> bool:
        """Whether to go on sweeping, rather than to wait."""
        return now - self._found < self._spin_ns

    def _rest_after(self, count: int, period_ns: int, sweep_ns: int) -> int:
        """After a sweep that took `sweep_ns`, and ended `period_ns` after the one before."""
        if count * _BUSY_NS < period_ns or self._cursor[CURSOR_CROWDED]:
            return 0
        wanted = period_ns * _GATHERED * int(self._cursor[CURSOR_LANES]) // count
        return max(0, min(wanted - sweep_ns, _REST_NS))

    def _next_budget(self, count: int, took_ns: int) -> int:
        """So that a full sweep takes about a millisecond."""
        if took_ns > _LONG_NS:
            return max(self._budget // 2, 1)
        return min(2 * self._budget, _LARGEST_BUDGET) if count == self._budget and took_ns < _SHORT_NS else self._budget
