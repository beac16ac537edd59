"""What passes over the control socket: one message per SOCK_SEQPACKET datagram, msgpack.

Spoken by the client library and the command line on one end, by the supervisor on the other.
Each request gets exactly one reply, in order. Descriptors travel beside a reply (SCM_RIGHTS),
in the order that the reply's text says. Decoding is strict: an unknown field or a wrong type
closes the connection, and with it everything that its consumer owned.
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL_VERSION = 1
MAX_MESSAGE = 65536


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", omit_defaults=True):
    """Base of all messages."""


# -- requests ------------------------------------------------------------------------------


class Attach(Message, frozen=True, tag="attach"):
    """First request of a consumer. Command-line observers skip it."""

    version: int
    fingerprint: int            # layout.fingerprint()


class Bind(Message, frozen=True, tag="bind"):
    """Opens a socket. `kind`: udp, raw or tap."""

    kind: str
    address: str | None = None  # numeric; None: every address of both families
    port: int | None = None     # None: any port that nobody else is bound to; 0: an unused one
    remote: tuple[str, int] | None = None
    proto: int = 17             # raw: IP protocol, 0 for all
    reuseport: bool = False
    ring_bytes: int | None = None


class Close(Message, frozen=True, tag="close"):
    """Closes a socket of this connection's consumer."""

    pcb: int
    generation: int


class SetWake(Message, frozen=True, tag="set_wake"):
    """Points sockets, each (PCB, generation), at one of the home segment's poller wake objects, or (-1)
    back at their own. Answered when no worker can still use the former ones."""

    sockets: list[tuple[int, int]]
    poller: int


class Event(Message, frozen=True, tag="event"):
    """Asks for a bell (shm/bell.py) that workers ring for wake objects that carry its number.
    Reply: Evented, with its listening end."""


class Stats(Message, frozen=True, tag="stats"):
    """The ledger. Reply: Ledger."""


class Sockets(Message, frozen=True, tag="sockets"):
    """Open sockets, from PCB number `start` on. Reply: SocketList, in pieces."""

    start: int = 0


# -- replies -------------------------------------------------------------------------------


class Segment(Message, frozen=True, tag="segment"):
    """An owner segment to be mapped: by name, or (name None) from the descriptor sent along."""

    number: int
    bytes: int
    name: str | None


class NetifInfo(Message, frozen=True, tag="netif"):
    """What a consumer has to know of a netif to choose a route."""

    name: str
    kind: str
    mtu: int
    passive: bool
    addresses: list[str]        # interface notation, 10.77.0.1/24
    gateway: list[str]


class Attached(Message, frozen=True, tag="attached"):
    """Descriptors: the ringing end of the doorbell of the worker that transmits for this consumer, then
    the home segment's where it has no name."""

    name: str
    pid: int                    # of the supervisor
    consumer: int
    workers: int
    home: Segment
    tx_ring_bytes: int
    ring_bytes: int
    netifs: list[NetifInfo]


class Bound(Message, frozen=True, tag="bound"):
    """`segment` is set (and its descriptor sent, if it has no name) when the slot is in one
    that this consumer has not been given yet."""

    pcb: int
    generation: int
    number: int                 # of the ring segment
    slot: int                   # offset of the slot in it
    ring_bytes: int
    address: str | None
    port: int | None
    segment: Segment | None = None


class Evented(Message, frozen=True, tag="evented"):
    """`number` goes into WAKE_EVENT."""

    number: int


class Done(Message, frozen=True, tag="done"):
    """It was done."""


class Ledger(Message, frozen=True, tag="ledger"):
    """The ledger as `dataplane stat --json` prints it."""

    ledger: dict[str, Any]


class SocketInfo(Message, frozen=True, tag="socket"):
    """One line of `dataplane ss`. Rings' figures are sums over the lanes."""

    pcb: int
    kind: str
    proto: int
    local: tuple[str, int | None]
    remote: tuple[str, int] | None
    state: str
    reuseport: bool
    pid: int
    uid: int
    consumer: int
    ring_bytes: int
    published: int
    consumed: int
    queued: int
    queued_bytes: int
    dropped: int


class SocketList(Message, frozen=True, tag="socket_list"):
    """`next` is the `start` of the following request; -1: that was all."""

    sockets: list[SocketInfo]
    next: int


class Failure(Message, frozen=True, tag="failure"):
    """The request was refused: `errno` for an OSError of that number (EACCES and EPERM become
    PermissionError), 0 for a DataplaneError. EPROTO in answer to Attach becomes LayoutMismatch."""

    errno: int
    message: str


Request = Attach | Bind | Close | SetWake | Event | Stats | Sockets
Reply = Attached | Bound | Evented | Done | Ledger | SocketList | Failure

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
