"""TCP segments that belong to no connection: handshakes, and what has no socket.

Called by demux and tcp_time_wait (`tcp_handshake`), and by the step (`syn_timers`, `syn_sleep`). A listener keeps
no state of its own for a SYN: that is in this worker's SYN cache (tcp/syncache.py), or in nobody's, since the
number that our SYN-ACK carries is a cookie (tcp/cookie.py) that brings the facts back. What a SYN costs is a look
at one line of the cache, one hash and one frame; the memory that a flood can take is that of the cache. There is no
limit of SYN-ACKs a second: whatever passes one by lot drops an honest peer's as often as the flood's, and refusing
one costs nearly as much as answering it.

The ACK that ends the handshake makes the connection (tcp_accept.py).
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.inet.deliver import MATCHED, STAGE, merge, publish_lanes
from dataplane.inet.tcp_accept import (
    ELSEWHERE,
    FACTS,
    INTAKE,
    PACKET,
    PORTS,
    RECORD,
    SEGMENT,
    has_room,
    open_connection,
    ring_bytes,
)
from dataplane.inet.tcp_input import tcp_stage
from dataplane.inet.tcp_transmit import tcp_answer, tcp_refuse
from dataplane.jit import inlined, shared
from dataplane.pcb.slots import slots_take
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import fill, ld32, ld64, put_be32, shr, st32, st64
from dataplane.tcp.cookie import cookie_check, cookie_make, stamp, stamp_facts
from dataplane.tcp.handshake import (
    E_FLAGS,
    E_IRS,
    E_ISS,
    E_LISTENER,
    E_MSS,
    E_NIF,
    E_PORTS,
    E_SHIFT,
    E_SOURCE_HI,
    E_SOURCE_LO,
    E_TARGET_HI,
    E_TARGET_LO,
    E_TSVAL,
    EF_SACK,
    EF_SCALE,
    EF_TIMESTAMPS,
)
from dataplane.tcp.opening import default_mss
from dataplane.tcp.segment import segment_parse
from dataplane.tcp.sequence import precedes
from dataplane.tcp.syncache import SC_KEYS, syn_add, syn_crowded, syn_due, syn_find, syn_key, syn_remove, syn_wait
from dataplane.tcp.window import WINDOW_FIELD, receive_shift

__all__ = ["handshake_ends", "segment_load", "syn_sleep", "syn_timers", "tcp_handshake"]

_WRAP = 0xFFFF_FFFF
_MSS_MIN = 88                   # a peer that says less is not believed
_TIMERS = 32                    # SYN-ACKs sent again in one step


@inlined
def _pcb(mem, w, number):
    return ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS) + number * L.PCB_BYTES


# -- SYN: the second segment -------------------------------------------------------------------------


@shared
def _syn_ack(mem, w, nif, p, f):
    """Answers packet `p`, a SYN or one made up from its facts at `f`, with our SYN."""
    o = ld64(mem, w + L.W_SYN_CACHE) + RECORD
    ring = ring_bytes(mem, w, ld64(mem, f + E_LISTENER) & _WRAP)
    flags = ld64(mem, f + E_FLAGS)
    options = T.SO_MSS
    if flags & EF_SCALE:
        options |= T.SO_SHIFT
        st64(mem, o + T.O_SHIFT, receive_shift(ring))
    if flags & EF_SACK:
        options |= T.SO_SACK_OK
    if flags & EF_TIMESTAMPS:
        options |= T.SO_TIMESTAMPS
        st64(mem, o + T.O_TSVAL, stamp(mem, f, ld64(mem, w + L.W_MONOTONIC)))
        st64(mem, o + T.O_TSECR, ld32(mem, f + E_TSVAL))
    ip_bytes = 20 if ld64(mem, p + L.P_FAMILY) == 4 else 40
    st64(mem, o + T.O_MSS, ld64(mem, nif + L.N_MTU) - ip_bytes - 20)
    st64(mem, o + T.O_SEQ, ld32(mem, f + E_ISS))
    st64(mem, o + T.O_ACK, (ld32(mem, f + E_IRS) + 1) & _WRAP)
    st64(mem, o + T.O_FLAGS, T.SYN | T.ACK)
    # No more than the connection will take to begin with (tcp/window.py, window_first; its lane is as large
    # as its ring).
    st64(mem, o + T.O_WINDOW, min(ring * 3 // 4, WINDOW_FIELD))
    st64(mem, o + T.O_OPTIONS, options)
    return tcp_answer(mem, w, nif, p, o)


@inlined
def _take_syn(mem, f, s, ip_bytes):
    """The facts that a SYN tells."""
    options = ld64(mem, s + T.S_OPTIONS)
    flags = 0
    if options & T.SO_SHIFT:
        flags |= EF_SCALE
    if options & T.SO_SACK_OK:
        flags |= EF_SACK
    if options & T.SO_TIMESTAMPS:
        flags |= EF_TIMESTAMPS
    mss = ld64(mem, s + T.S_MSS) if options & T.SO_MSS else default_mss(ip_bytes)
    st32(mem, f + E_IRS, ld64(mem, s + T.S_SEQ))
    st32(mem, f + E_TSVAL, ld64(mem, s + T.S_TSVAL))
    st32(mem, f + E_MSS, max(mss, _MSS_MIN))
    st64(mem, f + E_FLAGS, flags)
    st64(mem, f + E_SHIFT, min(ld64(mem, s + T.S_SHIFT), 14))


@shared
def _syn(mem, w, nif, p, listener, e):
    """RFC 9293 section 3.10.7.2, third. `e`: the cache's entry for these two ends, or 0. What data a SYN carries is
    not acknowledged: it will be sent again. A repeated SYN gets the same answer; one with another number means
    that the peer has begun anew (the entry is no reason to refuse it, and a cookie still serves the former one)."""
    c = ld64(mem, w + L.W_SYN_CACHE)
    s, f = c + SEGMENT, c + FACTS
    if not has_room(mem, w, listener):
        return -ledger.TCP_BACKLOG
    named = listener | ld64(mem, _pcb(mem, w, listener) + L.PCB_GENERATION) << 32
    if e != 0 and ld32(mem, e + E_IRS) == ld64(mem, s + T.S_SEQ):
        st32(mem, e + E_TSVAL, ld64(mem, s + T.S_TSVAL))
        st64(mem, e + E_LISTENER, named)
        _syn_ack(mem, w, nif, p, e)
        return -ledger.TCP_HANDSHAKE
    if e != 0:
        syn_remove(mem, c, e)
    _take_syn(mem, f, s, 20 if ld64(mem, p + L.P_FAMILY) == 4 else 40)
    st64(mem, f + E_LISTENER, named)
    st64(mem, f + E_NIF, nif)
    now = ld64(mem, w + L.W_MONOTONIC)
    cookie_make(mem, c + SC_KEYS, f, now)
    syn_add(mem, c, f, now)
    _syn_ack(mem, w, nif, p, f)
    return -ledger.TCP_HANDSHAKE


# -- ACK: the third ------------------------------------------------------------------------------------


@shared
def handshake_ends(mem, w, e):
    """Whether the segment acknowledges our SYN, by the cache's entry `e` or by a cookie: the place of the facts, or 0.

    A peer whose third segment was lost takes the connection for open. What it sends next may be anything in the
    first window, or a probe with the number before it, which is that of its SYN (RFC 1122 section 4.2.3.6). A cookie
    knows that number only from the segment: it is tried as one and as the other."""
    c = ld64(mem, w + L.W_SYN_CACHE)
    s, f = c + SEGMENT, c + FACTS
    number = (ld64(mem, s + T.S_ACK) - 1) & _WRAP
    if e != 0 and ld32(mem, e + E_ISS) == number:
        return e
    now = ld64(mem, w + L.W_MONOTONIC)
    st32(mem, f + E_IRS, ld64(mem, s + T.S_SEQ) - 1)
    if cookie_check(mem, c + SC_KEYS, f, number, now) == 0:
        st32(mem, f + E_IRS, ld64(mem, s + T.S_SEQ))
        if cookie_check(mem, c + SC_KEYS, f, number, now) == 0:
            return 0
    st64(mem, f + E_FLAGS, 0)
    st64(mem, f + E_SHIFT, 0)
    if ld64(mem, s + T.S_OPTIONS) & T.SO_TIMESTAMPS:
        stamp_facts(mem, f, ld64(mem, s + T.S_TSECR))
    return f


@shared
def _ack(mem, w, nif, p, listener, e):
    """An ACK for a listener: the end of a handshake, or refused (RFC 9293 section 3.10.7.2, second). Without room
    for the connection it is dropped: the peer, or our SYN-ACK again, will bring another one.

    What is neither a cookie nor has an entry is dropped, not refused, while there may be cookies that have none: it
    may be data of an honest peer behind a segment that was lost. That one comes again, and is the one that a cookie
    can be checked with. A flood that fills our queue makes this an everyday case.

    The segment is delivered with the record for accept(). If it has more to say than its ACK, or is a probe,
    which is to be answered, the connection gets it besides."""
    c = ld64(mem, w + L.W_SYN_CACHE)
    s = c + SEGMENT
    f = handshake_ends(mem, w, e)
    if f == 0:
        if not syn_crowded(mem, c, ld64(mem, w + L.W_MONOTONIC)):
            tcp_refuse(mem, w, nif, p)
        return -ledger.NO_SOCKET
    probes = ld64(mem, s + T.S_SEQ) == ld32(mem, f + E_IRS)
    if f == e and (_is_old(mem, s, e) or not (probes or _is_in_window(mem, s, e))):
        _acknowledge(mem, w, nif, p, e)
        return -ledger.TCP_HANDSHAKE
    number = open_connection(mem, w, nif, p, f, listener)
    if number < 0:
        if f == e and probes:
            _acknowledge(mem, w, nif, p, e)
        return number
    if f == e:
        syn_remove(mem, c, e)
    result = 0 if number & ELSEWHERE else MATCHED | 1
    if probes or ld64(mem, s + T.S_LENGTH) != 0 or ld64(mem, s + T.S_FLAGS) & T.FIN:
        result = merge(result, tcp_stage(mem, w, p, number & ~ELSEWHERE, STAGE))
    return result if result != 0 else -ledger.TCP_HANDSHAKE


@inlined
def _is_in_window(mem, s, e):
    return (ld64(mem, s + T.S_SEQ) - ld32(mem, e + E_IRS) - 1) & _WRAP < WINDOW_FIELD


@inlined
def _is_old(mem, s, e):
    """PAWS (RFC 7323 section 5.2) against the SYN's timestamp."""
    if not ld64(mem, e + E_FLAGS) & EF_TIMESTAMPS or not ld64(mem, s + T.S_OPTIONS) & T.SO_TIMESTAMPS:
        return False
    return precedes(ld64(mem, s + T.S_TSVAL), ld32(mem, e + E_TSVAL))


# -- the rest ----------------------------------------------------------------------------------------------


@shared
def _acknowledge(mem, w, nif, p, e):
    """Says in SYN_RECEIVED where we stand: for a segment that cannot be (RFC 9293 section 3.10.7.4, first), and as
    a challenge (RFC 5961 section 3.2)."""
    o = ld64(mem, w + L.W_SYN_CACHE) + RECORD
    st64(mem, o + T.O_SEQ, (ld32(mem, e + E_ISS) + 1) & _WRAP)
    st64(mem, o + T.O_ACK, (ld32(mem, e + E_IRS) + 1) & _WRAP)
    st64(mem, o + T.O_FLAGS, T.ACK)
    ring = ring_bytes(mem, w, ld64(mem, e + E_LISTENER) & _WRAP)
    shift = receive_shift(ring) if ld64(mem, e + E_FLAGS) & EF_SCALE else 0
    st64(mem, o + T.O_WINDOW, min(ring * 3 // 4, WINDOW_FIELD) >> shift)
    st64(mem, o + T.O_OPTIONS, 0)
    if ld64(mem, e + E_FLAGS) & EF_TIMESTAMPS:
        st64(mem, o + T.O_OPTIONS, T.SO_TIMESTAMPS)
        st64(mem, o + T.O_TSVAL, stamp(mem, e, ld64(mem, w + L.W_MONOTONIC)))
        st64(mem, o + T.O_TSECR, ld32(mem, e + E_TSVAL))
    tcp_answer(mem, w, nif, p, o)


@shared
def _reset(mem, w, nif, p, e):
    """A RST ends the handshake if its number is exactly the next one, and is challenged if it is anywhere else in
    the window (RFC 5961 section 3.2); a listener itself is not moved by it."""
    if e == 0:
        return -ledger.NO_SOCKET
    c = ld64(mem, w + L.W_SYN_CACHE)
    ahead = (ld64(mem, c + SEGMENT + T.S_SEQ) - ld32(mem, e + E_IRS) - 1) & _WRAP
    if ahead == 0:
        syn_remove(mem, c, e)
    elif ahead < WINDOW_FIELD:
        _acknowledge(mem, w, nif, p, e)
    return -ledger.TCP_HANDSHAKE


@shared
def segment_load(mem, w, p):
    """Parses the segment and looks its two ends up in the SYN cache: the entry's place, or 0."""
    c = ld64(mem, w + L.W_SYN_CACHE)
    at = ld64(mem, p + L.P_L4)
    segment_parse(mem, at, ld64(mem, p + L.P_L3) + ld64(mem, p + L.P_L3_LENGTH) - at, c + SEGMENT)
    syn_key(mem, c + FACTS, p)
    return syn_find(mem, c, c + FACTS)


@shared
def tcp_handshake(mem, w, nif, p, listener):
    """A segment for a listener (RFC 9293 section 3.10.7.2). A result (deliver.py) if it went into the lane of the
    connection that it completed, else -reason."""
    e = segment_load(mem, w, p)
    flags = ld64(mem, ld64(mem, w + L.W_SYN_CACHE) + SEGMENT + T.S_FLAGS)
    if flags & T.RST:
        return _reset(mem, w, nif, p, e)
    if flags & T.SYN:
        if flags & T.ACK:
            tcp_refuse(mem, w, nif, p)
            return -ledger.NO_SOCKET
        # SYN with FIN begins and ends nothing: no stack sends it, scanners do.
        return -ledger.NO_SOCKET if flags & T.FIN else _syn(mem, w, nif, p, listener, e)
    return _ack(mem, w, nif, p, listener, e) if flags & T.ACK else -ledger.NO_SOCKET


# -- time ----------------------------------------------------------------------------------------------------


@shared
def _again(mem, w, e):
    """Sends the SYN-ACK of an entry again, if its listener is still there."""
    c = ld64(mem, w + L.W_SYN_CACHE)
    p = c + PACKET
    word = ld64(mem, e + E_LISTENER)
    pcb = _pcb(mem, w, word & _WRAP)
    if ld64(mem, pcb + L.PCB_STATE) != L.PCB_OPEN or ld64(mem, pcb + L.PCB_GENERATION) != shr(word, 32):
        syn_remove(mem, c, e)
        return
    ports = ld64(mem, e + E_PORTS)
    fill(mem, p, 0, L.P_BYTES)
    st64(mem, p + L.P_LINK, L.LINK_RAW)
    st64(mem, p + L.P_VLAN, -1)
    st64(mem, p + L.P_L4, c + PORTS)
    put_be32(mem, c + PORTS, ports & _WRAP)
    st64(mem, p + L.P_FAMILY, ports >> 32)
    st64(mem, p + L.P_SOURCE_HI, ld64(mem, e + E_SOURCE_HI))
    st64(mem, p + L.P_SOURCE_LO, ld64(mem, e + E_SOURCE_LO))
    st64(mem, p + L.P_TARGET_HI, ld64(mem, e + E_TARGET_HI))
    st64(mem, p + L.P_TARGET_LO, ld64(mem, e + E_TARGET_LO))
    _syn_ack(mem, w, ld64(mem, e + E_NIF), p, e)


@shared
def syn_timers(mem, w):
    """What the step does for handshakes besides packets: SYN-ACKs that are due again, slots that have come."""
    c = ld64(mem, w + L.W_SYN_CACHE)
    for _ in range(_TIMERS):
        e = syn_due(mem, c, ld64(mem, w + L.W_MONOTONIC))
        if e == 0:
            break
        _again(mem, w, e)
    slots_take(mem, w, INTAKE)
    if ld64(mem, w + L.W_DIRTY_COUNT) != 0:
        # What listen_recover staged: bursts have published theirs.
        publish_lanes(mem, w, ld64(mem, w + L.W_NIF) + L.N_LEDGER)


@inlined
def syn_sleep(mem, w):
    """Nanoseconds that the worker may sleep on account of handshakes; -1: any time."""
    return syn_wait(mem, ld64(mem, w + L.W_SYN_CACHE), ld64(mem, w + L.W_MONOTONIC))
