"""UDP lengths and checksums through the whole worker."""

from __future__ import annotations

import struct
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.shm import layout as L
from tests.bed import Bed, Frame, Outcome, Record, Socket
from tests.traffic import internet_checksum

Place = tuple[Bed, Socket]
SOURCE = {4: b"\xc0\0\2\1", 6: b"\xfd\1" + bytes(13) + b"\1"}
TARGET = {4: b"\x0a\0\0\1", 6: b"\xfd\0" + bytes(13) + b"\1"}


@pytest.fixture(scope="module")
def place() -> Place:
    bed = Bed()
    return bed, bed.open("udp", port=5000, ring_bytes=1 << 18)


def udp(family: int, payload: bytes, length: int | None = None, checksum: int | None = None, port: int = 5000) -> bytes:
    """A UDP header with what is given, or what is right, and the payload."""
    length = 8 + len(payload) if length is None else length
    header = struct.pack("!HHHH", 7, port, length, 0)
    if checksum is None:
        pseudo = SOURCE[family] + TARGET[family] + struct.pack("!IHH", length, 0, 17)
        checksum = internet_checksum(pseudo + (header + payload)[:length]) or 0xFFFF
    return header[:6] + struct.pack("!H", checksum) + payload


def packet(family: int, body: bytes) -> bytes:
    if family == 6:
        return struct.pack("!IHBB", 6 << 28, len(body), 17, 64) + SOURCE[6] + TARGET[6] + body
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0) + SOURCE[4] + TARGET[4]
    return header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:] + body


def offer(place: Place, data: bytes, flags: int = 0) -> tuple[Outcome, list[Record]]:
    bed, sock = place
    return bed.send([Frame(data, L.LINK_RAW, flags)]), bed.records(sock)


def reason(place: Place, data: bytes, flags: int = 0) -> str:
    outcome, records = offer(place, data, flags)
    assert outcome.delivered == len(records) == 1 - sum(outcome.reasons.values())
    return "".join(outcome.reasons)


@settings(max_examples=150)
@given(st.sampled_from((4, 6)), st.integers(0, 300) | st.integers(0, 65507), st.randoms(use_true_random=False))
def test_good_datagrams_of_any_length(place: Place, family: int, size: int, random: Random) -> None:
    data = packet(family, udp(family, random.randbytes(size)))
    outcome, records = offer(place, data)
    assert outcome.delivered == 1 and records[0].data == data and records[0].payload == data[-size:] * bool(size)


@settings(max_examples=150)
@given(st.sampled_from((4, 6)), st.integers(0, 100), st.randoms(use_true_random=False))
def test_every_flipped_bit_is_noticed(place: Place, family: int, size: int, random: Random) -> None:
    body = bytearray(udp(family, random.randbytes(size)))
    bit = random.randrange(8 * len(body))
    body[bit // 8] ^= 1 << bit % 8
    if family == 4 and body[6:8] == b"\0\0":
        return      # now it says that there is no checksum
    expected = "bad_udp_length" if bit // 8 in (4, 5) and not 8 <= int.from_bytes(body[4:6], "big") <= len(body) else \
        "bad_udp_checksum"
    assert reason(place, packet(family, bytes(body))) == expected


@pytest.mark.parametrize("family", [4, 6])
def test_lengths(place: Place, family: int) -> None:
    for size in range(8):
        assert reason(place, packet(family, udp(family, b"")[:size])) == "bad_udp_length"
    for length in (0, 7, 8 + 11, 65535):
        assert reason(place, packet(family, udp(family, b"0123456789", length))) == "bad_udp_length"
    shorter = packet(family, udp(family, b"0123456789", 8 + 4))
    outcome, records = offer(place, shorter)
    assert outcome.delivered == 1
    assert records[0].payload == b"0123" and records[0].data == shorter[:-6]


@pytest.mark.parametrize("family", [4, 6])
def test_checksums(place: Place, family: int) -> None:
    none, wrong = (packet(family, udp(family, b"data", checksum=value)) for value in (0, 0x1234))
    assert reason(place, none) == ("" if family == 4 else "bad_udp_checksum")      # RFC 8200 section 8.1
    assert reason(place, wrong) == "bad_udp_checksum"
    assert reason(place, wrong, L.PF_CHECKSUM_OK) == ""
    assert reason(place, wrong, L.PF_CHECKSUM_PARTIAL) == ""
    assert reason(place, none, L.PF_CHECKSUM_PARTIAL) == ""


@pytest.mark.parametrize("family", [4, 6])
def test_a_checksum_of_zero_is_sent_as_ones(place: Place, family: int) -> None:
    """RFC 768: all zeros mean none, so that a sum which is zero goes as all ones."""
    for word in range(65536):
        body = udp(family, struct.pack("!H", word))
        if body[6:8] == b"\xff\xff":
            break
    assert reason(place, packet(family, body)) == ""


def test_ports_at_the_ends() -> None:
    bed = Bed()
    bed.open("udp", port=1)
    last, anybody = bed.open("udp", port=65535), bed.open("udp")
    for port, sock in ((65535, last), (0, anybody), (65534, anybody)):
        assert bed.send([Frame(packet(4, udp(4, b"x", port=port)), L.LINK_RAW)]).delivered == 1
        assert len(bed.records(sock)) == 1
