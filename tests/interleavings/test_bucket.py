"""The PCB table's own source in every order of its steps: readers without a lock, writers, and writers that die after
any store.

The table has two buckets, and all keys the first one as their home and the same tag. Of a bucket's eight places the
tests use one or two; the others are taken by entries with another tag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dataplane.pcb import lookup as module
from dataplane.shm import layout as L
from tests.interleavings.explorer import DEAD, End, Explorer, run
from tests.interleavings.source import Ordering, actors, orderings

TABLE, BUCKETS, PCBS = 0, 100_000, 200_000
MODELS = ("tso", "weak")
KEY, FAMILY, TAG, FOREIGN = 2, L.KEY_FAMILY4, 1, 9
X, Y, Z, V = range(4)           # numbers of PCBs; each has its number + 1 as its remote address, unless said otherwise
WHOLE = 50                      # a PCB that is whole has WHOLE + its number as its owner
STAMPS = (2, 3)
# A load of a place that was loaded itself is behind that load on every processor: in "weak", only if it says so.
DEPENDENCY = ("            number = ld32(mem, bucket + L.BUCKET_PCBS + 4 * ctz(hits))\n",
              "            number = load_acquire(mem, bucket + L.BUCKET_PCBS + 4 * ctz(hits))\n")


def bucket(index: int) -> int:
    return BUCKETS + index * L.BUCKET_BYTES


def pcb(number: int) -> int:
    return PCBS + number * L.PCB_BYTES


class Table:
    """Entries in places 0 ... of the two buckets, None for a free place."""

    def __init__(self, home: list[int | None], other: list[int | None], weaken: Ordering | None = None,
                 *changes: tuple[str, str], overflow: int | None = None) -> None:
        constants = {TABLE + L.T_SECRET0: 0, TABLE + L.T_SECRET1: 0, TABLE + L.T_BUCKETS: 1,
                     TABLE + L.T_BUCKET_AT: BUCKETS, TABLE + L.T_PCBS: PCBS, bucket(1) + L.BUCKET_OVERFLOW: 0}
        for number in range(4):
            constants |= {pcb(number) + word: 0 for word in (L.PCB_LOCAL_HI, L.PCB_LOCAL_LO, L.PCB_REMOTE_HI)}
        self.memory: dict[int, int] = {}
        for index, places in enumerate((home, other)):
            constants |= {bucket(index) + L.BUCKET_TAGS + 2 * place: FOREIGN for place in range(len(places), 8)}
            for place, number in enumerate(places):
                if number is not None:
                    self.memory[bucket(index) + L.BUCKET_TAGS + 2 * place] = TAG
                    self.memory[bucket(index) + L.BUCKET_PCBS + 4 * place] = number
                    self.memory |= words(number)
        passed = sum(number is not None for number in other) if overflow is None else overflow
        self.memory[bucket(0) + L.BUCKET_OVERFLOW] = passed
        self.of = actors(module, *changes, constants=constants, weaken=weaken)

    def open(self, number: int, stamp: int, remote: int = 0, unique: bool = False) -> Any:
        """Fills the PCB in and inserts it."""
        for word, value in words(number, remote).items():
            yield "store", word, value
        insert = self.of.insert_unique if unique else self.of.bucket_insert
        return (yield from insert(None, TABLE, number, stamp))

    def find(self, remote: int) -> Any:
        """The PCB with this remote address, or -1; -2 for one that is not whole."""
        value = KEY * remote
        number = yield from self.of.probe(None, TABLE, value, KEY, FAMILY, 0, 0, 0, remote)
        if number >= 0 and (yield "load", pcb(number) + L.PCB_OWNER) != WHOLE + number:
            return -2
        return number

    def reader(self, remote: int, looks: int = 2) -> Any:
        found = []
        for _ in range(looks):
            found.append((yield from self.find(remote)))
        return tuple(found)

    def state(self, memory: dict[int, int]) -> tuple[list[int], int, int]:
        """PCBs that have an entry, how many of them in the second bucket, its home's overflow count. All whole, found,
        and no bucket locked."""
        entries = [(index, memory.get(bucket(index) + L.BUCKET_PCBS + 4 * place, 0))
                   for index in (0, 1) for place in range(8)
                   if memory.get(bucket(index) + L.BUCKET_TAGS + 2 * place, 0) == TAG]
        numbers = sorted(number for _, number in entries)
        remotes = [memory.get(pcb(number) + L.PCB_REMOTE_LO, 0) for number in numbers]
        for number, remote in zip(numbers, remotes, strict=True):
            found = run(memory, lambda remote=remote: self.find(remote))[1]     # type: ignore[misc]
            assert found == number or remotes.count(remote) > 1, f"{number} is not found: {found}"
        assert memory.get(bucket(0) + L.BUCKET_LOCK, 0) == memory.get(bucket(1) + L.BUCKET_LOCK, 0) == 0, "locked"
        return numbers, sum(index for index, _ in entries), memory[bucket(0) + L.BUCKET_OVERFLOW]


def words(number: int, remote: int = 0) -> dict[int, int]:
    """What is written into a PCB before anybody can find it."""
    return {pcb(number) + L.PCB_KEY: KEY | FAMILY << 48, pcb(number) + L.PCB_REMOTE_LO: remote or number + 1,
            pcb(number) + L.PCB_OWNER: WHOLE + number}


def explore(table: Table, parts: dict[str, Any], judge: Callable[[End], bool], *, model: str, stop: bool,
            mortal: tuple[str, ...] = ()) -> Explorer:
    """Outcomes: "" for what may be, else what it was."""
    def outcome(end: End) -> str:
        try:
            return "" if judge(end) else f"{end.results} {table.state(end.memory)}"
        except AssertionError as error:
            return f"{end.results} {error}"

    return Explorer(table.memory, parts, outcome, model=model, mortal=mortal, bad=bool if stop else None)


# -- what may come out ---------------------------------------------------------------------------------


def appears(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True) -> Explorer:
    """A reader finds a PCB that is being opened, whole, or not yet; once found, always. Never the former one of that
    place, which had the same key and is free now."""
    table = Table([None], [], weaken)
    table.memory |= {bucket(0) + L.BUCKET_PCBS: V} | words(V, Y + 1)
    parts = {"writer": lambda: table.open(Y, STAMPS[0]), "reader": lambda: table.reader(Y + 1)}
    return explore(table, parts, lambda end: end.results["writer"] == 1
                   and end.results["reader"] in ((-1, -1), (-1, Y), (Y, Y)), model=model, stop=stop)


def replaced(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True) -> Explorer:
    """A reader finds the former PCB or the one in its place."""
    table = Table([X], [], weaken, DEPENDENCY)

    def writer() -> Any:
        for word, value in words(Y, X + 1).items():
            yield "store", word, value
        return (yield from table.of.replace_entry(None, TABLE, X, Y))

    parts = {"writer": writer, "reader": lambda: table.reader(X + 1)}
    return explore(table, parts, lambda end: end.results == {"writer": 1, "reader": end.results["reader"]}
                   and end.results["reader"] in ((X, X), (X, Y), (Y, Y)), model=model, stop=stop)


def others(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True) -> Explorer:
    """Beside entries that appear and disappear behind a full home bucket, one that was there is always found."""
    table = Table([X], [Y, Z, None], weaken)
    parts = {"remover": lambda: table.of.bucket_remove(None, TABLE, Y), "writer": lambda: table.open(V, STAMPS[0]),
             "reader": lambda: table.reader(Z + 1, 1)}
    return explore(table, parts, lambda end: end.results == {"remover": 1, "writer": 1, "reader": (Z,)}
                   and table.state(end.memory) == ([X, Z, V], 2, 2), model=model, stop=stop)


def counts(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True) -> Explorer:
    """The home's overflow count is right, whoever changes it at the same time."""
    table = Table([X], [Y, None], weaken)
    parts = {"remover": lambda: table.of.bucket_remove(None, TABLE, Y),
             "writer": lambda: table.open(V, STAMPS[0], unique=True)}
    return explore(table, parts, lambda end: end.results == {"remover": 1, "writer": 1}
                   and table.state(end.memory) == ([X, V], 1, 1), model=model, stop=stop)


def writers(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True,
            home: int | None = X) -> Explorer:
    """Two insert at once: each has a place of its own, or was told that the bucket is locked."""
    table = Table([home] if home is not None else [None, None], [None, None], weaken)
    parts = {"first": lambda: table.open(Y, STAMPS[0]), "second": lambda: table.open(Z, STAMPS[1])}

    def judge(end: End) -> bool:
        there = [X] * (home is not None) + [number for number, name in ((Y, "first"), (Z, "second"))
                                            if end.results[name] == 1]
        numbers, passed, overflow = table.state(end.memory)
        return (set(end.results.values()) in ({1}, {1, -1}) and numbers == there
                and passed == overflow == (len(there) - 1 if home is not None else 0))

    return explore(table, parts, judge, model=model, stop=stop)


def unique(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True,
           home: int | None = None) -> Explorer:
    """Two complete the same handshake: one has the connection, the other finds it or a lock."""
    table = Table([home, None] if home is None else [home], [None], weaken)
    parts = {"first": lambda: table.open(Y, STAMPS[0], 7, True), "second": lambda: table.open(Z, STAMPS[1], 7, True)}
    may = {(1, -1), (1, -2 - Y), (-1, 1), (-2 - Z, 1)}

    def judge(end: End) -> bool:
        table.state(end.memory)
        return (end.results["first"], end.results["second"]) in may

    return explore(table, parts, judge, model=model, stop=stop)


def writer_dies(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True, home: int | None = None,
                unique: bool = False) -> Explorer:
    """Its replacement takes the locks away and inserts; a reader finds what was there all the time."""
    table = Table([X, None] if home is None else [X], [Z, None, None], weaken)

    def replacement() -> Any:
        yield "dead", "writer"
        yield from table.of.buckets_unlock(None, TABLE, STAMPS[0])
        return (yield from table.open(V, STAMPS[1]))

    parts = {"writer": lambda: table.open(Y, STAMPS[0], 0, unique), "reader": lambda: table.reader(Z + 1, 1),
             "replacement": replacement}

    def judge(end: End) -> bool:
        numbers, passed, overflow = table.state(end.memory)
        if end.results["reader"] != (Z,):
            return False
        if end.results["writer"] != DEAD:
            return end.results["writer"] == 1 and numbers == [X, Y, Z] and overflow == passed
        return end.results["replacement"] == 1 and set(numbers) - {Y} == {X, Z, V} and passed <= overflow <= passed + 1

    return explore(table, parts, judge, model=model, stop=stop, mortal=("writer",))


def two_replacements(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True) -> Explorer:
    """Two take the dead writer's lock away at once: neither takes the other's."""
    table = Table([None, None, None], [], weaken)

    def replacement(number: int, stamp: int) -> Any:
        yield "dead", "writer"
        yield from table.of.buckets_unlock(None, TABLE, STAMPS[0])
        return (yield from table.open(number, stamp))

    parts = {"writer": lambda: table.open(Y, STAMPS[0]), "first": lambda: replacement(Z, 3),
             "second": lambda: replacement(V, 4)}

    def judge(end: End) -> bool:
        done = [end.results[name] for name in ("first", "second")]
        there = [number for number, result in zip((Z, V), done, strict=True) if result == 1]
        numbers, _, _ = table.state(end.memory)
        return end.results["writer"] != DEAD or (bool(there) and sorted({*numbers, Y}) == sorted([Y, *there])
                                                 and set(done) <= {1, -1})

    return explore(table, parts, judge, model=model, stop=stop, mortal=("writer",))


def remover_dies(weaken: Ordering | None = None, *, model: str = "weak", stop: bool = True) -> Explorer:
    """Its replacement removes again; a reader finds what was there all the time."""
    table = Table([X], [Y, Z], weaken)

    def replacement() -> Any:
        yield "dead", "remover"
        return (yield from table.of.bucket_remove(None, TABLE, Y))

    parts = {"remover": lambda: table.of.bucket_remove(None, TABLE, Y), "reader": lambda: table.reader(Z + 1),
             "replacement": replacement}

    def judge(end: End) -> bool:
        numbers, passed, overflow = table.state(end.memory)
        exact = 0 if end.results["remover"] != DEAD or end.results["replacement"] == 1 else 1
        return numbers == [X, Z] and end.results["reader"] == (Z, Z) and passed <= overflow <= passed + exact

    return explore(table, parts, judge, model=model, stop=stop, mortal=("remover",))


CHECKS = (appears, replaced, counts, writers, unique, two_replacements)
LARGER = (others, writer_dies, remover_dies)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("check", CHECKS + LARGER, ids=lambda check: check.__name__)
def test_nothing_else_comes_out(check: Any, model: str) -> None:
    assert set(check(model=model, stop=False).outcomes) == {""}


@pytest.mark.parametrize("check, other", [
    (writers, {"home": None}), (unique, {"home": X}), (writer_dies, {"home": X}), (writer_dies, {"unique": True}),
    (writer_dies, {"home": X, "unique": True}),
], ids=["writers with room", "unique without room", "dies without room", "unique dies", "unique dies without room"])
def test_nor_with_another_home(check: Any, other: dict[str, Any]) -> None:
    assert set(check(model="tso", stop=False, **other).outcomes) == {""}


CLAIMS = list(orderings(module, "probe", "_place", "_claim", "_insert_from", "insert_unique", "_lower", "replace_entry",
                        "buckets_unlock"))
NEEDLESS = {
    # That they are one step each is what counts, and is found. In front of an entry that appears, the lock of its
    # bucket and the release of its tag are the barriers; and who misses one that disappears has come too late for it.
    "lookup._insert_from: fetch_add is no barrier",
    "lookup.insert_unique: fetch_add is no barrier",
    "lookup._lower: fetch_add is no barrier",
    # The death, reported by the kernel, is the barrier.
    "lookup.buckets_unlock: cas is no barrier",
}


def fails(check: Any, claim: Ordering) -> bool:
    """Whether the check finds that this is missing."""
    return set(check(claim).outcomes) != {""}


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_each_ordering_matters(claim: Ordering) -> None:
    assert any(fails(check, claim) for check in CHECKS) == (str(claim) not in NEEDLESS)
