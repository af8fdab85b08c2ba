"""`harken data stats` and `tokens`: numbers counted by hand, a histogram that holds every cut, tokenizers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from harken.apps.main import main
from harken.core.errors import HarkenError
from harken.data.lines import text_of
from harken.data.manifest import Manifest
from harken.data.stats import bar, batches, bin_edges, describe, durations, length, render
from harken.data.tokens import Characters, Pieces, load_tokenizer

TEXTS = ["the cat sat", "the hat", None, "it's a hat that the cat sat on"]
SPEAKERS = ["Ann", "Ann", "Bob", None]


def cut(number: int, seconds: float, text: str | None = None, speaker: str | None = None) -> dict:
    recording = {
        "id": f"u{number}",
        "sources": [{"type": "file", "channels": [0], "source": f"/audio/{number}.flac"}],
        "sampling_rate": 8000 if number == 2 else 16000,
        "num_samples": round(16000 * seconds),
        "duration": seconds,
    }
    span = {"id": f"u{number}", "recording_id": f"u{number}", "start": 0.0, "duration": seconds, "channel": 0}
    words = {key: value for key, value in (("text", text), ("speaker", speaker)) if value is not None}
    plain = {"id": f"u{number}", "start": 0.0, "duration": seconds, "channel": 0, "type": "MonoCut"}
    return {**plain, "supervisions": [{**span, **words}] if words else [], "recording": recording}


def write(path: Path, cuts: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in cuts), encoding="utf-8")
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = zip([1.0, 2.0, 3.0, 10.0], TEXTS, SPEAKERS, strict=True)
    return write(tmp_path / "all.jsonl", [cut(number, *row) for number, row in enumerate(rows)])


def test_the_numbers_are_those_counted_by_hand(manifest: Path) -> None:
    stats = describe(Manifest(manifest), max_seconds=6.0)
    assert (stats.cuts, stats.durations.hours) == (4, pytest.approx(16 / 3600))
    d = stats.durations
    assert (d.min, d.median, d.mean, d.max) == (1.0, 2.5, 4.0, 10.0)
    assert d.p90 == pytest.approx(7.9)
    assert stats.speakers == {"Ann": pytest.approx(3 / 3600), "Bob": pytest.approx(3 / 3600)}
    assert stats.cuts_without_speaker == 1
    assert stats.sample_rates == {"16000": 3, "8000": 1}
    texts = stats.texts
    assert texts is not None
    assert (texts.cuts, texts.words, texts.distinct_words, texts.characters) == (3, 13, 8, 48)
    assert texts.words_a_second == pytest.approx(13 / 13)
    assert texts.characters_a_second == pytest.approx(48 / 13)
    assert texts.fastest == ("u0", 11.0)
    # the cuts of 1, 2 and 3 s would be 9 s padded in one batch of 6 s
    plan = stats.batches
    assert plan is not None
    assert (plan.too_long, plan.micro_batches) == (1, 2)


def test_padding_and_fill_of_the_plan() -> None:
    even = batches(np.full(12, 5.0, np.float32), 20.0, 1)
    assert even is not None
    assert (even.micro_batches, even.cuts_a_batch, even.padding, even.fill) == (3, 4.0, 0.0, 1.0)
    one_batch = batches(np.array([4.0, 8.0], np.float32), 20.0, 1)
    assert one_batch is not None
    assert (one_batch.padding, one_batch.fill) == (pytest.approx(0.25), pytest.approx(0.8))
    assert batches(np.array([30.0], np.float32), 20.0, 1) is None
    rng = np.random.default_rng(0)
    seconds = rng.gamma(2.0, 1.5, 2000).astype(np.float32) + 0.3
    one, two = batches(seconds, 60.0, 1), batches(seconds, 60.0, 2)
    assert one is not None
    assert two is not None
    assert two.padding <= one.padding < 0.1
    assert one.fill < two.fill, "a second part fills what the first leaves empty"


@pytest.mark.parametrize(
    "seconds",
    [
        [2.0],
        [3.0] * 50,
        [0.31, 9.3, 2.2],
        [12.0, 14.9, 15.0, 14.2],
        [*np.linspace(1, 2, 400), 3600.0],
        list(np.random.default_rng(1).gamma(2.0, 4.0, 5000)),
    ],
)
def test_every_cut_is_in_one_bin_and_the_bins_are_few(seconds: list[float]) -> None:
    values = np.asarray(seconds, np.float32)
    described = durations(values)
    assert sum(count for _, _, count, _ in described.bins) == len(values)
    assert sum(hours for *_, hours in described.bins) == pytest.approx(values.sum(dtype=np.float64) / 3600)
    assert 1 <= len(described.bins) <= 22
    for low, high, count, _ in described.bins[:-1]:
        exact = np.round(values.astype(np.float64), 4)
        assert count == ((exact >= low) & (exact < high)).sum()
    lows = [low for low, *_ in described.bins]
    assert lows == sorted(lows)
    assert lows[0] <= described.min


def test_a_long_tail_takes_one_line() -> None:
    edges = bin_edges(np.append(np.linspace(1, 2, 400), 3600.0))
    assert edges[-1] == 3600.0
    assert edges[-2] <= 2.1


def test_amounts_of_audio_are_told_in_hours_or_minutes() -> None:
    assert [length(seconds) for seconds in (3, 359.9, 360, 7200)] == ["0.05 min", "6.00 min", "0.10 h", "2.00 h"]


@pytest.mark.parametrize(
    ("share", "expected", "plain"),
    [(0.0, "", ""), (1.0, "████", "####"), (0.5, "██", "##"), (0.28, "█▏", "##"), (1e-6, "▏", "#")],
)
def test_bars(share: float, expected: str, plain: str) -> None:
    assert bar(share, 4) == expected
    assert bar(share, 4, unicode=False) == plain


def test_what_is_printed_and_written(manifest: Path, tmp_path: Path, capsys) -> None:
    other = write(tmp_path / "bare.jsonl", [cut(0, 2.0)])
    out = tmp_path / "stats.json"
    assert main(["data", "stats", str(manifest), str(other), "--out", str(out), "--max-seconds", "6"]) == 0
    printed = capsys.readouterr().out
    assert f"{manifest}: 4 cuts, 0.27 min" in printed
    assert "min 1.00  median 2.50  mean 4.00  p90 7.90  max 10.00" in printed
    assert "3 at 16000 Hz, 1 at 8000 Hz" in printed
    assert "2; most Ann 0.05 min, least 0.05 min; 1 cuts name none" in printed
    assert "3 cuts, 13 words (8 distinct), 1.00 words/s, 3.7 characters/s (most: u0, 11.0)" in printed
    assert "1 cuts are longer and left out" in printed
    assert "none named" in printed
    assert "█" in printed
    written = json.loads(out.read_text("utf-8"))
    assert [item["cuts"] for item in written] == [4, 1]
    assert written[1]["texts"] is None
    assert written[0]["texts"]["fastest"] == ["u0", 11.0]
    assert written[0]["durations"]["bins"][0] == [0.0, 2.0, 1, pytest.approx(1 / 3600)]


def test_a_terminal_without_unicode_gets_ascii(manifest: Path) -> None:
    stats = describe(Manifest(manifest), max_seconds=0.5)
    text = render(stats, unicode=False)
    text.encode("ascii")
    assert "none: every cut is longer than --max-seconds" in text
    assert max(map(len, text.splitlines())) <= 120


def test_nothing_to_describe_and_bad_options(tmp_path: Path, manifest: Path, capsys) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(HarkenError, match="holds no cut"):
        describe(Manifest(tmp_path / "empty.jsonl"))
    assert main(["data", "stats", str(manifest), "--max-seconds", "0"]) == 2
    assert "--max-seconds and --parts must be positive, got 0 and 2" in capsys.readouterr().err


def test_texts_are_read_as_training_reads_them() -> None:
    spans = [{"text": " hello "}, {"text": None}, {"text": ""}, {"speaker": "Ann"}, {"text": "there"}]
    assert text_of({"supervisions": spans}) == "hello there"
    assert text_of({"tracks": [{"cut": {"supervisions": [{"text": "one"}]}}, {"cut": {}}]}) == "one"
    assert not text_of({"supervisions": None})


def test_indexing_from_the_command_line(manifest: Path, tmp_path: Path, capsys) -> None:
    assert main(["data", "index", str(manifest)]) == 0
    assert f"{manifest}: 4 cuts, 0.27 min" in capsys.readouterr().out
    assert main(["data", "index", str(tmp_path / "none.jsonl")]) == 2
    assert "No such file" in capsys.readouterr().err


# Tokenizers


def test_characters_are_those_that_occur(manifest: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "tokens.txt"
    assert main(["data", "tokens", str(manifest), "--out", str(out)]) == 0
    assert "12 classes, the blank included, from 3 texts: <space> ' a c e h i n o s t" in capsys.readouterr().out
    tokenizer = load_tokenizer(out)
    assert tokenizer.size == 12
    for text in filter(None, TEXTS):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert 0 < min(ids) <= max(ids) < tokenizer.size
        assert tokenizer.decode(ids) == text
    with pytest.raises(HarkenError, match="character 'z' of `zoo` is not among the 11 of the tokenizer"):
        tokenizer.encode("zoo")


def test_bpe_pieces(manifest: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "bpe.model"
    assert main(["data", "tokens", str(manifest), "--out", str(out), "--kind", "bpe", "--size", "20"]) == 0
    assert "20 classes, the blank included, from 3 texts" in capsys.readouterr().out
    tokenizer = load_tokenizer(out)
    assert isinstance(tokenizer, Pieces)
    for text in filter(None, TEXTS):
        ids = tokenizer.encode(text)
        assert 0 < min(ids) <= max(ids) < tokenizer.size == 20
        assert tokenizer.decode(ids) == text
    assert main(["data", "tokens", str(manifest), "--out", str(out), "--size", "5000"]) == 2
    assert "could not train 5000 classes" in capsys.readouterr().err
    assert load_tokenizer(out).size == 20, "a failure leaves the old model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "t.txt", "--kind", "bpe"], r"--out must end in \.model for BPE"),
        (["--out", "t.model", "--kind", "characters"], r"got t\.model and --kind characters"),
        (["--out", "t.txt", "--size", "10"], "--size is of BPE"),
    ],
)
def test_options_that_contradict_each_other(manifest: Path, capsys, options: list[str], message: str) -> None:
    assert main(["data", "tokens", str(manifest), *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_corpus_without_texts_has_no_tokenizer(tmp_path: Path, capsys) -> None:
    bare = write(tmp_path / "bare.jsonl", [cut(0, 2.0)])
    assert main(["data", "tokens", str(bare), "--out", str(tmp_path / "t.txt")]) == 2
    assert "bare.jsonl has a text" in capsys.readouterr().err
    assert not (tmp_path / "t.txt").exists()


@pytest.mark.parametrize(("character", "name"), [("\n", "U+000A"), ("\u2028", "U+2028"), ("\x85", "U+0085")])
def test_a_line_break_in_a_text_would_change_the_classes(character: str, name: str) -> None:
    with pytest.raises(HarkenError, match=re.escape(f"the texts hold {name}")):
        Characters.train([f"hello{character}there"])


def test_every_other_character_survives_the_file(tmp_path: Path) -> None:
    text = "a\té ñ\u200cक्ष\u00a0中\U0001f600"
    tokenizer = Characters.train([text])
    tokenizer.save(tmp_path / "t.txt")
    assert load_tokenizer(tmp_path / "t.txt").decode(tokenizer.encode(text)) == text


def test_long_texts_are_not_left_out_of_bpe(tmp_path: Path) -> None:
    pieces = Pieces.train(["ab ba"] * 20 + ["xyz " * 2000], tmp_path / "t.model", 12)
    assert {"x", "y", "z"} <= set("".join(pieces.symbols()[2:]))


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    for name, message in [("t.model", "must be a sentencepiece model"), ("t.txt", "must be a list of characters")]:
        (tmp_path / name).write_bytes(b"\xff\xfe junk")
        with pytest.raises(HarkenError, match=message):
            load_tokenizer(tmp_path / name)
    with pytest.raises(HarkenError, match=r"no tokenizer at .*harken data tokens"):
        load_tokenizer(tmp_path / "none.txt")
