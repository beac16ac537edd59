"""One end of a connection in plain memory: an exchange block, two rings, an application, and a clock that is told.

    end = End("plain")                      # or "compiled": the same calls on the same memory
    end.connect(); end.run()                # [Segment S]
    end.arrive(Segment("SA", seq=..., ack=..., mss=1460)); end.run()
    end.write(b"..."); end.run(); end.read()

`Segment` is a second implementation of the wire format, made from RFC 9293 without looking at tcp/segment.py. What
an end puts out passes `segment_build` first, so that both are compared with every segment of every test.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dataplane.shm import layout_tcp as T
from tests.plain import World

__all__ = ["MODES", "MS", "SECOND", "STATES", "End", "Segment", "protocol"]

MODES = ("plain", "compiled")
MS, SECOND = 1_000_000, 1_000_000_000
WRAP = 1 << 32
FLAGS = dict(zip("FSRPAUEC", (1 << i for i in range(8)), strict=True))
STATES = ("CLOSED", "LISTEN", "SYN_SENT", "SYN_RECEIVED", "ESTABLISHED", "FIN_WAIT_1", "FIN_WAIT_2", "CLOSE_WAIT",
          "CLOSING", "LAST_ACK", "TIME_WAIT")
GUARD, GUARD_BYTES = 0xA5, 256


def flag_bits(text: str) -> int:
    """Return "SA" as the number on the wire."""
    return sum(FLAGS[one] for one in text)


@dataclass
class Segment:
    """A segment as the peer sees it: numbers as on the wire, None for an option that it does not have."""

    flags: str = "A"
    seq: int = 0
    ack: int = 0
    window: int = 65535
    data: bytes = b""
    mss: int | None = None
    shift: int | None = None
    sack_ok: bool = False
    ts: tuple[int, int] | None = None
    sacks: list[tuple[int, int]] = field(default_factory=list)

    def __repr__(self) -> str:
        parts = [self.flags, f"seq {self.seq}", f"ack {self.ack}", f"win {self.window}"]
        parts += [f"{len(self.data)} bytes"] if self.data else []
        parts += [f"mss {self.mss}"] if self.mss is not None else []
        parts += [f"shift {self.shift}"] if self.shift is not None else []
        parts += ["sackOK"] if self.sack_ok else []
        parts += [f"ts {self.ts[0]}/{self.ts[1]}"] if self.ts else []
        parts += [f"sack {self.sacks}"] if self.sacks else []
        return f"<{', '.join(parts)}>"

    @property
    def span(self) -> int:
        """Sequence numbers that it takes."""
        return len(self.data) + ("S" in self.flags) + ("F" in self.flags)

    def option_bytes(self) -> bytes:
        """Return the options, each aligned by itself."""
        out = b""
        if self.mss is not None:
            out += struct.pack(">BBH", 2, 4, self.mss)
        if self.sack_ok:
            out += b"\4\2" if self.ts else b"\1\1\4\2"
        if self.ts:
            out += (b"" if self.sack_ok else b"\1\1") + struct.pack(">BBII", 8, 10, *self.ts)
        if self.shift is not None:
            out += struct.pack(">BBBB", 1, 3, 3, self.shift)
        if self.sacks:
            out += struct.pack(">BBBB", 1, 1, 5, 2 + 8 * len(self.sacks))
            out += b"".join(struct.pack(">II", *one) for one in self.sacks)
        return out

    def wire(self, options: bytes | None = None) -> bytes:
        """Return header and data; ports, checksum and urgent pointer are 0. `options`: in place of its own."""
        options = self.option_bytes() if options is None else options
        assert len(options) % 4 == 0 and len(options) <= 40
        return struct.pack(">HHIIBBHHH", 0, 0, self.seq % WRAP, self.ack % WRAP, (20 + len(options)) << 2,
                           flag_bits(self.flags), self.window, 0, 0) + options + self.data

    @classmethod
    def parse(cls, raw: bytes) -> Segment:
        """Return what `raw` says. Options are as `wire` makes them: anything else is a mistake."""
        _, _, seq, ack, offset, bits, window, _, _ = struct.unpack_from(">HHIIBBHHH", raw)
        one = cls("".join(name for name in FLAGS if bits & FLAGS[name]), seq, ack, window, raw[(offset >> 4) * 4:])
        at, end = 20, (offset >> 4) * 4
        while at < end and raw[at]:
            if raw[at] == 1:
                at += 1
                continue
            body = raw[at + 2:at + raw[at + 1]]
            match raw[at]:
                case 2:
                    one.mss, = struct.unpack(">H", body)
                case 3:
                    one.shift, = body
                case 4:
                    one.sack_ok = True
                case 5:
                    one.sacks = list(struct.iter_unpack(">II", body))
                case 8:
                    one.ts = struct.unpack(">II", body)
                case kind:
                    raise ValueError(f"option {kind}")
            at += raw[at + 1]
        return one

    def pieces(self, size: int) -> Iterable[Segment]:
        """Yield it cut into segments of `size` bytes of data, as a device with segmentation offload does it."""
        if len(self.data) <= size or size <= 0:
            yield self
            return
        for at in range(0, len(self.data), size):
            last = at + size >= len(self.data)
            flags = self.flags if last else "".join(one for one in self.flags if one not in "FP")
            yield replace(self, flags=flags, seq=(self.seq + at) % WRAP, data=self.data[at:at + size])


# -- the protocol, in both modes ---------------------------------------------------------------------------


class _Plain:
    """The protocol's functions by name, from whichever module has them."""

    MODULES = ("segment", "sequence", "reassembly", "opening", "input", "control", "connection", "service")

    def __init__(self) -> None:
        self.world = World()

    def __getattr__(self, name: str) -> Any:
        for module in self.MODULES:
            if found := vars(self.world.load(f"dataplane.tcp.{module}")).get(name):
                setattr(self, name, found)
                return found
        raise AttributeError(name)


@functools.cache
def protocol(mode: str) -> Any:
    """Return the functions under test, called with a bytearray (plain) or an array of bytes."""
    if mode == "compiled":
        from tests.tcp import kernels
        return kernels
    return _Plain()


class End:
    """One end. Times in ns; positions count from the SYN, as in the control block."""

    def __init__(self, mode: str = "plain", *, send: int = 65536, receive: int = 65536, lane: int = 0,
                 mtu: int = 1500, ip_bytes: int = 20, iss: int = 1000, ts_offset: int = 77, now: int = SECOND,
                 time_wait: int = 60 * SECOND, out_max: int = T.OUT_MAX) -> None:
        self.mode, self.mtu, self.ip_bytes, self.iss, self.ts_offset = mode, mtu, ip_bytes, iss, ts_offset
        self.p = protocol(mode)
        sizes = {"x": T.X_BYTES, "snd": send, "rcv": receive, "buffer": 1 << 16, "header": 64}
        self.areas: dict[str, tuple[int, int]] = {}
        at = GUARD_BYTES
        for name, size in sizes.items():
            self.areas[name] = (at, size)
            at += size + GUARD_BYTES
        self.memory = bytearray([GUARD]) * at
        for start, size in self.areas.values():
            self.memory[start:start + size] = bytes(size)
        self.mem: Any = np.frombuffer(self.memory, np.uint8) if mode == "compiled" else self.memory
        self.x, self.snd, self.rcv, self.buffer, self.header = (one[0] for one in self.areas.values())
        self.t = self.x + T.X_TCB
        self.send_bytes, self.receive_bytes = send, receive
        for word, value in ((T.X_SND, self.snd), (T.X_SND_MASK, send - 1), (T.X_RCV, self.rcv),
                            (T.X_RCV_MASK, receive - 1), (T.X_LANE_BYTES, lane or 2 * receive),
                            (T.X_OUT_MAX, out_max), (T.X_TIME_WAIT, time_wait),
                            (T.X_RANDOM, 0x1234_5678_9ABC_DEF0), (T.X_KEEP_IDLE, 7200 * SECOND),
                            (T.X_KEEP_INTERVAL, 75 * SECOND), (T.X_KEEP_COUNT, 9)):
            self.set(self.x + word, value)
        self.now = now
        self.read_to = self.written_to = 1
        self.request = self.options = self.events = 0
        self.runs = 0
        self.offload = False        # put out what a device with segmentation offload is given

    # -- words

    def word(self, at: int) -> int:
        return int(struct.unpack_from("=q", self.memory, at)[0])

    def set(self, at: int, value: int) -> None:
        struct.pack_into("=q", self.memory, at, value)

    def __getitem__(self, name: str) -> int:
        """Return a word of the control block: end["SND_UNA"]."""
        return self.word(self.t + getattr(T, f"T_{name}"))

    def __setitem__(self, name: str, value: int) -> None:
        self.set(self.t + getattr(T, f"T_{name}"), value)

    @property
    def state(self) -> str:
        return STATES[self["STATE"]]

    @property
    def deadline(self) -> int:
        """When it wants to run at the latest, 0: never."""
        return self.word(self.x + T.X_DEADLINE)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """What has come out of order."""
        return self._ranges(T.T_RA_COUNT, T.T_RA)

    @property
    def sacked(self) -> list[tuple[int, int]]:
        """What the peer has out of order, as we know it."""
        return self._ranges(T.T_SB_COUNT, T.T_SB)

    def _ranges(self, count: int, first: int) -> list[tuple[int, int]]:
        places = [self.t + first + 16 * i for i in range(self.word(self.t + count))]
        return [(self.word(at), self.word(at + 8)) for at in places]

    # -- beginning

    def connect(self) -> None:
        """Become the active side; `run` puts out the SYN."""
        initial = self.iss | self.ts_offset << 32
        initial -= (initial >> 63) << 64        # a word is signed
        self.p.conn_open_active(self.mem, self._enter(), self.mtu, self.ip_bytes, initial)
        self.request |= T.REQ_OPEN

    def accept(self, syn: Segment, *, timestamps: bool = True, sack: bool = True, scale: bool = True) -> Segment:
        """Do a listener's part with `syn`, as inet/tcp_listen does it; return the SYN-ACK. What completes the
        handshake is for `establish`, and then for `arrive`."""
        self.syn = syn
        most = min(self.receive_bytes, self.word(self.x + T.X_LANE_BYTES) * 3 // 4)
        return Segment(
            "SA", self.iss, (syn.seq + 1) % WRAP, min(most, 65535), mss=self.mtu - self.ip_bytes - 20,
            shift=max(0, self.receive_bytes.bit_length() - 16) if scale and syn.shift is not None else None,
            sack_ok=sack and syn.sack_ok,
            ts=((self.now // MS + self.ts_offset) % WRAP, syn.ts[0]) if timestamps and syn.ts else None)

    def establish(self, ack: Segment, answer: Segment) -> None:
        """Be in ESTABLISHED: `ack` is what came for the SYN-ACK `answer`."""
        syn, scale = self.syn, answer.shift is not None
        self.memory[self.t:self.t + T.TCB_BYTES] = bytes(T.TCB_BYTES)
        words = {
            "ISS": self.iss, "IRS": syn.seq, "TS_OFFSET": self.ts_offset,
            "FLAGS": T.TF_SCALE * scale | T.TF_SACK * answer.sack_ok | T.TF_TIMESTAMPS * (answer.ts is not None),
            "SND_SHIFT": syn.shift if scale else 0, "RCV_SHIFT": answer.shift if scale else 0,
            "PEER_MSS": syn.mss or (536 if self.ip_bytes == 20 else 1220), "MTU": self.mtu, "IP_BYTES": self.ip_bytes,
            "SND_WND": ack.window << ((syn.shift or 0) if scale else 0)}
        if answer.ts and syn.ts:
            words |= {"TS_RECENT": (ack.ts or syn.ts)[0], "TS_RECENT_AT": self.now}
        for name, value in words.items():
            self[name] = value or 0
        self.p.conn_establish(self.mem, self._enter())

    # -- the machine

    def _enter(self) -> int:
        """Tell the protocol the time and the application's words, as service_load does."""
        x = self.x
        for word, value in ((T.X_NOW, self.now), (T.X_READ, self.read_to), (T.X_WRITTEN, self.written_to),
                            (T.X_REQUEST, self.request), (T.X_OPTIONS, self.options)):
            self.set(x + word, value)
        return x

    def arrive(self, *segments: Segment | bytes) -> None:
        """Take segments in, without an answer yet."""
        for one in segments:
            raw = one if isinstance(one, bytes) else one.wire()
            at = self.buffer + 2        # nothing says that a record's body is aligned to more
            self.memory[at:at + len(raw)] = raw
            self.p.tcp_arrive(self.mem, self._enter(), at, len(raw))
            self.memory[at:at + len(raw)] = b"\xee" * len(raw)      # the lane's memory is somebody else's again

    def control(self, kind: int, value: int, seq: int) -> None:
        """Tell it what an ICMP message said."""
        self.p.tcp_control(self.mem, self._enter(), kind, value, seq % WRAP)

    def run(self, *segments: Segment | bytes) -> list[Segment]:
        """Take `segments` in and return what goes out, cut for the wire."""
        self.arrive(*segments)
        out: list[Segment] = []
        self.events = 0
        for _ in range(1000):
            self.set(self.x + T.X_OUT_COUNT, 0)
            self.set(self.x + T.X_EVENTS, 0)
            self.p.tcp_finish(self.mem, self._enter())
            self.runs += 1
            for index in range(self.word(self.x + T.X_OUT_COUNT)):
                out += self._emit(self.x + T.X_OUT + index * T.O_BYTES)
            events = self.word(self.x + T.X_EVENTS)
            self.events |= events & ~T.EV_MORE
            if not events & T.EV_MORE:
                self.check()
                return out
        raise AssertionError("EV_MORE for ever")

    def _emit(self, o: int) -> list[Segment]:
        """Return the wire's segments of an output record, as inet/tcp_transmit makes them."""
        flags, size = self.word(o + T.O_FLAGS), self.word(o + T.O_LENGTH)
        if flags == 0:
            return []
        assert 0 <= size <= T.OUT_BYTES_MAX, size
        offset = self.word(o + T.O_FROM)
        assert 0 <= offset < self.send_bytes
        ring = bytes(self.memory[self.snd:self.snd + self.send_bytes])
        header = self.p.segment_build(self.mem, o, self.header, self.word(o + T.O_SEQ), flags)
        assert header == self.p.segment_header_bytes(self.mem, o) <= 60
        raw = bytes(self.memory[self.header:self.header + header]) + (ring + ring)[offset:offset + size]
        one = Segment.parse(raw)
        assert one.wire() == raw, (one, raw)
        segment = self.word(o + T.O_SEGMENT)
        assert size <= segment or (segment > 0 and not one.flags.count("S")), (size, segment)
        return [one] if self.offload else list(one.pieces(segment))

    def check(self) -> None:
        """What holds after each run, whatever came."""
        self.check_guards()
        self.check_block()

    def check_guards(self) -> None:
        end = 0
        for start, size in self.areas.values():
            guard = self.memory[end:start]
            assert guard == bytes([GUARD]) * len(guard), "written outside of its memory"
            end = start + size

    def check_block(self) -> None:
        """The control block is one that service takes as it is (plain mode only; while it opens, the congestion
        window may still be that of another segment size)."""
        if self.mode == "plain" and self["STATE"] >= T.ESTABLISHED:
            before = bytes(self.memory[self.t:self.t + T.TCB_BYTES])
            self.p._clamp(self.memory, self.x)
            after = bytes(self.memory[self.t:self.t + T.TCB_BYTES])
            assert before == after, [(word(at), b, a) for at in range(0, T.TCB_BYTES, 8) if (
                b := struct.unpack_from("=q", before, at)[0]) != (a := struct.unpack_from("=q", after, at)[0])]

    # -- the application

    @property
    def received_to(self) -> int:
        """Position up to which the application may read."""
        fin = self["PEER_FIN_AT"]
        nxt = max(self["RCV_NXT"], 1)
        return min(nxt, fin) if fin else nxt

    @property
    def acked_to(self) -> int:
        fin = self["FIN_AT"]
        una = max(self["SND_UNA"], 1)
        return min(una, fin) if fin else una

    @property
    def room(self) -> int:
        """Bytes that `write` would take."""
        return self.send_bytes - (self.written_to - self.acked_to)

    @property
    def eof(self) -> bool:
        """Whether the peer has ended its stream, and all of it is read."""
        fin = self["PEER_FIN_AT"]
        return fin != 0 and self["RCV_NXT"] > fin and self.read_to == fin

    def write(self, data: bytes) -> int:
        """Put what fits into the send ring; how many bytes."""
        data = data[:self.room]
        self._ring(self.snd, self.send_bytes, self.written_to, data)
        self.written_to += len(data)
        return len(data)

    def read(self, size: int = 1 << 30) -> bytes:
        """Take up to `size` bytes out of the receive ring."""
        size = min(size, self.received_to - self.read_to)
        at = self.read_to % self.receive_bytes
        ring = self.memory[self.rcv:self.rcv + self.receive_bytes]
        data = bytes((ring[at:] + ring[:at])[:size])
        # Nobody may need them any more.
        self._ring(self.rcv, self.receive_bytes, self.read_to, b"\xdd" * size)
        self.read_to += size
        return data

    def _ring(self, place: int, size: int, position: int, data: bytes) -> None:
        at = position % size
        first = data[:size - at]
        self.memory[place + at:place + at + len(first)] = first
        self.memory[place:place + len(data) - len(first)] = data[len(first):]

    def shutdown(self) -> None:
        self.request |= T.REQ_SHUTDOWN

    def close(self) -> None:
        self.request |= T.REQ_SHUTDOWN | T.REQ_CLOSED

    def abort(self) -> None:
        self.request |= T.REQ_SHUTDOWN | T.REQ_CLOSED | T.REQ_ABORT


def word(at: int) -> str:
    """Return the name of the control block's word at `at`, for messages."""
    names = {value: name for name, value in vars(T).items() if name.startswith("T_")}
    return names.get(at, str(at))
