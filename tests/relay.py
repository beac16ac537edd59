"""A link that loses, delays, reorders, doubles and damages packets, as `tc netem` does, and says how many.

    with Namespace() as a, Namespace() as b, Relay(a, b, ["10.78.0.1/24"], ["10.78.0.2/24"]) as link:
        link.impair(loss=0.01)                  # both directions, from now on
        ...
        link.impair(delay=0.05, early=0.1)      # 50 ms, but 10 % of the packets go at once and overtake the others
        link.counters()                         # {"passed": ..., "lost": ..., ...}

Each end is a TUN interface, and a process between them passes packets on. A TUN without offloads takes one packet
of the link's MTU at a time, so that what happens here happens to single packets, with checksums that are all there.
Seeded: the same packets in the same order meet the same fate. Not every kernel has netem; this needs TUN alone.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import os
import random
import select
import signal
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from tests.netns import Forked, Namespace

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 1, 0x1000
_QUEUE = 20_000         # packets that the kernel keeps for us; more are lost
_BATCH = 64
_numbers = itertools.count()


class Relay:
    """A link between two namespaces; a context manager. `devices`: its ends' names."""

    def __init__(self, a: Namespace, b: Namespace, addresses_a: Sequence[str], addresses_b: Sequence[str],
                 mtu: int = 1500, seed: int = 1) -> None:
        number = next(_numbers)
        self.devices = f"ra{number}", f"rb{number}"
        self._ends: list[int] = []
        for namespace, name, addresses in ((a, self.devices[0], addresses_a), (b, self.devices[1], addresses_b)):
            self._ends.append(_open(namespace, name))
            namespace.ip("link", "set", name, "mtu", str(mtu), "txqueuelen", str(_QUEUE), "addrgenmode", "none")
            for address in addresses:
                namespace.ip("addr", "add", address, "dev", name, *(["nodad"] if ":" in address else []))
            namespace.ip("link", "set", name, "up")
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._child = Forked(lambda: _Passing(self._ends, theirs, seed).run())
        theirs.close()

    def impair(self, loss: float = 0.0, delay: float = 0.0, early: float = 0.0, duplicate: float = 0.0,
               corrupt: float = 0.0) -> None:
        """From now on: `delay` in seconds, all others the part of all packets. Without arguments: a perfect link."""
        self._ask({"loss": loss, "delay": delay, "early": early, "duplicate": duplicate, "corrupt": corrupt})

    def counters(self) -> dict[str, int]:
        """How many packets of both directions had which fate so far."""
        return self._ask(None)

    def _ask(self, request: Any) -> dict[str, int]:
        self._ours.send(json.dumps(request).encode())
        answer: dict[str, int] = json.loads(self._ours.recv(65536))
        return answer

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.kill()
        self._ours.close()
        for end in self._ends:
            os.close(end)


def _open(namespace: Namespace, name: str) -> int:
    with namespace.entered():
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


class _Passing:
    """The process between the ends."""

    def __init__(self, ends: list[int], control: socket.socket, seed: int) -> None:
        self._other = {ends[0]: ends[1], ends[1]: ends[0]}
        self._control = control
        self._random = random.Random(seed)
        self._later: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()
        self._how = dict.fromkeys(("loss", "delay", "early", "duplicate", "corrupt"), 0.0)
        self._counters = dict.fromkeys(("passed", "lost", "doubled", "damaged", "early"), 0)

    def run(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        poll = select.poll()
        for descriptor in (*self._other, self._control.fileno()):
            poll.register(descriptor, select.POLLIN)
        while True:
            wait = max(0.0, self._later[0][0] - time.monotonic()) if self._later else 1.0
            for descriptor, _ in poll.poll(wait * 1000):
                if descriptor != self._control.fileno():
                    self._take(descriptor)
                elif not self._obey():
                    return
            self._release()

    def _obey(self) -> bool:
        data = self._control.recv(65536)
        if not data:
            return False
        self._how = json.loads(data) or self._how
        self._control.send(json.dumps(self._counters).encode())
        return True

    def _take(self, descriptor: int) -> None:
        for _ in range(_BATCH):
            try:
                packet = os.read(descriptor, 65536)
            except BlockingIOError:
                return
            self._meet(self._other[descriptor], packet)

    def _meet(self, target: int, packet: bytes) -> None:
        """Decides a packet's fate."""
        how, count, chance = self._how, self._counters, self._random.random
        count["passed"] += 1
        if how["loss"] and chance() < how["loss"]:
            count["lost"] += 1
            return
        if how["corrupt"] and chance() < how["corrupt"]:
            count["damaged"] += 1
            bit = self._random.randrange(8 * len(packet))
            damaged = bytearray(packet)
            damaged[bit // 8] ^= 1 << bit % 8
            packet = bytes(damaged)
        if how["duplicate"] and chance() < how["duplicate"]:
            count["doubled"] += 1
            self._pass(target, packet)
        self._pass(target, packet)

    def _pass(self, target: int, packet: bytes) -> None:
        delay = self._how["delay"]
        if delay and not (self._how["early"] and self._random.random() < self._how["early"]):
            heapq.heappush(self._later, (time.monotonic() + delay, next(self._order), target, packet))
            return
        if delay:
            self._counters["early"] += 1
        self._write(target, packet)

    def _release(self) -> None:
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            _, _, target, packet = heapq.heappop(self._later)
            self._write(target, packet)

    def _write(self, target: int, packet: bytes) -> None:
        try:
            os.write(target, packet)
        except OSError:     # damaged so that the kernel does not take it, or its queue is full
            self._counters["lost"] += 1
