"""Streams: what names one, reading shards, the deal among readers, and positions that continue it."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harken.config.schema import BatchConfig, DataConfig
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.loader import EvalLoader, Step, TrainLoader
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.data.streams.batches import bucketed
from harken.data.streams.convert import convert
from harken.data.streams.deal import StreamPosition
from harken.data.streams.loader import StreamLoader
from harken.data.streams.read import Lost, read_shard
from harken.data.streams.shards import Shard, find_shards, is_stream

SMALL = BatchConfig(max_seconds=6.0, seconds_per_step=24.0)
SEED = 3


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> dict[str, Path]:
    """The training corpus in 7 shards of at most 10 cuts, of each kind."""
    folder = tmp_path_factory.mktemp("shards")
    for kind in ("shar", "webdataset"):
        convert(str(corpus.train), folder / kind, kind, shard_cuts=10, shuffle=1, jobs=1)
    return {kind: folder / kind for kind in ("shar", "webdataset")}


def random_part(batch: Batch, draws) -> Batch:
    """Stand for the masks of an objective: drawn for each cut."""
    drawn = [own.generator("test", cut).random() for cut, own in zip(batch.ids, draws, strict=True)]
    return replace(batch, targets={"drawn": torch.tensor(drawn, dtype=torch.float64)})


def loader(train: str | Path, workers: int = 0, rank: int = 0, world_size: int = 1, **options) -> StreamLoader:
    even = options.pop("even_passes", False)
    data = DataConfig(train=str(train), workers=workers, **{"max_seconds": 4.0, **options})
    return StreamLoader(
        data, SMALL, random_part, seed=SEED, hop=320, rank=rank, world_size=world_size, even_passes=even
    )


def take(own: StreamLoader, steps: int, saved: dict | None = None) -> list[Step]:
    return list(itertools.islice(own.steps(own.restore(saved or {})[0]), steps))


def batches_in(steps: Iterable[Step]) -> list[Batch]:
    return [batch for step in steps for batch in step.batches]


def readings(batches: Iterable[Batch], epochs: int = 40) -> Counter[tuple[int, str]]:
    """Return how often each cut was read in which epoch: its draw tells."""
    found: Counter[tuple[int, str]] = Counter()
    for batch in batches:
        for cut, drawn in zip(batch.ids, batch.targets["drawn"].tolist(), strict=True):
            epoch = next(e for e in range(epochs) if Draws(SEED, e).generator("test", cut).random() == drawn)
            found[epoch, cut] += 1
    return found


def saved_by(steps: list[Step]) -> dict:
    """Return what a checkpoint holds of a position, as it comes out of its JSON."""
    return json.loads(json.dumps(asdict(steps[-1].position)))


# What names a stream


def test_what_a_text_names(shards, tmp_path: Path) -> None:
    shar, tars = shards["shar"], shards["webdataset"]
    whole = find_shards(str(tars))
    assert [Path(shard.audio).name for shard in whole] == [f"shard-{n:06d}.tar" for n in range(7)]
    assert find_shards(f"{tars}/shard-{{000000..000006}}.tar") == whole
    both = find_shards(f"{shar}/cuts.{{000000..000006}}.jsonl.gz")
    assert both == find_shards(str(shar))
    assert both[2] == Shard(f"{shar}/recording.000002.tar", f"{shar}/cuts.000002.jsonl.gz")
    assert find_shards(f"{shar}::{tars}") == both + whole
    listed = tmp_path / "shards.txt"
    listed.write_text(f"# two\n{tars}/shard-00000{{1,3}}.tar\n\npipe:cat x/cuts.000000.jsonl.gz\n")
    assert find_shards(str(listed)) == [
        whole[1],
        whole[3],
        Shard("pipe:cat x/recording.000000.tar", "pipe:cat x/cuts.000000.jsonl.gz"),
    ]
    assert [shard.remote for shard in find_shards(str(listed))] == [False, False, True]
    assert is_stream("https://host/a.tar")
    assert not is_stream("data/train.jsonl")
    assert not is_stream("data/cuts.train.jsonl")


def test_what_names_nothing_is_refused(shards, corpus, tmp_path: Path) -> None:
    tars, empty = shards["webdataset"], tmp_path / "empty"
    empty.mkdir()
    cases = {
        str(empty): f"the folder {empty} must hold Lhotse Shar (`cuts.000000.jsonl.gz` and `recording.000000.tar`) or "
        "WebDataset (`*.tar`), and holds neither; of audio files `harken data scan` makes a manifest",
        f"{tars}/shard-{{000005..000009}}.tar": f"lacks {tars}/shard-000007.tar and 2 more of 5 files: copy it again",
        f"{tars}::{tars}/shard-000000.tar": f"`{tars}/shard-000000.tar` occurs twice in the stream",
        f"{tars}::{corpus.train}": f"`{corpus.train}` of the stream `{tars}::{corpus.train}` must be a tar (",
        f"{tmp_path}/none.txt": f"no list of shards at {tmp_path}/none.txt",
        f"{tars}/shard-{{0..1.tar": "cannot be expanded",
    }
    for text, said in cases.items():
        assert is_stream(text)
        with pytest.raises(HarkenError) as error:
            find_shards(text)
        assert said in str(error.value)
    with pytest.raises(HarkenError, match="is a stream, and what is read whole and by duration must be an indexed"):
        EvalLoader(str(tars), DataConfig(train=str(corpus.train), workers=0), 6.0, random_part)


# Reading


@pytest.mark.parametrize("kind", ["shar", "webdataset"])
@pytest.mark.parametrize("how", ["folder", "pipe", "gzip"])
def test_a_shard_gives_the_audio_of_the_manifest(shards, corpus, kind: str, how: str, tmp_path: Path) -> None:
    text = str(shards[kind])
    if how == "pipe":
        names = {"shar": "cuts.00000{0..6}.jsonl.gz", "webdataset": "shard-00000{0..6}.tar"}
        text = f"pipe:cat {text}/{names[kind]}"
    if how == "gzip":  # packed where it is a plain tar, unpacked where it is a packed list of cuts
        for path in shards[kind].iterdir():
            content = path.read_bytes()
            if kind == "webdataset":
                (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                packed = path.suffix == ".gz"
                (tmp_path / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(content) if packed else content)
        text = str(tmp_path)
    cuts = {cut.id: cut for shard in find_shards(text) for cut in read_shard(shard)}
    manifest = Manifest(corpus.train)
    assert sorted(cuts) == [cut.id for cut in manifest]
    for cut in manifest:
        assert np.array_equal(read_cut(cuts[cut.id], 16000), read_cut(cut, 16000))
        assert cuts[cut.id].supervisions == cut.supervisions


def test_a_foreign_tar_needs_audio_and_nothing_else(corpus, tmp_path: Path) -> None:
    audio = Manifest(corpus.train)[0].recording.sources[0].source
    (tmp_path / "about.json").write_text('{"text": "ab cd", "speaker": "ann"}')
    (tmp_path / "words.txt").write_text("only words\n")
    # the audio itself twice: where another test has linked the file, tar would write a link in its place
    with tarfile.open(tmp_path / "a.tar", "w", dereference=True) as tar:
        tar.add(audio, "x/one.flac")
        tar.add(tmp_path / "about.json", "x/one.json")
        tar.add(audio, "x/two.flac")
        tar.add(tmp_path / "words.txt", "x/two.txt")
    one, two = read_shard(Shard(str(tmp_path / "a.tar")))
    assert (one.id, one.supervisions[0].text, one.supervisions[0].speaker) == ("x/one", "ab cd", "ann")
    assert (two.id, two.supervisions[0].text) == ("x/two", "only words")
    assert np.array_equal(read_cut(two, 16000), read_cut(Manifest(corpus.train)[0], 16000))
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "words.txt", "x.data")
    with pytest.raises(HarkenError, match=r"must have one file of audio .* got `.data`; Lhotse's pickled cuts are not"):
        list(read_shard(Shard(str(tmp_path / "b.tar"))))


def cut_off(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share) // 512 * 512)


@pytest.mark.parametrize("kind", ["shar", "webdataset"])
def test_a_tar_that_breaks_off_names_every_cut_that_is_lost(shards, kind: str, tmp_path: Path) -> None:
    shutil.copytree(shards[kind], tmp_path / "s")
    shard = find_shards(f"{tmp_path}/s")[2]
    whole = [cut.id for cut in read_shard(shard)]
    cut_off(Path(shard.audio), 0.5)
    items = list(read_shard(shard))
    sound = [item.id for item in items if not isinstance(item, Lost)]
    lost = [item for item in items if isinstance(item, Lost)]
    assert sound == whole[: len(sound)]
    assert 0 < len(sound) < len(whole)
    assert len(lost) == len(whole) - len(sound)
    if kind == "shar":
        assert [item.id for item in lost] == whole[len(sound) :]
    assert lost[0].reason.startswith(f"shard {shard.audio} breaks off after {len(sound)} cuts: ")


def test_a_tar_that_ends_between_two_samples_is_no_whole_one(shards, tmp_path: Path) -> None:
    """Python's tarfile takes it for whole; one that another program wrote does not say how many samples it has."""
    source = find_shards(str(shards["webdataset"]))[0].audio
    path = tmp_path / "foreign.tar"
    with tarfile.open(source) as tar, tarfile.open(path, "w") as out:
        for member in tar:
            if not member.name.endswith(".json"):
                out.addfile(member, tar.extractfile(member))
    with tarfile.open(path) as tar:
        ends = tar.getmembers()[4].offset
    os.truncate(path, ends)
    items = list(read_shard(Shard(str(path))))
    assert [isinstance(item, Lost) for item in items] == [False] * 4 + [True]
    assert items[4].reason == f"shard {path} breaks off after 4 cuts: unexpected end of data"


def test_a_command_is_asked_again_and_goes_on_where_it_broke(shards, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    source = find_shards(str(shards["webdataset"]))[0].audio
    half = Path(source).stat().st_size // 2
    # the first time half of it, then all
    text = (
        f"pipe:if [ -e {tmp_path}/x ]; then cat {source}; else touch {tmp_path}/x; head -c {half} {source}; exit 1; fi"
    )
    assert [item.id for item in read_shard(Shard(text))] == [item.id for item in read_shard(Shard(source))]
    text = f"pipe:head -c {half} {source}; exec >&-; sleep 0.3; exit 3"  # the end of the data, then that of the command
    lost = [item for item in read_shard(Shard(text)) if isinstance(item, Lost)]
    assert lost
    assert lost[0].reason.endswith(": its command ended with status 3")
    with pytest.raises(HarkenError, match=r"nothing comes from the shard pipe:cat /nowhere in 3 tries: "):
        list(read_shard(Shard("pipe:cat /nowhere")))


# Batches


def test_no_batch_is_larger_than_it_may_be(corpus) -> None:
    """Lhotse's own limit is broken where the last cut drawn is the longest, and its sampler loses cuts at the end."""
    from lhotse import CutSet

    cuts = [cut for turn in range(5) for cut in CutSet.from_file(corpus.train).modify_ids(lambda i, t=turn: f"{i}{t}")]
    batches = list(bucketed(cuts, 12.0, 2.5, seed=1))
    assert sorted(cut.id for batch in batches for cut in batch) == sorted(cut.id for cut in cuts)
    padded = [len(batch) * min(2.5, max(cut.duration for cut in batch)) for batch in batches]
    assert max(padded) <= 12.0
    assert sum(min(cut.duration, 2.5) for cut in cuts) / (12.0 * len(batches)) > 0.75
    assert [[c.id for c in b] for b in bucketed(cuts, 12.0, 2.5, seed=1)] == [[c.id for c in b] for b in batches]
    assert [[c.id for c in b] for b in bucketed(cuts, 12.0, 2.5, seed=2)] != [[c.id for c in b] for b in batches]
    assert [len(batch) for batch in bucketed(cuts[:1], 12.0, 2.5, seed=1)] == [1]


# The deal


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_cut_comes_once_an_epoch(shards, corpus, world_size: int, workers: int) -> None:
    """7 shards over 1 to 12 readers: where there are more readers than shards, epochs overlap and none is left out."""
    kind = "shar" if workers == 1 else "webdataset"
    steps = 24 // world_size + 4
    ranks = [loader(shards[kind], workers, rank, world_size) for rank in range(world_size)]
    shares = [take(own, steps) for own in ranks]
    assert {len(step.batches) for share in shares for step in share} == {4 // world_size}
    slots = [sorted(b.micro_batch for share in shares for b in share[n].batches) for n in range(steps)]
    assert slots == [[0, 1, 2, 3]] * steps
    found = readings(batch for share in shares for batch in batches_in(share))
    assert set(found.values()) == {1}, "none twice in an epoch"
    done = [len([cut for epoch, cut in found if epoch == number]) for number in range(3)]
    # epochs that all readers have left are whole
    finished = min(own.restore(saved_by(share))[0].epoch for own, share in zip(ranks, shares, strict=True))
    if world_size == 1:
        assert finished >= 1
        assert done[:finished] == [len(Manifest(corpus.train))] * finished


def test_workers_and_a_cropped_cut_change_no_draw(shards, corpus) -> None:
    data = DataConfig(train=str(corpus.train), workers=0, max_seconds=4.0, crop_seconds=1.0)
    manifest = TrainLoader(data, SMALL, random_part, seed=SEED, hop=320)
    steps = itertools.islice(manifest.steps(manifest.restore({})[0]), int(manifest.planner.steps(0)))
    rows = {
        cut: (batch.starts[row], batch.inputs[row][: batch.lengths[row]])
        for b in [batches_in(steps)]
        for batch in b
        for row, cut in enumerate(batch.ids)
    }
    compared = 0
    for batch in batches_in(take(loader(shards["shar"], 2, crop_seconds=1.0), 3)):
        for row, cut in enumerate(batch.ids):
            if Draws(SEED, 0).generator("test", cut).random() == float(batch.targets["drawn"][row]):
                assert batch.starts[row] == rows[cut][0]
                assert torch.equal(batch.inputs[row][: batch.lengths[row]], rows[cut][1])
                compared += 1
    assert compared > 20


def test_shards_come_in_another_order_in_each_epoch(shards) -> None:
    own = loader(shards["shar"])
    orders = [[own.dataset.epochs[7 * epoch + place].shard for place in range(7)] for epoch in range(5)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(map(tuple, orders))) > 3
    assert [own.dataset.epochs[item].epoch for item in (0, 6, 7, 13, 14)] == [0, 0, 1, 1, 2]


def test_fewer_shards_than_readers_is_said(shards) -> None:
    text = loader(shards["shar"], workers=4, world_size=2).describe()
    assert text.startswith(
        "7 shards (Lhotse Shar) for 8 readers\nWARNING with fewer shards than readers, several epochs"
    )
    assert "WARNING" not in loader(shards["shar"], workers=7).describe()


@pytest.mark.parametrize("even", [True, False])
def test_a_rank_with_nothing_to_learn_idles_with_what_it_learns_next(shards, even: bool) -> None:
    """Six ranks and four micro-batches: each rank is without one in turn."""
    shares = [take(loader(shards["shar"], 0, rank, 6, even_passes=even), 6) for rank in range(6)]
    for number in range(6):
        assert sum(len(share[number].batches) for share in shares) == 4
        assert all(len(share[number].batches) + len(share[number].idle) == 1 for share in shares)
    for share in shares:
        assert len(batches_in(share)) == 4
        for step, following in itertools.pairwise(share):
            if step.idle and following.batches:
                assert step.idle[0].ids == following.batches[0].ids
    three = [take(loader(shards["shar"], 0, rank, 3, even_passes=even), 3) for rank in range(3)]
    passes = {len(share[0].batches) + len(share[0].idle) for share in three}
    assert passes == ({2} if even else {1, 2})


# Positions


def assert_same(a: list[Step], b: list[Step]) -> None:
    assert [step.position for step in a] == [step.position for step in b]
    for first, second in zip(batches_in(a), batches_in(b), strict=True):
        assert (first.ids, first.micro_batch) == (second.ids, second.micro_batch)
        assert torch.equal(first.inputs, second.inputs)
        assert torch.equal(first.targets["drawn"], second.targets["drawn"])


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("done", [1, 4, 9])
def test_the_same_readers_go_on_exactly(shards, workers: int, done: int) -> None:
    """Over the ends of shards and of an epoch; four micro-batches of a step for three workers, whose turns so shift."""
    whole = take(loader(shards["webdataset"], workers), 12)
    assert whole[-1].position.epoch > 0 or workers
    own = loader(shards["webdataset"], workers)
    saved = saved_by(whole[:done])
    _, said = own.restore(saved)
    assert said.startswith(f"the stream goes on exactly where its {max(1, workers)} readers were, ")
    assert_same(whole[done:], take(own, 12 - done, saved))


def test_another_number_of_readers_reads_begun_shards_again_and_loses_none(shards, corpus) -> None:
    first = take(loader(shards["shar"], 3), 4)
    own = loader(shards["shar"], 0)
    position, said = own.restore(saved_by(first))
    assert position.readers == 1
    assert said.startswith("WARNING 3 readers before and 1 now: the ")
    assert "shards that were begun are read again from their beginning" in said
    rest = list(itertools.islice(own.steps(position), 8))
    found = readings(batches_in([*first, *rest]))
    assert len({cut for epoch, cut in found if epoch == 0}) == len(Manifest(corpus.train)), "none is left out"
    twice = sum(count > 1 for count in found.values())
    assert 0 < twice <= 3 * 10, "of the shards that were begun alone"
    again, _ = loader(shards["shar"], 2).restore(saved_by(rest))
    assert again.readers == 2


def test_what_an_older_deal_left_is_dealt_on(shards) -> None:
    """Dealt to 3, 5, 2 and 4 readers in turn, every item is finished by one reader, once."""
    position, finished = StreamPosition(turns=(0, 0, 0), batches=(0, 0, 0)), []
    rng = np.random.default_rng(0)
    for readers in (3, 5, 2, 4):
        position = position.dealt_to(readers)
        turns = rng.integers(0, 5, readers).tolist()
        finished += [position.item(reader, turn) for reader in range(readers) for turn in range(turns[reader])]
        position = replace(position, turns=tuple(turns))
    assert len(set(finished)) == len(finished) > 20
    last = position.dealt_to(1)
    following = [last.item(0, turn) for turn in range(200)]
    assert sorted([*finished, *following]) == list(range(len(finished) + 200))


def test_other_shards_batches_or_a_manifest_are_told(shards, corpus, tmp_path: Path) -> None:
    saved = saved_by(take(loader(shards["shar"]), 5))
    _, said = loader(shards["webdataset"]).restore(saved)
    assert said.startswith("WARNING the stream has other shards than before: epoch 0 begins anew with all of them")
    _, said = loader(shards["shar"], crop_seconds=1.0).restore(saved)
    assert said.startswith(
        "WARNING batches are made otherwise than before: the 1 shards that were begun are read again"
    )
    shutil.copytree(shards["shar"], tmp_path / "moved")
    assert loader(tmp_path / "moved").restore(saved)[1].startswith("the stream goes on exactly")
    position, said = loader(shards["shar"]).restore({"epoch": 2, "segment": 0, "step": 3})
    assert (position.item(0, 0), said) == (
        14,
        "WARNING the run read a manifest before: it begins the stream with epoch 2",
    )
    data = DataConfig(train=str(corpus.train), workers=0)
    manifest, said = TrainLoader(data, SMALL, random_part, seed=SEED, hop=320).restore(saved)
    assert (manifest.step, said) == (0, "WARNING the run read a stream before: it begins the manifest with epoch 0")


# What cannot be read


def test_what_cannot_be_read_is_noted_and_left_out(shards, corpus, tmp_path: Path) -> None:
    shutil.copytree(shards["webdataset"], tmp_path / "s")
    broken = find_shards(f"{tmp_path}/s")[3]
    cut_off(Path(broken.audio), 0.6)
    steps = take(loader(tmp_path / "s"), 10)
    notes = [note for batch in batches_in(steps) for note in batch.notes]
    assert {note.kind for note in notes} == {"unreadable"}
    seen = {cut for _, cut in readings(batches_in(steps))}
    lost = {note.cut for note in notes}
    assert len(lost) == len(Manifest(corpus.train)) - len(seen) > 0


def test_audio_that_cannot_be_decoded_is_left_out_of_its_batch(shards, tmp_path: Path) -> None:
    path = tmp_path / "damaged.tar"
    with tarfile.open(find_shards(str(shards["webdataset"]))[0].audio) as tar, tarfile.open(path, "w") as out:
        for number, member in enumerate(tar):
            content = tar.extractfile(member).read()
            if number == 4:
                content = content[:42] + bytes(len(content) - 42)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    steps = take(loader(path), 3)
    notes = {note.cut: note for batch in batches_in(steps) for note in batch.notes}
    assert len(notes) == 1
    (name,) = notes
    assert notes[name].kind == "unreadable"
    assert notes[name].reason.startswith(f"cut `{name}` (")
    assert name not in {cut for batch in batches_in(steps) for cut in batch.ids}


def test_lengths_that_are_left_out_are_counted(shards) -> None:
    steps = take(loader(shards["shar"], min_seconds=1.0, max_seconds=2.0), 6)
    rates = [length / 16000 for batch in batches_in(steps) for length in batch.lengths.tolist()]
    assert min(rates) >= 1.0
    assert max(rates) <= 2.0
    notes = {
        note.cut: note.reason for batch in batches_in(steps) for note in batch.notes if note.kind == "of another length"
    }
    shard = find_shards(str(shards["shar"]))[0]
    assert str(shard) in notes
    assert "cuts of shard" in notes[str(shard)]
    with pytest.raises(
        HarkenError, match=r"none of 7 shards of `.*` has a cut that can be trained on; the first: 10 of"
    ):
        take(loader(shards["shar"], min_seconds=3.5), 1)
    with pytest.raises(HarkenError, match="has a cut that can be trained on"):
        take(loader(shards["shar"], 2, min_seconds=3.5), 1)
