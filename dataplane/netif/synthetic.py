"""Netif `synthetic`: UDP packets out of memory, as fast as a worker takes them.

For measuring everything behind the netif, and for tests that need many flows. All frames are
built when it is opened, raw IPv4 with valid checksums, and handed out by their place like those
of a device's ring: `rx` writes descriptors and touches no frame.

Flow i belongs to queue i % queues. A queue's flows take turns; in every turn of an IMIX, each flow
goes on to the next size of the pattern. So the number of frames sent is a queue's whole state: a
replacement of its worker goes on behind the last frame that was done. Private memory is written by
its worker only, but for the start of the clock (`_pace`).
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import psutil
from msgspec import Meta

from dataplane.config import Context, NetifSettings
from dataplane.errors import DataplaneError
from dataplane.jit import callback, inlined
from dataplane.netif import _pace
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import as_memory, ld64, st64
from dataplane.shm.libc import CLOCK_REALTIME, clock_ns

KIND = "synthetic"

IP_BYTES, UDP_BYTES = 20, 8
LOCAL_ADDRESS = 0xC6120001      # 198.18.0.1, of the range for benchmarks (RFC 2544, RFC 6890)
REMOTE_NETWORK = 10 << 24
FLOWS_MAX = 1 << 24             # one remote address each

# The simple IMIX: 40, 576 and 1500 bytes of IP packet, 7 : 4 : 1. 340 bytes on average.
IMIX_SIZES = (40, 576, 1500)
IMIX_PATTERN = (0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 1, 0)

Port = Annotated[int, Meta(ge=1, le=65535)]


class Settings(NetifSettings, tag=KIND, frozen=True, kw_only=True):
    """Makes UDP packets, IPv4, to 198.18.0.1. Passive: nothing is ever transmitted."""

    flows: Annotated[
        int,
        Meta(
            ge=1,
            le=FLOWS_MAX,
            description="Distinct remote addresses and ports; addresses are of 10.0.0.0/8.",
            extra={"unit": "flows"},
        ),
    ] = 1024
    local_ports: Annotated[
        tuple[Port, Port],
        Meta(
            description="First and last of the UDP ports over which the flows are spread.",
            extra={"expected": "first and last port, from 1 to 65535"},
        ),
    ] = (5000, 5063)
    size: Annotated[
        Annotated[int, Meta(ge=36, le=65535)] | Literal["imix"],
        Meta(
            description="Size of the IP packets. `imix`: 40, 576 and 1500 bytes, in proportions 7 : 4 : 1.",
            extra={"unit": "bytes"},
        ),
    ] = 60
    rate: Annotated[
        float,
        Meta(
            ge=0,
            le=_pace.RATE_MAX,
            description="Packets per second, all queues together; 0: as fast as it goes.",
            extra={"unit": "packets/s"},
        ),
    ] = 0
    count: Annotated[
        int,
        Meta(
            ge=0,
            description="It ends after so many packets, all queues together; 0: never.",
            extra={"unit": "packets"},
        ),
    ] = 0
    backpressure: Annotated[
        bool, Meta(description="Whether to wait while sockets' rings are full, instead of dropping.")
    ] = False
    start: Annotated[
        int,
        Meta(
            ge=0,
            description="The first packet comes once so many sockets are open; 0: at once.",
            extra={"unit": "sockets"},
        ),
    ] = 0
    seed: Annotated[
        int, Meta(ge=0, le=2**32 - 1, description="Chooses addresses, ports and payloads.")
    ] = 1

    def check(self, where: str, ctx: Context) -> None:
        first, last = self.local_ports
        if first > last:
            ctx.error("local_ports", [first, last], "the lower port first")
        needed, available = self.memory(), psutil.virtual_memory().available
        if needed > available:
            problem = f"frames need {needed} bytes of memory, {available} are available"
            ctx.error("flows", self.flows, "less flows, or smaller packets", problem)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of a flow's frames."""
        return IMIX_SIZES if isinstance(self.size, str) else (self.size,)

    def memory(self) -> int:
        """Bytes of all frames."""
        return self.flows * stride(self.sizes)


def stride(sizes: tuple[int, ...]) -> int:
    """Bytes from one flow's frames to the next one's: whole cache lines."""
    return sum(_lines(size) for size in sizes)


def _lines(size: int) -> int:
    return -(-size // L.CACHE_LINE) * L.CACHE_LINE


# -- private memory of a queue -----------------------------------------------------------------------------

S_SENT = 0              # frames done
S_LIMIT = 8             # frames to send; NEVER
S_BASE = 16             # place of its first flow's frames
S_STRIDE = 24
S_FLOWS = 32            # its flows
S_RATE = 40             # frames of all queues in each
S_UNIT = 48             # so many ns; rate 0: no clock
S_QUEUES = 56           # queues that have flows
S_LEADER = 64           # place of queue 0's S_START
S_START = 72            # SYNC pace-start: written by cas, by any queue
S_SCRATCH = 80          # 16 bytes
S_SLOTS = 96            # length of the pattern, and per slot where in a flow's frames it is, and its size
S_PATTERN = 128

NEVER = 1 << 62


@inlined
def _due(mem, nif, s):
    """How many frames this queue may have sent by now. Its k-th one is number `k * queues + queue`
    of all; if the next is not due yet, N_NEXT says when it is."""
    rate, unit = ld64(mem, s + S_RATE), ld64(mem, s + S_UNIT)
    if rate == 0:
        return NEVER
    queue, queues, sent = ld64(mem, nif + L.N_QUEUE), ld64(mem, s + S_QUEUES), ld64(mem, s + S_SENT)
    begun, now = _pace.started(mem, ld64(mem, s + S_LEADER), s + S_SCRATCH)
    due = (_pace.allowed(now - begun, rate, unit) - queue + queues - 1) // queues
    if due <= sent:
        st64(mem, nif + L.N_NEXT, begun + _pace.due(sent * queues + queue, rate, unit))
    return due


@inlined
def _hand_out(mem, s, burst, sent, frames):
    """Describes `frames` frames from number `sent` on."""
    time = clock_ns(mem, s + S_SCRATCH, CLOCK_REALTIME)
    flows, base, step = ld64(mem, s + S_FLOWS), ld64(mem, s + S_BASE), ld64(mem, s + S_STRIDE)
    slots, flow, turn = ld64(mem, s + S_SLOTS), sent % flows, sent // flows
    slot = (flow + turn) % slots
    for i in range(frames):
        p, size = burst + i * L.P_BYTES, ld64(mem, s + S_PATTERN + slot * 16 + 8)
        st64(mem, p + L.P_FRAME, base + flow * step + ld64(mem, s + S_PATTERN + slot * 16))
        st64(mem, p + L.P_LENGTH, size)
        st64(mem, p + L.P_WIRE, size)
        st64(mem, p + L.P_TIME, time)
        st64(mem, p + L.P_LINK, L.LINK_RAW)
        st64(mem, p + L.P_FLAGS, 0)
        flow, slot = flow + 1, slot + 1
        if flow == flows:
            flow, turn = 0, turn + 1
            slot = turn % slots
        if slot == slots:
            slot = 0
    return frames


@inlined
def _receive(mem, nif, burst, most):
    s = nif + L.N_PRIVATE
    st64(mem, nif + L.N_NEXT, 0)
    sent, end = ld64(mem, s + S_SENT), ld64(mem, s + S_LIMIT)
    if sent >= end:
        return L.NIF_ENDED
    frames = min(most, end - sent, _due(mem, nif, s) - sent)
    return _hand_out(mem, s, burst, sent, frames) if frames > 0 else 0


@callback(3)
def rx(base, nif, burst, limit):
    """Up to `limit` frames: how many, 0 or NIF_ENDED."""
    mem = as_memory(base)
    return _receive(mem, nif, burst, limit)


@callback(2)
def done(base, nif, frames):
    """The first `frames` of the last burst are finished with; the others will come again."""
    mem = as_memory(base)
    st64(mem, nif + L.N_PRIVATE + S_SENT, ld64(mem, nif + L.N_PRIVATE + S_SENT) + frames)
    return 0


# -- the frames --------------------------------------------------------------------------------------------

_CHUNK = 1 << 22    # bytes built at a time
Words = npt.NDArray[np.int64]


def remote_addresses(flows: Words, seed: int) -> Words:
    """Addresses of 10.0.0.0/8, a different one for each flow: times an odd number permutes."""
    generator = np.random.default_rng(seed)
    factor, shift = generator.integers(0, FLOWS_MAX, 2)
    return REMOTE_NETWORK | (flows * (int(factor) | 1) + int(shift)) % FLOWS_MAX


def remote_ports(flows: Words, seed: int) -> Words:
    """Ports above 1023."""
    return 1024 + (flows * 40503 + seed) % (65536 - 1024)


def local_ports(flows: Words, ports: tuple[int, int]) -> Words:
    """Equally many flows for each port. Each row of flows is shifted by one, so that the flows of a port are
    spread over the queues."""
    span = ports[1] - ports[0] + 1
    return ports[0] + (flows + flows // span) % span


def pattern(size: int, seed: int) -> bytes:
    """Payload of a packet of `size` bytes behind the flow's number, which is 4 bytes in network order."""
    return np.random.default_rng([seed, size]).bytes(size - IP_BYTES - UDP_BYTES - 4)


def frames(settings: Settings, flows: Words, size: int) -> npt.NDArray[np.uint8]:
    """Frames of these flows, uint8[flows, size]: RFC 791, RFC 768, both checksums right."""
    out = np.zeros((len(flows), size + size % 2), np.uint8)    # an odd last byte counts as if a zero followed
    words = out.view(">u2")
    remote = remote_addresses(flows, settings.seed)
    words[:, 0:6] = 0x4500, size, 0, 0x4000, 0x4011, 0      # don't fragment; 64 hops, UDP
    words[:, 2] = flows & 0xFFFF
    words[:, 6], words[:, 7] = remote >> 16, remote & 0xFFFF
    words[:, 8], words[:, 9] = LOCAL_ADDRESS >> 16, LOCAL_ADDRESS & 0xFFFF
    words[:, 10] = remote_ports(flows, settings.seed)
    words[:, 11] = local_ports(flows, settings.local_ports)
    words[:, 12] = size - IP_BYTES
    words[:, 14], words[:, 15] = flows >> 16, flows & 0xFFFF
    out[:, 32:size] = np.frombuffer(pattern(size, settings.seed), np.uint8)
    words[:, 5] = _checksum(words[:, :10].sum(axis=1, dtype=np.int64))
    pseudo = words[:, 6:10].sum(axis=1, dtype=np.int64) + 17 + size - IP_BYTES
    # Behind the flow's number all flows are alike.
    udp = pseudo + words[:, 10:16].sum(axis=1, dtype=np.int64) + int(words[0, 16:].sum(dtype=np.int64))
    checksum = _checksum(udp)
    words[:, 13] = np.where(checksum == 0, 0xFFFF, checksum)   # 0 says: none
    return out[:, :size]


def _checksum(total: Words) -> Words:
    """RFC 1071, of sums of 16-bit words."""
    while (total >> 16).any():
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _build(settings: Settings, first: int, queues: int, area: npt.NDArray[np.uint8]) -> None:
    """Writes the frames of flows first, first + queues, ... to `area`, uint8[flows * stride]."""
    rows = area.reshape(-1, stride(settings.sizes))
    chunk = max(1, _CHUNK // rows.shape[1])
    for begin in range(0, len(rows), chunk):
        some = rows[begin:begin + chunk]
        numbers = first + queues * np.arange(begin, begin + len(some), dtype=np.int64)
        column = 0
        for size in settings.sizes:
            some[:, column:column + size] = frames(settings, numbers, size)
            column += _lines(size)


# -- the supervisor's side ---------------------------------------------------------------------------------


class Netif:
    """Synthetic traffic; `nifs[i]` is the netif queue of worker i in `arena`."""

    name = KIND
    passive = True

    def __init__(self, settings: Settings, arena: Arena, queues: int, nifs: list[int]) -> None:
        self.mtu = max(settings.sizes)
        self.addresses: list[str] = []
        self.gateway: list[str] = []
        self._arena = arena
        self._bytes = settings.memory()
        try:
            # Private: workers only read it, and it can have huge pages.
            self._area = arena.map_anonymous(self._bytes)
        except OSError as error:
            raise DataplaneError(f"synthetic: {settings.flows} flows: {error.strerror}") from None
        served = min(len(nifs), settings.flows)
        place = self._area
        for queue, nif in enumerate(nifs):
            flows = len(range(queue, settings.flows, len(nifs)))
            size = flows * stride(settings.sizes)
            if flows:
                _build(settings, queue, len(nifs), arena.mem[place:place + size])
            limit = _share(settings.count, queue, served) if settings.count else NEVER
            self._fill(nif, settings, nifs[0])
            self._words(nif + L.N_PRIVATE, {
                S_BASE: place, S_FLOWS: flows, S_QUEUES: served, S_LIMIT: limit if flows else 0})
            place += size

    def _words(self, offset: int, values: dict[int, int]) -> None:
        for word, value in values.items():
            self._arena.mem[offset + word:offset + word + 8].view("<i8")[0] = value

    def _fill(self, nif: int, settings: Settings, leader: int) -> None:
        """What does not depend on the queue."""
        flags = L.NF_PASSIVE | (L.NF_BACKPRESSURE if settings.backpressure else 0)
        self._words(nif, {
            L.N_RX: rx.address, L.N_DONE: done.address, L.N_TX: 0, L.N_LINK: L.LINK_RAW, L.N_FLAGS: flags,
            L.N_FD: -1, L.N_FDS_SYN: -1, L.N_FDS_SYN + 8: -1, L.N_MTU: self.mtu, L.N_START: settings.start})
        rate, unit = _pace.ratio(settings.rate) if settings.rate else (0, 0)
        order = IMIX_PATTERN if len(settings.sizes) > 1 else (0,)
        self._words(nif + L.N_PRIVATE, {
            S_SENT: 0, S_STRIDE: stride(settings.sizes), S_RATE: rate, S_UNIT: unit,
            S_LEADER: leader + L.N_PRIVATE + S_START, S_SLOTS: len(order)})
        for slot, which in enumerate(order):
            self._words(nif + L.N_PRIVATE + S_PATTERN + 16 * slot, {
                0: sum(_lines(size) for size in settings.sizes[:which]), 8: settings.sizes[which]})

    def poll_counters(self) -> None:
        """Nothing is lost outside of the workers."""

    def error(self, queue: int) -> str | None:
        """It cannot fail once it is open."""
        return None

    def close(self) -> None:
        """Gives the frames' memory back. No worker may still use it."""
        if self._area:
            self._arena.unmap(self._area, self._bytes)
            self._area = 0


def _share(count: int, queue: int, queues: int) -> int:
    """This queue's part of `count`."""
    return count // queues + (queue < count % queues)
