"""Runs a few actors in every order, with weak memory and with deaths, and collects what can come out.

An actor is a generator. Each `yield` is one step on shared memory and gives back its result:

    ("load", at)  ("acquire", at)  ("acquire-fence",)  ("store", at, value)  ("release", at, value)  ("fence",)
    ("cas", at, old, new)  ("exchange", at, value)  ("add", at, value)     full barriers, as on x86; "cas-relaxed" and
                           so on: none
    ("read", at)           a load whose value nothing depends on, so that it may be done late: gives its number, the
                           value stands in `End.reads` of its actor
    ("nonzero", at)        spins until the word is not 0
    ("park", at, value)    a futex, first half: 1 if memory is `value`: registered as sleeping; else 0
    ("parked", at)         second half: goes on when it was woken
    ("unpark", at)         wakes one that is registered, if any
    ("dead", name)         goes on when that actor has died
    ("choose", n)          0 ... n - 1: each of them

What memory does with them is the model's:

    "sc"    sequential consistency
    "tso"   x86: a store goes into its actor's store buffer and reaches memory later, in order; the actor itself sees
            it at once. Barriers wait until the buffer is empty
    "pso"   buffers drain in any order, but same addresses in order, and a release store after everything before
            it: finds a release that should have been one, which x86 forgives and a compiler does not
    "weak"  loads may find old values, too (views.py): finds missing acquires

A death loses what is in the store buffer: with "tso" that is to have died earlier, with "pso" and "weak" it is what a
compiler that moves stores leaves behind.

The state is memory and of each actor the results that it has been given: an actor is a function of these. Two orders
that lead to the same state are followed once. A store into a store buffer is nothing to anybody else: in a state where
one is next, no other order is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.interleavings.buffers import Buffers, Memory
from tests.interleavings.views import Views

Step = tuple[Any, ...]
Actor = Callable[[], Generator[Step, Any, Any]]

DEAD = "dead"
STUCK = "stuck"
MODELS = ("sc", "tso", "pso", "weak")


class _State(NamedTuple):
    machine: Any
    histories: tuple[tuple[Any, ...], ...]
    dead: frozenset[int]


@dataclass(frozen=True)
class End:
    """How one execution ended: memory, and for each actor what it returned, or DEAD, or STUCK, and what it read."""

    memory: Memory
    results: dict[str, Any]
    reads: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Explorer:
    """`outcomes` maps what `outcome(end)` gave to one schedule that leads there. With `bad` it ends with the first
    outcome that is."""

    def __init__(self, memory: Mapping[int, int], actors: Mapping[str, Actor],
                 outcome: Callable[[End], Hashable], *, model: str = "tso", mortal: tuple[str, ...] = (),
                 bad: Callable[[Any], bool] | None = None, limit: int = 2_000_000) -> None:
        self.names = list(actors)
        self.actors = list(actors.values())
        self.outcome, self.bad, self.limit = outcome, bad, limit
        self.machine: Any = Views() if model == "weak" else Buffers(model)
        self.mortal = {self.names.index(name) for name in mortal}
        self.outcomes: dict[Hashable, list[str]] = {}
        self.states = 0
        self._next: dict[tuple[int, tuple[Any, ...]], tuple[str, Any]] = {}
        count = len(self.names)
        self._run(_State(self.machine.start(memory, count), ((),) * count, frozenset()))

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
            if not moved and self._finish(state, seen):
                return

    def _finish(self, state: _State, seen: dict[_State, tuple[_State | None, str]]) -> bool:
        """Notes the outcome; whether it is a bad one."""
        results, reads = {}, {}
        for index, name in enumerate(self.names):
            kind, value = self._step(index, state.histories[index])
            results[name] = DEAD if index in state.dead else value if kind == "return" else STUCK
            reads[name] = self.machine.reads(state.machine, index)
        outcome = self.outcome(End(self.machine.memory(state.machine), results, reads))
        if outcome not in self.outcomes:
            schedule, at = [], state
            while seen[at][0] is not None:
                before, label = seen[at]
                schedule.append(label)
                assert before is not None
                at = before
            self.outcomes[outcome] = schedule[::-1]
        return self.bad is not None and self.bad(outcome)

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
        machine = state.machine
        steps = [None if index in state.dead else self._step(index, state.histories[index])
                 for index in range(len(self.names))]
        for index, step in enumerate(steps):
            if step is not None and step[0] == "step" and self._is_private(state, index, step[1]):
                yield from self._moves(state, index, step[1])
                return
        for index, step in enumerate(steps):
            if index not in state.dead:
                for label, after in self.machine.lands(machine, index):
                    yield f"{self.names[index]}: {label}", state._replace(machine=after)
            if step is not None and step[0] == "step":
                yield from self._moves(state, index, step[1])

    def _is_private(self, state: _State, index: int, step: Step) -> bool:
        """Whether the step concerns nobody else, nor any death but the actor's own."""
        return self.machine.is_private(step) and (bool(state.dead) or self.mortal <= {index})

    def _moves(self, state: _State, index: int, step: Step) -> Iterator[tuple[str, _State]]:
        name = self.names[index]
        if index in self.mortal and not state.dead:
            for machine in self.machine.die(state.machine, index):
                yield f"{name}: dies", state._replace(dead=state.dead | {index}, machine=machine)
        for result, after in self._perform(state, index, step):
            yield f"{name}: {step} gives {result}", state._replace(
                machine=after, histories=_put(state.histories, index, state.histories[index] + (result,)))

    def _perform(self, state: _State, index: int, step: Step) -> Iterator[tuple[Any, Any]]:
        """Each (result, machine) that the step can lead to now; none: it has to wait."""
        kind, *args = step
        if kind == "choose":
            yield from ((choice, state.machine) for choice in range(args[0]))
        elif kind == "dead":
            other = self.names.index(args[0])
            if other in state.dead:
                yield 0, self.machine.mourn(state.machine, index, other)
        else:
            yield from self.machine.perform(state.machine, index, kind, args)


def run(memory: Mapping[int, int], actor: Actor) -> tuple[Memory, Any]:
    """Runs one actor alone; memory afterwards and what it returned."""
    ends: list[End] = []
    Explorer(memory, {"alone": actor}, lambda end: ends.append(end), model="sc")
    (end,) = ends
    return end.memory, end.results["alone"]


def _put(items: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return items[:index] + (value,) + items[index + 1:]
