"""Reassembly, slow and obviously right: the oracle of test_fragments.

A fragment is (offset, data, more). A datagram is the list of those that came.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Fragment = tuple[int, bytes, bool]


@dataclass
class Datagram:
    """What came under one key so far."""

    limit: int
    fragments: list[Fragment] = field(default_factory=list)
    poisoned: bool = False

    def add(self, fragment: Fragment) -> str | bytes:
        """`held`, a reason of the ledger, or the bytes of the whole."""
        offset, data, more = fragment
        if not data or (more and len(data) % 8) or offset + len(data) > self.limit:
            return "fragment_invalid"
        if self.poisoned:
            return "fragment_overlap"
        if fragment in self.fragments:
            return "fragment_duplicate"
        if self._collides(fragment):
            self.poisoned = True
            return "fragment_overlap"
        self.fragments.append(fragment)
        return self._whole() or "held"

    def _collides(self, fragment: Fragment) -> bool:
        taken = {unit for one in self.fragments for unit in _units(one)}
        if taken & set(_units(fragment)):
            return True
        ends = [offset + len(data) for offset, data, more in [*self.fragments, fragment] if not more]
        farthest = max(offset + len(data) for offset, data, _ in [*self.fragments, fragment])
        inner = any(offset + len(data) >= ends[0] for offset, data, more in [*self.fragments, fragment]
                    if more) if ends else False
        return len(ends) > 1 or (bool(ends) and farthest > ends[0]) or inner

    def _whole(self) -> bytes | None:
        ordered = sorted(self.fragments)
        whole = b""
        for offset, data, _ in ordered:
            if offset != len(whole):
                return None
            whole += data
        return whole if not ordered[-1][2] else None


def _units(fragment: Fragment) -> range:
    offset, data, _ = fragment
    return range(offset // 8, (offset + len(data) + 7) // 8)
