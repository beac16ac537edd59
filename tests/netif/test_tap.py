"""TAP against the kernel at its other end. What it shares with TUN is tested there."""

from __future__ import annotations

import socket
import struct
from collections import defaultdict
from collections.abc import Iterator

import pytest

from dataplane.errors import DataplaneError
from dataplane.netif import tap
from dataplane.netif._tuntap import own_mac
from dataplane.shm import layout as L
from tests.netif.rig import Rig
from tests.netns import Namespace, mac
from tests.traffic import BROADCAST, ethernet, packet_socket, udp4

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

ADDRESSES = ["10.77.0.1/24", "fd77::1/64"]
OTHER = b"\x02\x11\x22\x33\x44\x55"


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with Namespace() as namespace:
        namespace.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6"])
        yield namespace


@pytest.fixture
def rig(ns: Namespace) -> Iterator[Rig]:
    with Rig(tap, ns, device="tp0", addresses=["10.77.0.1/24"]) as rig:
        yield rig


def our_mac(rig: Rig) -> bytes:
    return rig.mem[rig.nifs[0] + L.N_MAC:][:6].tobytes()


def neighbour(rig: Rig, ns: Namespace) -> None:
    """Tells the kernel our link-layer address: nothing answers ARP here."""
    ns.ip("neigh", "add", "10.77.0.1", "lladdr", our_mac(rig).hex(":"), "dev", "tp0")


def test_our_address_is_our_own(rig: Rig, ns: Namespace) -> None:
    assert our_mac(rig) != mac(ns, "tp0")
    assert our_mac(rig)[0] & 3 == 2             # locally administered, one station's
    assert our_mac(rig) == own_mac("tp0") != own_mac("tp1")
    assert (rig.word(L.N_LINK), rig.word(L.N_MTU)) == (L.LINK_ETHERNET, 1500)


def test_frames_arrive_byte_by_byte_with_their_flags(rig: Rig, ns: Namespace) -> None:
    packet = udp4("10.77.0.2", "10.77.0.1", (1, 2), b"hello")
    frames = {
        ethernet(packet, 0x0800, our_mac(rig)): 0,
        ethernet(packet, 0x0800, BROADCAST): L.PF_LINK_MULTICAST,
        ethernet(packet, 0x0800, b"\x01\0\x5e\0\0\1"): L.PF_LINK_MULTICAST,
        ethernet(packet, 0x0800, OTHER): L.PF_OTHERHOST,
        ethernet(packet, 0x0800, our_mac(rig)[:5] + bytes([our_mac(rig)[5] ^ 1])): L.PF_OTHERHOST,
        ethernet(packet, 0x0800, our_mac(rig), tags=[(0x8100, 0x6005)]): 0,
        ethernet(packet, 0x0800, our_mac(rig), tags=[(0x88A8, 7), (0x8100, 5)]): 0,
        ethernet(b"\0" * 46, 0x88CC, our_mac(rig)): 0,
    }
    with ns.entered(), packet_socket("tp0") as sock:
        for frame in frames:
            sock.send(frame)
    for (data, flags), frame in zip(frames.items(), rig.receive(len(frames)), strict=True):
        assert (frame.data, frame.flags, frame.link) == (data, flags, L.LINK_ETHERNET)


def test_the_kernel_asks_for_our_address_and_sends(rig: Rig, ns: Namespace) -> None:
    with ns.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"anyone?", ("10.77.0.1", 9))
        [request] = rig.receive(1)
        assert request.data[:6] == BROADCAST and request.data[12:14] == b"\x08\x06"
        assert request.flags == L.PF_LINK_MULTICAST
        sender = request.data[22:32]            # RFC 826: hardware and protocol address
        reply = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + our_mac(rig) + bytes([10, 77, 0, 1]) + sender
        rig.send(ethernet(reply, 0x0806, sender[:6], our_mac(rig)))
        frame = rig.take(b"anyone?")
    assert frame.data[:6] == our_mac(rig)
    assert frame.flags == L.PF_CHECKSUM_PARTIAL


def test_what_we_send_arrives(rig: Rig, ns: Namespace) -> None:
    with ns.entered(), packet_socket("tp0", receive=True) as raw:
        raw.settimeout(10)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("10.77.0.2", 7))
            sock.settimeout(10)
            frames = [ethernet(udp4("10.77.0.1", "10.77.0.2", (9, 7), b"data %d" % i), 0x0800, mac(ns, "tp0"),
                               our_mac(rig)) for i in range(10)]
            rig.send(*frames)
            assert [raw.recv(2048) for _ in frames] == frames
            assert [sock.recv(2048) for _ in frames] == [b"data %d" % i for i in range(10)]


def test_the_largest_frame_with_two_tags(ns: Namespace) -> None:
    payload = bytes(range(256)) * 255           # what fits: 65,521 bytes
    with Rig(tap, ns, device="tp0", addresses=["10.77.0.1/24"], mtu=65521) as rig:
        packet = udp4("10.77.0.2", "10.77.0.1", (1, 2), payload)
        for tags in ([], [(0x8100, 5)]):
            frame = ethernet(packet, 0x0800, our_mac(rig), tags=tags)
            with ns.entered(), packet_socket("tp0") as sock:
                sock.send(frame)
            assert rig.receive(1)[0].data == frame


def test_queues_keep_flows_together(ns: Namespace) -> None:
    with Rig(tap, ns, queues=2, device="tp0", addresses=["10.77.0.1/24"]) as rig:
        neighbour(rig, ns)
        queues = defaultdict(set)
        with ns.entered():
            socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(64)]
        for sock in socks:
            sock.bind(("10.77.0.2", 0))
            for size in (10, 20, 3000):         # the last one in fragments, which have no ports
                sock.sendto(struct.pack("!H", sock.fileno()) * (size // 2), ("10.77.0.1", 5))
        fragments = set()
        for frame in rig.receive(64 * 5):
            if frame.data[20] & 0x3F or frame.data[21]:
                fragments.add(frame.queue)
            else:
                queues[frame.data[-2:]].add(frame.queue)
        for sock in socks:
            sock.close()
        assert len(queues) == 64 and all(len(where) == 1 for where in queues.values())
        assert {queue for where in queues.values() for queue in where} == {0, 1}
        assert len(fragments) == 1


def test_passive(ns: Namespace) -> None:
    with Rig(tap, ns, device="tp0") as rig:
        assert rig.netif.passive and rig.word(L.N_TX) == 0 and rig.word(L.N_FLAGS) == L.NF_PASSIVE
        with ns.entered(), packet_socket("tp0") as sock:
            sock.send(ethernet(b"x" * 50, 0x0800))
        assert rig.receive(1)[0].data.endswith(b"x" * 50)


def test_ipv6_is_usable_at_once() -> None:
    with Namespace() as ns, Rig(tap, ns, device="tp0", addresses=ADDRESSES) as rig:
        assert "tentative" not in ns.ip("addr", "show", "tp0")
        with ns.entered(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("fd77::2", 0))
            sock.sendto(b"x", ("fd77::1", 5))
        solicitation = rig.take(b"\x87\0")      # RFC 4861, 4.3, to our solicited-node group
        assert solicitation.flags & L.PF_LINK_MULTICAST


def test_the_name_is_taken(ns: Namespace) -> None:
    with Rig(tap, ns, device="tp0"), pytest.raises(DataplaneError, match=r"tap tp0: .* exists already"):
        Rig(tap, ns, device="tp0")
    assert "tp0" not in ns.ip("link")
