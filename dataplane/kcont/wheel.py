"""The timer wheel: when which PCB is to be looked at. Hierarchical, 1 ms ticks, one entry per PCB number.

Called by the continuation worker only, on its private memory; `k` is the place of its area. Insertion, removal and
expiry take constant time; an entry is moved down at most once per level on its way (Varghese and Lauck, "Hashed
and Hierarchical Timing Wheels", SOSP 1987, scheme 7).

A time is a number of LEVELS digits to the base 64. An entry lives on the level of the highest digit in which
its time differs from the wheel's own, in the slot of that digit: level 0 holds what is due within the
present 64 ms, one ms per slot.

Invariants.
 I1  The wheel's time only grows, and never beyond a slot that is not empty before that slot was emptied:
     entries of level 0 are taken, those of a higher level are put in again and land on a lower one.
 I2  So all slots in use on a level are at or behind the wheel's digit there: the lowest bit of the level's
     word is its first slot, and the lowest level in use has the earliest slot of all.
 I3  A PCB has one entry: inserting it again moves it to an earlier time, never to a later one. An entry that
     fires for nothing is harmless, so nobody has to take one out.

Floor 3.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.kcont import area as K
from dataplane.shm.atomics import ctz, ld64, st64

__all__ = ["FAR", "tick_after", "tick_at", "wheel_expire", "wheel_insert", "wheel_next", "wheel_remove"]

FAR = (1 << 6 * K.LEVELS) - 1
"""The last tick there is; also `wheel_next` of an empty wheel."""

_MS = 1_000_000


@inlined
def tick_at(ns):
    """The tick that contains this time."""
    return ns // _MS


@inlined
def tick_after(ns):
    """The first tick that is not before this time: nothing fires early."""
    return min((max(ns, 0) + _MS - 1) // _MS, FAR - 1) if ns < FAR * _MS else FAR - 1


@inlined
def _entry(mem, k, number):
    return ld64(mem, k + K.K_ENTRIES) + number * K.E_BYTES


@shared
def _link(mem, k, number, when):
    """Puts the entry into the slot where it belongs as of the wheel's time, which is at most `when`."""
    diff = (ld64(mem, k + K.K_TICK) ^ when) >> 6
    level = 0
    while diff != 0:
        diff >>= 6
        level += 1
    slot = (when >> (6 * level)) & 63
    place = k + K.K_HEADS + 8 * (64 * level + slot)
    first = ld64(mem, place)
    entry = _entry(mem, k, number)
    st64(mem, entry + K.E_NEXT, first)
    st64(mem, entry + K.E_PREVIOUS, 0)
    st64(mem, entry + K.E_WHEN, when)
    st64(mem, entry + K.E_SLOT, 64 * level + slot + 1)
    if first != 0:
        st64(mem, _entry(mem, k, first - 1) + K.E_PREVIOUS, number + 1)
    st64(mem, place, number + 1)
    st64(mem, k + K.K_BITS + 8 * level, ld64(mem, k + K.K_BITS + 8 * level) | (1 << slot))


@shared
def wheel_remove(mem, k, number):
    """Takes the PCB out, if it is in."""
    entry = _entry(mem, k, number)
    where = ld64(mem, entry + K.E_SLOT) - 1
    if where < 0:
        return
    following = ld64(mem, entry + K.E_NEXT)
    before = ld64(mem, entry + K.E_PREVIOUS)
    if following != 0:
        st64(mem, _entry(mem, k, following - 1) + K.E_PREVIOUS, before)
    if before != 0:
        st64(mem, _entry(mem, k, before - 1) + K.E_NEXT, following)
    else:
        st64(mem, k + K.K_HEADS + 8 * where, following)
        if following == 0:
            bits = k + K.K_BITS + 8 * (where >> 6)
            st64(mem, bits, ld64(mem, bits) & ~(1 << (where & 63)))
    st64(mem, entry + K.E_SLOT, 0)


@shared
def wheel_insert(mem, k, number, when):
    """PCB `number` is to be taken at tick `when` at the latest (now, if that is past)."""
    entry = _entry(mem, k, number)
    when = min(max(when, ld64(mem, k + K.K_TICK)), FAR - 1)
    if ld64(mem, entry + K.E_SLOT) != 0:
        if ld64(mem, entry + K.E_WHEN) <= when:
            return
        wheel_remove(mem, k, number)
    _link(mem, k, number, when)


@shared
def wheel_next(mem, k):
    """The tick at which there is something to do: that of the earliest entry, or an earlier one at which entries
    move down. FAR: the wheel is empty."""
    now = ld64(mem, k + K.K_TICK)
    for level in range(K.LEVELS):
        bits = ld64(mem, k + K.K_BITS + 8 * level)
        if bits != 0:
            above = 6 * (level + 1)
            return ((now >> above) << above) | (ctz(bits) << (6 * level))
    return FAR


@inlined
def _lowest(mem, k):
    """Level and slot of the earliest slot in use, as an index: there is one."""
    level = 0
    while ld64(mem, k + K.K_BITS + 8 * level) == 0:
        level += 1
    return 64 * level + ctz(ld64(mem, k + K.K_BITS + 8 * level))


@shared
def _cascade(mem, k, where):
    """Empties a slot of a higher level, whose time the wheel has just reached (I1)."""
    following = ld64(mem, k + K.K_HEADS + 8 * where)
    st64(mem, k + K.K_HEADS + 8 * where, 0)
    bits = k + K.K_BITS + 8 * (where >> 6)
    st64(mem, bits, ld64(mem, bits) & ~(1 << (where & 63)))
    while following != 0:
        number = following - 1
        entry = _entry(mem, k, number)
        following = ld64(mem, entry + K.E_NEXT)
        _link(mem, k, number, ld64(mem, entry + K.E_WHEN))


@shared
def wheel_expire(mem, k, now):
    """Takes out a PCB whose time is at tick `now` or before, the earliest one: its number, or -1."""
    at = wheel_next(mem, k)
    while at <= now:
        st64(mem, k + K.K_TICK, at)
        where = _lowest(mem, k)
        if where < 64:
            number = ld64(mem, k + K.K_HEADS + 8 * where) - 1
            wheel_remove(mem, k, number)
            return number
        _cascade(mem, k, where)
        at = wheel_next(mem, k)
    st64(mem, k + K.K_TICK, max(ld64(mem, k + K.K_TICK), now))
    return -1
