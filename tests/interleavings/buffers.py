"""Memory with a store buffer for each actor: the models "sc", "tso" and "pso" of the explorer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Memory = dict[int, int]


class _State(NamedTuple):
    memory: tuple[tuple[int, int], ...]
    buffers: tuple[tuple[tuple[int, int, bool], ...], ...]   # per actor, oldest first: at, value, release?
    reads: tuple[tuple[int, ...], ...]


class Buffers:
    """States are values; nothing here changes one."""

    def __init__(self, model: str) -> None:
        assert model in ("sc", "tso", "pso"), model
        self.model = model

    def start(self, memory: Mapping[int, int], count: int) -> _State:
        """The state in which `count` actors begin."""
        return _State(tuple(sorted(memory.items())), ((),) * count, ((),) * count)

    def memory(self, state: _State) -> Memory:
        """What stands in memory."""
        return dict(state.memory)

    def reads(self, state: _State, index: int) -> tuple[int, ...]:
        """What the actor's "read" steps have found."""
        return state.reads[index]

    def is_private(self, step: tuple[Any, ...]) -> bool:
        """Whether nobody else can notice the step."""
        return (self.model != "sc" and step[0] in ("store", "release")) or step[0] == "acquire-fence"

    def die(self, state: _State, index: int) -> Iterator[_State]:
        """The actor's buffer is lost."""
        yield state._replace(buffers=_put(state.buffers, index, ()))

    def mourn(self, state: _State, index: int, dead: int) -> _State:
        """The actor hears of a death."""
        return state

    def lands(self, state: _State, index: int) -> Iterator[tuple[str, _State]]:
        """What can come out of the actor's buffer next."""
        buffer = state.buffers[index]
        for position, (at, value, release) in enumerate(buffer):
            if position == 0 or (self.model == "pso" and not release
                                 and all(at != earlier[0] for earlier in buffer[:position])):
                rest = buffer[:position] + buffer[position + 1:]
                yield f"[{at}] = {value} lands", state._replace(
                    memory=_with(state.memory, {at: value}), buffers=_put(state.buffers, index, rest))

    def perform(self, state: _State, index: int, kind: str, args: list[Any]) -> Iterator[tuple[Any, _State]]:
        """Each (result, state) that the step can lead to now; none: it has to wait."""
        kind = kind.removesuffix("-relaxed")
        buffer = state.buffers[index]
        if kind == "acquire-fence":
            yield 0, state
        elif kind in ("load", "acquire", "read", "nonzero"):
            own = [value for at, value, _ in buffer if at == args[0]]
            value = own[-1] if own else dict(state.memory).get(args[0], 0)
            if kind == "read":
                reads = state.reads[index]
                yield len(reads), state._replace(reads=_put(state.reads, index, (*reads, value)))
            elif kind != "nonzero" or value:
                yield value, state
        elif kind in ("store", "release") and self.model != "sc":
            entry = (args[0], args[1], kind == "release")
            yield 0, state._replace(buffers=_put(state.buffers, index, (*buffer, entry)))
        elif not buffer:
            memory = dict(state.memory)
            if (done := atomic(memory, kind, args)) is not None:
                yield done[0], state._replace(memory=_with(state.memory, done[1]))


def atomic(memory: Memory, kind: str, args: list[Any]) -> tuple[int, Memory] | None:
    """A step on memory itself: its result and the words that it changes; None: it has to wait.

    A futex's waiters are counted in memory too, in places that nothing else has: registered, and woken.
    """
    at = args[0] if args else 0
    value = memory.get(at, 0)
    sleepers, woken = (memory.get(~(2 * at + i), 0) for i in (0, 1))
    changes: dict[str, Callable[[], tuple[int, Memory]]] = {
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
        return None
    return changes[kind]()


def _with(memory: tuple[tuple[int, int], ...], changed: Memory) -> tuple[tuple[int, int], ...]:
    return tuple(sorted({**dict(memory), **changed}.items())) if changed else memory


def _put(items: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return items[:index] + (value,) + items[index + 1:]
