"""Raw IP: a copy of every valid packet, whole or reassembled, for each raw socket that asked for
its protocol; a reuseport group gets one copy, on the member that the flow belongs to.

Called by demux before the transport protocols, so that what these drop still comes here.
"""

from __future__ import annotations

from dataplane.inet.deliver import merge, offer, record_word
from dataplane.jit import inlined, shared
from dataplane.pcb.reuseport import select
from dataplane.shm import layout as L
from dataplane.shm.atomics import acquire, ld64
from dataplane.wire.flow import flow_hash

__all__ = ["rip_input"]


@inlined
def _wants(mem, table, p, number, flow):
    """Whether raw socket `number` takes this packet: family, protocol, addresses where it is
    bound or connected, and, in a group, the flow."""
    pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
    key = ld64(mem, pcb + L.PCB_KEY)
    proto = (key >> 32) & 0xFF
    family = L.KEY_FAMILY4 if ld64(mem, p + L.P_FAMILY) == 4 else L.KEY_FAMILY6
    if (key >> 48) & family == 0 or (proto != 0 and proto != ld64(mem, p + L.P_PROTO)):
        return False
    hi = ld64(mem, pcb + L.PCB_LOCAL_HI)
    lo = ld64(mem, pcb + L.PCB_LOCAL_LO)
    if (hi | lo) != 0 and (hi != ld64(mem, p + L.P_TARGET_HI) or lo != ld64(mem, p + L.P_TARGET_LO)):
        return False
    hi = ld64(mem, pcb + L.PCB_REMOTE_HI)
    lo = ld64(mem, pcb + L.PCB_REMOTE_LO)
    if (hi | lo) != 0 and (hi != ld64(mem, p + L.P_SOURCE_HI) or lo != ld64(mem, p + L.P_SOURCE_LO)):
        return False
    group = ld64(mem, pcb + L.PCB_GROUP)
    return group == 0 or select(mem, table, group, flow) == number


@shared
def rip_input(mem, w, p, mode):
    """Visits the raw sockets: a result (deliver.py)."""
    table = ld64(mem, w + L.W_TABLE)
    following = ld64(mem, table + L.T_RAWS)
    if following == 0:
        return 0
    # SYNC chain: acquire pairs with chain_push and chain_remove.
    acquire()
    packet = ld64(mem, p + L.P_L3)
    length = ld64(mem, p + L.P_L3_LENGTH)
    flow = flow_hash(mem, L.LINK_RAW, packet, length)
    word = record_word(mem, p, 0)       # a raw socket's payload is the packet itself
    pcbs = ld64(mem, table + L.T_PCBS)
    result = 0
    while following != 0:
        number = following - 1
        if _wants(mem, table, p, number, flow):
            result = merge(result, offer(mem, w, number, mode, word, ld64(mem, p + L.P_TIME), packet, length))
        following = ld64(mem, pcbs + number * L.PCB_BYTES + L.PCB_NEXT)
    return result
