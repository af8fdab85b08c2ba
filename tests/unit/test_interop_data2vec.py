"""fairseq's data2vec checkpoints for speech: positions against a reference written here, models against `transformers`.

No public checkpoint is at hand. A model of `transformers` is saved as fairseq's `data2vec_audio.py` saves one: the
student's weights, `final_proj`, and in `_ema` the weights of the teacher's encoder.
"""

from __future__ import annotations

import re
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Data2VecAudioConfig, Data2VecAudioModel

from harken.apps.main import main
from harken.config.load import load
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.interop.fairseq import import_checkpoint, read_pretrained
from harken.nn.positions import StackedConvolutions
from harken.objectives.saved import build_prepare, load_objective

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
POSITIONS = {"conv_pos_kernel_size": 4, "num_conv_pos_embeddings": 3, "num_conv_pos_embedding_groups": 4}
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "T"]
# fairseq's names of what `transformers` calls otherwise; the order matters
RENAMED = (
    (r"^masked_spec_embed$", "mask_emb"),
    (r"^(feature_extractor\.conv_layers\.\d+)\.conv\.", r"\1.0."),
    (r"^(feature_extractor\.conv_layers\.\d+)\.layer_norm\.", r"\1.2.1."),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"^encoder\.pos_conv_embed\.layers\.(\d+)\.conv\.", r"encoder.pos_conv.\1.0."),
    (r"^(encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"^(encoder\.layers\.\d+)\.feed_forward\.intermediate_dense\.", r"\1.fc1."),
    (r"^(encoder\.layers\.\d+)\.feed_forward\.output_dense\.", r"\1.fc2."),
)
OPTIONS: dict[str, Any] = {
    "_name": "data2vec_audio",
    "extractor_mode": "layer_norm",
    "conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2",
    "encoder_layers": 3,
    "encoder_embed_dim": 48,
    "encoder_ffn_embed_dim": 96,
    "encoder_attention_heads": 4,
    "conv_pos": 13,
    "conv_pos_groups": 4,
    "pos_conv_depth": 3,
    "encoder_layerdrop": 0.05,
    "dropout_input": 0.0,
    "feature_grad_mult": 1.0,
    "mask_prob": 0.65,
    "mask_length": 10,
    "average_top_k_layers": 2,
    "instance_norm_target_layer": True,
    "ema_decay": 0.999,
    "ema_end_decay": 0.9999,
    "ema_anneal_end_step": 30000,
    "ema_transformer_only": True,
    "ema_layers_only": True,
    "loss_beta": 0,
    "loss_scale": None,
}


@torch.no_grad()
def theirs(seed: int) -> Data2VecAudioModel:
    torch.manual_seed(seed)
    made = Data2VecAudioModel(Data2VecAudioConfig(**SIZES, **POSITIONS, conv_dim=(32,) * 7)).eval()
    for value in made.parameters():  # norms that begin as one and zero would hide what is mixed up
        value.add_(torch.randn_like(value) * 0.05)
    return made


def fairseq_names(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, value in model.state_dict().items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


class Checkpoint:
    """A checkpoint as fairseq writes one; its parts may be changed before it is saved."""

    def __init__(self) -> None:
        self.model, self.teacher = theirs(0), theirs(1)
        torch.manual_seed(2)
        self.project = nn.Linear(48, 48)
        self.options = dict(OPTIONS)
        self.weights: dict[str, Any] = fairseq_names(self.model)
        self.weights |= {f"final_proj.{name}": value.detach() for name, value in self.project.named_parameters()}
        own = fairseq_names(self.teacher).items()
        self.weights["_ema"] = {name.removeprefix("encoder."): value for name, value in own if name[:8] == "encoder."}

    def groups(self) -> dict[str, Any]:
        return {
            "model": self.options,
            "task": {"_name": "audio_pretraining", "normalize": True, "max_sample_size": 320000},
            "criterion": {"_name": "model"},
            "optimization": {"max_update": 400000, "lr": [0.0005]},
            "optimizer": {"_name": "adam", "adam_betas": "(0.9,0.98)", "adam_eps": 1e-6, "weight_decay": 0.01},
            "lr_scheduler": {"_name": "tri_stage", "phase_ratio": [0.03, 0.9, 0.07]},
            "dataset": {"max_tokens": 3800000},
            "distributed_training": {"distributed_world_size": 16},
        }

    def save(self, folder: Path) -> Path:
        path = folder / "data2vec.pt"
        torch.save({"cfg": self.groups(), "model": self.weights}, path)
        return path


def without_normalisation(model: nn.Module) -> nn.Module:
    """fairseq normalises waveforms in its data set, not in its model."""
    assert model.backbone.frontend.config.normalize
    model.backbone.frontend.config = replace(model.backbone.frontend.config, normalize=False)
    return model


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# Positions


def positions_by_hand(module: StackedConvolutions, x: np.ndarray, kernel: int, groups: int) -> np.ndarray:
    """fairseq's `make_conv_block`, frame by frame: zeros before and behind, one frame less where the kernel is even."""
    for layer in module.layers:
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        frames, width = x.shape
        padded = np.concatenate([np.zeros((kernel // 2, width)), x, np.zeros((kernel // 2, width))])
        size = width // groups
        y = np.zeros_like(x)
        for frame in range(frames):
            for channel in range(width):
                first = channel // size * size
                seen = padded[frame : frame + kernel, first : first + size]
                y[frame, channel] = (seen.T * weight[channel]).sum() + bias[channel]
        y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
        x = 0.5 * y * (1 + torch.erf(torch.from_numpy(y) / 2**0.5).numpy())
    return x


@torch.no_grad()
@pytest.mark.parametrize(("frames", "depth", "kernel"), [(95, 5, 19), (13, 3, 4), (7, 4, 3)])
def test_positions_are_several_convolutions_in_a_row(frames: int, depth: int, kernel: int) -> None:
    torch.manual_seed(0)
    module = StackedConvolutions(8, frames, 2, depth).double()
    assert [layer.kernel_size for layer in module.layers] == [(kernel,)] * depth
    x = np.random.default_rng(0).standard_normal((11, 8))
    found = module(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(found, positions_by_hand(module, x, kernel, 2), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_padding_reaches_no_frame() -> None:
    torch.manual_seed(0)
    module = StackedConvolutions(8, 15, 2, 3)
    x = torch.randn(1, 20, 8)
    padded = (torch.arange(20) >= 12)[None]
    alone = module(x[:, :12])
    assert torch.allclose(module(x, padded)[:, :12], alone, atol=1e-6)
    assert not torch.allclose(module(x.masked_fill(padded[..., None], 0.0))[:, :12], alone, atol=1e-3)


# Checkpoints


@torch.no_grad()
def test_every_layer_is_that_of_transformers(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    import_checkpoint(checkpoint.save(tmp_path), tmp_path / "model")
    model = without_normalisation(load_objective(tmp_path / "model")[0])
    wav = torch.randn(2, 8000)
    expected = checkpoint.model(wav, output_hidden_states=True)
    found = model.backbone(wav, torch.tensor([8000, 8000]), layers=range(4))
    assert difference(found.last, expected.last_hidden_state) < 1e-4
    for layer in range(4):
        assert difference(found.hidden[layer], expected.hidden_states[layer]) < 1e-4
    assert difference(model.project(found.last), checkpoint.project(expected.last_hidden_state)) < 1e-4


@torch.no_grad()
def test_the_loss_has_the_teacher_of_the_checkpoint(tmp_path: Path) -> None:
    """fairseq's loss of two utterances of equal length: targets from the average, over what the student embeds."""
    checkpoint = Checkpoint()
    import_checkpoint(checkpoint.save(tmp_path), tmp_path / "model")
    model, config = load_objective(tmp_path / "model")
    without_normalisation(model)
    wav, lengths = torch.randn(2, 8000), torch.tensor([8000, 8000])
    batch = Batch(ids=("a", "b"), inputs=wav, lengths=lengths, targets={}, num_targets=1.0)
    batch = build_prepare(config, model.backbone.spec, train=True)(batch, [Draws(1, 0)] * 2)
    mask = batch.targets["mask"]
    student, teacher = checkpoint.model, checkpoint.teacher.encoder
    x, _ = student.feature_projection(student.feature_extractor(wav).transpose(1, 2))
    kept: list[Tensor] = []
    for block in teacher.layers[-2:]:
        block.feed_forward.register_forward_hook(lambda module, inputs, output: kept.append(output))
    teacher(x)
    targets = sum(nn.functional.instance_norm(y.transpose(1, 2)).transpose(1, 2) for y in kept) / 2
    x[mask] = student.masked_spec_embed
    predicted = checkpoint.project(student.encoder(x).last_hidden_state)
    expected = (predicted[mask] - targets[mask]).square().sum() / 48**0.5
    assert float(model(batch).total) == pytest.approx(float(expected), rel=1e-4)


def test_its_options_are_the_presets(tmp_path: Path) -> None:
    """The importer and the preset were written apart: fairseq's options, read by one, must give the other."""
    checkpoint = Checkpoint()
    found = read_pretrained(checkpoint.save(tmp_path))
    sizes = ["encoder.layers=3", "encoder.dim=48", "encoder.ffn_dim=96", "encoder.heads=4", "objective.top_layers=2"]
    sizes += ["encoder.position_kernel=13", "encoder.position_groups=4", "encoder.position_depth=3"]
    sizes += ["frontend.channels=32", "frontend.norm_over_padding=true"]
    preset = asdict(load(["data2vec_base"], ["data.train=x", *sizes]).config)
    config = asdict(found.config)
    for slot in ("frontend", "encoder", "objective", "optimizer", "schedule", "batch"):
        assert config[slot] == preset[slot]
    assert (config["train"]["steps"], config["train"]["clip_norm"]) == (400000, 0.0)
    assert config["data"]["crop_seconds"] == 20.0
    assert (found.targets, found.symbols, found.notes) == ("the teacher's last 2 layers", (), ())


def test_what_is_missing_or_otherwise_is_said(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    del checkpoint.weights["_ema"]
    checkpoint.options["layer_norm_targets"] = True
    found = read_pretrained(checkpoint.save(tmp_path))
    assert found.notes == (
        "`layer_norm_targets` is True, harken's data2vec_audio objective has False",
        "the teacher: there is no `_ema`, so that it starts as a copy of the student",
    )
    for name, value in found.weights.items():
        if name.startswith("teacher."):
            assert torch.equal(value, found.weights[name.replace("teacher.", "backbone.", 1)])


@torch.no_grad()
def test_a_model_fine_tuned_by_ctc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, head = Checkpoint(), nn.Linear(48, len(SYMBOLS))
    module = types.ModuleType("fairseq_dictionary")
    module.Dictionary = type("Dictionary", (), {"__module__": module.__name__})
    dictionary = module.Dictionary()
    dictionary.symbols = SYMBOLS
    weights = {f"w2v_encoder.w2v_model.{name}": value for name, value in fairseq_names(checkpoint.model).items()}
    weights["w2v_encoder.w2v_model._ema"] = checkpoint.weights["_ema"]  # a dict among tensors
    weights |= {f"w2v_encoder.proj.{name}": value for name, value in head.named_parameters()}
    options = {"_name": "wav2vec_ctc", "w2v_args": checkpoint.groups(), "layerdrop": 0.1, "final_dropout": 0.0}
    sys.modules[module.__name__] = module
    try:
        state = {"cfg": {"model": options}, "model": weights, "task_state": {"target_dictionary": dictionary}}
        torch.save(state, tmp_path / "ctc.pt")
    finally:
        del sys.modules[module.__name__]
    assert main(["import", str(tmp_path / "ctc.pt"), "--from", "fairseq", "--out", str(tmp_path / "model")]) == 0
    assert "ctc on 3 transformer layers of 48" in capsys.readouterr().out
    model = without_normalisation(load_objective(tmp_path / "model")[0])
    wav = torch.randn(2, 8000)
    batch = Batch(ids=("a", "b"), inputs=wav, lengths=torch.tensor([8000, 8000]), targets={}, num_targets=1.0)
    expected = torch.log_softmax(head(checkpoint.model(wav).last_hidden_state)[..., [0, 4, 5, 6]], dim=-1)
    assert difference(model.log_probs(batch)[0], expected) < 1e-4
