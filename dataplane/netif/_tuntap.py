"""What `tun` and `tap` share: the character device, its queues and their kernels.

The device is made by us and lives as long as our descriptors. One descriptor is one queue; a read or a
write is one frame behind a virtio-net header, which says whether the checksum was left to the other side, and
whether it is a TCP super-segment of up to 64 KB that was never cut (both ways: TSO).

A burst is read into the queue's buffer, frame behind frame, so that small ones stay in the cache:

    +0 bytes of the frame | PF_... | time in ns | unused | virtio-net header, 12 | frame | padding to 64

The buffer is shared with the supervisor, and one word says which frames in it are not done. So a worker
that takes over from a dead one finds them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from dataplane.config import Address, Context, Device, Interface, NetifSettings, parse_interface
from dataplane.errors import DataplaneError
from dataplane.jit import callback, inlined
from dataplane.netif import _address, _steering
from dataplane.netif import _virtio as V
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import as_memory, be16, be32, ld8, ld64, load_acquire, st64, store_release
from dataplane.shm.libc import CLOCK_REALTIME, clock_ns, read, writev

# -- N_PRIVATE ---------------------------------------------------------------------------------------------
HAND = 64               # frames that the last rx gave and that are not done
READY = 72              # frames in the buffer that are not done << READY_BITS | place of the first
BUFFER = 80             # place of the buffer in the arena
CLOCK = 96              # scratch: struct timespec
IOV = 112               # two struct iovec: the virtio-net header, the frame
HEADER = 144            # the virtio-net header of what we send
READ_RESULT = 160       # of the last read(2)
READ_TIME = 168         # CLOCK_REALTIME ns of the first frame of the last refill
SYN_REST = 176          # bursts in which the queues of SYNs are still left alone

READY_BITS = 56         # the arena has 2^44 bytes
READY_MASK = (1 << READY_BITS) - 1

# -- a frame in the buffer ---------------------------------------------------------------------------------
SLOT_SIZE = 0
SLOT_FLAGS = 8
SLOT_TIME = 16
SLOT_HEADER = 32
SLOT_FRAME = 44

READ_BYTES = V.BYTES + 14 + 8 + 65535    # an Ethernet header, two VLAN tags and the largest IP packet
SLOT_BYTES = (SLOT_HEADER + READ_BYTES + 63) // 64 * 64
REFILL_BYTES = 1 << 18      # more is not read at once: super-segments are still in the cache when they are copied
SYN_BYTES = 1 << 14         # nor more of SYNs, besides
BUFFER_BYTES = REFILL_BYTES + SYN_BYTES + 2 * SLOT_BYTES
SYN_RESTS = 8               # bursts in which the queues of SYNs are left alone, when they were empty

# -- linux/if_tun.h ----------------------------------------------------------------------------------------
IFF_TUN, IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 1, 2, 0x100, 0x1000, 0x4000, 0x8000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
_TUNSETIFF, _TUNGETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x800454D2, 0x400454D0, 0x400454D8
_IFA_F_NODAD = 2
_IFF_RUNNING = 0x40

_KERNEL_QUEUE = 4096
"""Frames that the kernel keeps for us, per queue. Its default of 500 is less than what one sender may have
outstanding; and that it is full shows nowhere but in a counter."""


class TuntapSettings(NetifSettings, frozen=True, kw_only=True):
    """An interface that exists as long as the dataplane runs: the kernel is the other end of the link."""

    device: Annotated[Device, Meta(description="The name of the interface that is made.")]
    addresses: Annotated[
        Annotated[tuple[Interface, ...], Meta(max_length=L.ADDRESS_MAX)],
        Meta(
            description="The dataplane's own addresses on this link, with their prefix length. None: passive, "
            "every packet is demultiplexed, whoever it is for, and nothing is transmitted."
        ),
    ] = ()
    host_addresses: Annotated[
        tuple[Interface, ...] | Literal["auto"],
        Meta(
            description="The kernel's addresses on this link. `auto`: in each network of `addresses` the next "
            "free one, 10.77.0.2/24 for 10.77.0.1/24."
        ),
    ] = "auto"
    gateway: Annotated[
        tuple[Address, ...],
        Meta(description="Next hop to other networks: at most one for IPv4 and one for IPv6."),
    ] = ()
    mtu: Annotated[
        int,
        Meta(ge=68, le=65535, description="The largest IP packet.", extra={"unit": "bytes"}),
    ] = 1500

    @property
    def host(self) -> tuple[str, ...]:
        """The kernel's addresses on the device."""
        if self.host_addresses == "auto":
            return _address.host_addresses(self.addresses)
        return self.host_addresses

    def check(self, where: str, ctx: Context) -> None:
        if self.device in (name for _, name in socket.if_nameindex()):
            ctx.error("device", self.device, "the name of a new interface", "an interface of this name exists already")
        if self.mtu < 1280 and any(parse_interface(text).version == 6 for text in self.addresses + self.host):
            ctx.error("mtu", self.mtu, "at least 1280, which IPv6 needs")
        _address.check(self, ctx)
        if self.host_addresses != "auto":
            _address.check(self, ctx, "host_addresses", self.host_addresses)
            ours = {parse_interface(text).ip for text in self.addresses}
            for index, text in enumerate(self.host_addresses):
                if parse_interface(text).ip in ours:
                    ctx.error(f"host_addresses[{index}]", text, "an address that is not in `addresses`")


# -- kernels -----------------------------------------------------------------------------------------------


@inlined
def _next_slot(at, size):
    return at + ((SLOT_FRAME + size + 63) & ~63)


@inlined
def _flags(mem, nif, at):
    """Flags of the frame in the slot at `at`: of its checksum and, on a TAP, of its link-layer destination."""
    flags = 0
    offered = ld8(mem, at + SLOT_HEADER)
    if offered & V.NEEDS_CSUM:
        flags |= L.PF_CHECKSUM_PARTIAL
    if offered & V.DATA_VALID:
        flags |= L.PF_CHECKSUM_OK
    if ld64(mem, nif + L.N_LINK) == L.LINK_ETHERNET:
        frame, mac = at + SLOT_FRAME, nif + L.N_MAC
        if ld8(mem, frame) & 1:
            flags |= L.PF_LINK_MULTICAST
        elif be32(mem, frame) != be32(mem, mac) or be16(mem, frame + 4) != be16(mem, mac + 4):
            flags |= L.PF_OTHERHOST
    return flags


@inlined
def _read_frames(mem, nif, fd, so_far, limit, end):
    """Reads frames until there are `limit` or their place is past `end`. `so_far`: frames in the buffer <<
    READY_BITS | place behind them; what that is afterwards. READ_RESULT: what the last read(2) gave."""
    own = nif + L.N_PRIVATE
    at, count = so_far & READY_MASK, so_far >> READY_BITS
    now = ld64(mem, own + READ_TIME)
    while count < limit and at < end:
        size = read(mem, fd, at + SLOT_HEADER, READ_BYTES)
        st64(mem, own + READ_RESULT, size)
        if size <= V.BYTES:
            break
        if count == 0:
            now = clock_ns(mem, own + CLOCK, CLOCK_REALTIME)
            st64(mem, own + READ_TIME, now)
        size -= V.BYTES
        st64(mem, at + SLOT_SIZE, size)
        st64(mem, at + SLOT_FLAGS, _flags(mem, nif, at))
        st64(mem, at + SLOT_TIME, now)
        at = _next_slot(at, size)
        count += 1
    return count << READY_BITS | at


@inlined
def _read_syns(mem, nif, first, limit):
    """Reads up to `limit` SYNs, from those whose turn it is while there are any; as _read_frames."""
    at = nif + L.N_FDS_SYN
    filled = _read_frames(mem, nif, ld64(mem, at), first, limit, first + SYN_BYTES)
    return _read_frames(mem, nif, ld64(mem, at + 8), filled, limit, first + SYN_BYTES)


@inlined
def _refill(mem, nif, limit):
    """Reads up to `limit` frames into the buffer, which must hold none: 0, or -errno. SYNs are at most a quarter of
    them, however many there are. When there was none, their queues are left alone while others keep us busy, for some
    bursts: asking costs system calls."""
    own = nif + L.N_PRIVATE
    first = ld64(mem, own + BUFFER)
    rest = ld64(mem, own + SYN_REST) - 1
    filled = first
    if rest < 0 and ld64(mem, nif + L.N_FDS_SYN) >= 0:
        filled = _read_syns(mem, nif, first, max(limit >> 2, 1))
        rest = SYN_RESTS if filled == first else 0
    filled = _read_frames(mem, nif, ld64(mem, nif + L.N_FD), filled, limit, (filled & READY_MASK) + REFILL_BYTES)
    count = filled >> READY_BITS
    st64(mem, own + SYN_REST, rest if count != 0 else 0)
    # SYNC tuntap-ready: release, pairs with `rx` of a replacement worker; else it could find slots that are not
    # all written.
    store_release(mem, own + READY, count << READY_BITS | first)
    size = ld64(mem, own + READ_RESULT)
    return size if count == 0 and size < 0 and size != -errno.EAGAIN and size != -errno.EINTR else 0


@callback(3)
def rx(base, nif, burst, limit):
    """Gives what is in the buffer; if that is nothing, reads first."""
    mem = as_memory(base)
    own = nif + L.N_PRIVATE
    st64(mem, own + HAND, 0)
    if ld64(mem, own + READY) >> READY_BITS == 0:
        error = _refill(mem, nif, min(limit, L.BURST))
        if error:
            st64(mem, nif + L.N_ERROR, -error)
            return L.NIF_FAILED
    # SYNC tuntap-ready: acquire, pairs with `_refill` and `done` of the worker before this one.
    ready = load_acquire(mem, own + READY)
    count = min(limit, ready >> READY_BITS)
    at = ready & READY_MASK
    link = ld64(mem, nif + L.N_LINK)
    for i in range(count):
        p = burst + i * L.P_BYTES
        size = ld64(mem, at + SLOT_SIZE)
        st64(mem, p + L.P_FRAME, at + SLOT_FRAME)
        st64(mem, p + L.P_LENGTH, size)
        st64(mem, p + L.P_WIRE, size)
        st64(mem, p + L.P_TIME, ld64(mem, at + SLOT_TIME))
        st64(mem, p + L.P_LINK, link)
        st64(mem, p + L.P_FLAGS, ld64(mem, at + SLOT_FLAGS))
        at = _next_slot(at, size)
    st64(mem, own + HAND, count)
    return count


@callback(2)
def done(base, nif, count):
    """Takes the first `count` frames off the buffer."""
    mem = as_memory(base)
    own = nif + L.N_PRIVATE
    ready = ld64(mem, own + READY)
    at = ready & READY_MASK
    for _ in range(count):
        at = _next_slot(at, ld64(mem, at + SLOT_SIZE))
    st64(mem, own + HAND, 0)
    # SYNC tuntap-ready: release, pairs with `rx` of a replacement worker; else it would pass over a frame on which
    # the dead one still worked.
    store_release(mem, own + READY, ((ready >> READY_BITS) - count) << READY_BITS | at)
    return 0


@callback(3)
def tx(base, nif, burst, count):
    """Writes each frame behind its header; what the kernel does not take is dropped."""
    mem = as_memory(base)
    own = nif + L.N_PRIVATE
    fd = ld64(mem, nif + L.N_FD)
    address = ld64(mem, own + IOV) - (own + HEADER)     # of the arena: the first iovec points to HEADER
    packets, octets = 0, 0
    for i in range(count):
        p = burst + i * L.P_BYTES
        size = ld64(mem, p + L.P_LENGTH)
        V.put_header(mem, own + HEADER, p)
        st64(mem, own + IOV + 16, address + ld64(mem, p + L.P_FRAME))
        st64(mem, own + IOV + 24, size)
        if writev(mem, fd, own + IOV, 2) > 0:
            packets += 1
            octets += size
    st64(mem, nif + L.N_TX_PACKETS, ld64(mem, nif + L.N_TX_PACKETS) + packets)
    st64(mem, nif + L.N_TX_BYTES, ld64(mem, nif + L.N_TX_BYTES) + octets)
    st64(mem, nif + L.N_TX_DROPPED, ld64(mem, nif + L.N_TX_DROPPED) + count - packets)
    return count


# -- Python side, in the supervisor ------------------------------------------------------------------------


class Tuntap:
    """The device and its queues. `DataplaneError` if that cannot be; nothing is left then."""

    def __init__(self, settings: TuntapSettings, arena: Arena, queues: int, nifs: list[int],
                 kind: Literal["tun", "tap"]) -> None:
        self.name = settings.device
        self.mtu = settings.mtu
        self.addresses = list(settings.addresses)
        self.gateway = list(settings.gateway)
        self.passive = not settings.addresses
        self._settings = settings
        self._arena = arena
        self._kind = kind
        self._fds: list[int] = []           # a descriptor for each queue
        self._syn_fds: list[int] = []       # then those of SYNs (_steering.py); none where they cannot be kept apart
        self._buffers: list[int] = []
        self._words = [_address.words(arena.mem, nif) for nif in nifs]
        self._counters = -1
        try:
            if problem := _address.taken(settings.addresses + settings.host):
                raise self._fail(problem)
            for queue in range(queues):
                self._fds.append(self._open_queue(first=queue == 0))
            self._steer()
            for queue, nif in enumerate(nifs):
                self._buffers.append(arena.map_anonymous(BUFFER_BYTES, shared=True))
                self._fill(queue, nif)
            # Of this thread's network namespace, also when it is read from another one.
            self._counters = os.open("/proc/thread-self/net/dev", os.O_RDONLY | os.O_CLOEXEC)
            self._set_up()
        except BaseException:
            self.close()
            raise

    def poll_counters(self) -> None:
        """Writes how many frames the kernel dropped because a queue was full. It does not say which: queue 0
        gets them all."""
        with contextlib.suppress(OSError):      # the device may have been removed
            name = fcntl.ioctl(self._fds[0], _TUNGETIFF, bytes(40))[:16].rstrip(b"\0") + b":"
            for line in os.pread(self._counters, 1 << 20, 0).splitlines():
                fields = line.split()
                if fields[0] == name:           # name: 8 columns received, then sent: bytes, packets, errors, drops
                    self._words[0][L.N_KERNEL_DROPPED // 8] = int(fields[12])

    def error(self, queue: int) -> str | None:
        """Why rx has failed, as a sentence without a full stop."""
        number = int(self._words[queue][L.N_ERROR // 8])
        if number in (errno.EBADFD, errno.ENODEV):
            return f"{self._kind} {self.name}: the interface was removed"
        return f"{self._kind} {self.name}: {os.strerror(number)}" if number else None

    def close(self) -> None:
        """Removes the device. The workers must have ended: it lives until the last descriptor is closed."""
        for fd in self._fds + self._syn_fds:
            os.close(fd)
        for buffer in self._buffers:
            self._arena.unmap(buffer, BUFFER_BYTES)
        if self._counters >= 0:
            os.close(self._counters)
        self._fds, self._syn_fds, self._buffers, self._counters = [], [], [], -1

    def _fail(self, what: str) -> DataplaneError:
        return DataplaneError(f"{self._kind} {self.name}: {what}")

    def _open_queue(self, first: bool) -> int:
        flags = IFF_TUN if self._kind == "tun" else IFF_TAP
        flags |= IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE | (IFF_TUN_EXCL if first else 0)
        fd = -1
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            made = fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", self.name.encode(), flags))
            self.name = made[:16].rstrip(b"\0").decode()     # the kernel puts a number for %d
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", V.BYTES))
            fcntl.ioctl(fd, _TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise self._fail(_reason(error)) from None
        return fd

    def _steer(self) -> None:
        """Flows stay in their queues, and SYNs get queues of their own if we answer any."""
        flows = len(self._fds)
        if self.passive:
            if flows > 1:
                _steering.attach(self._fds[0], flows, apart=False)
            return
        with contextlib.suppress(DataplaneError):       # the kernel allows no more: better without
            for _ in range(2 * flows):
                self._syn_fds.append(self._open_queue(first=False))
        apart = len(self._syn_fds) == 2 * flows
        if not _steering.attach(self._fds[0], flows, apart) or not apart:
            for fd in self._syn_fds:
                os.close(fd)
            self._syn_fds = []

    def _fill(self, queue: int, offset: int) -> None:
        nif = self._words[queue]
        nif[L.N_RX // 8], nif[L.N_DONE // 8] = rx.address, done.address
        nif[L.N_TX // 8] = 0 if self.passive else tx.address
        nif[L.N_LINK // 8] = L.LINK_RAW if self._kind == "tun" else L.LINK_ETHERNET
        nif[L.N_FD // 8] = self._fds[queue]
        syns = self._syn_fds[queue::len(self._fds)] or [-1, -1]
        nif[L.N_FDS_SYN // 8], nif[L.N_FDS_SYN // 8 + 1] = syns
        nif[L.N_MTU // 8] = self.mtu
        if self._kind == "tap":
            nif.view(np.uint8)[L.N_MAC:L.N_MAC + 6] = np.frombuffer(own_mac(self.name), np.uint8)
        _address.fill(nif, self._settings)
        if not self.passive:
            nif[L.N_FLAGS // 8] |= L.NF_TX_CHECKSUM | L.NF_TX_SEGMENT
        private = nif[L.N_PRIVATE // 8:]
        private[BUFFER // 8] = private[READY // 8] = self._buffers[queue]
        private[IOV // 8] = self._arena.mem.ctypes.data + offset + L.N_PRIVATE + HEADER
        private[IOV // 8 + 1] = V.BYTES

    def _set_up(self) -> None:
        """The kernel's side: size, addresses, up, and a route to those of our addresses that are in none of
        its networks."""
        # Here, since it takes longer to import than all the rest.
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
        try:
            with IPRoute() as ip:
                index = socket.if_nametoindex(self.name)
                # Duplicate address detection would make the kernel's addresses unusable for a second.
                with contextlib.suppress(OSError):
                    Path(f"/proc/sys/net/ipv6/conf/{self.name}/accept_dad").write_text("0")
                ip.link("set", index=index, mtu=self.mtu, txqlen=_KERNEL_QUEUE)
                ip.link("set", index=index, state="up")
                for text in self._settings.host:
                    host = parse_interface(text)
                    ip.addr("add", index=index, address=str(host.ip), prefixlen=host.network.prefixlen,
                            **({"flags": _IFA_F_NODAD} if host.version == 6 else {}))
                for text in self._unreachable():
                    ip.route("add", dst=text, oif=index)
                _wait_running(ip, index)
        except NetlinkError as error:
            raise self._fail(f"cannot set it up: {os.strerror(error.code)}") from None
        except OSError as error:
            raise self._fail(f"cannot set it up: {error.strerror}") from None

    def _unreachable(self) -> list[str]:
        networks = [parse_interface(text).network for text in self._settings.host]
        ours = [parse_interface(text).ip for text in self.addresses]
        return [f"{ip}/{ip.max_prefixlen}" for ip in ours if not any(ip in network for network in networks)]


def _wait_running(ip: Any, index: int) -> None:
    deadline = time.monotonic() + 2
    while not ip.link("get", index=index)[0]["flags"] & _IFF_RUNNING and time.monotonic() < deadline:
        time.sleep(0.001)


def _reason(error: OSError) -> str:
    return {
        errno.EPERM: "making it needs the capability CAP_NET_ADMIN",
        errno.EACCES: "making it needs access to /dev/net/tun and the capability CAP_NET_ADMIN",
        errno.ENOENT: "there is no /dev/net/tun (is the kernel module tun loaded?)",
        errno.ENODEV: "there is no device behind /dev/net/tun (is the kernel module tun loaded?)",
        errno.EBUSY: "an interface of this name exists already",
        errno.EEXIST: "an interface of this name exists already",
        errno.E2BIG: "the kernel does not allow so many queues",
    }.get(error.errno or 0, f"cannot make it: {error.strerror}")


def own_mac(device: str) -> bytes:
    """Our link-layer address on a TAP: the same at each start, another one on another machine, since the
    kernel's side may be bridged to where that one is. Locally administered (IEEE 802, 8.4)."""
    digest = hashlib.sha256(f"dataplane {socket.gethostname()} {device}".encode()).digest()
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]
