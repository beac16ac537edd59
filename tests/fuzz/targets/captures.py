"""Capture files: pcap and pcapng.

Coverage-guided: the features are the edges of netif/_pcapfile.py. For each file:

    the reader as plain Python over memory that ends with the file, what is before it watched: no byte beyond is read
    it moves on by 12 bytes or more with each call, and a damaged file has one sentence
    the compiled netif gives the same frames and the same damage
    every frame is what scapy's RawPcapReader reads at the same place, as far as both get (`_differs`)
"""

from __future__ import annotations

import contextlib
import logging
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scapy.utils import RawPcapReader

from dataplane.errors import DataplaneError
from dataplane.netif import _pcapfile, pcap
from dataplane.shm import layout as L
from tests.captures import formats, make
from tests.fuzz.engine import Input
from tests.fuzz.mutation import mutate_bytes
from tests.fuzz.tracing import Slots, TracedWorld, edges
from tests.netif.rig import Rig

__all__ = ["Captures"]

_READER, _TABLE, _BEFORE = 64, 1024, 4096
_AT = _TABLE + 64 * _pcapfile.I_BYTES + _BEFORE         # where the file stands; 64 interfaces are enough here
_WORDS = (0, 1, 2, 3, 5, 6, 9, 12, 14, 16, 20, 24, 28, 32, 101, 113, 276, 0x80, 0xBF, 0xFFFF, 0x0A0D)
STEPS = 400         # places in the source for each call, and each four bytes of options


class Captures:
    name = "captures"

    def __init__(self) -> None:
        self.world = TracedWorld()
        self.reader: Any = self.world.load("dataplane.netif._pcapfile")
        self.reader.INTERFACES_MAX = 64
        self.notes: Counter[str] = Counter()
        logging.getLogger("scapy.runtime").setLevel(logging.ERROR)      # it warns of each damaged file
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "fuzzed.pcap"

    def seeds(self) -> Iterable[Input]:
        return [(data,) for data in make.files().values() if len(data) < 3000]

    def mutate(self, dice: random.Random, one: Input, other: Input) -> Input:
        data = one[0]
        if dice.random() < 0.3:
            order, at = dice.choice("<>"), 4 * dice.randrange(len(data) // 4 + 1)
            block = dice.choice((
                formats.section(order),
                formats.interface(dice.choice((0, 1, 101, 113, 147)), order, dice.choice((0, 60)), dice.randrange(256),
                                  dice.getrandbits(40)),
                formats.block(6, struct.pack(order + "IIIII", dice.randrange(3), *(dice.getrandbits(32) for _ in "ab"),
                                             dice.randrange(12), 8) + bytes(8), order),
                formats.block(3, struct.pack(order + "I", dice.randrange(12)) + bytes(8), order),
                formats.block(dice.randrange(8), dice.randbytes(dice.randrange(40)), order)))
            return (data[:at] + block + data[at:],)
        return (mutate_bytes(dice, data, other[0], _WORDS),)

    def run(self, one: Input) -> set[int]:
        data = one[0]
        self.path.write_bytes(data)
        self.world.trace.clear()
        frames, damage = self._plain(data)
        features = edges(self.world.trace) | {hash_of(damage)}
        assert self._compiled() == (frames, damage), (frames, damage)
        self._scapy(frames, damage)
        return features

    def _plain(self, data: bytes) -> tuple[list[tuple[bytes, int, int]], str]:
        """Frames with their length on the wire and link, then the damage, "" for none."""
        try:
            header = self.reader.inspect(data[:self.reader.HEADER_BYTES])
        except ValueError as error:
            return [], str(error)
        mem = bytearray(_AT) + data
        words = {_pcapfile.F_FILE: _AT, _pcapfile.F_SIZE: len(data), _pcapfile.F_KIND: header.kind,
                 _pcapfile.F_SWAP: header.swap, _pcapfile.F_UNIT: header.unit, _pcapfile.F_LINK: header.link,
                 _pcapfile.F_TABLE: _TABLE, _pcapfile.F_BEGIN: header.begin, _pcapfile.F_POSITION: header.begin}
        for word, value in words.items():
            struct.pack_into("=q", mem, _READER + word, value)
        self.world.slots = Slots(_AT - _BEFORE, _AT + len(data), _BEFORE + len(data), ((_AT, _AT + len(data)),))
        try:
            return self._walk(mem, len(data))
        finally:
            self.world.slots = Slots()

    def _walk(self, mem: bytearray, size: int) -> tuple[list[tuple[bytes, int, int]], str]:
        def word(name: int) -> int:
            return int(struct.unpack_from("=q", mem, _READER + name)[0])

        frames = []
        for _ in range(size // 12 + 2):
            before, steps = word(_pcapfile.F_POSITION), len(self.world.trace)
            state = self.reader.next_record(mem, _READER)
            assert len(self.world.trace) - steps <= STEPS + 4 * size, "too many steps"
            if state == _pcapfile.PACKET:
                first, length = word(_pcapfile.R_FRAME), word(_pcapfile.R_LENGTH)
                assert _AT <= first <= first + length <= len(mem) and 0 <= length <= word(_pcapfile.R_WIRE)
                frames.append((bytes(mem[first:first + length]), word(_pcapfile.R_WIRE), word(_pcapfile.R_LINK)))
                self.reader.advance(mem, _READER)
            elif state != _pcapfile.SKIPPED:
                return frames, "" if state == _pcapfile.END else f"damage {-state}"
            assert word(_pcapfile.F_POSITION) >= before + 12
        raise AssertionError("it does not end")

    def _compiled(self) -> tuple[list[tuple[bytes, int, int]], str]:
        try:
            rig = Rig(pcap, None, 1, path=str(self.path), pace="fast")
        except DataplaneError as error:
            assert str(error).startswith(f"{self.path}: ") and "\n" not in str(error)
            return [], str(error).removeprefix(f"{self.path}: ")
        frames = []
        with rig:
            while (given := rig.rx()) > 0:
                frames += [(one.data, one.wire, one.link) for one in map(rig.frame, range(given))]
                rig.done(given)
            if given == L.NIF_ENDED:
                return frames, ""
            assert given == L.NIF_FAILED and rig.word(L.N_ERROR_AT) == len(frames) + 1
            sentence = rig.netif.error(0)
            assert sentence and sentence.startswith(f"{self.path}: ") and "\n" not in sentence
            return frames, f"damage {rig.word(L.N_ERROR)}"

    def _scapy(self, frames: list[tuple[bytes, int, int]], damage: str) -> None:
        found: list[tuple[bytes, int]] = []
        try:
            with contextlib.closing(RawPcapReader(str(self.path))) as reader:
                for data, meta in reader:
                    found.append((data, meta.wirelen))
        except Exception:       # scapy's own, of any kind
            self.notes["taken by us, refused by scapy"] += not damage
        self.notes["taken by both"] += not damage and len(found) == len(frames)
        self.notes["frames compared"] += min(len(frames), len(found))
        for ours, theirs in zip(frames, found, strict=False):
            assert _differs(ours, theirs) or (ours[0], ours[1]) == theirs, (ours, theirs)


def _differs(ours: tuple[bytes, int, int], theirs: tuple[bytes, int]) -> bool:
    """Where we read otherwise on purpose: a packet is not shorter on the wire than what was captured of it."""
    return ours[0] == theirs[0] and theirs[1] < len(ours[0]) == ours[1]


def hash_of(text: str) -> int:
    """A feature: the kind of a sentence, the same in every process."""
    return sum(ord(letter) << i % 24 for i, letter in enumerate(text) if not letter.isdigit()) << 44
