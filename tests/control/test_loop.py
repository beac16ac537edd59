"""The supervisor's loop: descriptors, timers, and what coroutines wait for."""

from __future__ import annotations

import socket

from dataplane.control.loop import Loop


def test_timers_ring_in_order_and_again() -> None:
    loop, rung = Loop(), []
    loop.later(0.02, lambda: rung.append("late"))
    loop.later(0.0, lambda: rung.append("early"))
    loop.later(0.001, lambda: rung.append("again") or (rung.count("again") == 3 and loop.stop()), every=0.001)
    loop.run()
    assert rung[0] == "early" and rung.count("again") == 3 and "late" not in rung


def test_descriptors_are_watched_until_they_are_not() -> None:
    loop, heard = Loop(), []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        def hear() -> None:
            heard.append(ours.recv(1))
            loop.watch(ours.fileno())
            theirs.send(b"b")
            loop.later(0.01, loop.stop)

        loop.watch(ours.fileno(), hear)
        theirs.send(b"a")
        loop.run()
        assert heard == [b"a"]
        loop.watch(ours.fileno(), None, lambda: (heard.append(b"w"), loop.stop()))
        loop.run()
        assert heard == [b"a", b"w"]


def test_conditions_are_waited_for_and_given_up() -> None:
    loop, told, words = Loop(), [], {"passed": False}

    async def wait(name: str, within: float | None) -> None:
        told.append((name, await loop.until(lambda: words["passed"], within)))

    async def at_once() -> None:
        told.append(("at once", await loop.until(lambda: True)))

    def pass_() -> None:
        words["passed"] = True
        loop.later(0.06, loop.stop)

    loop.spawn(wait("patient", None))
    loop.spawn(wait("hasty", 0.0))
    loop.spawn(at_once())
    assert told == [("at once", True)]
    loop.later(0.02, pass_)
    loop.run()
    assert told == [("at once", True), ("hasty", False), ("patient", True)]


def test_a_task_may_spawn_another() -> None:
    loop, told = Loop(), []

    async def second() -> None:
        await loop.until(lambda: len(told) == 1)
        told.append("second")
        loop.stop()

    async def first() -> None:
        loop.spawn(second())
        await loop.until(lambda: True)
        told.append("first")

    loop.spawn(first())
    loop.run()
    assert told == ["first", "second"]
