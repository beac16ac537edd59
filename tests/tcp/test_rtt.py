"""RFC 6298, Karn's algorithm, RFC 7323's samples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tcp.sender import MS, SECOND, Sender


def test_before_the_first_sample() -> None:
    assert Sender().do("rto") == SECOND                                 # (2.1)


def test_first_and_second_sample() -> None:
    s = Sender()
    s.do("rtt_sample", 400 * MS)
    assert (s["SRTT"], s["RTTVAR"], s.do("rto")) == (400 * MS, 200 * MS, 1200 * MS)      # (2.2)
    s.do("rtt_sample", 600 * MS)
    # (2.3): RTTVAR = 3/4 * 200 + 1/4 * |400 - 600|, SRTT = 7/8 * 400 + 1/8 * 600
    assert (s["SRTT"], s["RTTVAR"], s.do("rto")) == (425 * MS, 200 * MS, 1225 * MS)


@given(st.lists(st.integers(0, 200 * SECOND), min_size=1, max_size=60))
def test_estimator_against_the_formula(samples: list[int]) -> None:
    s = Sender()
    srtt = rttvar = 0.0
    for index, one in enumerate(samples):
        s.do("rtt_sample", one)
        r = min(max(one, 1), 120 * SECOND)
        if index == 0:
            srtt, rttvar = r, r / 2
        else:
            rttvar = 0.75 * rttvar + 0.25 * abs(srtt - r)
            srtt = 0.875 * srtt + 0.125 * r
        assert s["SRTT"] == pytest.approx(srtt, abs=20) and s["RTTVAR"] == pytest.approx(rttvar, abs=40)
        assert s.do("rto") == pytest.approx(min(max(srtt + max(MS, 4 * rttvar), 200 * MS), 120 * SECOND), abs=200)


def test_bounds_and_backoff() -> None:
    s = Sender()
    s.do("rtt_sample", 1 * MS)
    expected = 200 * MS
    for backoff in range(40):
        s["BACKOFF"] = backoff
        assert s.do("rto") == min(expected, 120 * SECOND)              # (2.4), (2.5), (5.5)
        expected *= 2
    s.do("rtt_sample", 1 * MS)
    assert s["BACKOFF"] == 0


def test_one_segment_is_timed_per_round_trip() -> None:
    s = Sender()
    s.send(3 * s.mss)
    s.now += 30 * MS
    s.ack(1 + s.mss)
    assert s["SRTT"] == s["MIN_RTT"] == 30 * MS
    s.now += 5 * MS
    s.ack(1 + 2 * s.mss)
    assert s["SRTT"] == 30 * MS         # that one was not being timed
    s.send(s.mss)
    s.now += 38 * MS
    s.ack(1 + 3 * s.mss)
    assert s["SRTT"] == 30 * MS
    s.ack(1 + 4 * s.mss)
    assert s["SRTT"] == 31 * MS


def test_karn() -> None:
    """What was sent twice is not timed, and the backed-off RTO stays until something else is."""
    s = Sender()
    s.send(s.mss)
    s.timeout()
    assert s.output() == [(1, 1 + s.mss, True)]
    s.now += 7 * MS
    s.ack(1 + s.mss)
    assert s["SRTT"] == 0 and s.do("rto") == 2 * SECOND
    s.send(s.mss)
    s.now += 8 * MS
    s.ack(1 + 2 * s.mss)
    assert s["SRTT"] == 8 * MS and s.do("rto") == 200 * MS


def test_timestamps_tell_after_a_retransmission() -> None:
    s = Sender(stamps=True)
    s.send(s.mss)
    s.timeout()
    again = s.now
    s.output()
    s.now += 7 * MS
    s.ack(1 + s.mss, tsecr=again)
    assert s["SRTT"] == 7 * MS and s["BACKOFF"] == 0


@pytest.mark.parametrize("offset", [0, 0xFFFF_FFFF, 0x8000_0000])
def test_timestamp_wraps(offset: int) -> None:
    s = Sender(stamps=True)
    s["TS_OFFSET"] = offset
    s.send(s.mss)
    s["TIMED_POSITION"] = 0
    s.now += 9 * MS
    s.ack(1 + s.mss, tsecr=SECOND + offset * MS)
    assert s["SRTT"] == 9 * MS


def test_an_echo_that_is_none() -> None:
    s = Sender(stamps=True)
    s.send(s.mss)
    s["TIMED_POSITION"] = 0
    s.ack(1 + s.mss, tsecr=s.now + 50 * MS)
    assert s["SRTT"] == 0


def test_no_sample_from_an_ack_of_nothing_new() -> None:
    """RFC 7323 section 4.1."""
    s = Sender(stamps=True)
    s.send(2 * s.mss)
    s["TIMED_POSITION"] = 0
    s.now += 9 * MS
    s.ack(1, tsecr=SECOND)
    assert s["SRTT"] == 0


def test_timer() -> None:
    """RFC 6298 (5.1) to (5.3)."""
    s = Sender()
    s.send(s.mss)
    assert s["RTX_AT"] == s.now + SECOND
    s.now += 100 * MS
    s.send(s.mss)
    assert s["RTX_AT"] == s.now + 900 * MS
    s.ack(1 + s.mss)
    assert s["RTX_AT"] == s.now + s.do("rto")
    s.ack(1 + 2 * s.mss)
    assert s["RTX_AT"] == s["PROBE_AT"] == 0


def test_syn_that_was_lost() -> None:
    """RFC 6298 (5.7): 3 s until data were timed; RFC 5681 section 3.1: one segment."""
    s = Sender()
    for word in ("SND_UNA", "SND_NXT", "SND_MAX"):
        s[word] = 0
    s.do("sent", 0, 1, 0)
    assert s["RTX_AT"] == s.now + SECOND and s["PROBE_AT"] == 0
    s.timeout()
    assert s.do("recovery_next")[1] == 0        # a SYN is not ours to send
    s.do("sent", 0, 1, 1)
    assert s["RTX_AT"] == s.now + 2 * SECOND
    s.now += 10 * MS
    s.ack(1)
    assert s.do("rto") == 3 * SECOND and s["CWND"] == s.mss and s["BACKOFF"] == 0 and s["RTX_AT"] == 0
    s.do("congestion_init")
    assert s["CWND"] == s.mss
