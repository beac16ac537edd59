#!/usr/bin/env python3
"""TCP through a running dataplane over TUN, against the kernel's own TCP over a veth, in one run.

    python bench/tcp.py                     all of it, as root
    python bench/tcp.py --only bulk_receive --repeats 3

The peer is a kernel socket in a network namespace and the same program in every case; what differs is who
serves it: a kernel socket in another namespace, behind a veth (the reference), or a consumer of a dataplane.

    bulk_receive    the peer sends, MB a second that the consumer has received
    bulk_send       the consumer sends, MB a second that the peer has received
    echo            64-byte requests, one at a time, each answered: a second
    accept          connections opened, accepted, closed by both ends: a second

Processes are pinned: the peer to the first core, both servers to the second. The RX worker is beside the one or the
other; both are measured. Beside the server it copies out of memory that is near, and the server's side has one core
in all, as the kernel's has. Beside the peer a request needs no change of process on the server's core. (Not pinned, a
kernel may put the peer and its own server on one core, where a 64-byte exchange needs no interrupt of another core at
all and is ten times as fast.)

Every byte is counted. Each repeat is a new connection (or 1,000s of them) of the same processes, reference and
dataplanes by turns. Prints one line of JSON per figure and place: median, spread (largest minus smallest, as a part of
the median), and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dataplane

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
device = "{name}"
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


def kernel_server(what: str, namespace: str, core: int, ready: Any) -> None:
    """A plain Python server on a kernel socket."""
    enter(namespace)
    os.sched_setaffinity(0, [core])
    with socket.create_server((OURS, PORT), backlog=1024) as listener:
        ready.set()
        while True:
            conn, _ = listener.accept()
            with conn:
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                SERVE[what](conn)


def dataplane_server(what: str, name: str, core: int, spin_us: float, ready: Any) -> None:
    """The same as a consumer."""
    os.sched_setaffinity(0, [core])
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


def peer(namespace: str, what: str, count: int, core: int, pipe: Any) -> None:
    """One measurement, in the peer's namespace."""
    enter(namespace)
    if core >= 0:
        os.sched_setaffinity(0, [core])
    pipe.send(DRIVE[what](PORT, count))


def measure(namespace: str, what: str, count: int, core: int) -> float:
    mine, theirs = context.Pipe()
    process = context.Process(target=peer, args=(namespace, what, count, core, theirs))
    process.start()
    theirs.close()
    try:
        assert mine.poll(300), "no answer within five minutes"
        return float(mine.recv())
    finally:
        process.kill()
        process.join()


# -- namespaces --------------------------------------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def enter(namespace: str) -> None:
    with open(f"/run/netns/{namespace}") as file:
        _setns(file.fileno())


def _setns(descriptor: int) -> None:
    import ctypes
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def namespaces(*names: str) -> Iterator[list[str]]:
    made = [f"dpb-{os.getpid()}-{name}" for name in names]
    try:
        for name in made:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def veth(one: str, other: str) -> None:
    ip("-n", one, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", other)
    for name, device, address in ((one, "v0", PEER), (other, "v1", OURS)):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
        ip("-n", name, "link", "set", device, "up")


@contextlib.contextmanager
def running(namespace: str, core: int, idle: str) -> Iterator[str]:
    """A dataplane whose RX worker is on that core, with a TUN in the namespace."""
    name = f"dpb-{os.getpid()}-{core}"
    with tempfile.TemporaryDirectory() as directory:
        path, report = Path(directory, "config.toml"), Path(directory, "ledger.json")
        path.write_text(CONFIG.format(name=name, core=core, idle=idle))
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "dataplane", "run", str(path),
                   "--ledger", str(report)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None and process.stdout.readline() == f"ready {name}\n"
            yield name
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(30)
        ledger = json.loads(report.read_text())
        assert status == 0 and ledger["balanced"] and "crash_lost" not in ledger["dropped"], ledger


# -- the run --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(DRIVE), action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=1 << 30, help="of a bulk transfer")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--idle", default="poll", help="the RX workers' idle strategy: none has a core of its own")
    parser.add_argument("--cores", type=int, nargs=2, default=cores, help="the peer's and the server's")
    return parser.parse_args()


def count_of(what: str, options: argparse.Namespace) -> int:
    return int({"echo": options.requests, "accept": options.connections}.get(what, options.bytes))


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        os.environ["DATAPLANE_RUNTIME_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        one, other, *here = stack.enter_context(namespaces("peer", "server", *(f"tun-{place}" for place in PLACES)))
        veth(one, other)
        names = [stack.enter_context(running(namespace, core, options.idle))
                 for namespace, core in zip(here, options.cores, strict=True)]
        for what in options.only or DRIVE:
            run(what, [one, *here], other, names, options)


def run(what: str, peers: list[str], server: str, names: list[str], options: argparse.Namespace) -> None:
    """One figure: `peers` are the namespaces of the kernel server's peer and of those of the dataplanes `names`."""
    count, (near, far) = count_of(what, options), options.cores
    rates: list[list[float]] = [[] for _ in peers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(served(kernel_server, what, server, far))
        for name, spin_us in zip(names, PLACES.values(), strict=True):
            stack.enter_context(served(dataplane_server, what, name, far, spin_us))
        for namespace in peers:
            measure(namespace, what, count // 10, near)    # warm
        for _ in range(options.repeats):
            for namespace, found in zip(peers, rates, strict=True):
                found.append(measure(namespace, what, count, near))
    kernel, *ours = rates
    for place, found in zip(PLACES, ours, strict=True):
        report(what, place, kernel, found, options)


def report(what: str, place: str, kernel: list[float], found: list[float], options: argparse.Namespace) -> None:
    def spread(rates: list[float]) -> float:
        return round((max(rates) - min(rates)) / statistics.median(rates), 3)

    median, reference = statistics.median(found), statistics.median(kernel)
    print(json.dumps({
        "bench": f"tcp.{what}", "unit": UNITS[what], "rx_beside": place, "median": round(median, 1),
        "spread": spread(found), "kernel": round(reference, 1), "kernel_spread": spread(kernel),
        "ratio": round(median / reference, 3), "idle": options.idle, "spin_us": PLACES[place],
        "cores": options.cores, "machine": platform.processor() or platform.machine()}), flush=True)


if __name__ == "__main__":
    main()
