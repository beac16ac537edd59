"""What the network says about a connection: ICMP errors, already matched to it by addresses and ports.

Called by service for a control record of a lane. Anybody can forge such a message; so it counts only if it quotes a
segment that is under way (RFC 5927 section 4), and never ends a connection that is established (section 5.2).
"""

from __future__ import annotations

import errno

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.opening import mss_update
from dataplane.tcp.recovery import retransmit_timeout
from dataplane.tcp.sequence import unwrap
from dataplane.tcp.transition import end

__all__ = ["tcp_control"]

_ECONNREFUSED = errno.ECONNREFUSED
_ERRNO_MAX = 4095

# The least that a router can ask for. IPv6: RFC 8200 section 5. IPv4 would allow 68, of which 40 are headers; 296 is
# the next of RFC 1191's plateaus and was the least that was ever in use (section 7.1).
MTU_MIN_4, MTU_MIN_6 = 296, 1280


@shared
def tcp_control(mem, x, kind, value, wire_seq):
    """`kind`: CTL_MTU, CTL_UNREACHABLE or CTL_REFUSED. `value`: next-hop MTU, or errno. `wire_seq`: of the segment
    that is quoted."""
    t = x + T.X_TCB
    state = ld64(mem, t + T.T_STATE)
    if state < T.SYN_SENT:
        return
    una = ld64(mem, t + T.T_SND_UNA)
    position = unwrap(una, ld64(mem, t + T.T_ISS), wire_seq & 0xFFFFFFFF)
    if position < una or position >= ld64(mem, t + T.T_SND_MAX):
        return
    if kind == T.CTL_MTU:
        _shrink(mem, x, value)
        return
    error = _ECONNREFUSED if kind == T.CTL_REFUSED else min(max(value, 0), _ERRNO_MAX)
    if state == T.SYN_SENT:
        end(mem, x, error)      # RFC 5461 section 4.1: nothing is lost yet, and the application can try elsewhere
    else:
        st64(mem, t + T.T_SOFT_ERROR, error)


@inlined
def _next_plateau(mtu):
    """The next smaller of RFC 1191's plateaus (section 7.1): for routers that do not tell their MTU."""
    if mtu > 32000:
        return 32000
    if mtu > 17914:
        return 17914
    if mtu > 8166:
        return 8166
    if mtu > 4352:
        return 4352
    if mtu > 1492:
        return 1492
    return 1006 if mtu > 1006 else (508 if mtu > 508 else 296)


@shared
def _shrink(mem, x, mtu):
    """Path MTU (RFC 1191, RFC 8201): only downwards. What was too large is lost and goes out again at once, in
    smaller segments; that is no sign of congestion (RFC 1191 section 6.5)."""
    t = x + T.X_TCB
    old = ld64(mem, t + T.T_MTU)
    if mtu <= 0:
        mtu = _next_plateau(old)
    mtu = max(mtu, MTU_MIN_4 if ld64(mem, t + T.T_IP_BYTES) == 20 else MTU_MIN_6)
    if mtu >= old:
        return
    st64(mem, t + T.T_MTU, mtu)
    before = ld64(mem, t + T.T_MSS)
    mss_update(mem, x)
    outstanding = ld64(mem, t + T.T_SND_NXT) > ld64(mem, t + T.T_SND_UNA)
    if not outstanding or ld64(mem, t + T.T_MSS) >= before or ld64(mem, t + T.T_STATE) < T.ESTABLISHED:
        return
    window = ld64(mem, t + T.T_CWND)
    threshold = ld64(mem, t + T.T_SSTHRESH)
    backoff = ld64(mem, t + T.T_BACKOFF)
    retransmit_timeout(mem, x)
    st64(mem, t + T.T_CWND, window)
    st64(mem, t + T.T_SSTHRESH, threshold)
    st64(mem, t + T.T_BACKOFF, backoff)
