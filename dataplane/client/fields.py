"""Addresses and ports of a packet in a ring, read from its own IP header when somebody asks.

`packet` is the place of an IP packet (RFC 791 section 3.1, RFC 8200 section 3), `payload` that of its
payload; they are equal for raw sockets, whose packets have no ports here. RX workers have checked the
headers before the packet came into the ring.

A 128-bit address is two integers, hi and lo, of 64 bits; an IPv4 address is in lo.
"""

from __future__ import annotations

from dataplane.client.records import ENDPOINT_BYTES
from dataplane.jit import inlined, kernel
from dataplane.shm.atomics import be16, be32, be64, fill, ld8, put_be32, put_be64, st16

__all__ = ["endpoints", "family_of", "port_at", "source_hi", "source_lo", "target_hi", "target_lo"]

SOURCE, TARGET = 0, 1


@inlined
def family_of(mem, packet):
    """4 or 6."""
    return ld8(mem, packet) >> 4


@inlined
def source_hi(mem, packet):
    """Upper half of the source address."""
    return 0 if ld8(mem, packet) >> 4 == 4 else be64(mem, packet + 8)


@inlined
def source_lo(mem, packet):
    """Lower half of the source address."""
    return be32(mem, packet + 12) if ld8(mem, packet) >> 4 == 4 else be64(mem, packet + 16)


@inlined
def target_hi(mem, packet):
    """Upper half of the destination address."""
    return 0 if ld8(mem, packet) >> 4 == 4 else be64(mem, packet + 24)


@inlined
def target_lo(mem, packet):
    """Lower half of the destination address."""
    return be32(mem, packet + 16) if ld8(mem, packet) >> 4 == 4 else be64(mem, packet + 32)


@inlined
def port_at(mem, packet, payload, before):
    """The port `before` bytes in front of the payload: 8 the source's, 6 the destination's (RFC 768)."""
    return be16(mem, payload - before) if payload != packet else 0


@kernel("none(mem, vec, vec, i64, i64, mem)")
def endpoints(mem, packets, payloads, origin, side, out):
    """Writes one `records.ENDPOINT` per packet to `out`, of the SOURCE or the TARGET side. `packets` and
    `payloads` are offsets from `origin`."""
    for i in range(packets.size):
        packet, payload = origin + packets[i], origin + payloads[i]
        entry = i * ENDPOINT_BYTES
        fill(out, entry, 0, ENDPOINT_BYTES)
        family = family_of(mem, packet)
        st16(out, entry, family)
        st16(out, entry + 2, port_at(mem, packet, payload, 8 - 2 * side))
        if family == 4:
            put_be32(out, entry + 4, be32(mem, packet + 12 + 4 * side))
        else:
            put_be64(out, entry + 4, be64(mem, packet + 8 + 16 * side))
            put_be64(out, entry + 12, be64(mem, packet + 16 + 16 * side))
