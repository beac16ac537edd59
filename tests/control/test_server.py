"""The control server: one reply to each request, and an end to whoever speaks something else."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dataplane.control import messages, server
from dataplane.control.loop import Loop
from dataplane.control.server import Answer, Peer, Server
from dataplane.errors import DataplaneError


class Service:
    """Answers `Sockets(start)` in ways that the number chooses."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.ended = threading.Event()
        self.seen: list[Peer] = []

    async def serve(self, peer: Peer, request: messages.Request) -> Answer:
        self.seen.append(peer)
        assert isinstance(request, messages.Sockets)
        if request.start == 1:
            raise OSError(errno.EADDRINUSE, "taken")
        if request.start == 2:
            raise DataplaneError("no")
        if request.start == 3:
            raise ZeroDivisionError("a mistake")
        if request.start == 4:
            await self.loop.until(lambda: len(self.seen) > 1)       # until somebody else asks
        if request.start == 5:
            read, write = os.pipe()
            os.write(write, b"hello")
            os.close(write)
            return messages.Done(), [read]
        return messages.SocketList([], request.start), ()

    def gone(self, peer: Peer) -> None:
        self.ended.set()


class Rig:
    """A server in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = Loop()
        self.service = Service(self.loop)
        self.server = Server(self.loop, path, self.service)
        self._stop, theirs = socket.socketpair()
        self._theirs = theirs
        self.loop.watch(theirs.fileno(), self.loop.stop)
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(10)
        connection.connect(str(self.path))
        return connection

    def close(self) -> None:
        self._stop.send(b"x")
        self._thread.join()
        self.server.close()
        self._stop.close()
        self._theirs.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "x.sock")
    yield rig
    rig.close()
    assert not rig.path.exists()


def ask(connection: socket.socket, start: int) -> messages.Reply:
    connection.send(messages.encode(messages.Sockets(start)))
    return messages.decode_reply(connection.recv(messages.MAX_MESSAGE))


def test_requests_are_answered(rig: Rig) -> None:
    assert rig.path.stat().st_mode & 0o777 == 0o666
    with rig.connect() as connection:
        assert ask(connection, 0) == messages.SocketList([], 0)
        assert ask(connection, 1) == messages.Failure(errno.EADDRINUSE, "taken")
        assert ask(connection, 2) == messages.Failure(0, "no")
        assert ask(connection, 0) == messages.SocketList([], 0)
        peer = rig.service.seen[0]
        assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())


def test_a_mistake_of_ours_does_not_end_others(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    with rig.connect() as connection:
        reply = ask(connection, 3)
        assert isinstance(reply, messages.Failure) and reply.errno == errno.EIO
        assert ask(connection, 0) == messages.SocketList([], 0)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_requests_in_a_row_are_answered_in_order(rig: Rig) -> None:
    with rig.connect() as connection:
        for start in range(10, 40):
            connection.send(messages.encode(messages.Sockets(start)))
        for start in range(10, 40):
            assert messages.decode_reply(connection.recv(65536)) == messages.SocketList([], start)


def test_a_request_that_waits_holds_nobody_else_up(rig: Rig) -> None:
    with rig.connect() as patient, rig.connect() as other:
        patient.send(messages.encode(messages.Sockets(4)))
        while not rig.service.seen:
            pass
        assert ask(other, 0) == messages.SocketList([], 0)
        assert messages.decode_reply(patient.recv(65536)) == messages.SocketList([], 4)


def test_descriptors_come_beside_the_reply(rig: Rig) -> None:
    with rig.connect() as connection:
        connection.send(messages.encode(messages.Sockets(5)))
        data, [descriptor], _, _ = socket.recv_fds(connection, 65536, 4)
        assert messages.decode_reply(data) == messages.Done()
        assert os.read(descriptor, 9) == b"hello"
        os.close(descriptor)


GARBAGE = [
    b"\0", b"\xff" * 100, b"GET / HTTP/1.0\r\n\r\n", msgspec.msgpack.encode({"type": "nonsense"}),
    msgspec.msgpack.encode({"type": "sockets", "start": "one"}),
    msgspec.msgpack.encode({"type": "sockets", "start": 0, "more": 1}),
    msgspec.msgpack.encode([1, 2, 3]), msgspec.msgpack.encode({"type": "bind"}),
    msgspec.msgpack.encode({"type": "sockets"}) + b"\0", b"\x81" * 60000, b"\xdb\xff\xff\xff\xff",
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_closes_the_connection(rig: Rig, data: bytes) -> None:
    with rig.connect() as connection, rig.connect() as other:
        connection.send(data)
        reply = messages.decode_reply(connection.recv(65536))
        assert isinstance(reply, messages.Failure) and reply.errno == errno.EBADMSG
        assert connection.recv(1) == b""
        assert rig.service.ended.wait(10)
        assert ask(other, 0) == messages.SocketList([], 0)


def test_a_message_that_is_too_long_closes_the_connection(rig: Rig) -> None:
    with rig.connect() as connection:
        connection.send(bytes(messages.MAX_MESSAGE + 1))
        assert isinstance(messages.decode_reply(connection.recv(65536)), messages.Failure)
        assert connection.recv(1) == b""


def test_descriptors_that_are_sent_to_us_are_closed(rig: Rig) -> None:
    read, write = os.pipe()
    with rig.connect() as connection:
        socket.send_fds(connection, [messages.encode(messages.Sockets(0))], [write])
        os.close(write)
        messages.decode_reply(connection.recv(65536))
        assert os.read(read, 1) == b""      # nobody holds the other end
    os.close(read)


def test_who_does_not_read_is_dropped(rig: Rig) -> None:
    with rig.connect() as connection:
        connection.setblocking(False)
        request = messages.encode(messages.Sockets(0))
        while not rig.service.ended.wait(0.0001):
            try:
                connection.send(request)
            except BlockingIOError:
                continue
            except OSError:
                break
        assert rig.service.ended.wait(10)
    with rig.connect() as other:
        assert ask(other, 0) == messages.SocketList([], 0)


def test_connections_are_limited(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    connections = [rig.connect() for _ in range(3)]
    for connection in connections:
        assert ask(connection, 0) == messages.SocketList([], 0)
    with rig.connect() as refused:
        reply = messages.decode_reply(refused.recv(65536))
        assert isinstance(reply, messages.Failure) and reply.errno == errno.EAGAIN
        assert refused.recv(1) == b""
    connections.pop().close()
    assert rig.service.ended.wait(10)
    with rig.connect() as again:
        assert ask(again, 0) == messages.SocketList([], 0)
    for connection in connections:
        connection.close()
