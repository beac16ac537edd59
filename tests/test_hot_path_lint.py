"""The hot path never waits: proved by reading the kernels, and whatever they call, as syntax.

The worker's step and the netifs' callbacks are the roots; every function that can be reached from them is looked
at, and every kernel of the hot modules besides.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOT = sorted(path for part in ("inet", "rings", "wire", "netif") for path in (ROOT / "dataplane" / part).glob("*.py"))
HOT += [ROOT / "dataplane/pcb/lookup.py", ROOT / "dataplane/pcb/reuseport.py"]
SOURCES = sorted((ROOT / "dataplane").rglob("*.py"))
DECORATORS = {"kernel", "inlined", "shared", "callback", "njit"}
LINES, ARGUMENTS = 45, 9

LIBC = "dataplane.shm.libc"
NEVER_WAITS = {
    "write": "descriptors of events and of netif queues: non-blocking",
    "writev": "netif queues: non-blocking",
    "read": "netif queues: non-blocking",
    "send": "netif sockets: non-blocking",
    "sendmmsg": "netif sockets: non-blocking",
    "futex_wake": "never waits",
    "clock_ns": "never waits",
    "_result": "no call at all",
}
MAY_WAIT = {
    ("dataplane.rings.wake", "wake_sleep"): "the consumer's side: no worker calls it, as the test of reach shows",
}
LONG: dict[tuple[str, str], str] = {}
MANY_ARGUMENTS: dict[tuple[str, str], str] = {
    ("dataplane.pcb.lookup", "find"): "two addresses of two words each; inlined, so that none is passed in memory",
}


@dataclass
class Function:
    """One function of the sources."""

    module: str
    node: ast.FunctionDef
    calls: set[tuple[str, str]] = field(default_factory=set)    # module and name, as imported

    @property
    def name(self) -> tuple[str, str]:
        return self.module, self.node.name

    @property
    def kernel(self) -> str:
        """The decorator that makes it one, or ""."""
        names = {one.func if isinstance(one, ast.Call) else one for one in self.node.decorator_list}
        return next((one.id for one in names if isinstance(one, ast.Name) and one.id in DECORATORS), "")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Local name to where it comes from; a module itself has the name ""."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dataplane"):
            for one in node.names:
                place = (node.module, one.name)
                if (ROOT / node.module.replace(".", "/") / f"{one.name}.py").exists():
                    place = (f"{node.module}.{one.name}", "")
                found[one.asname or one.name] = place
    return found


def functions(module: str, text: str) -> list[Function]:
    """All functions at the top of a module, with what they call."""
    tree = ast.parse(text)
    known = imports(tree)
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    result = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            one = Function(module, node)
            for call in ast.walk(node):
                if not isinstance(call, ast.Call):
                    continue
                target = call.func
                if isinstance(target, ast.Name):
                    if target.id in own:
                        one.calls.add((module, target.id))
                    elif target.id in known:
                        one.calls.add(known[target.id])
                elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    place, name = known.get(target.value.id, ("", "?"))
                    if place and not name:
                        one.calls.add((place, target.attr))
            result.append(one)
    return result


def everything() -> dict[tuple[str, str], Function]:
    return {one.name: one for path in SOURCES for one in functions(module_of(path), path.read_text())}


ALL = everything()
HOT_MODULES = {module_of(path) for path in HOT}
HOT_KERNELS = [one for one in ALL.values() if one.kernel and one.module in HOT_MODULES]
ROOTS = [one for one in ALL.values() if one.kernel and one.module.startswith("dataplane.inet")]
ROOTS += [one for one in ALL.values() if one.kernel == "callback" and one.module.startswith("dataplane.netif")]


def reach(roots: list[Function], known: dict[tuple[str, str], Function]) -> dict[tuple[str, str], Function]:
    """Whatever the roots can call, themselves included."""
    found: dict[tuple[str, str], Function] = {}
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        if one.name not in found:
            found[one.name] = one
            waiting += [known[call] for call in one.calls if call in known]
    return found


REACHED = reach(ROOTS, ALL)


# -- the rules ---------------------------------------------------------------------------------------------


def waits(one: Function) -> Iterator[str]:
    """Calls that may block."""
    for module, name in sorted(one.calls):
        if module == LIBC and name not in NEVER_WAITS:
            yield f"{name} may block"


FORBIDDEN = (ast.Raise, ast.Assert, ast.Try, ast.With, ast.Yield, ast.YieldFrom, ast.Await, ast.ListComp, ast.DictComp,
             ast.SetComp, ast.GeneratorExp, ast.Lambda, ast.JoinedStr, ast.List, ast.Dict, ast.Set)


def misbehaves(one: Function) -> Iterator[str]:
    """Statements that raise, allocate, or never end."""
    for statement in one.node.body:
        for node in ast.walk(statement):
            if isinstance(node, FORBIDDEN):
                yield f"line {node.lineno}: {type(node).__name__}"
            if isinstance(node, ast.While) and isinstance(node.test, ast.Constant) and node.test.value:
                yield f"line {node.lineno}: a loop without a bound"


def size(one: Function) -> Iterator[str]:
    lines = (one.node.end_lineno or 0) - one.node.lineno + 1
    arguments = len(one.node.args.args)
    if lines > LINES and one.name not in LONG:
        yield f"{lines} lines"
    if arguments > ARGUMENTS and one.name not in MANY_ARGUMENTS:
        yield f"{arguments} arguments"


def report(found: dict[str, list[str]]) -> str:
    return "\n".join(f"{name}: {', '.join(problems)}" for name, problems in found.items() if problems)


def told(one: Function) -> str:
    return f"{one.module}.{one.node.name} (line {one.node.lineno})"


# -- the tests ---------------------------------------------------------------------------------------------


def test_nothing_that_a_worker_reaches_waits() -> None:
    assert report({told(one): list(waits(one)) for one in REACHED.values()}) == ""
    assert {name for name in REACHED if name in MAY_WAIT} == set()


def test_the_reach_is_what_it_should_be() -> None:
    """Or the test above proves nothing."""
    for name in (("dataplane.rings.lane", "lane_stage"), ("dataplane.rings.wake", "wake_notify"),
                 ("dataplane.pcb.lookup", "probe"), ("dataplane.wire.checksum", "ones_sum"), (LIBC, "futex_wake"),
                 ("dataplane.inet.icmp", "icmp_input"), ("dataplane.shm.epoch", "quiescent")):
        assert name in REACHED, name
    kinds = {one.module.rsplit(".", 1)[1] for one in ROOTS if one.kernel == "callback"}
    assert {"pcap", "synthetic", "af_packet"} <= kinds


@pytest.mark.parametrize("rule", [misbehaves, size], ids=lambda rule: rule.__name__)
def test_hot_kernels(rule) -> None:  # type: ignore[no-untyped-def]
    kernels = {one.name: one for one in HOT_KERNELS} | {name: one for name, one in REACHED.items() if one.kernel}
    assert report({told(one): list(rule(one)) for one in kernels.values()}) == ""


def test_hot_modules_do_not_wait() -> None:
    found = {told(one): list(waits(one)) for one in HOT_KERNELS if one.name not in MAY_WAIT}
    assert report(found) == ""


def test_exceptions_are_needed() -> None:
    """An exception that nobody uses any more goes."""
    for name in MAY_WAIT:
        assert list(waits(ALL[name])), name
    for name in LONG:
        assert (ALL[name].node.end_lineno or 0) - ALL[name].node.lineno >= LINES, name
    for name in MANY_ARGUMENTS:
        assert len(ALL[name].node.args.args) > ARGUMENTS, name


def test_every_file_with_kernels_says_what_it_is_for() -> None:
    silent = [str(path) for path in SOURCES
              if any(one.kernel for one in functions(module_of(path), path.read_text()))
              and not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_libc_is_called_through_one_file() -> None:
    """So that the list of calls above is the whole list."""
    for path in SOURCES:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "ExternalFunction" not in names or module_of(path) == LIBC, path
        assert "objmode" not in path.read_text(), path
    wrappers = {name for module, name in ALL if module == LIBC}
    assert set(NEVER_WAITS) <= wrappers


def test_the_rules_find_what_they_should() -> None:
    text = '''
"""A module."""
from dataplane.shm.libc import futex_wake, ppoll
from dataplane.rings import wake
@inlined
def a(mem, at):
    while True:
        futex_wake(mem, at)
    raise ValueError
@kernel("i64(mem)")
def b(mem):
    x = [1]
    ppoll(mem, 0, 1, 2, 3)
    a(mem, 1)
    wake.wake_sleep(mem, 1, 2, 3)
@shared
def c(mem, a, b, c, d, e, f, g, h, i, j):
    return 0
def python():
    raise ValueError
'''
    found = {one.node.name: one for one in functions("m", text)}
    assert [name for name, one in found.items() if one.kernel] == ["a", "b", "c"]
    assert list(waits(found["b"])) == ["ppoll may block"] and list(waits(found["a"])) == []
    assert [problem.split(": ")[1] for problem in misbehaves(found["a"])] == ["a loop without a bound", "Raise"]
    assert [problem.split(": ")[1] for problem in misbehaves(found["b"])] == ["List"]
    assert list(size(found["c"])) == ["11 arguments"]
    reached = reach([found["b"]], ALL | {one.name: one for one in found.values()})
    assert ("m", "a") in reached and ("dataplane.rings.wake", "wake_sleep") in reached and ("m", "c") not in reached
