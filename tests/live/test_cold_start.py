"""Many processes start at once with an empty cache of kernels: one of them compiles, the others wait and load what it
has made; none fails, none gets something else, and everything is compiled once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dataplane_fixture import running

ROOT = Path(__file__).parents[2]
PROCESSES = 32
WATCHDOG = 900.0

KERNELS = """
from dataplane.jit import kernel, shared

def adder(constant):
    @shared
    def add(x):
        return x + constant
    return add

one, two = adder(1), adder(20)

@kernel("i64(i64)")
def first(x):
    return one(x) * 1000 + two(x)

@kernel("i64(i64)")
def second(x):
    return two(x) * 1000 + one(x)
"""

# Imported once, since 32 imports of numba take longer than all the rest; compiled and loaded in 32 processes.
START = """
import os, sys
import kernels
from dataplane import jit

reading, writing = os.pipe()
children = []
for number in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(writing)
            os.read(reading, 1)             # until the parent lets all go
            jit.warm([kernels], 2)
            right = (kernels.first(0), kernels.second(0)) == (1020, 20001)
            loaded = sum(sum(one.dispatcher.stats.cache_hits.values()) for one in jit._entries([kernels]))
            status = 0 if right else 2
            os.write(1, f"{loaded} ".encode())
        finally:
            os._exit(status)
    children.append(child)
os.close(writing)
failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
sys.exit(len(failed))
"""


@pytest.mark.timeout(300)
@pytest.mark.stress     # every day: eight processes, tests/test_jit.py
@pytest.mark.parametrize("rounds", [20])
def test_32_processes_share_an_empty_cache(tmp_path: Path, rounds: int) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    for number in range(rounds):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}",
                       "DATAPLANE_CACHE_DIR": str(tmp_path / f"cache{number}")}
        result = subprocess.run([sys.executable, "-c", START, str(PROCESSES)], env=environment, capture_output=True,
                                text=True, timeout=250)
        assert result.returncode == 0, result.stderr
        loaded = sorted(map(int, result.stdout.split()))
        assert loaded == [0, *[2] * (PROCESSES - 1)], loaded    # one has compiled both


# -- the real ones ----------------------------------------------------------------------------------------------------

CONFIG = """
[rx]
cores = [{core}]
[sockets]
max = 64
[[netif]]
kind = "synthetic"
local_ports = [5000, 5000]
rate = 1000
"""

ATTACH = """
import sys
import dataplane
with dataplane.attach(sys.argv[1]) as dp, dp.udp("0.0.0.0", 0) as sock:
    assert dp.stats()["name"] == sys.argv[1]
print("attached")
"""


@contextlib.contextmanager
def started(commands: list[list[str]], environment: dict[str, str],
            directory: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """All of them, at once. What one prints goes to files, so that nobody waits for us."""
    processes = []
    try:
        for number, command in enumerate(commands):
            with open(directory / f"{number}.out", "w") as out, open(directory / f"{number}.err", "w") as err:
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err, text=True))
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                process.wait()


def cold_round(directory: Path, number: int) -> None:
    """Half of the processes are dataplanes of their own, the others attach to one that runs already, whose kernels came
    from another cache."""
    core = min(os.sched_getaffinity(0))
    with running(CONFIG.format(core=core)) as target:
        environment = {**os.environ, "DATAPLANE_CACHE_DIR": str(directory / "cache")}
        commands = []
        for index in range(PROCESSES // 2):
            path = directory / f"{index}.toml"
            path.write_text(f'name = "cold-{os.getpid()}-{number}-{index}"\n{CONFIG.format(core=core)}')
            commands += [[sys.executable, "-m", "dataplane", "run", str(path), "--duration", "1",
                          "--ledger", str(directory / f"{index}.json")],
                         [sys.executable, "-c", ATTACH, target.name]]
        with started(commands, environment, directory) as processes:
            for index, process in enumerate(processes):
                code = process.wait(WATCHDOG)
                assert code == 0, f"{commands[index]}: {code}\n{(directory / f'{index}.err').read_text()}"
    for index in range(PROCESSES // 2):
        assert (directory / f"{2 * index}.out").read_text() == f"ready cold-{os.getpid()}-{number}-{index}\n"
        assert (directory / f"{2 * index + 1}.out").read_text() == "attached\n"
        assert json.loads((directory / f"{index}.json").read_text())["balanced"]


@pytest.mark.stress
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("rounds", [int(os.environ.get("DATAPLANE_COLD_ROUNDS", "20"))])
def test_32_cold_starts_of_the_real_thing(rounds: int) -> None:
    """16 dataplanes and 16 consumers, with the kernels that they really have."""
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="dpt-") as directory:
            cold_round(Path(directory), number)
            print(f"round {number + 1} of {rounds}: {PROCESSES} cold starts", flush=True)
