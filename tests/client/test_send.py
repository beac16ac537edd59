"""Sending: what stands in the transmit lane, and what is refused before."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator

import pytest

from dataplane.shm import layout as L
from tests.client.local import LocalSession, in_thread


@pytest.fixture
def local() -> Iterator[LocalSession]:
    session = LocalSession()
    yield session
    session.close()


def test_the_transmit_record(local: LocalSession) -> None:
    sock = local.open()
    assert sock.sendto(b"hello", ("10.77.0.2", 53)) == 5
    (header, payload), = local.transmitted()
    assert payload == b"hello"
    assert struct.unpack("=IIHH4xQQ", header) == (sock.bound.pcb, 7, 4, 53, 0, 0x0A4D0002)
    wildcard = local.open(address=None)
    wildcard.sendto(bytearray(b"six"), ("fd77::5", 65535, 0, 0))
    wildcard.sendto(memoryview(b"\1\0\2\0").cast("H"), ("10.77.0.255", 1))
    wildcard.sendto(b"", ("224.0.0.251", 5353))
    (six, payload6), (four, payload4), (group, empty) = local.transmitted()
    assert struct.unpack("=IIHH4xQQ", six)[2:] == (6, 65535, 0xFD77 << 48, 5)
    assert (payload6, payload4, empty) == (b"six", b"\1\0\2\0", b"")
    assert struct.unpack("=IIHH4xQQ", group)[5] == 0xE00000FB and four[8:10] == b"\4\0"


def test_a_connected_socket_needs_no_address(local: LocalSession) -> None:
    sock = local.open(remote=("10.77.0.9", 9))
    assert sock.send(b"x") == sock.sendto(b"x") == 1
    assert [struct.unpack("=IIHH4xQQ", header)[3] for header, _ in local.transmitted()] == [9, 9]
    with pytest.raises(OSError) as error:
        local.open().sendto(b"x")
    assert error.value.errno == errno.EDESTADDRREQ


@pytest.mark.parametrize(("address", "size", "number"), [
    (("10.77.0.2", 1), 65508, errno.EMSGSIZE),
    (("192.0.2.1", 1), 1, errno.ENETUNREACH),
    (("fd77::2", 1), 1, errno.EAFNOSUPPORT),
])
def test_refused(local: LocalSession, address: tuple[str, int], size: int, number: int) -> None:
    with pytest.raises(OSError) as error:
        local.open().sendto(bytes(size), address)
    assert error.value.errno == number and not local.transmitted()


def test_largest(local: LocalSession) -> None:
    sock = local.open(address=None)
    for _ in range(3):
        assert sock.sendto(bytes(65507), ("10.77.0.2", 1)) == 65507
        assert sock.sendto(bytes(65527), ("fd77::2", 1)) == 65527
        assert [len(payload) for _, payload in local.transmitted()] == [65507, 65527]
    with pytest.raises(OSError) as error:
        sock.sendto(bytes(65528), ("fd77::2", 1))
    assert error.value.errno == errno.EMSGSIZE


@pytest.mark.parametrize("address", [
    ("localhost", 1), ("10.77.0.2", 0), ("10.77.0.2", 65536), ("10.77.0.2", "53")])
def test_not_an_address(local: LocalSession, address: tuple[str, int]) -> None:
    with pytest.raises(ValueError):
        local.open().sendto(b"x", address)
    with pytest.raises(TypeError):
        local.open().sendto(b"x", "10.77.0.2")


def test_a_full_lane_waits(local: LocalSession) -> None:
    sock = local.open()
    sent = 0
    with pytest.raises(TimeoutError, match="full"):
        while True:
            sock.sendto(struct.pack("q", sent), ("10.77.0.2", 1), timeout=0)
            sent += 1
    assert sent == 262144 // 64
    thread, results = in_thread(sock.sendto, struct.pack("q", sent), ("10.77.0.2", 1), None)
    time.sleep(0.02)
    assert thread.is_alive()
    assert [struct.unpack("q", payload)[0] for _, payload in local.transmitted()] == list(range(sent))
    thread.join(10)
    assert results == [8] and local.transmitted()[0][1] == struct.pack("q", sent)


def test_the_doorbell_is_rung_for_a_sleeper_only(local: LocalSession) -> None:
    sock = local.open()
    sleeping = local.memory.words(local.home + L.HOME_SLEEPING)
    sock.sendto(b"x", ("10.77.0.2", 1))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(local.doorbell)
    sleeping[0] = 1
    sock.sendto(b"x", ("10.77.0.2", 1))
    sock.sendto(b"x", ("10.77.0.2", 1))
    assert os.eventfd_read(local.doorbell) == 1 and sleeping[0] == 0
