"""Timers: what is due when, and when it is given up."""

from __future__ import annotations

import errno

import pytest

from dataplane.shm import layout_tcp as T
from tests.tcp.cells import established, exhaust, fire, keep, reach, segment, until
from tests.tcp.rig import MS, SECOND, End


def times(end: End, word: str, count: int) -> list[float]:
    """Return the intervals between `count` expiries, in seconds."""
    found = []
    for _ in range(count):
        before = end.now
        until(end, word)
        found.append((end.now - before) / SECOND)
    return found


# -- retransmission ------------------------------------------------------------------------------------------


def test_a_syn_is_sent_again_with_doubled_intervals() -> None:
    """RFC 6298 (5.5); MUST-23: at least 3 minutes in all."""
    end = reach("SYN_SENT")
    start = end.now
    assert times(end, "RTX_AT", 3) == [1, 2, 4]
    exhaust(end, "RTX_AT")
    assert end.state == "CLOSED" and end["ERROR"] == errno.ETIMEDOUT and end.now - start >= 180 * SECOND


def test_a_syn_ack_is_sent_again() -> None:
    end = reach("SYN_RECEIVED")
    assert [one.flags for one in until(end, "RTX_AT")] == ["SA"]


def test_data_are_given_up_after_more_than_100_seconds() -> None:
    """Section 3.8.3: R2."""
    end = reach("ESTABLISHED", "RETRANSMIT")
    start = end.now
    out = exhaust(end, "RTX_AT")
    assert [one.flags for one in out] == ["RA"] and end["ERROR"] == errno.ETIMEDOUT
    assert end.now - start > 600 * SECOND


def test_an_orphan_is_given_up_earlier() -> None:
    end = established()
    end.close()
    end.run()
    start = end.now
    exhaust(end, "RTX_AT")
    assert end.now - start < 300 * SECOND


def test_an_answer_begins_the_count_anew() -> None:
    end = reach("ESTABLISHED", "RETRANSMIT")
    for _ in range(5):
        until(end, "RTX_AT")
    end.now += MS
    end.run(segment(end))
    assert end["BACKOFF"] == 0 and end["RTX_AT"] == 0


def test_a_peer_that_took_its_window_back_but_answers_is_not_given_up() -> None:
    """MUST-37 with data under way."""
    end = established()
    end.write(b"x" * 5000)
    end.run()
    for _ in range(40):
        end.run(segment(end, ack=1, window=0))
        until(end, "RTX_AT")
        end.now += MS
    assert end.state == "ESTABLISHED"
    end.run(segment(end))
    assert end["SND_UNA"] == 5001


def test_a_tail_loss_probe_comes_before_the_timeout() -> None:
    """RFC 8985 section 7."""
    end = reach("ESTABLISHED", "RETRANSMIT")
    assert end["PROBE_AT"] and end["PROBE_AT"] <= end["RTX_AT"]
    assert [one.data for one in until(end, "PROBE_AT")] == [b"data"]
    assert end["BACKOFF"] == 0


# -- delayed ACK ---------------------------------------------------------------------------------------------


def test_a_delayed_ack_is_not_put_off_by_more_data() -> None:
    end = established()
    end.run(segment(end, data=b"a"))
    at = end["DELACK_AT"]
    assert at - end.now <= 500 * MS and end.deadline == at
    end.now += 30 * MS
    # Each is as large as the largest so far, so two are due only together.
    end["RCV_MSS"] = 1448
    end.run(segment(end, data=b"a"))
    assert end["DELACK_AT"] == at
    assert len(until(end, "DELACK_AT")) == 1 and end["DELACK_AT"] == 0


# -- zero window ---------------------------------------------------------------------------------------------


def test_window_probes_go_on_while_the_peer_answers() -> None:
    """Section 3.8.6.1, MUST-36, MUST-37; the interval grows."""
    end = reach("ESTABLISHED", "PERSIST")
    intervals = []
    for _ in range(40):
        before = end.now
        out = until(end, "PERSIST_AT")
        intervals.append((end.now - before) / SECOND)
        assert [(one.flags, one.data) for one in out] == [("A", b"x")]
        assert end.run(segment(end, ack=1, window=0)) == []
    assert end.state == "ESTABLISHED"
    assert intervals[0] < 1.5 and intervals[:6] == sorted(set(intervals[:6])) and max(intervals) == 60


def test_a_probe_that_is_taken_counts() -> None:
    end = reach("ESTABLISHED", "PERSIST")
    until(end, "PERSIST_AT")
    out = end.run(segment(end, ack=2))
    assert [one.data for one in out] == [b"xxxx"] and end["SND_UNA"] == 2 and end["PERSIST_AT"] == 0


def test_a_fin_is_a_probe_too() -> None:
    end = established()
    end.run(segment(end, window=0))
    end.shutdown()
    assert end.run() == []
    assert [one.flags for one in until(end, "PERSIST_AT")] == ["FA"]
    end.run(segment(end, window=0))
    assert end.state == "FIN_WAIT_1"
    end.run(segment(end, fin=True))
    assert end.state == "FIN_WAIT_2" and end["PERSIST_AT"] == 0


def test_a_silent_peer_with_a_closed_window_is_given_up() -> None:
    end = reach("ESTABLISHED", "PERSIST")
    exhaust(end, "PERSIST_AT")
    assert end["ERROR"] == errno.ETIMEDOUT


def test_an_orphan_does_not_wait_for_a_window_for_ever() -> None:
    end = reach("ESTABLISHED", "PERSIST")
    end.close()
    end.run()
    for _ in range(20):
        if end.state == "CLOSED":
            break
        until(end, "PERSIST_AT")
        end.run(segment(end, ack=1, window=0))
    assert end.state == "CLOSED"


# -- keepalive (section 3.8.4) -------------------------------------------------------------------------------


def test_keepalive_is_off_unless_asked_for() -> None:
    assert established().deadline == 0


def test_keepalive_probes_have_no_data_and_an_old_number() -> None:
    end = established()
    keep(end)
    assert end["KEEP_AT"] == end.now + 7200 * SECOND
    out = until(end, "KEEP_AT")
    assert [(one.flags, one.seq, one.data) for one in out] == [("A", end.iss + end["SND_NXT"] - 1, b"")]
    end.run(segment(end))
    assert end["KEEP_PROBES"] == 0
    before = end.now
    assert until(end, "KEEP_AT") == [] and until(end, "KEEP_AT") != []
    assert end.now == before + 7200 * SECOND


def test_a_sign_of_life_puts_keepalive_off() -> None:
    end = established()
    keep(end)
    end.now += 7000 * SECOND
    end.run(segment(end))
    heard = end.now
    assert until(end, "KEEP_AT") == []
    assert end["KEEP_AT"] == heard + 7200 * SECOND


def test_keepalive_gives_up() -> None:
    end = established()
    keep(end)
    start = end.now
    assert [one.flags for one in exhaust(end, "KEEP_AT")] == ["RA"]
    assert end["ERROR"] == errno.ETIMEDOUT and end.now == start + (7200 + 3 * 75) * SECOND


# -- user timeout (section 3.8.3, RFC 5482) ------------------------------------------------------------------


@pytest.mark.parametrize("state", ["ESTABLISHED", "CLOSE_WAIT", "FIN_WAIT_1", "SYN_SENT"])
def test_the_user_timeout_is_a_deadline(state: str) -> None:
    end = reach(state, "USER_TIMEOUT")
    end.set(end.x + T.X_USER_TIMEOUT, 5 * SECOND)
    since = end["STALL_AT"]
    for _ in range(30):
        if end.state == "CLOSED":
            break
        end.now = end.deadline
        end.run()
    assert end["ERROR"] == errno.ETIMEDOUT and end.now == since + 5 * SECOND


def test_progress_puts_the_user_timeout_off() -> None:
    end = established()
    end.set(end.x + T.X_USER_TIMEOUT, SECOND)
    end.write(b"x" * 14480)
    end.run()
    for i in range(1, 10):
        end.now += 900 * MS
        end.run(segment(end, ack=1 + i * 1448))
        assert end.state == "ESTABLISHED"
    end.run(segment(end))
    assert end["STALL_AT"] == 0


# -- ends ----------------------------------------------------------------------------------------------------


def test_time_wait_lasts_as_long_as_it_is_told_to() -> None:
    end = reach("TIME_WAIT")
    assert end.deadline == end.now + 60 * SECOND
    end.now += 60 * SECOND - 1
    end.run()
    assert end.state == "TIME_WAIT"
    end.now += 1
    end.run()
    assert (end.state, end["ERROR"], end.deadline) == ("CLOSED", 0, 0)


def test_fin_wait_2_is_bounded_only_without_application() -> None:
    end = reach("FIN_WAIT_2")
    assert end.deadline == 0
    end.close()
    end.run()
    assert end.deadline == end.now + 60 * SECOND
    until(end, "END_AT")
    assert end.state == "CLOSED"


def test_an_end_stops_all_timers() -> None:
    for state in ("SYN_SENT", "ESTABLISHED", "FIN_WAIT_1", "TIME_WAIT"):
        end = reach(state, "RETRANSMIT" if state == "ESTABLISHED" else "")
        fire(end, "RST" if state != "SYN_SENT" else "ABORT")
        assert end.state == "CLOSED" and end.deadline == 0
