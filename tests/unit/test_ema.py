"""The EMA scaling rule: with another batch the averages follow the same way over the audio (arXiv 2307.13813)."""

from __future__ import annotations

import pytest
import torch

from harken.core.draws import Draws
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.objectives.data2vec import Data2vecConfig
from harken.objectives.saved import build_objective, build_prepare
from harken.optim.ema import WeightAverage


@pytest.mark.parametrize("times", [0.5, 2, 8])
def test_a_decay_becomes_its_power_definition_1_2(times: float) -> None:
    """Towards weights that stand still: after as much audio, an average is as far away as with the reference's step."""
    model = torch.nn.Linear(1, 4, bias=False)
    average = WeightAverage(model, 0.9, times)
    average.updates = 10_000  # the decay is no longer lowered
    start = average.average["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(4):
        average.update(model)
    left = 0.9 ** (4 * times)
    assert torch.allclose(average.average["weight"], left * start + (1 - left) * model.weight, atol=1e-6)


@pytest.mark.parametrize("times", [0.5, 2, 8])
def test_the_rise_of_a_teachers_decay_follows_the_audio(times: float) -> None:
    config = Data2vecConfig(name="data2vec", ema_start=0.9, ema_end=0.98, ema_steps=64)
    for step in (0, 4, 8, 100):
        small = 0.98 - 0.08 * (1 - min(1.0, step * times / 64))
        assert config.decay(step, times) == pytest.approx(small**times)


def averages_on_a_quadratic(times: int, scaled: bool) -> torch.Tensor:
    """Descend on |w|^2 / 2 for 512 small steps' worth; return the average at each 64 of them."""
    model = torch.nn.Linear(1, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-2.0], [3.0], [0.5]]))
    average, seen = WeightAverage(model, 0.8, times if scaled else 1.0), []
    for step in range(1, 512 // times + 1):
        with torch.no_grad():
            model.weight.mul_(1 - 0.002 * times)  # the linear rule for the rate
        average.update(model)
        if step * times % 64 == 0:
            seen.append(average.average["weight"].clone())
    return torch.stack(seen)


@pytest.mark.parametrize("times", [2, 8])
def test_the_average_follows_as_for_small_batches_on_a_quadratic(times: int) -> None:
    small = averages_on_a_quadratic(1, scaled=True)
    off = (averages_on_a_quadratic(times, scaled=True) - small).norm() / small.norm()
    unscaled = (averages_on_a_quadratic(times, scaled=False) - small).norm() / small.norm()
    assert off < 0.05
    assert unscaled > 3 * off


def teacher_of(corpus, times: int, reference: str) -> torch.Tensor:
    """Train a tiny data2vec for 64 small steps' worth; return how far the blocks of its teacher went."""
    changes = ("encoder.layer_drop=0", "encoder.dropout=0", "objective.ema_start=0.9", "objective.ema_end=0.98")
    seconds = (f"batch.max_seconds={6 * times}", f"batch.seconds_per_step={6 * times}", reference)
    config = corpus.config("data2vec", "filterbank", *changes, *seconds, "objective.ema_steps=64")
    torch.manual_seed(3)
    model = build_objective(config).eval()
    manifest = Manifest(corpus.train)
    batch = collate([Row(manifest[place].id, "", read_cut(manifest[place], 16000), 0) for place in (0, 5, 9)])
    batch = build_prepare(config, model.backbone.spec, train=True)(batch, [Draws(1, 0)] * 3)
    learner = torch.optim.SGD(model.parameters(), lr=2e-4 * times)
    start = torch.cat([value.flatten() for _, value in model.teacher.encoder.named_buffers()])
    for step in range(1, 64 // times + 1):
        learner.zero_grad()
        (model(batch).total / batch.num_targets).backward()
        learner.step()
        model.after_step(step)
    own = dict(model.teacher.encoder.named_buffers())
    slow = torch.cat([value.flatten() for value in own.values()]) - start
    blocks = torch.cat([torch.full((value.numel(),), name.startswith("blocks.")) for name, value in own.items()])
    return slow[blocks]


def test_the_teacher_of_a_tiny_data2vec_follows_as_for_small_batches(corpus) -> None:
    small = teacher_of(corpus, 1, "objective.ema_reference_seconds=6")
    scaled = teacher_of(corpus, 4, "objective.ema_reference_seconds=6")
    plain = teacher_of(corpus, 4, "objective.ema_reference_seconds=null")
    off, unscaled = ((found - small).norm() / small.norm() for found in (scaled, plain))
    assert off < 0.1
    assert unscaled > 3 * off
