"""Writes every frame that a dataplane sees into a capture that Wireshark and tcpdump read.

    dataplane run configs/quickstart.toml
    python examples/tap_to_pcap.py quickstart frames.pcap --count 100
"""

from __future__ import annotations

import argparse
import struct
import time
from typing import BinaryIO

import dataplane

MAGIC_NS = 0xA1B23C4D       # classic pcap with nanoseconds
LINK_TYPES = {"ethernet": 1, "raw": 101}    # a tun netif has no link header: raw IP
SNAPLEN = 262144


def write_header(file: BinaryIO, link_type: int) -> None:
    file.write(struct.pack("=IHHiIII", MAGIC_NS, 2, 4, 0, 0, SNAPLEN, link_type))


def write_batch(file: BinaryIO, batch: dataplane.Batch, limit: int) -> int:
    """Writes the first `limit` frames at most; how many it wrote."""
    written = 0
    described = zip(batch, batch.timestamps_ns.tolist(), batch.wire_lengths.tolist(), strict=True)
    for frame, timestamp, wire_length in described:
        if written == limit:
            break
        seconds, nanoseconds = divmod(timestamp, 1_000_000_000)
        file.write(struct.pack("=IIII", seconds, nanoseconds, len(frame), wire_length))
        file.write(frame)
        written += 1
    return written


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the running dataplane")
    parser.add_argument("file", help="capture to be written")
    parser.add_argument("--link", choices=LINK_TYPES, default="ethernet", help="what the netifs' frames are")
    parser.add_argument("--count", type=int, help="end after so many frames")
    parser.add_argument("--seconds", type=float, help="end after so long")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    end = None if args.seconds is None else time.monotonic() + args.seconds
    limit = args.count if args.count is not None else 1 << 62
    written = 0
    with dataplane.attach(args.name) as dp, dp.tap(ring_bytes=1 << 20) as tap, open(args.file, "wb") as file:
        write_header(file, LINK_TYPES[args.link])
        try:
            while written < limit:
                timeout = None if end is None else max(0.0, end - time.monotonic())
                with tap.recv_batch(1024, timeout) as batch:
                    written += write_batch(file, batch, limit - written)
        except (TimeoutError, KeyboardInterrupt, dataplane.Stopped):
            pass
    print(f"wrote {written} frames to {args.file}")


if __name__ == "__main__":
    main()
