"""Shared-memory objects: creation with all their space, header, check on attach, removal.

The supervisor creates the table segment and the owner segments; consumers open the owner segments
that the control socket names to them or sends to them. Nothing here maps: see `arena`.

Two backings. A *named* one is a POSIX shared-memory object, `/dataplane.<uid>.<dataplane>.<what>`.
Whoever owns it can truncate it under the feet of a worker (SIGBUS), so it is for consumers of the
dataplane's own uid. A *sealed* one is an anonymous file that travels over the control socket, which
nobody can shrink or grow; it also lives outside `/dev/shm`, which is 64 MB in most containers.

All space is allocated before anybody maps the segment: a `/dev/shm` that is too small is an error
now, never a SIGBUS later. The header is written last.

A sealed segment may be *sparse* instead: its pages get memory when they are first written. That is for slots of TCP
connections, of which there are as many as may come at once, each with buffers for the fastest peer. No limit of
/dev/shm applies to it; what is asked for is compared with the system's available memory, once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import posix_ipc
import psutil

from dataplane.errors import LayoutMismatch, SegmentSpaceError
from dataplane.shm import layout as L

__all__ = ["Segment", "leftovers", "segment_name"]

SHM = "/dev/shm"
"""Where Linux keeps POSIX shared-memory objects; only `leftovers` and `statvfs` look there."""

_HEADER = struct.Struct("=8q")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
assert _HEADER.size == L.SEG_HEADER and L.SEG_KIND == 4 * 8


def segment_name(uid: int, name: str, what: str) -> str:
    """Name of the object `what` of the dataplane `name` that runs as `uid`.

    `what` has no dot (ValueError), since a dataplane's name may have some: what stands behind the
    last dot is not of the name, and `a`'s objects are never taken for `a.b`'s.
    """
    if not name or "/" in name or not re.fullmatch(r"[^./\0]+", what):
        raise ValueError(f"not a segment name: {name!r}, {what!r}")
    return f"/dataplane.{uid}.{name}.{what}"


def leftovers(uid: int, name: str | None = None) -> list[str]:
    """Names of the objects of the dataplane `name` (None: of all of them) that ran as `uid`.

    Of a live dataplane too: whether one still runs is for the caller to find out.
    """
    try:
        entries = os.listdir(SHM)
    except FileNotFoundError:
        return []
    found = (re.fullmatch(r"dataplane\.(\d+)\.(.+)\.[^.]+", entry) for entry in entries)
    return sorted("/" + match[0] for match in found
                  if match and match[1] == str(uid) and name in (None, match[2]))


class Segment:
    """A shared-memory object with its header: `fd`, `size` in bytes, `kind` (`layout.SEG_TABLE`, ...)
    and `name`, which is None for a sealed one. Made by `create`, `create_sealed`, `open`, `from_fd`.

    `close` and `unlink` may be called more than once. Mappings outlive both.
    """

    def __init__(self, fd: int, size: int, kind: int, name: str | None) -> None:
        self.fd, self.size, self.kind, self.name = fd, size, kind, name

    @classmethod
    def create(cls, name: str, size: int, kind: int, mode: int = 0o600, uid: int | None = None) -> Segment:
        """A new named object of `size` bytes, zero but for its header, owned by `uid` if given.

        SegmentSpaceError when `/dev/shm` is too small, FileExistsError when the name is taken;
        either way nothing is left behind.
        """
        with _standard_errors(name, errno.EEXIST):
            fd = int(posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=mode).fd)
        try:
            os.fchmod(fd, mode)     # whatever the umask
            _allocate(fd, name, size, _room_in_shm())
            _write_header(fd, size, kind)
            if uid is not None:
                os.fchown(fd, uid, -1)
        except BaseException:
            os.close(fd)
            posix_ipc.unlink_shared_memory(name)
            raise
        return cls(fd, size, kind, name)

    @classmethod
    def create_sealed(cls, size: int, kind: int, sparse: bool = False) -> Segment:
        """A new anonymous object whose size is final: what a consumer of another uid gets. `sparse`: without
        its memory; OSError(ENOMEM) if that is more than the system has available."""
        available = psutil.virtual_memory().available
        if sparse and size > available:
            raise OSError(errno.ENOMEM, f"{size} bytes are more than the {available} bytes of memory that are "
                                        "available (MemAvailable in /proc/meminfo)")
        fd = os.memfd_create("dataplane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            if sparse:
                os.ftruncate(fd, size)
            else:
                _allocate(fd, "(anonymous)", size, available)
            _write_header(fd, size, kind)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size, kind, None)

    @classmethod
    def open(cls, name: str) -> Segment:
        """An existing named object. FileNotFoundError, PermissionError; LayoutMismatch as `from_fd`."""
        with _standard_errors(name, errno.ENOENT):
            fd = int(posix_ipc.SharedMemory(name).fd)
        return cls.from_fd(fd, name)

    @classmethod
    def from_fd(cls, fd: int, name: str | None = None) -> Segment:
        """The segment behind a descriptor, which is the segment's from now on (and is closed when
        this raises). LayoutMismatch unless magic, version, fingerprint and size are right."""
        try:
            os.set_inheritable(fd, False)
            size, kind = _check_header(fd, name or "(anonymous)")
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size, kind, name)

    def close(self) -> None:
        """Closes the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def unlink(self) -> None:
        """Removes the name, if there is one and it is still there."""
        if self.name is not None:
            with suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(self.name)


def _room_in_shm() -> int:
    figures = os.statvfs(SHM)
    return figures.f_bavail * figures.f_frsize


def _allocate(fd: int, name: str, size: int, available: int) -> None:
    """Gives the file `size` bytes of real memory."""
    if size < L.SEG_HEADER:
        raise ValueError(f"a segment of {size} bytes has no room for its header")
    # Asked first: an allocation that cannot succeed would fill all of the memory on its way,
    # and in a container with a limit might be answered with a kill.
    if size > available:
        raise SegmentSpaceError(name, size, available)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise SegmentSpaceError(name, size, available) from error
        raise


def _write_header(fd: int, size: int, kind: int) -> None:
    os.pwrite(fd, _HEADER.pack(L.MAGIC, L.LAYOUT_VERSION, L.fingerprint(), size, kind, 0, 0, 0), 0)


def _check_header(fd: int, name: str) -> tuple[int, int]:
    """Size and kind of the segment."""
    header = os.pread(fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0")
    magic, version, fingerprint, size, kind, *_ = _HEADER.unpack(header)
    if magic != L.MAGIC:
        raise LayoutMismatch(f"{name} is not a segment of a dataplane")
    if version != L.LAYOUT_VERSION:
        raise LayoutMismatch(f"{name} has layout version {version}, this program has {L.LAYOUT_VERSION}")
    if fingerprint != L.fingerprint():
        raise LayoutMismatch(f"{name} was made by another build of dataplane: its layout differs")
    if size != (found := os.fstat(fd).st_size):
        raise LayoutMismatch(f"{name} has {found} bytes where its header says {size}")
    return size, kind


@contextmanager
def _standard_errors(name: str, existential: int) -> Iterator[None]:
    """posix_ipc's own exceptions, which are no OSError, as what everybody else raises.
    `existential`: its ExistentialError is both "exists" and "does not"; the errno says which."""
    try:
        yield
    except posix_ipc.ExistentialError as error:
        raise OSError(existential, os.strerror(existential), name) from error
    except posix_ipc.PermissionsError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name) from error
    except OSError as error:
        if error.errno is None:     # how it says that there are no descriptors: this process's, or the system's
            number = errno.EMFILE if "process" in str(error) else errno.ENFILE
            raise OSError(number, os.strerror(number), name) from error
        raise
