"""A dataplane in this process: real lanes and real sockets over them, and a producer, without anybody else.

For tests of the client's own code. What a supervisor would answer is answered by `Answers`.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from dataplane.client.addresses import Routes
from dataplane.client.session import Session
from dataplane.client.sockets import RawSocket, Socket, TapSocket
from dataplane.client.transmit import Transmitter
from dataplane.client.udp import UDPSocket
from dataplane.control import messages
from dataplane.errors import DataplaneError
from dataplane.jit import kernel
from dataplane.rings.lane import lane_bytes, lane_publish, lane_stage
from dataplane.rings.wake import init_wake, wake_notify
from dataplane.shm import layout as L
from dataplane.shm.atomics import fence, load_acquire, st64

TX_RING = 262144
KINDS = {"udp": UDPSocket, "raw": RawSocket, "tap": TapSocket}


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def stage(mem, state, word, time, source, length):
    return lane_stage(mem, state, word, time, source, length)


@kernel("i64(mem, i64)")
def publish(mem, state):
    lane_publish(mem, state)
    fence()
    return wake_notify(mem, load_acquire(mem, state + L.LS_WAKE))


@kernel("i64(mem, i64, i64, i64, i64)")
def produce(mem, states, lanes, count, length):
    """Up to `count` packets of `length` bytes into `lanes` lanes in turn; how many had room."""
    staged = 0
    for i in range(count):
        state = states + (i % lanes) * L.LS_BYTES
        source = states + lanes * L.LS_BYTES
        st64(mem, source + length - 8, i)
        staged += 1 if lane_stage(mem, state, 28 << 32, i, source, length) == 1 else 0
    for i in range(lanes):
        lane_publish(mem, states + i * L.LS_BYTES)
    return staged


class Answers:
    """Stands for the control connection."""

    def __init__(self) -> None:
        self.requests: list[messages.Message] = []
        self.orphans: list[Any] = []
        self.gone = False

    def request(self, message: messages.Message, expect: Any, timeout: float = 1.0) -> tuple[Any, list[int]]:
        self.requests.append(message)
        if isinstance(message, messages.Event):
            return messages.Evented(1), [os.eventfd(0, os.EFD_NONBLOCK)]
        return messages.Done(), []

    def pipeline(self, messages_: Sequence[messages.Message], expect: Any, timeout: float = 1.0) -> list[Any]:
        self.requests.extend(messages_)
        return [messages.Done() for _ in messages_]

    def ended(self) -> bool:
        return self.gone

    def close(self) -> None:
        self.gone = True

    forget = close


class LocalSession(Session):
    """A session with itself: `open` makes sockets, `produce` puts packets into them."""

    def __init__(self, workers: int = 1, spin_us: float = 20.0) -> None:
        self.workers = workers
        super().__init__(Answers(), int(spin_us * 1000))  # type: ignore[arg-type]
        self._numbers = itertools.count(1)
        self._slots: dict[int, list[int]] = {}
        self._lane_states: dict[Socket[Any], int] = {}
        self._packet = self.memory.block(1 << 17)
        self.transmitter = Transmitter(self)
        self.routes = Routes(self.attached.netifs)

    def _attach(self) -> messages.Attached:
        self.home = self.memory._arena.map_anonymous(L.HOME_TX + lane_bytes(TX_RING))
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK)
        self.keep(self.doorbell)
        self._stopped = self.memory.words(self.home + L.HOME_STOPPED)
        self.poller_slots = list(range(L.HOME_MAX_POLLERS - 1, -1, -1))
        for i in range(L.HOME_MAX_POLLERS):
            init_wake(self.memory.mem, self.home + L.HOME_POLLERS + i * L.WAKE_BYTES)
        netif = messages.NetifInfo(name="dp0", kind="tun", mtu=1500, passive=False,
                                   addresses=["10.77.0.1/24", "fd77::1/64"], gateway=[])
        return messages.Attached(name="local", pid=os.getpid(), consumer=1, workers=self.workers,
                                 home=messages.Segment(0, 0, None), tx_ring_bytes=TX_RING, ring_bytes=65536,
                                 time_wait_ns=60_000_000_000, netifs=[netif])

    # -- the other side ------------------------------------------------------------------------------

    def open(self, kind: str = "udp", ring_bytes: int = 65536, address: str | None = "10.77.0.1",
             remote: Any = None) -> Any:
        """A socket; `kind` as in a bind request."""
        number = next(self._numbers)
        size = L.SLOT_LANES + self.workers * lane_bytes(ring_bytes)
        place = self._slot(size)
        self.memory._segments[number] = (place, size)
        init_wake(self.memory.mem, place)
        bound = messages.Bound(pcb=number, generation=7, number=number, slot=0, ring_bytes=ring_bytes,
                               address=address, port=5000)
        if kind == "udp":
            sock: Any = UDPSocket(self, bound, remote, self.transmitter, self.routes)
        else:
            sock = KINDS[kind](self, bound, remote)  # type: ignore[call-arg]
        states = self._lane_states[sock] = self.memory.block(self.workers * L.LS_BYTES + 2048)
        for i in range(self.workers):
            words = self.memory.words(states + i * L.LS_BYTES, 8)
            words[L.LS_BASE // 8] = place + L.SLOT_LANES + i * lane_bytes(ring_bytes)
            words[L.LS_MASK // 8] = ring_bytes - 1
            words[L.LS_WAKE // 8] = place
        return sock

    def _slot(self, size: int) -> int:
        """As in a ring segment: slots side by side, so that their heads are not all in the same cache set."""
        slots = self._slots.setdefault(size, [])
        if not slots:
            place = self.memory._arena.map_anonymous(64 * size)
            slots.extend(place + i * size for i in range(64))
        return slots.pop(0)

    def state(self, sock: Socket[Any], worker: int = 0) -> int:
        return self._lane_states[sock] + worker * L.LS_BYTES

    def produce(self, sock: Socket[Any], packets: Iterable[bytes], worker: int = 0, offset: int = 28,
                time: int = 1, vlan: int | None = None, wire: int | None = None) -> int:
        """Publishes packets; how many had room. `wire`: they are frames, of so many bytes."""
        word = offset << 32
        if vlan is not None:
            word |= vlan << 48 | L.RECORD_VLAN << 24
        if wire is not None:
            word = wire << 32 | L.RECORD_FRAME << 24
        word = word - (1 << 64) if word >> 63 else word
        state, mem, staged = self.state(sock, worker), self.memory.mem, 0
        for packet in packets:
            self.memory.bytes[self._packet:self._packet + len(packet)] = packet
            if stage(mem, state, word, time + staged, self._packet, len(packet)) != 1:
                break
            staged += 1
        waiter = self.memory.words(state + L.LS_WAKE)
        waiter[0] = sock.waiter.wake
        self.events = publish(mem, state)
        return staged

    def fill(self, sock: Socket[Any], count: int, length: int = 60) -> int:
        """Packets of nothing into all lanes in turn."""
        return int(produce(self.memory.mem, self.state(sock), self.workers, count, length))

    def consumed(self, sock: Socket[Any]) -> list[int]:
        """What the rings count as consumed, by lane."""
        bases = [int(self.memory.words(self.state(sock, i) + L.LS_BASE)[0]) for i in range(self.workers)]
        return [int(self.memory.words(base + L.LANE_CONSUMED)[0]) for base in bases]

    def empty(self, sock: Socket[Any]) -> bool:
        """Whether everything was given back."""
        for i in range(self.workers):
            base = int(self.memory.words(self.state(sock, i) + L.LS_BASE)[0])
            if self.memory.words(base + L.LANE_HEAD)[0] != self.memory.words(base + L.LANE_TAIL)[0]:
                return False
        return True

    def stop(self) -> None:
        """The dataplane has ended."""
        self._stopped[0] = 1

    def transmitted(self) -> list[tuple[bytes, bytes]]:
        """Header and payload of all transmit records; the lane is emptied."""
        lane = self.home + L.HOME_TX
        head = int(self.memory.words(lane + L.LANE_HEAD)[0])
        tail = self.memory.words(lane + L.LANE_TAIL)
        found = []
        while (at := int(tail[0])) < head:
            record = lane + L.LANE_DATA + (at & (TX_RING - 1))
            word = int(self.memory.words(record)[0])
            length = word & 0xFFFFFF
            tail[0] = at + (length + 31) // 16 * 16
            if not word >> 24 & L.RECORD_PAD:
                body = bytes(self.memory.bytes[record + 16:record + 16 + length])
                found.append((body[:L.TX_PAYLOAD], body[L.TX_PAYLOAD:]))
        return found


def in_thread(function: Any, *args: Any) -> tuple[threading.Thread, list[Any]]:
    """Runs it; the list gets its result, or what it raised."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(function(*args))
        except (DataplaneError, OSError, ValueError) as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread, results
