"""From a frame to an IP packet: the link header, the IP header, extension headers.

Called by demux for every frame. Fills the descriptor from P_VLAN to P_TARGET_LO. Returns

    IP_PACKET     whole packet; P_PROTO, P_L4 tell what follows
    IP_FRAGMENT   a part of one; P_L4 as fragments.py wants it
    -reason       what it is instead, by the ledger's codes

Nothing outside the P_LENGTH bytes of the frame is read, whatever the headers say.
Sources: RFC 791 (IPv4), RFC 8200 (IPv6), IEEE 802.3 and 802.1Q, the LINKTYPE registry of pcap.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.jit import inlined, shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import be16, be32, be64, bswap16, bswap32, ld8, ld32, ld64, shr, st64
from dataplane.wire.checksum import good, header4_sum, ones_sum

__all__ = ["IP_FRAGMENT", "IP_PACKET", "NO_NEXT", "ip_input", "is_local", "link_header", "plain4"]

IP_PACKET = 1
IP_FRAGMENT = 2
_NO_PACKET = 0

TYPE_IPV4, TYPE_ARP, TYPE_VLAN, TYPE_IPV6, TYPE_QINQ, TYPE_QINQ_OLD = 0x0800, 0x0806, 0x8100, 0x86DD, 0x88A8, 0x9100

HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, NO_NEXT, DESTINATION = 0, 43, 44, 51, 59, 60
_PLAIN = 0xFFBF_0000_0000_00FF - (1 << 64)
"""Bits of an IPv4 header's first 8 bytes: version and length; reserved bit, more fragments, offset (RFC 791 3.1)."""

MAX_EXTENSIONS = 8
"""Extension headers that we follow. RFC 8200 section 4.1 has seven in its recommended order."""


@inlined
def _raw_type(mem, at, length):
    """EtherType of a packet without link header, by its version."""
    if length < 1:
        return -ledger.TRUNCATED
    version = ld8(mem, at) >> 4
    if version == 4:
        return TYPE_IPV4
    return TYPE_IPV6 if version == 6 else -ledger.BAD_IP_VERSION


@shared
def _null_type(mem, at, length):
    """BSD loopback: the address family as an int of the machine that captured, whose byte order
    we do not know; 24, 28 and 30 are the BSDs' AF_INET6."""
    if length < 4:
        return -ledger.TRUNCATED
    family = ld32(mem, at)
    if family > 0xFFFF:
        family = bswap32(family)
    if family == 2:
        return TYPE_IPV4
    if family == 24 or family == 28 or family == 30:
        return TYPE_IPV6
    return -ledger.NOT_IP


@inlined
def link_header(mem, p):
    """EtherType of what the frame carries, or -reason. P_L3 is where that begins, P_VLAN the outer
    tag; PF_LINK_MULTICAST is set from an Ethernet destination."""
    at = ld64(mem, p + L.P_FRAME)
    length = ld64(mem, p + L.P_LENGTH)
    link = ld64(mem, p + L.P_LINK)
    st64(mem, p + L.P_VLAN, -1)
    if link == L.LINK_RAW:
        st64(mem, p + L.P_L3, at)
        return _raw_type(mem, at, length)
    if link == L.LINK_NULL:
        st64(mem, p + L.P_L3, at + 4)
        return _null_type(mem, at, length)
    size = 14
    type_at = 12
    if link == L.LINK_SLL:
        size = 16
        type_at = 14
    elif link == L.LINK_SLL2:
        size = 20
        type_at = 0
    if length < size:
        return -ledger.TRUNCATED
    if link == L.LINK_ETHERNET and ld8(mem, at) & 1:
        st64(mem, p + L.P_FLAGS, ld64(mem, p + L.P_FLAGS) | L.PF_LINK_MULTICAST)
    kind = be16(mem, at + type_at)
    if kind == TYPE_IPV4 or kind == TYPE_IPV6 or kind == TYPE_ARP:
        st64(mem, p + L.P_L3, at + size)
        return kind
    return _vlan(mem, p, kind, at + size, at + length)


@shared
def _vlan(mem, p, kind, at, end):
    """Passes up to two tags (802.1Q, QinQ)."""
    tags = 0
    while kind == TYPE_VLAN or kind == TYPE_QINQ or kind == TYPE_QINQ_OLD:
        if tags == 2:
            return -ledger.VLAN_DEPTH
        if at + 4 > end:
            return -ledger.TRUNCATED
        if tags == 0:
            st64(mem, p + L.P_VLAN, be16(mem, at))
        kind = be16(mem, at + 2)
        at += 4
        tags += 1
    st64(mem, p + L.P_L3, at)
    return kind if kind == TYPE_IPV4 or kind == TYPE_IPV6 or kind == TYPE_ARP else -ledger.NOT_IP


@inlined
def is_local(mem, nif, family, hi, lo):
    """Whether the address is one of this netif's own."""
    at = nif + L.N_ADDRESSES
    for _ in range(ld64(mem, nif + L.N_ADDRESS_COUNT)):
        if (ld64(mem, at + L.ADDRESS_LO) == lo and ld64(mem, at + L.ADDRESS_HI) == hi
                and ld64(mem, at + L.ADDRESS_FAMILY) == family):
            return True
        at += L.ADDRESS_BYTES
    return False


@shared
def _is_broadcast4(mem, nif, address):
    """255.255.255.255, or all ones in the host part of one of our subnets (RFC 1122 3.2.1.3)."""
    if address == 0xFFFFFFFF:
        return True
    at = nif + L.N_ADDRESSES
    for _ in range(ld64(mem, nif + L.N_ADDRESS_COUNT)):
        prefix = ld64(mem, at + L.ADDRESS_PREFIX)
        if ld64(mem, at + L.ADDRESS_FAMILY) == 4 and prefix < 31:
            hosts = (1 << (32 - prefix)) - 1
            if address == ld64(mem, at + L.ADDRESS_LO) | hosts:
                return True
        at += L.ADDRESS_BYTES
    return False


@inlined
def _accept4(mem, nif, p, source, target):
    """0 if an IPv4 packet with these addresses is for this netif, else -reason; marks group addresses."""
    if target >> 28 == 0xE or target == 0xFFFFFFFF:
        st64(mem, p + L.P_FLAGS, ld64(mem, p + L.P_FLAGS) | L.PF_MULTICAST)
    if ld64(mem, nif + L.N_FLAGS) & L.NF_PASSIVE:
        return 0
    if source >> 28 == 0xE or source >> 24 == 127 or target >> 24 == 127 or _is_broadcast4(mem, nif, source):
        return -ledger.MARTIAN          # RFC 1122 3.2.1.3
    if target >> 28 == 0xE or is_local(mem, nif, 4, 0, target):
        return 0
    if _is_broadcast4(mem, nif, target):
        st64(mem, p + L.P_FLAGS, ld64(mem, p + L.P_FLAGS) | L.PF_MULTICAST)
        return 0
    return -ledger.NOT_LOCAL


@inlined
def _accept6(mem, nif, p):
    """As _accept4, of the descriptor's addresses."""
    target_hi = ld64(mem, p + L.P_TARGET_HI)
    target_lo = ld64(mem, p + L.P_TARGET_LO)
    group = (target_hi >> 56) & 0xFF == 0xFF
    if group:
        st64(mem, p + L.P_FLAGS, ld64(mem, p + L.P_FLAGS) | L.PF_MULTICAST)
    if ld64(mem, nif + L.N_FLAGS) & L.NF_PASSIVE:
        return 0
    source_hi = ld64(mem, p + L.P_SOURCE_HI)
    loopback = source_hi == 0 and ld64(mem, p + L.P_SOURCE_LO) == 1
    if (source_hi >> 56) & 0xFF == 0xFF or loopback:
        return -ledger.MARTIAN          # RFC 4291 2.7, 2.5.3
    if group or is_local(mem, nif, 6, target_hi, target_lo):
        return 0
    return -ledger.NOT_LOCAL


@shared
def _valid_options(mem, at, size):
    """Whether IPv4 options are well-formed (RFC 791 3.1) and ask for no source route, which no
    host has to follow and RFC 7126 section 4.3 drops."""
    end = at + size
    while at < end:
        kind = ld8(mem, at)
        if kind == 0:
            return True
        if kind == 1:
            at += 1
            continue
        if at + 2 > end or kind == 131 or kind == 137:
            return False
        length = ld8(mem, at + 1)
        if length < 2 or at + length > end:
            return False
        at += length
    return True


@inlined
def _ipv4(mem, nif, p, available):
    at = ld64(mem, p + L.P_L3)
    if available < 20:
        return -ledger.TRUNCATED
    first = ld8(mem, at)
    header = (first & 15) << 2
    total = be16(mem, at + 2)
    if first >> 4 != 4:
        return -ledger.BAD_IP_VERSION
    if header < 20 or total < header:
        return -ledger.BAD_IP_HEADER
    if total > available:
        return -ledger.TRUNCATED
    if not good(header4_sum(mem, at) if header == 20 else ones_sum(mem, at, header)):
        return -ledger.BAD_IP_CHECKSUM
    if header > 20 and not _valid_options(mem, at + 20, header - 20):
        return -ledger.BAD_IP_OPTIONS
    source = be32(mem, at + 12)
    target = be32(mem, at + 16)
    st64(mem, p + L.P_FAMILY, 4)
    st64(mem, p + L.P_PROTO, ld8(mem, at + 9))
    st64(mem, p + L.P_L3_LENGTH, total)
    st64(mem, p + L.P_L4, at + header)
    st64(mem, p + L.P_SOURCE_HI, 0)
    st64(mem, p + L.P_SOURCE_LO, source)
    st64(mem, p + L.P_TARGET_HI, 0)
    st64(mem, p + L.P_TARGET_LO, target)
    accepted = _accept4(mem, nif, p, source, target)
    if accepted < 0:
        return accepted
    # More fragments, or an offset: RFC 791 3.2.
    return IP_FRAGMENT if be16(mem, at + 6) & 0x3FFF else IP_PACKET


@inlined
def plain4(mem, nif, p):
    """Whether the frame is the usual one: IPv4 without options, whole, sound, to one of our own addresses. Then the
    descriptor is filled; else ip_input has to look, and nothing is said about why."""
    at, available = ld64(mem, p + L.P_FRAME), ld64(mem, p + L.P_LENGTH)
    if ld64(mem, p + L.P_LINK) == L.LINK_ETHERNET:
        if available < 34 or ld8(mem, at) & 1 or be16(mem, at + 12) != TYPE_IPV4:
            return False
        at += 14
        available -= 14
    elif ld64(mem, p + L.P_LINK) != L.LINK_RAW:
        return False
    if available < 20 or ld64(mem, p + L.P_FLAGS) & L.PF_OTHERHOST:
        return False
    first = ld64(mem, at)
    total = bswap16(shr(first, 16))
    if first & _PLAIN != 0x45 or total < 20 or total > available or not good(header4_sum(mem, at)):
        return False
    source, target = be32(mem, at + 12), be32(mem, at + 16)
    st64(mem, p + L.P_VLAN, -1)
    st64(mem, p + L.P_L3, at)
    st64(mem, p + L.P_L3_LENGTH, total)
    st64(mem, p + L.P_L4, at + 20)
    st64(mem, p + L.P_PROTO, ld8(mem, at + 9))
    st64(mem, p + L.P_FAMILY, 4)
    st64(mem, p + L.P_SOURCE_HI, 0)
    st64(mem, p + L.P_SOURCE_LO, source)
    st64(mem, p + L.P_TARGET_HI, 0)
    st64(mem, p + L.P_TARGET_LO, target)
    return _accept4(mem, nif, p, source, target) == 0 and ld64(mem, p + L.P_FLAGS) & L.PF_MULTICAST == 0


@shared
def _bad_ipv6_options(mem, at, size):
    """Whether hop-by-hop or destination options cannot be parsed, or hold one that we do not know
    and that says: discard (RFC 8200 4.2)."""
    end = at + size
    while at < end:
        kind = ld8(mem, at)
        if kind == 0:
            at += 1
            continue
        if at + 2 > end or at + 2 + ld8(mem, at + 1) > end:
            return True
        # Known or skippable: PadN, router alert, and every type whose upper bits are 00.
        if kind >> 6 != 0:
            return True
        at += 2 + ld8(mem, at + 1)
    return False


@shared
def _extension_headers(mem, p, kind, at, end):
    """Walks the extension headers (RFC 8200 4): IP_PACKET, IP_FRAGMENT or -reason. P_CLASS is where
    the byte stands that names the last header, for reassembly."""
    named_at = ld64(mem, p + L.P_L3) + 6
    for count in range(MAX_EXTENSIONS + 1):
        st64(mem, p + L.P_PROTO, kind)
        st64(mem, p + L.P_L4, at)
        st64(mem, p + L.P_CLASS, named_at)
        if kind == FRAGMENT:
            return IP_FRAGMENT if at + 8 <= end else -ledger.BAD_EXTENSION_HEADER
        if kind != HOP_BY_HOP and kind != ROUTING and kind != AUTHENTICATION and kind != DESTINATION:
            return IP_PACKET
        if at + 8 > end or count == MAX_EXTENSIONS or (kind == HOP_BY_HOP and count > 0):
            return -ledger.BAD_EXTENSION_HEADER
        size = (ld8(mem, at + 1) + 1) * 8
        if kind == AUTHENTICATION:
            size = (ld8(mem, at + 1) + 2) * 4       # RFC 4302 2.2
        if at + size > end:
            return -ledger.BAD_EXTENSION_HEADER
        if (kind == HOP_BY_HOP or kind == DESTINATION) and _bad_ipv6_options(mem, at + 2, size - 2):
            return -ledger.BAD_EXTENSION_HEADER
        # Segments left to a type that we do not route (RFC 8200 4.4; type 0 is dead, RFC 5095).
        if kind == ROUTING and ld8(mem, at + 3) != 0:
            return -ledger.BAD_EXTENSION_HEADER
        named_at = at
        kind = ld8(mem, at)
        at += size
    return -ledger.BAD_EXTENSION_HEADER


@shared
def _ipv6(mem, nif, p, available):
    at = ld64(mem, p + L.P_L3)
    if available < 40:
        return -ledger.TRUNCATED
    if ld8(mem, at) >> 4 != 6:
        return -ledger.BAD_IP_VERSION
    total = be16(mem, at + 4) + 40
    if total > available:
        return -ledger.TRUNCATED
    st64(mem, p + L.P_FAMILY, 6)
    st64(mem, p + L.P_L3_LENGTH, total)
    st64(mem, p + L.P_SOURCE_HI, be64(mem, at + 8))
    st64(mem, p + L.P_SOURCE_LO, be64(mem, at + 16))
    st64(mem, p + L.P_TARGET_HI, be64(mem, at + 24))
    st64(mem, p + L.P_TARGET_LO, be64(mem, at + 32))
    accepted = _accept6(mem, nif, p)
    if accepted < 0:
        return accepted
    kind = ld8(mem, at + 6)
    if kind == 17 or kind == 6 or kind == 58:
        st64(mem, p + L.P_PROTO, kind)
        st64(mem, p + L.P_L4, at + 40)
        return IP_PACKET
    return _extension_headers(mem, p, kind, at + 40, at + total)


@inlined
def ip_input(mem, nif, p):
    """Validates the frame's link and IP headers: IP_PACKET, IP_FRAGMENT or -reason."""
    st64(mem, p + L.P_FAMILY, _NO_PACKET)
    kind = link_header(mem, p)
    if kind < 0:
        return kind
    available = ld64(mem, p + L.P_FRAME) + ld64(mem, p + L.P_LENGTH) - ld64(mem, p + L.P_L3)
    if ld64(mem, p + L.P_FLAGS) & L.PF_OTHERHOST and not ld64(mem, nif + L.N_FLAGS) & L.NF_PASSIVE:
        return -ledger.OTHER_HOST
    if kind == TYPE_IPV4:
        return _ipv4(mem, nif, p, available)
    if kind == TYPE_IPV6:
        return _ipv6(mem, nif, p, available)
    return -ledger.ARP
