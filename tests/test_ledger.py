"""Reading the ledger: rows, sums, what a dead worker held."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from dataplane import ledger
from dataplane.ledger import Queue
from dataplane.shm import layout as L

QUEUES = [Queue(8192, "dp0", "tun", 0), Queue(8192 + L.N_BYTES, "dp0", "tun", 1),
          Queue(8192 + 2 * L.N_BYTES, "eth0", "af_packet", 0)]
TABLE, LANES, STATES = 0, 40960, 36864


@pytest.fixture
def mem() -> Any:
    return np.zeros(65536, np.uint8)


def put(mem: Any, place: int, value: int) -> None:
    mem[place:place + 8].view(np.int64)[0] = value


def fill(mem: Any, queue: Queue, offered: int, delivered: int, held: int = 0, **reasons: int) -> None:
    row = queue.place + L.N_LEDGER
    for word, value in ((L.L_OFFERED, offered), (L.L_DELIVERED, delivered), (L.L_DELIVERIES, 2 * delivered),
                        (L.L_HELD, held)):
        put(mem, row + word, value)
    for name, count in reasons.items():
        put(mem, row + L.L_REASONS + 8 * ledger.CODE[name], count)


def sockets(mem: Any, *lanes: tuple[int, int]) -> None:
    """One worker's lanes: (published, what the consumer says that it took)."""
    for word, value in ((L.T_WORKERS, 1), (L.T_SOCKETS, 8), (L.T_LANES, STATES)):
        put(mem, TABLE + word, value)
    for number, (published, consumed) in enumerate(lanes):
        state, lane = STATES + number * L.LS_BYTES, LANES + number * 512
        put(mem, state + L.LS_BASE, lane)
        put(mem, state + L.LS_COUNT, published)
        put(mem, lane + L.LANE_CONSUMED, consumed)


def test_codes_and_names_agree() -> None:
    assert len(ledger.REASONS) <= L.L_REASON_MAX
    assert all(getattr(ledger, name.upper()) == code for name, code in ledger.CODE.items())


def test_a_row(mem: Any) -> None:
    fill(mem, QUEUES[0], 100, 60, held=3, no_socket=30, pcq_full=5)
    row = ledger.read_row(mem, QUEUES[0].place)
    assert (row.offered, row.delivered, row.deliveries, row.held) == (100, 60, 120, 3)
    assert row.dropped == {"no_socket": 30, "pcq_full": 5} and row.in_hand == 2


def test_what_the_kernel_dropped_was_offered_too(mem: Any) -> None:
    fill(mem, QUEUES[0], 100, 100)
    put(mem, QUEUES[0].place + L.N_KERNEL_DROPPED, 7)
    row = ledger.read_row(mem, QUEUES[0].place)
    assert row.offered == 107 and row.dropped == {"kernel_dropped": 7} and row.in_hand == 0


def test_a_dead_workers_frames_are_written_off(mem: Any) -> None:
    fill(mem, QUEUES[0], 100, 60, held=3, no_socket=30)
    assert ledger.write_off(mem, QUEUES[0].place) == 10
    row = ledger.read_row(mem, QUEUES[0].place)
    assert row.dropped == {"no_socket": 30, "crash_lost": 10} and row.held == 0 and row.in_hand == 0
    assert ledger.write_off(mem, QUEUES[0].place) == 0


def test_unread_believes_no_consumer_that_lies(mem: Any) -> None:
    sockets(mem, (10, 4), (10, 10), (10, 1000), (10, -5))
    assert ledger.unread(mem, TABLE) == 6 + 0 + 0 + 10


def test_the_snapshot(mem: Any) -> None:
    sockets(mem, (100, 40), (20, 20))
    fill(mem, QUEUES[0], 70, 60, no_socket=10)
    fill(mem, QUEUES[1], 10, 5, not_ip=3, no_socket=2)
    fill(mem, QUEUES[2], 9, 0, no_socket=9)
    put(mem, QUEUES[1].place + L.N_STATUS, L.NS_ENDED)
    put(mem, QUEUES[2].place + L.N_TX_PACKETS, 5)
    told = ledger.snapshot(mem, TABLE, QUEUES, Counter(published=10, consumed=7, queued=3))
    assert {key: told[key] for key in ("offered", "delivered", "deliveries", "held", "balanced", "consumed",
                                       "unread", "tx_packets")} == {
        "offered": 89, "delivered": 65, "deliveries": 130, "held": 0, "balanced": True, "consumed": 67,
        "unread": 63, "tx_packets": 5}
    assert told["dropped"] == {"no_socket": 21, "not_ip": 3}
    assert told["deliveries"] == told["consumed"] + told["unread"]
    assert [(one["netif"], one["worker"], one["status"]) for one in told["queues"]] == [
        ("dp0", 0, "running"), ("dp0", 1, "ended"), ("eth0", 0, "running")]


def test_an_unfinished_burst_is_not_balanced(mem: Any) -> None:
    sockets(mem)
    fill(mem, QUEUES[0], 70, 60)
    told = ledger.snapshot(mem, TABLE, QUEUES, Counter())
    assert not told["balanced"]
    assert [one["balanced"] for one in told["queues"]] == [False, True, True]


def test_merged_by_netif(mem: Any) -> None:
    sockets(mem)
    fill(mem, QUEUES[0], 70, 60, no_socket=10)
    fill(mem, QUEUES[1], 10, 5, not_ip=5)
    fill(mem, QUEUES[2], 9, 0, no_socket=9)
    told = ledger.snapshot(mem, TABLE, QUEUES, Counter())
    short = ledger.merged(told)
    assert [(one["netif"], one["worker"], one["offered"], one["dropped"]) for one in short["queues"]] == [
        ("dp0", -1, 80, {"no_socket": 10, "not_ip": 5}), ("eth0", -1, 9, {"no_socket": 9})]
    assert {key: value for key, value in told.items() if key != "queues"} == {
        key: value for key, value in short.items() if key != "queues"}
