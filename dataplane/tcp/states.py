"""The state machine as data: what each event does in each state (RFC 9293 sections 3.3.2, 3.10; figure 5).

Nothing is driven by this table at run time: the kernels in input, user and timers decide by comparing numbers. It is
what they must amount to, and a test runs every cell of it through them. Whoever changes a kernel's
behaviour changes a cell, or the test fails; whoever wants to know what happens reads it here.

A state is what the two streams of a connection have come to. Each direction has a SYN, data and a FIN, and each
of them must be acknowledged. From ESTABLISHED on, the states count FINs:

    ours not sent          peer's not here: ESTABLISHED       here: CLOSE_WAIT
    ours sent, not acked   peer's not here: FIN_WAIT_1        here: CLOSING, or LAST_ACK if the peer's came first
    ours acknowledged      peer's not here: FIN_WAIT_2        here: TIME_WAIT, or CLOSED if the peer's came first

Whoever sends the first FIN ends in TIME_WAIT: only it cannot know whether its last ACK arrived. "Sent" means
promised: the state changes when the application shuts down, while the FIN waits behind the data (section 3.10.4).

Not in the states but beside them: whether the application is still there (TF_ORPHAN). An orphan takes no more data
(it answers with RST), and waits in FIN_WAIT_2 for a minute only.

Events are named for what they mean to *this* connection. So "ACK_OF_FIN" exists only where a FIN was sent; the same
segment elsewhere is "ACK_OF_UNSENT". Such pairs stand in PROHIBITED with the reason why they cannot be; together the
two tables cover each pair once.

LISTEN is never the state of a control block here: a listener has none. Its row of the RFC is the table LISTENER, and
is done by the SYN cache (inet/tcp_listen), which makes connections that begin in ESTABLISHED. So SYN_RECEIVED means
a simultaneous open, and there is no way back from it to LISTEN.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EVENTS", "LISTENER", "PROHIBITED", "STATES", "TRANSITIONS", "Step"]

STATES = ("CLOSED", "LISTEN", "SYN_SENT", "SYN_RECEIVED", "ESTABLISHED", "FIN_WAIT_1", "FIN_WAIT_2", "CLOSE_WAIT",
          "CLOSING", "LAST_ACK", "TIME_WAIT")
"""By number (layout_tcp)."""

EVENTS = {
    # The application.
    "OPEN": "REQ_OPEN",
    "SEND": "bytes are written into the send ring",
    "SHUTDOWN": "REQ_SHUTDOWN: no more bytes come",
    "CLOSE": "REQ_CLOSED, and all that was received has been read",
    "CLOSE_UNREAD": "REQ_CLOSED, with bytes in the receive ring",
    "ABORT": "REQ_ABORT",
    # Segments. Where nothing else is said they are in sequence, acknowledge all but our FIN, and have an ACK.
    "SYN": "SYN without ACK: at the beginning, or somewhere in the window",
    "SYN_ACK": "SYN and an ACK of our SYN",
    "ACK": "nothing but an ACK",
    "ACK_OF_FIN": "an ACK that includes our FIN",
    "DATA": "data, less than a full segment",
    "DATA_UNWANTED": "data, but the application has closed",
    "DATA_OUTSIDE": "data behind the window",
    "DATA_EARLY": "data in the window with a hole before them",
    "FIN": "FIN; behind the peer's FIN: the same once more",
    "RST": "RST at RCV_NXT; in SYN_SENT: one that acknowledges our SYN",
    "RST_INSIDE": "RST elsewhere in the window; in SYN_SENT: one without ACK",
    "RST_OUTSIDE": "RST outside of the window; in SYN_SENT: one that acknowledges something else",
    "ACK_OF_UNSENT": "an ACK of what was never sent",
    "ACK_TOO_OLD": "an ACK from more than a window ago",
    "NO_ACK": "data without ACK",
    "STALE": "data with a timestamp older than the last one (PAWS)",
    # The network.
    "UNREACHABLE": "ICMP: host unreachable, about a segment that is under way",
    # Time.
    "RETRANSMIT": "retransmission timeout",
    "RETRANSMIT_LIMIT": "retransmission timeout, once too often",
    "USER_TIMEOUT": "the application's limit for unacknowledged data",
    "PERSIST": "data wait for a window that is closed",
    "DELAYED_ACK": "an ACK has waited long enough",
    "KEEPALIVE": "nothing was heard for long",
    "KEEPALIVE_LIMIT": "nor was any probe answered",
    "END": "the time is over that this state may last",
}


class Step(NamedTuple):
    """What an event leads to: the next state; the segment sent at once (flags, "DATA", "" for none); and the errno
    that the application gets."""

    state: str
    sends: str = ""
    error: str = ""


Row = dict[str, Step]


def _stay(state: str, **sends: str) -> Row:
    return {event: Step(state, what) for event, what in sends.items()}


# What every synchronized state answers in the same way (section 3.10.7.4, first to fifth check; RFC 5961).
_SYNCHRONIZED = {
    "OPEN": "", "SYN": "ACK", "SYN_ACK": "ACK", "ACK": "", "DATA_OUTSIDE": "ACK", "RST_INSIDE": "ACK",
    "RST_OUTSIDE": "", "ACK_OF_UNSENT": "ACK", "NO_ACK": "", "STALE": "ACK", "ACK_TOO_OLD": "ACK",
}
# While the peer may send ...
_RECEIVING = {"DATA": "", "DATA_EARLY": "ACK", "DELAYED_ACK": "ACK"}
# ... and when it has sent its FIN.
_RECEIVED = {"DATA": "ACK", "DATA_EARLY": "ACK", "FIN": "ACK"}

_ABORTED = Step("CLOSED", "RST", "ECONNABORTED")
_TIMED_OUT = Step("CLOSED", "RST", "ETIMEDOUT")
_SILENT_TIMEOUT = Step("CLOSED", "", "ETIMEDOUT")
_UNWANTED = Step("CLOSED", "RST", "ECONNRESET")
_RESET = Step("CLOSED", "", "ECONNRESET")
_LIMITS = ("RETRANSMIT_LIMIT", "USER_TIMEOUT")

TRANSITIONS: dict[str, Row] = {
    "CLOSED": {
        "OPEN": Step("SYN_SENT", "SYN"),
        **_stay("CLOSED", SEND="", SHUTDOWN="", CLOSE="", ABORT="", UNREACHABLE=""),
        # Section 3.10.7.1: a RST to everything but a RST.
        **_stay("CLOSED", SYN="RST", SYN_ACK="RST", ACK="RST", DATA="RST", FIN="RST", ACK_OF_UNSENT="RST", NO_ACK="RST",
                RST="", RST_INSIDE="", RST_OUTSIDE=""),
    },
    "SYN_SENT": {
        **_stay("SYN_SENT", OPEN="", SEND="", SHUTDOWN="", ACK="", DATA="", FIN="", NO_ACK="", RST_INSIDE="",
                RST_OUTSIDE="", ACK_OF_UNSENT="RST", RETRANSMIT="SYN"),
        "CLOSE": Step("CLOSED"),
        "ABORT": Step("CLOSED", "", "ECONNABORTED"),
        "SYN": Step("SYN_RECEIVED", "SYN ACK"),
        "SYN_ACK": Step("ESTABLISHED", "ACK"),
        "RST": Step("CLOSED", "", "ECONNREFUSED"),
        "UNREACHABLE": Step("CLOSED", "", "EHOSTUNREACH"),
        **dict.fromkeys(_LIMITS, _SILENT_TIMEOUT),
    },
    "SYN_RECEIVED": {
        **_stay("SYN_RECEIVED", **_SYNCHRONIZED, UNREACHABLE=""),
        # Section 3.10.4 allows a FIN here if there are no data; with or without, it waits for ESTABLISHED.
        **_stay("SYN_RECEIVED", SEND="", SHUTDOWN="", CLOSE="", ACK_OF_UNSENT="RST", ACK_TOO_OLD="RST",
                RETRANSMIT="SYN ACK"),
        "ABORT": _ABORTED,
        "SYN_ACK": Step("ESTABLISHED", "ACK"),
        "ACK": Step("ESTABLISHED"),
        "DATA": Step("ESTABLISHED"),
        "DATA_EARLY": Step("ESTABLISHED", "ACK"),
        "DATA_UNWANTED": _UNWANTED,
        "FIN": Step("CLOSE_WAIT", "ACK"),
        "RST": Step("CLOSED", "", "ECONNREFUSED"),
        **dict.fromkeys(_LIMITS, _TIMED_OUT),
    },
    "ESTABLISHED": {
        **_stay("ESTABLISHED", **_SYNCHRONIZED, **_RECEIVING, UNREACHABLE=""),
        **_stay("ESTABLISHED", SEND="DATA", RETRANSMIT="DATA", PERSIST="DATA", KEEPALIVE="ACK"),
        "SHUTDOWN": Step("FIN_WAIT_1", "FIN"),
        "CLOSE": Step("FIN_WAIT_1", "FIN"),
        "CLOSE_UNREAD": _ABORTED,
        "ABORT": _ABORTED,
        "FIN": Step("CLOSE_WAIT", "ACK"),
        "RST": _RESET,
        "KEEPALIVE_LIMIT": _TIMED_OUT,
        **dict.fromkeys(_LIMITS, _TIMED_OUT),
    },
    "FIN_WAIT_1": {
        **_stay("FIN_WAIT_1", **_SYNCHRONIZED, **_RECEIVING, UNREACHABLE=""),
        **_stay("FIN_WAIT_1", SEND="", SHUTDOWN="", CLOSE="", RETRANSMIT="FIN", PERSIST="DATA"),
        "CLOSE_UNREAD": _ABORTED,
        "ABORT": _ABORTED,
        "ACK_OF_FIN": Step("FIN_WAIT_2"),
        "DATA_UNWANTED": _UNWANTED,
        "FIN": Step("CLOSING", "ACK"),
        "RST": _RESET,
        **dict.fromkeys(_LIMITS, _TIMED_OUT),
    },
    "FIN_WAIT_2": {
        **_stay("FIN_WAIT_2", **_SYNCHRONIZED, **_RECEIVING, UNREACHABLE="", ACK_OF_FIN=""),
        **_stay("FIN_WAIT_2", SEND="", SHUTDOWN="", CLOSE="", KEEPALIVE="ACK"),
        "CLOSE_UNREAD": _ABORTED,
        "ABORT": _ABORTED,
        "DATA_UNWANTED": _UNWANTED,
        "FIN": Step("TIME_WAIT", "ACK"),
        "RST": _RESET,
        "KEEPALIVE_LIMIT": _TIMED_OUT,
        "END": Step("CLOSED"),
    },
    "CLOSE_WAIT": {
        **_stay("CLOSE_WAIT", **_SYNCHRONIZED, **_RECEIVED, UNREACHABLE=""),
        **_stay("CLOSE_WAIT", SEND="DATA", RETRANSMIT="DATA", PERSIST="DATA", KEEPALIVE="ACK"),
        "SHUTDOWN": Step("LAST_ACK", "FIN"),
        "CLOSE": Step("LAST_ACK", "FIN"),
        "CLOSE_UNREAD": _ABORTED,
        "ABORT": _ABORTED,
        "RST": _RESET,
        "KEEPALIVE_LIMIT": _TIMED_OUT,
        **dict.fromkeys(_LIMITS, _TIMED_OUT),
    },
    # From here on both sides have said all. An end of these is no error of the application, and sends no RST
    # (section 3.10.5).
    "CLOSING": {
        **_stay("CLOSING", **_SYNCHRONIZED, **_RECEIVED, UNREACHABLE=""),
        **_stay("CLOSING", SEND="", SHUTDOWN="", CLOSE="", CLOSE_UNREAD="", RETRANSMIT="FIN", PERSIST="DATA"),
        "ABORT": Step("CLOSED", "", "ECONNABORTED"),
        "ACK_OF_FIN": Step("TIME_WAIT"),
        "RST": Step("CLOSED"),
        **dict.fromkeys(_LIMITS, _SILENT_TIMEOUT),
    },
    "LAST_ACK": {
        **_stay("LAST_ACK", **_SYNCHRONIZED, **_RECEIVED, UNREACHABLE=""),
        **_stay("LAST_ACK", SEND="", SHUTDOWN="", CLOSE="", CLOSE_UNREAD="", RETRANSMIT="FIN", PERSIST="DATA"),
        "ABORT": Step("CLOSED", "", "ECONNABORTED"),
        "ACK_OF_FIN": Step("CLOSED"),
        "RST": Step("CLOSED"),
        **dict.fromkeys(_LIMITS, _SILENT_TIMEOUT),
    },
    "TIME_WAIT": {
        **_stay("TIME_WAIT", **_SYNCHRONIZED, **_RECEIVED, UNREACHABLE="", ACK_OF_FIN=""),
        **_stay("TIME_WAIT", SEND="", SHUTDOWN="", CLOSE="", CLOSE_UNREAD=""),
        "ABORT": Step("CLOSED", "", "ECONNABORTED"),
        "RST": Step("CLOSED"),
        "END": Step("CLOSED"),
    },
}

_NO_FIN = "our FIN was not sent: this is ACK_OF_UNSENT"
_NOTHING_SENT = "nothing is outstanding"
_NO_WINDOW = "no sequence number or timestamp of the peer is known to compare with"
_NOTHING_READABLE = "nothing was received"
_NO_KEEPALIVE = "the SYN or FIN is outstanding: retransmission finds out whether the peer is there"
_ALL_ACKED = "what was behind the peer's FIN is acknowledged at once"
_OWNED = "the application is there, or its closing has changed the state"
_UNLIMITED = "nothing limits how long this state lasts"
_NOT_YET = "data wait for ESTABLISHED"


def _never(reason: str, states: str, *events: str) -> dict[tuple[str, str], str]:
    return {(state, event): reason for state in states.split() for event in events}


PROHIBITED: dict[tuple[str, str], str] = {
    **_never("there is no connection", "CLOSED", "ACK_OF_FIN", "DATA_UNWANTED", "DATA_OUTSIDE", "DATA_EARLY", "STALE",
             "ACK_TOO_OLD", "RETRANSMIT", "RETRANSMIT_LIMIT", "USER_TIMEOUT", "PERSIST", "DELAYED_ACK", "KEEPALIVE",
             "KEEPALIVE_LIMIT", "END"),
    **_never(_NOTHING_READABLE, "CLOSED SYN_SENT SYN_RECEIVED", "CLOSE_UNREAD"),
    **_never(_NO_WINDOW, "SYN_SENT", "DATA_OUTSIDE", "DATA_EARLY", "STALE", "ACK_TOO_OLD"),
    **_never(_NO_FIN, "SYN_SENT SYN_RECEIVED ESTABLISHED CLOSE_WAIT", "ACK_OF_FIN"),
    **_never(_OWNED, "SYN_SENT ESTABLISHED CLOSE_WAIT", "DATA_UNWANTED"),
    **_never("the peer has sent its FIN: no data come", "CLOSING LAST_ACK TIME_WAIT", "DATA_UNWANTED"),
    **_never(_NOTHING_SENT, "FIN_WAIT_2 TIME_WAIT", "RETRANSMIT", "RETRANSMIT_LIMIT", "USER_TIMEOUT", "PERSIST"),
    **_never(_NOT_YET, "SYN_SENT SYN_RECEIVED", "PERSIST"),
    **_never("nothing is to be acknowledged later", "SYN_SENT SYN_RECEIVED", "DELAYED_ACK"),
    **_never(_ALL_ACKED, "CLOSE_WAIT CLOSING LAST_ACK TIME_WAIT", "DELAYED_ACK"),
    **_never(_NO_KEEPALIVE, "SYN_SENT SYN_RECEIVED FIN_WAIT_1 CLOSING LAST_ACK", "KEEPALIVE", "KEEPALIVE_LIMIT"),
    **_never("it ends by itself", "TIME_WAIT", "KEEPALIVE", "KEEPALIVE_LIMIT"),
    **_never(_UNLIMITED, "SYN_SENT SYN_RECEIVED ESTABLISHED FIN_WAIT_1 CLOSE_WAIT CLOSING LAST_ACK", "END"),
}
"""Pairs that cannot be, each with its reason."""

LISTENER: Row = {
    "SYN": Step("LISTEN", "SYN ACK"),           # remembered in the SYN cache, or in the cookie
    "ACK": Step("ESTABLISHED"),                 # of such a SYN-ACK: a connection of its own; the listener stays
    "ACK_OF_UNSENT": Step("LISTEN", "RST"),     # of anything else (section 3.10.7.2)
    "SYN_ACK": Step("LISTEN", "RST"),
    "RST": Step("LISTEN"),                      # forgets the SYN that it is about
    "NO_ACK": Step("LISTEN"),
    "CLOSE": Step("CLOSED"),
    "ABORT": Step("CLOSED"),
}
"""The row of LISTEN, of sockets that have no control block."""
