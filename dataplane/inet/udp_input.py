"""UDP: length and checksum (RFC 768, RFC 8200 section 8.1).

Called by demux for packets of protocol 17, whole or reassembled.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.jit import inlined
from dataplane.shm import layout as L
from dataplane.shm.atomics import be16, ld64, st64
from dataplane.wire.checksum import good, ones_sum, pseudo4_at, pseudo6

__all__ = ["UDP_HEADER", "udp_input"]

UDP_HEADER = 8


@inlined
def _checksum_fails(mem, p, at, length):
    """Whether the checksum says that the datagram is damaged. Nobody computed one if a local sender
    left it to a device (PF_CHECKSUM_PARTIAL); a device that verified it is believed."""
    if ld64(mem, p + L.P_FLAGS) & (L.PF_CHECKSUM_OK | L.PF_CHECKSUM_PARTIAL):
        return False
    if ld64(mem, p + L.P_FAMILY) == 4:
        if be16(mem, at + 6) == 0:
            return False        # the sender computed none
        pseudo = pseudo4_at(mem, ld64(mem, p + L.P_L3), 17, at + 4)
    else:
        if be16(mem, at + 6) == 0:
            return True         # IPv6 requires one
        pseudo = pseudo6(ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO),
                         ld64(mem, p + L.P_TARGET_HI), ld64(mem, p + L.P_TARGET_LO), 17, length)
    return not good(ones_sum(mem, at, length) + pseudo)


@inlined
def udp_input(mem, p):
    """0 and P_PAYLOAD, P_PAYLOAD_LENGTH, P_PORTS; or -reason."""
    at = ld64(mem, p + L.P_L4)
    available = ld64(mem, p + L.P_L3) + ld64(mem, p + L.P_L3_LENGTH) - at
    if available < UDP_HEADER:
        return -ledger.BAD_UDP_LENGTH
    length = be16(mem, at + 4)
    if length < UDP_HEADER or length > available:
        return -ledger.BAD_UDP_LENGTH
    if _checksum_fails(mem, p, at, length):
        return -ledger.BAD_UDP_CHECKSUM
    st64(mem, p + L.P_PORTS, be16(mem, at) << 16 | be16(mem, at + 2))
    st64(mem, p + L.P_PAYLOAD, at + UDP_HEADER)
    st64(mem, p + L.P_PAYLOAD_LENGTH, length - UDP_HEADER)
    return 0
