"""Addresses of a netif: in the configuration, in the netif queue, and the kernel's beside them.

Used by the kinds that are a link to somewhere else: `tun`, `tap`, `af_packet`. `addresses` are the
dataplane's own; the kernel must not have them as well, or it would answer, too. Written once, by
the supervisor, before the workers exist.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import psutil

from dataplane.config import Context, IPAddress, IPInterface, parse_address, parse_interface
from dataplane.shm import layout as L

__all__ = ["Addressed", "check", "fill", "host_addresses", "holders", "taken", "words"]

Words = npt.NDArray[np.int64]


class Addressed(Protocol):
    """Settings with the two keys that this module knows."""

    @property
    def addresses(self) -> tuple[str, ...]: ...

    @property
    def gateway(self) -> tuple[str, ...]: ...


def words(mem: npt.NDArray[np.uint8], nif: int) -> Words:
    """The netif queue at offset `nif`, int64[N_BYTES // 8]: word `N_...` has the index `N_... // 8`."""
    return mem[nif:nif + L.N_BYTES].view(np.int64)


def halves(address: IPAddress) -> tuple[int, int]:
    """The address as the kernels compare it: upper and lower half, signed; an IPv4 address is all lower."""
    high, low = divmod(int(address), 1 << 64)
    return _signed(high), _signed(low)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def fill(nif: Words, settings: Addressed) -> None:
    """Writes N_ADDRESSES, N_ADDRESS_COUNT, the gateways, and NF_PASSIVE where there are no addresses."""
    for index, text in enumerate(settings.addresses):
        interface = parse_interface(text)
        at = (L.N_ADDRESSES + index * L.ADDRESS_BYTES) // 8
        nif[at:at + 4] = (interface.version, interface.network.prefixlen, *halves(interface.ip))
    nif[L.N_ADDRESS_COUNT // 8] = len(settings.addresses)
    for text in settings.gateway:
        address = parse_address(text)
        high, low = halves(address)
        if address.version == 4:
            nif[L.N_GATEWAY4 // 8] = low
        else:
            nif[L.N_GATEWAY6_HI // 8], nif[L.N_GATEWAY6_LO // 8] = high, low
    if not settings.addresses:
        nif[L.N_FLAGS // 8] |= L.NF_PASSIVE


def host_addresses(addresses: Iterable[str]) -> tuple[str, ...]:
    """The other end of each network: the next free host address after the first of ours in it.

    `10.77.0.1/24` gives `10.77.0.2/24`; a network of one address has no room and gives none.
    """
    interfaces = [parse_interface(text) for text in addresses]
    ours = {interface.ip for interface in interfaces}
    networks: dict[ipaddress.IPv4Network | ipaddress.IPv6Network, IPInterface] = {}
    for interface in interfaces:
        networks.setdefault(interface.network, interface)
    return tuple(f"{free}/{network.prefixlen}" for network, interface in networks.items()
                 if (free := _next_free(interface, ours)) is not None)


def _next_free(interface: IPInterface, ours: set[IPAddress]) -> IPAddress | None:
    network, first = interface.network, int(interface.network.network_address)
    size = network.num_addresses
    for step in range(1, min(size, len(ours) + 4)):
        free = network[(int(interface.ip) - first + step) % size]
        ends = (network.network_address, network.broadcast_address) if size > 2 else ()
        if free not in ours and free not in ends:
            return free
    return None


def holders() -> dict[IPAddress, str]:
    """The kernel's own addresses in this network namespace, and the interface that has each."""
    found: dict[IPAddress, str] = {}
    for device, entries in psutil.net_if_addrs().items():
        for entry in entries:
            try:
                found[ipaddress.ip_address(entry.address.partition("%")[0])] = device
            except ValueError:      # a link-layer address
                continue
    return found


def taken(addresses: Iterable[str]) -> str | None:
    """Says which of `addresses` the kernel has, and where; None if it has none of them."""
    held = holders()
    for text in addresses:
        if device := held.get(parse_interface(text).ip):
            return f"address {text} is already taken by interface {device}"
    return None


def check(settings: Addressed, ctx: Context, key: str = "addresses",
          addresses: Sequence[str] | None = None) -> None:
    """What `dataplane check` can say of `addresses` (those of `key`) and of `gateway`."""
    held = holders()
    for index, text in enumerate(settings.addresses if addresses is None else addresses):
        if device := held.get(parse_interface(text).ip):
            ctx.error(f"{key}[{index}]", text, "an address that this machine does not have",
                      f"already taken by interface {device}")
    networks = [parse_interface(text).network for text in settings.addresses]
    ours = [parse_interface(text).ip for text in settings.addresses]
    families: set[int] = set()
    for index, text in enumerate(settings.gateway):
        address = parse_address(text)
        if address in ours or not any(address in network for network in networks):
            ctx.error(f"gateway[{index}]", text, "another host's address in a network of `addresses`")
        if address.version in families:
            ctx.error(f"gateway[{index}]", text, "one gateway for IPv4 and one for IPv6")
        families.add(address.version)
