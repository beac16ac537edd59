"""No order of steps lets a worker sleep on a record in a transmit lane: a consumer that sends, the worker that
transmits for it, and the deaths of both.

The source is the client's, the worker's step's and its sleep's own; the pipe of the doorbell is a word with a sleeper
here, and the network a list of what was read.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dataplane.client import transmit as client
from dataplane.inet import step, tcp_continue
from dataplane.inet import transmit as worker
from dataplane.kcont import area as K
from dataplane.rings import lane
from dataplane.shm import layout as L
from tests.interleavings.explorer import DEAD, MODELS, STUCK, End, Explorer
from tests.interleavings.source import Ordering, actors, orderings
from workers import duty

TABLE, W, HOME, TX, PRIVATE, HOMES, IDS, KCONT = (10_000 * i for i in range(1, 9))
LANE, BELL = HOME + L.HOME_TX, 90_000
RING, LENGTH = 64, 8            # two records of 32 bytes
OLD = (91, 92)                  # what a full ring has in it
FULL = dict.fromkeys((TX + L.LS_HEAD, TX + L.LS_PUBLISHED, LANE + L.LANE_HEAD), RING)
FULL |= {LANE + L.LANE_DATA + 32 * i + L.RECORD_WORD: LENGTH for i in range(2)}
FULL |= {LANE + L.LANE_DATA + 32 * i + L.RECORD_DATA: OLD[i] for i in range(2)}
CONSTANTS = {
    TX + L.LS_BASE: LANE, TX + L.LS_MASK: RING - 1, TX + client._SLEEPING: HOME + L.HOME_SLEEPING,
    TX + client._DOORBELL: BELL, W + L.W_TABLE: TABLE, W + L.W_CONSUMER_COUNT: 1, W + L.W_CONSUMERS: HOMES, HOMES: HOME,
    W + L.W_CONSUMER_IDS: IDS, IDS: 1, W + L.W_TX_LANES: PRIVATE, TABLE + L.T_TX_RING: RING, W + L.W_MAILBOX: 0,
    KCONT + L.W_KCONT: KCONT, KCONT + K.K_LANE: TX, KCONT + K.K_SLEEPING: HOME + L.HOME_SLEEPING,
    KCONT + K.K_ROPE: BELL,
}


def _ring(mem: None, bell: int, at: int, size: int) -> Any:
    """write(2) to the pipe."""
    yield "exchange", bell, 1
    yield "unpark", bell


def _nap(mem: None, w: int, fds: int, timeout: int) -> Any:
    """ppoll(2) and read(2) of the pipe. It never times out here."""
    if (yield "park", BELL, 0):
        yield "parked", BELL
    yield "exchange", BELL, 0
    return 1


def _send(mem: None, w: int, body: int, length: int, consumer: int) -> Any:
    yield "read", body
    return 0


def _nothing(*args: Any) -> Any:
    yield from ()


def _for_ever(mem: None, w: int) -> Any:
    """No netif, no timer: nothing but a doorbell ends the sleep."""
    yield from ()
    return -1


class Doorbell:
    """Both sides as actors."""

    def __init__(self, weaken: Ordering | None = None, *changes: tuple[str, str]) -> None:
        def of(module: Any, *changes: tuple[str, str], **use: Any) -> Any:
            return actors(module, *changes, constants=CONSTANTS, weaken=weaken, use=SimpleNamespace(**use))

        self.lane = of(lane)
        ring = vars(self.lane)
        self.kcont = of(tcp_continue, **ring, write=_ring)
        self.client = of(client, **ring, write=_ring)
        self.transmit = of(worker, **ring, _send=_send)
        awake = of(step, *changes, **ring, _read_clock=_nothing, _wait=_for_ever, online=_nothing, offline=_nothing)
        self.duty = of(duty, _may_sleep=awake.may_sleep, _woke=awake.woke, _nap=_nap)

    def consumer(self, records: int) -> Any:
        """Sends 1, 2, ...; which of them there was room for."""
        sent = []
        for number in range(1, records + 1):
            yield "store", TX + client.TX_BODY, number
            if (yield from self.client.transmit(None, TX, LENGTH)):
                sent.append(number)
        return tuple(sent)

    def continuation(self, records: int) -> Any:
        """The same, as the continuation worker does it."""
        sent = []
        for number in range(1, records + 1):
            yield "store", TX + client.TX_BODY, number
            if (yield from self.lane.lane_stage(None, TX, 0, 0, TX + client.TX_BODY, LENGTH)) == 1:
                sent.append(number)
                yield from self.kcont._flush(None, KCONT)
        return tuple(sent)

    def worker(self) -> Any:
        """Transmits and sleeps for ever."""
        while True:
            if not (yield from self.transmit.transmit(None, W)):
                yield from self.duty._rest(None, W, 0)

    def replacement(self) -> Any:
        """Goes on where the dead worker released the lane, as add_consumer does."""
        yield "dead", "worker"
        yield "store", PRIVATE, (yield "load", LANE + L.LANE_TAIL)
        yield from self.worker()

    def supervisor(self) -> Any:
        """Tells the worker that its consumer is dead."""
        yield "dead", "consumer"
        yield from _ring(None, BELL, 0, 0)


def explore(weaken: Ordering | None = None, *changes: tuple[str, str], model: str = "weak", records: int = 1,
            kcont: bool = False, full: bool = False, mortal: str = "", stop: bool = True) -> Explorer:
    """Outcomes: "" if the worker has taken all that was published when nothing more happens, else what it was."""
    doorbell = Doorbell(weaken, *changes)
    sender = doorbell.continuation if kcont else doorbell.consumer
    parts = {"consumer": lambda: sender(records), "worker": doorbell.worker}
    if mortal == "worker":
        parts["replacement"] = doorbell.replacement
    elif mortal == "consumer":
        parts["supervisor"] = doorbell.supervisor

    def judge(end: End) -> str:
        last = "replacement" if end.results["worker"] == DEAD else "worker"
        head, taken = end.memory.get(LANE + L.LANE_HEAD, 0), end.memory.get(PRIVATE, 0)
        sent = end.results["consumer"] if end.results["consumer"] != DEAD else tuple(range(1, head // 32 + 1))
        sent = OLD + sent if full else sent
        read = end.reads[last]
        whole = read == sent if last == "worker" else read == sent[len(sent) - len(read):]
        fine = end.results[last] == STUCK and taken == head and whole     # asleep, with nothing to do
        return "" if fine else f"{end.results}: {taken} of {head}, {read}"

    return Explorer(FULL if full else {}, parts, judge, model=model, mortal=(mortal,) if mortal else (),
                    bad=bool if stop else None)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kcont", [False, True], ids=["consumer", "continuation worker"])
def test_nobody_sleeps_on_a_record(kcont: bool, model: str) -> None:
    assert set(explore(model=model, kcont=kcont).outcomes) == {""}


@pytest.mark.parametrize("mortal", ["worker", "consumer"])
def test_nor_behind_a_death(mortal: str) -> None:
    assert set(explore(model="tso", mortal=mortal).outcomes) == {""}


@pytest.mark.parametrize("model", ["sc", "tso"])
def test_nor_on_a_second_one(model: str) -> None:
    assert set(explore(model=model, records=2).outcomes) == {""}


@pytest.mark.parametrize("model", ["tso", "weak"])
def test_nor_in_a_ring_that_is_full(model: str) -> None:
    assert set(explore(model=model, full=True).outcomes) == {""}


def test_a_worker_that_does_not_look_again_does() -> None:
    change = ("    if _transmit_waits(mem, w):\n", "    if False:\n")
    assert set(explore(None, change, model="sc").outcomes) != {""}


CHECKS = (explore, lambda claim: explore(claim, full=True), lambda claim: explore(claim, kcont=True))
CLAIMS = [*orderings(client, "tx_door"), *orderings(step, "may_sleep", "_transmit_waits", "_say_sleeping"),
          *orderings(worker, "_drain"), *orderings(tcp_continue, "_flush")]
NEEDLESS = {
    # Whoever clears the word rings behind that: a clear that comes late, when the worker has just said again that it
    # sleeps, is followed by the ring. It is one step to spare the bell a second one.
    "transmit.tx_door: exchange is a load and a store", "transmit.tx_door: exchange is no barrier",
    "tcp_continue._flush: exchange is a load and a store", "tcp_continue._flush: exchange is no barrier",
    # It only decides whether to sleep: records are read behind the acquire in _drain.
    "step._transmit_waits: load_acquire is plain",
}


def fails(check: Any, claim: Ordering) -> bool:
    """Whether the check finds that this is missing."""
    return set(check(claim).outcomes) != {""}


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_each_ordering_matters(claim: Ordering) -> None:
    assert any(fails(check, claim) for check in CHECKS) == (str(claim) not in NEEDLESS)
