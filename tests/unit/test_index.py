"""Building a manifest's index: its columns, several pieces and processes, kills, equal hashes, older indexes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from harken.apps.main import main
from harken.core.draws import key
from harken.core.errors import HarkenError
from harken.data import index
from harken.data.index import EARLIER_FILES, INDEX_FILES, build_index, index_folder, read_piece
from harken.data.manifest import Manifest

COUNT = 300


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Lines of different lengths, with texts of several bytes a character and cuts without one."""
    path = tmp_path / "train.jsonl"
    lines = [
        {"id": f"ü{number}", "duration": 1 + number / 8, "supervisions": [{"text": "hé€ " * (number % 7)}]}
        for number in range(COUNT)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(index, "PIECE_BYTES", 1000)


def files(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in index_folder(path).iterdir()}


def test_the_columns_say_what_the_lines_say(manifest: Path) -> None:
    assert build_index(manifest) == COUNT
    opened = Manifest(manifest)
    assert set(files(manifest)) == set(INDEX_FILES)
    assert opened.hashes.tolist() == [key(f"ü{number}") for number in range(COUNT)]
    assert opened.characters.tolist() == [max(0, 4 * (number % 7) - 1) for number in range(COUNT)]
    assert opened.seconds.tolist() == [1 + number / 8 for number in range(COUNT)]
    assert opened.line(211)["id"] == "ü211"


@pytest.mark.parametrize("jobs", [1, 2])
def test_pieces_and_processes_change_nothing(manifest: Path, monkeypatch, jobs: int) -> None:
    build_index(manifest)
    whole = files(manifest)
    monkeypatch.setattr(index, "PIECE_BYTES", 1000)
    assert main(["data", "index", str(manifest), "--jobs", str(jobs)]) == 0
    assert files(manifest) == whole
    if jobs == 1:
        monkeypatch.setattr(index, "PIECE_BYTES", 40)  # shorter than any line: some pieces hold none
        build_index(manifest, jobs=1)
        assert files(manifest) == whole
    assert sorted(entry.name for entry in manifest.parent.iterdir()) == ["train.jsonl", "train.jsonl.idx"]


def killed_after(monkeypatch, pieces: int) -> None:
    """Let the reading of pieces end as by Ctrl-C after some of them."""
    left = [pieces]

    def read(piece):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return read_piece(piece)

    monkeypatch.setattr(index, "read_piece", read)


def test_what_was_read_before_a_kill_is_not_read_again(manifest: Path, small_pieces, monkeypatch, capsys) -> None:
    build_index(manifest, jobs=1)
    whole = files(manifest)
    shutil.rmtree(index_folder(manifest))
    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            build_index(manifest, jobs=1)
    total = -(-manifest.stat().st_size // 1000)
    with monkeypatch.context() as patch:
        killed_after(patch, total - 5)
        build_index(manifest, jobs=1)
    assert f"{manifest}: 5 of {total} pieces of its index are there already\n" in capsys.readouterr().err
    assert files(manifest) == whole
    assert sorted(entry.name for entry in manifest.parent.iterdir()) == ["train.jsonl", "train.jsonl.idx"]


def test_pieces_of_a_manifest_that_was_edited_are_read_again(manifest: Path, small_pieces, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            build_index(manifest, jobs=1)
    manifest.write_text(manifest.read_text("utf-8").replace('"duration": 1.5', '"duration": 7.5'), "utf-8")
    build_index(manifest, jobs=1)
    assert Manifest(manifest).seconds[4] == 7.5


def test_a_bad_line_of_a_later_piece_has_its_number_in_the_file(manifest: Path, small_pieces) -> None:
    lines = manifest.read_text("utf-8").split("\n")
    manifest.write_text("\n".join([*lines[:250], "{", *lines[251:]]), "utf-8")
    with pytest.raises(HarkenError, match=r"train.jsonl line 251 is not a Lhotse cut with `id` and `duration`"):
        build_index(manifest, jobs=1)


def test_a_text_that_is_no_text_is_named(manifest: Path) -> None:
    manifest.write_text('{"id": "a", "duration": 1, "supervisions": [{"text": 5}]}\n')
    with pytest.raises(HarkenError, match=r"line 1 is not a Lhotse cut with `id` and `duration`: AttributeError"):
        build_index(manifest)


def test_equal_hashes_are_no_equal_ids(manifest: Path, monkeypatch) -> None:
    """With a hash of four values nearly all ids collide; only a real twin is refused, at its own line."""
    monkeypatch.setattr(index, "key", lambda name: len(name) % 4)
    assert build_index(manifest) == COUNT
    lines = manifest.read_text("utf-8").splitlines()
    manifest.write_text("\n".join([*lines, lines[17], lines[3]]) + "\n", "utf-8")
    with pytest.raises(HarkenError, match=rf"train.jsonl line {COUNT + 1}: cut id `ü17` occurs twice"):
        build_index(manifest)


def test_an_older_index_is_made_anew_with_one_line(manifest: Path, capsys) -> None:
    build_index(manifest)
    folder = index_folder(manifest)
    for name in set(INDEX_FILES) - set(EARLIER_FILES):
        (folder / name).unlink()
    card = json.loads((folder / "card.json").read_text())
    del card["columns"]
    (folder / "card.json").write_text(json.dumps(card))
    assert Manifest(manifest).hashes[3] == key("ü3")
    assert capsys.readouterr().err == f"{manifest}: its index is an older one without all columns: indexing again\n"
    assert set(files(manifest)) == set(INDEX_FILES)
    Manifest(manifest)
    assert capsys.readouterr().err == ""


def test_a_damaged_column_is_named(manifest: Path) -> None:
    build_index(manifest)
    os.truncate(index_folder(manifest) / "hashes.npy", 200)
    with pytest.raises(HarkenError, match=r"hashes.npy cannot be read \(.*\): run `harken data index .*train.jsonl`"):
        np.asarray(Manifest(manifest).hashes)
