"""When frames are due: the clock of netifs that make or replay their own traffic.

Called by `pcap` and `synthetic`. Frame i of a netif, counted over all of its queues, is due
`i * unit / rate` ns after the start: `rate` frames in each `unit` ns, both integers, so that
nothing drifts however long it runs. All queues share one start: the word is in queue 0's private
memory, and the first queue that asks for a frame sets it.
"""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm.atomics import cas, load_relaxed
from dataplane.shm.libc import CLOCK_MONOTONIC, clock_ns

__all__ = ["RATE_MAX", "RATE_MIN", "SECOND", "allowed", "due", "ratio", "started"]

SECOND = 1_000_000_000
RATE_MIN, RATE_MAX = 0.001, 1e9


def ratio(per_second: float) -> tuple[int, int]:
    """`(rate, unit)` of so many frames a second: thousandths count below 1000, where they matter.
    `rate * unit` stays below 2**63."""
    if per_second < 1000:
        return max(1, round(per_second * 1000)), 1000 * SECOND
    return round(per_second), SECOND


@inlined
def started(mem, start, scratch):
    """`(time of the start, now)`, CLOCK_MONOTONIC in ns; the first call is the start. `scratch`: 16 bytes.

    SYNC pace-start: pairs with itself in the other queues' workers; else two of them could see
    starts of their own. The word is all that is published, so that no order is needed.
    """
    now = clock_ns(mem, scratch, CLOCK_MONOTONIC)
    begin = load_relaxed(mem, start)
    if begin == 0:
        begin = now if cas(mem, start, 0, now) else load_relaxed(mem, start)
    return begin, max(now, begin)


@inlined
def allowed(elapsed, rate, unit):
    """How many frames are due `elapsed` ns after the start."""
    return elapsed // unit * rate + elapsed % unit * rate // unit + 1


@inlined
def due(index, rate, unit):
    """How many ns after the start the frame is due; rounded up, so that `allowed` agrees."""
    return index // rate * unit + (index % rate * unit + rate - 1) // rate
