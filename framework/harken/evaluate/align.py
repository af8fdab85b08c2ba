"""Transcripts aligned by a CTC model: which token each of its outputs belongs to, for every cut of a manifest.

The cuts are worked on in blocks of neighbours in the manifest, each in batches by duration, so that what is written
comes in the manifest's order and no more than some blocks are held at a time.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from harken.config.saved import find_model, weights_digest
from harken.core.errors import HarkenError
from harken.core.files import atomic_folder, check_replaceable, remove, sha256_file, write_json_atomic
from harken.core.pieces import Piece
from harken.data.alignments import TOKENS, WORDS, Item, add_items, placed_supervisions
from harken.data.dataset import read_whole
from harken.data.index import build_index, index_folder
from harken.data.lines import text_of
from harken.data.manifest import Manifest
from harken.data.parallel import Division, in_pieces
from harken.data.plan import rectangles
from harken.data.tokens import BLANK
from harken.decode.alignment import Span, forced_alignments, spread, word_numbers
from harken.decode.search import checked
from harken.evaluate.ctc_model import CtcModel, load_ctc
from harken.objectives.ctc import CtcConfig
from harken.objectives.transcripts import frames_needed
from harken.units.store import UNREADABLE, Card, begin_store, fit_length, order_entries, write_reasons

KIND = "alignment"
CARD, CUTS, LABELS = "card.json", "cuts.jsonl", "labels"
FILES = (CARD, CUTS, index_folder(Path(CUTS)).name, LABELS)
BLOCK = 256
BLOCKS_KEPT = 64
"""Blocks whose alignments are kept together in the pieces of a long work."""


@dataclass(frozen=True)
class Aligned:
    """The tokens `(U,)` of a cut, their spans of outputs `(U, 2)`, wide ones, and how many outputs there are.

    Arrays, as several blocks of cuts wait to be written: lists of numbers would take ten times the memory.
    """

    tokens: NDArray[np.int32]
    spans: NDArray[np.int32]
    outputs: int

    @classmethod
    def of(cls, tokens: Sequence[int], spans: Sequence[Span], outputs: int) -> Aligned:
        """Pack the tokens and the spans of a cut."""
        return cls(np.array(tokens, dtype=np.int32), np.array(spans, dtype=np.int32).reshape(-1, 2), outputs)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The token of each output; the blank before the first and behind the last token."""
        labels = np.full(self.outputs, BLANK)
        for token, (first, end) in zip(self.tokens, self.spans.tolist(), strict=True):
            labels[first:end] = token
        return labels


Found: TypeAlias = tuple[dict[int, Aligned], dict[str, str]]
"""Alignments by the cuts' places in the manifest, and why others have none, by their ids."""


@dataclass(frozen=True)
class Work:
    """What every process needs; it is pickled to them. max_seconds: padded audio of a batch."""

    model: str
    manifest: str
    max_seconds: float

    def __call__(self, places: tuple[int, ...]) -> Found:
        """Align the cuts at places."""
        manifest, model, _ = _opened(self.manifest, self.model)
        texts, reasons = _texts(manifest, model, places)
        aligned: dict[int, Aligned] = {}
        if not texts:
            return aligned, reasons
        kept = np.array(list(texts))
        for batch in rectangles(np.asarray(manifest.seconds)[kept], self.max_seconds):
            chosen = kept[batch].tolist()
            aligned.update(_align_batch(manifest, model, {place: texts[place] for place in chosen}, reasons))
        return aligned, reasons


@lru_cache(maxsize=1)
def _opened(manifest: str, path: str) -> tuple[Manifest, CtcModel, str]:
    """Open what a process works on, once, with the model's tokenizer. On one thread: the processes share the cores."""
    torch.set_num_threads(1)
    model, config = load_ctc(path, "cuda" if torch.cuda.is_available() else "cpu")
    return Manifest.filled(manifest), model, cast(CtcConfig, config.objective).tokenizer


def _texts(
    manifest: Manifest, model: CtcModel, places: Sequence[int]
) -> tuple[dict[int, tuple[str, list[int]]], dict[str, str]]:
    """Return the id and the tokens of each cut that has any, and why others have none."""
    texts: dict[int, tuple[str, list[int]]] = {}
    reasons: dict[str, str] = {}
    for place in places:
        line = manifest.line(place)
        cut = str(line["id"])
        text = text_of(line)
        if lacking := model.tokenizer.unknown(text):
            shown = ", ".join(map(repr, sorted(lacking)))
            reasons[cut] = f"the transcript of cut `{cut}` has {shown}, which the tokenizer lacks"
            continue
        tokens = model.tokenizer.encode(text)
        if tokens:
            texts[place] = cut, tokens
        else:
            reasons[cut] = f"cut `{cut}` has no transcript"
    return texts, reasons


@torch.inference_mode()
def _align_batch(
    manifest: Manifest, model: CtcModel, texts: dict[int, tuple[str, list[int]]], reasons: dict[str, str]
) -> dict[int, Aligned]:
    batch = read_whole(manifest, texts, model.spec.sample_rate, reasons)
    if batch is None:
        return {}
    log_probs, lengths = model.log_probs(batch)
    read = [(place, cut, tokens) for place, (cut, tokens) in texts.items() if cut not in reasons]
    scores = checked(log_probs, lengths, model.tokenizer.size)
    found = forced_alignments(scores, lengths, [tokens for _, _, tokens in read], blank=BLANK)
    aligned = {}
    for (place, cut, tokens), spans, outputs in zip(read, found, lengths.tolist(), strict=True):
        if spans is None:
            reasons[cut] = (
                f"the transcript of cut `{cut}` has {len(tokens)} tokens and needs {frames_needed(tokens)} frames, "
                f"the model gives {outputs}"
            )
        else:
            aligned[place] = Aligned.of(tokens, spread(spans, outputs), outputs)
    return aligned


def align(work: Work, out: Path, jobs: int, say: Callable[[str], None], piece: Piece | None = None) -> None:
    """Write the folder of an alignment: `cuts.jsonl`, `labels` and `card.json`.

    piece: of the work, to be done and kept in `OUT.pieces`, and nothing else. A call without takes up what is
    there, of pieces or of a long work that was killed.
    Raises HarkenError, before any audio is read, for a model without CTC, one whose outputs do not lie on whole
    samples, and when `out` is a folder that is no alignment of harken's; at the end when no cut could be aligned.
    """
    check_replaceable(out, kind=KIND, files=FILES)
    manifest, model, tokenizer = _opened(work.manifest, work.model)
    digest = weights_digest(find_model(work.model))
    ids, index = order_entries(_entries(manifest, model), work.manifest)
    card = _store_card(model, ids, index, digest, sha256_file(tokenizer))
    blocks = [tuple(range(first, min(first + BLOCK, len(ids)))) for first in range(0, len(ids), BLOCK)]
    plan = {
        "model": digest,
        "tokenizer": card.clusterer,
        "manifest": manifest.card["sha256"],
        "max_seconds": work.max_seconds,
    }
    pieces = out.with_name(out.name + ".pieces")
    results = in_pieces(
        work,
        blocks,
        jobs=jobs,
        what="blocks of cuts",
        division=Division(pieces, plan, piece, BLOCKS_KEPT, keep=len(blocks) > BLOCKS_KEPT),
        pack=_pack,
        unpack=_unpack,
    )
    if piece is not None:
        deque(results, maxlen=0)
        return
    reasons: dict[str, str] = {}
    with atomic_folder(out, kind=KIND, files=FILES) as folder:
        (folder / LABELS).mkdir()
        begin_store(folder / LABELS, ids, index, card)
        writer = _Writer(folder, model, card, {cut: row for row, cut in enumerate(ids)}, index)
        with closing(writer):
            for block, (aligned, why) in zip(blocks, results, strict=True):
                reasons.update(why)
                writer.write(manifest, block, aligned, reasons)
        if not writer.aligned:
            remove(pieces)
            raise HarkenError(
                f"none of the {len(ids)} cuts of {work.manifest} could be aligned; the first: "
                f"{next(iter(reasons.values()))}"
            )
        write_reasons(folder / LABELS / UNREADABLE, reasons)
        card.write(folder / LABELS)
        build_index(folder / CUTS, jobs=1)
        about = {
            "weights": digest,
            "tokenizer": card.clusterer,
            "symbols": model.tokenizer.symbols(),
            "manifest": str(Path(work.manifest).resolve()),
            "manifest_sha256": manifest.card["sha256"],
            "seconds_per_output": model.output_seconds,
        }
        write_json_atomic(folder / CARD, {**about, "cuts": len(ids), "aligned": writer.aligned})
    remove(pieces)
    _tell(out, len(ids), writer.aligned, reasons, say)


def _pack(found: Found) -> Any:
    aligned, reasons = found
    packed = {place: (one.tokens.tolist(), one.spans.tolist(), one.outputs) for place, one in aligned.items()}
    return packed, reasons


def _unpack(data: Any) -> Found:
    packed, reasons = data
    return {int(place): Aligned.of(*one) for place, one in packed.items()}, reasons


def _entries(manifest: Manifest, model: CtcModel) -> list[tuple[str, int]]:
    samples = [round(seconds * model.spec.sample_rate) for seconds in np.asarray(manifest.seconds).tolist()]
    return [
        (str(manifest.line(place)["id"]), model.spec.num_frames(count) * model.outputs_per_frame)
        for place, count in enumerate(samples)
    ]


def _store_card(model: CtcModel, ids: list[str], index: NDArray[np.int64], digest: str, tokenizer: str) -> Card:
    if model.spec.stride % model.outputs_per_frame:
        raise HarkenError(
            f"the {model.spec.stride} samples of a frame must be divisible by `objective.head_upsampling`, or outputs "
            f"lie between samples, got {model.outputs_per_frame}"
        )
    return Card(
        clusters=model.tokenizer.size,
        sample_rate=model.spec.sample_rate,
        hop=model.spec.stride // model.outputs_per_frame,
        center=model.seconds(0) * model.spec.sample_rate,
        features=f"tokens aligned by model {digest[:16]}",
        clusterer=tokenizer,
        dtype=Card.smallest_dtype(model.tokenizer.size),
        cuts=len(ids),
        labels=int(index[-1]),
        outputs=model.outputs_per_frame,
    )


def _tell(out: Path, cuts: int, aligned: int, reasons: dict[str, str], say: Callable[[str], None]) -> None:
    say(f"{out}: {aligned} of {cuts} cuts aligned")
    if reasons:
        say(f"WARNING {len(reasons)} cuts have no alignment or one that lacks frames, among them:")
        for reason in list(reasons.values())[:5]:
            say(f"  {reason}")
        say(f"  all of them are named in {out / LABELS / UNREADABLE}")


class _Writer:
    """Writes cuts in the order of the manifest, and their labels to their places."""

    def __init__(
        self, folder: Path, model: CtcModel, card: Card, rows: dict[str, int], index: NDArray[np.int64]
    ) -> None:
        self.model, self.rows, self.index = model, rows, index
        self.symbols, self.dtype = model.tokenizer.symbols(), np.dtype(card.dtype)
        self.lines = (folder / CUTS).open("w", encoding="utf-8")
        self.labels = os.open(folder / LABELS / "labels.bin", os.O_WRONLY)
        self.aligned = 0

    def write(
        self, manifest: Manifest, places: Sequence[int], found: dict[int, Aligned], reasons: dict[str, str]
    ) -> None:
        """Write a block; a cut without an alignment is written as it is."""
        for place in places:
            line = manifest.line(place)
            if place in found:
                cut = str(line["id"])
                first, end = self.index[self.rows[cut] : self.rows[cut] + 2].tolist()
                labels = fit_length(found[place].labels, end - first, cut, reasons)
                os.pwrite(self.labels, labels.astype(self.dtype).tobytes(), first * self.dtype.itemsize)
                annotate(line, found[place], self.model, self.symbols)
                self.aligned += 1
            self.lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Finish both files."""
        self.lines.close()
        os.close(self.labels)


def annotate(line: dict[str, Any], aligned: Aligned, model: CtcModel, symbols: Sequence[str]) -> None:
    """Give the supervisions of a cut, as plain data, their tokens and words with times.

    A cut with several texts has them joined by spaces, as in training: each word goes to the text that it counts in, a
    space to that of the word before it. symbols: of the classes.
    """
    tokenizer, tokens = model.tokenizer, aligned.tokens.tolist()
    names = [symbols[token] for token in tokens]
    numbers = word_numbers(names)
    items: list[Item] = [
        (name, max(0.0, model.seconds(first - 0.5)), model.seconds(end - 0.5))
        for name, (first, end) in zip(names, aligned.spans.tolist(), strict=True)
    ]
    parts = [(part, shift) for part, shift in placed_supervisions(line) if part.get("text")]
    ends = list(accumulate(len(part["text"].split()) for part, _ in parts))
    owners, last = [], 0
    for number in numbers:
        last = last if number is None else min(bisect_right(ends, number), len(parts) - 1)
        owners.append(last)
    words: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        if number is not None:
            words.setdefault(number, []).append(place)
    for owner, (part, shift) in enumerate(parts):
        add_items(part, shift, TOKENS, [item for item, own in zip(items, owners, strict=True) if own == owner])
        of_words = [
            (
                tokenizer.decode([tokens[place] for place in own]).strip(),
                items[own[0]][1],
                items[own[-1]][2],
            )
            for own in words.values()
            if owners[own[0]] == owner
        ]
        add_items(part, shift, WORDS, of_words)
