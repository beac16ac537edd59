"""IP output: what a consumer sends, from its record to frames that wait to be transmitted.

`udp_output` is called by the worker for each record of a consumer's transmit lane, `tx_flush` by
its step.

A record is hostile memory: every field is read once, the payload is copied before its checksum is
computed. Where a packet comes from is decided by the PCB, never by the record.
"""

from __future__ import annotations

from dataplane.inet.addresses import is_group, is_ours, route, source_address
from dataplane.inet.packets import (
    INVALID,
    NO_MEMORY,
    NO_ROUTE,
    SENT,
    TOO_LARGE,
    next_identification,
    packet_room,
    packet_send,
)
from dataplane.inet.staging import tx_flush
from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import copy, ld64, load_relaxed, put_be16, st8
from dataplane.wire import icmp, ipv4, ipv6, udp

__all__ = [
    "INVALID", "NO_MEMORY", "NO_ROUTE", "SENT", "TOO_LARGE", "put_header4", "put_header6", "route",
    "source_address", "tx_flush", "udp_output",
]

assert L.TX_PORT == L.TX_FAMILY + 2 and L.TX_FAMILY % 8 == 0     # one load gives both
_CHECKSUM6_END = 4      # an ICMPv6 message that is shorter has no checksum field


# -- headers -----------------------------------------------------------------------------------


@shared
def put_header4(mem, w, at, length, proto, source, target):
    """Writes the IPv4 header of a packet with `length` bytes of payload."""
    ipv4.build(mem, at, ipv4.BYTES + length, proto, source, target)
    put_be16(mem, at + ipv4.IDENTIFICATION, next_identification(mem, w))
    if ipv4.is_group(target):
        st8(mem, at + ipv4.TTL, 1)          # RFC 1112 section 6.1
    ipv4.seal(mem, at)


@shared
def put_header6(mem, at, length, proto):
    """Writes the IPv6 header of a packet with `length` bytes of payload; its addresses stand there
    already."""
    hops = 1 if ipv6.is_group(ipv6.target_hi(mem, at)) else 64      # RFC 3493 section 5.2
    ipv6.build(mem, at, length, proto, hops)


# -- what the PCB and the record say -----------------------------------------------------------


@shared
def _class(mem, pcb):
    return (ld64(mem, pcb + L.PCB_KEY) >> 40) & 0xFF


@shared
def _protocol(mem, pcb):
    """What the socket may send: UDP, or one protocol of its own if it is raw; 0: nothing."""
    proto = (ld64(mem, pcb + L.PCB_KEY) >> 32) & 0xFF
    kind = _class(mem, pcb)
    if kind == L.CLASS_RAW:
        return proto
    return proto if proto == udp.PROTOCOL and kind != L.CLASS_TAP else 0


@shared
def _family(mem, pcb, word):
    """4 or 6, if the record says so and the socket is of that family; else 0."""
    families = (ld64(mem, pcb + L.PCB_KEY) >> 48) & 0xFF
    family = word & 0xFFFF
    if family == 4 and families & L.KEY_FAMILY4:
        return 4
    return 6 if family == 6 and families & L.KEY_FAMILY6 else 0


@shared
def _destination(mem, record, pcb, family, word):
    """(hi, lo, port) to send to: a connected socket's peer, else what the record says."""
    if _class(mem, pcb) <= L.CLASS_HALF:
        port = (ld64(mem, pcb + L.PCB_KEY) >> 16) & 0xFFFF
        return ld64(mem, pcb + L.PCB_REMOTE_HI), ld64(mem, pcb + L.PCB_REMOTE_LO), port
    hi = load_relaxed(mem, record + L.TX_ADDRESS_HI)
    lo = load_relaxed(mem, record + L.TX_ADDRESS_LO)
    port = (word >> 16) & 0xFFFF
    return (hi, lo, port) if family == 6 else (0, lo & ipv4.BROADCAST, port)


@shared
def _has_own_source(mem, w, pcb, family):
    """Whether the socket is bound to an address that can be a source. One that is bound to a group,
    a broadcast address, or an address that is not ours, is as one that is not bound."""
    return is_ours(mem, w, family, ld64(mem, pcb + L.PCB_LOCAL_HI), ld64(mem, pcb + L.PCB_LOCAL_LO))


@shared
def _netif(mem, w, pcb, family, hi, lo):
    """The netif to send through, or -1. A group is reached through the netif that has the socket's
    own address, if there is one. Our own addresses are not reached: no netif leads to ourselves."""
    if is_group(family, hi, lo) or (family == 4 and lo == ipv4.BROADCAST):
        if _has_own_source(mem, w, pcb, family):
            return route(mem, w, family, ld64(mem, pcb + L.PCB_LOCAL_HI), ld64(mem, pcb + L.PCB_LOCAL_LO))
        return route(mem, w, family, hi, lo)
    if hi | lo == 0 or is_ours(mem, w, family, hi, lo):
        return -1
    return route(mem, w, family, hi, lo)


@shared
def _source(mem, w, nif, pcb, family, hi, lo):
    """(hi, lo) to send from."""
    if _has_own_source(mem, w, pcb, family):
        return ld64(mem, pcb + L.PCB_LOCAL_HI), ld64(mem, pcb + L.PCB_LOCAL_LO)
    return source_address(mem, nif, family, hi, lo)


# -- the datagram ------------------------------------------------------------------------------


@shared
def _put_body(mem, body, pcb, port, payload, size):
    """Copies the payload, behind a UDP header if the socket is not raw."""
    if _class(mem, pcb) == L.CLASS_RAW:
        copy(mem, body, payload, size)
        return
    udp.build(mem, body, ld64(mem, pcb + L.PCB_KEY) & 0xFFFF, port, size)
    copy(mem, body + udp.BYTES, payload, size - udp.BYTES)


@shared
def _output4(mem, w, nif, pcb, target, port, payload, size):
    """Sends `size` bytes above IPv4."""
    if ipv4.BYTES + size > ipv4.PACKET_MAX:
        return TOO_LARGE
    _, source = _source(mem, w, nif, pcb, 4, 0, target)
    at = packet_room(mem, w, nif, ipv4.BYTES + size)
    proto = _protocol(mem, pcb)
    put_header4(mem, w, at, size, proto, source, target)
    body = at + ipv4.BYTES
    _put_body(mem, body, pcb, port, payload, size)
    if _class(mem, pcb) != L.CLASS_RAW:
        udp.seal(mem, body, size, ipv4.pseudo(mem, at, proto, size))
    return packet_send(mem, w, nif, at, -1)


@shared
def _output6(mem, w, nif, pcb, hi, lo, port, payload, size):
    """Sends `size` bytes above IPv6."""
    if size > ipv6.PAYLOAD_MAX:
        return TOO_LARGE
    source_hi, source_lo = _source(mem, w, nif, pcb, 6, hi, lo)
    at = packet_room(mem, w, nif, ipv6.BYTES + size)
    proto = _protocol(mem, pcb)
    ipv6.put_addresses(mem, at, source_hi, source_lo, hi, lo)
    put_header6(mem, at, size, proto)
    body = at + ipv6.BYTES
    _put_body(mem, body, pcb, port, payload, size)
    pseudo = ipv6.pseudo(mem, at, proto, size)
    if _class(mem, pcb) != L.CLASS_RAW:
        udp.seal(mem, body, size, pseudo)
    elif proto == icmp.PROTOCOL6 and size >= _CHECKSUM6_END:
        icmp.seal(mem, body, size, pseudo)      # RFC 3542 section 3.1
    return packet_send(mem, w, nif, at, -1)


@shared
def udp_output(mem, w, record, length, pcb):
    """Sends the datagram in the transmit record whose body of `length` bytes is at `record`, for the
    socket whose PCB is at `pcb`: SENT (also: waiting for the neighbour), or a negative code.

    A raw socket's payload is what follows the IP header.
    """
    word = load_relaxed(mem, record + L.TX_FAMILY) if length >= L.TX_PAYLOAD else 0
    family, proto = _family(mem, pcb, word), _protocol(mem, pcb)
    if family == 0 or proto == 0:
        return INVALID
    hi, lo, port = _destination(mem, record, pcb, family, word)
    size = length - L.TX_PAYLOAD
    if _class(mem, pcb) != L.CLASS_RAW:
        if port == 0:
            return INVALID
        size += udp.BYTES
    nif = _netif(mem, w, pcb, family, hi, lo)
    if nif < 0:
        return NO_ROUTE
    if family == 4:
        return _output4(mem, w, nif, pcb, lo, port, record + L.TX_PAYLOAD, size)
    return _output6(mem, w, nif, pcb, hi, lo, port, record + L.TX_PAYLOAD, size)
