"""MR-HuBERT: its encoder against its stages written out frame by frame, and units predicted at two rates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.encoders._resample import Resample
from harken.encoders.multi_resolution import MultiResolution, MultiResolutionConfig
from harken.objectives.saved import build_objective, build_prepare

SIZES: dict[str, Any] = {
    "name": "multi_resolution",
    "dim": 8,
    "layers": 4,
    "stages": (1, 2, 1),
    "heads": 2,
    "ffn_dim": 12,
    "position_kernel": 4,
    "position_groups": 2,
    "layer_drop": 0.0,
}


def make_encoder(**changes) -> MultiResolution:
    """An encoder in float64 whose every weight says something."""
    torch.manual_seed(1)
    encoder = MultiResolution(MultiResolutionConfig(**{**SIZES, **changes}), input_dim=8).double().eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def activate(x: np.ndarray, norm: nn.GroupNorm) -> np.ndarray:
    """Normalise `(T, D)` over frames and channels together; GELU."""
    y = (x - x.mean()) / math.sqrt(x.var() + norm.eps)
    y = y * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    return 0.5 * y * (1 + torch.erf(torch.from_numpy(y / math.sqrt(2))).numpy())


def resampled(x: np.ndarray, part: Resample, frames: int) -> np.ndarray:
    """Return `(T', D)`: a transposed convolution and a convolution, each tap by tap, with three sums of branches."""
    expand, reduce = part.expand.weight.detach().numpy(), part.reduce.weight.detach().numpy()
    taps = expand.shape[2]
    wide = np.zeros((len(x) * part.up + taps, x.shape[1]))
    for frame in range(len(x)):
        for tap in range(taps):
            wide[frame * part.up + tap] += x[frame] @ expand[:, :, tap]
    repeated = np.stack([x[frame // part.up] for frame in range(frames)])
    both = math.sqrt(0.4) * (activate(wide[:frames], part.expand_norm) + repeated)
    narrow = []
    for frame in range(0, frames, part.down):
        total = np.zeros(x.shape[1])
        for tap in range(taps):
            place = frame + tap - taps // 2
            if 0 <= place < frames:
                total += reduce[:, :, tap] @ both[place]
        narrow.append(total)
    kept = math.sqrt(0.4) * (activate(np.stack(narrow), part.reduce_norm) + both[:: part.down])
    return math.sqrt(0.4) * (kept + repeated[:: part.down])


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_stages_at_two_rates(kernel: int, norm_first: bool) -> None:
    encoder = make_encoder(kernel=kernel, norm_first=norm_first)
    x = torch.randn(1, 7, 8, dtype=torch.float64)

    def stage(x: torch.Tensor, norm: nn.Module, blocks) -> torch.Tensor:
        y = x if norm_first else norm(x)
        for block in blocks:
            y = block(y, None)
        return norm(y) if norm_first else y

    def changed(x: torch.Tensor, number: int) -> torch.Tensor:
        return torch.from_numpy(resampled(x[0].numpy(), encoder.resamples[number], 7))[None]

    blocks, norms = list(encoder.blocks), encoder.stage_norms
    high = stage(x + encoder.positions(x), encoder.norm, blocks[:1])
    start = changed(high, 0)
    low = start + stage(start, norms[0], blocks[1:3])
    top = high + stage(changed(low, 1), norms[1], blocks[3:])
    found = encoder.encode(x, torch.tensor([7]), range(5))
    assert low.shape[1] == 4
    assert torch.allclose(found.last, top, atol=1e-10)
    assert torch.allclose(found.hidden[3][:, ::2], low, atol=1e-10)
    assert torch.equal(found.hidden[3][:, 1::2], found.hidden[3][:, :-1:2])
    assert torch.allclose(found.hidden[1], high, atol=1e-10)
    assert torch.allclose(found.hidden[4], top, atol=1e-10)
    assert [encoder.layer_factor(layer) for layer in range(5)] == [1, 1, 2, 2, 1]


@torch.no_grad()
def test_padding_reaches_no_frame_at_any_rate() -> None:
    encoder = make_encoder(layers=5, stages=(1, 1, 1, 1, 1), factors=(2, 3), kernel=5)
    assert encoder.rates == [1, 2, 6, 2, 1]
    x, lengths = torch.randn(3, 16, 8, dtype=torch.float64), torch.tensor([16, 13, 6])
    together = encoder.encode(x, lengths, range(6))
    for row, length in enumerate(lengths.tolist()):
        alone = encoder.encode(x[row : row + 1, :length], lengths[row : row + 1], range(6))
        assert torch.allclose(together.last[row, :length], alone.last[0], atol=1e-10)
        for layer, value in alone.hidden.items():
            assert torch.allclose(together.hidden[layer][row, :length], value[0], atol=1e-10), layer


@torch.no_grad()
def test_units_are_predicted_once_at_each_rate(corpus) -> None:
    """A sum over both rates; the low one predicts the label of every second frame, where that one is masked."""
    changes = ["name=multi_resolution", "layers=3", "stages=[1,1,1]", "layer_drop=0"]
    config = corpus.config(
        "hubert",
        "filterbank",
        *(f"encoder.{change}" for change in changes),
        f"data.labels=[{corpus.labels},{corpus.labels}]",
        "objective.classes=[12,12]",
        "objective.predict_layers=[2,3]",
        "objective.layer_codebooks=own",
        "objective.unmasked_weight=0.5",
        "objective.penalty_weight=0",
    )
    torch.manual_seed(3)
    model = build_objective(config).eval()
    cuts = [Manifest(corpus.train)[place] for place in (0, 5, 9)]
    rows = [Row(cut.id, "", read_cut(cut, 16000), 0) for cut in cuts]
    batch = build_prepare(config, model.backbone.spec, train=True)(collate(rows), [Draws(1, 0)] * 3)
    batch.targets["labels"][..., 0] = 11 - batch.targets["labels"][..., 0]
    _, x, lengths = model.backbone.embed(batch.inputs, batch.lengths, {"mask": batch.targets["mask"]})
    encoded = model.backbone.encoder.encode(x, lengths, [2])
    low, top = model.lower_heads["2"], model
    sums, counts = {}, {}
    for name, step, outputs, head, book in (
        ("low", 2, encoded.hidden[2], low, 0),
        ("high", 1, encoded.last, top, 1),
    ):
        for row, length in enumerate(lengths.tolist()):
            for frame in range(0, length, step):
                projected = head.project(outputs[row, frame])
                scores = functional.cosine_similarity(projected[None], head.codes.embeddings, dim=-1) / 0.1
                label = int(batch.targets["labels"][row, frame, book])
                key = name, bool(batch.targets["mask"][row, frame])
                sums[key] = sums.get(key, 0.0) + float(scores.exp().sum().log() - scores[label])
                counts[key] = counts.get(key, 0) + 1
    loss = model(batch)
    expected = sum(value * (1.0 if masked else 0.5) for (_, masked), value in sums.items())
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert counts["low", True] < 0.6 * counts["high", True]
    for layer, name in ((2, "low"), (3, "high")):
        value, weight = loss.metrics[f"loss_layer{layer}"]
        assert float(value) == pytest.approx(sums[name, True], rel=1e-5)
        assert float(weight) == counts[name, True]
    assert float(loss.metrics["accuracy_masked"][1]) == counts["low", True] + counts["high", True]
    assert float(loss.metrics["loss"][1]) == counts["high", True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": (1, 1)}, r"`encoder.stages` must name a stage before and one behind .*, got \[1, 1\] and \[2\]"),
        ({"stages": (1, 1, 1)}, r"`encoder.stages` must add up to `encoder.layers`, got \[1, 1, 1\] and 4"),
        ({"factors": (0,)}, r"`encoder.factors` must be positive, got \[0\]"),
        ({"kernel": 2}, "`encoder.kernel` must be odd, got 2"),
        ({"rows": 2}, "`encoder.rows` must be 1: rates are those of frames, got 2"),
    ],
)
def test_rates_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(HarkenError, match=said):
        MultiResolutionConfig(**{**SIZES, **change})
