"""What is due: retransmission, tail-loss probe, delayed ACK, window probe, keepalive, and the ends of waiting.

`timers_run` is called by connection.tcp_finish before output: a timer that is due only notes what is to be sent, or
ends the connection. `timers_arm` is called behind output, when it is known what is outstanding, and `timers_next` says
when to run again. Times are absolute ns; 0: not running.

    T_RTX_AT        retransmission (RFC 6298): SYN, data, FIN. Armed by recovery
    T_PROBE_AT      tail-loss probe (RFC 8985 section 7). Armed by recovery
    T_DELACK_AT     an ACK waited long enough for company (RFC 9293 section 3.8.6.3). Armed by input
    T_PERSIST_AT    something waits, nothing is outstanding, so nothing else would wake us (section 3.8.6.1)
    T_KEEP_AT       keepalive (section 3.8.4). Looks at T_LAST_HEARD when it is due, so that no segment has to arm it
    T_END_AT        end of TIME_WAIT, or of a FIN_WAIT_2 that has no application
    T_STALL_AT      not a timer, but since when there is no progress: user timeout (section 3.8.3, RFC 5482)
"""

from __future__ import annotations

import errno

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.output import send_again, waiting
from dataplane.tcp.recovery import retransmit_timeout, tail_probe
from dataplane.tcp.rtt import rto
from dataplane.tcp.transition import abort, end, flag

__all__ = ["ORPHAN_RETRIES", "RTX_MAX", "SYN_RETRIES", "timers_arm", "timers_next", "timers_run"]

RTX_MAX = 15
"""Retransmissions of the same data (RFC 9293 section 3.8.3, R2: at least 100 s; this is 15 minutes and more)."""
SYN_RETRIES = 7
"""Retransmissions of a SYN (MUST-23: at least 3 minutes; from 1 s on, doubling up to 120 s, this is 247 s)."""
ORPHAN_RETRIES = 8
"""The same for a connection whose application is gone: it holds a slot for nobody."""

_ETIMEDOUT = errno.ETIMEDOUT
_PERSIST_MAX = 60_000_000_000
_SILENCE_MAX = 240_000_000_000
_ORPHAN_SILENCE_MAX = 100_000_000_000   # more than one interval between two probes
_KEEP_IDLE = 7200_000_000_000       # RFC 9293 section 3.8.4: no less than two hours, unless it is set
_KEEP_INTERVAL = 75_000_000_000
_KEEP_COUNT = 9


@inlined
def _due(mem, x, word):
    at = ld64(mem, x + T.X_TCB + word)
    return at != 0 and at <= ld64(mem, x + T.X_NOW)


@shared
def _give_up(mem, x):
    """The peer is gone, as far as we can tell. What the network said about it is a better reason than silence
    (RFC 1122 section 4.2.3.9)."""
    reason = ld64(mem, x + T.X_TCB + T.T_SOFT_ERROR)
    abort(mem, x, reason if reason != 0 else _ETIMEDOUT)


@inlined
def _silent(mem, x):
    """How long nothing has been heard from the peer."""
    return ld64(mem, x + T.X_NOW) - ld64(mem, x + T.X_TCB + T.T_LAST_HEARD)


@shared
def _retransmission(mem, x):
    t = x + T.X_TCB
    count = ld64(mem, t + T.T_TIMEOUTS)
    st64(mem, t + T.T_TIMEOUTS, min(count, 60) + 1)
    if ld64(mem, t + T.T_STATE) <= T.SYN_RECEIVED:
        if count >= SYN_RETRIES:
            _give_up(mem, x)
            return
        st64(mem, t + T.T_SND_NXT, 0)
        retransmit_timeout(mem, x)
        return
    orphan = ld64(mem, t + T.T_FLAGS) & T.TF_ORPHAN
    # A peer that took its window back while data were under way, and still answers, is alive (MUST-37).
    alive = ld64(mem, t + T.T_SND_WND) == 0 and _silent(mem, x) < _SILENCE_MAX
    if orphan and count >= ORPHAN_RETRIES:
        _give_up(mem, x)
    elif ld64(mem, x + T.X_USER_TIMEOUT) <= 0 and count >= RTX_MAX and not alive:
        _give_up(mem, x)
    else:
        retransmit_timeout(mem, x)


@shared
def _tail(mem, x):
    position, length = tail_probe(mem, x)
    send_again(mem, x, position, length)


@shared
def _persist(mem, x):
    """Probes go on for ever while the peer answers (MUST-37), at growing intervals; for an orphan only some ten
    minutes, or peers that never read could hold all slots (RFC 6429 section 4)."""
    t = x + T.X_TCB
    count = ld64(mem, t + T.T_PERSIST_SHIFT)
    st64(mem, t + T.T_PERSIST_AT, 0)
    silent = _silent(mem, x) >= _ORPHAN_SILENCE_MAX
    if ld64(mem, t + T.T_FLAGS) & T.TF_ORPHAN and count >= (ORPHAN_RETRIES if silent else RTX_MAX):
        _give_up(mem, x)
    elif count >= RTX_MAX and _silent(mem, x) >= _SILENCE_MAX:
        _give_up(mem, x)
    else:
        st64(mem, t + T.T_PERSIST_SHIFT, min(count + 1, 60))
        flag(mem, x, T.TF_PROBE)


@inlined
def _given(mem, word, otherwise):
    """What the application has set, or the default."""
    value = ld64(mem, word)
    return value if value > 0 else otherwise


@shared
def _keepalive(mem, x):
    """Only a connection that is idle is probed: with data outstanding, retransmission finds out (section 3.8.4)."""
    t = x + T.X_TCB
    now = ld64(mem, x + T.X_NOW)
    idle = _given(mem, x + T.X_KEEP_IDLE, _KEEP_IDLE)
    probes = ld64(mem, t + T.T_KEEP_PROBES)
    if probes == 0 and ld64(mem, t + T.T_LAST_HEARD) + idle > now:
        st64(mem, t + T.T_KEEP_AT, ld64(mem, t + T.T_LAST_HEARD) + idle)
        return
    if ld64(mem, t + T.T_SND_NXT) > ld64(mem, t + T.T_SND_UNA):
        st64(mem, t + T.T_KEEP_AT, now + idle)
        return
    if probes >= _given(mem, x + T.X_KEEP_COUNT, _KEEP_COUNT):
        _give_up(mem, x)
        return
    st64(mem, t + T.T_KEEP_PROBES, min(probes + 1, 60))
    st64(mem, t + T.T_KEEP_AT, now + _given(mem, x + T.X_KEEP_INTERVAL, _KEEP_INTERVAL))
    flag(mem, x, T.TF_KEEP)


@inlined
def _user_timeout(mem, x):
    """When what is outstanding has waited too long for the application; 0: never."""
    since = ld64(mem, x + T.X_TCB + T.T_STALL_AT)
    limit = ld64(mem, x + T.X_USER_TIMEOUT)
    return since + limit if since > 0 and limit > 0 else 0


@shared
def timers_run(mem, x):
    """Does what is due at X_NOW. A timer that ends the connection stops all others."""
    t = x + T.X_TCB
    limit = _user_timeout(mem, x)
    if limit != 0 and limit <= ld64(mem, x + T.X_NOW):
        _give_up(mem, x)
    if _due(mem, x, T.T_END_AT):
        end(mem, x, 0)
    if _due(mem, x, T.T_PROBE_AT):
        _tail(mem, x)       # before the timeout, which it puts off (RFC 8985 section 7.3), when both are due
    if _due(mem, x, T.T_RTX_AT):
        _retransmission(mem, x)
    if _due(mem, x, T.T_DELACK_AT):
        st64(mem, t + T.T_DELACK_AT, 0)
        flag(mem, x, T.TF_ACK_NOW)
    if _due(mem, x, T.T_PERSIST_AT):
        _persist(mem, x)
    if _due(mem, x, T.T_KEEP_AT):
        _keepalive(mem, x)


@inlined
def _arm_persist(mem, x, outstanding):
    t = x + T.X_TCB
    state = ld64(mem, t + T.T_STATE)
    stuck = not outstanding and state >= T.ESTABLISHED and state != T.TIME_WAIT and waiting(mem, x)
    if not stuck:
        st64(mem, t + T.T_PERSIST_AT, 0)
    elif ld64(mem, t + T.T_PERSIST_AT) == 0:
        interval = min(rto(mem, x) << min(ld64(mem, t + T.T_PERSIST_SHIFT), 9), _PERSIST_MAX)
        st64(mem, t + T.T_PERSIST_AT, ld64(mem, x + T.X_NOW) + interval)
    return stuck


@shared
def timers_arm(mem, x):
    """Starts and stops what depends on what is outstanding now: persist, user timeout, keepalive."""
    t = x + T.X_TCB
    state = ld64(mem, t + T.T_STATE)
    if state == T.CLOSED or ld64(mem, x + T.X_EVENTS) & T.EV_MORE:
        return
    outstanding = ld64(mem, t + T.T_SND_NXT) > ld64(mem, t + T.T_SND_UNA)
    stuck = _arm_persist(mem, x, outstanding)
    if not outstanding and not stuck:
        st64(mem, t + T.T_STALL_AT, 0)
    elif ld64(mem, t + T.T_STALL_AT) == 0:
        st64(mem, t + T.T_STALL_AT, ld64(mem, x + T.X_NOW))
    wanted = ld64(mem, x + T.X_OPTIONS) & T.OPT_KEEPALIVE and T.ESTABLISHED <= state < T.TIME_WAIT
    if not wanted:
        st64(mem, t + T.T_KEEP_AT, 0)
    elif ld64(mem, t + T.T_KEEP_AT) == 0:
        idle = _given(mem, x + T.X_KEEP_IDLE, _KEEP_IDLE)
        st64(mem, t + T.T_KEEP_AT, max(ld64(mem, t + T.T_LAST_HEARD), ld64(mem, x + T.X_NOW) - idle) + idle)


@inlined
def _sooner(at, other):
    return other if at == 0 or 0 < other < at else at


@shared
def timers_next(mem, x):
    """When the first timer is due; 0: none runs."""
    t = x + T.X_TCB
    at = _user_timeout(mem, x)
    for word in (T.T_RTX_AT, T.T_DELACK_AT, T.T_PERSIST_AT, T.T_KEEP_AT, T.T_END_AT, T.T_PROBE_AT):
        at = _sooner(at, ld64(mem, t + word))
    return at
