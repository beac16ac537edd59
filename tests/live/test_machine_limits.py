"""The machine's limits, met for real: no room in /dev/shm, no descriptors, a core or an interface that goes, a clock
that is set. An error that says what is missing, at once; everybody else goes on, and so does who got the error when
there is room again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dataplane
from tests.dataplane_fixture import Running, running
from tests.live.tcp_bed import CORES, OURS, World, kernel_connect, pipe, wait_for, world
from tests.netns import Forked, Namespace, mac, veth
from tests.traffic import ethernet, flood, internet_checksum, udp4

pytestmark = pytest.mark.live

WATCHDOG = 60.0
PORT = 5000
MEGABYTE = 1 << 20
PACED = """
[[netif]]
kind = "synthetic"
flows = 4
local_ports = [6001, 6001]
rate = 1000
"""
_CLONE_NEWNS = 0x20000


def config(rate: int = 5000, sockets: int = 256, more: str = "", cores: str = str(CORES[:1])) -> str:
    """64 flows to four ports."""
    return f"""
[rx]
cores = {cores}
[sockets]
max = {sockets}
[[netif]]
kind = "synthetic"
flows = 64
local_ports = [{PORT}, {PORT + 3}]
rate = {rate}
{more}
"""


# -- /dev/shm ------------------------------------------------------------------------------------------------------


def small_shm(size: int) -> list[str]:
    """Words before a command that has a /dev/shm of its own, of `size` bytes."""
    script = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


def beside(pid: int, function: Callable[..., Any], *args: Any) -> Forked:
    """Runs the function in a process that sees the /dev/shm of process `pid`."""
    def inside() -> Any:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{pid}/ns/mnt") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNS):
                raise OSError(ctypes.get_errno(), "setns")
        return function(*args)

    return Forked(inside)


@pytest.mark.root
@pytest.mark.needs("unshare")
def test_a_start_without_room_in_shm() -> None:
    """Says how much is needed and how much there is, and leaves nothing."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "config.toml")
        path.write_text('name = "no-room"\n' + config(sockets=65536))
        script = f'"{sys.executable}" -m dataplane run "$1"; code=$?; ls /dev/shm >&2; exit $code'
        result = subprocess.run([*small_shm(MEGABYTE), "sh", "-c", script, "sh", str(path)], capture_output=True,
                                text=True, timeout=300, env={**os.environ, "DATAPLANE_RUNTIME_DIR": directory})
        left = os.listdir(directory)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if "compiling" not in line]
    assert len(lines) == 1 and "sockets.max" in lines[0], lines     # one error, and no name in /dev/shm
    assert f"{MEGABYTE} bytes are available" in lines[0] and "needs " in lines[0]
    assert left == ["config.toml"]


def opened(dp: dataplane.Dataplane) -> Any:
    """A socket with rings of a megabyte, or None."""
    try:
        return dp.udp("0.0.0.0", 7000, ring_bytes=MEGABYTE)
    except dataplane.DataplaneError:
        return None


def fill_shm(name: str) -> list[str]:
    """Opens sockets and attachments until nothing more fits. Who is there goes on, and what was closed makes room. What
    was said."""
    with dataplane.attach(name) as dp:
        first = dp.udp("0.0.0.0", PORT)
        socks: list[Any] = []
        with pytest.raises(dataplane.DataplaneError) as refused:
            while True:
                socks.append(dp.udp("0.0.0.0", 6000 + len(socks), ring_bytes=MEGABYTE))
        with contextlib.ExitStack() as others, pytest.raises(dataplane.DataplaneError) as locked_out:
            while True:
                others.enter_context(dataplane.attach(name))
        for _ in range(1000):
            assert first.recv(WATCHDOG)
        assert dp.stats()["sockets"] == 1 + len(socks)
        socks.pop().close()
        with wait_for(lambda: opened(dp), "room, which comes a moment after the close"):
            assert first.recv(WATCHDOG)
    return [str(refused.value), str(locked_out.value)]


@pytest.mark.root
@pytest.mark.needs("unshare")
def test_shm_is_full_while_it_runs() -> None:
    with running(config(), prefix=small_shm(8 * MEGABYTE)) as process:
        shm = Path(f"/proc/{process.pid}/root/dev/shm")
        [table] = os.listdir(shm)
        told = beside(process.pid, fill_shm, process.name).result(WATCHDOG)
        for sentence in told:
            assert re.fullmatch(r"not enough shared memory: segment /dataplane\.\d+\..+ needs \d+ bytes, "
                                r"\d+ bytes are available", sentence), sentence
        wait_for(lambda: os.listdir(shm) == [table], "the end of the consumers' memory")
        beside(process.pid, fill_shm, process.name).result(WATCHDOG)


# -- descriptors -----------------------------------------------------------------------------------------------------


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def restarts(dp: dataplane.Dataplane) -> int:
    return sum(worker["restarts"] for worker in dp.stats()["workers"])


def kill_a_worker(dp: dataplane.Dataplane) -> None:
    os.kill(dp.stats()["workers"][0]["pid"], signal.SIGKILL)


@contextlib.contextmanager
def limited(pid: int, count: int) -> Iterator[None]:
    """The process may have `count` descriptors."""
    former = resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, former)


@pytest.mark.root
def test_the_supervisor_has_no_descriptors_left() -> None:
    """Whoever comes is refused, and told why; who is there goes on, and a dead worker is replaced."""
    with running(config()) as process, dataplane.attach(process.name) as dp:
        sock = dp.udp("0.0.0.0", PORT)
        before = descriptors(process.pid)
        with limited(process.pid, before + 40):
            with contextlib.ExitStack() as others, pytest.raises(OSError, match="RLIMIT_NOFILE") as error:
                while True:
                    others.enter_context(dataplane.attach(process.name))
            assert error.value.errno == errno.EMFILE
            with pytest.raises(OSError, match="RLIMIT_NOFILE"), contextlib.ExitStack() as others:
                while True:     # each size of rings is a segment of its own
                    another = others.enter_context(dataplane.attach(process.name))
                    for size in range(8):
                        another.udp("0.0.0.0", 0, ring_bytes=4096 << size)
            kill_a_worker(dp)
            wait_for(lambda: restarts(dp) == 1, "a new worker")
            assert sock.recv(WATCHDOG)
            wait_for(lambda: descriptors(process.pid) <= before, "the descriptors of those who left")
            with dataplane.attach(process.name) as again:
                assert again.udp("0.0.0.0", PORT + 1).recv(WATCHDOG)
        wait_for(lambda: descriptors(process.pid) <= before, "the descriptors of those who left")


@pytest.mark.root
def test_a_worker_dies_when_there_is_no_descriptor_for_another() -> None:
    """It is replaced when there is one."""
    with running(config()) as process, dataplane.attach(process.name) as dp:
        sock = dp.udp("0.0.0.0", PORT)
        assert sock.recv(WATCHDOG)
        with limited(process.pid, 8):
            kill_a_worker(dp)
            wait_for(lambda: restarts(dp) == 1, "the worker's end")
            start, told = dp.stats()["uptime"], dp.stats()["workers"][0]
            assert told["pid"] == 0
            wait_for(lambda: dp.stats()["uptime"] > start + 0.3, "some looks of the supervisor at its workers")
            assert os.sched_getaffinity(process.pid) == os.sched_getaffinity(0)
            with pytest.raises(OSError):
                dp.udp("0.0.0.0", PORT + 1)
        wait_for(lambda: dp.stats()["workers"][0]["pid"], "a new worker")
        with dp.udp("0.0.0.0", PORT + 1) as another:
            assert another.recv(WATCHDOG)
        assert sock.recv(WATCHDOG)


@pytest.mark.root
def test_a_worker_has_no_descriptors_left() -> None:
    """It cannot map what it is told to, and is replaced by one that has it already."""
    with running(config()) as process, dataplane.attach(process.name) as dp:
        sock = dp.udp("0.0.0.0", PORT)
        assert sock.recv(WATCHDOG)
        pid = dp.stats()["workers"][0]["pid"]
        free = min(set(range(1000)) - set(map(int, os.listdir(f"/proc/{pid}/fd"))))
        with limited(pid, free), dp.udp("0.0.0.0", PORT + 1, ring_bytes=8192) as another:
            assert another.recv(WATCHDOG) and sock.recv(WATCHDOG)
            assert restarts(dp) == 1
        assert "RX worker 0" in process.log and "died" in process.log


def without_descriptors(name: str, uid: int) -> None:
    """What a consumer meets that has no descriptor left: attached already, and before."""
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    with dataplane.attach(name) as dp:
        full = os.dup(0)        # the lowest number that is free
        os.close(full)
        before = descriptors(os.getpid())
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        first = dp.udp("0.0.0.0", PORT)
        for _ in range(3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (full, most))
            for ring_bytes in (8192, 16384):
                with pytest.raises(OSError) as error:
                    dp.udp("0.0.0.0", PORT + 1, ring_bytes=ring_bytes)
                assert error.value.errno == errno.EMFILE, error.value
            with pytest.raises(OSError) as error:
                dataplane.attach(name)
            assert error.value.errno == errno.EMFILE, error.value
            resource.setrlimit(resource.RLIMIT_NOFILE, (full + 1, most))    # enough to connect, for nothing more
            with pytest.raises(OSError) as error:
                dataplane.attach(name)
            assert error.value.errno == errno.EMFILE, error.value
            assert first.recv(WATCHDOG)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            assert descriptors(os.getpid()) == before
        wait_for(lambda: dp.stats()["sockets"] == 1, "the end of what nobody has")
        for ring_bytes in (8192, 16384):
            with dp.udp("0.0.0.0", PORT + 1, ring_bytes=ring_bytes) as sock:
                assert sock.recv(WATCHDOG)


@pytest.mark.root
@pytest.mark.parametrize("uid", [0, 65534], ids=["same user", "another user"])
def test_a_consumer_has_no_descriptors_left(uid: int) -> None:
    rule = f'[[access]]\nuid = 65534\nallow = ["udp:{PORT}-{PORT + 3}"]\n'
    with running(config(more=rule)) as process:
        process.directory.chmod(0o755)
        with dataplane.attach(process.name) as dp:      # loads the kernels, which another user cannot
            assert dp.stats()["sockets"] == 0
        Forked(lambda: without_descriptors(process.name, uid)).result(WATCHDOG)
        with dataplane.attach(process.name) as dp:
            wait_for(lambda: dp.stats()["sockets"] == 0, "the consumer's end")


# -- cores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("core", "affinity", "expected"), [
    (4095, CORES, "a core of this machine"), (CORES[-1], CORES[:1], "a core within this process's affinity")])
def test_a_core_that_is_not_ours(core: int, affinity: list[int], expected: str) -> None:
    if core in affinity:
        pytest.skip("needs two cores")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "config.toml")
        path.write_text('name = "no-core"\n' + config(cores=f"[{core}]"))
        words = ["taskset", "-c", ",".join(map(str, affinity)), sys.executable, "-m", "dataplane", "run", str(path)]
        result = subprocess.run(words, capture_output=True, text=True, timeout=100,
                                env={**os.environ, "DATAPLANE_RUNTIME_DIR": directory})
        assert os.listdir(directory) == ["config.toml"]
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert f"rx.cores[0]: {core}" in result.stderr and expected in result.stderr


@contextlib.contextmanager
def offline(core: int) -> Iterator[None]:
    """Takes a core away. Skips where that cannot be."""
    switch = Path(f"/sys/devices/system/cpu/cpu{core}/online")
    try:
        switch.write_text("0")
    except OSError as error:
        pytest.skip(f"core {core} cannot be taken offline here: {error.strerror}")
    try:
        yield
    finally:
        switch.write_text("1")


@pytest.mark.stress     # other processes of the machine would lose their core as well
@pytest.mark.root
def test_a_core_goes_offline_and_comes_back() -> None:
    """Its worker goes on elsewhere, also one that is replaced meanwhile, and then back."""
    if len(CORES) < 2:
        pytest.skip("needs two cores")
    core = CORES[-1]
    with running(config(cores=f"[{core}]")) as process, dataplane.attach(process.name) as dp:
        sock = dp.udp("0.0.0.0", PORT)
        assert sock.recv(WATCHDOG)
        with offline(core):
            for number in range(2):
                wait_for(lambda: f"(core {core}): its core is offline" in process.log, "the message")
                for _ in range(500):
                    assert sock.recv(WATCHDOG)
                with dp.udp("0.0.0.0", PORT + 1) as another:
                    assert another.recv(WATCHDOG)
                if number == 0:
                    kill_a_worker(dp)
                    wait_for(lambda: restarts(dp) == 1, "a new worker")
        wait_for(lambda: f"(core {core}): its core is back" in process.log, "the message")
        assert os.sched_getaffinity(dp.stats()["workers"][0]["pid"]) == {core}
        assert sock.recv(WATCHDOG)


# -- interfaces ------------------------------------------------------------------------------------------------------


def serve_both(dp: dataplane.Dataplane, ready: int) -> None:
    """Sends back what comes to PORT, by TCP and by UDP."""
    with dp.tcp_listen(OURS[4], PORT) as listener, dp.udp(OURS[4], PORT) as sock:
        os.write(ready, b"x")
        conn, _ = listener.accept(timeout=WATCHDOG)
        with conn:
            conn.settimeout(WATCHDOG)
            while data := conn.recv(65536):
                conn.sendall(data)
                with contextlib.suppress(TimeoutError):
                    while True:
                        sock.sendto(*sock.recvfrom(timeout=0))


def echo_through(world_: World, requests: int, replies: int) -> int:
    """A kernel peer whose connection lives through all that comes: sends a line for each byte that it is told, and
    receives it back, and a datagram as well."""
    number = 0
    with kernel_connect(4, PORT) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.settimeout(0.05)
        while os.read(requests, 1) != b"q":
            number += 1
            line = b"%08d" % number * 512
            datagram = _ask(datagrams, sock, line)
            os.write(replies, b"+" if datagram else b"-")
    return number


def _ask(datagrams: socket.socket, sock: socket.socket, line: bytes) -> bool:
    """A line there and back; datagrams until one comes back, for they may be lost."""
    deadline = time.monotonic() + WATCHDOG
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            datagrams.sendto(line[:8], (OURS[4], PORT))
        sock.sendall(line)
        got = bytearray()
        while len(got) < len(line):
            got += sock.recv(len(line) - len(got))
        assert got == line
        with contextlib.suppress(OSError):
            while data := datagrams.recv(100):
                if data == line[:8]:
                    return True
    return False


class Echo:
    """The peer above in its process, and the consumer that answers it."""

    def __init__(self, w: World, stack: contextlib.ExitStack) -> None:
        (ready, tell), (self._from_us, self._to_it), (self._here, self._from_it) = (
            stack.enter_context(pipe()) for _ in range(3))
        self.consumer = w.consumer(serve_both, tell)
        stack.callback(self.consumer.kill)
        assert os.read(ready, 1)
        self.peer = w.peer.fork(echo_through, w, self._from_us, self._from_it)

    def ask(self) -> None:
        os.write(self._to_it, b"x")

    def answered(self) -> None:
        assert select.select([self._here], [], [], WATCHDOG)[0], "no answer"
        assert os.read(self._here, 1) == b"+", "no datagram came back"

    def end(self) -> int:
        os.write(self._to_it, b"q")
        return int(self.peer.result(WATCHDOG))


@pytest.mark.root
@pytest.mark.needs("ip")
@pytest.mark.parametrize("kind", ["tun", "af_packet"])
def test_an_interface_goes_down_and_comes_back(kind: str) -> None:
    """What was open goes on: TCP without a byte missing, UDP with the next datagram."""
    with world(kind) as w, contextlib.ExitStack() as stack:
        echo = Echo(w, stack)
        namespace, mine = w.near
        for number in range(4):
            echo.ask()
            if number:
                namespace.ip("link", "set", mine, "down")
                with dataplane.attach(w.name) as dp:    # all that is no packet goes on
                    assert [one["status"] for one in dp.stats()["queues"]] == ["running"]
                namespace.ip("link", "set", mine, "up")
            echo.answered()
        assert echo.end() == 4
        ledger = w.process.stop()
        assert "removed" not in w.process.log and ledger["delivered"] > 0


def removed(kind: str, stack: contextlib.ExitStack) -> tuple[Running, Namespace, str]:
    """A dataplane on an interface that will be removed, and with packets of its own."""
    here = stack.enter_context(Namespace())
    device, netif = "dp0", f'kind = "tun"\ndevice = "dp0"\naddresses = ["{OURS[4]}/24"]'
    if kind == "af_packet":
        peer = stack.enter_context(Namespace())
        _, device = veth(peer, here)
        netif = f'kind = "af_packet"\ndevice = "{device}"\naddresses = ["{OURS[4]}/24"]'
    text = config(more=f"[[netif]]\n{netif}")
    prefix = ["ip", "netns", "exec", here.name]
    return stack.enter_context(running(text, prefix=prefix, check=False)), here, device


@pytest.mark.root
@pytest.mark.needs("ip")
@pytest.mark.parametrize("kind", ["tun", "af_packet"])
def test_an_interface_is_removed(kind: str) -> None:
    """It is named as failed; the other netif goes on; the end is orderly, and its exit code 1."""
    with contextlib.ExitStack() as stack:
        process, here, device = removed(kind, stack)
        with dataplane.attach(process.name) as dp:
            sock, listener = dp.udp("0.0.0.0", PORT), dp.tcp_listen(OURS[4], PORT)
            assert sock.recv(WATCHDOG)
            here.ip("link", "del", device)
            wait_for(lambda: f"{kind} {device}: the interface was removed" in process.log, "the message")
            queues = {one["netif"]: one["status"] for one in dp.stats()["queues"]}
            assert queues == {"synthetic": "running", device: "failed"}
            for _ in range(1000):
                assert sock.recv(WATCHDOG)
            assert dp.udp("0.0.0.0", PORT + 1).recv(WATCHDOG)
            with pytest.raises(TimeoutError), dp.udp(OURS[4], 53) as other:
                other.sendto(b"nowhere", ("10.77.0.2", 53))
                other.recv(0.05)
            with pytest.raises(TimeoutError):
                listener.accept(timeout=0.05)
            shown = subprocess.run([sys.executable, "-m", "dataplane", "stat", process.name], capture_output=True,
                                   text=True, timeout=100)
            assert shown.returncode == 0 and "failed" in shown.stdout
            process.process.send_signal(signal.SIGINT)
            assert process.process.wait(WATCHDOG) == 1
        ledger = json.loads((process.directory / "ledger.json").read_text())
        assert ledger["balanced"] and "crash_lost" not in ledger["dropped"]
        assert process.log.count("the interface was removed") == 1


# -- the clock -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def clock_stepped(seconds: int) -> Iterator[None]:
    """CLOCK_REALTIME is wrong by so much, for all of this machine and as short as can be; then right again by the clock
    that nobody can set. Skips where it may not be set."""
    realtime, start = time.time_ns(), time.monotonic_ns()
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, realtime + seconds * 1_000_000_000)
    except OSError as error:
        pytest.skip(f"the clock cannot be set here: {error.strerror}")
    try:
        yield
    finally:
        time.clock_settime_ns(time.CLOCK_REALTIME, realtime + time.monotonic_ns() - start)


def fragments(number: int, target: bytes) -> list[bytes]:
    """A datagram for UDP port 53 in two fragments, as frames."""
    whole = udp4("10.77.0.2", OURS[4], (9, 53), b"%04d" % number * 10)
    head, data = bytearray(whole[:20]), whole[20:]
    made = []
    for offset, more, part in ((0, True, data[:24]), (24, False, data[24:])):
        head[2:4] = (20 + len(part)).to_bytes(2, "big")
        head[4:6] = number.to_bytes(2, "big")
        head[6:8] = (offset >> 3 | (0x2000 if more else 0)).to_bytes(2, "big")
        head[10:12] = b"\0\0"
        head[10:12] = internet_checksum(bytes(head)).to_bytes(2, "big")
        made.append(ethernet(bytes(head) + part, 0x0800, target))
    return made


@pytest.mark.stress     # it is the whole machine's clock
@pytest.mark.root
@pytest.mark.needs("ip")
@pytest.mark.parametrize("seconds", [-3600, pytest.param(3600, marks=pytest.mark.stress),
                                     pytest.param(400 * 86400, marks=pytest.mark.stress)])
def test_the_clock_is_set(seconds: int) -> None:
    """No timer notices: waits last as long as they should, reassembly and connections go on, packets keep coming."""
    with world("af_packet", more=PACED) as w, contextlib.ExitStack() as stack:
        dp = stack.enter_context(dataplane.attach(w.name))
        echo = Echo(w, stack)
        echo.ask()
        echo.answered()
        paced, sock, quiet = dp.udp("0.0.0.0", 6001), dp.udp(OURS[4], 53), dp.udp("0.0.0.0", 6100)
        assert paced.recv(WATCHDOG)
        first, second = fragments(1, mac(*w.near))
        w.peer.call(flood, w.device, [first], 1)
        wait_for(lambda: sum(one["held"] for one in dp.stats()["queues"]) == 1, "the first fragment")
        before = dp.stats()["uptime"]
        with clock_stepped(seconds):
            echo.ask()
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                quiet.recv(timeout=0.2)
            assert time.monotonic() - start >= 0.2
            for _ in range(100):
                assert paced.recv(WATCHDOG)
            echo.answered()
            w.peer.call(flood, w.device, [second], 1)
            assert sock.recv(WATCHDOG) == b"0001" * 10
            during = dp.stats()["uptime"]
        echo.ask()
        echo.answered()
        after = dp.stats()["uptime"]
        assert before <= during <= after < before + 1800
        assert paced.recv(WATCHDOG)
        assert echo.end() == 3
        ledger = w.process.stop()
        assert "fragment_timeout" not in ledger["dropped"]
