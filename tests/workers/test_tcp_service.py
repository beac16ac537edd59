"""Listeners and connections of a real dataplane, without a peer: orders and reports between its processes, and
what is left when workers and consumers die in the middle."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from dataplane.config import TcpSettings
from dataplane.control import messages
from dataplane.control.wire import Connection
from dataplane.shm import layout as L
from dataplane.shm.segment import Segment
from tests.netns import Namespace
from tests.workers.rig import ROOT, Running, bind, wait_for

pytestmark = [pytest.mark.timeout(300), pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]
TUN = """
[[netif]]
kind = "tun"
device = "dp0"
addresses = ["10.77.0.1/24", "fd77::1/64"]
"""
SMALL = {"send_bytes": 4096, "receive_bytes": 4096}


@pytest.fixture(scope="module")
def dp() -> Iterator[Running]:
    with Namespace() as namespace:
        with namespace.entered():
            running = Running(TUN, cores="[0, 1]")
        with running:
            yield running
            assert running.interrupt() == 0 and running.ledger["balanced"]


@pytest.fixture
def consumer(dp: Running) -> Iterator[Connection]:
    connection, _ = dp.attach()
    with connection:
        yield connection
    wait_for(lambda: dp.sockets() == [], "the sockets' end")


def open_files(dp: Running) -> int:
    return len(os.listdir(f"/proc/{dp.process.pid}/fd"))


def close(connection: Connection, bound: messages.Bound) -> None:
    connection.request(messages.Close(bound.pcb, bound.generation), messages.Done)


def listen_somewhere(connection: Connection, **fields: Any) -> messages.Bound:
    """A listener, as soon as what was closed before has given its slots back."""
    def attempt() -> messages.Bound | None:
        try:
            return bind(connection, kind="tcp_listen", **({"port": 0} | SMALL | fields))
        except OSError as error:
            assert error.errno == errno.ENOBUFS
            return None

    found: list[messages.Bound | None] = []
    wait_for(lambda: found.append(attempt()) or found[-1], "room for a listener")
    assert found[-1] is not None
    return found[-1]


def test_sockets_as_ss_shows_them(dp: Running, consumer: Connection) -> None:
    listener = bind(consumer, kind="tcp_listen", address="10.77.0.1", port=80, backlog=3, **SMALL)
    opened = bind(consumer, kind="tcp_connect", remote=("fd77::2", 81), **SMALL)
    command = [sys.executable, "-m", "dataplane", "ss", dp.name]
    listed = json.loads(subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, check=True).stdout)
    assert [(one["pcb"], one["state"], one["local"]) for one in listed] == [
        (listener.pcb, "listen", ["10.77.0.1", 80]), (opened.pcb, "closed", ["fd77::1", opened.port])]
    assert listed[0]["backlog"] == 3 and listed[1]["connection"]["send_bytes"] == 4096
    shown = subprocess.run([*command, "--tcp"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert "[fd77::2]:81" in shown and "cwnd" in shown and ":80" not in shown


def test_segments_are_given_to_their_owner(dp: Running, consumer: Connection) -> None:
    opened, [descriptor] = consumer.request(
        messages.Bind("tcp_connect", remote=("10.77.0.2", 80), **SMALL), messages.Bound)
    with open(descriptor, "rb"):
        given, [again] = consumer.request(messages.SegmentOf(opened.number), messages.Given)
        segment = Segment.from_fd(again)
        assert (segment.kind, segment.size) == (L.SEG_CONNECTIONS, given.segment.bytes)
        assert os.fstat(descriptor).st_ino == os.fstat(segment.fd).st_ino
        segment.close()
    other, _ = dp.attach()
    with other, pytest.raises(OSError) as refused:
        other.request(messages.SegmentOf(opened.number), messages.Given)
    assert refused.value.errno == errno.EBADF


def test_a_connection_whose_opening_was_interrupted(dp: Running, consumer: Connection) -> None:
    """The continuation worker ends it, and its slot is used again."""
    first = bind(consumer, kind="tcp_connect", remote=("10.77.0.2", 80), **SMALL)
    close(consumer, first)
    wait_for(lambda: dp.sockets() == [], "the connection's end")
    again = bind(consumer, kind="tcp_connect", remote=("10.77.0.2", 80), **SMALL)
    assert (again.number, again.slot) == (first.number, first.slot)
    close(consumer, again)


def test_consumers_know_how_long_time_wait_is(dp: Running) -> None:
    connection, attached = dp.attach()
    with connection:
        assert attached.time_wait_ns == int(TcpSettings().time_wait * 1e9)


def test_slots_of_closed_listeners_are_used_again(dp: Running, consumer: Connection) -> None:
    """A listener takes at most half of the 256 sockets for its slots; fifty come and go."""
    before = open_files(dp)
    for _ in range(50):
        close(consumer, listen_somewhere(consumer))
    wait_for(lambda: dp.sockets() == [], "the listeners' end")
    assert open_files(dp) <= before + 16


def test_consumers_that_vanish_leave_nothing(dp: Running) -> None:
    before = open_files(dp)
    for _ in range(12):
        connection, _ = dp.attach()
        with connection:
            listen_somewhere(connection, port=80, reuseport=True)
            bind(connection, kind="tcp_connect", remote=("10.77.0.2", 80), **SMALL)
    wait_for(lambda: dp.sockets() == [], "the sockets' end")
    wait_for(lambda: open_files(dp) <= before, "their memory's end")


@pytest.mark.parametrize("which", ["RX worker", "continuation worker"])
def test_workers_that_die_while_listeners_close(dp: Running, which: str) -> None:
    """What the dead had been told and had not done is done by the replacement."""
    told = dp.stats()
    pid = told["workers"][1]["pid"] if which == "RX worker" else told["continuation"]["pid"]
    connection, _ = dp.attach()
    with connection:
        first = [listen_somewhere(connection) for _ in range(4)]
        os.kill(pid, signal.SIGSTOP)
        for one in first:
            close(connection, one)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: dp.sockets() == [], "the listeners' end")
        wait_for(lambda: len(dp.workers()) == 2 and pid not in (
            *dp.workers(), dp.stats()["continuation"]["pid"]), "the replacement")
        for _ in range(20):
            close(connection, listen_somewhere(connection))
    wait_for(lambda: dp.sockets() == [], "the sockets' end")
