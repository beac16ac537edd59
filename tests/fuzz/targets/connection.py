"""TCP segments at an end of a connection: sequence numbers, options, reassembly, acknowledgments, an application.

Coverage-guided: the features are the edges of tcp/ itself. An input is what happens to one end, part by part; its first
part says how the end is made. Both the plain protocol, memory around each segment watched by the byte, and the compiled
one go along, and for each part:

    both agree in every segment that goes out, every word of the control block and every byte of the receive ring
    nothing outside of their areas is written; the control block is one that `service` takes as it is
    positions only grow; what is acknowledged was sent; the window's right edge never shrinks
    each byte that the application reads is one that scapy finds, at this place of the stream, in a segment that came
    the number of steps is bounded by the bytes that came

Segments are raw bytes behind one that says which of their numbers count from the end's own (SEQ, ACK, STAMP), so that
mutated ones stay near the windows.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterable

from scapy.layers.inet import TCP

from tests.fuzz.engine import Input
from tests.fuzz.mutation import mutate_bytes
from tests.fuzz.tracing import Slots, edges, shared_world
from tests.tcp import rig
from tests.tcp.rig import MS, SECOND, WRAP, End, Segment

__all__ = ["Connection"]

SEQ, ACK, STAMP = 1, 2, 4           # a segment: what its first byte says
WRITE, READ, SHUTDOWN, CLOSE, ABORT, DEADLINE, WAIT, OPTIONS, CONTROL = range(0x80, 0x89)
PARTS = 24                          # of an input
STEPS = 60_000                      # places in the source that one part may pass, and 4 for each byte
_IRS = 3_000_000_000


class _Traced(rig._Plain):
    """The protocol as plain Python, traced."""

    def __init__(self) -> None:
        self.world = shared_world()


class _WatchedEnd(End):
    """The plain end: the memory around an arriving segment is not to be touched."""

    def arrive(self, *segments: Segment | bytes) -> None:
        first, size = self.areas["buffer"]
        for one in segments:
            raw = one if isinstance(one, bytes) else one.wire()
            self.p.world.slots = Slots(first, first + size, size, ((first + 2, first + 2 + len(raw)),))
            super().arrive(raw)
            self.p.world.slots = Slots()


class Connection:
    name = "connection"

    def __init__(self) -> None:
        self.protocol = _Traced()
        self.notes: Counter[str] = Counter()

    def seeds(self) -> Iterable[Input]:
        def raw(flags: str, data: bytes = b"", relative: int = SEQ | ACK | STAMP, seq: int = 0,
                **more: object) -> bytes:
            segment = Segment(flags, seq, data=data, **more)    # type: ignore[arg-type]
            return bytes([relative]) + segment.wire()

        stamp = {"ts": (1, 0)}
        yield bytes(2), raw("PA", b"hello", **stamp), bytes([READ, 100]), raw("FA", seq=0, **stamp), bytes([CLOSE])
        yield bytes(2), raw("A", b"b" * 100, seq=100, **stamp), raw("A", b"a" * 100, **stamp), bytes([READ, 255])
        yield bytes([1, 0]), bytes([WRITE, 200]), raw("A", sacks=[(1100, 1200)], ack=0), bytes([DEADLINE])
        yield bytes([2, 0]), raw("SA", relative=ACK, seq=_IRS, mss=1460, shift=7, sack_ok=True), raw("PA", b"data")
        yield bytes([6, 0]), raw("R", relative=SEQ), bytes([WAIT, 200])
        yield bytes(2), raw("FA", b"end", **stamp), bytes([SHUTDOWN]), raw("A", ack=1, **stamp), bytes([DEADLINE])
        yield bytes(2), bytes([CONTROL, 1, 0, 0]), bytes([OPTIONS, 255]), raw("A", **stamp), bytes([ABORT])
        yield bytes(2), raw("S", **stamp), raw("UA", b"urgent", **stamp), raw("A", window=0, **stamp), bytes([WRITE, 9])

    def mutate(self, dice: random.Random, one: Input, other: Input) -> Input:
        parts = list(one)
        index, choice = dice.randrange(len(parts)), dice.random()
        if choice < 0.15:
            parts.insert(max(1, index), dice.choice(other))
        elif choice < 0.3:
            parts.insert(max(1, index), bytes([dice.randrange(WRITE, CONTROL + 1)]) + dice.randbytes(3))
        elif choice < 0.4:
            parts.insert(max(1, index), parts[index])
        elif choice < 0.45 and len(parts) > 1:
            del parts[max(1, index)]
        elif index == 0 or not parts[index] or parts[index][0] >= WRITE:
            parts[index] = mutate_bytes(dice, parts[index])
        else:
            parts[index] = _segment(dice, parts[index], dice.choice(other))
        return tuple(parts[:PARTS])

    def run(self, one: Input) -> set[int]:
        features: set[int] = set()
        self._open(one[0])
        for part in one[1:PARTS]:
            if not part:
                continue
            self.protocol.world.trace.clear()
            before = self.ends[0]["SND_UNA"], self.ends[0]["RCV_NXT"], self.ends[0]["RCV_RIGHT"]
            self._do(part)
            trace = self.protocol.world.trace
            assert len(trace) <= STEPS + 4 * len(part), f"{len(trace)} steps"
            features |= edges(trace)
            self._agree(before)
            self._read(dict.fromkeys(self.ends), 1 << 30 if self.eager else 0)
        self._read(dict.fromkeys(self.ends), 1 << 30)
        return features

    # -- the two ends ----------------------------------------------------------------------------------------------

    def _open(self, how: bytes) -> None:
        how = how.ljust(2, b"\0")
        sizes = {"send": 1 << (12 + (how[1] & 3)), "receive": 1 << (12 + (how[1] >> 2 & 3)),
                 "mtu": (1500, 296, 9000)[how[1] % 3], "iss": 4_294_967_000}
        self.ends = [_WatchedEnd("plain", **sizes), End("compiled", **sizes)]
        self.ends[0].p = self.protocol
        self.eager = bool(how[0] & 8)
        self.stream: dict[int, set[int]] = {}
        for end in self.ends:
            if how[0] & 2:
                end.connect()
                continue
            stamp = None if how[0] & 1 else (700, 0)
            syn = Segment("S", _IRS, 0, 65535, mss=1460, shift=None if how[0] & 4 else 7, sack_ok=not how[0] & 16,
                          ts=stamp)
            answer = end.accept(syn)
            end.establish(Segment("A", (_IRS + 1) % WRAP, (end.iss + 1) % WRAP, 5000, ts=stamp), answer)
        self._run()

    def _run(self, *segments: bytes) -> None:
        outs = [end.run(*segments) for end in self.ends]
        assert outs[0] == outs[1], outs

    def _do(self, part: bytes) -> None:
        kind, value = part[0], part[1] if len(part) > 1 else 0
        if kind < WRITE:
            raw = self._absolute(kind, part[1:])
            self._heard(raw)
            self._run(raw)
            return
        if kind == READ:
            self._read(dict.fromkeys(self.ends), value + 1)
        for end in self.ends:
            if kind == WRITE:
                end.write(bytes(range(256)) * (value + 1))
            elif kind == OPTIONS:
                end.options = value & 31
            elif kind in (DEADLINE, WAIT):
                later = end.deadline if kind == DEADLINE and end.deadline else end.now + value * 50 * MS
                end.now = min(max(later, end.now), end.now + 3600 * SECOND)
            elif kind == CONTROL:
                numbers = part[1:].ljust(12, b"\0")
                end.control(numbers[0] % 10, int.from_bytes(numbers[1:3], "big") - 1,
                            (end.iss + end["SND_UNA"] + int.from_bytes(numbers[3:5], "big", signed=True)) % WRAP)
            elif kind in (SHUTDOWN, CLOSE) or (kind == ABORT and value & 1):
                {SHUTDOWN: end.shutdown, CLOSE: end.close, ABORT: end.abort}[kind]()
        self._run()

    def _absolute(self, kind: int, raw: bytes) -> bytes:
        """The segment with numbers as on the wire."""
        end, data = self.ends[0], bytearray(raw)
        for flag, at, base in ((SEQ, 4, end["IRS"] + end["RCV_NXT"]), (ACK, 8, end.iss + end["SND_NXT"])):
            if kind & flag and len(data) >= at + 4:
                number = int.from_bytes(data[at:at + 4], "big") + base
                data[at:at + 4] = (number % WRAP).to_bytes(4, "big")
        if kind & STAMP and len(data) >= 32 and data[20:24] == b"\1\1\x08\x0a":
            number = int.from_bytes(data[24:28], "big") + end["TS_RECENT"]
            data[24:28] = (number % WRAP).to_bytes(4, "big")
        return bytes(data)

    # -- what holds ------------------------------------------------------------------------------------------------

    def _agree(self, before: tuple[int, int, int]) -> None:
        plain, compiled = self.ends
        for at, size in (plain.areas["x"], plain.areas["rcv"]):
            assert plain.memory[at:at + size] == compiled.memory[at:at + size], "the two modes differ"
        if plain.state in ("CLOSED", "SYN_SENT"):
            return
        una, nxt, right = before
        assert plain["SND_UNA"] >= una and plain["RCV_NXT"] >= nxt and plain["RCV_RIGHT"] >= right
        assert plain["SND_UNA"] <= plain["SND_NXT"] <= plain["SND_MAX"] <= plain.written_to + 1
        assert plain["RCV_NXT"] - plain.read_to <= plain.receive_bytes + 1

    def _heard(self, raw: bytes) -> None:
        """Notes the bytes that a segment brings, as scapy reads it, by their places in the stream."""
        if len(raw) < 20 or not 20 <= (raw[12] >> 4) * 4 <= len(raw):
            return
        segment, end = TCP(raw), self.ends[0]
        data = raw[segment.dataofs * 4:]
        assert data.startswith(bytes(segment.payload)) or not segment.options
        base = end["RCV_NXT"]
        irs = int(segment.seq) if end.state == "SYN_SENT" else end["IRS"]
        offset = (int(segment.seq) + ("S" in segment.flags) - irs - base) % WRAP
        first = base + (offset - WRAP if offset >> 31 else offset)
        for place, byte in enumerate(data, first):
            self.stream.setdefault(place, set()).add(byte)

    def _read(self, ends: Iterable[End], size: int) -> None:
        if not size:
            return
        first = self.ends[0].read_to
        parts = [end.read(size) for end in ends]
        assert parts[0] == parts[1]
        for place, byte in enumerate(parts[0], first):
            assert byte in self.stream.get(place, ()), f"byte {byte} at {place} was never sent"


def _segment(dice: random.Random, part: bytes, stranger: bytes) -> bytes:
    """Another segment: bytes, flags, numbers, options or data changed."""
    choice, header = dice.random(), part[1:21].ljust(20, b"\0")
    if choice < 0.2:
        flags = dice.choice((2, 16, 16, 17, 18, 24, 4, 20, 1, 255))
        return bytes([part[0] & 0x7F]) + header[:13] + bytes([flags]) + part[15:]
    if choice < 0.4:
        at = 1 + dice.choice((4, 4, 8))
        number = dice.choice((0, 1, -1, 2, 100, -100, 1460, 4096, -4096, 65535, 1 << 31, dice.getrandbits(32)))
        return part[:at] + (number % WRAP).to_bytes(4, "big") + part[at + 4:]
    if choice < 0.6:
        options = _options(dice)
        return bytes([part[0] & 0x7F]) + header[:12] + bytes([(20 + len(options)) << 2]) + header[13:] + options + \
            part[1 + (header[12] >> 4) * 4:]
    if choice < 0.75:
        return part + dice.randbytes(dice.choice((1, 10, 100, 1400)))
    if choice < 0.8:
        return bytes([dice.randrange(8)]) + part[1:]
    return bytes([part[0] & 0x7F]) + mutate_bytes(dice, part[1:], stranger)


def _options(dice: random.Random) -> bytes:
    """Up to 40 bytes of options, most of them right."""
    found = b""
    for _ in range(dice.randrange(4)):
        kind = dice.randrange(7)
        numbers = dice.choice((0, 1, 50, 4096, 1 << 31))
        found += (b"\1", struct.pack("!BBH", 2, 4, dice.choice((0, 1, 64, 536, 1460, 65535))),
                  bytes([3, 3, dice.choice((0, 7, 14, 15, 255))]), b"\4\2",
                  b"\1\1\x08\x0a" + struct.pack("!II", numbers, dice.getrandbits(32)),
                  struct.pack("!BBII", 5, 10, 4_294_967_001 + numbers & 0xFFFFFFFF, dice.getrandbits(32)),
                  dice.randbytes(dice.randrange(1, 9)))[kind]
    return (found + bytes(-len(found) % 4))[:40]
