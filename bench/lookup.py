#!/usr/bin/env python3
"""The lookup alone, as RX workers do it, and behind a reader lock in each bucket, as the proposal has it.

    python -m bench.lookup --workers 2
    python -m bench.lookup --workers 2 --of reader-lock

Each worker, on a core of its own, looks the same 1,024 packets up again and again in bursts of 64 whose buckets are
prefetched: hash, bucket, PCB. With the reader lock it raises a count in the bucket before and lowers it after, which is
what the lock is, as long as no writer comes. Lookups a second and worker; every one has to find its socket.
"""

from __future__ import annotations

import argparse
import time
from multiprocessing import get_context
from typing import Any

import numpy as np

from bench import demux, harness
from dataplane.inet import demux as inet
from dataplane.inet import worker
from dataplane.jit import kernel
from dataplane.shm import layout as L
from dataplane.shm.atomics import call2, call3, copy, fetch_add, ld64, prefetch

_classify, _match = inet._classify, inet._match


@kernel("i64(mem, i64, i64, i64, i64)")
def prepare(mem, w, nif, place, bursts):
    """Writes the classified descriptors of so many bursts to `place`."""
    table, burst = ld64(mem, w + L.W_TABLE), ld64(mem, w + L.W_BURST)
    for _ in range(bursts):
        count = call3(ld64(mem, nif + L.N_RX), mem, nif, burst, L.BURST)
        for i in range(count):
            if _classify(mem, table, nif, burst + i * L.P_BYTES) != 0:
                return 0
        copy(mem, place, burst, count * L.P_BYTES)
        place += count * L.P_BYTES
        call2(ld64(mem, nif + L.N_DONE), mem, nif, count)
    return 1


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def look_up(mem, table, place, bursts, rounds, locked):
    """Looks up all bursts, `rounds` times; sum of the PCB numbers."""
    mask, first = ld64(mem, table + L.T_BUCKETS), ld64(mem, table + L.T_BUCKET_AT)
    total = 0
    for _ in range(rounds):
        for number in range(bursts):
            burst = place + number * L.BURST * L.P_BYTES
            for i in range(L.BURST):
                prefetch(mem, first + (ld64(mem, burst + i * L.P_BYTES + L.P_HASH) & mask) * L.BUCKET_BYTES)
            for i in range(L.BURST):
                p = burst + i * L.P_BYTES
                bucket = first + (ld64(mem, p + L.P_HASH) & mask) * L.BUCKET_BYTES
                if locked:
                    fetch_add(mem, bucket + L.BUCKET_LOCK, 1)
                total += _match(mem, table, p)
                if locked:
                    fetch_add(mem, bucket + L.BUCKET_LOCK, -1)
    return total


def measure(bed: demux.Bed, place: int, bursts: int, options: argparse.Namespace) -> float:
    """Lookups a second and worker, in millions."""
    context = get_context("fork")
    barrier, results = context.Barrier(options.workers), context.Queue()

    def work(core: int) -> None:
        harness.pin(core)
        expected = int(np.arange(bed.sockets).sum()) * (bursts * L.BURST // bed.sockets)
        barrier.wait()
        end, count, start = time.monotonic() + options.seconds, 0, time.monotonic()
        while time.monotonic() < end:
            found = look_up(bed.mem, bed.table.offset, place, bursts, 64, options.of == "reader-lock")
            assert found == 64 * expected, "a lookup found another socket"
            count += 64 * bursts * L.BURST
        results.put(count / (time.monotonic() - start) / 1e6)

    processes: list[Any] = [context.Process(target=work, args=(core,)) for core in harness.CORES[:options.workers]]
    for process in processes:
        process.start()
    rates = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return float(np.mean(rates))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--of", choices=["dataplane", "reader-lock"], default="dataplane")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sockets", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.6, help="of each repeat")
    options = parser.parse_args()
    if options.workers > len(harness.CORES):
        raise harness.Missing(f"{options.workers} cores")
    bed = demux.Bed(argparse.Namespace(sockets=options.sockets, size="60", kind="wildcard", ring_bytes=4096))
    w = worker.attach_private(bed.arena, bed.table, 0, 8, 3600.0, demux.STAMP)
    bed.allow(1 << 40)
    bursts = bed.flows // L.BURST
    place = bed.arena.map_anonymous(bursts * L.BURST * L.P_BYTES)
    assert prepare(bed.mem, w, bed.nif, place, bursts), "a packet was refused"
    look_up.compile()
    measure(bed, place, bursts, options)
    rates = [measure(bed, place, bursts, options) for _ in range(options.repeats)]
    name = "lookup" if options.of == "dataplane" else f"lookup.{options.of}"
    harness.report(name, "M/s", rates, options, ns=round(1e3 / float(np.median(rates)), 2))


if __name__ == "__main__":
    harness.run(main)
