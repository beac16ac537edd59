"""ARP, neighbour discovery and the shared table."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from dataplane import ledger
from dataplane.inet.neighbour import neighbour_repair
from dataplane.shm import layout as L
from tests.inet import rig as kernels
from tests.inet.rig import MAC, Rig, halves

PEER = "02:00:00:00:00:99"
OTHER = "02:00:00:00:00:77"
BROADCAST = "ff:ff:ff:ff:ff:ff"


@pytest.fixture(scope="module")
def shared() -> Rig:
    return Rig()


def number(mac: str) -> int:
    return int(mac.replace(":", ""), 16)


def arp(rig: Rig, vlan: int = -1, frame_to: str = BROADCAST, **fields: Any) -> tuple[int, list[bytes]]:
    source = fields.get("hwsrc", PEER)
    rig.describe(bytes(Ether(src=source, dst=frame_to) / ARP(**fields)), link=L.LINK_ETHERNET)
    rig.put(rig.p + L.P_VLAN, vlan)
    verdict = int(kernels.arp_input(rig.mem, rig.w, rig.ethernet, rig.p))
    return verdict, [frame for _, frame in rig.sent()]


def nd(rig: Rig, packet: Any, flags: int = 0, vlan: int = -1) -> tuple[int, list[bytes]]:
    rig.describe(bytes(Ether(src=PEER, dst="33:33:ff:00:00:01") / packet), link=L.LINK_ETHERNET, flags=flags)
    rig.put(rig.p + L.P_VLAN, vlan)
    verdict = int(kernels.icmp_input(rig.mem, rig.w, rig.ethernet, rig.p))
    return verdict, [frame for _, frame in rig.sent()]


def resolve(rig: Rig, address: str, worker: int = 0) -> tuple[int, list[bytes]]:
    mac = int(kernels.resolve(rig.mem, rig.ws[worker], rig.ethernet, *halves(address)))
    return mac, [frame for _, frame in rig.sent()]


def test_request_is_answered_and_the_asker_learned() -> None:
    rig = Rig()
    verdict, (reply,) = arp(rig, op=1, hwsrc=PEER, psrc="10.0.0.9", pdst="10.0.0.1")
    assert verdict == -ledger.ARP
    assert reply == bytes(Ether(src=MAC, dst=PEER) / ARP(op=2, hwsrc=MAC, psrc="10.0.0.1", hwdst=PEER,
                                                         pdst="10.0.0.9"))
    assert resolve(rig, "10.0.0.9") == (number(PEER), [])
    rig.check_guards()


def test_probe_is_answered_and_not_learned() -> None:
    rig = Rig()
    _, (reply,) = arp(rig, op=1, hwsrc=PEER, psrc="0.0.0.0", pdst="10.0.0.1")
    assert (ARP(reply[14:]).psrc, ARP(reply[14:]).pdst, ARP(reply[14:]).hwdst) == ("10.0.0.1", "0.0.0.0", PEER)


@pytest.mark.parametrize("fields", [
    {"op": 1, "psrc": "10.0.0.9", "pdst": "10.0.0.2"},             # another one's address
    {"op": 1, "psrc": "10.0.0.9", "pdst": "10.0.0.9"},             # gratuitous, of one we never asked for
    {"op": 2, "psrc": "10.0.0.9", "pdst": "10.0.0.1"},             # an answer to no question
    {"op": 1, "psrc": "10.0.0.1", "pdst": "10.0.0.1"},             # somebody claims our address
    {"op": 1, "psrc": "10.0.0.9", "pdst": "10.0.0.2", "hwsrc": "01:00:5e:00:00:01"},
])
def test_what_is_neither_answered_nor_learned(fields: dict[str, Any]) -> None:
    rig = Rig()
    assert arp(rig, **fields) == (-ledger.ARP, [])
    mac, asked = resolve(rig, "10.0.0.9")
    assert mac == -1 and len(asked) == 1


def test_what_is_answered_but_not_believed() -> None:
    """An address that is not on the link, a group, a broadcast address: nobody's neighbour."""
    rig = Rig()
    for source in ("192.168.7.7", "224.0.0.1", "10.0.0.255"):
        arp(rig, op=1, hwsrc=PEER, psrc=source, pdst="10.0.0.1")
        assert resolve(rig, source)[0] == -1
    assert arp(rig, vlan=7, op=1, hwsrc=PEER, psrc="10.0.0.9", pdst="10.0.0.1") == (-ledger.ARP, [])
    assert resolve(rig, "10.0.0.9")[0] == -1


def test_bad_arp() -> None:
    rig = Rig()
    assert arp(rig, op=3)[0] == -ledger.BAD_ARP
    assert arp(rig, op=1, hwtype=6)[0] == -ledger.BAD_ARP
    rig.describe(bytes(Ether() / ARP())[:41], link=L.LINK_ETHERNET)
    assert kernels.arp_input(rig.mem, rig.w, rig.ethernet, rig.p) == -ledger.BAD_ARP


def test_question_is_asked_once_a_second_and_its_answer_kept() -> None:
    rig = Rig(workers=2)
    mac, (question,) = resolve(rig, "10.0.0.9")
    assert mac == -1
    assert question == bytes(Ether(src=MAC, dst=BROADCAST) / ARP(op=1, hwsrc=MAC, psrc="10.0.0.1",
                                                                 hwdst="00:00:00:00:00:00", pdst="10.0.0.9"))
    assert resolve(rig, "10.0.0.9") == (-1, []) == resolve(rig, "10.0.0.9", worker=1)
    rig.advance(1)
    assert len(resolve(rig, "10.0.0.9", worker=1)[1]) == 1
    arp(rig, op=2, hwsrc=PEER, psrc="10.0.0.9", hwdst=MAC, pdst="10.0.0.1")
    assert resolve(rig, "10.0.0.9") == (number(PEER), []) == resolve(rig, "10.0.0.9", worker=1)
    arp(rig, op=1, hwsrc=OTHER, psrc="10.0.0.9", pdst="10.0.0.9")      # gratuitous: it moved
    assert resolve(rig, "10.0.0.9") == (number(OTHER), [])


def test_old_neighbour_is_polled_then_forgotten() -> None:
    rig = Rig()
    arp(rig, op=1, hwsrc=PEER, psrc="10.0.0.9", pdst="10.0.0.1")
    rig.advance(31)
    mac, (question,) = resolve(rig, "10.0.0.9")
    assert mac == number(PEER) and Ether(question).dst == PEER
    assert resolve(rig, "10.0.0.9") == (number(PEER), [])
    rig.advance(90)
    mac, (question,) = resolve(rig, "10.0.0.9")
    assert mac == -1 and Ether(question).dst == BROADCAST


def test_solicitation_is_answered_and_the_asker_learned() -> None:
    rig = Rig()
    for source, target in (("fd00::9", "fd00::1"), ("fe80::9", "fe80::1")):
        verdict, (answer,) = nd(rig, IPv6(src=source, dst="ff02::1:ff00:1", hlim=255) / ICMPv6ND_NS(tgt=target)
                                / ICMPv6NDOptSrcLLAddr(lladdr=OTHER), flags=L.PF_MULTICAST)
        assert verdict == -ledger.NEIGHBOUR
        assert answer == bytes(Ether(src=MAC, dst=OTHER) / IPv6(src=target, dst=source, hlim=255)
                               / ICMPv6ND_NA(R=0, S=1, O=1, tgt=target) / ICMPv6NDOptDstLLAddr(lladdr=MAC))
        assert resolve(rig, source) == (number(OTHER), [])
    rig.check_guards()


def test_duplicate_address_detection_is_answered_to_all() -> None:
    question = IPv6(src="::", dst="ff02::1:ff00:1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1")
    verdict, (answer,) = nd(Rig(), question, flags=L.PF_MULTICAST)
    assert verdict == -ledger.NEIGHBOUR
    assert answer == bytes(Ether(src=MAC, dst="33:33:00:00:00:01") / IPv6(src="fd00::1", dst="ff02::1", hlim=255)
                           / ICMPv6ND_NA(R=0, S=0, O=1, tgt="fd00::1") / ICMPv6NDOptDstLLAddr(lladdr=MAC))


def test_solicitation_without_option_is_answered_to_the_station() -> None:
    rig = Rig()
    _, (answer,) = nd(rig, IPv6(src="fd00::9", dst="fd00::1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1"))
    assert Ether(answer).dst == PEER
    assert resolve(rig, "fd00::9")[0] == -1     # not learned: RFC 4861 section 7.2.3


@pytest.mark.parametrize(("packet", "flags"), [
    (IPv6(src="fd00::9", dst="fd00::1", hlim=64) / ICMPv6ND_NS(tgt="fd00::1"), 0),
    (IPv6(src="fd00::9", dst="fd00::1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1", code=1), 0),
    (IPv6(src="fd00::9", dst="fd00::1", hlim=255) / ICMPv6ND_NS(tgt="ff02::1"), 0),
    (IPv6(src="fd00::9", dst="fd00::1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1") / Raw(bytes(8)), 0),
    (IPv6(src="fd00::9", dst="fd00::1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1") / Raw(b"\1\2" + bytes(6)), 0),
    (IPv6(src="fd00::9", dst="fd00::1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1"), L.PF_REASSEMBLED),
    (IPv6(src="::", dst="fd00::1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1"), 0),
    (IPv6(src="::", dst="ff02::1:ff00:1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1")
     / ICMPv6NDOptSrcLLAddr(lladdr=OTHER), L.PF_MULTICAST),
    (IPv6(src="fd00::9", dst="ff02::1", hlim=255) / ICMPv6ND_NA(tgt="fd00::9", S=1), L.PF_MULTICAST),
])
def test_bad_discovery(packet: Any, flags: int) -> None:
    assert nd(Rig(), packet, flags) == (-ledger.BAD_NEIGHBOUR, [])


def test_discovery_that_is_none_of_our_business() -> None:
    rig = Rig()
    base = IPv6(src="fd00::9", dst="fd00::1", hlim=255)
    assert nd(rig, base / ICMPv6ND_NS(tgt="fd00::2")) == (-ledger.NEIGHBOUR, [])
    assert nd(rig, base / ICMPv6ND_RA()) == (-ledger.NEIGHBOUR, [])
    assert nd(rig, base / ICMPv6ND_NS(tgt="fd00::1"), vlan=7) == (-ledger.NEIGHBOUR, [])
    unasked = base / ICMPv6ND_NA(tgt="fd00::9", S=1) / ICMPv6NDOptDstLLAddr(lladdr=PEER)
    assert nd(rig, unasked) == (-ledger.NEIGHBOUR, [])
    assert resolve(rig, "fd00::9")[0] == -1


def test_our_solicitation_and_what_its_answers_change() -> None:
    rig = Rig()
    mac, (question,) = resolve(rig, "fd00::12:3456")
    assert mac == -1
    assert question == bytes(
        Ether(src=MAC, dst="33:33:ff:12:34:56") / IPv6(src="fd00::1", dst="ff02::1:ff12:3456", hlim=255)
        / ICMPv6ND_NS(tgt="fd00::12:3456") / ICMPv6NDOptSrcLLAddr(lladdr=MAC))

    def answer(station: str, **flags: int) -> int:
        packet = (IPv6(src="fd00::12:3456", dst="fd00::1", hlim=255) / ICMPv6ND_NA(tgt="fd00::12:3456", **flags)
                  / ICMPv6NDOptDstLLAddr(lladdr=station))
        assert nd(rig, packet)[0] == -ledger.NEIGHBOUR
        return resolve(rig, "fd00::12:3456")[0]

    assert answer(PEER, S=1, O=1) == number(PEER)
    assert answer(OTHER, S=1, O=0) == number(PEER)      # no override
    assert answer(OTHER, S=0, O=1) == number(OTHER)
    rig.advance(31)
    mac, (poll,) = resolve(rig, "fd00::12:3456")
    assert (Ether(poll).dst, IPv6(poll[14:]).dst) == (OTHER, "fd00::12:3456")
    bare = IPv6(src="fd00::12:3456", dst="fd00::1", hlim=255) / ICMPv6ND_NA(tgt="fd00::12:3456", S=1, O=1)
    assert nd(rig, bare) == (-ledger.NEIGHBOUR, [])
    rig.advance(29)
    assert resolve(rig, "fd00::12:3456") == (number(OTHER), [])


def test_link_local_is_asked_from_link_local() -> None:
    _, (question,) = resolve(Rig(), "fe80::9")
    assert IPv6(question[14:]).src == "fe80::1"


def test_more_neighbours_than_room_push_out_unanswered_first() -> None:
    rig = Rig()
    arp(rig, op=1, hwsrc=PEER, psrc="10.0.0.9", pdst="10.0.0.1")
    for host in range(10, 250):
        resolve(rig, f"10.0.0.{host}")
    rig.sent()
    assert resolve(rig, "10.0.0.9") == (number(PEER), [])
    rig.check_guards()


def test_locked_entry_is_left_alone_and_repaired() -> None:
    rig = Rig()
    resolve(rig, "10.0.0.9")
    table = rig.get(rig.table + L.T_NEIGHBOURS)
    entry = next(at for at in range(table, table + 64 * L.NB_BYTES, L.NB_BYTES) if rig.get(at + L.NB_NIF))
    rig.put(entry + L.NB_LOCK, 77)                              # somebody died here,
    rig.put(entry + L.NB_VERSION, rig.get(entry + L.NB_VERSION) + 1)    # in the middle of it
    arp(rig, op=2, hwsrc=PEER, psrc="10.0.0.9", hwdst=MAC, pdst="10.0.0.1")
    rig.advance(5)
    assert resolve(rig, "10.0.0.9") == (-1, [])                 # no lock, no note, no question
    assert neighbour_repair(rig.mem, rig.table, 78, 1) == 0
    assert neighbour_repair(rig.mem, rig.table, 77, 1) == 1
    assert rig.get(entry + L.NB_LOCK) == 0 and rig.get(entry + L.NB_VERSION) % 2 == 0
    assert len(resolve(rig, "10.0.0.9")[1]) == 1


@settings(max_examples=200)
@given(st.binary(max_size=80), st.booleans())
def test_any_arp_stays_inside(shared: Rig, data: bytes, plausible: bool) -> None:
    rig = shared
    body = bytes.fromhex("0001080006040001") + data if plausible else data
    rig.describe(bytes(Ether(src=PEER, dst=BROADCAST, type=0x806)) + body, link=L.LINK_ETHERNET)
    assert kernels.arp_input(rig.mem, rig.w, rig.ethernet, rig.p) in (-ledger.ARP, -ledger.BAD_ARP)
    rig.sent()
    rig.check_guards()
