"""Scripted peers: opening, closing, resets, and what a forger may not do.

Positions count from each side's SYN; times are ms (see script.py).
"""

from __future__ import annotations

import errno

import pytest

from dataplane.shm import layout_tcp as T
from tests.tcp.rig import MODES, SECOND, WRAP
from tests.tcp.script import Peer

RTO_FIRST = 1000        # ms, RFC 6298 (2.1)


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def opened(mode, **settings):
    peer = Peer(mode, **settings)
    peer.connect()
    return peer


# -- opening -----------------------------------------------------------------------------------------------


def test_the_syn_offers_everything(mode):
    peer = Peer(mode, mtu=1500, receive=1 << 18)
    peer.end.connect()
    peer.run()
    one = peer.expect("S", seq=0, data=0)
    assert (one.mss, one.shift, one.sack_ok) == (1460, 3, True) and one.ts and one.ts[1] == 0
    assert one.window == 65535      # never scaled (RFC 7323 section 2.2)


def test_the_syn_over_ipv6(mode):
    peer = Peer(mode, mtu=1280, ip_bytes=40)
    peer.end.connect()
    peer.run()
    assert peer.expect("S").mss == 1220


@pytest.mark.parametrize("sack", [False, True])
@pytest.mark.parametrize("ts", [False, True])
@pytest.mark.parametrize("shift", [None, 0, 14])
def test_what_the_peer_does_not_offer_is_not_used(sack, ts, shift):
    peer = opened("plain", sack=sack, ts=ts, shift=shift, window=5000)
    assert peer.end["SND_WND"] == 5000
    peer.send("PA", seq=1001, data=100)     # a hole before it
    one = peer.expect("A", ack=1)
    assert bool(one.sacks) == sack and bool(one.ts) == ts and one.shift is None and one.mss is None
    peer.send("PA", seq=1, data=2000)
    peer.expect("A", ack=2001)
    peer.send("A", seq=2001, win=0x4000)
    assert peer.end["SND_WND"] == 0x4000 >> (shift or 0) << (shift or 0)


def test_syn_is_repeated_with_backoff(mode):
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.mark()
    first = peer.expect("S")
    for at in (1000, 3000, 7000, 15000):
        peer.wait_for_output()
        again = peer.expect("S", at=at, seq=0)
        assert (again.mss, again.shift, again.sack_ok) == (first.mss, first.shift, first.sack_ok)


def test_connect_times_out(mode):
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.wait(400_000)
    peer.state("CLOSED")
    assert peer.end["ERROR"] == errno.ETIMEDOUT and peer.end.deadline == 0
    assert all(one.segment.flags == "S" for one in peer.out) and len(peer.out) >= 4


def test_late_syn_ack(mode):
    """Karn: a SYN that was sent twice gives no round trip without timestamps; the RTO is 3 s then (RFC 6298 5.7)."""
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.wait(1500)
    peer.expect("S")
    peer.settle(peer.expect("S"))
    peer.run(peer.syn("SA", 1))
    peer.expect("A", seq=1, ack=1)
    assert peer.end["CWND"] == peer.end["MSS"]      # RFC 6928 section 2, RFC 5681 section 3.1
    peer.seq = 1
    peer.write(100)
    peer.mark()
    peer.expect("PA", data=100)
    assert 2999 * 1_000_000 <= peer.end["RTX_AT"] - peer.end.now <= 3000 * 1_000_000


def test_refused(mode):
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.expect("S")
    peer.send("RA", seq=0, ack=1)
    peer.state("CLOSED")
    peer.nothing()
    assert peer.end["ERROR"] == errno.ECONNREFUSED
    peer.run()
    peer.state("CLOSED")


@pytest.mark.parametrize("ack", [0, 2, -5])
def test_resets_that_do_not_acknowledge_our_syn(mode, ack):
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.expect("S")
    peer.send("RA", seq=0, ack=ack)
    peer.send("R", seq=0)
    peer.nothing()
    peer.state("SYN_SENT")


@pytest.mark.parametrize("flags", ["A", "SA"])
@pytest.mark.parametrize("ack", [0, 2, 100_000])
def test_an_ack_of_something_else_in_syn_sent(mode, flags, ack):
    """RFC 9293 section 3.10.7.3: a reset with the number that they expect."""
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.expect("S")
    peer.send(flags, seq=0, ack=ack)
    one = peer.expect("R", seq=ack if ack < WRAP else 0)
    assert not one.data
    peer.nothing()
    peer.state("SYN_SENT")


def test_an_ack_without_syn_in_syn_sent(mode):
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.expect("S")
    peer.send("A", seq=1, ack=1)
    peer.nothing()
    peer.state("SYN_SENT")


def test_syn_ack_with_data_and_fin(mode):
    peer = Peer(mode, ts=False)
    peer.end.connect()
    peer.run()
    peer.settle(peer.expect("S"))
    one = peer.syn("SA", 1)
    one.data = bytes(7)
    peer.run(one)
    peer.expect("A", ack=8)
    peer.state("ESTABLISHED")


def test_simultaneous_open(mode):
    """RFC 9293 section 3.5, figure 8."""
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.settle(peer.expect("S", seq=0))
    peer.run(peer.syn("S"))
    peer.state("SYN_RECEIVED")
    answer = peer.expect("SA", seq=0, ack=1)
    assert answer.mss == 1460 and answer.shift is not None and answer.sack_ok
    peer.run(peer.syn("SA", 1))
    peer.state("ESTABLISHED")
    peer.seq = peer.ack = 1
    peer.out.clear()        # an ACK may come, and need not
    peer.send("PA", data=100)
    peer.write(50)
    peer.expect("PA", seq=1, ack=101, data=50)


def test_simultaneous_open_completed_by_a_plain_ack(mode):
    peer = Peer(mode, ts=True)
    peer.end.connect()
    peer.run()
    peer.settle(peer.expect("S"))
    peer.run(peer.syn("S"))
    peer.settle(peer.expect("SA", seq=0, ack=1))
    peer.seq = peer.ack = 1
    peer.send("A")
    peer.nothing()
    peer.state("ESTABLISHED")


def test_syn_ack_of_a_simultaneous_open_is_repeated(mode):
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.expect("S")
    peer.run(peer.syn("S"))
    peer.expect("SA")
    peer.mark()
    assert peer.wait_for_output() <= 1000
    peer.expect("SA", seq=0, ack=1)


def test_wrong_ack_in_syn_received(mode):
    """RFC 9293 section 3.10.7.4, fifth check: a reset, with its number."""
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.expect("S")
    peer.run(peer.syn("S"))
    peer.expect("SA")
    peer.send("A", seq=1, ack=5000)
    peer.expect("R", seq=5000)
    peer.state("SYN_RECEIVED")


def test_reset_in_syn_received(mode):
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.expect("S")
    peer.run(peer.syn("S"))
    peer.expect("SA")
    peer.send("R", seq=1)
    peer.state("CLOSED")
    peer.nothing()
    assert peer.end["ERROR"] in (errno.ECONNREFUSED, errno.ECONNRESET)


def test_accepted(mode):
    peer = Peer(mode)
    peer.accept()
    peer.send("PA", data=100)
    assert peer.end.read() and peer.end["RCV_NXT"] == 101
    peer.write(300)
    peer.expect("PA", seq=1, ack=101, data=300)


def test_close_before_the_answer(mode):
    """CLOSE in SYN_SENT: nobody is told (RFC 9293 section 3.10.4)."""
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.expect("S")
    peer.close()
    peer.nothing()
    peer.state("CLOSED")
    assert peer.end.deadline == 0
    peer.wait(10_000)
    peer.nothing()


def test_segments_for_a_closed_connection(mode):
    """RFC 9293 section 3.10.7.1."""
    peer = opened(mode)
    peer.abort()
    peer.expect("RA", seq=1)
    peer.state("CLOSED")
    peer.send("A", seq=500, ack=77)
    peer.expect("R", seq=77)
    peer.send("R", seq=1)
    peer.nothing()
    peer.send("FPA", seq=600, data=10, ack=88)
    peer.expect("R", seq=88)
    peer.send("S", seq=700, data=5)
    peer.expect("RA", seq=(-peer.end.iss) % WRAP, ack=706)


# -- closing -----------------------------------------------------------------------------------------------


def test_close_active(mode):
    peer = opened(mode, time_wait=20 * SECOND)
    peer.close()
    peer.expect("FA", seq=1, ack=1)
    peer.state("FIN_WAIT_1")
    peer.send("A", ack=2)
    peer.state("FIN_WAIT_2")
    peer.mark()
    peer.send("FA", ack=2)
    peer.expect("A", seq=2, ack=2)
    peer.state("TIME_WAIT")
    peer.wait(19_999)
    peer.state("TIME_WAIT")
    peer.wait(2)
    peer.state("CLOSED")
    peer.nothing()
    assert peer.end["ERROR"] == 0 and peer.end.deadline == 0


def test_close_passive(mode):
    peer = opened(mode)
    peer.send("FA")
    peer.expect("A", ack=2)
    peer.state("CLOSE_WAIT")
    assert peer.end.eof
    peer.write(100)
    peer.expect("PA", seq=1, data=100)
    peer.close()
    peer.expect("FA", seq=101, ack=2)
    peer.state("LAST_ACK")
    peer.send("A", ack=101)
    peer.state("LAST_ACK")
    peer.send("A", ack=102)
    peer.state("CLOSED")
    peer.nothing()
    assert peer.end["ERROR"] == 0 and peer.end.deadline == 0


def test_simultaneous_close(mode):
    """RFC 9293 section 3.6, figure 13."""
    peer = opened(mode)
    peer.close()
    peer.expect("FA", seq=1)
    peer.send("FA", ack=1)
    peer.expect("A", seq=2, ack=2)
    peer.state("CLOSING")
    peer.send("A", ack=2)
    peer.state("TIME_WAIT")
    peer.nothing()


def test_fin_that_acknowledges_ours(mode):
    peer = opened(mode)
    peer.shutdown()
    peer.expect("FA", seq=1)
    peer.send("FA", ack=2)
    peer.expect("A", seq=2, ack=2)
    peer.state("TIME_WAIT")


def test_half_close(mode):
    peer = opened(mode)
    peer.write(500)
    peer.expect("PA", data=500)
    peer.shutdown()
    peer.expect("FA", seq=501)
    peer.send("A", ack=502)
    peer.state("FIN_WAIT_2")
    for _ in range(5):
        peer.send("PA", data=1000)
    assert len(peer.read()) == 5000
    peer.wait(300_000)      # without an end: the application still has it (FIN_WAIT_2 is not limited)
    peer.state("FIN_WAIT_2")
    peer.out.clear()
    peer.send("FPA", data=10)
    peer.expect("A", ack=5012)
    peer.state("TIME_WAIT")
    assert len(peer.read()) == 10 and peer.end.eof


def test_fin_goes_with_the_last_data(mode):
    peer = opened(mode)
    peer.end.shutdown()
    peer.write(100)     # both before anybody has run
    one = peer.expect("FPA", seq=1, data=100)
    assert one.span == 101


def test_fin_waits_for_the_window(mode):
    peer = opened(mode, window=1000)
    peer.write(3000)
    peer.shutdown()
    peer.expect("A", seq=1, data=1000)
    peer.nothing()
    peer.state("FIN_WAIT_1")
    peer.send("A", ack=1001, win=4000)
    peer.expect("A", seq=1001, data=1460)
    peer.expect("FPA", seq=2461, data=540)


def test_fin_is_repeated(mode):
    peer = opened(mode)
    peer.close()
    peer.expect("FA", seq=1, at=0)
    first = peer.wait_for_output()
    peer.expect("FA", seq=1)
    peer.wait_for_output()
    peer.expect("FA", seq=1)
    assert 0 < first <= RTO_FIRST and peer.time > first


def test_fin_of_the_peer_is_repeated(mode):
    peer = opened(mode, time_wait=10 * SECOND)
    peer.close()
    peer.expect("FA")
    peer.send("FA", ack=2)
    peer.expect("A", ack=2)
    peer.wait(9000)
    peer.send("FA", seq=1, ack=2)
    peer.expect("A", ack=2)
    peer.state("TIME_WAIT")
    peer.wait(9000)         # the time begins anew (RFC 9293 section 3.10.7.4)
    peer.state("TIME_WAIT")
    peer.wait(1001)
    peer.state("CLOSED")


def test_fin_out_of_order(mode):
    peer = opened(mode)
    peer.send("FPA", seq=1001, data=500)
    peer.expect("A", ack=1, sack=[(1001, 1501)])
    peer.state("ESTABLISHED")
    assert not peer.end.eof
    peer.send("PA", seq=1, data=1000)
    peer.expect("A", ack=1502)
    peer.state("CLOSE_WAIT")
    assert len(peer.read()) == 1500 and peer.end.eof


def test_data_behind_the_peers_fin(mode):
    peer = opened(mode)
    peer.send("FPA", data=10)
    peer.expect("A", ack=12)
    peer.send("PA", seq=12, data=100)
    peer.expect("A", ack=12)
    peer.state("CLOSE_WAIT")
    assert len(peer.read()) == 10


def test_data_after_close_are_reset(mode):
    """RFC 9293 section 3.6.1: nobody will read them, and the peer should know."""
    peer = opened(mode)
    peer.close()
    peer.expect("FA")
    peer.send("PA", data=100, ack=2)
    one = peer.expect("RA")
    peer.state("CLOSED")
    assert not one.data


def test_close_with_unread_data_resets(mode):
    """RFC 9293 section 3.6.1 (RFC 2525 section 2.17)."""
    peer = opened(mode)
    peer.send("PA", data=100)
    peer.close()
    peer.expect("RA", seq=1)
    peer.state("CLOSED")


def test_abort(mode):
    peer = opened(mode)
    peer.write(1000)
    peer.expect("PA", data=1000)
    peer.abort()
    peer.expect("RA", seq=1001, ack=1)
    peer.state("CLOSED")
    peer.wait(10_000)
    peer.nothing()


def test_fin_wait_2_ends_without_its_application(mode):
    peer = opened(mode)
    peer.close()
    peer.expect("FA")
    peer.send("A", ack=2)
    peer.state("FIN_WAIT_2")
    peer.wait(61_000)
    peer.state("CLOSED")


def test_a_closed_connection_waits_for_a_window_while_the_peer_answers(mode):
    """Data that were written before the close are not lost because the peer reads slowly; but nobody may hold a slot
    without end in that way."""
    peer = opened(mode, window=1000, shift=0)
    peer.write(3000)
    peer.close()
    peer.expect("A", data=1000)
    peer.send("A", win=0)
    peer.mark()
    while peer.end.state != "CLOSED":
        assert peer.time < 1_200_000
        peer.wait_for_output()
        peer.ack = 1001
        if "R" not in peer.out.pop().segment.flags:
            peer.send("A", win=0)
    assert peer.time > 300_000


def test_vanished_peer_in_last_ack(mode):
    peer = opened(mode)
    peer.send("FA")
    peer.close()
    peer.wait(2_000_000)
    peer.state("CLOSED")


# -- resets, and segments that somebody else made (RFC 5961) -----------------------------------------------


def test_reset(mode):
    peer = opened(mode)
    peer.write(100)
    peer.out.clear()
    peer.send("R", seq=1)
    peer.state("CLOSED")
    peer.nothing()
    assert peer.end["ERROR"] == errno.ECONNRESET and peer.end.deadline == 0


def test_data_before_a_reset_can_be_read(mode):
    peer = opened(mode)
    peer.send("PA", data=100)
    peer.send("RA")
    peer.state("CLOSED")
    assert len(peer.end.read()) == 100


@pytest.mark.parametrize("offset", [1, 1000, 60_000])
def test_reset_elsewhere_in_the_window_is_challenged(mode, offset):
    """Section 3.2: only the exact number counts."""
    peer = opened(mode)
    peer.send("R", seq=1 + offset)
    peer.expect("A", seq=1, ack=1)
    peer.state("ESTABLISHED")
    peer.send("R", seq=1)
    peer.state("CLOSED")


@pytest.mark.parametrize("offset", [-1, -100_000, 1 << 20])
def test_reset_outside_of_the_window_is_dropped(mode, offset):
    peer = opened(mode)
    peer.send("R", seq=1 + offset)
    peer.nothing()
    peer.state("ESTABLISHED")


@pytest.mark.parametrize("flags", ["S", "SA"])
@pytest.mark.parametrize("seq", [0, 1, 500, 1 << 20])
def test_syn_is_challenged(mode, flags, seq):
    """Section 4.2, whatever the number."""
    peer = opened(mode)
    peer.send(flags, seq=seq, ack=1)
    peer.expect("A", seq=1, ack=1)
    peer.nothing()
    peer.state("ESTABLISHED")


def test_ack_of_what_was_never_sent_is_challenged(mode):
    """Section 5.2."""
    peer = opened(mode, window=5000)
    peer.write(100)
    peer.expect("PA", data=100)
    peer.send("PA", ack=102, data=10)
    peer.expect("A", ack=1)
    peer.send("PA", seq=1, ack=1 - 6000, data=10)     # too old: below SND.UNA - MAX.SND.WND
    peer.expect("A", ack=1)
    peer.nothing()
    assert peer.end.received_to == 1
    peer.send("PA", seq=1, ack=1 - 4000, data=10)     # old, but it may be: its data are taken
    assert peer.end.received_to == 11
    assert peer.end["SND_UNA"] == 1


def test_challenges_are_limited(mode):
    """Section 7."""
    peer = opened(mode)
    for _ in range(100):
        peer.send("S", seq=500)
    assert 1 <= len(peer.out) <= 20
    peer.out.clear()
    peer.wait(1001)
    peer.send("S", seq=500)
    peer.expect("A")


def test_segments_out_of_the_window_are_answered(mode):
    """RFC 9293 section 3.10.7.4, first check."""
    peer = opened(mode)
    for position in (1 << 20, -1000):
        peer.send("PA", seq=position, data=100)
        peer.expect("A", seq=1, ack=1)
    peer.nothing()
    assert peer.end.received_to == 1


def test_segments_without_ack_are_dropped(mode):
    peer = opened(mode)
    peer.send("P", data=100)
    peer.send("", seq=1, data=100)
    peer.send("F", seq=1)
    peer.nothing()
    assert peer.end.received_to == 1
    peer.state("ESTABLISHED")


@pytest.mark.parametrize("raw", [b"", bytes(19), bytes(20), b"\xff" * 60, bytes(12) + b"\xf0" + bytes(30)])
def test_malformed(mode, raw):
    peer = opened(mode)
    peer.end.run(raw)
    peer.state("ESTABLISHED")
    peer.send("PA", data=10)
    assert peer.end.received_to == 11


# -- timestamps (RFC 7323) ---------------------------------------------------------------------------------


def test_paws(mode):
    """Section 5.3: a segment of an earlier lap has an old timestamp; it is answered and dropped."""
    peer = opened(mode, ts=True)
    peer.wait(100)
    peer.send("PA", data=100)
    now = peer.end.now // 1_000_000
    peer.send("PA", data=100, ts=(now - 50, 0))
    peer.expect("A", ack=101)
    assert peer.end.received_to == 101 and peer.end["TS_RECENT"] == now
    peer.send("R", seq=101, ts=(now - 50, 0))       # PAWS is not for resets
    peer.state("CLOSED")


def test_paws_over_the_wrap_of_the_clock(mode):
    peer = opened(mode, ts=True)
    recent = peer.end["TS_RECENT"]
    peer.send("PA", data=100, ts=((recent + (1 << 31) + 1) % WRAP, 0))      # older, by the circle
    peer.expect("A", ack=1)
    peer.send("PA", seq=1, data=100, ts=((recent + (1 << 31) - 1) % WRAP, 0))
    assert peer.end.received_to == 101
    peer.wait(100)      # one that is acknowledged counts from now on
    peer.send("PA", seq=101, data=100, ts=((recent + (1 << 32) - 2) % WRAP, 0))
    assert peer.end.received_to == 201
    peer.wait(100)
    peer.send("PA", seq=201, data=100, ts=((recent + 3) % WRAP, 0))
    assert peer.end.received_to == 301


def test_timestamps_that_were_agreed_must_be_there(mode):
    """Section 3.2: dropped in silence."""
    peer = opened(mode, ts=True)
    peer.send("PA", data=100, ts=None)
    peer.nothing()
    assert peer.end.received_to == 1


def test_the_echo_is_of_the_segment_that_the_ack_is_for(mode):
    """Section 4.3: with a delayed ACK, the earliest that is unacknowledged; not one behind a hole."""
    peer = opened(mode, ts=True)
    peer.wait(10)
    base = peer.end.now // 1_000_000
    peer.send("PA", data=100, ts=(base, 0))
    peer.wait(10)
    peer.send("PA", data=100, ts=(base + 10, 0))
    peer.wait(100)
    assert peer.expect("A", ack=201).ts[1] == base
    peer.send("PA", seq=5001, data=100, ts=(base + 500, 0))
    assert peer.expect("A", ack=201).ts[1] == base
    peer.send("PA", seq=201, data=100, ts=(base + 600, 0))
    assert peer.expect("A", ack=301).ts[1] == base + 600


def test_after_24_days_a_timestamp_proves_nothing(mode):
    """Section 5.5."""
    peer = opened(mode, ts=True)
    peer.end.now += 25 * 86400 * SECOND
    peer.send("PA", data=100, ts=((peer.end["TS_RECENT"] - 5) % WRAP, 0))
    assert peer.end.received_to == 101


# -- keepalive, user timeout, what the network says --------------------------------------------------------


def test_keepalive(mode):
    """RFC 9293 section 3.8.4."""
    peer = Peer(mode)
    for word, value in ((T.X_KEEP_IDLE, 60), (T.X_KEEP_INTERVAL, 10), (T.X_KEEP_COUNT, 3)):
        peer.end.set(peer.end.x + word, value * SECOND)
    peer.end.set(peer.end.x + T.X_KEEP_COUNT, 3)
    peer.end.options = T.OPT_KEEPALIVE
    peer.connect()
    peer.wait(59_900)
    peer.nothing()
    peer.wait(200)
    peer.expect("A", seq=0, data=0)
    peer.send("A", ack=1)
    peer.mark()
    for at in (60_000, 70_000, 80_000):
        peer.wait_for_output()
        peer.expect("A", seq=0, at=at)
    peer.wait(9_900)
    peer.state("ESTABLISHED")
    peer.wait(200)
    peer.state("CLOSED")
    assert peer.end["ERROR"] == errno.ETIMEDOUT


def test_keepalive_is_answered(mode):
    peer = opened(mode)
    peer.send("A", seq=0)
    peer.expect("A", seq=1, ack=1)
    peer.send("A", seq=0, data=1)
    peer.expect("A", seq=1, ack=1)


def test_no_keepalive_unless_asked_for(mode):
    peer = opened(mode)
    assert peer.end.deadline == 0
    peer.wait(100 * 86_400_000)
    peer.nothing()
    peer.state("ESTABLISHED")


def test_user_timeout(mode):
    """RFC 9293 section 3.9.1.2 (RFC 5482)."""
    peer = Peer(mode)
    peer.end.set(peer.end.x + T.X_USER_TIMEOUT, 30 * SECOND)
    peer.connect()
    peer.write(1000)
    peer.wait(29_900)
    peer.state("ESTABLISHED")
    peer.wait(60_000)
    peer.state("CLOSED")
    assert peer.end["ERROR"] == errno.ETIMEDOUT


def test_path_mtu(mode):
    """RFC 1191: the segment that was too large goes out again at once, in smaller ones."""
    peer = opened(mode)
    peer.write(4000)
    sizes = [len(one.segment.data) for one in peer.out]
    assert sizes == [1460, 1460, 1080]
    peer.out.clear()
    cwnd = peer.end["CWND"]
    peer.end.control(T.CTL_MTU, 1000, peer.end.iss + 1)
    peer.run()
    assert peer.end["MTU"] == 1000 and peer.end["MSS"] == 960 and peer.end["CWND"] >= min(cwnd, 9600)
    peer.wait(1500)
    assert peer.out and all(len(one.segment.data) <= 960 for one in peer.out)
    position = 1
    for _ in range(200):
        if position >= 4001:
            break
        for one in peer.out:
            start = (one.segment.seq - peer.end.iss) % WRAP
            if start <= position:
                position = max(position, start + len(one.segment.data))
        peer.out.clear()
        peer.send("A", ack=position)
        peer.wait(50)
    assert position == 4001


@pytest.mark.parametrize("seq, mtu", [(0, 1000), (4001, 1000), (100_000, 1000), (1, 1500), (1, 9000)])
def test_path_mtu_that_is_not_believed(mode, seq, mtu):
    """RFC 5927: about nothing that is under way; or larger."""
    peer = opened(mode)
    peer.write(4000)
    peer.out.clear()
    peer.end.control(T.CTL_MTU, mtu, peer.end.iss + seq)
    peer.run()
    peer.nothing()
    assert peer.end["MTU"] == 1500


@pytest.mark.parametrize("mtu", [0, 1, 68, -5, 1 << 40])
def test_path_mtu_has_a_floor(mode, mtu):
    peer = opened(mode)
    peer.write(4000)
    peer.end.control(T.CTL_MTU, mtu, peer.end.iss + 1)
    peer.run()
    assert 296 <= peer.end["MTU"] <= 1500


def test_unreachable_is_soft_once_established(mode):
    """RFC 5927 section 5.2; and told if the connection times out (RFC 1122 section 4.2.3.9)."""
    peer = opened(mode)
    peer.write(100)
    peer.end.control(T.CTL_UNREACHABLE, errno.EHOSTUNREACH, peer.end.iss + 1)
    peer.run()
    peer.state("ESTABLISHED")
    peer.wait(2_000_000)
    peer.state("CLOSED")
    assert peer.end["ERROR"] in (errno.EHOSTUNREACH, errno.ETIMEDOUT)


def test_unreachable_ends_an_open(mode):
    peer = Peer(mode)
    peer.end.connect()
    peer.run()
    peer.expect("S")
    peer.end.control(T.CTL_UNREACHABLE, errno.EHOSTUNREACH, peer.end.iss)
    peer.run()
    peer.state("CLOSED")
    assert peer.end["ERROR"] == errno.EHOSTUNREACH


def test_one_answer_to_many(mode):
    """Everything that is queued is processed before an ACK is sent (RFC 9293 MUST-59)."""
    peer = opened(mode)
    with peer.burst():
        for _ in range(20):
            peer.send("A", data=1000)
    peer.expect("A", ack=20_001)
    peer.nothing()


def test_both_streams_wrap(mode):
    peer = Peer(mode, iss=WRAP - 100, ts=True)
    peer.end.iss = WRAP - 50
    peer.connect()
    peer.write(400)
    peer.expect("PA", seq=1, data=400)
    peer.send("PA", data=400, ack=401)
    peer.wait(100)
    peer.expect("A", seq=401, ack=401)
    assert len(peer.end.read()) == 400
