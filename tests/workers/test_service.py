"""What consumers ask for: answers, refusals, and what other users get."""

from __future__ import annotations

import errno
import fcntl
import os
import traceback
from collections.abc import Callable, Iterator

import pytest

from dataplane.control import messages
from dataplane.control.wire import Connection
from dataplane.errors import LayoutMismatch
from dataplane.shm import layout as L
from dataplane.shm.segment import Segment
from tests.workers.rig import Running, bind, wait_for

pytestmark = pytest.mark.timeout(300)
STRANGER = 54321        # a uid without a name
RULES = f"""
[[access]]
uid = {STRANGER}
allow = ["udp:5000-5010", "udp:53", "raw:1"]
[[access]]
gid = {STRANGER + 1}
allow = ["tap"]
"""


@pytest.fixture(scope="module")
def dp() -> Iterator[Running]:
    with Running(rate=1000, extra=RULES) as running:
        yield running
        assert running.interrupt() == 0
        assert running.ledger["balanced"] and running.remains() == []


@pytest.fixture
def consumer(dp: Running) -> Iterator[Connection]:
    connection, _ = dp.attach()
    with connection:
        yield connection
    wait_for(lambda: dp.sockets() == [], "the sockets' end")


def test_attached_says_what_a_consumer_needs(dp: Running) -> None:
    connection, attached = dp.attach()
    with connection:
        assert (attached.name, attached.pid, attached.workers) == (dp.name, dp.process.pid, 1)
        assert attached.ring_bytes == 65536 and attached.tx_ring_bytes == 262144
        assert [(one.kind, one.passive) for one in attached.netifs] == [("synthetic", True)]
        segment = Segment.open(attached.home.name or "")
        assert segment.kind == L.SEG_HOME and segment.size == attached.home.bytes
        segment.close()
        assert os.stat(f"/dev/shm{attached.home.name}").st_mode & 0o777 == 0o600


def test_another_version_is_refused(dp: Running) -> None:
    with dp.connect() as connection:
        for version, fingerprint in ((messages.PROTOCOL_VERSION, 1), (99, L.fingerprint())):
            with pytest.raises(LayoutMismatch, match="another version"):
                connection.request(messages.Attach(version, fingerprint), messages.Attached)


def test_order_of_requests(dp: Running, consumer: Connection) -> None:
    with dp.connect() as observer, pytest.raises(OSError) as refused:
        bind(observer, kind="tap")
    assert refused.value.errno == errno.ENOTCONN
    with pytest.raises(OSError) as again:
        consumer.request(messages.Attach(messages.PROTOCOL_VERSION, L.fingerprint()), messages.Attached)
    assert again.value.errno == errno.EISCONN


@pytest.mark.parametrize(("fields", "number"), [
    ({"kind": "tcp"}, errno.EPROTONOSUPPORT),
    ({"kind": "udp", "address": "localhost", "port": 1}, errno.EINVAL),
    ({"kind": "udp", "address": "fe80::1%eth0", "port": 1}, errno.EINVAL),
    ({"kind": "udp", "port": 65536}, errno.EINVAL),
    ({"kind": "udp", "port": -1}, errno.EINVAL),
    ({"kind": "udp", "port": 5, "ring_bytes": 5000}, errno.EINVAL),
    ({"kind": "udp", "port": 5, "ring_bytes": 2048}, errno.EINVAL),
    ({"kind": "udp", "port": 5, "ring_bytes": 1 << 40}, errno.EINVAL),
    ({"kind": "udp", "address": "10.0.0.1", "port": 5, "remote": ("fd00::1", 5)}, errno.EINVAL),
    ({"kind": "udp", "port": 5, "remote": ("0.0.0.0", 5)}, errno.EINVAL),
    ({"kind": "udp", "port": 5, "remote": ("10.0.0.1", 0)}, errno.EINVAL),
    ({"kind": "raw", "port": 5}, errno.EINVAL),
    ({"kind": "raw", "proto": 256}, errno.EINVAL),
    ({"kind": "tap", "address": "10.0.0.1"}, errno.EINVAL),
    ({"kind": "tap", "reuseport": True}, errno.EINVAL),
])
def test_what_cannot_be_bound(consumer: Connection, fields: dict, number: int) -> None:
    with pytest.raises(OSError) as refused:
        bind(consumer, **fields)
    assert refused.value.errno == number


def test_sockets_are_listed_as_they_were_bound(dp: Running, consumer: Connection) -> None:
    bind(consumer, kind="udp", address="10.0.0.1", port=5353)
    bind(consumer, kind="udp", address="::", port=5353)
    bind(consumer, kind="udp")
    bound = bind(consumer, kind="udp", remote=("10.0.0.9", 53))
    bind(consumer, kind="raw", proto=1, reuseport=True)
    bind(consumer, kind="tap")
    assert bound.port is not None and bound.port >= 49152
    found = {(one.kind, one.proto, one.local, one.remote, one.reuseport) for one in dp.sockets()}
    assert found == {
        ("udp", 17, ("10.0.0.1", 5353), None, False), ("udp", 17, ("::", 5353), None, False),
        ("udp", 17, ("*", None), None, False), ("udp", 17, ("0.0.0.0", bound.port), ("10.0.0.9", 53), False),
        ("raw", 1, ("*", None), None, True), ("tap", 0, ("*", None), None, False)}
    assert {(one.pid, one.uid) for one in dp.sockets()} == {(os.getpid(), os.geteuid())}


def test_port_zero_is_an_unused_one(consumer: Connection) -> None:
    ports = [bind(consumer, kind="udp", address="0.0.0.0", port=0).port for _ in range(10)]
    assert len(set(ports)) == 10 and all(port and port >= 49152 for port in ports)


def test_slots_are_used_again(consumer: Connection) -> None:
    first = bind(consumer, kind="udp", port=6000)
    places = set()
    for _ in range(50):
        bound = bind(consumer, kind="udp", port=6001)
        places.add((bound.number, bound.slot))
        assert bound.slot != first.slot or bound.number != first.number
        consumer.request(messages.Close(bound.pcb, bound.generation), messages.Done)
    assert len(places) <= 3


def test_only_ones_own_sockets(dp: Running, consumer: Connection) -> None:
    bound = bind(consumer, kind="udp", port=6000)
    other, _ = dp.attach()
    with other:
        for request in (messages.Close(bound.pcb, bound.generation),
                        messages.SetWake([(bound.pcb, bound.generation)], 0)):
            with pytest.raises(OSError) as refused:
                other.request(request, messages.Done)
            assert refused.value.errno == errno.EBADF
    with pytest.raises(OSError):
        consumer.request(messages.Close(bound.pcb, bound.generation + 1), messages.Done)
    with pytest.raises(OSError):
        consumer.request(messages.SetWake([(bound.pcb, bound.generation)], 64), messages.Done)
    consumer.request(messages.SetWake([(bound.pcb, bound.generation)], 63), messages.Done)
    consumer.request(messages.SetWake([(bound.pcb, bound.generation)], -1), messages.Done)


def test_bells(consumer: Connection) -> None:
    numbers = set()
    for _ in range(3):
        evented, [descriptor] = consumer.request(messages.Event(), messages.Evented)
        numbers.add(evented.number)
        os.close(descriptor)
    assert len(numbers) == 3 and 0 not in numbers


def test_the_table_can_be_full(dp: Running, consumer: Connection) -> None:
    for port in range(2000, 2256):      # sockets.max
        bind(consumer, kind="udp", port=port, ring_bytes=4096)
    assert len(dp.sockets()) == 256
    with pytest.raises(OSError) as refused:
        bind(consumer, kind="udp", port=3000, ring_bytes=4096)
    assert refused.value.errno == errno.ENOBUFS


def test_garbage_ends_only_its_sender(dp: Running, consumer: Connection) -> None:
    bind(consumer, kind="udp", port=6000)
    with dp.connect() as vandal:
        vandal._socket.send(os.urandom(1000))
        assert isinstance(messages.decode_reply(vandal._socket.recv(65536)), messages.Failure)
        assert vandal._socket.recv(1) == b""
    assert len(dp.sockets()) == 1


# -- other users -------------------------------------------------------------------------------------------


def as_stranger(uid: int, gid: int, act: Callable[[], None]) -> None:
    """Run `act` in a child that has given up its privileges; an exception there fails the test."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def refused(connection: Connection, **fields: object) -> bool:
    try:
        bind(connection, **fields)
    except PermissionError:
        return True
    return False


@pytest.mark.root
def test_a_stranger_gets_what_the_rules_say(dp: Running) -> None:
    def act() -> None:
        connection, _ = dp.attach()
        with connection:
            bind(connection, kind="udp", port=5000)
            bind(connection, kind="udp", address="0.0.0.0", port=53)
            bind(connection, kind="raw", proto=1)
            assert refused(connection, kind="udp", port=5011)
            assert refused(connection, kind="udp")
            assert refused(connection, kind="raw")
            assert refused(connection, kind="tap")
            assert refused(connection, kind="udp", port=5001, ring_bytes=1 << 24)
            assert [one.uid for one in dp.sockets()] == [STRANGER] * 3

    as_stranger(STRANGER, STRANGER, act)
    wait_for(lambda: dp.sockets() == [], "the sockets' end")


@pytest.mark.root
def test_a_strangers_reuseport_group_is_his(dp: Running, consumer: Connection) -> None:
    """A port is shared with sockets of the same user only."""
    bind(consumer, kind="udp", port=5002, reuseport=True)

    def act() -> None:
        connection, _ = dp.attach()
        with connection:
            for _ in range(3):
                bind(connection, kind="udp", port=5000, reuseport=True)
                bind(connection, kind="raw", proto=1, reuseport=True)
            with pytest.raises(OSError, match="in use"):
                bind(connection, kind="udp", port=5002, reuseport=True)

    as_stranger(STRANGER, STRANGER, act)


@pytest.mark.root
def test_a_group_and_nobody(dp: Running) -> None:
    def member() -> None:
        connection, _ = dp.attach()
        with connection:
            bind(connection, kind="tap")
            assert refused(connection, kind="udp", port=5000)

    def nobody() -> None:
        connection, _ = dp.attach()
        with connection:
            assert refused(connection, kind="udp", port=5000) and refused(connection, kind="tap")

    as_stranger(STRANGER + 7, STRANGER + 1, member)
    as_stranger(STRANGER + 7, STRANGER + 7, nobody)
    wait_for(lambda: dp.sockets() == [], "the sockets' end")


@pytest.mark.root
def test_a_strangers_memory_is_sealed(dp: Running) -> None:
    def act() -> None:
        with dp.connect() as connection:
            attached, [_, home] = connection.request(
                messages.Attach(messages.PROTOCOL_VERSION, L.fingerprint()), messages.Attached)
            assert attached.home.name is None
            bound, [rings] = connection.request(messages.Bind("udp", port=5000), messages.Bound)
            assert bound.segment is not None and bound.segment.name is None
            for descriptor, kind in ((home, L.SEG_HOME), (rings, L.SEG_RINGS)):
                assert Segment.from_fd(os.dup(descriptor)).kind == kind
                seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
                assert seals & fcntl.F_SEAL_SHRINK and seals & fcntl.F_SEAL_GROW and seals & fcntl.F_SEAL_SEAL
                try:
                    os.ftruncate(descriptor, 0)
                except PermissionError:
                    continue
                raise AssertionError("could be truncated")

    as_stranger(STRANGER, STRANGER, act)


@pytest.mark.root
def test_a_stranger_cannot_open_others_memory(dp: Running, consumer: Connection) -> None:
    bound = bind(consumer, kind="udp", port=6000)
    assert bound.segment is not None and bound.segment.name is not None
    name = bound.segment.name

    def act() -> None:
        for one in (name, f"/dataplane.0.{dp.name}.table"):
            try:
                Segment.open(one)
            except PermissionError:
                continue
            raise AssertionError(f"{one} could be opened")

    as_stranger(STRANGER, STRANGER, act)


@pytest.mark.root
def test_strangers_connections_are_limited(dp: Running) -> None:
    def act() -> None:
        connections = [dp.connect() for _ in range(256)]
        extra = dp.connect()
        reply = messages.decode_reply(extra._socket.recv(65536))
        assert isinstance(reply, messages.Failure) and reply.errno == errno.EAGAIN
        for one in [*connections, extra]:
            one.close()

    as_stranger(STRANGER, STRANGER, act)
    with dp.connect() as connection:
        connection.request(messages.Stats(), messages.Ledger)
