"""Error rates on texts whose errors are counted by hand, and what `harken score` writes, prints and refuses."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import kaldialign
import numpy as np
import pytest

from harken.apps import score as app
from harken.core.errors import HarkenError
from harken.evaluate.hypotheses import Utterance, read_hypotheses, write_hypotheses
from harken.evaluate.tables import SPEAKER_NOTE, errors_text, per_speaker_tsv, summary
from harken.evaluate.wer import Errors, Op, align, bootstrap, characters, count, score, to_json, words


def utterance(number: int, ref: str, hyp: str, speaker: str = "JOE", seconds: float = 2.0) -> Utterance:
    return Utterance(id=f"u{number:03}", speaker=speaker, ref=ref, hyp=hyp, seconds=seconds)


FIVE = [
    utterance(1, "okay let me see it", "okay lets see it"),  # 1 sub, 1 del of 5
    utterance(2, "now leave us alone", "now leave us alone", "FAYE"),  # right
    utterance(3, "no", "oh no no", "FAYE", 0.5),  # 2 ins of 1
    utterance(4, "", "uh", "NARR", 1.0),  # 1 ins of 0
    utterance(5, "the jungle", "", "BOB", 3.0),  # 2 del of 2
]


def line(**changes) -> str:
    return json.dumps({"id": "a", "speaker": "JOE", "ref": "x", "hyp": "y", "seconds": 1.0, **changes}) + "\n"


# Alignment and counts


@pytest.mark.parametrize(
    ("ref", "hyp", "expected"),
    [
        ("a b c", "a b c", (0, 0, 0, 3)),
        ("a b c", "a x c", (1, 0, 0, 3)),
        ("a b c", "a c", (0, 0, 1, 3)),
        ("a b c", "a b b c", (0, 1, 0, 3)),
        ("a b c", "", (0, 0, 3, 3)),
        ("", "a b", (0, 2, 0, 0)),
        ("", "", (0, 0, 0, 0)),
        ("a b", "c d e", (2, 1, 0, 2)),
    ],
)
def test_errors_counted_by_hand(ref: str, hyp: str, expected: tuple[int, int, int, int]) -> None:
    found = count(align(words(ref), words(hyp)))
    assert (found.sub, found.ins, found.deleted, found.ref) == expected


def test_the_alignment_spells_both_sides() -> None:
    ops = align(words("okay let me see it"), words("okay lets see it all"))
    assert [op.ref for op in ops if op.ref] == words("okay let me see it")
    assert [op.hyp for op in ops if op.hyp] == words("okay lets see it all")
    assert [op.kind for op in ops].count("ok") == 3
    assert ops[-1] == Op("ins", "", "all")


def test_counts_agree_with_the_edit_distance_on_random_sequences() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        ref, hyp = (list(generator.choice(list("abcd"), generator.integers(0, 12))) for _ in range(2))
        found, expected = count(align(ref, hyp)), kaldialign.edit_distance(ref, hyp)
        assert found.total == expected["total"]
        assert found.ref == len(ref)
        assert found.ref - found.deleted + found.ins == len(hyp)


def test_characters_count_one_space_between_words_and_composed_letters() -> None:
    assert characters("  a \t b\n") == ["a", " ", "b"]
    assert characters("e\u0301") == ["\u00e9"]
    assert words("cafe\u0301") == words("caf\u00e9")


def test_rates_are_sums_over_sums() -> None:
    result = score(FIVE)
    assert result.words == Errors(sub=1, ins=3, deleted=3, ref=12)
    assert result.words.rate == pytest.approx(7 / 12)
    assert result.characters.ref == 18 + 18 + 2 + 0 + 10
    assert result.seconds == 8.5
    assert list(result.speakers) == ["BOB", "FAYE", "JOE", "NARR"]
    faye = result.speakers["FAYE"]
    assert (faye.utterances, faye.seconds, faye.words) == (2, 2.5, Errors(ins=2, ref=5))
    assert sum((one.words for one in result.speakers.values()), Errors()) == result.words
    assert sum((one.characters for one in result.speakers.values()), Errors()) == result.characters
    assert math.isnan(result.speakers["NARR"].words.rate)


def test_no_utterances_is_an_error() -> None:
    with pytest.raises(HarkenError, match="no utterances"):
        score([])


# Bootstrap


def test_the_interval_is_seeded_and_holds_the_rate() -> None:
    generator = np.random.default_rng(1)
    errors = [Errors(sub=int(generator.binomial(8, 0.3)), ref=8) for _ in range(400)]
    rate = sum(errors, Errors()).rate
    low, high = bootstrap(errors, seed=3)
    assert (low, high) == bootstrap(errors, seed=3)
    assert (low, high) != bootstrap(errors, seed=4)
    assert low < rate < high
    # 400 utterances of 8 words at 0.3: standard error sqrt(0.3 * 0.7 / 3200)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 3200), rel=0.15)


def test_the_interval_agrees_with_kaldialigns() -> None:
    generator = np.random.default_rng(2)
    refs = [list(generator.choice(list("abcdef"), generator.integers(1, 15))) for _ in range(200)]
    hyps = [[token if generator.random() > 0.25 else "x" for token in ref] for ref in refs]
    low, high = bootstrap([count(align(ref, hyp)) for ref, hyp in zip(refs, hyps, strict=True)], resamples=4000)
    theirs = kaldialign.bootstrap_wer_ci(refs, hyps, replications=4000)
    assert low == pytest.approx(theirs["ci95min"], abs=0.004)
    assert high == pytest.approx(theirs["ci95max"], abs=0.004)


def test_an_interval_without_reference_tokens_is_nan_and_of_one_utterance_its_rate() -> None:
    assert all(math.isnan(limit) for limit in bootstrap([Errors(ins=2)]))
    assert bootstrap([Errors(sub=1, ref=4)]) == (0.25, 0.25)
    low, high = bootstrap([Errors(ins=1), Errors(sub=1, ref=2)])
    assert (low, high) != (math.nan, math.nan)
    assert low >= 0.5, "resamples without a reference word have no rate and are left out"


# Tables


def test_the_printed_table_has_rates_intervals_kinds_and_the_worst_speakers() -> None:
    lots = [utterance(number, "a b c d", "a b c x", "SPARKY") for number in range(10, 16)]
    text = summary(score([*FIVE, *lots]))
    assert text.startswith("11 utterances, 5 speakers, 20.5 s of audio\n")
    wer = next(row for row in text.splitlines() if row.startswith("WER"))
    assert wer.split()[1] == f"{100 * 13 / 36:.2f}"
    assert wer.split()[-6:] == ["13", "7", "3", "3", "36", "words"]
    assert wer.split()[3] == ".."
    assert "20 or more reference words:\n  SPARKY  WER  25.00" in text
    assert "BOB" not in text
    assert text.endswith(SPEAKER_NOTE)


def test_the_worst_speakers_are_all_ranked_when_none_has_many_words() -> None:
    rows = summary(score(FIVE)).splitlines()
    place = next(number for number, row in enumerate(rows) if row.startswith("Worst speakers"))
    assert [row.split()[0] for row in rows[place + 1 : place + 4]] == ["BOB", "FAYE", "JOE"]  # 100%, 40%, 40%
    assert "NARR" not in "".join(rows)


def test_a_table_without_any_reference_has_no_rate() -> None:
    text = summary(score([utterance(1, "", "uh")]))
    assert "WER        -" in text
    assert "nan" not in text


def test_per_speaker_table() -> None:
    rows = [row.split("\t") for row in per_speaker_tsv(score(FIVE)).splitlines()]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert set(table) == {"BOB", "FAYE", "JOE", "NARR"}
    assert table["FAYE"]["wer_percent"] == "40.00"
    assert table["FAYE"]["word_ins"] == "2"
    assert table["NARR"]["wer_percent"] == ""
    assert table["BOB"]["seconds"] == "3.00"


def test_a_speaker_with_a_tab_in_the_label_keeps_the_columns() -> None:
    rows = per_speaker_tsv(score([utterance(1, "a", "a", "BIG\tBOB")])).splitlines()
    assert rows[1].split("\t")[0] == "BIG BOB"
    assert len(rows[1].split("\t")) == len(rows[0].split("\t"))


def test_aligned_errors_stand_below_each_other() -> None:
    text = errors_text(score(FIVE))
    block = text[text.index("u001") :].split("\n\n")[0].splitlines()
    assert block[0] == "u001  speaker JOE  2.00 s  WER 40.00%: 1 sub, 0 ins, 1 del of 5 words"
    ref, hyp, marks = block[1:]
    assert ref.split() == ["ref", "okay", "let", "me", "see", "it"]
    assert sorted(marks.split()) == ["D", "S"]
    stars = hyp.index("*")
    assert hyp[stars : stars + 3] in ("***", "**" + hyp[stars + 2 : stars + 3])
    assert marks[stars] == "D"
    assert text.index("u003") < text.index("u004"), "most errors first"
    assert text.rstrip().endswith("u002"), "utterances without errors come last"
    assert "## Insertions: 3, the most common" in text


def test_long_utterances_are_wrapped() -> None:
    ref = " ".join(f"word{number}" for number in range(60))
    text = errors_text(score([utterance(1, ref, ref.replace("word30", "sword"))]), width=80)
    assert max(len(row) for row in text.splitlines() if row.startswith(("  ref", "  hyp"))) <= 80
    spelled = [word for row in text.splitlines() if row.startswith("  ref") for word in row.split()[1:]]
    assert spelled == ref.split()


# Hypothesis files


def test_a_file_keeps_its_utterances(tmp_path: Path) -> None:
    odd = utterance(6, "caf\u00e9 \u2028 na\u00efve", 'quote " and \\', "\u5b57")
    write_hypotheses(tmp_path / "test.jsonl", [*FIVE, odd])
    assert read_hypotheses(tmp_path / "test.jsonl") == [*FIVE, odd]


def test_more_keys_and_blank_lines_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n" + line(score=-3.5, seconds=2) + "\n\n")
    (only,) = read_hypotheses(tmp_path / "test.jsonl")
    assert (only.id, only.seconds) == ("a", 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line() + "{broken", "line 2: expected one JSON object a line, found no JSON"),
        (line() + "\n[1, 2]\n", "line 3: expected a JSON object, got list"),
        (line() + '{"id": "b", "ref": "x"}', "line 2: missing `speaker`, `hyp`, `seconds`; found id, ref"),
        (line(hyp=None), "line 1: `hyp` must be text, got null"),
        (line(seconds="1"), '`seconds` must be a number of seconds, 0 or more, got "1"'),
        (line(seconds=-1), "0 or more, got -1"),
        (line(seconds=True), "0 or more, got true"),
        (line(seconds=math.nan), "0 or more, got NaN"),
        (line() + line(id="b") + line(), "line 3: the id `a` is already on line 1"),
        ("\n\n", "has no utterances"),
    ],
)
def test_a_malformed_line_is_one_error_with_its_number(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    with pytest.raises(HarkenError) as error:
        read_hypotheses(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_a_folder_and_audio_are_errors(tmp_path: Path) -> None:
    with pytest.raises(HarkenError, match="no hypothesis file at"):
        read_hypotheses(tmp_path / "none.jsonl")
    with pytest.raises(HarkenError, match="is a folder"):
        read_hypotheses(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"RIFF\xff\xfe\x00")
    with pytest.raises(HarkenError, match="is not UTF-8"):
        read_hypotheses(tmp_path / "a.wav")


# The verb


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    app.add_arguments(parser)
    return app.run(parser.parse_args(arguments))


def test_score_writes_three_files_beside_the_hypotheses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hypotheses(tmp_path / "test.jsonl", FIVE)
    assert run(str(tmp_path / "test.jsonl"), "--resamples", "200", "--seed", "7") == 0
    out = tmp_path / "test-score"
    assert sorted(path.name for path in out.iterdir()) == ["errors.txt", "per_speaker.tsv", "wer.json"]
    found = json.loads((out / "wer.json").read_text())
    result = score(FIVE, resamples=200, seed=7)
    assert found == {
        "hypotheses": str(tmp_path / "test.jsonl"),
        **to_json(result),
        "bootstrap": {"method": "utterances, percentile", "resamples": 200, "seed": 7},
    }
    assert found["wer"]["rate"] == pytest.approx(7 / 12, abs=1e-6)
    assert (found["wer"]["sub"], found["wer"]["ins"], found["wer"]["del"], found["wer"]["ref"]) == (
        1,
        3,
        3,
        12,
    )
    assert found["wer"]["ci95"][0] < 7 / 12 < found["wer"]["ci95"][1]
    assert found["speakers"]["NARR"]["wer"]["rate"] is None
    printed = capsys.readouterr().out
    assert summary(result) in printed
    assert str(out) in printed


def test_score_goes_where_it_is_told_and_refuses_without_writing(tmp_path: Path) -> None:
    write_hypotheses(tmp_path / "test.jsonl", FIVE)
    assert run(str(tmp_path / "test.jsonl"), "--out", str(tmp_path / "a/b")) == 0
    assert (tmp_path / "a/b/wer.json").is_file()
    (tmp_path / "bad.jsonl").write_text(line() + "oops\n")
    with pytest.raises(HarkenError, match="line 2"):
        run(str(tmp_path / "bad.jsonl"))
    with pytest.raises(HarkenError, match="`resamples` must be 1 or more, got 0"):
        run(str(tmp_path / "test.jsonl"), "--resamples", "0")
    assert not (tmp_path / "bad-score").exists()
    assert not (tmp_path / "test-score").exists()
