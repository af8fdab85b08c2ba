"""data2vec 2.0 and EAT against formulas written out: masks, what the encoder sees, decoder, losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from harken.config.load import load
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.block_mask import BlockMask
from harken.nn.noise import normal_of
from harken.objectives.saved import build_objective, build_prepare

SIZES = ("top_layers=2", "decoder_dim=16", "decoder_layers=2", "decoder_kernel=3", "decoder_groups=2", "clones=3")
GRID = ("encoder.rows=2", "encoder.positions=grid", "objective.utterance_weight=0.5", "objective.inverse_mask=true")
GRID += ("objective.normalize_targets=true",)


def make(corpus, *overrides: str):
    own = [f"objective.{size}" for size in SIZES]
    settings = ["objective.name=data2vec2", "encoder.layer_drop=0", *own, *overrides]
    config = corpus.config("data2vec", "filterbank", *settings)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    with torch.no_grad():
        for parameter in model.backbone.encoder.parameters():  # the teacher must not be the student
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, build_prepare(config, model.backbone.spec, train=True)


def student_by_hand(model, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Visible tokens alone through norms and blocks; `x` `(N, D)` and `mask` `(N,)` of one clone without padding."""
    encoder = model.backbone.encoder
    x = x.masked_fill(mask[:, None], 0.0)[None]
    x = (x + encoder.positions(x))[:, ~mask]
    if model.utterance is not None:
        x = torch.cat([model.utterance[None, None], x], 1)
    x = encoder.norm(x)
    for block in encoder.blocks:
        x = block(x, None)
    return (x[0], None) if model.utterance is None else (x[0, 1:], x[0, 0])


def decoder_by_hand(model, x: torch.Tensor) -> torch.Tensor:
    decoder, rows = model.decoder, model.backbone.encoder.rows
    x = x.view(1, -1, rows, x.shape[-1]).permute(0, 3, 1, 2)
    for layer in decoder.layers:
        y = functional.conv2d(x, layer.weight, layer.bias, padding=layer.padding, groups=layer.groups)
        y = functional.gelu((y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt())
        x = x + y if x.shape == y.shape else y
    return decoder.project(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]))


@torch.no_grad()
@pytest.mark.parametrize("changes", [(), GRID], ids=["data2vec 2.0", "EAT"])
def test_the_loss_is_the_papers(corpus, batch, changes) -> None:
    model, prepare = make(corpus, *changes)
    batch = prepare(batch, [Draws(1, 0)] * len(batch.ids))
    loss = model(batch)
    rows, width = model.backbone.encoder.rows, model.width
    frames, x, lengths = model.backbone.embed(batch.inputs, batch.lengths, {})
    targets = model.teacher(frames, lengths)
    total = utterance = 0.0
    for row, length in enumerate(lengths.tolist()):
        target = targets[row, :length].reshape(length * rows, width)
        if model.config.normalize_targets:
            target = functional.layer_norm(target, (width,))
        for clone in range(3):
            mask = batch.targets["mask"][row, clone, : length * rows]
            seen, summary = student_by_hand(model, x[row, :length].reshape(length * rows, width), mask)
            tokens = 0.01 * normal_of(batch.targets["noise_keys"][row, clone : clone + 1], mask.numel() * width)
            tokens = tokens.view(-1, width)
            tokens[~mask] = seen
            error = decoder_by_hand(model, tokens)[mask] - target[mask]
            total += float(error.square().sum()) * width**-0.5
            if summary is not None:
                error = (summary - target.mean(0)).square().sum() * width**-0.5
                utterance += float(error) * int(mask.sum())
    assert float(loss.total) == pytest.approx(total + 0.5 * utterance, rel=1e-4)
    assert batch.num_targets == int(batch.targets["mask"].sum())
    if changes:
        value, count = loss.metrics["utterance_loss"]
        assert float(value / count) == pytest.approx(utterance / batch.num_targets, rel=1e-4)


@torch.no_grad()
def test_leaving_tokens_out_is_hiding_them_from_attention(corpus, batch) -> None:
    model, prepare = make(corpus)
    batch = prepare(batch, [Draws(1, 0)] * len(batch.ids))
    omitted = float(model(batch).total)
    type(model.backbone.encoder).omits = False
    try:
        assert float(model(batch).total) == pytest.approx(omitted, rel=1e-4)
    finally:
        type(model.backbone.encoder).omits = True


@pytest.mark.parametrize(("rows", "inverse"), [(1, False), (8, True)])
def test_a_block_mask_has_its_share_in_blocks(rows: int, inverse: bool) -> None:
    mask = BlockMask(probability=0.8 if inverse else 0.5, length=5, adjust=0.07, inverse=inverse)
    rng = np.random.default_rng(0)
    drawn = [mask.draw(64, rows, rng) for _ in range(20)]
    tokens = 64 * rows
    expected = tokens - int(tokens * (1 - 0.8)) if inverse else tokens // 2
    assert {int(one.sum()) for one in drawn} == {expected}
    block = np.stack([~one if inverse else one for one in drawn]).reshape(20, 64, rows)
    share = block.mean()
    assert (block[:, 1:] & block[:, :-1]).mean() > 1.5 * share**2, "neighbours in time go together"
    if rows > 1:
        assert (block[:, :, 1:] & block[:, :, :-1]).mean() > 1.5 * share**2, "and so do rows"
    for frames in (0, 1, 2, 3):
        small = mask.draw(frames, 1, rng)
        assert len(small) == frames
        assert frames < 2 or 0 < small.sum() < frames


@pytest.mark.parametrize("name", ["data2vec2_base", "eat_base"])
def test_a_preset_builds(name: str) -> None:
    config = load([name], ["data.train=train.jsonl"]).config
    with torch.device("meta"):
        model = build_objective(config)
    backbone = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert 85e6 < backbone < 95e6


def test_what_does_not_fit_is_refused_by_name(corpus) -> None:
    with pytest.raises(HarkenError, match=r"`objective.decoder_kernel` must be odd"):
        make(corpus, "objective.decoder_kernel=4")
    with pytest.raises(HarkenError, match=r"`objective.decoder_groups` must divide the width of the encoder's tokens"):
        make(corpus, "objective.decoder_groups=3", "objective.decoder_dim=15")
