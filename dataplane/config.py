"""TOML to validated settings, and one readable error for whatever is wrong.

    config = load("configs/tun.toml", netif.kinds())

Floor 1. Knows nothing of the kinds of netifs: each brings its own settings class, given as `kinds`, and says
in its `check` what only it can know. `Config` and all within are frozen, can be pickled, and hold only plain
values, so that they go to worker processes as they are. The descriptions below are what
`docs/configuration.md` is generated from; `dataplane.config_schema` says what else the metadata do.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec
import psutil
from msgspec import Meta

from dataplane import config_schema as schema
from dataplane.config_access import AccessSettings, Rule
from dataplane.config_reader import Reader, key_path
from dataplane.config_schema import Table
from dataplane.errors import ConfigError

__all__ = [
    "AccessSettings",
    "Address",
    "Config",
    "Context",
    "Device",
    "FilePath",
    "InetSettings",
    "Interface",
    "NetifSettings",
    "Rule",
    "RxSettings",
    "SocketsSettings",
    "TcpSettings",
    "available_cores",
    "load",
    "parse",
    "parse_address",
    "parse_interface",
]

IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Kinds = Mapping[str, "type[NetifSettings]"]


# -- helper types, for netifs' settings as well ------------------------------------------------------------


def parse_interface(text: str) -> IPInterface:
    """Parse a host's address with its prefix length, `10.77.0.1/24`; ValueError if a host cannot have it."""
    if "/" not in text or "%" in text:
        raise ValueError("an address needs its prefix length, and no zone")
    interface = ipaddress.ip_interface(text)
    address, network = interface.ip, interface.network
    if address.is_multicast or address.is_unspecified:
        raise ValueError("not an address of one host")
    own = (network.network_address, network.broadcast_address)
    if address.version == 4 and network.prefixlen < 31 and address in own:
        raise ValueError("the network's own or its broadcast address")
    return interface


def parse_address(text: str) -> IPAddress:
    """Parse the address of one host; ValueError if it is none."""
    address = ipaddress.ip_address(text)
    if address.is_multicast or address.is_unspecified or "%" in text:
        raise ValueError("not an address of one host")
    return address


Interface = Annotated[
    str,
    Meta(
        extra={
            "expected": "a host's address with its prefix length, such as 10.77.0.1/24 or fd77::1/64",
            "parse": parse_interface,
        }
    ),
]
Address = Annotated[
    str,
    Meta(extra={"expected": "a host's address, such as 10.77.0.2 or fd77::2", "parse": parse_address}),
]
FilePath = Annotated[str, Meta(min_length=1, extra={"expected": "the name of a file", "path": True})]
Device = Annotated[
    str,
    Meta(
        pattern=r"\A(?!\.{1,2}\Z)[^\s/:\x00-\x1f]{1,15}\Z",
        extra={"expected": "an interface's name: 1 to 15 characters, without spaces, slashes and colons"},
    ),
]


# -- the file ----------------------------------------------------------------------------------------------


class RxSettings(Table, frozen=True, kw_only=True):
    """The RX workers: one process each, pinned to its core, serving one queue of every netif."""

    cores: Annotated[
        Annotated[
            tuple[Annotated[int, Meta(ge=0, extra={"expected": "a core's number"})], ...],
            Meta(min_length=1, extra={"expected": "a list of cores"}),
        ]
        | Literal["auto"],
        Meta(
            description="The cores to pin RX workers to, one worker each. They must exist, be different, "
            "and be within the affinity that the dataplane was started with. `auto` takes all of those but "
            "the first, which is left to the rest of the system; the only one, if there is one."
        ),
    ] = "auto"
    idle: Annotated[
        Literal["busy", "adaptive", "poll"],
        Meta(
            description="What a worker does when no packet is there: spin for ever (`busy`: lowest latency, "
            "a whole core), spin for `spin_us` and then sleep until a packet comes (`adaptive`), sleep at "
            "once (`poll`: an idle dataplane costs next to nothing)."
        ),
    ] = "adaptive"
    spin_us: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="How long `adaptive` spins before it sleeps.",
            extra={"unit": "µs"},
        ),
    ] = 50


class SocketsSettings(Table, frozen=True, kw_only=True):
    """Limits and sizes of the consumers' sockets."""

    max: Annotated[
        int,
        Meta(
            ge=1,
            le=2**21,
            description="Sockets that can be open at once, all consumers together. The tables for so many "
            "are allocated at start.",
            extra={"unit": "sockets"},
        ),
    ] = 65536
    ring_bytes: Annotated[
        int,
        Meta(
            ge=4096,
            le=2**30,
            description="Size of one lane of a socket's queue, that is, per socket and RX worker; a socket "
            "may ask for its own. A packet that does not fit is dropped and counted, so the largest "
            "datagram that a socket can receive is a little smaller than this.",
            extra={"unit": "bytes", "power_of_two": True},
        ),
    ] = 65536
    tx_ring_bytes: Annotated[
        int,
        Meta(
            ge=2**18,
            le=2**30,
            description="Size of the queue in which a consumer's process hands packets to an RX worker for "
            "transmission. The least value is what the largest datagrams, 65,507 bytes, need.",
            extra={"unit": "bytes", "power_of_two": True},
        ),
    ] = 262144
    groups: Annotated[
        int,
        Meta(
            ge=1,
            le=65536,
            description="`reuseport` groups that can exist at once.",
            extra={"unit": "groups"},
        ),
    ] = 1024


class InetSettings(Table, frozen=True, kw_only=True):
    """IP itself: reassembly, ICMP errors, neighbours."""

    fragments: Annotated[
        int,
        Meta(
            ge=1,
            le=65536,
            description="Fragmented datagrams that one RX worker puts together at the same time. When one "
            "more begins, the oldest is dropped and counted.",
            extra={"unit": "datagrams"},
        ),
    ] = 64
    fragment_timeout: Annotated[
        float,
        Meta(
            gt=0,
            le=600,
            description="How long after its first fragment an incomplete datagram is dropped.",
            extra={"unit": "s"},
        ),
    ] = 30.0
    icmp_rate: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="ICMP errors that one RX worker sends at most in a second; 0: none.",
            extra={"unit": "errors/s"},
        ),
    ] = 1000
    neighbours: Annotated[
        int,
        Meta(
            ge=16,
            le=2**20,
            description="Link-layer addresses that are remembered (ARP and neighbour discovery).",
            extra={"unit": "entries", "power_of_two": True},
        ),
    ] = 1024


_BUFFER = {"unit": "bytes", "power_of_two": True}


class TcpSettings(Table, frozen=True, kw_only=True):
    """TCP connections. Each takes its two buffers, and one lane of its queue per RX worker as large as the receive
    buffer, of its consumer's memory; a listener or a connection may ask for other sizes."""

    send_bytes: Annotated[
        int,
        Meta(
            ge=4096,
            le=2**30,
            description="Size of a connection's send buffer: what is written and not yet acknowledged.",
            extra=_BUFFER,
        ),
    ] = 262144
    receive_bytes: Annotated[
        int,
        Meta(
            ge=4096,
            le=2**30,
            description="Size of a connection's receive buffer, and with it the largest window that the peer "
            "is offered.",
            extra=_BUFFER,
        ),
    ] = 262144
    time_wait: Annotated[
        float,
        Meta(
            gt=0,
            le=600,
            description="How long a connection that we closed first is remembered, so that its late segments "
            "are answered and its addresses and ports not used again (TIME_WAIT, twice the maximum segment "
            "lifetime).",
            extra={"unit": "s"},
        ),
    ] = 60.0
    time_wait_max: Annotated[
        int,
        Meta(
            ge=0,
            le=2**20,
            description="Connections that are remembered so at the same time; they take no memory of their "
            "consumers. When one more ends, it is forgotten at once.",
            extra={"unit": "connections"},
        ),
    ] = 16384
    syn_cache: Annotated[
        int,
        Meta(
            ge=16,
            le=2**20,
            description="Connection attempts that one RX worker remembers at the same time. Beyond that it "
            "answers with SYN cookies, which need no memory.",
            extra={"unit": "entries", "power_of_two": True},
        ),
    ] = 4096
    rst_rate: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="Resets that one RX worker sends at most in a second, in answer to segments that "
            "belong to no connection; 0: none.",
            extra={"unit": "resets/s"},
        ),
    ] = 1000


class NetifSettings(Table, frozen=True, kw_only=True, tag_field="kind"):
    """Base of every kind's settings: subclass with `tag=KIND` and describe each field.

    If a kind has a field `device` or `addresses`, these belong to the netif alone: one that two netifs share
    is an error without any doing of the kind.
    """

    def check(self, where: str, ctx: Context) -> None:
        """Check what only this kind knows, such as whether its device exists; report through `ctx.error`."""


class Config(Table, frozen=True, kw_only=True):
    """A whole dataplane."""

    name: Annotated[
        str,
        Meta(
            pattern=r"\A(?!\.)[A-Za-z0-9_.-]{1,64}\Z",
            description="What `attach()` and the command line call this dataplane; one of a name runs at a "
            "time.",
            extra={"expected": "1 to 64 letters, digits, and _ . -, not beginning with a dot"},
        ),
    ]
    rx: RxSettings = RxSettings()
    sockets: SocketsSettings = SocketsSettings()
    inet: InetSettings = InetSettings()
    tcp: TcpSettings = TcpSettings()
    netif: Annotated[
        tuple[NetifSettings, ...],
        Meta(extra={"expected": "at least one [[netif]] table"}),
    ]
    access: Annotated[
        tuple[AccessSettings, ...],
        Meta(extra={"expected": "[[access]] tables"}),
    ] = ()

    @property
    def cores(self) -> tuple[int, ...]:
        """The RX workers' cores: `rx.cores`, in which `load` and `parse` have put numbers for "auto"."""
        return _automatic() if self.rx.cores == "auto" else self.rx.cores


# -- reading it --------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], kinds: Kinds) -> Config:
    """Read the file at `path`. Raises `ConfigError`, for a file that cannot be read as well."""
    source = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError("", None, "a TOML file", source=source, problem=problem) from None
    return parse(text, kinds, source=source, directory=Path(path).parent)


def parse(text: str, kinds: Kinds, source: str = "<string>", directory: Path | None = None) -> Config:
    """Turn TOML into settings; `directory` (default: the current one) is where relative file names start.

    Raises `ConfigError` about the first thing that is wrong.
    """
    reader = Reader(text, source, (directory or Path()).absolute())
    data = reader.data
    netif = data.get("netif", [])
    if not (isinstance(netif, list) and netif and all(isinstance(table, dict) for table in netif)):
        reader.error(("netif",), netif or None, schema.describe(schema.fields(Config)["netif"]))
    reader.refuse_unknown(Config, {**data, "netif": []}, ())
    settings = tuple(_netif(reader, kinds, index, table) for index, table in enumerate(netif))
    config = reader.convert(Config, {**data, "netif": []}, ())
    config = msgspec.structs.replace(
        config, netif=settings, rx=msgspec.structs.replace(config.rx, cores=_cores(reader, config.rx))
    )
    _check_access(reader, config.access)
    _check_shared(reader, settings)
    for index, one in enumerate(settings):
        where = f"netif[{index}]"
        one.check(where, Context(reader, where, config))
    return config


def available_cores() -> tuple[int, ...]:
    """Return the cores that this process may run on, ascending."""
    return tuple(sorted(psutil.Process().cpu_affinity() or range(psutil.cpu_count() or 1)))


class Context:
    """What a netif's own `check` may look at, and how it reports."""

    def __init__(self, reader: Reader, where: str, config: Config) -> None:
        self._reader = reader
        self.where = where  # the netif's own table, `netif[1]`
        self.config = config  # all settings; what other netifs' checks would say is not known yet
        self.directory = reader.directory  # the configuration's

    def error(self, key: str, value: object, expected: str, problem: str | None = None) -> NoReturn:
        """Raise the `ConfigError` about `key`, as seen from the netif's table (`addresses[1]`) or whole."""
        whole = key if key == self.where or key.startswith(f"{self.where}.") else f"{self.where}.{key}"
        self._reader.error(key_path(whole), value, expected, problem)


def _netif(reader: Reader, kinds: Kinds, index: int, table: dict[str, Any]) -> NetifSettings:
    kind = table.get("kind")
    if not (isinstance(kind, str) and kind in kinds):
        near = difflib.get_close_matches(kind, kinds, 1) if isinstance(kind, str) else []
        expected = f'"{near[0]}"' if near else f"one of {', '.join(sorted(kinds))}"
        reader.error(("netif", index, "kind"), kind, expected)
    return reader.convert(kinds[kind], table, ("netif", index))


def _automatic() -> tuple[int, ...]:
    return available_cores()[1:] or available_cores()


def _cores(reader: Reader, rx: RxSettings) -> tuple[int, ...]:
    if rx.cores == "auto":
        return _automatic()
    mine = available_cores()
    machine = range(psutil.cpu_count() or 1)
    for index, core in enumerate(rx.cores):
        path = ("rx", "cores", index)
        if core not in machine and core not in mine:
            reader.error(path, core, f"a core of this machine ({_ranges(machine)})")
        if core not in mine:
            reader.error(path, core, f"a core within this process's affinity ({_ranges(mine)})")
        if core in rx.cores[:index]:
            reader.error(path, core, "each core once")
    return rx.cores


def _check_access(reader: Reader, access: Sequence[AccessSettings]) -> None:
    for index, one in enumerate(access):
        if one.uid is not None and one.gid is not None:
            reader.error(("access", index, "gid"), one.gid, "either uid or gid", "uid is given, too")
        if one.uid is None and one.gid is None:
            reader.error(("access", index), None, "uid or gid", "neither is given")


def _check_shared(reader: Reader, netifs: Sequence[NetifSettings]) -> None:
    """Refuse two netifs with the same device or address: packets would come twice, or go to either."""
    devices: dict[str, int] = {}
    addresses: dict[IPAddress, int] = {}
    for index, one in enumerate(netifs):
        device = getattr(one, "device", None)
        if device is not None and devices.setdefault(device, index) != index:
            other = f"already netif[{devices[device]}]'s"
            reader.error(("netif", index, "device"), device, "another device", other)
        for position, text in enumerate(getattr(one, "addresses", ())):
            address = parse_interface(text).ip
            if address in addresses:
                other = f"address already taken by netif[{addresses[address]}]"
                reader.error(("netif", index, "addresses", position), text, "another address", other)
            addresses[address] = index


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers shortly: 0-3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(str(number) for number in run) for run in runs)
