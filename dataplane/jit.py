"""The one decorator for all kernels: flags, signatures, and a cache that cannot lie.

Called by every module with a hot path. Numba's own cache key for a function is the
modification time of *that function's file*. A kernel that inlines another file's constants
(all of ours inline `shm/layout.py`) would survive a change of the layout, and two processes
could disagree about where a word lives. So the cache directory carries a hash over all of
our sources, of the numba and llvmlite versions and of the CPU: a change anywhere is a new
directory, and a process either finds kernels made from exactly its own sources or compiles.

`kernel(signature)` makes an entry point, callable from Python; `inlined` makes a function
that only other kernels call (it is compiled into its callers, never on its own); `callback`
makes a C function whose address other kernels may call (the netifs' bursts).

Nothing is compiled at import. `warm()` compiles or loads every entry point of the given
modules under a file lock, since concurrent writers can corrupt numba's cache index; after
that an entry point refuses other argument types instead of compiling in silence.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite
import numba
from llvmlite import binding as llvm
from numba import _dynfunc, cfunc, njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering

__all__ = ["MEM", "cache_directory", "callback", "inlined", "kernel", "warm"]

MEM = types.Array(types.uint8, 1, "C")
"""The type of `mem`: the one byte array through which kernels see all memory."""

I64 = types.int64

# error_model: a division by zero must not raise, since a kernel has no way to handle it.
# _nrt: arrays are never made or kept, so that no reference count needs an atomic instruction.
_FLAGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "_nrt": False}

_NAMES = {"mem": MEM, "i64": I64, "none": types.void, "f64": types.float64,
          "vec": types.Array(I64, 1, "C"), "mat": types.Array(I64, 2, "C")}

_SOURCES = Path(__file__).resolve().parent


@functools.cache
def fingerprint() -> str:
    """Hash of everything a compiled kernel depends on: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for package in (_SOURCES, _SOURCES.parent / "workers"):
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    host = llvm.get_host_cpu_name() + llvm.get_host_cpu_features().flatten()
    digest.update(f"{numba.__version__} {llvmlite.__version__} {sys.version} {host}".encode())
    return digest.hexdigest()[:16]


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner, above = path.stat().st_uid, path.parent.stat().st_uid
    except OSError:
        return False
    # Code is loaded from here: a directory that somebody else owns, or could put another one in the
    # place of, is not ours to trust.
    return os.access(path, os.W_OK | os.X_OK) and owner == os.geteuid() and above in (0, owner)


@functools.cache
def cache_directory() -> Path:
    """Where compiled kernels live: `$DATAPLANE_CACHE_DIR`, `$XDG_CACHE_HOME/dataplane`,
    `~/.cache/dataplane`, else a private folder in the temporary directory."""
    candidates = []
    if chosen := os.environ.get("DATAPLANE_CACHE_DIR"):
        candidates.append(Path(chosen))
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        candidates.append(Path(xdg) / "dataplane")
    with contextlib.suppress(RuntimeError):
        candidates.append(Path.home() / ".cache" / "dataplane")
    candidates.append(Path(tempfile.gettempdir()) / f"dataplane-cache-{os.geteuid()}")
    for root in candidates:
        if _writable(root / fingerprint()):
            return root / fingerprint()
    return Path(tempfile.mkdtemp(prefix="dataplane-cache-"))


@contextlib.contextmanager
def _numba_cache() -> Iterator[None]:
    """Points numba's cache at our directory while a function is decorated; the user's own
    jitted functions keep the place that they had."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_directory())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


@contextlib.contextmanager
def _exclusive() -> Iterator[None]:
    """One compiling process at a time: numba's cache index has no lock of its own."""
    with open(cache_directory() / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _signature(text: str) -> tuple[types.Type, tuple[types.Type, ...]]:
    """`"i64(mem, i64)"` to numba types; the names are those of `_NAMES`."""
    result, _, rest = text.partition("(")
    names = [name.strip() for name in rest.rstrip(") ").split(",")]
    return _NAMES[result.strip()], tuple(_NAMES[name] for name in names if name)


def _entry(function: Callable[..., Any], inner: Any) -> Callable[..., Any]:
    """The function that Python calls: `inner` with the arena's array made a bare pointer, so that
    no kernel below it carries an array. Made of source text in the place of the original, since
    numba's cache finds a function by file, line and name, and never finds a closure."""
    code = function.__code__
    names = code.co_varnames[:code.co_argcount]
    passed = ", ".join(f"as_memory({name})" if name == "mem" else name for name in names)
    text = f"def {function.__name__}({', '.join(names)}):\n    return inner({passed})\n"
    from dataplane.shm.atomics import as_memory
    namespace: dict[str, Any] = {"__name__": function.__module__, "inner": inner, "as_memory": as_memory}
    exec(compile("\n" * (code.co_firstlineno - 1) + text, code.co_filename, "exec"), namespace)
    entry: Callable[..., Any] = namespace[function.__name__]
    entry.__qualname__ = function.__qualname__
    return entry


class Kernel:
    """An entry point: compiled on first call, or by `warm`; called like a function.

    `dispatcher` is what other kernels and tests see as the numba function.
    """

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self.signature = signature
        self.result, self.arguments = _signature(signature)
        self.inner = shared(function)
        with _numba_cache():
            self.dispatcher = njit(cache=True, **_WHOLE, **_FLAGS)(_entry(function, self.inner))
        functools.update_wrapper(self, function)
        self._call: Callable[..., Any] | None = None

    def compile(self) -> Callable[..., Any]:
        """Loads or compiles; the result takes exactly the declared types."""
        if self._call is None:
            with _exclusive():
                if self._call is None:      # another thread may have been first
                    self.dispatcher.compile(self.result(*self.arguments))
                    self.dispatcher.disable_compile()
                    self._call = self.dispatcher
        return self._call

    def __call__(self, *args: Any) -> Any:
        call = self._call
        return call(*args) if call is not None else self.compile()(*args)


def kernel(signature: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Entry point called from Python: `@kernel("i64(mem, i64, i64)")`."""
    return lambda function: Kernel(function, signature)


# -- how kernels are put together -----------------------------------------------------------
#
# Numba, as it comes, optimises every function together with all that it calls, makes machine
# code and wrappers of it, and does that again in each caller. Here a function is optimised once,
# with only the functions that are inlined into it, and machine code is made once for each entry
# point. The worker's step compiles in a tenth of the time.


def _split(libraries: Iterable[Any]) -> tuple[list[Any], dict[Any, None]]:
    """Of a library's direct callees: those to be linked in now, because they are inlined, and
    all that must be linked into the entry point in the end (an ordered set)."""
    now: list[Any] = []
    later: dict[Any, None] = {}
    for library in dict.fromkeys(libraries):
        library._ensure_finalized()
        if isinstance(library, _Part):
            later.update(library.later)
            if library.shared:
                later[library] = None
                continue
        now.append(library)
    return now, later


class _Part(JITCodeLibrary):
    """Code of a function that only kernels call: optimised, but never made machine code."""

    shared = False
    later: dict[Any, None]
    _linking_libraries: list[Any]

    def finalize(self) -> None:
        self._linking_libraries, self.later = _split(self._linking_libraries)
        for library in self._linking_libraries:
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._optimize_final_module()
        self._finalize_dynamic_globals()
        self._finalized = True


class _Whole(JITCodeLibrary):
    """Code of an entry point, with all the parts that it needs."""

    _linking_libraries: list[Any]

    def finalize(self) -> None:
        now, later = _split(self._linking_libraries)
        # Users before what they use: the linker passes over a function that nobody refers to yet.
        self._linking_libraries = [*now, *reversed(later)]
        super().finalize()


@register_pass(mutates_CFG=True, analysis_only=False)
class _WholeLowering(NativeLowering):
    """Lowers to a `_Whole`."""

    _name = "dataplane_whole_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _Whole(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return bool(super().run_pass(state))


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):
    """Lowers to a `_Part`."""

    _name = "dataplane_part_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _Part(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.shared = not state.flags.forceinline
        state.flags.no_compile = True
        super().run_pass(state)
        if state.library.shared:
            state.library.get_function(state.cr.fndesc.mangled_name).add_function_attribute("noinline")
        # Callers find a function's code by its entry point, so there must be one of its own.
        entry = _dynfunc.make_function(state.cr.fndesc.lookup_module(), state.func_id.func_name,
                                       "only for kernels", _refusal(), state.cr.env, (state.library,))
        state.cr = state.cr._replace(cfunc=entry)
        state.targetctx.insert_user_function(entry, state.cr.fndesc, [state.library])
        return True


@functools.cache
def _refusal() -> int:
    """Address of what answers when Python calls a function that is only for kernels: the wrapper
    of a function without parameters raises TypeError for any."""
    nothing = njit(_nothing)
    nothing.compile(())
    result = nothing.overloads[()]
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_cpython_wrapper_name))


def _nothing() -> None:
    pass


class _Compiler(CompilerBase):
    """Numba's pipeline with another last pass."""

    lowering: type = _WholeLowering

    def define_pipelines(self) -> list[Any]:
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [(self.lowering if step is NativeLowering else step, text) for step, text in manager.passes]
        manager.finalize()
        return [manager]


class _PartCompiler(_Compiler):
    lowering = _PartLowering


_WHOLE: dict[str, Any] = {"forceinline": False, "pipeline_class": _Compiler}
_PART: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _PartCompiler}


def _without_literals(dispatcher: Any) -> Any:
    """Lets the function be typed once for all integers: numba would type and lower it again for
    each constant that somebody passes, and LLVM folds constants into inlined code by itself."""
    resolve = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: resolve([types.unliteral(one) for one in args], kws)
    return dispatcher


def inlined(function: Callable[..., Any]) -> Any:
    """A function that only kernels call, made part of each caller's machine code: for hot paths."""
    return _without_literals(njit(forceinline=True, **_PART, **_FLAGS)(function))


def shared(function: Callable[..., Any]) -> Any:
    """A function that only kernels call, one copy in each kernel: for cold paths."""
    # Said aloud, since numba lets a function inherit the flag from whatever made it compile.
    return _without_literals(njit(forceinline=False, **_PART, **_FLAGS)(function))


class Callback:
    """A kernel behind a C function pointer: `address`, to be called through `atomics.call`.

    Written as `def rx(base, ...)`, with `mem = as_memory(base)` as its first statement.
    """

    def __init__(self, function: Callable[..., Any], arity: int) -> None:
        self._function, self._arity = function, arity
        self._compiled: Any = None
        self.__doc__ = function.__doc__

    def compile(self) -> Any:
        if self._compiled is None:
            signature = I64(types.CPointer(types.uint8), *[I64] * self._arity)
            with _exclusive(), _numba_cache():
                self._compiled = self._compiled or cfunc(signature, cache=True, **_WHOLE, **_FLAGS)(self._function)
        return self._compiled

    @property
    def address(self) -> int:
        """The function's address; stable over `fork`, meaningless in other processes."""
        return int(self.compile().address)


def callback(arity: int) -> Callable[[Callable[..., Any]], Callback]:
    """`@callback(3)`: a C function of the memory's base pointer and so many integers."""
    return lambda function: Callback(function, arity)


def warm(modules: Iterable[ModuleType]) -> int:
    """Compiles or loads all entry points and callbacks of `modules`; returns how many."""
    count = 0
    for module in modules:
        for value in list(vars(module).values()):
            if isinstance(value, Kernel | Callback):
                value.compile()
                count += 1
    return count
