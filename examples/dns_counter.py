"""Counts DNS messages by the type of their question, without any Python per packet.

`consume` calls a jitted function for every packet where it lies in the ring. What it may use is what numba
compiles: numbers and arrays. Here it parses the message (RFC 1035 section 4.1) up to the type.

    dataplane run configs/quickstart.toml
    python examples/dns_counter.py --seconds 5
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numba import njit

import dataplane

TYPES = {1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV",
         41: "OPT", 64: "SVCB", 65: "HTTPS", 255: "ANY"}
HEADER = 12         # bytes in front of the first question
OTHER = 0           # where messages without a question, and damaged ones, are counted
RESPONSE = 0x80     # in the third byte


@njit  # type: ignore[untyped-decorator, unused-ignore]
def question_type(payload: Any) -> Any:
    """Type of the first question; OTHER if there is none."""
    at: Any = HEADER
    if payload.size < HEADER or (payload[4] == 0 and payload[5] == 0):
        return OTHER
    while at < payload.size and payload[at] != 0:
        if payload[at] > 63:            # compressed: not in the first question
            return OTHER
        # int64: the bytes are unsigned, and numba makes a float of an unsigned and a signed number.
        at += np.int64(payload[at]) + 1
    if at + 2 >= payload.size:
        return OTHER
    return np.int64(payload[at + 1]) << 8 | np.int64(payload[at + 2])


@njit  # type: ignore[untyped-decorator, unused-ignore]
def count(payload: Any, info: Any, counts: Any) -> None:
    """`counts[0]` are queries, `counts[1]` responses, by type."""
    response = 1 if payload.size > 2 and payload[2] & RESPONSE else 0
    counts[response, question_type(payload)] += 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="quickstart", help="of the running dataplane")
    parser.add_argument("--port", type=int, default=53)
    parser.add_argument("--count", type=int, help="end after so many messages")
    parser.add_argument("--seconds", type=float, help="end after so long")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    counts = np.zeros((2, 65536), np.int64)
    taken = 0
    with dataplane.attach(args.name) as dp, dp.udp(None, args.port) as sock:
        start = time.monotonic()
        try:
            taken = sock.consume(count, counts, max_packets=args.count, timeout=args.seconds)
        except (KeyboardInterrupt, dataplane.Stopped):
            taken = int(counts.sum())
        seconds = time.monotonic() - start
    for number in np.argsort(-counts.sum(axis=0))[:10].tolist():
        queries, responses = counts[:, number].tolist()
        if queries or responses:
            name = "other" if number == OTHER else TYPES.get(number, f"TYPE{number}")
            print(f"{name:8} {queries:8} queries {responses:8} responses")
    print(f"counted {taken} messages in {seconds:.1f} s")


if __name__ == "__main__":
    main()
