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
modules under a file lock, so that of many processes that start one compiles and the others
wait; after that an entry point refuses other argument types instead of compiling in silence.
Under its lock it can share the work with forked processes: each entry point has an index
file of its own in numba's cache, and an entry point is compiled by one of them. How code is
made is in `compiling.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import hashlib
import itertools
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite
import numba
from llvmlite import binding as llvm
from numba import cfunc, njit, types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher

from dataplane.compiling import PartCompiler, WholeCompiler

__all__ = ["MEM", "cache_directory", "callback", "inlined", "kernel", "missing", "warm"]

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


_turn = threading.RLock()
_held = False       # this process, or the one that has forked it in order to compile, has the cache's lock


@contextlib.contextmanager
def _exclusive() -> Iterator[None]:
    """One compiling process at a time: numba's cache index has no lock of its own."""
    global _held
    with _turn, contextlib.ExitStack() as stack:
        if not _held:
            lock = stack.enter_context(open(cache_directory() / "lock", "wb"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            stack.callback(_let_go)
            _held = True
        yield


def _let_go() -> None:
    global _held
    _held = False


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Compiling makes a great many objects that stay: to look through them again and again took a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], 100_000) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _cached(function: Callable[..., Any]) -> bool:
    """Whether numba has put an entry point's code into the cache; each has an index of its own."""
    with _numba_cache():
        return Path(FunctionCache(function)._cache_file._index_path).exists()


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

    def __init__(self, function: Callable[..., Any], signature: str, alone: bool) -> None:
        self.signature, self.alone = signature, alone
        self.result, self.arguments = _signature(signature)
        self.inner = shared(function)
        with _numba_cache():
            self.dispatcher = njit(cache=True, **_WHOLE, **_FLAGS)(_entry(function, self.inner))
        functools.update_wrapper(self, function)
        self._call: Callable[..., Any] | None = None

    @property
    def function(self) -> Any:
        """What numba compiles."""
        return self.dispatcher.py_func

    @property
    def cached(self) -> bool:
        """Whether it needs no compiling; what has been compiled is loaded."""
        return self._call is not None or _cached(self.function)

    def compile(self) -> Callable[..., Any]:
        """Loads or compiles; the result takes exactly the declared types."""
        if self._call is None:
            with _exclusive():
                if self._call is None:      # another thread may have been first
                    with _few_collections():
                        self.dispatcher.compile(self.result(*self.arguments))
                    self.dispatcher.disable_compile()
                    self._call = self.dispatcher
        return self._call

    def __call__(self, *args: Any) -> Any:
        call = self._call
        return call(*args) if call is not None else self.compile()(*args)


def kernel(signature: str, alone: bool = True) -> Callable[[Callable[..., Any]], Kernel]:
    """Entry point called from Python: `@kernel("i64(mem, i64, i64)")`. One that is not called `alone` is a part of
    another entry point in a running dataplane, and made ready by `warm` within that one only."""
    return lambda function: Kernel(function, signature, alone)


_WHOLE: dict[str, Any] = {"forceinline": False, "pipeline_class": WholeCompiler}
_PART: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": PartCompiler}


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
        self.function, self._arity = function, arity
        self._compiled: Any = None
        self.__doc__ = function.__doc__

    @property
    def cached(self) -> bool:
        return self._compiled is not None or _cached(self.function)

    def compile(self) -> Any:
        if self._compiled is None:
            signature = I64(types.CPointer(types.uint8), *[I64] * self._arity)
            with _exclusive(), _numba_cache(), _few_collections():
                self._compiled = self._compiled or cfunc(signature, cache=True, **_WHOLE, **_FLAGS)(self.function)
        return self._compiled

    @property
    def address(self) -> int:
        """The function's address; stable over `fork`, meaningless in other processes."""
        return int(self.compile().address)


def callback(arity: int) -> Callable[[Callable[..., Any]], Callback]:
    """`@callback(3)`: a C function of the memory's base pointer and so many integers."""
    return lambda function: Callback(function, arity)


def _entries(modules: Iterable[ModuleType]) -> list[Kernel | Callback]:
    values = [value for module in modules for value in list(vars(module).values())]
    return [value for value in values if isinstance(value, Callback) or (isinstance(value, Kernel) and value.alone)]


def missing(modules: Iterable[ModuleType]) -> bool:
    """Whether anything of `modules` must be compiled before it can be called."""
    return any(not one.cached for one in _entries(modules))


def warm(modules: Iterable[ModuleType], processes: int = 1) -> int:
    """Compiles or loads all entry points and callbacks of `modules`; returns how many. What must be compiled is
    shared by at most so many processes, which are forked: for callers without other threads."""
    entries = _entries(modules)
    if processes > 1 and not all(one.cached for one in entries):
        with _exclusive():
            _compile_together([one for one in entries if not one.cached], processes)
    for one in entries:
        one.compile()
    return len(entries)


# -- several processes ----------------------------------------------------------------------

_WORTH = 40     # functions; a process that compiles fewer saves no time
_PR_SET_PDEATHSIG = 1


def _reach(function: Any) -> set[Any]:
    """The functions that are compiled with this one, as far as names tell."""
    found: set[Any] = set()
    left = [function]
    while left:
        one = left.pop()
        if one in found:
            continue
        found.add(one)
        values = [one.__globals__.get(name) for name in one.__code__.co_names]
        values += [cell.cell_contents for cell in one.__closure__ or ()]
        left += [value.py_func for value in values if isinstance(value, Dispatcher)]
    return found


def _shares(entries: list[Kernel | Callback], processes: int) -> list[list[Kernel | Callback]]:
    """Entry points for each process, the caller's first, such that the largest share has the fewest functions. What
    entry points of two shares call is compiled twice."""
    shares: list[tuple[set[Any], list[Kernel | Callback]]] = [(set(), []) for _ in range(processes)]
    for reach, one in sorted(((_reach(one.function), one) for one in entries), key=lambda pair: -len(pair[0])):
        largest = max(len(functions) for functions, _ in shares)
        functions, mine = min(shares, key=lambda share: (max(len(share[0] | reach), largest), len(reach - share[0])))
        functions |= reach
        mine.append(one)
    shares.sort(key=lambda share: -len(share[0]))
    (_, first), *others = shares
    for functions, mine in others:
        if len(functions) < _WORTH:
            first += mine
    return [first, *(mine for functions, mine in others if len(functions) >= _WORTH)]


def _compile_together(entries: list[Kernel | Callback], processes: int) -> None:
    """Compiles in this process and in others, which leave what they have made in the cache. What one of them could
    not compile is left, and the caller compiles it."""
    mine, *others = _shares(entries, processes)
    children = [_fork_compiler(share) for share in others]
    try:
        for one in mine:
            one.compile()
    except BaseException:
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
    finally:
        for child in children:
            os.waitpid(child, 0)


def _fork_compiler(entries: list[Kernel | Callback]) -> int:
    """Process number of a child that compiles these, under its parent's lock, and ends."""
    parent = os.getpid()
    if child := os.fork():
        return child
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # With its parent, whose locks it shares: one function may take ten seconds. Died it before, see below.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # Numba's own functions; for ours see `WholeCompiler`. This process compiles nothing for a user.
        FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(6), "big"))
        for one in entries:
            if os.getppid() != parent:
                break
            one.compile()
    finally:
        os._exit(0)
