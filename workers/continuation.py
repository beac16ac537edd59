"""The continuation worker's process: timers, connections whose owner does not call in, and the end of connections.

Forked by the supervisor like an RX worker, with the same order channel, and replaced like one when it dies. All work
is in `inet/tcp_continue.py`; here are orders, reports, signals and sleep. It sleeps until the wheel's next
deadline, on its doorbell (an RX worker has armed something earlier) and on the order channel: idle, it uses no
CPU at all. It has no netif and no core of its own: it stays off the RX workers' cores if there are others.

Its death loses nothing but time: what the replacement finds, and does, is written in kcont/reaper.py. Connections of
owners that are being taken apart it learns again from its `ContinuationPost`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dataplane.config import Config
from dataplane.inet.tcp_continue import (
    continue_abandon,
    continue_may_sleep,
    continue_recover,
    continue_reset,
    continue_step,
    continue_unlisten,
    continue_woke,
)
from dataplane.inet.tcp_service import tcp_unlock
from dataplane.jit import kernel
from dataplane.kcont import area as K
from dataplane.kcont.schedule import kcont_mourn
from dataplane.pcb.table import Table
from dataplane.rings.lane import lane_bytes
from dataplane.rings.pcq import Pcq
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import ld64
from dataplane.shm.libc import ppoll, read
from workers import orders
from workers.duty import POLLIN, pollfd
from workers.process import WorkerProcess, live

__all__ = ["ContinuationPost", "doze", "home_bytes", "mourn", "work"]

BUDGET = 256                # connections of one step: some milliseconds at most
NAP_NS = 500_000_000        # longest sleep while reports wait for a supervisor that does not read
_POLLOUT = 4
_ORDERS, _DOORBELL, _SCRATCH, _NAP_BYTES = 0, 8, 64, 4096


def home_bytes(tx_ring_bytes: int) -> int:
    """Bytes of what stands in for the continuation worker's home segment: its transmit lane."""
    return L.HOME_TX + lane_bytes(tx_ring_bytes)


def mourn(table: Table, dead: int) -> None:
    """Supervisor: the worker stamped `dead` is dead. Nobody whose continuation it was arming is lost."""
    kcont_mourn(table.mem, table.offset, dead)


@kernel("i64(mem, i64, i64)")
def doze(mem, fds, timeout_ns):
    """Sleeps until the order channel or the doorbell has something, or the time is up; quiets the bell."""
    ready = ppoll(mem, fds, 2, timeout_ns, fds + _SCRATCH)
    bell = ld64(mem, fds + _DOORBELL)
    if ready > 0 and (bell >> 48) & POLLIN:
        read(mem, bell & 0x7FFFFFFF, fds + _SCRATCH, _NAP_BYTES - _SCRATCH)
    return ready


@dataclass
class ContinuationPost:
    """What the continuation worker is given with its fork."""

    arena: Arena
    table: Table
    config: Config
    stamp: int
    supervisor: int                                 # its pid
    channel: socket.socket
    doorbell: int
    obeyed: int                                     # orders whose result it has inherited
    home: int                                       # place of home_bytes, mapped before any fork
    rope: int                                       # rings worker 0, which transmits for it
    events: list[tuple[int, int, int]]              # bells: (number, descriptor, consumer)
    gone: list[int] = field(default_factory=list)   # consumers that have died and are not yet taken apart


class ContinuationWorker(WorkerProcess):
    """One continuation worker, from its fork to its end."""

    def __init__(self, post: ContinuationPost) -> None:
        super().__init__(post.arena, post.table, post.channel, post.supervisor, post.obeyed)
        self._post = post
        self._settle_in("dataplane-kcont", sorted(os.sched_getaffinity(0) - set(post.config.cores)))
        table = post.table
        dead = table.get(table.worker(table.workers) + L.W_STAMP)
        self._w = K.attach_area(post.arena, table, post.home, post.config.sockets.tx_ring_bytes, post.rope, post.stamp)
        self._k = table.get(self._w + L.W_KCONT)
        table.put(self._w + L.W_TCP_EXCHANGE, post.arena.map_anonymous(T.X_BYTES))
        table.put(self._w + L.W_PID, os.getpid())
        if dead:
            self._take_over(dead)
        for number, descriptor, consumer in post.events:
            self._listen(number, descriptor, consumer)
        continue_recover(self._mem, self._w)
        for consumer in post.gone:
            continue_abandon(self._mem, self._w, consumer)
        self._fds = post.arena.map_anonymous(_NAP_BYTES)
        table.put(self._fds + _DOORBELL, pollfd(post.doorbell))
        mailbox = self._w + L.W_MAILBOX
        self._mailbox = self._mem[mailbox:mailbox + 8].view(np.int64).data

    def _take_over(self, dead: int) -> None:
        """Locks and places in queues that the predecessor held."""
        table = self._table
        tcp_unlock(self._mem, table.offset, dead)
        for worker in range(table.workers):
            queue = (table.get(table.offset + L.T_SLOT_QUEUES)
                     + worker * table.get(table.offset + L.T_SLOT_QUEUE_BYTES))
            Pcq(self._mem, queue).repair(dead)

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until told to stop."""
        self._report(orders.Ready())
        mem, w, mailbox = self._mem, self._w, self._mailbox
        while not (self._stopping or self._orphaned):
            handled = continue_step(mem, w, BUDGET)
            self._tell_freed()
            if mailbox[0]:
                self._read_orders()
            if not handled:
                self._sleep()

    def _sleep(self) -> None:
        wait = continue_may_sleep(self._mem, self._w)
        if wait != 0:
            events = POLLIN | _POLLOUT if self._reports else POLLIN
            self._table.put(self._fds + _ORDERS, (events << 32) | self._post.channel.fileno())
            doze(self._mem, self._fds, min(wait, NAP_NS))
            continue_woke(self._mem, self._w)
        self._send()
        self._read_orders()

    # -- reports ---------------------------------------------------------------------------------------------

    def _tell_freed(self) -> None:
        """The PCBs that go back to the supervisor."""
        count = self._table.get(self._k + K.K_DONE_COUNT)
        if not count:
            return
        place = self._table.get(self._k + K.K_DONE)
        numbers = self._mem[place:place + 8 * count].view(np.int64).tolist()
        self._table.put(self._k + K.K_DONE_COUNT, 0)
        for first in range(0, count, orders.FREED_MAX):
            self._report(orders.Freed(numbers[first:first + orders.FREED_MAX]))

    def _obey(self, order: orders.Order, descriptor: int) -> None:
        match order:
            case orders.Abandon():
                continue_abandon(self._mem, self._w, order.consumer)
            case orders.Reset():
                continue_reset(self._mem, self._w, order.pcb)
            case orders.Unlisten():
                continue_unlisten(self._mem, self._w, order.listener)
            case _:
                super()._obey(order, descriptor)


def work(post: ContinuationPost, close_others: Callable[[], None]) -> None:
    """The continuation worker's whole life, in the forked process. Ends the process."""
    def run() -> None:
        close_others()
        ContinuationWorker(post).run()

    live(run, post.channel)
