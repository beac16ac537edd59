#!/usr/bin/env python3
"""TCP through a running dataplane over TUN, against the kernel's own TCP over a veth, in one run.

    python -m bench.tcp --what bulk_receive
    python -m bench.tcp --what echo --rx-beside server

The peer is a kernel socket in a network namespace and the same program in every case; what differs is who
serves it: a kernel socket in another namespace, behind a veth (the reference), or a consumer of a dataplane.

    bulk_receive    the peer sends, MB a second that the consumer has received
    bulk_send       the consumer sends, MB a second that the peer has received
    echo            64-byte requests, one at a time, each answered: a second
    accept          connections opened, accepted, closed by both ends: a second

Processes are pinned: the peer to the first core, both servers to the second. The RX worker is beside the one or the
other. Beside the server it copies out of memory that is near, and the server's side has one core
in all, as the kernel's has. Beside the peer a request needs no change of process on the server's core. (Not pinned, a
kernel may put the peer and its own server on one core, where a 64-byte exchange needs no interrupt of another core at
all and is ten times as fast.)

Every byte is counted. Each repeat is a new connection (or 1,000s of them) of the same processes, reference and
dataplane by turns; the kernel's figure and the ratio of the medians come with the line.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import dataplane
from bench import harness
from tests.netns import Namespace, veth

OURS, PEER = "10.77.0.1", "10.77.0.2"
PORT = 7000
PIECE = 1 << 18
BUFFER = 1 << 22

PLACES = {"peer": 200.0, "server": 0.0}
"""Beside whom the RX worker is; how long, in µs, the consumer then spins before it sleeps."""

CONFIG = """
name = "{name}"
[rx]
cores = [{core}]
idle = "{idle}"
[tcp]
time_wait = 1.0
[[netif]]
kind = "tun"
device = "dp0"
addresses = ["10.77.0.1/24"]
"""

context = multiprocessing.get_context("fork")


# -- the two ends: the same code for kernel sockets and for the dataplane's --------------------------------------


def serve_sink(conn: Any) -> None:
    """Receives to the end and says how much it was."""
    room = bytearray(1 << 20)
    total = 0
    while size := conn.recv_into(room):
        total += size
    conn.sendall(total.to_bytes(8, "big"))


def serve_source(conn: Any) -> None:
    """Sends as much as it is asked for."""
    size = int.from_bytes(read(conn, 8), "big")
    piece = memoryview(bytes(PIECE))
    for _ in range(size // PIECE):
        conn.sendall(piece)
    conn.shutdown(socket.SHUT_WR)
    conn.recv(1)


def serve_echo(conn: Any) -> None:
    """Answers every request with itself."""
    while data := conn.recv(4096):
        conn.sendall(data)


def serve_close(conn: Any) -> None:
    """Nothing: closes."""


SERVE: dict[str, Callable[[Any], None]] = {
    "bulk_receive": serve_sink, "bulk_send": serve_source, "echo": serve_echo, "accept": serve_close}


def read(conn: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = conn.recv(size - len(data))
        assert piece, "the other end has gone"
        data += piece
    return data


def connect(port: int) -> socket.socket:
    sock = socket.create_connection((OURS, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def drive_bulk_receive(port: int, size: int) -> float:
    piece = bytes(PIECE)
    with connect(port) as sock:
        start = time.monotonic()
        for _ in range(size // PIECE):
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        total = int.from_bytes(read(sock, 8), "big")
        seconds = time.monotonic() - start
    assert total == size // PIECE * PIECE
    return total / seconds / 1e6


def drive_bulk_send(port: int, size: int) -> float:
    size = size // PIECE * PIECE
    room = bytearray(1 << 20)
    total = 0
    with connect(port) as sock:
        start = time.monotonic()
        sock.sendall(size.to_bytes(8, "big"))
        while got := sock.recv_into(room):
            total += got
        seconds = time.monotonic() - start
    assert total == size
    return total / seconds / 1e6


def drive_echo(port: int, count: int) -> float:
    request = bytes(64)
    with connect(port) as sock:
        for _ in range(count // 10):
            sock.sendall(request)
            read(sock, 64)
        start = time.monotonic()
        for _ in range(count):
            sock.sendall(request)
            read(sock, 64)
        return count / (time.monotonic() - start)


def drive_accept(port: int, count: int) -> float:
    start = time.monotonic()
    for _ in range(count):
        with socket.create_connection((OURS, port)) as sock:
            assert sock.recv(1) == b""
    return count / (time.monotonic() - start)


DRIVE: dict[str, Callable[[int, int], float]] = {
    "bulk_receive": drive_bulk_receive, "bulk_send": drive_bulk_send, "echo": drive_echo, "accept": drive_accept}
UNITS = {"bulk_receive": "MB/s", "bulk_send": "MB/s", "echo": "requests/s", "accept": "connections/s"}


# -- servers --------------------------------------------------------------------------------


def kernel_server(what: str, namespace: Namespace, core: int, ready: Any) -> None:
    """A plain Python server on a kernel socket."""
    harness.pin(core)
    with namespace.entered(), socket.create_server((OURS, PORT), backlog=1024) as listener:
        ready.set()
        while True:
            conn, _ = listener.accept()
            with conn:
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                SERVE[what](conn)


def dataplane_server(what: str, name: str, core: int, spin_us: float, ready: Any) -> None:
    """The same as a consumer."""
    harness.pin(core)
    with dataplane.attach(name, spin_us=spin_us) as dp, dp.tcp_listen(
            OURS, PORT, backlog=256, send_bytes=BUFFER, receive_bytes=BUFFER) as listener:
        ready.set()
        while True:
            conn, _ = listener.accept()
            with conn:
                conn.setsockopt("nodelay", True)
                SERVE[what](conn)


@contextlib.contextmanager
def served(target: Callable[..., None], *args: Any) -> Iterator[None]:
    ready = context.Event()
    process = context.Process(target=target, args=(*args, ready), daemon=True)
    process.start()
    try:
        assert ready.wait(60), "the server did not start"
        yield
    finally:
        process.kill()
        process.join()


def peer(what: str, count: int, core: int) -> float:
    """One measurement."""
    harness.pin(core)
    return DRIVE[what](PORT, count)


def measure(namespace: Namespace, what: str, count: int, core: int) -> float:
    return float(namespace.call(peer, what, count, core, timeout=300))


# -- the run --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--what", choices=list(DRIVE), default="bulk_receive")
    parser.add_argument("--rx-beside", choices=list(PLACES), help="default: the server in bulk_receive, else the peer")
    parser.add_argument("--bytes", type=int, default=1 << 30, help="of a bulk transfer")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=5_000)
    parser.add_argument("--idle", default="poll", help="the RX worker's idle strategy: it has no core of its own")
    options = parser.parse_args()
    options.rx_beside = options.rx_beside or ("server" if options.what == "bulk_receive" else "peer")
    return options


def main() -> None:
    options = arguments()
    harness.need_root()
    what, (near, far) = options.what, (harness.CORES * 2)[:2]
    count = int({"echo": options.requests, "accept": options.connections}.get(what, options.bytes))
    config = CONFIG.replace("{core}", str(near if options.rx_beside == "peer" else far)).replace("{idle}", options.idle)
    kernel: list[float] = []
    found: list[float] = []
    with Namespace() as one, Namespace() as other, Namespace() as here, harness.running(config, here) as running:
        veth(one, other, [f"{PEER}/24"], [f"{OURS}/24"])
        with served(kernel_server, what, other, far), \
                served(dataplane_server, what, running.name, far, PLACES[options.rx_beside]):
            for namespace in (one, here):
                measure(namespace, what, count // 10, near)     # warm
            for _ in range(options.repeats):
                kernel.append(measure(one, what, count, near))
                found.append(measure(here, what, count, near))
    reference = statistics.median(kernel)
    harness.report(f"tcp.{what}", UNITS[what], found, options, kernel=round(reference, 1),
                   kernel_spread=round((max(kernel) - min(kernel)) / reference, 3),
                   ratio=round(statistics.median(found) / reference, 3))


if __name__ == "__main__":
    harness.run(main)
