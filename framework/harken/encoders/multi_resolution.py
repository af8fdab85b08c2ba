"""The encoder of MR-HuBERT: Transformer stages at falling and rising frame rates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import cast

from torch import Tensor, nn

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError
from harken.encoders._resample import Resample
from harken.encoders.base import Encoded, Encoder
from harken.encoders.transformer import Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class MultiResolutionConfig(TransformerConfig):
    """Defaults are MR-HuBERT Base's (arXiv 2310.02720; fairseq `mrhubert_base_librispeech.yaml`)."""

    stages: tuple[int, ...] = (4, 4, 4)
    """Blocks of each stage, from the full rate to the lowest and back; together `layers`. fairseq
    `override_encoder_layers`, or `encoder_layers` in each; 4 in Base, 8 in Large."""
    factors: tuple[int, ...] = (2,)
    """By which each stage's rate is below that of the one before, on the way down; half as many as `stages` behind the
    first. fairseq `label_rate_ratios`: `[1, 2]`."""
    kernel: int = 1
    """Frames of the convolutions that change the rate, odd. fairseq `conv_adapator_kernal`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "encoder", positive=("stages", "factors", "kernel"))
        if len(self.stages) != 2 * len(self.factors) + 1 or not self.factors:
            raise HarkenError(
                "`encoder.stages` must name a stage before and one behind each of `encoder.factors` and one between, "
                f"got {list(self.stages)} and {list(self.factors)}"
            )
        if sum(self.stages) != self.layers:
            raise HarkenError(
                f"`encoder.stages` must add up to `encoder.layers`, got {list(self.stages)} and {self.layers}"
            )
        if self.kernel % 2 == 0:
            raise HarkenError(f"`encoder.kernel` must be odd, got {self.kernel}")
        if self.rows > 1:
            raise HarkenError(f"`encoder.rows` must be 1: rates are those of frames, got {self.rows}")


@register("encoder", MultiResolutionConfig)
class MultiResolution(Transformer):
    """Stages of blocks, each with a norm of its own and a `Resample` before it; positions enter the first alone.

    The stage of the lowest rate adds its input to its output, each one behind it what left the stage of its rate before
    it. Hidden layers are at the full rate, outputs of a lower one repeated (`layer_factor`); of a stage's last block
    they hold what leaves the stage.
    Source: arXiv 2310.02720 section 3; fairseq's `MultiresHubertModel`.
    """

    omits = False  # rates are of places in the sequence
    swaps = False

    def __init__(self, config: MultiResolutionConfig, input_dim: int) -> None:
        super().__init__(config, input_dim)
        ends = list(accumulate(config.stages))
        self.numbers = [range(end - count + 1, end + 1) for end, count in zip(ends, config.stages, strict=True)]
        down = [prod(config.factors[:stage]) for stage in range(len(config.factors) + 1)]
        self.rates = [*down, *down[-2::-1]]
        self.stage_norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in config.stages[1:])
        self.resamples = nn.ModuleList(
            [Resample(config.dim, config.kernel, 1, factor) for factor in config.factors]
            + [Resample(config.dim, config.kernel, factor, 1) for factor in reversed(config.factors)]
        )

    def run_blocks(
        self,
        x: Tensor,
        attend: Tensor | None,
        layers: Collection[int] = (),
        behind: Callable[[int, Tensor], Tensor] | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the stages over frames with positions `(B, T, D)`; see `Stack`. places: None, as none is left out."""
        lowest, frames = len(self.resamples) // 2, x.shape[1]
        left: list[tuple[Tensor, Tensor | None]] = []  # what left the stages on the way down
        hidden: dict[int, Tensor] = {}
        for stage, numbers in enumerate(self.numbers):
            start = x
            if 0 < stage <= lowest:
                left.append((x, attend))
                start = self.resamples[stage - 1](x, x.shape[1], attend)
                factor = self.rates[stage] // self.rates[stage - 1]
                attend = None if attend is None else attend[..., ::factor]
            elif stage > lowest:
                same, attend = left.pop()
                start = self.resamples[stage - 1](x, same.shape[1], attend)
            norm = self.stage_norms[stage - 1] if stage else self.norm
            x, inner = self.run_stage(start, attend, norm, numbers, layers, behind, places)
            if stage >= lowest:
                x = x + (start if stage == lowest else same)
            if numbers[-1] in layers:
                inner[numbers[-1]] = x
            rate = self.rates[stage]
            hidden.update({number: value.repeat_interleave(rate, 1)[:, :frames] for number, value in inner.items()})
        return x, hidden

    def encode_visible(
        self, frames: Tensor, lengths: Tensor, mask: Tensor, visible: Tensor, extra: Tensor | None = None
    ) -> Encoded:
        """Encode hidden frames as zeros; see `Encoder`."""
        return Encoder.encode_visible(self, frames, lengths, mask, visible, extra)

    def feed_forwards(self) -> Sequence[nn.Module]:
        """Return none: blocks differ in rate."""
        return ()

    def layer_factor(self, layer: int) -> int:
        """Return the frames that an output of block `layer` stands for; see `Encoder`."""
        return self.rates[self._stage_of(layer)]

    def _stage_of(self, number: int) -> int:
        return next((stage for stage, numbers in enumerate(self.numbers) if number in numbers), 0)

    def flops(self, frames: int) -> float:
        """Count what lies before the blocks, the stages, and what changes rates; see `Encoder`."""
        before = super().flops(frames) - self.num_layers * self.block_flops(frames)
        times = [-(-frames // rate) for rate in self.rates]
        stages = sum(len(own) * self.block_flops(time) for own, time in zip(self.numbers, times, strict=True))
        # a resample's higher rate is that of one of the stages around it
        highs = [max(pair) for pair in pairwise(times)]
        changes = sum(cast(Resample, part).flops(time) for part, time in zip(self.resamples, highs, strict=True))
        return before + stages + changes

    def visible_flops(self, frames: int, share: float) -> float:
        """Count all frames; see `encode_visible`."""
        return self.flops(frames)

    def depth(self, parameter: str) -> int:
        """Return the block of a parameter; a norm counts with the block it is next to, a resample with the next."""
        part, _, rest = parameter.partition(".")
        if part in ("stage_norms", "resamples"):
            numbers = self.numbers[int(rest.split(".")[0]) + 1]
            return numbers[-1] if part == "stage_norms" and self.norm_last else numbers[0]
        if part == "norm" and self.norm_last:
            return self.numbers[0][-1]
        return super().depth(parameter)
