"""Memory in which a load may find an old value: the model "weak" of the explorer.

Each word has a history of *messages*, one for each store to it, in the order of the stores. Each actor has a *view*:
for each word the oldest message that it can still find. A load finds any message that is not older, and from then on
none older than that one. A release store's message carries its actor's view; an acquire load that finds it
joins that view to its own, a plain load does so at the next acquire fence. Barriers and read-modify-writes join
with the view of all barriers before, and find the newest message.

This is the operational model of C11's atomics (Kang, Hur, Lahav, Vafeiadis, Dreyer: "A promising semantics for
relaxed-memory concurrency", POPL 2017) without promises, where a new message is always the word's newest, and
where read-modify-writes are full barriers, as on x86, unless they are "-relaxed". For promises, loads that are done
behind a later store, there is the step "read": it is done at any time before the actor's next release or barrier.

Of an actor that dies, one store may be lost, as if the compiler had moved it behind the place of the death: any since
its last barrier that nobody has found yet. Releases behind it are then lost, too. Who hears of its death has the view
of what is left.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.interleavings.buffers import Memory, atomic

View = tuple[tuple[int, int], ...]      # word, number of the message; 0 is left out


class _Thread(NamedTuple):
    current: View = ()
    acquired: View = ()         # of what an acquire fence would join
    released: View = ()         # what a plain store's message carries: the view at the last fence
    reads: tuple[Any, ...] = ()     # values, and (at,) of those that are not done yet
    stores: tuple[tuple[int, int, bool], ...] = ()  # since its last barrier: word, number, release?


class _State(NamedTuple):
    words: tuple[tuple[int, tuple[tuple[int, int, View], ...]], ...]    # at, its messages: number, value, view
    threads: tuple[_Thread, ...]
    barriers: View
    futexes: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=1 << 16)
def _join(a: View, b: View) -> View:
    if a == b or not b:
        return a
    joined = dict(a)
    for at, number in b:
        if joined.get(at, 0) < number:
            joined[at] = number
    return tuple(sorted(joined.items()))


class Views:
    """States are values; nothing here changes one."""

    def start(self, memory: Mapping[int, int], count: int) -> _State:
        """The state in which `count` actors begin."""
        words = tuple((at, ((0, value, ()),)) for at, value in sorted(memory.items()))
        return _State(words, (_Thread(),) * count, (), ())

    def memory(self, state: _State) -> Memory:
        """The newest of each word."""
        return {at: messages[-1][1] for at, messages in state.words}

    def reads(self, state: _State, index: int) -> tuple[int, ...]:
        """What the actor's "read" steps have found."""
        return state.threads[index].reads

    def is_private(self, step: tuple[Any, ...]) -> bool:
        """Whether nobody else can notice the step."""
        return step[0] == "acquire-fence"

    def die(self, state: _State, index: int) -> Iterator[_State]:
        """The actor does nothing more: and nothing is lost, or one store, with the releases behind it."""
        yield state
        stores = state.threads[index].stores
        others = [dict(thread.acquired) for number, thread in enumerate(state.threads) if number != index]
        found = [any(view.get(at, 0) >= number for view in others) for at, number, _ in stores]
        for i, (at, number, _) in enumerate(stores):
            behind = [j for j in range(i + 1, len(stores)) if stores[j][2]]
            if not any(found[j] for j in (i, *behind)):
                yield self._without(state, index, frozenset({(at, number), *(stores[j][:2] for j in behind)}))

    def _without(self, state: _State, index: int, lost: frozenset[tuple[int, int]]) -> _State:
        """As if these stores of the dead actor had never been made."""
        words = tuple((at, tuple(message for message in messages if (at, message[0]) not in lost))
                      for at, messages in state.words)
        newest = {at: messages[-1][0] for at, messages in words}
        view = tuple((at, min(number, newest[at])) for at, number in state.threads[index].acquired if newest[at])
        dead = _Thread(view, view, view)
        return self._trimmed(self._thread(state._replace(words=words), index, dead))

    def mourn(self, state: _State, index: int, dead: int) -> _State:
        """The actor hears of a death: all that was stored is there for it."""
        return self._see(state, index, state.threads[dead].acquired, acquire=True)

    def lands(self, state: _State, index: int) -> Iterator[tuple[str, _State]]:
        """What of the actor's late reads can be done now."""
        thread = state.threads[index]
        for number, read in enumerate(thread.reads):
            if isinstance(read, tuple):
                for _, value, _ in self._found(state, index, read[0]):
                    reads = (*thread.reads[:number], value, *thread.reads[number + 1:])
                    yield f"read {number} gives {value}", self._thread(state, index, thread._replace(reads=reads))

    def perform(self, state: _State, index: int, kind: str, args: list[Any]) -> Iterator[tuple[Any, _State]]:
        """Each (result, state) that the step can lead to now; none: it has to wait."""
        thread = state.threads[index]
        late = any(isinstance(read, tuple) for read in thread.reads)
        if kind in ("load", "acquire"):
            for number, value, view in self._found(state, index, args[0]):
                view = _join(view, ((args[0], number),) if number else ())
                after = self._see(state, index, view, kind == "acquire", args[0], number)
                yield value, self._trimmed(after)
        elif kind == "read":
            yield len(thread.reads), self._thread(state, index, thread._replace(reads=(*thread.reads, (args[0],))))
        elif kind == "acquire-fence":
            yield 0, self._trimmed(self._thread(state, index, thread._replace(current=thread.acquired)))
        elif kind == "store":
            yield 0, self._trimmed(self._store(state, index, args[0], args[1], thread.released, loose=True))
        elif kind == "nonzero":
            number, value, _ = self._messages(state, args[0])[-1]
            if value:
                yield value, self._trimmed(self._see(state, index, (), False, args[0], number))
        elif not late:
            yield from self._ordered(state, index, kind, args)

    def _ordered(self, state: _State, index: int, kind: str, args: list[Any]) -> Iterator[tuple[Any, _State]]:
        """The steps behind which no read may be done that stands before them."""
        if kind == "release":
            carried = state.threads[index].current
            yield 0, self._trimmed(self._store(state, index, args[0], args[1], carried, loose=True, release=True))
            return
        relaxed = kind.endswith("-relaxed")
        memory = self.memory(state) | dict(state.futexes)
        done = atomic(memory, kind.removesuffix("-relaxed"), args)
        if done is None:
            return
        state = state if relaxed else self._barrier(state, index)
        view: View = ()
        if args:
            number, _, view = self._messages(state, args[0])[-1]
            state = self._see(state, index, view, not relaxed, args[0], number)
        for at, value in done[1].items():
            if at < 0:
                state = state._replace(futexes=tuple(sorted({**dict(state.futexes), at: value}.items())))
            else:
                thread = state.threads[index]
                carried = _join(thread.released if relaxed else thread.current, view)
                state = self._store(state, index, at, value, carried)
        yield done[0], self._trimmed(state if relaxed else self._barrier(state, index))

    # -- pieces ------------------------------------------------------------------------------------

    def _messages(self, state: _State, at: int) -> tuple[tuple[int, int, View], ...]:
        for word, messages in state.words:
            if word == at:
                return messages
        return ((0, 0, ()),)

    def _found(self, state: _State, index: int, at: int) -> list[tuple[int, int, View]]:
        """The messages that the actor's load can find."""
        oldest = dict(state.threads[index].current).get(at, 0)
        return [message for message in self._messages(state, at) if message[0] >= oldest]

    def _thread(self, state: _State, index: int, thread: _Thread) -> _State:
        return state._replace(threads=(*state.threads[:index], thread, *state.threads[index + 1:]))

    def _see(self, state: _State, index: int, view: View, acquire: bool, at: int = 0, number: int = 0) -> _State:
        """The actor has found message `number` of word `at`, which carries `view`."""
        thread = state.threads[index]
        found: View = ((at, number),) if number else ()
        current = _join(_join(thread.current, found), view if acquire else ())
        acquired = _join(_join(thread.acquired, current), view)
        return self._thread(state, index, thread._replace(current=current, acquired=acquired))

    def _barrier(self, state: _State, index: int) -> _State:
        thread = state.threads[index]
        view = _join(state.barriers, thread.acquired)
        thread = thread._replace(current=view, acquired=view, released=view, stores=())
        return self._thread(state, index, thread)._replace(barriers=view)

    def _store(self, state: _State, index: int, at: int, value: int, carried: View, loose: bool = False,
               release: bool = False) -> _State:
        messages = self._messages(state, at)
        number = messages[-1][0] + 1
        words = dict(state.words)
        words[at] = (*messages, (number, value, carried))
        if loose:
            thread = state.threads[index]
            state = self._thread(state, index, thread._replace(stores=(*thread.stores, (at, number, release))))
        return self._see(state._replace(words=tuple(sorted(words.items()))), index, (), False, at, number)

    def _trimmed(self, state: _State) -> _State:
        """Without the messages that nobody can find any more."""
        views = [dict(thread.current) for thread in state.threads]
        words = []
        for at, messages in state.words:
            if len(messages) > 1:
                oldest = min(view.get(at, 0) for view in views)
                messages = tuple(message for message in messages if message[0] >= oldest)
            words.append((at, messages))
        return state._replace(words=tuple(words))
