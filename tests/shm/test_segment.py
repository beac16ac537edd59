"""Segments: all their memory at once or nothing at all, and a header that is checked."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.errors import LayoutMismatch, SegmentSpaceError
from dataplane.shm import layout as L
from dataplane.shm import segment
from dataplane.shm.arena import Arena
from dataplane.shm.segment import Segment, leftovers, segment_name
from tests.children import Child

ROOT = Path(__file__).parents[2]
UID = os.getuid()
DATAPLANE = f"segment-test-{os.getpid()}"
SIZE = 1 << 20


@pytest.fixture
def name() -> Iterator[str]:
    yield segment_name(UID, DATAPLANE, "table")
    for left in leftovers(UID, DATAPLANE):
        os.unlink("/dev/shm" + left)


@pytest.fixture(params=["named", "sealed"])
def made(request: pytest.FixtureRequest, name: str) -> Iterator[Segment]:
    if request.param == "named":
        made = Segment.create(name, SIZE, L.SEG_HOME)
    else:
        made = Segment.create_sealed(SIZE, L.SEG_HOME)
    yield made
    made.close()


def blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_all_memory_is_there_before_use(made: Segment) -> None:
    assert os.fstat(made.fd).st_size == made.size == SIZE
    assert blocks(made.fd) >= SIZE
    assert os.pread(made.fd, SIZE, L.SEG_HEADER) == bytes(SIZE - L.SEG_HEADER)
    assert not os.get_inheritable(made.fd)


def test_through_another_descriptor(made: Segment) -> None:
    other = Segment.from_fd(os.dup(made.fd))
    assert (other.size, other.kind, other.name) == (SIZE, L.SEG_HOME, None)
    arena = Arena(1 << 24)
    one, two = arena.map_fd(made.fd, made.size), arena.map_fd(other.fd, other.size)
    arena.mem[one + SIZE - 1] = 7
    assert arena.mem[two + SIZE - 1] == 7
    made.close()
    other.close()
    other.close()
    assert arena.mem[two + SIZE - 1] == 7       # mappings stay


def test_named(name: str) -> None:
    made = Segment.create(name, SIZE, L.SEG_TABLE, mode=0o640)
    status = os.fstat(made.fd)
    assert (status.st_mode & 0o7777, status.st_uid) == (0o640, UID)
    found = Segment.open(name)
    assert (found.name, found.size, found.kind) == (name, SIZE, L.SEG_TABLE)
    assert not os.get_inheritable(found.fd)
    with pytest.raises(FileExistsError):
        Segment.create(name, SIZE, L.SEG_TABLE)
    assert leftovers(UID, DATAPLANE) == [name]
    found.unlink()
    made.unlink()       # gone already: no error
    assert leftovers(UID, DATAPLANE) == []
    with pytest.raises(FileNotFoundError):
        Segment.open(name)
    made.close()
    found.close()


def test_a_sealed_one_cannot_be_resized_nor_unsealed() -> None:
    made = Segment.create_sealed(SIZE, L.SEG_RINGS)
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(made.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(made.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    made.unlink()       # has no name: nothing happens
    made.close()


@pytest.mark.root
def test_the_consumers_user_owns_it_and_may_open_it(name: str) -> None:
    made = Segment.create(name, SIZE, L.SEG_HOME, uid=65534)
    assert os.fstat(made.fd).st_uid == 65534
    made.close()


@pytest.mark.root
def test_another_user_may_not_open_it(name: str) -> None:
    Segment.create(name, SIZE, L.SEG_HOME).close()

    def open_it() -> None:
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(PermissionError):
            Segment.open(name)

    assert Child(open_it).join() == 0


def test_too_large_a_segment_is_refused_before_it_fills_the_memory(name: str) -> None:
    figures = os.statvfs("/dev/shm")
    size = figures.f_bavail * figures.f_frsize + (1 << 30)
    with pytest.raises(SegmentSpaceError) as caught:
        Segment.create(name, size, L.SEG_TABLE)
    assert caught.value.needed == size and 0 < caught.value.available < size
    assert leftovers(UID, DATAPLANE) == []
    with pytest.raises(SegmentSpaceError):
        Segment.create_sealed(1 << 60, L.SEG_TABLE)


def test_a_sparse_segment_has_no_memory_but_its_header() -> None:
    size = 1 << 28
    made = Segment.create_sealed(size, L.SEG_CONNECTIONS, sparse=True)
    found = os.fstat(made.fd)
    assert (made.size, found.st_size, found.st_blocks * 512) == (size, size, 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(made.fd, 2 * size)
    made.close()


def test_a_sparse_segment_is_not_larger_than_the_memory() -> None:
    with pytest.raises(OSError, match=f"{1 << 60} bytes are more than the \\d+ bytes of memory") as caught:
        Segment.create_sealed(1 << 60, L.SEG_CONNECTIONS, sparse=True)
    assert caught.value.errno == errno.ENOMEM


def test_memory_that_runs_out_on_the_way_is_the_same_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else took what statvfs had promised."""
    def allocate(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segment.os, "posix_fallocate", allocate)
    with pytest.raises(SegmentSpaceError, match=f"{SIZE} bytes"):
        Segment.create(name, SIZE, L.SEG_TABLE)
    assert leftovers(UID, DATAPLANE) == []
    with pytest.raises(SegmentSpaceError):
        Segment.create_sealed(SIZE, L.SEG_TABLE)


@pytest.mark.root
@pytest.mark.needs("unshare", "mount")
def test_a_small_dev_shm_is_an_error_that_leaves_nothing() -> None:
    program = (
        "import os\n"
        "from dataplane.errors import SegmentSpaceError\n"
        "from dataplane.shm.segment import Segment\n"
        "Segment.create('/dataplane.0.small.a', 600 << 10, 1)\n"
        "try:\n"
        "    Segment.create('/dataplane.0.small.b', 600 << 10, 1)\n"
        "except SegmentSpaceError as error:\n"
        "    print(error.needed, error.available, os.listdir('/dev/shm'))\n"
    )
    script = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$0" -c "$1"'
    run = subprocess.run(["unshare", "-m", "sh", "-c", script, sys.executable, program], cwd=ROOT,
                         capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == f"{600 << 10} {424 << 10} ['dataplane.0.small.a']", run.stderr


@pytest.mark.parametrize("at, value, message", [
    (L.SEG_MAGIC, 1, "not a segment"),
    (L.SEG_VERSION, 99, "layout version 99"),
    (L.SEG_FINGERPRINT, 1, "another build"),
    (L.SEG_BYTES, 2 * SIZE, "bytes where"),
])
def test_what_is_not_ours_is_refused(name: str, at: int, value: int, message: str) -> None:
    made = Segment.create(name, SIZE, L.SEG_TABLE)
    os.pwrite(made.fd, struct.pack("=q", value), at)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LayoutMismatch, match=message):
        Segment.open(name)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    made.close()


def test_an_empty_object_is_not_a_segment(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "empty", os.O_RDWR | os.O_CREAT)
    with pytest.raises(LayoutMismatch):
        Segment.from_fd(fd)
    with pytest.raises(OSError):
        os.fstat(fd)        # closed


def test_names() -> None:
    assert segment_name(1000, "edge.0", "home-3") == "/dataplane.1000.edge.0.home-3"
    for name, what in (("a/b", "table"), ("a", "b.c"), ("a", ""), ("", "table"), ("a", "x/y")):
        with pytest.raises(ValueError):
            segment_name(0, name, what)


def test_leftovers_are_of_exactly_this_dataplane() -> None:
    names = [segment_name(UID, dataplane, "table") for dataplane in (DATAPLANE, DATAPLANE + ".b")]
    made = [Segment.create(name, 4096, L.SEG_TABLE) for name in names]
    try:
        assert leftovers(UID, DATAPLANE) == names[:1]
        assert leftovers(UID, DATAPLANE + ".b") == names[1:]
        assert set(names) <= set(leftovers(UID)) and leftovers(UID + 1, DATAPLANE) == []
    finally:
        for one in made:
            one.unlink()
            one.close()


def test_a_segment_without_room_for_its_header(name: str) -> None:
    with pytest.raises(ValueError):
        Segment.create(name, 10, L.SEG_TABLE)
    assert leftovers(UID, DATAPLANE) == []
