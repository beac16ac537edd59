"""The examples run as their first lines say, and end by themselves."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.utils import RawPcapReader

from tests.dataplane_fixture import Running, running
from tests.netns import Namespace

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

TUN = f"""
[rx]
cores = [{min(os.sched_getaffinity(0))}]
idle = "adaptive"
[[netif]]
kind = "tun"
device = "dpt0"
addresses = ["10.77.0.1/24", "fd77::1/64"]
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


# -- TCP, with the kernel of this machine as the client --------------------------------------------------------


@pytest.fixture(scope="module")
def tun() -> Iterator[Running]:
    with Namespace() as namespace, namespace.entered(), running(TUN) as process:
        yield process


@contextlib.contextmanager
def server(name: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """An example that serves, from when it listens; ended by Ctrl-C if it has not ended by itself."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    try:
        assert "listening at" in process.stdout.readline()
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def finished(process: subprocess.Popen[str]) -> str:
    """What it printed since, when it has ended by itself."""
    assert process.stdout is not None
    assert process.wait(30) == 0
    return process.stdout.read()


@pytest.mark.root
@pytest.mark.live
@pytest.mark.needs("ip")
def test_tcp_echo(tun: Running) -> None:
    with server("tcp_echo", tun.name, "--count", 2) as process:
        for family, host in ((socket.AF_INET, "10.77.0.1"), (socket.AF_INET6, "fd77::1")):
            with socket.socket(family, socket.SOCK_STREAM) as peer:
                peer.settimeout(20)
                peer.connect((host, 7777))
                peer.sendall(b"one\ntwo\nthree")
                peer.shutdown(socket.SHUT_WR)
                with peer.makefile("rb") as lines:
                    assert lines.read() == b"one\ntwo\nthree"
        assert "echoed 6 lines to 2 clients" in finished(process)


@pytest.mark.root
@pytest.mark.live
@pytest.mark.needs("ip", "curl")
def test_http_server(tun: Running, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "file.bin").write_bytes(os.urandom(3_000_000))
    (tmp_path / "secret").write_text("not to be seen")
    base = "http://10.77.0.1:8080"
    with server("http_server", tun.name, "--directory", tmp_path / "site"):
        def curl(*words: str) -> str:
            return subprocess.run(["curl", "-sS", "--max-time", "30", *words], capture_output=True, text=True,
                                  check=True).stdout

        got = tmp_path / "got"
        assert 'href="/file.bin"' in curl(f"{base}/")
        curl("-o", str(got), f"{base}/file.bin")
        assert got.read_bytes() == (tmp_path / "site" / "file.bin").read_bytes()
        report = curl("-o", str(got), f"{base}/bytes/20000000", "-o", os.devnull, f"{base}/bytes/10",
                      "-w", "%{http_code} %{size_download} %{num_connects}\n")
        assert report.splitlines() == ["200 20000000 1", "200 10 0"]     # the second on the first one's connection
        data = got.read_bytes()
        assert data == (bytes(range(256)) * (len(data) // 256 + 1))[:len(data)]
        assert "404" in curl("-o", os.devnull, "-w", "%{http_code}", "--path-as-is", f"{base}/../secret")
        assert "404" in curl("-o", os.devnull, "-w", "%{http_code}", f"{base}/%2e%2e/secret")


@pytest.mark.root
@pytest.mark.live
@pytest.mark.needs("ip")
def test_tcp_sink(tun: Running) -> None:
    with server("tcp_sink", tun.name, "--count", 1, "--seconds", 60) as process:
        with socket.create_connection(("10.77.0.1", 7778), 20) as peer:
            for _ in range(64):
                peer.sendall(bytes(1 << 20))
        assert f"received {64 << 20} bytes from 1 clients" in finished(process)


NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def test_every_example_is_tried() -> None:
    assert NAMES and all(f"test_{name}" in globals() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str) -> None:
    assert "--seconds" in example(name, "--help")
