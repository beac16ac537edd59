"""Who may open which sockets: the `[[access]]` tables of the configuration and the rules in them.

Floor 1. `dataplane.config` reads the tables; the control server asks the rules.
"""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from dataplane.config_schema import Table


class Rule(msgspec.Struct, frozen=True):
    """One permission: `low` to `high` are ports or raw sockets' protocol numbers; `address` None is any."""

    proto: Literal["udp", "tcp", "connect", "raw", "tap", "*"]
    address: str | None = None
    low: int = 0
    high: int = 65535

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `udp:5000-6000`, `udp:10.0.0.1:53`, `udp:[fd77::1]:53`, `tcp:*`, `connect:80`, `raw:1`, `tap` or
        `*`."""
        if text == "*":
            return cls("*")
        if text == "tap":
            return cls("tap", None, 0, 0)
        match = _RULE.fullmatch(text)
        if match is None:
            raise ValueError("not a rule")
        proto, most = match["proto"], 65535 if match["proto"] != "raw" else 255
        quoted = match["four"] or match["six"]
        address = str(ipaddress.ip_address(quoted)) if quoted else None
        if (proto == "raw" and address) or (match["six"] and ":" not in match["six"]):
            raise ValueError("no such address here")
        if match["any"]:
            return cls(proto, address, 0, most)  # type: ignore[arg-type]  # the pattern has the same words
        low, high = int(match["low"]), int(match["high"] or match["low"])
        if not 1 <= low <= high <= most:
            raise ValueError("not a range of numbers")
        return cls(proto, address, low, high)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return what `parse` reads."""
        if self.proto in ("*", "tap"):
            return self.proto
        address = self.address or ""
        if ":" in address:
            address = f"[{address}]"
        numbers = f"{self.low}-{self.high}"
        if self.low in (0, self.high):
            numbers = "*" if self.low == 0 else str(self.low)
        return ":".join(part for part in (self.proto, address, numbers) if part)

    def covers(self, proto: str, address: str | None = None, number: int = 0) -> bool:
        """Tell whether this permits a socket of `proto` at `address`, at that port or protocol number."""
        if self.proto == "*":
            return True
        if self.proto != proto or not self.low <= number <= self.high:
            return False
        if self.address is None:
            return True
        return address is not None and ipaddress.ip_address(address) == ipaddress.ip_address(self.address)


_RULE = re.compile(
    r"(?P<proto>udp|tcp|connect|raw):"
    r"(?:(?:(?P<four>[0-9.]{7,15})|\[(?P<six>[0-9A-Fa-f:.]+)\]):)?"
    r"(?:(?P<any>\*)|(?P<low>[0-9]{1,5})(?:-(?P<high>[0-9]{1,5}))?)"
)


def _user(word: str) -> int:
    """Return the number of a user given by name; `owner` is who runs the dataplane."""
    return os.geteuid() if word == "owner" else _number(pwd.getpwnam, word).pw_uid


def _group(word: str) -> int:
    """Return the number of a group given by name."""
    return _number(grp.getgrnam, word).gr_gid


def _number(look_up: Any, word: str) -> Any:
    try:
        return look_up(word)
    except (KeyError, UnicodeError) as error:
        raise ValueError(f"no {word!r} on this machine") from error


_Number = Annotated[int, Meta(ge=0, le=2**32 - 2)]  # the largest number means "none" to the kernel
_UserName = Annotated[str, Meta(extra={"expected": 'a user of this machine or "owner"', "parse": _user})]
_GroupName = Annotated[str, Meta(extra={"expected": "a group of this machine", "parse": _group})]
_RuleText = Annotated[
    str,
    Meta(
        extra={
            "expected": 'a rule such as "udp:5000-6000", "tcp:10.0.0.1:80", "udp:[fd77::1]:53", "udp:*", '
            '"connect:443", "raw:1", "raw:*", "tap" or "*"',
            "parse": Rule.parse,
        }
    ),
]


class AccessSettings(Table, frozen=True, kw_only=True):
    """Who else may open which sockets. Several tables may name the same user; what any of them allows counts.

    Root and the owner, the user who runs the dataplane, may open every socket, except that ports under 1024
    are for root alone. All others may open none. An `[[access]]` table permits more: to the user or the group
    it names, what its rules say, ports under 1024 included when a rule covers them.
    """

    uid: Annotated[
        _Number | _UserName | None,
        Meta(
            description="The user: a number, a name, or the word `owner` for the user who runs the "
            "dataplane. Each table has either `uid` or `gid`."
        ),
    ] = None
    gid: Annotated[
        _Number | _GroupName | None,
        Meta(description="The group: a number or a name; meant are processes that have it, first or not."),
    ] = None
    allow: Annotated[
        tuple[_RuleText, ...],
        Meta(
            description="What is permitted. `udp:` (sockets) and `tcp:` (listeners) are followed by a port, a "
            "range of ports, or `*` for all, and may name the one local address that may be bound; `connect:` "
            "(opening a TCP connection) by the remote port, a range, or `*`, and may name the one remote "
            "address; `raw:` by an IP protocol's number (1 to 255), a range, or `*`; `tap` is a copy of every "
            "frame; `*` is everything."
        ),
    ]

    @property
    def user(self) -> int | None:
        """The user's number; None when this is about a group."""
        return _user(self.uid) if isinstance(self.uid, str) else self.uid

    @property
    def group(self) -> int | None:
        """The group's number; None when this is about a user."""
        return _group(self.gid) if isinstance(self.gid, str) else self.gid

    @property
    def rules(self) -> tuple[Rule, ...]:
        """`allow`, parsed."""
        return tuple(Rule.parse(text) for text in self.allow)
