"""Makes the project's own captures: `python -m tests.captures.make`. The same bytes every time.

Small files, each about one thing. `tests/netif/test_pcap.py` replays all of them and checks that they are
what this script makes. Addresses are those for documentation (RFC 5737, RFC 3849).
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR, IPOption_Timestamp
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    RouterAlert,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, CookedLinux, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from tests.captures import formats as f
from tests.captures.quickstart import quickstart

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

A4, B4, A6, B6 = "192.0.2.1", "198.51.100.2", "2001:db8::1", "2001:db8:1::2"
MAC_A, MAC_B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
START = 1_700_000_000 * 10**9


def ether(packet: Packet, *tags: Packet) -> bytes:
    frame = Ether(src=MAC_A, dst=MAC_B)
    for tag in tags:
        frame = frame / tag
    return bytes(frame / packet)


def times(frames: list[bytes], step: int = 1_234_567) -> list[tuple[int, bytes]]:
    return [(START + i * step, frame) for i, frame in enumerate(frames)]


def udp4(payload: bytes = b"hello", port: int = 5353, **fields: object) -> Packet:
    return IP(src=A4, dst=B4, **fields) / UDP(sport=40000, dport=port) / Raw(payload)


def udp6(payload: bytes = b"hello", port: int = 5353) -> Packet:
    return IPv6(src=A6, dst=B6) / UDP(sport=40000, dport=port) / Raw(payload)


def mixed() -> list[Packet]:
    """IP packets, one of each common kind."""
    return [
        udp4(),
        IP(src=B4, dst=A4) / UDP(sport=5353, dport=40000) / Raw(b"an answer"),
        udp6(),
        IPv6(src=B6, dst=A6) / UDP(sport=5353, dport=40000) / Raw(b"an answer"),
        IP(src=A4, dst=B4) / TCP(sport=40001, dport=80, flags="S", seq=1),
        IPv6(src=A6, dst=B6) / TCP(sport=40001, dport=80, flags="S", seq=1),
        IP(src=A4, dst=B4) / ICMP(id=7, seq=1) / Raw(bytes(range(56))),
        IPv6(src=A6, dst=B6) / ICMPv6EchoRequest(id=7, seq=1, data=bytes(range(56))),
        udp4(b""),
        udp4(bytes(1472)),
    ]


# -- fragments ---------------------------------------------------------------------------------------------


def fragment4(payload: bytes, size: int, number: int) -> list[bytes]:
    """Fragments of an UDP datagram with so many bytes of IP payload each."""
    whole = bytes(UDP(bytes(udp4(payload))[20:]))
    head = {"src": A4, "dst": B4, "id": number, "proto": 17}
    return [
        bytes(IP(**head, frag=at // 8, flags="MF" if at + size < len(whole) else 0) / Raw(whole[at:at + size]))
        for at in range(0, len(whole), size)
    ]


def fragment6(payload: bytes, size: int, number: int) -> list[bytes]:
    whole = bytes(udp6(payload))[40:]
    head = {"nh": 17, "id": number}
    return [
        bytes(IPv6(src=A6, dst=B6) / IPv6ExtHdrFragment(**head, offset=at // 8, m=at + size < len(whole))
              / Raw(whole[at:at + size]))
        for at in range(0, len(whole), size)
    ]


def fragments() -> list[bytes]:
    """Raw IP: in order, backwards, doubled, without the last, overlapping, interleaved; and an atomic one."""
    payload = bytes(i % 251 for i in range(3000))
    out: list[bytes] = []
    for make, base in ((fragment4, 100), (fragment6, 200)):
        out += make(payload, 1208, base)
        out += make(payload, 1208, base + 1)[::-1]
        doubled = make(payload, 1480, base + 2)
        out += [doubled[0], doubled[0], *doubled[1:]]
        out += make(payload, 1480, base + 3)[:-1]
        out += [make(payload, 1480, base + 4)[0], make(payload, 1208, base + 4)[1]]
        one, two = make(payload, 1480, base + 5), make(payload[::-1], 1480, base + 6)
        out += [frame for pair in zip(one, two, strict=True) for frame in pair]
    out += fragment6(b"whole", 1480, 300)
    return out


# -- tags, options, extension headers ----------------------------------------------------------------------


def vlan() -> list[bytes]:
    return [
        ether(udp4(), Dot1Q(vlan=10, prio=3)),
        ether(udp6(), Dot1Q(vlan=10)),
        ether(udp4(), Dot1AD(vlan=100), Dot1Q(vlan=10)),
        ether(udp6(), Dot1AD(vlan=100), Dot1Q(vlan=10)),
        ether(udp4(), Dot1Q(vlan=1), Dot1Q(vlan=2)),
        ether(udp4(), Dot1Q(vlan=1), Dot1Q(vlan=2), Dot1Q(vlan=3)),
        ether(ARP(op=1, hwsrc=MAC_A, psrc=A4, pdst=B4), Dot1Q(vlan=10)),
        ether(udp4(), Dot1Q(vlan=10))[:16],
    ]


def options() -> list[bytes]:
    datagram = UDP(sport=40000, dport=5353) / Raw(b"hello")
    head = IPv6(src=A6, dst=B6)
    return [
        bytes(udp4(options=[IPOption_NOP()])),
        bytes(udp4(options=[IPOption_RR(length=15, pointer=4, routers=["0.0.0.0"] * 3)])),
        bytes(udp4(options=[IPOption_Timestamp(length=12, pointer=5, flg=0, timestamp=0)])),
        bytes(udp4(options=[IPOption_NOP()] * 40)),
        bytes(head / IPv6ExtHdrHopByHop(options=[RouterAlert()]) / datagram),
        bytes(head / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(12))]) / datagram),
        bytes(head / IPv6ExtHdrRouting(addresses=["2001:db8::9"], segleft=0) / datagram),
        bytes(head / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting() / datagram),
        bytes(head / IPv6ExtHdrHopByHop() / IPv6ExtHdrFragment(nh=17, id=1) / datagram),
        bytes(head / AH(nh=17, payloadlen=4, spi=1, seq=1, icv=bytes(12)) / datagram),
        bytes(head / IPv6ExtHdrHopByHop(nh=59)),
    ]


def malformed() -> list[bytes]:
    """Ethernet frames that end in a header, or say what cannot be."""
    good, good6 = ether(udp4()), ether(udp6())
    cut = [good[:size] for size in (1, 13, 14, 20, 33, 34, 41)]
    cut6 = [good6[:size] for size in (14, 40, 53, 54, 61)]
    wrong = [
        ether(udp4(version=5)),
        ether(udp4(ihl=4, chksum=0)),
        ether(udp4(ihl=15)),
        ether(udp4(chksum=0x1234)),
        ether(udp4(len=1000)),
        ether(udp4(len=19)),
        ether(udp4(flags="MF", frag=0)),
        ether(udp4(frag=8191)),
        ether(IP(src=A4, dst=B4) / UDP(sport=1, dport=2, len=7) / Raw(b"hello")),
        ether(IP(src=A4, dst=B4) / UDP(sport=1, dport=2, len=200) / Raw(b"hello")),
        ether(IP(src=A4, dst=B4) / UDP(sport=1, dport=2, chksum=0xBEEF) / Raw(b"hello")),
        ether(IPv6(src=A6, dst=B6) / UDP(sport=1, dport=2, chksum=0) / Raw(b"hello")),
        ether(IPv6(src=A6, dst=B6, plen=500) / UDP(sport=1, dport=2) / Raw(b"hello")),
        ether(IPv6(src=A6, dst=B6, nh=0) / Raw(b"\x11\xff" + bytes(6))),
        ether(IP(src=A4, dst=B4) / ICMP(chksum=0x1111)),
        ether(Raw(bytes(46)))[:12] + b"\x88\xcc" + bytes(46),
        good + bytes(60 - len(good)),   # padded, as Ethernet is: nothing is wrong with this one
    ]
    return cut + cut6 + wrong


# -- link types --------------------------------------------------------------------------------------------


def cooked(packet: Packet) -> bytes:
    kind = 0x86DD if isinstance(packet, IPv6) else 0x0800
    return bytes(CookedLinux(pkttype=0, lladdrtype=1, lladdrlen=6, src=bytes(6), proto=kind) / packet)


def cooked2(packet: Packet) -> bytes:
    """LINKTYPE_LINUX_SLL2."""
    kind = 0x86DD if isinstance(packet, IPv6) else 0x0800
    return struct.pack(">HHIHBB8s", kind, 0, 2, 1, 0, 6, bytes(8)) + bytes(packet)


def loopback(packet: Packet, order: str) -> bytes:
    """LINKTYPE_NULL: the address family of the BSD that it was captured on; LINKTYPE_LOOP: ">"."""
    return struct.pack(order + "I", 30 if isinstance(packet, IPv6) else 2) + bytes(packet)


def link_types() -> dict[str, bytes]:
    some = mixed()[:8]
    four = [packet for packet in some if isinstance(packet, IP)]
    six = [packet for packet in some if isinstance(packet, IPv6)]
    return {
        "raw.pcap": f.classic(times([bytes(p) for p in some]), f.RAW),
        "raw_bsd.pcap": f.classic(times([bytes(p) for p in some]), 12),
        "raw_openbsd.pcap": f.classic(times([bytes(p) for p in some]), 14),
        "raw_ipv4.pcap": f.classic(times([bytes(p) for p in four]), 228),
        "raw_ipv6.pcap": f.classic(times([bytes(p) for p in six]), 229),
        "cooked.pcap": f.classic(times([cooked(p) for p in some]), f.SLL),
        "cooked2.pcap": f.classic(times([cooked2(p) for p in some]), f.SLL2),
        "null.pcap": f.classic(times([loopback(p, "<") for p in some]), f.NULL),
        "null_big.pcap": f.classic(times([loopback(p, ">") for p in some]), f.NULL, ">"),
        "loop.pcap": f.classic(times([loopback(p, ">") for p in some]), f.LOOP),
        "wireless.pcap": f.classic(times([bytes(30)]), 105),
    }


# -- file formats ------------------------------------------------------------------------------------------


def formats() -> dict[str, bytes]:
    frames = [ether(packet) for packet in mixed()]
    asked = Ether(src=MAC_A, dst="ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=MAC_A, psrc=A4, pdst=B4)
    frames.insert(3, bytes(asked))
    short = f.classic(times(frames[:5]))
    return {
        "micro_little.pcap": f.classic(times(frames)),
        "micro_big.pcap": f.classic(times(frames), order=">"),
        "nano_little.pcap": f.classic(times(frames), nano=True),
        "nano_big.pcap": f.classic(times(frames), order=">", nano=True),
        "snaplen.pcap": f.classic(times(frames), snaplen=60),
        "no_packets.pcap": f.classic([]),
        "cut_record.pcap": short[:-20],
        "cut_header.pcap": short + bytes(7),
        "interfaces.pcapng": interfaces(frames),
        "sections.pcapng": sections(frames),
        "simple.pcapng": f.section() + f.interface(snaplen=64)
        + b"".join(f.simple(frame[:64], len(frame)) for frame in frames),
        "old_packets.pcapng": f.section(">") + f.interface(order=">") + f.interface(order=">", resolution=9)
        + b"".join(f.old_packet(frame, START // 1000 + i, 0, ">") for i, frame in enumerate(frames[:5]))
        + b"".join(f.old_packet(frame, START + i, 1, ">") for i, frame in enumerate(frames[:5])),
        "wireless.pcapng": f.section() + f.interface() + f.interface(105)
        + f.enhanced(frames[0], START // 1000) + f.enhanced(bytes(30), START // 1000, 1),
        "damaged.pcapng": f.section() + f.interface() + f.enhanced(frames[0], START // 1000)
        + f.enhanced(frames[1], START // 1000)[:-4] + bytes(4),
        "no_interface.pcapng": f.section() + f.enhanced(frames[0], 0),
    }


RESOLUTIONS = (None, 9, 3, 0, 12, 0x80 | 20, 0x80 | 32, 0x80 | 33, 0x80 | 0)


def interfaces(frames: list[bytes]) -> bytes:
    """Many interfaces with resolutions and link types of their own, and blocks to be passed over."""
    out = [f.section(extra=[(4, b"make.py")])]
    out += [f.interface(resolution=resolution) for resolution in RESOLUTIONS]
    out += [f.interface(f.RAW), f.interface(resolution=9, offset=3600), f.interface(resolution=6, offset=-5)]
    out.append(f.block(4, bytes(4)))                                        # name resolution
    for number, resolution in enumerate((*RESOLUTIONS, None, 9, 6)):
        exponent = 6 if resolution is None else resolution
        units = 2 ** (exponent & 0x7F) if exponent & 0x80 else 10**exponent
        ticks = (START // 10**9 * units + units // 3) % 2**64
        data = frames[number % len(frames)]
        if number == len(RESOLUTIONS):
            data = data[14:]
        out.append(f.enhanced(data, ticks, number, extra=[(2, struct.pack("<I", 2)), (1, b"a comment")]))
        out.append(f.block(5, bytes(12)))                                   # interface statistics
    out.append(f.block(0x0BAD, struct.pack("<I", 32473) + b"custom"))       # an enterprise's own
    out.append(f.block(0x80000001, b"whatever"))                            # local use
    return b"".join(out)


def sections(frames: list[bytes]) -> bytes:
    """Sections in both byte orders; each has interfaces of its own."""
    out = []
    for number, order in enumerate("<><>"):
        out += [f.section(order), f.interface(order=order, resolution=9)]
        if number % 2:
            out.append(f.interface(f.RAW, order, resolution=6))
            out.append(f.enhanced(frames[0][14:], START // 1000 + number, 1, order))
        out += [f.enhanced(frame, START + number, 0, order) for frame in frames[number:number + 3]]
    out.append(f.section())     # and one without anything
    return b"".join(out)


@functools.cache
def files() -> dict[Path, bytes]:
    """All captures: where each belongs, and its bytes."""
    captures = {
        "fragments.pcap": f.classic(times(fragments()), f.RAW),
        "vlan.pcap": f.classic(times(vlan())),
        "options.pcap": f.classic(times(options()), f.RAW),
        "malformed.pcap": f.classic(times(malformed())),
        **link_types(),
        **formats(),
    }
    captures = {HERE / name: data for name, data in captures.items()}
    return {**captures, ROOT / "configs/quickstart.pcap": quickstart()}


if __name__ == "__main__":
    for path, data in files().items():
        path.write_bytes(data)
        print(f"{len(data):7} {path.relative_to(ROOT)}")
