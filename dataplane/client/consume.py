"""`consume`: the user's jitted function for every packet, and no Python between.

A sweep (see `sweep`) handles a bounded number of packets and returns here, so that signals, timeouts and
closing are served. While Python is here packets gather, so that the next sweep finds many.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dataplane.client import drain
from dataplane.client.sweep import sweep_for
from dataplane.client.waiting import NEVER, Waiter, deadline_of
from dataplane.errors import Stopped

__all__ = ["run"]

_FIRST_BUDGET, _LARGEST_BUDGET = 1 << 12, 1 << 20
_SHORT_NS, _LONG_NS = 500_000, 2_000_000    # of a sweep: then the next may handle more, or fewer, packets


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
    cursor = np.zeros(1, np.int64)
    wanted = _count(max_packets)
    taken, budget = 0, _FIRST_BUDGET
    try:
        while taken < wanted:
            start = time.monotonic_ns()
            step = sweep(mem, source.rows, source.numbers, cursor, min(budget, wanted - taken), state)
            now = time.monotonic_ns()
            taken += step
            if not step:
                if not waiter.wait(source, deadline):
                    break
            elif now >= deadline:
                break
            else:
                budget = _next_budget(budget, step, now - start)
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


def _next_budget(budget: int, step: int, took_ns: int) -> int:
    """So that a full sweep takes about a millisecond."""
    if took_ns > _LONG_NS:
        return max(budget // 2, 1)
    return min(2 * budget, _LARGEST_BUDGET) if step == budget and took_ns < _SHORT_NS else budget
