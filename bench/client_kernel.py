"""Kernel UDP sockets in place of ours, for `bench.client`: recvfrom, recv_into, recvmmsg and asyncio.

The sockets are in a network namespace of the run. A sender, pinned to the first core, gives the kernel 64 datagrams
with each call (UDP_SEGMENT, which the kernel takes apart before the receiver's socket) and never waits: it is faster
than any receiver here, so that the receive buffer is always full and what has no room is dropped by the kernel. Only
what was received counts. That the sender was the faster one is asserted in each run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import mmap
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

from bench import harness
from tests.netns import Namespace

SOL_UDP, UDP_SEGMENT = 17, 103
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER = 4 << 20    # tried from 200 KB to 16 MB
AT_ONCE = 64                # datagrams of one UDP_SEGMENT call: the kernel's limit
LARGEST = 65507             # bytes of one such call
ROOM = 2048
MARK = 3                    # the byte of each payload that is summed, as in bench.client


class Taken(NamedTuple):
    """What one repeat got: packets, seconds, bytes of payload, and the last payload or the sum of all marks."""

    packets: int
    seconds: float
    octets: int
    last: bytes | None = None
    marks: int | None = None


class Wire:
    """Receiver's socket and a sender that is at work."""

    def __init__(self, receiver: socket.socket, payload: bytes, sent: memoryview) -> None:
        self.receiver, self.payload = receiver, payload
        self._sent = sent

    def sent(self) -> int:
        """Datagrams sent so far."""
        return int(self._sent[0])


def send_for_ever(sender: socket.socket, payload: bytes, sent: memoryview) -> None:
    """The sender's process."""
    count = max(1, min(AT_ONCE, LARGEST // len(payload)))
    sender.setsockopt(SOL_UDP, UDP_SEGMENT, len(payload))
    send, data = sender.send, payload * count
    parent = os.getppid()
    while os.getppid() == parent:
        for _ in repeat(None, 1024):
            send(data)
            sent[0] += count


@contextlib.contextmanager
def wire(size: int) -> Iterator[Wire]:
    """A receiver on loopback in a namespace of its own, and its sender, until the end of the block."""
    harness.need_root()
    payload = bytes(i * 7 & 0xFF for i in range(size))
    sent = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
    with Namespace() as namespace:
        with namespace.entered():
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with receiver, sender:
            receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
            receiver.bind(("127.0.0.1", 0))
            sender.connect(receiver.getsockname())
            child = harness.fork(harness.CORES[0], send_for_ever, sender, payload, sent)
            try:
                yield Wire(receiver, payload, sent)
            finally:
                child.kill()


# -- receivers -----------------------------------------------------------------------------------------------


def take_recvfrom(sock: socket.socket, packets: int) -> Taken:
    """A bytes object and an address for each datagram."""
    recvfrom, octets, data = sock.recvfrom, 0, b""
    begin = time.perf_counter()
    for _ in repeat(None, packets):
        data, _address = recvfrom(ROOM)
        octets += len(data)
    return Taken(packets, time.perf_counter() - begin, octets, data)


def take_recv_into(sock: socket.socket, packets: int) -> Taken:
    """All into the same buffer; no addresses."""
    recv_into, octets, size, room = sock.recv_into, 0, 0, bytearray(ROOM)
    begin = time.perf_counter()
    for _ in repeat(None, packets):
        size = recv_into(room)
        octets += size
    return Taken(packets, time.perf_counter() - begin, octets, bytes(room[:size]))


class Counter(asyncio.DatagramProtocol):
    """Counts until it has a goal's number, and tells."""

    def __init__(self) -> None:
        self.count = self.octets = self.goal = 0
        self.data = b""
        self.done: asyncio.Future[None] | None = None

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.octets += len(data)
        self.count += 1
        if self.count == self.goal and self.done is not None:
            self.data = data
            self.done.set_result(None)

    async def take(self, packets: int) -> Taken:
        """Until so many have come."""
        self.count, self.octets, self.goal = 0, 0, packets
        self.done = asyncio.get_running_loop().create_future()
        begin = time.perf_counter()
        await self.done
        return Taken(packets, time.perf_counter() - begin, self.octets, self.data)


async def take_asyncio(sock: socket.socket, options: argparse.Namespace) -> list[Taken]:
    """The warm-up and all repeats."""
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    transport, counter = await loop.create_datagram_endpoint(Counter, sock=sock)
    try:
        return [await counter.take(packets) for packets in counts(options)]
    finally:
        transport.close()


def counts(options: argparse.Namespace) -> list[int]:
    """Packets of the warm-up and of each repeat."""
    return [options.packets // 4, *([options.packets] * options.repeats)]


def python_receiver(sock: socket.socket, options: argparse.Namespace) -> list[Taken]:
    """The receiver's process: without the warm-up."""
    if options.of == "asyncio":
        return asyncio.run(take_asyncio(sock, options))[1:]
    take: Callable[[socket.socket, int], Taken] = {
        "recvfrom": take_recvfrom, "recv_into": take_recv_into}[options.call]
    return [take(sock, packets) for packets in counts(options)][1:]


def native_receiver(sock: socket.socket, options: argparse.Namespace) -> list[Taken]:
    """recvmmsg.c with the same socket."""
    warm_up, packets = counts(options)[:2]
    command = [str(harness.native("recvmmsg")), str(sock.fileno()), str(warm_up), str(packets), str(options.repeats)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=[sock.fileno()],
                            preexec_fn=lambda: os.sched_setaffinity(0, [harness.CORES[1]]), timeout=90).stdout
    rows = [line.split() for line in output.splitlines()]
    return [Taken(int(got), float(seconds), int(octets), None, int(marks)) for got, seconds, octets, marks in rows]


def measure(options: argparse.Namespace) -> tuple[list[float], dict[str, Any]]:
    """Packets a second of each repeat; how many were sent for each that was received."""
    if options.of == "recvmmsg":
        harness.native("recvmmsg")
    with wire(options.size - 28) as line:
        before = line.sent()
        if options.of == "recvmmsg":
            taken = native_receiver(line.receiver, options)
        else:
            taken = harness.fork(harness.CORES[1], python_receiver, line.receiver, options).result(90)
        sent = line.sent() - before
    received = sum(counts(options))
    for one in taken:
        check(one, line.payload)
    assert sent > 1.05 * received, f"the sender was not faster than the receiver: {sent} sent, {received} received"
    return [one.packets / one.seconds for one in taken], {"sent_per_received": round(sent / received, 2)}


def check(taken: Taken, payload: bytes) -> None:
    """The right bytes, as far as a repeat has kept them."""
    assert taken.octets == taken.packets * len(payload), taken
    assert taken.last is None or taken.last == payload, taken
    assert taken.marks is None or taken.marks == taken.packets * payload[MARK], taken
