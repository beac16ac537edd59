"""The memory that a worker's kernels need beside the table.

Called by the supervisor (`prepare`, once, before the first fork) and by the worker process
(`attach_private`, after each fork, the replacement's as well).
"""

from __future__ import annotations

from typing import Any

from dataplane.inet import fragments, neighbour, step, tcp_accept, tcp_service
from dataplane.pcb import lookup
from dataplane.pcb.table import Table
from dataplane.shm import layout as L
from dataplane.shm import layout_tcp as T
from dataplane.shm.arena import Arena
from dataplane.tcp import syncache

__all__ = ["attach_private", "prepare"]


def prepare(arena: Arena, table: Table, index: int, icmp_rate: int, tx_ring_bytes: int,
            rst_rate: int = 1000) -> None:
    """Fills worker `index`'s block, and makes what must outlive the worker: the list of lanes that
    it has staged to but not published. `icmp_rate`, `rst_rate`: errors and resets a second."""
    block = table.worker(index)
    table.put(block + L.W_DIRTY, arena.map_anonymous(table.sockets * 16, shared=True))
    table.put(block + L.W_ICMP_RATE, icmp_rate)
    table.put(block + L.W_RST_RATE, rst_rate)
    table.put(table.offset + L.T_TX_RING, tx_ring_bytes)


def attach_private(arena: Arena, table: Table, index: int, reassemblies: int, fragment_timeout: float,
                   stamp: int, syn_cache: int = 4096) -> int:
    """Maps the worker's private areas and makes its block point to them; takes over what a dead
    predecessor left. Returns the block's offset.

    `reassemblies`: datagrams in reassembly at a time; `fragment_timeout` in seconds; `stamp`: what
    this process writes into locks, never used by another; `syn_cache`: handshakes remembered, a power of two.
    """
    block = table.worker(index)
    areas: list[tuple[int, int]] = [
        (L.W_BURST, L.BURST * L.P_BYTES),
        (L.W_TX_BURST, L.TX_BURST * L.P_BYTES),
        (L.W_TX_BUFFER, L.TX_BUFFER_BYTES),
        (L.W_FRAGMENTS, fragments.area_bytes(reassemblies)),
        (L.W_CONSUMERS, L.CONSUMERS_MAX * 8),
        (L.W_CONSUMER_IDS, L.CONSUMERS_MAX * 8),
        (L.W_TX_LANES, L.CONSUMERS_MAX * 16),
        (L.W_PENDING, neighbour.pending_bytes()),
        (L.W_EVENTS, L.EVENTS_MAX * 16),
        (L.W_TCP_DIRTY, L.BURST * 8),
        (L.W_TCP_EXCHANGE, T.X_BYTES),
        (L.W_SYN_CACHE, syncache.syn_area_bytes(syn_cache)),
    ]
    mem: Any = arena.mem
    for word, size in areas:
        table.put(block + word, arena.map_anonymous(size))
    # Not W_MAILBOX: the supervisor may have sent an order by now, and a stale 1 costs one look.
    for word in (L.W_TX_COUNT, L.W_TX_USED, L.W_CONSUMER_COUNT, L.W_BLOCKED, L.W_TCP_COUNT):
        table.put(block + word, 0)
    if dead := table.get(block + L.W_STAMP):
        neighbour.neighbour_repair(mem, table.offset, dead, stamp)
        lookup.buckets_unlock(mem, table.offset, dead)
        tcp_service.tcp_unlock(mem, table.offset, dead)
    table.put(block + L.W_STAMP, stamp)
    events = table.get(block + L.W_EVENTS)
    mem[events:events + L.EVENTS_MAX * 16].view("i8")[:] = -1
    fragments.fragments_init(mem, table.get(block + L.W_FRAGMENTS), reassemblies, int(fragment_timeout * 1e9))
    syncache.syn_init(mem, table.get(block + L.W_SYN_CACHE), syn_cache, table.offset)
    step.recover(mem, block)
    if dead:
        tcp_accept.listen_recover(mem, block)
        table.put(block + L.W_WANT, 1)      # in case it died before the supervisor was told
    return block
