"""Configuration: what is accepted, what comes out, and that every error names file, line, key and value."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Meta

from dataplane import config as config_module
from dataplane import config_schema as schema
from dataplane import netif
from dataplane.config import (
    AccessSettings,
    Address,
    Config,
    Context,
    Device,
    FilePath,
    InetSettings,
    Interface,
    NetifSettings,
    Rule,
    RxSettings,
    SocketsSettings,
    TcpSettings,
    load,
    parse,
    parse_interface,
)
from dataplane.config_lines import Lines
from dataplane.config_reference import reference
from dataplane.errors import ConfigError, DataplaneError, SegmentSpaceError

ROOT = Path(__file__).parents[1]


# -- netifs that touch nothing of the machine, with every shape of field that the real ones have ---------


class Tun(NetifSettings, tag="tun"):
    device: Device
    addresses: tuple[Interface, ...] = ()
    host_addresses: tuple[Interface, ...] | Literal["auto"] = "auto"
    mtu: Annotated[int, Meta(ge=576, le=65521, extra={"unit": "bytes"})] = 1500
    gateway: tuple[Address, ...] = ()

    def check(self, where: str, ctx: Context) -> None:
        if self.device == "absent0":
            ctx.error("device", self.device, "an interface of this machine")
        for index, text in enumerate(self.addresses):
            if parse_interface(text).version == 6 and self.mtu < 1280:
                ctx.error(f"{where}.addresses[{index}]", text, "an MTU of 1280 or more for IPv6")


class Pcap(NetifSettings, tag="pcap"):
    path: FilePath
    pace: Annotated[float, Meta(gt=0)] | Literal["recorded", "fast"] = "recorded"
    loop: Annotated[int, Meta(ge=0)] = 1


Port = Annotated[int, Meta(ge=1, le=65535)]


class Synthetic(NetifSettings, tag="synthetic"):
    flows: Annotated[int, Meta(ge=1, le=2**24)] = 1024
    local_ports: tuple[Port, Port] = (5000, 5063)
    size: Annotated[int, Meta(ge=28, le=9000)] | Literal["imix"] = 60
    backpressure: bool = False
    start: int = 1


KINDS = {"tun": Tun, "pcap": Pcap, "synthetic": Synthetic}
LAST = '[[netif]]\nkind = "synthetic"\n'


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four cores, of which this process may use three."""
    monkeypatch.setattr(config_module, "available_cores", lambda: (0, 1, 2))
    monkeypatch.setattr(config_module.psutil, "cpu_count", lambda: 4)


def wrong(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, KINDS, "f.toml")
    assert "\n" not in str(caught.value)
    return caught.value


# -- what comes out --------------------------------------------------------------------------------------


def test_the_defaults() -> None:
    config = parse('name = "edge0"\n' + LAST, KINDS)
    assert config.name == "edge0"
    assert config.cores == (1, 2), "auto leaves the first core to the rest of the system"
    assert (config.rx.idle, config.rx.spin_us) == ("adaptive", 50)
    assert (config.sockets.max, config.sockets.ring_bytes) == (65536, 65536)
    assert (config.sockets.tx_ring_bytes, config.sockets.groups) == (262144, 1024)
    assert (config.inet.fragments, config.inet.fragment_timeout) == (64, 30.0)
    assert (config.inet.icmp_rate, config.inet.neighbours) == (1000, 1024)
    assert (config.tcp.send_bytes, config.tcp.receive_bytes) == (262144, 262144)
    assert (config.tcp.time_wait, config.tcp.time_wait_max) == (60.0, 16384)
    assert (config.tcp.syn_cache, config.tcp.rst_rate) == (4096, 1000)
    assert config.netif == (Synthetic(),) and config.access == ()


def test_auto_takes_the_only_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "available_cores", lambda: (3,))
    assert parse('name = "a"\n' + LAST, KINDS).cores == (3,)


def test_everything_given() -> None:
    config = parse(
        """
        name = "edge0"
        rx = { cores = [2, 0], idle = "poll" }
        sockets.ring_bytes = 4096
        [[netif]]
        kind = "tun"
        device = "dp0"
        addresses = ["10.77.0.1/24", "fd77::1/64"]
        gateway = ["10.77.0.2"]
        [[netif]]
        kind = "pcap"
        path = "/traces/a.pcap"
        pace = 1000
        [[access]]
        uid = "owner"
        allow = ["udp:53"]
        [[access]]
        gid = 0
        allow = []
        """,
        KINDS,
    )
    assert config.cores == (2, 0) and config.sockets.ring_bytes == 4096
    tun, pcap = config.netif
    assert isinstance(tun, Tun) and tun.addresses == ("10.77.0.1/24", "fd77::1/64")
    assert isinstance(pcap, Pcap) and (pcap.path, pcap.pace) == ("/traces/a.pcap", 1000.0)
    owner, group = config.access
    assert (owner.user, owner.group, owner.rules) == (os.geteuid(), None, (Rule("udp", None, 53, 53),))
    assert (group.user, group.group, group.rules) == (None, 0, ())


def test_settings_go_to_workers_and_stay_as_they_are() -> None:
    config = parse('name = "a"\n[[netif]]\nkind = "tun"\ndevice = "dp0"\n', KINDS)
    assert pickle.loads(pickle.dumps(config)) == config
    assert isinstance(hash(config), int)
    with pytest.raises(AttributeError):
        config.name = "b"  # type: ignore[misc]


def test_file_names_start_at_the_configurations_directory(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('name = "a"\n[[netif]]\nkind = "pcap"\npath = "x/a.pcap"\n')
    (pcap,) = load(tmp_path / "c.toml", KINDS).netif
    assert isinstance(pcap, Pcap) and pcap.path == str(tmp_path / "x/a.pcap")


# -- what is refused: text, then line, key, value and what is said about it ------------------------------

HEAD = 'name = "a"\n'
BAD: dict[str, tuple[str, int, str, object, str]] = {
    "name missing": (LAST, 1, "name", None, "missing, expected 1 to 64 letters"),
    "name empty": ('name = ""\n' + LAST, 1, "name", "", "1 to 64 letters"),
    "name with a dot first": ('name = ".a"\n' + LAST, 1, "name", ".a", "not beginning with a dot"),
    "name with a slash": ('name = "a/b"\n' + LAST, 1, "name", "a/b", "1 to 64 letters"),
    "name with an end of line": ('name = "a\\n"\n' + LAST, 1, "name", "a\n", "1 to 64 letters"),
    "name too long": (f'name = "{"x" * 65}"\n' + LAST, 1, "name", "x" * 65, "1 to 64 letters"),
    "name of a wrong type": ("name = 7\n" + LAST, 1, "name", 7, "1 to 64 letters"),
    "unknown key": (
        HEAD + "\n[rx]\nspin_ms = 1\n" + LAST, 4, "rx.spin_ms", 1, 'unknown key, expected "spin_us"',
    ),
    "unknown key, unlike any": (HEAD + "[rx]\nq = 1\n" + LAST, 3, "rx.q", 1, "one of cores, idle, spin_us"),
    "unknown table": (HEAD + "[socket]\nmax = 1\n" + LAST, 2, "socket", {"max": 1}, 'expected "sockets"'),
    "unknown key in quotes": (HEAD + '[rx]\n"a \\n`b" = 1\n' + LAST, 3, 'rx."a \\n`b"', 1, "unknown key"),
    "unknown key in a netif": (HEAD + LAST + "sise = 60\n", 4, "netif[0].sise", 60, 'expected "size"'),
    "unknown key in access": (
        HEAD + LAST + "[[access]]\nuid = 1\nallow = []\ndeny = []\n",
        7, "access[0].deny", [], "one of uid, gid",
    ),
    "table of a wrong type": ("rx = 3\n" + HEAD + LAST, 1, "rx", 3, "expected a table"),
    "wrong type": (
        HEAD + "[rx]\nspin_us = '5'\n" + LAST, 3, "rx.spin_us", "5", "an integer from 0 to 1000000",
    ),
    "bool is no number": (HEAD + "[rx]\nspin_us = true\n" + LAST, 3, "rx.spin_us", True, "an integer"),
    "date": (
        HEAD + "[inet]\nicmp_rate = 2020-01-01\n" + LAST, 3, "inet.icmp_rate", ..., "2020-01-01: expected",
    ),
    "idle": (HEAD + '[rx]\nidle = "lazy"\n' + LAST, 3, "rx.idle", "lazy", '"busy", "adaptive" or "poll"'),
    "core that does not exist": (
        HEAD + "[rx]\ncores = [\n  0,\n  7,\n]\n" + LAST, 5, "rx.cores[1]", 7, "a core of this machine (0-3)",
    ),
    "core outside the affinity": (
        HEAD + "[rx]\ncores = [0, 3]\n" + LAST, 3, "rx.cores[1]", 3, "within this process's affinity (0-2)",
    ),
    "core twice": (HEAD + "[rx]\ncores = [1, 1]\n" + LAST, 3, "rx.cores[1]", 1, "each core once"),
    "core negative": (HEAD + "[rx]\ncores = [-1]\n" + LAST, 3, "rx.cores[0]", -1, "a core's number"),
    "core as a string": (HEAD + '[rx]\ncores = ["0"]\n' + LAST, 3, "rx.cores[0]", "0", "a core's number"),
    "no core": (HEAD + "[rx]\ncores = []\n" + LAST, 3, "rx.cores", [], 'a list of cores or "auto"'),
    "cores, another word": (HEAD + '[rx]\ncores = "all"\n' + LAST, 3, "rx.cores", "all", 'or "auto"'),
    "ring size": (
        HEAD + "[sockets]\nring_bytes = 65000\n" + LAST, 3, "sockets.ring_bytes", 65000,
        "a power of two from 4096 to 1073741824",
    ),
    "ring too small": (
        HEAD + "sockets.ring_bytes = 2048\n" + LAST, 2, "sockets.ring_bytes", 2048, "from 4096",
    ),
    "ring too large": (
        HEAD + "sockets.ring_bytes = 2147483648\n" + LAST, 2, "sockets.ring_bytes", 2**31, "to 1073741824",
    ),
    "tx ring too small": (
        HEAD + "sockets.tx_ring_bytes = 131072\n" + LAST, 2, "sockets.tx_ring_bytes", 131072, "from 262144",
    ),
    "no sockets": (HEAD + "sockets.max = 0\n" + LAST, 2, "sockets.max", 0, "an integer from 1 to 2097152"),
    "too many sockets": (HEAD + "sockets.max = 2097153\n" + LAST, 2, "sockets.max", 2097153, "to 2097152"),
    "buffer not a power of two": (
        HEAD + "tcp.send_bytes = 5000\n" + LAST, 2, "tcp.send_bytes", 5000, "a power of two from 4096 to 1073741824",
    ),
    "buffer too small": (
        HEAD + "tcp.receive_bytes = 2048\n" + LAST, 2, "tcp.receive_bytes", 2048, "a power of two from 4096",
    ),
    "time_wait zero": (HEAD + "tcp.time_wait = 0\n" + LAST, 2, "tcp.time_wait", 0, "above 0"),
    "timeout zero": (HEAD + "inet.fragment_timeout = 0\n" + LAST, 2, "inet.fragment_timeout", 0, "above 0"),
    "timeout nan": (
        HEAD + "inet.fragment_timeout = nan\n" + LAST, 2, "inet.fragment_timeout", ..., "above 0",
    ),
    "neighbours": (HEAD + "inet.neighbours = 1000\n" + LAST, 2, "inet.neighbours", 1000, "a power of two"),
    "no netif": (HEAD, 1, "netif", None, "missing, expected at least one [[netif]] table"),
    "netif not an array": (
        HEAD + '[netif]\nkind = "tun"\n', 2, "netif", {"kind": "tun"}, "at least one [[netif]]",
    ),
    "netif of other things": (HEAD + "netif = [1]\n", 2, "netif", [1], "at least one [[netif]] table"),
    "kind missing": (HEAD + "[[netif]]\n", 2, "netif[0].kind", None, "one of pcap, synthetic, tun"),
    "kind unknown": (HEAD + '[[netif]]\nkind = "tub"\n', 3, "netif[0].kind", "tub", 'expected "tun"'),
    "kind of a wrong type": (
        HEAD + "[[netif]]\nkind = 1\n", 3, "netif[0].kind", 1, "one of pcap, synthetic, tun",
    ),
    "device missing": (
        HEAD + LAST + '[[netif]]\nkind = "tun"\n', 4, "netif[1].device", None, "missing, expected an",
    ),
    "device too long": (
        HEAD + f'[[netif]]\nkind = "tun"\ndevice = "{"d" * 16}"\n', 4, "netif[0].device", "d" * 16,
        "1 to 15 characters",
    ),
    "device that does not exist": (
        HEAD + '[[netif]]\nkind = "tun"\ndevice = "absent0"\n', 4, "netif[0].device", "absent0",
        "an interface of this machine",
    ),
    "device twice": (
        HEAD + '[[netif]]\nkind = "tun"\ndevice = "dp0"\n' * 2,
        7, "netif[1].device", "dp0", "already netif[0]'s",
    ),
    "address no address": (
        HEAD + '[[netif]]\nkind = "tun"\ndevice = "d"\naddresses = ["10.0.0.256/24"]\n', 5,
        "netif[0].addresses[0]", "10.0.0.256/24", "such as 10.77.0.1/24",
    ),
    "address without prefix": (
        HEAD + '[[netif]]\nkind = "tun"\ndevice = "d"\naddresses = [\n"10.0.0.1/24",\n"10.0.0.2"]\n', 7,
        "netif[0].addresses[1]", "10.0.0.2", "with its prefix length",
    ),
    "address already taken": (
        HEAD + '[[netif]]\nkind = "tun"\ndevice = "d"\naddresses = ["fd77::1/64"]\n'
        '[[netif]]\nkind = "tun"\ndevice = "e"\naddresses = ["fd77:0::1/48"]\n', 9,
        "netif[1].addresses[0]", "fd77:0::1/48", "address already taken by netif[0]",
    ),
    "a netif's own check, key whole": (
        HEAD + '[[netif]]\nkind = "tun"\ndevice = "d"\nmtu = 600\naddresses = ["fd77::1/64"]\n', 6,
        "netif[0].addresses[0]", "fd77::1/64", "1280 or more",
    ),
    "size": (HEAD + LAST + "size = 27\n", 4, "netif[0].size", 27, 'an integer from 28 to 9000 or "imix"'),
    "size, another word": (HEAD + LAST + 'size = "mix"\n', 4, "netif[0].size", "mix", 'or "imix"'),
    "size as a fraction": (HEAD + LAST + "size = 60.5\n", 4, "netif[0].size", 60.5, "an integer from 28"),
    "start beyond 64 bits": (HEAD + LAST + f"start = {2**64}\n", 4, "netif[0].start", 2**64, "an integer"),
    "one port": (HEAD + LAST + "local_ports = [5000]\n", 4, "netif[0].local_ports", [5000], "a list of 2"),
    "port": (HEAD + LAST + "local_ports = [1, 65536]\n", 4, "netif[0].local_ports[1]", 65536, "1 to 65535"),
    "pace": (
        HEAD + '[[netif]]\nkind = "pcap"\npath = "a"\npace = -1\n', 5, "netif[0].pace", -1,
        'a number above 0 or "recorded" or "fast"',
    ),
    "path with a zero byte": (
        HEAD + '[[netif]]\nkind = "pcap"\npath = "a\\u0000b"\n',
        4, "netif[0].path", "a\0b", "the name of a file",
    ),
    "neither uid nor gid": (
        HEAD + LAST + "[[access]]\nallow = []\n", 4, "access[0]", None, "expected uid or gid",
    ),
    "both uid and gid": (
        HEAD + LAST + "[[access]]\nuid = 1\ngid = 1\nallow = []\n",
        6, "access[0].gid", 1, "either uid or gid",
    ),
    "unknown user": (
        HEAD + LAST + '[[access]]\nuid = "no such user"\nallow = []\n', 5, "access[0].uid", "no such user",
        'a user of this machine or "owner"',
    ),
    "unknown group": (
        HEAD + LAST + '[[access]]\ngid = "owner?"\nallow = []\n',
        5, "access[0].gid", "owner?", "a group of this",
    ),
    "uid negative": (HEAD + LAST + "[[access]]\nuid = -1\nallow = []\n", 5, "access[0].uid", -1, "from 0"),
    "allow missing": (
        HEAD + LAST + "[[access]]\nuid = 1\n", 4, "access[0].allow", None, "missing, expected a list",
    ),
    "rule": (
        HEAD + LAST + '[[access]]\nuid = 1\nallow = ["tap",\n\n"sctp:1"]\n',
        8, "access[0].allow[1]", "sctp:1",
        "a rule such as",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    text, line, key, value, said = BAD[case]
    error = wrong(text)
    assert (error.source, error.line, error.key) == ("f.toml", line, key), str(error)
    assert value is ... or error.value == value
    assert said in str(error)
    assert str(error).startswith(f"f.toml:{line}: {key}: ")


def test_the_whole_message() -> None:
    error = wrong(HEAD + "[rx]\ncores = [0, 7]\n" + LAST)
    assert str(error) == "f.toml:3: rx.cores[1]: 7: expected a core of this machine (0-3)"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('name = "a"\nrx = \n', 2),
        ('name = "a"\nname = "b"\n\n\n', 2),
        ('name = "a"\nname = "b"', 2),
        ('name = "a', 1),
        ("[rx\ncores = 1\n", 1),
        ("", 1),
    ],
)
def test_not_toml(text: str, line: int) -> None:
    error = wrong(text)
    assert (error.source, error.line) == ("f.toml", line)


def test_too_deep_and_too_long_are_errors_like_others() -> None:
    assert "expected valid TOML" in str(wrong("a = " + "[" * 100_000 + "]" * 100_000))
    assert "expected valid TOML" in str(wrong("a = " + "1" * 10_000))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"\n')
    for name, said in (("absent.toml", "No such file"), ("latin.toml", "not UTF-8"), (".", "Is a directory")):
        with pytest.raises(ConfigError, match=said):
            load(tmp_path / name, KINDS)


# -- any text at all -------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["name", "rx", "cores", "idle", "sockets", "max", "ring_bytes", "inet", "netif", "kind", "size", "access"]
    + ["uid", "allow", "path", "pace", "device", "addresses", "local_ports"]
)
SCALARS = (
    st.none().map(lambda _: "auto")
    | st.sampled_from(["tun", "pcap", "synthetic", "imix", "10.0.0.1/8", "a"])
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


def toml(value: object) -> str:
    """Write a value as TOML, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _quoted(text: str) -> str:
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.dumps(whole, ensure_ascii=False).replace("\x7f", "\\u007f")


@given(st.dictionaries(WORDS, VALUES, max_size=6), st.booleans())
def test_any_value_is_accepted_or_explained(data: dict[str, Any], plausible: bool) -> None:
    if plausible:
        data = {"name": "a", **data, "netif": [{"kind": "synthetic"}]}
    text = "".join(f"{key} = {toml(value)}\n" for key, value in data.items())
    try:
        parse(text, KINDS, "f.toml")
    except ConfigError as error:
        assert str(error).startswith("f.toml:") and "expected" in str(error)
        assert "\n" not in str(error) and 1 <= (error.line or 0) <= max(1, len(data))


@given(st.text())
def test_any_text_is_refused_in_one_line(text: str) -> None:
    assert "f.toml" in str(wrong(text))


cores = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
POWERS = st.integers(18, 30).map(lambda exponent: 2**exponent)


@given(
    st.from_regex(r"\A[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}\Z"),
    cores,
    POWERS,
    st.integers(28, 9000) | st.just("imix"),
    st.booleans(),
)
def test_round_trip(name: str, cores: list[int], ring: int, size: int | str, backpressure: bool) -> None:
    one = {"kind": "synthetic", "size": size, "backpressure": backpressure}
    data = {"name": name, "rx": {"cores": cores}, "sockets": {"tx_ring_bytes": ring}, "netif": [one]}
    config = parse("".join(f"{key} = {toml(value)}\n" for key, value in data.items()), KINDS)
    assert (config.name, list(config.cores), config.sockets.tx_ring_bytes) == (name, cores, ring)
    written = msgspec.to_builtins(config)
    assert parse("".join(f"{key} = {toml(value)}\n" for key, value in written.items()), KINDS) == config


# -- rules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("udp:5000-6000", Rule("udp", None, 5000, 6000)),
        ("tcp:8080", Rule("tcp", None, 8080, 8080)),
        ("udp:10.0.0.1:53", Rule("udp", "10.0.0.1", 53, 53)),
        ("udp:[fd77:0::1]:53", Rule("udp", "fd77::1", 53, 53)),
        ("connect:443", Rule("connect", None, 443, 443)),
        ("connect:[fd77::1]:1-1023", Rule("connect", "fd77::1", 1, 1023)),
        ("tcp:[::]:*", Rule("tcp", "::", 0, 65535)),
        ("udp:*", Rule("udp", None, 0, 65535)),
        ("raw:1", Rule("raw", None, 1, 1)),
        ("raw:*", Rule("raw", None, 0, 255)),
        ("tap", Rule("tap", None, 0, 0)),
        ("*", Rule("*")),
    ],
)
def test_rules(text: str, rule: Rule) -> None:
    assert Rule.parse(text) == rule
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "udp",
        "udp:",
        "udp:0",
        "udp:65536",
        "udp:6-5",
        "udp:5-",
        "udp:-5",
        "udp: 5",
        "udp:5 ",
        "UDP:5",
        "tap:1",
    ]
    + [
        "udp:10.0.0:53",
        "udp:10.0.0.1",
        "udp:fd77::1:53",
        "udp:[10.0.0.1]:53",
        "udp:[fd77::1:53",
        "udp:[::1%lo]:5",
    ]
    + [
        "raw",
        "raw:0",
        "raw:256",
        "raw:10.0.0.1:1",
        "icmp:1",
        "**",
        "udp:٥",
        "udp:5\n",
        "udp:[]:5",
        "udp:1,2",
    ],
)
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        Rule.parse(text)


@given(
    st.sampled_from(["udp", "tcp"]),
    st.none() | st.ip_addresses().map(str).filter(lambda text: "%" not in text),
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(sorted),
)
def test_rules_are_written_as_they_are_read(
    proto: Literal["udp", "tcp"], address: str | None, ports: list[int]
) -> None:
    rule = Rule(proto, address, *ports)
    assert Rule.parse(str(rule)) == rule
    assert rule.covers(proto, address, ports[0]) and rule.covers(proto, address, ports[1])
    assert not rule.covers(proto, address, ports[1] + 1)


def test_what_rules_cover() -> None:
    assert Rule.parse("*").covers("raw", None, 0) and Rule.parse("*").covers("tap")
    assert Rule.parse("tap").covers("tap") and not Rule.parse("tap").covers("udp", "10.0.0.1", 0)
    assert Rule.parse("raw:*").covers("raw", None, 0) and not Rule.parse("raw:*").covers("tap")
    one = Rule.parse("udp:10.0.0.1:53")
    assert one.covers("udp", "10.0.0.1", 53)
    assert not one.covers("udp", "0.0.0.0", 53), "the wildcard is more than the one address"
    assert not one.covers("udp", None, 53) and not one.covers("tcp", "10.0.0.1", 53)


# -- addresses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/31", "10.0.0.0/32", "fd77::/64", "fe80::1/64"])
def test_interface_addresses(text: str) -> None:
    assert str(parse_interface(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.0/8",
        "10.255.255.255/8",
        "10.0.0.1",
        "0.0.0.0/0",
        "224.0.0.1/4",
        "ff02::1/64",
        "fe80::1%a/64",
        "x",
    ],
)
def test_interface_addresses_that_no_host_has(text: str) -> None:
    with pytest.raises(ValueError):
        parse_interface(text)


# -- lines -----------------------------------------------------------------------------------------------


def test_lines_of_all_that_toml_can_write() -> None:
    text = """\
# a comment = 1
top = '''
not = "a key"
'''  # trailing
"quoted.\\u0041 key" . 'b' = [ # comment ]
  1, [ 2,
  "]" ], { x = 1, y.z = "}" },
]

[a.b]   # [c]
date = 2020-01-01 10:00:00
s = \"\"\"
[no]
\\\"\"\" \"\"\"\"\"
[[a.list]]
k = 1
[a.list.sub]
deep = 'x#y'
[[a.list]]
[[a.list.inner]]
k = 2\r
[[a.list.inner]]
k = 3
"""
    tomllib.loads(text)
    lines = Lines(text)
    expected: dict[tuple[str | int, ...], int] = {
        ("top",): 2,
        ("quoted.A key", "b"): 5,
        ("quoted.A key", "b", 0): 6,
        ("quoted.A key", "b", 1): 6,
        ("quoted.A key", "b", 1, 1): 7,
        ("quoted.A key", "b", 2, "x"): 7,
        ("quoted.A key", "b", 2, "y", "z"): 7,
        ("a", "b"): 10,
        ("a", "b", "date"): 11,
        ("a", "b", "s"): 12,
        ("a", "list"): 15,
        ("a", "list", 0, "k"): 16,
        ("a", "list", 0, "sub", "deep"): 18,
        ("a", "list", 1): 19,
        ("a", "list", 1, "inner", 0, "k"): 21,
        ("a", "list", 1, "inner", 1, "k"): 23,
        ("a", "list", 1, "absent", "x"): 19,
        ("absent",): 1,
    }
    assert {path: lines.of(path) for path in expected} == expected


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=5))
@example({"": {"": ["'", '"', "\\", "#", "'''", '"""', "\n", "]"]}})
def test_every_place_has_a_line(data: dict[str, Any]) -> None:
    text = "".join(f"\n{_quoted(key)} = {toml(value)}\n" for key, value in data.items())
    lines = Lines(text)
    found = tomllib.loads(text)
    for line, key in zip(itertools.count(2, 2), found, strict=False):
        for path in _paths(found[key], (key,)):
            assert path in lines and lines.of(path) == line


def _paths(value: object, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, item in items:
        yield from _paths(item, (*path, step))


# -- netif kinds, errors, reference, command line --------------------------------------------------------


def test_kinds_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    head = "from dataplane.config import NetifSettings\n"
    good = head + "KIND = 'good'\nclass Settings(NetifSettings, tag=KIND):\n    n: int\n"
    (tmp_path / "zz_good.py").write_text(good)
    (tmp_path / "zz_wrapper.py").write_text("")
    (tmp_path / "_zz_private.py").write_text("raise RuntimeError\n")
    monkeypatch.setattr(netif, "__path__", [str(tmp_path)])
    found = netif.kinds()
    assert list(found) == ["good"] and found["good"].__struct_fields__ == ("n",)
    (tmp_path / "zz_none.py").write_text("KIND = 'none'\n")
    with pytest.raises(TypeError, match="zz_none: a netif needs a class Settings"):
        netif.kinds()
    (tmp_path / "zz_none.py").unlink()
    (tmp_path / "zz_tag.py").write_text(
        head + "KIND = 'a'\nclass Settings(NetifSettings, tag='b'):\n    pass\n"
    )
    with pytest.raises(TypeError, match="zz_tag: Settings has the tag 'b'"):
        netif.kinds()
    for name in ("zz_good", "zz_wrapper", "zz_none", "zz_tag"):
        sys.modules.pop(f"dataplane.netif.{name}", None)
        vars(netif).pop(name, None)


def test_errors_are_one_line_and_survive_pickling() -> None:
    errors: list[DataplaneError] = [
        ConfigError("a.b", "x\ny" * 100, "less", source="f", line=3, problem="too much"),
        SegmentSpaceError("dataplane.a.table", 4096, 17),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error) and vars(again) == vars(error)
        assert "\n" not in str(error) and len(str(error)) < 150
    assert "4096" in str(errors[1]) and "17" in str(errors[1])


def test_every_field_is_described() -> None:
    kinds = netif.kinds()
    tables = [Config, RxSettings, SocketsSettings, InetSettings, TcpSettings, AccessSettings, *kinds.values()]
    for table in tables:
        assert table.__doc__, f"{table}: no docstring"
        for name, hint in schema.fields(table).items():
            described = any(meta.description for meta in schema.split(hint)[1])
            inner = any(schema.is_table(arm) for arm in schema.arms(hint)) or name in ("netif", "access")
            assert described or inner, f"{table.__module__}.{table.__name__}.{name}: no description"


def test_the_reference_is_what_the_code_says() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference(netif.kinds()), (
        "run: python -m dataplane.config_reference > docs/configuration.md"
    )


def test_the_reference_shows_types_defaults_and_units() -> None:
    page = reference(KINDS)
    assert '### `kind = "synthetic"`' in page
    for cell in (
        "| a power of two from 4096 to 1073741824 | `65536` | bytes |",
        '| "busy", "adaptive" or "poll" |',
    ):
        assert cell in page


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dataplane.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_check_command(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "a"\n[rx]\nidle = "lazy"\n')
    bad = run("check", str(path))
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == f"dataplane: {path}:1: netif: missing, expected at least one [[netif]] table\n"
    absent = run("check", str(tmp_path / "absent.toml"))
    assert absent.returncode == 2 and "absent.toml: No such file or directory" in absent.stderr
    if "synthetic" in netif.kinds():
        path.write_text('name = "a"\n[[netif]]\nkind = "synthetic"\n')
        good = run("check", str(path))
        assert (good.returncode, good.stderr) == (0, "") and good.stdout.startswith(f"ok {path}: ")


def test_help_does_not_wait_for_numba() -> None:
    code = "import sys, dataplane.cli; sys.exit('numba' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert run("--help").returncode == 0
    assert run("no-such-command").returncode == 2
