"""What goes wrong, as a consumer sees it: wrong requests, and the death of anybody. The error that the
documentation names, at once; and who is not concerned does not notice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from numba import njit

import dataplane
from dataplane.shm import layout as L
from tests.children import Child
from tests.dataplane_fixture import Running, running
from tests.netns import Forked

CORES = sorted(os.sched_getaffinity(0))[:2]
WATCHDOG = 30.0
PORT = 5000
NOBODY_UID = 65534


def config(rate: int = 5000, count: int = 0, workers: int = 1, idle: str = "poll", backpressure: bool = False,
           start: int = 1, more: str = "") -> str:
    """64 flows to four ports."""
    return f"""
[rx]
cores = {CORES[:workers]}
idle = "{idle}"
[sockets]
max = 256
[[netif]]
kind = "synthetic"
flows = 64
local_ports = [{PORT}, {PORT + 3}]
rate = {rate}
count = {count}
backpressure = {str(backpressure).lower()}
start = {start}
{more}
"""


@pytest.fixture
def steady() -> Iterator[Running]:
    with running(config()) as process:
        yield process


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WATCHDOG
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.002)


def workers_of(dp: dataplane.Dataplane) -> list[psutil.Process]:
    return [psutil.Process(worker["pid"]) for worker in dp.stats()["workers"]]


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dataplane", *words], capture_output=True, text=True,
                          timeout=100, **options)


def in_shm(name: str) -> list[str]:
    return [path for path in os.listdir("/dev/shm") if name in path]


# -- wrong requests --------------------------------------------------------------------------------


def test_unknown_dataplane(steady: Running) -> None:
    with pytest.raises(dataplane.UnknownDataplane, match=f"(?s)nowhere.*{steady.name}"):
        dataplane.attach("nowhere")
    result = command("ss", "nowhere")
    assert result.returncode == 2 and "nowhere" in result.stderr and "Traceback" not in result.stderr


def test_layout_of_another_version(steady: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L, "fingerprint", lambda: 42)
    with pytest.raises(dataplane.LayoutMismatch, match=steady.name):
        dataplane.attach(steady.name)
    monkeypatch.undo()
    with dataplane.attach(steady.name) as dp:
        assert dp.udp("0.0.0.0", PORT).recv(WATCHDOG)


def test_wrong_requests(steady: Running) -> None:
    with dataplane.attach(steady.name) as dp, dataplane.attach(steady.name) as other:
        sock = dp.udp("0.0.0.0", PORT)
        with pytest.raises(OSError) as error:
            other.udp("0.0.0.0", PORT)
        assert error.value.errno == errno.EADDRINUSE
        for address, expected in ((("2001:db8::1", 9), errno.EAFNOSUPPORT), (("192.0.2.1", 9), errno.ENETUNREACH),
                                  (None, errno.EDESTADDRREQ)):
            with pytest.raises(OSError) as error:
                sock.sendto(b"x", address)
            assert error.value.errno == expected
        for arguments in (("example.com", 1), ("1.2.3", 1), ("0.0.0.0", 70000)):
            with pytest.raises(ValueError):
                dp.udp(*arguments)
        sock.close()
        for call in (sock.recv, sock.recvfrom, sock.recv_batch, lambda: sock.sendto(b"x", ("192.0.2.1", 9)),
                     lambda: next(sock.batches()), lambda: sock.consume(count, np.zeros(1, np.int64))):
            with pytest.raises(OSError) as error:
                call()
            assert error.value.errno == errno.EBADF
        assert other.udp("0.0.0.0", PORT).recv(WATCHDOG)        # nobody's again
    with pytest.raises(dataplane.DataplaneError, match="closed"):
        dp.udp()


@pytest.mark.root
def test_another_users_binds() -> None:
    """A user whom no rule knows may open nothing; a rule opens what it says, and no more."""
    rule = f'[[access]]\nuid = {NOBODY_UID}\nallow = ["udp:{PORT}"]\n'
    with running(config(more=rule)) as process:
        process.directory.chmod(0o755)
        with dataplane.attach(process.name) as dp:      # loads the kernels, which the others then need not
            assert dp.stats()["name"] == process.name

            def as_user(uid: int) -> list[str]:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                with dataplane.attach(process.name) as mine:
                    return [attempt(mine, *arguments) for arguments in (
                        ("udp", "0.0.0.0", PORT), ("udp", "0.0.0.0", PORT + 1), ("udp", "0.0.0.0", 53), ("udp",),
                        ("raw", 0), ("tap",))]

            allowed, denied = Forked(lambda: as_user(NOBODY_UID)), Forked(lambda: as_user(NOBODY_UID - 1))
            assert allowed.result(WATCHDOG) == ["received", *["PermissionError"] * 5]
            assert denied.result(WATCHDOG) == ["PermissionError"] * 6
            wait_for(lambda: dp.stats()["sockets"] == 0, "their sockets' end")


def attempt(dp: dataplane.Dataplane, kind: str, *arguments: Any) -> str:
    try:
        with getattr(dp, kind)(*arguments) as sock:
            return "received" if sock.recv(WATCHDOG) else "empty"
    except PermissionError as error:
        assert str(os.getuid()) in str(error)
        return "PermissionError"


# -- a consumer dies --------------------------------------------------------------------------------


def sleeper(name: str, ready: int) -> None:
    """A consumer that has sockets, a poller and packets in its rings, and does nothing more."""
    dp = dataplane.attach(name)
    socks = [dp.udp("0.0.0.0", PORT), dp.udp("0.0.0.0", PORT + 1), dp.tap(), dp.raw(17)]
    poller = dp.poller(socks)
    poller.wait(WATCHDOG)
    os.write(ready, b"x")
    signal.pause()


def test_a_consumer_is_killed(steady: Running) -> None:
    """Its sockets go, its memory too; another consumer does not notice."""
    reading, writing = os.pipe()
    with dataplane.attach(steady.name) as dp:
        mine = dp.udp("0.0.0.0", PORT + 2)
        before = len(in_shm(steady.name))
        for _ in range(3):
            with Child(lambda: sleeper(steady.name, writing)) as child:
                assert select.select([reading], [], [], WATCHDOG)[0] and os.read(reading, 1)
                assert dp.stats()["sockets"] == 5 and len(in_shm(steady.name)) > before
                child.kill()
            wait_for(lambda: dp.stats()["sockets"] == 1, "the sockets' end")
            wait_for(lambda: len(in_shm(steady.name)) == before, "the end of its memory")
            assert mine.recv(WATCHDOG)
        assert dp.udp("0.0.0.0", PORT).recv(WATCHDOG)
    os.close(reading)
    os.close(writing)


# -- an RX worker dies -------------------------------------------------------------------------------------------


@njit
def count(payload: Any, info: Any, state: Any) -> None:
    state[info.socket] += 1


def kill_workers(kills: int, workers: int, idle: str, rate: int) -> None:
    """Kills RX workers under a load, with a pause after each: a dataplane whose workers keep dying gives up."""
    text = config(rate=rate, workers=workers, idle=idle, backpressure=True, start=4)
    with running(text) as process, dataplane.attach(process.name) as dp:
        socks = [dp.udp("0.0.0.0", PORT + i) for i in range(4)]
        state = np.zeros(4, np.int64)
        with dp.poller(socks) as poller:
            for number in range(kills):
                poller.consume(count, state, max_packets=2000, timeout=WATCHDOG)
                restarts = sum(worker["restarts"] for worker in dp.stats()["workers"])
                workers_of(dp)[number % workers].kill()
                wait_for(lambda before=restarts: sum(
                    worker["restarts"] for worker in dp.stats()["workers"]) > before, "a new worker")
                seen = state.copy()
                while (state < seen + 2000).any():      # every socket goes on
                    assert poller.consume(count, state, max_packets=2000, timeout=WATCHDOG)
        ledger = process.stop()
    lost = ledger["dropped"].pop("crash_lost", 0)
    assert not ledger["dropped"] and ledger["offered"] == ledger["delivered"] + lost
    assert lost <= kills * 64 and ledger["consumed"] == state.sum()
    # Published, but not yet counted so when the worker died: among the lost, too.
    assert ledger["delivered"] <= ledger["consumed"] + ledger["unread"] <= ledger["delivered"] + lost


@pytest.mark.parametrize("idle", ["poll", "busy"])
def test_rx_workers_are_killed(idle: str) -> None:
    kill_workers(3, 1, idle, 200_000)


def test_one_of_two_rx_workers_is_killed() -> None:
    if len(CORES) < 2:
        pytest.skip("needs two cores")
    kill_workers(4, 2, "poll", 0)


# -- the supervisor dies --------------------------------------------------------------------------------


def test_the_supervisor_is_killed() -> None:
    """Its workers leave, its consumers are told; what it left is gone with the next start under its name."""
    with running(config(workers=len(CORES)), check=False) as first:
        with dataplane.attach(first.name) as dp, dataplane.attach(first.name, spin_us=0) as asleep:
            sock, quiet = dp.udp("0.0.0.0", PORT), asleep.udp("0.0.0.0", 6009)
            assert sock.recv(WATCHDOG)
            workers = workers_of(dp)
            reading, writing = os.pipe()
            with Child(lambda: stopped_in(first.name, writing)) as waiting:
                assert select.select([reading], [], [], WATCHDOG)[0] and os.read(reading, 1)
                first.process.kill()
                first.process.wait()
                with pytest.raises(dataplane.Stopped):
                    quiet.recv(WATCHDOG)
                with pytest.raises(dataplane.Stopped):
                    while True:
                        sock.recv(WATCHDOG)
                assert waiting.join() == 0
            os.close(reading)
            os.close(writing)
            for call in (dp.stats, dp.udp, sock.recv_batch, sock.stats):
                with pytest.raises(dataplane.Stopped):
                    call()
            wait_for(lambda: not any(map(alive, workers)), "the workers' end")
        assert in_shm(first.name)
        with running(config(), name=first.name) as second, dataplane.attach(second.name) as dp:
            assert dp.udp("0.0.0.0", PORT).recv(WATCHDOG)
        assert not in_shm(first.name)


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def stopped_in(name: str, ready: int) -> None:
    """A consumer that waits in `consume` until there is nothing to wait for."""
    with dataplane.attach(name) as dp, dp.udp("0.0.0.0", 6010) as sock:
        os.write(ready, b"x")
        with pytest.raises(dataplane.Stopped):
            sock.consume(count, np.zeros(1, np.int64))


def test_clean_after_a_killed_supervisor() -> None:
    with running(config(), check=False) as process:
        with dataplane.attach(process.name) as dp:
            dp.tap()
            workers = workers_of(dp)
            result = command("clean", process.name)
            assert result.returncode == 2 and "is running" in result.stderr
            assert dp.stats()["sockets"] == 1                   # a live one is left alone
            process.process.kill()
            process.process.wait()
            wait_for(lambda: not any(map(alive, workers)), "the workers' end")
        result = command("clean", process.name)
        assert result.returncode == 0, result.stderr
        assert not in_shm(process.name)


def test_the_supervisor_is_stopped_for_a_while(steady: Running) -> None:
    """SIGSTOP: packets flow, and wake who sleeps."""
    with dataplane.attach(steady.name, spin_us=0) as dp:
        sock = dp.udp("0.0.0.0", PORT)
        assert sock.recv(WATCHDOG)
        os.kill(steady.pid, signal.SIGSTOP)
        try:
            for _ in range(1000):
                assert sock.recv(WATCHDOG)
        finally:
            os.kill(steady.pid, signal.SIGCONT)
        assert dp.udp("0.0.0.0", PORT + 1).recv(WATCHDOG)


def test_after_the_end(steady: Running) -> None:
    """What was delivered can be taken, and that is all."""
    with dataplane.attach(steady.name) as dp:
        sock = dp.udp("0.0.0.0", PORT, ring_bytes=1 << 20)
        assert sock.recv(WATCHDOG)
        ledger = steady.stop()
        got = 1
        with contextlib.suppress(dataplane.Stopped):
            while sock.recv(WATCHDOG):
                got += 1
        assert got == ledger["delivered"] and dp.ended
        state = np.zeros(1, np.int64)
        for call in (dp.udp, dp.tap, dp.stats, sock.stats, sock.recv, sock.recv_batch,
                     lambda: sock.sendto(b"x", ("192.0.2.1", 9)), lambda: sock.consume(count, state)):
            with pytest.raises((dataplane.Stopped, OSError)) as error:
                call()
            assert error.type is dataplane.Stopped or error.value.errno == errno.ENETUNREACH
        assert list(sock.batches()) == []
        sock.close()
    with pytest.raises(dataplane.UnknownDataplane):
        dataplane.attach(steady.name)


def test_stat_and_ss_while_it_ends(steady: Running) -> None:
    """An observer of a dataplane that ends is told so, in a sentence."""
    with subprocess.Popen([sys.executable, "-m", "dataplane", "stat", steady.name, "--json", "--watch"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline())["name"] == steady.name
        steady.stop()
        _, errors = watcher.communicate(timeout=WATCHDOG)
        assert watcher.returncode == 0 and "Traceback" not in errors
    result = command("ss", steady.name)
    assert result.returncode == 2 and steady.name in result.stderr
