"""asyncio's streams over TCP connections: its own StreamReader and StreamWriter, so that code written for
`asyncio.open_connection` and `asyncio.start_server` runs unchanged. Called by `Dataplane`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from dataplane.client.tcp import Connection, Listener
from dataplane.client.transport import Server, TCPTransport, await_open

__all__ = ["LIMIT", "connect_protocol", "connect_streams", "serve_protocol", "serve_streams"]

LIMIT = 1 << 16
"""Bytes that a StreamReader buffers: asyncio's own default."""

ClientConnected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


async def connect_protocol(factory: Callable[[], Any], connection: Connection) -> tuple[TCPTransport, Any]:
    """The transport and the protocol of a connection whose SYN was sent."""
    loop = asyncio.get_running_loop()
    try:
        await await_open(connection)
    except BaseException:
        connection.abort()
        raise
    protocol = factory()
    made = loop.create_future()
    transport = TCPTransport(loop, connection, protocol, made)
    try:
        await made
    except BaseException:
        transport.abort()
        raise
    return transport, protocol


async def connect_streams(connection: Connection, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The same, with streams."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await connect_protocol(lambda: protocol, connection)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def serve_protocol(factory: Callable[[], Any], listener: Listener, start: bool) -> Server:
    """A server that makes a protocol for each connection."""
    server = Server(asyncio.get_running_loop(), listener, factory)
    if start:
        await server.start_serving()
    return server


async def serve_streams(callback: ClientConnected, listener: Listener, limit: int, start: bool) -> Server:
    """The same, with streams."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, callback, loop=loop)

    return await serve_protocol(factory, listener, start)
