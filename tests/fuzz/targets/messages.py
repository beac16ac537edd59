"""Control messages, as the supervisor decodes them from a consumer, and a consumer from the supervisor.

Not coverage-guided: the decoder is msgspec's, in C. What an input shows is the class of the answer: the message's type
and which of its fields have other values than their defaults, or the sentence of the refusal without numbers and names.

    anything is a message or msgspec.DecodeError, which ends the connection (control/server.py); nothing else is raised
    a message's fields have the types that are declared, and encoding it gives one that decodes to the same
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from dataplane.control import messages as M
from tests.fuzz.engine import Input
from tests.fuzz.mutation import mutate_bytes
from tests.fuzz.targets.captures import hash_of

__all__ = ["Messages"]

_VALUES = (None, True, 0, -1, 1, 1 << 31, 1 << 63, (1 << 64) - 1, -(1 << 63), 1.5, "", "udp", "tap", "\0", "x" * 300,
           b"", b"x", [], [1, 2], [[1, 2]], {}, {"": 1}, ["10.0.0.1", 53], "10.0.0.1", "::1")
_TEXT = re.compile(r"[0-9]+|`[^`]*`|'[^']*'")


class Messages:
    name = "messages"

    def seeds(self) -> Iterable[Input]:
        requests = [
            M.Attach(1, 5), M.Bind("udp", "10.0.0.1", 53, ("10.0.0.2", 53), 17, True, 65536), M.Bind("tcp_listen"),
            M.SegmentOf(1), M.Close(1, 2), M.SetWake([(1, 2), (3, 4)], -1), M.Event(), M.Stats(), M.Sockets(3)]
        netif = M.NetifInfo("dp0", "tun", 1500, False, ["10.0.0.1/24"], [])
        home = M.Segment(1, 4096, None)
        replies = [
            M.Attached("a", 1, 2, 3, home, 4, 5, 6, [netif]), M.Bound(1, 2, 3, 4, 5, "::", 6, home), M.Given(home),
            M.Evented(1), M.Done(), M.Ledger({"offered": 1}), M.SocketList([], -1), M.Failure(13, "no")]
        return [(M.encode(one),) for one in (*requests, *replies)]

    def mutate(self, dice: random.Random, one: Input, other: Input) -> Input:
        try:
            value = msgspec.msgpack.decode(one[0])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            value = None
        if isinstance(value, dict) and value and dice.random() < 0.6:
            key = dice.choice([*value, "type", "extra"])
            value[key] = dice.choice(_VALUES)
            if dice.random() < 0.3:
                del value[dice.choice([*value])]
            return (msgspec.msgpack.encode(value),)
        if dice.random() < 0.02:
            return (b"\x91" * dice.choice((10, 500, 5000, 60_000)) + one[0],)
        return (mutate_bytes(dice, one[0], other[0], (0x80, 0xC0, 0xC1, 0xD4, 0xDC, 0xDD, 0xDE, 0xDF, 0xFFFF)),)

    def run(self, one: Input) -> set[int]:
        data = one[0][:M.MAX_MESSAGE]
        return {_answer(M.decode_request, data), _answer(M.decode_reply, data) + 1}


def _answer(decode: Any, data: bytes) -> int:
    try:
        message = decode(data)
    except msgspec.DecodeError as error:
        return hash_of(_TEXT.sub("", str(error)))
    assert isinstance(message, M.Message)
    assert decode(M.encode(message)) == message or "nan" in repr(message)
    fields = msgspec.structs.asdict(message)
    assert msgspec.convert(msgspec.to_builtins(message), type(message)) == message or "nan" in repr(message)
    return hash_of(type(message).__name__ + "".join(name for name, value in fields.items() if value))
