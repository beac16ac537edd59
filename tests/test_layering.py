"""Imports point down: a module may import from its own floor and those below, see docs/architecture.md."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A name covers the module or package and all within; the longest name that fits decides.
FLOORS: dict[int, set[str]] = {
    1: {
        "dataplane.compiling",
        "dataplane.config",
        "dataplane.config_access",
        "dataplane.config_lines",
        "dataplane.config_reader",
        "dataplane.config_schema",
        "dataplane.errors",
        "dataplane.jit",
        "dataplane.shm",
    },
    2: {
        "dataplane.ledger",
        "dataplane.netif",
        "dataplane.pcb",
        "dataplane.rings",
        "dataplane.tcp",
        "dataplane.wire",
    },
    3: {"dataplane.control", "dataplane.kcont"},
    4: {"dataplane.client", "dataplane.inet"},
    5: {"workers"},
    6: {
        "dataplane",
        "dataplane.__main__",
        "dataplane.cli",
        "dataplane.cli_clean",
        "dataplane.cli_demo",
        "dataplane.cli_demo_view",
        "dataplane.cli_doctor",
        "dataplane.cli_load",
        "dataplane.cli_observe",
        "dataplane.cli_run",
        "dataplane.cli_tables",
        "dataplane.config_reference",
    },
}

# Floor 1 is what everything stands on: the configuration in particular must be readable without numba.
ALLOWED_IN_CONFIG = {"msgspec", "psutil", "dataplane"}


def floor(module: str) -> int:
    names = {name: number for number, names in FLOORS.items() for name in names}
    found = max((name for name in names if module == name or module.startswith(f"{name}.")), key=len)
    # The package itself is the top; a module in it without an entry of its own has no floor.
    if found == "dataplane" and module != "dataplane":
        raise LookupError(f"{module} stands on no floor: add it to FLOORS")
    return names[found]


def modules() -> dict[str, Path]:
    found = {}
    for package in ("dataplane", "workers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of every import in `path`, within functions too, but not for type checkers."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and _type_checking(node.test):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else base
        todo.extend(ast.iter_child_nodes(node))


def _type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line}: imports {name} of floor {floor(name)}"
        for line, name in imports(module, MODULES[module])
        if name.partition(".")[0] in ("dataplane", "workers") and floor(name) > floor(module)
    ]
    assert not wrong, f"{module} stands on floor {floor(module)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("dataplane.config")])
def test_configuration_needs_little(module: str) -> None:
    names = {name.partition(".")[0] for _, name in imports(module, MODULES[module])}
    assert names <= ALLOWED_IN_CONFIG | set(sys.stdlib_module_names)


def test_the_rule_finds_what_it_should(tmp_path: Path) -> None:
    source = tmp_path / "lane.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from dataplane.client import sockets\n"
        "def late():\n    from dataplane import config\n    from ..shm import atomics\n"
        "    import workers.rx\n"
    )
    found = {name for _, name in imports("dataplane.rings.lane", source)}
    assert found - {"dataplane.shm", "dataplane.shm.atomics"} == {"typing", "dataplane.config", "workers.rx"}
    assert found & {"dataplane.shm", "dataplane.shm.atomics"}  # which one depends on what exists
    assert floor("dataplane.rings.lane") == 2 and floor("workers.rx") == 5 and floor("dataplane") == 6
    with pytest.raises(LookupError):
        floor("dataplane.utils")
