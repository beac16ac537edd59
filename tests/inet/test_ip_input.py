"""Link and IP headers of every kind, good and bad, through the whole worker: the right record, or the right reason."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption, IPOption_EOL, IPOption_LSRR, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    HBHOptUnknown,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    Pad1,
    PadN,
    RouterAlert,
)
from scapy.layers.l2 import ARP, LLC, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from dataplane.shm import layout as L
from tests.bed import Bed, Frame
from tests.traffic import internet_checksum

from . import naive_input as naive

PORT = 5000
Beds = tuple[Bed, Bed]


# Both addresses given: scapy would ask the network for them.
ETHER = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")


def ethernet(kind: int) -> Packet:
    """An Ethernet header with this type."""
    return Ether(dst=ETHER.dst, src=ETHER.src, type=kind)


def ip4(**more: object) -> Packet:
    return IP(src="192.0.2.1", dst="10.0.0.1", **more) / UDP(sport=7, dport=PORT) / Raw(b"payload")


def ip6(*chain: Packet, **more: object) -> Packet:
    packet = IPv6(src="fd01::1", dst="fd00::1", **more)
    for header in chain:
        packet /= header
    return packet / UDP(sport=7, dport=PORT) / Raw(b"payload!")


def patched(data: bytes, at: int, new: bytes, seal: bool = True) -> bytes:
    """The IPv4 packet with some bytes replaced and a right header checksum again."""
    data = data[:at] + new + data[at + len(new):]
    if not seal:
        return data
    header = max((data[0] & 15) * 4, 20)
    data = data[:10] + b"\0\0" + data[12:]
    return data[:10] + struct.pack("!H", internet_checksum(data[:header])) + data[12:]


@pytest.fixture(scope="module")
def beds() -> Beds:
    """The fast way, and the slow one: a raw socket that takes nothing makes every frame go there."""
    fast, slow = Bed(), Bed()
    slow.open("raw", proto=255, address="203.0.113.255")
    return fast, slow


@pytest.fixture(autouse=True)
def open_socket(beds: Beds) -> Iterator[None]:
    """A wildcard socket in both, empty at the beginning of each test."""
    global sockets
    sockets = [bed.open("udp", port=PORT) for bed in beds]
    yield
    for bed, sock in zip(beds, sockets, strict=True):
        bed.close(sock)


def received(beds: Beds, frame: Frame | bytes) -> tuple[str, bytes, int | None]:
    """(reason or "", record, VLAN tag) of one frame, the same on both ways."""
    results = []
    for bed, sock in zip(beds, sockets, strict=True):
        outcome = bed.send([frame])
        records = bed.records(sock)
        assert outcome.transmitted == 0 and outcome.held == 0
        assert (outcome.delivered, outcome.deliveries) == (len(records), len(records))
        assert sum(outcome.reasons.values()) == 1 - len(records)
        results.append((*outcome.reasons, *[(one.data, one.vlan, one.aux & 0xFFFF, one.time) for one in records]))
    assert results[0] == results[1]
    (result,) = results[0]
    return (result, b"", None) if isinstance(result, str) else ("", result[0], result[1])


def reason(beds: Beds, frame: Frame | bytes) -> str:
    return received(beds, frame)[0]


# -- links -------------------------------------------------------------------------------------------------


def link_frames(packet: bytes) -> list[tuple[int, bytes]]:
    version = packet[0] >> 4
    kind = 0x0800 if version == 4 else 0x86DD
    frames = [
        (L.LINK_ETHERNET, bytes(6) + bytes(6) + struct.pack("!H", kind) + packet),
        (L.LINK_RAW, packet),
        (L.LINK_SLL, struct.pack("!HHH8sH", 0, 1, 6, bytes(8), kind) + packet),
        (L.LINK_SLL2, struct.pack("!HHIHBB8s", kind, 0, 1, 1, 0, 6, bytes(8)) + packet),
    ]
    for family in (2,) if version == 4 else (24, 28, 30):
        frames += [(L.LINK_NULL, family.to_bytes(4, order) + packet) for order in ("little", "big")]
    return frames


@pytest.mark.parametrize("packet", [bytes(ip4()), bytes(ip6())], ids=["ipv4", "ipv6"])
def test_every_link(beds: Beds, packet: bytes) -> None:
    for link, frame in link_frames(packet):
        assert received(beds, Frame(frame, link)) == ("", packet, None)
        assert received(beds, Frame(frame + b"padding", link)) == ("", packet, None)
        for size in range(len(frame)):
            assert reason(beds, Frame(frame[:size], link)) == "truncated"


@pytest.mark.parametrize(("link", "frame", "expected"), [
    (L.LINK_ETHERNET, bytes(ETHER / LLC() / Raw(bytes(40))), "not_ip"),
    (L.LINK_ETHERNET, bytes(ethernet(0x88CC) / Raw(bytes(40))), "not_ip"),
    (L.LINK_ETHERNET, bytes(ETHER / ARP()), "arp"),
    (L.LINK_ETHERNET, bytes(ethernet(0x0800) / ip6()), "bad_ip_version"),
    (L.LINK_ETHERNET, bytes(ethernet(0x86DD) / ip4() / Raw(bytes(40))), "bad_ip_version"),
    (L.LINK_RAW, b"\x50" + bytes(60), "bad_ip_version"),
    (L.LINK_RAW, b"", "truncated"),
    (L.LINK_NULL, b"\x07\0\0\0" + bytes(60), "not_ip"),
    (L.LINK_NULL, b"\xff\xff\xff\xff" + bytes(60), "not_ip"),
    (L.LINK_SLL, bytes(14) + b"\x00\x01" + bytes(60), "not_ip"),
    (L.LINK_SLL2, bytes(80), "not_ip"),
])
def test_what_is_no_ip(beds: Beds, link: int, frame: bytes, expected: str) -> None:
    assert reason(beds, Frame(frame, link)) == expected


@pytest.mark.parametrize("inner", [ip4(), ip6()], ids=["ipv4", "ipv6"])
def test_vlan_tags(beds: Beds, inner: Packet) -> None:
    kind = 0x0800 if inner.version == 4 else 0x86DD
    for outer_type in (0x8100, 0x88A8, 0x9100):
        single = ethernet(outer_type) / Dot1Q(vlan=0xFFE, prio=7, type=kind) / inner
        assert received(beds, bytes(single)) == ("", bytes(inner), 0xEFFE)
        double = ethernet(outer_type) / Dot1AD(vlan=5, type=0x8100) / Dot1Q(vlan=6, type=kind) / inner
        assert received(beds, bytes(double)) == ("", bytes(inner), 5)
        for size in range(14, len(bytes(double))):
            assert reason(beds, bytes(double)[:size]) == "truncated"
    triple = ETHER / Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1Q(vlan=3) / inner
    assert reason(beds, bytes(triple)) == "vlan_depth"
    assert reason(beds, bytes(ETHER / Dot1Q(vlan=1) / ARP())) == "arp"
    assert reason(beds, bytes(ETHER / Dot1Q(vlan=1, type=0x88CC) / Raw(bytes(60)))) == "not_ip"


# -- IPv4 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    [IPOption_NOP()], [IPOption_NOP()] * 40, [IPOption_EOL()], [IPOption_RR()],
    [IPOption(b"\x94\x04\0\0")], [IPOption_NOP(), IPOption(b"\x44\x0c\x05\0" + bytes(8))],
    [IPOption_EOL(), IPOption(b"\x83\xff\xff")],            # behind the end nothing is an option
])
def test_ipv4_options(beds: Beds, options: list[Packet]) -> None:
    packet = bytes(ip4(options=options))
    assert received(beds, bytes(ETHER)[:12] + b"\x08\0" + packet) == ("", packet, None)


BAD4: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "version 5": (lambda p: patched(p, 0, b"\x55"), "bad_ip_version"),
    "header of 16": (lambda p: patched(p, 0, b"\x44"), "bad_ip_header"),
    "header of 0": (lambda p: patched(p, 0, b"\x40"), "bad_ip_header"),
    "header past the total": (lambda p: patched(p, 0, b"\x4f"), "bad_ip_header"),
    "total of 0": (lambda p: patched(p, 2, b"\0\0"), "bad_ip_header"),
    "total of 19": (lambda p: patched(p, 2, b"\0\x13"), "bad_ip_header"),
    "total past the frame": (lambda p: patched(p, 2, struct.pack("!H", len(p) + 1)), "truncated"),
    "total of 65535": (lambda p: patched(p, 2, b"\xff\xff"), "truncated"),
    "checksum": (lambda p: patched(p, 10, b"\0\0", seal=False), "bad_ip_checksum"),
    "time to live damaged": (lambda p: patched(p, 8, b"\1", seal=False), "bad_ip_checksum"),
}


@pytest.mark.parametrize("name", BAD4)
def test_bad_ipv4(beds: Beds, name: str) -> None:
    spoil, expected = BAD4[name]
    assert reason(beds, Frame(spoil(bytes(ip4())), L.LINK_RAW)) == expected


@pytest.mark.parametrize("options", [
    b"\x83\x07\x04\x01\x02\x03\x04\0", b"\x89\x07\x04\x01\x02\x03\x04\0",        # source routes
    b"\x01\x01\x01\x07", b"\x07\x00\0\0", b"\x07\x01\0\0", b"\x07\x05\0\0", b"\x44\xff\0\0",
])
def test_bad_ipv4_options(beds: Beds, options: bytes) -> None:
    packet = bytes(ip4(options=[IPOption_NOP()] * len(options)))
    assert reason(beds, Frame(patched(packet, 20, options), L.LINK_RAW)) == "bad_ip_options"
    assert bytes(ip4(options=[IPOption_LSRR(routers=["1.2.3.4"])]))[20] == 131


# -- IPv6 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [
    [IPv6ExtHdrHopByHop(options=[RouterAlert(), PadN(optdata=b"\0\0")])],
    [IPv6ExtHdrDestOpt(options=[Pad1(), Pad1(), HBHOptUnknown(otype=0x1E, optdata=b"ab")])],
    [IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(segleft=0, addresses=["fd02::1"]),
     IPv6ExtHdrDestOpt()],
    [IPv6ExtHdrDestOpt()] * 8,
    [IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(250))] * 8)],
], ids=lambda chain: "-".join(type(one).__name__ for one in chain))
def test_extension_headers(beds: Beds, chain: list[Packet]) -> None:
    packet = bytes(ip6(*chain))
    assert received(beds, Frame(packet, L.LINK_RAW)) == ("", packet, None)


def _chain_of(first: int, headers: bytes) -> bytes:
    """A packet with these extension headers as they are; the last one names UDP."""
    whole = bytes(ip6())
    return whole[:4] + struct.pack("!HB", len(headers) + len(whole) - 40, first) + whole[7:40] + headers + whole[40:]


def test_authentication_header(beds: Beds) -> None:
    """Its length counts four bytes, not eight (RFC 4302 section 2.2). Scapy's checksum behind one is wrong."""
    packet = _chain_of(51, b"\x11\4" + bytes(22))
    assert received(beds, Frame(packet, L.LINK_RAW)) == ("", packet, None)


@pytest.mark.parametrize(("first", "headers"), [
    (60, b"\x3c\0\1\4\0\0\0\0" * 8 + b"\x11\0\1\4\0\0\0\0"),                # nine headers
    (60, b"\0\0\1\4\0\0\0\0" + b"\x11\0\1\4\0\0\0\0"),                      # hop-by-hop is not the first
    (0, b"\0\0\1\4\0\0\0\0" + b"\x11\0\1\4\0\0\0\0"),
    (60, b"\x11\xff\1\4\0\0\0\0"),                                          # longer than the packet
    (60, b"\x11\0\1\5\0\0\0\0"),                                            # an option longer than its header
    (60, b"\x11\0\0\0\0\0\0\1"),                                            # an option without length
    (60, b"\x11\0\x41\4\0\0\0\0"), (0, b"\x11\0\x81\4\0\0\0\0"), (0, b"\x11\0\xc2\4\0\0\0\0"),
    (43, b"\x11\0\0\1\0\0\0\0"),                                            # segments are left
    (51, b"\x11\xff\0\0\0\0\0\0"),
])
def test_bad_extension_headers(beds: Beds, first: int, headers: bytes) -> None:
    assert reason(beds, Frame(_chain_of(first, headers), L.LINK_RAW)) == "bad_extension_header"


@pytest.mark.parametrize("kind", [0, 43, 44, 51, 60])
def test_extension_header_past_the_end(beds: Beds, kind: int) -> None:
    packet = bytes(IPv6(src="fd01::1", dst="fd00::1", nh=kind) / Raw(b"\x11\0\0\0\0\0\0"))
    assert reason(beds, Frame(packet, L.LINK_RAW)) == "bad_extension_header"


def test_ipv6_lengths(beds: Beds) -> None:
    packet = bytes(ip6())
    assert reason(beds, Frame(packet[:4] + b"\xff\xff" + packet[6:], L.LINK_RAW)) == "truncated"
    assert reason(beds, Frame(packet[:4] + b"\0\0" + packet[6:], L.LINK_RAW)) == "bad_udp_length"
    assert reason(beds, Frame(packet, L.LINK_RAW)) == ""


# -- against the oracle ------------------------------------------------------------------------------------


BASES = [bytes(ETHER / one) for one in (
    ip4(), ip6(), ip4(options=[IPOption_RR(), IPOption_NOP()]), ip6(IPv6ExtHdrHopByHop(options=[RouterAlert()])),
    ip6(IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(segleft=0)), Dot1Q(vlan=3) / ip4(),
    Dot1AD(vlan=3) / Dot1Q(vlan=4) / ip6(), ip4(flags="DF"), IP(dst="10.0.0.1") / TCP(), IP(dst="10.0.0.1") / ICMP(),
    IPv6(dst="fd00::1") / TCP())]


@st.composite
def mutated(draw: st.DrawFn) -> Frame:
    """A good frame with bytes replaced, cut or longer, on any link; often with a right header checksum again."""
    link = draw(st.sampled_from((L.LINK_ETHERNET, L.LINK_ETHERNET, L.LINK_RAW, L.LINK_NULL, L.LINK_SLL, L.LINK_SLL2)))
    data = draw(st.sampled_from(BASES))
    if link != L.LINK_ETHERNET:
        packet = data[14:] if data[12] in (0x08, 0x86) else bytes(ip4())
        data = dict(link_frames(packet))[link]
    frame = bytearray(data)
    for at, value in draw(st.lists(st.tuples(st.integers(0, 90), st.one_of(
            st.integers(0, 255), st.sampled_from((0, 1, 6, 17, 43, 44, 58, 60, 0x45, 0x46, 0x60, 0x81)))), max_size=4)):
        frame[at % len(frame)] = value
    size = draw(st.one_of(st.just(len(frame)), st.integers(0, len(frame) + 20)))
    data = bytes(frame[:size]) + bytes(max(size - len(frame), 0))
    at = len(data) - len(bytes(frame)) + 14 if link == L.LINK_ETHERNET and size == len(frame) else 0
    if at and draw(st.booleans()) and len(data) >= 34 and data[14] >> 4 == 4:
        data = data[:14] + patched(data[14:], 8, data[22:23])
    return Frame(data, link)


@settings(max_examples=1500)
@given(mutated())
def test_agrees_with_the_oracle(beds: Beds, frame: Frame) -> None:
    try:
        packet = naive.packet(frame.data, frame.link)
        if packet.fragment:
            return      # test_demux
        naive.need(packet.proto == 17, "no_socket")
        record, payload = naive.datagram(packet)
        port = naive.number(packet.data, packet.at + 2)
        target = packet.data[16] >> 4 == 0xE or packet.data[16:20] == b"\xff" * 4 if packet.family == 4 else False
        naive.need(port == PORT, "no_socket")
        assert payload <= len(record) and target in (False, True)
        expected = ("", record, packet.vlan)
    except naive.Bad as bad:
        expected = (str(bad), b"", None)
    assert received(beds, frame) == expected


# -- an endpoint's addresses -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoints() -> Beds:
    fast, slow = (Bed(["10.0.0.1/24", "10.1.0.1/31", "fd00::1/64"]) for _ in range(2))
    slow.open("raw", proto=255, address="203.0.113.255")
    return fast, slow


def fate(endpoints: Beds, packet: Packet, flags: int = 0) -> str:
    """The reason, or "" for a packet that was delivered; the same on both ways."""
    results = set()
    for bed in endpoints:
        sock = bed.open("udp", port=PORT)
        outcome = bed.send([Frame(bytes(ETHER / packet), flags=flags)])
        assert outcome.delivered == len(bed.records(sock))
        bed.close(sock)
        results.add("".join(outcome.reasons))
    (result,) = results
    return result


@pytest.mark.parametrize(("source", "target", "expected"), [
    ("192.0.2.1", "10.0.0.1", ""), ("192.0.2.1", "10.1.0.1", ""), ("0.0.0.0", "10.0.0.1", ""),
    ("192.0.2.1", "10.0.0.255", ""), ("192.0.2.1", "255.255.255.255", ""), ("192.0.2.1", "224.0.0.251", ""),
    ("192.0.2.1", "10.0.0.2", "not_local"), ("192.0.2.1", "10.1.0.0", "not_local"),
    ("192.0.2.1", "10.0.0.0", "not_local"), ("224.0.0.1", "10.0.0.1", "martian"),
    ("255.255.255.255", "10.0.0.1", "martian"), ("10.0.0.255", "10.0.0.1", "martian"),
    ("127.0.0.1", "10.0.0.1", "martian"), ("192.0.2.1", "127.0.0.1", "martian"),
    ("fd01::1", "fd00::1", ""), ("::", "fd00::1", ""), ("fd01::1", "ff02::1", ""), ("fd01::1", "fd00::2", "not_local"),
    ("fd01::1", "::", "not_local"), ("fd01::1", "::1", "not_local"), ("ff02::1", "fd00::1", "martian"),
    ("::1", "fd00::1", "martian"), ("::ffff:10.0.0.1", "fd00::1", ""), ("fd01::1", "::10.0.0.1", "not_local"),
])
def test_addresses(endpoints: Beds, source: str, target: str, expected: str) -> None:
    packet = (IPv6 if ":" in target else IP)(src=source, dst=target) / UDP(sport=7, dport=PORT) / Raw(b"x")
    assert fate(endpoints, packet) == expected


def test_another_station_s_frames(endpoints: Beds, beds: Beds) -> None:
    assert fate(endpoints, ip4(), L.PF_OTHERHOST) == "other_host"
    assert reason(beds, Frame(bytes(ip4()), L.LINK_RAW, L.PF_OTHERHOST)) == ""
