"""Turns a module's kernels into actors for the explorer: the very source that is compiled, not a copy of it.

Each call of an atomic (or a plain access, or a futex) becomes a `yield` of the step, each call of
another function of the module a `yield from`. Words that never change can be read without a step
(`constants`), which keeps the number of orders small.
"""

from __future__ import annotations

import ast
import errno
import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

# Kernel function to step, and how many arguments after `mem` are the step's.
STEPS: dict[str, tuple[str, int]] = {
    "ld64": ("load", 1), "load_acquire": ("load", 1), "load_relaxed": ("load", 1),
    "st64": ("store", 2), "store_relaxed": ("store", 2), "store_release": ("release", 2),
    "cas": ("cas", 3), "exchange": ("exchange", 2), "fetch_add": ("add", 2), "fence": ("fence", 0),
    "futex_wake": ("unpark", 1),
}


class _Actors(ast.NodeTransformer):
    def __init__(self, functions: set[str]) -> None:
        self.functions = functions

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
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
        if name == "futex_wait":
            return ast.YieldFrom(node)
        if name in STEPS:
            kind, count = STEPS[name]
            return ast.Yield(ast.Tuple([ast.Constant(kind), *node.args[1:1 + count]], ast.Load()))
        return node


def actors(module: ModuleType, *changes: tuple[str, str], constants: dict[int, int] | None = None) -> Any:
    """The functions of `module` as generator functions with the same arguments.

    `changes`: (text, replacement) made in the source first, for mutation tests. Each has to apply.
    """
    text = inspect.getsource(module)
    for before, after in changes:
        assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {module.__name__}"
        text = text.replace(before, after)
    tree = ast.parse(text)
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef)
            and any(name in ast.dump(decorator) for decorator in node.decorator_list
                    for name in ("inlined", "kernel", "shared"))]
    names = {node.name for node in kept}
    tree.body = [_Actors(names).visit(node) for node in kept]
    namespace = dict(vars(module))
    namespace["futex_wait"] = _futex_wait
    namespace["shr"] = lambda value, bits: (value & (1 << 64) - 1) >> bits
    exec(compile(ast.fix_missing_locations(tree), f"<actors of {module.__name__}>", "exec"), namespace)
    functions = {name: namespace[name] for name in names}
    if constants:
        functions = {name: _without(function, constants) for name, function in functions.items()}
    return SimpleNamespace(**functions)


def _futex_wait(mem: None, at: int, expected: int, deadline: int, scratch: int) -> Any:
    if not (yield "park", at, expected):
        return -errno.EAGAIN
    yield "parked", at
    return 0


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
