"""What routers and hosts say about segments that we sent: ICMP errors, passed on to their connections.

Called by icmp_input for errors whose checksum is right. The message quotes the beginning of our packet
(RFC 792; RFC 1122 section 3.2.2; RFC 4443 section 2.4 c); the connection found by it gets a control
record in its lane, in order with its segments. Anybody can forge such a message: the protocol checks the
quoted sequence number and decides what to believe (RFC 5927 section 4.1).
"""

from __future__ import annotations

import errno

from dataplane.inet.deliver import stage
from dataplane.inet.tcp_input import tcp_dirty
from dataplane.jit import shared
from dataplane.pcb.lookup import find
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import be16, be32, be64, ld64, st64
from dataplane.wire import icmp, ipv4, ipv6

__all__ = ["tcp_icmp"]

_PROTOCOL = 6
_QUOTED_TCP = 8         # bytes of the TCP header that are quoted at least: ports and sequence number
_SEQUENCE = 4
_UNREACHABLE = errno.EHOSTUNREACH
_NETWORK = errno.ENETUNREACH
_REFUSED = errno.ECONNREFUSED
_WORD = T.RECORD_CONTROL << 24


@shared
def _plateau(length):
    """MTU to be tried after a packet of `length` bytes was too large for a router that does not tell its next
    hop's: the next lower one in common use (RFC 1191 section 7.1)."""
    for mtu in (32000, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296):
        if mtu < length:
            return mtu
    return 68


@shared
def _meaning4(mem, message, quoted):
    """(CTL_..., value) of a destination unreachable message: RFC 1122 sections 3.2.2.1 and 4.2.3.9."""
    code = icmp.code(mem, message)
    if code == icmp.UNREACHABLE_TOO_BIG:
        mtu = icmp.rest(mem, message) & 0xFFFF
        return T.CTL_MTU, mtu if mtu != 0 else _plateau(ipv4.total_length(mem, quoted))
    if code == icmp.UNREACHABLE_PORT or code == icmp.UNREACHABLE_PROTOCOL:
        return T.CTL_REFUSED, _REFUSED
    return T.CTL_UNREACHABLE, _NETWORK if code in (0, 6, 9, 11) else _UNREACHABLE


@shared
def _meaning6(mem, message):
    """The same of ICMPv6 types 1, 2 and 4 (RFC 4443 sections 3.1, 3.2, 3.4)."""
    kind, code = icmp.kind(mem, message), icmp.code(mem, message)
    if kind == icmp.TOO_BIG6:
        return T.CTL_MTU, icmp.rest(mem, message)
    if kind == icmp.PARAMETER6:
        if code == icmp.PARAMETER6_NEXT_HEADER:
            return T.CTL_REFUSED, _REFUSED
        return T.CTL_UNREACHABLE, _UNREACHABLE
    if code == icmp.UNREACHABLE6_PORT:
        return T.CTL_REFUSED, _REFUSED
    return T.CTL_UNREACHABLE, _NETWORK if code == 0 else _UNREACHABLE


@shared
def _ports(mem, tcp):
    """ours | theirs << 16, as a lookup wants them: the quoted packet was ours."""
    return be16(mem, tcp) | be16(mem, tcp + 2) << 16


@shared
def _quoted4(mem, w, quoted, size):
    """(PCB number, place of the TCP header) of the IPv4 packet whose first `size` bytes are quoted; -1, 0."""
    if size < ipv4.BYTES or ipv4.version(mem, quoted) != 4 or ipv4.protocol(mem, quoted) != _PROTOCOL:
        return -1, 0
    header = ipv4.header_length(mem, quoted)
    if header < ipv4.BYTES or size < header + _QUOTED_TCP:
        return -1, 0
    if ipv4.flags_and_offset(mem, quoted) & ipv4.OFFSET_MASK != 0:
        return -1, 0
    tcp = quoted + header
    number = find(mem, ld64(mem, w + L.W_TABLE), L.CLASS_CONNECTED, _PROTOCOL, L.KEY_FAMILY4, _ports(mem, tcp),
                  0, ipv4.source(mem, quoted), 0, ipv4.target(mem, quoted))
    return number, tcp


@shared
def _quoted6(mem, w, quoted, size):
    """The same of an IPv6 packet. Those of ours have no extension headers."""
    if size < ipv6.BYTES + _QUOTED_TCP or ipv4.version(mem, quoted) != 6:
        return -1, 0
    if ipv6.next_header(mem, quoted) != _PROTOCOL:
        return -1, 0
    tcp = quoted + ipv6.BYTES
    source, target = quoted + ipv6.SOURCE, quoted + ipv6.TARGET
    number = find(mem, ld64(mem, w + L.W_TABLE), L.CLASS_CONNECTED, _PROTOCOL, L.KEY_FAMILY6, _ports(mem, tcp),
                  be64(mem, source), be64(mem, source + 8), be64(mem, target), be64(mem, target + 8))
    return number, tcp


@shared
def _tell(mem, w, p, number, kind, value, seq):
    """Stages the control record, if the PCB is a connection and its lane has room. It is no packet: the lane's
    counters are taken back."""
    pcb = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS) + number * L.PCB_BYTES
    state = ld64(mem, w + L.W_LANES) + number * L.LS_BYTES
    if ld64(mem, pcb + L.PCB_KIND) != L.PK_CONNECTION or ld64(mem, state + L.LS_BASE) == 0:
        return
    first = ld64(mem, state + L.LS_HEAD) == ld64(mem, state + L.LS_PUBLISHED)
    record = w + L.W_SEGMENT
    st64(mem, record + T.CTL_KIND, kind)
    st64(mem, record + T.CTL_VALUE, value)
    st64(mem, record + T.CTL_SEQ, seq)
    staged = stage(mem, w, state, _WORD, ld64(mem, p + L.P_TIME), record, T.CTL_BYTES) == 1
    counter = state + (L.LS_COUNT if staged else L.LS_DROPPED)
    st64(mem, counter, ld64(mem, counter) - 1)
    if staged and first:
        tcp_dirty(mem, w, number)


@shared
def tcp_icmp(mem, w, p):
    """Passes the error message at P_L4 of packet `p`, whose header is all there and whose checksum is right, on to
    the connection that it is about, if there is one. ICMP: destination unreachable; ICMPv6: destination
    unreachable, packet too big, parameter problem."""
    if ld64(mem, p + L.P_FLAGS) & (L.PF_MULTICAST | L.PF_LINK_MULTICAST | L.PF_OTHERHOST):
        return
    message = ld64(mem, p + L.P_L4)
    quoted = message + icmp.BYTES
    size = ld64(mem, p + L.P_L3) + ld64(mem, p + L.P_L3_LENGTH) - quoted
    if ld64(mem, p + L.P_FAMILY) == 4:
        number, tcp = _quoted4(mem, w, quoted, size)
        if number >= 0:
            kind, value = _meaning4(mem, message, quoted)
            _tell(mem, w, p, number, kind, value, be32(mem, tcp + _SEQUENCE))
    else:
        number, tcp = _quoted6(mem, w, quoted, size)
        if number >= 0:
            kind, value = _meaning6(mem, message)
            _tell(mem, w, p, number, kind, value, be32(mem, tcp + _SEQUENCE))
