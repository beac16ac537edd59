"""The way out: datagrams into the consumer's transmit lane, and a ring at the worker's door.

One per attachment, shared by its sockets and threads. This process is the lane's producer; the
worker that transmits for it is its consumer. The producer's state (`layout.LS_*`) is private
memory here. The worker fills in source address and port from the PCB, whatever we write.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from dataplane.client.session import Session
from dataplane.client.waiting import NEVER
from dataplane.jit import inlined, kernel
from dataplane.rings.lane import lane_publish, lane_stage
from dataplane.shm import layout as L
from dataplane.shm.atomics import exchange, fence, ld64, load_relaxed
from dataplane.shm.libc import write

__all__ = ["TX_BODY", "Transmitter", "tx_door"]

# Private memory: the lane's state, then
_SLEEPING = L.LS_BYTES          # where HOME_SLEEPING is
_DOORBELL = L.LS_BYTES + 8      # descriptor
_ONE = L.LS_BYTES + 16          # what is written to it
TX_BODY = 2 * L.LS_BYTES        # the record's body
_BYTES = TX_BODY + L.TX_PAYLOAD + 65536

_PAUSE = 0.00005                # seconds of the first sleep when the lane is full; the longest:
_LONGEST_PAUSE = 0.001
_PATIENCE = 1.0                 # with a worker that does not transmit


@inlined
def tx_door(mem, tx):
    """Behind a publish: rings at the worker's door if it sleeps."""
    # SYNC doorbell: full barrier between the head and this look, pairs with the worker's between
    # its HOME_SLEEPING = 1 and its look at the transmit lanes; else it could sleep on this record.
    fence()
    sleeping = ld64(mem, tx + _SLEEPING)
    if load_relaxed(mem, sleeping) and exchange(mem, sleeping, 0):
        write(mem, ld64(mem, tx + _DOORBELL), tx + _ONE, 8)


@kernel("i64(mem, i64, i64)")
def transmit(mem, tx, length):
    """Publishes the `length` bytes of the body: 1, or 0 when there is no room now."""
    # SYNC tx-tail: acquire in here pairs with the worker's release of the tail; else a record that it
    # still reads could be overwritten.
    if lane_stage(mem, tx, 0, 0, tx + TX_BODY, length) != 1:
        return 0
    # SYNC tx-head: release in here pairs with the worker's acquire of the head; else it could read a
    # record that is half written.
    lane_publish(mem, tx)
    tx_door(mem, tx)
    return 1


class Transmitter:
    """The transmit lane of one attachment."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._mem = session.memory.mem
        lane = session.home + L.HOME_TX
        with session.lock:
            self.place = session.memory.block(_BYTES)
        self._words = words = session.memory.words(self.place, TX_BODY // 8)
        head = int(session.memory.words(lane + L.LANE_HEAD)[0])
        words[[L.LS_HEAD // 8, L.LS_PUBLISHED // 8]] = head
        self._tail = session.memory.words(lane + L.LANE_TAIL)
        words[L.LS_TAIL // 8] = self._tail[0]
        words[L.LS_BASE // 8] = lane
        words[L.LS_MASK // 8] = session.attached.tx_ring_bytes - 1
        words[_SLEEPING // 8] = session.home + L.HOME_SLEEPING
        words[_DOORBELL // 8] = session.doorbell
        words[_ONE // 8] = 1
        self._body = session.memory.bytes[self.place + TX_BODY:self.place + _BYTES]
        self.lock = threading.Lock()
        """Of the lane: whoever has it is its producer."""
        session.members.add(self)

    def send(self, header: bytes, data: Any, size: int, deadline: int) -> None:
        """Publishes one datagram: the TX_PAYLOAD bytes of `header`, then `data`, `size` bytes. TimeoutError
        when the lane stays full, Stopped when nobody empties it."""
        end = L.TX_PAYLOAD + size
        with self.lock:
            self._session.check()
            if self._session.ended():
                raise self._session.stopped()
            self._body[:L.TX_PAYLOAD] = header
            self._body[L.TX_PAYLOAD:end] = data
            if not transmit(self._mem, self.place, end):
                self._wait_and_send(end, deadline)

    def _wait_and_send(self, end: int, deadline: int) -> None:
        session = self._session
        awake = time.monotonic_ns() + session.spin_ns
        pause = _PAUSE
        while not transmit(self._mem, self.place, end):
            session.check()
            if session.ended():
                raise session.stopped()
            now = time.monotonic_ns()
            if now >= deadline:
                raise TimeoutError("timed out: the transmit ring is full")
            if now > awake:
                time.sleep(min(pause, (deadline - now) / 1e9) if deadline < NEVER else pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def flush(self) -> None:
        """Returns when all that was sent is in the worker's hands, or a while after it should have been."""
        head, tail = self._words[L.LS_PUBLISHED // 8], self._tail
        deadline = time.monotonic() + _PATIENCE
        while tail[0] < head and not self._session.ended() and time.monotonic() < deadline:
            time.sleep(_PAUSE)

    def abandon(self) -> None:
        """The session is over, perhaps by a fork: the lock's holder may not exist here."""
        self.lock = threading.Lock()
