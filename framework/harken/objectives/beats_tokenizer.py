"""BEATs' self-distilled tokenizer: codes of tokens from which a teacher's outputs can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch
from torch.nn import functional

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.config.saved import find_model, weights_digest
from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.core.loss import Loss
from harken.encoders.backbone import Backbone
from harken.encoders.teacher import FrozenTeacher
from harken.encoders.token_decoder import DecoderConfig, TokenDecoder
from harken.objectives.base import Objective
from harken.units.ema_codebook import EmaCodebook
from harken.units.random_projection import codebook_use


@dataclass(frozen=True, kw_only=True)
class BeatsTokenizerConfig(DecoderConfig):
    """Defaults are the paper's (arXiv 2212.09058), the released `Tokenizers.py`'s and ESPnet's (`decoder_*`)."""

    teacher: str
    """Saved model or experiment whose last block's outputs are predicted: of the same frames and `encoder.rows`."""
    codes: int = 1024
    """Codes. Section 4.2; released `quant_n`."""
    code_dim: int = 256
    """Width of a code. Section 4.2; released `quant_dim`."""
    decay: float = 0.99
    """Of a code's moving average. Released `decay`."""
    commitment: float = 1.0
    """Weight of the error between an encoded token and its code: a mean over channels as in the released code
    (`beta`), where the paper's equation 3 has the sum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(
            self, "objective", positive=("codes", "code_dim"), not_negative=("commitment",), shares=("decay",)
        )


@dataclass(frozen=True)
class BeatsTokenizerPrepare:
    """Counts the tokens; nothing is drawn."""

    spec: FrameSpec
    rows: int

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `real`: positions of tokens in the flat `(B * N)`."""
        counts = self.rows * self.spec.num_frames(batch.lengths).numpy()
        # the backbone pads what is too short for a frame to one
        frames = self.spec.num_frames(max(batch.inputs.shape[1], self.spec.receptive_field))
        real = np.flatnonzero(np.arange(frames * self.rows)[None] < counts[:, None])
        targets = {**batch.targets, "real": torch.from_numpy(real)}
        return replace(batch, targets=targets, num_targets=float(len(real)))


@register("objective", BeatsTokenizerConfig)
class BeatsTokenizer(Objective):
    """Predicts a frozen teacher's outputs from the codes of unmasked tokens.

    The encoder's outputs are quantised (`EmaCodebook`); a decoder, the estimator, predicts the teacher's last block
    from the codes' vectors. The loss of a token is 1 - cosine, and the error between encoded token and code. Encoder
    and codebook label audio afterwards (`harken units label --tokenizer`).
    Source: arXiv 2212.09058 section 3.2.2 and equation 3.
    """

    uses_mask_embedding: ClassVar[bool] = False

    def __init__(self, config: BeatsTokenizerConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.rows = backbone.encoder.rows
        self.teacher = FrozenTeacher(config.teacher)
        theirs = self.teacher.backbone
        if theirs.spec != backbone.spec or theirs.encoder.rows != self.rows:
            raise HarkenError(
                f"`objective.teacher` must have the frames and `encoder.rows` of this model, {backbone.spec.rate:g} a "
                f"second and {self.rows}, and {config.teacher} has {theirs.spec.rate:g} and {theirs.encoder.rows}"
            )
        width = backbone.dim // self.rows
        self.tokenizer = EmaCodebook(width, config.code_dim, config.codes, config.decay, run.seed)
        self.decoder = TokenDecoder(config, config.code_dim, theirs.dim // self.rows)

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> BeatsTokenizerPrepare:
        """Return what counts tokens, in training and validation."""
        return BeatsTokenizerPrepare(spec, int(getattr(config.encoder, "rows", 1)))

    @staticmethod
    def fingerprint(config: RunConfig) -> dict[str, str]:
        """Return the hash of the teacher's weights."""
        own = cast(BeatsTokenizerConfig, config.objective)
        return {"objective.teacher": f"a model of weights {weights_digest(find_model(own.teacher))[:16]}"}

    def forward(self, batch: Batch) -> Loss:
        """Return 1 - cosine plus the weighted error of the codes, summed over tokens."""
        own, real = self.config, batch.targets["real"]
        _, x, lengths = self.backbone.embed(batch.inputs, batch.lengths, {})
        encoded = self.backbone.encoder.encode(x, lengths)
        tokens = encoded.last.unflatten(2, (self.rows, -1)).flatten(0, 2)
        # a pass without weight, by which a rank waits for others, must not move the codes
        coded = self.tokenizer(tokens[real], remember=self.training and batch.num_targets > 0)
        vectors = coded.vectors.new_zeros(len(tokens), own.code_dim).index_copy(0, real, coded.vectors)
        predicted = self.decoder(vectors.view(len(x), -1, own.code_dim), lengths * self.rows).flatten(0, 1)[real]
        target = self.teacher(batch.inputs, batch.lengths).unflatten(2, (self.rows, -1)).flatten(0, 2)[real]
        similarity = functional.cosine_similarity(predicted.float(), target.float(), dim=-1).sum()
        errors = coded.errors.sum()
        total = len(real) - similarity + own.commitment * errors
        use, perplexity = codebook_use(coded.codes[:, None], own.codes)
        count = total.new_full((), float(len(real)))
        metrics = {
            "loss": (total.detach(), count),
            "similarity": (similarity.detach(), count),
            "commitment_error": (errors.detach(), count),
            "codebook_use": (use * count, count),
            "codebook_perplexity": (perplexity * count, count),
        }
        return Loss(total=encoded.penalised(total + self.backbone.unused_mask()), metrics=metrics)

    def begin_passes(self) -> None:
        """Forget which tokens the codes were to follow."""
        self.tokenizer.forget()

    def after_step(self, step: int) -> None:
        """Move the codes; every rank calls it."""
        self.tokenizer.update()

    def head_flops(self, frames: int) -> float:
        """Count projection, codes and decoder; codes have no backward pass."""
        tokens = frames * self.rows
        weights = sum(weight.numel() for weight in self.tokenizer.project.parameters() if weight.dim() > 1)
        return 2.0 * tokens * (weights + self.tokenizer.codes.numel() / 3.0) + self.decoder.flops(tokens)

    def frontend_flops(self, samples: int) -> float:
        """Add the teacher's pass over the audio, which has no way back."""
        return super().frontend_flops(samples) + self.teacher.flops(samples)
