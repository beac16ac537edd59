"""A dataplane with addresses of its own, and the kernel as its peer: on a TUN, a TAP, and one end of a veth
pair with AF_PACKET. IPv4 and IPv6 alike.

The kernel's sockets are forked processes in the peer's namespace, the dataplane's sockets consumers
outside of it: the control socket is a file, and memory has no namespace.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import dataplane
from tests.dataplane_fixture import Running, running
from tests.netns import Forked, Namespace, veth

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip", "ping")]

OURS = {4: "10.77.0.1", 6: "fd77::1"}
KERNELS = {4: "10.77.0.2", 6: "fd77::2"}
GROUPS = {4: "239.1.2.3", 6: "ff15::1:2:3"}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
CORES = sorted(os.sched_getaffinity(0))[:2]
LARGEST = 65507
WATCHDOG = 30.0
OUTSTANDING = 512
FLOWS = 8

each_family = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


@dataclass
class World:
    """The dataplane, and the namespace in which its kernel peer is; `device` is the peer's interface."""

    process: Running
    peer: Namespace
    device: str
    kind: str

    @property
    def name(self) -> str:
        return self.process.name

    def tell(self, *words: str) -> str:
        """`dataplane words...`."""
        command = [sys.executable, "-m", "dataplane", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=WATCHDOG).stdout


def config(netif: str) -> str:
    addresses = [f"{OURS[4]}/24", f"{OURS[6]}/64"]
    return f"""
[rx]
cores = {CORES}
[sockets]
max = 256
[[netif]]
{netif}
addresses = {json.dumps(addresses)}
"""


@pytest.fixture(scope="module", params=["tun", "tap", "af_packet"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        peer = here = stack.enter_context(Namespace())
        if request.param == "af_packet":
            here = stack.enter_context(Namespace())
            theirs = [f"{KERNELS[4]}/24", f"{KERNELS[6]}/64"]
            device, inner = veth(peer, here, theirs)
            netif = f'kind = "af_packet"\ndevice = "{inner}"'
        else:
            netif, device = f'kind = "{request.param}"\ndevice = "dp0"', "dp0"
        process = stack.enter_context(running(config(netif), prefix=["ip", "netns", "exec", here.name]))
        yield World(process, peer, device, request.param)
        ledger = process.stop()
        assert not set(ledger["dropped"]) & {"kernel_dropped", "pcq_full", "crash_lost"}, ledger
        assert not any(queue["tx_dropped"] for queue in ledger["queues"]), ledger


@pytest.fixture
def dp(world: World) -> Iterator[dataplane.Dataplane]:
    with dataplane.attach(world.name) as attached:
        yield attached


# -- the kernel's side, in its namespace ---------------------------------------------------------------------


def kernel_socket(family: int, port: int = 0, connect: int = 0) -> socket.socket:
    sock = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
    sock.settimeout(WATCHDOG)
    sock.bind((KERNELS[family], port))
    if connect:
        sock.connect((OURS[family], connect))
    return sock


def ask(family: int, port: int, payload: bytes) -> bytes:
    """Sends a datagram and waits for the answer."""
    with kernel_socket(family, connect=port) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.send(payload)
        return sock.recv(65536)


def refusal(family: int, port: int) -> int:
    """The error that a connected socket gets from a port."""
    with kernel_socket(family, connect=port) as sock:
        sock.send(b"anybody?")
        try:
            sock.recv(100)
        except OSError as error:
            return error.errno or 0
    return 0


def send_to(family: int, target: str, port: int, payloads: list[bytes], device: str, source_port: int = 0) -> int:
    """Sends datagrams to any address, groups included, out of `device`; its own port."""
    with kernel_socket(family, source_port) as sock:
        index = socket.if_nametoindex(device)
        if family == 4:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(KERNELS[4]))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        for payload in payloads:
            sock.sendto(payload, (target, port))
        return int(sock.getsockname()[1])


def exchange(family: int, port: int, total: int) -> list[int]:
    """Sends `total` datagrams over FLOWS connected sockets, at most OUTSTANDING of them unanswered, and expects
    the echo of each, in order. How many came back in each flow."""
    window, sent, back = OUTSTANDING // FLOWS, [0] * FLOWS, [0] * FLOWS
    share = total // FLOWS
    socks = [kernel_socket(family, connect=port) for _ in range(FLOWS)]
    for sock in socks:
        sock.setblocking(False)
    while sum(back) < share * FLOWS:
        idle = True
        for flow, sock in enumerate(socks):
            for number in range(sent[flow], min(share, back[flow] + window)):
                sock.send(struct.pack("!II", flow, number))
                sent[flow] += 1
            with contextlib.suppress(BlockingIOError):
                while back[flow] < sent[flow]:
                    assert struct.unpack("!II", sock.recv(100)) == (flow, back[flow])
                    back[flow] += 1
                    idle = False
        if idle:
            ready, _, _ = select.select(socks, [], [], WATCHDOG)
            assert ready, f"lost: sent {sent}, came back {back}"
    return back


# -- the dataplane's side ------------------------------------------------------------------------------------


def echo(name: str, family: int, port: int, count: int, ready: int, ring_bytes: int = 1 << 20) -> int:
    """A consumer that sends `count` datagrams back to where they came from."""
    with dataplane.attach(name) as dp, dp.udp(OURS[family], port, ring_bytes=ring_bytes) as sock:
        os.write(ready, b"x")
        for _ in range(count):
            data, peer = sock.recvfrom(WATCHDOG)
            sock.sendto(data, peer, WATCHDOG)
    return count


@contextlib.contextmanager
def consumer(function: Callable[..., Any], *arguments: Any) -> Iterator[Forked]:
    """`function(*arguments, ready)` in a process of its own; the block begins when it has written to `ready`."""
    reading, writing = os.pipe()
    child = Forked(lambda: function(*arguments, writing))
    os.close(writing)
    try:
        assert select.select([reading], [], [], WATCHDOG)[0] and os.read(reading, 1), "the consumer did not start"
        yield child
    finally:
        os.close(reading)
        child.kill()


# -- ICMP ----------------------------------------------------------------------------------------------------


def ping(world: World, family: int, *options: str) -> None:
    """`ping`, without loss."""
    result = world.peer.run(["ping", f"-{family}", "-q", "-W", "20", *options, OURS[family]], timeout=60)
    assert " 0% packet loss" in result.stdout, result.stdout


@each_family
def test_ping(world: World, family: int) -> None:
    ping(world, family, "-c", "3", "-i", "0.01")


@each_family
def test_ping_with_the_largest_packets(world: World, family: int) -> None:
    """In fragments, both ways."""
    ping(world, family, "-c", "3", "-i", "0.01", "-s", str(LARGEST))


@each_family
def test_ping_flood(world: World, family: int) -> None:
    ping(world, family, "-c", "1000", "-f")


@each_family
def test_nobody_on_the_port(world: World, family: int) -> None:
    assert world.peer.call(refusal, family, 9) == errno.ECONNREFUSED


# -- UDP -----------------------------------------------------------------------------------------------------


def echoed(world: World, family: int, total: int) -> None:
    # The kernel keeps only a few packets for a neighbour whose address it does not know yet.
    ping(world, family, "-c", "1")
    with consumer(echo, world.name, family, 7000, total) as server:
        back = world.peer.call(exchange, family, 7000, total, timeout=100 + total / 5000)
        assert back == [total // FLOWS] * FLOWS
        assert server.result(WATCHDOG) == total


@each_family
def test_echo_in_order_without_loss(world: World, family: int) -> None:
    echoed(world, family, 20_000)


@pytest.mark.stress
@pytest.mark.timeout(600)
@each_family
def test_a_million_echoes(world: World, family: int) -> None:
    echoed(world, family, 1_000_000)


@each_family
def test_the_largest_datagrams(world: World, family: int) -> None:
    """65,507 bytes there and back, in some 45 fragments each way."""
    with consumer(echo, world.name, family, 7001, 5) as server:
        for number in range(5):
            payload = bytes([number]) + os.urandom(LARGEST - 1)
            assert world.peer.call(ask, family, 7001, payload) == payload
        server.result(WATCHDOG)


@each_family
def test_datagrams_that_are_too_large(world: World, dp: dataplane.Dataplane, family: int) -> None:
    with dp.udp(OURS[family], 0) as sock, pytest.raises(OSError) as error:
        sock.sendto(bytes({4: 65508, 6: 65528}[family]), (KERNELS[family], 9))
    assert error.value.errno == errno.EMSGSIZE


@each_family
def test_we_speak_first(world: World, dp: dataplane.Dataplane, family: int) -> None:
    """Nobody has heard of the peer before: on a link with addresses, it has to be asked for."""
    world.peer.ip("neigh", "flush", "dev", world.device)
    with world.peer.entered(), kernel_socket(family) as peer, dp.udp(OURS[family], 0) as sock:
        port = sock.address[1]
        for number in range(3):
            sock.sendto(b"hello %d" % number, (KERNELS[family], peer.getsockname()[1]))
        assert [peer.recvfrom(100) for _ in range(3)] == [
            (b"hello %d" % number, peer_name(family, port)) for number in range(3)]
        peer.sendto(b"welcome", (OURS[family], port))
        assert sock.recvfrom(WATCHDOG) == (b"welcome", (KERNELS[family], peer.getsockname()[1]))


def peer_name(family: int, port: int) -> tuple[Any, ...]:
    return (OURS[family], port) if family == 4 else (OURS[family], port, 0, 0)


@each_family
def test_connected_sockets_come_first(world: World, dp: dataplane.Dataplane, family: int) -> None:
    """One port, three sockets: the peer it is connected to, the address, and all addresses."""
    connected = dp.udp(OURS[family], 7002, remote=(KERNELS[family], 7100))
    bound = dp.udp(OURS[family], 7002)
    wildcard = dp.udp({4: "0.0.0.0", 6: "::"}[family], 7002)
    for source, expected in ((7100, connected), (7101, bound), (7100, connected)):
        port = world.peer.call(send_to, family, OURS[family], 7002, [b"%d" % source], world.device, source)
        assert expected.recvfrom(WATCHDOG) == (b"%d" % source, (KERNELS[family], port))
    bound.close()
    world.peer.call(send_to, family, OURS[family], 7002, [b"left"], world.device, 7101)
    assert wildcard.recv(WATCHDOG) == b"left"
    with world.peer.entered(), kernel_socket(family, 7100) as peer:
        connected.send(b"to whom it is connected")
        assert peer.recv(100) == b"to whom it is connected"
    for sock in (connected, wildcard):
        with pytest.raises(TimeoutError):
            sock.recv(0)


def member(name: str, group: str, port: int, count: int, ready: int) -> list[bytes]:
    """A consumer that receives what is sent to a group."""
    with dataplane.attach(name) as dp, dp.udp(group, port) as sock:
        os.write(ready, b"x")
        return [sock.recv(WATCHDOG) for _ in range(count)]


@each_family
def test_a_group_of_two_consumers(world: World, dp: dataplane.Dataplane, family: int) -> None:
    """A datagram to a multicast group is copied to each, and to who listens on all addresses."""
    payloads = [b"%d to all" % number for number in range(100)]
    everywhere = dp.udp(port=7003)
    other = dp.udp({4: "239.9.9.9", 6: "ff15::9"}[family], 7003)
    with consumer(member, world.name, GROUPS[family], 7003, 100) as one, \
            consumer(member, world.name, GROUPS[family], 7003, 100) as two:
        world.peer.call(send_to, family, GROUPS[family], 7003, payloads, world.device)
        assert one.result(WATCHDOG) == two.result(WATCHDOG) == payloads
    assert [everywhere.recv(WATCHDOG) for _ in payloads] == payloads
    with pytest.raises(TimeoutError):
        other.recv(0)


def test_broadcast(world: World, dp: dataplane.Dataplane) -> None:
    socks = [dp.udp("0.0.0.0", 7004), dp.udp("10.77.0.255", 7004)]
    world.peer.call(send_to, 4, "10.77.0.255", 7004, [b"all of you"], world.device)
    assert [sock.recv(WATCHDOG) for sock in socks] == [b"all of you"] * 2


# -- what others are shown --------------------------------------------------------------------------------


def test_ss_and_stat(world: World, dp: dataplane.Dataplane) -> None:
    bound = dp.udp(OURS[4], 7005)
    dp.udp(OURS[6], 7006, remote=(KERNELS[6], 7107))
    raw = dp.raw(1)
    world.peer.call(send_to, 4, OURS[4], 7005, [b"one", b"two", b"three"], world.device)
    assert bound.recv(WATCHDOG) == b"one"
    bound.recv_batch(1, WATCHDOG).release()
    found = {(one["kind"], one["local"][1]): one for one in json.loads(world.tell("ss", world.name, "--json"))}
    shown = found["udp", 7005]
    assert (shown["local"], shown["remote"], shown["state"]) == ([OURS[4], 7005], None, "open")
    assert (shown["pid"], shown["uid"], shown["published"]) == (os.getpid(), os.geteuid(), 3)
    assert shown["consumed"] + shown["queued"] == 3
    shown = found["udp", 7006]
    assert (shown["local"], shown["remote"], shown["state"]) == (
        [OURS[6], 7006], [KERNELS[6], 7107], "connected")
    assert found["raw", None]["proto"] == 1
    assert f"{OURS[4]}:7005" in world.tell("ss", world.name)

    before = json.loads(world.tell("stat", world.name, "--json"))
    ping(world, 4, "-c", "5", "-i", "0.01")
    world.peer.call(refusal, 4, 9)
    after = json.loads(world.tell("stat", world.name, "--json"))
    assert before["balanced"] and after["balanced"]
    gained = {name: count - before["dropped"].get(name, 0) for name, count in after["dropped"].items()}
    assert gained["no_socket"] == 1 and after["delivered"] - before["delivered"] == 5     # the raw socket has them
    assert len([raw.recv(WATCHDOG) for _ in range(5)]) == 5
    assert after["tx_packets"] - before["tx_packets"] >= 6
    assert {queue["worker"] for queue in after["queues"]} == set(range(len(CORES)))


@pytest.mark.parametrize("family", [4, 6], ids=["arp", "neighbour_discovery"])
def test_neighbours(world: World, family: int) -> None:
    """The kernel asks for our link-layer address, and gets one; on a TUN there are none."""
    world.peer.ip("neigh", "flush", "dev", world.device)
    ping(world, family, "-c", "1")
    entry = world.peer.ip("neigh", "show", OURS[family], "dev", world.device)
    dropped = json.loads(world.tell("stat", world.name, "--json"))["dropped"]
    asked = dropped.get("arp" if family == 4 else "neighbour", 0)
    if world.kind == "tun":
        assert "lladdr" not in entry
    else:
        assert "lladdr" in entry and asked > 0
