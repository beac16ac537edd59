"""A consumer's address space: the segments that it was given, and its private words beside them.

One per attachment. Everything is in one arena, so that kernels see it through one array. What was
mapped stays mapped until the last array over it is gone, even when the attachment has ended: an
array that a user has kept shows old bytes, and never faults.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dataplane.control import messages
from dataplane.control.wire import take
from dataplane.errors import DataplaneError
from dataplane.shm.arena import Arena
from dataplane.shm.segment import Segment

__all__ = ["Memory"]

_SIZES = (1 << 40, 1 << 35, 1 << 32)
"""Address space that is asked for, until it is granted."""

_CHUNK = 1 << 16


class Memory:
    """`mem` is the array that kernels take, `bytes` the same as a memoryview. Not for threads: the
    session's lock is held around every call."""

    def __init__(self) -> None:
        self._arena = _arena()
        self.mem: npt.NDArray[np.uint8] = self._arena.mem
        self.bytes = self.mem.data
        self._segments: dict[int, tuple[int, int]] = {}
        self._free: dict[int, list[int]] = {}

    def map(self, segment: messages.Segment, descriptors: list[int]) -> int:
        """Maps a segment; its place. One without a name takes the next of `descriptors`.
        LayoutMismatch when another version of the package made it; OSError(EMFILE)."""
        opened = Segment.from_fd(take(descriptors)) if segment.name is None else _named(segment.name)
        try:
            place = self._arena.map_fd(opened.fd, opened.size)
        finally:
            opened.close()
        self._segments[segment.number] = (place, opened.size)
        return place

    def knows(self, number: int) -> bool:
        """Whether this segment was mapped."""
        return number in self._segments

    def place(self, number: int, offset: int, size: int) -> int:
        """Where `size` bytes at `offset` of segment `number` are."""
        place, whole = self._segments.get(number, (0, 0))
        if not 0 <= offset <= offset + size <= whole:
            raise DataplaneError(f"the dataplane named a slot outside of segment {number}")
        return place + offset

    def words(self, place: int, count: int = 1) -> npt.NDArray[np.int64]:
        """The int64 words there."""
        return self.mem[place:place + 8 * count].view(np.int64)

    def block(self, size: int) -> int:
        """Place of `size` zero bytes of private memory, on a cache line."""
        size = -(-size // 64) * 64
        free = self._free.setdefault(size, [])
        if not free:
            chunk = max(size, _CHUNK // size * size)
            start = self._arena.map_anonymous(chunk)
            free.extend(range(start + chunk - size, start - 1, -size))
        place = free.pop()
        self.mem[place:place + size] = 0
        return place

    def table(self, size: int) -> int:
        """Place of `size` zero bytes of private memory that cost nothing until they are touched. For ever."""
        return self._arena.map_anonymous(size)

    def give_back(self, place: int, size: int) -> None:
        """The block may be used again. Needs no lock."""
        self._free[-(-size // 64) * 64].append(place)


def _arena() -> Arena:
    for size in _SIZES[:-1]:
        try:
            return Arena(size)
        except DataplaneError:
            continue
    return Arena(_SIZES[-1])


def _named(name: str) -> Segment:
    try:
        return Segment.open(name)
    except FileNotFoundError:
        raise DataplaneError(
            f"shared memory {name} is not there: this process has another /dev/shm than the dataplane "
            "(a container?)") from None
