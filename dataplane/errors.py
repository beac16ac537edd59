"""The errors that have no standard name. Everything else is raised as what the standard library calls it.

Floor 1: imports nothing of the project. Raised anywhere; `dataplane.cli` prints them and exits with 2, so
`str(error)` is always one line that a user can act on.
"""

from __future__ import annotations

import json

_SHOWN = 60  # characters of a value that are repeated in a message


class DataplaneError(Exception):
    """Base of all errors of this package that are not standard ones."""


class Stopped(DataplaneError):
    """The dataplane has ended, and everything that it had delivered has been taken."""


class UnknownDataplane(DataplaneError):
    """No dataplane of this name runs here."""


class LayoutMismatch(DataplaneError):
    """A segment was made by a version of dataplane whose memory layout is another one."""


class ConfigError(DataplaneError):
    """The configuration is wrong at one place.

    `key` is the path of the key (`netif[1].size`; empty when the file as a whole is meant), `value` what
    stands there (None: nothing does), `expected` what should, `problem` what is wrong where the value alone
    does not say it. `source` is the file's name as the user wrote it and `line` counts from 1; both are None
    until known.
    """

    def __init__(
        self,
        key: str,
        value: object,
        expected: str,
        *,
        source: str | None = None,
        line: int | None = None,
        problem: str | None = None,
    ) -> None:
        # The positional ones are `args`, so that the error survives pickling on its way from a worker.
        super().__init__(key, value, expected)
        self.key = key
        self.value = value
        self.expected = expected
        self.source = source
        self.line = line
        self.problem = problem

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.source, self.line) if part is not None)
        problem = self.problem or ("missing" if self.value is None else None)
        last = f"expected {self.expected}" if problem is None else f"{problem}, expected {self.expected}"
        shown = None if self.value is None else _shown(self.value)
        return ": ".join(part for part in (place, self.key, shown, last) if part)


class SegmentSpaceError(DataplaneError):
    """There is not enough shared memory for a segment; `needed` and `available` are bytes."""

    def __init__(self, name: str, needed: int, available: int) -> None:
        super().__init__(name, needed, available)
        self.name = name
        self.needed = needed
        self.available = available

    def __str__(self) -> str:
        return (
            f"not enough shared memory: segment {self.name} needs {self.needed} bytes, "
            f"{self.available} bytes are available"
        )


def _shown(value: object) -> str:
    """Return `value` as TOML would write it, on one line and cut to a readable length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # TOML's dates and times, and whatever a netif's own check passes
        text = str(value)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
