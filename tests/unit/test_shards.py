"""`harken data shards`: manifests, Lhotse Shar and WebDataset become each other without a changed sample."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from harken.apps.main import main
from harken.core.errors import HarkenError
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.data.streams import convert as module
from harken.data.streams.convert import convert, divide
from harken.data.streams.shards import find_shards


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_equal_corpora(found: Manifest, expected: Manifest) -> None:
    """Same ids in any order, same samples, same words, and the very bytes of the files."""
    cuts = {cut.id: cut for cut in found}
    assert sorted(cuts) == sorted(cut.id for cut in expected)
    for cut in expected:
        again = cuts[cut.id]
        assert np.array_equal(read_cut(again, 16000), read_cut(cut, 16000))
        assert (again.supervisions, again.duration) == (cut.supervisions, cut.duration)
        files = [Path(item.recording.sources[0].source) for item in (again, cut)]
        assert files[0] != files[1]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_round_trips_keep_every_byte_of_audio(corpus, tmp_path: Path, capsys) -> None:
    """Manifest to Shar, to WebDataset, to Shar, to a manifest; in other numbers of cuts each time."""
    steps = [
        (corpus.train, "a", ["--shard-cuts", "10", "--shuffle", "3"], 7),
        (tmp_path / "a", "b", ["--to", "webdataset", "--shard-megabytes", "0.3"], None),
        (tmp_path / "b", "c", ["--to", "shar", "--shard-cuts", "64"], 1),
        (tmp_path / "c", "d.jsonl", [], 1),
    ]
    for source, name, options, count in steps:
        assert main(["data", "shards", str(source), "--out", str(tmp_path / name), "--jobs", "1", *options]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{tmp_path / name}: 64 cuts, ")
        if count is not None:
            assert said.endswith(f"in {count} shards, read again and compared\n")
    tars = [path.stat().st_size for path in (tmp_path / "b").iterdir()]
    assert len(tars) > 3
    assert max(tars) < 0.4e6
    assert_equal_corpora(Manifest(tmp_path / "d.jsonl"), Manifest(corpus.train))
    order = [cut.id for cut in Manifest(tmp_path / "d.jsonl")]
    assert order != sorted(order), "shuffled"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d.audio", "d.jsonl", "d.jsonl.idx"]


def test_lhotse_and_webdataset_read_what_is_written(corpus, tmp_path: Path) -> None:
    import webdataset
    from lhotse import CutSet

    convert(str(corpus.train), tmp_path / "shar", "shar", shard_cuts=20, jobs=2)
    convert(str(corpus.train), tmp_path / "wds", "webdataset", shard_cuts=20, jobs=2)
    manifest = {cut.id: cut for cut in Manifest(corpus.train)}
    found = {cut.id: cut.load_audio()[0] for cut in CutSet.from_shar(in_dir=tmp_path / "shar")}
    assert found.keys() == manifest.keys()
    assert all(np.array_equal(found[name], read_cut(cut, 16000)) for name, cut in manifest.items())
    samples = list(
        webdataset.WebDataset([shard.audio for shard in find_shards(str(tmp_path / "wds"))], shardshuffle=False)
    )
    about = [json.loads(sample["json"]) for sample in samples]
    assert [row["id"] for row in about] == list(manifest)
    assert [row["text"] for row in about] == [cut.supervisions[0].text for cut in manifest.values()]
    assert samples[5]["flac"] == Path(manifest[about[5]["id"]].recording.sources[0].source).read_bytes()


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_segments_of_a_file_are_exact(tmp_path: Path, subtype: str) -> None:
    from lhotse import CutSet, Recording

    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (48000, 2))
    soundfile.write(tmp_path / "long.wav", samples, 16000, subtype=subtype)
    cut = Recording.from_file(tmp_path / "long.wav", recording_id="long").to_cut()
    parts = [cut.truncate(offset=start, duration=1.25).with_id(f"part.{start}").with_channels(1) for start in (0, 0.5)]
    parts = [part for part in parts if part is not None]
    CutSet.from_cuts(parts).to_jsonl(tmp_path / "parts.jsonl")
    convert(str(tmp_path / "parts.jsonl"), tmp_path / "shar", "shar", jobs=1)
    convert(str(tmp_path / "shar"), tmp_path / "back.jsonl", "manifest", jobs=1)
    for before, after in zip(Manifest(tmp_path / "parts.jsonl"), Manifest(tmp_path / "back.jsonl"), strict=True):
        assert before.id == after.id
        assert np.array_equal(read_cut(before, 16000), read_cut(after, 16000))
        assert len(read_cut(after, 16000)) == 20000


def test_what_was_interrupted_goes_on(corpus, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "wds"
    write = module.write_part

    def killed(kind, folder, number, *rest):
        if number == 4:
            (folder / ".shard-000004.tar.1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(kind, folder, number, *rest)

    monkeypatch.setattr(module, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(str(corpus.train), out, "webdataset", shard_cuts=10, jobs=1)
    assert not out.exists(), "whole or absent"
    monkeypatch.setattr(module, "write_part", write)
    result = convert(str(corpus.train), out, "webdataset", shard_cuts=10, jobs=1)
    assert (result.resumed, result.shards, result.cuts) == (4, 7, 64)
    convert(str(corpus.train), tmp_path / "whole", "webdataset", shard_cuts=10, jobs=1)
    assert content(out) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wds", "whole"]


def test_a_shard_that_is_not_as_it_was_written_is_found_and_written_again(corpus, tmp_path: Path, monkeypatch) -> None:
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(str(corpus.train), tmp_path / "wds", "webdataset", shard_cuts=10, jobs=1)
    tar = tmp_path / ".wds.part/shards/shard-000002.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(
        HarkenError, match=r"shard 2 of .* must hold 10 cuts as they were written, got \d of 10: the same"
    ):
        convert(str(corpus.train), tmp_path / "wds", "webdataset", shard_cuts=10, jobs=1)
    assert convert(str(corpus.train), tmp_path / "wds", "webdataset", shard_cuts=10, jobs=1).resumed == 6


def test_what_cannot_be_meant_is_refused(corpus, tmp_path: Path, capsys) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    convert(str(corpus.train), tmp_path / "shar", "shar", shard_cuts=32, jobs=1)
    cases: list[tuple[list[str], str]] = [
        ([str(corpus.train), "--out", str(full)], f"{full} exists already and holds `mine`"),
        ([str(corpus.train), "--out", f"{tmp_path}/x.jsonl"], "is a manifest already: give a stream, or --to shar or"),
        (
            [str(corpus.train), "--out", f"{tmp_path}/x", "--to", "manifest"],
            "must end in .jsonl for a manifest and be a",
        ),
        ([f"{tmp_path}/shar", "--out", f"{tmp_path}/x", "--shuffle", "1"], "a stream is only read in order"),
        ([str(corpus.train), "--out", f"{tmp_path}/x", "--shard-cuts", "0"], "must be positive, got 0 and None"),
        (["nowhere.jsonl", "--out", f"{tmp_path}/x"], "no manifest at nowhere.jsonl"),
    ]
    for arguments, said in cases:
        assert main(["data", "shards", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
    assert (full / "mine").read_text() == "mine"
    assert not (tmp_path / "x").exists()


def test_a_cut_that_cannot_be_had_ends_it(corpus, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in corpus.train.read_text().splitlines()]
    lines[5]["recording"]["sources"][0]["source"] = "/nowhere.flac"
    (tmp_path / "missing.jsonl").write_text("".join(json.dumps(data) + "\n" for data in lines))
    with pytest.raises(HarkenError, match=r"the audio of cut `train-005` cannot be packed: .*/nowhere.flac.*--clean"):
        convert(str(tmp_path / "missing.jsonl"), tmp_path / "shar", "shar", jobs=1)
    assert not (tmp_path / "shar").exists()
    convert(str(corpus.train), tmp_path / "wds", "webdataset", shard_cuts=32, jobs=1)
    tar = tmp_path / "wds/shard-000001.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    said = rf"of the source cannot be had, and nothing is left out in silence: shard {re.escape(str(tar))} breaks off"
    with pytest.raises(HarkenError, match=said):
        convert(str(tmp_path / "wds"), tmp_path / "shar", "shar", jobs=1)
    assert not (tmp_path / "shar").exists()


def test_shards_are_filled_up_to_their_limits() -> None:
    rng = np.random.default_rng(0)
    sizes = [rng.integers(1, 400_000, count) for count in (30, 0, 1, 70)]
    flat = np.concatenate(sizes)
    for cuts, megabytes in [(7, None), (None, 1.0), (5, 0.6), (None, 0.2), (1000, None)]:
        parts = divide([None] * 4, sizes, cuts, megabytes)
        place = 0
        for part in parts:
            count = sum(span.last - span.first for span in part)
            total = flat[place : place + count].sum()
            assert count <= (cuts or np.inf)
            assert total <= (megabytes or np.inf) * 1e6 or count == 1
            if place + count < len(flat):
                full = count == cuts or total + flat[place + count] > (megabytes or np.inf) * 1e6
                assert full, "none is closed that has room"
            place += count
        assert place == len(flat)
