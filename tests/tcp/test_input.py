"""Segments that arrive: the checks of RFC 9293 section 3.10.7, PAWS, RFC 5961, acknowledgements, and ICMP."""

from __future__ import annotations

import errno

import pytest

from dataplane.shm import layout_tcp as T
from tests.tcp.cells import ISS, PEER, established, fire, reach, segment, syn, take, until
from tests.tcp.rig import MS, SECOND, End, Segment

MSS = 1448


# -- opening -------------------------------------------------------------------------------------------------


def test_a_syn_ack_with_data_brings_both() -> None:
    end = End(iss=ISS)
    end.connect()
    end.run()
    answer = syn(end, "SA")
    answer.data = b"early"
    out = take(end, answer)
    assert end.state == "ESTABLISHED" and end.read() == b"early"
    assert [(one.flags, one.ack) for one in out] == [("A", PEER + 6)]
    assert end.events & T.EV_READABLE


def test_options_that_the_peer_does_not_offer_are_not_used() -> None:
    end = established(options={})
    assert end["MSS"] == 536 and end["FLAGS"] & (T.TF_SACK | T.TF_TIMESTAMPS | T.TF_SCALE) == 0     # section 3.7.1
    assert (end["SND_SHIFT"], end["RCV_SHIFT"]) == (0, 0)                                           # RFC 7323 2.2
    assert established(options={}, ip_bytes=40)["MSS"] == 1220
    end.write(b"x")
    assert [(one.ts, one.sacks) for one in end.run()] == [(None, [])]


def test_the_window_of_a_syn_is_not_scaled() -> None:
    end = established()
    assert end["SND_WND"] == 65535 and end["SND_SHIFT"] == 7
    end.run(segment(end, window=100))
    assert end["SND_WND"] == 12800


def test_simultaneous_open() -> None:
    one, two = End(iss=100), End(iss=200)
    one.connect(), two.connect()
    first, second = one.run(), two.run()
    first, second = one.run(*second), two.run(*first)
    assert one.state == two.state == "SYN_RECEIVED"
    assert [x.flags for x in first] == [x.flags for x in second] == ["SA"]
    first, second = one.run(*second), two.run(*first)
    assert one.state == two.state == "ESTABLISHED"
    assert one.run(*second) == two.run(*first) == []
    one.write(b"hello")
    two.run(*one.run())
    assert two.read() == b"hello"


def test_a_lost_syn_begins_with_one_segment() -> None:
    end = End(iss=ISS)
    end.connect()
    end.run()
    until(end, "RTX_AT")
    end.now += MS
    end.run(syn(end, "SA"))
    assert end["CWND"] == MSS and end["BACKOFF"] == 0       # RFC 5681 section 3.1


def test_numbers_of_a_reset() -> None:
    """RFC 9293 section 3.10.7.1."""
    end = reach("CLOSED")
    assert [(x.flags, x.seq, x.ack) for x in end.run(Segment("A", 7, 99))] == [("R", 99, 0)]
    assert [(x.flags, x.seq, x.ack) for x in end.run(Segment("S", 7, data=b"ab"))] == [("RA", 0, 10)]
    assert end.run(Segment("R", 7, 99)) == end.run(Segment("RA", 7, 99)) == []


# -- first check: the window ---------------------------------------------------------------------------------


def test_overlaps_are_trimmed_to_the_window() -> None:
    end = established(receive=4096)
    end.run(segment(end, data=b"abcdef"))
    end.run(segment(end, at=-3, data=b"XXXghi"))
    assert end.read() == b"abcdefghi"
    room = end["RCV_RIGHT"] - end["RCV_NXT"]
    end.run(segment(end, data=b"z" * (room + 100)))
    assert end["RCV_NXT"] == end["RCV_RIGHT"] and end.read() == b"z" * room


def test_an_ack_counts_although_the_window_is_closed() -> None:
    """Section 3.10.7.4: "special allowance should be made to accept valid ACKs"."""
    end = established(receive=4096)
    end.run(segment(end, data=b"z" * (end["RCV_RIGHT"] - end["RCV_NXT"])))
    end.write(b"data")
    end.run()
    out = end.run(segment(end, data=b"more"))
    assert end["SND_UNA"] == 5
    assert [(x.flags, x.window) for x in out] == [("A", 0)]
    end.write(b"data")
    end.run()
    end.run(segment(end))
    assert end["SND_UNA"] == 9


def test_an_ack_at_the_edge_of_a_full_window_counts() -> None:
    end = established()
    end.write(b"data")
    end.run()
    end.run(segment(end, at=end["RCV_RIGHT"] - end["RCV_NXT"]))
    assert end["SND_UNA"] == 5


def test_a_keepalive_probe_is_answered_each_time() -> None:
    end = established()
    for _ in range(30):
        assert [x.flags for x in end.run(segment(end, at=-1))] == ["A"]


def test_duplicates_are_counted_and_told() -> None:
    end = established()
    end.run(segment(end, data=b"0123456789"))
    out = end.run(segment(end, at=-10, data=b"0123456789"))
    assert end["DUPLICATES_IN"] == 1 and end.read() == b"0123456789"
    assert out[0].sacks == [(PEER + 1, PEER + 11)]      # RFC 2883


# -- PAWS, RFC 7323 ------------------------------------------------------------------------------------------


def test_paws_drops_an_old_duplicate() -> None:
    end = established()
    out = end.run(segment(end, data=b"old", stamp=-1))
    assert [x.flags for x in out] == ["A"] and end.read() == b""


def test_paws_lets_a_timestamp_wrap() -> None:
    end = established(options={"mss": 1460, "ts": (0xFFFFFFFF, 77)})
    end.run(segment(end, data=b"new", ts=(0, 77)))
    assert end.read() == b"new" and end["TS_RECENT"] == 0


def test_paws_forgets_after_24_days() -> None:
    """Section 5.5."""
    end = established()
    end.now += 25 * 86400 * SECOND
    end.run(segment(end, data=b"new", ts=(1, 77)))
    assert end.read() == b"new" and end["TS_RECENT"] == 1


def test_paws_does_not_apply_to_resets() -> None:
    end = established()
    end.run(segment(end, "R", ts=(0, 0)))
    assert end.state == "CLOSED"


def test_a_segment_without_the_agreed_timestamp_is_dropped() -> None:
    """Section 3.2; but it never ends the connection."""
    end = established()
    assert end.run(segment(end, data=b"data", ts=None)) == []
    assert end.state == "ESTABLISHED" and end.read() == b""
    end.run(segment(end, "R", ts=None))
    assert end.state == "CLOSED"


def test_the_timestamp_that_is_echoed_is_that_of_the_first_unacknowledged_segment() -> None:
    """Section 4.3."""
    end = established()
    first = segment(end, data=b"a" * MSS)
    end.arrive(first)
    end.now += 10 * MS
    assert first.ts and end.run(segment(end, data=b"b" * MSS))[0].ts[1] == first.ts[0]


# -- RFC 5961 ------------------------------------------------------------------------------------------------


def test_challenge_acks_are_limited() -> None:
    """Section 7."""
    end = established()
    sent = sum(len(end.run(segment(end, "S", at=i + 1))) for i in range(50))
    assert sent == 10
    end.now += SECOND
    assert len(end.run(segment(end, "S", at=1))) == 1


@pytest.mark.parametrize("state", ["ESTABLISHED", "FIN_WAIT_1", "CLOSE_WAIT", "TIME_WAIT"])
def test_a_blind_reset_needs_the_exact_number(state: str) -> None:
    """Section 3.2."""
    end = reach(state)
    right = end["RCV_RIGHT"] - end["RCV_NXT"]
    for at in (-1, 1, right - 1, right + 1):
        end.run(segment(end, "R", at=at))
        assert end.state == state


def test_a_blind_ack_has_to_be_near() -> None:
    """Section 5.2: [SND.UNA - MAX.SND.WND, SND.NXT]."""
    end = established()
    end.run(segment(end, data=b"ok", ack=end["SND_UNA"] - end["MAX_WND"]))
    assert end.read() == b"ok"
    for ack in (end["SND_UNA"] - end["MAX_WND"] - 1, end["SND_MAX"] + 1):
        out = end.run(segment(end, data=b"forged", ack=ack))
        assert [x.flags for x in out] == ["A"] and end.read() == b""


# -- fifth check: ACK, window --------------------------------------------------------------------------------


def test_an_old_segment_does_not_change_the_window() -> None:
    """SND.WL1, SND.WL2 (section 3.10.7.4)."""
    end = established()
    late = segment(end, data=b"a", window=1)
    end.run(segment(end, at=1, data=b"b", window=300))
    end.run(late)
    assert end["SND_WND"] == 300 << 7 and end["MAX_WND"] == 65535


def test_free_room_is_told_from_a_third_on() -> None:
    end = established(send=4096)
    end.write(b"x" * 4096)
    end.run()
    take(end, segment(end, ack=1 + 1000))
    assert not end.events & T.EV_WRITABLE
    take(end, segment(end, ack=1 + 1448))
    assert end.events & T.EV_WRITABLE


def test_answers_to_window_probes_are_no_duplicates() -> None:
    end = established()
    end.run(segment(end, window=0))
    end.write(b"x" * 5000)
    end.run()
    for _ in range(5):
        assert [len(x.data) for x in until(end, "PERSIST_AT")] == [1]
        assert end.run(segment(end, ack=1, window=0)) == []
        assert end["DUPACKS"] == 0
    assert sum(len(x.data) for x in end.run(segment(end, ack=1))) == 5000


# -- text and FIN --------------------------------------------------------------------------------------------


def test_every_second_full_segment_is_acknowledged_at_once() -> None:
    """RFC 9293 section 3.8.6.3."""
    end = established()
    assert end.run(segment(end, data=b"a" * MSS)) == []
    assert end["DELACK_AT"] == end.now + 40 * MS
    out = end.run(segment(end, data=b"b" * MSS))
    assert [x.ack for x in out] == [PEER + 1 + 2 * MSS] and end["DELACK_AT"] == 0


def test_many_segments_get_one_ack() -> None:
    """MUST-59."""
    end = established()
    end.arrive(*[segment(end, at=i * MSS, data=b"a" * MSS) for i in range(1)])
    for _ in range(9):
        end.arrive(segment(end, data=b"a" * MSS))
    assert [x.ack for x in end.run()] == [PEER + 1 + 10 * MSS]


def test_a_merged_segment_is_acknowledged_at_once() -> None:
    """A netif that merges hands us many segments as one."""
    end = established()
    for _ in range(3):
        assert len(end.run(segment(end, data=b"a" * 14480))) == 1


def test_a_hole_and_its_filling_are_acknowledged_at_once() -> None:
    """RFC 5681 section 4.2."""
    end = established()
    out = end.run(segment(end, at=100, data=b"b" * 100))
    assert [(x.ack, x.sacks) for x in out] == [(PEER + 1, [(PEER + 101, PEER + 201)])]
    out = end.run(segment(end, data=b"a" * 100))
    assert [(x.ack, x.sacks) for x in out] == [(PEER + 201, [])]
    assert end.read() == b"a" * 100 + b"b" * 100


def test_quickack() -> None:
    end = established()
    end.options = T.OPT_QUICKACK
    assert len(end.run(segment(end, data=b"a"))) == 1


def test_a_fin_waits_for_the_data_before_it() -> None:
    end = established()
    end.run(segment(end, "FA", at=3, data=b"def"))
    assert end.state == "ESTABLISHED" and not end.eof
    out = take(end, segment(end, data=b"abc"))
    assert end.state == "CLOSE_WAIT" and [x.ack for x in out] == [PEER + 8]
    assert end.read() == b"abcdef" and end.eof and end.events & T.EV_READABLE


def test_data_behind_a_fin_are_no_data() -> None:
    end = established()
    end.run(segment(end, "FA", at=3, data=b"def"))
    end.run(segment(end, at=6, data=b"never"))
    end.run(segment(end, data=b"abc"))
    assert end.read() == b"abcdef" and end.state == "CLOSE_WAIT"


def test_a_fin_that_contradicts_what_came_is_not_believed() -> None:
    end = established()
    end.run(segment(end, at=10, data=b"later"))
    end.run(segment(end, "FA", at=3, data=b"def"))
    end.run(segment(end, data=b"abc"))
    assert end.state == "ESTABLISHED"


def test_time_wait_begins_anew_with_each_fin() -> None:
    end = reach("TIME_WAIT")
    first = end["END_AT"]
    end.now += 10 * SECOND
    fire(end, "FIN")
    assert end["END_AT"] == first + 10 * SECOND + MS


def test_urgent_data_are_in_line() -> None:
    end = established()
    end.run(segment(end, "AU", data=b"urgent"))
    assert end.read() == b"urgent"


def test_what_is_no_segment_is_ignored() -> None:
    end = established()
    for raw in (b"", b"\0" * 19, Segment("R", PEER + 1).wire()[:12] + b"\xf0" + b"\4" + b"\0" * 6):
        assert end.run(raw) == []
    assert end.state == "ESTABLISHED"


# -- what the network says -----------------------------------------------------------------------------------


def test_a_smaller_path_mtu_sends_again_in_smaller_segments() -> None:
    """RFC 1191 section 6.4, without punishment."""
    end = established()
    end.write(b"x" * 6000)
    assert max(len(x.data) for x in end.run()) == MSS
    window = end["CWND"]
    end.control(T.CTL_MTU, 1000, ISS + 1)
    out = end.run()
    assert end["MSS"] == 948 and end["CWND"] == window and end["BACKOFF"] == 0
    assert sum(len(x.data) for x in out) == 6000 and max(len(x.data) for x in out) == 948


@pytest.mark.parametrize("seq, mtu", [(ISS + 1 + 6000, 1000), (ISS, 1000), (ISS + 1, 1500), (ISS + 1, 9000)])
def test_a_path_mtu_that_cannot_be_is_ignored(seq: int, mtu: int) -> None:
    """RFC 5927 section 7.2: about a segment that is under way, and downwards only."""
    end = established()
    end.write(b"x" * 6000)
    end.run()
    end.control(T.CTL_MTU, mtu, seq)
    assert end["MTU"] == 1500 and end["MSS"] == MSS


def test_a_path_mtu_has_a_floor_and_a_default() -> None:
    for ip_bytes, value, result in ((20, 1, 296), (40, 1, 1280), (20, 0, 1492), (40, 0, 1492)):
        end = established(ip_bytes=ip_bytes)
        end.write(b"x" * 6000)
        end.run()
        end.control(T.CTL_MTU, value, ISS + 1)
        assert end["MTU"] == result


def test_unreachable_is_a_reason_only_in_the_end() -> None:
    """RFC 1122 section 4.2.3.9, RFC 5927 section 5.2."""
    end = reach("ESTABLISHED", "RETRANSMIT_LIMIT")
    end.control(T.CTL_UNREACHABLE, errno.ENETUNREACH, ISS + 1)
    end.control(T.CTL_REFUSED, 0, ISS + 1 + 5)      # nothing of ours
    assert end.state == "ESTABLISHED"
    fire(end, "RETRANSMIT_LIMIT")
    assert end["ERROR"] == errno.ENETUNREACH


def test_refused_by_icmp() -> None:
    end = reach("SYN_SENT")
    end.control(T.CTL_REFUSED, 0, ISS)
    assert end.state == "CLOSED" and end["ERROR"] == errno.ECONNREFUSED
