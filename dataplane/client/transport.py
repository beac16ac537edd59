"""asyncio over TCP connections: transports, and servers that make them.

A transport is registered with its loop's bell (`events`) for as long as it lives. When nothing is to be done it arms
its connection's wake object, in the same jitted call that looks once more; when the bell has rung for it, it takes a
turn: receives up to a bound, hands that to its protocol, sends what is left over, arms again. An idle connection costs
nothing. `write` puts the bytes into the send ring at once; what finds no room there is the transport's buffer,
to which the water marks apply.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import warnings
from asyncio import constants, transports
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dataplane.client import tcp_run
from dataplane.client.events import EventSource, event_source
from dataplane.client.tcp import Connection, Listener
from dataplane.errors import DataplaneError, Stopped
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T

__all__ = ["Server", "TCPTransport", "await_open"]

MOST = 1 << 18
"""Bytes that one transport receives before others have their turn: as asyncio's own."""

ACCEPTS = 64
"""Connections that a server accepts before others have their turn."""

_RETRY = 0.001          # seconds until a run is tried again for which the transmit lane had no room


class TCPTransport(transports._FlowControlMixin, asyncio.Transport):
    """An asyncio.Transport. Extra information: peername, sockname, and socket, the `Connection` (for its addresses and
    options; data passed by would be missed here)."""

    # What asyncio asks for before it does sendfile and start_tls over a transport that is not its own.
    _sendfile_compatible = constants._SendfileMode.FALLBACK
    _start_tls_compatible = True

    if TYPE_CHECKING:       # of asyncio's own base class, which does the flow control for all transports
        _loop: asyncio.AbstractEventLoop

        def _maybe_pause_protocol(self) -> None: ...
        def _maybe_resume_protocol(self) -> None: ...

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: Connection, protocol: asyncio.BaseProtocol,
                 waiter: asyncio.Future[None] | None = None) -> None:
        super().__init__({"peername": connection.getpeername(), "sockname": connection.getsockname(),
                          "socket": connection}, loop)
        self._connection = connection
        self._server: Server | None = None
        self._pieces: deque[Any] = deque()
        self._buffered = 0
        self._paused = self._closing = self._eof_written = self._eof_seen = self._lost = False
        self._scheduled: asyncio.Handle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self.set_protocol(protocol)
        connection.settimeout(0)
        connection.transport = self
        connection.apply({"nodelay": True})     # as asyncio does
        self._source: EventSource = event_source(connection._session)
        self._number = self._source.enter(self._rung)
        self._prepare()
        loop.call_soon(self._made, waiter)

    def _prepare(self) -> None:
        memory, wake = self._source.session.memory, self._connection.words
        wake[(T.CONN_WAKE + L.WAKE_EVENT) // 8] = self._source.number
        self._mem, self._handle = memory.mem, self._connection.handle
        entry = memory.bytes[self._handle:self._handle + tcp_run.HANDLE_BYTES].cast("q")
        entry[tcp_run.H_ENTRY // 8] = self._source.place(self._number)

    def _made(self, waiter: asyncio.Future[None] | None) -> None:
        if not self._lost:
            self._guard(self._protocol.connection_made, self)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        self._turn()

    def _guard(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls the protocol; what it raises ends the connection."""
        try:
            return function(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fatal(error, f"Fatal error: protocol.{function.__name__}() call failed.")
            return None

    # -- turns -------------------------------------------------------------------------------------------

    def _rung(self) -> None:
        """The bell has rung for us, or the dataplane may have ended."""
        self._turn()

    def _soon(self) -> None:
        if self._scheduled is None and not self._lost:
            self._scheduled = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Does what there is to do, then waits for more."""
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        if self._lost:
            return
        try:
            more = self._receive()
            if not self._lost and self._buffered:
                self._flush()
            if not self._lost:
                self._wait(more)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fatal(error, "Fatal error on transport")

    def _wait(self, more: bool) -> None:
        """Arms the connection, unless there is more to do right now, or nothing that could come is wanted."""
        if more:
            self._soon()
            return
        want = 0 if self._deaf() else tcp_run.READ
        if self._buffered:
            want |= tcp_run.WRITE
        if want and tcp_run.arm(self._mem, self._handle, want):
            self._soon()

    def _deaf(self) -> bool:
        """Whether nothing is to be handed to the protocol."""
        return self._paused or self._eof_seen or self._closing

    def _receive(self) -> bool:
        """Hands received bytes to the protocol; whether there may be more."""
        connection, left = self._connection, MOST
        while left > 0:
            if self._deaf():
                self._look()
                return False
            code = connection.run(tcp_run.RECEIVE, connection.owed())
            if code >= tcp_run.FULL:
                self.ran(code & ~tcp_run.SWITCH)
                code &= ~tcp_run.FLAGS
            if code > 0:
                left -= self._deliver(min(code, MOST))
            elif code == tcp_run.END:
                self._end()
            elif code < 0:
                connection.tell(-code)
                self._force(None)
            else:
                self._check_ended()
                return False
            if self._lost:
                return False
        return True

    def _look(self) -> None:
        """Lets the protocol work while nothing is to be received. A reset is told if no bytes are in front of it
        that the protocol may still ask for."""
        code = self._connection.run(tcp_run.STATUS, 0)
        if code >= tcp_run.FULL:
            self.ran(code & ~tcp_run.SWITCH)
            code &= ~tcp_run.FLAGS
        if code >> T.ST_ERRNO and (self._eof_seen or self._closing):
            self._connection.tell(code >> T.ST_ERRNO)
            self._force(None)
        else:
            self._check_ended()

    def _deliver(self, count: int) -> int:
        connection = self._connection
        if not self._buffered_protocol:
            data = connection.copy_out(count)
            connection.took(count)
            self._guard(self._protocol.data_received, data)     # type: ignore[attr-defined]
            return count
        buffer = self._guard(self._protocol.get_buffer, count)  # type: ignore[attr-defined]
        if buffer is None or self._lost:
            return count
        view = memoryview(buffer).cast("B")
        if not len(view):
            raise RuntimeError("get_buffer() returned an empty buffer")
        count = min(count, len(view))
        connection.copy_into(view, count)
        connection.took(count)
        self._guard(self._protocol.buffer_updated, count)       # type: ignore[attr-defined]
        return count

    def _end(self) -> None:
        """The peer has sent its FIN."""
        self._eof_seen = True
        keep_open = self._guard(self._protocol.eof_received)    # type: ignore[attr-defined]
        if not keep_open and not self._lost:
            self.close()

    def _check_ended(self) -> None:
        session = self._source.session
        if session.over is not None:
            self._force(DataplaneError(session.over))
        elif session.ended():
            self._force(session.stopped())

    def ran(self, code: int) -> None:
        """Flags of a run of the protocol: it may have found what this transport waits for."""
        if code >= tcp_run.FULL:
            if code & tcp_run.SWITCH:
                self._soon()
            if code & tcp_run.FULL and self._retry is None:
                self._retry = self._loop.call_later(_RETRY, self._again)

    def _again(self) -> None:
        self._retry = None
        if not self._lost and self._source.session.over is None:
            self.ran(self._connection.run(tcp_run.POKE, 1))

    # -- reading -----------------------------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """See asyncio."""
        self._protocol = protocol
        self._buffered_protocol = isinstance(protocol, asyncio.BufferedProtocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """See asyncio."""
        return self._protocol

    def is_reading(self) -> bool:
        """See asyncio."""
        return not self._closing and not self._paused

    def pause_reading(self) -> None:
        """See asyncio."""
        if not self._closing:
            self._paused = True

    def resume_reading(self) -> None:
        """See asyncio."""
        if self._paused and not self._closing:
            self._paused = False
            self._soon()

    # -- writing -----------------------------------------------------------------------------------------

    def write(self, data: Any) -> None:
        """See asyncio."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        size = len(data) if not isinstance(data, memoryview) else data.nbytes
        if self._lost or not size:
            return
        view: Any = data.cast("B") if isinstance(data, memoryview) else data
        sent = 0
        if not self._buffered:
            try:
                sent = self._send(view, size)
            except (OSError, Stopped, DataplaneError) as error:
                self._fatal(error, "Fatal write error on transport")
                return
            if sent == size:
                return
        # A copy: the caller may change its buffer.
        self._pieces.append(bytes(memoryview(view)[sent:]) if sent or not isinstance(data, bytes) else data)
        self._buffered += size - sent
        self._soon()
        self._maybe_pause_protocol()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """See asyncio."""
        self.write(b"".join(list_of_data))

    def _send(self, data: Any, size: int) -> int:
        """Into the send ring, as much as there is room for."""
        done = 0
        while done < size:
            count = self._connection.write_now(data if not done else memoryview(data)[done:], size - done)
            if not count:
                break
            done += count
        return done

    def _flush(self) -> None:
        pieces = self._pieces
        while pieces:
            piece = pieces[0]
            size = len(piece)
            sent = self._send(piece, size)
            self._buffered -= sent
            if sent < size:
                if sent:
                    pieces[0] = memoryview(piece)[sent:]
                break
            pieces.popleft()
        self._maybe_resume_protocol()
        if not self._buffered:
            if self._closing:
                self._finish(None)
            elif self._eof_written:
                self.ran(self._connection.run(tcp_run.REQUEST, T.REQ_SHUTDOWN))

    def get_write_buffer_size(self) -> int:
        """Bytes that wait for room in the send ring."""
        return self._buffered

    def write_eof(self) -> None:
        """See asyncio."""
        if self._closing or self._eof_written:
            return
        self._eof_written = True
        if not self._buffered and not self._lost:
            self.ran(self._connection.run(tcp_run.REQUEST, T.REQ_SHUTDOWN))

    def can_write_eof(self) -> bool:
        """True."""
        return True

    # -- the end -----------------------------------------------------------------------------------------

    def is_closing(self) -> bool:
        """See asyncio."""
        return self._closing

    def close(self) -> None:
        """See asyncio: what was written still goes."""
        if self._closing:
            return
        self._closing = True
        if not self._buffered:
            self._finish(None)

    def abort(self) -> None:
        """See asyncio: a reset."""
        self._force(None)

    def detach(self) -> None:
        """The attachment ends, and the connection is being closed."""
        if not self._lost and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._force, None)

    def _fatal(self, error: BaseException, message: str) -> None:
        if not isinstance(error, OSError | Stopped | DataplaneError):
            self._loop.call_exception_handler(
                {"message": message, "exception": error, "transport": self, "protocol": self._protocol})
        self._force(error)

    def _force(self, error: BaseException | None) -> None:
        """The end at once."""
        self._pieces.clear()
        self._buffered = 0
        self._closing = True
        self._finish(error, abort=True)

    def _finish(self, error: BaseException | None, abort: bool = False) -> None:
        """Takes leave of the connection; the protocol hears of it in the loop's next round."""
        if self._lost:
            return
        self._lost = True
        for handle in (self._scheduled, self._retry):
            if handle is not None:
                handle.cancel()
        self._source.leave(self._number)
        with contextlib.suppress(OSError, DataplaneError):
            if abort or self._connection.getsockopt("linger") == 0:
                self._connection.abort()
            else:
                self._connection.let_go()
        self._loop.call_soon(self._report, error)

    def _report(self, error: BaseException | None) -> None:
        try:
            if not isinstance(error, Exception | None):
                error = ConnectionAbortedError(errno.ECONNABORTED, str(error))
            self._protocol.connection_lost(error)
        finally:
            self._connection.transport = None
            if self._server is not None:
                self._server.detach(self)
                self._server = None

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if not getattr(self, "_lost", True):
            _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)

    def __repr__(self) -> str:
        state = "closed" if self._lost else "closing" if self._closing else "open"
        return f"<TCPTransport {state} {self._connection!r}>"


async def await_open(connection: Connection) -> None:
    """Returns when a connection is open whose SYN was sent."""
    source = event_source(connection._session)
    loop = asyncio.get_running_loop()
    state: list[asyncio.Future[None]] = [loop.create_future()]

    def rung() -> None:
        if not state[0].done():
            state[0].set_result(None)

    number = source.enter(rung)
    memory = source.session.memory
    try:
        connection.words[(T.CONN_WAKE + L.WAKE_EVENT) // 8] = source.number
        handle = memory.bytes[connection.handle:connection.handle + tcp_run.HANDLE_BYTES].cast("q")
        handle[tcp_run.H_ENTRY // 8] = source.place(number)
        while not connection.opened(connection.run(tcp_run.STATUS, 0) & ~tcp_run.FLAGS):
            if source.session.ended():
                raise source.session.stopped()
            state[0] = loop.create_future()
            if not tcp_run.arm(memory.mem, connection.handle, tcp_run.OPEN):
                await state[0]
    finally:
        source.leave(number)


class Server(asyncio.AbstractServer):
    """Accepts connections for a protocol factory, as asyncio's own server does."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: Listener,
                 factory: Callable[[], asyncio.BaseProtocol]) -> None:
        self._loop, self._listener, self._factory = loop, listener, factory
        self._transports: set[TCPTransport] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._waiters: list[asyncio.Future[None]] | None = []
        self._forever: asyncio.Future[None] | None = None

    @property
    def sockets(self) -> tuple[Listener, ...]:
        """The listener; nothing when the server is closed."""
        return () if self._listener.closed else (self._listener,)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """See asyncio."""
        return self._loop

    def is_serving(self) -> bool:
        """See asyncio."""
        return self._accepting is not None and not self._listener.closed

    async def start_serving(self) -> None:
        """See asyncio."""
        self._start()
        await asyncio.sleep(0)

    def _start(self) -> None:
        if self._accepting is None and not self._listener.closed:
            self._accepting = self._loop.create_task(self._accept())

    async def _accept(self) -> None:
        number = 0
        async for connection, _ in self._listener:
            try:
                transport = TCPTransport(self._loop, connection, self._factory())
            except Exception as error:
                connection.abort()
                self._loop.call_exception_handler(
                    {"message": "Error on transport creation for incoming connection", "exception": error})
                continue
            transport._server = self
            self._transports.add(transport)
            number += 1
            if number % ACCEPTS == 0:
                await asyncio.sleep(0)

    async def serve_forever(self) -> None:
        """See asyncio: until it is cancelled, or the server is closed. Stopped when the dataplane ends."""
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        if self._listener.closed:
            raise RuntimeError(f"server {self!r} is closed")
        self._start()
        self._forever = self._loop.create_future()
        assert self._accepting is not None
        try:
            await asyncio.wait({self._forever, self._accepting}, return_when=asyncio.FIRST_COMPLETED)
            if self._forever.done():
                await self._forever
            if self._listener.session.ended():
                raise self._listener.session.stopped()
        except asyncio.CancelledError:
            self.close()
            await self.wait_closed()
            raise
        finally:
            self._forever = None

    def detach(self, transport: TCPTransport) -> None:
        """A transport has ended."""
        self._transports.discard(transport)
        self._wake_up()

    def _wake_up(self) -> None:
        if self._waiters is not None and self._listener.closed and not self._transports:
            waiters, self._waiters = self._waiters, None
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def close(self) -> None:
        """See asyncio: accepts no more; connections go on."""
        if self._accepting is not None:
            self._accepting.cancel()
        with contextlib.suppress(Stopped, DataplaneError):
            self._listener.close()
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
        self._wake_up()

    def close_clients(self) -> None:
        """See asyncio (3.13)."""
        for transport in list(self._transports):
            transport.close()

    def abort_clients(self) -> None:
        """See asyncio (3.13)."""
        for transport in list(self._transports):
            transport.abort()

    async def wait_closed(self) -> None:
        """Returns when the server is closed and its connections have ended."""
        if self._accepting is not None and self._listener.closed:
            await asyncio.wait({self._accepting})
        self._wake_up()
        if self._waiters is None:
            return
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()
        await self.wait_closed()

    def __repr__(self) -> str:
        return f"<Server {self._listener!r}>"

