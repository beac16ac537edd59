"""Frames that the fuzzer begins with: one of each kind that the stack knows, made by scapy."""

from __future__ import annotations

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_LSRR, IPOption_NOP, IPOption_RR, IPOption_Timestamp
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    RouterAlert,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from dataplane.shm import layout as L
from tests.fuzz.engine import Input
from tests.fuzz.mutation import RELATIVE, frame
from tests.inet.test_ip_input import link_frames
from tests.inet.test_tcp_input import OURS, OURS6, PEER, PEER6, PORT, REMOTE, SYN

ETHER = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:09")
BROADCAST = Ether(dst="ff:ff:ff:ff:ff:ff", src="02:00:00:00:00:09")
GROUP4, GROUP6 = "239.1.1.1", "ff02::1:5"
UDP_PORT, CLOSED_PORT = 5000, 9
HALF_OPEN, TIME_WAIT = 40001, 40002         # remote ports of the bed's other connections
PAYLOAD = bytes(range(48))


def ip4(payload: Packet, target: str = OURS, **more: object) -> Packet:
    return IP(src=PEER, dst=target, **more) / payload


def ip6(*layers: Packet, target: str = OURS6, **more: object) -> Packet:
    packet: Packet = IPv6(src=PEER6, dst=target, **more)
    for layer in layers:
        packet /= layer
    return packet


def udp(port: int = UDP_PORT, data: bytes = PAYLOAD) -> Packet:
    return UDP(sport=7, dport=port) / Raw(data)


def packets() -> list[Packet]:
    """IP packets without a link header."""
    options = [IPOption_NOP(), IPOption_RR(pointer=4, routers=["0.0.0.0"]), IPOption_Timestamp()]
    return [
        ip4(udp()), ip4(udp(data=b"")), ip4(udp(), options=options), ip4(udp(), options=[IPOption_LSRR()]),
        ip4(UDP(sport=7, dport=UDP_PORT, chksum=0) / Raw(b"unsummed")), ip4(udp(data=bytes(1200))),
        ip4(Raw(PAYLOAD), proto=99), ip4(ICMP(id=1, seq=2) / Raw(b"ping")), ip4(TCP(sport=1, dport=2)),
        ip4(udp(), flags="MF", id=5, frag=0), ip4(Raw(PAYLOAD), proto=17, id=5, frag=7),
        ip6(udp()), ip6(IPv6ExtHdrHopByHop(options=[RouterAlert(), PadN(optdata=b"")]), udp()),
        ip6(IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(), AH(), udp()), ip6(ICMPv6EchoRequest(data=b"ping")),
        ip6(IPv6ExtHdrFragment(id=5), udp()), ip6(IPv6ExtHdrFragment(id=6, m=1), udp(data=bytes(40))),
        ip6(IPv6ExtHdrFragment(id=6, offset=6, nh=17), Raw(PAYLOAD)), ip6(Raw(b""), nh=59),
    ]


def passive() -> list[Input]:
    """Every packet on every link, tags, and datagrams in pieces."""
    found = [(frame(data, link),) for packet in (ip4(udp()), ip6(udp())) for link, data in link_frames(bytes(packet))]
    found += [(frame(bytes(packet), L.LINK_RAW),) for packet in packets()]
    tagged = [ETHER / Dot1Q(vlan=5), ETHER / Dot1AD(vlan=5) / Dot1Q(vlan=6)]
    found += [(frame(bytes(link / packet)),) for link in tagged for packet in (ip4(udp()), ip6(udp()))]
    raw = [frame(bytes(packet), L.LINK_RAW) for packet in packets()]
    found += [tuple(raw[:3]), tuple(raw[9:11]), tuple(raw[16:18]), (frame(bytes(ETHER / ARP())),)]
    return found


def endpoint() -> list[Input]:
    """What a host is asked on its link: to it, to groups, and about others."""
    packets_here = [*packets(), ip4(udp(), target=GROUP4), ip6(udp(), target=GROUP6), ip4(udp(CLOSED_PORT)),
                    ip6(udp(CLOSED_PORT)), *icmp_errors()]
    found = [(frame(bytes(ETHER / packet)),) for packet in packets_here]
    found += [(frame(bytes(BROADCAST / packet)),) for packet in (ip4(udp(), target="10.0.0.255"), ARP(
        op=1, hwsrc=ETHER.src, psrc=PEER, pdst=OURS))]
    found += [(frame(bytes(ETHER / packet)),) for packet in neighbour()]
    found.append((frame(bytes(ETHER / ip4(udp(data=bytes(1000)))), flags=L.PF_CHECKSUM_PARTIAL),))
    return found


def neighbour() -> list[Packet]:
    mac = ETHER.src
    return [
        ARP(op=1, hwsrc=mac, psrc=PEER, pdst=OURS), ARP(op=2, hwsrc=mac, psrc=PEER, hwdst=ETHER.dst, pdst=OURS),
        ARP(op=1, hwsrc=mac, psrc="0.0.0.0", pdst=OURS), ARP(op=1, hwsrc=mac, psrc=PEER, pdst=PEER),
        ip6(ICMPv6ND_NS(tgt=OURS6), ICMPv6NDOptSrcLLAddr(lladdr=mac), target="ff02::1:ff00:1", hlim=255),
        ip6(ICMPv6ND_NS(tgt=OURS6), hlim=255),
        ip6(ICMPv6ND_NA(tgt=PEER6, S=1, O=1), ICMPv6NDOptDstLLAddr(lladdr=mac), hlim=255),
        IPv6(src="::", dst="ff02::1:ff00:1", hlim=255) / ICMPv6ND_NS(tgt=OURS6),
    ]


def icmp_errors() -> list[Packet]:
    """About segments of the bed's connection, whose numbers are RELATIVE, and about a datagram."""
    ours4, ours6 = IP(src=OURS, dst=PEER), IPv6(src=OURS6, dst=PEER6)
    sent = TCP(sport=PORT, dport=REMOTE, seq=0)
    return [
        ip4(ICMP(type=3, code=4, nexthopmtu=1300) / Raw(bytes(ours4 / sent))),
        ip4(ICMP(type=3, code=1) / Raw(bytes(ours4 / sent)[:28])),
        ip4(ICMP(type=3, code=3) / Raw(bytes(ours4 / udp()))), ip4(ICMP(type=11) / Raw(bytes(ours4 / sent))),
        ip6(ICMPv6PacketTooBig(mtu=1300), Raw(bytes(ours6 / sent))),
        ip6(ICMPv6DestUnreach(code=4), Raw(bytes(ours6 / sent))),
    ]


def tcp() -> list[Input]:
    """Into a listener, a half-open connection, an established one, one in TIME_WAIT, and to a port where nobody is."""
    stamps = [("NOP", None), ("NOP", None), ("Timestamp", (81, 0))]
    sacks = [("NOP", None), ("NOP", None), ("SAck", (2000, 3000))]
    one: list[tuple[Packet, int]] = [
        (TCP(sport=9000, dport=PORT, flags="S", **SYN), 0), (TCP(sport=9000, dport=PORT, flags="A", seq=1001), 0),
        (TCP(sport=HALF_OPEN, dport=PORT, flags="A", seq=1001, options=stamps), RELATIVE),
        (TCP(sport=HALF_OPEN, dport=PORT, flags="S", **SYN), 0),
        (TCP(sport=HALF_OPEN, dport=PORT, flags="R", seq=1001), 0),
        (TCP(sport=HALF_OPEN, dport=PORT, flags="PA", seq=1001, options=stamps) / Raw(b"data"), RELATIVE),
        (TCP(sport=1, dport=CLOSED_PORT, flags="S"), 0), (TCP(sport=1, dport=CLOSED_PORT, flags="A"), 0),
        *((TCP(sport=REMOTE, dport=PORT, flags=flags, seq=seq, options=options) / Raw(data), RELATIVE)
          for flags, seq, options, data in (
              ("A", 1001, stamps, b""), ("PA", 1001, stamps, b"x" * 100), ("PA", 1001, [], b"none"),
              ("A", 1101, stamps, b"y" * 1000), ("FA", 1001, stamps, b""), ("R", 1001, [], b""), ("S", 1001, [], b""),
              ("A", 1001, stamps + sacks, b""), ("UA", 1000, stamps, b"u"))),
        *((TCP(sport=TIME_WAIT, dport=PORT, flags=flags, seq=seq, ack=9000), 0)
          for flags, seq in (("A", 5000), ("FA", 4999), ("S", 6000), ("R", 5000))),
    ]
    found = [(frame(bytes(ETHER / ip4(packet)), flags=flags),) for packet, flags in one]
    found.append(tuple(part for (part,) in found[9:12]))
    found += [(frame(bytes(ETHER / ip4(packet)), flags=RELATIVE),) for packet in icmp_errors()[:2]]
    found.append((frame(bytes(ETHER / ip6(TCP(sport=9000, dport=PORT, flags="S", **SYN)))),))
    return found
