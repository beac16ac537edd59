"""Scripted peers: what the other side sends, when, and what must come back.

    peer = Peer(mode)                       # a stack under test, and somebody who knows TCP by heart
    peer.accept()                           # three-way handshake, the stack passive
    peer.send("PA", data=1000)              # from us: position 1, its first byte of data
    peer.nothing()
    peer.wait(40)
    peer.expect("A", ack=1001, at=40)

Numbers are positions: the SYN of each side is at 0, its first byte of data at 1. Times are ms since the last
`mark` (the handshake makes one). `send` takes what is next in the stream unless told otherwise, and acknowledges what
has been expected so far. Segments are processed at once, or, within `with peer.burst()`, all together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.tcp.rig import MS, WRAP, End, Segment

__all__ = ["Peer", "bytes_at"]


def bytes_at(position: int, size: int) -> bytes:
    """Bytes of a stream in which each tells where it is."""
    return bytes((at * 7 + at // 251) % 256 for at in range(position, position + size))


@dataclass
class Seen:
    """A segment that the stack has put out."""

    time: int
    segment: Segment


class Peer:
    """The other side of `end`. Its options are what it offers in its SYN."""

    def __init__(self, mode: str = "plain", *, iss: int = 0xFFFF_F000, mss: int | None = 1460, shift: int | None = 7,
                 sack: bool = True, ts: bool = False, window: int = 511 << 7, **settings: Any) -> None:
        self.end = End(mode, **settings)
        self.iss, self.mss, self.shift, self.sack, self.ts, self.window = iss, mss, shift, sack, ts, window
        self.seq = self.ack = 0         # what `send` takes unless told otherwise
        self.scales = self.stamps = False
        self.echo = 0                   # the last TSval that came
        self.out: list[Seen] = []
        self.log: list[str] = []
        self.start = self.end.now
        self._held: list[Segment] | None = None

    # -- time

    @property
    def time(self) -> float:
        """ms since the mark."""
        return (self.end.now - self.start) / MS

    def mark(self) -> None:
        self.start = self.end.now

    def wait(self, ms: float) -> None:
        """Let time go on; the stack runs whenever it said that it wants to."""
        until = self.end.now + int(ms * MS)
        spins = 0
        while 0 < self.end.deadline <= until:
            spins = spins + 1 if self.end.deadline <= self.end.now else 0
            assert spins < 10, self.tell("the deadline stays in the past")
            self.end.now = max(self.end.deadline, self.end.now)
            self.run()
        self.end.now = until

    def wait_for_output(self, limit: float = 200_000) -> float:
        """Let time go on until something comes out, at most `limit` ms; the time."""
        until = self.end.now + int(limit * MS)
        for _ in range(1000):
            if self.out or not 0 < self.end.deadline <= until:
                break
            self.end.now = max(self.end.deadline, self.end.now)
            self.run()
        assert self.out, self.tell("nothing comes out")
        return self.time

    # -- what the peer does

    def send(self, flags: str = "A", *, seq: int | None = None, ack: int | None = None, data: int | bytes = b"",
             win: int | None = None, sack: list[tuple[int, int]] | None = None, ts: Any = True, **more: Any) -> None:
        """Let the stack have a segment. `data`: bytes, or how many of the stream. `win`: bytes, unscaled."""
        position = self.seq if seq is None else seq
        payload = bytes_at(position, data) if isinstance(data, int) else data
        window = self.window if win is None else win
        field = min(window >> (self.shift or 0) * self.scales, 65535)
        one = Segment(flags, (self.iss + position) % WRAP, 0, field, payload)
        if "A" in flags:
            one.ack = (self.end.iss + (self.ack if ack is None else ack)) % WRAP
        if self.stamps and ts is True:
            one.ts = (self.end.now // MS % WRAP, self.echo)
        elif isinstance(ts, tuple):
            one.ts = ts
        one.sacks = [((self.end.iss + a) % WRAP, (self.end.iss + b) % WRAP) for a, b in sack or ()]
        for name, value in more.items():
            setattr(one, name, value)
        if seq is None:
            self.seq += one.span
        self.note(">", one)
        if self._held is None:
            self.run(one)
        else:
            self._held.append(one)

    @contextlib.contextmanager
    def burst(self) -> Iterator[None]:
        """What is sent within arrives in one run of the protocol."""
        self._held = []
        yield
        held, self._held = self._held, None
        self.run(*held)

    def run(self, *segments: Segment) -> None:
        for one in self.end.run(*segments):
            self.note("<", one)
            if one.ts:
                self.echo = one.ts[0]
            self.out.append(Seen(self.end.now, one))

    # -- what the stack must do

    def expect(self, flags: str, *, at: float | None = None, seq: int | None = None, ack: int | None = None,
               data: int | None = None, win: int | None = None, sack: list[tuple[int, int]] | None = None) -> Segment:
        """Take the next segment that came out, and compare what is given. `at`: ms since the mark."""
        assert self.out, self.tell(f"expected {flags}: nothing came")
        seen = self.out.pop(0)
        one = seen.segment
        scaled = (self.end["RCV_SHIFT"] if self.scales and "S" not in one.flags else 0)
        is_ = {"flags": "".join(sorted(one.flags)), "at": round((seen.time - self.start) / MS, 3),
               "seq": (one.seq - self.end.iss) % WRAP, "ack": (one.ack - self.iss) % WRAP if "A" in one.flags else None,
               "data": len(one.data), "win": one.window << scaled,
               "sack": [((a - self.iss) % WRAP, (b - self.iss) % WRAP) for a, b in one.sacks]}
        should = {"flags": "".join(sorted(flags)), "at": at, "seq": seq, "ack": ack, "data": data, "win": win,
                  "sack": sack}
        wrong = {name: (value, is_[name]) for name, value in should.items() if value is not None and is_[name] != value}
        assert not wrong, self.tell(f"(expected, is): {wrong}")
        if one.data:
            position = int(str(is_["seq"]))
            assert one.data == bytes_at(position, len(one.data)), self.tell("other bytes")
        if "R" not in one.flags:
            self.ack = max(self.ack, int(str(is_["seq"])) + one.span)
        return one

    def nothing(self) -> None:
        """Nothing (more) has come out."""
        assert not self.out, self.tell(f"unexpected: {self.out}")

    def note(self, arrow: str, one: Segment) -> None:
        mine, yours = (self.iss, self.end.iss) if arrow == ">" else (self.end.iss, self.iss)
        sacks = [((a - yours) % WRAP, (b - yours) % WRAP) for a, b in one.sacks]
        self.log.append(f"{self.time:12.3f} {arrow} {one.flags} {(one.seq - mine) % WRAP}+{len(one.data)} ack "
                        f"{(one.ack - yours) % WRAP} win {one.window} sack {sacks} ts {one.ts}  {self.end.state}")

    def tell(self, what: str) -> str:
        """`what`, with all that has gone over the wire."""
        return "\n".join([f"{what} at {self.time} ms, in {self.end.state}", *self.log])

    def state(self, name: str) -> None:
        assert self.end.state == name, self.tell(f"expected {name}")

    # -- the application under test

    def write(self, size: int) -> int:
        """The next `size` bytes of its stream, as `expect` compares them."""
        took = self.end.write(bytes_at(self.end.written_to, size))
        self.run()
        return took

    def read(self, size: int = 1 << 30) -> bytes:
        start = self.end.read_to
        data = self.end.read(size)
        assert data == bytes_at(start, len(data)), self.tell("other bytes were read")
        self.run()
        return data

    def shutdown(self) -> None:
        self.end.shutdown()
        self.run()

    def close(self) -> None:
        self.end.close()
        self.run()

    def abort(self) -> None:
        self.end.abort()
        self.run()

    # -- handshakes

    def syn(self, flags: str = "S", ack: int = 0) -> Segment:
        """The peer's SYN with its offers."""
        return Segment(flags, self.iss, (self.end.iss + ack) % WRAP if "A" in flags else 0, min(self.window, 65535),
                       mss=self.mss, shift=self.shift, sack_ok=self.sack,
                       ts=(self.end.now // MS % WRAP, self.echo) if self.ts else None)

    def settle(self, answer: Segment) -> None:
        """Both sides' SYNs are known."""
        self.scales = self.shift is not None and answer.shift is not None
        self.stamps = self.ts and answer.ts is not None
        if answer.ts:
            self.echo = answer.ts[0]

    def connect(self, delay: float = 10) -> None:
        """The stack opens; after `delay` ms, the round trip, it is established."""
        self.end.connect()
        self.run()
        one = self.expect("S", seq=0)
        self.wait(delay)
        self.settle(one)
        answer = self.syn("SA", 1)
        self.note(">", answer)
        self.run(answer)
        self.seq = 1
        self.expect("A", seq=1, ack=1, data=0)
        self.nothing()
        self.state("ESTABLISHED")
        self.mark()

    def accept(self, delay: float = 10) -> None:
        """The peer opens."""
        syn = self.syn()
        self.note(">", syn)
        answer = self.end.accept(syn)
        self.note("<", answer)
        self.settle(answer)
        self.wait(delay)
        self.seq = self.ack = 1
        one = Segment("A", (self.iss + 1) % WRAP, (self.end.iss + 1) % WRAP,
                      min(self.window >> (self.shift or 0) * self.scales, 65535),
                      ts=(self.end.now // MS % WRAP, self.echo) if self.stamps else None)
        self.end.establish(one, answer)
        self.note(">", one)
        self.run(one)
        self.nothing()
        self.state("ESTABLISHED")
        self.mark()
