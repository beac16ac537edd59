"""The consumers' memory: home segments, ring segments with the slots of many sockets each, bells.

Called by the control service. Everything here is mapped by the supervisor first and then, at the same offset
of the arena, by every RX worker, so that a worker that is forked later inherits it. What is handed out may be
used when its ticket says True; what is taken back must not be reachable from the table any more.

A ring segment's slots are all of one size. The first segment of a consumer has one slot; each further one
doubles what the consumer has of that size, up to SEGMENT_BYTES: one socket costs what one socket needs, and a
hundred thousand of them do not need a hundred thousand shared-memory objects.

The slots of TCP connections are larger, and come in segments of their own, always anonymous: they do not have
to fit in /dev/shm. A segment has as many of them as were asked for at once, and it is sparse: a page gets memory
when it is first written. So a slot that was never used is zero, is not cleared, and takes none; those that were used
last are used next. Which slot has which PCB, and which of them a listener may fill, is in `Owner`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from dataplane.errors import SegmentSpaceError
from dataplane.rings.lane import lane_bytes
from dataplane.rings.wake import init_wake
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.arena import Arena
from dataplane.shm.bell import new_bell
from dataplane.shm.segment import Segment
from dataplane.tcp import service
from workers import orders
from workers.crew import Crew, Ticket

M = TypeVar("M", bound="Mapping")

SEGMENT_BYTES = 1 << 26     # a ring segment grows up to this, unless one slot needs more
_FIRST_SLOT = -(-L.SEG_HEADER // L.SLOT_ALIGN) * L.SLOT_ALIGN
_FIRST_CONNECTION = service.SLOT_ALIGN


class Mapping:
    """An owner segment and where it is mapped. Its descriptor stays open until the consumer has it, too."""

    def __init__(self, segment: Segment, number: int, offset: int) -> None:
        self.segment, self.number, self.offset = segment, number, offset
        self.given = False          # whether the consumer has been told of it
        self.mapped: Ticket = lambda: False


class Rings(Mapping):
    """A segment of `count` equal slots."""

    def __init__(self, segment: Segment, number: int, offset: int, ring_bytes: int, workers: int) -> None:
        super().__init__(segment, number, offset)
        self.ring_bytes, self.workers = ring_bytes, workers
        self.slot_bytes = slot_bytes(ring_bytes, workers)
        self.count = (segment.size - _FIRST_SLOT) // self.slot_bytes
        self.free = [_FIRST_SLOT + index * self.slot_bytes for index in reversed(range(self.count))]

    def wake(self, slot: int) -> int:
        """Arena offset of the slot's own wake object."""
        return self.offset + slot + L.SLOT_WAKE

    def lanes(self, slot: int) -> list[int]:
        """Arena offsets of the slot's lanes, one per worker."""
        first = self.offset + slot + L.SLOT_LANES
        return [first + worker * lane_bytes(self.ring_bytes) for worker in range(self.workers)]


@dataclass(frozen=True)
class Shape:
    """Sizes of a connection's slot: ring bytes of each lane, of the send and of the receive buffer."""

    lane_bytes: int
    send_bytes: int
    receive_bytes: int

    def slot_bytes(self, workers: int) -> int:
        """Bytes of the slot."""
        return service.slot_bytes(self.lane_bytes, self.send_bytes, self.receive_bytes, workers)


class Connections(Mapping):
    """A segment of equal slots for TCP connections."""

    def __init__(self, segment: Segment, number: int, offset: int, shape: Shape, workers: int) -> None:
        super().__init__(segment, number, offset)
        self.shape, self.workers = shape, workers
        self.used: set[int] = set()     # slots that are to be cleared
        size = shape.slot_bytes(workers)
        self.free = list(range(segment.size - size, _FIRST_CONNECTION - 1, -size))

    def place(self, slot: int) -> int:
        """Arena offset of the slot."""
        return self.offset + slot

    def lanes(self, slot: int) -> list[int]:
        """Arena offsets of the slot's lanes, one per worker."""
        first = self.offset + slot + T.CONN_LANES
        return [first + worker * lane_bytes(self.shape.lane_bytes) for worker in range(self.workers)]


@dataclass(eq=False)
class Listener:
    """A listener and the slots that it may fill: their PCB numbers, `most` at a time."""

    owner: Owner
    pcb: int
    shape: Shape
    backlog: int
    most: int
    numbers: set[int] = field(default_factory=set)
    growing: bool = False       # more slots are being made
    closed: bool = False


@dataclass(eq=False)
class Owner:
    """A consumer: what it is, and all that ends with it."""

    consumer: int
    pid: int
    uid: int
    gid: int
    sealed: bool                # another uid than ours: anonymous segments that it cannot truncate
    home: Mapping
    rings: dict[int, list[Rings]] = field(default_factory=dict)             # by ring bytes
    sockets: dict[int, tuple[Rings, int]] = field(default_factory=dict)     # PCB number to segment and slot
    bells: dict[int, tuple[int, int]] = field(default_factory=dict)         # by number: listening, ringing end
    rope: int = -1              # its own ringing end of the doorbell of the worker that transmits for it
    closing: int = 0            # sockets that are being closed and still hold their slots
    pools: dict[Shape, list[Connections]] = field(default_factory=dict)
    connections: dict[int, tuple[Connections, int]] = field(default_factory=dict)   # PCB, used or not, to its slot

    @property
    def mappings(self) -> Iterator[Mapping]:
        """All of its segments."""
        yield self.home
        for rings in self.rings.values():
            yield from rings
        for pool in self.pools.values():
            yield from pool

    def segment(self, number: int) -> Mapping | None:
        """Its segment of sockets or of connections with that number."""
        return next((one for one in self.mappings if one is not self.home and one.number == number), None)


def slot_bytes(ring_bytes: int, workers: int) -> int:
    """Bytes of a socket's slot."""
    size = L.SLOT_LANES + workers * lane_bytes(ring_bytes)
    return -(-size // L.SLOT_ALIGN) * L.SLOT_ALIGN


class Memory:
    """Makes and unmakes owner segments. `name(what)` gives a segment its name."""

    def __init__(self, arena: Arena, crew: Crew, name: Callable[[str], str], tx_ring_bytes: int) -> None:
        self._arena, self._crew, self._name = arena, crew, name
        self._workers = len(crew.workers)
        self._home_bytes = L.HOME_TX + lane_bytes(tx_ring_bytes)
        self._rings_made = 0
        self._free_events = list(reversed(range(1, L.EVENTS_MAX)))

    # -- segments --------------------------------------------------------------------------------------------

    def home(self, consumer: int, sealed: bool) -> Mapping:
        """A consumer's home segment, with its wake objects."""
        segment = self._segment(f"home-{consumer}", self._home_bytes, L.SEG_HOME, sealed)
        home = self._map(segment, lambda offset: Mapping(segment, 0, offset))
        init_wake(self._arena.mem, home.offset + L.HOME_WAKE)
        for index in range(L.HOME_MAX_POLLERS):
            init_wake(self._arena.mem, home.offset + L.HOME_POLLERS + index * L.WAKE_BYTES)
        return home

    def slot(self, owner: Owner, ring_bytes: int) -> tuple[Rings, int]:
        """A slot for a socket of `owner`, its lanes empty. Raises SegmentSpaceError."""
        segments = owner.rings.setdefault(ring_bytes, [])
        rings = next((one for one in reversed(segments) if one.free), None)
        if rings is None:
            rings = self._rings(owner, ring_bytes, sum(one.count for one in segments))
            segments.append(rings)
        slot = rings.free.pop()
        self._clear(rings, slot)
        return rings, slot

    def connections(self, owner: Owner, shape: Shape, count: int) -> list[tuple[Connections, int]]:
        """`count` slots for connections of `owner`; they may be used when their segments' tickets say True. Raises
        OSError(ENOMEM)."""
        pool = owner.pools.setdefault(shape, [])
        missing = count - sum(len(one.free) for one in pool)
        if missing > 0:
            pool.append(self._connections(shape, missing))
        found: list[tuple[Connections, int]] = []
        for segment in pool:
            while segment.free and len(found) < count:
                slot = segment.free.pop()
                self._clear_connection(segment, slot)
                found.append((segment, slot))
        return found

    def give_back(self, mapping: Rings | Connections, slot: int) -> None:
        """The slot may be used for another socket of its owner."""
        mapping.free.append(slot)

    def unmap(self, mapping: Mapping) -> Ticket:
        """Let the workers forget a segment; `remove` it when the ticket says True."""
        return self._crew.order(orders.Unmap(mapping.offset, mapping.segment.size))

    def remove(self, mapping: Mapping) -> None:
        """Give a segment's memory back to the system."""
        self._arena.unmap(mapping.offset, mapping.segment.size)
        mapping.segment.unlink()
        mapping.segment.close()

    def _rings(self, owner: Owner, ring_bytes: int, have: int) -> Rings:
        size = slot_bytes(ring_bytes, self._workers)
        count = max(1, min(have, (SEGMENT_BYTES - _FIRST_SLOT) // size))
        self._rings_made += 1
        number = self._rings_made
        name = f"rings-{number}"
        try:
            segment = self._segment(name, _FIRST_SLOT + count * size, L.SEG_RINGS, owner.sealed)
        except SegmentSpaceError:
            if count == 1:
                raise
            segment = self._segment(name, _FIRST_SLOT + size, L.SEG_RINGS, owner.sealed)
        return self._map(segment, lambda offset: Rings(segment, number, offset, ring_bytes, self._workers))

    def _connections(self, shape: Shape, count: int) -> Connections:
        size = _FIRST_CONNECTION + count * shape.slot_bytes(self._workers)
        segment = Segment.create_sealed(size, L.SEG_CONNECTIONS, sparse=True)
        self._rings_made += 1
        number = self._rings_made
        return self._map(segment, lambda offset: Connections(segment, number, offset, shape, self._workers))

    def _segment(self, what: str, size: int, kind: int, sealed: bool) -> Segment:
        return Segment.create_sealed(size, kind) if sealed else Segment.create(self._name(what), size, kind)

    def _map(self, segment: Segment, make: Callable[[int], M]) -> M:
        try:
            offset = self._arena.map_fd(segment.fd, segment.size)
        except BaseException:
            segment.unlink()
            segment.close()
            raise
        mapping = make(offset)
        mapping.mapped = self._crew.order(orders.Map(offset, segment.size), segment.fd)
        return mapping

    def _clear(self, rings: Rings, slot: int) -> None:
        mem = self._arena.mem
        for lane in rings.lanes(slot):
            mem[lane:lane + L.LANE_DATA] = 0
        init_wake(mem, rings.wake(slot))

    def _clear_connection(self, segment: Connections, slot: int) -> None:
        if slot not in segment.used:        # its pages may have no memory yet
            segment.used.add(slot)
            return
        mem, place = self._arena.mem, segment.place(slot)
        mem[place:place + T.CONN_LANES] = 0         # a wake object among it: zeros are one
        for lane in segment.lanes(slot):
            mem[lane:lane + L.LANE_DATA] = 0

    # -- bells -----------------------------------------------------------------------------------------------

    def event(self, owner: Owner) -> tuple[int, int, Ticket]:
        """A new bell: its number, its listening end, and when all workers can ring it."""
        listening, ringing = new_bell()
        number = self._free_events.pop()
        owner.bells[number] = listening, ringing
        return number, listening, self._crew.order(orders.Listen(number, owner.consumer), ringing)

    def forget_events(self, owner: Owner) -> Ticket:
        """Let the workers close the consumer's bells; `close_events` when the ticket says True."""
        tickets = [self._crew.order(orders.Forget(number)) for number in owner.bells]
        return lambda: all(ticket() for ticket in tickets)

    def close_events(self, owner: Owner) -> None:
        """Close the supervisor's own copies."""
        for number, ends in owner.bells.items():
            for descriptor in ends:
                os.close(descriptor)
            self._free_events.append(number)
        owner.bells.clear()
        if owner.rope >= 0:
            os.close(owner.rope)
            owner.rope = -1
