"""The seven-layer waveform convolution of wav2vec 2.0 and HuBERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec, Window
from harken.frontends.base import Frontend, InputNoise
from harken.nn.gradients import scale_and_shift, scale_gradient
from harken.nn.masked import normalise_over_time
from harken.nn.waveform import gelu_convolution, normalised_convolution, pays


@dataclass(frozen=True, kw_only=True)
class WaveformConfig(SlotConfig):
    """Defaults are HuBERT Base's; fairseq's option names stand behind each field."""

    sample_rate: int = 16000
    """Samples a second of the audio; equals `data.sample_rate`. fairseq task `sample_rate`."""
    channels: int = 512
    """fairseq `conv_feature_layers`: the first number of each triple."""
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    """Width of each convolution, in outputs of the one before. fairseq `conv_feature_layers`: the second numbers."""
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    """Stride of each convolution; together 320 samples, 20 ms. fairseq `conv_feature_layers`: the third numbers."""
    norm: Literal["group", "layer"] = "group"
    """fairseq `extractor_mode`: `default` is group (after the first layer only), `layer_norm` is layer (after each)."""
    bias: bool = False
    """fairseq `conv_bias`."""
    norm_over_padding: bool = False
    """Let group norm count the padding, as the original does: an utterance's output then depends on its batch."""
    normalize: bool = False
    """Give each waveform zero mean and unit variance first; fairseq's task option `normalize`, True for Large."""
    grad_scale: float = 0.1
    """fairseq `feature_grad_mult`, 0.1 in HuBERT Base and 1.0 in large. 0 trains no frontend."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "frontend",
            positive=("sample_rate", "channels", "kernels", "strides"),
            not_negative=("grad_scale",),
        )
        if len(self.kernels) != len(self.strides) or not self.kernels:
            raise HarkenError(
                "`frontend.kernels` and `frontend.strides` must be of one length, "
                f"got {len(self.kernels)} and {len(self.strides)}"
            )


class ChannelNorm(nn.Module):
    """Group norm with one channel a group: each channel is normalised over time, then scaled and shifted."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Normalise `x` `(B, C, T)` over the first `lengths` frames, or over all when None."""
        if lengths is None:
            return functional.group_norm(x, x.shape[1], self.weight, self.bias)
        y = normalise_over_time(x.float().transpose(1, 2), lengths)
        return scale_and_shift(y, self.weight, self.bias).transpose(1, 2)


class LastAxisNorm(nn.LayerNorm):
    """Layer norm over the channels of `(B, C, T)`."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Normalise each frame over its channels; `lengths` does not matter here."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvLayer(nn.Module):
    """Convolution without padding, an optional norm, GELU."""

    def __init__(self, inputs: int, outputs: int, window: Window, *, bias: bool, norm: nn.Module | None) -> None:
        super().__init__()
        self.window = window
        self.conv = nn.Conv1d(inputs, outputs, window.kernel, window.stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm = norm

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Map `(B, C, T)` to `(B, C', T')`."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x, lengths)
        return functional.gelu(x)


@register("frontend", WaveformConfig)
class Waveform(Frontend):
    """Strided convolutions over samples.

    Source: arXiv 2006.11477 section 2 and 4.2; kernels and strides give 20 ms frames with a 25 ms receptive field.
    """

    def __init__(self, config: WaveformConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.channels
        windows = tuple(Window(k, s) for k, s in zip(config.kernels, config.strides, strict=True))
        self.spec = FrameSpec(windows, config.sample_rate)
        self.layers = nn.ModuleList(self._layer(index, window) for index, window in enumerate(windows))

    def _layer(self, index: int, window: Window) -> ConvLayer:
        channels = self.config.channels
        norm: nn.Module | None = None
        if self.config.norm == "layer":
            norm = LastAxisNorm(channels)
        elif index == 0:
            norm = ChannelNorm(channels)
        return ConvLayer(1 if index == 0 else channels, channels, window, bias=self.config.bias, norm=norm)

    def forward(
        self, inputs: Tensor, lengths: Tensor, band_mask: Tensor | None = None, noise: InputNoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return frames `(B, T, channels)` and lengths; see `Frontend`. Noise is relative to the utterance's level."""
        padded = bool((lengths < inputs.shape[1]).any())
        if self.config.normalize:
            inputs = normalise_over_time(inputs[..., None], lengths if padded else None).squeeze(-1)
        if noise is not None:
            level = (inputs.square().sum(1) / lengths.clamp(min=1).to(inputs.device, non_blocking=True)).sqrt()
            inputs = noise.replace(inputs[..., None], self.spec, Window(1, 1), level[:, None, None]).squeeze(-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.grad_scale > 0):
            first = FrameSpec(self.spec.windows[:1], self.spec.sample_rate).num_frames(lengths)
            count = first if padded and not self.config.norm_over_padding else None
            if self.config.norm == "group" and not self.config.bias and pays(inputs, list(self.layers.parameters())):
                frames = self._products(inputs, count)
            else:
                x = inputs[:, None, :]
                for layer in self.layers:
                    x = layer(x, count)
                frames = x.transpose(1, 2)
        return scale_gradient(frames, self.config.grad_scale), self.spec.num_frames(lengths)

    def _products(self, inputs: Tensor, count: Tensor | None) -> Tensor:
        """Return what the layers return, as `(B, T, channels)`, by `harken.nn.waveform`."""
        first, *others = (cast(ConvLayer, layer) for layer in self.layers)
        norm = cast(ChannelNorm, first.norm)
        frames = None if count is None else count.tolist()
        stride = first.window.stride
        x = normalised_convolution(inputs, first.conv.weight, norm.weight, norm.bias, stride=stride, frames=frames)
        for layer in others:
            x = gelu_convolution(x, layer.conv.weight, stride=layer.window.stride)
        return functional.gelu(x)

    def flops(self, samples: int) -> float:
        """Count the convolutions; see `Frontend`."""
        total, channels, length = 0.0, 1, samples
        for window in self.spec.windows:
            length = FrameSpec((window,), self.spec.sample_rate).num_frames(length)
            total += 2.0 * length * window.kernel * channels * self.dim
            channels = self.dim
        return total
