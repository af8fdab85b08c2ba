"""Texts to tokens and back. Token 0 is CTC's blank; no class is shared with padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from harken.core.errors import HarkenError
from harken.core.files import atomic_path, write_text_atomic

BLANK = 0


class Tokenizer(Protocol):
    """Maps texts to token ids in 1..size-1; 0 is the blank."""

    @property
    def size(self) -> int:
        """Number of classes, the blank included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def unknown(self, text: str) -> set[str]:
        """Return what of a text has no class of its own."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids."""
        ...

    def symbols(self) -> list[str]:
        """Return what each class is called, the blank first."""
        ...


class Characters:
    """One class for each character of a list (one a line in the file; a space is written `<space>`)."""

    def __init__(self, characters: Sequence[str]) -> None:
        self._characters = list(characters)
        self._ids = {character: index for index, character in enumerate(self._characters, start=1)}

    @property
    def size(self) -> int:
        """Number of characters and the blank."""
        return len(self._characters) + 1

    def encode(self, text: str) -> list[int]:
        """Return one id for each character.

        Raises HarkenError for a character that is not in the list.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise HarkenError(
                f"character {error} of `{text}` is not among the {len(self._ids)} of the tokenizer; normalise the text"
            ) from error

    def unknown(self, text: str) -> set[str]:
        """Return the characters that are not in the list."""
        return set(text) - self._ids.keys()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids."""
        return "".join(self._characters[token - 1] for token in tokens)

    def symbols(self) -> list[str]:
        """Return what each class is called."""
        return ["<blank>", *("<space>" if character == " " else character for character in self._characters)]

    @classmethod
    def train(cls, texts: Iterable[str]) -> Characters:
        """Make the list of the characters that occur, in code-point order.

        Raises HarkenError for a line break of any kind, which the file of one character a line could not hold.
        """
        characters = sorted(Counter(character for text in texts for character in text))
        breaks = [f"U+{ord(character):04X}" for character in characters if character.splitlines() != [character]]
        if breaks:
            raise HarkenError(f"a text must be one line, and the texts hold {', '.join(breaks)}; normalise the texts")
        return cls(characters)

    def save(self, path: Path) -> None:
        """Write one character a line."""
        write_text_atomic(path, "".join(f"{symbol}\n" for symbol in self.symbols()[1:]))

    @classmethod
    def load(cls, path: Path) -> Characters:
        """Read what `save` wrote."""
        lines = path.read_text(encoding="utf-8").splitlines()
        return cls([" " if line == "<space>" else line for line in lines])


class Pieces:
    """A sentencepiece model; its ids are moved up by one to leave 0 to the blank."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    @property
    def size(self) -> int:
        """Number of pieces and the blank."""
        return int(self._model.get_piece_size()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's pieces."""
        return [piece + 1 for piece in self._model.encode(text)]

    def unknown(self, text: str) -> set[str]:
        """Return what becomes the model's piece for the unknown."""
        ids, pieces = self._model.encode(text), self._model.encode(text, out_type=str)
        return {piece for number, piece in zip(ids, pieces, strict=True) if number == self._model.unk_id()}

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids."""
        return str(self._model.decode([token - 1 for token in tokens]))

    def symbols(self) -> list[str]:
        """Return what each class is called."""
        return ["<blank>", *(str(self._model.id_to_piece(index)) for index in range(self.size - 1))]

    @classmethod
    def train(cls, texts: Iterable[str], path: Path, size: int, **options: Any) -> Pieces:
        """Train a BPE model of `size` classes (the blank included) and write it to `path` (`.model`).

        options: more of sentencepiece's. Raises HarkenError when the texts do not give as many classes.
        """
        import sentencepiece

        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(texts),
                    model_writer=stream,
                    vocab_size=size - 1,
                    model_type="bpe",
                    character_coverage=1.0,
                    max_sentence_length=2**30,  # longer texts than 4192 bytes are left out by default, unsaid
                    bos_id=-1,
                    eos_id=-1,
                    minloglevel=2,
                    **options,
                )
            except RuntimeError as error:
                raise HarkenError(f"sentencepiece could not train {size} classes: {error}") from error
        return cls(path)


_FIRST_BYTE = 0x2800  # the Braille patterns are 256 printable characters, which other texts hardly hold
_NEVER = {0x20, 0xC0, 0xC1, *range(0xF5, 0x100)}  # the space stays one; UTF-8 has no such bytes


class BytePieces(Pieces):
    """BPE over the bytes of UTF-8: every text of every script has tokens, and none is unknown.

    In the sentencepiece model byte b is the Braille pattern U+2800 + b, by which `load_tokenizer` knows it. Source:
    Wang et al. 2020, "Neural machine translation with byte-level subwords", arXiv 1909.03341; icefall has it too.
    """

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's pieces."""
        return super().encode(_to_patterns(text))

    def unknown(self, text: str) -> set[str]:
        """Return nothing: each byte has a class."""
        return set()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8, which a model can write, are left out."""
        codes = (0x20 if pattern == " " else ord(pattern) - _FIRST_BYTE for pattern in super().decode(tokens))
        return bytes(code for code in codes if 0 <= code < 256).decode("utf-8", errors="ignore")

    def symbols(self) -> list[str]:
        """Return what each class is called: ASCII as itself, other bytes by their patterns."""
        ascii_of = {_FIRST_BYTE + byte: chr(byte) for byte in range(0x21, 0x7F)}
        return [symbol.translate(ascii_of) for symbol in super().symbols()]

    @classmethod
    def train(cls, texts: Iterable[str], path: Path, size: int, **options: Any) -> BytePieces:
        """Train as `Pieces.train` does; all bytes that UTF-8 has are classes, whether they occur or not."""
        patterns = "".join(chr(_FIRST_BYTE + byte) for byte in range(256) if byte not in _NEVER)
        given = {"normalization_rule_name": "identity", "required_chars": patterns, **options}
        super().train(map(_to_patterns, texts), path, size, **given)
        return cls(path)

    @property
    def holds_bytes(self) -> bool:
        """Whether the model is one of bytes."""
        first, last = chr(_FIRST_BYTE), chr(_FIRST_BYTE + 255)
        return any(first <= letter <= last for symbol in super().symbols() for letter in symbol)


def _to_patterns(text: str) -> str:
    return "".join(" " if byte == 0x20 else chr(_FIRST_BYTE + byte) for byte in text.encode())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer: sentencepiece (over characters or bytes) for `.model`, a list of characters otherwise.

    Raises HarkenError when the file is not there or holds neither.
    """
    path = Path(path)
    if not path.is_file():
        raise HarkenError(f"no tokenizer at {path}; `harken data tokens MANIFEST --out {path}` makes one")
    try:
        if path.suffix != ".model":
            return Characters.load(path)
        of_bytes = BytePieces(path)
        return of_bytes if of_bytes.holds_bytes else Pieces(path)
    except (RuntimeError, UnicodeDecodeError) as error:
        kind = "a sentencepiece model" if path.suffix == ".model" else "a list of characters, one a line"
        raise HarkenError(f"{path} must be {kind}, and cannot be read: {error}") from error
