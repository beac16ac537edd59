"""From a bind request to what the PCB table opens, and back to words for `ss`.

Called by the control service. A request is somebody else's data: every field of it is checked here, and what
is wrong with it is an OSError as the socket module would raise.
"""

from __future__ import annotations

import errno
import ipaddress

from dataplane.control import messages
from dataplane.pcb.table import SocketSpec
from dataplane.shm import layout as L
from workers.owners import Mapping

LARGEST_RING = 1 << 30
BOTH = L.KEY_FAMILY4 | L.KEY_FAMILY6
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Binding:
    """A checked request: `spec` for the table, still without memory, and the local `address` in its one
    spelling (None: all of both families)."""

    def __init__(self, request: messages.Bind, netifs: list[messages.NetifInfo], ring_bytes: int) -> None:
        if request.kind not in ("udp", "raw", "tap"):
            raise OSError(errno.EPROTONOSUPPORT, f"no sockets of kind {request.kind!r}")
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

    @staticmethod
    def names(spec: SocketSpec) -> tuple[tuple[str, int | None], tuple[str, int] | None]:
        """Local and remote address of a socket in words; "*" is every address of both families."""
        if spec.local is not None:
            local = _name(spec.families, *spec.local)
        else:
            local = {L.KEY_FAMILY4: "0.0.0.0", L.KEY_FAMILY6: "::"}.get(spec.families, "*")
        remote = None if spec.remote is None else (_name(spec.families, *spec.remote[:2]), spec.remote[2])
        return (local, spec.port), remote


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


def _ring_bytes(size: int) -> int:
    if not L.LANE_MIN_BYTES <= size <= LARGEST_RING or size & (size - 1):
        allowed = f"a power of two from {L.LANE_MIN_BYTES} to {LARGEST_RING}"
        raise OSError(errno.EINVAL, f"ring_bytes {size} is not {allowed}")
    return size


def _pair(address: IPAddress) -> tuple[int, int]:
    number = int(address)
    return number >> 64, number & (1 << 64) - 1


def _name(families: int, hi: int, lo: int) -> str:
    mask = (1 << 64) - 1
    if families == L.KEY_FAMILY4:
        return str(ipaddress.IPv4Address(lo))
    return str(ipaddress.IPv6Address((hi & mask) << 64 | lo & mask))
