"""What consumers and observers ask for over the control socket, and what becomes of what they own.

Called by `control/server.py` for each request, in the supervisor. Requests that have to wait (for workers
to map memory, for an epoch to pass) are coroutines; none waits longer than GUARD. Everything that a consumer
owns is found from its `Owner`, and is taken apart when its connection ends, in an order in which no worker
can still reach what goes: out of the table, past the epoch, out of the workers' address space, out of
existence.
"""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dataplane import ledger
from dataplane.config import Config
from dataplane.control import messages
from dataplane.control.access import Access
from dataplane.control.loop import Loop
from dataplane.control.server import Answer, Peer
from dataplane.errors import DataplaneError
from dataplane.pcb.table import Table
from dataplane.shm import layout as L
from dataplane.shm.bell import another_rope
from workers import orders
from workers.binding import Binding, describe
from workers.crew import Crew, Ticket
from workers.owners import Memory, Owner, Rings

GUARD = 1.0             # seconds after which a worker that does not obey fails a request
MAX_EVENTS = 256        # bells of one consumer
PAGE = 256              # sockets in one reply of `ss`


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
        self.owners: dict[Peer, Owner] = {}
        self.retiring: list[Owner] = []             # gone, and not yet taken apart
        self.closed: Counter[str] = Counter()       # counters of sockets that are no more

    async def serve(self, peer: Peer, request: messages.Request) -> Answer:
        match request:
            case messages.Attach():
                return await self._attach(peer, request)
            case messages.Bind():
                return await self._bind(self._owner(peer), request)
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
        if not await self._loop.until(lambda: all(ticket() for ticket in tickets), GUARD):
            raise DataplaneError(f"an RX worker has not answered within {GUARD:.0f} s")

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
        owner.rope = another_rope(worker.rope)
        try:
            await self._obeyed(home.mapped,
                               self._crew.order(orders.Adopt(consumer, home.offset), worker=worker))
        except DataplaneError:
            self.gone(peer)
            raise
        sockets = self._config.sockets
        described, descriptors = describe(home)
        return messages.Attached(
            name=self._config.name, pid=self._pid, consumer=consumer, workers=len(self._crew.workers),
            home=described, tx_ring_bytes=sockets.tx_ring_bytes, ring_bytes=sockets.ring_bytes,
            netifs=self._netifs), [owner.rope, *descriptors]

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
        await until(released)
        await until(lambda: owner.closing == 0)
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
        spec.owner, spec.uid, spec.pid = owner.consumer, owner.uid, owner.pid
        if spec.kind == "udp" and spec.port == 0:
            spec.port = self._table.ephemeral_port(spec)
        number = spec.proto if spec.kind == "raw" else spec.port or 0
        self._access.demand(owner.uid, owner.gid, spec.kind, binding.address, number)
        self._restrain(owner, spec.ring_bytes)
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
            ring_bytes=spec.ring_bytes, address=binding.address, port=spec.port, segment=segment), descriptors

    def _restrain(self, owner: Owner, ring_bytes: int) -> None:
        """Another user's rings are our memory: no larger than what the configuration gives to all."""
        most = max(self._config.sockets.ring_bytes, 1 << 20)
        if owner.sealed and owner.uid != 0 and ring_bytes > most:
            raise PermissionError(errno.EACCES, f"uid {owner.uid} may have rings of up to {most} bytes")

    def _own(self, owner: Owner, pcb: int, generation: int) -> tuple[Rings, int]:
        if pcb not in owner.sockets or self._table.generation(pcb) != generation:
            raise OSError(errno.EBADF, "no such socket of this consumer")
        return owner.sockets[pcb]

    def _close(self, owner: Owner, request: messages.Close) -> Answer:
        self._own(owner, request.pcb, request.generation)
        self._shut(owner, request.pcb)
        return messages.Done(), ()

    def _shut(self, owner: Owner, pcb: int) -> None:
        """Close a socket; its number and slot follow when no worker can be using them."""
        rings, slot = owner.sockets.pop(pcb)
        epoch = self._table.close(pcb)
        owner.closing += 1
        self._loop.spawn(self._reclaim(owner, pcb, rings, slot, epoch))

    async def _reclaim(self, owner: Owner, pcb: int, rings: Rings, slot: int, epoch: int) -> None:
        await self._loop.until(lambda: self._table.passed(epoch))
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

    # -- observers -------------------------------------------------------------------------------------------

    def _stats(self) -> Answer:
        told = self._tell()
        reply = messages.Ledger(told)
        if len(messages.encode(reply)) > messages.MAX_MESSAGE:      # very many cores
            reply = messages.Ledger(ledger.merged(told))
        return reply, ()

    def _sockets(self, start: int) -> Answer:
        numbers = sorted(number for number in self._table.open_pcbs() if number >= start)
        page, rest = numbers[:PAGE], numbers[PAGE:]
        return messages.SocketList([self._socket(number) for number in page], rest[0] if rest else -1), ()

    def _socket(self, number: int) -> messages.SocketInfo:
        spec, counters = self._table.spec(number), self._table.counters(number)
        local, remote = Binding.names(spec)
        return messages.SocketInfo(
            pcb=number, kind=spec.kind, proto=spec.proto, local=local, remote=remote,
            state="connected" if remote else "open", reuseport=spec.reuseport, pid=spec.pid, uid=spec.uid,
            consumer=spec.owner, ring_bytes=spec.ring_bytes, **counters)
