"""The `synthetic` netif by itself."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP

from dataplane import netif
from dataplane.config import load
from dataplane.errors import ConfigError
from dataplane.netif import synthetic
from dataplane.shm import layout as L
from tests.netif.rig import Frame, Rig
from tests.netif.test_pcap import Here


def opened(queues: int = 1, **settings: Any) -> Rig:
    return Rig(synthetic, Here(), queues, **settings)


def take(rig: Rig, count: int, queue: int = 0) -> list[Frame]:
    """Up to `count` frames of a queue, fewer if it ends."""
    frames: list[Frame] = []
    while len(frames) < count and (given := rig.rx(min(L.BURST, count - len(frames)), queue)) >= 0:
        frames += [rig.frame(i, queue) for i in range(given)]
        rig.done(given, queue)
    return frames


def flow_number(frame: Frame) -> int:
    return int.from_bytes(frame.data[28:32], "big")


@pytest.mark.parametrize("size", [36, 37, 60, 61, 1500, 65535])
def test_frames_are_valid(size: int) -> None:
    with opened(flows=40, size=size, local_ports=[700, 706], seed=9) as rig:
        for number, frame in enumerate(take(rig, 40)):
            packet = IP(frame.data)
            told = packet.chksum, packet[UDP].chksum
            del packet.chksum, packet[UDP].chksum
            made = IP(bytes(packet))
            assert told == (made.chksum, made[UDP].chksum)
            assert len(frame.data) == frame.wire == made.len == size and made[UDP].len == size - 20
            assert (frame.link, frame.flags, made.dst) == (L.LINK_RAW, 0, "198.18.0.1")
            assert made.src.startswith("10.") and made[UDP].sport >= 1024 and 700 <= made[UDP].dport <= 706
            assert flow_number(frame) == number
            assert frame.data[32:] == synthetic.pattern(size, 9)


def test_a_checksum_of_zero_is_sent_as_all_ones() -> None:
    """RFC 768: zero says that there is none."""
    one = synthetic.Settings(flows=200_000, size=36)
    frames = synthetic.frames(one, np.arange(200_000), 36)
    assert not (frames[:, 26:28] == 0).all(axis=1).any()
    ones = frames[(frames[:, 26:28] == 255).all(axis=1)]
    assert len(ones)
    words = ones.view(">u2").astype(np.int64)
    total = words[:, 6:].sum(axis=1) + 17 + 16
    assert ((total % 0xFFFF) == 0).all()


def test_flows_are_distinct_and_ports_equally_used() -> None:
    flows = 50_000
    with opened(flows=flows, local_ports=[5000, 5063]) as rig:
        heads = [frame.data[12:24] for frame in take(rig, flows)]
    assert len({head[:4] for head in heads}) == flows
    used = Counter(int.from_bytes(head[10:12], "big") for head in heads)
    assert sorted(used) == list(range(5000, 5064)) and max(used.values()) - min(used.values()) <= 1


def test_the_seed_decides() -> None:
    def first(seed: int) -> list[bytes]:
        with opened(flows=8, seed=seed) as rig:
            return [frame.data for frame in take(rig, 8)]

    assert first(1) == first(1) and first(1) != first(2)


@pytest.mark.parametrize("queues", [1, 2, 3])
def test_flows_take_turns_in_their_queue(queues: int) -> None:
    with opened(queues, flows=10) as rig, opened(flows=10) as alone:
        every = {flow_number(frame): frame.data for frame in take(alone, 10)}
        for queue in range(queues):
            mine = list(range(queue, 10, queues))
            frames = take(rig, 100, queue)
            assert [flow_number(frame) for frame in frames] == (mine * 100)[:100]
            assert all(frame.data == every[flow_number(frame)] for frame in frames)
    # A port's flows are not all in one queue.
    with opened(2, flows=64, local_ports=[1, 8]) as rig:
        ports = [{frame.data[22:24] for frame in take(rig, 32, queue)} for queue in (0, 1)]
        assert ports[0] == ports[1] and len(ports[0]) == 8


@pytest.mark.parametrize("flows", [1, 5, 11, 12, 100])
def test_imix(flows: int) -> None:
    with opened(flows=flows, size="imix") as rig:
        frames = take(rig, 12 * flows)
        assert rig.netif.mtu == 1500
    assert Counter(len(frame.data) for frame in frames) == {40: 7 * flows, 576: 4 * flows, 1500: flows}
    for number in range(flows):
        sizes = Counter(len(frame.data) for frame in frames if flow_number(frame) == number)
        assert sizes == {40: 7, 576: 4, 1500: 1}
    assert all(IP(frame.data).len == len(frame.data) for frame in frames)


@pytest.mark.parametrize(("queues", "flows", "count"), [(1, 4, 1000), (3, 1024, 1000), (3, 2, 7), (2, 2, 1)])
def test_count_is_exact_over_all_queues(queues: int, flows: int, count: int) -> None:
    with opened(queues, flows=flows, count=count) as rig:
        frames = [take(rig, 10**6, queue) for queue in range(queues)]
        assert sum(map(len, frames)) == count
        assert {rig.rx(queue=queue) for queue in range(queues)} == {L.NIF_ENDED}
        assert max(map(len, frames[:flows])) - min(map(len, frames[:flows])) <= 1


@given(st.integers(1, 9), st.sampled_from(["imix", 60]), st.integers(0, 2**32))
@settings(max_examples=20)
def test_what_is_not_done_comes_again(flows: int, size: object, seed: int) -> None:
    rng = random.Random(seed)
    with opened(flows=flows, size=size) as straight, opened(flows=flows, size=size, count=500) as rig:
        got: list[bytes] = []
        while (given := rig.rx(rng.randint(1, L.BURST))) > 0:
            taken = rng.randint(0, given)
            got += [rig.frame(i).data for i in range(taken)]
            rig.done(taken)
        assert given == L.NIF_ENDED and got == [frame.data for frame in take(straight, 500)]


def test_a_rate_counts_all_queues() -> None:
    """Frame i of all is due at i / rate; the start is moved instead of waiting."""
    with opened(2, flows=6, rate=0.01) as rig:
        place = rig.nifs[0] + L.N_PRIVATE + synthetic.S_START
        word = rig.mem[place:place + 8].view(np.int64)
        assert rig.rx(queue=1) == 0     # frame 1 is the first one of this queue
        begun = int(word[0])
        assert rig.word(L.N_NEXT, 1) == begun + 100 * 10**9
        for index in range(20):
            word[0] = begun - index * 100 * 10**9
            given = [rig.rx(queue=queue) for queue in (0, 1)]
            assert given[index % 2] == 1 and given[1 - index % 2] == 0
            rig.done(1, index % 2)
            assert rig.word(L.N_NEXT, 1 - index % 2) == int(word[0]) + (index + 1) * 100 * 10**9


def test_times_are_now() -> None:
    with opened() as rig:
        first, *rest = take(rig, 3 * L.BURST)
        assert len({first.time, *(frame.time for frame in rest)}) <= 3
        assert first.time > 1_600_000_000 * 10**9


def test_words() -> None:
    with opened(backpressure=True, start=2) as rig:
        assert rig.word(L.N_FLAGS) == L.NF_PASSIVE | L.NF_BACKPRESSURE
        assert (rig.word(L.N_START), rig.word(L.N_FD), rig.word(L.N_TX)) == (2, -1, 0)
        assert rig.netif.error(0) is None
        rig.netif.poll_counters()
    with opened() as rig:
        assert rig.word(L.N_FLAGS) == L.NF_PASSIVE


def test_a_million_flows() -> None:
    with opened(2, flows=1_000_000) as rig:
        last = [rig.mem[rig.netif._area + 64 * i:][:60].tobytes() for i in (499_999, 999_999)]
        assert [IP(data)[UDP].payload.load[:4] for data in last] == [
            (999_998).to_bytes(4, "big"), (999_999).to_bytes(4, "big")]


def test_settings(tmp_path: Path) -> None:
    def read(text: str) -> Any:
        path = tmp_path / "a.toml"
        path.write_text(f'name = "a"\n[[netif]]\nkind = "synthetic"\n{text}\n')
        return load(path, netif.kinds()).netif[0]

    one = read('flows = 7\nlocal_ports = [1, 2]\nsize = "imix"\nrate = 10\ncount = 3\nbackpressure = true')
    assert (one.flows, one.local_ports, one.size, one.rate, one.count) == (7, (1, 2), "imix", 10, 3)
    default = read("")
    assert (default.flows, default.local_ports, default.size, default.start) == (1024, (5000, 5063), 60, 0)
    for text, expected in (
        ("flows = 0", "netif[0].flows"),
        ("flows = 16777216\nsize = 65535", "less flows, or smaller packets"),
        ("local_ports = [5, 4]", "the lower port first"),
        ("local_ports = [0, 4]", "netif[0].local_ports[0]"),
        ("local_ports = [1]", "first and last port"),
        ("size = 35", "netif[0].size"),
        ('size = "big"', "netif[0].size"),
        ("rate = -1", "netif[0].rate"),
    ):
        with pytest.raises(ConfigError) as caught:
            read(text)
        assert expected in str(caught.value), str(caught.value)
