"""Connections are run when they are due and come to their end, whatever stands in their slots."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from dataplane.inet import tcp_continue
from dataplane.kcont import area as K
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.epoch import advance
from tests.kcont.rig import OWNER, SECOND, Rig, now

GONE = T.REQ_CLOSED | T.REQ_SHUTDOWN


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.begin()
    yield made


def test_it_is_run_when_it_is_due_and_not_before(rig: Rig) -> None:
    number = rig.numbers[0]
    rig.open(number, 4000)
    deadline = now() + 30_000_000
    rig.schedule(number, deadline)
    rig.schedule(number, deadline + SECOND)         # never later
    assert rig.word(number, L.PCB_DUE) == deadline
    rig.run(lambda: rig.word(number, L.PCB_DUE) != deadline)
    assert now() >= deadline
    rig.schedule(number, now() + 10 * SECOND)
    rig.step()
    sooner = now() + 5_000_000
    rig.schedule(number, sooner)                    # earlier, though it waits in the wheel
    assert rig.word(number, L.PCB_DUE) == sooner
    rig.run(lambda: rig.word(number, L.PCB_DUE) != sooner, 5)
    assert rig.find(4000) == number and rig.state(number) == L.PCB_OPEN


def test_a_closed_connection_gives_its_slot_back(rig: Rig) -> None:
    number = rig.numbers[0]
    rig.open(number, 4000, T.CLOSED, GONE)
    rig.busy()
    rig.schedule(number)
    rig.run(lambda: rig.state(number) == L.PCB_CLOSING)
    assert rig.find(4000) == -1
    for _ in range(20):
        rig.step()
    assert rig.state(number) == L.PCB_CLOSING and rig.free_slots() == []     # a burst may still use it
    rig.idle()
    rig.run(lambda: rig.state(number) == L.PCB_SLOT)
    assert rig.free_slots() == [number] and rig.done() == []
    assert rig.word(number, L.PCB_DUE) == 0 == rig.word(number, L.PCB_RETURN)


def test_the_lanes_are_empty_then_and_what_was_in_them_counts_as_consumed(rig: Rig) -> None:
    number = rig.numbers[0]
    rig.open(number, 4000, T.CLOSED, GONE)
    rig.busy()
    rig.schedule(number)
    rig.run(lambda: rig.state(number) == L.PCB_CLOSING)
    state = rig.table.lane_state(number, 0)         # a burst that had found it stages a record still
    for word, value in ((L.LS_HEAD, 64), (L.LS_PUBLISHED, 64), (L.LS_COUNT, 1)):
        rig.put(state + word, value)
    rig.put(rig.get(state + L.LS_BASE) + L.LANE_HEAD, 64)
    rig.idle()
    rig.run(lambda: rig.state(number) == L.PCB_SLOT)
    assert rig.table.counters(number) | {"dropped": 0} == {
        "published": 1, "consumed": 1, "queued": 0, "queued_bytes": 0, "dropped": 0}


def test_without_its_listener_it_is_the_supervisors(rig: Rig) -> None:
    first, second = rig.numbers[:2]
    for number, port in ((first, 4000), (second, 4001)):
        rig.open(number, port, T.CLOSED, GONE)
    rig.table.orphan(first)                                 # opened by connect, or its listener is gone
    rig.put(rig.table.pcb(rig.listener) + L.PCB_STATE, L.PCB_CLOSING)       # ... or is about to go
    rig.schedule(first)
    rig.schedule(second)
    seen: list[int] = []
    rig.run(lambda: seen.extend(rig.done()) or len(seen) == 2)
    assert sorted(seen) == sorted([first, second]) and rig.free_slots() == []
    assert rig.state(first) == rig.state(second) == L.PCB_CLOSING


def test_who_has_not_closed_stays(rig: Rig) -> None:
    number = rig.numbers[0]
    rig.open(number, 4000, T.CLOSED)
    rig.schedule(number)
    rig.run(lambda: rig.word(number, L.PCB_DUE) == 0)
    assert rig.state(number) == L.PCB_OPEN and rig.find(4000) == number


def test_time_wait_is_taken_over_by_a_pcb_of_the_pool(rig: Rig) -> None:
    number = rig.numbers[0]
    rig.open(number, 4000, T.TIME_WAIT, GONE)
    rig.schedule(number)
    rig.run(lambda: rig.state(number) == L.PCB_SLOT)
    entry = rig.find(4000)
    assert entry >= rig.table.ordinary and rig.word(entry, L.PCB_KIND) == L.PK_TIME_WAIT
    assert rig.word(entry, L.PCB_TW_NUMBERS) == 5001 | 1001 << 32
    assert rig.free_slots() == [number]
    rig.open(number, 4001)                          # the slot is used, the entry lasts
    rig.put(rig.table.pcb(entry) + L.PCB_TW_UNTIL, now() + 1_300_000_000)   # an RX worker saw the FIN again
    rig.run(lambda: rig.find(4000) == -1)
    assert now() >= rig.word(entry, L.PCB_TW_UNTIL)
    rig.run(lambda: rig.state(entry) == L.PCB_FREE)
    assert rig.get(rig.k + K.K_POOL_COUNT) == 8


def test_when_the_pool_is_empty_the_oldest_goes(rig: Rig) -> None:
    number = rig.numbers[0]
    for port in range(4000, 4030):
        rig.open(number, port, T.TIME_WAIT, GONE)
        rig.schedule(number)
        rig.run(lambda: rig.state(number) == L.PCB_SLOT)
        rig.pop_all()
    left = [port for port in range(4000, 4030) if rig.find(port) >= 0]
    assert left == list(range(4030 - len(left), 4030)) and 4 <= len(left) <= 8


def test_an_rx_worker_may_take_the_entry(rig: Rig) -> None:
    first, second = rig.numbers[:2]
    rig.open(first, 4000, T.TIME_WAIT, GONE)
    rig.schedule(first)
    rig.run(lambda: rig.state(first) == L.PCB_SLOT)
    entry = rig.find(4000)
    rig.put(rig.table.pcb(entry) + L.PCB_STATE, L.PCB_CLOSING)      # claimed, and in the middle of replacing
    rig.put(rig.table.pcb(entry) + L.PCB_TW_UNTIL, now())
    rig.busy()
    for _ in range(20):
        rig.step()
    assert rig.find(4000) == entry                  # not touched while that burst lasts
    rig.idle()
    rig.run(lambda: rig.state(entry) == L.PCB_FREE, 5)
    assert rig.find(4000) == -1
    rig.open(second, 4000)
    assert rig.find(4000) == second


def test_a_lock_that_is_held_is_tried_again(rig: Rig) -> None:
    number = rig.numbers[0]
    rig.open(number, 4000, T.CLOSED, GONE)
    rig.put(rig.slot(number) + T.CONN_LOCK, 1 << 40 | OWNER)
    rig.schedule(number)
    end = now() + 50_000_000
    rig.run(lambda: now() > end)
    assert rig.state(number) == L.PCB_OPEN and rig.word(number, L.PCB_DUE) > 0
    rig.put(rig.slot(number) + T.CONN_LOCK, 0)
    rig.run(lambda: rig.state(number) == L.PCB_SLOT)


def test_an_abandoned_consumer(rig: Rig) -> None:
    for index, number in enumerate(rig.numbers[:3]):
        rig.open(number, 4000 + index)
    first, second, closed = rig.numbers[:3]
    rig.put(rig.slot(second) + T.CONN_LOCK, 1 << 40 | OWNER)        # it died in there
    rig.put(rig.slot(closed) + T.CONN_REQUEST, GONE)                # FIN_WAIT: it may go on
    assert tcp_continue.continue_abandon(rig.mem, rig.w, OWNER) == 3
    seen: list[int] = []
    rig.run(lambda: seen.extend(rig.done()) or len(seen) == 2)
    sent = dict(rig.sent())
    assert sorted(seen) == [first, second]
    assert sent[first] & T.RST and sent[second] & T.RST and sent[closed] & T.FIN and not sent[closed] & T.RST
    assert rig.find(4000) == rig.find(4001) == -1 and rig.find(4002) == closed
    rig.put(rig.get(rig.k + K.K_ORPHANS) + 8 * closed, now())       # it has lingered long enough
    rig.schedule(closed)
    rig.run(lambda: rig.done() == [closed], 5)
    assert dict(rig.sent())[closed] & T.RST and rig.free_slots() == []


def test_an_abandoned_connection_whose_lock_is_never_free(rig: Rig) -> None:
    number = rig.numbers[0]
    rig.open(number, 4000)
    rig.put(rig.slot(number) + T.CONN_LOCK, 12345)      # hostile: looks like some worker's
    tcp_continue.continue_abandon(rig.mem, rig.w, OWNER)
    start = now()
    rig.run(lambda: rig.done() == [number], 10)
    assert now() - start >= tcp_continue.FORCE_NS and rig.find(4000) == -1


def test_what_nobody_accepted_is_reset(rig: Rig) -> None:
    first, second = rig.numbers[:2]
    rig.open(first, 4000)
    rig.open(second, 4001)
    lane = rig.get(rig.table.lane_state(rig.listener, 0) + L.LS_BASE)
    records = [(first, rig.word(first, L.PCB_GENERATION)), (second, 99), (1 << 31, 0), (rig.listener, 1)]
    for index, (number, generation) in enumerate(records):
        record = lane + L.LANE_DATA + 80 * index
        rig.put(record, T.A_BYTES)
        rig.put(record + L.RECORD_DATA + T.A_PCB, number | generation << 32)
    rig.put(lane + L.LANE_HEAD, 80 * len(records))
    assert tcp_continue.continue_unlisten(rig.mem, rig.w, rig.listener) == 1
    rig.run(lambda: rig.done() == [first])
    assert rig.find(4001) == second


def test_a_hostile_slot_neither_crashes_nor_stalls(rig: Rig) -> None:
    """Anything in the slot, including its lanes; the others go on meanwhile."""
    rng = random.Random(1)
    bad, good = rig.numbers[:2]
    for turn in range(300):
        rig.open(bad, 4000)
        rig.open(good, 4001, T.CLOSED, GONE)
        conn = rig.slot(bad)
        if turn % 3:
            place = conn + rng.randrange(0, T.CONN_LANES, 8)
            for at in range(place, min(place + 512, conn + rig.bytes), 8):
                rig.put(at, rng.choice([0, 1, -1, 1 << 62, -1 << 63, rng.getrandbits(64), rng.getrandbits(16)]))
        else:
            rig.mem[conn + 8:conn + rig.bytes] = list(rng.randbytes(rig.bytes - 8))
        rig.schedule(bad)
        rig.schedule(good)
        rig.run(lambda: rig.state(good) == L.PCB_SLOT)
        tcp_continue.continue_abandon(rig.mem, rig.w, OWNER)
        rig.put(rig.get(rig.k + K.K_ORPHANS) + 8 * bad, 1)
        rig.put(conn + T.CONN_REQUEST, T.REQ_ABORT | GONE)
        rig.run(lambda: rig.state(bad) == L.PCB_CLOSING and rig.done() == [bad])
        rig.pop_all()
        rig.sent()


def test_a_full_transmit_lane_makes_them_wait(rig: Rig) -> None:
    number = rig.numbers[0]
    rig.open(number, 4000)
    tcp_continue.continue_abandon(rig.mem, rig.w, OWNER)
    lane = rig.home + L.HOME_TX
    rig.put(lane + L.LANE_TAIL, -65536 + 64)
    end = now() + 20_000_000
    rig.run(lambda: now() > end, taking=False)
    assert rig.state(number) == L.PCB_OPEN
    rig.put(lane + L.LANE_TAIL, 0)
    rig.run(lambda: rig.done() == [number])
    assert [flags & T.RST for _, flags in rig.sent()] == [T.RST]


def test_nothing_is_taken_apart_before_its_last_segment_was_sent(rig: Rig) -> None:
    first, second = rig.numbers[:2]
    rig.open(first, 4000)
    rig.open(second, 4001, T.CLOSED, GONE)
    tcp_continue.continue_abandon(rig.mem, rig.w, OWNER)
    rig.run(lambda: rig.done() == [second], taking=False)       # of which nothing is to be sent
    end = now() + 20_000_000
    rig.run(lambda: now() > end, taking=False)
    assert rig.state(first) == L.PCB_OPEN
    assert rig.sent() == [(first, T.RST | T.ACK)]
    rig.run(lambda: rig.done() == [first])


def test_a_full_queue_loses_nobody(rig: Rig) -> None:
    place = rig.table.offset
    number = rig.numbers[0]
    rig.open(number, 4000, T.CLOSED, GONE)
    queue = rig.get(place + L.T_KCONT)
    capacity = rig.get(queue + L.PCQ_CAPACITY)
    for other in range(capacity):                   # nobody takes from it
        rig.put(rig.table.pcb(rig.numbers[1]) + L.PCB_DUE, 0)
        rig.schedule(rig.numbers[1], now() + SECOND + other)
    assert not rig.get(place + L.T_KCONT_SWEEP)
    rig.schedule(number)
    assert rig.get(place + L.T_KCONT_SWEEP) == 1
    rig.run(lambda: rig.state(number) == L.PCB_SLOT)


def test_a_dead_workers_reservation_holds_nobody_up(rig: Rig) -> None:
    from dataplane.kcont.schedule import kcont_mourn

    number = rig.numbers[0]
    rig.open(number, 4000, T.CLOSED, GONE)
    queue = rig.get(rig.table.offset + L.T_KCONT)
    tail = rig.get(queue + L.PCQ_TAIL)
    slot = queue + L.PCQ_SLOTS + tail % rig.get(queue + L.PCQ_CAPACITY) * L.PCQ_SLOT_BYTES
    rig.put(slot, 77 << 34 | tail << 2 | L.PCQ_RESERVED)
    rig.schedule(number)
    rig.run(lambda: rig.state(number) == L.PCB_SLOT)        # stuck, so it sweeps
    assert kcont_mourn(rig.mem, rig.table.offset, 77) == 1
    rig.run(lambda: rig.get(queue + L.PCQ_TAIL) > tail)


@pytest.mark.parametrize("state", [T.CLOSED, T.TIME_WAIT])
def test_its_replacement_goes_on_from_each_state(rig: Rig, state: int) -> None:
    """One more continuation worker begins after each step of an end that is held up."""
    number = rig.numbers[0]
    rig.open(number, 4000, state, GONE)
    rig.begin()
    rig.busy()
    rig.run(lambda: rig.state(number) == L.PCB_CLOSING)
    entry = rig.find(4000)
    rig.begin()
    rig.step()
    assert rig.state(number) == L.PCB_CLOSING and rig.find(4000) == entry
    advance(rig.mem, rig.table.offset)
    rig.idle()
    rig.run(lambda: rig.state(number) == L.PCB_SLOT)
    assert rig.free_slots() == [number]
    rig.begin()
    assert rig.find(4000) == entry and rig.get(rig.k + K.K_POOL_COUNT) == 8 - (state == T.TIME_WAIT)
    # Killed between PCB_SLOT and the queue, or just behind it.
    rig.put(rig.table.pcb(number) + L.PCB_RETURN, 1)
    rig.begin()
    assert rig.free_slots() == [number] and rig.word(number, L.PCB_RETURN) == 0
    rig.pop_all()
    rig.put(rig.table.pcb(number) + L.PCB_RETURN, 1)
    rig.begin()
    assert rig.free_slots() == [number]
