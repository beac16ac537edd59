"""Reassembly of IPv4 (RFC 791 section 3.2, RFC 815) and IPv6 fragments (RFC 8200 section 4.5).

Called by ip_input with each fragment, by the worker's step to expire, and by whoever copied a
completed datagram on. All memory is the worker's own (`fragment_table`); the ledger rows are those
of the netif queues that the frames came from.

What is refused, and the reason that the ledger gives:

    a length that is no multiple of 8 before the end, or past 65,535        fragment_invalid
    a first fragment without the transport header, or an IPv4 one that      fragment_invalid
      tries to replace TCP flags (RFC 1858, RFC 3128, RFC 7112)
    a fragment that overlaps another one: the whole datagram goes, and      fragment_overlap
      what still comes of it until its time is over (RFC 5722)
    the very same fragment again: only that one goes (RFC 8200)             fragment_duplicate

RFC 5722's rule is applied to IPv4 as well: no sender overlaps its own fragments.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.inet import fragment_table as table
from dataplane.inet.fragment_table import area_bytes, fragments_init
from dataplane.jit import shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import be16, be32, be64, copy, ld8, ld64, put_be16, st8, st64
from dataplane.wire import ipv4, ipv6

__all__ = [
    "FRAGMENT_COMPLETE", "FRAGMENT_HELD", "area_bytes", "fragment_expire", "fragment_flush", "fragment_input",
    "fragment_release", "fragment_restore", "fragments_init",
]

FRAGMENT_HELD = 0
FRAGMENT_COMPLETE = 1

_TCP, _UDP, _ICMP6 = 6, 17, 58
_TCP_FIRST_MIN = 16     # RFC 1858 section 3: up to and with the flags
_CHAIN_MAX = 16         # extension headers that are followed

_GATHERING, _OVERLAPPED, _COMPLETE = table.GATHERING, table.OVERLAPPED, table.COMPLETE


# -- what a fragment says ----------------------------------------------------------------------


@shared
def _data(mem, p):
    """Place of the fragment's data."""
    start = ld64(mem, p + L.P_L4)
    return start if ld64(mem, p + L.P_FAMILY) == 4 else start + ipv6.FRAGMENT_BYTES


@shared
def _span(mem, p):
    """(offset, bytes, whether more follow)."""
    data = _data(mem, p)
    size = ld64(mem, p + L.P_L3) + ld64(mem, p + L.P_L3_LENGTH) - data
    if size < 0:
        return 0, -1, False
    if ld64(mem, p + L.P_FAMILY) == 4:
        word = ipv4.flags_and_offset(mem, ld64(mem, p + L.P_L3))
        return (word & ipv4.OFFSET_MASK) << 3, size, word & ipv4.MORE_FRAGMENTS != 0
    word = be16(mem, ld64(mem, p + L.P_L4) + ipv6.FRAGMENT_OFFSET)
    return word & ipv6.FRAGMENT_OFFSET_MASK, size, word & ipv6.FRAGMENT_MORE != 0


@shared
def _limit(family, header):
    """How long the fragmentable part may be behind `header` bytes: the length fields of both
    families end at 65,535, and IPv6's does not count its 40 bytes."""
    return 65535 - header if family == 4 else 65535 - (header - ipv6.BYTES)


@shared
def _write_key(mem, key, nif, p):
    """The five words that fragments of one datagram have in common. RFC 791 section 3.2 counts
    the protocol among them, RFC 8200 section 4.5 does not."""
    l3 = ld64(mem, p + L.P_L3)
    index = ld64(mem, nif + L.N_INDEX)
    if ld64(mem, p + L.P_FAMILY) == 4:
        identity = ipv4.identification(mem, l3)
        st64(mem, key, (identity << 32) | (index << 16) | (ipv4.protocol(mem, l3) << 8) | 4)
        st64(mem, key + 8, 0)
        st64(mem, key + 16, ipv4.source(mem, l3))
        st64(mem, key + 24, 0)
        st64(mem, key + 32, ipv4.target(mem, l3))
    else:
        identity = be32(mem, ld64(mem, p + L.P_L4) + ipv6.FRAGMENT_ID)
        st64(mem, key, (identity << 32) | (index << 16) | 6)
        for word in range(0, 32, 8):
            st64(mem, key + 8 + word, be64(mem, l3 + ipv6.SOURCE + word))


# -- what is refused before it costs memory ----------------------------------------------------


@shared
def _upper_header_bytes(proto):
    """The least that a header of this protocol takes."""
    if proto == _TCP:
        return 20
    if proto in (_UDP, _ICMP6):
        return 8
    return 0


@shared
def _holds_header_chain(mem, at, size, proto):
    """Whether the `size` bytes behind a Fragment header hold all headers up to and with the
    transport's (RFC 7112 section 5)."""
    for _ in range(_CHAIN_MAX):
        if not ipv6.is_extension(proto):
            return proto != ipv6.FRAGMENT and size >= _upper_header_bytes(proto)
        if size < 8:
            return False
        length = ipv6.extension_length(mem, at, proto)
        if length > size:
            return False
        proto = ld8(mem, at + ipv6.EXTENSION_NEXT)
        at += length
        size -= length
    return False


@shared
def _first_is_whole(mem, p, size):
    """Whether a first fragment lets a filter see what it needs to see."""
    if ld64(mem, p + L.P_FAMILY) == 4:
        return size >= _TCP_FIRST_MIN or ipv4.protocol(mem, ld64(mem, p + L.P_L3)) != _TCP
    proto = ld8(mem, ld64(mem, p + L.P_L4) + ipv6.FRAGMENT_NEXT)
    return _holds_header_chain(mem, _data(mem, p), size, proto)


@shared
def _is_valid(mem, p, offset, size, more):
    """Whether the fragment can be part of a datagram."""
    family = ld64(mem, p + L.P_FAMILY)
    l3 = ld64(mem, p + L.P_L3)
    header = ld64(mem, p + L.P_L4) - l3
    if size < 0 or header > table.HEADROOM or offset + size > _limit(family, header):
        return False
    if offset == 0 and not more:
        return True
    if size == 0 or (more and size & 7 != 0):
        return False
    if offset == 0:
        return _first_is_whole(mem, p, size)
    # RFC 3128: TCP's flags in a fragment of their own
    return not (family == 4 and offset == 8 and ipv4.protocol(mem, l3) == _TCP)


# -- what an entry knows -----------------------------------------------------------------------


@shared
def _equal(mem, a, b, size):
    """Whether two ranges hold the same bytes."""
    words = size >> 3
    different = 0
    for i in range(words):
        different |= ld64(mem, a + 8 * i) ^ ld64(mem, b + 8 * i)
    for i in range(words << 3, size):
        different |= ld8(mem, a + i) ^ ld8(mem, b + i)
    return different == 0


@shared
def _is_repeated(mem, entry, data, offset, size, more):
    """Whether a fragment with these very bounds and bytes came before."""
    first, end = offset >> 3, (offset + size + 7) >> 3
    received, firsts = entry + table.E_RECEIVED_BITS, entry + table.E_FIRST_BITS
    if more == (offset + size == ld64(mem, entry + table.E_TOTAL)):
        return False
    if not table.bits_all(mem, received, first, end):
        return False
    if not table.bits_all(mem, firsts, first, first + 1) or table.bits_any(mem, firsts, first + 1, end):
        return False
    if more and table.bits_any(mem, received, end, end + 1):
        if not table.bits_all(mem, firsts, end, end + 1):
            return False
    return _equal(mem, entry + table.E_DATA + offset, data, size)


@shared
def _objection(mem, entry, data, offset, size, more):
    """Why the fragment does not fit to those before it: a reason, or 0."""
    if ld64(mem, entry + table.E_STATE) == _OVERLAPPED:
        return ledger.FRAGMENT_OVERLAP
    if ld64(mem, entry + table.E_STATE) == _COMPLETE:
        return ledger.FRAGMENT_DUPLICATE
    received, end = entry + table.E_RECEIVED_BITS, offset + size
    if table.bits_any(mem, received, offset >> 3, (end + 7) >> 3):
        if _is_repeated(mem, entry, data, offset, size, more):
            return ledger.FRAGMENT_DUPLICATE
        return ledger.FRAGMENT_OVERLAP
    total = ld64(mem, entry + table.E_TOTAL)
    if total >= 0 and (end >= total or not more):
        return ledger.FRAGMENT_OVERLAP      # behind the end, or a second end
    if not more and ld64(mem, entry + table.E_END) > end:
        return ledger.FRAGMENT_OVERLAP      # an end before what was received
    return 0


@shared
def _keep_header(mem, entry, p):
    """Puts the first fragment's header right before the data."""
    l3 = ld64(mem, p + L.P_L3)
    header = ld64(mem, p + L.P_L4) - l3
    copy(mem, entry + table.E_DATA - header, l3, header)
    st64(mem, entry + table.E_HEADER, header)
    if ld64(mem, p + L.P_FAMILY) == 4:
        st64(mem, entry + table.E_NEXT, ipv4.protocol(mem, l3))
    else:
        st64(mem, entry + table.E_NEXT, ld8(mem, l3 + header + ipv6.FRAGMENT_NEXT))
        st64(mem, entry + table.E_NEXT_AT, ld64(mem, p + L.P_CLASS) - l3)


@shared
def _insert(mem, entry, p, offset, size, more):
    """Copies the fragment to its place, after noting how it was before (`fragment_restore`)."""
    end = offset + size
    st64(mem, entry + table.E_UNDO_AT, offset)
    st64(mem, entry + table.E_UNDO_SIZE, size)
    st64(mem, entry + table.E_UNDO_TOTAL, ld64(mem, entry + table.E_TOTAL))
    st64(mem, entry + table.E_UNDO_HEADER, ld64(mem, entry + table.E_HEADER))
    st64(mem, entry + table.E_UNDO_END, ld64(mem, entry + table.E_END))
    copy(mem, entry + table.E_DATA + offset, _data(mem, p), size)
    table.bits_set(mem, entry + table.E_RECEIVED_BITS, offset >> 3, (end + 7) >> 3)
    table.bits_set(mem, entry + table.E_FIRST_BITS, offset >> 3, (offset >> 3) + 1)
    st64(mem, entry + table.E_RECEIVED, ld64(mem, entry + table.E_RECEIVED) + size)
    st64(mem, entry + table.E_END, max(ld64(mem, entry + table.E_END), end))
    if not more:
        st64(mem, entry + table.E_TOTAL, end)
    if offset == 0:
        _keep_header(mem, entry, p)


# -- the result --------------------------------------------------------------------------------


@shared
def _mend_header(mem, entry, l3, family, length):
    """Makes the first fragment's header that of the whole packet of `length` bytes."""
    if family == 4:
        flags = ipv4.flags_and_offset(mem, l3) & ~(ipv4.MORE_FRAGMENTS | ipv4.OFFSET_MASK)
        put_be16(mem, l3 + ipv4.LENGTH, length)
        put_be16(mem, l3 + ipv4.FRAGMENT, flags)
        ipv4.seal(mem, l3)
    else:
        put_be16(mem, l3 + ipv6.PAYLOAD_LENGTH, length - ipv6.BYTES)
        st8(mem, l3 + ld64(mem, entry + table.E_NEXT_AT), ld64(mem, entry + table.E_NEXT))


@shared
def _describe(mem, entry, p):
    """Lets `p` describe the whole packet, and the frames that it stands for.

    P_FRAMES counts the frames that no socket got yet. If some of them were held, the packet has
    to be counted even if a tap got this last one: PF_DELIVERED goes.
    """
    header, total = ld64(mem, entry + table.E_HEADER), ld64(mem, entry + table.E_TOTAL)
    l3 = entry + table.E_DATA - header
    family = ld64(mem, p + L.P_FAMILY)
    _mend_header(mem, entry, l3, family, header + total)
    flags = ld64(mem, p + L.P_FLAGS) & ~(L.PF_CHECKSUM_OK | L.PF_CHECKSUM_PARTIAL)
    frames = ld64(mem, entry + table.E_FRAMES)
    if flags & L.PF_DELIVERED == 0:
        frames += 1
    elif frames > 0:
        flags &= ~L.PF_DELIVERED
    st64(mem, p + L.P_FLAGS, flags | L.PF_REASSEMBLED)
    st64(mem, p + L.P_FRAMES, frames)
    st64(mem, p + L.P_FRAME, l3)
    st64(mem, p + L.P_LENGTH, header + total)
    st64(mem, p + L.P_WIRE, header + total)
    st64(mem, p + L.P_LINK, L.LINK_RAW)
    st64(mem, p + L.P_L3, l3)
    st64(mem, p + L.P_L3_LENGTH, header + total)
    st64(mem, p + L.P_L4, l3 + header)
    st64(mem, p + L.P_PAYLOAD, l3 + header)
    st64(mem, p + L.P_PAYLOAD_LENGTH, total)
    st64(mem, p + L.P_PROTO, ld64(mem, entry + table.E_NEXT))
    st64(mem, p + L.P_CLASS, l3 + ld64(mem, entry + table.E_NEXT_AT))


@shared
def _held(mem, entry, change):
    """Adds `change` to the row's count of frames that are held."""
    place = ld64(mem, entry + table.E_NIF) + L.N_LEDGER + L.L_HELD
    st64(mem, place, ld64(mem, place) + change)


@shared
def _finish(mem, area, number, p):
    """All parts are there."""
    entry = table.entry_of(mem, area, number)
    header, total = ld64(mem, entry + table.E_HEADER), ld64(mem, entry + table.E_TOTAL)
    if total > _limit(ld64(mem, p + L.P_FAMILY), header):
        table.discard(mem, area, number, ledger.FRAGMENT_INVALID)   # the first header was longer
        return -ledger.FRAGMENT_INVALID
    st64(mem, entry + table.E_STATE, _COMPLETE)
    _held(mem, entry, -ld64(mem, entry + table.E_FRAMES))
    _describe(mem, entry, p)
    return FRAGMENT_COMPLETE


@shared
def _locate(mem, w, nif, p, alone):
    """Number of the fragment's entry, new if it is the first to come; -1: no memory.

    A packet that is its own only fragment is never mixed with others (RFC 6946 section 4): its
    entry gets a tag that no lookup finds.
    """
    area, key = ld64(mem, w + L.W_FRAGMENTS), w + L.W_SCRATCH
    _write_key(mem, key, nif, p)
    number = -1 if alone else table.find(mem, area, key)
    if number < 0:
        number = table.claim(mem, area, key, nif, ld64(mem, w + L.W_MONOTONIC))
        if alone and number >= 0:
            st64(mem, area + table.A_TAGS + 8 * number, table.ALONE)
    return number


# -- the interface -----------------------------------------------------------------------------


@shared
def fragment_input(mem, w, nif, p):
    """Takes one fragment. P_L3, P_L3_LENGTH, P_FAMILY and P_L4 are set; P_L4 is behind the IPv4
    header, or the IPv6 Fragment header, of which P_CLASS is the place of the byte that named it.

    Returns FRAGMENT_COMPLETE: `p` now describes the whole datagram; FRAGMENT_HELD; or -reason,
    under which this frame alone is to be counted.
    """
    offset, size, more = _span(mem, p)
    if not _is_valid(mem, p, offset, size, more):
        return -ledger.FRAGMENT_INVALID
    number = _locate(mem, w, nif, p, offset == 0 and not more)
    if number < 0:
        return -ledger.FRAGMENT_EVICTED
    area = ld64(mem, w + L.W_FRAGMENTS)
    entry = table.entry_of(mem, area, number)
    reason = _objection(mem, entry, _data(mem, p), offset, size, more)
    if reason != 0:
        if reason == ledger.FRAGMENT_OVERLAP:
            table.account(mem, entry, reason)
            st64(mem, entry + table.E_STATE, _OVERLAPPED)
        return -reason
    _insert(mem, entry, p, offset, size, more)
    if ld64(mem, entry + table.E_RECEIVED) == ld64(mem, entry + table.E_TOTAL):
        return _finish(mem, area, number, p)
    if ld64(mem, p + L.P_FLAGS) & L.PF_DELIVERED == 0:
        st64(mem, entry + table.E_FRAMES, ld64(mem, entry + table.E_FRAMES) + 1)
        _held(mem, entry, 1)
    return FRAGMENT_HELD


@shared
def fragment_release(mem, w, p):
    """The completed datagram was copied on or dropped: its memory is free again."""
    area = ld64(mem, w + L.W_FRAGMENTS)
    number = table.number_at(mem, area, ld64(mem, p + L.P_L3))
    if number >= 0:
        table.forget(mem, area, number)


@shared
def fragment_restore(mem, w, p):
    """Takes the last fragment out again, since its frame will be offered once more: the datagram
    is held as before. `p` is what fragment_input made of it."""
    area = ld64(mem, w + L.W_FRAGMENTS)
    number = table.number_at(mem, area, ld64(mem, p + L.P_L3))
    if number < 0:
        return
    entry = table.entry_of(mem, area, number)
    offset, size = ld64(mem, entry + table.E_UNDO_AT), ld64(mem, entry + table.E_UNDO_SIZE)
    if size == ld64(mem, entry + table.E_RECEIVED):
        table.forget(mem, area, number)
        return
    table.bits_clear(mem, entry + table.E_RECEIVED_BITS, offset >> 3, (offset + size + 7) >> 3)
    table.bits_clear(mem, entry + table.E_FIRST_BITS, offset >> 3, (offset >> 3) + 1)
    st64(mem, entry + table.E_RECEIVED, ld64(mem, entry + table.E_RECEIVED) - size)
    st64(mem, entry + table.E_TOTAL, ld64(mem, entry + table.E_UNDO_TOTAL))
    st64(mem, entry + table.E_HEADER, ld64(mem, entry + table.E_UNDO_HEADER))
    st64(mem, entry + table.E_END, ld64(mem, entry + table.E_UNDO_END))
    st64(mem, entry + table.E_STATE, _GATHERING)
    _held(mem, entry, ld64(mem, entry + table.E_FRAMES))


@shared
def _give_up(mem, area, before, reason):
    """Discards all datagrams whose time is over `before`; returns how many. A complete one is not
    counted again: its burst is over, and whoever had it has not released it."""
    count = 0
    following = table.NEVER
    for number in range(ld64(mem, area + table.A_ENTRIES)):
        if ld64(mem, area + table.A_TAGS + 8 * number) == 0:
            continue
        entry = table.entry_of(mem, area, number)
        deadline = ld64(mem, entry + table.E_DEADLINE)
        if deadline > before:
            following = min(following, deadline)
        elif ld64(mem, entry + table.E_STATE) == _COMPLETE:
            table.forget(mem, area, number)
        else:
            table.discard(mem, area, number, reason)
            count += 1
    st64(mem, area + table.A_NEXT, following)
    return count


@shared
def fragment_expire(mem, w, now):
    """Gives up the datagrams that began too long before `now`; returns how many. Cheap when
    there is none: to be called in every step."""
    area = ld64(mem, w + L.W_FRAGMENTS)
    if now < ld64(mem, area + table.A_NEXT):
        return 0
    return _give_up(mem, area, now, ledger.FRAGMENT_TIMEOUT)


@shared
def fragment_flush(mem, w):
    """The end of the run: gives up all that is incomplete; returns how many datagrams."""
    return _give_up(mem, ld64(mem, w + L.W_FRAGMENTS), table.NEVER, ledger.FRAGMENT_UNFINISHED)
