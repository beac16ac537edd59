"""Segments to packets: what TCP wants sent, from its record to frames that wait to be transmitted.

Called by the RX worker for its own runs of the protocol (`tcp_emit`), by transmit for the records of
consumers and of the continuation worker (`tcp_transmit`), and by tcp_input and its kin for answers
to segments that belong to no connection (`tcp_answer`, `tcp_refuse`).

One record (layout_tcp.O_...) carries up to OUT_BYTES_MAX of data, to be cut into O_SEGMENT bytes each. A
netif that cuts by itself gets them as one packet; for all others they are cut here. The data are copied out
of the connection's send ring, and the checksum is made of the copy: the ring is its owner's memory and may
change at any time. Addresses, ports and the ring's place come from the PCB, never from the record.

Packets are never fragmented (RFC 1191 section 6.1, RFC 9293 section 3.7.2): whatever the record says, a segment
is no larger than the netif's MTU allows. While the neighbour's link-layer address is not known, the first
segment of a record waits for it and the others are dropped: TCP will repeat them.
"""

from __future__ import annotations

from dataplane.inet.addresses import can_answer, is_group, is_ours, next_hop, route
from dataplane.inet.discovery import frame_source, neighbour_resolve
from dataplane.inet.packets import INVALID, NO_ROUTE, SENT, TOO_LARGE, next_identification, packet_send
from dataplane.inet.rate import take_token
from dataplane.inet.staging import tx_commit, tx_offload, tx_reserve
from dataplane.jit import inlined, shared
from dataplane.kcont import kcont_schedule
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import be32, copy, ld8, ld64, load_relaxed, put_be16, put_be32, st16, st64
from dataplane.tcp.segment import segment_build, segment_header_bytes
from dataplane.tcp.service import send_ring
from dataplane.wire import ethernet, ipv4, ipv6
from dataplane.wire.checksum import copy_sum, finish, ones_sum, partial

__all__ = ["PACKETS_MAX", "tcp_answer", "tcp_emit", "tcp_refuse", "tcp_transmit"]

PROTOCOL = 6
PACKETS_MAX = 128
"""Packets that one record makes at most: a hostile one may ask for segments of one byte. What is over is not
sent. Enough for OUT_BYTES_MAX from 480 bytes a segment on."""

_DEADLINE_MAX_NS = 86_400_000_000_000   # a day: no timer of TCP is set for longer, and an early one does no harm
_WORD = 0xFFFF_FFFF
_FLAGS = T.FIN | T.SYN | T.RST | T.PSH | T.ACK
_SEQUENCE, _ACKNOWLEDGEMENT, _OFFSET, _FLAGS_AT, _CHECKSUM = 4, 8, 12, 13, 16      # RFC 9293 section 3.1

# Where a segment goes, behind the record in W_SEGMENT; private to the worker.
_RECORD = L.W_SEGMENT
_NIF = L.W_SEGMENT + T.O_BYTES
_MAC = _NIF + 8
_FAMILY = _NIF + 16
_SOURCE_HI = _NIF + 24
_SOURCE_LO = _NIF + 32
_TARGET_HI = _NIF + 40
_TARGET_LO = _NIF + 48
_PORTS = _NIF + 56          # ours:16 | theirs:16
_RING = _NIF + 64
_MASK = _NIF + 72

assert _MASK + 8 <= L.W_SEGMENT + L.W_SEGMENT_BYTES
assert T.OUT_BYTES_MAX + 60 + ipv6.BYTES <= ipv4.PACKET_MAX


# -- one packet --------------------------------------------------------------------------------


@inlined
def _ip_bytes(mem, w):
    return ipv4.BYTES if ld64(mem, w + _FAMILY) == 4 else ipv6.BYTES


@shared
def _put_data(mem, w, target, place, size):
    """Copies `size` bytes of the send ring, from `place` on; returns their sum. The ring may wrap."""
    ring, mask = ld64(mem, w + _RING), ld64(mem, w + _MASK)
    place &= mask
    left = mask + 1 - place
    if size <= left:
        return copy_sum(mem, target, ring + place, size)
    copy(mem, target, ring + place, left)
    copy(mem, target + left, ring, size - left)
    return ones_sum(mem, target, size)


@shared
def _put_data_only(mem, w, target, place, size):
    """The same, for a device that makes the checksum."""
    ring, mask = ld64(mem, w + _RING), ld64(mem, w + _MASK)
    place &= mask
    left = min(mask + 1 - place, size)
    copy(mem, target, ring + place, left)
    copy(mem, target + left, ring, size - left)


@shared
def _put_ip(mem, w, at, size, packets):
    """Writes the IP header in front of `size` bytes of TCP, which will be cut into so many packets; returns the
    pseudo-header's sum."""
    if ld64(mem, w + _FAMILY) == 4:
        ipv4.build(mem, at, ipv4.BYTES + size, PROTOCOL, ld64(mem, w + _SOURCE_LO), ld64(mem, w + _TARGET_LO))
        put_be16(mem, at + ipv4.IDENTIFICATION, next_identification(mem, w))
        st64(mem, w + L.W_IPID, ld64(mem, w + L.W_IPID) + packets - 1)
        put_be16(mem, at + ipv4.FRAGMENT, ipv4.DONT_FRAGMENT)       # RFC 1191 section 3
        ipv4.seal(mem, at)
        return ipv4.pseudo(mem, at, PROTOCOL, size)
    ipv6.put_addresses(mem, at, ld64(mem, w + _SOURCE_HI), ld64(mem, w + _SOURCE_LO),
                       ld64(mem, w + _TARGET_HI), ld64(mem, w + _TARGET_LO))
    ipv6.build(mem, at, size, PROTOCOL, 64)
    return ipv6.pseudo(mem, at, PROTOCOL, size)


@inlined
def _put_tcp(mem, w, o, body, offset, size):
    """Writes the TCP header of the record's data from `offset` on, checksum zero; returns its bytes. SYN goes with
    the first byte, FIN and PSH with the last one."""
    flags = ld64(mem, o + T.O_FLAGS) & _FLAGS
    syn = flags & T.SYN != 0
    if offset != 0:
        flags &= ~T.SYN
    if offset + size < ld64(mem, o + T.O_LENGTH):
        flags &= ~(T.FIN | T.PSH)
    seq = ld64(mem, o + T.O_SEQ) + offset + (1 if syn and offset != 0 else 0)
    header = segment_build(mem, o, body, seq & _WORD, flags)
    put_be32(mem, body, ld64(mem, w + _PORTS))
    return header


@shared
def _build(mem, w, o, at, offset, size):
    """Writes a whole packet with `size` bytes of the record's data, from `offset` on; returns its bytes."""
    body = at + _ip_bytes(mem, w)
    header = _put_tcp(mem, w, o, body, offset, size)
    total = 0
    if size != 0:
        total = _put_data(mem, w, body + header, ld64(mem, o + T.O_FROM) + offset, size)
    total += _put_ip(mem, w, at, header + size, 1) + ones_sum(mem, body, header)
    st16(mem, body + _CHECKSUM, finish(total))
    return body + header + size - at


@shared
def _build_partial(mem, w, o, at, offset, size, packets):
    """The same with the checksum left to the netif, and, if `packets` is not 1, the cutting as well."""
    body = at + _ip_bytes(mem, w)
    header = _put_tcp(mem, w, o, body, offset, size)
    if size != 0:
        _put_data_only(mem, w, body + header, ld64(mem, o + T.O_FROM) + offset, size)
    st16(mem, body + _CHECKSUM, partial(_put_ip(mem, w, at, header + size, packets)))
    return body + header + size - at


@shared
def _commit(mem, w, at, size):
    kind = ethernet.TYPE_IPV4 if ld64(mem, w + _FAMILY) == 4 else ethernet.TYPE_IPV6
    tx_commit(mem, w, ld64(mem, w + _NIF), at, size, ld64(mem, w + _MAC), kind)


# -- one record --------------------------------------------------------------------------------


@shared
def _offloaded(mem, w, o, length, segment):
    """Stages `length` bytes of data as packets whose checksum the netif makes; as a single one if it also cuts
    them into `segment` bytes each."""
    room = _ip_bytes(mem, w) + segment_header_bytes(mem, o)
    whole = ld64(mem, ld64(mem, w + _NIF) + L.N_FLAGS) & L.NF_TX_SEGMENT
    step = length if whole else segment
    offset = 0
    for _ in range(PACKETS_MAX):
        size = min(step, length - offset)
        packets = (size + segment - 1) // segment if size > segment else 1
        at = tx_reserve(mem, w, room + size)
        _commit(mem, w, at, _build_partial(mem, w, o, at, offset, size, packets))
        tx_offload(mem, w, ld64(mem, w + _FAMILY), at + _ip_bytes(mem, w), segment if packets != 1 else 0)
        offset += size
        if offset >= length:
            break
    return SENT


@shared
def _cut(mem, w, o, length, segment):
    """Stages `length` bytes of data as packets of `segment` bytes each."""
    room = _ip_bytes(mem, w) + segment_header_bytes(mem, o)
    offset = 0
    for _ in range(PACKETS_MAX):
        size = min(segment, length - offset)
        at = tx_reserve(mem, w, room + size)
        _commit(mem, w, at, _build(mem, w, o, at, offset, size))
        offset += size
        if offset >= length:
            break
    return SENT


@shared
def _station(mem, w):
    """Finds the MAC to send to, and asks for it if need be: whether it is known."""
    nif, family = ld64(mem, w + _NIF), ld64(mem, w + _FAMILY)
    st64(mem, w + _MAC, -1)
    if ld64(mem, nif + L.N_LINK) != L.LINK_ETHERNET:
        return True
    hi, lo = next_hop(mem, nif, family, ld64(mem, w + _TARGET_HI), ld64(mem, w + _TARGET_LO))
    mac = neighbour_resolve(mem, w, nif, family, hi, lo)
    st64(mem, w + _MAC, mac)
    return mac >= 0


@shared
def _output(mem, w, o):
    """Sends the record `o`, whose words are trusted, on the way that is set: SENT or a code."""
    nif = ld64(mem, w + _NIF)
    headers = _ip_bytes(mem, w) + segment_header_bytes(mem, o)
    length = ld64(mem, o + T.O_LENGTH)
    segment = min(ld64(mem, o + T.O_SEGMENT), ld64(mem, nif + L.N_MTU) - headers)
    if segment < 0 or (segment == 0 and length != 0):
        return TOO_LARGE
    length = min(length, PACKETS_MAX * segment)
    if not _station(mem, w):
        at = tx_reserve(mem, w, headers + min(length, segment))
        _build(mem, w, o, at, 0, min(length, segment))
        return packet_send(mem, w, nif, at, -1)
    if ld64(mem, nif + L.N_FLAGS) & L.NF_TX_CHECKSUM:
        return _offloaded(mem, w, o, length, max(segment, 1))
    return _cut(mem, w, o, length, segment)


@shared
def _set_way(mem, w, pcb):
    """Takes from the PCB where its segments go, and where its data are: whether there is a way."""
    key = ld64(mem, pcb + L.PCB_KEY)
    family = 4 if (key >> 48) & L.KEY_FAMILY4 else 6
    hi, lo = ld64(mem, pcb + L.PCB_REMOTE_HI), ld64(mem, pcb + L.PCB_REMOTE_LO)
    if hi | lo == 0 or is_group(family, hi, lo) or is_ours(mem, w, family, hi, lo):
        return False
    nif = route(mem, w, family, hi, lo)
    if nif < 0:
        return False
    st64(mem, w + _NIF, nif)
    st64(mem, w + _FAMILY, family)
    st64(mem, w + _SOURCE_HI, ld64(mem, pcb + L.PCB_LOCAL_HI))
    st64(mem, w + _SOURCE_LO, ld64(mem, pcb + L.PCB_LOCAL_LO))
    st64(mem, w + _TARGET_HI, hi)
    st64(mem, w + _TARGET_LO, lo)
    st64(mem, w + _PORTS, (key & 0xFFFF) << 16 | ((key >> 16) & 0xFFFF))
    workers = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_WORKERS)
    st64(mem, w + _RING, send_ring(ld64(mem, pcb + L.PCB_PLACE), ld64(mem, pcb + L.PCB_RING), workers))
    st64(mem, w + _MASK, (1 << (ld64(mem, pcb + L.PCB_BUFFERS) & 0x3F)) - 1)
    return True


@shared
def tcp_emit(mem, w, number, o):
    """Sends the segments of the record at `o`, which the worker itself has made, for the connection of PCB
    `number`: SENT (also: waiting for the neighbour), or a negative code."""
    if ld64(mem, o + T.O_FLAGS) & _FLAGS == 0:
        return SENT
    pcb = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS) + number * L.PCB_BYTES
    return _output(mem, w, o) if _set_way(mem, w, pcb) else NO_ROUTE


# -- a record that somebody else has made ------------------------------------------------------


@shared
def _clamp(mem, o, place, low, high):
    st64(mem, o + place, min(max(ld64(mem, o + place), low), high))


@shared
def _take(mem, w, record, ring):
    """Reads each word of a hostile record once, and makes it one that can be sent out of a ring of `ring` bytes.
    Numbers that go on the wire may be anything: they are the sender's own connection's."""
    o = w + _RECORD
    for at in range(0, T.O_BYTES, 8):
        st64(mem, o + at, load_relaxed(mem, record + at))
    _clamp(mem, o, T.O_LENGTH, 0, min(T.OUT_BYTES_MAX, ring))
    _clamp(mem, o, T.O_SEGMENT, 1, T.OUT_BYTES_MAX)
    _clamp(mem, o, T.O_SHIFT, 0, 14)
    _clamp(mem, o, T.O_SACK_COUNT, 0, 4)
    for at in (T.O_SEQ, T.O_ACK, T.O_TSVAL, T.O_TSECR):
        st64(mem, o + at, ld64(mem, o + at) & _WORD)
    for at in (T.O_WINDOW, T.O_MSS):
        st64(mem, o + at, ld64(mem, o + at) & 0xFFFF)
    for at in range(T.O_SACKS, T.O_SACKS + 64, 8):
        st64(mem, o + at, ld64(mem, o + at) & _WORD)
    st64(mem, o + T.O_FLAGS, ld64(mem, o + T.O_FLAGS) & _FLAGS)
    st64(mem, o + T.O_FROM, ld64(mem, o + T.O_FROM) & (ring - 1))
    return o


@shared
def _schedule(mem, w, pcb, deadline):
    """Lets the continuation worker run the connection at the deadline that the record tells; 0: no need."""
    if deadline == 0:
        return
    table, now = ld64(mem, w + L.W_TABLE), ld64(mem, w + L.W_MONOTONIC)
    number = (pcb - ld64(mem, table + L.T_PCBS)) // L.PCB_BYTES
    kcont_schedule(mem, w, number, min(max(deadline, now), now + _DEADLINE_MAX_NS))


@shared
def tcp_transmit(mem, w, body, length, pcb):
    """Sends what the transmit record whose body of `length` bytes is at `body` asks for, for the connection whose
    PCB is at `pcb`, and sets its deadline: SENT or a negative code."""
    if length < L.TX_PAYLOAD + T.O_BYTES:
        return INVALID
    o = _take(mem, w, body + L.TX_PAYLOAD, 1 << (ld64(mem, pcb + L.PCB_BUFFERS) & 0x3F))
    code = SENT
    if ld64(mem, o + T.O_FLAGS) != 0:
        code = _output(mem, w, o) if _set_way(mem, w, pcb) else NO_ROUTE
    _schedule(mem, w, pcb, ld64(mem, o + T.O_DEADLINE))
    return code


# -- answers to segments that belong to no connection ------------------------------------------


@shared
def tcp_answer(mem, w, nif, p, o):
    """Sends the segment `o`, without data, to the sender of packet `p`, from the address and port that it was
    for: SENT or a negative code. It goes to the station that the frame came from while the MAC of the next hop
    is not known."""
    if ld64(mem, p + L.P_FLAGS) & (L.PF_MULTICAST | L.PF_LINK_MULTICAST | L.PF_OTHERHOST):
        return NO_ROUTE         # RFC 1122 section 4.2.3.10
    if not can_answer(mem, nif, p):
        return NO_ROUTE
    st64(mem, w + _FAMILY, ld64(mem, p + L.P_FAMILY))
    st64(mem, w + _SOURCE_HI, ld64(mem, p + L.P_TARGET_HI))
    st64(mem, w + _SOURCE_LO, ld64(mem, p + L.P_TARGET_LO))
    st64(mem, w + _TARGET_HI, ld64(mem, p + L.P_SOURCE_HI))
    st64(mem, w + _TARGET_LO, ld64(mem, p + L.P_SOURCE_LO))
    ports = be32(mem, ld64(mem, p + L.P_L4))
    st64(mem, w + _PORTS, (ports & 0xFFFF) << 16 | ports >> 16)
    st64(mem, o + T.O_LENGTH, 0)
    size = _ip_bytes(mem, w) + segment_header_bytes(mem, o)
    if size > ld64(mem, nif + L.N_MTU):
        return TOO_LARGE
    at = tx_reserve(mem, w, size)
    _build(mem, w, o, at, 0, 0)
    return packet_send(mem, w, nif, at, frame_source(mem, p))


@shared
def tcp_refuse(mem, w, nif, p):
    """Answers the segment `p`, which nobody wants, with a reset (RFC 9293 section 3.10.7.1), if the rate allows:
    1 if one was sent or waits for its neighbour. Its header has been checked."""
    at = ld64(mem, p + L.P_L4)
    flags = ld8(mem, at + _FLAGS_AT)
    if flags & T.RST or not can_answer(mem, nif, p):
        return 0
    if ld64(mem, p + L.P_FLAGS) & (L.PF_MULTICAST | L.PF_LINK_MULTICAST | L.PF_OTHERHOST):
        return 0
    if not take_token(mem, w, L.W_RST_TOKENS, L.W_RST_TIME, L.W_RST_RATE):
        return 0
    o = w + _RECORD
    for word in range(0, T.O_BYTES, 8):
        st64(mem, o + word, 0)
    if flags & T.ACK:
        st64(mem, o + T.O_SEQ, be32(mem, at + _ACKNOWLEDGEMENT))
        st64(mem, o + T.O_FLAGS, T.RST)
    else:
        data = ld64(mem, p + L.P_L3) + ld64(mem, p + L.P_L3_LENGTH) - at - (ld8(mem, at + _OFFSET) >> 4 << 2)
        occupied = data + (1 if flags & T.SYN else 0) + (1 if flags & T.FIN else 0)
        st64(mem, o + T.O_ACK, (be32(mem, at + _SEQUENCE) + occupied) & _WORD)
        st64(mem, o + T.O_FLAGS, T.RST | T.ACK)
    return 1 if tcp_answer(mem, w, nif, p, o) == SENT else 0
