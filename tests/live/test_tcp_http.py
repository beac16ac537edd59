"""What people do with TCP: curl and HTTP clients of the kernel at an HTTP server on the dataplane, and asyncio streams
code that does not know on which of the two stacks it runs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import dataplane
from tests.live.tcp_bed import KERNELS, OURS, WATCHDOG, World, pipe, world
from tests.netns import Forked

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

ROOT = Path(__file__).parents[2]
WEB, PORT = 8080, 7000
CONNECTIONS, REQUESTS = 64, 10
PIECE = bytes(range(256)) * 4096        # of what /bytes/N gives

each_family = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module", params=["tun", "af_packet"])
def w(request: pytest.FixtureRequest) -> Iterator[World]:
    with world(request.param, "[tcp]\ntime_wait = 1.0") as made:
        yield made
        ledger = made.process.stop()
        assert "crash_lost" not in ledger["dropped"], ledger


@pytest.fixture(scope="module")
def site(w: World) -> Iterator[None]:
    """The example, in a process of its own; it ends by Ctrl-C."""
    command = [sys.executable, str(ROOT / "examples" / "http_server.py"), w.name, "--port", str(WEB)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert process.stdout is not None
        assert "listening at" in process.stdout.readline()
        yield
        process.send_signal(signal.SIGINT)
        assert process.wait(WATCHDOG) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def content(size: int) -> Iterator[bytes]:
    """What /bytes/SIZE is to give."""
    for start in range(0, size, len(PIECE)):
        yield PIECE[:size - start]


# -- HTTP ---------------------------------------------------------------------------------


@pytest.mark.needs("curl")
@pytest.mark.parametrize("size", [10_000_000, pytest.param(100_000_000, marks=pytest.mark.stress)],
                         ids=["10MB", "100MB"])
@each_family
def test_curl(w: World, site: None, family: int, size: int) -> None:
    host = OURS[4] if family == 4 else f"[{OURS[6]}]"
    fetch = f"curl --globoff --silent --show-error --fail --max-time 50 http://{host}:{WEB}/bytes/{size} | sha256sum"
    sha = hashlib.sha256()
    for piece in content(size):
        sha.update(piece)
    result = w.peer.run(["bash", "-o", "pipefail", "-c", fetch], timeout=WATCHDOG)
    assert result.stdout.split()[0] == sha.hexdigest()


def fetch_many(host: str, number: int) -> int:
    """Some requests over one connection; how many were answered as they should be."""
    choose = random.Random(number)
    connection = http.client.HTTPConnection(host, WEB, timeout=WATCHDOG)
    with contextlib.closing(connection):
        connection.connect()
        sock, good = connection.sock, 0
        for _ in range(REQUESTS):
            size = choose.choice([0, 1, choose.randrange(2000), choose.randrange(100_000)])
            connection.request("GET", f"/bytes/{size}")
            answer = connection.getresponse()
            good += answer.status == 200 and answer.read() == b"".join(content(size)) and connection.sock is sock
    return good


def crowd(host: str) -> list[int]:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(fetch_many, [host] * CONNECTIONS, range(CONNECTIONS)))


@each_family
def test_keep_alive(w: World, site: None, family: int) -> None:
    """64 connections at a time, each of them for several requests."""
    assert w.peer.call(crowd, OURS[family]) == [REQUESTS] * CONNECTIONS


# -- code that was written for asyncio ---------------------------------------------------------------------------


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Lines come back reversed; behind `count N`, so many bytes come back as they are. At the end: how many lines."""
    lines = 0
    async for line in reader:
        lines += 1
        words = line.split()
        if words[:1] == [b"count"]:
            data = await reader.readexactly(int(words[1]))
            writer.writelines([data[:100], data[100:]])
        else:
            writer.write(line.rstrip()[::-1] + b"\n")
        await writer.drain()
    assert reader.at_eof() and writer.can_write_eof()
    writer.write(b"%d lines from port %d" % (lines, writer.get_extra_info("sockname")[1]))
    writer.write_eof()
    with contextlib.suppress(ConnectionError):
        await reader.read()
    writer.close()
    await writer.wait_closed()


async def converse(open_connection: Any, host: str) -> list[bytes]:
    """A client of it: what it heard."""
    heard = []
    reader, writer = await open_connection(host, PORT)
    for size in (1, 10, 1000, 30_000):
        writer.write(bytes(48 + i % 75 for i in range(size)) + b"\n")
        heard.append(await reader.readline())
    data = random.Random(1).randbytes(2_000_000)
    writer.write(b"count %d\n" % len(data))
    sending = asyncio.create_task(_send(writer, data))
    heard.append(await reader.readexactly(len(data)))
    await sending
    writer.write_eof()
    heard.append(await reader.read())
    writer.close()
    await writer.wait_closed()
    return heard


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    for start in range(0, len(data), 50_000):
        writer.write(data[start:start + 50_000])
        await writer.drain()


def run_server(start_server: Any, host: str, ready: int) -> None:
    """Until it is killed."""
    async def main() -> None:
        server = await start_server(serve, host, PORT)
        os.write(ready, b"x")
        async with server:
            await server.serve_forever()

    asyncio.run(main())


def run_client(open_connection: Any, host: str) -> list[bytes]:
    async def some() -> list[list[bytes]]:
        return await asyncio.gather(*(converse(open_connection, host) for _ in range(4)))

    first, *others = asyncio.run(asyncio.wait_for(some(), WATCHDOG))
    assert all(other == first for other in others)
    return first


@contextlib.contextmanager
def serving(start: Any, *args: Any) -> Iterator[None]:
    """`start(..., ready)` is a process that serves."""
    with pipe() as (ready, tell_ready):
        server: Forked = start(*args, tell_ready)
        try:
            os.read(ready, 1)
            yield
        finally:
            server.kill()


@each_family
def test_asyncio_streams(w: World, family: int) -> None:
    """The same server and the same client, on the kernel's stack and on ours."""
    kernel, ours = KERNELS[family], OURS[family]
    with serving(w.peer.fork, run_server, asyncio.start_server, kernel):
        expected = w.peer.call(run_client, asyncio.open_connection, kernel)
        assert expected[-1] == b"5 lines from port %d" % PORT and len(expected[-2]) == 2_000_000
        with dataplane.attach(w.name) as dp:
            assert run_client(dp.open_connection, kernel) == expected
    with serving(w.consumer, lambda dp, ready: run_server(dp.start_server, ours, ready)):
        assert w.peer.call(run_client, asyncio.open_connection, ours) == expected
