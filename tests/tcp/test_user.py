"""What the application asks for: open, shutdown, close, abort."""

from __future__ import annotations

import errno

import pytest

from dataplane.shm import layout_tcp as T
from tests.tcp.cells import ISS, PEER, established, reach, segment, syn, until
from tests.tcp.rig import End


def test_open_takes_numbers_from_the_random_word() -> None:
    end = reach("CLOSED")
    end.request = T.REQ_OPEN
    out = end.run()
    assert out[0].seq == 0x9ABCDEF0 and end["TS_OFFSET"] == 0x12345678
    assert (out[0].mss, out[0].window) == (1460, 65535)
    assert end.run() == [] and end.state == "SYN_SENT"


def test_open_is_for_once() -> None:
    end = established()
    end.run(segment(end, "R"))
    assert end.state == "CLOSED" and end.run() == [] and end.state == "CLOSED"
    fresh = reach("CLOSED")
    fresh.request = T.REQ_OPEN | T.REQ_CLOSED
    assert fresh.run() == [] and fresh.state == "CLOSED"


def test_bytes_written_early_wait_for_the_handshake() -> None:
    end = End(iss=ISS)
    end.connect()
    end.write(b"early")
    end.shutdown()
    assert [(one.flags, one.data) for one in end.run()] == [("S", b"")]
    out = end.run(syn(end, "SA"))
    assert [(one.flags, one.data) for one in out] == [("FPA", b"early")] and end.state == "FIN_WAIT_1"


def test_the_fin_waits_behind_the_data() -> None:
    end = established()
    end.write(b"x" * 20_000)
    end.shutdown()
    assert all("F" not in one.flags for one in end.run()) and end.state == "FIN_WAIT_1"
    end.now += 1_000_000
    assert end.run(segment(end))[-1].flags == "FPA"


def test_half_close_goes_on_receiving() -> None:
    end = reach("FIN_WAIT_2")
    end.run(segment(end, data=b"more"))
    assert end.read() == b"more"


def test_half_closed_by_the_peer_goes_on_sending() -> None:
    end = reach("CLOSE_WAIT")
    end.write(b"more")
    assert [one.data for one in end.run()] == [b"more"]


@pytest.mark.parametrize("state", ["ESTABLISHED", "FIN_WAIT_1", "FIN_WAIT_2", "CLOSE_WAIT"])
def test_closing_with_unread_data_is_a_reset(state: str) -> None:
    """RFC 2525 section 2.17. Its number is the one that the peer expects."""
    end = reach(state, "CLOSE_UNREAD")
    nxt = end["SND_NXT"]
    end.close()
    out = end.run()
    assert [(one.flags, one.seq) for one in out] == [("RA", ISS + nxt)]
    assert end.state == "CLOSED" and end["ERROR"] == errno.ECONNABORTED


def test_closing_after_the_last_byte_was_read_is_no_reset() -> None:
    end = reach("CLOSE_WAIT", "CLOSE_UNREAD")
    assert end.read() == b"unread"
    end.close()
    assert [one.flags for one in end.run()] == ["FA"]


def test_data_for_nobody_are_refused() -> None:
    """RFC 9293 section 3.6.1; what was received before is not."""
    end = established()
    end.run(segment(end, data=b"read"))
    end.read()
    end.close()
    end.run()
    again = segment(end, at=-4, data=b"read")
    assert [one.flags for one in end.run(again)] == ["A"] and end.state == "FIN_WAIT_1"
    assert [one.flags for one in end.run(segment(end, data=b"new"))] == ["RA"] and end.state == "CLOSED"


def test_shutdown_first_and_close_later() -> None:
    end = established()
    end.shutdown()
    end.run()
    end.run(segment(end, "A", fin=True, data=b"answer"))
    assert end.read() == b"answer"
    end.close()
    assert all("R" not in one.flags for one in end.run()) and end["FLAGS"] & T.TF_ORPHAN
    end.run(segment(end, "FA"))
    assert end.state == "TIME_WAIT"


def test_the_state_ends_with_the_peers_fin_first() -> None:
    end = reach("LAST_ACK")
    end.run(segment(end, fin=True))
    assert end.state == "CLOSED" and end["ERROR"] == 0 and end.deadline == 0


def test_a_connection_that_is_over_answers_with_resets() -> None:
    end = established()
    end.abort()
    assert [(one.flags, one.seq, one.ack) for one in end.run()] == [("RA", ISS + 1, PEER + 1)]
    late = segment(end, data=b"late")
    assert [(one.flags, one.seq) for one in end.run(late)] == [("R", late.ack)]
    assert end.run() == []


def test_a_request_is_granted_once() -> None:
    end = established()
    end.shutdown()
    assert len(end.run()) == 1
    for _ in range(3):
        assert end.run() == []
    until(end, "RTX_AT" if not end["PROBE_AT"] else "PROBE_AT")
    assert end["FIN_AT"] == 1 and end.state == "FIN_WAIT_1"
