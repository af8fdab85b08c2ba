"""wav2vec, CPC and the encoders that look back only, against the papers' formulas written out here pair by pair."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from harken.apps.main import main
from harken.config.load import from_dict, load, to_yaml
from harken.config.registry import build, find
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.objectives.saved import build_objective, build_prepare

OBJECTIVES = ("wav2vec", "cpc")
ENCODERS: dict[str, dict[str, Any]] = {
    "causal_convolution": {"dim": 16, "kernels": [2, 3]},
    "recurrent": {"dim": 16},
}


def settings(corpus, objective: str, encoder: str = "recurrent", **changes: Any) -> dict[str, Any]:
    made = corpus.settings(objective, "filterbank")
    made["objective"].update(changes)
    made["encoder"] = {"name": encoder, **ENCODERS[encoder]}
    return made


def make(corpus, objective: str, **changes: Any):
    config = from_dict(settings(corpus, objective, **changes))
    torch.manual_seed(3)
    model = build_objective(config).eval()
    return model, build_prepare(config, model.backbone.spec, train=True)


def drawn(prepare, batch, epoch: int = 0):
    return prepare(batch, [Draws(1, epoch)] * len(batch.ids))


def scores(model, batch):
    """Yield each step ahead with the products of a prediction with its future and with each negative."""
    own, backbone = model.config, model.backbone
    with torch.no_grad():
        frames, lengths = backbone.frontend(batch.inputs, batch.lengths)
        context = backbone(batch.inputs, batch.lengths).last
    every = frames.flatten(0, 1) if own.negatives_over == "batch" else None
    for row, length in enumerate(lengths.tolist()):
        pool = frames[row] if every is None else every
        for step in range(own.first_step, own.first_step + own.steps):
            head = (model.heads if own.name == "wav2vec" else model.predictors)[step - own.first_step]
            predictions = head(context[row : row + 1, :length])[0]
            for place in range(length - step):
                prediction = predictions[place]
                negatives = batch.targets["negatives"][row, place + step].tolist()
                yield step, prediction @ frames[row, place + step], [prediction @ pool[one] for one in negatives]


@torch.no_grad()
@pytest.mark.parametrize("over", ["utterance", "batch"])
def test_the_loss_of_wav2vec_is_the_papers(corpus, batch, over: str) -> None:
    """Equation 1 of arXiv 1904.05862, lambda being half the number of negatives."""
    model, prepare = make(corpus, "wav2vec", negatives_over=over, first_step=2, negative_weight=0.5)
    batch = drawn(prepare, batch)
    total, pairs = 0.0, 0
    for _, truth, others in scores(model, batch):
        total -= math.log(torch.sigmoid(truth))
        total -= 2.5 * sum(math.log(torch.sigmoid(-one)) for one in others) / 5
        pairs += 1
    loss = model(batch)
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    assert batch.num_targets == pairs
    assert [float(part) for part in loss.metrics["loss"]] == pytest.approx([total, pairs], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("over", "changes"),
    [
        ("utterance", {"predictor": "linear", "mean_product": False}),
        ("batch", {"predictor": "linear"}),
        ("utterance", {"predictor": "transformer"}),
    ],
)
def test_the_loss_of_cpc_is_the_papers(corpus, batch, over: str, changes: dict[str, Any]) -> None:
    """Equation 4 of arXiv 1807.03748 with the density ratio of equation 3, and the accuracy at each step ahead."""
    model, prepare = make(corpus, "cpc", negatives_over=over, **changes)
    batch = drawn(prepare, batch)
    width = 1.0 if changes.get("mean_product") is False else float(model.backbone.frontend.dim)
    total, right, count = 0.0, dict.fromkeys((1, 2, 3), 0), dict.fromkeys((1, 2, 3), 0)
    for step, truth, others in scores(model, batch):
        ratios = [math.exp(one / width) for one in (truth, *others)]
        total -= math.log(ratios[0] / sum(ratios))
        right[step] += all(truth > one for one in others)
        count[step] += 1
    loss = model(batch)
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    for step in (1, 2, 3):
        assert [float(part) for part in loss.metrics[f"accuracy_{step}"]] == [right[step], count[step]]
    assert [float(part) for part in loss.metrics["accuracy"]] == [sum(right.values()), sum(count.values())]
    assert 0 < sum(right.values()) < sum(count.values())


def test_negatives_are_other_frames_of_the_utterance_or_of_the_batch(corpus, batch) -> None:
    model, prepare = make(corpus, "cpc", negatives=800)
    lengths = model.backbone.spec.num_frames(batch.lengths).tolist()
    negatives = drawn(prepare, batch).targets["negatives"]
    for row, length in enumerate(lengths):
        for place in (0, length // 2, length - 1):
            assert set(negatives[row, place].tolist()) == set(range(length)) - {place}
    alone = drawn(prepare, collate([Row(batch.ids[1], "", batch.inputs[1, : batch.lengths[1]].numpy(), 0)]))
    assert torch.equal(alone.targets["negatives"][0], negatives[1, : lengths[1]]), "its batch does not matter"
    _, prepare = make(corpus, "cpc", negatives=3000, negatives_over="batch")
    negatives = drawn(prepare, batch).targets["negatives"]
    frames = negatives.shape[1]
    every = {row * frames + place for row, length in enumerate(lengths) for place in range(length)}
    for row, place in ((0, 0), (1, 5), (2, lengths[2] - 1)):
        assert set(negatives[row, place].tolist()) == every - {row * frames + place}


@torch.no_grad()
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("over", ["utterance", "batch"])
def test_utterances_that_are_shorter_than_a_step_have_no_targets(corpus, objective: str, over: str) -> None:
    model, prepare = make(corpus, objective, negatives_over=over)
    spec = model.backbone.spec
    rows = [Row(f"short{count}", "", torch.randn(spec.receptive_field).numpy(), 0) for count in range(2)]
    short = drawn(prepare, collate(rows))
    assert short.num_targets == 0.0
    loss = model(short)
    assert float(loss.total) == 0.0
    assert all(torch.isfinite(value) for value, _ in loss.metrics.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_encoder_that_sees_the_future_is_refused(corpus, objective: str) -> None:
    made = settings(corpus, objective)
    made["encoder"] = corpus.settings("hubert", "filterbank")["encoder"]
    with pytest.raises(HarkenError) as caught:
        build_objective(from_dict(made))
    assert str(caught.value) == (
        f"`objective.name: {objective}` predicts frames to come, which `encoder.name: transformer` sees: choose one "
        "that looks back only, `causal_convolution` or `recurrent`"
    )


def test_the_width_must_be_divisible_by_the_predictors_heads(corpus) -> None:
    with pytest.raises(HarkenError, match=r"`encoder.dim` must be divisible by `objective.heads`, got 16 and 3"):
        build_objective(from_dict(settings(corpus, "cpc", heads=3)))


def test_the_aggregator_is_fairseqs_but_for_its_norm() -> None:
    """fairseq's `ConvAggegator`: the first frame repeated, convolution, norm, ReLU, (x + y) sqrt(0.5)."""
    config = find("encoder", "causal_convolution").config(name="causal_convolution", dim=6, kernels=(2, 4))
    torch.manual_seed(0)
    encoder = build("encoder", config, input_dim=6)
    frames = torch.randn(2, 9, 6)
    x = frames
    for kernel, block in zip((2, 4), encoder.blocks, strict=True):
        past = torch.cat([x[:, :1]] * (kernel - 1) + [x], 1)
        y = torch.stack(
            [
                torch.einsum("bkc,ock->bo", past[:, place : place + kernel], block.convolution.weight)
                for place in range(9)
            ],
            1,
        )
        y = functional.layer_norm(y + block.convolution.bias, (6,)).clamp(min=0)
        x = (x + y) * 0.5**0.5
    found = encoder.encode(encoder.embed(frames), torch.tensor([9, 9])).last
    assert torch.allclose(found, x, atol=1e-5)


def test_the_gated_recurrent_unit_is_the_papers() -> None:
    """arXiv 1406.1078 with the reset gate behind the product, as torch has it."""
    config = find("encoder", "recurrent").config(name="recurrent", dim=5, cell="gru")
    torch.manual_seed(0)
    encoder = build("encoder", config, input_dim=5)
    layer = encoder.blocks[0].layer
    frames, state, states = torch.randn(1, 7, 5), torch.zeros(5), []
    for x in frames[0]:
        inner = (layer.weight_ih_l0 @ x + layer.bias_ih_l0).view(3, 5)
        outer = (layer.weight_hh_l0 @ state + layer.bias_hh_l0).view(3, 5)
        reset, update = (inner[:2] + outer[:2]).sigmoid()
        state = update * state + (1 - update) * (inner[2] + reset * outer[2]).tanh()
        states.append(state)
    found = encoder.encode(encoder.embed(frames), torch.tensor([7])).last
    assert torch.allclose(found[0], torch.stack(states), atol=1e-6)


@pytest.mark.parametrize("name", ["wav2vec_large", "cpc_modified"])
def test_a_preset_predicts_frames_of_10_ms(name: str) -> None:
    model = build_objective(load([name], ["data.train=train.jsonl"]).config)
    spec = model.backbone.spec
    assert spec.rate == 100
    if name == "wav2vec_large":
        assert model.config.first_step == math.ceil(spec.receptive_field / spec.stride)
        size = sum(parameter.numel() for parameter in model.parameters())
        assert round(size / 1e6, 1) == 32.5, "as fairseq's README says"


def test_a_run_learns_and_continues_exactly(corpus, tmp_path: Path) -> None:
    def steps(exp: Path, count: int) -> list[dict[str, Any]]:
        made = settings(corpus, "cpc", encoder="causal_convolution", predictor="linear", mean_product=False)
        made["log"]["every_steps"] = 1
        (tmp_path / "run.yaml").write_text(to_yaml(from_dict(made)))
        assert main(["train", str(tmp_path / "run.yaml"), "--exp", str(exp), f"train.steps={count}"]) == 0
        records = map(json.loads, (exp / "metrics.jsonl").read_text().splitlines())
        return [record for record in records if record["kind"] == "train"]

    whole = steps(tmp_path / "whole", 8)
    assert whole[-1]["accuracy"] > whole[0]["accuracy"]
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert {"accuracy_1", "accuracy_2", "accuracy_3"} <= whole[-1].keys()
    steps(tmp_path / "parts", 4)
    assert [record["loss"] for record in steps(tmp_path / "parts", 8)] == [record["loss"] for record in whole]
