"""Where in time a CTC model places the words of a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]


def forced_alignment(log_probs: NDArray[np.float32], tokens: Sequence[int], *, blank: int) -> list[Span] | None:
    """Return the first output and the end of each token on the best path that spells `tokens`.

    log_probs: `(T, V)` of the model's outputs. None when they are too few for the tokens.
    Source: the path of Graves et al. 2006, "Connectionist temporal classification", section 4.1, with the maximum in
    place of the sum: blanks may stand between tokens and must between equal ones.
    """
    frames, states = len(log_probs), 2 * len(tokens) + 1
    labels = np.full(states, blank)
    labels[1::2] = tokens
    if not frames:
        return None
    skips = np.zeros(states, dtype=bool)  # a token may follow another token at once where they differ
    skips[3::2] = labels[3::2] != labels[1:-2:2]
    score = np.full(states, -np.inf)
    score[:2] = log_probs[0, labels[:2]]
    came_from = np.zeros((frames, states), dtype=np.int8)  # how many states back
    for frame in range(1, frames):
        options = np.full((3, states), -np.inf)
        options[0] = score
        options[1, 1:] = score[:-1]
        options[2, 2:] = np.where(skips[2:], score[:-2], -np.inf)
        came_from[frame] = options.argmax(axis=0)
        score = options.max(axis=0) + log_probs[frame, labels]
    state = states - 1 if states == 1 or score[-1] >= score[-2] else states - 2
    if not np.isfinite(score[state]):
        return None
    path = np.empty(frames, dtype=np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = state
        state -= int(came_from[frame, state])
    return [_span(path, 2 * place + 1) for place in range(len(tokens))]


def _span(path: NDArray[np.int64], state: int) -> Span:
    inside = np.flatnonzero(path == state)
    return int(inside[0]), int(inside[-1]) + 1


def word_spans(spans: Sequence[Span], symbols: Sequence[str]) -> list[Span]:
    """Join the spans of tokens into spans of words; a word ends at `<space>` or where a piece begins with `▁`.

    symbols: what each of the tokens is called.
    """
    groups: list[list[Span]] = [[]]
    for span, symbol in zip(spans, symbols, strict=True):
        if symbol == "<space>" or symbol.startswith("▁"):
            groups.append([])
        if symbol not in {"<space>", "▁"}:
            groups[-1].append(span)
    return [(group[0][0], group[-1][1]) for group in groups if group]
