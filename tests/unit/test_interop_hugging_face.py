"""Hugging Face's HuBERT gives the same hidden layers once its weights have harken's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import HubertConfig, HubertForCTC, HubertModel

from harken.config.load import load
from harken.config.saved import load_into
from harken.core.errors import HarkenError
from harken.encoders.backbone import Backbone, build_backbone
from harken.interop.hugging_face import weights_from_hugging_face

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
POSITIONS = {"num_conv_pos_embeddings": 15, "num_conv_pos_embedding_groups": 4}
PRESET = {False: "hubert_base", True: "hubert_large"}


def config(*, stable: bool) -> HubertConfig:
    norm = {"do_stable_layer_norm": stable, "feat_extract_norm": "layer" if stable else "group", "conv_bias": stable}
    return HubertConfig(**SIZES, **POSITIONS, **norm, conv_dim=(32,) * 7)


@torch.no_grad()
def model(kind: type[nn.Module], *, stable: bool) -> nn.Module:
    torch.manual_seed(0)
    made = kind(config(stable=stable)).eval()
    for value in made.parameters():  # norms that begin as one and zero would hide what is mixed up
        value.add_(torch.randn_like(value) * 0.05)
    return made


def backbone(weights: dict[str, Tensor], *, stable: bool) -> Backbone:
    changes = ["data.train=x", "frontend.channels=32", f"frontend.bias={stable}", "frontend.normalize=false"]
    changes += ["encoder.dim=48", "encoder.layers=3", "encoder.heads=4", "encoder.ffn_dim=96"]
    changes += ["encoder.position_kernel=15", "encoder.position_groups=4"]
    made = build_backbone(load([PRESET[stable]], changes).config).eval()
    own = {name.removeprefix("backbone."): value for name, value in weights.items()}
    load_into(made, own, Path("transformers"))
    return made


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("stable", [False, True])
@torch.no_grad()
def test_hidden_layers_equal_those_of_transformers(stable) -> None:
    theirs = model(HubertModel, stable=stable)
    ours = backbone(weights_from_hugging_face(theirs.state_dict()), stable=stable)
    wav = torch.randn(2, 8000)
    expected = theirs(wav, output_hidden_states=True)
    found = ours(wav, torch.tensor([8000, 8000]), layers=range(4))
    assert difference(found.last, expected.last_hidden_state) < 1e-4
    # the last of transformers' hidden layers of a pre-norm model is behind the final norm
    for layer in range(3 if stable else 4):
        assert difference(found.hidden[layer], expected.hidden_states[layer]) < 1e-4


def test_a_head_is_left_behind_and_half_precision_becomes_float32() -> None:
    whole = model(HubertForCTC, stable=False).half()
    found = weights_from_hugging_face(whole.state_dict())
    expected = weights_from_hugging_face(whole.hubert.state_dict())
    assert found.keys() == expected.keys()
    assert {value.dtype for value in found.values()} == {torch.float32}
    backbone(found, stable=False)


def test_the_older_names_of_the_positions_are_read() -> None:
    state = model(HubertModel, stable=False).state_dict()
    new = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    old = {f"{new}0": "encoder.pos_conv_embed.conv.weight_g", f"{new}1": "encoder.pos_conv_embed.conv.weight_v"}
    assert old.keys() <= state.keys()
    found = weights_from_hugging_face({old.get(name, name): value for name, value in state.items()})
    expected = weights_from_hugging_face(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_without_a_place_are_named() -> None:
    state = model(HubertModel, stable=False).state_dict()
    with pytest.raises(HarkenError, match=r"no place for these weights.*encoder\.layers\.0\.adapter_layer\.norm\.bias"):
        weights_from_hugging_face({**state, "encoder.layers.0.adapter_layer.norm.bias": torch.ones(48)})
    with pytest.raises(HarkenError, match=r"has k, v of .*blocks\.1\.attention\.qkv\.weight.*expected q, k and v"):
        weights_from_hugging_face({k: v for k, v in state.items() if "layers.1.attention.q_proj.weight" not in k})
