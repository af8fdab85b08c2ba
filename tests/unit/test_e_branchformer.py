"""The E-Branchformer's block against its paper's equations, written out frame by frame."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harken.core.errors import HarkenError
from harken.encoders.e_branchformer import Block, EBranchformerConfig, GatedConvolution

SMALL = {"dim": 8, "layers": 1, "heads": 2, "ffn_dim": 12, "gate_dim": 20, "kernel": 3, "merge_kernel": 5}
CONFIG = EBranchformerConfig(name="e_branchformer", position_groups=2, dropout=0.0, attention_dropout=0.0, **SMALL)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + torch.erf(torch.from_numpy(x / 2**0.5)).numpy())


def norm(x: np.ndarray, module: nn.LayerNorm) -> np.ndarray:
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + module.eps)
    return y * module.weight.detach().numpy() + module.bias.detach().numpy()


def linear(x: np.ndarray, module: nn.Linear) -> np.ndarray:
    return x @ module.weight.detach().numpy().T + module.bias.detach().numpy()


def depthwise(x: np.ndarray, module: nn.Conv1d) -> np.ndarray:
    """Weigh the frames around each frame, channel by channel, zeros beyond both ends."""
    weight, bias = module.weight.detach().numpy()[:, 0], module.bias.detach().numpy()
    half = weight.shape[1] // 2
    rows = []
    for frame in range(len(x)):
        total = bias.copy()
        for tap in range(weight.shape[1]):
            if 0 <= frame + tap - half < len(x):
                total = total + weight[:, tap] * x[frame + tap - half]
        rows.append(total)
    return np.stack(rows)


@pytest.fixture
def block() -> Block:
    """A block in float64 whose every weight says something."""
    torch.manual_seed(1)
    block = Block(CONFIG).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


@torch.no_grad()
def test_the_merge_of_both_branches(block: Block) -> None:
    x = np.random.default_rng(0).standard_normal((7, 8))

    def half_feed_forward(x: np.ndarray, module) -> np.ndarray:
        y = linear(norm(x, module.norm), module.up)
        return x + 0.5 * linear(y / (1 + np.exp(-y)), module.down)

    y = half_feed_forward(x, block.before)
    far = block.attention(torch.from_numpy(norm(y, block.attention_norm))[None], None)[0].numpy()
    value, gate = np.split(gelu(linear(norm(y, block.local.norm), block.local.up)), 2, axis=-1)
    near = linear(value * depthwise(norm(gate, block.local.gate_norm), block.local.depthwise), block.local.down)
    both = np.concatenate([far, near], axis=-1)
    y = y + linear(both + depthwise(both, block.merge_depthwise), block.merge)
    expected = norm(half_feed_forward(y, block.after), block.norm)
    found = block(torch.from_numpy(x)[None], None)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_padding_reaches_no_frame(block: Block) -> None:
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    attend = (torch.arange(9) < 6)[None, None, None, :]
    assert torch.allclose(block(x, attend)[:, :6], block(x[:, :6], None), atol=1e-12)


@torch.no_grad()
def test_the_gate_begins_at_one() -> None:
    local = GatedConvolution(CONFIG)
    x: Tensor = torch.randn(2, 5, 8)
    value = nn.functional.gelu(local.up(local.norm(x))).chunk(2, dim=-1)[0]
    assert torch.allclose(local(x, None), local.down(value), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kernel": 4}, "`encoder.kernel` must be odd, got 4"),
        ({"merge_kernel": 2}, "`encoder.merge_kernel` must be odd, got 2"),
        ({"gate_dim": 21}, "`encoder.gate_dim` must be even, got 21"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(HarkenError, match=said):
        EBranchformerConfig(name="e_branchformer", position_groups=2, **{**SMALL, **change})
