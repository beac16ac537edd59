"""TCP super-segments and checksums left to the other side, both ways: against the kernel's own TCP.

The handshake is made by hand. What counts is that the kernel takes what we left to it, and what it left to us.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import ipaddress
import random
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from dataplane.netif import af_packet, tap, tun
from dataplane.shm import layout as L
from tests.netif.rig import Frame, Rig
from tests.netns import Namespace, mac, veth

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

OURS = {4: "10.77.0.1", 6: "fd77::1"}
KERNEL = {4: "10.77.0.2", 6: "fd77::2"}
NETWORKS = ["10.77.0.1/24", "fd77::1/64"]
TOTAL = 600_000
BOTH = L.NF_TX_CHECKSUM | L.NF_TX_SEGMENT


class Peer:
    """The netif, and the kernel at the other end of its link: in `namespace`, on `device`."""

    def __init__(self, rig: Rig, namespace: Namespace, device: str) -> None:
        self.rig, self.namespace, self.device = rig, namespace, device
        self.l2 = b""
        if rig.word(L.N_LINK) == L.LINK_ETHERNET:
            own = rig.mem[rig.nifs[0] + L.N_MAC:][:6].tobytes()
            self.l2 = mac(namespace, device) + own
            for address in OURS.values():
                namespace.ip("neigh", "replace", address, "lladdr", own.hex(":"), "dev", device)


@pytest.fixture(params=["tun", "tap", "af_packet", "af_packet without TSO"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    kind = request.param
    with Namespace() as there, Namespace() as here:
        if kind in ("tun", "tap"):
            with Rig(tun if kind == "tun" else tap, there, device="dp0", addresses=NETWORKS) as rig:
                yield Peer(rig, there, "dp0")
            return
        device, ours = veth(there, here, ["10.77.0.2/24", "fd77::2/64"], [], quiet=True)
        if "without" in kind:
            _switch_off(here, ours)
        with Rig(af_packet, here, device=ours, addresses=NETWORKS) as rig:
            yield Peer(rig, there, device)


def _switch_off(namespace: Namespace, device: str) -> None:
    """The device cuts no segments and makes no checksums from now on (SIOCETHTOOL)."""
    with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in (0x1F, 0x17):        # ETHTOOL_STSO, ETHTOOL_STXCSUM
            value = array.array("I", [command, 0])
            fcntl.ioctl(sock, 0x8946, struct.pack("16sP16x", device.encode(), value.buffer_info()[0]))


class Connection:
    """Our end, by hand: every data segment in order is acknowledged."""

    def __init__(self, peer: Peer, family: int) -> None:
        self.peer, self.rig, self.family = peer, peer.rig, family
        self.frames: list[Frame] = []
        self.data = bytearray()
        self.nxt = 1000
        with peer.namespace.entered():
            self.sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
        self.sock.setblocking(False)
        self.sock.connect_ex((OURS[family], 80))
        syn = self._take(lambda tcp: tcp.flags == "S")
        self.port, self.rcv = syn.sport, syn.seq + 1
        self._put("SA", seq=self.nxt - 1, options=[("MSS", 1440), ("WScale", 7)])
        self._take(lambda tcp: tcp.flags == "A")

    def _parse(self, frame: Frame) -> Any:
        data = frame.data[len(self.peer.l2) and 14:]
        packet = IP(data) if data[0] >> 4 == 4 else IPv6(data)
        return packet.getlayer(TCP)

    def _take(self, wanted: Any) -> Any:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for frame in self.rig.receive(1, timeout=0.2):
                tcp = self._parse(frame)
                if tcp is not None and wanted(tcp):
                    return tcp
        raise TimeoutError("the kernel did not send it")

    def _frame(self, flags: str, payload: bytes = b"", partial: bool = False, **words: Any) -> bytes:
        tcp = TCP(sport=80, dport=self.port, flags=flags, ack=self.rcv, window=60000,
                  **({"seq": self.nxt} | words))
        if self.family == 4:
            packet = bytes(IP(src=OURS[4], dst=KERNEL[4], flags="DF") / tcp / payload)
        else:
            packet = bytes(IPv6(src=OURS[6], dst=KERNEL[6]) / tcp / payload)
        if partial:
            l4 = 20 if self.family == 4 else 40
            packet = packet[:l4 + 16] + struct.pack("!H", self._pseudo(len(packet) - l4)) + packet[l4 + 18:]
        kind = b"\x08\x00" if self.family == 4 else b"\x86\xdd"
        return (self.peer.l2 + kind if self.peer.l2 else b"") + packet

    def _pseudo(self, size: int) -> int:
        """The sum of the pseudo-header, not complemented."""
        words = b"".join(ipaddress.ip_address(one[self.family]).packed for one in (OURS, KERNEL))
        total = sum(struct.unpack(f"!{len(words) // 2}H", words)) + size + 6
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        return total

    def _put(self, flags: str, **words: Any) -> None:
        assert self.rig.send(self._frame(flags, **words)) == 1

    def receive(self, total: int) -> None:
        """Takes so many bytes, which the kernel sends."""
        deadline = time.monotonic() + 20
        while len(self.data) < total and time.monotonic() < deadline:
            for frame in self.rig.receive(1, timeout=0.1):
                tcp = self._parse(frame)
                payload = bytes(tcp.payload) if tcp is not None else b""
                if payload and tcp.seq == self.rcv & 0xFFFFFFFF:
                    self.frames.append(frame)
                    self.data += payload
                    self.rcv += len(payload)
                    self._put("A")

    def send(self, payload: bytes, segment: int) -> None:
        """Sends it as one super-segment, or, with `segment` 0, as a packet without a checksum."""
        l4 = len(self.peer.l2) and 14
        l4 += 20 if self.family == 4 else 40
        frame = self._frame("PA", payload, partial=True)
        assert self.rig.send(frame, offload=(l4, self.family, segment)) == 1
        self.nxt += len(payload)


@pytest.mark.parametrize("family", [4, 6])
def test_super_segments_both_ways(peer: Peer, family: int) -> None:
    rig = peer.rig
    assert rig.word(L.N_FLAGS) == BOTH
    data = random.Random(family).randbytes(TOTAL)
    connection = Connection(peer, family)
    sent = 0
    while len(connection.data) < TOTAL:
        with contextlib.suppress(BlockingIOError):
            sent += connection.sock.send(data[sent:sent + (1 << 17)]) if sent < TOTAL else 0
        before = len(connection.data)
        connection.receive(min(before + 1, TOTAL))
        assert len(connection.data) > before, "the kernel stopped sending"
    assert bytes(connection.data) == data
    assert all(frame.flags == L.PF_CHECKSUM_PARTIAL for frame in connection.frames)
    assert max(len(frame.data) for frame in connection.frames) > 10_000     # never cut

    dropped = rig.word(L.N_TX_DROPPED)
    connection.sock.settimeout(10)
    for size, segment in ((60_000, 1440), (1000, 0), (1441, 1440), (61_440, 536), (1, 0)):
        payload = random.Random(size).randbytes(size)
        connection.send(payload, segment)
        got = bytearray()
        while len(got) < size:
            got += connection.sock.recv(1 << 17)
        assert got == payload
    assert rig.word(L.N_TX_DROPPED) == dropped
    connection.sock.close()


def test_other_frames_are_as_before(peer: Peer) -> None:
    """One behind a super-segment has a header of its own."""
    connection = Connection(peer, 4)
    payload = random.Random(1).randbytes(40_000)
    connection.send(payload, 1440)
    connection._put("R", seq=connection.nxt)
    connection.sock.settimeout(10)
    got = bytearray()
    with pytest.raises(ConnectionResetError):
        while True:
            piece = connection.sock.recv(1 << 17)
            assert piece
            got += piece
    assert payload.startswith(bytes(got))
    connection.sock.close()
