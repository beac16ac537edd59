"""docs/performance.md and its pictures, from one file of results.

    python -m bench.report                  the newest file in bench/results
    python -m bench.report FILE

Of the page only what is between `<!-- begin NAME -->` and `<!-- end NAME -->` is written: the tables. The last column
of the first table, what a figure is limited by, is written by hand, in the page's comment `<!-- limits`, a line for
each row: `NUMBER: text`. It names figures instead of repeating them: `{KEY}` is a median, and keys and numbers may be
multiplied and divided from left to right, with a format behind: `{1000/demux.1:.0f} ns`, `{demux.1/demux.16:.0%}`. The
pictures (bench/pictures.py) go to docs/performance/.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.suite import GROUPS, INVOCATIONS, ROWS, Figures, Part, Row, Unmeasured

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"

KEYS = frozenset(invocation.key for invocation in INVOCATIONS)

Line = dict[str, Any]

# -- the rows ----------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three or four digits, thousands with commas."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}" if abs(value) < 100 else f"{value:.4g}"
    return text if "e" not in text else f"{value:f}".rstrip("0").rstrip(".")


def _with_unit(value: str, unit: str) -> str:
    return f"{value} {unit}"


def _measured(part: Part, figures: Figures) -> tuple[str, bool | None]:
    """The figure as text, and whether it is good enough; None if it was not measured."""
    try:
        value = part.compute(figures)
    except Unmeasured as missing:
        return str(missing), None
    holds = part.holds(value)
    text = number(value)
    if holds != part.holds(float(text.replace(",", ""))):
        text = f"{value:.6g}"       # rounded it would say something else
    return _with_unit(text, part.unit), holds


def _target(part: Part) -> str:
    sign = {">=": "≥", "<=": "≤"}[part.comparison]
    return f"{sign} {_with_unit(number(part.target), part.unit)}"


def verdict(row: Row, figures: Figures) -> tuple[str, str, str]:
    """Target, figure and whether it holds, as cells."""
    targets = list(dict.fromkeys(_target(part) for part in row.parts))
    found = [_measured(part, figures) for part in row.parts]
    cells = [f"{part.label}: {text}" if part.label else text for part, (text, _) in zip(row.parts, found, strict=True)]
    if len(targets) > 1:
        targets = [f"{part.label}: {_target(part)}" for part in row.parts]
    states = [state for _, state in found]
    holds = "**no**" if False in states else "not measured" if None in states else "yes"
    return "<br>".join(targets), "<br>".join(cells), holds


def row_table(figures: Figures, limits: Mapping[int, str]) -> str:
    """All that is asserted."""
    lines = ["| | what | target | measured | holds | limited by |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        target, measured, holds = verdict(row, figures)
        lines.append(f"| {row.number} | {row.text} | {target} | {measured} | {holds} | "
                     f"{filled_in(limits.get(row.number, ''), figures)} |")
    return "\n".join(lines)


def limits_of(page: str) -> dict[int, str]:
    """The hand-written column. A line that does not begin with a number goes on with the one before."""
    block = re.search(r"<!-- limits\n(.*?)-->", page, re.S)
    found: dict[int, str] = {}
    last = 0
    for line in (block.group(1).splitlines() if block else []):
        head = re.match(r"(\d+):\s*(.*)", line)
        if head:
            last = int(head.group(1))
            found[last] = head.group(2).strip()
        elif line.strip() and last:
            found[last] = f"{found[last]} {line.strip()}".strip()
    return found


def _value(word: str, figures: Figures) -> float:
    """A number, or the median of a figure. ValueError if the suite has no such figure."""
    try:
        return float(word)
    except ValueError:
        if word not in KEYS:
            raise ValueError(f"{PAGE.name}: there is no figure {word!r}") from None
    return figures[word]


def _computed(expression: str, form: str, figures: Figures) -> str:
    """One `{...}` of the text, or which figure is missing for it."""
    first, *others = re.split(r"([*/])", expression.replace(" ", ""))
    try:
        value = _value(first, figures)
        for operator, word in zip(others[::2], others[1::2], strict=True):
            value = value * _value(word, figures) if operator == "*" else value / _value(word, figures)
    except Unmeasured as missing:
        return str(missing)
    return format(value, form) if form else number(value)


def filled_in(text: str, figures: Figures) -> str:
    """The text with its figures. ValueError for names that the suite does not know."""
    return re.sub(r"\{([^{}:]+):?([^{}]*)\}", lambda match: _computed(match[1], match[2], figures), text)


# -- all figures -------------------------------------------------------------------------------------------------


def figure_tables(lines: Mapping[str, Line]) -> str:
    """A table for each group."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for key, line in lines.items():
        groups.setdefault(line["group"], []).append(_figure_row(key, line))
    head = "| figure | what | median | unit | spread | load | `python -m` |\n|---|---|---:|---|---:|---:|---|"
    return "\n\n".join(f"### {GROUPS.get(group, group)}\n\n{head}\n" + "\n".join(rows)
                       for group, rows in groups.items() if rows)


def _figure_row(key: str, line: Line) -> str:
    command = line["command"].removesuffix(" --json")
    if "median" not in line:
        why = f"skipped: {line['skipped']}" if "skipped" in line else f"failed: {line['failed']}"
        return f"| `{key}` | {line['text']} | | {why} | | | `{command}` |"
    return (f"| `{key}` | {line['text']} | {number(line['median'])} | {line['unit']} | {line['spread']:.1%} | "
            f"{line['load']} | `{command}` |")


def scaling_table(figures: Figures) -> str:
    """Throughput and efficiency for each number of workers; the law and what it predicts."""
    try:
        rates, law = figures.of("scaling", "Mpps"), figures.of("scaling", "usl")
        efficiency, speedup = figures.of("scaling", "efficiency"), figures.of("scaling", "speedup")
        low, middle, high = figures.of("scaling", "predicted_Mpps")
        workers = figures.of("scaling", "predicted_workers")
    except Unmeasured as missing:
        return f"{missing}."
    lines = ["| RX workers | Mpps, each turn | against one | efficiency | off the law |", "|---:|---|---:|---:|---:|"]
    lines += [f"| {n} | {', '.join(number(rate) for rate in some)} | {speedup[n]:.2f} | {efficiency[n]:.1%} | "
              f"{law['residuals'][n]:+.1%} |" for n, some in rates.items()]
    kappa = f"κ = {law['kappa']:.4g}" if "kappa" in law["free"] else "κ not known (two points), taken as 0"
    lines += ["", f"The Universal Scalability Law: {number(law['rate'])} Mpps for one worker, σ = {law['sigma']:.4g}, "
              f"{kappa}. For {workers} workers it says {number(middle)} Mpps; fitted to the worst and to the best turn "
              f"alone {number(low)} and {number(high)}."]
    return "\n".join(lines)


def machine_table(results: Line) -> str:
    """Where and when."""
    facts = results["machine"]
    core = "core" if facts["cores"] == 1 else "cores"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    virtual = "a virtual machine" if facts["virtual"] else "no virtual machine"
    rows = {
        "processor": f"{facts['cpu']}, {facts['cores']} {core}, {virtual}",
        "memory": f"{facts['memory_gib']:g} GiB", "Linux": facts["kernel"],
        "frequency governor": facts["governor"], "Python": facts["python"], "versions": versions,
        "measured": f"{results['started']} to {results['ended']}",
        "load before it began": f"{results['load']:.2f}"}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


# -- the page ----------------------------------------------------------------------------------------------------


def replaced(page: str, name: str, text: str) -> str:
    """The page with that between its markers. ValueError if it has no such markers."""
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.S)
    if not pattern.search(page):
        raise ValueError(f"{PAGE.name} has no markers for {name!r}")
    return pattern.sub(lambda match: f"{match.group(1)}{text}\n{match.group(2)}", page)


def write(path: Path, page: Path = PAGE) -> None:
    """Tables and pictures. Without matplotlib the pictures stay as they are, and it says so."""
    results = json.loads(path.read_text())
    order = {invocation.key: i for i, invocation in enumerate(INVOCATIONS)}
    lines = {line["key"]: line for line in sorted(
        results["figures"], key=lambda line: order.get(line["key"], len(order)))}
    figures = Figures(lines)
    text = page.read_text()
    for name, table in {
        "rows": row_table(figures, limits_of(text)), "machine": machine_table(results),
        "scaling": scaling_table(figures), "figures": figure_tables(lines)}.items():
        text = replaced(text, name, table)
    page.write_text(text)
    try:
        from bench import pictures
    except ImportError:
        print("the pictures were not drawn: pip install matplotlib")
        return
    pictures.draw(figures, page.with_suffix(""))


def newest() -> Path:
    """The results that were written last."""
    found = sorted(RESULTS.glob("*.json"), key=lambda path: json.loads(path.read_text())["ended"])
    if not found:
        raise SystemExit("there are no results yet: python -m bench")
    return found[-1]


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else newest())
