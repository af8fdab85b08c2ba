"""Bad input gives one clear error, or is replaced, counted and named. Unknown keys are in test_config.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from harken.apps.main import main
from harken.config.saved import damaged
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.train.checkpoint import Checkpoints


def state_of(exp: Path) -> dict[str, Any]:
    return json.loads((max((exp / "checkpoints").glob("step-*")) / "state.json").read_text())


def manifest_with(corpus, path: Path, change) -> Path:
    """Copy the training manifest, each line as `change(number, data)` leaves it."""
    lines = lines_of(corpus)
    for number, data in enumerate(lines):
        change(number, data)
    path.write_text("".join(json.dumps(data) + "\n" for data in lines))
    return path


def lines_of(corpus) -> list[dict[str, Any]]:
    return [json.loads(line) for line in corpus.train.read_text().splitlines()]


def with_bad_audio(corpus, tmp_path: Path, count: int) -> Path:
    """Every fourth cut's file becomes noise, an empty file, half a file, or goes missing, `count` times."""
    good = next((corpus.root / "audio").glob("*.flac")).read_bytes()
    contents = [b"fLaC" + bytes(range(256)), b"", good[: len(good) // 2], None]

    def change(number: int, data: dict[str, Any]) -> None:
        if number % 4 == 0 and number // 4 < count:
            path = tmp_path / f"bad{number:02}.flac"
            if contents[number // 4 % 4] is not None:
                path.write_bytes(contents[number // 4 % 4])
            data["recording"]["sources"][0]["source"] = str(path)

    return manifest_with(corpus, tmp_path / "bad.jsonl", change)


def test_a_missing_manifest_is_named(train, tmp_path: Path) -> None:
    status, _, error = train("hubert", f"data.train={tmp_path}/none.jsonl")
    assert status == 2
    assert (
        error == f"harken train: no manifest at {tmp_path}/none.jsonl; `harken data scan` makes one from audio files\n"
    )


@pytest.mark.parametrize(("speed", "shortest"), [("[]", "0.026"), ("[1.0,2.0]", "0.051")])
def test_cuts_too_short_for_a_frame_are_refused_before_any_is_read(train, speed: str, shortest: str) -> None:
    waveform = ["frontend={name: waveform, channels: 16}", f"data.speed={speed}"]
    status, _, error = train("ctc", *waveform, "data.min_seconds=0.025")
    assert status == 2
    expected = f"`data.min_seconds` must be at least {shortest}, for shorter cuts give no frame"
    assert expected in error
    assert "`frontend.name: waveform`, got 0.025" in error
    status, _, error = train("ctc", *waveform, f"data.min_seconds={shortest}")
    assert "min_seconds" not in error


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corpus_that_is_no_audio_is_one_error(train, corpus, tmp_path: Path, workers: int) -> None:
    (tmp_path / "bad.flac").write_bytes(b"")

    def change(number: int, data: dict[str, Any]) -> None:
        data["recording"]["sources"][0]["source"] = str(tmp_path / "bad.flac")

    manifest = manifest_with(corpus, tmp_path / "bad.jsonl", change)
    status, _, error = train("hubert", f"data.train={manifest}", f"data.workers={workers}")
    assert status == 2
    assert "cannot be read: empty file (0 bytes); and 20 others drawn in its stead cannot be read either" in error
    assert f"run `harken data verify {manifest}`" in error
    assert error.startswith("harken train: cut `train-")
    assert len(error.splitlines()) == 1


def test_corrupt_audio_is_replaced_counted_and_named(train, corpus, tmp_path: Path) -> None:
    manifest = with_bad_audio(corpus, tmp_path, 4)
    status, out, error = train("hubert", f"data.train={manifest}", "data.workers=1", steps=3)
    assert (status, error) == (0, "")
    replaced = state_of(tmp_path / "exp")["noted"]["replaced"]
    assert sorted(replaced) == ["train-000", "train-004", "train-008", "train-012"]
    for cut, words in {
        "train-000": "File contains data in an unimplemented format.",
        "train-004": "empty file (0 bytes)",
        "train-008": "flac decoder lost sync.",
        "train-012": "no such file or directory",
    }.items():
        file = tmp_path / f"bad{int(cut[-3:]):02}.flac"
        assert replaced[cut].startswith(f"cut `{cut}` ({file}) cannot be read: {words}; `train-0"), replaced[cut]
        assert replaced[cut].endswith("took its place")
        assert out.count(f" NOTE replaced: {replaced[cut]}\n") == 1
    samples = [json.loads(line) for line in (tmp_path / "exp/samples.rank0.jsonl").read_text().splitlines()]
    assert not {cut for row in samples for cut in row["ids"]} & set(replaced), "none of them was trained on"


def test_a_nan_is_replaced_and_telephone_stereo_is_converted(train, corpus, tmp_path: Path) -> None:
    """A file with one NaN among its samples, and one of 8 kHz with two channels of which the cut has the second."""
    import numpy as np
    import soundfile

    wave, _ = soundfile.read(corpus.root / "audio/train-000.flac", dtype="float32")
    bad, stereo = tmp_path / "nan.wav", tmp_path / "stereo.wav"
    soundfile.write(bad, np.where(np.arange(len(wave)) == 500, np.nan, wave), 16000, subtype="FLOAT")
    seconds = lines_of(corpus)[1]["duration"]
    tone = np.sin(2 * np.pi * 440 * np.arange(round(8000 * seconds)) / 8000)
    soundfile.write(stereo, np.stack([np.zeros_like(tone), 0.5 * tone], axis=1), 8000, subtype="FLOAT")

    def change(number: int, data: dict[str, Any]) -> None:
        recording = data["recording"]
        if number == 0:
            recording["sources"][0]["source"] = str(bad)
        if number == 1:
            recording["sources"][0].update(source=str(stereo), channels=[0, 1])
            recording.update(sampling_rate=8000, num_samples=len(tone), channel_ids=[0, 1])
            data["channel"] = 1

    manifest = manifest_with(corpus, tmp_path / "mixed.jsonl", change)
    status, out, error = train("hubert", f"data.train={manifest}", steps=3)
    assert (status, error) == (0, "")
    noted = state_of(tmp_path / "exp")["noted"]
    assert list(noted) == ["replaced"]
    assert list(noted["replaced"]) == ["train-000"]
    reason = noted["replaced"]["train-000"]
    assert reason.startswith(f"cut `train-000` ({bad}) holds samples that are not finite; `train-")
    assert out.count(f" NOTE replaced: {reason}\n") == 1
    looked = f"1 of 64 cuts looked at in `data.train` {manifest} are "
    assert f" NOTE {looked}at 8000 Hz and are resampled to 16000 Hz at every reading\n" in out
    assert f" NOTE {looked}of files with several channels: what a cut names of them is read" in out
    samples = read_cut(Manifest(manifest)[1], 16000)
    assert samples.shape == (2 * len(tone),)
    middle = samples[len(tone) // 2 : -len(tone) // 2]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.02), "its own channel, not the mean with the silent one"
    assert np.abs(np.fft.rfft(middle)).argmax() == pytest.approx(440 * len(middle) / 16000, abs=1)


def test_what_is_replaced_in_validation_is_counted_and_named(train, corpus, tmp_path: Path) -> None:
    manifest = with_bad_audio(corpus, tmp_path, 2)
    options = [f"data.valid={manifest}", "train.valid_every_steps=1", "data.max_bad_share=0"]
    status, out, error = train("hubert", *options, steps=2)
    assert (status, error) == (0, "")
    noted = state_of(tmp_path / "exp")["noted"]
    assert list(noted) == ["replaced in validation"], "they are no share of what was trained on"
    replaced = noted["replaced in validation"]
    assert sorted(replaced) == ["train-000", "train-004"]
    for reason in replaced.values():
        assert out.count(f" NOTE replaced in validation: {reason}\n") == 1, "once, not at each validation"


def test_bad_audio_is_named_when_clusters_are_fitted(corpus, tmp_path: Path, capsys) -> None:
    manifest = with_bad_audio(corpus, tmp_path, 2)
    arguments = ["units", "fit", str(manifest), "--out", str(tmp_path / "km"), "--clusters", "5", "--jobs", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert " NOTE replaced: cut `train-000` (" in out
    assert " NOTE replaced: cut `train-004` (" in out
    assert (
        " WARNING 2 of 64 cuts could not be read, and frames of others took their place: "
        f"run `harken data verify {manifest}`\n"
    ) in out


def test_bad_noise_costs_no_cut(train, corpus, tmp_path: Path) -> None:
    noises = with_bad_audio(corpus, tmp_path, 16)
    status, out, error = train("ctc", f"data.noise={noises}", "data.noise_probability=1", steps=2)
    assert (status, error) == (0, "")
    noted = state_of(tmp_path / "exp")["noted"]
    assert list(noted) == ["noise left out"]
    for reason in noted["noise left out"].values():
        assert reason.endswith(f"; cuts that draw it stay without noise: run `harken data verify {noises}`")
        assert out.count(f" NOTE noise left out: {reason}\n") == 1


@pytest.mark.parametrize("verb", ["fit", "label"])
def test_units_of_an_empty_manifest_are_refused(corpus, tmp_path: Path, capsys, verb: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    arguments = ["units", verb, str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert main([*arguments, *(["--clusterer", str(corpus.clusterer)] if verb == "label" else [])]) == 2
    assert capsys.readouterr().err == (
        f"harken units: {tmp_path}/empty.jsonl holds no cuts, and at least one is needed: "
        "make it anew with `harken data scan`\n"
    )


def test_a_run_stops_when_too_much_cannot_be_read(train, corpus, tmp_path: Path) -> None:
    manifest = with_bad_audio(corpus, tmp_path, 16)
    status, _, error = train("hubert", f"data.train={manifest}", "data.max_bad_share=0.1", steps=8)
    assert status == 2
    (line,) = error.splitlines()
    assert "cuts could not be read, more than `data.max_bad_share` 0.1: train-0" in line
    assert line.endswith(f"run `harken data verify {manifest}`")
    status, _, _ = train("hubert", f"data.train={manifest}", "data.max_bad_share=0.9", steps=3)
    assert status == 0


def test_labels_with_another_number_of_classes_are_refused(train, corpus) -> None:
    status, _, error = train("hubert", "objective.classes=[500]")
    assert status == 2
    assert error == f"harken train: `objective.classes` must equal the clusters of {corpus.labels}, got 500 and 12\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_of_another_manifest_are_refused(train, corpus, tmp_path: Path, workers: int) -> None:
    def change(number: int, data: dict[str, Any]) -> None:
        data["id"] = f"other-{number}"

    manifest = manifest_with(corpus, tmp_path / "other.jsonl", change)
    status, _, error = train("hubert", f"data.train={manifest}", f"data.workers={workers}")
    assert status == 2
    (line,) = error.splitlines()
    assert line.startswith(f"harken train: label store {corpus.labels} has no labels for 64 of 64 cuts of `data.train`")
    assert "the first `other-0`: it was made from another manifest" in line


def test_missing_labels_and_tokenizers_are_named(train, corpus, tmp_path: Path) -> None:
    assert "no finished label store at nowhere" in train("hubert", "data.labels=[nowhere]")[2]
    assert "`data.labels` must name a unit store for each codebook" in train("hubert", "data.labels=[]")[2]
    assert "no tokenizer at nowhere; `harken data tokens" in train("ctc", "objective.tokenizer=nowhere")[2]


def test_a_transcript_longer_than_its_frames_is_left_out_and_named(train, corpus, tmp_path: Path) -> None:
    def change(number: int, data: dict[str, Any]) -> None:
        if number == 5:
            data["supervisions"][0]["text"] = "abcd " * 100
        if number == 6:
            data["supervisions"][0]["text"] = ""

    manifest = manifest_with(corpus, tmp_path / "long.jsonl", change)
    status, out, error = train("ctc", f"data.train={manifest}", "data.max_bad_share=0.02", steps=3)
    assert (status, error) == (0, "")
    left_out = state_of(tmp_path / "exp")["noted"]["left out"]
    assert sorted(left_out) == ["train-005", "train-006"]
    assert left_out["train-005"].startswith(
        "the transcript of cut `train-005` has 499 tokens and needs 499 frames, the model gives "
    )
    assert f" NOTE left out: {left_out['train-005']}\n" in out


def test_a_character_that_the_tokenizer_lacks_stops_the_run(train, corpus, tmp_path: Path) -> None:
    def change(number: int, data: dict[str, Any]) -> None:
        data["supervisions"][0]["text"] += "?"

    manifest = manifest_with(corpus, tmp_path / "marks.jsonl", change)
    status, _, error = train("ctc", f"data.train={manifest}", "data.workers=1")
    assert status == 2
    assert "64 of 64 transcripts looked at" in error
    assert "hold characters that the tokenizer does not know, the first `train-000`: '?'; normalise" in error
    assert len(error.splitlines()) == 1


def test_a_wrong_metric_is_refused_before_the_first_step(train, corpus, tmp_path: Path) -> None:
    status, out, error = train("hubert", f"data.valid={corpus.valid}", "checkpoint.metric=wer")
    assert status == 2
    assert error.startswith("harken train: `checkpoint.metric` must be one of ")
    assert "accuracy_masked" in error
    assert error.endswith(", got `wer`\n")
    assert not (tmp_path / "exp/checkpoints").exists()
    assert " train 1/" not in out


@pytest.fixture
def three(train, tmp_path: Path) -> Path:
    """A run with three checkpoints."""
    status, _, _ = train("hubert", "checkpoint.every_steps=1", "checkpoint.keep_last=3", steps=3)
    assert status == 0
    return tmp_path / "exp"


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: cut_in_half(folder / "model.safetensors"), "model.safetensors is not as it was written"),
        (lambda folder: cut_in_half(folder / "checksums.json"), "no readable checksums.json"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda folder: (folder / "checksums.json").unlink(), "no readable checksums.json"),
    ],
)
def test_a_damaged_checkpoint_is_said_aloud_and_the_one_before_is_used(three: Path, train, capsys, harm, words) -> None:
    newest = three / "checkpoints/step-00000003"
    harm(newest)
    assert words in damaged(newest)
    assert Checkpoints(three, None).newest() == three / "checkpoints/step-00000002"
    out = capsys.readouterr().out
    assert f"WARNING checkpoint {newest} is damaged (" in out
    assert words in out


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(three: Path, train) -> None:
    cut_in_half(three / "checkpoints/step-00000003/model.safetensors")
    before = (three / "checkpoints/step-00000002/model.safetensors").read_bytes()
    status, out, error = train("hubert", "checkpoint.every_steps=1", "checkpoint.keep_last=3", steps=3)
    assert (status, error) == (0, "")
    assert "is damaged (model.safetensors is not as it was written): trying the one before it" in out
    assert f"continuing from {three}/checkpoints/step-00000002: step 2" in out
    assert damaged(three / "checkpoints/step-00000003") is None, "it was written anew"
    assert (three / "checkpoints/step-00000002/model.safetensors").read_bytes() == before


def test_when_all_are_damaged_nothing_is_begun_anew(three: Path, train) -> None:
    for folder in (three / "checkpoints").glob("step-*"):
        cut_in_half(folder / "model.safetensors")
    before = sorted(path.name for path in (three / "checkpoints").iterdir())
    status, out, error = train("hubert", steps=3)
    assert status == 2
    assert out.count("WARNING checkpoint") == 3
    assert error == (
        f"harken train: every checkpoint in {three}/checkpoints is damaged; "
        "move the folder away to start from the beginning\n"
    )
    assert sorted(path.name for path in (three / "checkpoints").iterdir()) == before


def test_what_a_kill_while_saving_leaves_is_passed_over(three: Path, train) -> None:
    shutil.copytree(three / "checkpoints/step-00000003", three / "checkpoints/.step-00000004.tmp")
    assert Checkpoints(three, None).newest() == three / "checkpoints/step-00000003"
    status, _, _ = train("hubert", "checkpoint.every_steps=1", steps=4)
    assert status == 0
    assert not list((three / "checkpoints").glob(".*"))


def test_a_run_does_not_go_on_with_another_model(three: Path, train) -> None:
    status, out, error = train("hubert", "encoder.layers=3", steps=4)
    assert status == 2
    assert "the configuration differs from that of" in out
    assert "encoder.layers: was 2, is 3" in out
    (line,) = error.splitlines()
    assert "step-00000003 holds another model: missing `backbone.encoder.blocks.2." in line
    assert line.endswith("; give the old `frontend`, `encoder` and `objective`, or another `--exp`")
