"""TIME_WAIT: what is answered to segments of a connection that is over (RFC 9293 section 3.10.7.4).

Called by demux for a segment whose PCB is one of the continuation worker's TIME_WAIT entries: addresses, the two
numbers, the timestamps, and nothing else. That worker makes and ends them; we write how long one lasts
(PCB_TW_UNTIL), and when it was last answered.

A new connection between the same two ends does not wait for the end of the old one: a SYN that cannot be an old
duplicate (`_begins_anew`) goes to the listener, as if there were no entry. Until the handshake is over both exist: the
entry is found first, sees that an ACK is the handshake's, and passes it on; the new connection then takes the
entry's place in its bucket (tcp_accept.py). So a SYN under a false address ends no TIME_WAIT.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.inet.tcp_accept import RECORD, SEGMENT
from dataplane.inet.tcp_input import tcp_listener
from dataplane.inet.tcp_listen import handshake_ends, segment_load, tcp_handshake
from dataplane.inet.tcp_transmit import tcp_answer
from dataplane.jit import inlined, shared
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, shr, st64
from dataplane.tcp.sequence import precedes

__all__ = ["ANSWER_MS", "tcp_time_wait"]

ANSWER_MS = 50
"""Two answers are no closer, or two ends that disagree could answer each other for ever."""

_WRAP = 0xFFFF_FFFF
_MS = 1_000_000


@inlined
def _received(mem, pcb):
    """RCV_NXT, on the wire."""
    return ld64(mem, pcb + L.PCB_TW_NUMBERS) & _WRAP


@inlined
def _has(mem, pcb, flag):
    return ld64(mem, pcb + L.PCB_TW_FLAGS) & flag != 0


@inlined
def _begins_anew(mem, pcb, s):
    """Whether a SYN opens a new connection: a later timestamp, or, if both have none or they are the same, a later
    number (RFC 6191 section 2; RFC 9293 section 3.6.1, MAY-2). RFC 6191 also honours any SYN that has timestamps
    where the old connection had none; such a one could be an old duplicate, so its number decides."""
    if _has(mem, pcb, T.TF_TIMESTAMPS) and ld64(mem, s + T.S_OPTIONS) & T.SO_TIMESTAMPS:
        recent = ld64(mem, pcb + L.PCB_TW_STAMPS) & _WRAP
        if ld64(mem, s + T.S_TSVAL) != recent:
            return precedes(recent, ld64(mem, s + T.S_TSVAL))
    return not precedes(ld64(mem, s + T.S_SEQ), _received(mem, pcb))


@inlined
def _ends_handshake(mem, w, pcb, s, e):
    """Whether an ACK is that of a new handshake. Those of the old connection acknowledge our FIN or less."""
    if ld64(mem, s + T.S_ACK) == shr(ld64(mem, pcb + L.PCB_TW_NUMBERS), 32):
        return False
    return handshake_ends(mem, w, e) != 0


@shared
def _acknowledge(mem, w, nif, p, pcb):
    """Tells the peer what we have, unless it was told a moment ago."""
    now = ld64(mem, w + L.W_MONOTONIC) // _MS
    flags = ld64(mem, pcb + L.PCB_TW_FLAGS)
    if (now - shr(flags, 32)) & _WRAP < ANSWER_MS:
        return
    st64(mem, pcb + L.PCB_TW_FLAGS, (flags & _WRAP) | now << 32)
    o = ld64(mem, w + L.W_SYN_CACHE) + RECORD
    stamps = ld64(mem, pcb + L.PCB_TW_STAMPS)
    st64(mem, o + T.O_SEQ, shr(ld64(mem, pcb + L.PCB_TW_NUMBERS), 32))
    st64(mem, o + T.O_ACK, _received(mem, pcb))
    st64(mem, o + T.O_FLAGS, T.ACK)
    st64(mem, o + T.O_WINDOW, shr(flags, 16) & 0xFFFF)
    st64(mem, o + T.O_OPTIONS, T.SO_TIMESTAMPS if flags & T.TF_TIMESTAMPS else 0)
    st64(mem, o + T.O_TSVAL, (now + shr(stamps, 32)) & _WRAP)
    st64(mem, o + T.O_TSECR, stamps & _WRAP)
    tcp_answer(mem, w, nif, p, o)


@inlined
def _is_quiet(mem, pcb, s):
    """Whether it is a mere acknowledgement, just where it should be."""
    return ld64(mem, s + T.S_LENGTH) == 0 and ld64(mem, s + T.S_SEQ) == _received(mem, pcb)


@shared
def _segment(mem, w, nif, p, pcb):
    """No handshake's: an ACK for what is not the very end of the connection. The peer's FIN once more means that
    it does not know yet that all is over: 2 MSL begin again."""
    s = ld64(mem, w + L.W_SYN_CACHE) + SEGMENT
    flags = ld64(mem, s + T.S_FLAGS)
    if flags & T.FIN:
        fin = (ld64(mem, s + T.S_SEQ) + ld64(mem, s + T.S_LENGTH) + 1) & _WRAP
        if fin == _received(mem, pcb) and not flags & T.SYN:
            until = ld64(mem, w + L.W_MONOTONIC) + ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_TIME_WAIT_NS)
            st64(mem, pcb + L.PCB_TW_UNTIL, until)
    elif flags & (T.SYN | T.ACK) == T.ACK and _is_quiet(mem, pcb, s):
        return
    elif not flags & (T.SYN | T.ACK):
        return
    _acknowledge(mem, w, nif, p, pcb)


@shared
def tcp_time_wait(mem, w, nif, p, number):
    """A segment for entry `number`: as tcp_handshake. A RST is ignored: one of the old connection's could
    otherwise end TIME_WAIT early (RFC 1337, fix F1)."""
    pcb = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS) + number * L.PCB_BYTES
    e = segment_load(mem, w, p)
    s = ld64(mem, w + L.W_SYN_CACHE) + SEGMENT
    flags = ld64(mem, s + T.S_FLAGS) & (T.SYN | T.ACK | T.RST | T.FIN)
    if flags & T.RST:
        # The handshake's, if one is under way: a RST of the old connection has another number.
        listener = tcp_listener(mem, w, p) if e != 0 else -1
        if listener >= 0:
            return tcp_handshake(mem, w, nif, p, listener)
        return -ledger.TCP_TIME_WAIT
    anew = False
    if flags == T.SYN:
        anew = _begins_anew(mem, pcb, s)
    elif flags & (T.SYN | T.ACK) == T.ACK:
        anew = _ends_handshake(mem, w, pcb, s, e)
    if anew:
        listener = tcp_listener(mem, w, p)
        if listener >= 0:
            return tcp_handshake(mem, w, nif, p, listener)
    _segment(mem, w, nif, p, pcb)
    return -ledger.TCP_TIME_WAIT
