"""Waiting in an asyncio event loop: one bell for all sockets of a loop, and no thread.

Who waits is armed with WAKE_PIPE and the number of the loop's bell; the worker that has something for it
disarms it and rings. The loop's reader then looks which of those that were armed are not any more: a
jitted scan over a table of wake objects' places, some nanoseconds each, so that ten thousand idle connections
cost a ring next to nothing. Entering the table and leaving it do not depend on how many there are.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dataplane.client import drain
from dataplane.control import messages
from dataplane.control.wire import close_all, take
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


_ENTRIES = 1 << 20      # of one loop; memory that is never touched costs nothing


class EventSource:
    """One event loop's bell, and who waits for it. Used in the loop's thread only."""

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        evented, descriptors = session.request_with(messages.Event(), messages.Evented)
        self.session, self.number = session, evented.number
        self.descriptor = take(descriptors)
        close_all(descriptors)
        session.keep(self.descriptor)
        self._table = session.memory.table(8 * _ENTRIES)
        self._words = session.memory.bytes[self._table:self._table + 8 * _ENTRIES].cast("q")
        self._waiting: dict[Socket[Any], asyncio.Future[None]] = {}
        self.watch(loop)
        session.members.add(self)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serves this loop from now on; the former one is closed."""
        self.loop = loop
        self._waiting.clear()
        self._callbacks: list[Callable[[], None] | None] = []
        self._free: list[int] = []
        self._fired_numbers = np.empty(64, np.int64)
        self._tick: asyncio.TimerHandle | None = None
        loop.add_reader(self.descriptor, self._fired)

    def abandon(self) -> None:
        """The session is over; the descriptor is about to be closed. Not after a fork: the loop's epoll
        set is the parent's, too."""
        if self.session.pid == os.getpid() and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._look)
            self.loop.remove_reader(self.descriptor)

    # -- the table ---------------------------------------------------------------------------------------

    def enter(self, callback: Callable[[], None]) -> int:
        """A number in the table for somebody who will wait, maybe many times. `callback` is called when a
        notifier has disarmed the wake object, and when the dataplane may have ended."""
        if self._free:
            number = self._free.pop()
            self._callbacks[number] = callback
        else:
            number = len(self._callbacks)
            if number >= _ENTRIES:
                raise DataplaneError(f"one event loop waits for at most {_ENTRIES} sockets")
            self._callbacks.append(callback)
            self._words[number] = 0
            if number >= self._fired_numbers.size:
                self._fired_numbers = np.empty(2 * number, np.int64)
        if self._tick is None:
            self._tick = self.loop.call_later(TICK, self._look)
        return number

    def place(self, number: int) -> int:
        """Where its entry is: the place of a wake object that is armed, or 0."""
        return self._table + 8 * number

    def leave(self, number: int) -> None:
        """It does not wait any more."""
        self._words[number] = 0
        self._callbacks[number] = None
        self._free.append(number)

    def _fired(self) -> None:
        quiet(self.descriptor)
        numbers = self._fired_numbers
        count = drain.collect(self.session.memory.mem, self._table, len(self._callbacks), numbers)
        for number in numbers[:count].tolist():
            # One that was called before may have left, or have made another leave.
            if (callback := self._callbacks[number]) is not None:
                callback()

    def _look(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
        busy = len(self._free) < len(self._callbacks)
        self._tick = self.loop.call_later(TICK, self._look) if busy else None
        if self.session.over is not None or self.session.ended():
            for callback in list(self._callbacks):
                if callback is not None:
                    callback()
        for sock, future in self._waiting.items():
            if sock.closed and not future.done():
                future.set_result(None)

    # -- sockets -----------------------------------------------------------------------------------------

    async def wait(self, sock: Socket[Any]) -> None:
        """Returns when there may be packets, or when the dataplane may have ended."""
        wake = sock.waiter.wake
        mem = self.session.memory.mem
        self.session.memory.words(wake + L.WAKE_EVENT)[0] = self.number
        if drain.arm_event(mem, sock.rows, wake):
            return
        future = self.loop.create_future()
        number = self.enter(lambda: None if future.done() else future.set_result(None))
        self._words[number] = wake
        self._waiting[sock] = future
        try:
            await future
        finally:
            self.leave(number)
            self._waiting.pop(sock, None)
            drain.disarm(mem, wake)


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
