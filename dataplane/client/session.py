"""One attachment: the control connection, the memory, and whether both still mean something.

Made by `attach`; sockets, pollers and event sources hold it. It ends in one of three ways: `close`, the
end of the dataplane (what is queued can still be taken), or a fork, which leaves the child with
an attachment that is its parent's: there, every use is an error that says so.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol, TypeVar

from dataplane.client.memory import Memory
from dataplane.control import messages
from dataplane.control.wire import Connection, close_all, take
from dataplane.errors import DataplaneError, Stopped
from dataplane.shm import layout as L

if TYPE_CHECKING:
    from dataplane.client.events import EventSource

__all__ = ["Member", "Session"]

CHECK_NS = 50_000_000
"""How often at most the control connection is asked whether it still stands: a syscall."""

T = TypeVar("T", bound=messages.Message)


class Member(Protocol):
    """What ends with the session."""

    def abandon(self) -> None:
        """The session is over: drop what is queued privately. No lock may be taken."""


class Session:
    """State shared by everything that one `attach` made."""

    def __init__(self, connection: Connection, spin_ns: int) -> None:
        self.connection = connection
        self.spin_ns = spin_ns
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.memory = Memory()
        self.members: set[Member] = set()
        self.sources: list[EventSource] = []
        self.over: str | None = None
        self._descriptors: list[int] = []
        self._hung_up = False
        self._checked = 0
        self.attached = self._attach()
        _sessions.add(self)

    def _attach(self) -> messages.Attached:
        request = messages.Attach(version=messages.PROTOCOL_VERSION, fingerprint=L.fingerprint())
        attached, descriptors = self.connection.request(request, messages.Attached)
        try:
            self.doorbell = take(descriptors)
            self.keep(self.doorbell)
            self.home = self.memory.map(attached.home, descriptors)
        except BaseException:
            close_all(descriptors)
            self._drop()
            raise
        self._stopped = self.memory.words(self.home + L.HOME_STOPPED)
        self.poller_slots = list(range(L.HOME_MAX_POLLERS - 1, -1, -1))
        return attached

    # -- is it over? -----------------------------------------------------------------------------------

    def check(self) -> None:
        """DataplaneError when this attachment was closed, or is another process's."""
        if self.over is not None:
            raise DataplaneError(self.over)

    def ended(self) -> bool:
        """Whether the dataplane has ended. Nothing is published in our rings after it has."""
        if self._hung_up or self._stopped[0]:
            return True
        now = time.monotonic_ns()
        if now - self._checked > CHECK_NS:
            self._checked = now
            self._hung_up = self.connection.ended()
        return self._hung_up

    def stopped(self) -> Stopped:
        """What is raised when it has."""
        return Stopped(f"dataplane {self.attached.name!r} has ended")

    # -- requests --------------------------------------------------------------------------------------

    def request(self, message: messages.Message, expect: type[T]) -> T:
        """The reply to a request that brings no descriptors."""
        reply, descriptors = self.request_with(message, expect)
        close_all(descriptors)
        return reply

    def request_with(self, message: messages.Message, expect: type[T]) -> tuple[T, list[int]]:
        """The reply, and its descriptors."""
        self.check()
        return self.connection.request(message, expect)

    def bind(self, request: messages.Bind) -> messages.Bound:
        """Opens a socket; its segment is mapped."""
        # One at a time: the next reply may be about a slot in the segment that came with this one.
        with self.lock:
            self._bury_orphans()
            bound, descriptors = self.request_with(request, messages.Bound)
            try:
                self._map(bound, descriptors)
            except OSError:     # no descriptor is free: nobody can use that socket
                self.request(messages.Close(bound.pcb, bound.generation), messages.Done)
                raise
            self._bury_orphans()        # the reply of an interrupted request came right before this one
            return bound

    def _map(self, bound: messages.Bound, descriptors: list[int]) -> None:
        try:
            told = bound.segment
            if told is None and not self.memory.knows(bound.number):    # it came when no descriptor was free
                given, descriptors = self.request_with(messages.SegmentOf(bound.number), messages.Given)
                told = given.segment
            if told is not None:
                self.memory.map(told, descriptors)
        finally:
            close_all(descriptors)

    def _bury_orphans(self) -> None:
        """Sockets whose `bind` was interrupted: their segments are needed, they themselves are not."""
        while self.connection.orphans:
            reply, descriptors = self.connection.orphans.pop(0)
            if not isinstance(reply, messages.Bound):
                close_all(descriptors)
                continue
            self._map(reply, descriptors)
            self.request(messages.Close(reply.pcb, reply.generation), messages.Done)

    def keep(self, descriptor: int) -> None:
        """Closes `descriptor` when the session is over."""
        self._descriptors.append(descriptor)

    # -- the end -----------------------------------------------------------------------------------------

    def close(self, why: str = "this attachment was closed") -> None:
        """Ends the attachment; all its sockets with it. Threads that wait in it get DataplaneError."""
        if self.over is not None:
            return
        self.over = why
        self.connection.close()
        self._drop()

    def forget(self) -> None:
        """In a forked child. The parent's locks may be held for ever here: no lock is taken."""
        if self.over is None:
            self.over = f"attached in process {self.pid}; attach again in this one ({os.getpid()})"
            self.lock = threading.RLock()
            self.connection.forget()
            self._drop()

    def _drop(self) -> None:
        for member in list(self.members):
            member.abandon()
        self.members.clear()
        while self._descriptors:
            with contextlib.suppress(OSError):
                os.close(self._descriptors.pop())


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork() -> None:
    for session in list(_sessions):
        session.forget()


os.register_at_fork(after_in_child=_after_fork)
