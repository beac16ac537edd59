"""The Universal Scalability Law (N. J. Gunther), fitted to measured throughputs, and what it predicts.

    X(n) = rate * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))

`rate` is one worker's throughput, `sigma` the part of the work that workers do one after the other or wait for each
other (contention), `kappa` what each pair of workers costs both (coherency). With kappa = 0 it is Amdahl's law.

    python -m bench.usl 1:12.9 2:25.5 4:49

How it is fitted. n / X(n) = (1 + sigma * (n - 1) + kappa * n * (n - 1)) / rate is linear in 1 / rate, sigma / rate and
kappa / rate: one linear least squares, each equation weighed so that errors are relative ones. None of the three can be
below 0: among the fits with sigma, kappa or both held at 0 the best one that has none below is taken.

What it cannot know. Three parameters need three different n. Measured at two, kappa is held at 0 (so that a prediction
for many workers is an upper bound), and no residual says anything; at one, sigma as well. `Fit.free` names what was
fitted.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fit:
    """The parameters, which of them were fitted (the others are 0 by assumption), and for each n how far the measured
    throughput is from the law's, as a part of the law's."""

    rate: float
    sigma: float
    kappa: float
    free: tuple[str, ...]
    residuals: dict[int, float]

    def at(self, workers: float) -> float:
        """The law's throughput."""
        return _law(self.rate, self.sigma, self.kappa, workers)

    @property
    def peak(self) -> float:
        """The number of workers beyond which more of them are slower; infinite without coherency cost."""
        return math.sqrt((1 - self.sigma) / self.kappa) if self.kappa > 0 and self.sigma < 1 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """For JSON: four digits, residuals by the number of workers as text."""
        values = asdict(self)
        for name in ("rate", "sigma", "kappa"):
            values[name] = float(f"{values[name]:.4g}")
        values["free"] = list(self.free)
        values["residuals"] = {str(n): round(value, 4) for n, value in self.residuals.items()}
        return values


def fit(points: Sequence[tuple[int, float]]) -> Fit:
    """Of (workers, throughput), as many for one number of workers as there are. ValueError without any."""
    if not points or any(n < 1 or x <= 0 for n, x in points):
        raise ValueError("the law is fitted to throughputs above 0 of at least one worker")
    different = len({n for n, _ in points})
    names = ("rate", "sigma", "kappa")[:min(different, 3)]
    n, x = (np.array(column, float) for column in zip(*points, strict=True))
    columns = {"rate": np.ones_like(n), "sigma": n - 1, "kappa": n * (n - 1)}
    weights = x / n
    best: tuple[float, dict[str, float]] | None = None
    for size in range(len(names), 0, -1):
        for chosen in itertools.combinations(names[1:], size - 1):
            kept = ("rate", *chosen)
            left = np.stack([columns[name] * weights for name in kept], axis=1)
            solution = np.linalg.lstsq(left, np.ones_like(n), rcond=None)[0]
            error = float(np.square(left @ solution - 1).sum())
            if (solution >= 0).all() and solution[0] > 0 and (best is None or error < best[0] - 1e-15):
                best = error, dict(zip(kept, solution.tolist(), strict=True))
    assert best is not None     # with 1 / rate alone the solution is a mean of positive numbers
    found = best[1]
    rate, sigma, kappa = 1 / found["rate"], found.get("sigma", 0.0), found.get("kappa", 0.0)
    sigma, kappa = sigma * rate, kappa * rate
    residuals = {int(w): float(np.mean(x[n == w])) / _law(rate, sigma, kappa, w) - 1 for w in sorted(set(n.tolist()))}
    return Fit(rate, sigma, kappa, names, residuals)


def _law(rate: float, sigma: float, kappa: float, n: float) -> float:
    return rate * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))


def main() -> None:
    """Fits what stands on the command line: workers:throughput."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    points = [(int(n), float(x)) for n, _, x in (word.partition(":") for word in sys.argv[1:])]
    fitted = fit(points)
    print(f"rate {fitted.rate:.4g}, sigma {fitted.sigma:.4g}, kappa {fitted.kappa:.4g} (fitted: "
          f"{', '.join(fitted.free)}); most at {fitted.peak:.4g} workers; 64 workers: {fitted.at(64):.4g}")


if __name__ == "__main__":
    main()
