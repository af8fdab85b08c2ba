"""CTC as an objective: intermediate losses weighted as published, masks from the epoch that is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.objectives.saved import build_objective, build_prepare


def make(corpus, *overrides: str, train: bool = False):
    config = corpus.config("ctc", "filterbank", "encoder.layer_drop=0", *overrides)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    return model, build_prepare(config, model.backbone.spec, train=train)


def test_the_total_weighs_the_last_and_the_intermediate_layers(corpus, batch) -> None:
    """(1 - lambda) L + lambda mean(L_inner), arXiv 2102.03216 with its lambda as `intermediate_weight`."""
    model, prepare = make(corpus, "objective.intermediate_layers=[1]", "objective.intermediate_weight=0.25")
    prepared = prepare(batch, [Draws(1, 0)] * len(batch.ids))
    loss = model(prepared)
    main, inner = (float(loss.metrics[name][0]) for name in ("loss", "loss_intermediate"))
    assert abs(main - inner) > 0.05, "two layers, two losses"
    assert float(loss.total.detach()) == pytest.approx(0.75 * main + 0.25 * inner, rel=1e-6)
    # the inner loss is the head's on the normalised output of block 1
    _, x, lengths = model.backbone.embed(prepared.inputs, prepared.lengths, {})
    hidden = model.backbone.encoder.encode(x, lengths, (1,)).hidden[1]
    log_probs = model.head(model.intermediate_norms[0](hidden)).log_softmax(-1).transpose(0, 1)
    expected = torch.nn.functional.ctc_loss(
        log_probs, prepared.targets["tokens"], lengths, prepared.targets["token_lengths"], reduction="sum"
    )
    assert inner == pytest.approx(float(expected.detach()), rel=1e-4)


def test_a_layer_that_is_not_in_the_middle_is_refused(corpus) -> None:
    with pytest.raises(HarkenError, match=r"`objective.intermediate_layers` must lie in 1..1, got \[2\]"):
        make(corpus, "objective.intermediate_layers=[2]")


def test_masks_begin_with_their_epoch(corpus, batch) -> None:
    _, prepare = make(corpus, "objective.mask_from_epoch=2", "objective.mask_channel_probability=0.5", train=True)
    names = {"mask", "channel_mask"}
    targets = [prepare(batch, [Draws(1, epoch)] * len(batch.ids)).targets for epoch in range(4)]
    assert [sorted(names & drawn.keys()) for drawn in targets] == [[], [], sorted(names), sorted(names)]
    masks = [drawn["mask"].numpy() for drawn in targets[2:]]
    assert not np.array_equal(*masks)
    epochs = [Draws(1, place % 3) for place in range(len(batch.ids))]  # rows of different epochs, as in a mixture
    masked = prepare(batch, epochs).targets["mask"].any(1).tolist()
    assert masked == [drawn.epoch == 2 for drawn in epochs]


def test_every_batch_gives_the_mask_embedding_a_gradient(corpus, batch) -> None:
    """Ranks may be in different epochs, and ZeRO 2 packs gradients in the order in which they come."""
    model, prepare = make(corpus, "objective.mask_from_epoch=1", "objective.mask_probability=0.5", train=True)
    model.train()
    for epoch in (0, 1):
        model.zero_grad()
        model(prepare(batch, [Draws(1, epoch)] * len(batch.ids))).total.backward()
        gradient = model.backbone.mask_embedding.grad
        assert gradient is not None
        assert bool(gradient.any()) == (epoch == 1)


def test_what_cannot_be_encoded_is_left_out_and_named(corpus, batch) -> None:
    model, prepare = make(corpus)
    whole = prepare(batch, [Draws(1, 0)] * len(batch.ids))
    broken = replace(batch, texts=("", batch.texts[1] + "é", *batch.texts[2:]))
    prepared = prepare(broken, [Draws(1, 0)] * len(batch.ids))
    assert [(note.kind, note.cut) for note in prepared.notes] == [("left out", cut) for cut in batch.ids[:2]]
    reasons = {note.cut: note.reason for note in prepared.notes}
    assert reasons[batch.ids[0]] == f"cut `{batch.ids[0]}` has no transcript"
    assert reasons[batch.ids[1]].startswith(
        f"the transcript of cut `{batch.ids[1]}` cannot be encoded: character 'é' of `"
    )
    assert prepared.targets["weight"].tolist() == [0.0, 0.0, *[1.0] * (len(batch.ids) - 2)]
    lengths = whole.targets["token_lengths"]
    assert prepared.num_targets == float(lengths[2:].sum())
    last = {name: getattr(batch, name)[2:] for name in ("ids", "inputs", "lengths", "texts", "starts")}
    alone = prepare(replace(batch, **last), [Draws(1, 0)])
    assert float(model(prepared).total) == pytest.approx(float(model(alone).total), rel=1e-5)
