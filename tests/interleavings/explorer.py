"""Runs a few actors in every order, with store buffers and with deaths, and collects what can come out.

An actor is a generator. Each `yield` is one step on shared memory and gives back its result:

    ("load", at)  ("store", at, value)  ("release", at, value)  ("fence",)
    ("cas", at, old, new)  ("exchange", at, value)  ("add", at, value)
    ("park", at, value)    a futex, first half: 1 if memory is `value`: registered as sleeping; else 0
    ("parked", at)         second half: goes on when it was woken
    ("unpark", at)         wakes one that is registered, if any
    ("dead", name)         goes on when that actor has died and its stores have landed
    ("choose", n)          0 ... n - 1: each of them

A store goes into its actor's store buffer and reaches memory later, at any time; the actor itself sees
it at once. Fences and read-modify-writes wait until the buffer is empty. How buffers drain:

    "sc"    at once: sequential consistency
    "tso"   in order: x86
    "pso"   in any order, but same addresses in order, and a release store after everything
            before it: finds a release that should have been one, which x86 would forgive

Loads are never reordered, so that a missing acquire is not found here.

The state is memory, the buffers, and of each actor the results that it has been given: an actor is a
function of these. Two orders that lead to the same state are followed once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Step = tuple[Any, ...]
Actor = Callable[[], Generator[Step, Any, Any]]
Memory = dict[int, int]

DEAD = "dead"
STUCK = "stuck"


class _State(NamedTuple):
    memory: tuple[tuple[int, int], ...]
    buffers: tuple[tuple[tuple[int, int, bool], ...], ...]   # per actor, oldest first: at, value, release?
    histories: tuple[tuple[Any, ...], ...]
    dead: frozenset[int]


@dataclass(frozen=True)
class End:
    """How one execution ended: memory, and for each actor what it returned, or DEAD, or STUCK."""

    memory: Memory
    results: dict[str, Any]


class Explorer:
    """`outcomes` maps what `outcome(end)` gave to one schedule that leads there."""

    def __init__(self, memory: Mapping[int, int], actors: Mapping[str, Actor],
                 outcome: Callable[[End], Hashable], *, model: str = "tso", mortal: tuple[str, ...] = (),
                 limit: int = 2_000_000) -> None:
        self.names = list(actors)
        self.actors = list(actors.values())
        self.outcome, self.model, self.limit = outcome, model, limit
        self.mortal = {self.names.index(name) for name in mortal}
        self.outcomes: dict[Hashable, list[str]] = {}
        self.states = 0
        self._next: dict[tuple[int, tuple[Any, ...]], tuple[str, Any]] = {}
        count = len(self.names)
        self._run(_State(tuple(sorted(memory.items())), ((),) * count, ((),) * count, frozenset()))

    def _run(self, start: _State) -> None:
        seen: dict[_State, tuple[_State | None, str]] = {start: (None, "")}
        todo = [start]
        while todo:
            state = todo.pop()
            self.states += 1
            if self.states > self.limit:
                raise RuntimeError("too many states: make the model smaller")
            moved = False
            for label, after in self._successors(state):
                moved = moved or not label.endswith("dies")     # nobody has to die
                if after not in seen:
                    seen[after] = (state, label)
                    todo.append(after)
            if not moved:
                self._finish(state, seen)

    def _finish(self, state: _State, seen: dict[_State, tuple[_State | None, str]]) -> None:
        results = {}
        for index, name in enumerate(self.names):
            kind, value = self._step(index, state.histories[index])
            results[name] = DEAD if index in state.dead else value if kind == "return" else STUCK
        outcome = self.outcome(End(dict(state.memory), results))
        if outcome not in self.outcomes:
            schedule, at = [], state
            while seen[at][0] is not None:
                before, label = seen[at]
                schedule.append(label)
                assert before is not None
                at = before
            self.outcomes[outcome] = schedule[::-1]

    def _step(self, index: int, history: tuple[Any, ...]) -> tuple[str, Any]:
        """("step", what the actor does next) or ("return", its value)."""
        key = (index, history)
        if key not in self._next:
            actor = self.actors[index]()
            try:
                step = next(actor)
                for result in history:
                    step = actor.send(result)
                self._next[key] = ("step", step)
            except StopIteration as end:
                self._next[key] = ("return", end.value)
        return self._next[key]

    def _successors(self, state: _State) -> Iterator[tuple[str, _State]]:
        memory = dict(state.memory)
        for index, name in enumerate(self.names):
            for position in self._drainable(state.buffers[index]):
                at, value, _ = state.buffers[index][position]
                rest = state.buffers[index][:position] + state.buffers[index][position + 1:]
                yield f"{name}: [{at}] = {value} lands", state._replace(
                    memory=_with(memory, at, value), buffers=_put(state.buffers, index, rest))
            if index in state.dead:
                continue
            kind, step = self._step(index, state.histories[index])
            if kind == "return":
                continue
            if index in self.mortal and not state.dead:
                yield f"{name}: dies", state._replace(dead=state.dead | {index})
            for result, after in self._perform(state, memory, index, step):
                histories = _put(state.histories, index, state.histories[index] + (result,))
                yield f"{name}: {step} gives {result}", after._replace(histories=histories)

    def _drainable(self, buffer: tuple[tuple[int, int, bool], ...]) -> Iterator[int]:
        for position, (at, _, release) in enumerate(buffer):
            if position == 0 or (self.model == "pso" and not release
                                 and all(at != earlier[0] for earlier in buffer[:position])):
                yield position

    def _perform(self, state: _State, memory: Memory, index: int, step: Step) -> Iterator[tuple[Any, _State]]:
        """Each (result, state) that the step can lead to now; none: it has to wait."""
        kind, *args = step
        buffer = state.buffers[index]
        if kind == "choose":
            yield from ((choice, state) for choice in range(args[0]))
        elif kind == "dead":
            other = self.names.index(args[0])
            if other in state.dead and not state.buffers[other]:
                yield 0, state
        elif kind == "load":
            own = [value for at, value, _ in buffer if at == args[0]]
            yield (own[-1] if own else memory.get(args[0], 0)), state
        elif kind in ("store", "release") and self.model != "sc":
            entry = (args[0], args[1], kind == "release")
            yield 0, state._replace(buffers=_put(state.buffers, index, buffer + (entry,)))
        elif not buffer:
            yield from self._atomic(state, memory, kind, args)

    def _atomic(self, state: _State, memory: Memory, kind: str,
                args: list[Any]) -> Iterator[tuple[Any, _State]]:
        """The same for the steps that need an empty store buffer: (result, changed word, its value)."""
        at = args[0] if args else 0
        value = memory.get(at, 0)
        sleepers, woken = (memory.get(~(2 * at + i), 0) for i in (0, 1))
        changes: dict[str, Callable[[], tuple[int, dict[int, int]]]] = {
            "fence": lambda: (0, {}),
            "store": lambda: (0, {at: args[1]}),
            "release": lambda: (0, {at: args[1]}),
            "cas": lambda: (1, {at: args[2]}) if value == args[1] else (0, {}),
            "exchange": lambda: (value, {at: args[1]}),
            "add": lambda: (value, {at: value + args[1]}),
            "park": lambda: (1, {~(2 * at): sleepers + 1}) if value == args[1] else (0, {}),
            "parked": lambda: (0, {~(2 * at + 1): woken - 1}),
            "unpark": lambda: (1, {~(2 * at): sleepers - 1, ~(2 * at + 1): woken + 1}) if sleepers else (0, {}),
        }
        if kind == "parked" and not woken:
            return
        result, changed = changes[kind]()
        yield result, state._replace(memory=tuple(sorted({**memory, **changed}.items())))


def run(memory: Mapping[int, int], actor: Actor) -> tuple[Memory, Any]:
    """Runs one actor alone; memory afterwards and what it returned."""
    ends: list[End] = []
    Explorer(memory, {"alone": actor}, lambda end: ends.append(end), model="sc")
    (end,) = ends
    return end.memory, end.results["alone"]


def _with(memory: Memory, at: int, value: int) -> tuple[tuple[int, int], ...]:
    return tuple(sorted({**memory, at: value}.items()))


def _put(items: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return items[:index] + (value,) + items[index + 1:]
