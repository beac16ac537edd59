"""The mailbox's own source in every order of its steps: a supervisor that sends orders, a worker that is too busy to
look at anything but the word, and that worker's replacement."""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.shm import layout as L
from tests.interleavings.explorer import DEAD, MODELS, STUCK, End, Explorer
from tests.interleavings.source import Ordering, actors, orderings
from workers import process as module

W = 0
CHANNELS = (10_000, 10_008)     # orders sent so far, through the worker's channel and through its replacement's
FORKED = 10_016                 # 1 + orders whose result the replacement has inherited
ORDERS = 2


def supervisor(mailbox: Any, dies: bool) -> Any:
    """Sends orders one by one. A worker that is seen to be dead is replaced: it inherits what was ordered before, and
    has a channel of its own."""
    channel = CHANNELS[0]
    for number in range(1, ORDERS + 1):
        if dies and channel == CHANNELS[0] and (yield "choose", 2):
            channel = yield from fork(number - 1)
        yield "release", channel, number                # send(2): no more than that is relied upon
        yield from mailbox.post_mail(None, W)
    if dies and channel == CHANNELS[0]:
        yield from fork(ORDERS)


def fork(orders: int) -> Any:
    yield "dead", "worker"
    yield "release", FORKED, 1 + orders
    return CHANNELS[1]


def worker(mailbox: Any, channel: int = CHANNELS[0], obeyed: int = 0, clears_last: bool = False) -> Any:
    """Obeys all orders: spins on the word, then reads the channel until it is empty, as `_read_orders` does."""
    while obeyed < ORDERS:
        yield "nonzero", W + L.W_MAILBOX
        if not clears_last:
            yield from mailbox.take_mail(None, W)
        while (yield "acquire", channel) > obeyed:      # recv(2)
            obeyed += 1
        if clears_last:
            yield from mailbox.take_mail(None, W)
    return obeyed


def replacement(mailbox: Any) -> Any:
    """Finds the word as the dead one left it."""
    yield "nonzero", FORKED
    inherited = yield "acquire", FORKED
    return (yield from worker(mailbox, CHANNELS[1], inherited - 1))


def explore(weaken: Ordering | None = None, *, model: str = "weak", dies: bool = False, clears_last: bool = False,
            stop: bool = True) -> Explorer:
    mailbox = actors(module, weaken=weaken)
    parts: dict[str, Any] = {"supervisor": lambda: supervisor(mailbox, dies),
                             "worker": lambda: worker(mailbox, clears_last=clears_last)}
    if dies:
        parts["replacement"] = lambda: replacement(mailbox)

    def judge(end: End) -> str:
        # Whoever waits for a death that does not come is not wrong.
        last = end.results["replacement" if end.results["worker"] == DEAD else "worker"]
        waits = dies and end.results["worker"] == STUCK and end.results["supervisor"] == STUCK
        return "" if last == ORDERS or waits else f"{end.results}"

    return Explorer({}, parts, judge, model=model, mortal=("worker",) if dies else (), bad=bool if stop else None)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dies", [False, True], ids=["", "dies"])
def test_no_order_waits_unseen(dies: bool, model: str) -> None:
    assert set(explore(model=model, dies=dies).outcomes) == {""}


@pytest.mark.parametrize("model", MODELS)
def test_if_the_word_were_cleared_behind_the_channel_an_order_would(model: str) -> None:
    assert set(explore(model=model, clears_last=True).outcomes) != {""}


CLAIMS = list(orderings(module))
NEEDLESS: set[str] = set()
CHECKS = (explore,)


def fails(check: Any, claim: Ordering) -> bool:
    """Whether the check finds that this is missing."""
    return set(check(claim).outcomes) != {""}


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_each_ordering_matters(claim: Ordering) -> None:
    assert any(fails(check, claim) for check in CHECKS) == (str(claim) not in NEEDLESS)
