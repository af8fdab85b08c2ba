"""n-gram models: estimated, scored by state, written and read as ARPA; against numbers worked out by hand."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from harken.core.errors import HarkenError
from harken.decode.arpa import load_arpa, save_arpa
from harken.decode.kneser_ney import FALLBACK_DISCOUNTS, discounts, train_ngram
from harken.decode.ngram import END, UNKNOWN, NGram, NGramScorer, word_of

TEXTS = [
    "okay let me see it",
    "now leave us alone",
    "a responsibility that is borne by his successors",
    "the missionaries in the jungle can speak pygmy",
    "i want to sneak a surprise cake in",
    "let me in now",
    "the cake is in the jungle",
    "leave it to me",
]
CHARACTERS = sorted(set("".join(TEXTS)))


@pytest.fixture(scope="module")
def model() -> NGram:
    return train_ngram(TEXTS, order=4, vocabulary=[*CHARACTERS, "q"])


def test_every_context_of_a_model_sums_to_one(model: NGram) -> None:
    for state in model.contexts:
        assert np.exp(model.distribution(state)).sum() == pytest.approx(1.0, abs=1e-9)


def test_score_distribution_and_state_agree(model: NGram) -> None:
    for text in ["the jungle", "quay", "zzz let"]:
        state = model.start()
        for character in text:
            word = model.id_of.get(word_of(character), model.id_of[UNKNOWN])
            everything = model.distribution(state)
            log_prob, after = model.score(state, word)
            assert log_prob == pytest.approx(everything[word])
            assert after == model.advance(state, word)
            assert len(after) < model.order
            state = after


def test_kneser_ney_against_numbers_worked_out_by_hand() -> None:
    # Texts `ab`, `ab`, `b`; order 2. Bigrams: <s>a 2, ab 2, b</s> 3, <s>b 1. Continuations: a 1, b 2, </s> 1.
    # Both orders lack what modified Kneser-Ney needs (counts of counts), so the discounts are 0.5, 1, 1.5.
    lm = train_ngram(["ab", "ab", "b"], order=2)
    uniform = 1 / 4  # <unk>, </s>, a, b
    withheld = (0.5 + 1.0 + 0.5) / 4
    a = (1 - 0.5) / 4 + withheld * uniform
    b = (2 - 1.0) / 4 + withheld * uniform
    a_after_start = (2 - 1.0) / 3 + (1.0 + 0.5) / 3 * a
    b_after_a = (2 - 1.0) / 2 + 1.0 / 2 * b
    end_after_b = (3 - 1.5) / 3 + 1.5 / 3 * a  # `</s>` has the continuation count of `a`
    assert lm.log_prob("ab") == pytest.approx(math.log(a_after_start * b_after_a * end_after_b))
    unseen, _ = lm.score((lm.id_of["b"],), lm.id_of["a"])
    assert unseen == pytest.approx(math.log(1.5 / 3 * a))


def test_discounts_are_those_of_the_paper_or_the_fallback() -> None:
    counts = {(number,): value for number, value in enumerate([1] * 10 + [2] * 4 + [3] * 2 + [4] + [9])}
    share = 10 / (10 + 2 * 4)
    expected = (1 - 2 * share * 4 / 10, 2 - 3 * share * 2 / 4, 3 - 4 * share * 1 / 2)
    assert discounts(counts) == pytest.approx(expected)
    assert discounts({(0,): 5, (1,): 7}) == FALLBACK_DISCOUNTS


def test_a_longer_context_predicts_unseen_text_better_than_a_short_one() -> None:
    held_out = "let me see the cake"
    scores = [train_ngram(TEXTS, order=order).log_prob(held_out) for order in (1, 2, 3)]
    assert scores == sorted(scores)


def test_arpa_keeps_the_model(tmp_path: Path, model: NGram) -> None:
    save_arpa(model, tmp_path / "lm.arpa")
    text = (tmp_path / "lm.arpa").read_text(encoding="utf-8")
    assert text.startswith("\\data\\\nngram 1=")
    assert "\t▁\t" in text, "a space is written so that others can read the file"
    save_arpa(model, tmp_path / "again.arpa.gz")
    with gzip.open(tmp_path / "again.arpa.gz", "rt", encoding="utf-8") as stream:
        assert stream.read() == (tmp_path / "lm.arpa").read_text(encoding="utf-8")
    with gzip.open(tmp_path / "lm.arpa.gz", "wt", encoding="utf-8") as stream:
        stream.write("a remark before the data\n\n" + text)
    for name in ("lm.arpa", "lm.arpa.gz"):
        again = load_arpa(tmp_path / name)
        assert again.order == model.order
        assert set(again.words) == set(model.words)
        for sentence in [*TEXTS, "quite unseen, really", ""]:
            words = [word_of(character) for character in sentence]
            assert again.log_prob(words) == pytest.approx(model.log_prob(words), rel=1e-6)


ARPA = """\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-1.0 <unk>
-99 <s> -0.3
-0.5 </s>
-0.25\ta\t-0.2

\\2-grams:
-0.1 <s> a
-0.4 a a

\\end\\
"""


def test_back_off_of_an_arpa_file_by_hand(tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA)
    lm = load_arpa(tmp_path / "lm.arpa")
    ten = math.log(10)
    assert lm.log_prob(["a", "a"]) == pytest.approx(ten * (-0.1 - 0.4 + (-0.2 - 0.5)))
    assert lm.log_prob([]) == pytest.approx(ten * (-0.3 - 0.5))
    assert lm.log_prob(["x"]) == pytest.approx(ten * (-0.3 - 1.0 - 0.5))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "data", "no `\\data\\` line"),
        ("ngram 2=2", "ngram 3=2", "line 3: expected `ngram 2=COUNT`"),
        ("-0.4 a a\n", "", "line 14: expected a log-probability and 2 words (2 such lines in this section)"),
        ("-0.4 a a\n", "-0.4 a b\n", "line 13: expected words that are listed as 1-grams, found `b`"),
        ("-0.4 a a\n", "-0.4 a a -0.1\n", "line 13: expected a log-probability and 2 words"),
        ("-0.25\ta", "x\ta", "line 9: expected a number"),
        ("\\end\\\n", "", "expected `\\end\\`, found `the end of the file`"),
        ("ngram 1=4", "ngram 1=3", "line 9: expected `\\2-grams:`"),
    ],
)
def test_a_broken_arpa_file_is_one_error_with_the_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ARPA
    (tmp_path / "lm.arpa").write_text(ARPA.replace(old, new, 1))
    with pytest.raises(HarkenError) as error:
        load_arpa(tmp_path / "lm.arpa")
    assert message in str(error.value)
    assert "lm.arpa" in str(error.value)


def test_a_missing_a_binary_and_a_cut_gzip_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(HarkenError, match="no n-gram model at"):
        load_arpa(tmp_path / "none.arpa")
    (tmp_path / "binary.arpa").write_bytes(bytes(range(256)))
    with pytest.raises(HarkenError, match="expected an ARPA file in UTF-8"):
        load_arpa(tmp_path / "binary.arpa")
    whole = gzip.compress(ARPA.encode() * 50)
    (tmp_path / "cut.arpa.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HarkenError):
        load_arpa(tmp_path / "cut.arpa.gz")


@pytest.mark.parametrize("texts", [["tab\there"], [["<s>"]], [[""]], []])
def test_texts_that_make_no_model_are_errors(texts) -> None:
    with pytest.raises(HarkenError):
        train_ngram(texts, order=3)


def test_symbols_find_their_words(model: NGram) -> None:
    scorer = NGramScorer(model, ["<blank>", "<space>", " ", "e", "Ω"], blank=0)
    space, also_space, e, unlisted = scorer.scores(scorer.start())[1:]
    assert space == also_space == pytest.approx(model.score(model.start(), model.id_of["▁"])[0])
    assert scorer.score(scorer.start(), 3)[0] == pytest.approx(e)
    assert unlisted == pytest.approx(model.score(model.start(), model.id_of[UNKNOWN])[0])
    assert scorer.end(scorer.start()) == pytest.approx(model.score(model.start(), model.id_of[END])[0])
    with pytest.raises(HarkenError, match="2 of 2 are not in it"):
        NGramScorer(model, ["<blank>", "▁the", "▁cake"], blank=0)
