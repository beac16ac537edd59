"""Bells: whoever holds one end cannot make the other end's holder wait."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from dataplane.shm.bell import another_rope, new_bell, quiet, ring


@pytest.fixture
def bell() -> Iterator[tuple[int, int]]:
    ends = new_bell()
    yield ends
    for end in ends:
        os.close(end)


def make_blocking(descriptor: int) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)


def fill(descriptor: int) -> None:
    os.set_blocking(descriptor, False)
    while True:
        try:
            os.write(descriptor, bytes(4096))
        except BlockingIOError:
            return


def test_rings_are_heard_and_taken(bell: tuple[int, int]) -> None:
    listening, ringing = bell
    quiet(listening)        # nothing there: does not wait
    ring(ringing)
    ring(ringing)
    assert os.read(listening, 10) == b"\1\1"
    ring(ringing)
    quiet(listening)
    with pytest.raises(BlockingIOError):
        os.read(listening, 1)


def test_a_hostile_ringer_stops_nobody(bell: tuple[int, int]) -> None:
    """It fills the pipe and makes all that it holds blocking: the others' ends do not block."""
    listening, ringing = bell
    own = another_rope(ringing)
    try:
        fill(own)
        make_blocking(own)
        ring(ringing)
        quiet(listening)
        ring(ringing)
        assert os.read(listening, 1)
    finally:
        os.close(own)


def test_a_hostile_listener_stops_nobody(bell: tuple[int, int]) -> None:
    listening, ringing = bell
    make_blocking(listening)
    fill(ringing)
    for _ in range(3):
        ring(ringing)
    assert not os.get_blocking(ringing)


def test_nobody_listens() -> None:
    _, ringing = new_bell_without_listener()
    ring(ringing)
    os.close(ringing)


def new_bell_without_listener() -> tuple[int, int]:
    listening, ringing = new_bell()
    os.close(listening)
    return listening, ringing
