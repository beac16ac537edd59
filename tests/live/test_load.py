"""Floods of every kind, beside one socket with modest traffic: that one gets every packet in order, control calls are
answered, the ledger says where each frame went, and memory does not grow.

What a flooded socket still gets is measured by `python -m bench.overload`; how TCP clients fare in a flood of SYNs is
tested in test_tcp_flood.py.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import pytest
from numba import njit

import dataplane
from tests.dataplane_fixture import Running, running
from tests.live.tcp_bed import CORES, OURS, wait_for
from tests.netns import Forked, Namespace, mac, veth
from tests.traffic import ethernet, flood, internet_checksum, syn_flood, udp4

pytestmark = [pytest.mark.live, pytest.mark.timeout(1000)]

WATCHDOG = 60.0
WITNESS, FLOODED, SPARE = 7000, 5000, 9000     # ports
FLOWS = 16                      # of the witness
RATE = 2000                     # of the witness, packets a second
GROWTH = 16 << 20               # bytes of private memory that a process may have more at the end of a flood
ENDLESS = 1 << 40


def cases(kinds: Iterable[str], short: Sequence[str]) -> list[Any]:
    """Kinds of floods, and rounds of control calls while they last; the witness gets 100 packets for each. `short` are
    those of the ordinary run."""
    return [*((kind, 20) for kind in short), *(pytest.param(kind, 2000, marks=pytest.mark.stress) for kind in kinds)]


OFFLINE = {
    "one socket": (FLOODED, FLOODED, 1, 60),
    "all sockets": (FLOODED, FLOODED + 63, 64, 60),
    "no socket": (FLOODED, FLOODED + 63, 0, 60),
    "tiny packets": (FLOODED, FLOODED + 63, 64, 36),
    "large packets": (FLOODED, FLOODED + 63, 64, 9000),
}
"""Synthetic floods, as fast as the worker is: local ports, how many of them have a socket, bytes."""


def config(flooded: str, count: int) -> str:
    """The flooded netif and the witness's, on one RX worker. That one begins with the first socket."""
    return f"""
[rx]
cores = {CORES[:1]}
[sockets]
max = 512
[[netif]]
{flooded}
[[netif]]
kind = "synthetic"
flows = {FLOWS}
local_ports = [{WITNESS}, {WITNESS}]
rate = {RATE}
count = {count}
start = 1
seed = 2
"""


class Witness:
    """The socket that is not flooded. `take` checks what has come so far."""

    def __init__(self, dp: dataplane.Dataplane) -> None:
        self.dp = dp
        self.sock = dp.udp("0.0.0.0", WITNESS, ring_bytes=1 << 22)
        self.got = 0

    def take(self, count: int) -> None:
        """Until `count` packets have come in all; flows take turns, and each packet begins with its flow's number."""
        while self.got < count:
            with self.sock.recv_batch(timeout=WATCHDOG) as batch:
                for payload in batch:
                    flow = int.from_bytes(payload[:4], "big")
                    assert flow == self.got % FLOWS, (flow, self.got)
                    self.got += 1


def private_bytes(pid: int) -> int:
    """Memory of the process that is nobody else's."""
    memory = psutil.Process(pid).memory_info()
    return int(memory.rss - memory.shared)


def control_calls(dp: dataplane.Dataplane) -> float:
    """Attaches, opens a socket, looks at the ledger, closes all; the longest call in seconds."""
    longest = 0.0

    def timed(call: Callable[[], Any]) -> Any:
        nonlocal longest
        start = time.monotonic()
        result = call()
        longest = max(longest, time.monotonic() - start)
        return result

    with timed(lambda: dataplane.attach(dp.name)) as other:
        sock = timed(lambda: other.udp("0.0.0.0", SPARE))
        told = timed(other.stats)
        assert told["sockets"] >= 2
        timed(sock.close)
    timed(lambda: dp.raw(200)).close()      # of a protocol that nobody speaks
    return longest


def endure(process: Running, witness: Witness, count: int) -> None:
    """What has to hold while a flood lasts, `count` rounds of it, and at its end."""
    dp = witness.dp
    for _ in range(5):
        control_calls(dp)
    told = dp.stats()
    pids = [process.pid, told["continuation"]["pid"], *(worker["pid"] for worker in told["workers"])]
    before, began, longest = {pid: private_bytes(pid) for pid in pids}, time.monotonic(), 0.0
    for number in range(count):
        longest = max(longest, control_calls(dp))
        witness.take((number + 1) * 100)
    seconds = time.monotonic() - began
    after, now = {pid: private_bytes(pid) for pid in pids}, dp.stats()
    assert not any(worker["restarts"] for worker in now["workers"])
    print(f"{(now['offered'] - told['offered']) / seconds / 1e6:.2f} M/s offered, "
          f"{(now['delivered'] - told['delivered']) / seconds / 1e6:.2f} M/s delivered, longest control call "
          f"{longest * 1e3:.0f} ms, memory {[(after[pid] - before[pid]) >> 10 for pid in pids]} KiB more")
    assert all(after[pid] - before[pid] < GROWTH for pid in pids), (before, after)


def audit(process: Running, count: int) -> dict[str, Any]:
    """The final ledger, which must be exact; of the flooded netif alone."""
    ledger = process.stop()
    for queue in ledger["queues"]:
        assert queue["offered"] == queue["delivered"] + sum(queue["dropped"].values()) and queue["held"] == 0, queue
    assert ledger["deliveries"] == ledger["consumed"] + ledger["unread"]
    flooded, witness = ledger["queues"]
    assert witness["offered"] == witness["delivered"] == count * 100 and not sum(witness["dropped"].values())
    assert flooded["offered"] > 20_000, "this is no flood"
    return dict(flooded)


@njit
def count_all(payload: Any, info: Any, state: Any) -> None:
    state[0] += 1


def take_all(name: str, ports: Sequence[int]) -> int:
    """A consumer that takes what it can get, until the end; how many."""
    state = np.zeros(1, np.int64)
    with dataplane.attach(name) as dp, contextlib.suppress(dataplane.Stopped), dp.poller(
            [dp.udp("0.0.0.0", port) for port in ports]) as poller:
        while True:
            poller.consume(count_all, state, timeout=WATCHDOG)
    return int(state[0])


@pytest.mark.parametrize(("kind", "count"), cases(OFFLINE, ["one socket", "no socket"]))
def test_synthetic_flood(kind: str, count: int) -> None:
    """As fast as the worker can take it; the flooded sockets' consumer has the core that is left to it."""
    first, last, sockets, size = OFFLINE[kind]
    text = f'kind = "synthetic"\nflows = 1024\nlocal_ports = [{first}, {last}]\nsize = {size}\nstart = {1 + sockets}'
    with running(config(text, count * 100)) as process, dataplane.attach(process.name) as dp:
        witness = Witness(dp)
        consumer = Forked(lambda: take_all(process.name, range(first, first + sockets))) if sockets else None
        try:
            wait_for(lambda: not consumer or dp.stats()["consumed"], "the consumer, which compiles its function first")
            endure(process, witness, count)
            flooded = audit(process, count)
            taken = consumer.result(WATCHDOG) if consumer else 0
        finally:
            if consumer:
                consumer.kill()
    reasons = {name for name, dropped in flooded["dropped"].items() if dropped}
    assert reasons <= ({"pcq_full"} if sockets else {"no_socket"}), flooded
    assert flooded["delivered"] == taken, (flooded, taken)


# -- on the wire -----------------------------------------------------------------------------------------------------


def fragments(link: bytes) -> list[bytes]:
    """First and middle fragments of datagrams that will never be whole."""
    made = []
    for number in range(4096):
        whole = udp4(f"10.77.{number >> 8}.{number & 255}", OURS[4], (9, FLOODED), bytes(600))
        offset = 0 if number % 2 else 64
        head = bytearray(whole[:20])
        head[4:8] = (number << 16 | 0x2000 | offset).to_bytes(4, "big")
        head[10:12] = b"\0\0"
        head[10:12] = internet_checksum(bytes(head)).to_bytes(2, "big")
        made.append(link + bytes(head) + whole[20:])
    return made


def closed_ports(link: bytes) -> list[bytes]:
    """Datagrams for nobody, each of which would be answered by an ICMP error."""
    return [link + udp4("10.77.0.2", OURS[4], (9, 10_000 + port), b"x" * 20) for port in range(1024)]


def runts(link: bytes) -> list[bytes]:
    """Frames of 14 to 40 bytes: headers that are cut, and garbage."""
    choose = random.Random(3)
    whole = link + udp4("10.77.0.2", OURS[4], (9, FLOODED), b"x")
    return [whole[:choose.randrange(14, 41)] if choose.random() < 0.5 else link + choose.randbytes(choose.randrange(26))
            for _ in range(1024)]


def one_socket(link: bytes) -> list[bytes]:
    """Datagrams for a socket that nobody reads."""
    return [ethernet(udp4("10.77.0.2", OURS[4], (port, FLOODED), b"x" * 20), 0x0800, link[:6]) for port in range(1, 65)]


LIVE: dict[str, Callable[[bytes], list[bytes]]] = {
    "fragments": fragments, "closed ports": closed_ports, "runts": runts, "one socket": one_socket}


@contextlib.contextmanager
def flooded_link(count: int) -> Iterator[tuple[Running, Namespace, str, bytes]]:
    """A dataplane on a veth; the namespace and device at its other end, and the Ethernet header of what goes there."""
    with Namespace() as here, Namespace() as peer:
        device, inner = veth(peer, here, ["10.77.0.2/24"])
        link = mac(here, inner) + mac(peer, device) + b"\x08\x00"
        text = f'kind = "af_packet"\ndevice = "{inner}"\naddresses = ["{OURS[4]}/24"]'
        with running(config(text, count * 100), prefix=["ip", "netns", "exec", here.name]) as process:
            yield process, peer, device, link


@pytest.mark.root
@pytest.mark.needs("ip")
@pytest.mark.parametrize(("kind", "count"), cases([*LIVE, "syns"], ["fragments", "syns"]))
def test_flood_on_the_wire(kind: str, count: int) -> None:
    """As fast as one core sends. What the kernel drops before us is in the ledger as well."""
    with flooded_link(count) as (process, peer, device, link), dataplane.attach(process.name) as dp:
        witness = Witness(dp)
        sock, listener = dp.udp(OURS[4], FLOODED), dp.tcp_listen(OURS[4], FLOODED)
        if kind == "syns":
            sender = peer.fork(syn_flood, device, 4, OURS[4], FLOODED, 1000, link)
        else:
            sender = peer.fork(flood, device, LIVE[kind](link), ENDLESS)
        wait_for(lambda: dp.stats()["offered"] > 5000, "the flood")
        endure(process, witness, count)
        assert sender.running()
        sender.kill()
        listener.close()
        sock.close()
        flooded = audit(process, count)
    expected = {"fragments": "fragment", "closed ports": "no_socket", "runts": "truncated", "one socket": "pcq_full",
                "syns": "tcp_handshake"}[kind]
    assert sum(dropped for name, dropped in flooded["dropped"].items() if expected in name) > 5000, flooded
