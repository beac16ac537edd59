"""What is to be sent now, as O_ records in X_OUT (RFC 9293 section 3.8).

Called by connection.tcp_finish when all that arrived, all that the application asked for and all timers that are due
have been taken in. In this order: a RST; our SYN; an ACK with SACK blocks; retransmissions; new data and FIN; probes;
and if none of these took the ACK along that is due, a segment for it alone. When X_OUT is full EV_MORE says
that there may be more, and the next call goes on where this one stopped.

One record carries up to OUT_BYTES_MAX bytes that the sender cuts into segments of O_SEGMENT: FIN and PSH belong to
the last of them. SACK blocks go with segments without data only: an ACK with data is no duplicate ACK to
anybody (RFC 5681 section 2), and full segments stay full.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.reassembly import reassembly_sacks
from dataplane.tcp.recovery import recovery_next, send_allowance, sent
from dataplane.tcp.sequence import wire
from dataplane.tcp.transition import NO_ACK, event, flag, unflag
from dataplane.tcp.window import receive_mss, window_first, window_offer, window_update_due

__all__ = ["output", "send_again", "waiting"]

_MILLISECOND = 1_000_000


@inlined
def _full(mem, x):
    """Whether X_OUT has no room for one segment more."""
    most = min(max(ld64(mem, x + T.X_OUT_MAX), 1), T.OUT_MAX)
    return ld64(mem, x + T.X_OUT_COUNT) >= most


@inlined
def _record(mem, x, sequence, flags):
    """The next O_ record, with what every segment has."""
    t = x + T.X_TCB
    count = ld64(mem, x + T.X_OUT_COUNT)
    st64(mem, x + T.X_OUT_COUNT, count + 1)
    st64(mem, t + T.T_SEGMENTS_OUT, ld64(mem, t + T.T_SEGMENTS_OUT) + 1)
    o = x + T.X_OUT + count * T.O_BYTES
    st64(mem, o + T.O_SEQ, sequence)
    st64(mem, o + T.O_FLAGS, flags)
    st64(mem, o + T.O_LENGTH, 0)
    st64(mem, o + T.O_SEGMENT, ld64(mem, t + T.T_MSS))
    st64(mem, o + T.O_OPTIONS, 0)
    st64(mem, o + T.O_SACK_COUNT, 0)
    return o


@inlined
def _stamp(mem, x, o, options):
    """Timestamps (RFC 7323 section 3.2): the clock in ms, plus what hides the machine's uptime."""
    t = x + T.X_TCB
    clock = ld64(mem, x + T.X_NOW) // _MILLISECOND + ld64(mem, t + T.T_TS_OFFSET)
    st64(mem, o + T.O_TSVAL, clock & 0xFFFFFFFF)
    st64(mem, o + T.O_TSECR, ld64(mem, t + T.T_TS_RECENT))
    st64(mem, o + T.O_OPTIONS, options | T.SO_TIMESTAMPS)


@inlined
def _acknowledged(mem, x, o):
    """The ACK field and the window go with every segment; so no other ACK is due."""
    t = x + T.X_TCB
    nxt = ld64(mem, t + T.T_RCV_NXT)
    st64(mem, o + T.O_ACK, wire(ld64(mem, t + T.T_IRS), nxt))
    st64(mem, o + T.O_WINDOW, window_offer(mem, x))
    st64(mem, t + T.T_LAST_ACK_SENT, nxt)
    st64(mem, t + T.T_DELACK_AT, 0)
    st64(mem, t + T.T_UNACKED_SEGMENTS, 0)
    unflag(mem, x, T.TF_ACK_NOW)


@shared
def _segment(mem, x, position, length, flags):
    """A segment of an open connection, with `length` bytes of the send ring from `position` on."""
    t = x + T.X_TCB
    o = _record(mem, x, wire(ld64(mem, t + T.T_ISS), position), flags | T.ACK)
    st64(mem, o + T.O_FROM, position & ld64(mem, x + T.X_SND_MASK))
    st64(mem, o + T.O_LENGTH, length)
    if ld64(mem, t + T.T_FLAGS) & T.TF_TIMESTAMPS:
        _stamp(mem, x, o, 0)
    _acknowledged(mem, x, o)
    return o


# -- without data ------------------------------------------------------------------------------------------


@inlined
def _send_reset(mem, x):
    """A RST: one for each run, however many segments it answers."""
    t = x + T.X_TCB
    unflag(mem, x, T.TF_REFUSE)
    acknowledgment = ld64(mem, t + T.T_RST_ACK)
    flags = T.RST if acknowledgment == NO_ACK else T.RST | T.ACK
    o = _record(mem, x, ld64(mem, t + T.T_RST_SEQ) & 0xFFFFFFFF, flags)
    st64(mem, o + T.O_ACK, acknowledgment & 0xFFFFFFFF if flags & T.ACK else 0)
    st64(mem, o + T.O_WINDOW, 0)
    flag(mem, x, T.TF_RST_SENT)


@shared
def _send_syn(mem, x):
    """Our SYN, first or again; with an ACK if the peer's has come (simultaneous open)."""
    t = x + T.X_TCB
    answer = ld64(mem, t + T.T_STATE) == T.SYN_RECEIVED
    flags = ld64(mem, t + T.T_FLAGS)
    o = _record(mem, x, ld64(mem, t + T.T_ISS), T.SYN | T.ACK if answer else T.SYN)
    st64(mem, o + T.O_MSS, receive_mss(mem, t))
    st64(mem, o + T.O_SHIFT, ld64(mem, t + T.T_RCV_SHIFT))
    options = T.SO_MSS
    if not answer or flags & T.TF_SACK:
        options |= T.SO_SACK_OK
    if not answer or flags & T.TF_SCALE:
        options |= T.SO_SHIFT
    st64(mem, o + T.O_OPTIONS, options)
    if not answer or flags & T.TF_TIMESTAMPS:
        _stamp(mem, x, o, options)
    st64(mem, o + T.O_ACK, wire(ld64(mem, t + T.T_IRS), 1) if answer else 0)
    st64(mem, o + T.O_WINDOW, window_first(mem, x))
    if answer:
        st64(mem, t + T.T_LAST_ACK_SENT, 1)
        unflag(mem, x, T.TF_ACK_NOW)
    # Again is after a timeout; an answer that crosses the peer's SYN does not mean that ours was lost.
    sent(mem, x, 0, 1, 1 if ld64(mem, t + T.T_BACKOFF) > 0 else 0)
    st64(mem, t + T.T_SND_NXT, 1)


@inlined
def _send_ack(mem, x):
    """A segment for the ACK alone, with SACK blocks if that was agreed."""
    t = x + T.X_TCB
    o = _segment(mem, x, ld64(mem, t + T.T_SND_NXT), 0, 0)
    if ld64(mem, t + T.T_FLAGS) & T.TF_SACK:
        reassembly_sacks(mem, x, o)


@inlined
def _reports(mem, t):
    """Whether the ACK that is due has something to tell that only SACK blocks can."""
    if not ld64(mem, t + T.T_FLAGS) & T.TF_SACK:
        return False
    return ld64(mem, t + T.T_RA_COUNT) > 0 or ld64(mem, t + T.T_DSACK_TO) > ld64(mem, t + T.T_DSACK_FROM)


# -- data --------------------------------------------------------------------------------------------------


@inlined
def _end_of_data(mem, x):
    """Position behind the last byte that may be sent: FIN or end of what was written."""
    fin = ld64(mem, x + T.X_TCB + T.T_FIN_AT)
    return fin if fin != 0 else max(ld64(mem, x + T.X_WRITTEN), 1)


@inlined
def _chunk(mem, t):
    """Bytes of the largest record: whole segments."""
    mss = ld64(mem, t + T.T_MSS)
    return T.OUT_BYTES_MAX // mss * mss


@shared
def send_again(mem, x, position, length):
    """Sends positions [position, position + length) another time, as many as one record takes. Our FIN is one
    of them if it lies there, and the SYN cannot be. Returns how many."""
    t = x + T.X_TCB
    if length <= 0 or position < 1:
        return 0
    end = _end_of_data(mem, x)
    data = min(max(end - position, 0), min(length, _chunk(mem, t)))
    flags = T.PSH if data > 0 and position + data >= end else 0
    stop = position + data
    if stop < position + length and stop == ld64(mem, t + T.T_FIN_AT):
        flags |= T.FIN
        stop += 1
    if stop == position:
        return 0
    again = 1 if position < ld64(mem, t + T.T_SND_MAX) else 0
    _segment(mem, x, position, data, flags)
    if flags & T.FIN:
        flag(mem, x, T.TF_FIN_SENT)
    sent(mem, x, position, stop, again)
    return stop - position


@inlined
def _may_send_tail(mem, x, left):
    """Whether `left` bytes, less than a full segment and all there is, may go out now.

    Nagle (RFC 9293 section 3.7.4) in Minshall's form: not while another segment that was not full is
    unacknowledged. A FIN behind the data, or TCP_NODELAY, overrides it; TCP_CORK holds the tail back always.
    """
    t = x + T.X_TCB
    options = ld64(mem, x + T.X_OPTIONS)
    if ld64(mem, t + T.T_FIN_AT) != 0:
        return True
    if options & T.OPT_CORK:
        return False
    return options & T.OPT_NODELAY != 0 or ld64(mem, t + T.T_SMALL_AT) <= ld64(mem, t + T.T_SND_UNA)


@shared
def _amount(mem, x, left, room):
    """How many of the `left` bytes that wait go into the next record; `room`: what the peer's window takes.

    Sender's silly-window avoidance (RFC 9293 section 3.8.6.2.1): full segments; or all that is left; or, if the window
    is the limit, half of the largest window that the peer ever offered. A segment is never made smaller because of
    the congestion window.
    """
    t = x + T.X_TCB
    mss = ld64(mem, t + T.T_MSS)
    allowed = send_allowance(mem, x)
    most = min(min(left, room), min(allowed, _chunk(mem, t)))
    if most >= mss:
        if most == left and _may_send_tail(mem, x, left):
            return left
        return most // mss * mss
    if most <= 0:
        return 0
    if most == left:
        return left if _may_send_tail(mem, x, left) else 0
    if most == room and 2 * room >= ld64(mem, t + T.T_MAX_WND) and room < left:
        return room
    return 0


@shared
def _send_new(mem, x):
    """New data as far as peer, path and silly-window avoidance let them go, and the FIN behind the last."""
    t = x + T.X_TCB
    end = _end_of_data(mem, x)
    while not _full(mem, x):
        nxt = ld64(mem, t + T.T_SND_NXT)
        left = end - nxt
        room = ld64(mem, t + T.T_SND_UNA) + ld64(mem, t + T.T_SND_WND) - nxt
        amount = _amount(mem, x, left, room) if left > 0 else 0
        flags = T.PSH if amount > 0 and amount == left else 0
        stop = nxt + amount
        if stop == ld64(mem, t + T.T_FIN_AT) and room > amount:
            flags |= T.FIN      # its position is its own: behind it left is -1 and nothing comes any more
            stop += 1
        if stop == nxt:
            break
        _segment(mem, x, nxt, amount, flags)
        if flags & T.FIN:
            flag(mem, x, T.TF_FIN_SENT)
        elif amount % ld64(mem, t + T.T_MSS) != 0:
            st64(mem, t + T.T_SMALL_AT, stop)
        sent(mem, x, nxt, stop, 0)      # not "again", though a window probe may have had its first byte


# -- probes ------------------------------------------------------------------------------------------------


@shared
def _send_probe(mem, x):
    """Into a window that is closed, or too small for too long (RFC 9293 section 3.8.6.1): what it has room for, or
    one position beyond. That one counts as sent (SND_MAX), so that it may be acknowledged, but not as outstanding
    (SND_NXT): the persist timer cares for it, and however often it is refused, the connection lives on (MUST-37)."""
    t = x + T.X_TCB
    nxt = ld64(mem, t + T.T_SND_NXT)
    left = _end_of_data(mem, x) - nxt
    room = ld64(mem, t + T.T_SND_UNA) + ld64(mem, t + T.T_SND_WND) - nxt
    amount = min(min(left, room), ld64(mem, t + T.T_MSS))
    if amount > 0:
        _segment(mem, x, nxt, amount, T.PSH)
        st64(mem, t + T.T_SMALL_AT, nxt + amount)
        sent(mem, x, nxt, nxt + amount, 0)
    elif left > 0:
        _segment(mem, x, nxt, 1, 0)
        st64(mem, t + T.T_SND_MAX, max(ld64(mem, t + T.T_SND_MAX), nxt + 1))
    elif nxt == ld64(mem, t + T.T_FIN_AT):
        _segment(mem, x, nxt, 0, T.FIN)
        flag(mem, x, T.TF_FIN_SENT)
        st64(mem, t + T.T_SND_MAX, max(ld64(mem, t + T.T_SND_MAX), nxt + 1))


@inlined
def waiting(mem, x):
    """Whether something is to be sent that was not: data, or a FIN."""
    t = x + T.X_TCB
    nxt = ld64(mem, t + T.T_SND_NXT)
    return _end_of_data(mem, x) > nxt or nxt == ld64(mem, t + T.T_FIN_AT)


@inlined
def _send_keepalive(mem, x):
    """Without data, one position before what the peer expects (RFC 9293 section 3.8.4): it answers with an ACK."""
    _segment(mem, x, ld64(mem, x + T.X_TCB + T.T_SND_NXT) - 1, 0, 0)


@inlined
def _ack_due(mem, x):
    t = x + T.X_TCB
    if ld64(mem, t + T.T_FLAGS) & T.TF_ACK_NOW:
        return True
    state = ld64(mem, t + T.T_STATE)
    # Only while the peer can still send.
    return T.ESTABLISHED <= state <= T.FIN_WAIT_2 and window_update_due(mem, x)


# -- all of it ---------------------------------------------------------------------------------------------


@shared
def _send_open(mem, x):
    """For the states from ESTABLISHED on."""
    t = x + T.X_TCB
    state = ld64(mem, t + T.T_STATE)
    if ld64(mem, t + T.T_FLAGS) & T.TF_ACK_NOW and _reports(mem, t):
        _send_ack(mem, x)
    if state != T.FIN_WAIT_2 and state != T.TIME_WAIT:
        if ld64(mem, t + T.T_SND_NXT) > ld64(mem, t + T.T_SND_UNA):
            _send_lost(mem, x)
        if not _full(mem, x):
            if ld64(mem, t + T.T_FLAGS) & T.TF_PROBE:
                unflag(mem, x, T.TF_PROBE)
                _send_probe(mem, x)
            _send_new(mem, x)
    if ld64(mem, t + T.T_FLAGS) & T.TF_KEEP and not _full(mem, x):
        unflag(mem, x, T.TF_KEEP)
        _send_keepalive(mem, x)
    if not _full(mem, x) and _ack_due(mem, x):
        _send_ack(mem, x)


@inlined
def _send_lost(mem, x):
    """Retransmissions that are allowed now."""
    while not _full(mem, x):
        position, length = recovery_next(mem, x)
        if send_again(mem, x, position, length) == 0:
            break


@shared
def output(mem, x):
    """Fills X_OUT from X_OUT_COUNT on."""
    t = x + T.X_TCB
    if ld64(mem, t + T.T_FLAGS) & T.TF_REFUSE and not _full(mem, x):
        _send_reset(mem, x)
    state = ld64(mem, t + T.T_STATE)
    if state >= T.ESTABLISHED:
        if not _full(mem, x):
            _send_open(mem, x)
    elif state == T.SYN_SENT or state == T.SYN_RECEIVED:
        if not _full(mem, x):
            if ld64(mem, t + T.T_SND_NXT) == 0:
                _send_syn(mem, x)
            elif ld64(mem, t + T.T_FLAGS) & T.TF_ACK_NOW:
                _send_ack(mem, x)
    if _full(mem, x):
        event(mem, x, T.EV_MORE)
