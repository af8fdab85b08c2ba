"""Estimating an n-gram model from texts: interpolated modified Kneser-Ney.

Counts are held in memory: the characters of a few hours of transcripts take seconds. For millions of sentences make the
ARPA file with KenLM's lmplz or SRILM, on text whose words are the tokens, and read it with `harken.decode.arpa`.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3. Unigrams
are interpolated with the uniform distribution over the vocabulary, `<unk>` among it: Heafield et al. 2013, "Scalable
modified Kneser-Ney language model estimation", section 3.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from harken.core.errors import HarkenError
from harken.decode.ngram import BEGIN, END, UNKNOWN, Context, NGram, word_of
from harken.decode.prefix_beam import State

Counts = dict[State, int]
Discounts = tuple[float, float, float]

# For an order whose counts of counts give no usable discounts (few texts; characters, none of which is seen only once).
# Source: KenLM's lmplz, option --discount_fallback without a value.
FALLBACK_DISCOUNTS: Discounts = (0.5, 1.0, 1.5)
_BEGIN_LOG_PROB = -99 * math.log(10)


def train_ngram(texts: Iterable[Sequence[str]], *, order: int, vocabulary: Iterable[str] = ()) -> NGram:
    """Estimate a model of `order` from texts, each a sequence of tokens (a str is a sequence of characters).

    Tokens of `vocabulary` that no text has get a small probability instead of being unknown.

    Raises HarkenError for an order below 1, no text, or a token that cannot be a word (whitespace, `<s>`, `</s>`).
    """
    if order < 1:
        raise HarkenError(f"the order of an n-gram model must be 1 or more, got {order}")
    id_of = {UNKNOWN: 0, BEGIN: 1, END: 2}
    sentences = [[_word_id(token, id_of) for token in text] for text in texts]
    if not sentences:
        raise HarkenError("there is no text to train an n-gram model on; expected at least one")
    for token in vocabulary:
        _word_id(token, id_of)
    counts = _count(sentences, order, begin=id_of[BEGIN], end=id_of[END])
    contexts: dict[State, Context] = {(): Context()}
    uniform = 1.0 / (len(id_of) - 1)  # over everything that can come next: not `<s>`
    for number in range(1, order + 1):
        _estimate(counts[number], discounts(counts[number]), contexts, uniform)
    _complete_unigrams(contexts[()], range(len(id_of)), uniform, begin=id_of[BEGIN])
    return NGram(order, list(id_of), contexts)


def discounts(counts: Counts) -> Discounts:
    """Return what to subtract from counts of 1, of 2, and of 3 or more.

    Source: Chen and Goodman 1999, section 3. It must leave a little of every count and a little for the words not seen;
    where it does not, `FALLBACK_DISCOUNTS`.
    """
    seen = Counter(counts.values())
    one, two, three, four = (seen[number] for number in (1, 2, 3, 4))
    if not (one and two and three):
        return FALLBACK_DISCOUNTS
    share = one / (one + 2 * two)
    found = (1 - 2 * share * two / one, 2 - 3 * share * three / two, 3 - 4 * share * four / three)
    return found if all(0 < value < limit for limit, value in enumerate(found, start=1)) else FALLBACK_DISCOUNTS


def _word_id(token: str, id_of: dict[str, int]) -> int:
    word = word_of(token)
    if word in (BEGIN, END):
        raise HarkenError(f"`{word}` marks the ends of sentences in an n-gram model and cannot be a token of a text")
    return id_of.setdefault(word, len(id_of))


def _count(sentences: Sequence[Sequence[int]], order: int, *, begin: int, end: int) -> list[Counts]:
    """Return the counts of each order, index 1 .. order.

    Below the highest order an n-gram counts once for each different word before it (Kneser and Ney 1995). One that
    begins a sentence has nothing before it and keeps its plain count.
    """
    counts: list[Counts] = [defaultdict(int) for _ in range(order + 1)]
    for sentence in sentences:
        padded = (begin, *sentence, end)
        for last in range(1, len(padded)):
            first = max(0, last - order + 1)
            counts[last - first + 1][padded[first : last + 1]] += 1
    # What was counted below the highest order so far begins with `<s>`: shorter histories exist only there.
    for number in range(order, 1, -1):
        for ngram in counts[number]:
            counts[number - 1][ngram[1:]] += 1
    return counts


def _estimate(counts: Counts, discount: Discounts, contexts: dict[State, Context], uniform: float) -> None:
    """Add the probabilities of one order to `contexts`, which holds the lower orders already."""
    totals: dict[State, int] = defaultdict(int)
    withheld: dict[State, float] = defaultdict(float)
    for ngram, number in counts.items():
        totals[ngram[:-1]] += number
        withheld[ngram[:-1]] += discount[min(number, 3) - 1]
    for history, total in totals.items():
        contexts.setdefault(history, Context()).backoff = math.log(withheld[history] / total)
    for ngram, number in counts.items():
        history, word = ngram[:-1], ngram[-1]
        lower = math.exp(contexts[history[1:]].next[word]) if history else uniform
        left = withheld[history] / totals[history]
        prob = (number - discount[min(number, 3) - 1]) / totals[history] + left * lower
        contexts[history].next[word] = math.log(prob)


def _complete_unigrams(context: Context, words: range, uniform: float, *, begin: int) -> None:
    """Give every word that no text has its share of what the unigrams withhold; `<s>` is never predicted."""
    for word in words:
        context.next.setdefault(word, _BEGIN_LOG_PROB if word == begin else context.backoff + math.log(uniform))
    context.backoff = 0.0
