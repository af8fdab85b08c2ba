"""The plan of an epoch, and the loaders and the Lhotse sampler that follow it."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harken.config.schema import BatchConfig, DataConfig
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.dataset import Task, as_it_is
from harken.data.loader import EvalLoader, Position, TrainLoader
from harken.data.manifest import Manifest
from harken.data.plan import make_plan, select
from harken.data.sampler import PlannedSampler

SECONDS = np.random.default_rng(0).lognormal(1.6, 0.7, 3000).clip(0.3, 30).astype(np.float32)
BATCH = BatchConfig(max_seconds=60, seconds_per_step=480)


def plan_of(seed: int = 1, epoch: int = 0, batch: BatchConfig = BATCH, seconds=SECONDS, **options):
    return make_plan(select(seconds, 0.0, 30.0, None), batch, Draws(seed, epoch), **options)


def test_every_cut_occurs_exactly_once() -> None:
    for epoch in range(3):
        plan = plan_of(epoch=epoch)
        assert sorted(plan.order.tolist()) == list(range(len(SECONDS)))
        assert plan.bounds[0] == 0
        assert plan.bounds[-1] == len(SECONDS)
        assert (np.diff(plan.bounds) > 0).all(), "no micro-batch is empty"


def test_steps_are_whole() -> None:
    for per_step in (1, 3, 8, 13):
        plan = plan_of(batch=replace(BATCH, seconds_per_step=60 * per_step))
        assert plan.per_step == per_step
        assert len(plan) == plan.steps * per_step


def test_no_micro_batch_holds_more_than_max_seconds() -> None:
    plan = plan_of()
    padded = [SECONDS[plan[place]].max() * len(plan[place]) for place in range(len(plan))]
    assert max(padded) <= 60
    assert np.mean(padded) > 50, "and they are well filled"


def test_padding_is_small() -> None:
    plan = plan_of()
    pieces = [SECONDS[plan[place]] for place in range(len(plan))]
    padded, real = sum(piece.max() * len(piece) for piece in pieces), sum(piece.sum() for piece in pieces)
    assert 1 - real / padded < 0.05


def test_micro_batches_of_a_step_are_of_similar_durations() -> None:
    """So that no rank waits for another: all come from one bucket."""
    plan = plan_of()
    spreads = []
    for step in range(plan.steps):
        longest = [SECONDS[plan[step * 8 + slot]].max() for slot in range(8)]
        spreads.append(max(longest) / min(longest))
    assert np.median(spreads) < 1.15


def test_a_plan_is_a_pure_function() -> None:
    first, second = plan_of(seed=4, epoch=2), plan_of(seed=4, epoch=2)
    assert np.array_equal(first.order, second.order)
    assert np.array_equal(first.bounds, second.bounds)
    for other in (plan_of(seed=5, epoch=2), plan_of(seed=4, epoch=3)):
        assert not np.array_equal(first.order, other.order)


def test_epochs_mix_cuts_anew() -> None:
    """Not only the order of batches differs between epochs but which cuts share one."""

    def pairs(epoch: int) -> set[tuple[int, int]]:
        plan = plan_of(epoch=epoch)
        return {tuple(sorted(pair)) for place in range(len(plan)) for pair in itertools.pairwise(plan[place].tolist())}

    first, second = pairs(0), pairs(1)
    assert len(first & second) < 0.2 * len(first)


def test_without_shuffling_cuts_come_by_duration() -> None:
    plan = plan_of(shuffle=False)
    assert (np.diff(SECONDS[plan.order]) >= 0).all()


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


# Loaders

SMALL = BatchConfig(max_seconds=6.0, seconds_per_step=24.0)


def random_part(batch: Batch, draws: Draws) -> Batch:
    """Stand for the masks of an objective: drawn for each cut."""
    drawn = [draws.generator("test", cut).random() for cut in batch.ids]
    return replace(batch, targets={"drawn": torch.tensor(drawn)})


def loader(corpus, workers: int, rank: int = 0, world_size: int = 1, **options) -> TrainLoader:
    data = DataConfig(train=str(corpus.train), max_seconds=4.0, workers=workers, crop_seconds=2.0, **options)
    return TrainLoader(data, SMALL, random_part, seed=3, hop=320, rank=rank, world_size=world_size)


FIRST = Position()


def take(loader: TrainLoader, steps: int, start: Position = FIRST) -> list[tuple[list[Batch], Position]]:
    return list(itertools.islice(loader.steps(start), steps))


def assert_same(a: list[list[Batch]], b: list[list[Batch]]) -> None:
    assert len(a) == len(b)
    for first, second in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        assert first.ids == second.ids
        assert first.micro_batch == second.micro_batch
        for x, y in [(first.inputs, second.inputs), (first.starts, second.starts), (first.lengths, second.lengths)]:
            assert torch.equal(x, y)
        assert torch.equal(first.targets["drawn"], second.targets["drawn"])


def test_workers_give_the_same_batches_in_the_same_order(corpus) -> None:
    """Crops, speeds and draws of an objective included, over the end of an epoch."""
    options = {"speed": (0.9, 1.0, 1.1)}
    alone, helped = (take(loader(corpus, workers, **options), 9) for workers in (0, 2))
    assert alone[-1][1].epoch > 0
    assert [position for _, position in alone] == [position for _, position in helped]
    assert_same([batches for batches, _ in alone], [batches for batches, _ in helped])


@pytest.mark.parametrize("done", [1, 5, 7])
def test_a_position_continues_the_stream(corpus, done: int) -> None:
    whole = take(loader(corpus, 0), 9)
    _, position = whole[done - 1]
    rest = take(loader(corpus, 0), 9 - done, position)
    assert_same([batches for batches, _ in whole[done:]], [batches for batches, _ in rest])
    assert whole[-1][1] == rest[-1][1]


def test_an_epoch_ends_where_the_next_begins(corpus) -> None:
    own = loader(corpus, 0)
    steps = own.steps_in(0)
    epoch = take(own, steps)
    assert epoch[-1][1] == Position(1, 0)
    ids = [cut for batches, _ in epoch for batch in batches for cut in batch.ids]
    assert sorted(ids) == [cut.id for cut in Manifest(corpus.train)]


def test_ranks_divide_a_step(corpus) -> None:
    whole = [batches for batches, _ in take(loader(corpus, 0), 4)]
    parts = [[batches for batches, _ in take(loader(corpus, 0, rank, 2), 4)] for rank in range(2)]
    together = [
        sorted([*first, *second], key=lambda batch: batch.micro_batch) for first, second in zip(*parts, strict=True)
    ]
    assert_same(whole, together)


def test_a_number_of_ranks_that_does_not_divide_a_step_is_refused(corpus) -> None:
    with pytest.raises(HarkenError, match="a multiple of the number of processes, got 4 micro-batches and 3 processes"):
        take(loader(corpus, 0, 0, 3), 1)


def test_crops_begin_at_whole_frames(corpus) -> None:
    batches = [batch for step, _ in take(loader(corpus, 0), 8) for batch in step]
    starts = torch.cat([batch.starts for batch in batches])
    assert (starts % 320 == 0).all()
    assert (starts > 0).any()
    assert max(int(batch.lengths.max()) for batch in batches) == 2 * 16000


def with_missing_audio(corpus, path: Path, places: list[int]) -> Path:
    """Copy the training manifest; the files of some of its cuts are not there."""
    lines = [json.loads(line) for line in corpus.train.read_text().splitlines()]
    for place in places:
        lines[place]["recording"]["sources"][0]["source"] = f"/nowhere/{place}.flac"
    path.write_text("".join(json.dumps(data) + "\n" for data in lines))
    return path


def test_a_substitute_is_one_of_the_selection_and_its_batch_does_not_grow(corpus, tmp_path: Path) -> None:
    """Every third cut is missing; the selection leaves half of the cuts out, the longest ones."""
    seconds = np.asarray(Manifest(corpus.train).seconds)
    limit = float(np.median(seconds))
    missing = [place for place in range(len(seconds)) if place % 3 == 0]
    path = with_missing_audio(corpus, tmp_path / "missing.jsonl", missing)
    data = DataConfig(train=str(path), max_seconds=limit, workers=0)
    own = TrainLoader(data, SMALL, random_part, seed=3, hop=320)
    chosen = {f"train-{place:03d}" for place in own.selection.places}
    replaced = 0
    for epoch in range(3):
        plan = make_plan(own.selection, SMALL, Draws(3, epoch))
        for place in range(len(plan)):
            batch = own.dataset[Task(epoch, 0, place, plan[place])]
            replaced += len(batch.notes)
            assert set(batch.ids) <= chosen
            assert batch.padded <= SMALL.max_seconds * 16000
    assert replaced == 3 * len({f"train-{place:03d}" for place in missing} & chosen) > 0


def test_substitutes_are_no_longer_than_the_batch_unless_it_has_room(corpus, tmp_path: Path) -> None:
    """The five shortest cuts are missing."""
    seconds = np.asarray(Manifest(corpus.train).seconds)
    order = np.argsort(seconds, kind="stable")
    path = with_missing_audio(corpus, tmp_path / "missing.jsonl", [int(place) for place in order[:5]])
    own = TrainLoader(DataConfig(train=str(path), workers=0), SMALL, random_part, seed=3, hop=320)
    batch = own.dataset[Task(0, 0, 0, order[[0, 1, 2, 39]])]
    assert len(batch.notes) == 3
    assert int(batch.lengths.max()) == round(float(seconds[order[39]]) * 16000), "it has substitutes enough"
    batch = own.dataset[Task(0, 0, 0, order[:3])]
    assert set(batch.ids) == {f"train-{order[5]:03d}"}, "the next longer one that can be read"
    assert batch.padded <= SMALL.max_seconds * 16000
    with pytest.raises(HarkenError, match="and 2 others drawn in its stead cannot be read either"):
        own.dataset[Task(0, 0, 0, np.repeat(order[:3], 3))]


def test_a_substitute_follows_from_seed_epoch_and_cut(corpus, tmp_path: Path) -> None:
    path = with_missing_audio(corpus, tmp_path / "missing.jsonl", [5])
    data = DataConfig(train=str(path), crop_seconds=1.0, workers=0)

    def substitute(seed: int, epoch: int, batch: list[int]) -> str:
        own = TrainLoader(data, SMALL, random_part, seed=seed, hop=320)
        ids = own.dataset[Task(epoch, 0, 0, np.array(batch))].ids
        return ids[batch.index(5)]

    first = substitute(3, 0, [5, 1, 2])
    assert first == substitute(3, 0, [2, 5, 9]), "of a cropped batch every cut may stand in it"
    others = {substitute(seed, epoch, [5, 1, 2]) for seed in (3, 4) for epoch in range(4)}
    assert len(others) > 2


def test_the_shortest_cut_alone_in_its_batch_has_a_substitute(corpus, tmp_path: Path) -> None:
    seconds = np.asarray(Manifest(corpus.train).seconds)
    shortest = int(np.argmin(seconds))
    path = with_missing_audio(corpus, tmp_path / "missing.jsonl", [shortest])
    own = TrainLoader(DataConfig(train=str(path), workers=0), SMALL, random_part, seed=3, hop=320)
    batch = own.dataset[Task(0, 0, 0, np.array([shortest]))]
    second = int(np.argsort(seconds, kind="stable")[1])
    assert batch.ids == (f"train-{second:03d}",)
    assert batch.notes[0].reason.endswith(f"`train-{second:03d}` took its place")


def test_validation_reads_whole_cuts(corpus) -> None:
    data = DataConfig(train=str(corpus.train), workers=0, crop_seconds=0.5)
    for batch, _ in EvalLoader(str(corpus.valid), data, 6.0, as_it_is):
        assert not batch.starts.any()
        whole = {cut.id: cut.num_samples for cut in Manifest(corpus.valid)}
        assert batch.lengths.tolist() == [whole[cut] for cut in batch.ids]


def test_an_empty_manifest_is_named(corpus, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    said = f"{re.escape(str(empty))} holds no cuts, and at least one is needed: make it anew with `harken data scan`"
    data = DataConfig(train=str(corpus.train), noise=str(empty))
    with pytest.raises(HarkenError, match=said):
        TrainLoader(replace(data, train=str(empty), noise=None), SMALL, random_part, seed=3, hop=320)
    with pytest.raises(HarkenError, match=said):
        TrainLoader(data, SMALL, random_part, seed=3, hop=320)
    with pytest.raises(HarkenError, match=said):
        EvalLoader(str(empty), data, 6.0, as_it_is)


def test_the_evaluation_loader_gives_every_cut_once_over_all_ranks(corpus) -> None:
    data = DataConfig(train=str(corpus.train), workers=0)
    for world_size in (1, 3):
        loaders = [
            EvalLoader(str(corpus.valid), data, 6.0, as_it_is, rank=r, world_size=world_size) for r in range(world_size)
        ]
        turns = [list(own) for own in loaders]
        assert len({len(turn) for turn in turns}) == 1, "ranks stay in step"
        ids = [cut for turn in turns for batch, counts in turn if counts for cut in batch.ids]
        assert sorted(ids) == [cut.id for cut in Manifest(corpus.valid)]


# The sampler


class Ids(torch.utils.data.Dataset):
    """A Lhotse-style dataset: it maps a CutSet to what is learned from."""

    def __getitem__(self, cuts) -> list[str]:
        return [cut.id for cut in cuts]


def sampler(corpus, **options) -> PlannedSampler:
    return PlannedSampler(Manifest(corpus.train), SMALL, seed=3, **options)


def batches_of(sampler: PlannedSampler, workers: int = 0) -> list[list[str]]:
    return list(torch.utils.data.DataLoader(Ids(), batch_size=None, sampler=sampler, num_workers=workers))


def test_the_sampler_is_a_lhotse_sampler_for_a_torch_loader(corpus) -> None:
    from lhotse.dataset.sampling.base import CutSampler

    own = sampler(corpus, rank=0, world_size=1)
    assert isinstance(own, CutSampler)
    batches = batches_of(own, workers=1)
    plan = make_plan(own.selection, SMALL, Draws(3, 0))
    ids = [cut.id for cut in Manifest(corpus.train)]
    assert batches == [[ids[item] for item in plan[place]] for place in range(len(plan))]
    assert batches_of(own) == batches, "an epoch can be repeated"
    own.set_epoch(1)
    assert sorted(itertools.chain(*batches_of(own))) == sorted(ids)
    assert batches_of(own) != batches


def test_ranks_of_the_sampler_share_an_epoch(corpus) -> None:
    whole = batches_of(sampler(corpus, rank=0, world_size=1))
    parts = [batches_of(sampler(corpus, rank=rank, world_size=2)) for rank in range(2)]
    assert [batch for pair in zip(*parts, strict=True) for batch in pair] == whole


def test_the_sampler_continues_from_its_state(corpus) -> None:
    own = sampler(corpus, rank=0, world_size=1)
    own.set_epoch(2)
    stream = iter(own)
    first = [[cut.id for cut in next(stream)] for _ in range(5)]
    state, left = own.state_dict(), own.remaining_cuts
    assert left == own.num_cuts - sum(map(len, first))
    assert 0 < own.remaining_duration < float(np.asarray(Manifest(corpus.train).seconds).sum())
    rest = []
    while (cuts := next(stream, None)) is not None:  # a `for` would begin the epoch anew
        rest.append([cut.id for cut in cuts])
    restored = sampler(corpus, rank=0, world_size=1)
    restored.load_state_dict(state)
    assert batches_of(restored) == rest
    assert sum(map(len, rest)) == left
