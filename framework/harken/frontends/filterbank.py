"""Log-mel filterbanks with convolutional subsampling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
from harken.nn.masked import normalise_over_time


@dataclass(frozen=True, kw_only=True)
class LogMelConfig(SlotConfig):
    """What frontends over Kaldi's filterbank share."""

    sample_rate: int = 16000
    """Samples a second of the audio; equals `data.sample_rate`. Kaldi `sample-frequency`."""
    bands: int = 80
    """Triangular mel bands. Kaldi `num-mel-bins`."""
    low_hz: float = 20.0
    """Lower edge of the first band. Kaldi `low-freq`, with its default."""
    high_hz: float = 0.0
    """Upper edge of the last band; 0 is half the sample rate, a negative value counts down from there (Kaldi)."""
    channels: int = 256
    """Width of a frame that leaves the frontend, and of its convolutions over time."""
    normalize: bool = True
    """Give each band of each utterance zero mean and unit variance."""

    def __post_init__(self) -> None:
        check_numbers(self, "frontend", positive=("sample_rate", "bands", "channels"), not_negative=("low_hz",))


@dataclass(frozen=True, kw_only=True)
class FilterbankConfig(LogMelConfig):
    """Kaldi's 80-bin filterbank; two strided convolutions give 40 ms frames, one gives 20 ms."""

    subsampling: int = 4
    """Frames of 10 ms that one output frame stands for: 2 or 4 (Fast-HuBERT, arXiv 2309.13860, uses 4)."""
    convolution: Literal["time", "time_frequency"] = "time"
    """Subsample by convolutions over time with the bands as channels, or over time and frequency and then project
    (the front of Deep Speech 2, arXiv 1512.02595, and of most recognisers since)."""
    maps: int = 32
    """Feature maps of `time_frequency`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "frontend", positive=("maps",))
        if self.subsampling not in (1, 2, 4, 8):
            raise HarkenError(f"`frontend.subsampling` must be 1, 2, 4 or 8, got {self.subsampling}")


class LogMel(nn.Module):
    """Kaldi's log-mel filterbank (Povey window, pre-emphasis 0.97, DC removed, no dither, snip edges) on any device.

    Source: Kaldi's feature documentation; equal to kaldi-native-fbank with `dither=0` for samples scaled by 32768.
    """

    window: Tensor
    mel: Tensor

    def __init__(self, config: LogMelConfig) -> None:
        super().__init__()
        self.size = config.sample_rate * 25 // 1000
        self.hop = config.sample_rate // 100
        self.fft = 2 ** math.ceil(math.log2(self.size))
        hann = torch.hann_window(self.size, periodic=False, dtype=torch.float64)
        self.register_buffer("window", hann.pow(0.85).float(), persistent=False)
        self.register_buffer("mel", mel_matrix(config, self.fft), persistent=False)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Map samples `(B, S)` in [-1, 1] to natural-log band energies `(B, T, bands)`."""
        with torch.autocast(inputs.device.type, enabled=False):
            frames = (inputs.float() * 32768.0).unfold(1, self.size, self.hop)
            frames = frames - frames.mean(-1, keepdim=True)
            previous = functional.pad(frames, (1, 0), mode="replicate")[..., :-1]
            frames = (frames - 0.97 * previous) * self.window
            spectrum = torch.fft.rfft(frames, self.fft)[..., :-1]
            power = spectrum.real.square() + spectrum.imag.square()  # `abs` would take a root of each first
            bands: Tensor = power @ self.mel
            return bands.clamp(min=torch.finfo(torch.float32).eps).log()


def mel_matrix(config: LogMelConfig, fft: int) -> Tensor:
    """Return Kaldi's triangular mel weights `(fft / 2, bands)`: triangles in mel, 1127 ln(1 + f / 700)."""

    def to_mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    nyquist = config.sample_rate / 2
    high = config.high_hz if config.high_hz > 0 else nyquist + config.high_hz
    if not 0 <= config.low_hz < high <= nyquist:
        raise HarkenError(
            f"`frontend.low_hz` < `frontend.high_hz` <= {nyquist} must hold, got {config.low_hz} and {high}"
        )
    low_mel, high_mel = (1127.0 * math.log1p(edge / 700.0) for edge in (config.low_hz, high))
    edges = torch.linspace(low_mel, high_mel, config.bands + 2, dtype=torch.float64)
    bins = to_mel(torch.arange(fft // 2, dtype=torch.float64) * config.sample_rate / fft)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0).float()


class TimeSubsampling(nn.Module):
    """Convolutions over time, the bands as channels, GELU after each."""

    def __init__(self, config: FilterbankConfig, strides: list[int]) -> None:
        super().__init__()
        widths = [config.bands, *[config.channels] * len(strides)]
        self.layers = nn.ModuleList(
            nn.Conv1d(a, b, kernel_of(stride), stride)
            for a, b, stride in zip(widths, widths[1:], strides, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, bands)` to `(B, T', channels)`."""
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = functional.gelu(layer(x))
        return x.transpose(1, 2)

    def flops(self, frames: int) -> float:
        """Count the convolutions over `frames` of 10 ms."""
        total = 0.0
        for layer in cast("Iterable[nn.Conv1d]", self.layers):
            frames = max(0, (frames - layer.kernel_size[0]) // layer.stride[0] + 1)
            total += 2.0 * frames * layer.weight.numel()
        return total


class TimeFrequencySubsampling(nn.Module):
    """Convolutions over time and frequency with GELU, then a projection of all maps and bands."""

    def __init__(self, config: FilterbankConfig, strides: list[int]) -> None:
        super().__init__()
        self.bands = config.bands
        widths = [1, *[config.maps] * len(strides)]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, (kernel_of(stride), 3), (stride, 2))
            for a, b, stride in zip(widths, widths[1:], strides, strict=False)
        )
        bands = config.bands
        for _ in strides:
            bands = (bands - 3) // 2 + 1
        self.project = nn.Linear(config.maps * bands, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, bands)` to `(B, T', channels)`."""
        x = x[:, None]
        for layer in self.layers:
            x = functional.gelu(layer(x))
        projected: Tensor = self.project(x.transpose(1, 2).flatten(2))
        return projected

    def flops(self, frames: int) -> float:
        """Count the convolutions and the projection over `frames` of 10 ms."""
        total, bands = 0.0, self.bands
        for layer in cast("Iterable[nn.Conv2d]", self.layers):
            frames = max(0, (frames - layer.kernel_size[0]) // layer.stride[0] + 1)
            bands = (bands - 3) // 2 + 1
            total += 2.0 * frames * bands * layer.weight.numel()
        return total + 2.0 * frames * self.project.weight.numel()


def kernel_of(stride: int) -> int:
    """Return the kernel that goes with a stride: 3 where it subsamples, 1 where it only maps."""
    return 3 if stride == 2 else 1


class LogMelFrontend(Frontend):
    """Log-mel bands, normalised over each utterance if so configured; what is behind them is of windows of 10 ms."""

    def __init__(self, config: LogMelConfig, windows: Sequence[Window]) -> None:
        super().__init__()
        self.normalize = config.normalize
        self.bands = config.bands
        self.dim = config.channels
        self.log_mel = LogMel(config)
        self.spec = FrameSpec((Window(self.log_mel.size, self.log_mel.hop), *windows), config.sample_rate)

    def log_energies(
        self, inputs: Tensor, lengths: Tensor, band_mask: Tensor | None, noise: InputNoise | None
    ) -> Tensor:
        """Return `(B, T, bands)`, a frame each 10 ms; a masked band is set to its mean over the utterance."""
        x = self.standardise(self.log_mel(inputs), lengths)
        if noise is not None:
            x = noise.replace(x, self.spec, self.spec.windows[0])
        return x if band_mask is None else x.masked_fill(band_mask[:, None, :], 0.0)

    def standardise(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Give the energies `(B, T, bands)` of utterances of `lengths` samples their scale, before noise and masks."""
        if not self.normalize:
            return x
        count = FrameSpec(self.spec.windows[:1], self.spec.sample_rate).num_frames(lengths)
        return normalise_over_time(x, count if bool((count < x.shape[1]).any()) else None)

    def mel_frames(self, samples: int) -> int:
        """Return the number of frames of 10 ms."""
        return FrameSpec(self.spec.windows[:1], self.spec.sample_rate).num_frames(samples)

    def mel_flops(self, samples: int) -> float:
        """Count the mel product."""
        return 2.0 * self.mel_frames(samples) * self.log_mel.mel.numel()


@register("frontend", FilterbankConfig)
class Filterbank(LogMelFrontend):
    """Log-mel bands, normalised over each utterance, then strided convolutions."""

    def __init__(self, config: FilterbankConfig) -> None:
        strides = [2] * int(math.log2(config.subsampling)) or [1]
        super().__init__(config, [Window(kernel_of(s), s) for s in strides])
        self.config = config
        self.subsampling: TimeSubsampling | TimeFrequencySubsampling = (
            TimeSubsampling(config, strides)
            if config.convolution == "time"
            else TimeFrequencySubsampling(config, strides)
        )

    def forward(
        self, inputs: Tensor, lengths: Tensor, band_mask: Tensor | None = None, noise: InputNoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return frames `(B, T, channels)` and lengths; see `LogMelFrontend` for masked bands."""
        return self.subsampling(self.log_energies(inputs, lengths, band_mask, noise)), self.spec.num_frames(lengths)

    def flops(self, samples: int) -> float:
        """Count the mel product and the convolutions; see `Frontend`."""
        return self.mel_flops(samples) + self.subsampling.flops(self.mel_frames(samples))
