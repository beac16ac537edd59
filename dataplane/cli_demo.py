"""The command `demo`: the quickstart's dataplane, four consumers, a live table, and the ledger at the end. Called
by `dataplane.cli`; what is shown is made in `cli_demo_view`.

The dataplane and the consumers are processes as a user would start them, each in a session of its own, so
that Ctrl-C reaches only this one, which ends them in order. Should it be killed, they are told by the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataplane.cli_demo_view import Moment, Screen, screen
from dataplane.cli_observe import sockets
from dataplane.config import available_cores
from dataplane.control.messages import Ledger, Stats
from dataplane.control.wire import Connection
from dataplane.errors import DataplaneError
from workers import leavings

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.toml"

RING = ["--ring-bytes", "262144"]       # a second or two of the quickstart, should the machine be busy
CONSUMERS = {
    "dns": ["count", "--udp", "53", "--dns", *RING],
    "telemetry 1": ["count", "--udp", "5000-5003", "--reuseport", *RING],
    "telemetry 2": ["count", "--udp", "5000-5003", "--reuseport", *RING],
    "tap": ["count", "--tap", *RING],
}

TICK = 0.1              # seconds between two looks at the processes
SAMPLE = 0.5            # between two looks at the dataplane
WINDOW = 2              # samples that a rate is over
START_SECONDS = 300.0   # the longest start, kernels compiled on a slow machine
END_SECONDS = 10.0      # the longest end; who has not ended then is killed
INTERRUPTED = 130
_PR_SET_PDEATHSIG = 1


def demo(duration: float) -> int:
    """Run it for `duration` seconds from when all consumers are attached; the exit code."""
    with own_terminal(), contextlib.ExitStack() as exits:
        show = Demo(exits, screen())
        try:
            show.start()
            show.watch(duration)
            return show.finish()
        except Interrupted:
            exits.close()
            print("stopped before it was ready; nothing is left")
            return INTERRUPTED


class Interrupted(Exception):
    """A signal during the start."""


@contextlib.contextmanager
def own_terminal() -> Iterator[None]:
    """Started by `make`, we share its process group, and Ctrl-C would make it fail, however well we end. So
    the terminal sends it to us alone, as a shell does for its jobs."""
    with contextlib.ExitStack() as exits:
        with contextlib.suppress(OSError):      # no terminal
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
            exits.callback(os.close, terminal)
            group = os.getpgrp()
            if group != os.getpid() and os.tcgetpgrp(terminal) == group:
                for number in (signal.SIGTTOU, signal.SIGTSTP):     # nobody would take us from the background
                    exits.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
                os.setpgid(0, 0)
                exits.callback(os.setpgid, 0, group)
                os.tcsetpgrp(terminal, os.getpid())
                exits.callback(os.tcsetpgrp, terminal, group)
        yield


# -- what is launched ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The configuration as it is, or one made from it for this machine, in `directory`."""

    config: Path
    name: str
    cores: tuple[int, ...]


def launch(directory: Path) -> Launch:
    """The quickstart, with a name of its own if another one runs, and on cores that there are."""
    if not CONFIG.is_file():
        raise DataplaneError(
            f"{CONFIG} is not there: the quickstart is in the source tree, not in the installed package. "
            "Install from a clone with `pip install -e .`, or use `make demo` there")
    settings = tomllib.loads(CONFIG.read_text())
    name, cores = _free_name(settings["name"], directory), _cores(settings["rx"]["cores"])
    if name == settings["name"] and list(cores) == settings["rx"]["cores"]:
        return Launch(CONFIG, name, cores)
    settings["name"], settings["rx"]["cores"] = name, list(cores)
    for netif in settings["netif"]:
        netif["path"] = str(CONFIG.parent / netif["path"])
    config = directory / CONFIG.name
    config.write_text("\n".join(_toml(settings)))
    return Launch(config, name, cores)


def _free_name(name: str, directory: Path) -> str:
    """`name`, unless it is in use, or the usual runtime directory is not ours: then `directory` takes its
    place. What a killed one has left goes."""
    try:
        with leavings.held(name, os.geteuid()):
            return name
    except leavings.Live:
        return f"{name}-{os.getpid()}"
    except DataplaneError:
        os.environ["DATAPLANE_RUNTIME_DIR"] = str(directory)
        return f"{name}-{os.getpid()}"


def _cores(wanted: Sequence[int]) -> tuple[int, ...]:
    """As many as wanted, or as there are."""
    mine = available_cores()
    return tuple(wanted) if set(wanted) <= set(mine) else mine[:len(wanted)]


def _toml(table: dict[str, Any], heading: str = "") -> Iterator[str]:
    """Lines of TOML: its plain values are written as JSON's are."""
    if heading:
        yield heading
    for key, value in table.items():
        if not isinstance(value, dict) and not (isinstance(value, list) and isinstance(value[0], dict)):
            yield f"{key} = {json.dumps(value)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _toml(value, f"[{key}]")
        elif isinstance(value, list) and isinstance(value[0], dict):
            for one in value:
                yield from _toml(one, f"[[{key}]]")


# -- processes -----------------------------------------------------------------------------------------------


class Child:
    """A process whose output is read line by line, without waiting."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", *arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_tie(os.getpid()))
        assert self._process.stdout is not None
        self.pipe = self._process.stdout
        os.set_blocking(self.pipe.fileno(), False)
        self._rest = b""
        self.said: list[str] = []

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.poll()

    def read(self) -> list[str]:
        """The lines that have come; all are in `said`."""
        while piece := self.pipe.read(65536):
            self._rest += piece
        *lines, self._rest = self._rest.split(b"\n")
        new = [line.decode(errors="replace") for line in lines]
        self.said += new
        return new

    def end(self, number: int = 0) -> None:
        """Send the signal, if there is one, and wait; kill it if that takes too long."""
        if number and self.code is None:
            self._process.send_signal(number)
        deadline = time.monotonic() + END_SECONDS
        while self.code is None:
            self.read()
            if time.monotonic() > deadline:
                self._process.kill()
            time.sleep(0.01)
        self.read()


def _tie(parent: int) -> Callable[[], None]:
    """For a child, before it becomes another program: its parent's death ends it, too."""
    libc = ctypes.CDLL(None)

    def tied() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return tied


# -- the show ------------------------------------------------------------------------------------------------


class Demo:
    """The dataplane and its consumers, from their start to their end. What it makes goes with `exits`."""

    def __init__(self, exits: contextlib.ExitStack, view: Screen) -> None:
        self._exits, self._view = exits, view
        self._signalled = False
        self._consumers: dict[str, Child] = {}
        self._reports: dict[str, dict[str, Any]] = {}
        self._moments: list[Moment] = []
        self._directory = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="dataplane-demo-")))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            exits.callback(signal.signal, number, signal.signal(number, self._interrupted))
        exits.enter_context(view)

    def _interrupted(self, *_: Any) -> None:
        self._signalled = True

    # -- start -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Until all consumers are attached. Interrupted before there is a dataplane; later, there is a ledger."""
        self._launch = launch(self._directory)
        self._exits.callback(self._clean, self._launch.name)
        self._view.begin(self._launch.name, self._launch.cores)
        arguments = ["run", str(self._launch.config), "--ledger", str(self._directory / "ledger.json")]
        self._dataplane = Child("dataplane", *arguments)
        self._exits.callback(self._dataplane.end, signal.SIGINT)
        self._await("starting the dataplane", self._ready)
        if self._signalled:
            raise Interrupted
        self._connection = self._exits.enter_context(Connection.open(self._launch.name))
        for label, arguments in CONSUMERS.items():
            child = Child("workers.consumers", *_with_name(arguments, self._launch.name), "--json", "--every", "0.5")
            self._consumers[label] = child
            self._exits.callback(child.end, signal.SIGTERM)
        self._await(f"attaching {len(CONSUMERS)} consumers", lambda: len(self._reports) == len(CONSUMERS))

    def _await(self, what: str, done: Callable[[], bool]) -> None:
        started = time.monotonic()
        while not done() and not self._signalled:
            seconds = time.monotonic() - started
            if seconds > START_SECONDS:
                raise DataplaneError(f"{what} took more than {START_SECONDS:.0f} s")
            self._view.waiting(what, "" if self._consumers else self._notice(), seconds)
            self._pump()

    def _ready(self) -> bool:
        return f"ready {self._launch.name}" in self._dataplane.said

    def _notice(self) -> str:
        """What the dataplane has said last, such as that it compiles its kernels."""
        return next((line for line in reversed(self._dataplane.said) if line and not line.startswith("ready ")), "")

    # -- the middle ------------------------------------------------------------------------------------------

    def watch(self, duration: float) -> None:
        """Show it, until it is time or somebody has had enough."""
        end = time.monotonic() + duration
        sample = time.monotonic()
        while (now := time.monotonic()) < end and not self._signalled:
            if now >= sample:
                self._look(end - now)
                sample += SAMPLE * (1 + (now - sample) // SAMPLE)
            self._pump(min(sample, end) - now)

    def _look(self, left: float) -> None:
        ledger, _ = self._connection.request(Stats(), Ledger)
        labels = {child.pid: label for label, child in self._consumers.items()}
        found = [(labels[one.pid], one) for one in sockets(self._connection) if one.pid in labels]
        found.sort(key=lambda item: [*CONSUMERS].index(item[0]))
        self._moments = [*self._moments[-WINDOW:], Moment(ledger.ledger, found, dict(self._reports))]
        self._view.show(self._moments[-1], self._moments[0], left)

    def _pump(self, timeout: float = TICK) -> None:
        """Hear what the processes say; none of them may end yet."""
        children = {"the dataplane": self._dataplane, **self._consumers}
        with selectors.DefaultSelector() as selector:
            for label, child in children.items():
                selector.register(child.pipe, selectors.EVENT_READ, label)
            for key, _ in selector.select(max(0.0, min(timeout, TICK))):
                self._hear(key.data, children[key.data])
        for label, child in children.items():
            if child.code is not None and not self._signalled:
                self._hear(label, child)
                raise _failure(label, child)

    def _hear(self, label: str, child: Child) -> None:
        child.read()
        if last := next((line for line in reversed(child.said) if line.startswith("{")), None):
            self._reports[label] = json.loads(last)

    # -- the end ---------------------------------------------------------------------------------------------

    def finish(self) -> int:
        """End all, show the ledger; the exit code: 1 if something was not as it should be."""
        self._connection.close()
        self._view.ending()
        self._dataplane.end(signal.SIGINT)
        attached = {label: child for label, child in self._consumers.items() if label in self._reports}
        for label, child in attached.items():
            child.end()             # it has seen the dataplane's end
            self._hear(label, child)
        self._view.end()
        for label, child in {"the dataplane": self._dataplane, **attached}.items():
            if child.code:
                raise _failure(label, child)
        ledger = json.loads((self._directory / "ledger.json").read_text())
        self._view.result({label: self._reports[label] for label in attached}, ledger)
        return 0 if ledger["balanced"] else 1

    def _clean(self, name: str) -> None:
        """What a dataplane that was killed in its start has left, once its workers have seen it die."""
        deadline = time.monotonic() + END_SECONDS
        while leavings.clean(os.geteuid(), name)[name] is None and time.monotonic() < deadline:
            time.sleep(0.05)


def _with_name(arguments: list[str], name: str) -> list[str]:
    """The dataplane's name comes behind the command."""
    return [arguments[0], name, *arguments[1:]]


def _failure(label: str, child: Child) -> DataplaneError:
    complaints = [line for line in child.said if not line.startswith(("{", "ready "))]
    return DataplaneError("\n".join([f"{label} ended with exit code {child.code}:", *complaints]))
