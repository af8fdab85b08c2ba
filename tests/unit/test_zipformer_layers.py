"""Layers of the Zipformer against what defines them: k2's values, plain autograd, loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from harken.core import draws
from harken.nn import limits
from harken.nn.bias_norm import BiasNorm
from harken.nn.limits import Balancer, Whitener, limit_parameter, mean_of_positive_share
from harken.nn.relative_attention import _Excess, _Softmax, by_key, relative_positions
from harken.nn.scheduled import Clock, Scheduled
from harken.nn.swoosh import SWOOSH_L, SWOOSH_R, SwooshLinear

GOLDEN = Path(__file__).resolve().parents[1] / "golden/icefall/swoosh.npz"


@pytest.fixture
def always(monkeypatch) -> None:
    """Make what acts in a share of the passes act in each."""
    monkeypatch.setattr(limits, "happens", lambda probability: True)


def test_swoosh_is_k2_s() -> None:
    with np.load(GOLDEN) as arrays:
        x, left, right = (torch.from_numpy(arrays[name]) for name in ("swoosh_x", "swoosh_l", "swoosh_r"))
    assert torch.allclose(SWOOSH_L(x), left, atol=1e-6)
    assert torch.allclose(SWOOSH_R(x), right, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_linear_map_behind_a_swoosh_has_the_gradients_of_both(masked: bool) -> None:
    torch.manual_seed(1)
    layer = SwooshLinear(5, 3, SWOOSH_L, 1.0).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 1, 5) > 0.3).double() / 0.7 if masked else None
    expected = functional.linear(SWOOSH_L(x) * (1 if mask is None else mask), layer.weight, layer.bias)
    assert torch.allclose(layer(x, mask), expected)
    parameters = (x, layer.weight, layer.bias)
    weights = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((y * weights).sum(), parameters) for y in (layer(x, mask), expected))
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_linear_map_behind_a_swoosh_keeps_its_input_alone() -> None:
    layer = SwooshLinear(64, 8, SWOOSH_R, 1.0)
    x = torch.randn(4, 100, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x * 1.0)
    assert sum(t.numel() for t in kept if t is not layer.weight) == x.numel()


def test_bias_norm() -> None:
    torch.manual_seed(1)
    norm = BiasNorm(6, limit=False).double()
    with torch.no_grad():
        norm.bias.normal_()
        norm.log_scale.fill_(0.3)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    expected = x / (x - norm.bias).square().mean(-1, keepdim=True).sqrt() * norm.log_scale.exp()
    parameters = (x, norm.bias, norm.log_scale)
    weights = torch.randn_like(expected)
    assert torch.allclose(norm(x), expected, rtol=1e-5)
    found, wanted = (torch.autograd.grad((y * weights).sum(), parameters) for y in (norm(x), expected))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_a_balancer_adds_the_gradient_of_its_definition(channel_dim: int) -> None:
    torch.manual_seed(1)
    x = (
        torch.randn(6, 5, 9) * torch.tensor([0.05, 1.0, 1.0, 30.0, 1.0])[:, None]
        + torch.tensor([0, 0, 2, 0, -1.5])[:, None]
    )
    x = x if channel_dim == 1 else x.transpose(1, 2)
    grad = torch.randn_like(x)
    balancer = Balancer(Clock(), min_positive=0.4, max_positive=0.6, min_abs=0.2, max_abs=4.0, channel_dim=channel_dim)
    own = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((balancer(own) * grad).sum(), own)

    value = x.clone().requires_grad_()
    others = [dim for dim in range(3) if dim != channel_dim % 3]
    mean, square = value.mean(others, keepdim=True), value.square().mean(others, keepdim=True)
    ratio, rms = mean / (square - mean.square()).sqrt(), square.sqrt()
    low, high = float(mean_of_positive_share(0.4)), float(mean_of_positive_share(0.6))
    factor = (np.pi / 2) ** 0.5
    loss = (ratio - ratio.clamp(low, high)).abs() + (rms.clamp(0.2 * factor, 4.0 * factor) / rms).log().abs()
    (pull,) = torch.autograd.grad(loss.sum(), value)
    size = pull.square().mean(others, keepdim=True).sqrt().clamp(min=1e-20)
    assert torch.allclose(found, grad + grad.abs() * pull * 0.04 / size, rtol=1e-3, atol=1e-5)
    changed = (found != grad).sum(others) > 0
    assert changed.tolist() == [True, False, True, True, True], "the second channel is within all bounds"


@pytest.mark.usefixtures("always")
def test_channels_that_are_constant_spoil_no_gradient() -> None:
    """Channels are masked in training: in a batch of few utterances one is then zero everywhere."""
    x = torch.randn(2, 5, 4) * torch.tensor([1.0, 0.0, 0.0, 1e-6]) + torch.tensor([0.0, 0.0, 3.0, 1e3])
    for module in (Balancer(Clock()), Whitener(1.0)):
        own = x.clone().requires_grad_()
        (found,) = torch.autograd.grad((module(own) * torch.randn_like(x)).sum(), own)
        assert torch.isfinite(found).all()
    norm = BiasNorm(4, limit=True)
    (found,) = torch.autograd.grad(norm(own * 0).sum(), own)
    assert torch.isfinite(found).all()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("groups", [1, 2])
def test_a_whitener_adds_the_gradient_of_its_metric(groups: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 20, 8) + 4 * torch.randn(3, 20, 1) * torch.randn(8)
    grad = torch.randn_like(x)

    def metric(value: Tensor) -> Tensor:
        flat = value.reshape(-1, groups, 8 // groups).transpose(0, 1)
        flat = flat - flat.mean(1, keepdim=True)
        covariance = flat.transpose(1, 2) @ flat
        trace = covariance.diagonal(dim1=1, dim2=2).mean()
        return covariance.square().sum() / 8 / trace.square()

    value = x.clone().requires_grad_()
    (pull,) = torch.autograd.grad(metric(value), value)
    expected = grad + pull * 0.02 * grad.norm() / pull.norm()
    for limit, wanted in ((1.5, expected), (100.0, grad)):
        own = x.clone().requires_grad_()
        (found,) = torch.autograd.grad((Whitener(limit, strength=0.02, groups=groups)(own) * grad).sum(), own)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("always")
def test_a_limit_turns_gradients_that_lead_out() -> None:
    x = torch.tensor([0.1, 0.1, 0.5, 2.0, 2.0], requires_grad=True)
    weights = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])  # a positive gradient makes a parameter smaller
    (found,) = torch.autograd.grad((limit_parameter(x, 0.2, 1.0) * weights).sum(), x)
    assert found.tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0]


def test_gradient_limits_rest_in_evaluation() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    for module in (Balancer(Clock()), Whitener(1.5)):
        assert module.eval()(x) is x


def test_a_schedule_follows_the_step_of_the_loop() -> None:
    value = Scheduled(Clock(start=10.0, scale=2.0), (20.0, 0.5), (40.0, 0.1), (60.0, 0.0))
    for step, expected in ((0, 0.5), (5, 0.5), (10, 0.3), (15, 0.1), (20, 0.05), (100, 0.0)):
        draws.begin_micro_batch(1, step, 0)
        assert value() == pytest.approx(expected)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 8), (1, 4), (1, 1), (2, 2)])
def test_scores_by_offset_become_scores_by_key(queries: int, keys: int) -> None:
    scores = torch.randn(2, 3, queries, queries + keys - 1)
    found = by_key(scores, keys)
    for query in range(queries):
        for key in range(keys):
            assert torch.equal(found[..., query, key], scores[..., query, queries - 1 - query + key])


def test_positions_are_those_of_icefall_s_formula() -> None:
    table = relative_positions(4, 3, 6, torch.device("cpu"))
    assert table.shape == (10, 6)
    for row, offset in enumerate(range(-6, 4)):
        root = 6**0.5
        angle = np.arctan(root * np.sign(offset) * (np.log(abs(offset) + root) - np.log(root)) / (6 / (2 * np.pi)))
        wanted = [np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle), np.cos(3 * angle), 1.0]
        assert table[row].tolist() == pytest.approx(wanted, abs=1e-5)


def test_softmax_and_excess_have_their_gradients() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (_Softmax.apply(x), torch.softmax(x, -1)))
    assert torch.allclose(found, wanted, atol=1e-6)
    assert float(_Excess.apply(x.detach() * 30, 25.0)) == pytest.approx(
        float(functional.relu((x.detach() * 30).abs() - 25).sum())
    )
    (found,) = torch.autograd.grad(_Excess.apply(x * 30, 25.0), x)
    (wanted,) = torch.autograd.grad(functional.relu((x * 30).abs() - 25).sum(), x)
    assert torch.allclose(found, wanted)
