"""UDP sockets: what they have besides receiving."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

from dataplane.client.addresses import Address, Routes, parse_address
from dataplane.client.session import Session
from dataplane.client.sockets import MAX_ADDRESSES, Socket
from dataplane.client.transmit import Transmitter
from dataplane.client.waiting import deadline_of
from dataplane.control import messages
from dataplane.shm import layout as L

__all__ = ["UDPSocket"]

MAX_PAYLOAD = {4: 65507, 6: 65527}
"""Largest UDP payload: 65,535 minus 20 bytes of IPv4 header, or nothing, minus 8 of UDP."""

_HEADER = struct.Struct("=IIHH4xQQ")
assert (_HEADER.size == L.TX_PAYLOAD and L.TX_GENERATION == 4 and L.TX_FAMILY == 8 and L.TX_PORT == 10
        and L.TX_ADDRESS_HI == 16)


class UDPSocket(Socket[Address]):
    """UDP: the payload is the datagram's."""

    kind = "udp"

    def __init__(self, session: Session, bound: messages.Bound, remote: Address | None,
                 transmitter: Transmitter, routes: Routes) -> None:
        super().__init__(session, bound, remote)
        self._transmitter, self._routes = transmitter, routes
        self._headers: dict[Address, tuple[bytes, int]] = {}

    def sendto(self, data: Any, address: Address | None = None, timeout: float | None = None) -> int:
        """Sends one datagram; the number of its bytes. Without `address` to the connected peer. Waits while
        the transmit ring is full. OSError: EMSGSIZE, ENETUNREACH, EAFNOSUPPORT, EDESTADDRREQ."""
        self.check()
        address = address or self.remote
        header, largest = self._headers.get(address) or self._header(address)  # type: ignore[arg-type]
        if not isinstance(data, bytes | bytearray):
            data = memoryview(data).cast("B")
        size = len(data)
        if size > largest:
            raise OSError(errno.EMSGSIZE, f"a datagram has at most {largest} bytes, not {size}")
        self._transmitter.send(header, data, size, deadline_of(timeout))
        return size

    def send(self, data: Any, timeout: float | None = None) -> int:
        """Sends one datagram to the connected peer; as `sendto`."""
        return self.sendto(data, None, timeout)

    def close(self) -> None:
        """As any socket's; what was sent from it goes out first."""
        if not self.closed and self.session.over is None:
            self._transmitter.flush()
        super().close()

    def _header(self, address: Address | None) -> tuple[bytes, int]:
        """The transmit record's fixed part, and how long the payload may be."""
        if address is None:
            raise OSError(errno.EDESTADDRREQ, os.strerror(errno.EDESTADDRREQ))
        host, port = parse_address(address)
        here = self.bound.address
        if here is not None and (":" in here) != (host.version == 6):
            raise OSError(errno.EAFNOSUPPORT, f"{host} cannot be reached from a socket bound to {here}")
        self._routes.demand(host)
        high, low = divmod(int(host), 1 << 64)
        header = _HEADER.pack(self.bound.pcb, self.bound.generation & 0xFFFFFFFF, host.version, port,
                              high, low)
        if len(self._headers) >= MAX_ADDRESSES:
            self._headers.clear()
        self._headers[address] = header, MAX_PAYLOAD[host.version]
        return self._headers[address]
