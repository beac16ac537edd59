"""What the frames of a capture mean to scapy: the oracle of test_captures.

    meaning = Meaning()
    for frame in frames(path):
        meaning.add(frame)
    meaning.udp, meaning.raw, meaning.tap       # what sockets of these kinds get, in order

Slow and plain. Scapy takes headers apart, puts fragments together and computes checksums. It is lenient,
though: that a packet is to be dropped is said here, one line for each rule of a receiver.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from scapy.layers.inet import IP, in4_chksum
from scapy.layers.inet import defragment as defragment4
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    defragment6,
    in6_chksum,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import CookedLinux, CookedLinuxV2, Dot1Q, Ether
from scapy.packet import Packet
from scapy.plist import PacketList
from scapy.utils import RawPcapReader, checksum

ETHERNET, RAW = 1, 101
_LOOPBACK = (0, 108)
_LINKS = {ETHERNET: Ether, 113: CookedLinux, 276: CookedLinuxV2}
_UDP = 17
_OPTIONS = (IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt)
_SOURCE_ROUTES = (3, 9)     # LSRR and SSRR


class Frame(NamedTuple):
    """One packet of a capture: its bytes, how many it had on the wire, ns since the epoch, link type."""

    data: bytes
    wire: int
    time: int
    link: int


class Record(NamedTuple):
    """What a socket gets. A tap's has no addresses; a raw socket's no ports."""

    payload: bytes
    time: int
    vlan: int = -1
    source: tuple[str, int] | None = None
    target: tuple[str, int] | None = None


def frames(path: Path) -> list[Frame]:
    """All packets of a capture."""
    found = []
    reader = RawPcapReader(str(path))
    for data, meta in reader:
        if hasattr(meta, "tsresol"):
            ticks = 0 if meta.tshigh is None else (meta.tshigh << 32) + meta.tslow
            found.append(Frame(data, meta.wirelen, int(ticks * 10**9 // int(meta.tsresol)), meta.linktype))
        else:
            time = meta.sec * 10**9 + meta.usec * (1 if reader.nano else 1000)
            found.append(Frame(data, meta.wirelen, time, reader.linktype))
    return found


def network_layer(frame: Frame) -> tuple[Packet | None, int]:
    """The IP layer (None: there is none), and the outer VLAN tag (-1: none)."""
    if frame.link in _LOOPBACK:
        return _loopback(frame.data), -1
    if frame.link not in _LINKS:
        kind = {4: IP, 6: IPv6}.get(frame.data[0] >> 4) if frame.data else None
        return (kind(frame.data) if kind else None), -1
    try:
        layer, tags = _LINKS[frame.link](frame.data), []
    except struct.error:
        return None, -1         # not even an Ethernet header
    while not isinstance(layer, IP | IPv6):
        if isinstance(layer, Dot1Q):
            tags.append(int.from_bytes(layer.original[:2], "big"))
        elif not isinstance(layer, tuple(_LINKS.values())):
            return None, -1
        layer = layer.payload
    return (layer if len(tags) <= 2 else None), (tags or [-1])[0]


def _loopback(data: bytes) -> Packet | None:
    """BSD's, in the byte order of the machine that captured. Scapy knows this machine's AF_INET6 only."""
    family = min(int.from_bytes(data[:4], "big"), int.from_bytes(data[:4], "little"))
    return IP(data[4:]) if family == 2 else IPv6(data[4:]) if family in (24, 28, 30) else None


@dataclass
class Piece:
    """A fragment."""

    offset: int
    data: bytes
    more: bool
    packet: Packet

    @property
    def end(self) -> int:
        return self.offset + len(self.data)

    def same(self, other: Piece) -> bool:
        return (self.offset, self.data, self.more) == (other.offset, other.data, other.more)

    def collides(self, other: Piece) -> bool:
        """Overlaps, or disagrees about where the datagram ends."""
        if self.offset < other.end and other.offset < self.end:
            return True
        return not min(self, other, key=lambda one: one.offset).more


@dataclass
class Datagram:
    """The fragments of one datagram so far, and how many frames brought them."""

    pieces: list[Piece] = field(default_factory=list)
    dead: bool = False


@dataclass
class Meaning:
    """What the frames so far give to a tap, a raw socket for all protocols and a UDP socket for all
    ports. `delivered`: how many of the frames a raw socket got, alone or as a part of a datagram."""

    tap: list[Record] = field(default_factory=list)
    raw: list[Record] = field(default_factory=list)
    udp: list[Record] = field(default_factory=list)
    delivered: int = 0
    _datagrams: dict[Any, Datagram] = field(default_factory=dict)

    def add(self, frame: Frame) -> None:
        """The next frame."""
        self.tap.append(Record(frame.data, frame.time))
        layer, vlan = network_layer(frame)
        packet = None if layer is None else _whole4(layer) if isinstance(layer, IP) else _whole6(layer)
        if packet is None:
            return
        count = 1
        if _is_fragment(packet):
            packet, count = self._reassemble(packet)
            if packet is None:
                return
        self._deliver(packet, frame.time, vlan)
        self.delivered += count

    def _deliver(self, packet: Packet, time: int, vlan: int) -> None:
        data = bytes(packet)
        self.raw.append(Record(data, time, vlan, (packet.src, 0), (packet.dst, 0)))
        proto, body = (packet.proto, bytes(packet.payload)) if isinstance(packet, IP) else _upper_layer(packet)
        if proto == _UDP and (size := _datagram_bytes(packet, body)):
            ports = int.from_bytes(body[:2], "big"), int.from_bytes(body[2:4], "big")
            self.udp.append(Record(body[8:size], time, vlan, (packet.src, ports[0]), (packet.dst, ports[1])))

    def _reassemble(self, packet: Packet) -> tuple[Packet | None, int]:
        """The whole packet once it is there, and how many frames it was."""
        key, piece = _piece(packet)
        if piece.end + 20 > 65535 or (piece.more and len(piece.data) % 8) or not piece.data:
            return None, 0
        if isinstance(packet, IPv6) and piece.offset == 0 and not piece.more:
            return _join(key, [piece]), 1       # atomic: RFC 6946
        datagram = self._datagrams.setdefault(key, Datagram())
        if datagram.dead or any(piece.same(one) for one in datagram.pieces):
            return None, 0
        if any(piece.collides(one) for one in datagram.pieces):
            datagram.dead = True                # RFC 5722
            return None, 0
        datagram.pieces.append(piece)
        pieces = sorted(datagram.pieces, key=lambda one: one.offset)
        ends = [0, *(one.end for one in pieces)]
        if pieces[-1].more or any(one.offset != end for one, end in zip(pieces, ends, strict=False)):
            return None, 0
        del self._datagrams[key]
        return _join(key, pieces), len(pieces)


# -- the rules --------------------------------------------------------------------------------


def _whole4(layer: Packet) -> Packet | None:
    """The packet without what follows it in its frame; None if a receiver drops it."""
    data = layer.original
    if len(data) < 20 or layer.version != 4 or layer.ihl < 5:
        return None
    header = layer.ihl * 4
    if not header <= layer.len <= len(data) or checksum(data[:header]) != 0:
        return None
    if any(option.option in _SOURCE_ROUTES for option in layer.options) or not _fit(data[20:header]):
        return None
    return IP(data[:layer.len])


def _fit(options: bytes) -> bool:
    """Whether IPv4 options end where the header does. Scapy reads on behind it."""
    while options and options[0] != 0:
        size = 1 if options[0] == 1 else int.from_bytes(options[1:2], "big")
        if size < (1 if options[0] == 1 else 2) or size > len(options):
            return False
        options = options[size:]
    return True


def _whole6(layer: Packet) -> Packet | None:
    data = layer.original
    if len(data) < 40 or layer.version != 6 or layer.plen + 40 > len(data):
        return None
    packet = IPv6(data[:layer.plen + 40])
    room = layer.plen
    for header, size in _extensions(packet):
        room -= size
        if room < 0 or (isinstance(header, IPv6ExtHdrRouting) and header.segleft):
            return None
        if isinstance(header, _OPTIONS) and any(option.otype >> 6 for option in header.options):
            return None
    return packet


def _extensions(packet: Packet) -> list[tuple[Packet, int]]:
    """The extension headers up to a Fragment header, and their sizes."""
    found, layer = [], packet.payload
    while isinstance(layer, _OPTIONS + (IPv6ExtHdrRouting, AH, IPv6ExtHdrFragment)):
        if isinstance(layer, IPv6ExtHdrFragment):
            return [*found, (layer, 8)]
        size = (layer.payloadlen + 2) * 4 if isinstance(layer, AH) else (layer.len + 1) * 8
        found.append((layer, size))
        layer = layer.payload
    return found


def _upper_layer(packet: Packet) -> tuple[int, bytes]:
    """Protocol and bytes behind the extension headers."""
    chain = [(packet, 40), *_extensions(packet)]
    return chain[-1][0].nh, bytes(packet)[sum(size for _, size in chain):]


def _datagram_bytes(packet: Packet, body: bytes) -> int:
    """Length of the UDP datagram, header included; 0 if a receiver drops it."""
    size, sent = int.from_bytes(body[4:6], "big"), int.from_bytes(body[6:8], "big")
    if len(body) < 8 or not 8 <= size <= len(body):
        return 0
    if isinstance(packet, IP):
        right = sent == 0 or in4_chksum(_UDP, packet, body[:size]) == 0
    else:
        right = sent != 0 and in6_chksum(_UDP, IPv6(src=packet.src, dst=packet.dst), body[:size]) == 0
    return size if right else 0


# -- fragments --------------------------------------------------------------------------------


def _is_fragment(packet: Packet) -> bool:
    if isinstance(packet, IP):
        return bool(packet.flags.MF or packet.frag)
    return any(isinstance(header, IPv6ExtHdrFragment) for header, _ in _extensions(packet))


def _piece(packet: Packet) -> tuple[Any, Piece]:
    """What the fragments of a datagram have in common, and this one."""
    if isinstance(packet, IP):
        data = bytes(packet)[packet.ihl * 4:]
        return (packet.src, packet.dst, packet.id, packet.proto), Piece(
            packet.frag * 8, data, bool(packet.flags.MF), packet)
    header = packet[IPv6ExtHdrFragment]
    _, data = _upper_layer(packet)
    return (packet.src, packet.dst, header.id), Piece(header.offset * 8, data, bool(header.m), packet)


def _join(key: Any, pieces: list[Piece]) -> Packet:
    packets = [piece.packet for piece in pieces]
    if isinstance(packets[0], IP):
        (whole,) = defragment4(PacketList(packets))
        return IP(bytes(whole))
    return IPv6(bytes(defragment6(packets)))


def host(address: bytes, family: int) -> str:
    """As scapy spells it."""
    return str(ipaddress.ip_address(address[:4] if family == 4 else address))
