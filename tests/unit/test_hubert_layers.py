"""HuBERT's intermediate-layer loss against a reference written here frame by frame; what its settings refuse."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.objectives.saved import build_objective, build_prepare

LAYERS = ["encoder.layers=3", "encoder.layer_drop=0"]


def make(corpus, *overrides: str):
    config = corpus.config("hubert", "filterbank", *LAYERS, *overrides)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    cuts = [Manifest(corpus.train)[place] for place in (0, 5, 9)]
    rows = [Row(cut.id, "", read_cut(cut, 16000), 0) for cut in cuts]
    prepare = build_prepare(config, model.backbone.spec, train=True)
    return model, prepare(collate(rows), [Draws(1, 0)] * len(rows))


def hidden_of(model, batch, layers):
    _, x, lengths = model.backbone.embed(batch.inputs, batch.lengths, {"mask": batch.targets["mask"]})
    return model.backbone.encoder.encode(x, lengths, layers)


@torch.no_grad()
def test_linear_heads_of_two_blocks_share_the_loss(corpus) -> None:
    """The mean over frames and layers of -log softmax(W h / tau): Fast-HuBERT's criterion, one frame at a time."""
    model, batch = make(corpus, "objective.head=linear", "objective.predict_layers=[1,3]", "objective.penalty_weight=0")
    encoded = hidden_of(model, batch, [1, 3])
    maps = {1: model.lower_heads["1"].codes.maps[0], 3: model.codes.maps[0]}
    sums, hits, frames = {1: 0.0, 3: 0.0}, {1: 0, 3: 0}, 0
    for row, frame in batch.targets["mask"].nonzero().tolist():
        frames += 1
        label = int(batch.targets["labels"][row, frame, 0])
        for layer, linear in maps.items():
            scores = (linear.weight @ encoded.hidden[layer][row, frame] + linear.bias) / model.config.temperature
            sums[layer] += float(scores.exp().sum().log() - scores[label])
            hits[layer] += int(scores.argmax()) == label
    loss = model(batch)
    assert frames == batch.num_targets > 0
    assert sums[1] != pytest.approx(sums[3], rel=1e-3), "both blocks gave one loss"
    assert float(loss.total) == pytest.approx((sums[1] + sums[3]) / 2, rel=1e-5)
    for layer in (1, 3):
        assert float(loss.metrics[f"loss_layer{layer}"][0]) == pytest.approx(sums[layer], rel=1e-5)
        assert float(loss.metrics[f"accuracy_masked_layer{layer}"][0]) == hits[layer]
        assert float(loss.metrics[f"accuracy_masked_layer{layer}"][1]) == frames
    assert float(loss.metrics["accuracy_masked"][0]) == hits[1] + hits[3]
    assert float(loss.metrics["accuracy_masked"][1]) == 2 * frames


@torch.no_grad()
def test_each_block_predicts_its_own_codebook(corpus) -> None:
    """A sum over blocks, each with the labels in its own place; the second codebook's are turned round to tell them."""
    model, batch = make(
        corpus,
        f"data.labels=[{corpus.labels},{corpus.labels}]",
        "objective.classes=[12,12]",
        "objective.predict_layers=[2,3]",
        "objective.layer_codebooks=own",
        "objective.penalty_weight=0",
    )
    batch.targets["labels"][..., 1] = 11 - batch.targets["labels"][..., 1]
    encoded = hidden_of(model, batch, [2, 3])
    heads = {2: (model.lower_heads["2"].project, model.lower_heads["2"].codes), 3: (model.project, model.codes)}
    expected = 0.0
    for row, frame in batch.targets["mask"].nonzero().tolist():
        for book, (layer, (project, codes)) in enumerate(heads.items()):
            assert codes.embeddings.shape == (12, 16)
            projected = project(encoded.hidden[layer][row, frame])
            scores = functional.cosine_similarity(projected[None], codes.embeddings, dim=-1) / 0.1
            label = int(batch.targets["labels"][row, frame, book])
            expected += float(scores.exp().sum().log() - scores[label])
    assert float(model(batch).total) == pytest.approx(expected, rel=1e-5)


def test_the_last_block_alone_is_hubert_and_keeps_its_names(corpus) -> None:
    plain, batch = make(corpus)
    named, _ = make(corpus, "objective.predict_layers=[3]")
    two, _ = make(corpus, "objective.predict_layers=[1,3]")
    assert plain.state_dict().keys() == named.state_dict().keys()
    assert plain.state_dict().keys() < two.state_dict().keys(), "a checkpoint of one head must load beside more heads"
    named.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert float(named(batch).total) == float(plain(batch).total)
    assert two.head_flops(7) == 2 * plain.head_flops(7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.predict_layers=[1,2]"], r"`objective.predict_layers` must end with 3, the encoder's last block"),
        (["objective.predict_layers=[1,4]"], r"must end with 3, .*; got \[1, 4\]"),
        (["objective.predict_layers=[3,1]"], r"`objective.predict_layers` must rise, each block named once"),
        (["objective.predict_layers=[0,3]"], r"`objective.predict_layers` must be positive, got \[0, 3\]"),
        (
            ["objective.predict_layers=[1,3]", "objective.layer_codebooks=own"],
            r"needs a block of `objective.predict_layers` for each codebook of `objective.classes`, got 2 and 1",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused(corpus, overrides: list[str], message: str) -> None:
    with pytest.raises(HarkenError, match=message):
        make(corpus, *overrides)
