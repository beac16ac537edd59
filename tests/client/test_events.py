"""asyncio: batches from several sockets of one loop through one eventfd."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP

from dataplane.control import messages
from dataplane.shm import layout as L
from tests.client.local import LocalSession


@pytest.fixture
def local() -> Iterator[LocalSession]:
    session = LocalSession(workers=2)
    yield session
    session.close()


def packet(data: bytes) -> bytes:
    return bytes(IP(src="10.0.0.9", dst="10.77.0.1") / UDP(sport=9, dport=5000) / data)


def announce(local: LocalSession, sock: Any, data: bytes) -> None:
    """What a worker does: publishes, and writes the eventfd if the waiter has armed it."""
    local.produce(sock, [packet(data)])
    if local.events == L.WAKE_PIPE:
        os.eventfd_write(local.sources[0].descriptor, 1)


def test_several_sockets_in_one_loop(local: LocalSession) -> None:
    socks = [local.open() for _ in range(3)]

    async def receive(sock: Any) -> list[bytes]:
        return [bytes(view) async for batch in sock for view in batch]

    async def main() -> list[list[bytes]]:
        tasks = [asyncio.create_task(receive(sock)) for sock in socks]
        for i in range(50):
            await asyncio.sleep(0.002 if i % 3 else 0)
            announce(local, socks[i % 3], b"%d" % i)
        await asyncio.sleep(0.01)
        local.stop()
        return await asyncio.gather(*tasks)

    got = asyncio.run(main())
    assert [sorted(map(int, one)) for one in got] == [list(range(i, 50, 3)) for i in range(3)]
    assert sum(isinstance(one, messages.Event) for one in local.connection.requests) == 1  # type: ignore[attr-defined]
    assert all(local.empty(sock) for sock in socks)


def test_a_break_releases_and_another_loop_goes_on(local: LocalSession) -> None:
    sock = local.open()

    async def one(data: bytes) -> bytes:
        asyncio.get_running_loop().call_later(0.01, announce, local, sock, data)
        async for batch in sock:
            return bytes(next(iter(batch)))
        return b""

    for i in range(3):
        assert asyncio.run(asyncio.wait_for(one(b"%d" % i), 10)) == b"%d" % i
    assert len(local.sources) == 1
    local.produce(sock, [packet(b"then")])
    assert sock.recv(0) == b"then"


def test_cancelling_leaves_the_socket_usable(local: LocalSession) -> None:
    sock = local.open()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(aiter(sock)), 0.02)
        announce(local, sock, b"x")

    asyncio.run(main())
    assert local.events == 0
    assert sock.recv(0) == b"x"


def test_others_have_their_turn(local: LocalSession) -> None:
    sock = local.open()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(count())
        seen = 0
        local.fill(sock, 10)
        async for _ in sock:
            local.fill(sock, 10)
            seen += 1
            if seen == 20:
                break
        task.cancel()

    asyncio.run(main())
    assert turns >= 10
