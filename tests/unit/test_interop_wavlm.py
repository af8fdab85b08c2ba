"""Microsoft's WavLM checkpoints give its outputs at every layer, and what harken cannot compute is refused by name."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from harken.apps.main import main
from harken.config.load import from_dict
from harken.core.errors import HarkenError
from harken.encoders.saved import load_backbone
from harken.interop.unpickle import read_checkpoint
from harken.interop.wavlm import read_wavlm
from harken.objectives.saved import build_objective

GOLDEN = Path(__file__).resolve().parents[1] / "golden/microsoft"
FORMAT = "wavlm"
KINDS = ("base", "large")
LENGTHS = torch.tensor([16000, 12000])


def checkpoint(kind: str) -> Path:
    return GOLDEN / f"wavlm_{kind}.pt"


def backbone_of(folder: Path, **frontend):
    """Open an imported backbone; the original normalises outside of the model, so it is off here."""
    backbone, _ = load_backbone(folder)
    backbone.frontend.config = replace(backbone.frontend.config, **{"normalize": False, **frontend})
    return backbone


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_layer_and_the_output(kind, golden, folders) -> None:
    values = golden[kind]
    found = backbone_of(folders[kind])(values["wav"], LENGTHS, layers=range(4))
    assert found.lengths.tolist() == (~values["frame_padding"]).sum(1).tolist()
    for layer in range(4):
        assert difference(found.hidden[layer], values[f"layer{layer}"]) < 1e-4, layer
    assert difference(found.last, values["final"]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_utterance_alone(kind, golden, folders) -> None:
    found = backbone_of(folders[kind])(golden[kind]["wav"][:1], LENGTHS[:1])
    assert difference(found.last, golden[kind]["single"]) < 1e-4


@torch.no_grad()
def test_the_bias_and_its_gates_matter(golden, folders) -> None:
    """So that the tests above say something about them."""
    values = golden["base"]
    for change in (
        lambda encoder: encoder.bias.table.zero_(),
        lambda encoder: encoder.blocks[0].attention.gate_scale.zero_(),
    ):
        backbone = backbone_of(folders["base"])
        change(backbone.encoder)
        assert difference(backbone(values["wav"], LENGTHS).last, values["final"]) > 1e-3


def test_the_command_says_what_is_in_it_and_the_model_starts_a_run(tmp_path, corpus, capsys) -> None:
    folder = tmp_path / "wavlm"
    assert main(["import", str(checkpoint("large")), "--from", "wavlm", "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: a backbone of 3 wavlm layers of 48\n" in out
    assert "classes: none, it holds no head" in out
    about = json.loads((folder / "imported.json").read_text())
    assert about["format"] == "wavlm"
    assert about["not_carried_over"] == ["the head: WavLM's checkpoints hold none"]

    _, config = load_backbone(folder)
    assert config.frontend.normalize
    assert (config.encoder.position_buckets, config.encoder.position_max_distance) == (32, 80)
    settings = corpus.settings("ctc", "waveform")
    settings.update(frontend=asdict(config.frontend), encoder=asdict(config.encoder))
    settings["train"]["init_from"] = str(folder)
    model = build_objective(from_dict(settings))
    table = read_checkpoint(checkpoint("large"))["model"]["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    assert torch.equal(model.backbone.encoder.bias.table.detach(), table)


def saved(tmp_path: Path, change) -> Path:
    state = read_checkpoint(checkpoint("base"))
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("cfg"), "is no WavLM checkpoint: expected `cfg` and `model` in it"),
        (lambda state: state["cfg"].update(gru_rel_pos=False), "`gru_rel_pos` must be true to be read"),
        (lambda state: state["cfg"].update(activation_fn="glu"), "`activation_fn` must be 'gelu' to be read"),
        (lambda state: state["cfg"].update(num_buckets="many"), "position_buckets"),
        (
            lambda state: state["model"].pop("encoder.layers.1.self_attn.grep_a"),
            "missing `encoder.blocks.1.attention.gate_scale`",
        ),
        (
            lambda state: state["model"].update({"encoder.layers.0.self_attn.extra": torch.zeros(1)}),
            "has no place for these weights",
        ),
    ],
)
def test_what_harken_cannot_compute_is_refused_by_name(tmp_path, change, message) -> None:
    with pytest.raises(HarkenError) as caught:
        read_wavlm(saved(tmp_path, change))
    assert message in str(caught.value)


def test_nothing_in_the_file_is_run(tmp_path) -> None:
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = saved(tmp_path, lambda state: state.update(extra=Hostile()))
    read_wavlm(path)
    assert not (tmp_path / "ran").exists()
