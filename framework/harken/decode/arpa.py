"""ARPA files: the text format that KenLM, SRILM, Kaldi and k2 read and write n-gram models in.

Source: the ngram-format manual page of SRILM. Logarithms in the file are to base 10; in memory they are natural.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from harken.core.errors import HarkenError
from harken.core.files import atomic_path
from harken.decode.ngram import UNKNOWN, Context, NGram
from harken.decode.prefix_beam import State

_LN10 = math.log(10)


def save_arpa(model: NGram, path: str | Path) -> None:
    """Write a model as an ARPA file, atomically; gzip where the name ends in `.gz`, as `load_arpa` reads it."""
    sections: list[list[str]] = [[] for _ in range(model.order)]
    for history, context in model.contexts.items():
        for word, log_prob in context.next.items():
            ngram = (*history, word)
            line = f"{log_prob / _LN10:.7g}\t{' '.join(model.words[number] for number in ngram)}"
            if ngram in model.contexts:
                line += f"\t{model.contexts[ngram].backoff / _LN10:.7g}"
            sections[len(history)].append(line)
    lines = ["\\data\\", *(f"ngram {order}={len(found)}" for order, found in enumerate(sections, start=1))]
    for order, found in enumerate(sections, start=1):
        lines += ["", f"\\{order}-grams:", *found]
    text = "\n".join([*lines, "", "\\end\\", ""]).encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(text, mtime=0) if Path(path).suffix == ".gz" else text)


def load_arpa(path: str | Path) -> NGram:
    """Read an ARPA file, plain or gzip (`.gz`).

    Raises HarkenError when the file is missing, cut short or not ARPA; the message names the line.
    """
    reader = _Reader(Path(path))
    with _lines_for(reader) as lines:
        return reader.read(lines)


def arpa_words(path: str | Path) -> list[str]:
    """Return the words of an ARPA file, plain or gzip, without reading its longer n-grams.

    Raises HarkenError as `load_arpa` does, for what it reads.
    """
    reader = _Reader(Path(path))
    with _lines_for(reader) as lines:
        return reader.words(lines)


@contextmanager
def _lines_for(reader: _Reader) -> Iterator[Iterator[str]]:
    """Open a reader's file for it; what goes wrong is said with the last line read."""
    path = reader.path
    try:
        with open_arpa(path) as stream:
            yield (line.rstrip("\r\n") for line in stream)
    except (FileNotFoundError, IsADirectoryError):
        raise HarkenError(f"no n-gram model at {path}; expected an ARPA file") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise HarkenError(f"{path}, after line {reader.line}: {error}; expected an ARPA file in UTF-8") from None


def open_arpa(path: Path) -> TextIO:
    """Open a text file, plain or gzip (`.gz`)."""
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


class _Reader:
    """Reads one file; `line` is the number of the last line read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0
        self.id_of: dict[str, int] = {}
        self.contexts: dict[State, Context] = {(): Context()}

    def read(self, stream: Iterator[str]) -> NGram:
        lines = self._numbered(stream)
        expected = self._header(lines)
        for order, number in enumerate(expected, start=1):
            self._section(lines, order, number, has_backoff=order < len(expected))
        self._expect_line(lines, "\\end\\")
        return NGram(len(expected), list(self.id_of), self.contexts)

    def words(self, stream: Iterator[str]) -> list[str]:
        lines = self._numbered(stream)
        expected = self._header(lines)
        self._section(lines, 1, expected[0], has_backoff=len(expected) > 1)
        return list(self.id_of)

    def _numbered(self, stream: Iterator[str]) -> Iterator[str]:
        for self.line, line in enumerate(stream, start=1):
            if line.strip(" \t"):
                yield line.strip(" \t")

    def _header(self, lines: Iterator[str]) -> list[int]:
        # The format allows any text before \data\.
        if "\\data\\" not in lines:
            raise HarkenError(f"{self.path}: no `\\data\\` line; expected an ARPA file")
        expected: list[int] = []
        for line in lines:
            if line == "\\1-grams:" and expected:
                return expected
            left, _, right = line.partition("=")
            if left.split() != ["ngram", str(len(expected) + 1)] or not right.strip().isdigit():
                raise self._wrong(f"`ngram {len(expected) + 1}=COUNT`", line)
            expected.append(int(right))
        raise self._wrong("`\\1-grams:`", "the end of the file")

    def _section(self, lines: Iterator[str], order: int, number: int, *, has_backoff: bool) -> None:
        if order > 1:
            self._expect_line(lines, f"\\{order}-grams:")
        for _ in range(number):
            line = next(lines, "the end of the file")
            fields = [part for part in line.replace("\t", " ").split(" ") if part]
            if len(fields) not in (order + 1, order + 2 if has_backoff else order + 1):
                raise self._wrong(f"a log-probability and {order} words ({number} such lines in this section)", line)
            try:
                log_prob = float(fields[0])
                backoff = float(fields[order + 1]) if len(fields) > order + 1 else None
            except ValueError:
                raise self._wrong("a number at the beginning and at the end", line) from None
            self._add(fields[1 : order + 1], log_prob, backoff)

    def _add(self, words: list[str], log_prob: float, backoff: float | None) -> None:
        if len(words) == 1:
            word = UNKNOWN if words[0] == "<UNK>" else words[0]
            ngram: State = (self.id_of.setdefault(word, len(self.id_of)),)
        else:
            unlisted = [word for word in words if word not in self.id_of]
            if unlisted:
                raise self._wrong("words that are listed as 1-grams", " ".join(unlisted))
            ngram = tuple(self.id_of[word] for word in words)
        self.contexts.setdefault(ngram[:-1], Context()).next[ngram[-1]] = log_prob * _LN10
        if backoff is not None:
            self.contexts.setdefault(ngram, Context()).backoff = backoff * _LN10

    def _expect_line(self, lines: Iterator[str], expected: str) -> None:
        line = next(lines, "the end of the file")
        if line != expected:
            raise self._wrong(f"`{expected}`", line)

    def _wrong(self, expected: str, found: str) -> HarkenError:
        where = f"{self.path}, line {self.line}"
        return HarkenError(f"{where}: expected {expected}, found `{found[:80]}`; not an ARPA file, or a cut one")
