"""Flow hash: one number for both directions of a flow, the same whatever link carried it.

Called by netifs that split a capture over queues, and by the choice of a reuseport member. Reads
the frame only, within the given length, and changes nothing.

What must stay together gets the same number: the two directions of a connection, and all
fragments of a datagram. Only the first fragment has ports, so fragments go by addresses alone,
the first one as well (so does receive-side scaling in network cards; a flow that sends some
datagrams whole and others in fragments has two numbers).
"""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm import layout as L
from dataplane.shm.atomics import be16, be32, be64, crc32, fold, ld8

__all__ = ["flow_hash", "flow_queue", "symmetric_hash"]

# Link headers: where the EtherType stands, and how long the header is.
_ETHERNET_TYPE, _ETHERNET_BYTES = 12, 14    # IEEE 802.3 clause 3.1.1
_SLL_TYPE, _SLL_BYTES = 14, 16              # LINKTYPE_LINUX_SLL
_SLL2_TYPE, _SLL2_BYTES = 0, 20             # LINKTYPE_LINUX_SLL2
_NULL_BYTES = 4                             # LINKTYPE_NULL, LINKTYPE_LOOP: an address family
_TYPE_IPV4, _TYPE_IPV6 = 0x0800, 0x86DD
_TYPE_VLAN, _TYPE_QINQ, _TYPE_QINQ_OLD = 0x8100, 0x88A8, 0x9100     # IEEE 802.1Q clause 9.5
_VLAN_BYTES, _VLAN_DEPTH = 4, 2
_ANY_VERSION = -2                           # no EtherType: the IP header's first nibble decides

# Extension headers with a length of 8 * (n + 1), RFC 8200 section 4, RFC 6275, RFC 7401, RFC 5533.
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _OPTIONS = 0, 43, 44, 51, 60
_MOBILITY, _HIP, _SHIM6 = 135, 139, 140
_EXTENSION_DEPTH = 16

_TCP, _UDP, _DCCP, _SCTP, _UDPLITE = 6, 17, 33, 132, 136    # ports in the first four bytes

_MIX = 0x2545F4914F6CDD1D   # odd, half of its bits set


@inlined
def symmetric_hash(source_hi, source_lo, target_hi, target_lo, ports, proto):
    """Number of 32 bits for a packet's addresses, `ports` (source:16 | target:16) and protocol,
    the same for the packet that answers it.

    The lower end goes first, so that both directions read alike. Sums or xors of the two ends
    would do too, but put whole subnets into one number. CRC-32C is linear: flows that differ in a
    few bits may differ in a few bits of it. The product spreads them over all bits.
    """
    swap = source_hi > target_hi
    if source_hi == target_hi:
        swap = source_lo > target_lo
        if source_lo == target_lo:
            swap = (ports >> 16) > (ports & 0xFFFF)
    if swap:
        source_hi, target_hi = target_hi, source_hi
        source_lo, target_lo = target_lo, source_lo
        ports = ((ports & 0xFFFF) << 16) | (ports >> 16)
    crc = crc32(crc32(0xFFFFFFFF, source_hi), source_lo)
    crc = crc32(crc32(crc, target_hi), target_lo)
    return fold(crc32(crc, ports | (proto << 32)), _MIX) & 0xFFFFFFFF


@inlined
def _network(mem, link, frame, length):
    """`(EtherType, offset in the frame)` of the network header behind link header and VLAN tags;
    the type is `_ANY_VERSION` where the link has none, and -1 where the frame is too short."""
    if link == L.LINK_RAW:
        return _ANY_VERSION, 0
    if link == L.LINK_NULL:
        return _ANY_VERSION, _NULL_BYTES
    kind, offset = _ETHERNET_TYPE, _ETHERNET_BYTES
    if link == L.LINK_SLL:
        kind, offset = _SLL_TYPE, _SLL_BYTES
    elif link == L.LINK_SLL2:
        kind, offset = _SLL2_TYPE, _SLL2_BYTES
    if length < offset:
        return -1, 0
    kind = be16(mem, frame + kind)
    for _ in range(_VLAN_DEPTH):
        if kind not in (_TYPE_VLAN, _TYPE_QINQ, _TYPE_QINQ_OLD):
            break
        if length < offset + _VLAN_BYTES:
            return -1, 0
        kind = be16(mem, frame + offset + 2)
        offset += _VLAN_BYTES
    return kind, offset


@inlined
def _ports(mem, proto, at, length):
    """Source and target port of the transport header at `at`, 0 for a protocol without ports."""
    if length >= 4 and proto in (_UDP, _TCP, _SCTP, _DCCP, _UDPLITE):
        return be32(mem, at)
    return 0


@inlined
def _hash4(mem, ip, length):
    """Of the IPv4 packet at `ip` (RFC 791 section 3.1), 0 if it is none."""
    if length < 20 or ld8(mem, ip) >> 4 != 4:
        return 0
    header, total = (ld8(mem, ip) & 15) * 4, be16(mem, ip + 2)
    if header < 20 or header > length:
        return 0
    if header <= total < length:
        length = total      # what follows is the link's padding
    ports, proto = 0, ld8(mem, ip + 9)
    if be16(mem, ip + 6) & 0x3FFF:      # more fragments, or an offset
        proto = 0
    else:
        ports = _ports(mem, proto, ip + header, length - header)
    return symmetric_hash(0, be32(mem, ip + 12), 0, be32(mem, ip + 16), ports, proto)


@inlined
def _transport6(mem, ip, length):
    """`(protocol, offset)` behind the extension headers of the IPv6 packet at `ip`; protocol -1
    for a fragment, whose headers the other fragments do not have.

    A fragment header that says "offset 0, no more" holds a whole datagram (RFC 6946).
    """
    proto, at = ld8(mem, ip + 6), 40
    for _ in range(_EXTENSION_DEPTH):
        if length < at + 8:
            break
        size = 8 * (ld8(mem, ip + at + 1) + 1)
        if proto == _FRAGMENT:
            if be16(mem, ip + at + 2) & 0xFFF9:
                return -1, at
            size = 8
        elif proto == _AUTHENTICATION:
            size = 4 * (ld8(mem, ip + at + 1) + 2)      # RFC 4302 section 2.2
        elif proto not in (_HOP_BY_HOP, _ROUTING, _OPTIONS, _MOBILITY, _HIP, _SHIM6):
            break
        proto = ld8(mem, ip + at)
        at += size
    return proto, at


@inlined
def _hash6(mem, ip, length):
    """Of the IPv6 packet at `ip` (RFC 8200 section 3), 0 if it is none."""
    if length < 40 or ld8(mem, ip) >> 4 != 6:
        return 0
    total = 40 + be16(mem, ip + 4)
    if 40 < total < length:
        length = total
    proto, at = _transport6(mem, ip, length)
    ports = 0
    if proto < 0:
        proto = 0
    else:
        ports = _ports(mem, proto, ip + at, length - at)
    return symmetric_hash(be64(mem, ip + 8), be64(mem, ip + 16), be64(mem, ip + 24), be64(mem, ip + 32),
                          ports, proto)


@inlined
def flow_hash(mem, link, frame, length):
    """`symmetric_hash` of the frame of `length` bytes at `frame`, which is of link type `link`
    (`LINK_...`); fragments hash by their addresses, and what is not IP is 0."""
    kind, offset = _network(mem, link, frame, length)
    if kind == -1 or length <= offset:
        return 0
    ip, length = frame + offset, length - offset
    version = ld8(mem, ip) >> 4
    if version == 4 and kind in (_TYPE_IPV4, _ANY_VERSION):
        return _hash4(mem, ip, length)
    if version == 6 and kind in (_TYPE_IPV6, _ANY_VERSION):
        return _hash6(mem, ip, length)
    return 0


@inlined
def flow_queue(mem, link, frame, length, queues):
    """Which of `queues` queues the frame falls to, by the upper bits of its flow hash: who spreads
    what one queue got by the lower bits (reuseport groups) still gets an even spread."""
    return (flow_hash(mem, link, frame, length) * queues) >> 32
