"""A score as text: the short table that is printed, the aligned errors, and the table of speakers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from harken.evaluate.wer import Errors, Op, Score, UtteranceScore

SPEAKER_NOTE = "A speaker is the label in the manifest; for the characters of a game, one actor may play several."
# Below this a speaker's rate says more about the few words than about the speaker.
MIN_SPEAKER_WORDS = 20
_MARKS = {"ok": "", "sub": "S", "ins": "I", "del": "D"}


def summary(result: Score, *, worst: int = 5) -> str:
    """Return the short table: rates with intervals, kinds of error, the `worst` speakers by WER."""
    size = f"{_plural(len(result.utterances), 'utterance')}, {_plural(len(result.speakers), 'speaker')}"
    lines = [
        f"{size}, {_hours(result.seconds)} of audio",
        f"{'':5}{'%':>7}   {'95% interval':>15}{'errors':>9}{'sub':>8}{'ins':>8}{'del':>8}   reference",
        _rate_line("WER", result.words, result.word_interval, "words"),
        _rate_line("CER", result.characters, result.character_interval, "characters"),
    ]
    if len(result.speakers) > 1 and worst > 0:
        lines += ["", *_worst_speakers(result, worst)]
    return "\n".join([*lines, SPEAKER_NOTE])


def per_speaker_tsv(result: Score) -> str:
    """Return a tab-separated table, one line a speaker; rates in percent, empty where the reference is empty."""
    columns = (
        "speaker",
        "utterances",
        "seconds",
        "wer_percent",
        "cer_percent",
        "word_sub",
        "word_ins",
        "word_del",
    )
    lines = ["\t".join((*columns, "ref_words", "ref_characters"))]
    for label, one in result.speakers.items():
        cells = (
            " ".join(label.split()),
            one.utterances,
            f"{one.seconds:.2f}",
            _percent(one.words.rate, empty=""),
            _percent(one.characters.rate, empty=""),
            one.words.sub,
            one.words.ins,
            one.words.deleted,
            one.words.ref,
            one.characters.ref,
        )
        lines.append("\t".join(str(cell) for cell in cells))
    return "\n".join(lines) + "\n"


def errors_text(result: Score, *, width: int = 100, most_common: int = 20) -> str:
    """Return the aligned errors: the most common ones, each utterance with errors (most first), the ids of the rest.

    In an alignment S, I and D mark a substituted, inserted and deleted word, and `*` stands where there is none.
    """
    order = sorted(result.utterances, key=lambda one: (-one.words.total, one.utterance.id))
    wrong = [one for one in order if one.words.total]
    right = [one.utterance.id for one in order if not one.words.total]
    lines = [
        f"WER {_percent(result.words.rate)}%: {_kinds(result.words)}",
        f"{len(right)} of {_plural(len(order), 'utterance')} without an error",
        SPEAKER_NOTE,
        "",
        *_confusions(result.utterances, most_common),
        "## Utterances with errors, most errors first",
        "",
    ]
    for one in wrong:
        lines += [*_utterance_lines(one, width), ""]
    return "\n".join([*lines, "## Utterances without errors", "", *right]) + "\n"


def _rate_line(name: str, errors: Errors, interval: tuple[float, float], unit: str) -> str:
    limits = f"{_percent(interval[0])} .. {_percent(interval[1])}"
    return (
        f"{name:5}{_percent(errors.rate):>7}   {limits:>15}{errors.total:>9}{errors.sub:>8}{errors.ins:>8}"
        f"{errors.deleted:>8}   {errors.ref} {unit}"
    )


def _worst_speakers(result: Score, worst: int) -> list[str]:
    scored = {label: one for label, one in result.speakers.items() if one.words.ref}
    enough = {label: one for label, one in scored.items() if one.words.ref >= MIN_SPEAKER_WORDS}
    title = f"Worst speakers by WER, of those with {MIN_SPEAKER_WORDS} or more reference words:"
    if not enough:
        enough, title = scored, f"Worst speakers by WER (none has {MIN_SPEAKER_WORDS} reference words):"
    ranked = sorted(enough.items(), key=lambda item: (-item[1].words.rate, item[0]))[:worst]
    size = max((len(label) for label, _ in ranked), default=0)
    lines = [title]
    for label, one in ranked:
        lines.append(
            f"  {label:{size}}  WER {_percent(one.words.rate):>6}  CER {_percent(one.characters.rate):>6}  "
            f"{_plural(one.utterances, 'utterance')}, {_plural(one.words.ref, 'word')}"
        )
    return lines


def _confusions(utterances: Sequence[UtteranceScore], most_common: int) -> list[str]:
    titles = {"sub": "Substitutions (reference -> hypothesis)", "ins": "Insertions", "del": "Deletions"}
    lines: list[str] = []
    for kind, title in titles.items():
        found = Counter((op.ref, op.hyp) for one in utterances for op in one.ops if op.kind == kind)
        if not found:
            continue
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:most_common]
        lines += [f"## {title}: {sum(found.values())}, the most common", ""]
        lines += [f"{number:6}  {' -> '.join(word for word in pair if word)}" for pair, number in ranked]
        lines.append("")
    return lines


def _utterance_lines(one: UtteranceScore, width: int) -> list[str]:
    utterance = one.utterance
    name = f"{utterance.id}  speaker {utterance.speaker}  {utterance.seconds:.2f} s"
    lines = [f"{name}  WER {_percent(one.words.rate)}%: {_kinds(one.words)}"]
    for row in _rows(one.ops, width - len("  ref  ")):
        cells = [(op.ref or "*" * len(op.hyp), op.hyp or "*" * len(op.ref), _MARKS[op.kind]) for op in row]
        sizes = [max(len(text) for text in cell) for cell in cells]
        for place, name in enumerate(("ref", "hyp", "   ")):
            texts = (cell[place].ljust(size) for cell, size in zip(cells, sizes, strict=True))
            lines.append(f"  {name}  {' '.join(texts)}".rstrip())
    return lines


def _rows(ops: Sequence[Op], width: int) -> list[list[Op]]:
    rows: list[list[Op]] = []
    used = width
    for op in ops:
        size = max(len(op.ref), len(op.hyp)) + 1
        if used + size > width:
            rows.append([])
            used = 0
        rows[-1].append(op)
        used += size
    return rows


def _kinds(errors: Errors) -> str:
    return f"{errors.sub} sub, {errors.ins} ins, {errors.deleted} del of {_plural(errors.ref, 'word')}"


def _percent(rate: float, *, empty: str = "-") -> str:
    return empty if math.isnan(rate) else f"{100 * rate:.2f}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _hours(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
