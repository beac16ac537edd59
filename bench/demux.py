#!/usr/bin/env python3
"""Demultiplexing alone: packets in memory through an RX worker's step into sockets' lanes, and out of them on another
core. No supervisor, no netif that costs anything: what is measured are the kernels that RX workers and `consume` run.

    python -m bench.demux --sockets 1024 --size 60
    python -m bench.demux --sockets 1000000 --kind connected --ring-bytes 1024

One process, pinned to the first core, runs the worker's step: it validates each packet (IPv4 header and checksum,
UDP), finds its socket among `--sockets`, copies it into that socket's lane and publishes once a burst. Another one,
on the second core, runs the sweep of `consume` over all lanes and reads first and last byte of each payload. Packets
are prepared before, each socket's in its turn; a ring that is full is waited for, so that none is lost, and the slower
side is what is measured.

Per socket, packets, bytes and the sum of those two bytes must come out right, and the ledger has to balance.

    --kind wildcard     bound to a port (at most 60,000 sockets)
    --kind connected    bound to a local and a remote address and port: one flow each
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from bench import harness
from dataplane import ledger
from dataplane.client import drain
from dataplane.client.consume import Pace
from dataplane.client.sweep import sweep_for
from dataplane.inet import step, worker
from dataplane.jit import kernel
from dataplane.netif import synthetic
from dataplane.pcb import lookup
from dataplane.pcb.table import SocketSpec, Table
from dataplane.shm import epoch
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import copy, ld64, st64

FIRST_PORT = 1024
WILDCARD_MAX = 60_000
FLOWS_MIN = 1024        # packets of fewer sockets come from several peers
BUDGET = 256            # bursts in one step
IP_AND_UDP = 28
WRITER, STAMP = 1, 2
FOREVER = 1 << 60        # packets
_insert = lookup.bucket_insert.inner

Words = npt.NDArray[np.int64]


# -- the table ---------------------------------------------------------------------------------------------------


@kernel("i64(mem, i64, i64, i64, vec)")
def open_copies(mem, table, slots, stride, keys):
    """Opens socket i = 1, 2, ... as socket 0 is open, its slot `stride` bytes behind that of i - 1. keys: for each
    socket PCB_KEY and remote address. Opening them one by one as the supervisor does would take a minute."""
    pcbs, lanes = ld64(mem, table + L.T_PCBS), ld64(mem, table + L.T_LANES)
    for i in range(1, keys.size // 2):
        pcb, state, slot = pcbs + i * L.PCB_BYTES, lanes + i * L.LS_BYTES, slots + i * stride
        copy(mem, pcb, pcbs, L.PCB_BYTES)
        copy(mem, state, lanes, L.LS_BYTES)
        st64(mem, pcb + L.PCB_KEY, keys[2 * i])
        st64(mem, pcb + L.PCB_REMOTE_LO, keys[2 * i + 1])
        st64(mem, state + L.LS_BASE, slot + L.SLOT_LANES)
        st64(mem, state + L.LS_WAKE, slot)
        if _insert(mem, table, i, WRITER) != 1:
            return i
    return keys.size // 2


class Bed:
    """Table, worker, netif and sockets in memory that both processes share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.sockets = options.sockets
        self.flows = self.sockets * max(1, FLOWS_MIN // self.sockets)
        ports = (FIRST_PORT, FIRST_PORT + min(self.sockets, WILDCARD_MAX) - 1)
        size = options.size if options.size == "imix" else int(options.size)
        self.settings = synthetic.Settings(flows=self.flows, local_ports=ports, size=size, backpressure=True)
        self.arena = Arena(1 << 36)
        self.mem: Any = self.arena.mem
        capacities = (self.sockets + 1, 1, 1, 1, 64)
        self.table = Table(self.mem, self.arena.map_anonymous(Table.size(*capacities), shared=True), *capacities)
        worker.prepare(self.arena, self.table, 0, 1000, 1 << 18)
        self.nif = self.table.nif(0, 0)
        self.netif = synthetic.Netif(self.settings, self.arena, 1, [self.nif])
        self.put(self.nif + L.N_PRIVATE + synthetic.S_LIMIT, 0)
        self.stride = L.SLOT_LANES + L.LANE_DATA + options.ring_bytes
        self.slots = self.arena.map_anonymous(self.sockets * self.stride, shared=True)
        self.rows = self.arena.map_anonymous(self.sockets * drain.ROW_BYTES)
        self.waiter = self.arena.map_anonymous(drain.WAITER_BYTES)
        self._open(options.kind == "connected", options.ring_bytes)

    def put(self, place: int, value: int) -> None:
        self.table.put(place, value)

    def allow(self, packets: int) -> None:
        """Lets the netif have so many packets in all."""
        self.put(self.nif + L.N_PRIVATE + synthetic.S_LIMIT, packets)
        self.put(self.nif + L.N_STATUS, L.NS_RUNNING)

    def _open(self, connected: bool, ring_bytes: int) -> None:
        numbers = np.arange(self.sockets)
        local = synthetic.local_ports(numbers, self.settings.local_ports)
        keys = np.zeros((self.sockets, 2), np.int64)
        remote = None
        if connected:
            addresses = synthetic.remote_addresses(numbers, self.settings.seed)
            ports = synthetic.remote_ports(numbers, self.settings.seed)
            remote = (0, int(addresses[0]), int(ports[0]))
            keys[:, 1] = addresses
        spec = SocketSpec("udp", L.KEY_FAMILY4, port=int(local[0]), ring_bytes=ring_bytes, remote=remote,
                          local=(0, synthetic.LOCAL_ADDRESS) if connected else None,
                          lanes=[self.slots + L.SLOT_LANES], wake=self.slots)
        assert self.table.open(spec) == 0
        keys[:, 0] = (self.table.word(0, L.PCB_KEY) & ~0xFFFF_FFFF) | local
        if connected:
            keys[:, 0] |= ports << 16
        opened = open_copies(self.mem, self.table.offset, self.slots, self.stride, keys.ravel())
        assert opened == self.sockets, f"room in the table for {opened} sockets only"
        classes = self.table.get(self.table.offset + L.T_PORTS)
        self.mem[classes + local] = 1 << spec.socket_class
        for i in range(self.sockets):
            drain.open_row(self.mem, self.rows + i * drain.ROW_BYTES, self.slots + i * self.stride + L.SLOT_LANES,
                           ring_bytes - 1)


# -- the two processes -------------------------------------------------------------------------------------------


def rx_worker(bed: Bed, pipe: Connection) -> None:
    """Steps until the number of packets that it was told of has been taken."""
    w = worker.attach_private(bed.arena, bed.table, 0, 8, 3600.0, STAMP)
    epoch.mark_online(bed.mem, w)
    limit = 0
    while True:
        limit += pipe.recv()
        bed.allow(limit)
        start = time.monotonic()
        while bed.table.get(bed.nif + L.N_STATUS) == L.NS_RUNNING:
            step.step(bed.mem, w, BUDGET)
        pipe.send((start, time.monotonic()))


@njit
def tally(payload: Any, info: Any, state: Any) -> None:
    """Per socket: packets, bytes, and the sum of first and last byte, so that the payload was really read."""
    row = state[info.socket]
    row[0] += 1
    row[1] += payload.size
    row[2] += payload[0] + payload[-1]


def consumer(bed: Bed, pipe: Connection) -> None:
    """Sweeps over all lanes until it has so many packets; then says when that was, and what it found."""
    sweep = sweep_for(tally)
    numbers = np.arange(bed.sockets)
    rows = bed.rows + numbers * drain.ROW_BYTES
    pace, state = Pace(20_000), np.zeros((bed.sockets, 3), np.int64)
    pace.step(sweep, bed.mem, rows, numbers, 0, state)
    while True:
        left = pipe.recv()
        state[:] = 0
        while left:
            left -= pace.step(sweep, bed.mem, rows, numbers, left, state)[0]
            if pace.rest:
                drain.rest(bed.mem, bed.waiter, pace.rest)
        pipe.send(time.monotonic())
        pipe.send(state)


class Crew:
    """Both processes, for as many repeats as wanted."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        context = multiprocessing.get_context("fork")
        self._pipes, self._processes = [], []
        for core, function in zip((harness.CORES * 2)[:2], (rx_worker, consumer), strict=True):
            mine, theirs = context.Pipe()
            process = context.Process(target=_pinned, args=(core, function, bed, theirs), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)
        self._expected = _one_turn(bed)

    def measure(self, packets: int) -> float:
        """Packets a second. The number must be that of whole turns of all flows and sizes."""
        rx, sink = self._pipes
        sink.send(packets)
        rx.send(packets)
        (start, _), end, state = rx.recv(), sink.recv(), sink.recv()
        turns, rest = divmod(packets, self._bed.flows * len(self._sizes()))
        assert rest == 0 and (state == self._expected * turns).all(), "not every packet reached its socket"
        row = ledger.read_row(self._bed.mem, self._bed.nif)
        assert row.offered == row.delivered == row.deliveries and not any(row.dropped.values()), row
        return packets / (end - start)

    def begin(self) -> int:
        """Lets both run without an end; the RX worker's process."""
        for pipe in reversed(self._pipes):
            pipe.send(FOREVER)
        return int(self._processes[0].pid or 0)

    def _sizes(self) -> tuple[int, ...]:
        return _pattern(self._bed)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _pinned(core: int, function: Any, bed: Bed, pipe: Connection) -> None:
    harness.pin(core)
    function(bed, pipe)


def _pattern(bed: Bed) -> tuple[int, ...]:
    """Sizes that a flow's packets have in turn."""
    if len(bed.settings.sizes) == 1:
        return bed.settings.sizes
    return tuple(bed.settings.sizes[which] for which in synthetic.IMIX_PATTERN)


def _one_turn(bed: Bed) -> Words:
    """What `tally` finds, int64[sockets, 3], when each flow has sent one packet of each size of the pattern."""
    expected = np.zeros((bed.sockets, 3), np.int64)
    flows = np.arange(bed.flows)
    first = bed.settings.local_ports[0]
    which = flows if bed.flows == bed.sockets else synthetic.local_ports(flows, bed.settings.local_ports) - first
    for size in _pattern(bed):
        last = synthetic.pattern(size, bed.settings.seed)[-1]
        np.add.at(expected, which, np.stack([np.ones_like(flows), np.full_like(flows, size - IP_AND_UDP),
                                             (flows >> 24) + last], axis=1))
    return expected


# -- the run -----------------------------------------------------------------------------------------------------


def ring_bytes(sockets: int, size: str) -> int:
    """Of each socket's lane, unless it is said."""
    if sockets == 1:
        return 262144
    return 65536 if sockets <= 64 else 4096 if size == "60" else 32768


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--sockets", type=int, default=1024)
    parser.add_argument("--size", default="60", help="bytes of the IP packet, or imix (40, 576, 1500 as 7 : 4 : 1)")
    parser.add_argument("--kind", choices=["wildcard", "connected"], default=None,
                        help="of the sockets; default: wildcard up to 60,000 sockets")
    parser.add_argument("--ring-bytes", type=int, help="of each socket's lane; default: 256 KiB for one socket, 64 for "
                        "up to 64, 32 for packets other than of 60 bytes, otherwise 4")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each repeat, about")
    options = parser.parse_args()
    options.kind = options.kind or ("wildcard" if options.sockets <= WILDCARD_MAX else "connected")
    if options.ring_bytes is None:
        options.ring_bytes = ring_bytes(options.sockets, options.size)
    if options.kind == "wildcard" and options.sockets > WILDCARD_MAX:
        parser.error(f"at most {WILDCARD_MAX} wildcard sockets: a port each")
    if options.kind == "connected" and options.sockets < FLOWS_MIN:
        parser.error(f"at least {FLOWS_MIN} connected sockets: each has one flow")
    return options


def main() -> None:
    options = arguments()
    bed = Bed(options)
    for one in (open_copies, step.step):
        one.compile()
    crew = Crew(bed)
    try:
        turn = bed.flows * len(_pattern(bed))
        packets = -(-1_000_000 // turn) * turn
        rate = [crew.measure(packets) for _ in range(3)][-1]
        packets = max(1, round(rate * options.seconds / turn)) * turn
        rates = [crew.measure(packets) for _ in range(options.repeats)]
    finally:
        crew.close()
    size = sum(_pattern(bed)) / len(_pattern(bed))
    mpps = [rate / 1e6 for rate in rates]
    harness.report("demux", "Mpps", mpps, options, gbit_s=round(float(np.median(mpps)) * size * 8 / 1e3, 1))


if __name__ == "__main__":
    harness.run(main)
