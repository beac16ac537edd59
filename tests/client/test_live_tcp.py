"""The client library's TCP through a running dataplane, with the kernel of this machine as the peer, over TUN.

That the protocol is right is the matter of tests/live; here it is about the calls.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dataplane
from dataplane.client import tcp_run
from dataplane.config import TcpSettings
from dataplane.control import messages
from dataplane.shm import layout_tcp as T
from tests.client.local import in_thread
from tests.dataplane_fixture import Running, running
from tests.netns import Namespace

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

OURS = {socket.AF_INET: "10.77.0.1", socket.AF_INET6: "fd77::1"}
KERNELS = {socket.AF_INET: "10.77.0.2", socket.AF_INET6: "fd77::2"}
CONFIG = f"""
[rx]
cores = [{min(os.sched_getaffinity(0))}]
idle = "adaptive"
[sockets]
max = 8192
[[netif]]
kind = "tun"
device = "dpt0"
addresses = ["10.77.0.1/24", "fd77::1/64"]
"""


@pytest.fixture(scope="module")
def tun() -> Iterator[Running]:
    with Namespace() as namespace, namespace.entered(), running(CONFIG) as process:
        yield process


@pytest.fixture
def dp(tun: Running) -> Iterator[dataplane.Dataplane]:
    with dataplane.attach(tun.name) as dp:
        yield dp


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> int:
    return request.param


def connect(port: int, family: int = socket.AF_INET) -> socket.socket:
    peer = socket.socket(family, socket.SOCK_STREAM)
    peer.settimeout(20)
    peer.connect((OURS[socket.AddressFamily(family)], port))
    return peer


def accept(listener: dataplane.Listener) -> dataplane.Connection:
    connection, address = listener.accept(20)
    assert address == connection.getpeername()
    connection.settimeout(20)
    return connection


def test_both_ways_in(dp: dataplane.Dataplane, family: int) -> None:
    with dp.tcp_listen(None, 8001) as listener, connect(8001, family) as peer, accept(listener) as connection:
        assert connection.getpeername() == peer.getsockname()[:2]
        assert connection.getsockname() == peer.getpeername()[:2] and connection.family == family
        peer.sendall(b"to you")
        assert connection.recv(100) == b"to you"
        connection.sendall(b"to me")
        assert peer.recv(100) == b"to me"
        peer.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
        connection.sendall(b"after the end")
        connection.close()
        assert peer.recv(100) == b"after the end" and peer.recv(100) == b""


def test_connecting(dp: dataplane.Dataplane, family: int) -> None:
    ours, theirs = OURS[socket.AddressFamily(family)], KERNELS[socket.AddressFamily(family)]
    with socket.create_server((theirs, 0), family=family) as server:
        host, port = server.getsockname()[:2]
        with dp.tcp_connect(host, port, timeout=20, local=(ours, 4321)) as connection:
            peer, address = server.accept()
            with peer:
                assert address[:2] == connection.getsockname() == (ours, 4321)
                connection.settimeout(20)
                connection.sendall(b"x" * 100_000)
                connection.shutdown(socket.SHUT_WR)
                data = b""
                while piece := peer.recv(65536):
                    data += piece
                assert data == b"x" * 100_000
                with pytest.raises(BrokenPipeError):
                    connection.send(b"y")


def test_refused_unreachable_and_timed_out(dp: dataplane.Dataplane) -> None:
    with pytest.raises(ConnectionRefusedError):
        dp.tcp_connect("10.77.0.2", 9, timeout=20)
    with pytest.raises(TimeoutError):
        dp.tcp_connect("10.77.0.77", 9, timeout=0.3)
    with pytest.raises(OSError) as nowhere:
        dp.tcp_connect("192.0.2.1", 9, timeout=1)
    assert nowhere.value.errno == errno.ENETUNREACH
    with dp.tcp_listen("10.77.0.1", 8002), pytest.raises(OSError) as taken:
        dp.tcp_listen("10.77.0.1", 8002)
    assert taken.value.errno == errno.EADDRINUSE
    with pytest.raises(ConnectionRefusedError):
        connect(8002)


@pytest.mark.parametrize("size", [1, 1 << 24])
def test_the_same_bytes_come_back(dp: dataplane.Dataplane, size: int) -> None:
    data = os.urandom(size)
    with dp.tcp_listen("10.77.0.1", 8003) as listener, connect(8003) as peer, accept(listener) as connection:
        def echo() -> None:
            buffer = bytearray(1 << 20)
            while count := connection.recv_into(buffer):
                connection.sendall(memoryview(buffer)[:count])
            connection.shutdown(socket.SHUT_WR)

        threads = [in_thread(echo)[0], in_thread(lambda: (peer.sendall(data), peer.shutdown(socket.SHUT_WR)))[0]]
        digest = hashlib.sha256()
        while piece := peer.recv(1 << 20):
            digest.update(piece)
        for thread in threads:
            thread.join(20)
        assert digest.digest() == hashlib.sha256(data).digest()


def test_an_interrupted_opening_leaves_nothing(dp: dataplane.Dataplane) -> None:
    """Nobody waited for the reply: it is found with the next one, and what it was about is closed."""
    session = dp._session
    before = dp.stats()["sockets"]
    for request in (messages.Bind("tcp_connect", remote=("10.77.0.2", 9)), messages.Bind("udp", port=0)):
        session.connection._send(request, time.monotonic() + 10)
        with dp.udp(port=0):
            deadline = time.monotonic() + 20
            while dp.stats()["sockets"] != before + 1:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert session.connection.orphans == []


def test_time_wait_is_as_long_as_configured(dp: dataplane.Dataplane) -> None:
    bench = dp._workbench()
    [told] = dp._session.memory.words(bench.place + tcp_run.B_X + T.X_TIME_WAIT)[:1]
    assert told == dp._session.attached.time_wait_ns == int(TcpSettings().time_wait * 1e9)


def test_a_reset_by_the_peer(dp: dataplane.Dataplane) -> None:
    with dp.tcp_listen("10.77.0.1", 8004) as listener, connect(8004) as peer, accept(listener) as connection:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
        with pytest.raises(ConnectionResetError):
            connection.recv(10)
    with dp.tcp_listen("10.77.0.1", 8004) as listener, connect(8004) as peer, accept(listener) as connection:
        connection.abort()
        with pytest.raises(ConnectionResetError):
            peer.recv(10)


def test_written_closed_and_gone(tun: Running) -> None:
    """A process writes, closes and ends; another writes and just ends. Everything arrives."""
    program = """
import sys, dataplane
dp = dataplane.attach(sys.argv[1])
listener = dp.tcp_listen("10.77.0.1", 8005)
print("ready", flush=True)
connection, _ = listener.accept(20)
connection.sendall(b"x" * 50000)
if sys.argv[2] == "close":
    connection.close()
    dp.close()
"""
    for how in ("close", "exit"):
        process = subprocess.Popen([sys.executable, "-c", program, tun.name, how], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with connect(8005) as peer:
            got = 0
            while piece := peer.recv(65536):
                got += len(piece)
            assert got == 50000, how
        assert process.wait(20) == 0
        process.stdout.close()


def test_many_in_sequence(dp: dataplane.Dataplane) -> None:
    """More than there are slots: each is given back."""
    count = 600
    with dp.tcp_listen("10.77.0.1", 8006, connections=64) as listener:
        def clients() -> None:
            for _ in range(count):
                with connect(8006) as peer:
                    assert peer.recv(1) == b""

        thread, result = in_thread(clients)
        for _ in range(count):
            accept(listener).close()
        thread.join(60)
        assert result == [None]


def test_streams_unchanged(dp: dataplane.Dataplane) -> None:
    clients = 60

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
        writer.close()

    def kernel_client(number: int, results: list[Any]) -> None:
        with connect(8007) as peer, peer.makefile("rwb") as file:
            for i in range(20):
                file.write(b"%d %d\n" % (number, i))
                file.flush()
                assert file.readline() == b"%d %d\n" % (number, i)
        results.append(number)

    async def main() -> None:
        results: list[Any] = []
        server = await dp.start_server(echo, "10.77.0.1", 8007)
        async with server:
            threads = [threading.Thread(target=kernel_client, args=(i, results)) for i in range(clients)]
            for thread in threads:
                thread.start()
            while len(results) < clients:
                await asyncio.sleep(0.01)
        assert sorted(results) == list(range(clients))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_open_connection(dp: dataplane.Dataplane) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            data = await reader.read()
            writer.write(hashlib.sha256(data).digest())
            writer.close()

        server = await asyncio.start_server(answer, "10.77.0.2", 0)
        port = server.sockets[0].getsockname()[1]
        data = os.urandom(2_000_000)
        for _ in range(3):
            reader, writer = await dp.open_connection("10.77.0.2", port)
            writer.write(data)
            await writer.drain()
            writer.write_eof()
            assert await reader.read() == hashlib.sha256(data).digest()
            writer.close()
            await writer.wait_closed()
        server.close()
        with pytest.raises(ConnectionRefusedError):
            await dp.open_connection("10.77.0.2", 9)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(dp.open_connection("10.77.0.77", 9), 0.3)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_accepting_in_a_loop(dp: dataplane.Dataplane) -> None:
    async def main() -> list[bytes]:
        got = []
        with dp.tcp_listen("10.77.0.1", 8008) as listener:
            thread, _ = in_thread(lambda: [connect(8008).sendall(b"%d" % i) for i in range(5)])
            async for connection, _ in listener:
                connection.settimeout(20)
                got.append(connection.recv(10))
                connection.close()
                if len(got) == 5:
                    break
            thread.join(20)
        return got

    assert asyncio.run(asyncio.wait_for(main(), 60)) == [b"%d" % i for i in range(5)]


def test_ssl_over_it(dp: dataplane.Dataplane, tmp_path: Any) -> None:
    """start_tls of asyncio's streams, since the transport is one that it knows how to use."""
    import ssl
    key, certificate = tmp_path / "key", tmp_path / "cert"
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=dp", "-days", "1",
                           "-keyout", key, "-out", certificate], capture_output=True)
    if made.returncode:
        pytest.skip("no openssl")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    here = ssl.create_default_context(cafile=str(certificate))
    here.check_hostname = False

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "10.77.0.2", 0, ssl=context)
        reader, writer = await dp.open_connection("10.77.0.2", server.sockets[0].getsockname()[1])
        await writer.start_tls(here)
        writer.write(b"secret\n")
        assert await reader.readline() == b"secret\n"
        writer.close()
        server.close()

    asyncio.run(asyncio.wait_for(main(), 60))
