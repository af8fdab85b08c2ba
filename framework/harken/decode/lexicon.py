"""Lexicons: which tokens spell a word, as a transducer for `harken.decode.graph`.

In a graph's labels 0 is the epsilon: token t of the model is t + 1, `#0` (the back-off of a language model) is V + 1
and `#k`, which tells words of equal beginnings apart, V + 1 + k. Words are numbered from 1 in the lexicon's order.
Source: Mohri, Pereira and Riley 2008, "Speech recognition with weighted finite-state transducers", section 3.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harken.core.errors import HarkenError
from harken.data.tokens import Tokenizer
from harken.decode.ngram import BEGIN, END, UNKNOWN

WordTokens = tuple[int, ...]
_NO_WORDS = {BEGIN, END, UNKNOWN, "<UNK>"}


@dataclass(frozen=True)
class Lexicon:
    """Pronunciations in tokens; a word may have several.

    classes: V, the blank included. space: the token that stands between words, None where pieces mark beginnings.
    left_out: words that the tokenizer cannot spell.
    """

    entries: tuple[tuple[str, WordTokens], ...]
    classes: int
    space: int | None = None
    left_out: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The words, each once; word n of a graph is the (n - 1)th."""
        return list(dict.fromkeys(word for word, _ in self.entries))


def read_lexicon(path: str | Path, tokenizer: Tokenizer) -> Lexicon:
    """Read a lexicon: a line has a word and then its tokens by name; a word alone is spelled by the tokenizer.

    Raises HarkenError when the file is missing or holds no word, or for a token that the tokenizer does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise HarkenError(f"no lexicon at {path}; expected lines `WORD TOKEN TOKEN ...`, or a word a line")
    id_of = {symbol: number for number, symbol in enumerate(tokenizer.symbols()) if number}
    spelled: list[tuple[str, WordTokens | None]] = []
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        word, *names = line.split() or [""]
        unknown = [name for name in names if name not in id_of]
        if unknown:
            raise HarkenError(
                f"{path}, line {place}: expected tokens of the model's tokenizer, found `{unknown[0]}`; `harken graph` "
                "and the model must have one tokenizer"
            )
        if word:
            spelled.append((word, tuple(id_of[name] for name in names) or None))
    return _lexicon(spelled, tokenizer, str(path))


def spell_words(words: Iterable[str], tokenizer: Tokenizer, source: str) -> Lexicon:
    """Return the lexicon of words as the tokenizer spells them; source: where they are from, for the errors.

    Raises HarkenError when it can spell none.
    """
    return _lexicon([(word, None) for word in words], tokenizer, source)


def _lexicon(spelled: Sequence[tuple[str, WordTokens | None]], tokenizer: Tokenizer, source: str) -> Lexicon:
    entries: dict[tuple[str, WordTokens], None] = {}
    left_out = []
    for word, tokens in spelled:
        if word in _NO_WORDS:
            continue
        if tokens is None and tokenizer.unknown(word):
            left_out.append(word)
        else:
            entries[word, tokens or tuple(tokenizer.encode(word))] = None
    if not entries:
        raise HarkenError(
            f"{source}: expected words that the tokenizer can spell, found {len(left_out)} that it cannot"
        )
    symbols = tokenizer.symbols()
    space = next((number for number, name in enumerate(symbols) if name in ("<space>", "|") and number), None)
    return Lexicon(tuple(entries), len(symbols), space, tuple(left_out))


def told_apart(entries: Sequence[tuple[str, WordTokens]]) -> list[int]:
    """Return for each entry the k of the `#k` at its end, 0 for none.

    Equal spellings and those that begin another one get one, so that the transducer can be made deterministic.
    """
    counts = Counter(tokens for _, tokens in entries)
    begins = {tokens[:length] for _, tokens in entries for length in range(1, len(tokens))}
    used: Counter[WordTokens] = Counter()
    found = []
    for _, tokens in entries:
        marked = counts[tokens] > 1 or tokens in begins
        used[tokens] += marked
        found.append(used[tokens] if marked else 0)
    return found


def lexicon_fst(lexicon: Lexicon) -> tuple[str, int]:
    """Return the transducer L from tokens to words in OpenFst's text format, and the largest k of its `#k`.

    State 0 is the start, 1 before a word, 2 behind it; from 2 the space leads back to 1, where there is one. All let
    `#0` pass, which a language model takes between words. Nothing may end in a space.
    """
    number = {word: place for place, word in enumerate(lexicon.words, start=1)}
    back_off = lexicon.classes + 1, len(number) + 1
    marks = told_apart(lexicon.entries)
    lines = [f"{state} {state} {back_off[0]} {back_off[1]}" for state in (0, 1, 2)]
    lines += ["0 1 0 0", f"2 1 {0 if lexicon.space is None else lexicon.space + 1} 0"]
    free = 3
    for (word, tokens), mark in zip(lexicon.entries, marks, strict=True):
        labels = [token + 1 for token in tokens] + ([lexicon.classes + 1 + mark] if mark else [])
        states = [1, *range(free, free + len(labels) - 1), 2]
        free += len(labels) - 1
        for place, label in enumerate(labels):
            lines.append(f"{states[place]} {states[place + 1]} {label} {0 if place else number[word]}")
    return "\n".join([*lines, "0", "2", ""]), max(marks)


def ctc_fst(classes: int, marks: int) -> str:
    """Return the transducer H of CTC's rules from outputs of frames to tokens, in OpenFst's text format.

    State 0 is behind a blank, state t behind token t, which goes on without being written again: to write it twice, a
    blank must be between. `#0` to `#marks` pass everywhere. It has V^2 arcs. Source: Graves et al. 2006, section 3.
    """
    lines = []
    for state in range(classes):
        lines.append(f"{state} 0 1 0")
        lines += [f"{state} {token} {token + 1} {0 if token == state else token + 1}" for token in range(1, classes)]
        lines += [f"{state} {state} 0 {classes + 1 + mark}" for mark in range(marks + 1)]
    return "\n".join([*lines, *map(str, range(classes)), ""])
