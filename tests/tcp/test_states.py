"""Every pair of state and event, through the kernels, against the table."""

from __future__ import annotations

import errno

import pytest

from dataplane.shm import layout_tcp as T
from dataplane.tcp.states import EVENTS, LISTENER, PROHIBITED, STATES, TRANSITIONS
from tests.tcp.cells import fire, reach
from tests.tcp.rig import MODES, Segment

CELLS = [(state, event) for state, row in TRANSITIONS.items() for event in row]


def told(one: Segment) -> set[str]:
    """What may be said of a segment in the table."""
    names = {"S": "SYN", "F": "FIN", "R": "RST"}
    found = {names[flag] for flag in one.flags if flag in names}
    if one.data:
        found.add("DATA")
    if "A" in one.flags and (not found or "SYN" in found):
        found.add("ACK")
    return found


def test_the_tables_cover_each_pair_once() -> None:
    pairs = {(state, event) for state in STATES if state != "LISTEN" for event in EVENTS}
    assert set(CELLS) | set(PROHIBITED) == pairs
    assert not set(CELLS) & set(PROHIBITED)
    assert set(LISTENER) <= set(EVENTS)
    assert {step.state for row in TRANSITIONS.values() for step in row.values()} <= set(STATES) - {"LISTEN"}


def test_the_names_are_in_the_order_of_the_numbers() -> None:
    assert [getattr(T, name) for name in STATES] == list(range(len(STATES)))


def test_every_state_can_be_reached_and_left() -> None:
    reached = {"CLOSED"}
    while more := {step.state for state in reached for step in TRANSITIONS[state].values()} - reached:
        reached |= more
    assert reached == set(TRANSITIONS)
    for state in set(TRANSITIONS) - {"CLOSED"}:
        assert any(step.state != state for step in TRANSITIONS[state].values()), state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state, event", CELLS, ids=lambda one: one)
def test_cell(state: str, event: str, mode: str) -> None:
    step = TRANSITIONS[state][event]
    end = reach(state, event, mode)
    before = end.word(end.t + T.T_ERROR)
    out = fire(end, event)
    assert end.state == step.state
    assert [told(one) for one in out] == ([set(step.sends.split())] if step.sends else []), out
    error = end.word(end.t + T.T_ERROR)
    assert before == 0 and error == (getattr(errno, step.error) if step.error else 0)
    if step.state != state:
        assert end.events & T.EV_STATE
    if step.state == "CLOSED":
        assert end.deadline == 0
    if step.state == "CLOSED" and state != "CLOSED":
        assert end.events & (T.EV_READABLE | T.EV_WRITABLE) == T.EV_READABLE | T.EV_WRITABLE


@pytest.mark.parametrize("state", [one for one in STATES if one not in ("LISTEN", "CLOSED")])
def test_prohibited_timers_do_not_run(state: str) -> None:
    """What the table calls impossible because no such timer runs."""
    words = {"RETRANSMIT": "RTX_AT", "PERSIST": "PERSIST_AT", "DELAYED_ACK": "DELACK_AT", "END": "END_AT"}
    end = reach(state)
    for event, word in words.items():
        if (state, event) in PROHIBITED:
            assert end[word] == 0, word
