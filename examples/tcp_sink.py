"""Receives what TCP clients send, throws it away, and shows how fast it comes.

    dataplane run configs/tun.toml          (as root: a TUN interface, 10.77.0.1)
    python examples/tcp_sink.py
    head -c 1G /dev/zero | nc -N 10.77.0.1 7778
"""

from __future__ import annotations

import argparse
import threading
import time

import dataplane


def receive(connection: dataplane.Connection, totals: list[int]) -> None:
    """One client, in a thread of its own."""
    buffer = bytearray(1 << 20)     # as much as there is at once, without making bytes objects of it
    with connection:
        try:
            while size := connection.recv_into(buffer):
                totals[0] += size
        except (ConnectionError, TimeoutError, dataplane.Stopped) as error:
            print(f"{connection.getpeername()}: {error}", flush=True)


def show(totals: list[int], over: threading.Event, interval: float = 1.0) -> None:
    """A line for each second in which something came."""
    before, then = 0, time.monotonic()
    while not over.wait(interval):
        size, now = totals[0], time.monotonic()
        if size != before:
            print(f"{(size - before) / (now - then) / 1e6:9.1f} MB/s {size:15} bytes", flush=True)
        before, then = size, now


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="tun", help="of the running dataplane")
    parser.add_argument("--address", help="to listen at; default: every address of both families")
    parser.add_argument("--port", type=int, default=7778)
    parser.add_argument("--count", type=int, help="end after so many clients")
    parser.add_argument("--seconds", type=float, help="end after so long")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    end = None if args.seconds is None else time.monotonic() + args.seconds
    totals, over, threads = [0], threading.Event(), list[threading.Thread]()
    threading.Thread(target=show, args=(totals, over), daemon=True).start()
    with dataplane.attach(args.name) as dp, dp.tcp_listen(args.address, args.port, receive_bytes=1 << 20,
                                                          connections=64) as listener:
        print(f"listening at {args.address or '*'} port {listener.getsockname()[1]}", flush=True)
        try:
            while len(threads) != args.count:
                connection, _ = listener.accept(None if end is None else max(0.0, end - time.monotonic()))
                threads.append(threading.Thread(target=receive, args=(connection, totals)))
                threads[-1].start()
            for thread in threads:
                thread.join(None if end is None else max(0.0, end - time.monotonic()))
        except (TimeoutError, KeyboardInterrupt, dataplane.Stopped):
            pass
    over.set()
    print(f"received {totals[0]} bytes from {len(threads)} clients")


if __name__ == "__main__":
    main()
