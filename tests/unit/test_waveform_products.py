"""The waveform frontend's matrix products equal its plain layers, both ways, and are taken where they pay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harken.frontends import waveform
from harken.frontends.waveform import Waveform, WaveformConfig
from harken.nn.waveform import gelu_convolution, pays


def both(monkeypatch, config: WaveformConfig, lengths: list[int], offset: float = 0.0) -> list[tuple[Tensor, ...]]:
    """Return the frames and all gradients of the products, and of the plain layers, for one model and input."""
    torch.manual_seed(0)
    model = Waveform(config)
    for parameter in model.parameters():  # neither scale 1 nor shift 0
        parameter.data += 0.1 * torch.rand_like(parameter) * parameter.std(correction=0).clamp(min=0.1)
    inputs = 0.1 * torch.randn(len(lengths), max(lengths)) + offset
    found = []
    for products in (True, False):
        monkeypatch.setattr(waveform, "pays", lambda *_, taken=products: taken)
        model.zero_grad()
        frames, _ = model(inputs, torch.tensor(lengths))
        (frames * torch.linspace(-1, 1, frames.numel()).view_as(frames)).sum().backward()
        found.append((frames.detach(), *(parameter.grad.clone() for parameter in model.parameters())))
    return found


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize(
    ("lengths", "changes"),
    [
        ([4000, 4000], {}),
        ([4000, 2100, 7], {}),  # the last has no frame
        ([4000, 2100], {"norm_over_padding": True}),
        ([3997, 3001], {"kernels": (10, 5, 3, 2, 1), "strides": (5, 2, 1, 3, 2)}),
    ],
)
def test_products_equal_the_plain_layers(monkeypatch, lengths: list[int], changes: dict, offset: float) -> None:
    config = WaveformConfig(name="waveform", channels=24, grad_scale=1.0, **changes)
    ours, plain = both(monkeypatch, config, lengths, offset)
    assert not all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True)), "one path was compared with itself"
    for a, b in zip(ours, plain, strict=True):
        assert ((a - b).norm() / b.norm()).item() < (1e-5 if offset == 0 else 1e-3)


def test_products_in_bf16_are_as_near_to_fp32_as_the_plain_layers(monkeypatch) -> None:
    config = WaveformConfig(name="waveform", channels=32, grad_scale=1.0)
    exact = both(monkeypatch, config, [6000, 4100])[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = both(monkeypatch, config, [6000, 4100])
    assert ours[0].dtype is plain[0].dtype is torch.bfloat16
    for own, other, true in zip(ours, plain, exact, strict=True):
        assert own.dtype is other.dtype
        error, allowed = ((some.float() - true).norm() / true.norm() for some in (own, other))
        assert 0 < error < max(1.3 * allowed, 0.01)


def test_a_slice_of_a_larger_tensor_is_read_where_it_lies() -> None:
    whole = torch.randn(3, 20, 4)
    weight = torch.randn(5, 4, 3, requires_grad=True)
    assert torch.equal(
        gelu_convolution(whole[1:, 3:], weight, stride=2), gelu_convolution(whole[1:, 3:].clone(), weight, stride=2)
    )


def test_they_are_for_training_on_a_cpu() -> None:
    x, weights = torch.zeros(1, 4000), [torch.zeros(2, 1, 3, requires_grad=True)]
    assert pays(x, weights)
    with torch.no_grad():
        assert not pays(x, weights)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not pays(x, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pays(x, weights)
    assert not pays(x.bfloat16(), weights)
    assert not pays(x.clone().requires_grad_(), weights)
    assert not pays(x[:, :80], weights), "short audio is slower by products"
    assert not pays(x, [*weights, torch.zeros(1)])  # one is frozen
    weights[0].ds_id = 0  # type: ignore[attr-defined]
    assert not pays(x, weights), "a parameter that ZeRO 3 divides is empty outside its module"
