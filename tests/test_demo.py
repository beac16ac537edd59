"""`dataplane demo` for real: it ends with a balanced ledger, and leaves nothing, however it ends."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dataplane import cli_demo
from dataplane.config import load
from dataplane.control.paths import lock_path, runtime_directory, socket_path
from dataplane.netif import kinds
from dataplane.shm.segment import leftovers

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).parents[1]
COMPILING = 280.0       # the first start of a session may have to compile
MARK = "DATAPLANE_TEST_DEMO"


class Demo:
    """`dataplane demo` in a session of its own, with its output in a file."""

    def __init__(self, directory: Path, *arguments: str, terminal: int | None = None,
                 prefix: tuple[str, ...] = (), environment: dict[str, str] | None = None,
                 make: bool = False) -> None:
        self.mark = uuid.uuid4().hex
        self._output = directory / "output"
        self._directory = directory / "tmp"     # a short path: a socket's address has 107 bytes
        self._directory.mkdir()
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(self._directory), **(environment or {})}
        command = [sys.executable, "-m", "dataplane", "demo", *arguments]
        if make:
            (directory / "Makefile").write_text(f"demo:\n\t@{shlex.join(command)}\n")
            command = ["make", "-f", str(directory / "Makefile")]
        command = [*prefix, *command]
        with self._output.open("wb") as output:
            stream = output if terminal is None else terminal
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=terminal, stdout=stream, stderr=stream,
                                            start_new_session=True, env=environment)

    @property
    def output(self) -> str:
        return self._output.read_text()

    def await_line(self, text: str) -> None:
        """Until it has printed `text`."""
        deadline = time.monotonic() + COMPILING
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def interrupt(self) -> None:
        """As Ctrl-C does: the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        return self.process.wait(COMPILING)

    def name(self) -> str:
        """What its dataplane is called."""
        found = re.search(r"^dataplane demo: (\S+),", self.output, re.M)
        assert found, self.output
        return found[1]

    def left(self) -> list[str]:
        """What there is of it: processes, shared memory, files."""
        processes = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.environ().get(MARK) == self.mark and one.status() != psutil.STATUS_ZOMBIE:
                    processes.append(f"{one.pid} {' '.join(one.cmdline())}")
        left = processes + [str(path) for path in self._directory.iterdir()]
        if "dataplane demo: " in self.output:
            left += leftovers(os.geteuid(), self.name())
            files = (lock_path, socket_path)
            left += [str(path) for path in (one(runtime_directory(), self.name()) for one in files) if path.exists()]
        return left


@pytest.fixture
def start() -> Iterator[Callable[..., Demo]]:
    """Starts demos; they are killed if the test did not end them."""
    demos: list[Demo] = []
    exits = contextlib.ExitStack()

    def begin(*arguments: str, **options: object) -> Demo:
        directory = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="dpt-")))
        demos.append(Demo(directory, *arguments, **options))    # type: ignore[arg-type]
        return demos[-1]

    yield begin
    for demo in demos:
        if demo.process.poll() is None:
            demo.process.kill()
            demo.process.wait()
    exits.close()


def check_result(output: str) -> None:
    """Three kinds of consumers got packets, and the ledger is balanced."""
    assert re.search(r"^dataplane quickstart.*; balanced$", output.replace(",\n", ", "), re.M | re.S), output
    assert "not balanced" not in output
    for consumer in ("dns", "telemetry 1", "telemetry 2", "tap"):
        assert re.search(rf"^{consumer} +[1-9][\d,]* packets", output, re.M), output
    assert "Traceback" not in output


def test_it_ends_by_itself(start: Callable[..., Demo]) -> None:
    demo = start("--duration", "2.5")
    assert demo.wait() == 0, demo.output
    check_result(demo.output)
    assert re.search(r"^ +1 s  offered [\d,]+/s, delivered", demo.output, re.M), demo.output
    assert not demo.left()


@pytest.mark.stress
def test_two_at_once(start: Callable[..., Demo]) -> None:
    """Each has its own dataplane."""
    demo = start("--duration", "100")
    demo.await_line("  1 s  offered")
    other = start("--duration", "1.5")
    assert other.wait() == 0, other.output
    check_result(other.output)
    assert demo.name() != other.name()
    assert demo.process.poll() is None
    demo.interrupt()
    assert demo.wait() == 0, demo.output
    check_result(demo.output)
    assert not demo.left() and not other.left()


@pytest.mark.parametrize("line", ["dataplane demo: ", "starting the dataplane"])
def test_interrupted_in_its_start(start: Callable[..., Demo], line: str) -> None:
    demo = start()
    demo.await_line(line)
    demo.interrupt()
    assert demo.wait() in (0, 130), demo.output
    assert "Traceback" not in demo.output
    assert not demo.left()


@pytest.mark.parametrize("line", [
    pytest.param("attaching 4 consumers", marks=pytest.mark.stress), "  1 s  offered"])
def test_interrupted_later(start: Callable[..., Demo], line: str) -> None:
    """There is a ledger."""
    demo = start("--duration", "100")
    demo.await_line(line)
    demo.interrupt()
    assert demo.wait() == 0, demo.output
    assert "; balanced" in demo.output and "Traceback" not in demo.output
    assert not demo.left()


def test_killed(start: Callable[..., Demo]) -> None:
    """What it has started notices."""
    demo = start("--duration", "100")
    demo.await_line("  1 s  offered")
    demo.process.kill()
    demo.process.wait()
    deadline = time.monotonic() + 30
    while [one for one in demo.left() if "dataplane-demo-" not in one]:     # its own directory is left
        assert time.monotonic() < deadline, demo.left()
        time.sleep(0.05)


@pytest.mark.parametrize("make", [False, True])
def test_on_a_terminal(start: Callable[..., Demo], make: bool) -> None:
    """Tables, and Ctrl-C as the terminal sends it, which is no failure under make either."""
    ours, theirs = pty.openpty()
    try:
        demo = start("--duration", "100", terminal=theirs, prefix=("setsid", "--ctty", "--wait"), make=make,
                     environment={"TERM": "xterm", "COLUMNS": "80", "LINES": "24"})
        os.close(theirs)
        shown = read_until(ours, b"s left, Ctrl-C ends it", demo.process)
        shown += read_until(ours, b"telemetry 2", demo.process)
        os.write(ours, b"\x03")
        shown += read_until(ours, None, demo.process)
        assert demo.wait() == 0
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")
        assert "netif queue" in text and "packets/s" in text
        check_result(text)
        assert not demo.left()
    finally:
        os.close(ours)


def read_until(descriptor: int, text: bytes | None, process: subprocess.Popen[bytes]) -> bytes:
    """What comes until there was `text`, or (None) until there is no more."""
    data = b""
    while text is None or text not in data:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:         # EIO: nobody has the other end any more
            piece = b""
        if not piece:
            assert text is None, data.decode()
            break
        data += piece
    return data


@pytest.mark.stress
def test_on_one_core(start: Callable[..., Demo]) -> None:
    core = max(os.sched_getaffinity(0))
    demo = start("--duration", "1.5", prefix=("taskset", "-c", str(core)))
    assert demo.wait() == 0, demo.output
    assert f", 1 RX worker on core {core}" in demo.output
    check_result(demo.output)
    assert not demo.left()


def test_where_the_runtime_directory_is_not_ours(start: Callable[..., Demo], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("not a directory")
    demo = start("--duration", "1.5", environment={"DATAPLANE_RUNTIME_DIR": str(taken)})
    assert demo.wait() == 0, demo.output
    assert demo.name() != "quickstart"
    check_result(demo.output)
    assert not demo.left()


def test_without_the_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli_demo, "CONFIG", tmp_path / "configs" / "quickstart.toml")
    with pytest.raises(cli_demo.DataplaneError, match=r"quickstart\.toml is not there: .*source tree"):
        cli_demo.launch(tmp_path)


def test_the_configuration_made_for_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says what the file says, but for name and cores."""
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(cli_demo, "available_cores", lambda: (core,))
    monkeypatch.setenv("DATAPLANE_RUNTIME_DIR", "/dev/null/no")
    launched = cli_demo.launch(tmp_path)
    assert launched.config.parent == tmp_path and launched.cores == (core,) and launched.name != "quickstart"
    made = load(launched.config, kinds())
    text = cli_demo.CONFIG.read_text().replace("cores = [0, 1]", f"cores = [{core}]")
    text = text.replace('"quickstart.pcap"', f'"{ROOT / "configs" / "quickstart.pcap"}"')
    (tmp_path / "as_is.toml").write_text(text.replace('name = "quickstart"', f'name = "{launched.name}"'))
    assert made == load(tmp_path / "as_is.toml", kinds())
    assert os.environ["DATAPLANE_RUNTIME_DIR"] == str(tmp_path)
