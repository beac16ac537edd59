"""Who reads a set of lanes now, and how it waits for more.

A wake object belongs to one waiter at a time. So does the right to read the lanes that point to it:
the *turn*, a lock. A receiver keeps its turn while it waits; what must not wait for it (closing
the socket, releasing a batch) interrupts it: it is woken, steps aside, and goes on waiting.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dataplane.client import drain
from dataplane.client.session import Session

__all__ = ["NEVER", "Reader", "Waiter", "deadline_of"]

NEVER = 1 << 62
"""A deadline that does not come."""

SLICE_NS = 250_000_000
"""Longest sleep before the waiter looks whether the dataplane still lives."""

_STEP_ASIDE = 0.0001    # seconds between looks at whether the interrupting thread has its turn


def deadline_of(timeout: float | None) -> int:
    """CLOCK_MONOTONIC in ns when `timeout` seconds have passed."""
    if timeout is None:
        return NEVER
    if not timeout >= 0:
        raise ValueError(f"timeout must not be negative: {timeout}")
    return min(NEVER, time.monotonic_ns() + int(timeout * 1e9)) if timeout < 1e9 else NEVER


class Reader(Protocol):
    """Who waits: a socket or a poller."""

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """The rows of its lanes, now."""

    def check(self) -> None:
        """Raises when it was closed."""


class Waiter:
    """One wake object, with its turn."""

    def __init__(self, session: Session, wake: int) -> None:
        self.session, self.wake = session, wake
        self.holders: set[Any] = set()
        """Sockets that have found or handed out packets that are not released yet."""
        self._mem = session.memory.mem
        self._place = session.memory.block(drain.WAITER_BYTES)
        words = session.memory.words(self._place, drain.WAITER_BYTES // 8)
        words[drain.WAIT_WAKE // 8] = wake
        words[drain.WAIT_SPIN // 8] = session.spin_ns
        self.reset()

    def reset(self) -> None:
        """Makes the locks again: after a fork their holders may not exist."""
        self._turn = threading.Lock()
        self._guard = threading.Lock()
        self._wanted = 0

    def reset_after_fork(self) -> None:
        """`reset` in a forked child; in the process that attached, threads still have their turns."""
        if self.session.pid != os.getpid():
            self.reset()

    def idle(self) -> bool:
        """Whether nobody has the turn now."""
        return not self._turn.locked()

    def discard(self) -> None:
        """Its private memory may be used again; nobody waits here any more."""
        self.session.memory.give_back(self._place, drain.WAITER_BYTES)

    # -- the turn --------------------------------------------------------------------------------------

    def acquire(self, timeout: float | None) -> float | None:
        """Takes the turn; TimeoutError when others keep it for so long. What is left of `timeout`."""
        turn = self._turn
        if turn.acquire(False):
            return timeout
        deadline = deadline_of(timeout)
        if not turn.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX)):
            raise TimeoutError("timed out: another thread receives here")
        return None if timeout is None else max(0.0, (deadline - time.monotonic_ns()) / 1e9)

    def release(self) -> None:
        """Ends the turn."""
        self._turn.release()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """A turn in between: who waits steps aside."""
        turn = self._turn
        if not turn.acquire(False):
            with self._guard:
                self._wanted += 1
            drain.wake_up(self._mem, self.wake)
            turn.acquire()
            with self._guard:
                self._wanted -= 1
        try:
            yield
        finally:
            turn.release()

    def interlude(self, reader: Reader) -> None:
        """Between two steps of whoever has the turn: lets interruptions in, and raises when the
        session or `reader` is over."""
        if self._wanted:
            turn = self._turn
            turn.release()
            while self._wanted:
                time.sleep(_STEP_ASIDE)
            turn.acquire()
        self.session.check()
        reader.check()

    def rest(self, duration_ns: int) -> None:
        """Lets packets gather for so long."""
        drain.rest(self._mem, self._place, duration_ns)

    # -- waiting ---------------------------------------------------------------------------------------

    def wait(self, reader: Reader, deadline: int) -> bool:
        """Waits until `reader` has packets (True) or until the deadline (False). Stopped when there
        never will be any."""
        session = self.session
        while True:
            self.interlude(reader)
            if session.ended():
                if drain.look(self._mem, reader.rows):
                    return True
                raise session.stopped()
            now = time.monotonic_ns()
            if now >= deadline:
                return False
            # The GIL is released in there; a signal ends it, and its handler runs before the next line.
            if drain.await_packets(self._mem, reader.rows, self._place, min(deadline, now + SLICE_NS)):
                return True
