"""`harken features` writes what the model computes, goes on where it stopped, and names what it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from harken.apps.main import main
from harken.data.dataset import read_whole
from harken.data.manifest import Manifest
from harken.encoders.backbone import hidden_rows
from harken.encoders.saved import load_backbone


@pytest.fixture
def model(train, tmp_path: Path) -> Path:
    status, out, error = train("hubert")
    assert status == 0, out + error
    return tmp_path / "exp"


def write(model: Path, manifest: Path, out: Path, *more: str) -> int:
    return main(["features", str(model), str(manifest), "--layers", "0,2", "--out", str(out), *more])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


def test_lhotse_reads_what_the_model_computes(model: Path, corpus, tmp_path: Path) -> None:
    assert write(model, corpus.valid, tmp_path / "states", "--jobs", "1") == 0
    backbone, _ = load_backbone(model)
    manifest = Manifest(corpus.valid)
    cuts = list(CutSet.from_file(tmp_path / "states/cuts.jsonl"))
    assert [cut.id for cut in cuts] == [manifest[place].id for place in range(len(manifest))]
    for place in (0, len(cuts) - 1):
        batch = read_whole(manifest, [place], 16000, {})
        assert batch is not None
        alone = hidden_rows(backbone, batch, (0, 2))
        for layer, found in ((0, cuts[place].load_layer0()), (2, cuts[place].load_layer2())):
            assert found.shape == (int(backbone.spec.num_frames(int(batch.lengths[0]))), backbone.dim)
            np.testing.assert_allclose(found, alone[layer][0], rtol=1e-4, atol=1e-4)
    card = json.loads((tmp_path / "states/card.json").read_text())
    assert card["cuts"] == len(cuts)
    assert card["layers"] == [0, 2]


def test_pieces_processes_and_missing_files_change_no_bit(model: Path, corpus, tmp_path: Path, capsys) -> None:
    options = ("--max-seconds", "5")
    assert write(model, corpus.valid, tmp_path / "whole", *options, "--jobs", "1") == 0
    divided = tmp_path / "divided"
    assert write(model, corpus.valid, divided, *options, "--jobs", "1", "--piece", "1/1") == 0
    assert not (divided / "card.json").exists()
    lost = min(divided.rglob("*.npy"))
    content = lost.read_bytes()
    (divided / "pieces/000000.json").unlink()
    lost.unlink()
    assert write(model, corpus.valid, divided, *options, "--jobs", "2") == 0
    assert lost.read_bytes() == content
    assert files_of(divided) == files_of(tmp_path / "whole")
    assert {path.name for path in divided.iterdir()} == {
        "card.json",
        "cuts.jsonl",
        "unreadable.tsv",
        "layer0",
        "layer2",
    }
    capsys.readouterr()
    assert write(model, corpus.valid, divided, *options) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out


def test_half_precision_is_written_as_it_is_asked_for(model: Path, corpus, tmp_path: Path) -> None:
    assert write(model, corpus.valid, tmp_path / "states", "--dtype", "float16", "--jobs", "1") == 0
    assert {np.load(path).dtype for path in (tmp_path / "states").rglob("*.npy")} == {np.dtype("float16")}


def test_audio_that_cannot_be_read_is_named_and_left_out(model: Path, corpus, tmp_path: Path, capsys) -> None:
    cuts = list(CutSet.from_file(corpus.valid))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"")
    cuts[1].recording.sources[0].source = str(broken)
    CutSet.from_cuts(cuts).to_file(tmp_path / "some.jsonl")
    assert main(["data", "index", str(tmp_path / "some.jsonl")]) == 0
    assert write(model, tmp_path / "some.jsonl", tmp_path / "states", "--jobs", "1") == 0
    assert f"{broken}" in capsys.readouterr().out
    assert (tmp_path / "states/unreadable.tsv").read_text().startswith(f"{cuts[1].id}\t")
    assert cuts[1].id not in {cut.id for cut in CutSet.from_file(tmp_path / "states/cuts.jsonl")}


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("3,99", "`--layers` must be different numbers in 0..2 for"),
        ("1,1", "`--layers` must be different numbers in 0..2 for"),
        ("last", "`--layers` must be numbers with commas between, such as 4,6, got 'last'"),
    ],
)
def test_layers_that_are_not_there_are_refused(model: Path, corpus, tmp_path: Path, capsys, layers, said) -> None:
    arguments = ["features", str(model), str(corpus.valid), "--layers", layers, "--out", str(tmp_path / "states")]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "states").exists()


def test_nothing_of_the_users_is_written_over(model: Path, corpus, tmp_path: Path, capsys) -> None:
    (tmp_path / "states").mkdir()
    (tmp_path / "states/thesis.tex").write_text("all of it")
    assert write(model, corpus.valid, tmp_path / "states") == 2
    assert "exists already and holds `thesis.tex`" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["thesis.tex"]
    assert write(model, corpus.valid, tmp_path / "other", "--jobs", "1") == 0
    assert main(["features", str(model), str(corpus.valid), "--layers", "1", "--out", str(tmp_path / "other")]) == 2
    assert "holds hidden states of another model, manifest or layers" in capsys.readouterr().err
