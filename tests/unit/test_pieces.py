"""Work in pieces: put together it is what one call makes, a piece that is started again goes on, mistakes are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harken.apps.main import main
from harken.core.errors import HarkenError
from harken.core.pieces import Piece, Pieces, shared_folder
from harken.data import parallel


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "3/", "a/b", "1/0"])
def test_a_piece_is_a_number_of_a_count(text: str) -> None:
    with pytest.raises(HarkenError, match="`--piece` must be a number of a count, such as 3/8"):
        Piece.parse(text)


def test_pieces_share_the_chunks_and_a_second_start_does_only_what_is_left(tmp_path: Path) -> None:
    done: list[int] = []

    def do(chunk: int) -> int:
        if chunk == 5 and 5 not in done:
            done.append(5)
            raise OSError("a disk that is full")
        done.append(chunk)
        return chunk * chunk

    pieces = Pieces(tmp_path / "p", {"of": "squares"}, 8)
    with pytest.raises(OSError, match="full"):
        pieces.work(Piece(3, 3), do)
    assert pieces.work(Piece(3, 3), do) == 1, "chunk 2 was kept, chunk 5 is done again"
    again = Pieces(tmp_path / "p", {"of": "squares"}, 8)
    assert again.work(Piece(1, 3), do) == 3
    assert list(again.results(do)) == [chunk * chunk for chunk in range(8)]
    assert sorted(done) == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    with pytest.raises(HarkenError, match="holds pieces of other work, its of differs"):
        Pieces(tmp_path / "p", {"of": "cubes"}, 8)
    again.remove()
    assert not (tmp_path / "p").exists()


def test_a_folder_that_two_make_is_the_first_ones(tmp_path: Path) -> None:
    with shared_folder(tmp_path / "a") as late:
        (late / "who").write_text("late")
        (tmp_path / "a").mkdir()
        (tmp_path / "a/who").write_text("early")
    assert (tmp_path / "a/who").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "nothing is left of the other"


def test_scan_and_verify_in_pieces_write_what_one_call_writes(corpus, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(parallel, "CHUNK", 5)
    audio = tmp_path / "audio"
    shutil.copytree(corpus.root / "audio", audio)
    (audio / "train-003.flac").write_bytes(b"no audio")
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    scan = ["data", "scan", str(audio), "--jobs", "1", "--out"]
    assert main([*scan, str(whole)]) == 0
    for piece in ("2/3", "1/3"):  # the third is never done: the last call does it
        assert main([*scan, str(parts), "--piece", piece]) == 0
    assert not parts.exists()
    assert main([*scan, str(parts)]) == 0
    assert parts.read_bytes() == whole.read_bytes()
    assert (tmp_path / "parts.jsonl.quarantine.tsv").read_text() == Path(f"{whole}.quarantine.tsv").read_text()

    (audio / "train-007.flac").write_bytes(b"gone bad since")
    assert main(["data", "verify", str(whole), "--jobs", "1"]) == 1
    one = Path(f"{whole}.verify.tsv").read_text()
    assert "train-007" in one
    for piece in ("1/2", "2/2"):
        assert main(["data", "verify", str(parts), "--jobs", "1", "--piece", piece]) == 0
    capsys.readouterr()
    shutil.rmtree(audio)  # what pieces have decoded is not decoded again
    assert main(["data", "verify", str(parts), "--jobs", "1", "--sample-rate", "8000"]) == 2
    assert "holds pieces of other work, its sample_rate differs" in capsys.readouterr().err
    assert main(["data", "verify", str(parts), "--jobs", "1"]) == 1
    assert Path(f"{parts}.verify.tsv").read_text() == one
    assert not list(tmp_path.glob("*.pieces"))


def test_labels_in_pieces_are_those_of_one_call(corpus, tmp_path: Path, monkeypatch) -> None:
    from harken.units import label

    monkeypatch.setattr(label, "BATCHES_OF_A_PIECE", 1)
    command = ["units", "label", str(corpus.train), str(corpus.valid), "--clusterer", str(corpus.clusterer)]
    command += ["--jobs", "1", "--out", str(tmp_path / "labels")]
    assert main([*command, "--piece", "2/2"]) == 0
    assert not (tmp_path / "labels/card.json").exists()
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "labels/pieces").iterdir()}
    assert first
    assert main([*command, "--piece", "1/2"]) == 0
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "labels/pieces").iterdir()}
    assert len(now) > len(first)
    assert first.items() <= now.items(), "a piece does its own alone"
    assert main(command) == 0
    for name in ("labels.bin", "index.npy", "ids.txt", "card.json"):
        assert (tmp_path / "labels" / name).read_bytes() == (corpus.labels / name).read_bytes()


def test_decoding_in_pieces_writes_what_one_call_writes(corpus, tmp_path: Path, monkeypatch, capsys) -> None:
    from harken.apps import decode

    monkeypatch.setattr(decode, "CHUNK_BATCHES", 2)
    settings = corpus.settings("ctc", "filterbank")
    settings["train"]["steps"] = 1
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "ctc.yaml")
    assert main(["train", str(tmp_path / "ctc.yaml"), "--exp", str(tmp_path / "exp")]) == 0
    command = ["decode", str(tmp_path / "exp"), str(corpus.train), "--max-seconds", "12", "--workers", "0", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    for piece in ("3/3", "1/3"):
        assert main([*command, str(tmp_path / "parts"), "--piece", piece]) == 0
    assert not (tmp_path / "parts/train.jsonl").exists()
    kept = {path.name for path in (tmp_path / "parts/train.pieces").iterdir()}
    assert len(kept) > 3
    capsys.readouterr()
    beam = ["--method", "prefix_beam", "--beam", "2"]
    assert main([*command, str(tmp_path / "parts"), *beam]) == 2
    assert "holds pieces of other work, its method, beam" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "parts")]) == 0
    assert (tmp_path / "parts/train.jsonl").read_bytes() == (tmp_path / "whole/train.jsonl").read_bytes()
    assert not (tmp_path / "parts/train.pieces").exists()
