"""k-means: k-means++ start, mini-batch Lloyd, then whole passes of Lloyd; seeded, float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from harken.core.errors import HarkenError
from harken.nn.one_hot import one_hot

Say = Callable[[str], None]
MOST_CLUSTERS = 2**16
_CPU_SCORES = 2**19  # of some frames with all clusters, which stay in a core's cache (docs/LOG.md)
_CPU_ROWS = 4096  # frames that are added up at a time
_GPU_ROWS = 65_536  # of 500 clusters: 131 MB of scores


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """Settings of a fit. HuBERT uses 100 clusters on MFCC and 500 on hidden layers (arXiv 2106.07447 section IV-B)."""

    clusters: int = 100
    """K. fairseq `learn_kmeans.py`: its argument `n_clusters`."""
    seed: int = 0
    """Of the sample of frames, the start and the order of mini-batches. fairseq `learn_kmeans.py --seed`."""
    batch_frames: int = 10_000
    """fairseq `learn_kmeans.py`: 10000."""
    epochs: int = 2
    """Mini-batch passes over the sample."""
    lloyd_passes: int = 20
    """Whole passes afterwards, fewer when the inertia falls by less than `tolerance`."""
    tolerance: float = 1e-4
    """Share of the inertia by which a whole pass must lower it for another to follow."""
    start_frames: int = 50_000
    """Frames that the k-means++ start is drawn from."""

    def __post_init__(self) -> None:
        """Refuse what makes no clusters: raises HarkenError that names the setting."""
        if not 1 <= self.clusters <= MOST_CLUSTERS:
            raise HarkenError(f"the clusters must be 1 to {MOST_CLUSTERS} (labels have two bytes), got {self.clusters}")
        if self.seed < 0:
            raise HarkenError(f"the seed must be 0 or more, got {self.seed}")


def assign(frames: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of each frame `(N,)` and its squared distance `(N,)`; the lowest index wins a tie."""
    labels, scores = _best(frames, centroids)
    return labels, (frames.square().sum(1) - 2 * scores).clamp(min=0)


def nearest(frames: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid of each frame `(N,)`, as `assign` does."""
    return _best(frames, centroids)[0]


def _best(frames: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centroid of the highest score of each frame, and the score: what a squared distance changes with."""
    bias = -0.5 * centroids.square().sum(1)
    rows = _GPU_ROWS if frames.is_cuda else max(64, _CPU_SCORES // len(centroids))
    best = [torch.addmm(bias, some, centroids.T).max(1) for some in frames.split(rows)]
    return torch.cat([found.indices for found in best]), torch.cat([found.values for found in best])


def fit(frames: NDArray[np.float32], config: KMeansConfig, say: Say = print) -> tuple[NDArray[np.float32], float]:
    """Return centroids `(K, D)` and the inertia (sum of squared distances) of frames `(N, D)`.

    It computes on the GPU where there is one that holds the frames.
    Raises HarkenError when there are fewer frames than clusters.
    """
    if len(frames) < config.clusters:
        raise HarkenError(f"{config.clusters} clusters need at least as many frames, got {len(frames)}")
    rng = np.random.default_rng(config.seed)
    data = _on_device(torch.from_numpy(frames))
    chosen = torch.from_numpy(rng.permutation(len(frames))[: max(config.start_frames, config.clusters)])
    start = data[chosen]
    centroids = plus_plus(start, config.clusters, rng)
    say(f"k-means++ start: mean squared distance {float(assign(start, centroids)[1].mean()):.4f}")
    centroids = _mini_batches(data, centroids, config, rng)
    previous = float("inf")
    for turn in range(config.lloyd_passes + 1):
        sums, counts, inertia = _pass(data, centroids)
        say(
            f"pass {turn}: mean squared distance {inertia / len(frames):.4f}, {int((counts == 0).sum())} empty clusters"
        )
        if turn == config.lloyd_passes or previous - inertia < config.tolerance * inertia:
            break
        previous = inertia
        filled = counts > 0
        centroids[filled] = (sums[filled] / counts[filled, None]).float()
        if not filled.all():  # an empty cluster takes a random frame
            drawn = torch.from_numpy(rng.integers(len(frames), size=int((~filled).sum())))
            centroids[~filled] = data[drawn]
    return centroids.cpu().numpy(), inertia


def _on_device(frames: Tensor) -> Tensor:
    """Move frames to the GPU when they leave half of what is free there."""
    if not torch.cuda.is_available() or 2 * frames.nbytes > torch.cuda.mem_get_info()[0]:
        return frames
    return frames.cuda()


def plus_plus(frames: Tensor, clusters: int, rng: np.random.Generator) -> Tensor:
    """Return `(K, D)` starting centroids, each the best of a few drawn in proportion to the squared distance.

    Source: Arthur and Vassilvitskii 2007; 2 + log K candidates a step as scikit-learn draws them.
    """
    trials = 2 + int(np.log(clusters))
    chosen = [int(rng.integers(len(frames)))]
    squares = frames.square().sum(1)
    distance = _squared(frames, squares, frames[chosen])[0]
    for _ in range(1, clusters):
        total = distance.double().cumsum(0)
        points = torch.from_numpy(rng.random(trials)).to(total.device) * total[-1]
        candidates = torch.searchsorted(total, points).clamp(max=len(frames) - 1)
        reached = torch.minimum(distance, _squared(frames, squares, frames[candidates]))
        best = int(reached.double().sum(1).argmin())
        distance = reached[best]
        chosen.append(int(candidates[best]))
    return frames[chosen].clone()


@torch.no_grad()
def cosine_clusters(points: Tensor, real: Tensor, starts: Tensor, passes: int) -> Tensor:
    """Return the clusters `(B, N)` of unit vectors `(B, N, D)`, of each row by itself, by k-means with cosines.

    real: `(B, N)`, False for points that are none and weigh nothing. starts: `(B, K)`, places of the points at which
    clusters begin, -1 for clusters that are none. passes: how often centroids move. A cluster that is empty stays
    where it was. Source: `KMeans(mode="cosine")` of fast_pytorch_kmeans, which begins at random points.
    """
    if not points.shape[1]:  # no point to begin at
        return real.long()
    with torch.autocast(points.device.type, enabled=False):
        points, weights = points.float(), real[..., None].float()
        centroids = points.gather(1, starts.clamp(min=0)[..., None].expand(-1, -1, points.shape[-1]))
        # points can be equal, as quantised ones are: the first of equal centroids must win whatever rounding does
        handicap = (1e-6 * torch.arange(starts.shape[1], device=points.device)).masked_fill(starts < 0, torch.inf)
        for turn in range(passes + 1):
            cosines = points @ functional.normalize(centroids, dim=-1).transpose(1, 2)
            labels = (cosines - handicap[:, None]).argmax(-1)
            if turn < passes:
                members = one_hot(labels, starts.shape[1]) * weights
                sums = members.transpose(1, 2) @ points
                centroids = torch.where(members.sum(1)[..., None] > 0, sums, centroids)
    return labels


def _squared(frames: Tensor, squares: Tensor, points: Tensor) -> Tensor:
    return (squares - 2 * points @ frames.T + points.square().sum(1)[:, None]).clamp(min=0)


def _mini_batches(data: Tensor, centroids: Tensor, config: KMeansConfig, rng: np.random.Generator) -> Tensor:
    """Move centroids by batches, each with the running mean of what it was given. Source: Sculley 2010."""
    seen = torch.zeros(len(centroids), dtype=torch.float64, device=data.device)
    for _ in range(config.epochs):
        order = torch.from_numpy(rng.permutation(len(data)))
        for batch in order.split(config.batch_frames):
            frames = data[batch]
            sums, counts = _sums(frames, nearest(frames, centroids), len(centroids))
            seen += counts
            hit = counts > 0
            move = (sums[hit] - counts[hit, None] * centroids[hit].double()) / seen[hit, None]
            centroids[hit] += move.float()
    return centroids


def _pass(data: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, float]:
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=data.device)
    counts = torch.zeros(len(centroids), dtype=torch.float64, device=data.device)
    inertia = 0.0
    for frames in data.split(65536):
        labels, distance = assign(frames, centroids)
        batch_sums, batch_counts = _sums(frames, labels, len(centroids))
        sums += batch_sums
        counts += batch_counts
        inertia += float(distance.double().sum())
    return sums, counts, inertia


def _sums(frames: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Return the sums of each cluster's frames and their counts, in float64.

    Of a few frames in float32 first: adding rows of float64 takes 2 to 8 times as long on a CPU.
    """
    sums = torch.zeros(clusters, frames.shape[1], dtype=torch.float64, device=frames.device)
    rows = _GPU_ROWS if frames.is_cuda else _CPU_ROWS
    for some, own in zip(frames.split(rows), labels.split(rows), strict=True):
        sums += torch.zeros(clusters, frames.shape[1], device=frames.device).index_add_(0, own, some)
    return sums, torch.bincount(labels, minlength=clusters).double()
