"""Patches of a spectrogram: the input of audio transformers made after vision transformers.

Source: AST, arXiv 2104.01778; BEATs, arXiv 2212.09058 section 3.1 and `BEATs.py` of its released code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError
from harken.core.frames import Window
from harken.frontends.base import InputNoise
from harken.frontends.filterbank import LogMelConfig, LogMelFrontend


@dataclass(frozen=True, kw_only=True)
class PatchesConfig(LogMelConfig):
    """Defaults are BEATs' (arXiv 2212.09058; `BEATs.py` of its released code)."""

    bands: int = 128
    """Triangular mel bands. BEATs has 128."""
    channels: int = 512
    """Width of one patch. BEATs `embed_dim`. A frame is all patches of one time: `bands / patch_bands` of these."""
    normalize: bool = False
    """Give each band of each utterance zero mean and unit variance, in the place of `mean` and `deviation`."""
    mean: float = 15.41663
    """Subtracted from the log-mel energies of samples scaled by 32768. BEATs `fbank_mean`."""
    deviation: float = 13.11164
    """What they are divided by. Twice BEATs' `fbank_std`, 6.55582."""
    patch_frames: int = 16
    """Frames of 10 ms in a patch. BEATs `input_patch_size`."""
    patch_bands: int = 16
    """Bands in a patch; they divide `bands`. BEATs `input_patch_size`."""
    bias: bool = False
    """Add a bias to a patch. BEATs `conv_bias`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "frontend", positive=("deviation", "patch_frames", "patch_bands"))
        if self.bands % self.patch_bands:
            raise HarkenError(
                f"`frontend.bands` must be divisible by `frontend.patch_bands`, got {self.bands} and {self.patch_bands}"
            )


@register("frontend", PatchesConfig)
class Patches(LogMelFrontend):
    """Log-mel bands cut into patches of `patch_frames` x `patch_bands` that do not overlap, each projected.

    The patches are a grid of times and rows of bands. A frame is one time of it, its rows side by side from low to
    high, so `dim` is rows x `channels`; an encoder whose `rows` are as many takes each patch for a token of its own.
    What is left at the end and fills no patch is dropped, as in BEATs.
    """

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__(config, [Window(config.patch_frames, config.patch_frames)])
        self.config = config
        self.rows = config.bands // config.patch_bands
        self.dim = self.rows * config.channels
        size = (config.patch_frames, config.patch_bands)
        self.project = nn.Conv2d(1, config.channels, size, stride=size, bias=config.bias)

    def standardise(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Subtract the corpus's mean and divide by its deviation, if the utterance's own are not asked for."""
        if self.normalize:
            return super().standardise(x, lengths)
        return (x - self.config.mean) / self.config.deviation

    def forward(
        self, inputs: Tensor, lengths: Tensor, band_mask: Tensor | None = None, noise: InputNoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return frames `(B, T, rows * channels)` and lengths; see `LogMelFrontend` for masked bands."""
        return self.cut(self.log_energies(inputs, lengths, band_mask, noise)), self.spec.num_frames(lengths)

    def cut(self, energies: Tensor) -> Tensor:
        """Project the patches of standardised energies `(B, M, bands)`; return `(B, T, rows * channels)`."""
        grid: Tensor = self.project(energies[:, None].to(self.project.weight.dtype))  # (B, channels, T, rows)
        return grid.permute(0, 2, 3, 1).flatten(2)

    def flops(self, samples: int) -> float:
        """Count the mel product and the projections; see `Frontend`."""
        return self.mel_flops(samples) + 2.0 * self.spec.num_frames(samples) * self.rows * self.project.weight.numel()
