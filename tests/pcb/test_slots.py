"""Free slots on their way from the queue to the lists, and back at a listener's end; deaths in between."""

from __future__ import annotations

import pytest

from dataplane.jit import kernel
from dataplane.pcb import slots
from dataplane.pcb.table import TCP, SocketSpec, Table
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena

BOTH = L.KEY_FAMILY4 | L.KEY_FAMILY6
SOCKETS, TIME_WAIT, WORKERS = 32, 8, 2


@kernel("i64(mem, i64, i64)")
def take(mem, w, most):
    return slots.slots_take(mem, w, most)


@pytest.fixture
def table() -> Table:
    arena = Arena(1 << 32)
    capacities = (SOCKETS, WORKERS, 1, 4, 64, TIME_WAIT)
    return Table(arena.mem, arena.map_anonymous(Table.size(*capacities)), *capacities)


def listener(table: Table, port: int = 80) -> int:
    return table.open(SocketSpec("listen", BOTH, TCP, port=port, backlog=8))


def offered(table: Table, pcb: int, count: int, worker: int = 0) -> list[int]:
    """So many new slots, in the worker's queue."""
    numbers = [table.add_slot(pcb, SocketSpec("connection", 0, TCP, place=4096, buffers=(4096, 8192)), worker)
               for _ in range(count)]
    assert all(table.offer(number) for number in numbers)
    return numbers


def listed(table: Table, pcb: int, worker: int = 0) -> list[int]:
    """The worker's list of the listener's slots."""
    found, following = [], table.get(table.slot_head(pcb, worker))
    while following > 0:
        found.append(following - 1)
        following = table.word(following - 1, L.PCB_NEXT)
        assert len(found) <= SOCKETS
    assert [table.word(number, L.PCB_DEPTH) for number in found] == list(range(len(found), 0, -1))
    return found


def test_each_slot_gets_into_its_listeners_list(table: Table) -> None:
    one, other = listener(table, 80), listener(table, 81)
    mine, others, far = offered(table, one, 3), offered(table, other, 2), offered(table, one, 2, worker=1)
    assert take(table.mem, table.worker(0), 4) == 4
    assert take(table.mem, table.worker(0), 4) == 1
    assert take(table.mem, table.worker(0), 4) == 0
    assert sorted(listed(table, one)) == mine and sorted(listed(table, other)) == others
    assert listed(table, one, worker=1) == []
    take(table.mem, table.worker(1), 9)
    assert sorted(listed(table, one, worker=1)) == far


def test_a_death_between_the_list_and_the_queue(table: Table) -> None:
    """The replacement finds the slot in both, and takes it once."""
    pcb = listener(table)
    first, second = offered(table, pcb, 2)
    table.put(table.slot_head(pcb, 0), first + 1)       # linked, and then it died
    table.put(table.pcb(first) + L.PCB_DEPTH, 1)
    assert take(table.mem, table.worker(0), 9) == 2
    assert listed(table, pcb) == [second, first]


def test_a_slot_that_is_in_use_is_not_linked(table: Table) -> None:
    """As before, and the replacement had already taken it out of the list when it came to the queue."""
    pcb = listener(table)
    first, second = offered(table, pcb, 2)
    table.put(table.pcb(first) + L.PCB_STATE, L.PCB_OPEN)
    take(table.mem, table.worker(0), 9)
    assert listed(table, pcb) == [second]
    table.put(table.pcb(first) + L.PCB_STATE, L.PCB_SLOT)       # its connection has ended
    assert table.offer(first)
    take(table.mem, table.worker(0), 9)
    assert listed(table, pcb) == [first, second]


def test_forgetting_empties_the_queue_first(table: Table) -> None:
    one, other = listener(table, 80), listener(table, 81)
    numbers, others = offered(table, one, 3), offered(table, other, 2)
    slots.forget(table.mem, table.worker(0), one)
    assert not table.forgotten(one)
    slots.forget(table.mem, table.worker(1), one)
    assert table.forgotten(one) and not table.forgotten(other)
    assert listed(table, one) == [] and sorted(listed(table, other)) == others
    assert all(table.is_spare(number) for number in numbers)
    for number in numbers:
        table.take_back(number)
    assert not any(table.is_spare(number) for number in numbers)
    table.free(one) if table.passed(table.close(one)) else pytest.fail("nobody reads")
    assert not table.forgotten(one) and listed(table, one) == []


def test_all_slots_fit_in_one_queue(table: Table) -> None:
    pcb = listener(table)
    for _ in range(5):
        numbers = offered(table, pcb, SOCKETS - 1)
        with pytest.raises(OSError):
            table.add_slot(pcb, SocketSpec("connection", 0, TCP), 0)
        slots.forget(table.mem, table.worker(0), pcb)
        table.put(table.slot_head(pcb, 0), 0)
        for number in numbers:
            table.take_back(number)
        assert table.room == SOCKETS - 1
