"""The link below: neighbours' addresses, and the packets that wait for them.

The worker's step calls `tx_retry`, demux calls `arp_input`; the messages themselves are in
`discovery`, the table that all workers share in `neighbour_table`, the waiting packets in `pending`.
"""

from __future__ import annotations

from dataplane.inet.discovery import arp_input, nd_input, neighbour_lookup, neighbour_resolve
from dataplane.inet.neighbour_table import neighbour_repair
from dataplane.inet.packets import packet_emit
from dataplane.inet.pending import (
    SLOT_HI,
    SLOT_LO,
    SLOT_NIF,
    SLOT_PACKET,
    pending_bytes,
    pending_count,
    pending_drop,
    pending_expired,
    pending_keep,
    pending_slot,
    pending_trim,
)
from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64, st64

__all__ = ["arp_input", "nd_input", "neighbour_repair", "neighbour_resolve", "pending_bytes", "tx_retry"]


@shared
def _has_gone(mem, w, slot):
    """Sends the waiting packet if its neighbour is known by now, drops it after its time."""
    nif, packet = ld64(mem, slot + SLOT_NIF), slot + SLOT_PACKET
    mac, _ = neighbour_lookup(mem, w, nif, ld64(mem, slot + SLOT_HI), ld64(mem, slot + SLOT_LO))
    if mac >= 0:
        packet_emit(mem, w, nif, packet, mac)
        return True
    if pending_expired(mem, w, slot):
        st64(mem, nif + L.N_TX_DROPPED, ld64(mem, nif + L.N_TX_DROPPED) + 1)
        return True
    return False


@shared
def tx_retry(mem, w):
    """Sends the waiting packets whose neighbours have answered, to this worker or to another one, and
    drops those that waited too long; returns how many still wait. For each step, before the
    transmit lanes are looked at, so that packets do not overtake each other."""
    count = pending_count(mem, w)
    kept = 0
    for index in range(count):
        slot = pending_slot(mem, w, index)
        if _has_gone(mem, w, slot):
            pending_drop(mem, slot)
        else:
            pending_keep(mem, w, kept, index)
            kept += 1
    if count != 0:
        pending_trim(mem, w, kept)
    return kept
