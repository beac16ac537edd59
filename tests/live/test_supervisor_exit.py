"""The supervisor is killed, at any moment of its life: everything ends, everybody is told, and the name, its devices
and its memory can be had again at once.

Each seed chooses how many RX workers there are, how they idle, and the moment: while it starts, while packets flow,
while sockets come and go, while it replaces a worker. Nobody waits for the end before the next one is started under
the same name, which is then the next victim.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numba import njit

import dataplane
from dataplane.shm import layout as L
from dataplane.shm.segment import Segment, segment_name
from tests.children import Child
from tests.netns import Forked, Namespace
from tests.workers.rig import ROOT, SYNTHETIC, WATCHDOG, Running, wait_for
from workers import leavings
from workers.leavings import claim, held

pytestmark = pytest.mark.timeout(300)       # the first start of a session may have to compile
CORES = sorted(os.sched_getaffinity(0))[:2]
PORT = 5000
MOMENTS = ("starting", "packets", "churn", "replacing")
TUN = '[[netif]]\nkind = "tun"\ndevice = "dp0"\naddresses = ["10.77.0.1/24"]\n'
FREE, BUSY = 7000, 7001     # ports of listeners


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory for all dataplanes of the test."""
    monkeypatch.setenv("DATAPLANE_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def family(dp: Running) -> list[psutil.Process]:
    """All processes of a dataplane: forked from it, they have its command line."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(dp.config) in one.cmdline():
                found.append(one)
    return found


def ended(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs any more."""
    def runs(one: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return one.status() != psutil.STATUS_ZOMBIE
        return False

    return not any(map(runs, processes))


def kill(dp: Running) -> list[psutil.Process]:
    """SIGKILL for the supervisor. Those who are still there; what they fork on their way has to end as well."""
    dp.process.kill()
    left = family(dp)
    dp.process.wait()
    return left


def start(name: str | None, rng: random.Random, wait: bool) -> Running:
    cores = CORES[:rng.randint(1, len(CORES))]
    return Running(SYNTHETIC, name=name, cores=str(cores), idle=rng.choice(["busy", "poll", "adaptive"]), wait=wait,
                   rate=rng.choice([2000, 20000]), start=rng.randint(0, 1))


# -- at any moment -----------------------------------------------------------------------------------------------


def told(connection_of: Callable[[], dataplane.Dataplane], use: Callable[[dataplane.Dataplane], object]) -> None:
    """A consumer: goes on until it is told. Nothing but Stopped will do."""
    with connection_of() as dp:
        try:
            while True:
                use(dp)
        except dataplane.Stopped:
            assert dp.ended


def patiently(name: str) -> dataplane.Dataplane:
    """Attaches. On a machine with much else to do, a worker may be given its core too late for the first attempt."""
    deadline = time.monotonic() + WATCHDOG
    while True:
        try:
            return dataplane.attach(name)
        except dataplane.Stopped:
            raise
        except dataplane.DataplaneError as error:
            if "has not answered" not in str(error) or time.monotonic() > deadline:
                raise


def await_byte(reading: int) -> None:
    """Of a child that is ready."""
    assert select.select([reading], [], [], WATCHDOG)[0] and os.read(reading, 1), "a child is not ready"


def listen(dp: dataplane.Dataplane, sock: Any, ready: int) -> None:
    if ready >= 0:
        os.write(ready, b"x")
    while True:
        sock.recv(WATCHDOG)


def churn(dp: dataplane.Dataplane, rng: random.Random) -> None:
    """One control operation of each kind."""
    with dp.udp("0.0.0.0", 0, ring_bytes=1 << rng.randint(12, 16)) as one, dp.raw(rng.randint(1, 255)), \
            dp.poller([one]):
        with dataplane.attach(dp.name) as other:
            other.tap().close()
        dp.stats()


@contextlib.contextmanager
def consumers(name: str, seed: int, moment: str) -> Iterator[None]:
    """One that receives, one that sleeps and, if the moment is such, one that opens and closes. All must be told."""
    reading, writing = os.pipe()
    with contextlib.ExitStack() as stack:
        def attached() -> dataplane.Dataplane:
            return patiently(name)

        def receives(dp: dataplane.Dataplane, port: int, ready: int = writing) -> None:
            with dp.udp("0.0.0.0", port) as sock:
                listen(dp, sock, ready)

        children = [Child(lambda port=port: told(attached, lambda dp: receives(dp, port)))      # type: ignore[misc]
                    for port in (PORT, PORT + 1000)]
        if moment == "churn":
            rng = random.Random(seed)

            def opens(dp: dataplane.Dataplane) -> None:
                churn(dp, rng)
                os.write(writing, b"x")

            children.append(Child(lambda: told(attached, opens)))
        for child in children:
            stack.enter_context(child)
        for _ in children:
            await_byte(reading)
        yield
        for child in children:
            assert child.join(WATCHDOG) == 0
        os.close(reading)
        os.close(writing)


def kill_once(dp: Running, seed: int, moment: str) -> list[psutil.Process]:
    """Kills it at that moment; the processes that it leaves."""
    rng = random.Random(seed)
    if moment == "starting":
        time.sleep(rng.uniform(0, 1.2))     # the moment itself: whatever it is doing then
        return kill(dp)
    with consumers(dp.name, seed, moment):
        if moment == "replacing":
            os.kill(rng.choice(dp.workers()), signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.03))    # the moment itself
        return kill(dp)


def kill_again_and_again(kills: int) -> None:
    with contextlib.ExitStack() as stack:
        name, left = None, []
        for seed in range(kills):
            rng = random.Random(seed)
            moment = MOMENTS[seed % len(MOMENTS)]
            dp = stack.enter_context(start(name, rng, wait=moment != "starting"))
            name = dp.name
            if moment != "starting":
                assert dp.ready, dp.errors
                assert len(dp.remains()) == 3, "what the former one left is gone"
                assert ended(left)
            left = kill_once(dp, seed, moment)
            if seed % 3 == 0:
                wait_for(lambda: ended(family(dp)), f"the end of all processes, seed {seed}")   # noqa: B023
        last = stack.enter_context(start(name, random.Random(kills), wait=True))
        assert last.ready and ended(left)
        assert last.interrupt() == 0 and last.remains() == []


def test_killed_at_any_moment() -> None:
    kill_again_and_again(len(MOMENTS))


@pytest.mark.stress
@pytest.mark.timeout(1100)
def test_killed_at_any_moment_200_times() -> None:
    kill_again_and_again(200)


def test_killed_while_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that compile with it end with it; nobody waits for what they were compiling."""
    if len(CORES) < 2:
        pytest.skip("needs two cores")
    with monkeypatch.context() as empty:
        empty.setenv("DATAPLANE_CACHE_DIR", str(tmp_path / "cache"))
        with Running(wait=False) as dp:
            wait_for(lambda: len(family(dp)) > 1, "a second process", 60)
            left = kill(dp)
            wait_for(lambda: ended(left), "the end of the compilers", 5)
            # A process whose first thread has ended keeps its files until its last one has.
            wait_for(lambda: not dp.locked, "the lock", 5)


# -- at once -----------------------------------------------------------------------------------------------------


def test_clean_right_after_the_kill() -> None:
    """It waits for the workers, which hold the name for a moment."""
    with Running(cores=str(CORES), idle="busy") as dp, dataplane.attach(dp.name) as attached:
        attached.tap()
        kill(dp)
        done = subprocess.run([sys.executable, "-m", "dataplane", "clean", dp.name], cwd=ROOT, check=False,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert dp.remains() == [] and family(dp) == []


def test_what_the_old_ones_consumer_does_is_nothing_to_the_new_one() -> None:
    """It keeps what it has mapped, and all that it asks for is refused."""
    with Running(start=1) as old, dataplane.attach(old.name) as former:
        sock = former.udp("0.0.0.0", PORT)
        sock.recv(WATCHDOG)
        kill(old)
        with Running(name=old.name, start=1) as new, dataplane.attach(new.name) as dp:
            mine = dp.udp("0.0.0.0", PORT)      # free again, whatever the former one thinks
            with pytest.raises(dataplane.Stopped):
                while True:
                    sock.recv(WATCHDOG)
            for call in (former.stats, former.udp, sock.stats):
                with pytest.raises(dataplane.Stopped):
                    call()
            former.close()
            mine.recv(WATCHDOG)
            assert dp.stats()["sockets"] == 1
            dp.close()
            assert new.interrupt() == 0 and new.remains() == []


# -- every call that waits ---------------------------------------------------------------------------------------


@njit
def never(payload: Any, info: Any, state: Any) -> None:
    state[0] += 1


async def iterate(dp: dataplane.Dataplane) -> None:
    async for _ in dp.udp("0.0.0.0", 6001):
        pass


async def stream(dp: dataplane.Dataplane) -> None:
    reader, _ = await dp.open_connection("10.77.0.2", FREE)
    await reader.read(1)


async def serve(dp: dataplane.Dataplane) -> None:
    server = await dp.start_server(lambda reader, writer: None, None, 8001)
    await server.serve_forever()


def send_for_ever(dp: dataplane.Dataplane) -> None:
    """The peer's kernel never reads: its window closes, and sendall waits."""
    connection = dp.tcp_connect("10.77.0.2", FREE)
    connection.sendall(bytes(1 << 28))


WAITING: dict[str, Callable[[dataplane.Dataplane], object]] = {
    "recv": lambda dp: dp.udp("0.0.0.0", 6002).recv(),
    "recv_batch": lambda dp: dp.udp("0.0.0.0", 6003).recv_batch(),
    "poller": lambda dp: dp.poller([dp.udp("0.0.0.0", 6004), dp.raw(99)]).wait(),
    "consume": lambda dp: dp.udp("0.0.0.0", 6005).consume(never, np.zeros(1, np.int64)),
    "accept": lambda dp: dp.tcp_listen(None, 8000).accept(),
    "tcp recv": lambda dp: dp.tcp_connect("10.77.0.2", FREE).recv(1),
    "tcp sendall": send_for_ever,
    "streams": lambda dp: asyncio.run(stream(dp)),
    "server": lambda dp: asyncio.run(serve(dp)),
    "async for": lambda dp: asyncio.run(iterate(dp)),
}


def outcome(name: str, call: Callable[[dataplane.Dataplane], object]) -> str:
    with patiently(name) as dp:
        try:
            call(dp)
        except Exception as error:
            return type(error).__name__
        return "returned"


@pytest.mark.root
@pytest.mark.live
@pytest.mark.needs("ip")
def test_every_call_that_waits_is_told_and_the_device_is_free() -> None:
    """On a TUN, with a kernel as the peer of TCP connections. The next dataplane gets the same device at once."""
    with Namespace() as here, contextlib.ExitStack() as stack:
        prefix = ("ip", "netns", "exec", here.name)
        dp = stack.enter_context(Running(TUN, prefix=prefix))
        assert dp.ready, dp.errors
        with here.entered():
            peer = stack.enter_context(socket.create_server(("10.77.0.2", FREE)))
        with dataplane.attach(dp.name) as first:        # loads the kernels, which the others then need not
            first.tcp_listen(None, 0).close()
        waiting = {what: Forked(lambda call=call: outcome(dp.name, call))       # type: ignore[misc]
                   for what, call in WAITING.items()}
        for child in waiting.values():
            stack.callback(child.kill)
        wait_for(lambda: all_wait(dp), "all of them")
        left = kill(dp)
        again = stack.enter_context(Running(TUN, prefix=prefix, name=dp.name))
        assert again.ready and ended(left), again.errors
        results = {what: child.result(WATCHDOG) for what, child in waiting.items()}
        assert results == {what: "returned" if what == "async for" else "Stopped" for what in WAITING}
        with Child(lambda: echo_once(again.name)) as server:
            assert here.call(ask) == b"hello"
            assert server.join(WATCHDOG) == 0
        peer.close()
        assert again.interrupt() == 0 and again.remains() == []


def all_wait(dp: Running) -> bool:
    """Whether each has its sockets, its connection is open, and the peer's window is closed for the one
    that sends."""
    found = dp.sockets()
    ports = {one.local[1] for one in found}
    connections = [one.connection for one in found if one.connection is not None and one.state == "established"]
    return ({*range(6001, 6006), 8000, 8001} <= ports and len(connections) == 3
            and any(one.send_queue > 0 and one.snd_wnd == 0 for one in connections))


def echo_once(name: str) -> None:
    with dataplane.attach(name) as dp, dp.tcp_listen("10.77.0.1", BUSY) as listener:
        connection, _ = listener.accept(WATCHDOG)
        connection.sendall(connection.recv(100))
        connection.close()


def ask() -> bytes:
    deadline = time.monotonic() + WATCHDOG
    while True:
        try:
            with socket.create_connection(("10.77.0.1", BUSY), 1) as connection:
                connection.sendall(b"hello")
                connection.settimeout(WATCHDOG)
                return connection.recv(100)
        except ConnectionRefusedError:      # the listener is not there yet
            assert time.monotonic() < deadline
            time.sleep(0.01)


# -- whose the lock is -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def killed_holder(name: str) -> Iterator[Callable[[], None]]:
    """A name held by a process that was killed and whose "worker", which has inherited its locks, goes on until it is
    told to leave."""
    told, telling = os.pipe()
    reading, writing = os.pipe()
    order = os.fdopen(telling, "wb", buffering=0)

    def supervisor() -> None:
        with held(name, os.geteuid()):
            segment = Segment.create(segment_name(os.geteuid(), name, "table"), 4096, L.SEG_TABLE)
            claim(segment.fd)
            if os.fork() == 0:
                order.close()
                os.write(writing, b"x")
                os.read(told, 1)
                os._exit(0)
            signal.pause()

    with Child(supervisor) as child:
        await_byte(reading)
        child.kill()
        try:
            yield order.close
        finally:
            order.close()
            for end in (told, reading, writing):
                os.close(end)


def test_the_workers_of_a_killed_one_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leavings, "LEAVING", WATCHDOG)
    name = f"killed-{os.getpid()}"
    with killed_holder(name) as leave:
        asked = threading.Timer(0.1, leave)     # it is waited for as long as it needs
        asked.start()
        with held(name, os.geteuid()) as removed:
            assert removed == [segment_name(os.geteuid(), name, "table")]
        asked.join()


def test_a_worker_that_does_not_leave_keeps_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leavings, "LEAVING", 0.05)
    name = f"stuck-{os.getpid()}"
    with killed_holder(name) as leave:
        with pytest.raises(leavings.Live), held(name, os.geteuid()):
            pass
        leave()
    monkeypatch.setattr(leavings, "LEAVING", WATCHDOG)
    assert leavings.clean(os.geteuid(), name) == {name: [segment_name(os.geteuid(), name, "table")]}


def test_a_living_one_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leavings, "LEAVING", 1e9)       # the test's own time limit would end it
    name = f"living-{os.getpid()}"
    with held(name, os.geteuid()), pytest.raises(leavings.Live, match=f"pid {os.getpid()}"), \
            held(name, os.geteuid()):
        pass
