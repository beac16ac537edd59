"""The sender's half of a connection: round trips, congestion, scoreboard, recovery, without the rest.

    s = Sender()                    # or Sender("compiled"): the same calls on the same memory
    s.send(10 * s.mss)              # new data
    s.ack(1 + s.mss, [(a, b)])      # an ACK with SACK blocks: sack_update and ack_process, as input calls them
    s.output()                      # what recovery_next asks for, then new data: [(from, to, again)]
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from dataplane.jit import kernel
from dataplane.shm import layout_tcp as T
from dataplane.tcp import congestion as C
from dataplane.tcp import recovery as R
from dataplane.tcp import rtt as M
from dataplane.tcp import scoreboard as B
from tests.plain import World

__all__ = ["MS", "MSS", "SECOND", "Sender", "plain_module"]

MS, SECOND, MSS = 1_000_000, 1_000_000_000, 1000
CALLS = ("rtt_init", "congestion_init", "sack_update", "ack_process", "recovery_next", "send_allowance", "sent",
         "retransmit_timeout", "tail_probe", "pipe", "rto", "rtt_sample")
_WORLD = World()


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def call(mem, what, x, a, b, c):
    """The function CALLS[what]; a pair is returned as start << 20 | length."""
    if what == 0:
        M.rtt_init(mem, x)
    elif what == 1:
        C.congestion_init(mem, x)
    elif what == 2:
        return B.sack_update(mem, x)
    elif what == 3:
        R.ack_process(mem, x, a, b, c)
    elif what == 4:
        start, length = R.recovery_next(mem, x)
        return start << 20 | length
    elif what == 5:
        return R.send_allowance(mem, x)
    elif what == 6:
        R.sent(mem, x, a, b, c)
    elif what == 7:
        R.retransmit_timeout(mem, x)
    elif what == 8:
        start, length = R.tail_probe(mem, x)
        return start << 20 | length
    elif what == 9:
        return R.pipe(mem, x + T.X_TCB)
    elif what == 10:
        return M.rto(mem, x)
    else:
        M.rtt_sample(mem, x, a)
    return 0


def plain_module(name: str) -> Any:
    """Return dataplane.tcp.<name> as plain Python."""
    return _WORLD.load(f"dataplane.tcp.{name}")


class Sender:
    """An established connection's sender; `now` is told, positions count from the SYN."""

    X = 256

    def __init__(self, mode: str = "plain", *, sack: bool = True, stamps: bool = False, mss: int = MSS,
                 newreno: bool = False, written: int = 1 << 40, window: int = 1 << 30, iss: int = 0xFFFF_F000) -> None:
        self.mode, self.mss, self.iss = mode, mss, iss
        self.memory = bytearray(self.X + T.X_OUT)
        self.mem: Any = np.frombuffer(self.memory, np.uint8) if mode == "compiled" else self.memory
        self.t = self.X + T.X_TCB
        self.now = SECOND
        for word in ("SND_UNA", "SND_NXT", "SND_MAX"):
            self[word] = 1
        self["STATE"], self["MSS"], self["ISS"], self["SND_WND"] = T.ESTABLISHED, mss, iss, window
        self["FLAGS"] = (T.TF_SACK if sack else 0) | (T.TF_TIMESTAMPS if stamps else 0)
        self.set(self.X + T.X_WRITTEN, written)
        self.set(self.X + T.X_OPTIONS, T.OPT_NEWRENO if newreno else 0)
        self.do("rtt_init")
        self.do("congestion_init")

    # -- words and calls

    def set(self, at: int, value: int) -> None:
        struct.pack_into("=q", self.memory, at, value)

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("=q", self.memory, self.t + getattr(T, f"T_{name}"))[0])

    def __setitem__(self, name: str, value: int) -> None:
        self.set(self.t + getattr(T, f"T_{name}"), value)

    @property
    def sacked(self) -> list[tuple[int, int]]:
        at = self.t + T.T_SB
        return [struct.unpack_from("=qq", self.memory, at + 16 * i) for i in range(self["SB_COUNT"])]

    @property
    def flight(self) -> int:
        return self["SND_MAX"] - self["SND_UNA"]

    def do(self, name: str, *args: int) -> Any:
        self.set(self.X + T.X_NOW, self.now)
        if self.mode == "compiled":
            value = int(call(self.mem, CALLS.index(name), self.X, *(args + (0, 0, 0))[:3]))
            return (value >> 20, value & 0xFFFFF) if name in ("recovery_next", "tail_probe") else value
        module = {"sack_update": "scoreboard", "congestion_init": "congestion"}.get(name, "recovery")
        module = "rtt" if name in ("rtt_init", "rto", "rtt_sample") else module
        place = self.t if name == "pipe" else self.X
        return getattr(plain_module(module), name)(self.memory, place, *args)

    # -- the two sides

    def ack(self, ack: int, sacks: list[tuple[int, int]] | None = None, *, tsecr: int | None = None,
            dup: bool | None = None) -> int:
        """Take an ACK; `tsecr`: time (ns) of the segment whose timestamp it echoes."""
        s = self.X + T.X_SEGMENT
        self.set(s + T.S_ACK, (self.iss + ack) & 0xFFFFFFFF)
        self.set(s + T.S_LENGTH, 0)
        self.set(s + T.S_OPTIONS, (T.SO_SACK if sacks else 0) | (T.SO_TIMESTAMPS if tsecr is not None else 0))
        self.set(s + T.S_TSECR, (tsecr or 0) // MS & 0xFFFFFFFF)
        self.set(s + T.S_SACK_COUNT, len(sacks or []))
        for i, (left, right) in enumerate(sacks or []):
            self.set(s + T.S_SACKS + 16 * i, (self.iss + left) & 0xFFFFFFFF)
            self.set(s + T.S_SACKS + 16 * i + 8, (self.iss + right) & 0xFFFFFFFF)
        fresh = int(self.do("sack_update"))
        if dup is None:
            dup = ack == self["SND_UNA"] and self.flight > 0
        self.do("ack_process", ack, fresh, int(dup))
        self.check()
        return fresh

    def send(self, length: int) -> None:
        """Send so much new data, whatever the window says, in segments."""
        end = self["SND_MAX"] + length
        while self["SND_MAX"] < end:
            top = self["SND_MAX"]
            self.do("sent", top, min(top + self.mss, end), 0)

    def output(self, new: int = 1 << 40) -> list[tuple[int, int, bool]]:
        """Send what may be sent, with up to `new` bytes of new data; the window counts whole segments."""
        out = []
        for _ in range(10_000):
            start, length = self.do("recovery_next")
            if length == 0:
                break
            self.do("sent", start, start + length, 1)
            out.append((start, start + length, True))
        else:
            raise AssertionError("retransmits for ever")
        while new >= self.mss and (room := self.do("send_allowance") // self.mss * self.mss):
            length = min(room, T.OUT_BYTES_MAX // self.mss * self.mss, new)
            top = self["SND_MAX"]
            self.do("sent", top, top + length, 0)
            out.append((top, top + length, False))
            new -= length
        self.check()
        return out

    def timeout(self) -> None:
        """Go to the retransmission timer's time and let it expire."""
        self.now = max(self.now, self["RTX_AT"])
        self.do("retransmit_timeout")
        self.check()

    def probe(self) -> tuple[int, int]:
        """Go to T_PROBE_AT, and send what the probe says."""
        self.now = max(self.now, self["PROBE_AT"])
        start, length = self.do("tail_probe")
        if length:
            self.do("sent", start, start + length, int(start < self["SND_MAX"]))
        self.check()
        return start, length

    def check(self) -> None:
        """What holds after each call: R1, R2, S1, and what service wants of a control block."""
        una, top = self["SND_UNA"], self["SND_MAX"]
        assert una <= self["SND_NXT"] <= top
        edge = una
        for left, right in self.sacked:
            assert edge < left < right <= top, self.sacked
            edge = right
        if self["PHASE"] != T.PHASE_OPEN:
            assert una < self["RECOVER"] <= top
        assert self.mss <= self["CWND"] <= 1 << 30 and self["SSTHRESH"] >= self.mss
        assert self["BACKOFF"] >= 0 and self["DUPACKS"] >= 0
        assert (self["RTX_AT"] != 0) == (una < top)
        if self["PROBE_AT"]:
            assert self["PROBE_AT"] <= self["RTX_AT"]
