"""Heads that turn frames into logits of units."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

HeadKind = Literal["cosine", "cosine_normal", "linear"]


class CosineCodes(nn.Module):
    """Logits of units: cosine similarity of a projected frame to each unit's embedding, over a temperature.

    One matrix product of normalised vectors; no frames x units x dim tensor exists.
    Source: arXiv 2106.07447 equation 3.
    """

    def __init__(self, classes: tuple[int, ...], dim: int, temperature: float, *, normal: bool) -> None:
        super().__init__()
        self.classes = classes
        self.temperature = temperature
        start = torch.randn(sum(classes), dim) / dim**0.5 if normal else torch.rand(sum(classes), dim)
        self.embeddings = nn.Parameter(start)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map projected frames `(N, C, dim)` to logits `(N, classes[c])` of each codebook."""
        codes = functional.normalize(self.embeddings.float(), dim=-1).split(self.classes)
        x = functional.normalize(x.float(), dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            return [x[:, index] @ code.T / self.temperature for index, code in enumerate(codes)]


class LinearCodes(nn.Module):
    """Logits of units from one linear map for each codebook, over a temperature.

    Source: k2SSL, arXiv 2411.17100; icefall's `hubert_ce.py`.
    """

    def __init__(self, classes: tuple[int, ...], dim: int, temperature: float) -> None:
        super().__init__()
        self.classes = classes
        self.temperature = temperature
        self.maps = nn.ModuleList(nn.Linear(dim, count) for count in classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map frames `(N, C, dim)` to logits `(N, classes[c])` of each codebook."""
        return [linear(x[:, index]).float() / self.temperature for index, linear in enumerate(self.maps)]


class UnitHead(nn.Module):
    """A projection and the logits of some codebooks; `kind` is `objective.head` of `hubert`.

    separate: one projection for each codebook, of the cosine heads.
    """

    def __init__(
        self, kind: HeadKind, classes: tuple[int, ...], dim: int, code_dim: int, temperature: float, *, separate: bool
    ) -> None:
        super().__init__()
        if kind == "linear":
            self.project: nn.Module = nn.Identity()
            self.codes: CosineCodes | LinearCodes = LinearCodes(classes, dim, temperature)
            self.flops = 2.0 * dim * sum(classes)
        else:
            width = code_dim * (len(classes) if separate else 1)
            self.project = nn.Linear(dim, width)
            self.codes = CosineCodes(classes, code_dim, temperature, normal=kind == "cosine_normal")
            self.flops = 2.0 * (dim * width + code_dim * sum(classes))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map frames `(N, D)` to logits `(N, classes[c])` of each codebook."""
        return unit_logits(self.project, self.codes, x)


def unit_logits(project: nn.Module, codes: CosineCodes | LinearCodes, x: Tensor) -> list[Tensor]:
    """Map frames `(N, D)` to logits `(N, classes[c])` of each codebook, by the parts of a `UnitHead`."""
    projected: Tensor = project(x)
    count = len(codes.classes)
    width = projected.shape[-1] if isinstance(codes, LinearCodes) else codes.embeddings.shape[-1]
    logits: list[Tensor] = codes(projected.unflatten(-1, (-1, width)).expand(-1, count, -1))
    return logits
