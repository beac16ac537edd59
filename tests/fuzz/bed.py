"""A test bed whose every run begins with the same memory, and that runs the worker compiled or as plain Python.

    bed = FuzzBed(world)
    bed.open("udp", port=5000)
    bed.freeze()
    plain, compiled = bed.plain(frames), bed.compiled(frames)

All frames of a run are one burst. In the compiled run they stand right before a page that nobody may touch, or,
`front`, right behind one: whoever reads a byte too much on that side ends the process with SIGSEGV. In the plain run
memory around each frame is watched byte by byte. Datagrams in reassembly are copied into an area of the worker's;
there, only the area's own ends are watched.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataplane import ledger
from dataplane.inet import step
from dataplane.shm import layout as L
from dataplane.shm.arena import PAGE
from tests import bed as beds
from tests.bed import Frame, Record, Socket
from tests.fuzz.tracing import PAGE_BITS, Slots, TracedWorld
from tests.inet import test_tcp_input as tcp_bed

__all__ = ["FuzzBed", "Result"]

_GET, _PUT = struct.Struct("=q").unpack_from, struct.Struct("=q").pack_into
ROUNDS = 64         # steps in which a worker has finished with one burst, by far


@dataclass(frozen=True)
class Result:
    """What came out of a run: changes of the ledger, records by socket, frames that were sent."""

    offered: int
    delivered: int
    deliveries: int
    held: int
    reasons: dict[str, int]
    records: list[list[Record]]
    replies: list[bytes]


class FuzzBed(tcp_bed.TcpBed):
    """See above. `passive`: no addresses, nothing is sent."""

    def __init__(self, world: TracedWorld, passive: bool = False) -> None:
        super().__init__(sockets=64, groups=4)
        self.world, self.view = world, memoryview(self.mem)
        self.step: Any = world.load("dataplane.inet.step")
        world.callbacks = {beds.rx.address: _rx, beds.done.address: _done, tcp_bed.tx.address: _tx}
        if passive:
            self.put(self.nif + L.N_FLAGS, L.NF_PASSIVE)
            self.put(self.nif + L.N_ADDRESS_COUNT, 0)
        self.sockets: list[Socket] = []
        self._pages: dict[int, Any] = {}
        self._front = False

    def open(self, *arguments: Any, **more: Any) -> Socket:
        """As the base class does; `records` of a result are in this order."""
        sock = super().open(*arguments, **more)
        self.sockets.append(sock)
        return sock

    # -- memory ------------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """From now on each run begins with what is here now."""
        self.put(self.log, 8)
        self._row = ledger.read_row(self.mem, self.nif)
        self._snapshot = {start: self.mem[start:start + size].copy() for start, size in self._areas()}
        self._pages = {(start >> PAGE_BITS) + i: part for start, copy in self._snapshot.items()
                       for i, part in enumerate(copy.reshape(-1, PAGE))}
        self.world.dirty.clear()

    def _areas(self) -> list[tuple[int, int]]:
        """All memory but the frames' own."""
        mine = {*self._slots, self.get(self.nif + beds._INDEX)}
        return [(start, size) for start, (size, _) in self.arena._slices.items() if start not in mine]

    def _restore(self) -> None:
        # What Python has written: tails of lanes, the netif's words, descriptors, the log.
        self.world.dirty.update(sock.lane >> PAGE_BITS for sock in self.sockets)
        burst, end = self.get(self.w + L.W_BURST), self.log + self.get(self.log)
        for first, last in ((burst, burst + L.BURST * L.P_BYTES), (self.log, end), (self.nif, self.nif + L.N_BYTES)):
            self.world.dirty.update(range(first >> PAGE_BITS, (last >> PAGE_BITS) + 1))
        for page in self.world.dirty:
            if (part := self._pages.get(page)) is not None:
                at = page << PAGE_BITS
                self.mem[at:at + PAGE] = part

    def check(self) -> None:
        """Compiled code has written nowhere where plain code has not: all of the memory is as it was."""
        for start, copy in self._snapshot.items():
            now = self.mem[start:start + len(copy)]
            if not np.array_equal(now, copy):
                at = int(np.flatnonzero(now != copy)[0])
                raise AssertionError(f"compiled code has written to byte {at} of the area at {start}")

    # -- a run -------------------------------------------------------------------------------------------------

    def plain(self, frames: Sequence[Frame]) -> Result:
        """Runs the worker as plain Python; the world's trace is that of this run."""
        world = self.world
        world.dirty.clear()
        world.trace.clear()
        self._front = False
        self._offer(frames)
        first = self._slots[0]
        stride = self._slots[1] - first
        ends = tuple((slot + beds.LARGEST - len(one.data), slot + beds.LARGEST)
                     for slot, one in zip(self._slots, frames, strict=False))
        world.slots = Slots(first, first + stride * len(self._slots), stride, ends)
        world.now = time.monotonic_ns()
        try:
            for _ in range(ROUNDS):
                if not self.step.step(self.view, self.w, 1):
                    break
            else:
                raise AssertionError("the worker does not come to an end")
        finally:
            world.slots = Slots()
        return self._result(len(frames))

    def compiled(self, frames: Sequence[Frame], front: bool = False) -> Result:
        """Runs the compiled worker, after `plain` with the same frames, which has told what is to be restored."""
        self._front = front
        self._offer(frames)
        for _ in range(ROUNDS):
            if not step.step(self.mem, self.w, 1):
                break
        else:
            raise AssertionError("the worker does not come to an end")
        return self._result(len(frames))

    def _offer(self, frames: Sequence[Frame]) -> None:
        super()._offer(frames)
        if not self._front:
            return
        index = self.get(self.nif + beds._INDEX)
        for number, (frame, slot) in enumerate(zip(frames, self._slots, strict=False)):
            self.mem[slot:slot + len(frame.data)] = np.frombuffer(frame.data, np.uint8)
            self.put(index + number * beds._ENTRY, slot)

    def _result(self, taken: int) -> Result:
        row, old = ledger.read_row(self.mem, self.nif), self._row
        reasons = {name: count - old.dropped.get(name, 0) for name, count in row.dropped.items()}
        result = Result(row.offered - old.offered, row.delivered - old.delivered, row.deliveries - old.deliveries,
                        row.held - old.held, {name: count for name, count in reasons.items() if count},
                        [self.records(sock) for sock in self.sockets], self._replies())
        assert row.in_hand == 0 and result.offered == taken, result
        assert result.offered == result.delivered + sum(result.reasons.values()) + result.held, result
        self._restore()
        return result

    def _replies(self) -> list[bytes]:
        found, at, end = [], 8, self.get(self.log)
        while at < end:
            size = self.get(self.log + at)
            found.append(self.mem[self.log + at + 8:self.log + at + 8 + size].tobytes())
            at += 8 + size
        return found


# -- the bed's netif as plain Python -----------------------------------------------------------------------------


def _rx(mem: Any, nif: int, burst: int, most: int) -> int:
    position = _GET(mem, nif + beds._POSITION)[0]
    count = min(most, _GET(mem, nif + beds._COUNT)[0] - position)
    for i in range(count):
        entry, p = _GET(mem, nif + beds._INDEX)[0] + (position + i) * beds._ENTRY, burst + i * L.P_BYTES
        mem[p:p + beds._ENTRY] = mem[entry:entry + beds._ENTRY]     # a descriptor begins with the same words
    return int(count)


def _done(mem: Any, nif: int, frames: int) -> int:
    _PUT(mem, nif + beds._POSITION, _GET(mem, nif + beds._POSITION)[0] + frames)
    return 0


def _tx(mem: Any, nif: int, burst: int, count: int) -> int:
    log = _GET(mem, nif + tcp_bed._LOG)[0]
    for p in range(burst, burst + count * L.P_BYTES, L.P_BYTES):
        end, size, frame = _GET(mem, log)[0], _GET(mem, p + L.P_LENGTH)[0], _GET(mem, p + L.P_FRAME)[0]
        if end + size + 8 <= tcp_bed.LOG_BYTES:
            _PUT(mem, log + end, size)
            mem[log + end + 8:log + end + 8 + size] = mem[frame:frame + size]
            _PUT(mem, log, end + 8 + size)
    return count
