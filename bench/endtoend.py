#!/usr/bin/env python3
"""Packets a second, end to end: synthetic frames through a running dataplane into one consumer process.

    python bench/endtoend.py                        60-byte IP packets, 1024 sockets, two cores
    python bench/endtoend.py --packets 10000000 --sockets 16 --size 1500 --backpressure

One RX worker on the first core; a consumer on the second, which takes everything with `Poller.consume`. The
clock runs from just before the first packet is released until the consumer has taken the last one. Each repeat
is a dataplane of its own, started and ended. In each the ledger has to balance, and the consumer has to have got
exactly what was delivered, in sockets, packets and bytes, or there is no figure.

Prints one line of JSON: delivered packets a second (in millions) of each repeat, median and spread (largest
minus smallest, as a part of the median).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

import dataplane

FIRST_PORT = 5000
IP_AND_UDP = 28
NOBODY = ("192.0.2.254", 9)     # of the socket whose opening releases the packets

CONFIG = """
name = "{name}"
[rx]
cores = [{core}]
idle = "busy"
[sockets]
max = {most}
ring_bytes = {ring_bytes}
[[netif]]
kind = "synthetic"
flows = {flows}
local_ports = [{first}, {last}]
size = {size}
count = {packets}
backpressure = {backpressure}
start = {start}
"""


@njit
def tally(payload: Any, info: Any, state: Any) -> None:
    """Per socket: packets, bytes, and the sum of first and last byte, so that the payload was really read."""
    counts, octets, ends = state
    counts[info.socket] += 1
    octets[info.socket] += payload.size
    ends[info.socket] += payload[0] + payload[-1]


def consume_all(name: str, sockets: int, spin_us: float = 20.0) -> tuple[float, Any, Any]:
    """Opens one socket for each port, lets the packets come, and takes them until the dataplane has ended:
    seconds, packets and bytes of each socket."""
    state = tuple(np.zeros(sockets, np.int64) for _ in range(3))
    with dataplane.attach(name, spin_us=spin_us) as dp:
        socks = [dp.udp("0.0.0.0", FIRST_PORT + i) for i in range(sockets)]
        with dp.poller(socks) as poller:
            poller.consume(tally, state, timeout=0)     # compiled before the clock runs
            start = last = time.monotonic()
            with dp.udp(remote=NOBODY), contextlib.suppress(dataplane.Stopped):
                while poller.consume(tally, state, max_packets=1 << 22):
                    last = time.monotonic()
    return last - start, state[0], state[1]


def consumer(name: str, sockets: int, core: int, pipe: Any) -> None:
    """The consumer's process."""
    os.sched_setaffinity(0, [core])
    seconds, counts, octets = consume_all(name, sockets)
    pipe.send((seconds, counts.tolist(), octets.tolist()))


def configuration(name: str, packets: int, sockets: int, size: int, ring_bytes: int, backpressure: bool,
                  core: int) -> str:
    """As many flows as sockets, but about 1024 at least, spread evenly; they begin with one socket more."""
    flows = max(sockets, 1024 // sockets * sockets)
    return CONFIG.format(
        name=name, core=core, most=2 * sockets + 16, ring_bytes=ring_bytes, flows=flows,
        first=FIRST_PORT, last=FIRST_PORT + sockets - 1, size=size, packets=packets,
        backpressure=str(backpressure).lower(), start=sockets + 1)


def check(ledger: dict[str, Any], counts: list[int], octets: list[int], packets: int, size: int,
          backpressure: bool) -> None:
    """Everything offered is delivered or counted, everything delivered was consumed."""
    got = sum(counts)
    assert ledger["balanced"] and ledger["offered"] == packets, ledger
    assert got == ledger["delivered"] == ledger["consumed"] and ledger["unread"] == 0, (got, ledger)
    assert got + ledger["dropped"].get("pcq_full", 0) == packets and set(ledger["dropped"]) <= {"pcq_full"}, ledger
    assert octets == [count * (size - IP_AND_UDP) for count in counts]
    if backpressure:
        assert not ledger["dropped"] and max(counts) - min(counts) <= max(1, 1024 // len(counts)), counts


def measure(options: argparse.Namespace) -> float:
    """One run: delivered packets a second."""
    name = f"bench-{os.getpid()}"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["DATAPLANE_RUNTIME_DIR"] = directory
        config, report = Path(directory, "config.toml"), Path(directory, "ledger.json")
        config.write_text(configuration(name, options.packets, options.sockets, options.size, options.ring_bytes,
                                        options.backpressure, options.cores[0]))
        command = [sys.executable, "-m", "dataplane", "run", str(config), "--ledger", str(report)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None and process.stdout.readline() == f"ready {name}\n"
            mine, theirs = context.Pipe()
            child = context.Process(target=consumer, args=(name, options.sockets, options.cores[1], theirs))
            child.start()
            theirs.close()
            seconds, counts, octets = mine.recv()
            child.join()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
        ledger = json.loads(report.read_text())
    check(ledger, counts, octets, options.packets, options.size, options.backpressure)
    return float(sum(counts) / seconds)


def arguments() -> argparse.Namespace:
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packets", type=int, default=50_000_000, help="in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sockets", type=int, default=1024)
    parser.add_argument("--size", type=int, default=60, help="bytes of the IP packet")
    parser.add_argument("--ring-bytes", type=int, default=65536, help="of each socket")
    parser.add_argument("--backpressure", action="store_true", help="wait for full rings instead of dropping")
    parser.add_argument("--cores", type=int, nargs=2, default=(cores * 2)[:2], help="RX worker's and consumer's")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    load = round(os.getloadavg()[0], 2)
    rates = [measure(options) / 1e6 for _ in range(options.repeats)]
    median = statistics.median(rates)
    print(json.dumps({
        "bench": "endtoend", "unit": "Mpps delivered", "median": round(median, 2),
        "spread": round((max(rates) - min(rates)) / median, 3), "rates": [round(rate, 2) for rate in rates],
        **vars(options), "machine": machine(), "load_before": load}))


def machine() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
