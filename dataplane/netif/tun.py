"""TUN: an interface of its own, on which the kernel's IP packets are exchanged with the dataplane.

See `dataplane/netif/_tuntap.py`, which does the work. No link layer: no addresses to resolve.
"""

from __future__ import annotations

from dataplane.netif._tuntap import Tuntap, TuntapSettings, done, rx, tx
from dataplane.shm.arena import Arena

__all__ = ["KIND", "Netif", "Settings", "done", "rx", "tx"]

KIND = "tun"


class Settings(TuntapSettings, tag=KIND, frozen=True, kw_only=True):
    """A new interface for IP packets, with the kernel at its other end."""


class Netif(Tuntap):
    """The open device; see `Tuntap`."""

    def __init__(self, settings: Settings, arena: Arena, queues: int, nifs: list[int]) -> None:
        super().__init__(settings, arena, queues, nifs, "tun")
