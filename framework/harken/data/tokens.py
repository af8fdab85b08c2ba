"""Texts to tokens and back. Token 0 is CTC's blank; no class is shared with padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

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
    def train(cls, texts: Iterable[str], path: Path, size: int, kind: str = "bpe") -> Pieces:
        """Train a model of `size` classes (the blank included) and write it to `path` (`.model`)."""
        import sentencepiece

        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(texts),
                    model_writer=stream,
                    vocab_size=size - 1,
                    model_type=kind,
                    character_coverage=1.0,
                    max_sentence_length=2**30,  # longer texts than 4192 bytes are left out by default, unsaid
                    bos_id=-1,
                    eos_id=-1,
                    minloglevel=2,
                )
            except RuntimeError as error:
                raise HarkenError(f"sentencepiece could not train {size} classes: {error}") from error
        return cls(path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer: sentencepiece for `.model`, a list of characters otherwise.

    Raises HarkenError when the file is not there or holds neither.
    """
    path = Path(path)
    if not path.is_file():
        raise HarkenError(f"no tokenizer at {path}; `harken data tokens MANIFEST --out {path}` makes one")
    try:
        return Pieces(path) if path.suffix == ".model" else Characters.load(path)
    except (RuntimeError, UnicodeDecodeError) as error:
        kind = "a sentencepiece model" if path.suffix == ".model" else "a list of characters, one a line"
        raise HarkenError(f"{path} must be {kind}, and cannot be read: {error}") from error
