"""Parsing and building against scapy and against the tests' own format, and what no sender should send."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import TCP

from dataplane.shm import layout_tcp as T
from tests.tcp.rig import MODES, Segment, flag_bits, protocol

S_AT, O_AT, AT = 4096, 8192, 100        # places of S_ words, O_ words, and of the segment
WORD = st.integers(0, (1 << 32) - 1)
ANY = st.integers(-(1 << 63), (1 << 63) - 1)


class Bench:
    """Memory with room for one segment and its words."""

    def __init__(self, mode):
        self.p, self.memory = protocol(mode), bytearray(1 << 17)
        self.mem = np.frombuffer(self.memory, np.uint8) if mode == "compiled" else self.memory

    def parse(self, raw, length=None):
        """The S_ words as a dict, or None."""
        self.memory[AT:AT + len(raw)] = raw
        self.memory[S_AT:S_AT + T.S_BYTES] = b"\xcc" * T.S_BYTES
        if not self.p.segment_parse(self.mem, AT, len(raw) if length is None else length, S_AT):
            return None
        names = {name: value for name, value in vars(T).items() if name.startswith("S_") and name != "S_BYTES"}
        return {name[2:]: struct.unpack_from("=q", self.memory, S_AT + at)[0] for name, at in names.items()}

    def sacks(self, words):
        return [struct.unpack_from("=qq", self.memory, S_AT + T.S_SACKS + 16 * i) for i in range(words["SACK_COUNT"])]

    def build(self, words, seq, flags, sacks=()):
        """The header of O_ words given by name."""
        for name, value in words.items():
            struct.pack_into("=q", self.memory, O_AT + getattr(T, f"O_{name}"), value)
        for i, pair in enumerate(sacks):
            struct.pack_into("=qq", self.memory, O_AT + T.O_SACKS + 16 * i, *pair)
        self.memory[AT:AT + 80] = b"\xa5" * 80
        size = self.p.segment_build(self.mem, O_AT, AT, seq, flags)
        assert size == self.p.segment_header_bytes(self.mem, O_AT)
        assert self.memory[AT + size:AT + 80] == b"\xa5" * (80 - size) and self.memory[AT - 1] == 0
        return bytes(self.memory[AT:AT + size])


@pytest.fixture(params=MODES, scope="module")
def bench(request):
    return Bench(request.param)


def o_words(one):
    """The O_ words of a segment."""
    options = ((one.mss is not None) * T.SO_MSS | (one.shift is not None) * T.SO_SHIFT | one.sack_ok * T.SO_SACK_OK
               | (one.ts is not None) * T.SO_TIMESTAMPS | bool(one.sacks) * T.SO_SACK)
    tsval, tsecr = one.ts or (0, 0)
    return {"ACK": one.ack, "WINDOW": one.window, "OPTIONS": options, "MSS": one.mss or 0, "SHIFT": one.shift or 0,
            "TSVAL": tsval, "TSECR": tsecr, "SACK_COUNT": len(one.sacks)}


COMBINATIONS = [
    Segment("SA", 0xFFFFFFFE, 0x80000000, 0xFFFF, b"x" * size, mss, shift, sack_ok, ts, sacks)
    for mss, shift, sack_ok, ts, sacks, size in itertools.product(
        (None, 0, 1460, 65535), (None, 0, 14), (False, True), (None, (1, 0xFFFFFFFF)),
        ([], [(1, 2)], [(1, 2), (3, 4)], [(1, 2), (3, 0xFFFFFFFF), (5, 6)], [(1, 2), (3, 4), (5, 6), (7, 8)]), (0, 3))
    if len(Segment("SA", mss=mss, shift=shift, sack_ok=sack_ok, ts=ts, sacks=sacks).option_bytes()) <= 40]


def test_every_combination_of_options_is_parsed(bench):
    for one in COMBINATIONS:
        words = bench.parse(one.wire())
        assert (words["SEQ"], words["ACK"], words["WINDOW"]) == (one.seq, one.ack, one.window)
        assert words["FLAGS"] == flag_bits(one.flags) and words["LENGTH"] == len(one.data)
        assert bench.memory[words["DATA"]:words["DATA"] + words["LENGTH"]] == one.data
        assert words["OPTIONS"] == o_words(one)["OPTIONS"], one
        assert (words["MSS"], words["SHIFT"]) == (one.mss or 0, one.shift or 0)
        assert (words["TSVAL"], words["TSECR"]) == (one.ts or (0, 0))
        assert bench.sacks(words) == one.sacks


def test_every_combination_of_options_is_built(bench):
    for one in COMBINATIONS:
        header = bench.build(o_words(one), one.seq, flag_bits(one.flags), one.sacks)
        assert header + one.data == one.wire()


def test_scapy_reads_what_is_built(bench):
    for one in COMBINATIONS:
        packet = TCP(bench.build(o_words(one), one.seq, flag_bits(one.flags), one.sacks))
        options = {name: value for name, value in packet.options if name != "NOP"}
        expected = {"MSS": one.mss, "WScale": one.shift, "SAckOK": b"" if one.sack_ok else None,
                    "Timestamp": one.ts, "SAck": tuple(itertools.chain(*one.sacks)) or None}
        assert options == {name: value for name, value in expected.items() if value is not None}
        assert (packet.seq, packet.ack, packet.window, packet.dataofs * 4) == (
            one.seq, one.ack, one.window, 20 + len(one.option_bytes()))
        assert packet.flags == one.flags and packet.sport == packet.dport == packet.chksum == packet.urgptr == 0


OPTIONS = st.lists(st.one_of(
    st.tuples(st.just("MSS"), st.integers(0, 65535)), st.tuples(st.just("WScale"), st.integers(0, 14)),
    st.just(("SAckOK", b"")), st.tuples(st.just("Timestamp"), st.tuples(WORD, WORD)), st.just(("NOP", None)),
    st.tuples(st.just("SAck"), st.sampled_from([2, 4]).flatmap(
        lambda size: st.lists(WORD, min_size=size, max_size=size)).map(tuple)),
    st.just(("AltChkSum", (1, 0))), st.just((253, b"abc"))), max_size=6, unique_by=lambda one: one[0])


@given(OPTIONS, st.sampled_from(["S", "SA", "A", "PA"]), st.binary(max_size=40))
def test_scapys_options_are_read(options, flags, data):
    raw = bytes(TCP(sport=0, dport=0, flags=flags, options=options, chksum=0) / data)
    if (raw[12] >> 4) * 4 - 20 < len(bytes(TCP(options=options))) - 20:     # more than 40 bytes: scapy cuts
        return
    for mode in MODES:
        bench = BENCHES[mode]
        words, found = bench.parse(raw), dict(options)
        syn = "S" in flags
        expected = {"MSS": found.get("MSS", 0) if syn else 0, "SHIFT": found.get("WScale", 0) if syn else 0,
                    "TSVAL": found.get("Timestamp", (0, 0))[0], "TSECR": found.get("Timestamp", (0, 0))[1]}
        assert {name: words[name] for name in expected} == expected
        assert [number for pair in bench.sacks(words) for number in pair] == list(found.get("SAck", ()))
        bits = {"MSS": T.SO_MSS * syn, "WScale": T.SO_SHIFT * syn, "SAckOK": T.SO_SACK_OK * syn,
                "Timestamp": T.SO_TIMESTAMPS, "SAck": T.SO_SACK}
        assert words["OPTIONS"] == sum(bit for name, bit in bits.items() if name in found)


BENCHES = {mode: Bench(mode) for mode in MODES}


def naive_options(area, syn):
    """What an option area says, written once more: SO_ bits and values."""
    bits, values, sacks = 0, {"MSS": 0, "SHIFT": 0, "TSVAL": 0, "TSECR": 0}, []
    rest = area
    while rest and rest[0] != 0:
        if rest[0] == 1:
            rest = rest[1:]
            continue
        if len(rest) < 2 or rest[1] < 2 or rest[1] > len(rest):
            break
        kind, body, rest = rest[0], rest[2:rest[1]], rest[rest[1]:]
        if (kind, len(body)) == (8, 8):
            bits |= T.SO_TIMESTAMPS
            values["TSVAL"], values["TSECR"] = struct.unpack(">II", body)
        elif kind == 5 and body and len(body) % 8 == 0:
            bits |= T.SO_SACK
            sacks += struct.iter_unpack(">II", body)
        elif (kind, len(body), syn) == (2, 2, True):
            bits |= T.SO_MSS
            values["MSS"] = int.from_bytes(body, "big")
        elif (kind, len(body), syn) == (3, 1, True):
            bits |= T.SO_SHIFT
            values["SHIFT"] = min(body[0], 14)
        elif (kind, len(body), syn) == (4, 0, True):
            bits |= T.SO_SACK_OK
    return bits, values, sacks[:4]


AREAS = st.lists(st.one_of(
    st.binary(min_size=1, max_size=8), st.sampled_from([
        b"\1", b"\0", b"\2\4\5\xb4", b"\3\3\7", b"\3\3\xff", b"\4\2", b"\1\1\x08\x0a" + bytes(range(8)),
        b"\2\0", b"\2\1", b"\2\3\1", b"\x08\x09" + bytes(7),
        b"\5\2", b"\5\x0a" + bytes(8), b"\5\x0b" + bytes(9), b"\5\x12" + bytes(16),
        b"\x22\4ab", b"\xfd\4\xf9\x89"])), max_size=12).map(b"".join)


@given(AREAS, st.sampled_from(["S", "A"]), st.booleans())
def test_malformed_options(area, flags, padded_with_nops):
    area = area[:40]
    area += (b"\1" if padded_with_nops else b"\0") * (-len(area) % 4)
    for mode in MODES:
        words = BENCHES[mode].parse(Segment(flags, data=b"data").wire(area))
        bits, values, sacks = naive_options(area, flags == "S")
        assert words["OPTIONS"] == bits and words["LENGTH"] == 4
        assert {name: words[name] for name in values} == values
        assert BENCHES[mode].sacks(words) == sacks


@given(st.binary(max_size=80))
def test_any_bytes(raw):
    """Whatever comes: refused, or data that lie within."""
    results = []
    for mode in MODES:
        words = BENCHES[mode].parse(raw)
        header = (raw[12] >> 4) * 4 if len(raw) > 12 else 0
        assert (words is not None) == (len(raw) >= 20 and 20 <= header <= len(raw))
        if words:
            assert words["DATA"] - AT == header and words["LENGTH"] == len(raw) - header
        results.append(words)
    assert results[0] == results[1]


@pytest.mark.parametrize("offset, length, fits", [(5, 20, True), (5, 19, False), (4, 40, False), (0, 40, False),
                                                  (15, 60, True), (15, 59, False), (6, 20, False), (5, 0, False)])
def test_header_length(bench, offset, length, fits):
    raw = bytearray(60)
    raw[12] = offset << 4
    assert (bench.parse(bytes(raw), length) is not None) == fits


NAMES = ["ACK", "WINDOW", "OPTIONS", "MSS", "SHIFT", "TSVAL", "TSECR", "SACK_COUNT"]


@given(st.dictionaries(st.sampled_from(NAMES), ANY, min_size=8), ANY, st.integers(0, 255),
       st.lists(st.tuples(ANY, ANY), min_size=4, max_size=4))
def test_hostile_records(words, seq, flags, sacks):
    """Any words give a header of at most 60 bytes that parses, the same in both modes."""
    headers = [BENCHES[mode].build(words, seq, flags, sacks) for mode in MODES]
    assert headers[0] == headers[1]
    header = headers[0]
    assert len(header) <= 60 and len(header) % 4 == 0
    parsed = Segment.parse(header)
    assert parsed.seq == seq % (1 << 32) and flag_bits(parsed.flags) == flags
    assert parsed.window == max(0, min(words["WINDOW"], 65535)) and parsed.wire() == header
