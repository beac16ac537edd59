"""The command `doctor`: what this machine allows a dataplane to do. Called by `dataplane.cli`.

Looks and changes nothing. Each finding says what it means for whom; "no" is a fact, not an error.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from llvmlite import binding as llvm
from rich import box
from rich.console import Console
from rich.table import Table

from dataplane import jit, netif
from dataplane.cli_load import load_any, table_bytes
from dataplane.cli_tables import width_for_pipes
from dataplane.config import Config, available_cores
from dataplane.control.paths import runtime_directory

_CAP_NET_ADMIN, _CAP_NET_RAW = 12, 13
_WANTED_FEATURES = ("sse4.2", "avx2", "avx512f")
Finding = tuple[str, str, str]      # what, how it is, what it means


def doctor(config: Path | None) -> None:
    """Print the findings; with a configuration, what it needs as well. Raises ConfigError."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("what", "here", "means"):
        table.add_column(column)
    for finding in _findings():
        table.add_row(*finding)
    settings = load_any(config) if config else None
    for finding in _needs(settings) if settings else ():
        table.add_row(*finding)
    Console(width=width_for_pipes(sys.stdout)).print(table)


def _findings() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "system", f"{system}, Python {platform.python_version()}", ""
    yield from _cores()
    admin, raw = _capability(_CAP_NET_ADMIN), _capability(_CAP_NET_RAW)
    yield "CAP_NET_ADMIN", _yes(admin), "needed by tun and tap, and by af_packet for promiscuous mode"
    yield "CAP_NET_RAW", _yes(raw), "needed by af_packet"
    tun = os.access("/dev/net/tun", os.R_OK | os.W_OK)
    yield "/dev/net/tun", _yes(tun), "needed by tun and tap"
    usable = {"tun": tun and admin, "tap": tun and admin, "af_packet": raw}
    for kind in sorted(netif.kinds()):
        yield f"netif {kind}", _yes(usable.get(kind, True)), ""
    yield from _memory()
    yield "runtime directory", str(runtime_directory()), "control sockets (DATAPLANE_RUNTIME_DIR)"
    yield "kernel cache", str(jit.cache_directory()), "compiled code (DATAPLANE_CACHE_DIR)"


def _cores() -> Iterator[Finding]:
    mine = available_cores()
    usable = f"{len(mine)} of {psutil.cpu_count() or 1}: {', '.join(map(str, mine))}"
    yield "cores", usable, "one RX worker each at most"
    features = llvm.get_host_cpu_features()
    found = [name for name in _WANTED_FEATURES if features.get(name)]
    has = ", ".join(found) or f"none of {', '.join(_WANTED_FEATURES)}"
    yield "CPU", f"{llvm.get_host_cpu_name()}: {has}", "without sse4.2 hashes are computed bit by bit"


def _memory() -> Iterator[Finding]:
    try:
        usage = shutil.disk_usage("/dev/shm")
        shm = f"{_bytes(usage.free)} free of {_bytes(usage.total)}"
    except OSError as error:
        shm = f"missing ({error.strerror})"
    yield "/dev/shm", shm, "tables, and the rings of consumers of the same user"
    free = psutil.virtual_memory().available
    yield "memory", f"{_bytes(free)} available", "the rings of consumers of other users"
    for name, limit, means in (
        ("RLIMIT_NOFILE", resource.RLIMIT_NOFILE, "descriptors: one per consumer and per event loop"),
        ("RLIMIT_AS", resource.RLIMIT_AS, "address space: 16 TiB are reserved, 64 GiB at least"),
        ("RLIMIT_MEMLOCK", resource.RLIMIT_MEMLOCK, "locked memory: af_packet rings"),
    ):
        soft, hard = (("unlimited" if one == resource.RLIM_INFINITY else str(one))
                      for one in resource.getrlimit(limit))
        yield name, f"{soft} (at most {hard})", means


def _needs(config: Config) -> Iterator[Finding]:
    needed, free = table_bytes(config), shutil.disk_usage("/dev/shm").free
    verdict = "fits" if needed <= free else "does not fit"
    yield f"{config.name}: table", f"{_bytes(needed)}, {verdict}", "taken at start (sockets.max)"
    cores = ", ".join(map(str, config.cores))
    yield f"{config.name}: RX workers", f"on cores {cores}", "idle = " + config.rx.idle
    for one in config.netif:
        kind = str(one.__struct_config__.tag)
        yield f"{config.name}: netif", kind, str(getattr(one, "device", getattr(one, "path", "")))


def _capability(bit: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> bit & 1)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _bytes(number: int) -> str:
    return f"{number / (1 << 30):.1f} GiB" if number >= 1 << 30 else f"{number / (1 << 20):.1f} MiB"
