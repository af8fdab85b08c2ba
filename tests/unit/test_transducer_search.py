"""A transducer's searches against a search written down hypothesis by hypothesis, and against all alignments."""

from __future__ import annotations

import itertools
import math
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch

from harken.core.errors import HarkenError
from harken.decode.arpa import save_arpa
from harken.decode.k2_search import FastBeamOptions, fast_beam_search
from harken.decode.kneser_ney import train_ngram
from harken.decode.ngram import NGramScorer
from harken.decode.search import DecodeConfig, make_search, make_transducer_search
from harken.decode.transducer import Networks, TransducerBeam, greedy_transducer_search, modified_beam_search
from harken.nn.transducer.networks import NO_TOKEN, Joiner, Predictor

BLANK = 0
CONTEXT = 2


def make(seed: int, classes: int, context: int = CONTEXT) -> Networks:
    torch.manual_seed(seed)
    networks = Networks(Predictor(classes, 8, context, BLANK), Joiner(6, 8, 12, classes))
    for module in (networks.predictor, networks.joiner):
        module.eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter) / max(1, parameter.dim() - 1))
    return networks


def frames_of(seed: int, size: int, count: int) -> torch.Tensor:
    return 2 * torch.randn(size, count, 12, generator=torch.Generator().manual_seed(seed))


def log_probs(networks: Networks, frame: torch.Tensor, tokens: tuple[int, ...]) -> np.ndarray:
    """Return (V,) after a hypothesis, from its whole history."""
    context = ([NO_TOKEN] * (CONTEXT - 1) + [BLANK, *tokens])[-CONTEXT:]
    logits = networks.joiner(frame, networks.predict(torch.tensor(context)))
    return logits.log_softmax(-1).double().numpy()


def by_hand(networks: Networks, frames: torch.Tensor, beam: int, scorer=None, weight=0.0, bonus=0.0) -> dict:
    """Return the score of each hypothesis that is kept."""
    kept = {(): (0.0, scorer.start() if scorer else ())}
    for frame in frames:
        grown = []
        for tokens, (score, state) in kept.items():
            for token, log_prob in enumerate(log_probs(networks, frame, tokens)):
                if token == BLANK:
                    grown.append((score + log_prob, tokens, state))
                    continue
                gain = bonus + (weight * scorer.scores(state)[token] if scorer else 0.0)
                after = scorer.advance(state, token) if scorer else ()
                grown.append((score + log_prob + gain, (*tokens, token), after))
        merged: dict = defaultdict(lambda: (-math.inf, ()))
        for score, tokens, state in sorted(grown, key=lambda one: -one[0])[:beam]:
            merged[tokens] = (np.logaddexp(merged[tokens][0], score), state)
        kept = dict(merged)
    return {
        tokens: (score + (weight * scorer.end(state) if scorer else 0.0)) / (len(tokens) + CONTEXT)
        for tokens, (score, state) in kept.items()
    }


def best_of(scores: dict) -> list[int]:
    return list(max(scores, key=lambda tokens: scores[tokens]))


@pytest.mark.parametrize("beam", [1, 2, 4, 9])
def test_the_beam_search_is_the_one_by_hand_for_each_utterance_of_a_batch(beam: int) -> None:
    lengths = torch.tensor([9, 4, 0, 7])
    found_some = 0
    for seed in range(4):
        networks, frames = make(seed, 5), frames_of(seed, 4, 9)
        found = modified_beam_search(frames, lengths, networks, TransducerBeam(beam=beam))
        expected = [best_of(by_hand(networks, one[:end], beam)) for one, end in zip(frames, lengths, strict=True)]
        assert found == expected
        found_some += len({tuple(one) for one in found})
    assert found_some > 8, "searches that always find nothing prove nothing"


@pytest.mark.parametrize("bonus", [0.0, 0.7])
def test_the_beam_search_weighs_a_language_model_and_bonuses(bonus: float) -> None:
    symbols = ["<blank>", "a", "b", "c"]
    scorer = NGramScorer(train_ngram(["abcab", "bca", "aab", "cab"], order=3), symbols, blank=BLANK)
    changed = 0
    for seed in range(6):
        networks, frames, lengths = make(seed, 4), frames_of(seed, 2, 7), torch.tensor([7, 5])
        options = TransducerBeam(beam=4, scorer=scorer, scorer_weight=0.6, bonus=np.full(4, bonus))
        found = modified_beam_search(frames, lengths, networks, options)
        expected = [
            best_of(by_hand(networks, one[:end], 4, scorer, 0.6, bonus))
            for one, end in zip(frames, lengths, strict=True)
        ]
        assert found == expected
        changed += found != modified_beam_search(frames, lengths, networks, TransducerBeam(beam=4))
    assert changed, "the model makes no difference"


def test_a_wide_beam_sums_over_all_alignments() -> None:
    """Of one token or a blank at each frame: 3 ** 4 of them."""
    for seed in range(5):
        networks, frames = make(seed, 3), frames_of(seed, 1, 4)
        sums: dict = defaultdict(lambda: -math.inf)
        for alignment in itertools.product(range(3), repeat=4):
            score = 0.0
            for place, token in enumerate(alignment):
                before = tuple(one for one in alignment[:place] if one != BLANK)
                score += log_probs(networks, frames[0, place], before)[token]
            tokens = tuple(one for one in alignment if one != BLANK)
            sums[tokens] = np.logaddexp(sums[tokens], score)
        expected = best_of({tokens: score / (len(tokens) + CONTEXT) for tokens, score in sums.items()})
        assert modified_beam_search(frames, torch.tensor([4]), networks, TransducerBeam(beam=81)) == [expected]


def test_greedy_takes_the_best_of_each_frame() -> None:
    lengths = torch.tensor([12, 5, 0])
    networks, frames = make(3, 6), frames_of(3, 3, 12)
    expected = []
    for one, end in zip(frames, lengths, strict=True):
        tokens: tuple[int, ...] = ()
        for frame in one[:end]:
            best = int(log_probs(networks, frame, tokens).argmax())
            tokens = tokens if best == BLANK else (*tokens, best)
        expected.append(list(tokens))
    assert greedy_transducer_search(frames, lengths, networks) == expected
    assert len(expected[0]) > 2


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_predictor_says_the_same_a_step_at_a_time(context: int) -> None:
    predictor = make(1, 5, context).predictor
    tokens = torch.tensor([[3, 1, 1, 4], [2, 2, 0, 0]])
    whole, contexts = predictor(tokens), predictor.start(2)
    assert whole.shape == (2, 5, 8)
    for place in range(5):
        torch.testing.assert_close(predictor.step(contexts), whole[:, place])
        if place < 4:
            contexts = torch.cat([contexts[:, 1:], tokens[:, place, None]], dim=1)


# Choosing


def test_searches_of_the_other_kind_of_model_are_refused(tmp_path) -> None:
    networks = make(0, 4)
    with pytest.raises(HarkenError, match="must be greedy or modified_beam for a transducer, got prefix_beam"):
        make_transducer_search(DecodeConfig(method="prefix_beam"), networks)
    with pytest.raises(HarkenError, match="must be greedy or prefix_beam for a CTC model, got modified_beam"):
        make_search(DecodeConfig(method="modified_beam"), 4, 0)
    with pytest.raises(HarkenError, match=r"`decode.token_top_k` .* with `decode.method` prefix_beam alone, got modif"):
        DecodeConfig(method="modified_beam", token_top_k=3)


def test_frames_that_are_not_numbers_are_refused() -> None:
    search = make_transducer_search(DecodeConfig(), make(0, 4))
    frames = frames_of(0, 2, 3)
    frames[1, 2] = math.nan
    assert len(search(frames, torch.tensor([3, 2]))) == 2
    with pytest.raises(HarkenError, match=r"1 of the 2 utterances of a batch have NaN frames \(the first is at 1\)"):
        search(frames, torch.tensor([3, 3]))
    with pytest.raises(HarkenError, match=r"expected frames \(B, T, 12\)"):
        search(frames[..., :5], torch.tensor([3, 3]))


def test_an_arpa_file_is_used_as_for_ctc(tmp_path) -> None:
    symbols = ["<blank>", "a", "b", "c"]
    model = train_ngram(["abcab", "bca"], order=2, vocabulary=symbols[1:])
    save_arpa(model, tmp_path / "lm.arpa")
    networks, frames, lengths = make(2, 4), frames_of(2, 2, 8), torch.tensor([8, 6])
    config = DecodeConfig(method="modified_beam", beam=4, ngram=str(tmp_path / "lm.arpa"), insertion_bonus=0.3)
    scorer = NGramScorer(model, symbols, blank=BLANK)
    options = TransducerBeam(beam=4, scorer=scorer, scorer_weight=0.5, bonus=np.full(4, 0.3))
    found = make_transducer_search(config, networks, symbols)(frames, lengths)
    assert found == modified_beam_search(frames, lengths, networks, options)


# k2's fast beam search


def test_without_k2_fast_beam_search_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "k2", None)
    with pytest.raises(HarkenError, match=r"`--method fast_beam` needs k2, .* or set `--method modified_beam`"):
        make_transducer_search(DecodeConfig(method="fast_beam"), make(0, 4))


def test_fast_beam_search_with_one_context_and_state_is_greedy() -> None:
    pytest.importorskip("k2")
    networks, frames, lengths = make(3, 5), frames_of(3, 3, 9), torch.tensor([9, 6, 8])
    search = fast_beam_search(networks, FastBeamOptions(beam=20.0, max_contexts=1, max_states=1))
    assert search(frames, lengths) == greedy_transducer_search(frames, lengths, networks)
