"""AF_PACKET on one end of a veth pair, the kernel or a fast sender on the other."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dataplane.errors import DataplaneError
from dataplane.netif import _tpacket as T
from dataplane.netif import af_packet
from dataplane.shm import layout as L
from tests import traffic
from tests.netif.rig import Rig, Tally, drain
from tests.netns import Forked, Namespace, mac, veth
from tests.traffic import BROADCAST, ethernet, flood, packet_socket, udp4

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

OTHER = b"\x02\x11\x22\x33\x44\x55"
STAMP = 42                              # of the payload: Ethernet, IPv4, UDP
SMALL = ethernet(udp4("10.1.0.1", "10.1.0.2", (1, 2), b"\0" * 18, checksum=False), 0x0800)


class Link:
    """A veth pair: the peer sends, `here` is where the netif is opened."""

    def __init__(self, peer: Namespace, here: Namespace, names: tuple[str, str]) -> None:
        self.peer, self.here = peer, here
        self.peer_device, self.device = names

    def rig(self, queues: int = 1, **settings: Any) -> Rig:
        return Rig(af_packet, self.here, queues, device=self.device, **settings)

    def send(self, *frames: bytes) -> None:
        with self.peer.entered(), packet_socket(self.peer_device) as sock:
            for frame in frames:
                sock.send(frame)

    def flood(self, count: int, **options: Any) -> Forked:
        return self.peer.fork(flood, self.peer_device, options.pop("frames", [SMALL]), count, **options)


@pytest.fixture
def link() -> Iterator[Link]:
    traffic.warm()
    with Namespace() as peer, Namespace() as here:
        yield Link(peer, here, veth(peer, here, ["10.1.0.1/24"], ["10.1.0.2/24"]))


def drain_all(rig: Rig, sender: Forked, stamp: int = STAMP) -> np.ndarray:
    """Takes frames until the sender has ended and nothing came for a while; the state of `drain`."""
    state = np.zeros(8, np.int64)
    quiet = 0
    while quiet < 20:
        last = int(drain(rig.mem, rig.nifs[0], rig.burst, stamp, 1000, state))
        assert last >= 0
        if last == 0:
            quiet = quiet + 1 if not sender.running() else 0
            select.select([rig.word(L.N_FD)], [], [], 0.01)
    return state


# -- what arrives ------------------------------------------------------------------------------------------


def test_frames_arrive_byte_by_byte_with_their_flags(link: Link) -> None:
    packet = udp4("10.1.0.1", "10.1.0.9", (1, 2), b"hello")
    here = mac(link.here, link.device)
    frames = {
        ethernet(packet, 0x0800, here): 0,
        ethernet(packet, 0x0800, BROADCAST): L.PF_LINK_MULTICAST,
        ethernet(packet, 0x0800, b"\x01\0\x5e\0\0\1"): L.PF_LINK_MULTICAST,
        ethernet(packet, 0x0800, OTHER): L.PF_OTHERHOST,
        ethernet(b"\0" * 46, 0x88CC, here): 0,
        ethernet(b"x" * 1500, 0x0800, here): 0,
        ethernet(b"\0\0\3" + b"LLC", 6, here): 0,
    }
    before = time.time_ns()
    with link.rig(promiscuous=True) as rig:
        assert rig.netif.passive and rig.word(L.N_TX) == 0 and rig.word(L.N_FLAGS) == L.NF_PASSIVE
        assert rig.word(L.N_MTU) == 1500 and rig.mem[rig.nifs[0] + L.N_MAC:][:6].tobytes() == here
        link.send(*frames)
        received = rig.receive(len(frames))
    for (data, flags), frame in zip(frames.items(), received, strict=True):
        assert (frame.data, frame.flags, frame.wire, frame.link) == (data, flags, len(data), L.LINK_ETHERNET)
    times = [frame.time for frame in received]
    assert times == sorted(times) and before <= times[0] and times[-1] <= time.time_ns()


@pytest.mark.parametrize("tags", [
    [(0x8100, 0x0005)],
    [(0x8100, 0xEFFF)],                         # priority and drop eligibility, too
    [(0x8100, 0x0000)],                         # priority tag: no VLAN, still a tag
    [(0x88A8, 0x0007), (0x8100, 0x0009)],       # QinQ
    [(0x8100, 0x0007), (0x8100, 0x0009)],
    [(0x88A8, 1), (0x88A8, 2), (0x8100, 3)],
])
def test_vlan_tags_are_put_back(link: Link, tags: list[tuple[int, int]]) -> None:
    frame = ethernet(udp4("10.1.0.1", "10.1.0.9", (1, 2), b"tagged"), 0x0800, tags=tags)
    with link.rig() as rig:
        link.send(frame, SMALL, frame)
        # Asked for twice, the tag is there once.
        select.select([rig.word(L.N_FD)], [], [], 10)
        count = rig.rx()
        again = rig.rx()
        assert again == count > 0
        assert rig.frame(0).data == frame and rig.frame(0).wire == len(frame)
        assert [one.data for one in rig.receive(3)] == [frame, SMALL, frame]


def test_the_kernels_vlan_device(link: Link) -> None:
    try:
        link.peer.ip("link", "add", "link", link.peer_device, "name", "tagged5", "type", "vlan", "id", "5")
    except RuntimeError:
        pytest.skip("this kernel has no 802.1Q")
    link.peer.ip("addr", "add", "10.5.0.1/24", "dev", "tagged5")
    link.peer.ip("link", "set", "tagged5", "up")
    link.peer.ip("neigh", "add", "10.5.0.2", "lladdr", OTHER.hex(":"), "dev", "tagged5")
    with link.rig(promiscuous=True) as rig:
        with link.peer.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"tagged", ("10.5.0.2", 5))
        assert rig.take(b"tagged").data[12:18] == b"\x81\0\0\5\x08\0"


def test_a_local_senders_checksum_is_partial(link: Link) -> None:
    with link.rig() as rig, link.peer.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"partial", ("10.1.0.2", 5))
        frame = rig.take(b"partial")
    assert frame.flags == L.PF_CHECKSUM_PARTIAL and frame.data[:6] == mac(link.here, link.device)


def test_what_leaves_the_machine_is_outgoing(link: Link) -> None:
    with link.rig() as rig, link.here.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"outgoing", ("10.1.0.1", 5))
        assert rig.take(b"outgoing").flags & ~L.PF_CHECKSUM_PARTIAL == L.PF_OUTGOING


def test_only_promiscuous_netifs_see_others_frames(link: Link) -> None:
    # A veth has no filter of its own: what is for another station comes with a flag. So this looks at what
    # the interface was asked for.
    def promiscuity() -> int:
        words = link.here.ip("-d", "link", "show", link.device).split()
        return int(words[words.index("promiscuity") + 1])

    with link.rig():
        assert promiscuity() == 0
    with link.rig(promiscuous=True):
        assert promiscuity() == 1
    assert promiscuity() == 0


def test_loopback_gives_each_packet_once() -> None:
    with Namespace() as ns, Rig(af_packet, ns, device="lo") as rig:
        with ns.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for i in range(20):
                sock.sendto(b"lo %02d" % i, ("127.0.0.1", 9))
        frames = rig.receive(100, timeout=0.5)
    udp = [frame for frame in frames if frame.data[14 + 9] == 17]
    assert [frame.data[-5:] for frame in udp] == [b"lo %02d" % i for i in range(20)]
    assert rig.word(L.N_MTU) == 65535


def test_the_largest_packet() -> None:
    payload = os.urandom(65535 - 28)
    with Namespace() as peer, Namespace() as here:
        link = Link(peer, here, veth(peer, here, ["10.1.0.1/24"], ["10.1.0.2/24"], mtu=65535))
        with link.rig(blocks=2) as rig, here.entered(), \
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind(("10.1.0.2", 5))          # else the kernel would answer, with a part of the packet
            for _ in range(5):
                with peer.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.sendto(payload, ("10.1.0.2", 5))
                frame = rig.take(payload[:100])
                assert frame.data[42:] == payload and frame.wire == len(frame.data)
            assert rig.dropped() == 0


# -- done, blocks, losses ----------------------------------------------------------------------------------


def test_frames_that_are_not_done_come_again(link: Link) -> None:
    with link.rig() as rig:
        with link.peer.entered():
            flood(link.peer_device, [SMALL], 200, stamp=STAMP)
        expected = 0

        def numbers(count: int) -> list[int]:
            return [int.from_bytes(rig.frame(i).data[STAMP:STAMP + 8], "big") for i in range(count)]

        random = np.random.default_rng(1)
        deadline = time.monotonic() + 10
        while expected < 200 and time.monotonic() < deadline:
            count = rig.rx(int(random.integers(1, 65)))
            assert numbers(count) == list(range(expected, expected + count))
            part = int(random.integers(0, count + 1))
            rig.done(part)
            expected += part
        assert expected == 200 and rig.rx() == 0


def test_nothing_is_lost_at_the_highest_rate(link: Link) -> None:
    total = 1_000_000
    with link.rig(blocks=512) as rig:
        drain.compile()
        sender = link.flood(total, stamp=STAMP)
        state = drain_all(rig, sender)
        assert sender.result() == total
        assert rig.dropped() == 0
    received, _, missing, late, last, backwards = state[:6].tolist()
    assert (received, missing, late, backwards) == (total, 0, 0, 0)
    assert 0 <= time.time_ns() - last < 60e9


def test_what_the_kernel_drops_is_counted(link: Link) -> None:
    with link.rig(blocks=4) as rig:
        total = 0
        state = np.zeros(8, np.int64)
        for count in (20_000, 10, 5_000, 100):      # full, and usable again each time
            sender = link.flood(count)
            assert sender.result() == count
            total += count
            state += drain_all(rig, sender)
            assert state[0] + rig.dropped() == total
        assert rig.dropped() > 15_000


def test_a_block_whose_worker_died_before_giving_it_back(link: Link) -> None:
    with link.rig(blocks=4) as rig:
        words = rig.mem[rig.nifs[0]:][:L.N_BYTES].view(np.int64)
        cursor = (L.N_PRIVATE + af_packet.CURSOR) // 8
        assert link.flood(500, stamp=STAMP).result() == 500
        assert len(rig.receive(200)) == 200
        number = int(words[cursor]) >> af_packet.OFFSET_BITS
        ring = rig.word(L.N_PRIVATE + af_packet.RING)
        status = ring + (number - 1) % 4 * (1 << 17) + T.BLOCK_STATUS
        words[cursor] = (number + 1) << af_packet.OFFSET_BITS       # as `_advance` is killed after this
        assert rig.mem[status] & T.STATUS_USER
        rig.receive(500, timeout=0.2)
        assert not rig.mem[status] & T.STATUS_USER
        sender = link.flood(5_000, stamp=STAMP)
        state = drain_all(rig, sender)
        assert state[0] + rig.dropped() == 5_000


def test_a_replacement_goes_on_where_the_dead_one_was(link: Link) -> None:
    total = 1_000_000
    with link.rig(blocks=512) as rig:
        tally = Tally(rig, STAMP, total)
        sender = link.flood(total, stamp=STAMP)
        kills = 0
        while tally.seen() < total * 0.9 and kills < 200:
            worker = link.here.fork(tally.run)
            tally.wait(40_000)
            worker.kill()
            kills += 1
        tally.run_to_end(sender)
        assert sender.result() == total and kills > 5
        # On a busy machine nobody may be here for so long that the ring is full: the kernel says how many that cost.
        assert (tally.counts == 0).sum() == rig.dropped() < total / 10
        # What it had in hand and had not said to be done comes again.
        assert (tally.counts > 1).sum() <= kills * L.BURST and tally.counts.max() <= 1 + kills


# -- several queues ----------------------------------------------------------------------------------------


def test_flows_stay_in_their_queue_in_both_directions(link: Link) -> None:
    with link.rig(queues=2) as rig:
        there = [ethernet(udp4("10.1.0.1", "10.1.0.9", (1000 + i, 53), struct.pack("!H", i)), 0x0800)
                 for i in range(200)]
        back = [ethernet(udp4("10.1.0.9", "10.1.0.1", (53, 1000 + i), struct.pack("!H", i)), 0x0800)
                for i in range(200)]
        link.send(*there, *back, *there)
        frames = rig.receive(600)
        assert len(frames) == 600 and rig.receive(1, timeout=0.1) == []
    queues = defaultdict(set)
    for frame in frames:
        queues[frame.data[-2:]].add(frame.queue)
    assert len(queues) == 200 and all(len(where) == 1 for where in queues.values())
    counts = [sum(where == {queue} for where in queues.values()) for queue in (0, 1)]
    assert min(counts) > 50


def test_fragments_are_put_together_before_they_are_spread(link: Link) -> None:
    payload = os.urandom(5000)
    with link.rig(queues=2) as rig:
        with link.peer.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(payload, ("10.1.0.2", 5))
        assert rig.take(payload).data[42:] == payload


def seen_while_opening(link: Link, total: int) -> list[int]:
    """Numbers of the frames that came of a flood of `total` during which four queues were opened."""
    frames = [ethernet(udp4("10.1.0.1", "10.1.0.9", (1000 + i, 53), bytes(18), checksum=False), 0x0800)
              for i in range(64)]
    sender = link.flood(total, frames=frames, stamp=STAMP)
    numbers = []
    with link.rig(queues=4) as rig:
        while True:
            found = rig.receive(64, timeout=0.2)
            numbers += [int.from_bytes(frame.data[STAMP:STAMP + 8], "big") for frame in found]
            if not found and not sender.running():
                break
    assert sender.result() == total
    return numbers


def test_no_frame_comes_twice_while_the_queues_are_opened(link: Link) -> None:
    for doubled in range(6):        # the flood has to last longer than the opening
        numbers = seen_while_opening(link, 300_000 << doubled)
        assert len(numbers) == len(set(numbers))
        if numbers:
            return
    raise AssertionError("no flood lasted until the queues were open")


# -- transmission, the interface's fate, errors ------------------------------------------------------------


def test_what_we_send_arrives(link: Link) -> None:
    with link.rig(addresses=["10.1.0.9/24"]) as rig, link.peer.entered():
        assert not rig.netif.passive and rig.word(L.N_FLAGS) == L.NF_TX_CHECKSUM | L.NF_TX_SEGMENT
        with packet_socket(link.peer_device, receive=True) as raw, \
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            raw.settimeout(10)
            sock.settimeout(10)
            sock.bind(("10.1.0.1", 7))
            frames = [ethernet(udp4("10.1.0.9", "10.1.0.1", (9, 7), b"data %d" % i), 0x0800,
                               mac(link.peer, link.peer_device)) for i in range(64)]
            assert rig.send(*frames) == 64
            assert [raw.recv(2048) for _ in frames] == frames
            assert [sock.recv(2048) for _ in frames] == [b"data %d" % i for i in range(64)]
        assert rig.word(L.N_TX_PACKETS) == 64
        assert rig.word(L.N_TX_BYTES) == sum(map(len, frames))
        assert rig.send(b"x" * 3000) == 1           # more than the interface takes
        assert rig.word(L.N_TX_DROPPED) == 1
        assert rig.receive(1, timeout=0.1) == []    # what we send does not come back


def test_an_endpoint_hears_all_groups_and_not_its_own_machine(link: Link) -> None:
    with link.rig(addresses=["10.1.0.9/24", "fd01::9/64"]) as rig:
        assert "allmulti 1" in link.here.ip("-d", "link", "show", link.device)
        with link.here.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"outgoing", ("10.1.0.1", 5))
        group = ethernet(b"x" * 50, 0x86DD, b"\x33\x33\xff\0\0\x09")
        link.send(group)
        frames = rig.receive(10, timeout=0.3)
        assert group in [frame.data for frame in frames]
        assert not any(frame.flags & L.PF_OUTGOING for frame in frames)


def test_down_and_up_again(link: Link) -> None:
    with link.rig(addresses=["10.1.0.9/24"]) as rig:
        link.send(SMALL)
        assert rig.receive(1)[0].data == SMALL
        link.here.ip("link", "set", link.device, "down")
        assert rig.rx() == 0
        rig.send(SMALL)
        assert rig.word(L.N_TX_DROPPED) == 1
        rig.netif.poll_counters()                   # takes the error off the socket: it can be slept on
        assert select.select([rig.word(L.N_FD)], [], [], 0) == ([], [], [])
        assert rig.rx() == 0 and rig.netif.error(0) is None
        link.here.ip("link", "set", link.device, "up")
        link.send(SMALL)
        assert rig.receive(1)[0].data == SMALL


def test_a_removed_interface_ends_it_after_its_last_frame(link: Link) -> None:
    with link.rig(queues=2) as rig:
        link.send(SMALL)
        select.select([rig.word(L.N_FD, queue) for queue in (0, 1)], [], [], 10)
        link.here.ip("link", "del", link.device)
        rig.netif.poll_counters()
        results = [rig.rx(queue=queue) for queue in (0, 1)]
        assert sorted(results) == [L.NIF_FAILED, 1]
        queue = results.index(1)
        rig.done(1, queue)
        assert rig.rx(queue=queue) == L.NIF_FAILED
        assert rig.netif.error(queue) == f"af_packet {link.device}: the interface was removed"
        rig.netif.poll_counters()


def test_close_gives_everything_back(link: Link) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with link.rig(queues=2, promiscuous=True) as rig:
            pass
    assert len(os.listdir("/proc/self/fd")) == before
    assert rig.arena.map_anonymous(1 << 20)


def test_what_cannot_be_opened_leaves_nothing(link: Link) -> None:
    def refused(**settings: Any) -> str:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(DataplaneError) as caught:
            Rig(af_packet, link.here, **{"device": link.device, **settings})
        assert len(os.listdir("/proc/self/fd")) == before
        return str(caught.value)

    assert refused(device="dpt-none") == "af_packet dpt-none: there is no such interface"
    assert refused(addresses=["10.1.0.2/24"]) == (
        f"af_packet {link.device}: address 10.1.0.2/24 is already taken by interface {link.device}")
    assert "cannot make a ring of 2 blocks of 131073 bytes" in refused(block_bytes=131073, blocks=2)
    with link.here.entered(), open("/dev/net/tun", "rb", buffering=0) as tun:
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"raw0", 0x1001))
        assert refused(device="raw0") == "af_packet raw0: not an Ethernet interface (its link type is 65534)"


def test_without_the_capability(link: Link) -> None:
    def attempt() -> str:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(DataplaneError) as caught:
            Rig(af_packet, None, device=link.device)
        return str(caught.value)

    assert "capability CAP_NET_RAW" in link.here.call(attempt)
