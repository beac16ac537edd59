"""A real dataplane for a test: `dataplane run` in a process of its own, and a strict end.

    with running(config) as dataplane:
        ...
    assert dataplane.ledger["delivered"] == 100

`config` is TOML without `name`. The runtime directory is a temporary one, which is also this process's while
the block runs, so that `attach(dataplane.name)` finds it. At the end: SIGINT unless it has ended by itself,
exit code 0, a balanced ledger, nothing left in the runtime directory or in /dev/shm.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

READY_SECONDS = 300.0   # with an empty cache of kernels, on a busy machine
END_SECONDS = 30.0

_numbers = itertools.count(1)


class Running:
    """A running dataplane. `ledger` is there when it has ended."""

    def __init__(self, name: str, directory: Path, process: subprocess.Popen[str]) -> None:
        self.name, self.directory, self.process = name, directory, process
        self.ledger: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has written to its standard error so far."""
        return (self.directory / "stderr").read_text()

    def stop(self) -> dict[str, Any]:
        """Ends it cleanly; the final ledger. May be called within the block."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self, timeout: float = END_SECONDS) -> dict[str, Any]:
        """Until it has ended by itself; the final ledger."""
        code = self.process.wait(timeout)
        assert code == 0, f"dataplane run: exit code {code}\n{self.log}"
        self.ledger = json.loads((self.directory / "ledger.json").read_text())
        assert self.ledger["balanced"], self.ledger
        return self.ledger

    def _await_ready(self) -> None:
        assert self.process.stdout is not None
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if select.select([self.process.stdout], [], [], 0.1)[0]:
                line = self.process.stdout.readline()
                if line.strip() == f"ready {self.name}":
                    return
                assert line, f"dataplane run ended before it was ready\n{self.log}"
        raise AssertionError(f"dataplane run is not ready after {READY_SECONDS:.0f} s\n{self.log}")


@contextlib.contextmanager
def running(config_text: str, *options: str, environment: dict[str, str] | None = None, check: bool = True,
            name: str | None = None, prefix: Sequence[str] = ()) -> Iterator[Running]:
    """A dataplane with this configuration (without `name`), given `options` of `dataplane run` and these
    environment variables. `check=False`: the test ends it in its own way, and looks at the result itself.
    `name`: instead of a new one. `prefix`: words before the command, as `ip netns exec NAME`."""
    name = name or f"test-{os.getpid()}-{next(_numbers)}"
    with tempfile.TemporaryDirectory(prefix="dpt-") as temporary, _runtime_directory(temporary):
        directory = Path(temporary)
        config = directory / "config.toml"
        config.write_text(f'name = "{name}"\n{config_text}')
        command = [*prefix, sys.executable, "-m", "dataplane", "run", str(config),
                   "--ledger", str(directory / "ledger.json"), *options]
        with open(directory / "stderr", "w") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True,
                                       env={**os.environ, **(environment or {})})
        dataplane = Running(name, directory, process)
        try:
            dataplane._await_ready()
            yield dataplane
            if check:
                if not dataplane.ledger:
                    dataplane.stop()
                left = [path.name for path in directory.iterdir() if path.suffix == ".sock"]
                assert not left, f"left in the runtime directory: {left}"
                left = [path.name for path in _shared_memory(name)]
                assert not left, f"left in /dev/shm: {left}"
        finally:
            _end(process)
            for path in _shared_memory(name):       # only after a test that failed, or that killed it
                path.unlink(missing_ok=True)
            if process.stdout is not None:
                process.stdout.close()


def _end(process: subprocess.Popen[str]) -> None:
    """Whatever has happened: it may remove what it made, and then it is gone."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _shared_memory(name: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"dataplane.*.{name}.*"))


@contextlib.contextmanager
def _runtime_directory(path: str) -> Iterator[None]:
    before = os.environ.get("DATAPLANE_RUNTIME_DIR")
    os.environ["DATAPLANE_RUNTIME_DIR"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["DATAPLANE_RUNTIME_DIR"]
        else:
            os.environ["DATAPLANE_RUNTIME_DIR"] = before
