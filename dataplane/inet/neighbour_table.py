"""Which link-layer address a neighbour has: a table that all workers share.

Used by discovery. An answer may come to another worker than the one that asked, so the table
lies in the table segment. A reader writes nothing and never waits: it takes an entry if its
version was even and the same before and after. A writer takes the entry's lock if it is free, and
otherwise drops the update: addresses are learned again and again.

An entry is found by hash in one of PROBES places. New ones push out, in this order: nobody, one
that was asked for and never answered, the one that was confirmed longest ago.
"""

from __future__ import annotations

from dataplane.jit import kernel, shared
from dataplane.shm import layout as L
from dataplane.shm.atomics import fold, ld64, load_acquire, st64, store_release
from dataplane.shm.lock import recover, try_lock, unlock

__all__ = [
    "ASKED", "KNOWN", "NONE", "neighbour_find", "neighbour_learn", "neighbour_read", "neighbour_repair",
    "neighbour_should_ask",
]

NONE, ASKED, KNOWN = 0, 1, 2
PROBES = 8
ASK_INTERVAL_NS = 1_000_000_000     # RETRANS_TIMER, RFC 4861 section 10
_READS = 8
_STATE_BITS = 8                     # NB_STATE: state:8 | when it was last asked for, CLOCK_MONOTONIC µs
_NS_PER_US = 1000


@shared
def _place(mem, w, nif, hi, lo, probe):
    """Place of the entry where the neighbour may be, probe 0 ... PROBES - 1."""
    table = ld64(mem, w + L.W_TABLE)
    number = fold(hi ^ 0x2545F4914F6CDD1D, lo ^ 0x1D872B41A9E3F135 ^ (ld64(mem, nif + L.N_INDEX) << 40))
    slot = (number + probe) & ld64(mem, table + L.T_NEIGHBOUR_MASK)
    return ld64(mem, table + L.T_NEIGHBOURS) + slot * L.NB_BYTES


@shared
def _is_for(mem, entry, nif, hi, lo):
    return (ld64(mem, entry + L.NB_NIF) == ld64(mem, nif + L.N_INDEX) + 1
            and ld64(mem, entry + L.NB_HI) == hi and ld64(mem, entry + L.NB_LO) == lo)


@shared
def neighbour_find(mem, w, nif, hi, lo):
    """The neighbour's entry, or -1. Only a hint until it is read or locked."""
    for probe in range(PROBES):
        entry = _place(mem, w, nif, hi, lo, probe)
        if _is_for(mem, entry, nif, hi, lo):
            return entry
    return -1


@shared
def neighbour_read(mem, entry, nif, hi, lo):
    """(state, MAC, CLOCK_MONOTONIC ns of the last confirmation); NONE if the entry is another's."""
    for _ in range(_READS):
        # SYNC neighbour-version: acquire, pairs with the releases in _open and _close; else the fields
        # could be read before the version. The fields' own loads are acquires, so that the second
        # load of the version stays behind them.
        before = load_acquire(mem, entry + L.NB_VERSION)
        state = load_acquire(mem, entry + L.NB_STATE) & ((1 << _STATE_BITS) - 1)
        mac = load_acquire(mem, entry + L.NB_MAC)
        time = load_acquire(mem, entry + L.NB_TIME)
        same = (load_acquire(mem, entry + L.NB_NIF) == ld64(mem, nif + L.N_INDEX) + 1
                and load_acquire(mem, entry + L.NB_HI) == hi and load_acquire(mem, entry + L.NB_LO) == lo)
        if before & 1 == 0 and load_acquire(mem, entry + L.NB_VERSION) == before:
            return (state if same else NONE), mac, time
    return NONE, 0, 0


@shared
def _open(mem, entry):
    """Makes the version odd: readers turn away. The lock is held."""
    # SYNC neighbour-version: the fields' stores are releases, so none of them moves before this one; pairs
    # with the acquires in neighbour_read; else a reader could take new fields under an old version.
    store_release(mem, entry + L.NB_VERSION, ld64(mem, entry + L.NB_VERSION) + 1)


@shared
def _close(mem, entry):
    """Makes the version even again."""
    # SYNC neighbour-version: release, pairs with the acquires in neighbour_read; else a reader could see
    # the new version with old fields.
    store_release(mem, entry + L.NB_VERSION, ld64(mem, entry + L.NB_VERSION) + 1)


@shared
def _name(mem, entry, nif, hi, lo):
    """Makes the entry this neighbour's, about whom nothing is known."""
    # SYNC neighbour-version: releases, so that each stays behind _open's; pairs with the acquires in
    # neighbour_read; else a reader could take these fields under the old version.
    store_release(mem, entry + L.NB_NIF, ld64(mem, nif + L.N_INDEX) + 1)
    store_release(mem, entry + L.NB_HI, hi)
    store_release(mem, entry + L.NB_LO, lo)
    store_release(mem, entry + L.NB_STATE, NONE)


@shared
def _worth(mem, entry):
    """What would be lost with the entry: the lowest is pushed out."""
    if ld64(mem, entry + L.NB_NIF) == 0:
        return -1
    if ld64(mem, entry + L.NB_STATE) & ((1 << _STATE_BITS) - 1) != KNOWN:
        return 0
    return max(ld64(mem, entry + L.NB_TIME), 1)


@shared
def _victim(mem, w, nif, hi, lo):
    """The entry to give to a new neighbour."""
    victim = _place(mem, w, nif, hi, lo, 0)
    for probe in range(1, PROBES):
        entry = _place(mem, w, nif, hi, lo, probe)
        if _worth(mem, entry) < _worth(mem, victim):
            victim = entry
    return victim


@shared
def _lock(mem, w, nif, hi, lo, create):
    """The neighbour's entry, locked, its version odd; -1 if there is none or somebody holds it."""
    entry = neighbour_find(mem, w, nif, hi, lo)
    if entry < 0 and not create:
        return -1
    fresh = entry < 0
    if fresh:
        entry = _victim(mem, w, nif, hi, lo)
    if try_lock(mem, entry + L.NB_LOCK, ld64(mem, w + L.W_STAMP)) == 0:
        return -1
    if not fresh and not _is_for(mem, entry, nif, hi, lo):
        unlock(mem, entry + L.NB_LOCK, ld64(mem, w + L.W_STAMP))    # it was pushed out meanwhile
        return -1
    _open(mem, entry)
    if fresh:
        _name(mem, entry, nif, hi, lo)
    return entry


@shared
def _unlock(mem, w, entry):
    _close(mem, entry)
    unlock(mem, entry + L.NB_LOCK, ld64(mem, w + L.W_STAMP))


@shared
def neighbour_learn(mem, w, nif, hi, lo, mac, create):
    """The neighbour is there and has this MAC. Without `create` only one that is in the table is
    updated, so that nobody fills it with what was never asked for. 1 if it was written."""
    entry = _lock(mem, w, nif, hi, lo, create)
    if entry < 0:
        return 0
    # SYNC neighbour-version: releases, as in _name.
    store_release(mem, entry + L.NB_MAC, mac)
    store_release(mem, entry + L.NB_TIME, ld64(mem, w + L.W_MONOTONIC))
    state = ld64(mem, entry + L.NB_STATE) >> _STATE_BITS << _STATE_BITS
    store_release(mem, entry + L.NB_STATE, state | KNOWN)
    _unlock(mem, w, entry)
    return 1


@shared
def neighbour_should_ask(mem, w, nif, hi, lo):
    """1 if the neighbour was not asked for in the last second, and notes that it is being asked for
    now. What cannot be noted is not asked: the limit of RFC 1122 section 2.3.2.1 holds always."""
    entry = neighbour_find(mem, w, nif, hi, lo)
    now = ld64(mem, w + L.W_MONOTONIC)
    if entry >= 0 and now - _asked_at(mem, entry) < ASK_INTERVAL_NS:
        return 0
    entry = _lock(mem, w, nif, hi, lo, True)
    if entry < 0:
        return 0
    permitted = now - _asked_at(mem, entry) >= ASK_INTERVAL_NS
    if permitted:
        state = max(ld64(mem, entry + L.NB_STATE) & ((1 << _STATE_BITS) - 1), ASKED)
        # SYNC neighbour-version: release, as in _name.
        store_release(mem, entry + L.NB_STATE, (now // _NS_PER_US) << _STATE_BITS | state)
    _unlock(mem, w, entry)
    return 1 if permitted else 0


@shared
def _asked_at(mem, entry):
    """When the entry's neighbour was last asked for, ns; long ago if never."""
    asked = ld64(mem, entry + L.NB_STATE) >> _STATE_BITS
    return asked * _NS_PER_US if asked != 0 else -ASK_INTERVAL_NS


@kernel("i64(mem, i64, i64, i64)")
def neighbour_repair(mem, table, dead_stamp, stamp):
    """Empties the entries that a dead worker held locked; returns how many. For the supervisor,
    with a stamp of its own, before the worker is replaced."""
    repaired = 0
    for slot in range(ld64(mem, table + L.T_NEIGHBOUR_MASK) + 1):
        entry = ld64(mem, table + L.T_NEIGHBOURS) + slot * L.NB_BYTES
        if recover(mem, entry + L.NB_LOCK, dead_stamp, stamp):
            if ld64(mem, entry + L.NB_VERSION) & 1 == 0:
                _open(mem, entry)
            # SYNC neighbour-version: releases, as in _name.
            store_release(mem, entry + L.NB_NIF, 0)
            store_release(mem, entry + L.NB_STATE, NONE)
            st64(mem, entry + L.NB_TIME, 0)
            _close(mem, entry)
            unlock(mem, entry + L.NB_LOCK, stamp)
            repaired += 1
    return repaired
