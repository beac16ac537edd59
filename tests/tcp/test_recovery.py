"""Recovery rule by rule, against RFC 6675 written byte by byte, and over a path that loses and reorders."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.shm import layout_tcp as T
from tests.tcp.sender import MS, MSS, SECOND, Sender


def at(n: int) -> int:
    """Position of the first byte of segment n."""
    return 1 + n * MSS


def segments(*numbers: int) -> list[tuple[int, int]]:
    return [(at(n), at(n + 1)) for n in numbers]


def again(*numbers: int) -> list[tuple[int, int, bool]]:
    return [(at(n), at(n + 1), True) for n in numbers]


def warm(mode: str = "plain", flight: int = 10, rtt: int = 20 * MS, **how: bool | int) -> Sender:
    """A sender with a sample of the round trip, and so many segments in flight that fill its window."""
    s = Sender(mode, **how)     # type: ignore[arg-type]
    s.do("rtt_sample", rtt)
    s["CWND"] = flight * s.mss
    s.send(flight * s.mss)
    return s


# -- RFC 6675, byte by byte ----------------------------------------------------------------------------------


class Oracle:
    """Section 4 of RFC 6675, literally, for sequence numbers one by one."""

    def __init__(self, s: Sender) -> None:
        self.una, self.top, self.rxt, self.mss = s["SND_UNA"], s["SND_MAX"], s["HIGH_RXT"], s.mss
        self.sacked = {n for a, b in s.sacked for n in range(a, b)}
        self.runs = s.sacked

    def is_lost(self, n: int) -> bool:
        return (sum(a > n for a, _ in self.runs) >= 3 or sum(m > n for m in self.sacked) > 2 * self.mss)

    def pipe(self) -> int:
        count = 0
        for n in range(self.una, self.top):
            if n not in self.sacked:
                count += (not self.is_lost(n)) + (n < self.rxt)     # (a), (b)
        return count

    def next_lost(self) -> int | None:
        for n in range(max(self.una, self.rxt), max(self.sacked, default=0)):
            if n not in self.sacked and self.is_lost(n):
                return n
        return None


@given(st.sets(st.integers(1, 39), min_size=1, max_size=30), st.integers(0, 40), st.integers(1, 7))
def test_pipe_and_next_segment(numbers: set[int], swept: int, mss: int) -> None:
    s = Sender(mss=mss)
    s.send(40 * mss)
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][1] == 1 + n * mss:
            runs[-1][1] += mss
        else:
            runs.append([1 + n * mss, 1 + (n + 1) * mss])
    if len(runs) > T.SB_MAX:
        return
    s["SB_COUNT"] = len(runs)
    for i, (a, b) in enumerate(runs):
        s.set(s.t + T.T_SB + 16 * i, a)
        s.set(s.t + T.T_SB + 16 * i + 8, b)
    s["PHASE"], s["RECOVER"], s["HIGH_RXT"] = T.PHASE_RECOVERY, s["SND_MAX"], 1 + swept * mss
    s["CWND"] = 1 << 20
    oracle = Oracle(s)
    assert s.do("pipe") == oracle.pipe()
    expected = oracle.next_lost()
    s.set(s.X + T.X_WRITTEN, 1 << 30)       # (2): there are new data, so neither (3) nor (4)
    start, length = s.do("recovery_next")
    assert (start if length else None) == expected
    for n in range(start, start + length):
        assert n not in oracle.sacked and oracle.is_lost(n)


# -- fast retransmit and recovery ---------------------------------------------------------------------------


def test_limited_transmit() -> None:
    """RFC 3042, RFC 6675 section 5 (3): a segment for each of the first two duplicate ACKs."""
    for sack in (True, False):
        s = warm(sack=sack)
        assert s.do("send_allowance") == 0
        for n in (1, 2):
            s.ack(1, segments(n) if sack else None)
            assert s.output() == [(at(9 + n), at(10 + n), False)]
        assert s["PHASE"] == T.PHASE_OPEN


def test_limited_transmit_is_limited() -> None:
    s = warm(sack=False)
    s["RECOVER"] = at(5)        # RFC 6582 section 3.2 step 1: these duplicates may be of our own making
    for _ in range(8):
        s.ack(1)
    assert s["PHASE"] == T.PHASE_OPEN and s.do("send_allowance") == 2 * MSS


@pytest.mark.parametrize("newreno", [False, True])
def test_fast_retransmit_with_sack(newreno: bool) -> None:
    s = warm(flight=20, newreno=newreno)
    for n in (1, 2):
        s.ack(1, [(at(1), at(n + 1))])
        assert s.output(0) == []
    s.ack(1, [(at(1), at(4))])
    assert s["PHASE"] == T.PHASE_RECOVERY and s["RECOVER"] == at(20)
    assert s["SSTHRESH"] == (10 if newreno else 14) * MSS
    assert s.output(0) == again(0)          # (4.3), although pipe > cwnd
    assert s.output(0) == []
    sent = 0
    for n in range(4, 20):
        s.ack(1, [(at(1), at(n + 1))])
        sent += sum(b - a for a, b, _ in s.output())
    # RFC 6937: over the round trip, out is to delivered as ssthresh is to what was in flight.
    assert abs(sent - 16 * MSS * s["SSTHRESH"] // (20 * MSS)) <= 2 * MSS
    s.ack(at(20))
    assert s["PHASE"] == T.PHASE_OPEN and s["CWND"] == s["SSTHRESH"] == (10 if newreno else 14) * MSS


def test_three_separate_blocks() -> None:
    """IsLost by DupThresh discontiguous sequences, whatever their size."""
    s = warm()
    s.ack(1, [(at(1), at(1) + 10), (at(3), at(3) + 10), (at(5), at(5) + 10)])
    assert s["PHASE"] == T.PHASE_RECOVERY
    assert s.output(0)[0] == (1, 1 + MSS, True)


def test_holes_in_order_and_each_once() -> None:
    s = warm(flight=30)
    s.ack(1, [(at(1), at(5)), (at(6), at(10)), (at(12), at(30))])
    sent = s.output(0)
    for _ in range(3):
        s.now += MS
        s.do("ack_process", 1, 0, 0)
        sent += s.output(0)
    covered = [(a, b) for a, b, retransmitted in sent if retransmitted]
    assert covered == [(at(0), at(1)), (at(5), at(6)), (at(10), at(12))]


def test_long_hole_is_cut_to_the_window() -> None:
    s = warm(flight=40)
    s.ack(1, [(at(20), at(40))])
    first = s.output(0)
    assert first[0][0] == 1 and all((b - a) % MSS == 0 for a, b, _ in first)
    assert s.do("pipe") <= max(s["CWND"], MSS)


def test_partial_ack_without_sack() -> None:
    """RFC 6582 section 3.2 step 3: two of ten lost, one retransmission each round trip, no timeout."""
    s = warm(sack=False)
    for _ in range(3):
        s.ack(1)
    assert s["PHASE"] == T.PHASE_RECOVERY and s.output(0) == again(0)
    for _ in range(5):
        s.ack(1)
    assert s.output(0) == []
    s.ack(at(4))
    assert s["PHASE"] == T.PHASE_RECOVERY and s.output(0) == again(4)
    s.ack(at(10))
    assert s["PHASE"] == T.PHASE_OPEN and s["CWND"] <= s["SSTHRESH"]
    assert s["DUPACKS"] == 0


def test_inflation_without_sack() -> None:
    """RFC 5681 section 3.2 step 4: behind half a window of duplicates, new data for each."""
    s = warm(sack=False, flight=20, newreno=True)
    for _ in range(3):
        s.ack(1)
    s.output()
    sent = 0
    for _ in range(16):
        s.ack(1)
        sent += sum(b - a for a, b, _ in s.output())
    assert 7 * MSS <= sent <= 9 * MSS and s["SSTHRESH"] == 10 * MSS


def test_not_again_for_duplicates_of_the_same_window() -> None:
    """RFC 6582 section 3.2 step 1."""
    s = warm(sack=False)
    for _ in range(3):
        s.ack(1)
    s.output(0)
    s.ack(at(10))
    s.output()
    reduced = s["SSTHRESH"]
    s["SND_UNA"] = s["RECOVER"] - 1         # as if the last byte were still missing
    for _ in range(5):
        s.ack(s["SND_UNA"])
    assert s["PHASE"] == T.PHASE_OPEN and s["SSTHRESH"] == reduced


def test_not_lost_yet_and_rescue() -> None:
    """NextSeg (3) and (4): with no new data, what is not lost yet, then the last segment, once."""
    s = warm(flight=10, written=at(10))
    s.ack(1, segments(1, 2, 3))
    assert s.output(0) == again(0)
    s.ack(1, [(at(1), at(4)), (at(5), at(6))])
    s["CWND"] = 20 * MSS
    assert s.output(0) == again(4, 9)
    assert s["HIGH_RXT"] == at(5)           # the rescue is none of the sweep
    assert s.output(0) == []


def test_fin_is_a_position() -> None:
    s = warm(flight=5)
    s.do("sent", at(5), at(5) + 1, 0)
    s["FIN_AT"] = at(5)
    s.timeout()
    s["CWND"] = 20 * MSS
    assert s.output(0) == [(1, at(5) + 1, True)]


def test_the_byte_of_a_window_probe_is_not_in_flight() -> None:
    s = Sender()
    s.send(MSS)
    s.now += 20 * MS
    s.ack(at(1))
    s["SND_MAX"], s["CWND"] = at(1) + 1, MSS
    assert s.do("pipe") == 0 and s.do("send_allowance") == MSS
    s.do("ack_process", at(1), 0, 0)
    assert s["RTX_AT"] == s["PROBE_AT"] == 0
    s.do("ack_process", at(1) + 1, 0, 0)
    assert s["RTX_AT"] == 0 and s["SND_NXT"] == at(1) + 1


# -- timeout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sack", [True, False])
def test_timeout_and_slow_start(sack: bool) -> None:
    s = warm(sack=sack)
    timer = s["RTX_AT"]
    s.timeout()
    assert s.now == timer and s["CWND"] == MSS and s["BACKOFF"] == 1 and s["PHASE"] == T.PHASE_LOSS
    assert s["RTX_AT"] == s.now + 2 * 200 * MS
    assert s.output() == again(0)
    s.now += 20 * MS
    s.ack(at(1))
    assert s.output() == [(at(1), at(3), True)]
    s.now += 20 * MS
    s.ack(at(3))
    assert s["CWND"] in (3 * MSS, 4 * MSS)
    assert s.output()[0][:1] == (at(3),)
    s.ack(at(10))
    assert s["PHASE"] == T.PHASE_OPEN


def test_timeout_keeps_what_was_sacked() -> None:
    """RFC 6675 section 5.1."""
    s = warm()
    s.ack(1, segments(4, 7))
    s.timeout()
    s.output()
    s.ack(at(1))
    s["CWND"] = 20 * MSS
    assert s.output(0) == [(at(1), at(4), True), (at(5), at(7), True), (at(8), at(10), True)]


def test_second_timeout_forgets_it() -> None:
    """RFC 2018 section 8: the peer may have given it up."""
    s = warm()
    s.ack(1, segments(4, 7))
    s.timeout()
    s.output()
    s.timeout()
    assert s.sacked == []
    s["CWND"] = 20 * MSS
    assert s.output(0) == [(1, at(10), True)]


def test_duplicates_in_the_loss_phase_do_nothing() -> None:
    s = warm(sack=False)
    s.timeout()
    s.output()
    for _ in range(6):
        s.ack(1)
    assert s["PHASE"] == T.PHASE_LOSS and s.output() == []


def test_a_jump_in_the_loss_phase_is_no_window() -> None:
    """RFC 3465 section 2.3: the retransmission completed what arrived long ago."""
    for sack in (True, False):
        s = warm(sack=sack, flight=50)
        s.ack(1, [(at(1), at(2)), (at(3), at(49))] if sack else None)
        s.timeout()
        s.output()
        s.ack(at(49))
        assert s["CWND"] <= 5 * MSS


# -- tail ------------------------------------------------------------------------------------------------------


def test_tail_probe_with_the_last_segment() -> None:
    """RFC 8985 section 7: the whole tail is lost; a probe makes recovery of it, without a timeout."""
    s = warm(written=at(10))
    assert s["PROBE_AT"] == s.now + 40 * MS     # 2 SRTT
    assert s.probe() == (at(9), MSS)
    assert s["PROBE_AT"] == 0 and s["RTX_AT"] == s.now + 200 * MS and s["CWND"] == 10 * MSS
    s.now += 20 * MS
    s.ack(1, segments(9))
    assert s["PROBE_AT"] == s.now + 5 * MS
    assert s.probe()[1] == 0 and s["PHASE"] == T.PHASE_RECOVERY
    assert s.output()[0][0] == 1


def test_tail_probe_with_new_data() -> None:
    s = warm()
    assert s.probe() == (at(10), MSS)
    assert s["SND_MAX"] == at(11) and s["PROBE_AT"] == 0


def test_tail_probe_waits_for_a_delayed_ack() -> None:
    s = warm(flight=1, rtt=500 * MS)
    assert s["PROBE_AT"] == s.now + 1000 * MS + 200 * MS


def test_tail_probe_that_repaired_a_loss_counts_as_one() -> None:
    """Section 7.4.2."""
    s = warm(written=at(10))
    s.probe()
    s.now += 20 * MS
    s.ack(at(10))
    assert s["SSTHRESH"] > 1 << 20          # not known yet
    s.send(5 * MSS)
    s.ack(at(11))
    assert s["SSTHRESH"] == 5 * MSS * 7 // 10 and s["CWND"] <= 5 * MSS


def test_tail_probe_that_was_not_needed() -> None:
    for how in ("dsack", "second"):
        s = warm(written=at(10))
        s.probe()
        if how == "second":
            s.ack(at(10))
        s.ack(at(10), segments(9) if how == "dsack" else None)
        s.set(s.X + T.X_WRITTEN, 1 << 40)
        s.output()
        s.ack(at(11))
        assert s["CWND"] >= 10 * MSS and s["SSTHRESH"] > 1 << 20


def test_lost_retransmission_gets_a_second_chance() -> None:
    s = warm(written=at(10))
    s.ack(1, [(at(1), at(10))])
    assert s.output(0) == again(0)
    assert s.now < s["PROBE_AT"] < s["RTX_AT"]
    assert s.probe() == (1, MSS)
    assert s["PROBE_AT"] == 0           # once; then the timeout
    s.timeout()
    assert s["PHASE"] == T.PHASE_LOSS


# -- retransmissions without reason -----------------------------------------------------------------------------


def test_eifel() -> None:
    """RFC 3522: the ACK answers the original, which was only late."""
    s = warm(stamps=True)
    first = s.now
    s.now += 20 * MS
    s.ack(1, [(at(1), at(4))])
    assert s.output(0) == again(0) and s["CWND"] < 10 * MSS
    s.now += 12 * MS
    s.ack(at(4), tsecr=first)
    assert s["PHASE"] == T.PHASE_OPEN and s["CWND"] >= 10 * MSS and s["SSTHRESH"] > 1 << 20
    assert s["REORDER_WND"] == 15 * MS      # 12 ms late, and a quarter


def test_eifel_after_a_timeout() -> None:
    s = warm(stamps=True)
    first = s.now
    s.timeout()
    s.output()
    s.now += MS
    s.ack(at(2), tsecr=first)
    assert s["PHASE"] == T.PHASE_OPEN and s["CWND"] >= 10 * MSS and s["BACKOFF"] == 0
    assert s["REORDER_WND"] == 0


def test_a_retransmission_that_was_needed() -> None:
    s = warm(stamps=True)
    s.now += 20 * MS
    s.ack(1, [(at(1), at(4))])
    sent = s.now
    s.output(0)
    s.now += 20 * MS
    s.ack(at(4), tsecr=sent)
    assert s["PHASE"] == T.PHASE_RECOVERY and s["CWND"] < 10 * MSS


def test_d_sack_undoes() -> None:
    s = warm()
    s.ack(1, [(at(1), at(4))])
    s.output(0)
    s.ack(at(10))
    assert s["PHASE"] == T.PHASE_OPEN and s["CWND"] == 7 * MSS
    s.output()
    s.ack(at(10), segments(0))
    assert s["CWND"] == 10 * MSS and s["REORDER_WND"] > 0


def test_a_hole_that_fills_before_anything_is_sent_again() -> None:
    """Both ACKs waited in the queue: the first makes us enter recovery, the second out again."""
    s = warm()
    s.ack(1, [(at(1), at(4))])
    assert s["PHASE"] == T.PHASE_RECOVERY
    s.ack(at(4))
    assert s["PHASE"] == T.PHASE_OPEN and s["CWND"] >= 10 * MSS and s.do("recovery_next")[1] == 0


def test_reordering_known_means_time_decides() -> None:
    s = warm(flight=20)
    s["REORDER_WND"] = 30 * MS
    s.ack(1, [(at(1), at(10))])
    assert s["PHASE"] == T.PHASE_OPEN and s["PROBE_AT"] == s.now + 30 * MS
    assert sum(b - a for a, b, _ in s.output()) == 9 * MSS      # it goes on meanwhile
    assert s.probe()[1] == 0
    assert s["PHASE"] == T.PHASE_RECOVERY and s.output(0) == again(0)


def test_window_grows_with_what_is_late_and_wears_down() -> None:
    s = warm(flight=20)
    s["REORDER_WND"] = 10 * MS
    s.ack(1, [(at(1), at(10))])
    s.now += 40 * MS
    s.ack(at(10))       # 40 ms late, and not sent again
    assert s["REORDER_WND"] == 50 * MS
    for _ in range(60):
        s.output()
        base = s["SND_UNA"]
        s.ack(base, [(base + MSS, s["SND_MAX"])])
        s.probe()
        s.output(0)
        s.ack(s["SND_MAX"])
    assert s["REORDER_WND"] == 0        # DupThresh again


# -- any peer, and the compiled functions --------------------------------------------------------------------------


def storm(s: Sender, seed: int, steps: int = 150) -> None:
    """Random calls, with ACKs that make sense and ACKs that do not; Sender checks the invariants."""
    rng = random.Random(seed)
    for _ in range(steps):
        s.now += rng.randrange(30 * MS)
        una, top = s["SND_UNA"], s["SND_MAX"]
        match rng.randrange(6):
            case 0 | 1:
                s.output(rng.randrange(1, 30) * s.mss)
            case 2 | 3:
                ack = una if rng.random() < 0.5 else rng.randint(una, top)
                sacks = []
                for _ in range(rng.randrange(5)):
                    left = rng.randint(una - 3000, top + 2000)
                    sacks.append((left, left + rng.randint(-2000, 9000)))
                s.ack(ack, sacks, tsecr=s.now - rng.randrange(60 * MS), dup=rng.random() < 0.5)
            case 4:
                if s["PROBE_AT"]:
                    s.probe()
            case _:
                if s["RTX_AT"] and rng.random() < 0.4:
                    s.timeout()
        assert s.do("pipe") <= 2 * s.flight


@pytest.mark.parametrize("sack", [True, False])
@pytest.mark.parametrize("newreno", [True, False])
def test_any_peer(sack: bool, newreno: bool) -> None:
    for seed in range(30):
        storm(Sender(sack=sack, newreno=newreno, stamps=bool(seed & 1)), seed)


def test_compiled_does_the_same() -> None:
    for seed in range(8):
        plain, compiled = (Sender(mode, sack=bool(seed & 1), newreno=bool(seed & 2), stamps=bool(seed & 4))
                           for mode in ("plain", "compiled"))
        storm(plain, seed)
        storm(compiled, seed)
        assert plain.memory == compiled.memory


# -- over a path ------------------------------------------------------------------------------------------------------


@dataclass
class Path:
    """A path and a receiver that acknowledges as RFC 5681 and 2018 say: each segment at once when something is
    missing, else every second one."""

    sender: Sender
    seed: int = 1
    loss: float = 0.0
    lose: frozenset[int] = frozenset()      # starts of segments that are lost the first time
    early: float = 0.0          # this share is not delayed at all, as in netem's reordering
    delay: int = 50 * MS
    rate: int = 100_000_000 // 8    # bytes a second
    queue: int = 300 * MSS
    limit: int = 400 * MSS      # the peer's window
    answers: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    events: list[tuple[int, int, str, tuple[int, int, int]]] = field(default_factory=list)
    free_at: int = 0
    count: int = 0
    timeouts: int = 0
    out: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.got: list[tuple[int, int]] = []
        self.next, self.stamp, self.held = 1, 0, 0

    def push(self, when: int, kind: str, what: tuple[int, int, int]) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, kind, what))

    def transmit(self, start: int, end: int) -> None:
        """Segments of one output record onto the wire."""
        now = self.sender.now
        for a in range(start, end, MSS):
            b = min(a + MSS, end)
            self.out += b - a
            self.free_at = max(self.free_at, now)
            if (self.free_at - now) * self.rate // SECOND > self.queue:
                continue
            self.free_at += (b - a) * SECOND // self.rate
            if a in self.lose:
                self.lose -= {a}
            elif self.rng.random() >= self.loss:
                late = 0 if self.rng.random() < self.early else self.delay
                self.push(self.free_at + late, "data", (a, b, now))

    def receive(self, a: int, b: int, stamp: int) -> tuple[int, list[tuple[int, int]], int] | None:
        if a <= self.next:
            self.stamp = stamp
        blocks: list[tuple[int, int]] = []
        if b <= self.next or any(c <= a and b <= d for c, d in self.got):
            blocks.append((a, b))       # D-SACK
        merged = [(c, d) for c, d in self.got if c <= b and a <= d]
        new = (min([a, *(c for c, _ in merged)]), max([b, *(d for _, d in merged)]))
        self.got = [new, *(one for one in self.got if one not in merged)]
        for c, d in sorted(self.got):
            if c <= self.next:
                self.next = max(self.next, d)
        in_order = new[0] <= self.next and len(self.got) == 1
        self.got = [one for one in self.got if one[1] > self.next]
        self.held += 1
        if in_order and self.held < 2 and not blocks:
            return None
        self.held = 0
        return self.next, (blocks + self.got)[:3], self.stamp

    def output(self) -> None:
        s = self.sender
        room = self.limit - s.flight
        for start, end, _ in s.output(max(room, 0)):
            self.transmit(start, end)

    def run(self, size: int, most: int = 300 * SECOND) -> float:
        """Send until `size` bytes are acknowledged; bytes a second."""
        s, began = self.sender, self.sender.now
        s.set(s.X + T.X_WRITTEN, 1 << 40)
        self.output()
        while s["SND_UNA"] <= size:
            timers = [one for one in (s["RTX_AT"], s["PROBE_AT"]) if one]
            if timers and (not self.events or min(timers) <= self.events[0][0]):
                if s["PROBE_AT"] and s["PROBE_AT"] == min(timers):
                    start, length = s.probe()
                    if length:
                        self.transmit(start, start + length)
                else:
                    self.timeouts += 1
                    s.timeout()
            else:
                s.now, number, kind, what = heapq.heappop(self.events)
                if kind == "data":
                    if answer := self.receive(*what):
                        ack, blocks, stamp = answer
                        self.push(s.now + MS, "ack", (ack, stamp, 0))
                        self.answers[self.count] = blocks
                    else:
                        self.push(s.now + 40 * MS, "delayed", (0, 0, 0))
                elif kind == "delayed":
                    if self.held:
                        self.held = 0
                        self.push(s.now + MS, "ack", (self.next, self.stamp, 0))
                        self.answers[self.count] = list(self.got[:3])
                else:
                    blocks = self.answers.pop(number)
                    if what[0] >= s["SND_UNA"]:
                        s.ack(what[0], blocks, tsecr=what[1])
            self.output()
            assert s.now - began < most, (s["SND_UNA"], s.sacked, self.timeouts)
        return size * SECOND / (s.now - began)


def test_more_holes_than_the_scoreboard_has_room_for() -> None:
    """Forty holes in one window: some of what arrived is sent once more, and no timeout is needed."""
    s = Sender()
    s["CWND"] = 200 * MSS
    path = Path(s, lose=frozenset(at(n) for n in range(0, 200, 5)))
    path.run(2_000_000)
    assert path.timeouts == 0 and s["PHASE"] == T.PHASE_OPEN
    assert s["RETRANSMITS"] <= 250


def test_clean_path() -> None:
    path = Path(Sender(stamps=True))
    assert path.run(10_000_000) > 5_000_000 and path.timeouts == 0
    assert path.out <= 1.1 * 10_000_000 + 400 * MSS


@pytest.mark.parametrize("stamps", [True, False])
@pytest.mark.parametrize(("loss", "delay", "least"), [(0.01, MS, 2_500_000), (0.05, MS, 400_000),
                                                      (0.01, 20 * MS, 300_000)])
def test_lossy_path(loss: float, delay: int, least: int, stamps: bool) -> None:
    path = Path(Sender(stamps=stamps), loss=loss, delay=delay)
    speed = path.run(3_000_000)
    assert speed > least
    assert path.out < 3_000_000 * (1 + 2 * loss) + 400 * MSS


@pytest.mark.parametrize("stamps", [True, False])
def test_reordering_path(stamps: bool) -> None:
    """One in ten arrives 50 ms before those that were sent before it: hardly slower than none at all."""
    clean = Path(Sender(stamps=stamps)).run(10_000_000)
    path = Path(Sender(stamps=stamps), early=0.1)
    speed = path.run(10_000_000)
    assert speed > 0.6 * clean
    assert path.out < 1.1 * 10_000_000 + 400 * MSS and path.timeouts <= 1
