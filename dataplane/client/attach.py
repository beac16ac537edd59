"""`attach`: the way in. Everything else of the client library hangs on the `Dataplane` that it returns."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dataplane.client import drain, fields, transmit
from dataplane.client.addresses import Address, Routes, parse_address, parse_host, parse_port
from dataplane.client.poller import Poller
from dataplane.client.session import Session
from dataplane.client.sockets import RawSocket, Socket, TapSocket
from dataplane.client.transmit import Transmitter
from dataplane.client.udp import UDPSocket
from dataplane.client.waiting import deadline_of
from dataplane.control import messages
from dataplane.control.wire import Connection as ControlConnection
from dataplane.errors import DataplaneError
from dataplane.jit import warm

if TYPE_CHECKING:
    import asyncio

    from dataplane.client.streams import ClientConnected
    from dataplane.client.tcp import Connection, Listener
    from dataplane.client.transport import Server, TCPTransport
    from dataplane.client.workbench import Workbench

__all__ = ["Dataplane", "attach"]

_warming = threading.Lock()


def attach(name: str, *, spin_us: float = 20.0) -> Dataplane:
    """Attaches to the running dataplane `name`.

    `spin_us`: how long a call that waits looks for packets in µs before it sleeps. A sleep costs less CPU
    and some tens of µs until the waiter is awake again.

    UnknownDataplane when none of that name runs here, LayoutMismatch when it is of another version,
    PermissionError when it may not be spoken to.
    """
    if not spin_us >= 0:
        raise ValueError(f"spin_us must not be negative: {spin_us}")
    connection = ControlConnection.open(name)
    try:
        with _warming:
            warm((drain, fields, transmit))     # now: neither when the first packet waits, nor in two threads
        return Dataplane(Session(connection, int(spin_us * 1000)))
    except BaseException:
        connection.close()
        raise


class Dataplane:
    """A running dataplane, as one attachment to it sees it. Made by `attach`; usable from all threads of
    this process, not from a process forked off later."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._routes = Routes(session.attached.netifs)
        self._transmitter = Transmitter(session)
        self._bench: Workbench | None = None

    # -- sockets ---------------------------------------------------------------------------------------

    def udp(self, address: str | None = None, port: int | None = None, *, remote: Address | None = None,
            reuseport: bool = False, ring_bytes: int | None = None) -> UDPSocket:
        """Opens a UDP socket.

        address     numeric; None: every address of both families
        port        0: an unused one; None: every port that no other socket is bound to (or, with `remote`, an
                    unused one)
        remote      (host, port): connects it
        reuseport   shares the port with other sockets that say so too; each flow stays with one of them
        ring_bytes  bytes of each lane, a power of two from 4096 on; None: as the dataplane is configured

        OSError(EADDRINUSE), PermissionError, ValueError.
        """
        host = None if not address else str(parse_host(address))
        if port is not None:
            parse_port(port)
        peer = None
        if remote is not None:
            there, there_port = parse_address(remote)
            peer = (str(there), there_port)
        request = messages.Bind(kind="udp", address=host, port=port, remote=peer, reuseport=reuseport,
                                ring_bytes=ring_bytes)
        bound = self._session.bind(request)
        with self._session.lock:
            return UDPSocket(self._session, bound, peer, self._transmitter, self._routes)

    def raw(self, proto: int = 0, address: str | None = None, *, reuseport: bool = False,
            ring_bytes: int | None = None) -> RawSocket:
        """Opens a raw socket: a copy of every IP packet of protocol `proto` (0: of all), to `address` if
        given. `reuseport`: such sockets share the packets by flow."""
        host = None if not address else str(parse_host(address))
        bound = self._session.bind(messages.Bind(kind="raw", address=host, proto=proto, reuseport=reuseport,
                                                 ring_bytes=ring_bytes))
        with self._session.lock:
            return RawSocket(self._session, bound, None)

    def tap(self, *, ring_bytes: int | None = None) -> TapSocket:
        """Opens a tap: a copy of every frame of every netif, as it was on the wire."""
        bound = self._session.bind(messages.Bind(kind="tap", ring_bytes=ring_bytes))
        with self._session.lock:
            return TapSocket(self._session, bound, None)

    # -- TCP ---------------------------------------------------------------------------------------------

    def tcp_listen(self, address: str | None, port: int, backlog: int = 128, *, reuseport: bool = False,
                   send_bytes: int | None = None, receive_bytes: int | None = None,
                   connections: int = 1024) -> Listener:
        """Opens a listening TCP socket.

        address        numeric; None: every address of both families
        port           0: an unused one
        backlog        connections that may wait to be accepted; handshakes beyond wait for room
        reuseport      shares the port with other listeners that say so too; each peer's flow goes to one of them
        send_bytes     bytes of each connection's send buffer, and
        receive_bytes  of its receive buffer: a power of two from 4096 on; None: as the dataplane is configured
        connections    how many accepted ones there can be at a time

        OSError(EADDRINUSE), PermissionError, ValueError. The first call compiles or loads the protocol.
        """
        from dataplane.client.tcp import Listener
        bench = self._workbench()
        host = None if not address else str(parse_host(address))
        request = messages.Bind(kind="tcp_listen", address=host, port=parse_port(port), reuseport=reuseport,
                                backlog=backlog, connections=connections, send_bytes=send_bytes,
                                receive_bytes=receive_bytes)
        return Listener(bench, self._session.bind(request))

    def tcp_connect(self, host: str, port: int, *, timeout: float | None = None, local: Address | None = None,
                    send_bytes: int | None = None, receive_bytes: int | None = None) -> Connection:
        """Opens a TCP connection to a numeric address, from the address and port `local` if given. `timeout` in
        seconds, for this call only. TimeoutError, ConnectionRefusedError, OSError: ENETUNREACH, EADDRINUSE, ..."""
        deadline = deadline_of(timeout)
        connection = self._connect((host, port), local, send_bytes, receive_bytes)
        try:
            connection.await_open(deadline)
        except BaseException:
            connection.abort()
            raise
        return connection

    def _connect(self, remote: Address, local: Address | None, send_bytes: int | None,
                 receive_bytes: int | None) -> Connection:
        """A connection whose SYN was sent."""
        from dataplane.client.tcp import connection_of, open_active
        bench = self._workbench()
        there, port = parse_address(remote)
        self._routes.demand(there)
        here = None if local is None or not local[0] else str(parse_host(local[0]))
        request = messages.Bind(kind="tcp_connect", address=here, port=parse_port(local[1]) if local else 0,
                                remote=(str(there), port), send_bytes=send_bytes, receive_bytes=receive_bytes)
        connection = connection_of(bench, self._session.bind(request), (str(there), port))
        open_active(bench, connection)
        return connection

    def _workbench(self) -> Workbench:
        """What its TCP connections share, made when the first is needed."""
        from dataplane.client.workbench import Workbench
        self._session.check()
        with self._session.lock:
            if self._bench is None:
                self._bench = Workbench(self._session, self._transmitter)
            return self._bench

    async def open_connection(self, host: str, port: int, *, limit: int = 1 << 16, local_addr: Address | None = None,
                              send_bytes: int | None = None, receive_bytes: int | None = None,
                              ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As `asyncio.open_connection`, to a numeric address: asyncio's own streams."""
        from dataplane.client.streams import connect_streams
        return await connect_streams(self._connect((host, port), local_addr, send_bytes, receive_bytes), limit)

    async def start_server(self, client_connected_cb: ClientConnected, host: str | None, port: int, *,
                           limit: int = 1 << 16, backlog: int = 128, reuse_port: bool = False,
                           start_serving: bool = True, send_bytes: int | None = None,
                           receive_bytes: int | None = None, connections: int = 1024) -> Server:
        """As `asyncio.start_server`: asyncio's own streams."""
        from dataplane.client.streams import serve_streams
        listener = self.tcp_listen(host, port, backlog, reuseport=reuse_port, send_bytes=send_bytes,
                                   receive_bytes=receive_bytes, connections=connections)
        return await serve_streams(client_connected_cb, listener, limit, start_serving)

    async def create_connection(self, protocol_factory: Callable[[], Any], host: str, port: int, *,
                                local_addr: Address | None = None, send_bytes: int | None = None,
                                receive_bytes: int | None = None) -> tuple[TCPTransport, Any]:
        """As the event loop's `create_connection`: (transport, protocol)."""
        from dataplane.client.streams import connect_protocol
        connection = self._connect((host, port), local_addr, send_bytes, receive_bytes)
        return await connect_protocol(protocol_factory, connection)

    async def create_server(self, protocol_factory: Callable[[], Any], host: str | None, port: int, *,
                            backlog: int = 128, reuse_port: bool = False, start_serving: bool = True,
                            send_bytes: int | None = None, receive_bytes: int | None = None,
                            connections: int = 1024) -> Server:
        """As the event loop's `create_server`."""
        from dataplane.client.streams import serve_protocol
        listener = self.tcp_listen(host, port, backlog, reuseport=reuse_port, send_bytes=send_bytes,
                                   receive_bytes=receive_bytes, connections=connections)
        return await serve_protocol(protocol_factory, listener, start_serving)

    def poller(self, sockets: Iterable[Socket[Any]]) -> Poller:
        """One wake object for many sockets of this attachment."""
        return Poller(self._session, sockets)

    # -- what is known of it -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name."""
        return self._session.attached.name

    @property
    def pid(self) -> int:
        """The supervisor's process."""
        return self._session.attached.pid

    @property
    def workers(self) -> int:
        """RX workers, and so lanes of each socket."""
        return self._session.attached.workers

    @property
    def ended(self) -> bool:
        """Whether it has ended. What is queued can still be received."""
        self._session.check()
        return self._session.ended()

    def stats(self) -> dict[str, Any]:
        """The ledger, as `dataplane stat --json` prints it."""
        return self._session.request(messages.Stats(), messages.Ledger).ledger

    # -- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the attachment and closes its sockets. What TCP connections have written still goes. May be called
        again."""
        if self._bench is not None and self._session.over is None and not self._session.ended():
            with contextlib.suppress(OSError, DataplaneError):
                self._bench.close()
        self._session.close()

    def __enter__(self) -> Dataplane:
        self._session.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Dataplane {self.name!r}{' closed' if self._session.over else ''}>"
