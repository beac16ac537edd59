"""Sends every line back that a TCP client sends: asyncio's streams, used as with the kernel's sockets.

    dataplane run configs/tun.toml          (as root: a TUN interface, 10.77.0.1)
    python examples/tcp_echo.py
    echo hello | nc -N 10.77.0.1 7777
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal

import dataplane


class Echo:
    """Counts what it has done."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.connections = self.lines = 0
        self.enough = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client. Nothing in here knows of the dataplane: it would run under asyncio.start_server as it is."""
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(line)
                await writer.drain()
                self.lines += 1
        writer.close()
        with contextlib.suppress(ConnectionError, dataplane.Stopped):
            await writer.wait_closed()
        self.connections += 1
        if self.connections == self.limit:
            self.enough.set()


async def serve(args: argparse.Namespace, dp: dataplane.Dataplane) -> Echo:
    """Until there were enough clients, the time is over, or Ctrl-C."""
    echo = Echo(args.count)
    server = await dp.start_server(echo, args.address, args.port)
    print(f"listening at {args.address or '*'} port {server.sockets[0].getsockname()[1]}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, echo.enough.set)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(args.seconds):
            await echo.enough.wait()
    server.close()
    return echo


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="tun", help="of the running dataplane")
    parser.add_argument("--address", help="to listen at; default: every address of both families")
    parser.add_argument("--port", type=int, default=7777)
    parser.add_argument("--count", type=int, help="end after so many clients")
    parser.add_argument("--seconds", type=float, help="end after so long")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with dataplane.attach(args.name) as dp:
        echo = asyncio.run(serve(args, dp))
    print(f"echoed {echo.lines} lines to {echo.connections} clients")


if __name__ == "__main__":
    main()
