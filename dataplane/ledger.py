"""The ledger: every frame offered is delivered or counted under exactly one reason.

Rows live in the netif queues (`layout.N_LEDGER`); the RX worker that owns the queue is the only
writer, but for `crash_lost`, which the supervisor counts while there is no worker. What the kernel
dropped never came to a worker either: it is a word of its own (`N_KERNEL_DROPPED`) that the
supervisor writes, and the reader adds it to `offered` and to the reasons. So every word has one
writer, and nothing is added atomically.

A reason is a small positive code here and in the rows; kernels return it negated as a verdict, so
that verdicts below zero are reasons and others are PCB numbers.

Read by the supervisor, for `stat` and for the end. The JSON form, in all and for each queue:
`offered`, `delivered`, `deliveries`, `dropped` {reason: frames}, `held` (in reassembly now) and
`balanced`: offered == delivered + sum(dropped) + held, in every queue. A busy queue is read until
it is, or as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataplane.jit import kernel
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64

REASONS = (
    "none",                 # 0 is no reason: code 0 is never counted
    # link
    "truncated",            # fewer bytes than the headers promise (also a capture's snap length)
    "not_ip",               # another network protocol (LLDP, STP, ...), nobody's but a tap's
    "other_host",           # endpoint: the frame is addressed to another station
    "arp",                  # ARP, taken by the stack
    "bad_arp",
    "vlan_depth",           # more than two VLAN tags
    # network
    "bad_ip_version",
    "bad_ip_header",        # header length or total length impossible
    "bad_ip_checksum",
    "bad_ip_options",
    "bad_extension_header",
    "not_local",            # endpoint: not one of our addresses
    "martian",              # endpoint: a source address that cannot be
    # fragments
    "fragment_invalid",     # length not a multiple of 8, or past 65,535
    "fragment_overlap",     # RFC 5722: the whole datagram is discarded
    "fragment_duplicate",   # the very same fragment again
    "fragment_timeout",
    "fragment_evicted",     # reassembly memory was needed for a newer datagram
    "fragment_unfinished",  # still incomplete when the dataplane ended
    # transport
    "bad_udp_length",
    "bad_udp_checksum",
    "bad_tcp_header",
    "bad_tcp_checksum",
    "bad_icmp",             # too short or wrong checksum
    "icmp_echo",            # echo request, answered by the stack
    "icmp",                 # other ICMP, taken by the stack
    "neighbour",            # neighbour discovery, taken by the stack
    "bad_neighbour",
    "multicast_control",    # IGMP and MLD, taken by the stack
    "tcp_handshake",        # taken by a listener: SYNs, and what else opens no connection before its time
    "tcp_time_wait",        # for a connection that is over, answered by the stack
    # delivery
    "no_socket",            # (TCP: answered by a reset)
    "tcp_backlog",          # the listener's queue of connections to be accepted, or its memory, was full
    "pcq_full",             # every socket that wanted it had a full ring
    "ring_too_small",       # the packet can never fit in the socket's ring
    # outside the stack
    "kernel_dropped",       # the kernel had no room in its ring before we saw the frame
    "crash_lost",           # was in the hands of a worker that died
)

CODE = {name: code for code, name in enumerate(REASONS)}

(NONE, TRUNCATED, NOT_IP, OTHER_HOST, ARP, BAD_ARP, VLAN_DEPTH, BAD_IP_VERSION, BAD_IP_HEADER,
 BAD_IP_CHECKSUM, BAD_IP_OPTIONS, BAD_EXTENSION_HEADER, NOT_LOCAL, MARTIAN, FRAGMENT_INVALID,
 FRAGMENT_OVERLAP, FRAGMENT_DUPLICATE, FRAGMENT_TIMEOUT, FRAGMENT_EVICTED, FRAGMENT_UNFINISHED,
 BAD_UDP_LENGTH, BAD_UDP_CHECKSUM, BAD_TCP_HEADER, BAD_TCP_CHECKSUM, BAD_ICMP, ICMP_ECHO, ICMP, NEIGHBOUR,
 BAD_NEIGHBOUR, MULTICAST_CONTROL, TCP_HANDSHAKE, TCP_TIME_WAIT, NO_SOCKET, TCP_BACKLOG, PCQ_FULL, RING_TOO_SMALL,
 KERNEL_DROPPED, CRASH_LOST) = range(len(REASONS))

# -- reading -----------------------------------------------------------------------------------

_STATUS = {L.NS_RUNNING: "running", L.NS_ENDED: "ended", L.NS_FAILED: "failed"}
_TRIES = 50     # a busy queue changes every few microseconds: now and then one look finds it whole
_WORDS = 4 + len(REASONS)
_PUBLISHED, _CONSUMED, _DROPPED = 0, 1, 2


@dataclass(frozen=True)
class Queue:
    """A netif's queue: where it is in the arena, and what it is called."""

    place: int
    netif: str
    kind: str
    worker: int


@dataclass(frozen=True)
class Row:
    """What one queue's counters said."""

    offered: int
    delivered: int
    deliveries: int
    held: int
    dropped: dict[str, int]     # without the reasons that did not occur

    @property
    def in_hand(self) -> int:
        """Frames offered that are in no other counter yet: those of the burst that is under way."""
        return self.offered - self.delivered - self.held - sum(self.dropped.values())


def read_row(mem: Any, queue: int) -> Row:
    """The counters of the netif queue at `queue`; they may be those of an unfinished burst."""
    place = queue + L.N_LEDGER
    offered, delivered, deliveries, held, *reasons = mem[place:place + 8 * _WORDS].view(np.int64).tolist()
    reasons[KERNEL_DROPPED] = unseen = _word(mem, queue + L.N_KERNEL_DROPPED)
    dropped = {name: count for name, count in zip(REASONS, reasons, strict=True) if count}
    return Row(offered + unseen, delivered, deliveries, held, dropped)


def settled_row(mem: Any, queue: int) -> Row:
    """`read_row`, repeated a while until nothing is in hand."""
    row = read_row(mem, queue)
    for _ in range(_TRIES):
        if row.in_hand == 0:
            break
        row = read_row(mem, queue)
    return row


def write_off(mem: Any, queue: int) -> int:
    """Counts what was in the hands of a dead worker, and what it was reassembling, as lost."""
    row = read_row(mem, queue)
    lost = row.in_hand + row.held
    held, reason = queue + L.N_LEDGER + L.L_HELD, queue + L.N_LEDGER + L.L_REASONS + 8 * CRASH_LOST
    mem[held:held + 8].view(np.int64)[0] = 0
    mem[reason:reason + 8].view(np.int64)[0] += lost
    return lost


@kernel("i64(mem, i64, i64)")
def _socket_total(mem, table, what):
    """Sum over all sockets' lanes. A consumer's count of what it took is believed up to what was
    published, and from 0 on."""
    total = 0
    states = ld64(mem, table + L.T_LANES)
    for index in range(ld64(mem, table + L.T_WORKERS) * ld64(mem, table + L.T_SOCKETS)):
        state = states + index * L.LS_BYTES
        lane = ld64(mem, state + L.LS_BASE)
        # A lane that never had a packet is not looked at: it may be in a page that has no memory yet.
        if lane == 0 or ld64(mem, state + L.LS_COUNT) | ld64(mem, state + L.LS_DROPPED) == 0:
            continue
        if what == _DROPPED:
            total += ld64(mem, state + L.LS_DROPPED)
        elif what == _PUBLISHED:
            total += ld64(mem, state + L.LS_COUNT)
        else:
            total += min(max(ld64(mem, lane + L.LANE_CONSUMED), 0), ld64(mem, state + L.LS_COUNT))
    return total


def unread(mem: Any, table: int) -> int:
    """Packets in the rings of open sockets that their consumers have not taken."""
    consumed = _socket_total(mem, table, _CONSUMED)     # first: what is taken meanwhile was published before
    return max(0, int(_socket_total(mem, table, _PUBLISHED)) - int(consumed))


def snapshot(mem: Any, table: int, queues: Sequence[Queue], closed: Counter[str]) -> dict[str, Any]:
    """The ledger as JSON. `closed`: sums of the counters of sockets that are no more."""
    consumed = int(_socket_total(mem, table, _CONSUMED)) + closed["consumed"]
    rows = [(queue, settled_row(mem, queue.place)) for queue in queues]
    result = _summary([row for _, row in rows])
    result["consumed"] = consumed
    result["unread"] = unread(mem, table) + closed["queued"]
    result |= _transmitted(mem, queues)
    result["queues"] = [_queue(mem, queue, row) for queue, row in rows]
    return result


def merged(ledger: dict[str, Any]) -> dict[str, Any]:
    """The same with one entry per netif (worker -1) instead of one per queue."""
    netifs: dict[str, dict[str, Any]] = {}
    for queue in ledger["queues"]:
        found = netifs.get(queue["netif"])
        netifs[queue["netif"]] = queue | {"worker": -1} if found is None else _merge(found, queue)
    return ledger | {"queues": list(netifs.values())}


def _merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    total = one | {key: value + other[key] for key, value in one.items()
                   if key != "worker" and type(value) is int}
    total["dropped"] = dict(Counter(one["dropped"]) + Counter(other["dropped"]))
    total["balanced"] = one["balanced"] and other["balanced"]
    return total


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    for row in rows:
        dropped.update(row.dropped)
    return {
        "offered": sum(row.offered for row in rows),
        "delivered": sum(row.delivered for row in rows),
        "deliveries": sum(row.deliveries for row in rows),
        "dropped": dict(dropped),
        "held": sum(row.held for row in rows),
        "balanced": all(row.in_hand == 0 for row in rows),
    }


def _queue(mem: Any, queue: Queue, row: Row) -> dict[str, Any]:
    name = {"netif": queue.netif, "kind": queue.kind, "worker": queue.worker,
            "status": _STATUS.get(_word(mem, queue.place + L.N_STATUS), "unknown")}
    return name | _summary([row]) | _transmitted(mem, [queue])


def _transmitted(mem: Any, queues: Iterable[Queue]) -> dict[str, int]:
    words = {"tx_packets": L.N_TX_PACKETS, "tx_bytes": L.N_TX_BYTES, "tx_dropped": L.N_TX_DROPPED}
    places = [queue.place for queue in queues]
    return {name: sum(_word(mem, place + word) for place in places) for name, word in words.items()}


def _word(mem: Any, place: int) -> int:
    return int(mem[place:place + 8].view(np.int64)[0])
