"""A long run: one dataplane as fast as it goes, with consumers that stay and consumers that come and go. At the end the
ledger is exact, whoever stayed has every packet in its order with every byte, and no process has grown.

The long one's count is 10^10, a day's traffic of 115,000 packets a second; DATAPLANE_SOAK_PACKETS sets another one.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numba import njit

import dataplane
from dataplane.netif import synthetic
from tests.dataplane_fixture import Running, running
from tests.live.tcp_bed import CORES, pipe, wait_for
from tests.netns import Forked

pytestmark = [pytest.mark.live, pytest.mark.timeout(4 * 3600)]

PORT, PORTS, STAYING = 5000, 8, 4       # the first four ports have sockets all the time
FLOWS, SIZE, SEED = 64, 60, 1
SHARE = FLOWS // PORTS                  # flows of each port
WATCHDOG = 60.0
WARM = 8                                # rounds of coming and going after which nothing grows any more
GROWTH = 8 << 20                        # bytes of private memory that a process may have more than then
COUNTS = [10_000_000, pytest.param(int(os.environ.get("DATAPLANE_SOAK_PACKETS", 10**10)), marks=pytest.mark.stress)]

TAKEN, WRONG, ORDER, SUMS = 0, 1, 2, 2 + SHARE      # columns of a socket's row


def config(count: int) -> str:
    """Who is too slow is waited for: nothing is lost but what nobody has opened a socket for."""
    return f"""
[rx]
cores = {CORES[:1]}
[sockets]
max = 256
[[netif]]
kind = "synthetic"
flows = {FLOWS}
local_ports = [{PORT}, {PORT + PORTS - 1}]
size = {SIZE}
seed = {SEED}
count = {count}
backpressure = true
start = {STAYING}
"""


def expected() -> Any:
    """For each socket that stays: its flows in their order, and the sums of their payloads' bytes."""
    rows = np.zeros((STAYING, 2 + 2 * SHARE), np.int64)
    flows = np.arange(FLOWS, dtype=np.int64)
    ports = synthetic.local_ports(flows, (PORT, PORT + PORTS - 1))
    rest = sum(synthetic.pattern(SIZE, SEED))
    for index in range(STAYING):
        rows[index, ORDER:SUMS] = flows[ports == PORT + index]
        rows[index, SUMS:] = rows[index, ORDER:SUMS] + rest     # one byte is enough for so few flows' numbers
    return rows


@njit
def check(payload: Any, info: Any, rows: Any) -> None:
    row = rows[info.socket]
    turn = row[TAKEN] % SHARE
    total = 0
    for byte in payload:
        total += byte
    if payload[3] != row[ORDER + turn] or total != row[SUMS + turn] or payload.size != SIZE - 28:
        row[WRONG] += 1
    row[TAKEN] += 1


@njit
def count_all(payload: Any, info: Any, state: Any) -> None:
    state[0] += 1


def stay(name: str, count: int, ready: int) -> list[list[int]]:
    """Takes `count` packets from each of its sockets: how many, and how many were wrong."""
    rows = expected()
    with dataplane.attach(name) as dp:
        socks = [dp.udp("0.0.0.0", PORT + index) for index in range(STAYING)]
        with dp.poller(socks) as poller:
            os.write(ready, b"x")
            while (left := STAYING * count - int(rows[:, TAKEN].sum())) > 0:
                assert poller.consume(check, rows, max_packets=left, timeout=WATCHDOG), "no more packets"
    return [[int(row[TAKEN]), int(row[WRONG])] for row in rows]


def come_and_go(name: str, turn: int, state: Any) -> None:
    """Attaches, opens sockets, takes some packets, closes one socket, and leaves the others to the detachment."""
    with dataplane.attach(name) as dp:
        first = dp.udp("0.0.0.0", PORT + STAYING + turn % STAYING, ring_bytes=4096 << turn % 6)
        others = [dp.udp("0.0.0.0", 6000 + index, reuseport=True) for index in range(turn % 5)]
        with dp.poller([first, *others]) as poller:
            poller.consume(count_all, state, max_packets=2000, timeout=WATCHDOG)
        first.close()
        raw = dp.raw(200)
        raw.close()


# -- what must not grow ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """Of one process: bytes of memory that is its own, mappings, descriptors."""

    memory: int
    mappings: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """As it is now."""
        memory = psutil.Process(pid).memory_info()
        mappings = len(Path(f"/proc/{pid}/maps").read_text().splitlines())
        return cls(memory.rss - memory.shared, mappings, len(os.listdir(f"/proc/{pid}/fd")))


def footprints(process: Running, dp: dataplane.Dataplane) -> dict[str, Footprint]:
    """Of the dataplane's processes."""
    told = dp.stats()
    pids = {"supervisor": process.pid, "continuation": told["continuation"]["pid"]}
    pids |= {f"worker {worker['worker']}": worker["pid"] for worker in told["workers"]}
    assert not any(worker["restarts"] for worker in told["workers"])
    return {who: Footprint.of(pid) for who, pid in pids.items()}


def compare(before: dict[str, Footprint], now: dict[str, Footprint]) -> None:
    """Nobody has grown. What a consumer that has just left had is given back a moment later: some are allowed for."""
    for who, one in now.items():
        was = before[who]
        assert one.memory - was.memory < GROWTH, (who, was, one)
        assert one.mappings <= was.mappings + 32 and one.descriptors <= was.descriptors + 32, (who, was, one)


def shared_memory(name: str) -> set[str]:
    return {path for path in os.listdir("/dev/shm") if f".{name}." in path}


class Churn:
    """Comes and goes, again and again, and looks from time to time what that has left."""

    def __init__(self, process: Running, dp: dataplane.Dataplane) -> None:
        self._process, self._dp = process, dp
        self._names = shared_memory(process.name)
        self._before: dict[str, Footprint] = {}
        self._began = time.monotonic()
        self._state = np.zeros(1, np.int64)
        self.rounds = self.looks = self.late = 0

    @property
    def taken(self) -> int:
        """Packets."""
        return int(self._state[0])

    def turn(self) -> None:
        """Once more. Stopped at the end."""
        try:
            come_and_go(self._process.name, self.rounds, self._state)
        except dataplane.DataplaneError as error:
            if "has not answered within" not in str(error):     # a machine that gives a worker no time for a second
                raise
            self.late += 1
        self.rounds += 1
        if self.rounds == WARM:
            self._before = footprints(self._process, self._dp)
        if self.rounds > WARM and self.rounds % 25 == 0:
            self._look()

    def _look(self) -> None:
        wait_for(lambda: self._dp.ended or shared_memory(self._process.name) == self._names, "the end of what has left")
        now = footprints(self._process, self._dp)
        compare(self._before, now)
        self.looks += 1
        if self.looks % 40 == 1:
            offered = self._dp.stats()["offered"]
            speed = offered / (time.monotonic() - self._began) / 1e6
            more = {who: f"{(one.memory - self._before[who].memory) >> 10} KiB" for who, one in now.items()}
            print(f"{offered:.3e} packets, {speed:.1f} M/s, {self.rounds} rounds; memory: {more}", flush=True)


@pytest.mark.parametrize("count", COUNTS)
def test_long_run(count: int) -> None:
    assert count % FLOWS == 0
    with running(config(count)) as process, dataplane.attach(process.name) as dp, pipe() as (ready, tell):
        stayer = Forked(lambda: stay(process.name, count // PORTS, tell))
        try:
            assert os.read(ready, 1)
            churn = Churn(process, dp)
            with contextlib.suppress(dataplane.Stopped, dataplane.UnknownDataplane):
                while True:     # it ends by itself
                    churn.turn()
            assert stayer.result(WATCHDOG) == [[count // PORTS, 0]] * STAYING
        finally:
            stayer.kill()
        ledger = process.wait()
    print(f"{count:.0e} packets, {churn.rounds} rounds, {churn.late} of them late, {churn.looks} looks")
    lost = ledger["dropped"].pop("no_socket")
    assert not ledger["dropped"] and ledger["offered"] == count == ledger["delivered"] + lost
    assert ledger["deliveries"] == ledger["consumed"] + ledger["unread"] == ledger["delivered"]
    assert ledger["consumed"] >= count // 2 + churn.taken
    assert churn.rounds > WARM and churn.taken > 0
