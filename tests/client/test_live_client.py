"""The client library against a running dataplane: what only the two together can show."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numba import njit

import dataplane
from dataplane.control import messages
from dataplane.shm import layout as L
from tests.children import Child
from tests.dataplane_fixture import Running, running

PORTS = range(5000, 5004)
BIG = 1 << 20


def synthetic(count: int, rate: int = 0, start: int = 1, workers: int = 1) -> str:
    """64 flows to four ports; nothing is lost, so that what is sent is what is received."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    return f"""
[rx]
cores = {cores}
idle = "poll"
[sockets]
max = 1024
[[netif]]
kind = "synthetic"
flows = 64
local_ports = [{PORTS[0]}, {PORTS[-1]}]
size = 60
rate = {rate}
count = {count}
backpressure = true
start = {start}
"""


@pytest.fixture
def steady() -> Iterator[Running]:
    """Two thousand packets a second, for as long as the test takes."""
    with running(synthetic(count=0, rate=2000)) as process:
        yield process


@njit
def count(payload: Any, info: Any, state: Any) -> None:
    state[info.socket] += 1


def by_recvfrom(sock: dataplane.UDPSocket) -> int:
    got = 0
    while True:
        try:
            data, (host, port) = sock.recvfrom(20)
        except dataplane.Stopped:
            return got
        assert len(data) == 32 and 0 < port < 65536
        assert ipaddress.ip_address(host) in ipaddress.ip_network("10.0.0.0/8")
        got += 1


def by_batch(sock: dataplane.UDPSocket) -> int:
    got = 0
    for batch in sock.batches(timeout=20):
        assert set(batch.remote["family"].tolist()) == {4} and set(batch.lengths.tolist()) == {32}
        assert set(batch.local["port"].tolist()) == {sock.address[1]}
        got += len(batch)
    return got


def by_consume(sock: dataplane.UDPSocket) -> int:
    state = np.zeros(1, np.int64)
    assert sock.consume(count, state) == state[0]
    return int(state[0])


def by_event_loop(sock: dataplane.UDPSocket) -> int:
    async def receive() -> int:
        return sum([len(batch) async for batch in sock])
    return asyncio.run(receive())


def test_every_way_to_receive() -> None:
    """Six sockets of one attachment, each read by a thread in its own way. None misses a packet, and the
    ledger says the same."""
    ways = (by_recvfrom, by_batch, by_consume, by_event_loop)
    with running(synthetic(count=40000, start=6)) as process:
        with dataplane.attach(process.name) as dp, ThreadPoolExecutor(6) as pool:
            socks = [dp.udp("0.0.0.0", port) for port in PORTS]
            reads = [pool.submit(way, sock) for way, sock in zip(ways, socks, strict=True)]
            others = [pool.submit(by_consume, sock) for sock in (dp.raw(17), dp.tap())]
            assert [read.result(60) for read in reads] == [10000] * 4
            assert [read.result(60) for read in others] == [40000] * 2
            assert dp.ended
        ledger = process.wait()
    assert (ledger["offered"], ledger["delivered"], ledger["deliveries"]) == (40000, 40000, 120000)
    assert not ledger["dropped"] and not ledger["unread"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_workers_and_a_poller() -> None:
    with running(synthetic(count=40000, start=4, workers=2)) as process:
        with dataplane.attach(process.name) as dp:
            assert dp.workers == 2
            socks = [dp.udp("0.0.0.0", port) for port in PORTS]
            state, seen = np.zeros(4, np.int64), set()
            with dp.poller(socks) as poller:
                seen |= set(poller.wait(20))
                while (taken := int(state.sum())) < 40000:
                    assert poller.consume(count, state, max_packets=40000 - taken, timeout=20)
                with pytest.raises(dataplane.Stopped):
                    poller.wait(20)
            assert seen <= set(socks) and state.tolist() == [10000] * 4
        process.wait()


def test_sleeping_receivers_are_woken(steady: Running) -> None:
    """Nobody spins here: each packet has to wake somebody."""
    with dataplane.attach(steady.name, spin_us=0) as dp:
        socks = [dp.udp("0.0.0.0", port) for port in PORTS]
        before = time.thread_time()
        for _ in range(500):
            assert socks[0].recv(20)
        with dp.poller(socks) as poller:
            for _ in range(500):
                for sock in poller.wait(20):
                    sock.recv(0)
        assert socks[1].recv(20)

        async def receive() -> int:
            got = 0
            async for batch in socks[2]:
                got += len(batch)
                if got >= 500:
                    break
            return got

        assert asyncio.run(asyncio.wait_for(receive(), 60)) >= 500
        assert time.thread_time() - before < 20


def test_what_is_known_of_it(steady: Running) -> None:
    with dataplane.attach(steady.name) as dp:
        assert dp.name == steady.name and dp.pid == steady.pid and not dp.ended
        sock = dp.udp("0.0.0.0", PORTS[0], ring_bytes=4096)
        assert sock.recv(20)
        while not sock.stats()["dropped"] and not sock.stats()["queued"]:
            time.sleep(0.01)
        stats = sock.stats()
        assert stats["ring_bytes"] == 4096 and stats["published"] >= stats["consumed"] + stats["queued"] >= 1
        assert dp.stats()["offered"] > 0
        free, any_port = dp.udp(port=0), dp.udp()
        assert free.address[0] == "" and free.address[1] > 1023 and any_port.address == ("", None)
        connected = dp.udp(remote=("10.0.0.1", 9))
        assert connected.remote == ("10.0.0.1", 9) and connected.address[1]
        assert re.match(r"<UDPSocket 0\.0\.0\.0:5000>", repr(sock))


def test_refused(steady: Running) -> None:
    with dataplane.attach(steady.name) as dp, dataplane.attach(steady.name) as other:
        first = dp.udp("0.0.0.0", 6000)
        with pytest.raises(OSError) as error:
            other.udp("0.0.0.0", 6000)
        assert error.value.errno == errno.EADDRINUSE
        for ring_bytes in (1000, 4097, 1 << 40):
            with pytest.raises(OSError) as error:
                dp.udp("0.0.0.0", 6001, ring_bytes=ring_bytes)
            assert error.value.errno == errno.EINVAL
        for arguments in (("localhost", 1), ("0.0.0.0", 65536), ("0.0.0.0", -1)):
            with pytest.raises(ValueError):
                dp.udp(*arguments)
        with pytest.raises(OSError) as error:
            first.sendto(b"nobody transmits here", ("10.0.0.1", 9))
        assert error.value.errno == errno.ENETUNREACH
        first.close()
        assert not other.udp("0.0.0.0", 6000).closed


def test_another_layout(steady: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L, "fingerprint", lambda: 1)
    with pytest.raises(dataplane.LayoutMismatch):
        dataplane.attach(steady.name)
    with pytest.raises(dataplane.UnknownDataplane, match=steady.name):
        dataplane.attach(steady.name + "x")


def test_slots_are_used_again(steady: Running) -> None:
    """A slot's next socket begins with an empty ring, whatever the one before left there."""
    with dataplane.attach(steady.name) as dp:
        for i in range(200):
            with dp.udp("0.0.0.0", PORTS[i % 4]) as sock:
                assert len(sock.recv(20)) == 32
        socks = [dp.udp("0.0.0.0", 7000 + i, ring_bytes=4096) for i in range(300)]
        assert len({(sock.bound.number, sock.bound.slot) for sock in socks}) == 300
        for sock in socks:
            sock.close()


def receive_in_child(name: str, port: int) -> None:
    """For multiprocessing: an unrelated process, but for what it is told."""
    with dataplane.attach(name) as dp, dp.udp("0.0.0.0", port) as sock:
        assert len(sock.recv(20)) == 32


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_other_processes(steady: Running, method: Any) -> None:
    process = multiprocessing.get_context(method).Process(
        target=receive_in_child, args=(steady.name, PORTS[1]))
    with dataplane.attach(steady.name) as dp:
        mine = dp.udp("0.0.0.0", PORTS[0])
        process.start()
        assert mine.recv(20)
        process.join(90)
        assert process.exitcode == 0 and mine.recv(20)
    process.close()


def test_a_forked_child_does_not_keep_its_parents_attachment(steady: Running) -> None:
    """The parent's end is seen at once, although the child had a copy of its connection."""
    attached, ended = os.pipe(), os.pipe()

    def parent() -> None:
        dp = dataplane.attach(steady.name)
        dp.udp("0.0.0.0", 6100)
        if os.fork() == 0:
            os.read(ended[0], 1)
            os._exit(0)
        os.write(attached[1], b"x")
        os._exit(0)

    with Child(parent) as child, dataplane.attach(steady.name) as dp:
        os.read(attached[0], 1)
        child.join()
        _until(lambda: _free(dp, 6100))
    os.write(ended[1], b"x")
    for descriptor in (*attached, *ended):
        os.close(descriptor)


def test_a_killed_consumer_leaves_nothing(steady: Running) -> None:
    ready = os.pipe()

    def consumer() -> None:
        dp = dataplane.attach(steady.name)
        sock = dp.udp("0.0.0.0", PORTS[0])
        sock.recv(20)
        os.write(ready[1], b"x")
        time.sleep(100)

    with Child(consumer) as child, dataplane.attach(steady.name) as dp:
        os.read(ready[0], 1)
        with pytest.raises(OSError):
            dp.udp("0.0.0.0", PORTS[0])
        child.kill()
        _until(lambda: _free(dp, PORTS[0]))
        assert dp.udp("0.0.0.0", PORTS[0]).recv(20)
    os.close(ready[0])
    os.close(ready[1])


def test_a_suspended_supervisor(steady: Running) -> None:
    """Packets still flow; what needs its answer says that there is none."""
    with dataplane.attach(steady.name) as dp:
        sock = dp.udp("0.0.0.0", PORTS[0])
        os.kill(steady.pid, signal.SIGSTOP)
        try:
            for _ in range(200):
                assert sock.recv(20)
            with pytest.raises(dataplane.DataplaneError, match="does not answer"):
                sock.session.connection.request(messages.Stats(), messages.Ledger, timeout=0.1)
        finally:
            os.kill(steady.pid, signal.SIGCONT)
        assert dp.stats()["offered"] > 0        # the late reply was thrown away
        assert dp.udp("0.0.0.0", 6200).address == ("0.0.0.0", 6200)


def test_a_stopped_dataplane(steady: Running) -> None:
    with dataplane.attach(steady.name) as dp:
        quiet, sock = dp.udp("0.0.0.0", 6300), dp.udp("0.0.0.0", PORTS[0], ring_bytes=BIG)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(quiet.recv)
            assert sock.recv(20)
            steady.stop()
            with pytest.raises(dataplane.Stopped):
                waiting.result(30)
        while True:
            try:
                sock.recv(20)
            except dataplane.Stopped:
                break
        for call in (dp.stats, dp.udp, lambda: quiet.sendto(b"x", ("10.0.0.1", 1)), sock.stats):
            with pytest.raises((dataplane.Stopped, OSError)):
                call()
        sock.close()


def test_a_killed_dataplane() -> None:
    with running(synthetic(count=0, rate=2000), check=False) as process:
        with dataplane.attach(process.name) as dp:
            sock = dp.udp("0.0.0.0", PORTS[0])
            assert sock.recv(20)
            process.process.kill()
            process.process.wait()
            with pytest.raises(dataplane.Stopped):
                while True:
                    sock.recv(20)
        subprocess.run([sys.executable, "-m", "dataplane", "clean", process.name], check=True, timeout=60)
        assert not [path for path in os.listdir("/dev/shm") if process.name in path]


def _free(dp: dataplane.Dataplane, port: int) -> bool:
    """Whether nobody has the port: it is taken and given back."""
    try:
        dp.udp("0.0.0.0", port).close()
    except OSError as error:
        assert error.errno == errno.EADDRINUSE
        return False
    return True


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
