"""Self-attention with dropout on a CPU, which is harken's own, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harken.nn import attention
from harken.nn.attention import SelfAttention


def inputs(kind: str) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 20, 16, generator=generator).requires_grad_()
    if kind == "padded":
        return x, (torch.arange(20) < torch.tensor([20, 11, 1])[:, None])[:, None, None]
    return x, torch.randn(3, 4, 20, 20, generator=generator) if kind == "biased" else None


@pytest.mark.parametrize("kind", ["whole", "padded", "biased"])
@pytest.mark.parametrize("bf16", [False, True])
def test_with_nothing_dropped_it_is_torchs(monkeypatch: pytest.MonkeyPatch, kind: str, bf16: bool) -> None:
    torch.manual_seed(0)
    module = SelfAttention(16, 4, dropout=0.5).train()
    found = []
    for probability in (0.5, 0.0):
        calls: list[float] = []
        monkeypatch.setattr(attention, "dropped", lambda x, p, calls=calls: calls.append(p) or x)
        module.dropout = probability
        x, attend = inputs(kind)
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = module(x, attend)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        assert calls == [0.5] * (probability > 0)
        found.append((y, x.grad, *(parameter.grad.clone() for parameter in module.parameters())))
    for own, torchs in zip(*found, strict=True):
        assert own.dtype is torchs.dtype
        assert (own - torchs).norm() <= (0.02 if bf16 else 1e-5) * torchs.norm() + 1e-7


def test_the_share_that_is_asked_for_is_dropped_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    module = SelfAttention(4, 1, dropout=0.25).train()
    for parameter in module.parameters():
        parameter.data.zero_()
    values = module.qkv.weight.data[8:]
    values += torch.eye(4)
    module.out.weight.data += torch.eye(4)
    x = torch.ones(20, 200, 4)
    y = module(x)[..., 0]  # all weights are 1 / 200: a row's sum of what is kept, over 0.75
    assert y.mean().item() == pytest.approx(1.0, abs=0.005)
    kept_of_200 = 0.75 * 200 * y
    assert (kept_of_200 - kept_of_200.round()).abs().max() < 0.01
    assert kept_of_200.std().item() == pytest.approx((200 * 0.25 * 0.75) ** 0.5, rel=0.05)
    module.eval()
    assert torch.equal(module(x), module.train(False)(x))


def test_a_row_without_a_frame_gives_no_nan() -> None:
    module = SelfAttention(8, 2, dropout=0.1).train()
    x = torch.randn(2, 5, 8, requires_grad=True)
    attend = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    attend[1] = False
    y = module(x, attend)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
