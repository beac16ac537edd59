"""Who gets a packet: taps, raw sockets, groups, reuseport; with full rings, with fragments, on both ways alike."""

from __future__ import annotations

import itertools
import struct
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    PadN,
    fragment6,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from dataplane.inet import step
from dataplane.shm import layout as L
from tests.bed import Bed, Frame, Outcome, Record, Socket

Twins = list[tuple[Bed, list[Socket]]]
ETHER = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")     # else scapy would ask the network
OURS = ["10.0.0.1/24", "fd00::1/64"]


def udp(payload: bytes = b"x", source: str = "192.0.2.1", target: str = "10.0.0.1", sport: int = 7, dport: int = 5000,
        **more: object) -> Packet:
    header = (IPv6 if ":" in target else IP)(src=source, dst=target, **more)
    return header / UDP(sport=sport, dport=dport) / Raw(payload)


def framed(packet: Packet, **more: int) -> Frame:
    return Frame(bytes(ETHER / packet), **more)


def payloads(records: list[Record]) -> list[bytes]:
    return [one.payload for one in records]


# -- taps and raw sockets ----------------------------------------------------------------------------------


def test_taps_get_every_frame_as_it_was() -> None:
    bed = Bed()
    taps = [bed.open("tap", proto=0) for _ in range(2)]
    sock = bed.open("udp", port=5000)
    frames = [framed(udp(b"one"), time=5), framed(udp(dport=1), time=6, wire=1500), framed(ARP()), Frame(b"\1\2\3"),
              framed(udp() / Raw(bytes(900)), time=7)]
    outcome = bed.send(frames)
    assert outcome == Outcome(5, 5, 12, 0, {}, 0)       # 2 taps x 5, and two UDP datagrams
    for tap in taps:
        found = bed.records(tap)
        assert [(one.data, one.time) for one in found] == [(one.data, one.time) for one in frames]
        assert {one.flags for one in found} == {L.RECORD_FRAME}
        assert [one.aux for one in found] == [len(one.data) if one.wire is None else one.wire for one in frames]
    assert payloads(bed.records(sock)) == [b"one", b"x" + bytes(900)]


def test_raw_sockets_get_their_protocol() -> None:
    bed = Bed()
    wanted = {0: [], 1: [], 6: [], 17: [], 58: []}  # type: dict[int, list[bytes]]
    socks = {proto: bed.open("raw", proto=proto) for proto in wanted}
    only4 = bed.open("raw", proto=0, families=L.KEY_FAMILY4)
    bound = bed.open("raw", proto=0, address="10.0.0.9")
    packets = [udp(), IP(src="192.0.2.1", dst="10.0.0.9") / ICMP(), IP(dst="10.0.0.1") / TCP(),
               udp(b"", "fd01::1", "fd00::1"), IPv6(dst="fd00::1") / ICMPv6EchoRequest(),
               IP(dst="10.0.0.9", proto=99) / Raw(b"data")]
    outcome = bed.send([framed(packet) for packet in packets])
    for packet in packets:
        data, proto = bytes(packet), packet.proto if packet.version == 4 else packet.nh
        for key in {0, proto} & set(wanted):
            wanted[key].append(data)
    for proto, sock in socks.items():
        found = bed.records(sock)
        assert [one.data for one in found] == wanted[proto]
        assert all(one.payload == one.data for one in found)
    assert [one.data for one in bed.records(only4)] == [bytes(one) for one in packets if one.version == 4]
    assert [one.data for one in bed.records(bound)] == [bytes(packets[1]), bytes(packets[5])]
    assert outcome == Outcome(6, 6, 6 + 5 + 4 + 2, 0, {}, 0)


def test_a_raw_socket_gets_what_udp_refuses() -> None:
    """... and then the frame is delivered, not dropped."""
    bed = Bed()
    sock, raw = bed.open("udp", port=5000), bed.open("raw", proto=17)
    bad = bytearray(bytes(ETHER / udp()))
    bad[-1] ^= 1
    assert bed.send([bytes(bad)]) == Outcome(1, 1, 1, 0, {}, 0)
    assert len(bed.records(raw)) == 1 and bed.records(sock) == []
    bed.close(raw)
    assert bed.send([bytes(bad)]).reasons == {"bad_udp_checksum": 1}


# -- many receivers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("addresses", [[], OURS], ids=["passive", "endpoint"])
@pytest.mark.parametrize(("target", "family"), [("239.1.1.1", 4), ("255.255.255.255", 4), ("ff02::1:5", 6)])
def test_group_addresses_go_to_every_match(addresses: list[str], target: str, family: int) -> None:
    bed = Bed(addresses)
    source, own = ("192.0.2.1", "10.0.0.1") if family == 4 else ("fd01::1", "fd00::1")
    group = target != "255.255.255.255"
    takers = [bed.open("udp", port=5000), bed.open("udp"), bed.open("udp", target, 5000, reuseport=True),
              bed.open("udp", None, 5000, remote=(source, 7)), bed.open("udp", target, 5000, remote=(source, 7))]
    takers += [bed.open("udp", target, 5000, reuseport=True) for _ in range(3) if group]
    others = [bed.open("udp", port=5001), bed.open("udp", own, 5000), bed.open("udp", None, 5000, remote=(source, 8)),
              bed.open("udp", "239.9.9.9" if family == 4 else "ff02::9", 5000)]
    outcome = bed.send([framed(udp(b"to all", source, target))])
    assert (outcome.delivered, outcome.deliveries, outcome.reasons) == (1, len(takers), {})
    assert [payloads(bed.records(sock)) for sock in takers] == [[b"to all"]] * len(takers)
    assert [bed.records(sock) for sock in others] == [[]] * len(others)
    assert bed.send([framed(udp(b"", source, target, dport=1))]).deliveries == 1        # any port
    bed.close(takers[1])
    nobody = bed.send([framed(udp(b"", source, target, dport=1))])
    assert nobody.reasons == {"no_socket": 1} and nobody.transmitted == 0


def test_some_of_the_receivers_are_full() -> None:
    """A packet that one socket got was delivered; each socket counts its own drops."""
    bed = Bed()
    small, large = bed.open("udp", "239.1.1.1", 5000, ring_bytes=4096), bed.open("udp", "239.1.1.1", 5000)
    packet = framed(udp(bytes(1000), target="239.1.1.1"))
    assert bed.send([packet] * 10) == Outcome(10, 10, 13, 0, {}, 0)
    assert (len(bed.records(small)), len(bed.records(large))) == (3, 10)
    assert bed.table.counters(small.number)["dropped"] == 7
    bed.close(large)
    assert bed.send([packet] * 10).reasons == {"pcq_full": 10 - len(bed.records(small))}
    assert bed.send([framed(udp(bytes(3000), target="239.1.1.1"))]).reasons == {"ring_too_small": 1}


def test_every_socket_of_the_table_gets_a_copy() -> None:
    bed = Bed(sockets=5000)
    socks = [bed.open("udp", "239.1.1.1", 5000, ring_bytes=4096) for _ in range(5000)]
    outcome = bed.send([framed(udp(payload, target="239.1.1.1")) for payload in (b"one", b"two")])
    assert outcome == Outcome(2, 2, 2 * len(socks), 0, {}, 0)
    assert all(payloads(bed.records(sock)) == [b"one", b"two"] for sock in socks)


# -- reuseport ---------------------------------------------------------------------------------------------


def flows(count: int, family: int) -> list[Packet]:
    return [udp(struct.pack("!I", i), source=f"192.0.2.{i % 200}" if family == 4 else f"fd01::{i:x}",
                target="10.0.0.1" if family == 4 else "fd00::1", sport=1000 + i) for i in range(count)]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", ["udp", "raw"])
def test_every_flow_is_whole_on_one_member(kind: str, family: int) -> None:
    bed = Bed()
    port = 5000 if kind == "udp" else None
    packets = flows(300, family)
    frames = [framed(one) for one in packets * 3]
    group = [bed.open(kind, port=port, reuseport=True, ring_bytes=1 << 18)]
    owner: dict[bytes, int] = {}
    for size in range(1, 5):
        assert bed.send(frames) == Outcome(900, 900, 900, 0, {}, 0)
        found = [Counter(one.data[-4:] for one in bed.records(sock)) for sock in group]
        now = {flow: i for i, flows_ in enumerate(found) for flow in flows_}
        assert len(now) == 300 and sum(len(one) for one in found) == 300, "a flow went to two members"
        assert all(count == 3 for one in found for count in one.values())
        assert all(len(one) > 300 // size // 2 for one in found), "very uneven"
        assert all(now[flow] in (before, size - 1) for flow, before in owner.items()), "moved between old members"
        owner = now
        group.append(bed.open(kind, port=port, reuseport=True, ring_bytes=1 << 18))
    gone = group.pop(0)
    bed.close(gone)
    assert bed.send(frames).delivered == 900
    found = [Counter(one.data[-4:] for one in bed.records(sock)) for sock in group]
    assert sum(len(one) for one in found) == 300


def test_both_directions_are_one_flow_on_a_passive_netif() -> None:
    bed = Bed()
    group = [bed.open("raw", proto=0, reuseport=True) for _ in range(4)]
    for i in range(50):
        there = udp(b"", f"192.0.2.{i}", "10.0.0.1", 1000 + i, 53)
        back = udp(b"", "10.0.0.1", f"192.0.2.{i}", 53, 1000 + i)
        bed.send([framed(there), framed(back)])
        assert sorted(len(bed.records(sock)) for sock in group) == [0, 0, 0, 2]


# -- an endpoint's stack -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("packet", "reason", "answers"), [
    (udp(), "no_socket", 1), (udp(target="fd00::1", source="fd00::2"), "no_socket", 1),
    (IP(src="10.0.0.2", dst="10.0.0.1") / ICMP(), "icmp_echo", 1),
    (IPv6(src="fd00::2", dst="fd00::1") / ICMPv6EchoRequest(), "icmp_echo", 1),
    (IP(src="10.0.0.2", dst="10.0.0.1") / ICMP(type=3, code=3) / udp(), "icmp", 0),
    (IP(src="10.0.0.2", dst="10.0.0.1") / ICMP(chksum=1), "bad_icmp", 0),
    (IP(src="10.0.0.2", dst="10.0.0.1") / TCP(), "no_socket", 1),
    (IP(src="10.0.0.2", dst="10.0.0.1", proto=99) / Raw(bytes(8)), "no_socket", 1),
    (IP(src="10.0.0.2", dst="224.0.0.1", proto=2) / Raw(bytes(8)), "multicast_control", 0),
    (IPv6(src="fd00::2", dst="fd00::1", nh=99) / Raw(bytes(8)), "no_socket", 1),
    (IPv6(src="fd00::2", dst="fd00::1", nh=59) / Raw(bytes(8)), "no_socket", 0),        # no next header
    (udp(target="224.0.0.1"), "no_socket", 0), (udp(target="10.0.0.255"), "no_socket", 0),
    (udp(target="ff02::1", source="fd00::2"), "no_socket", 0),
])
def test_what_nobody_wants(packet: Packet, reason: str, answers: int) -> None:
    for bed in (Bed(OURS), Bed(OURS)):
        outcome = bed.send([framed(packet)])
        assert (outcome.reasons, outcome.transmitted) == ({reason: 1}, answers)
    bed = Bed()
    outcome = bed.send([framed(packet)])
    assert (outcome.reasons, outcome.transmitted) == ({"no_socket": 1}, 0)


def test_a_raw_socket_does_not_keep_the_stack_from_answering() -> None:
    bed = Bed(OURS)
    raw = bed.open("raw", proto=1)
    assert bed.send([framed(IP(src="10.0.0.2", dst="10.0.0.1") / ICMP())]) == Outcome(1, 1, 1, 0, {}, 1)
    assert len(bed.records(raw)) == 1


# -- fragments ---------------------------------------------------------------------------------------------


def cut(packet: Packet, size: int = 200) -> list[Packet]:
    return [IP(bytes(one)) for one in fragment(packet, size)]


def cut6(size: int) -> list[Packet]:
    whole = IPv6(src="fd01::1", dst="fd00::1") / IPv6ExtHdrFragment(id=9) / UDP(sport=7, dport=5000) / Raw(bytes(size))
    return [IPv6(bytes(one)) for one in fragment6(whole, 1280)]


@pytest.mark.parametrize("raw", [False, True])
def test_fragments_are_one_datagram(raw: bool) -> None:
    bed = Bed()
    sock = bed.open("udp", port=5000)
    if raw:
        bed.open("raw", proto=99)
    parts = cut(udp(bytes(range(256)) * 4, id=5))
    assert bed.send([framed(one) for one in parts[:-1]]) == Outcome(5, 0, 0, 5, {}, 0)
    assert bed.send([framed(parts[-1])]) == Outcome(1, 6, 1, -5, {}, 0)
    (record,) = bed.records(sock)
    assert record.payload == bytes(range(256)) * 4 and record.flags == L.RECORD_REASSEMBLED
    assert record.data == bytes(udp(bytes(range(256)) * 4, id=5))
    assert bed.send([framed(one) for one in reversed(cut6(5000))]).delivered == 5
    (record,) = bed.records(sock)
    assert len(record.payload) == 5000


def test_nobody_wants_a_datagram_in_fragments() -> None:
    bed = Bed()
    frames = [framed(one) for one in cut(udp(bytes(1000)))]
    assert bed.send(frames) == Outcome(6, 0, 0, 0, {"no_socket": 6}, 0)
    assert bed.send(frames[:3]) == Outcome(3, 0, 0, 3, {}, 0)
    assert bed.flush() == Outcome(0, 0, 0, -3, {"fragment_unfinished": 3}, 0)


def test_a_datagram_in_fragments_keeps_its_vlan() -> None:
    bed = Bed()
    sock = bed.open("udp", port=5000)
    assert bed.send([framed(Dot1Q(vlan=42) / one) for one in cut(udp(bytes(300)))]).delivered == 2
    (record,) = bed.records(sock)
    assert record.vlan == 42 and record.flags == L.RECORD_REASSEMBLED | L.RECORD_VLAN and len(record.payload) == 300


def test_no_answer_goes_to_a_vlan_for_a_request_in_fragments() -> None:
    bed = Bed(OURS)
    parts = cut(IP(src="10.0.0.2", dst="10.0.0.1") / ICMP() / Raw(bytes(300)))
    assert bed.send([framed(Dot1Q(vlan=42) / one) for one in parts]).transmitted == 0
    assert bed.send([framed(one) for one in parts]).transmitted == 1


@pytest.mark.parametrize("patient", [False, True])
def test_bad_datagrams_in_fragments_give_their_memory_back(patient: bool) -> None:
    """What is wrong shows only when it is whole: an option that says: discard."""
    bed = Bed(backpressure=patient, reassemblies=2)
    sock = bed.open("udp", port=5000)
    for i in range(10):
        body = IPv6ExtHdrDestOpt(options=[PadN(otype=0xC1, optdata=b"\0\0\0\0")]) / UDP(dport=5000) / Raw(bytes(2000))
        whole = IPv6(src="fd01::1", dst="fd00::1") / IPv6ExtHdrFragment(id=i) / body
        parts = [framed(one) for one in fragment6(whole, 1280)]
        assert bed.send(parts) == Outcome(2, 0, 0, 0, {"bad_extension_header": 2}, 0)
    assert bed.send([framed(one) for one in cut6(5000)]).delivered == 5
    assert len(bed.records(sock)) == 1


def test_fragments_that_a_tap_got_are_not_counted_again() -> None:
    bed = Bed()
    tap, sock = bed.open("tap", proto=0), bed.open("udp", port=5000)
    frames = [framed(one) for one in cut(udp(bytes(1000)))]
    assert bed.send(frames) == Outcome(6, 6, 7, 0, {}, 0)
    assert [one.data for one in bed.records(tap)] == [one.data for one in frames]
    assert len(bed.records(sock)) == 1
    bed.send(frames[:3])
    assert bed.flush() == Outcome(0, 0, 0, 0, {}, 0)


# -- backpressure ------------------------------------------------------------------------------------------


def drained(bed: Bed, socks: list[Socket], frames: list[Frame]) -> dict[Socket, list[Record]]:
    """All frames through a netif with backpressure, the consumers taking a little now and then."""
    found: dict[Socket, list[Record]] = {sock: [] for sock in socks}
    turn = itertools.cycle(socks)
    for first in range(0, len(frames), L.BURST):
        part = frames[first:first + L.BURST]
        bed._offer(part)
        taken = bed.go_on()
        for _ in range(1000):
            if taken == len(part):
                break
            sock = next(turn)
            found[sock] += bed.records(sock)
            taken += bed.go_on()
        assert taken == len(part)
    for sock in socks:
        found[sock] += bed.records(sock)
    return found


def test_backpressure_loses_and_doubles_nothing() -> None:
    bed = Bed(backpressure=True)
    socks = [bed.open("udp", port=5000 + i, ring_bytes=4096) for i in range(3)]
    frames = [framed(udp(struct.pack("!I", i) + bytes(i % 300), dport=5000 + i % 4)) for i in range(2000)]
    found = drained(bed, socks, frames)
    for number, sock in enumerate(socks):
        assert [one.data for one in found[sock]] == [one.data[14:] for one in frames[number::4]]
        assert bed.table.counters(sock.number)["dropped"] == 0
    assert bed.outcome() == Outcome(0, 1500, 1500, 0, {"no_socket": 500}, 0)


@pytest.mark.parametrize("order", [(4096, 65536, 65536), (65536, 4096, 65536), (65536, 65536, 4096), (4096,) * 3])
def test_backpressure_with_a_tap_a_raw_socket_and_fragments(order: tuple[int, int, int]) -> None:
    """Whichever ring is the full one, each of the others gets every packet once and whole."""
    bed = Bed(backpressure=True)
    tap = bed.open("tap", proto=0, ring_bytes=order[0])
    raw = bed.open("raw", proto=0, ring_bytes=order[1])
    sock = bed.open("udp", port=5000, ring_bytes=order[2])
    frames, packets = [], []
    for i in range(300):
        whole = udp(struct.pack("!I", i) + bytes(i * 7 % 1200), id=i + 1)
        parts = cut(whole, 400) if i % 3 == 0 else [whole]
        frames += [framed(one, wire=2000 + i) for one in parts]
        packets.append(bytes(whole))
    found = drained(bed, [tap, raw, sock], frames)
    assert [(one.data, one.aux) for one in found[tap]] == [(one.data, one.wire) for one in frames]
    assert [one.data for one in found[raw]] == packets
    assert [one.data for one in found[sock]] == packets
    assert bed.outcome() == Outcome(0, len(frames), len(frames) + 600, 0, {}, 0)
    assert all(bed.table.counters(one.number)["dropped"] == 0 for one in (tap, raw, sock))


def test_backpressure_does_not_wait_for_what_never_fits() -> None:
    bed = Bed(backpressure=True)
    small, large = bed.open("udp", port=5000, ring_bytes=4096), bed.open("udp", port=5001)
    frames = [framed(udp(bytes(3000))), framed(udp(bytes(3000), dport=5001)), framed(udp(b"x"))]
    assert bed.send(frames) == Outcome(3, 2, 2, 0, {"ring_too_small": 1}, 0)
    assert len(bed.records(small)) == len(bed.records(large)) == 1
    bed.open("raw", proto=0, ring_bytes=4096)
    assert bed.send(frames[:1]).reasons == {"ring_too_small": 1}


def test_without_backpressure_full_rings_drop_and_say_so() -> None:
    bed = Bed()
    sock = bed.open("udp", port=5000, ring_bytes=4096)
    outcome = bed.send([framed(udp(bytes(480)))] * 20)
    records = bed.records(sock)
    assert outcome == Outcome(20, len(records), len(records), 0, {"pcq_full": 20 - len(records)}, 0)
    counters = bed.table.counters(sock.number)
    assert counters["published"] == counters["consumed"] == len(records) == 20 - counters["dropped"]


# -- the two ways ------------------------------------------------------------------------------------------


SOURCES, PORTS = ("192.0.2.1", "192.0.2.2"), (5000, 5001, 5002)
PACKETS = [bytes(one) for one in (
    *(udp(b"abc", source, dport=port) for source in SOURCES for port in PORTS),
    *(udp(b"abc", "fd01::1", target, dport=port) for target in ("fd00::1", "ff02::5") for port in PORTS),
    udp(bytes(1500), dport=5001), udp(target="239.1.1.1"), udp(target="10.0.0.9"), *cut(udp(bytes(400), id=8)),
    *cut6(1500), IP(src="10.0.0.2", dst="10.0.0.1") / ICMP(), IP(dst="10.0.0.1") / TCP(),
    IPv6(src="fd00::2", dst="fd00::1") / IPv6ExtHdrHopByHop() / UDP(sport=7, dport=5000) / Raw(b"h"),
)]


@st.composite
def bursts(draw: st.DrawFn) -> list[Frame]:
    """Frames, some of them damaged."""
    frames = []
    for data in draw(st.lists(st.sampled_from(PACKETS), min_size=1, max_size=64)):
        frame = bytearray(bytes(ETHER)[:12] + (b"\x08\0" if data[0] >> 4 == 4 else b"\x86\xdd") + data)
        for at, value in draw(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 255)), max_size=1)):
            if draw(st.integers(0, 3)) == 0:
                frame[at % len(frame)] = value
        size = len(frame) - draw(st.sampled_from((0,) * 9 + (1, 20)))
        frames.append(Frame(bytes(frame[:size]), time=len(frames),
                            flags=draw(st.sampled_from((0,) * 5 + (L.PF_CHECKSUM_PARTIAL, L.PF_OTHERHOST)))))
    return frames


def twin(addresses: list[str], slow: bool) -> tuple[Bed, list[Socket]]:
    bed = Bed(addresses)
    if slow:
        bed.open("raw", proto=255, address="203.0.113.255")     # takes nothing: but every frame goes the slow way
    socks = [bed.open("udp", port=5000, ring_bytes=4096), bed.open("udp", "10.0.0.1", 5000),
             bed.open("udp", "10.0.0.1", 5001, remote=("192.0.2.1", 7)), bed.open("udp", "239.1.1.1", 5000),
             bed.open("udp", None, 5001, remote=("192.0.2.2", 7)), bed.open("udp", "fd00::1", 5001)]
    return bed, socks + [bed.open("udp", port=5002, reuseport=True) for _ in range(3)]


@pytest.fixture(scope="module", params=[[], OURS], ids=["passive", "endpoint"])
def twins(request: pytest.FixtureRequest) -> Twins:
    return [twin(request.param, slow) for slow in (False, True)]


@settings(max_examples=250)
@given(st.lists(bursts(), min_size=1, max_size=3))
def test_the_fast_way_and_the_slow_way_are_one(twins: Twins, history: list[list[Frame]]) -> None:
    results = []
    for bed, socks in twins:
        outcomes = [bed.send(frames) for frames in history]
        for outcome, frames in zip(outcomes, history, strict=True):
            assert outcome.taken == len(frames)
            assert outcome.taken == outcome.delivered + outcome.held + sum(outcome.reasons.values())
        records = [bed.records(sock) for sock in socks]
        assert sum(map(len, records)) == sum(one.deliveries for one in outcomes)
        # The rate of ICMP errors goes by the clock.
        results.append(([(one.delivered, one.deliveries, one.held, one.reasons) for one in outcomes], records,
                        [bed.table.counters(sock.number) for sock in socks], bed.flush().reasons))
    assert results[0] == results[1]


# -- after a death -----------------------------------------------------------------------------------------


def test_a_replacement_goes_on_where_the_dead_worker_had_published() -> None:
    """The dead one had staged a packet and counted it; the consumer never sees it, nor does the count."""
    bed = Bed()
    sock = bed.open("udp", port=5000)
    assert bed.send([framed(udp(b"first"))]).delivered == 1
    state = bed.table.lane_state(sock.number, 0)
    before = {word: bed.get(state + word) for word in (L.LS_HEAD, L.LS_COUNT)}
    dirty = bed.get(bed.w + L.W_DIRTY)
    for place, value in ((state + L.LS_HEAD, before[L.LS_HEAD] + 64), (state + L.LS_COUNT, before[L.LS_COUNT] + 1),
                         (dirty, state), (dirty + 8, before[L.LS_COUNT]), (bed.w + L.W_DIRTY_COUNT, 1),
                         (bed.w + L.W_DELIVERED, 1), (bed.w + L.W_DELIVERIES, 1)):
        bed.put(place, value)
    step.recover(bed.mem, bed.w)
    assert {word: bed.get(state + word) for word in before} == before
    assert bed.get(bed.w + L.W_EPOCH) == L.EPOCH_IDLE
    assert bed.send([framed(udp(b"second"))]).delivered == 1
    assert payloads(bed.records(sock)) == [b"first", b"second"]


def test_a_replacement_leaves_the_lanes_of_closed_sockets_alone() -> None:
    """Their memory may be another socket's by now."""
    bed = Bed()
    sock, other = bed.open("udp", port=5000), bed.open("udp", port=5001)
    for one in (sock, other):
        bed.put(one.lane + L.LANE_HEAD, 4711)
    bed.table.close(sock.number)
    step.recover(bed.mem, bed.w)
    assert bed.get(sock.lane + L.LANE_HEAD) == 4711 and bed.get(other.lane + L.LANE_HEAD) == 0
