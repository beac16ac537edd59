"""The trace of the quickstart: ten seconds at a small network's edge, made up. Used by `make.py`.

What is in it, in the order of frequency: DNS between many clients and a resolver (IPv4 and IPv6, about
every twentieth name does not exist), telemetry by UDP from 64 sensors to ports 5000 to 5003, some of it
in fragments, pings, ARP, and a TCP handshake.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from tests.captures import formats

RESOLVER4, RESOLVER6 = "192.0.2.53", "2001:db8::53"
COLLECTOR = "192.0.2.10"
GATEWAY, GATEWAY_MAC, SERVER_MAC = "192.0.2.1", "02:00:00:00:00:01", "02:00:00:00:00:53"
START = 1_750_000_000 * 10**9
NAMES = ("www", "mail", "api", "cdn", "ns1", "img", "login", "shop", "docs", "git", "time", "status")
DOMAINS = ("example.com", "example.net", "example.org")

Timed = tuple[int, bytes]


def ether(packet: Packet, inbound: bool) -> bytes:
    source, target = (GATEWAY_MAC, SERVER_MAC) if inbound else (SERVER_MAC, GATEWAY_MAC)
    return bytes(Ether(src=source, dst=target) / packet)


def question(name: str, kind: int) -> bytes:
    """RFC 1035 section 4.1.2."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return labels + b"\0" + struct.pack(">HH", kind, 1)


def query(number: int, name: str, kind: int) -> bytes:
    return struct.pack(">6H", number, 0x0100, 1, 0, 0, 0) + question(name, kind)


def answer(number: int, name: str, kind: int, address: str | None) -> bytes:
    """One address record, or (None) that the name does not exist."""
    head = struct.pack(">6H", number, 0x8183 if address is None else 0x8180, 1, address is not None, 0, 0)
    if address is None:
        return head + question(name, kind)
    data = socket.inet_pton(socket.AF_INET6 if kind == 28 else socket.AF_INET, address)
    return head + question(name, kind) + struct.pack(">HHHIH", 0xC00C, kind, 1, 300, len(data)) + data


def dns(rng: random.Random, count: int) -> Iterator[Timed]:
    """Queries and their answers, of 60 clients."""
    for _ in range(count):
        client, six = rng.randrange(60), rng.random() < 0.3
        source, target = (f"2001:db8:1::{client + 1:x}", RESOLVER6) if six else (
            f"198.51.100.{client + 10}", RESOLVER4)
        layer = IPv6 if six else IP
        number, port, kind = rng.randrange(65536), rng.randrange(1024, 65536), rng.choice((1, 1, 28))
        name = f"{rng.choice(NAMES)}.{rng.choice(DOMAINS)}"
        address = f"203.0.113.{rng.randrange(1, 255)}" if kind == 1 else f"2001:db8:2::{rng.randrange(1, 99):x}"
        if rng.random() < 0.05:
            name, address = f"no-such-host-{rng.randrange(100)}.example.com", None
        time = START + rng.randrange(10**10)
        asked = layer(src=source, dst=target) / UDP(sport=port, dport=53) / Raw(query(number, name, kind))
        reply = answer(number, name, kind, address)
        told = layer(src=target, dst=source) / UDP(sport=53, dport=port) / Raw(reply)
        yield time, ether(asked, True)
        yield time + rng.randrange(200_000, 20_000_000), ether(told, False)


def telemetry(rng: random.Random, rounds: int) -> Iterator[Timed]:
    """Each of 64 sensors reports once a round; now and then a report is too long for one packet."""
    for turn in range(rounds):
        for sensor in range(64):
            port, time = 5000 + sensor % 4, START + turn * 10**10 // rounds + rng.randrange(10**10 // rounds)
            text = f"sensor={sensor} seq={turn} temp={rng.uniform(15, 30):.2f} hum={rng.uniform(30, 70):.1f}"
            payload = text.encode()
            if sensor == 7 and turn % 4 == 0:
                payload = (text.encode() + b" ").ljust(2400, b"#")
            head = IP(src=f"203.0.113.{sensor + 100}", dst=COLLECTOR, id=turn * 64 + sensor + 1)
            datagram = bytes(head / UDP(sport=20000 + sensor, dport=port) / Raw(payload))
            yield from ((time + i, ether(piece, True)) for i, piece in enumerate(pieces(IP(datagram))))


def pieces(packet: Packet, size: int = 1480) -> list[Packet]:
    """The packet, in fragments if it is longer than that."""
    whole = bytes(packet)[20:]
    if len(whole) <= size:
        return [packet]
    return [
        IP(src=packet.src, dst=packet.dst, id=packet.id, proto=17, frag=at // 8,
           flags="MF" if at + size < len(whole) else 0) / Raw(whole[at:at + size])
        for at in range(0, len(whole), size)
    ]


def pings(rng: random.Random, count: int) -> Iterator[Timed]:
    for i in range(count):
        time, data = START + i * 10**10 // count, bytes(rng.randrange(256) for _ in range(32))
        four, six = f"198.51.100.{10 + i}", f"2001:db8:1::{i + 1:x}"
        yield time, ether(IP(src=four, dst=RESOLVER4) / ICMP(id=i, seq=1) / Raw(data), True)
        yield time + 90_000, ether(IP(src=RESOLVER4, dst=four) / ICMP(type=0, id=i, seq=1) / Raw(data), False)
        yield time + 10**6, ether(IPv6(src=six, dst=RESOLVER6) / ICMPv6EchoRequest(id=i, data=data), True)
        yield time + 1_090_000, ether(IPv6(src=RESOLVER6, dst=six) / ICMPv6EchoReply(id=i, data=data), False)


def arp(count: int) -> Iterator[Timed]:
    for i in range(count):
        time = START + 5 * 10**8 + i * 10**10 // count
        yield time, bytes(Ether(src=GATEWAY_MAC, dst="ff:ff:ff:ff:ff:ff")
                          / ARP(op=1, hwsrc=GATEWAY_MAC, psrc=GATEWAY, pdst=RESOLVER4))
        yield time + 50_000, bytes(Ether(src=SERVER_MAC, dst=GATEWAY_MAC) / ARP(
            op=2, hwsrc=SERVER_MAC, psrc=RESOLVER4, hwdst=GATEWAY_MAC, pdst=GATEWAY))


def handshake() -> Iterator[Timed]:
    """Opened, and closed again without a word."""
    client, server, time = ("198.51.100.77", 49152), (RESOLVER4, 53), START + 2 * 10**9
    for i, (inbound, flags, seq, ack) in enumerate((
        (True, "S", 1000, 0), (False, "SA", 5000, 1001), (True, "A", 1001, 5001),
        (True, "FA", 1001, 5001), (False, "FA", 5001, 1002), (True, "A", 1002, 5002),
    )):
        (source, sport), (target, dport) = (client, server) if inbound else (server, client)
        segment = TCP(sport=sport, dport=dport, flags=flags, seq=seq, ack=ack)
        yield time + i * 10**7, ether(IP(src=source, dst=target) / segment, inbound)


def quickstart() -> bytes:
    """The capture, classic pcap with microseconds."""
    rng = random.Random(1)
    packets = [*dns(rng, 330), *telemetry(rng, 12), *pings(rng, 10), *arp(8), *handshake()]
    return formats.classic(sorted(packets))
