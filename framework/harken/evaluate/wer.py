"""Word and character error rates: aligned errors, totals, per speaker, and bootstrap confidence intervals.

Words are what whitespace separates. Characters are the code points of the text after NFC normalisation, each run of
whitespace being one space that counts as a character. Case and punctuation are scored as they stand: the recipe
normalises its texts.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import kaldialign
import numpy as np

from harken.core.errors import HarkenError
from harken.evaluate.hypotheses import Utterance

Kind = Literal["ok", "sub", "ins", "del"]

# No token is the empty string: words come from str.split and characters have length 1.
_GAP = ""


@dataclass(frozen=True)
class Op:
    """One column of an alignment; `ref` is empty for an insertion and `hyp` for a deletion."""

    kind: Kind
    ref: str
    hyp: str


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Numbers of substituted, inserted and deleted tokens, and of the reference tokens they are measured against."""

    sub: int = 0
    ins: int = 0
    deleted: int = 0
    ref: int = 0

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            sub=self.sub + other.sub,
            ins=self.ins + other.ins,
            deleted=self.deleted + other.deleted,
            ref=self.ref + other.ref,
        )

    @property
    def total(self) -> int:
        """Substitutions, insertions and deletions together."""
        return self.sub + self.ins + self.deleted

    @property
    def rate(self) -> float:
        """Errors for each reference token (0.25 is 25%); NaN where the reference is empty: there is no rate."""
        return self.total / self.ref if self.ref else math.nan


@dataclass(frozen=True, kw_only=True)
class UtteranceScore:
    """One utterance, its aligned words, and its word and character errors."""

    utterance: Utterance
    ops: tuple[Op, ...]
    words: Errors
    characters: Errors


@dataclass(frozen=True, kw_only=True)
class SpeakerScore:
    """Sums over the utterances of one speaker label."""

    utterances: int
    seconds: float
    words: Errors
    characters: Errors


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a hypothesis file; intervals are (low, high) 95% confidence limits of the rates."""

    utterances: tuple[UtteranceScore, ...]
    speakers: dict[str, SpeakerScore]
    words: Errors
    characters: Errors
    word_interval: tuple[float, float]
    character_interval: tuple[float, float]

    @property
    def seconds(self) -> float:
        """Seconds of audio scored."""
        return sum(speaker.seconds for speaker in self.speakers.values())


def words(text: str) -> list[str]:
    """Split a text into words (NFC, at whitespace)."""
    return unicodedata.normalize("NFC", text).split()


def characters(text: str) -> list[str]:
    """Split a text into characters (NFC code points, one space between words, none at the ends)."""
    return list(" ".join(words(text)))


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[Op, ...]:
    """Align two token sequences with the fewest errors (Levenshtein distance, all costs 1)."""
    return tuple(
        Op(_kind(ref, hyp), ref, hyp) for ref, hyp in kaldialign.align(list(reference), list(hypothesis), _GAP)
    )


def count(ops: Sequence[Op]) -> Errors:
    """Count the errors of an alignment."""
    kinds = [op.kind for op in ops]
    return Errors(
        sub=kinds.count("sub"),
        ins=kinds.count("ins"),
        deleted=kinds.count("del"),
        ref=len(kinds) - kinds.count("ins"),
    )


def score(utterances: Sequence[Utterance], *, resamples: int = 1000, seed: int = 0) -> Score:
    """Score utterances: every rate is a sum of errors over a sum of reference tokens, not a mean of rates.

    Raises HarkenError when there are no utterances or `resamples` is below 1.
    """
    if not utterances:
        raise HarkenError("there are no utterances to score; expected at least one")
    if resamples < 1:
        raise HarkenError(f"`resamples` must be 1 or more, got {resamples}")
    scored = tuple(_score_one(utterance) for utterance in utterances)
    speakers: dict[str, SpeakerScore] = {}
    for one in scored:
        label = one.utterance.speaker
        speakers[label] = _add_to(speakers.get(label), one)
    return Score(
        utterances=scored,
        speakers=dict(sorted(speakers.items())),
        words=sum((one.words for one in scored), Errors()),
        characters=sum((one.characters for one in scored), Errors()),
        word_interval=bootstrap([one.words for one in scored], resamples=resamples, seed=seed),
        character_interval=bootstrap([one.characters for one in scored], resamples=resamples, seed=seed),
    )


def bootstrap(errors: Sequence[Errors], *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles of the error rate over utterances drawn with replacement.

    Utterances are taken as independent, so the interval does not cover the choice of the speakers. NaN, NaN where no
    resample has a reference token.
    Source: Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation".
    """
    counts = np.array([(one.total, one.ref) for one in errors], dtype=np.int64).reshape(-1, 2)
    if not counts[:, 1].any():
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    sums = np.array([counts[generator.integers(0, len(counts), len(counts))].sum(axis=0) for _ in range(resamples)])
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        return math.nan, math.nan
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(low), float(high)


def to_json(result: Score) -> dict[str, Any]:
    """Return the totals, intervals and speakers as plain values; a rate that is not defined is None."""
    return {
        "utterances": len(result.utterances),
        "seconds": round(result.seconds, 3),
        "wer": {**_errors_json(result.words), "ci95": [_number(limit) for limit in result.word_interval]},
        "cer": {
            **_errors_json(result.characters),
            "ci95": [_number(limit) for limit in result.character_interval],
        },
        "speakers": {
            label: {
                "utterances": one.utterances,
                "seconds": round(one.seconds, 3),
                "wer": _errors_json(one.words),
                "cer": _errors_json(one.characters),
            }
            for label, one in result.speakers.items()
        },
    }


def _kind(ref: str, hyp: str) -> Kind:
    if ref == hyp:
        return "ok"
    if ref == _GAP:
        return "ins"
    return "del" if hyp == _GAP else "sub"


def _score_one(utterance: Utterance) -> UtteranceScore:
    ops = align(words(utterance.ref), words(utterance.hyp))
    return UtteranceScore(
        utterance=utterance,
        ops=ops,
        words=count(ops),
        characters=count(align(characters(utterance.ref), characters(utterance.hyp))),
    )


def _add_to(speaker: SpeakerScore | None, one: UtteranceScore) -> SpeakerScore:
    before = speaker or SpeakerScore(utterances=0, seconds=0.0, words=Errors(), characters=Errors())
    return SpeakerScore(
        utterances=before.utterances + 1,
        seconds=before.seconds + one.utterance.seconds,
        words=before.words + one.words,
        characters=before.characters + one.characters,
    )


def _errors_json(errors: Errors) -> dict[str, Any]:
    return {
        "rate": _number(errors.rate),
        "errors": errors.total,
        "sub": errors.sub,
        "ins": errors.ins,
        "del": errors.deleted,
        "ref": errors.ref,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
