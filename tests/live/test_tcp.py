"""TCP against the kernel's, over TUN and over a veth with AF_PACKET, IPv4 and IPv6: streams both ways, the ends of
connections, and what goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dataplane
from tests.live.tcp_bed import (
    KERNELS,
    OURS,
    WATCHDOG,
    World,
    digest,
    exchange,
    kernel_connect,
    kernel_listener,
    receive_stream,
    send_stream,
    wait_for,
    world,
)

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

MIB = 1 << 20
PORT = 7000

each_family = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module", params=["tun", "af_packet"])
def w(request: pytest.FixtureRequest) -> Iterator[World]:
    with world(request.param, "[tcp]\ntime_wait = 1.0") as made:
        yield made
        ledger = made.process.stop()
        assert "crash_lost" not in ledger["dropped"], ledger


@pytest.fixture
def dp(w: World) -> Iterator[dataplane.Dataplane]:
    with dataplane.attach(w.name) as attached:
        yield attached


def accepted(listener: Any) -> Any:
    conn, _ = listener.accept(timeout=WATCHDOG)
    conn.settimeout(WATCHDOG)
    return conn


# -- streams --------------------------------------------------------------------------------


sizes = pytest.mark.parametrize("size", [8 * MIB, pytest.param(1 << 30, marks=pytest.mark.stress)],
                                ids=["8MiB", "1GiB"])


def exchange_as_client(family: int, port: int, seed: int, size: int) -> tuple[int, str]:
    with kernel_connect(family, port) as sock:
        return exchange(sock, seed, size)


def exchange_as_server(family: int, port: int, seed: int, size: int, ready: int) -> tuple[int, str]:
    with kernel_listener(family, port) as listener:
        os.write(ready, b"x")
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(WATCHDOG)
            return exchange(sock, seed, size)


@sizes
@each_family
def test_both_ways_at_once_as_server(w: World, family: int, size: int, dp: dataplane.Dataplane) -> None:
    with dp.tcp_listen(OURS[family], PORT) as listener:
        child = w.peer.fork(exchange_as_client, family, PORT, 1, size)
        with accepted(listener) as conn:
            assert exchange(conn, 2, size) == (size, digest(1, size))
        assert child.result(300) == (size, digest(2, size))


@sizes
@each_family
def test_both_ways_at_once_as_client(w: World, family: int, size: int, dp: dataplane.Dataplane) -> None:
    reading, writing = os.pipe()
    child = w.peer.fork(exchange_as_server, family, PORT, 1, size, writing)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    with dp.tcp_connect(KERNELS[family], PORT, timeout=WATCHDOG) as conn:
        conn.settimeout(WATCHDOG)
        assert conn.getpeername()[:2] == (KERNELS[family], PORT) and conn.getsockname()[0] == OURS[family]
        assert exchange(conn, 2, size) == (size, digest(1, size))
    assert child.result(300) == (size, digest(2, size))


@pytest.mark.stress
def test_sequence_numbers_wrap(w: World, dp: dataplane.Dataplane) -> None:
    """More than 4 GiB each way: every sequence number comes by."""
    size = (1 << 32) + 64 * MIB
    with dp.tcp_listen(OURS[4], PORT) as listener:
        child = w.peer.fork(exchange_as_client, 4, PORT, 1, size)
        with accepted(listener) as conn:
            assert exchange(conn, 2, size) == (size, digest(1, size))
        assert child.result(300) == (size, digest(2, size))


# -- ends --------------------------------------------------------------------------------


def half_close(family: int, port: int) -> bytes:
    """Says all it has to say, and its end, before the other one answers."""
    with kernel_connect(family, port) as sock:
        sock.sendall(b"question")
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
        return answer


@each_family
def test_half_close_by_the_peer(w: World, family: int, dp: dataplane.Dataplane) -> None:
    with dp.tcp_listen(OURS[family], PORT) as listener:
        child = w.peer.fork(half_close, family, PORT)
        with accepted(listener) as conn:
            question = b""
            while piece := conn.recv(100):
                question += piece
            assert question == b"question" and conn.recv(100) == b""
            for _ in range(100):
                conn.sendall(b"answer" * 1000)
        assert child.result() == b"answer" * 100_000


def wait_for_the_end(family: int, port: int) -> bytes:
    with kernel_connect(family, port) as sock:
        heard = b""
        while piece := sock.recv(4096):
            heard += piece
        sock.sendall(b"late " * 20_000)
        return heard


@each_family
def test_half_close_by_us(w: World, family: int, dp: dataplane.Dataplane) -> None:
    with dp.tcp_listen(OURS[family], PORT) as listener:
        child = w.peer.fork(wait_for_the_end, family, PORT)
        with accepted(listener) as conn:
            conn.sendall(b"that is all")
            conn.shutdown(socket.SHUT_WR)
            with pytest.raises(BrokenPipeError):
                conn.send(b"more")
            assert receive_stream(conn)[0] == 100_000
        assert child.result() == b"that is all"


def reset(family: int, port: int) -> None:
    """Sends a while, then a RST."""
    sock = kernel_connect(family, port)
    sock.sendall(bytes(100_000))
    sock.recv(1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@each_family
def test_reset_by_the_peer(w: World, family: int, dp: dataplane.Dataplane) -> None:
    with dp.tcp_listen(OURS[family], PORT) as listener:
        child = w.peer.fork(reset, family, PORT)
        with accepted(listener) as conn:
            conn.sendall(b"x")
            with pytest.raises(ConnectionResetError):
                while conn.recv(65536):
                    pass
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                conn.sendall(bytes(10))
        child.result()


def until_reset(family: int, port: int) -> str:
    """What ends it."""
    with kernel_connect(family, port) as sock:
        sock.sendall(b"hello")
        try:
            while sock.recv(65536):
                pass
        except OSError as error:
            return type(error).__name__
        return "end"


@each_family
def test_abort_resets_the_peer(w: World, family: int, dp: dataplane.Dataplane) -> None:
    with dp.tcp_listen(OURS[family], PORT) as listener:
        child = w.peer.fork(until_reset, family, PORT)
        conn = accepted(listener)
        assert conn.recv(10) == b"hello"
        conn.abort()
        assert child.result() == "ConnectionResetError"


def test_close_with_unread_data_resets_the_peer(w: World, dp: dataplane.Dataplane) -> None:
    """RFC 2525 section 2.17."""
    with dp.tcp_listen(OURS[4], PORT) as listener:
        child = w.peer.fork(until_reset, 4, PORT)
        conn = accepted(listener)
        wait_for(lambda: conn.getsockopt("info")["unread"] == 5, "the greeting")
        conn.close()
        assert child.result() == "ConnectionResetError"


def serve_and_say(dp: dataplane.Dataplane, port: int, ready: int) -> None:
    with dp.tcp_listen(None, port) as listener:
        os.write(ready, b"x")
        conn = accepted(listener)
        conn.sendall(bytes(MIB))
        conn.recv(10)
        os.write(ready, b"y")
        time.sleep(WATCHDOG)


@each_family
def test_a_killed_consumer_resets_its_peers(w: World, family: int) -> None:
    reading, writing = os.pipe()
    consumer = w.consumer(serve_and_say, PORT + 1, writing)
    os.read(reading, 1)
    child = w.peer.fork(until_reset, family, PORT + 1)
    assert os.read(reading, 1) == b"y"
    start = time.monotonic()
    consumer.kill()
    assert child.result() == "ConnectionResetError"
    assert time.monotonic() - start < 5     # at once, not by a retransmission that finds nobody
    os.close(reading)
    os.close(writing)
    with dataplane.attach(w.name) as dp:    # and the port is free again
        wait_for(lambda: _bindable(dp, PORT + 1), "the port to be free")


def _bindable(dp: dataplane.Dataplane, port: int) -> bool:
    with contextlib.suppress(OSError):
        dp.tcp_listen(None, port).close()
        return True
    return False


def send_for_ever(family: int, port: int) -> None:
    with kernel_connect(family, port) as sock:
        while True:
            sock.sendall(bytes(65536))


@each_family
def test_a_killed_peer(w: World, family: int, dp: dataplane.Dataplane) -> None:
    with dp.tcp_listen(OURS[family], PORT) as listener:
        child = w.peer.fork(send_for_ever, family, PORT)
        with accepted(listener) as conn:
            assert conn.recv(1000)
            os.kill(child.pid, signal.SIGKILL)
            with contextlib.suppress(ConnectionResetError):
                while conn.recv(1 << 20):
                    pass
        child.kill()


def send_all(family: int, port: int, seed: int, size: int) -> None:
    with kernel_connect(family, port) as sock:
        send_stream(sock, seed, size)
        sock.recv(1)


@pytest.mark.parametrize("seconds", [0.5, pytest.param(30.0, marks=pytest.mark.stress)])
@each_family
def test_zero_window(w: World, family: int, seconds: float, dp: dataplane.Dataplane) -> None:
    """A consumer that does not read closes the window; nothing is lost, and it goes on when the consumer does."""
    size = 8 * MIB
    with dp.tcp_listen(OURS[family], PORT) as listener:
        child = w.peer.fork(send_all, family, PORT, 3, size)
        with accepted(listener) as conn:
            wait_for(lambda: conn.getsockopt("info")["rcv_wnd"] == 0, "the window to close")
            time.sleep(seconds)
            assert receive_stream(conn) == (size, digest(3, size))
        child.result()


def dawdle(family: int, port: int, seconds: float) -> tuple[int, str]:
    with kernel_connect(family, port, SO_RCVBUF=4096) as sock:
        time.sleep(seconds)
        return receive_stream(sock)


@pytest.mark.parametrize("seconds", [0.5, pytest.param(30.0, marks=pytest.mark.stress)])
@each_family
def test_zero_window_of_the_peer(w: World, family: int, seconds: float, dp: dataplane.Dataplane) -> None:
    size = 4 * MIB
    with dp.tcp_listen(OURS[family], PORT) as listener:
        child = w.peer.fork(dawdle, family, PORT, seconds)
        with accepted(listener) as conn:
            send_stream(conn, 4, size)
            assert conn.recv(1) == b""
        assert child.result(120) == (size, digest(4, size))


# -- refusals --------------------------------------------------------------------------------


@each_family
def test_connect_is_refused(w: World, family: int, dp: dataplane.Dataplane) -> None:
    with pytest.raises(ConnectionRefusedError):
        dp.tcp_connect(KERNELS[family], 9, timeout=WATCHDOG)


def refused(family: int, port: int) -> bool:
    try:
        kernel_connect(family, port).close()
    except ConnectionRefusedError:
        return True
    return False


@each_family
def test_nobody_listens(w: World, family: int) -> None:
    assert w.peer.call(refused, family, 9)


def test_connect_times_out(w: World, dp: dataplane.Dataplane) -> None:
    w.peer.run(["ip", "route", "add", "blackhole", "10.99.0.0/16"])
    try:
        with pytest.raises(TimeoutError):
            dp.tcp_connect("10.77.0.99", 80, timeout=1.0)
    finally:
        w.peer.run(["ip", "route", "del", "blackhole", "10.99.0.0/16"])
