"""Which line of a TOML text a key stands on, so that a configuration error can say it.

`tomllib` gives values without positions. This scanner gives positions without values: it runs over a text
that `tomllib` has accepted already, so it need not reject anything and reads only what decides where a key
begins. Floor 1; called by `dataplane.config`.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*'""")
_STRING = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}(?!")'''
    r"""|'''.*?'{3,5}(?!')"""
    r'''|"(?:\\.|[^"\\])*"'''
    r"""|'[^']*'""",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}\r\n#]*")


class Lines:
    """The lines of all keys, tables and array items of one TOML text."""

    def __init__(self, text: str) -> None:
        """Scan `text`, which `tomllib` accepts."""
        self._text = text
        self._pos = 0
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self._lines: dict[Path, int] = {(): 1}
        self._lengths: dict[Path, int] = {}  # of arrays of tables, so far
        self._document()

    def of(self, path: Path) -> int:
        """Return the line of `path`, or of the innermost table or array around it that is written down."""
        while path not in self._lines:
            path = path[:-1]
        return self._lines[path]

    def __contains__(self, path: Path) -> bool:
        return path in self._lines

    # -- the grammar, one method per production ------------------------------------------------------------

    def _document(self) -> None:
        table: Path = ()
        self._skip(_BLANK)
        while self._pos < len(self._text):
            if self._text.startswith("[[", self._pos):
                table = self._header(2)
            elif self._text.startswith("[", self._pos):
                table = self._header(1)
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _header(self, brackets: int) -> Path:
        line = self._line()
        self._pos += brackets
        table = self._place((), self._key(), line)
        if brackets == 2:
            length = self._lengths.get(table, 0)
            self._lengths[table] = length + 1
            table = (*table, length)
            self._lines[table] = line
        self._pos += brackets
        return table

    def _pair(self, table: Path) -> None:
        line = self._line()
        path = self._place(table, self._key(), line)
        self._pos += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> list[str]:
        parts = []
        while True:
            self._skip(_SPACE)
            part = self._skip(_KEY_PART)
            parts.append(tomllib.loads(f"x = {part}")["x"] if part[0] in "\"'" else part)
            self._skip(_SPACE)
            if not self._text.startswith(".", self._pos):
                return parts
            self._pos += 1

    def _value(self, path: Path) -> None:
        first = self._text[self._pos]
        if first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        else:
            self._skip(_STRING if first in "\"'" else _SCALAR)

    def _array(self, path: Path) -> None:
        self._pos += 1
        index = 0
        while True:
            self._skip(_BLANK)
            if self._take("]"):
                return
            self._lines[(*path, index)] = self._line()
            self._value((*path, index))
            index += 1
            self._skip(_BLANK)
            self._take(",")

    def _inline_table(self, path: Path) -> None:
        self._pos += 1
        while True:
            self._skip(_BLANK)
            if self._take("}"):
                return
            self._pair(path)
            self._skip(_BLANK)
            self._take(",")

    # -- steps ---------------------------------------------------------------------------------------------

    def _place(self, table: Path, key: list[str], line: int) -> Path:
        """Return the path of `key` seen from `table`; an array of tables on the way means its last one."""
        path = table
        for part in key:
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)
            path = (*path, part)
            self._lines.setdefault(path, line)
        return path

    def _line(self) -> int:
        return bisect_right(self._starts, self._pos)

    def _take(self, char: str) -> bool:
        if not self._text.startswith(char, self._pos):
            return False
        self._pos += 1
        return True

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._pos)
        if match is None:
            raise ValueError(f"not TOML at character {self._pos}")
        self._pos = match.end()
        return match.group()
