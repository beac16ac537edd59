"""Sending through a running dataplane to the kernel of this machine, over a TUN interface."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

import dataplane
from tests.dataplane_fixture import Running, running
from tests.netns import Namespace

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

SO_RCVBUFFORCE = 33     # asm-generic/socket.h; the socket module does not have it
HOSTS = {socket.AF_INET: "10.77.0.1", socket.AF_INET6: "fd77::1"}
CONFIG = f"""
[rx]
cores = [{min(os.sched_getaffinity(0))}]
idle = "adaptive"
[sockets]
max = 1024
ring_bytes = 1048576
[[netif]]
kind = "tun"
device = "dpt0"
addresses = ["10.77.0.1/24", "fd77::1/64"]
"""


@pytest.fixture(scope="module")
def tun() -> Iterator[Running]:
    with Namespace() as namespace, namespace.entered(), running(CONFIG) as process:
        yield process


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def peer(request: pytest.FixtureRequest, tun: Running) -> Iterator[socket.socket]:
    with socket.socket(request.param, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        yield sock


def test_datagrams_of_all_sizes(tun: Running, peer: socket.socket) -> None:
    largest = 65507 if peer.family == socket.AF_INET else 65527
    with dataplane.attach(tun.name) as dp, dp.udp(None, 7777) as sock:
        peer.connect((HOSTS[peer.family], 7777))
        here = peer.getsockname()[:2]
        for size in (0, 1, 7, 8, 1400, 1472, 1473, 9000, largest):
            data = os.urandom(size)
            peer.send(data)
            got, address = sock.recvfrom(20)
            assert got == data and address == here
            assert sock.sendto(got, address) == size
            assert peer.recv(70000) == data


def test_echo_of_many(tun: Running, peer: socket.socket) -> None:
    """In order, none lost, with at most 256 under way; by a thread that sleeps when there is none."""
    number = 20000
    with dataplane.attach(tun.name) as dp, dp.udp(HOSTS[peer.family], 7778) as sock:
        def echo() -> None:
            for _ in range(number):
                sock.sendto(*sock.recvfrom(20))

        thread = threading.Thread(target=echo)
        thread.start()
        peer.connect((HOSTS[peer.family], 7778))
        sent = received = 0
        while received < number:
            while sent < min(number, received + 256):
                peer.send(sent.to_bytes(8, "big"))
                sent += 1
            assert int.from_bytes(peer.recv(100), "big") == received
            received += 1
        thread.join(20)


def test_a_connected_socket(tun: Running, peer: socket.socket) -> None:
    with dataplane.attach(tun.name) as dp:
        peer.bind((HOSTS[peer.family].removesuffix("1") + "2", 0))
        with dp.udp(remote=peer.getsockname()[:2]) as sock:
            sock.send(b"hello")
            data, address = peer.recvfrom(100)
            assert data == b"hello" and address[:2] == (HOSTS[peer.family], sock.address[1])
            peer.sendto(b"back", address)
            assert sock.recvfrom(20) == (b"back", peer.getsockname()[:2])
            with socket.socket(peer.family, socket.SOCK_DGRAM) as other:
                other.sendto(b"from somebody else", address)
            with pytest.raises(TimeoutError):
                sock.recv(0.2)


def test_raw_sockets_and_taps_see_what_comes_in(tun: Running, peer: socket.socket) -> None:
    with dataplane.attach(tun.name) as dp, dp.raw(17) as raw, dp.tap() as tap, dp.udp(None, 7779):
        peer.sendto(b"to all", (HOSTS[peer.family], 7779))
        packet, (host, port) = raw.recvfrom(20)
        assert packet.endswith(b"to all") and port == 0
        assert socket.inet_pton(peer.family, host) == socket.inet_pton(peer.family, HOSTS[peer.family][:-1] + "2")
        while not (frame := tap.recv(20)).endswith(b"to all"):
            pass
        assert frame == packet
