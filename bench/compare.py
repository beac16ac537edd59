"""Two runs of `make bench` side by side: which figures differ by more than both runs' own repeats do.

    python -m bench.compare bench/results/OLD.json bench/results/NEW.json

Prints each figure whose medians differ by more than the larger spread (largest minus smallest repeat, as a part of the
median), and how many do not. Figures that only one run has are left out. Ends with status 1 if there are any.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Figures = Mapping[str, Mapping[str, Any]]


def figures(path: Path) -> Figures:
    """The figures of a run, by key, without those that were skipped or failed."""
    return {line["key"]: line for line in json.loads(path.read_text())["figures"] if "median" in line}


def apart(old: Figures, new: Figures) -> list[tuple[str, float, float]]:
    """(key, new through old, the larger spread) where the medians differ by more than that."""
    found = []
    for key in old.keys() & new.keys():
        ratio = new[key]["median"] / old[key]["median"]
        spread = max(old[key]["spread"], new[key]["spread"])
        if abs(ratio - 1) > spread:
            found.append((key, ratio, spread))
    return sorted(found, key=lambda one: -abs(one[1] - 1))


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    old, new = (figures(Path(name)) for name in sys.argv[1:])
    found = apart(old, new)
    for key, ratio, spread in found:
        print(f"{key:40} {ratio:6.3f} times; spread {spread:.1%}")
    print(f"{len(old.keys() & new.keys()) - len(found)} of {len(old.keys() & new.keys())} figures differ by no more "
          "than their spread")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
