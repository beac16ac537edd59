"""Compiling in several processes: into one cache, from which one process loads what all have made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What `adder` makes has always the same name and the same arguments: only its number tells two apart.
KERNELS = """
from dataplane.jit import kernel, shared

def adder(constant):
    @shared
    def add(x):
        return x + constant
    return add

one, two, three = adder(1), adder(20), adder(300)

@kernel("i64(i64)")
def first(x):
    return one(x) * 1000 + two(x)

@kernel("i64(i64)")
def second(x):
    return two(x) * 1000 + three(x)

@kernel("i64(i64)")
def third(x):
    return three(x) * 1000 + one(x)
"""
EXPECTED = "1020 20300 300001"
CALL = "print(kernels.first(0), kernels.second(0), kernels.third(0))\n"
WARM = """
import os, signal, sys
import kernels
from dataplane import jit
jit._WORTH = 1
"""
DEATH = """
parent, compile_ = os.getpid(), jit.Kernel.compile
def dies(self):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return compile_(self)
jit.Kernel.compile = dies
"""
HITS = "print(sum(sum(one.dispatcher.stats.cache_hits.values()) for one in jit._entries([kernels])))\n"

pytestmark = pytest.mark.timeout(240)


class Place:
    """A folder with a module of kernels, and an empty cache."""

    def __init__(self, folder: Path) -> None:
        (folder / "kernels.py").write_text(KERNELS)
        ours = {"PYTHONPATH": f"{ROOT}:{folder}", "DATAPLANE_CACHE_DIR": str(folder / "cache")}
        self.environment = {**os.environ, **ours}

    def start(self, script: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", script], env=self.environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, script: str) -> list[str]:
        return ended(self.start(script))


def ended(process: subprocess.Popen[str]) -> list[str]:
    """What it has printed; it must have succeeded."""
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return output.splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_several_processes_compiled_works_in_one(place: Place) -> None:
    for name in ("third", "first", "second"):
        place.run(f"import kernels\nkernels.{name}.compile()\n")
    assert place.run(WARM + CALL + HITS) == [EXPECTED, "3"]


def test_children_share_the_work(place: Place) -> None:
    output = place.run(WARM + "assert jit.missing([kernels])\njit.warm([kernels], 3)\n"
                       "assert not jit.missing([kernels])\n" + CALL + HITS)
    assert output == [EXPECTED, "2"]        # the third is its own


def test_a_small_share_is_not_worth_a_process(place: Place) -> None:
    assert place.run(WARM + "jit._WORTH = 40\njit.warm([kernels], 3)\n" + CALL + HITS) == [EXPECTED, "0"]


def test_a_child_that_dies_leaves_its_share_to_the_parent(place: Place) -> None:
    assert place.run(WARM + DEATH + "jit.warm([kernels], 3)\n" + CALL + HITS) == [EXPECTED, "0"]


def test_all_start_at_once_on_an_empty_cache(place: Place) -> None:
    script = WARM + "print(flush=True)\nsys.stdin.readline()\njit.warm([kernels], 2)\n" + CALL
    processes = [subprocess.Popen([sys.executable, "-c", script], env=place.environment, text=True, bufsize=1,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for _ in range(8)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
    assert [ended(process) for process in processes] == [[EXPECTED]] * 8
