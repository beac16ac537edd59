"""Waiting in an asyncio event loop: one bell for all sockets of a loop, and no thread.

A socket that waits is armed with WAKE_PIPE and the number of the loop's bell; the worker that has
packets for it disarms it and rings it; the loop's reader then asks each waiting socket
whether it is still armed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from dataplane.client import drain
from dataplane.control import messages
from dataplane.control.wire import close_all
from dataplane.errors import DataplaneError, Stopped
from dataplane.shm import layout as L
from dataplane.shm.bell import quiet

if TYPE_CHECKING:
    from dataplane.client.batch import Batch
    from dataplane.client.session import Session
    from dataplane.client.sockets import Socket

__all__ = ["Batches", "EventSource"]

TICK = 0.25
"""Seconds between looks at whether the dataplane still lives, while something waits."""


class EventSource:
    """One event loop's bell."""

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        evented, descriptors = session.request_with(messages.Event(), messages.Evented)
        self._session, self._number = session, evented.number
        self.descriptor = descriptors.pop(0)
        close_all(descriptors)
        session.keep(self.descriptor)
        self._waiting: dict[Socket[Any], asyncio.Future[None]] = {}
        self._tick: asyncio.TimerHandle | None = None
        self.watch(loop)
        session.members.add(self)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serves this loop from now on; the former one is closed."""
        self.loop = loop
        self._waiting.clear()
        self._tick = None
        loop.add_reader(self.descriptor, self._fired)

    def abandon(self) -> None:
        """The session is over; the descriptor is about to be closed. Not after a fork: the loop's epoll
        set is the parent's, too."""
        if self._session.pid == os.getpid() and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._look)
            self.loop.remove_reader(self.descriptor)

    async def wait(self, sock: Socket[Any]) -> None:
        """Returns when there may be packets, or when the dataplane may have ended."""
        wake = sock.waiter.wake
        mem = self._session.memory.mem
        self._session.memory.words(wake + L.WAKE_EVENT)[0] = self._number
        if drain.arm_event(mem, sock.rows, wake):
            return
        future = self._waiting[sock] = self.loop.create_future()
        if self._tick is None:
            self._tick = self.loop.call_later(TICK, self._look)
        try:
            await future
        finally:
            del self._waiting[sock]
            drain.disarm(mem, wake)

    def _fired(self) -> None:
        quiet(self.descriptor)
        mem = self._session.memory.mem
        for sock, future in self._waiting.items():
            if not future.done() and not drain.armed(mem, sock.waiter.wake):
                future.set_result(None)

    def _look(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
        self._tick = self.loop.call_later(TICK, self._look) if self._waiting else None
        over = self._session.over is not None or self._session.ended()
        for sock, future in self._waiting.items():
            if not future.done() and (over or sock.closed):
                future.set_result(None)


def event_source(session: Session) -> EventSource:
    """That of the running loop. One whose loop was closed is used again."""
    loop = asyncio.get_running_loop()
    with session.lock:
        for source in session.sources:
            if source.loop is loop:
                return source
        for source in session.sources:
            if source.loop.is_closed():
                source.watch(loop)
                return source
        source = EventSource(session, loop)
        session.sources.append(source)
        return source


class Batches(AsyncIterator["Batch"]):
    """`async for batch in sock`: each batch is released when the next is asked for."""

    def __init__(self, sock: Socket[Any], max_packets: int = 256) -> None:
        self._socket, self._max_packets = sock, max_packets
        self._batch: Batch | None = None

    async def __anext__(self) -> Batch:
        if self._batch is not None:
            self._batch.release()
            self._batch = None
            await asyncio.sleep(0)      # others have their turn, however fast packets come
        while True:
            try:
                self._batch = self._socket.poll_batch(self._max_packets)
            except Stopped:
                raise StopAsyncIteration from None
            if self._batch is not None:
                return self._batch
            await self._wait()

    async def _wait(self) -> None:
        sock = self._socket
        if sock.poller is not None:
            raise DataplaneError("this socket is in a poller, which waits for it")
        await event_source(sock.session).wait(sock)

    def __del__(self) -> None:
        # After a `break`; without a wait, since this may run anywhere.
        batch = self._batch
        if batch is not None and not batch.released and self._socket.waiter.idle():
            batch.release()
