"""README.md is true: its Python runs as printed, its commands do what the text around them says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dataplane import cli_demo
from tests.netns import Namespace, veth

pytestmark = pytest.mark.timeout(500)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMPILING = 280.0       # the first start of a session may have to compile
SECONDS = 60.0


@dataclass(frozen=True)
class Block:
    """A fenced block, and the heading above it."""

    section: str
    language: str
    text: str


def blocks() -> list[Block]:
    found, section = [], ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w*)\n(.*?)^```$", README, re.M | re.S):
        if match[1]:
            section = match[1]
        else:
            found.append(Block(section, match[2], match[3]))
    return found


def commands(section: str) -> list[str]:
    """The shell commands under a heading, without their comments."""
    lines = "".join(one.text for one in blocks() if one.language == "sh" and one.section == section).splitlines()
    assert lines, f"no commands under {section!r}"
    return [re.sub(r"\s+#.*", "", line) for line in lines]


PYTHON = [one.text for one in blocks() if one.language == "python"]

# Commands that run until Ctrl-C, and what they say when they have begun.
LASTING = {
    r"dataplane run": r"^ready \w+$",
    r"dataplane stat \w+ --watch": r"offered/s",
    r"examples/(udp_echo|tcp_echo|http_server)\.py": r"^listening at ",
    r"workers\.consumers count": r"^attached: ",
}

# Commands that end, and what they print.
ENDING = {
    r"^ping -c 3 ": r" 0% packet loss",
    r"^echo hello \| (nc|socat) .*7777$": r"^hello$",
    r"^echo hello \| socat .*:9$": r"Connection refused",
    r"^curl -s ": r"^100000000$",
    r"dataplane ss tun$": r"udp .*:7777",
    r"dataplane ss quickstart$": r"^kind ",
    r"dataplane stat quickstart$": r"; balanced",
    r"^ip -br link$": r"^eth0",
    r"examples/tap_to_pcap\.py": r"^wrote 100 frames",
}


class Terminals:
    """Carries out commands as a user would, in several terminals; each lasting one gets its Ctrl-C at the end."""

    def __init__(self, directory: Path, prefix: Sequence[str] = ()) -> None:
        self._directory, self._prefix = directory, prefix
        self._lasting: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def type(self, command: str) -> None:
        """Enter it; when this returns it has ended, or begun."""
        for pattern, expected in LASTING.items():
            if re.search(pattern, command):
                self._begin(command, expected)
                return
        for pattern, expected in ENDING.items():
            if re.search(pattern, command):
                done = subprocess.run(self._words(command), cwd=self._directory, env=self._environment, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
                assert re.search(expected, done.stdout, re.M), f"{command}\n{done.stdout}"
                return
        pytest.fail(f"README.md has a command that this test does not know: {command}")

    def _words(self, command: str) -> list[str]:
        """The installed commands are those of this tree; we are root already."""
        command = command.removeprefix("sudo ")
        here = {".venv/bin/dataplane": f"{sys.executable} -m dataplane", ".venv/bin/python": sys.executable,
                "configs/": f"{ROOT}/configs/", "examples/": f"{ROOT}/examples/"}
        command = re.sub(r"(?<!\S)(\.venv/bin/\w+|configs/|examples/)", lambda match: here[match[1]], command)
        return [*self._prefix, "sh", "-c", command]

    def _begin(self, command: str, expected: str) -> None:
        output = self._directory / f"output{len(self._lasting)}"
        words = self._words(command)
        words[-1] = f"exec {words[-1]}"
        with output.open("wb") as file:
            process = subprocess.Popen(words, cwd=self._directory, env=self._environment, stdin=subprocess.DEVNULL,
                                       stdout=file, stderr=subprocess.STDOUT)
        self._lasting.append((command, process, output))
        deadline = time.monotonic() + COMPILING
        while not re.search(expected, output.read_text(), re.M):
            assert process.poll() is None, f"{command}\n{output.read_text()}"
            assert time.monotonic() < deadline, f"{command}\n{output.read_text()}"
            time.sleep(0.02)

    def leave(self) -> None:
        """Ctrl-C, the last one first: all end well, and every ledger is balanced."""
        while self._lasting:
            command, process, output = self._lasting.pop()
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(SECONDS) == 0, f"{command}\n{output.read_text()}"
            finally:
                process.kill()
            said = output.read_text()
            assert "Traceback" not in said, f"{command}\n{said}"
            assert "dataplane run" not in command or re.search(r"; balanced$", said, re.M), said

    def close(self) -> None:
        """Whatever has happened."""
        for _, process, _ in self._lasting:
            process.kill()
            process.wait()


@contextlib.contextmanager
def terminals(directory: Path, prefix: Sequence[str] = ()) -> Iterator[Terminals]:
    here = Terminals(directory, prefix)
    try:
        yield here
        here.leave()
    finally:
        here.close()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminals]:
    """The quickstart as the README starts it; on one core on a machine that has no other."""
    directory = tmp_path_factory.mktemp("quickstart")
    launched = cli_demo.launch(directory)
    if launched.name != "quickstart":
        pytest.skip("a dataplane of the name quickstart runs here")
    with terminals(directory) as here:
        command, = (one for one in commands("Three lines of Python") if "dataplane run" in one)
        assert command == ".venv/bin/dataplane run configs/quickstart.toml"
        here.type(command.replace("configs/quickstart.toml", str(launched.config)).replace(f"{ROOT}/", ""))
        yield here


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_runs_as_printed(quickstart: Terminals, number: int) -> None:
    done = subprocess.run([sys.executable, "-c", PYTHON[number]], capture_output=True, text=True, timeout=COMPILING,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr
    if number == 0:
        assert len(PYTHON[0].splitlines()) == 3
        assert re.match(r"\(b'.*', \('[0-9a-f.:]+', \d+\)\)$", done.stdout)


def test_quickstart(quickstart: Terminals) -> None:
    for command in commands("Three lines of Python"):
        if "dataplane run" not in command:
            quickstart.type(command)


@pytest.mark.root
@pytest.mark.live
@pytest.mark.needs("ip", "ping", "nc", "socat")
def test_an_interface_of_its_own(tmp_path: Path) -> None:
    with Namespace() as here, terminals(tmp_path, ("ip", "netns", "exec", here.name)) as user:
        for command in commands("Live: an interface of its own"):
            user.type(command)


@pytest.mark.root
@pytest.mark.live
@pytest.mark.needs("ip", "ping")
def test_watching_an_interface(tmp_path: Path) -> None:
    with Namespace() as here, Namespace() as there:
        device, _ = veth(here, there, ["10.9.0.1/24"], ["10.9.0.2/24"])
        here.ip("link", "set", device, "down")
        here.ip("link", "set", device, "name", "eth0", "up")    # as configs/capture.toml has it
        traffic = here.popen(["ping", "-q", "-i", "0.01", "10.9.0.2"], stdout=subprocess.DEVNULL)
        try:
            with terminals(tmp_path, ("ip", "netns", "exec", here.name)) as user:
                for command in commands("Live: watching an interface"):
                    user.type(command)
        finally:
            traffic.kill()
            traffic.wait()


def test_the_two_commands() -> None:
    """`make demo` and `make test`, which are their own tests."""
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("Two commands"):
        word, target = command.split()
        assert word == "make" and re.search(rf"^{target}:", makefile, re.M)


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_headings_that_are_linked_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
                    for line in re.findall(r"^#+ (.+)$", text, re.M)}
        for anchor in re.findall(r"\]\(#([^)]+)\)", text):
            assert anchor in headings, f"{page.name}: #{anchor}"
