"""Every atomic says in a comment what it pairs with, `SYNC name: ...`, and every name stands on both sides.

An atomic without a partner orders nothing. The comment is what a reader of one side finds the other by.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("dataplane", "workers") for path in (ROOT / package).rglob("*.py")
                 if path.name != "atomics.py")
# The relaxed ones order nothing and need no tag.
ATOMICS = {
    "acquire", "cas", "cas32", "exchange", "fence", "fetch_add", "load_acquire", "load_acquire16", "load_acquire32",
    "store_release", "store_release16", "store_release32",
}
TAG = re.compile(r"\bSYNC ([a-z0-9-]+): (.*)")


def tags(text: str) -> list[tuple[int, str, str]]:
    """Line, name and text of each tag, in a comment or a docstring. The text may go on for some lines more:
    up to the next tag or the end of the comment."""
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines):
        if match := TAG.search(line):
            rest = [match[2]]
            for following in lines[number + 1:]:
                if not following.lstrip().startswith("#") or TAG.search(following):
                    break
                rest.append(following.strip("# "))
            found.append((number + 1, match[1], " ".join(rest)))
    return found


def untagged(text: str) -> list[tuple[int, str]]:
    """Line and name of the atomics without a tag in the same line or above it in the same function."""
    tagged = [line for line, _, _ in tags(text)]
    missing = []
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        first = min((line for line in tagged if line >= function.lineno), default=sys.maxsize)
        calls = [(node.lineno, node.func.id) for node in ast.walk(function)
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ATOMICS]
        missing += [call for call in sorted(calls) if call[0] < first]
    return missing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_atomic_has_a_tag(path: Path) -> None:
    assert [f"{path}:{line}: {name}" for line, name in untagged(path.read_text())] == []


def test_every_tag_stands_on_both_sides() -> None:
    found = [(path, *tag) for path in SOURCES for tag in tags(path.read_text())]
    count = Counter(name for _, _, name, _ in found)
    # What pairs with the operating system's kernel has its other side there.
    alone = [f"{path}:{line}: SYNC {name}: {text}" for path, line, name, text in found
             if count[name] < 2 and "the kernel's" not in text]
    assert alone == [], "\n".join(alone)


def test_the_rule_finds_what_it_should() -> None:
    text = '''
def kernel(mem):
    # SYNC one: release, pairs with
    # the other.
    store_release(mem, 0, 1)
    cas(mem, 0, 1, 2)  # SYNC two: pairs with the kernel's

def early(mem):
    fence()
    # SYNC three: is too late.
    ld64(mem, 0)

def other(mem):
    return load_acquire(mem, 0)
'''
    assert [(line, name) for line, name, _ in tags(text)] == [(3, "one"), (6, "two"), (10, "three")]
    assert tags(text)[0][2] == "release, pairs with the other."
    assert untagged(text) == [(9, "fence"), (14, "load_acquire")]
