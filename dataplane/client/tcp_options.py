"""Options of TCP sockets, by name and by the socket module's numbers; what is stored where.

Used by `tcp`. Values by name are plain: bools, seconds (`keepidle`, `keepintvl`, `linger`), milliseconds
(`user_timeout`), a string (`congestion`). By number they are what the socket module takes: ints, or bytes for
`SO_LINGER` and `TCP_CONGESTION`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Any

from dataplane.shm import layout_tcp as T

__all__ = ["BITS", "CONGESTION", "KEEPALIVE", "TIMES", "checked", "info", "name_of", "number_value", "plain_value"]

BITS = {"nodelay": T.OPT_NODELAY, "keepalive": T.OPT_KEEPALIVE, "cork": T.OPT_CORK, "quickack": T.OPT_QUICKACK}
"""Options that are one bit of CONN_OPTIONS."""

_S, _MS = 1_000_000_000, 1_000_000
TIMES = {"keepidle": (T.CONN_KEEP_IDLE, _S), "keepintvl": (T.CONN_KEEP_INTERVAL, _S),
         "keepcnt": (T.CONN_KEEP_COUNT, 1), "user_timeout": (T.CONN_USER_TIMEOUT, _MS)}
"""Options that are a word of the slot, and what one of their units is there."""

KEEPALIVE = {"keepidle": 7200, "keepintvl": 75, "keepcnt": 9}
"""Unless they are set: as Linux, RFC 9293 section 3.8.4."""

CONGESTION = {"cubic": 0, "newreno": T.OPT_NEWRENO, "reno": T.OPT_NEWRENO}

_LIMITS = {"keepidle": (1, 32767), "keepintvl": (1, 32767), "keepcnt": (1, 127), "user_timeout": (0, 1 << 31)}
_LINGER = struct.Struct("ii")

_NUMBERS: dict[Any, str] = {
    (socket.IPPROTO_TCP, socket.TCP_NODELAY): "nodelay",
    (socket.IPPROTO_TCP, socket.TCP_CORK): "cork",
    (socket.IPPROTO_TCP, socket.TCP_QUICKACK): "quickack",
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): "keepidle",
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): "keepintvl",
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): "keepcnt",
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): "user_timeout",
    (socket.IPPROTO_TCP, socket.TCP_CONGESTION): "congestion",
    (socket.IPPROTO_TCP, socket.TCP_MAXSEG): "maxseg",
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): "keepalive",
    (socket.SOL_SOCKET, socket.SO_LINGER): "linger",
    (socket.SOL_SOCKET, socket.SO_ERROR): "error",
    (socket.SOL_SOCKET, socket.SO_TYPE): "type",
    (socket.SOL_SOCKET, socket.SO_SNDBUF): "sndbuf",
    (socket.SOL_SOCKET, socket.SO_RCVBUF): "rcvbuf",
    (socket.SOL_SOCKET, socket.SO_ACCEPTCONN): "acceptconn",
    (socket.SOL_SOCKET, socket.SO_REUSEADDR): "reuseaddr",
}
_NAMES = {*_NUMBERS.values(), "info"}

_STATES = ("closed", "listen", "syn_sent", "syn_received", "established", "fin_wait_1", "fin_wait_2", "close_wait",
           "closing", "last_ack", "time_wait")


def unknown(what: object) -> OSError:
    """What is raised for an option that is none, or that cannot be set."""
    return OSError(errno.ENOPROTOOPT, f"{os.strerror(errno.ENOPROTOOPT)}: {what}")


def name_of(option: str | int, number: int | None) -> str:
    """The name of an option given by name, or by level and number."""
    name = option if number is None else _NUMBERS.get((option, number))
    if name not in _NAMES:
        raise unknown(option if number is None else f"level {option}, option {number}")
    return str(name)


def plain_value(name: str, value: Any) -> Any:
    """A value as the socket module takes it, as it is by name."""
    if name == "congestion":
        return bytes(value).rstrip(b"\0").decode("ascii", "replace")
    if name == "linger":
        if len(value) != _LINGER.size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        on, seconds = _LINGER.unpack(value)
        return seconds if on else None
    return value


def number_value(name: str, value: Any) -> Any:
    """The reverse."""
    if name == "congestion":
        return str(value).encode().ljust(16, b"\0")
    if name == "linger":
        return _LINGER.pack(value is not None, int(value or 0))
    return int(value)


def checked(name: str, value: Any) -> Any:
    """The value, if `name` can be set to it. OSError: ENOPROTOOPT, EINVAL, ENOENT."""
    if name in BITS:
        return bool(value)
    if name in _LIMITS:
        low, high = _LIMITS[name]
        if not low <= value <= high:
            raise OSError(errno.EINVAL, f"{name} is from {low} to {high}, not {value}")
        return value
    if name == "congestion":
        if value not in CONGESTION:
            raise OSError(errno.ENOENT, f"congestion is one of {', '.join(CONGESTION)}, not {value!r}")
        return value
    if name == "linger":
        if value is not None and not value >= 0:
            raise OSError(errno.EINVAL, f"linger is None or seconds, not {value}")
        return value
    if name == "reuseaddr":     # a listener always may: connections in TIME_WAIT do not keep its port
        return bool(value)
    raise unknown(f"{name} cannot be set")


def info(words: list[int], read: int) -> dict[str, Any]:
    """TCP_INFO for people: what `tcp_run.facts` found, and how far the application has read. Positions count from 0,
    the SYN; times are seconds."""
    def tcb(offset: int) -> int:
        return words[(T.CONN_BLOCKS + offset) // 8]

    def seconds(offset: int) -> float:
        return tcb(offset) / _S

    state, flags = tcb(T.T_STATE), tcb(T.T_FLAGS)
    return {
        "state": _STATES[state] if 0 <= state < len(_STATES) else "?",
        "iss": tcb(T.T_ISS), "irs": tcb(T.T_IRS),
        "snd_una": tcb(T.T_SND_UNA), "snd_nxt": tcb(T.T_SND_NXT), "snd_max": tcb(T.T_SND_MAX),
        "snd_wnd": tcb(T.T_SND_WND), "rcv_nxt": tcb(T.T_RCV_NXT), "rcv_wnd": tcb(T.T_RCV_RIGHT) - tcb(T.T_RCV_NXT),
        "snd_wscale": tcb(T.T_SND_SHIFT), "rcv_wscale": tcb(T.T_RCV_SHIFT),
        "mss": tcb(T.T_MSS), "rcv_mss": tcb(T.T_RCV_MSS), "pmtu": tcb(T.T_MTU),
        "sack": bool(flags & T.TF_SACK), "timestamps": bool(flags & T.TF_TIMESTAMPS),
        "wscale": bool(flags & T.TF_SCALE),
        "rtt": seconds(T.T_SRTT), "rttvar": seconds(T.T_RTTVAR), "min_rtt": seconds(T.T_MIN_RTT),
        "rto": seconds(T.T_RTO), "backoff": tcb(T.T_BACKOFF),
        "cwnd": tcb(T.T_CWND), "ssthresh": tcb(T.T_SSTHRESH),
        "segments_in": tcb(T.T_SEGMENTS_IN), "segments_out": tcb(T.T_SEGMENTS_OUT),
        "retransmits": tcb(T.T_RETRANSMITS), "duplicates_in": tcb(T.T_DUPLICATES_IN),
        "unacked": words[T.CONN_WRITTEN // 8] - words[T.CONN_ACKED // 8],
        "unread": words[T.CONN_RECEIVED // 8] - read,
    }
