"""ARP for IPv4 over Ethernet (RFC 826, RFC 5227)."""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm.atomics import be16, be32, be64, put_be32, put_be64
from dataplane.wire.ethernet import load_mac, store_mac

__all__ = [
    "BYTES", "REPLY", "REQUEST", "build", "is_ethernet_ipv4", "operation", "sender_ip", "sender_mac",
    "target_ip", "target_mac",
]

HARDWARE = 0
PROTOCOL = 2
HARDWARE_SIZE = 4
PROTOCOL_SIZE = 5
OPERATION = 6
SENDER_MAC = 8
SENDER_IP = 14
TARGET_MAC = 18
TARGET_IP = 24
BYTES = 28

REQUEST = 1
REPLY = 2

_ETHERNET_IPV4 = 0x0001_0800_0604   # the first six bytes: Ethernet, IPv4, sizes 6 and 4


@inlined
def is_ethernet_ipv4(mem, at):
    """Whether the packet is about Ethernet and IPv4 addresses, and no others."""
    return be64(mem, at) >> 16 == _ETHERNET_IPV4


@inlined
def operation(mem, at):
    """REQUEST, REPLY or something else."""
    return be16(mem, at + OPERATION)


@inlined
def sender_mac(mem, at):
    return load_mac(mem, at + SENDER_MAC)


@inlined
def sender_ip(mem, at):
    """0 in a probe (RFC 5227 section 1.1)."""
    return be32(mem, at + SENDER_IP)


@inlined
def target_mac(mem, at):
    return load_mac(mem, at + TARGET_MAC)


@inlined
def target_ip(mem, at):
    return be32(mem, at + TARGET_IP)


@inlined
def build(mem, at, kind, mac, address, other_mac, other_address):
    """Writes the 28 bytes of a packet from (`mac`, `address`) to the other one."""
    put_be64(mem, at, (_ETHERNET_IPV4 << 16) | kind)
    store_mac(mem, at + SENDER_MAC, mac)
    put_be32(mem, at + SENDER_IP, address)
    store_mac(mem, at + TARGET_MAC, other_mac)
    put_be32(mem, at + TARGET_IP, other_address)
