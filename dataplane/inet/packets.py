"""IP packets that we made: to the neighbour, in fragments if need be, or waiting for its address.

Used by output, icmp and neighbour. A packet is built at the place that `packet_room`
gives, complete with its IP header; `packet_send` reads from that header how long it is and where
it goes, finds the neighbour's link-layer address, fragments what is larger than the MTU, and stages
the frames.
"""

from __future__ import annotations

from dataplane.inet.addresses import is_broadcast, is_group, next_hop
from dataplane.inet.discovery import FRESH, neighbour_ask, neighbour_lookup
from dataplane.inet.pending import pending_hold
from dataplane.inet.staging import BUILD_AT, LINK_ROOM, tx_commit, tx_reserve
from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import copy, ld64, put_be16, put_be32, st8, st64
from dataplane.wire import ethernet, ipv4, ipv6

__all__ = [
    "INVALID", "NO_MEMORY", "NO_ROUTE", "SENT", "TOO_LARGE", "next_identification", "packet_emit",
    "packet_room", "packet_send",
]

SENT = 0                # staged, or waiting for the neighbour's address
NO_ROUTE = -1
TOO_LARGE = -2
NO_MEMORY = -3          # too many packets wait for neighbours
INVALID = -4            # a record that makes no sense


@shared
def packet_room(mem, w, nif, size):
    """Where to build a packet of `size` bytes for the netif: in the frame itself if it fits the MTU,
    else in the part of the buffer for large datagrams."""
    if size <= ld64(mem, nif + L.N_MTU):
        return tx_reserve(mem, w, size)
    return ld64(mem, w + L.W_TX_BUFFER) + BUILD_AT + LINK_ROOM


@shared
def _family(mem, packet):
    return ipv4.version(mem, packet)


@shared
def _size(mem, packet):
    """Bytes of the packet, from its header."""
    if _family(mem, packet) == 4:
        return ipv4.total_length(mem, packet)
    return ipv6.BYTES + ipv6.payload_length(mem, packet)


@shared
def _target(mem, packet):
    """(hi, lo) of the packet's destination, from its header."""
    if _family(mem, packet) == 4:
        return 0, ipv4.target(mem, packet)
    return ipv6.target_hi(mem, packet), ipv6.target_lo(mem, packet)


@shared
def next_identification(mem, w):
    """Identification for a new datagram. Workers never give the same one (but at the wrap): two
    datagrams under one identification would be put together wrongly by the receiver."""
    count = (ld64(mem, w + L.W_IPID) + 1) & 0xFFFF_FFFF
    st64(mem, w + L.W_IPID, count)
    workers = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_WORKERS)
    return count * workers + ld64(mem, w + L.W_INDEX)


@shared
def _group_mac(mem, nif, family, hi, lo):
    """The MAC for a multicast or broadcast destination; -1: it is a station's address."""
    if is_group(family, hi, lo):
        return ethernet.group_mac4(lo) if family == 4 else ethernet.group_mac6(lo)
    if family == 4 and is_broadcast(mem, nif, lo):
        return ethernet.BROADCAST
    return -1


@shared
def packet_send(mem, w, nif, packet, fallback):
    """Sends the packet built at `packet`, the place that `packet_room` gave: SENT or a code.

    If the neighbour is not known the packet waits for it; an answer may go to the MAC `fallback` at
    once instead, the station that sent what it answers (-1: none).
    """
    family = _family(mem, packet)
    hi, lo = _target(mem, packet)
    if ld64(mem, nif + L.N_LINK) != L.LINK_ETHERNET:
        return packet_emit(mem, w, nif, packet, -1)
    mac = _group_mac(mem, nif, family, hi, lo)
    if mac >= 0:
        return packet_emit(mem, w, nif, packet, mac)
    hi, lo = next_hop(mem, nif, family, hi, lo)
    mac, state = neighbour_lookup(mem, w, nif, hi, lo)
    if mac >= 0 or fallback >= 0:
        code = packet_emit(mem, w, nif, packet, mac if mac >= 0 else fallback)
    elif pending_hold(mem, w, nif, hi, lo, packet, _size(mem, packet)):
        code = SENT
    else:
        code = NO_MEMORY
    if state != FRESH and (mac >= 0 or fallback < 0):
        neighbour_ask(mem, w, nif, family, hi, lo, mac)     # the packet's room is free again by now
    return code


@shared
def packet_emit(mem, w, nif, packet, mac):
    """Stages the packet as one frame, or as fragments."""
    size = _size(mem, packet)
    ipv4_packet = _family(mem, packet) == 4
    if size > ld64(mem, nif + L.N_MTU):
        if ipv4_packet:
            return _fragment4(mem, w, nif, packet, mac)
        return _fragment6(mem, w, nif, packet, mac)
    at = tx_reserve(mem, w, size)
    if at != packet:
        copy(mem, at, packet, size)
    tx_commit(mem, w, nif, at, size, mac, ethernet.TYPE_IPV4 if ipv4_packet else ethernet.TYPE_IPV6)
    return SENT


@shared
def _fragment4(mem, w, nif, packet, mac):
    """Cuts an IPv4 packet without options to the MTU (RFC 791 section 3.2)."""
    data = ipv4.total_length(mem, packet) - ipv4.BYTES
    room = (ld64(mem, nif + L.N_MTU) - ipv4.BYTES) & ~7
    if room < 8:
        return TOO_LARGE
    for offset in range(0, data, room):
        piece = min(room, data - offset)
        more = ipv4.MORE_FRAGMENTS if offset + piece < data else 0
        at = tx_reserve(mem, w, ipv4.BYTES + piece)
        copy(mem, at, packet, ipv4.BYTES)
        copy(mem, at + ipv4.BYTES, packet + ipv4.BYTES + offset, piece)
        put_be16(mem, at + ipv4.LENGTH, ipv4.BYTES + piece)
        put_be16(mem, at + ipv4.FRAGMENT, more | (offset >> 3))
        ipv4.seal(mem, at)
        tx_commit(mem, w, nif, at, ipv4.BYTES + piece, mac, ethernet.TYPE_IPV4)
    return SENT


@shared
def _fragment6(mem, w, nif, packet, mac):
    """Cuts an IPv6 packet without extension headers to the MTU (RFC 8200 section 4.5)."""
    data = ipv6.payload_length(mem, packet)
    room = (ld64(mem, nif + L.N_MTU) - ipv6.BYTES - ipv6.FRAGMENT_BYTES) & ~7
    if room < 8:
        return TOO_LARGE
    identification = next_identification(mem, w)
    for offset in range(0, data, room):
        piece = min(room, data - offset)
        more = ipv6.FRAGMENT_MORE if offset + piece < data else 0
        size = ipv6.BYTES + ipv6.FRAGMENT_BYTES + piece
        at = tx_reserve(mem, w, size)
        copy(mem, at, packet, ipv6.BYTES)
        put_be16(mem, at + ipv6.PAYLOAD_LENGTH, size - ipv6.BYTES)
        st8(mem, at + ipv6.NEXT_HEADER, ipv6.FRAGMENT)
        header = at + ipv6.BYTES
        put_be16(mem, header, ipv6.next_header(mem, packet) << 8)
        put_be16(mem, header + ipv6.FRAGMENT_OFFSET, offset | more)
        put_be32(mem, header + ipv6.FRAGMENT_ID, identification)
        copy(mem, header + ipv6.FRAGMENT_BYTES, packet + ipv6.BYTES + offset, piece)
        tx_commit(mem, w, nif, at, size, mac, ethernet.TYPE_IPV6)
    return SENT
