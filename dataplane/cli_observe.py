"""The commands `ss` and `stat`: what a running dataplane says about itself. Called by `dataplane.cli`.

An observer connects to the control socket and does not attach; whoever may connect may look.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from rich.console import Console
from rich.live import Live

from dataplane.cli_tables import connections_view, ledger_view, sockets_view, width_for_pipes
from dataplane.control.messages import Ledger, SocketInfo, SocketList, Sockets, Stats
from dataplane.control.wire import Connection
from dataplane.errors import Stopped

INTERVAL = 1.0      # seconds between two looks of `stat --watch`


def ss(name: str, as_json: bool, tcp: bool) -> None:
    """Print the open sockets; `tcp`: the TCP connections, with what their control blocks say."""
    with Connection.open(name) as connection:
        found = list(sockets(connection))
    if tcp:
        found = [one for one in found if one.connection is not None]
    if as_json:
        print(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        view = connections_view(found) if tcp else sockets_view(found)
        Console(width=width_for_pipes(sys.stdout)).print(view)


def sockets(connection: Connection) -> Iterator[SocketInfo]:
    """All open sockets, asked for in pieces."""
    start = 0
    while start >= 0:
        reply, _ = connection.request(Sockets(start), SocketList)
        yield from reply.sockets
        start = reply.next


def stat(name: str, as_json: bool, watch: bool) -> None:
    """Print the ledger, once or every INTERVAL until Ctrl-C or the dataplane's end."""
    with Connection.open(name) as connection:
        if watch:
            _watch(connection, as_json)
        elif as_json:
            print(json.dumps(_ledger(connection), indent=2))
        else:
            Console(width=width_for_pipes(sys.stdout)).print(ledger_view(_ledger(connection)))


def _ledger(connection: Connection) -> dict[str, Any]:
    reply, _ = connection.request(Stats(), Ledger)
    return reply.ledger


def _watch(connection: Connection, as_json: bool) -> None:
    console = Console(width=width_for_pipes(sys.stdout))
    before = _ledger(connection)
    if as_json or not console.is_terminal:
        for ledger in _ledgers(connection):
            if as_json:
                print(json.dumps(ledger), flush=True)
            else:
                console.print(ledger_view(ledger, before))
            before = ledger
        return
    with Live(ledger_view(before), console=console, auto_refresh=False) as live:
        for ledger in _ledgers(connection):
            live.update(ledger_view(ledger, before), refresh=True)
            before = ledger


def _ledgers(connection: Connection) -> Iterator[dict[str, Any]]:
    """One every INTERVAL, while the dataplane runs."""
    try:
        while True:
            time.sleep(INTERVAL)
            yield _ledger(connection)
    except (Stopped, KeyboardInterrupt):
        return
