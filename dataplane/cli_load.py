"""A configuration for the commands `check`, `run` and `doctor`: read, and compared with the room in /dev/shm."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dataplane import netif
from dataplane.config import Config, load
from dataplane.config_lines import Lines
from dataplane.errors import ConfigError, SegmentSpaceError
from dataplane.pcb.table import Table
from dataplane.shm.segment import SHM

__all__ = ["check", "load_any", "table_bytes", "too_large"]


def load_any(path: Path) -> Config:
    """The settings in the file, with all kinds of netifs. Raises ConfigError."""
    return load(path, netif.kinds())


def check(path: Path) -> Config:
    """`load_any`, and there is room for the table now. Raises ConfigError."""
    config = load_any(path)
    available = 0
    with contextlib.suppress(FileNotFoundError):
        figures = os.statvfs(SHM)
        available = figures.f_bavail * figures.f_frsize
    error = SegmentSpaceError("table", table_bytes(config), available)
    if error.needed > error.available:
        raise too_large(path, config, error)
    return config


def table_bytes(config: Config) -> int:
    """What a dataplane takes of /dev/shm at its start."""
    return Table.size(config.sockets.max, len(config.cores), len(config.netif), config.sockets.groups,
                      config.inet.neighbours, config.tcp.time_wait_max)


def too_large(path: Path, config: Config, error: SegmentSpaceError) -> ConfigError:
    """The same error, about the key that can be changed."""
    problem = f"needs {error.needed} bytes in {SHM}, {error.available} bytes are available"
    return ConfigError(
        "sockets.max", config.sockets.max, f"a smaller number or a larger {SHM}", source=str(path),
        line=Lines(path.read_text()).of(("sockets", "max")), problem=problem)
