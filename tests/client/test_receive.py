"""Receiving: packets one at a time, batches, and what becomes of the ring."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt

from dataplane.client.poller import Poller
from dataplane.errors import DataplaneError, Stopped
from dataplane.shm import layout as L
from tests.client.local import LocalSession, in_thread


@pytest.fixture
def local() -> Iterator[LocalSession]:
    session = LocalSession(workers=2)
    yield session
    session.close()


def packet4(payload: bytes, source: str = "10.0.0.9", port: int = 1234) -> bytes:
    return bytes(IP(src=source, dst="10.77.0.1") / UDP(sport=port, dport=5000) / payload)


def packet6(payload: bytes, source: str = "fd77::9", port: int = 1234) -> bytes:
    udp = UDP(sport=port, dport=5000) / payload
    return bytes(IPv6(src=source, dst="fd77::1") / IPv6ExtHdrDestOpt() / udp)


def test_one_at_a_time(local: LocalSession) -> None:
    sock = local.open()
    local.produce(sock, [packet4(b"first"), packet4(b"", port=65535), packet4(b"x" * 1472)])
    local.produce(sock, [packet6(b"six")], offset=56)
    assert sock.recvfrom(0) == (b"first", ("10.0.0.9", 1234))
    assert sock.recvfrom(timeout=1.0) == (b"", ("10.0.0.9", 65535))
    assert sock.recv() == b"x" * 1472
    assert sock.recvfrom() == (b"six", ("fd77::9", 1234))
    assert local.consumed(sock) == [4, 0] and local.empty(sock)
    with pytest.raises(TimeoutError, match="timed out"):
        sock.recvfrom(0)
    with pytest.raises(ValueError, match="negative"):
        sock.recvfrom(-1)


def test_kinds(local: LocalSession) -> None:
    raw, tap = local.open("raw"), local.open("tap")
    packets = [packet4(b"raw"), packet6(b"raw6")]
    local.produce(raw, packets, offset=0)
    assert raw.recvfrom(0) == (packets[0], ("10.0.0.9", 0))
    assert raw.recvfrom(0) == (packets[1], ("fd77::9", 0))
    local.produce(tap, [b"frame"], wire=1500)
    assert tap.recvfrom(0) == (b"frame", None)
    local.produce(tap, [b"frame"], wire=1500)
    with tap.recv_batch() as batch:
        assert batch.wire_lengths.tolist() == [1500] and batch.vlan.tolist() == [-1]
        assert batch.remote["family"].tolist() == [0]


def test_many_packets_across_the_wrap_keep_their_order(local: LocalSession) -> None:
    sock = local.open(ring_bytes=4096)
    rng = random.Random(5)
    sent = [bytes([i % 256]) * rng.randrange(0, 1400) for i in range(2000)]
    waiting, got = list(sent), []
    while len(got) < len(sent):
        room = local.produce(sock, [packet4(data) for data in waiting[:rng.randrange(1, 6)]], worker=0)
        del waiting[:room]
        for _ in range(rng.randrange(0, room + 1)):
            got.append(sock.recv(0))
        if not room:
            got += [bytes(view) for view in sock.recv_batch(2, 0)]
            sock._batch.release()
    assert got == sent and local.empty(sock) and local.consumed(sock) == [2000, 0]


def test_a_batch_describes_its_packets(local: LocalSession) -> None:
    sock = local.open()
    packets = [packet4(b"one"), packet4(b"three", "10.1.2.3", 7)]
    local.produce(sock, packets, time=100)
    local.produce(sock, [packet6(b"six")], worker=1, offset=56, time=500, vlan=0x8123)
    with sock.recv_batch(10, timeout=0) as batch:
        assert len(batch) == 3
        order = [0, 1, 2] if batch.lengths[0] == 3 and batch.lengths[1] == 5 else [1, 2, 0]
        payloads = [batch.data[a:a + n].tobytes() for a, n in zip(batch.offsets, batch.lengths, strict=True)]
        assert [payloads[i] for i in order] == [b"one", b"three", b"six"]
        assert [bytes(view) for view in batch] == payloads
        assert batch.timestamps_ns[order].tolist() == [100, 101, 500]
        assert batch.vlan[order].tolist() == [-1, -1, 0x8123]
        assert batch.wire_lengths[order].tolist() == [31, 33, 59]
        remote, local_end = batch.remote[order], batch.local[order]
        assert remote["family"].tolist() == [4, 4, 6] and remote["port"].tolist() == [1234, 7, 1234]
        assert bytes(remote["address"][1]) == socket.inet_aton("10.1.2.3") + bytes(12)
        assert ipaddress.ip_address(bytes(remote["address"][2])) == ipaddress.ip_address("fd77::9")
        assert bytes(local_end["address"][0][:4]) == socket.inet_aton("10.77.0.1")
        assert local_end["port"].tolist() == [5000] * 3
        assert not local.empty(sock)
    assert local.empty(sock) and local.consumed(sock) == [2, 1]


def test_a_released_batch_is_gone(local: LocalSession) -> None:
    sock = local.open()
    local.produce(sock, [packet4(b"one"), packet4(b"two")])
    batch = sock.recv_batch(1)
    view, array = next(iter(batch)), np.frombuffer(next(iter(batch)), np.uint8)
    with pytest.raises(DataplaneError, match="not released"):
        sock.recv_batch(timeout=0)
    with pytest.raises(DataplaneError, match="not released"):
        sock.recvfrom(timeout=0)
    batch.release()
    batch.release()
    for use in ("data", "offsets", "remote", "vlan"):
        with pytest.raises(DataplaneError, match="released"):
            getattr(batch, use)
    with pytest.raises(DataplaneError, match="released"):
        list(batch)
    with pytest.raises(DataplaneError, match="released"), batch:
        pass
    with pytest.raises(ValueError, match="released"):
        bytes(view)
    assert array.size == 3 and len(batch) == 1
    assert sock.recv(0) == b"two"


def test_what_was_only_found_is_not_lost(local: LocalSession) -> None:
    """Per-packet calls look ahead; the other calls must see what they have not handed out."""
    sock = local.open()
    local.produce(sock, [packet4(b"%d" % i) for i in range(6)])
    assert sock.recv() == b"0"
    with sock.recv_batch(2) as batch:
        assert [bytes(view) for view in batch] == [b"1", b"2"]
    assert sock.recv() == b"3"
    batches = sock.batches()
    assert [bytes(view) for view in next(batches)] == [b"4", b"5"]
    batches.close()
    assert local.consumed(sock) == [6, 0] and local.empty(sock)


def test_waiting_ends_when_a_packet_comes(local: LocalSession) -> None:
    sock = local.open()
    for delay in (0.0, 0.05):
        thread, results = in_thread(sock.recvfrom, 10.0)
        time.sleep(delay)
        local.produce(sock, [packet4(b"woken")], worker=1)
        thread.join(10)
        assert results == [(b"woken", ("10.0.0.9", 1234))]


def test_the_end_of_the_dataplane(local: LocalSession) -> None:
    sock = local.open()
    local.produce(sock, [packet4(b"last")])
    thread, results = in_thread(local.open().recv, None)
    local.stop()
    assert sock.recv() == b"last"
    for call in (sock.recv, sock.recvfrom, sock.recv_batch, sock.poll_batch):
        with pytest.raises(Stopped, match="has ended"):
            call()
    with pytest.raises(Stopped):
        sock.recv(0)
    assert list(sock.batches()) == []
    thread.join(10)
    assert isinstance(results[0], Stopped)
    with pytest.raises(Stopped):
        sock.sendto(b"x", ("10.77.0.2", 1))


def test_a_hung_up_control_connection_is_the_end(local: LocalSession) -> None:
    sock = local.open()
    local.connection.gone = True  # type: ignore[attr-defined]
    with pytest.raises(Stopped):
        sock.recv(5)


def test_closing(local: LocalSession) -> None:
    sock = local.open()
    local.produce(sock, [packet4(b"unread")] * 3)
    sock.recv()
    batch = sock.recv_batch(1)
    sock.close()
    sock.close()
    batch.release()
    assert sock.closed and batch.released and "closed" in repr(sock)
    for call in (sock.recv, sock.recvfrom, sock.recv_batch, sock.poll_batch, sock.stats, sock.__enter__):
        with pytest.raises(OSError, match="closed") as error:
            call()
        assert error.value.errno == 9
    with pytest.raises(OSError, match="closed"):
        sock.sendto(b"x", ("10.77.0.2", 1))


def test_closing_ends_the_wait_of_others(local: LocalSession) -> None:
    sock = local.open()
    thread, results = in_thread(sock.recv, None)
    time.sleep(0.05)
    sock.close()
    thread.join(10)
    assert isinstance(results[0], OSError) and results[0].errno == 9
    other = local.open()
    thread, results = in_thread(other.recv, None)
    time.sleep(0.05)
    local.close()
    thread.join(10)
    assert isinstance(results[0], DataplaneError) and "closed" in str(results[0])


def test_releasing_a_batch_does_not_wait_for_a_receiver(local: LocalSession) -> None:
    first, second = local.open(), local.open()
    local.produce(first, [packet4(b"one")])
    with Poller(local, [first, second]) as poller:
        batch = first.recv_batch()
        thread, results = in_thread(poller.wait, 20.0)
        time.sleep(0.05)
        batch.release()
        assert thread.is_alive()
        local.produce(second, [packet4(b"two")])
        thread.join(10)
        assert results == [[second]]


def test_threads_share_a_socket(local: LocalSession) -> None:
    sock = local.open()
    got: list[bytes] = []
    done = threading.Event()

    def receive() -> None:
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                got.append(sock.recv(0.2))

    threads = [threading.Thread(target=receive) for _ in range(3)]
    for thread in threads:
        thread.start()
    sent = [b"%d" % i for i in range(3000)]
    waiting = list(sent)
    while waiting:
        del waiting[:local.produce(sock, [packet4(data) for data in waiting[:20]])]
    deadline = time.monotonic() + 30
    while len(got) < len(sent) and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join(10)
    assert sorted(got) == sorted(sent)


def test_threads_receive_in_different_ways(local: LocalSession) -> None:
    """What one has found and not yet handed out is there for the others."""
    sock = local.open()
    got: list[bytes] = []
    done = threading.Event()

    def one_by_one() -> None:
        while not done.is_set():
            # DataplaneError: the other thread has a batch in its hands.
            with contextlib.suppress(TimeoutError, DataplaneError):
                data, address = sock.recvfrom(0.2)
                assert address == ("10.0.0.9", 1234)
                got.append(data)

    def in_batches() -> None:
        while not done.is_set():
            with contextlib.suppress(TimeoutError), sock.recv_batch(50, timeout=0.2) as batch:
                got.extend(bytes(payload) for payload in batch)

    threads = [threading.Thread(target=how) for how in (one_by_one, one_by_one, in_batches)]
    for thread in threads:
        thread.start()
    sent = [b"%d" % i * (1 + i % 3 * (i // 1000 % 2)) for i in range(4000)]     # sizes alike, and not
    waiting = list(sent)
    while waiting:
        del waiting[:local.produce(sock, [packet4(data) for data in waiting[:40]])]
    deadline = time.monotonic() + 30
    while len(got) < len(sent) and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join(10)
    assert sorted(got) == sorted(sent) and local.empty(sock)


def test_after_a_fork(local: LocalSession) -> None:
    """In the child every use is an error at once, even of a socket that a thread was waiting on."""
    sock, busy = local.open(), local.open()
    local.produce(sock, [packet4(b"parent's")] * 2)
    sock.recv()
    thread, results = in_thread(busy.recv, 30.0)
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for call in (sock.recv, busy.recv, sock.recv_batch, lambda: sock.sendto(b"x", ("10.77.0.2", 1))):
                try:
                    call()
                    break
                except DataplaneError as error:
                    if f"attached in process {os.getppid()}; attach again" not in str(error):
                        break
            else:
                sock.close()
                busy.close()
                local.close()
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sock.recv(0) == b"parent's"
    local.produce(busy, [packet4(b"still here")])
    thread.join(10)
    assert results == [b"still here"]


def test_a_full_ring_is_not_held_by_looking_ahead(local: LocalSession) -> None:
    """What recv found but has not handed out takes a quarter of the ring at most."""
    sock = local.open(ring_bytes=16384)
    local.produce(sock, [packet4(b"x" * 100)] * 110)
    for _ in range(32):
        sock.recv()
    tail = int(local.memory.words(sock._slot[0] + L.SLOT_LANES + L.LANE_TAIL)[0])
    assert tail >= 16384 // 8
