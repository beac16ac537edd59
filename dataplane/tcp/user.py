"""What the application asks for: open, shutdown, close, abort (RFC 9293 sections 3.10.1, 3.10.4, 3.10.5).

Called by connection.tcp_finish. Requests are bits that stay set (X_REQUEST), not messages: each run looks again, so
that one that cannot be granted yet, a shutdown of a connection that is still opening, waits without a queue.
SEND needs no request: what stands before X_WRITTEN is to be sent. RECEIVE is X_READ.
"""

from __future__ import annotations

import errno

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.opening import conn_open_active
from dataplane.tcp.transition import FIN_WAIT_2_NS, abort, become, end, flag

__all__ = ["user_requests"]

_ECONNABORTED = errno.ECONNABORTED


@shared
def _open(mem, x):
    """Once: the control block is that of a slot nobody has used. It brings T_MTU and T_IP_BYTES."""
    t = x + T.X_TCB
    if ld64(mem, t + T.T_SND_MAX) != 0 or ld64(mem, t + T.T_ERROR) != 0 or ld64(mem, t + T.T_FLAGS) & T.TF_ACTIVE:
        return
    conn_open_active(mem, x, ld64(mem, t + T.T_MTU), ld64(mem, t + T.T_IP_BYTES), ld64(mem, x + T.X_RANDOM))


@inlined
def _unread(mem, x):
    """Whether bytes are in the receive ring that the application has not taken."""
    t = x + T.X_TCB
    received = ld64(mem, t + T.T_RCV_NXT)
    fin = ld64(mem, t + T.T_PEER_FIN_AT)
    if fin != 0:
        received = min(received, fin)
    return received > max(ld64(mem, x + T.X_READ), 1)


@shared
def _shutdown(mem, x):
    """FIN behind the last byte that was written. The state changes at once, the FIN waits for its turn
    (section 3.10.4)."""
    t = x + T.X_TCB
    state = ld64(mem, t + T.T_STATE)
    if state != T.ESTABLISHED and state != T.CLOSE_WAIT:
        return
    st64(mem, t + T.T_FIN_AT, max(ld64(mem, x + T.X_WRITTEN), max(ld64(mem, t + T.T_SND_MAX), 1)))
    become(mem, x, T.FIN_WAIT_1 if state == T.ESTABLISHED else T.LAST_ACK)


@shared
def _close(mem, x):
    """The application is gone. What it has not read is lost, and the peer must not believe that it arrived: RST
    (RFC 2525 section 2.17, RFC 9293 section 3.6.1)."""
    t = x + T.X_TCB
    state = ld64(mem, t + T.T_STATE)
    if state == T.SYN_SENT:
        end(mem, x, 0)
        return
    if ld64(mem, t + T.T_FLAGS) & T.TF_ORPHAN == 0:
        flag(mem, x, T.TF_ORPHAN)
        if T.ESTABLISHED <= state <= T.CLOSE_WAIT and _unread(mem, x):
            abort(mem, x, _ECONNABORTED)
            return
        if state == T.FIN_WAIT_2:
            st64(mem, t + T.T_END_AT, ld64(mem, x + T.X_NOW) + FIN_WAIT_2_NS)
    _shutdown(mem, x)


@shared
def user_requests(mem, x):
    """Grants what can be granted in this state."""
    request = ld64(mem, x + T.X_REQUEST)
    closed = ld64(mem, x + T.X_TCB + T.T_STATE) == T.CLOSED
    if closed:
        if request & T.REQ_OPEN and not request & (T.REQ_CLOSED | T.REQ_ABORT):
            _open(mem, x)
    elif request & T.REQ_ABORT:
        flag(mem, x, T.TF_ORPHAN)
        abort(mem, x, _ECONNABORTED)
    elif request & T.REQ_CLOSED:
        _close(mem, x)
    elif request & T.REQ_SHUTDOWN:
        _shutdown(mem, x)
