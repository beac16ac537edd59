"""TCP segments at the RX worker: what is valid, whose it is, handshakes by cache and by cookie, TIME_WAIT.

Through the worker's own step, on a real table with real slots; what is sent is read back with scapy. The protocol
of an established connection is not run here.
"""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from dataplane import ledger
from dataplane.inet import tcp_accept
from dataplane.jit import callback
from dataplane.pcb import lookup
from dataplane.pcb.table import SocketSpec
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import as_memory, copy, ld64, st64
from dataplane.tcp import cookie, syncache
from dataplane.tcp.service import slot_bytes
from tests.bed import Bed, Frame, Socket, pair

OURS, PEER, OURS6, PEER6 = "10.0.0.1", "10.0.0.9", "fd00::1", "fd00::9"
ETHER = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:09")
PORT, REMOTE = 8080, 40000
RING = 1 << 17
LOG_BYTES = 1 << 20
SECOND = 1_000_000_000
WRAP = 1 << 32
_LOG = L.N_PRIVATE + 128


@callback(3)
def tx(base, nif, burst, count):
    mem = as_memory(base)
    log = ld64(mem, nif + _LOG)
    for i in range(count):
        p = burst + i * L.P_BYTES
        end, size = ld64(mem, log), ld64(mem, p + L.P_LENGTH)
        if end + size + 8 <= LOG_BYTES:
            st64(mem, log + end, size)
            copy(mem, log + end + 8, ld64(mem, p + L.P_FRAME), size)
            st64(mem, log, end + 8 + size)
    return count


@dataclass(frozen=True)
class Accepted:
    """A record for accept()."""

    number: int
    generation: int
    family: int
    remote: int
    local: int


class TcpBed(Bed):
    """A bed with a listener's needs: slots, time, and the frames that were sent."""

    def __init__(self, **more: Any) -> None:
        super().__init__([f"{OURS}/24", f"{OURS6}/64"], **more)
        self.log = self.arena.map_anonymous(LOG_BYTES)
        self.put(self.log, 8)
        self.put(self.nif + _LOG, self.log)
        self.put(self.nif + L.N_TX, tx.address)
        self.put(self.w + L.W_RST_RATE, 1_000_000)
        self.put(self.table.offset + L.T_TIME_WAIT_NS, 60 * SECOND)

    def listen(self, port: int = PORT, slots: int = 4, backlog: int = 16, **more: Any) -> Socket:
        sock = self.open("listen", port=port, proto=6, backlog=backlog, **more)
        for _ in range(slots):
            self.give(sock)
        return sock

    def give(self, sock: Socket) -> int:
        """Makes a slot for the listener and puts it into the worker's queue."""
        place = self.arena.map_anonymous(slot_bytes(RING, RING, RING, 1), shared=True)
        spec = SocketSpec("connection", L.KEY_FAMILY4, 6, place=place, buffers=(RING, RING), ring_bytes=RING,
                          lanes=[place + T.CONN_LANES], segment=3, slot=4096, owner=5)
        number = self.table.add_slot(sock.number, spec, 0)
        assert self.table.offer(number)
        return number

    @property
    def cache(self) -> int:
        return self.get(self.w + L.W_SYN_CACHE)

    def forget(self) -> None:
        """Empties the SYN cache: what is left are cookies."""
        size = syncache.syn_area_bytes(4096)
        self.mem[self.cache:self.cache + size] = 0
        syncache.syn_init(self.mem, self.cache, 4096, self.table.offset)

    def sent(self) -> list[Packet]:
        """The frames that were sent since the last call, taken apart, their checksums verified."""
        found, at, end = [], 8, self.get(self.log)
        while at < end:
            size = self.get(self.log + at)
            data = self.mem[self.log + at + 8:self.log + at + 8 + size].tobytes()
            packet = Ether(data)
            found.append(packet.payload)
            again = packet.payload.copy()
            del again[TCP].chksum
            assert bytes(again) == bytes(packet.payload), "checksum"
            at += 8 + size
        self.put(self.log, 8)
        return found

    def accepted(self, sock: Socket) -> list[Accepted]:
        found = []
        for record in self.records(sock):
            number, generation, segment, slot, ends = struct.unpack_from("<IIqqq", record.data)
            assert (segment, slot, len(record.data)) == (3, 4096, T.A_BYTES)
            found.append(Accepted(number, generation, ends & 0xFFFF, ends >> 16 & 0xFFFF, ends >> 32))
        return found

    def staged(self, number: int) -> list[bytes]:
        """The segments in a connection's lane."""
        lane = self.get(self.table.lane_state(number, 0) + L.LS_BASE)
        return [one.data for one in self.records(Socket(number, lane, 0, SocketSpec("connection", 1, ring_bytes=RING)))]

    def find(self, remote: int = REMOTE, peer: str = PEER, ours: str = OURS) -> int:
        """The PCB that a lookup finds for a connection."""
        spec = SocketSpec("connection", L.KEY_FAMILY4 if "." in peer else L.KEY_FAMILY6, 6, local=pair(ours),
                          port=PORT, remote=(*pair(peer), remote))
        return self.table._find(spec)

    def tcb(self, number: int, word: int) -> int:
        place = self.get(self.table.pcb(number) + L.PCB_PLACE)
        return self.get(place + T.CONN_BLOCKS + word)


def segment(flags: str = "S", data: bytes = b"", family: int = 4, port: int = PORT, remote: int = REMOTE,
            ether: Packet = ETHER, source: str | None = None, **more: Any) -> Frame:
    ip: Packet = IP(src=source or PEER, dst=OURS) if family == 4 else IPv6(src=source or PEER6, dst=OURS6)
    packet = ether / ip / TCP(sport=remote, dport=port, flags=flags, **more)
    return Frame(bytes(packet / Raw(data) if data else packet))


SYN = {"seq": 1000, "window": 5000,
       "options": [("MSS", 1452), ("SAckOK", b""), ("Timestamp", (77, 0)), ("WScale", 7)]}


def handshake(bed: TcpBed, data: bytes = b"", flags: str = "A", **more: Any) -> Any:
    """SYN, SYN-ACK, ACK: the SYN-ACK and the outcome of the ACK."""
    assert bed.send([segment(**SYN, **more)]).reasons == {"tcp_handshake": 1}
    (answer,) = bed.sent()
    options = dict(answer[TCP].options)
    stamps = [("Timestamp", (80, options["Timestamp"][0]))] if "Timestamp" in options else []
    outcome = bed.send([segment(flags, data, seq=1001, ack=answer[TCP].seq + 1, window=300, options=stamps, **more)])
    return answer, outcome


# -- what is no segment ------------------------------------------------------------------------------------


def test_headers_and_checksums() -> None:
    bed = TcpBed()
    bed.listen()
    good = bytes(ETHER / IP(src=PEER, dst=OURS) / TCP(sport=1, dport=PORT))
    short = bytes(ETHER / IP(src=PEER, dst=OURS, proto=6) / Raw(good[34:53]))
    low, high = bytearray(good), bytearray(good)
    low[46] = 4 << 4
    high[46] = 6 << 4
    assert bed.send([short, bytes(low), bytes(high)]).reasons == {"bad_tcp_header": 3}
    bad = [bytearray(good) for _ in range(2)]
    bad[0][40] ^= 1
    bad[1][50:52] = b"\0\0"         # zero is a sum like any other
    assert bed.send([bytes(one) for one in bad]).reasons == {"bad_tcp_checksum": 2}
    for flag in (L.PF_CHECKSUM_OK, L.PF_CHECKSUM_PARTIAL):
        assert bed.send([Frame(bytes(bad[0]), flags=flag)]).reasons == {"tcp_handshake": 1}
    assert len(bed.sent()) == 2


def test_ipv6_checksum() -> None:
    bed = TcpBed()
    bed.listen()
    frame = segment(family=6)
    broken = frame.data[:-3] + bytes([frame.data[-3] ^ 1]) + frame.data[-2:]
    assert bed.send([frame, broken]).reasons == {"tcp_handshake": 1, "bad_tcp_checksum": 1}


@pytest.mark.parametrize("backpressure", [False, True])
def test_nobody_listens(backpressure: bool) -> None:
    bed = TcpBed(backpressure=backpressure)
    frames = [segment("S", seq=5), segment("A", seq=5, ack=9), segment("FPU", b"abc", seq=5), segment("R", seq=5)]
    assert bed.send(frames).reasons == {"no_socket": 4}
    assert [(str(one[TCP].flags), one[TCP].seq, one[TCP].ack) for one in bed.sent()] == [
        ("RA", 0, 6), ("R", 9, 0), ("RA", 0, 9)]


def test_senders_that_cannot_be() -> None:
    bed = TcpBed()
    bed.listen()
    frames = [segment(source=source) for source in (OURS, "0.0.0.0", "224.0.0.1", "10.0.0.255")]
    outcome = bed.send(frames)
    assert outcome.reasons == {"martian": 4} and bed.sent() == []


def test_what_was_not_sent_to_us_alone_is_not_answered() -> None:
    bed = TcpBed()
    bed.listen()
    group = ETHER.copy()
    group.dst = "ff:ff:ff:ff:ff:ff"
    to_all = bytes(ETHER / IP(src=PEER, dst="10.0.0.255") / TCP(sport=1, dport=PORT))
    frames = [segment(ether=group), segment(ether=ETHER / Dot1Q(vlan=5)), to_all]
    assert bed.send(frames).reasons == {"no_socket": 3} and bed.sent() == []
    assert bed.send([segment(ether=ETHER / Dot1Q(vlan=0))]).reasons == {"tcp_handshake": 1}


def test_a_passive_netif_answers_nothing() -> None:
    bed = Bed()
    bed.open("listen", port=PORT, proto=6, backlog=5)
    raw = bed.open("raw", proto=6)
    assert bed.send([segment()]).transmitted == 0
    assert len(bed.records(raw)) == 1
    bed.close(raw)
    assert bed.send([segment(), segment("A")]).reasons == {"no_socket": 2}


# -- the handshake -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_syn_ack(family: int) -> None:
    bed = TcpBed()
    bed.listen()
    assert bed.send([segment(family=family, **SYN)]).reasons == {"tcp_handshake": 1}
    (answer,) = bed.sent()
    tcp = answer[TCP]
    assert (answer.src, answer.dst) == ((OURS, PEER) if family == 4 else (OURS6, PEER6))
    assert (tcp.sport, tcp.dport, str(tcp.flags), tcp.ack, tcp.window) == (PORT, REMOTE, "SA", 1001, 65535)
    options = dict(tcp.options)
    assert options["MSS"] == (1460 if family == 4 else 1440)
    assert options["WScale"] == 2       # 128 KiB
    assert options["Timestamp"][1] == 77 and "SAckOK" in options
    assert options["Timestamp"][0] & 63 == 7 | 16
    bare = segment(family=family, remote=2, seq=5)
    bed.send([bare])
    (answer,) = bed.sent()
    assert [name for name, _ in answer[TCP].options] == ["MSS"]


@pytest.mark.parametrize("cookie_only", [False, True])
@pytest.mark.parametrize("family", [4, 6])
def test_the_ack_opens_a_connection(family: int, cookie_only: bool) -> None:
    bed = TcpBed()
    sock = bed.listen()
    bed.send([segment(family=family, **SYN)])
    (answer,) = bed.sent()
    if cookie_only:
        bed.forget()
    stamp = dict(answer[TCP].options)["Timestamp"][0]
    done = bed.send([segment("A", family=family, seq=1001, ack=answer[TCP].seq + 1, window=300,
                             options=[("Timestamp", (80, stamp))])])
    assert (done.delivered, done.deliveries, done.reasons) == (1, 1, {}) and bed.sent() == []
    (record,) = bed.accepted(sock)
    assert (record.family, record.remote, record.local) == (family, REMOTE, PORT)
    number = bed.find(peer=PEER if family == 4 else PEER6, ours=OURS if family == 4 else OURS6)
    assert number == record.number and bed.table.generation(number) == record.generation
    wanted = {T.T_STATE: T.ESTABLISHED, T.T_ISS: answer[TCP].seq, T.T_IRS: 1000, T.T_SND_NXT: 1, T.T_RCV_NXT: 1,
              T.T_SND_SHIFT: 7, T.T_RCV_SHIFT: 2, T.T_SND_WND: 300 << 7, T.T_PEER_MSS: 1440 if cookie_only else 1452,
              T.T_TS_RECENT: 80, T.T_FLAGS: T.TF_SACK | T.TF_TIMESTAMPS | T.TF_SCALE, T.T_MTU: 1500,
              T.T_IP_BYTES: 20 if family == 4 else 40}
    assert {word: bed.tcb(number, word) for word in wanted} == wanted
    now = bed.get(bed.w + L.W_MONOTONIC) // 1_000_000
    assert 0 <= (now + bed.tcb(number, T.T_TS_OFFSET) - stamp) % WRAP < 60_000
    assert bed.staged(number) == []
    assert bed.get(bed.cache + syncache.SC_COUNT) == 0


def test_a_cookie_without_timestamps_brings_the_mss_alone() -> None:
    bed = TcpBed()
    sock = bed.listen()
    bed.send([segment(seq=WRAP - 1, options=[("MSS", 1300), ("SAckOK", b""), ("WScale", 3)])])
    (answer,) = bed.sent()
    bed.forget()
    bed.send([segment("A", seq=0, ack=(answer[TCP].seq + 1) % WRAP, window=300)])
    (record,) = bed.accepted(sock)
    words = (T.T_IRS, T.T_PEER_MSS, T.T_FLAGS, T.T_SND_SHIFT, T.T_RCV_SHIFT, T.T_SND_WND)
    assert [bed.tcb(record.number, word) for word in words] == [WRAP - 1, 1220, 0, 0, 0, 300]


@pytest.mark.parametrize("flags, data", [("PA", b"hello"), ("FA", b""), ("FPA", b"bye")])
def test_what_comes_with_the_ack_is_the_connections(flags: str, data: bytes) -> None:
    bed = TcpBed()
    sock = bed.listen()
    _, outcome = handshake(bed, data, flags)
    assert (outcome.delivered, outcome.deliveries, outcome.reasons) == (1, 2, {})
    (record,) = bed.accepted(sock)
    assert bed.find() == record.number
    bed.send([segment("PA", b"more", seq=1001 + len(data), ack=1)])
    assert bed.get(bed.table.lane_state(record.number, 0) + L.LS_COUNT) == 2


def test_a_segment_behind_the_first_one_opens_too() -> None:
    """The cache knows the window; what is missing comes again."""
    bed = TcpBed()
    sock = bed.listen()
    bed.send([segment(**SYN)])
    (answer,) = bed.sent()
    late = segment("A", b"x" * 100, seq=1001 + 1452, ack=answer[TCP].seq + 1)
    assert bed.send([late]).delivered == 1
    assert len(bed.accepted(sock)) == 1


@pytest.mark.parametrize("crowded", [False, True])
def test_without_an_entry_a_segment_behind_the_first_one_is_dropped(crowded: bool) -> None:
    """A cookie can be checked with the first one only. While there may be such, nobody is refused."""
    bed = TcpBed()
    sock = bed.listen()
    bed.send([segment(**SYN)])
    (answer,) = bed.sent()
    bed.forget()
    if crowded:
        bed.put(bed.cache + syncache.SC_CROWDED, bed.get(bed.w + L.W_MONOTONIC))
    ends = {"ack": answer[TCP].seq + 1}
    assert bed.send([segment("A", b"x" * 100, seq=1001 + 1452, **ends)]).reasons == {"no_socket": 1}
    assert [str(one[TCP].flags) for one in bed.sent()] == ([] if crowded else ["R"])
    bed.send([segment("A", b"x" * 1452, seq=1001, **ends)])
    assert len(bed.accepted(sock)) == 1


def test_a_repeated_syn_gets_the_same_answer_and_a_new_one_another() -> None:
    bed = TcpBed()
    sock = bed.listen()
    bed.send([segment(**SYN), segment(**SYN), segment(**(SYN | {"seq": 2000}))])
    first, second, third = bed.sent()
    assert first[TCP].seq == second[TCP].seq != third[TCP].seq and third[TCP].ack == 2001
    assert bed.get(bed.cache + syncache.SC_COUNT) == 1
    bed.send([segment("A", seq=1001, ack=first[TCP].seq + 1)])      # its cookie is as good as before
    assert len(bed.accepted(sock)) == 1


def test_acks_that_end_nothing_are_refused() -> None:
    bed = TcpBed()
    sock = bed.listen()
    bed.send([segment(**SYN)])
    (answer,) = bed.sent()
    wrong = (answer[TCP].seq + 100) % WRAP
    frames = [segment("A", seq=1001, ack=wrong), segment("SA", seq=1001, ack=answer[TCP].seq + 1),
              segment("A", remote=5, seq=1001, ack=answer[TCP].seq + 1)]
    assert bed.send(frames).reasons == {"no_socket": 3}
    assert [(str(one[TCP].flags), one[TCP].seq) for one in bed.sent()] == [
        ("R", wrong), ("R", answer[TCP].seq + 1), ("R", answer[TCP].seq + 1)]
    assert bed.accepted(sock) == []


@pytest.mark.parametrize("data", [b"", b"?"])
@pytest.mark.parametrize("cookie_only", [False, True])
def test_a_probe_ends_the_handshake_whose_ack_was_lost(data: bytes, cookie_only: bool) -> None:
    """The peer's number is that of its SYN: the connection is opened, and the segment is its to answer."""
    bed = TcpBed()
    sock = bed.listen()
    bed.send([segment(**SYN)])
    (answer,) = bed.sent()
    if cookie_only:
        bed.forget()
    stamps = [("Timestamp", (80, dict(answer[TCP].options)["Timestamp"][0]))]
    probe = segment("A", data, seq=1000, ack=answer[TCP].seq + 1, window=300, options=stamps)
    outcome = bed.send([probe])
    assert (outcome.delivered, outcome.deliveries, outcome.reasons, bed.sent()) == (1, 2, {}, [])
    (record,) = bed.accepted(sock)
    assert bed.find() == record.number and bed.staged(record.number) == [probe.data[34:]]
    words = {T.T_STATE: T.ESTABLISHED, T.T_IRS: 1000, T.T_RCV_NXT: 1, T.T_SND_SHIFT: 7, T.T_SND_WND: 300 << 7}
    assert {word: bed.tcb(record.number, word) for word in words} == words


def test_a_probe_is_answered_while_there_is_no_room() -> None:
    bed = TcpBed()
    sock = bed.listen(slots=0)
    bed.send([segment(**SYN)])
    (answer,) = bed.sent()
    probe = segment("A", seq=1000, ack=answer[TCP].seq + 1, options=[("Timestamp", (80, 1))])
    assert bed.send([probe]).reasons == {"tcp_backlog": 1}
    (again,) = bed.sent()
    assert (str(again[TCP].flags), again[TCP].seq, again[TCP].ack) == ("A", answer[TCP].seq + 1, 1001)
    bed.give(sock)
    assert bed.send([probe]).delivered == 1 and len(bed.accepted(sock)) == 1


@pytest.mark.parametrize("seq", [999, 1001 + 65535, 500])
def test_other_segments_that_acknowledge_our_syn_are_answered(seq: int) -> None:
    """RFC 9293 section 3.10.7.4, first: not acceptable, and no reason for a reset."""
    bed = TcpBed()
    sock = bed.listen()
    bed.send([segment(**SYN)])
    (answer,) = bed.sent()
    assert bed.send([segment("A", seq=seq, ack=answer[TCP].seq + 1)]).reasons == {"tcp_handshake": 1}
    (again,) = bed.sent()
    assert (str(again[TCP].flags), again[TCP].ack) == ("A", 1001) and bed.accepted(sock) == []
    assert bed.get(bed.cache + syncache.SC_COUNT) == 1


def test_nonsense_is_dropped() -> None:
    bed = TcpBed()
    bed.listen()
    assert bed.send([segment(flags, remote=9) for flags in ("F", "SF", "", "P")]).reasons == {"no_socket": 4}
    assert bed.sent() == []


def test_resets_of_a_handshake() -> None:
    bed = TcpBed()
    bed.listen()
    bed.send([segment(**SYN)])
    (answer,) = bed.sent()
    count = bed.cache + syncache.SC_COUNT
    assert bed.send([segment("R", seq=1001 + 70000)]).reasons == {"tcp_handshake": 1}
    assert bed.sent() == [] and bed.get(count) == 1
    bed.send([segment("R", seq=1002)])
    (challenge,) = bed.sent()
    assert (str(challenge[TCP].flags), challenge[TCP].seq, challenge[TCP].ack) == ("A", answer[TCP].seq + 1, 1001)
    bed.send([segment("R", seq=1001)])
    assert bed.get(count) == 0 and bed.sent() == []
    assert bed.send([segment("R", seq=1001)]).reasons == {"no_socket": 1}


def test_an_old_duplicate_does_not_end_a_handshake() -> None:
    bed = TcpBed()
    sock = bed.listen()
    bed.send([segment(**SYN)])
    (answer,) = bed.sent()
    old = segment("A", seq=1001, ack=answer[TCP].seq + 1, options=[("Timestamp", (76, 0))])
    assert bed.send([old]).reasons == {"tcp_handshake": 1}
    assert bed.accepted(sock) == [] and [str(one[TCP].flags) for one in bed.sent()] == ["A"]


def test_the_address_decides_then_the_wildcard() -> None:
    bed = TcpBed()
    wild = bed.listen()
    bound = bed.listen(address=OURS)
    for remote in (1, 2):
        handshake(bed, remote=remote)
    handshake(bed, family=6)
    assert [one.remote for one in bed.accepted(bound)] == [1, 2]
    assert [one.family for one in bed.accepted(wild)] == [6]


def test_reuseport_listeners_share_the_connections() -> None:
    bed = TcpBed()
    socks = [bed.listen(slots=40, backlog=64, reuseport=True) for _ in range(2)]
    for remote in range(1000, 1040):
        handshake(bed, remote=remote)
    shares = [{one.remote for one in bed.accepted(sock)} for sock in socks]
    assert all(shares) and sorted(itertools.chain(*shares)) == list(range(1000, 1040))


# -- when there is no room -------------------------------------------------------------------------------


def test_backlog() -> None:
    bed = TcpBed()
    sock = bed.listen(slots=8, backlog=2)
    bed.send([segment(remote=remote, **SYN) for remote in (1, 2, 3)])
    answers = bed.sent()
    acks = [segment("A", remote=remote, seq=1001, ack=one[TCP].seq + 1)
            for remote, one in zip((1, 2, 3), answers, strict=True)]
    outcome = bed.send(acks)
    assert (outcome.delivered, outcome.reasons) == (2, {"tcp_backlog": 1})
    assert bed.send([segment(remote=4)]).reasons == {"tcp_backlog": 1} and bed.sent() == []
    assert [one.remote for one in bed.accepted(sock)] == [1, 2]
    assert bed.send(acks[2:]).delivered == 1
    assert [one.remote for one in bed.accepted(sock)] == [3]


def test_no_slot_is_asked_for_and_used_when_it_comes() -> None:
    bed = TcpBed()
    sock = bed.listen(slots=0)
    bed.send([segment(**SYN)])
    (answer,) = bed.sent()
    ack = segment("A", seq=1001, ack=answer[TCP].seq + 1)
    assert bed.send([ack]).reasons == {"tcp_backlog": 1}
    assert bed.get(bed.w + L.W_WANT) == 1 and bed.table.wanting() == [sock.number]
    bed.give(sock)
    assert bed.send([ack]).delivered == 1
    assert len(bed.accepted(sock)) == 1


def test_slots_are_asked_for_while_the_backlog_is_not_covered() -> None:
    bed = TcpBed()
    sock = bed.listen(slots=5, backlog=4)
    want = bed.table.pcb(sock.number) + L.PCB_WANT
    handshake(bed, remote=1)
    assert bed.get(want) == bed.get(bed.w + L.W_WANT) == 0      # four are left
    handshake(bed, remote=2)
    assert bed.get(want) == bed.get(bed.w + L.W_WANT) == 1
    assert bed.table.wanting() == [sock.number] and bed.table.wanting() == []
    bed.put(bed.w + L.W_WANT, 0)
    handshake(bed, remote=3)
    assert bed.get(bed.w + L.W_WANT) == 0                       # the supervisor knows
    for _ in range(3):
        bed.give(sock)
    bed.table.sated(sock.number)
    bed.accepted(sock)
    handshake(bed, remote=4)                                    # those in the queue count
    assert bed.get(want) == bed.get(bed.w + L.W_WANT) == 0


def test_the_slot_used_last_is_used_next() -> None:
    bed = TcpBed()
    sock = bed.listen(slots=6)
    handshake(bed, remote=1)
    (first,) = bed.accepted(sock)
    assert lookup.bucket_remove(bed.mem, bed.table.offset, first.number)
    bed.put(bed.table.pcb(first.number) + L.PCB_STATE, L.PCB_SLOT)
    assert bed.table.offer(first.number)
    bed.go_on()
    handshake(bed, remote=2)
    assert [one.number for one in bed.accepted(sock)] == [first.number]


def test_slots_are_used_up_one_by_one() -> None:
    bed = TcpBed()
    sock = bed.listen(slots=3)
    for remote in (1, 2, 3):
        handshake(bed, remote=remote)
    numbers = [one.number for one in bed.accepted(sock)]
    assert len(set(numbers)) == 3
    assert [bed.find(remote) for remote in (1, 2, 3)] == numbers
    _, outcome = handshake(bed, remote=4)
    assert outcome.reasons == {"tcp_backlog": 1}


def test_a_listener_whose_consumer_lies() -> None:
    bed = TcpBed()
    sock = bed.listen(backlog=1)
    bed.put(sock.lane + L.LANE_CONSUMED, 1 << 60)
    for remote in (1, 2):
        handshake(bed, remote=remote)
    bed.put(sock.lane + L.LANE_CONSUMED, -(1 << 60))
    assert bed.send([segment(remote=3)]).reasons == {"tcp_backlog": 1}


def test_a_flood_takes_no_memory_and_an_honest_peer_gets_through() -> None:
    bed = TcpBed()
    sock = bed.listen()
    total = 20_000
    raw = [bytearray(segment(source=f"10.0.0.{9 + n}", seq=n).data) for n in range(200)]
    burst = []
    for n in range(total):
        one = raw[n % 200]
        one[34:36] = (1024 + n // 200).to_bytes(2, "big")
        burst.append(Frame(bytes(one), flags=L.PF_CHECKSUM_OK))
    assert bed.send(burst).reasons == {"tcp_handshake": total}
    assert bed.get(bed.cache + syncache.SC_COUNT) <= 4096
    bed.put(bed.log, 8)
    _, outcome = handshake(bed)
    assert outcome.delivered == 1 and len(bed.accepted(sock)) == 1


# -- a crash in the middle -----------------------------------------------------------------------------------


def test_a_replacement_tells_what_was_not_published() -> None:
    bed = TcpBed()
    sock = bed.listen()
    handshake(bed)
    (record,) = bed.accepted(sock)
    state = bed.table.lane_state(sock.number, 0)
    assert tcp_accept.listen_recover(bed.mem, bed.w) == 0
    pcb = bed.table.pcb(record.number)
    generation = bed.get(pcb + L.PCB_PREVIOUS) >> 40
    for untold in (True, False):
        told = (1 << 40) - 1 if untold else (bed.get(state + L.LS_PUBLISHED) >> 4) + 1
        bed.put(pcb + L.PCB_PREVIOUS, generation << 40 | told)
        assert tcp_accept.listen_recover(bed.mem, bed.w) == 1
        bed.go_on()
        assert bed.outcome().deliveries == 1
        assert [one.number for one in bed.accepted(sock)] == [record.number]
    bed.put(pcb + L.PCB_PREVIOUS, (generation + 1) << 40 | (1 << 40) - 1)
    assert tcp_accept.listen_recover(bed.mem, bed.w) == 0        # another listener's


@pytest.mark.parametrize("inserted", [False, True])
def test_a_replacement_finishes_an_open_slot(inserted: bool) -> None:
    bed = TcpBed()
    sock = bed.listen(slots=2)
    handshake(bed)
    (record,) = bed.accepted(sock)
    head = bed.table.slot_head(sock.number, 0)
    following = bed.get(head)
    bed.put(bed.table.pcb(record.number) + L.PCB_NEXT, following)
    bed.put(head, record.number + 1)        # as if it had died before step 4
    if not inserted:
        assert lookup.bucket_remove(bed.mem, bed.table.offset, record.number)
    tcp_accept.listen_recover(bed.mem, bed.w)
    assert bed.get(head) == following and bed.find() == record.number


# -- TIME_WAIT ---------------------------------------------------------------------------------------------------

RCV, SND, TS, OFFSET = 5000, 9000, 700, 1 << 20


class Waiting(TcpBed):
    """A bed with a connection in TIME_WAIT, as the continuation worker makes it."""

    def __init__(self, stamps: bool = True, listen: bool = True) -> None:
        super().__init__()
        self.sock = self.listen() if listen else None
        number = self.open("connection", OURS, PORT, remote=(PEER, REMOTE), proto=6).number
        self.entry = self.table.pcb(number)
        self.number = number
        for word, value in ((L.PCB_KIND, L.PK_TIME_WAIT), (L.PCB_TW_NUMBERS, RCV | SND << 32),
                            (L.PCB_TW_STAMPS, TS | OFFSET << 32), (L.PCB_TW_UNTIL, 1),
                            (L.PCB_TW_FLAGS, (T.TF_TIMESTAMPS if stamps else 0) | 123 << 16)):
            self.put(self.entry + word, value)

    def offer(self, flags: str, **more: Any) -> str:
        """What is answered to a segment: its flags, "" for none."""
        outcome = self.send([segment(flags, **more)])
        self.reasons = outcome.reasons
        self.answers = self.sent()
        self.put(self.entry + L.PCB_TW_FLAGS, self.get(self.entry + L.PCB_TW_FLAGS) & 0xFFFFFFFF)
        return "".join(str(one[TCP].flags) for one in self.answers)


def stamp(value: int) -> dict[str, Any]:
    return {"options": [("Timestamp", (value, 1))]}


@pytest.mark.parametrize("flags, more, answer, again", [
    ("R", {"seq": RCV}, "", False),
    ("RA", {"seq": RCV, "ack": SND}, "", False),
    ("A", {"seq": RCV, "ack": SND}, "", False),                     # where it should be
    ("A", {"seq": RCV - 1, "ack": SND}, "A", False),                # keepalive
    ("FA", {"seq": RCV - 1, "ack": SND}, "A", True),                # the FIN again
    ("FA", {"seq": RCV - 4, "ack": SND, "data": b"end"}, "A", True),
    ("PA", {"seq": RCV - 9, "ack": SND, "data": b"old"}, "A", False),
    ("A", {"seq": RCV, "ack": SND - 1}, "", False),
    ("A", {"seq": RCV + 100, "ack": SND + 100}, "A", False),        # no cookie
    ("SA", {"seq": RCV + 100, "ack": SND}, "A", False),
    ("", {"seq": RCV}, "", False),
    ("S", {"seq": RCV - 1}, "A", False),                            # an old duplicate: its number is below
    ("SF", {"seq": RCV + 100}, "A", False),
])
def test_time_wait(flags: str, more: dict[str, Any], answer: str, again: bool) -> None:
    bed = Waiting()
    assert bed.offer(flags, **more) == answer
    assert bed.reasons == {"tcp_time_wait": 1}
    if answer:
        tcp = bed.answers[0][TCP]
        now = bed.get(bed.w + L.W_MONOTONIC) // 1_000_000
        assert (tcp.seq, tcp.ack, tcp.window) == (SND, RCV, 123)
        assert dict(tcp.options)["Timestamp"][1] == TS
        assert 0 <= (now + OFFSET - dict(tcp.options)["Timestamp"][0]) % WRAP < 60_000
    until = bed.get(bed.entry + L.PCB_TW_UNTIL)
    assert (until > 1) == again
    if again:
        assert until - bed.get(bed.w + L.W_MONOTONIC) <= 60 * SECOND


def test_time_wait_answers_are_not_too_many() -> None:
    bed = Waiting()
    bed.send([segment("A", seq=1, ack=1)] * 60)
    assert len(bed.sent()) == 1


@pytest.mark.parametrize("stamps, more, opens", [
    (True, {"seq": RCV - 500, **stamp(TS + 1)}, True),
    (True, {"seq": RCV + 500, **stamp(TS - 1)}, False),
    (True, {"seq": RCV + 500, **stamp(TS)}, True),
    (True, {"seq": RCV - 500, **stamp(TS)}, False),
    (True, {"seq": RCV + 500}, True),
    (True, {"seq": RCV - 500}, False),
    (False, {"seq": RCV + 500}, True),
    (False, {"seq": RCV - 500}, False),
    (False, {"seq": RCV - 500, **stamp(TS + 1)}, False),
])
def test_a_new_connection_in_place_of_one_in_time_wait(stamps: bool, more: dict[str, Any], opens: bool) -> None:
    bed = Waiting(stamps)
    assert bed.offer("S", **more) == ("SA" if opens else "A")
    if not opens:
        return
    assert bed.find() == bed.number                     # until the handshake is over
    answer = bed.answers[0][TCP]
    assert bed.offer("A", seq=RCV - 1, ack=SND) == "A"  # the old connection's
    options = stamp(TS + 5)["options"] if "Timestamp" in dict(answer.options) else []
    assert bed.offer("PA", seq=more["seq"] + 1, ack=answer.seq + 1, data=b"new", options=options) == ""
    (record,) = bed.accepted(bed.sock)
    assert bed.find() == record.number != bed.number
    assert bed.get(bed.entry + L.PCB_STATE) == L.PCB_CLOSING
    assert 1 < bed.get(bed.entry + L.PCB_TW_UNTIL) <= bed.get(bed.w + L.W_MONOTONIC)


def test_a_cookie_in_place_of_one_in_time_wait() -> None:
    bed = Waiting()
    bed.offer("S", seq=RCV + 500)
    answer = bed.answers[0][TCP]
    bed.forget()
    assert bed.offer("A", seq=RCV + 501, ack=answer.seq + 1) == ""
    (record,) = bed.accepted(bed.sock)
    assert bed.find() == record.number


def test_the_end_of_an_entry_is_claimed_once() -> None:
    """The continuation worker is about to remove it: the ACK is dropped, and comes again."""
    bed = Waiting()
    bed.offer("S", seq=RCV + 500)
    answer = bed.answers[0][TCP]
    bed.put(bed.entry + L.PCB_STATE, L.PCB_CLOSING)
    ack = {"seq": RCV + 501, "ack": answer.seq + 1}
    bed.offer("A", **ack)
    assert bed.reasons == {"tcp_backlog": 1} and bed.accepted(bed.sock) == []
    assert lookup.bucket_remove(bed.mem, bed.table.offset, bed.number)
    bed.offer("A", **ack)
    assert bed.reasons == {} and len(bed.accepted(bed.sock)) == 1


def test_time_wait_without_a_listener() -> None:
    bed = Waiting(listen=False)
    assert bed.offer("S", seq=RCV + 500) == "A"
    assert bed.reasons == {"tcp_time_wait": 1}


# -- connections ---------------------------------------------------------------------------------------------------


def test_segments_of_a_connection_are_staged_and_scheduled() -> None:
    bed = TcpBed()
    sock = bed.listen()
    handshake(bed)
    (record,) = bed.accepted(sock)
    pcb = bed.table.pcb(record.number)
    assert bed.get(pcb + L.PCB_DUE) == 0
    frame = segment("PA", b"one", seq=1001, ack=1)
    outcome = bed.send([frame])
    assert (outcome.delivered, outcome.deliveries) == (1, 1)
    assert bed.staged(record.number) == [frame.data[34:]]
    assert bed.get(pcb + L.PCB_DUE) - bed.get(bed.w + L.W_MONOTONIC) <= 100_000_000
    assert bed.get(pcb + L.PCB_DUE) > 0


def test_deliveries_are_consumed_or_unread() -> None:
    """Records for accept() are deliveries; what routers say is none, and counts nowhere."""
    bed = TcpBed()
    sock = bed.listen()

    def check() -> dict[str, Any]:
        told = ledger.snapshot(bed.mem, bed.table.offset, [ledger.Queue(bed.nif, "net", "bed", 0)], Counter())
        assert told["balanced"] and told["deliveries"] == told["consumed"] + told["unread"]
        return told

    handshake(bed, remote=1)
    answer, _ = handshake(bed, b"hello", "PA", remote=2)
    assert check()["unread"] == 3
    _, second = bed.accepted(sock)
    assert check()["consumed"] == 2
    state = bed.table.lane_state(second.number, 0)
    ours = IP(src=OURS, dst=PEER) / TCP(sport=PORT, dport=2, seq=answer[TCP].seq + 1)
    told = ETHER / IP(src="10.0.0.77", dst=OURS) / ICMP(type=3, code=4, nexthopmtu=1400) / Raw(bytes(ours)[:28])
    before = bed.get(state + L.LS_HEAD)
    assert bed.send([bytes(told)]).reasons == {"icmp": 1} and bed.get(state + L.LS_HEAD) > before
    assert check()["unread"] == 1
    stamps = [("Timestamp", (81, 1))]
    bed.send([segment("PA", b"x" * 10, remote=2, seq=1006 + 10 * n, ack=answer[TCP].seq + 1, options=stamps)
              for n in range(3)])       # the worker acknowledges these itself
    lane = bed.get(state + L.LS_BASE)
    assert bed.get(lane + L.LANE_TAIL) == bed.get(state + L.LS_PUBLISHED) > 0
    assert (bed.get(lane + L.LANE_CONSUMED), check()["unread"]) == (4, 0)


def test_the_secrets_of_cookies_are_not_the_lookups() -> None:
    bed = TcpBed()
    keys = [bed.get(bed.cache + syncache.SC_KEYS + 8 * i) for i in range(2)]
    secrets = [bed.get(bed.table.offset + word) for word in (L.T_SECRET0, L.T_SECRET1)]
    assert len({*keys, *secrets}) == 4 and cookie.KEYS_BYTES == 16
