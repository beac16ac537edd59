"""Segments to packets, as scapy reads them: cutting, offload, hostile records, resets, what ICMP says."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6ParamProblem, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from scapy.utils import checksum

from dataplane import ledger
from dataplane.inet import tcp_transmit as M
from dataplane.inet.output import INVALID, NO_ROUTE, SENT, TOO_LARGE, tx_flush
from dataplane.inet.transmit import KCONT, _send
from dataplane.jit import callback, kernel
from dataplane.pcb.lookup import bucket_insert
from dataplane.rings import pcq
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import as_memory, copy, ld64, st64
from tests.inet import rig as kernels
from tests.inet.rig import SECOND, Rig, halves

RING = 8192
LANE = 8192
PEER_MAC = "02:00:00:00:00:99"
OURS = {4: "10.1.0.1", 6: "fd01::1"}
PEER = {4: "10.1.0.2", 6: "fd01::2"}
LOCAL_PORT, REMOTE_PORT = 8080, 40000
MSS = {4: 1448, 6: 1428}    # with timestamps, at an MTU of 1500
LOG_BYTES = 1 << 20
WORDS = 48              # of a logged frame: netif, bytes, flags, segment, place of TCP, family


@callback(3)
def tx(base, nif, burst, count):
    """Logs each frame with what is left to the netif."""
    mem = as_memory(base)
    log = ld64(mem, nif + L.N_PRIVATE)
    for i in range(count):
        p = burst + i * L.P_BYTES
        at, size = log + ld64(mem, log), ld64(mem, p + L.P_LENGTH)
        if size < 0 or at + WORDS + size > log + LOG_BYTES:
            return -1
        st64(mem, at, nif)
        st64(mem, at + 8, size)
        st64(mem, at + 16, ld64(mem, p + L.P_FLAGS))
        st64(mem, at + 24, ld64(mem, p + L.P_SEGMENT))
        st64(mem, at + 32, ld64(mem, p + L.P_L4) - ld64(mem, p + L.P_FRAME))
        st64(mem, at + 40, ld64(mem, p + L.P_FAMILY))
        copy(mem, at + WORDS, ld64(mem, p + L.P_FRAME), size)
        st64(mem, log, ld64(mem, log) + WORDS + size)
    return count


@kernel("i64(mem, i64, i64, i64)")
def emit(mem, w, number, o):
    code = M.tcp_emit(mem, w, number, o)
    tx_flush(mem, w)
    return code


@kernel("i64(mem, i64, i64, i64, i64)")
def transmit(mem, w, body, length, pcb):
    code = M.tcp_transmit(mem, w, body, length, pcb)
    tx_flush(mem, w)
    return code


@kernel("i64(mem, i64, i64, i64, i64)")
def lane_record(mem, w, body, length, consumer):
    code = _send(mem, w, body, length, consumer)
    tx_flush(mem, w)
    return code


@kernel("i64(mem, i64, i64, i64)")
def refuse(mem, w, nif, p):
    sent = M.tcp_refuse(mem, w, nif, p)
    tx_flush(mem, w)
    return sent


@kernel("i64(mem, i64, i64, i64, i64)")
def answer(mem, w, nif, p, o):
    code = M.tcp_answer(mem, w, nif, p, o)
    tx_flush(mem, w)
    return code


class TcpRig(Rig):
    """A rig whose table has one connection for each family, PCBs 4 and 6, over the tun netif."""

    def __init__(self, mtu: int = 1500, flags: int = 0, peer: dict[int, str] | None = None,
                 ours: dict[int, str] | None = None) -> None:
        super().__init__(mtu=mtu)
        self.log = self.area(LOG_BYTES)
        self.put(self.log, 8)
        for nif in (self.ethernet, self.tun):
            self.put(nif + L.N_TX, tx.address)
            self.put(nif + L.N_PRIVATE, self.log)
            self.put(nif + L.N_FLAGS, flags)
        self.pcbs = self.area(8 * L.PCB_BYTES)
        self.lanes = self.area(8 * L.LS_BYTES)
        self.put(self.table + L.T_SOCKETS, 8)
        self.put(self.table + L.T_PCBS, self.pcbs)
        self.put(self.table + L.T_BUCKETS, 7)
        self.put(self.table + L.T_BUCKET_AT, self.area(8 * L.BUCKET_BYTES))
        self.put(self.w + L.W_LANES, self.lanes)
        self.put(self.w + L.W_DIRTY, self.area(8 * 16))
        self.put(self.w + L.W_TCP_DIRTY, self.area(8 * L.BURST))
        self.put(self.w + L.W_RST_RATE, 1000)
        queue = self.area(pcq.pcq_bytes(64))
        pcq.Pcq.create(self.mem, queue, 64)
        self.put(self.table + L.T_KCONT, queue)
        self.o = self.area(T.O_BYTES)
        self.bytes = random.Random(1).randbytes(RING)
        for family in (4, 6):
            self._connection(family, (ours or OURS)[family], (peer or PEER)[family])

    def at(self, number: int) -> int:
        return self.pcbs + number * L.PCB_BYTES

    def _connection(self, family: int, ours: str, peer: str) -> None:
        place = self.area(T.CONN_LANES + L.LANE_DATA + LANE + RING)
        self.write(place + T.CONN_LANES + L.LANE_DATA + LANE, self.bytes)
        pcb = self.at(family)
        key = LOCAL_PORT | REMOTE_PORT << 16 | 6 << 32 | L.CLASS_CONNECTED << 40
        self.put(pcb + L.PCB_KEY, key | (L.KEY_FAMILY4 if family == 4 else L.KEY_FAMILY6) << 48)
        for word, text in ((L.PCB_LOCAL_HI, ours), (L.PCB_REMOTE_HI, peer)):
            _, hi, lo = halves(text)
            self.put(pcb + word, hi)
            self.put(pcb + word + 8, lo)
        for word, value in ((L.PCB_STATE, L.PCB_OPEN), (L.PCB_KIND, L.PK_CONNECTION), (L.PCB_PLACE, place),
                            (L.PCB_RING, LANE), (L.PCB_BUFFERS, 13 | 13 << 8)):
            self.put(pcb + word, value)
        state = self.lanes + family * L.LS_BYTES
        self.put(state + L.LS_BASE, place + T.CONN_LANES)
        self.put(state + L.LS_MASK, LANE - 1)
        assert bucket_insert(self.mem, self.table, family, 1) == 1

    def lane(self, family: int) -> list[tuple[int, ...]]:
        """The control records staged for the connection: kind, value, sequence number."""
        state, found = self.lanes + family * L.LS_BYTES, []
        base = self.get(state + L.LS_BASE) + L.LANE_DATA
        for at in range(base, base + self.get(state + L.LS_HEAD), 48):
            assert self.get(at) == T.CTL_BYTES | T.RECORD_CONTROL << 24
            found.append(tuple(self.get(at + L.RECORD_DATA + 8 * i) for i in range(3)))
        return found

    def words(self) -> list[tuple[tuple[int, ...], bytes]]:
        """(netif, flags, segment, place of TCP, family) and frame of all that was transmitted."""
        found, at, end = [], 8, self.get(self.log)
        while at < end:
            nif, size, flags, segment, l4, family = (self.get(self.log + at + 8 * i) for i in range(6))
            found.append(((nif, flags, segment, l4, family), self.read(self.log + at + WORDS, size)))
            at += WORDS + size
        self.put(self.log, 8)
        return found

    def frames(self) -> list[bytes]:
        return [frame for _, frame in self.words()]

    def segment(self, **words: int) -> int:
        """Writes a record; returns its place."""
        self.mem[self.o:self.o + T.O_BYTES] = 0
        for name, value in ({"SEGMENT": 1448, "FLAGS": T.ACK, "WINDOW": 500} | words).items():
            self.put(self.o + getattr(T, f"O_{name}"), value)
        return self.o

    def emit(self, family: int, **words: int) -> int:
        return int(emit(self.mem, self.w, family, self.segment(**words)))

    def data(self, start: int, size: int) -> bytes:
        """What the send ring has from `start` on."""
        return (self.bytes + self.bytes)[start % RING:start % RING + size]


@pytest.fixture(scope="module")
def shared() -> TcpRig:
    return TcpRig()


@pytest.fixture(scope="module")
def offload() -> TcpRig:
    return TcpRig(flags=L.NF_TX_CHECKSUM | L.NF_TX_SEGMENT)


def parse(frame: bytes) -> Any:
    """The packet, its checksums verified: IP and TCP are built again by scapy and must be the same."""
    packet = IP(frame) if frame[0] >> 4 == 4 else IPv6(frame)
    again = packet.copy()
    del again[TCP].chksum
    if frame[0] >> 4 == 4:
        del again.chksum, again.len
    else:
        del again.plen
    assert bytes(again) == frame
    return packet


# -- one segment -----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from([4, 6]), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 65535),
       st.integers(0, RING - 1), st.integers(0, 1400))
def test_one_segment(shared: TcpRig, family: int, seq: int, ack: int, window: int, start: int, size: int) -> None:
    rig = shared
    code = rig.emit(family, SEQ=seq, ACK=ack, WINDOW=window, FROM=start, LENGTH=size, FLAGS=T.ACK | T.PSH)
    assert code == SENT
    [frame] = rig.frames()
    packet = parse(frame)
    if family == 4:
        assert (packet.src, packet.dst, packet.flags, packet.ttl, packet.frag) == (OURS[4], PEER[4], "DF", 64, 0)
    else:
        assert (packet.src, packet.dst, packet.hlim, packet.fl) == (OURS[6], PEER[6], 64, 0)
    tcp = packet[TCP]
    assert (tcp.sport, tcp.dport, tcp.seq, tcp.ack, tcp.window) == (LOCAL_PORT, REMOTE_PORT, seq, ack, window)
    assert tcp.flags == "PA" and tcp.options == [] and bytes(tcp.payload) == rig.data(start, size)
    rig.check_guards()


@pytest.mark.parametrize("family", [4, 6])
def test_options(shared: TcpRig, family: int) -> None:
    rig = shared
    assert rig.emit(family, FLAGS=T.SYN, MSS=1460, SHIFT=7, TSVAL=1, TSECR=2,
                    OPTIONS=T.SO_MSS | T.SO_SHIFT | T.SO_SACK_OK | T.SO_TIMESTAMPS) == SENT
    [syn] = map(parse, rig.frames())
    said = dict(syn[TCP].options)
    assert (said["MSS"], said["WScale"], said["Timestamp"]) == (1460, 7, (1, 2)) and "SAckOK" in said
    rig.segment(OPTIONS=T.SO_SACK | T.SO_TIMESTAMPS, SACK_COUNT=3, TSVAL=3, TSECR=4, LENGTH=100)
    for i in range(6):
        rig.put(rig.o + T.O_SACKS + 8 * i, 100 + i)
    assert emit(rig.mem, rig.w, family, rig.o) == SENT
    [packet] = map(parse, rig.frames())
    said = dict(packet[TCP].options)
    assert said["SAck"] == (100, 101, 102, 103, 104, 105) and said["Timestamp"] == (3, 4)
    assert bytes(packet[TCP].payload) == rig.data(0, 100)


# -- cutting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("size", [30, 1447, 1448, 1449, 2895, 2896, 2897, RING])
@pytest.mark.parametrize("start", [0, 5, RING - 1, RING - 1448, RING - 77])
def test_data_are_cut_and_the_ring_wraps(shared: TcpRig, family: int, size: int, start: int) -> None:
    rig = shared
    seq, mss = 0xFFFFFFFF - 1000, MSS[family]
    size += mss - 1448 if size != RING else 0
    assert rig.emit(family, SEQ=seq, FROM=start, LENGTH=size, FLAGS=T.ACK | T.PSH | T.FIN, TSVAL=9, TSECR=8,
                    OPTIONS=T.SO_TIMESTAMPS, SEGMENT=mss) == SENT
    packets = [parse(frame) for frame in rig.frames()]
    assert [len(one[TCP].payload) for one in packets] == [min(mss, size - at) for at in range(0, size, mss)]
    assert b"".join(bytes(one[TCP].payload) for one in packets) == rig.data(start, size)
    assert [one[TCP].seq for one in packets] == [(seq + at) & 0xFFFFFFFF for at in range(0, size, mss)]
    assert {str(one[TCP].flags) for one in packets[:-1]} <= {"A"} and packets[-1][TCP].flags == "FPA"
    if family == 4:
        numbers = [one.id for one in packets]
        assert numbers == [(numbers[0] + i) & 0xFFFF for i in range(len(packets))]


@pytest.mark.parametrize(("family", "mtu"), [(4, 100), (4, 576), (4, 1500), (6, 1280), (6, 1500)])
def test_no_packet_is_larger_than_the_mtu(family: int, mtu: int) -> None:
    rig = TcpRig(mtu=mtu)
    rig.put(rig.w + L.W_NIF_COUNT, 2)
    assert rig.emit(family, LENGTH=4000, SEGMENT=9000, OPTIONS=T.SO_TIMESTAMPS) == SENT
    packets = [parse(frame) for frame in rig.frames()]
    assert b"".join(bytes(one[TCP].payload) for one in packets) == rig.data(0, 4000)
    assert [len(one) for one in packets[:-1]] == [mtu] * (len(packets) - 1)


def test_no_room_for_any_data() -> None:
    rig = TcpRig(mtu=68)
    rig.segment(LENGTH=10, OPTIONS=T.SO_SACK | T.SO_TIMESTAMPS, SACK_COUNT=3)
    assert emit(rig.mem, rig.w, 4, rig.o) == TOO_LARGE and rig.frames() == []
    assert rig.emit(4, OPTIONS=T.SO_TIMESTAMPS) == SENT and len(rig.frames()) == 1


def test_a_syn_with_data_is_cut(shared: TcpRig) -> None:
    rig = shared
    assert rig.emit(4, FLAGS=T.SYN, SEQ=10, LENGTH=200, SEGMENT=100) == SENT
    first, second = map(parse, rig.frames())
    assert (first[TCP].flags, first[TCP].seq, second[TCP].flags, second[TCP].seq) == ("S", 10, 0, 111)


def test_nothing_to_send(shared: TcpRig) -> None:
    assert shared.emit(4, FLAGS=0, LENGTH=100) == SENT and shared.frames() == []


# -- left to the netif -----------------------------------------------------------------------------------


def complete(frame: bytes, l4: int) -> bytes:
    """The frame with its checksum as a device makes it: the sum from the TCP header on."""
    tcp = frame[l4:] + b"\0" * (len(frame) % 2)
    total = sum(struct.unpack(f"!{len(tcp) // 2}H", tcp))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return frame[:l4 + 16] + struct.pack("!H", ~total & 0xFFFF) + frame[l4 + 18:]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("size", [0, 1, 1448, 1449, RING])
@pytest.mark.parametrize("start", [0, RING - 777])
def test_a_super_segment(offload: TcpRig, family: int, size: int, start: int) -> None:
    rig = offload
    before = rig.get(rig.w + L.W_IPID)
    mss = MSS[family]
    assert rig.emit(family, SEQ=7, FROM=start, LENGTH=size, FLAGS=T.ACK | T.PSH, OPTIONS=T.SO_TIMESTAMPS,
                    SEGMENT=mss) == SENT
    [((nif, flags, segment, l4, told), frame)] = rig.words()
    assert (nif, flags, told, l4) == (rig.tun, L.PF_CHECKSUM_PARTIAL, family, 20 if family == 4 else 40)
    assert segment == (mss if size > mss else 0)
    packet = parse(complete(frame, l4))
    assert bytes(packet[TCP].payload) == rig.data(start, size) and packet[TCP].flags == "PA"
    if family == 4:
        assert rig.get(rig.w + L.W_IPID) - before == max(1, -(-size // mss))
    rig.check_guards()


def test_checksums_only(offload: TcpRig) -> None:
    rig = TcpRig(flags=L.NF_TX_CHECKSUM)
    assert rig.emit(6, LENGTH=3000) == SENT
    sent = rig.words()
    assert [words[1:3] for words, _ in sent] == [(L.PF_CHECKSUM_PARTIAL, 0)] * 3
    packets = [parse(complete(frame, words[3])) for words, frame in sent]
    assert b"".join(bytes(one[TCP].payload) for one in packets) == rig.data(0, 3000)


def test_an_ordinary_frame_is_not_marked(offload: TcpRig) -> None:
    """The descriptors are used again: what one super-segment left in them means nothing for the next frame."""
    rig = offload
    assert rig.emit(4, LENGTH=5000) == SENT
    rig.frames()
    rig.describe(bytes(IP(src="10.1.0.2", dst="10.1.0.1") / ICMP(type=8) / b"hello"))
    kernels.icmp_input(rig.mem, rig.w, rig.tun, rig.p)
    [((_, flags, *_), frame)] = rig.words()
    assert flags == 0 and IP(frame)[ICMP].type == 0


# -- the neighbour ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, L.NF_TX_CHECKSUM | L.NF_TX_SEGMENT])
def test_one_segment_waits_for_the_neighbour(flags: int) -> None:
    rig = TcpRig(flags=flags, ours={4: "10.0.0.1", 6: "fd00::1"}, peer={4: "10.0.0.2", 6: "fd00::2"})
    assert rig.emit(4, LENGTH=5000, SEQ=1) == SENT
    [question] = [Ether(frame) for frame in rig.frames()]
    assert question[ARP].pdst == "10.0.0.2"
    reply = Ether(dst="02:00:00:00:00:01", src=PEER_MAC) / ARP(op=2, hwsrc=PEER_MAC, psrc="10.0.0.2",
                                                              hwdst="02:00:00:00:00:01", pdst="10.0.0.1")
    rig.describe(bytes(reply), L.LINK_ETHERNET)
    kernels.arp_input(rig.mem, rig.w, rig.ethernet, rig.p)
    assert kernels.retry(rig.mem, rig.w) == 0
    [((_, marks, *_), frame)] = rig.words()
    assert marks == 0 and Ether(frame).dst == PEER_MAC
    assert bytes(parse(frame[14:])[TCP].payload) == rig.data(0, 1448)      # complete: it was not for a device
    assert rig.emit(4, LENGTH=5000, SEQ=1) == SENT
    sent = rig.words()
    assert {Ether(frame).dst for _, frame in sent} == {PEER_MAC}
    if flags:
        assert [words[1:4] for words, _ in sent] == [(L.PF_CHECKSUM_PARTIAL, 1448, 34)]
    else:
        assert [words[1] for words, _ in sent] == [0] * 4
    assert sum(len(IP(frame[14:])[TCP].payload) for _, frame in sent) == 5000
    rig.check_guards()


@pytest.mark.parametrize("peer", ["192.0.2.1", "10.1.0.1", "0.0.0.0", "224.0.0.1"])
def test_no_way(peer: str) -> None:
    rig = TcpRig(peer={4: peer, 6: PEER[6]})
    assert rig.emit(4, LENGTH=10) == NO_ROUTE and rig.frames() == []


# -- hostile records -------------------------------------------------------------------------------------


def hostile(rig: TcpRig, family: int, words: list[int]) -> int:
    body = struct.pack("<IIHHIqq", family, 0, 6, 9, 0, -1, -1) + struct.pack("<24q", *words)
    rig.write(rig.record, body)
    return int(transmit(rig.mem, rig.w, rig.record, len(body), rig.at(family)))


numbers = st.one_of(st.integers(-2**63, 2**63 - 1), st.integers(-3, 100),
                    st.sampled_from([1448, 61440, 65536, 1 << 32]))


@settings(max_examples=300)
@given(st.sampled_from([4, 6]), st.booleans(), st.lists(numbers, min_size=24, max_size=24))
def test_any_record(shared: TcpRig, offload: TcpRig, family: int, device: bool, words: list[int]) -> None:
    rig = offload if device else shared
    assert hostile(rig, family, words) in (SENT, TOO_LARGE)
    sent = rig.words()
    assert len(sent) <= M.PACKETS_MAX
    payload = 0
    for (nif, flags, segment, l4, _), frame in sent:
        packet = parse(complete(frame, l4)) if flags & L.PF_CHECKSUM_PARTIAL else parse(frame)
        assert nif == rig.tun and (segment > 0 or len(frame) <= 1500)
        assert (packet.src, packet.dst) == (OURS[family], PEER[family])
        assert (packet[TCP].sport, packet[TCP].dport) == (LOCAL_PORT, REMOTE_PORT)
        payload += len(packet[TCP].payload)
        if segment:
            assert -(-len(packet[TCP].payload) // segment) <= M.PACKETS_MAX
    assert payload <= RING
    now = rig.get(rig.w + L.W_MONOTONIC)
    due = rig.get(rig.at(family) + L.PCB_DUE)
    assert due == 0 or due >= now
    rig.check_guards()


def test_records_that_are_too_short(shared: TcpRig) -> None:
    for length in (0, L.TX_PAYLOAD, L.TX_PAYLOAD + T.O_BYTES - 1):
        assert transmit(shared.mem, shared.w, shared.record, length, shared.at(4)) == INVALID
    assert shared.frames() == []


def test_a_good_record_is_sent_whole(shared: TcpRig) -> None:
    rig = shared
    words = [0] * 24
    for word, value in ((T.O_FLAGS, T.ACK), (T.O_LENGTH, RING), (T.O_SEGMENT, 536), (T.O_FROM, 3), (T.O_SEQ, 5)):
        words[word // 8] = value
    assert hostile(rig, 4, words) == SENT
    assert b"".join(bytes(parse(frame)[TCP].payload) for frame in rig.frames()) == rig.data(3, RING)


@pytest.mark.parametrize(("changes", "consumer", "sent"), [
    ({}, 7, 1),
    ({}, KCONT, 1),                             # the continuation worker, for every connection
    ({}, 8, 0),                                 # somebody else's
    ({L.PCB_KIND: L.PK_PLAIN}, KCONT, 0),       # for nothing else
    ({L.PCB_KIND: L.PK_LISTEN}, 7, 0),
    ({L.PCB_STATE: L.PCB_SLOT}, 7, 0),
    ({L.PCB_STATE: L.PCB_CLOSING}, KCONT, 0),
    ({L.PCB_GENERATION: 4}, 7, 0),
    ({L.PCB_GENERATION: 4}, KCONT, 0),
])
def test_whose_records_are_sent(changes: dict[int, int], consumer: int, sent: int) -> None:
    rig = TcpRig()
    for word, value in ({L.PCB_OWNER: 7, L.PCB_GENERATION: 3} | changes).items():
        rig.put(rig.at(4) + word, value)
    words = [0] * 24
    words[T.O_FLAGS // 8] = T.ACK
    body = struct.pack("<IIHHIqq", 4, 3, 4, 0, 0, 0, 0) + struct.pack("<24q", *words)
    rig.write(rig.record, body)
    assert (lane_record(rig.mem, rig.w, rig.record, len(body), consumer) == 0) == bool(sent)
    assert len(rig.frames()) == sent


# -- answers ---------------------------------------------------------------------------------------------


def received(rig: TcpRig, packet: Any, flags: int = 0, link: int = L.LINK_RAW) -> int:
    return rig.describe(bytes(packet), link, flags)


def layer(family: int, source: str | None = None) -> Any:
    if family == 4:
        return IP(src=source or PEER[4], dst=OURS[4])
    return IPv6(src=source or PEER[6], dst=OURS[6])


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("flags", "data", "expected"), [
    ("S", 0, ("RA", 0, 101)),
    ("S", 10, ("RA", 0, 111)),
    ("F", 10, ("RA", 0, 111)),
    ("", 10, ("RA", 0, 110)),
    ("A", 10, ("R", 777, 0)),
    ("SA", 0, ("R", 777, 0)),
    ("FA", 5, ("R", 777, 0)),
])
def test_resets(shared: TcpRig, family: int, flags: str, data: int, expected: tuple[str, int, int]) -> None:
    rig = shared
    rig.advance(2)
    segment = TCP(sport=1, dport=2, flags=flags, seq=100, ack=777, options=[("NOP", None)] * 4) / Raw(b"x" * data)
    assert refuse(rig.mem, rig.w, rig.tun, received(rig, layer(family) / segment)) == 1
    [packet] = map(parse, rig.frames())
    tcp = packet[TCP]
    assert (packet.src, packet.dst, tcp.sport, tcp.dport) == (OURS[family], PEER[family], 2, 1)
    assert (str(tcp.flags), tcp.seq, tcp.ack) == expected and tcp.window == 0 and not tcp.payload


@pytest.mark.parametrize(("flags", "marks", "source"), [
    ("R", 0, None), ("RA", 0, None), ("SR", 0, None), ("S", L.PF_MULTICAST, None), ("S", L.PF_LINK_MULTICAST, None),
    ("S", L.PF_OTHERHOST, None), ("S", 0, "0.0.0.0"), ("S", 0, "10.1.0.255"), ("S", 0, "224.0.0.1"),
    ("S", 0, "127.0.0.1"), ("S", 0, "10.1.0.1"),
])
def test_no_reset(shared: TcpRig, flags: str, marks: int, source: str | None) -> None:
    rig = shared
    rig.advance(2)
    p = received(rig, layer(4, source) / TCP(flags=flags), marks)
    assert refuse(rig.mem, rig.w, rig.tun, p) == 0 and rig.frames() == []


def test_resets_are_limited() -> None:
    rig = TcpRig()
    rig.put(rig.w + L.W_RST_RATE, 10)

    def flood(count: int) -> int:
        p = received(rig, layer(4) / TCP(flags="S"))
        return sum(int(refuse(rig.mem, rig.w, rig.tun, p)) for _ in range(count))

    assert flood(50) == 10
    rig.advance(0.25)
    assert flood(50) == 2
    rig.advance(100)
    assert flood(50) == 10
    rig.put(rig.w + L.W_RST_RATE, 0)
    rig.advance(100)
    assert flood(5) == 0 and len(rig.frames()) == 22


def test_an_answer_goes_to_the_station_that_asked() -> None:
    rig = TcpRig()
    syn = Ether(src=PEER_MAC, dst="02:00:00:00:00:01") / IP(src="10.0.0.77", dst="10.0.0.1") / TCP(
        sport=5, dport=80, flags="S", seq=9)
    o = rig.segment(FLAGS=T.SYN | T.ACK, SEQ=1, ACK=10, OPTIONS=T.SO_MSS, MSS=1460, LENGTH=5000)
    assert answer(rig.mem, rig.w, rig.ethernet, received(rig, syn, link=L.LINK_ETHERNET), o) == SENT
    first = rig.frames()[0]
    assert Ether(first).dst == PEER_MAC
    packet = parse(first[14:])
    assert (packet.src, packet.dst, packet[TCP].sport, packet[TCP].dport) == ("10.0.0.1", "10.0.0.77", 80, 5)
    assert (packet[TCP].flags, packet[TCP].seq, packet[TCP].ack) == ("SA", 1, 10) and not packet[TCP].payload
    rig.check_guards()


# -- what ICMP says --------------------------------------------------------------------------------------


def quoted(family: int, **changes: Any) -> bytes:
    """A segment of the connection, as an error message quotes it."""
    ours, peer = changes.pop("ours", OURS[family]), changes.pop("peer", PEER[family])
    packet = IP(src=ours, dst=peer, len=1500) if family == 4 else IPv6(src=ours, dst=peer, plen=1460)
    return bytes(packet / TCP(**({"sport": LOCAL_PORT, "dport": REMOTE_PORT, "seq": 0x80001234} | changes)))


def error(family: int, kind: int, code: int, rest: int, quote: bytes) -> bytes:
    source = "192.0.2.9" if family == 4 else "2001:db8::9"
    if family == 4:
        message = struct.pack("!BBHI", kind, code, 0, rest) + quote
        message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
        return bytes(IP(src=source, dst=OURS[4], proto=1) / Raw(message))
    message = {1: ICMPv6DestUnreach, 2: ICMPv6PacketTooBig, 4: ICMPv6ParamProblem}[kind](code=code)
    if kind == 2:
        message.mtu = rest
    return bytes(IPv6(src=source, dst=OURS[6]) / message / Raw(quote))


@pytest.mark.parametrize(("family", "kind", "code", "rest", "expected"), [
    (4, 3, 0, 0, (T.CTL_UNREACHABLE, 101)),
    (4, 3, 1, 0, (T.CTL_UNREACHABLE, 113)),
    (4, 3, 2, 0, (T.CTL_REFUSED, 111)),
    (4, 3, 3, 0, (T.CTL_REFUSED, 111)),
    (4, 3, 4, 1400, (T.CTL_MTU, 1400)),
    (4, 3, 4, 0x7FFF0578, (T.CTL_MTU, 1400)),
    (4, 3, 4, 0, (T.CTL_MTU, 1492)),
    (4, 3, 13, 0, (T.CTL_UNREACHABLE, 113)),
    (6, 1, 0, 0, (T.CTL_UNREACHABLE, 101)),
    (6, 1, 3, 0, (T.CTL_UNREACHABLE, 113)),
    (6, 1, 4, 0, (T.CTL_REFUSED, 111)),
    (6, 2, 0, 1400, (T.CTL_MTU, 1400)),
    (6, 4, 0, 0, (T.CTL_UNREACHABLE, 113)),
    (6, 4, 1, 0, (T.CTL_REFUSED, 111)),
])
def test_errors_reach_their_connection(family: int, kind: int, code: int, rest: int, expected: tuple[int, int]) -> None:
    rig = TcpRig()
    rig.describe(error(family, kind, code, rest, quoted(family)))
    assert kernels.icmp_input(rig.mem, rig.w, rig.tun, rig.p) == -ledger.ICMP
    assert rig.lane(family) == [(*expected, 0x80001234)]
    assert rig.get(rig.w + L.W_TCP_COUNT) == 1 and rig.get(rig.get(rig.w + L.W_TCP_DIRTY)) == family
    assert rig.get(rig.w + L.W_DIRTY_COUNT) == 1
    rig.check_guards()


@pytest.mark.parametrize("family", [4, 6])
def test_errors_about_anything_else_reach_nobody(family: int) -> None:
    rig = TcpRig()
    good = quoted(family)
    quotes = [good[:size] for size in range(28 if family == 4 else 48)]
    quotes += [quoted(family, sport=1), quoted(family, dport=1), quoted(family, ours=PEER[family], peer=OURS[family]),
               bytes([0x75]) + good[1:], bytes(len(good)), b""]
    if family == 4:
        quotes += [good[:9] + b"\x11" + good[10:], good[:6] + b"\0\1" + good[8:], b"\x44" + good[1:]]
        quotes.append(b"\x4F" + good[1:])
    else:
        quotes.append(good[:6] + b"\x2C" + good[7:])
    for quote in quotes:
        rig.describe(error(family, 3 if family == 4 else 1, 3, 0, quote))
        assert kernels.icmp_input(rig.mem, rig.w, rig.tun, rig.p) in (-ledger.ICMP, -ledger.BAD_ICMP)
    damaged = bytearray(error(family, 3 if family == 4 else 1, 3, 0, good))
    damaged[-1] ^= 1
    rig.describe(bytes(damaged))
    assert kernels.icmp_input(rig.mem, rig.w, rig.tun, rig.p) == -ledger.BAD_ICMP
    rig.describe(error(family, 3 if family == 4 else 1, 3, 0, good), flags=L.PF_MULTICAST)
    kernels.icmp_input(rig.mem, rig.w, rig.tun, rig.p)
    rig.put(rig.at(family) + L.PCB_KIND, L.PK_TIME_WAIT)
    rig.describe(error(family, 3 if family == 4 else 1, 3, 0, good))
    kernels.icmp_input(rig.mem, rig.w, rig.tun, rig.p)
    assert rig.lane(family) == [] and rig.get(rig.w + L.W_TCP_COUNT) == 0


@settings(max_examples=200)
@given(st.sampled_from([4, 6]), st.integers(0, 15), st.binary(max_size=80), st.integers(0, 60))
def test_any_quotation(shared: TcpRig, family: int, code: int, noise: bytes, keep: int) -> None:
    quote = quoted(family)[:keep] + noise
    shared.describe(error(family, 3 if family == 4 else 1, code, 0, quote))
    kernels.icmp_input(shared.mem, shared.w, shared.tun, shared.p)
    shared.check_guards()
    for number in (4, 6):
        state = shared.lanes + number * L.LS_BYTES
        for word in (L.LS_HEAD, L.LS_COUNT):
            shared.put(state + word, 0)
    shared.put(shared.w + L.W_DIRTY_COUNT, 0)
    shared.put(shared.w + L.W_TCP_COUNT, 0)


def test_times() -> None:
    """A record's deadline is passed on, never in the past and never far away."""
    rig = TcpRig()
    now = rig.get(rig.w + L.W_MONOTONIC)
    for said, due in ((0, 0), (1, now), (now + SECOND, now + SECOND), (2**63 - 1, now + 86400 * SECOND), (-5, now)):
        rig.put(rig.at(4) + L.PCB_DUE, 0)
        words = [0] * 24
        words[T.O_DEADLINE // 8] = said
        assert hostile(rig, 4, words) == SENT and rig.frames() == []
        assert rig.get(rig.at(4) + L.PCB_DUE) == due
