"""TCP: header and checksum (RFC 9293 section 3.1), whose segment it is, and its way into a connection's lane.

Called by demux for packets of protocol 6, whole or reassembled, after raw sockets and taps:

    tcp_input      validates, finds the PCB
    tcp_deliver    a connection's segment: staged in its lane as it is, from the TCP header on
    tcp_stack      (tcp_listen.py) all others: handshakes, TIME_WAIT, resets

The protocol itself is not run here: whoever holds the connection's lock does that (tcp/service.py), the worker
behind the burst (tcp_service.py), the owner when it calls in, or the continuation worker, which is asked to come
KCONT_NS after the first segment that waits.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.inet.addresses import can_answer, can_transmit
from dataplane.inet.deliver import COUNT, STAGE, offer
from dataplane.jit import inlined, shared
from dataplane.kcont import kcont_schedule
from dataplane.pcb.lookup import classes_on_port, find
from dataplane.pcb.reuseport import select
from dataplane.shm import layout as L
from dataplane.shm.atomics import be32, ctz, ld8, ld64, st64
from dataplane.wire import ethernet
from dataplane.wire.checksum import finish, ones_sum, pseudo4, pseudo6
from dataplane.wire.flow import symmetric_hash

__all__ = ["KCONT_NS", "TCP", "tcp_deliver", "tcp_dirty", "tcp_input", "tcp_listener", "tcp_stage"]

TCP = 6
HEADER = 20
KCONT_NS = 100_000_000
_OFFSET = 12
_LISTENING = 1 << L.CLASS_BOUND | 1 << L.CLASS_WILDCARD


# -- is it a segment, and for us? ------------------------------------------------------------------


@inlined
def _checksum_fails(mem, p, at, length):
    """Whether the checksum says that the segment is damaged (as in udp_input; TCP's is never left out)."""
    if ld64(mem, p + L.P_FLAGS) & (L.PF_CHECKSUM_OK | L.PF_CHECKSUM_PARTIAL):
        return False
    if ld64(mem, p + L.P_FAMILY) == 4:
        pseudo = pseudo4(ld64(mem, p + L.P_SOURCE_LO), ld64(mem, p + L.P_TARGET_LO), TCP, length)
    else:
        pseudo = pseudo6(ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO),
                         ld64(mem, p + L.P_TARGET_HI), ld64(mem, p + L.P_TARGET_LO), TCP, length)
    return finish(ones_sum(mem, at, length) + pseudo) != 0


@inlined
def _has_two_ends(mem, p):
    """Whether it was sent to us alone (RFC 9293 section 3.9.2.3, RFC 1122 section 3.3.6), and in our network: our
    addresses are not those of a VLAN."""
    tag = ld64(mem, p + L.P_VLAN)
    if tag >= 0 and tag & ethernet.VID_MASK != 0:
        return False
    return ld64(mem, p + L.P_FLAGS) & (L.PF_MULTICAST | L.PF_LINK_MULTICAST | L.PF_OTHERHOST) == 0


@shared
def tcp_input(mem, w, nif, p):
    """0 and P_PORTS, P_PAYLOAD, P_PAYLOAD_LENGTH, and P_VERDICT: the PCB, or -1; or -reason.

    A segment whose sender cannot be answered has no PCB, whatever its addresses: nothing is answered on a passive
    netif, where it is not even looked at, nor to a group, nor in a VLAN. One from ourselves (the "land" attack), a
    group or nobody is MARTIAN (RFC 9293 section 3.9.2.3, MUST-63).
    """
    if not can_transmit(mem, nif):
        return -ledger.NO_SOCKET        # watched, not ours: nobody's time is spent on its checksum
    at = ld64(mem, p + L.P_L4)
    length = ld64(mem, p + L.P_L3) + ld64(mem, p + L.P_L3_LENGTH) - at
    if length < HEADER:
        return -ledger.BAD_TCP_HEADER
    header = (ld8(mem, at + _OFFSET) >> 4) * 4
    if header < HEADER or header > length:
        return -ledger.BAD_TCP_HEADER
    if _checksum_fails(mem, p, at, length):
        return -ledger.BAD_TCP_CHECKSUM
    st64(mem, p + L.P_PORTS, be32(mem, at))
    st64(mem, p + L.P_PAYLOAD, at + header)
    st64(mem, p + L.P_PAYLOAD_LENGTH, length - header)
    st64(mem, p + L.P_VERDICT, -1)
    if not _has_two_ends(mem, p):
        return 0
    if not can_answer(mem, nif, p):
        return -ledger.MARTIAN
    st64(mem, p + L.P_VERDICT, _find(mem, w, p))
    return 0


# -- whose? ----------------------------------------------------------------------------------------


@inlined
def _find_class(mem, table, p, cls):
    # P_PORTS is ours | theirs << 16, as a lookup wants it.
    family = L.KEY_FAMILY4 if ld64(mem, p + L.P_FAMILY) == 4 else L.KEY_FAMILY6
    return find(mem, table, cls, TCP, family, ld64(mem, p + L.P_PORTS), ld64(mem, p + L.P_TARGET_HI),
                ld64(mem, p + L.P_TARGET_LO), ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO))


@shared
def tcp_listener(mem, w, p):
    """The listener for a segment, or -1: bound to the address, then to any; the member of its reuseport group
    that the flow belongs to."""
    table = ld64(mem, w + L.W_TABLE)
    classes = classes_on_port(mem, table, TCP, ld64(mem, p + L.P_PORTS) & 0xFFFF) & _LISTENING
    number = -1
    while classes != 0 and number < 0:
        number = _find_class(mem, table, p, ctz(classes))
        classes &= classes - 1
    if number < 0:
        return -1
    group = ld64(mem, ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES + L.PCB_GROUP)
    if group == 0:
        return number
    flow = symmetric_hash(ld64(mem, p + L.P_SOURCE_HI), ld64(mem, p + L.P_SOURCE_LO),
                          ld64(mem, p + L.P_TARGET_HI), ld64(mem, p + L.P_TARGET_LO), ld64(mem, p + L.P_PORTS), TCP)
    return select(mem, table, group, flow)


@inlined
def _find(mem, w, p):
    """The connection, else the listener, or -1. Connections are not in the ports' class bits, which are the
    supervisor's: workers open them."""
    number = _find_class(mem, ld64(mem, w + L.W_TABLE), p, L.CLASS_CONNECTED)
    return number if number >= 0 else tcp_listener(mem, w, p)


# -- into the lane -----------------------------------------------------------------------------------


@shared
def tcp_dirty(mem, w, number):
    """Connection `number` has got its first record of this burst: the worker looks after it behind the burst
    (tcp_service.py), the continuation worker if nobody else does."""
    count = ld64(mem, w + L.W_TCP_COUNT)
    if count < L.BURST:
        st64(mem, ld64(mem, w + L.W_TCP_DIRTY) + 8 * count, number)
        st64(mem, w + L.W_TCP_COUNT, count + 1)
    kcont_schedule(mem, w, number, ld64(mem, w + L.W_MONOTONIC) + KCONT_NS)


@shared
def tcp_stage(mem, w, p, number, mode):
    """Offers the segment to connection `number`: a result (deliver.py)."""
    state = ld64(mem, w + L.W_LANES) + number * L.LS_BYTES
    first = ld64(mem, state + L.LS_HEAD) == ld64(mem, state + L.LS_PUBLISHED)
    at = ld64(mem, p + L.P_L4)
    length = ld64(mem, p + L.P_L3) + ld64(mem, p + L.P_L3_LENGTH) - at
    result = offer(mem, w, number, mode, 0, ld64(mem, p + L.P_TIME), at, length)
    if mode == STAGE and first and result & COUNT != 0:
        tcp_dirty(mem, w, number)
    return result


@inlined
def tcp_deliver(mem, w, p, mode):
    """Visits the connection that a valid segment belongs to: a result; 0 if it belongs to none."""
    number = ld64(mem, p + L.P_VERDICT)
    if number < 0:
        return 0
    pcb = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS) + number * L.PCB_BYTES
    if ld64(mem, pcb + L.PCB_KIND) != L.PK_CONNECTION:
        return 0
    return tcp_stage(mem, w, p, number, mode)
