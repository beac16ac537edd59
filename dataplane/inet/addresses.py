"""Our own addresses, and where a packet for another one goes.

Used by output, packets, icmp, tcp_transmit and discovery. Reads the netif queues' settings only, which the
supervisor wrote before the workers started. A passive netif has no part in any of it: nothing is ever sent there.

Routing is that of a host (RFC 1122 section 3.3.1): on-link by the longest prefix over all netifs'
addresses, else a gateway.
"""

from __future__ import annotations

from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64
from dataplane.wire import ethernet, ipv4, ipv6

__all__ = [
    "can_answer", "can_transmit", "is_broadcast", "is_group", "is_on_link", "is_own", "is_ours", "next_hop", "route",
    "source_address",
]


@shared
def can_transmit(mem, nif):
    """Whether anything may be sent there."""
    return (ld64(mem, nif + L.N_FLAGS) & L.NF_PASSIVE == 0 and ld64(mem, nif + L.N_TX) != 0
            and ld64(mem, nif + L.N_STATUS) == L.NS_RUNNING)


@shared
def _address(nif, index):
    """Place of the netif's address number `index`."""
    return nif + L.N_ADDRESSES + index * L.ADDRESS_BYTES


@shared
def _upper_bits(count):
    """The upper `count` of 64 bits, 0 ... 64."""
    return -1 << (64 - count) if count > 0 else 0


@shared
def _is_in_prefix(mem, address, family, hi, lo):
    """Whether (hi, lo) is in the subnet of the address entry at `address`."""
    if ld64(mem, address + L.ADDRESS_FAMILY) != family:
        return False
    bits = ld64(mem, address + L.ADDRESS_PREFIX)
    low = lo ^ ld64(mem, address + L.ADDRESS_LO)
    if family == 4:
        return low & _upper_bits(bits + 32) == 0
    high = hi ^ ld64(mem, address + L.ADDRESS_HI)
    return high & _upper_bits(min(bits, 64)) == 0 and low & _upper_bits(max(bits - 64, 0)) == 0


@shared
def _matched_bits(mem, nif, family, hi, lo):
    """Length of the longest of the netif's prefixes that hold the address; -1: none does."""
    longest = -1
    for index in range(ld64(mem, nif + L.N_ADDRESS_COUNT)):
        address = _address(nif, index)
        if _is_in_prefix(mem, address, family, hi, lo):
            longest = max(longest, ld64(mem, address + L.ADDRESS_PREFIX))
    return longest


@shared
def _has_family(mem, nif, family):
    for index in range(ld64(mem, nif + L.N_ADDRESS_COUNT)):
        if ld64(mem, _address(nif, index) + L.ADDRESS_FAMILY) == family:
            return True
    return False


@shared
def is_own(mem, nif, family, hi, lo):
    """Whether it is one of this netif's addresses."""
    for index in range(ld64(mem, nif + L.N_ADDRESS_COUNT)):
        address = _address(nif, index)
        if ld64(mem, address + L.ADDRESS_FAMILY) == family and ld64(mem, address + L.ADDRESS_LO) == lo:
            if family == 4 or ld64(mem, address + L.ADDRESS_HI) == hi:
                return True
    return False


@shared
def is_ours(mem, w, family, hi, lo):
    """Whether it is an address of one of our netifs that transmit."""
    for index in range(ld64(mem, w + L.W_NIF_COUNT)):
        nif = ld64(mem, w + L.W_NIF + 8 * index)
        if can_transmit(mem, nif) and is_own(mem, nif, family, hi, lo):
            return True
    return False


@shared
def is_group(family, hi, lo):
    """Whether it is a multicast address."""
    return ipv4.is_group(lo) if family == 4 else ipv6.is_group(hi)


@shared
def is_broadcast(mem, nif, lo):
    """Whether the IPv4 address means everybody on this netif's link: all ones, or all ones in the
    host part (RFC 1122 section 3.2.1.3). A /31 has no such address (RFC 3021)."""
    if lo == ipv4.BROADCAST:
        return True
    for index in range(ld64(mem, nif + L.N_ADDRESS_COUNT)):
        address = _address(nif, index)
        bits = ld64(mem, address + L.ADDRESS_PREFIX)
        if ld64(mem, address + L.ADDRESS_FAMILY) == 4 and bits < 31:
            if lo == ld64(mem, address + L.ADDRESS_LO) | ((1 << (32 - bits)) - 1):
                return True
    return False


@shared
def is_on_link(mem, nif, family, hi, lo):
    """Whether the address can be a neighbour there."""
    if family == 6 and ipv6.is_link_local(hi):
        return True
    return _matched_bits(mem, nif, family, hi, lo) >= 0


@shared
def _has_gateway(mem, nif, family):
    if family == 4:
        return ld64(mem, nif + L.N_GATEWAY4) != 0
    return ld64(mem, nif + L.N_GATEWAY6_HI) | ld64(mem, nif + L.N_GATEWAY6_LO) != 0


@shared
def _rank(mem, nif, family, hi, lo):
    """How well the netif leads to the address: its prefix length, -1 for a gateway, -2 not at all.

    Groups and IPv6 link-local addresses are on every link: any netif of the family will do.
    """
    if not can_transmit(mem, nif) or not _has_family(mem, nif, family):
        return -2
    bits = _matched_bits(mem, nif, family, hi, lo)
    if bits >= 0:
        return bits
    if is_group(family, hi, lo) or (family == 6 and ipv6.is_link_local(hi)):
        return 0
    if family == 4 and lo == ipv4.BROADCAST:
        return 0
    return -1 if _has_gateway(mem, nif, family) else -2


@shared
def route(mem, w, family, hi, lo):
    """The netif queue of this worker through which the address is reached, or -1."""
    best = -1
    best_rank = -2
    for index in range(ld64(mem, w + L.W_NIF_COUNT)):
        nif = ld64(mem, w + L.W_NIF + 8 * index)
        rank = _rank(mem, nif, family, hi, lo)
        if rank > best_rank:
            best = nif
            best_rank = rank
    return best


@shared
def next_hop(mem, nif, family, hi, lo):
    """(hi, lo) of the neighbour to whom a packet for the address is given."""
    if is_on_link(mem, nif, family, hi, lo) or not _has_gateway(mem, nif, family):
        return hi, lo
    if family == 4:
        return 0, ld64(mem, nif + L.N_GATEWAY4)
    return ld64(mem, nif + L.N_GATEWAY6_HI), ld64(mem, nif + L.N_GATEWAY6_LO)


@shared
def _stays_on_link(family, hi):
    """Whether an IPv6 destination has link-local scope (RFC 4291 section 2.7, RFC 4007)."""
    return family == 6 and (ipv6.is_link_local(hi) or (ipv6.is_group(hi) and (hi >> 48) & 15 <= 2))


@shared
def source_address(mem, nif, family, hi, lo):
    """(hi, lo) of the netif's address from which to send to the given one; (0, 0): it has none.

    First the right scope, then the longest prefix in common, then the first configured: the rules
    2 and 8 of RFC 6724 section 5, which are all that can differ here.
    """
    best = -1
    best_rank = -1000
    near = _stays_on_link(family, hi)
    for index in range(ld64(mem, nif + L.N_ADDRESS_COUNT)):
        address = _address(nif, index)
        if ld64(mem, address + L.ADDRESS_FAMILY) != family:
            continue
        rank = 0
        if _is_in_prefix(mem, address, family, hi, lo):
            rank = ld64(mem, address + L.ADDRESS_PREFIX) + 1
        if family == 6 and ipv6.is_link_local(ld64(mem, address + L.ADDRESS_HI)) != near:
            rank -= 200
        if rank > best_rank:
            best = address
            best_rank = rank
    if best < 0:
        return 0, 0
    return ld64(mem, best + L.ADDRESS_HI), ld64(mem, best + L.ADDRESS_LO)


@shared
def can_answer(mem, nif, p):
    """Whether the sender of packet `p` is one host that an answer can reach: not a group, a broadcast address, an
    unspecified one or ourselves (RFC 1122 section 3.2.2, RFC 4443 section 2.4 e 6)."""
    family = ld64(mem, p + L.P_FAMILY)
    hi, lo = ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO)
    tag = ld64(mem, p + L.P_VLAN)
    if not can_transmit(mem, nif) or (tag >= 0 and tag & ethernet.VID_MASK != 0):
        return False
    if hi | lo == 0 or is_group(family, hi, lo) or is_own(mem, nif, family, hi, lo):
        return False
    if family == 4:
        return not is_broadcast(mem, nif, lo) and not ipv4.is_loopback(lo)
    return not ipv6.is_loopback(hi, lo)
