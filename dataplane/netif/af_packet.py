"""AF_PACKET: an existing interface, read through the kernel's packet ring.

One socket and one TPACKET_V3 ring per worker, mapped into the arena; with several workers the kernel spreads
the flows over them (PACKET_FANOUT by symmetric hash, IPv4 fragments put together before). Without addresses it
is passive: it sees what the interface sees, and sends nothing.

Frames are read where the kernel wrote them. The whole state is one word, the cursor: number of the block,
counted by the kernel from 1, and place of the first packet in it that is not finished (0: block not yet
opened). So a worker that takes over from a dead one goes on exactly where `done` was last called.

What leaves a checksum or the cutting of a TCP super-segment to the interface is sent through a second socket,
with a virtio-net header. That one goes through the queueing discipline: there the kernel does in software what
the interface cannot do, or can no more. Without it (PACKET_QDISC_BYPASS) it would drop such a frame.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import socket
import struct
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from dataplane.config import Address, Context, Device, Interface, NetifSettings
from dataplane.errors import DataplaneError
from dataplane.jit import callback, inlined
from dataplane.netif import _address
from dataplane.netif import _tpacket as T
from dataplane.netif import _virtio as V
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import (
    as_memory,
    ld8,
    ld16,
    ld32,
    ld64,
    load_acquire,
    load_acquire32,
    load_relaxed,
    prefetch,
    put_be16,
    st16,
    st32,
    st64,
    store_release,
    store_release32,
)
from dataplane.shm.libc import send, writev

KIND = "af_packet"

# -- N_PRIVATE: the first line is the supervisor's, the second the worker's --------------------------------
GONE = 16               # 1: the interface was removed
HAND = 64               # frames that the last rx gave and that are not done
CURSOR = 72             # block number << OFFSET_BITS | offset of the packet in its block
END = 80                # what the cursor will be once all that rx gave are done
RING = 88               # place of the ring in the arena
BLOCKS = 96
BLOCK_BYTES = 104
TX_FD = 112             # the second socket; -1: none
IOV = 128               # two struct iovec: the virtio-net header, the frame
HEADER = 160            # the virtio-net header of what we send

OFFSET_BITS = 26        # of the cursor: blocks of up to 64 MiB
OFFSET_MASK = (1 << OFFSET_BITS) - 1

_DONTWAIT = 0x40
_SIOCGIFMTU, _SIOCGIFHWADDR = 0x8921, 0x8927
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
_SO_ATTACH_FILTER, _SO_DETACH_FILTER, _SO_SNDBUFFORCE = 26, 27, 32
_BPF_RET = 0x06
_RESERVE = 16           # headroom of each frame, for its VLAN tag; 16 keeps the IP header aligned
_SEND_BUFFER = 1 << 22
_AHEAD = 8              # packets between the one that is read and the one that is prefetched


class Settings(NetifSettings, tag=KIND, frozen=True, kw_only=True):
    """An existing Ethernet interface (or `lo`), shared with the kernel."""

    device: Annotated[Device, Meta(description="The interface.")]
    addresses: Annotated[
        Annotated[tuple[Interface, ...], Meta(max_length=L.ADDRESS_MAX)],
        Meta(
            description="The dataplane's own addresses on this link, with their prefix length; the kernel must "
            "not have them. None: passive, every packet is demultiplexed, whoever it is for, and nothing is "
            "transmitted."
        ),
    ] = ()
    gateway: Annotated[
        tuple[Address, ...],
        Meta(description="Next hop to other networks: at most one for IPv4 and one for IPv6."),
    ] = ()
    promiscuous: Annotated[
        bool, Meta(description="Take frames that are addressed to other stations as well.")
    ] = False
    block_bytes: Annotated[
        int,
        Meta(
            ge=1 << 17,
            le=1 << OFFSET_BITS,
            description="Size of a block of the kernel's ring: what the kernel hands over at once. A multiple of "
            "the page size; the least value is what the largest packet needs.",
            extra={"unit": "bytes"},
        ),
    ] = 1 << 17
    blocks: Annotated[
        int,
        Meta(
            ge=2,
            le=4096,
            description="Blocks of each queue's ring. What can wait while a worker is busy is all of them, or, since "
            "a block is handed over after `block_timeout_ms` however little is in it, so many times that.",
            extra={"unit": "blocks"},
        ),
    ] = 512
    block_timeout_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=1000,
            description="After how long the kernel hands over a block that is not full.",
            extra={"unit": "ms"},
        ),
    ] = 1

    def check(self, where: str, ctx: Context) -> None:
        if self.block_bytes % mmap.PAGESIZE:
            ctx.error("block_bytes", self.block_bytes, f"a multiple of the page size, {mmap.PAGESIZE}")
        try:
            link_type = _Device(self.device).link_type
        except OSError:
            there = ", ".join(name for _, name in socket.if_nameindex())
            ctx.error("device", self.device, f"an existing interface ({there})", "there is none of this name")
        if link_type not in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK):
            ctx.error("device", self.device, "an Ethernet interface", f"has the link type {link_type}")
        _address.check(self, ctx)


# -- kernels -----------------------------------------------------------------------------------------------


@inlined
def _block(mem, own, number):
    """Place of the block that has, had or will have this number."""
    return ld64(mem, own + RING) + (number - 1) % ld64(mem, own + BLOCKS) * ld64(mem, own + BLOCK_BYTES)


@inlined
def _release(mem, block):
    """Gives the block back to the kernel."""
    # SYNC tpacket-block: release, pairs with the kernel's look at the block status before it writes; else our
    # last reads could see its next packets in the place of the finished ones.
    store_release32(mem, block + T.BLOCK_STATUS, T.STATUS_KERNEL)


@inlined
def _advance(mem, own, number):
    """Leaves the finished block `number`. The cursor first: a worker killed in between leaves a block that
    is never read again and that `_current` gives back; the other order could read it a second time."""
    # SYNC tpacket-cursor: release, pairs with `_current` of a replacement worker; else it would go on behind a
    # packet on which the dead one still worked.
    store_release(mem, own + CURSOR, (number + 1) << OFFSET_BITS)
    _release(mem, _block(mem, own, number))


@inlined
def _current(mem, own):
    """Place of the first packet that is not finished; 0 if the kernel has handed over none."""
    # SYNC tpacket-cursor: acquire, pairs with `_advance` and `done` of the worker before this one.
    cursor = load_acquire(mem, own + CURSOR)
    number, offset = cursor >> OFFSET_BITS, cursor & OFFSET_MASK
    block = _block(mem, own, number)
    if offset:
        return block + offset
    before = _block(mem, own, number - 1)
    if ld64(mem, before + T.BLOCK_NUMBER) == number - 1 and ld32(mem, before + T.BLOCK_STATUS):
        _release(mem, before)   # a worker was killed in `_advance`
    # SYNC tpacket-status: acquire, pairs with the kernel's barrier before it sets the block status; else
    # packets of a former round could be read.
    if load_acquire32(mem, block + T.BLOCK_STATUS) & T.STATUS_USER == 0:
        return 0
    if ld32(mem, block + T.BLOCK_PACKETS) == 0:
        _advance(mem, own, number)
        return 0
    return block + ld32(mem, block + T.BLOCK_FIRST)


@inlined
def _behind(mem, own, packet):
    """Cursor of the packet behind `packet`, which is in the cursor's block."""
    number = ld64(mem, own + CURSOR) >> OFFSET_BITS
    step = ld32(mem, packet + T.PACKET_NEXT)
    if step == 0:
        return (number + 1) << OFFSET_BITS
    return number << OFFSET_BITS | (packet + step - _block(mem, own, number))


@inlined
def _restore_tag(mem, packet, status):
    """Puts the VLAN tag that the kernel took out back behind the addresses (IEEE 802.1Q, 9.3), and corrects the
    packet's header, so that a packet that is asked for again has it once only."""
    frame = packet + ld16(mem, packet + T.PACKET_MAC) - 4
    high, low = ld64(mem, frame + 4), ld32(mem, frame + 12)
    st64(mem, frame, high)
    st32(mem, frame + 8, low)
    known = status & T.STATUS_VLAN_TPID_VALID
    put_be16(mem, frame + 12, ld16(mem, packet + T.PACKET_VLAN_TPID) if known else T.VLAN_ETHERTYPE)
    put_be16(mem, frame + 14, ld32(mem, packet + T.PACKET_VLAN_TCI))
    st16(mem, packet + T.PACKET_MAC, frame - packet)
    st32(mem, packet + T.PACKET_CAPTURED, ld32(mem, packet + T.PACKET_CAPTURED) + 4)
    st32(mem, packet + T.PACKET_WIRE, ld32(mem, packet + T.PACKET_WIRE) + 4)
    st32(mem, packet + T.PACKET_STATUS, status & ~T.STATUS_VLAN_VALID)


@inlined
def _flags(mem, packet, status, frame):
    flags = 0
    if status & T.STATUS_CSUMNOTREADY:
        flags |= L.PF_CHECKSUM_PARTIAL
    if status & T.STATUS_CSUM_VALID:
        flags |= L.PF_CHECKSUM_OK
    if ld8(mem, frame) & 1:
        flags |= L.PF_LINK_MULTICAST
    kind = ld8(mem, packet + T.PACKET_TYPE)
    if kind == T.TYPE_OUTGOING:
        flags |= L.PF_OUTGOING
    elif kind == T.TYPE_OTHERHOST:
        flags |= L.PF_OTHERHOST
    return flags


@inlined
def _describe(mem, p, packet):
    status = ld32(mem, packet + T.PACKET_STATUS)
    if status & T.STATUS_VLAN_VALID:
        _restore_tag(mem, packet, status)
    frame = packet + ld16(mem, packet + T.PACKET_MAC)
    st64(mem, p + L.P_FRAME, frame)
    st64(mem, p + L.P_LENGTH, ld32(mem, packet + T.PACKET_CAPTURED))
    st64(mem, p + L.P_WIRE, ld32(mem, packet + T.PACKET_WIRE))
    seconds = ld32(mem, packet + T.PACKET_SECONDS)
    st64(mem, p + L.P_TIME, seconds * 1_000_000_000 + ld32(mem, packet + T.PACKET_NANOSECONDS))
    st64(mem, p + L.P_LINK, L.LINK_ETHERNET)
    st64(mem, p + L.P_FLAGS, _flags(mem, packet, status, frame))


@callback(3)
def rx(base, nif, burst, limit):
    """Gives packets of the current block, up to its end."""
    mem = as_memory(base)
    own = nif + L.N_PRIVATE
    st64(mem, own + HAND, 0)
    packet = _current(mem, own)
    if packet == 0:
        if load_relaxed(mem, own + GONE) == 0:
            return 0
        st64(mem, nif + L.N_ERROR, errno.ENODEV)
        return L.NIF_FAILED
    count = 0
    last = packet
    while count < limit:
        last = packet
        _describe(mem, burst + count * L.P_BYTES, packet)
        count += 1
        step = ld32(mem, packet + T.PACKET_NEXT)
        if step == 0:
            break
        # Neighbours are mostly alike in size. The header and what follows it up to the ports: two lines.
        prefetch(mem, packet + _AHEAD * step)
        prefetch(mem, packet + _AHEAD * step + 64)
        packet += step
    if count:
        st64(mem, own + END, _behind(mem, own, last))
        st64(mem, own + HAND, count)
    return count


@callback(2)
def done(base, nif, count):
    """Moves the cursor over `count` packets; a block that is finished goes back to the kernel."""
    mem = as_memory(base)
    own = nif + L.N_PRIVATE
    before = ld64(mem, own + CURSOR)
    after = before
    if count == ld64(mem, own + HAND):
        after = ld64(mem, own + END) if count else before
    else:
        packet = _current(mem, own)
        for _ in range(count):
            after = _behind(mem, own, packet)
            packet += ld32(mem, packet + T.PACKET_NEXT)
    st64(mem, own + HAND, 0)
    number = before >> OFFSET_BITS
    if after >> OFFSET_BITS != number:
        _advance(mem, own, number)
    else:
        # SYNC tpacket-cursor: release, pairs with `_current` of a replacement worker, as in `_advance`.
        store_release(mem, own + CURSOR, after)
    return 0


@inlined
def _send_offloaded(mem, own, p):
    """Sends the frame behind its virtio-net header: bytes, the header's as well, or -errno."""
    base = ld64(mem, own + IOV) - (own + HEADER)        # of the arena: the first iovec points to HEADER
    V.put_header(mem, own + HEADER, p)
    st64(mem, own + IOV + 16, base + ld64(mem, p + L.P_FRAME))
    st64(mem, own + IOV + 24, ld64(mem, p + L.P_LENGTH))
    return writev(mem, ld64(mem, own + TX_FD), own + IOV, 2)


@callback(3)
def tx(base, nif, burst, count):
    """Sends each frame; what the interface has no room for is dropped."""
    mem = as_memory(base)
    fd = ld64(mem, nif + L.N_FD)
    packets, octets = 0, 0
    for i in range(count):
        p = burst + i * L.P_BYTES
        size = ld64(mem, p + L.P_LENGTH)
        if ld64(mem, p + L.P_FLAGS) & L.PF_CHECKSUM_PARTIAL:
            sent = _send_offloaded(mem, nif + L.N_PRIVATE, p)
        else:
            sent = send(mem, fd, ld64(mem, p + L.P_FRAME), size, _DONTWAIT)
        if sent > 0:
            packets += 1
            octets += size
    st64(mem, nif + L.N_TX_PACKETS, ld64(mem, nif + L.N_TX_PACKETS) + packets)
    st64(mem, nif + L.N_TX_BYTES, ld64(mem, nif + L.N_TX_BYTES) + octets)
    st64(mem, nif + L.N_TX_DROPPED, ld64(mem, nif + L.N_TX_DROPPED) + count - packets)
    return count


# -- Python side, in the supervisor ------------------------------------------------------------------------


class _Device:
    """What the kernel says of an interface. Raises OSError when there is none of this name."""

    def __init__(self, name: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            hardware = self._ask(sock, _SIOCGIFHWADDR, name)
            self.mtu: int = struct.unpack_from("i", self._ask(sock, _SIOCGIFMTU, name), 16)[0]
        self.link_type: int = struct.unpack_from("H", hardware, 16)[0]
        self.mac = hardware[18:24]

    @staticmethod
    def _ask(sock: socket.socket, request: int, name: str) -> bytes:
        return fcntl.ioctl(sock, request, struct.pack("16s24x", name.encode()))


class Netif:
    """The open sockets. `DataplaneError` if that cannot be; nothing is left then."""

    def __init__(self, settings: Settings, arena: Arena, queues: int, nifs: list[int]) -> None:
        self.name = settings.device
        self.addresses = list(settings.addresses)
        self.gateway = list(settings.gateway)
        self.passive = not settings.addresses
        self._settings = settings
        self._arena = arena
        self._nifs = nifs
        self._sockets: list[socket.socket] = []
        self._senders: list[socket.socket] = []
        self._rings: list[int] = []
        self._words = [_address.words(arena.mem, nif) for nif in nifs]
        try:
            self._device = self._find()
            self.mtu = min(self._device.mtu, 65535)
            for queue in range(queues):
                self._open_queue(queue)
            self._start()
        except BaseException:
            self.close()
            raise

    def poll_counters(self) -> None:
        """Adds what the kernel dropped since the last call; sees whether the interface is still there."""
        for nif, sock in zip(self._words, self._sockets, strict=True):
            stats = sock.getsockopt(T.SOL_PACKET, T.STATISTICS, struct.calcsize(T.STATS_V3))
            nif[L.N_KERNEL_DROPPED // 8] += struct.unpack(T.STATS_V3, stats)[1]
            if not sock.getsockname()[0]:
                nif[(L.N_PRIVATE + GONE) // 8] = 1
            # An interface that went down leaves an error on the socket, with which poll(2) would return at
            # once, time and again. Cleared after GONE was set, or a sleeping worker might never learn of it.
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def error(self, queue: int) -> str | None:
        """Why rx has failed, as a sentence without a full stop."""
        number = int(self._words[queue][L.N_ERROR // 8])
        if number == errno.ENODEV:
            return f"af_packet {self.name}: the interface was removed"
        return f"af_packet {self.name}: {os.strerror(number)}" if number else None

    def close(self) -> None:
        """Closes sockets and unmaps rings. The workers must have ended."""
        for ring in self._rings:
            self._arena.unmap(ring, self._ring_bytes)
        for sock in self._sockets + self._senders:
            sock.close()
        self._rings, self._sockets, self._senders = [], [], []

    @property
    def _ring_bytes(self) -> int:
        return self._settings.block_bytes * self._settings.blocks

    def _fail(self, what: str) -> DataplaneError:
        return DataplaneError(f"af_packet {self.name}: {what}")

    def _find(self) -> _Device:
        try:
            device = _Device(self.name)
        except OSError:
            raise self._fail("there is no such interface") from None
        if device.link_type not in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK):
            raise self._fail(f"not an Ethernet interface (its link type is {device.link_type})")
        if problem := _address.taken(self.addresses):
            raise self._fail(problem)
        return device

    def _open_queue(self, queue: int) -> None:
        """A socket with its ring. It receives nothing yet: a filter that takes nothing is attached."""
        try:
            # Protocol 0: nothing is received before the bind.
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        except PermissionError:
            raise self._fail("opening it needs the capability CAP_NET_RAW") from None
        self._sockets.append(sock)
        sock.setblocking(False)
        try:
            self._set_options(sock)
            self._rings.append(self._arena.map_fd(sock.fileno(), self._ring_bytes))
        except OSError as error:
            what = f"cannot make a ring of {self._settings.blocks} blocks of {self._settings.block_bytes} bytes"
            raise self._fail(f"{what}: {error.strerror}") from None
        self._fill(queue)

    def _set_options(self, sock: socket.socket) -> None:
        settings = self._settings
        frames = settings.block_bytes // T.FRAME_BYTES * settings.blocks
        request = struct.pack(T.REQ3, settings.block_bytes, settings.blocks, T.FRAME_BYTES, frames,
                              settings.block_timeout_ms, 0, 0)
        sock.setsockopt(T.SOL_PACKET, T.VERSION, T.TPACKET_V3)
        sock.setsockopt(T.SOL_PACKET, T.RESERVE, _RESERVE)
        sock.setsockopt(T.SOL_PACKET, T.RX_RING, request)
        if not self.passive or self._device.link_type == _ARPHRD_LOOPBACK:
            # Our own transmissions are no packets for us; on lo each packet would come twice.
            sock.setsockopt(T.SOL_PACKET, T.IGNORE_OUTGOING, 1)
        if not self.passive:
            _set_send_buffer(sock)
            with contextlib.suppress(OSError):      # a device may not allow it; then through the qdisc
                sock.setsockopt(T.SOL_PACKET, T.QDISC_BYPASS, 1)

    def _fill(self, queue: int) -> None:
        nif = self._words[queue]
        nif[L.N_RX // 8], nif[L.N_DONE // 8] = rx.address, done.address
        nif[L.N_TX // 8] = 0 if self.passive else tx.address
        nif[L.N_LINK // 8] = L.LINK_ETHERNET
        nif[L.N_FD // 8] = self._sockets[queue].fileno()
        nif[L.N_FDS_SYN // 8] = nif[L.N_FDS_SYN // 8 + 1] = -1
        nif[L.N_MTU // 8] = self.mtu
        nif.view(np.uint8)[L.N_MAC:L.N_MAC + 6] = np.frombuffer(self._device.mac, np.uint8)
        _address.fill(nif, self._settings)
        private = nif[L.N_PRIVATE // 8:]
        private[CURSOR // 8] = 1 << OFFSET_BITS
        private[RING // 8] = self._rings[queue]
        private[BLOCKS // 8] = self._settings.blocks
        private[BLOCK_BYTES // 8] = self._settings.block_bytes
        if not self.passive:
            self._open_sender(nif, self._nifs[queue] + L.N_PRIVATE)

    def _open_sender(self, nif: Any, own: int) -> None:
        """The second socket, unless the kernel is too old for it: then checksums and cutting are ours."""
        # Protocol 0: nothing is ever received.
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._senders.append(sock)
        sock.setblocking(False)
        _set_send_buffer(sock)
        try:
            sock.setsockopt(T.SOL_PACKET, T.VNET_HDR, 1)
        except OSError:
            return
        sock.bind((self.name, 0))
        private = nif[L.N_PRIVATE // 8:]
        private[TX_FD // 8] = sock.fileno()
        private[IOV // 8] = self._arena.mem.ctypes.data + own + HEADER
        private[IOV // 8 + 1] = V.SHORT_BYTES
        nif[L.N_FLAGS // 8] |= L.NF_TX_CHECKSUM | L.NF_TX_SEGMENT

    def _start(self) -> None:
        """Binds all sockets, then opens them together: while they join the fanout group one after the other,
        each of those that are outside would get every packet."""
        index = socket.if_nametoindex(self.name)
        for sock in self._sockets:
            _attach_nothing(sock)
            sock.bind((self.name, T.ETH_P_ALL))
        self._join_fanout()
        for membership in self._memberships():
            mreq = struct.pack(T.MREQ, index, membership, 0, b"")
            self._sockets[0].setsockopt(T.SOL_PACKET, T.ADD_MEMBERSHIP, mreq)
        for sock in self._sockets:
            sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    def _memberships(self) -> list[int]:
        """Endpoints hear all groups: IPv6 resolves addresses through them (RFC 4861, 7.2.1)."""
        return ([T.MR_PROMISC] if self._settings.promiscuous else []) + ([] if self.passive else [T.MR_ALLMULTI])

    def _join_fanout(self) -> None:
        if len(self._sockets) == 1:
            return
        how = (T.FANOUT_HASH | T.FANOUT_FLAG_DEFRAG) << 16
        first, *others = self._sockets
        try:
            new = how | T.FANOUT_FLAG_UNIQUEID << 16
            first.setsockopt(T.SOL_PACKET, T.FANOUT, struct.pack("I", new))
            group = first.getsockopt(T.SOL_PACKET, T.FANOUT) & 0xFFFF
            for sock in others:
                sock.setsockopt(T.SOL_PACKET, T.FANOUT, struct.pack("I", how | group))
        except OSError as error:
            raise self._fail(f"cannot share it between {len(self._sockets)} queues: {error.strerror}") from None


def _set_send_buffer(sock: socket.socket) -> None:
    """As large as it may be: what finds no room in it is dropped."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


def _attach_nothing(sock: socket.socket) -> None:
    """Attaches a filter that takes no packet. What it refuses stands in no statistics."""
    code = np.frombuffer(struct.pack("HBBI", _BPF_RET, 0, 0, 0), np.uint8)
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, code.ctypes.data))
