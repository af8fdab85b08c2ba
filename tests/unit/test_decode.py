"""CTC search against all alignments, one by one, alone and with an n-gram model."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from harken.config.structure import structure
from harken.core.errors import HarkenError
from harken.decode.arpa import save_arpa
from harken.decode.greedy import greedy_search
from harken.decode.kneser_ney import train_ngram
from harken.decode.ngram import NGram, NGramScorer
from harken.decode.prefix_beam import BeamOptions, prefix_beam_search
from harken.decode.search import DecodeConfig, make_search

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


def random_log_probs(seed: int, frames: int, tokens: int, *, sharpness: float = 1.5) -> np.ndarray:
    logits = sharpness * np.random.default_rng(seed).standard_normal((frames, tokens))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def collapse(alignment, blank: int) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(alignment) if token != blank)


def enumerate_alignments(log_probs: np.ndarray, blank: int) -> dict[tuple[int, ...], float]:
    """Return log P_ctc of every token sequence, from all V ** T alignments."""
    sums: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
    for alignment in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        log_prob = sum(frame[token] for frame, token in zip(log_probs, alignment, strict=True))
        labels = collapse(alignment, blank)
        sums[labels] = np.logaddexp(sums[labels], log_prob)
    return dict(sums)


@pytest.fixture(scope="module")
def model() -> NGram:
    return train_ngram(TEXTS, order=4, vocabulary=[*CHARACTERS, "q"])


# Greedy


@pytest.mark.parametrize("blank", [0, 2])
def test_greedy_is_the_collapsed_best_path_of_each_length(blank: int) -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(7, 40, 4).log_softmax(-1)
    lengths = torch.tensor([40, 1, 0, 17, 39, 40, 5])
    expected = [
        list(collapse(one[:length].argmax(-1).tolist(), blank))
        for one, length in zip(log_probs, lengths.tolist(), strict=True)
    ]
    assert greedy_search(log_probs, lengths, blank=blank) == expected
    assert any(len(set(one)) > 1 for one in expected)


def test_greedy_keeps_repeats_parted_by_a_blank_and_merges_the_others() -> None:
    path = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 0, 0, 3], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]])
    log_probs = torch.nn.functional.one_hot(path, 4).float().log()
    assert greedy_search(log_probs, torch.tensor([10, 4]), blank=0) == [[1, 1, 2, 3], [3]]


def test_greedy_of_no_frames_and_of_no_utterances() -> None:
    assert greedy_search(torch.zeros(2, 0, 5), torch.tensor([0, 0]), blank=0) == [[], []]
    assert greedy_search(torch.zeros(0, 3, 5), torch.zeros(0, dtype=torch.long), blank=0) == []


# Prefix beam search


@pytest.mark.parametrize(("frames", "tokens"), [(1, 2), (1, 3), (2, 2), (3, 3), (4, 3), (5, 2), (5, 3), (4, 4)])
@pytest.mark.parametrize("blank_last", [False, True])
def test_a_wide_beam_finds_every_sequence_with_its_exact_probability(
    frames: int, tokens: int, *, blank_last: bool
) -> None:
    blank = tokens - 1 if blank_last else 0
    for seed in range(5):
        log_probs = random_log_probs(seed, frames, tokens)
        exact = enumerate_alignments(log_probs, blank)
        found = prefix_beam_search(log_probs, BeamOptions(blank=blank, beam=10_000))
        assert {tuple(one.tokens) for one in found} == set(exact)
        assert len(found) == len(exact), "a prefix is in the beam twice"
        for one in found:
            assert one.ctc == pytest.approx(exact[tuple(one.tokens)], abs=1e-10)
            assert one.score == one.ctc
        assert np.logaddexp.reduce([one.ctc for one in found]) == pytest.approx(0.0, abs=1e-10)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_the_best_sequence_need_not_be_the_best_path() -> None:
    # Graves 2012: blank wins each frame, but the alignments of one token together are more probable than none.
    log_probs = np.log([[0.6, 0.4], [0.6, 0.4]])
    assert greedy_search(torch.from_numpy(log_probs)[None], torch.tensor([2]), blank=0) == [[]]
    best = prefix_beam_search(log_probs, BeamOptions(blank=0, beam=4))[0]
    assert best.tokens == [1]
    assert best.ctc == pytest.approx(math.log(1 - 0.36))


@pytest.mark.parametrize("weight", [0.3, 1.7])
@pytest.mark.parametrize("bonus", [0.0, 0.8])
def test_fusion_ranks_by_the_weighted_sum_of_all_parts(weight: float, bonus: float) -> None:
    symbols = ["<blank>", "a", "b"]
    lm = train_ngram(["abba", "aab", "ba", "b"], order=3)
    scorer = NGramScorer(lm, symbols, blank=0)
    for seed in range(10):
        log_probs = random_log_probs(seed, 5, 3)
        expected = {
            labels: ctc + weight * lm.log_prob(symbols[label] for label in labels) + bonus * labels.count(2)
            for labels, ctc in enumerate_alignments(log_probs, 0).items()
        }
        options = BeamOptions(
            blank=0, beam=10_000, scorer=scorer, scorer_weight=weight, bonus=np.array([0.0, 0.0, bonus])
        )
        found = prefix_beam_search(log_probs, options)
        assert {tuple(one.tokens) for one in found} == set(expected)
        for one in found:
            assert one.score == pytest.approx(expected[tuple(one.tokens)], abs=1e-10)
        assert tuple(found[0].tokens) == max(expected, key=lambda labels: expected[labels])


def test_a_narrow_beam_never_counts_more_than_there_is_and_finds_the_best_of_sharp_frames() -> None:
    for seed in range(20):
        log_probs = random_log_probs(seed, 5, 4, sharpness=4.0)
        exact = enumerate_alignments(log_probs, 0)
        for beam in (1, 2, 3, 8):
            found = prefix_beam_search(log_probs, BeamOptions(blank=0, beam=beam))
            assert len(found) <= beam
            assert len({tuple(one.tokens) for one in found}) == len(found)
            assert all(one.ctc <= exact[tuple(one.tokens)] + 1e-10 for one in found)
        assert exact[tuple(found[0].tokens)] == max(exact.values())


def test_a_prefix_that_left_the_beam_and_came_back_meets_its_descendants() -> None:
    # Rare, so many draws: two entries for one prefix would split its probability.
    for seed in range(40):
        log_probs = random_log_probs(seed, 60, 3, sharpness=1.0)
        found = prefix_beam_search(log_probs, BeamOptions(blank=0, beam=12))
        assert len({tuple(one.tokens) for one in found}) == len(found)


def test_the_score_is_torchs_ctc_loss() -> None:
    log_probs = random_log_probs(3, 7, 4)
    found = prefix_beam_search(log_probs, BeamOptions(blank=0, beam=5_000))
    assert len(found) > 500
    for one in found[:100]:
        loss = torch.nn.functional.ctc_loss(
            torch.from_numpy(log_probs)[:, None],
            torch.tensor([one.tokens]),
            torch.tensor([7]),
            torch.tensor([len(one.tokens)]),
            reduction="sum",
        )
        assert one.ctc == pytest.approx(-loss.item(), abs=1e-9)


def test_pruned_tokens_do_not_begin_but_go_on() -> None:
    log_probs = np.log([[0.1, 0.8, 0.1], [0.7, 0.25, 0.05], [0.1, 0.2, 0.7]])
    top = prefix_beam_search(log_probs, BeamOptions(blank=0, beam=100, token_top_k=1))
    assert {tuple(one.tokens) for one in top} == {(), (1,), (2,), (1, 2)}
    floor = prefix_beam_search(log_probs, BeamOptions(blank=0, beam=100, token_min_log_prob=math.log(0.5)))
    # In the middle frame no prefix may grow into a new one; `1` goes on, and gets what the empty prefix gives it.
    assert {tuple(one.tokens) for one in floor} == {(), (1,), (2,), (1, 2)}
    kept = {tuple(one.tokens): one.ctc for one in floor}
    assert math.exp(kept[1, 2]) == pytest.approx((0.8 * (0.7 + 0.25) + 0.1 * 0.25) * 0.7)


def test_no_frames_give_the_empty_hypothesis() -> None:
    (only,) = prefix_beam_search(np.zeros((0, 5)), BeamOptions(blank=0, beam=4))
    assert (only.tokens, only.score) == ([], 0.0)


def test_hard_zeros_leave_what_is_possible_and_an_impossible_frame_is_no_crash() -> None:
    with np.errstate(divide="ignore"):
        certain = np.log([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with np.errstate(all="raise"):
        (only,) = prefix_beam_search(certain, BeamOptions(blank=0, beam=8))
        assert only.tokens == [1, 1]
        impossible = prefix_beam_search(np.full((3, 3), -np.inf), BeamOptions(blank=0, beam=8))
    assert [one.tokens for one in impossible] == [[]]


def test_three_seconds_are_searched_in_well_under_their_length(model: NGram) -> None:
    symbols = ["<blank>", *(chr(ord("a") + number) for number in range(26)), " ", "'", "-"]
    log_probs = random_log_probs(0, 150, len(symbols))
    scorer = NGramScorer(model, symbols, blank=0)
    for options in (
        BeamOptions(blank=0, beam=16),
        BeamOptions(blank=0, beam=16, scorer=scorer, scorer_weight=0.5),
    ):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            prefix_beam_search(log_probs, options)
            times.append(time.perf_counter() - start)
        assert min(times) < 0.25, "3 s at 50 frames a second; about 0.02 s on an idle core"


# The search as configured


def test_an_n_gram_model_mends_what_the_sound_leaves_open(tmp_path: Path, model: NGram) -> None:
    save_arpa(model, tmp_path / "lm.arpa")
    symbols = ["<blank>", *("<space>" if one == " " else one for one in CHARACTERS), "q"]
    id_of = {symbol: number for number, symbol in enumerate(symbols)}
    said = ["<space>" if one == " " else one for one in "the cake"]
    probs = np.full((2 * len(said), len(symbols)), 0.002)
    for place, symbol in enumerate(said):
        probs[2 * place, id_of[symbol]] = 0.5
        probs[2 * place + 1, 0] = 1.0
    probs[0, id_of["q"]] = 0.55  # `qhe cake` by sound alone
    log_probs = torch.from_numpy(np.log(probs / probs.sum(axis=1, keepdims=True)))[None]
    lengths = torch.tensor([len(probs)])

    def text(config: DecodeConfig) -> str:
        (tokens,) = make_search(config, len(symbols), 0, symbols)(log_probs, lengths)
        return "".join(" " if symbols[token] == "<space>" else symbols[token] for token in tokens)

    assert text(DecodeConfig()) == "qhe cake"
    assert text(DecodeConfig(method="prefix_beam")) == "qhe cake"
    assert text(DecodeConfig(method="prefix_beam", ngram=str(tmp_path / "lm.arpa"))) == "the cake"


def test_a_batch_is_searched_up_to_its_lengths_whatever_the_padding() -> None:
    log_probs = torch.from_numpy(np.stack([random_log_probs(seed, 12, 4) for seed in range(3)]))
    lengths = torch.tensor([12, 5, 0])
    for method in ("greedy", "prefix_beam"):
        search = make_search(DecodeConfig(method=method, beam=8), 4, 0)
        padded = log_probs.clone()
        padded[1, 5:] = padded[0, 5:]
        padded[2] = math.nan
        alone = [search(log_probs[i : i + 1, :length], lengths[i : i + 1])[0] for i, length in enumerate([12, 5, 0])]
        assert search(padded, lengths) == alone
        assert search(padded.float(), lengths) == alone
        assert alone[2] == []


def test_bonuses_lengthen_and_word_bonuses_count_words() -> None:
    log_probs = torch.from_numpy(np.stack([random_log_probs(seed, 30, 4, sharpness=0.5) for seed in range(6)]))
    lengths = torch.full((6,), 30)
    symbols = ["<blank>", "a", "<space>", "▁b"]

    def count(tokens: set[int], **keys: float) -> int:
        found = make_search(DecodeConfig(method="prefix_beam", **keys), 4, 0, symbols)(log_probs, lengths)
        return sum(token in tokens for one in found for token in one)

    assert count({1, 2, 3}, insertion_bonus=1.0) > count({1, 2, 3}) > count({1, 2, 3}, insertion_bonus=-1.0)
    assert count({2, 3}, word_bonus=2.0) > count({2, 3})
    assert count({1}, word_bonus=2.0) < count({1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "viterbi"}, "decode.method"),
        ({"method": "prefix_beam", "beam": 0}, "`decode.beam` must be 1 or more, got 0"),
        ({"method": "prefix_beam", "token_top_k": 0}, "`decode.token_top_k` must be 1 or more"),
        (
            {"method": "prefix_beam", "token_min_log_prob": 0.5},
            "`decode.token_min_log_prob` must be a log-probability",
        ),
        ({"method": "prefix_beam", "ngram_weight": -1.0}, "`decode.ngram_weight` must be 0 or more"),
        (
            {"method": "prefix_beam", "insertion_bonus": math.nan},
            "`decode.insertion_bonus` must be a finite number",
        ),
        ({"ngram": "lm.arpa"}, "set `decode.method=prefix_beam`"),
    ],
)
def test_settings_that_make_no_search_are_refused(values, message: str) -> None:
    with pytest.raises(HarkenError) as error:
        DecodeConfig(**values)
    assert message in str(error.value)


def test_the_config_reads_from_plain_data() -> None:
    found = structure(DecodeConfig, {"method": "prefix_beam", "beam": 8, "token_top_k": None, "ngram": None})
    assert found == DecodeConfig(method="prefix_beam", beam=8)


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    beam = DecodeConfig(method="prefix_beam")
    with pytest.raises(HarkenError, match=r"the blank must be one of the 4 tokens \(0 to 3\), got 4"):
        make_search(beam, 4, 4)
    with pytest.raises(HarkenError, match="expected a name for each of the 4 tokens, got 3 names"):
        make_search(beam, 4, 0, ["<blank>", "a", "b"])
    with pytest.raises(HarkenError, match="need the names of the tokens"):
        make_search(DecodeConfig(method="prefix_beam", ngram=str(tmp_path / "lm.arpa")), 4, 0)
    for method in ("greedy", "prefix_beam"):
        search = make_search(DecodeConfig(method=method), 4, 0)
        with pytest.raises(HarkenError, match=r"expected log-probabilities \(B, T, 4\).*got \(1, 2, 5\)"):
            search(torch.zeros(1, 2, 5), torch.tensor([2]))
        with pytest.raises(HarkenError, match="a length of 3 frames is more than the 2"):
            search(torch.zeros(1, 2, 4), torch.tensor([3]))
        broken = torch.zeros(2, 2, 4)
        broken[1, 1, 3] = math.nan
        with pytest.raises(HarkenError, match=r"1 of the 2 utterances.*NaN.*the first is at 1\)"):
            search(broken, torch.tensor([2, 2]))


def test_tokens_that_no_n_gram_file_could_hold_are_searched_without_one(tmp_path: Path, model: NGram) -> None:
    symbols = ["<blank>", "a", "\t", "\u00a0", "<space>"]
    log_probs = torch.from_numpy(random_log_probs(0, 12, 5))[None]
    for keys in ({}, {"insertion_bonus": 0.5}, {"word_bonus": 0.5}):
        search = make_search(DecodeConfig(method="prefix_beam", **keys), 5, 0, symbols)
        assert search(log_probs, torch.tensor([12])) != [[]]
    save_arpa(model, tmp_path / "lm.arpa")
    with pytest.raises(HarkenError, match=r"the token '\\t' cannot be a word of an n-gram model"):
        make_search(DecodeConfig(method="prefix_beam", ngram=str(tmp_path / "lm.arpa")), 5, 0, symbols)
