"""The client's end of the control socket against a server that says what the test tells it to."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dataplane
from dataplane.control import messages, paths
from dataplane.control.wire import Connection
from dataplane.errors import DataplaneError, LayoutMismatch, Stopped, UnknownDataplane

Answer = Callable[[socket.socket, bytes], None]


class Server:
    """Accepts one connection after another; `answer` gets each request."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen()
        self.answer = answer
        self.received: list[bytes] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(messages.MAX_MESSAGE):
                    self.received.append(data)
                    self.answer(connection, data)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)


def reply(message: messages.Message) -> Answer:
    return lambda connection, _: connection.send(messages.encode(message)) and None


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DATAPLANE_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def serve(runtime: Path) -> Iterator[Callable[[Answer], Server]]:
    servers = []

    def start(answer: Answer) -> Server:
        servers.append(Server(runtime / "edge0.sock", answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_request_and_reply(serve: Callable[[Answer], Server]) -> None:
    serve(reply(messages.Ledger({"offered": 3})))
    with Connection.open("edge0") as connection:
        assert connection.request(messages.Stats(), messages.Ledger)[0].ledger == {"offered": 3}
        assert not connection.ended()
        with pytest.raises(DataplaneError, match="answered Ledger, not Done"):
            connection.request(messages.Stats(), messages.Done)


def test_descriptors_come_along(serve: Callable[[Answer], Server]) -> None:
    inner, outer = os.pipe()
    serve(lambda connection, _: socket.send_fds(connection, [messages.encode(messages.Evented(4))], [outer]) and None)
    with Connection.open("edge0") as connection:
        evented, descriptors = connection.request(messages.Event(), messages.Evented)
        assert evented.number == 4 and len(descriptors) == 1 and not os.get_inheritable(descriptors[0])
        os.write(descriptors[0], b"through")
        assert os.read(inner, 16) == b"through"
        os.close(descriptors[0])
    os.close(inner)
    os.close(outer)


@pytest.mark.parametrize(("number", "kind"), [
    (errno.EADDRINUSE, OSError), (errno.EACCES, PermissionError), (errno.EPERM, PermissionError),
    (0, DataplaneError), (errno.EBADF, OSError),
])
def test_refusals(serve: Callable[[Answer], Server], number: int, kind: type[Exception]) -> None:
    serve(reply(messages.Failure(number, "because")))
    with Connection.open("edge0") as connection:
        with pytest.raises(kind, match="because") as error:
            connection.request(messages.Stats(), messages.Ledger)
        assert getattr(error.value, "errno", 0) == number
        with pytest.raises(kind, match="because"):
            connection.pipeline([messages.Close(1, 1)] * 100, messages.Done)


def test_attaching_to_another_version(serve: Callable[[Answer], Server]) -> None:
    serve(reply(messages.Failure(errno.EPROTO, "another version")))
    with pytest.raises(LayoutMismatch, match="another version"):
        dataplane.attach("edge0")


@pytest.mark.parametrize("data", [b"\x81", b"not msgpack", b"\x81\xa4type\xa3new"])
def test_an_answer_that_is_none(serve: Callable[[Answer], Server], data: bytes) -> None:
    serve(lambda connection, _: connection.send(data) and None)
    with pytest.raises(LayoutMismatch, match="another version of the control protocol"):
        dataplane.attach("edge0")


def test_hanging_up_is_the_end(serve: Callable[[Answer], Server]) -> None:
    serve(lambda connection, _: connection.shutdown(socket.SHUT_RDWR))
    with Connection.open("edge0") as connection:
        for _ in range(2):
            with pytest.raises(Stopped, match="'edge0' has ended"):
                connection.request(messages.Stats(), messages.Ledger)
        assert connection.ended()
    with pytest.raises(Stopped):
        connection.request(messages.Stats(), messages.Ledger)


def test_a_late_reply_is_not_taken_for_the_next(serve: Callable[[Answer], Server]) -> None:
    late = threading.Event()
    read, write = os.pipe()

    def answer(connection: socket.socket, data: bytes) -> None:
        if isinstance(messages.decode_request(data), messages.Event):
            late.wait(10)
            socket.send_fds(connection, [messages.encode(messages.Evented(1))], [write])
        else:
            connection.send(messages.encode(messages.Done()))

    serve(answer)
    with Connection.open("edge0") as connection:
        with pytest.raises(DataplaneError, match="does not answer"):
            connection.request(messages.Event(), messages.Evented, timeout=0.01)
        late.set()
        assert connection.request(messages.Close(1, 1), messages.Done)[0] == messages.Done()
        assert [type(one) for one, _ in connection.orphans] == [messages.Evented]
        os.close(write)
    assert os.read(read, 1) == b""      # nobody holds the other end any more
    os.close(read)


def test_pipelined_requests_keep_their_order(serve: Callable[[Answer], Server]) -> None:
    def answer(connection: socket.socket, data: bytes) -> None:
        request = messages.decode_request(data)
        assert isinstance(request, messages.Sockets)
        connection.send(messages.encode(messages.SocketList([], request.start)))

    serve(answer)
    with Connection.open("edge0") as connection:
        replies = connection.pipeline([messages.Sockets(i) for i in range(500)], messages.SocketList)
    assert [one.next for one in replies] == list(range(500))


def test_unknown_names_where_it_looked_and_what_is_there(serve: Callable[[Answer], Server], runtime: Path) -> None:
    serve(reply(messages.Done()))
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(runtime / "killed.sock"))
    stale.close()
    for name in ("edge1", "killed", "", "../edge0", "a/b", "a\0b"):
        with pytest.raises(UnknownDataplane) as error:
            dataplane.attach(name)
        assert str(runtime) in str(error.value) and "/run/dataplane" in str(error.value)
        assert "edge0" in str(error.value) and ", killed" not in str(error.value)
    assert paths.names(runtime) == ["edge0", "killed"]


def test_none_is_there(runtime: Path) -> None:
    with pytest.raises(UnknownDataplane, match=r"running here"):
        dataplane.attach("edge0")


def test_where_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATAPLANE_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert [str(path) for path in paths.search_directories()] == ["/run/user/1000/dataplane", "/run/dataplane"]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(paths.runtime_directory()) == "/tmp/dataplane-1000"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert [str(path) for path in paths.search_directories()] == ["/run/dataplane"]
    assert paths.socket_path(paths.SYSTEM, "a") == Path("/run/dataplane/a.sock")
    assert paths.lock_path(paths.SYSTEM, "a") == Path("/run/dataplane/a.lock")


def test_importing_is_light() -> None:
    program = """
import sys, dataplane
assert "numba" not in sys.modules and "numpy" not in sys.modules
assert set(dataplane.__all__) <= set(dir(dataplane))
for name in dataplane.__all__:
    getattr(dataplane, name)
assert "numba" in sys.modules
try:
    dataplane.nothing
except AttributeError:
    pass
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
