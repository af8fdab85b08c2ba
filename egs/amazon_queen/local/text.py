"""Text of the game's lines as a recogniser is trained on it: lower-case letters, apostrophe and single spaces."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

NOISE = re.compile(r"<[^<>]*>|\([^()]*\)")
# "^_" draws a trademark sign and "@" a heart in the game's font; neither is spoken.
NOT_SPOKEN = re.compile(r"\^_|@")
NOT_IN_ALPHABET = re.compile(r"[^a-z' ]+")
ABBREVIATIONS = {"mr": "mister", "dr": "doctor", "vs": "versus"}
LONE_APOSTROPHE = re.compile(r"(?<![a-z])'+(?![a-z])|'{2,}")


@dataclass(frozen=True)
class Normalised:
    """Normalised text, or the reason why there is none."""

    text: str
    reason: str = ""


def normalise(raw: str) -> Normalised:
    """Return `raw` in lower case with accents folded and noises in `<...>` or `(...)` removed.

    A hyphen or other mark becomes a space ("life-like" is "life like"), "Mr." and its like are written out. A text with
    digits is refused: the package does not say how "1844" or "24" was read, and fewer than 20 lines have any.
    """
    text = NOT_SPOKEN.sub(" ", NOISE.sub(" ", raw))
    if NOISE.search(raw) and not any(c.isalnum() for c in text):
        return Normalised("", "noise only")
    if any(c.isdigit() for c in text):
        return Normalised("", "digits")
    folded = unicodedata.normalize("NFKD", text)
    folded = "".join(c for c in folded if not unicodedata.combining(c)).lower()
    folded = folded.replace("\u2019", "'").replace("\u2018", "'")
    spaced = LONE_APOSTROPHE.sub(" ", NOT_IN_ALPHABET.sub(" ", folded))
    words = " ".join(ABBREVIATIONS.get(word, word) for word in spaced.split())
    if not any(c.isalpha() for c in words):
        return Normalised("", "no letters")
    return Normalised(words)
