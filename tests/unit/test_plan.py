"""The plan of a pool of cuts, the segments of an epoch and the permutation that deals them out."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

from harken.config.schema import BatchConfig
from harken.core.errors import HarkenError
from harken.core.permutation import Permutation
from harken.data import order
from harken.data.order import EpochOrder, Planner, Position, segments_of
from harken.data.plan import Plan, make_plan, rectangles
from harken.data.selection import select

SECONDS = np.random.default_rng(0).lognormal(1.6, 0.7, 3000).clip(0.3, 30).astype(np.float32)
BATCH = BatchConfig(max_seconds=60, seconds_per_step=480)


def plan_of(seed: int = 1, batch: BatchConfig = BATCH, seconds=SECONDS) -> Plan:
    return make_plan(seconds, batch, np.random.default_rng(seed))


def durations(kind: str, count: int) -> np.ndarray:
    """Draw durations as LibriSpeech has them (most near its longest, 14.5 s), or with a heavy tail."""
    rng = np.random.default_rng(0)
    if kind == "librispeech":
        full = rng.random(count) < 0.62
        drawn = np.where(full, rng.normal(14.5, 1.2, count).clip(1.3, 17.3), rng.uniform(1.3, 16, count))
    else:
        drawn = rng.lognormal(1.1, 0.9, count).clip(0.3, 40)
    return drawn.astype(np.float32)


def test_every_cut_occurs_exactly_once() -> None:
    for seed in range(3):
        for parts in (1, 2, 4):
            plan = plan_of(seed, replace(BATCH, parts=parts))
            assert sorted(plan.order.tolist()) == list(range(len(SECONDS)))
            assert sorted(np.concatenate([row for place in range(len(plan)) for row in plan[place]])) == list(
                range(len(SECONDS))
            )
            assert (np.diff(plan.parts) > 0).all(), "no part is empty"
            assert max(np.diff(plan.bounds)) <= parts
            assert min(np.diff(plan.bounds)) >= 1, "no micro-batch is empty"


def test_steps_are_whole() -> None:
    for per_step in (1, 3, 8, 13):
        plan = plan_of(batch=replace(BATCH, seconds_per_step=60 * per_step))
        assert plan.per_step == per_step
        assert len(plan) == plan.steps * per_step


def test_no_micro_batch_holds_more_than_max_seconds() -> None:
    for parts in (1, 2):
        plan = plan_of(batch=replace(BATCH, parts=parts))
        padded = [sum(SECONDS[rows].max() * len(rows) for rows in plan[place]) for place in range(len(plan))]
        assert max(padded) <= 60 + 1e-4
        assert np.isclose(sum(padded), plan.padded_seconds(SECONDS).sum())


@pytest.mark.parametrize(("kind", "padding"), [("librispeech", 0.005), ("log-normal", 0.01)])
def test_batches_are_full_and_hardly_padded(kind: str, padding: float) -> None:
    """The goals for 50,000 cuts and 87.5 s; with one part the last places of a rectangle stay empty."""
    seconds = durations(kind, 50_000)
    batch = BatchConfig(max_seconds=87.5, seconds_per_step=87.5 * 32)
    plan = plan_of(batch=batch, seconds=seconds)
    padded, real = plan.padded_seconds(seconds).sum(), seconds.sum(dtype=np.float64)
    assert sorted(plan.order.tolist()) == list(range(len(seconds)))
    assert 1 - real / padded <= padding
    assert real / (len(plan) * 87.5) >= 0.97
    single = plan_of(batch=replace(batch, parts=1), seconds=seconds)
    assert single.padded_seconds(seconds).sum() / (len(single) * 87.5) < 0.95


def test_micro_batches_of_a_step_are_of_similar_durations() -> None:
    """So that no rank waits for another."""
    plan = plan_of()
    spreads = []
    for step in range(plan.steps):
        longest = [SECONDS[plan[step * 8 + slot][0]].max() for slot in range(8)]
        spreads.append(max(longest) / min(longest))
    assert np.median(spreads) < 1.15


def test_a_plan_is_a_pure_function() -> None:
    first, second, other = plan_of(4), plan_of(4), plan_of(5)
    for one, same, different in ((vars(first)[name], vars(second)[name], vars(other)[name]) for name in ("order",)):
        assert np.array_equal(one, same)
        assert not np.array_equal(one, different)
    assert np.array_equal(first.parts, second.parts)
    assert np.array_equal(first.bounds, second.bounds)


def test_epochs_mix_cuts_anew() -> None:
    """Not only the order of batches differs between epochs but which cuts share one."""

    def pairs(seed: int, mixing: int) -> set[tuple[int, int]]:
        plan = plan_of(seed, replace(BATCH, mixing=mixing))
        parts = [sorted(plan.part(number).tolist()) for number in range(len(plan.parts) - 1)]
        return {pair for part in parts for pair in itertools.combinations(part, 2)}

    def kept(mixing: int) -> float:
        first, second = pairs(0, mixing), pairs(1, mixing)
        return len(first & second) / len(first)

    assert kept(8) < 0.2
    assert kept(32) < kept(8) < kept(1), "the more neighbours, the more mixing"


def test_without_draws_cuts_come_by_duration() -> None:
    batches = rectangles(SECONDS, 60.0)
    assert (np.diff(SECONDS[np.concatenate(batches)]) >= 0).all()
    assert max(SECONDS[rows].max() * len(rows) for rows in batches) <= 60
    assert [rows.tolist() for rows in rectangles(np.array([9, 1], dtype=np.float32), 5.0)] == [[1], [0]]


def test_too_few_cuts_for_a_step_are_an_error() -> None:
    with pytest.raises(
        HarkenError, match=r"5 cuts cannot fill steps of 8 micro-batches: lower `batch.seconds_per_step`"
    ):
        plan_of(seconds=SECONDS[:5])


def test_cuts_left_out_are_counted() -> None:
    selection = select(np.array([0.1, 1, 2, 31], dtype=np.float32), 0.5, 30.0, None)
    assert selection.places.tolist() == [1, 2]
    assert "kept 2 cuts" in selection.describe()
    assert "dropped 1 (0.00 h) shorter than 0.5 s; dropped 1 (0.01 h) longer than 30 s" in selection.describe()
    cropped = select(np.array([0.1, 1, 2, 31], dtype=np.float32), 0.5, 30.0, 15.0)
    assert cropped.seconds.tolist() == [1, 2, 15]
    with pytest.raises(HarkenError, match="none of 1 cuts lies between"):
        select(np.array([31], dtype=np.float32), 0.5, 30.0, None)


# Segments


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 4097])
def test_a_permutation_is_one(size: int) -> None:
    places = np.arange(size)
    mixed = Permutation(size, 7)[places]
    assert sorted(mixed.tolist()) == places.tolist()
    assert np.array_equal(Permutation(size, 7)[places[size // 2 :]], mixed[size // 2 :]), "any part alone is the same"
    if size >= 1000:
        assert not np.array_equal(Permutation(size, 8)[places], mixed)
        assert abs(np.corrcoef(places, mixed)[0, 1]) < 0.1
        assert (mixed == places).sum() < 10
        half = mixed[: size // 2]
        assert abs((half < size // 2).mean() - 0.5) < 0.05, "a segment is drawn from everywhere"


@pytest.fixture
def segmented(monkeypatch: pytest.MonkeyPatch) -> Planner:
    """Plan epochs of three segments."""
    monkeypatch.setattr(order, "SEGMENT_CUTS", 1000)
    monkeypatch.setattr(order, "SEGMENT_STEPS", 1)
    selection = select(SECONDS, 0.5, 29.0, None)
    planner = Planner(EpochOrder.of(selection, BATCH, 3), BATCH, 3)
    assert planner.order.segments(0) == 2
    return planner


def epoch_of(planner: Planner, start: Position) -> tuple[list[Position], list[int]]:
    """Follow the positions to the end of an epoch; return them and the places of the cuts met."""
    positions, places = [], []
    position = start
    while position.epoch == start.epoch:
        pool, plan = planner.segment(position.epoch, position.segment)
        assert set(pool.epochs.tolist()) == {position.epoch}
        for slot in range(plan.per_step):
            for rows in plan[position.step * plan.per_step + slot]:
                places += pool.places[rows].tolist()
        positions.append(position)
        position = planner.after(position)
    return positions, places


def no_thread(self: threading.Thread) -> None:
    """Start no thread, as where a limited memory has no room for its stack."""
    raise RuntimeError("can't start new thread")


def test_without_memory_for_a_thread_segments_are_planned_when_they_are_needed(
    segmented: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    _, places = epoch_of(segmented, Position())
    assert sorted(places) == sorted(segmented.order.selection.places.tolist())


def test_an_epoch_of_segments_has_every_cut_once(segmented: Planner) -> None:
    selection = segmented.order.selection
    positions, places = epoch_of(segmented, Position())
    assert sorted(places) == selection.places.tolist()
    assert {position.segment for position in positions} == {0, 1}
    half = len(places) // 2
    assert abs(SECONDS[places[:half]].mean() / SECONDS[places[half:]].mean() - 1) < 0.1, "segments are alike"
    _, later = epoch_of(segmented, positions[len(positions) // 3])
    assert later == places[-len(later) :], "an epoch goes on from any position"
    _, other = epoch_of(segmented, Position(1))
    assert sorted(other) == sorted(places)
    assert set(other[: len(other) // 2]) != set(places[: len(places) // 2]), "segments are drawn anew"


def test_a_small_corpus_has_one_segment_and_a_large_one_steps_enough() -> None:
    assert segments_of(SECONDS, BATCH) == 1
    many = np.full(10_000_000, 12.0, dtype=np.float32)
    small, large = (BatchConfig(max_seconds=100, seconds_per_step=100 * ranks) for ranks in (8, 4096))
    assert segments_of(many, small) == 76
    assert segments_of(many, large) == 2, "4096 x 100 s are 34,000 cuts a step: a segment holds a hundred steps"
