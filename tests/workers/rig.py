"""A dataplane as a process of its own, for tests: started from a configuration, watched, ended.

    with Running(SYNTHETIC, start=1) as dp:
        connection = dp.attach()
        ...
        assert dp.interrupt() == 0
    assert dp.ledger["balanced"]

Names are unique, so that tests do not meet what runs on the machine. Every wait has a watchdog.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from dataplane.cli_observe import sockets
from dataplane.control import messages
from dataplane.control.paths import lock_path, runtime_directory, socket_path
from dataplane.control.wire import Connection
from dataplane.shm import layout as L
from dataplane.shm.segment import leftovers

ROOT = Path(__file__).parents[2]
WATCHDOG = 30.0
COMPILING = 280.0       # the first start of a session may have to compile

_numbers = itertools.count()

HEAD = """
name = "{name}"
[rx]
cores = {cores}
idle = "{idle}"
[sockets]
max = 256
groups = 16
[inet]
neighbours = 16
"""

SYNTHETIC = """
[[netif]]
kind = "synthetic"
flows = 64
local_ports = [5000, 5003]
rate = {rate}
count = {count}
backpressure = {backpressure}
start = {start}
"""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = WATCHDOG) -> None:
    """Return once `condition` holds; a watchdog, not a measurement."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what} for {seconds} s"
        time.sleep(0.005)


class Running:
    """`python -m dataplane run`, from its ready line to its end. `with` kills it if need be."""

    def __init__(self, netifs: str = SYNTHETIC, *, cores: str = "[0]", idle: str = "poll", extra: str = "",
                 name: str | None = None, prefix: tuple[str, ...] = (), arguments: tuple[str, ...] = (),
                 wait: bool = True, **values: Any) -> None:
        self.name = name or f"test-{os.getpid()}-{next(_numbers)}"
        self._directory = tempfile.TemporaryDirectory()
        directory = Path(self._directory.name)
        values = {"rate": 20000, "count": 0, "backpressure": "false", "start": 0} | values
        head = HEAD.format(name=self.name, cores=cores, idle=idle)
        self.config = directory / "config.toml"
        self.config.write_text(head + netifs.format(**values) + extra)
        self._ledger, self._errors = directory / "ledger.json", directory / "errors"
        command = [*prefix, sys.executable, "-m", "dataplane", "run", str(self.config), "--ledger",
                   str(self._ledger), *arguments]
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            self.ready = self._wait_until_ready() if wait else False
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _wait_until_ready(self) -> bool:
        """True at the ready line, False when it has ended without."""
        watchdog = threading.Timer(COMPILING, self.process.kill)
        watchdog.start()
        try:
            assert self.process.stdout is not None
            return self.process.stdout.readline() == f"ready {self.name}\n"
        finally:
            watchdog.cancel()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is not None:
            print(self.errors, file=sys.stderr)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        wait_for(lambda: not self.locked, "the lock")
        if self.remains():
            # Refused when the name is somebody else's, which is what some tests are about.
            subprocess.run([sys.executable, "-m", "dataplane", "clean", self.name], cwd=ROOT, check=False,
                           capture_output=True)
        self._directory.cleanup()

    # -- its end ---------------------------------------------------------------------------------------------

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once it has ended by itself."""
        code = self.process.wait(WATCHDOG)
        self._final = json.loads(self._ledger.read_text() or "{}") if self._ledger.exists() else {}
        self._said = self._errors.read_text()
        return code

    @property
    def ledger(self) -> dict[str, Any]:
        """The final ledger, after `wait` or `interrupt`."""
        return self._final

    @property
    def errors(self) -> str:
        """What it has written to its standard error so far."""
        return self._errors.read_text() if self._errors.exists() else self._said

    # -- what it is doing ------------------------------------------------------------------------------------

    def connect(self) -> Connection:
        """A control connection."""
        return Connection.open(self.name)

    def attach(self) -> tuple[Connection, messages.Attached]:
        """A consumer without memory: enough to own sockets."""
        connection = self.connect()
        attached, descriptors = connection.request(
            messages.Attach(messages.PROTOCOL_VERSION, L.fingerprint()), messages.Attached)
        for descriptor in descriptors:
            os.close(descriptor)
        return connection, attached

    def stats(self) -> dict[str, Any]:
        """The ledger now."""
        with self.connect() as connection:
            return connection.request(messages.Stats(), messages.Ledger)[0].ledger

    def sockets(self) -> list[messages.SocketInfo]:
        """The open sockets."""
        with self.connect() as connection:
            return list(sockets(connection))

    def workers(self) -> list[int]:
        """The RX workers' pids."""
        return [worker["pid"] for worker in self.stats()["workers"]]

    @property
    def locked(self) -> bool:
        """Whether somebody holds the name."""
        import fcntl

        path = lock_path(runtime_directory(), self.name)
        if not path.exists():
            return False
        with path.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def remains(self) -> list[str]:
        """What there is of it in the file system."""
        directory = runtime_directory()
        paths = [path for path in (socket_path(directory, self.name), lock_path(directory, self.name))
                 if path.exists()]
        return [*map(str, paths), *leftovers(os.geteuid(), self.name)]


def bind(connection: Connection, **fields: Any) -> messages.Bound:
    """Open a socket; its descriptors are thrown away."""
    bound, descriptors = connection.request(messages.Bind(**fields), messages.Bound)
    for descriptor in descriptors:
        os.close(descriptor)
    return bound
