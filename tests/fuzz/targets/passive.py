"""Frames at a passive netif, into sockets that take everything: link, IP, extension headers, fragments, UDP.

Coverage-guided: the features are the edges of the worker's own source. For each input, a burst of frames:

    the worker as plain Python, memory around each frame watched by the byte
    the compiled worker, frames right before a page that nobody may touch, or right behind one
    both say and deliver the same, and `offered = delivered + reasons + held`
    what is refused is refused for the reason that tests/inet/naive_input.py gives
    what UDP and raw sockets get is what tests/live/oracle.py, which reads with scapy, makes of the same frames
    the number of steps is bounded by the number of bytes

`Passive` has only a UDP socket (the fast way), `Copied` a tap and a raw socket as well (the slow one).

Where scapy's reading is no statement, the input is compared with the first oracle alone, and counted in `notes`:
scapy raises on it though it is good, or (`_beyond`) it does not know the tag 0x9100, reads IPv4 options behind the end
of their list, guesses what is inside of AH or of a type of routing header that it does not know, or finds half an
address in one. What scapy takes and a receiver has to refuse is in `_refused`.
"""

from __future__ import annotations

import ipaddress
import random
import time
from collections import Counter
from collections.abc import Iterable

from scapy.layers.inet import IP, in4_chksum
from scapy.packet import Packet

from dataplane.inet.fragment_table import HEADROOM
from dataplane.shm import layout as L
from tests.bed import Frame, Record
from tests.fuzz import seeds
from tests.fuzz.bed import FuzzBed, Result
from tests.fuzz.engine import Input
from tests.fuzz.mutation import BURST_MAX, LINKS, mutate_frames
from tests.fuzz.tracing import edges, shared_world
from tests.inet import naive_input as naive
from tests.live import oracle

__all__ = ["Copied", "Passive", "steps_allowed"]

RENEWED = 20.0      # seconds after which the bed is made anew: its timers are those of when it was made
CHECKED = 256       # inputs after which all of memory is compared


def steps_allowed(frames: Iterable[Frame]) -> int:
    """How many places in the source a burst may pass: so many for each frame, and for each byte."""
    return 2000 + sum(4000 + 8 * len(one.data) for one in frames)


class Passive:
    name = "passive"
    taps = False

    def __init__(self) -> None:
        self.world = shared_world()
        self.notes: Counter[str] = Counter()
        self._made = 0.0
        self._count = 0

    def seeds(self) -> Iterable[Input]:
        return seeds.passive()

    def mutate(self, dice: random.Random, one: Input, other: Input) -> Input:
        return mutate_frames(dice, one, other)

    def _renew(self) -> None:
        if time.monotonic() - self._made < RENEWED:
            return
        self._made = time.monotonic()
        self.bed = FuzzBed(self.world, passive=True)
        self.bed.open("udp")
        if self.taps:
            self.bed.open("raw", proto=0)
            self.bed.open("tap", proto=0)
        self.bed.freeze()

    def run(self, one: Input) -> set[int]:
        self._renew()
        frames = [Frame(part[2:], LINKS[part[0] % len(LINKS)], time=7) for part in one[:BURST_MAX] if len(part) >= 2]
        plain = self.bed.plain(frames)
        trace = list(self.world.trace)
        assert len(trace) <= steps_allowed(frames), f"{len(trace)} steps"
        for front in (False, True):
            compiled = self.bed.compiled(frames, front)
            assert compiled == plain, (compiled, plain)
        self._count += 1
        if self._count % CHECKED == 1:
            self.bed.check()
        self._compare(frames, plain)
        return edges(trace)

    def _compare(self, frames: list[Frame], result: Result) -> None:
        assert result.replies == []
        self._naive(frames, result)
        meaning = Meaning()
        for one in frames:
            try:
                if not _refused(one):
                    meaning.add(oracle.Frame(one.data, len(one.data), one.time, one.link))
            except Exception:       # scapy's own, of any kind: right where the frame is bad
                if not _is_bad(one):
                    self.notes["scapy raised"] += 1
                    return
        if any(_beyond(one) for one in frames):
            self.notes["beyond scapy"] += 1
            return
        told = [_told(record) for record in result.records[0]]
        expected = [(one.payload, one.vlan, *(ipaddress.ip_address(end[0]) for end in (one.source, one.target) if end))
                    for one in meaning.udp]
        assert told == expected, (told, expected)
        if self.taps:
            raw = [_unsized(record.data) for record in result.records[1]]
            assert raw == [_unsized(one.payload) for one in meaning.raw], (raw, meaning.raw)

    def _naive(self, frames: list[Frame], result: Result) -> None:
        """Compares with the slow reader. Fragments are the other oracle's."""
        reasons, udp, packets, fragments = _read(frames)
        if not self.taps:
            assert not reasons - Counter(result.reasons), (reasons, result.reasons)
        else:
            assert result.delivered == len(frames) and not result.reasons
            assert [record.data for record in result.records[2]] == [one.data for one in frames]
        if fragments:
            return
        records = [(record.data, record.aux & 0xFFFF, record.vlan) for record in result.records[0]]
        assert records == udp, (records, udp)
        if self.taps:
            raw = [record.data for record in result.records[1]]
            assert raw == packets, (raw, packets)
        else:
            assert result.delivered == len(udp)


class Meaning(oracle.Meaning):
    """Scapy's reading, with RFC 768's length in the pseudo header: in4_chksum takes it from the IP header, which is
    wrong when bytes follow the datagram."""

    def _deliver(self, packet: Packet, time: int, vlan: int) -> None:
        if isinstance(packet, IP) and packet.proto == 17:
            body = bytes(packet)[packet.ihl * 4:]
            size = int.from_bytes(body[4:6], "big")
            if 8 <= size < len(body):
                self.raw.append(oracle.Record(bytes(packet), time, vlan, (packet.src, 0), (packet.dst, 0)))
                packet.len = packet.ihl * 4 + size
                if body[6:8] == b"\0\0" or in4_chksum(17, packet, body[:size]) == 0:
                    ports = int.from_bytes(body[:2], "big"), int.from_bytes(body[2:4], "big")
                    self.udp.append(oracle.Record(body[8:size], time, vlan, (packet.src, ports[0]),
                                                  (packet.dst, ports[1])))
                return
        super()._deliver(packet, time, vlan)


class Copied(Passive):
    name = "copied"
    taps = True


def _read(frames: list[Frame]) -> tuple[Counter[str], list[tuple[bytes, int, int | None]], list[bytes], int]:
    """Reasons, UDP records, IP packets of all frames that are no fragments; how many are fragments."""
    reasons: Counter[str] = Counter()
    udp: list[tuple[bytes, int, int | None]] = []
    packets: list[bytes] = []
    fragments = 0
    for frame in frames:
        try:
            one = naive.packet(frame.data, frame.link)
            if one.fragment:
                fragments += 1
                continue
            packets.append(one.data)
            if one.proto == 17:
                data, at = naive.datagram(one)
                udp.append((data, at, one.vlan))
        except naive.Bad as bad:
            reasons[str(bad)] += 1
    return reasons, udp, packets, fragments


def _unsized(packet: bytes) -> bytes:
    """The packet without length and checksum of an IPv4 header: scapy does not count what is behind a datagram when it
    puts fragments together."""
    return packet[:2] + packet[4:10] + packet[12:] if packet[0] >> 4 == 4 else packet


def _is_bad(frame: Frame) -> bool:
    try:
        naive.packet(frame.data, frame.link)
    except naive.Bad:
        return True
    return False


def _told(record: Record) -> tuple[object, ...]:
    """What the record of a datagram says: payload, tag, addresses."""
    first, size = (12, 4) if record.data[0] >> 4 == 4 else (8, 16)
    ends = (ipaddress.ip_address(record.data[at:at + size]) for at in (first, first + size))
    return record.payload, -1 if record.vlan is None else record.vlan, *ends


def _chain(frame: Frame) -> tuple[bytes, list[tuple[int, int]]]:
    """An IPv6 packet, and kind and place of each of its extension headers and of what is behind them."""
    try:
        family, data, _ = naive._link(frame.data, frame.link)
    except naive.Bad:
        return b"", []
    if family != 0x86DD or len(data) < 40:
        return b"", []
    found = [(data[6], 40)]
    while found[-1][0] in naive.EXTENSIONS and found[-1][1] + 8 <= len(data):
        kind, at = found[-1]
        found.append((data[at], at + ((data[at + 1] + 2) * 4 if kind == 51 else (data[at + 1] + 1) * 8)))
    return data, found


def _refused(frame: Frame) -> bool:
    """Whether it is something that scapy would take and we do not:

    extension headers that are cut, too many, in a wrong place (RFC 8200 4.1), or hold options that are (4.2): scapy
    does not look; a fragment that hides the transport header from a filter (RFC 1858, 3128, 7112), one of a fragment,
    one behind more bytes of headers than reassembly keeps."""
    try:
        one = naive.packet(frame.data, frame.link)
    except naive.Bad as bad:
        return str(bad) == "bad_extension_header"
    if not one.fragment:
        return False
    if one.at > HEADROOM:
        return True
    if one.family == 4:
        word, data = naive.number(one.data, 6), one.data[one.at:]
        return one.proto == 6 and (word & 0x1FFF == 1 or (word & 0x3FFF == 0x2000 and len(data) < 16))
    word = naive.number(one.data, one.at + 2)
    return word & 0xFFF8 == 0 and _bad_first(one, bool(word & 1))


def _bad_first(one: naive.Packet, more: bool) -> bool:
    """Whether a first IPv6 fragment would be refused as a packet of its own, or lacks a part of its headers."""
    head, rest = bytearray(one.data[:one.at]), one.data[one.at + 8:]
    at, kind, before = 6, one.data[6], 0
    while kind != 44:
        place = 40 if at == 6 else at + ((head[at + 1] + 2) * 4 if before == 51 else (head[at + 1] + 1) * 8)
        at, before, kind = place, kind, head[place]
    head[at] = one.data[one.at]
    head[4:6] = (len(head) - 40 + len(rest)).to_bytes(2, "big")
    try:
        whole = naive._ipv6(bytes(head) + rest, None)
    except naive.Bad:
        return True
    size = len(whole.data) - whole.at
    return whole.fragment or (more and size < {6: 20, 17: 8, 58: 8}.get(whole.proto, 0))


def _behind_end(options: bytes) -> bytes:
    """What follows the option that ends the list, of IPv4 options that are right."""
    while options and options[0] != 0:
        options = options[1 if options[0] == 1 else options[1]:]
    return options


def _beyond(frame: Frame) -> bool:
    """Whether scapy's reading of this frame says nothing."""
    if frame.link not in (L.LINK_RAW, L.LINK_NULL) and b"\x91\x00" in frame.data[:28]:
        return True
    if not _is_bad(frame) and (one := naive.packet(frame.data, frame.link)).family == 4:
        return any(_behind_end(one.data[20:(one.data[0] & 15) * 4]))
    data, chain = _chain(frame)
    return any(kind == 51 or (kind == 43 and (data[at + 1] & 1 or data[at + 2] not in (0, 2, 4)))
               for kind, at in chain if at + 8 <= len(data))


assert L.LINK_ETHERNET == oracle.ETHERNET and L.LINK_RAW == oracle.RAW
