"""harken's dropout on a CPU: the promised share and scale, gradients through the same mask, torch's seed."""

from __future__ import annotations

import pytest
import torch

from harken.nn.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    y = Dropout(p)(torch.ones(999, 1001, dtype=dtype))
    assert y.dtype is dtype
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=5 * (p * (1 - p) / y.numel()) ** 0.5)
    assert float(y.float().max()) == pytest.approx(1 / (1 - p), rel=2**-7 if dtype is torch.bfloat16 else 1e-4)


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(7, 13, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)
    assert torch.allclose(x.grad * x, y)


def test_the_seed_decides_and_neighbours_differ() -> None:
    x, drop = torch.ones(64, 64), Dropout(0.5)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)
    assert not torch.equal(first, second)
    kept = (first != 0).float()
    for shift in (1, 2, 3, 4):  # four elements share one draw of 64 bits: they must not share their fate
        both = float((kept * kept.roll(shift, 1)).mean())
        assert both == pytest.approx(0.25, abs=0.03), shift


def test_nothing_is_dropped_in_evaluation_and_everything_at_one() -> None:
    x = torch.randn(5, 5)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()
