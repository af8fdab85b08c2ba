"""Hypothesis files: what decoding writes and scoring reads.

A hypothesis file is JSONL, UTF-8, one utterance a line, in any order, each id once:

    {"id": "joe-0001", "speaker": "JOE", "ref": "okay let me see", "hyp": "okay lets see", "seconds": 1.92}

`speaker` is the label in the manifest, `seconds` the length of the audio. More keys are allowed and ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.core.files import write_text_atomic


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One decoded utterance: `ref` and `hyp` are text in the same normalisation, `seconds` the audio length."""

    id: str
    speaker: str
    ref: str
    hyp: str
    seconds: float


def write_hypotheses(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write a hypothesis file atomically, in the order given."""
    write_text_atomic(path, "".join(json.dumps(asdict(u), ensure_ascii=False) + "\n" for u in utterances))


def read_hypotheses(path: str | Path) -> list[Utterance]:
    """Read a hypothesis file; blank lines are skipped.

    Raises HarkenError when the file is missing, not UTF-8 or has no utterance, or a line (named by its number) is not a
    JSON object with the five keys of the right types, or repeats an id.
    """
    path = Path(path)
    utterances: list[Utterance] = []
    line_of: dict[str, int] = {}
    # Split at "\n" alone: str.splitlines would also cut at separators that JSON allows inside a string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        utterance = _parse(line, f"{path}, line {number}")
        if utterance.id in line_of:
            raise HarkenError(
                f"{path}, line {number}: the id `{utterance.id}` is already on line {line_of[utterance.id]}; "
                "each utterance must be there once, remove one of them"
            )
        line_of[utterance.id] = number
        utterances.append(utterance)
    if not utterances:
        raise HarkenError(f"{path} has no utterances; expected one JSON object a line, as `harken decode` writes them")
    return utterances


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HarkenError(f"no hypothesis file at {path}; `harken decode` writes one") from None
    except IsADirectoryError:
        raise HarkenError(f"{path} is a folder; expected one hypothesis file (JSONL) in it, name that") from None
    except PermissionError:
        raise HarkenError(f"{path} cannot be read: permission denied") from None
    except UnicodeDecodeError as error:
        raise HarkenError(f"{path} is not UTF-8 (byte {error.start}); expected a hypothesis file (JSONL)") from None


def _parse(line: str, where: str) -> Utterance:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"{error.msg}, column {error.colno}"
        raise HarkenError(f"{where}: expected one JSON object a line, found no JSON ({problem})") from None
    if not isinstance(value, dict):
        raise HarkenError(f"{where}: expected a JSON object, got {type(value).__name__}")
    missing = [key for key in ("id", "speaker", "ref", "hyp", "seconds") if key not in value]
    if missing:
        names = ", ".join(f"`{key}`" for key in missing)
        raise HarkenError(f"{where}: missing {names}; found {', '.join(value) or 'an empty object'}")
    for key in ("id", "speaker", "ref", "hyp"):
        if not isinstance(value[key], str):
            raise HarkenError(f"{where}: `{key}` must be text, got {json.dumps(value[key])}")
    seconds = value["seconds"]
    if type(seconds) not in (int, float) or not math.isfinite(seconds) or seconds < 0:  # a bool is an int to isinstance
        raise HarkenError(f"{where}: `seconds` must be a number of seconds, 0 or more, got {json.dumps(seconds)}")
    return Utterance(
        id=value["id"], speaker=value["speaker"], ref=value["ref"], hyp=value["hyp"], seconds=float(seconds)
    )
