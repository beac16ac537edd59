"""The consumers that come with the project, against what scapy reads from the quickstart's capture."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from scapy.layers.dns import DNS
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from scapy.utils import RawPcapReader

from tests.dataplane_fixture import running
from tests.netns import Namespace
from workers import consumers

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).parents[2]
CAPTURE = ROOT / "configs" / "quickstart.pcap"
CORE = min(os.sched_getaffinity(0))
RX = f'[rx]\ncores = [{CORE}]\nidle = "poll"\n[sockets]\nmax = 64\n'
ONCE = RX + """[[netif]]
kind = "pcap"
path = "{path}"
pace = "fast"
start = {start}
[[access]]
uid = "owner"
allow = ["udp:53"]
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "workers.consumers", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> str:
    """Its output, when it has ended by itself, well."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors == ""
    return output


def frames() -> list[bytes]:
    with RawPcapReader(str(CAPTURE)) as reader:
        return [data for data, _ in reader]


def first_fragments(port: int) -> list[Packet]:
    """UDP datagrams to `port`: their first fragments, or all of them."""
    packets = [Ether(frame) for frame in frames()]
    return [one for one in packets if UDP in one and one[UDP].dport == port and (IP not in one or one[IP].frag == 0)]


def test_count_dns() -> None:
    with running(ONCE.format(path=CAPTURE, start=1)) as dp:
        output = end(start("count", dp.name, "--udp", 53, "--dns", "--json", "--every", 0.05))
        dp.wait()
    reports = [json.loads(line) for line in output.splitlines()]
    assert [reports[0]["event"], reports[-1]["event"]] == ["attached", "ended"]
    packets = first_fragments(53)
    questions = [packet[DNS].qd[0] for packet in packets]
    names = Counter(question.qname.decode().rstrip(".") for question in questions)
    last = reports[-1]
    assert last["packets"] == len(packets) and last["bytes"] == sum(packet[UDP].len - 8 for packet in packets)
    assert last["types"] == Counter(consumers.TYPES[question.qtype] for question in questions)
    assert [*last["names"].values()] == [count for _, count in names.most_common(consumers.TOP)]
    assert all(names[name] == count for name, count in last["names"].items())


def test_a_pair_shares_the_flows() -> None:
    """One port, two consumers: together they get everything, and no sensor's reports go to both."""
    flows = Counter((packet[IP].src, packet[UDP].sport) for packet in first_fragments(5000))
    with running(ONCE.format(path=CAPTURE, start=2)) as dp:
        pair = [start("count", dp.name, "--udp", "5000", "--reuseport", "--json", "--every", 60) for _ in range(2)]
        reports = [json.loads(end(one).splitlines()[-1]) for one in pair]
        dp.wait()
    assert sum(one["packets"] for one in reports) == flows.total()
    assert sum(one["flows"] for one in reports) == len(flows)


def test_count_frames_and_packets() -> None:
    with running(ONCE.format(path=CAPTURE, start=3)) as dp:
        pair = [start("count", dp.name, "--tap"), start("count", dp.name, "--raw", 1, "--raw", 58)]
        tap, raw = map(end, pair)
        dp.wait()
    everything = frames()
    assert f"ended: {len(everything):,} packets, {sum(map(len, everything)):,} bytes" in tap
    assert re.search(r"^ended: 40 packets", raw, re.M)      # ten pings, answered, of both families


def test_pcap(tmp_path: Path) -> None:
    file = tmp_path / "written.pcap"
    with running(ONCE.format(path=CAPTURE, start=1)) as dp:
        output = end(start("pcap", dp.name, file))
        dp.wait()
    with RawPcapReader(str(file)) as reader:
        assert [data for data, _ in reader] == frames()
    assert f"ended: {len(frames()):,} packets" in output


@pytest.mark.root
@pytest.mark.live
@pytest.mark.needs("ip")
def test_echo() -> None:
    netif = '[[netif]]\nkind = "tun"\ndevice = "dp0"\naddresses = ["10.77.0.1/24"]\n'
    with Namespace() as peer, running(RX + netif, prefix=("ip", "netns", "exec", peer.name)) as dp:
        process = start("echo", dp.name, "--udp", "10.77.0.1:7000-7001", "--packets", 200)
        assert process.stdout is not None and process.stdout.readline() == "attached: 0 packets, 0 bytes\n"
        assert peer.call(echoed, [("10.77.0.1", 7000), ("10.77.0.1", 7001)], 100) == 200
        assert "ended: 200 packets, 2,000 bytes" in end(process)


def echoed(addresses: list[tuple[str, int]], count: int) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(30)
        answered = 0
        for i in range(count):
            for address in addresses:
                sock.sendto(b"%010d" % i, address)
                answered += sock.recvfrom(100) == (b"%010d" % i, address)
    return answered


@pytest.mark.parametrize(("arguments", "message"), [
    (("count", "no-such", "--tap"), "count: no dataplane 'no-such'"),
    (("count", "no-such"), "no socket: say --udp, --raw or --tap"),
    (("echo", "no-such", "--udp", "x"), "argument --udp: invalid udp_ports value: 'x'"),
    (("fly", "no-such"), "invalid choice: 'fly'"),
])
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    process = start(*arguments)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and message in errors and "Traceback" not in errors


@pytest.mark.parametrize(("text", "meaning"), [
    ("53", (None, [53])),
    ("5000-5002", (None, [5000, 5001, 5002])),
    ("*", (None, [None])),
    ("10.77.0.1:53", ("10.77.0.1", [53])),
    ("[fd77::1]:53-54", ("fd77::1", [53, 54])),
    ("[::]:*", ("::", [None])),
])
def test_ports(text: str, meaning: tuple[str | None, list[int | None]]) -> None:
    assert consumers.udp_ports(text) == meaning
