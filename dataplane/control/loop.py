"""The supervisor's event loop: descriptors, timers, and requests that wait for something.

One thread and nothing that blocks. A request that has to wait (for workers to map memory, for an epoch to
pass) is a coroutine that awaits `loop.until(condition)`; all others go on meanwhile. Conditions are plain
functions that are looked at again whenever something has happened, and else often enough: what they ask for
are words in shared memory, which wake nobody.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any

_EAGER = 0.001      # seconds for which a new condition is polled without a pause: a burst takes microseconds
_LAZY = 0.05        # longest pause between two looks at a condition

Task = Coroutine[Any, Any, None]
Callback = Callable[[], object]


class _Wait:
    """A condition that a coroutine waits for, and what it is resumed with: whether it came true in time."""

    def __init__(self, condition: Callable[[], bool], within: float | None) -> None:
        self.condition = condition
        self.since = time.monotonic()
        self.deadline = None if within is None else self.since + within

    def __await__(self) -> Generator[_Wait, bool, bool]:
        return (yield self)

    def outcome(self, now: float) -> bool | None:
        if self.condition():
            return True
        return False if self.deadline is not None and now >= self.deadline else None


class Loop:
    """Runs until `stop`. An exception in a callback or a task ends `run` with it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callback, float]] = []
        self._order = itertools.count()
        self._waiting: list[tuple[Task, _Wait]] = []
        self._stopping = False

    # -- descriptors -----------------------------------------------------------------------------------------

    def watch(self, fd: int, readable: Callback | None = None, writable: Callback | None = None) -> None:
        """Call `readable` and `writable` when `fd` is; replaces what was watched, nothing given ends it."""
        events = (selectors.EVENT_READ if readable else 0) | (selectors.EVENT_WRITE if writable else 0)
        if fd in self._selector.get_map():
            self._selector.unregister(fd)
        if events:
            self._selector.register(fd, events, (readable, writable))

    def forget(self) -> None:
        """In a forked child: let go of the selector without touching what the parent watches with it."""
        self._selector.close()

    # -- time ------------------------------------------------------------------------------------------------

    def later(self, seconds: float, callback: Callback, every: float = 0.0) -> None:
        """Call `callback` in so many seconds, and then `every` so many again (0: once)."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), callback, every))

    # -- tasks -----------------------------------------------------------------------------------------------

    def spawn(self, task: Task) -> None:
        """Run a coroutine up to the first thing that it waits for, and the rest in the loop."""
        self._resume(task, None)

    async def until(self, condition: Callable[[], bool], within: float | None = None) -> bool:
        """Wait for `condition`; False if it did not come true `within` so many seconds."""
        return condition() or await _Wait(condition, within)

    def _resume(self, task: Task, value: bool | None) -> None:
        with contextlib.suppress(StopIteration):
            self._waiting.append((task, task.send(value)))

    def _look(self) -> None:
        now = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for task, wait in waiting:
            outcome = wait.outcome(now)
            if outcome is None:
                self._waiting.append((task, wait))
            else:
                self._resume(task, outcome)

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop` is called."""
        self._stopping = False
        while not self._stopping:
            for key, events in self._selector.select(self._pause()):
                readable, writable = key.data
                if events & selectors.EVENT_READ and readable is not None:
                    readable()
                if events & selectors.EVENT_WRITE and writable is not None:
                    writable()
            self._ring_timers()
            self._look()

    def stop(self) -> None:
        """Let `run` return after this turn."""
        self._stopping = True

    def _pause(self) -> float | None:
        now = time.monotonic()
        pauses = [max(0.0, self._timers[0][0] - now)] if self._timers else []
        if self._waiting:
            waited = now - max(wait.since for _, wait in self._waiting)
            pauses.append(0.0 if waited < _EAGER else min(waited, _LAZY))
        return min(pauses, default=None)

    def _ring_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, callback, every = heapq.heappop(self._timers)
            if every:
                self.later(every, callback, every)
            callback()
