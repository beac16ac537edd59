"""Every parser meets anything: see tests/fuzz/targets for what holds, tests/fuzz/engine.py for how inputs are made.

`make test` runs the corpus and some new inputs of each target, always the same ones. `make soak` goes on for
DATAPLANE_FUZZ_SECONDS (60) with the seed DATAPLANE_FUZZ_SEED (2); its figures are printed with pytest's -s. For hours:

    DATAPLANE_FUZZ_SECONDS=3600 DATAPLANE_FUZZ_SEED=$RANDOM pytest -m stress -s tests/fuzz

A failure names the line that belongs into tests/fuzz/corpus/TARGET.hex.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dataplane.control import messages
from dataplane.inet import step
from tests import bed as beds
from tests.bed import Frame
from tests.children import Child
from tests.control import test_server
from tests.fuzz import engine
from tests.fuzz.bed import FuzzBed
from tests.fuzz.engine import Failed, Input, Target, campaign
from tests.fuzz.mutation import mutate_bytes
from tests.fuzz.targets.captures import Captures
from tests.fuzz.targets.connection import Connection
from tests.fuzz.targets.endpoint import Endpoint, Segments
from tests.fuzz.targets.messages import Messages
from tests.fuzz.targets.passive import Copied, Passive
from tests.fuzz.targets.settings import Settings
from tests.fuzz.tracing import OutOfBounds, shared_world

SECONDS = float(os.environ.get("DATAPLANE_FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("DATAPLANE_FUZZ_SEED", "2"))
SHORT: dict[Callable[[], Target], int] = {
    Passive: 400, Copied: 200, Endpoint: 400, Segments: 400, Connection: 300, Captures: 400, Messages: 3000,
    Settings: 300,
}


@pytest.fixture(scope="module", autouse=True)
def world() -> None:
    """Loaded and compiled here, so that each target's process has it already."""
    step.step.compile()
    shared_world()


@pytest.mark.parametrize("target", SHORT, ids=lambda target: target.name)
def test_corpus_and_new_inputs(target: Callable[[], Target]) -> None:
    report = campaign(target, 1, inputs=SHORT[target])
    print(report)
    assert report.inputs >= SHORT[target] and report.kept >= len(engine.corpus(report.target)) > 0


@pytest.mark.stress
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("target", SHORT, ids=lambda target: target.name)
def test_new_inputs_for_long(target: Callable[[], Target]) -> None:
    print(campaign(target, SEED, seconds=SECONDS))


def test_a_server_outlives_the_corpus(tmp_path: Path) -> None:
    """Every message of the corpus gets one answer, whatever it says, and others are served as before."""
    rig = test_server.Rig(tmp_path / "socket")
    try:
        for (data,) in engine.corpus(Messages.name):
            with rig.connect() as connection:
                connection.send(data)
                messages.decode_reply(connection.recv(messages.MAX_MESSAGE))
        with rig.connect() as connection:
            connection.send(messages.encode(messages.Sockets(9)))
            assert messages.decode_reply(connection.recv(messages.MAX_MESSAGE)) == messages.SocketList([], 9)
    finally:
        rig.close()


# -- the fuzzer itself: what cannot fail proves nothing -------------------------------------------------------


class Word:
    """Fails on what begins with FUZZ; shows how much of that an input has."""

    name = "word"
    shown = True

    def seeds(self) -> Iterable[Input]:
        return [(b"aaaaaaaa",)]

    def mutate(self, dice: random.Random, one: Input, other: Input) -> Input:
        return (mutate_bytes(dice, one[0], other[0], tuple(range(256))),)

    def run(self, one: Input) -> set[int]:
        common = next((i for i, letter in enumerate(b"FUZZ") if one[0][i:i + 1] != bytes([letter])), 4)
        assert common < 4
        return set(range(common + 1)) if self.shown else set()


class Blind(Word):
    shown = False


class Endless(Word):
    def run(self, one: Input) -> set[int]:
        while True:
            pass


def test_what_an_input_shows_leads_to_the_next() -> None:
    with pytest.raises(Failed, match=r"seed 3: the target failed\ncorpus line: 46555a5a"):
        campaign(Word, 3, inputs=100_000)
    assert campaign(Blind, 3, inputs=100_000).kept == 1


def test_a_hang_is_told_with_its_input() -> None:
    with pytest.raises(Failed, match=r"the target hung\ncorpus line: 6161616161616161$"):
        campaign(Endless, 1, inputs=1, hang=0.2)


class Lying(FuzzBed):
    """Its netif says that frames are longer than they are."""

    def _offer(self, frames: object) -> None:
        super()._offer(frames)      # type: ignore[arg-type]
        length = self.get(self.nif + beds._INDEX) + 8
        self.put(length, self.get(length) + 40)


HEADER = Frame(bytes(12) + b"\x08\x00")


def test_a_byte_behind_the_frame_is_out_of_bounds() -> None:
    bed = Lying(shared_world(), passive=True)
    bed.freeze()
    with pytest.raises(OutOfBounds):
        bed.plain([HEADER])
    with Child(lambda: bed.compiled([HEADER])) as child:
        assert child.join() == -11


def test_a_lost_frame_breaks_the_identity() -> None:
    bed = FuzzBed(shared_world(), passive=True)
    bed.freeze()
    assert bed.plain([HEADER]).reasons == bed.compiled([HEADER]).reasons == {"truncated": 1}
    bed._row = dataclasses.replace(bed._row, delivered=bed._row.delivered - 1)
    with pytest.raises(AssertionError):
        bed.plain([HEADER])
