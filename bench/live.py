"""A live interface: CPU time of the RX worker for each packet, and the highest rate without loss.

    python -m bench.live --netif af_packet                      ns of CPU a packet, at 400,000 packets a second
    python -m bench.live --netif af_packet --of tpacket         the same of a C program that reads TPACKET_V3 and counts
    python -m bench.live --netif af_packet --of kernel          of a C program with recvmmsg on a kernel UDP socket
    python -m bench.live --netif tun --figure rate              packets a second without loss

A sender in a network namespace (native/paced_sender.c) sends UDP datagrams of 64 flows to one port, over a veth or into
the TUN; the kernel does the interface's own work on the sender's core. The receiver is on the other one:

dataplane   an RX worker that sleeps at once when there is nothing (`idle = "poll"`), so that its CPU time has no
            spinning in it. It delivers into the ring of one socket. The consumer shares the sender's core and takes
            everything each 5 ms: it costs next to nothing, and never sleeps in a call that the worker would have to
            end with a system call. The figure is the worker's work: reading the ring, both checksums, lookup, copy.
tpacket     native/tpacket_v3.c: the same ring of the kernel, same blocks; each frame's header is looked at. With
            --demux-ns, which is what demultiplexing alone costs (bench.demux), subtracted from the dataplane's figure,
            the two do the same.
kernel      native/kernel_udp.c: the kernel's checksums, lookup and copy, and a reader that sleeps 1 ms when it has all.

Every datagram carries the number of its flow; datagrams, bytes and the sum of the numbers have to be right, and nothing
that the interface took may be lost, or there is no figure. (A TUN has room for 4096 frames, and tells the sender when
it has none.) The rate is what the sender reaches when it does not wait, or, if something is then lost or refused, what
halving finds. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
from numba import njit

import dataplane
from bench import harness
from tests.netns import Namespace, mac, veth
from tests.traffic import ethernet, udp4

OURS, PEER, PORT = "10.77.0.1", "10.77.0.2", 7000
FLOWS = 64
IP_AND_UDP = 28
BLOCK_BYTES, BLOCKS, TIMEOUT_MS = 1 << 17, 512, 1      # the netif's defaults
RING_BYTES = 1 << 22
SWEEP_S, SILENCE_S = 0.005, 0.3
DEVICE = "bench0"
NICE = -15       # of the consumer, or the sender on its core would let its ring overflow

CONFIG = f"""
name = "{{name}}"
[rx]
cores = [%d]
idle = "poll"
[sockets]
max = 64
ring_bytes = {RING_BYTES}
[[netif]]
addresses = ["{OURS}/24"]
kind = "%s"
device = "%s"
"""


class Link(NamedTuple):
    """Where the receiver is, and where and what the sender sends."""

    near: Namespace
    device: str
    far: Namespace
    far_device: str
    mac: bytes


class Taken(NamedTuple):
    """What a receiver says: packets, bytes of IP, the sum of flows' numbers, ns of CPU."""

    packets: int
    octets: int
    total: int
    cpu_ns: int


class Sent(NamedTuple):
    """What the sender says: packets, how many more the interface had no room for, the sum of those flows' numbers."""

    packets: int
    refused: int
    refused_total: int
    ns: int


Receive = Callable[[Link, int, int], tuple[Sent, Taken]]


@njit
def tally(payload: Any, info: Any, state: Any) -> None:
    """Packets, bytes, sum of the numbers in the payloads' first bytes, which say the flow."""
    state[0] += 1
    state[1] += payload.size
    state[2] += payload[0]


# -- the sender --------------------------------------------------------------------------------------------------


def frames(link: Link, size: int) -> bytes:
    """One frame for each flow, behind each other."""
    made = []
    for flow in range(FLOWS):
        payload = struct.pack("<Q", flow).ljust(size - IP_AND_UDP, b"\0")
        packet = udp4(PEER, OURS, (1024 + flow, PORT), payload)
        made.append(ethernet(packet, 0x0800, link.mac) if link.mac else packet)
    return b"".join(made)


def start_sender(link: Link, options: argparse.Namespace, rate: int, count: int) -> subprocess.Popen[bytes]:
    data = frames(link, options.size)
    program = [str(harness.native("paced_sender")), link.far_device, str(len(data) // FLOWS), str(rate), str(count)]
    command = ["nice", "-n", str(-os.getpriority(os.PRIO_PROCESS, 0)), "taskset", "-c", str(harness.CORES[0])]
    process = link.far.popen(command + program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.close()
    return process


def end_sender(process: subprocess.Popen[bytes]) -> Sent:
    assert process.stdout is not None
    answer = process.stdout.read().split()
    assert process.wait(30) == 0
    return Sent(*map(int, answer))


# -- receivers ---------------------------------------------------------------------------------------------------


class Worker:
    """A dataplane with one socket, and its RX worker's CPU clock."""

    def __init__(self, running: harness.Running, sock: Any, options: argparse.Namespace) -> None:
        children = psutil.Process(running.process.pid).children()
        pid, = (child.pid for child in children if child.name() == "dataplane-rx0")
        self._clock = ~pid << 3 | 2         # what clock_getcpuclockid(3) gives
        self._sock = sock
        self._options = options

    def receive(self, link: Link, rate: int, count: int) -> tuple[Sent, Taken]:
        """Lets the sender send, and takes what comes until that is all, or nothing comes any more."""
        state = np.zeros(3, np.int64)
        before = time.clock_gettime_ns(self._clock)
        sender = start_sender(link, self._options, rate, count)
        last = time.monotonic()
        while state[0] < count and (sender.poll() is None or time.monotonic() < last + SILENCE_S):
            time.sleep(SWEEP_S)
            while self._sock.consume(tally, state, timeout=0):      # some thousands at a time
                last = time.monotonic()
        cpu_ns = time.clock_gettime_ns(self._clock) - before
        packets, octets, total = (int(value) for value in state)
        return end_sender(sender), Taken(packets, octets + IP_AND_UDP * packets, total, cpu_ns)


@contextlib.contextmanager
def worker(link: Link, options: argparse.Namespace) -> Iterator[Receive]:
    config = CONFIG % (harness.CORES[1], options.netif, link.device)
    with (harness.running(config, link.near) as running, dataplane.attach(running.name) as dp,
          dp.udp(OURS, PORT) as sock):
        harness.pin(harness.CORES[0])       # only now: the dataplane needs the other core
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        sock.consume(tally, np.zeros(3, np.int64), timeout=0)       # compiled
        yield Worker(running, sock, options).receive


@contextlib.contextmanager
def program(options: argparse.Namespace) -> Iterator[Receive]:
    """A reader in C, a process for each run."""
    def receive(link: Link, rate: int, count: int) -> tuple[Sent, Taken]:
        if options.of == "tpacket":
            words = ["tpacket_v3", link.device, str(BLOCK_BYTES), str(BLOCKS), str(TIMEOUT_MS), str(count)]
        else:
            words = ["kernel_udp", OURS, str(PORT), str(count)]
        words[0] = str(harness.native(words[0]))
        process = link.near.popen(["taskset", "-c", str(harness.CORES[1]), *words], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            sent = end_sender(start_sender(link, options, rate, count))
            packets, octets, total, cpu_ns, _ = map(int, process.stdout.read().split())
        finally:
            process.kill()
            process.wait()
        return sent, Taken(packets, octets, total, cpu_ns)

    yield receive


# -- figures -----------------------------------------------------------------------------------------------------


def check(sent: Sent, taken: Taken, size: int) -> None:
    """What the interface took was received, and as it was sent."""
    rounds = (sent.packets + sent.refused) // FLOWS
    assert taken.packets == sent.packets and taken.octets == size * sent.packets, (sent, taken)
    assert taken.total == sum(range(FLOWS)) * rounds - sent.refused_total, (sent, taken)


def run_of(rate: int, seconds: float) -> int:
    """Packets of a run: whole rounds of the flows."""
    return max(int(rate * seconds) // FLOWS, 1) * FLOWS


def cpu(receive: Receive, link: Link, options: argparse.Namespace) -> tuple[float, int]:
    """ns of CPU for each packet, and the rate at which they really went."""
    sent, taken = receive(link, options.rate, run_of(options.rate, options.seconds))
    check(sent, taken, options.size)
    return taken.cpu_ns / taken.packets - (options.demux_ns or 0), round(sent.packets / sent.ns * 1e9)


def highest(receive: Receive, link: Link, options: argparse.Namespace) -> tuple[float, bool]:
    """The highest rate without loss, in millions a second: that of the sender unpaced, or what is found by halving.
    And whether more could not be sent."""
    low, rate, high = 0.0, 0, 0.0
    for step in range(7):
        sent, taken = receive(link, rate, run_of(rate or 800_000, options.seconds / 2))
        real = sent.packets / sent.ns * 1e9
        if sent.refused == 0 and taken.packets == sent.packets:
            check(sent, taken, options.size)
            if step == 0:
                return real / 1e6, True
            low = max(low, real)
        else:
            high = real if step == 0 else float(rate)
        rate = int((low + high) / 2)
    return low / 1e6, False


# -- the links ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def links(options: argparse.Namespace) -> Iterator[Link]:
    """A veth between two namespaces, or one namespace in which the dataplane makes its TUN."""
    with Namespace() as near, Namespace() as far:
        if options.netif == "tun":
            yield Link(near, DEVICE, near, DEVICE, b"")
            return
        addresses = [f"{OURS}/24"] if options.of == "kernel" else []
        device, far_device = veth(near, far, addresses)
        yield Link(near, device, far, far_device, mac(near, device))


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--netif", choices=["af_packet", "tun"], default="af_packet")
    parser.add_argument("--of", choices=["dataplane", "tpacket", "kernel"], default="dataplane")
    parser.add_argument("--figure", choices=["cpu", "rate"], default="cpu")
    parser.add_argument("--size", type=int, default=60, help="bytes of the IP packet")
    parser.add_argument("--rate", type=int, default=400_000, help="packets a second, for the CPU time")
    parser.add_argument("--seconds", type=float, default=0.6, help="of each run")
    parser.add_argument("--demux-ns", type=float, help="to subtract from each packet's CPU time")
    options = parser.parse_args()
    if options.netif == "tun" and options.of != "dataplane":
        raise harness.Missing("the peers read an existing interface: --netif af_packet")
    return options


def main() -> None:
    options = arguments()
    harness.need_root()
    harness.native("paced_sender")
    found, more = [], []
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(links(options))
        receive = stack.enter_context(worker(link, options) if options.of == "dataplane" else program(options))
        measure = {"cpu": cpu, "rate": highest}[options.figure]
        measure(receive, link, options)         # the kernel's ring has been gone through once
        for _ in range(options.repeats):
            value, beside = measure(receive, link, options)
            found.append(value)
            more.append(beside)
    suffix = "" if options.of == "dataplane" else f".{options.of}"
    if options.figure == "cpu":
        harness.report(f"live.{options.netif}.cpu{suffix}", "ns/packet", found, options, sent_per_second=min(more))
    else:
        harness.report(f"live.{options.netif}.rate{suffix}", "M/s", found, options, limited_by_sender=all(more))


if __name__ == "__main__":
    harness.run(main)
