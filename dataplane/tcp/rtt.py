"""Round-trip time and retransmission timeout: RFC 6298, with Karn's algorithm and RFC 7323.

Called by recovery.py, and by whoever needs `rto`. Writes T_SRTT ... T_MIN_RTT of the private
control block; times are ns.

One segment per round trip is timed with the full resolution of the clock (T_TIMED_POSITION, which
retransmission of anything before it forgets: Karn). The timestamps of the peer, in ms, give a sample
when there is no such segment: after retransmissions, where only they can tell (RFC 7323 section 4).
One sample per round trip is what the constants of RFC 6298 are made for (RFC 7323 appendix G).
"""

from __future__ import annotations

from dataplane.jit import shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64

__all__ = [
    "RTO_INITIAL", "RTO_MAX", "RTO_MIN", "RTO_SYN_LOST", "rto", "rtt_forget", "rtt_init", "rtt_measure",
    "rtt_sample", "rtt_start", "timestamp",
]

MS = 1_000_000
GRANULARITY = 1 * MS
RTO_INITIAL = 1_000 * MS        # RFC 6298 (2.1)
RTO_MIN = 200 * MS              # (2.4) says 1 s; no stack of today follows it, since timeouts can be undone
RTO_MAX = 120_000 * MS          # (2.5)
RTO_SYN_LOST = 3_000 * MS       # (5.7)
_BACKOFF_MAX = 16


@shared
def rtt_init(mem, x):
    """RFC 6298 (2.1): before the first sample."""
    t = x + T.X_TCB
    st64(mem, t + T.T_SRTT, 0)
    st64(mem, t + T.T_RTTVAR, 0)
    st64(mem, t + T.T_RTO, RTO_INITIAL)
    st64(mem, t + T.T_BACKOFF, 0)
    st64(mem, t + T.T_TIMED_POSITION, 0)
    st64(mem, t + T.T_TIMED_AT, 0)
    st64(mem, t + T.T_MIN_RTT, 0)


@shared
def rtt_sample(mem, x, sample):
    """RFC 6298 (2.2), (2.3): one measurement, in ns; ends the backoff (section 5, last paragraph)."""
    t = x + T.X_TCB
    sample = min(max(sample, 1), RTO_MAX)
    srtt = ld64(mem, t + T.T_SRTT)
    rttvar = ld64(mem, t + T.T_RTTVAR)
    if srtt == 0:
        srtt = sample
        rttvar = sample // 2
    else:
        rttvar = (3 * rttvar + abs(srtt - sample)) // 4
        srtt = max((7 * srtt + sample) // 8, 1)
    st64(mem, t + T.T_SRTT, srtt)
    st64(mem, t + T.T_RTTVAR, rttvar)
    st64(mem, t + T.T_RTO, min(max(srtt + max(GRANULARITY, 4 * rttvar), RTO_MIN), RTO_MAX))
    st64(mem, t + T.T_BACKOFF, 0)
    lowest = ld64(mem, t + T.T_MIN_RTT)
    if lowest == 0 or sample < lowest:
        st64(mem, t + T.T_MIN_RTT, sample)


@shared
def rto(mem, x):
    """The timeout as it stands: RTO, doubled for each expiry since the last sample (RFC 6298 (5.5))."""
    t = x + T.X_TCB
    base = min(max(ld64(mem, t + T.T_RTO), RTO_MIN), RTO_MAX)
    backoff = min(max(ld64(mem, t + T.T_BACKOFF), 0), _BACKOFF_MAX)
    return min(base << backoff, RTO_MAX)


@shared
def timestamp(mem, x):
    """TSval of a segment that is sent in this run (wire)."""
    return (ld64(mem, x + T.X_NOW) // MS + ld64(mem, x + T.X_TCB + T.T_TS_OFFSET)) & 0xFFFFFFFF


@shared
def rtt_start(mem, x, from_):
    """Times the segment that starts at `from_`, sent now for the first time, if none is being timed."""
    t = x + T.X_TCB
    if ld64(mem, t + T.T_TIMED_POSITION) == 0:
        st64(mem, t + T.T_TIMED_POSITION, from_ + 1)
        st64(mem, t + T.T_TIMED_AT, ld64(mem, x + T.X_NOW))


@shared
def rtt_forget(mem, x, from_):
    """Karn: `from_` is sent again, so an acknowledgement of anything behind it tells nothing."""
    t = x + T.X_TCB
    if from_ < ld64(mem, t + T.T_TIMED_POSITION):
        st64(mem, t + T.T_TIMED_POSITION, 0)


@shared
def rtt_measure(mem, x, ack):
    """Takes a sample from the current segment, which acknowledges new data up to `ack`, if it has one.
    Returns 1 if it did."""
    t = x + T.X_TCB
    s = x + T.X_SEGMENT
    timed = ld64(mem, t + T.T_TIMED_POSITION)
    if timed > 0:
        if ack < timed:
            return 0
        st64(mem, t + T.T_TIMED_POSITION, 0)
        rtt_sample(mem, x, ld64(mem, x + T.X_NOW) - ld64(mem, t + T.T_TIMED_AT))
        return 1
    # RFC 7323 section 4.1: only from a segment that acknowledges new data. And not from one that reports a duplicate:
    # it answers that, and echoes whatever was in order last, which may be minutes old if ACKs were lost.
    if ld64(mem, t + T.T_DSACKED) > 0:
        return 0
    if ld64(mem, t + T.T_FLAGS) & T.TF_TIMESTAMPS and ld64(mem, s + T.S_OPTIONS) & T.SO_TIMESTAMPS:
        elapsed = (timestamp(mem, x) - ld64(mem, s + T.S_TSECR)) & 0xFFFFFFFF
        if elapsed <= RTO_MAX // MS:        # else it is no echo of ours
            rtt_sample(mem, x, max(elapsed, 1) * MS)
            return 1
    return 0
