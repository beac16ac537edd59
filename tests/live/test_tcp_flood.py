"""A SYN flood, as fast as one core can send: a legitimate client still connects and transfers throughout.

On a TUN that is more than an RX worker takes, and what it does not take is lost in the kernel's queue of SYNs before
it. So the client may have to send its SYN again, which it does each second; whoever is connected loses nothing."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator

import pytest

import dataplane
from tests.live.tcp_bed import (
    OURS,
    World,
    digest,
    kernel_connect,
    pipe,
    receive_stream,
    send_stream,
    wait_for,
    world,
)
from tests.netns import mac
from tests.traffic import syn_flood

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

PORT = 7000
SIZE = 64 << 10


@pytest.fixture(scope="module", params=["tun", "af_packet"])
def w(request: pytest.FixtureRequest) -> Iterator[World]:
    with world(request.param, "[tcp]\ntime_wait = 1.0") as made:
        yield made
        made.process.stop()


def serve(dp: dataplane.Dataplane, address: str, port: int, ready: int) -> None:
    with dp.tcp_listen(address, port) as listener:
        os.write(ready, b"x")
        while True:
            conn, _ = listener.accept(timeout=60)
            conn.settimeout(60)
            with conn, contextlib.suppress(OSError):
                total, sha = receive_stream(conn)
                conn.sendall(f"{total} {sha}".encode())


def client(family: int, port: int, seconds: float, size: int) -> tuple[list[float], list[float]]:
    """Connects and transfers again and again, once at least; how long each connect and each transfer took."""
    connects: list[float] = []
    transfers: list[float] = []
    end = time.monotonic() + seconds
    while not transfers or time.monotonic() < end:
        start = time.monotonic()
        with kernel_connect(family, port) as sock:
            connects.append(time.monotonic() - start)
            send_stream(sock, 9, size)
            assert sock.recv(200).decode() == f"{size} {digest(9, size)}"
            transfers.append(time.monotonic() - start - connects[-1])
    return connects, transfers


def counted(dp: dataplane.Dataplane) -> tuple[int, int]:
    """SYNs that were handled, and frames that the kernel has dropped before us."""
    dropped = dp.stats()["dropped"]
    return dropped.get("tcp_handshake", 0), dropped.get("kernel_dropped", 0)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("seconds", "clients"), [(1.0, 512), pytest.param(30.0, 8192, marks=pytest.mark.stress)])
@pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
def test_a_client_connects_and_transfers_through_a_flood(w: World, family: int, seconds: float, clients: int) -> None:
    with pipe() as (ready, tell_ready):
        server = w.consumer(serve, OURS[family], PORT, tell_ready)
        os.read(ready, 1)
    link = b""
    if w.kind == "af_packet":
        link = mac(*w.near) + mac(w.peer, w.device) + (b"\x08\x00" if family == 4 else b"\x86\xdd")
    flood = w.peer.fork(syn_flood, w.device, family, OURS[family], PORT, 1000, link, clients)
    try:
        with dataplane.attach(w.name) as dp:
            still = counted(dp)[0] + 20_000
            wait_for(lambda: counted(dp)[0] > still, "the flood")
            before, start = counted(dp), time.monotonic()
            connects, transfers = w.peer.call(client, family, PORT, seconds, SIZE, timeout=300)
            after, duration = counted(dp), time.monotonic() - start
        assert flood.running()
    finally:
        flood.kill()
        server.kill()
    handled, lost = ((b - a) / duration for a, b in zip(before, after, strict=True))
    print(f"{w.kind} ipv{family}: {handled:.0f} SYN/s handled, {lost:.0f}/s lost before us; "
          f"{len(transfers)} transfers of {SIZE >> 10} KiB; "
          f"connect: median {statistics.median(connects):.3f} s, longest {max(connects):.2f} s; "
          f"transfer: median {statistics.median(transfers):.3f} s, longest {max(transfers):.3f} s")
    assert max(transfers) < 5, "connected, but hindered"
    assert handled > 5_000, "this is no flood"
