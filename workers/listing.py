"""Sockets in words, for `dataplane ss`: what the PCB says, the lanes' counters, a connection's control block.

Called by the control service. Reads only. A connection's words stand in its owner's memory and change while they
are read: each is read once and brought into its bounds, and two of them need not fit together.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from dataplane.control import messages
from dataplane.pcb.table import TCP, Table
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T

STATES = ("closed", "listen", "syn_sent", "syn_received", "established", "fin_wait_1", "fin_wait_2", "close_wait",
          "closing", "last_ack", "time_wait")
_MOST = 1 << 62
_MS = 1e6               # ns
_KINDS = {L.CLASS_RAW: "raw", L.CLASS_TAP: "tap"}


def describe_socket(table: Table, number: int) -> messages.SocketInfo:
    """The open PCB `number`."""
    families, local, port, remote = table.key(number)
    key, kind = table.word(number, L.PCB_KEY), table.word(number, L.PCB_KIND)
    proto, cls = key >> 32 & 0xFF, key >> 40 & 0xFF
    if kind == L.PK_CONNECTION:
        state, connection = describe_connection(table, number)
    else:
        state = {L.PK_LISTEN: "listen", L.PK_TIME_WAIT: "time_wait"}.get(kind, "connected" if remote else "open")
        connection = None
    ring = 0 if kind == L.PK_TIME_WAIT else table.word(number, L.PCB_RING)
    return messages.SocketInfo(
        pcb=number, kind="tcp" if proto == TCP and cls not in _KINDS else _KINDS.get(cls, "udp"), proto=proto,
        local=(_name(families, *local), port or None), remote=remote and (_name(families, *remote[:2]), remote[2]),
        state=state, reuseport=bool(key >> 56 & L.KEY_REUSEPORT), pid=table.word(number, L.PCB_PID),
        uid=table.word(number, L.PCB_UID), consumer=table.word(number, L.PCB_OWNER), ring_bytes=ring,
        **table.counters(number), backlog=table.word(number, L.PCB_BACKLOG) if kind == L.PK_LISTEN else 0,
        connection=connection)


def describe_connection(table: Table, number: int) -> tuple[str, messages.ConnectionInfo]:
    """State and control block of a connection. Where the slot is, and how large its buffers, the PCB says."""
    slot, sizes = table.word(number, L.PCB_PLACE), table.word(number, L.PCB_BUFFERS)
    block = slot + T.CONN_BLOCKS + (table.get(slot + T.CONN_CURRENT) & 1) * T.TCB_BYTES
    send_bytes, receive_bytes = 1 << (sizes & 0xFF), 1 << (sizes >> 8 & 0xFF)
    word = _reader(table, block)
    written, acked = table.get(slot + T.CONN_WRITTEN), table.get(slot + T.CONN_ACKED)
    received, read = table.get(slot + T.CONN_RECEIVED), table.get(slot + T.CONN_READ)
    state = word(T.T_STATE, len(STATES) - 1)
    return STATES[state], messages.ConnectionInfo(
        send_queue=min(max(written - acked, 0), send_bytes), receive_queue=min(max(received - read, 0), receive_bytes),
        send_bytes=send_bytes, receive_bytes=receive_bytes,
        iss=word(T.T_ISS, 0xFFFFFFFF), irs=word(T.T_IRS, 0xFFFFFFFF), rcv_nxt=word(T.T_RCV_NXT),
        snd_una=word(T.T_SND_UNA), snd_nxt=word(T.T_SND_NXT), snd_wnd=word(T.T_SND_WND), mss=word(T.T_MSS, 65535),
        cwnd=word(T.T_CWND), ssthresh=word(T.T_SSTHRESH), srtt=word(T.T_SRTT) / _MS, rttvar=word(T.T_RTTVAR) / _MS,
        rto=word(T.T_RTO) / _MS, backoff=word(T.T_BACKOFF), retransmits=word(T.T_RETRANSMITS),
        segments_in=word(T.T_SEGMENTS_IN), segments_out=word(T.T_SEGMENTS_OUT))


def _reader(table: Table, block: int) -> Callable[..., int]:
    def word(offset: int, most: int = _MOST) -> int:
        return min(max(table.get(block + offset), 0), most)

    return word


def _name(families: int, hi: int, lo: int) -> str:
    """An address in words; "*" is every address of both families."""
    mask = (1 << 64) - 1
    if families == L.KEY_FAMILY4:
        return str(ipaddress.IPv4Address(lo & 0xFFFFFFFF))
    if families == L.KEY_FAMILY6:
        return str(ipaddress.IPv6Address((hi & mask) << 64 | lo & mask))
    return "*"
