"""What fairseq's HuBERT checkpoints hold besides weights is read, or refused by name; presets are its own options."""

from __future__ import annotations

import argparse
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from harken.apps.main import main
from harken.config.load import PRESETS, load
from harken.core.errors import HarkenError
from harken.encoders.backbone import build_backbone
from harken.interop.fairseq import Imported, read_pretrained
from harken.interop.fairseq_options import parse_convolutions
from harken.interop.unpickle import plain, read_checkpoint

BASE = Path(__file__).resolve().parents[1] / "golden/fairseq/fairseq_hubert_base.pt"


class Changed:
    """A golden checkpoint written anew after a change, its dictionaries as objects of a class that is then gone."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "changed.pt"
        self.state = dict(read_checkpoint(BASE))
        self.state["cfg"] = plain(self.state["cfg"])
        self.sizes: tuple[int, ...] | None = (24,)

    @property
    def model(self) -> dict:
        return self.state["cfg"]["model"]

    def read(self) -> Imported:
        module = types.ModuleType("fairseq_dictionary")
        module.Dictionary = type("Dictionary", (), {"__module__": module.__name__})
        self.state["task_state"] = {}
        if self.sizes is not None:
            self.state["task_state"]["dictionaries"] = [module.Dictionary() for _ in self.sizes]
            for size, item in zip(self.sizes, self.state["task_state"]["dictionaries"], strict=True):
                item.symbols = [str(index) for index in range(size)]
        sys.modules[module.__name__] = module
        try:
            torch.save(self.state, self.path)
        finally:
            del sys.modules[module.__name__]
        return read_pretrained(self.path)


@pytest.fixture
def changed(tmp_path) -> Changed:
    return Changed(tmp_path)


@pytest.fixture(scope="module")
def original() -> Imported:
    return read_pretrained(BASE)


def assert_same_model(found: Imported, expected: Imported) -> None:
    for slot in ("frontend", "encoder", "objective"):
        assert getattr(found.config, slot) == getattr(expected.config, slot)
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], expected.weights[name]) for name in expected.weights)


def test_a_configuration_of_omegaconf_objects(changed, original) -> None:
    changed.state["cfg"] = OmegaConf.create(changed.state["cfg"])
    assert_same_model(changed.read(), original)


def test_the_old_layout_with_a_flat_namespace(changed, original) -> None:
    options = changed.state.pop("cfg")
    flat = {**options["task"], **options["model"]}
    flat.update(_name=None, arch="hubert", task="hubert_pretraining", criterion="hubert", optimizer="adam")
    flat.update(
        adam_betas="(0.9, 0.95)",
        lr=[3e-4],
        max_update=7,
        loss_weights="[10]",
        lr_scheduler="polynomial_decay",
    )
    changed.state["args"] = argparse.Namespace(**flat)
    found = changed.read()
    assert_same_model(found, original)
    assert found.config.optimizer.betas == (0.9, 0.95)
    assert found.config.schedule.peak == 3e-4
    assert found.config.train.steps == 7
    assert found.notes == ()


def test_weights_in_half_precision_become_float32(changed) -> None:
    changed.state["model"] = {name: value.half() for name, value in changed.state["model"].items()}
    found = changed.read()
    assert {value.dtype for value in found.weights.values()} == {torch.float32}


def test_two_codebooks_and_no_dictionaries(changed) -> None:
    changed.sizes = (14, 10)
    assert changed.read().config.objective.classes == (14, 10)
    changed.sizes = (14, 9)
    with pytest.raises(HarkenError, match=r"embeds 24 classes.*\[14, 9\]"):
        changed.read()
    changed.sizes = None
    found = changed.read()
    assert found.config.objective.classes == (24,)
    assert found.symbols == ()


def test_the_training_is_described_as_far_as_it_is_known(changed) -> None:
    options = changed.state["cfg"]
    options["task"].update(max_sample_size=250000, min_sample_size=16000)
    options["dataset"] = {"max_tokens": 900000}
    options["distributed_training"] = {"distributed_world_size": 128}
    options["optimization"] = {"lr": [0.0015], "clip_norm": 1.0, "max_update": 400000, "update_freq": [2]}
    options["optimizer"] = {
        "_name": "adam",
        "adam_betas": "(0.9,0.98)",
        "adam_eps": 1e-8,
        "weight_decay": 0.1,
    }
    options["lr_scheduler"] = {"_name": "tri_stage"}
    options["criterion"] = {"_name": "hubert", "pred_nomask_weight": 0.5, "loss_weights": [3]}
    options["model"]["mask_channel_prob"] = 0.25
    changed.state["optimizer_history"] = [{"num_updates": 5}, {"num_updates": 9}]
    found = changed.read()
    config = found.config
    assert (config.data.crop_seconds, config.data.min_seconds) == (15.625, 1.0)
    assert (config.batch.max_seconds, config.batch.seconds_per_step) == (56.25, 14400.0)
    assert (config.schedule.peak, config.train.clip_norm, config.train.steps) == (0.0015, 1.0, 400000)
    assert (config.optimizer.eps, config.optimizer.weight_decay) == (1e-8, 0.1)
    assert (config.objective.penalty_weight, config.objective.unmasked_weight) == (3.0, 0.5)
    assert found.updates == 9
    assert found.notes == (
        "`mask_channel_prob` is 0.25, harken's hubert objective has 0",
        "`lr_scheduler` is 'tri_stage', the configuration has what stands for 'polynomial_decay'",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_type", "conformer"),
        ("activation_fn", "relu"),
        ("target_glu", True),
        ("conv_pos_batch_norm", True),
        ("pos_enc_type", "rel_pos"),
        ("extractor_mode", "batch_norm"),
        ("conv_feature_layers", "[(16,10,5), (32,3,2)]"),
        ("conv_feature_layers", "__import__('os').getcwd()"),
        ("encoder_layers", "three"),
    ],
)
def test_an_unsupported_option_is_named(changed, name, value) -> None:
    changed.model[name] = value
    shown = "encoder.layers" if name == "encoder_layers" else name
    with pytest.raises(HarkenError, match=rf"`{shown}` must "):
        changed.read()


def test_other_models_and_files_are_refused(changed, tmp_path) -> None:
    changed.model["_name"] = "hubert_seq2seq_asr"
    with pytest.raises(HarkenError, match="holds a fairseq `hubert_seq2seq_asr` model"):
        changed.read()
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(HarkenError, match="no fairseq checkpoint: expected a `model`"):
        read_pretrained(tmp_path / "other.pt")
    torch.save({"model": {}}, tmp_path / "bare.pt")
    with pytest.raises(HarkenError, match="neither `cfg` nor `args`"):
        read_pretrained(tmp_path / "bare.pt")


def test_weights_that_do_not_fit_are_named(changed) -> None:
    weights = changed.state["model"]
    changed.state["model"] = {**weights, "encoder.layers.0.adapter.weight": torch.ones(1)}
    with pytest.raises(HarkenError, match=r"no place for these weights.*encoder\.layers\.0\.adapter\.weight"):
        changed.read()
    changed.state["model"] = {k: v for k, v in weights.items() if k != "encoder.layers.1.fc1.bias"}
    with pytest.raises(HarkenError, match=r"missing `backbone\.encoder\.blocks\.1\.up\.bias`"):
        changed.read()
    changed.state["model"] = {k: v for k, v in weights.items() if "layers.1.self_attn.k" not in k}
    with pytest.raises(HarkenError, match=r"has q, v of .*expected q, k and v"):
        changed.read()
    changed.state["model"] = {**weights, "mask_emb": torch.ones(47)}
    with pytest.raises(HarkenError, match=r"shape \(47,\), expected \(48,\)"):
        changed.read()
    changed.state["model"] = {k: v for k, v in weights.items() if k != "label_embs_concat"}
    with pytest.raises(HarkenError, match="the head of HuBERT's pretraining was removed"):
        changed.read()


def test_convolutions_are_parsed() -> None:
    released = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    expected = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]
    assert parse_convolutions(released) == expected
    assert parse_convolutions(" [(256*2, 5+5, 5)] + 2*2 * [(512,3,2)] + [(512,) + (2,2)] * 2") == expected
    assert parse_convolutions([[512, 10, 5]]) == [(512, 10, 5)]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "[x for x in ((1,2,3),)]",
        "[(1,2,3)] * 10**9",
        "[(1,2,3)] * 1000000000",
        "[(1,2)]",
        "[(1,2,'3')]",
        "[(512,10,5)",
        "(" * 2000,
        "3",
        7,
    ],
)
def test_convolutions_that_are_none_are_refused(text) -> None:
    with pytest.raises(HarkenError, match="`conv_feature_layers` must be a list"):
        parse_convolutions(text)


def test_the_command(tmp_path, capsys) -> None:
    out = tmp_path / "model"
    assert main(["import", str(BASE), "--from", "fairseq", "--out", str(out)]) == 0
    assert "hubert on 3 transformer layers of 48" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml",
        "imported.json",
        "model.safetensors",
    ]
    assert main(["import", str(BASE), "--from", "fairseq", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["import", "nowhere.pt", "--from", "fairseq", "--out", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


# Backbones as the paper counts them (arXiv 2106.07447 table I), in millions of parameters.
SIZES = {"hubert_base": 95, "hubert_large": 317, "hubert_xlarge": 964}


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_is_the_published_model(name) -> None:
    assert (PRESETS / f"{name}.yaml").is_file()
    with pytest.raises(HarkenError, match=r"missing value for `data\.train`"):
        load([name])
    config = load([name], ["data.train=train.jsonl"]).config
    with torch.device("meta"):
        backbone = build_backbone(config)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(SIZES[name], rel=0.01)
    assert config.schedule.warmup_steps / config.train.steps == 0.08


def test_presets_are_what_fairseq_s_own_options_give(changed) -> None:
    """The importer and the preset were written apart: fairseq's options, read by one, must give the other."""
    cfg = changed.state["cfg"]
    del cfg["model"]
    cfg["model"] = {"_name": "hubert", "mask_prob": 0.80, "final_dim": 24, "untie_final_proj": True}
    cfg["model"].update(dropout_input=0.1, encoder_layerdrop=0.05, feature_grad_mult=0.1)
    small = {"encoder_layers": 3, "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 96}
    small.update(encoder_attention_heads=4, conv_pos=16, conv_pos_groups=4)
    small["conv_feature_layers"] = "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2"
    cfg["model"].update(small)
    cfg["task"].update(max_sample_size=250000, min_sample_size=32000, normalize=False)
    cfg["dataset"] = {"max_tokens": 1400000}
    cfg["distributed_training"] = {"distributed_world_size": 32}
    cfg["optimization"] = {"max_update": 400000, "lr": [0.0005], "clip_norm": 10.0}
    cfg["lr_scheduler"] = {"_name": "polynomial_decay", "warmup_updates": 32000}
    found = asdict(changed.read().config)
    sizes = [
        "encoder.layers=3",
        "encoder.dim=48",
        "encoder.ffn_dim=96",
        "encoder.heads=4",
        "objective.code_dim=24",
    ]
    sizes += ["encoder.position_kernel=16", "encoder.position_groups=4", "frontend.channels=32"]
    changes = ["data.train=x", "objective.classes=[24]", "frontend.norm_over_padding=true", *sizes]
    preset = asdict(load(["hubert_base"], changes).config)
    for slot in ("frontend", "encoder", "objective", "optimizer", "schedule", "batch"):
        assert found[slot] == preset[slot]
    for key in ("min_seconds", "max_seconds", "crop_seconds", "sample_rate"):
        assert found["data"][key] == preset["data"][key]
    assert (found["train"]["steps"], found["train"]["clip_norm"]) == (400000, 10.0)


def test_help_imports_no_torch() -> None:
    code = "import sys, harken.apps.import_; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
