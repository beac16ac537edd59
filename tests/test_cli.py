"""The command line as a user meets it: what it prints, and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.control.messages import SocketInfo
from tests.workers.rig import ROOT, Running, bind, wait_for

pytestmark = pytest.mark.timeout(300)


def dataplane(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dataplane", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


@pytest.fixture(scope="module")
def dp() -> Iterator[Running]:
    with Running(count=500, start=2) as running:
        yield running


def test_ss_and_stat(dp: Running) -> None:
    connection, _ = dp.attach()
    with connection:
        bound = bind(connection, kind="udp", address="10.0.0.1", port=5000)
        bind(connection, kind="raw", proto=17, reuseport=True)
        wait_for(lambda: dp.stats()["offered"] == 500, "all packets")
        listed = json.loads(dataplane("ss", dp.name, "--json").stdout)
        assert [one["pcb"] for one in listed][:1] == [bound.pcb]
        assert set(listed[0]) >= set(SocketInfo.__struct_fields__) - {"type"}
        assert listed[0]["pid"] == os.getpid() and listed[0]["local"] == ["10.0.0.1", 5000]
        shown = dataplane("ss", dp.name).stdout
        assert "10.0.0.1:5000" in shown and "raw 17" in shown and "reuseport" in shown
        told = json.loads(dataplane("stat", dp.name, "--json").stdout)
        assert told["offered"] == 500 and told["balanced"] and told["delivered"] == 500
        assert told == told | {"dropped": {}, "sockets": 2, "consumers": 1}
        shown = dataplane("stat", dp.name).stdout
        assert "synthetic" in shown and "500" in shown and "balanced" in shown
        watcher = subprocess.Popen([sys.executable, "-m", "dataplane", "stat", dp.name, "--watch", "--json"],
                                   cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert watcher.stdout is not None and json.loads(watcher.stdout.readline())["name"] == dp.name
    assert dp.wait() == 0
    watcher.stdout.read()
    assert watcher.wait(30) == 0        # it ends with the dataplane
    watcher.stdout.close()


@pytest.mark.parametrize("arguments", [("ss", "no-such"), ("stat", "no-such"), ("stat", "no-such", "--watch")])
def test_an_unknown_dataplane(arguments: tuple[str, ...]) -> None:
    done = dataplane(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("dataplane: no dataplane 'no-such'") and done.stderr.count("\n") == 1


def test_wrong_arguments() -> None:
    assert dataplane("fly").returncode == 2
    assert dataplane("run").returncode == 2
    done = dataplane("run", "/nowhere.toml")
    assert done.returncode == 2 and "/nowhere.toml" in done.stderr


def test_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    config = ROOT / "configs" / "synthetic.toml"
    done = dataplane("run", str(config), "--ledger", str(tmp_path / "no" / "such.json"))
    assert done.returncode == 2 and "--ledger" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.root
@pytest.mark.needs("unshare", "mount")
@pytest.mark.parametrize("command", ["check", "run"])
def test_shared_memory_that_is_too_small(tmp_path: Path, command: str) -> None:
    """In a mount namespace with a /dev/shm of its own."""
    config = tmp_path / "large.toml"
    config.write_text('name = "large"\n[sockets]\nmax = 100000\n[[netif]]\nkind = "synthetic"\n')
    script = (f"mount -t tmpfs -o size=1m tmpfs /dev/shm && {sys.executable} -m dataplane {command} {config}; "
              "code=$?; ls /dev/shm; exit $code")
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    message = r"dataplane: \S+large\.toml:3: sockets\.max: 100000: needs \d{7,} bytes in /dev/shm, 1048576 bytes are "
    assert re.search(message, done.stderr), done.stderr


def test_clean_with_nothing_to_do() -> None:
    done = dataplane("clean", "no-such")
    assert (done.returncode, done.stdout) == (0, "nothing to remove\n")


def test_doctor() -> None:
    done = dataplane("doctor", str(ROOT / "configs" / "synthetic.toml"))
    assert done.returncode == 0
    for word in ("CAP_NET_ADMIN", "/dev/net/tun", "/dev/shm", "netif synthetic", "synthetic: table", "fits"):
        assert word in done.stdout
    wrong = dataplane("doctor", "/nowhere.toml")
    assert wrong.returncode == 2


@pytest.mark.parametrize("name", ["quickstart", "synthetic"])
def test_configurations_are_right(name: str) -> None:
    if name == "quickstart" and not {0, 1} <= os.sched_getaffinity(0):
        pytest.skip("cores 0 and 1 are not available")
    done = dataplane("check", str(ROOT / "configs" / f"{name}.toml"))
    assert (done.returncode, done.stderr) == (0, "")
