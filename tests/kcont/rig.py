"""A table with a listener and slots of connections, and the continuation worker's kernels on it, in one process."""

from __future__ import annotations

import sys
import time
from typing import Any

from dataplane.inet import tcp_continue
from dataplane.jit import kernel, warm
from dataplane.kcont import area as K
from dataplane.kcont.schedule import kcont_schedule
from dataplane.pcb import lookup
from dataplane.pcb.slots import slots_take
from dataplane.pcb.table import SocketSpec, Table
from dataplane.shm import epoch
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.arena import Arena
from dataplane.tcp.service import slot_bytes
from workers.continuation import home_bytes

LANE, SEND, RECEIVE, TX = 4096, 4096, 4096, 65536
OWNER, PORT, LOCAL, REMOTE = 7, 80, 0x0A4D0001, 0x0A4D0002
SECOND = 1_000_000_000


@kernel("i64(mem, i64, i64, i64)")
def schedule(mem, w, number, deadline):  # type: ignore[no-untyped-def]
    """kcont_schedule for tests."""
    kcont_schedule(mem, w, number, deadline)
    return 0


@kernel("i64(mem, i64, i64)")
def schedule_many(mem, w, count):  # type: ignore[no-untyped-def]
    """For the measurement: arms `count` connections that are not pending."""
    for number in range(count):
        kcont_schedule(mem, w, number, 1 << 60)
    return count


@kernel("i64(mem, i64, i64)")
def take_slots(mem, w, most):  # type: ignore[no-untyped-def]
    """slots_take for tests."""
    return slots_take(mem, w, most)


class Rig:
    """`slots` free slots of one listener on RX worker 0; their PCB numbers are in `numbers`."""

    def __init__(self, slots: int = 4, time_wait: int = 8, sockets: int = 64, workers: int = 1) -> None:
        warm([tcp_continue, sys.modules[__name__]])     # no test waits for the compiler
        self.arena = Arena(1 << 34)
        self.mem = self.arena.mem
        size = Table.size(sockets, workers, 1, 4, 16, time_wait)
        place = self.arena.map_anonymous(size, shared=True)
        self.table = Table(self.mem, place, sockets, workers, 1, 4, 16, time_wait)
        self.put, self.get = self.table.put, self.table.get
        self.put(place + L.T_TX_RING, TX)
        self.put(place + L.T_TIME_WAIT_NS, 60 * SECOND)
        self.home = self.arena.map_anonymous(home_bytes(TX), shared=True)
        for worker in range(workers):
            self.put(self.table.worker(worker) + L.W_STAMP, 2 + worker)
        self.rx = self.table.worker(0)
        # A listener has lanes of its own.
        lanes = [self.arena.map_anonymous(L.LANE_DATA + LANE, shared=True) for _ in range(workers)]
        self.listener = self.table.open(SocketSpec(
            "listen", L.KEY_FAMILY4, 6, (0, LOCAL), PORT, owner=OWNER, ring_bytes=LANE, lanes=lanes, backlog=16))
        self.bytes = slot_bytes(LANE, SEND, RECEIVE, workers)
        self.numbers = [self.add_slot(index % workers) for index in range(slots)]
        self.stamp = 100
        self.records: list[tuple[int, int]] = []
        self.w = self.k = 0

    def add_slot(self, worker: int = 0) -> int:
        place = self.arena.map_anonymous(self.bytes, shared=True)
        lanes = [place + T.CONN_LANES + one * (L.LANE_DATA + LANE) for one in range(self.table.workers)]
        return self.table.add_slot(self.listener, SocketSpec(
            "connection", 0, 6, owner=OWNER, place=place, lanes=lanes, ring_bytes=LANE,
            buffers=(SEND, RECEIVE)), worker)

    # -- the continuation worker, in this process ----------------------------------------------------------------

    def begin(self) -> None:
        """A continuation worker begins, or its replacement: with new private memory."""
        self.stamp += 1
        self.w = K.attach_area(self.arena, self.table, self.home, TX, -1, self.stamp)
        self.k = self.get(self.w + L.W_KCONT)
        self.put(self.w + L.W_TCP_EXCHANGE, self.arena.map_anonymous(T.X_BYTES))
        tcp_continue.continue_recover(self.mem, self.w)

    def step(self, budget: int = 64) -> int:
        return int(tcp_continue.continue_step(self.mem, self.w, budget))

    def run(self, condition: Any, seconds: float = 10.0, taking: bool = True) -> None:
        """Steps until the condition holds: a watchdog, no measurement. `taking`: worker 0 does its part."""
        end = time.monotonic() + seconds
        while not condition():
            self.step()
            if taking:
                self.take()
            assert time.monotonic() < end, "the watchdog"

    def done(self) -> list[int]:
        """What would be reported as freed."""
        count, place = self.get(self.k + K.K_DONE_COUNT), self.get(self.k + K.K_DONE)
        self.put(self.k + K.K_DONE_COUNT, 0)
        return [self.get(place + 8 * index) for index in range(count)]

    # -- connections ------------------------------------------------------------------------------------------------

    def word(self, number: int, word: int) -> int:
        return self.get(self.table.pcb(number) + word)

    def state(self, number: int) -> int:
        return self.word(number, L.PCB_STATE)

    def slot(self, number: int) -> int:
        return self.word(number, L.PCB_PLACE)

    def open(self, number: int, port: int, state: int = T.ESTABLISHED, request: int = 0) -> None:
        """Makes a connection of a slot, as an RX worker would, in this state and with the application's wish."""
        pcb, conn = self.table.pcb(number), self.slot(number)
        self.mem[conn + T.CONN_LOCK:conn + T.CONN_LANES] = 0
        tcb = conn + T.CONN_BLOCKS
        for word, value in ((T.T_STATE, state), (T.T_ISS, 1000), (T.T_IRS, 5000), (T.T_SND_UNA, 1), (T.T_SND_NXT, 1),
                            (T.T_SND_MAX, 1), (T.T_RCV_NXT, 1), (T.T_RCV_RIGHT, 1 + RECEIVE), (T.T_MSS, 1460),
                            (T.T_PEER_MSS, 1460), (T.T_MTU, 1500), (T.T_IP_BYTES, 20), (T.T_SND_WND, 65535),
                            (T.T_MAX_WND, 65535), (T.T_CWND, 14600), (T.T_SSTHRESH, 1 << 30), (T.T_RTO, SECOND),
                            (T.T_LAST_ACK_SENT, 1), (T.T_END_AT, now() + SECOND if state == T.TIME_WAIT else 0)):
            self.put(tcb + word, value)
        self.put(conn + T.CONN_READ, 1)
        self.put(conn + T.CONN_WRITTEN, 1)
        self.put(conn + T.CONN_REQUEST, request)
        for word, value in (
                (L.PCB_GENERATION, self.get(pcb + L.PCB_GENERATION) + 1), (L.PCB_LOCAL_LO, LOCAL),
                (L.PCB_REMOTE_LO, REMOTE), (L.PCB_DUE, 0),
                (L.PCB_KEY, PORT | port << 16 | 6 << 32 | L.CLASS_CONNECTED << 40 | L.KEY_FAMILY4 << 48),
                (L.PCB_STATE, L.PCB_OPEN)):
            self.put(pcb + word, value)
        assert lookup.bucket_insert(self.mem, self.table.offset, number, 2) == 1

    def find(self, port: int) -> int:
        """The PCB that a segment from this remote port belongs to."""
        scratch = self.table.offset + L.T_HEADER - 64
        for index, value in enumerate((0, LOCAL, 0, REMOTE)):
            self.put(scratch + 8 * index, value)
        key = PORT | port << 16 | 6 << 32 | L.CLASS_CONNECTED << 40
        return int(lookup.find_exact(self.mem, self.table.offset, key, L.KEY_FAMILY4, scratch))

    def schedule(self, number: int, deadline: int | None = None) -> None:
        schedule(self.mem, self.rx, number, now() if deadline is None else deadline)

    def free_slots(self, worker: int = 0) -> list[int]:
        """Takes what is in the worker's queue; its list of the listener's slots."""
        take_slots(self.mem, self.table.worker(worker), 1 << 16)
        found, following = [], self.get(self.table.slot_head(self.listener, worker))
        while following > 0:
            found.append(following - 1)
            assert len(found) <= self.table.sockets, "the list runs in a circle"
            following = self.word(following - 1, L.PCB_NEXT)
        return found

    def pop_all(self, worker: int = 0) -> list[int]:
        found = self.free_slots(worker)
        self.put(self.table.slot_head(self.listener, worker), 0)
        return found

    # -- epochs ------------------------------------------------------------------------------------------------------

    def busy(self) -> None:
        """Worker 0 is in a burst."""
        epoch.mark_online(self.mem, self.rx)

    def idle(self) -> None:
        epoch.mark_offline(self.mem, self.rx)

    def sent(self) -> list[tuple[int, int]]:
        """(PCB, flags) of the records that were put into the transmit lane since the last call."""
        self.take()
        found, self.records = self.records, []
        return found

    def take(self) -> None:
        """Empties the transmit lane, as worker 0."""
        lane = self.home + L.HOME_TX
        at, head = self.get(lane + L.LANE_TAIL), self.get(lane + L.LANE_HEAD)
        while at < head:
            record = lane + L.LANE_DATA + (at & TX - 1)
            word = self.get(record)
            if not word & (L.RECORD_PAD << 24):
                body = record + L.RECORD_DATA
                self.records.append((self.get(body) & 0xFFFFFFFF, self.get(body + L.TX_PAYLOAD + T.O_FLAGS)))
            at += (word & 0xFFFFFF) + L.RECORD_DATA + 15 & -16
        self.put(lane + L.LANE_TAIL, head)


def now() -> int:
    return time.monotonic_ns()
