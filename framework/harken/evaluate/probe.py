"""Representations of a model without labels: their rank, and the purity of clusters of a layer against an alignment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harken.config.saved import find_model, weights_digest
from harken.config.schema import DataConfig
from harken.core.batch import Batch, real_mask
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.rank import effective_rank
from harken.data.alignments import Alignment
from harken.data.dataset import as_it_is
from harken.data.loader import EvalLoader
from harken.data.manifest import Manifest
from harken.evaluate.purity import Joint, Purity
from harken.units.clusterer import sample_frames
from harken.units.features import Hidden
from harken.units.kmeans import KMeansConfig, fit, nearest
from harken.units.store import TOLERANCE

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """max_frames: kept for the k-means and for each rank. tier: of the alignment. workers: processes that read."""

    layer: int
    clusters: int = 100
    max_frames: int = 30_000
    seed: int = 0
    tier: str
    max_seconds: float = 120.0
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found. about: the inputs, and how much of them the ranks and the k-means saw.

    ranks: effective ranks of the outputs of frontend and encoder. purity: of the clusters.
    """

    about: dict[str, Any]
    ranks: dict[str, float]
    purity: Purity

    def describe(self) -> str:
        """Return the figures in a line."""
        ranks = ", ".join(f"{name.replace('_', ' of the ')} {rank:.1f}" for name, rank in self.ranks.items())
        about = f"layer {self.about['layer']}, {self.about['clusters']} clusters, against `{self.about['tier']}`"
        return f"{self.about['model']}: {ranks}; {about}: {self.purity.describe()}"

    def plain(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {**self.about, **self.ranks, **self.purity.plain()}


def probe(model: str, manifest: str, alignment: str, config: ProbeConfig, say: Say) -> Probe:
    """Return the figures of a model over a manifest, read twice: to fit the k-means, and to count.

    Raises HarkenError, before any audio is read, for a layer that is not there and an alignment of other cuts, and
    later for one of other audio or without the tier.
    """
    features = Hidden(model, config.layer)
    known = Alignment(alignment, config.tier)
    opened = Manifest.filled(manifest)
    if not np.isin(np.asarray(opened.hashes), np.asarray(known.manifest.hashes)).any():
        raise HarkenError(
            f"{alignment} has none of the {len(opened)} cuts of {manifest}, the first `{opened.line(0)['id']}`: the "
            "alignment is of other cuts"
        )
    data = DataConfig(train=manifest, sample_rate=features.spec.sample_rate, workers=config.workers)
    settings = KMeansConfig(clusters=config.clusters, seed=config.seed)
    most = config.max_frames
    frames = sample_frames(
        manifest, features, data, max_frames=most, seed=config.seed, say=say, max_seconds=config.max_seconds
    )
    fitted, inertia = fit(frames, settings, say)
    centroids, count = torch.from_numpy(fitted).to(features.device), len(frames)
    del frames
    total = int(np.asarray(opened.seconds).sum() * features.spec.rate)
    counting = _Counting(features, centroids, known, Draws(config.seed, 0), min(1.0, config.max_frames / max(1, total)))
    loader = EvalLoader(manifest, data, config.max_seconds, as_it_is)
    for batch, _ in loader:
        counting.add(batch)
    if not counting.joint.cuts:
        raise known.without(len(opened))
    about = {
        "model": str(find_model(model)),
        "weights": weights_digest(find_model(model)),
        "manifest": str(Path(manifest).resolve()),
        "alignment": str(Path(alignment).resolve()),
        "tier": config.tier,
        "layer": config.layer,
        "clusters": config.clusters,
        "seed": config.seed,
        "frames_fitted": count,
        "mean_squared_distance": inertia / count,
        "frames_of_ranks": sum(map(len, counting.samples["rank_encoder"])),
    }
    return Probe(
        about=about,
        ranks=counting.ranks(),
        purity=counting.joint.measure(left_out=len(opened) - counting.joint.cuts),
    )


class _Counting:
    """What is counted and sampled in a pass. share: of the frames that the ranks are computed from."""

    def __init__(self, features: Hidden, centroids: Tensor, alignment: Alignment, draws: Draws, share: float) -> None:
        self.features, self.centroids, self.alignment = features, centroids, alignment
        self.draws, self.share = draws, share
        self.joint = Joint()
        self.samples: dict[str, list[Tensor]] = {"rank_frontend": [], "rank_encoder": []}
        self._seen: set[str] = set()

    @torch.inference_mode()
    def add(self, batch: Batch) -> None:
        """Count a batch; a cut that took the place of one that cannot be read counts once."""
        backbone, layer = self.features.backbone, self.features.layer
        batch = batch.to(self.features.device)
        frontend, embedded, lengths = backbone.embed(batch.inputs, batch.lengths, {})
        encoded = backbone.encoder.encode(embedded, lengths, (layer,))
        real = real_mask(lengths, frontend.shape[1], frontend.device)
        units = torch.zeros(real.shape, dtype=torch.int64, device=real.device)
        units[real] = nearest(encoded.hidden[layer][real].float(), self.centroids)
        labels = units.cpu().numpy()
        for row, (cut, length) in enumerate(zip(batch.ids, lengths.tolist(), strict=True)):
            if cut not in self._seen:
                self._seen.add(cut)
                self._count(cut, labels[row, :length], int(batch.lengths[row]))
                self._sample(cut, {"rank_frontend": frontend[row, :length], "rank_encoder": encoded.last[row, :length]})

    def ranks(self) -> dict[str, float]:
        """Return the effective ranks of the sampled outputs. Raises HarkenError for fewer than two frames."""
        samples = {name: torch.cat(rows) for name, rows in self.samples.items()}
        if (count := len(samples["rank_encoder"])) < 2:
            raise HarkenError(f"an effective rank needs 2 frames or more, got {count}: raise `--max-frames`")
        return {name: effective_rank(frames) for name, frames in samples.items()}

    def _count(self, cut: str, units: np.ndarray[Any, np.dtype[np.int64]], samples: int) -> None:
        place, spec, manifest = self.alignment.place(cut), self.features.spec, self.alignment.manifest
        if place is None:
            return
        seconds = float(manifest.seconds[place])
        if abs(seconds * spec.sample_rate - samples) > TOLERANCE * spec.stride:
            raise HarkenError(
                f"cut `{cut}` lasts {samples / spec.sample_rate:.2f} s, and {seconds:.2f} s in {manifest.path}: "
                "the alignment is of other audio"
            )
        middles = (spec.receptive_field - 1) / 2 + spec.stride * np.arange(len(units))
        self.joint.add(manifest.line(place), self.alignment.tier, units, middles / spec.sample_rate)

    def _sample(self, cut: str, outputs: dict[str, Tensor]) -> None:
        length = len(outputs["rank_encoder"])
        chosen = torch.from_numpy(self.draws.generator("rank sample", cut).random(length) < self.share)
        for name, frames in outputs.items():
            self.samples[name].append(frames[chosen.to(frames.device)].float().cpu())
