"""A peer that knows where the connection stands: brings an end into any state, and makes the segments of any event."""

from __future__ import annotations

import errno
from typing import Any

from dataplane.shm import layout_tcp as T
from tests.tcp.rig import MS, End, Segment

__all__ = ["ISS", "PEER", "established", "fire", "reach", "segment", "syn", "take", "until"]

ISS, PEER = 1000, 5000
PLAIN: dict[str, Any] = {"mss": 1460, "shift": 7, "sack_ok": True}


def segment(end: End, flags: str = "A", *, at: int = 0, ack: int | None = None, fin: bool = False, data: bytes = b"",
            window: int = 512, stamp: int = 0, **more: Any) -> Segment:
    """Return a segment `at` positions behind what `end` expects. It acknowledges all that was sent, our FIN only
    with `fin`, or up to the position `ack`."""
    if ack is None:
        pending = end["FLAGS"] & T.TF_FIN_SENT and end["SND_UNA"] <= end["FIN_AT"]
        ack = end["SND_MAX"] - (1 if pending and not fin else 0)
    if "ts" not in more and end["FLAGS"] & T.TF_TIMESTAMPS and "S" not in flags:
        more["ts"] = (end.now // MS + stamp, (end.now // MS + end.ts_offset) & 0xFFFFFFFF)
    return Segment(flags, end["IRS"] + end["RCV_NXT"] + at, end["ISS"] + ack, window, data, **more)


def syn(end: End, flags: str) -> Segment:
    """Return the SYN of the peer, as it answers `connect`."""
    return Segment(flags, PEER, ISS + 1 if "A" in flags else 0, 65535, ts=(end.now // MS, end.now // MS + 77), **PLAIN)


def established(mode: str = "plain", *, options: dict[str, Any] | None = None, **sizes: Any) -> End:
    """Return an end that has opened a connection. `options`: of the peer's SYN, in place of the usual ones."""
    end = End(mode, iss=ISS, **sizes)
    end.connect()
    end.run()
    answer = syn(end, "SA")
    if options is not None:
        answer = Segment("SA", PEER, ISS + 1, 65535, **options)
    end.run(answer)
    assert end.state == "ESTABLISHED"
    return end


def shut_window(end: End, size: int = 5) -> None:
    """Let data wait for a window that is closed."""
    end.run(segment(end, window=0))
    end.write(b"x" * size)
    assert end.run() == []


def reach(state: str, event: str = "", mode: str = "plain") -> End:
    """Return an end in `state`, such that `event` is possible."""
    if state in ("CLOSED", "SYN_SENT", "SYN_RECEIVED"):
        end = End(mode, iss=ISS)
        end["MTU"], end["IP_BYTES"] = 1500, 20
        for word in ("MSS", "PEER_MSS", "CWND", "SSTHRESH"):
            end[word] = 48      # as service_load leaves the block of an unused slot
        if state != "CLOSED":
            end.connect()
            end.run()
        if state == "SYN_RECEIVED":
            end.run(syn(end, "S"))
        if event == "DATA_UNWANTED":
            end.close()
            end.run()
        assert end.state == state
        return end
    end = established(mode)
    if event == "CLOSE_UNREAD":
        end.run(segment(end, data=b"unread"))
    if state in ("CLOSE_WAIT", "LAST_ACK"):
        end.run(segment(end, "FA"))
    if event == "PERSIST":
        shut_window(end)
    if state not in ("ESTABLISHED", "CLOSE_WAIT"):
        if event in ("DATA_UNWANTED", "END"):
            end.close()
        else:
            end.shutdown()
        end.run()
    if state in ("FIN_WAIT_2", "TIME_WAIT"):
        end.run(segment(end, fin=True))
    if state in ("CLOSING", "TIME_WAIT"):
        end.run(segment(end, "FA", window=0 if event == "PERSIST" else 512))
    needs_data = event in ("RETRANSMIT", "RETRANSMIT_LIMIT", "USER_TIMEOUT", "UNREACHABLE")
    if needs_data and state in ("ESTABLISHED", "CLOSE_WAIT"):
        end.write(b"data")
        end.run()
    if event == "DELAYED_ACK":
        end.run(segment(end, data=b"data"))
    assert end.state == state, end.state
    return end


def until(end: End, word: str) -> list[Segment]:
    """Let time pass to the timer `word`."""
    assert end[word] > 0, f"{word} does not run"
    end.now = max(end.now, end[word])
    return end.run()


def exhaust(end: End, word: str) -> list[Segment]:
    """Let the timer `word` pass again and again until the state changes."""
    before = end.state
    for _ in range(40):
        out = until(end, word)
        if end.state != before:
            return out
    raise AssertionError("it never gives up")


def keep(end: End) -> None:
    end.options |= T.OPT_KEEPALIVE
    end.set(end.x + T.X_KEEP_COUNT, 3)
    end.run()


def _user(end: End, event: str) -> list[Segment]:
    match event:
        case "OPEN":
            end.request |= T.REQ_OPEN
        case "SEND":
            end.write(b"data")
        case "SHUTDOWN":
            end.shutdown()
        case "CLOSE":
            end.close()
        case "CLOSE_UNREAD":
            end.close()
        case "ABORT":
            end.abort()
    return end.run()


def _segment(end: End, event: str) -> Segment | None:
    state = end.state
    window = end["RCV_RIGHT"] - end["RCV_NXT"]
    match event:
        case "SYN":
            return syn(end, "S") if state in ("CLOSED", "SYN_SENT") else segment(end, "S", at=10)
        case "SYN_ACK":
            return syn(end, "SA")
        case "ACK" | "ACK_OF_FIN":
            return segment(end, fin=event == "ACK_OF_FIN")
        case "DATA" | "DATA_UNWANTED":
            return segment(end, data=b"data")
        case "DATA_OUTSIDE":
            return segment(end, at=window, data=b"data")
        case "DATA_EARLY":
            return segment(end, at=100, data=b"data")
        case "FIN":
            again = state in ("CLOSE_WAIT", "CLOSING", "LAST_ACK", "TIME_WAIT")
            return segment(end, "FA", at=-1 if again else 0, fin=state == "TIME_WAIT")
        case "RST":
            return segment(end, "RA")
        case "RST_INSIDE":
            return segment(end, "R", at=10)
        case "RST_OUTSIDE":
            return segment(end, "RA", at=window + 1, ack=end["SND_MAX"] + 1)
        case "ACK_OF_UNSENT":
            return segment(end, ack=end["SND_MAX"] + 1)
        case "ACK_TOO_OLD":
            return segment(end, ack=end["SND_UNA"] - end["MAX_WND"] - 1)
        case "NO_ACK":
            return segment(end, "", data=b"data")
        case "STALE":
            return segment(end, data=b"data", stamp=-100)
    return None


def _time(end: End, event: str) -> list[Segment]:
    match event:
        case "RETRANSMIT":
            end["PROBE_AT"] = 0     # a tail-loss probe would come first
            return until(end, "RTX_AT")
        case "RETRANSMIT_LIMIT":
            return exhaust(end, "RTX_AT")
        case "USER_TIMEOUT":
            end.set(end.x + T.X_USER_TIMEOUT, 100 * MS)
            end.now += 100 * MS
            return end.run()
        case "PERSIST":
            return until(end, "PERSIST_AT")
        case "DELAYED_ACK":
            return until(end, "DELACK_AT")
        case "KEEPALIVE":
            keep(end)
            return until(end, "KEEP_AT")
        case "KEEPALIVE_LIMIT":
            keep(end)
            return exhaust(end, "KEEP_AT")
        case "END":
            return until(end, "END_AT")
    raise LookupError(event)


def take(end: End, *segments: Segment, control: tuple[int, int, int] | None = None) -> list[Segment]:
    """Like End.run, with the events of the arrival too."""
    end.set(end.x + T.X_EVENTS, 0)
    end.arrive(*segments)
    if control:
        end.control(*control)
    events = end.word(end.x + T.X_EVENTS)
    out = end.run()
    end.events |= events
    return out


def fire(end: End, event: str) -> list[Segment]:
    """Let `event` happen; what is sent at once."""
    if event in ("OPEN", "SEND", "SHUTDOWN", "CLOSE", "CLOSE_UNREAD", "ABORT"):
        return _user(end, event)
    if event == "UNREACHABLE":
        return take(end, control=(T.CTL_UNREACHABLE, errno.EHOSTUNREACH, end["ISS"] + end["SND_UNA"]))
    if one := _segment(end, event):
        end.now += MS
        return take(end, one)
    return _time(end, event)

