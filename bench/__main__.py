"""All benchmarks, one after the other; then docs/performance.md is written anew from what they found.

    python -m bench                                 everything: about a quarter of an hour, best as root
    python -m bench --only ring --only client       only these groups
    python -m bench --out FILE                      results there; default: bench/results/DATE-CPU.json
    python -m bench --list                          what it would run

Each figure comes from an executable of its own, with a time limit; a figure's peers follow right behind it. What is not
installed here is skipped, and the results say with which command it could be had. A failure is recorded, everything
else is run, and the exit status is 1. With --only the figures of other groups are taken over from FILE, if it is there.

Nothing else should run on the machine: each line of the results has the load of its time. The dataplane's kernels are
compiled before the first figure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import harness, report
from bench.suite import GROUPS, INVOCATIONS, Invocation

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("numba", "llvmlite", "numpy", "pyzmq", "faster-fifo", "pcapy-ng", "scapy", "iceoryx2")
LEAST_LIMIT = 120.0     # s
GRACE = 30.0            # s, for the removal of interfaces and shared memory


def facts() -> dict[str, Any]:
    """The machine and the versions."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
        versions["dpdk"] = _output("pkg-config", "--modversion", "libdpdk")
    with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
        versions["cc"] = _output("cc", "-dumpfullversion")
    return {"cpu": harness.machine(), "cores": len(harness.CORES), "virtual": "hypervisor" in _cpu_flags(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "kernel": platform.release(), "governor": _governor(), "python": platform.python_version(),
            "versions": versions, "root": os.geteuid() == 0}


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_flags() -> list[str]:
    return next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("flags")), [])


def _governor() -> str:
    with contextlib.suppress(OSError):
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    return "none visible"


def now() -> str:
    """To the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# -- one invocation ----------------------------------------------------------------------------------------------


def measure(invocation: Invocation) -> dict[str, Any]:
    """Its line, or what came instead: `skipped`, or `failed` with the end of what it said."""
    command = [sys.executable, "-m", *invocation.command]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, cwd=ROOT)
    try:
        out, err = process.communicate(timeout=max(LEAST_LIMIT, 5 * invocation.seconds))
        line = _line(out, err, process.returncode)
    except subprocess.TimeoutExpired:
        line = {"failed": f"not ready after {time.monotonic() - began:.0f} s"}
    finally:
        _end(process)
    arguments = " ".join(invocation.command)
    return {"key": invocation.key, "group": invocation.group, "text": invocation.text, "command": arguments,
            "took": round(time.monotonic() - began, 1), **line}


def _line(out: str, err: str, status: int) -> dict[str, Any]:
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if status == 0 and len(lines) == 1:
        return dict(json.loads(lines[0]))
    said = (err or out).strip().splitlines()
    return {"failed": f"status {status}, {len(lines)} figures", "said": said[-15:]}


def _end(process: subprocess.Popen[str]) -> None:
    """Ends it and what it has started, if it still runs: first so that it can clean up."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def told(line: dict[str, Any]) -> str:
    """For the terminal."""
    if "failed" in line:
        return "\n".join([f"FAILED: {line['failed']}", *(f"    {text}" for text in line.get("said", []))])
    if "skipped" in line:
        return f"skipped: {line['skipped']}"
    return f"{line['median']:>10g} {line['unit']} (spread {line['spread']:.1%}, load {line['load']})"


# -- all of them -------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(GROUPS), action="append", help="a group; may be given several times")
    parser.add_argument("--out", type=Path, help="the results' file")
    parser.add_argument("--list", action="store_true", help="only print what would be run")
    return parser.parse_args()


def default_file() -> Path:
    """bench/results/DATE-CPU.json."""
    words = re.sub(r"\(R\)|\(TM\)|@.*|CPU|Processor", " ", harness.machine())
    return RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}.json"


def taken_over(path: Path, chosen: list[Invocation]) -> list[dict[str, Any]]:
    """Lines of that file which are not measured again."""
    if not path.exists():
        return []
    again = {invocation.key for invocation in chosen}
    return [line for line in json.loads(path.read_text())["figures"] if line["key"] not in again]


def run(chosen: list[Invocation], path: Path, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measures, and writes the file behind each figure, so that nothing is lost by an interruption. The new lines."""
    results: dict[str, Any] = {"machine": facts(), "started": now(), "ended": None, "load": os.getloadavg()[0]}
    order = {invocation.key: i for i, invocation in enumerate(INVOCATIONS)}
    found: list[dict[str, Any]] = []
    for i, invocation in enumerate(chosen, 1):
        print(f"[{i:>3}/{len(chosen)}] {invocation.key:28} ", end="", flush=True)
        found.append(measure(invocation))
        print(told(found[-1]), flush=True)
        figures = sorted([*kept, *found], key=lambda line: order.get(line["key"], len(order)))
        _write(path, {**results, "ended": now(), "figures": figures})
    return found


def _write(path: Path, results: dict[str, Any]) -> None:
    """One figure in a line: a difference between two results can be read."""
    head = {name: value for name, value in results.items() if name != "figures"}
    lines = ",\n".join("  " + json.dumps(line, ensure_ascii=False) for line in results["figures"])
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}") + f',\n "figures": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(".new")
    made.write_text(text)
    made.rename(path)


def main() -> int:
    """The exit status."""
    options = arguments()
    chosen = [one for one in INVOCATIONS if not options.only or one.group in options.only]
    if options.list:
        print("\n".join(f"{one.key:28} python -m {' '.join(one.command)}" for one in chosen))
        return 0
    path = options.out or default_file()
    kept = taken_over(path, chosen) if options.only else []
    print(f"about {sum(one.seconds for one in chosen) / 60:.0f} minutes; results: {path}", flush=True)
    subprocess.run([sys.executable, "-m", "workers.kernels"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    found = run(chosen, path, kept)
    report.write(path)
    failed = [line["key"] for line in found if "failed" in line]
    skipped = [line["key"] for line in found if "skipped" in line]
    print(f"{len(found)} figures, {len(skipped)} skipped, {len(failed)} failed: {' '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
