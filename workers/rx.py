"""The RX worker's process: what only Python can do, between two calls of `duty.serve`.

Forked by the supervisor, with everything mapped and compiled. All work on packets is in `inet/step.py`, spinning
and sleep in `duty.py`; here are the order channel, signals, and the two ends: told to stop, the worker finishes
its burst and leaves; when the supervisor has died, it says so to all consumers and leaves as well, within a second.

It writes its own worker block and what the kernels write. It never waits for anyone but where it sleeps.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataplane.config import Config
from dataplane.inet.step import finish
from dataplane.inet.transmit import add_consumer, remove_consumer
from dataplane.inet.worker import attach_private
from dataplane.jit import kernel
from dataplane.pcb import slots
from dataplane.pcb.table import Table
from dataplane.rings.wake import ring_wake, wake_ring
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import ld64
from dataplane.shm.bell import ring
from dataplane.shm.epoch import mark_offline, mark_online
from dataplane.shm.layout_tcp import CONN_WAKE
from workers import orders
from workers.duty import ENDED, NAP_BYTES, NAP_DOORBELL, NAP_ORDERS, ORDERS, pollfd, serve, spin_ns
from workers.process import WorkerProcess, live

# -- kernels for both ends of the order channel, and for the end of all --------------------------------------


@kernel("i64(mem, i64)")
def ring_sockets(mem, table):
    """Wakes the waiters of all sockets, whatever their wake words say. Bells are the caller's to ring. Nobody waits
    for a slot without a connection; its page may have no memory yet."""
    states = ld64(mem, table + L.T_LANES)       # those of worker 0: all workers' name the same wake object
    pcb = ld64(mem, table + L.T_PCBS)
    for number in range(ld64(mem, table + L.T_TIME_WAIT_AT)):
        wake = ld64(mem, states + number * L.LS_BYTES + L.LS_WAKE)
        if ld64(mem, pcb + L.PCB_KIND) == L.PK_CONNECTION:
            is_open = ld64(mem, pcb + L.PCB_STATE) == L.PCB_OPEN
            wake = ld64(mem, pcb + L.PCB_PLACE) + CONN_WAKE if is_open else 0
        if ld64(mem, states + number * L.LS_BYTES + L.LS_BASE) != 0 and wake != 0:
            wake_ring(mem, wake)
        pcb += L.PCB_BYTES
    return 0


# -- the process ---------------------------------------------------------------------------------------------


@dataclass
class Post:
    """What a worker is given with its fork."""

    arena: Arena
    table: Table
    config: Config
    index: int
    core: int
    stamp: int
    supervisor: int                                 # its pid
    channel: socket.socket
    doorbell: int
    obeyed: int                                     # orders whose result it has inherited
    consumers: list[tuple[int, int]]                # (number, home) of those that it transmits for
    events: list[tuple[int, int, int]]              # (number, descriptor, consumer)
    homes: dict[int, int] = field(default_factory=dict)     # consumers, by number


class RxWorker(WorkerProcess):
    """One worker, from its fork to its end."""

    def __init__(self, post: Post) -> None:
        super().__init__(post.arena, post.table, post.channel, post.supervisor, post.obeyed)
        self._post = post
        self._spin_ns = spin_ns(post.config.rx.idle, post.config.rx.spin_us)
        self._ended = False
        self._settle_in(f"dataplane-rx{post.index}", [post.core])
        inet = post.config.inet
        self._w = attach_private(post.arena, post.table, post.index, inet.fragments, inet.fragment_timeout,
                                 post.stamp)
        self._table.put(self._w + L.W_PID, os.getpid())
        for consumer, home in post.consumers:
            self._adopt(consumer, home)
        for number, descriptor, consumer in post.events:
            self._listen(number, descriptor, consumer)
        self._fds = post.arena.map_anonymous(NAP_BYTES)
        self._table.put(self._fds + NAP_ORDERS, pollfd(post.channel.fileno()))
        self._table.put(self._fds + NAP_DOORBELL, pollfd(post.doorbell))
        mailbox, want = self._w + L.W_MAILBOX, self._w + L.W_WANT
        self._mailbox = self._mem[mailbox:mailbox + 8].view(np.int64).data
        self._want = self._mem[want:want + 8].view(np.int64).data

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until told to stop."""
        mark_online(self._mem, self._w)
        self._report(orders.Ready())
        mem, w, mailbox, want = self._mem, self._w, self._mailbox, self._want
        while not (self._stopping or self._orphaned):
            told = serve(mem, w, self._fds, self._spin_ns)
            if mailbox[0] or told & ORDERS:
                self._read_orders()
            if want[0]:
                want[0] = 0
                self._report(orders.Want())
            if told & ENDED and not self._ended:
                self._ended = True
                self._report(orders.Ended())
            self._send()
        finish(mem, w)
        mark_offline(mem, w)
        if self._orphaned:
            self._announce_end()

    def _announce_end(self) -> None:
        """The supervisor is dead: nobody else will tell the consumers."""
        for home in self._post.homes.values():
            self._table.put(home + L.HOME_STOPPED, 1)
        ring_homes(self._mem, list(self._post.homes.values()))
        ring_sockets(self._mem, self._table.offset)
        for descriptor in self._events.values():
            ring(descriptor)

    # -- orders ----------------------------------------------------------------------------------------------

    def _obey(self, order: orders.Order, descriptor: int) -> None:
        match order:
            case orders.Adopt():
                self._adopt(order.consumer, order.home)
            case orders.Release():
                if home := self._post.homes.pop(order.consumer, 0):
                    remove_consumer(self._mem, self._w, home)
            case orders.Unlisten():
                slots.forget(self._mem, self._w, order.listener)
            case _:
                super()._obey(order, descriptor)

    def _adopt(self, consumer: int, home: int) -> None:
        self._post.homes[consumer] = home
        add_consumer(self._mem, self._w, home, consumer)


def ring_homes(mem: Any, homes: list[int]) -> None:
    """Wake whoever sleeps on a wake object of these home segments."""
    for home in homes:
        ring_wake(mem, home + L.HOME_WAKE)
        for index in range(L.HOME_MAX_POLLERS):
            ring_wake(mem, home + L.HOME_POLLERS + index * L.WAKE_BYTES)


def work(post: Post, close_others: Callable[[], None]) -> None:
    """The worker's whole life, in the forked process. Ends the process."""
    def run() -> None:
        close_others()
        RxWorker(post).run()

    live(run, post.channel)
