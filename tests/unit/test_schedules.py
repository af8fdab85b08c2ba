"""Schedules equal their papers' formulas, step by step, and refuse what does not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harken.config.registry import build, find
from harken.core.errors import HarkenError
from harken.optim.schedules.base import Schedule

STEPS = 1000


def schedule(name: str, steps: int = STEPS, **settings: Any) -> Schedule:
    made: Schedule = build("schedule", find("schedule", name).config(name=name, **settings), steps=steps)
    return made


def test_cosine_is_half_a_period_behind_the_warm_up() -> None:
    """Equation 5 of arXiv 1608.03983 with T_cur counted from the warm-up's end."""
    rate = schedule("cosine", peak=2e-3, warmup_steps=100, end=1e-4)
    assert [rate(step, 0.0) for step in (0, 49, 99)] == pytest.approx([2e-5, 1e-3, 2e-3])
    for current in range(0, 901, 50):
        expected = 1e-4 + 0.5 * (2e-3 - 1e-4) * (1 + math.cos(current / 900 * math.pi))
        assert rate(100 + current, 0.0) == pytest.approx(expected), current
    assert rate(STEPS + 5, 0.0) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("sqrt", lambda n, start, steps: 1 - math.sqrt((n - start) / (steps - start))),
        ("linear", lambda n, start, steps: (steps - n) / (steps - start)),
        ("cosine", lambda n, start, steps: math.cos(math.pi / 2 * (n - start) / (steps - start)) ** 2),
    ],
)
def test_warmup_stable_decay_falls_in_its_last_share_only(shape, left) -> None:
    rate = schedule("warmup_stable_decay", peak=1e-3, warmup_steps=50, decay_share=0.2, shape=shape, end=1e-5)
    assert rate(0, 0.0) == pytest.approx(1e-3 / 50)
    assert {rate(step, 0.0) for step in range(49, 801)} == {1e-3}
    for step in range(801, 1001, 20):
        assert rate(step, 0.0) == pytest.approx(1e-5 + (1e-3 - 1e-5) * left(step, 800, STEPS)), step


def test_the_plateau_does_not_know_how_long_the_run_is() -> None:
    """So a longer run may go on from the plateau of a shorter one."""
    short, long = (schedule("warmup_stable_decay", steps, peak=1e-3, warmup_steps=50) for steps in (1000, 5000))
    assert [short(step, 0.0) for step in range(801)] == [long(step, 0.0) for step in range(801)]
    assert short(900, 0.0) < long(900, 0.0)


def test_the_infinite_schedule_has_four_phases() -> None:
    """Warm-up, cosine cooldown, constant, exponential annealing: arXiv 2503.02844."""
    top, flat, low, warm, cool, begin = 1e-3, 4e-4, 1e-5, 50, 250, 800  # eta and the ends of the phases
    rate = schedule(
        "infinite", peak=top, constant=flat, end=low, warmup_steps=warm, cooldown_steps=cool - warm, anneal_steps=200
    )
    assert rate(24, 0.0) == pytest.approx(top / 2)
    for step in range(warm, cool, 20):
        expected = flat + (top - flat) / 2 * (1 + math.cos(math.pi * (step - warm) / (cool - warm)))
        assert rate(step, 0.0) == pytest.approx(expected), step
    assert {rate(step, 0.0) for step in range(cool, begin + 1)} == {flat}
    for step in range(begin, STEPS + 1, 20):
        expected = flat * math.exp(math.log(low / flat) * (step - begin) / (STEPS - begin))
        assert rate(step, 0.0) == pytest.approx(expected), step


def test_without_annealing_the_infinite_schedule_is_the_same_for_runs_of_every_length() -> None:
    settings = {"peak": 1e-3, "constant": 4e-4, "warmup_steps": 50, "cooldown_steps": 200}
    short, long = (schedule("infinite", steps, **settings) for steps in (100, 100_000))
    assert [short(step, 0.0) for step in range(2000)] == [long(step, 0.0) for step in range(2000)]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "cosine",
            {"peak": 1e-3, "warmup_steps": 0, "end": 1e-2},
            "`schedule.end` must be at most `schedule.peak`, got 0.01 and 0.001",
        ),
        (
            "warmup_stable_decay",
            {"peak": 1e-3, "warmup_steps": 900},
            "must fit into `train.steps`, got 900, 200 and 1000: lower one of the two",
        ),
        (
            "infinite",
            {"peak": 1e-3, "constant": 1e-2, "warmup_steps": 1, "cooldown_steps": 1},
            "`schedule.constant` must be at most `schedule.peak`, got 0.01 and 0.001",
        ),
        (
            "infinite",
            {"peak": 1e-3, "constant": 1e-4, "warmup_steps": 1, "cooldown_steps": 1, "anneal_steps": 9},
            "belong together: the rate falls to `end` in so many steps, got 9 and None",
        ),
        (
            "infinite",
            {
                "peak": 1.0,
                "constant": 0.1,
                "warmup_steps": 500,
                "cooldown_steps": 400,
                "anneal_steps": 200,
                "end": 0.01,
            },
            "must fit into `train.steps`, got 500, 400, 200 and 1000",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HarkenError) as caught:
        schedule(name, **settings)
    assert message in str(caught.value)
