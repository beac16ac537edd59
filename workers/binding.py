"""From a bind request to what the PCB table opens, and to the route of a TCP connection.

Called by the control service. A request is somebody else's data: every field of it is checked here, and what
is wrong with it is an OSError as the socket module would raise.
"""

from __future__ import annotations

import errno
import ipaddress

from dataplane.config import Config
from dataplane.control import messages
from dataplane.pcb.table import TCP, SocketSpec
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from workers.owners import Mapping, Shape

LARGEST_RING = 1 << 30
LARGEST_BACKLOG = 65535
BOTH = L.KEY_FAMILY4 | L.KEY_FAMILY6
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class Binding:
    """A checked request: `spec` for the table, still without memory, and the local `address` in its one
    spelling (None: all of both families)."""

    def __init__(self, request: messages.Bind, netifs: list[messages.NetifInfo], ring_bytes: int) -> None:
        if request.kind not in ("udp", "raw", "tap"):
            raise OSError(errno.EPROTONOSUPPORT, f"no sockets of kind {request.kind!r}")
        _check_tcp_words(request)
        local = None if request.address is None else _parse(request.address)
        remote = None if request.remote is None else (_parse(request.remote[0]), request.remote[1])
        _check(request, local, remote)
        if local is not None:
            _check_local(local, netifs)
        self.address = None if local is None else str(local)
        self.spec = SocketSpec(
            kind=request.kind,
            families=_families(local, remote[0] if remote else None),
            proto=17 if request.kind == "udp" else request.proto if request.kind == "raw" else 0,
            local=None if local is None or local.is_unspecified else _pair(local),
            port=0 if remote and request.port is None else request.port,
            remote=None if remote is None else (*_pair(remote[0]), remote[1]),
            reuseport=request.reuseport,
            ring_bytes=_ring_bytes(ring_bytes if request.ring_bytes is None else request.ring_bytes))


class Listening:
    """A checked request of kind tcp_listen: `spec` as in Binding, `shape` of what it accepts, and how many of
    them there can be."""

    def __init__(self, request: messages.Bind, netifs: list[messages.NetifInfo], config: Config) -> None:
        local = None if request.address is None else _parse(request.address)
        if request.remote is not None or request.port is None or not 0 <= request.port <= 65535:
            raise OSError(errno.EINVAL, "a listener has a port, 0 to 65535, and no remote address")
        if request.connections < 1:
            raise OSError(errno.EINVAL, f"connections {request.connections} is not at least 1")
        _demand_tcp(netifs, errno.EADDRNOTAVAIL)
        if local is not None and not local.is_unspecified:
            _check_own(local, netifs)
        self.shape = _shape(request, config)
        self.connections = request.connections
        self.address = None if local is None else str(local)
        backlog = min(max(request.backlog, 1), LARGEST_BACKLOG)     # as listen(2): at least one
        self.spec = SocketSpec(
            kind="listen", families=_families(local, None), proto=TCP,
            local=None if local is None or local.is_unspecified else _pair(local), port=request.port,
            reuseport=request.reuseport, ring_bytes=_lane_for(backlog), backlog=backlog)


class Connecting:
    """A checked request of kind tcp_connect: `spec` with both addresses (port 0: any), `shape` of the connection, `mtu`
    of the netif that it goes out by, and `remote` in its one spelling."""

    def __init__(self, request: messages.Bind, netifs: list[messages.NetifInfo], config: Config) -> None:
        if request.remote is None or not 0 < request.remote[1] <= 65535:
            raise OSError(errno.EINVAL, "a connection needs a remote address and port")
        if request.reuseport or not 0 <= (request.port or 0) <= 65535:
            raise OSError(errno.EINVAL, "a connection has a local port of its own, 0 to 65535")
        remote = _parse(request.remote[0])
        local = None if request.address is None else _parse(request.address)
        if local is not None and local.version != remote.version:
            raise OSError(errno.EINVAL, f"{local} and {remote} are of different families")
        _demand_tcp(netifs, errno.ENETUNREACH)
        source, netif = _route(remote, netifs)
        if local is not None and not local.is_unspecified:
            _check_own(local, netifs)
            source = local
        self.shape = _shape(request, config)
        self.mtu = netif.mtu
        self.address, self.remote = str(source), str(remote)
        self.spec = SocketSpec(
            kind="connection", families=_families(source, None), proto=TCP, local=_pair(source),
            port=request.port or 0, remote=(*_pair(remote), request.remote[1]), ring_bytes=self.shape.lane_bytes,
            buffers=(self.shape.send_bytes, self.shape.receive_bytes))


def describe(mapping: Mapping) -> tuple[messages.Segment, list[int]]:
    """A segment as a consumer is told of it, and the descriptor that goes along if it has no name."""
    segment = mapping.segment
    told = messages.Segment(number=mapping.number, bytes=segment.size, name=segment.name)
    return told, [] if segment.name else [segment.fd]


def _parse(text: str) -> IPAddress:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise OSError(errno.EINVAL, f"{text!r} is not a numeric IP address") from None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
        raise OSError(errno.EINVAL, f"{text!r}: addresses have no zone here")
    return address


def _check_tcp_words(request: messages.Bind) -> None:
    if (request.send_bytes, request.receive_bytes) != (None, None):
        raise OSError(errno.EINVAL, f"a {request.kind} socket has no such buffers: ring_bytes is their size")


def _shape(request: messages.Bind, config: Config) -> Shape:
    """Sizes of a connection. A lane takes what the window allows: it is as large as the receive buffer."""
    if request.ring_bytes is not None:
        raise OSError(errno.EINVAL, "send_bytes and receive_bytes are the sizes of a TCP connection")
    send = config.tcp.send_bytes if request.send_bytes is None else request.send_bytes
    receive = config.tcp.receive_bytes if request.receive_bytes is None else request.receive_bytes
    return Shape(_ring_bytes(receive), _ring_bytes(send, "send_bytes"), _ring_bytes(receive, "receive_bytes"))


def _lane_for(backlog: int) -> int:
    """Ring bytes of a listener's lane: all that may wait to be accepted, twice."""
    return max(L.LANE_MIN_BYTES, 1 << (2 * backlog * (L.RECORD_DATA + T.A_BYTES) - 1).bit_length())


def _active(netifs: list[messages.NetifInfo]) -> list[tuple[messages.NetifInfo, IPInterface]]:
    """Our addresses that can be spoken from."""
    return [(netif, ipaddress.ip_interface(text)) for netif in netifs if not netif.passive
            for text in netif.addresses]


def _demand_tcp(netifs: list[messages.NetifInfo], number: int) -> None:
    if not _active(netifs):
        raise OSError(number, "no TCP here: no netif of this dataplane has addresses, so nothing is transmitted")


def _check_own(local: IPAddress, netifs: list[messages.NetifInfo]) -> None:
    if local not in {interface.ip for _, interface in _active(netifs)}:
        raise OSError(errno.EADDRNOTAVAIL, f"{local} is not an address of this dataplane")


def _route(remote: IPAddress, netifs: list[messages.NetifInfo]) -> tuple[IPAddress, messages.NetifInfo]:
    """The source address for `remote`, and the netif that leads there: that with the longest prefix, else
    the first one with a gateway."""
    active = _active(netifs)
    broadcasts = {interface.network.broadcast_address for _, interface in active
                  if interface.version == 4 and interface.network.prefixlen < 31}
    if (remote.is_unspecified or remote.is_multicast or remote in broadcasts or str(remote) == "255.255.255.255"
            or remote in {interface.ip for _, interface in active}):
        raise OSError(errno.ENETUNREACH, f"no other host has the address {remote}")
    near = [(interface.network.prefixlen, -index) for index, (_, interface) in enumerate(active)
            if remote in interface.network]
    if near:
        netif, interface = active[-max(near)[1]]
        return interface.ip, netif
    for netif, interface in active:
        gateways = [ipaddress.ip_address(text) for text in netif.gateway]
        if interface.version == remote.version and any(one in interface.network for one in gateways):
            return interface.ip, netif
    raise OSError(errno.ENETUNREACH, f"no netif leads to {remote}")


def _check(request: messages.Bind, local: IPAddress | None, remote: tuple[IPAddress, int] | None) -> None:
    def refuse(problem: str) -> None:
        raise OSError(errno.EINVAL, problem)

    if request.kind != "udp" and (request.port is not None or remote is not None):
        refuse(f"a {request.kind} socket has neither port nor remote address")
    if request.kind == "tap" and local is not None:
        refuse("a tap takes every frame: it has no address")
    if request.kind == "raw" and not 0 <= request.proto <= 255:
        refuse(f"IP protocol {request.proto} is not between 0 and 255")
    if request.port is not None and not 0 <= request.port <= 65535:
        refuse(f"port {request.port} is not between 0 and 65535")
    if remote is not None:
        if remote[0].is_unspecified or remote[0].is_multicast or not 0 < remote[1] <= 65535:
            refuse(f"cannot be connected to {remote[0]} port {remote[1]}")
        if local is not None and local.version != remote[0].version:
            refuse(f"{local} and {remote[0]} are of different families")


def _check_local(local: IPAddress, netifs: list[messages.NetifInfo]) -> None:
    """As bind(2): the address is ours, a group's, or none; where a netif is passive, everybody's are."""
    if local.is_unspecified or local.is_multicast or any(netif.passive for netif in netifs):
        return
    interfaces = [ipaddress.ip_interface(text) for netif in netifs for text in netif.addresses]
    ours = {one.ip for one in interfaces} | {one.network.broadcast_address for one in interfaces}
    if local not in ours and str(local) != "255.255.255.255":
        raise OSError(errno.EADDRNOTAVAIL, f"{local} is not an address of this dataplane")


def _families(local: IPAddress | None, remote: IPAddress | None) -> int:
    decisive = local or remote
    if decisive is None:
        return BOTH
    return L.KEY_FAMILY4 if decisive.version == 4 else L.KEY_FAMILY6


def _ring_bytes(size: int, what: str = "ring_bytes") -> int:
    if not L.LANE_MIN_BYTES <= size <= LARGEST_RING or size & (size - 1):
        allowed = f"a power of two from {L.LANE_MIN_BYTES} to {LARGEST_RING}"
        raise OSError(errno.EINVAL, f"{what} {size} is not {allowed}")
    return size


def _pair(address: IPAddress) -> tuple[int, int]:
    number = int(address)
    return number >> 64, number & (1 << 64) - 1
