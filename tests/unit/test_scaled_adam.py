"""ScaledAdam against its formulas, one number at a time in plain Python; its state; what it trains."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from harken.optim.groups import parameter_groups, set_rates
from harken.optim.optimizers import scaled_adam
from harken.optim.optimizers.scaled_adam import ScaledAdam, ScaledAdamConfig

SHAPES = {"matrix": (3, 4), "kernel": (2, 3, 2), "vector": (5,), "scalar": (1,), "axisless": (), "zeros": (6,)}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(0.5 * torch.randn(shape, generator=generator)))
        with torch.no_grad():
            self.zeros.zero_()
            self.kernel.abs_().mul_(3.0 / self.kernel.square().mean().sqrt())  # as large as it may become


def made(**changes: Any) -> tuple[Model, ScaledAdam, list[str]]:
    model = Model()
    groups = parameter_groups(model, lambda name, step: 0.5 if name == "vector" else 1.0)
    optimizer = ScaledAdam(ScaledAdamConfig(name="scaled_adam", **changes), groups)
    return model, optimizer, [str(group["names"][0]) for group in groups]


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Gradients of changing sizes, some far above the rest."""
    generator = torch.Generator().manual_seed(100 + step)
    size = 0.1 * (20.0 if step % 7 == 5 else 1.0)
    found = {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found["kernel"] -= 0.1  # its weights are positive, so it grows
    found["scalar"] -= 0.3
    return found


def rate_of(step: int) -> float:
    return 0.045 * (1 + step) ** -0.25


def take(model: Model, optimizer: ScaledAdam, names: list[str], step: int) -> None:
    set_rates(optimizer, names, rate_of(step), lambda name, _: 0.5 if name == "vector" else 1.0, step)
    for name, grad in gradients(step).items():
        getattr(model, name).grad = grad
    optimizer.step()


class Reference:
    """The formulas for lists of numbers. Source: arXiv 2310.11230 section 3.5, icefall `zipformer/optim.py`."""

    def __init__(self, model: Model, *, period: int, clipping_scale: float | None, clipping_period: int) -> None:
        self.p = {name: p.detach().double().flatten().tolist() for name, p in model.named_parameters()}
        self.d = {name: [0.0] * len(p) for name, p in self.p.items()}
        self.v = {name: [0.0] * len(p) for name, p in self.p.items()}
        self.r = {name: self.rms(p) for name, p in self.p.items()}
        self.w = dict.fromkeys(self.p, 0.0)
        self.s: dict[str, list[float]] = {name: [] for name in self.p}
        self.period, self.scale, self.clipping_period = period, clipping_scale, clipping_period
        self.norms: list[float] = []
        self.threshold = math.inf
        self.clipped = 0

    @staticmethod
    def rms(values: list[float]) -> float:
        return math.sqrt(sum(value * value for value in values) / len(values))

    def clip(self, g: dict[str, list[float]], step: int) -> float:
        if self.scale is None or step == 0:
            return 1.0
        total = sum(
            x * x * (0.1 if len(values) == 1 else self.r[name]) ** 2 for name, values in g.items() for x in values
        )
        self.norms.append(math.sqrt(total))
        early = step in {10, 20, 40} and step < self.clipping_period
        if early or step % self.clipping_period == 0:
            past = sorted(self.norms if early else self.norms[-self.clipping_period :])
            self.threshold = self.scale * past[len(past) // 4 * 2] * (2 if early else 1)
        factor = min(1.0, self.threshold / self.norms[-1])
        self.clipped += factor < 1
        return factor

    def take(self, step: int) -> None:
        g = {name: grad.double().flatten().tolist() for name, grad in gradients(step).items()}
        factor = self.clip(g, step)
        for name, p in self.p.items():
            grads = [factor * x for x in g[name]]
            rate = rate_of(step) * (0.5 if name == "vector" else 1.0)
            change = self.change(name, p, grads, rate, step)
            self.d[name] = [0.9 * d + 0.1 * u for d, u in zip(self.d[name], change, strict=True)]
            self.p[name] = [x + d for x, d in zip(p, self.d[name], strict=True)]
            if len(p) == 1:
                self.p[name] = [max(-10.0, min(10.0, x)) for x in self.p[name]]

    def change(self, name: str, p: list[float], grads: list[float], rate: float, step: int) -> list[float]:
        self.v[name] = [0.98 * v + 0.02 * x * x for v, x in zip(self.v[name], grads, strict=True)]
        corrected = 1 - 0.98 ** (step + 1)
        corrected = corrected if corrected < 0.99 else 1.0
        adam = [-rate * x / (math.sqrt(v / corrected) + 1e-8) for x, v in zip(grads, self.v[name], strict=True)]
        if len(p) == 1:
            return [0.1 * u for u in adam]
        self.s[name].append(sum(x * y for x, y in zip(p, grads, strict=True)))
        growth = 0.0
        if step % self.period == self.period - 1:
            self.r[name] = self.rms(p)
            if step:
                growth = self.growth(name, rate, step)
            self.s[name] = []
        return [max(self.r[name], 1e-5) * u + growth * x for u, x in zip(adam, p, strict=True)]

    def growth(self, name: str, rate: float, step: int) -> float:
        decay, s, r = 0.98**self.period, self.s[name], self.r[name]
        self.w[name] = decay * self.w[name] + (1 - decay) * sum(x * x for x in s) / self.period
        if r < 1e-5:
            return 0.0
        corrected = 1 - decay ** ((step + 1) // self.period)
        growth = -0.1 * rate * math.sqrt(corrected) * sum(s) / (math.sqrt(self.w[name]) + 1e-8)
        return min(max(-0.1, min(0.1, growth)), (3.0 - r) / r)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("period", "clipping_scale", "clipping_period", "steps"),
    [(4, 2.0, 100, 260), (1, 1.5, 15, 60), (3, None, 100, 30), (4, 2.0, 100, 1)],
)
def test_steps_are_those_of_the_formulas(monkeypatch, fused, period, clipping_scale, clipping_period, steps) -> None:
    if not fused:
        monkeypatch.setattr(scaled_adam, "_fits_fused", lambda *_: False)
    settings = {"size_update_period": period, "clipping_scale": clipping_scale}
    model, optimizer, names = made(**settings, clipping_update_period=clipping_period)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    reference = Reference(model, period=period, clipping_scale=clipping_scale, clipping_period=clipping_period)
    for step in range(steps):
        take(model, optimizer, names, step)
        reference.take(step)
        for name, parameter in model.named_parameters():
            expected = torch.tensor(reference.p[name]).reshape(parameter.shape)
            assert torch.allclose(parameter, expected, rtol=2e-4, atol=2e-6), (step, name)
            assert not torch.equal(parameter, start[name]), (step, name)
    if steps > 11 and clipping_scale is not None:
        assert 0 < reference.clipped < steps, "some steps are clipped and some are not"


def test_all_tensors_at_once_take_the_steps_of_one_after_the_other(monkeypatch) -> None:
    """On a GPU all tensors are updated together."""
    (one, optimizer, names), (other, together, _) = made(), made()
    held: list[Any] = []

    def collected(part, step, count) -> None:
        held.append(part)
        if len(held) == len(SHAPES):
            together._advance([part for part in held if not part.scalar], step)
            together._advance([part for part in held if part.scalar], step)
            held.clear()

    monkeypatch.setattr(together, "_advance_one", collected)
    for step in range(30):
        take(one, optimizer, names, step)
        take(other, together, names, step)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradient", [-1.0, 1.0])
def test_a_scalar_stays_in_its_limits(gradient: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(()))
    config = ScaledAdamConfig(name="scaled_adam", scalar_max=0.6)
    optimizer = ScaledAdam(config, [{"params": [parameter], "names": ["scalar"], "decay": False}])
    optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(120):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    assert parameter.item() == pytest.approx(-0.6 * gradient)


@pytest.mark.parametrize("stop", [1, 2, 7, 10, 11, 40, 101])
def test_a_restart_changes_no_bit_at_any_step(stop: int) -> None:
    model, optimizer, names = made()
    for step in range(stop):
        take(model, optimizer, names, step)
    again, restored, _ = made()
    again.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    restored.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for step in range(stop, stop + 12):
        take(model, optimizer, names, step)
        take(again, restored, names, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert pickle.dumps(optimizer.state_dict()["state"][0]["step"]) == pickle.dumps(stop + 12)


def test_state_is_by_parameter_shaped_as_it_or_a_number() -> None:
    model, optimizer, names = made()
    for step in range(12):
        take(model, optimizer, names, step)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.shape == parameter.shape, key
            else:
                assert isinstance(value, int | float), key
    assert sum(isinstance(value, torch.Tensor) for state in optimizer.state.values() for value in state.values()) == 12


def test_a_rate_of_zero_moves_nothing() -> None:
    model, optimizer, names = made()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(5):
        for name, grad in gradients(step).items():
            getattr(model, name).grad = grad
        set_rates(optimizer, names, 0.0, lambda *_: 1.0, step)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_gradient_of_another_layout_is_the_same_gradient() -> None:
    (plain, first, names), (other, second, _) = made(), made()
    for step in range(3):
        take(plain, first, names, step)
        set_rates(second, names, rate_of(step), lambda name, _: 0.5 if name == "vector" else 1.0, step)
        for name, grad in gradients(step).items():
            getattr(other, name).grad = grad.T.contiguous().T if name == "matrix" else grad
        second.step()
    assert torch.equal(plain.matrix, other.matrix)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused(train, stage: int) -> None:
    status, _, error = train("ctc", "optimizer.name=scaled_adam", f"engine.zero_stage={stage}")
    assert status == 2
    assert error == (
        "harken train: `engine.zero_stage` must be 0 with `optimizer.name: scaled_adam`, which needs each parameter "
        f"whole, got {stage}: ZeRO gives a rank slices of many parameters strung together; use stage 0, or "
        "`optimizer.name: adamw`\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["hubert", "ctc"])
def test_with_eden_it_lowers_the_loss(train, tmp_path: Path, objective: str) -> None:
    settings = ("optimizer.name=scaled_adam", "schedule.name=eden", "schedule.lr_hours=1", "schedule.warmup_steps=10")
    settings += ("batch.seconds_per_step=12", "log.every_steps=10")
    status, _, error = train(objective, *settings, steps=60)
    assert status == 0, error
    losses = [json.loads(line)["loss"] for line in (tmp_path / "exp/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0], losses
