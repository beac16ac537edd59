"""Configuration files, through the command line: `dataplane check FILE`.

Coverage-guided: the features are the lines of dataplane/config*.py and of the netifs' own checks, in the order in which
they are run (sys.settrace; tomllib and msgspec are not traced).

    the exit code is 0 and nothing is on stderr, or 2 with one line that says where, and what was expected
    nothing else is raised, whatever the file contains
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from dataplane import cli, netif
from dataplane.config import load
from dataplane.errors import ConfigError
from tests.fuzz.engine import Input
from tests.fuzz.mutation import mutate_bytes

__all__ = ["Settings"]

ROOT = Path(__file__).parents[3]
_TRACED = (str(ROOT / "dataplane" / "config"), str(ROOT / "dataplane" / "netif"), str(ROOT / "dataplane" / "cli_load"))
_VALUES = ("0", "-1", "1", "65536", "9223372036854775808", "1e400", "nan", "-0.0", '""', '"x"', '"\\u0000"',
           '"10.0.0.1/24"',
           '"fd00::1/64"', "[]", "[0]", "[0, 0]", "{}", "{ a = 1 }", "true", "1979-05-27", "07:32:00", '"auto"', '"*"',
           '"udp:5000-6000"', "[[]]", "'''\n'''", '"\U0001f600"')
_FULL = """name = "all"
[rx]
cores = "auto"
idle = "busy"
spin_us = 10
[sockets]
max = 64
ring_bytes = 65536
[inet]
fragments = 8
fragment_timeout = 1.5
[tcp]
send_bytes = 65536
[[netif]]
kind = "synthetic"
local_ports = [5000, 5063]
size = "imix"
[[netif]]
kind = "tap"
device = "dp9"
addresses = ["10.77.0.1/24", "fd77::1/64"]
gateway = ["10.77.0.2"]
[[access]]
gid = 0
allow = ["udp:5000-6000", "tcp:[fd77::1]:80", "raw:*"]
"""


class Settings:
    name = "settings"

    def __init__(self) -> None:
        self.kinds = netif.kinds()
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "fuzzed.toml"

    def seeds(self) -> Iterable[Input]:
        return [(_FULL.encode(),), *((path.read_bytes(),) for path in sorted((ROOT / "configs").glob("*.toml")))]

    def mutate(self, dice: random.Random, one: Input, other: Input) -> Input:
        lines = one[0].split(b"\n")
        index, choice = dice.randrange(len(lines)), dice.random()
        theirs = dice.choice(other[0].split(b"\n"))
        if choice < 0.4 and b"=" in lines[index]:
            lines[index] = lines[index].partition(b"=")[0] + b"= " + dice.choice(_VALUES).encode()
        elif choice < 0.55:
            lines.insert(index, theirs)
        elif choice < 0.65:
            del lines[index]
        elif choice < 0.75:
            lines[index] = theirs
        else:
            return (mutate_bytes(dice, one[0], other[0], (0x5B5B, 0x5D5D, 0x3D20, 0x2222, 0x0D0A, 0xFEFF, 0x80)),)
        return (b"\n".join(lines),)

    def run(self, one: Input) -> set[int]:
        self.path.write_bytes(one[0])
        tracer, sentence = _Lines(), ""
        try:
            with tracer:
                load(self.path, self.kinds)
        except ConfigError as error:
            sentence = str(error)
            assert sentence.startswith(f"{self.path}:") and sentence.isprintable(), sentence
            assert " expected " in sentence, sentence
        code, out, err = self._check()
        if sentence:
            assert (code, out, err) == (2, "", f"dataplane: {sentence}\n")
        else:
            assert not code and err == "" and out.startswith("ok "), (code, out, err)
        return tracer.features

    def _check(self) -> tuple[Any, str, str]:
        """Exit code, stdout and stderr of `dataplane check`."""
        out, err, code = io.StringIO(), io.StringIO(), None
        before = sys.argv
        sys.argv = ["dataplane", "check", str(self.path)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = before
        return code, out.getvalue(), err.getvalue()


class _Lines:
    """Collects pairs of lines that were run one after the other in the traced files."""

    def __init__(self) -> None:
        self.features: set[int] = set()

    def __enter__(self) -> None:
        self._last = 0
        sys.settrace(self._call)

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_TRACED) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        here = (sum(map(ord, name)) & 0xFFF) << 12 | frame.f_lineno & 0xFFF
        self.features.add(self._last << 24 | here)
        self._last = here
        return self._line
