"""TCP connections of the client library against each other, in memory: rings, calls, waiting, transports."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dataplane.client import tcp_run
from dataplane.client.transport import Server, TCPTransport
from dataplane.errors import DataplaneError, Stopped
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from tests.client.local import LocalSession, in_thread
from tests.client.tcp_local import Wire


@pytest.fixture
def wire() -> Iterator[Wire]:
    session = LocalSession(workers=1)
    with Wire(session) as wire:
        yield wire
    session.close()


def receive(connection: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        assert piece, f"the end after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


# -- bytes -------------------------------------------------------------------------------------------------


def test_a_line_each_way(wire: Wire) -> None:
    a, b = wire.pair()
    a.settimeout(10)
    b.settimeout(10)
    for i in range(200):
        a.sendall(b"request %d" % i)
        assert b.recv(100) == b"request %d" % i
        assert b.send(memoryview(b"answer %d" % i)) == len(b"answer %d" % i)
        assert a.recv(100) == b"answer %d" % i
    a.close()
    assert b.recv(100) == b""
    b.close()


@pytest.mark.parametrize("lose", [0, 37])
def test_megabytes_both_ways_at_once(wire: Wire, lose: int) -> None:
    """Many times around all rings, by four threads."""
    wire.lose = lose
    size = 3_000_000 if not lose else 500_000
    a, b = wire.pair()
    there, back = os.urandom(size), os.urandom(size)
    for one in (a, b):
        one.settimeout(60)

    def take(connection: Any, into: bool) -> bytes:
        if not into:
            return receive(connection, size)
        buffer, at = bytearray(size), 0
        while at < size:
            at += connection.recv_into(memoryview(buffer)[at:])
        return bytes(buffer)

    work = [in_thread(a.sendall, there), in_thread(b.sendall, memoryview(back)), in_thread(take, a, True),
            in_thread(take, b, False)]
    for thread, _ in work:
        thread.join(90)
    assert work[2][1] == [back] and work[3][1] == [there]
    assert work[0][1] == [None] and work[1][1] == [None]
    a.close()
    b.close()


def test_peek_and_flags(wire: Wire) -> None:
    a, b = wire.pair()
    with pytest.raises(BlockingIOError):
        b.recv(10, socket.MSG_DONTWAIT)
    b.settimeout(0.01)
    with pytest.raises(TimeoutError):
        b.recv(10)
    b.setblocking(False)
    with pytest.raises(BlockingIOError):
        b.recv(10)
    assert b.gettimeout() == 0 and not b.getblocking()
    b.setblocking(True)
    a.sendall(b"abcdef")
    assert b.recv(3, socket.MSG_PEEK) == b"abc"
    buffer = bytearray(10)
    assert b.recv_into(buffer, 4, socket.MSG_PEEK) == 4 and buffer[:5] == b"abcd\0"
    assert b.recv(3) == b"abc" and b.recv(0) == b"" and b.recv(10) == b"def"
    with pytest.raises(OSError) as refused:
        b.recv(10, socket.MSG_OOB)
    assert refused.value.errno == errno.EOPNOTSUPP
    with pytest.raises(ValueError):
        b.recv(-1)


def test_a_full_ring(wire: Wire) -> None:
    """Nobody reads: both rings fill, then nothing goes; it goes on where it was."""
    a, b = wire.pair()
    a.settimeout(0)
    data, sent = os.urandom(1 << 20), 0
    end = time.monotonic() + 20
    quiet = time.monotonic()
    while time.monotonic() < min(end, quiet + 0.5):
        try:
            sent += a.send(data[sent:sent + 5000])
            quiet = time.monotonic()
        except BlockingIOError:
            time.sleep(0.001)
    assert 100_000 < sent <= 2 * 65536
    a.settimeout(0.05)
    with pytest.raises(TimeoutError):
        a.sendall(data[sent:sent + 100_000])
    b.settimeout(20)
    assert receive(b, sent) == data[:sent]


# -- the end -------------------------------------------------------------------------------------------------


def test_half_close(wire: Wire) -> None:
    a, b = wire.pair()
    for one in (a, b):
        one.settimeout(10)
    a.sendall(b"question")
    a.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        a.send(b"more")
    assert receive(b, 8) == b"question" and b.recv(10) == b"" and b.recv(10) == b""
    b.sendall(b"answer")
    b.close()
    assert receive(a, 6) == b"answer" and a.recv(10) == b""
    a.close()
    a.close()
    with pytest.raises(OSError) as closed:
        a.recv(10)
    assert closed.value.errno == errno.EBADF
    with pytest.raises(OSError):
        a.send(b"x")


def test_abort_is_a_reset_for_the_peer(wire: Wire) -> None:
    a, b = wire.pair()
    b.settimeout(10)
    a.abort()
    with pytest.raises(ConnectionResetError):
        b.recv(10)
    assert b.recv(10) == b""        # told once, as by a socket of the kernel
    with pytest.raises(BrokenPipeError):
        b.send(b"x")
    assert b.getsockopt("error") == 0


def test_a_reset_while_sending(wire: Wire) -> None:
    a, b = wire.pair()
    a.settimeout(10)
    b.abort()
    with pytest.raises(ConnectionResetError):
        for _ in range(1000):
            a.send(b"x" * 1000)
            time.sleep(0.001)


def test_unread_bytes_make_close_a_reset(wire: Wire) -> None:
    a, b = wire.pair()
    a.settimeout(10)
    b.settimeout(10)
    a.sendall(b"never read")
    assert b.recv(1) == b"n"
    b.close()
    with pytest.raises(ConnectionResetError):
        a.recv(10)


def test_what_was_written_goes_after_close(wire: Wire) -> None:
    a, b = wire.pair()
    b.settimeout(20)
    data = os.urandom(60000)
    a.sendall(data)
    a.close()
    assert receive(b, len(data)) == data and b.recv(1) == b""


def test_linger(wire: Wire) -> None:
    a, b = wire.pair()
    b.settimeout(10)
    a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert a.getsockopt("linger") == 0
    a.close()
    with pytest.raises(ConnectionResetError):
        b.recv(1)
    a, b = wire.pair()
    a.setsockopt("linger", 5)
    a.sendall(b"x" * 1000)
    a.close()       # returns when they are acknowledged
    b.settimeout(10)
    assert receive(b, 1000) == b"x" * 1000


def test_close_wakes_who_waits(wire: Wire) -> None:
    a, _b = wire.pair()
    thread, result = in_thread(a.recv, 10)
    time.sleep(0.05)
    a.close()
    thread.join(10)
    assert isinstance(result[0], OSError) and result[0].errno == errno.EBADF


def test_a_dropped_connection_is_closed(wire: Wire) -> None:
    a, b = wire.pair()
    b.settimeout(10)
    with pytest.warns(ResourceWarning):
        del a
        gc.collect()
    assert b.recv(10) == b""


def test_stopped(wire: Wire) -> None:
    a, b = wire.pair()
    a.sendall(b"last words")
    b.settimeout(10)
    assert b.recv(4) == b"last"
    thread, result = in_thread(lambda: [b.recv(100), b.recv(100)])
    time.sleep(0.05)
    wire.session.stop()
    thread.join(10)
    assert isinstance(result[0], Stopped)
    with pytest.raises(Stopped):
        a.send(b"x")


def test_the_attachment_is_closed(wire: Wire) -> None:
    a, _b = wire.pair()
    wire.session.close()
    with pytest.raises(DataplaneError):
        a.recv(10)
    with pytest.raises(DataplaneError):
        a.send(b"x")
    a.close()


# -- two threads ---------------------------------------------------------------------------------------------


def test_a_reader_and_a_writer_sleep_at_once(wire: Wire) -> None:
    """Both wait on one wake object: neither may be forgotten, whoever is woken first."""
    a, b = wire.pair()
    for one in (a, b):
        one.settimeout(30)
    rounds, size = 30, 90_000        # more than the rings hold, so that the writer sleeps as well
    started = time.monotonic()

    def write() -> None:
        for _ in range(rounds):
            a.sendall(b"w" * size)

    writer, wrote = in_thread(write)
    reader, read = in_thread(receive, a, rounds)
    for _ in range(rounds):
        time.sleep(0.003)
        receive(b, size)
        b.sendall(b"r")
    writer.join(30)
    reader.join(30)
    assert wrote == [None] and read == [b"r" * rounds]
    assert time.monotonic() - started < 60
    assert wire.session.memory.words(a.handle + tcp_run.H_SLEEPERS)[0] == 0


def test_a_late_wakeup_is_not_lost(wire: Wire) -> None:
    """Sleeps without spinning; every byte must end a sleep, not a slice of it."""
    wire.session.spin_ns = 0
    a, b = wire.pair()
    a.setsockopt("nodelay", True)
    b.settimeout(10)
    slowest = 0.0
    for i in range(100):
        thread, got = in_thread(b.recv, 1)
        time.sleep(0.0005 * (i % 5))
        start = time.monotonic()
        a.sendall(b"x")
        thread.join(10)
        slowest = max(slowest, time.monotonic() - start)
        assert got == [b"x"]
    print(f"slowest {slowest * 1000:.1f} ms")


# -- options, names, files -----------------------------------------------------------------------------------


def test_options(wire: Wire) -> None:
    a, b = wire.pair()
    a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert a.getsockopt("nodelay") is True and a.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    a.setsockopt("cork", True)
    assert a.words[T.CONN_OPTIONS // 8] == T.OPT_NODELAY | T.OPT_CORK
    a.setsockopt("cork", False)
    a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    a.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    assert a.words[T.CONN_KEEP_IDLE // 8] == 10_000_000_000
    assert a.words[T.CONN_KEEP_INTERVAL // 8] == 75_000_000_000 and a.words[T.CONN_KEEP_COUNT // 8] == 9
    a.setsockopt("user_timeout", 1500)
    assert a.words[T.CONN_USER_TIMEOUT // 8] == 1_500_000_000
    a.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    assert a.words[T.CONN_OPTIONS // 8] & T.OPT_NEWRENO and a.getsockopt("congestion") == "reno"
    assert a.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
    with pytest.raises(OSError) as unknown:
        a.setsockopt("nonsense", 1)
    assert unknown.value.errno == errno.ENOPROTOOPT
    with pytest.raises(OSError):
        a.setsockopt("keepidle", 0)
    with pytest.raises(OSError):
        a.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"vegas")
    a.sendall(b"x" * 100)
    b.settimeout(10)
    receive(b, 100)
    info = b.getsockopt("info")
    assert info["state"] == "established" and info["rcv_nxt"] == 101 and info["unread"] == 0
    assert a.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 and a.family == socket.AF_INET
    assert a.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM


def test_makefile(wire: Wire) -> None:
    a, b = wire.pair()
    for one in (a, b):
        one.settimeout(10)
    with a.makefile("w", newline="\n") as out, b.makefile("rb") as lines:
        for i in range(1000):
            print("line", i, file=out)
        out.flush()
        a.shutdown(socket.SHUT_WR)
        assert list(lines) == [b"line %d\n" % i for i in range(1000)]
        a.close()
        assert not a.closed     # until its file is closed, too
    assert a.closed and not b.closed
    b.close()
    with pytest.raises(ValueError):
        b.makefile("a")


def test_accept(wire: Wire) -> None:
    listener = wire.listener()
    with pytest.raises(TimeoutError):
        listener.accept(0.01)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.settimeout(10)
    listener.setsockopt("nodelay", True)
    far = wire.offer(wire.session, listener)
    near, address = listener.accept()
    assert address == ("10.77.0.2", 4000) == near.getpeername() and near.getsockname() == ("10.77.0.1", 80)
    assert near.getsockopt("nodelay") is True and near.words[T.CONN_OPTIONS // 8] == T.OPT_NODELAY
    near.settimeout(10)
    far.sendall(b"hello")
    assert receive(near, 5) == b"hello"
    assert wire.session.consumed(listener.queue) == [1]
    listener.close()
    with pytest.raises(OSError):
        listener.accept(0)
    near.close()
    far.close()


# -- asyncio -------------------------------------------------------------------------------------------------


async def streams(connection: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    made = loop.create_future()
    transport = TCPTransport(loop, connection, protocol, made)
    await made
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def ends_of(wire: Wire) -> Any:
    a, b = wire.pair()
    return await streams(a), await streams(b)


def run(coroutine: Any, timeout: float = 60) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, timeout))


def test_stream_lines(wire: Wire) -> None:
    async def main() -> None:
        (r1, w1), (r2, w2) = await ends_of(wire)
        for i in range(200):
            w1.write(b"line %d\n" % i)
            assert await r2.readline() == b"line %d\n" % i
            w2.writelines([b"an", b"swer\n"])
            assert await r1.readline() == b"answer\n"
        assert w1.get_extra_info("peername")[0] == "10.77.0.2" and w1.can_write_eof()
        w1.write_eof()
        assert await r2.read() == b""
        w2.write(b"the end")
        w2.close()
        assert await r1.read() == b"the end"
        w1.close()
        await asyncio.gather(w1.wait_closed(), w2.wait_closed())

    run(main())


def test_streams_of_megabytes(wire: Wire) -> None:
    """With drain: water marks, pausing, resuming; both ways at once."""
    data = os.urandom(2_000_000)

    async def send(writer: asyncio.StreamWriter) -> int:
        paused = 0
        for at in range(0, len(data), 50_000):
            writer.write(data[at:at + 50_000])
            paused += writer.transport.get_write_buffer_size() > 0
            await writer.drain()
        writer.write_eof()
        return paused

    async def main() -> None:
        (r1, w1), (r2, w2) = await ends_of(wire)
        got = await asyncio.gather(send(w1), send(w2), r1.read(), r2.read())
        assert got[2] == data and got[3] == data and got[0] > 0
        w1.close()
        w2.close()
        await asyncio.gather(w1.wait_closed(), w2.wait_closed())

    run(main())


def test_a_reader_that_does_not_read_pauses_the_writer(wire: Wire) -> None:
    async def main() -> None:
        (_r1, w1), (r2, w2) = await ends_of(wire)
        w1.write(b"x" * 1_000_000)
        await asyncio.sleep(0.3)
        size = w1.transport.get_write_buffer_size()
        assert size > 400_000
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(w1.drain(), 0.05)
        assert len(await r2.readexactly(1_000_000)) == 1_000_000
        await w1.drain()
        w1.close()
        await w1.wait_closed()
        w2.close()

    run(main())


class Recorder(asyncio.Protocol):
    def __init__(self, keep: bool = False) -> None:
        self.calls: list[Any] = []
        self.keep = keep
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.calls.append("made")

    def data_received(self, data: bytes) -> None:
        self.calls.append(data)

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return self.keep

    def connection_lost(self, error: Any) -> None:
        self.calls.append(("lost", type(error)))
        self.done.set_result(None)


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_protocol_is_told(wire: Wire, keep: bool) -> None:
    async def main() -> None:
        a, b = wire.pair()
        loop = asyncio.get_running_loop()
        protocol = Recorder(keep)
        transport = TCPTransport(loop, a, protocol)
        await asyncio.sleep(0)
        b.sendall(b"data")
        b.shutdown(socket.SHUT_WR)
        while "eof" not in protocol.calls:
            await asyncio.sleep(0.001)
        if keep:
            assert not transport.is_closing()
            transport.write(b"still here")
            transport.close()
        await protocol.done
        assert protocol.calls == ["made", b"data", "eof", ("lost", type(None))]
        b.settimeout(10)
        assert await loop.run_in_executor(None, receive, b, 10) == b"still here" if keep else b.recv(1) == b""
        transport.close()
        transport.abort()
        transport.write(b"nobody")
        await asyncio.sleep(0.01)
        assert len(protocol.calls) == 4

    run(main())


def test_a_reset_is_told(wire: Wire) -> None:
    async def main() -> None:
        a, b = wire.pair()
        protocol = Recorder()
        TCPTransport(asyncio.get_running_loop(), a, protocol)
        await asyncio.sleep(0.01)
        b.abort()
        await protocol.done
        assert protocol.calls == ["made", ("lost", ConnectionResetError)]

    run(main())


def test_pause_reading(wire: Wire) -> None:
    async def main() -> None:
        a, b = wire.pair()
        protocol = Recorder()
        transport = TCPTransport(asyncio.get_running_loop(), a, protocol)
        transport.pause_reading()
        assert not transport.is_reading()
        b.sendall(b"later")
        await asyncio.sleep(0.1)
        assert protocol.calls == ["made"]
        transport.resume_reading()
        while len(protocol.calls) < 2:
            await asyncio.sleep(0.001)
        assert protocol.calls == ["made", b"later"]
        transport.abort()
        await protocol.done

    run(main())


def test_buffered_protocol(wire: Wire) -> None:
    class Buffered(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.buffer, self.got = bytearray(100), bytearray()

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.got += self.buffer[:nbytes]

    async def main() -> None:
        a, b = wire.pair()
        protocol = Buffered()
        transport = TCPTransport(asyncio.get_running_loop(), a, protocol)
        data = os.urandom(20_000)
        b.sendall(data)
        while len(protocol.got) < len(data):
            await asyncio.sleep(0.001)
        assert protocol.got == data
        transport.abort()
        await asyncio.sleep(0)

    run(main())


def test_a_server_with_streams(wire: Wire) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        listener = wire.listener()

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                writer.write(line)
            writer.close()

        def factory() -> asyncio.StreamReaderProtocol:
            reader = asyncio.StreamReader(loop=loop)
            return asyncio.StreamReaderProtocol(reader, echo, loop=loop)

        server = Server(loop, listener, factory)
        await server.start_serving()
        assert server.is_serving() and server.sockets[0].getsockname() == ("10.77.0.1", 80)

        async def client(number: int) -> None:
            reader, writer = await streams(wire.offer(wire.session, listener))
            for i in range(5):
                writer.write(b"%d %d\n" % (number, i))
                assert await reader.readline() == b"%d %d\n" % (number, i)
            writer.close()
            await writer.wait_closed()

        async with server:
            await asyncio.gather(*[client(i) for i in range(100)])
        assert not server.is_serving() and server.sockets == ()
        source = wire.session.sources[0]
        assert len(source._free) == len(source._callbacks)

    run(main())


def test_a_bell_among_many_costs_little(wire: Wire) -> None:
    """5,000 that wait, one that is rung for: a scan, not a loop in Python."""
    async def main() -> None:
        a, b = wire.pair()
        protocol = Recorder()
        TCPTransport(asyncio.get_running_loop(), a, protocol)
        await asyncio.sleep(0.01)
        source = wire.session.sources[0]
        wakes = wire.session.memory.table(64 * 5000)
        for i in range(5000):
            number = source.enter(lambda: None)
            wire.session.memory.words(wakes + 64 * i)[0] = L.WAKE_PIPE
            source._words[number] = wakes + 64 * i
        start = time.monotonic()
        for _ in range(1000):
            source._fired()
        print(f"{(time.monotonic() - start) * 1000:.1f} µs a ring")
        b.sendall(b"x")
        while len(protocol.calls) < 2:
            await asyncio.sleep(0.001)
        protocol.transport.abort()
        await protocol.done

    run(main())


def test_the_dataplane_ends_under_a_transport(wire: Wire) -> None:
    async def main() -> None:
        a, _b = wire.pair()
        protocol = Recorder()
        TCPTransport(asyncio.get_running_loop(), a, protocol)
        await asyncio.sleep(0.01)
        wire.session.stop()
        await protocol.done
        assert protocol.calls == ["made", ("lost", Stopped)]

    run(main())


def test_threads_do_not_mix_up_connections(wire: Wire) -> None:
    """All connections of an attachment share one exchange block and one transmit lane."""
    pairs = [wire.pair() for _ in range(8)]

    def talk(a: Any, b: Any) -> int:
        a.settimeout(30)
        b.settimeout(30)
        for i in range(100):
            data = os.urandom(100 + i)
            a.sendall(data)
            assert receive(b, len(data)) == data
            b.sendall(data[::-1])
            assert receive(a, len(data)) == data[::-1]
        return threading.get_ident()

    work = [in_thread(talk, a, b) for a, b in pairs]
    for thread, _ in work:
        thread.join(60)
    assert len({result[0] for _, result in work}) == 8
