"""CPC, as first published and as modified: telling the frame to come among others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.errors import HarkenError
from harken.encoders.backbone import Backbone
from harken.encoders.transformer import Block, TransformerConfig
from harken.objectives._futures import Futures, FuturesConfig


@dataclass(frozen=True, kw_only=True)
class CpcConfig(FuturesConfig):
    """Defaults are those of the modified CPC (arXiv 2002.02848; CPC_audio's `cpc_default_config.py`)."""

    negatives: int = 128
    """Frames that a future is told from. CPC_audio `negativeSamplingExt`."""
    predictor: Literal["linear", "transformer"] = "transformer"
    """What predicts each step ahead: the W_k of arXiv 1807.03748, or a Transformer layer that looks back only.
    CPC_audio `rnnMode`."""
    heads: int = 8
    """Attention heads of a Transformer predictor. CPC_audio's `TransformerLayer` `nheads`."""
    ffn_dim: int = 2048
    """Inner width of its feed-forward. CPC_audio's `TransformerLayer` `dff`."""
    dropout: float = 0.1
    """In its branches and attention. CPC_audio's `TransformerLayer` `dropout`."""
    mean_product: bool = True
    """Divide a product of prediction and frame by their width, as CPC_audio does; False is arXiv 1807.03748."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "objective", positive=("heads", "ffn_dim"), shares=("dropout",))


class TransformerPredictor(nn.Module):
    """A Transformer layer that looks back only, and a projection where a frame is of another width.

    It has no positions of its own, which CPC_audio's has, relative ones within a window of fixed length: the context
    it reads is recurrent or convolutional, and any length is taken.
    """

    def __init__(self, config: CpcConfig, dim: int, frame_dim: int) -> None:
        super().__init__()
        self.block = Block(
            TransformerConfig(
                name="transformer",
                dim=dim,
                heads=config.heads,
                ffn_dim=config.ffn_dim,
                dropout=config.dropout,
                attention_dropout=config.dropout,
                position_groups=1,
            )
        )
        self.project: nn.Module = nn.Linear(dim, frame_dim, bias=False) if dim != frame_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to predictions `(B, T, F)`."""
        size = x.shape[1]
        back = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
        predicted: Tensor = self.project(self.block(x, back[None, None]))
        return predicted

    def flops(self, frames: int) -> float:
        """Count the products of the layer and the projection over `frames`."""
        dim, inner = self.block.down.out_features, self.block.down.in_features
        project = self.project.weight.numel() if isinstance(self.project, nn.Linear) else 0
        return 2.0 * frames * (4 * dim**2 + 2 * dim * inner + 2 * frames * dim + project)


@register("objective", CpcConfig)
class Cpc(Futures):
    """Cross entropy of the true future among its negatives, for each of the steps ahead.

    Source: arXiv 1807.03748 equations 3 and 4; arXiv 2002.02848 section 3 and CPC_audio's `criterion.py`, which draws
    negatives for the frame of the context, and once for all steps: here they are those of the future's frame, so that
    none is the future itself.
    """

    def __init__(self, config: CpcConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(config, run, backbone)
        dim, frame_dim = backbone.dim, backbone.frontend.dim
        if config.predictor == "transformer" and dim % config.heads:
            raise HarkenError(f"`encoder.dim` must be divisible by `objective.heads`, got {dim} and {config.heads}")
        self.scale = 1.0 / frame_dim if config.mean_product else 1.0
        self.predictors = nn.ModuleList(
            TransformerPredictor(config, dim, frame_dim)
            if config.predictor == "transformer"
            else nn.Linear(dim, frame_dim, bias=False)
            for _ in range(config.steps)
        )

    def predict(self, context: Tensor, index: int) -> Tensor:
        """Return the predictions `(B, T, F)` of a step from contexts `(B, T, D)`."""
        predicted: Tensor = self.predictors[index](context) * self.scale
        return predicted

    def cost(self, truth: Tensor, others: Tensor) -> Tensor:
        """Return the cross entropy of the truth among the negatives."""
        return torch.cat([truth[..., None], others], -1).logsumexp(-1) - truth

    def predictor_flops(self, frames: int) -> float:
        """Count one predictor."""
        first = self.predictors[0]
        if isinstance(first, TransformerPredictor):
            return first.flops(frames)
        return 2.0 * frames * self.backbone.dim * self.backbone.frontend.dim
