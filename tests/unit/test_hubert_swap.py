"""MS-HuBERT's two views against a reference that takes each utterance, view and block alone."""

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

LAYERS = ["encoder.layers=4", "encoder.layer_drop=0", "objective.penalty_weight=0", "objective.predict_layers=[2,4]"]


def make(corpus, *overrides: str):
    config = corpus.config("hubert", "filterbank", *LAYERS, *overrides)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    cuts = [Manifest(corpus.train)[place] for place in (0, 5, 9)]
    rows = [Row(cut.id, "", read_cut(cut, 16000), 0) for cut in cuts]
    prepare = build_prepare(config, model.backbone.spec, train=True)
    return model, prepare(collate(rows), [Draws(1, 0)] * len(rows))


def two_views(model, batch, row: int, swaps: set[int]) -> dict[int, torch.Tensor]:
    """Return what each block gives for the masked frames of an utterance, by place: those that began masked."""
    backbone, encoder = model.backbone, model.backbone.encoder
    length = int(batch.lengths[row])
    frames, _ = backbone.frontend(batch.inputs[row : row + 1, :length], batch.lengths[row : row + 1], None, None)
    whole = encoder.embed(frames)
    masked = whole.clone()
    places = [place for place in range(whole.shape[1]) if batch.targets["mask"][row, place]]
    for place in places:
        masked[0, place] = backbone.mask_embedding
    views = [encoder.norm(view + encoder.positions(view)) for view in (masked, whole)]
    began_masked, outputs = 0, {}
    for number, block in enumerate(encoder.blocks, start=1):
        views = [block(view, None) for view in views]
        outputs[number] = torch.stack([views[began_masked][0, place] for place in places])
        if number in swaps:
            for place in places:
                first = views[0][0, place].clone()
                views[0][0, place] = views[1][0, place]
                views[1][0, place] = first
            began_masked = 1 - began_masked
    return outputs


@pytest.mark.parametrize("swaps", [[1], [1, 2, 3], [2, 3]])
@torch.no_grad()
def test_the_frames_that_began_masked_predict_the_units(corpus, swaps: list[int]) -> None:
    model, batch = make(corpus, f"objective.swap_layers={swaps}")
    heads = {2: (model.lower_heads["2"].project, model.lower_heads["2"].codes), 4: (model.project, model.codes)}
    expected = {2: 0.0, 4: 0.0}
    for row in range(len(batch.ids)):
        labels = batch.targets["labels"][row][batch.targets["mask"][row]]
        outputs = two_views(model, batch, row, set(swaps))
        for layer, (project, codes) in heads.items():
            for x, label in zip(outputs[layer], labels[:, 0].tolist(), strict=True):
                scores = functional.cosine_similarity(project(x)[None], codes.embeddings, dim=-1) / 0.1
                expected[layer] += float(scores.exp().sum().log() - scores[label])
    loss = model(batch)
    for layer, value in expected.items():
        assert float(loss.metrics[f"loss_layer{layer}"][0]) == pytest.approx(value, rel=1e-5)
    assert float(loss.total) == pytest.approx(sum(expected.values()) / 2, rel=1e-5)
    plain, _ = make(corpus)
    plain.load_state_dict(model.state_dict())  # the views share all weights: there are no new ones
    assert float(plain(batch).total) != pytest.approx(float(loss.total), rel=1e-5)


def test_the_second_view_counts_as_work(corpus) -> None:
    model, batch = make(corpus, "objective.swap_layers=[1]")
    plain, _ = make(corpus)
    frames = [int(model.backbone.spec.num_frames(int(length))) for length in batch.lengths]
    second = 3 * sum(model.backbone.encoder.flops(count) for count in frames)
    assert model.flops(batch) - plain.flops(batch) == pytest.approx(second)


@torch.no_grad()
def test_the_tokens_of_a_frame_change_places_together(corpus) -> None:
    """Two tokens to a frame: a frame that is masked moves with both, and no other moves."""
    tokens = ["encoder.rows=2", "encoder.positions=grid", "objective.swap_layers=[2]"]
    encoder = make(corpus, *tokens)[0].backbone.encoder
    views, frames = torch.randn(2, 1, 9, encoder.embed_dim), [1, 2, 6]
    mask = torch.tensor([[frame in frames for frame in range(9)]])
    found = encoder.encode_swapped(*views, mask, torch.tensor([9]), [2], [2]).hidden[2]
    first, second = (view.reshape(1, 18, -1) for view in views)
    first, second = (encoder.norm(view + encoder.positions(view)) for view in (first, second))
    for block in encoder.blocks[:2]:
        first, second = block(first, None), block(second, None)
    assert torch.allclose(found, first.reshape(1, 9, -1), atol=1e-6), "what began masked, wherever it is"
    for frame in frames:
        first[0, 2 * frame : 2 * frame + 2], second[0, 2 * frame : 2 * frame + 2] = (
            second[0, 2 * frame : 2 * frame + 2].clone(),
            first[0, 2 * frame : 2 * frame + 2].clone(),
        )
    first, second = encoder.blocks[2](first, None), encoder.blocks[2](second, None)
    third = encoder.encode_swapped(*views, mask, torch.tensor([9]), [2], [3]).hidden[3]
    for frame in range(9):
        view = second if frame in frames else first
        assert torch.allclose(third[0, frame], view[0, 2 * frame : 2 * frame + 2].flatten(), atol=1e-6), frame


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.swap_layers=[4]"], r"`objective.swap_layers` must lie below 4, the encoder's last block"),
        (["objective.swap_layers=[0]"], r"`objective.swap_layers` must be positive, got \[0\]"),
        (
            ["objective.swap_layers=[1]", "encoder.name=zipformer", "objective.predict_layers=[]"],
            r"`objective.swap_layers` needs an encoder of the Transformer family .* got `zipformer`",
        ),
    ],
)
def test_swaps_that_do_nothing_are_refused(corpus, overrides: list[str], message: str) -> None:
    with pytest.raises(HarkenError, match=message):
        make(corpus, *overrides)
