"""Mixtures: shares, temperatures, repeats, and orders that do not depend on the neighbours."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from harken.config.schema import BatchConfig, DataConfig
from harken.core.errors import HarkenError
from harken.data.dataset import as_it_is
from harken.data.loader import TrainLoader
from harken.data.manifest import Manifest
from harken.data.mixture import Joined, read_mixture
from harken.data.order import Planner, Position
from harken.data.shares import MixtureOrder, Source

BATCH = BatchConfig(max_seconds=60, seconds_per_step=240)


def source(name: str, cuts: int, share: float, mean: float = 6.0, max_repeats: float = float("inf")) -> Source:
    rng = np.random.default_rng(len(name) + cuts)
    seconds = (mean * rng.lognormal(0, 0.5, cuts)).clip(0.5, 30).astype(np.float32)
    return Source(name, np.arange(cuts), seconds, share, max_repeats)


def mixture(*sources: Source, hours: float = 2.0) -> MixtureOrder:
    return MixtureOrder(list(sources), 3, hours * 3600)


def streams(order: MixtureOrder, segments: int) -> dict[str, list[tuple[int, int]]]:
    """Return (place, pass) of each source in the order in which they are dealt."""
    dealt: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for segment in range(segments):
        pool = order.pool(0, segment)
        for place, turn, number in zip(pool.places, pool.epochs, pool.sources, strict=True):
            dealt[order.sources[number].name].append((int(place), int(turn)))
    return dealt


def test_shares_are_within_a_hundredth_after_ten_thousand_batches() -> None:
    sources = [source("a", 20_000, 0.62), source("b", 900, 0.3, mean=12.0), source("c", 5000, 0.08, mean=2.0)]
    planner = Planner(mixture(*sources, hours=20), BATCH, 3)
    seconds, batches, position = np.zeros(3), 0, Position()
    targets = np.array([0.62, 0.3, 0.08])
    while batches < 10_000:
        pool, plan = planner.segment(position.epoch, position.segment)
        first = position.step * plan.per_step
        rows = np.concatenate([part for slot in range(plan.per_step) for part in plan[first + slot]])
        np.add.at(seconds, pool.sources[rows], pool.seconds[rows])
        batches += plan.per_step
        position = planner.after(position)
        if position.step == 0:
            assert np.abs(seconds / seconds.sum() / targets - 1).max() < 0.01, (
                "relative to each, at the end of a segment"
            )
    assert np.abs(seconds / seconds.sum() - targets).max() < 0.01, "and within one"


def test_a_source_is_read_pass_after_pass() -> None:
    dealt = streams(mixture(source("small", 50, 0.5), source("large", 5000, 0.5)), 3)["small"]
    passes = {turn: [place for place, own in dealt if own == turn] for turn in {own for _, own in dealt}}
    whole = [places for turn, places in sorted(passes.items()) if turn < max(passes)]
    assert len(whole) > 3
    assert all(sorted(places) == list(range(50)) for places in whole), "each pass has every cut once"
    assert len({tuple(places) for places in whole}) == len(whole), "and its own order"


def test_another_source_leaves_the_order_of_the_others_unchanged() -> None:
    two = streams(mixture(source("a", 3000, 0.5), source("b", 700, 0.5)), 4)
    three = streams(mixture(source("a", 3000, 0.3), source("c", 900, 0.5), source("b", 700, 0.2)), 4)
    for name in ("a", "b"):
        shared = min(len(two[name]), len(three[name]))
        assert shared > 500
        assert two[name][:shared] == three[name][:shared]
        assert len(two[name]) != len(three[name]), "only the pace differs"


def test_a_segment_does_not_depend_on_those_before() -> None:
    first, second = (mixture(source("a", 3000, 0.7), source("b", 70, 0.3)) for _ in range(2))
    before = [first.pool(0, segment) for segment in range(6)]
    assert np.array_equal(second.pool(0, 5).places, before[5].places)


def test_a_source_that_is_used_up_leaves_its_share_to_the_others() -> None:
    sources = [source("a", 4000, 0.5), source("b", 1000, 0.5, max_repeats=2)]
    order = mixture(*sources, hours=1.0)
    dealt = streams(order, 16)
    assert len(dealt["b"]) == 2000, "two passes and no more"
    assert sum(order.pool(0, 15).sources == 0) == len(order.pool(0, 15).places)
    seconds = [order.pool(0, segment).seconds.sum() / 3600 for segment in range(16)]
    assert np.allclose(seconds, 1.0, atol=0.1), "segments stay as long"
    assert order.seconds == float("inf")


def test_a_mixture_that_is_used_up_ends_the_run() -> None:
    order = mixture(source("a", 400, 0.5, max_repeats=1), source("b", 100, 0.5, max_repeats=2), hours=0.1)
    total = sum(own.total * own.max_repeats for own in order.sources)
    assert order.seconds == pytest.approx(total)
    last = int(total / 360)
    dealt = streams(order, last + 1)
    assert (len(dealt["a"]), len(dealt["b"])) == (400, 200), "and nothing of it is lost"
    with pytest.raises(HarkenError, match=r"the mixture ends after .* h: every source has been read `max_repeats`"):
        order.pool(0, last + 1)


# Files


@pytest.fixture
def tree(corpus, tmp_path: Path):
    """Write a mixture over the two tiny manifests; return a function that changes it."""

    def write(**changes) -> Path:
        data = {
            "temperature": 0.5,
            "sources": {
                "speech": {"sources": {"read": {"manifest": str(corpus.train)}}},
                "more": {"manifest": str(corpus.valid), "weight": 2.0},
            },
        }
        path = tmp_path / "mixture.yaml"
        path.write_text(yaml.safe_dump({**data, **changes}, sort_keys=False))
        return path

    return write


def test_shares_follow_weights_and_temperatures(corpus, tree) -> None:
    hours = [float(np.asarray(Manifest(path).seconds).sum()) for path in (corpus.train, corpus.valid)]
    for temperature in (0.0, 0.5, 1.0):
        leaves = read_mixture(tree(temperature=temperature))
        sizes = [hours[0] ** temperature, 2 * hours[1] ** temperature]
        assert [leaf.name for leaf in leaves] == ["speech/read", "more"]
        assert [leaf.share for leaf in leaves] == pytest.approx([size / sum(sizes) for size in sizes])


def test_the_loader_reads_a_mixture(corpus, tree) -> None:
    data = DataConfig(train=str(tree()), workers=0)
    batch = BatchConfig(max_seconds=6.0, seconds_per_step=24.0)
    own = TrainLoader(data, batch, as_it_is, seed=3, hop=320)
    assert "a mixture without epochs of\n  speech/read: 64 cuts" in own.describe()
    steps = list(itertools.islice(own.steps(Position()), 6))
    ids = [cut for step in steps for part in step.batches for cut in part.ids]
    assert {cut.split("-")[0] for cut in ids} == {"train", "valid"}
    for step in steps:
        total = sum(part.real for part in step.batches) / 16000
        assert sum(step.sources.values()) == pytest.approx(total, rel=0.01)
    rest = list(itertools.islice(own.steps(steps[2].position), 3))
    assert [part.ids for step in rest for part in step.batches] == [
        part.ids for step in steps[3:] for part in step.batches
    ]


def test_joined_manifests_are_one(corpus) -> None:
    manifests = [Manifest(corpus.train), Manifest(corpus.valid)]
    joined = Joined(Path("x.yaml"), manifests)
    assert len(joined) == len(joined.seconds) == 72
    assert [joined[place].id for place in (0, 63, 64, 71)] == ["train-000", "train-063", "valid-000", "valid-007"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sources": {"a": {"manifest": "none.jsonl"}}}, "no manifest at .*none.jsonl"),
        ({"sources": {"a": {}}}, "source `a`: a source has either a `manifest` or `sources`"),
        ({"sources": {"a": {"sources": {"b": {"manifst": "x"}}}}}, "source `a/b`: unknown key `manifst`; .*`manifest`"),
        ({"sources": {"a": {"manifest": "x", "weight": 0}}}, "source `a`: `a source.weight` must be positive, got 0"),
        ({"temperature": -1.0}, "`a source.temperature` must be at least 0, got -1.0"),
        ({"sources": {"a": 3}}, "source `a` must be a group of keys, got 3"),
    ],
)
def test_mistakes_are_named_with_their_source(tree, changes, said: str) -> None:
    with pytest.raises(HarkenError, match=said):
        read_mixture(tree(**changes))


def test_a_manifest_may_be_named_once(corpus, tree) -> None:
    twice = {name: {"manifest": str(corpus.train)} for name in ("a", "b")}
    with pytest.raises(HarkenError, match=r"`a` and `b` are the same manifest .*: name it once, with the weight"):
        read_mixture(tree(sources=twice))
    with pytest.raises(HarkenError, match=r"no mixture at .*: `data.train` names a manifest"):
        read_mixture("none.yaml")


def test_a_source_without_a_fitting_cut_is_named(corpus, tree) -> None:
    longest = float(np.asarray(Manifest(corpus.train).seconds).max())
    data = DataConfig(train=str(tree()), workers=0, min_seconds=longest, max_seconds=longest)
    with pytest.raises(HarkenError, match=r"`more` of the mixture has no cut between `data.min_seconds`"):
        TrainLoader(data, BATCH, as_it_is, seed=3, hop=320)
