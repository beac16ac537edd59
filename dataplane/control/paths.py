"""Where a running dataplane's control socket lies. Nothing here touches a socket.

The supervisor makes `NAME.sock` in its runtime directory, and holds a lock on `NAME.lock` beside it
as long as it lives. Consumers and the command line look for the socket in their own runtime
directory, then in root's.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["SYSTEM", "lock_path", "names", "runtime_directory", "search_directories", "socket_path"]

SYSTEM = Path("/run/dataplane")
"""Runtime directory of a dataplane that runs as root."""


def runtime_directory() -> Path:
    """`$DATAPLANE_RUNTIME_DIR`, else `/run/dataplane` for root, `$XDG_RUNTIME_DIR/dataplane`, or
    `/tmp/dataplane-<uid>`. It need not exist."""
    if chosen := os.environ.get("DATAPLANE_RUNTIME_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return SYSTEM
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "dataplane"
    return Path("/tmp") / f"dataplane-{os.geteuid()}"


def search_directories() -> list[Path]:
    """Where to look for a dataplane, in this order."""
    own = runtime_directory()
    return [own] if own == SYSTEM else [own, SYSTEM]


def socket_path(directory: Path, name: str) -> Path:
    """The control socket of the dataplane `name`."""
    return directory / f"{name}.sock"


def lock_path(directory: Path, name: str) -> Path:
    """The file that the supervisor of the dataplane `name` keeps locked."""
    return directory / f"{name}.lock"


def names(directory: Path) -> list[str]:
    """Dataplanes that have a control socket in `directory`; some may be left from one that was killed."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name.removesuffix(".sock") for entry in entries
                          if entry.name.endswith(".sock") and stat.S_ISSOCK(entry.stat().st_mode))
    except OSError:
        return []
