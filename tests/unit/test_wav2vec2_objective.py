"""wav2vec 2.0 against the formulas of its paper, written out here frame by frame."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from harken.core.draws import Draws, begin_micro_batch
from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.objectives.saved import build_objective, build_prepare
from harken.units.product_quantizer import ProductQuantizer, Temperature, perplexity

SIZE = 2 * 6  # groups times entries of the tiny configuration


def make(corpus, *overrides: str):
    config = corpus.config("wav2vec2", "filterbank", "encoder.layer_drop=0", *overrides)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    return model, build_prepare(config, model.backbone.spec, train=True)


def drawn(prepare, batch, epoch: int = 0):
    return prepare(batch, [Draws(1, epoch)] * len(batch.ids))


def by_hand(model, batch) -> dict[str, float]:
    """Equations 2 to 4 of arXiv 2006.11477, one masked frame and one negative at a time."""
    backbone, own = model.backbone, model.config
    mask = batch.targets["mask"]
    seen = batch.targets.get("view", batch.inputs)
    frames, x, lengths = backbone.embed(seen, batch.lengths, {"mask": mask})
    context = backbone.encoder.encode(x, lengths).last
    compared, _ = backbone.frontend(batch.targets.get("target_view", batch.inputs), batch.lengths)
    latents = functional.layer_norm(
        compared,
        frames.shape[-1:],
        backbone.encoder.input_norm.weight,
        backbone.encoder.input_norm.bias,
    )
    contrast = diversity = penalty = hits = 0.0
    every: list[torch.Tensor] = []
    for row in range(len(mask)):
        places = mask[row].nonzero()[:, 0].tolist()
        codes, targets, soft = [], [], []
        for place in places:
            logits = model.quantizer.logits(latents[row, place]).view(own.groups, own.entries)
            codes.append(tuple(logits.argmax(-1).tolist()))
            parts = [model.quantizer.codebook[group, code] for group, code in enumerate(codes[-1])]
            targets.append(model.project_target(torch.cat(parts)))
            soft.append(logits.softmax(-1))
        for index, place in enumerate(places):
            c = model.project(context[row, place])
            others = batch.targets["negatives"][row, index].tolist()
            assert index not in others
            kept = [index] + [other for other in others if codes[other] != codes[index]]
            scores = torch.stack([functional.cosine_similarity(c, targets[one], dim=0) for one in kept])
            scores = scores / own.temperature
            contrast += float(scores.exp().sum().log() - scores[0])
            hits += float(all(scores[0] > score for score in scores[1:]))
        mean = torch.stack(soft).mean(0)
        spread = float((-(mean * mean.log()).sum(-1)).exp().sum())
        diversity += (SIZE - spread) / SIZE * len(places)
        penalty += float(frames[row, : lengths[row]].square().mean()) * len(places)
        every += soft
    mean = torch.stack(every).mean(0)
    whole = float((-(mean * mean.log()).sum(-1)).exp().sum())
    return {
        "loss": contrast,
        "diversity": diversity,
        "features_penalty": penalty,
        "accuracy": hits,
        "prob_perplexity": whole * len(every),
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("over", "views", "projection"),
    [
        ("utterance", "none", "linear"),
        ("batch", "none", "linear"),
        ("utterance", "context", "linear"),
        ("utterance", "both", "mlp"),
    ],
)
def test_the_loss_is_the_papers(corpus, batch, over: str, views: str, projection: str) -> None:
    switches = [f"objective.views={views}", f"objective.projection={projection}"]
    model, prepare = make(corpus, f"objective.diversity_over={over}", *switches)
    batch = drawn(prepare, batch)
    loss, expected = model(batch), by_hand(model, batch)
    if over == "batch":
        whole = expected["prob_perplexity"] / batch.num_targets
        utterances = expected["diversity"]
        expected["diversity"] = (SIZE - whole) / SIZE * batch.num_targets
        assert expected["diversity"] < 0.99 * utterances, "else the two could not be told apart"
    for name, value in expected.items():
        found, count = loss.metrics[name]
        assert float(found) == pytest.approx(value, rel=1e-4), name
        assert float(count) == batch.num_targets
    total = expected["loss"] + 0.1 * expected["diversity"] + 10.0 * expected["features_penalty"]
    assert float(loss.total) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_a_negative_with_the_codes_of_the_target_is_none(corpus, batch) -> None:
    """With one entry all frames have the same codes: nothing is left to tell the target from."""
    model, prepare = make(corpus, "objective.entries=1")
    loss = model(drawn(prepare, batch))
    assert float(loss.metrics["loss"][0]) == pytest.approx(0.0, abs=1e-4)
    assert torch.isfinite(loss.total)
    model, prepare = make(corpus)
    assert float(model(drawn(prepare, batch)).metrics["loss"][0]) > 10.0


def test_negatives_are_other_masked_frames_of_the_row(corpus, batch) -> None:
    _, prepare = make(corpus, "objective.negatives=2000")
    targets = drawn(prepare, batch).targets
    for row, count in enumerate(targets["counts"].tolist()):
        assert count == int(targets["mask"][row].sum())
        assert targets["masked"][row, :count].tolist() == targets["mask"][row].nonzero()[:, 0].tolist()
        for index in range(count):
            assert set(targets["negatives"][row, index].tolist()) == set(range(count)) - {index}
    alone = drawn(prepare, collate([Row(batch.ids[1], "", batch.inputs[1, : batch.lengths[1]].numpy(), 0)]))
    count = int(alone.targets["counts"][0])
    assert torch.equal(alone.targets["negatives"][0], targets["negatives"][1, :count]), "its batch does not matter"
    other = drawn(prepare, batch, 1).targets["negatives"]
    assert other.shape != targets["negatives"].shape or not torch.equal(other, targets["negatives"])


@torch.no_grad()
def test_rows_without_two_masked_frames_have_no_targets(corpus) -> None:
    model, prepare = make(corpus)
    field, stride = model.backbone.spec.receptive_field, model.backbone.spec.stride
    rows = [Row(f"short{count}", "", np.ones(field + count * stride, np.float32), 0) for count in (0, 1)]
    short = drawn(prepare, collate(rows))
    assert short.num_targets == 0.0
    assert not short.targets["mask"].any()
    loss = model(short)
    assert float(loss.total) == 0.0
    assert all(torch.isfinite(value) for value, _ in loss.metrics.values())


def test_views_are_of_training_and_leave_masks_and_negatives_as_they_were(corpus, batch) -> None:
    config = corpus.config("wav2vec2", "filterbank", "objective.views=both", "objective.view_noise=1")
    spec = build_objective(config).backbone.spec
    plain = drawn(make(corpus)[1], batch).targets
    viewed = drawn(build_prepare(config, spec, train=True), batch).targets
    assert set(viewed) - set(plain) == {"view", "target_view"}
    assert all(torch.equal(value, viewed[name]) for name, value in plain.items())
    for row, length in enumerate(batch.lengths.tolist()):
        three = [batch.inputs[row, :length], viewed["view"][row, :length], viewed["target_view"][row, :length]]
        pairs = itertools.combinations(three, 2)
        assert not any(torch.allclose(one, other, atol=1e-3) for one, other in pairs)
        assert not viewed["view"][row, length:].any()
    assert "view" not in drawn(build_prepare(config, spec, train=False), batch).targets


def quantizer() -> ProductQuantizer:
    temperature = Temperature(start=2.0, end=0.5, decay=0.9)
    torch.manual_seed(1)
    return ProductQuantizer(5, groups=2, entries=3, dim=8, temperature=temperature)


def test_the_gumbel_softmax_is_straight_through() -> None:
    """Forward the drawn entry, backward the softmax of arXiv 2006.11477 equation 1."""
    part, frames = quantizer().train(), torch.randn(2, 4, 5)
    begin_micro_batch(1, 3, 0)
    found = part(frames)
    begin_micro_batch(1, 3, 0)
    noise = -torch.empty(2, 4, 2, 3).exponential_().log()
    logits = part.logits(frames).view(2, 4, 2, 3)
    soft = ((logits + noise) / (2.0 * 0.9**3)).softmax(-1)
    assert torch.equal(found.codes, (logits + noise).argmax(-1))
    assert not torch.equal(found.codes, found.best)
    assert torch.equal(found.best, logits.argmax(-1))
    entries = [[part.codebook[group, code] for group, code in enumerate(codes)] for codes in found.codes.flatten(0, 1)]
    expected = torch.stack([torch.cat(parts) for parts in entries]).view(2, 4, 8)
    assert torch.allclose(found.vectors, expected, atol=1e-6)
    weight = torch.randn_like(expected)
    mixed = torch.cat([soft[:, :, group] @ part.codebook[group].detach() for group in range(2)], -1)
    (straight,) = torch.autograd.grad((found.vectors * weight).sum(), part.logits.weight, retain_graph=True)
    (through,) = torch.autograd.grad((mixed * weight).sum(), part.logits.weight)
    assert torch.allclose(straight, through, atol=1e-5)
    assert straight.abs().max() > 1e-3


def test_the_temperature_is_a_function_of_the_step() -> None:
    temperature = Temperature(start=2.0, end=0.5, decay=0.999995)
    for step, expected in ((0, 2.0), (1, 1.99999), (100_000, 2.0 * 0.999995**100_000), (400_000, 0.5)):
        begin_micro_batch(0, step, 0)
        assert temperature.now() == pytest.approx(expected, rel=1e-9)


def test_perplexities_reach_from_one_entry_to_all() -> None:
    even, single = torch.full((2, 4), 0.25), torch.eye(4)[:2]
    assert float(perplexity(even)) == pytest.approx(8.0, rel=1e-5)
    assert float(perplexity(single)) == pytest.approx(2.0, rel=1e-5)


def test_groups_must_divide_the_width(corpus) -> None:
    with pytest.raises(
        HarkenError, match=r"`objective.code_dim` must be divisible by `objective.groups`, got 16 and 3"
    ):
        corpus.config("wav2vec2", "filterbank", "objective.groups=3")
