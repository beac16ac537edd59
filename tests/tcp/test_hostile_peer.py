"""A peer that sends anything: numbers near all edges, any flags and options, in any state; and an application that
does anything meanwhile. Both modes go along together, and agree in every word and byte.
"""

from __future__ import annotations

import random

import pytest

from dataplane.shm import layout_tcp as T
from tests.tcp.rig import MODES, MS, SECOND, WRAP, End, Segment


class Pair:
    """The same end in both modes."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(f"hostile {seed}")
        settings = {"send": 1 << dice.randint(12, 16), "receive": 1 << dice.randint(12, 16),
                    "iss": dice.randrange(WRAP), "mtu": dice.choice((296, 1500, 9000)),
                    "out_max": dice.choice((1, 3, 64)), "time_wait": 5 * SECOND}
        self.ends = [End(mode, **settings) for mode in MODES]
        self.irs = dice.randrange(WRAP)
        self.known = 0          # positions that we may have sent

    @property
    def end(self) -> End:
        return self.ends[0]

    def run(self, *segments: Segment | bytes) -> list[Segment]:
        outs = [end.run(*segments) for end in self.ends]
        assert outs[0] == outs[1]
        words = [end.memory[end.x:end.x + T.X_BYTES] for end in self.ends]
        rings = [end.memory[end.rcv:end.rcv + end.receive_bytes] for end in self.ends]
        assert words[0] == words[1] and rings[0] == rings[1]
        for one in outs[0]:
            self.known = max(self.known, (one.seq - self.end.iss) % WRAP + one.span if "R" not in one.flags else 0)
        return outs[0]

    def each(self, what: str, *arguments: object) -> None:
        results = [getattr(end, what)(*arguments) for end in self.ends]
        assert results[0] == results[1]

    def position(self, edges: list[int]) -> int:
        """A number at an edge, near one, or anywhere."""
        dice = self.dice
        if dice.random() < 0.05:
            return dice.randrange(WRAP)
        return dice.choice(edges) + dice.choice((0, 0, 0, 0, 1, -1, 2, -3, 100, -100, 1460, -70_000, 70_000))

    def segment(self) -> Segment:
        dice, end = self.dice, self.end
        mine = [end["SND_UNA"], end["SND_NXT"], end["SND_MAX"], 0, 1]
        yours = [end["RCV_NXT"], end["RCV_RIGHT"], end["RCV_NXT"] + 500, 0, 1]
        flags = dice.choice(("A", "A", "A", "PA", "PA", "UA", "", "S", "SA"))
        if dice.random() < 0.06:    # what ends connections, seldom enough for them to live
            flags = dice.choice(("FA", "FPA", "R", "RA", "SFA", "SR", "FSRPAUEC"))
        one = Segment(flags, (self.irs + self.position(yours)) % WRAP, (end.iss + self.position(mine)) % WRAP,
                      dice.choice((0, 1, 100, 1000, 65535)), dice.randbytes(dice.choice((0, 0, 0, 1, 100, 1460, 9000))))
        if end["FLAGS"] & T.TF_TIMESTAMPS and dice.random() < 0.95:
            one.ts = ((end["TS_RECENT"] + dice.choice((0, 0, 1, 10, -1, 1 << 31))) % WRAP, dice.randrange(WRAP))
        if dice.random() < 0.3:
            edges = [((end.iss + self.position(mine)) % WRAP, (end.iss + self.position(mine)) % WRAP)
                     for _ in range(dice.randint(1, 3))]
            one.sacks = edges
        elif "S" in flags:
            one.mss = dice.choice((None, 0, 1, 536, 1460, 65535))
            one.shift = dice.choice((None, 0, 7, 14, 255))
            one.sack_ok = dice.random() < 0.5
            one.ts = (dice.randrange(WRAP), dice.randrange(WRAP)) if dice.random() < 0.5 else one.ts
        return one

    def open(self) -> None:
        """Any way into a connection."""
        dice = self.dice
        syn = Segment("S", self.irs, 0, 65535, mss=dice.choice((None, 100, 1460)), shift=dice.choice((None, 0, 9)),
                      sack_ok=dice.random() < 0.7, ts=(dice.randrange(WRAP), 0) if dice.random() < 0.5 else None)
        if dice.random() < 0.5:
            for end in self.ends:
                answer = end.accept(syn)
                ack = Segment("A", (self.irs + 1) % WRAP, (end.iss + 1) % WRAP, 5000, ts=syn.ts and (syn.ts[0], 0))
                end.establish(ack, answer)
            self.run()
        else:
            for end in self.ends:
                end.connect()
            self.run()
            if dice.random() < 0.8:
                syn.flags, syn.ack = dice.choice(("SA", "S")), (self.end.iss + 1) % WRAP
                self.run(syn)

    def application(self) -> None:
        dice = self.dice
        kind = dice.choice(("write", "write", "write", "read", "read", "options", "shutdown", "close", "abort"))
        if kind == "write":
            self.each("write", dice.randbytes(dice.randrange(20_000)))
        elif kind == "read":
            self.each("read", dice.randrange(1, 20_000))
        elif kind == "options":
            options = dice.randrange(32)
            for end in self.ends:
                end.options = options
        elif dice.random() < 0.03:
            self.each(kind)

    def step(self) -> None:
        dice, end = self.dice, self.end
        what = dice.random()
        if what < 0.6:
            segments = [self.segment() for _ in range(dice.choice((1, 1, 1, 3)))]
            out = self.run(*segments)
            if all("R" in one.flags for one in segments):
                assert not any("R" in one.flags for one in out), "a reset answers a reset"
        elif what < 0.8:
            self.application()
            self.run()
        elif what < 0.97:
            pause = dice.choice((MS, 50 * MS, SECOND))
            now = end.deadline if end.deadline and dice.random() < 0.7 else end.now + pause
            for one in self.ends:
                one.now = max(now, one.now)
            self.run()
        elif what < 0.98:
            self.run(dice.randbytes(dice.randrange(80)))
        else:
            arguments = dice.choice((1, 2, 3, 9)), dice.choice((-1, 0, 113, 500, 1 << 40)), dice.randrange(WRAP)
            if dice.random() < 0.7:
                arguments = *arguments[:2], end.iss + end["SND_UNA"]
            self.each("control", *arguments)
            self.run()


def hostile(seed: int, steps: int = 120) -> None:
    pair = Pair(seed)
    pair.open()
    right = over = 0
    for _ in range(steps):
        over += pair.end.state == "CLOSED"
        if over > 5:
            break
        una, nxt, errors = pair.end["SND_UNA"], pair.end["RCV_NXT"], pair.end["ERROR"]
        pair.step()
        end = pair.end
        if end.state != "CLOSED":
            assert end["SND_UNA"] >= una and end["RCV_NXT"] >= nxt and end["RCV_RIGHT"] >= right
            assert end["SND_UNA"] <= end["SND_NXT"] <= end["SND_MAX"] <= end.written_to + 1
            assert end["RCV_NXT"] - end.read_to <= end.receive_bytes + 1
            right = end["RCV_RIGHT"]
        else:
            assert end.deadline == 0 and (not errors or end["ERROR"] == errors)


@pytest.mark.parametrize("seed", range(150))
def test_hostile_peer(seed):
    hostile(seed)


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_many_hostile_peers():
    for seed in range(150, 5000):
        try:
            hostile(seed, 300)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
