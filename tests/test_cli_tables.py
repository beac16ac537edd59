"""What `dataplane ss` shows of sockets, listeners and connections."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from dataplane.cli_tables import connections_view, sockets_view
from dataplane.control.messages import ConnectionInfo, SocketInfo


def socket(**fields: Any) -> SocketInfo:
    usual = SocketInfo(
        pcb=1, kind="tcp", proto=6, local=("10.77.0.1", 80), remote=None, state="listen", reuseport=False, pid=4711,
        uid=0, consumer=1, ring_bytes=4096, published=9, consumed=7, queued=2, queued_bytes=160, dropped=0, backlog=0,
        connection=None)
    return msgspec.structs.replace(usual, **fields)


def connection(**fields: Any) -> ConnectionInfo:
    usual = ConnectionInfo(
        send_queue=1000, receive_queue=200, send_bytes=4096, receive_bytes=8192, iss=1, irs=2, rcv_nxt=5001,
        snd_una=7001, snd_nxt=8001, snd_wnd=65535, mss=1448, cwnd=14480, ssthresh=1 << 62, srtt=1.25, rttvar=0.5,
        rto=201.0, backoff=0, retransmits=3, segments_in=10, segments_out=20)
    return msgspec.structs.replace(usual, **fields)


def shown(view: Any, width: int = 200) -> list[list[str]]:
    """The table's lines, cell by cell, without its rule."""
    out = io.StringIO()
    Console(file=out, width=width).print(view)
    return [line.split() for line in out.getvalue().splitlines() if line.strip(" ─")]


SOCKETS = [
    socket(backlog=128, reuseport=True),
    socket(remote=("fd77::2", 4000), local=("fd77::1", 80), state="established", connection=connection()),
    socket(remote=("10.77.0.2", 1), state="time_wait"),
    socket(kind="udp", proto=17, state="open"),
]


def test_all_sockets() -> None:
    heading, *rows = shown(sockets_view(SOCKETS))
    assert heading[0] == "kind" and [row[:2] for row in rows] == [
        ["tcp", "listen"], ["tcp", "established"], ["tcp", "time_wait"], ["udp", "open"]]
    assert rows[0][-3:] == ["reuseport", "backlog", "128"] and rows[0][4] == "2"
    assert rows[1][2:4] == ["[fd77::1]:80", "[fd77::2]:4000"]


def test_connections() -> None:
    heading, *rows = shown(connections_view([*SOCKETS, socket(
        remote=("10.77.0.2", 9), state="close_wait", connection=connection(ssthresh=2896))]))
    assert heading == ["state", "local", "remote", "sendq", "recvq", "rcv_nxt", "snd_una", "snd_nxt", "cwnd",
                       "ssthresh", "srtt", "rto", "retrans", "pid"]
    assert rows[0] == ["established", "[fd77::1]:80", "[fd77::2]:4000", "1,000", "200", "5,001", "7,001", "8,001",
                       "14,480", "-", "1.2", "201", "3", "4711"]
    assert rows[1][0] == "close_wait" and rows[1][9] == "2,896"


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_narrow_terminals(width: int) -> None:
    """Columns are left out; no line is longer than the terminal."""
    for view in (sockets_view(SOCKETS), connections_view(SOCKETS)):
        out = io.StringIO()
        Console(file=out, width=width).print(view)
        assert max(map(len, out.getvalue().splitlines())) <= width
        assert "established" in out.getvalue() or width < 80
