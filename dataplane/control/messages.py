"""What passes over the control socket: one message per SOCK_SEQPACKET datagram, msgpack.

Spoken by the client library and the command line on one end, by the supervisor on the other.
Each request gets exactly one reply, in order. Descriptors travel beside a reply (SCM_RIGHTS),
in the order that the reply's text says. Decoding is strict: an unknown field or a wrong type
closes the connection, and with it everything that its consumer owned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    """Opens a socket. `kind`: udp, raw, tap, tcp_listen or tcp_connect.

    A TCP connection's buffers are chosen here, a listener's for all that it accepts; None: as the dataplane is
    configured. `ring_bytes` is not for TCP. A listener needs a port (0: an unused one). `connections` is how
    many accepted ones there can be at a time; each RX worker has its share, and one at least.
    """

    kind: str
    address: str | None = None  # numeric; None: every address of both families
    port: int | None = None     # None: any port that nobody else is bound to; 0: an unused one
    remote: tuple[str, int] | None = None
    proto: int = 17             # raw: IP protocol, 0 for all
    reuseport: bool = False
    ring_bytes: int | None = None
    backlog: int = 128          # listener: connections that may wait to be accepted
    connections: int = 1024
    send_bytes: int | None = None       # a power of two from 4096
    receive_bytes: int | None = None


class SegmentOf(Message, frozen=True, tag="segment_of"):
    """Asks for one of this consumer's own segments by its number: that of the slot of an accepted connection.
    Reply: Given, with its descriptor."""

    number: int


class Close(Message, frozen=True, tag="close"):
    """Closes a socket of this connection's consumer. A listener's connections that nobody has accepted are
    reset. A TCP connection that its owner opened is reset, too: this is for one whose opening was interrupted. All
    others end by what their slots say (layout_tcp.REQ_CLOSED)."""

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
    time_wait_ns: int           # how long a TCP connection stays in TIME_WAIT
    netifs: list[NetifInfo]


class Bound(Message, frozen=True, tag="bound"):
    """`segment` is set (and its descriptor sent, if it has no name) when the slot is in one
    that this consumer has not been given yet.

    A listener has an ordinary slot, in whose lanes the connections to be accepted are; `lane_bytes`,
    `send_bytes` and `receive_bytes` are those of each of them. A connection's slot is as layout_tcp says.
    """

    pcb: int
    generation: int
    number: int                 # of the ring segment
    slot: int                   # offset of the slot in it
    ring_bytes: int
    address: str | None
    port: int | None
    segment: Segment | None = None
    lane_bytes: int = 0         # TCP: ring bytes of each of a connection's lanes, one per RX worker,
    send_bytes: int = 0         # and of its buffers
    receive_bytes: int = 0
    mtu: int = 0                # tcp_connect: of the netif that leads to the remote address


class Given(Message, frozen=True, tag="given"):
    """The descriptor goes along if the segment has no name."""

    segment: Segment


class Evented(Message, frozen=True, tag="evented"):
    """`number` goes into WAKE_EVENT."""

    number: int


class Done(Message, frozen=True, tag="done"):
    """It was done."""


class Ledger(Message, frozen=True, tag="ledger"):
    """The ledger as `dataplane stat --json` prints it."""

    ledger: dict[str, Any]


class ConnectionInfo(Message, frozen=True, tag="connection"):
    """What a connection's control block says: its owner could have written anything there, within these bounds.

    Positions count from 0, which is the SYN; the wire's sequence numbers are `iss` and `irs` more. Times are ms.
    """

    send_queue: int             # bytes written and not yet acknowledged
    receive_queue: int          # bytes in order that the application has not read
    send_bytes: int             # the buffers' sizes
    receive_bytes: int
    iss: int
    irs: int
    rcv_nxt: int
    snd_una: int
    snd_nxt: int
    snd_wnd: int
    mss: int
    cwnd: int
    ssthresh: int
    srtt: float
    rttvar: float
    rto: float
    backoff: int
    retransmits: int
    segments_in: int
    segments_out: int


class SocketInfo(Message, frozen=True, tag="socket"):
    """One line of `dataplane ss`. Rings' figures are sums over the lanes. Of a listener, `queued` are the
    connections to be accepted. `kind` is udp, raw, tap or tcp."""

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
    backlog: int                # listener; else 0
    connection: ConnectionInfo | None


class SocketList(Message, frozen=True, tag="socket_list"):
    """`next` is the `start` of the following request; -1: that was all."""

    sockets: list[SocketInfo]
    next: int


class Failure(Message, frozen=True, tag="failure"):
    """The request was refused: `errno` for an OSError of that number (EACCES and EPERM become
    PermissionError), 0 for a DataplaneError. EPROTO in answer to Attach becomes LayoutMismatch."""

    errno: int
    message: str


Request = Attach | Bind | SegmentOf | Close | SetWake | Event | Stats | Sockets
Reply = Attached | Bound | Given | Evented | Done | Ledger | SocketList | Failure

encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(Request).decode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode


def decode_request(data: bytes) -> Request:
    """The request in a datagram; msgspec.DecodeError for everything else."""
    with _one_error():
        return _decode_request(data)


def decode_reply(data: bytes) -> Reply:
    """The reply in a datagram; msgspec.DecodeError for everything else."""
    with _one_error():
        return _decode_reply(data)


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """msgspec has other errors for text that is not UTF-8, and for what is nested more deeply than it follows: even
    in a field that nobody knows, if that comes before the message's type."""
    try:
        yield
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None
