"""The table against a list: who may open what, and what every packet then finds."""

from __future__ import annotations

import errno
import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dataplane.jit import kernel
from dataplane.pcb import lookup
from dataplane.pcb.table import EPHEMERAL, TCP, SocketSpec, Table
from dataplane.shm import epoch
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import ld64
from tests.bed import family_bits, pair

FOUR, SIX, BOTH = L.KEY_FAMILY4, L.KEY_FAMILY6, L.KEY_FAMILY4 | L.KEY_FAMILY6
LOCALS = ("10.0.0.1", "10.0.0.2", "239.1.1.1", "fd00::1", "::a00:1", "ff05::1")     # ::a00:1 is 10.0.0.1 in lo
REMOTES = ("192.0.2.1", "192.0.2.2", "fd01::1")
PORTS = (53, 5353)
SOCKETS, GROUPS, TIME_WAIT = 16, 3, 8


@kernel("i64(mem, i64, i64, i64, i64)")
def find(mem, table, family, ports, addresses):
    return lookup.lookup(mem, table, 17, family, ports, ld64(mem, addresses), ld64(mem, addresses + 8),
                         ld64(mem, addresses + 16), ld64(mem, addresses + 24))


def make(sockets: int = SOCKETS, groups: int = GROUPS, workers: int = 1) -> tuple[Arena, Table]:
    arena = Arena(1 << 34)
    capacities = (sockets, workers, 1, groups, 64, TIME_WAIT)
    return arena, Table(arena.mem, arena.map_anonymous(Table.size(*capacities)), *capacities)


def packet(table: Table, local: str, port: int, remote: tuple[str, int]) -> int:
    """What a datagram from `remote` to `local` and `port` finds."""
    scratch = table.worker(0) + L.W_SCRATCH
    for i, value in enumerate((*pair(local), *pair(remote[0]))):
        table.put(scratch + 8 * i, value)
    return int(find(table.mem, table.offset, family_bits(local), port | remote[1] << 16, scratch))


def udp(local: str | None = None, port: int | None = None, remote: tuple[str, int] | None = None,
        families: int = 0, **more: Any) -> SocketSpec:
    decisive = local or (remote[0] if remote else None)
    families = family_bits(decisive) if decisive else families or BOTH
    return SocketSpec("udp", families, port=port, local=pair(local) if local else None,
                      remote=(*pair(remote[0]), remote[1]) if remote else None, **more)


# -- the oracle --------------------------------------------------------------------------------------------


def takes(spec: SocketSpec, family: int, local: tuple[int, int], port: int, remote: tuple[int, int, int]) -> bool:
    """Whether a unicast datagram matches the socket."""
    return (bool(spec.families & family) and spec.port in (None, port)
            and spec.local in (None, local) and spec.remote in (None, remote))


def rank(spec: SocketSpec) -> int:
    """The order of the design: connected, connected with any local address, bound, wildcard, any port."""
    if spec.remote is not None:
        return 0 if spec.local is not None else 1
    if spec.port is None:
        return 4
    return 2 if spec.local is not None else 3


def in_use(spec: SocketSpec, others: list[SocketSpec]) -> bool:
    """Whether bind(2) would say EADDRINUSE."""
    same = [one for one in others if one.kind == "udp" and one.families & spec.families
            and (one.local, one.port, one.remote) == (spec.local, spec.port, spec.remote)]
    shared = [one for one in same if one.reuseport and spec.reuseport and one.uid == spec.uid
              and one.families == spec.families]
    return not spec.multicast and len(shared) < len(same)


@st.composite
def specs(draw: st.DrawFn) -> SocketSpec:
    kind = draw(st.sampled_from(("udp",) * 6 + ("raw", "tap")))
    if kind != "udp":
        return SocketSpec(kind, BOTH, 0, reuseport=kind == "raw" and draw(st.booleans()))
    local = draw(st.sampled_from((None, *LOCALS)))
    remote = draw(st.sampled_from((None, None, *REMOTES)))
    if local and remote and family_bits(local) != family_bits(remote):
        remote = None
    port = draw(st.sampled_from(PORTS))
    if local is None and remote is None and draw(st.integers(0, 3)) == 0:
        port = None
    return udp(local, port, (remote, draw(st.sampled_from((7, 8)))) if remote else None,
               draw(st.sampled_from((BOTH, FOUR, SIX))), reuseport=draw(st.booleans()), uid=draw(st.integers(0, 1)))


class TableMachine(RuleBasedStateMachine):
    """A small table, so that it overflows: all entries in one, two or sixteen buckets."""

    @initialize(mask=st.sampled_from((0, 1, 15)))
    def begin(self, mask: int) -> None:
        self.arena, self.table = make()
        self.table.put(self.table.offset + L.T_BUCKETS, mask)
        self.mask = mask
        self.open: dict[int, SocketSpec] = {}
        self.groups: dict[int, list[int]] = {}      # by the number that the table gave the group
        self.closing: dict[int, int] = {}           # to the epoch
        self.retired = 0                            # groups that end with a closing PCB
        epoch.mark_online(self.table.mem, self.table.worker(0))

    def _expected(self, spec: SocketSpec) -> int:
        """errno of the attempt, 0: it is opened."""
        if len(self.open) + len(self.closing) == SOCKETS:
            return errno.ENOBUFS
        if spec.kind == "udp" and in_use(spec, list(self.open.values())):
            return errno.EADDRINUSE
        if spec.reuseport and not self._mates(spec):
            if len(self.groups) + self.retired == GROUPS:
                return errno.ENOBUFS
        if spec.hashed and not self._mates(spec):
            entries = {(one.key, one.families, one.uid) if one.reuseport else number
                       for number, one in self.open.items() if one.hashed}
            if len(entries) == 8 * (self.mask + 1):
                return errno.ENOBUFS
        return 0

    def _mates(self, spec: SocketSpec) -> list[int]:
        """Members of the group that it would join."""
        if not spec.reuseport or spec.multicast:
            return []
        return [number for number, one in self.open.items()
                if one.reuseport and (one.kind, one.key, one.families, one.uid)
                == (spec.kind, spec.key, spec.families, spec.uid)]

    @rule(spec=specs())
    def open_one(self, spec: SocketSpec) -> None:
        expected, mates = self._expected(spec), self._mates(spec)
        if expected:
            with pytest.raises(OSError) as error:
                self.table.open(spec)
            assert error.value.errno == expected
            return
        before = {group: self._slots(group) for group in self.groups}
        number = self.table.open(spec)
        assert number not in self.open and number not in self.closing
        self.open[number] = spec
        group = self.table.get(self.table.pcb(number) + L.PCB_GROUP)
        assert bool(group) == spec.reuseport
        if group:
            members = self.groups.setdefault(group, [])
            assert members == mates
            members.append(number)
            after = self._slots(group)
            if len(members) > 1:
                moved = after != before[group]
                assert moved.sum() == L.GROUP_SIZE // len(members) and (after[moved] == number).all()

    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        if not self.open:
            return
        number = data.draw(st.sampled_from(sorted(self.open)))
        spec = self.open.pop(number)
        group = self.table.get(self.table.pcb(number) + L.PCB_GROUP)
        before = self._slots(group) if group else None
        self.closing[number] = self.table.close(number)
        if before is not None:
            self.groups[group].remove(number)
            moved = self._slots(group) != before
            if self.groups[group]:
                assert (before[moved] == number).all() and moved.sum() == (before == number).sum()
            else:
                del self.groups[group]
                self.retired += 1
        assert not self.table.passed(self.closing[number]), "a worker is in the middle of a burst"
        assert self.table.spec(number) is spec

    @rule()
    def pass_an_epoch(self) -> None:
        """The worker's burst ends: what was closed may be used again."""
        epoch.mark_online(self.table.mem, self.table.worker(0))
        for number, target in self.closing.items():
            assert self.table.passed(target)
            generation = self.table.generation(number)
            self.retired -= self.table.spec(number).reuseport and number in self.table._retired
            self.table.free(number)
            assert self.table.generation(number) == generation
        self.closing.clear()

    def _slots(self, group: int) -> Any:
        start = self.table._group(group) + L.GROUP_SLOTS
        return self.table.mem[start:start + 4 * L.GROUP_SIZE].view("u4").copy()

    def _chain(self, place: int, width: int) -> list[int]:
        first = self.table.mem[place:place + width].view(f"i{width}")[0]
        found, following, before = [], int(first), 0
        while following:
            assert self.table.get(self.table.pcb(following - 1) + L.PCB_PREVIOUS) == before
            found.append(following - 1)
            before, following = following, self.table.get(self.table.pcb(following - 1) + L.PCB_NEXT)
        return found

    @invariant()
    def every_packet_finds_what_the_list_says(self) -> None:
        for local, port, remote, far in itertools.product(LOCALS, PORTS, REMOTES, (7, 8)):
            family = family_bits(local)
            if family != family_bits(remote) or pair(local)[0] >> 56 == 0xFF or pair(local)[1] >> 28 == 0xE:
                continue
            matching = [number for number, spec in self.open.items() if spec.hashed
                        and takes(spec, family, pair(local), port, (*pair(remote), far))]
            best = min((rank(self.open[number]) for number in matching), default=None)
            found = packet(self.table, local, port, (remote, far))
            if best is None:
                assert found == -1
            else:
                assert found in matching and rank(self.open[found]) == best

    @invariant()
    def chains_hold_who_is_open(self) -> None:
        head, ports = self.table.offset, self.table.get(self.table.offset + L.T_CHAINS)
        for place, width, kind, port in (
            (head + L.T_TAPS, 8, "tap", None), (head + L.T_RAWS, 8, "raw", None),
            (head + L.T_ANY_CHAIN, 8, "udp", None),
            *((ports + 4 * port, 4, "udp", port) for port in PORTS),
        ):
            expected = {number for number, spec in self.open.items() if (spec.kind, spec.port) == (kind, port)}
            chain = self._chain(place, width)
            assert set(chain) == expected and len(chain) == len(expected)
        assert self.table.get(head + L.T_OPEN) == len(self.open)
        assert sorted(self.table.open_pcbs()) == sorted(self.open)

    @invariant()
    def groups_are_even(self) -> None:
        for group, members in self.groups.items():
            numbers, counts = np.unique(self._slots(group), return_counts=True)
            assert sorted(numbers.tolist()) == sorted(members)
            assert counts.max() - counts.min() <= len(members)
            assert self.table.get(self.table._group(group) + L.GROUP_MEMBERS) == len(members)

    def teardown(self) -> None:
        """All closed: nothing is left in the buckets, no count is too high."""
        if hasattr(self, "table"):
            for number in list(self.open):
                self.table.close(number)
            first = self.table.get(self.table.offset + L.T_BUCKET_AT)
            lines = self.table.mem[first:first + (self.mask + 1) * L.BUCKET_BYTES].reshape(-1, L.BUCKET_BYTES)
            assert not lines[:, :L.BUCKET_PCBS].any()


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=80, stateful_step_count=40, deadline=None,
                              suppress_health_check=[HealthCheck.too_slow])


# -- single rules ------------------------------------------------------------------------------------------


def test_classes_are_tried_in_order() -> None:
    _, table = make()
    remote = ("192.0.2.1", 7)
    layers = [udp(), udp(port=53), udp("10.0.0.1", 53), udp(None, 53, remote), udp("10.0.0.1", 53, remote)]
    numbers = []
    for spec in layers:
        numbers.append(table.open(spec))
        assert packet(table, "10.0.0.1", 53, remote) == numbers[-1]
    for number, below in zip(numbers[:0:-1], numbers[-2::-1], strict=True):
        table.close(number)
        assert packet(table, "10.0.0.1", 53, remote) == below
    assert packet(table, "10.0.0.1", 54, remote) == numbers[0]


@pytest.mark.parametrize("spec", [
    udp(port=0), udp(port=65536), udp(port=-1), udp("10.0.0.1"), udp(remote=("192.0.2.1", 7)),
    SocketSpec("tap", BOTH, 0, reuseport=True),
])
def test_impossible_requests(spec: SocketSpec) -> None:
    _, table = make()
    for attempt in (table.check, table.open):
        with pytest.raises(OSError) as error:
            attempt(spec)
        assert error.value.errno == errno.EINVAL
    assert table.open_pcbs() == []


def test_check_says_what_open_will() -> None:
    _, table = make(sockets=2)
    table.open(udp(port=53))
    with pytest.raises(OSError) as error:
        table.check(udp(port=53, families=SIX))
    assert error.value.errno == errno.EADDRINUSE
    table.check(udp(port=53, remote=("192.0.2.1", 7)))
    table.open(udp(port=54))
    with pytest.raises(OSError) as error:
        table.check(udp(port=55))
    assert error.value.errno == errno.ENOBUFS


def test_any_number_of_sockets_share_a_group_address() -> None:
    """More than all buckets within reach could hold: they are not found through buckets."""
    _, table = make(sockets=2000)
    for _ in range(1500):
        table.open(udp("239.1.1.1", 53))
    table.open(udp("10.0.0.1", 53))
    assert packet(table, "10.0.0.1", 53, ("192.0.2.1", 7)) == 1500


def test_ephemeral_ports_are_used_up_and_come_back() -> None:
    _, table = make(sockets=len(EPHEMERAL) + 1)
    seen = set()
    for _ in EPHEMERAL:
        port = table.ephemeral_port(udp(port=1))
        seen.add(port)
        table.open(udp(port=port))
    assert seen == set(EPHEMERAL)
    with pytest.raises(OSError) as error:
        table.ephemeral_port(udp(port=1))
    assert error.value.errno == errno.EADDRINUSE
    table.close(next(number for number in table.open_pcbs() if table.spec(number).port == 50000))
    assert table.ephemeral_port(udp(port=1)) == 50000


def test_numbers_are_used_again_only_after_the_epoch() -> None:
    _, table = make(sockets=1)
    epoch.mark_online(table.mem, table.worker(0))
    number = table.open(udp(port=53, lanes=[4096]))
    generation, state = table.generation(number), table.lane_state(number, 0)
    target = table.close(number)
    assert packet(table, "10.0.0.1", 53, ("192.0.2.1", 7)) == -1
    assert not table.passed(target) and table.get(state + L.LS_BASE) == 4096
    with pytest.raises(OSError):
        table.open(udp(port=54))
    epoch.mark_offline(table.mem, table.worker(0))
    assert table.passed(target)
    table.free(number)
    assert table.get(state + L.LS_BASE) == 0
    assert table.open(udp(port=54)) == number and table.generation(number) == generation + 1


@pytest.mark.parametrize("mask", [1, 3, 15])
def test_buckets_that_overflow(mask: int) -> None:
    """All places taken, so that entries live far from home; those that stay are found while others go."""
    places = 8 * (mask + 1)
    _, table = make(sockets=places + 1)
    table.put(table.offset + L.T_BUCKETS, mask)
    numbers = [table.open(udp(port=1 + i)) for i in range(places)]
    with pytest.raises(OSError) as error:
        table.open(udp(port=60000))
    assert error.value.errno == errno.ENOBUFS and len(table.open_pcbs()) == places
    going = np.random.default_rng(1).permutation(places)
    for step, i in enumerate(going.tolist()):
        assert packet(table, "10.0.0.1", 1 + i, ("192.0.2.1", 7)) == numbers[i]
        table.close(numbers[i])
        assert packet(table, "10.0.0.1", 1 + i, ("192.0.2.1", 7)) == -1
        for other in going[step + 1:step + 6].tolist():
            assert packet(table, "10.0.0.1", 1 + other, ("192.0.2.1", 7)) == numbers[other]
    first = table.get(table.offset + L.T_BUCKET_AT)
    lines = table.mem[first:first + (mask + 1) * L.BUCKET_BYTES].reshape(-1, L.BUCKET_BYTES)
    assert not lines[:, :L.BUCKET_PCBS].any()


def test_members_join_and_leave_one_by_one() -> None:
    """Each step moves as few flows as it can, and the group's entry outlives its first member."""
    _, table = make(sockets=64)
    members: list[int] = []
    slots = table.mem[table._group(1) + L.GROUP_SLOTS:][:4 * L.GROUP_SIZE].view("u4")
    for count in range(1, 41):
        before = slots.copy()
        members.append(table.open(udp(port=53, reuseport=True)))
        assert count == 1 or (before != slots).sum() == L.GROUP_SIZE // count
    while len(members) > 1:
        before, gone = slots.copy(), members.pop(0)
        table.close(gone)
        assert ((before != slots) == (before == gone)).all()
        assert packet(table, "10.0.0.1", 53, ("192.0.2.1", 7)) in members
        counts = np.unique(slots, return_counts=True)[1]
        assert len(counts) == len(members)
    table.close(members[0])
    assert packet(table, "10.0.0.1", 53, ("192.0.2.1", 7)) == -1


def test_a_group_is_of_one_user() -> None:
    _, table = make()
    table.open(udp(port=53, reuseport=True, uid=1))
    for spec in (udp(port=53, reuseport=True, uid=2), udp(port=53, uid=1), udp(port=53, reuseport=True, families=FOUR,
                                                                              uid=1)):
        with pytest.raises(OSError) as error:
            table.open(spec)
        assert error.value.errno == errno.EADDRINUSE
    assert len(table.open_pcbs()) == 1


def test_counters_do_not_believe_the_consumer() -> None:
    arena, table = make()
    lane = arena.map_anonymous(8192)
    number = table.open(udp(port=53, lanes=[lane], ring_bytes=4096))
    table.put(table.lane_state(number, 0) + L.LS_COUNT, 10)
    table.put(table.lane_state(number, 0) + L.LS_PUBLISHED, 640)
    for tail, taken in ((-1, -1), (1 << 62, 1 << 62), (0, 4), (-(1 << 63), (1 << 63) - 1)):
        table.put(lane + L.LANE_TAIL, tail)
        table.put(lane + L.LANE_CONSUMED, taken)
        counters = table.counters(number)
        assert counters["published"] == 10 and counters["consumed"] + counters["queued"] == 10
        assert 0 <= counters["queued"] <= 10 and 0 <= counters["queued_bytes"] <= 4096


# -- TCP ---------------------------------------------------------------------------------------------------


def listen(local: str | None = None, port: int = 80, families: int = BOTH, **more: Any) -> SocketSpec:
    return SocketSpec("listen", family_bits(local) if local else families, TCP, port=port,
                      local=pair(local) if local else None, backlog=5, **more)


def connection(port: int, remote: tuple[str, int], local: str = "10.0.0.1") -> SocketSpec:
    return SocketSpec("connection", family_bits(local), TCP, local=pair(local), port=port,
                      remote=(*pair(remote[0]), remote[1]), place=8192, buffers=(4096, 16384), lanes=[12288])


def class_bits(table: Table, port: int) -> int:
    return int(table.mem[table.get(table.offset + L.T_PORTS) + 65536 + port])


def test_listeners_and_connections_of_one_port() -> None:
    """As BSD sockets with SO_REUSEADDR: connections do not keep anybody from listening, a listener does."""
    _, table = make()
    first = table.open(connection(80, ("192.0.2.1", 7)))
    assert class_bits(table, 80) == 0
    wild = table.open(listen())
    bound = table.open(listen("10.0.0.1"))
    table.open(udp(port=80))
    assert class_bits(table, 80) == 1 << L.CLASS_BOUND | 1 << L.CLASS_WILDCARD
    for spec in (listen(), listen(families=SIX), listen("10.0.0.1"), connection(80, ("192.0.2.1", 7))):
        with pytest.raises(OSError) as error:
            table.open(spec)
        assert error.value.errno == errno.EADDRINUSE
    table.open(connection(80, ("192.0.2.1", 8)))
    assert [table.word(one, L.PCB_KIND) for one in (first, wild)] == [L.PK_CONNECTION, L.PK_LISTEN]
    assert table.word(wild, L.PCB_BACKLOG) == 5 and table.word(first, L.PCB_BUFFERS) == 12 | 14 << 8
    assert table.word(first, L.PCB_STATE) == L.PCB_OPEN
    assert table.word(first, L.PCB_PLACE) == 8192 and table.get(table.lane_state(first, 0) + L.LS_WAKE) == 0
    table.close(bound)
    assert class_bits(table, 80) == 1 << L.CLASS_WILDCARD
    table.close(wild)
    assert class_bits(table, 80) == 0 and table.get(table.get(table.offset + L.T_CHAINS) + 4 * (65536 + 80)) == 0


def test_a_group_of_listeners() -> None:
    _, table = make()
    members = [table.open(listen(reuseport=True)) for _ in range(3)]
    group = table.word(members[0], L.PCB_GROUP)
    assert group and all(table.word(one, L.PCB_GROUP) == group for one in members)
    with pytest.raises(OSError):
        table.open(listen())
    for one in members:
        table.close(one)
    assert class_bits(table, 80) == 0


def test_ports_to_connect_from() -> None:
    _, table = make(sockets=600)
    table.open(listen(port=5000))
    remote = ("192.0.2.1", 7)
    ports = []
    for _ in range(500):
        spec = connection(0, remote)
        spec.port = port = table.connecting_port(spec)
        ports.append(port)
        table.open(spec)
    assert len(set(ports)) == 500 and 5000 not in ports and min(ports) >= 1024
    assert max(ports) - min(ports) > 32768, "at random over the whole range"
    assert ports != sorted(ports)


def test_all_ports_to_connect_from_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataplane.pcb.table.CONNECTING", range(3000, 3004))
    _, table = make()
    table.open(listen(port=3001))
    remote = ("192.0.2.1", 7)
    numbers = []
    for _ in range(3):
        spec = connection(0, remote)
        spec.port = table.connecting_port(spec)
        numbers.append(table.open(spec))
    with pytest.raises(OSError) as error:
        table.connecting_port(connection(0, remote))
    assert error.value.errno == errno.EADDRNOTAVAIL
    assert table.connecting_port(connection(0, ("192.0.2.1", 8))) in (3000, 3002, 3003)
    # The continuation worker takes a connection out, and gives its place to a TIME_WAIT entry: still in use.
    gone = numbers[0]
    waiting = table.ordinary
    table.mem[table.pcb(waiting):table.pcb(waiting) + 64] = table.mem[table.pcb(gone):table.pcb(gone) + 64]
    table.put(table.pcb(waiting) + L.PCB_KIND, L.PK_TIME_WAIT)
    assert lookup.bucket_replace(table.mem, table.offset, gone, waiting) == 1
    port = table.key(gone)[2]
    table.take_back(gone)
    with pytest.raises(OSError):
        table.connecting_port(connection(0, remote))
    with pytest.raises(OSError) as error:
        table.open(connection(port, remote))
    assert error.value.errno == errno.EADDRINUSE
    table.open(listen(port=port))       # nothing is in the way of a listener
    assert lookup.bucket_remove(table.mem, table.offset, waiting) == 1
    table.open(connection(port, remote))


def test_a_bucket_that_a_worker_holds() -> None:
    """The supervisor does not wait for ever, and leaves nothing behind."""
    _, table = make()
    table.put(table.offset + L.T_BUCKETS, 0)
    bucket = table.get(table.offset + L.T_BUCKET_AT)
    table.put(bucket + L.BUCKET_LOCK, 7)
    with pytest.raises(OSError) as error:
        table.open(listen())
    assert error.value.errno == errno.EAGAIN and table.room == SOCKETS
    assert lookup.buckets_unlock(table.mem, table.offset, 7) == 1
    table.open(listen())


def test_regions_of_tcp_do_not_overlap() -> None:
    _, table = make(workers=3)
    assert table.sockets == SOCKETS + TIME_WAIT and table.get(table.offset + L.T_TIME_WAIT_AT) == SOCKETS
    blocks = [table.worker(index) for index in range(4)]
    assert [table.get(block + L.W_INDEX) for block in blocks] == [0, 1, 2, 3]
    assert all(table.get(block + L.W_EPOCH) == L.EPOCH_IDLE for block in blocks)
    assert table.get(table.offset + L.T_WORKERS) == 3
    starts = sorted(table.get(table.offset + word) for word in (
        L.T_PCBS, L.T_BUCKET_AT, L.T_PORTS, L.T_CHAINS, L.T_GROUPS, L.T_LANES, L.T_WORKER_AT, L.T_NIFS,
        L.T_NEIGHBOURS, L.T_SLOT_HEADS, L.T_SLOT_QUEUES, L.T_KCONT))
    assert len(set(starts)) == len(starts)
    assert table.slot_head(SOCKETS, 2) < table.slot_queue(0)
    assert table.slot_queue(2) + L.PCQ_SLOTS + SOCKETS * L.PCQ_SLOT_BYTES <= table.get(table.offset + L.T_KCONT)


def test_records_are_all_that_is_open() -> None:
    _, table = make()
    pcb = table.open(listen())
    slot = table.add_slot(pcb, connection(0, ("0.0.0.0", 0), "0.0.0.0"), 0)
    other = table.open(udp(port=53))
    table.close(other)
    assert list(table.records()) == [pcb] and list(table.records(pcb + 1)) == []
    assert table.get(table.offset + L.T_OPEN) == 1
    table.put(table.pcb(slot) + L.PCB_STATE, L.PCB_OPEN)
    table.put(table.pcb(SOCKETS + 3) + L.PCB_STATE, L.PCB_OPEN)
    assert list(table.records()) == [pcb, slot, SOCKETS + 3] and list(table.records(slot + 1)) == [SOCKETS + 3]


# -- many --------------------------------------------------------------------------------------------------


@kernel("i64(mem, i64, i64, i64)")
def find_all(mem, table, first, last):
    """The first of these connected sockets that a packet for it does not find, or -1."""
    for number in range(first, last):
        pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
        key = ld64(mem, pcb + L.PCB_KEY)
        found = lookup.lookup(mem, table, 17, (key >> 48) & 3, key & 0xFFFFFFFF, ld64(mem, pcb + L.PCB_LOCAL_HI),
                              ld64(mem, pcb + L.PCB_LOCAL_LO), ld64(mem, pcb + L.PCB_REMOTE_HI),
                              ld64(mem, pcb + L.PCB_REMOTE_LO))
        if found != number:
            return number
    return -1


def fill(count: int) -> tuple[Table, float]:
    """A table full of connected sockets, and how many were opened a second."""
    _, table = make(sockets=count)
    start = time.perf_counter()
    for i in range(count):
        four = i % 3 != 0
        local, remote = ((0, 0x0A000001), (0, i, 7)) if four else ((0xFD << 56, 1), (0xFD01 << 48, i, 7))
        table.open(SocketSpec("udp", FOUR if four else SIX, port=1 + i % 1000, local=local, remote=remote))
    return table, count / (time.perf_counter() - start)


def _check_full(table: Table, count: int) -> None:
    assert find_all(table.mem, table.offset, 0, count) == -1
    with pytest.raises(OSError) as error:
        table.open(udp(port=2000))
    assert error.value.errno == errno.ENOBUFS


def test_twenty_thousand_sockets() -> None:
    table, _ = fill(20_000)
    _check_full(table, 20_000)
    for number in range(0, 20_000, 7):
        table.free(number) if table.passed(table.close(number)) else pytest.fail("nobody reads")
    assert find_all(table.mem, table.offset, 1, 7) == -1
    assert find_all(table.mem, table.offset, 7, 8) == 7
    assert table.open(udp(port=2000)) == 0


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_a_million_sockets(capsys: Any) -> None:
    table, rate = fill(1_000_000)
    _check_full(table, 1_000_000)
    with capsys.disabled():
        print(f" {rate / 1e3:.0f} k sockets opened a second", end="")
