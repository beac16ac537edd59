"""Accessors and builders of the headers against scapy."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    in6_getnsma,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from dataplane.jit import kernel
from dataplane.shm.atomics import be64
from dataplane.wire import arp, ethernet, icmp, ipv4, ipv6, udp

MACS = st.integers(0, (1 << 48) - 1)
ADDRESSES4 = st.integers(0, (1 << 32) - 1)
HALVES = st.integers(-(1 << 63), (1 << 63) - 1)
WORDS = st.integers(0, 65535)
BYTES = st.integers(0, 255)


@kernel("i64(mem, vec)")
def build(mem, a):
    """Builds header a[0] at 0 of a[1:]; returns its size."""
    if a[0] == 0:
        ethernet.build(mem, 0, a[1], a[2], a[3])
        return ethernet.BYTES
    if a[0] == 1:
        arp.build(mem, 0, a[1], a[2], a[3], a[4], a[5])
        return arp.BYTES
    if a[0] == 2:
        ipv4.build(mem, 0, a[1], a[2], a[3], a[4])
        ipv4.seal(mem, 0)
        return ipv4.BYTES
    ipv6.build(mem, 0, a[1], a[2], a[3])
    ipv6.put_addresses(mem, 0, a[4], a[5], a[6], a[7])
    return ipv6.BYTES


@kernel("i64(mem, i64, i64, i64)")
def seal(mem, packet, body, size):
    """Fills in the transport checksum of the packet at `packet`."""
    if ipv4.version(mem, packet) == 4:
        proto = ipv4.protocol(mem, packet)
        if proto == udp.PROTOCOL:
            udp.seal(mem, body, size, ipv4.pseudo(mem, packet, proto, size))
        else:
            icmp.seal(mem, body, size, 0)
        return 0
    proto = ipv6.next_header(mem, packet)
    pseudo = ipv6.pseudo(mem, packet, proto, size)
    if proto == udp.PROTOCOL:
        udp.seal(mem, body, size, pseudo)
    else:
        icmp.seal(mem, body, size, pseudo)
    return 0


@kernel("i64(mem, vec)")
def parse(mem, out):
    """Reads everything that there is to read at 0, as if it were each format."""
    out[0], out[1], out[2] = ethernet.target(mem, 0), ethernet.source(mem, 0), ethernet.ethertype(mem, 0)
    out[3], out[4], out[5] = arp.operation(mem, 0), arp.sender_mac(mem, 0), arp.sender_ip(mem, 0)
    out[6], out[7], out[8] = arp.target_mac(mem, 0), arp.target_ip(mem, 0), 1 if arp.is_ethernet_ipv4(mem, 0) else 0
    out[9], out[10], out[11] = ipv4.version(mem, 0), ipv4.header_length(mem, 0), ipv4.total_length(mem, 0)
    out[12], out[13], out[14] = ipv4.identification(mem, 0), ipv4.flags_and_offset(mem, 0), ipv4.ttl(mem, 0)
    out[15], out[16], out[17] = ipv4.protocol(mem, 0), ipv4.source(mem, 0), ipv4.target(mem, 0)
    out[18], out[19], out[20] = ipv6.payload_length(mem, 0), ipv6.next_header(mem, 0), ipv6.hop_limit(mem, 0)
    out[21], out[22] = ipv6.source_hi(mem, 0), ipv6.source_lo(mem, 0)
    out[23], out[24] = ipv6.target_hi(mem, 0), ipv6.target_lo(mem, 0)
    out[25], out[26], out[27] = udp.ports(mem, 0), udp.length(mem, 0), udp.checksum(mem, 0)
    out[28], out[29], out[30] = icmp.kind(mem, 0), icmp.code(mem, 0), icmp.rest(mem, 0)
    out[31], out[32] = udp.source_port(mem, 0), udp.destination_port(mem, 0)
    return 0


@kernel("i64(mem, i64, i64)")
def extension(mem, proto, what):
    return (1 if ipv6.is_extension(proto) else 0) if what == 0 else ipv6.extension_length(mem, 0, proto)


@kernel("i64(mem, i64, i64)")
def link_option(mem, size, option):
    return icmp.find_link_option(mem, 0, size, option) if icmp.options_valid(mem, 0, size) else -2


@kernel("i64(mem, i64, i64, i64)")
def kinds(mem, hi, lo, out):
    """A bit for each kind of address that (hi, lo) is."""
    found = 1 if ipv6.is_group(hi) else 0
    found |= 2 if ipv6.is_link_local(hi) else 0
    found |= 4 if ipv6.is_unspecified(hi, lo) else 0
    found |= 8 if ipv6.is_loopback(hi, lo) else 0
    found |= 16 if ipv4.is_group(lo) else 0
    found |= 32 if ipv4.is_loopback(lo) else 0
    ethernet.store_mac(mem, out, ethernet.group_mac6(lo) if found & 1 else ethernet.group_mac4(lo))
    return found


@kernel("i64(mem, i64, i64)")
def solicited(mem, at, lo):
    return be64(mem, at) == ipv6.SOLICITED_NODE_HI and be64(mem, at + 8) == ipv6.solicited_node_lo(lo)


@pytest.fixture(scope="module")
def mem() -> Any:
    return np.zeros(1 << 12, np.uint8)


def put(mem: Any, data: bytes) -> None:
    mem[:len(data)] = np.frombuffer(data, np.uint8)


def vec(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def mac(number: int) -> str:
    return ":".join(f"{byte:02x}" for byte in number.to_bytes(6, "big"))


def ip6(hi: int, lo: int) -> str:
    return str(ipaddress.IPv6Address(struct.pack(">qq", hi, lo)))


def parsed(mem: Any, data: bytes) -> list[int]:
    out = np.zeros(33, np.int64)
    put(mem, data)
    parse(mem, out)
    return [int(number) for number in out]


@given(MACS, MACS, WORDS)
def test_ethernet(mem: Any, target: int, source: int, kind: int) -> None:
    header = bytes(Ether(dst=mac(target), src=mac(source), type=kind))
    assert bytes(mem[:build(mem, vec(0, target, source, kind))].tobytes()) == header
    assert parsed(mem, header)[:3] == [target, source, kind]


@given(st.sampled_from((1, 2)), MACS, ADDRESSES4, MACS, ADDRESSES4)
def test_arp(mem: Any, op: int, hw: int, ip: int, other_hw: int, other_ip: int) -> None:
    packet = bytes(ARP(op=op, hwsrc=mac(hw), psrc=str(ipaddress.IPv4Address(ip)), hwdst=mac(other_hw),
                       pdst=str(ipaddress.IPv4Address(other_ip))))
    size = build(mem, vec(1, op, hw, ip, other_hw, other_ip))
    assert bytes(mem[:size].tobytes()) == packet
    assert parsed(mem, packet)[3:9] == [op, hw, ip, other_hw, other_ip, 1]
    assert parsed(mem, b"\0\6" + packet[2:])[8] == 0


@given(st.integers(20, 65535), BYTES, ADDRESSES4, ADDRESSES4)
def test_ipv4_build(mem: Any, length: int, proto: int, source: int, target: int) -> None:
    size = build(mem, vec(2, length, proto, source, target))
    assert bytes(mem[:size].tobytes()) == bytes(IP(
        len=length, id=0, proto=proto, src=str(ipaddress.IPv4Address(source)),
        dst=str(ipaddress.IPv4Address(target))))


@given(st.binary(min_size=60, max_size=60))
def test_ip_accessors(mem: Any, data: bytes) -> None:
    out, four, six = parsed(mem, data), IP(data), IPv6(data)
    assert out[9:16] == [four.version, 4 * four.ihl, four.len, four.id, int(four.flags) << 13 | four.frag,
                         four.ttl, four.proto]
    assert out[16:18] == [int(ipaddress.ip_address(four.src)), int(ipaddress.ip_address(four.dst))]
    assert out[18:21] == [six.plen, six.nh, six.hlim]
    assert (ip6(out[21], out[22]), ip6(out[23], out[24])) == tuple(
        str(ipaddress.ip_address(text)) for text in (six.src, six.dst))
    assert out[25:28] == [int.from_bytes(data[:4], "big"), UDP(data).len, UDP(data).chksum]
    assert out[28:31] == [ICMP(data).type, ICMP(data).code, int.from_bytes(data[4:8], "big")]
    assert out[31:33] == [UDP(data).sport, UDP(data).dport]


@given(WORDS, BYTES, BYTES, st.tuples(HALVES, HALVES, HALVES, HALVES))
def test_ipv6_build(mem: Any, length: int, proto: int, hops: int, address: tuple[int, ...]) -> None:
    size = build(mem, vec(3, length, proto, hops, *address))
    assert bytes(mem[:size].tobytes()) == bytes(IPv6(
        plen=length, nh=proto, hlim=hops, src=ip6(*address[:2]), dst=ip6(*address[2:])))


@given(st.sampled_from((4, 6)), st.booleans(), st.binary(max_size=200))
def test_transport_checksums(mem: Any, family: int, is_udp: bool, data: bytes) -> None:
    network = IP(src="10.0.0.1", dst="10.0.0.2") if family == 4 else IPv6(src="fd00::1", dst="fd00::2")
    transport = UDP(sport=1, dport=2) if is_udp else ICMP() if family == 4 else ICMPv6EchoRequest()
    packet = bytes(network / transport / Raw(data))
    header = 20 if family == 4 else 40
    put(mem, packet)
    field = header + (6 if is_udp else 2)
    mem[field:field + 2] = 0x55
    seal(mem, 0, header, len(packet) - header)
    assert bytes(mem[:len(packet)].tobytes()) == packet


def test_udp_checksum_of_zero_is_sent_as_ones(mem: Any) -> None:
    packet = bytearray(bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2) / Raw(b"\0\0")))
    packet[28:30] = packet[26:28]       # the sum of everything is now all ones
    put(mem, bytes(packet))
    seal(mem, 0, 20, 10)
    assert bytes(mem[26:28].tobytes()) == b"\xff\xff"


@pytest.mark.parametrize("header", [
    IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(addresses=["fd00::1", "fd00::2"]),
    AH(payloadlen=4, icv=bytes(12)), AH(payloadlen=5, icv=bytes(16)),
])
def test_extension_headers(mem: Any, header: Any) -> None:
    packet = bytes(IPv6() / header)
    put(mem, packet[40:])
    assert extension(mem, packet[6], 0) == 1
    assert extension(mem, packet[6], 1) == len(packet) - 40


def test_what_is_no_extension_header(mem: Any) -> None:
    assert [proto for proto in range(256) if extension(mem, proto, 0)] == [0, 43, 51, 60, 135, 139, 140]


@pytest.mark.parametrize(("address", "found"), [
    ("ff02::1", 1), ("fe80::1", 2), ("febf::1", 2), ("fec0::1", 0), ("::", 4), ("::1", 8), ("224.0.0.251", 16),
    ("239.1.2.3", 16), ("240.0.0.1", 0), ("127.1.2.3", 32), ("10.0.0.1", 0), ("fd00::1", 0),
])
def test_kinds_of_addresses(mem: Any, address: str, found: int) -> None:
    ip = ipaddress.ip_address(address)
    hi, lo = struct.unpack(">qq", bytes(16 - len(ip.packed)) + ip.packed)
    mine = 0b001111 if ip.version == 6 else 0b110000
    assert kinds(mem, hi, lo, 0) & mine == found


def test_group_macs(mem: Any) -> None:
    kinds(mem, -(0xFE << 48), 0x1_0000_00FB, 0)     # ff02::1:0:fb
    assert bytes(mem[:6].tobytes()) == bytes.fromhex("3333000000fb")
    kinds(mem, 0, int(ipaddress.ip_address("239.255.1.2")), 0)
    assert bytes(mem[:6].tobytes()) == bytes.fromhex("01005e7f0102")


@given(HALVES)
def test_solicited_node_group(mem: Any, lo: int) -> None:
    put(mem, in6_getnsma(struct.pack(">qq", 0, lo)))
    assert solicited(mem, 0, lo) == 1


def test_neighbour_options(mem: Any) -> None:
    message = bytes(ICMPv6ND_NS() / ICMPv6NDOptDstLLAddr(lladdr="02:00:00:00:00:09")
                    / ICMPv6NDOptSrcLLAddr(lladdr="02:00:00:00:00:08"))[24:]
    put(mem, message)
    assert link_option(mem, 16, icmp.OPTION_SOURCE_LINK) == 10
    assert link_option(mem, 16, icmp.OPTION_TARGET_LINK) == 2
    assert link_option(mem, 8, icmp.OPTION_SOURCE_LINK) == -1
    assert link_option(mem, 0, icmp.OPTION_SOURCE_LINK) == -1
    assert link_option(mem, 12, icmp.OPTION_SOURCE_LINK) == -2      # cut
    mem[1] = 0
    assert link_option(mem, 16, icmp.OPTION_SOURCE_LINK) == -2      # no length
    mem[1] = 3
    assert link_option(mem, 16, icmp.OPTION_SOURCE_LINK) == -2      # longer than the message
