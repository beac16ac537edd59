"""The congestion window: RFC 5681 with the initial window of RFC 6928; CUBIC (cubic.py) or NewReno.

Called by recovery.py, and `congestion_init` by whoever opens a connection, as soon as T_MSS is known.
Writes T_CWND, T_SSTHRESH, T_CWND_ACKED, and what is needed to undo a reduction.
Windows are bytes. OPT_NEWRENO in X_OPTIONS chooses; it may change at any time.
"""

from __future__ import annotations

from dataplane.jit import shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.cubic import BETA_PERCENT, cubic_acked, cubic_idle, cubic_init, cubic_loss, cubic_timeout
from dataplane.tcp.rtt import rto

__all__ = [
    "CWND_MAX", "congestion_acked", "congestion_idle", "congestion_init", "congestion_loss", "congestion_timeout",
    "congestion_undo", "initial_window",
]

CWND_MAX = 1 << 30          # no window of TCP is larger (RFC 7323 section 2.3); also the first ssthresh


@shared
def initial_window(mem, t):
    """RFC 6928 section 2 (1); one segment if the SYN or SYN-ACK had to be sent again (RFC 5681 section 3.1)."""
    mss = max(ld64(mem, t + T.T_MSS), 1)
    if ld64(mem, t + T.T_RETRANSMITS) > 0:
        return mss
    return min(10 * mss, max(2 * mss, 14600))


@shared
def congestion_init(mem, x):
    """The connection opens: T_MSS is known, nothing is in flight."""
    t = x + T.X_TCB
    st64(mem, t + T.T_CWND, initial_window(mem, t))
    st64(mem, t + T.T_SSTHRESH, CWND_MAX)
    st64(mem, t + T.T_CWND_ACKED, 0)
    st64(mem, t + T.T_CWND_PRIOR, 0)
    cubic_init(mem, t)


@shared
def congestion_acked(mem, x, acked, now):
    """`acked` bytes of new data were acknowledged while the window was in full use."""
    t = x + T.X_TCB
    cwnd = ld64(mem, t + T.T_CWND)
    ssthresh = ld64(mem, t + T.T_SSTHRESH)
    if cwnd < ssthresh:
        # Slow start. All that was acknowledged counts (RFC 3465 section 2.2 without its limit): one
        # acknowledgement stands for many segments when the peer's netif merges what it receives.
        grow = min(acked, ssthresh - cwnd)
        cwnd += grow
        acked -= grow
        st64(mem, t + T.T_CWND, min(cwnd, CWND_MAX))
    if acked <= 0:
        return
    if ld64(mem, x + T.X_OPTIONS) & T.OPT_NEWRENO == 0:
        cubic_acked(mem, t, acked, now)
    else:
        # RFC 5681 section 3.1: one segment for each window of acknowledged bytes.
        total = ld64(mem, t + T.T_CWND_ACKED) + acked
        windows = total // max(cwnd, 1)
        st64(mem, t + T.T_CWND_ACKED, total - windows * max(cwnd, 1))
        st64(mem, t + T.T_CWND, cwnd + windows * ld64(mem, t + T.T_MSS))
    st64(mem, t + T.T_CWND, min(ld64(mem, t + T.T_CWND), CWND_MAX))


@shared
def _remember(mem, t):
    st64(mem, t + T.T_CWND_PRIOR, ld64(mem, t + T.T_CWND))
    st64(mem, t + T.T_SSTHRESH_PRIOR, ld64(mem, t + T.T_SSTHRESH))
    st64(mem, t + T.T_CUBIC_MAX_PRIOR, ld64(mem, t + T.T_CUBIC_MAX))


@shared
def _reduced(mem, x):
    """ssthresh after a loss: RFC 5681 (4), or RFC 9438 section 4.6. What limited transmit sent beyond the
    window does not count (RFC 5681 section 3.2 step 2)."""
    t = x + T.X_TCB
    flight = min(ld64(mem, t + T.T_SND_NXT) - ld64(mem, t + T.T_SND_UNA), ld64(mem, t + T.T_CWND))
    kept = 50 if ld64(mem, x + T.X_OPTIONS) & T.OPT_NEWRENO else BETA_PERCENT
    return max(flight * kept // 100, 2 * ld64(mem, t + T.T_MSS))


@shared
def congestion_loss(mem, x):
    """A segment was lost: the window is reduced, once per recovery."""
    t = x + T.X_TCB
    _remember(mem, t)
    ssthresh = _reduced(mem, x)
    cubic_loss(mem, t)
    st64(mem, t + T.T_SSTHRESH, ssthresh)
    st64(mem, t + T.T_CWND, ssthresh)


@shared
def congestion_timeout(mem, x):
    """The retransmission timer expired: the loss window, RFC 5681 section 3.1. To be called before
    T_PHASE and T_BACKOFF change."""
    t = x + T.X_TCB
    phase = ld64(mem, t + T.T_PHASE)
    if phase == T.PHASE_OPEN:
        _remember(mem, t)
    # A segment that times out again leaves ssthresh as it is.
    if phase != T.PHASE_LOSS or ld64(mem, t + T.T_BACKOFF) == 0:
        st64(mem, t + T.T_SSTHRESH, _reduced(mem, x))
        cubic_timeout(mem, t)
    st64(mem, t + T.T_CWND, ld64(mem, t + T.T_MSS))
    st64(mem, t + T.T_CWND_ACKED, 0)


@shared
def congestion_undo(mem, x):
    """The last reduction had no reason: RFC 4015 section 3.2, RFC 9438 section 4.9."""
    t = x + T.X_TCB
    prior = ld64(mem, t + T.T_CWND_PRIOR)
    if prior == 0:
        return
    st64(mem, t + T.T_CWND, max(ld64(mem, t + T.T_CWND), min(prior, CWND_MAX)))
    st64(mem, t + T.T_SSTHRESH, max(ld64(mem, t + T.T_SSTHRESH), ld64(mem, t + T.T_SSTHRESH_PRIOR)))
    st64(mem, t + T.T_CUBIC_MAX, ld64(mem, t + T.T_CUBIC_MAX_PRIOR))
    st64(mem, t + T.T_CUBIC_AT, 0)
    st64(mem, t + T.T_CWND_PRIOR, 0)


@shared
def congestion_idle(mem, x):
    """RFC 5681 section 4.1: nothing is in flight and nothing was sent for longer than the RTO."""
    t = x + T.X_TCB
    last = ld64(mem, t + T.T_SENT_AT)
    idle = ld64(mem, x + T.X_NOW) - last
    if last == 0 or ld64(mem, t + T.T_SND_NXT) != ld64(mem, t + T.T_SND_UNA) or idle <= rto(mem, x):
        return
    restart = min(10 * ld64(mem, t + T.T_MSS), max(2 * ld64(mem, t + T.T_MSS), 14600))
    st64(mem, t + T.T_CWND, min(ld64(mem, t + T.T_CWND), restart))
    st64(mem, t + T.T_SENT_AT, ld64(mem, x + T.X_NOW))
    cubic_idle(mem, t, idle)
