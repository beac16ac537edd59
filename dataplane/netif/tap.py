"""TAP: an Ethernet interface of its own. The dataplane is a station at its other end, with an own address.

See `dataplane/netif/_tuntap.py`, which does the work. The kernel's side can be put into a bridge.
"""

from __future__ import annotations

from dataplane.config import Context
from dataplane.netif._tuntap import Tuntap, TuntapSettings, done, rx, tx
from dataplane.shm.arena import Arena

__all__ = ["KIND", "Netif", "Settings", "done", "rx", "tx"]

KIND = "tap"

_MAX_MTU = 65521    # the kernel's: 65,535 with the Ethernet header


class Settings(TuntapSettings, tag=KIND, frozen=True, kw_only=True):
    """A new Ethernet interface, with the kernel at its other end."""

    def check(self, where: str, ctx: Context) -> None:
        if self.mtu > _MAX_MTU:
            ctx.error("mtu", self.mtu, f"at most {_MAX_MTU}, the most for Ethernet frames")
        super().check(where, ctx)


class Netif(Tuntap):
    """The open device; see `Tuntap`."""

    def __init__(self, settings: Settings, arena: Arena, queues: int, nifs: list[int]) -> None:
        super().__init__(settings, arena, queues, nifs, "tap")
