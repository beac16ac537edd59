"""A batch: packets where they lie in the ring, for as long as the batch is held.

Made by a socket's `recv_batch`; valid until `release` (or the end of its `with` block), when the ring
gets its memory back and the producer may write there. What describes the packets (offsets, lengths,
times) is the batch's own memory and stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dataplane.client import drain
from dataplane.client.fields import SOURCE, TARGET, endpoints
from dataplane.client.records import ENDPOINT
from dataplane.errors import DataplaneError
from dataplane.shm import layout as L

__all__ = ["Batch"]

Int64s = npt.NDArray[np.int64]


class Owner(Protocol):
    """The socket that the packets were taken from."""

    def give_back(self, batch: Batch) -> None:
        """The batch was released."""


class Batch:
    """Packets in a socket's ring. `len` and iteration are over payloads.

    After `release` everything but `len` raises DataplaneError. Views that were taken before: memoryviews
    raise ValueError, arrays show whatever is in the ring by then.
    """

    def __init__(self, owner: Owner, mem: npt.NDArray[np.uint8], place: tuple[int, int],
                 records: Int64s) -> None:
        self._owner, self._mem = owner, mem
        self._origin, self._size = place
        self._records = records
        self._views: list[memoryview] = []
        self.released = False
        """Whether the packets are gone."""

    # -- what is in it ---------------------------------------------------------------------------------

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The socket's ring, uint8: payload i is `data[offsets[i]:offsets[i] + lengths[i]]`."""
        self._check()
        return self._mem[self._origin:self._origin + self._size]

    @property
    def offsets(self) -> Int64s:
        """Where each payload begins in `data`, int64."""
        return self._column(drain.REC_OFFSET)

    @property
    def lengths(self) -> Int64s:
        """Bytes of each payload, int64."""
        return self._column(drain.REC_LENGTH)

    @property
    def timestamps_ns(self) -> Int64s:
        """When each was received: nanoseconds since the epoch, int64."""
        return self._column(drain.REC_TIME)

    @property
    def remote(self) -> npt.NDArray[np.void]:
        """Where each came from: `family`, `port`, `address` (see `records.ENDPOINT`)."""
        return self._endpoints(SOURCE)

    @property
    def local(self) -> npt.NDArray[np.void]:
        """Where each went to, likewise."""
        return self._endpoints(TARGET)

    @property
    def vlan(self) -> Int64s:
        """Tag control information of the outer VLAN tag, int64; -1 without one. A tap's frames have their
        tags within and -1 here."""
        word = self._column(drain.REC_WORD)
        return np.where(self._flag(word, L.RECORD_VLAN), (word >> 48) & 0xFFFF, -1)

    @property
    def wire_lengths(self) -> Int64s:
        """Bytes that each had on the wire, int64: for a tap's frames, which a capture may have cut. Else
        the length of the IP packet."""
        word = self._column(drain.REC_WORD)
        return np.where(self._flag(word, L.RECORD_FRAME), (word >> 32) & 0xFFFFFFFF, word & 0xFFFFFF)

    def __len__(self) -> int:
        return self._records.shape[1]

    def __iter__(self) -> Iterator[memoryview]:
        """The payloads as read-only memoryviews without a copy."""
        whole = memoryview(self.data.data).toreadonly()
        for start, length in zip(self.offsets.tolist(), self.lengths.tolist(), strict=True):
            self._check()
            view = whole[start:start + length]
            self._views.append(view)
            yield view

    # -- the end -----------------------------------------------------------------------------------------

    def release(self) -> None:
        """Gives the memory back to the ring. Only the first call does something."""
        if not self.released:
            self._owner.give_back(self)

    def invalidate(self) -> None:
        """For the owner: from now on every use is an error."""
        self.released = True
        for view in self._views:
            with contextlib.suppress(BufferError):      # an array was made of it
                view.release()
        self._views.clear()

    def __enter__(self) -> Batch:
        self._check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.release()

    def _check(self) -> None:
        if self.released:
            raise DataplaneError("this batch was released: its packets are gone")

    def _column(self, field: int) -> Int64s:
        self._check()
        return self._records[field]

    def _flag(self, word: Int64s, flag: int) -> npt.NDArray[np.bool_]:
        return (word >> 24) & flag != 0

    def _endpoints(self, side: int) -> npt.NDArray[np.void]:
        packets = self._column(drain.REC_PACKET)
        word = self._column(drain.REC_WORD)
        found = np.zeros(len(self), ENDPOINT)
        if len(self) and not self._flag(word[:1], L.RECORD_FRAME)[0]:
            raw = found.view(np.uint8)
            endpoints(self._mem, packets, self.offsets, self._origin, side, raw)
        return found
