"""The window: RFC 6928, 5681, 9438. CUBIC against its formulas in floats, segments and seconds as in the RFC."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.shm import layout_tcp as T
from dataplane.tcp.congestion import CWND_MAX
from tests.tcp.sender import MS, MSS, SECOND, Sender, plain_module

C, BETA = 0.4, 0.7


def acked(s: Sender, length: int) -> None:
    plain_module("congestion").congestion_acked(s.memory, s.X, length, s.now)


def w_cubic(t: float, w_max: float, cwnd: float) -> float:
    """RFC 9438 section 4.2, in segments and seconds."""
    k = ((w_max - cwnd) / C) ** (1 / 3) if cwnd < w_max else 0.0
    return C * (t - k) ** 3 + w_max


@pytest.mark.parametrize(("mss", "window"), [(536, 5360), (1220, 12200), (1460, 14600), (2000, 14600), (8960, 17920)])
def test_initial_window(mss: int, window: int) -> None:
    s = Sender(mss=mss)
    assert s["CWND"] == window and s["SSTHRESH"] == CWND_MAX      # RFC 6928 section 2


def test_slow_start_ends_at_ssthresh() -> None:
    s = Sender(newreno=True)
    s["SSTHRESH"] = 15 * MSS
    acked(s, 3 * MSS)
    assert s["CWND"] == 13 * MSS
    acked(s, 5 * MSS)       # two of it in slow start, three in congestion avoidance
    assert s["CWND"] == 15 * MSS and s["CWND_ACKED"] == 3 * MSS


def test_newreno_grows_by_a_segment_a_window() -> None:
    s = Sender(newreno=True)
    s["CWND"] = s["SSTHRESH"] = 20 * MSS
    for _ in range(19):
        acked(s, MSS)
    assert s["CWND"] == 20 * MSS
    acked(s, MSS)
    assert s["CWND"] == 21 * MSS
    acked(s, 10 * 21 * MSS)
    assert s["CWND"] == 31 * MSS


@pytest.mark.parametrize(("newreno", "kept"), [(True, 50), (False, 70)])
def test_loss(newreno: bool, kept: int) -> None:
    s = Sender(newreno=newreno)
    s["CWND"] = 100 * MSS
    s.send(100 * MSS)
    plain_module("congestion").congestion_loss(s.memory, s.X)
    assert s["CWND"] == s["SSTHRESH"] == kept * MSS             # RFC 5681 (4); RFC 9438 section 4.6
    assert newreno or s["CUBIC_MAX"] == 100 * MSS


def test_loss_with_little_in_flight() -> None:
    s = Sender()
    s.send(MSS)
    plain_module("congestion").congestion_loss(s.memory, s.X)
    assert s["SSTHRESH"] == 2 * MSS


def test_fast_convergence() -> None:
    s = Sender()
    s["CWND"], s["CUBIC_MAX"] = 100 * MSS, 120 * MSS
    s.send(100 * MSS)
    plain_module("congestion").congestion_loss(s.memory, s.X)
    assert s["CUBIC_MAX"] == 85 * MSS           # RFC 9438 section 4.7: cwnd * (1 + beta) / 2


def test_timeout() -> None:
    s = Sender()
    s["CWND"] = 40 * MSS
    s.send(40 * MSS)
    s.timeout()
    assert s["CWND"] == MSS and s["SSTHRESH"] == 28 * MSS
    s.output()
    s.timeout()
    assert s["CWND"] == MSS and s["SSTHRESH"] == 28 * MSS      # RFC 5681 section 3.1: held constant


@given(st.integers(2, 20_000), st.floats(0.05, 1.0), st.integers(0, 60_000))
def test_cubic_function(segments: int, share: float, elapsed_ms: int) -> None:
    """W_cubic(t) and K, against section 4.2."""
    module = plain_module("cubic")
    w_max, cwnd = segments * MSS, max(int(segments * share * MSS), MSS)
    k = module.cubic_k(w_max, cwnd, MSS)
    found = module.cubic_window(w_max, k, elapsed_ms * MS, MSS) / MSS
    assert found == pytest.approx(w_cubic(elapsed_ms / 1000, w_max / MSS, cwnd / MSS), rel=1e-6, abs=1e-3)


def test_k_of_a_known_window() -> None:
    """W_max = 100 segments, reduced to 70: K = cbrt(30 / 0.4) = 4.217 s."""
    assert plain_module("cubic").cubic_k(100 * MSS, 70 * MSS, MSS) == pytest.approx(4.217 * SECOND, rel=1e-3)


@pytest.mark.parametrize(("window", "rtt_ms"), [(1000, 100), (400, 50), (3000, 200)])
def test_cubic_follows_its_curve(window: int, rtt_ms: int) -> None:
    """After a loss, one acknowledgement at a time: the window is W_cubic(t + RTT) or a little behind it."""
    s = Sender()
    s.do("rtt_sample", rtt_ms * MS)
    s["CWND"] = window * MSS
    s.send(window * MSS)
    plain_module("congestion").congestion_loss(s.memory, s.X)
    began, start = s.now, s["CWND"] / MSS
    for step in range(60):
        cwnd = s["CWND"]
        for _ in range(cwnd // MSS // 20):
            acked(s, 20 * MSS)
        t = step * rtt_ms / 1000
        estimate = start + 3 * (1 - BETA) / (1 + BETA) * (step + 1)
        target = max(w_cubic(t + rtt_ms / 1000, window, start), estimate if estimate < window else 0)
        assert s["CWND"] / MSS <= max(target * 1.02 + 2, start)
        assert s["CWND"] / MSS >= min(w_cubic(t, window, start), 1.5 * cwnd / MSS) * 0.95 - 2
        s.now = began + (step + 1) * rtt_ms * MS


def test_reno_friendly_region() -> None:
    """A short round trip and a small window: RFC 9438 section 4.3. 3 (1 - b) / (1 + b) segments a round trip."""
    s = Sender()
    s.do("rtt_sample", MS)
    s["CWND"] = 20 * MSS
    s.send(20 * MSS)
    plain_module("congestion").congestion_loss(s.memory, s.X)
    expected = 14.0
    for _ in range(30):
        for _ in range(s["CWND"] // MSS):
            acked(s, MSS)
        expected += 1.0 if expected >= 20 else 3 * (1 - BETA) / (1 + BETA)
        s.now += MS
    assert s["CWND"] / MSS == pytest.approx(expected, rel=0.05)


def test_stage_after_slow_start_or_timeout_starts_at_its_own_window() -> None:
    """Sections 4.8 and 4.10."""
    s = Sender()
    s["CWND"] = s["SSTHRESH"] = 50 * MSS
    acked(s, MSS)
    assert s["CUBIC_MAX"] == 50 * MSS and s["CUBIC_K"] == 0


def test_growth_is_bounded() -> None:
    s = Sender()
    s["CWND"] = s["SSTHRESH"] = 50 * MSS
    acked(s, MSS)
    s.now += 3600 * SECOND
    before = s["CWND"]
    acked(s, 1 << 29)
    assert s["CWND"] <= 1.5 * before + 1        # section 4.2: target within 1.5 cwnd
    for _ in range(100):
        acked(s, 1 << 29)
    assert s["CWND"] == CWND_MAX


def test_idle_restart() -> None:
    """RFC 5681 section 4.1; RFC 9438 section 4.2: t leaves idle time out."""
    s = Sender()
    s.do("rtt_sample", 10 * MS)
    s["CWND"] = s["SSTHRESH"] = 80 * MSS
    s.send(MSS)
    acked(s, MSS)
    epoch = s["CUBIC_AT"]
    s.now += 10 * MS
    s.ack(1 + MSS)
    grown = s["CWND"]
    s.now += 100 * MS
    assert s.do("send_allowance") == grown
    s.now += 200 * MS
    assert s.do("send_allowance") == s["CWND"] == 10 * MSS and s["CUBIC_AT"] == epoch + 310 * MS
    assert s["SSTHRESH"] == 80 * MSS


def test_no_growth_while_the_application_limits() -> None:
    """RFC 9438 section 5.8."""
    s = Sender()
    s["CWND"] = s["SSTHRESH"] = 100 * MSS
    for _ in range(50):
        s.send(2 * MSS)
        s.now += 10 * MS
        s.ack(s["SND_MAX"])
    assert s["CWND"] == 100 * MSS


def test_growth_when_it_is_in_use() -> None:
    s = Sender()
    for _ in range(3):
        s.output()
        s.now += 10 * MS
        s.ack(s["SND_MAX"])
    assert s["CWND"] == 80 * MSS


def test_undo() -> None:
    s = Sender()
    s["CWND"], s["SSTHRESH"] = 30 * MSS, 25 * MSS
    s.send(30 * MSS)
    plain_module("congestion").congestion_loss(s.memory, s.X)
    plain_module("congestion").congestion_undo(s.memory, s.X)
    assert (s["CWND"], s["SSTHRESH"], s["CUBIC_MAX"]) == (30 * MSS, 25 * MSS, 0)
    s["CWND"] = 1 * MSS
    plain_module("congestion").congestion_undo(s.memory, s.X)
    assert s["CWND"] == MSS                     # once


def test_newreno_can_be_chosen_at_any_time() -> None:
    s = Sender()
    s["CWND"] = s["SSTHRESH"] = 10 * MSS
    acked(s, MSS)
    s.set(s.X + T.X_OPTIONS, T.OPT_NEWRENO)
    acked(s, 40 * MSS)
    assert s["CWND"] >= 13 * MSS
