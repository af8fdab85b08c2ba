"""A clusterer on the disk: centroids and a card that says what they cluster."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from harken.config.schema import DataConfig
from harken.core import distributed
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.files import atomic_folder, check_replaceable, sha256_file
from harken.data.dataset import as_it_is
from harken.data.loader import EvalLoader
from harken.data.manifest import Manifest
from harken.units.features import Features, Frames
from harken.units.kmeans import KMeansConfig, Say, fit, nearest

KIND, FILES = "clusterer", ("card.json", "centroids.npy")


@dataclass(frozen=True)
class Clusterer:
    """Centroids `(K, D)` and what they were made from."""

    centroids: NDArray[np.float32]
    features: str
    digest: str

    def __call__(self, frames: Frames) -> NDArray[np.int64]:
        """Return the unit of each frame `(T, D)`; found on the GPU where there is one."""
        device = distributed.device()
        rows = torch.from_numpy(np.ascontiguousarray(frames)).to(device)
        labels: NDArray[np.int64] = nearest(rows, torch.from_numpy(self.centroids).to(device)).cpu().numpy()
        return labels

    @classmethod
    def load(cls, folder: str | Path) -> Clusterer:
        """Open a fitted clusterer.

        Raises HarkenError when it is missing or not as it was written.
        """
        folder = Path(folder)
        if not (folder / "card.json").is_file():
            raise HarkenError(f"no clusterer at {folder}; `harken units fit` makes one")
        try:
            card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
            features, expected, digest = card["features"], card["sha256"], sha256_file(folder / "centroids.npy")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HarkenError(f"{folder} is no clusterer ({error!r}); `harken units fit` makes one") from error
        if digest != expected:
            raise HarkenError(f"{folder}/centroids.npy is not as it was written: fit it again")
        return cls(np.load(folder / "centroids.npy"), features, digest)


def sample_frames(
    manifest: str,
    features: Features,
    data: DataConfig,
    *,
    max_frames: int,
    seed: int,
    say: Say,
    max_seconds: float = 120.0,
) -> Frames:
    """Stream over a manifest and keep a seeded share of every cut's frames, at most about `max_frames` in memory.

    max_seconds: of padded audio that is read and encoded at once. Cuts that cannot be read are replaced by others,
    counted and named.
    """
    opened = Manifest(manifest)
    spec = features.spec
    total = sum(int(spec.num_frames(round(float(seconds) * spec.sample_rate))) for seconds in opened.seconds)
    share = min(1.0, max_frames / max(1, total))
    draws = Draws(seed, 0)
    loader = EvalLoader(manifest, data, max_seconds, as_it_is)
    kept: list[Frames] = []
    replaced = 0
    for place, (batch, _) in enumerate(loader):
        for note in batch.notes:
            say(f"NOTE {note.kind}: {note.reason}")
        replaced += len(batch.notes)
        for cut, frames in zip(batch.ids, features(batch), strict=True):
            chosen = draws.generator("k-means sample", cut).random(len(frames)) < share
            kept.append(frames if share >= 1 else frames[chosen])
        if (place + 1) % 20 == 0 or place + 1 == len(loader):
            say(
                f"features of {place + 1}/{len(loader)} batches, {sum(map(len, kept))} frames kept ({100 * share:.0f}%)"
            )
    if replaced:
        say(
            f"WARNING {replaced} of {len(opened)} cuts could not be read, and frames of others took their place: "
            f"run `harken data verify {manifest}`"
        )
    return np.concatenate(kept)


def fit_clusterer(
    out: Path, manifest: str, features: Features, data: DataConfig, config: KMeansConfig, *, max_frames: int, say: Say
) -> None:
    """Fit and write a clusterer; an unfinished one leaves nothing behind.

    Raises HarkenError, before any audio is read, when `out` is a folder that is no clusterer of harken's.
    """
    check_replaceable(out, kind=KIND, files=FILES)
    frames = sample_frames(manifest, features, data, max_frames=max_frames, seed=config.seed, say=say)
    centroids, inertia = fit(frames, config, say)
    with atomic_folder(out, kind=KIND, files=FILES) as folder:
        np.save(folder / "centroids.npy", centroids)
        card = {
            "features": features.describe(),
            "clusters": config.clusters,
            "frames": len(frames),
            "mean_squared_distance": inertia / len(frames),
            "manifest": str(Path(manifest).resolve()),
            "manifest_sha256": Manifest(manifest).card["sha256"],
            "settings": asdict(config),
            "sha256": sha256_file(folder / "centroids.npy"),
        }
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
