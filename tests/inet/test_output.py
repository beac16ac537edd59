"""What consumers send: datagrams as scapy reads them, routes, waiting packets, hostile records."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP, defragment
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, defragment6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from dataplane.inet.output import INVALID, NO_MEMORY, NO_ROUTE, SENT, TOO_LARGE
from dataplane.shm import layout as L
from tests.inet import rig as kernels
from tests.inet.rig import GUARD, MAC, Rig, halves

PEER = "02:00:00:00:00:99"
BOTH = L.KEY_FAMILY4 | L.KEY_FAMILY6


@pytest.fixture(scope="module")
def shared() -> Rig:
    return Rig()


def socket(rig: Rig, cls: int = L.CLASS_WILDCARD, port: int = 5000, proto: int = 17, families: int = BOTH,
           local: str | None = None, remote: tuple[str, int] | None = None) -> None:
    """Makes the PCB."""
    rig.mem[rig.pcb:rig.pcb + L.PCB_BYTES] = 0
    key = port | (remote[1] if remote else 0) << 16 | proto << 32 | cls << 40 | families << 48
    rig.put(rig.pcb + L.PCB_KEY, key)
    for word, address in ((L.PCB_LOCAL_HI, local), (L.PCB_REMOTE_HI, remote[0] if remote else None)):
        if address:
            _, hi, lo = halves(address)
            rig.put(rig.pcb + word, hi)
            rig.put(rig.pcb + word + 8, lo)


def send(rig: Rig, payload: bytes, address: str, port: int = 7) -> int:
    family, hi, lo = halves(address)
    rig.write(rig.record, struct.pack("<IIHHIqq", 1, 1, family, port, 0, hi, lo) + payload)
    return int(kernels.udp_output(rig.mem, rig.w, rig.record, L.TX_PAYLOAD + len(payload), rig.pcb))


def frames(rig: Rig, nif: int) -> list[bytes]:
    sent = rig.sent()
    assert {where for where, _ in sent} <= {nif}
    return [frame for _, frame in sent]


@settings(max_examples=60)
@given(st.binary(max_size=1400), st.integers(1, 65535), st.integers(1, 65535))
def test_datagrams_equal_scapys(shared: Rig, data: bytes, local: int, remote: int) -> None:
    rig = shared
    socket(rig, port=local)
    assert send(rig, data, "10.1.0.2", remote) == SENT
    (frame,) = frames(rig, rig.tun)
    assert frame == bytes(IP(src="10.1.0.1", dst="10.1.0.2", id=IP(frame).id)
                          / UDP(sport=local, dport=remote) / Raw(data))
    assert send(rig, data, "fd01::2", remote) == SENT
    (frame,) = frames(rig, rig.tun)
    assert frame == bytes(IPv6(src="fd01::1", dst="fd01::2") / UDP(sport=local, dport=remote) / Raw(data))
    rig.check_guards()


@pytest.mark.parametrize("mtu", [1280, 1500, 9000, 65535])
def test_largest_datagrams(mtu: int) -> None:
    rig = Rig(mtu=mtu)
    socket(rig)
    data = bytes(range(251)) * 262
    assert send(rig, data[:65507], "10.1.0.2") == SENT
    parts = [IP(frame) for frame in frames(rig, rig.tun)]
    assert max(len(part) for part in parts) <= mtu and len({part.id for part in parts}) == 1
    whole = IP(bytes(defragment(parts)[0]))
    assert bytes(whole) == bytes(IP(src="10.1.0.1", dst="10.1.0.2", id=whole.id) / UDP(sport=5000, dport=7)
                                 / Raw(data[:65507]))
    assert send(rig, data[:65508], "10.1.0.2") == TOO_LARGE
    assert send(rig, data[:65527], "fd01::2") == SENT
    six = [IPv6(frame) for frame in frames(rig, rig.tun)]
    assert max(map(len, six)) <= mtu
    assert bytes(defragment6(six)) == bytes(IPv6(src="fd01::1", dst="fd01::2") / UDP(sport=5000, dport=7)
                                            / Raw(data[:65527]))
    assert send(rig, data[:65528], "fd01::2") == TOO_LARGE
    assert rig.sent() == []
    rig.check_guards()


def test_workers_never_use_the_same_identification() -> None:
    rig = Rig(workers=3)
    seen = []
    for w in rig.ws:
        rig.w = w
        socket(rig)
        for _ in range(5):
            send(rig, b"x", "10.1.0.2")
            seen.append(IP(rig.sent()[0][1]).id)
    assert len(set(seen)) == 15


def test_connected_socket_sends_to_its_peer_only() -> None:
    rig = Rig()
    for cls in (L.CLASS_CONNECTED, L.CLASS_HALF):
        socket(rig, cls, families=L.KEY_FAMILY4, remote=("10.1.0.77", 99))
        assert send(rig, b"x", "10.1.0.2", 7) == SENT
        packet = IP(frames(rig, rig.tun)[0])
        assert (packet.dst, packet[UDP].dport) == ("10.1.0.77", 99)
        assert send(rig, b"x", "fd01::2", 7) == INVALID


@pytest.mark.parametrize(("local", "expected"), [
    (None, "10.1.0.1"), ("10.0.0.1", "10.0.0.1"), ("224.0.0.5", "10.1.0.1"), ("192.168.1.1", "10.1.0.1"),
])
def test_source_is_one_of_ours(local: str | None, expected: str) -> None:
    rig = Rig()
    socket(rig, L.CLASS_BOUND if local else L.CLASS_WILDCARD, local=local)
    assert send(rig, b"x", "10.1.0.2") == SENT
    assert IP(frames(rig, rig.tun)[0]).src == expected


def test_groups_and_broadcast() -> None:
    rig = Rig()
    socket(rig)
    assert send(rig, b"x", "239.129.2.3") == SENT
    frame = Ether(frames(rig, rig.ethernet)[0])
    assert (frame.dst, frame[IP].src, frame[IP].ttl) == ("01:00:5e:01:02:03", "10.0.0.1", 1)
    assert send(rig, b"x", "ff02::fb") == SENT
    frame = Ether(frames(rig, rig.ethernet)[0])
    assert (frame.dst, frame[IPv6].src, frame[IPv6].hlim) == ("33:33:00:00:00:fb", "fe80::1", 1)
    assert send(rig, b"x", "ff05::fb") == SENT
    assert Ether(frames(rig, rig.ethernet)[0])[IPv6].src == "fd00::1"
    for address in ("255.255.255.255", "10.0.0.255"):
        assert send(rig, b"x", address) == SENT
        assert Ether(frames(rig, rig.ethernet)[0]).dst == "ff:ff:ff:ff:ff:ff"
    socket(rig, L.CLASS_BOUND, local="10.1.0.1")
    assert send(rig, b"x", "239.1.2.3") == SENT
    assert IP(frames(rig, rig.tun)[0]).dst == "239.1.2.3"


def route(rig: Rig, address: str) -> int:
    return int(kernels.route(rig.mem, rig.w, *halves(address)))


def test_routes() -> None:
    rig = Rig()
    assert (route(rig, "10.0.0.9"), route(rig, "10.1.0.9")) == (rig.ethernet, rig.tun)
    assert (route(rig, "fd00::9"), route(rig, "fd01::9")) == (rig.ethernet, rig.tun)
    assert route(rig, "fe80::9") == rig.ethernet
    assert route(rig, "8.8.8.8") == -1 == route(rig, "2001:db8::1")
    rig.put(rig.tun + L.N_GATEWAY4, 0x0A010002)
    assert route(rig, "8.8.8.8") == rig.tun and route(rig, "10.0.0.9") == rig.ethernet
    rig.put(rig.tun + L.N_FLAGS, L.NF_PASSIVE)
    assert route(rig, "10.1.0.9") == -1 == route(rig, "8.8.8.8")
    rig.put(rig.ethernet + L.N_STATUS, L.NS_FAILED)
    assert route(rig, "239.1.1.1") == -1


def test_no_route() -> None:
    rig = Rig()
    socket(rig)
    for address in ("8.8.8.8", "0.0.0.0", "10.0.0.1", "127.0.0.1", "::", "fd00::1", "2001:db8::1"):
        assert send(rig, b"x", address) == NO_ROUTE, address
    assert rig.sent() == []


def answer(rig: Rig, address: str, mac: str = PEER, worker: int = 0) -> None:
    reply = Ether(src=mac, dst=MAC) / ARP(op=2, hwsrc=mac, psrc=address, hwdst=MAC, pdst="10.0.0.1")
    rig.describe(bytes(reply), link=L.LINK_ETHERNET)
    kernels.arp_input(rig.mem, rig.ws[worker], rig.ethernet, rig.p)


def test_packets_wait_for_their_neighbour_in_order() -> None:
    rig = Rig(workers=2)
    socket(rig)
    for index in range(5):
        assert send(rig, bytes([index]), "10.0.0.9") == SENT
        assert send(rig, bytes([index]), "10.0.0.8") == SENT
    assert send(rig, bytes(20000), "10.0.0.9") == SENT
    questions = [Ether(frame) for frame in frames(rig, rig.ethernet)]
    assert [one[ARP].pdst for one in questions] == ["10.0.0.9", "10.0.0.8"]
    assert kernels.retry(rig.mem, rig.w) == 11
    answer(rig, "10.0.0.9", worker=1)               # comes to the other worker
    assert kernels.retry(rig.mem, rig.w) == 5
    sent = [Ether(frame) for frame in frames(rig, rig.ethernet)]
    assert {frame.dst for frame in sent} == {PEER}
    assert [bytes(frame[UDP].payload)[0] for frame in sent[:5]] == [0, 1, 2, 3, 4]
    assert len(defragment([frame[IP] for frame in sent[5:]])[0][UDP].payload) == 20000
    rig.advance(1)
    assert kernels.retry(rig.mem, rig.w) == 0
    assert rig.get(rig.ethernet + L.N_TX_DROPPED) == 5
    assert send(rig, b"now", "10.0.0.9") == SENT
    assert bytes(Ether(frames(rig, rig.ethernet)[0])[UDP].payload) == b"now"
    rig.check_guards()


def test_waiting_room_is_bounded() -> None:
    rig = Rig()
    socket(rig)
    codes = [send(rig, bytes(65507), "10.0.0.9") for _ in range(5)]
    assert codes == [SENT] * 4 + [NO_MEMORY]
    codes = [send(rig, b"x", "10.0.0.9") for _ in range(65)]
    assert codes == [SENT] * 64 + [NO_MEMORY]
    rig.advance(1)
    assert kernels.retry(rig.mem, rig.w) == 0
    assert send(rig, b"x", "10.0.0.9") == SENT
    rig.check_guards()


def test_gateway_is_the_neighbour_of_what_is_far() -> None:
    rig = Rig()
    rig.put(rig.ethernet + L.N_GATEWAY4, 0x0A0000FE)
    socket(rig)
    assert send(rig, b"x", "8.8.8.8") == SENT
    assert Ether(frames(rig, rig.ethernet)[0])[ARP].pdst == "10.0.0.254"
    answer(rig, "10.0.0.254")
    kernels.retry(rig.mem, rig.w)
    frame = Ether(frames(rig, rig.ethernet)[0])
    assert (frame.dst, frame[IP].dst) == (PEER, "8.8.8.8")


def test_raw_sockets() -> None:
    rig = Rig()
    socket(rig, L.CLASS_RAW, proto=1, port=0)
    ping = bytes(ICMP(id=3, seq=4) / Raw(b"ping"))
    assert send(rig, ping, "10.1.0.2", 0) == SENT
    (frame,) = frames(rig, rig.tun)
    assert frame == bytes(IP(src="10.1.0.1", dst="10.1.0.2", id=IP(frame).id, proto=1) / Raw(ping))
    socket(rig, L.CLASS_RAW, proto=58, port=0)
    whole = IPv6(src="fd01::1", dst="fd01::2") / ICMPv6EchoRequest(id=3, seq=4, data=b"ping")
    assert send(rig, bytes(ICMPv6EchoRequest(id=3, seq=4, data=b"ping", cksum=0)), "fd01::2", 0) == SENT
    assert frames(rig, rig.tun) == [bytes(whole)]
    assert send(rig, b"abc", "fd01::2", 0) == SENT      # too short for a checksum: as it is
    assert frames(rig, rig.tun) == [bytes(IPv6(src="fd01::1", dst="fd01::2", nh=58) / Raw(b"abc"))]
    socket(rig, L.CLASS_RAW, proto=0, port=0)
    assert send(rig, b"x", "10.1.0.2", 0) == INVALID


def test_what_makes_no_sense() -> None:
    rig = Rig()
    socket(rig)
    assert send(rig, b"x", "10.1.0.2", 0) == INVALID
    for length in (-1, 0, 31):
        assert kernels.udp_output(rig.mem, rig.w, rig.record, length, rig.pcb) == INVALID
    for cls, proto in ((L.CLASS_TAP, 17), (L.CLASS_BOUND, 6)):
        socket(rig, cls, proto=proto)
        assert send(rig, b"x", "10.1.0.2") == INVALID
    socket(rig, families=L.KEY_FAMILY4)
    assert send(rig, b"x", "fd01::2") == INVALID
    assert rig.sent() == []


@settings(max_examples=300)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 1 << 24), st.sampled_from((0, 1, 2, 3, 4, 5, 6)),
       st.sampled_from((1, 17, 58)), st.sampled_from((None, 4, 6)))
def test_hostile_records(shared: Rig, head: bytes, length: int, cls: int, proto: int,
                         family: int | None) -> None:
    """Any bytes, any length that a lane can say: a code, nothing written outside, and no byte that
    is not the record's in what is sent."""
    rig = shared
    socket(rig, cls, proto=proto, remote=("10.1.0.2", 9) if cls < 2 else None)
    if family:
        head = head[:8] + struct.pack("<H", family) + head[10:]
    rig.write(rig.record, head + bytes(66000 - 32))
    size = min(length, 66000)
    code = kernels.udp_output(rig.mem, rig.w, rig.record, size, rig.pcb)
    assert code in (SENT, NO_ROUTE, TOO_LARGE, NO_MEMORY, INVALID)
    sent = rig.sent()
    if code != SENT:
        assert sent == []
    for _, frame in sent:
        assert bytes([GUARD] * 16) not in frame
    rig.advance(1)
    kernels.retry(rig.mem, rig.w)
    rig.sent()
    rig.check_guards()
