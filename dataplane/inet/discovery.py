"""Who has which address on the link: ARP (RFC 826, RFC 5227) and neighbour discovery (RFC 4861).

`arp_input` is called by demux, `nd_input` by icmp_input; lookups and questions come from packets.
Messages are answered and learned from on endpoints with an Ethernet link only, and only untagged: the
addresses that are configured are those of the untagged network, not of a VLAN's.

What is believed: a neighbour that asks us, or answers what we asked. An entry that nobody asked for
is updated, never made, by anything else (gratuitous ARP, unsolicited advertisements); and no station
can take one of our own addresses, or one that is not on the link.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.inet.addresses import can_transmit, is_broadcast, is_on_link, is_own, source_address
from dataplane.inet.neighbour_table import (
    KNOWN,
    NONE,
    neighbour_find,
    neighbour_learn,
    neighbour_read,
    neighbour_should_ask,
)
from dataplane.inet.staging import tx_commit, tx_reserve
from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import be64, ld64, put_be64, st8
from dataplane.wire import arp, ethernet, icmp, ipv4, ipv6

__all__ = [
    "FRESH", "STALE", "UNKNOWN", "arp_input", "frame_source", "nd_input", "neighbour_ask", "neighbour_lookup",
    "neighbour_resolve", "on_untagged_ethernet",
]

UNKNOWN, STALE, FRESH = 0, 1, 2
FRESH_NS = 30_000_000_000       # REACHABLE_TIME, RFC 4861 section 10: used without asking again
FORGET_NS = 120_000_000_000     # not confirmed for so long: as if it were not there

_SOLICITATION_BYTES = icmp.ND_BYTES + icmp.LINK_OPTION_BYTES


# -- looking up and asking ---------------------------------------------------------------------


@shared
def neighbour_lookup(mem, w, nif, hi, lo):
    """(MAC, FRESH | STALE | UNKNOWN) of the neighbour; an IPv4 address has hi = 0."""
    entry = neighbour_find(mem, w, nif, hi, lo)
    if entry < 0:
        return -1, UNKNOWN
    state, mac, confirmed = neighbour_read(mem, entry, nif, hi, lo)
    age = ld64(mem, w + L.W_MONOTONIC) - confirmed
    if state != KNOWN or age >= FORGET_NS:
        return -1, UNKNOWN
    return mac, (FRESH if age < FRESH_NS else STALE)


@shared
def _ask_arp(mem, w, nif, lo, mac):
    _, own = source_address(mem, nif, 4, 0, lo)
    at = tx_reserve(mem, w, arp.BYTES)
    arp.build(mem, at, arp.REQUEST, ethernet.load_mac(mem, nif + L.N_MAC), own, 0, lo)
    tx_commit(mem, w, nif, at, arp.BYTES, mac if mac >= 0 else ethernet.BROADCAST, ethernet.TYPE_ARP)


@shared
def _put_discovery(mem, nif, at, message, bits, option):
    """Writes a solicitation or advertisement behind the IPv6 header at `at`, whose addresses are
    set; its target stands there already. `option` says whose link-layer address ours is."""
    body = at + ipv6.BYTES
    ipv6.build(mem, at, _SOLICITATION_BYTES, icmp.PROTOCOL6, 255)
    icmp.build(mem, body, message, 0, bits)
    st8(mem, body + icmp.ND_BYTES, option)
    st8(mem, body + icmp.ND_BYTES + 1, 1)
    ethernet.store_mac(mem, body + icmp.ND_BYTES + 2, ethernet.load_mac(mem, nif + L.N_MAC))
    pseudo = ipv6.pseudo(mem, at, icmp.PROTOCOL6, _SOLICITATION_BYTES)
    icmp.seal(mem, body, _SOLICITATION_BYTES, pseudo)


@shared
def _put_target(mem, at, hi, lo):
    """Writes the address that a message to be built at `at` is about."""
    put_be64(mem, at + ipv6.BYTES + icmp.ND_TARGET, hi)
    put_be64(mem, at + ipv6.BYTES + icmp.ND_TARGET + 8, lo)


@shared
def _ask_nd(mem, w, nif, hi, lo, mac):
    """A neighbour solicitation (RFC 4861 section 7.2.2): to the solicited-node group, or to the
    station that had the address (section 7.3.3)."""
    own_hi, own_lo = source_address(mem, nif, 6, hi, lo)
    group_hi, group_lo = ipv6.SOLICITED_NODE_HI, ipv6.solicited_node_lo(lo)
    at = tx_reserve(mem, w, ipv6.BYTES + _SOLICITATION_BYTES)
    if mac >= 0:
        ipv6.put_addresses(mem, at, own_hi, own_lo, hi, lo)
    else:
        ipv6.put_addresses(mem, at, own_hi, own_lo, group_hi, group_lo)
        mac = ethernet.group_mac6(group_lo)
    _put_target(mem, at, hi, lo)
    _put_discovery(mem, nif, at, icmp.SOLICITATION, 0, icmp.OPTION_SOURCE_LINK)
    tx_commit(mem, w, nif, at, ipv6.BYTES + _SOLICITATION_BYTES, mac, ethernet.TYPE_IPV6)


@shared
def neighbour_ask(mem, w, nif, family, hi, lo, mac):
    """Stages a question for the neighbour, once a second at most. `mac`: the station that had the
    address (RFC 1122 section 2.3.2.1: poll it by unicast), -1 to ask everybody.

    Nothing may be reserved and not committed when this is called.
    """
    if neighbour_should_ask(mem, w, nif, hi, lo):
        if family == 4:
            _ask_arp(mem, w, nif, lo, mac)
        else:
            _ask_nd(mem, w, nif, hi, lo, mac)


@shared
def neighbour_resolve(mem, w, nif, family, hi, lo):
    """The neighbour's MAC, or -1; asks if it is not known or not sure any more."""
    mac, state = neighbour_lookup(mem, w, nif, hi, lo)
    if state != FRESH:
        neighbour_ask(mem, w, nif, family, hi, lo, mac)
    return mac


# -- what comes in -----------------------------------------------------------------------------


@shared
def on_untagged_ethernet(mem, nif, p):
    """Whether the frame came over our untagged Ethernet, where we may answer. A tag of VLAN 0 is
    a priority only (IEEE 802.1Q section 9.6)."""
    tag = ld64(mem, p + L.P_VLAN)
    return (ld64(mem, p + L.P_LINK) == L.LINK_ETHERNET and ld64(mem, nif + L.N_LINK) == L.LINK_ETHERNET
            and (tag < 0 or tag & ethernet.VID_MASK == 0) and can_transmit(mem, nif))


@shared
def frame_source(mem, p):
    """MAC of the station that sent the Ethernet frame, -1 if there is none that could be one's."""
    if ld64(mem, p + L.P_LINK) != L.LINK_ETHERNET:
        return -1
    mac = ethernet.source(mem, ld64(mem, p + L.P_FRAME))
    return mac if ethernet.is_unicast(mac) else -1


@shared
def _learn_arp(mem, w, nif, at, asked_us):
    """RFC 826, packet reception: update what is known, add who has a question for us."""
    address, mac = arp.sender_ip(mem, at), arp.sender_mac(mem, at)
    if not ethernet.is_unicast(mac) or address == 0 or ipv4.is_group(address):
        return
    if is_broadcast(mem, nif, address) or not is_on_link(mem, nif, 4, 0, address):
        return
    if not is_own(mem, nif, 4, 0, address):
        neighbour_learn(mem, w, nif, 0, address, mac, asked_us)


@shared
def arp_input(mem, w, nif, p):
    """Takes the ARP packet at P_L3: learns its sender, answers if it asks for one of our
    addresses, probes (RFC 5227 section 2.1.1) too. Returns -reason."""
    at = ld64(mem, p + L.P_L3)
    available = ld64(mem, p + L.P_FRAME) + ld64(mem, p + L.P_LENGTH) - at
    if available < arp.BYTES or not arp.is_ethernet_ipv4(mem, at):
        return -ledger.BAD_ARP
    operation = arp.operation(mem, at)
    if operation != arp.REQUEST and operation != arp.REPLY:
        return -ledger.BAD_ARP
    if not on_untagged_ethernet(mem, nif, p):
        return -ledger.ARP
    target, asker = arp.target_ip(mem, at), arp.sender_mac(mem, at)
    asks_us = operation == arp.REQUEST and is_own(mem, nif, 4, 0, target)
    _learn_arp(mem, w, nif, at, asks_us)
    if asks_us and ethernet.is_unicast(asker) and arp.sender_ip(mem, at) != target:
        mac = ethernet.load_mac(mem, nif + L.N_MAC)
        answer = tx_reserve(mem, w, arp.BYTES)
        arp.build(mem, answer, arp.REPLY, mac, target, asker, arp.sender_ip(mem, at))
        tx_commit(mem, w, nif, answer, arp.BYTES, asker, ethernet.TYPE_ARP)
    return -ledger.ARP


@shared
def _valid_discovery(mem, p, at, size):
    """RFC 4861 sections 7.1.1 and 7.1.2, as far as both kinds share it; RFC 6980 section 5: never
    in fragments."""
    if size < icmp.ND_BYTES or icmp.code(mem, at) != 0 or ld64(mem, p + L.P_FLAGS) & L.PF_REASSEMBLED:
        return False
    if ipv6.hop_limit(mem, ld64(mem, p + L.P_L3)) != 255 or ipv6.is_group(be64(mem, at + icmp.ND_TARGET)):
        return False
    return icmp.options_valid(mem, at + icmp.ND_BYTES, size - icmp.ND_BYTES)


@shared
def _link_option(mem, at, size, option):
    """The station's MAC that the message at `at` names, or -1."""
    place = icmp.find_link_option(mem, at + icmp.ND_BYTES, size - icmp.ND_BYTES, option)
    if place < 0:
        return -1
    mac = ethernet.load_mac(mem, place)
    return mac if ethernet.is_unicast(mac) else -1


@shared
def _advertise(mem, w, nif, p, target_hi, target_lo, mac):
    """Answers a solicitation (RFC 4861 section 7.2.4). One without a source is a duplicate address
    detection (RFC 4862 section 5.4.3): its answer goes to all nodes, not solicited."""
    hi, lo = ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO)
    bits = icmp.NA_SOLICITED | icmp.NA_OVERRIDE
    if ipv6.is_unspecified(hi, lo):
        hi, lo = ipv6.ALL_NODES_HI, ipv6.ALL_NODES_LO
        mac = ethernet.group_mac6(lo)
        bits = icmp.NA_OVERRIDE
    at = tx_reserve(mem, w, ipv6.BYTES + _SOLICITATION_BYTES)
    ipv6.put_addresses(mem, at, target_hi, target_lo, hi, lo)
    _put_target(mem, at, target_hi, target_lo)
    _put_discovery(mem, nif, at, icmp.ADVERTISEMENT, bits, icmp.OPTION_TARGET_LINK)
    tx_commit(mem, w, nif, at, ipv6.BYTES + _SOLICITATION_BYTES, mac, ethernet.TYPE_IPV6)


@shared
def _solicited(mem, w, nif, p, at, size):
    """A neighbour solicitation: RFC 4861 section 7.2.3."""
    hi, lo = ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO)
    mac = _link_option(mem, at, size, icmp.OPTION_SOURCE_LINK)
    target_hi, target_lo = be64(mem, at + icmp.ND_TARGET), be64(mem, at + icmp.ND_TARGET + 8)
    if ipv6.is_unspecified(hi, lo):
        group = ld64(mem, p + L.P_TARGET_HI) == ipv6.SOLICITED_NODE_HI
        if mac >= 0 or not group or ld64(mem, p + L.P_TARGET_LO) != ipv6.solicited_node_lo(target_lo):
            return -ledger.BAD_NEIGHBOUR
    if not on_untagged_ethernet(mem, nif, p) or not is_own(mem, nif, 6, target_hi, target_lo):
        return -ledger.NEIGHBOUR
    if mac >= 0 and is_on_link(mem, nif, 6, hi, lo) and not is_own(mem, nif, 6, hi, lo):
        neighbour_learn(mem, w, nif, hi, lo, mac, True)
    if mac < 0:
        mac, _ = neighbour_lookup(mem, w, nif, hi, lo)
    if mac < 0:
        mac = frame_source(mem, p)
    if mac >= 0 or ipv6.is_unspecified(hi, lo):
        _advertise(mem, w, nif, p, target_hi, target_lo, mac)
    return -ledger.NEIGHBOUR


@shared
def _advertised(mem, w, nif, p, at, size):
    """A neighbour advertisement: RFC 4861 section 7.2.5. Nothing is made that was not asked for."""
    bits = icmp.rest(mem, at)
    if ld64(mem, p + L.P_FLAGS) & L.PF_MULTICAST and bits & icmp.NA_SOLICITED:
        return -ledger.BAD_NEIGHBOUR
    hi, lo = be64(mem, at + icmp.ND_TARGET), be64(mem, at + icmp.ND_TARGET + 8)
    mac = _link_option(mem, at, size, icmp.OPTION_TARGET_LINK)
    if not on_untagged_ethernet(mem, nif, p) or is_own(mem, nif, 6, hi, lo):
        return -ledger.NEIGHBOUR
    entry = neighbour_find(mem, w, nif, hi, lo)
    if entry < 0:
        return -ledger.NEIGHBOUR
    state, known, _ = neighbour_read(mem, entry, nif, hi, lo)
    if mac < 0 and state == KNOWN:
        mac = known                 # an answer to a unicast question may leave it out
    changed = state == KNOWN and mac != known
    if mac < 0 or state == NONE or (changed and bits & icmp.NA_OVERRIDE == 0):
        return -ledger.NEIGHBOUR
    if changed or bits & icmp.NA_SOLICITED or state != KNOWN:
        neighbour_learn(mem, w, nif, hi, lo, mac, False)
    return -ledger.NEIGHBOUR


@shared
def nd_input(mem, w, nif, p):
    """Takes a neighbour discovery message at P_L4 whose checksum is right. Returns -reason.

    Router messages and redirects are counted and not followed: gateways are configured.
    """
    at = ld64(mem, p + L.P_L4)
    size = ld64(mem, p + L.P_L3) + ld64(mem, p + L.P_L3_LENGTH) - at
    message = icmp.kind(mem, at)
    if message != icmp.SOLICITATION and message != icmp.ADVERTISEMENT:
        return -ledger.NEIGHBOUR
    if not _valid_discovery(mem, p, at, size):
        return -ledger.BAD_NEIGHBOUR
    if message == icmp.SOLICITATION:
        return _solicited(mem, w, nif, p, at, size)
    return _advertised(mem, w, nif, p, at, size)
