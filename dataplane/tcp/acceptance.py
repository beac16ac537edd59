"""Which segments a connection believes: sequence check, PAWS, and the limits of RFC 5961.

Called by tcp/input for each segment of a synchronized connection. Nothing here changes the state.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import ld64, st64
from dataplane.tcp.sequence import precedes
from dataplane.tcp.transition import flag

__all__ = ["CHALLENGES_MAX", "acceptable", "challenge", "note_timestamp", "timestamp_fails"]

CHALLENGES_MAX = 10
"""Challenge ACKs of one connection in one second (RFC 5961 section 7). Counted for each connection, not for all
together: a common counter tells an attacker whether a guess was right (CVE-2016-5696)."""

_SECOND = 1_000_000_000
_STALE = 24 * 86400 * _SECOND       # RFC 7323 section 5.5


@shared
def challenge(mem, x):
    """An ACK to be sent because a segment looks forged: the real peer then shows itself (RFC 5961)."""
    t = x + T.X_TCB
    now = ld64(mem, x + T.X_NOW)
    if now - ld64(mem, t + T.T_CHALLENGE_AT) >= _SECOND or ld64(mem, t + T.T_CHALLENGE_AT) > now:
        st64(mem, t + T.T_CHALLENGE_AT, now)
        st64(mem, t + T.T_CHALLENGES, 0)
    count = ld64(mem, t + T.T_CHALLENGES)
    if count < CHALLENGES_MAX:
        st64(mem, t + T.T_CHALLENGES, count + 1)
        flag(mem, x, T.TF_ACK_NOW)


@inlined
def acceptable(mem, t, position, size):
    """First check of RFC 9293 section 3.10.7.4: whether any of the `size` positions is in the window.

    Two allowances. A segment that overlaps the window on both sides is in it. And an empty one may stand at its
    right edge: that is where a peer's ACKs stand that has filled our window while something of it is lost.
    """
    nxt = ld64(mem, t + T.T_RCV_NXT)
    right = ld64(mem, t + T.T_RCV_RIGHT)
    if size == 0:
        return nxt <= position <= max(right, nxt)
    return position < right and position + size > nxt


@inlined
def timestamp_fails(mem, x, s):
    """PAWS (RFC 7323 section 5.3, R1): 1 for an old duplicate, from its timestamp. 2: it has no timestamp although
    that was agreed, so that nobody can know (section 3.2: drop it in silence)."""
    t = x + T.X_TCB
    if not ld64(mem, t + T.T_FLAGS) & T.TF_TIMESTAMPS or ld64(mem, s + T.S_FLAGS) & (T.RST | T.SYN):
        return 0        # a SYN has another clock, or none; it gets a challenge ACK, however old it is
    if not ld64(mem, s + T.S_OPTIONS) & T.SO_TIMESTAMPS:
        return 2
    if not precedes(ld64(mem, s + T.S_TSVAL), ld64(mem, t + T.T_TS_RECENT)):
        return 0
    return 1 if ld64(mem, x + T.X_NOW) - ld64(mem, t + T.T_TS_RECENT_AT) < _STALE else 0


@inlined
def note_timestamp(mem, x, s, position):
    """What we echo: the timestamp of the segment that made the next ACK due, not of later ones (RFC 7323 section
    4.3), so that the peer measures our delay too."""
    t = x + T.X_TCB
    if ld64(mem, t + T.T_FLAGS) & T.TF_TIMESTAMPS and position <= ld64(mem, t + T.T_LAST_ACK_SENT):
        st64(mem, t + T.T_TS_RECENT, ld64(mem, s + T.S_TSVAL))
        st64(mem, t + T.T_TS_RECENT_AT, ld64(mem, x + T.X_NOW))
