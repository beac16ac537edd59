"""The arena: places, neighbours, what is inherited and what is not, and what a mistake meets."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataplane.errors import DataplaneError
from dataplane.jit import kernel
from dataplane.shm.arena import HUGE, LARGEST, PAGE, Arena
from dataplane.shm.atomics import ld64, st64
from tests.children import Child

ROOT = Path(__file__).parents[2]


@kernel("i64(mem, i64, i64)")
def swap(mem, at, value):
    before = ld64(mem, at)
    st64(mem, at, value)
    return before


@pytest.fixture
def arena() -> Arena:
    return Arena(1 << 30)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, 3 * PAGE)
    os.pwrite(fd, b"from the file", 0)
    yield fd
    os.close(fd)


def in_child(action: Callable[[], object]) -> int:
    return Child(action).join()


def faults(arena: Arena, at: int) -> bool:
    return in_child(lambda: arena.mem[at]) == -signal.SIGSEGV


def test_the_largest_one_is_usable_from_a_kernel() -> None:
    arena = Arena()
    assert arena.mem.shape == (arena.size,) and arena.mem.dtype == np.uint8 and arena.size <= LARGEST
    last = arena.size - 3 * PAGE
    at = arena.map_anonymous(PAGE, at=last)
    assert at == last and swap(arena.mem, at, 5) == 0 and swap(arena.mem, at, 6) == 5


def test_zeros_then_what_was_written(arena: Arena) -> None:
    at = arena.map_anonymous(5000)
    assert at > 0 and at % PAGE == 0
    assert not arena.mem[at:at + 2 * PAGE].any()
    arena.mem[at + 4999] = 9
    assert arena.mem[at + 4999] == 9


def test_an_unmapped_slice_faults_and_is_given_out_again(arena: Arena) -> None:
    at = arena.map_anonymous(PAGE)
    arena.mem[at] = 1
    arena.unmap(at, PAGE)
    assert faults(arena, at)
    assert arena.map_anonymous(PAGE) == at
    assert arena.mem[at] == 0


def test_the_page_behind_a_slice_faults(arena: Arena) -> None:
    first, second = arena.map_anonymous(PAGE), arena.map_anonymous(PAGE)
    assert second >= first + 2 * PAGE
    assert faults(arena, first + PAGE)
    assert in_child(lambda: arena.mem.__setitem__(0, 1)) == -signal.SIGSEGV


def test_it_can_be_printed(arena: Arena) -> None:
    assert "uint8" in repr(arena.mem) and str(arena.mem) == "[0 0 0 ... 0 0 0]"


def test_large_slices_are_aligned_for_huge_pages(arena: Arena) -> None:
    arena.map_anonymous(PAGE)
    at = arena.map_anonymous(HUGE + 1)
    assert (arena.mem.ctypes.data + at) % HUGE == 0


def test_files(arena: Arena, file: int) -> None:
    shared, private = arena.map_fd(file, 3 * PAGE), arena.map_fd(file, PAGE, shared=False)
    readable = arena.map_fd(file, PAGE, writable=False)
    assert arena.mem[shared:shared + 13].tobytes() == b"from the file"
    arena.mem[private] = ord("F")
    assert os.pread(file, 4, 0) == b"from"
    arena.mem[shared] = ord("F")
    assert os.pread(file, 4, 0) == b"From" and arena.mem[readable] == ord("F")
    assert in_child(lambda: arena.mem.__setitem__(readable, 0)) == -signal.SIGSEGV


def test_a_failed_mapping_takes_no_place(arena: Arena, file: int) -> None:
    with pytest.raises(OSError):
        arena.map_fd(9999, PAGE)
    place = arena.reserve(PAGE)
    with pytest.raises(OSError):
        arena.map_fd(9999, PAGE, at=place)
    assert arena.map_fd(file, PAGE, at=place) == place
    assert arena.reserve(PAGE) == place + 2 * PAGE


def test_what_is_reserved_here_is_mapped_at_the_same_place_in_a_child(arena: Arena, file: int) -> None:
    place = arena.reserve(PAGE)
    assert faults(arena, place)

    def child() -> None:
        assert arena.map_fd(file, PAGE, at=place) == place
        arena.mem[place] = ord("C")

    assert in_child(child) == 0
    assert os.pread(file, 1, 0) == b"C" and faults(arena, place)


def test_what_a_child_places_is_never_where_its_parent_goes_on(arena: Arena) -> None:
    arena.map_anonymous(PAGE)
    reader, writer = os.pipe()

    def child() -> None:
        own = [arena.map_anonymous(PAGE), arena.map_anonymous(HUGE)]
        # What the parent does after the fork, and then tells us.
        for size, place in zip([PAGE, HUGE], _decode(reader), strict=True):
            assert arena.map_anonymous(size, at=place) == place
            arena.mem[place] = 1
        assert not any(arena.mem[at] for at in own)

    forked = Child(child)
    os.write(writer, np.array([arena.map_anonymous(PAGE), arena.map_anonymous(HUGE)]).tobytes())
    assert forked.join() == 0
    os.close(reader)
    os.close(writer)


def _decode(reader: int) -> list[int]:
    return [int(value) for value in np.frombuffer(os.read(reader, 16), np.int64)]


def test_shared_and_private_memory_after_a_fork(arena: Arena) -> None:
    shared, private = arena.map_anonymous(PAGE, shared=True), arena.map_anonymous(PAGE)

    def child() -> None:
        arena.mem[shared] = arena.mem[private] = 1

    assert in_child(child) == 0
    assert (arena.mem[shared], arena.mem[private]) == (1, 0)


def test_mistakes(arena: Arena, file: int) -> None:
    at = arena.map_anonymous(2 * PAGE)
    for action in (
        lambda: arena.map_fd(file, PAGE, at=at),                # something is there
        lambda: arena.map_fd(file, PAGE, at=at + PAGE),         # in the middle of something
        lambda: arena.map_fd(file, PAGE, at=at + 100),          # not on a page
        lambda: arena.map_fd(file, PAGE, at=0),
        lambda: arena.map_fd(file, PAGE, at=arena.size),
        lambda: arena.map_fd(file, 2 * PAGE, at=arena.reserve(PAGE)),
        lambda: arena.unmap(at + PAGE, PAGE),
        lambda: arena.unmap(at, PAGE),
        lambda: arena.map_anonymous(0),
    ):
        with pytest.raises(ValueError):
            action()
    with pytest.raises(DataplaneError, match="no room"):
        arena.map_anonymous(arena.size)


def test_the_array_keeps_the_memory(arena: Arena) -> None:
    at = arena.map_anonymous(PAGE)
    part = arena.mem[at:at + 8]
    del arena
    gc.collect()
    part[0] = 7
    assert part[0] == 7


def test_memory_is_given_back() -> None:
    def reserved() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmSize:")[1].split()[0]) << 10

    arena = Arena(1 << 40)
    assert reserved() >= 1 << 40
    del arena
    gc.collect()
    assert reserved() < 1 << 40


def test_a_limit_on_address_space_makes_it_smaller() -> None:
    program = (
        "import resource, sys\n"
        "from dataplane.shm.arena import Arena\n"
        "from dataplane.errors import DataplaneError\n"
        "for gib in (200, 32):\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (gib << 30, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        print(Arena().size >> 30)\n"
        "    except DataplaneError as error:\n"
        "        print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    first, second = run.stdout.splitlines()
    assert first == "128" and "ulimit -v" in second, run.stderr


class Places(RuleBasedStateMachine):
    """Slices come and go; no two overlap, each keeps its content, and the end is as the beginning."""

    @initialize()
    def begin(self) -> None:
        self.arena = Arena(1 << 24)
        self.slices: dict[int, tuple[int, int]] = {}
        self.count = 0

    @rule(size=st.integers(1, 20 * PAGE) | st.just(HUGE))
    def add(self, size: int) -> None:
        try:
            at = self.arena.map_anonymous(size)
        except DataplaneError:
            assert sum(size + 2 * PAGE for size, _ in self.slices.values()) > (1 << 24) // 3 - 3 * HUGE
            return
        self.count = self.count % 255 + 1
        self.slices[at] = (size, self.count)
        self.arena.mem[at:at + size] = self.count

    @precondition(lambda self: self.slices)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from(sorted(self.slices)))
        size, _ = self.slices.pop(at)
        self.arena.unmap(at, size)

    @invariant()
    def contents(self) -> None:
        for at, (size, value) in self.slices.items():
            assert self.arena.mem[at] == value == self.arena.mem[at + size - 1]

    def teardown(self) -> None:
        for at, (size, _) in self.slices.items():
            self.arena.unmap(at, size)
        assert self.arena._free._ranges == [(PAGE, (1 << 24) - PAGE)]


TestPlaces = Places.TestCase
TestPlaces.settings = settings(max_examples=30, stateful_step_count=30)
