"""TCP with blocking calls: what `Dataplane.tcp_listen` and `tcp_connect` give. Named and meant as in the socket module.

A connection's bytes are in two rings that this process shares with the workers. Receiving copies out of one and says
so; sending copies into the other; and each call runs the protocol for its connection when that is due (`tcp_run`). The
object holds no descriptor, and making and closing one says nothing to the supervisor.

One thread that receives and one that sends do not wait for each other; two that do the same take turns.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import socket
import struct
import threading
import time
import warnings
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from dataplane.client import drain, tcp_options, tcp_run
from dataplane.client.addresses import Address
from dataplane.client.session import Session
from dataplane.client.sockets import Socket
from dataplane.client.waiting import SLICE_NS, deadline_of
from dataplane.client.workbench import Slot, Workbench
from dataplane.control import messages
from dataplane.errors import DataplaneError, Stopped
from dataplane.shm import layout_tcp as T

__all__ = ["Connection", "Listener", "connection_of", "open_active"]

CHUNK = 1 << 18
"""Bytes that sendall copies before the protocol sees them."""

_LARGE = 1 << 14        # buffers of so many bytes are filled without a detour through the ring, if nothing is in it
_ENDED = -1             # a deadline: the dataplane has ended, and this is the last look
_DRIVE_OUT = 1.0        # seconds that close waits for threads in other calls
_FLAGS = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_ACCEPTED = struct.Struct("=qqqHHHxxQQQQ")
assert _ACCEPTED.size == T.A_BYTES and T.A_FAMILY == 24 and T.A_REMOTE_HI == 32
_DEFAULT: Any = object()


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _again() -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _host(family: int, hi: int, lo: int) -> str:
    if family == 4:
        return socket.inet_ntoa(lo.to_bytes(4, "big"))
    return socket.inet_ntop(socket.AF_INET6, (hi << 64 | lo).to_bytes(16, "big"))


class Connection:
    """A TCP connection. Made by `Listener.accept` and `Dataplane.tcp_connect`.

    What is not said here is as in the socket module. Errors: TimeoutError, BlockingIOError (with a timeout of 0),
    BrokenPipeError, ConnectionResetError, OSError(EBADF) when it is closed, and Stopped when the dataplane has ended.
    """

    type, proto = socket.SOCK_STREAM, socket.IPPROTO_TCP

    __slots__ = (
        "__weakref__", "_asleep", "_bench", "_bytes", "_call_place", "_conn", "_files", "_free", "_handle", "_linger",
        "_local", "_lock", "_mem", "_options", "_read", "_reading", "_receive_at", "_receive_bytes", "_remote",
        "_send_at", "_send_bytes", "_session", "_shut", "_timeout", "_told", "_unread", "_writing", "_written",
        "closed", "family", "transport",
    )

    def __init__(self, bench: Workbench, place: int, pcb: int, slot: Slot, family: int,
                 local: Address | None, remote: Address) -> None:
        self._bench, self._session, self._lock = bench, bench.session, bench.lock
        memory = bench.session.memory
        self._mem, self._bytes, self._call_place = memory.mem, memory.bytes, bench.place
        self._conn = place
        self._send_bytes, self._receive_bytes = slot.send_bytes, slot.receive_bytes
        self._send_at = place + slot.size - slot.send_bytes - slot.receive_bytes
        self._receive_at = place + slot.size - slot.receive_bytes
        self._local, self._remote = local, remote
        self.family = socket.AF_INET if family == 4 else socket.AF_INET6
        self._read = self._written = 1
        self._unread = 0            # bytes that were read and not given back yet
        self._free = 0              # bytes of the send ring that are certainly free
        self._timeout: float | None = None
        self._linger: float | None = None
        self._options: dict[str, Any] = {}
        self._shut = self._told = False
        self._files = self._asleep = 0
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self.transport: Any = None
        """The asyncio transport that this connection belongs to: it is not for blocking calls then."""
        self.closed = False
        """Whether `close` was called, here or for the whole attachment."""
        self._handle = bench.handle(place, pcb, family, slot)
        bench.connections.add(self)

    # -- the protocol ------------------------------------------------------------------------------------

    def _call(self, what: int, argument: int = 0) -> int:
        """One call of the kernel, without flags in its result."""
        return self._plain(self.run(what, argument))

    def _plain(self, code: int) -> int:
        """The result without flags; what they ask for is done."""
        if code >= tcp_run.FULL:
            if self.transport is not None:
                self.transport.ran(code)
            elif code & tcp_run.FULL:
                self._bench.push(self._handle, 0)
            code &= ~tcp_run.FLAGS
        return code

    def run(self, what: int, argument: int) -> int:
        """`tcp_run.call`, for this connection: for transports."""
        if self._session.over is not None:
            self._session.check()
        if self._bench.dropped:
            self._bench.sweep()
        with self._lock:
            if self.closed:
                raise OSError(errno.EBADF, "this connection is closed")
            return self._bench.call(self._mem, self._call_place, self._handle, what, argument)

    def _run_into(self, view: memoryview) -> int:
        """`run` with RECEIVE_INTO."""
        self._session.check()
        bench, unread = self._bench, self._unread
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        with self._lock:
            if self.closed:
                raise OSError(errno.EBADF, "this connection is closed")
            bench.buffer[0], bench.buffer[1] = address - bench.base, len(view)
            return bench.call(self._mem, self._call_place, self._handle, tcp_run.RECEIVE_INTO, unread)

    def _sleep(self, want: int, timeout: float | None, deadline: int | None) -> int:
        """Waits until there may be something, once; the deadline. `deadline` is None the first time."""
        if timeout == 0:
            raise _again()
        session = self._session
        if deadline is None:
            deadline = deadline_of(timeout)
        elif deadline == _ENDED:
            raise session.stopped()
        if session.ended():
            return _ENDED       # what was delivered before is found by one more look
        now = time.monotonic_ns()
        if now >= deadline:
            raise TimeoutError("timed out")
        with self._lock:
            if self.closed:
                raise OSError(errno.EBADF, "this connection is closed")
            self._asleep += 1
        try:
            self._bench.wait(self._mem, self._handle, want, session.spin_ns, min(deadline, now + SLICE_NS))
        finally:
            with self._lock:
                self._asleep -= 1
        return deadline

    def _turn(self, lock: threading.Lock) -> None:
        """Takes the reader's or the writer's turn."""
        if not lock.acquire(False):
            if self._timeout == 0:
                raise _again()
            if not lock.acquire(timeout=-1 if self._timeout is None else min(self._timeout, threading.TIMEOUT_MAX)):
                raise TimeoutError("timed out: another thread is at it")

    # -- receiving ---------------------------------------------------------------------------------------

    def recv(self, size: int, flags: int = 0) -> bytes:
        """At most `size` bytes, at least one; b"" at the end. `flags`: MSG_PEEK, MSG_DONTWAIT."""
        if size < 0:
            raise ValueError("negative buffersize in recv")
        self._turn(self._reading)
        try:
            count = min(self._have(flags), size)
            data = self.copy_out(count)
            if not flags & socket.MSG_PEEK:
                self.took(count)
            return data
        finally:
            self._reading.release()

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As `recv`, into a writable buffer: the number of bytes; 0 at the end."""
        view = memoryview(buffer).cast("B")
        if nbytes < 0 or nbytes > len(view):
            raise ValueError("nbytes is negative, or larger than the buffer")
        if nbytes:
            view = view[:nbytes]
        self._turn(self._reading)
        try:
            if len(view) >= _LARGE and not flags & socket.MSG_PEEK:
                count = self._have(flags, view)
                if count < 0:
                    return -count       # it is there already
            else:
                count = self._have(flags)
            count = min(count, len(view))
            self.copy_into(view, count)
            if not flags & socket.MSG_PEEK:
                self.took(count)
            return count
        finally:
            self._reading.release()

    def _have(self, flags: int, view: memoryview | None = None) -> int:
        """Bytes that can be read: waits for one. 0: none will come. Negative: so many have come straight into
        `view`, and are read."""
        if flags & ~_FLAGS:
            raise OSError(errno.EOPNOTSUPP, f"flags {flags:#x}: only MSG_PEEK and MSG_DONTWAIT")
        timeout = 0 if flags & socket.MSG_DONTWAIT else self._timeout
        deadline = None
        while True:
            raw = self.run(tcp_run.RECEIVE, self._unread) if view is None else self._run_into(view)
            code = self._plain(raw)
            self._unread = 0
            if code > 0:
                if raw & tcp_run.DIRECT:
                    self._read += code
                    return -code
                return code
            if code < 0:
                if code != tcp_run.END:
                    self.tell(-code)
                return 0
            if self._shut:
                return 0
            deadline = self._sleep(tcp_run.READ, timeout, deadline)

    def tell(self, number: int) -> None:
        """Raises what has ended the connection, the first time."""
        if not self._told:
            self._told = True
            raise _error(number)

    def copy_out(self, count: int) -> bytes:
        """The next `count` bytes, which are there."""
        start = self._read & (self._receive_bytes - 1)
        first = self._receive_at + start
        if start + count <= self._receive_bytes:
            return self._bytes[first:first + count].tobytes()
        rest = start + count - self._receive_bytes
        end = self._receive_at + self._receive_bytes
        return b"".join((self._bytes[first:end], self._bytes[self._receive_at:self._receive_at + rest]))

    def copy_into(self, view: memoryview, count: int) -> None:
        """The same, into `view`."""
        start = self._read & (self._receive_bytes - 1)
        first = self._receive_at + start
        whole = min(count, self._receive_bytes - start)
        view[:whole] = self._bytes[first:first + whole]
        if whole < count:
            view[whole:count] = self._bytes[self._receive_at:self._receive_at + count - whole]

    def took(self, count: int) -> None:
        """`count` bytes were copied out. Their room is given back with the next call, or now if it is much."""
        self._read += count
        self._unread += count
        if self._unread >= self._receive_bytes >> 2:
            count, self._unread = self._unread, 0
            self._call(tcp_run.RELEASE, count)

    def owed(self) -> int:
        """Bytes that are to be given back with the next call, which is the caller's."""
        count, self._unread = self._unread, 0
        return count

    # -- sending -----------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0) -> int:
        """Sends what there is room for, at least one byte; how many."""
        view = data if isinstance(data, bytes | bytearray) else memoryview(data).cast("B")
        self._turn(self._writing)
        try:
            count, _ = self._send(view, 0, len(view), flags, None)
            return count
        finally:
            self._writing.release()

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Sends all of it. After an error nobody knows how much was sent."""
        view = data if isinstance(data, bytes | bytearray) else memoryview(data).cast("B")
        size = len(view)
        self._turn(self._writing)
        try:
            deadline: int | None = None
            at, deadline = self._send(view, 0, size, flags, deadline)
            if at < size:
                view = memoryview(view)
            while at < size:
                count, deadline = self._send(view, at, size, flags, deadline)
                at += count
        finally:
            self._writing.release()

    def _send(self, view: Any, at: int, size: int, flags: int, deadline: int | None) -> tuple[int, int | None]:
        """Sends a piece of view[at:size]: how much, and the deadline. Waits for room for it, or for a third of
        the ring."""
        if flags & ~_FLAGS:
            raise OSError(errno.EOPNOTSUPP, f"flags {flags:#x}: only MSG_DONTWAIT and MSG_NOSIGNAL")
        timeout = 0 if flags & socket.MSG_DONTWAIT else self._timeout
        count = min(size - at, CHUNK)
        enough = min(count, self._send_bytes // 3)
        while self._free < enough:
            self._free = self._room(self._call(tcp_run.ROOM, enough))
            if self._free < enough:
                if timeout == 0 and self._free:
                    break
                deadline = self._sleep(tcp_run.WRITE, timeout, deadline)
        count = min(count, self._free)
        self.copy_in(view if count == len(view) else memoryview(view)[at:at + count], count)
        self._free = self._room(self._call(tcp_run.WROTE, count))
        self._written += count
        return count, deadline

    def copy_in(self, data: Any, count: int) -> None:
        """Into the send ring, where there is room for it."""
        start = self._written & (self._send_bytes - 1)
        first = self._send_at + start
        whole = self._send_bytes - start
        if count <= whole:
            self._bytes[first:first + count] = data
            return
        view = memoryview(data)
        self._bytes[first:first + whole] = view[:whole]
        self._bytes[self._send_at:self._send_at + count - whole] = view[whole:]

    def _room(self, code: int) -> int:
        """What ROOM and WROTE said, or an error."""
        if code >= 0:
            return code
        if code == tcp_run.STOPPED:
            raise self._session.stopped()
        if code != -errno.EPIPE:
            self.tell(-code)
        raise _error(errno.EPIPE)

    def write_now(self, data: Any, count: int) -> int:
        """Puts as much of `data`, `count` bytes, into the send ring as there is room for: how much."""
        if self._free < count:
            self._free = self._room(self._call(tcp_run.ROOM, min(count, self._send_bytes // 3)))
            count = min(count, self._free)
            if not count:
                return 0
        self.copy_in(data if count == len(data) else memoryview(data)[:count], count)
        self._free = self._room(self._call(tcp_run.WROTE, count))
        self._written += count
        return count

    # -- files -------------------------------------------------------------------------------------------

    def makefile(self, mode: str = "r", buffering: int | None = None, *, encoding: str | None = None,
                 errors: str | None = None, newline: str | None = None) -> Any:
        """A file object on the connection, as `socket.socket.makefile`. The connection ends when it and all of its
        files are closed."""
        if not set(mode) <= {"r", "w", "b"}:
            raise ValueError(f"invalid mode {mode!r} (only r, w, b allowed)")
        writing = "w" in mode
        reading = "r" in mode or not writing
        binary = "b" in mode
        raw = _File(self, reading, writing)
        self._files += 1
        if buffering is None or buffering < 0:
            buffering = io.DEFAULT_BUFFER_SIZE
        if buffering == 0:
            if not binary:
                raise ValueError("unbuffered streams must be binary")
            return raw
        buffer: Any
        if reading and writing:
            buffer = io.BufferedRWPair(raw, raw, buffering)
        elif reading:
            buffer = io.BufferedReader(raw, buffering)
        else:
            buffer = io.BufferedWriter(raw, buffering)
        if binary:
            return buffer
        return io.TextIOWrapper(buffer, io.text_encoding(encoding), errors, newline)

    def file_closed(self) -> None:
        """One of makefile's is closed."""
        self._files -= 1
        if self._files < 0:         # `close` was called before: it counts as one
            self._close(T.REQ_CLOSED)

    # -- addresses, timeouts, options --------------------------------------------------------------------

    def getpeername(self) -> Address:
        """(host, port) of the peer."""
        return self._remote

    def getsockname(self) -> Address:
        """(host, port) here."""
        return self._local or ("", 0)

    def settimeout(self, timeout: float | None) -> None:
        """Seconds that a call may wait. None: for ever; 0: not at all."""
        if timeout is not None and not timeout >= 0:
            raise ValueError("Timeout value out of range")
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        """See settimeout."""
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        """settimeout(None) or settimeout(0)."""
        self._timeout = None if flag else 0.0

    def getblocking(self) -> bool:
        """Whether calls may wait."""
        return self._timeout != 0

    def setsockopt(self, option: str | int, number: Any, value: Any = _DEFAULT) -> None:
        """By name, setsockopt("nodelay", True), or as in the socket module, setsockopt(level, option, value). See
        docs/client.md. OSError(ENOPROTOOPT) for others."""
        if value is _DEFAULT:
            name, value = tcp_options.name_of(option, None), number
        else:
            name = tcp_options.name_of(option, number)
            value = tcp_options.plain_value(name, value)
        self.apply({name: tcp_options.checked(name, value)})
        self._call(tcp_run.POKE, 1)

    def apply(self, options: dict[str, Any]) -> None:
        """Sets options whose values were checked."""
        with self._lock:
            if self.closed:
                raise OSError(errno.EBADF, "this connection is closed")
            words = self._bytes[self._conn:self._conn + T.CONN_BLOCKS].cast("q")
            for name, value in options.items():
                self._options[name] = value
                if name in tcp_options.TIMES:
                    word, unit = tcp_options.TIMES[name]
                    words[word // 8] = int(value * unit)
                elif name == "linger":
                    self._linger = value
            if self._options.get("keepalive"):
                for name, default in tcp_options.KEEPALIVE.items():
                    word, unit = tcp_options.TIMES[name]
                    words[word // 8] = words[word // 8] or default * unit
            bits = sum(bit for name, bit in tcp_options.BITS.items() if self._options.get(name))
            words[T.CONN_OPTIONS // 8] = bits | tcp_options.CONGESTION[self._options.get("congestion", "cubic")]

    def getsockopt(self, option: str | int, number: int | None = None, buflen: int = 0) -> Any:
        """By name, or as in the socket module. "info" is a dict of what the protocol knows."""
        name = tcp_options.name_of(option, number)
        value = self._option(name)
        return value if number is None else tcp_options.number_value(name, value)

    def _option(self, name: str) -> Any:
        if name == "info":
            return tcp_options.info(self._facts(), self._read)
        if name == "maxseg":
            return tcp_options.info(self._facts(), 0)["mss"]
        if name == "error":
            number = self._facts()[T.CONN_STATUS // 8] >> T.ST_ERRNO
            told, self._told = self._told, self._told or number != 0
            return 0 if told else number
        fixed = {"type": socket.SOCK_STREAM, "sndbuf": self._send_bytes, "rcvbuf": self._receive_bytes,
                 "acceptconn": False, "linger": self._linger}
        default = fixed.get(name, tcp_options.KEEPALIVE.get(name, "cubic" if name == "congestion" else 0))
        return self._options.get(name, default)

    def _facts(self) -> list[int]:
        words = np.empty((T.CONN_BLOCKS + T.TCB_BYTES) // 8, np.int64)
        with self._lock:
            if self.closed:
                raise OSError(errno.EBADF, "this connection is closed")
            tcp_run.facts(self._mem, self._handle, words)
        return words.tolist()

    # -- the end -----------------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """SHUT_WR: what was written still goes, then the end. SHUT_RD: receives nothing that is not here yet."""
        if how not in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if how != socket.SHUT_RD:
            self._call(tcp_run.REQUEST, T.REQ_SHUTDOWN)
        if how != socket.SHUT_WR:
            self._shut = True
            tcp_run.wake(self._mem, self._handle)

    def close(self) -> None:
        """Closes the connection: what was written still goes, also when the process ends. Threads that wait in it
        get OSError(EBADF). May be called again."""
        if self._files:
            self._files -= 1        # the last file closes it
            return
        self._close(T.REQ_CLOSED)

    def abort(self) -> None:
        """Closes the connection with a reset; what was not sent yet is not."""
        self._close(T.REQ_ABORT | T.REQ_CLOSED)

    def detach(self) -> None:
        """`close` without waiting, for the end of the attachment."""
        if self.transport is not None:
            self.transport.detach()
        self.let_go()

    def let_go(self) -> None:
        """`close` without waiting."""
        self._linger = None
        self._close(T.REQ_CLOSED)

    def _close(self, bits: int) -> None:
        if not self.closed and self._linger is not None and bits == T.REQ_CLOSED:
            bits = self._wait_sent(self._linger)
        with self._lock:
            if self.closed:
                return
            self.closed = True
            count, self._unread = self._unread, 0
        self._drive_out()
        session = self._session
        if session.over is not None:
            return
        with self._lock:
            if count:
                self._bench.call(self._mem, self._call_place, self._handle, tcp_run.RELEASE, count)
            # From here on the slot may be another connection's at any time: it is not looked at any more.
            code = self._bench.call(self._mem, self._call_place, self._handle, tcp_run.REQUEST, bits)
        if code & tcp_run.FULL:
            self._bench.push(self._handle, 1)

    def _drive_out(self) -> None:
        """Returns when no other thread is in the slot."""
        end = time.monotonic() + _DRIVE_OUT
        while self._asleep and time.monotonic() < end:
            tcp_run.wake(self._mem, self._handle)
            time.sleep(0)

    def _wait_sent(self, seconds: float) -> int:
        """SO_LINGER: waits until all is acknowledged. REQ_ABORT if that takes too long."""
        if seconds == 0:
            return T.REQ_ABORT | T.REQ_CLOSED
        try:
            self._call(tcp_run.REQUEST, T.REQ_SHUTDOWN)
            deadline: int | None = deadline_of(seconds)
            while True:
                words = self._facts()
                ended = words[T.CONN_STATUS // 8] >> T.ST_ERRNO or not words[T.CONN_STATUS // 8] & 0xFF
                if ended or words[T.CONN_ACKED // 8] >= self._written:
                    return T.REQ_CLOSED
                deadline = self._sleep(tcp_run.SENT, seconds, deadline)
                self._call(tcp_run.POKE, 0)
        except TimeoutError:
            return T.REQ_ABORT | T.REQ_CLOSED
        except (OSError, DataplaneError):
            return T.REQ_CLOSED

    def begin(self, initial: int) -> None:
        """Sends the SYN; `initial`: see X_RANDOM."""
        with self._lock:
            self._bench.random[0] = initial
            code = self._bench.call(self._mem, self._call_place, self._handle, tcp_run.REQUEST, T.REQ_OPEN)
        if code & tcp_run.FULL:
            self._bench.push(self._handle, 1)

    def await_open(self, deadline: int) -> None:
        """Returns when the connection is open. TimeoutError at the deadline; what the peer or the network said."""
        while not self.opened(self._call(tcp_run.STATUS)):
            self._sleep(tcp_run.OPEN, None, deadline)

    def opened(self, status: int) -> bool:
        """Whether it is open, by its CONN_STATUS. Raises why it never will be."""
        if status >> T.ST_ERRNO:
            self._told = True
            raise _error(status >> T.ST_ERRNO)
        return status & 0xFF not in (T.CLOSED, T.SYN_SENT, T.SYN_RECEIVED)

    @property
    def handle(self) -> int:
        """See `tcp_run`."""
        return self._handle

    @property
    def words(self) -> memoryview:
        """The application's and the protocol's words, int64."""
        return self._bytes[self._conn:self._conn + T.CONN_BLOCKS].cast("q")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if (handle := getattr(self, "_handle", 0)) == 0:
            return
        closed = self.closed or self._session.over is not None
        if not closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        self._bench.drop(handle, closed)

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<Connection {self.getsockname()} to {self._remote}{state}>"


class _File(io.RawIOBase):
    """What makefile's objects read and write."""

    def __init__(self, connection: Connection, reading: bool, writing: bool) -> None:
        self._connection: Connection | None = connection
        self._reading, self._writing = reading, writing

    def _open(self) -> Connection:
        if self._connection is None:
            raise ValueError("I/O operation on closed file")
        return self._connection

    def readable(self) -> bool:
        return self._reading and not self.closed

    def writable(self) -> bool:
        return self._writing and not self.closed

    def readinto(self, buffer: Any) -> int | None:
        try:
            return self._open().recv_into(buffer)
        except BlockingIOError:
            return None

    def write(self, data: Any) -> int | None:
        try:
            return self._open().send(data)
        except BlockingIOError:
            return None

    def close(self) -> None:
        if not self.closed:
            super().close()
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.file_closed()


class _Queue(Socket[None]):
    """A listener's lanes: records of connections to be accepted."""

    kind = "tcp"

    def __init__(self, session: Session, bound: messages.Bound) -> None:
        super().__init__(session, bound, None)
        # One at a time: what is looked at counts as waiting, and the backlog must not.
        self._records = np.empty((drain.REC_FIELDS, 1), np.int64)

    def _addresses_of(self, count: int) -> list[None]:
        return [None] * count


class Listener:
    """A listening TCP socket. Made by `Dataplane.tcp_listen`."""

    type, proto = socket.SOCK_STREAM, socket.IPPROTO_TCP

    def __init__(self, bench: Workbench, bound: messages.Bound) -> None:
        self._bench, self._bound = bench, bound
        with bench.session.lock:
            self.queue = _Queue(bench.session, bound)
        self._slot = Slot(bench.session.attached.workers, bound.lane_bytes, bound.send_bytes, bound.receive_bytes)
        self._timeout: float | None = None
        self._options: dict[str, Any] = {}

    @property
    def session(self) -> Session:
        """The attachment's."""
        return self._bench.session

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6; AF_UNSPEC for both."""
        if not self._bound.address:
            return socket.AF_UNSPEC
        return socket.AF_INET6 if ":" in self._bound.address else socket.AF_INET

    @property
    def closed(self) -> bool:
        """Whether `close` was called, here or for the whole attachment."""
        return self.queue.closed

    @property
    def address(self) -> tuple[str, int | None]:
        """(host, port) here: host "" for every address."""
        return self.queue.address

    def getsockname(self) -> Address:
        """(host, port) here: host "" for every address."""
        return self._bound.address or "", self._bound.port or 0

    def accept(self, timeout: float | None = _DEFAULT) -> tuple[Connection, Address]:
        """The next connection, and its peer's (host, port). `timeout` in seconds; without it, settimeout's.
        TimeoutError, or BlockingIOError if it is 0 by settimeout; Stopped; OSError(EBADF)."""
        record = None
        if timeout is _DEFAULT:
            timeout = self._timeout
            if timeout == 0:
                if not self.queue.has_packets() and not self.session.ended():
                    self.queue.check()
                    raise _again()
        while record is None:
            record = self.queue.recv(timeout)
        connection = self._connection(record)
        return connection, connection.getpeername()

    def _connection(self, record: bytes) -> Connection:
        pcb, number, offset, family, remote_port, local_port, *words = _ACCEPTED.unpack(record)
        place = self._bench.place_of(number, offset, self._slot.size)
        local = (_host(family, words[2], words[3]), local_port)
        remote = (_host(family, words[0], words[1]), remote_port)
        connection = Connection(self._bench, place, pcb, self._slot, family, local, remote)
        if self._options:
            connection.apply(self._options)
        return connection

    async def accept_async(self) -> tuple[Connection, Address]:
        """As `accept`, in an event loop. `async for connection, address in listener` does it again and again."""
        from dataplane.client.events import event_source
        while True:
            ended = self.session.ended()
            self.queue.check()
            if self.queue.has_packets():
                return self.accept(0)
            if ended:
                raise self.session.stopped()
            await event_source(self.session).wait(self.queue)

    async def __aiter__(self) -> AsyncIterator[tuple[Connection, Address]]:
        """Connections until the listener is closed or the dataplane ends."""
        while True:
            try:
                accepted = await self.accept_async()
            except (Stopped, DataplaneError):
                return
            except OSError:
                if self.closed:
                    return
                raise
            yield accepted

    def settimeout(self, timeout: float | None) -> None:
        """Seconds that accept may wait. None: for ever; 0: not at all."""
        if timeout is not None and not timeout >= 0:
            raise ValueError("Timeout value out of range")
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        """See settimeout."""
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        """settimeout(None) or settimeout(0)."""
        self._timeout = None if flag else 0.0

    def setsockopt(self, option: str | int, number: Any, value: Any = _DEFAULT) -> None:
        """As a connection's: for the connections that are accepted from now on."""
        if value is _DEFAULT:
            name, value = tcp_options.name_of(option, None), number
        else:
            name = tcp_options.name_of(option, number)
            value = tcp_options.plain_value(name, value)
        self._options[name] = tcp_options.checked(name, value)

    def getsockopt(self, option: str | int, number: int | None = None, buflen: int = 0) -> Any:
        """What setsockopt has set."""
        name = tcp_options.name_of(option, number)
        fixed = {"type": socket.SOCK_STREAM, "acceptconn": True, "sndbuf": self._slot.send_bytes,
                 "rcvbuf": self._slot.receive_bytes, "linger": None, "congestion": "cubic"}
        if name in ("info", "maxseg"):
            raise tcp_options.unknown(f"{name} of a listener")
        value = self._options.get(name, fixed.get(name, tcp_options.KEEPALIVE.get(name, 0)))
        return value if number is None else tcp_options.number_value(name, value)

    def close(self) -> None:
        """Closes the listener. Connections that nobody has accepted are reset; the others go on."""
        self.queue.close()

    def __enter__(self) -> Listener:
        self.queue.check()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        host, port = self.getsockname()
        return f"<Listener {host or '*'}:{port}{' closed' if self.closed else ''}>"


# -- the other way in --------------------------------------------------------------------------------------


def connection_of(bench: Workbench, bound: messages.Bound, remote: Address) -> Connection:
    """The connection that a tcp_connect request has made a slot for. Nothing was sent yet."""
    slot = Slot(bench.session.attached.workers, bound.lane_bytes, bound.send_bytes, bound.receive_bytes)
    place = bench.place_of(bound.number, bound.slot, slot.size)
    family = 6 if ":" in remote[0] else 4
    words = bench.session.memory.bytes[place:place + T.CONN_LANES].cast("q")
    for block in (T.CONN_BLOCKS, T.CONN_BLOCKS + T.TCB_BYTES):      # what opening starts from
        words[(block + T.T_MTU) // 8] = bound.mtu or 1500
        words[(block + T.T_IP_BYTES) // 8] = 20 if family == 4 else 40
    words[T.CONN_READ // 8] = words[T.CONN_WRITTEN // 8] = 1
    local = None if bound.address is None else (bound.address, bound.port or 0)
    pcb = bound.pcb | (bound.generation & 0xFFFFFFFF) << 32
    if pcb >> 63:
        pcb -= 1 << 64
    return Connection(bench, place, pcb, slot, family, local, remote)


def open_active(bench: Workbench, connection: Connection) -> None:
    """Sends the SYN. RFC 6528: the initial sequence number is a keyed hash of both ends plus a clock of 4 µs."""
    ends = repr((connection.getsockname(), connection.getpeername())).encode()
    digest = hashlib.blake2b(ends, key=bench.secret, digest_size=8).digest()
    upper, lower = struct.unpack("=iI", digest)
    initial = upper << 32 | (lower + time.monotonic_ns() // 4000) & 0xFFFFFFFF
    connection.begin(initial)
