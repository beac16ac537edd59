"""Ethernet II frames (RFC 894, RFC 2464) and their VLAN tags (IEEE 802.1Q, 802.1ad).

A MAC address is an integer of 48 bits, first byte on the wire highest.
"""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm.atomics import be16, be32, put_be16, put_be32

__all__ = [
    "BROADCAST", "GROUP_BIT", "MAC_BYTES", "TYPE_ARP", "TYPE_IPV4", "TYPE_IPV6", "TYPE_QINQ", "TYPE_QINQ_OLD",
    "TYPE_VLAN", "VID_MASK", "VLAN_BYTES", "build", "ethertype", "group_mac4", "group_mac6", "is_tag",
    "is_unicast", "load_mac", "source", "store_mac", "target",
]

TARGET = 0
SOURCE = 6
TYPE = 12
BYTES = 14
MAC_BYTES = 6

TYPE_IPV4 = 0x0800
TYPE_ARP = 0x0806
TYPE_VLAN = 0x8100      # 802.1Q
TYPE_QINQ = 0x88A8      # 802.1ad
TYPE_QINQ_OLD = 0x9100  # before 802.1ad; still seen
TYPE_IPV6 = 0x86DD

# A tag stands where the type was: tag control information, then the type that follows.
TAG_TCI = 0
TAG_TYPE = 2
VLAN_BYTES = 4
VID_MASK = 0x0FFF       # the rest of the TCI: priority:3 | drop eligible:1

BROADCAST = 0xFFFF_FFFF_FFFF
GROUP_BIT = 1 << 40     # of the first byte: the address is a group's
_GROUP4 = 0x0100_5E00_0000
_GROUP6 = 0x3333_0000_0000


@inlined
def load_mac(mem, at):
    """The address in the 6 bytes at `at`."""
    return (be32(mem, at) << 16) | be16(mem, at + 4)


@inlined
def store_mac(mem, at, mac):
    """Writes `mac` into the 6 bytes at `at`."""
    put_be32(mem, at, mac >> 16)
    put_be16(mem, at + 4, mac)


@inlined
def target(mem, frame):
    """Whom the frame is for."""
    return load_mac(mem, frame + TARGET)


@inlined
def source(mem, frame):
    """Who sent it."""
    return load_mac(mem, frame + SOURCE)


@inlined
def ethertype(mem, frame):
    """What the frame carries, or a tag's type."""
    return be16(mem, frame + TYPE)


@inlined
def is_tag(kind):
    """Whether this type announces a VLAN tag."""
    return kind in (TYPE_VLAN, TYPE_QINQ, TYPE_QINQ_OLD)


@inlined
def is_unicast(mac):
    """Whether `mac` can be one station's address."""
    return mac & GROUP_BIT == 0 and mac != 0


@inlined
def group_mac4(address):
    """Where an IPv4 group is sent: its lower 23 bits behind 01:00:5e (RFC 1112 section 6.4)."""
    return _GROUP4 | (address & 0x7F_FFFF)


@inlined
def group_mac6(low):
    """Where an IPv6 group is sent: its last four bytes behind 33:33 (RFC 2464 section 7)."""
    return _GROUP6 | (low & 0xFFFF_FFFF)


@inlined
def build(mem, frame, destination, origin, kind):
    """Writes the 14 bytes of an untagged header."""
    store_mac(mem, frame + TARGET, destination)
    store_mac(mem, frame + SOURCE, origin)
    put_be16(mem, frame + TYPE, kind)
