"""`attach`: the way in. Everything else of the client library hangs on the `Dataplane` that it returns."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from dataplane.client import drain, fields, transmit
from dataplane.client.addresses import Address, Routes, parse_address, parse_host, parse_port
from dataplane.client.poller import Poller
from dataplane.client.session import Session
from dataplane.client.sockets import RawSocket, Socket, TapSocket
from dataplane.client.transmit import Transmitter
from dataplane.client.udp import UDPSocket
from dataplane.control import messages
from dataplane.control.wire import Connection
from dataplane.jit import warm

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
    connection = Connection.open(name)
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
        """Ends the attachment and closes its sockets. May be called again."""
        self._session.close()

    def __enter__(self) -> Dataplane:
        self._session.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Dataplane {self.name!r}{' closed' if self._session.over else ''}>"
