"""Datagrams that are being put together: where their parts lie, and who is thrown out.

Used by `fragments` only. The area is one worker's own memory, of a fixed size:

    header | tags, int64 [entries] | entries

    entry: words | bitmap of received units | bitmap of first units | headroom | 64 KiB of data

A unit is 8 bytes, what fragment offsets count (RFC 791 section 3.1). Data is written at its offset
right away, so that a datagram is whole as soon as its last hole is filled; the bitmaps say where the
holes are (RFC 815's hole list, without its pointers) and where received fragments begin, so that a
repeated fragment can be told from one that overlaps. The header of the first fragment is put into
the headroom, right before the data: the result lies in one piece.
"""

from __future__ import annotations

from dataplane import ledger
from dataplane.jit import kernel, shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import copy, fill, fold, ld64, shr, st64

__all__ = [
    "account", "area_bytes", "bits_all", "bits_any", "bits_clear", "bits_set", "claim", "discard", "entry_of",
    "find", "forget", "fragments_init",
]

# -- the area's header -------------------------------------------------------------------------
A_ENTRIES = 0
A_TIMEOUT = 8           # ns
A_NEXT = 16             # no entry's time is over before this, CLOCK_MONOTONIC ns
A_USED = 24             # entries that are not free
A_TAGS = 64             # hash of each entry's key, odd; 0: free; ALONE: never looked up
ALONE = 2

# -- entry -------------------------------------------------------------------------------------
E_STATE = 0
E_NIF = 8               # netif queue whose ledger row counts the frames
E_DEADLINE = 16
E_FRAMES = 24           # frames held here and counted in L_HELD
E_TOTAL = 32            # bytes of the fragmentable part; -1: the last fragment has not come
E_RECEIVED = 40
E_END = 48              # where the farthest fragment ends
E_HEADER = 56           # bytes of the first fragment's header; 0: it has not come
E_KEY = 64              # five words: `fragments.key`, source and target
KEY_BYTES = 40
E_NEXT = 104            # protocol of the fragmentable part
E_NEXT_AT = 112         # IPv6: where in the header the byte stands that has to say so
E_UNDO_AT = 120         # the fragment that came last, and what E_TOTAL, E_HEADER and E_END were before it
E_UNDO_SIZE = 128
E_UNDO_TOTAL = 136
E_UNDO_HEADER = 144
E_UNDO_END = 152
E_RECEIVED_BITS = 192
E_FIRST_BITS = 1216
BITS_BYTES = 1024       # 8192 units of 8 bytes
E_HEADROOM = 2240
HEADROOM = 576
E_DATA = E_HEADROOM + HEADROOM
E_BYTES = E_DATA + 65536

GATHERING, OVERLAPPED, COMPLETE = 1, 2, 3
NEVER = 0x7FFF_FFFF_FFFF_FFFF

assert E_FIRST_BITS == E_RECEIVED_BITS + BITS_BYTES and E_HEADROOM == E_FIRST_BITS + BITS_BYTES
assert E_BYTES % 64 == 0


def _entries_at(entries: int) -> int:
    return A_TAGS + -(-8 * entries // 64) * 64


def area_bytes(entries: int) -> int:
    """Size of an area for so many datagrams at a time, in bytes."""
    return _entries_at(entries) + entries * E_BYTES


@kernel("i64(mem, i64, i64, i64)")
def fragments_init(mem, area, entries, timeout_ns):
    """Makes `area_bytes(entries)` at `area` an empty area, whatever was there."""
    st64(mem, area + A_ENTRIES, entries)
    st64(mem, area + A_TIMEOUT, timeout_ns)
    st64(mem, area + A_NEXT, NEVER)
    st64(mem, area + A_USED, 0)
    fill(mem, area + A_TAGS, 0, 8 * entries)
    return 0


@shared
def entry_of(mem, area, number):
    """Place of entry `number`."""
    entries = ld64(mem, area + A_ENTRIES)
    return area + A_TAGS + ((8 * entries + 63) & ~63) + number * E_BYTES


@shared
def number_at(mem, area, place):
    """Number of the entry that `place` is in, or -1 if it is in none."""
    number = (place - entry_of(mem, area, 0)) // E_BYTES
    return number if 0 <= number < ld64(mem, area + A_ENTRIES) else -1


@shared
def account(mem, entry, reason):
    """The frames held here are held no more, and counted under `reason`."""
    row = ld64(mem, entry + E_NIF) + L.N_LEDGER
    frames = ld64(mem, entry + E_FRAMES)
    st64(mem, row + L.L_HELD, ld64(mem, row + L.L_HELD) - frames)
    place = row + L.L_REASONS + 8 * reason
    st64(mem, place, ld64(mem, place) + frames)
    st64(mem, entry + E_FRAMES, 0)


@shared
def forget(mem, area, number):
    """Frees an entry whose frames are accounted for."""
    st64(mem, area + A_TAGS + 8 * number, 0)
    st64(mem, area + A_USED, ld64(mem, area + A_USED) - 1)


@shared
def discard(mem, area, number, reason):
    """Counts the frames of an incomplete datagram under `reason` and frees the entry."""
    account(mem, entry_of(mem, area, number), reason)
    forget(mem, area, number)


@shared
def tag_of(mem, key):
    """Odd hash of the key at `key`. A collision costs a comparison: no secret is needed, since
    all tags are looked at whatever they are."""
    source = ld64(mem, key + 8) ^ ld64(mem, key + 16)
    target = ld64(mem, key + 24) + ld64(mem, key + 32)
    return fold(fold(ld64(mem, key), source ^ 0x2545F4914F6CDD1D), target ^ 0x1D872B41A9E3F135) | 1


@shared
def _same_key(mem, a, b):
    different = 0
    for word in range(0, KEY_BYTES, 8):
        different |= ld64(mem, a + word) ^ ld64(mem, b + word)
    return different == 0


@shared
def find(mem, area, key):
    """Number of the entry with this key, or -1."""
    if ld64(mem, area + A_USED) == 0:
        return -1
    tag = tag_of(mem, key)
    for number in range(ld64(mem, area + A_ENTRIES)):
        if ld64(mem, area + A_TAGS + 8 * number) == tag:
            if _same_key(mem, entry_of(mem, area, number) + E_KEY, key):
                return number
    return -1


@shared
def _oldest(mem, area):
    """Number of the incomplete datagram that began first, or -1: one that is complete waits only
    for the end of the burst."""
    oldest = -1
    earliest = NEVER
    for number in range(ld64(mem, area + A_ENTRIES)):
        entry = entry_of(mem, area, number)
        if ld64(mem, entry + E_STATE) != COMPLETE and ld64(mem, entry + E_DEADLINE) < earliest:
            earliest = ld64(mem, entry + E_DEADLINE)
            oldest = number
    return oldest


@shared
def _vacant(mem, area):
    """Number of a free entry; if there is none the oldest datagram is given up. -1: all are
    complete."""
    if ld64(mem, area + A_USED) < ld64(mem, area + A_ENTRIES):
        for number in range(ld64(mem, area + A_ENTRIES)):
            if ld64(mem, area + A_TAGS + 8 * number) == 0:
                return number
    number = _oldest(mem, area)
    if number >= 0:
        discard(mem, area, number, ledger.FRAGMENT_EVICTED)
    return number


@shared
def claim(mem, area, key, nif, now):
    """A new, empty entry for `key`: its number, or -1 if there is no memory."""
    number = _vacant(mem, area)
    if number < 0:
        return -1
    entry = entry_of(mem, area, number)
    deadline = now + ld64(mem, area + A_TIMEOUT)
    fill(mem, entry, 0, E_HEADROOM)
    copy(mem, entry + E_KEY, key, KEY_BYTES)
    st64(mem, entry + E_STATE, GATHERING)
    st64(mem, entry + E_NIF, nif)
    st64(mem, entry + E_DEADLINE, deadline)
    st64(mem, entry + E_TOTAL, -1)
    st64(mem, area + A_TAGS + 8 * number, tag_of(mem, key))
    st64(mem, area + A_USED, ld64(mem, area + A_USED) + 1)
    st64(mem, area + A_NEXT, min(ld64(mem, area + A_NEXT), deadline))
    return number


# -- bitmaps: bits first ... end - 1 of the 8192 at `bits` -------------------------------------


@shared
def _mask(word, first, end):
    """Which bits of 64-bit word `word` are among first ... end - 1; at least one is."""
    low = max(first - 64 * word, 0)
    high = min(end - 64 * word, 64)
    return (-1 << low) & shr(-1, 64 - high)


@shared
def bits_any(mem, bits, first, end):
    """Whether one of them is set."""
    if first >= end:
        return False
    found = 0
    for word in range(first >> 6, (end + 63) >> 6):
        found |= ld64(mem, bits + 8 * word) & _mask(word, first, end)
    return found != 0


@shared
def bits_all(mem, bits, first, end):
    """Whether all of them are set."""
    if first >= end:
        return True
    missing = 0
    for word in range(first >> 6, (end + 63) >> 6):
        missing |= ~ld64(mem, bits + 8 * word) & _mask(word, first, end)
    return missing == 0


@shared
def bits_set(mem, bits, first, end):
    """Sets all of them."""
    for word in range(first >> 6, (end + 63) >> 6):
        place = bits + 8 * word
        st64(mem, place, ld64(mem, place) | _mask(word, first, end))


@shared
def bits_clear(mem, bits, first, end):
    """Clears all of them."""
    for word in range(first >> 6, (end + 63) >> 6):
        place = bits + 8 * word
        st64(mem, place, ld64(mem, place) & ~_mask(word, first, end))
