"""fairseq's wav2vec 2.0 checkpoints give fairseq's outputs and codes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from harken.apps.main import main
from harken.config.load import load
from harken.core.errors import HarkenError
from harken.encoders.backbone import build_backbone
from harken.interop.fairseq import import_checkpoint, read_pretrained
from harken.interop.unpickle import plain, read_checkpoint
from harken.objectives.saved import load_objective

GOLDEN = Path(__file__).resolve().parents[1] / "golden/fairseq"
KINDS = ("base", "large")
LENGTHS = torch.tensor([16000, 16000])


def checkpoint(kind: str) -> Path:
    return GOLDEN / f"fairseq_wav2vec2_{kind}.pt"


@pytest.fixture(scope="module", params=KINDS)
def case(request, read_golden, tmp_path_factory):
    """What fairseq returned, and the imported model; fairseq normalises waveforms in its data set, not in its model."""
    values = read_golden(checkpoint(request.param).with_suffix(".npz"))
    folder = tmp_path_factory.mktemp("imported") / request.param
    import_checkpoint(checkpoint(request.param), folder)
    model, config = load_objective(folder)
    assert config.frontend.normalize == (request.param == "large")
    model.backbone.frontend.config = replace(model.backbone.frontend.config, normalize=False)
    return values, model


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def test_every_layer_and_the_output(case) -> None:
    values, model = case
    frames, _ = model.backbone.frontend(values["wav"], LENGTHS)
    assert difference(frames, values["conv"]) < 1e-4
    found = model.backbone(values["wav"], LENGTHS, layers=range(4))
    for layer in (1, 2, 3):
        assert difference(found.hidden[layer], values[f"layer{layer}"]) < 1e-4
    assert difference(found.last, values["final"]) < 1e-4


@torch.no_grad()
def test_the_quantisers_targets(case) -> None:
    values, model = case
    frames, _ = model.backbone.frontend(values["wav"], LENGTHS)
    found = model.quantizer(model.backbone.encoder.normalise(frames))
    assert torch.equal(found.codes, values["targets"])
    assert len(torch.unique(found.codes)) > 2
    assert difference(found.vectors, values["quantized"]) < 1e-4


@pytest.fixture
def changed(tmp_path):
    """Write a golden checkpoint anew after a change of its options and weights, and read it."""

    def read(options=None, remove: str = "", **groups):
        state = dict(read_checkpoint(checkpoint("base")))
        state["cfg"] = {**plain(state["cfg"]), **groups}
        state["cfg"]["model"] = {**state["cfg"]["model"], **(options or {})}
        state["model"] = {name: value for name, value in state["model"].items() if name != remove}
        torch.save(state, tmp_path / "changed.pt")
        return read_pretrained(tmp_path / "changed.pt")

    return read


def test_its_options_are_the_presets(changed) -> None:
    """The importer and the preset were written apart: fairseq's options, read by one, must give the other."""
    model = {"encoder_layerdrop": 0.05, "dropout_input": 0.1, "dropout_features": 0.1, "feature_grad_mult": 0.1}
    optimization = {"max_update": 400000, "lr": [0.0005]}
    task = {"max_sample_size": 250000, "min_sample_size": 32000, "normalize": False}
    found = changed(
        {**model, "num_negatives": 100},
        criterion={"_name": "wav2vec", "infonce": True, "loss_weights": [0.1, 10]},
        optimization=optimization,
        task=task,
        dataset={"max_tokens": 1400000},
        distributed_training={"distributed_world_size": 64},
        lr_scheduler={"_name": "polynomial_decay", "warmup_updates": 32000},
    )
    sizes = ["encoder.layers=3", "encoder.dim=48", "encoder.ffn_dim=96", "encoder.heads=4", "objective.code_dim=24"]
    sizes += ["encoder.position_kernel=16", "encoder.position_groups=4", "frontend.channels=32", "objective.entries=8"]
    preset = asdict(load(["wav2vec2_base"], ["data.train=x", "frontend.norm_over_padding=true", *sizes]).config)
    config = asdict(found.config)
    for slot in ("frontend", "encoder", "objective", "optimizer", "schedule", "batch"):
        assert config[slot] == preset[slot]
    assert (config["train"]["steps"], config["train"]["clip_norm"]) == (400000, 0.0)
    assert (found.targets, found.symbols, found.notes) == ("codebooks: 2 of 8 entries", (), ())


def test_what_the_training_did_otherwise_is_said(changed) -> None:
    found = changed({"cross_sample_negatives": 10, "latent_temp": "(2,0.1,0.999)"})
    assert found.notes == ("`cross_sample_negatives` is 10, harken's wav2vec2 objective has 0",)
    assert (found.config.objective.gumbel_end, found.config.objective.gumbel_decay) == (0.1, 0.999)


@pytest.mark.parametrize(
    ("options", "remove", "message"),
    [
        ({"quantize_input": True}, "", r"`quantize_input` must be False to be read"),
        ({"quantize_targets": False}, "", r"`quantize_targets` must be True to be read"),
        ({"quantizer_depth": 2}, "", r"`quantizer_depth` must be 1 to be read, .* has 2"),
        ({"latent_vars": 9}, "", r"`quantizer.vars` in .* must hold 2 groups of 9 entries, found shape \(1, 16, 12\)"),
        ({}, "quantizer.vars", r"has no `quantizer.vars`: the head of wav2vec 2.0's pretraining was removed"),
        ({}, "project_q.bias", r"missing `project_target.bias`"),
        (
            {"_name": "wav2vec_seq2seq"},
            "",
            r"holds a fairseq `wav2vec_seq2seq` model: .* `hubert`, `wav2vec2`, `data2vec_audio` models",
        ),
    ],
)
def test_what_is_not_supported_is_named(changed, options, remove, message) -> None:
    with pytest.raises(HarkenError, match=message):
        changed(options, remove)


def test_the_command(tmp_path, capsys) -> None:
    out = tmp_path / "model"
    assert main(["import", str(checkpoint("large")), "--from", "fairseq", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "wav2vec2 on 3 transformer layers of 48" in shown
    assert "codebooks: 2 of 8 entries; updates it was trained for: not recorded" in shown


# Backbones in millions of parameters: those of arXiv 2006.11477 section 4.2.
@pytest.mark.parametrize(("name", "size"), [("wav2vec2_base", 95), ("wav2vec2_large", 317)])
def test_a_preset_is_the_published_model(name: str, size: int) -> None:
    config = load([name], ["data.train=train.jsonl"]).config
    with torch.device("meta"):
        backbone = build_backbone(config)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(size, rel=0.01)
    assert config.objective.diversity_over == "batch"
