"""A frontend and an encoder together: what pretraining leaves behind and fine-tuning starts from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import build
from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.frames import FrameSpec
from harken.encoders.base import Encoded, Encoder
from harken.frontends.base import Frontend, InputNoise


class Backbone(nn.Module):
    """Samples to representations. Its parameters are saved under `backbone.` by every objective."""

    def __init__(self, frontend: Frontend, encoder: Encoder) -> None:
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder
        # uniform as in fairseq; it is part of the backbone because fine-tuning masks with the pretrained vector
        self.mask_embedding = nn.Parameter(torch.rand(encoder.embed_dim))

    @property
    def spec(self) -> FrameSpec:
        """The frontend's frame arithmetic."""
        return self.frontend.spec

    @property
    def dim(self) -> int:
        """Width of a representation."""
        return self.encoder.dim

    def unused_mask(self) -> Tensor:
        """Return a zero for the loss of a batch that masks nothing by the mask embedding, which gives that a gradient.

        Engines expect one of the same parameters in every batch and on every rank (ZeRO 2 packs them as they come).
        """
        return 0.0 * self.mask_embedding.sum()

    def embed(
        self, inputs: Tensor, lengths: Tensor, masks: Mapping[str, Tensor], noise: InputNoise | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the frontend's frames `(B, T, F)`, the encoder's masked input `(B, T, D)`, and frame lengths `(B,)`.

        masks: any of `band_mask` `(B, bands)`, `mask` `(B, T)` and `channel_mask` `(B, D / rows)`, True where masked:
        bands are blanked, frames take the mask embedding, channels are zeroed. noise: masks what the frontend sees.
        """
        if "mask" not in masks and noise is None:
            inputs = self._one_frame(inputs)
        frames, frame_lengths = self.frontend(inputs, lengths, masks.get("band_mask"), noise)
        x = self.encoder.embed(frames)
        if "mask" in masks:
            x = torch.where(masks["mask"][..., None], self.mask_embedding.to(x.dtype), x)
        if "channel_mask" in masks:
            # the channels of a token, in all tokens of a frame
            x = x.masked_fill(masks["channel_mask"].repeat(1, self.encoder.rows)[:, None, :], 0.0)
        return frames, x, frame_lengths

    def forward(self, inputs: Tensor, lengths: Tensor, layers: Collection[int] = ()) -> Encoded:
        """Encode unmasked inputs `(B, S)`, as labelling, decoding and feature extraction do."""
        frames, frame_lengths = self.frontend(self._one_frame(inputs), lengths)
        return self.encoder.encode(self.encoder.embed(frames), frame_lengths, layers)

    def _one_frame(self, inputs: Tensor) -> Tensor:
        """Pad a batch in which nothing is long enough for a frame to one: no layer can work on none. Lengths stay 0."""
        return functional.pad(inputs, (0, max(0, self.spec.receptive_field - inputs.shape[1])))


@torch.no_grad()
def hidden_rows(backbone: Backbone, batch: Batch, layers: Collection[int]) -> dict[int, list[NDArray[np.float32]]]:
    """Return the outputs of layers for each row of a batch on the backbone's device: `(T, D)`, without padding."""
    encoded = backbone(batch.inputs, batch.lengths, layers=layers)
    lengths = encoded.lengths.tolist()
    found = {layer: encoded.hidden[layer].float().cpu().numpy() for layer in layers}
    return {layer: [hidden[row, :length] for row, length in enumerate(lengths)] for layer, hidden in found.items()}


def build_backbone(config: RunConfig) -> Backbone:
    """Build the frontend and the encoder that a configuration names, with fresh weights."""
    frontend = cast(Frontend, build("frontend", config.frontend))
    encoder = cast(Encoder, build("encoder", config.encoder, input_dim=frontend.dim))
    encoder.checkpoint_blocks = config.engine.activation_checkpointing
    return Backbone(frontend, encoder)
