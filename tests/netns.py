"""Network namespaces for tests: made with unique names, removed whatever happens.

    with Namespace() as a, Namespace() as b:
        va, vb = veth(a, b, ["10.1.0.1/24", "fd01::1/64"], ["10.1.0.2/24", "fd01::2/64"])
        a.run(["ping", "-c", "1", "10.1.0.2"])
        with b.entered():                       # this thread: sockets opened here belong to b
            netif = Netif(...)
        echo = a.fork(serve, port)              # a function in a process of its own, in a
        ...
        echo.result(timeout=10)                 # what it returned, or raises what it raised

Needs root and `ip`. Nothing is ever made in the namespace that the tests themselves run in. What a killed
test run left is removed when the next one makes its first namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PREFIX = "dpt"
_CLONE_NEWNET = 0x40000000
_RUN = Path("/run/netns")
_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def ip(*words: str) -> str:
    """`ip words...`; returns what it printed, raises with what it complained about."""
    result = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if result.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {result.stderr.strip()}")
    return result.stdout


class Namespace:
    """A network namespace with its loopback interface up; a context manager."""

    def __init__(self) -> None:
        self.name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self._children: list[Forked] = []

    def __enter__(self) -> Namespace:
        _sweep()
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *exc: object) -> None:
        for child in self._children:
            child.kill()
        _remove(self.name)

    def ip(self, *words: str) -> str:
        """`ip` inside of it."""
        return ip("-n", self.name, *words)

    def run(self, command: Sequence[str], check: bool = True, timeout: float = 30,
            **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs `command` inside of it and waits."""
        command = ["ip", "netns", "exec", self.name, *command]
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts `command` inside of it; ended with the namespace at the latest."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)

    @contextlib.contextmanager
    def entered(self) -> Iterator[Namespace]:
        """This thread is inside of it for the time of the `with` block."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._enter()
            yield self
        finally:
            _setns(before)
            os.close(before)

    def fork(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Forked:
        """Runs the function in a forked process inside of it; ended with the namespace at the latest."""
        child = Forked(lambda: (self._enter(), function(*args, **kwargs))[1])
        self._children.append(child)
        return child

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 60, **kwargs: Any) -> Any:
        """The same, and waits for what it returns."""
        return self.fork(function, *args, **kwargs).result(timeout)

    def _enter(self) -> None:
        fd = os.open(_RUN / self.name, os.O_RDONLY | os.O_CLOEXEC)
        _setns(fd)
        os.close(fd)


class Forked:
    """A function that runs in a forked process."""

    def __init__(self, function: Callable[[], Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._pipe, child_end = os.pipe()
        self.pid = os.fork()
        self._ended = False
        if self.pid == 0:
            _run_child(function, child_end)
        os.close(child_end)

    def result(self, timeout: float = 60) -> Any:
        """What the function returned; raises what it raised, TimeoutError, or ChildProcessError if it was
        killed."""
        data = b""
        deadline = time.monotonic() + timeout
        while True:
            if not select.select([self._pipe], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
            piece = os.read(self._pipe, 1 << 20)
            if not piece:
                break
            data += piece
        status = self._wait()
        if not data:
            raise ChildProcessError(f"process {self.pid} ended with {status}")
        value, error = pickle.loads(data)
        if error is not None:
            raise error
        return value

    def running(self) -> bool:
        """Whether it has not ended yet."""
        if not self._ended:
            self._ended = os.waitpid(self.pid, os.WNOHANG)[0] != 0
        return not self._ended

    def kill(self) -> None:
        """kill -9, and waits; nothing if it has ended."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self._wait()

    def _wait(self) -> int:
        if self._ended:
            return 0
        self._ended = True
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._pipe)
        return status


def veth(a: Namespace, b: Namespace, addresses_a: Sequence[str] = (), addresses_b: Sequence[str] = (),
         mtu: int = 1500, quiet: bool = True) -> tuple[str, str]:
    """A pair of interfaces, one in `a` and one in `b`, both up. Returns their names.

    `quiet`: an end without IPv6 addresses does not speak IPv6 by itself, so that nothing but the test's
    packets passes.
    """
    number = next(_numbers)
    name_a, name_b = f"va{number}", f"vb{number}"
    a.ip("link", "add", name_a, "mtu", str(mtu), "type", "veth", "peer", "name", name_b, "mtu", str(mtu),
         "netns", b.name)
    for namespace, name, addresses in ((a, name_a, addresses_a), (b, name_b, addresses_b)):
        if quiet:
            namespace.ip("link", "set", name, "addrgenmode", "none")
            if not any(":" in address for address in addresses):
                namespace.run(["sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{name}/disable_ipv6"])
        for address in addresses:
            namespace.ip("addr", "add", address, "dev", name, *(["nodad"] if ":" in address else []))
        namespace.ip("link", "set", name, "up")
    _wait_up(a, name_a)
    _wait_up(b, name_b)
    return name_a, name_b


def mac(namespace: Namespace, device: str) -> bytes:
    """The interface's link-layer address."""
    words = namespace.ip("-o", "link", "show", device).split()
    return bytes.fromhex(words[words.index("link/ether") + 1].replace(":", ""))


def _wait_up(namespace: Namespace, device: str) -> None:
    deadline = time.monotonic() + 10
    while "LOWER_UP" not in namespace.ip("link", "show", device):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{device} is not up after 10 s")
        time.sleep(0.01)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _run_child(function: Callable[[], Any], pipe: int) -> None:
    status = 1
    try:
        try:
            answer = pickle.dumps((function(), None))
        except BaseException as error:
            traceback.print_exc()
            answer = pickle.dumps((None, RuntimeError(f"in process {os.getpid()}: {error!r}")))
        with os.fdopen(pipe, "wb") as file:
            file.write(answer)
        status = 0
    finally:
        os._exit(status)


def _remove(name: str) -> None:
    """Kills what runs in it and deletes it. Devices in it vanish with it."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
    for pid in pids.split():
        if int(pid) != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _sweep() -> None:
    """Removes namespaces of test runs that were killed."""
    for path in _RUN.glob(f"{PREFIX}-*-*") if _RUN.is_dir() else ():
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove(path.name)
