"""Wrong data is refused before step 0, each mistake with its own message, by `harken data check` and `harken train`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harken.apps.main import main
from harken.units.store import LabelStore

Change = Callable[[int, dict[str, Any]], None]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def changed(source: Path, out: Path, change: Change) -> Path:
    lines = lines_of(source)
    for number, line in enumerate(lines):
        change(number, line)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def store_with(corpus, folder: Path, values: Callable[[np.ndarray], np.ndarray] = lambda old: old, **card: Any) -> Path:
    """Copy the corpus's label store with other labels and another card."""
    shutil.copytree(corpus.labels, folder)
    labels = np.fromfile(folder / "labels.bin", dtype=np.uint8)
    values(labels).astype(np.uint8).tofile(folder / "labels.bin")
    (folder / "card.json").write_text(json.dumps({**json.loads((folder / "card.json").read_text()), **card}))
    return folder


@pytest.fixture
def refused(train, corpus, tmp_path: Path, capsys):
    """Check a configuration and train with it: both refuse with the same words, which are returned."""

    def run(objective: str, *overrides: str) -> str:
        config = str(corpus.yaml(tmp_path, objective, "filterbank"))
        assert main(["data", "check", config, *overrides]) == 1
        out, error = capsys.readouterr()
        assert error == ""
        wrong = [line.removeprefix("WRONG ") for line in out.splitlines() if line.startswith("WRONG ")]
        assert out.splitlines()[-1].endswith(f": {len(wrong)} wrong")
        status, out, error = train(objective, *overrides)
        assert status == 2
        assert " train 1/" not in out, "no step was taken"
        (text,) = wrong
        assert error == f"harken train: {text}\n"
        return text

    return run


@pytest.fixture
def warned(train, corpus, tmp_path: Path, capsys):
    """Check a configuration and train with it: both go on and say the same, which is returned."""

    def run(objective: str, *overrides: str) -> list[str]:
        config = str(corpus.yaml(tmp_path, objective, "filterbank"))
        assert main(["data", "check", config, *overrides]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("warning ", "note "))]
        status, out, error = train(objective, *overrides)
        assert (status, error) == (0, "")
        for line in said:
            level, _, text = line.partition(" ")
            assert f" {level.upper()} {text}\n" in out
        return said

    return run


@pytest.mark.parametrize(("objective", "full"), [("hubert", False), ("ctc", True)])
def test_sound_data_passes_and_says_what_was_looked_at(
    warned, corpus, tmp_path: Path, capsys, objective: str, full: bool
) -> None:
    assert warned(objective, f"data.valid={corpus.valid}") == []
    config = str(corpus.yaml(tmp_path, objective, "filterbank"))
    assert main(["data", "check", config, f"data.valid={corpus.valid}", *(["--full"] if full else [])]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    looked = (
        f"looked at indexes in whole, 64 of 64 cuts of {corpus.train}, 8 of 8 cuts of {corpus.valid} one by one, in "
    )
    assert line.startswith(looked)
    assert line.endswith(": nothing wrong")


def test_a_sample_is_taken_of_many_cuts_and_all_with_full(corpus, tmp_path: Path, capsys) -> None:
    lines = lines_of(corpus.train) * 5
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({**line, "id": f"cut{number}"}) + "\n" for number, line in enumerate(lines)))
    config = str(corpus.yaml(tmp_path, "ctc", "filterbank"))
    said = []
    for options in ([], [], ["--full"]):
        assert main(["data", "check", config, f"data.train={many}", *options]) == 0
        said.append(capsys.readouterr().out)
    assert f"256 of 320 cuts of {many} one by one" in said[0]
    assert f"256 of 320 cuts of {many} one by one" in said[1]
    assert f"320 of 320 cuts of {many} one by one" in said[2]


# Labels


def test_labels_of_another_clusterer_for_validation(refused, corpus, tmp_path: Path) -> None:
    other = store_with(corpus, tmp_path / "other", clusterer="f" * 64)
    text = refused("hubert", f"data.valid={corpus.valid}", f"data.valid_labels=[{other}]")
    own = LabelStore(corpus.labels).card.made_of
    assert text == (
        "`data.valid_labels` must be made by the clusterer of `data.labels`, or a unit of one means another in the "
        f"other, got 12 clusters {'f' * 16} of mfcc39 16000 Hz and {own}: label the validation set with that clusterer"
    )


def test_validation_may_have_a_store_of_its_own(warned, corpus, tmp_path: Path) -> None:
    from harken.units.features import make_features
    from harken.units.label import Job, label

    features, clusterer = partial(make_features, "mfcc"), str(corpus.clusterer)
    for name, path in (("train", corpus.train), ("valid", corpus.valid)):
        label(Job(tmp_path / name, (str(path),), clusterer, features, 16000, 60.0), 1, lambda _: None)
    options = [f"data.valid={corpus.valid}", f"data.labels=[{tmp_path}/train]", f"data.valid_labels=[{tmp_path}/valid]"]
    assert warned("hubert", *options, "train.valid_every_steps=1") == []


def test_labels_that_come_more_rarely_than_frames(refused, corpus, tmp_path: Path) -> None:
    store = store_with(corpus, tmp_path / "store", hop=640)
    assert refused("hubert", f"data.labels=[{store}]") == (
        f"{store} has 25 labels a second (one each 640 samples), and the frontend gives 50 frames (one each 320): "
        "labels must come as often as frames or a whole number of times as often; label with other features, or take "
        "another frontend"
    )


def test_labels_of_another_sampling_rate(refused, corpus, tmp_path: Path) -> None:
    store = store_with(corpus, tmp_path / "store", sample_rate=8000)
    text = refused("hubert", f"data.labels=[{store}]")
    assert text == f"{store} was labelled at 8000 Hz, the frontend reads 16000 Hz"


def test_labels_of_other_lengths_than_their_cuts(refused, corpus, tmp_path: Path) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if number == 7:  # three labels of 10 ms shorter than it was when it was labelled
            line["duration"] -= 0.03

    text = refused("hubert", f"data.train={changed(corpus.train, tmp_path / 'short.jsonl', change)}")
    assert text.startswith(
        f"1 of 64 cuts of `data.train` {tmp_path}/short.jsonl have another number of labels in {corpus.labels} than "
        "their duration gives at 100 a second, the first `train-007` "
    )
    assert "(up to 2 more or fewer are allowed): the audio or its cuts changed after labelling; run `harken" in text


def test_two_labels_more_or_fewer_are_allowed(warned, corpus, tmp_path: Path) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        line["duration"] -= 0.02

    assert warned("hubert", f"data.train={changed(corpus.train, tmp_path / 'short.jsonl', change)}") == []


def test_other_classes_than_clusters(refused, corpus) -> None:
    text = refused("hubert", "objective.classes=[500]")
    assert text == f"`objective.classes` must equal the clusters of {corpus.labels}, got 500 and 12"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda old: np.where(np.arange(len(old)) % 5, old, 12), "labels must lie below K = 12, found 12"),
        (lambda old: old * 0 + 3, "every label is 3: the features or the clusterer are broken"),
        (
            lambda old: np.where(np.arange(len(old)) % 25, 0, old),
            "leave something to predict: the audio is mostly silence, or the features are broken",
        ),
    ],
    ids=["beyond K", "constant", "dominated"],
)
def test_labels_that_teach_nothing(refused, corpus, tmp_path: Path, values, words: str) -> None:
    store = store_with(corpus, tmp_path / "store", values)
    text = refused("hubert", f"data.labels=[{store}]")
    assert text.startswith(f"labels of `data.train` {corpus.train} in {store}: ")
    assert text.endswith(words)


def test_labels_that_are_mostly_filling(refused, warned, corpus, tmp_path: Path) -> None:
    store = store_with(corpus, tmp_path / "store")
    (store / "unreadable.tsv").write_text("train-003\tcut `train-003` cannot be read: gone\n")
    text = refused("hubert", f"data.labels=[{store}]")
    assert text == (
        f"1 of 72 cuts of {store} have no labels of their own, the first `train-003`, and `data.max_bad_share` allows "
        f"1%: their audio could not be labelled ({store}/unreadable.tsv says why); run `harken data verify "
        f"{corpus.train} --clean CLEAN.jsonl`, and label that"
    )
    (line,) = warned("hubert", f"data.labels=[{store}]", "data.max_bad_share=0.02")
    assert line == "warning " + text.replace("allows 1%", "allows 2%")


@pytest.mark.parametrize("role", ["train", "valid"])
def test_cuts_without_labels(refused, corpus, tmp_path: Path, role: str) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if number in (2, 5):
            line["id"] = f"new-{number}"

    manifest = changed(getattr(corpus, role), tmp_path / "new.jsonl", change)
    count = len(lines_of(manifest))
    assert refused("hubert", f"data.{role}={manifest}") == (
        f"label store {corpus.labels} has no labels for 2 of {count} cuts of `data.{role}` {manifest}, the first "
        f"`new-2`: it was made from another manifest; run `harken units label {manifest} ... --out NEW`"
    )


def test_units_that_change_at_every_label_or_hardly_ever_are_warned_of(warned, corpus, tmp_path: Path) -> None:
    noise = store_with(corpus, tmp_path / "noise", lambda old: np.arange(len(old)) % 12)
    (line,) = warned("hubert", f"data.labels=[{noise}]")
    assert line.endswith("a unit lasts 1.00 labels on average: units that change at every label are mostly noise")
    slow = store_with(corpus, tmp_path / "slow", lambda old: np.arange(len(old)) // 300 % 12)
    (line,) = warned("hubert", f"data.labels=[{slow}]")
    assert line.startswith(f"warning labels of `data.train` {corpus.train} in {slow}: a unit lasts ")
    assert line.endswith(" s on average, longer than sounds of speech do")


# Transcripts


def test_characters_that_the_tokenizer_does_not_know(refused, corpus, tmp_path: Path) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if number in (4, 9):
            line["supervisions"][0]["text"] += "é!!"

    manifest = changed(corpus.train, tmp_path / "marks.jsonl", change)
    text = refused("ctc", f"data.train={manifest}", "data.max_bad_share=0.5")
    assert text.startswith(
        f"2 of 64 transcripts looked at in `data.train` {manifest} hold characters that the tokenizer does not know, "
        "the first `train-004`: "
    )
    assert "'é'" in text
    assert "'!'" in text
    assert text.endswith("; normalise the texts, or make the tokenizer of these")


def test_unknown_pieces_are_allowed_up_to_a_share(refused, warned, corpus, tmp_path: Path) -> None:
    from harken.data.tokens import Pieces

    texts = [line["supervisions"][0]["text"] for line in lines_of(corpus.train)]
    Pieces.train(texts, tmp_path / "bpe.model", 12)

    def change(number: int, line: dict[str, Any]) -> None:
        if number == 4:
            line["supervisions"][0]["text"] += "é"

    manifest = changed(corpus.train, tmp_path / "marks.jsonl", change)
    options = [f"data.train={manifest}", f"objective.tokenizer={tmp_path}/bpe.model"]
    assert "the first `train-004`: 'é'; normalise" in refused("ctc", *options)
    (line,) = warned("ctc", *options, "data.max_bad_share=0.05")
    assert line.startswith("warning 1 of 64 transcripts looked at in ")


def test_transcripts_longer_than_their_frames(refused, warned, corpus, tmp_path: Path) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if number in (5, 8):
            line["supervisions"][0]["text"] = "abcd " * 100

    manifest = changed(corpus.train, tmp_path / "long.jsonl", change)
    text = refused("ctc", f"data.train={manifest}")
    assert text.startswith(
        f"2 of 64 transcripts looked at in `data.train` {manifest} are longer than their frames allow, the first "
        "`train-005` (499 tokens need 499 frames, the model gives "
    )
    assert "`data.max_bad_share` allows 1%: they are left out of the loss" in text
    (line,) = warned("ctc", f"data.train={manifest}", "data.max_bad_share=0.05")
    assert line.startswith("warning 2 of 64 transcripts")


def test_cuts_without_transcripts(refused, corpus, tmp_path: Path) -> None:
    manifest = changed(corpus.train, tmp_path / "mute.jsonl", lambda number, line: line.update(supervisions=[]))
    assert refused("ctc", f"data.train={manifest}") == (
        f"64 of 64 cuts of `data.train` {manifest} have no transcript, the first `train-000`, and `data.max_bad_share` "
        "allows 1%: nothing is learned from them; leave them out, or give texts with `harken data scan --text`"
    )


# Audio and manifests


def test_audio_that_is_not_where_the_manifest_says(refused, warned, corpus, tmp_path: Path) -> None:
    def moved(number: int, line: dict[str, Any], *, from_number: int) -> None:
        if number >= from_number:
            line["recording"]["sources"][0]["source"] = f"/nowhere/{number}.flac"

    manifest = changed(corpus.train, tmp_path / "moved.jsonl", partial(moved, from_number=40))
    text = refused("hubert", f"data.train={manifest}")
    assert text == (
        f"24 of 64 cuts looked at in `data.train` {manifest} lack their audio file, the first cut `train-040`: "
        "/nowhere/40.flac: mount the corpus where the manifest says, or make the manifest anew with `harken data scan`"
    )
    few = changed(corpus.train, tmp_path / "few.jsonl", partial(moved, from_number=62))
    (line,) = warned("hubert", f"data.train={few}")
    assert line.startswith("warning 2 of 64 cuts looked at in ")


def test_cuts_of_training_in_validation_are_warned_of(warned, corpus, tmp_path: Path) -> None:
    valid = tmp_path / "valid.jsonl"
    valid.write_text("".join(line + "\n" for line in corpus.train.read_text().splitlines()[10:13]))
    (line,) = warned("ctc", f"data.valid={valid}")
    assert line == (
        f"warning 3 cuts of `data.train` {corpus.train} are in `data.valid` {valid}, too, the first `train-010`: "
        "validation scores say nothing about new audio; take them out of one of the two"
    )


def test_several_mistakes_are_told_at_once(train, corpus, tmp_path: Path) -> None:
    manifest = changed(corpus.train, tmp_path / "other.jsonl", lambda number, line: line.update(id=f"other-{number}"))
    store = store_with(corpus, tmp_path / "store", clusterer="f" * 64)
    options = [f"data.train={manifest}", f"data.valid={corpus.valid}", f"data.valid_labels=[{store}]"]
    status, _, error = train("hubert", *options)
    assert status == 2
    first, second, third = error.splitlines()
    assert first == "harken train: 2 things are wrong with the data of this run:"
    assert second.startswith(f"  - label store {corpus.labels} has no labels for 64 of 64 cuts")
    assert third.startswith("  - `data.valid_labels` must be made by the clusterer of `data.labels`")
