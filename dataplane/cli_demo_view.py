"""What `dataplane demo` shows: live tables on a terminal, a line a second elsewhere. Called by `cli_demo`.

A `Screen` is told what happens and knows nothing of processes. Everything is plain ASCII but rich's table
lines, so that any terminal shows it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from dataplane.cli_tables import FittedTable, endpoint, kind_of, ledger_view, width_for_pipes
from dataplane.control.messages import SocketInfo

LEAST_WIDTH, LEAST_HEIGHT = 56, 14      # of a terminal for tables
FIRST_START = "the first start compiles for about half a minute"
NOTICE_SECONDS = 4.0                    # a start that takes longer is explained
LINE_SLACK = 0.2                        # seconds by which a line may be early


@dataclass(frozen=True)
class Moment:
    """What the dataplane and the consumers said at one time."""

    ledger: dict[str, Any]
    sockets: list[tuple[str, SocketInfo]]       # with the consumer that has it
    reports: dict[str, dict[str, Any]]          # by consumer


def screen() -> Screen:
    """The one for what standard output is."""
    console = Console(width=width_for_pipes(sys.stdout))
    roomy = console.width >= LEAST_WIDTH and console.height >= LEAST_HEIGHT
    live = console.is_terminal and not console.is_dumb_terminal and roomy
    return LiveScreen(console) if live else Screen(console)


class Screen:
    """Plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = ""
        self._started = self._next = 0.0

    def begin(self, name: str, cores: Sequence[int]) -> None:
        """What is about to run."""
        on = f"on core {cores[0]}" if len(cores) == 1 else f"on cores {', '.join(map(str, cores))}"
        self._title = f"dataplane demo: {name}, {len(cores)} RX worker{'s' * (len(cores) > 1)} {on}"
        self._line(self._title)

    def waiting(self, what: str, notice: str, seconds: float) -> None:
        """Something takes its time."""
        line = _with_notice(what, notice, seconds)
        if line != self._said:
            self._said = line
            self._line(line)

    def show(self, now: Moment, before: Moment, left: float) -> None:
        """The state, `left` seconds before the end."""
        self._started = self._started or now.ledger["uptime"] - LINE_SLACK
        seconds = now.ledger["uptime"] - self._started
        if seconds >= self._next + 1:
            self._next = seconds // 1
            self._line(f"{seconds:3.0f} s  {_rates_line(now, before)}")

    def ending(self) -> None:
        """All is being ended."""

    def end(self) -> None:
        """Nothing moves any more. May be called again."""

    def result(self, reports: dict[str, dict[str, Any]], ledger: dict[str, Any]) -> None:
        """What came of it."""
        self._console.print()
        for label, report in reports.items():
            self._console.print(Text(f"{label:12} {_summary(report)}"))
        self._console.print("", ledger_view(ledger), sep="\n")
        if "no_socket" in ledger["dropped"]:
            self._console.print("", Text("no_socket: what came before the consumers did", "dim"), sep="\n")

    def _line(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=not self._console.is_terminal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.end()


class LiveScreen(Screen):
    """Tables that stand still while their numbers change."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._spinner = Spinner("line")
        self._live = Live(console=console, auto_refresh=False)
        self._views: list[RenderableType] = []

    def begin(self, name: str, cores: Sequence[int]) -> None:
        super().begin(name, cores)
        self._live.start()

    def waiting(self, what: str, notice: str, seconds: float) -> None:
        self._spinner.update(text=Text(f"{_with_notice(what, notice, seconds)} {seconds:.0f} s"))
        self._live.update(self._spinner, refresh=True)

    def show(self, now: Moment, before: Moment, left: float) -> None:
        self._views = _views(now, before, self._console.height - 3)
        self._update(f"{left:2.0f} s left, Ctrl-C ends it")

    def ending(self) -> None:
        self._update("the last second:")

    def _update(self, head: str) -> None:
        self._live.update(Group(Text(head, "dim"), "", *self._views), refresh=True)

    def end(self) -> None:
        self._live.stop()


def _with_notice(what: str, notice: str, seconds: float) -> str:
    if notice:
        return f"{what}: {notice} ({FIRST_START})"
    return f"{what} ({FIRST_START})" if seconds > NOTICE_SECONDS else what


# -- tables --------------------------------------------------------------------------------------------------


def _views(now: Moment, before: Moment, height: int) -> list[RenderableType]:
    """Tables, and below them what the consumers found, in so many lines if it can be."""
    seconds = now.ledger["uptime"] - before.ledger["uptime"]
    rows = _socket_rows(now, before, seconds)
    notes = _notes(now)
    queues = now.ledger["queues"]
    fixed = len(queues) + 2 + 1 + 2         # headings and a space
    if fixed + len(rows) + 1 + len(notes) > height:
        rows = _by_consumer(rows)
    if fixed + len(rows) + 1 + len(notes) > height:
        notes = []
    table = FittedTable("consumer", "socket", ">packets/s", ">packets", ">queued", ">dropped",
                        spare=("packets", "socket"))
    for label, socket, rate, *counts in rows:
        table.add_row(label, socket, f"{rate:,.0f}", *(f"{count:,}" for count in counts))
    views: list[RenderableType] = [_queue_table(now, before, seconds), "", table]
    return [*views, "", *notes] if notes else views


def _queue_table(now: Moment, before: Moment, seconds: float) -> FittedTable:
    table = FittedTable("netif queue", ">offered/s", ">delivered/s", ">offered", ">delivered", ">dropped",
                        spare=("offered", "delivered"))
    for queue, old in zip(now.ledger["queues"], before.ledger["queues"], strict=True):
        rates = (_rate(queue[key] - old[key], seconds) for key in ("offered", "delivered"))
        table.add_row(f"{queue['netif']} {queue['worker']}", *(f"{rate:,.0f}" for rate in rates),
                      f"{queue['offered']:,}", f"{queue['delivered']:,}", f"{sum(queue['dropped'].values()):,}")
    return table


Row = tuple[str, str, float, int, int, int]     # consumer, socket, packets/s, packets, queued, dropped


def _socket_rows(now: Moment, before: Moment, seconds: float) -> list[Row]:
    former = {one.pcb: one.published for _, one in before.sockets}
    return [(label, _socket(one), _rate(one.published - former.get(one.pcb, 0), seconds), one.published,
             one.queued, one.dropped) for label, one in now.sockets]


def _by_consumer(rows: Sequence[Row]) -> list[Row]:
    """One row for all sockets of a consumer."""
    merged: list[Row] = []
    for label in dict.fromkeys(row[0] for row in rows):
        _, sockets, *counts = zip(*(row for row in rows if row[0] == label), strict=True)
        rate, packets, queued, dropped = (sum(one) for one in counts)
        name = sockets[0] if len(sockets) == 1 else f"{len(sockets)} sockets"
        merged.append((label, name, rate, packets, queued, dropped))
    return merged


def _socket(one: SocketInfo) -> str:
    if one.kind == "tap":
        return "tap"
    return f"{kind_of(one)} {endpoint(*one.local)}{' reuseport' if one.reuseport else ''}"


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


# -- words ---------------------------------------------------------------------------------------------------


def _notes(now: Moment) -> list[Text]:
    """What the consumers found out, in a line each."""
    lines = []
    if dns := now.reports.get("dns"):
        names = ", ".join(f"{name} {count:,}" for name, count in list(dns["names"].items())[:4])
        lines.append(f"dns: {_types(dns)}; {names}")
    pair = [report["flows"] for label, report in now.reports.items() if label.startswith("telemetry")]
    if pair:
        lines.append(f"telemetry: {sum(pair)} sensors, each flow whole at one process: {' + '.join(map(str, pair))}")
    return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]


def _types(dns: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in list(dns["types"].items())[:4])


def _rates_line(now: Moment, before: Moment) -> str:
    seconds = now.ledger["uptime"] - before.ledger["uptime"]
    offered, delivered = (_rate(now.ledger[key] - before.ledger[key], seconds) for key in ("offered", "delivered"))
    dropped = _rate(sum(now.ledger["dropped"].values()) - sum(before.ledger["dropped"].values()), seconds)
    rows = _by_consumer(_socket_rows(now, before, seconds))
    consumers = ", ".join(f"{label} {rate:,.0f}/s" for label, _, rate, *_ in rows)
    queued, lost = sum(row[4] for row in rows), sum(row[5] for row in rows)
    return (f"offered {offered:,.0f}/s, delivered {delivered:,.0f}/s, dropped {dropped:,.0f}/s; {consumers}; "
            f"in rings {queued:,}, lost {lost:,}")


def _summary(report: dict[str, Any]) -> str:
    line = f"{report['packets']:,} packets, {report['bytes']:,} bytes"
    if "types" not in report:
        return line
    names = ", ".join(f"{name} {count:,}" for name, count in list(report["names"].items())[:3])
    return f"{line}: {_types(report)}; most asked for: {names}"
