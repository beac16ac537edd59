"""A netif on its own, driven as an RX worker would: its kernels called through their addresses.

    with Rig(af_packet, namespace, device="va0") as rig:
        frames = rig.receive(10)
        rig.send(b"...")
"""

from __future__ import annotations

import contextlib
import select
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from dataplane.jit import kernel
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import be64, call2, call3, ld8, ld64, st8, st64
from tests.netns import Forked, Namespace

_BURST = L.BURST * L.P_BYTES
_OUT = 1 << 18


@kernel("i64(mem, i64, i64, i64, i64)")
def call_rx(mem, address, nif, burst, limit):
    """Calls an rx or a tx."""
    return call3(address, mem, nif, burst, limit)


@kernel("i64(mem, i64, i64, i64)")
def call_done(mem, address, nif, count):
    return call2(address, mem, nif, count)


@kernel("i64(mem, i64, i64, i64, i64, vec)")
def drain(mem, nif, burst, stamp, rounds, state):
    """Up to `rounds` bursts, until there is none. Frames carry their number, from 0 on, at `stamp`.

    state: frames so far | number expected next | numbers left out | numbers that came late | time of the last
    frame | times that went backwards. Returns what the last rx returned.
    """
    count = 0
    for _ in range(rounds):
        count = call3(ld64(mem, nif + L.N_RX), mem, nif, burst, L.BURST)
        if count <= 0:
            break
        for i in range(count):
            p = burst + i * L.P_BYTES
            number = be64(mem, ld64(mem, p + L.P_FRAME) + stamp)
            if number > state[1]:
                state[2] += number - state[1]
            elif number < state[1]:
                state[3] += 1
            state[1] = number + 1
            now = ld64(mem, p + L.P_TIME)
            state[5] += now < state[4]
            state[4] = now
        state[0] += count
        call2(ld64(mem, nif + L.N_DONE), mem, nif, count)
    return count


@dataclass
class Frame:
    data: bytes
    wire: int
    time: int
    link: int
    flags: int
    queue: int


class Rig:
    """An open netif with memory of its own. Opened in `namespace`; None: where the caller is."""

    def __init__(self, module: ModuleType, namespace: Namespace | None, queues: int = 1, **settings: Any) -> None:
        self.arena = Arena(1 << 36)
        self.mem = self.arena.mem
        place = self.arena.map_anonymous(queues * L.N_BYTES + _BURST + _OUT, shared=True)
        self.nifs = [place + i * L.N_BYTES for i in range(queues)]
        self.burst = place + queues * L.N_BYTES
        self.out = self.burst + _BURST
        for queue, nif in enumerate(self.nifs):
            words = self.mem[nif:nif + L.N_BYTES].view(np.int64)
            words[L.N_QUEUE // 8], words[L.N_QUEUES // 8] = queue, queues
        self.settings = msgspec.convert({"kind": module.KIND, **settings}, module.Settings)
        with namespace.entered() if namespace else contextlib.nullcontext():
            self.netif = module.Netif(self.settings, self.arena, queues, self.nifs)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: object) -> None:
        self.netif.close()

    def word(self, offset: int, queue: int = 0) -> int:
        """Word N_... of the netif queue."""
        at = self.nifs[queue] + offset
        return int(self.mem[at:at + 8].view(np.int64)[0])

    def dropped(self) -> int:
        """What the kernel dropped, of all queues."""
        self.netif.poll_counters()
        return sum(self.word(L.N_KERNEL_DROPPED, queue) for queue in range(len(self.nifs)))

    def rx(self, limit: int = L.BURST, queue: int = 0) -> int:
        return int(call_rx(self.mem, self.word(L.N_RX, queue), self.nifs[queue], self.burst, limit))

    def done(self, count: int, queue: int = 0) -> None:
        call_done(self.mem, self.word(L.N_DONE, queue), self.nifs[queue], count)

    def frame(self, index: int, queue: int = 0) -> Frame:
        """Frame `index` of the last burst."""
        p = self.mem[self.burst + index * L.P_BYTES:][:L.P_BYTES].view(np.int64)
        at, size = int(p[L.P_FRAME // 8]), int(p[L.P_LENGTH // 8])
        return Frame(self.mem[at:at + size].tobytes(), int(p[L.P_WIRE // 8]), int(p[L.P_TIME // 8]),
                     int(p[L.P_LINK // 8]), int(p[L.P_FLAGS // 8]), queue)

    def receive(self, count: int, timeout: float = 10, limit: int = L.BURST) -> list[Frame]:
        """The next `count` frames of all queues; fewer when `timeout` s have passed."""
        frames: list[Frame] = []
        deadline = time.monotonic() + timeout
        while len(frames) < count and time.monotonic() < deadline:
            before = len(frames)
            for queue in range(len(self.nifs)):
                given = self.rx(min(limit, count - len(frames)), queue)
                if given < 0:
                    raise OSError(f"rx: {given}, {self.netif.error(queue)}")
                frames += [self.frame(i, queue) for i in range(given)]
                self.done(given, queue)
                if len(frames) == count:
                    return frames
            if len(frames) == before:
                select.select([self.word(L.N_FD, q) for q in range(len(self.nifs))], [], [], 0.05)
        return frames

    def take(self, wanted: bytes, timeout: float = 10) -> Frame:
        """The first frame that contains `wanted`; what comes before it is thrown away."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for frame in self.receive(1, timeout=0.2):
                if wanted in frame.data:
                    return frame
        raise TimeoutError(f"no frame with {wanted!r}")

    def send(self, *frames: bytes, queue: int = 0, offload: tuple[int, int, int] | None = None) -> int:
        """Transmits them in one burst. `offload`: place of the TCP header in each frame, whose checksum is left to
        the netif, its family, and into how many bytes of data it is to be cut (0: as it is)."""
        at = self.out
        for i, frame in enumerate(frames):
            p = self.mem[self.burst + i * L.P_BYTES:][:L.P_BYTES].view(np.int64)
            self.mem[at:at + len(frame)] = np.frombuffer(frame, np.uint8)
            p[L.P_FRAME // 8], p[L.P_LENGTH // 8], p[L.P_FLAGS // 8] = at, len(frame), 0
            if offload:
                p[L.P_FLAGS // 8], p[L.P_L4 // 8] = L.PF_CHECKSUM_PARTIAL, at + offload[0]
                p[L.P_FAMILY // 8], p[L.P_SEGMENT // 8] = offload[1:]
            at += -(-len(frame) // 64) * 64
        address = self.word(L.N_TX, queue)
        assert address, "this netif cannot transmit"
        return int(call_rx(self.mem, address, self.nifs[queue], self.burst, len(frames)))


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def tally(mem, nif, burst, stamp, table, rounds):
    """As `drain`, but adds 1 to byte `number` of the table at `table` for each frame, before it is done."""
    count = 0
    for _ in range(rounds):
        count = call3(ld64(mem, nif + L.N_RX), mem, nif, burst, L.BURST)
        if count <= 0:
            break
        for i in range(count):
            number = be64(mem, ld64(mem, burst + i * L.P_BYTES + L.P_FRAME) + stamp)
            at = table + 8 + number
            st8(mem, at, ld8(mem, at) + 1)
        st64(mem, table, ld64(mem, table) + count)
        call2(ld64(mem, nif + L.N_DONE), mem, nif, count)
    return count


class Tally:
    """Counts how often each numbered frame was taken, over workers that are killed."""

    def __init__(self, rig: Rig, stamp: int, total: int) -> None:
        self.rig = rig
        self.stamp = stamp
        self.table = rig.arena.map_anonymous(8 + total, shared=True)
        self.counts = rig.mem[self.table + 8:][:total]
        tally.compile()

    def seen(self) -> int:
        """Frames taken so far; the last burst of a killed worker may be missing or counted twice."""
        return int(self.rig.mem[self.table:self.table + 8].view(np.int64)[0])

    def step(self) -> int:
        rig = self.rig
        return int(tally(rig.mem, rig.nifs[0], rig.burst, self.stamp, self.table, 64))

    def run(self) -> None:
        """A worker: never ends by itself."""
        while True:
            self.step()

    def run_to_end(self, sender: Forked) -> None:
        """Takes what is left until the sender has ended and nothing came for a while."""
        quiet = 0
        while sender.running() or quiet < 20:
            quiet = 0 if self.step() else quiet + 1
            select.select([self.rig.word(L.N_FD)], [], [], 0.01)

    def wait(self, count: int, timeout: float = 30) -> None:
        """Until `count` more frames were taken."""
        start, deadline = self.seen(), time.monotonic() + timeout
        while self.seen() < start + count and time.monotonic() < deadline:
            time.sleep(0.0005)
