"""The peer of the demultiplexing benchmark: the same work in C on DPDK (native/demux_dpdk.c).

    python -m bench.demux_dpdk --sockets 1024 --size 60
    python -m bench.demux_dpdk --sockets 1000000 --size imix --kind wildcard --json

An RX lcore on the first core takes prepared IPv4 packets, flow by flow in turn, validates the headers, looks 64 keys at
once up in an rte_hash, and puts each mbuf into its socket's own single-producer single-consumer rte_ring. A consumer
lcore on the second core takes the mbufs out, reads the payload's first and last byte, counts per socket, and frees
them in bulk. No packet is copied: mbufs point to the prepared frames, as those of a driver point to what the device has
written; `--source copy` copies each into its mbuf. `--udp-checksum` verifies the datagram's checksum too, which a
DPDK program leaves to the device. Full rings drop, which is counted, and not in the figure.

How rings that are not empty are found, how long the consumer rests between two sweeps, and what memory is used, stand
with the figure; native/demux_dpdk.c says why. Every packet names its socket and is compared with it, and
packets and mbufs are all accounted for, or there is no figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from typing import Any

from bench import harness

INSTALL = "apt-get install gcc pkg-config libdpdk-dev"
TUNING = ("burst", "ring", "pool", "cache", "visits", "find", "rest")


def arguments() -> argparse.Namespace:
    """What is None is left to the program."""
    parser = harness.parser(__doc__)
    parser.add_argument("--sockets", type=int, default=1024)
    parser.add_argument("--size", default="60", help="bytes of the IP packet, or imix: 60, 576 and 1500, 7 : 4 : 1")
    parser.add_argument("--kind", choices=("connected", "wildcard"), default="connected")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each repeat")
    parser.add_argument("--source", choices=("attach", "copy"), default="attach")
    parser.add_argument("--udp-checksum", action="store_true")
    parser.add_argument("--no-thp", action="store_true", help="4 KiB pages if there are no hugepages")
    parser.add_argument("--burst", type=int, help="packets, up to 64")
    parser.add_argument("--ring", type=int, help="descriptors of each socket, a power of two")
    parser.add_argument("--pool", type=int, help="mbufs")
    parser.add_argument("--cache", type=int, help="mbufs of each lcore's cache")
    parser.add_argument("--visits", type=int, help="sockets that the consumer serves together, up to 32")
    parser.add_argument("--find", choices=("sweep", "active"), help="how it finds rings that are not empty")
    parser.add_argument("--rest", type=float, help="microseconds from sweep to sweep at least")
    return parser.parse_args()


def command(options: argparse.Namespace) -> list[str]:
    """The program with its options."""
    program = harness.native("demux_dpdk", ("libdpdk",), INSTALL)
    made = [str(program), "--cores", f"{harness.CORES[0]},{harness.CORES[1]}"]
    for name in ("sockets", "size", "kind", "seconds", "repeats", "source", *TUNING):
        if (value := getattr(options, name)) is not None:
            made += [f"--{name}", str(value)]
    made += ["--udp-checksum"] * options.udp_checksum + ["--no-thp"] * options.no_thp
    return made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One process, all repeats: what it printed."""
    if len(harness.CORES) < 2:
        raise harness.Missing("it needs two cores")
    done = subprocess.run(command(options), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{done.stderr}{done.stdout}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    options = arguments()
    told = measure(options)
    values = told.pop("mpps")
    middle = {name: round(statistics.median(value), 3) if isinstance(value, list) else value
              for name, value in told.items()}
    for name in TUNING:     # what was chosen is in `middle`
        delattr(options, name)
    harness.report("demux.dpdk", "Mpps", values, options, **middle)


if __name__ == "__main__":
    harness.run(main)
