"""What a type hint of a settings class allows: in words, and beyond what msgspec checks by itself.

The words serve both the error messages and `docs/configuration.md`, so that the two never disagree. The
hints are ordinary ones; `msgspec.Meta(extra={...})` adds to them:

    unit          what a number counts, for the documentation: "bytes", "µs"
    expected      says in words what is allowed, where the words made from the hint would not do
    parse         function of the value that raises ValueError when it is not allowed
    power_of_two  True: the integer must be one
    path          True: a file name, made absolute when loaded, seen from the configuration's directory

Floor 1; called by `dataplane.config` and `dataplane.config_reference`. Works on hints only and knows no key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

Path = tuple[str | int, ...]
Hint = Any  # a type, or one of typing's special forms: there is no common class

_INT64 = 2**63  # what msgspec lets pass unbounded must still fit the workers' integers


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all tables are: strict, and unchangeable once read."""


def fields(struct: type[msgspec.Struct]) -> dict[str, Hint]:
    """Return the hint of every field of `struct`, metadata included."""
    hints = get_type_hints(struct, include_extras=True)
    return {name: hints[name] for name in struct.__struct_fields__}


def split(hint: Hint) -> tuple[Hint, list[msgspec.Meta]]:
    """Take `Annotated` off `hint`: the bare hint and its metadata."""
    metas: list[msgspec.Meta] = []
    while _origin(hint) is Annotated:
        hint, *found = get_args(hint)
        metas = [*(meta for meta in found if isinstance(meta, msgspec.Meta)), *metas]
    return hint, metas


def extra(metas: list[msgspec.Meta], key: str) -> Any:
    """Return what the metadata say under `key`; the outermost one wins; None when none does."""
    return next((meta.extra[key] for meta in reversed(metas) if meta.extra and key in meta.extra), None)


def arms(hint: Hint) -> list[Hint]:
    """Return the members of a union, in order and without None; of anything else, just itself."""
    bare, _ = split(hint)
    if _origin(bare) in (Union, UnionType):
        return [arm for member in get_args(bare) for arm in arms(member)]
    return [] if bare is NoneType else [hint]


def is_table(hint: Hint) -> bool:
    """Tell whether a table stands for `hint`."""
    bare, _ = split(hint)
    return isinstance(bare, type) and issubclass(bare, msgspec.Struct)


def at(hint: Hint, path: Path) -> Hint:
    """Return the hint of what stands at `path` inside of a value of `hint`."""
    for step in path:
        for arm in arms(hint):
            bare, _ = split(arm)
            if isinstance(step, str) and is_table(arm):
                hint = fields(bare)[step]
                break
            if isinstance(step, int) and _origin(bare) in (tuple, list):
                hint = _item(bare, step)
                break
        else:
            raise LookupError(f"nothing at {path} of {hint}")
    return hint


def _origin(hint: Hint) -> Any:
    """`get_origin`, which type checkers take for something narrower than it is."""
    return get_origin(hint)


# -- in words ----------------------------------------------------------------------------------------------


def describe(hint: Hint) -> str:
    """Say what `hint` allows, to follow the word "expected"."""
    _, metas = split(hint)
    expected = extra(metas, "expected")
    return str(expected) if expected else " or ".join(_describe_arm(arm) for arm in arms(hint))


def _describe_arm(hint: Hint) -> str:
    bare, metas = split(hint)
    expected = extra(metas, "expected")
    if expected:
        return str(expected)
    if _origin(bare) is Literal:
        *most, last = (json.dumps(choice) for choice in get_args(bare))
        return f"{', '.join(most)} or {last}" if most else last
    if _origin(bare) in (tuple, list):
        items = get_args(bare)
        if len(items) == 1 or items[-1] is Ellipsis:
            return f"a list, each item {describe(items[0])}"
        return f"a list of {len(items)}, each item {describe(items[0])}"
    if is_table(hint):
        return "a table"
    if bare is bool:
        return "true or false"
    if bare is str:
        return f"a string{_length(metas)}"
    noun = {int: "an integer", float: "a number"}[bare]
    if extra(metas, "power_of_two"):
        noun = "a power of two"
    return noun + _range(metas)


def _range(metas: list[msgspec.Meta]) -> str:
    limits = ((name, getattr(meta, name)) for meta in metas for name in ("ge", "gt", "le", "lt"))
    bounds = {name: limit for name, limit in limits if limit is not None}
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    if "gt" in bounds and "le" in bounds:
        return f" above {bounds['gt']}, up to {bounds['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    said = " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items())
    return f" {said}" if said else ""


def _length(metas: list[msgspec.Meta]) -> str:
    least = max((meta.min_length or 0 for meta in metas), default=0)
    most = [meta.max_length for meta in metas if meta.max_length is not None]
    if most:
        return f" of {least} to {min(most)} characters"
    return f" of at least {least} characters" if least > 1 else " that is not empty" if least else ""


# -- beyond msgspec ----------------------------------------------------------------------------------------


def unknown_keys(hint: Hint, data: object, path: Path = ()) -> Iterator[tuple[Path, list[str]]]:
    """Find keys of `data` that its tables do not have: the path of each, and the keys that its table has.

    msgspec finds them too, but names only one and spells it into a sentence, from which a key that contains
    quotes could not be taken out again.
    """
    for arm in arms(hint):
        bare, _ = split(arm)
        if is_table(arm) and isinstance(data, dict):
            known = fields(bare)
            for key, value in data.items():
                if key in known:
                    yield from unknown_keys(known[key], value, (*path, key))
                elif key != bare.__struct_config__.tag_field:
                    yield (*path, key), list(known)
        elif _origin(bare) in (tuple, list) and isinstance(data, list):
            for index, value in enumerate(data[: _fixed_length(bare)]):
                yield from unknown_keys(_item(bare, index), value, (*path, index))


def faults(hint: Hint, value: object, path: Path = ()) -> Iterator[tuple[Path, object, str]]:
    """Find what msgspec accepted but the metadata forbid: path, value and what was expected, of each."""
    for arm in arms(hint):
        bare, metas = split(arm)
        if is_table(arm) and isinstance(value, bare):
            for name, inner in fields(bare).items():
                yield from faults(inner, getattr(value, name), (*path, name))
        elif _origin(bare) in (tuple, list) and isinstance(value, tuple | list):
            for index, item in enumerate(value):
                yield from faults(_item(bare, index), item, (*path, index))
        elif bare in (int, float, str) and type(value) is bare and not _allowed(metas, value):
            yield path, value, describe(hint)


def _allowed(metas: list[msgspec.Meta], value: object) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, int):
        if not -_INT64 <= value < _INT64:
            return False
        if extra(metas, "power_of_two") and (value <= 0 or value & (value - 1)):
            return False
    if isinstance(value, str) and "\0" in value:  # ends a string for the kernel: two names would look alike
        return False
    parse = extra(metas, "parse")
    try:
        if parse is not None:
            parse(value)
    except ValueError:
        return False
    return True


def _item(sequence: Hint, index: int) -> Hint:
    items = get_args(sequence)
    return items[index] if _fixed_length(sequence) is not None else items[0]


def _fixed_length(sequence: Hint) -> int | None:
    items = get_args(sequence)
    return len(items) if _origin(sequence) is tuple and items[-1] is not Ellipsis else None
