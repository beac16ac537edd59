"""A connection's run, behind the segments that arrived: requests, timers, output.

Called by service, for all three callers of the protocol. With `tcp_arrive` and `tcp_control` (input) this is the whole
face of the protocol; `conn_open_active` and `conn_establish` make a connection.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.opening import conn_establish, conn_open_active
from dataplane.tcp.output import output
from dataplane.tcp.timers import timers_arm, timers_next, timers_run
from dataplane.tcp.user import user_requests

__all__ = ["conn_establish", "conn_open_active", "tcp_finish"]


@inlined
def _publish(mem, x):
    """The deadline goes with every segment, since the continuation worker learns of it from them."""
    at = timers_next(mem, x)
    st64(mem, x + T.X_DEADLINE, at)
    for i in range(ld64(mem, x + T.X_OUT_COUNT)):
        st64(mem, x + T.X_OUT + i * T.O_BYTES + T.O_DEADLINE, at)


@shared
def tcp_finish(mem, x):
    """Takes in X_REQUEST, X_WRITTEN, X_READ and X_NOW; fills X_OUT and X_DEADLINE, and adds to X_EVENTS.

    EV_MORE: there may be more to send than X_OUT took; call again, with the same X_NOW or a later one."""
    st64(mem, x + T.X_OUT_COUNT, 0)
    st64(mem, x + T.X_EVENTS, ld64(mem, x + T.X_EVENTS) & ~T.EV_MORE)
    if ld64(mem, x + T.X_REQUEST) != 0:
        user_requests(mem, x)
    timers_run(mem, x)
    output(mem, x)
    timers_arm(mem, x)
    _publish(mem, x)
