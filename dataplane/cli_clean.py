"""The command `clean`: removes what a killed dataplane has left. Called by `dataplane.cli`."""

from __future__ import annotations

import os

from dataplane.errors import DataplaneError
from workers.leavings import clean as remove


def clean(name: str | None) -> None:
    """Remove, and say what. Raises DataplaneError when the dataplane that was named is alive."""
    done = remove(os.geteuid(), name)
    if name is not None and done[name] is None:
        raise DataplaneError(f"dataplane {name!r} is running: not touched")
    for one, removed in done.items():
        if removed is None:
            print(f"{one}: running, not touched")
        for path in removed or ():
            print(f"{one}: removed {path}")
    if not any(done.values()):
        print("nothing to remove")
