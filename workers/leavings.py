"""One dataplane of a name at a time, and what a killed one has left behind.

`NAME.lock` in the runtime directory is locked (flock) by the supervisor, and through inheritance by its
workers, as long as any of them lives; its content is the supervisor's pid. Who holds the lock may remove
everything of that name: the control socket, and shared-memory segments. The table segment is locked in the
same way (`claim`), since another runtime directory has another `NAME.lock` but the same shared memory. Called
by the supervisor and by `dataplane clean`.

A supervisor that was killed leaves its lock to its workers, which are about to end: whoever wants the name then
waits for them, for LEAVING seconds at most.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import psutil

from dataplane.control.paths import lock_path, runtime_directory, socket_path
from dataplane.errors import DataplaneError
from dataplane.shm.segment import leftovers

LEAVING = 2.0           # seconds that workers have to leave when their supervisor was killed
_AGAIN = 0.005          # seconds between two looks at whether they have

_CHOOSE = "DATAPLANE_RUNTIME_DIR chooses another one"


class Live(DataplaneError):
    """A dataplane of this name is running."""

    def __init__(self, name: str, pid: str) -> None:
        super().__init__(name, pid)
        self.name, self.pid = name, pid

    def __str__(self) -> str:
        who = f"pid {self.pid}" if self.pid else "with another runtime directory"
        return f"dataplane {self.name!r} is running already ({who})"


@contextlib.contextmanager
def held(name: str, uid: int) -> Iterator[list[str]]:
    """The name is ours; yields what was removed of a dead one's. Raises `Live` if it is somebody else's. Waits
    for the workers of one that was just killed.

    The lock file goes at the end. Forked children keep the lock until they have ended.
    """
    directory = runtime_directory()
    path = lock_path(directory, name)
    until = time.monotonic() + LEAVING
    fd = _lock(path, name, until)
    try:
        if _killed(_holder(fd)):
            _await_unclaimed(uid, name, until)
        removed = _remove(directory, name, uid)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield removed
    finally:
        path.unlink(missing_ok=True)    # before the lock goes: see `_lock`
        os.close(fd)
        with contextlib.suppress(OSError):      # not empty: others run
            directory.rmdir()


def claim(fd: int) -> None:
    """Mark a segment as a live dataplane's, until its supervisor and all workers have ended."""
    fcntl.flock(fd, fcntl.LOCK_EX)


def _claimed(segment: str) -> bool:
    try:
        fd = posix_ipc.SharedMemory(segment).fd
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def clean(uid: int, name: str | None = None) -> dict[str, list[str] | None]:
    """Remove what dead dataplanes of this user have left, of `name` or of all: what, by dataplane; None for
    one that is alive and was left alone."""
    result: dict[str, list[str] | None] = {}
    for one in [name] if name is not None else found(uid):
        try:
            with held(one, uid) as removed:
                result[one] = removed
        except Live:
            result[one] = None
    return result


def found(uid: int) -> list[str]:
    """Names of all dataplanes, dead or alive, of which there is something."""
    names = {segment.removeprefix(f"/dataplane.{uid}.").rpartition(".")[0] for segment in leftovers(uid)}
    with contextlib.suppress(OSError):
        names |= {path.stem for path in runtime_directory().iterdir() if path.suffix in (".sock", ".lock")}
    return sorted(names)


def _make(directory: Path) -> None:
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True)
            directory.chmod(0o755)      # whatever the umask: other users' consumers come by here
        status = directory.lstat()
    except OSError as error:
        raise DataplaneError(f"{directory}: {error.strerror}; {_CHOOSE}") from None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid in (os.geteuid(), 0)
    if not ours or not os.access(directory, os.W_OK):
        raise DataplaneError(f"{directory} is not ours to write in; {_CHOOSE}")


def _holder(fd: int) -> str:
    """What the lock file says: the pid of the supervisor that holds it, or held it last."""
    return os.pread(fd, 32, 0).decode(errors="replace").strip()


def _killed(pid: str) -> bool:
    """Whether that supervisor is dead, so that a lock that is still held is its workers'. One that ended by
    itself has removed its file."""
    if not pid.isdecimal():
        return False
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _await_unclaimed(uid: int, name: str, until: float) -> None:
    """A process that ends lets go of what it has locked one after the other: segments may follow the lock file."""
    while any(_claimed(segment) for segment in leftovers(uid, name)) and time.monotonic() < until:
        time.sleep(_AGAIN)


def _lock(path: Path, name: str, until: float) -> int:
    """The lock file, locked. One that its holder removed while we were about to lock it does not count."""
    while True:
        _make(path.parent)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:       # another one has just removed the directory behind itself
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BlockingIOError:
            pid = _holder(fd)
            if time.monotonic() >= until or not _killed(pid):
                os.close(fd)
                raise Live(name, pid) from None
            time.sleep(_AGAIN)
        os.close(fd)


def _remove(directory: Path, name: str, uid: int) -> list[str]:
    removed = []
    segments = leftovers(uid, name)
    if any(_claimed(segment) for segment in segments):
        raise Live(name, "")
    for segment in segments:
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(segment)
            removed.append(segment)
    path = socket_path(directory, name)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        removed.append(str(path))
    return removed
