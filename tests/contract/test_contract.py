"""What every objective promises, with every frontend and encoder of the registry that it goes with."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_parts import Variant, agree, drawn, encoder_for, label_of, make_config, variants

from harken.config.load import load, to_yaml
from harken.config.registry import available
from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.draws import Draws, begin_micro_batch
from harken.data.dataset import collate
from harken.objectives.base import Objective
from harken.objectives.saved import build_objective, build_prepare

NOTHING_DRAWN = {"beats_tokenizer"}
"""Objectives that see the audio as it is."""
EVERYTHING = {"hubert", "ctc"}
"""Objectives that are tested with every frontend under every encoder: one of masks, one of transcripts."""


def is_tested(objective: str, frontend: Variant, encoder: Variant) -> bool:
    """Whether the three are tested together: every objective with every frontend, and with every encoder."""
    if not agree(objective, encoder[0]):
        return False
    return objective in EVERYTHING or frontend == ("filterbank", {}) or encoder == (encoder_for(objective), {})


COMBINATIONS = [
    *(
        ((objective, {}), frontend, encoder)
        for objective, frontend, encoder in itertools.product(
            available("objective"), variants("frontend"), variants("encoder")
        )
        if is_tested(objective, frontend, encoder)
    ),
    *(
        (objective, ("filterbank", {}), (encoder_for(objective[0]), {}))
        for objective in variants("objective")
        if objective[1]
    ),
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda parts: "-".join(map(label_of, parts)))
def combination(request, corpus) -> tuple[RunConfig, Objective, Any]:
    """A configuration, its objective with fresh weights, and its Prepare."""
    config = make_config(corpus, *request.param)
    torch.manual_seed(3)
    model = build_objective(config)
    return config, model, build_prepare(config, model.backbone.spec, train=True)


def total(model: Objective, batch: Batch) -> float:
    with torch.no_grad():
        return float(model(batch).total)


def pad(batch: Batch, samples: int) -> Batch:
    return replace(batch, inputs=torch.nn.functional.pad(batch.inputs, (0, samples)))


def test_the_loss_is_finite_and_every_trainable_parameter_gets_a_gradient(combination, rows) -> None:
    _, model, prepare = combination
    model.train()
    model.zero_grad()
    batch = drawn(prepare, collate(rows))
    assert batch.num_targets > 0
    loss = model(batch)
    assert loss.total.shape == ()
    assert torch.isfinite(loss.total)
    assert "loss" in loss.metrics
    for name, (value, weight) in loss.metrics.items():
        assert value.shape == weight.shape == (), name
        assert not value.requires_grad, name
        assert torch.isfinite(value), name
    (loss.total / batch.num_targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, f"{name}: freezing is the business of `rate_scale`"
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if any(model.rate_scale(name, step) for step in (0, 10**9)):
            assert parameter.grad.any(), f"{name} has a gradient of zeros"


def test_gradients_come_in_one_order_whatever_the_batch(combination, rows) -> None:
    """ZeRO 2 adds up ranks' gradients in the order in which they come; ranks have different batches."""
    _, model, prepare = combination
    model.train()
    arrived: list[str] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
        for name, parameter in model.named_parameters()
    ]
    orders = {}
    for kind, batch in {
        "ragged": collate(rows),
        "one row": collate(rows[:1]),
        "equal rows": collate([rows[0], rows[0]]),
        "padded row": pad(collate(rows[1:2]), 8000),
    }.items():
        arrived.clear()
        begin_micro_batch(1, 0, 0)
        model.zero_grad()
        model(drawn(prepare, batch)).total.backward()
        orders[kind] = list(arrived)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    for kind, order in orders.items():
        assert order == orders["ragged"], (
            f"{kind}: {[a for a, b in zip(order, orders['ragged'], strict=True) if a != b]}"
        )


def test_nothing_in_a_pass_waits_for_the_device(combination, rows, waits) -> None:
    _, model, prepare = combination
    model.train()
    model.zero_grad()
    begin_micro_batch(1, 0, 0)
    batch = drawn(prepare, collate(rows))
    targets = {name: value.clone() for name, value in batch.targets.items()}
    batch = replace(batch, inputs=batch.inputs.clone(), targets=targets)
    waits.begin([*model.parameters(), *model.buffers(), batch.inputs, *targets.values()])
    with waits:
        model(batch).total.backward()
    model.zero_grad()
    assert not waits.found


def test_padding_does_not_change_an_utterances_loss(combination, rows) -> None:
    _, model, prepare = combination
    model.eval()
    for row in rows[:3]:
        alone = drawn(prepare, collate([row]))
        padded = drawn(prepare, pad(collate([row]), 16000))
        assert padded.num_targets == alone.num_targets
        assert total(model, padded) == pytest.approx(total(model, alone), rel=1e-4), row.cut


def test_a_batch_is_the_sum_of_its_utterances(combination, rows) -> None:
    _, model, prepare = combination
    model.eval()
    whole = drawn(prepare, collate(rows))
    for size in (1, 3):
        parts = [drawn(prepare, collate(rows[start : start + size])) for start in range(0, len(rows), size)]
        assert sum(part.num_targets for part in parts) == whole.num_targets
        summed = sum(total(model, part) for part in parts)
        assert (summed == pytest.approx(total(model, whole), rel=1e-4)) is not model.compares_utterances


def test_prepare_is_pure_and_can_be_pickled(combination, rows) -> None:
    config, _, prepare = combination
    batch = collate(rows)
    before = (batch.inputs.clone(), batch.lengths.clone(), dict(batch.targets))
    first, second = drawn(prepare, batch), drawn(pickle.loads(pickle.dumps(prepare)), batch, Draws(5, 2))
    assert len(pickle.dumps(prepare)) < 100_000, "it travels to every worker"
    assert torch.equal(batch.inputs, before[0])
    assert torch.equal(batch.lengths, before[1])
    assert batch.targets == before[2]
    assert first.targets.keys() == second.targets.keys()
    assert all(torch.equal(value, second.targets[name]) for name, value in first.targets.items())
    assert first.num_targets == second.num_targets
    other = drawn(prepare, batch, Draws(5, 3))
    assert config.objective.name in NOTHING_DRAWN or any(
        value.shape != other.targets[name].shape or not torch.equal(value, other.targets[name])
        for name, value in first.targets.items()
    ), "another epoch draws other masks"


def test_validation_draws_the_same_at_every_pass(combination, rows) -> None:
    config, model, _ = combination
    prepare = build_prepare(config, model.backbone.spec, train=False)
    first, second = (drawn(prepare, collate(rows), Draws(0, 0)) for _ in range(2))
    assert all(torch.equal(value, second.targets[name]) for name, value in first.targets.items())


def test_rate_scale_knows_every_parameter(combination) -> None:
    _, model, _ = combination
    for name, _ in model.named_parameters():
        assert 0 <= model.rate_scale(name, 0) < math.inf, name


def test_the_configuration_survives_the_round_trip(combination, tmp_path) -> None:
    config, _, _ = combination
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load([tmp_path / "run.yaml"]).config == config
