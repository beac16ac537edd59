"""`docs/configuration.md`, made from the settings classes so that it cannot say anything else than they do.

    python -m dataplane.config_reference > docs/configuration.md

Floor 6. A test compares the file with what this makes.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator

import msgspec

from dataplane import config
from dataplane import config_schema as schema

_INTRO = """\
# Configuration

A dataplane is described by one TOML file. `dataplane check FILE` tells what is wrong with one: file, line,
key, the value that stands there and what was expected. Keys that do not exist are errors, too.

The smallest one that is useful; everything else has a default:

```toml
name = "edge0"

[[netif]]
kind = "tun"
device = "dp0"
addresses = ["10.77.0.1/24", "fd77::1/64"]
```

This page is generated: `python -m dataplane.config_reference > docs/configuration.md`.
"""


def reference(kinds: config.Kinds) -> str:
    """Return the whole page, Markdown, for the netifs of `kinds`."""
    return "\n".join(_page(kinds))


def _page(kinds: config.Kinds) -> Iterator[str]:
    yield _INTRO
    yield from _section("Top level", "", config.Config)
    tables = {name: schema.split(hint)[0] for name, hint in schema.fields(config.Config).items()}
    for name, table in tables.items():
        if schema.is_table(table):
            yield from _section(f"`[{name}]`", _doc(table), table)
    yield "## `[[netif]]`\n"
    yield (
        "Where packets come from and go to; at least one table. `kind` says which of the following it is, "
        "and so which other keys it has. No two tables may have the same `device`, or an address in common.\n"
    )
    for kind in sorted(kinds):
        yield from _section(f'`kind = "{kind}"`', _doc(kinds[kind]), kinds[kind], level=3)
    yield from _section("`[[access]]`", _doc(config.AccessSettings), config.AccessSettings)


def _section(title: str, intro: str, struct: type[msgspec.Struct], level: int = 2) -> Iterator[str]:
    yield f"{'#' * level} {title}\n"
    if intro:
        yield f"{intro}\n"
    yield "| key | type | default | unit | meaning |"
    yield "|---|---|---|---|---|"
    for field in msgspec.structs.fields(struct):
        hint = schema.fields(struct)[field.name]
        metas = schema.split(hint)[1]
        meaning = next((meta.description for meta in reversed(metas) if meta.description), None)
        if meaning is not None:  # the tables within have sections of their own
            cells = (f"`{field.name}`", schema.describe(hint), _default(field), _unit(hint), meaning)
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return "" if value is None else f"`{json.dumps(value)}`"


def _unit(hint: schema.Hint) -> str:
    """Return the unit of a field, which may stand inside of a union or a list."""
    for arm in (hint, *schema.arms(hint)):
        unit = schema.extra(schema.split(arm)[1], "unit")
        if unit:
            return str(unit)
    return ""


def _doc(struct: type[msgspec.Struct]) -> str:
    return inspect.cleandoc(struct.__doc__ or "")


def main() -> None:
    """Print the page."""
    from dataplane import netif

    sys.stdout.write(reference(netif.kinds()))


if __name__ == "__main__":
    main()
