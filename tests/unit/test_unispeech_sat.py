"""UniSpeech-SAT against its released formulas, written out here frame by frame, and HuBERT beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from harken.config.load import load
from harken.core.draws import Draws, begin_micro_batch
from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.objectives.saved import build_objective, build_prepare

SIZE = 2 * 6  # groups times entries of the tiny configuration


def make(corpus, *overrides: str, objective: str = "unispeech_sat"):
    config = corpus.config(objective, "filterbank", "encoder.layer_drop=0", *overrides)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    return model, build_prepare(config, model.backbone.spec, train=True)


def drawn(prepare, batch, epoch: int = 0):
    return prepare(batch, [Draws(1, epoch)] * len(batch.ids))


def by_hand(model, batch) -> dict[str, float]:
    """The terms over utterances, a masked frame and an instance at a time, as `UniSpeechSATModel` has them."""
    backbone, own = model.backbone, model.config
    mask = batch.targets["mask"]
    _, x, lengths = backbone.embed(batch.inputs, batch.lengths, {"mask": mask})
    hidden = backbone.encoder.encode(x, lengths, [1]).hidden[1]
    frames, targets, rows, soft = [], [], [], []
    for row, place in mask.nonzero().tolist():
        frame = hidden[row, place]
        if own.contrast_norm:
            frame = functional.layer_norm(frame, frame.shape, model.contrast_norm.weight, model.contrast_norm.bias)
        logits = model.quantizer.logits(frame).view(own.groups, own.entries)
        parts = [model.quantizer.codebook[group, code] for group, code in enumerate(logits.argmax(-1).tolist())]
        targets.append(model.project_target(torch.cat(parts)))
        frames.append(model.project_frame(frame))
        rows.append(row)
        soft.append(logits.softmax(-1))
    counts = mask.sum(1).tolist()
    width = max(counts)
    right = positives = 0.0
    entropies = [0.0] * len(counts)
    for index, (frame, row) in enumerate(zip(frames, rows, strict=True)):
        drawn_here = batch.targets["instances"][row, index - sum(counts[:row])].tolist()
        # positions are of the padded `(B * M)`
        others = [sum(counts[: other // width]) + other % width for other in drawn_here]
        assert index not in others
        terms = []
        for other in [index, *others]:
            logit = functional.cosine_similarity(frame, targets[other], dim=0) / own.temperature
            same = rows[other] == row
            terms.append(float(-functional.logsigmoid(logit if same else -logit)))
            right += float((logit >= 0) == same) / (1 + len(others))
            positives += float(same) / (1 + len(others))
        entropies[row] += sum(terms) / len(terms)
    # the original multiplies means over masked frames by all frames that have a cross entropy
    counted = lengths.tolist() if own.unmasked_weight else counts
    spread = {}
    for row in range(len(counts)):
        mean = torch.stack([one for one, of in zip(soft, rows, strict=True) if of == row]).mean(0)
        spread[row] = (SIZE - float((-(mean * mean.log()).sum(-1)).exp().sum())) / SIZE * counted[row]
    assert min(counts) > 0
    return {
        "contrast": sum(loss / count * of for loss, count, of in zip(entropies, counts, counted, strict=True)),
        "utterance_loss": sum(entropies),
        "utterance_accuracy": right,
        "utterance_positives": positives,
        "diversity": sum(spread.values()),
    }


@torch.no_grad()
@pytest.mark.parametrize(("norm", "unmasked"), [("false", 0.0), ("true", 0.0), ("false", 0.7)])
def test_the_loss_is_huberts_and_the_released_term(corpus, batch, norm: str, unmasked: float) -> None:
    weight = f"objective.unmasked_weight={unmasked}"
    model, prepare = make(corpus, f"objective.contrast_norm={norm}", "objective.contrast_weight=3", weight)
    plain, _ = make(corpus, weight, objective="hubert")
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    batch = drawn(prepare, batch)
    loss, expected = model(batch), by_hand(model, batch)
    contrast, masked = expected.pop("contrast"), float(batch.targets["mask"].sum())
    assert (batch.num_targets > masked) == (unmasked > 0)
    for name, value in expected.items():
        found, count = loss.metrics[name]
        assert float(found) == pytest.approx(value, rel=1e-4), name
        assert float(count) == (batch.num_targets if name == "diversity" else masked)
    assert 0.1 < expected["utterance_positives"] / masked < 0.9, "else one side would not be tested"
    hubert = plain(batch)
    total = float(hubert.total) + 3.0 * contrast + 0.1 * expected["diversity"]
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    assert all(torch.equal(value, loss.metrics[name][0]) for name, (value, _) in hubert.metrics.items())


def test_instances_are_all_other_masked_frames_of_the_batch(corpus, batch) -> None:
    model, prepare = make(corpus, "objective.instances=4000")
    targets = drawn(prepare, batch).targets
    counts, width = targets["counts"].tolist(), targets["places"].shape[1]
    every = {row * width + index for row, count in enumerate(counts) for index in range(count)}
    for row, count in enumerate(counts):
        assert targets["places"][row, :count].tolist() == targets["mask"][row].nonzero()[:, 0].tolist()
        for index in range(count):
            assert set(targets["instances"][row, index].tolist()) == every - {row * width + index}
    plain = drawn(make(corpus, objective="hubert")[1], batch).targets
    assert all(torch.equal(value, targets[name]) for name, value in plain.items()), "masks and labels are HuBERT's"
    spec = model.backbone.spec
    short = [Row(batch.ids[0], "", np.ones(spec.receptive_field + spec.stride, np.float32), 0)]
    alone = drawn(prepare, collate(short)).targets
    assert alone["counts"].tolist() == [1]
    assert not alone["instances"].any(), "a frame that is alone is its own instance"


def test_utterances_are_told_apart_by_training(corpus, batch) -> None:
    """The term falls below what a constant answer can reach: the entropy of the share of positives."""
    model, prepare = make(corpus, "objective.instances=40", "objective.contrast_weight=10")
    optimizer = torch.optim.Adam(model.train().parameters(), 3e-3)
    for step in range(320):
        begin_micro_batch(1, step, 0)
        optimizer.zero_grad()
        ready = drawn(prepare, batch, step)
        (model(ready).total / ready.num_targets).backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(drawn(prepare, batch))
    metrics = {name: float(value / count) for name, (value, count) in found.metrics.items()}
    share = metrics["utterance_positives"]
    constant = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert metrics["utterance_loss"] < 0.7 * constant
    assert metrics["utterance_accuracy"] > max(share, 1 - share)


def test_it_trains_on_mixed_utterances(corpus, train, tmp_path) -> None:
    more = ("data.mixing_probability=0.5", "log.every_steps=1", f"data.valid={corpus.valid}")
    status, _, error = train("unispeech_sat", *more, steps=2)
    assert status == 0, error
    rows = [json.loads(line) for line in (tmp_path / "exp/metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "valid"}
    assert all(1.0 <= row["codebook_perplexity"] <= 6.0 for row in rows)


def test_the_compared_block_must_be_there(corpus) -> None:
    with pytest.raises(HarkenError, match=r"`objective.contrast_layer` must lie in 1..2, the encoder's blocks, got 3"):
        make(corpus, "objective.contrast_layer=3")
    with pytest.raises(HarkenError, match=r"`objective.contrast_weight` must be positive, got 0"):
        make(corpus, "objective.contrast_weight=0")


def test_the_preset_mixes_and_compares_the_middle_block() -> None:
    config = load(["unispeech_sat_base"], ["data.train=train.jsonl", "data.labels=[units]"]).config
    with torch.device("meta"):
        model = build_objective(config)
    assert model.hidden_layers == (6,)
    assert config.encoder.layers == 12
    assert config.data.mixing_probability == 0.2
