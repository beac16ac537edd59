"""Addresses as the socket module writes them, to what a transmit record says, and the routes there are.

Numeric addresses only: there is no resolver here.
"""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Sequence

from dataplane.control.messages import NetifInfo

__all__ = ["IP", "Address", "Routes", "parse_address", "parse_host", "parse_port"]

Address = tuple[str, int]
"""(host, port)."""

IP = ipaddress.IPv4Address | ipaddress.IPv6Address

_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


def parse_host(host: str) -> IP:
    """ValueError when `host` is not a numeric address."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{host!r} is not a numeric IPv4 or IPv6 address") from None


def parse_port(port: int, lowest: int = 0) -> int:
    """ValueError when `port` is none."""
    if not isinstance(port, int) or not lowest <= port <= 65535:
        raise ValueError(f"a port is a number from {lowest} to 65535, not {port!r}")
    return port


def parse_address(address: Address) -> tuple[IP, int]:
    """Where a datagram goes to. What stands behind host and port (the socket module's IPv6 addresses have
    more) is ignored."""
    if not isinstance(address, tuple) or len(address) < 2:
        raise TypeError(f"an address is a tuple (host, port), not {address!r}")
    return parse_host(address[0]), parse_port(address[1], lowest=1)


class Routes:
    """Where the dataplane can transmit to: its netifs with addresses."""

    def __init__(self, netifs: Sequence[NetifInfo]) -> None:
        active = [netif for netif in netifs if not netif.passive]
        self._networks = [ipaddress.ip_interface(text).network
                          for netif in active for text in netif.addresses]
        gateways = [ipaddress.ip_address(text) for netif in active for text in netif.gateway]
        self._by_gateway = {gateway.version for gateway in gateways}
        self._versions = {network.version for network in self._networks}

    def demand(self, host: IP) -> None:
        """OSError(ENETUNREACH) when there is no way to `host`."""
        if host.version in self._by_gateway or any(host in network for network in self._networks):
            return
        if (host.is_multicast or host == _BROADCAST) and host.version in self._versions:
            return
        raise OSError(errno.ENETUNREACH, f"{os.strerror(errno.ENETUNREACH)}: {host}")
