"""How long a dataplane takes to start, and how much memory it takes.

    python -m bench.start                           seconds from the command to the line `ready`, cache warm
    python -m bench.start --cache cold              the same with an empty cache: everything is compiled. One repeat
    python -m bench.start --what memory             MB of an idle dataplane
    python -m bench.start --what memory --per udp   and what a further UDP socket takes, KB
    python -m bench.start --what memory --per tcp   or an accepted, idle TCP connection, of a peer in a namespace; root

A start is `dataplane run` with one RX worker, with a synthetic netif that waits for sockets (which are never opened),
Python's own start and all imports included.

Memory is that of all processes of the dataplane, and of the consumer where there is one: PSS, that is, what is theirs
alone and their part of what is shared (/proc/PID/smaps), but for the dataplane's files in /dev/shm, which count with
all the memory that they have. Per socket or connection: what `--count` of them add, divided. The compiled code of TCP
and Python's own first growth are paid before, with ten of them. The peer's memory, and the kernel's for the peer, do
not count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

import dataplane
from bench import harness
from tests.netns import Namespace

FIRST = 10                  # sockets or connections before the first look
PORT = 7000
SETTLE = 0.2                # seconds before a look
OURS = "10.77.0.1"
UNITS = {"idle": ("MB", 1e6), "udp": ("KB", 1e3), "tcp": ("KB", 1e3)}

CONFIG = """
name = "{name}"
[rx]
cores = [{core}]
[sockets]
max = 8192
[[netif]]
"""
SYNTHETIC = """
kind = "synthetic"
start = 8192
"""
TUN = """
kind = "tun"
device = "dp0"
addresses = ["10.77.0.1/24"]
"""


def configuration(netif: str) -> str:
    return CONFIG.replace("{core}", str(harness.CORES[0])) + netif


# -- ready -------------------------------------------------------------------------------------------------------


def start() -> float:
    """Seconds until it is ready; then it ends."""
    begin = time.monotonic()
    with harness.running(configuration(SYNTHETIC)):
        return time.monotonic() - begin


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """A cache directory without anything, for what is started inside."""
    before = os.environ.get("DATAPLANE_CACHE_DIR")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["DATAPLANE_CACHE_DIR"] = directory
        try:
            yield
        finally:
            if before is None:
                del os.environ["DATAPLANE_CACHE_DIR"]
            else:
                os.environ["DATAPLANE_CACHE_DIR"] = before


def ready(options: argparse.Namespace) -> list[float]:
    """Seconds of each repeat."""
    if options.cache == "warm":
        start()
        return [start() for _ in range(options.repeats)]
    values = []
    for _ in range(options.repeats):
        with empty_cache():
            values.append(start())
    return values


# -- memory ------------------------------------------------------------------------------------------------------


def private(pid: int) -> int:
    """Bytes of a process: its PSS but for what it maps of /dev/shm."""
    total, counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            counted = not words[-1].startswith("/dev/shm/dataplane.")
        elif words[0] == "Pss:" and counted:
            total += int(words[1]) * 1024
    return total


def memory(at: harness.Running, *others: int) -> int:
    """Bytes of a dataplane: its processes, those others, and its files in /dev/shm."""
    children = psutil.Process(at.process.pid).children(recursive=True)
    files = Path("/dev/shm").glob(f"dataplane.{os.geteuid()}.{at.name}.*")
    return (sum(private(pid) for pid in (at.process.pid, *(child.pid for child in children), *others))
            + sum(path.stat().st_blocks * 512 for path in files))


def idle(options: argparse.Namespace) -> float:
    """Bytes of a dataplane that nobody uses."""
    with harness.running(configuration(SYNTHETIC)) as at:
        time.sleep(SETTLE)
        return memory(at)


def each_udp(options: argparse.Namespace) -> float:
    """Bytes of one UDP socket more. This process is the consumer."""
    with harness.running(configuration(SYNTHETIC)) as at, dataplane.attach(at.name) as dp:
        socks = [dp.udp("0.0.0.0", 1024 + i) for i in range(FIRST)]
        before = memory(at, os.getpid())
        socks += [dp.udp("0.0.0.0", 1024 + FIRST + i) for i in range(options.count)]
        return (memory(at, os.getpid()) - before) / options.count


def connect(listen: int, tell: int) -> None:
    """The peer: opens as many connections as it is told to, holds them, and says when it has them."""
    held: list[socket.socket] = []
    while command := os.read(listen, 4):
        held += [socket.create_connection((OURS, PORT), timeout=30) for _ in range(int.from_bytes(command, "big"))]
        os.write(tell, b"x")


def each_tcp(options: argparse.Namespace) -> float:
    """Bytes of one accepted connection more. This process is the consumer."""
    harness.need_root()
    allow_descriptors(options.count + 256)
    with contextlib.ExitStack() as stack:
        listen, tell = os.pipe()
        heard, say = os.pipe()
        for descriptor in (listen, tell, heard, say):
            stack.callback(os.close, descriptor)
        namespace = stack.enter_context(Namespace())
        at = stack.enter_context(harness.running(configuration(TUN), namespace))
        dp = stack.enter_context(dataplane.attach(at.name))
        namespace.fork(connect, listen, say)
        listener = stack.enter_context(dp.tcp_listen(OURS, PORT, connections=options.count + FIRST))
        held = []
        sizes = []
        for count in (FIRST, options.count):
            os.write(tell, count.to_bytes(4, "big"))
            held += [listener.accept(timeout=30)[0] for _ in range(count)]
            assert os.read(heard, 1) == b"x"
            time.sleep(SETTLE)
            sizes.append(memory(at, os.getpid()))
        for one in held:
            one.abort()
    return (sizes[1] - sizes[0]) / options.count


def allow_descriptors(count: int) -> None:
    """Lets this process and its children have so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(hard, count)))


MEMORY = {"idle": idle, "udp": each_udp, "tcp": each_tcp}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.set_defaults(repeats=None)
    parser.add_argument("--what", choices=["ready", "memory"], default="ready")
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm")
    parser.add_argument("--per", choices=list(MEMORY), default="idle", help="what `memory` is of")
    parser.add_argument("--count", type=int, default=1000, help="of sockets or connections")
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.what == "ready" and options.cache == "cold" else 5)
    if options.what == "ready":
        harness.report(f"start.{options.cache}", "s", ready(options), options)
        return
    unit, size = UNITS[options.per]
    values = [MEMORY[options.per](options) / size for _ in range(options.repeats)]
    harness.report(f"memory.{options.per}", unit, values, options)


if __name__ == "__main__":
    harness.run(main)
