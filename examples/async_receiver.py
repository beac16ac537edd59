"""Receives from several UDP ports in one asyncio event loop, without a thread.

    dataplane run configs/quickstart.toml
    python examples/async_receiver.py --ports 53 5000 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal

import dataplane


async def receive(sock: dataplane.UDPSocket, limit: int | None, counts: dict[int | None, list[int]]) -> None:
    """Counts the packets and bytes of one socket, until there were `limit`, or the dataplane has ended."""
    totals = counts.setdefault(sock.address[1], [0, 0])
    async for batch in sock:        # each batch is released when the next is asked for
        totals[0] += len(batch)
        totals[1] += int(batch.lengths.sum())
        if limit is not None and totals[0] >= limit:
            break


async def receive_all(args: argparse.Namespace, dp: dataplane.Dataplane) -> dict[int | None, list[int]]:
    counts: dict[int | None, list[int]] = {}
    socks = [dp.udp(None, port) for port in args.ports]
    tasks = [asyncio.create_task(receive(sock, args.count, counts)) for sock in socks]
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lambda: [task.cancel() for task in tasks])
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(args.seconds):
            await asyncio.gather(*tasks, return_exceptions=True)
    return counts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="quickstart", help="of the running dataplane")
    parser.add_argument("--ports", type=int, nargs="+", default=[53])
    parser.add_argument("--count", type=int, help="end after so many packets of each port")
    parser.add_argument("--seconds", type=float, help="end after so long")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with dataplane.attach(args.name) as dp:
        counts = asyncio.run(receive_all(args, dp))
    for port, (packets, size) in sorted(counts.items(), key=str):
        print(f"port {port}: {packets} packets, {size} bytes")
    print(f"received {sum(packets for packets, _ in counts.values())} packets")


if __name__ == "__main__":
    main()
