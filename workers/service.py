"""What consumers and observers ask for over the control socket, and what becomes of what they own.

Called by `control/server.py` for each request, in the supervisor. Requests that have to wait (for workers
to map memory, for an epoch to pass) are coroutines; none waits longer than GUARD. Everything that a consumer
owns is found from its `Owner`, and is taken apart when its connection ends, in an order in which no worker
can still reach what goes: out of the table, past the epoch, out of the workers' address space, out of
existence.

A TCP connection's end is not asked for here: the owner says in the slot that it is done, and the continuation worker
carries the connection to its end and reports the PCB (`orders.Freed`). Slots for connections to come are with the RX
workers (pcb/slots.py), at first twice as many as a listener's backlog. A worker that has fewer left than its share
of the backlog says so, and the listener gets as many again as it has.
"""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dataplane import ledger
from dataplane.config import Config
from dataplane.control import messages
from dataplane.control.access import Access
from dataplane.control.loop import Loop
from dataplane.control.server import Answer, Peer, demand_descriptors
from dataplane.errors import DataplaneError
from dataplane.pcb.table import SocketSpec, Table
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.bell import another_rope
from workers import orders
from workers.binding import Binding, Connecting, Listening, describe
from workers.crew import Crew, Ticket, Worker
from workers.listing import describe_socket
from workers.owners import Connections, Listener, Memory, Owner, Rings, Shape

GUARD = 1.0             # seconds after which a worker that does not obey fails a request
MAX_EVENTS = 256        # bells of one consumer
PAGE = 64               # sockets in one reply of `ss`
STARTING = 8.0          # seconds that a request waits for a worker that is being replaced; a client waits for 10
RETRY = 1.0             # seconds after which a listener that could not be given more slots may ask again
RESET_GUARD = 90.0      # seconds after which connections of a dead consumer are ordered to end once more


def time_wait_ns(config: Config) -> int:
    """How long connections stay in TIME_WAIT: the workers' and the consumers' part of it is the same."""
    return int(config.tcp.time_wait * 1e9)


@dataclass(frozen=True)
class Running:
    """What the supervisor has made, for those who serve it. `uid` and `pid` are its own."""

    config: Config
    uid: int
    pid: int
    loop: Loop
    table: Table
    crew: Crew
    memory: Memory
    netifs: list[messages.NetifInfo]


class ControlService:
    """Serves the requests. `tell` makes the ledger."""

    def __init__(self, running: Running, tell: Callable[[], dict[str, Any]]) -> None:
        self._config, self._loop, self._table = running.config, running.loop, running.table
        self._crew, self._memory, self._netifs = running.crew, running.memory, running.netifs
        self._uid, self._pid, self._tell = running.uid, running.pid, tell
        self._access = Access(running.uid, running.config.access)
        self._numbers = itertools.count(1)
        # By PCB number: listeners, until their slots are back; whose a connection or slot is, and which listener's.
        self._listeners: dict[int, Listener] = {}
        self._holders: dict[int, tuple[Owner, Listener | None]] = {}
        self._crew.heard = self._heard
        self.owners: dict[Peer, Owner] = {}
        self.retiring: list[Owner] = []             # gone, and not yet taken apart
        self.closed: Counter[str] = Counter()       # counters of sockets that are no more

    async def serve(self, peer: Peer, request: messages.Request) -> Answer:
        if isinstance(request, messages.Attach | messages.Bind | messages.Event):
            demand_descriptors()
        match request:
            case messages.Attach():
                return await self._attach(peer, request)
            case messages.Bind(kind="tcp_listen"):
                return await self._listen(self._owner(peer), request)
            case messages.Bind(kind="tcp_connect"):
                return await self._connect(self._owner(peer), request)
            case messages.Bind():
                return await self._bind(self._owner(peer), request)
            case messages.SegmentOf():
                return self._segment_of(self._owner(peer), request.number)
            case messages.Close():
                return self._close(self._owner(peer), request)
            case messages.SetWake():
                return await self._set_wake(self._owner(peer), request)
            case messages.Event():
                return await self._event(self._owner(peer))
            case messages.Stats():
                return self._stats()
            case messages.Sockets():
                return self._sockets(request.start)

    def gone(self, peer: Peer) -> None:
        if owner := self.owners.pop(peer, None):
            self._loop.spawn(self._retire(owner))

    def _owner(self, peer: Peer) -> Owner:
        if peer not in self.owners:
            raise OSError(errno.ENOTCONN, "not attached")
        return self.owners[peer]

    async def _obeyed(self, *tickets: Ticket) -> None:
        """Wait for orders to be carried out. A worker that is just starting, in place of a dead one, is not stuck:
        it has its time, and GUARD begins behind that."""
        def done() -> bool:
            return all(ticket() for ticket in tickets)

        await self._loop.until(lambda: done() or self._crew.ready, STARTING)
        if not await self._loop.until(done, GUARD):
            stuck = self._crew.ready
            raise DataplaneError(f"an RX worker has not answered within {GUARD:.0f} s" if stuck else
                                 f"an RX worker that is being replaced has not started within {STARTING:.0f} s")

    # -- consumers -------------------------------------------------------------------------------------------

    async def _attach(self, peer: Peer, request: messages.Attach) -> Answer:
        if (request.version, request.fingerprint) != (messages.PROTOCOL_VERSION, L.fingerprint()):
            raise OSError(errno.EPROTO, f"dataplane {self._config.name!r} was started by another version: "
                                        "its protocol or memory layout differs from this program's")
        if peer in self.owners:
            raise OSError(errno.EISCONN, "already attached")
        if len(self.owners) >= L.CONSUMERS_MAX:
            raise OSError(errno.ENOBUFS, f"{L.CONSUMERS_MAX} consumers are attached")
        consumer = next(self._numbers)
        sealed = peer.uid != self._uid
        home = self._memory.home(consumer, sealed)
        owner = Owner(consumer, peer.pid, peer.uid, peer.gid, sealed, home)
        self.owners[peer] = owner
        worker = self._crew.workers[consumer % len(self._crew.workers)]
        try:
            owner.rope = another_rope(worker.rope)
            await self._obeyed(home.mapped,
                               self._crew.order(orders.Adopt(consumer, home.offset), worker=worker))
        except (OSError, DataplaneError):
            self.gone(peer)
            raise
        sockets = self._config.sockets
        described, descriptors = describe(home)
        return messages.Attached(
            name=self._config.name, pid=self._pid, consumer=consumer, workers=len(self._crew.workers),
            home=described, tx_ring_bytes=sockets.tx_ring_bytes, ring_bytes=sockets.ring_bytes,
            time_wait_ns=time_wait_ns(self._config), netifs=self._netifs), [owner.rope, *descriptors]

    def consumers_of(self, worker: int) -> list[tuple[int, int]]:
        """(consumer, home segment's place) of those that a worker transmits for."""
        return [(owner.consumer, owner.home.offset) for owner in self.owners.values()
                if owner.consumer % len(self._crew.workers) == worker]

    def events(self) -> list[tuple[int, int, int]]:
        """(number, ringing end, consumer) of all bells."""
        return [(number, ringing, owner.consumer) for owner in self.owners.values()
                for number, (_, ringing) in owner.bells.items()]

    async def _retire(self, owner: Owner) -> None:
        """Takes apart what a consumer owned that is gone. Not guarded: memory that a stuck worker may
        still use is kept for as long as it is stuck."""
        until = self._loop.until
        self.retiring.append(owner)
        released = self._crew.order(orders.Release(owner.consumer))
        await until(released, GUARD)    # what it has sent goes out, and for that its sockets must be open
        for pcb in list(owner.sockets):
            self._shut(owner, pcb)
        if owner.connections:
            self._crew.order(orders.Abandon(owner.consumer), worker=self._crew.continuation)
        await until(released)
        await until(lambda: owner.closing == 0)
        while not await until(lambda: not owner.connections, RESET_GUARD):
            self._crew.order(orders.Abandon(owner.consumer), worker=self._crew.continuation)
        await until(self._memory.forget_events(owner))
        self._memory.close_events(owner)
        for mapping in owner.mappings:
            await until(self._memory.unmap(mapping))
            self._memory.remove(mapping)
        self.retiring.remove(owner)

    # -- sockets ---------------------------------------------------------------------------------------------

    async def _bind(self, owner: Owner, request: messages.Bind) -> Answer:
        binding = Binding(request, self._netifs, self._config.sockets.ring_bytes)
        spec = binding.spec
        if spec.kind == "udp" and spec.port == 0:
            spec.port = self._table.ephemeral_port(spec)
        number = spec.proto if spec.kind == "raw" else spec.port or 0
        self._access.demand(owner.uid, owner.gid, spec.kind, binding.address, number)
        self._restrain(owner, self._config.sockets.ring_bytes, spec.ring_bytes)
        return await self._open(owner, spec, binding.address)

    async def _open(self, owner: Owner, spec: SocketSpec, address: str | None, **more: int) -> Answer:
        """Open what has ordinary lanes; `more` goes into the reply."""
        spec.owner, spec.uid, spec.pid = owner.consumer, owner.uid, owner.pid
        self._table.check(spec)
        rings, slot = self._memory.slot(owner, spec.ring_bytes)
        try:
            await self._obeyed(rings.mapped)
            spec.segment, spec.slot = rings.number, slot
            spec.lanes, spec.wake = rings.lanes(slot), rings.wake(slot)
            pcb = self._table.open(spec)
        except (OSError, DataplaneError):
            self._memory.give_back(rings, slot)
            raise
        owner.sockets[pcb] = rings, slot
        segment, descriptors = (None, []) if rings.given else describe(rings)
        rings.given = True
        return messages.Bound(
            pcb=pcb, generation=self._table.generation(pcb), number=rings.number, slot=slot,
            ring_bytes=spec.ring_bytes, address=address, port=spec.port, segment=segment, **more), descriptors

    def _restrain(self, owner: Owner, usual: int, ring_bytes: int) -> None:
        """Another user's rings are our memory: no larger than what the configuration gives to all."""
        most = max(usual, 1 << 20)
        if owner.sealed and owner.uid != 0 and ring_bytes > most:
            raise PermissionError(errno.EACCES, f"uid {owner.uid} may have rings of up to {most} bytes")

    def _own(self, owner: Owner, pcb: int, generation: int) -> tuple[Rings, int]:
        if pcb not in owner.sockets or self._table.generation(pcb) != generation:
            raise OSError(errno.EBADF, "no such socket of this consumer")
        return owner.sockets[pcb]

    def _close(self, owner: Owner, request: messages.Close) -> Answer:
        pcb = request.pcb
        if self._holders.get(pcb) == (owner, None) and self._table.generation(pcb) == request.generation:
            self._reset(pcb)
        else:
            self._own(owner, request.pcb, request.generation)
            self._shut(owner, request.pcb)
        return messages.Done(), ()

    def _reset(self, pcb: int) -> None:
        """Have a connection that was opened by connect reset, in the place of its application. The request is in
        the slot in case the continuation worker dies: its replacement looks there."""
        place = self._table.word(pcb, L.PCB_PLACE) + T.CONN_REQUEST
        self._table.put(place, self._table.get(place) | T.REQ_ABORT | T.REQ_CLOSED | T.REQ_SHUTDOWN)
        self._crew.order(orders.Reset(pcb), worker=self._crew.continuation)

    def _shut(self, owner: Owner, pcb: int) -> None:
        """Close a socket; its number and slot follow when no worker can be using them."""
        rings, slot = owner.sockets.pop(pcb)
        epoch = self._table.close(pcb)
        if listener := self._listeners.get(pcb):
            listener.closed = True
        owner.closing += 1
        self._loop.spawn(self._reclaim(owner, pcb, rings, slot, epoch))

    async def _reclaim(self, owner: Owner, pcb: int, rings: Rings, slot: int, epoch: int) -> None:
        await self._loop.until(lambda: self._table.passed(epoch))
        if pcb in self._listeners:
            await self._unlisten(self._listeners[pcb])
            del self._listeners[pcb]
        self.closed.update(self._table.counters(pcb))
        self._table.free(pcb)
        self._memory.give_back(rings, slot)
        owner.closing -= 1

    async def _set_wake(self, owner: Owner, request: messages.SetWake) -> Answer:
        if not -1 <= request.poller < L.HOME_MAX_POLLERS:
            raise OSError(errno.EINVAL, f"a consumer has {L.HOME_MAX_POLLERS} pollers, no {request.poller}")
        shared = owner.home.offset + L.HOME_POLLERS + request.poller * L.WAKE_BYTES
        own = [(pcb, *self._own(owner, pcb, generation)) for pcb, generation in request.sockets]
        epoch = 0
        for pcb, rings, slot in own:
            epoch = self._table.set_wake(pcb, rings.wake(slot) if request.poller < 0 else shared)
        await self._obeyed(lambda: self._table.passed(epoch))
        return messages.Done(), ()

    async def _event(self, owner: Owner) -> Answer:
        if len(owner.bells) >= MAX_EVENTS:
            raise OSError(errno.EMFILE, f"a consumer has at most {MAX_EVENTS} bells")
        number, descriptor, known = self._memory.event(owner)
        await self._obeyed(known)
        return messages.Evented(number), [descriptor]

    # -- TCP -------------------------------------------------------------------------------------------------

    async def _listen(self, owner: Owner, request: messages.Bind) -> Answer:
        binding = Listening(request, self._netifs, self._config)
        spec, shape = binding.spec, binding.shape
        if spec.port == 0:
            spec.port = self._table.ephemeral_port(spec)
        self._access.demand(owner.uid, owner.gid, "tcp", binding.address, spec.port or 0)
        self._restrain_tcp(owner, shape)
        self._restrain(owner, self._config.sockets.ring_bytes, spec.ring_bytes)
        self._table.check(spec)
        workers = len(self._crew.workers)
        most = max(binding.connections, workers)
        if self._table.room <= workers:
            raise OSError(errno.ENOBUFS, "a listener needs room for one connection on each RX worker (sockets.max)")
        # The backlog alone shall bound what waits to be accepted; other sockets need room, too.
        count = max(min(2 * spec.backlog, most, self._table.room // 2), workers)
        slots = self._memory.connections(owner, shape, count)
        try:
            await self._obeyed(*{segment.mapped for segment, _ in slots})
            answer, descriptors = await self._open(owner, spec, binding.address, lane_bytes=shape.lane_bytes,
                                                   send_bytes=shape.send_bytes, receive_bytes=shape.receive_bytes)
        except (OSError, DataplaneError):
            self._give_back(slots)
            raise
        assert isinstance(answer, messages.Bound)
        listener = self._listeners[answer.pcb] = Listener(owner, answer.pcb, shape, spec.backlog, most)
        self._supply(listener, slots)
        return answer, descriptors

    async def _connect(self, owner: Owner, request: messages.Bind) -> Answer:
        binding = Connecting(request, self._netifs, self._config)
        spec, shape = binding.spec, binding.shape
        assert spec.remote is not None
        self._access.demand(owner.uid, owner.gid, "connect", binding.remote, spec.remote[2])
        if spec.port:       # a port of one's own choice is like a listener's
            self._access.demand(owner.uid, owner.gid, "tcp", binding.address, spec.port)
        else:
            spec.port = self._table.connecting_port(spec)
        self._restrain_tcp(owner, shape)
        spec.owner, spec.uid, spec.pid = owner.consumer, owner.uid, owner.pid
        self._table.check(spec)
        [(segment, slot)] = slots = self._memory.connections(owner, shape, 1)
        try:
            await self._obeyed(segment.mapped)
            spec.segment, spec.slot, spec.place = segment.number, slot, segment.place(slot)
            spec.lanes = segment.lanes(slot)
            pcb = self._table.open(spec)
        except (OSError, DataplaneError):
            self._give_back(slots)
            raise
        owner.connections[pcb] = segment, slot
        self._holders[pcb] = owner, None
        told, descriptors = (None, []) if segment.given else describe(segment)
        segment.given = True
        return messages.Bound(
            pcb=pcb, generation=self._table.generation(pcb), number=segment.number, slot=slot,
            ring_bytes=shape.lane_bytes, address=binding.address, port=spec.port, segment=told,
            lane_bytes=shape.lane_bytes, send_bytes=shape.send_bytes, receive_bytes=shape.receive_bytes,
            mtu=binding.mtu), descriptors

    def _segment_of(self, owner: Owner, number: int) -> Answer:
        segment = owner.segment(number)
        if segment is None:
            raise OSError(errno.EBADF, f"no segment {number} of this consumer")
        segment.given = True
        told, descriptors = describe(segment)
        return messages.Given(told), descriptors

    def _restrain_tcp(self, owner: Owner, shape: Shape) -> None:
        self._restrain(owner, self._config.tcp.send_bytes, shape.send_bytes)
        self._restrain(owner, self._config.tcp.receive_bytes, shape.receive_bytes)

    def _give_back(self, slots: Sequence[tuple[Connections, int]]) -> None:
        for segment, slot in slots:
            self._memory.give_back(segment, slot)

    def _supply(self, listener: Listener, slots: Sequence[tuple[Connections, int]]) -> None:
        """Give slots, which all workers have mapped, to the RX workers, each time to that with the fewest free."""
        table, owner = self._table, listener.owner
        free = Counter(dict.fromkeys(range(len(self._crew.workers)), 0))
        free.update(table.word(number, L.PCB_WORKER) for number in listener.numbers if table.is_spare(number))
        for index, (segment, slot) in enumerate(slots):
            if not table.room:
                self._give_back(slots[index:])
                return
            worker = min(free, key=lambda one: free[one])
            free[worker] += 1
            shape = segment.shape
            spec = SocketSpec(
                "connection", 0, owner=owner.consumer, uid=owner.uid, pid=owner.pid, segment=segment.number, slot=slot,
                ring_bytes=shape.lane_bytes, lanes=segment.lanes(slot), place=segment.place(slot),
                buffers=(shape.send_bytes, shape.receive_bytes))
            number = table.add_slot(listener.pcb, spec, worker)
            owner.connections[number] = segment, slot
            self._holders[number] = owner, listener
            listener.numbers.add(number)
            if not table.offer(number):     # nobody knows of it
                self._free(number)

    def _heard(self, worker: Worker, report: orders.Want | orders.Freed) -> None:
        match report:
            case orders.Want():
                for pcb in self._table.wanting():
                    if pcb in self._listeners:
                        self._loop.spawn(self._grow(self._listeners[pcb]))
            case orders.Freed(pcbs=numbers):
                for number in numbers:
                    if number in self._holders:
                        self._free(number)

    async def _grow(self, listener: Listener) -> None:
        """Twice as many slots for a listener, or its backlog's more, up to what it may have. If there are none it
        goes on with what it has, and asks again later."""
        have = len(listener.numbers)
        count = min(max(have, listener.backlog), listener.most - have, self._table.room)
        if listener.growing:
            return
        try:
            slots = self._memory.connections(listener.owner, listener.shape, count) if count > 0 else []
        except (OSError, DataplaneError):
            slots = []
        if not slots:
            self._loop.later(RETRY, lambda: self._sated(listener))
            return
        listener.growing = True
        mapped = [segment.mapped for segment, _ in slots]
        await self._loop.until(lambda: all(ticket() for ticket in mapped))
        listener.growing = False
        if listener.closed:
            self._give_back(slots)
        else:
            self._supply(listener, slots)
            self._sated(listener)

    def _sated(self, listener: Listener) -> None:
        if not listener.closed:
            self._table.sated(listener.pcb)

    async def _unlisten(self, listener: Listener) -> None:
        """Get a closed listener's slots back from the workers, in the order of pcb/slots.py."""
        until, table = self._loop.until, self._table
        order = orders.Unlisten(listener.pcb)
        await until(self._crew.order(order, worker=self._crew.continuation))
        while not table.forgotten(listener.pcb):    # again: a worker's replacement does not inherit this
            tickets = [self._crew.order(order, worker=worker) for worker in self._crew.workers]
            await until(lambda: all(ticket() for ticket in tickets))    # noqa: B023  # awaited here
            await until(lambda: table.forgotten(listener.pcb), 0.05)
        for number in sorted(listener.numbers):
            if table.is_spare(number):
                self._free(number)
            else:
                table.orphan(number)
        await until(self._crew.order(order, worker=self._crew.continuation))
        await until(lambda: not listener.growing)

    def _free(self, number: int) -> None:
        """A connection or slot that no worker knows of any more."""
        owner, listener = self._holders.pop(number)
        segment, slot = owner.connections.pop(number)
        if listener is not None:
            listener.numbers.discard(number)
        self.closed.update(self._table.counters(number))
        self._table.take_back(number)
        self._memory.give_back(segment, slot)

    # -- observers -------------------------------------------------------------------------------------------

    def _stats(self) -> Answer:
        told = self._tell()
        reply = messages.Ledger(told)
        if len(messages.encode(reply)) > messages.MAX_MESSAGE:      # very many cores
            reply = messages.Ledger(ledger.merged(told))
        return reply, ()

    def _sockets(self, start: int) -> Answer:
        *page, rest = [*itertools.islice(self._table.records(start), PAGE + 1), -1]
        if len(page) > PAGE:
            rest = page.pop()
        return messages.SocketList([describe_socket(self._table, number) for number in page], rest), ()
