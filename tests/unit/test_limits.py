"""Limits by duration and text: the plan keeps them, steps keep their audio, what is lowered holds on all ranks."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from harken.config.schema import BatchConfig, DataConfig
from harken.core.errors import HarkenError
from harken.data.dataset import Task, as_it_is
from harken.data.limits import Limits, LimitState
from harken.data.loader import TrainLoader
from harken.data.order import Position
from harken.data.plan import make_plan

SECONDS = np.random.default_rng(0).lognormal(1.6, 0.7, 20_000).clip(0.3, 30).astype(np.float32)
BY_SECONDS = Limits(240, (2.0, 8.0, 30.0), (), ((240.0,), (160.0,), (60.0,)))


def cost(plan, seconds, part: int) -> float:
    rows = plan.part(part)
    return float(seconds[rows].max()) * len(rows)


def test_a_number_is_a_constant_and_a_table_is_read_back() -> None:
    assert Limits.of_rows(60.0, ()).at(3.0) == Limits.of_rows(60.0, ()).at(300.0, 1e6) == 60.0
    rows = [[2.0, 50.0, 240.0], [2.0, 900.0, 100.0], [30.0, 50.0, 60.0], [30.0, 900.0, 30.0]]
    limits = Limits.of_rows(200.0, rows)
    assert limits.rows == rows
    assert [limits.at(*at) for at in ((1, 50), (1, 51), (2.1, 3), (40, 9999))] == [200, 100, 60, 30]
    assert limits.least == 30.0
    with pytest.raises(HarkenError, match=r"every pair of buckets once, got"):
        Limits.of_rows(200.0, rows[:3])
    with pytest.raises(HarkenError, match=r"`batch.limits` must be a list of \[seconds, padded seconds\]"):
        Limits.of_rows(200.0, [[1.0, 2.0], [1.0, 2.0, 3.0]])


def test_every_part_keeps_the_limit_of_its_bucket_and_every_step_its_audio() -> None:
    batch = BatchConfig(max_seconds=240, seconds_per_step=480)
    plan = make_plan(SECONDS, batch, np.random.default_rng(1), BY_SECONDS)
    assert sorted(plan.order.tolist()) == list(range(len(SECONDS)))
    sizes = plan.padded_seconds(SECONDS)
    for part in range(len(sizes)):
        longest = float(SECONDS[plan.part(part)].max())
        assert sizes[part] <= BY_SECONDS.at(longest) + 1e-6
    assert sizes.max() > 200, "short cuts use their larger limit"
    real = SECONDS.sum(dtype=np.float64)
    assert 1 - real / sizes.sum() < 0.02
    assert real / (plan.steps * 480) > 0.95, "steps are as large as with one limit for all"
    steps = np.add.reduceat(sizes, plan.bounds[:-1:2])
    assert steps.max() <= 480 + 1e-3


def test_long_texts_have_their_own_limits() -> None:
    rng = np.random.default_rng(0)
    texts = (SECONDS * rng.uniform(5, 20, len(SECONDS))).astype(np.int32)
    texts[::500] = 500  # among them cuts of a second
    limits = Limits(240, (8.0, 30.0), (200.0, 500.0), ((240.0, 20.0), (90.0, 60.0)))
    plan = make_plan(SECONDS, BatchConfig(max_seconds=240, seconds_per_step=480), rng, limits, texts)
    sizes = plan.padded_seconds(SECONDS)
    for part in range(len(sizes)):
        rows = plan.part(part)
        most = limits.at(float(SECONDS[rows].max()), float(texts[rows].max()))
        assert sizes[part] <= most + 1e-6 or len(rows) == 1
    assert SECONDS.sum(dtype=np.float64) / (plan.steps * 480) > 0.9


def test_what_did_not_fit_lowers_its_bucket_alone_and_survives_json() -> None:
    limits = Limits(60.0).lowered(5.0, 0.0, 55.0)
    assert limits.at(5.0) == pytest.approx(44.0)
    assert limits.at(1.0) == limits.at(20.0) == 60.0
    assert limits.lowered(5.0, 0.0, 40.0).at(5.0) == pytest.approx(32.0)
    state = LimitState.begin(Limits(60.0)).lowered(limits, 2, 1)
    assert (state.of(2, 1), state.of(2, 2), state.of(3, 0)) == (Limits(60.0), limits, limits)
    assert state.lowered(limits, 2, 1).planned == Limits(60.0), "a segment keeps the plan that it began with"
    assert LimitState.from_dict(json.loads(json.dumps(asdict(state), allow_nan=False))) == state


def loader(
    corpus, rank: int = 0, world: int = 1, *, even: bool = False, limits: LimitState | None = None
) -> TrainLoader:
    batch = BatchConfig(max_seconds=6.0, seconds_per_step=24.0)
    data = DataConfig(train=str(corpus.train), max_seconds=4.0, workers=0)
    options = {"seed": 3, "hop": 320, "rank": rank, "world_size": world, "even_passes": even, "limits": limits}
    return TrainLoader(data, batch, as_it_is, **options)


def ids(steps) -> list[list[str]]:
    return [sorted(cut for batch in step.batches for cut in batch.ids) for step in steps]


def test_limits_lowered_under_way_divide_what_is_to_come_and_a_restart_does_the_same(corpus) -> None:
    own = loader(corpus)
    stream = own.steps(Position())
    before = [next(stream)]
    low = replace(Limits(6.0).lowered(2.0, 0.0, 6.0), padded=((2.5,),) * 26)
    state = own.planner.limits.lowered(low, 0, 0)
    own.limit(state)
    steps = int(own.planner.steps(0))
    after = list(itertools.islice(stream, steps + 2))
    whole = list(itertools.islice(loader(corpus).steps(Position()), steps))
    assert ids([*before, *after[: steps - 1]]) == ids(whole), "the same cuts in the same steps of the epoch"
    for batch in (batch for step in after for batch in step.batches):
        assert batch.padded <= 2.5 * 16000 or len(batch.ids) == 1
    numbers = [batch.micro_batch for batch in after[0].batches]
    assert len(set(numbers)) == len(numbers), "each piece has dropout of its own"
    again = loader(corpus, limits=LimitState.from_dict(json.loads(json.dumps(asdict(state)))))
    resumed = list(itertools.islice(again.steps(before[0].position), steps + 2))
    assert [[b.ids for b in s.batches] for s in resumed] == [[b.ids for b in s.batches] for s in after]


def test_ranks_make_equally_many_passes_of_divided_parts(corpus) -> None:
    low = Limits(6.0, (4.0,), (), ((2.0,),))
    state = LimitState.begin(Limits(6.0)).lowered(low, 0, 0)
    ranks = [
        list(itertools.islice(loader(corpus, r, 3, even=True, limits=state).steps(Position()), 3)) for r in range(3)
    ]
    whole = ids(itertools.islice(loader(corpus).steps(Position()), 3))
    for step, together in enumerate(zip(*ranks, strict=True)):
        assert len({len(one.batches) + len(one.idle) for one in together}) == 1
        assert sorted(itertools.chain(*(ids([one])[0] for one in together))) == whole[step]


def test_halves_of_a_task_have_numbers_of_their_own() -> None:
    def split(task: Task) -> list[Task]:
        halves = task.halves()
        return [piece for half in halves for piece in split(half)] or [task]

    pieces = split(Task.of(np.arange(13), number=5))
    assert np.concatenate([piece.places for piece in pieces]).tolist() == list(range(13))
    assert len({piece.number for piece in pieces}) == 13


def test_measured_sizes_are_pasted_back(corpus, tmp_path: Path) -> None:
    config = corpus.config("ctc", "filterbank", "batch.limits=[[1.5,3],[3.1,6]]")
    assert config.batch.limits == ((1.5, 3.0), (3.1, 6.0))
