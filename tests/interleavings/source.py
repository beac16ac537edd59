"""Turns a module's kernels into actors for the explorer: the very source that is compiled, not a copy of it.

Each call of an atomic (or a plain access, or a futex) becomes a `yield` of the step, each call of another function of
the module, or of an actor from another one (`use`), a `yield from`. Words that never change can be read without a step
(`constants`), which keeps the number of orders small.

`orderings` lists what a module claims about order: each fence, acquire, release and read-modify-write, and what is
left if it is taken away. `actors` makes actors without one of them.
"""

from __future__ import annotations

import ast
import errno
import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

# Kernel function to step, and how many arguments after `mem` are the step's.
STEPS: dict[str, tuple[str, int]] = {
    "load_acquire": ("acquire", 1), "load_acquire32": ("acquire", 1), "load_relaxed": ("load", 1),
    "store_release": ("release", 2), "store_release16": ("release", 2), "store_release32": ("release", 2),
    "store_relaxed": ("store", 2), "cas": ("cas", 3), "exchange": ("exchange", 2), "fetch_add": ("add", 2),
    "fence": ("fence", 0), "acquire": ("acquire-fence", 0), "futex_wake": ("unpark", 1),
    **{f"ld{bits}": ("load", 1) for bits in (8, 16, 32, 64)}, **{f"st{bits}": ("store", 2) for bits in (8, 16, 32, 64)},
}

PLAIN, GONE, SPLIT, RELAXED = "is plain", "is gone", "is a load and a store", "is no barrier"
WEAKER = {
    "acquire": (PLAIN,), "release": (PLAIN,), "fence": (GONE,), "acquire-fence": (GONE,),
    "cas": (SPLIT, RELAXED), "exchange": (SPLIT, RELAXED), "add": (SPLIT, RELAXED),
}


class Ordering(NamedTuple):
    """One claim of a module about order, and what becomes of it: `how`."""

    module: str
    function: str
    atomic: str
    number: int         # 1 for the first such atomic of the function
    how: str

    def __str__(self) -> str:
        which = "" if self.number == 1 else f" {self.number}"
        return f"{self.module.rpartition('.')[2]}.{self.function}: {self.atomic}{which} {self.how}"


class _Actors(ast.NodeTransformer):
    def __init__(self, functions: set[str], weaken: Ordering | None) -> None:
        self.functions, self.weaken = functions, weaken
        self.function = ""
        self.found: list[tuple[str, str, int]] = []     # function, atomic, number
        self.counts: Counter[tuple[str, str]] = Counter()
        self.weakened = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.function = node.name
        self.generic_visit(node)
        node.decorator_list = []
        # A function without a step has to be a generator too.
        node.body.append(ast.parse("if False:\n    yield").body[0])
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in self.functions:
            return ast.copy_location(ast.YieldFrom(node), node)
        if name not in STEPS:
            return node
        kind, count = STEPS[name]
        arguments = node.args[1:1 + count]
        if kind in WEAKER:
            self.counts[self.function, name] += 1
            claim = self.function, name, self.counts[self.function, name]
            self.found.append(claim)
            if self.weaken is not None and claim == self.weaken[1:4]:
                self.weakened = True
                return _weaker(kind, self.weaken.how, arguments)
        return _step(kind, arguments)


def _step(kind: str, arguments: list[ast.expr]) -> ast.expr:
    return ast.Yield(ast.Tuple([ast.Constant(kind), *arguments], ast.Load()))


def _weaker(kind: str, how: str, arguments: list[ast.expr]) -> ast.expr:
    assert how in WEAKER[kind], (kind, how)
    if how == GONE:
        return ast.Constant(0)
    if how == RELAXED:
        return _step(f"{kind}-relaxed", arguments)
    if how == SPLIT:
        return ast.YieldFrom(ast.Call(ast.Name("_split", ast.Load()), [ast.Constant(kind), *arguments], []))
    return _step({"acquire": "load", "release": "store"}[kind], arguments)


def actors(module: ModuleType, *changes: tuple[str, str], constants: dict[int, int] | None = None,
           weaken: Ordering | None = None, use: Any = None) -> Any:
    """The functions of `module` as generator functions with the same arguments.

    `changes`: (text, replacement) made in the source first. Each has to apply. `weaken`: an ordering that is taken
    away, if it is one of this module. `use`: a namespace of generator functions, in the place of those that the
    module imports under these names, or has.
    """
    mine = weaken if weaken is not None and weaken.module == module.__name__ else None
    code, names, weakened = _compiled(module, changes, mine, tuple(sorted(vars(use))) if use is not None else ())
    assert weakened or mine is None, f"there is no {mine}"
    namespace = dict(vars(module))
    namespace |= {"futex_wait": _futex_wait, "match8": _match8, "copy": _copy, "_split": _split,
                  "shr": lambda value, bits: (value & (1 << 64) - 1) >> bits, "fold": _fold, "ctz": _ctz,
                  "pause": lambda: None}
    exec(code, namespace)
    namespace |= vars(use) if use is not None else {}
    functions = {name: namespace[name] for name in names}
    if constants:
        functions = {name: _without(function, constants) for name, function in functions.items()}
    return SimpleNamespace(**functions)


def orderings(module: ModuleType, *functions: str) -> Iterator[Ordering]:
    """What `functions` of the module (none: all) claim about order, each with what can be taken away of it."""
    tree, names = _kernels(inspect.getsource(module))
    assert set(functions) <= names, set(functions) - names
    transformer = _Actors(names, None)
    transformer.visit(tree)
    for function, atomic, number in transformer.found:
        if not functions or function in functions:
            for how in WEAKER[STEPS[atomic][0]]:
                yield Ordering(module.__name__, function, atomic, number, how)


def _kernels(text: str) -> tuple[ast.Module, set[str]]:
    tree = ast.parse(text)
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef)
            and any(name in ast.dump(decorator) for decorator in node.decorator_list
                    for name in ("inlined", "kernel", "shared"))]
    tree.body = list(kept)
    return tree, {node.name for node in kept}


@functools.cache
def _compiled(module: ModuleType, changes: tuple[tuple[str, str], ...], weaken: Ordering | None,
              used: tuple[str, ...]) -> tuple[Any, set[str], bool]:
    text = inspect.getsource(module)
    for before, after in changes:
        assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {module.__name__}"
        text = text.replace(before, after)
    tree, names = _kernels(text)
    transformer = _Actors(names | {"futex_wait", "match8", "copy"} | set(used), weaken)
    tree = ast.fix_missing_locations(transformer.visit(tree))
    return compile(tree, f"<actors of {module.__name__}>", "exec"), names, transformer.weakened


# -- what the intrinsics are ---------------------------------------------------------------------------


def _split(kind: str, at: int, *arguments: int) -> Any:
    """A read-modify-write that is none."""
    value = yield "load", at
    if kind == "cas" and value != arguments[0]:
        return 0
    yield "store", at, {"cas": arguments[-1], "exchange": arguments[-1], "add": value + arguments[-1]}[kind]
    return 1 if kind == "cas" else value


def _futex_wait(mem: None, at: int, expected: int, deadline: int, scratch: int) -> Any:
    if not (yield "park", at, expected):
        return -errno.EAGAIN
    yield "parked", at
    return 0


def _match8(mem: None, at: int, tag: int) -> Any:
    hits = 0
    for place in range(8):
        if (yield "load", at + 2 * place) == tag & 0xFFFF:
            hits |= 1 << place
    return hits


def _copy(mem: None, target: int, source: int, size: int) -> Any:
    """The bytes are one word here."""
    yield "store", target, (yield "load", source)


def _fold(a: int, b: int) -> int:
    product = (a & (1 << 64) - 1) * (b & (1 << 64) - 1)
    value = (product >> 64) ^ (product & (1 << 64) - 1)
    return value - (1 << 64) if value >> 63 else value


def _ctz(value: int) -> int:
    return (value & -value).bit_length() - 1 if value else 64


def _without(function: Any, constants: dict[int, int]) -> Any:
    """The actor, with loads of constant words answered on the spot."""
    def actor(*args: Any) -> Any:
        inner = function(*args)
        try:
            step = next(inner)
            while True:
                if step[0] == "load" and step[1] in constants:
                    step = inner.send(constants[step[1]])
                else:
                    result = yield step
                    step = inner.send(result)
        except StopIteration as end:
            return end.value
    return actor
