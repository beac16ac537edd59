"""Sends every UDP datagram back to where it came from.

    dataplane run configs/tun.toml          (as root: a TUN interface, 10.77.0.1)
    python examples/udp_echo.py
    echo hello | nc -u -w1 10.77.0.1 7777
"""

from __future__ import annotations

import argparse
import time

import dataplane


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="tun", help="of the running dataplane")
    parser.add_argument("--address", help="to listen at; default: every address of both families")
    parser.add_argument("--port", type=int, default=7777)
    parser.add_argument("--count", type=int, help="end after so many datagrams")
    parser.add_argument("--seconds", type=float, help="end after so long")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    end = None if args.seconds is None else time.monotonic() + args.seconds
    echoed = size = 0
    with dataplane.attach(args.name) as dp, dp.udp(args.address, args.port) as sock:
        print(f"listening at {sock.address[0] or '*'} port {sock.address[1]}", flush=True)
        try:
            while echoed != args.count:
                timeout = None if end is None else max(0.0, end - time.monotonic())
                data, address = sock.recvfrom(timeout)
                sock.sendto(data, address)
                echoed += 1
                size += len(data)
        except (TimeoutError, KeyboardInterrupt, dataplane.Stopped):
            pass
    print(f"echoed {echoed} datagrams, {size} bytes")


if __name__ == "__main__":
    main()
