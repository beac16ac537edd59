"""Loss: what is lost, what is sent again, how much may be in flight. RFC 5681, 6582, 6675, 6937, 8985, 3522.

Called by input (`ack_process` behind `sack_update`), output (`recovery_next`, `send_allowance`, `sent`) and
timers (`retransmit_timeout`, `tail_probe`). Writes T_SND_UNA, T_SND_NXT, T_SND_MAX, T_RTX_AT, T_PROBE_AT,
T_RETRANSMITS and all words of recovery. T_SND_NXT never goes back here, whatever is sent again. What lies
between it and T_SND_MAX is the byte of a window probe, which is not in flight.

Names of RFC 6675 section 2: HighACK = SND_UNA, HighData = SND_NXT, HighRxt = T_HIGH_RXT, RecoveryPoint =
T_RECOVER, RescueRxt = T_RESCUE; pipe = `pipe()`. A *hole* is what is not SACKed between two ranges of the
scoreboard, between SND_UNA and the first one, or behind the last one. Holes are ranges, not segments.

Invariants.
 R1  SND_UNA <= SND_NXT; the scoreboard is in (SND_UNA, SND_NXT]; nothing that is on it is ever sent again: a
     second timeout in a row, which says that the peer may have given up what it SACKed, clears it.
 R2  Outside of PHASE_OPEN, SND_UNA < T_RECOVER <= SND_NXT. The phase ends when T_RECOVER is acknowledged.
 R3  Within one recovery each hole is sent again once, in ascending order: before HighRxt all of what is lost
     was sent again, behind it nothing but a probe or a rescue. PHASE_LOSS begins this anew.
 R4  pipe counts each byte in flight as often as it may be there: once if it is not lost, once more below HighRxt.
     Bytes that we have forgotten to be SACKed (scoreboard S2) count, so that the estimate errs to the safe side.
 R5  A reduction of the window is made once per recovery, and may be undone until the next one.

What is lost. (a) DupThresh, RFC 6675 section 4, while no reordering is known. (b) What is below T_LOST: a
timeout puts it to SND_NXT; without SACK it is one segment (RFC 6582). And (c) time, as in RFC 8985: the pair
(T_REORDER_HIGH, T_REORDER_AT) says that data were SACKed up to a position at a time; when the reordering window
has passed since, what is still not SACKed below it is lost. One pair is kept, not a time of each segment as
RACK has it, which would take memory without bound in a control block of fixed size; a loss may be seen up to one
window later. The window is what was measured: how long a hole stayed that then filled by itself. From the first
retransmission that proves spurious, (c) replaces (a) (RFC 8985 section 6.2, step 4), and a segment that is late
costs nothing, however many others overtook it; recoveries without such proof wear the window down again.

The one timer T_PROBE_AT is, in PHASE_OPEN, the tail-loss probe or, with something SACKed, the end of the
reordering window; else a second chance for a retransmission that was itself lost: one segment, once per
advance of SND_UNA, in place of a timeout (not in any RFC: a probe as RFC 8985 section 7 has it, within recovery).
"""

from __future__ import annotations

from dataplane.jit import shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.congestion import (
    CWND_MAX,
    congestion_acked,
    congestion_idle,
    congestion_loss,
    congestion_timeout,
    congestion_undo,
)
from dataplane.tcp.rtt import MS, RTO_SYN_LOST, rto, rtt_forget, rtt_measure, rtt_start, timestamp
from dataplane.tcp.scoreboard import sack_highest, sacked_bytes, scoreboard_advance, scoreboard_clear

__all__ = ["ack_process", "pipe", "recovery_next", "reorder_window", "retransmit_timeout", "send_allowance", "sent",
           "tail_probe"]

DUP_THRESH = 3                  # RFC 5681 section 3.2
REORDER_MIN = 5 * MS            # workers hand over what the network delivered in order out of order, too
PROBE_MIN = 2 * MS
ACK_DELAY_MAX = 200 * MS        # RFC 8985 section 7.2: WCDelAckT
_STAMPED = 1 << 32


# -- what is lost, what is in flight -------------------------------------------------------------------


@shared
def _mss(mem, t):
    return max(ld64(mem, t + T.T_MSS), 1)


@shared
def _hole(mem, t, i):
    """Hole `i`: the one before range `i` of the scoreboard; behind all of them for i = count."""
    count = ld64(mem, t + T.T_SB_COUNT)
    start = ld64(mem, t + T.T_SB + 16 * i - 8) if i > 0 else ld64(mem, t + T.T_SND_UNA)
    end = ld64(mem, t + T.T_SB + 16 * i) if i < count else ld64(mem, t + T.T_SND_NXT)
    return start, end


@shared
def _overtaken(mem, t, i, above):
    """IsLost of RFC 6675 section 4 for hole `i`, with `above` bytes SACKed above it. While no reordering
    is known only."""
    if ld64(mem, t + T.T_REORDER_WND) > 0:
        return False
    return ld64(mem, t + T.T_SB_COUNT) - i >= DUP_THRESH or above > (DUP_THRESH - 1) * _mss(mem, t)


@shared
def _lost_to(mem, t, i, above):
    """Up to where hole `i` is lost; its start if it is not."""
    start, end = _hole(mem, t, i)
    if _overtaken(mem, t, i, above):
        return end
    return max(start, min(end, ld64(mem, t + T.T_LOST)))


@shared
def _credit(mem, t):
    """Without SACK each duplicate ACK says that one segment has left (RFC 5681 section 3.2, steps 1 to 4)."""
    if ld64(mem, t + T.T_FLAGS) & T.TF_SACK:
        return 0
    dupacks = ld64(mem, t + T.T_DUPACKS)
    if ld64(mem, t + T.T_PHASE) == T.PHASE_OPEN:
        dupacks = min(dupacks, DUP_THRESH - 1)      # limited transmit, RFC 3042 section 2
    return dupacks * _mss(mem, t)


@shared
def pipe(mem, t):
    """SetPipe of RFC 6675 section 4: bytes in flight."""
    above = sacked_bytes(mem, t)
    again = ld64(mem, t + T.T_HIGH_RXT) if ld64(mem, t + T.T_PHASE) != T.PHASE_OPEN else 0
    total = 0
    for i in range(ld64(mem, t + T.T_SB_COUNT) + 1):
        start, end = _hole(mem, t, i)
        total += end - _lost_to(mem, t, i, above)               # (a)
        total += max(min(again, end) - start, 0)                # (b)
        if i < ld64(mem, t + T.T_SB_COUNT):
            above -= ld64(mem, t + T.T_SB + 16 * i + 8) - end
    return max(total - _credit(mem, t), 0)


# -- reordering ----------------------------------------------------------------------------------------


@shared
def reorder_window(mem, x):
    """ns that data may be late. A quarter of the shortest round trip until something is known (RFC 8985
    section 6.2, step 4), and never so long that the retransmission timer would come first."""
    t = x + T.X_TCB
    window = max(ld64(mem, t + T.T_REORDER_WND), ld64(mem, t + T.T_MIN_RTT) // 4)
    return max(min(window, ld64(mem, t + T.T_RTO) * 3 // 4), REORDER_MIN)


@shared
def _late(mem, x, since, least):
    """Something was late, `since` a time: the window is to cover it, with a margin."""
    t = x + T.X_TCB
    late = ld64(mem, x + T.X_NOW) - since if since > 0 else 0
    window = max(ld64(mem, t + T.T_REORDER_WND), max(late + late // 4, least))
    st64(mem, t + T.T_REORDER_WND, min(window, ld64(mem, t + T.T_RTO)))


@shared
def _note_sacked(mem, x):
    """Keeps (T_REORDER_HIGH, T_REORDER_AT): a pair that SND_UNA has passed is replaced by that of now."""
    t = x + T.X_TCB
    if ld64(mem, t + T.T_SB_COUNT) == 0:
        st64(mem, t + T.T_REORDER_AT, 0)
    elif ld64(mem, t + T.T_REORDER_AT) == 0 or ld64(mem, t + T.T_REORDER_HIGH) <= ld64(mem, t + T.T_SND_UNA):
        st64(mem, t + T.T_REORDER_HIGH, sack_highest(mem, t))
        st64(mem, t + T.T_REORDER_AT, ld64(mem, x + T.X_NOW))


@shared
def _expire(mem, x):
    """Marks as lost what the reordering window has passed over; 1 if it did."""
    t = x + T.X_TCB
    since = ld64(mem, t + T.T_REORDER_AT)
    if since == 0 or ld64(mem, x + T.X_NOW) < since + reorder_window(mem, x):
        return 0
    st64(mem, t + T.T_LOST, max(ld64(mem, t + T.T_LOST), ld64(mem, t + T.T_REORDER_HIGH)))
    st64(mem, t + T.T_REORDER_HIGH, sack_highest(mem, t))
    st64(mem, t + T.T_REORDER_AT, ld64(mem, x + T.X_NOW))
    return 1


@shared
def _filled(mem, x, una, first):
    """SND_UNA was at `una`, with a hole behind it up to `first` (0: none): if it filled and nobody sent it
    again, it was late. Measured only where time decides: a few segments, DupThresh does not mind."""
    t = x + T.X_TCB
    if first == 0 or ld64(mem, t + T.T_REORDER_WND) == 0 or ld64(mem, t + T.T_PROBE_STATE) == T.PROBE_AGAIN:
        return
    if ld64(mem, t + T.T_PHASE) == T.PHASE_OPEN or una >= ld64(mem, t + T.T_HIGH_RXT):
        _late(mem, x, ld64(mem, t + T.T_REORDER_AT), 0)


# -- phases ----------------------------------------------------------------------------------------------


@shared
def _enter(mem, x):
    """Recovery begins: RFC 6675 section 5 (4), RFC 6582 section 3.2 step 2, RFC 6937 section 3."""
    t = x + T.X_TCB
    una = ld64(mem, t + T.T_SND_UNA)
    congestion_loss(mem, x)
    st64(mem, t + T.T_PHASE, T.PHASE_RECOVERY)
    st64(mem, t + T.T_RECOVER, ld64(mem, t + T.T_SND_NXT))
    st64(mem, t + T.T_HIGH_RXT, una)
    st64(mem, t + T.T_HOLE_AT, ld64(mem, t + T.T_REORDER_AT))
    st64(mem, t + T.T_DSACKED, 0)
    st64(mem, t + T.T_RESCUE, una - 1)
    st64(mem, t + T.T_PRR_DELIVERED, 0)
    st64(mem, t + T.T_PRR_OUT, 0)
    st64(mem, t + T.T_PRR_FLIGHT, ld64(mem, t + T.T_SND_NXT) - una)
    st64(mem, t + T.T_UNDO_BYTES, 0)
    st64(mem, t + T.T_RXT_STAMP, 0)
    st64(mem, t + T.T_PROBE_STATE, T.PROBE_NONE)
    st64(mem, t + T.T_PROBE_AT, 0)
    if ld64(mem, t + T.T_FLAGS) & T.TF_SACK == 0:
        st64(mem, t + T.T_LOST, una + _mss(mem, t))


@shared
def _leave(mem, x):
    """Recovery, or the loss phase, is over."""
    t = x + T.X_TCB
    if ld64(mem, t + T.T_PHASE) == T.PHASE_RECOVERY:
        cwnd = ld64(mem, t + T.T_SSTHRESH)
        if ld64(mem, t + T.T_FLAGS) & T.TF_SACK == 0:
            # RFC 6582 section 3.2 step 3: no burst of all that the duplicate ACKs have made room for.
            mss = _mss(mem, t)
            flight = ld64(mem, t + T.T_SND_NXT) - ld64(mem, t + T.T_SND_UNA)
            cwnd = min(cwnd, max(flight, mss) + mss)
        st64(mem, t + T.T_CWND, max(cwnd, _mss(mem, t)))
        # A recovery that nothing proved wrong: less reason to wait next time (RFC 8985 section 6.2, step 4).
        window = ld64(mem, t + T.T_REORDER_WND) * 7 // 8
        st64(mem, t + T.T_REORDER_WND, window if window >= MS else 0)
    _open(mem, t)


@shared
def _open(mem, t):
    st64(mem, t + T.T_PHASE, T.PHASE_OPEN)
    st64(mem, t + T.T_DUPACKS, 0)
    st64(mem, t + T.T_LOST, 0)
    st64(mem, t + T.T_PROBE_STATE, T.PROBE_NONE)


@shared
def _undo(mem, x):
    """The retransmission had no reason: the window comes back, and from now on time decides."""
    t = x + T.X_TCB
    congestion_undo(mem, x)
    if ld64(mem, t + T.T_FLAGS) & T.TF_SACK and ld64(mem, t + T.T_PHASE) != T.PHASE_LOSS:
        _late(mem, x, ld64(mem, t + T.T_HOLE_AT), REORDER_MIN)
    st64(mem, t + T.T_RXT_STAMP, 0)
    _open(mem, t)


@shared
def _spurious(mem, x, acked):
    """1 if what was retransmitted since the last reduction had not been lost."""
    t = x + T.X_TCB
    s = x + T.X_SEGMENT
    if ld64(mem, t + T.T_CWND_PRIOR) == 0:
        return 0
    if acked > 0 and ld64(mem, t + T.T_PHASE) == T.PHASE_RECOVERY and ld64(mem, t + T.T_UNDO_BYTES) == 0:
        return 1        # the hole filled before we had sent anything again
    stamp = ld64(mem, t + T.T_RXT_STAMP)
    if acked > 0 and stamp != 0 and ld64(mem, t + T.T_PHASE) != T.PHASE_OPEN:
        # Eifel, RFC 3522 section 3.2: the first ACK behind the retransmission answers the original.
        st64(mem, t + T.T_RXT_STAMP, 0)
        if ld64(mem, s + T.S_OPTIONS) & T.SO_TIMESTAMPS:
            if (ld64(mem, s + T.S_TSECR) - stamp) & 0x80000000:
                return 1
    duplicate = ld64(mem, t + T.T_DSACKED)
    left = ld64(mem, t + T.T_UNDO_BYTES)
    if duplicate > 0 and left > 0:
        # RFC 3708 section 2: each retransmission has been reported as a duplicate.
        st64(mem, t + T.T_UNDO_BYTES, max(left - duplicate, 0))
        return 1 if left <= duplicate else 0
    return 0


# -- an ACK ------------------------------------------------------------------------------------------------


@shared
def _proportion(mem, x, delivered):
    """RFC 6937 section 3.1: the window of this moment, so that output goes on at the pace of the ACKs."""
    t = x + T.X_TCB
    mss = _mss(mem, t)
    flying = pipe(mem, t)
    ssthresh = ld64(mem, t + T.T_SSTHRESH)
    arrived = ld64(mem, t + T.T_PRR_DELIVERED) + delivered
    out = ld64(mem, t + T.T_PRR_OUT)
    st64(mem, t + T.T_PRR_DELIVERED, arrived)
    if flying > ssthresh:
        whole = max(ld64(mem, t + T.T_PRR_FLIGHT), 1)
        count = (arrived * ssthresh + whole - 1) // whole - out
    else:
        count = min(ssthresh - flying, max(arrived - out, delivered) + mss)     # slow start reduction bound
    st64(mem, t + T.T_CWND, min(max(flying + max(count, 0), mss), CWND_MAX))


@shared
def _should_enter(mem, x, una, acked):
    """RFC 6675 section 5 (1), (2) with SACK; RFC 6582 section 3.2 step 1 without."""
    t = x + T.X_TCB
    now_una = ld64(mem, t + T.T_SND_UNA)
    if now_una >= ld64(mem, t + T.T_SND_NXT):
        return False
    if ld64(mem, t + T.T_FLAGS) & T.TF_SACK == 0:
        # The ACK covers more than what was outstanding when the last recovery or timeout was.
        return acked == 0 and ld64(mem, t + T.T_DUPACKS) >= DUP_THRESH and una >= ld64(mem, t + T.T_RECOVER)
    if ld64(mem, t + T.T_SB_COUNT) == 0:
        return False
    if ld64(mem, t + T.T_LOST) > now_una:
        return True
    if ld64(mem, t + T.T_REORDER_WND) == 0 and ld64(mem, t + T.T_DUPACKS) >= DUP_THRESH:
        # (1) may come before IsLost says so, with less than a segment in each: the first one is lost then.
        st64(mem, t + T.T_LOST, now_una + _mss(mem, t))
        return True
    return _overtaken(mem, t, 0, sacked_bytes(mem, t))


@shared
def _count(mem, x, acked, fresh, is_dup):
    """Counts duplicate ACKs; returns how many bytes this ACK says have arrived (RFC 6937: DeliveredData),
    for a connection without SACK."""
    t = x + T.X_TCB
    mss = _mss(mem, t)
    dupacks = ld64(mem, t + T.T_DUPACKS)
    if acked > 0:
        # What left with the duplicates is part of what is acknowledged now (RFC 6582 section 3.2 step 3).
        before = min(dupacks, (acked - 1) // mss)
        still = dupacks - before if ld64(mem, t + T.T_PHASE) == T.PHASE_RECOVERY else 0
        st64(mem, t + T.T_DUPACKS, still)
        return acked - before * mss
    if (ld64(mem, t + T.T_FLAGS) & T.TF_SACK and fresh > 0) or (ld64(mem, t + T.T_FLAGS) & T.TF_SACK == 0 and is_dup):
        # A duplicate of a connection in the loss phase tells nothing: what is sent again makes them.
        flight = ld64(mem, t + T.T_SND_NXT) - ld64(mem, t + T.T_SND_UNA)
        if ld64(mem, t + T.T_PHASE) != T.PHASE_LOSS and dupacks * mss < flight:
            st64(mem, t + T.T_DUPACKS, dupacks + 1)
        return mss
    return 0


@shared
def _probe_answered(mem, x, ack):
    """RFC 8985 section 7.4: was it a loss that the tail probe repaired? Then it counts as one."""
    t = x + T.X_TCB
    state = ld64(mem, t + T.T_PROBE_STATE)
    end = ld64(mem, t + T.T_PROBE_END)
    if state == T.PROBE_NONE or ack < end or ld64(mem, t + T.T_PHASE) != T.PHASE_OPEN:
        return
    if state == T.PROBE_NEW or ld64(mem, t + T.T_DSACKED) > 0:
        st64(mem, t + T.T_PROBE_STATE, T.PROBE_NONE)
    elif ack > end:
        st64(mem, t + T.T_PROBE_STATE, T.PROBE_NONE)
        congestion_loss(mem, x)
        # A D-SACK for the probe may still come.
        st64(mem, t + T.T_UNDO_BYTES, min(_mss(mem, t), end - ld64(mem, t + T.T_SND_UNA)))
    elif ld64(mem, t + T.T_SND_UNA) == end and ld64(mem, x + T.X_SEGMENT + T.S_LENGTH) == 0:
        # A second ACK for the same: both copies arrived. The first one leaves the question open.
        st64(mem, t + T.T_PROBE_STATE, T.PROBE_NONE)


@shared
def _grow(mem, x, una, acked, delivered):
    """Slow start or congestion avoidance, if the window was what limited us (RFC 9438 section 5.8)."""
    t = x + T.X_TCB
    if una >= ld64(mem, t + T.T_LIMITED_TO):
        return
    if ld64(mem, t + T.T_PHASE) == T.PHASE_LOSS:
        # A retransmission may complete much that arrived long ago: that made no room in the network. Without
        # SACK we cannot tell (RFC 3465 section 2.3).
        acked = min(acked, delivered if ld64(mem, t + T.T_FLAGS) & T.TF_SACK else _mss(mem, t))
    if acked > 0:
        congestion_acked(mem, x, acked, ld64(mem, x + T.X_NOW))


@shared
def _phase(mem, x, una, acked, delivered):
    """What the ACK does to the phase and to the window."""
    t = x + T.X_TCB
    phase = ld64(mem, t + T.T_PHASE)
    if phase != T.PHASE_OPEN and ld64(mem, t + T.T_SND_UNA) >= ld64(mem, t + T.T_RECOVER):
        if phase == T.PHASE_LOSS:
            _grow(mem, x, una, acked, delivered)
        _leave(mem, x)
        phase = T.PHASE_OPEN
        acked = 0
    if phase == T.PHASE_OPEN:
        if _should_enter(mem, x, una, acked):
            _enter(mem, x)
            _proportion(mem, x, delivered)
        elif acked > 0:
            _grow(mem, x, una, acked, delivered)
    elif phase == T.PHASE_RECOVERY:
        if acked > 0 and ld64(mem, t + T.T_FLAGS) & T.TF_SACK == 0:
            # Partial ACK: the next segment is lost, too (RFC 6582 section 3.2 step 3).
            st64(mem, t + T.T_LOST, ld64(mem, t + T.T_SND_UNA) + _mss(mem, t))
        _proportion(mem, x, delivered)
    else:
        _grow(mem, x, una, acked, delivered)


@shared
def _opened(mem, x):
    """Our SYN is acknowledged; if it had to be sent again, RFC 6298 (5.7) and RFC 5681 section 3.1."""
    t = x + T.X_TCB
    if ld64(mem, t + T.T_RETRANSMITS) > 0:
        st64(mem, t + T.T_RTO, max(ld64(mem, t + T.T_RTO), RTO_SYN_LOST))
        st64(mem, t + T.T_CWND, _mss(mem, t))
    st64(mem, t + T.T_BACKOFF, 0)
    st64(mem, t + T.T_RECOVER, 1)
    _open(mem, t)


@shared
def ack_process(mem, x, ack, new_sacked, is_dup):
    """An acceptable ACK: `ack` in [SND_UNA, SND_MAX], `new_sacked` as `sack_update` returned it, `is_dup` by
    RFC 5681 section 2."""
    t = x + T.X_TCB
    una = ld64(mem, t + T.T_SND_UNA)
    acked = ack - una
    first = ld64(mem, t + T.T_SB) if ld64(mem, t + T.T_SB_COUNT) > 0 else 0
    if acked > 0:
        rtt_measure(mem, x, ack)
        _filled(mem, x, una, first)
    delivered = _count(mem, x, acked, new_sacked, is_dup)
    if ld64(mem, t + T.T_FLAGS) & T.TF_SACK:
        delivered = max(acked + new_sacked - scoreboard_advance(mem, t, ack), 0)
    _probe_answered(mem, x, ack)
    st64(mem, t + T.T_SND_UNA, ack)
    st64(mem, t + T.T_SND_NXT, max(ld64(mem, t + T.T_SND_NXT), ack))
    if una == 0 and acked > 0:
        _opened(mem, x)
        acked -= 1          # the SYN is no data
    elif _spurious(mem, x, acked):
        _undo(mem, x)
    _note_sacked(mem, x)
    _phase(mem, x, una, acked, delivered)
    st64(mem, t + T.T_DSACKED, 0)
    _rearm(mem, x, ack - una)


# -- timers --------------------------------------------------------------------------------------------------


@shared
def _rearm(mem, x, acked):
    """RFC 6298 (5.2), (5.3), and the probe's."""
    t = x + T.X_TCB
    if ld64(mem, t + T.T_SND_UNA) >= ld64(mem, t + T.T_SND_NXT):
        st64(mem, t + T.T_RTX_AT, 0)
        st64(mem, t + T.T_PROBE_AT, 0)
        return
    if acked > 0:
        st64(mem, t + T.T_RTX_AT, ld64(mem, x + T.X_NOW) + rto(mem, x))
        if ld64(mem, t + T.T_PHASE) != T.PHASE_OPEN:
            st64(mem, t + T.T_PROBE_STATE, T.PROBE_NONE)
    # In recovery once per advance: a probe that was not answered either leaves the rest to the timeout.
    if acked > 0 or ld64(mem, t + T.T_PHASE) == T.PHASE_OPEN or ld64(mem, t + T.T_PROBE_AT) != 0:
        _arm_probe(mem, x, acked)


@shared
def _arm_probe(mem, x, acked):
    """When T_PROBE_AT is, with something outstanding."""
    t = x + T.X_TCB
    now = ld64(mem, x + T.X_NOW)
    srtt = ld64(mem, t + T.T_SRTT)
    at = 0
    if ld64(mem, t + T.T_FLAGS) & T.TF_SACK == 0 or ld64(mem, t + T.T_SND_UNA) == 0:
        at = 0                              # RFC 8985 section 7.1: with SACK only
    elif ld64(mem, t + T.T_PHASE) == T.PHASE_LOSS and ld64(mem, t + T.T_BACKOFF) > 0:
        at = 0                              # nothing has arrived since the timeout
    elif ld64(mem, t + T.T_PHASE) != T.PHASE_OPEN:
        at = ld64(mem, t + T.T_PROBE_AT)
        if acked > 0 or at == 0:
            at = now + max(2 * srtt, srtt + 4 * ld64(mem, t + T.T_RTTVAR)) + REORDER_MIN
    elif ld64(mem, t + T.T_SB_COUNT) > 0:
        at = ld64(mem, t + T.T_REORDER_AT) + reorder_window(mem, x)
    elif ld64(mem, t + T.T_PROBE_STATE) == T.PROBE_NONE:
        # RFC 8985 section 7.2
        at = now + (max(2 * srtt, PROBE_MIN) if srtt > 0 else 1000 * MS)
        if ld64(mem, t + T.T_SND_NXT) - ld64(mem, t + T.T_SND_UNA) <= _mss(mem, t):
            at += ACK_DELAY_MAX
    timer = ld64(mem, t + T.T_RTX_AT)
    if at != 0 and timer != 0:
        at = min(at, timer)
    st64(mem, t + T.T_PROBE_AT, at)


@shared
def retransmit_timeout(mem, x):
    """T_RTX_AT has passed: RFC 6298 (5.4) to (5.6), RFC 5681 section 3.1, RFC 6675 section 5.1."""
    t = x + T.X_TCB
    una = ld64(mem, t + T.T_SND_UNA)
    backoff = ld64(mem, t + T.T_BACKOFF)
    if una > 0:                     # a SYN that is lost says nothing of the path's room: `_opened`
        phase = ld64(mem, t + T.T_PHASE)
        congestion_timeout(mem, x)
        if phase == T.PHASE_LOSS and backoff > 0:
            # It may have given up what it SACKed (RFC 2018 section 8); one that touches SND_UNA never
            # stays on the scoreboard. A second timeout in a row trusts nothing.
            scoreboard_clear(mem, t)
        if phase == T.PHASE_OPEN:
            st64(mem, t + T.T_UNDO_BYTES, 0)
            st64(mem, t + T.T_RXT_STAMP, 0)
            st64(mem, t + T.T_HOLE_AT, 0)
        st64(mem, t + T.T_PHASE, T.PHASE_LOSS)
        st64(mem, t + T.T_LIMITED_TO, ld64(mem, t + T.T_SND_NXT))
        st64(mem, t + T.T_RECOVER, ld64(mem, t + T.T_SND_NXT))
        st64(mem, t + T.T_LOST, ld64(mem, t + T.T_SND_NXT))
        st64(mem, t + T.T_HIGH_RXT, una)
        st64(mem, t + T.T_RESCUE, una)
        st64(mem, t + T.T_DUPACKS, 0)
        _note_sacked(mem, x)
    st64(mem, t + T.T_PROBE_STATE, T.PROBE_NONE)
    st64(mem, t + T.T_PROBE_AT, 0)
    st64(mem, t + T.T_TIMED_POSITION, 0)
    st64(mem, t + T.T_BACKOFF, backoff + 1)
    st64(mem, t + T.T_RTX_AT, ld64(mem, x + T.X_NOW) + rto(mem, x))


@shared
def _tail(mem, x):
    """RFC 8985 section 7.3: new data if there are any, else the last segment again."""
    t = x + T.X_TCB
    mss = _mss(mem, t)
    top = ld64(mem, t + T.T_SND_NXT)
    room = min(min(ld64(mem, x + T.X_WRITTEN), ld64(mem, t + T.T_SND_UNA) + ld64(mem, t + T.T_SND_WND)) - top, mss)
    if room > 0 and ld64(mem, t + T.T_FIN_AT) == 0:
        st64(mem, t + T.T_PROBE_STATE, T.PROBE_NEW)
        st64(mem, t + T.T_PROBE_END, top + room)
        return top, room
    start = max(top - mss, max(ld64(mem, t + T.T_SND_UNA), 1))
    if start < top:
        st64(mem, t + T.T_PROBE_STATE, T.PROBE_AGAIN)
        st64(mem, t + T.T_PROBE_END, top)
    return start, top - start


@shared
def tail_probe(mem, x):
    """T_PROBE_AT has passed: (from, length) to be sent now whatever the window says, new if `from` is SND_NXT;
    length 0 if there is nothing to send, or if `recovery_next` has it."""
    t = x + T.X_TCB
    st64(mem, t + T.T_PROBE_AT, 0)
    una = ld64(mem, t + T.T_SND_UNA)
    if una == 0 or una >= ld64(mem, t + T.T_SND_NXT):
        return una, 0
    if ld64(mem, t + T.T_PHASE) != T.PHASE_OPEN:
        st64(mem, t + T.T_PROBE_STATE, T.PROBE_AGAIN)
        end = _hole(mem, t, 0)[1]
        return una, min(end - una, _mss(mem, t))
    if ld64(mem, t + T.T_SB_COUNT) > 0:
        since = ld64(mem, t + T.T_REORDER_AT)
        if _expire(mem, x):
            _enter(mem, x)
            st64(mem, t + T.T_HOLE_AT, since)
            _proportion(mem, x, 0)
        _arm_probe(mem, x, 0)
        return una, 0
    # Section 7.3: the retransmission timer starts over, so that the probe has its chance.
    st64(mem, t + T.T_RTX_AT, ld64(mem, x + T.X_NOW) + rto(mem, x))
    return _tail(mem, x)


# -- output ----------------------------------------------------------------------------------------------------


@shared
def _next_lost(mem, t):
    """NextSeg (1) of RFC 6675 section 4: the first part of a hole that is lost and was not sent again."""
    again = max(ld64(mem, t + T.T_HIGH_RXT), 1)        # never the SYN
    above = sacked_bytes(mem, t)
    count = ld64(mem, t + T.T_SB_COUNT)
    for i in range(count + 1):
        start, end = _hole(mem, t, i)
        start = max(start, again)
        until = _lost_to(mem, t, i, above)
        if start < until:
            return start, until
        if i < count:
            above -= ld64(mem, t + T.T_SB + 16 * i + 8) - end
    return again, again


@shared
def _next_other(mem, x):
    """NextSeg (3), what is not lost yet, and (4), the rescue; one segment. Behind (2), new data."""
    t = x + T.X_TCB
    mss = _mss(mem, t)
    top = ld64(mem, t + T.T_SND_NXT)
    una = ld64(mem, t + T.T_SND_UNA)
    fresh = min(ld64(mem, x + T.X_WRITTEN), una + ld64(mem, t + T.T_SND_WND)) > top
    count = ld64(mem, t + T.T_SB_COUNT)
    if fresh or count == 0 or ld64(mem, t + T.T_PHASE) != T.PHASE_RECOVERY or ld64(mem, t + T.T_REORDER_WND) > 0:
        return una, una
    for i in range(count):
        start, end = _hole(mem, t, i)
        start = max(start, ld64(mem, t + T.T_HIGH_RXT))
        if start < end:
            return start, min(start + mss, end)
    highest = sack_highest(mem, t)
    if una > ld64(mem, t + T.T_RESCUE) and highest < top:
        st64(mem, t + T.T_RESCUE, ld64(mem, t + T.T_RECOVER))
        return max(highest, top - mss), top
    return una, una


@shared
def recovery_next(mem, x):
    """(from, length) of what is to be sent again now; length 0: nothing. It may be many segments long, and
    may end with the FIN. To be followed by `sent`, and called again."""
    t = x + T.X_TCB
    phase = ld64(mem, t + T.T_PHASE)
    if phase == T.PHASE_OPEN:
        return ld64(mem, t + T.T_SND_UNA), 0
    # Here and not for each ACK, since one that fills the hole may be behind it in the queue.
    _expire(mem, x)
    mss = _mss(mem, t)
    room = ld64(mem, t + T.T_CWND) - pipe(mem, t)
    start, end = _next_lost(mem, t)
    if room < mss and phase == T.PHASE_RECOVERY:
        # RFC 6675 section 5 (4.3), RFC 6582 section 3.2 step 3: the first one goes whatever the window says.
        sack = ld64(mem, t + T.T_FLAGS) & T.TF_SACK
        if ld64(mem, t + T.T_PRR_OUT) == 0 or (sack == 0 and ld64(mem, t + T.T_HIGH_RXT) <= ld64(mem, t + T.T_SND_UNA)):
            room = mss
    if room < mss:
        return start, 0
    if start >= end:
        start, end = _next_other(mem, x)
    length = min(end - start, max(T.OUT_BYTES_MAX // mss * mss, min(mss, T.OUT_BYTES_MAX)))
    if length > room:
        length = room // mss * mss      # (C): whole segments
    return start, max(length, 0)


@shared
def send_allowance(mem, x):
    """Bytes of new data that the congestion window permits now (RFC 6675 section 5 (C); RFC 3042: with a segment
    for each of the first two duplicate ACKs, which `pipe` takes off)."""
    t = x + T.X_TCB
    congestion_idle(mem, x)
    return max(ld64(mem, t + T.T_CWND) - pipe(mem, t), 0)


@shared
def _sent_again(mem, x, from_, to_):
    t = x + T.X_TCB
    mss = _mss(mem, t)
    rtt_forget(mem, x, from_)
    st64(mem, t + T.T_RETRANSMITS, ld64(mem, t + T.T_RETRANSMITS) + (to_ - from_ + mss - 1) // mss)
    if ld64(mem, t + T.T_PHASE) == T.PHASE_OPEN:
        return
    if ld64(mem, t + T.T_RXT_STAMP) == 0 and ld64(mem, t + T.T_UNDO_BYTES) == 0:
        if ld64(mem, t + T.T_FLAGS) & T.TF_TIMESTAMPS:
            st64(mem, t + T.T_RXT_STAMP, timestamp(mem, x) | _STAMPED)
    st64(mem, t + T.T_UNDO_BYTES, ld64(mem, t + T.T_UNDO_BYTES) + to_ - from_)
    # A rescue is not part of the sweep (R3): it starts behind the beginning of the last hole.
    if from_ <= max(sack_highest(mem, t), ld64(mem, t + T.T_HIGH_RXT)):
        st64(mem, t + T.T_HIGH_RXT, max(ld64(mem, t + T.T_HIGH_RXT), to_))
    if from_ <= ld64(mem, t + T.T_SND_UNA):
        st64(mem, t + T.T_RTX_AT, ld64(mem, x + T.X_NOW) + rto(mem, x))


@shared
def sent(mem, x, from_, to_, again):
    """Output has sent [from_, to_), the SYN and the FIN being one position each; `again`: not for the first time."""
    t = x + T.X_TCB
    now = ld64(mem, x + T.X_NOW)
    st64(mem, t + T.T_PRR_OUT, ld64(mem, t + T.T_PRR_OUT) + to_ - from_)
    if again:
        _sent_again(mem, x, from_, to_)
    else:
        rtt_start(mem, x, from_)
        st64(mem, t + T.T_SND_NXT, max(ld64(mem, t + T.T_SND_NXT), to_))
        st64(mem, t + T.T_SND_MAX, max(ld64(mem, t + T.T_SND_MAX), to_))
        cwnd = ld64(mem, t + T.T_CWND)
        slack = max(2 * _mss(mem, t), cwnd // 2 if cwnd < ld64(mem, t + T.T_SSTHRESH) else cwnd // 8)
        if pipe(mem, t) + slack >= cwnd:
            st64(mem, t + T.T_LIMITED_TO, to_)
    st64(mem, t + T.T_SENT_AT, now)
    if ld64(mem, t + T.T_RTX_AT) == 0:
        st64(mem, t + T.T_RTX_AT, now + rto(mem, x))        # RFC 6298 (5.1)
    if ld64(mem, t + T.T_PHASE) == T.PHASE_OPEN:
        if again == 0 or ld64(mem, t + T.T_PROBE_STATE) == T.PROBE_NONE:
            _arm_probe(mem, x, 0)
    elif again and ld64(mem, t + T.T_PROBE_AT) == 0 and ld64(mem, t + T.T_PROBE_STATE) == T.PROBE_NONE:
        _arm_probe(mem, x, 0)
