"""What bench.ring compares with, from Python: the same items and records between the same two processes.

    faster_fifo    pip install faster-fifo     put_many and get_many of bytes, without pickling
    queue          multiprocessing.Queue       a list of a batch of bytes in each put
    pipe           multiprocessing.Pipe        send_bytes and recv_bytes_into, the pipe's buffer enlarged
    zmq            pip install pyzmq           PUSH and PULL over ipc, without a limit of messages
    iceoryx2       pip install iceoryx2        publish and subscribe of slices of bytes, a publisher that waits

8-byte items: a peer that carries messages carries a batch of them as one message, since that is how a program would
send numbers by it. Records are one message each, in batches where the peer has such (faster_fifo, queue).

Messages are 64 different ones by turns. The consumer compares each with what it must be, all of it, and counts them;
what the producer sends is made before the clock runs. Each object is made before the fork; `open_producer`,
`open_consumer` and `close` are called in the processes themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from bench.harness import Missing

POOL = 64       # different messages, a power of two
F_SETPIPE_SZ = 1031


def messages(size: int) -> list[bytes]:
    """The different messages, as if of random bytes; each begins with its number."""
    source = random.Random(size)
    return [i.to_bytes(2, "little") + source.randbytes(size - 2) for i in range(POOL)]


class Channel:
    """What a run expects beside `send` and `take`."""

    def open_producer(self) -> None:
        """What the producer's process needs of its own."""

    def open_consumer(self) -> None:
        """What the consumer's process needs of its own."""

    def close(self) -> None:
        """The end of either process."""

    def clean(self) -> None:
        """Afterwards, in the process that made it."""


class Peer(Channel):
    """One way to send messages. `count` is of items; `per` of them are in a message."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.per = options.batch if options.items else 1
        self.size = self.per * options.size
        self.messages = messages(self.size)
        # A batch of messages in one call, for peers that have such.
        self.group = 1 if options.items else options.batch

    def each(self, count: int) -> Iterator[bytes]:
        """The messages of a round."""
        return islice(cycle(self.messages), count // self.per)

    def groups(self, count: int) -> Iterator[list[bytes]]:
        """The same in lists of a batch."""
        turn = [list(islice(cycle(self.messages), i, i + self.group)) for i in range(0, POOL * self.group, self.group)]
        return islice(cycle(turn), count // self.per // self.group)


class FasterFifo(Peer):
    """A ring of bytes in shared memory, with a lock."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        try:
            import faster_fifo
        except ImportError:
            raise Missing("pip install faster-fifo") from None
        self._queue = faster_fifo.Queue(max_size_bytes=options.ring_bytes, loads=bytes, dumps=bytes)

    def send(self, count: int) -> None:
        for group in self.groups(count):
            self._queue.put_many(group, timeout=60)

    def take(self, count: int) -> None:
        expected = self.each(count)
        left = count // self.per
        while left:
            found = self._queue.get_many(timeout=60)
            assert found == list(islice(expected, len(found)))
            left -= len(found)


class Queue(Peer):
    """A pipe behind locks, filled by a thread of the producer."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        # Bounded: else the clock would run on what is only in the producer's memory.
        self._queue: Any = multiprocessing.get_context("fork").Queue(1024)

    def send(self, count: int) -> None:
        for group in self.groups(count):
            self._queue.put(group)

    def take(self, count: int) -> None:
        for group in self.groups(count):
            assert self._queue.get() == group


class Pipe(Peer):
    """The kernel's pipe: two system calls a message."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._receiver, self._sender = multiprocessing.Pipe(duplex=False)
        with contextlib.suppress(PermissionError):      # more than fs.pipe-max-size
            fcntl.fcntl(self._sender.fileno(), F_SETPIPE_SZ, max(options.ring_bytes, 1 << 20))

    def send(self, count: int) -> None:
        for message in self.each(count):
            self._sender.send_bytes(message)

    def take(self, count: int) -> None:
        room = bytearray(self.size)
        for message in self.each(count):
            assert self._receiver.recv_bytes_into(room) == self.size and room == message


class Zmq(Peer):
    """A socket of the kernel behind ZeroMQ's own threads, which make batches by themselves."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        try:
            import zmq
        except ImportError:
            raise Missing("pip install pyzmq") from None
        self._zmq = zmq
        self._directory = tempfile.TemporaryDirectory()
        self._address = f"ipc://{self._directory.name}/ring"

    def close(self) -> None:
        self._socket.context.destroy(linger=0)

    def _open(self, kind: int, start: Callable[[Any], Any]) -> None:
        self._socket = self._zmq.Context().socket(kind)
        self._socket.set_hwm(1 << 16)
        start(self._socket)

    def open_producer(self) -> None:
        self._open(self._zmq.PUSH, lambda socket: socket.connect(self._address))

    def open_consumer(self) -> None:
        self._open(self._zmq.PULL, lambda socket: socket.bind(self._address))

    def send(self, count: int) -> None:
        send = self._socket.send
        for message in self.each(count):
            send(message)

    def take(self, count: int) -> None:
        receive = self._socket.recv
        for message in self.each(count):
            assert receive() == message


class Iceoryx2(Peer):
    """Shared memory: the message is written in its place, its address goes through a queue."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        try:
            import iceoryx2
        except ImportError:
            raise Missing("pip install iceoryx2") from None
        self._library = iceoryx2
        self._name = f"dataplane-bench-{os.getpid()}"
        self._directory = tempfile.TemporaryDirectory()

    def _service(self) -> Any:
        library = self._library
        library.set_log_level(library.LogLevel.Error)
        # Names of its own, so that what the library never removes can be (`clean`).
        config = library.config.default()
        config.global_cfg.prefix = library.FileName.new(self._name)
        config.global_cfg.root_path = library.Path.new(self._directory.name)
        self._node = library.NodeBuilder.new().config(config).create(library.ServiceType.Ipc)
        room = max(self.options.ring_bytes // self.size, 16)
        self._factory = (self._node.service_builder(library.ServiceName.new(self._name))
                         .publish_subscribe(library.Slice[ctypes.c_uint8])
                         .enable_safe_overflow(False).history_size(0).subscriber_max_buffer_size(room)
                         .max_publishers(1).max_subscribers(1).open_or_create())
        return self._factory

    def open_producer(self) -> None:
        self._port = (self._service().publisher_builder().initial_max_slice_len(self.size)
                      .backpressure_strategy(self._library.BackpressureStrategy.RetryUntilDelivered).create())

    def open_consumer(self) -> None:
        self._port = self._service().subscriber_builder().create()

    def close(self) -> None:
        """A process that ends without it leaves its files behind."""
        self._port.delete()
        del self._port, self._factory, self._node

    def clean(self) -> None:
        for path in Path("/dev/shm").glob(f"{self._name}*"):
            path.unlink()

    def send(self, count: int) -> None:
        loan, size, move = self._port.loan_slice_uninit, self.size, ctypes.memmove
        self._port.update_connections()
        for message in self.each(count):
            sample = loan(size)
            move(sample.payload_ptr, message, size)
            sample.assume_init().send()

    def take(self, count: int) -> None:
        receive, size, text = self._port.receive, self.size, ctypes.string_at
        for message in self.each(count):
            while (sample := receive()) is None:
                time.sleep(0)
            assert text(sample.payload_ptr, size) == message
            sample.delete()


PEERS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "faster_fifo": FasterFifo, "queue": Queue, "pipe": Pipe, "zmq": Zmq, "iceoryx2": Iceoryx2}
