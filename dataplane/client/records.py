"""What a user sees of a packet besides its bytes: the record types, without any code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["ENDPOINT", "ENDPOINT_BYTES", "PacketInfo"]

ENDPOINT = np.dtype([("family", "u2"), ("port", "u2"), ("address", "u1", (16,))])
"""Of `Batch.remote` and `Batch.local`. `family` is 4 or 6 (0: a frame), `port` 0 where there is none;
`address` is in network order, an IPv4 address in its first four bytes with zeros behind."""

ENDPOINT_BYTES = ENDPOINT.itemsize


class PacketInfo(NamedTuple):
    """What a `consume` kernel is told about a packet. All are int64; what the kernel does not use is not
    even read."""

    socket: int
    """The socket's index in the poller's list; 0 when a socket consumes by itself."""
    timestamp_ns: int
    """When it was received: nanoseconds since the epoch, by the source's clock."""
    family: int
    """4 or 6; 0 for a tap's frame, whose ports and addresses are 0 too."""
    vlan: int
    """Tag control information of the outer VLAN tag (IEEE 802.1Q); -1 without a tag, and for frames, which
    have it within."""
    remote_port: int
    local_port: int
    remote_hi: int
    """Upper 64 bits of an IPv6 address (as a signed integer); 0 for IPv4."""
    remote_lo: int
    """Lower 64 bits, or an IPv4 address."""
    local_hi: int
    local_lo: int
