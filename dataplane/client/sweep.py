"""The jitted loop around a user's jitted function: made for each function when it is first used.

A *sweep* goes over all lanes of a socket or a poller, takes what has gathered in each, and gives a lane's
memory back before it goes on to the next. The function is inlined, and what it does not read of a packet
is not read at all.

A lane's row is brought up to date before each call of the function: when that raises, the packets
so far (with the one at which it raised) can be released, and the others stay queued.

Called by `consume`, with the turn of the lanes.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from numba import njit
from numba.core.dispatcher import Dispatcher

from dataplane.client.drain import ROW_LANE, ROW_MASK, ROW_POSITION, ROW_TAKEN, payload_offset, release_row
from dataplane.client.fields import family_of, port_at, source_hi, source_lo, target_hi, target_lo
from dataplane.client.records import PacketInfo
from dataplane.jit import inlined
from dataplane.rings.lane import lane_peek, record_bytes
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64, pause, prefetch, st64, view

__all__ = ["CURSOR_CROWDED", "CURSOR_LANES", "CURSOR_WORDS", "sweep_for"]

CURSOR_AT, CURSOR_LANES, CURSOR_CROWDED = range(3)
"""What a sweep leaves behind: at which lane to go on, how many lanes had packets, how many were filled by a quarter."""
CURSOR_WORDS = 3

_PAD, _VLAN, _FRAME = L.RECORD_PAD << 24, L.RECORD_VLAN << 24, L.RECORD_FRAME << 24
_HEADS, _RECORDS = 16, 8        # lanes whose heads, and whose first records, are prefetched
_OPTIONS = ("fastmath", "boundscheck", "error_model")   # of the user's @njit that are kept

_sweeps: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def sweep_for(kernel: Any) -> Any:
    """The sweep around `kernel`, made once. TypeError unless that is jitted."""
    if not isinstance(kernel, Dispatcher):
        raise TypeError(f"consume needs a function made with @numba.njit, not {kernel!r}")
    with _making:
        if (sweep := _sweeps.get(kernel)) is None:
            options = {name: value for name, value in kernel.targetoptions.items() if name in _OPTIONS}
            function = njit(forceinline=True, nogil=True, **options)(kernel.py_func)
            sweep = _sweeps[kernel] = _make_sweep(function)
        return sweep


@inlined
def _ahead(i, by, size):
    """`i + by`, beginning again at the end."""
    i += by
    return i if i < size else i - size if i < 2 * size else 0


@inlined
def _prefetch(mem, ahead, soon):
    """Brings on the way the head of row `ahead`, and the packets of row `soon`, whose head has come. Only
    what has been published is followed: the place of the next record is the producer's to write."""
    prefetch(mem, ld64(mem, ahead + ROW_LANE) + L.LANE_HEAD)
    lane, position = ld64(mem, soon + ROW_LANE), ld64(mem, soon + ROW_POSITION)
    if lane_peek(mem, lane) != position:
        record = lane + L.LANE_DATA + (position & ld64(mem, soon + ROW_MASK))
        prefetch(mem, record)
        prefetch(mem, record + 64)


@inlined
def _info(mem, number, record, word, payload):
    packet = record + L.RECORD_DATA
    time_ns = ld64(mem, record + L.RECORD_TIME)
    if word & _FRAME:
        return PacketInfo(number, time_ns, 0, -1, 0, 0, 0, 0, 0, 0)
    return PacketInfo(
        number, time_ns, family_of(mem, packet), (word >> 48) & 0xFFFF if word & _VLAN else -1,
        port_at(mem, packet, payload, 8), port_at(mem, packet, payload, 6),
        source_hi(mem, packet), source_lo(mem, packet), target_hi(mem, packet), target_lo(mem, packet))


@inlined
def _open(mem, row, position):
    """The record at `position`: its place, its first word, and the position behind it, to which the row
    is brought up."""
    record = ld64(mem, row + ROW_LANE) + L.LANE_DATA + (position & ld64(mem, row + ROW_MASK))
    word = ld64(mem, record + L.RECORD_WORD)
    position += record_bytes(word & 0xFFFFFF)
    st64(mem, row + ROW_POSITION, position)
    if not word & _PAD:
        st64(mem, row + ROW_TAKEN, ld64(mem, row + ROW_TAKEN) + 1)
    return record, word, position


def _make_sweep(function: Any) -> Any:

    @njit(nogil=True, error_model="numpy")
    def sweep(mem, rows, numbers, cursor, budget, looks, state):
        """Goes over all lanes once from lane `cursor[CURSOR_AT]` on, until `budget` packets were handled; again, up to
        `looks` times, while nothing is there. How many were."""
        # A view owns nothing: passing `mem` itself on would count its references for each lane. For the
        # same reason this is one function: a call would do that with `state`.
        bare = view(mem, 0, mem.size)
        count = lanes = crowded = 0
        i = cursor[CURSOR_AT] if cursor[CURSOR_AT] < rows.size else 0
        for _ in range(looks):
            for _ in range(rows.size):
                _prefetch(bare, rows[_ahead(i, _HEADS, rows.size)], rows[_ahead(i, _RECORDS, rows.size)])
                row = rows[i]
                position, head = ld64(bare, row + ROW_POSITION), lane_peek(bare, ld64(bare, row + ROW_LANE))
                lanes += position != head
                crowded += (head - position) * 4 > ld64(bare, row + ROW_MASK)
                while position != head and count < budget:
                    record, word, position = _open(bare, row, position)
                    if word & _PAD:
                        continue
                    count += 1
                    offset = payload_offset(word)
                    payload = record + L.RECORD_DATA + offset
                    function(view(bare, payload, (word & 0xFFFFFF) - offset),
                             _info(bare, numbers[i], record, word, payload), state)
                release_row(bare, row)
                if count >= budget:
                    break
                i = _ahead(i, 1, rows.size)
            if count != 0:
                break
            pause()
        cursor[CURSOR_AT], cursor[CURSOR_LANES], cursor[CURSOR_CROWDED] = i, lanes, crowded
        return count

    return sweep
