"""Frames at a host's netif: addresses, groups, ICMP, ARP, neighbour discovery (`Endpoint`), TCP (`Segments`).

Coverage-guided: the features are the edges of the worker's own source. For each input, a burst of frames:

    the worker as plain Python, memory around each frame watched by the byte
    the compiled worker, frames right before a page that nobody may touch, or right behind one
    both say, deliver and send the same, and `offered = delivered + reasons + held`
    what a UDP socket gets is the payload that tests/inet/naive_input.py finds in a frame, and a whole datagram
    each frame that is sent is from our addresses, never to a group unless it asks for a neighbour, its lengths and
    checksums are right as read by code of its own, and scapy makes the same bytes of what it reads in it
    the number of frames sent, and of steps, is bounded by what came in

TCP's answers hold time stamps and cookies, which the clock changes between the two runs: those are left out of the
comparison of bytes. The bed of `Segments` has a listener, a connection from port 40000, a half-open one from 40001 and
one in TIME_WAIT from 40002. A frame with RELATIVE has acknowledgment numbers that count from what was sent there.
"""

from __future__ import annotations

import random
import struct
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from scapy.layers.inet import TCP, IPerror
from scapy.layers.inet6 import IPerror6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from tests.bed import Frame
from tests.fuzz import seeds
from tests.fuzz.bed import FuzzBed, Result
from tests.fuzz.engine import Input
from tests.fuzz.mutation import BURST_MAX, RELATIVE, mutate_frames, network, sealed
from tests.fuzz.targets.passive import CHECKED, RENEWED, steps_allowed
from tests.fuzz.tracing import edges, shared_world
from tests.inet import naive_input as naive
from tests.inet import test_tcp_input as tcp_bed
from tests.traffic import internet_checksum

__all__ = ["Endpoint", "Segments"]

_ALLOWED = L.PF_CHECKSUM_OK | L.PF_CHECKSUM_PARTIAL | L.PF_OTHERHOST
_OURS = {bytes([10, 0, 0, 1]), bytes.fromhex("fd00" + 13 * "00" + "01")}
_MAC = bytes.fromhex("020000000001")


class Endpoint:
    name = "endpoint"

    def __init__(self) -> None:
        self.world = shared_world()
        self.notes: Counter[str] = Counter()
        self._made = 0.0
        self._count = 0
        self._shapes: set[tuple[int, ...]] = set()

    def seeds(self) -> Iterable[Input]:
        return seeds.endpoint()

    def mutate(self, dice: random.Random, one: Input, other: Input) -> Input:
        return mutate_frames(dice, one, other, links=False)

    def _build(self) -> None:
        bed = self.bed = FuzzBed(self.world)
        bed.open("udp", port=seeds.UDP_PORT)
        bed.open("udp", tcp_bed.OURS, seeds.UDP_PORT, remote=(tcp_bed.PEER, 7))
        bed.open("udp", seeds.GROUP4, seeds.UDP_PORT, reuseport=True)
        bed.open("udp", seeds.GROUP6, seeds.UDP_PORT)
        for _ in range(2):
            bed.open("udp", tcp_bed.OURS6, seeds.UDP_PORT, reuseport=True)
        bed.open("raw", proto=99)

    def run(self, one: Input) -> set[int]:
        if time.monotonic() - self._made > RENEWED:
            self._made = time.monotonic()
            self._build()
            self.bed.freeze()
        frames = [self._frame(part) for part in one[:BURST_MAX] if len(part) >= 2]
        plain = self.bed.plain(frames)
        trace = list(self.world.trace)
        assert len(trace) <= 4 * steps_allowed(frames), f"{len(trace)} steps"
        for front in (False, True):
            compiled = self.bed.compiled(frames, front)
            assert self._steady(compiled) == self._steady(plain), (compiled, plain)
        self._count += 1
        if self._count % CHECKED == 1:
            self.bed.check()
        self._delivered(frames, plain)
        self._replies(frames, plain)
        return edges(trace)

    def _frame(self, part: bytes) -> Frame:
        return Frame(part[2:], flags=part[1] & _ALLOWED, time=7)

    def _steady(self, result: Result) -> tuple[object, ...]:
        """What does not depend on the moment."""
        records = [[(one.data, one.flags, one.aux) for one in of] for of in result.records]
        words = {**vars(result), "records": records, "replies": [_timeless(one) for one in result.replies]}
        return tuple(words.values())

    def _delivered(self, frames: Sequence[Frame], result: Result) -> None:
        found = set()
        for frame in frames:
            try:
                one = naive.packet(frame.data, frame.link)
                if one.fragment:
                    return      # of datagrams in pieces the passive targets know more
                found.add(naive.datagram(one)[0] if one.proto == 17 else one.data)
            except naive.Bad:
                if frame.flags & (L.PF_CHECKSUM_OK | L.PF_CHECKSUM_PARTIAL):
                    return      # the device says that its checksum is right
        for record in (record for records in result.records for record in records if not self._is_event(record.data)):
            assert record.data in found, record

    def _is_event(self, record: bytes) -> bool:
        """Whether it is a record for accept."""
        return False

    def _replies(self, frames: Sequence[Frame], result: Result) -> None:
        total = sum(len(one.data) for one in frames)
        assert len(result.replies) <= 4 * len(frames) + total // 500, "too many answers"
        for reply in result.replies:
            _check(reply)
            shape = len(reply), reply[14], reply[23], reply[20]
            if reply[12:14] != b"\x08\x06" and shape not in self._shapes:
                self._shapes.add(shape)
                _again(reply)


class Segments(Endpoint):
    name = "segments"

    def seeds(self) -> Iterable[Input]:
        return seeds.tcp()

    def _build(self) -> None:
        bed = self.bed = FuzzBed(self.world)
        bed.open("udp", port=seeds.UDP_PORT)
        bed.listen(slots=6)
        answer, _ = tcp_bed.handshake(bed)
        self.sent = {tcp_bed.REMOTE: answer[TCP].seq + 1}
        bed.send([tcp_bed.segment(remote=seeds.HALF_OPEN, **tcp_bed.SYN)])
        (answer,) = bed.sent()
        self.sent[seeds.HALF_OPEN] = answer[TCP].seq + 1
        number = super(FuzzBed, bed).open("connection", tcp_bed.OURS, tcp_bed.PORT,
                                          remote=(tcp_bed.PEER, seeds.TIME_WAIT), proto=6).number
        entry = bed.table.pcb(number)
        for word, value in ((L.PCB_KIND, L.PK_TIME_WAIT), (L.PCB_TW_NUMBERS, 5000 | 9000 << 32),
                            (L.PCB_TW_STAMPS, 700 | 1 << 52), (L.PCB_TW_UNTIL, 1),
                            (L.PCB_TW_FLAGS, T.TF_TIMESTAMPS | 123 << 16)):
            bed.put(entry + word, value)

    def _is_event(self, record: bytes) -> bool:
        return len(record) == T.A_BYTES

    def _frame(self, part: bytes) -> Frame:
        if part[1] & RELATIVE:
            part = _absolute(part, self.sent)
        return super()._frame(part)


def _absolute(part: bytes, sent: dict[int, int]) -> bytes:
    """The frame with numbers that count from ours: of a segment, or of one that an ICMP message quotes."""
    at = network(part)
    if not at or part[at] >> 4 != 4:
        return part
    l4 = at + (part[at] & 15) * 4
    if part[at + 9] == 6 and l4 + 12 <= len(part):
        place, port = l4 + 8, int.from_bytes(part[l4:l4 + 2], "big")
    elif part[at + 9] == 1 and l4 + 36 <= len(part):
        place, port = l4 + 32, int.from_bytes(part[l4 + 30:l4 + 32], "big")
    else:
        return part
    value = (int.from_bytes(part[place:place + 4], "big") + sent.get(port, 0)) & 0xFFFFFFFF
    return sealed(part[:place] + value.to_bytes(4, "big") + part[place + 4:])


# -- what was sent -----------------------------------------------------------------------------------------------


def _timeless(reply: bytes) -> bytes:
    """A frame that was sent, without what the clock says in a segment: cookie, checksum, time stamp."""
    first, proto = (34, reply[23]) if reply[12:14] == b"\x08\x00" else (54, reply[20])
    if proto != 6 or len(reply) < first + 20 or reply[12:14] == b"\x08\x06":
        return reply
    data = bytearray(reply)
    data[first + 4:first + 8] = bytes(4)
    data[first + 16:first + 18] = bytes(2)
    options = first + 20, first + (reply[first + 12] >> 4) * 4
    data[options[0]:options[1]] = bytes(options[1] - options[0])
    return bytes(data)


def _check(reply: bytes) -> None:
    """Lengths, checksums and sender of a frame that was sent."""
    assert reply[6:12] == _MAC, reply.hex()
    if reply[12:14] == b"\x08\x06":
        assert len(reply) == 42 and reply[14:20] == bytes.fromhex("000108000604") and reply[28:32] in _OURS, reply.hex()
        return
    packet = reply[14:]
    if packet[0] >> 4 == 4:
        header, proto, source = (packet[0] & 15) * 4, packet[9], packet[12:16]
        assert int.from_bytes(packet[2:4], "big") == len(packet), reply.hex()
        assert internet_checksum(packet[:header]) == 0, reply.hex()
        group, ends, whole = packet[16] >> 4 == 14, packet[12:20], not packet[6] & 0x3F and not packet[7]
    else:
        header, proto, source = 40, packet[6], packet[8:24]
        assert packet[0] >> 4 == 6 and int.from_bytes(packet[4:6], "big") + 40 == len(packet), reply.hex()
        group, ends, whole = packet[24] == 0xFF, packet[8:40], proto != 44
    assert source in _OURS, reply.hex()
    assert not group or (proto == 58 and packet[40] in (135, 136)), f"sent to a group: {reply.hex()}"
    if whole:
        body = packet[header:]
        pseudo = b"" if proto == 1 else ends + struct.pack("!II", len(body), proto)
        assert internet_checksum(pseudo + body) == 0, reply.hex()


def _again(reply: bytes) -> None:
    """Scapy, asked for right lengths and checksums, makes the same bytes of it. Not of an ICMP error: it makes
    something else of what is quoted there."""
    packet: Packet = Ether(reply)
    if packet.haslayer(IPerror) or packet.haslayer(IPerror6):
        return
    layer = packet
    while layer:
        for name in ("chksum", "len", "plen", "cksum"):
            if name in layer.fields:
                delattr(layer, name)
        layer = layer.payload
    assert bytes(packet) == reply, (bytes(packet).hex(), reply.hex())
