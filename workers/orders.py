"""What the supervisor and its RX workers say to each other, over one socket pair per worker.

Orders go down, one datagram each, with at most one descriptor beside it; a worker carries them out in order,
between two steps, and reports how many it has done. Both ends are forked from the same process, so there is
no version and nothing to distrust; the decoding is strict all the same.
"""

from __future__ import annotations

import msgspec

MAX_ORDER = 4096


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


class Stop(Message, frozen=True):
    """Leave after the current burst."""


Order = Map | Unmap | Adopt | Release | Listen | Forget | Stop


# -- reports -----------------------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """The worker is about to take its first step."""


class Obeyed(Message, frozen=True):
    """So many orders were carried out since the dataplane was started."""

    orders: int


class Ended(Message, frozen=True):
    """All netif queues of this worker have come to their end."""


class Failed(Message, frozen=True):
    """The worker cannot go on."""

    problem: str


Report = Ready | Obeyed | Ended | Failed

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
