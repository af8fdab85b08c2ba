"""CTC prefix beam search with shallow fusion of a language model.

The probability of a prefix is the sum over all its alignments. Each prefix carries two sums, of the alignments that end
in a blank and of those that end in its last token, because only after a blank does the same token again make a longer
prefix. A prefix l is ranked by

    log P_ctc(l) + w * log P_lm(l) + sum of the bonuses of its tokens

and, at the end, w * log P_lm(end of sentence | l) is added.

Source: Graves 2012, "Supervised sequence labelling with recurrent neural networks", section 7.5 (prefix search);
Hannun et al. 2014, "First-pass large vocabulary continuous speech recognition using bi-directional recurrent DNNs"; the
bonus for each token: Maas et al. 2015, "Lexicon-free conversational speech recognition with neural networks".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
State = tuple[int, ...]

_ROOT = 0
_NO_PARENT = -1
_NO_TOKEN = -1


class TokenScorer(Protocol):
    """A left-to-right language model over the same token ids as the search; all scores are natural logarithms."""

    def start(self) -> State:
        """Return the state at the beginning of a sentence."""
        ...

    def scores(self, state: State) -> Floats:
        """Return (V,) log-probabilities of the next token; the entry of the blank is not looked at."""
        ...

    def advance(self, state: State, token: int) -> State:
        """Return the state after one more token."""
        ...

    def end(self, state: State) -> float:
        """Return the log-probability that the sentence ends here."""
        ...


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A decoded prefix: `score` is what it is ranked by, `ctc` is log P_ctc of all its surviving alignments."""

    tokens: list[int]
    score: float
    ctc: float


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """What the search keeps and how it weighs.

    `bonus` is (V,), added once for each token of a prefix. In a frame a prefix grows only by the `token_top_k` most
    probable tokens that have at least `token_min_log_prob`; None does not prune. Blanks, repeats
    and growth into a prefix that is in the beam already are never pruned.
    """

    blank: int
    beam: int
    scorer: TokenScorer | None = None
    scorer_weight: float = 0.0
    bonus: Floats | None = None
    token_top_k: int | None = None
    token_min_log_prob: float | None = None


def prefix_beam_search(log_probs: npt.NDArray[np.floating], options: BeamOptions) -> list[Hypothesis]:
    """Search one utterance.

    log_probs is (T, V), normalised natural-log probabilities without padding. Returns at most `options.beam`
    hypotheses, best first; for T = 0 the empty one alone.
    """
    frames = np.asarray(log_probs, dtype=np.float64)
    prefixes = _Prefixes(options, num_tokens=frames.shape[1])
    beam = _Beam.root(prefixes)
    labels = np.delete(np.arange(frames.shape[1]), options.blank)
    for frame in frames:
        beam = _step(beam, frame, _grow_by(frame, labels, options), prefixes, options)
    return _finish(beam, prefixes)


class _Prefixes:
    """The trie of prefixes made so far.

    A prefix keeps its number when it leaves the beam and comes back, so that its descendants still in the beam are
    found again.
    """

    def __init__(self, options: BeamOptions, *, num_tokens: int) -> None:
        self._scorer = options.scorer if options.scorer_weight else None
        self._weight = options.scorer_weight
        self._bonus = np.zeros(num_tokens) if options.bonus is None else options.bonus
        self._number_of: dict[tuple[int, int], int] = {}
        self.parents = [_NO_PARENT]
        self.tokens = [_NO_TOKEN]
        self._states: list[State] = [self._scorer.start() if self._scorer else ()]

    def child(self, parent: int, token: int) -> int:
        """Return the number of the prefix `parent` + `token`, making it if it is new."""
        number = self._number_of.get((parent, token))
        if number is None:
            number = len(self.parents)
            self._number_of[parent, token] = number
            self.parents.append(parent)
            self.tokens.append(token)
            self._states.append(self._scorer.advance(self._states[parent], token) if self._scorer else ())
        return number

    def gains(self, number: int) -> Floats:
        """Return (V,): what each further token adds to the score besides its CTC probability."""
        if self._scorer is None:
            return self._bonus
        return self._weight * self._scorer.scores(self._states[number]) + self._bonus

    def end_gain(self, number: int) -> float:
        """Return what ending here adds to the score."""
        return self._weight * self._scorer.end(self._states[number]) if self._scorer else 0.0

    def spell(self, number: int) -> list[int]:
        """Return the token ids of a prefix."""
        tokens = []
        while number != _ROOT:
            tokens.append(self.tokens[number])
            number = self.parents[number]
        return tokens[::-1]


@dataclass
class _Beam:
    """K prefixes, no two alike; each array has one row a prefix."""

    numbers: Ints  # (K,) in the trie
    parents: Ints  # (K,) their parents' numbers, whether those are in the beam or not
    last: Ints  # (K,) last token
    blank: Floats  # (K,) log-sum of the alignments that end in a blank
    token: Floats  # (K,) log-sum of the alignments that end in the last token
    extra: Floats  # (K,) weighted language model and bonuses so far
    gains: Floats  # (K, V) what the next token adds to `extra`

    @classmethod
    def root(cls, prefixes: _Prefixes) -> _Beam:
        return cls(
            numbers=np.array([_ROOT]),
            parents=np.array([_NO_PARENT]),
            last=np.array([_NO_TOKEN]),
            blank=np.zeros(1),
            token=np.full(1, -np.inf),
            extra=np.zeros(1),
            gains=prefixes.gains(_ROOT)[None].copy(),
        )


def _grow_by(frame: Floats, labels: Ints, options: BeamOptions) -> Ints:
    """Return (M,) ids of the tokens by which prefixes may grow in this frame."""
    if options.token_min_log_prob is not None:
        labels = labels[frame[labels] >= options.token_min_log_prob]
    if options.token_top_k is not None:
        labels = labels[_best(frame[labels], options.token_top_k)]
    return labels


def _best(scores: Floats, number: int) -> Ints:
    """Return the places of the `number` highest scores, in no order."""
    if scores.size <= number:
        return np.arange(scores.size)
    return np.argpartition(-scores, number - 1)[:number]


def _step(beam: _Beam, frame: Floats, labels: Ints, prefixes: _Prefixes, options: BeamOptions) -> _Beam:
    """Advance the beam by one frame: (V,) log-probabilities, growing by the (M,) `labels`."""
    total = np.logaddexp(beam.blank, beam.token)
    blank = total + frame[options.blank]
    # The empty prefix has last = -1 and reads some frame entry, but its `token` is -inf and stays so.
    token = beam.token + frame[beam.last]

    # A prefix in the beam whose parent is in it too also receives what the parent gives when it grows by that token.
    child, parent = np.nonzero(beam.parents[:, None] == beam.numbers[None, :])
    given = np.where(beam.last[child] == beam.last[parent], beam.blank[parent], total[parent])
    token[child] = np.logaddexp(token[child], given + frame[beam.last[child]])

    grown = np.where(labels == beam.last[:, None], beam.blank[:, None], total[:, None]) + frame[labels]
    grown_score = grown + beam.extra[:, None] + beam.gains[:, labels]
    column = np.full(frame.size, -1)
    column[labels] = np.arange(labels.size)
    column_of_child = column[beam.last[child]]
    known = column_of_child >= 0
    grown_score[parent[known], column_of_child[known]] = -np.inf

    scores = np.concatenate([np.logaddexp(blank, token) + beam.extra, grown_score.ravel()])
    chosen = _best(scores, options.beam)
    chosen = chosen[scores[chosen] > -np.inf]
    stay = chosen[chosen < total.size]
    if not chosen.size:  # every prefix has become impossible: keep them, there is nothing better
        stay = np.arange(total.size)
    rows, columns = np.divmod(chosen[chosen >= total.size] - total.size, max(labels.size, 1))
    return _next_beam(beam, stay, blank, token, rows, labels[columns], grown[rows, columns], prefixes)


def _next_beam(
    beam: _Beam,
    stay: Ints,
    blank: Floats,
    token: Floats,
    rows: Ints,
    grow: Ints,
    grown: Floats,
    prefixes: _Prefixes,
) -> _Beam:
    """Put together the prefixes that `stay` and those grown from `rows` by the tokens `grow`, log-sums `grown`."""
    parents = beam.numbers[rows]
    fresh = [prefixes.child(parent, label) for parent, label in zip(parents.tolist(), grow.tolist(), strict=True)]
    gains = np.empty((stay.size + len(fresh), beam.gains.shape[1]))
    gains[: stay.size] = beam.gains[stay]
    for place, number in enumerate(fresh, start=stay.size):
        gains[place] = prefixes.gains(number)
    return _Beam(
        numbers=np.concatenate([beam.numbers[stay], np.array(fresh, dtype=np.int64)]),
        parents=np.concatenate([beam.parents[stay], parents]),
        last=np.concatenate([beam.last[stay], grow]),
        blank=np.concatenate([blank[stay], np.full(len(fresh), -np.inf)]),
        token=np.concatenate([token[stay], grown]),
        extra=np.concatenate([beam.extra[stay], beam.extra[rows] + beam.gains[rows, grow]]),
        gains=gains,
    )


def _finish(beam: _Beam, prefixes: _Prefixes) -> list[Hypothesis]:
    ctc = np.logaddexp(beam.blank, beam.token)
    numbers = beam.numbers.tolist()
    score = ctc + beam.extra + np.array([prefixes.end_gain(number) for number in numbers])
    return [
        Hypothesis(tokens=prefixes.spell(numbers[place]), score=float(score[place]), ctc=float(ctc[place]))
        for place in np.argsort(-score, kind="stable")
    ]
