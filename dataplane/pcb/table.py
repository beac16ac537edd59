"""The PCB table as its writer, the supervisor, sees it: open, close, tell.

The kernels that RX workers run on it are in lookup.py and reuseport.py; their invariants hold
here: a PCB is complete before it can be found, is taken out before anything of it changes, and
its number is used again only when every worker has passed the epoch that `close` returned.

What only the writer needs (counts per port, members of groups, free numbers) is kept in Python
and could be made again from the table.

TCP. A listener and a connection opened by connect are sockets like the others, found through buckets.
A *slot* is a PCB with all that an accepted connection needs but addresses: the supervisor makes it
(`add_slot`) and puts its number into an RX worker's queue (`offer`); from then on workers own it (pcb/slots.py),
until the continuation worker reports it (`Freed`) or its listener is closed (`is_spare`). The PCBs behind the
sockets' are the continuation worker's: connections in TIME_WAIT, which need no memory of their owner.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataplane.pcb import lookup, reuseport, slots
from dataplane.rings.pcq import Pcq, pcq_bytes
from dataplane.shm import epoch
from dataplane.shm import layout as L

__all__ = ["SocketSpec", "Table"]

TCP, UDP = 6, 17
EPHEMERAL = range(49152, 65536)     # RFC 6335 section 6
CONNECTING = range(1024, 65536)     # RFC 6056 section 3.2: as many as there are
WRITER = 1                          # the supervisor's stamp in bucket locks and queues
_TRIES = 1000                       # looks at a bucket that another writer has locked
_KCONT_SPARE = 1024                 # room in the continuation queue beyond one place for each PCB
_SLOTS_SPARE = 64                   # and in a slot queue, for places that a dead producer has left
_CHUNK = 1 << 16                    # PCBs looked at in one go by `records`


@dataclass(slots=True)
class SocketSpec:
    """A socket to be opened. Addresses are (hi, lo) integers, an IPv4 address in lo."""

    kind: str                                   # "udp", "raw", "tap", "listen", "connection"
    families: int                               # L.KEY_FAMILY4 | L.KEY_FAMILY6
    proto: int = UDP                            # raw: 0 takes every protocol
    local: tuple[int, int] | None = None        # None: any
    port: int | None = None                     # None: any that nobody else is bound to
    remote: tuple[int, int, int] | None = None  # hi, lo, port
    reuseport: bool = False
    owner: int = 0                              # consumer number
    uid: int = 0
    pid: int = 0
    segment: int = 0
    slot: int = 0
    ring_bytes: int = 65536
    lanes: list[int] = field(default_factory=list)   # arena offset of each worker's lane
    wake: int = 0                                    # arena offset of the wake object; 0: a connection's
    place: int = 0                                   # connection: arena offset of its slot
    buffers: tuple[int, int] = (0, 0)                # connection: bytes of the send and of the receive ring
    backlog: int = 0                                 # listener: connections that may wait to be accepted

    @property
    def socket_class(self) -> int:
        """L.CLASS_...: where in the order of lookups it stands."""
        if self.kind == "tap":
            return L.CLASS_TAP
        if self.kind == "raw":
            return L.CLASS_RAW
        if self.remote is not None:
            return L.CLASS_HALF if self.local is None else L.CLASS_CONNECTED
        if self.port is None:
            return L.CLASS_ANY
        return L.CLASS_WILDCARD if self.local is None else L.CLASS_BOUND

    @property
    def key(self) -> tuple[int, int, int, int, int, int, int]:
        """What two sockets may share only as a reuseport group: class, protocol, ports, addresses."""
        remote = self.remote or (0, 0, 0)
        local = self.local or (0, 0)
        return (self.socket_class, self.proto, (self.port or 0) | remote[2] << 16, *local, remote[0], remote[1])

    @property
    def hashed(self) -> bool:
        """Found through a bucket. The others are found through chains: what comes for a group address
        goes to all sockets on its port, however many of them have the same key."""
        return self.kind in _ON_PORTS and not self.multicast

    @property
    def multicast(self) -> bool:
        """Bound to a group address, which any number of sockets may share, each with its copy."""
        if self.local is None or self.kind != "udp":
            return False
        hi, lo = self.local
        return lo >> 28 == 0xE if self.families == L.KEY_FAMILY4 else (hi >> 56) & 0xFF == 0xFF


_ON_PORTS = ("udp", "listen", "connection")
_PCB_KINDS = {"listen": L.PK_LISTEN, "connection": L.PK_CONNECTION}


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _round(value: int, to: int = 4096) -> int:
    return -(-value // to) * to


def _log2(size: int) -> int:
    return max(size.bit_length() - 1, 0)


def _bucket_count(sockets: int) -> int:
    """A power of two with the eight places of a bucket at most 60 % taken."""
    count = 16
    while count * 8 * 0.6 < sockets:
        count *= 2
    return count


def _queue_bytes(sockets: int) -> int:
    """Bytes of one worker's slot queue: all PCBs fit."""
    return _round(pcq_bytes(sockets + _SLOTS_SPARE), L.CACHE_LINE * 2)


def _regions(sockets: int, workers: int, netifs: int, groups: int, neighbours: int,
             time_wait: int) -> list[tuple[int | None, int]]:
    """(header word that points to it, bytes) of each region, in order.

    A socket takes PCB_BYTES, 13 to 27 bytes of buckets, 16 in the continuation queue, and for each worker
    LS_BYTES, 8 for a head of a slot list and 16 in the slot queue; a TIME_WAIT entry the same but the last.
    """
    ordinary, sockets = sockets, sockets + time_wait
    return [
        (None, L.T_HEADER),
        (L.T_PCBS, sockets * L.PCB_BYTES),
        (L.T_BUCKET_AT, _bucket_count(sockets) * L.BUCKET_BYTES),
        (L.T_PORTS, 2 * 65536),
        (L.T_CHAINS, 2 * 65536 * 4),
        (L.T_GROUPS, groups * L.GROUP_BYTES),
        (L.T_LANES, workers * sockets * L.LS_BYTES),
        (L.T_WORKER_AT, (workers + 1) * L.W_BYTES),
        (L.T_NIFS, netifs * workers * L.N_BYTES),
        (L.T_NEIGHBOURS, neighbours * L.NB_BYTES),
        (L.T_SLOT_HEADS, workers * sockets * 8),
        (L.T_SLOT_QUEUES, workers * _queue_bytes(ordinary)),
        (L.T_KCONT, pcq_bytes(sockets + _KCONT_SPARE)),
    ]


class Table:
    """The PCB table at `offset` of the arena; formats the zeroed memory there.

    One writer per process and table. `sockets`, `groups`, `time_wait` are capacities; `neighbours` a
    power of two. The attribute `sockets` counts all PCBs, those for TIME_WAIT from `ordinary` on.
    """

    def __init__(self, mem: Any, offset: int, sockets: int, workers: int, netifs: int,
                 groups: int = 1024, neighbours: int = 1024, time_wait: int = 0) -> None:
        self.mem, self.offset = mem, offset
        self.ordinary, self.sockets = sockets, sockets + time_wait
        self.workers, self.netifs = workers, netifs
        self._view = memoryview(mem)
        self._specs: dict[int, SocketSpec] = {}
        self._listeners: set[int] = set()       # the open ones
        self._slots: set[int] = set()           # PCBs that are slots, with or without a connection
        self._free = deque(range(sockets))
        self._closing: dict[int, int] = {}
        self._on_port: Counter[tuple[int, int, int]] = Counter()
        self._members: dict[int, list[int]] = {}
        self._free_groups = deque(range(1, groups + 1))
        self._retired: dict[int, int] = {}      # closing PCB to the group that ends with it
        self._next_port = 0
        self._format(groups, neighbours)

    @staticmethod
    def size(sockets: int, workers: int, netifs: int, groups: int = 1024, neighbours: int = 1024,
             time_wait: int = 0) -> int:
        """Bytes that a table of these capacities takes."""
        return sum(_round(size) for _, size in _regions(sockets, workers, netifs, groups, neighbours, time_wait))

    # -- words ---------------------------------------------------------------------------

    def get(self, place: int) -> int:
        """The int64 at arena offset `place`."""
        return int(struct.unpack_from("<q", self._view, place)[0])

    def put(self, place: int, value: int) -> None:
        """Writes the int64 at arena offset `place`."""
        struct.pack_into("<q", self._view, place, _signed(value))

    def _format(self, groups: int, neighbours: int) -> None:
        at = self.offset
        time_wait = self.sockets - self.ordinary
        for word, size in _regions(self.ordinary, self.workers, self.netifs, groups, neighbours, time_wait):
            if word is not None:
                self.put(self.offset + word, at)
            at += _round(size)
        for word, value in (
            (L.T_SECRET0, secrets.randbits(64)), (L.T_SECRET1, secrets.randbits(64)), (L.T_WORKERS, self.workers),
            (L.T_SOCKETS, self.sockets), (L.T_BUCKETS, _bucket_count(self.sockets) - 1), (L.T_EPOCH, 1),
            (L.T_NIF_COUNT, self.netifs), (L.T_NEIGHBOUR_MASK, neighbours - 1), (L.T_GROUP_COUNT, groups),
            (L.T_TIME_WAIT_AT, self.ordinary), (L.T_SLOT_QUEUE_BYTES, _queue_bytes(self.ordinary)),
        ):
            self.put(self.offset + word, value)
        self._pcbs = self.get(self.offset + L.T_PCBS)
        self._lanes = self.get(self.offset + L.T_LANES)
        Pcq.create(self.mem, self.get(self.offset + L.T_KCONT), self.sockets + _KCONT_SPARE)
        self._queues = [Pcq.create(self.mem, self.slot_queue(index), self.ordinary + _SLOTS_SPARE, WRITER)
                        for index in range(self.workers)]
        for index in range(self.workers + 1):       # the last one: the continuation worker's
            block = self.worker(index)
            self.put(block + L.W_INDEX, index)
            self.put(block + L.W_TABLE, self.offset)
            self.put(block + L.W_EPOCH, L.EPOCH_IDLE)
        for index in range(self.workers):
            block = self.worker(index)
            self.put(block + L.W_LANES, self._lanes + index * self.sockets * L.LS_BYTES)
            self.put(block + L.W_NIF_COUNT, self.netifs)
            for netif in range(self.netifs):
                queue = self.nif(netif, index)
                self.put(block + L.W_NIF + 8 * netif, queue)
                self.put(queue + L.N_INDEX, netif)
                self.put(queue + L.N_QUEUE, index)
                self.put(queue + L.N_QUEUES, self.workers)

    def worker(self, index: int) -> int:
        """Arena offset of the worker's block; that of number `workers` is the continuation worker's."""
        return self.get(self.offset + L.T_WORKER_AT) + index * L.W_BYTES

    def nif(self, netif: int, worker: int) -> int:
        """Arena offset of the netif's queue that this worker owns."""
        return self.get(self.offset + L.T_NIFS) + (netif * self.workers + worker) * L.N_BYTES

    def pcb(self, number: int) -> int:
        """Arena offset of the PCB."""
        return self._pcbs + number * L.PCB_BYTES

    def lane_state(self, number: int, worker: int) -> int:
        """Arena offset of what `worker` knows of the PCB's lane."""
        return self._lanes + (worker * self.sockets + number) * L.LS_BYTES

    def slot_queue(self, worker: int) -> int:
        """Arena offset of the queue of free slots given to that worker."""
        queues = self.get(self.offset + L.T_SLOT_QUEUES)
        return queues + worker * self.get(self.offset + L.T_SLOT_QUEUE_BYTES)

    def slot_head(self, listener: int, worker: int) -> int:
        """Arena offset of the first word of that worker's list of the listener's free slots."""
        return self.get(self.offset + L.T_SLOT_HEADS) + (worker * self.sockets + listener) * 8

    @property
    def room(self) -> int:
        """Sockets that can still be opened."""
        return len(self._free)

    # -- open ----------------------------------------------------------------------------

    def check(self, spec: SocketSpec) -> None:
        """Raises the OSError that `open` would raise, and changes nothing."""
        if not self._free:
            raise OSError(errno.ENOBUFS, f"all {self.ordinary} sockets (sockets.max) are open")
        if spec.port is not None and not 0 < spec.port < 65536:
            raise OSError(errno.EINVAL, f"port {spec.port} is not between 1 and 65535")
        if spec.kind == "udp" and spec.port is None and (spec.remote, spec.local) != (None, None):
            raise OSError(errno.EINVAL, "a socket that is bound to an address or connected needs a local port")
        if spec.kind in _ON_PORTS:
            self._group_to_join(spec)
        elif spec.reuseport and spec.kind == "tap":
            raise OSError(errno.EINVAL, "a tap takes a copy of every frame: it cannot be shared by reuseport")

    def ephemeral_port(self, spec: SocketSpec) -> int:
        """An unused port of the dynamic range. Raises OSError(EADDRINUSE) if there is none."""
        for step in range(len(EPHEMERAL)):
            port = EPHEMERAL[(self._next_port + step) % len(EPHEMERAL)]
            if not any(self._on_port[spec.proto, port, cls] for cls in range(L.CLASS_ANY)):
                self._next_port = port - EPHEMERAL[0] + 1
                return port
        raise OSError(errno.EADDRINUSE, "no unused port is left")

    def connecting_port(self, spec: SocketSpec) -> int:
        """A port from which `spec`, whose local and remote addresses are set, can connect: at random (RFC 6056
        section 3.3.1), nobody listens there, and no connection has these two ends, not even one in TIME_WAIT.
        Raises OSError(EADDRNOTAVAIL) if there is none."""
        start = secrets.randbelow(len(CONNECTING))
        for step in range(len(CONNECTING)):
            spec.port = CONNECTING[(start + step) % len(CONNECTING)]
            if self.mem[self._class_byte(TCP, spec.port)] == 0 and self._find(spec) < 0:
                return spec.port
        raise OSError(errno.EADDRNOTAVAIL, "every local port is in use for connections to this address and port")

    def _find(self, spec: SocketSpec) -> int:
        """An open socket with the same key and a family in common, or -1. A TIME_WAIT entry counts."""
        cls, proto, ports, *addresses = spec.key
        scratch = self.offset + L.T_HEADER - 64
        for index, value in enumerate(addresses):
            self.put(scratch + 8 * index, value)
        key = ports | proto << 32 | cls << 40
        return int(lookup.find_exact(self.mem, self.offset, key, spec.families, scratch))

    def _raw_group(self, spec: SocketSpec) -> int:
        for number, other in self._specs.items():
            if (other.reuseport and number not in self._closing and other.key == spec.key
                    and other.families == spec.families and other.uid == spec.uid):
                return number
        return -1

    def _group_to_join(self, spec: SocketSpec) -> int:
        """The member whose group `spec` joins, -1 for none. Raises OSError(EADDRINUSE)."""
        if spec.kind == "raw":
            return self._raw_group(spec) if spec.reuseport else -1
        if spec.kind == "tap" or spec.multicast:
            return -1
        found = self._find(spec)
        if found < 0:
            return -1
        other = self._specs.get(found)      # none: an accepted connection, or one in TIME_WAIT
        if (spec.reuseport and other is not None and other.reuseport and other.uid == spec.uid
                and other.families == spec.families):
            return found
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def open(self, spec: SocketSpec) -> int:
        """Opens the socket: its PCB number. From now on packets may enter its lanes.

        A listener is not disturbed by connections of its port, nor by such in TIME_WAIT, as a BSD socket
        with SO_REUSEADDR: they have other keys. Raises OSError: EADDRINUSE, ENOBUFS (table, groups or
        buckets full), EINVAL, EAGAIN (a worker stands still in the middle of changing the bucket).
        """
        self.check(spec)
        leader = self._group_to_join(spec)
        if spec.reuseport and leader < 0 and not self._free_groups:
            raise OSError(errno.ENOBUFS, "all reuseport groups (sockets.groups) are in use")
        number = self._free.popleft()
        group = 0
        if spec.reuseport:
            group = self.get(self.pcb(leader) + L.PCB_GROUP) if leader >= 0 else self._free_groups.popleft()
        self._fill(number, spec, group)
        if group and leader < 0:
            self._join(number, group)
        if spec.hashed and leader < 0 and (problem := self._insert(number, spec)):
            self._abandon(number, spec)
            raise problem
        self._specs[number] = spec
        if spec.kind == "listen":
            self._listeners.add(number)
        self._enlist(number, spec)
        if leader >= 0:     # last: the flows that it takes over must find it in its chain
            self._join(number, group)
        self._count_open()
        return number

    def _insert(self, number: int, spec: SocketSpec) -> OSError | None:
        """Makes the PCB findable, or says why not."""
        for _ in range(_TRIES):
            done = lookup.bucket_insert(self.mem, self.offset, number, WRITER)
            if done >= 0:
                break
            os.sched_yield()    # a worker is just putting a new connection there
        if done == 0:
            return OSError(errno.ENOBUFS, "the socket table has no room within reach of this address")
        if done < 0:
            return OSError(errno.EAGAIN, "an RX worker holds the place in the socket table: try again")
        if spec.kind == "connection" and self._find(spec) != number:
            # A worker has accepted a connection with the same two ends since `check`.
            lookup.bucket_remove(self.mem, self.offset, number)
            return OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        return None

    def _fill(self, number: int, spec: SocketSpec, group: int, state: int = L.PCB_OPEN) -> None:
        pcb = self.pcb(number)
        cls, proto, ports, local_hi, local_lo, remote_hi, remote_lo = spec.key
        key = ports | proto << 32 | cls << 40 | spec.families << 48 | (L.KEY_REUSEPORT << 56 if spec.reuseport else 0)
        for word, value in (
            (L.PCB_LOCAL_HI, local_hi), (L.PCB_LOCAL_LO, local_lo), (L.PCB_REMOTE_HI, remote_hi),
            (L.PCB_REMOTE_LO, remote_lo), (L.PCB_KEY, key), (L.PCB_GROUP, group), (L.PCB_NEXT, 0), (L.PCB_PREVIOUS, 0),
            (L.PCB_OWNER, spec.owner), (L.PCB_GENERATION, (self.get(pcb + L.PCB_GENERATION) + 1) & 0x7FFFFFFF),
            (L.PCB_UID, spec.uid), (L.PCB_PID, spec.pid), (L.PCB_SEGMENT, spec.segment), (L.PCB_SLOT_AT, spec.slot),
            (L.PCB_RING, spec.ring_bytes), (L.PCB_KIND, _PCB_KINDS.get(spec.kind, L.PK_PLAIN)),
            (L.PCB_PLACE, spec.place), (L.PCB_BUFFERS, _log2(spec.buffers[0]) | _log2(spec.buffers[1]) << 8),
            (L.PCB_DUE, 0), (L.PCB_LISTENER, 0), (L.PCB_WORKER, 0), (L.PCB_BACKLOG, spec.backlog), (L.PCB_WANT, 0),
        ):
            self.put(pcb + word, value)
        for worker, lane in enumerate(spec.lanes):
            words = self.lane_state(number, worker)
            self.mem[words:words + L.LS_BYTES] = 0
            self.put(words + L.LS_BASE, lane)
            self.put(words + L.LS_MASK, spec.ring_bytes - 1)
            self.put(words + L.LS_WAKE, spec.wake)
        self.put(pcb + L.PCB_STATE, state)

    def _join(self, number: int, group: int) -> None:
        members = self._members.setdefault(group, [])
        reuseport.join(self.mem, self._group(group), members, number)
        members.append(number)

    def _group(self, group: int) -> int:
        return self.get(self.offset + L.T_GROUPS) + (group - 1) * L.GROUP_BYTES

    def _abandon(self, number: int, spec: SocketSpec) -> None:
        if spec.reuseport:
            self._leave(number)
            self._free_groups.append(self._retired.pop(number))   # no worker ever saw it
        self._clear(number)

    # -- chains and class bits -----------------------------------------------------------

    def _chain(self, spec: SocketSpec) -> tuple[int, int]:
        """(place, width) of the word that begins the chain which this socket is in."""
        if spec.kind == "tap":
            return self.offset + L.T_TAPS, 8
        if spec.kind == "raw":
            return self.offset + L.T_RAWS, 8
        if spec.port is None:
            return self.offset + L.T_ANY_CHAIN, 8
        return self.get(self.offset + L.T_CHAINS) + 4 * spec.port, 4

    def _enlist(self, number: int, spec: SocketSpec) -> None:
        if spec.proto != TCP or spec.kind not in _ON_PORTS:     # nothing is ever multicast to TCP
            lookup.chain_push(self.mem, self.offset, *self._chain(spec), number)
        self._count(spec, 1)

    def _delist(self, number: int, spec: SocketSpec) -> None:
        if spec.proto != TCP or spec.kind not in _ON_PORTS:
            lookup.chain_remove(self.mem, self.offset, *self._chain(spec), number)
        self._count(spec, -1)

    def _count(self, spec: SocketSpec, change: int) -> None:
        """Class bits of the port: of UDP's all classes, of TCP's the listeners', since a connection is looked
        for in any case."""
        if spec.kind not in ("udp", "listen"):
            return
        port = spec.port or 0
        self._on_port[spec.proto, port, spec.socket_class] += change
        bits = sum(1 << cls for cls in range(L.CLASS_ANY + 1) if self._on_port[spec.proto, port, cls] > 0)
        self.mem[self._class_byte(spec.proto, spec.port)] = bits

    def _class_byte(self, proto: int, port: int | None) -> int:
        if port is None:
            return self.offset + L.T_ANY
        return self.get(self.offset + L.T_PORTS) + (65536 if proto == TCP else 0) + port

    # -- close ---------------------------------------------------------------------------

    def close(self, number: int) -> int:
        """Takes the socket out: no worker finds it from its next burst on. Returns the epoch that
        every worker must pass (`passed`) before `free` and before its memory may go."""
        spec = self._specs[number]
        # A group's other members take its flows over before it is gone.
        heir = self._leave(number) if spec.reuseport else -1
        self._listeners.discard(number)
        self._delist(number, spec)
        if spec.hashed:
            if heir >= 0:
                lookup.bucket_replace(self.mem, self.offset, number, heir)
            else:
                lookup.bucket_remove(self.mem, self.offset, number)
        self.put(self.pcb(number) + L.PCB_STATE, L.PCB_CLOSING)
        self._closing[number] = int(epoch.advance(self.mem, self.offset))
        self._count_open()
        return self._closing[number]

    def _leave(self, number: int) -> int:
        """Leaves the group; the member that inherits the entry in the bucket, or -1."""
        group = self.get(self.pcb(number) + L.PCB_GROUP)
        members = self._members[group]
        members.remove(number)
        reuseport.leave(self.mem, self._group(group), members, number)
        if members:
            return members[0]
        del self._members[group]
        self._retired[number] = group
        return -1

    def passed(self, target: int) -> bool:
        """Whether every worker has reported a quiescent state since `target` was returned."""
        return bool(epoch.passed(self.mem, self.offset, target))

    def free(self, number: int) -> None:
        """The number may be used again. Only after `passed`."""
        del self._specs[number], self._closing[number]
        if group := self._retired.pop(number, 0):
            self._free_groups.append(group)
        for worker in range(self.workers):
            self.put(self.slot_head(number, worker), 0)
        self._clear(number)

    def _clear(self, number: int) -> None:
        for worker in range(self.workers):
            self.put(self.lane_state(number, worker) + L.LS_BASE, 0)
        self.put(self.pcb(number) + L.PCB_STATE, L.PCB_FREE)
        self.put(self.pcb(number) + L.PCB_KIND, L.PK_PLAIN)
        self._free.append(number)

    def set_wake(self, number: int, wake: int) -> int:
        """Points the socket at another wake object; the former may be used until the returned
        epoch has passed."""
        for worker in range(self.workers):
            self.put(self.lane_state(number, worker) + L.LS_WAKE, wake)
        return int(epoch.advance(self.mem, self.offset))

    # -- connections ---------------------------------------------------------------------

    def add_slot(self, listener: int, spec: SocketSpec, worker: int) -> int:
        """A PCB for connections that `listener` will accept on that worker: its number. `spec` says whose it is
        and where its memory is. Raises OSError(ENOBUFS)."""
        if not self._free:
            raise OSError(errno.ENOBUFS, f"all {self.ordinary} sockets (sockets.max) are open")
        number = self._free.popleft()
        self._fill(number, spec, 0, L.PCB_CLOSING)
        pcb = self.pcb(number)
        self.put(pcb + L.PCB_LISTENER, listener + 1)
        self.put(pcb + L.PCB_WORKER, worker)
        self.put(pcb + L.PCB_STATE, L.PCB_SLOT)
        self._slots.add(number)
        return number

    def offer(self, number: int) -> bool:
        """Gives a slot, whose memory all workers have mapped, to its worker. False: the queue is full."""
        return self._queues[self.get(self.pcb(number) + L.PCB_WORKER)].put(number)

    def wanting(self) -> list[int]:
        """Listeners that are short of slots; each is told once until it is `sated`."""
        found = [number for number in self._listeners if self.get(self.pcb(number) + L.PCB_WANT) == 1]
        for number in found:
            self.put(self.pcb(number) + L.PCB_WANT, 2)
        return found

    def sated(self, number: int) -> None:
        """Workers may ask for slots for this listener again."""
        if number in self._listeners:
            self.put(self.pcb(number) + L.PCB_WANT, 0)

    def is_spare(self, number: int) -> bool:
        """Whether it is a slot without a connection, in a worker's queue or list."""
        return number in self._slots and self.get(self.pcb(number) + L.PCB_STATE) == L.PCB_SLOT

    def forgotten(self, listener: int) -> bool:
        """Whether every worker has emptied its queue and dropped its list of this listener's slots."""
        return all(self.get(self.slot_head(listener, worker)) == slots.FORGOTTEN for worker in range(self.workers))

    def orphan(self, number: int) -> None:
        """The connection's listener is gone: at its end the slot comes back to the supervisor."""
        self.put(self.pcb(number) + L.PCB_LISTENER, 0)

    def take_back(self, number: int) -> None:
        """The number may be used again: of a slot that is out of workers' reach, or of a connection opened by
        connect that is over."""
        if number in self._slots:
            self._slots.remove(number)
        else:
            del self._specs[number]
            self._count_open()
        self._clear(number)

    def _count_open(self) -> None:
        self.put(self.offset + L.T_OPEN, len(self._specs) - len(self._closing))

    # -- tell ----------------------------------------------------------------------------

    def records(self, start: int = 0) -> Iterator[int]:
        """Numbers of open PCBs from `start` on: sockets, accepted connections and TIME_WAIT entries. What
        workers open and close meanwhile is told or not."""
        for first in range(max(start, 0), self.sockets, _CHUNK):
            last = min(first + _CHUNK, self.sockets)
            words = self.mem[self.pcb(first):self.pcb(last)].view(np.int64).reshape(-1, L.PCB_BYTES // 8)
            for index in np.nonzero(words[:, L.PCB_STATE // 8] == L.PCB_OPEN)[0].tolist():
                yield first + index

    def open_pcbs(self) -> list[int]:
        """Numbers of all open sockets."""
        return [number for number in self._specs if number not in self._closing]

    def spec(self, number: int) -> SocketSpec:
        """What the socket was opened with."""
        return self._specs[number]

    def key(self, number: int) -> tuple[int, tuple[int, int], int, tuple[int, int, int] | None]:
        """(families, local address, local port, remote address and port) as the PCB says now."""
        pcb = self.pcb(number)
        key = self.get(pcb + L.PCB_KEY)
        local = self.get(pcb + L.PCB_LOCAL_HI), self.get(pcb + L.PCB_LOCAL_LO)
        remote = self.get(pcb + L.PCB_REMOTE_HI), self.get(pcb + L.PCB_REMOTE_LO), (key >> 16) & 0xFFFF
        return (key >> 48) & 3, local, key & 0xFFFF, remote if remote[2] else None

    def word(self, number: int, word: int) -> int:
        """A word (L.PCB_...) of the PCB."""
        return self.get(self.pcb(number) + word)

    def generation(self, number: int) -> int:
        """Tells a number's present socket from its former ones."""
        return self.get(self.pcb(number) + L.PCB_GENERATION)

    def counters(self, number: int) -> dict[str, int]:
        """published, consumed, queued (packets), queued_bytes, dropped: sums over the lanes. What
        the consumer writes is clamped to what is possible."""
        total = {"published": 0, "consumed": 0, "queued": 0, "queued_bytes": 0, "dropped": 0}
        for worker in range(self.workers):
            state = self.lane_state(number, worker)
            lane = self.get(state + L.LS_BASE)
            if not lane:
                continue
            total["dropped"] += self.get(state + L.LS_DROPPED)
            head, published = self.get(state + L.LS_PUBLISHED), self.get(state + L.LS_COUNT)
            if not head:        # it may be in a page that has no memory yet
                continue
            tail, taken = self.get(lane + L.LANE_TAIL), self.get(lane + L.LANE_CONSUMED)
            consumed = min(max(taken, 0), published)
            total["published"] += published
            total["consumed"] += consumed
            total["queued"] += published - consumed
            total["queued_bytes"] += min(max(head - tail, 0), self.get(state + L.LS_MASK) + 1)
        return total
