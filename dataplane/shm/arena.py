"""One reservation of address space, into which everything that a kernel touches is mapped.

Made once by every process that runs kernels: the supervisor (its RX workers inherit it over
`fork`, with everything that is mapped so far at the same offsets) and each consumer. `mem` is one
`uint8` array over all of it, so that jitted code sees one array and plain offsets: a new socket
changes no code and no signature.

The reservation is `PROT_NONE`: it costs page tables for what is mapped and nothing else, and a
stray access faults. So that an access beyond the end of a slice cannot reach its neighbour, a page
of it is left between any two. Offset 0 is never given out: kernels use it for "none".

The process that made the arena hands out slices from the bottom, a process forked from it from
the top: what the supervisor places after the fork and then tells its workers to map at the same
offset (`at=`) does not meet what a worker has placed for itself in the meantime.

Not for threads: the supervisor and the workers have one thread that maps.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from bisect import bisect_left
from typing import Any

import numpy as np
import numpy.typing as npt

from dataplane.errors import DataplaneError

__all__ = ["LARGEST", "SMALLEST", "Arena"]

LARGEST = 1 << 44
"""What is asked for first, bytes: 16 TiB, an eighth of what x86-64 gives a process."""

SMALLEST = 1 << 36
"""Below 64 GiB the arena gives up: a million sockets' lanes would not fit."""

PAGE = mmap.PAGESIZE
HUGE = 1 << 21
"""Slices of this size or more are aligned to it, so that the kernel can use huge pages."""

_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0
_NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int = -1) -> int:
    result = _libc.mmap(address, size, protection, flags, fd, 0)
    if result == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {size} bytes: {os.strerror(number)}")
    return int(result)


def _pages(size: int) -> int:
    if size <= 0:
        raise ValueError(f"size must be positive, not {size}")
    return -(-size // PAGE) * PAGE


class _Reservation:
    """The address range. Arrays made of it hold it as their base, so that it lives as long as any
    of them, whoever has dropped the arena."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = _mmap(None, size, _PROT_NONE, _NOTHING)
        # numpy's repr of a long array reads both ends, and debuggers, tracebacks with locals and failed
        # assertions call it: readable zeros there, or the message would be a crash.
        for edge in (0, size - PAGE):
            _mmap(self.address + edge, PAGE, mmap.PROT_READ, _NOTHING | _MAP_FIXED)

    @classmethod
    def largest(cls, size: int) -> _Reservation:
        """`size` bytes or, where that is refused (RLIMIT_AS), a half, a quarter, ..."""
        smallest = min(size, SMALLEST)
        while True:
            try:
                return cls(size)
            except OSError as error:
                if error.errno != errno.ENOMEM or size // 2 < smallest:
                    raise DataplaneError(
                        f"cannot reserve {size >> 30} GiB of address space (ulimit -v, or "
                        f"LimitAS of the service, is too low): {error.strerror}") from error
            size //= 2

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "shape": (self.size,), "data": (self.address, False)}

    def __del__(self) -> None:
        # Also after an __init__ that raised. Never run at interpreter exit on purpose: a thread
        # may still be in a kernel.
        if address := getattr(self, "address", 0):
            _libc.munmap(address, self.size)


class _FreeList:
    """Free ranges of the arena, sorted, neighbours merged."""

    def __init__(self, start: int, end: int) -> None:
        self._ranges = [(start, end)]

    def take(self, size: int, align: int, base: int, from_top: bool) -> int:
        """First fit from one end. `base + result` is a multiple of `align`."""
        for start, end in reversed(self._ranges) if from_top else self._ranges:
            if from_top:
                place = (base + end - size) // align * align - base
            else:
                place = -(-(base + start) // align) * align - base
            if start <= place and place + size <= end:
                self.claim(place, size)
                return place
        raise DataplaneError(f"the arena has no room for {size} bytes")

    def claim(self, place: int, size: int) -> None:
        """Takes exactly this range; ValueError unless all of it is free."""
        index = bisect_left(self._ranges, (place + 1, 0)) - 1
        start, end = self._ranges[index] if index >= 0 else (0, 0)
        if not start <= place <= place + size <= end:
            raise ValueError(f"offset {place:#x} is taken by something else")
        rest = [(start, place), (place + size, end)]
        self._ranges[index:index + 1] = [(a, b) for a, b in rest if a < b]

    def give(self, place: int, size: int) -> None:
        """The range is free again."""
        start, end = place, place + size
        index = bisect_left(self._ranges, (place, 0))
        if index < len(self._ranges) and self._ranges[index][0] == end:
            end = self._ranges.pop(index)[1]
        if index and self._ranges[index - 1][1] == start:
            start = self._ranges.pop(index - 1)[0]
            index -= 1
        self._ranges.insert(index, (start, end))


class Arena:
    """Address space of `size` bytes, or less where that is refused; see `size`.

    `mem` is all of it as `uint8[size]`. Touching what is not mapped ends the process (SIGSEGV).
    `repr(mem)` is safe.
    """

    def __init__(self, size: int = LARGEST) -> None:
        reservation = _Reservation.largest(_pages(size))
        self.size: int = reservation.size
        self.mem: npt.NDArray[np.uint8] = np.asarray(reservation)
        self._base = reservation.address
        self._maker = os.getpid()
        self._free = _FreeList(PAGE, self.size - PAGE)  # without the edges: offset 0 means "none"
        self._slices: dict[int, tuple[int, bool]] = {}  # offset: bytes without the guard, mapped?

    def reserve(self, size: int) -> int:
        """Offset of a slice with nothing in it yet. To be mapped later, here or, at the same
        offset, by processes that were forked from this one."""
        size = _pages(size)
        from_top = os.getpid() != self._maker
        place = self._free.take(size + PAGE, HUGE if size >= HUGE else PAGE, self._base, from_top)
        self._slices[place] = (size, False)
        return place

    def map_fd(self, fd: int, size: int, writable: bool = True, shared: bool = True,
               at: int | None = None) -> int:
        """Maps the first `size` bytes of `fd`; returns the offset. The descriptor may be closed.

        `at`: this offset instead of any: one from `reserve`, here or in the process that this one
        was forked from. ValueError if something else is there.
        """
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return self._map(size, protection, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE, fd, at)

    def map_anonymous(self, size: int, shared: bool = False, at: int | None = None) -> int:
        """Maps zeros; returns the offset. Not shared: a forked process has a copy of its own."""
        flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        return self._map(size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, at)

    def unmap(self, offset: int, size: int) -> None:
        """Makes the slice at `offset` inaccessible and reusable, whether it was mapped or only
        reserved. `size` is what it was made with (a check). Nobody may use it any more: the next
        one who maps may get the same offset."""
        slice_size, _ = self._slices.get(offset, (0, False))
        if slice_size != _pages(size):
            raise ValueError(f"no slice of {size} bytes at offset {offset:#x}")
        _mmap(self._base + offset, slice_size, _PROT_NONE, _NOTHING | _MAP_FIXED)
        del self._slices[offset]
        self._free.give(offset, slice_size + PAGE)

    def _map(self, size: int, protection: int, flags: int, fd: int, at: int | None) -> int:
        place = self.reserve(size) if at is None else self._claim(at, size)
        try:
            # MAP_FIXED replaces what is there: only ever our own PROT_NONE, as `_claim` checks.
            _mmap(self._base + place, _pages(size), protection, flags | _MAP_FIXED, fd)
        except OSError:
            if at is None:
                self.unmap(place, size)
            raise
        self._slices[place] = (self._slices[place][0], True)
        return place

    def _claim(self, at: int, size: int) -> int:
        """A reserved and still empty slice, or free space that becomes one."""
        size = _pages(size)
        if at % PAGE:
            raise ValueError(f"offset {at:#x} is not on a page")
        if at not in self._slices:
            self._free.claim(at, size + PAGE)
            self._slices[at] = (size, False)
        slice_size, mapped = self._slices[at]
        if mapped or size > slice_size:
            raise ValueError(f"offset {at:#x} is taken by something else")
        return at
