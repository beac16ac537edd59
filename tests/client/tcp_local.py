"""Two TCP connections in this process, and the wire between them: what workers would do is done by a thread.

    with Wire(session) as wire:
        a, b = wire.pair()
        a.sendall(b"hello")

The thread takes the records of the transmit lane, makes segments of them with the bytes of the send ring, stages
them in the other connection's lane and wakes its owner. It also is the continuation worker: it runs connections
whose deadline has come. It may lose segments.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
import time
from typing import Any

from dataplane.client.tcp import Connection, Listener
from dataplane.client.workbench import Slot, Workbench
from dataplane.control import messages
from dataplane.jit import kernel
from dataplane.rings.lane import lane_publish, lane_stage
from dataplane.rings.wake import wake_notify
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import copy, fence, fill, ld64, st64
from dataplane.shm.libc import CLOCK_MONOTONIC, clock_ns
from dataplane.tcp.connection import conn_establish
from dataplane.tcp.segment import segment_build
from dataplane.tcp.service import (
    send_ring,
    service_begin,
    service_bind,
    service_commit,
    service_install,
    service_more,
    service_run,
    slot_bytes,
)
from tests.client.local import TX_RING, LocalSession

ISS = 0xFFFF_F000       # so that numbers wrap soon


@kernel("none(mem, i64, i64, i64, i64, i64)")
def establish(mem, x, place, sizes, side, mss):
    """An open connection. `sizes` in log2: lane, send, receive ring, 8 bits each, and lanes."""
    service_bind(mem, x, place, 1 << (sizes & 0xFF), (sizes >> 24) & 0xFF, 1 << ((sizes >> 8) & 0xFF),
                 1 << ((sizes >> 16) & 0xFF))
    t = x + T.X_TCB
    fill(mem, t, 0, T.TCB_BYTES)
    st64(mem, x + T.X_NOW, clock_ns(mem, x + T.X_OUT, CLOCK_MONOTONIC))
    st64(mem, x + T.X_EVENTS, 0)
    st64(mem, t + T.T_ISS, ISS + side)
    st64(mem, t + T.T_IRS, ISS + 1 - side)
    st64(mem, t + T.T_FLAGS, T.TF_SACK | T.TF_TIMESTAMPS | T.TF_SCALE)
    st64(mem, t + T.T_TS_RECENT_AT, ld64(mem, x + T.X_NOW))
    st64(mem, t + T.T_SND_SHIFT, 7)
    st64(mem, t + T.T_RCV_SHIFT, 7)
    st64(mem, t + T.T_PEER_MSS, mss)
    st64(mem, t + T.T_MTU, mss + 40)
    st64(mem, t + T.T_IP_BYTES, 20)
    st64(mem, t + T.T_SND_WND, 65535)
    conn_establish(mem, x)
    service_install(mem, x)


@kernel("i64(mem, i64, i64, i64, i64)")
def carry(mem, o, conn, sizes, state):
    """The segments of one O_ record at `o`, out of the slot `conn`, into the lane `state`; the scratch behind that
    state is used. How many had no room."""
    lost = 0
    mask = (1 << ((sizes >> 8) & 0xFF)) - 1
    ring = send_ring(conn, 1 << (sizes & 0xFF), (sizes >> 24) & 0xFF)
    at = state + L.LS_BYTES
    done, length = 0, ld64(mem, o + T.O_LENGTH)
    flags = ld64(mem, o + T.O_FLAGS)
    while True:
        piece = min(length - done, max(ld64(mem, o + T.O_SEGMENT), 1))
        last = done + piece >= length
        header = segment_build(mem, o, at, (ld64(mem, o + T.O_SEQ) + done) & 0xFFFFFFFF,
                               flags if last else flags & ~(T.FIN | T.PSH))
        for i in range(piece):
            copy(mem, at + header + i, ring + ((ld64(mem, o + T.O_FROM) + done + i) & mask), 1)
        lost += 1 if lane_stage(mem, state, 0, 1, at, header + piece) != 1 else 0
        done += piece
        if last:
            return lost


@kernel("i64(mem, i64, i64)")
def announce(mem, state, wake):
    lane_publish(mem, state)
    fence()
    return wake_notify(mem, wake)


@kernel("i64(mem, i64, i64, i64)")
def continuation(mem, x, place, sizes):
    """Runs a connection as the continuation worker does; -1: it was locked, else how many segments are in X_OUT
    (those of earlier rounds are lost: rare, and they are sent again)."""
    service_bind(mem, x, place, 1 << (sizes & 0xFF), (sizes >> 24) & 0xFF, 1 << ((sizes >> 8) & 0xFF),
                 1 << ((sizes >> 16) & 0xFF))
    st64(mem, x + T.X_NOW, clock_ns(mem, x + T.X_SEGMENT, CLOCK_MONOTONIC))
    if service_begin(mem, x) == 0:
        return -1
    while True:
        service_run(mem, x)
        if ld64(mem, x + T.X_EVENTS) & T.EV_MORE and ld64(mem, x + T.X_OUT_COUNT) == 0:
            service_more(mem, x)
        if service_commit(mem, x) == 0:
            break
    fence()
    wake_notify(mem, place + T.CONN_WAKE)
    return ld64(mem, x + T.X_OUT_COUNT)


class End:
    """One connection as the wire knows it."""

    def __init__(self, number: int, place: int, state: int, sizes: int) -> None:
        self.number, self.place, self.state, self.sizes = number, place, state, sizes
        self.peer: End = self
        self.queued_at = 0      # since when segments wait in its lane


class Wire:
    """Carries segments between connections of one session, which has one lane each."""

    def __init__(self, session: LocalSession, send_bytes: int = 65536, receive_bytes: int = 65536,
                 mss: int = 1460) -> None:
        self.session, self.mem = session, session.memory.mem
        self.bench = Workbench(session, session.transmitter)
        self.slot = Slot(1, receive_bytes, send_bytes, receive_bytes)
        bits = [size.bit_length() - 1 for size in (receive_bytes, send_bytes, receive_bytes)]
        self.sizes = bits[0] | bits[1] << 8 | bits[2] << 16 | 1 << 24
        self.mss = mss
        self.ends: dict[int, End] = {}
        self.lose = 0           # every so many records; 0: none
        self.carried = self.kicks = 0
        self.failure: BaseException | None = None
        self._numbers = itertools.count(100)
        self._x = session.memory.block(T.X_BYTES)
        session.memory.words(self._x + T.X_STAMP)[0] = 77
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._turns = threading.Lock()

    def __enter__(self) -> Wire:
        for one in (establish, carry, announce, continuation):
            one.compile()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(20)
        if self.failure is not None:
            raise self.failure

    def pair(self) -> tuple[Connection, Connection]:
        """Two connections with each other."""
        a, b = self._end(0), self._end(1)
        a.peer, b.peer = b, a
        return self._connection(a), self._connection(b)

    def offer(self, listener_session: Any, listener: Listener) -> Connection:
        """A connection to be accepted; its other end."""
        a, b = self._end(0), self._end(1)
        a.peer, b.peer = b, a
        self.session.memory._segments[b.number] = (b.place, self.slot.size)
        record = struct.pack("=IIqqHHHxxQQQQ", b.number, 9, b.number, 0, 4, 4000, 80, 0, 0x0A4D0002, 0, 0x0A4D0001)
        self.session.produce(listener.queue, [record], offset=0)
        if self.session.events == L.WAKE_PIPE:
            os.eventfd_write(self.session.sources[0].descriptor, 1)
        return self._connection(a)

    def listener(self) -> Listener:
        """One whose accepted connections have this wire's sizes."""
        sock = self.session.open("raw")
        bound = sock.bound
        made = messages.Bound(pcb=bound.pcb, generation=7, number=bound.number, slot=0, ring_bytes=bound.ring_bytes,
                              address="10.77.0.1", port=80, lane_bytes=self.slot.lane_bytes,
                              send_bytes=self.slot.send_bytes, receive_bytes=self.slot.receive_bytes)
        listener = Listener(self.bench, made)
        self.session._lane_states[listener.queue] = self.session._lane_states[sock]
        return listener

    def _end(self, side: int) -> End:
        size = slot_bytes(self.slot.lane_bytes, self.slot.send_bytes, self.slot.receive_bytes, 1)
        place = self.session.memory.table(size)
        state = self.session.memory.table(L.LS_BYTES + 65536 + 4096)
        words = self.session.memory.words(state, 8)
        words[L.LS_BASE // 8] = int(place + T.CONN_LANES)
        words[L.LS_MASK // 8] = self.slot.lane_bytes - 1
        end = End(next(self._numbers), place, state, self.sizes)
        with self._turns:
            establish(self.mem, self._x, place, self.sizes, side, self.mss)
        self.ends[end.number] = end
        return end

    def _connection(self, end: End) -> Connection:
        pcb = end.number | 9 << 32
        return Connection(self.bench, end.place, pcb, self.slot, 4, ("10.77.0.1", 80), ("10.77.0.2", end.number))

    # -- the thread ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._over.is_set():
                if not self._forward():
                    time.sleep(0.0002)
                self._timers()
        except BaseException as error:      # told to the test by __exit__
            self.failure = error

    def _forward(self) -> int:
        memory, lane = self.session.memory, self.session.home + L.HOME_TX
        head, tail = memory.words(lane + L.LANE_HEAD), memory.words(lane + L.LANE_TAIL)
        count, dirty = 0, {}
        at = int(tail[0])
        while at < int(head[0]):
            record = lane + L.LANE_DATA + (at & (TX_RING - 1))
            word = int(memory.words(record)[0])
            at += ((word & 0xFFFFFF) + L.RECORD_DATA + 15) // 16 * 16
            if not word >> 24 & L.RECORD_PAD:
                count += 1
                end = self.ends[int(memory.words(record + L.RECORD_DATA)[0]) & 0xFFFFFFFF]
                self._carry(end, record + L.RECORD_DATA + L.TX_PAYLOAD, dirty)
            tail[0] = at
        for peer in dirty.values():
            self._publish(peer)
        return count

    def _carry(self, end: End, o: int, dirty: dict[int, End]) -> None:
        if not self.session.memory.words(o + T.O_FLAGS)[0]:
            self.kicks += 1
            return
        self.carried += 1
        if self.lose and self.carried % self.lose == 0:
            return
        peer = end.peer
        carry(self.mem, o, end.place, end.sizes, peer.state)
        dirty[peer.number] = peer

    def _publish(self, peer: End) -> None:
        if announce(self.mem, peer.state, peer.place + T.CONN_WAKE) == L.WAKE_PIPE:
            for source in self.session.sources:
                os.eventfd_write(source.descriptor, 1)

    def _timers(self) -> None:
        now = time.monotonic_ns()
        for end in list(self.ends.values()):
            words = self.session.memory.words(end.place, T.CONN_BLOCKS // 8)
            lane = self.session.memory.words(end.place + T.CONN_LANES, 32)
            queued = lane[0] != lane[L.LANE_TAIL // 8]
            due = 0 < int(words[T.CONN_DEADLINE // 8]) <= now
            end.queued_at = (end.queued_at or now) if queued else 0
            if not due and not (queued and now - end.queued_at > 20_000_000):
                continue
            end.queued_at = 0
            with self._turns:
                count = continuation(self.mem, self._x, end.place, end.sizes)
                dirty: dict[int, End] = {}
                for i in range(max(count, 0)):
                    self._carry(end, self._x + T.X_OUT + i * T.O_BYTES, dirty)
            for peer in dirty.values():
                self._publish(peer)
            if int(words[T.CONN_WAKE // 8]) == L.WAKE_AWAKE:
                for source in self.session.sources:
                    os.eventfd_write(source.descriptor, 1)

    def state(self, connection: Connection) -> int:
        """Of the control block."""
        end = self.ends[connection._remote[1]]
        return int(self.session.memory.words(end.place + T.CONN_STATUS)[0]) & 0xFF

