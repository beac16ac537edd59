"""dataplane: a user-space receive-side network stack for Python.

The public names, and nothing else. What needs numba is imported when it is first asked for, so that
`import dataplane` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dataplane.errors import (
    ConfigError,
    DataplaneError,
    LayoutMismatch,
    SegmentSpaceError,
    Stopped,
    UnknownDataplane,
)

if TYPE_CHECKING:
    from dataplane.client.attach import Dataplane, attach
    from dataplane.client.batch import Batch
    from dataplane.client.poller import Poller
    from dataplane.client.records import ENDPOINT, PacketInfo
    from dataplane.client.sockets import RawSocket, Socket, TapSocket
    from dataplane.client.tcp import Connection, Listener
    from dataplane.client.udp import UDPSocket

__all__ = [
    "ENDPOINT", "Batch", "ConfigError", "Connection", "Dataplane", "DataplaneError", "LayoutMismatch", "Listener",
    "PacketInfo", "Poller", "RawSocket", "SegmentSpaceError", "Socket", "Stopped", "TapSocket", "UDPSocket",
    "UnknownDataplane", "attach",
]

__version__ = "0.3.0"

_LAZY = {
    "attach": "attach", "Dataplane": "attach", "Batch": "batch", "Poller": "poller", "ENDPOINT": "records",
    "PacketInfo": "records", "RawSocket": "sockets", "Socket": "sockets", "TapSocket": "sockets",
    "UDPSocket": "udp", "Connection": "tcp", "Listener": "tcp",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dataplane.client.{_LAZY[name]}"), name)
    # The submodule `dataplane.client.attach` does not shadow it: that is an attribute of `dataplane.client`.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
