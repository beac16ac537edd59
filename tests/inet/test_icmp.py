"""Answers and errors of ICMP and ICMPv6, as scapy reads them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet import fragment as fragment4
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6MLReport,
    ICMPv6ParamProblem,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    defragment6,
)
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane import ledger
from dataplane.shm import layout as L
from tests.inet import rig as kernels
from tests.inet.rig import MAC, Rig

PEER = "02:00:00:00:00:99"
PORT, PROTOCOL = 0, 1


@pytest.fixture(scope="module")
def shared() -> Rig:
    return Rig()


def icmp(rig: Rig, packet: Any, flags: int = 0) -> tuple[int, list[bytes]]:
    verdict = int(kernels.icmp_input(rig.mem, rig.w, rig.tun, rig.describe(bytes(packet), flags=flags)))
    return verdict, [frame for _, frame in rig.sent()]


def unreachable(rig: Rig, packet: Any, kind: int = PORT, flags: int = 0) -> list[bytes]:
    count = kernels.unreachable(rig.mem, rig.w, rig.tun, rig.describe(bytes(packet), flags=flags), kind)
    sent = [frame for _, frame in rig.sent()]
    assert len(sent) == count
    return sent


@settings(max_examples=50)
@given(st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=1400), st.booleans())
def test_echo(shared: Rig, ident: int, seq: int, data: bytes, options: bool) -> None:
    rig = shared
    request = (IP(src="10.1.0.2", dst="10.1.0.1", options=[IPOption_NOP()] * 4 if options else [])
               / ICMP(id=ident, seq=seq) / Raw(data))
    verdict, (reply,) = icmp(rig, request)
    assert verdict == -ledger.ICMP_ECHO
    identification = IP(reply).id
    assert reply == bytes(IP(src="10.1.0.1", dst="10.1.0.2", id=identification)
                          / ICMP(type=0, id=ident, seq=seq) / Raw(data))
    verdict, (reply,) = icmp(rig, IPv6(src="fd01::2", dst="fd01::1") / ICMPv6EchoRequest(
        id=ident, seq=seq, data=data))
    assert verdict == -ledger.ICMP_ECHO
    assert reply == bytes(IPv6(src="fd01::1", dst="fd01::2") / ICMPv6EchoReply(id=ident, seq=seq, data=data))
    rig.check_guards()


@pytest.mark.parametrize("mtu", [576, 1500, 9000])
def test_largest_echo(mtu: int) -> None:
    rig = Rig(mtu=mtu)
    data = bytes(range(256)) * 256
    request = IP(src="10.1.0.2", dst="10.1.0.1", flags=0) / ICMP(id=1, seq=2) / Raw(data[:65507])
    _, frames = icmp(rig, request, flags=L.PF_REASSEMBLED)
    assert max(map(len, frames)) <= mtu
    parts = [IP(frame) for frame in frames]
    expected = fragment4(IP(src="10.1.0.1", dst="10.1.0.2", id=parts[0].id)
                         / ICMP(type=0, id=1, seq=2) / Raw(data[:65507]), (mtu - 20) & ~7)
    assert [bytes(part) for part in parts] == [bytes(part) for part in expected]
    mtu = max(mtu, 1280)
    rig = Rig(mtu=mtu)
    _, frames = icmp(rig, IPv6(src="fd01::2", dst="fd01::1") / ICMPv6EchoRequest(data=data[:65527]))
    assert max(map(len, frames)) <= mtu
    whole = defragment6([IPv6(frame) for frame in frames])
    assert bytes(whole) == bytes(IPv6(src="fd01::1", dst="fd01::2") / ICMPv6EchoReply(data=data[:65527]))
    rig.check_guards()


@pytest.mark.parametrize("family", [4, 6])
def test_bad_messages(family: int) -> None:
    rig = Rig()
    network = IP(src="10.1.0.2", dst="10.1.0.1") if family == 4 else IPv6(src="fd01::2", dst="fd01::1")
    message = ICMP() if family == 4 else ICMPv6EchoRequest()
    packet = bytearray(bytes(network / message / Raw(b"data")))
    packet[-1] ^= 1
    assert icmp(rig, packet) == (-ledger.BAD_ICMP, [])
    assert icmp(rig, packet, L.PF_CHECKSUM_OK)[0] == -ledger.ICMP_ECHO
    short = network.__class__(bytes(network / Raw(bytes(7))))
    short.nh = short.proto = 58 if family == 6 else 1
    assert icmp(rig, short) == (-ledger.BAD_ICMP, [])


def test_what_is_not_answered() -> None:
    rig = Rig()
    ours = IP(src="10.1.0.2", dst="10.1.0.1")
    assert icmp(rig, ours / ICMP(type=0)) == (-ledger.ICMP, [])
    assert icmp(rig, ours / ICMP(type=13)) == (-ledger.ICMP, [])
    group = IP(src="10.1.0.2", dst="224.0.0.1")
    assert icmp(rig, group / ICMP(), L.PF_MULTICAST) == (-ledger.ICMP, [])
    for source in ("0.0.0.0", "224.0.0.1", "255.255.255.255", "10.1.0.255", "10.1.0.1", "127.0.0.1"):
        assert icmp(rig, IP(src=source, dst="10.1.0.1") / ICMP())[1] == []
    for source in ("::", "ff02::1", "fd01::1", "::1"):
        assert icmp(rig, IPv6(src=source, dst="fd01::1") / ICMPv6EchoRequest())[1] == []
    report = IPv6(src="fd01::2", dst="ff02::2", hlim=1) / ICMPv6MLReport()
    assert icmp(rig, report, L.PF_MULTICAST) == (-ledger.MULTICAST_CONTROL, [])


def test_echo_to_an_ipv6_group_comes_from_our_address() -> None:
    _, (reply,) = icmp(Rig(), IPv6(src="fd01::2", dst="ff02::1") / ICMPv6EchoRequest(), L.PF_MULTICAST)
    assert (IPv6(reply).src, IPv6(reply).dst) == ("fd01::1", "fd01::2")


def test_passive_netif_never_answers() -> None:
    rig = Rig()
    rig.put(rig.tun + L.N_FLAGS, L.NF_PASSIVE)
    assert icmp(rig, IP(src="10.1.0.2", dst="10.1.0.1") / ICMP())[1] == []
    assert unreachable(rig, IP(src="10.1.0.2", dst="10.1.0.1") / UDP()) == []


def test_answer_on_ethernet_goes_to_the_station_that_asked() -> None:
    rig = Rig()
    request = Ether(src=PEER, dst=MAC) / IP(src="10.0.0.9", dst="10.0.0.1") / ICMP()
    for tagged in (False, True):
        rig.describe(bytes(request), link=L.LINK_ETHERNET)
        rig.put(rig.p + L.P_VLAN, 5 if tagged else -1)
        kernels.icmp_input(rig.mem, rig.w, rig.ethernet, rig.p)
        sent = rig.sent()
        assert len(sent) == (0 if tagged else 1)
        if not tagged:
            reply = Ether(sent[0][1])
            assert (reply.dst, reply.src, reply[IP].dst) == (PEER, MAC, "10.0.0.9")


@settings(max_examples=30)
@given(st.integers(0, 3000))
def test_unreachable4(shared: Rig, size: int) -> None:
    rig = shared
    rig.advance(2)
    offending = IP(src="10.1.0.2", dst="10.1.0.1") / UDP(sport=5, dport=6) / Raw(bytes(size))
    for kind, code in ((PORT, 3), (PROTOCOL, 2)):
        (frame,) = unreachable(rig, offending, kind)
        quoted = bytes(offending)[:576 - 28]
        assert frame == bytes(IP(src="10.1.0.1", dst="10.1.0.2", id=IP(frame).id)
                              / ICMP(type=3, code=code) / Raw(quoted))
    rig.check_guards()


@settings(max_examples=30)
@given(st.integers(0, 3000))
def test_unreachable6(shared: Rig, size: int) -> None:
    rig = shared
    rig.advance(2)
    offending = IPv6(src="fd01::2", dst="fd01::1") / UDP(sport=5, dport=6) / Raw(bytes(size))
    quoted = Raw(bytes(offending)[:1280 - 48])
    base = IPv6(src="fd01::1", dst="fd01::2")
    assert unreachable(rig, offending, PORT) == [bytes(base / ICMPv6DestUnreach(code=4) / quoted)]
    assert unreachable(rig, offending, PROTOCOL) == [bytes(base / ICMPv6ParamProblem(code=1, ptr=6) / quoted)]


def test_parameter_problem_points_at_the_byte_that_names_the_protocol() -> None:
    offending = IPv6(src="fd01::2", dst="fd01::1") / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(nh=200) / Raw(b"?")
    (frame,) = unreachable(Rig(), offending, PROTOCOL)
    assert IPv6(frame)[ICMPv6ParamProblem].ptr == 48
    assert bytes(offending)[48] == 200


@pytest.mark.parametrize(("packet", "flags"), [
    (IP(src="10.1.0.2", dst="224.0.0.5") / UDP(), L.PF_MULTICAST),
    (IP(src="10.1.0.2", dst="10.1.0.1") / UDP(), L.PF_LINK_MULTICAST),
    (IP(src="10.1.0.2", dst="10.1.0.1", frag=5) / Raw(bytes(8)), 0),
    (IP(src="0.0.0.0", dst="10.1.0.1") / UDP(), 0),
    (IP(src="10.1.0.255", dst="10.1.0.1") / UDP(), 0),
    (IP(src="10.1.0.2", dst="10.1.0.1") / ICMP(type=3) / IP() / UDP(), 0),
    (IP(src="10.1.0.2", dst="10.1.0.1") / ICMP(type=11) / IP() / TCP(), 0),
    (IPv6(src="fd01::2", dst="ff02::5") / UDP(), L.PF_MULTICAST),
    (IPv6(src="::", dst="fd01::1") / UDP(), 0),
    (IPv6(src="fd01::2", dst="fd01::1") / ICMPv6DestUnreach() / IPv6() / UDP(), 0),
])
def test_no_error_about(packet: Any, flags: int) -> None:
    assert unreachable(Rig(), packet, PORT, flags) == []


def test_errors_are_limited() -> None:
    rig = Rig()
    rig.put(rig.w + L.W_ICMP_RATE, 10)
    packet = IP(src="10.1.0.2", dst="10.1.0.1") / UDP()

    def burst(count: int) -> int:
        return sum(len(unreachable(rig, packet)) for _ in range(count))

    assert burst(30) == 10
    rig.advance(0.05)
    assert burst(5) == 0
    rig.advance(0.05)
    assert burst(5) == 1        # the two halves add up
    for _ in range(100):        # steps shorter than a token lose no time
        rig.advance(0.01)
        burst(1)
    assert rig.get(rig.tun + L.N_TX_PACKETS) == 10 + 1 + 10
    rig.advance(100)
    assert burst(30) == 10      # no more is saved than a second's worth
    rig.put(rig.w + L.W_ICMP_RATE, 0)
    rig.advance(100)
    assert burst(5) == 0


@settings(max_examples=200)
@given(st.binary(min_size=8, max_size=120), st.booleans(), st.booleans())
def test_any_message_stays_inside(shared: Rig, message: bytes, six: bool, flag: bool) -> None:
    """Whatever is in the message: nothing is written outside, and there is one reason for it."""
    rig = shared
    network = IPv6(src="fd01::2", dst="fd01::1", nh=58) if six else IP(src="10.1.0.2", dst="10.1.0.1", proto=1)
    verdict, _ = icmp(rig, network / Raw(message), L.PF_CHECKSUM_OK if flag else 0)
    assert verdict in {-ledger.CODE[name] for name in (
        "bad_icmp", "icmp_echo", "icmp", "neighbour", "bad_neighbour", "multicast_control")}
    rig.check_guards()
