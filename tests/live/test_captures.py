"""Captures through a running dataplane, against what scapy reads from the same files.

One dataplane replays all files, one after the other: each file is a netif of its own with `start` one higher
than the one before, and opening one more socket lets it begin. What the kernel carries (a TUN interface, a
veth pair with AF_PACKET at its end) must give the same records.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import dataplane
from tests.captures import make
from tests.dataplane_fixture import Running, running
from tests.live import oracle
from tests.live.oracle import ETHERNET, RAW, Frame, Meaning, Record
from tests.netns import Namespace, veth
from tests.traffic import ethernet, packet_socket

WRONG = ("cut_record.pcap", "cut_header.pcap", "damaged.pcapng", "wireless.pcapng", "wireless.pcap",
         "no_interface.pcapng")
REAL = Path(os.environ.get("DATAPLANE_CAPTURES", Path(__file__).parents[3] / "shared" / "captures"))
FILES = [*sorted(path for path in make.files() if path.name not in WRONG), *sorted(REAL.glob("*.pcap*"))]
NO_TIMES = ("sections.pcapng", "interfaces.pcapng")     # scapy reads them otherwise: see tests/netif/test_pcap.py
CORES = sorted(os.sched_getaffinity(0))[:2]
HEAD = """
[rx]
cores = {cores}
idle = "poll"
[sockets]
max = 256
ring_bytes = 1048576
"""
WATCHDOG = 60.0
CHUNK = 64              # frames under way in the kernel at a time

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


@dataclass
class Heard:
    """What the sockets got of one file, in order, and what the ledger says of it."""

    udp: list[Record] = field(default_factory=list)
    raw: list[Record] = field(default_factory=list)
    tap: list[Record] = field(default_factory=list)
    offered: int = 0
    delivered: int = 0
    deliveries: int = 0
    dropped: int = 0
    held: int = 0


def frames_of(path: Path) -> list[Frame]:
    """As scapy reads them; it keeps a former section's interfaces, and so their link types."""
    found = oracle.frames(path)
    if path.name == "sections.pcapng":
        return [frame._replace(link=RAW if frame.data[0] >> 4 == 4 else ETHERNET) for frame in found]
    return found


def meaning_of(frames: Sequence[Frame]) -> Meaning:
    meaning = Meaning()
    for frame in frames:
        meaning.add(frame)
    return meaning


def without_times(records: Sequence[Record]) -> list[Record]:
    return [record._replace(time=0) for record in records]


def compared(records: Sequence[Record], path: Path) -> list[Record]:
    """For files whose times scapy does not know: without."""
    return without_times(records) if path.name in NO_TIMES else list(records)


# -- listening --------------------------------------------------------------------------------


class Listener:
    """The sockets of one consumer: UDP for all ports, raw for all protocols, and a tap if asked for."""

    def __init__(self, dp: dataplane.Dataplane, tapped: bool) -> None:
        self.dp = dp
        self.heard = Heard()
        self._sockets: dict[str, Any] = {"udp": dp.udp(), "raw": dp.raw(0)}
        if tapped:
            self._sockets["tap"] = dp.tap()
        self.count = len(self._sockets)

    def take(self) -> None:
        """Everything that has come."""
        for kind, sock in self._sockets.items():
            while (batch := sock.poll_batch(4096)) is not None:
                with batch:
                    getattr(self.heard, kind).extend(records(batch, kind))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Listens until `condition` holds, and takes what had come by then."""
        deadline = time.monotonic() + WATCHDOG
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}"
            self.take()
        self.take()

    def part(self) -> Heard:
        """What was heard since the last call."""
        heard, self.heard = self.heard, Heard()
        return heard


def records(batch: dataplane.Batch, kind: str) -> list[Record]:
    payloads, times = [bytes(payload) for payload in batch], batch.timestamps_ns.tolist()
    if kind == "tap":
        return list(map(Record, payloads, times))
    return list(map(Record, payloads, times, batch.vlan.tolist(), ends(batch.remote), ends(batch.local)))


def ends(column: Any) -> list[tuple[str, int]]:
    return [(oracle.host(bytes(address), family), port) for family, port, address in column.tolist()]


# -- replay --------------------------------------------------------------------------------


def replay(files: Sequence[Path], cores: Sequence[int], tapped: bool) -> dict[Path, Heard]:
    """Every file through the same dataplane, one after the other."""
    first = 3 if tapped else 2
    netifs = "".join(f'[[netif]]\nkind = "pcap"\npath = "{path}"\npace = "fast"\nloop = 1\nstart = {first + index}\n'
                     for index, path in enumerate(files))
    found = {}
    with running(HEAD.format(cores=list(cores)) + netifs) as process, dataplane.attach(process.name) as dp:
        listener = Listener(dp, tapped)
        for index, path in enumerate(files):
            if index:
                dp.udp(remote=("192.0.2.254", 9))       # nobody's: only to be counted
            rows = slice(index * len(cores), (index + 1) * len(cores))
            listener.until(lambda rows=rows: all(
                row["status"] == "ended" for row in dp.stats()["queues"][rows]), path.name)
            found[path] = listener.part()
            account(found[path], dp.stats()["queues"][rows])
        ledger = process.wait()
    assert ledger["offered"] == sum(heard.offered for heard in found.values())
    # What was in reassembly at the end: a tap got those frames all the same.
    assert ledger["unread"] == 0 and ledger["held"] == 0
    assert ("fragment_unfinished" in ledger["dropped"]) is not tapped
    return found


def account(heard: Heard, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        assert row["balanced"], row
        heard.offered += row["offered"]
        heard.delivered += row["delivered"]
        heard.deliveries += row["deliveries"]
        heard.held += row["held"]
        heard.dropped += sum(row["dropped"].values())


@pytest.fixture(scope="module")
def tapped() -> dict[Path, Heard]:
    return replay(FILES, CORES[:1], tapped=True)


@pytest.fixture(scope="module")
def spread() -> dict[Path, Heard]:
    return replay(FILES, CORES, tapped=False)


@each_file
def test_replayed_by_one_worker(tapped: dict[Path, Heard], path: Path) -> None:
    """A UDP socket for all ports, a raw socket and a tap: records and their order are what scapy reads."""
    frames, heard = frames_of(path), tapped[path]
    meaning = meaning_of(frames)
    for kind in ("tap", "raw", "udp"):
        assert compared(getattr(heard, kind), path) == compared(getattr(meaning, kind), path), kind
    # The tap had every frame; no other reason to be dropped counts then.
    assert (heard.offered, heard.delivered, heard.held, heard.dropped) == (len(frames), len(frames), 0, 0)
    assert heard.deliveries == len(frames) + len(meaning.raw) + len(meaning.udp)


@each_file
def test_replayed_by_all_workers(spread: dict[Path, Heard], path: Path) -> None:
    """Flows are spread over workers, fragments are still put together; without a tap, what is malformed,
    incomplete or not IP is counted elsewhere."""
    frames, heard = frames_of(path), spread[path]
    meaning = meaning_of(frames)
    for kind in ("raw", "udp"):
        assert sorted(compared(getattr(heard, kind), path)) == sorted(compared(getattr(meaning, kind), path)), kind
    assert (heard.offered, heard.delivered) == (len(frames), meaning.delivered)
    assert heard.held + heard.dropped == len(frames) - meaning.delivered
    assert heard.deliveries == len(meaning.raw) + len(meaning.udp)


def test_real_captures_have_what_matters() -> None:
    if not REAL.is_dir():
        pytest.skip("no folder of real captures (DATAPLANE_CAPTURES)")
    meaning = meaning_of([frame for path in sorted(REAL.glob("*.pcap*")) for frame in frames_of(path)])
    versions = {record.payload[0] >> 4 for record in meaning.raw}
    assert versions == {4, 6} and len(meaning.udp) > 500 and len(meaning.raw) > len(meaning.udp)


@pytest.mark.parametrize("path", [path for path in FILES if path.name in ("quickstart.pcap", "fragments.pcap")],
                         ids=lambda path: path.name)
def test_a_run_that_ends_by_itself(path: Path) -> None:
    """One file, started by its sockets, played once: the run ends when everything was taken. Consumers that
    know nothing of the ledger get all of it."""
    config = HEAD.format(cores=CORES[:1]) + f'[[netif]]\nkind = "pcap"\npath = "{path}"\npace = "fast"\nstart = 2\n'
    meaning = meaning_of(frames_of(path))

    def listen(sock: Any, kind: str) -> list[Record]:
        return [record for batch in sock.batches(timeout=WATCHDOG) for record in records(batch, kind)]

    with running(config) as process:
        with dataplane.attach(process.name) as dp, ThreadPoolExecutor(2) as pool:
            udp, raw = dp.udp(), dp.raw(0)
            heard = pool.submit(listen, udp, "udp"), pool.submit(listen, raw, "raw")
            assert [one.result() for one in heard] == [meaning.udp, meaning.raw]
            with pytest.raises(dataplane.Stopped):
                udp.recv(WATCHDOG)
        ledger = process.wait()
    assert ledger["unread"] == 0 and ledger["consumed"] == len(meaning.udp) + len(meaning.raw)


# -- the same through the kernel ------------------------------------------------------------------------------


def network_bytes(frame: Frame) -> bytes:
    """What the frame carries behind its link header if that says IP; else nothing."""
    layer, _ = oracle.network_layer(frame)
    return b"" if layer is None else bytes(layer.original)


def carry(process: Running, send: Callable[[bytes], object], plan: dict[Path, list[bytes]]) -> dict[Path, Heard]:
    """Sends each file's frames, a few at a time, and listens."""
    found = {}
    with dataplane.attach(process.name) as dp:
        listener = Listener(dp, tapped=True)
        total = 0
        for path, frames in plan.items():
            for start in range(0, len(frames), CHUNK):
                chunk = frames[start:start + CHUNK]
                for frame in chunk:
                    send(frame)
                total += len(chunk)
                listener.until(lambda expected=total: dp.stats()["delivered"] >= expected, path.name)
            found[path] = listener.part()
    return found


@contextlib.contextmanager
def quiet_namespace() -> Iterator[Namespace]:
    """In which the kernel itself says nothing on new interfaces."""
    with Namespace() as namespace:
        namespace.run(["sh", "-c", "for one in all default; do "
                       "echo 1 > /proc/sys/net/ipv6/conf/$one/disable_ipv6; done"])
        yield namespace


@pytest.fixture(scope="module")
def through_tun() -> Iterator[tuple[dict[Path, list[bytes]], dict[Path, Heard]]]:
    plan = {path: [data for frame in frames_of(path) if (data := network_bytes(frame))] for path in FILES}
    netif = '[[netif]]\nkind = "tun"\ndevice = "dp0"\nmtu = 65535\n'
    with quiet_namespace() as namespace, running(HEAD.format(cores=CORES[:1]) + netif,
                                                 prefix=["ip", "netns", "exec", namespace.name]) as process:
        with namespace.entered(), packet_socket("dp0") as sock:
            heard = carry(process, sock.send, plan)
        assert process.stop()["offered"] == sum(map(len, plan.values()))
    yield plan, heard


@pytest.fixture(scope="module")
def through_veth() -> Iterator[tuple[dict[Path, list[bytes]], dict[Path, Heard]]]:
    plan = {path: [data for frame in frames_of(path) if can_be_sent(data := ethernet_frame(frame))]
            for path in FILES}
    with quiet_namespace() as peer, quiet_namespace() as here:
        there, device = veth(peer, here, mtu=65535)
        netif = f'[[netif]]\nkind = "af_packet"\ndevice = "{device}"\npromiscuous = true\n'
        with running(HEAD.format(cores=CORES[:1]) + netif, prefix=["ip", "netns", "exec", here.name]) as process:
            with peer.entered(), packet_socket(there) as sock:
                heard = carry(process, sock.send, plan)
            assert process.stop()["offered"] == sum(map(len, plan.values()))
    yield plan, heard


def ethernet_frame(frame: Frame) -> bytes:
    """The frame itself, or what it carries behind an Ethernet header."""
    if frame.link == ETHERNET:
        return frame.data
    data = network_bytes(frame)
    return ethernet(data, 0x86DD if data[0] >> 4 == 6 else 0x0800) if data else b""


def can_be_sent(frame: bytes) -> bool:
    """Not without a whole link header; and the kernel itself takes VLAN tags off."""
    tagged = frame[12:14] in (b"\x81\0", b"\x88\xa8")
    return len(frame) >= (18 if tagged else 14)


@pytest.mark.root
@pytest.mark.live
@pytest.mark.needs("ip")
@each_file
def test_through_a_tun_interface(through_tun: tuple[dict[Path, list[bytes]], dict[Path, Heard]],
                                 tapped: dict[Path, Heard], path: Path) -> None:
    """The same IP packets give the same records; a TUN has no VLANs."""
    plan, heard = through_tun
    assert [record.payload for record in heard[path].tap] == plan[path]
    for kind in ("raw", "udp"):
        expected = [record._replace(time=0, vlan=-1) for record in getattr(tapped[path], kind)]
        assert without_times(getattr(heard[path], kind)) == expected, kind


@pytest.mark.root
@pytest.mark.live
@pytest.mark.needs("ip")
@each_file
def test_through_a_veth_into_af_packet(through_veth: tuple[dict[Path, list[bytes]], dict[Path, Heard]],
                                       tapped: dict[Path, Heard], path: Path) -> None:
    plan, heard = through_veth
    assert [record.payload for record in heard[path].tap] == plan[path]
    for kind in ("raw", "udp"):
        assert without_times(getattr(heard[path], kind)) == without_times(getattr(tapped[path], kind)), kind
