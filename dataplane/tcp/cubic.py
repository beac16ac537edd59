"""CUBIC, RFC 9438: how the window grows in congestion avoidance, and what a loss does to W_max.

Called by congestion.py. Writes T_CUBIC_... of the private control block. Windows are bytes here,
where the RFC counts segments: W / MSS in its formulas.
"""

from __future__ import annotations

from dataplane.jit import shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64

__all__ = ["BETA_PERCENT", "cubic_acked", "cubic_idle", "cubic_init", "cubic_k", "cubic_loss", "cubic_timeout",
           "cubic_window"]

C = 0.4                     # RFC 9438 section 5: segments / s^3
BETA_PERCENT = 70           # section 4.6: beta_cubic
ALPHA = 3.0 * (1.0 - 0.7) / (1.0 + 0.7)     # section 4.3
_FRACTION = 1024            # T_CUBIC_EST, and T_CWND_ACKED in CUBIC, count in 1/1024 bytes
_SECOND = 1e9
_EPOCH_MAX = 3_600_000_000_000      # ns: far beyond, the cube would not fit


@shared
def cubic_k(w_max, cwnd, mss):
    """K in ns, RFC 9438 section 4.2 (figure 2): how long the window takes to get back to W_max."""
    if cwnd >= w_max:
        return 0
    return int(((w_max - cwnd) / mss / C) ** (1.0 / 3.0) * _SECOND)


@shared
def cubic_window(w_max, k, elapsed, mss):
    """W_cubic(t), RFC 9438 section 4.2 (figure 1): bytes, as a float; `k` and `elapsed` in ns."""
    distance = (elapsed - k) / _SECOND
    return C * distance * distance * distance * mss + w_max


@shared
def cubic_init(mem, t):
    st64(mem, t + T.T_CUBIC_AT, 0)
    st64(mem, t + T.T_CUBIC_MAX, 0)
    st64(mem, t + T.T_CUBIC_K, 0)
    st64(mem, t + T.T_CUBIC_EST, 0)
    st64(mem, t + T.T_CUBIC_PRIOR, 0)


@shared
def _begin(mem, t, now):
    """A congestion avoidance stage begins. Sections 4.8 and 4.10: after a timeout, or out of slow start
    without a loss, W_max is the window of now, and K is 0."""
    cwnd = ld64(mem, t + T.T_CWND)
    w_max = max(ld64(mem, t + T.T_CUBIC_MAX), cwnd)
    st64(mem, t + T.T_CUBIC_AT, max(now, 1))
    st64(mem, t + T.T_CUBIC_MAX, w_max)
    st64(mem, t + T.T_CUBIC_K, cubic_k(w_max, cwnd, max(ld64(mem, t + T.T_MSS), 1)))
    st64(mem, t + T.T_CUBIC_EST, cwnd * _FRACTION)
    st64(mem, t + T.T_CWND_ACKED, 0)


@shared
def _estimate(mem, t, acked):
    """W_est, section 4.3 (figure 4): what Reno would have; bytes, as a float."""
    mss = max(ld64(mem, t + T.T_MSS), 1)
    estimate = ld64(mem, t + T.T_CUBIC_EST) / _FRACTION
    alpha = 1.0 if estimate >= ld64(mem, t + T.T_CUBIC_PRIOR) else ALPHA
    estimate += alpha * acked * mss / max(ld64(mem, t + T.T_CWND), 1)
    st64(mem, t + T.T_CUBIC_EST, int(min(estimate, 1e12) * _FRACTION))
    return estimate


@shared
def cubic_acked(mem, t, acked, now):
    """Congestion avoidance: `acked` bytes of new data were acknowledged."""
    if ld64(mem, t + T.T_CUBIC_AT) == 0:
        _begin(mem, t, now)
    mss = max(ld64(mem, t + T.T_MSS), 1)
    cwnd = max(ld64(mem, t + T.T_CWND), mss)
    w_max = ld64(mem, t + T.T_CUBIC_MAX)
    k = ld64(mem, t + T.T_CUBIC_K)
    elapsed = min(max(now - ld64(mem, t + T.T_CUBIC_AT), 0), _EPOCH_MAX)
    estimate = _estimate(mem, t, acked)
    if cubic_window(w_max, k, elapsed, mss) < estimate:     # section 4.3: Reno-friendly region
        st64(mem, t + T.T_CWND, max(cwnd, int(min(estimate, 1e12))))
        return
    # Sections 4.4 and 4.5: concave and convex region, towards the window of one round trip later.
    target = cubic_window(w_max, k, elapsed + ld64(mem, t + T.T_SRTT), mss)
    target = min(max(target, float(cwnd)), 1.5 * cwnd)      # section 4.2
    grown = (target - cwnd) * min(acked / cwnd, 1.0) * _FRACTION + ld64(mem, t + T.T_CWND_ACKED)
    whole = int(grown) // _FRACTION
    st64(mem, t + T.T_CWND_ACKED, int(grown) - whole * _FRACTION)
    st64(mem, t + T.T_CWND, cwnd + whole)


@shared
def cubic_loss(mem, t):
    """Sections 4.6 and 4.7: W_max from the window as it is before the reduction, with fast convergence."""
    cwnd = ld64(mem, t + T.T_CWND)
    w_max = cwnd
    if cwnd < ld64(mem, t + T.T_CUBIC_MAX):
        w_max = cwnd * (100 + BETA_PERCENT) // 200
    st64(mem, t + T.T_CUBIC_MAX, w_max)
    st64(mem, t + T.T_CUBIC_PRIOR, cwnd)
    st64(mem, t + T.T_CUBIC_AT, 0)
    st64(mem, t + T.T_CWND_ACKED, 0)


@shared
def cubic_timeout(mem, t):
    """Section 4.8: the next stage begins with its own window as W_max (`_begin`)."""
    st64(mem, t + T.T_CUBIC_PRIOR, ld64(mem, t + T.T_CWND))
    st64(mem, t + T.T_CUBIC_MAX, 0)
    st64(mem, t + T.T_CUBIC_AT, 0)
    st64(mem, t + T.T_CWND_ACKED, 0)


@shared
def cubic_idle(mem, t, idle):
    """Section 4.2: t does not count `idle` ns in which nothing was sent."""
    began = ld64(mem, t + T.T_CUBIC_AT)
    if began != 0:
        st64(mem, t + T.T_CUBIC_AT, began + idle)
