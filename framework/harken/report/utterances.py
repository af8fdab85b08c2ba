"""A few utterances seen from all sides: what was said, its units, what a CTC model heard and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import Samples, UnreadableAudioError, read_cut
from harken.data.tokens import BLANK
from harken.decode.alignment import forced_alignments, word_spans
from harken.decode.greedy import greedy_search
from harken.evaluate.ctc_model import CtcModel
from harken.evaluate.hypotheses import read_hypotheses
from harken.evaluate.wer import Errors, Op, align, characters, count, words
from harken.report.collect import Store
from harken.units.store import LabelStore

# utterances of these lengths can be read on a page
READABLE_SECONDS = (2.0, 8.0)
MOST_LINES = 2000

Times = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class UnitRow:
    """The units of an utterance in one store: `edges` `(N + 1,)` in seconds, `values` `(N,)`."""

    name: str
    edges: NDArray[np.float64]
    values: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class View:
    """An utterance as it is drawn.

    probabilities: `(T, V)` of the model's outputs, the middle of t at `output_times[t]` seconds and `output_seconds`
        from the next. source: where `hyp` is from.
    ref_times, hyp_times: (start, end) of each word in seconds on the best CTC path of its text, empty if it has none.
    """

    id: str
    speaker: str
    manifest: str
    source: str
    seconds: float
    samples: Samples
    sample_rate: int
    units: list[UnitRow]
    probabilities: NDArray[np.float32]
    output_times: NDArray[np.float64]
    output_seconds: float
    symbols: list[str]
    ops: tuple[Op, ...]
    words: Errors
    characters: Errors
    ref: str
    hyp: str
    ref_times: Times
    hyp_times: Times


@dataclass(frozen=True)
class _Candidate:
    manifest: Manifest
    place: int
    seconds: float
    ref: str
    hyp: str | None
    source: str


def show_utterances(
    model: CtcModel,
    manifests: Sequence[str],
    hypotheses: Sequence[Path],
    stores: Sequence[Store],
    number: int,
) -> tuple[list[View], str]:
    """Return views of `number` utterances of manifests, and a sentence that says how they were chosen.

    Where hypothesis files have utterances of the manifests, those are chosen by their word error rate, from low to
    high; else utterances are chosen by duration and decoded by greedy search.
    Raises HarkenError for a missing manifest or a broken hypothesis file.
    """
    candidates = _candidates(manifests, hypotheses)
    decoded = [one for one in candidates if one.hyp is not None]
    if decoded:
        decoded.sort(key=lambda one: (count(align(words(one.ref), words(one.hyp or ""))).rate, one.seconds))
        chosen, how = (
            _spread(decoded, number),
            f"Spread evenly over {len(decoded)} decoded utterances, from the lowest word error rate to the highest.",
        )
    else:
        candidates.sort(key=lambda one: one.seconds)
        chosen, how = (
            _spread(candidates, number),
            f"Spread evenly over {len(candidates)} utterances ordered by duration; decoded here by greedy search.",
        )
    low, high = READABLE_SECONDS
    return [
        _view(one, model, stores) for one in chosen
    ], f"{how} Only utterances of {low:g} to {high:g} s are considered, where there are any."


def _spread(ordered: Sequence[_Candidate], number: int) -> list[_Candidate]:
    """Take the middles of `number` equal parts, so that neither the best nor the worst oddity is shown."""
    number = min(number, len(ordered))
    return [ordered[int((part + 0.5) * len(ordered) / number)] for part in range(number)]


def _candidates(manifests: Sequence[str], hypotheses: Sequence[Path]) -> list[_Candidate]:
    known = {one.id: (one.hyp, path) for path in hypotheses for one in read_hypotheses(path)}
    found = []
    for path in manifests:
        manifest = Manifest(path)
        seconds = np.asarray(manifest.seconds)
        readable = np.flatnonzero((seconds >= READABLE_SECONDS[0]) & (seconds <= READABLE_SECONDS[1]))
        places = readable if len(readable) else np.arange(len(seconds))
        for place in places[:: max(1, len(places) // MOST_LINES)].tolist():
            line = manifest.line(place)
            ref = " ".join(part["text"].strip() for part in line.get("supervisions", ()) if part.get("text"))
            hyp, source = known.get(str(line["id"]), (None, None))
            if ref:
                found.append(
                    _Candidate(
                        manifest,
                        place,
                        float(seconds[place]),
                        ref,
                        hyp,
                        str(source) if source else "greedy search",
                    )
                )
    if not found:
        raise HarkenError(
            f"no utterance with a transcript in {', '.join(manifests)}: name a manifest of labelled speech by `--cuts`"
        )
    return found


@torch.no_grad()
def _view(one: _Candidate, model: CtcModel, stores: Sequence[Store]) -> View:
    cut = one.manifest[one.place]
    spec = model.spec
    try:
        samples = read_cut(cut, spec.sample_rate)
    except UnreadableAudioError as error:
        raise HarkenError(f"{error}; run `harken data verify {one.manifest.path}`") from error
    log_probs, lengths = model.log_probs(collate([Row(cut.id, one.ref, samples, 0)]))
    scores: NDArray[np.float32] = log_probs[0, : int(lengths[0])].float().cpu().numpy()
    hyp = one.hyp
    if hyp is None:
        hyp = " ".join(model.tokenizer.decode(greedy_search(log_probs, lengths, blank=BLANK)[0]).split())
    ops = align(words(one.ref), words(hyp))
    return View(
        id=cut.id,
        speaker=next((part.speaker for part in cut.supervisions if part.speaker), ""),
        manifest=str(one.manifest.path),
        source=one.source,
        seconds=len(samples) / spec.sample_rate,
        samples=samples,
        sample_rate=spec.sample_rate,
        units=[row for store in stores if (row := _units(store, cut.id)) is not None],
        probabilities=np.exp(scores),
        output_times=np.array([model.seconds(output) for output in range(len(scores))]),
        output_seconds=model.output_seconds,
        symbols=model.tokenizer.symbols(),
        ops=ops,
        words=count(ops),
        characters=count(align(characters(one.ref), characters(hyp))),
        ref=one.ref,
        hyp=hyp,
        ref_times=_times(one.ref, log_probs, lengths, model),
        hyp_times=_times(hyp, log_probs, lengths, model),
    )


def _units(store: Store, cut: str) -> UnitRow | None:
    labels, card = LabelStore(store.folder), store.card
    try:
        values = np.asarray(labels[cut], dtype=np.int64)
    except HarkenError:  # a store of other audio: the page says so by leaving the row out
        return None
    values = values[:: card.rows]  # of patches the lowest row
    edges = (card.center + card.hop * (np.arange(len(values) + 1) - 0.5)) / card.sample_rate
    return UnitRow(name=store.name, edges=edges, values=values)


def _times(text: str, log_probs: Tensor, lengths: Tensor, model: CtcModel) -> Times:
    try:
        tokens = model.tokenizer.encode(text)
    except HarkenError:  # a text with characters that the model does not know has no path
        return []
    (spans,) = forced_alignments(log_probs, lengths, [tokens], blank=BLANK)
    if spans is None:
        return []
    symbols = model.tokenizer.symbols()
    found = word_spans(spans, [symbols[token] for token in tokens])
    if len(found) != len(words(text)):
        return []
    return [(model.seconds(first - 0.5), model.seconds(end - 0.5)) for first, end in found]
