"""Listeners, connections and their slots as the supervisor gives and takes them: its own service, with workers that
obey at once, or when they are told to."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from dataplane import ledger
from dataplane.config import AccessSettings, Config, SocketsSettings, TcpSettings
from dataplane.control import messages
from dataplane.control.loop import Loop
from dataplane.errors import DataplaneError
from dataplane.pcb import slots
from dataplane.pcb.table import Table
from dataplane.shm import epoch
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.arena import Arena
from workers import orders, rx, service
from workers.crew import Worker
from workers.owners import Memory, Shape
from workers.service import PAGE, ControlService, Running

SOCKETS, WORKERS = 64, 2
OWNER, STRANGER = 1000, 2000
SMALL = {"send_bytes": 4096, "receive_bytes": 8192}
TUN = messages.NetifInfo("dp0", "tun", 1400, False, ["10.77.0.1/24", "fd77::1/64"], ["10.77.0.254"])
FAR = messages.NetifInfo("eth0", "af_packet", 9000, False, ["10.77.0.65/26", "192.168.1.1/24"], [])
PASSIVE = messages.NetifInfo("eth1", "af_packet", 1500, True, [], [])


@dataclass(eq=False)
class Peer:
    """A consumer's process as the control server sees it."""

    uid: int = 0
    gid: int = 0
    pid: int = 4711


@dataclass
class Crew:
    """Workers that obey at once; `deaf`: only when `obey` is called."""

    table: Table
    workers: list[Worker] = field(default_factory=lambda: [Worker(index, 0) for index in range(WORKERS)])
    continuation: Worker = field(default_factory=lambda: Worker(WORKERS, 0))
    ready: bool = True
    told: list[tuple[int | None, orders.Order]] = field(default_factory=list)
    deaf: bool = False
    heard: Callable[..., None] = print
    _left: list[tuple[Worker | None, orders.Order]] = field(default_factory=list)
    _given: int = 0
    _obeyed: int = 0

    def order(self, order: orders.Order, descriptor: int = -1, worker: Worker | None = None) -> Callable[[], bool]:
        self.told.append((worker and worker.index, order))
        self._left.append((worker, order))
        self._given += 1
        number = self._given
        if not self.deaf:
            self.obey()
        return lambda: self._obeyed >= number

    def obey(self) -> None:
        for worker, order in self._left:
            if isinstance(order, orders.Unlisten) and worker in self.workers:
                slots.forget(self.table.mem, self.table.worker(worker.index), order.listener)
        self._obeyed += len(self._left)
        self._left.clear()

    def close(self) -> None:
        for worker in (*self.workers, self.continuation):
            os.close(worker.doorbell)
            os.close(worker.rope)


class Bed:
    """A supervisor's table, memory and service."""

    def __init__(self, netifs: list[messages.NetifInfo], **settings: Any) -> None:
        self.config = Config(name="bed", netif=(), sockets=SocketsSettings(max=SOCKETS), **settings)
        self.arena = Arena(1 << 36)
        capacities = (SOCKETS, WORKERS, 1, 8, 64, 8)
        place = self.arena.map_anonymous(Table.size(*capacities), shared=True)
        self.table = Table(self.arena.mem, place, *capacities)
        self.loop = Loop()
        self.crew = Crew(self.table)
        memory = Memory(self.arena, self.crew, str, 262144)     # type: ignore[arg-type]
        self.service = ControlService(
            Running(self.config, OWNER, os.getpid(), self.loop, self.table, self.crew, memory, netifs),  # type: ignore
            dict)
        self.descriptors: list[int] = []

    def ask(self, peer: Peer, request: messages.Request) -> Any:
        """The reply; a refusal is raised."""
        found: list[Any] = []

        async def task() -> None:
            try:
                found.append(await self.service.serve(peer, request))   # type: ignore[arg-type]
            except Exception as error:
                found.append(error)

        self.loop.spawn(task())
        self.settle(lambda: bool(found))
        if isinstance(found[0], Exception):
            raise found[0]
        reply, self.descriptors = found[0]
        return reply

    def settle(self, condition: Callable[[], bool] = lambda: False) -> None:
        """A few turns of the loop, or until the condition holds."""
        for _ in range(50):
            if condition():
                return
            self.loop._look()

    def attach(self, uid: int = 0) -> Peer:
        peer = Peer(uid, uid)
        self.ask(peer, messages.Attach(messages.PROTOCOL_VERSION, L.fingerprint()))
        return peer

    def listen(self, peer: Peer, port: int | None = 80, **more: Any) -> Any:
        return self.ask(peer, messages.Bind("tcp_listen", port=port, **(SMALL | more)))

    def connect(self, peer: Peer, remote: str = "10.77.0.2", port: int = 80, **more: Any) -> Any:
        return self.ask(peer, messages.Bind("tcp_connect", remote=(remote, port), **(SMALL | more)))

    def owner(self, peer: Peer) -> Any:
        return self.service.owners[peer]    # type: ignore[index]

    def spare(self) -> list[int]:
        return [number for number in range(SOCKETS) if self.table.is_spare(number)]

    def taken(self, listener: int, worker: int) -> int:
        """A worker makes a connection of a free slot."""
        w, head = self.table.worker(worker), self.table.slot_head(listener, worker)
        slots_take(self.table.mem, w)
        number = self.table.get(head) - 1
        assert self.table.is_spare(number)
        self.table.put(head, self.table.word(number, L.PCB_NEXT))
        self.table.put(self.table.pcb(number) + L.PCB_STATE, L.PCB_OPEN)
        return number

    def ended(self, *numbers: int) -> None:
        """The continuation worker reports connections that are over."""
        for number in numbers:
            self.table.put(self.table.pcb(number) + L.PCB_STATE, L.PCB_CLOSING)
        self.crew.heard(self.crew.continuation, orders.Freed(list(numbers)))
        self.settle()

    def close(self) -> None:
        self.crew.deaf = False
        self.crew.obey()
        for peer, owner in list(self.service.owners.items()):
            open_ones = [number for number in owner.connections if not self.table.is_spare(number)]
            self.service.gone(peer)
            self.settle()
            self.ended(*open_ones)
        self.settle()
        assert not self.service.retiring and not self.service._holders and not self.service._listeners
        assert self.table.room == SOCKETS
        self.crew.close()


def slots_take(mem: Any, w: int) -> None:
    from tests.pcb.test_slots import take

    take(mem, w, SOCKETS)


@pytest.fixture
def bed() -> Iterator[Bed]:
    made = Bed([TUN, FAR], access=(AccessSettings(uid=STRANGER, allow=(
        "tcp:8000-8010", "connect:443", "connect:10.77.0.9:22")),))
    before = len(os.listdir("/proc/self/fd"))
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) <= before


# -- listeners ---------------------------------------------------------------------------------------------


def test_a_listener_and_its_first_slots(bed: Bed) -> None:
    peer = bed.attach()
    bound = bed.listen(peer, address="10.77.0.1", backlog=7)
    assert (bound.address, bound.port) == ("10.77.0.1", 80)
    assert (bound.lane_bytes, bound.send_bytes, bound.receive_bytes) == (8192, 4096, 8192)
    numbers = bed.spare()
    assert len(numbers) == 14 and bed.table.word(bound.pcb, L.PCB_BACKLOG) == 7
    shape = Shape(8192, 4096, 8192)
    seen = set()
    for number in numbers:
        pcb, place = bed.table.pcb(number), bed.table.word(number, L.PCB_PLACE)
        assert bed.table.get(pcb + L.PCB_LISTENER) == bound.pcb + 1
        assert bed.table.get(pcb + L.PCB_BUFFERS) == 12 | 13 << 8
        assert bed.table.get(pcb + L.PCB_KIND) == L.PK_CONNECTION and bed.table.get(pcb + L.PCB_OWNER) == 1
        [segment] = bed.owner(peer).pools[shape]
        assert bed.table.word(number, L.PCB_SEGMENT) == segment.number and segment.segment.name is None
        assert place == segment.offset + bed.table.word(number, L.PCB_SLOT_AT) and place % 4096 == 0
        assert place + shape.slot_bytes(WORKERS) <= segment.offset + segment.segment.size
        seen.add(place)
        for worker in range(WORKERS):
            state = bed.table.lane_state(number, worker)
            assert bed.table.get(state + L.LS_BASE) == place + T.CONN_LANES + worker * (L.LANE_DATA + 8192)
            assert (bed.table.get(state + L.LS_MASK), bed.table.get(state + L.LS_WAKE)) == (8191, 0)
    assert len(seen) == 14
    shares = [bed.table.word(number, L.PCB_WORKER) for number in numbers]
    assert (shares.count(0), shares.count(1)) == (7, 7)
    assert any(isinstance(order, orders.Map) and worker is None for worker, order in bed.crew.told)


def test_slots_are_offered_only_when_all_workers_have_mapped_them(bed: Bed) -> None:
    peer = bed.attach()
    bed.crew.deaf = True
    found: list[Any] = []

    async def task() -> None:
        found.append(await bed.service.serve(peer, messages.Bind("tcp_listen", port=80, **SMALL)))  # type: ignore

    bed.loop.spawn(task())
    bed.settle()
    assert not found and bed.spare() == [] and list(bed.table.records()) == []
    bed.crew.deaf = False
    bed.crew.obey()
    bed.settle()
    assert found and len(bed.spare()) == SOCKETS // 2      # other sockets need room, too


def test_more_slots_are_made_when_they_run_short(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "RETRY", 0.0)
    peer = bed.attach()
    bound = bed.listen(peer, connections=21, backlog=4)
    want = bed.table.pcb(bound.pcb) + L.PCB_WANT
    for expected in (16, 21, 21):
        before = len(bed.spare())
        mine = [bed.taken(bound.pcb, 0) for _ in range(2)]
        bed.table.put(want, 1)
        bed.crew.heard(bed.crew.workers[0], orders.Want())
        bed.settle()
        assert len(bed.owner(peer).connections) == expected
        assert bed.table.get(want) == (2 if len(mine) + len(bed.spare()) == before else 0)
        bed.loop._ring_timers()         # if there were none, it may ask again after a while
        assert bed.table.get(want) == 0
        for number in mine:     # back to where it came from, as the continuation worker does
            bed.table.put(bed.table.pcb(number) + L.PCB_STATE, L.PCB_SLOT)
            assert bed.table.offer(number)
    bed.crew.heard(bed.crew.workers[0], orders.Want())      # nobody wants any more
    assert len(bed.owner(peer).connections) == 21


def test_new_slots_go_to_the_worker_that_has_none(bed: Bed) -> None:
    peer = bed.attach()
    bound = bed.listen(peer, backlog=8)
    used = [bed.taken(bound.pcb, 0) for _ in range(8)]
    bed.table.put(bed.table.pcb(bound.pcb) + L.PCB_WANT, 1)
    bed.crew.heard(bed.crew.workers[0], orders.Want())
    bed.settle()
    shares = [bed.table.word(number, L.PCB_WORKER) for number in bed.spare()]
    assert (shares.count(0), shares.count(1)) == (12, 12)
    assert not set(used) & set(bed.spare())


def test_a_table_that_is_full(bed: Bed) -> None:
    peer = bed.attach()
    bound = bed.listen(peer, backlog=40, connections=1000)
    for _ in range(5):
        bed.table.put(bed.table.pcb(bound.pcb) + L.PCB_WANT, 1)
        bed.crew.heard(bed.crew.workers[0], orders.Want())
        bed.settle()
    assert bed.table.room == 0 and len(bed.owner(peer).connections) == SOCKETS - 1
    for refused in (lambda: bed.listen(peer, 81), lambda: bed.connect(peer)):
        with pytest.raises(OSError) as error:
            refused()
        assert error.value.errno == errno.ENOBUFS


def test_a_listeners_end(bed: Bed) -> None:
    """Continuation worker, workers, continuation worker; what is in use stays until it is over."""
    peer = bed.attach()
    bound = bed.listen(peer, backlog=8)
    used, accepted = bed.taken(bound.pcb, 0), bed.taken(bound.pcb, 1)
    w = bed.table.worker(0)
    epoch.mark_online(bed.table.mem, w)
    bed.crew.told.clear()
    bed.ask(peer, messages.Close(bound.pcb, bound.generation))
    bed.settle()
    assert bed.crew.told == [] and len(bed.spare()) == 14, "a worker is in the middle of a burst"
    epoch.mark_offline(bed.table.mem, w)
    bed.settle()
    assert bed.crew.told == [(worker, orders.Unlisten(bound.pcb)) for worker in (WORKERS, 0, 1, WORKERS)]
    assert bed.spare() == [] and bed.table.room == SOCKETS - 2
    assert bed.table.word(used, L.PCB_LISTENER) == bed.table.word(accepted, L.PCB_LISTENER) == 0
    assert set(bed.owner(peer).connections) == {used, accepted}
    again = bed.listen(peer, backlog=7)     # the port is free, and the memory is used again
    assert len(bed.owner(peer).pools) == 1 and len(bed.spare()) == 14
    bed.ended(used, accepted, used)
    assert set(bed.owner(peer).connections) == set(bed.spare()) and len(bed.spare()) == 14
    assert bed.table.room == SOCKETS - 15 and again.port == 80


def test_a_connection_that_ends_while_its_listener_does(bed: Bed) -> None:
    """Its number may be another listener's slot by the time that the first one is taken apart."""
    peer = bed.attach()
    bound = bed.listen(peer, backlog=2)
    used = bed.taken(bound.pcb, 0)
    bed.crew.deaf = True
    bed.ask(peer, messages.Close(bound.pcb, bound.generation))
    bed.ended(used)
    bed.table._free.rotate(1)       # so that it is given out next
    bed.crew.deaf = False
    other = bed.listen(peer, 81, backlog=2)
    assert used in bed.spare() or used == other.pcb
    bed.crew.obey()
    bed.settle()
    assert len(bed.spare()) == 4 and set(bed.owner(peer).connections) == set(bed.spare())


def test_a_listener_that_closes_while_it_grows(bed: Bed) -> None:
    peer = bed.attach()
    bound = bed.listen(peer, backlog=2)
    bed.crew.deaf = True
    bed.table.put(bed.table.pcb(bound.pcb) + L.PCB_WANT, 1)
    bed.crew.heard(bed.crew.workers[0], orders.Want())
    bed.ask(peer, messages.Close(bound.pcb, bound.generation))
    bed.crew.deaf = False
    bed.crew.obey()
    bed.settle()
    assert bed.owner(peer).connections == {} and bed.table.room == SOCKETS
    [*segments] = bed.owner(peer).pools[Shape(8192, 4096, 8192)]
    assert sum(len(one.free) for one in segments) == 8


def test_slots_that_were_never_used_have_no_memory(bed: Bed) -> None:
    peer = bed.attach()
    bed.listen(peer, backlog=8, receive_bytes=1 << 20)
    [segment] = bed.owner(peer).pools[Shape(1 << 20, 4096, 1 << 20)]
    assert all(bed.table.counters(number)["published"] == 0 for number in bed.spare())
    ledger.unread(bed.table.mem, bed.table.offset)
    rx.ring_sockets(bed.table.mem, bed.table.offset)
    found = os.fstat(segment.segment.fd)
    assert found.st_size > 16 << 21 and found.st_blocks * 512 == 4096       # its header


def test_slots_that_were_used_are_cleared(bed: Bed) -> None:
    peer = bed.attach()
    for _ in range(3):
        bound = bed.connect(peer)
        place = bed.table.word(bound.pcb, L.PCB_PLACE)
        lane = bed.table.get(bed.table.lane_state(bound.pcb, 1) + L.LS_BASE)
        words = (place + T.CONN_LOCK, place + T.CONN_REQUEST, lane + L.LANE_HEAD, lane + L.LANE_CONSUMED)
        assert [bed.table.get(word) for word in words] == [0] * 4
        for word in words:
            bed.table.put(word, 77)
        bed.ended(bound.pcb)


def test_more_memory_than_there_is(bed: Bed) -> None:
    peer = bed.attach()
    with pytest.raises(OSError, match=r"\d{12,} bytes are more than the \d+ bytes") as error:
        bed.listen(peer, backlog=SOCKETS, receive_bytes=1 << 30, send_bytes=1 << 30)
    assert error.value.errno == errno.ENOMEM and bed.table.room == SOCKETS
    bed.listen(peer)


def test_a_worker_that_is_just_starting_is_waited_for(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stuck one is not."""
    monkeypatch.setattr(service, "GUARD", 0.0)
    peer = bed.attach()
    bed.crew.deaf, bed.crew.ready = True, False
    found: list[Any] = []

    async def task() -> None:
        try:
            found.append(await bed.service.serve(peer, messages.Bind("tcp_listen", port=80, **SMALL)))  # type: ignore
        except Exception as error:
            found.append(error)

    bed.loop.spawn(task())
    bed.settle()
    assert not found
    bed.crew.ready = True
    bed.settle()
    assert "has not answered" in str(found.pop())
    bed.crew.ready = False
    bed.loop.spawn(task())
    bed.settle()
    bed.crew.deaf = False
    bed.crew.obey()         # it has its orders carried out before it says that it is ready, or has inherited them
    bed.settle()
    assert isinstance(found[0], tuple)
    monkeypatch.setattr(service, "STARTING", 0.0)
    bed.crew.deaf = True
    with pytest.raises(DataplaneError, match="being replaced"):
        bed.listen(peer, 81)
    bed.crew.obey()


def test_a_port_has_one_listener(bed: Bed) -> None:
    peer, other = bed.attach(), bed.attach()
    bed.listen(peer, address="10.77.0.1", backlog=8)
    bed.listen(other, backlog=8)
    for wanted in ({}, {"address": "10.77.0.1"}, {"address": "::"}, {"reuseport": True}):
        with pytest.raises(OSError) as error:
            bed.listen(peer, **wanted)
        assert error.value.errno == errno.EADDRINUSE
    ports = {bed.listen(peer, 0, backlog=1).port for _ in range(5)}
    assert len(ports) == 5 and min(ports) >= 49152
    for one in (peer, other):
        bed.listen(one, 90, reuseport=True, backlog=1)


# -- connections -------------------------------------------------------------------------------------------


def test_a_connection_is_opened(bed: Bed) -> None:
    peer = bed.attach()
    bound = bed.connect(peer)
    assert (bound.address, bound.mtu) == ("10.77.0.1", 1400) and bound.segment is not None
    assert bound.segment.name is None and len(bed.descriptors) == 1
    families, local, port, remote = bed.table.key(bound.pcb)
    assert (families, local, port) == (L.KEY_FAMILY4, (0, 0x0A4D0001), bound.port)
    assert remote == (0, 0x0A4D0002, 80) and bed.table.word(bound.pcb, L.PCB_LISTENER) == 0
    assert bed.table.word(bound.pcb, L.PCB_STATE) == L.PCB_OPEN
    assert list(bed.table.records()) == [bound.pcb]
    with pytest.raises(OSError) as error:
        bed.ask(peer, messages.Bind("tcp_connect", port=bound.port, remote=("10.77.0.2", 80), **SMALL))
    assert error.value.errno == errno.EADDRINUSE
    bed.ended(bound.pcb)
    assert bed.owner(peer).connections == {} and bed.table.room == SOCKETS
    again = bed.connect(peer, "fd77::9")
    assert bed.table.word(again.pcb, L.PCB_PLACE) == bed.table.word(bound.pcb, L.PCB_PLACE)
    assert (again.address, again.number, again.slot) == ("fd77::1", bound.number, bound.slot)
    assert again.segment is None and bed.table.key(again.pcb)[0] == L.KEY_FAMILY6


@pytest.mark.parametrize(("remote", "local", "mtu"), [
    ("10.77.0.2", "10.77.0.1", 1400), ("10.77.0.70", "10.77.0.65", 9000), ("192.168.1.9", "192.168.1.1", 9000),
    ("8.8.8.8", "10.77.0.1", 1400), ("fd77::2", "fd77::1", 1400),
])
def test_routes(bed: Bed, remote: str, local: str, mtu: int) -> None:
    bound = bed.connect(bed.attach(), remote)
    assert (bound.address, bound.mtu) == (local, mtu)
    bound = bed.connect(next(iter(bed.service.owners)), remote, address="fd77::1" if ":" in remote else "10.77.0.65")
    assert bound.address in ("fd77::1", "10.77.0.65")


@pytest.mark.parametrize(("fields", "number"), [
    ({"kind": "tcp_connect"}, errno.EINVAL),
    ({"kind": "tcp_connect", "remote": ("10.77.0.2", 0)}, errno.EINVAL),
    ({"kind": "tcp_connect", "remote": ("10.77.0.2", 65536)}, errno.EINVAL),
    ({"kind": "tcp_connect", "remote": ("localhost", 1)}, errno.EINVAL),
    ({"kind": "tcp_connect", "remote": ("10.77.0.2", 1), "address": "fd77::1"}, errno.EINVAL),
    ({"kind": "tcp_connect", "remote": ("10.77.0.2", 1), "port": 65536}, errno.EINVAL),
    ({"kind": "tcp_connect", "remote": ("10.77.0.2", 1), "reuseport": True}, errno.EINVAL),
    ({"kind": "tcp_connect", "remote": ("10.77.0.2", 1), "send_bytes": 5000}, errno.EINVAL),
    ({"kind": "tcp_connect", "remote": ("10.77.0.2", 1), "ring_bytes": 8192}, errno.EINVAL),
    ({"kind": "tcp_connect", "remote": ("10.77.0.2", 1), "address": "10.77.0.2"}, errno.EADDRNOTAVAIL),
    *(({"kind": "tcp_connect", "remote": (remote, 1)}, errno.ENETUNREACH) for remote in (
        "10.77.0.1", "10.77.0.255", "255.255.255.255", "239.1.1.1", "0.0.0.0", "::", "ff02::1", "fd78::1")),
    ({"kind": "tcp_listen"}, errno.EINVAL),
    ({"kind": "tcp_listen", "port": 65536}, errno.EINVAL),
    ({"kind": "tcp_listen", "port": 80, "remote": ("10.77.0.2", 1)}, errno.EINVAL),
    ({"kind": "tcp_listen", "port": 80, "connections": 0}, errno.EINVAL),
    ({"kind": "tcp_listen", "port": 80, "receive_bytes": 2048}, errno.EINVAL),
    ({"kind": "tcp_listen", "port": 80, "ring_bytes": 8192}, errno.EINVAL),
    ({"kind": "tcp_listen", "port": 80, "address": "10.77.0.2"}, errno.EADDRNOTAVAIL),
    ({"kind": "tcp_listen", "port": 80, "address": "239.1.1.1"}, errno.EADDRNOTAVAIL),
    ({"kind": "udp", "port": 80, "send_bytes": 4096}, errno.EINVAL),
    ({"kind": "tcp"}, errno.EPROTONOSUPPORT),
])
def test_what_cannot_be_opened(bed: Bed, fields: dict[str, Any], number: int) -> None:
    peer = bed.attach()
    with pytest.raises(OSError) as error:
        bed.ask(peer, messages.Bind(**fields))
    assert error.value.errno == number and bed.table.room == SOCKETS


def test_a_passive_dataplane_has_no_tcp() -> None:
    bed = Bed([PASSIVE])
    peer = bed.attach()
    with pytest.raises(OSError, match="no TCP here") as error:
        bed.listen(peer)
    assert error.value.errno == errno.EADDRNOTAVAIL
    with pytest.raises(OSError, match="no TCP here") as error:
        bed.connect(peer)
    assert error.value.errno == errno.ENETUNREACH
    bed.close()


def test_defaults_come_from_the_configuration() -> None:
    bed = Bed([TUN], tcp=TcpSettings(send_bytes=8192, receive_bytes=16384))
    bound = bed.connect(bed.attach(), send_bytes=None, receive_bytes=None)
    assert (bound.send_bytes, bound.receive_bytes, bound.lane_bytes) == (8192, 16384, 16384)
    bed.close()


def test_a_connection_whose_opening_was_interrupted_is_reset(bed: Bed) -> None:
    peer, other = bed.attach(), bed.attach()
    bound = bed.connect(peer)
    for who, generation in ((peer, bound.generation + 1), (other, bound.generation)):
        with pytest.raises(OSError) as error:
            bed.ask(who, messages.Close(bound.pcb, generation))
        assert error.value.errno == errno.EBADF
    bed.crew.told.clear()
    bed.ask(peer, messages.Close(bound.pcb, bound.generation))
    assert bed.crew.told == [(WORKERS, orders.Reset(bound.pcb))]
    request = bed.table.get(bed.table.word(bound.pcb, L.PCB_PLACE) + T.CONN_REQUEST)
    assert request == T.REQ_ABORT | T.REQ_CLOSED | T.REQ_SHUTDOWN
    bed.ended(bound.pcb)
    assert bed.owner(peer).connections == {} and bed.table.room == SOCKETS


# -- owners ------------------------------------------------------------------------------------------------


def test_only_ones_own_segments(bed: Bed) -> None:
    peer, other = bed.attach(), bed.attach()
    bed.listen(peer, backlog=2)
    [segment] = bed.owner(peer).pools[Shape(8192, 4096, 8192)]
    given = bed.ask(peer, messages.SegmentOf(segment.number))
    told = given.segment
    assert (told.number, told.bytes, told.name) == (segment.number, segment.segment.size, None)
    assert bed.descriptors == [segment.segment.fd]
    rings = bed.connect(other).number
    for who, number in ((other, segment.number), (peer, rings), (peer, 0), (peer, 999)):
        with pytest.raises(OSError) as error:
            bed.ask(who, messages.SegmentOf(number))
        assert error.value.errno == errno.EBADF


def test_access(bed: Bed) -> None:
    stranger, owner = bed.attach(STRANGER), bed.attach(OWNER)
    bed.listen(stranger, 8000, backlog=1)
    bed.connect(stranger, port=443)
    bed.connect(stranger, "10.77.0.9", 22)
    bed.listen(owner, 1024, backlog=1)
    bed.connect(owner, port=22)
    for refused in (lambda: bed.listen(stranger, 8011), lambda: bed.listen(stranger, 443),
                    lambda: bed.connect(stranger, port=8000), lambda: bed.connect(stranger, port=22),
                    lambda: bed.listen(stranger, 8001, receive_bytes=1 << 21), lambda: bed.listen(owner, 1023),
                    lambda: bed.ask(stranger, messages.Bind("tcp_connect", port=5000, remote=("10.77.0.2", 443)))):
        with pytest.raises(PermissionError):
            refused()


def test_a_consumers_death(bed: Bed) -> None:
    """Its connections are the continuation worker's to end; its memory goes behind the last one."""
    peer = bed.attach()
    bound = bed.listen(peer)
    used, opened = bed.taken(bound.pcb, 0), bed.connect(peer).pcb
    owner = bed.owner(peer)
    bed.crew.told.clear()
    bed.service.gone(peer)      # type: ignore[arg-type]
    bed.settle()
    assert (WORKERS, orders.Abandon(owner.consumer)) in bed.crew.told
    assert set(owner.connections) == {used, opened} and bed.service.retiring == [owner]
    assert not any(isinstance(order, orders.Unmap) for _, order in bed.crew.told)
    with pytest.raises(OSError):
        bed.listen(peer)
    bed.ended(used)
    assert not any(isinstance(order, orders.Unmap) for _, order in bed.crew.told)
    bed.ended(opened)
    unmapped = [order for _, order in bed.crew.told if isinstance(order, orders.Unmap)]
    assert len(unmapped) == 4       # home, the listener's ring, the slots' segment, that of the opened connection
    assert bed.service.retiring == [] and bed.table.room == SOCKETS


# -- what is told ------------------------------------------------------------------------------------------


def test_sockets_are_listed(bed: Bed) -> None:
    peer = bed.attach()
    bound = bed.listen(peer, backlog=5, reuseport=True)
    opened = bed.connect(peer)
    place, block = bed.table.word(opened.pcb, L.PCB_PLACE), T.CONN_BLOCKS + T.TCB_BYTES
    for word, value in ((T.CONN_CURRENT, 1), (T.CONN_WRITTEN, 1001), (T.CONN_ACKED, 1), (T.CONN_RECEIVED, 501),
                        (T.CONN_READ, 401), (block + T.T_STATE, T.ESTABLISHED), (block + T.T_RCV_NXT, 501),
                        (block + T.T_SND_UNA, 1), (block + T.T_SND_NXT, 901), (block + T.T_CWND, 14600),
                        (block + T.T_SRTT, 1_500_000), (block + T.T_RTO, 200_000_000), (block + T.T_RETRANSMITS, 3)):
        bed.table.put(place + word, value)
    waiting = SOCKETS + 1
    start = bed.table.pcb(waiting)
    bed.table.mem[start:start + 64] = bed.table.mem[bed.table.pcb(opened.pcb):bed.table.pcb(opened.pcb) + 64]
    bed.table.put(start + L.PCB_KIND, L.PK_TIME_WAIT)
    listed = {one.pcb: one for one in bed.ask(peer, messages.Sockets()).sockets}
    assert set(listed) == {bound.pcb, opened.pcb, waiting}
    listener, connection, past = listed[bound.pcb], listed[opened.pcb], listed[waiting]
    assert (listener.kind, listener.state, listener.backlog, listener.local) == ("tcp", "listen", 5, ("*", 80))
    assert listener.reuseport and listener.connection is None
    assert (connection.kind, connection.state, connection.pid) == ("tcp", "established", 4711)
    assert connection.local == ("10.77.0.1", opened.port) and connection.remote == ("10.77.0.2", 80)
    tcb = connection.connection
    assert tcb is not None and (tcb.send_queue, tcb.receive_queue) == (1000, 100)
    assert (tcb.rcv_nxt, tcb.snd_una, tcb.snd_nxt, tcb.cwnd, tcb.retransmits) == (501, 1, 901, 14600, 3)
    assert (tcb.srtt, tcb.rto) == (1.5, 200.0)
    assert (past.state, past.local, past.remote) == ("time_wait", connection.local, connection.remote)
    bed.table.put(start + L.PCB_STATE, L.PCB_FREE)


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_the_list_does_not_believe_the_owner(bed: Bed, byte: int) -> None:
    peer = bed.attach()
    for _ in range(SOCKETS):
        opened = bed.connect(peer, "fd77::ffff:ffff:ffff:1234", 65535)
        place = bed.table.word(opened.pcb, L.PCB_PLACE)
        bed.table.mem[place:place + 4096 * 6] = byte
    reply = bed.ask(peer, messages.Sockets())
    assert len(reply.sockets) == PAGE == SOCKETS and reply.next == -1
    assert len(messages.encode(reply)) <= messages.MAX_MESSAGE
    for one in reply.sockets:
        assert one.connection is not None
        assert 0 <= one.connection.send_queue <= 4096 and 0 <= one.connection.receive_queue <= 8192
        assert all(value >= 0 for value in struct.unpack("2d", struct.pack(
            "2d", one.connection.srtt, one.connection.rto)))
    assert bed.ask(peer, messages.Sockets(60)).sockets == reply.sockets[60:]


def test_everybody_who_waits_is_woken_at_the_end(bed: Bed) -> None:
    """A connection's wake object is in its slot; slots without a wake object do not stop the walk."""
    peer = bed.attach()
    bed.listen(peer)
    places = [bed.table.word(bed.connect(peer).pcb, L.PCB_PLACE) + T.CONN_WAKE for _ in range(2)]
    for place in places:
        bed.table.put(place + L.WAKE_STATE, L.WAKE_PIPE)
    rx.ring_sockets(bed.table.mem, bed.table.offset)
    assert [bed.table.get(place + L.WAKE_STATE) for place in places] == [L.WAKE_AWAKE] * 2
