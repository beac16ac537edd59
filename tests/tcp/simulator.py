"""Two of our stacks on a simulated network: seeded, with explicit time, so that every run can be had again.

    result = Simulation(SCENARIOS["loss 5%"], mode="plain").run()
    python -m tests.tcp.simulator               # the table
    python -m tests.tcp.simulator --record      # writes it to recorded.json
    python -m tests.tcp.simulator --trace "loss 5%"     # every segment

Each end has an application that writes and reads random amounts; both directions of the link may delay, queue,
lose, reorder and duplicate. While it runs, everything that goes over the link is checked (`Wire`): no byte that the
application did not write there, nothing beyond the peer's window, a right edge that never goes back, no
acknowledgement taken back. At the end, that all bytes arrived and both ends are in the state that they should be in.
"""

from __future__ import annotations

import errno
import heapq
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataplane.shm import layout_tcp as T
from tests.tcp.rig import MS, SECOND, WRAP, End, Segment

__all__ = ["RECORDED", "SCENARIOS", "Application", "Link", "Result", "Scenario", "Simulation", "anything",
           "measure"]

RECORDED = Path(__file__).with_name("recorded.json")
EVENTS_MAX = 400_000    # of one simulation: more is a livelock


@dataclass(frozen=True)
class Link:
    """One direction. Probabilities, ns, bytes; `rate` in bits a second, 0: no limit."""

    delay: int = 10 * MS
    rate: int = 0
    queue: int = 1 << 20
    loss: float = 0.0
    reorder: float = 0.0
    reorder_by: int = 5 * MS
    duplicate: float = 0.0
    corrupt: float = 0.0
    dead: tuple[int, int] = (0, 0)      # nothing passes between these times since the start
    mtu: int = 65535        # larger packets are dropped, and the sender is told (RFC 1191)


@dataclass(frozen=True)
class Application:
    """What one end's application does."""

    send: int = 200_000             # bytes
    write: int = 20_000             # at most so many at a time
    read: int = 1 << 20             # at most so many at a time
    read_every: int = 0             # ns between two reads; 0: as soon as there is something
    pauses: tuple[tuple[int, int], ...] = ()    # (after so many bytes read, ns without reading)
    write_every: int = 0
    end: str = "shutdown"           # shutdown: when all is sent, and close at the end of the other stream
    #                                 close: when all is sent and all has come; abort: RST when all is sent
    options: int = 0


@dataclass(frozen=True)
class Scenario:
    """A simulation. Ends are "active" and "passive"; their settings may differ."""

    there: Link = Link()            # from the active to the passive end
    back: Link = Link()
    active: Application = Application()
    passive: Application = Application()
    ends: dict[str, Any] = field(default_factory=dict)      # of both: arguments of End
    offers: dict[str, bool] = field(default_factory=dict)   # of the listener: arguments of End.accept
    both_open: bool = False         # simultaneous open
    offload: bool = False           # segments of up to 60 KB pass as one
    lag: int = 0                    # ns that arrived segments wait before anybody processes them
    limit: int = 600 * SECOND
    errors: tuple[int, int] = (0, 0)    # errno with which the ends should end
    complete: bool = True           # all bytes should arrive

    def both(self, **changes: Any) -> Scenario:
        """Return it with both directions changed."""
        return replace(self, there=replace(self.there, **changes), back=replace(self.back, **changes))

    def apps(self, **changes: Any) -> Scenario:
        """Return it with both applications changed."""
        return replace(self, active=replace(self.active, **changes), passive=replace(self.passive, **changes))


@dataclass
class Result:
    """What is recorded of a run."""

    ms: int                 # until both applications had all bytes
    segments: int           # both ways
    retransmits: int        # as the ends count them
    lost: int               # by the link
    goodput: float          # Mbit/s, both ways

    def row(self) -> list[float]:
        return [self.ms, self.segments, self.retransmits, self.lost, self.goodput]


class Wire:
    """What one end has sent: checks each of its segments."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.right = self.acked = -1        # positions of the other stream: what was offered, what was acknowledged
        self.highest = 0                    # position of this stream behind all that was sent
        self.shift: int | None = None       # that its SYN told
        self.segments = 0
        self.told = 0, 0, -1                # ACK and window of the last segment, and what had arrived before it

    def check(self, one: Segment) -> None:
        self.segments += 1
        node, other = self.node, self.node.other
        position = (one.seq - node.end.iss) % WRAP      # streams here are shorter than 4 GB
        if "R" in one.flags:
            # In an orderly connection only where it is over: for a FIN that is repeated behind our last ACK.
            orderly = node.simulation.scenario.complete
            assert not orderly or (node.end.state == "CLOSED" and node.end["ERROR"] == 0), f"{one}: resets"
            return
        if "S" in one.flags:
            self.shift = one.shift
        keepalive = not one.span and position == self.highest - 1
        assert "S" in one.flags or position >= 1 or keepalive, one
        told = one.ack, one.window, node.arrivals
        assert one.span or one.sacks or keepalive or told != self.told, f"{one}: tells nothing new"
        self.told = told
        if one.data:
            assert one.data == node.stream[position - 1:position - 1 + len(one.data)], f"{one}: other bytes"
        if "F" in one.flags:
            assert position - 1 + len(one.data) == len(node.stream), f"{one}: FIN at another place"
        end = position + one.span
        if "S" not in one.flags:
            # A window probe may be one byte beyond the edge (RFC 9293 section 3.8.6.1).
            assert end <= max(other.wire.right, 1) + 1, f"{one}: beyond the window, which ends at {other.wire.right}"
        self.highest = max(self.highest, end)
        if "A" in one.flags:
            self._check_ack(one, (one.ack - other.end.iss) % WRAP)

    def _check_ack(self, one: Segment, ack: int) -> None:
        assert ack <= self.node.other.wire.highest, f"{one}: acknowledges what was never sent"
        assert ack >= self.acked, f"{one}: takes an acknowledgement back, {self.acked} to {ack}"
        self.acked = ack
        scaled = self.shift is not None and self.node.other.wire.shift is not None and "S" not in one.flags
        right = ack + (one.window << (self.shift or 0) * scaled)
        # Less than the unit of the window field may be taken back where the ring ends (RFC 7323 section 2.4).
        unit = 1 << (self.shift or 0) * scaled
        assert right > self.right - unit, f"{one}: right edge goes back from {self.right} to {right}"
        self.right = max(self.right, right)


class Node:
    """An end with its application, its outgoing link, and the segments that wait to be processed."""

    def __init__(self, simulation: Simulation, name: str, end: End, app: Application, link: Link, seed: str) -> None:
        self.simulation, self.name, self.end, self.app, self.link = simulation, name, end, app, link
        self.dice, self.weather = random.Random(f"{seed} {name}"), random.Random(f"{seed} link of {name}")
        self.stream = random.Random(f"{seed} data of {name}").randbytes(app.send)
        self.wire = Wire(self)
        self.other: Node
        self.lane: list[Segment] = []
        self.got = bytearray()
        self.busy_until = 0
        self.lost = 0
        self.written = 0
        self.next_read = self.next_write = 0
        self.pauses = list(app.pauses)
        self.timer = 0              # time of the event that is scheduled for a deadline
        self.processing = False     # an event is scheduled that takes the lane
        self.open = False
        self.complete_at = 0
        self.synack: Segment | None = None
        self.spins = 0
        self.arrivals = 0           # segments and messages that have been processed

    # -- the link

    def send(self, one: Segment) -> None:
        simulation, link = self.simulation, self.link
        simulation.trace(self, one)
        self.wire.check(one)
        simulation.last_sent = simulation.now
        now, arrival = simulation.now, simulation.now
        if link.rate:
            start = max(now, self.busy_until)
            if (start - now) * link.rate > link.queue * 8 * SECOND:
                self.lost += 1
                return
            self.busy_until = start + (self.end.ip_bytes + len(one.wire())) * 8 * SECOND // link.rate
            arrival = self.busy_until
        since = now - SECOND
        if self.end.ip_bytes + len(one.wire()) > link.mtu:
            simulation.at(now + link.delay, lambda: self.refused(one))
            return
        if (self.weather.random() < link.loss + link.corrupt) or link.dead[0] <= since < link.dead[1]:
            self.lost += 1
            return
        copies = 2 if self.weather.random() < link.duplicate else 1
        for _ in range(copies):
            extra = self.weather.randrange(link.reorder_by) if self.weather.random() < link.reorder else 0
            simulation.at(arrival + link.delay + extra, lambda: self.other.deliver(one))

    def refused(self, one: Segment) -> None:
        """A router says that a packet was too large."""
        self.end.now = self.simulation.now
        self.end.control(T.CTL_MTU, self.link.mtu, one.seq)
        self.process()

    def deliver(self, one: Segment) -> None:
        """Take a segment in, now or with those that come within the lag."""
        if self.synack is not None or (self.name == "passive" and not self.open and not self.simulation.both_open):
            self.listen(one)
            return
        self.lane.append(one)
        if not self.processing:
            self.processing = True
            self.simulation.at(self.simulation.now + self.simulation.scenario.lag, self.process)

    def listen(self, one: Segment) -> None:
        """A listener without a SYN cache: it remembers one SYN, and answers each."""
        if one.flags == "S":
            self.end.now = self.simulation.now
            self.synack = self.end.accept(one, **self.simulation.scenario.offers)
            self.send(self.synack)
        elif self.synack and "A" in one.flags and "R" not in one.flags and one.ack == (self.end.iss + 1) % WRAP:
            self.end.now = self.simulation.now
            self.end.establish(one, self.synack)
            self.synack, self.open = None, True
            self.deliver(one)

    # -- the end

    def process(self) -> None:
        """Run the protocol, then the application, until neither has more to do now."""
        self.processing = False
        self.end.now = self.simulation.now
        taken, self.lane = self.lane, []
        self.arrivals += len(taken)
        busy = True
        while busy:
            for one in self.end.run(*taken):
                self.send(one)
            if self.end.state != "SYN_SENT":
                self.open = True
            taken = []
            busy = self.act()
        self.check()
        self.schedule()

    def schedule(self) -> None:
        deadline, now = self.end.deadline, self.simulation.now
        if deadline == 0:
            return
        self.spins = self.spins + 1 if deadline <= now else 0
        assert self.spins < 20, f"{self.name}: its deadline stays in the past"
        when = max(deadline, now + 1)
        if self.timer <= now or when < self.timer:
            self.timer = when
            self.simulation.at(when, lambda: self.process() if self.timer == when else None)

    def check(self) -> None:
        end = self.end
        assert bytes(self.got) == self.other.stream[:len(self.got)], f"{self.name}: other bytes arrived"
        if not self.complete_at and len(self.got) == self.other.app.send:
            self.complete_at = self.simulation.now
        if end.state not in ("CLOSED", "SYN_SENT"):
            assert end["SND_UNA"] <= self.other.end["RCV_NXT"] or self.other.end.state == "CLOSED", \
                "acknowledged, but not received"

    # -- the application

    def act(self) -> bool:
        """One turn of the application; whether it did something."""
        if not self.open or self.end.request & T.REQ_CLOSED:
            return False
        did = self.read() | self.write()
        end, app = self.end, self.app
        sent = self.written == len(self.stream)
        before = end.request
        if sent and app.end == "abort":
            end.abort()
        elif sent and app.end == "shutdown":
            end.shutdown()
        if (sent and (end.eof or (app.end == "close" and len(self.got) == self.other.app.send))) or end["ERROR"]:
            end.close()
        return did or end.request != before

    def read(self) -> bool:
        now, end, app = self.simulation.now, self.end, self.app
        if now < self.next_read or end.received_to == end.read_to:
            return False
        size = self.dice.randint(1, app.read)
        if self.pauses and len(self.got) >= self.pauses[0][0]:
            self.next_read = now + self.pauses.pop(0)[1]
            self.simulation.at(self.next_read, self.process)
            return False
        self.got += end.read(size)
        if app.read_every:
            self.next_read = now + app.read_every
            self.simulation.at(self.next_read, self.process)
        return True

    def write(self) -> bool:
        now, end, app = self.simulation.now, self.end, self.app
        if now < self.next_write or self.written == len(self.stream) or end.request & T.REQ_SHUTDOWN:
            return False
        size = self.dice.randint(1, app.write)
        took = end.write(self.stream[self.written:self.written + size])
        self.written += took
        if app.write_every and took:
            self.next_write = now + app.write_every
            self.simulation.at(self.next_write, self.process)
        return took > 0


class Simulation:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario, mode: str = "plain", seed: int = 1,
                 trace: Callable[[str], None] | None = None) -> None:
        self.scenario, self.both_open, self._trace = scenario, scenario.both_open, trace
        self.now = self.last_sent = SECOND
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        settings = {"time_wait": 2 * SECOND} | scenario.ends
        first = settings.pop("iss", 1000)
        ends = [End(mode, iss=first, ts_offset=77, **settings),
                End(mode, iss=(first + 5) % WRAP, ts_offset=0xFFFF_FF00, **settings)]
        self.active = Node(self, "active", ends[0], scenario.active, scenario.there, str(seed))
        self.passive = Node(self, "passive", ends[1], scenario.passive, scenario.back, str(seed))
        self.active.other, self.passive.other = self.passive, self.active
        for node in self.nodes:
            node.end.options = node.app.options
            node.end.offload = scenario.offload

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.active, self.passive

    def at(self, time: int, what: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (time, self._order, what))

    def trace(self, node: Node, one: Segment) -> None:
        if self._trace:
            sent = (one.seq - node.end.iss) % WRAP
            acked = (one.ack - node.other.end.iss) % WRAP
            arrow = "->" if node is self.active else "<-"
            end, iss = node.end, node.other.end.iss
            sacks = [((a - iss) % WRAP, (b - iss) % WRAP) for a, b in one.sacks]
            self._trace(f"{(self.now - SECOND) / MS:10.3f} {arrow} {one.flags:3} {sent}:{sent + len(one.data)} "
                        f"ack {acked} win {one.window} sack {sacks}  [{end.state} cwnd {end['CWND']} "
                        f"ssthresh {end['SSTHRESH']} rto {end['RTO'] // MS}]")

    def run(self) -> Result:
        """Run to the end of all events; all is checked."""
        for node in self.nodes if self.both_open else (self.active,):
            node.end.now = self.now
            node.end.connect()
            node.process()
        events = 0
        while self._queue:
            time, _, what = heapq.heappop(self._queue)
            assert time >= self.now
            self.now = time
            events += 1
            assert events < EVENTS_MAX, f"livelock: {self.describe()}"
            over = all(node.end.state == "CLOSED" for node in self.nodes)   # what is left are old timers
            assert over or time < self.scenario.limit + SECOND, f"not over in time: {self.describe()}"
            what()
        self._check_end()
        done = (max(node.complete_at for node in self.nodes) if self.scenario.complete else self.last_sent) - SECOND
        total = sum(len(node.got) for node in self.nodes)
        return Result(done // MS, sum(node.wire.segments for node in self.nodes),
                      sum(node.end["RETRANSMITS"] for node in self.nodes), sum(node.lost for node in self.nodes),
                      round(total * 8 / 1e6 / max(done / SECOND, 1e-9), 2) if done > 0 else 0.0)

    def _check_end(self) -> None:
        assert all(node.end.state == "CLOSED" for node in self.nodes), self.describe()
        errors = tuple(node.end["ERROR"] for node in self.nodes)
        assert errors == self.scenario.errors, f"{[errno.errorcode.get(one, one) for one in errors]}: {self.describe()}"
        if self.scenario.complete:
            for node in self.nodes:
                assert len(node.got) == node.other.app.send, f"bytes are missing: {self.describe()}"

    def describe(self) -> str:
        """What the ends look like."""
        words = ("SND_UNA", "SND_NXT", "SND_MAX", "SND_WND", "RCV_NXT", "RCV_RIGHT", "CWND", "PHASE", "BACKOFF",
                 "RTX_AT", "PROBE_AT", "PERSIST_AT", "DELACK_AT", "END_AT", "FIN_AT", "PEER_FIN_AT")
        return "; ".join(f"{node.name} {node.end.state} wrote {node.written} got {len(node.got)} at {self.now} "
                         + " ".join(f"{word} {node.end[word]}" for word in words) for node in self.nodes)


# -- scenarios ---------------------------------------------------------------------------------------------

PLAIN = Scenario()
SMALL = PLAIN.apps(send=40_000)
ONE_WAY = replace(PLAIN, active=Application(send=400_000), passive=Application(send=0))
NO_OPTIONS = {"timestamps": False, "sack": False, "scale": False}
NEAR_WRAP = {"iss": WRAP - 30_000}

SCENARIOS: dict[str, Scenario] = {
    "quiet": PLAIN,
    "fast network": PLAIN.both(delay=50_000, rate=1_000_000_000),
    "one way": ONE_WAY,
    "loss 1%": PLAIN.both(loss=0.01),
    "loss 5%": PLAIN.both(loss=0.05),
    "loss 30%": SMALL.both(loss=0.3),
    "loss 5%, newreno": PLAIN.both(loss=0.05).apps(options=T.OPT_NEWRENO),
    "loss 5%, no sack": replace(PLAIN.both(loss=0.05), offers={"sack": False}),
    "loss 5%, newreno, no sack": replace(PLAIN.both(loss=0.05).apps(options=T.OPT_NEWRENO), offers={"sack": False}),
    "loss 5%, no timestamps": replace(PLAIN.both(loss=0.05), offers={"timestamps": False}),
    "loss 5%, no options at all": replace(PLAIN.both(loss=0.05), offers=NO_OPTIONS),
    "loss of acks only": replace(ONE_WAY, back=Link(loss=0.3)),
    "reorder": PLAIN.both(delay=50 * MS, reorder=0.1, reorder_by=20 * MS),
    "reorder much": PLAIN.both(delay=5 * MS, reorder=1.0, reorder_by=30 * MS),
    "reorder, no sack": replace(PLAIN.both(reorder=0.1), offers={"sack": False}),
    "duplicate": PLAIN.both(duplicate=0.2),
    "corrupt": PLAIN.both(corrupt=0.02),
    "everything": PLAIN.both(loss=0.03, reorder=0.05, duplicate=0.03, corrupt=0.005),
    "narrow": PLAIN.both(rate=2_000_000, queue=15_000),
    "narrow, short queue": ONE_WAY.both(rate=5_000_000, queue=4_500),
    "narrow, long queue": ONE_WAY.both(rate=5_000_000, queue=200_000),
    "narrow, newreno": PLAIN.both(rate=2_000_000, queue=15_000).apps(options=T.OPT_NEWRENO),
    "long way": PLAIN.both(delay=300 * MS),
    "wrap": replace(PLAIN, ends=NEAR_WRAP),
    "wrap, everything": replace(PLAIN.both(loss=0.03, reorder=0.05, duplicate=0.03), ends=NEAR_WRAP),
    "wrap at once": replace(SMALL, ends={"iss": WRAP - 1}),
    "small rings": replace(SMALL, ends={"send": 4096, "receive": 4096}),
    "small rings, loss": replace(SMALL.both(loss=0.05), ends={"send": 4096, "receive": 4096}),
    "large rings": replace(PLAIN.apps(send=600_000), ends={"send": 1 << 20, "receive": 1 << 20}),
    "small packets": replace(SMALL.both(loss=0.02), ends={"mtu": 296}),
    "ipv6": replace(PLAIN.both(loss=0.02), ends={"ip_bytes": 40}),
    "slow reader": SMALL.apps(read=3000, read_every=50 * MS),
    "slow reader, small ring": replace(SMALL.apps(read=500, read_every=20 * MS), ends={"receive": 4096}),
    "slow reader, loss": SMALL.apps(read=3000, read_every=50 * MS).both(loss=0.1),
    "reader pauses": PLAIN.apps(pauses=((10_000, 5 * SECOND), (100_000, 40 * SECOND))),
    "reader pauses, loss": PLAIN.apps(pauses=((10_000, 5 * SECOND), (100_000, 40 * SECOND))).both(loss=0.1),
    "small writes": SMALL.apps(write=100, send=10_000, write_every=3 * MS),
    "small writes, nodelay": SMALL.apps(write=100, send=10_000, write_every=3 * MS, options=T.OPT_NODELAY),
    "small writes, loss": SMALL.apps(write=300, send=20_000, write_every=3 * MS).both(loss=0.05),
    "half close": replace(SMALL, active=Application(send=20_000),
                          passive=Application(send=100_000, write_every=30 * MS)),
    "half close, loss": replace(SMALL, active=Application(send=20_000),
                                passive=Application(send=100_000, write_every=30 * MS)).both(loss=0.1),
    "close": SMALL.apps(end="close"),
    "close, loss": SMALL.apps(end="close").both(loss=0.15),
    "one closes": replace(SMALL, passive=Application(send=40_000, end="close")),
    "nothing to say": PLAIN.apps(send=0),
    "simultaneous open": replace(SMALL, both_open=True),
    "simultaneous open, loss": replace(SMALL.both(loss=0.2), both_open=True),
    "offload": replace(PLAIN.apps(send=600_000), offload=True),
    "offload, loss": replace(PLAIN.apps(send=600_000).both(loss=0.02), offload=True),
    "one segment at a time": replace(PLAIN.both(loss=0.02), ends={"out_max": 1}),
    "few segments at a time": replace(PLAIN.both(loss=0.02), ends={"out_max": 3}),
    "processed late": replace(PLAIN, lag=100 * MS),
    "processed late, loss": replace(PLAIN.both(loss=0.03), lag=100 * MS),
    "processed a little late": replace(PLAIN.both(loss=0.01), lag=2 * MS),
    "narrower in the middle": PLAIN.both(mtu=1300, loss=0.01),
    "narrower in the middle, offload": replace(PLAIN.both(mtu=61000), offload=True, ends={"mtu": 65535}),
    "link breaks for 20 s": PLAIN.both(dead=(60 * MS, 20 * SECOND)),
    "link breaks for good": replace(PLAIN.both(dead=(60 * MS, 1 << 60)), limit=3600 * SECOND, complete=False,
                                    errors=(errno.ETIMEDOUT, errno.ETIMEDOUT)),
    "nobody there": replace(PLAIN.both(dead=(0, 1 << 60)), complete=False, errors=(errno.ETIMEDOUT, 0)),
    "abort": replace(PLAIN, active=Application(send=50_000, end="abort"), complete=False,
                     errors=(errno.ECONNABORTED, errno.ECONNRESET)),
    "abort by the passive": replace(PLAIN, passive=Application(send=50_000, end="abort"), complete=False,
                                    errors=(errno.ECONNRESET, errno.ECONNABORTED)),
}


def anything(seed: int) -> Scenario:
    """Return a scenario with everything drawn by lot."""
    dice = random.Random(f"scenario {seed}")

    def seldom(most: float) -> float:
        return dice.random() ** 2 * most if dice.random() < 0.5 else 0.0

    def link() -> Link:
        return Link(delay=int(10 ** dice.uniform(4, 8.3)), rate=dice.choice((0, 0, 1_000_000, 20_000_000)),
                    queue=dice.choice((5_000, 20_000, 200_000)), loss=seldom(0.2), reorder=seldom(1.0),
                    reorder_by=int(10 ** dice.uniform(5, 8)), duplicate=seldom(0.3), corrupt=seldom(0.05),
                    mtu=dice.choice((65535, 65535, 65535, 1000)))

    def app() -> Application:
        write = int(10 ** dice.uniform(1, 5))
        return Application(
            send=min(int(10 ** dice.uniform(0, 5.1)) - 1, 500 * write), write=write, read=int(10 ** dice.uniform(2, 6)),
            read_every=dice.choice((0, 0, MS, 20 * MS)), write_every=dice.choice((0, 0, MS, 5 * MS)),
            pauses=((dice.randrange(20_000), dice.choice((MS, SECOND, 20 * SECOND))),) if dice.random() < 0.3 else (),
            options=dice.choice((0, 0, T.OPT_NEWRENO))
            | dice.choice((0, 0, T.OPT_NODELAY, T.OPT_QUICKACK, T.OPT_KEEPALIVE)))

    ends = {"send": 1 << dice.randint(12, 18), "receive": 1 << dice.randint(12, 18),
            "mtu": dice.choice((296, 1500, 1500, 9000)), "ip_bytes": dice.choice((20, 40)),
            "out_max": dice.choice((1, 2, 5, 64, 64, 64)), "iss": (WRAP - dice.randrange(1 << 18)) % WRAP}
    ends["lane"] = ends["receive"] << dice.randrange(2)
    if ends["ip_bytes"] == 40:
        ends["mtu"] = max(ends["mtu"], 1280)    # the least of IPv6; a narrower path there would be one that lies
    offers = {name: dice.random() < 0.7 for name in ("timestamps", "sack", "scale")}
    scenario = Scenario(link(), link(), app(), app(), ends, offers, both_open=dice.random() < 0.15,
                        offload=dice.random() < 0.2, lag=dice.choice((0, 0, 0, 3 * MS, 100 * MS)), limit=7200 * SECOND)
    return scenario if ends["ip_bytes"] == 20 else scenario.both(mtu=65535)


def measure(name: str, mode: str = "plain") -> list[float]:
    """Return a scenario's row of the table."""
    return Simulation(SCENARIOS[name], mode).run().row()


def main() -> None:
    arguments = sys.argv[1:]
    mode = "plain" if "--plain" in arguments else "compiled"
    names = [one for one in arguments if not one.startswith("--")] or list(SCENARIOS)
    trace = print if "--trace" in arguments else None
    rows = {}
    print(f"{'':32} {'ms':>8} {'segments':>9} {'again':>6} {'lost':>6} {'Mbit/s':>8}")
    for name in names:
        rows[name] = row = Simulation(SCENARIOS[name], mode, trace=trace).run().row()
        print(f"{name:32} {row[0]:8} {row[1]:9} {row[2]:6} {row[3]:6} {row[4]:8}", flush=True)
    if "--record" in arguments:
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        RECORDED.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
