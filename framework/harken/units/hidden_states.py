"""Hidden states of a model's layers for every cut of a manifest, as arrays that numpy and Lhotse read.

Files are written one by one and each is whole or absent, so an interrupted call goes on with those that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harken.config.saved import find_model, weights_digest
from harken.core import distributed
from harken.core.errors import HarkenError
from harken.core.files import atomic_path, check_replaceable, remove, write_json_atomic
from harken.core.pieces import Piece
from harken.data.dataset import read_whole
from harken.data.manifest import Manifest
from harken.data.parallel import Division, in_pieces
from harken.data.plan import rectangles
from harken.encoders.backbone import Backbone, hidden_rows
from harken.encoders.saved import load_backbone
from harken.units.store import write_reasons

CARD, CUTS, UNREADABLE = "card.json", "cuts.jsonl", "unreadable.tsv"
FILES_OF_A_FOLDER = 1000

Written = dict[int, dict[int, list[int]]]
"""Shapes of what was written, by place of the cut in the manifest and by layer."""


@dataclass(frozen=True)
class Extraction:
    """What every process needs; it is pickled to them.

    layers: 0 is the encoder's input, i the output of block i. dtype: of the files, `float32` or `float16`.
    """

    model: str
    manifest: str
    out: Path
    layers: tuple[int, ...]
    dtype: str = "float32"
    max_seconds: float = 60.0

    def __call__(self, places: tuple[int, ...]) -> tuple[Written, dict[str, str]]:
        """Write the states of the cuts at places; return their shapes, and why some have none."""
        manifest, backbone = _opened(self.manifest, self.model)
        kept = {place: {layer: self._shape(layer, place) for layer in self.layers} for place in places}
        if all(all(shapes.values()) for shapes in kept.values()):
            return kept, {}
        # all of the batch again where one is missing: the last bits depend on what shares it
        unreadable: dict[str, str] = {}
        batch = read_whole(manifest, places, backbone.spec.sample_rate, unreadable)
        if batch is None:
            return {}, unreadable
        read = [place for place in places if manifest.line(place)["id"] not in unreadable]
        states = hidden_rows(backbone, batch.to(backbone.mask_embedding.device), self.layers)
        return {
            place: {layer: self._write(layer, place, states[layer][row]) for layer in self.layers}
            for row, place in enumerate(read)
        }, unreadable

    def file(self, layer: int, place: int) -> Path:
        """Return the file of a layer and a cut: some thousand of a layer share a folder."""
        return self.out / f"layer{layer}" / f"{place // FILES_OF_A_FOLDER:05d}" / f"{place:08d}.npy"

    def _shape(self, layer: int, place: int) -> list[int]:
        path = self.file(layer, place)
        return list(np.load(path, mmap_mode="r").shape) if path.is_file() else []

    def _write(self, layer: int, place: int, states: NDArray[np.float32]) -> list[int]:
        path = self.file(layer, place)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, states.astype(self.dtype))
        return list(states.shape)


@lru_cache(maxsize=1)
def _opened(manifest: str, model: str) -> tuple[Manifest, Backbone]:
    """Open what a process works on, once. On one thread: the processes share the cores, and no bit depends on them."""
    torch.set_num_threads(1)
    backbone, _ = load_backbone(model)
    return Manifest(manifest), backbone.to(distributed.device())


def extract(work: Extraction, jobs: int, say: Callable[[str], None], piece: Piece | None = None) -> None:
    """Write the states of every cut, `cuts.jsonl`, `unreadable.tsv` and `card.json`, going on where a call stopped.

    piece: of the work, to be done alone; a call without one does what is left and completes the folder.
    Raises HarkenError for layers that the model lacks, and when the folder holds anything else.
    """
    manifest = Manifest.filled(work.manifest)
    backbone = _opened(work.manifest, work.model)[1]
    _check_layers(work, backbone)
    plan = {
        "model": weights_digest(find_model(work.model)),
        "manifest": manifest.card["sha256"],
        "layers": list(work.layers),
        "dtype": work.dtype,
        "max_seconds": work.max_seconds,
    }
    if _is_finished(work.out, plan):
        say(f"{work.out} is finished: nothing to do")
        return
    batches = [tuple(places.tolist()) for places in rectangles(np.asarray(manifest.seconds), work.max_seconds)]
    folder = work.out / "pieces"
    if not folder.is_dir():
        check_replaceable(work.out, kind="folder of hidden states")
    results = in_pieces(
        work,
        batches,
        jobs=jobs,
        what="batches of hidden states",
        division=Division(folder, plan, piece, keep=True),
        pack=lambda found: found,
        unpack=_unpack,
    )
    shapes: Written = {}
    unreadable: dict[str, str] = {}
    for written, reasons in results:
        shapes.update(written)
        unreadable.update(reasons)
    if piece is None:
        _complete(work, manifest, backbone, plan, shapes, unreadable)
        say(f"{work.out}: layers {', '.join(map(str, work.layers))} of {len(shapes)} cuts")
        for reason in list(unreadable.values())[:5]:
            say(f"NOTE unreadable: {reason}")


def _check_layers(work: Extraction, backbone: Backbone) -> None:
    most = backbone.encoder.num_layers
    wrong = [layer for layer in work.layers if not 0 <= layer <= most]
    if wrong or not work.layers or len(set(work.layers)) != len(work.layers):
        raise HarkenError(
            f"`--layers` must be different numbers in 0..{most} for {work.model}, got {list(work.layers)}"
        )


def _is_finished(out: Path, plan: dict[str, Any]) -> bool:
    if not (out / CARD).is_file():
        return False
    card = json.loads((out / CARD).read_text(encoding="utf-8"))
    if {key: card.get(key) for key in plan} != plan:
        raise HarkenError(f"{out} holds hidden states of another model, manifest or layers: name another folder")
    return True


def _unpack(found: Any) -> tuple[Written, dict[str, str]]:
    """Return what JSON has kept, whose keys are text."""
    written, reasons = found
    return {
        int(place): {int(layer): shape for layer, shape in shapes.items()} for place, shapes in written.items()
    }, reasons


def _complete(
    work: Extraction,
    manifest: Manifest,
    backbone: Backbone,
    plan: dict[str, Any],
    shapes: Written,
    unreadable: dict[str, str],
) -> None:
    from lhotse import CutSet

    spec = backbone.spec
    with atomic_path(work.out / CUTS) as path:
        CutSet.from_cuts(_with_states(work, manifest, spec.stride / spec.sample_rate, shapes)).to_file(path)
    write_reasons(work.out / UNREADABLE, unreadable)
    rate = {"sample_rate": spec.sample_rate, "hop": spec.stride, "center": (spec.receptive_field - 1) / 2}
    write_json_atomic(work.out / CARD, {**plan, **rate, "dim": backbone.dim, "cuts": len(shapes)})
    remove(work.out / "pieces")


def _with_states(work: Extraction, manifest: Manifest, shift: float, shapes: Written) -> Iterable[Any]:
    """Yield each cut that has states, with a Lhotse array `layerN` for each layer."""
    from lhotse.array import Array, TemporalArray

    root = work.out.resolve()
    for place in sorted(shapes):
        cut = manifest[place]
        for layer in work.layers:
            key = str(work.file(layer, place).relative_to(work.out))
            array = Array("numpy_files", str(root), key, shapes[place][layer])
            states = TemporalArray(array, temporal_dim=0, frame_shift=shift, start=cut.start)
            cut = cut.with_custom(f"layer{layer}", states)
        yield cut
