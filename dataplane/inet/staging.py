"""Frames that leave in this step: made in the worker's transmit buffer, handed over in bursts.

Used by packets and discovery. Private to the worker. An IP packet is built in the room that
`tx_reserve` gives; only `tx_commit` makes a frame of it, so that a packet which turns out not to go
leaves no trace. Between the two nothing else may be staged: it would take the same room.

The buffer's upper part is not for frames: datagrams larger than an MTU are built there, and cut
into frames in the lower part.
"""

from __future__ import annotations

from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import call3, ld64, st64
from dataplane.wire import ethernet

__all__ = ["BUILD_AT", "BUILD_BYTES", "LINK_ROOM", "tx_commit", "tx_flush", "tx_offload", "tx_reserve"]

LINK_ROOM = 16          # before each packet: an Ethernet header, and the packet stays aligned
BUILD_BYTES = 67584     # the largest IPv6 packet, 65,575, and its link room
BUILD_AT = L.TX_BUFFER_BYTES - BUILD_BYTES

assert BUILD_AT > BUILD_BYTES       # a frame of the largest packet fits below, too


@shared
def _hand_over(mem, nif, first, count):
    """Gives `count` frames to the netif, which counts them as sent or dropped."""
    if ld64(mem, nif + L.N_TX) != 0:
        call3(ld64(mem, nif + L.N_TX), mem, nif, first, count)
    else:
        st64(mem, nif + L.N_TX_DROPPED, ld64(mem, nif + L.N_TX_DROPPED) + count)


@shared
def tx_flush(mem, w):
    """Transmits what is staged, by runs for the same netif; returns how many frames."""
    count = ld64(mem, w + L.W_TX_COUNT)
    burst = ld64(mem, w + L.W_TX_BURST)
    start = 0
    for i in range(1, count + 1):
        nif = ld64(mem, burst + start * L.P_BYTES + L.P_NIF)
        if i == count or ld64(mem, burst + i * L.P_BYTES + L.P_NIF) != nif:
            _hand_over(mem, nif, burst + start * L.P_BYTES, i - start)
            start = i
    st64(mem, w + L.W_TX_COUNT, 0)
    st64(mem, w + L.W_TX_USED, 0)
    return count


@shared
def tx_reserve(mem, w, size):
    """Place for an IP packet of `size` bytes (at most 65,575), with LINK_ROOM before it. What was
    staged is sent first if there is not enough room."""
    used = ld64(mem, w + L.W_TX_USED)
    if used + LINK_ROOM + size > BUILD_AT or ld64(mem, w + L.W_TX_COUNT) >= L.TX_BURST:
        tx_flush(mem, w)
        used = 0
    return ld64(mem, w + L.W_TX_BUFFER) + used + LINK_ROOM


@shared
def tx_commit(mem, w, nif, at, size, mac, kind):
    """Stages the packet at `at`, the place that `tx_reserve` gave. On Ethernet it goes to `mac` as
    EtherType `kind`; elsewhere both mean nothing."""
    frame = at
    if ld64(mem, nif + L.N_LINK) == L.LINK_ETHERNET:
        frame = at - ethernet.BYTES
        ethernet.build(mem, frame, mac, ethernet.load_mac(mem, nif + L.N_MAC), kind)
    count = ld64(mem, w + L.W_TX_COUNT)
    p = ld64(mem, w + L.W_TX_BURST) + count * L.P_BYTES
    st64(mem, p + L.P_FRAME, frame)
    st64(mem, p + L.P_LENGTH, at + size - frame)
    st64(mem, p + L.P_WIRE, at + size - frame)
    st64(mem, p + L.P_FLAGS, 0)
    st64(mem, p + L.P_NIF, nif)
    st64(mem, w + L.W_TX_COUNT, count + 1)
    used = at + size - ld64(mem, w + L.W_TX_BUFFER)
    st64(mem, w + L.W_TX_USED, (used + 15) & ~15)


@shared
def tx_offload(mem, w, family, l4, segment):
    """Leaves the checksum of the TCP header at `l4`, in the frame that was committed last, to the netif, which must
    have NF_TX_CHECKSUM; and, unless `segment` is 0, its cutting into so many bytes of data each (NF_TX_SEGMENT)."""
    p = ld64(mem, w + L.W_TX_BURST) + (ld64(mem, w + L.W_TX_COUNT) - 1) * L.P_BYTES
    st64(mem, p + L.P_FLAGS, L.PF_CHECKSUM_PARTIAL)
    st64(mem, p + L.P_FAMILY, family)
    st64(mem, p + L.P_L4, l4)
    st64(mem, p + L.P_SEGMENT, segment)
