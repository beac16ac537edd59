"""The workers as the supervisor sees them: started, told, heard, and replaced when they die.

`workers` are the RX workers; `continuation` is the one worker beside them, which the same rules hold for.

A worker is forked, so that it inherits everything the supervisor has mapped, compiled and opened. Orders to
it are queued without limit and without blocking; a `Ticket` tells when they have been carried out. A worker
that dies is replaced at once; the replacement inherits the result of all orders given so far, so that tickets
for it are settled by that. Workers that keep dying end the dataplane.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

from dataplane.control.loop import Loop
from dataplane.errors import DataplaneError
from dataplane.shm.bell import new_bell, ring
from workers import orders

STORM_DEATHS = 5        # more than so many deaths
STORM_SECONDS = 10.0    # in so long a time end the dataplane
RETRY = 0.1             # seconds until a replacement that could not be forked is tried again

Ticket = Callable[[], bool]


class Worker:
    """One worker's process and the conversation with it. `core`: -1 for the continuation worker, which has none."""

    def __init__(self, index: int, core: int) -> None:
        self.index, self.core = index, core
        self.name = f"RX worker {index} (core {core})" if core >= 0 else "the continuation worker"
        self.doorbell, self.rope = new_bell()   # rung: something to transmit, or to look at
        self.pid = 0                        # 0: no process
        self.channel: socket.socket | None = None
        self.ready = self.ended = False
        self.restarts = 0
        self.astray = False                 # its core is offline, and it is not pinned
        self.ordered = self.obeyed = 0
        self.problem: str | None = None
        self.outbox: deque[tuple[bytes, int]] = deque()     # orders that the channel had no room for

    def ring(self) -> None:
        """Let the worker look at what it transmits and at its netifs, should it sleep."""
        ring(self.rope)


class Crew:
    """All workers. `work(worker, channel)` is what a worker's process does; `died(worker)` is called for a
    dead one before it is replaced; `mail(worker)` tells a busy worker that an order waits."""

    def __init__(self, loop: Loop, cores: Sequence[int], work: Callable[[Worker, socket.socket], None],
                 died: Callable[[Worker, str], None], mail: Callable[[Worker], None]) -> None:
        self._loop, self._work, self._died, self._mail = loop, work, died, mail
        self._deaths: deque[float] = deque(maxlen=STORM_DEATHS + 1)
        self._stopping = False
        self.heard: Callable[[Worker, orders.Want | orders.Freed], None] = lambda worker, report: None
        """Called for what workers report of connections' slots."""
        self.workers = [Worker(index, core) for index, core in enumerate(cores)]
        self.continuation = Worker(len(self.workers), -1)

    @property
    def everyone(self) -> list[Worker]:
        """The RX workers and the continuation worker."""
        return [*self.workers, self.continuation]

    @property
    def ready(self) -> bool:
        """Whether no worker is just starting."""
        return all(worker.ready for worker in self.everyone)

    def start(self) -> None:
        """Fork all workers. `ready` and `ended` tell how far they are."""
        for worker in self.everyone:
            self._fork(worker)

    def close_descriptors(self, mine: Worker) -> None:
        """In a worker: close the supervisor's ends of the others' channels, so that its death ends them."""
        for worker in self.everyone:
            if worker.channel is not None and worker is not mine:
                worker.channel.close()

    def kill(self) -> None:
        """Kill whoever is left, and wait until nobody is."""
        self._stopping = True
        for worker in self.everyone:
            if worker.pid:
                os.kill(worker.pid, signal.SIGKILL)
                os.waitpid(worker.pid, 0)
                worker.pid = 0
            self._hang_up(worker)

    def close(self) -> None:
        """Kill whoever is left, and close the doorbells."""
        self.kill()
        for worker in self.everyone:
            os.close(worker.doorbell)
            os.close(worker.rope)

    # -- orders ----------------------------------------------------------------------------------------------

    def order(self, order: orders.Order, descriptor: int = -1, worker: Worker | None = None) -> Ticket:
        """Tell all workers, or one. The descriptor must stay open until the ticket says True."""
        data = orders.encode(order)
        told = self.everyone if worker is None else [worker]
        awaited = []
        for one in told:
            one.ordered += 1
            if one.pid:
                one.outbox.append((data, descriptor))
                self._flush(one)
            else:               # it inherits the result when it is forked
                one.obeyed = one.ordered
            awaited.append((one, one.ordered))
        return lambda: all(one.obeyed >= number for one, number in awaited)

    def _flush(self, worker: Worker) -> None:
        channel = worker.channel
        if channel is None:
            return
        while worker.outbox:
            data, descriptor = worker.outbox[0]
            try:
                socket.send_fds(channel, [data], [descriptor] if descriptor >= 0 else [], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError:     # it is dying: its replacement needs no orders
                worker.outbox.clear()
                return
            worker.outbox.popleft()
        self._mail(worker)
        self._watch(worker)

    # -- reports ---------------------------------------------------------------------------------------------

    def _watch(self, worker: Worker) -> None:
        assert worker.channel is not None
        writable = (lambda: self._flush(worker)) if worker.outbox else None
        self._loop.watch(worker.channel.fileno(), lambda: self._hear(worker), writable)

    def _hear(self, worker: Worker) -> None:
        if not self._read(worker):
            self._hang_up(worker)
            self.reap()

    def _read(self, worker: Worker) -> bool:
        """Take all reports; False at the channel's end."""
        while worker.channel is not None:
            try:
                data = worker.channel.recv(orders.MAX_ORDER)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            match orders.decode_report(data):
                case orders.Ready():
                    worker.ready = True
                case orders.Obeyed(orders=count):
                    worker.obeyed = count
                case orders.Ended():
                    worker.ended = True
                case orders.Want() | orders.Freed() as report:
                    self.heard(worker, report)
                case orders.Failed(problem=problem):
                    worker.problem = problem
        return False

    def _hang_up(self, worker: Worker) -> None:
        if worker.channel is not None:
            self._loop.watch(worker.channel.fileno())
            worker.channel.close()
            worker.channel = None

    # -- life and death --------------------------------------------------------------------------------------

    def _fork(self, worker: Worker) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            try:
                ours.close()
                self._work(worker, theirs)
            finally:            # never back into the supervisor's stack
                os._exit(1)
        theirs.close()
        worker.pid, worker.channel = pid, ours
        worker.ready = worker.ended = False
        worker.problem = None
        worker.outbox.clear()
        worker.obeyed = worker.ordered
        self._watch(worker)

    def reap(self) -> None:
        """Look for workers that have died, and replace them. Called on SIGCHLD and on a channel's end."""
        for worker in self.everyone:
            if not worker.pid:
                continue
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid == 0:
                continue
            self._read(worker)      # its last words
            self._hang_up(worker)
            worker.pid = 0
            worker.obeyed = worker.ordered
            if not self._stopping:
                self._replace(worker, _how(status))

    def _replace(self, worker: Worker, how: str) -> None:
        reason = worker.problem or how
        self._died(worker, reason)
        self._deaths.append(time.monotonic())
        if not worker.ready and not worker.restarts:
            raise DataplaneError(f"{worker.name} could not start: {reason}")
        if len(self._deaths) > STORM_DEATHS and self._deaths[-1] - self._deaths[0] < STORM_SECONDS:
            who = "RX workers" if worker.core >= 0 else "workers"
            raise DataplaneError(
                f"{who} keep dying: {len(self._deaths)} deaths in {STORM_SECONDS:.0f} s, the last "
                f"one of {worker.name}: {reason}")
        worker.restarts += 1
        self._revive(worker)

    def _revive(self, worker: Worker) -> None:
        """Fork a replacement. A machine that has no process, descriptor or memory for it has some later."""
        if self._stopping:
            return
        try:
            self._fork(worker)
        except OSError:
            self._loop.later(RETRY, lambda: self._revive(worker))

    def stop(self) -> Ticket:
        """Tell all to leave; the ticket says when all have."""
        self._stopping = True
        self.order(orders.Stop())
        return lambda: all(not worker.pid for worker in self.everyone)


def _how(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
