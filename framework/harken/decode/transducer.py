"""Searching a transducer: greedy, and beam search over hypotheses that differ in their tokens.

Both read a frame at a time for all utterances and hypotheses at once and write at most one token a frame, as icefall's
`greedy_search_batch` and `modified_beam_search` do: training on the full lattice makes more of them rare, and work is
then known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from harken.decode.prefix_beam import Floats, Ints, State, TokenScorer
from harken.nn.transducer.networks import Joiner, Predictor

_FACTOR = 6364136223846793005  # Knuth's MMIX: hashes of token sequences modulo 2**64


@dataclass(frozen=True)
class Networks:
    """What a search asks of a transducer besides its frames."""

    predictor: Predictor
    joiner: Joiner

    def predict(self, contexts: Tensor) -> Tensor:
        """Map contexts `(..., context)` to the joiner's projections of their predictions `(..., J)`."""
        projected: Tensor = self.joiner.predictions(self.predictor.step(contexts.reshape(-1, contexts.shape[-1])))
        return projected.reshape(*contexts.shape[:-1], -1)


@dataclass(frozen=True, kw_only=True)
class TransducerBeam:
    """What the beam search keeps and how it weighs; scores are natural logarithms.

    bonus: `(V,)`, added for each token of a hypothesis.
    """

    beam: int
    scorer: TokenScorer | None = None
    scorer_weight: float = 0.0
    bonus: Floats | None = None


def greedy_transducer_search(frames: Tensor, lengths: Tensor, networks: Networks) -> list[list[int]]:
    """Take the best of all tokens and the blank at each frame.

    frames: `(B, T, J)`, projected for the joiner. lengths: `(B,)`. Returns B lists of token ids.
    """
    blank = networks.predictor.blank
    lengths = lengths.to(frames.device)
    contexts = networks.predictor.start(len(frames))
    predicted = networks.predict(contexts)
    written = torch.full(frames.shape[:2], blank, device=frames.device)
    for place in range(frames.shape[1]):
        best = networks.joiner(frames[:, place], predicted).argmax(-1)
        best = torch.where(place < lengths, best, blank)
        written[:, place] = best
        contexts = _append(contexts, best, blank)
        predicted = networks.predict(contexts)
    return [[token for token in row if token != blank] for row in written.tolist()]


def _append(contexts: Tensor, tokens: Tensor, blank: int) -> Tensor:
    """Move contexts `(..., context)` on by tokens `(...)`; a blank leaves them as they are."""
    moved = torch.cat([contexts[..., 1:], tokens[..., None]], dim=-1)
    return torch.where((tokens != blank)[..., None], moved, contexts)


@dataclass
class _Beams:
    """K hypotheses of each of B utterances; a score of -inf is a free place.

    scores, hashes, counts: `(B, K)`, the last two of and in tokens. contexts: `(B, K, context)`.
    tokens, parents: for each frame read `(B, K)`, what was written and which hypothesis it was written to.
    """

    scores: Tensor
    hashes: Tensor
    counts: Tensor
    contexts: Tensor
    tokens: list[Tensor] = field(default_factory=list)
    parents: list[Tensor] = field(default_factory=list)


def modified_beam_search(
    frames: Tensor, lengths: Tensor, networks: Networks, options: TransducerBeam
) -> list[list[int]]:
    """Keep the best hypotheses at each frame, adding up those of equal tokens.

    frames: `(B, T, J)`, projected for the joiner. lengths: `(B,)`. A language model and bonuses count while hypotheses
    are compared; at the end the score is divided by the tokens and the context, as icefall does. Returns B lists of
    token ids. Source: icefall's `modified_beam_search`.
    """
    size, blank, width = len(frames), networks.predictor.blank, options.beam
    lengths = lengths.to(frames.device)
    scores = torch.full((size, width), -torch.inf, device=frames.device)
    scores[:, :1] = 0.0
    counts = torch.zeros(size, width, dtype=torch.int64, device=frames.device)
    contexts = networks.predictor.start(size * width).unflatten(0, (size, width))
    beams = _Beams(scores, counts, counts, contexts)
    gains = _Gains(options, size, width, blank, frames.device)
    for place in range(frames.shape[1]):
        logits = networks.joiner(frames[:, place, None], networks.predict(beams.contexts))
        log_probs = logits.float().log_softmax(-1) + gains.next()
        _step(beams, log_probs, place < lengths, blank)
        gains.advance(beams)
    final = (beams.scores + gains.end()) / (beams.counts + networks.predictor.context)
    return _spell(beams, final.argmax(-1), blank)


def _step(beams: _Beams, log_probs: Tensor, active: Tensor, blank: int) -> None:
    """Read a frame in which tokens have `(B, K, V)`; utterances that are not `active` `(B,)` have ended."""
    width, classes = log_probs.shape[1:]
    best, index = (beams.scores[..., None] + log_probs).flatten(1).topk(width)
    own = torch.arange(width, device=index.device).expand_as(index)
    running = active[:, None]
    parents = torch.where(running, index // classes, own)
    tokens = torch.where(running, index % classes, blank)
    scores = torch.where(running, best, beams.scores)
    hashes = beams.hashes.gather(1, parents)
    written = tokens != blank
    hashes = torch.where(written, hashes * _FACTOR + tokens + 1, hashes)
    # hypotheses of equal tokens become the first of them, which is the best: topk sorts
    same = (hashes[:, :, None] == hashes[:, None, :]) & (scores[:, None, :] > -torch.inf)
    merged = torch.where(same, scores[:, None, :], -torch.inf).logsumexp(-1)
    first = (same & (own[:, None, :] < own[:, :, None])).any(-1).logical_not()
    beams.scores = torch.where(first, merged, -torch.inf)
    beams.hashes, beams.counts = hashes, beams.counts.gather(1, parents) + written
    chosen = parents[..., None].expand_as(beams.contexts)
    beams.contexts = _append(beams.contexts.gather(1, chosen), tokens, blank)
    beams.tokens.append(tokens)
    beams.parents.append(parents)


def _spell(beams: _Beams, best: Tensor, blank: int) -> list[list[int]]:
    """Follow hypotheses `best` `(B,)` back to their beginning."""
    rows = np.arange(len(best))
    place: Ints = best.cpu().numpy()
    reversed_tokens: list[Ints] = []
    if not beams.tokens:
        return [[] for _ in rows]
    tokens, parents = torch.stack(beams.tokens).cpu().numpy(), torch.stack(beams.parents).cpu().numpy()
    for frame in range(len(tokens) - 1, -1, -1):
        reversed_tokens.append(tokens[frame, rows, place])
        place = parents[frame, rows, place]
    written = np.stack(reversed_tokens[::-1], axis=1)
    return [row[row != blank].tolist() for row in written]


class _Gains:
    """What tokens add to the score besides their probability: the language model and bonuses. The blank adds nothing.

    A model's states are kept on the CPU, one for each hypothesis; without one no frame waits for the device.
    """

    def __init__(self, options: TransducerBeam, size: int, width: int, blank: int, device: torch.device) -> None:
        self._scorer = options.scorer if options.scorer_weight else None
        self._weight, self._blank, self._device = options.scorer_weight, blank, device
        self._bonus = (
            None if options.bonus is None else np.where(np.arange(len(options.bonus)) == blank, 0.0, options.bonus)
        )
        self._shape = size, width
        self._states: list[State] = [self._scorer.start()] * (size * width) if self._scorer else []

    def next(self) -> Tensor:
        """Return gains that broadcast to `(B, K, V)`."""
        if self._scorer is None:
            return torch.zeros(1, device=self._device) if self._bonus is None else self._tensor(self._bonus)
        places: dict[State, int] = {}
        index = [places.setdefault(state, len(places)) for state in self._states]
        gains = self._weight * np.stack([self._scorer.scores(state) for state in places])
        gains[:, self._blank] = 0.0
        if self._bonus is not None:
            gains += self._bonus
        each = self._tensor(gains)[torch.tensor(index, device=self._device)]
        return each.view(*self._shape, -1)

    def advance(self, beams: _Beams) -> None:
        """Follow what the beams wrote last."""
        if self._scorer is None:
            return
        width = self._shape[1]
        parents, tokens = beams.parents[-1].flatten().tolist(), beams.tokens[-1].flatten().tolist()
        before = [self._states[place // width * width + parent] for place, parent in enumerate(parents)]
        self._states = [
            state if token == self._blank else self._scorer.advance(state, token)
            for state, token in zip(before, tokens, strict=True)
        ]

    def end(self) -> Tensor:
        """Return what ending adds, which broadcasts to `(B, K)`."""
        if self._scorer is None:
            return torch.zeros(1, device=self._device)
        ends = [self._weight * self._scorer.end(state) for state in self._states]
        return self._tensor(np.array(ends)).view(self._shape)

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(values).to(self._device, torch.float32)
