"""Scripted peers: acknowledgements, windows, loss and its repair.

Positions count from each side's SYN; times are ms (see script.py).
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from dataplane.shm import layout_tcp as T
from tests.tcp.rig import MODES
from tests.tcp.script import Peer

MSS = 1460


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def opened(mode, delay=10, options=0, **settings):
    peer = Peer(mode, **settings)
    peer.end.options = options
    peer.connect(delay)
    return peer


# -- acknowledgements (RFC 9293 section 3.8.6.3, RFC 5681 section 4.2) -------------------------------------


def test_delayed_ack(mode):
    peer = opened(mode)
    peer.send("PA", data=1000)
    peer.nothing()
    peer.wait(500)
    assert 0 < (peer.out[0].time - peer.start) / 1e6 <= 500
    peer.expect("A", ack=1001, data=0)
    peer.nothing()


def test_every_second_full_segment(mode):
    peer = opened(mode)
    for number in range(1, 11):
        peer.send("A", data=MSS)
        if number % 2 == 0:
            peer.expect("A", at=0, ack=1 + number * MSS)
        peer.nothing()


def test_ack_goes_with_data(mode):
    peer = opened(mode)
    peer.send("PA", data=100)
    peer.nothing()
    peer.write(50)
    peer.expect("PA", ack=101, data=50)
    peer.wait(500)
    assert all(one.segment.data for one in peer.out)    # nothing for the ACK alone


def test_quick_ack(mode):
    peer = opened(mode, options=T.OPT_QUICKACK)
    peer.send("PA", data=10)
    peer.expect("A", at=0, ack=11)


def test_out_of_order_is_acknowledged_at_once(mode):
    peer = opened(mode)
    peer.send("A", seq=1 + MSS, data=MSS)
    peer.expect("A", at=0, ack=1, sack=[(1 + MSS, 1 + 2 * MSS)])
    peer.send("A", seq=1 + 3 * MSS, data=MSS)
    peer.expect("A", at=0, ack=1, sack=[(1 + 3 * MSS, 1 + 4 * MSS), (1 + MSS, 1 + 2 * MSS)])
    peer.send("A", seq=1 + 2 * MSS, data=MSS)
    peer.expect("A", at=0, ack=1, sack=[(1 + MSS, 1 + 4 * MSS)])
    peer.send("A", seq=1, data=MSS)     # fills the hole: at once, too
    peer.expect("A", at=0, ack=1 + 4 * MSS, sack=[])
    assert len(peer.read()) == 4 * MSS


def test_no_sack_unless_agreed(mode):
    peer = opened(mode, sack=False)
    peer.send("A", seq=1 + MSS, data=MSS)
    peer.expect("A", ack=1, sack=[])


def test_duplicate_is_acknowledged_at_once(mode):
    peer = opened(mode)
    peer.send("A", data=MSS)
    peer.send("A", data=MSS)
    peer.expect("A", ack=1 + 2 * MSS)
    peer.send("A", seq=1, data=MSS)
    peer.expect("A", at=0, ack=1 + 2 * MSS, sack=[(1, 1 + MSS)])    # RFC 2883
    peer.send("A", seq=1 + MSS, data=2 * MSS)       # half of it is new
    peer.expect("A", ack=1 + 3 * MSS)
    assert len(peer.read()) == 3 * MSS


def test_an_ack_for_all_that_came_together(mode):
    peer = opened(mode)
    with peer.burst():
        peer.send("A", seq=1 + MSS, data=MSS)
        peer.send("A", seq=1, data=MSS)
        peer.send("PA", seq=1 + 2 * MSS, data=10)
    peer.expect("A", ack=11 + 2 * MSS, sack=[])
    peer.nothing()


# -- the window that we offer (section 3.8.6.2.2) ----------------------------------------------------------


def test_the_window_closes_and_opens_in_steps(mode):
    """A reader that takes little by little: no update before it is worth a segment."""
    peer = opened(mode, receive=8192, shift=0)
    sent = 0
    while sent < 8192:
        size = min(MSS, 8192 - sent)
        peer.send("A", data=size)
        sent += size
    peer.wait(100)
    right = {(one.segment.ack - peer.iss) % (1 << 32) + one.segment.window for one in peer.out}
    assert max(right) == 1 + 8192 and peer.out[-1].segment.window == 0
    peer.out.clear()
    read = 0
    while not peer.out:
        assert peer.read(100)
        read += 100
        assert read <= 8192 // 2
    assert read >= MSS
    peer.expect("A", ack=8193, win=read)
    assert len(peer.read()) == 8192 - read


def test_what_comes_into_a_closed_window(mode):
    """A probe is answered, and its byte is not taken."""
    peer = opened(mode, receive=4096, shift=0)
    for size in (MSS, MSS, 4096 - 2 * MSS):
        peer.send("A", data=size)
    peer.wait(100)
    peer.out.clear()
    peer.send("A", data=1)
    peer.expect("A", ack=4097, win=0)
    assert peer.end.received_to == 4097
    peer.write(100)         # and the ACK in what comes into it counts
    peer.expect("PA", data=100)
    peer.send("A", seq=4097, ack=101)
    assert peer.end["SND_UNA"] == 101


def test_a_ring_larger_than_the_window_can_tell(mode):
    """Without window scale: no updates for what cannot be told."""
    peer = opened(mode, receive=1 << 18, shift=None)
    for _ in range(10):
        peer.send("A")
        peer.nothing()
    for _ in range(4):
        peer.send("A", data=MSS)
    assert len(peer.read()) == 4 * MSS
    assert [one.segment.window for one in peer.out] == [65535, 65535]


def test_data_beyond_the_window_are_cut(mode):
    peer = opened(mode, receive=4096, shift=0)
    with peer.burst():
        for _ in range(4):
            peer.send("A", data=MSS)
    assert peer.end.received_to == 4097
    peer.expect("A", ack=4097)
    assert len(peer.read()) == 4096


# -- the window that the peer offers -----------------------------------------------------------------------


def test_no_more_than_the_window(mode):
    peer = opened(mode, window=4000, shift=0)
    peer.write(20_000)
    assert sum(len(one.segment.data) for one in peer.out) <= 4000
    for _ in range(20):
        taken = sum(len(one.segment.data) for one in peer.out)
        while peer.out:
            peer.expect(peer.out[0].segment.flags)
        peer.send("A", win=4000)
        peer.wait(1)
        assert taken <= 4000
    assert peer.end["SND_UNA"] > 10_000


def test_silly_windows_are_not_used(mode):
    """Sender's side, section 3.8.6.2.1: a window that opens byte by byte makes no small segments."""
    peer = opened(mode, window=10_000, shift=0)
    peer.write(30_000)
    while peer.out:
        peer.expect(peer.out[0].segment.flags)
    sent = peer.ack
    peer.send("A", win=0)
    for window in range(100, MSS, 100):
        peer.send("A", win=window)
        peer.nothing()
    peer.send("A", win=MSS)
    peer.expect("A", seq=sent, data=MSS)


def test_zero_window_probes(mode):
    """Section 3.8.6.1: from one RTO on, with growing intervals, for as long as they are answered."""
    peer = opened(mode, window=2 * MSS, shift=0)
    peer.write(10_000)
    peer.expect("A", seq=1, data=MSS)
    peer.expect("A", seq=1 + MSS, data=MSS)
    peer.send("A", win=0)
    peer.nothing()
    peer.mark()
    times = []
    for _ in range(12):
        times.append(peer.wait_for_output())
        one = peer.out[0].segment
        assert len(one.data) <= 1
        peer.expect(one.flags, seq=1 + 2 * MSS)
        peer.ack = 1 + 2 * MSS      # the probe's byte is not taken
        peer.send("A", win=0)
        peer.nothing()
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] <= 1000 and all(b >= a for a, b in pairwise(gaps)) and gaps[-1] <= 120_000
    assert gaps[3] == pytest.approx(2 * gaps[2])
    peer.state("ESTABLISHED")
    peer.send("A", win=5 * MSS)
    peer.expect("A", seq=1 + 2 * MSS, data=MSS, at=peer.time)


def test_zero_window_probe_whose_byte_is_taken(mode):
    peer = opened(mode, window=2 * MSS, shift=0)
    peer.write(10_000)
    peer.expect("A")
    peer.expect("A")
    peer.send("A", win=0)
    peer.wait_for_output()
    one = peer.expect("A", seq=1 + 2 * MSS)
    assert len(one.data) == 1
    peer.send("A", ack=2 + 2 * MSS, win=5 * MSS)
    peer.expect("A", seq=2 + 2 * MSS, data=MSS)


def test_a_window_that_was_zero_from_the_start(mode):
    peer = opened(mode, window=0)
    peer.write(100)
    peer.nothing()
    peer.wait_for_output(5000)
    peer.expect("A", seq=1, data=1)
    peer.ack = 1
    peer.send("A", win=1000)
    peer.expect("PA", seq=1, data=100)


def test_a_window_taken_back(mode):
    """The peer shrinks it with data under way: they are sent again, and nothing beyond."""
    peer = opened(mode, window=10 * MSS, shift=0)
    peer.write(4 * MSS)
    assert len(peer.out) == 4
    peer.out.clear()
    peer.send("A", ack=1 + MSS, win=0)
    peer.wait(60_000)
    peer.state("ESTABLISHED")
    assert peer.out
    peer.out.clear()
    peer.send("A", ack=1 + MSS, win=10 * MSS)
    peer.wait(120_000)
    assert {(one.segment.seq - peer.end.iss) % (1 << 32) for one in peer.out} & {1 + MSS}


def test_a_new_ack_in_a_segment_that_is_sent_again(mode):
    """Its window counts although its number is older than that of the last update: else SND_UNA would go on and take
    the right edge along."""
    peer = opened(mode, window=8 * 1024, shift=0)
    peer.write(30_000)
    sent = sum(len(one.segment.data) for one in peer.out)
    assert 7000 < sent <= 8192
    peer.out.clear()
    peer.send("A", seq=1001, ack=1, win=8 * 1024, data=10)      # behind a hole
    peer.out.clear()
    peer.send("A", seq=1, ack=1 + sent, win=1500, data=10)
    assert peer.end["SND_WND"] == 1500
    assert sum(len(one.segment.data) for one in peer.out) <= 1500


# -- small segments ----------------------------------------------------------------------------------------


def test_nagle(mode):
    peer = opened(mode)
    peer.write(10)
    peer.expect("PA", seq=1, data=10)
    for _ in range(10):
        peer.write(10)
    peer.nothing()
    peer.send("A", ack=11)
    peer.expect("PA", seq=11, data=100)
    peer.write(MSS)         # a full one may go
    peer.expect("PA", seq=111, data=MSS)


def test_nodelay(mode):
    peer = opened(mode, options=T.OPT_NODELAY)
    for number in range(5):
        peer.write(10)
        peer.expect("PA", seq=1 + 10 * number, data=10)


def test_cork(mode):
    peer = opened(mode, options=T.OPT_CORK)
    peer.write(100)
    peer.nothing()
    peer.write(MSS)
    peer.expect("A", seq=1, data=MSS)
    peer.nothing()
    peer.end.options = 0
    peer.run()
    peer.expect("PA", seq=1 + MSS, data=100)


def test_fin_pushes_out_what_nagle_holds(mode):
    peer = opened(mode)
    peer.write(10)
    peer.expect("PA")
    peer.write(10)
    peer.nothing()
    peer.shutdown()
    peer.expect("FPA", seq=11, data=10)


# -- how much at once --------------------------------------------------------------------------------------


def test_initial_window(mode):
    """RFC 6928."""
    peer = opened(mode)
    peer.write(60_000)
    assert len(peer.out) == 10 and all(len(one.segment.data) == MSS for one in peer.out)


def test_slow_start(mode):
    peer = opened(mode, window=1 << 20, send=1 << 18)
    peer.write(200_000)
    total = flight = 10
    for _ in range(3):
        assert len(peer.out) == flight
        position = 1 + total * MSS
        peer.out.clear()
        peer.wait(10)
        with peer.burst():
            peer.send("A", ack=position - flight // 2 * MSS)
            peer.send("A", ack=position)
        flight *= 2
        total += flight
        if total * MSS > 190_000:
            break


def test_congestion_window_after_idleness(mode):
    """RFC 5681 section 4.1."""
    peer = opened(mode, send=1 << 18)
    peer.write(150_000)
    for _ in range(3):
        peer.wait(10)
        last = peer.out[-1].segment
        peer.out.clear()
        peer.send("A", ack=(last.seq - peer.end.iss) % (1 << 32) + len(last.data))
    while peer.end["SND_UNA"] < 150_001:
        peer.wait(10)
        peer.send("A", ack=peer.end["SND_MAX"])
    assert peer.end["CWND"] > 20 * MSS
    peer.out.clear()
    peer.wait(60_000)
    peer.write(200_000)
    assert len(peer.out) == 10


def test_segments_from_the_peers_mss(mode):
    peer = opened(mode, mss=1000)
    peer.write(3000)
    assert [len(one.segment.data) for one in peer.out] == [1000, 1000, 1000]
    peer = opened(mode, mss=None)
    peer.write(3000)
    assert [len(one.segment.data) for one in peer.out] == [536] * 5 + [320]
    peer = opened(mode, mss=1460, ts=True)
    peer.write(3000)
    assert len(peer.out[0].segment.data) == 1448


@pytest.mark.parametrize("mss", [0, 1, 7, 65535])
def test_hostile_mss(mode, mss):
    peer = opened(mode, mss=mss)
    peer.write(5000)
    assert all(40 <= len(one.segment.data) <= MSS for one in peer.out) and len(peer.out) <= 110


# -- loss --------------------------------------------------------------------------------------------------


def burst_of(peer, count):
    """Let the stack send `count` full segments, and take them."""
    peer.write(count * MSS)
    assert len(peer.out) == count, peer.tell(f"{count} segments")
    for number in range(count):
        peer.expect(peer.out[0].segment.flags, seq=1 + number * MSS, data=MSS)
    peer.nothing()


def test_fast_retransmit_with_sack(mode):
    """RFC 6675: three segments above the hole."""
    peer = opened(mode)
    burst_of(peer, 8)
    cwnd = peer.end["CWND"]
    peer.wait(10)
    peer.send("A", ack=1, sack=[(1 + MSS, 1 + 2 * MSS)])
    peer.send("A", ack=1, sack=[(1 + MSS, 1 + 3 * MSS)])
    peer.nothing()
    peer.send("A", ack=1, sack=[(1 + MSS, 1 + 4 * MSS)])
    peer.expect("A", seq=1, data=MSS)
    assert peer.end["CWND"] < cwnd and peer.end["PHASE"] == T.PHASE_RECOVERY
    for last in range(5, 9):
        peer.send("A", ack=1, sack=[(1 + MSS, 1 + last * MSS)])
    rescue = [(one.segment.seq - peer.end.iss) % (1 << 32) for one in peer.out]
    assert rescue in ([], [1 + 7 * MSS])        # NextSeg (4): once, and only the last segment
    peer.out.clear()
    peer.send("A", ack=1 + 8 * MSS)
    assert peer.end["PHASE"] == T.PHASE_OPEN and peer.end["SSTHRESH"] < cwnd
    peer.nothing()
    assert peer.end["RETRANSMITS"] == 1 + len(rescue)


def test_fast_retransmit_without_sack(mode):
    """RFC 5681 section 3.2: three duplicates; RFC 3042: two of them let new segments go."""
    peer = opened(mode, sack=False)
    peer.write(20 * MSS)
    for _ in range(10):
        peer.expect("A")
    peer.wait(10)
    peer.send("A", ack=1)
    peer.expect("A", seq=1 + 10 * MSS, data=MSS)
    peer.send("A", ack=1)
    peer.expect("A", seq=1 + 11 * MSS, data=MSS)
    peer.send("A", ack=1)
    peer.expect("A", seq=1, data=MSS)
    for _ in range(9):
        peer.send("A", ack=1)
    new = len(peer.out)
    assert 1 <= new <= 9 and peer.out[0].segment.seq == (peer.end.iss + 1 + 12 * MSS) % (1 << 32)
    peer.out.clear()
    peer.send("A", ack=1 + (12 + new) * MSS)
    assert peer.end["PHASE"] == T.PHASE_OPEN and peer.end["RETRANSMITS"] == 1


def test_partial_acks_without_sack(mode):
    """RFC 6582: each tells of one more lost segment."""
    peer = opened(mode, sack=False)
    burst_of(peer, 10)
    peer.wait(10)
    for _ in range(3):
        peer.send("A", ack=1)
    peer.expect("A", seq=1, data=MSS)
    peer.send("A", ack=1 + 4 * MSS)
    peer.expect("A", seq=1 + 4 * MSS, data=MSS)
    peer.send("A", ack=1 + 6 * MSS)
    peer.expect("A", seq=1 + 6 * MSS, data=MSS)
    peer.send("A", ack=1 + 10 * MSS)
    peer.nothing()
    assert peer.end["PHASE"] == T.PHASE_OPEN and peer.end["RETRANSMITS"] == 3


def test_several_holes(mode):
    peer = opened(mode)
    burst_of(peer, 10)
    peer.wait(10)
    peer.send("A", ack=1, sack=[(1 + 1 * MSS, 1 + 2 * MSS)])
    peer.send("A", ack=1, sack=[(1 + 3 * MSS, 1 + 4 * MSS), (1 + 1 * MSS, 1 + 2 * MSS)])
    with peer.burst():
        peer.send("A", ack=1, sack=[(1 + 5 * MSS, 1 + 10 * MSS), (1 + 3 * MSS, 1 + 4 * MSS), (1 + MSS, 1 + 2 * MSS)])
    again = {(one.segment.seq - peer.end.iss) % (1 << 32) for one in peer.out}
    assert 1 in again and again <= {1, 1 + 2 * MSS, 1 + 4 * MSS}
    peer.send("A", ack=1 + 2 * MSS, sack=[(1 + 5 * MSS, 1 + 10 * MSS), (1 + 3 * MSS, 1 + 4 * MSS)])
    peer.send("A", ack=1 + 4 * MSS, sack=[(1 + 5 * MSS, 1 + 10 * MSS)])
    again = [(one.segment.seq - peer.end.iss) % (1 << 32) for one in peer.out]
    assert sorted(again) == [1, 1 + 2 * MSS, 1 + 4 * MSS]
    peer.send("A", ack=1 + 10 * MSS)
    assert peer.end["PHASE"] == T.PHASE_OPEN and peer.end["RETRANSMITS"] == 3


def test_duplicate_acks_that_are_none(mode):
    """RFC 5681 section 2: with data, with another window, with nothing outstanding."""
    peer = opened(mode, sack=False)
    for _ in range(5):
        peer.send("A", ack=1)
    burst_of(peer, 5)
    for number in range(5):
        peer.send("PA", ack=1, data=10)
        peer.send("A", ack=1, win=(400 + number) * 128)
    assert not any(one.segment.data for one in peer.out) and peer.end["RETRANSMITS"] == 0


def test_tail_loss_probe(mode):
    """RFC 8985 section 7: the last segment again, long before the timeout."""
    peer = opened(mode, delay=100)
    burst_of(peer, 5)
    peer.mark()
    at = peer.wait_for_output()
    assert 150 <= at < 300
    peer.expect("PA", seq=1 + 4 * MSS, data=MSS)
    peer.send("A", ack=1, sack=[(1 + 4 * MSS, 1 + 5 * MSS)])
    peer.wait(600)
    assert peer.out and peer.out[0].segment.seq == (peer.end.iss + 1) % (1 << 32)


def test_tail_loss_probe_with_new_data(mode):
    peer = opened(mode, delay=100, options=T.OPT_NODELAY)
    burst_of(peer, 10)
    peer.write(100)             # no room in the congestion window
    peer.nothing()
    peer.wait_for_output()
    peer.expect("PA", seq=1 + 10 * MSS, data=100)


def test_timeout_and_backoff(mode):
    """RFC 6298 (5.5): the timer doubles; what is outstanding goes again from its beginning."""
    peer = opened(mode)
    peer.write(MSS)
    peer.expect("PA", seq=1)
    peer.mark()
    times = []
    for _ in range(9):
        times.append(peer.wait_for_output())
        peer.expect("PA", seq=1, data=MSS)
    gaps = [b - a for a, b in pairwise(times)]
    assert all(b >= 1.9 * a or b >= 60_000 for a, b in pairwise(gaps[1:])) and max(gaps) <= 120_000
    assert peer.end["CWND"] == MSS
    peer.send("A", ack=1 + MSS)
    assert peer.end["RTX_AT"] == 0
    backed_off = peer.end["BACKOFF"]    # until a new segment gives a round trip (RFC 6298 section 5, Karn)
    peer.write(MSS)
    peer.expect("PA", seq=1 + MSS)
    peer.wait(10)
    peer.send("A", ack=1 + 2 * MSS)
    assert backed_off >= peer.end["BACKOFF"] == 0


def test_timeout_of_many(mode):
    peer = opened(mode)
    burst_of(peer, 10)
    peer.mark()
    peer.wait_for_output()
    while peer.end["PHASE"] != T.PHASE_LOSS:
        peer.out.clear()
        peer.wait_for_output(1000)
    assert len(peer.out) == 1
    peer.expect("A", seq=1, data=MSS)
    peer.wait(10)
    peer.send("A", ack=1 + MSS)
    assert {(one.segment.seq - peer.end.iss) % (1 << 32) for one in peer.out} == {1 + MSS, 1 + 2 * MSS}
    peer.out.clear()
    peer.send("A", ack=1 + 10 * MSS)
    assert peer.end["PHASE"] == T.PHASE_OPEN
    peer.wait(10_000)
    peer.nothing()


def test_rto_from_the_round_trip(mode):
    """RFC 6298 (2.2), (2.4): not below 200 ms here."""
    peer = opened(mode, delay=10)
    assert peer.end["RTO"] == pytest.approx(200e6, abs=1e6)
    peer = opened(mode, delay=300)
    assert 800e6 <= peer.end["RTO"] <= 1000e6


def test_a_spurious_timeout_is_undone(mode):
    """Eifel (RFC 3522, 4015): the first ACK behind the retransmission answers the original."""
    peer = opened(mode, delay=20, ts=True)
    burst = 10
    peer.write(burst * 1448)
    stamp = peer.out[0].segment.ts
    peer.out.clear()
    cwnd = peer.end["CWND"]
    while peer.end["PHASE"] != T.PHASE_LOSS:
        peer.wait_for_output(3000)
        peer.out.clear()
    assert peer.end["CWND"] < cwnd
    peer.send("A", ack=1 + 1448, ts=(peer.end.now // 1_000_000, stamp[0]))
    assert peer.end["PHASE"] == T.PHASE_OPEN and peer.end["CWND"] >= cwnd


def test_sacks_that_cannot_be(mode):
    """Blocks below, above, reversed and of nothing change nothing."""
    peer = opened(mode)
    burst_of(peer, 8)
    peer.send("A", ack=1 + MSS, sack=[(100_000, 200_000), (5000, 4000), (3000, 3000), (1 << 31, (1 << 31) + 5)])
    assert peer.end.sacked == [] and peer.end["SND_UNA"] == 1 + MSS
    peer.send("A", ack=1 + 8 * MSS)
    peer.nothing()


def test_reneging(mode):
    """A peer may give up what it has SACKed (RFC 2018 section 8): all of it comes again in the end."""
    peer = opened(mode)
    burst_of(peer, 6)
    peer.wait(10)
    peer.send("A", ack=1, sack=[(1 + MSS, 1 + 6 * MSS)])
    peer.out.clear()
    position = 1
    for _ in range(100):        # a receiver without memory: it takes what is next, and forgets the rest
        if position == 1 + 6 * MSS:
            break
        peer.wait_for_output()
        for one in list(peer.out):
            if one.segment.seq == (peer.end.iss + position) % (1 << 32):
                position += len(one.segment.data)
        peer.out.clear()
        peer.send("A", ack=position)
    assert peer.end["SND_UNA"] == 1 + 6 * MSS
