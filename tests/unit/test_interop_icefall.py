"""k2SSL's checkpoints of icefall give its outputs and losses, alone and averaged; all else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import torch
from torch import Tensor

from harken.apps.main import main
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.encoders.saved import load_backbone
from harken.interop.icefall import import_average, read_average
from harken.objectives.saved import load_objective

GOLDEN = Path(__file__).resolve().parents[1] / "golden/icefall"
FORMAT = "icefall"
KINDS = ("zipformer", "hubert")
LENGTHS = torch.tensor([16000, 12000])


def checkpoint(kind: str) -> Path:
    return GOLDEN / f"icefall_{kind}.pt"


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", KINDS)
class TestGolden:
    @torch.no_grad()
    def test_output(self, kind, golden, folders) -> None:
        values = golden[kind]
        backbone, _ = load_backbone(folders[kind])
        found = backbone(values["wav"], LENGTHS)
        real = ~values["frame_padding"]
        assert found.lengths.tolist() == real.sum(1).tolist()
        error = difference(found.last[real], values["final"][real])
        if kind == "zipformer":  # which has no padded frames, only more of them
            error = max(error, difference(found.last, values["final"]))
        print(f"{kind} final {error:.1e}")
        assert error < 1e-4

    @torch.no_grad()
    def test_one_utterance_alone(self, kind, golden, folders) -> None:
        backbone, _ = load_backbone(folders[kind])
        found = backbone(golden[kind]["wav"][:1], LENGTHS[:1])
        print(f"{kind} single {difference(found.last, golden[kind]['single']):.1e}")
        assert difference(found.last, golden[kind]["single"]) < 1e-4

    @torch.no_grad()
    def test_loss_with_the_penalty(self, kind, golden, folders) -> None:
        values = golden[kind]
        model, _ = load_objective(folders[kind])
        mask, real = values["mask"], ~values["frame_padding"]
        targets = {
            "labels": values["labels"][..., None],
            "counted": (mask & real).sum(1),
            "mask": mask,
            "masked": (mask & real).flatten().nonzero()[:, 0],
            "unmasked": (~mask & real).flatten().nonzero()[:, 0],
        }
        count = float(len(targets["masked"]))
        assert count == float(values["count"])
        batch = Batch(ids=("a", "b"), inputs=values["wav"], lengths=LENGTHS, targets=targets, num_targets=count)
        loss = model(batch)
        relative = float(loss.total / values["loss_sum"]) - 1
        print(f"{kind} loss {relative:.1e}")
        assert abs(relative) < 1e-4
        penalty, _ = loss.metrics["features_penalty"]
        assert float(penalty) == pytest.approx(count * float(values["conv"].square().mean()), rel=1e-5)
        model.config = replace(model.config, penalty_over_padding=False)
        assert abs(float(model(batch).total / values["loss_sum"]) - 1) > 1e-4, "the padding's share must show"

    def test_the_folder_says_what_it_is(self, kind, folders) -> None:
        backbone, config = load_backbone(folders[kind])
        assert config.objective.head == "linear"
        assert config.objective.classes == (24,)
        assert config.encoder.name == {"zipformer": "zipformer", "hubert": "transformer"}[kind]
        assert backbone.encoder.num_layers == {"zipformer": 5, "hubert": 3}[kind]
        about = json.loads((folders[kind] / "imported.json").read_text())
        assert about["format"] == "icefall"
        assert [len(item["sha256"]) for item in about["checkpoints"]] == [64]
        assert "ScaledAdam" in about["not_carried_over"][-1]


class Run:
    """Checkpoints as a training writes them: paths, optimiser state and running averages among the options."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = torch.load(checkpoint("hubert"), weights_only=True)

    def save(self, name: str, steps: int, shift: float, **changes) -> Path:
        model = {key: value + shift for key, value in self.state["model"].items()}
        average = {key: (value + shift / 2).double() for key, value in self.state["model"].items()}
        state = {**self.state, "model": model, "model_avg": average, "batch_idx_train": steps, **changes}
        state.update(exp_dir=PurePosixPath("exp"), optimizer={"state": {0: {"step": torch.ones(1)}}}, sampler=None)
        state = {key: value for key, value in state.items() if value is not ...}
        torch.save(state, self.folder / name)
        return self.folder / name


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def bias(model: dict[str, Tensor]) -> Tensor:
    return model["codes.maps.0.bias"]


def test_averages(run: Run) -> None:
    start = run.state["model"]["final_proj.bias"]
    paths = [run.save("epoch-1.pt", 100, 1.0), run.save("epoch-2.pt", 300, 2.0)]
    assert torch.allclose(bias(read_average(paths).weights), start + 1.5)
    # averages over 100 and over 300 steps, so that over the 200 between is (300 x 1.0 - 100 x 0.5) / 200
    assert torch.allclose(bias(read_average(paths, running=True).weights), start + 1.25)
    assert torch.allclose(bias(read_average(paths[1:], running=True).weights), start + 1.0)
    found = read_average(paths)
    assert found.updates == 300
    assert found.config.train.steps == 300


def test_averages_that_make_no_sense_are_refused(run: Run) -> None:
    first, second = run.save("epoch-1.pt", 100, 1.0), run.save("epoch-2.pt", 300, 2.0)
    with pytest.raises(HarkenError, match=r"an earlier and a later checkpoint.* got 300 in .*epoch-2\.pt and 100 in"):
        read_average([second, first], running=True)
    with pytest.raises(HarkenError, match="between two, got 3 files"):
        read_average([first, first, second], running=True)
    bare = run.save("bare.pt", 300, 0.0, model_avg=...)
    with pytest.raises(HarkenError, match=r"bare\.pt holds no `model_avg`"):
        read_average([bare], running=True)
    with pytest.raises(HarkenError, match="hold other weights: only checkpoints of one run can be averaged"):
        read_average([checkpoint("zipformer"), checkpoint("hubert")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ...}, "no icefall checkpoint: expected a `model` in it"),
        ({"encoder_layers": ...}, "has neither `encoder_dim` nor `encoder_layers`"),
        ({"num_classes": [12, 12]}, r"`num_classes` must be a list of one number to be read, .* has \[12, 12\]"),
        ({"layer_type": "conformer"}, "`layer_type` must be 'transformer' to be read"),
    ],
)
def test_what_cannot_be_read_is_named(run: Run, changes, message) -> None:
    with pytest.raises(HarkenError, match=message):
        read_average([run.save("changed.pt", 1, 0.0, **changes)])


def test_a_zipformer_must_say_its_sizes(run: Run) -> None:
    run.state = torch.load(checkpoint("zipformer"), weights_only=True)
    with pytest.raises(HarkenError, match="it has no num_encoder_layers, num_heads"):
        read_average([run.save("a.pt", 1, 0.0, num_heads=..., num_encoder_layers=...)])
    with pytest.raises(HarkenError, match="`num_heads` must be integers with commas between, got 'four'"):
        read_average([run.save("b.pt", 1, 0.0, num_heads="four")])
    headless = {name: value for name, value in run.state["model"].items() if "final_proj" not in name}
    with pytest.raises(HarkenError, match="has no `final_proj`: the head of the pretraining was removed"):
        read_average([run.save("c.pt", 1, 0.0, model=headless)])


def test_the_command(run: Run, tmp_path, capsys) -> None:
    out = tmp_path / "model"
    assert main(["import", str(checkpoint("zipformer")), "--from", "icefall", "--out", str(out)]) == 0
    assert "hubert on 5 zipformer layers of 64" in capsys.readouterr().out
    paths = [str(run.save(f"epoch-{steps}.pt", steps, 0.1)) for steps in (1, 2)]
    command = ["import", *paths, "--from", "icefall", "--running-average", "--out", str(tmp_path / "average")]
    assert main(command) == 0
    about = json.loads((tmp_path / "average/imported.json").read_text())
    assert [item["name"] for item in about["checkpoints"]] == ["epoch-1.pt", "epoch-2.pt"]
    assert about["running_average"]
    assert main(["import", *paths, "--from", "fairseq", "--out", str(tmp_path / "other")]) == 2
    assert "averages are made of icefall's checkpoints alone" in capsys.readouterr().err
    with pytest.raises(HarkenError, match="exists already"):
        import_average([checkpoint("hubert")], out)
