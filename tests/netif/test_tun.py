"""TUN against the kernel at its other end."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest

from dataplane.errors import DataplaneError
from dataplane.netif import _steering, tun
from dataplane.shm import layout as L
from tests import traffic
from tests.netif.rig import Rig, Tally
from tests.netns import Namespace
from tests.traffic import syn, udp4

pytestmark = [pytest.mark.root, pytest.mark.live, pytest.mark.needs("ip")]

ADDRESSES = ["10.77.0.1/24", "fd77::1/64"]


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """A namespace in which IPv6 is silent: nothing but the test's packets passes."""
    with Namespace() as namespace:
        namespace.run(["sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/router_solicitations"])
        namespace.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/addr_gen_mode"])
        yield namespace


@pytest.fixture
def rig(ns: Namespace) -> Iterator[Rig]:
    with Rig(tun, ns, device="dp0", addresses=ADDRESSES) as rig:
        yield rig


def udp_socket(ns: Namespace, address: str, port: int = 0) -> socket.socket:
    with ns.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.bind((address, port))
    return sock


def test_what_the_queue_says(rig: Rig, ns: Namespace) -> None:
    assert (rig.word(L.N_LINK), rig.word(L.N_MTU), rig.word(L.N_FLAGS)) == (
        L.LINK_RAW, 1500, L.NF_TX_CHECKSUM | L.NF_TX_SEGMENT)
    assert rig.netif.addresses == ADDRESSES and not rig.netif.passive
    shown = ns.ip("addr", "show", "dp0")
    assert "10.77.0.2/24" in shown and "fd77::2/64" in shown and "tentative" not in shown and "UP" in shown


def test_a_packet_arrives_byte_by_byte(rig: Rig, ns: Namespace) -> None:
    packet = udp4("10.77.0.2", "10.77.0.1", (1000, 2000), bytes(range(256)))
    packet = bytearray(packet)
    packet[4:6] = b"\x12\x34"               # the kernel replaces an identification of zero
    packet[10:12] = struct.pack("!H", (struct.unpack("!H", packet[10:12])[0] - 0x1234 - 1) % 0xFFFF + 1)
    before = time.time_ns()
    with ns.entered(), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.sendto(bytes(packet), ("10.77.0.1", 0))
    [frame] = rig.receive(1)
    assert frame.data[:10] + frame.data[12:] == bytes(packet[:10] + packet[12:])
    assert (frame.wire, frame.link, frame.flags) == (len(packet), L.LINK_RAW, 0)
    assert before <= frame.time <= time.time_ns()


@pytest.mark.parametrize(("host", "ours"), [("10.77.0.2", "10.77.0.1"), ("fd77::2", "fd77::1")])
def test_a_local_senders_checksum_is_partial(rig: Rig, ns: Namespace, host: str, ours: str) -> None:
    with udp_socket(ns, host) as sock:      # binding works at once: no duplicate address detection
        sock.sendto(b"hello, dataplane", (ours, 5353))
    frame = rig.take(b"hello, dataplane")
    assert frame.flags == L.PF_CHECKSUM_PARTIAL
    assert frame.data.endswith(b"hello, dataplane")


def test_what_we_send_arrives(rig: Rig, ns: Namespace) -> None:
    with udp_socket(ns, "10.77.0.2", 7) as sock:
        packets = [udp4("10.77.0.1", "10.77.0.2", (9, 7), bytes([i]) * (i + 1)) for i in range(64)]
        assert rig.send(*packets) == 64
        for i in range(64):
            assert sock.recvfrom(2048) == (bytes([i]) * (i + 1), ("10.77.0.1", 9))
    assert rig.word(L.N_TX_PACKETS) == 64 and rig.word(L.N_TX_DROPPED) == 0
    assert rig.word(L.N_TX_BYTES) == sum(map(len, packets))


def test_the_kernel_checks_our_checksums(rig: Rig, ns: Namespace) -> None:
    good = udp4("10.77.0.1", "10.77.0.2", (9, 7), b"good")
    with udp_socket(ns, "10.77.0.2", 7) as sock:
        rig.send(good[:-1] + b"!", good)
        assert sock.recv(100) == b"good"


def test_a_packet_that_is_none_is_dropped_and_counted(rig: Rig) -> None:
    assert rig.send(b"\xf0" * 40, b"", udp4("10.77.0.1", "10.77.0.2", (9, 7), b"")) == 3
    assert (rig.word(L.N_TX_PACKETS), rig.word(L.N_TX_DROPPED)) == (1, 2)


def test_the_largest_packets_both_ways(ns: Namespace) -> None:
    payload = os.urandom(65535 - 28)
    with Rig(tun, ns, device="dp0", addresses=["10.77.0.1/24"], mtu=65535) as rig, \
            udp_socket(ns, "10.77.0.2", 7) as sock:
        for _ in range(3):
            sock.sendto(payload, ("10.77.0.1", 8))
        frames = rig.receive(3)
        assert [frame.data[28:] for frame in frames] == [payload] * 3
        rig.send(udp4("10.77.0.1", "10.77.0.2", (8, 7), payload))
        assert sock.recv(1 << 17) == payload


def test_frames_that_are_not_done_come_again(rig: Rig, ns: Namespace) -> None:
    with udp_socket(ns, "10.77.0.2") as sock:
        for i in range(10):
            sock.sendto(bytes([i]) * (i * 20), ("10.77.0.1", 1))

    def numbers(count: int) -> list[int]:
        return [len(rig.frame(i).data[28:]) // 20 for i in range(count)]

    assert numbers(rig.rx(8)) == list(range(8))
    rig.done(0)
    assert numbers(rig.rx(4)) == [0, 1, 2, 3]
    rig.done(3)
    assert numbers(rig.rx()) == [3, 4, 5, 6, 7]     # what is in the buffer, before more is read
    rig.done(5)
    assert numbers(rig.rx()) == [8, 9]
    rig.done(2)
    assert rig.rx() == 0


def test_a_flow_stays_in_its_queue_in_order_though_we_answer_from_another(ns: Namespace) -> None:
    with Rig(tun, ns, queues=2, device="dp0", addresses=ADDRESSES) as rig:
        socks = [udp_socket(ns, "10.77.0.2") for _ in range(64)]
        socks += [udp_socket(ns, "fd77::2") for _ in range(64)]
        queues = defaultdict(set)
        for round_ in range(4):
            for i, sock in enumerate(socks):
                target = "fd77::1" if i >= 64 else "10.77.0.1"
                sock.sendto(struct.pack("!HH", i, round_), (target, 5000))
            last: dict[int, int] = {}
            for frame in rig.receive(len(socks)):
                i, number = struct.unpack("!HH", frame.data[-4:])
                assert number == round_ and i > last.get(frame.queue, -1)
                last[frame.queue] = i
                queues[i].add(frame.queue)
            answers = [udp4("10.77.0.1", "10.77.0.2", (5000, sock.getsockname()[1]), b"x") for sock in socks[:64]]
            rig.send(*answers, queue=0)
        for sock in socks:
            sock.close()
    assert len(queues) == 128
    assert all(len(where) == 1 for where in queues.values())
    for family in (range(64), range(64, 128)):
        assert {queue for i in family for queue in queues[i]} == {0, 1}


def syns(count: int, target: str = "10.77.0.1") -> list[bytes]:
    """SYNs of so many peers."""
    return [syn(6 if ":" in target else 4, "fd77::2" if ":" in target else "10.77.0.2", target, (1024 + i, 80), i)
            for i in range(count)]


def test_a_flood_of_syns_fills_no_queue_but_its_own(rig: Rig, ns: Namespace) -> None:
    def flood() -> None:
        with traffic.packet_socket("dp0") as sock:
            for frame in syns(200) * 100:
                sock.send(frame)

    ns.call(flood)
    lost = rig.dropped()
    assert 20_000 - 2 * 4096 <= lost < 20_000 - 4096        # the queue of those whose turn it is not is full
    with udp_socket(ns, "10.77.0.2") as sock:
        for _ in range(4000):
            sock.sendto(b"all of these", ("10.77.0.1", 1))
        assert rig.dropped() == lost
        taken, found = 0, 0
        while found < 4000:
            count = rig.rx()
            found += sum(rig.frame(i).data.endswith(b"all of these") for i in range(count))
            taken += count
            rig.done(count)
    assert taken <= 4000 * 4 // 3 + L.BURST                 # SYNs take a quarter of each burst
    left = 20_000 - lost - (taken - 4000)
    assert len(rig.receive(left)) == left


def test_each_peer_has_its_turn(rig: Rig, ns: Namespace) -> None:
    """The first queue of SYNs is that of a quarter of all peers, and of all peers within four turns of 2^30 ns."""
    urgent = rig.word(L.N_FDS_SYN)
    frames = syns(256) + syns(256, "fd77::1")
    had: set[bytes] = set()
    start = time.monotonic()
    for turn in range(5):
        ns.call(traffic.flood, "dp0", frames, len(frames))
        now = set()
        while select.select([urgent], [], [], 0)[0]:
            now.add(os.read(urgent, 2048))
        assert 60 < len(now) < 200
        had |= now
        rig.receive(len(frames), timeout=0.05)
        time.sleep(max(0, start + (turn + 1) * 1.074 - time.monotonic()))
    assert len(had) == len(frames)


def test_syns_are_read_also_where_bpf_is_not_permitted(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_steering, "attach", lambda *_, **__: False)
    before = len(os.listdir("/proc/self/fd"))
    with Rig(tun, ns, queues=2, device="dp0", addresses=ADDRESSES) as rig:
        assert rig.word(L.N_FDS_SYN) == rig.word(L.N_FDS_SYN + 8) == -1
        ns.call(traffic.flood, "dp0", syns(100), 100)
        assert len(rig.receive(100)) == 100
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_the_kernel_drops_is_counted(rig: Rig, ns: Namespace) -> None:
    with udp_socket(ns, "10.77.0.2") as sock:
        for _ in range(6000):
            sock.sendto(b"x", ("10.77.0.1", 1))
        dropped = rig.dropped()
        assert dropped > 0
        assert len(rig.receive(6000 - dropped)) == 6000 - dropped
        assert rig.receive(1, timeout=0.2) == []
        sock.sendto(b"again", ("10.77.0.1", 1))
        assert rig.receive(1)[0].data.endswith(b"again")
    assert rig.dropped() == dropped


def test_down_and_up_again(rig: Rig, ns: Namespace) -> None:
    ns.ip("link", "set", "dp0", "down")
    assert rig.rx() == 0
    rig.send(udp4("10.77.0.1", "10.77.0.2", (8, 7), b"lost"))
    assert rig.word(L.N_TX_DROPPED) == 1
    ns.ip("link", "set", "dp0", "up")
    with udp_socket(ns, "10.77.0.2") as sock:
        sock.sendto(b"there again", ("10.77.0.1", 1))
        rig.take(b"there again")


def test_a_removed_interface_ends_it(rig: Rig, ns: Namespace) -> None:
    assert rig.netif.error(0) is None
    ns.ip("link", "del", "dp0")
    assert rig.rx() == L.NIF_FAILED
    assert rig.netif.error(0) == "tun dp0: the interface was removed"
    rig.netif.poll_counters()


def test_a_replacement_goes_on_where_the_dead_one_was(rig: Rig, ns: Namespace) -> None:
    total = 300_000
    tally = Tally(rig, 28, total)

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("10.77.0.1", 1))
            for i in range(total):
                # As many outstanding as the kernel keeps for us: what is missing was not dropped by it.
                while i - tally.seen() > 2000:
                    os.sched_yield()
                sock.send(struct.pack("!Q", i))

    sender = ns.fork(send)
    kills = 0
    while tally.seen() < total * 0.9:
        worker = ns.fork(tally.run)
        tally.wait(20_000)
        worker.kill()
        kills += 1
    tally.run_to_end(sender)
    sender.result()
    assert kills > 5 and rig.dropped() == 0
    # A worker that dies between read(2) and the word that says so takes one burst along.
    assert (tally.counts == 0).sum() <= kills * L.BURST
    assert (tally.counts > 1).sum() <= kills * L.BURST


def test_close_removes_everything(ns: Namespace) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Rig(tun, ns, queues=2, device="dp0", addresses=ADDRESSES) as rig:
        pass
    assert "dp0" not in ns.ip("link")
    assert len(os.listdir("/proc/self/fd")) == before
    rig.arena.map_anonymous(1 << 20)


def test_host_addresses_and_routes(ns: Namespace) -> None:
    with Rig(tun, ns, device="dp0", addresses=["10.77.0.1/32", "fd77::1/128"],
             host_addresses=["192.168.9.1/24", "fd99::1/64"]) as rig:
        assert "192.168.9.1/24" in ns.ip("addr", "show", "dp0")
        with udp_socket(ns, "192.168.9.1") as sock:
            sock.sendto(b"routed", ("10.77.0.1", 1))
        rig.take(b"routed")
        with udp_socket(ns, "fd99::1") as sock:
            sock.sendto(b"six", ("fd77::1", 1))
        rig.take(b"six")


def test_passive(ns: Namespace) -> None:
    with Rig(tun, ns, device="dp0", host_addresses=["10.77.0.2/24"]) as rig:
        assert rig.netif.passive and rig.word(L.N_TX) == 0 and rig.word(L.N_FLAGS) == L.NF_PASSIVE
        with udp_socket(ns, "10.77.0.2") as sock:
            sock.sendto(b"seen", ("10.77.0.77", 1))
        rig.take(b"seen")


def test_what_cannot_be_opened_leaves_nothing(ns: Namespace) -> None:
    ns.ip("link", "add", "there", "type", "veth", "peer", "name", "else")
    ns.ip("addr", "add", "10.9.0.1/24", "dev", "there")

    def refused(queues: int = 1, **settings: object) -> str:
        fds = len(os.listdir("/proc/self/fd"))
        with pytest.raises(DataplaneError) as caught:
            Rig(tun, ns, queues, **settings)
        assert len(os.listdir("/proc/self/fd")) == fds
        assert "dp0" not in ns.ip("link")
        return str(caught.value)

    assert refused(device="there") == "tun there: an interface of this name exists already"
    assert refused(device="dp0", addresses=["10.9.0.1/24"]) == (
        "tun dp0: address 10.9.0.1/24 is already taken by interface there")
    assert "so many queues" in refused(queues=300, device="dp0")


def test_without_the_capability(ns: Namespace) -> None:
    def attempt() -> str:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(DataplaneError) as caught:
            Rig(tun, None, device="dp0")
        return str(caught.value)

    assert "capability CAP_NET_ADMIN" in ns.call(attempt)
