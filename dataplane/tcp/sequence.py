"""Sequence numbers: 32 bits on the wire (RFC 9293 section 3.4), 64-bit positions everywhere else.

A position counts from the SYN, which is at 0, and never wraps. Only what reads or writes a segment converts, so
that everything behind it compares with `<`. Called by all of tcp/, and by inet for SYNs and resets.
"""

from __future__ import annotations

from dataplane.jit import inlined

__all__ = ["precedes", "unwrap", "wire"]

_WRAP = 0xFFFF_FFFF
_HALF = 0x8000_0000


@inlined
def wire(initial, position):
    """The sequence number of `position` in a stream whose SYN has the number `initial`."""
    return (initial + position) & _WRAP


@inlined
def unwrap(near, initial, number):
    """The position nearest to `near` that has the sequence number `number`: in [near - 2**31, near + 2**31).

    It is below 0 for what lies before the SYN.
    """
    return near + ((((number - initial - near) & _WRAP) ^ _HALF) - _HALF)


@inlined
def precedes(a, b):
    """Whether the 32-bit number `a` comes before `b` on the circle: sequence numbers of different connections,
    or timestamps (RFC 7323 section 5.2)."""
    return ((a - b) & _WRAP) >= _HALF and a != b
