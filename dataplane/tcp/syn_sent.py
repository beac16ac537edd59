"""Segments for a connection that is not there yet, or not any more: SYN_SENT and CLOSED.

Called by tcp/input (RFC 9293 sections 3.10.7.1 and 3.10.7.3).
"""

from __future__ import annotations

import errno

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.opening import established, take_syn
from dataplane.tcp.recovery import ack_process
from dataplane.tcp.sequence import unwrap
from dataplane.tcp.transition import NO_ACK, become, end, flag, reset

__all__ = ["arrive_syn_sent", "refuse"]

_ECONNREFUSED = errno.ECONNREFUSED


@shared
def refuse(mem, x, s):
    """A RST in answer to the segment, with the numbers that make its sender believe it (RFC 9293 section
    3.10.7.1). Never to a RST."""
    flags = ld64(mem, s + T.S_FLAGS)
    if flags & T.RST:
        return
    if flags & T.ACK:
        reset(mem, x, ld64(mem, s + T.S_ACK), NO_ACK)
        return
    size = ld64(mem, s + T.S_LENGTH) + (flags & T.FIN) + ((flags & T.SYN) >> 1)
    reset(mem, x, 0, (ld64(mem, s + T.S_SEQ) + size) & 0xFFFFFFFF)


@shared
def arrive_syn_sent(mem, x, s):
    """SYN_SENT (RFC 9293 section 3.10.7.3). 1: established; what text there is is to be taken."""
    t = x + T.X_TCB
    flags = ld64(mem, s + T.S_FLAGS)
    ack = unwrap(ld64(mem, t + T.T_SND_UNA), ld64(mem, t + T.T_ISS), ld64(mem, s + T.S_ACK))
    if flags & T.ACK and not 0 < ack <= ld64(mem, t + T.T_SND_MAX):
        refuse(mem, x, s)
        return 0
    if flags & T.RST:
        if flags & T.ACK:       # else anybody could have sent it
            end(mem, x, _ECONNREFUSED)
        return 0
    if not flags & T.SYN:
        return 0
    st64(mem, t + T.T_LAST_HEARD, ld64(mem, x + T.X_NOW))
    take_syn(mem, x, s)
    if flags & T.ACK:
        _open(mem, x, ack)
        return 1
    _meet(mem, x)
    return 0


@inlined
def _open(mem, x, ack):
    """SYN-ACK: established. Our ACK of it is due at once; it may carry data (section 3.10.7.3)."""
    t = x + T.X_TCB
    ack_process(mem, x, ack, 0, 0)
    established(mem, x)
    st64(mem, t + T.T_SND_WL2, ack)
    st64(mem, t + T.T_LAST_ACK_SENT, 1)
    flag(mem, x, T.TF_ACK_NOW)


@inlined
def _meet(mem, x):
    """A SYN that crossed ours: simultaneous open (section 3.5, figure 8). Our SYN goes out again, with an ACK."""
    t = x + T.X_TCB
    st64(mem, t + T.T_SND_NXT, 0)
    st64(mem, t + T.T_RTX_AT, 0)
    st64(mem, t + T.T_TIMED_POSITION, 0)    # nobody can tell which of the two will be acknowledged
    become(mem, x, T.SYN_RECEIVED)
