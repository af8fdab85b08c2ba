"""Choosing and building a search from its config, for CTC models and for transducers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from harken.core.batch import real_mask
from harken.core.errors import HarkenError, nearest
from harken.decode.arpa import load_arpa
from harken.decode.graph import Search
from harken.decode.greedy import greedy_search
from harken.decode.k2_search import FastBeamOptions, fast_beam_search
from harken.decode.ngram import SPACE, NGramScorer
from harken.decode.prefix_beam import BeamOptions, Floats, prefix_beam_search
from harken.decode.transducer import Networks, TransducerBeam, greedy_transducer_search, modified_beam_search

Method = Literal["greedy", "prefix_beam", "modified_beam", "fast_beam"]
METHODS: tuple[Method, ...] = get_args(Method)
WORD_BEGINNINGS = (" ", "<space>", SPACE)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How token ids are found. Weights and bonuses are in natural-log units."""

    method: Method = "greedy"
    """`greedy`; with beams, for which all below is, `prefix_beam` for CTC models and `modified_beam` for transducers.
    `fast_beam`, for transducers, is k2's and takes none of it."""
    beam: int = 16
    """Prefixes or hypotheses kept after each frame."""
    ngram: str | None = None
    """ARPA file (plain or .gz) of an n-gram model over the same tokens; a space is written `▁` in it."""
    ngram_weight: float = 0.5
    """What the model's log-probability is multiplied with (alpha of Hannun et al. 2014)."""
    insertion_bonus: float = 0.0
    """Added for each token; makes up for the length a language model costs (beta of Maas et al. 2015)."""
    word_bonus: float = 0.0
    """Added for each space, `|` and piece that begins with `▁`, that is for each word (beta of Hannun et al. 2014)."""
    token_top_k: int | None = None
    """In a frame, prefixes grow only by this many most probable tokens; None: by all. For `prefix_beam` alone."""
    token_min_log_prob: float | None = None
    """In a frame, prefixes grow only by tokens at least this probable, for example -8; None: by all. As above."""

    def __post_init__(self) -> None:
        """Refuse values that make no search: raises HarkenError that names the key."""
        if self.method not in METHODS:
            raise HarkenError(f"unknown `decode.method` `{self.method}`{nearest(self.method, METHODS)}")
        if self.beam < 1:
            raise HarkenError(f"`decode.beam` must be 1 or more, got {self.beam}")
        if self.token_top_k is not None and self.token_top_k < 1:
            raise HarkenError(f"`decode.token_top_k` must be 1 or more, or null for all tokens, got {self.token_top_k}")
        if self.token_min_log_prob is not None and not self.token_min_log_prob < 0:
            raise HarkenError(
                f"`decode.token_min_log_prob` must be a log-probability below 0, got {self.token_min_log_prob}"
            )
        if not math.isfinite(self.ngram_weight) or self.ngram_weight < 0:
            raise HarkenError(f"`decode.ngram_weight` must be 0 or more, got {self.ngram_weight}")
        for key in ("insertion_bonus", "word_bonus"):
            if not math.isfinite(getattr(self, key)):
                raise HarkenError(f"`decode.{key}` must be a finite number, got {getattr(self, key)}")
        if self.method in ("greedy", "fast_beam") and (
            self.ngram is not None or self.insertion_bonus or self.word_bonus
        ):
            raise HarkenError(
                "`decode.ngram`, `decode.insertion_bonus` and `decode.word_bonus` have no effect with `decode.method` "
                f"{self.method}; set `decode.method=prefix_beam`, for a transducer modified_beam, or leave them out"
            )
        if self.method != "prefix_beam" and (self.token_top_k, self.token_min_log_prob) != (None, None):
            raise HarkenError(
                "`decode.token_top_k` and `decode.token_min_log_prob` have an effect with `decode.method` prefix_beam "
                f"alone, got {self.method}; leave them out"
            )


def make_search(config: DecodeConfig, num_tokens: int, blank: int, symbols: Sequence[str] | None = None) -> Search:
    """Return a CTC model's search: (log_probs (B, T, V) natural-log, lengths (B,) in frames) -> B lists of token ids.

    num_tokens is V, the blank included. symbols are the V names of the tokens by id (that of the blank is not used); an
    n-gram model and a bonus for words need them.

    Raises HarkenError when the arguments do not fit each other, or the n-gram model cannot be read or is of other
    tokens. The search itself raises it for log-probabilities of another shape or with NaN in them.
    """
    scorer = _scorer(config, "prefix_beam", num_tokens, blank, symbols)
    if config.method == "greedy":
        return lambda log_probs, lengths: greedy_search(checked(log_probs, lengths, num_tokens), lengths, blank=blank)
    options = BeamOptions(
        blank=blank,
        beam=config.beam,
        scorer=scorer,
        scorer_weight=config.ngram_weight,
        bonus=_bonus(config, num_tokens, blank, symbols or ()),
        token_top_k=config.token_top_k,
        token_min_log_prob=config.token_min_log_prob,
    )

    def search(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        frames = checked(log_probs, lengths, num_tokens).detach().to("cpu", torch.float64).numpy()
        ends = lengths.tolist()
        return [prefix_beam_search(one[:end], options)[0].tokens for one, end in zip(frames, ends, strict=True)]

    return search


def make_transducer_search(config: DecodeConfig, networks: Networks, symbols: Sequence[str] | None = None) -> Search:
    """Return a transducer's search: (frames (B, T, J) projected for the joiner, lengths (B,)) -> B lists of ids.

    symbols and errors are as for `make_search`.
    """
    num_tokens, blank = networks.joiner.output.out_features, networks.predictor.blank
    width = networks.joiner.output.in_features
    scorer = _scorer(config, "modified_beam", num_tokens, blank, symbols)
    fast = fast_beam_search(networks, FastBeamOptions()) if config.method == "fast_beam" else None
    options = TransducerBeam(
        beam=config.beam,
        scorer=scorer,
        scorer_weight=config.ngram_weight,
        bonus=_bonus(config, num_tokens, blank, symbols or ()),
    )

    def search(frames: Tensor, lengths: Tensor) -> list[list[int]]:
        frames = checked(frames, lengths, width, "frames")
        if config.method == "greedy":
            return greedy_transducer_search(frames, lengths, networks)
        if fast is not None:
            return fast(frames, lengths)
        return modified_beam_search(frames, lengths, networks, options)

    return search


def _scorer(
    config: DecodeConfig, beam: Method, num_tokens: int, blank: int, symbols: Sequence[str] | None
) -> NGramScorer | None:
    """Return the n-gram model that is asked for; beam: the beam search of this kind of model."""
    if config.method not in ("greedy", beam) and (config.method, beam) != ("fast_beam", "modified_beam"):
        kind = "a CTC model" if beam == "prefix_beam" else "a transducer"
        raise HarkenError(f"`decode.method` must be greedy or {beam} for {kind}, got {config.method}")
    if not 0 <= blank < num_tokens:
        raise HarkenError(f"the blank must be one of the {num_tokens} tokens (0 to {num_tokens - 1}), got {blank}")
    if symbols is not None and len(symbols) != num_tokens:
        raise HarkenError(f"expected a name for each of the {num_tokens} tokens, got {len(symbols)} names")
    if symbols is None and (config.ngram is not None or config.word_bonus):
        raise HarkenError(
            "`decode.ngram` and `decode.word_bonus` need the names of the tokens, and this model has none"
        )
    return None if config.ngram is None else NGramScorer(load_arpa(config.ngram), symbols or (), blank=blank)


def _bonus(config: DecodeConfig, num_tokens: int, blank: int, symbols: Sequence[str]) -> Floats:
    bonus = np.full(num_tokens, config.insertion_bonus)
    for number, symbol in enumerate(symbols):
        if number != blank and (symbol == "|" or symbol.startswith(WORD_BEGINNINGS)):
            bonus[number] += config.word_bonus
    return bonus


def checked(log_probs: Tensor, lengths: Tensor, width: int, kind: str = "log-probabilities") -> Tensor:
    """Return them as they are. Raises HarkenError for another shape than `(B, T, width)` and for NaN in them."""
    if log_probs.dim() != 3 or log_probs.shape[2] != width or lengths.shape != log_probs.shape[:1]:
        raise HarkenError(
            f"expected {kind} (B, T, {width}) and lengths (B,), got {tuple(log_probs.shape)} and {tuple(lengths.shape)}"
        )
    if lengths.numel() and int(lengths.max()) > log_probs.shape[1]:
        raise HarkenError(f"a length of {int(lengths.max())} frames is more than the {log_probs.shape[1]} there are")
    inside = real_mask(lengths, log_probs.shape[1], log_probs.device)
    broken = (log_probs.isnan().any(dim=2) & inside).any(dim=1)
    if bool(broken.any()):
        raise HarkenError(
            f"{int(broken.sum())} of the {len(broken)} utterances of a batch have NaN {kind} (the first is "
            f"at {int(broken.nonzero()[0])}); the checkpoint or its precision is at fault, not the search"
        )
    return log_probs
