"""fairseq's HuBERT checkpoints give fairseq's outputs: layers, losses, penalties, logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from harken.core.batch import Batch
from harken.encoders.saved import load_backbone
from harken.objectives.saved import load_objective

GOLDEN = Path(__file__).resolve().parents[1] / "golden/fairseq"
FORMAT = "fairseq"
KINDS = ("base", "large")
LENGTHS = torch.tensor([16000, 12000])


def checkpoint(kind: str) -> Path:
    return GOLDEN / f"fairseq_hubert_{kind}.pt"


def objective(folder: Path, **frontend):
    """Open an imported model.

    fairseq normalises waveforms in its data set, and the goldens' were given to its model behind that, as they are. So
    `normalize` is off here.
    """
    model, _ = load_objective(folder)
    model.backbone.frontend.config = replace(model.backbone.frontend.config, **{"normalize": False, **frontend})
    return model


def golden_batch(values: dict[str, torch.Tensor], *, unmasked: bool = False) -> Batch:
    mask, real = values["mask"], ~values["frame_padding"]
    counted = (real if unmasked else mask & real).sum(1)
    targets = {
        "counted": counted,
        "labels": values["labels"][..., None],
        "mask": mask,
        "masked": (mask & real).flatten().nonzero()[:, 0],
        "unmasked": (~mask & real).flatten().nonzero()[:, 0],
    }
    count = float(counted.sum())
    return Batch(ids=("a", "b"), inputs=values["wav"], lengths=LENGTHS, targets=targets, num_targets=count)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", KINDS)
class TestGolden:
    @torch.no_grad()
    def test_every_layer_and_the_output(self, kind, golden, folders) -> None:
        values, backbone = golden[kind], objective(folders[kind]).backbone
        found = backbone(values["wav"], LENGTHS, layers=range(4))
        expected_lengths = (~values["frame_padding"]).sum(1)
        assert found.lengths.tolist() == expected_lengths.tolist()
        for layer in (1, 2, 3):
            assert difference(found.hidden[layer], values[f"layer{layer}"]) < 1e-4
        assert difference(found.last, values["final"]) < 1e-4

    @torch.no_grad()
    def test_one_utterance_alone(self, kind, golden, folders) -> None:
        backbone = objective(folders[kind]).backbone
        found = backbone(golden[kind]["wav"][:1], LENGTHS[:1])
        assert difference(found.last, golden[kind]["single"]) < 1e-4

    @torch.no_grad()
    def test_loss(self, kind, golden, folders) -> None:
        values, model = golden[kind], objective(folders[kind])
        loss = model(golden_batch(values))
        total, count = loss.metrics["loss"]
        assert int(count) == len(values["logits_pos_first"])
        assert float(total) == pytest.approx(float(values["loss_sum"]), rel=1e-6)
        penalty, _ = loss.metrics["features_penalty"]
        expected = float(values["loss_sum"]) + model.config.penalty_weight * float(penalty)
        assert float(loss.total) == pytest.approx(expected, rel=1e-6)

    @torch.no_grad()
    def test_penalty(self, kind, golden, folders) -> None:
        """fairseq's is over the whole batch, padding included; harken's weighs utterances by the frames that count.

        The two agree where lengths and counts are equal, so both waveforms are taken in full, under one mask. fairseq
        multiplies it by all frames that have a cross entropy (`sample_size` of its `HubertCriterion`).
        """
        values, model = golden[kind], objective(folders[kind])
        mask = values["mask"][:1].expand(2, -1)
        full = {**values, "mask": mask, "frame_padding": torch.zeros_like(values["frame_padding"])}
        loss = model(replace(golden_batch(full), lengths=torch.tensor([16000, 16000])))
        total, count = loss.metrics["features_penalty"]
        assert int(count) == 2 * int(mask[0].sum())
        assert float(total / count) == pytest.approx(float(values["features_pen"]), rel=1e-6)
        model.config = replace(model.config, unmasked_weight=1.0)
        loss = model(replace(golden_batch(full, unmasked=True), lengths=torch.tensor([16000, 16000])))
        total, count = loss.metrics["features_penalty"]
        assert int(count) == mask.numel()
        assert float(total / count) == pytest.approx(float(values["features_pen"]), rel=1e-6)

    @torch.no_grad()
    def test_logits(self, kind, golden, folders) -> None:
        values, model = golden[kind], objective(folders[kind])
        batch = golden_batch(values)
        _, x, lengths = model.backbone.embed(batch.inputs, LENGTHS, {"mask": values["mask"]})
        masked = model.backbone.encoder.encode(x, lengths).last.flatten(0, 1)[batch.targets["masked"]]
        (logits,) = model.codes(model.project(masked)[:, None])
        labels = batch.targets["labels"].flatten()[batch.targets["masked"]]
        expected = values["logits_pos_first"]
        assert difference(logits.gather(1, labels[:, None])[:, 0], expected[:, 0]) < 1e-4
        others = logits.scatter(1, labels[:, None], -torch.inf)
        assert torch.equal(others.isinf(), expected[:, 1:].isinf())
        assert difference(others.nan_to_num(neginf=0.0), expected[:, 1:].nan_to_num(neginf=0.0)) < 1e-4

    @torch.no_grad()
    def test_without_the_original_s_group_norm_padding_changes_nothing(self, kind, golden, folders) -> None:
        wav = golden[kind]["wav"]
        backbone = objective(folders[kind], norm_over_padding=False).backbone
        together = backbone(wav, LENGTHS)
        alone = backbone(wav[1:, :12000], LENGTHS[1:])
        assert difference(together.last[1, : alone.last.shape[1]], alone.last[0]) < 1e-4
        if kind == "base":  # and with it, padding does change the output, so that the test above says something
            original = objective(folders[kind]).backbone(wav, LENGTHS)
            assert difference(original.last[1, : alone.last.shape[1]], alone.last[0]) > 1e-3

    def test_the_folder_opens_and_says_where_it_comes_from(self, kind, folders) -> None:
        backbone, config = load_backbone(folders[kind])
        assert backbone.encoder.num_layers == 3
        assert config.frontend.normalize == (kind == "large")
        assert config.encoder.norm_first == (kind == "large")
        assert config.frontend.norm_over_padding
        assert config.objective.classes == (24,)
        assert config.data.train == f"give data.train: this model was imported from {checkpoint(kind).name}"
        about = json.loads((folders[kind] / "imported.json").read_text())
        assert about["symbols"] == [["<s>", "<pad>", "</s>", "<unk>", *map(str, range(20))]]
        assert len(about["sha256"]) == 64


@torch.no_grad()
def test_a_large_model_normalises_as_fairseq_s_data_set_does(golden, folders) -> None:
    wav = golden["large"]["wav"][:1] * 0.3 + 0.1
    raw = objective(folders["large"]).backbone(functional.layer_norm(wav, wav.shape[1:]), LENGTHS[:1])
    model, _ = load_objective(folders["large"])
    assert difference(model.backbone(wav, LENGTHS[:1]).last, raw.last) < 1e-5
