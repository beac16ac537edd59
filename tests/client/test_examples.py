"""The examples run as their first lines say, and end by themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.utils import RawPcapReader

from tests.dataplane_fixture import Running, running

ROOT = Path(__file__).parents[2]
CONFIG = f"""
[rx]
cores = [{min(os.sched_getaffinity(0))}]
idle = "poll"
[sockets]
max = 1024
[[netif]]
kind = "pcap"
path = "{ROOT / "configs" / "quickstart.pcap"}"
pace = 2000
loop = 0
[[access]]
uid = "owner"
allow = ["udp:53", "udp:5000-5100", "tap", "raw:*"]
"""


@pytest.fixture(scope="module")
def quickstart() -> Iterator[Running]:
    with running(CONFIG) as process:
        yield process


def example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_dns_counter(quickstart: Running) -> None:
    output = example("dns_counter", quickstart.name, "--count", 500)
    assert "counted 500 messages" in output
    assert re.search(r"^A +\d+ queries +\d+ responses$", output, re.M), output
    counts = [int(number) for number in re.findall(r"(\d+) (?:queries|responses)", output)]
    assert 0 < sum(counts) <= 500


def test_async_receiver(quickstart: Running) -> None:
    output = example("async_receiver", quickstart.name, "--ports", 53, 5000, "--seconds", 1)
    assert re.search(r"^port 53: [1-9]\d* packets, [1-9]\d* bytes$", output, re.M), output


def test_tap_to_pcap(quickstart: Running, tmp_path: Path) -> None:
    file = tmp_path / "frames.pcap"
    assert "wrote 300 frames" in example("tap_to_pcap", quickstart.name, file, "--count", 300)
    with RawPcapReader(str(file)) as reader:
        frames = [(data, meta.wirelen) for data, meta in reader]
    assert len(frames) == 300 and all(len(data) == length > 13 for data, length in frames)
    with RawPcapReader(str(ROOT / "configs" / "quickstart.pcap")) as reader:
        original = {data for data, _ in reader}
    assert all(data in original for data, _ in frames)


def test_udp_echo(quickstart: Running) -> None:
    """Here it has nobody to answer; with a peer it is tried where the tun netif is."""
    output = example("udp_echo", quickstart.name, "--port", 5099, "--seconds", 0.5)
    assert "listening at * port 5099" in output and "echoed 0 datagrams" in output


NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def test_every_example_is_tried() -> None:
    assert NAMES and all(f"test_{name}" in globals() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str) -> None:
    assert "--seconds" in example(name, "--help")
