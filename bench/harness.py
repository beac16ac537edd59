"""What all benchmarks share: options, pinned processes, a running dataplane, C peers, the line that is printed.

A benchmark is a module with a function that measures once and returns a figure:

    def main() -> None:
        options = harness.parser(__doc__).parse_args()
        values = [measure(options) for _ in range(options.repeats)]
        harness.report("ring.items", "M/s", values, options)

    if __name__ == "__main__":
        harness.run(main)

It prints one line: for people, or with --json the same as JSON. What cannot be measured here (`Missing`: a peer that
is not installed, no root) is one line as well, with the command that helps.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.netns import Forked, Namespace

CORES = sorted(os.sched_getaffinity(0))
NATIVE = Path(__file__).parent / "native"


class Missing(Exception):
    """Something that is not here; the text is the command that installs it, or what is needed."""


# -- options and output ------------------------------------------------------------------------------------------


def parser(doc: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """With --repeats and --json; what else there is the benchmark adds."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--json", action="store_true", help="one line of JSON")
    return made


def report(bench: str, unit: str, values: list[float], options: argparse.Namespace, **more: Any) -> None:
    """Prints the figure: median, spread (largest minus smallest, as a part of the median), each value, and with what
    it was taken. `more`: other figures of the same runs."""
    median = statistics.median(values)
    spread = (max(values) - min(values)) / median if median else 0.0
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "repeats")}
    line = {"bench": bench, "unit": unit, "median": _round(median), "spread": round(spread, 3),
            "values": [_round(value) for value in values], **more, "settings": settings, "machine": machine(),
            "load": round(os.getloadavg()[0], 2)}
    if options.json:
        print(json.dumps(line), flush=True)
        return
    beside = " ".join(f"{name}={value}" for name, value in {**settings, **more}.items())
    print(f"{bench:24} {_round(median):>10} {unit} (spread {spread:.1%} of {len(values)}) {beside}", flush=True)


def run(main: Callable[[], None]) -> None:
    """Runs it; SIGTERM ends it as Ctrl-C does, so that nothing is left behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except Missing as missing:
        name = getattr(sys.modules["__main__"].__spec__, "name", None) or Path(sys.argv[0]).stem
        line = {"bench": name.removeprefix("bench."), "arguments": sys.argv[1:], "skipped": str(missing)}
        print(json.dumps(line) if "--json" in sys.argv else f"{line['bench']}: skipped: {missing}", flush=True)


def _round(value: float) -> float:
    """Four digits: more are never true."""
    return float(f"{value:.4g}")


def machine() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# -- processes ---------------------------------------------------------------------------------------------------


def pin(core: int) -> None:
    """This process, from here on, runs on that core alone."""
    os.sched_setaffinity(0, [core])


def fork(core: int, function: Callable[..., Any], *args: Any) -> Forked:
    """The function in a forked process that is pinned: `.result(timeout)`, `.kill()`."""
    return Forked(lambda: (pin(core), function(*args))[1])


def need_root() -> None:
    """For whoever makes interfaces."""
    if os.geteuid() != 0:
        raise Missing("it makes interfaces: run it as root")


class Running:
    """A dataplane that runs: its name, its process, its ledger once it has ended."""

    def __init__(self, name: str, process: subprocess.Popen[str], report: Path) -> None:
        self.name = name
        self.process = process
        self._report = report
        self._ledger: dict[str, Any] = {}

    def wait(self, timeout: float = 60) -> None:
        """Until it has ended by itself."""
        assert self.process.wait(timeout) == 0, "the dataplane failed"

    @property
    def ledger(self) -> dict[str, Any]:
        """As --ledger writes it, once the dataplane has ended."""
        self._ledger = self._ledger or json.loads(self._report.read_text())
        return self._ledger


_numbers = iter(range(1 << 30))


@contextlib.contextmanager
def running(config: str, namespace: Namespace | None = None) -> Iterator[Running]:
    """`dataplane run` with the configuration, whose `{name}` is replaced, until it is ready. Ended with the block if it
    has not ended by itself; then the ledger must balance and nothing be lost in a crash. The caller's environment
    points to it: `dataplane.attach(running.name)`."""
    name = f"bench-{os.getpid()}-{next(_numbers)}"
    before = os.environ.get("DATAPLANE_RUNTIME_DIR")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["DATAPLANE_RUNTIME_DIR"] = before or directory
        path, told = Path(directory, "config.toml"), Path(directory, "ledger.json")
        path.write_text(config.replace("{name}", name))
        command = [sys.executable, "-m", "dataplane", "run", str(path), "--ledger", str(told)]
        if namespace is not None:
            command = ["ip", "netns", "exec", namespace.name, *command]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None and process.stderr is not None
            if process.stdout.readline() != f"ready {name}\n":
                raise RuntimeError(f"the dataplane did not start: {process.stderr.read()}")
            made = Running(name, process, told)
            yield made
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                status = process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            finally:
                if before is None:
                    del os.environ["DATAPLANE_RUNTIME_DIR"]
        ledger = made.ledger
        assert status == 0 and ledger["balanced"] and "crash_lost" not in ledger["dropped"], ledger


# -- peers in C --------------------------------------------------------------------------------------------------


def native(name: str, packages: tuple[str, ...] = (), install: str = "apt-get install gcc pkg-config") -> Path:
    """bench/native/NAME.c as an executable for this machine, with what pkg-config says of `packages`. Built when the
    source or the compiler has changed. `Missing(install)` if that cannot be."""
    source = NATIVE / f"{name}.c"
    try:
        flags = shlex.split(_output("pkg-config", "--cflags", "--libs", *packages)) if packages else []
        # A distribution's flags may name the oldest processor that it runs on; the last word counts.
        flags = [flag for flag in flags if not flag.startswith("-march=")]
        compiler = _output("cc", "--version")
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise Missing(install) from None
    command = ["cc", "-O3", "-march=native", "-std=gnu11", "-Wall", "-Wextra", "-o"]
    sources = [path.read_text() for path in (source, *sorted(NATIVE.glob("*.h")))]
    key = hashlib.sha256("\0".join([*sources, compiler, *command, *flags, machine()]).encode()).hexdigest()
    target = Path(tempfile.gettempdir(), f"dataplane-bench-{os.getuid()}", f"{name}-{key[:16]}")
    if not target.exists():
        target.parent.mkdir(mode=0o700, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(made), str(source), *flags], check=True)
        made.rename(target)
    return target


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
