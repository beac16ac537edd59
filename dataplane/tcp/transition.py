"""How a connection changes its state: the few steps that input, timers and user requests share.

Every change of T_STATE happens here (and, for a new connection, in opening), so that timers and events never
disagree with it. states.py has the table that says which change is due when.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.sequence import wire

__all__ = ["FIN_WAIT_2_NS", "abort", "become", "end", "event", "flag", "linger", "reset", "settle", "unflag"]

FIN_WAIT_2_NS = 60_000_000_000
"""How long a connection without application waits for the peer's FIN. RFC 9293 has no limit; without one a peer
that vanishes would keep the slot for ever. 60 s are the usual choice of kernels."""

NO_ACK = -1


@inlined
def flag(mem, x, flags):
    st64(mem, x + T.X_TCB + T.T_FLAGS, ld64(mem, x + T.X_TCB + T.T_FLAGS) | flags)


@inlined
def unflag(mem, x, flags):
    st64(mem, x + T.X_TCB + T.T_FLAGS, ld64(mem, x + T.X_TCB + T.T_FLAGS) & ~flags)


@inlined
def event(mem, x, events):
    """Notes what this run changes for the application."""
    st64(mem, x + T.X_EVENTS, ld64(mem, x + T.X_EVENTS) | events)


@inlined
def become(mem, x, state):
    """Another state, which the application may be waiting for."""
    st64(mem, x + T.X_TCB + T.T_STATE, state)
    event(mem, x, T.EV_STATE)


@inlined
def _stop_timers(mem, t):
    for word in (T.T_RTX_AT, T.T_DELACK_AT, T.T_PERSIST_AT, T.T_KEEP_AT, T.T_END_AT, T.T_PROBE_AT, T.T_STALL_AT):
        st64(mem, t + word, 0)


@shared
def end(mem, x, error):
    """CLOSED, with the errno that the application is told; 0: as it wished."""
    t = x + T.X_TCB
    _stop_timers(mem, t)
    unflag(mem, x, T.TF_ACK_NOW | T.TF_PROBE | T.TF_KEEP)
    if ld64(mem, t + T.T_ERROR) == 0:
        st64(mem, t + T.T_ERROR, error)
    become(mem, x, T.CLOSED)
    event(mem, x, T.EV_READABLE | T.EV_WRITABLE)


@inlined
def reset(mem, x, sequence, acknowledgment):
    """A RST with these numbers is to be sent; NO_ACK: without ACK."""
    st64(mem, x + T.X_TCB + T.T_RST_SEQ, sequence)
    st64(mem, x + T.X_TCB + T.T_RST_ACK, acknowledgment)
    flag(mem, x, T.TF_REFUSE)


@shared
def abort(mem, x, error):
    """CLOSED; and a RST, in the states in which the peer has a connection that it still counts on
    (RFC 9293 section 3.10.5)."""
    t = x + T.X_TCB
    state = ld64(mem, t + T.T_STATE)
    if T.SYN_RECEIVED <= state <= T.CLOSE_WAIT:
        # SND_NXT, not SND_MAX: a byte of a window probe may not have been taken, and the peer believes
        # no RST but one that is exactly at its RCV_NXT (RFC 5961 section 3.2).
        reset(mem, x, wire(ld64(mem, t + T.T_ISS), ld64(mem, t + T.T_SND_NXT)),
              wire(ld64(mem, t + T.T_IRS), ld64(mem, t + T.T_RCV_NXT)))
    end(mem, x, error)


@shared
def linger(mem, x):
    """TIME_WAIT, or its beginning anew: nothing of ours is on its way any more, but the peer may not have
    got our last ACK (RFC 9293 section 3.6.1)."""
    t = x + T.X_TCB
    _stop_timers(mem, t)
    st64(mem, t + T.T_END_AT, ld64(mem, x + T.X_NOW) + ld64(mem, x + T.X_TIME_WAIT))
    if ld64(mem, t + T.T_STATE) != T.TIME_WAIT:
        become(mem, x, T.TIME_WAIT)


@shared
def settle(mem, x):
    """The peer has acknowledged our FIN (RFC 9293 section 3.10.7.4, fifth check)."""
    t = x + T.X_TCB
    state = ld64(mem, t + T.T_STATE)
    if state == T.FIN_WAIT_1:
        become(mem, x, T.FIN_WAIT_2)
        if ld64(mem, t + T.T_FLAGS) & T.TF_ORPHAN:
            st64(mem, t + T.T_END_AT, ld64(mem, x + T.X_NOW) + FIN_WAIT_2_NS)
    elif state == T.CLOSING:
        linger(mem, x)
    elif state == T.LAST_ACK:
        end(mem, x, 0)
