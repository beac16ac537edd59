"""Demultiplexing: what becomes of the frames of one burst.

Called by the worker's step (step.py) with the descriptors that a netif filled. Two ways, the
same outcome:

  `input_one`    any frame, one at a time: taps, raw sockets, fragments, multicast, the stack's
                 own answers, backpressure
  `input_burst`  the common case (unicast UDP, no tap, no raw socket) in five passes over the
                 burst, each starting the memory accesses of the next: parse and hash, prefetch the
                 bucket; read its tags, prefetch PCB and lane's state; match; prefetch the ring;
                 copy. What turns out to be uncommon is passed to `input_one` in its turn, so that
                 order is kept.

Every frame ends as delivered, held in reassembly, or under one reason of the ledger.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.inet.deliver import (
    CHECK,
    COUNT,
    FULL,
    MATCHED,
    NEVER,
    STAGE,
    count_reason,
    merge,
    record_word,
    stage,
    tap_input,
)
from dataplane.inet.fragments import (
    FRAGMENT_COMPLETE,
    FRAGMENT_HELD,
    fragment_input,
    fragment_release,
    fragment_restore,
)
from dataplane.inet.icmp import icmp_input, icmp_unreachable
from dataplane.inet.ip_input import IP_FRAGMENT, IP_PACKET, NO_NEXT, ip_input, plain4
from dataplane.inet.neighbour import arp_input
from dataplane.inet.rip_input import rip_input
from dataplane.inet.tcp_input import TCP, tcp_deliver, tcp_input
from dataplane.inet.tcp_listen import tcp_handshake
from dataplane.inet.tcp_time_wait import tcp_time_wait
from dataplane.inet.tcp_transmit import tcp_refuse
from dataplane.inet.udp_deliver import UDP, family_bit, member, record_length, udp_deliver, udp_find
from dataplane.inet.udp_input import udp_input
from dataplane.jit import inlined, shared
from dataplane.pcb.lookup import class_hash, classes_on_port, key_word, likely, probe
from dataplane.rings.lane import LANE_FULL
from dataplane.shm import layout as L
from dataplane.shm.atomics import ctz, ld64, prefetch, prefetch_write, st64

__all__ = ["input_burst", "input_one"]

ICMP, IGMP, ICMP6 = 1, 2, 58

BLOCKED = 0     # input_one: a ring is full and the netif waits for it; nothing was done
TAKEN = 1

_PREFETCHED = 2048  # bytes of a record; the processor is good at more by itself
_AHEAD = 4          # packets whose records are on their way to the cache while one is copied

SLOW = -1000    # verdict: one for input_one
NOBODY = -1001  # verdict: the lookup found no socket
SEGMENT = -1002  # verdict: an IP packet with TCP, parsed


# -- one frame, any kind -------------------------------------------------------------------


@shared
def _ip_input(mem, nif, p):
    return ip_input(mem, nif, p)


@shared
def _parse(mem, w, nif, p):
    """Link, IP, reassembly: IP_PACKET, FRAGMENT_HELD (0) or -reason."""
    kind = _ip_input(mem, nif, p)
    if kind != IP_FRAGMENT:
        return kind
    vlan = ld64(mem, p + L.P_VLAN)
    kind = fragment_input(mem, w, nif, p)
    if kind != FRAGMENT_COMPLETE:
        return kind
    # The rebuilt datagram is a packet like any other, and may be as wrong as any other.
    kind = _ip_input(mem, nif, p)
    st64(mem, p + L.P_VLAN, vlan)
    return -ledger.BAD_EXTENSION_HEADER if kind == IP_FRAGMENT else kind


@shared
def _sockets(mem, w, p, verdict, mode):
    """Visits all sockets of a packet: raw, then, unless `verdict` says that it is bad, UDP's or the TCP
    connection. A result."""
    result = rip_input(mem, w, p, mode)
    if verdict == 0:
        if ld64(mem, p + L.P_PROTO) == UDP:
            result = merge(result, udp_deliver(mem, w, p, mode))
        else:
            result = merge(result, tcp_deliver(mem, w, p, mode))
    return result


@shared
def _transport(mem, w, nif, p):
    """The verdict on a packet: 0 for a sound datagram or segment, else -reason."""
    proto = ld64(mem, p + L.P_PROTO)
    if proto == UDP:
        return udp_input(mem, p)
    return tcp_input(mem, w, nif, p) if proto == TCP else -ledger.NO_SOCKET


@shared
def _tcp_stack(mem, w, nif, p):
    """A segment that is no connection's: -reason, or the result of the connection that it completed."""
    number = ld64(mem, p + L.P_VERDICT)
    if number < 0:
        tcp_refuse(mem, w, nif, p)
        return -ledger.NO_SOCKET
    kind = ld64(mem, ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_PCBS) + number * L.PCB_BYTES + L.PCB_KIND)
    if kind == L.PK_LISTEN:
        return tcp_handshake(mem, w, nif, p, number)
    if kind == L.PK_TIME_WAIT:
        return tcp_time_wait(mem, w, nif, p, number)
    return -ledger.NO_SOCKET


@shared
def _stack(mem, w, nif, p, verdict, result):
    """What the stack itself does with a packet on an endpoint; -reason in case no socket took it, or what the
    connection did that it opened. `verdict`: as of _transport; `result`: what the sockets did."""
    proto = ld64(mem, p + L.P_PROTO)
    passive = ld64(mem, nif + L.N_FLAGS) & L.NF_PASSIVE
    if proto == UDP or proto == TCP:
        if verdict < 0:
            return verdict
        if proto == TCP:
            return _tcp_stack(mem, w, nif, p)
        if result & MATCHED == 0 and not passive:
            icmp_unreachable(mem, w, nif, p, 0)
        return -ledger.NO_SOCKET
    if passive:
        return -ledger.NO_SOCKET
    family = ld64(mem, p + L.P_FAMILY)
    if (proto == ICMP and family == 4) or (proto == ICMP6 and family == 6):
        return icmp_input(mem, w, nif, p)
    if proto == IGMP and family == 4:
        return -ledger.MULTICAST_CONTROL
    # Nothing follows a header that says so: no protocol is missing (RFC 8200 section 4.7).
    nothing = proto == NO_NEXT and family == 6
    if not nothing and result & MATCHED == 0:
        icmp_unreachable(mem, w, nif, p, 1)
    return -ledger.NO_SOCKET


@shared
def _settle(mem, w, nif, p, result, reason):
    """Books the frames of a packet: delivered, or under a reason."""
    frames = ld64(mem, p + L.P_FRAMES)
    if result & COUNT != 0:
        st64(mem, w + L.W_DELIVERED, ld64(mem, w + L.W_DELIVERED) + frames)
        st64(mem, w + L.W_DELIVERIES, ld64(mem, w + L.W_DELIVERIES) + (result & COUNT))
        return
    code = -reason
    if result & FULL:
        code = ledger.PCQ_FULL
    elif result & NEVER:
        code = ledger.RING_TOO_SMALL
    count_reason(mem, nif, code, frames)


@shared
def _tap(mem, w, p, mode):
    """The taps' copies. From then on the frame counts as delivered, whatever else becomes of it."""
    result = tap_input(mem, w, p, mode)
    if result & COUNT != 0:
        st64(mem, p + L.P_FLAGS, ld64(mem, p + L.P_FLAGS) | L.PF_DELIVERED)
        st64(mem, p + L.P_FRAMES, 0)
        if mode == STAGE:
            st64(mem, w + L.W_DELIVERED, ld64(mem, w + L.W_DELIVERED) + 1)
            st64(mem, w + L.W_DELIVERIES, ld64(mem, w + L.W_DELIVERIES) + (result & COUNT))
    return result


@shared
def _patient(mem, w, nif, p):
    """A frame of a netif with backpressure: BLOCKED and nothing done if any ring lacks room."""
    # The frame as the taps want it: reassembly makes the descriptor point elsewhere.
    frame = ld64(mem, p + L.P_FRAME)
    length = ld64(mem, p + L.P_LENGTH)
    wire = ld64(mem, p + L.P_WIRE)
    tapped = _tap(mem, w, p, CHECK)
    if tapped & FULL:
        return BLOCKED
    parsed = _parse(mem, w, nif, p)
    verdict = -ledger.NO_SOCKET
    if parsed == IP_PACKET:
        verdict = _transport(mem, w, nif, p)
        if _sockets(mem, w, p, verdict, CHECK) & FULL:
            if ld64(mem, p + L.P_FLAGS) & L.PF_REASSEMBLED:
                fragment_restore(mem, w, p)
            return BLOCKED
    if tapped & COUNT != 0:
        _tap_again(mem, w, nif, p, frame, length, wire)
    return _finish(mem, w, nif, p, parsed, verdict)


@shared
def _tap_again(mem, w, nif, p, frame, length, wire):
    """Gives the taps the frame that they have room for, whatever the descriptor has become since."""
    packet = ld64(mem, p + L.P_FRAME)
    whole = ld64(mem, p + L.P_LENGTH)
    frames = ld64(mem, p + L.P_FRAMES)
    st64(mem, p + L.P_FRAME, frame)
    st64(mem, p + L.P_LENGTH, length)
    st64(mem, p + L.P_WIRE, wire)
    if _tap(mem, w, p, STAGE) & COUNT == 0:
        count_reason(mem, nif, ledger.NO_SOCKET, 1)     # they were all closed a moment ago
    st64(mem, p + L.P_FRAME, packet)
    st64(mem, p + L.P_LENGTH, whole)
    st64(mem, p + L.P_FRAMES, frames)


@shared
def _finish(mem, w, nif, p, parsed, verdict):
    """The last part of a frame's way, when nothing holds it up any more."""
    if parsed == FRAGMENT_HELD:
        return TAKEN
    if parsed == IP_PACKET:
        result = _sockets(mem, w, p, verdict, STAGE)
        reason = _stack(mem, w, nif, p, verdict, result)
        if reason >= 0:
            result = merge(result, reason)
            reason = -ledger.NO_SOCKET
        _settle(mem, w, nif, p, result, reason)
    else:
        if parsed == -ledger.ARP and not ld64(mem, nif + L.N_FLAGS) & L.NF_PASSIVE:
            parsed = arp_input(mem, w, nif, p)
        count_reason(mem, nif, -parsed, ld64(mem, p + L.P_FRAMES))
    # A rebuilt datagram that turned out to be bad has an entry to give back as well.
    if ld64(mem, p + L.P_FLAGS) & L.PF_REASSEMBLED:
        fragment_release(mem, w, p)
    return TAKEN


@shared
def input_one(mem, w, nif, p):
    """Any frame: TAKEN, or BLOCKED (only for netifs with backpressure)."""
    st64(mem, p + L.P_FRAMES, 1)
    if ld64(mem, nif + L.N_FLAGS) & L.NF_BACKPRESSURE:
        return _patient(mem, w, nif, p)
    _tap(mem, w, p, STAGE)
    parsed = _parse(mem, w, nif, p)
    verdict = _transport(mem, w, nif, p) if parsed == IP_PACKET else -ledger.NO_SOCKET
    return _finish(mem, w, nif, p, parsed, verdict)


# -- a burst of the common case ------------------------------------------------------------


@inlined
def _first_lookup(mem, table, p):
    """Hash of the first lookup that can succeed on this port, its bucket on the way to the cache;
    NOBODY if none can."""
    ports = ld64(mem, p + L.P_PORTS)
    classes = classes_on_port(mem, table, UDP, ports & 0xFFFF)
    if classes == 0:
        return NOBODY
    cls = ctz(classes)
    st64(mem, p + L.P_CLASS, classes)
    hi, lo, far_hi, far_lo = _class_addresses(mem, p, cls)
    value = class_hash(mem, table, _class_key(cls, ports), hi, lo, far_hi, far_lo)
    st64(mem, p + L.P_HASH, value)
    prefetch(mem, ld64(mem, table + L.T_BUCKET_AT) + (value & ld64(mem, table + L.T_BUCKETS)) * L.BUCKET_BYTES)
    return 0


@inlined
def _class_key(cls, ports):
    if cls == L.CLASS_ANY:
        ports = 0
    elif cls >= L.CLASS_BOUND:
        ports &= 0xFFFF
    return key_word(cls, UDP, ports)


@inlined
def _class_addresses(mem, p, cls):
    """Local hi, lo, remote hi, lo as this class of sockets is keyed by them."""
    hi = ld64(mem, p + L.P_TARGET_HI)
    lo = ld64(mem, p + L.P_TARGET_LO)
    far_hi = ld64(mem, p + L.P_SOURCE_HI)
    far_lo = ld64(mem, p + L.P_SOURCE_LO)
    if cls >= L.CLASS_BOUND:
        far_hi = far_lo = 0
    if cls == L.CLASS_HALF or cls >= L.CLASS_WILDCARD:
        hi = lo = 0
    return hi, lo, far_hi, far_lo


@inlined
def _datagram(mem, table, p):
    """A verdict on a unicast datagram of UDP: as _classify."""
    parsed = udp_input(mem, p)
    return parsed if parsed < 0 else _first_lookup(mem, table, p)


@inlined
def _classify(mem, table, nif, p):
    """First pass: 0 for a unicast datagram with a lookup under way, else a verdict."""
    if not plain4(mem, nif, p):
        return _classify_any(mem, table, nif, p)
    if ld64(mem, p + L.P_PROTO) == UDP:
        return _datagram(mem, table, p)
    return SEGMENT if ld64(mem, p + L.P_PROTO) == TCP else SLOW


@shared
def _classify_any(mem, table, nif, p):
    """The same for any frame."""
    parsed = ip_input(mem, nif, p)
    if parsed == IP_PACKET:
        if ld64(mem, p + L.P_PROTO) != UDP or ld64(mem, p + L.P_FLAGS) & L.PF_MULTICAST:
            return SEGMENT if ld64(mem, p + L.P_PROTO) == TCP else SLOW
        return _datagram(mem, table, p)
    if parsed == IP_FRAGMENT or parsed == -ledger.ARP:
        return SLOW
    return parsed


@inlined
def _match(mem, table, p):
    """Second pass: the PCB, or NOBODY."""
    classes = ld64(mem, p + L.P_CLASS)
    cls = ctz(classes)
    hi, lo, far_hi, far_lo = _class_addresses(mem, p, cls)
    key = _class_key(cls, ld64(mem, p + L.P_PORTS))
    found = probe(mem, table, ld64(mem, p + L.P_HASH), key, family_bit(mem, p), hi, lo, far_hi, far_lo)
    if found >= 0:
        return member(mem, table, p, found)
    if classes & (classes - 1) == 0:
        return NOBODY
    found = udp_find(mem, table, p)
    return found if found >= 0 else NOBODY


@inlined
def _prefetch_record(mem, state):
    """Brings on the way, for writing, the first lines of what the packet will be copied to, and the lane's head."""
    base = ld64(mem, state + L.LS_BASE)
    record = base + L.LANE_DATA + (ld64(mem, state + L.LS_HEAD) & ld64(mem, state + L.LS_MASK))
    prefetch_write(mem, record)
    prefetch_write(mem, record + 64)
    prefetch_write(mem, base + L.LANE_HEAD)


@inlined
def _prefetch_rest(mem, lanes, p):
    """The other lines of a long record. A ring is larger than a cache: without this a packet of 1500 bytes waits for
    24 lines, one after the other. A burst of them is larger than the first cache, so they come a few packets ahead."""
    length = ld64(mem, p + L.P_L3_LENGTH)
    if length <= 128 - L.RECORD_DATA or ld64(mem, p + L.P_VERDICT) < 0:
        return
    state = lanes + ld64(mem, p + L.P_VERDICT) * L.LS_BYTES
    mask = ld64(mem, state + L.LS_MASK)
    at = ld64(mem, state + L.LS_HEAD) & mask
    record = ld64(mem, state + L.LS_BASE) + L.LANE_DATA + at
    for ahead in range(128, min(length + L.RECORD_DATA, _PREFETCHED, mask + 1 - at), 64):
        prefetch_write(mem, record + ahead)


@inlined
def _deliver(mem, w, nif, p, number):
    """Last pass: into the socket's lane. BLOCKED or TAKEN."""
    state = ld64(mem, w + L.W_LANES) + number * L.LS_BYTES
    word = record_word(mem, p, ld64(mem, p + L.P_PAYLOAD) - ld64(mem, p + L.P_L3))
    done = stage(mem, w, state, word, ld64(mem, p + L.P_TIME), ld64(mem, p + L.P_L3), record_length(mem, p))
    if done == 1:
        st64(mem, w + L.W_DELIVERED, ld64(mem, w + L.W_DELIVERED) + 1)
        st64(mem, w + L.W_DELIVERIES, ld64(mem, w + L.W_DELIVERIES) + 1)
        return TAKEN
    if done == LANE_FULL and ld64(mem, nif + L.N_FLAGS) & L.NF_BACKPRESSURE:
        st64(mem, state + L.LS_DROPPED, ld64(mem, state + L.LS_DROPPED) - 1)
        return BLOCKED
    count_reason(mem, nif, ledger.PCQ_FULL if done == LANE_FULL else ledger.RING_TOO_SMALL, 1)
    return TAKEN


@inlined
def _conclude(mem, w, nif, p):
    verdict = ld64(mem, p + L.P_VERDICT)
    if verdict >= 0:
        return _deliver(mem, w, nif, p, verdict)
    if verdict == SEGMENT and not ld64(mem, nif + L.N_FLAGS) & L.NF_BACKPRESSURE:
        st64(mem, p + L.P_FRAMES, 1)
        return _finish(mem, w, nif, p, IP_PACKET, _transport(mem, w, nif, p))
    if verdict == SLOW or verdict == SEGMENT or (verdict == NOBODY and not ld64(mem, nif + L.N_FLAGS) & L.NF_PASSIVE):
        return input_one(mem, w, nif, p)
    count_reason(mem, nif, ledger.NO_SOCKET if verdict == NOBODY else -verdict, 1)
    return TAKEN


@inlined
def input_burst(mem, w, nif, count):
    """Handles the `count` descriptors of W_BURST in order; returns how many were taken (fewer only
    with backpressure: the next one found a full ring)."""
    table = ld64(mem, w + L.W_TABLE)
    burst = ld64(mem, w + L.W_BURST)
    if ld64(mem, table + L.T_TAPS) | ld64(mem, table + L.T_RAWS):
        for i in range(count):
            if input_one(mem, w, nif, burst + i * L.P_BYTES) == BLOCKED:
                return i
        return count
    for i in range(count):
        p = burst + i * L.P_BYTES
        st64(mem, p + L.P_VERDICT, _classify(mem, table, nif, p))
    lanes, pcbs = ld64(mem, w + L.W_LANES), ld64(mem, table + L.T_PCBS)
    for i in range(count):
        p = burst + i * L.P_BYTES
        if ld64(mem, p + L.P_VERDICT) == 0:
            number = likely(mem, table, ld64(mem, p + L.P_HASH))
            if number >= 0:
                prefetch(mem, pcbs + number * L.PCB_BYTES)
                prefetch_write(mem, lanes + number * L.LS_BYTES)
    for i in range(count):
        p = burst + i * L.P_BYTES
        if ld64(mem, p + L.P_VERDICT) == 0:
            st64(mem, p + L.P_VERDICT, _match(mem, table, p))
    for i in range(count):
        p = burst + i * L.P_BYTES
        if ld64(mem, p + L.P_VERDICT) >= 0:
            _prefetch_record(mem, lanes + ld64(mem, p + L.P_VERDICT) * L.LS_BYTES)
    for i in range(min(count, _AHEAD)):
        _prefetch_rest(mem, lanes, burst + i * L.P_BYTES)
    for i in range(count):
        if i + _AHEAD < count:
            _prefetch_rest(mem, lanes, burst + (i + _AHEAD) * L.P_BYTES)
        if _conclude(mem, w, nif, burst + i * L.P_BYTES) == BLOCKED:
            return i
    return count
