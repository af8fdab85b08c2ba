"""The transducer as an objective: its losses and their warm-up, what is left out, learning, resuming, decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harken.apps.main import main
from harken.config.saved import find_model, load_weights, save_model
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.evaluate.hypotheses import read_hypotheses
from harken.evaluate.wer import align, characters, count
from harken.nn.transducer.arcs import joined_arcs, kept_positions
from harken.nn.transducer.lattice import sum_paths
from harken.objectives.saved import build_objective, build_prepare
from harken.objectives.transcripts import ctc_loss

STEPS, PLACES = 150, 6


def make(corpus, *overrides: str):
    config = corpus.config("transducer", "filterbank", "encoder.layer_drop=0", *overrides)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    return model, build_prepare(config, model.backbone.spec, train=False)


def prepared(prepare, batch):
    return prepare(batch, [Draws(1, 0)] * len(batch.ids))


@torch.no_grad()
def test_the_weights_of_the_two_losses_warm_up_as_published(corpus, batch) -> None:
    """Simple 1 to 0.5, pruned 0.1 to 1, straight lines over the warm-up: icefall's `train.py`."""
    model, prepare = make(corpus, "objective.loss_warmup_steps=100", "objective.simple_weight=0.5")
    batch = prepared(prepare, batch)
    for step, simple_weight, pruned_weight in ((0, 1.0, 0.1), (50, 0.75, 0.55), (100, 0.5, 1.0), (900, 0.5, 1.0)):
        model.after_step(step)
        loss = model(batch)
        pruned, simple = (float(loss.metrics[name][0]) for name in ("loss", "loss_simple"))
        assert abs(pruned - simple) > 0.1
        assert float(loss.total) == pytest.approx(simple_weight * simple + pruned_weight * pruned, rel=1e-5)


@torch.no_grad()
def test_a_range_of_all_tokens_is_the_full_lattice_and_a_smaller_one_loses_paths(corpus, batch) -> None:
    losses = {}
    for width in (2, 5, 99):
        model, prepare = make(corpus, f"objective.prune_range={width}")
        losses[width] = float(model(prepared(prepare, batch)).metrics["loss"][0])
    batch = prepared(prepare, batch)
    encoded, tokens = model.encode(batch), batch.targets["tokens"]
    rows = tokens.shape[1] + 1
    everywhere = kept_positions(torch.zeros(encoded.last.shape[:2], dtype=torch.int64), rows, rows)
    predictions = model.joiner.predictions(model.predictor(tokens))
    logits = model.joiner(model.joiner.frames(encoded.last)[:, :, None], predictions[:, None])
    scores = sum_paths(joined_arcs(logits, everywhere, model._labels(batch, encoded.lengths))).scores
    assert losses[99] == pytest.approx(-float(scores.sum()), rel=1e-5)
    assert losses[2] > losses[5] > losses[99]


@torch.no_grad()
def test_the_auxiliary_loss_is_ctcs(corpus, batch) -> None:
    model, prepare = make(corpus, "objective.ctc_weight=0.2")
    batch = prepared(prepare, batch)
    loss, encoded = model(batch), model.encode(batch)
    expected = ctc_loss(model.ctc(encoded.last).log_softmax(-1), encoded.lengths, batch)
    assert float(loss.metrics["loss_ctc"][0]) == pytest.approx(float(expected), rel=1e-5)
    without = loss.metrics["loss_simple"][0] + 0.1 * loss.metrics["loss"][0]
    assert float(loss.total) == pytest.approx(float(without + 0.2 * expected), rel=1e-5)
    assert make(corpus)[0].ctc is None


@torch.no_grad()
def test_a_transcript_of_more_tokens_than_frames_is_left_out_and_named(corpus, batch) -> None:
    model, prepare = make(corpus)
    frames = int(prepare.spec.num_frames(batch.lengths)[1])
    texts = (batch.texts[0], "a" * (frames + 1), batch.texts[2])
    long = prepared(prepare, replace(batch, texts=texts))
    (note,) = long.notes
    assert note.reason.endswith(f"has {frames + 1} tokens and needs {frames + 1} frames, the model gives {frames}")
    assert long.num_targets == len(texts[0]) + len(texts[2])
    others = [prepared(prepare, collate_row(batch, row, texts[row])) for row in (0, 2)]
    assert float(model(long).total) == pytest.approx(sum(float(model(one).total) for one in others), rel=1e-4)
    fits = prepared(prepare, replace(batch, texts=(texts[0], "a" * frames, texts[2])))
    assert not fits.notes
    assert torch.isfinite(model(fits).total)
    _, with_ctc = make(corpus, "objective.ctc_weight=0.2")
    (note,) = prepared(with_ctc, replace(batch, texts=(texts[0], "a" * frames, texts[2]))).notes
    assert f"needs {2 * frames - 1} frames" in note.reason, "CTC parts equal tokens by a blank"


def collate_row(batch, row: int, text: str):
    return collate([Row(batch.ids[row], text, batch.inputs[row, : int(batch.lengths[row])].numpy(), 0)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune_range=1", "`objective.prune_range` must be at least 2, which paths need, got 1"),
        ("predictor_dim=6", "`objective.predictor_dim` must be divisible by 4, got 6"),
        ("context=0", "`objective.context` must be positive, got 0"),
        ("am_scale=0.8", "`objective.lm_scale` and `objective.am_scale` must be at most 1 together, got 0.25 and 0.8"),
    ],
)
def test_settings_that_make_no_transducer_are_refused(corpus, override: str, message: str) -> None:
    with pytest.raises(HarkenError, match=message):
        make(corpus, f"objective.{override}")


def test_a_tiny_transducer_learns_and_decodes(corpus, tmp_path: Path) -> None:
    """The training loss falls by more than half, and both searches hear something of the training set."""
    # a predictor of one token cannot learn six texts by heart, and CTC keeps the encoder from standing still
    own = ("context=1", "ctc_weight=1.0", "prune_range=2", "loss_warmup_steps=100")
    dropouts = ("encoder.dropout=0", "encoder.attention_dropout=0", "encoder.input_dropout=0", "encoder.layer_drop=0")
    config = corpus.config("transducer", "filterbank", *dropouts, *(f"objective.{setting}" for setting in own))
    torch.manual_seed(3)
    model = build_objective(config).train()
    prepare = build_prepare(config, model.backbone.spec, train=False)
    manifest = Manifest(corpus.train)
    cuts = [manifest[place] for place in range(PLACES)]
    rows = [Row(cut.id, cut.supervisions[0].text, read_cut(cut, 16000), 0) for cut in cuts]
    batch = prepared(prepare, collate(rows))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        loss = model(batch)
        (loss.total / batch.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step + 1)
        losses.append(float(loss.metrics["loss"][0]) / batch.num_targets)
    assert losses[-1] < losses[0] / 2
    save_model(tmp_path, config, model.state_dict())
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(manifest.line(place)) + "\n" for place in range(PLACES)))
    for method in ("greedy", "modified_beam"):
        out = tmp_path / method
        arguments = ["--out", str(out), "--method", method, "--beam", "4", "--workers", "0"]
        assert main(["decode", str(tmp_path), str(few), *arguments]) == 0
        rows = read_hypotheses(out / "few.jsonl")
        errors = sum(count(align(characters(row.ref), characters(row.hyp))).total for row in rows)
        assert errors < 0.6 * sum(len(row.ref) for row in rows), method


def test_a_run_that_goes_on_does_not_warm_up_again(train, tmp_path: Path) -> None:
    settings = ("objective.loss_warmup_steps=4", "encoder.layer_drop=0")
    for steps, exp in ((1, "parts"), (2, "parts"), (2, "whole")):
        assert train("transducer", *settings, steps=steps, exp=exp)[0] == 0
    parts, whole = (load_weights(find_model(tmp_path / exp)) for exp in ("parts", "whole"))
    assert int(whole["steps_taken"]) == 2
    assert all(torch.equal(value, whole[name]) for name, value in parts.items())
