"""A passive AF_PACKET netif: it sees what passes between others, shares it out by flow, and says nothing.

The traffic is the kernel's: two hosts, each a namespace, with a third one between them whose bridge port is
watched; or a sender that is as fast as one core can be.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numba import njit

import dataplane
from tests import traffic
from tests.dataplane_fixture import Running, running
from tests.netns import Forked, Namespace, mac, veth
from tests.traffic import BROADCAST, ethernet, flood, packet_socket, udp4

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

WATCHDOG = 60.0
CORES = sorted(os.sched_getaffinity(0))[:2]
FLOWS, ROUNDS = 1000, 5
PORT = 7777
STAMP = 42                              # place of the number in a frame: behind Ethernet, IPv4, UDP

Flow = frozenset[tuple[bytes, int]]     # both ends, whoever speaks


def config(device: str, cores: list[int], more: str = "") -> str:
    return f"""
[rx]
cores = {cores}
[[netif]]
kind = "af_packet"
device = "{device}"
promiscuous = true
{more}
"""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WATCHDOG
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def inside(namespace: Namespace, text: str, **options: Any) -> Iterator[Running]:
    with running(text, prefix=["ip", "netns", "exec", namespace.name], **options) as process:
        yield process


# -- shared by flow --------------------------------------------------------------------------------


@pytest.fixture
def between() -> Iterator[tuple[Namespace, Namespace, Namespace, str]]:
    """Two hosts, what is between them, and the port there that belongs to the first."""
    with Namespace() as one, Namespace() as two, Namespace() as middle:
        port, _ = veth(middle, one, [], ["10.1.0.1/24", "fd01::1/64"])
        other, _ = veth(middle, two, [], ["10.1.0.2/24", "fd01::2/64"])
        middle.ip("link", "add", "bridge", "type", "bridge")
        for name in (port, other):
            middle.ip("link", "set", name, "master", "bridge")
        middle.ip("link", "set", "bridge", "up")
        yield one, two, middle, port


def answer(ready: int, count: int) -> None:
    """Host two: echoes `count` datagrams of either family."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WATCHDOG)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind(("::", PORT))
        os.write(ready, b"x")
        for _ in range(count):
            data, peer = sock.recvfrom(100)
            sock.sendto(data, peer)


def converse() -> None:
    """Host one: FLOWS sockets of both families, ROUNDS questions and answers each."""
    socks = []
    for flow in range(FLOWS):
        sock = socket.socket(socket.AF_INET6 if flow % 2 else socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(WATCHDOG)
        sock.connect(("fd01::2" if flow % 2 else "10.1.0.2", PORT))
        socks.append(sock)
    for number in range(ROUNDS):
        for flow, sock in enumerate(socks):
            question = struct.pack("!II", flow, number)
            sock.send(question)
            assert sock.recv(100) == question


def share(name: str, ready: int) -> dict[str, Counter[Flow]]:
    """A consumer: counts the packets of each flow that its two sockets get, until the dataplane ends."""
    with dataplane.attach(name) as dp:
        options: Any = {"reuseport": True, "ring_bytes": 1 << 20}
        socks: dict[str, Any] = {"udp": dp.udp(**options), "raw": dp.raw(17, **options)}
        os.write(ready, b"x")
        seen: dict[str, Counter[Flow]] = {kind: Counter() for kind in socks}
        with dp.poller(socks.values()) as poller:
            running = dict(socks)       # each ends by itself, when nothing is left in its rings
            while running:
                with contextlib.suppress(dataplane.Stopped):
                    poller.wait(WATCHDOG)
                for kind, sock in list(running.items()):
                    try:
                        while (batch := sock.poll_batch(1024)) is not None:
                            with batch:
                                seen[kind].update(flows_of(batch, kind))
                    except dataplane.Stopped:
                        del running[kind]
    return seen


def flows_of(batch: dataplane.Batch, kind: str) -> list[Flow]:
    ports = [port_pair(bytes(packet)) for packet in batch] if kind == "raw" else None
    found = []
    for i, (remote, local) in enumerate(zip(batch.remote.tolist(), batch.local.tolist(), strict=True)):
        source, target = ports[i] if ports else (remote[1], local[1])
        found.append(frozenset([(bytes(remote[2]), source), (bytes(local[2]), target)]))
    return found


def port_pair(packet: bytes) -> tuple[int, int]:
    at = 40 if packet[0] >> 4 == 6 else (packet[0] & 15) * 4
    return struct.unpack_from("!HH", packet, at)


def taken(dp: dataplane.Dataplane, count: int) -> bool:
    """Whether the consumers have `count` packets: only then is nothing unread when the dataplane stops."""
    stats = dp.stats()
    return stats["deliveries"] >= count and stats["unread"] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_four_consumers_share_a_thousand_flows(between: tuple[Namespace, Namespace, Namespace, str],
                                               workers: int) -> None:
    """Both directions of a flow come to the same consumer, and every flow is whole there."""
    if workers > len(CORES):
        pytest.skip("needs two cores")
    one, two, middle, port = between
    total = FLOWS * ROUNDS * 2
    reading, writing = os.pipe()
    with inside(middle, config(port, CORES[:workers])) as process, contextlib.ExitStack() as stack:
        consumers = [Forked(lambda: share(process.name, writing)) for _ in range(4)]
        for consumer in consumers:
            stack.callback(consumer.kill)
        two.fork(answer, writing, FLOWS * ROUNDS)
        received = b""
        while len(received) < 5:
            assert select.select([reading], [], [], WATCHDOG)[0], "who was to listen did not start"
            received += os.read(reading, 5)
        one.call(converse, timeout=100)
        with dataplane.attach(process.name) as dp:
            wait_for(lambda: taken(dp, 2 * total), "the last packet to be taken")
        ledger = process.stop()
        seen = [consumer.result(WATCHDOG) for consumer in consumers]
    os.close(reading)
    os.close(writing)
    for kind in ("udp", "raw"):
        where: dict[Flow, list[int]] = defaultdict(list)
        for number, counts in enumerate(seen):
            for flow, count in counts[kind].items():
                where[flow] += [number]
                assert count == 2 * ROUNDS, (kind, flow)
        assert len(where) == FLOWS and all(len(consumers) == 1 for consumers in where.values())
        assert min(sum(numbers == [number] for numbers in where.values()) for number in range(4)) > FLOWS // 8
    assert ledger["deliveries"] == 2 * total and ledger["unread"] == 0 and ledger["tx_packets"] == 0
    assert "pcq_full" not in ledger["dropped"] and "kernel_dropped" not in ledger["dropped"]


# -- it says nothing --------------------------------------------------------------------------------


def provocations(target: bytes) -> list[bytes]:
    """What a host that is spoken to would answer: ARP, pings, ports and protocols that nobody has."""
    ours, theirs = "10.1.0.1", "10.1.0.9"
    ask = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, b"\2\0\0\0\0\1", socket.inet_aton(ours), bytes(6),
                      socket.inet_aton(theirs))
    echo = b"\x08\0\xf7\xff" + bytes(4)
    packets = [udp4(ours, theirs, (1, 9), b"nobody there"), ipv4(ours, theirs, 1, echo),
               ipv4(ours, theirs, 99, b"what is this?"),
               ipv4(ours, theirs, 6, struct.pack("!HHIIBBHHH", 1, 80, 0, 0, 0x50, 2, 100, 0, 0))]
    return [ethernet(ask, 0x0806, BROADCAST), *(ethernet(packet, 0x0800, target) for packet in packets)]


def ipv4(source: str, target: str, proto: int, payload: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, proto, 0)
    head += socket.inet_aton(source) + socket.inet_aton(target)
    return head[:10] + struct.pack("!H", traffic.internet_checksum(head)) + head[12:] + payload


def test_nothing_is_ever_transmitted() -> None:
    """Everything that would be answered by an endpoint, and a consumer that tries to send."""
    with Namespace() as peer, Namespace() as here:
        there, device = veth(peer, here)
        with inside(here, config(device, CORES[:1])) as process, peer.entered(), \
                packet_socket(there, receive=True) as wire, dataplane.attach(process.name) as dp:
            frames = provocations(mac(here, device)) * 20
            for frame in frames:
                wire.send(frame)
            with dp.udp("10.1.0.9", 10) as sock, pytest.raises(OSError):
                sock.sendto(b"let me out", ("10.1.0.1", 9))
            wait_for(lambda: dp.stats()["offered"] >= len(frames), "all frames")
            ledger = process.stop()
            wire.setblocking(False)
            with pytest.raises(BlockingIOError):
                wire.recv(2048)
    assert ledger["offered"] == len(frames) and ledger["tx_packets"] == ledger["tx_dropped"] == 0
    assert ledger["dropped"] == {"arp": 20, "no_socket": 80}


# -- as fast as it can be sent --------------------------------------------------------------------------------


@njit
def tally(payload: Any, info: Any, state: Any) -> None:
    """Counts, and checks the numbers: state is count, next number, gaps, sum of the bytes."""
    number = 0
    for i in range(8):
        number = number << 8 | payload[i]
    state[2] += number != state[1]
    state[1] = number + 1
    state[0] += 1
    state[3] += payload.size


def count_all(name: str, ring_bytes: int, ready: int) -> list[int]:
    """A consumer: all that comes until the dataplane ends."""
    state = np.zeros(4, np.int64)
    with dataplane.attach(name) as dp, dp.udp("10.1.0.2", 53, ring_bytes=ring_bytes) as sock:
        sock.consume(tally, state, timeout=0)       # compiled now, not when the first packet waits
        os.write(ready, b"x")
        with contextlib.suppress(dataplane.Stopped):
            while True:
                sock.consume(tally, state)
    return [int(value) for value in state]


def highest_rate(total: int, size: int) -> dict[str, Any]:
    """Sends `total` frames through a veth as fast as the kernel takes them; the final ledger. Default settings,
    but for the consumer's ring."""
    traffic.warm()
    payload = bytes(size)
    frame = ethernet(udp4("10.1.0.1", "10.1.0.2", (1000, 53), payload, checksum=False), 0x0800)
    reading, writing = os.pipe()
    with Namespace() as peer, Namespace() as here:
        there, device = veth(peer, here)
        with inside(here, config(device, CORES[:1])) as process:
            consumer = Forked(lambda: count_all(process.name, 1 << 26, writing))
            assert select.select([reading], [], [], WATCHDOG)[0], "the consumer did not start"
            sender = peer.fork(on_core, CORES[-1], flood, there, [frame], total, stamp=STAMP)
            sent, seconds = sender.result(100 + total / 10_000)
            assert sent == total
            with dataplane.attach(process.name) as dp:
                wait_for(lambda: dp.stats()["offered"] >= total, "the last frame")
            ledger = process.stop()
            count, _, gaps, octets = consumer.result(WATCHDOG)
    os.close(reading)
    os.close(writing)
    print(json.dumps({"frames": total, "bytes": len(frame), "sent_mpps": round(total / seconds / 1e6, 3)}))
    assert ledger["dropped"] == {} and ledger["offered"] == ledger["delivered"] == total
    assert (count, gaps, octets) == (total, 0, total * size) and ledger["unread"] == 0
    return ledger


def on_core(core: int, function: Callable[..., int], *arguments: Any, **options: Any) -> tuple[int, float]:
    """The function's result on one core, and how many seconds it took."""
    os.sched_setaffinity(0, [core])
    start = time.monotonic()
    return function(*arguments, **options), time.monotonic() - start


@pytest.mark.parametrize(("size", "total"), [(18, 150_000), (1400, 20_000)])
def test_nothing_is_lost_at_the_highest_rate(size: int, total: int) -> None:
    """No more than the rings hold, so that a machine which is busy elsewhere loses nothing either."""
    highest_rate(total, size)


# The RX worker keeps up by itself here: that needs two cores that nobody else uses.
@pytest.mark.stress
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [18, 1400])
def test_nothing_is_lost_at_the_highest_rate_for_long(size: int) -> None:
    highest_rate(10_000_000, size)
