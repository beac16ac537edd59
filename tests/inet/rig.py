"""One worker with two netifs in plain memory: what the kernels of `dataplane.inet` touch, with guards.

Frames that are transmitted go through a real transmit callback that appends them to a log. Between all
areas lie guard bytes, and `Rig.check_guards` finds a write outside of its area.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import numpy as np

from dataplane.inet import fragments as F
from dataplane.inet import icmp as I
from dataplane.inet import neighbour as N
from dataplane.inet import output as O
from dataplane.jit import callback, inlined, kernel
from dataplane.shm import layout as L
from dataplane.shm.atomics import as_memory, copy, ld64, st64

GUARD = 0xA5
GUARD_BYTES = 256
LOG_BYTES = 1 << 18
MAC = "02:00:00:00:00:01"
SECOND = 1_000_000_000


@inlined
def _append(mem, nif, p):
    log = ld64(mem, nif + L.N_PRIVATE)
    end = ld64(mem, log)
    size = ld64(mem, p + L.P_LENGTH)
    if end + size + 24 <= LOG_BYTES:
        st64(mem, log + end, nif)
        st64(mem, log + end + 8, size)
        copy(mem, log + end + 16, ld64(mem, p + L.P_FRAME), size)
        st64(mem, log, end + 16 + size)
        st64(mem, nif + L.N_TX_PACKETS, ld64(mem, nif + L.N_TX_PACKETS) + 1)


@callback(3)
def tx(base, nif, burst, count):
    mem = as_memory(base)
    for i in range(count):
        _append(mem, nif, burst + i * L.P_BYTES)
    return count


@kernel("i64(mem, i64, i64, i64)")
def fragment(mem, w, nif, p):
    return F.fragment_input(mem, w, nif, p)


@kernel("i64(mem, i64, i64, i64)")
def fragment_after(mem, w, p, what):
    """0: release, 1: restore, 2: expire at time p, 3: flush."""
    if what == 0:
        F.fragment_release(mem, w, p)
    elif what == 1:
        F.fragment_restore(mem, w, p)
    elif what == 2:
        return F.fragment_expire(mem, w, p)
    else:
        return F.fragment_flush(mem, w)
    return 0


@kernel("i64(mem, i64, i64, i64)")
def icmp_input(mem, w, nif, p):
    verdict = I.icmp_input(mem, w, nif, p)
    O.tx_flush(mem, w)
    return verdict


@kernel("i64(mem, i64, i64, i64, i64)")
def unreachable(mem, w, nif, p, kind):
    sent = I.icmp_unreachable(mem, w, nif, p, kind)
    O.tx_flush(mem, w)
    return sent


@kernel("i64(mem, i64, i64, i64)")
def arp_input(mem, w, nif, p):
    verdict = N.arp_input(mem, w, nif, p)
    O.tx_flush(mem, w)
    return verdict


@kernel("i64(mem, i64, i64, i64, i64)")
def udp_output(mem, w, record, length, pcb):
    code = O.udp_output(mem, w, record, length, pcb)
    O.tx_flush(mem, w)
    return code


@kernel("i64(mem, i64)")
def retry(mem, w):
    waiting = N.tx_retry(mem, w)
    O.tx_flush(mem, w)
    return waiting


@kernel("i64(mem, i64, i64, i64, i64, i64)")
def resolve(mem, w, nif, family, hi, lo):
    mac = N.neighbour_resolve(mem, w, nif, family, hi, lo)
    O.tx_flush(mem, w)
    return mac


@kernel("i64(mem, i64, i64, i64, i64)")
def route(mem, w, family, hi, lo):
    return O.route(mem, w, family, hi, lo)


def halves(text: str) -> tuple[int, int, int]:
    """Family, hi and lo of an address, as signed numbers."""
    address = ipaddress.ip_address(text)
    number = int(address)
    signed = [half - (1 << 64) if half >> 63 else half for half in (number >> 64, number & (1 << 64) - 1)]
    return address.version, signed[0], signed[1]


class Rig:
    """`ethernet` and `tun` are the offsets of the two netif queues, `w` of the worker's block."""

    def __init__(self, entries: int = 4, timeout_ns: int = 30 * SECOND, mtu: int = 1500,
                 workers: int = 1) -> None:
        self.mem: Any = np.full(8 << 20, GUARD, np.uint8)
        self._end = GUARD_BYTES
        self._guards = [(0, GUARD_BYTES)]
        self.table = self.area(L.T_HEADER)
        self.ws = [self.area(L.W_BYTES) for _ in range(workers)]
        self.w = self.ws[0]
        self.log = self.area(LOG_BYTES)
        self.put(self.log, 8)
        self.ethernet = self._netif(0, L.LINK_ETHERNET, mtu, ["10.0.0.1/24", "fd00::1/64", "fe80::1/64"])
        self.tun = self._netif(1, L.LINK_RAW, mtu, ["10.1.0.1/24", "fd01::1/64"])
        self.put(self.table + L.T_WORKERS, workers)
        self.put(self.table + L.T_NEIGHBOURS, self.area(64 * L.NB_BYTES))
        self.put(self.table + L.T_NEIGHBOUR_MASK, 63)
        for index, w in enumerate(self.ws):
            self._worker(index, w, entries, timeout_ns)
        self.p = self.area(L.P_BYTES)
        self.pcb = self.area(L.PCB_BYTES)
        self.frame = self.area(70000)
        self.record = self.area(70000)

    def _worker(self, index: int, w: int, entries: int, timeout_ns: int) -> None:
        self.put(w + L.W_INDEX, index)
        self.put(w + L.W_TABLE, self.table)
        self.put(w + L.W_STAMP, 100 + index)
        self.put(w + L.W_TX_BURST, self.area(L.TX_BURST * L.P_BYTES))
        self.put(w + L.W_TX_BUFFER, self.area(L.TX_BUFFER_BYTES))
        self.put(w + L.W_FRAGMENTS, self.area(F.area_bytes(entries)))
        self.put(w + L.W_PENDING, self.area(N.pending_bytes()))
        self.put(w + L.W_NIF_COUNT, 2)
        self.put(w + L.W_NIF, self.ethernet)
        self.put(w + L.W_NIF + 8, self.tun)
        self.put(w + L.W_ICMP_RATE, 1000)
        self.put(w + L.W_MONOTONIC, 1000 * SECOND)
        F.fragments_init(self.mem, self.get(w + L.W_FRAGMENTS), entries, timeout_ns)

    def _netif(self, index: int, link: int, mtu: int, addresses: list[str]) -> int:
        nif = self.area(L.N_BYTES)
        self.put(nif + L.N_INDEX, index)
        self.put(nif + L.N_LINK, link)
        self.put(nif + L.N_MTU, mtu)
        self.put(nif + L.N_TX, tx.address)
        self.put(nif + L.N_PRIVATE, self.log)
        self.write(nif + L.N_MAC, bytes.fromhex(MAC.replace(":", "")))
        self.put(nif + L.N_ADDRESS_COUNT, len(addresses))
        for number, text in enumerate(addresses):
            at = nif + L.N_ADDRESSES + number * L.ADDRESS_BYTES
            family, hi, lo = halves(text.split("/")[0])
            for word, value in ((L.ADDRESS_FAMILY, family), (L.ADDRESS_PREFIX, int(text.split("/")[1])),
                                (L.ADDRESS_HI, hi), (L.ADDRESS_LO, lo)):
                self.put(at + word, value)
        return nif

    def area(self, size: int) -> int:
        """Zero-filled bytes between guards, aligned to 64."""
        at = self._end
        self.mem[at:at + size] = 0
        self._end = (at + size + GUARD_BYTES + 63) & ~63
        self._guards.append((at + size, self._end))
        return at

    def check_guards(self) -> None:
        for start, end in self._guards:
            assert (self.mem[start:end] == GUARD).all(), f"written outside near {start}"

    def put(self, at: int, value: int) -> None:
        self.mem[at:at + 8].view(np.int64)[0] = value

    def get(self, at: int) -> int:
        return int(self.mem[at:at + 8].view(np.int64)[0])

    def write(self, at: int, data: bytes) -> None:
        self.mem[at:at + len(data)] = np.frombuffer(data, np.uint8)

    def read(self, at: int, size: int) -> bytes:
        return bytes(self.mem[at:at + size].tobytes())

    def advance(self, seconds: float) -> None:
        for w in self.ws:
            self.put(w + L.W_MONOTONIC, self.get(w + L.W_MONOTONIC) + int(seconds * SECOND))

    def sent(self) -> list[tuple[int, bytes]]:
        """(netif queue, frame) of all that was transmitted since the last call."""
        frames, at, end = [], 8, self.get(self.log)
        while at < end:
            size = self.get(self.log + at + 8)
            frames.append((self.get(self.log + at), self.read(self.log + at + 16, size)))
            at += 16 + size
        self.put(self.log, 8)
        return frames

    def describe(self, data: bytes, link: int = L.LINK_RAW, flags: int = 0) -> int:
        """Writes the frame, and its descriptor as ip_input leaves it."""
        self.write(self.frame, data)
        self.mem[self.p:self.p + L.P_BYTES] = 0
        l3 = 14 if link == L.LINK_ETHERNET else 0
        words = {L.P_FRAME: self.frame, L.P_LENGTH: len(data), L.P_WIRE: len(data), L.P_LINK: link,
                 L.P_FLAGS: flags, L.P_VLAN: -1, L.P_L3: self.frame + l3, L.P_FRAMES: 1}
        version = data[l3] >> 4 if len(data) > l3 + 19 else 0
        if version in (4, 6) and data[12:14] != b"\x08\x06":
            words |= self._network(data[l3:], version, self.frame + l3)
        for word, value in words.items():
            self.put(self.p + word, value)
        return self.p

    @staticmethod
    def _network(packet: bytes, version: int, at: int) -> dict[int, int]:
        if version == 4:
            length, proto, l4, named = int.from_bytes(packet[2:4], "big"), packet[9], (packet[0] & 15) * 4, 0
            source, target = packet[12:16], packet[16:20]
        else:
            length, proto, l4, named = 40 + int.from_bytes(packet[4:6], "big"), packet[6], 40, 6
            source, target = packet[8:24], packet[24:40]
            while proto in (0, 43, 60):
                named, proto, l4 = l4, packet[l4], l4 + 8 * (packet[l4 + 1] + 1)
        words = {L.P_FAMILY: version, L.P_PROTO: proto, L.P_L3_LENGTH: length, L.P_L4: at + l4,
                 L.P_CLASS: at + named}
        for word, address in ((L.P_SOURCE_HI, source), (L.P_TARGET_HI, target)):
            _, words[word], words[word + 8] = halves(str(ipaddress.ip_address(address)))
        return words
