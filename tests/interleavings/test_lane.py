"""The lane's own source, and what a worker does with it in a burst, in every order: a producer, a consumer, and the
producer's replacement, for it may die between any two stores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dataplane.inet import deliver, step
from dataplane.rings import lane as module
from dataplane.shm import layout as L
from tests.interleavings.explorer import DEAD, MODELS, End, Explorer
from tests.interleavings.source import Ordering, actors, orderings

TABLE, W, PCBS, STATE, LANE, DIRTY, PACKETS = (10_000 * i for i in range(7))
DONE = 70_000       # the producer's own: packets whose publication it has seen the end of
MARK = 100          # of a packet's bytes, which are one word here: MARK + its number

Bursts = tuple[tuple[int, ...], ...]
PLENTY = ((1, 2), (3,))     # a packet more than the ring has room for


class Lane:
    """A socket's lane, its producer and its consumer. `records` of `length` bytes fit the ring, and a half."""

    def __init__(self, weaken: Ordering | None = None, *, padded: bool = False) -> None:
        self.length, size = (17, 128) if padded else (8, 64)    # records of 48 bytes, of 32
        self.mask = size - 1
        constants = {
            W + L.W_TABLE: TABLE, W + L.W_LANES: STATE, W + L.W_DIRTY: DIRTY, TABLE + L.T_PCBS: PCBS,
            TABLE + L.T_SOCKETS: 1, PCBS + L.PCB_STATE: L.PCB_OPEN, STATE + L.LS_BASE: LANE,
            STATE + L.LS_MASK: self.mask, STATE + L.LS_WAKE: 0,
            **{PACKETS + 8 * number: MARK + number for number in range(100)},
        }
        self.of = actors(module, constants=constants, weaken=weaken)
        awake = SimpleNamespace(online=_nothing, offline=_nothing)      # test_epoch.py has these
        self.deliver = actors(deliver, constants=constants, weaken=weaken, use=self.of)
        self.step = actors(step, constants=constants, weaken=weaken,
                           use=SimpleNamespace(**vars(self.of), **vars(awake)))

    def producer(self, bursts: Bursts) -> Any:
        """Stages and publishes burst by burst; the numbers of the packets for which there was room."""
        accepted: list[int] = []
        for burst in bursts:
            # The netif is asked for frames: a call through a pointer, over which the compiler moves no store.
            yield ("fence",)
            for number in burst:
                if (yield from self.deliver.stage(None, W, STATE, 0, number, PACKETS + 8 * number, self.length)) == 1:
                    accepted.append(number)
            yield from self.deliver.publish_lanes(None, W, 0)
            yield "release", DONE, len(accepted)
        return tuple(accepted)

    def replacement(self, bursts: Bursts) -> Any:
        yield "dead", "producer"
        yield from self.step.recover(None, W)
        return (yield from self.producer(bursts))

    def consumer(self, sweeps: int, position: int = 0) -> Any:
        """Takes what there is, so many times; for each packet its length, and which of its reads have its time and
        its bytes; and where it stands."""
        taken = []
        for _ in range(sweeps):
            head = yield from self.of.lane_peek(None, LANE)
            packets, tail = 0, position
            while (position := (yield from self.of.lane_next(None, LANE, self.mask, position, head))) < head:
                record = LANE + L.LANE_DATA + (position & self.mask)
                length = (yield "load", record + L.RECORD_WORD) & 0xFFFFFF
                time = yield "read", record + L.RECORD_TIME
                data = yield "read", record + L.RECORD_DATA
                taken.append((length, time, data))
                position += yield from self.of.record_bytes(length)
                packets += 1
            if position != tail:
                yield from self.of.lane_release(None, LANE, position, packets)
        return tuple(taken), position

    def numbers(self, taken: Any, reads: Any) -> list[int]:
        """Numbers of the packets taken, -1 for one that is not whole."""
        return [reads[time] if length == self.length and reads[data] == MARK + reads[time] else -1
                for length, time, data in taken]

    def all_taken(self, end: End) -> tuple[list[int], Any]:
        """What the consumer took, and takes now that everybody else is ready; and memory then."""
        taken, position = end.results["consumer"]
        ends: list[End] = []
        Explorer(end.memory, {"rest": lambda: self.consumer(1, position)}, ends.append, model="sc")
        rest, _ = ends[0].results["rest"]
        return self.numbers(taken, end.reads["consumer"]) + self.numbers(rest, ends[0].reads["rest"]), ends[0].memory


def _nothing(*args: Any) -> Any:
    yield from ()


def explore(lane: Lane, *, model: str, sweeps: int = 2, bursts: Bursts = PLENTY,
            heirs: Bursts = (), stop: bool = False) -> Explorer:
    """All orders; with `heirs` the producer may die, and its replacement goes on with these. Outcomes: what went
    wrong, "" for nothing. `stop`: at the first."""
    parts: dict[str, Any] = {"producer": lambda: lane.producer(bursts), "consumer": lambda: lane.consumer(sweeps)}
    if heirs:
        parts["replacement"] = lambda: lane.replacement(heirs)

    def judge(end: End) -> str:
        taken, memory = lane.all_taken(end)
        counted = memory.get(STATE + L.LS_COUNT, 0), memory.get(LANE + L.LANE_CONSUMED, 0)
        if end.results["producer"] == DEAD:
            old = [number for burst in bursts for number in burst]
            new = list(end.results["replacement"])
            survived = len(taken) - len(new)
            if survived < end.memory.get(DONE, 0) - len(new) or taken != old[:max(survived, 0)] + new:
                return f"after the death: {taken} with {new}"
        elif taken != list(end.results["producer"]):
            return f"{taken} of {end.results['producer']}"
        return "" if counted == (len(taken), len(taken)) else f"{taken}, but counted {counted}"

    return Explorer({}, parts, judge, model=model, mortal=("producer",) if heirs else (),
                    bad=bool if stop else None)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_packets_arrive_whole_and_in_order(padded: bool, model: str) -> None:
    found = explore(Lane(padded=padded), model=model)
    assert set(found.outcomes) == {""}


@pytest.mark.parametrize("model", ["tso", "weak"])
def test_a_producer_dies_anywhere(model: str) -> None:
    found = explore(Lane(), model=model, bursts=((1,),), heirs=((11,),), sweeps=1)
    assert set(found.outcomes) == {""}


CHECKS = (
    lambda lane: explore(lane, model="weak", stop=True),
    lambda lane: explore(lane, model="weak", bursts=((1,), (2,)), heirs=((11,),), sweeps=0, stop=True),
    lambda lane: explore(lane, model="weak", bursts=((1,),), heirs=((),), sweeps=1, stop=True),
)
CLAIMS = [*orderings(module), *orderings(deliver, "_mark_dirty", "stage"), *orderings(step, "recover")]
NEEDLESS = {
    # Only stores stand behind it that a branch on what it found decides about, and no processor makes a store before
    # it knows that it will be made. It is for the compiler.
    "lane._refresh_tail: load_acquire is plain",
    # Whoever recovers was forked after the dead one was reaped: the kernel orders that.
    "lane.lane_recover: load_acquire is plain",
    "step.recover: load_acquire is plain",
}


def fails(check: Any, claim: Ordering) -> bool:
    """Whether the check finds that this is missing."""
    return set(check(Lane(claim)).outcomes) != {""}


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_each_ordering_matters(claim: Ordering) -> None:
    assert any(fails(check, claim) for check in CHECKS) == (str(claim) not in NEEDLESS)
