"""Which sockets a UDP datagram goes to.

Called by demux. Unicast: the one that the lookup finds, or the member of its reuseport group that
the flow belongs to. Multicast and broadcast: every socket that matches.
"""

from __future__ import annotations

from dataplane.inet.deliver import merge, offer, record_word
from dataplane.jit import inlined, shared
from dataplane.pcb.lookup import lookup
from dataplane.pcb.reuseport import select
from dataplane.shm import layout as L
from dataplane.shm.atomics import acquire, ld32, ld64
from dataplane.wire.flow import symmetric_hash

__all__ = ["family_bit", "member", "record_length", "udp_deliver", "udp_find"]

UDP = 17


@inlined
def family_bit(mem, p):
    """KEY_FAMILY4 or KEY_FAMILY6 of the packet."""
    return L.KEY_FAMILY4 if ld64(mem, p + L.P_FAMILY) == 4 else L.KEY_FAMILY6


@inlined
def member(mem, table, p, number):
    """The socket itself, or, if it stands for a group, the member that takes this flow."""
    group = ld64(mem, ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES + L.PCB_GROUP)
    if group == 0:
        return number
    flow = symmetric_hash(ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO),
                          ld64(mem, p + L.P_TARGET_HI), ld64(mem, p + L.P_TARGET_LO),
                          ld64(mem, p + L.P_PORTS), UDP)
    return select(mem, table, group, flow)


@shared
def udp_find(mem, table, p):
    """PCB for a unicast datagram, or -1."""
    found = lookup(mem, table, UDP, family_bit(mem, p), ld64(mem, p + L.P_PORTS),
                   ld64(mem, p + L.P_TARGET_HI), ld64(mem, p + L.P_TARGET_LO),
                   ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO))
    return member(mem, table, p, found) if found >= 0 else -1


@shared
def _matches(mem, table, p, number):
    """Whether a socket on the right port takes a datagram to a group address."""
    pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
    key = ld64(mem, pcb + L.PCB_KEY)
    if (key >> 48) & family_bit(mem, p) == 0:
        return False
    cls = (key >> 40) & 0xFF
    if cls == L.CLASS_CONNECTED or cls == L.CLASS_BOUND:
        if (ld64(mem, pcb + L.PCB_LOCAL_HI) != ld64(mem, p + L.P_TARGET_HI)
                or ld64(mem, pcb + L.PCB_LOCAL_LO) != ld64(mem, p + L.P_TARGET_LO)):
            return False
    if cls == L.CLASS_CONNECTED or cls == L.CLASS_HALF:
        return ((key >> 16) & 0xFFFF == ld64(mem, p + L.P_PORTS) >> 16
                and ld64(mem, pcb + L.PCB_REMOTE_HI) == ld64(mem, p + L.P_SOURCE_HI)
                and ld64(mem, pcb + L.PCB_REMOTE_LO) == ld64(mem, p + L.P_SOURCE_LO))
    return True


@shared
def _walk(mem, w, p, mode, following, word):
    """Visits every matching socket of one chain."""
    table = ld64(mem, w + L.W_TABLE)
    pcbs = ld64(mem, table + L.T_PCBS)
    result = 0
    # SYNC chain: acquire pairs with chain_push and chain_remove.
    acquire()
    while following != 0:
        number = following - 1
        if _matches(mem, table, p, number):
            result = merge(result, offer(mem, w, number, mode, word, ld64(mem, p + L.P_TIME),
                                         ld64(mem, p + L.P_L3), record_length(mem, p)))
        following = ld64(mem, pcbs + number * L.PCB_BYTES + L.PCB_NEXT)
    return result


@inlined
def record_length(mem, p):
    """Bytes of the record: the IP packet up to the end of the UDP payload."""
    return ld64(mem, p + L.P_PAYLOAD) + ld64(mem, p + L.P_PAYLOAD_LENGTH) - ld64(mem, p + L.P_L3)


@shared
def udp_deliver(mem, w, p, mode):
    """Visits the sockets of a valid datagram: a result (deliver.py); 0 if there is none."""
    table = ld64(mem, w + L.W_TABLE)
    word = record_word(mem, p, ld64(mem, p + L.P_PAYLOAD) - ld64(mem, p + L.P_L3))
    if ld64(mem, p + L.P_FLAGS) & L.PF_MULTICAST:
        port = ld64(mem, p + L.P_PORTS) & 0xFFFF
        on_port = ld32(mem, ld64(mem, table + L.T_CHAINS) + 4 * port)
        return merge(_walk(mem, w, p, mode, on_port, word),
                     _walk(mem, w, p, mode, ld64(mem, table + L.T_ANY_CHAIN), word))
    number = udp_find(mem, table, p)
    if number < 0:
        return 0
    return offer(mem, w, number, mode, word, ld64(mem, p + L.P_TIME), ld64(mem, p + L.P_L3), record_length(mem, p))
