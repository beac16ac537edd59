"""What `python -m bench` runs, and what is asserted of the figures: data.

An `Invocation` is one figure, `python -m bench.ARGUMENTS --json`; its key is the name that rows, tables and pictures
know it by. Those of its peers, which do the same work, follow right behind it, and have the key KEY.PEER.

A `Row` is one line of the table that says what holds. Each of its parts is computed from medians, by key.
"""

from __future__ import annotations

import operator
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# -- invocations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Invocation:
    """One figure. `seconds`: about how long it takes, all repeats and its start included."""

    key: str
    group: str
    text: str
    arguments: str
    seconds: float = 6

    @property
    def command(self) -> list[str]:
        """Behind `python -m`."""
        module, *options = shlex.split(self.arguments)
        return [f"bench.{module}", *options, "--json"]


def _with_peers(key: str, group: str, text: str, arguments: str, peers: Mapping[str, str], seconds: float = 6
                ) -> list[Invocation]:
    """The figure and its peers: {peer's name: its arguments}."""
    return [Invocation(key, group, text, arguments, seconds),
            *(Invocation(f"{key}.{peer}", group, f"{text}: {peer}", other, seconds) for peer, other in peers.items())]


def _of(key: str, group: str, text: str, arguments: str, peers: Iterable[str], seconds: float = 6) -> list[Invocation]:
    """The usual case: the same arguments with --of PEER."""
    return _with_peers(key, group, text, arguments, {peer: f"{arguments} --of {peer}" for peer in peers}, seconds)


RECORD_SIZES = (64, 256, 1500)
RING_PEERS = ("dpdk", "faster_fifo", "queue", "pipe", "zmq", "iceoryx2")

RING = [
    *_of("ring.items", "ring", "8-byte items, batches of 32", "ring --items --batch 32", RING_PEERS),
    *_of("ring.single", "ring", "8-byte items, one by one", "ring --items --batch 1", ("lane", "pcq", "dpdk")),
    *[one for size in RECORD_SIZES for one in _of(
        f"ring.record.{size}", "ring", f"records of {size} bytes, batches of 32", f"ring --size {size} --batch 32",
        RING_PEERS if size == 256 else ("dpdk",))],
]


def _sockets(count: int) -> str:
    return "1 socket" if count == 1 else f"{count:,} sockets"


SOCKETS = (1, 16, 1024, 65536, 1_000_000)
SIZES = ("576", "1500", "imix")



def _demux(key: str, text: str, arguments: str, seconds: float = 6) -> list[Invocation]:
    """Ours, and DPDK's pipeline twice: doing the same work, and passing references to unchecked payloads."""
    return _with_peers(key, "demux", text, f"demux {arguments}", {
        "dpdk": f"demux_dpdk {arguments} --source copy --udp-checksum", "dpdk-by-reference": f"demux_dpdk {arguments}"},
        seconds)


DEMUX = [
    *[one for sockets in SOCKETS for one in _demux(
        f"demux.{sockets}", f"60-byte packets, {_sockets(sockets)}",
        f"--sockets {sockets} --size 60 --kind {'wildcard' if sockets <= 1024 else 'connected'}",
        12 if sockets > 65536 else 6)],
    *[one for size in SIZES for one in _demux(
        f"demux.size.{size}", f"{'IMIX' if size == 'imix' else size + '-byte packets'}, 1,024 sockets",
        f"--sockets 1024 --size {size} --kind wildcard")],
    Invocation("demux.connected", "demux", "60-byte packets, 1,024 connected sockets",
               "demux --sockets 1024 --size 60 --kind connected"),
    *[one for workers in (1, 2) for one in _of(
        f"lookup.{workers}", "demux", f"the lookup alone, {workers} worker{'s' * (workers > 1)}, of each",
        f"lookup --workers {workers}", ("reader-lock",), 5)],
]

ENDTOEND = [
    Invocation("endtoend", "endtoend", "60-byte packets, 1,024 sockets, taken by consume", "endtoend", 25),
    Invocation("endtoend.1500", "endtoend", "1500-byte packets, 16 sockets, taken by consume",
               "endtoend --size 1500 --sockets 16 --packets 10000000", 20),
]

CLIENT = [
    *_of("client.recvfrom", "client", "one packet a call", "client --call recvfrom", ("kernel",)),
    *_with_peers("client.recv_batch", "client", "batches, with NumPy", "client --call recv_batch",
                 {"recvmmsg": "client --of recvmmsg"}),
    Invocation("client.payloads", "client", "batches, a memoryview for each payload", "client --call payloads"),
    *_of("client.async", "client", "async for, batches", "client --call async", ("asyncio",)),
    Invocation("client.consume", "client", "a jitted function for each packet", "client --call consume"),
]

PCAPY = ("loop", "dispatch", "next")

OFFLINE = [
    *_with_peers("offline.recv_batch", "offline", "a capture, batches with NumPy", "offline --call recv_batch", {
        **{f"pcapy-ng.{call}": f"offline --of pcapy-ng --call {call}" for call in PCAPY},
        "scapy": "offline --of scapy --call RawPcapReader"}, 10),
    Invocation("offline.consume", "offline", "a capture, a jitted function for each packet", "offline --call consume",
               10),
]

LIVE = [
    *_of("live.af_packet", "live", "CPU time of the receiver, AF_PACKET", "live --netif af_packet",
         ("tpacket", "kernel")),
    *_of("live.af_packet.slow", "live", "the same at 100,000 packets a second", "live --netif af_packet --rate 100000",
         ("tpacket",)),
    *_of("live.tun", "live", "CPU time of the receiver, TUN", "live --netif tun", ("kernel",)),
    *_of("live.af_packet.rate", "live", "highest rate without loss, AF_PACKET",
         "live --netif af_packet --figure rate", ("tpacket", "kernel"), 12),
    *_of("live.tun.rate", "live", "highest rate without loss, TUN", "live --netif tun --figure rate", ("kernel",), 12),
]

LATENCY = [
    *_of("latency.busy", "latency", "the consumer spins", "latency --mode busy", ("raw",), 8),
    *_of("latency.sleeping", "latency", "the consumer sleeps", "latency --mode sleeping", ("raw",), 8),
]

OVERLOAD = [
    Invocation("overload.flood", "overload", "delivered at ten times what is taken", "overload --case flood", 15),
    Invocation("overload.stopped", "overload", "the other seven beside a stopped one", "overload --case stopped", 10),
]

CHURN = [
    Invocation("churn.bind", "churn", "sockets opened and closed", "churn --what bind"),
    Invocation("churn.attach", "churn", "attachments made and ended", "churn --what attach"),
    Invocation("churn.lookups", "churn", "the worker's rate beside churn", "churn --what lookups", 10),
]

RINGS = tuple(1 << bits for bits in range(12, 24, 2))

SCALING = [
    Invocation("scaling", "scaling", "RX workers against one", "scaling", 40),
    Invocation("scaling.separate", "scaling", "dataplanes with one worker each against one", "scaling --separate", 40),
    Invocation("scaling.consumers", "scaling", "RX workers against one, each with a consumer", "scaling --consumers 1",
               40),
    *[Invocation(f"scaling.ring.{size}", "scaling", f"rings of {size >> 10:,} KiB, 64 sockets",
                 f"scaling --what ring --ring-bytes {size}") for size in RINGS],
]

START = [
    Invocation("start.warm", "start", "from start to ready, kernels in the cache", "start --cache warm --what ready",
               12),
    Invocation("start.cold", "start", "from start to ready, cache empty", "start --cache cold --what ready", 100),
    *[Invocation(f"start.memory.{per}", "start", text, f"start --what memory --per {per}", 12)
      for per, text in (("idle", "memory once it is ready"), ("udp", "memory of a UDP socket"),
                        ("tcp", "memory of a TCP connection"))],
]

TCP = [
    *[Invocation(f"tcp.{what}", "tcp", text, f"tcp --what {what}", 12) for what, text in (
        ("bulk_receive", "a stream, received"), ("bulk_send", "a stream, sent"),
        ("echo", "64-byte requests, one at a time"), ("accept", "connections opened, accepted, closed"))],
    Invocation("tcp.bulk_receive.peer", "tcp", "a stream, received, the RX worker beside the peer",
               "tcp --what bulk_receive --rx-beside peer", 12),
    Invocation("tcp.echo.adaptive", "tcp", "64-byte requests, the RX worker spins for a while",
               "tcp --what echo --idle adaptive", 12)]

COPIES = ((60, 1), (60, 16), (60, 1024), (1500, 16), (1500, 1024))

LIMITS = [
    *[Invocation(f"limits.copy.{size}.{sockets}", "limits", f"{size}-byte packets copied, {_sockets(sockets)}",
                 f"limits --what copy --size {size} --sockets {sockets}", 10) for size, sockets in COPIES],
    Invocation("limits.copy.1500.pool", "limits", "1500-byte packets copied, one ring as large as DPDK's pool",
               "limits --what copy --size 1500 --sockets 1 --ring-bytes 16777216", 10),
    Invocation("limits.demux.1500.16", "limits", "1500-byte packets demultiplexed, 16 sockets",
               "demux --sockets 16 --size 1500 --kind wildcard"),
    *_with_peers("limits.instructions", "limits", "60-byte packets, 1,024 sockets: instructions",
                 "limits --what instructions --repeats 3", {"dpdk": "limits --what instructions --repeats 3 --of dpdk"},
                 40),
    *[Invocation(f"limits.instructions.{size}", "limits", f"{size}-byte packets, 1,024 sockets: instructions",
                 f"limits --what instructions --repeats 3 --size {size}", 40) for size in (1500,)],
    Invocation("limits.cores", "limits", "copying on two cores against one", "limits --what cores", 12),
    Invocation("limits.call", "limits", "recvfrom in Python without a stack", "limits --what call", 4),
    Invocation("limits.clock", "limits", "the core's frequency", "limits --what clock", 2),
]

INVOCATIONS: list[Invocation] = [
    *RING, *DEMUX, *ENDTOEND, *CLIENT, *OFFLINE, *LIVE, *LATENCY, *OVERLOAD, *CHURN, *SCALING, *START, *TCP, *LIMITS]

GROUPS = {
    "ring": "Rings between two processes", "demux": "Demultiplexing", "endtoend": "End to end",
    "client": "The client library", "offline": "Captures", "live": "Live interfaces", "latency": "Latency",
    "overload": "Overload", "churn": "Opening, closing, attaching", "scaling": "Scaling", "start": "Start",
    "tcp": "TCP", "limits": "What the machine can do"}

# -- what is asserted --------------------------------------------------------------------------------------------


class Unmeasured(Exception):
    """A figure that is not in the results: its key, and why."""


class Figures:
    """Medians by key; `of(key, name)` is what came with one. Unmeasured if it is not there."""

    def __init__(self, lines: Mapping[str, Mapping[str, Any]]) -> None:
        self._lines = lines

    def __getitem__(self, key: str) -> float:
        return float(self.of(key, "median"))

    def of(self, key: str, name: str) -> Any:
        """Another value of that line."""
        line = self._lines.get(key, {})
        if name not in line:
            why = "skipped" if "skipped" in line else "failed" if "failed" in line else "not measured"
            raise Unmeasured(f"`{key}` {why}")
        return line[name]


@dataclass(frozen=True)
class Part:
    """A figure and its target. `label`: which of the row's parts it is."""

    compute: Callable[[Figures], float]
    comparison: str
    target: float
    unit: str = "×"
    label: str = ""

    def holds(self, value: float) -> bool:
        """Whether it is as good as that."""
        return bool({">=": operator.ge, "<=": operator.le}[self.comparison](value, self.target))


@dataclass(frozen=True)
class Row:
    """What is measured, against what; it holds if each of its parts does."""

    number: int
    text: str
    parts: tuple[Part, ...]


def _ratio(one: str, other: str) -> Callable[[Figures], float]:
    return lambda figures: figures[one] / figures[other]


def _least(key: str, comparison: str, target: float, unit: str, name: str = "median", label: str = "") -> Part:
    return Part(lambda figures: float(figures.of(key, name)), comparison, target, unit, label)


def _pcapy(figures: Figures) -> float:
    """Ours against the fastest of its calls."""
    return figures["offline.recv_batch"] / max(figures[f"offline.recv_batch.pcapy-ng.{call}"] for call in PCAPY)


def _af_packet(figures: Figures) -> float:
    """CPU time of the worker without the demultiplexing, against the reader that only counts."""
    return (figures["live.af_packet"] - 1e3 / figures["demux.1"]) / figures["live.af_packet.tpacket"]


ROWS = [
    Row(1, "Ring: 8-byte items in batches, against DPDK's `rte_ring` in bulk",
        (Part(_ratio("ring.items", "ring.items.dpdk"), ">=", 1.0),)),
    Row(2, "Demultiplexing 60-byte packets, against the same pipeline of DPDK's libraries",
        tuple(Part(_ratio(f"demux.{n}", f"demux.{n}.dpdk"), ">=", 3.0, label=_sockets(n)) for n in SOCKETS[:3])),
    Row(3, "Demultiplexing 60-byte packets, 1,024 sockets, one core", (_least("demux.1024", ">=", 30, "Mpps"),)),
    Row(4, "Demultiplexing 1500-byte packets, against DPDK's pipeline",
        (Part(_ratio("demux.size.1500", "demux.size.1500.dpdk"), ">=", 2.5),)),
    Row(5, "Demultiplexing with 1,000,000 connected sockets, against 1,024 connected ones",
        (Part(_ratio("demux.1000000", "demux.connected"), ">=", 0.33),)),
    Row(6, "End to end through the running dataplane, taken by `consume`, against demultiplexing alone",
        (Part(_ratio("endtoend", "demux.1024"), ">=", 0.9),)),
    Row(7, "`recvfrom`, against `recvfrom` of a kernel UDP socket",
        (Part(_ratio("client.recvfrom", "client.recvfrom.kernel"), ">=", 4),)),
    Row(8, "Batches with NumPy, against `recvfrom` of the same socket",
        (Part(_ratio("client.recv_batch", "client.recvfrom"), ">=", 10),)),
    Row(9, "A capture into Python, in batches with NumPy, against the fastest way of pcapy-ng",
        (Part(_pcapy, ">=", 2),)),
    Row(10, "AF_PACKET, CPU time per packet of the RX worker without demultiplexing, against a reader in C",
        (Part(_af_packet, "<=", 1.3),)),
    Row(11, "Latency, consumer spinning, median, against half a round trip between two cores",
        (Part(_ratio("latency.busy", "latency.busy.raw"), "<=", 3),)),
    Row(12, "Latency, consumer asleep, median, against half a round trip of two semaphores",
        (Part(_ratio("latency.sleeping", "latency.sleeping.raw"), "<=", 1.2),)),
    Row(13, "Overload: delivered at ten times the load that is taken, against the best of the curve",
        (_least("overload.flood", ">=", 0.95, "×"),)),
    Row(14, "Overload: what the other seven consumers get of what they are offered",
        tuple(part for case in ("flood", "stopped") for part in (
            _least(f"overload.{case}", ">=", 0.99, "×", "others_rate", f"{case}, rate"),
            _least(f"overload.{case}", "<=", 0, "drops", "others_drops", f"{case}, drops")))),
    Row(15, "Two RX workers against one, no consumer on their cores",
        (Part(lambda figures: float(figures.of("scaling", "speedup")["2"]), ">=", 1.9),)),
    Row(16, "From start to ready",
        (_least("start.warm", "<=", 1.5, "s", label="cache warm"), _least("start.cold", "<=", 20, "s",
                                                                           label="cache empty"))),
]
