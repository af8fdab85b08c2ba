"""Errors a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HarkenError(Exception):
    """A mistake in the input that the user can mend: the command line prints it without a traceback.

    The message says what was expected, what was found, and what to do next.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean `x`?"` for the nearest known name, or the list of known names when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(names)}" if names else ""
