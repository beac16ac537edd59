"""Token buckets: how many answers of one kind a worker may send in a second.

Used by icmp (errors) and tcp_transmit (resets). Three words of the worker's block make one: tokens left, when
tokens were last added, and the rate. A bucket holds one second's worth.
"""

from __future__ import annotations

from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64, st64

__all__ = ["take_token"]

_SECOND_NS = 1_000_000_000


@shared
def take_token(mem, w, tokens_at, time_at, rate_at):
    """Whether one more may be sent. The words are given by their places in the worker's block (W_...)."""
    rate = ld64(mem, w + rate_at)
    tokens, now = ld64(mem, w + tokens_at), ld64(mem, w + L.W_MONOTONIC)
    elapsed = now - ld64(mem, w + time_at)
    if rate <= 0:
        return False
    if elapsed >= _SECOND_NS or elapsed < 0:
        tokens = rate
        st64(mem, w + time_at, now)
    else:
        gained = elapsed * rate // _SECOND_NS
        tokens = min(tokens + gained, rate)
        # Only the time that the gained tokens took is over: the rest counts towards the next.
        spent = (gained * _SECOND_NS + rate - 1) // rate
        st64(mem, w + time_at, ld64(mem, w + time_at) + spent)
    st64(mem, w + tokens_at, max(tokens - 1, 0))
    return tokens > 0
