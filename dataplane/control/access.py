"""Who may bind what: the configuration's `[[access]]` tables applied to a peer's credentials.

Called by the supervisor for each bind. Root may everything. The owner, the user who runs the dataplane, may
everything but ports under 1024, which stay root's as they are in the kernel. All others may nothing. What
a rule allows to a user, or to one of his groups, comes on top, low ports included.
"""

from __future__ import annotations

import errno
import os
import pwd
from collections.abc import Sequence

from dataplane.config_access import AccessSettings, Rule

LOWEST_FREE_PORT = 1024     # below it: privileged, as in the kernel


def groups_of(uid: int, gid: int) -> frozenset[int]:
    """Return the groups of a user: `gid`, which its process has, and those that the system says."""
    try:
        name = pwd.getpwuid(uid).pw_name
        return frozenset({gid, *os.getgrouplist(name, gid)})
    except (KeyError, OSError):     # a number without a name, as in containers
        return frozenset({gid})


class Access:
    """The rules of one dataplane, run by the user `owner`."""

    def __init__(self, owner: int, tables: Sequence[AccessSettings]) -> None:
        self._owner = owner
        self._tables = [(table.user, table.group, table.rules) for table in tables]

    def rules(self, uid: int, gid: int) -> list[Rule]:
        """Return the rules for a user whose process has the group `gid`."""
        by_group = any(group is not None for _, group, _ in self._tables)
        groups = groups_of(uid, gid) if by_group else frozenset()
        return [rule for user, group, rules in self._tables for rule in rules
                if user == uid or (group is not None and group in groups)]

    def demand(self, uid: int, gid: int, proto: str, address: str | None = None, number: int = 0) -> None:
        """Raise PermissionError unless that user may open a socket of `proto` (udp, tcp, raw, tap) at `address`
        (None: all) and at that port or protocol number (0: all). `connect`: open a TCP connection to that
        remote address and port."""
        if uid == 0:
            return
        privileged = proto in ("udp", "tcp") and 0 < number < LOWEST_FREE_PORT
        if uid == self._owner and not privileged:
            return
        if any(rule.covers(proto, address, number) for rule in self.rules(uid, gid)):
            return
        wanted = " ".join(filter(None, (proto, address, _numbered(proto, number))))
        reason = f"ports under {LOWEST_FREE_PORT} are root's, and " if privileged else ""
        problem = f"uid {uid} may not open {wanted}: {reason}no [[access]] rule allows it"
        raise PermissionError(errno.EACCES, problem)


def _numbered(proto: str, number: int) -> str:
    if proto == "tap":
        return ""
    what = "protocol" if proto == "raw" else "port"
    return f"{what} {number}" if number else f"any {what}"
