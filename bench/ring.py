"""The rings between two processes: 8-byte items, or records of bytes, a second.

    python -m bench.ring --items --batch 32                   the items ring (rings/spsc.py)
    python -m bench.ring --items --batch 32 --of lane         the same through another ring of ours: lane, pcq
    python -m bench.ring --size 256 --batch 32                records through the lane (rings/lane.py)
    python -m bench.ring --items --batch 32 --of dpdk         a peer: dpdk, faster_fifo, queue, pipe, zmq, iceoryx2

A producer on the first core, a consumer on the second; two forked processes, and all memory between them is shared.
The clock runs from just before the first item is put until the consumer has verified the last one. How many there
are in a repeat is found by a warm-up, so that each lasts --seconds.

Items: the producer makes the numbers 0, 1, 2, ... in batches in its own memory and puts each batch into the ring, all
of it or nothing; the consumer takes each batch into its own memory and compares every number. A batch of 1 is put and
taken by the calls for single items.

Records: the producer stages copies of 64 different records by turns, a batch of them, and publishes; the consumer takes
up to a batch, compares the number in the header and every byte with what it must be, and releases.

Peers do the same work; bench/ring_peers.py says how. --of dpdk is C (bench/native/ring_dpdk.c): two pinned threads with
rte_ring, single producer and single consumer, enqueue_bulk and dequeue_bulk of 8-byte items (--elem: by the
functions for elements of any size); a record is a buffer that is filled by rte_memcpy and whose address goes through
one ring, and comes back through another.
"""

from __future__ import annotations

import argparse
import mmap
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import harness, ring_peers
from dataplane.jit import Kernel, inlined, kernel
from dataplane.rings.lane import (
    lane_bytes,
    lane_next,
    lane_peek,
    lane_publish,
    lane_release,
    lane_stage,
    record_bytes,
)
from dataplane.rings.pcq import Pcq, pcq_bytes, pcq_get, pcq_put
from dataplane.rings.spsc import Spsc, spsc_bytes, spsc_put, spsc_put_many, spsc_take, spsc_take_many
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import ld64, pause, st64

POOL = ring_peers.POOL
ROOM = 1 << 16      # bytes of a batch in private memory
WARM = 1 << 10      # items of the first warm-up round


# -- kernels -----------------------------------------------------------------------------------------------------
#
# send(mem, ring, scratch, count, batch, size) and take(...): count is a multiple of batch. take returns how many items
# were wrong, as far as it can tell: 0, or not.


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def items_send(mem, ring, scratch, count, batch, size):
    for number in range(0, count, batch):
        for i in range(batch):
            st64(mem, scratch + 8 * i, number + i)
        while spsc_put_many(mem, ring, scratch, batch, batch) == 0:
            pause()
    return 0


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def items_take(mem, ring, scratch, count, batch, size):
    wrong = 0
    for number in range(0, count, batch):
        while spsc_take_many(mem, ring, scratch, batch, batch) == 0:
            pause()
        for i in range(batch):
            wrong |= ld64(mem, scratch + 8 * i) ^ (number + i)
    return wrong


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def singles_send(mem, ring, scratch, count, batch, size):
    for number in range(count):
        while spsc_put(mem, ring, number) == 0:
            pause()
    return 0


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def singles_take(mem, ring, scratch, count, batch, size):
    wrong = 0
    for number in range(count):
        while spsc_take(mem, ring, scratch) == 0:
            pause()
        wrong |= ld64(mem, scratch) ^ number
    return wrong


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def pcq_send(mem, ring, scratch, count, batch, size):
    for number in range(count):
        while pcq_put(mem, ring, number, 1) == 0:
            pause()
    return 0


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def pcq_take(mem, ring, scratch, count, batch, size):
    wrong = 0
    for number in range(count):
        while pcq_get(mem, ring, scratch) == 0:
            pause()
        wrong |= ld64(mem, scratch) ^ number
    return wrong


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def records_send(mem, ring, scratch, count, batch, size):
    """`ring` is the lane state, behind it the records, 64-byte aligned."""
    stride = (size + 63) & -64
    number = 0
    while number < count:
        end = number + batch
        while number < end:
            record = scratch + (number & (POOL - 1)) * stride
            if lane_stage(mem, ring, 0, number, record, size) == 1:
                number += 1
            else:
                lane_publish(mem, ring)
                pause()
        lane_publish(mem, ring)
    return 0


@inlined
def _differs(mem, at, expected, size):
    """0 if `size` bytes, 8 or more, are equal."""
    wrong = ld64(mem, at + size - 8) ^ ld64(mem, expected + size - 8)
    for i in range(size >> 3):
        wrong |= ld64(mem, at + 8 * i) ^ ld64(mem, expected + 8 * i)
    return wrong


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def records_take(mem, ring, scratch, count, batch, size):
    """`ring` is the lane, its mask stands behind the records."""
    stride = (size + 63) & -64
    mask = ld64(mem, scratch + POOL * stride)
    number, wrong = 0, 0
    position = ld64(mem, ring + L.LANE_TAIL)
    while number < count:
        head = lane_peek(mem, ring)
        before = number
        position = lane_next(mem, ring, mask, position, head)
        while position < head and number < before + batch:
            record = ring + L.LANE_DATA + (position & mask)
            length = ld64(mem, record) & 0xFFFFFF
            wrong |= (length ^ size) | (ld64(mem, record + L.RECORD_TIME) ^ number)
            wrong |= _differs(mem, record + L.RECORD_DATA, scratch + (number & (POOL - 1)) * stride, size)
            number += 1
            position = lane_next(mem, ring, mask, position + record_bytes(length), head)
        if number == before:
            pause()
        else:
            lane_release(mem, ring, position, number - before)
    return wrong


# -- our channels ------------------------------------------------------------------------------------------------


class Ours(ring_peers.Channel):
    """One of our rings in shared memory, with the kernels of both ends. Forked processes share it."""

    def __init__(self, send: Kernel, take: Kernel, options: argparse.Namespace) -> None:
        for one in (send, take):
            one.compile()
        self._send, self._take, self._options = send, take, options
        self.arena = Arena(1 << 32)
        self.mem = self.arena.mem
        self.scratch = self.arena.map_anonymous(max(ROOM, (POOL + 1) * (options.size + 64), 8 * options.batch))
        self.producer_end = self.consumer_end = 0

    def shared(self, size: int) -> int:
        """Memory that both processes see."""
        place = self.arena.map_anonymous(size, shared=True)
        self.producer_end = self.consumer_end = place
        return place

    def send(self, count: int) -> None:
        self._send(self.mem, self.producer_end, self.scratch, count, self._options.batch, self._options.size)

    def take(self, count: int) -> None:
        wrong = self._take(self.mem, self.consumer_end, self.scratch, count, self._options.batch, self._options.size)
        assert wrong == 0, "an item was lost, doubled or torn"


def spsc_channel(options: argparse.Namespace) -> Ours:
    """The items ring."""
    send, take = (singles_send, singles_take) if options.batch == 1 else (items_send, items_take)
    made = Ours(send, take, options)
    Spsc.create(made.mem, made.shared(spsc_bytes(options.capacity)), options.capacity)
    return made


def pcq_channel(options: argparse.Namespace) -> Ours:
    """The queue for many producers, with one; it has no batches."""
    made = Ours(pcq_send, pcq_take, options)
    Pcq.create(made.mem, made.shared(pcq_bytes(options.capacity)), options.capacity)
    return made


def lane_channel(options: argparse.Namespace) -> Ours:
    """The packet ring; items are records of 8 bytes."""
    made = Ours(records_send, records_take, options)
    made.consumer_end = made.shared(lane_bytes(options.ring_bytes))
    made.producer_end = made.arena.map_anonymous(L.LS_BYTES)
    state = made.mem[made.producer_end:][:L.LS_BYTES].view(np.int64)
    state[L.LS_BASE // 8], state[L.LS_MASK // 8] = made.consumer_end, options.ring_bytes - 1
    stride = (options.size + 63) & -64
    for i, record in enumerate(ring_peers.messages(options.size)):
        made.mem[made.scratch + i * stride:][:options.size] = np.frombuffer(record, np.uint8)
    made.mem[made.scratch + POOL * stride:][:8].view(np.int64)[0] = options.ring_bytes - 1
    return made


# -- a run: rounds of one pair of processes ------------------------------------------------------------------------


(GO, COUNT, READY, DONE, ENDED) = range(5)


def _await(gate: Any, word: int, value: int) -> None:
    while gate[word] != value:
        time.sleep(20e-6)


def produce(channel: Any, gate: Any, options: argparse.Namespace) -> list[float]:
    """The producer's process: warms up until it knows the rate, then measures. Items a second of each repeat."""
    channel.open_producer()
    turn = 0

    def one(count: int) -> float:
        nonlocal turn
        turn += 1
        gate[COUNT], gate[GO] = count, turn
        _await(gate, READY, turn)
        start = time.monotonic_ns()
        channel.send(count)
        _await(gate, DONE, turn)
        return float(gate[ENDED] - start) / 1e9

    count = max(WARM // options.batch, 1) * options.batch
    while (seconds := one(count)) < options.seconds / 4:
        count *= 2 if seconds > options.seconds / 64 else 8
    count = max(int(count * options.seconds / seconds) // options.batch, 1) * options.batch
    rates = [count / one(count) for _ in range(options.repeats)]
    gate[COUNT], gate[GO] = 0, turn + 1
    channel.close()
    return rates


def consume(channel: Any, gate: Any) -> int:
    """The consumer's process; how many items it has verified."""
    channel.open_consumer()
    turn = total = 0
    while True:
        turn += 1
        _await(gate, GO, turn)
        count = int(gate[COUNT])
        if count == 0:
            channel.close()
            return total
        gate[READY] = turn
        channel.take(count)
        gate[ENDED] = time.monotonic_ns()
        gate[DONE] = turn
        total += count


def exchange(channel: Any, options: argparse.Namespace) -> list[float]:
    """Items a second of each repeat, in millions."""
    gate = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)
    consumer = harness.fork(harness.CORES[1], consume, channel, gate)
    producer = harness.fork(harness.CORES[0], produce, channel, gate, options)
    try:
        rates = producer.result(30 + 3 * options.seconds * options.repeats)
        consumer.result()
    finally:
        producer.kill()
        consumer.kill()
        channel.clean()
    return [rate / 1e6 for rate in rates]


def dpdk(options: argparse.Namespace) -> list[float]:
    """The same by the peer in C, which prints millions a second, a repeat a line."""
    program = harness.native("ring_dpdk", ("libdpdk",), "apt-get install libdpdk-dev gcc pkg-config")
    what = ("elem" if options.elem else "items") if options.items else "records"
    numbers = (*harness.CORES[:2], options.batch, options.size, options.capacity, options.ring_bytes, options.repeats,
               options.seconds)
    command = [str(program), what, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return [float(line) for line in done.stdout.split()]


OURS: dict[str, Callable[[argparse.Namespace], Ours]] = {"spsc": spsc_channel, "pcq": pcq_channel, "lane": lane_channel}


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--of", choices=["dataplane", "lane", "pcq", "dpdk", *ring_peers.PEERS], default="dataplane")
    parser.add_argument("--items", action="store_true", help="8-byte items instead of records")
    parser.add_argument("--elem", action="store_true", help="dpdk: rte_ring_elem instead of rte_ring")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="bytes of a record")
    parser.add_argument("--capacity", type=int, default=4096, help="items that an items ring has room for")
    parser.add_argument("--ring-bytes", type=int, default=1 << 18, help="of the lane, and of what a peer has like it")
    parser.add_argument("--seconds", type=float, default=0.6, help="of each repeat")
    options = parser.parse_args()
    if options.items:
        options.size = 8
    if options.size < 8 or not 1 <= options.batch < min(options.capacity, ROOM // 8):
        parser.error("a record has 8 bytes or more, a batch 1 or more but fewer than the ring")
    return options


def main() -> None:
    options = arguments()
    if len(harness.CORES) < 2:
        raise harness.Missing("it needs two cores")
    own = {"dataplane": "spsc" if options.items else "lane"}.get(options.of, options.of)
    if own == "pcq":
        options.items, options.size, options.batch = True, 8, 1
    if own == "dpdk":
        values = dpdk(options)
    elif own in OURS:
        values = exchange(OURS[own](options), options)
    else:
        values = exchange(ring_peers.PEERS[own](options), options)
    name = "ring.items" if options.items else "ring.records"
    suffix = "" if options.of == "dataplane" else f".{options.of}"
    rate = float(np.median(values))
    more = {"gbit_s": round(rate * options.size * 8 / 1e3, 3), "ns": round(1e3 / rate, 3)}
    harness.report(name + suffix, "M/s", values, options, **more)


if __name__ == "__main__":
    harness.run(main)
