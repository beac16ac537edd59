"""Many sockets, one wake object. Made by `Dataplane.poller`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np

from dataplane.client import consume, drain
from dataplane.client.session import Session
from dataplane.client.sockets import Socket
from dataplane.client.waiting import Waiter, deadline_of
from dataplane.control import messages
from dataplane.errors import DataplaneError, Stopped
from dataplane.shm import layout as L

__all__ = ["Poller"]

_AT_ONCE = 1024  # sockets in one request: well below messages.MAX_MESSAGE
NOBODY = -1     # in a SetWake request: the socket's own wake object


class Poller:
    """Waits for, and consumes from, a fixed set of sockets. A socket is in one poller at a time; while
    it is, blocking calls on it take turns with the poller's. A socket that is closed leaves by itself."""

    def __init__(self, session: Session, sockets: Iterable[Socket[Any]]) -> None:
        self.session = session
        self.sockets: tuple[Socket[Any], ...] = tuple(sockets)
        """The sockets as they were given: `info.socket` is an index here."""
        self._check_sockets()
        with session.lock:
            if not session.poller_slots:
                raise DataplaneError(f"one attachment has at most {L.HOME_MAX_POLLERS} pollers")
            self._slot = session.poller_slots.pop()
            wake = session.home + L.HOME_POLLERS + self._slot * L.WAKE_BYTES
            self.waiter = Waiter(session, wake)
        self.closed = False
        """Whether `close` was called, here or for the whole attachment."""
        self._live: list[tuple[int, Socket[Any]]] = []
        try:
            for number, sock in enumerate(self.sockets):
                sock.join(self, self.waiter)
                self._live.append((number, sock))
            self._point_at(self._slot)
        except BaseException:
            self._dissolve()
            raise
        self._arrange()
        session.members.add(self)

    def _check_sockets(self) -> None:
        if not self.sockets:
            raise ValueError("a poller needs at least one socket")
        if len(set(self.sockets)) != len(self.sockets):
            raise ValueError("a socket stands twice in the poller's list")
        for sock in self.sockets:
            if sock.session is not self.session:
                raise ValueError("a poller's sockets must all be of the attachment that makes it")
            sock.check()

    def _arrange(self) -> None:
        """What the kernels get: all rows, the number of each one's socket, and room for results."""
        self._lanes = self.session.attached.workers
        live = self._live
        empty = np.empty(0, np.int64)
        self.rows = np.concatenate([sock.rows for _, sock in live]) if live else empty
        self.numbers = np.repeat(np.array([number for number, _ in live], np.int64), self._lanes)
        self._ready = np.empty(len(live), np.int64)

    # -- use -------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> list[Socket[Any]]:
        """The sockets that have packets, at least one: waits for it. TimeoutError, Stopped."""
        timeout = self.waiter.acquire(timeout)
        try:
            deadline = deadline_of(timeout)
            while not (ready := self._look()):
                if not self.waiter.wait(self, deadline):
                    raise TimeoutError("timed out")
            return ready
        finally:
            self.waiter.release()

    def _look(self) -> list[Socket[Any]]:
        self.check()
        count = drain.pending(self.session.memory.mem, self.rows, self._lanes, self._ready)
        return [self._live[i][1] for i in self._ready[:count].tolist()]

    def consume(self, kernel: Any, state: Any, max_packets: int | None = None,
                timeout: float | None = None) -> int:
        """As `Socket.consume`, over all sockets: `info.socket` says which."""
        timeout = self.waiter.acquire(timeout)
        try:
            self.prepare()
            return consume.run(self, kernel, state, max_packets, timeout)
        finally:
            self.waiter.release()

    def prepare(self) -> None:
        """For `consume`, with the turn: nothing of any socket is handed out."""
        self.check()
        for sock in list(self.waiter.holders):
            sock.prepare()

    def check(self) -> None:
        """DataplaneError when the poller was closed, or when all of its sockets were."""
        self.session.check()
        if self.closed:
            raise DataplaneError("this poller is closed")
        if not self._live:
            raise DataplaneError("all sockets of this poller are closed")

    # -- the end -----------------------------------------------------------------------------------------

    def drop(self, sock: Socket[Any]) -> None:
        """`sock` is being closed by somebody who has our turn."""
        self._live = [(number, one) for number, one in self._live if one is not sock]
        self._arrange()

    def close(self) -> None:
        """The sockets wait for themselves again. May be called again."""
        if self.closed:
            return
        with self.waiter.interrupting():
            self.closed = True
        self.session.members.discard(self)
        self._dissolve()

    def abandon(self) -> None:
        """The session is over."""
        self.closed = True
        self.waiter.reset_after_fork()

    def _dissolve(self) -> None:
        session = self.session
        self._live = [(number, sock) for number, sock in self._live if not sock.closed]
        with contextlib.suppress(Stopped):
            if session.over is None:
                self._point_at(NOBODY)
        for _, sock in self._live:
            sock.leave()
        with session.lock:
            session.poller_slots.append(self._slot)
            self.waiter.discard()

    def _point_at(self, slot: int) -> None:
        """Tells the workers whom to wake. In the time until they know both wake objects may be used."""
        sockets = [(sock.bound.pcb, sock.bound.generation) for _, sock in self._live]
        requests = [messages.SetWake(sockets[i:i + _AT_ONCE], slot) for i in range(0, len(sockets), _AT_ONCE)]
        self.session.connection.pipeline(requests, messages.Done)

    def __enter__(self) -> Poller:
        self.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._live)

    def __repr__(self) -> str:
        return f"<Poller of {len(self._live)} sockets{' closed' if self.closed else ''}>"
