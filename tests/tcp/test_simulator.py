"""The simulator's scenarios: all checks hold, and the results are those that were recorded.

A change of the protocol that is meant to change them: `python -m tests.tcp.simulator --record`, and say so in
the commit.
"""

from __future__ import annotations

import json

import pytest

from tests.tcp.simulator import RECORDED, SCENARIOS, Simulation, anything

COLUMNS = ("ms", "segments", "retransmits", "lost", "goodput")
TABLE = json.loads(RECORDED.read_text())

# Results are exact as long as nothing changes; this is what an innocent change may make of them. For each column a
# share of what was recorded, and an amount.
TOLERANCE = {"ms": (0.15, 50), "segments": (0.10, 10), "retransmits": (0.25, 5), "lost": (0.25, 5),
             "goodput": (0.15, 0.1)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name):
    row = dict(zip(COLUMNS, Simulation(SCENARIOS[name], "plain").run().row(), strict=True))
    recorded = dict(zip(COLUMNS, TABLE[name], strict=True))
    far = {column: (recorded[column], row[column]) for column, (share, amount) in TOLERANCE.items()
           if abs(row[column] - recorded[column]) > share * recorded[column] + amount}
    assert not far, f"(recorded, is): {far}"


def test_the_record_is_complete():
    assert set(TABLE) == set(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_compiled_and_plain_are_the_same(name):
    """Segment by segment, with times and windows: what is debugged is what runs."""
    traces = []
    for mode in ("plain", "compiled"):
        lines: list[str] = []
        Simulation(SCENARIOS[name], mode, seed=2, trace=lines.append).run()
        traces.append(lines)
    assert traces[0] == traces[1]


@pytest.mark.parametrize("seed", range(80))
def test_anything(seed):
    """Scenarios that nobody thought of."""
    Simulation(anything(seed), "plain", seed).run()


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_many_of_anything():
    for seed in range(60, 2000):
        try:
            Simulation(anything(seed), "compiled", seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("name", ["wrap, everything", "simultaneous open, loss", "reader pauses, loss", "close, loss"])
@pytest.mark.parametrize("seed", range(3, 8))
def test_other_weather(name, seed):
    Simulation(SCENARIOS[name], "plain", seed).run()
