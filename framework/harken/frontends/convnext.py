"""Log-mel filterbanks with the convolutional embedding of the Zipformer recogniser.

Source: arXiv 2310.11230 section 3.1 ("Conv-Embed"); numbers from icefall's `subsampling.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.core.batch import padding_mask
from harken.core.errors import HarkenError
from harken.core.frames import Window
from harken.frontends.base import InputNoise
from harken.frontends.filterbank import LogMelConfig, LogMelFrontend
from harken.nn.bias_norm import BiasNorm
from harken.nn.gradients import scale_gradient
from harken.nn.limits import Regime
from harken.nn.scheduled import Clock, drop_over_time, keep_rows
from harken.nn.swoosh import SWOOSH_L, SWOOSH_R, SwooshLinear

_KERNEL = 7  # of the ConvNeXt layer, over frames and bands
_WIDER = 3  # its inner width over its width


@dataclass(frozen=True, kw_only=True)
class ConvnextConfig(LogMelConfig):
    """Defaults are those of icefall's Zipformer recogniser: 80 bands, 20 ms frames."""

    channels: int = 192
    """Width of a frame that leaves the frontend: the first width of the encoder."""
    maps: tuple[int, ...] = (8, 32, 128)
    """Feature maps of the three convolutions; the ConvNeXt layer has as many as the last. icefall `layer1_channels`
    to `layer3_channels`."""
    dropout: float = 0.1
    """Of channels of a whole utterance, from step 20000 on. icefall `dropout`."""
    start_dropout: float = 0.3
    """The same at step 0; it goes to `dropout` on a line."""
    random_skips: bool = True
    """In training, utterances pass the ConvNeXt layer over with a probability that falls from 0.2 to 0.015 in 20000
    steps. icefall `layerdrop_rate`."""
    gradient_limits: bool = True
    """Balancers and whiteners, which change gradients alone, in training."""
    schedule_start: float = 0.0
    """Step at which all schedules begin; see the encoder's."""
    schedule_scale: float = 1.0
    """Steps of the schedules to one of the run; see the encoder's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(
            self,
            "frontend",
            positive=("maps", "schedule_scale"),
            not_negative=("schedule_start",),
            shares=("dropout", "start_dropout"),
        )
        if len(self.maps) != 3:
            raise HarkenError(f"`frontend.maps` must have an entry for each of 3 convolutions, got {list(self.maps)}")
        if self.bands < 7:
            raise HarkenError(f"`frontend.bands` must be at least 7 for two convolutions to halve, got {self.bands}")


class ConvNextLayer(nn.Module):
    """Depthwise convolution over frames and bands, two maps of each place with SwooshL between, added to the input."""

    def __init__(self, maps: int, regime: Regime) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(maps, maps, _KERNEL, padding=_KERNEL // 2, groups=maps)
        self.up = nn.Linear(maps, _WIDER * maps)
        self.down = SwooshLinear(_WIDER * maps, maps, SWOOSH_L, 0.01)
        self.skip = regime.schedule((0.0, 0.2), (20000.0, 0.015)) if regime.skips else None
        self.balance_inner = regime.balancer(min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.balance = regime.balancer(min_positive=0.4, max_positive=0.6, min_abs=1.0, max_abs=6.0)
        self.whiten = regime.whitener(5.0, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, T, bands)` to `(B, T, bands, C)`."""
        places = x.permute(0, 2, 3, 1)
        branch = self.down(self.balance_inner(self.up(self.depthwise(x).permute(0, 2, 3, 1))))
        if self.training and self.skip is not None:
            rows = keep_rows(branch.flatten(2), self.skip)
            branch = branch if rows is None else branch * rows[..., None]
        y: Tensor = self.whiten(self.balance(places + branch))
        return y


class ConvEmbedding(nn.Module):
    """Three convolutions with SwooshR, a ConvNeXt layer, a linear map of all maps and bands, BiasNorm."""

    def __init__(self, config: ConvnextConfig) -> None:
        super().__init__()
        regime = Regime(
            Clock(config.schedule_start, config.schedule_scale), config.random_skips, config.gradient_limits
        )
        first, second, third = config.maps
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(1, first, 3, padding=(0, 1)),
                nn.Conv2d(first, second, 3, 2),
                nn.Conv2d(second, third, 3, (1, 2)),
            ]
        )
        self.balancers = nn.ModuleList(regime.balancer(max_abs=bound, channel_dim=1) for bound in (1.0, 4.0, 4.0))
        self.layer = ConvNextLayer(third, regime)
        half = (config.bands - 3) // 2 + 1
        self.widths = (config.bands, half, (half - 3) // 2 + 1)
        self.out = nn.Linear(third * self.widths[2], config.channels)
        self.whiten = regime.whitener(4.0, 8.0, strength=0.02)
        self.norm = BiasNorm(config.channels, limit=regime.limits)
        self.dropout = regime.schedule((0.0, config.start_dropout), (20000.0, config.dropout))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map `(B, T, bands)` to `(B, T', channels)`. lengths: `(B,)` on the CPU, of the result."""
        x = x[:, None]
        for index, (convolution, balancer) in enumerate(zip(self.convolutions, self.balancers, strict=True)):
            x = convolution(x)
            if index == 0:
                x = scale_gradient(x, 0.2)  # it is the largest of all, and would leave fp16's range first
            x = SWOOSH_R(balancer(x))
        padded = padding_mask(lengths, x.shape[2])
        if padded is not None:  # the layer sees 3 frames to each side: to a real one, padding is what silence is alone
            x = x.masked_fill(padded.to(x.device, non_blocking=True)[:, None, :, None], 0.0)
        x = self.layer(x).transpose(2, 3).flatten(2)
        x = self.norm(self.whiten(self.out(x)))
        mask = drop_over_time(x, self.dropout) if self.training else None
        return x if mask is None else x * mask

    def flops(self, frames: int) -> float:
        """Count the products over `frames` of 10 ms."""
        times = [max(0, frames - 2), max(0, (frames - 5) // 2 + 1), max(0, (frames - 5) // 2 - 1)]
        places = [time * width for time, width in zip(times, self.widths, strict=True)]
        kernels = [convolution.weight.numel() for convolution in cast(Iterable[nn.Conv2d], self.convolutions)]
        total = float(sum(place * kernel for place, kernel in zip(places, kernels, strict=True)))
        layer = self.layer
        total += places[2] * sum(part.weight.numel() for part in (layer.depthwise, layer.up, layer.down))
        return 2.0 * (total + times[2] * self.out.weight.numel())


@register("frontend", ConvnextConfig)
class Convnext(LogMelFrontend):
    """Log-mel bands, normalised over each utterance if so configured, then the convolutional embedding."""

    def __init__(self, config: ConvnextConfig) -> None:
        super().__init__(config, (Window(3, 1), Window(3, 2), Window(3, 1)))
        self.embedding = ConvEmbedding(config)

    def forward(
        self, inputs: Tensor, lengths: Tensor, band_mask: Tensor | None = None, noise: InputNoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return frames `(B, T, channels)` and lengths; a masked band is set to its mean over the utterance."""
        frames = self.spec.num_frames(lengths)
        return self.embedding(self.log_energies(inputs, lengths, band_mask, noise), frames), frames

    def flops(self, samples: int) -> float:
        """Count the mel product and the embedding; see `Frontend`."""
        return self.mel_flops(samples) + self.embedding.flops(self.mel_frames(samples))
