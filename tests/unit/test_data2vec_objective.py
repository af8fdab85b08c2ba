"""data2vec against its paper's formulas, and its teacher: what it follows, what it sees, when it has collapsed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.objectives.saved import build_objective, build_prepare


def make(corpus, *overrides: str):
    config = corpus.config("data2vec", "filterbank", "encoder.layer_drop=0", *overrides)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    return model, build_prepare(config, model.backbone.spec, train=True)


def prepared(prepare, batch):
    return prepare(batch, [Draws(1, 0)] * len(batch.ids))


@torch.no_grad()
def shake(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))


def outputs_by_hand(encoder, frames: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the feed-forwards of post-norm blocks for one utterance `(1, T, F)`."""
    x = encoder.project(encoder.input_norm(frames))
    x = encoder.norm(x + encoder.positions(x))
    found = []
    for block in encoder.blocks:
        x = block.attention_norm(x + block.attention(x))
        inner = block.down(functional.gelu(block.up(x)))
        found.append(inner)
        x = block.ffn_norm(x + inner)
    return found


@torch.no_grad()
@pytest.mark.parametrize(("beta", "scale", "top"), [(0.0, None, 2), (0.5, 3.0, 1)])
def test_the_loss_is_the_papers(corpus, batch, beta: float, scale: float | None, top: int) -> None:
    changes = [f"objective.beta={beta}", f"objective.loss_scale={scale or 'null'}", f"objective.top_layers={top}"]
    model, prepare = make(corpus, *changes)
    shake(model.backbone.encoder)  # the teacher must not be the student
    batch = prepared(prepare, batch)
    loss = model(batch)
    mask = batch.targets["mask"]
    frames, x, lengths = model.backbone.embed(batch.inputs, batch.lengths, {"mask": mask})
    student = model.project(model.backbone.encoder.encode(x, lengths).last)
    total, targets = 0.0, []
    for row, length in enumerate(lengths.tolist()):
        inner = outputs_by_hand(model.teacher.encoder, frames[row : row + 1, :length])[-top:]
        normal = [functional.instance_norm(y.transpose(1, 2)).transpose(1, 2) for y in inner]
        target = (sum(normal) / top)[0][mask[row, :length]]
        error = (student[row, :length][mask[row, :length]] - target).abs()
        error = torch.where(error < beta, error.square() / (2 * beta), error - beta / 2) if beta else error.square()
        total += float(error.sum()) * (scale or 32**-0.5)
        targets.append(target)
    assert float(loss.total) == pytest.approx(total, rel=1e-4)
    spread = (torch.cat(targets).var(0) + 1e-6).sqrt().mean()
    found, count = loss.metrics["target_deviation"]
    assert float(found / count) == pytest.approx(float(spread), rel=1e-4)


@torch.no_grad()
def test_whole_blocks_are_targets_where_asked_for(corpus, batch) -> None:
    model, _ = make(corpus, "objective.targets=block", "objective.top_layers=1")
    frames, lengths = model.backbone.frontend(batch.inputs, batch.lengths)
    found = model.teacher(frames, lengths)
    last = model.teacher.encoder.encode(model.teacher.encoder.embed(frames), lengths).last
    for row, length in enumerate(lengths.tolist()):
        expected = functional.instance_norm(last[row : row + 1, :length].transpose(1, 2)).transpose(1, 2)
        assert torch.allclose(found[row, :length], expected[0], atol=1e-4)


def test_the_teacher_follows_with_the_decay_of_the_step(corpus) -> None:
    model, _ = make(corpus, "objective.ema_start=0.5", "objective.ema_end=0.9", "objective.ema_steps=10")
    before = {name: value.clone() for name, value in model.teacher.encoder.state_dict().items()}
    shake(model.backbone.encoder)
    model.after_step(4)
    decay = 0.5 + 0.4 * 4 / 10
    for name, value in model.backbone.encoder.state_dict().items():
        own = model.teacher.encoder.state_dict()[name]
        if name.startswith("blocks."):
            assert torch.allclose(own, decay * before[name] + (1 - decay) * value, atol=1e-6), name
            assert not torch.allclose(own, value, atol=1e-4), name
        else:
            assert torch.equal(own, value), f"{name} lies before the blocks: it is the student's"
    assert [model.config.decay(step) for step in (0, 10, 999)] == pytest.approx([0.5, 0.9, 0.9])


def test_the_teacher_sees_everything_and_drops_nothing(corpus, batch) -> None:
    model, prepare = make(corpus, "encoder.dropout=0.5", "encoder.input_dropout=0.5")
    batch = prepared(prepare, batch)
    model.train()
    assert not any(part.training for part in model.teacher.modules())
    assert model.backbone.encoder.training
    frames, lengths = model.backbone.frontend(batch.inputs, batch.lengths)
    first, second = (model.teacher(frames, lengths) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    kept = []
    model.teacher.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(batch)
    assert torch.equal(kept[0], first), "masks are the student's alone"


def test_no_optimiser_and_every_checkpoint_has_the_teacher(corpus, train, tmp_path) -> None:
    model, _ = make(corpus)
    assert not [name for name, _ in model.named_parameters() if name.startswith("teacher.")]
    status, _, error = train("data2vec", "objective.ema_start=0.5", "objective.ema_end=0.5")
    assert status == 0, error
    folder = next((tmp_path / "exp/checkpoints").glob("step-*"))
    weights = load_file(folder / "model.safetensors")
    own = [name for name in weights if name.startswith("teacher.encoder.blocks.")]
    assert len(own) == len([name for name in weights if name.startswith("backbone.encoder.blocks.")])
    moved = [name for name in own if not torch.equal(weights[name], weights[name.replace("teacher", "backbone", 1)])]
    assert moved, "the student is ahead of it"


@pytest.mark.parametrize("which", ["target", "prediction"])
def test_a_collapse_ends_the_run(corpus, batch, which: str) -> None:
    model, prepare = make(corpus, "objective.collapse_after_steps=50")
    model.train()
    model(prepared(prepare, batch))
    model.after_step(100)  # healthy
    with torch.no_grad():
        if which == "prediction":
            model.project.weight.zero_()
        else:
            for block in model.backbone.encoder.blocks:
                block.down.weight.zero_()
            model.teacher.update(model.backbone.encoder, 0.0)
    for step in (40, 99):
        model(prepared(prepare, batch))
        model.after_step(step)  # too early, and not a step at which it looks
    model(prepared(prepare, batch))
    limit = {"target": "0.1", "prediction": "0.01"}[which]
    expected = (
        rf"data2vec has collapsed at step 200: its {which}s differ from frame to frame by 0\.001, "
        rf"expected at least `objective\.min_{which}_deviation` {limit}; lower `schedule.peak`"
    )
    with pytest.raises(HarkenError, match=expected):
        model.after_step(200)


def test_what_cannot_have_a_teacher_is_refused(corpus) -> None:
    with pytest.raises(HarkenError, match=r"`objective.top_layers` must lie in 1..2, the encoder's, got 3"):
        make(corpus, "objective.top_layers=3")
    with pytest.raises(HarkenError, match=r"data2vec` needs whole weights on each rank.*use stage 0, 1 or 2"):
        make(corpus, "engine.zero_stage=3")
    small = ["downsampling=[1]", "layers=[2]", "dims=[16]", "unmasked_dims=[8]", "ffn_dims=[32]", "heads=[4]"]
    small += ["kernels=[7]", "query_dims=[8]", "value_dims=[6]", "position_dim=16"]
    config = corpus.config(
        "data2vec",
        "filterbank",
        "encoder.name=zipformer",
        *(f"encoder.{one}" for one in small),
        "objective.targets=feed_forward",
    )
    with pytest.raises(HarkenError, match=r"`objective.targets: feed_forward` needs blocks of one rate and width"):
        build_objective(config)
