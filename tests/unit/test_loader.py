"""The loaders and the Lhotse sampler that follow the plan."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harken.config.schema import BatchConfig, DataConfig
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.data import reader
from harken.data.dataset import Task, as_it_is
from harken.data.loader import EvalLoader, Step, TrainLoader, share_of
from harken.data.manifest import Manifest
from harken.data.order import Position
from harken.data.plan import make_plan
from harken.data.sampler import PlannedSampler

SMALL = BatchConfig(max_seconds=6.0, seconds_per_step=24.0)


def random_part(batch: Batch, draws) -> Batch:
    """Stand for the masks of an objective: drawn for each cut."""
    drawn = [own.generator("test", cut).random() for cut, own in zip(batch.ids, draws, strict=True)]
    return replace(batch, targets={"drawn": torch.tensor(drawn)})


def loader(corpus, workers: int, rank: int = 0, world_size: int = 1, **options) -> TrainLoader:
    data = DataConfig(train=str(corpus.train), max_seconds=4.0, workers=workers, crop_seconds=2.0, **options)
    return TrainLoader(data, SMALL, random_part, seed=3, hop=320, rank=rank, world_size=world_size)


FIRST = Position()


def take(loader: TrainLoader, steps: int, start: Position = FIRST) -> list[Step]:
    return list(itertools.islice(loader.steps(start), steps))


def batches_in(steps: Iterable[Step]) -> list[Batch]:
    return [batch for step in steps for batch in step.batches]


def assert_same(a: list[Step], b: list[Step]) -> None:
    assert [step.position for step in a] == [step.position for step in b]
    for first, second in zip(batches_in(a), batches_in(b), strict=True):
        assert first.ids == second.ids
        assert first.micro_batch == second.micro_batch
        for x, y in [(first.inputs, second.inputs), (first.starts, second.starts), (first.lengths, second.lengths)]:
            assert torch.equal(x, y)
        assert torch.equal(first.targets["drawn"], second.targets["drawn"])


def test_workers_give_the_same_batches_in_the_same_order(corpus) -> None:
    """Crops, speeds and draws of an objective included, over the end of an epoch."""
    options = {"speed": (0.9, 1.0, 1.1)}
    alone, helped = (take(loader(corpus, workers, **options), 9) for workers in (0, 2))
    assert alone[-1].position.epoch > 0
    assert_same(alone, helped)


@pytest.mark.parametrize("starts", [2, 1])
def test_workers_that_never_begin_are_started_anew(
    starts: int, corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a child does that hangs in its fork; when that goes on the run ends."""
    start = reader._start_worker

    def hang(begun, worker: int) -> None:
        if worker == 1 and not list(tmp_path.glob("hung-*")):
            (tmp_path / f"hung-{os.getpid()}").touch()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        start(begun, worker)

    expected = take(loader(corpus, 2), 3)
    monkeypatch.setattr(reader, "_start_worker", hang)
    monkeypatch.setattr(reader, "SECONDS_TO_BEGIN", 2.0)
    monkeypatch.setattr(reader, "STARTS", starts)
    if starts > 1:
        assert_same(take(loader(corpus, 2), 3), expected)
    else:
        with pytest.raises(HarkenError, match="must begin within 2 s, and 1 times one did not"):
            take(loader(corpus, 2), 3)
    assert capfd.readouterr().out.count("has not begun in 2 s: starting them anew") == 1
    for path in tmp_path.glob("hung-*"):
        assert not Path(f"/proc/{path.name.removeprefix('hung-')}/cmdline").exists()


@pytest.mark.parametrize("done", [1, 5, 7])
def test_a_position_continues_the_stream(corpus, done: int) -> None:
    whole = take(loader(corpus, 0), 9)
    rest = take(loader(corpus, 0), 9 - done, whole[done - 1].position)
    assert_same(whole[done:], rest)


def test_an_epoch_ends_where_the_next_begins(corpus) -> None:
    own = loader(corpus, 0)
    epoch = take(own, int(own.planner.steps(0)))
    assert epoch[-1].position == Position(1)
    assert f"{len(epoch)} steps an epoch" in own.describe()
    ids = [cut for batch in batches_in(epoch) for cut in batch.ids]
    assert sorted(ids) == [cut.id for cut in Manifest(corpus.train)]


def test_ranks_divide_a_step(corpus) -> None:
    """Three ranks divide four micro-batches, too."""
    whole = take(loader(corpus, 0), 4)
    for world_size in (2, 3, 4):
        shares = [take(loader(corpus, 0, rank, world_size), 4) for rank in range(world_size)]
        together = [
            Step(sorted(batches_in(step), key=lambda batch: batch.micro_batch), step[0].position)
            for step in zip(*shares, strict=True)
        ]
        assert_same(whole, together)


@pytest.mark.parametrize("even", [True, False])
def test_ranks_without_enough_to_do_idle(even: bool) -> None:
    """Every rank makes a pass; where the engine communicates in each, all make equally many; nothing counts twice."""
    seconds = np.random.default_rng(0).lognormal(1.6, 0.7, 400).clip(0.3, 30).astype(np.float32)
    plan = make_plan(seconds, BatchConfig(max_seconds=40, seconds_per_step=200), np.random.default_rng(0))
    assert len(set(np.diff(plan.bounds).tolist())) == 2, "micro-batches of one part and of two"
    idled = 0
    for step in range(plan.steps):
        for world_size in (1, 2, 3, 5, 8):
            shares = [share_of(plan, step, rank, world_size, even=even) for rank in range(world_size)]
            begin, end = plan.bounds[step * 5], plan.bounds[(step + 1) * 5]
            assert sorted(itertools.chain(*(share.parts for share in shares))) == list(range(begin, end))
            passes = {len(share.parts) + len(share.idle) for share in shares}
            assert min(passes) > 0
            assert len(passes) == 1 or not even
            assert all(begin <= part < end for share in shares for part in share.idle)
            idled += sum(len(share.idle) for share in shares)
    assert idled > 0


def test_an_idle_rank_reads_what_it_idles_with(corpus) -> None:
    data = DataConfig(train=str(corpus.train), max_seconds=4.0, workers=0)
    step = next(TrainLoader(data, SMALL, random_part, seed=3, hop=320, rank=5, world_size=6).steps(Position()))
    assert (len(step.batches), len(step.idle)) == (0, 1)


def test_crops_begin_at_whole_frames(corpus) -> None:
    batches = batches_in(take(loader(corpus, 0), 8))
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
        pool, plan = own.planner.segment(epoch, 0)
        for number in range(len(plan.parts) - 1):
            rows = plan.part(number)
            batch = own.dataset[Task(pool.places[rows], pool.epochs[rows], number)]
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
    batch = own.dataset[Task.of(order[[0, 1, 2, 39]])]
    assert len(batch.notes) == 3
    assert int(batch.lengths.max()) == round(float(seconds[order[39]]) * 16000), "it has substitutes enough"
    batch = own.dataset[Task.of(order[:3])]
    assert set(batch.ids) == {f"train-{order[5]:03d}"}, "the next longer one that can be read"
    assert batch.padded <= SMALL.max_seconds * 16000
    with pytest.raises(HarkenError, match="and 2 others drawn in its stead cannot be read either"):
        own.dataset[Task.of(np.repeat(order[:3], 3))]


def test_a_substitute_follows_from_seed_epoch_and_cut(corpus, tmp_path: Path) -> None:
    path = with_missing_audio(corpus, tmp_path / "missing.jsonl", [5])
    data = DataConfig(train=str(path), crop_seconds=1.0, workers=0)

    def substitute(seed: int, epoch: int, batch: list[int]) -> str:
        own = TrainLoader(data, SMALL, random_part, seed=seed, hop=320)
        ids = own.dataset[Task.of(np.array(batch), epoch)].ids
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
    batch = own.dataset[Task.of(np.array([shortest]))]
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
    pool, plan = own.planner.segment(0, 0)
    ids = [cut.id for cut in Manifest(corpus.train)]
    assert batches == [[ids[pool.places[row]] for row in plan.part(place)] for place in range(len(plan))]
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


def test_a_batch_travels_as_one_piece_of_memory_and_arrives_as_it_was() -> None:
    batch = Batch(
        ids=("a", "b"),
        inputs=torch.randn(2, 7),
        lengths=torch.tensor([7, 5]),
        targets={
            "mask": torch.tensor([[True, False, True]]),
            "labels": torch.arange(3, dtype=torch.int32)[:, None],
            "none": torch.zeros(0, 4, dtype=torch.int64),
            "turned": torch.arange(6.0).view(2, 3).T,
        },
        starts=torch.tensor([0, 3]),
        num_targets=2.5,
    )
    found = pickle.loads(pickle.dumps(batch))
    assert found.ids == batch.ids
    assert found.num_targets == 2.5
    assert found.targets.keys() == batch.targets.keys()
    for name in ("inputs", "lengths", "starts"):
        assert torch.equal(getattr(found, name), getattr(batch, name)), name
    for name, value in batch.targets.items():
        assert torch.equal(found.targets[name], value), name
        assert found.targets[name].dtype is value.dtype, name
    tensors = [found.inputs, found.lengths, found.starts, *found.targets.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
