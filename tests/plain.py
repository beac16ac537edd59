"""Kernels as plain Python: the very source that is compiled, under a debugger or with coverage.

    tcp = plain("dataplane.tcp.reassembly")         # a module of its own, nothing compiled
    tcp.reassembly_insert(bytearray(1 << 20), ...)

The module and every module of the project that it imports are read afresh from their source and live in a
`World` of their own: neither `sys.modules` nor the real modules notice. Inside of it the decorators of `jit` do
nothing, `mem` is a bytearray (or anything else that is a buffer of bytes), and the intrinsics of `shm.atomics` are
the functions below. They find mistakes that compiled code would turn into damage: an access outside of `mem`, a
copy that overlaps, a float in a word, a division by zero.

What differs from compiled code: integers are int64 wherever a kernel can tell the difference, since products and
left shifts wrap here too (the syntax tree is changed for that) and stores keep the lower bits; a *sum* that
leaves the 64 bits is wrong only if it is compared, divided or shifted right before it is stored. And a local that
is an integer in one branch and a float in another is a float for the compiler.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

__all__ = ["World", "plain"]

ROOT = Path(__file__).parents[1]
REAL = {"dataplane.shm.layout", "dataplane.shm.layout_tcp", "dataplane.errors"}
"""Modules that have no kernels: the real ones, so that their numbers are the same objects."""

Memory = Any    # a bytearray, or another writable buffer of bytes
_MASK = (1 << 64) - 1


def int64(value: Any) -> Any:
    """Return `value` as the compiled code would have it in a register; floats as they are."""
    if -(1 << 63) <= value < 1 << 63 or isinstance(value, float):
        return value
    return ((value + (1 << 63)) & _MASK) - (1 << 63)


# -- shm/atomics -------------------------------------------------------------------------------------------


def _place(mem: Memory, at: int, size: int) -> None:
    if not 0 <= at <= len(mem) - size:
        raise IndexError(f"{size} bytes at {at}: memory has {len(mem)}")


def _loader(code: str) -> Callable[[Memory, int], int]:
    unpack_from = struct.Struct(code).unpack_from

    def load(mem: Memory, at: int) -> int:
        if at < 0:
            raise IndexError(f"load at {at}")
        return unpack_from(mem, at)[0]
    return load


def _storer(code: str) -> Callable[[Memory, int, int], None]:
    form = struct.Struct(code)
    pack_into, mask = form.pack_into, (1 << 8 * form.size) - 1

    def store(mem: Memory, at: int, value: int) -> None:
        if at < 0:
            raise IndexError(f"store at {at}")
        pack_into(mem, at, value & mask)
    return store


def _copy(mem: Memory, target: int, source: int, size: int) -> None:
    if size < 0 or (size and abs(target - source) < size):
        raise ValueError(f"copy of {size} bytes from {source} to {target}")
    _place(mem, target, size)
    _place(mem, source, size)
    mem[target:target + size] = mem[source:source + size]


def _fill(mem: Memory, target: int, value: int, size: int) -> None:
    if size < 0:
        raise ValueError(f"fill of {size} bytes")
    _place(mem, target, size)
    mem[target:target + size] = bytes([value & 0xFF]) * size


def _cas(word: tuple[Callable[..., int], Callable[..., None]], mask: int) -> Callable[..., int]:
    load, store = word

    def cas(mem: Memory, at: int, expected: int, desired: int) -> int:
        if (load(mem, at) ^ expected) & mask:
            return 0
        store(mem, at, desired)
        return 1
    return cas


def _ctz(value: int) -> int:
    value &= _MASK
    return (value & -value).bit_length() - 1 if value else 64


def _fold(a: int, b: int) -> int:
    product = (a & _MASK) * (b & _MASK)
    return int64((product >> 64) ^ (product & _MASK))


def _match8(mem: Memory, at: int, tag: int) -> int:
    tags = struct.unpack_from("<8H", mem, at)
    return sum(1 << i for i, one in enumerate(tags) if one == tag & 0xFFFF)


def _crc32(crc: int, value: int) -> int:
    crc &= 0xFFFFFFFF
    for i in range(8):
        crc ^= (value >> (8 * i)) & 0xFF
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc


def _nothing(*_args: Any) -> None:
    pass


def _atomics() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for bits, code in ((8, "B"), (16, "H"), (32, "I")):
        names[f"ld{bits}"], names[f"st{bits}"] = _loader(f"={code}"), _storer(f"={code}")
    # Words are signed; the mask that a store puts on makes them unsigned for struct.
    names["ld64"], names["st64"] = _loader("=q"), _storer("=Q")
    for bits, code in ((16, "H"), (32, "I"), (64, "Q")):
        names[f"be{bits}"] = _loader(f">{code if bits < 64 else 'q'}")
        names[f"put_be{bits}"] = _storer(f">{code}")
    load, store = names["ld64"], names["st64"]
    names |= dict.fromkeys(("load_acquire", "load_relaxed"), load)
    names |= dict.fromkeys(("store_release", "store_relaxed"), store)
    names |= {"load_acquire32": names["ld32"], "store_release32": names["st32"], "store_release16": names["st16"]}
    names |= dict.fromkeys(("acquire", "fence", "pause", "prefetch", "prefetch_write"), _nothing)

    def exchange(mem: Memory, at: int, value: int) -> int:
        before = load(mem, at)
        store(mem, at, value)
        return int(before)

    def fetch_add(mem: Memory, at: int, value: int) -> int:
        return exchange(mem, at, load(mem, at) + value)

    return names | {
        "cas": _cas((load, store), _MASK), "cas32": _cas((names["ld32"], names["st32"]), (1 << 32) - 1),
        "exchange": exchange, "fetch_add": fetch_add, "copy": _copy, "fill": _fill, "ctz": _ctz, "fold": _fold,
        "shr": lambda value, bits: int64((value & _MASK) >> bits), "match8": _match8, "crc32": _crc32,
        "crc32_portable": _crc32, "as_memory": lambda mem: mem,
        "bswap16": lambda value: int.from_bytes((value & 0xFFFF).to_bytes(2, "little"), "big"),
        "bswap32": lambda value: int.from_bytes((value & 0xFFFFFFFF).to_bytes(4, "little"), "big"),
        "view": lambda mem, at, size: memoryview(mem)[at:at + size],
    }


# -- the modules -------------------------------------------------------------------------------------------


class _Wrapping(ast.NodeTransformer):
    """Products and left shifts of kernels wrap like int64."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mult | ast.LShift) or isinstance(node.right, ast.List | ast.Tuple):
            return node
        name = ast.copy_location(ast.Name("__int64__", ast.Load()), node)
        return ast.copy_location(ast.Call(name, [node], []), node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mult | ast.LShift) or not isinstance(node.target, ast.Name):
            return node
        product = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        value = ast.Call(ast.Name("__int64__", ast.Load()), [product], [])
        return ast.fix_missing_locations(ast.copy_location(ast.Assign([node.target], value), node))


class World:
    """Plain modules that know each other. `now`: what their clocks show, in ns."""

    def __init__(self) -> None:
        self.now = 0
        self.modules: dict[str, ModuleType] = {}
        self._builtins = {**vars(builtins), "__import__": self._import, "__int64__": int64}
        self._make("dataplane.jit", kernel=lambda _signature: _same, callback=lambda _arity: _same, inlined=_same,
                   shared=_same, warm=_nothing, MEM=None)
        self._make("dataplane.shm.atomics", **_atomics())
        self._make("dataplane.shm.libc", CLOCK_REALTIME=0, CLOCK_MONOTONIC=1, clock_ns=lambda *_: self.now,
                   futex_wake=lambda *_: 0, sched_yield=_nothing, write=lambda _mem, _fd, _source, size: size,
                   __getattr__=_no_syscall)

    def load(self, name: str) -> ModuleType:
        """Return the plain module of that name, read from its source the first time."""
        if name in REAL:
            return importlib.import_module(name)
        if name in self.modules:
            return self.modules[name]
        path = ROOT.joinpath(*name.split("."))
        module = self._make(name)
        if path.is_dir():
            module.__path__ = [str(path)]       # packages of kernels have no code of their own
            return module
        path = path.with_suffix(".py")
        module.__file__ = str(path)
        try:
            tree = _Wrapping().visit(ast.parse(path.read_text(), str(path)))
            exec(compile(tree, str(path), "exec"), vars(module))
        except BaseException:
            del self.modules[name]
            raise
        return module

    def _make(self, name: str, **names: Any) -> ModuleType:
        module = self.modules[name] = ModuleType(name)
        vars(module).update(names, __builtins__=self._builtins)
        return module

    def _import(self, name: str, namespace: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> Any:
        if level or name.partition(".")[0] != "dataplane":
            return builtins.__import__(name, namespace, local, wanted, level)
        module = self.load(name)
        names = {}
        for one in wanted or ():
            below = ROOT.joinpath(*name.split("."), one)
            is_module = hasattr(module, "__path__") and (below.is_dir() or below.with_suffix(".py").exists())
            names[one] = self.load(f"{name}.{one}") if is_module else getattr(module, one)
        return SimpleNamespace(**names)


def _no_syscall(name: str) -> Any:
    """Return a stand-in for what may be imported, but not called."""
    def call(*_args: Any) -> Any:
        raise NotImplementedError(f"{name} in plain mode")
    return call


def _same(function: Any) -> Any:
    return function


def plain(name: str, world: World | None = None) -> Any:
    """Return module `name` as plain Python, in a world of its own or in `world`."""
    return (world or World()).load(name)
