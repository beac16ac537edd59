"""What arrives: one segment, or one message of the network, against one connection (RFC 9293 section 3.10.7).

`tcp_arrive` and `tcp_control` are called by service for each record of the connection's lanes, in order. They change
the control block and fill the receive ring; nothing is sent from here. What has to be answered is noted (TF_ACK_NOW,
TF_REFUSE, T_DELACK_AT), and output makes one segment of it when all that arrived has been processed (MUST-59).

The order of the checks is RFC 9293's (section 3.10.7.4): sequence, RST, SYN, ACK, URG, text, FIN; with PAWS before
it (RFC 7323 section 5.3) and RFC 5961's narrower rules in it. Urgent data are data in line (RFC 6093 section 6).
"""

from __future__ import annotations

import errno

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.acceptance import acceptable, challenge, note_timestamp, timestamp_fails
from dataplane.tcp.control import tcp_control
from dataplane.tcp.opening import established
from dataplane.tcp.reassembly import reassembly_duplicate, reassembly_insert
from dataplane.tcp.recovery import ack_process
from dataplane.tcp.scoreboard import sack_update
from dataplane.tcp.segment import segment_parse
from dataplane.tcp.sequence import unwrap
from dataplane.tcp.syn_sent import arrive_syn_sent, refuse
from dataplane.tcp.transition import abort, become, end, event, flag, linger, settle
from dataplane.tcp.window import receive_mss

__all__ = ["DELAYED_ACK_NS", "tcp_arrive", "tcp_control"]

DELAYED_ACK_NS = 40_000_000
"""How long an ACK may wait for company; RFC 9293 section 3.8.6.3 allows less than 500 ms."""

_ECONNRESET = errno.ECONNRESET
_ECONNREFUSED = errno.ECONNREFUSED


@shared
def tcp_arrive(mem, x, at, length):
    """Processes the segment of `length` bytes at `at`, header first."""
    s = x + T.X_SEGMENT
    if segment_parse(mem, at, length, s) == 0:
        return
    t = x + T.X_TCB
    st64(mem, t + T.T_SEGMENTS_IN, ld64(mem, t + T.T_SEGMENTS_IN) + 1)
    state = ld64(mem, t + T.T_STATE)
    if state >= T.SYN_RECEIVED:
        _synchronized(mem, x, s)
    elif state == T.SYN_SENT:
        if arrive_syn_sent(mem, x, s):
            _text(mem, x, s, 1, ld64(mem, s + T.S_FLAGS) & T.FIN)
    else:
        refuse(mem, x, s)


@shared
def _synchronized(mem, x, s):
    """All states from SYN_RECEIVED on."""
    t = x + T.X_TCB
    flags = ld64(mem, s + T.S_FLAGS)
    position = unwrap(ld64(mem, t + T.T_RCV_NXT), ld64(mem, t + T.T_IRS), ld64(mem, s + T.S_SEQ))
    if flags & T.SYN and position == 0 and flags & T.ACK and ld64(mem, t + T.T_STATE) == T.SYN_RECEIVED:
        # Simultaneous open: the SYN of this SYN-ACK is known already, its ACK is what we wait for.
        flags &= ~T.SYN
        position = 1
        flag(mem, x, T.TF_ACK_NOW)
    size = 0 if flags & T.RST else ld64(mem, s + T.S_LENGTH) + (flags & T.FIN) + ((flags & T.SYN) >> 1)
    stale = timestamp_fails(mem, x, s)
    if stale == 2:
        return
    if stale == 1 or not acceptable(mem, t, position, size):
        _unacceptable(mem, x, s, position, stale)
        return
    st64(mem, t + T.T_LAST_HEARD, ld64(mem, x + T.X_NOW))
    st64(mem, t + T.T_KEEP_PROBES, 0)
    if flags & (T.RST | T.SYN):
        if flags & T.RST:
            _take_reset(mem, x, position)
        else:
            challenge(mem, x)       # RFC 5961 section 4: whatever the state, whatever the number
        return
    if not flags & T.ACK:
        return
    note_timestamp(mem, x, s, position)
    if _acknowledge(mem, x, s, position, size):
        _text(mem, x, s, position, flags & T.FIN)


@shared
def _unacceptable(mem, x, s, position, stale):
    """Out of the window, or an old duplicate: an ACK says what we expect, and the segment is dropped."""
    t = x + T.X_TCB
    flags = ld64(mem, s + T.S_FLAGS)
    nxt = ld64(mem, t + T.T_RCV_NXT)
    if flags & T.RST:
        return
    if flags & T.SYN or (ld64(mem, s + T.S_LENGTH) == 0 and not flags & T.FIN and position != nxt - 1):
        # Neither data nor a keepalive probe. Limited, or two sides that disagree would answer each other for ever.
        challenge(mem, x)
        return
    flag(mem, x, T.TF_ACK_NOW)
    st64(mem, t + T.T_LAST_HEARD, ld64(mem, x + T.X_NOW))
    st64(mem, t + T.T_KEEP_PROBES, 0)
    if stale:
        return
    if position < nxt:
        _duplicate(mem, x, s, position)
    elif position == nxt and flags & T.ACK and not flags & T.SYN:
        # The window is closed. "Special allowance should be made to accept valid ACKs" (section 3.10.7.4): or both
        # sides could wait for each other's window with data that nobody may acknowledge.
        _acknowledge(mem, x, s, position, 1)


@inlined
def _duplicate(mem, x, s, position):
    """All of it was here before. Its sender hears so (D-SACK), and a FIN that is repeated begins TIME_WAIT anew."""
    t = x + T.X_TCB
    st64(mem, t + T.T_DUPLICATES_IN, ld64(mem, t + T.T_DUPLICATES_IN) + 1)
    length = ld64(mem, s + T.S_LENGTH)
    if length > 1 and position >= 1:        # one byte: a keepalive probe of old
        reassembly_duplicate(mem, x, position, position + length)
    if ld64(mem, s + T.S_FLAGS) & T.FIN and ld64(mem, t + T.T_STATE) == T.TIME_WAIT:
        linger(mem, x)


@shared
def _take_reset(mem, x, position):
    """RST in the window (RFC 5961 section 3.2): believed if it is exactly where the peer must be."""
    t = x + T.X_TCB
    if position != ld64(mem, t + T.T_RCV_NXT):
        challenge(mem, x)
        return
    state = ld64(mem, t + T.T_STATE)
    if state == T.SYN_RECEIVED:
        end(mem, x, _ECONNREFUSED)
    elif state >= T.CLOSING:
        end(mem, x, 0)          # the application's part was over
    else:
        end(mem, x, _ECONNRESET)


# -- fifth check: ACK --------------------------------------------------------------------------------------


@shared
def _acknowledge(mem, x, s, position, size):
    """The ACK field. 1: go on with the segment's text."""
    t = x + T.X_TCB
    una = ld64(mem, t + T.T_SND_UNA)
    ack = unwrap(una, ld64(mem, t + T.T_ISS), ld64(mem, s + T.S_ACK))
    if ld64(mem, t + T.T_STATE) == T.SYN_RECEIVED:
        if ack <= una or ack > ld64(mem, t + T.T_SND_MAX):
            refuse(mem, x, s)
            return 0
        _complete_open(mem, x, s, position, ack)
    elif ack > ld64(mem, t + T.T_SND_MAX) or ack < una - ld64(mem, t + T.T_MAX_WND):
        challenge(mem, x)       # RFC 5961 section 5.2
        return 0
    elif ack >= una:
        _take_ack(mem, x, s, position, ack, size)
    if ld64(mem, t + T.T_FLAGS) & T.TF_FIN_SENT and ld64(mem, t + T.T_SND_UNA) > ld64(mem, t + T.T_FIN_AT):
        settle(mem, x)
    return ld64(mem, t + T.T_STATE) != T.CLOSED


@shared
def _complete_open(mem, x, s, position, ack):
    """The ACK of our SYN, after a simultaneous open."""
    ack_process(mem, x, ack, 0, 0)
    established(mem, x)
    _set_window(mem, x, s, position, ack)


@inlined
def _set_window(mem, x, s, position, ack):
    t = x + T.X_TCB
    window = ld64(mem, s + T.S_WINDOW)
    if not ld64(mem, s + T.S_FLAGS) & T.SYN:
        window <<= ld64(mem, t + T.T_SND_SHIFT)
    st64(mem, t + T.T_SND_WND, window)
    st64(mem, t + T.T_SND_WL1, position)
    st64(mem, t + T.T_SND_WL2, ack)
    if window > ld64(mem, t + T.T_MAX_WND):
        st64(mem, t + T.T_MAX_WND, window)
    return window


@inlined
def _take_ack(mem, x, s, position, ack, size):
    """An ACK in [SND_UNA, SND_MAX]: window, SACK, and what it acknowledges."""
    t = x + T.X_TCB
    una = ld64(mem, t + T.T_SND_UNA)
    before = ld64(mem, t + T.T_SND_WND)
    window = before
    wl1 = ld64(mem, t + T.T_SND_WL1)
    # Besides section 3.10.7.4's condition: one that acknowledges something new is newer than any before, even in a
    # segment that is sent again. And with SND_UNA going on, a window that stays would move its right edge.
    if ack > una or wl1 < position or (wl1 == position and ld64(mem, t + T.T_SND_WL2) <= ack):
        window = _set_window(mem, x, s, position, ack)
    sacked = sack_update(mem, x)
    # RFC 5681 section 2. SND_NXT: the byte of a window probe does not count as outstanding, or the answers to
    # probes would look like a loss.
    outstanding = ld64(mem, t + T.T_SND_NXT) > una
    duplicate = 1 if outstanding and ack == una and size == 0 and window == before else 0
    if ack > ld64(mem, t + T.T_SND_NXT):
        st64(mem, t + T.T_SND_NXT, ack)
    if ack > una or outstanding:
        ack_process(mem, x, ack, sacked, duplicate)
    if ack > una:
        _progress(mem, x, ack)
    if window > before:
        st64(mem, t + T.T_PERSIST_AT, 0)    # output starts it anew if it is still too small


@inlined
def _progress(mem, x, ack):
    """Something new was acknowledged."""
    t = x + T.X_TCB
    now = ld64(mem, x + T.X_NOW)
    st64(mem, t + T.T_STALL_AT, now if ack < ld64(mem, t + T.T_SND_NXT) else 0)
    st64(mem, t + T.T_PERSIST_SHIFT, 0)
    st64(mem, t + T.T_TIMEOUTS, 0)
    st64(mem, t + T.T_SOFT_ERROR, 0)
    size = ld64(mem, x + T.X_SND_MASK) + 1
    if 3 * (size - (ld64(mem, x + T.X_WRITTEN) - ack)) >= size:
        event(mem, x, T.EV_WRITABLE)


# -- seventh and eighth check: text, FIN ----------------------------------------------------------------------


@shared
def _text(mem, x, s, position, fin):
    """Data, and the FIN behind them."""
    t = x + T.X_TCB
    length = ld64(mem, s + T.S_LENGTH)
    if length == 0 and fin == 0:
        return
    state = ld64(mem, t + T.T_STATE)
    if state != T.ESTABLISHED and state != T.FIN_WAIT_1 and state != T.FIN_WAIT_2:
        flag(mem, x, T.TF_ACK_NOW)      # behind the peer's FIN there is nothing
        return
    stop = position + length
    if length > 0:
        if ld64(mem, t + T.T_FLAGS) & T.TF_ORPHAN and stop > ld64(mem, t + T.T_RCV_NXT):
            # RFC 9293 section 3.6.1, RFC 2525 section 2.17: nobody will read it, and the peer should know.
            abort(mem, x, _ECONNRESET)
            return
        _take_data(mem, x, s, position, length)
    if fin != 0:
        _note_fin(mem, x, stop)
    if ld64(mem, t + T.T_PEER_FIN_AT) != 0 and ld64(mem, t + T.T_PEER_FIN_AT) == ld64(mem, t + T.T_RCV_NXT):
        _take_fin(mem, x)


@inlined
def _take_data(mem, x, s, position, length):
    """Data into the receive ring, and when they are to be acknowledged (RFC 9293 section 3.8.6.3, RFC 5681
    section 4.2): what is out of order, or fills a hole, at once; else every second full segment."""
    t = x + T.X_TCB
    nxt = ld64(mem, t + T.T_RCV_NXT)
    holes = ld64(mem, t + T.T_RA_COUNT)
    start = max(position, nxt)
    stop = min(position + length, ld64(mem, t + T.T_RCV_RIGHT))
    fin = ld64(mem, t + T.T_PEER_FIN_AT)
    if fin != 0:
        stop = min(stop, fin)
    if position < nxt:
        st64(mem, t + T.T_DUPLICATES_IN, ld64(mem, t + T.T_DUPLICATES_IN) + 1)
        if position >= 1:
            reassembly_duplicate(mem, x, position, min(nxt, position + length))
    if start >= stop:
        flag(mem, x, T.TF_ACK_NOW)
        return
    taken = reassembly_insert(mem, x, ld64(mem, s + T.S_DATA) + start - position, start, stop)
    if length > ld64(mem, t + T.T_RCV_MSS):
        st64(mem, t + T.T_RCV_MSS, min(length, receive_mss(mem, t)))
    if taken != 1:
        flag(mem, x, T.TF_ACK_NOW)
        return
    event(mem, x, T.EV_READABLE)
    st64(mem, t + T.T_UNACKED_SEGMENTS, ld64(mem, t + T.T_UNACKED_SEGMENTS) + 1)
    due = ld64(mem, t + T.T_RCV_NXT) - ld64(mem, t + T.T_LAST_ACK_SENT) >= 2 * ld64(mem, t + T.T_RCV_MSS)
    if due or holes != 0 or position < nxt or ld64(mem, x + T.X_OPTIONS) & T.OPT_QUICKACK:
        flag(mem, x, T.TF_ACK_NOW)
    elif ld64(mem, t + T.T_DELACK_AT) == 0:
        st64(mem, t + T.T_DELACK_AT, ld64(mem, x + T.X_NOW) + DELAYED_ACK_NS)


@inlined
def _note_fin(mem, x, at):
    """Where the peer's stream ends. A second FIN elsewhere, or one before what has come already, contradicts
    what we know and is not believed."""
    t = x + T.X_TCB
    count = ld64(mem, t + T.T_RA_COUNT)
    known = ld64(mem, t + T.T_RCV_NXT)
    if count > 0:
        known = max(known, ld64(mem, t + T.T_RA + 16 * (count - 1) + 8))
    if ld64(mem, t + T.T_PEER_FIN_AT) == 0 and known <= at < ld64(mem, t + T.T_RCV_RIGHT):
        st64(mem, t + T.T_PEER_FIN_AT, at)
    flag(mem, x, T.TF_ACK_NOW)


@shared
def _take_fin(mem, x):
    """The peer's FIN, with everything before it here (RFC 9293 section 3.10.7.4, eighth check)."""
    t = x + T.X_TCB
    st64(mem, t + T.T_RCV_NXT, ld64(mem, t + T.T_RCV_NXT) + 1)
    flag(mem, x, T.TF_ACK_NOW)
    event(mem, x, T.EV_READABLE)
    state = ld64(mem, t + T.T_STATE)
    if state == T.ESTABLISHED:
        become(mem, x, T.CLOSE_WAIT)
    elif state == T.FIN_WAIT_1:
        become(mem, x, T.CLOSING)
    elif state == T.FIN_WAIT_2:
        linger(mem, x)
