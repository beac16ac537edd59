"""Many TCP connections: a thousand that talk, ten thousand that wait, thousands that come and go; and one whose
owner stops while it holds its lock."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

import dataplane
from dataplane.client.workbench import STAMP
from dataplane.jit import kernel
from dataplane.shm import layout_tcp as T
from dataplane.shm.lock import try_lock
from tests.live.tcp_bed import (
    FAMILIES,
    OURS,
    WATCHDOG,
    World,
    allow_descriptors,
    digest,
    kernel_connect,
    pipe,
    receive_stream,
    send_stream,
    wait_for,
    world,
)

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

MIB = 1 << 20
PORT = 7000
IDLE = 1.0      # seconds
SLOTS = 256     # connections that a listener may have at a time, and has had before anything is measured
CONFIG = """
[sockets]
max = 32768
[tcp]
time_wait = 1.0
"""

each_family = pytest.mark.parametrize(
    "family", [4, pytest.param(6, marks=pytest.mark.stress)], ids=["ipv4", "ipv6"])      # IPv6 every day: test_tcp.py


@pytest.fixture(scope="module", params=["tun", "af_packet"])
def w(request: pytest.FixtureRequest) -> Iterator[World]:
    with world(request.param, CONFIG) as made:
        yield made
        ledger = made.process.stop()
        assert "crash_lost" not in ledger["dropped"], ledger


# -- a server of asyncio streams, unmodified -----------------------------------------------------------------------


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


def serve(dp: dataplane.Dataplane, address: str, port: int, options: dict[str, Any], ready: int) -> None:
    """An echo server, until it is killed."""
    async def main() -> None:
        server = await dp.start_server(echo, address, port, **options)
        os.write(ready, b"x")
        async with server:
            await server.serve_forever()

    asyncio.run(main())


@contextlib.contextmanager
def echo_server(w: World, address: str, port: int, **options: Any) -> Iterator[None]:
    with pipe() as (ready, tell_ready):
        consumer = w.consumer(serve, address, port, options, tell_ready)
        try:
            os.read(ready, 1)
            yield
        finally:
            consumer.kill()


# -- kernel clients --------------------------------------------------------------------------------


def talk(family: int, port: int, count: int, seed: int) -> int:
    """`count` connections at a time, each sends a random amount and expects it back; all the bytes."""
    allow_descriptors(count + 100)

    async def one(number: int) -> int:
        data = random.Random(seed + number).randbytes(random.Random(number).randrange(1, 60_000))
        reader, writer = await asyncio.open_connection(OURS[family], port)
        for start in range(0, len(data), 10_000):
            writer.write(data[start:start + 10_000])
            await writer.drain()
            await asyncio.sleep(0)
        writer.write_eof()
        assert await reader.read(-1) == data
        writer.close()
        await writer.wait_closed()
        return len(data)

    async def main() -> int:
        return sum(await asyncio.gather(*(one(number) for number in range(count))))

    return asyncio.run(asyncio.wait_for(main(), 240))


def hold(family: int, port: int, count: int, ready: int, go: int) -> int:
    """`count` connections, established, idle until `go`, then every one of them says something and hears it."""
    allow_descriptors(count + 100)
    socks = []
    for _ in range(count):
        sock = socket.socket(FAMILIES[family], socket.SOCK_STREAM)
        sock.settimeout(WATCHDOG)
        sock.connect((OURS[family], port))
        socks.append(sock)
    os.write(ready, b"x")
    os.read(go, 1)
    for number, sock in enumerate(socks):
        sock.sendall(b"%d " % number * 20)
    heard = 0
    for number, sock in enumerate(socks):
        want = b"%d " % number * 20
        got = b""
        while len(got) < len(want) and (piece := sock.recv(4096)):
            got += piece
        heard += got == want
    for sock in socks:
        sock.close()
    return heard


def come_and_go(family: int, port: int, count: int) -> int:
    """`count` connections one after the other, each asks and hears."""
    heard = 0
    for number in range(count):
        with kernel_connect(family, port) as sock:
            sock.sendall(b"%d" % number)
            sock.shutdown(socket.SHUT_WR)
            heard += sock.recv(100) == b"%d" % number and sock.recv(100) == b""
    return heard


def crowd(family: int, port: int, count: int, size: int) -> int:
    """`count` connections that stay, in waves of `size` at once; how many were answered."""
    allow_descriptors(count + 100)

    async def one() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(OURS[family], port)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        return reader, writer

    async def main() -> int:
        streams = []
        for _ in range(0, count, size):
            streams += await asyncio.gather(*(one() for _ in range(size)))
        for _, writer in streams:
            writer.close()
        return len(streams)

    return asyncio.run(asyncio.wait_for(main(), WATCHDOG))


def come_together(family: int, port: int, count: int) -> None:
    """`count` connections at a time; each asks and hears."""
    socks = [kernel_connect(family, port) for _ in range(count)]
    for sock in socks:
        with sock:
            sock.sendall(b"x")
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(100) == b"x" and sock.recv(100) == b""


# -- the tests --------------------------------------------------------------------------------


@each_family
def test_a_thousand_talk_at_a_time(w: World, family: int) -> None:
    count = 1000
    with echo_server(w, OURS[family], PORT, connections=1024, backlog=1024, send_bytes=65536, receive_bytes=65536):
        assert w.peer.call(talk, family, PORT, count, 1, timeout=300) > count * 10_000


@each_family
def test_no_burst_within_the_backlog_is_dropped(w: World, family: int) -> None:
    """There are slots before connections come: the third ACKs find some, also those of later waves."""
    with dataplane.attach(w.name) as dp:
        before = dp.stats()["dropped"].get("tcp_backlog", 0)
        with echo_server(w, OURS[family], PORT, connections=2000, backlog=250):
            assert w.peer.call(crowd, family, PORT, 1500, 250) == 1500
        assert dp.stats()["dropped"].get("tcp_backlog", 0) == before
        wait_for(lambda: is_even(dp.stats()), "deliveries that are all consumed or unread")


def is_even(told: dict[str, Any]) -> bool:
    return bool(told["deliveries"] == told["consumed"] + told["unread"])


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.stress)])
@each_family
def test_many_wait_and_then_all_speak(w: World, family: int, count: int) -> None:
    with (echo_server(w, OURS[family], PORT, connections=count, backlog=1024, send_bytes=4096, receive_bytes=4096),
          pipe() as (ready, tell_ready), pipe() as (go, tell_go)):
        client = w.peer.fork(hold, family, PORT, count, tell_ready, go)
        os.read(ready, 1)
        wait_for(lambda: states(w).count("established") == count, f"{count} connections", 300)
        time.sleep(0.5)         # the last delayed ACKs
        before = cpu(w)
        time.sleep(IDLE)
        used = cpu(w) - before
        os.write(tell_go, b"x")
        assert client.result(300) == count
    print(f"{w.kind} ipv{family}: {count} idle connections, {used:.2f} s of CPU time in {IDLE} s")
    assert used < IDLE / 5, f"{used} s of CPU time in {IDLE} s without a packet"


def cpu(w: World) -> float:
    """CPU time of supervisor and workers, seconds."""
    supervisor = psutil.Process(w.process.pid)
    return sum(sum(process.cpu_times()[:2]) for process in (supervisor, *supervisor.children(recursive=True)))


def states(w: World) -> list[str]:
    words = [sys.executable, "-m", "dataplane", "ss", w.name, "--json"]
    told = json.loads(subprocess.run(words, check=True, capture_output=True, text=True, timeout=WATCHDOG).stdout)
    return [one["state"] for one in told]


def answer(dp: dataplane.Dataplane, address: str, port: int, count: int, ready: int) -> None:
    """Echoes on `count` connections, one after the other, in the plainest way."""
    with dp.tcp_listen(address, port, backlog=SLOTS, connections=SLOTS) as listener:
        os.write(ready, b"x")
        for _ in range(count):
            conn, _ = listener.accept(timeout=WATCHDOG)
            with conn:
                conn.sendall(conn.recv(100))
                assert conn.recv(100) == b""


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.stress)])
@each_family
def test_thousands_come_and_go_and_leave_nothing(w: World, family: int, count: int) -> None:
    with pipe() as (ready, tell_ready):
        consumer = w.consumer(answer, OURS[family], PORT, SLOTS + count + 1, tell_ready)
        os.read(ready, 1)
    try:
        w.peer.call(come_together, family, PORT, SLOTS)
        before = footprint(w, consumer.pid)
        assert w.peer.call(come_and_go, family, PORT, count, timeout=600) == count
        after = footprint(w, consumer.pid)
        assert after["descriptors"] == before["descriptors"], (before, after)
        assert after["mapped"] == before["mapped"], (before, after)
        assert after["memory"] < before["memory"] + 8 * MIB, (before, after)
        wait_for(lambda: set(states(w)) == {"listen"}, "the end of all connections")
        assert w.peer.call(come_and_go, family, PORT, 1) == 1
        consumer.result()
    finally:
        consumer.kill()


def footprint(w: World, consumer: int) -> dict[str, int]:
    """Descriptors, mappings' bytes and private memory of all processes of the dataplane and of a consumer."""
    gc.collect()
    supervisor = psutil.Process(w.process.pid)
    processes = [supervisor, *supervisor.children(recursive=True), psutil.Process(consumer)]
    return {
        "descriptors": sum(process.num_fds() for process in processes),
        "mapped": sum(one.size for process in processes for one in process.memory_maps(grouped=False)
                      if "memfd:" in one.path or "/dev/shm" in one.path),
        "memory": sum(process.memory_full_info().uss for process in processes),
    }


# -- one whose owner is stopped in the middle ------------------------------------------------------------------------


@kernel("i64(mem, i64, i64)")
def take_lock(mem, word, stamp):  # type: ignore[no-untyped-def]
    """try_lock for tests."""
    return try_lock(mem, word, stamp)


def stop_with_the_lock(dp: dataplane.Dataplane, address: str, port: int, ready: int) -> None:
    """Accepts a connection, takes its lock as the protocol's routine does, and stops there."""
    with dp.tcp_listen(address, port) as listener:
        os.write(ready, b"x")
        conn, _ = listener.accept(timeout=WATCHDOG)
        stamp = STAMP + conn._session.attached.consumer
        while not take_lock(conn._mem, conn._conn + T.CONN_LOCK, stamp):
            time.sleep(0)
        os.write(ready, b"y")
        os.kill(os.getpid(), signal.SIGSTOP)


def receive_one(dp: dataplane.Dataplane, address: str, port: int, ready: int) -> tuple[int, str]:
    with dp.tcp_listen(address, port) as listener:
        os.write(ready, b"x")
        conn, _ = listener.accept(timeout=WATCHDOG)
        conn.settimeout(WATCHDOG)
        with conn:
            return receive_stream(conn)


def send_one(family: int, port: int, size: int) -> None:
    with kernel_connect(family, port) as sock:
        send_stream(sock, 5, size)
        assert sock.recv(1) == b""


def transfer(w: World, family: int, size: int) -> float:
    """A stream from a kernel peer to a consumer of its own: seconds."""
    with pipe() as (ready, tell_ready):
        receiver = w.consumer(receive_one, OURS[family], PORT, tell_ready)
        os.read(ready, 1)
    start = time.monotonic()
    w.peer.call(send_one, family, PORT, size)
    assert receiver.result() == (size, digest(5, size))
    return time.monotonic() - start


@each_family
def test_a_stopped_owner_that_holds_its_lock_stops_nobody_else(w: World, family: int) -> None:
    """Its peer sends all the time, so that everybody who processes connections meets this one."""
    size = 16 * MIB
    take_lock.compile()
    alone = min(transfer(w, family, size) for _ in range(2))
    with pipe() as (ready, tell_ready):
        holder = w.consumer(stop_with_the_lock, OURS[family], PORT + 1, tell_ready)
        os.read(ready, 1)
        sender = w.peer.fork(send_one, family, PORT + 1, 1 << 40)
        os.read(ready, 1)
    try:
        beside = min(transfer(w, family, size) for _ in range(2))
        assert sender.running() and holder.running()
    finally:
        sender.kill()
        holder.kill()
    rates = [size / seconds / 1e6 for seconds in (alone, beside)]
    print(f"{w.kind} ipv{family}: {rates[0]:.0f} MB/s alone, {rates[1]:.0f} MB/s beside one that is stopped")
    assert beside < 2 * alone + 0.2
    wait_for(lambda: not states(w), "the end of the stopped one's connection")
