"""The ledger and the sockets as tables for people. Called by the commands `run`, `stat`, `ss` and `demo`.

Takes the JSON forms (`dataplane.ledger`, `messages.SocketInfo`), so that what is shown here and what a
program reads cannot differ.
"""

from __future__ import annotations

import pwd
from collections import Counter
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dataplane.control.messages import SocketInfo


def ledger_view(ledger: dict[str, Any], before: dict[str, Any] | None = None) -> RenderableType:
    """Totals and, if an earlier ledger is given, the rates since then: per queue, and per reason."""
    seconds = ledger["time"] - before["time"] if before else 0.0
    former = {(one["netif"], one["worker"]): one for one in before["queues"]} if before else {}
    headings = [">offered/s", ">delivered/s", ">sent/s"] if before else []
    queues = _table("netif", "worker", "state", *headings,
                    ">offered", ">delivered", ">dropped", ">held", ">sent", "balanced")
    for queue in ledger["queues"]:
        rates = []
        if before:
            old = former.get((queue["netif"], queue["worker"]), queue)
            rates = [_rate(queue, old, key, seconds) for key in ("offered", "delivered", "tx_packets")]
        worker = "all" if queue["worker"] < 0 else str(queue["worker"])
        dropped = sum(queue["dropped"].values())
        counts = (queue["offered"], queue["delivered"], dropped, queue["held"], queue["tx_packets"])
        queues.add_row(f"{queue['netif']} ({queue['kind']})", worker, queue["status"], *rates,
                       *map(_count, counts), _verdict(queue["balanced"]))
    views: list[RenderableType] = [_headline(ledger), queues]
    if ledger["dropped"]:
        views.append(_reasons(ledger, before, seconds))
    return Group(*views)


def _headline(ledger: dict[str, Any]) -> Text:
    names = ("offered", "delivered", "deliveries", "consumed", "unread")
    parts = [f"{name} {ledger[name]:,}" for name in names]
    who = f"{ledger['sockets']} sockets of {ledger['consumers']} consumers"
    text = Text(f"dataplane {ledger['name']}: {', '.join(parts)}; {who}; ")
    balanced = Text("balanced", "green") if ledger["balanced"] else Text("not balanced", "bold red")
    return text.append_text(balanced)


def _reasons(ledger: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> Table:
    table = _table("not delivered because", ">frames", *([">frames/s"] if before else []))
    for reason, count in sorted(ledger["dropped"].items(), key=lambda item: -item[1]):
        rate = [_rate(ledger["dropped"], Counter(before["dropped"]), reason, seconds)] if before else []
        table.add_row(reason, _count(count), *rate)
    return table


def sockets_view(sockets: list[SocketInfo]) -> Table:
    """One line per socket, as ss(8) has them."""
    table = _table("kind", "state", "local", "remote", ">queued", ">bytes", ">published", ">dropped",
                   "owner", ">pid", ">consumer", "options")
    for one in sockets:
        remote = _endpoint(*one.remote) if one.remote else "*"
        counts = (one.queued, one.queued_bytes, one.published, one.dropped)
        table.add_row(_kind(one), one.state, _endpoint(*one.local), remote, *map(_count, counts),
                      _user(one.uid), str(one.pid), str(one.consumer), "reuseport" if one.reuseport else "")
    return table


def _table(*columns: str) -> Table:
    """`>` before a column's name: numbers, to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=True)
    return table


def _count(number: int) -> str:
    return f"{number:,}"


def _rate(now: dict[str, Any], before: dict[str, Any], key: str, seconds: float) -> str:
    return f"{(now[key] - before[key]) / seconds:,.0f}" if seconds > 0 else "0"


def _verdict(balanced: bool) -> Text:
    return Text("yes", "green") if balanced else Text("no", "bold red")


def _kind(socket: SocketInfo) -> str:
    if socket.kind != "raw":
        return socket.kind
    return f"raw {socket.proto}" if socket.proto else "raw *"


def _endpoint(address: str, port: int | None) -> str:
    shown = f"[{address}]" if ":" in address else address
    return f"{shown}:{'*' if port is None else port}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def width_for_pipes(stream: TextIO) -> int | None:
    """Width of a table that goes to a file or a pipe: None on a terminal, which knows its own."""
    return None if stream.isatty() else 160
