"""What objectives share that tell quantised frames apart: codebooks, masked frames, negatives, views, diversity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from harken.config.registry import SlotConfig
from harken.config.rules import check_numbers
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.loss import Metrics
from harken.data.views import Views
from harken.nn.one_hot import one_hot
from harken.units.kmeans import cosine_clusters
from harken.units.product_quantizer import ProductQuantizer, Quantised, Temperature, perplexity


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(SlotConfig):
    """A product quantiser that is learned with the model. Defaults are wav2vec 2.0 Base's (arXiv 2006.11477)."""

    groups: int = 2
    """Codebooks of the quantiser. The paper's G; fairseq `latent_groups`."""
    entries: int = 320
    """Entries of each codebook. The paper's V; fairseq `latent_vars`."""
    gumbel_start: float = 2.0
    """Temperature of the Gumbel softmax at first. fairseq `latent_temp`, its first number."""
    gumbel_end: float = 0.5
    """Its lowest. fairseq `latent_temp`, its second number; wav2vec 2.0 has 0.5 in Base, 0.1 in Large."""
    gumbel_decay: float = 0.999995
    """Factor on it at each step. fairseq `latent_temp`, its third number."""
    diversity_weight: float = 0.1
    """The paper's alpha; fairseq `loss_weights`, the number of `prob_perplexity`."""
    diversity_over: Literal["utterance", "batch"] = "utterance"
    """Whose codes should be diverse. `batch` is the original: the loss then depends on which utterances share a
    micro-batch."""

    def check_codebooks(self, key: str, width: int) -> None:
        """Raise HarkenError where a number is out of its range, or codebooks do not divide the width named `key`."""
        check_numbers(
            self,
            "objective",
            positive=("groups", "entries", "gumbel_start", "gumbel_end", "gumbel_decay"),
            not_negative=("diversity_weight",),
            shares=("gumbel_decay",),
        )
        if width % self.groups:
            raise HarkenError(
                f"`objective.{key}` must be divisible by `objective.groups`, got {width} and {self.groups}"
            )

    def quantizer(self, input_dim: int, dim: int) -> ProductQuantizer:
        """Make the quantiser of frames `(B, M, input_dim)`; all groups together have width `dim`."""
        temperature = Temperature(start=self.gumbel_start, end=self.gumbel_end, decay=self.gumbel_decay)
        return ProductQuantizer(input_dim, groups=self.groups, entries=self.entries, dim=dim, temperature=temperature)

    def diversity(
        self, quantised: Quantised, real: Tensor, counts: Tensor, counted: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the diversity loss summed over frames, and figures of the micro-batch's codes.

        It is (G V - perplexity) / (G V) for each frame that a row counts with: of its utterance, or of the batch.
        real: `(B, M)`, which of the quantised frames there are. counts: `(B,)`, how many of a row. counted: `(B,)`,
        what a row counts with in the loss, where that is not `counts`.
        Source: arXiv 2006.11477 equation 4; fairseq's `Wav2Vec2Model.get_extra_losses`.
        """
        size = self.groups * self.entries
        sums = (quantised.probabilities * real[..., None, None]).sum(1)  # (B, G, V)
        counted = counts if counted is None else counted
        total = counts.sum().clamp(min=1)
        prob_perplexity = perplexity(sums.sum(0) / total)
        used = one_hot(quantised.best, self.entries) * real[..., None, None]
        code_perplexity = perplexity(used.sum((0, 1)) / total)
        if self.diversity_over == "batch":
            loss = (size - prob_perplexity) / size * counted.sum()
        else:
            own = perplexity(sums / counts.clamp(min=1)[:, None, None])
            loss = ((size - own) / size * counted).sum()
        count = counts.sum().to(loss.dtype)
        figures = {
            "code_perplexity": code_perplexity * count,
            "prob_perplexity": prob_perplexity * count,
            "codebook_perplexity": code_perplexity / self.groups * count,
        }
        metrics = {name: (value.detach(), count) for name, value in figures.items()}
        return loss, {**metrics, "diversity": (loss.detach(), counted.sum().to(loss.dtype))}


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(SlotConfig):
    """How often a view of the audio departs from it."""

    view_pitch: float = 0.5
    """Share of the views in which pitch is moved, by up to 3 semitones. harken's; the papers' was not looked up."""
    view_reverberation: float = 0.5
    """Share of the views with reverberation, of up to 0.5 s. harken's; the papers' was not looked up."""
    view_noise: float = 0.5
    """Share of the views with white noise, 5 to 20 dB below. harken's; the papers' was not looked up."""

    def check_views(self) -> None:
        """Raise HarkenError where a share is none."""
        check_numbers(self, "objective", shares=("view_pitch", "view_reverberation", "view_noise"))

    def made(self, sample_rate: int) -> Views:
        """Return what makes a view."""
        return Views(
            pitch=self.view_pitch,
            reverberation=self.view_reverberation,
            noise=self.view_noise,
            sample_rate=sample_rate,
        )


def views_of(views: Views, batch: Batch, draws: Sequence[Draws], name: str) -> Tensor:
    """Return a view `(B, S)` of each row of a batch, by its draws and the view's name."""
    view = torch.zeros_like(batch.inputs)
    for row, (cut, length, own) in enumerate(zip(batch.ids, batch.lengths.tolist(), draws, strict=True)):
        samples = batch.inputs[row, :length].numpy()
        view[row, :length] = torch.from_numpy(views(samples, cut, own, name))
    return view


def masked_places(mask: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the numbers `(B,)` of masked frames of `(B, T)` and their places `(B, M)`, 0 behind a row's number."""
    counts = mask.sum(1)
    places = np.zeros((len(mask), int(counts.max(initial=0))), dtype=np.int64)
    for row, count in enumerate(counts):
        places[row, :count] = np.flatnonzero(mask[row])
    return counts, places


def draw_negatives(batch: Batch, draws: Sequence[Draws], counts: NDArray[Any], number: int) -> NDArray[np.int32]:
    """Draw for each of a row's masked frames others of them: `(B, M, number)`, from 0 to the row's count - 1.

    A row with a single masked frame has no others: they are the frame itself, whose codes make it no negative.
    """
    negatives = np.zeros((len(counts), int(counts.max(initial=0)), number), dtype=np.int32)
    for row, (cut, count, own) in enumerate(zip(batch.ids, counts, draws, strict=True)):
        if count > 1:
            drawn = own.generator("negatives", cut).integers(0, count - 1, (count, number))
            negatives[row, :count] = drawn + (drawn >= np.arange(count)[:, None])  # any other but itself
    return negatives


def draw_starts(
    batch: Batch, draws: Sequence[Draws], counts: NDArray[Any], clusters: Sequence[int], audios: int
) -> NDArray[np.int64]:
    """Draw the points at which a row's clusters begin: `(B, C)`, -1 beyond a row's clusters or points.

    Points are a row's masked frames in each of `audios`: places in `(audios * M)`, those of the first audio first.
    """
    size = int(counts.max(initial=0))
    starts = np.full((len(counts), max(1, *clusters)), -1, dtype=np.int64)
    for row, (cut, count, number, own) in enumerate(zip(batch.ids, counts, clusters, draws, strict=True)):
        points = (size * np.arange(audios)[:, None] + np.arange(count)).ravel()
        chosen = own.generator("clusters", cut).permutation(len(points))[:number]
        starts[row, : len(chosen)] = points[chosen]
    return starts


@torch.no_grad()
def alike_negatives(
    vectors: Sequence[Tensor], real: Tensor, starts: Tensor, negatives: Tensor, passes: int
) -> list[Tensor]:
    """Return for each audio which negatives `(B, M, K)` are in the cluster of the true frame.

    Each row's quantised frames, `(B, M, D)` for each audio, are clustered together by cosines. real: `(B, M)`.
    Source: `Data2VecAudioModel.forward` of data2vec-aqc, which clusters a batch; CCC-wav2vec 2.0, arXiv 2210.02592.
    """
    points = functional.normalize(torch.cat(list(vectors), 1).float(), dim=-1)
    labels = cosine_clusters(points, real.repeat(1, len(vectors)), starts, passes)
    index = negatives.long().flatten(1)
    return [own.gather(1, index).view_as(negatives) == own[..., None] for own in labels.chunk(len(vectors), 1)]


def contrast_logits(
    x: Tensor, y: Tensor, codes: Tensor, negatives: Tensor, temperature: float, factors: Tensor | None = None
) -> Tensor:
    """Return logits `(B, M, 1 + K)` of frames `(B, M, D)` with quantised ones `(B, M, D)`, the true one's first.

    codes: `(B, M, G)` of the quantised. negatives: `(B, M, K)`. factors: `(B, M, K)`, on the negatives' logits.
    A negative that has the codes of the true frame is no negative: its logit is -inf. Codes are compared rather than
    vectors, which the straight-through estimate leaves equal only up to rounding.
    """
    negatives = negatives.long()
    with torch.autocast(x.device.type, enabled=False):
        x, y = functional.normalize(x.float(), dim=-1), functional.normalize(y.float(), dim=-1)
        # (B, M, M), from which the negatives are picked: no frames x negatives x dim tensor exists
        similarity = x @ y.transpose(1, 2) / temperature
    index = negatives.flatten(1)[..., None].expand(-1, -1, codes.shape[-1])
    same = (codes.gather(1, index).view(*negatives.shape, codes.shape[-1]) == codes[:, :, None]).all(-1)
    others = similarity.gather(2, negatives)
    if factors is not None:
        others = others * factors
    others = others.masked_fill(same, -torch.inf)
    return torch.cat([similarity.diagonal(dim1=1, dim2=2)[..., None], others], -1)


def pick(x: Tensor, places: Tensor) -> Tensor:
    """Return the frames `(B, M, D)` of `(B, T, D)` at places `(B, M)`."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
