"""A real continuation worker in a process of its own: it sleeps, it is woken, and killing it loses nothing."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from dataplane.jit import warm
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.bell import new_bell
from tests.kcont.rig import SECOND, TX, Rig, now
from workers import continuation, orders, process, rx

GONE = T.REQ_CLOSED | T.REQ_SHUTDOWN
WATCHDOG = 20.0


class Post:
    """The supervisor's side: starts a continuation worker, hears it, kills it, replaces it."""

    def __init__(self, rig: Rig) -> None:
        warm([continuation, rx])
        self.rig = rig
        self.doorbell, self.rope = new_bell()
        self.door0, self.rope0 = new_bell()
        rig.put(rig.table.offset + L.T_KCONT_ROPE, self.rope)
        self.pid = 0
        self.stamp = 1000
        self.freed: list[int] = []
        self.obeyed = self.ordered = 0
        self.ready = False

    def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.stamp += 1
        self.ready = False
        config: Any = SimpleNamespace(sockets=SimpleNamespace(tx_ring_bytes=TX), cores=[])
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            continuation.work(continuation.ContinuationPost(
                self.rig.arena, self.rig.table, config, self.stamp, parent, theirs, self.doorbell, self.ordered,
                self.rig.home, self.rope0, []), lambda: None)
        theirs.close()
        self.channel = ours
        self.obeyed = self.ordered

    def hear(self) -> None:
        while True:
            try:
                data = self.channel.recv(orders.MAX_ORDER)
            except (BlockingIOError, ConnectionError):
                return
            if not data:
                return
            match orders.decode_report(data):
                case orders.Ready():
                    self.ready = True
                case orders.Freed(pcbs=numbers):
                    self.freed += numbers
                case orders.Obeyed(orders=count):
                    self.obeyed = count
                case orders.Failed(problem=problem):
                    raise AssertionError(problem)

    def order(self, order: orders.Order) -> None:
        self.ordered += 1
        self.channel.send(orders.encode(order))
        process.post_mail(self.rig.mem, self.rig.table.worker(self.rig.table.workers))
        self.wait(lambda: self.obeyed == self.ordered)

    def wait(self, condition: Any) -> None:
        end = time.monotonic() + WATCHDOG
        while not condition():
            self.hear()
            self.rig.take()
            assert time.monotonic() < end, "the watchdog"
            time.sleep(0.001)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
            self.hear()                 # its last words
            self.channel.close()
            continuation.mourn(self.rig.table, self.stamp)

    def close(self) -> None:
        self.kill()
        for descriptor in (self.doorbell, self.rope, self.door0, self.rope0):
            os.close(descriptor)


@pytest.fixture
def post() -> Iterator[Post]:
    made = Post(Rig(slots=24, time_wait=24))
    made.start()
    made.wait(lambda: made.ready)
    yield made
    made.close()


def words(post: Post, *names: int) -> list[int]:
    block = post.rig.table.worker(post.rig.table.workers)
    return [post.rig.get(block + name) for name in names]


def test_it_sleeps_and_is_woken(post: Post) -> None:
    rig = post.rig
    number = rig.numbers[0]
    rig.open(number, 4000, T.CLOSED, GONE)
    post.wait(lambda: rig.get(rig.table.offset + L.T_KCONT_WAKE) == L.WAKE_PIPE)
    before = words(post, L.W_STEPS)[0]
    time.sleep(0.6)
    assert words(post, L.W_STEPS)[0] - before <= 4         # it wakes for nothing, twice a second at most
    rig.schedule(number)                            # it sleeps without an end: so it is woken
    post.wait(lambda: rig.state(number) == L.PCB_SLOT)
    assert rig.pop_all() == [number]
    rig.open(number, 4000, T.CLOSED, GONE)
    deadline = now() + 50_000_000
    rig.schedule(number, deadline)
    post.wait(lambda: rig.state(number) == L.PCB_SLOT)
    assert now() >= deadline


def test_orders(post: Post) -> None:
    rig = post.rig
    first, second = rig.numbers[:2]
    rig.open(first, 4000)
    rig.open(second, 4001, T.CLOSED, GONE)
    post.order(orders.Release(7))                   # not for it
    post.order(orders.Abandon(7))
    post.wait(lambda: len(post.freed) == 2)
    assert sorted(post.freed) == [first, second]
    assert [number for number, flags in rig.sent() if flags & T.RST] == [first]
    post.order(orders.Unlisten(rig.listener))
    rig.open(rig.numbers[2], 4002)
    os.kill(post.pid, signal.SIGTERM)
    _, status = os.waitpid(post.pid, 0)
    post.pid = 0
    assert status == 0


def test_it_leaves_when_the_supervisor_is_gone(post: Post) -> None:
    post.channel.close()
    _, status = os.waitpid(post.pid, 0)
    post.pid = 0
    post.channel = socket.socketpair()[0]
    assert status == 0


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.stress)])
def test_killing_it_loses_no_connection(post: Post, seed: int) -> None:
    """Slots go round: opened, over, given back, while the worker is killed at whatever it does."""
    rig, rng = post.rig, random.Random(seed)
    rig.put(rig.table.offset + L.T_TIME_WAIT_NS, SECOND // 50)
    everyone, used = set(rig.numbers), set()
    free, port, kills, rounds = list(rig.numbers), 1024, 0, 0
    until = time.monotonic() + 6
    while time.monotonic() < until or used:
        for number in free:
            port = port + 1 if port < 60000 else 1024
            state = rng.choice([T.CLOSED, T.TIME_WAIT, T.ESTABLISHED])
            rig.open(number, port, state, GONE | (T.REQ_ABORT if state == T.ESTABLISHED else 0))
            used.add(number)
            rig.schedule(number, now() + rng.choice([0, 0, 1_000_000, 3_000_000]))
        rig.busy()                      # a burst, and the quiescent state behind it
        rig.sent()
        free = rig.pop_all()
        assert len(free) == len(set(free)) and set(free) <= used, "a slot came back twice"
        used -= set(free)
        rounds += len(free)
        if time.monotonic() > until:
            free = []
        elif post.ready and rng.random() < 0.1:
            post.kill()
            kills += 1
            post.start()
        post.hear()
        time.sleep(rng.choice([0, 0.0003, 0.001]))
        assert time.monotonic() < until + WATCHDOG, f"lost: {[(n, rig.state(n), rig.word(n, L.PCB_DUE)) for n in used]}"
    assert kills > 5 and rounds > 100 and post.freed == []
    rig.idle()
    post.wait(lambda: all(rig.state(entry) == L.PCB_FREE for entry in range(rig.table.ordinary, rig.table.sockets)))
    assert everyone == set(rig.numbers)
