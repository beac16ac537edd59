"""What the supervisor and its workers say to each other, over one socket pair per worker.

Orders go down, one datagram each, with at most one descriptor beside it; a worker carries them out in order,
between two steps, and reports how many it has done. Both ends are forked from the same process, so there is
no version and nothing to distrust; the decoding is strict all the same.
"""

from __future__ import annotations

import msgspec

MAX_ORDER = 4096
FREED_MAX = 512         # numbers in one report: it stays under MAX_ORDER


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages."""


# -- orders ------------------------------------------------------------------------------------------------


class Map(Message, frozen=True):
    """Map the segment whose descriptor comes along, at this offset of the arena."""

    offset: int
    bytes: int


class Unmap(Message, frozen=True):
    """Forget the memory at this offset of the arena."""

    offset: int
    bytes: int


class Adopt(Message, frozen=True):
    """Transmit what this consumer puts into the transmit lane of the home segment at `home`."""

    consumer: int
    home: int


class Release(Message, frozen=True):
    """Transmit nothing more for this consumer."""

    consumer: int


class Listen(Message, frozen=True):
    """The descriptor that comes along is the ringing end of bell `number`, which belongs to this consumer."""

    number: int
    consumer: int


class Forget(Message, frozen=True):
    """Close the bell `number`."""

    number: int


class Unlisten(Message, frozen=True):
    """The listener with this PCB number is closed, and no RX worker's burst has found it since.

    RX worker: move all of the slot queue into the lists, then forget this listener's (`pcb/slots.forget`).
    Continuation worker: give no slot back to it from now on, and reset the connections in its lanes that
    nobody has accepted. Obeyed at once: what is being reset ends later (`Freed`).
    """

    listener: int


class Abandon(Message, frozen=True):
    """Continuation worker: this consumer's process is gone, its listeners are closed. Connections that it had
    closed go on to their end, for a bounded time; all others are reset. Obeyed at once: each ends with `Freed`."""

    consumer: int


class Reset(Message, frozen=True):
    """Continuation worker: reset this connection, whose slot says so already. It ends with `Freed`."""

    pcb: int


class Stop(Message, frozen=True):
    """Leave after the current burst."""


Order = Map | Unmap | Adopt | Release | Listen | Forget | Unlisten | Abandon | Reset | Stop


# -- reports -----------------------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """The worker is about to take its first step."""


class Obeyed(Message, frozen=True):
    """So many orders were carried out since the dataplane was started."""

    orders: int


class Ended(Message, frozen=True):
    """All netif queues of this worker have come to their end."""


class Want(Message, frozen=True):
    """RX worker: a listener, one with PCB_WANT set, is short of free slots."""


class Freed(Message, frozen=True):
    """Continuation worker: these PCBs, at most FREED_MAX, belonged to connections that are over and whose listener
    is closed or never was. They are out of the table, every worker has passed the epoch, their lanes are empty,
    and the slots are not touched any more. Their PCB_STATE is PCB_CLOSING: PCB_SLOT is one in a worker's queue
    or list."""

    pcbs: list[int]


class Failed(Message, frozen=True):
    """The worker cannot go on."""

    problem: str


Report = Ready | Obeyed | Ended | Want | Freed | Failed

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
