"""Tokenizers: class 0 is the blank, texts survive the round trip, and what cannot be encoded is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from harken.core.errors import HarkenError
from harken.data.tokens import BLANK, BytePieces, Characters, Pieces, load_tokenizer

TEXTS = ["the cat sat on the mat", "it's a dog's life", "the dog sat too", "a cat and a mat", "sit on it then"] * 4


def characters(folder: Path) -> Path:
    Characters.train(TEXTS).save(folder / "tokens.txt")
    return folder / "tokens.txt"


def pieces(folder: Path) -> Path:
    Pieces.train(TEXTS, folder / "bpe.model", 40)
    return folder / "bpe.model"


def byte_pieces(folder: Path) -> Path:
    BytePieces.train(TEXTS, folder / "bytes.model", 270)
    return folder / "bytes.model"


@pytest.mark.parametrize("make", [characters, pieces, byte_pieces])
def test_texts_survive_and_the_blank_is_nobodys(make, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make(tmp_path))
    assert BLANK == 0
    assert len(tokenizer.symbols()) == tokenizer.size
    assert tokenizer.symbols()[BLANK] == "<blank>"
    seen = set()
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        seen |= set(tokens)
    assert min(seen) >= 1
    assert max(seen) < tokenizer.size
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_characters_are_one_class_each_in_a_readable_file(tmp_path: Path) -> None:
    path = characters(tmp_path)
    lines = path.read_text().splitlines()
    assert lines[:2] == ["<space>", "'"]
    assert lines[2:] == sorted(lines[2:])
    tokenizer = load_tokenizer(path)
    assert tokenizer.size == len(lines) + 1
    assert tokenizer.encode("a t") == [lines.index("a") + 1, 1, lines.index("t") + 1]


def test_pieces_are_fewer_than_characters(tmp_path: Path) -> None:
    path = pieces(tmp_path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.size == 40
    assert len(tokenizer.encode("the cat sat on the mat")) < len("the cat sat on the mat")
    assert [item.name for item in tmp_path.iterdir()] == ["bpe.model"], "no vocabulary file or temporary is left"


def test_more_pieces_than_the_texts_hold_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(HarkenError, match="sentencepiece could not train 4000 classes"):
        Pieces.train(TEXTS, tmp_path / "bpe.model", 4000)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_encoded_or_found_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(characters(tmp_path))
    with pytest.raises(HarkenError, match=r"character 'Q' of `a Quiz` is not among the \d+ of the tokenizer"):
        tokenizer.encode("a Quiz")
    with pytest.raises(HarkenError, match=r"no tokenizer at .*none.txt; `harken data tokens MANIFEST --out"):
        load_tokenizer(tmp_path / "none.txt")


def test_a_tokenizer_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(characters(tmp_path))
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a cat") == tokenizer.encode("a cat")


def test_byte_pieces_know_every_script_and_survive_broken_bytes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_pieces(tmp_path))
    assert isinstance(tokenizer, BytePieces)
    for text in ("naïve café", "中文 句子", "пример", "🙂 x\u2800y", "The CAT"):
        assert tokenizer.unknown(text) == set()
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = tokenizer.encode("中a")
    assert tokenizer.decode(tokens[:-2] + tokens[-1:]) == "a", "a character that lacks a byte is left out"
    assert len(set(tokenizer.symbols())) == tokenizer.size
    assert "a" in tokenizer.symbols()
    assert len(tokenizer.encode("the cat sat on the mat")) < len("the cat sat on the mat")


def test_pieces_over_characters_are_not_taken_for_bytes(tmp_path: Path) -> None:
    assert type(load_tokenizer(pieces(tmp_path))) is Pieces
