"""The window that we offer: how much the peer may send.

Called by tcp/output for every segment. It counts what the application has not read yet, since the right edge is
where the receive ring ends: X_READ + ring bytes. What sits in the lanes, not yet processed, lies between RCV_NXT
and that edge like what is still on its way.

Two more bounds. The right edge never goes back (RFC 9293 section 3.8.6): T_RCV_RIGHT is the furthest that was ever
offered, and is what input accepts by. And what is under way must fit into a lane, where a segment takes more bytes than
its data: at most three quarters of a lane are offered at a time.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64

__all__ = ["WINDOW_FIELD", "receive_mss", "receive_shift", "window_first", "window_offer", "window_update_due"]

WINDOW_FIELD = 65535
SHIFT_MAX = 14          # RFC 7323 section 2.3


@inlined
def receive_shift(ring_bytes):
    """The window scale that we tell with a receive ring of so many bytes: the least that can tell all of it."""
    shift = 0
    while ring_bytes >> shift > WINDOW_FIELD and shift < SHIFT_MAX:
        shift += 1
    return shift


@inlined
def receive_mss(mem, t):
    """Data of the largest segment that the path can bring in one packet. A netif may hand us many at once."""
    return max(ld64(mem, t + T.T_MTU) - ld64(mem, t + T.T_IP_BYTES) - 20, 48)


@inlined
def window_limit(mem, x):
    """Position before which there is room now; no further than the window field can tell, or an update would be
    due for ever."""
    t = x + T.X_TCB
    limit = ld64(mem, x + T.X_READ) + ld64(mem, x + T.X_RCV_MASK) + 1
    most = min(ld64(mem, x + T.X_LANE_BYTES) * 3 // 4, WINDOW_FIELD << ld64(mem, t + T.T_RCV_SHIFT))
    return min(limit, ld64(mem, t + T.T_RCV_NXT) + most)


@inlined
def window_first(mem, x):
    """Bytes of the window in a SYN, which is never scaled (RFC 7323 section 2.2)."""
    return min(ld64(mem, x + T.X_RCV_MASK) + 1, min(ld64(mem, x + T.X_LANE_BYTES) * 3 // 4, WINDOW_FIELD))


@inlined
def _gain(mem, x):
    """How far the right edge could go on."""
    return window_limit(mem, x) - ld64(mem, x + T.X_TCB + T.T_RCV_RIGHT)


@shared
def window_offer(mem, x):
    """The window field for a segment that goes out now; moves the right edge on if that is worth telling.

    Receiver's silly-window avoidance (RFC 9293 section 3.8.6.2.2): the edge moves by at least a full segment or
    half of the ring, or not at all.
    """
    t = x + T.X_TCB
    shift = ld64(mem, t + T.T_RCV_SHIFT)
    nxt = ld64(mem, t + T.T_RCV_NXT)
    right = ld64(mem, t + T.T_RCV_RIGHT)
    limit = window_limit(mem, x)
    if limit - right >= min((ld64(mem, x + T.X_RCV_MASK) + 1) // 2, receive_mss(mem, t)):
        right = limit
    # The field counts in units of 1 << shift. What is lost by cutting would take back some bytes of an earlier
    # offer (RFC 7323 section 2.4), so one unit more is offered as long as the ring has room for it.
    field = max(right - nxt, 0) >> shift
    if nxt + (field << shift) < right and nxt + ((field + 1) << shift) <= limit:
        field += 1
    field = min(field, WINDOW_FIELD)
    st64(mem, t + T.T_RCV_RIGHT, max(ld64(mem, t + T.T_RCV_RIGHT), nxt + (field << shift)))
    return field


@inlined
def window_update_due(mem, x):
    """Whether the application has read so much that the peer should hear of it by a segment of its own.

    Not for each two segments, as for acknowledgements: a peer that has plenty of window left sends anyway.
    """
    t = x + T.X_TCB
    gain = _gain(mem, x)
    size = ld64(mem, x + T.X_RCV_MASK) + 1
    if gain >= size // 2:
        return True
    if gain < 2 * receive_mss(mem, t):
        return False
    return gain >= size // 4 or ld64(mem, t + T.T_RCV_RIGHT) - ld64(mem, t + T.T_RCV_NXT) <= size // 8
