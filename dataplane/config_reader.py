"""One TOML text on its way to settings, and the readable errors about it.

`tomllib` and msgspec find the faults; here they get the name of the file, the line, the whole path of the
key, the value and what was expected. Floor 1; called by `dataplane.config`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from dataplane import config_schema as schema
from dataplane.config_lines import Lines
from dataplane.errors import ConfigError

_S = TypeVar("_S", bound=msgspec.Struct)


class Reader:
    """One TOML text on its way to settings: knows where everything stands, and raises the errors."""

    def __init__(self, text: str, source: str, directory: Path) -> None:
        self.source = source
        self.directory = directory
        self._text = text
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except RecursionError:
            raise ConfigError("", None, "valid TOML", source=source, problem="nested too deeply") from None
        except ValueError as error:  # TOMLDecodeError, and integers of thousands of digits
            problem, line = _syntax_error(str(error), text)
            raise ConfigError("", None, "valid TOML", source=source, line=line, problem=problem) from None

    def error(self, path: schema.Path, value: object, expected: str, problem: str | None = None) -> NoReturn:
        """Raise the error about what stands at `path`, with its line."""
        line = Lines(self._text).of(path)
        raise ConfigError(
            key_text(path), value, expected, source=self.source, line=line, problem=problem
        ) from None  # the caller's exception says the same, less readably

    def refuse_unknown(self, struct: type[msgspec.Struct], data: object, path: schema.Path) -> None:
        """Raise for the first key of `data` that its table does not have, with the nearest that it has."""
        for where, known in schema.unknown_keys(struct, data, path):
            found: Any = self.data
            for step in where:
                found = found[step]
            near = difflib.get_close_matches(str(where[-1]), known, 1)
            expected = f'"{near[0]}"' if near else f"one of {', '.join(known)}"
            self.error(where, found, expected, "unknown key")

    def convert(self, struct: type[_S], data: object, path: schema.Path) -> _S:
        """Turn the table `data`, which stands at `path`, into `struct`; raise for the first fault in it."""
        self.refuse_unknown(struct, data, path)
        try:
            settings = msgspec.convert(data, struct)
        except msgspec.ValidationError as error:
            self._explain(struct, data, path, str(error))
        for inner, value, expected in schema.faults(struct, settings):
            self.error((*path, *inner), value, expected)
        names = {
            name: str(self.directory / Path(getattr(settings, name)).expanduser())
            for name, hint in schema.fields(struct).items()
            if schema.extra(schema.split(hint)[1], "path")
        }
        return msgspec.structs.replace(settings, **names)

    def _explain(self, struct: type[msgspec.Struct], data: Any, path: schema.Path, message: str) -> NoReturn:
        """Raise msgspec's error as ours: its message ends with " - at `$.cores[1]`", or means the whole."""
        text, _, end = message.rpartition(" - at `$")
        inner = key_path(end.rstrip("`")) if text else ()
        missing = re.fullmatch(r"Object missing required field `(\w+)`", text or message)
        value: Any = data
        for step in inner:
            value = value[step]
        if missing:
            inner, value = (*inner, missing[1]), None
        self.error((*path, *inner), value, schema.describe(schema.at(struct, inner)))


def key_text(path: schema.Path) -> str:
    """Write a path as `netif[1].size`; what is not a bare key of TOML in quotes."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += "." * bool(text) + (step if re.fullmatch(r"[A-Za-z0-9_-]+", step) else json.dumps(step))
    return text


def key_path(key: str) -> schema.Path:
    """Read what `key_text` writes, of settings' own names."""
    return tuple(
        int(match["index"]) if match["index"] else match["name"]
        for match in re.finditer(r"\[(?P<index>[0-9]+)\]|(?P<name>[^.\[\]]+)", key)
    )


def _syntax_error(message: str, text: str) -> tuple[str, int | None]:
    """Take the line out of `tomllib`'s message: what is wrong, and where."""
    match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)\Z", message)
    if match is None:
        return message, None
    return message[: match.start()], int(match[1] or len(text.splitlines()) or 1)
