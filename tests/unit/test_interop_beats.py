"""Microsoft's BEATs checkpoints give its outputs, and what harken cannot compute is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from harken.apps.main import main
from harken.core.errors import HarkenError
from harken.encoders.saved import load_backbone
from harken.interop.beats import import_checkpoint, read_beats
from harken.interop.unpickle import read_checkpoint

GOLDEN = Path(__file__).resolve().parents[1] / "golden/microsoft"
ROWS = 8


@pytest.fixture(scope="module")
def golden(read_golden) -> dict[str, torch.Tensor]:
    return read_golden(GOLDEN / "beats.npz")


@pytest.fixture
def backbone(tmp_path):
    import_checkpoint(GOLDEN / "beats.pt", tmp_path / "beats")
    return load_backbone(tmp_path / "beats")[0].eval()


def encode(backbone, fbank: torch.Tensor, frames: int) -> torch.Tensor:
    """Encode energies that the original was fed in the place of its filterbank's; return tokens `(B, N, D)`."""
    x = backbone.encoder.embed(backbone.frontend.cut(fbank))
    last = backbone.encoder.encode(x, torch.full((len(fbank),), frames)).last
    return last.reshape(len(fbank), frames * ROWS, -1)


@torch.no_grad()
def test_the_output_of_every_patch(golden, backbone) -> None:
    found = encode(backbone, golden["fbank"], 6)
    assert found.shape == golden["final"].shape
    assert float((found - golden["final"]).abs().max()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("part", ["gates", "residual", "bias"])
def test_each_part_of_it_matters(golden, backbone, part) -> None:
    """So that the test above says something about it."""
    block = backbone.encoder.blocks[0]
    if part == "gates":
        block.attention.gate_scale.zero_()
    elif part == "residual":
        block.residual = 1.0
    else:
        backbone.encoder.bias.table.zero_()
    assert float((encode(backbone, golden["fbank"], 6) - golden["final"]).abs().max()) > 1e-3


@torch.no_grad()
def test_audio_is_scaled_as_the_original_scales_it(backbone) -> None:
    """Less 15.41663, over twice 6.55582 (`preprocess` of BEATs); log-mel energies are tested elsewhere."""
    wav = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    found = backbone.frontend.log_energies(wav, torch.tensor([16000]), None, None)
    expected = (backbone.frontend.log_mel(wav) - 15.41663) / (2 * 6.55582)
    assert torch.allclose(found, expected, atol=1e-6)
    frames = backbone(wav, torch.tensor([16000]))
    assert frames.lengths.tolist() == [98 // 16], "1 s is 98 windows of 25 ms"
    assert frames.last.shape == (1, 6, ROWS * 48)


def test_the_command_says_what_is_in_it(tmp_path, capsys) -> None:
    assert main(["import", str(GOLDEN / "beats.pt"), "--from", "beats", "--out", str(tmp_path / "beats")]) == 0
    out = capsys.readouterr().out
    assert f"a backbone of 3 wavlm layers of {ROWS * 48}\n" in out
    assert "not carried over: the head: BEATs' pretrained checkpoints hold none" in out


def saved(tmp_path: Path, change) -> Path:
    state = read_checkpoint(GOLDEN / "beats.pt")
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


def test_the_head_of_a_fine_tuned_model_is_left_behind(tmp_path) -> None:
    def add_head(state) -> None:
        state["model"].update({"predictor.weight": torch.zeros(527, 48), "predictor.bias": torch.zeros(527)})

    imported = read_beats(saved(tmp_path, add_head))
    assert imported.notes == ("the head: harken has no audio tagging",)
    assert not any("predictor" in name for name in imported.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("cfg"), "is no BEATs checkpoint: expected `cfg` and `model` in it"),
        (lambda state: state["cfg"].pop("input_patch_size"), "`input_patch_size` must divide its 128 bands"),
        (lambda state: state["cfg"].update(gru_rel_pos=False), "BEATs's `gru_rel_pos` must be true"),
        (lambda state: state["cfg"].update(activation_fn="glu"), "`activation_fn` must be 'gelu' to be read"),
        (lambda state: state["cfg"].update(layer_norm_first=True), "`encoder.deep_norm` is for norms behind"),
        (lambda state: state["model"].pop("patch_embedding.weight"), "missing `frontend.project.weight`"),
    ],
)
def test_what_harken_cannot_compute_is_refused_by_name(tmp_path, change, message) -> None:
    with pytest.raises(HarkenError) as caught:
        read_beats(saved(tmp_path, change))
    assert message in str(caught.value)


def test_nothing_in_the_file_is_run(tmp_path) -> None:
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    read_beats(saved(tmp_path, lambda state: state.update(extra=Hostile())))
    assert not (tmp_path / "ran").exists()
