"""ICMP (RFC 792, RFC 1122 section 3.2.2) and ICMPv6 (RFC 4443) of an endpoint.

`icmp_input` is called by demux with ICMP packets for our addresses; it answers echo requests and
passes neighbour discovery on. `icmp_unreachable` is called when nobody wants a packet.

Answers go by the netif that the packet came through, to the next hop on its link; while the link-layer
address of that one is not known, to the station that the frame came from. Frames of a VLAN get
none: our addresses are those of the untagged network.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.inet.addresses import can_answer, source_address
from dataplane.inet.discovery import frame_source, nd_input
from dataplane.inet.output import put_header4, put_header6
from dataplane.inet.packets import packet_room, packet_send
from dataplane.inet.rate import take_token
from dataplane.inet.tcp_icmp import tcp_icmp
from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import copy, ld8, ld64
from dataplane.wire import icmp, ipv4, ipv6
from dataplane.wire.checksum import finish, ones_sum

__all__ = ["PORT", "PROTOCOL", "icmp_input", "icmp_unreachable"]

PORT, PROTOCOL = 0, 1       # what was unreachable
_QUOTE4 = 576               # an ICMP error is no longer (RFC 1812 section 4.3.2.3)
_QUOTE6 = ipv6.MTU_MIN      # nor an ICMPv6 error (RFC 4443 section 2.4 c)
_CHAIN_MAX = 16


@shared
def _size(mem, p):
    """Bytes of the message at P_L4."""
    return ld64(mem, p + L.P_L3) + ld64(mem, p + L.P_L3_LENGTH) - ld64(mem, p + L.P_L4)


@shared
def _is_intact(mem, p, size):
    """Whether the checksum is right, or a device says so."""
    if ld64(mem, p + L.P_FLAGS) & (L.PF_CHECKSUM_OK | L.PF_CHECKSUM_PARTIAL):
        return True
    total = ones_sum(mem, ld64(mem, p + L.P_L4), size)
    if ld64(mem, p + L.P_FAMILY) == 6:
        total += ipv6.pseudo(mem, ld64(mem, p + L.P_L3), icmp.PROTOCOL6, size)
    return finish(total) == 0


@shared
def _room_for_answer(mem, w, nif, p, length):
    """Place of a packet with `length` bytes of ICMP for the sender of `p`, its IP header written.
    It comes from the address that was asked, or from one of the netif's if that was a group."""
    source_hi, source_lo = ld64(mem, p + L.P_TARGET_HI), ld64(mem, p + L.P_TARGET_LO)
    hi, lo = ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO)
    if ld64(mem, p + L.P_FAMILY) == 4:
        at = packet_room(mem, w, nif, ipv4.BYTES + length)
        put_header4(mem, w, at, length, icmp.PROTOCOL4, source_lo, lo)
        return at
    if ipv6.is_group(source_hi):
        source_hi, source_lo = source_address(mem, nif, 6, hi, lo)
    at = packet_room(mem, w, nif, ipv6.BYTES + length)
    ipv6.put_addresses(mem, at, source_hi, source_lo, hi, lo)
    put_header6(mem, at, length, icmp.PROTOCOL6)
    return at


@shared
def _answer(mem, w, nif, p, at, length):
    """Completes the message of `length` bytes in the packet at `at` and sends it."""
    if ld64(mem, p + L.P_FAMILY) == 4:
        icmp.seal(mem, at + ipv4.BYTES, length, 0)
    else:
        icmp.seal(mem, at + ipv6.BYTES, length, ipv6.pseudo(mem, at, icmp.PROTOCOL6, length))
    return packet_send(mem, w, nif, at, frame_source(mem, p))


@shared
def _echo(mem, w, nif, p, size):
    """Sends the request back as a reply (RFC 1122 section 3.2.2.6, RFC 4443 section 4.2). One to an
    IPv4 group or broadcast address is not answered; one to an IPv6 group is."""
    family = ld64(mem, p + L.P_FAMILY)
    group = ld64(mem, p + L.P_FLAGS) & (L.PF_MULTICAST | L.PF_LINK_MULTICAST) != 0
    if (family == 4 and group) or not can_answer(mem, nif, p):
        return -ledger.ICMP
    request = ld64(mem, p + L.P_L4)
    at = _room_for_answer(mem, w, nif, p, size)
    body = at + (ipv4.BYTES if family == 4 else ipv6.BYTES)
    reply = icmp.ECHO_REPLY if family == 4 else icmp.ECHO_REPLY6
    icmp.build(mem, body, reply, 0, icmp.rest(mem, request))
    copy(mem, body + icmp.BYTES, request + icmp.BYTES, size - icmp.BYTES)
    _answer(mem, w, nif, p, at, size)
    return -ledger.ICMP_ECHO


@shared
def icmp_input(mem, w, nif, p):
    """Takes the ICMP message at P_L4. Returns -reason. Errors that we are told go to the TCP connection that
    they are about, and are only counted otherwise."""
    size = _size(mem, p)
    if size < icmp.BYTES or not _is_intact(mem, p, size):
        return -ledger.BAD_ICMP
    message = icmp.kind(mem, ld64(mem, p + L.P_L4))
    if ld64(mem, p + L.P_FAMILY) == 4:
        if message == icmp.ECHO:
            return _echo(mem, w, nif, p, size)
        if message == icmp.UNREACHABLE:
            tcp_icmp(mem, w, p)
        return -ledger.ICMP
    if message == icmp.ECHO6:
        return _echo(mem, w, nif, p, size)
    if icmp.ROUTER_SOLICITATION <= message <= icmp.REDIRECT:
        return nd_input(mem, w, nif, p)
    if message in (icmp.MLD_QUERY, icmp.MLD_REPORT, icmp.MLD_DONE, icmp.MLD2_REPORT):
        return -ledger.MULTICAST_CONTROL
    if message in (icmp.UNREACHABLE6, icmp.TOO_BIG6, icmp.PARAMETER6):
        tcp_icmp(mem, w, p)
    return -ledger.ICMP


# -- errors ------------------------------------------------------------------------------------


@shared
def _deserves_error(mem, nif, p):
    """RFC 1122 section 3.2.2, RFC 4443 section 2.4 e: no error about an error, about what many hosts
    got, about a fragment that is not the first."""
    if ld64(mem, p + L.P_FLAGS) & (L.PF_MULTICAST | L.PF_LINK_MULTICAST | L.PF_OTHERHOST):
        return False
    if not can_answer(mem, nif, p):
        return False
    l3, l4, proto = ld64(mem, p + L.P_L3), ld64(mem, p + L.P_L4), ld64(mem, p + L.P_PROTO)
    if ld64(mem, p + L.P_FAMILY) == 4:
        if ipv4.flags_and_offset(mem, l3) & ipv4.OFFSET_MASK != 0:
            return False
        return proto != icmp.PROTOCOL4 or (_size(mem, p) >= 1 and not icmp.is_error4(ld8(mem, l4)))
    return proto != icmp.PROTOCOL6 or (_size(mem, p) >= 1 and not icmp.is_error6(ld8(mem, l4)))


@shared
def _named_at(mem, p):
    """Offset in an IPv6 packet of the byte that names the header at P_L4."""
    l3, l4 = ld64(mem, p + L.P_L3), ld64(mem, p + L.P_L4)
    named, at = l3 + ipv6.NEXT_HEADER, l3 + ipv6.BYTES
    for _ in range(_CHAIN_MAX):
        if at >= l4:
            break
        size = ipv6.extension_length(mem, at, ld8(mem, named))
        named = at
        at += size
    return named - l3


@shared
def icmp_unreachable(mem, w, nif, p, kind):
    """Tells the sender of `p` that nobody has its port (`kind` PORT) or protocol (PROTOCOL), quoting as
    much of the packet as fits. 1 if an error was sent or waits for its neighbour."""
    if not _deserves_error(mem, nif, p) or not take_token(mem, w, L.W_ICMP_TOKENS, L.W_ICMP_TIME, L.W_ICMP_RATE):
        return 0
    quoted = ld64(mem, p + L.P_L3_LENGTH)
    if ld64(mem, p + L.P_FAMILY) == 4:
        header = ipv4.BYTES
        quoted = min(quoted, _QUOTE4 - ipv4.BYTES - icmp.BYTES)
        message, rest = icmp.UNREACHABLE, 0
        code = icmp.UNREACHABLE_PORT if kind == PORT else icmp.UNREACHABLE_PROTOCOL
    else:
        header = ipv6.BYTES
        quoted = min(quoted, _QUOTE6 - ipv6.BYTES - icmp.BYTES)
        message, code, rest = icmp.UNREACHABLE6, icmp.UNREACHABLE6_PORT, 0
        if kind != PORT:        # RFC 4443 section 3.4
            message, code, rest = icmp.PARAMETER6, icmp.PARAMETER6_NEXT_HEADER, _named_at(mem, p)
    at = _room_for_answer(mem, w, nif, p, icmp.BYTES + quoted)
    icmp.build(mem, at + header, message, code, rest)
    copy(mem, at + header + icmp.BYTES, ld64(mem, p + L.P_L3), quoted)
    return 1 if _answer(mem, w, nif, p, at, icmp.BYTES + quoted) == 0 else 0
