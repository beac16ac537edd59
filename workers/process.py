"""What the worker processes share: the life of a forked process and its end of the order channel.

Used by `rx` and `continuation`. A worker's own process does what its orders say between two steps, in order, and
reports how many it has obeyed. It never waits for the supervisor: reports that the channel has no room for wait here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import psutil

from dataplane.jit import kernel
from dataplane.pcb.table import Table
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import exchange, store_release
from workers import orders

__all__ = ["WorkerProcess", "live", "post_mail", "take_mail"]

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


@kernel("i64(mem, i64)")
def post_mail(mem, w):
    """Supervisor: an order has been sent to the worker at `w`. A worker that sleeps sees it come; one that
    is busy looks at this word only."""
    # SYNC mailbox: behind the send; pairs with the exchange in take_mail; else the worker could clear the
    # word for an order that it does not see yet.
    store_release(mem, w + L.W_MAILBOX, 1)
    return 0


@kernel("i64(mem, i64)")
def take_mail(mem, w):
    """Worker: clears the word before it reads the channel until that is empty."""
    # SYNC mailbox: full barrier before the reads of the channel, pairs with the release in post_mail.
    return exchange(mem, w + L.W_MAILBOX, 0)


class WorkerProcess:
    """A worker in its own process: signals, orders, reports, bells. The worker's block is `_w`."""

    _w: int

    def __init__(self, arena: Arena, table: Table, channel: socket.socket, supervisor: int, obeyed: int) -> None:
        self._arena, self._table, self._mem = arena, table, arena.mem
        self._channel, self._supervisor, self._obeyed = channel, supervisor, obeyed
        self._events: dict[int, int] = {}
        self._reports: deque[bytes] = deque()
        self._stopping = self._orphaned = False

    def _settle_in(self, name: str, cores: list[int]) -> None:
        """The process's own affairs: signals, the supervisor's death, cores (none: any), the garbage collector."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)   # Ctrl-C goes to all; stopping us is the supervisor's
        signal.signal(signal.SIGTERM, self._terminated)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
        if os.getppid() != self._supervisor:
            self._orphaned = True
        if cores:
            with contextlib.suppress(OSError, ValueError):      # offline: the supervisor sees it, and says so
                psutil.Process().cpu_affinity(cores)
        gc.disable()
        gc.freeze()

    def _terminated(self, number: int, frame: Any) -> None:
        self._orphaned = os.getppid() != self._supervisor
        self._stopping = True

    # -- reports ---------------------------------------------------------------------------------------------

    def _report(self, report: orders.Report) -> None:
        self._reports.append(orders.encode(report))
        self._send()

    def _send(self) -> None:
        """As many reports as the supervisor has room for: stopped, it holds up nothing here."""
        while self._reports:
            try:
                self._channel.send(self._reports[0])
            except BlockingIOError:
                return
            except OSError:
                self._orphaned = True
                return
            self._reports.popleft()

    # -- orders ----------------------------------------------------------------------------------------------

    def _read_orders(self) -> None:
        take_mail(self._mem, self._w)
        before = self._obeyed
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._channel, orders.MAX_ORDER, 1)
            except BlockingIOError:
                break
            except OSError:
                data, descriptors = b"", []
            if not data:
                self._orphaned = True
                return
            self._obey(orders.decode_order(data), descriptors[0] if descriptors else -1)
            self._obeyed += 1
        if self._obeyed != before:
            self._report(orders.Obeyed(self._obeyed))

    def _obey(self, order: orders.Order, descriptor: int) -> None:
        """The orders to all workers. What is none of ours is somebody else's, and obeyed by doing nothing."""
        match order:
            case orders.Map():
                self._arena.map_fd(descriptor, order.bytes, at=order.offset)
                os.close(descriptor)
            case orders.Unmap():
                self._arena.unmap(order.offset, order.bytes)
            case orders.Listen():
                self._listen(order.number, descriptor, order.consumer)
            case orders.Forget():
                self._listen(order.number, -1, 0)
            case orders.Stop():
                self._stopping = True

    def _listen(self, number: int, descriptor: int, consumer: int) -> None:
        """Let the kernels find the bell `number`; -1: no longer."""
        entry = self._table.get(self._w + L.W_EVENTS) + 16 * number
        self._table.put(entry, descriptor)
        self._table.put(entry + 8, consumer)
        if (former := self._events.pop(number, -1)) >= 0:
            os.close(former)
        if descriptor >= 0:
            self._events[number] = descriptor


def live(run: Callable[[], None], channel: socket.socket) -> None:
    """The worker's whole life, in the forked process: `run`, and the end of the process."""
    status = 1
    try:
        run()
        status = 0
    except BaseException as error:
        traceback.print_exc()
        try:
            channel.send(orders.encode(orders.Failed(f"{type(error).__name__}: {error}")))
        except OSError:
            print("the supervisor is gone", file=sys.stderr)
    finally:
        os._exit(status)
