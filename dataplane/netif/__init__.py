"""Where frames come from and go to. One module per kind; a new kind is one new file here.

A module is a kind when it has a string `KIND`, the word of `kind = "..."` in the configuration, and a class
`Settings(NetifSettings, tag=KIND)`, the keys of its table. Modules without `KIND` (a netif that wraps another
one) and modules whose name starts with an underscore are not kinds.
"""

from __future__ import annotations

import importlib
import pkgutil

from dataplane.config import NetifSettings


def kinds() -> dict[str, type[NetifSettings]]:
    """Return the settings class of every kind, by the kind's name.

    Imports all modules of this package; an error in one of them is not hidden. Raises `TypeError` when a
    kind's `Settings` do not fit its `KIND`, which is a mistake in that module.
    """
    found: dict[str, type[NetifSettings]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        kind = getattr(module, "KIND", None)
        if kind is None:
            continue
        settings = getattr(module, "Settings", None)
        if not (isinstance(settings, type) and issubclass(settings, NetifSettings)):
            raise TypeError(f"{module.__name__}: a netif needs a class Settings(NetifSettings, tag=KIND)")
        tag = settings.__struct_config__.tag
        if tag != kind:
            raise TypeError(f"{module.__name__}: Settings has the tag {tag!r}, KIND is {kind!r}")
        if kind in found:
            raise TypeError(f"{module.__name__}: the kind {kind!r} is {found[kind].__module__}'s already")
        found[kind] = settings
    return found
