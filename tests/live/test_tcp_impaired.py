"""TCP through a network that loses, delays, reorders, doubles and damages packets, in both directions, or that takes
the peer away. The peer is one hop behind the dataplane's link (tests/relay.py)."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dataplane
from tests.live.tcp_bed import FAR, OURS, WATCHDOG, World, digest, exchange, kernel_connect, world
from tests.netns import Forked

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

MIB = 1 << 20
PORT = 7000

IMPAIRMENTS: dict[str, dict[str, float]] = {
    "loss1": {"loss": 0.01},
    "loss5": {"loss": 0.05},
    "reordering": {"delay": 0.05, "early": 0.1},
    "duplication": {"duplicate": 0.01},
    "corruption": {"corrupt": 0.001},
}
FEW = {"corruption": {"corrupt": 0.01}}     # in a short stream one in a thousand may well be none
FATES = {"loss1": "lost", "loss5": "lost", "reordering": "early", "duplication": "doubled", "corruption": "damaged"}


@pytest.fixture(scope="module", params=["tun", "af_packet"])
def w(request: pytest.FixtureRequest) -> Iterator[World]:
    with world(request.param, "[tcp]\ntime_wait = 1.0", routed=True) as made:
        yield made
        ledger = made.process.stop()
        assert "crash_lost" not in ledger["dropped"] and "pcq_full" not in ledger["dropped"], ledger


@contextlib.contextmanager
def impaired(w: World, **how: float) -> Iterator[Any]:
    """The link, impaired as long as the block runs."""
    assert w.link is not None
    w.link.impair(**how)
    try:
        yield w.link
    finally:
        w.link.impair()


def client(family: int, port: int, size: int) -> tuple[int, str]:
    with kernel_connect(family, port) as sock:
        return exchange(sock, 1, size)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [MIB, pytest.param(64 * MIB, marks=pytest.mark.stress)], ids=["1MiB", "64MiB"])
@pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("how", IMPAIRMENTS)
def test_streams_come_through(w: World, how: str, family: int, size: int) -> None:
    rates = FEW.get(how, IMPAIRMENTS[how]) if size < 10 * MIB else IMPAIRMENTS[how]
    with impaired(w, **rates) as link, dataplane.attach(w.name) as dp, \
            dp.tcp_listen(OURS[family], PORT) as listener:
        before = link.counters()
        start = time.monotonic()
        child = w.peer.fork(client, family, PORT, size)
        conn, address = listener.accept(timeout=WATCHDOG)
        assert address[0] == FAR[family]
        conn.settimeout(WATCHDOG)
        with conn:
            assert exchange(conn, 2, size) == (size, digest(1, size))
            info = conn.getsockopt("info")
        assert child.result(800) == (size, digest(2, size))
        seconds = time.monotonic() - start
        met = {name: count - before[name] for name, count in link.counters().items()}
    assert met[FATES[how]] > 0, met
    if how == "loss5":
        assert info["retransmits"] > 0
    if path := os.environ.get("DATAPLANE_REPORT"):
        with open(path, "a") as file:
            print(json.dumps({"how": how, "netif": w.kind, "family": family, "size": size,
                              "seconds": round(seconds, 2), **met, **info}), file=file)


# -- a peer that is no longer there ----------------------------------------------------------------------------


def stay(family: int, port: int, ready: int) -> None:
    with kernel_connect(family, port):
        os.write(ready, b"x")
        time.sleep(2 * WATCHDOG)


@contextlib.contextmanager
def quiet_peer(w: World, dp: dataplane.Dataplane) -> Iterator[Any]:
    """A connection whose peer says nothing."""
    reading, writing = os.pipe()
    child: Forked | None = None
    try:
        with dp.tcp_listen(OURS[4], PORT) as listener:
            child = w.peer.fork(stay, 4, PORT, writing)
            conn, _ = listener.accept(timeout=WATCHDOG)
            with conn:
                os.read(reading, 1)
                conn.settimeout(WATCHDOG)
                yield conn
    finally:
        if child is not None:
            child.kill()
        os.close(reading)
        os.close(writing)


def test_a_peer_that_vanishes_with_data_outstanding(w: World) -> None:
    with dataplane.attach(w.name) as dp, quiet_peer(w, dp) as conn, impaired(w, loss=1.0):
        conn.setsockopt("user_timeout", 1000)
        conn.sendall(b"anybody?")
        with pytest.raises(TimeoutError):
            conn.recv(10)
        assert conn.getsockopt("info")["state"] == "closed"


def test_keepalive_finds_a_peer_that_vanished(w: World) -> None:
    with dataplane.attach(w.name) as dp, quiet_peer(w, dp) as conn, impaired(w, loss=1.0):
        for name, value in (("keepidle", 1), ("keepintvl", 1), ("keepcnt", 1), ("keepalive", True)):
            conn.setsockopt(name, value)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            conn.recv(10)
        assert time.monotonic() - start > 1


def test_keepalive_keeps_a_peer_that_is_there(w: World) -> None:
    with dataplane.attach(w.name) as dp, quiet_peer(w, dp) as conn:
        for name, value in (("keepidle", 1), ("keepintvl", 1), ("keepcnt", 1), ("keepalive", True)):
            conn.setsockopt(name, value)
        with pytest.raises(TimeoutError):
            conn.settimeout(3)
            conn.recv(10)
        assert conn.getsockopt("info")["state"] == "established"


def test_connect_times_out(w: World) -> None:
    with dataplane.attach(w.name) as dp, impaired(w, loss=1.0):
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            dp.tcp_connect(FAR[4], 80, timeout=1.2)
        assert time.monotonic() - start >= 1.2
