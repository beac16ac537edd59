"""Which modules' kernels a dataplane needs, and how they are made ready before the first fork.

Called by the supervisor at every start: compiled once for each version of the sources, afterwards loaded.
`python -m workers.kernels` compiles all there are, for instance before a test run or in an image.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from types import ModuleType

from dataplane import ledger, netif
from dataplane.client import drain, fields
from dataplane.client import transmit as client_transmit
from dataplane.inet import fragment_table, neighbour_table, step, tcp_accept, tcp_continue, tcp_service, transmit
from dataplane.jit import missing, warm
from dataplane.kcont import schedule
from dataplane.pcb import lookup, reuseport, slots
from dataplane.rings import pcq, wake
from dataplane.shm import epoch
from dataplane.tcp import syncache
from workers import continuation, duty, process, rx

__all__ = ["warm_up"]

WORKERS: tuple[ModuleType, ...] = (
    epoch, lookup, reuseport, slots, pcq, wake, ledger, syncache, fragment_table, neighbour_table, step, transmit,
    tcp_accept, tcp_service, tcp_continue, schedule, duty, process, rx, continuation)
CONSUMERS: tuple[ModuleType, ...] = (drain, fields, client_transmit)


def _netifs(kinds: Iterable[str]) -> list[ModuleType]:
    return [importlib.import_module(f"dataplane.netif.{kind}") for kind in sorted(kinds)]


def warm_up(kinds: Iterable[str], compiling: Callable[[], None]) -> None:
    """Makes ready what a supervisor and its workers call, with netifs of these kinds. If that must be
    compiled, `compiling` is told first, and the consumers' kernels are compiled as well, once and for all."""
    modules = [*WORKERS, *_netifs(kinds)]
    if missing(modules):
        compiling()
        modules += CONSUMERS
    warm(modules, len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    warm([*WORKERS, *CONSUMERS, *_netifs(netif.kinds())], len(os.sched_getaffinity(0)))
