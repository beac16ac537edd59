"""What the TCP connections of one attachment share: the exchange block, the transmit lane, the segments.

Made by `Dataplane` with its first TCP call. One exchange block, not one for each connection: it is 16 KB, and since
the transmit lane has one producer, one connection's protocol runs at a time in any case. The lock of that lane
is the lock of it all; it is held for one run of the protocol, never while anybody waits.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING

from dataplane.client import tcp_run
from dataplane.client.session import Session
from dataplane.client.transmit import Transmitter
from dataplane.control import messages
from dataplane.control.wire import close_all
from dataplane.jit import warm
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T

if TYPE_CHECKING:
    from dataplane.client.tcp import Connection

__all__ = ["Slot", "Workbench"]

STAMP = 1 << 40
"""What a consumer writes into locks: this and its number."""

_RETRIES, _PAUSE = 100, 0.0005      # with a transmit lane that stays full

_warming = threading.Lock()


class Slot:
    """Sizes of a connection's slot, the same for all that one listener accepts."""

    __slots__ = ("lane_bytes", "receive_bytes", "send_bytes", "size", "workers")

    def __init__(self, workers: int, lane_bytes: int, send_bytes: int, receive_bytes: int) -> None:
        self.workers, self.lane_bytes = workers, lane_bytes
        self.send_bytes, self.receive_bytes = send_bytes, receive_bytes
        self.size = T.CONN_LANES + workers * (L.LANE_DATA + lane_bytes) + send_bytes + receive_bytes


class Workbench:
    """`lock` must be held around `call`, which is that of `tcp_run`."""

    def __init__(self, session: Session, transmitter: Transmitter) -> None:
        with _warming:
            warm((tcp_run,))
        # Without the detour over jit.Kernel: these are called for every few bytes.
        self.call, self.wait = tcp_run.call.compile(), tcp_run.wait.compile()
        self.session, self.transmitter = session, transmitter
        self.lock = transmitter.lock
        memory = session.memory
        with session.lock:
            self.place = memory.block(tcp_run.BENCH_BYTES)
        words = memory.words(self.place, tcp_run.BENCH_BYTES // 8)
        words[tcp_run.B_TX // 8] = transmitter.place
        words[tcp_run.B_STOPPED // 8] = session.home + L.HOME_STOPPED
        exchange = tcp_run.B_X // 8
        words[exchange + T.X_STAMP // 8] = STAMP + session.attached.consumer
        words[exchange + T.X_TIME_WAIT // 8] = session.attached.time_wait_ns
        self.random = words[exchange + T.X_RANDOM // 8:][:1]
        """What the next connection's initial sequence number is made of."""
        self.buffer = words[tcp_run.B_BUFFER // 8:][:2]
        """Where the next call's data may go: place, as kernels see it, and bytes."""
        self.base = memory.mem.ctypes.data
        self.secret = os.urandom(32)
        self.connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.dropped: list[int] = []
        """Handles of connections that nobody has closed, and that are not there any more."""
        _benches.add(self)

    def place_of(self, number: int, offset: int, size: int) -> int:
        """Where a slot is. Its segment is asked for if it is a new one."""
        memory = self.session.memory
        with self.session.lock:
            if not memory.knows(number):
                given, descriptors = self.session.request_with(messages.SegmentOf(number), messages.Given)
                try:
                    memory.map(given.segment, descriptors)
                finally:
                    close_all(descriptors)
            return memory.place(number, offset, size)

    def handle(self, conn: int, pcb: int, family: int, slot: Slot) -> int:
        """A new handle for the connection with the slot at `conn`; `pcb` is number | generation << 32."""
        memory = self.session.memory
        with self.session.lock:
            place = memory.block(tcp_run.HANDLE_BYTES)
        words = memory.bytes[place:place + tcp_run.HANDLE_BYTES].cast("q")
        words[tcp_run.H_CONN // 8] = conn
        words[tcp_run.H_PCB // 8] = pcb
        words[tcp_run.H_FAMILY // 8] = family
        words[tcp_run.H_LANE_BYTES // 8] = slot.lane_bytes
        words[tcp_run.H_WORKERS // 8] = slot.workers
        words[tcp_run.H_SEND_BYTES // 8] = slot.send_bytes
        words[tcp_run.H_RECEIVE_BYTES // 8] = slot.receive_bytes
        words[tcp_run.H_READ // 8] = words[tcp_run.H_WRITTEN // 8] = 1
        return place

    def push(self, handle: int, must: int) -> bool:
        """Runs a connection again whose output did not fit. False: the transmit lane stays full. Waits a little."""
        for _ in range(_RETRIES):
            if self.session.over is not None or self.session.ended():
                break
            time.sleep(_PAUSE)
            with self.lock:
                if not self.call(self.session.memory.mem, self.place, handle, tcp_run.POKE, must) & tcp_run.FULL:
                    return True
        return False

    def drop(self, handle: int, closed: bool) -> None:
        """From a finalizer, so anywhere: a connection object is gone."""
        if closed or self.session.over is not None:
            self.session.memory.give_back(handle, tcp_run.HANDLE_BYTES)
        else:
            self.dropped.append(handle)
            self.sweep()

    def sweep(self) -> None:
        """Closes connections that were dropped, unless somebody is at work here: then next time."""
        if not self.lock.acquire(False):
            return
        try:
            while self.dropped:
                handle = self.dropped.pop()
                self.call(self.session.memory.mem, self.place, handle, tcp_run.REQUEST, T.REQ_CLOSED)
                self.session.memory.give_back(handle, tcp_run.HANDLE_BYTES)
        finally:
            self.lock.release()

    def close(self) -> None:
        """Closes all connections, so that what was written still goes, and waits until the worker knows."""
        for connection in list(self.connections):
            connection.detach()
        self.sweep()
        self.transmitter.flush()


_benches: weakref.WeakSet[Workbench] = weakref.WeakSet()


def _at_exit() -> None:
    """A process that ends has closed its connections, as one with sockets of the kernel has."""
    for bench in list(_benches):
        if bench.session.over is None and bench.session.pid == os.getpid() and not bench.session.ended():
            bench.close()


atexit.register(_at_exit)
