"""k-means of harken beside scikit-learn's and faiss's: a fit and a labelling of the same frames. See README.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from apart import measured_apart, write_figures
from numpy.typing import NDArray

Frames = NDArray[np.float32]
Fitted = tuple[Callable[[Frames], NDArray[Any]], Frames]
"""What labels frames, and the centroids `(K, D)`."""
PACKAGES = {"harken": "harken", "scikit-learn": "sklearn", "faiss": "faiss"}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure k-means: harken's, scikit-learn's MiniBatchKMeans and faiss's on the same frames.",
        epilog="example: python tools/bench/clustering.py egs/amazon_queen/data/train.jsonl --json clustering.json",
    )
    parser.add_argument("manifest", help="whose audio gives the frames")
    parser.add_argument("--model", metavar="DIR", help="cluster a layer of this model instead of MFCC")
    parser.add_argument("--layer", type=int, metavar="N", help="which")
    parser.add_argument("--clusters", type=int, default=100, metavar="K", help="(default: 100)")
    parser.add_argument("--frames", type=int, default=500_000, metavar="N", help="at most (default: 500000)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--only", choices=PACKAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


def fit_harken(frames: Frames, args: argparse.Namespace) -> Fitted:
    """Fit as `harken units fit` does: mini-batches, then whole passes until they gain nothing."""
    from harken.units.clusterer import Clusterer
    from harken.units.kmeans import KMeansConfig, fit

    centroids, _ = fit(frames, KMeansConfig(clusters=args.clusters, seed=args.seed), lambda _: None)
    return Clusterer(centroids, "", ""), centroids


def fit_scikit_learn(frames: Frames, args: argparse.Namespace) -> Fitted:
    """Fit with the settings of fairseq's `learn_kmeans.py`, HuBERT's own script."""
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(
        n_clusters=args.clusters, init="k-means++", max_iter=100, batch_size=10_000, tol=0.0, max_no_improvement=100,
        n_init=20, reassignment_ratio=0.0, random_state=args.seed,
    )  # fmt: skip
    model.fit(frames)
    return model.predict, model.cluster_centers_


def fit_faiss(frames: Frames, args: argparse.Namespace) -> Fitted:
    """Fit by 25 whole passes, faiss's own number, over all frames."""
    import faiss

    faiss.omp_set_num_threads(args.threads)
    most = -(-len(frames) // args.clusters)
    model = faiss.Kmeans(
        frames.shape[1], args.clusters, niter=25, seed=1 + args.seed, max_points_per_centroid=most
    )  # it takes 256 frames a cluster otherwise
    model.train(frames)
    return lambda some: model.index.search(some, 1)[1][:, 0], model.centroids


FITS = {"harken": fit_harken, "scikit-learn": fit_scikit_learn, "faiss": fit_faiss}


def frames_of(args: argparse.Namespace) -> tuple[Frames, float, float]:
    """Return frames, the seconds of audio they stand for, and the seconds it took to make them."""
    from harken.config.schema import DataConfig
    from harken.units.clusterer import sample_frames
    from harken.units.features import make_features

    kind = "hidden" if args.model else "mfcc"
    features = make_features(kind, model=args.model, layer=args.layer)
    begin = time.perf_counter()
    frames = sample_frames(
        args.manifest, features, DataConfig(train=args.manifest), max_frames=args.frames, seed=args.seed,
        say=lambda _: None,
    )  # fmt: skip
    spent = time.perf_counter() - begin
    return frames, len(frames) * features.spec.stride / features.spec.sample_rate, spent


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fit and label with one of them; the inertia is that of its centroids, by one formula for all."""
    from harken.units.kmeans import assign

    torch.set_num_threads(args.threads)
    frames, audio, making = frames_of(args)
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    label, centroids = FITS[name](frames, args)
    fitted = time.perf_counter()
    label(frames)
    labelled = time.perf_counter()
    nearest = assign(torch.from_numpy(frames), torch.from_numpy(np.asarray(centroids, dtype=np.float32)))[1]
    return {
        "name": name,
        "frames": len(frames),
        "dim": frames.shape[1],
        "making_seconds": round(making, 2),
        "fit_seconds": round(fitted - begin, 2),
        "fit_hours_per_second": audio / 3600 / (fitted - begin),
        "label_hours_per_second": audio / 3600 / (labelled - fitted),
        "mean_squared_distance": float(nearest.double().mean()),
    }


def main() -> None:
    """Print a table, each beside harken."""
    args = parse()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    names = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is not None]
    found = list(measured_apart(names))
    ours = found[0]
    print(
        f"{ours['frames']:,} frames of {ours['dim']} values, {args.clusters} clusters, {args.threads} threads; "
        f"reading audio and making the frames took {ours['making_seconds']} s\n"
    )
    print("| | fit s | audio h/s | harken's speed / its | labels, audio h/s | harken's / its | distance / harken's |")
    print("|---|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row['name']} | {row['fit_seconds']:.1f} | {row['fit_hours_per_second']:.3f} "
            f"| {ours['fit_hours_per_second'] / row['fit_hours_per_second']:.2f} | {row['label_hours_per_second']:.1f} "
            f"| {ours['label_hours_per_second'] / row['label_hours_per_second']:.2f} "
            f"| {row['mean_squared_distance'] / ours['mean_squared_distance']:.4f} |"
        )
    for name in PACKAGES.keys() - set(names):
        print(f"left out: {name} is not installed", file=sys.stderr)
    write_figures(args.json, args, "rows", found)


if __name__ == "__main__":
    main()
