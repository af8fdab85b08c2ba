"""Where in time a CTC model places the tokens and the words of a text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Span = tuple[int, int]
"""First output and the end, which is no longer in it."""


def forced_alignments(
    log_probs: Tensor, lengths: Tensor, texts: Sequence[Sequence[int]], *, blank: int
) -> list[list[Span] | None]:
    """Return, for each utterance, the outputs of each token on the best path that spells its text.

    log_probs: `(B, T, V)`, natural logarithms. lengths: `(B,)` outputs of each, what lies behind is not looked at.
    texts: token ids. None where the outputs are too few for the tokens. Exact: no state is left out, and
    scores are summed in float64.
    Source: the paths of Graves et al. 2006, "Connectionist temporal classification", section 4.1, with the maximum in
    place of the sum: blanks may stand between tokens and must between equal ones.
    """
    ends = lengths.cpu().numpy()
    labels = _states(texts, blank)
    emissions = _emissions(log_probs, labels)
    rows, frames, states = emissions.shape
    skips = np.zeros(labels.shape, dtype=bool)  # a token may follow another token at once where they differ
    skips[:, 3::2] = labels[:, 3::2] != labels[:, 1:-2:2]
    score = np.full((rows, states), -np.inf)
    score[:, :2] = emissions[:, 0, :2] if frames else -np.inf
    came_from = np.zeros((frames, rows, states), dtype=np.int8)  # how many states back
    options = np.full((3, rows, states), -np.inf)
    for frame in range(1, frames):
        options[0] = score
        options[1, :, 1:] = score[:, :-1]
        options[2, :, 2:] = np.where(skips[:, 2:], score[:, :-2], -np.inf)
        came_from[frame] = options.argmax(axis=0)
        score = np.where((frame < ends)[:, None], options.max(axis=0) + emissions[:, frame], score)
    last = _last_states(score, np.array([len(text) for text in texts]))
    possible = np.isfinite(score[np.arange(rows), last]) & (ends > 0)
    paths = _paths(came_from, last, ends)
    return [
        _spans(path[:end], len(text)) if fits else None
        for path, end, text, fits in zip(paths, ends, texts, possible, strict=True)
    ]


def _states(texts: Sequence[Sequence[int]], blank: int) -> NDArray[np.int64]:
    """Return the label of each state of each text, `(B, S)`: tokens with blanks around them, then blanks."""
    labels = np.full((len(texts), 2 * max(map(len, texts), default=0) + 1), blank)
    for row, text in zip(labels, texts, strict=True):
        row[1 : 2 * len(text) : 2] = text
    return labels


def _emissions(log_probs: Tensor, labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the log-probability of each state at each output, `(B, T, S)`."""
    places = torch.from_numpy(labels).to(log_probs.device)[:, None, :].expand(-1, log_probs.shape[1], -1)
    emissions: NDArray[np.float32] = log_probs.detach().float().gather(2, places).cpu().numpy()
    return emissions


def _last_states(score: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the better of the two states in which a path may end: the blank behind the last token, or that token."""
    rows, blanks = np.arange(len(counts)), 2 * counts
    tokens = np.maximum(blanks - 1, 0)
    return np.where(score[rows, blanks] >= score[rows, tokens], blanks, tokens)


def _paths(came_from: NDArray[np.int8], last: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the state at each output, `(B, T)`, followed back from the last ones."""
    frames, rows, _ = came_from.shape
    paths = np.zeros((rows, frames), dtype=np.int64)
    state = last.copy()
    for frame in range(frames - 1, -1, -1):
        paths[:, frame] = state
        state -= np.where(frame < ends, came_from[frame, np.arange(rows), state], 0)
    return paths


def _spans(path: NDArray[np.int64], count: int) -> list[Span]:
    tokens = 2 * np.arange(count) + 1
    first, end = np.searchsorted(path, tokens), np.searchsorted(path, tokens, side="right")
    return list(zip(first.tolist(), end.tolist(), strict=True))


def spread(spans: Sequence[Span], outputs: int) -> list[Span]:
    """Give the blanks around tokens to them, since the outputs of a CTC model are spikes: return the wider spans.

    Neighbours share the blanks between them, the earlier one has the odd one. Before the first and behind the last
    token is silence of unknown length: these reach as far outwards as they do inwards, within `outputs`. A token that
    is alone keeps what it has.
    """
    if len(spans) < 2:
        return list(spans)
    borders = [end + (first - end + 1) // 2 for (_, end), (first, _) in pairwise(spans)]
    begin = spans[0][0] - (borders[0] - spans[0][1])
    finish = spans[-1][1] + (spans[-1][0] - borders[-1])
    edges = [max(0, begin), *borders, min(outputs, finish)]
    return list(pairwise(edges))


def word_numbers(symbols: Sequence[str]) -> list[int | None]:
    """Return which word, from 0, each token belongs to, None for what only stands between words.

    A word ends at `<space>` or where a piece begins with `▁`. symbols: what each of the tokens is called.
    """
    numbers: list[int | None] = []
    number, between = -1, True
    for symbol in symbols:
        between |= symbol == "<space>" or symbol.startswith("▁")
        if symbol in {"<space>", "▁"}:
            numbers.append(None)
            continue
        number += between
        between = False
        numbers.append(number)
    return numbers


def word_spans(spans: Sequence[Span], symbols: Sequence[str]) -> list[Span]:
    """Join the spans of tokens into spans of words. symbols: what each of the tokens is called."""
    words: list[Span] = []
    for span, number in zip(spans, word_numbers(symbols), strict=True):
        if number == len(words):
            words.append(span)
        elif number is not None:
            words[number] = words[number][0], span[1]
    return words
