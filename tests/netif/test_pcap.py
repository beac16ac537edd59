"""The `pcap` netif by itself: its kernels are driven as a worker drives them, and what they give is compared
with what scapy reads from the same file."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.utils import RawPcapReader

from dataplane import netif
from dataplane.config import load
from dataplane.errors import ConfigError, DataplaneError
from dataplane.netif import _pace, pcap
from dataplane.netif import _pcapfile as capture
from dataplane.shm import layout as L
from dataplane.shm.arena import PAGE
from tests.captures import formats, make
from tests.netif.rig import Frame, Rig
from tests.wire.test_flow import slow_flow

OURS = {path.name: data for path, data in make.files().items()}
WRONG = ("cut_record.pcap", "cut_header.pcap", "damaged.pcapng", "wireless.pcapng", "wireless.pcap",
         "no_interface.pcapng")
GOOD = sorted(path for path in make.files() if path.name not in WRONG)
REAL = Path(os.environ.get("DATAPLANE_CAPTURES", Path(__file__).parents[3] / "shared" / "captures"))
REAL_FILES = sorted(REAL.glob("*.pcap*"))
LINKS = {1: L.LINK_ETHERNET, 113: L.LINK_SLL, 276: L.LINK_SLL2, 0: L.LINK_NULL, 108: L.LINK_NULL,
         **dict.fromkeys((101, 12, 14, 228, 229), L.LINK_RAW)}


class Here:
    """A namespace to open netifs in: this one."""

    def entered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def opened(path: Path, queues: int = 1, pace: object = "fast", **settings: Any) -> Rig:
    return Rig(pcap, Here(), queues, path=str(path), pace=pace, **settings)


def play(rig: Rig, queue: int = 0, limit: int = L.BURST) -> tuple[list[Frame], int]:
    """All frames of a queue, and what rx returned at the end. It must come in a bounded number of calls."""
    frames: list[Frame] = []
    for _ in range(100_000):
        given = rig.rx(limit, queue)
        if given < 0:
            return frames, given
        assert given <= limit
        frames += [rig.frame(i, queue) for i in range(given)]
        rig.done(given, queue)
    raise AssertionError("it does not end")


def write(folder: Path, data: bytes, name: str = "test.pcap") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def whole(path: Path) -> list[Frame]:
    with opened(path) as rig:
        frames, end = play(rig)
        assert end == L.NIF_ENDED and rig.netif.error(0) is None
        return frames


def scapy_reads(path: Path) -> list[tuple[bytes, int, int | None, int]]:
    """Bytes, length on the wire, ns, link type of every packet; ns None where scapy knows none."""
    found = []
    reader = RawPcapReader(str(path))
    for data, meta in reader:
        if hasattr(meta, "tsresol"):
            ticks = None if meta.tshigh is None else (meta.tshigh << 32) + meta.tslow
            time = None if ticks is None else int(ticks * 10**9 // int(meta.tsresol))
            found.append((data, meta.wirelen, time, LINKS[meta.linktype]))
        else:
            time = meta.sec * 10**9 + meta.usec * (1 if reader.nano else 1000)
            found.append((data, meta.wirelen, time, LINKS[reader.linktype]))
    return found


# -- against scapy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", make.files(), ids=lambda path: path.name)
def test_captures_are_what_the_script_makes(path: Path) -> None:
    assert path.read_bytes() == make.files()[path]


@pytest.mark.parametrize("path", [*GOOD, *REAL_FILES], ids=lambda path: path.name)
def test_frames_equal_what_scapy_reads(path: Path) -> None:
    frames, expected = whole(path), scapy_reads(path)
    assert [frame.data for frame in frames] == [data for data, *_ in expected]
    assert [frame.wire for frame in frames] == [wire for _, wire, *_ in expected]
    # Scapy does not know if_tsoffset, and keeps the interfaces of the section before: the next two tests do.
    if path.name != "sections.pcapng":
        assert [frame.link for frame in frames] == [link for *_, link in expected]
        if path.name != "interfaces.pcapng":
            assert [frame.time for frame in frames] == [time or 0 for *_, time, _ in expected]


def test_sections_have_interfaces_of_their_own() -> None:
    expected = []
    for number in range(4):
        if number % 2:
            expected.append((L.LINK_RAW, make.START + number * 1000))
        expected += [(L.LINK_ETHERNET, make.START + number)] * 3
    assert [(frame.link, frame.time) for frame in whole(make.HERE / "sections.pcapng")] == expected


@pytest.mark.skipif(not REAL_FILES, reason="no folder of real captures (DATAPLANE_CAPTURES)")
def test_real_captures_are_found() -> None:
    assert sum(len(whole(path)) for path in REAL_FILES) > 100


def test_resolutions_and_offsets() -> None:
    frames = whole(make.HERE / "interfaces.pcapng")
    second = make.START // 10**9
    expected = []
    for resolution in (*make.RESOLUTIONS, None, 9, 6):
        exponent = 6 if resolution is None else resolution
        units = 2 ** (exponent & 0x7F) if exponent & 0x80 else 10**exponent
        expected.append((second * units + units // 3) % 2**64 * 10**9 // units)
    expected[-2] += 3600 * 10**9
    expected[-1] -= 5 * 10**9
    assert [frame.time for frame in frames] == expected


@given(st.integers(0, 2**64 - 1), st.one_of(st.integers(9, 27), st.integers(0x80, 0x80 + 63)))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_time_stamp(tmp_path: Path, ticks: int, resolution: int) -> None:
    data = formats.section() + formats.interface(resolution=resolution) + formats.enhanced(b"frame", ticks)
    (frame,) = whole(write(tmp_path, data))
    units = 2 ** (resolution & 0x7F) if resolution & 0x80 else 10**resolution
    time = (ticks * 10**9 // units + 2**63) % 2**64 - 2**63
    assert frame.time == max(0, time)


def test_snaplen_cuts_but_keeps_the_length_on_the_wire() -> None:
    frames = whole(make.HERE / "snaplen.pcap")
    assert max(len(frame.data) for frame in frames) == 60 and max(frame.wire for frame in frames) == 1514


# -- what is wrong with a file -----------------------------------------------------------------------------


def fails(path: Path) -> tuple[int, str]:
    """Frames before the damage, and the sentence without the file's name."""
    with opened(path) as rig:
        frames, end = play(rig)
        assert end == L.NIF_FAILED and rig.rx() == L.NIF_FAILED
        assert rig.word(L.N_ERROR_AT) == len(frames) + 1
        error = rig.netif.error(0)
        assert error is not None and error.startswith(f"{path}: ")
        return len(frames), error.removeprefix(f"{path}: ")


def test_damage_is_told() -> None:
    size = len(OURS["cut_record.pcap"])
    assert fails(make.HERE / "cut_header.pcap") == (
        5, f"packet 6 at offset {size + 20}: a header of 16 bytes begins here, the file has 7")
    frames, sentence = fails(make.HERE / "cut_record.pcap")
    assert frames == 4 and sentence.startswith("packet 5 at offset ")
    assert sentence.endswith(": record says 71 bytes, the file has 51")
    assert fails(make.HERE / "no_interface.pcapng") == (
        0, "packet 1 at offset 28: record is of interface 0, the section has described 0")
    frames, sentence = fails(make.HERE / "wireless.pcapng")
    assert frames == 1 and sentence.endswith("interface 1 has link type 105 (IEEE 802.11)")
    frames, sentence = fails(make.HERE / "damaged.pcapng")
    assert frames == 1 and sentence.endswith("block says 84 bytes at its beginning and 0 at its end")


BLOCK = formats.section() + formats.interface()


@pytest.mark.parametrize(("data", "expected"), [
    (BLOCK + formats.section()[:20], "a header of 28 bytes begins here, the file has 20"),
    (BLOCK + bytes(11), "a header of 12 bytes begins here, the file has 11"),
    (BLOCK + struct.pack("<III", 7, 13, 13), "block says 13 bytes, expected a multiple of 4 of at least 12"),
    (BLOCK + struct.pack("<III", 7, 8, 8), "block says 8 bytes, expected a multiple of 4 of at least 12"),
    (BLOCK + struct.pack("<III", 7, 4096, 8), "block says 4096 bytes, the file has 12"),
    (BLOCK + formats.block(6, bytes(16)), "block says 28 bytes, expected a multiple of 4 of at least 32"),
    (BLOCK + formats.block(6, struct.pack("<IIIII", 0, 0, 0, 9, 9) + bytes(8)),
     "record says 9 bytes, its block has 8"),
    (BLOCK + formats.block(6, struct.pack("<IIIII", 0, 0, 0, 300000, 9) + bytes(300000)),
     "record says 300000 bytes, no packet is longer than 262144"),
    (BLOCK + formats.block(0x0A0D0D0A, bytes(16)),
     "section header has the byte-order magic 0x00000000, expected 0x1a2b3c4d"),
    (BLOCK + formats.block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 2, 0, -1)),
     "section is of pcapng version 2, expected 1"),
    (BLOCK + formats.interface(resolution=28),
     "interface 1 has an unusable time stamp resolution (if_tsresol 28)"),
    (BLOCK + formats.interface(resolution=0xC0),
     "interface 1 has an unusable time stamp resolution (if_tsresol 192)"),
    (BLOCK + formats.block(1, struct.pack("<HHIHH", 1, 0, 0, 9, 9)), "option says 9 bytes, its block has 0"),
    (formats.section() + formats.interface() * 4097, "section describes more than 4096 interfaces"),
    (formats.classic([(0, bytes(300000))], snaplen=300000),
     "record says 300000 bytes, no packet is longer than 262144"),
], ids=range(15))
def test_every_kind_of_damage(tmp_path: Path, data: bytes, expected: str) -> None:
    frames, sentence = fails(write(tmp_path, data))
    assert frames == 0 and sentence.startswith("packet 1 at offset ") and sentence.endswith(f": {expected}")


@pytest.mark.parametrize(("data", "expected"), [
    (b"", "the file is empty"),
    (b"\xd4\xc3", "neither a pcap nor a pcapng file (begins with d4 c3)"),
    (b"#!/bin/sh\nexit 0\n" * 9, "neither a pcap nor a pcapng file (begins with 23 21 2f 62)"),
    (OURS["vlan.pcap"][:23], "too short for a capture: 23 bytes"),
    (OURS["simple.pcapng"][:27], "too short for a capture: 27 bytes"),
    (b"\x1f\x8b\x08\x00" + bytes(50), "the file is compressed, unpack it first"),
    (struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 3, 0, 0, 64, 1), "pcap version 2.3, expected 2.4"),
    (OURS["wireless.pcap"], "link type 105 (IEEE 802.11), expected one of Ethernet (1), "
                            "raw IP (101, 228, 229), Linux cooked (113, 276), BSD loopback (0, 108)"),
])
def test_not_a_capture(tmp_path: Path, data: bytes, expected: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(DataplaneError) as caught:
        opened(path)
    assert str(caught.value) == f"{path}: {expected}"


def test_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, expected in (("gone", "No such file"), ("pipe", "not a file"), (".", "not a file")):
        with pytest.raises(DataplaneError, match=expected):
            opened(tmp_path / name)


def test_settings(tmp_path: Path) -> None:
    def read(text: str) -> Any:
        path = write(tmp_path, f'name = "a"\n[[netif]]\nkind = "pcap"\n{text}\n'.encode(), "a.toml")
        return load(path, netif.kinds()).netif[0]

    write(tmp_path, OURS["vlan.pcap"], "trace.pcap")
    one = read('path = "trace.pcap"\npace = 1000\nloop = 0\nstart = 3')
    assert (one.path, one.pace, one.loop, one.start) == (str(tmp_path / "trace.pcap"), 1000, 0, 3)
    assert read('path = "trace.pcap"').pace == "recorded"
    for text, expected in (
        ('path = "gone.pcap"', "gone.pcap"),
        ('path = "a.toml"', "neither a pcap nor a pcapng file"),
        ('path = "trace.pcap"\npace = "slow"', '"recorded", "fast" or a number of packets per second'),
        ('path = "trace.pcap"\npace = 0', '"recorded", "fast" or a number of packets per second'),
        ('path = "trace.pcap"\nloop = -1', "netif[0].loop"),
    ):
        with pytest.raises(ConfigError) as caught:
            read(text)
        assert expected in str(caught.value)


# -- hostile files -----------------------------------------------------------------------------------------


def page_full(name: str) -> bytes:
    """The capture, repeated and cut so that it ends with a page: behind that there is no memory."""
    data = OURS[name]
    body = data if name.endswith("ng") else data[24:]
    return (data + body * (PAGE // max(1, len(body)) + 1))[:PAGE]


FULL = {name: page_full(name) for name in OURS if name != "quickstart.pcap"}
CHANGE = st.tuples(st.integers(0, PAGE - 1), st.integers(0, 255))
EXTREME = [0, 1, 12, 0xFFFC, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
WORD = st.tuples(st.integers(0, PAGE // 4 - 1), st.sampled_from(EXTREME))


@given(st.sampled_from(sorted(FULL)), st.lists(CHANGE, max_size=4), st.lists(WORD, max_size=2),
       st.integers(0, PAGE), st.integers(1, 3))
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_ends(
    tmp_path: Path, name: str, changes: list[tuple[int, int]], words: list[tuple[int, int]], cut: int,
    queues: int,
) -> None:
    data = bytearray(FULL[name])
    for at, value in changes:
        data[at:at + 1] = bytes([value])
    for at, value in words:
        data[4 * at:4 * at + 4] = struct.pack("<I", value)
    del data[PAGE:]
    data = data[-cut:] if cut % 3 == 0 else data    # now and then something is missing at the beginning
    try:
        rig = opened(write(tmp_path, bytes(data)), queues)
    except DataplaneError as error:
        assert "\n" not in str(error)
        return
    with rig:
        ends = set()
        for queue in range(queues):
            frames, end = play(rig, queue)
            ends.add((end, rig.netif.error(queue)))
            assert all(frame.data in data and frame.wire >= len(frame.data) for frame in frames)
        ((end, error),) = ends   # all queues agree
        assert (end == L.NIF_FAILED) == (error is not None) and end in (L.NIF_FAILED, L.NIF_ENDED)


# -- bursts, queues, loops ---------------------------------------------------------------------------------


def die(rig: Rig, queue: int) -> None:
    """What a worker was in the middle of writing when it was killed, its replacement must not use."""
    s = rig.nifs[queue] + L.N_PRIVATE
    words = rig.mem[s:s + L.N_BYTES - L.N_PRIVATE].view(np.int64)
    other = pcap.C_COMMITTED + (1 - int(words[pcap.C_WHICH // 8])) * pcap.COMMITTED_BYTES
    for begin, size in ((capture.F_POSITION, 24), (pcap.X_ROUND, 24), (other, pcap.COMMITTED_BYTES),
                        (capture.R_FRAME, 48), (pcap.C_MARKS, L.BURST * pcap.CURSOR_BYTES)):
        words[begin // 8:(begin + size) // 8] = 77


@given(st.sampled_from(["sections.pcapng", "interfaces.pcapng", "micro_big.pcap", "fragments.pcap"]),
       st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=30)
def test_what_is_not_done_comes_again(name: str, queues: int, seed: int) -> None:
    """With bursts of any size, of which any part is taken."""
    rng = random.Random(seed)
    path = make.HERE / name
    with opened(path, queues, loop=2) as straight, opened(path, queues, loop=2) as rig:
        for queue in range(queues):
            expected, _ = play(straight, queue)
            got: list[Frame] = []
            while (given := rig.rx(rng.randint(1, L.BURST), queue)) >= 0:
                taken = rng.randint(0, given)
                got += [rig.frame(i, queue) for i in range(taken)]
                if taken or rng.random() < 0.5:
                    rig.done(taken, queue)
                else:
                    die(rig, queue)
            assert given == L.NIF_ENDED and got == expected


@pytest.mark.parametrize("queues", [2, 3, 8])
@pytest.mark.parametrize("path", [*GOOD, *REAL_FILES], ids=lambda path: path.name)
def test_queues_divide_a_file_by_flow(path: Path, queues: int) -> None:
    expected = [(frame.data, frame.time) for frame in whole(path)]
    owner: dict[object, int] = {}
    parts = []
    with opened(path, queues) as rig:
        for queue in range(queues):
            frames, end = play(rig, queue)
            assert end == L.NIF_ENDED
            parts.append([(frame.data, frame.time) for frame in frames])
            for frame in frames:
                flow = slow_flow(frame.link, frame.data)
                key = flow and (frozenset(flow[:2]), flow[2])
                assert owner.setdefault(key, queue) == queue
    assert sorted(itertools.chain(*parts)) == sorted(expected)
    for part in parts:      # and each in the order of the file
        rest = iter(expected)
        assert all(frame in rest for frame in part)


@pytest.mark.parametrize("name", ["micro_little.pcap", "sections.pcapng", "simple.pcapng"])
@pytest.mark.parametrize("queues", [1, 2])
def test_loops_repeat_the_file(name: str, queues: int) -> None:
    with opened(make.HERE / name, queues) as once, opened(make.HERE / name, queues, loop=3) as rig:
        for queue in range(queues):
            (frames, _), (looped, end) = play(once, queue), play(rig, queue)
            assert end == L.NIF_ENDED and looped == frames * 3


def test_a_loop_for_ever_ends_where_nothing_comes() -> None:
    with opened(make.HERE / "no_packets.pcap", 2, loop=0) as rig:
        assert play(rig, 0) == play(rig, 1) == ([], L.NIF_ENDED)
    with opened(make.HERE / "micro_little.pcap", 64, loop=0) as rig:
        idle = [queue for queue in range(64) if rig.rx(queue=queue) < 0 or rig.rx(queue=queue) < 0]
        assert 40 < len(idle) < 64


# -- pace --------------------------------------------------------------------------------------------------


def start(rig: Rig, value: int | None = None) -> int:
    """The time of the start; with `value`, moves it there, which is how these tests wait."""
    place = rig.nifs[0] + L.N_PRIVATE + pcap.X_START
    word = rig.mem[place:place + 8].view(np.int64)
    if value is not None:
        word[0] = value
    return int(word[0])


HOUR = 3600 * 10**9
TIMES = [5, 5 + HOUR, 5 + HOUR // 2, 5 + 3 * HOUR]      # the third one was recorded late
FRAMES = [make.ether(make.udp4(bytes([i]))) for i in range(4)]


@pytest.fixture
def hours(tmp_path: Path) -> Path:
    return write(tmp_path, formats.classic(list(zip(TIMES, FRAMES, strict=True)), nano=True))


def test_recorded_pace(hours: Path) -> None:
    with opened(hours, pace="recorded", loop=2) as rig:
        assert start(rig) == 0 and rig.rx() == 1 and start(rig) > 0
        rig.done(1)
        begun, due = start(rig), []
        while (given := rig.rx()) != L.NIF_ENDED:
            if given > 0:
                rig.done(given)
            elif (wait := rig.word(L.N_NEXT)) > 1:
                due.append(wait - start(rig))
                start(rig, begun - due[-1])     # as if so much time had passed
        # The second round begins a mean gap behind the first.
        assert due == [HOUR, 3 * HOUR, 4 * HOUR, 5 * HOUR, 7 * HOUR]
        assert not rig.word(L.N_FLAGS) & L.NF_BACKPRESSURE


def test_a_rate_counts_all_queues(tmp_path: Path) -> None:
    frames = [bytes(make.udp4(port=port)) for port in range(1000, 1060)]
    path = write(tmp_path, formats.classic([(0, frame) for frame in frames], formats.RAW))
    with opened(path, 2, pace=0.01, loop=2) as rig:     # 100 s each
        got: list[list[bytes]] = [[], []]
        rig.rx(queue=1), rig.rx(queue=0)
        begun = start(rig)
        for index in range(2 * len(frames)):
            start(rig, begun - index * 100 * 10**9)     # frame `index` is due now, the next one is not
            given = {}
            for queue in (0, 1):
                given[queue] = max(0, rig.rx(queue=queue))
                if given[queue] == 0 and rig.word(L.N_NEXT, queue) == 1:    # a round was over
                    given[queue] = max(0, rig.rx(queue=queue))
                got[queue] += [rig.frame(i).data for i in range(given[queue])]
                rig.done(given[queue], queue)
            assert sum(given.values()) == 1 and sum(map(len, got)) == index + 1
        assert sorted(got[0] + got[1]) == sorted(frames * 2) and got[0] and got[1]
        assert {rig.rx(queue=queue) for queue in (0, 1)} == {L.NIF_ENDED}


@given(st.integers(0, 10**12), st.floats(_pace.RATE_MIN, _pace.RATE_MAX))
def test_the_clock_of_a_rate(index: int, per_second: float) -> None:
    rate, unit = _pace.ratio(per_second)
    if index // rate * unit > 2**62:    # more than a century
        return
    due = _pace.due.py_func(index, rate, unit)
    assert due == -(-index * unit // rate)
    assert _pace.allowed.py_func(due, rate, unit) > index
    assert due == 0 or _pace.allowed.py_func(due - 1, rate, unit) <= index
    assert rate * unit < 2**63 and abs(rate / unit * 10**9 - per_second) <= max(0.0005, 0.0005 * per_second)


def test_fast_waits_for_consumers_and_nothing_is_ever_sent() -> None:
    with opened(make.HERE / "vlan.pcap", start=3) as rig:
        assert rig.word(L.N_FLAGS) == L.NF_PASSIVE | L.NF_BACKPRESSURE
        assert (rig.word(L.N_START), rig.word(L.N_FD), rig.word(L.N_TX)) == (3, -1, 0)
        assert (rig.netif.name, rig.netif.passive, rig.netif.addresses) == ("vlan.pcap", True, [])
        rig.netif.poll_counters()


def test_close_gives_the_memory_back() -> None:
    with opened(make.HERE / "vlan.pcap") as rig:
        before = rig.arena.map_anonymous(PAGE)
        rig.arena.unmap(before, PAGE)
    assert rig.arena.map_anonymous(PAGE) < before
