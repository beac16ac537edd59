"""What is sent: new data, Nagle, silly windows on both sides, FIN, ACKs, and a small X_OUT."""

from __future__ import annotations

import pytest

from dataplane.shm import layout_tcp as T
from tests.tcp.cells import ISS, PEER, established, reach, segment, until
from tests.tcp.rig import MS, Segment

MSS = 1448


def lengths(out: list[Segment]) -> list[int]:
    return [len(one.data) for one in out]


# -- new data ------------------------------------------------------------------------------------------------


def test_one_record_carries_many_segments() -> None:
    end = established()
    end.write(bytes(range(256)) * 40)
    end.offload = True
    out = end.run()
    assert lengths(out) == [10240] and out[0].flags == "PA" and out[0].data == bytes(range(256)) * 40


def test_records_are_whole_segments() -> None:
    end = established(send=1 << 20)
    end["CWND"] = 1 << 20
    end.run(segment(end, window=65535))
    end.write(b"x" * 200_000)
    end.offload = True
    out = end.run()
    most = T.OUT_BYTES_MAX // MSS * MSS
    assert lengths(out) == [most, most, most, 200_000 - 3 * most]
    assert [one.flags for one in out] == ["A", "A", "A", "PA"]


def test_the_congestion_window_makes_no_small_segments() -> None:
    end = established()
    end.write(b"x" * 60_000)
    assert lengths(end.run()) == [MSS] * 10
    end["CWND"] += 1000
    assert end.run() == []


def test_a_record_at_the_end_of_the_ring_goes_on_at_its_start() -> None:
    end = established(send=4096)
    for i in range(20):
        data = bytes([i]) * 1000
        end.write(data)
        assert b"".join(one.data for one in end.run()) == data
        end.now += MS
        end.run(segment(end))


# -- Nagle (RFC 9293 section 3.7.4) --------------------------------------------------------------------------


def test_nagle_holds_the_second_small_segment() -> None:
    end = established()
    end.write(b"one")
    assert lengths(end.run()) == [3]
    end.write(b"two")
    assert end.run() == []
    end.write(b"x" * MSS)
    assert lengths(end.run()) == [MSS]      # full ones go
    assert lengths(end.run(segment(end))) == [3]


def test_nagle_in_minshalls_form() -> None:
    """Full segments that are outstanding do not hold the tail back."""
    end = established()
    end.write(b"x" * (2 * MSS + 10))
    assert lengths(end.run()) == [MSS, MSS, 10]


def test_nodelay() -> None:
    end = established()
    end.options = T.OPT_NODELAY
    for _ in range(3):
        end.write(b"now")
        assert lengths(end.run()) == [3]


def test_cork_lets_only_full_segments_go_for_a_while() -> None:
    end = established()
    end.options = T.OPT_CORK
    end.write(b"x" * (MSS + 10))
    assert lengths(end.run()) == [MSS]
    assert end.run(segment(end)) == []
    assert lengths(until(end, "PERSIST_AT")) == [10]
    end.run(segment(end))
    end.write(b"y")
    assert end.run() == []
    end.options = 0
    assert lengths(end.run()) == [1]


def test_a_fin_overrides_nagle_and_cork() -> None:
    end = established()
    end.options = T.OPT_CORK
    end.write(b"one")
    end.run()
    end.write(b"two")
    end.shutdown()
    assert [(one.flags, one.data) for one in end.run()] == [("FPA", b"onetwo")]


# -- sender's silly-window avoidance (section 3.8.6.2.1) -----------------------------------------------------


def test_a_small_window_is_not_used() -> None:
    end = established()
    end.run(segment(end, window=1))
    end.write(b"x" * 5000)
    assert end.run() == []
    assert lengths(until(end, "PERSIST_AT")) == [128]       # (4): the override timeout


def test_half_of_the_largest_window_is_enough() -> None:
    end = established(options={"mss": 1460})
    end["MAX_WND"] = 800
    end.run(segment(end, window=400))
    end.write(b"x" * 5000)
    assert lengths(end.run()) == [400]


def test_all_that_is_left_goes_into_any_window() -> None:
    end = established()
    end.run(segment(end, window=1))
    end.write(b"x" * 128)
    assert lengths(end.run()) == [128]


def test_the_window_bounds_what_is_outstanding() -> None:
    end = established()
    end.run(segment(end, window=30))
    end.write(b"x" * 20_000)
    assert sum(lengths(end.run())) == 2 * MSS


# -- FIN -----------------------------------------------------------------------------------------------------


def test_the_fin_goes_with_the_last_data() -> None:
    end = established()
    end.write(b"last")
    end.shutdown()
    out = end.run()
    assert [(one.flags, one.data, one.seq) for one in out] == [("FPA", b"last", ISS + 1)]
    assert end["SND_MAX"] == 6 and end.run() == []


def test_a_fin_needs_room_in_the_window() -> None:
    end = established()
    end.run(segment(end, window=1))
    end.write(b"x" * 128)
    end.shutdown()
    assert [one.flags for one in end.run()] == ["PA"]
    assert [one.flags for one in end.run(segment(end))] == ["FA"]


def test_nothing_is_sent_behind_a_fin() -> None:
    end = reach("FIN_WAIT_1")
    end.write(b"late")
    assert end.run() == [] and end.run(segment(end, fin=True)) == [] and end.state == "FIN_WAIT_2"


def test_a_fin_is_sent_again_with_the_data_before_it() -> None:
    end = established()
    end.write(b"last")
    end.shutdown()
    end.run()
    end["PROBE_AT"] = 0
    assert [(one.flags, one.data) for one in until(end, "RTX_AT")] == [("FPA", b"last")]


def test_a_lost_segment_is_sent_again_once() -> None:
    end = established()
    end.write(b"x" * (8 * MSS))
    end.run()
    end.now += 10 * MS
    out: list[Segment] = []
    for i in range(1, 5):
        top = ISS + 1 + (i + 1) * MSS
        out += end.run(segment(end, ack=1, sacks=[(ISS + 1 + MSS, top)]))
    assert [len(one.data) for one in out if one.seq == ISS + 1 and one.data] == [MSS]


# -- receiver's side -----------------------------------------------------------------------------------------


def test_the_right_edge_never_goes_back() -> None:
    end = established(receive=16384)
    edge = 0
    for size in (1, 1000, 3000, 77, 5000):
        for one in end.run(segment(end, data=b"x" * size), segment(end)):
            right = one.ack + (one.window << end["RCV_SHIFT"])
            assert right >= edge
            edge = right
        end.now += 100 * MS
        end.read(size // 2)
        end.run()


def test_the_window_counts_what_is_unread() -> None:
    end = established(receive=8192)
    end.run(segment(end, data=b"x" * MSS))
    out = end.run(segment(end, data=b"x" * MSS))
    assert out[0].window == 8192 - 2 * MSS


def test_a_window_opens_by_a_full_segment_or_half_a_ring_at_once() -> None:
    """Section 3.8.6.2.2."""
    end = established(receive=8192)
    end.run(segment(end, data=b"x" * 8192))
    assert end["RCV_RIGHT"] == end["RCV_NXT"]
    for _ in range(4):
        end.read(500)
        assert end.run() == []
    assert [one.window for one in end.run(segment(end, data=b"probe"))] == [2000]
    end.read(500)
    assert [one.window for one in end.run(segment(end, at=-1))] == [2000]
    end.read(1500)
    assert end.run() == []
    end.read(2000)
    assert [(one.flags, one.window) for one in end.run()] == [("A", 6000)]


def test_a_window_update_is_sent_when_enough_was_read() -> None:
    end = established(receive=65536)
    end.run(*[segment(end, data=b"x" * 16000)])
    for _ in range(3):
        end.run(segment(end, data=b"x" * 16000))
    end.read(2000)
    assert end.run() == []          # too little to tell
    end.read(8000)
    assert [one.window << end["RCV_SHIFT"] for one in end.run()] == [11536]
    end.read(10_000)
    assert end.run() == []          # the peer has enough for now
    end.read(10_000)
    assert [one.window << end["RCV_SHIFT"] for one in end.run()] == [31536]


def test_the_window_fits_the_lane() -> None:
    """At most three quarters of a lane are under way."""
    end = established(receive=65536, lane=65536)
    out = end.run(segment(end, data=b"x"), segment(end, at=-1))
    assert out[-1].window << end["RCV_SHIFT"] <= 49152
    assert end["RCV_RIGHT"] - end["RCV_NXT"] <= 49152


def test_data_take_the_ack_along() -> None:
    end = established()
    end.run(segment(end, data=b"request"))
    assert end["DELACK_AT"] > 0
    end.write(b"answer")
    out = end.run()
    assert [(one.ack, one.data) for one in out] == [(PEER + 8, b"answer")]
    assert end["DELACK_AT"] == 0 and end["LAST_ACK_SENT"] == end["RCV_NXT"]


def test_sack_blocks_go_alone() -> None:
    end = established()
    end.write(b"answer")
    out = end.run(segment(end, at=10, data=b"later"))
    assert [(one.data, one.sacks) for one in out] == [(b"", [(PEER + 11, PEER + 16)]), (b"answer", [])]


# -- X_OUT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 2, 3])
def test_little_room_for_segments_changes_nothing_but_their_number_in_a_run(room: int) -> None:
    ends = established(send=1 << 20), established(send=1 << 20)
    outs = []
    for end, most in zip(ends, (T.OUT_MAX, room), strict=True):
        end.set(end.x + T.X_OUT_MAX, most)
        end["CWND"] = 1 << 20
        end.run(segment(end, window=65535))
        end.write(b"x" * 300_000)
        end.shutdown()
        outs.append(end.run(segment(end, at=10, data=b"later", window=65535)))
    assert outs[0] == outs[1] and len(outs[0]) > 200


def test_the_deadline_goes_with_every_segment() -> None:
    end = established()
    end.write(b"x" * 5000)
    end.run()
    count = end.word(end.x + T.X_OUT_COUNT)
    assert count > 0 and end.deadline > end.now
    assert {end.word(end.x + T.X_OUT + i * T.O_BYTES + T.O_DEADLINE) for i in range(count)} == {end.deadline}


def test_an_end_that_has_nothing_to_do_says_so() -> None:
    end = reach("CLOSED")
    assert end.run(Segment("R")) == [] and end.deadline == 0
