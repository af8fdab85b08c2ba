"""Patches of a spectrogram: which cell of the grid is where, their positions, and deep norm."""

from __future__ import annotations

import math

import pytest
import torch

from harken.config.registry import build
from harken.core.errors import HarkenError
from harken.encoders.transformer import TransformerConfig
from harken.frontends.patches import PatchesConfig

SMALL = {"bands": 24, "channels": 4, "patch_frames": 3, "patch_bands": 8}


def frontend(**changes):
    return build("frontend", PatchesConfig(name="patches", **{**SMALL, **changes}))


def encoder(input_dim: int = 12, **changes):
    sizes = {"dim": 16, "layers": 2, "heads": 2, "ffn_dim": 16, "position_kernel": 8, "position_groups": 2}
    config = TransformerConfig(name="transformer", **{**sizes, "rows": 3, "positions": "grid", **changes})
    return build("encoder", config, input_dim=input_dim).eval()


@torch.no_grad()
def test_a_frame_is_the_patches_of_one_time_from_low_to_high() -> None:
    model = frontend(bias=True)
    energies = torch.randn(2, 11, 24)
    frames = model.cut(energies)
    assert frames.shape == (2, 3, 12), "11 // 3 times; what fills no patch is dropped"
    for time in range(3):
        for row in range(3):
            cell = energies[:, 3 * time : 3 * time + 3, 8 * row : 8 * row + 8].flatten(1)
            expected = cell @ model.project.weight.flatten(1).T + model.project.bias
            assert torch.allclose(frames[:, time, 4 * row : 4 * row + 4], expected, atol=1e-5)


@torch.no_grad()
def test_positions_tell_every_cell_of_the_grid_apart_and_know_its_neighbours() -> None:
    positions = encoder().positions(torch.zeros(1, 15, 16))
    cells = positions.view(5, 3, 16)
    assert torch.pdist(positions).min() > 0.1
    rates = [1.0, 10000**-0.25, 10000**-0.5, 10000**-0.75]
    for time, row in ((0, 0), (4, 2), (2, 1)):
        expected = [f(place * rate) for place in (row, time) for f in (math.sin, math.cos) for rate in rates]
        assert torch.allclose(cells[time, row], torch.tensor(expected), atol=1e-6)


@torch.no_grad()
def test_each_patch_is_a_token() -> None:
    """Swapping two patches and their positions changes nothing else: attention is over patches, not over times."""
    model = encoder()
    model.positions = torch.nn.Identity()
    model.positions.forward = lambda x, padded: torch.zeros_like(x)
    frames = torch.randn(1, 5, 12)
    tokens = frames.view(1, 15, 4)
    order = torch.randperm(15)
    lengths = torch.tensor([5])
    found = model.encode(model.embed(tokens[:, order].view(1, 5, 12)), lengths).last.view(1, 15, 16)
    expected = model.encode(model.embed(frames), lengths).last.view(1, 15, 16)[:, order]
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_deep_norm_scales_residual_paths_and_first_weights() -> None:
    """DeepNet's table for encoders: alpha (2 N)^(1/4), beta (8 N)^(-1/4)."""
    model = encoder(deep_norm=True, layers=8, dim=64, ffn_dim=64, heads=4)
    block = model.blocks[0]
    assert block.residual == pytest.approx(2.0)
    query, _, value = block.attention.qkv.weight.chunk(3)
    xavier = math.sqrt(2 / (64 + 64))
    assert float(query.std()) == pytest.approx(xavier, rel=0.1)
    assert float(value.std()) == pytest.approx(xavier * 64**-0.25, rel=0.1)
    x = torch.randn(1, 4, 64)
    inner = block.attention_norm(2.0 * x + block.attention(x))
    expected = block.ffn_norm(2.0 * inner + block.down(torch.nn.functional.gelu(block.up(inner))))
    assert torch.allclose(block(x, None), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: frontend(patch_bands=7), "`frontend.bands` must be divisible by `frontend.patch_bands`, got 24 and 7"),
        (lambda: encoder(input_dim=16), "`encoder.rows` must divide the width of the frontend's frames, got 3 and 16"),
        (lambda: encoder(dim=18), "`encoder.positions: grid` needs an `encoder.dim` divisible by 4, got 18"),
        (lambda: encoder(deep_norm=True, norm_first=True), "`encoder.deep_norm` is for norms behind the branches"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, message) -> None:
    with pytest.raises(HarkenError) as caught:
        make()
    assert message in str(caught.value)
