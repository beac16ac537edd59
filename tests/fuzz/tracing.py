"""Kernels as plain Python that tell which way they went, and in which a frame's memory is exactly its bytes.

    world = TracedWorld()
    step = world.load("dataplane.inet.step")
    world.slots = Slots(first, end, stride, [(frame, frame_end), ...])  # there, nothing but the frames may be touched
    world.trace.clear(); step.step(mem, w, 1)
    edges(world.trace)

The source is that of the compiled kernels; `tests/plain.py` says what differs. A number is put into `trace` wherever
the source can go two ways: at the beginning of a function, in both arms of an `if`, in a loop's body, at each operand
of `and` and `or`. The numbers are places in the source, the same in every run.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

from dataplane import ledger
from tests import plain

__all__ = ["PAGE_BITS", "OutOfBounds", "Slots", "TracedWorld", "edges", "shared_world"]

_HAVE_CODE = {"dataplane.kcont"}        # packages whose __init__ has kernels
_KNOWN_BY_NAME = (ledger,)      # its dataclass asks sys.modules for the module of its name
PAGE_BITS = 12
_LOADS = {"ld8": 1, "ld16": 2, "ld32": 4, "ld64": 8, "be16": 2, "be32": 4, "be64": 8}
_STORES = {"st8": 1, "st16": 2, "st32": 4, "st64": 8, "put_be16": 2, "put_be32": 4, "put_be64": 8,
           "store_release": 8, "store_relaxed": 8, "store_release32": 4, "store_release16": 2, "cas": 8, "cas32": 4,
           "exchange": 8, "fetch_add": 8}
_MASK = (1 << 64) - 1


class OutOfBounds(AssertionError):
    """A kernel touched what is not the frame's."""


class Slots(NamedTuple):
    """Where frames are: slot i begins at `low + i * stride`, and has the bytes `frames[i]`, first and end."""

    low: int = 0
    high: int = 0
    stride: int = 1
    frames: tuple[tuple[int, int], ...] = ()

    def check(self, at: int, size: int) -> None:
        """Raise OutOfBounds unless these bytes, some of which are in a slot, are all in its frame."""
        index = max(at - self.low, 0) // self.stride
        first, end = self.frames[index] if index < len(self.frames) else (0, 0)
        if not first <= at <= end - size:
            raise OutOfBounds(f"{size} bytes at {at - first} of a frame of {end - first}")


class _Tracing(ast.NodeTransformer):
    """Puts a call of `__hit__` with a number of its own wherever control divides."""

    def __init__(self, world: TracedWorld) -> None:
        self.world = world

    def _hit(self) -> ast.Call:
        self.world.places += 1
        return ast.Call(ast.Name("__hit__", ast.Load()), [ast.Constant(self.world.places)], [])

    def _first(self, body: list[ast.stmt]) -> list[ast.stmt]:
        return [ast.Expr(self._hit()), *body]

    def _either(self, value: ast.expr) -> ast.expr:
        """`value`, marked: append returns None."""
        return ast.BoolOp(ast.Or(), [self._hit(), value])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.body = self._first(node.body)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        node.body, node.orelse = self._first(node.body), self._first(node.orelse)
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        node.body = self._first(node.body)
        return node

    def visit_While(self, node: ast.While) -> ast.AST:
        self.generic_visit(node)
        node.body = self._first(node.body)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.body, node.orelse = self._either(node.body), self._either(node.orelse)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        node.values = [node.values[0], *(self._either(value) for value in node.values[1:])]
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        self.world.constants |= {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)
                                 and type(one.value) is int and one.value >= 0}
        return node


class TracedWorld(plain.World):
    """Plain modules with a trace.

    `slots` are set by whoever places the frames; `dirty` has the number of every page that was written to;
    `callbacks` is what stands at an address that kernels call; `constants` are those that are compared with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[int] = []
        self.places = 0
        self.constants: set[int] = set()
        self.slots = Slots()
        self.dirty: set[int] = set()
        self.callbacks: dict[int, Any] = {}
        self._builtins["__hit__"] = self.trace.append
        vars(self.modules["dataplane.jit"])["kernel"] = lambda _signature, alone=True: lambda function: function
        names = vars(self.modules["dataplane.shm.atomics"])
        for name, size in _LOADS.items():
            names[name] = self._checked(names[name], size)
        for name, size in _STORES.items():
            names[name] = self._storing(names[name], size)
        names.update(copy=self._copying(names["copy"]), fill=self._filling(names["fill"]), plus=_plus,
                     remainder=lambda value, divisor: (value & _MASK) % (divisor & _MASK),
                     call1=self._call, call2=self._call, call3=self._call)

    def _call(self, address: int, mem: Any, *arguments: int) -> Any:
        return self.callbacks[address](mem, *arguments)

    def _checked(self, load: Any, size: int) -> Any:
        def checked(mem: Any, at: int) -> Any:
            slots = self.slots
            if slots.low < at + size and at < slots.high:
                slots.check(at, size)
            return load(mem, at)
        return checked

    def _storing(self, store: Any, size: int) -> Any:
        def storing(mem: Any, at: int, *values: int) -> Any:
            slots = self.slots
            if slots.low < at + size and at < slots.high:
                slots.check(at, size)
            self.dirty.add(at >> PAGE_BITS)
            self.dirty.add((at + size - 1) >> PAGE_BITS)
            return store(mem, at, *values)
        return storing

    def _range(self, at: int, size: int) -> None:
        if size > 0 and self.slots.low < at + size and at < self.slots.high:
            self.slots.check(at, size)

    def _copying(self, copy: Any) -> Any:
        def copying(mem: Any, target: int, source: int, size: int) -> None:
            self._range(target, size)
            self._range(source, size)
            self.dirty.update(range(target >> PAGE_BITS, ((target + size - 1) >> PAGE_BITS) + 1))
            copy(mem, target, source, size)
        return copying

    def _filling(self, fill: Any) -> Any:
        def filling(mem: Any, target: int, value: int, size: int) -> None:
            self._range(target, size)
            self.dirty.update(range(target >> PAGE_BITS, ((target + size - 1) >> PAGE_BITS) + 1))
            fill(mem, target, value, size)
        return filling

    def load(self, name: str) -> ModuleType:
        """As the base class does, traced."""
        path = plain.ROOT.joinpath(*name.split("."))
        if name in plain.REAL:
            return importlib.import_module(name)
        if name in self.modules:
            return self.modules[name]
        module = self._make(name)
        if path.is_dir():
            module.__path__ = [str(path)]
            if name not in _HAVE_CODE:
                return module
            path = path / "__init__.py"
        else:
            path = path.with_suffix(".py")
        module.__file__ = str(path)
        tree = _Tracing(self).visit(plain._Wrapping().visit(ast.parse(path.read_text(), str(path))))
        exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), vars(module))
        return module


@functools.cache
def shared_world() -> TracedWorld:
    """One with everything that a worker runs; to load it takes most of a second."""
    world = TracedWorld()
    world.load("dataplane.inet.step")
    return world


def _plus(a: int, b: int) -> int:
    """Ones' complement sum of two words, as shm.atomics has it."""
    total = (a & _MASK) + (b & _MASK)
    return int(plain.int64((total & _MASK) + (total >> 64)))


def edges(trace: Iterable[int]) -> set[int]:
    """The steps from one place to the next, each as a number; how often is told by its power of two."""
    counts: dict[tuple[int, int], int] = {}
    for step in itertools.pairwise(trace):
        counts[step] = counts.get(step, 0) + 1
    return {(a << 20 | b) << 4 | min(count.bit_length(), 8) for (a, b), count in counts.items()}
