"""Decoding and scoring of bad input: one clear error each, and no file of the user's is written over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harken.apps.main import main
from harken.config.saved import save_model
from harken.data.manifest import Manifest
from harken.evaluate.hypotheses import read_hypotheses
from harken.objectives.saved import build_objective


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory) -> Path:
    """Folders of a `ctc` and a `hubert` model with fresh weights."""
    root = tmp_path_factory.mktemp("models")
    for objective in ("ctc", "hubert"):
        torch.manual_seed(0)
        config = corpus.config(objective, "filterbank")
        (root / objective).mkdir()
        save_model(root / objective, config, build_objective(config).state_dict())
    return root


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Run harken, which must refuse with status 2 and one line, and return the line."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        (line,) = error.splitlines()
        return str(line)

    return run


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a manifest, each line as `change` leaves it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for data in lines:
        change(data)
    target.write_text("".join(json.dumps(data) + "\n" for data in lines))
    return target


# Models


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", None, "no model at {}: expected `model.safetensors` in it, or checkpoints of a run"),
        ("model.safetensors", b"xx", "cannot read the weights {}/model.safetensors: "),
        ("config.yaml", None, "cannot read the configuration {}/config.yaml: "),
        ("config.yaml", b"a: [b\n", "{}/config.yaml is not valid YAML: "),
        ("config.yaml", b"- a\n", "{}/config.yaml must hold a group of keys, got list"),
    ],
)
def test_a_damaged_model_is_named(models, corpus, tmp_path: Path, capsys, name, content, words, damage) -> None:
    shutil.copytree(models / "ctc", tmp_path / "ctc")
    damage(tmp_path / "ctc", name, content)
    assert main(["decode", str(tmp_path / "ctc"), str(corpus.valid), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"harken decode: {words.format(tmp_path / 'ctc')}")


def test_models_of_another_objective_and_damaged_rankings_are_named(models, corpus, tmp_path: Path, refused) -> None:
    rest = (corpus.valid, "--out", tmp_path / "out")
    assert refused("decode", models / "hubert", *rest) == (
        f"harken decode: {models}/hubert has objective `hubert`; decoding needs a model fine-tuned with `ctc` or "
        "`transducer`"
    )
    (tmp_path / "exp/checkpoints").mkdir(parents=True)
    for text in ("{", '[{"x": 1}]', "3"):
        (tmp_path / "exp/checkpoints/best.json").write_text(text)
        assert "exp/checkpoints/best.json is no list of checkpoints" in refused("decode", tmp_path / "exp", *rest)


# Manifests


def test_two_manifests_of_one_name_are_refused_before_either_is_decoded(
    models, corpus, tmp_path: Path, refused
) -> None:
    manifests = [tmp_path / folder / "test.jsonl" for folder in "ab"]
    for path in manifests:
        changed(corpus.valid, path, lambda _: None)
    assert refused("decode", models / "ctc", *manifests, "--out", tmp_path / "out") == (
        f"harken decode: {manifests[0]} and {manifests[1]} would both be decoded into {tmp_path}/out/test.jsonl: "
        "decode them into different folders (--out)"
    )
    assert not (tmp_path / "out").exists()


def test_hypotheses_do_not_take_the_place_of_a_manifest(models, corpus, tmp_path: Path, refused) -> None:
    manifest = changed(corpus.valid, tmp_path / "test.jsonl", lambda _: None)
    before = manifest.read_bytes()
    line = refused("decode", models / "ctc", manifest, "--out", tmp_path / "x/..")
    assert line.endswith("is a manifest, and the hypotheses would replace it: choose another folder (--out)")
    assert manifest.read_bytes() == before


def test_a_missing_an_empty_manifest_and_bad_options_are_named(models, corpus, tmp_path: Path, refused) -> None:
    out = ("--out", tmp_path / "out")
    decode = ("decode", models / "ctc")
    assert f"no manifest at {tmp_path}/no.jsonl" in refused(*decode, tmp_path / "no.jsonl", *out)
    (tmp_path / "empty.jsonl").touch()
    expected = f"{tmp_path}/empty.jsonl holds no cuts, and at least one is needed"
    for verb in (decode, ("units", "fit"), ("units", "label", "--clusterer", corpus.clusterer)):
        assert expected in refused(*verb, tmp_path / "empty.jsonl", *out)
    assert "`--workers` must be 0 (read in this process) or more, got -1" in refused(
        *decode, corpus.valid, *out, "--workers", -1
    )
    (tmp_path / "file").touch()
    line = refused("ngram", corpus.valid, "--tokens", corpus.tokens, "--order", 2, "--out", tmp_path)
    assert line == f"harken ngram: {tmp_path} is a folder and cannot be written as a file: name a file in it"


def test_utterances_too_short_for_a_frame_are_decoded_to_nothing(models, corpus, tmp_path: Path) -> None:
    manifest = changed(corpus.valid, tmp_path / "short.jsonl", lambda data: data.update(duration=0.01))
    assert main(["decode", str(models / "ctc"), str(manifest), "--out", str(tmp_path / "out")]) == 0
    rows = read_hypotheses(tmp_path / "out/short.jsonl")
    assert len(rows) == 8
    assert {row.hyp for row in rows} == {""}


# Scores


def test_audio_without_transcripts_is_decoded_and_not_scored(models, corpus, tmp_path: Path, capsys, refused) -> None:
    manifest = changed(corpus.valid, tmp_path / "bare.jsonl", lambda data: data.update(supervisions=[]))
    assert main(["decode", str(models / "ctc"), str(manifest), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    line = refused("score", tmp_path / "out/bare.jsonl")
    assert f"none of the 8 utterances of {tmp_path}/out/bare.jsonl has a text in `ref`" in line
    assert not (tmp_path / "out/bare-score").exists()
    assert "there is no text to train an n-gram model on" in refused(
        "ngram", manifest, "--tokens", corpus.tokens, "--out", tmp_path / "a.arpa"
    )


def test_a_file_that_lacks_utterances_or_has_others_is_refused(models, corpus, tmp_path: Path, capsys, refused) -> None:
    assert main(["decode", str(models / "ctc"), str(corpus.valid), "--out", str(tmp_path)]) == 0
    path = tmp_path / "valid.jsonl"
    assert main(["score", str(path), "--manifest", str(corpus.valid), "--resamples", "10"]) == 0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-4]))
    capsys.readouterr()
    line = refused("score", path, "--manifest", corpus.valid)
    assert f"{path} must hold the 8 utterances of {corpus.valid}; it lacks 4: `valid-00" in line
    assert line.endswith(", ...; decode the manifest again")
    path.write_text("".join([*lines, lines[0].replace(Manifest(corpus.valid)[0].id, "other")]))
    line = refused("score", path, "--manifest", corpus.valid)
    assert "; it has, beyond those, 1: `other`; decode" in line


def test_options_of_score_are_checked(models, corpus, tmp_path: Path, refused) -> None:
    path = tmp_path / "hyp.jsonl"
    path.write_text('{"id": "a", "speaker": "x", "ref": "a", "hyp": "b", "seconds": 1.0}\n')
    for option, found in (("--seed", "-1 and 5"), ("--worst", "0 and -1")):
        assert refused("score", path, option, -1).endswith(f"must be 0 or more, got {found}")
    (tmp_path / "file").touch()
    line = refused("score", path, "--out", tmp_path / "file")
    assert line == f"harken score: cannot write {tmp_path}/file/wer.json: File exists: {tmp_path}/file"


# Units


def test_settings_that_make_no_clusters_are_refused(models, corpus, tmp_path: Path, refused) -> None:
    fit = ("units", "fit", corpus.valid, "--out", tmp_path / "km")
    for count in (0, -3, 65537):
        line = refused(*fit, "--clusters", count)
        assert line == f"harken units: the clusters must be 1 to 65536 (labels have two bytes), got {count}"
    assert "the seed must be 0 or more, got -1" in refused(*fit, "--seed", -1)
    assert "`--sample-rate` must be in Hz and at least 1000, got 16" in refused(*fit, "--sample-rate", 16)
    hidden = ("--features", "hidden", "--model", models / "hubert", "--layer", 1)
    line = refused(*fit, *hidden, "--sample-rate", 8000)
    assert f"`--sample-rate` must be the 16000 Hz that {models}/hubert was trained on, got 8000" in line


def test_clusterers_and_stores_are_not_taken_for_each_other(corpus, tmp_path: Path, refused) -> None:
    line = refused("units", "label", corpus.valid, "--clusterer", corpus.labels, "--out", tmp_path / "labels")
    assert line == f"harken units: {corpus.labels} is no clusterer (KeyError('sha256')); `harken units fit` makes one"
    assert f"{corpus.clusterer} is no label store (Card." in refused("units", "check", corpus.clusterer)
    shutil.copytree(corpus.labels, tmp_path / "cut")
    (tmp_path / "cut/labels.bin").unlink()
    assert "cut is no label store ([Errno 2] No such file" in refused("units", "check", tmp_path / "cut")
