"""wav2vec: telling the frames to come from others of the utterance, each a question of yes or no."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.encoders.backbone import Backbone
from harken.nn.dropout import Dropout
from harken.objectives._futures import Futures, FuturesConfig


@dataclass(frozen=True, kw_only=True)
class Wav2vecConfig(FuturesConfig):
    """Defaults are wav2vec's (arXiv 1904.05862; fairseq's `Wav2VecConfig`)."""

    negatives: int = 10
    """Frames that a future is told from. Ten in the paper; fairseq `num_negatives`, or `cross_sample_negatives` where
    they are of the micro-batch."""
    negative_weight: float = 1.0
    """Weight of each negative's term. The paper's lambda, the number of negatives, over that number; with fairseq's
    `balanced_classes` it is 1 / `negatives`."""
    dropout: float = 0.0
    """Of the predictions. fairseq `dropout`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "objective", not_negative=("negative_weight",), shares=("dropout",))


@register("objective", Wav2vecConfig)
class Wav2vec(Futures):
    """-log sigmoid(z h_k(c)) of the true future z, and -log sigmoid(-z' h_k(c)) of each negative z'.

    h_k is an affine map for each step ahead. Source: arXiv 1904.05862 equation 1; fairseq's
    `Wav2VecPredictionsModel`.
    """

    def __init__(self, config: Wav2vecConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(config, run, backbone)
        self.weight = config.negative_weight
        self.heads = nn.ModuleList(nn.Linear(backbone.dim, backbone.frontend.dim) for _ in range(config.steps))
        self.dropout = Dropout(config.dropout)

    def predict(self, context: Tensor, index: int) -> Tensor:
        """Return the affine map of a step, `(B, T, F)`, of contexts `(B, T, D)`."""
        predicted: Tensor = self.dropout(self.heads[index](context))
        return predicted

    def cost(self, truth: Tensor, others: Tensor) -> Tensor:
        """Return the binary cross entropy of the truth and of the negatives, summed."""
        return functional.softplus(-truth) + self.weight * functional.softplus(others).sum(-1)

    def predictor_flops(self, frames: int) -> float:
        """Count one affine map."""
        return 2.0 * frames * self.backbone.dim * self.backbone.frontend.dim
