"""A test bed: one RX worker, one netif queue, a real table and real lanes, in this process and without a supervisor.

    bed = Bed(passive=True)
    sock = bed.open("udp", port=53)
    outcome = bed.send([frame, frame])      # through the worker's own step
    outcome.reasons, outcome.delivered, bed.records(sock)

The netif is a list of frames. Each stands right before a page that nobody may touch, so that reading behind
a frame's end is a crash. `Bed.send` asserts the ledger's identity every time.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataplane import ledger
from dataplane.inet import step, worker
from dataplane.jit import callback
from dataplane.pcb.table import SocketSpec, Table
from dataplane.rings.lane import lane_bytes
from dataplane.rings.wake import init_wake
from dataplane.shm import layout as L
from dataplane.shm.arena import PAGE, Arena
from dataplane.shm.atomics import as_memory, ld64, st64

LARGEST = 16 * PAGE         # of a frame: an IP packet of 65,535 bytes and a little link header
STAMP = 7                   # what the worker writes into locks

# What the netif keeps in the queue's private memory, and of each frame.
_POSITION, _COUNT, _INDEX, _SENT = (L.N_PRIVATE + 8 * i for i in range(1, 5))
_WORDS = (L.P_FRAME, L.P_LENGTH, L.P_WIRE, L.P_TIME, L.P_LINK, L.P_FLAGS)
_ENTRY = 8 * len(_WORDS)


@callback(3)
def rx(base, nif, burst, most):
    mem = as_memory(base)
    position = ld64(mem, nif + _POSITION)
    count = min(most, ld64(mem, nif + _COUNT) - position)
    for i in range(count):
        p = burst + i * L.P_BYTES
        entry = ld64(mem, nif + _INDEX) + (position + i) * _ENTRY
        st64(mem, p + L.P_FRAME, ld64(mem, entry))
        st64(mem, p + L.P_LENGTH, ld64(mem, entry + 8))
        st64(mem, p + L.P_WIRE, ld64(mem, entry + 16))
        st64(mem, p + L.P_TIME, ld64(mem, entry + 24))
        st64(mem, p + L.P_LINK, ld64(mem, entry + 32))
        st64(mem, p + L.P_FLAGS, ld64(mem, entry + 40))
    return count


@callback(2)
def done(base, nif, frames):
    mem = as_memory(base)
    st64(mem, nif + _POSITION, ld64(mem, nif + _POSITION) + frames)
    return 0


@callback(3)
def tx(base, nif, burst, count):
    mem = as_memory(base)
    st64(mem, nif + _SENT, ld64(mem, nif + _SENT) + count)
    return count


@dataclass(frozen=True)
class Frame:
    """What a netif hands over. wire: its length before a capture cut it."""

    data: bytes
    link: int = L.LINK_ETHERNET
    flags: int = 0
    time: int = 1
    wire: int | None = None


@dataclass(frozen=True)
class Record:
    """What a consumer finds in its ring. `aux` is the payload's offset and the VLAN tag, or a frame's length on
    the wire."""

    data: bytes
    flags: int
    aux: int
    time: int

    @property
    def payload(self) -> bytes:
        """The packet's payload."""
        return self.data[self.aux & 0xFFFF:]

    @property
    def vlan(self) -> int | None:
        """The VLAN's tag control information."""
        return self.aux >> 16 if self.flags & L.RECORD_VLAN else None


@dataclass(frozen=True)
class Outcome:
    """What the ledger says became of the frames: changes of its row."""

    taken: int
    delivered: int
    deliveries: int
    held: int
    reasons: dict[str, int]
    transmitted: int


@dataclass(eq=False)
class Socket:
    """An open socket: its PCB's number, and where its lane is."""

    number: int
    lane: int
    wake: int
    spec: SocketSpec = field(repr=False)


def pair(address: str) -> tuple[int, int]:
    """(hi, lo) of an address."""
    number = int(ipaddress.ip_address(address))
    return number >> 64, number & (1 << 64) - 1


def family_bits(address: str) -> int:
    """L.KEY_FAMILY4 or 6."""
    return L.KEY_FAMILY4 if ipaddress.ip_address(address).version == 4 else L.KEY_FAMILY6


class Bed:
    """The table, the worker's block `w`, the netif queue `nif`. Without `addresses` the netif is passive."""

    def __init__(self, addresses: Sequence[str] = (), backpressure: bool = False, sockets: int = 256,
                 reassemblies: int = 8, groups: int = 32) -> None:
        self.arena = Arena(1 << 34)
        self.mem: Any = self.arena.mem
        size = Table.size(sockets, 1, 1, groups, 64)
        self.table = Table(self.mem, self.arena.map_anonymous(size, shared=True), sockets, 1, 1, groups, 64)
        worker.prepare(self.arena, self.table, 0, 1000, 262144)
        self.w = worker.attach_private(self.arena, self.table, 0, reassemblies, 3600.0, STAMP)
        self.nif = self.table.nif(0, 0)
        self._slots = [self.arena.map_anonymous(LARGEST) for _ in range(L.BURST)]
        self._netif(addresses, backpressure)
        self._row = ledger.read_row(self.mem, self.nif)
        self._sent = 0

    def _netif(self, addresses: Sequence[str], backpressure: bool) -> None:
        flags = (0 if addresses else L.NF_PASSIVE) | (L.NF_BACKPRESSURE if backpressure else 0)
        words = {L.N_RX: rx.address, L.N_DONE: done.address, L.N_TX: tx.address, L.N_LINK: L.LINK_ETHERNET,
                 L.N_FLAGS: flags, L.N_FD: -1, L.N_FDS_SYN: -1, L.N_FDS_SYN + 8: -1,
                 L.N_MTU: 1500, L.N_MAC: 0x010000000002,
                 L.N_ADDRESS_COUNT: len(addresses), _INDEX: self.arena.map_anonymous(L.BURST * _ENTRY)}
        for number, text in enumerate(addresses):
            interface = ipaddress.ip_interface(text)
            at = L.N_ADDRESSES + number * L.ADDRESS_BYTES
            hi, lo = pair(str(interface.ip))
            words |= {at + L.ADDRESS_FAMILY: interface.version, at + L.ADDRESS_PREFIX: interface.network.prefixlen,
                      at + L.ADDRESS_HI: hi, at + L.ADDRESS_LO: lo}
        for word, value in words.items():
            self.put(self.nif + word, value)

    def get(self, place: int) -> int:
        return self.table.get(place)

    def put(self, place: int, value: int) -> None:
        self.table.put(place, value)

    # -- sockets -----------------------------------------------------------------------------------------------

    def open(self, kind: str = "udp", address: str | None = None, port: int | None = None,
             remote: tuple[str, int] | None = None, families: int = 0, proto: int = 17, ring_bytes: int = 65536,
             **more: Any) -> Socket:
        """Opens a socket with a ring of its own; `more` as in SocketSpec."""
        slot = self.arena.map_anonymous(L.SLOT_LANES + lane_bytes(ring_bytes), shared=True)
        init_wake(self.mem, slot)
        decisive = address or (remote[0] if remote else None)
        both = L.KEY_FAMILY4 | L.KEY_FAMILY6
        spec = SocketSpec(
            kind, families or (family_bits(decisive) if decisive else both), proto, port=port,
            local=pair(address) if address else None, remote=(*pair(remote[0]), remote[1]) if remote else None,
            ring_bytes=ring_bytes, lanes=[slot + L.SLOT_LANES], wake=slot, **more)
        return Socket(self.table.open(spec), slot + L.SLOT_LANES, slot, spec)

    def close(self, sock: Socket) -> None:
        """Closes and frees it at once: no burst is under way here."""
        target = self.table.close(sock.number)
        step.step(self.mem, self.w, 1)
        assert self.table.passed(target)
        self.table.free(sock.number)

    def records(self, sock: Socket) -> list[Record]:
        """Takes everything out of the socket's ring."""
        found = []
        tail, head, size = self.get(sock.lane + L.LANE_TAIL), self.get(sock.lane + L.LANE_HEAD), sock.spec.ring_bytes
        assert 0 <= head - tail <= size
        while tail < head:
            at = tail % size
            assert at % L.RECORD_ALIGN == 0
            record = sock.lane + L.LANE_DATA + at
            word = self.get(record) & (1 << 64) - 1
            length = word & 0xFFFFFF
            assert at + L.RECORD_DATA + length <= size
            if not (word >> 24) & L.RECORD_PAD:
                start = record + L.RECORD_DATA
                found.append(Record(self.mem[start:start + length].tobytes(), (word >> 24) & 0xFF, word >> 32,
                                    self.get(record + L.RECORD_TIME)))
            tail += -(-(length + L.RECORD_DATA) // L.RECORD_ALIGN) * L.RECORD_ALIGN
        assert tail == head
        self.put(sock.lane + L.LANE_TAIL, head)
        self.put(sock.lane + L.LANE_CONSUMED, self.get(sock.lane + L.LANE_CONSUMED) + len(found))
        return found

    # -- frames ------------------------------------------------------------------------------------------------

    def send(self, frames: Iterable[Frame | bytes]) -> Outcome:
        """Offers the frames and lets the worker go on until it takes no more."""
        waiting = [one if isinstance(one, Frame) else Frame(one) for one in frames]
        taken = 0
        for first in range(0, len(waiting), L.BURST):
            part = waiting[first:first + L.BURST]
            self._offer(part)
            now = self.go_on()
            taken += now
            if now < len(part):
                break
        return self.outcome(taken)

    def _offer(self, frames: Sequence[Frame]) -> None:
        index = self.get(self.nif + _INDEX)
        for number, (frame, slot) in enumerate(zip(frames, self._slots, strict=False)):
            place = slot + LARGEST - len(frame.data)
            self.mem[place:slot + LARGEST] = np.frombuffer(frame.data, np.uint8)
            wire = len(frame.data) if frame.wire is None else frame.wire
            for i, value in enumerate((place, len(frame.data), wire, frame.time, frame.link, frame.flags)):
                self.put(index + number * _ENTRY + 8 * i, value)
        self.put(self.nif + _POSITION, 0)
        self.put(self.nif + _COUNT, len(frames))

    def go_on(self) -> int:
        """Steps until the worker takes nothing more of what was offered; how many it took now."""
        before = self.get(self.nif + _POSITION)
        while step.step(self.mem, self.w, 1):
            pass
        return self.get(self.nif + _POSITION) - before

    def outcome(self, taken: int = 0) -> Outcome:
        """What has changed in the ledger since the last call. Nothing is ever in hand between steps."""
        row, old = ledger.read_row(self.mem, self.nif), self._row
        assert row.in_hand == 0, row
        assert row.held >= 0
        self._row = row
        sent, self._sent = self.get(self.nif + _SENT) - self._sent, self.get(self.nif + _SENT)
        reasons = {name: count - old.dropped.get(name, 0) for name, count in row.dropped.items()}
        assert row.offered - old.offered == taken or not taken
        return Outcome(taken, row.delivered - old.delivered, row.deliveries - old.deliveries, row.held - old.held,
                       {name: count for name, count in reasons.items() if count}, sent)

    def flush(self) -> Outcome:
        """What the worker does last: datagrams in reassembly are given up."""
        step.finish(self.mem, self.w)
        return self.outcome()
