"""`consume`: a jitted function for every packet of a socket or a poller."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numba import njit
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from dataplane.client.poller import Poller
from dataplane.errors import DataplaneError, Stopped
from tests.client.local import LocalSession, in_thread


@njit
def note(payload: Any, info: Any, state: Any) -> None:
    """Writes down everything that it is told."""
    fields, counts = state
    i = counts[0]
    fields[i, 0], fields[i, 1] = info.socket, info.timestamp_ns
    fields[i, 2], fields[i, 3] = info.family, info.vlan
    fields[i, 4], fields[i, 5] = info.remote_port, info.local_port
    fields[i, 6], fields[i, 7], fields[i, 8] = info.remote_hi, info.remote_lo, info.local_hi
    fields[i, 9], fields[i, 10], fields[i, 11] = info.local_lo, payload.size, payload.sum()
    counts[0] = i + 1


@njit
def count(payload: Any, info: Any, state: Any) -> None:
    state[info.socket] += 1


@njit
def fails_at_three(payload: Any, info: Any, state: Any) -> None:
    state[0] += 1
    if payload[0] == 3:
        raise ValueError("three")


@pytest.fixture
def local() -> Iterator[LocalSession]:
    session = LocalSession(workers=2)
    yield session
    session.close()


def packet(data: bytes, port: int = 9) -> bytes:
    return bytes(IP(src="10.0.0.9", dst="10.77.0.1") / UDP(sport=port, dport=5000) / data)


def test_the_kernel_is_told_everything(local: LocalSession) -> None:
    sock, raw, tap = local.open(), local.open("raw"), local.open("tap")
    six = bytes(IPv6(src="fd77::9", dst="fd77::1") / UDP(sport=7, dport=5000) / b"six")
    local.produce(sock, [packet(b"\1\2")], time=11)
    local.produce(sock, [six], offset=48, time=12, vlan=0x8001)
    local.produce(raw, [packet(b"")], offset=0, time=13)
    local.produce(tap, [b"\1\1\1"], wire=9, time=14)
    fields, counts = np.zeros((8, 12), np.int64), np.zeros(1, np.int64)
    with Poller(local, [tap, sock, raw]) as poller:
        assert poller.consume(note, (fields, counts), timeout=0) == 4
    fd77 = 0xFD77 << 48
    fd77 -= 1 << 64
    assert sorted(fields[:4].tolist()) == [
        [0, 14, 0, -1, 0, 0, 0, 0, 0, 0, 3, 3],
        [1, 11, 4, -1, 9, 5000, 0, 0x0A000009, 0, 0x0A4D0001, 2, 3],
        [1, 12, 6, 0x8001, 7, 5000, fd77, 9, fd77, 1, 3, sum(b"six")],
        [2, 13, 4, -1, 0, 0, 0, 0x0A000009, 0, 0x0A4D0001, 28, sum(packet(b""))],
    ]
    assert all(local.empty(one) for one in (sock, raw, tap))


def test_as_many_as_asked_for(local: LocalSession) -> None:
    sock, state = local.open(), np.zeros(1, np.int64)
    assert local.fill(sock, 100) == 100
    assert sock.consume(count, state, max_packets=30) == 30
    assert sum(local.consumed(sock)) == 30
    assert sock.recv(0) is not None
    assert sock.consume(count, state, timeout=0) == 69 and state[0] == 99
    assert sock.consume(count, state, max_packets=0) == 0
    assert sock.consume(count, state, timeout=0.01) == 0
    assert sum(local.consumed(sock)) == 100 and local.empty(sock)


def test_without_waiting_takes_all_that_is_there(local: LocalSession) -> None:
    sock, state = local.open(ring_bytes=1 << 21), np.zeros(1, np.int64)
    assert local.fill(sock, 20_000) == 20_000       # more than one sweep takes
    assert sock.consume(count, state, timeout=0) == 20_000 and local.empty(sock)


def test_a_kernel_that_raises(local: LocalSession) -> None:
    """The packet at which it raised is gone, the others are not."""
    sock, state = local.open(), np.zeros(1, np.int64)
    local.produce(sock, [packet(bytes([i])) for i in range(6)])
    with pytest.raises(ValueError, match="three"):
        sock.consume(fails_at_three, state, timeout=0)
    assert state[0] == 4 and local.consumed(sock) == [4, 0]
    assert sock.recv(0) == b"\4"
    assert sock.consume(fails_at_three, state, timeout=0) == 1


def test_not_jitted(local: LocalSession) -> None:
    with pytest.raises(TypeError, match="njit"):
        local.open().consume(lambda payload, info, state: None, None)


def test_many_sockets_share_a_budget_fairly(local: LocalSession) -> None:
    socks = [local.open(ring_bytes=8192) for _ in range(50)]
    for sock in socks:
        assert local.fill(sock, 40) == 40
    state = np.zeros(50, np.int64)
    with Poller(local, socks) as poller:
        taken = 0
        while taken < 2000:
            taken += poller.consume(count, state, max_packets=97, timeout=0)
    assert state.tolist() == [40] * 50 and all(local.empty(sock) for sock in socks)


def test_poller_waits(local: LocalSession) -> None:
    socks = [local.open() for _ in range(30)]
    with Poller(local, socks) as poller:
        assert poller.sockets == tuple(socks) and len(poller) == 30
        with pytest.raises(TimeoutError):
            poller.wait(0.01)
        local.produce(socks[3], [packet(b"a"), packet(b"b")], worker=1)
        local.produce(socks[29], [packet(b"c")])
        assert poller.wait(0) == [socks[3], socks[29]]
        assert socks[3].recv(0) == b"a" and socks[29].recv(0) == b"c"
        assert poller.wait(0) == [socks[3]]
        batch = socks[3].recv_batch()
        with pytest.raises(TimeoutError):
            poller.wait(0.01)
        with pytest.raises(DataplaneError, match="not released"):
            poller.consume(count, np.zeros(30, np.int64))
        batch.release()
        thread, results = in_thread(poller.wait, 10.0)
        time.sleep(0.05)
        local.produce(socks[7], [packet(b"a")])
        thread.join(10)
        assert results == [[socks[7]]]
        with pytest.raises(DataplaneError, match="another poller"):
            Poller(local, [socks[0]])
    with pytest.raises(DataplaneError, match="closed"):
        poller.wait(0)
    assert socks[7].recv(0) == b"a"
    Poller(local, socks).close()


def test_a_closed_socket_leaves_the_poller(local: LocalSession) -> None:
    socks = [local.open() for _ in range(3)]
    poller = Poller(local, socks)
    thread, results = in_thread(poller.wait, 10.0)
    time.sleep(0.05)
    socks[0].close()
    local.produce(socks[2], [packet(b"x")])
    thread.join(10)
    assert results == [[socks[2]]]
    state = np.zeros(3, np.int64)
    assert poller.consume(count, state, timeout=0) == 1 and state.tolist() == [0, 0, 1]
    socks[1].close()
    socks[2].close()
    with pytest.raises(DataplaneError, match="all sockets"):
        poller.wait(1)
    poller.close()


@pytest.mark.parametrize("make", [list, lambda socks: socks * 2])
def test_what_a_poller_refuses(local: LocalSession, make: Any) -> None:
    with pytest.raises(ValueError):
        Poller(local, make([]) if make is list else make([local.open()]))


def test_it_ends_with_the_dataplane(local: LocalSession) -> None:
    sock, state = local.open(), np.zeros(1, np.int64)
    local.fill(sock, 10)
    thread, results = in_thread(sock.consume, count, state)
    time.sleep(0.02)
    local.fill(sock, 10)
    local.stop()
    thread.join(10)
    assert results == [20]
    with pytest.raises(Stopped):
        sock.consume(count, state)


def test_ctrl_c_ends_it(local: LocalSession) -> None:
    sock, state = local.open(), np.zeros(1, np.int64)
    sock.consume(count, state, timeout=0)
    assert threading.current_thread() is threading.main_thread()
    for call in (lambda: sock.consume(count, state), sock.recv, lambda: Poller(local, [sock]).wait()):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            call()


def test_closing_ends_a_consume_without_limits(local: LocalSession) -> None:
    socks = [local.open(), local.open()]
    poller, state = Poller(local, socks), np.zeros(2, np.int64)
    thread, results = in_thread(poller.consume, count, state)
    time.sleep(0.05)
    socks[0].close()
    local.produce(socks[1], [packet(b"x")])
    poller.close()
    thread.join(10)
    assert isinstance(results[0], DataplaneError) and "closed" in str(results[0])
