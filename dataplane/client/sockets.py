"""Sockets: what a consumer receives from. Made by `Dataplane.udp`, `raw` and `tap`; sending is in `udp`.

A call that finds packets in the ring makes one jitted call for many of them; the per-packet calls are then
served from what it found, and the ring gets its memory back when that is used up. Threads may share a
socket: receiving calls take turns.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from itertools import chain
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np

from dataplane.client import consume, drain
from dataplane.client.addresses import Address
from dataplane.client.batch import Batch
from dataplane.client.events import Batches
from dataplane.client.session import Session
from dataplane.client.waiting import Waiter, deadline_of
from dataplane.control import messages
from dataplane.errors import DataplaneError, Stopped
from dataplane.shm import layout as L

__all__ = ["MAX_ADDRESSES", "RawSocket", "Socket", "TapSocket"]

PREFETCH = 256
"""Packets that one jitted call finds for the per-packet calls."""

_GAP = 256
"""More than what stands between the payloads of neighbours: padding, a record's and a packet's headers."""

_FEW = 8    # packets, below which it does not pay to look whether all are of one size

MAX_ADDRESSES = 65536
"""Address tuples that a socket remembers."""

From = TypeVar("From", Address, None)


@functools.lru_cache(1024)
def _cutter(size: int, gap: int) -> struct.Struct:
    """Takes payloads of one size out of a piece of a ring."""
    return struct.Struct(f"{size}s{gap}x")


class Socket(Generic[From]):
    """What all kinds have: receiving."""

    kind = ""

    def __init__(self, session: Session, bound: messages.Bound, remote: Address | None) -> None:
        self.session, self.bound = session, bound
        self.remote = remote
        """The peer of a connected socket, (host, port), or None."""
        self.closed = False
        """Whether `close` was called, here or for the whole attachment."""
        lane_bytes = L.LANE_DATA + bound.ring_bytes
        self._lanes = session.attached.workers
        size = L.SLOT_LANES + self._lanes * lane_bytes
        self._slot = (session.memory.place(bound.number, bound.slot, size), size)
        self._mem = session.memory.mem
        self._bytes = session.memory.bytes[self._slot[0]:self._slot[0] + size]
        self._block = session.memory.block(self._lanes * drain.ROW_BYTES)
        self.rows = self._block + drain.ROW_BYTES * np.arange(self._lanes, dtype=np.int64)
        self.numbers = np.zeros(self._lanes, np.int64)
        for i, row in enumerate(self.rows.tolist()):
            lane = self._slot[0] + L.SLOT_LANES + i * lane_bytes
            drain.open_row(self._mem, row, lane, bound.ring_bytes - 1)
        self._own = self.waiter = Waiter(session, self._slot[0] + L.SLOT_WAKE)
        self.poller: Any = None
        self._records = np.empty((drain.REC_FIELDS, PREFETCH), np.int64)
        self._limit = max(bound.ring_bytes // 4, 1)
        self._turn = self._count = 0
        self._find(iter(()))
        self._last: tuple[bytes, Any] | None = None
        self._addresses: dict[Any, Any] = {}
        self._batch: Batch | None = None
        session.members.add(self)

    @property
    def address(self) -> tuple[str, int | None]:
        """(host, port) here: host "" for every address, port None for any port that nobody else has."""
        return self.bound.address or "", self.bound.port

    # -- one packet at a time --------------------------------------------------------------------------

    def recvfrom(self, timeout: float | None = None) -> tuple[bytes, From]:
        """The next packet's payload and where it came from. `timeout` in seconds (None: for ever, 0: do not
        wait). TimeoutError, Stopped, OSError(EBADF)."""
        try:
            return self._found_next()       # one call of C code, so that it needs no turn
        except StopIteration:
            return self._receive(timeout)

    def recv(self, timeout: float | None = None) -> bytes:
        """The next packet's payload; as `recvfrom`."""
        try:
            return self._found_next()[0]
        except StopIteration:
            return self._receive(timeout)[0]

    def _receive(self, timeout: float | None) -> tuple[bytes, Any]:
        """With the turn. The last of what was found gives the ring its memory back."""
        waiter, timeout = self._enter(timeout)
        try:
            while True:
                with contextlib.suppress(StopIteration):
                    return self._found_next()
                if self._last is not None:
                    packet = self._last
                    self._settle(self._count)
                    return packet
                self._fill(timeout)
        finally:
            waiter.release()

    def _addresses_of(self, count: int) -> list[Any]:
        """Of the first records; made once for each peer."""
        keys = self._records[drain.REC_REMOTE, :count].tolist()
        addresses = list(map(self._addresses.get, keys))
        if all(addresses):
            return addresses
        return [self._address(i, key) for i, key in enumerate(keys)]

    def _address(self, i: int, key: int) -> Any:
        if key < 0:
            return self._address6(i, ~key)
        return self._addresses.get(key) or self._new_address(key)

    def _payloads_of(self, count: int) -> list[bytes]:
        """Of the first records. What lies in one piece of the ring is copied at once, and then cut."""
        starts, lengths = self._records[drain.REC_OFFSET, :count], self._records[drain.REC_LENGTH, :count]
        steps = starts[1:] - starts[:-1]
        cuts: Any = np.flatnonzero((steps < 0) | (steps > lengths[:-1] + _GAP)) + 1      # the ring's end, another lane
        payloads: list[bytes] = []
        first = 0
        for end in [*cuts.tolist(), count]:
            payloads += self._piece(starts[first:end], lengths[first:end], steps[first:end - 1])
            first = end
        return payloads

    def _piece(self, starts: Any, lengths: Any, steps: Any) -> list[bytes]:
        """Payloads of packets that lie one behind the other."""
        base, end = int(starts[0]), int(starts[-1] + lengths[-1])
        if len(steps) > _FEW and (steps == steps[0]).all() and (lengths == lengths[0]).all():
            size = int(lengths[0])
            rows: Any = _cutter(size, int(steps[0]) - size).iter_unpack(self._bytes[base:int(starts[-1])])
            return [*chain.from_iterable(rows), self._bytes[end - size:end].tobytes()]
        piece = self._bytes[base:end].tobytes()
        begins = starts - base
        return [piece[i:j] for i, j in zip(begins.tolist(), (begins + lengths).tolist(), strict=True)]

    def _address6(self, i: int, port: int) -> Any:
        start = int(self._records[drain.REC_PACKET, i])
        raw = self._bytes[start + 8:start + 24].tobytes()
        address = self._addresses.get((raw, port))
        return address or self._remember((raw, port), (socket.inet_ntop(socket.AF_INET6, raw), port))

    def _new_address(self, key: int) -> Any:
        return self._remember(key, (socket.inet_ntoa((key >> 16).to_bytes(4, "big")), key & 0xFFFF))

    def _remember(self, key: Any, address: Address) -> Address:
        if len(self._addresses) >= MAX_ADDRESSES:
            self._addresses.clear()
        self._addresses[key] = address
        return address

    def _fill(self, timeout: float | None) -> None:
        """Finds packets for the per-packet calls: at least one."""
        self.check()
        self._check_batch()
        deadline = None
        origin = self._slot[0]
        while not (count := drain.peek(self._mem, self.rows, self._records, origin, self._limit, self._turn)):
            deadline = deadline_of(timeout) if deadline is None else deadline
            self._wait(deadline)
        self._turn = (self._turn + 1) % self._lanes
        payloads, addresses = self._payloads_of(count), self._addresses_of(count)
        self._last = payloads.pop(), addresses.pop()
        self._find(zip(payloads, addresses, strict=True))
        self._count = count
        self.waiter.holders.add(self)

    def _find(self, packets: Iterator[tuple[bytes, Any]]) -> None:
        """All but the last of `_count` packets are to be handed out from here."""
        self._found, self._found_next = packets, packets.__next__

    def _requeue(self) -> None:
        """Gives back what was handed out; what was only found is queued as before. Other threads may be taking
        from what was found."""
        if self._count:
            self._settle(self._count - 1 - len(list(self._found)))

    def _settle(self, used: int) -> None:
        drain.settle(self._mem, self.rows, self._records, used)
        self._count, self._last = 0, None
        self.waiter.holders.discard(self)

    # -- many at a time ----------------------------------------------------------------------------------

    def recv_batch(self, max_packets: int = 256, timeout: float | None = None) -> Batch:
        """All packets there are, at least 1 and at most `max_packets`, without a copy. The batch must be
        released before this socket is received from again."""
        waiter, timeout = self._enter(timeout)
        try:
            deadline = None
            while (batch := self._take(max_packets)) is None:
                deadline = deadline_of(timeout) if deadline is None else deadline
                self._wait(deadline)
            return batch
        finally:
            waiter.release()

    def poll_batch(self, max_packets: int = 256) -> Batch | None:
        """As `recv_batch`, or None when there is nothing now. Stopped when there never will be."""
        waiter, _ = self._enter(None)
        try:
            ended = self.session.ended()
            batch = self._take(max_packets)
            if batch is None and ended:
                raise self.session.stopped()
            return batch
        finally:
            waiter.release()

    def batches(self, max_packets: int = 256, timeout: float | None = None) -> Iterator[Batch]:
        """Batches until the dataplane ends; each is released when the next is asked for. TimeoutError when
        there is no packet for `timeout` seconds."""
        while True:
            try:
                batch = self.recv_batch(max_packets, timeout)
            except Stopped:
                return
            with batch:
                yield batch

    def __aiter__(self) -> AsyncIterator[Batch]:
        """Batches as in `batches`, for `async for`: the event loop watches a descriptor."""
        return Batches(self)

    def _take(self, max_packets: int) -> Batch | None:
        if max_packets < 1:
            raise ValueError(f"max_packets must be at least 1, not {max_packets}")
        self.check()
        self._check_batch()
        self._requeue()
        records = np.empty((drain.REC_FIELDS, max_packets), np.int64)
        count = drain.take(self._mem, self.rows, records, self._slot[0], self._turn)
        if not count:
            return None
        self._turn = (self._turn + 1) % self._lanes
        self._batch = Batch(self, self._mem, self._slot, records[:, :count])
        self.waiter.holders.add(self)
        return self._batch

    def give_back(self, batch: Batch) -> None:
        """`batch.release()`."""
        if self.closed:
            batch.invalidate()
            return
        with self.waiter.interrupting():
            if not batch.released:
                batch.invalidate()
                self._batch = None
                self.waiter.holders.discard(self)
                drain.release_rows(self._mem, self.rows)

    def _check_batch(self) -> None:
        if self._batch is not None:
            raise DataplaneError("the batch that was received before from this socket is not released yet")

    def consume(self, kernel: Any, state: Any, max_packets: int | None = None,
                timeout: float | None = None) -> int:
        """Calls the @njit function `kernel(payload, info, state)` for each packet, with `payload` uint8[:]
        in the ring and `info` a `PacketInfo`, without any Python between. Returns how many packets it
        took: `max_packets`, or as many as came in `timeout` seconds, or until the dataplane ended."""
        waiter, timeout = self._enter(timeout)
        try:
            self.prepare()
            return consume.run(self, kernel, state, max_packets, timeout)
        finally:
            waiter.release()

    def prepare(self) -> None:
        """For `consume`, with the turn: nothing is handed out. DataplaneError if a batch is."""
        self.check()
        self._check_batch()
        self._requeue()

    # -- waiting -----------------------------------------------------------------------------------------

    def _enter(self, timeout: float | None) -> tuple[Waiter, float | None]:
        """Takes the turn; the waiter, and what is left of `timeout`. The waiter is another one after the
        socket has joined or left a poller."""
        while True:
            waiter = self.waiter
            timeout = waiter.acquire(timeout)
            if waiter is self.waiter:
                return waiter, timeout
            waiter.release()

    def _wait(self, deadline: int) -> None:
        if not self.waiter.wait(self, deadline):
            raise TimeoutError("timed out")

    def check(self) -> None:
        """OSError(EBADF) when this socket was closed."""
        self.session.check()
        if self.closed:
            raise OSError(errno.EBADF, "this socket is closed")

    def has_packets(self) -> bool:
        """Whether there are packets now."""
        return bool(drain.look(self._mem, self.rows))

    # -- pollers -----------------------------------------------------------------------------------------

    def join(self, poller: Any, waiter: Waiter) -> None:
        """The poller's wake object instead of our own."""
        with self.waiter.interrupting():
            self.check()
            if self.poller is not None:
                raise DataplaneError("this socket is in another poller")
            self._requeue()
            self._move(waiter)
            self.poller = poller

    def leave(self) -> None:
        """Our own wake object again."""
        with self.waiter.interrupting():
            self._move(self._own)
            self.poller = None

    def _move(self, waiter: Waiter) -> None:
        if self in self.waiter.holders:
            self.waiter.holders.discard(self)
            waiter.holders.add(self)
        self.waiter = waiter

    # -- the end -----------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """`published` and `dropped` (ring full) by the workers, `consumed`, `queued` packets, `queued_bytes`,
        `ring_bytes` of each of the lanes: as `dataplane ss` shows them."""
        self.check()
        reply = self.session.request(messages.Sockets(start=self.bound.pcb), messages.SocketList)
        found = next((one for one in reply.sockets if one.pcb == self.bound.pcb), None)
        if found is None:
            raise OSError(errno.EBADF, "the dataplane does not know this socket any more")
        names = ("published", "dropped", "consumed", "queued", "queued_bytes", "ring_bytes")
        return {name: getattr(found, name) for name in names}

    def close(self) -> None:
        """Closes the socket. Threads that wait in it get OSError(EBADF). May be called again."""
        if self.closed:
            return
        poller = self.poller
        with self.waiter.interrupting():
            if self.closed:
                return
            self._requeue()     # what was handed out counts as consumed, what was only found as unread
            drain.release_rows(self._mem, self.rows)
            self.abandon()
            if poller is not None:
                poller.drop(self)
        session = self.session
        session.members.discard(self)
        try:
            session.request(messages.Close(self.bound.pcb, self.bound.generation), messages.Done)
        except (Stopped, DataplaneError):
            if session.over is None and not session.ended():
                raise
        with session.lock:
            session.memory.give_back(self._block, self._lanes * drain.ROW_BYTES)
            self._own.discard()

    def abandon(self) -> None:
        """Closed, without telling anybody."""
        self.closed = True
        self._find(iter(()))
        self._count, self._last = 0, None
        self.waiter.holders.discard(self)
        if self._batch is not None:
            self._batch.invalidate()
            self._batch = None
        self.waiter.reset_after_fork()
        self._own.reset_after_fork()

    def __enter__(self) -> Self:
        self.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        host, port = self.address
        state = " closed" if self.closed else ""
        return f"<{type(self).__name__} {host or '*'}:{'*' if port is None else port}{state}>"


class RawSocket(Socket[Address]):
    """Raw IP: the payload is the IP packet; the port of the peer's address is 0."""

    kind = "raw"


class TapSocket(Socket[None]):
    """A copy of every frame. `recvfrom` gives (frame, None)."""

    kind = "tap"

    def _addresses_of(self, count: int) -> list[None]:
        return [None] * count
