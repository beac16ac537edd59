"""Consumers that come with the project: processes that attach, as anybody's would.

    python -m workers.consumers count quickstart --udp 53 --dns     names and types that are asked for
    python -m workers.consumers count quickstart --udp 5000-5003 --reuseport
    python -m workers.consumers echo tun --udp 7
    python -m workers.consumers pcap quickstart frames.pcap

Started by `dataplane demo`, and by hand to try things. Each says on its standard output how far it is, every
second, for people or (`--json`) as one object per line: first when it is attached, last when it ends. It ends
with the dataplane, at its limits, or by SIGINT or SIGTERM: exit code 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from numba import njit

from dataplane.client.attach import Dataplane, attach
from dataplane.client.poller import Poller
from dataplane.client.sockets import TapSocket
from dataplane.errors import DataplaneError, Stopped

NO_LIMIT = 1 << 62
NAME_SLOTS, NAME_BYTES, PROBES = 1 << 12, 64, 16
TOP = 10                                    # names that a report lists
DNS_HEADER = 12                             # RFC 1035 section 4.1.1
TYPES = {1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV",
         64: "SVCB", 65: "HTTPS", 255: "ANY"}
MAGIC_NS, SNAPLEN = 0xA1B23C4D, 262144      # classic pcap with nanoseconds
LINKS = {"ethernet": 1, "raw": 101}


# -- what is counted -----------------------------------------------------------------------------------------


class Count:
    """Packets and bytes, and flows: remote addresses and ports since the last report. Batches and numpy."""

    def __init__(self) -> None:
        self.packets = self.bytes = 0
        self._flows: set[int] = set()
        self._former = 0

    def take(self, poller: Poller, packets: int, seconds: float) -> None:
        """Waits for at most so many packets, at most so long."""
        for sock in poller.wait(seconds):
            with sock.recv_batch(min(packets, 4096), 0) as batch:
                self.packets += len(batch)
                self.bytes += int(batch.lengths.sum())
                self._flows.update(flow_numbers(batch.remote))
            packets -= len(batch)
            if not packets:
                break

    def begin(self) -> None:
        """A report has been made."""
        self._former = len(self._flows)
        self._flows.clear()

    def report(self) -> dict[str, Any]:
        """For `--json`."""
        return {"packets": self.packets, "bytes": self.bytes, "flows": self._former or len(self._flows)}

    def summary(self) -> str:
        """For people."""
        return f"{self.packets:,} packets, {self.bytes:,} bytes"


def flow_numbers(remote: Any) -> list[int]:
    """A number for each address and port (a hash, 64 bits), each once."""
    words = np.ascontiguousarray(remote).view(np.uint32).reshape(len(remote), -1)
    key = np.zeros(len(words), np.uint64)
    for column in words.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return list(np.unique(key).tolist())


class CountDns(Count):
    """Packets and bytes, types and names of questions. No Python per packet."""

    def __init__(self) -> None:
        super().__init__()
        self._totals = np.zeros(2, np.int64)
        self._types = np.zeros(65536, np.int64)
        self._names = np.zeros((NAME_SLOTS, NAME_BYTES), np.uint8)
        self._hits = np.zeros(NAME_SLOTS, np.int64)

    def take(self, poller: Poller, packets: int, seconds: float) -> None:
        try:
            poller.consume(count_dns, (self._totals, self._types, self._names, self._hits), packets, seconds)
        finally:
            self.packets, self.bytes = self._totals.tolist()

    def report(self) -> dict[str, Any]:
        types = {TYPES.get(number, f"TYPE{number}"): int(self._types[number])
                 for number in _largest(self._types, len(TYPES))}
        names = {_dotted(self._names[slot].tobytes()): int(self._hits[slot])
                 for slot in _largest(self._hits, TOP)}
        return {"packets": self.packets, "bytes": self.bytes, "types": types, "names": names}

    def summary(self) -> str:
        report = self.report()
        types = ", ".join(f"{name} {count:,}" for name, count in report["types"].items())
        lines = [f"  {count:10,}  {name}" for name, count in report["names"].items()]
        return "\n".join([f"{super().summary()}: {types}", *lines])


# All integers are made int64: numba makes a float of an unsigned and a signed one.


@njit(nogil=True)
def count_dns(payload: Any, info: Any, state: Any) -> None:
    """`state`: packets and bytes int64[2], types int64[65536], names uint8[NAME_SLOTS, NAME_BYTES] as on the
    wire, hits int64[NAME_SLOTS]. Messages without a question, and damaged ones, are only counted."""
    totals, types, names, hits = state
    totals[0] += 1
    totals[1] += payload.size
    if payload.size < DNS_HEADER or (payload[4] == 0 and payload[5] == 0):
        return
    end: Any = DNS_HEADER
    while end < payload.size and payload[end] != 0:
        if payload[end] > 63:           # compressed: not in the first question
            return
        end += np.int64(payload[end]) + 1
    if end + 2 >= payload.size:
        return
    types[np.int64(payload[end + 1]) << 8 | np.int64(payload[end + 2])] += 1
    if end - DNS_HEADER <= NAME_BYTES:
        count_name(payload[DNS_HEADER:end], names, hits)


@njit(nogil=True)
def count_name(name: Any, names: Any, hits: Any) -> None:
    """Counts it in the slot that has it, or in an empty one."""
    key = np.int64(0x4BF29CE484222325)
    for byte in name:                   # FNV-1a with 61 bits
        key = (key ^ lower(byte)) * 0x100000001B3 & 0x1FFFFFFFFFFFFFFF
    for i in range(PROBES):
        slot = (key >> 8) + i & NAME_SLOTS - 1
        if hits[slot] == 0:
            for at in range(name.size):
                names[slot, at] = lower(name[at])
        elif not same(name, names[slot]):
            continue
        hits[slot] += 1
        return


@njit(nogil=True)
def same(name: Any, stored: Any) -> Any:
    """Whether they are the same name; case does not matter (RFC 1035 section 2.3.3)."""
    for at in range(name.size):
        if lower(name[at]) != stored[at]:
            return False
    return name.size == stored.size or stored[name.size] == 0


@njit(nogil=True)
def lower(byte: Any) -> Any:
    """Of an ASCII letter. Labels' lengths are below the letters."""
    return np.int64(byte) | 32 if 65 <= byte <= 90 else np.int64(byte)


def _largest(counts: Any, limit: int) -> list[int]:
    """Places of the largest counts above 0."""
    return [place for place in np.argsort(-counts, kind="stable")[:limit].tolist() if counts[place]]


def _dotted(wire: bytes) -> str:
    """A name from the wire's labels (RFC 1035 section 3.1)."""
    labels, at = [], 0
    while at < len(wire) and wire[at]:
        labels.append("".join(chr(byte) if 32 < byte < 127 else f"\\{byte:03}" for byte in
                              wire[at + 1:at + 1 + wire[at]]))
        at += 1 + wire[at]
    return ".".join(labels) or "."


# -- the consumers -------------------------------------------------------------------------------------------


class Reporter:
    """Says how far a consumer is, when it is time to, and knows when to end."""

    def __init__(self, args: argparse.Namespace, count: Count) -> None:
        self._json, self._every, self._count = args.json, args.every, count
        self._started = self._next = time.monotonic()
        self._seconds = NO_LIMIT if args.seconds is None else args.seconds
        self._packets = NO_LIMIT if args.packets is None else args.packets

    def tell(self, event: str) -> None:
        """One line. `event`: attached, counting or ended."""
        seconds = time.monotonic() - self._started
        report = self._count.report()
        if self._json:
            line = json.dumps({"event": event, "seconds": round(seconds, 3), **report})
        elif event == "ended":
            line = f"{event}: {self._count.summary()}"
        else:
            line = f"{event}: {Count.summary(self._count)}"
        print(line, flush=True)

    def slices(self) -> Iterator[tuple[int, float]]:
        """How many packets to take, and how long to wait for them, before this is asked again."""
        self.tell("attached")
        self._started = time.monotonic()
        self._next, end = self._started + self._every, self._started + self._seconds
        while (left := self._packets - self._count.packets) > 0:
            now = time.monotonic()
            if now >= end:
                break
            if now >= self._next:
                self.tell("counting")
                self._count.begin()
                self._next += self._every * (1 + (now - self._next) // self._every)
            yield left, max(0.0, min(self._next, end) - now)


def count(args: argparse.Namespace) -> None:
    """Counts packets, bytes and flows, or with `--dns` what is asked for."""
    counter = CountDns() if args.dns else Count()
    with attach(args.name) as dp:
        poller = dp.poller(open_sockets(dp, args))
        if args.dns:
            counter.take(poller, 1, 0)      # compiles it
        serve(args, counter, lambda packets, seconds: counter.take(poller, packets, seconds))


def echo(args: argparse.Namespace) -> None:
    """Sends every datagram back to where it came from."""
    counter = Count()
    with attach(args.name) as dp:
        poller = dp.poller(open_sockets(dp, args))
        serve(args, counter, lambda packets, seconds: echo_once(poller, counter, packets, seconds))


def echo_once(poller: Poller, counter: Count, packets: int, seconds: float) -> None:
    """Waits, and answers what is there."""
    for sock in poller.wait(seconds):
        while packets:
            try:
                data, address = sock.recvfrom(0)
            except TimeoutError:
                break
            sock.sendto(data, address)      # type: ignore[attr-defined]
            counter.packets += 1
            counter.bytes += len(data)
            packets -= 1


def pcap(args: argparse.Namespace) -> None:
    """Writes every frame into a capture."""
    counter = Count()
    with attach(args.name) as dp, open(args.file, "wb") as file:
        tap = dp.tap(ring_bytes=args.ring_bytes)
        file.write(struct.pack("=IHHiIII", MAGIC_NS, 2, 4, 0, 0, SNAPLEN, LINKS[args.link]))
        serve(args, counter, lambda packets, seconds: write_once(tap, file, counter, packets, seconds))


def write_once(tap: TapSocket, file: BinaryIO, counter: Count, packets: int, seconds: float) -> None:
    """Waits, and writes what is there."""
    with tap.recv_batch(min(packets, 1024), seconds) as batch:
        for frame, stamp, wire in zip(batch, batch.timestamps_ns.tolist(), batch.wire_lengths.tolist(), strict=True):
            file.write(struct.pack("=IIII", *divmod(stamp, 10**9), len(frame), wire))
            file.write(frame)
        counter.packets += len(batch)
        counter.bytes += int(batch.lengths.sum())


def serve(args: argparse.Namespace, counter: Count, take: Callable[[int, float], None]) -> None:
    """Calls `take(packets, seconds)` again and again, until the limits, the dataplane's end or a signal."""
    reporter = Reporter(args, counter)
    with contextlib.suppress(KeyboardInterrupt, Stopped):
        for packets, seconds in reporter.slices():
            with contextlib.suppress(TimeoutError):
                take(packets, seconds)
    reporter.tell("ended")


def open_sockets(dp: Dataplane, args: argparse.Namespace) -> list[Any]:
    """Those that the arguments name."""
    options = {"ring_bytes": args.ring_bytes}
    socks: list[Any] = []
    for address, ports in args.udp:
        socks += [dp.udp(address, port, reuseport=args.reuseport, **options) for port in ports]
    socks += [dp.raw(proto, reuseport=args.reuseport, **options) for proto in args.raw]
    if args.tap:
        socks.append(dp.tap(**options))
    return socks


# -- the command line ----------------------------------------------------------------------------------------


def udp_ports(text: str) -> tuple[str | None, list[int | None]]:
    """`53`, `5000-5003`, `*`, each also with an address: `10.77.0.1:53`, `[fd77::1]:53`."""
    address, _, ports = text.rpartition(":")
    if ports == "*":
        return address.strip("[]") or None, [None]
    first, _, last = ports.partition("-")
    return address.strip("[]") or None, [*range(int(first), int(last or first) + 1)]


def arguments() -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(prog="python -m workers.consumers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="count|echo|pcap")
    for function in (count, echo, pcap):
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function, udp=[], raw=[], tap=False, reuseport=False)
        command.add_argument("name", help="of the running dataplane")
        if function is pcap:
            command.add_argument("file", help="to be written")
            command.add_argument("--link", choices=LINKS, default="ethernet", help="what the frames are")
        else:
            command.add_argument("--udp", action="append", type=udp_ports, metavar="[ADDRESS:]PORT[-PORT]",
                                 help="a UDP port, a range of them, * for all that nobody else has")
            command.add_argument("--reuseport", action="store_true", help="share them with others, by flow")
        if function is count:
            command.add_argument("--raw", action="append", type=int, metavar="PROTO", help="IP packets; 0: all")
            command.add_argument("--tap", action="store_true", help="every frame")
            command.add_argument("--dns", action="store_true", help="they are DNS messages: names and types")
        command.add_argument("--ring-bytes", type=int, metavar="N", help="of each socket, for each RX worker")
        command.add_argument("--packets", type=int, metavar="N", help="end after so many")
        command.add_argument("--seconds", type=float, metavar="S", help="end after so long")
        command.add_argument("--every", type=float, default=1.0, metavar="S", help="between two reports")
        command.add_argument("--json", action="store_true", help="reports for programs")
    args = parser.parse_args()
    if args.function is not pcap and not (args.udp or args.raw or args.tap):
        parser.error("no socket: say --udp" + (", --raw or --tap" if args.function is count else ""))
    return args


def main() -> None:
    """Runs a consumer and exits."""
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args.function(args)
    except (DataplaneError, OSError, ValueError) as error:
        print(f"{args.function.__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
