"""The ledger and the sockets as tables for people. Called by the commands `run`, `stat`, `ss` and `demo`.

Takes the JSON forms (`dataplane.ledger`, `messages.SocketInfo`), so that what is shown here and what a
program reads cannot differ.
"""

from __future__ import annotations

import pwd
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dataplane.control.messages import SocketInfo

UNLIMITED = 1 << 40     # an ssthresh like this has never been lowered


def ledger_view(ledger: dict[str, Any], before: dict[str, Any] | None = None) -> RenderableType:
    """Totals and, if an earlier ledger is given, the rates since then: per queue, and per reason."""
    seconds = ledger["uptime"] - before["uptime"] if before else 0.0     # no matter who sets the clock
    former = {(one["netif"], one["worker"]): one for one in before["queues"]} if before else {}
    headings = [">offered/s", ">delivered/s", ">sent/s"] if before else []
    queues = FittedTable(
        "netif", "kind", "worker", "state", *headings,
        ">offered", ">delivered", ">dropped", ">held", ">sent", "balanced",
        spare=("kind", "state", "held", "worker", "sent", "balanced", "offered", "sent/s", "delivered"))
    for queue in ledger["queues"]:
        rates = []
        if before:
            old = former.get((queue["netif"], queue["worker"]), queue)
            rates = [_rate(queue, old, key, seconds) for key in ("offered", "delivered", "tx_packets")]
        worker = "all" if queue["worker"] < 0 else str(queue["worker"])
        dropped = sum(queue["dropped"].values())
        counts = (queue["offered"], queue["delivered"], dropped, queue["held"], queue["tx_packets"])
        queues.add_row(queue["netif"], queue["kind"], worker, queue["status"], *rates,
                       *map(_count, counts), _verdict(queue["balanced"]))
    views: list[RenderableType] = [_headline(ledger), "", queues]
    if ledger["dropped"]:
        views += ["", _reasons(ledger, before, seconds)]
    return Group(*views)


def _headline(ledger: dict[str, Any]) -> Text:
    names = ("offered", "delivered", "deliveries", "consumed", "unread")
    parts = [f"{name} {ledger[name]:,}" for name in names]
    parts += [f"{name} {ledger[name]}" for name in ("sockets", "consumers")]
    text = Text(f"dataplane {ledger['name']}: {', '.join(parts)}; ")
    balanced = Text("balanced", "green") if ledger["balanced"] else Text("not balanced", "bold red")
    return text.append_text(balanced)


def _reasons(ledger: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> RenderableType:
    table = FittedTable("not delivered because", ">frames", *([">frames/s"] if before else []))
    for reason, count in sorted(ledger["dropped"].items(), key=lambda item: -item[1]):
        rate = [_rate(ledger["dropped"], Counter(before["dropped"]), reason, seconds)] if before else []
        table.add_row(reason, _count(count), *rate)
    return table


def sockets_view(sockets: list[SocketInfo]) -> RenderableType:
    """One line per socket, as ss(8) has them."""
    table = FittedTable(
        "kind", "state", "local", "remote", ">queued", ">bytes", ">published", ">dropped",
        "owner", ">pid", ">consumer", "options",
        spare=("consumer", "bytes", "owner", "published", "options", "pid", "state", "remote"))
    for one in sockets:
        remote = endpoint(*one.remote) if one.remote else "*"
        options = ["reuseport"] if one.reuseport else []
        options += [f"backlog {one.backlog}"] if one.backlog else []
        counts = (one.queued, one.queued_bytes, one.published, one.dropped)
        table.add_row(kind_of(one), one.state, endpoint(*one.local), remote, *map(_count, counts),
                      _user(one.uid), str(one.pid), str(one.consumer), " ".join(options))
    return table


def connections_view(sockets: list[SocketInfo]) -> RenderableType:
    """One line per TCP connection, with what its control block says. Times in ms, the rest in bytes."""
    table = FittedTable(
        "state", "local", "remote", ">sendq", ">recvq", ">rcv_nxt", ">snd_una", ">snd_nxt", ">cwnd", ">ssthresh",
        ">srtt", ">rto", ">retrans", ">pid",
        spare=("pid", "ssthresh", "rcv_nxt", "rto", "snd_una", "snd_nxt", "local", "retrans"))
    for one in sockets:
        tcb = one.connection
        if tcb is None:
            continue
        counts = (tcb.send_queue, tcb.receive_queue, tcb.rcv_nxt, tcb.snd_una, tcb.snd_nxt, tcb.cwnd)
        ssthresh = _count(tcb.ssthresh) if tcb.ssthresh < UNLIMITED else "-"
        table.add_row(one.state, endpoint(*one.local), endpoint(*one.remote) if one.remote else "*",
                      *map(_count, counts), ssthresh, f"{tcb.srtt:.1f}", f"{tcb.rto:.0f}", _count(tcb.retransmits),
                      str(one.pid))
    return table


class FittedTable:
    """A table that leaves out columns where the terminal is too narrow: those of `spare`, in this order. `>`
    before a column's name: numbers, to the right."""

    def __init__(self, *columns: str, spare: Sequence[str] = ()) -> None:
        self._columns, self._spare = columns, spare
        self._rows: list[tuple[str | Text, ...]] = []

    def add_row(self, *cells: str | Text) -> None:
        """One cell for each column."""
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = self._table(())
        for left_out in range(len(self._spare) + 1):
            table = self._table(self._spare[:left_out])
            if Measurement.get(console, options.update_width(1000), table).maximum <= options.max_width:
                break
        yield table

    def _table(self, without: Sequence[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        shown = [i for i, column in enumerate(self._columns) if column.lstrip(">") not in without]
        for i in shown:
            column = self._columns[i]
            justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
            table.add_column(column.lstrip(">"), justify=justify, no_wrap=True)
        for row in self._rows:      # as Text: in a str, rich would take [fd77::1] for a style
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in (row[i] for i in shown)))
        return table


def _count(number: int) -> str:
    return f"{number:,}"


def _rate(now: dict[str, Any], before: dict[str, Any], key: str, seconds: float) -> str:
    return f"{(now[key] - before[key]) / seconds:,.0f}" if seconds > 0 else "0"


def _verdict(balanced: bool) -> Text:
    return Text("yes", "green") if balanced else Text("no", "bold red")


def kind_of(socket: SocketInfo) -> str:
    """Of socket, with the protocol of a raw one."""
    if socket.kind != "raw":
        return socket.kind
    return f"raw {socket.proto}" if socket.proto else "raw *"


def endpoint(address: str, port: int | None) -> str:
    """`10.77.0.1:53`, `[fd77::1]:53`, `*:53`."""
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
