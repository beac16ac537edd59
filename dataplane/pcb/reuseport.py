"""Reuseport groups: several sockets on one key, each flow whole on one of them.

Called by the table (Python side, one writer: the supervisor) and by RX workers (`select`).
A group is an indirection table as in RSS: 256 slots, each names a member's PCB; a flow's
symmetric hash picks the slot. When a member joins or leaves, only as many slots change hands as
must, each by one 32-bit store, so that all other flows stay where they were.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from dataplane.jit import inlined
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld32, ld64

__all__ = ["join", "leave", "select"]


@inlined
def select(mem, table, group, flow):
    """The member's PCB for a flow hash. `group` is PCB_GROUP, not 0."""
    place = ld64(mem, table + L.T_GROUPS) + (group - 1) * L.GROUP_BYTES
    return ld32(mem, place + L.GROUP_SLOTS + 4 * (flow & (L.GROUP_SIZE - 1)))


def _slots(mem: Any, group: int) -> Any:
    start = group + L.GROUP_SLOTS
    return mem[start:start + 4 * L.GROUP_SIZE].view("u4")


def _set_members(mem: Any, group: int, members: int) -> None:
    mem[group + L.GROUP_MEMBERS:group + L.GROUP_MEMBERS + 8].view("i8")[0] = members


def join(mem: Any, group: int, members: list[int], number: int) -> None:
    """Gives `number` its share of the slots of the group at offset `group`. `members` are the
    PCBs that share it already; none: it gets all slots."""
    slots = _slots(mem, group)
    if not members:
        slots[:] = number
    else:
        share = Counter(slots.tolist())
        for _ in range(L.GROUP_SIZE // (len(members) + 1)):
            richest = max(members, key=lambda member: share[member])
            slots[int((slots == richest).nonzero()[0][-1])] = number
            share[richest] -= 1
    _set_members(mem, group, len(members) + 1)


def leave(mem: Any, group: int, members: list[int], number: int) -> None:
    """Hands the slots of `number` to the remaining `members`, the poorest first."""
    slots = _slots(mem, group)
    share = Counter(dict.fromkeys(members, 0))
    share.update(slot for slot in slots.tolist() if slot != number)
    for place in (slots == number).nonzero()[0] if members else ():
        poorest = min(members, key=lambda member: share[member])
        slots[int(place)] = poorest
        share[poorest] += 1
    _set_members(mem, group, len(members))
