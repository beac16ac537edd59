"""Frames for tests, and a sender that is as fast as the kernel takes them.

    flood("va0", [udp_frame(...)], 1_000_000, stamp=42)

Runs in the network namespace of the caller (see `tests/netns.py`). One core sends 0.8 to 0.9 million small
frames a second into a veth.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
import time
from collections.abc import Sequence

import numpy as np

from dataplane.jit import kernel
from dataplane.shm.atomics import ld64, put_be64
from dataplane.shm.libc import sched_yield, sendmmsg

BROADCAST = b"\xff" * 6
_SOL_PACKET, _QDISC_BYPASS = 263, 20
_MESSAGE, _IOVEC, _BATCH = 64, 16, 64   # bytes of struct mmsghdr and struct iovec; messages of one call
_AGAIN, _NOBUFS = errno.EAGAIN, errno.ENOBUFS
_PATIENCE = 1_000_000                   # refusals in a row, each followed by a yield


@kernel("i64(mem, i64, i64, i64, i64)")
def _flood(mem, fd, slots, count, stamp):
    """Sends `count` messages, round and round through the `slots` at the start of `mem`. Behind them stand their
    frames' places. Returns how many went out, or -errno."""
    places = slots * (_MESSAGE + _IOVEC)
    sent, slot, refused = 0, 0, 0
    while sent < count and refused < _PATIENCE:
        size = min(_BATCH, slots - slot, count - sent)
        if stamp >= 0:
            for i in range(size):
                put_be64(mem, ld64(mem, places + 8 * (slot + i)) + stamp, sent + i)
        taken = sendmmsg(mem, fd, slot * _MESSAGE, size, 0)
        if taken > 0:
            sent += taken
            slot = (slot + taken) % slots
            refused = 0
        elif taken == -_AGAIN or taken == -_NOBUFS:
            refused += 1
            sched_yield()
        else:
            return taken
    return sent


def flood(device: str, frames: Sequence[bytes], count: int, stamp: int = -1) -> int:
    """Sends `count` Ethernet frames, `frames` over and over, on `device`; returns how many the kernel took.

    stamp: where in each frame its number goes, 8 bytes in network order: 0 for the first frame sent. -1: the
    frames are sent as they are. Checksums are not corrected.
    """
    slots = -(-_BATCH // len(frames)) * len(frames)
    stride = -(-max(map(len, frames)) // 64) * 64
    places = slots * (_MESSAGE + _IOVEC)
    start = -(-(places + 8 * slots) // 64) * 64
    mem = np.zeros(start + slots * stride, np.uint8)
    base = mem.ctypes.data
    for i in range(slots):
        frame, at = frames[i % len(frames)], start + i * stride
        iovec = slots * _MESSAGE + i * _IOVEC
        header = struct.pack("QI4xQQQQi4xI4x", 0, 0, base + iovec, 1, 0, 0, 0, 0)
        mem[i * _MESSAGE:(i + 1) * _MESSAGE] = np.frombuffer(header, np.uint8)
        mem[iovec:iovec + _IOVEC] = np.frombuffer(struct.pack("QQ", base + at, len(frame)), np.uint8)
        mem[places + 8 * i:places + 8 * i + 8] = np.frombuffer(struct.pack("q", at), np.uint8)
        mem[at:at + len(frame)] = np.frombuffer(frame, np.uint8)
    with packet_socket(device) as sock:
        sock.setsockopt(_SOL_PACKET, _QDISC_BYPASS, 1)
        result = int(_flood(mem, sock.fileno(), slots, count, stamp))
    if result < 0:
        raise OSError(-result, f"sendmmsg on {device}")
    return result


def warm() -> None:
    """Compiles the sender, for a test that forks several."""
    _flood.compile()


def packet_socket(device: str, receive: bool = False) -> socket.socket:
    """A plain AF_PACKET socket on `device`; without `receive` it only sends."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.bind((device, 0x0003 if receive else 0))
    return sock


def ethernet(payload: bytes, ethertype: int, target: bytes = BROADCAST, source: bytes = b"\x02\0\0\0\0\x01",
             tags: Sequence[tuple[int, int]] = ()) -> bytes:
    """A frame; `tags` are pairs of TPID and tag control information, from the outermost on."""
    vlan = b"".join(struct.pack("!HH", *tag) for tag in tags)
    return target + source + vlan + struct.pack("!H", ethertype) + payload


def udp4(source: str, target: str, ports: tuple[int, int], payload: bytes, checksum: bool = True) -> bytes:
    """An IPv4 packet. checksum False: zero, that is, none."""
    size = 8 + len(payload)
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    udp = struct.pack("!HHHH", *ports, size, 0) + payload
    if checksum:
        total = internet_checksum(ends + struct.pack("!BBH", 0, 17, size) + udp) or 0xFFFF
        udp = udp[:6] + struct.pack("!H", total) + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 0, 0, 64, 17, 0) + ends
    return head[:10] + struct.pack("!H", internet_checksum(head)) + head[12:] + udp


def syn(family: int, source: str, target: str, ports: tuple[int, int], sequence: int) -> bytes:
    """An IP packet with a SYN, as a kernel's: MSS, SACK permitted, timestamps, window scale."""
    options = bytes.fromhex("020405b4 0402 080a 00001234 00000000 01 030307".replace(" ", ""))
    tcp = struct.pack("!HHIIBBHHH", *ports, sequence, 0, 0xA0, 2, 64240, 0, 0) + options
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    ends = socket.inet_pton(kind, source) + socket.inet_pton(kind, target)
    pseudo = ends + struct.pack("!II", 6, len(tcp))     # both families' sums are alike
    tcp = tcp[:16] + struct.pack("!H", internet_checksum(pseudo + tcp)) + tcp[18:]
    if family == 6:
        return struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + ends + tcp
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0) + ends
    return head[:10] + struct.pack("!H", internet_checksum(head)) + head[12:] + tcp


def syn_flood(device: str, family: int, target: str, port: int, seconds: float, link: bytes = b"",
              clients: int = 8192) -> int:
    """Sends SYNs of so many clients that do not exist, neighbours of `target`, until the time is over; how many.
    `link`: what comes before each packet, an Ethernet header on an Ethernet. With few clients it goes by bursts of so
    many, some 10,000 a second; with a thousand or more as fast as one core can."""
    choose = random.Random(1)
    before = target.rpartition("." if family == 4 else ":")[0] + (".{}" if family == 4 else ":{:x}")
    frames = [link + syn(family, before.format(choose.randrange(3, 250)), target,
                         (choose.randrange(1024, 65536), port), choose.getrandbits(32)) for _ in range(clients)]
    rounds = 8 if clients >= 1000 else 1
    sent, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        sent += flood(device, frames, rounds * len(frames))
    return sent


def internet_checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
