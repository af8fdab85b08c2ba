"""Labels from a trained tokenizer: its encoder makes a unit vector of each token, its codebook names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from harken.config.saved import find_model, load_into, load_weights, weights_digest
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.encoders.saved import load_backbone
from harken.units.clusterer import Clusterer
from harken.units.ema_codebook import EmaCodebook
from harken.units.features import Features, Frames

PREFIX = "tokenizer."
"""Of a tokenizer's codebook among its weights."""


class Tokenizer:
    """Features of a saved tokenizer: unit vectors, of which its codes are the clusters."""

    def __init__(self, model: str | Path) -> None:
        """Load a model; raises HarkenError when it is damaged or has no codebook."""
        folder = find_model(model)
        self.backbone, _ = load_backbone(folder)
        self.digest = weights_digest(folder)
        found = load_weights(folder).items()
        weights = {name.removeprefix(PREFIX): value for name, value in found if name.startswith(PREFIX)}
        if "codes" not in weights:
            raise HarkenError(f"{model} is no tokenizer: `objective.name: beats_tokenizer` trains one")
        codes, code_dim = weights["codes"].shape
        self.spec, self.rows = self.backbone.spec, self.backbone.encoder.rows
        self.codebook = EmaCodebook(self.backbone.dim // self.rows, code_dim, codes, decay=1.0, seed=0)
        load_into(self.codebook, weights, folder)
        self.device = distributed.device()
        self.backbone.to(self.device)
        self.codebook.to(self.device)

    def describe(self) -> str:
        """Return the hash of the weights."""
        return f"tokens of tokenizer {self.digest[:16]}"

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[Frames]:
        """Return `(T * rows, code_dim)` for each row."""
        batch = batch.to(self.device)
        encoded = self.backbone(batch.inputs, batch.lengths)
        vectors = self.codebook.encode(encoded.last.unflatten(2, (self.rows, -1)).flatten(1, 2)).cpu().numpy()
        counts = (encoded.lengths * self.rows).tolist()
        return [row[:count] for row, count in zip(vectors, counts, strict=True)]


def open_tokenizer(model: str, sample_rate: int) -> Features:
    """Return a saved tokenizer as what `harken.units.label` labels with.

    Raises HarkenError where it was trained at another rate than audio is read at.
    """
    tokenizer = Tokenizer(model)
    if (own := tokenizer.spec.sample_rate) != sample_rate:
        raise HarkenError(f"`--sample-rate` must be the {own} Hz that {model} was trained on, got {sample_rate}")
    return tokenizer


def tokenizer_clusterer(features: Features) -> Clusterer:
    """Return a tokenizer's codes as clusters: between unit vectors the nearest is the same by any measure.

    Raises HarkenError for other features, whose clusterer has to be named.
    """
    if not isinstance(features, Tokenizer):
        raise HarkenError(f"`{features.describe()}` need a clusterer; `harken units fit` makes one")
    codes = np.asarray(features.codebook.codes.cpu().numpy(), dtype=np.float32)
    return Clusterer(codes, features.describe(), features.digest)
