"""An HTTP server: aiohttp on top of the dataplane, through asyncio's protocol interface. Needs `pip install aiohttp`.

    dataplane run configs/tun.toml          (as root: a TUN interface, 10.77.0.1)
    python examples/http_server.py --directory /usr/share/doc
    curl http://10.77.0.1:8080/
    curl -o /dev/null http://10.77.0.1:8080/bytes/100000000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import html
import signal
from pathlib import Path
from urllib.parse import quote

from aiohttp import web

import dataplane

PIECE = bytes(range(256)) * 1024


class Site:
    """Files of a directory, and /bytes/N: so many bytes, 0 to 255 again and again."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory.resolve() if directory is not None else None
        self.requests = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request; a connection may bring many (keep-alive)."""
        self.requests += 1
        if request.method not in ("GET", "HEAD"):
            raise web.HTTPMethodNotAllowed(request.method, ["GET", "HEAD"])
        if request.path.startswith("/bytes/"):
            return await self.generated(request)
        return self.file(request)

    async def generated(self, request: web.BaseRequest) -> web.StreamResponse:
        """`drain` inside of write() keeps what is in memory small, however slow the client is."""
        number = request.path.removeprefix("/bytes/")
        if not number.isascii() or not number.isdigit() or len(number) > 15:
            raise web.HTTPNotFound()
        response = web.StreamResponse()
        response.content_length = left = int(number)
        await response.prepare(request)
        while left and request.method == "GET":
            await response.write(PIECE[:left])
            left -= min(left, len(PIECE))
        await response.write_eof()
        return response

    def file(self, request: web.BaseRequest) -> web.StreamResponse:
        """Nothing outside of the directory, whatever the path says."""
        if self.directory is None:
            return web.Response(text="ask for /bytes/N\n")
        if "\0" in request.path:
            raise web.HTTPNotFound()
        path = (self.directory / request.path.lstrip("/")).resolve()
        if not path.is_relative_to(self.directory) or not path.exists():
            raise web.HTTPNotFound()
        if path.is_dir():
            names = sorted(one.name + "/" * one.is_dir() for one in path.iterdir())
            base = request.path.rstrip("/")
            lines = "".join(f'<li><a href="{quote(base)}/{quote(name)}">{html.escape(name)}</a>\n' for name in names)
            return web.Response(text=f"<!doctype html><ul>\n{lines}</ul>\n", content_type="text/html")
        return web.FileResponse(path)


async def serve(args: argparse.Namespace, dp: dataplane.Dataplane) -> Site:
    """Until the time is over, or Ctrl-C."""
    site, over = Site(args.directory), asyncio.Event()
    factory = web.Server(site.handle)       # makes an asyncio.Protocol for each connection
    server = await dp.create_server(factory, args.address, args.port)
    print(f"listening at {args.address or '*'} port {server.sockets[0].getsockname()[1]}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(args.seconds):
            await over.wait()
    server.close()
    await factory.shutdown(5)
    return site


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="tun", help="of the running dataplane")
    parser.add_argument("--address", help="to listen at; default: every address of both families")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--directory", type=Path, help="whose files to serve")
    parser.add_argument("--seconds", type=float, help="end after so long")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with dataplane.attach(args.name) as dp:
        site = asyncio.run(serve(args, dp))
    print(f"answered {site.requests} requests")


if __name__ == "__main__":
    main()
