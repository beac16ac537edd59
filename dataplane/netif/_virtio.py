"""The virtio-net header (linux/virtio_net.h), with which the kernel and we tell each other what of a frame is left
to do: its checksum, and its cutting into segments. Used by the netifs that have one (TUN, TAP, AF_PACKET).

    flags:8 | what kind of segments:8 | bytes of all headers:16 | data of a segment:16
    | place of the transport header:16 | place of the checksum in it:16 | unused:16
"""

from __future__ import annotations

from dataplane.jit import inlined
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld8, ld64, st32, st64

__all__ = ["NEEDS_CSUM", "put_header"]

SHORT_BYTES, BYTES = 10, 12     # without the last two, which mean nothing here; with them
NEEDS_CSUM, DATA_VALID = 1, 2
TCPV4, TCPV6 = 1, 4

_TCP_OFFSET = 12                # RFC 9293 section 3.1: header length:4 | ...
_TCP_CHECKSUM = 16


@inlined
def put_header(mem, at, p):
    """Writes the header of the frame that the descriptor `p` tells to transmit: 12 bytes at `at`. One whose
    checksum is left to us (PF_CHECKSUM_PARTIAL) is TCP; with P_SEGMENT, the kernel cuts it, or has it cut."""
    if ld64(mem, p + L.P_FLAGS) & L.PF_CHECKSUM_PARTIAL == 0:
        st64(mem, at, 0)
        st32(mem, at + 8, 0)
        return
    tcp = ld64(mem, p + L.P_L4)
    start = tcp - ld64(mem, p + L.P_FRAME)
    word = NEEDS_CSUM | start << 48
    segment = ld64(mem, p + L.P_SEGMENT)
    if segment != 0:
        kind = TCPV4 if ld64(mem, p + L.P_FAMILY) == 4 else TCPV6
        headers = start + (ld8(mem, tcp + _TCP_OFFSET) >> 4 << 2)
        word |= kind << 8 | headers << 16 | segment << 32
    st64(mem, at, word)
    st32(mem, at + 8, _TCP_CHECKSUM)
