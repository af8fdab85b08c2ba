"""Back-off n-gram language models over tokens: scoring by state, and the bridge to the ids of a search.

Words are the tokens of a text as strings (characters or sentencepiece pieces). A space cannot stand in an ARPA file, so
it is written as `▁` (U+2581), as sentencepiece does. Models are estimated in `harken.decode.kneser_ney`, read and
written in `harken.decode.arpa`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from harken.core.errors import HarkenError
from harken.decode.prefix_beam import Floats, Ints, State

BEGIN = "<s>"
END = "</s>"
UNKNOWN = "<unk>"
SPACE = "▁"

# A state's scores take V floats; this bounds what a scorer keeps for a large vocabulary and a long list of utterances.
_CACHE_FLOATS = 16_000_000


@dataclass
class Context:
    """What follows one history: natural-log probabilities of the words listed, by id, and the weight of all others."""

    backoff: float = 0.0
    next: dict[int, float] = field(default_factory=dict)


def word_of(symbol: str) -> str:
    """Return the name of a token in the model: a space, also one spelled `<space>`, becomes `▁`.

    Raises HarkenError when the token is empty or holds other whitespace, which an ARPA file cannot keep apart.
    """
    word = symbol.replace("<space>", " ").replace(" ", SPACE)
    if word.split() != [word]:
        raise HarkenError(f"the token {symbol!r} cannot be a word of an n-gram model: it is empty or holds whitespace")
    return word


class NGram:
    """An n-gram model with back-off.

    A state is the longest end of the history (word ids, oldest first) that the model knows as a context: two histories
    with one state get the same scores ever after.
    """

    def __init__(self, order: int, words: Sequence[str], contexts: dict[State, Context]) -> None:
        self.order = order
        self.words = tuple(words)
        self.id_of = {word: number for number, word in enumerate(self.words)}
        self.contexts = contexts
        self._arrays: dict[State, tuple[Ints, Floats]] = {}

    def start(self) -> State:
        """Return the state at the beginning of a sentence."""
        begin = self.id_of.get(BEGIN)
        return () if begin is None else self._known((begin,))

    def score(self, state: State, word: int) -> tuple[float, State]:
        """Return (natural-log probability of `word` after `state`, the state after it); -inf if it is not listed."""
        log_prob = 0.0
        for start in range(len(state) + 1):
            context = self.contexts.get(state[start:])
            if context is None:
                continue
            if word in context.next:
                return log_prob + context.next[word], self.advance(state, word)
            log_prob += context.backoff
        return -np.inf, self.advance(state, word)

    def advance(self, state: State, word: int) -> State:
        """Return the state after `word`."""
        return self._known((*state, word))

    def distribution(self, state: State) -> Floats:
        """Return (number of words,) natural-log probabilities of the next word; -inf if it is not listed."""
        log_probs = np.full(len(self.words), -np.inf)
        for start in range(len(state), -1, -1):
            context = self.contexts.get(state[start:])
            if context is None:
                continue
            if start < len(state):
                log_probs += context.backoff
            ids, values = self._next(state[start:], context)
            log_probs[ids] = values
        return log_probs

    def log_prob(self, words: Iterable[str]) -> float:
        """Return the natural-log probability of a sentence with its end; other words are scored as `<unk>`."""
        state, total = self.start(), 0.0
        unknown = self.id_of.get(UNKNOWN, -1)
        ids = [self.id_of.get(word, unknown) for word in words]
        for number in [*ids, *([self.id_of[END]] if END in self.id_of else [])]:
            log_prob, state = self.score(state, number)
            total += log_prob
        return total

    def _known(self, history: State) -> State:
        start = max(0, len(history) - self.order + 1)
        while start < len(history) and history[start:] not in self.contexts:
            start += 1
        return history[start:]

    def _next(self, state: State, context: Context) -> tuple[Ints, Floats]:
        arrays = self._arrays.get(state)
        if arrays is None:
            arrays = (
                np.fromiter(context.next.keys(), dtype=np.int64, count=len(context.next)),
                np.fromiter(context.next.values(), dtype=np.float64, count=len(context.next)),
            )
            self._arrays[state] = arrays
        return arrays


class NGramScorer:
    """An n-gram model as a `TokenScorer`: the tokens of a search, by id, looked up by their names in the model."""

    def __init__(self, model: NGram, symbols: Sequence[str], *, blank: int) -> None:
        """Match `symbols` (the name of each token id, V of them; that of the blank is not used) with the model's words.

        Raises HarkenError when the model has none of the tokens, or not all of them and no `<unk>`: it is of another
        tokenizer.
        """
        self.model = model
        words = [UNKNOWN if number == blank else word_of(symbol) for number, symbol in enumerate(symbols)]
        missing = [word for number, word in enumerate(words) if number != blank and word not in model.id_of]
        if missing and (UNKNOWN not in model.id_of or len(missing) == len(words) - 1):
            few = " ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
            raise HarkenError(
                f"the n-gram model must have the tokens of the search, but {len(missing)} of {len(words) - 1} are not "
                f"in it ({few}); train it on texts cut by the same tokenizer"
            )
        unknown = model.id_of.get(UNKNOWN, 0)
        self._columns = np.array([model.id_of.get(word, unknown) for word in words], dtype=np.int64)
        self._cache: dict[State, Floats] = {}
        self._cache_size = max(1, _CACHE_FLOATS // max(len(words), 1))

    def start(self) -> State:
        """Return the state at the beginning of a sentence."""
        return self.model.start()

    def score(self, state: State, token: int) -> tuple[float, State]:
        """Return (natural-log probability of the token id after `state`, the state after it)."""
        return self.model.score(state, int(self._columns[token]))

    def scores(self, state: State) -> Floats:
        """Return (V,) natural-log probabilities of the next token id."""
        found = self._cache.get(state)
        if found is None:
            if len(self._cache) >= self._cache_size:
                self._cache.clear()
            found = self.model.distribution(state)[self._columns]
            self._cache[state] = found
        return found

    def advance(self, state: State, token: int) -> State:
        """Return the state after the token id."""
        return self.model.advance(state, int(self._columns[token]))

    def end(self, state: State) -> float:
        """Return the natural-log probability of the end of the sentence; 0 for a model without sentence ends."""
        number = self.model.id_of.get(END)
        return 0.0 if number is None else self.model.score(state, number)[0]
