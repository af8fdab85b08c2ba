"""data2vec-aqc against its released formulas, written out here frame by frame; data2vec where nothing is added."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.objectives.saved import build_objective, build_prepare
from harken.units.kmeans import cosine_clusters

SIZE = 2 * 6  # groups times entries of the tiny configuration


def make(corpus, *overrides: str):
    config = corpus.config("data2vec_aqc", "filterbank", "encoder.layer_drop=0", *overrides)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    return model, build_prepare(config, model.backbone.spec, train=True)


def drawn(prepare, batch, epoch: int = 0):
    return prepare(batch, [Draws(1, epoch)] * len(batch.ids))


def clusters_by_hand(points: list[np.ndarray], starts: list[int], passes: int) -> list[int]:
    """k-means with cosines, a point at a time; the first of centroids that are equally near wins."""
    centroids = [points[start] for start in starts]
    labels: list[int] = []
    for turn in range(passes + 1):
        labels = []
        for point in points:
            cosines = [float(point @ one / np.linalg.norm(one)) for one in centroids]
            labels.append(next(i for i, cosine in enumerate(cosines) if cosine > max(cosines) - 2e-6))
        for index in range(len(centroids)):
            members = [point for point, label in zip(points, labels, strict=True) if label == index]
            if members and turn < passes:
                centroids[index] = np.mean(members, 0)
    return labels


def quantised_by_hand(model, frames: torch.Tensor) -> tuple[list[tuple[int, ...]], list[torch.Tensor], torch.Tensor]:
    """Codes and projected vectors of frames `(M, F)`, and the probabilities of the entries `(M, G, V)`."""
    own, norm = model.config, model.backbone.encoder.input_norm
    codes, vectors, soft = [], [], []
    for frame in functional.layer_norm(frames, frames.shape[-1:], norm.weight, norm.bias):
        logits = model.quantizer.logits(frame).view(own.groups, own.entries)
        codes.append(tuple(logits.argmax(-1).tolist()))
        parts = [model.quantizer.codebook[group, code] for group, code in enumerate(codes[-1])]
        vectors.append(model.project_target(torch.cat(parts)))
        soft.append(logits.softmax(-1))
    return codes, vectors, torch.stack(soft)


def term_by_hand(own, x, codes, vectors, labels, negatives) -> float:
    """The cross entropy of frames `(M, D)` with quantised ones: index 0 is right, alike negatives count less."""
    total = 0.0
    for index, frame in enumerate(x):
        scores = [functional.cosine_similarity(frame, vectors[index], dim=0) / own.temperature]
        for other in negatives[index]:
            score = functional.cosine_similarity(frame, vectors[other], dim=0) / own.temperature
            if codes[other] != codes[index]:
                scores.append(score * (own.cluster_scale if labels[other] == labels[index] else 1.0))
        total += float(torch.stack(scores).exp().sum().log() - scores[0])
    return total


def by_hand(model, batch) -> dict[str, float]:
    """`Data2VecAudioModel.forward` of data2vec-aqc, an utterance at a time."""
    backbone, own, targets = model.backbone, model.config, batch.targets
    seen = targets.get("view", batch.inputs)
    frames, x, lengths = backbone.embed(seen, batch.lengths, {"mask": targets["mask"]})
    heard, _ = backbone.frontend(targets.get("target_view", batch.inputs), batch.lengths)
    student, teacher = backbone.encoder.encode(x, lengths).last, model.teacher(heard, lengths)
    found = dict.fromkeys(("regression", "student", "teacher", "diversity", "penalty", "alike"), 0.0)
    for row, length in enumerate(lengths.tolist()):
        places = targets["mask"][row].nonzero()[:, 0]
        count = len(places)
        own_codes, own_vectors, soft = quantised_by_hand(model, heard[row, places])
        other_codes, other_vectors = own_codes, own_vectors
        if "view" in targets:
            other_codes, other_vectors, _ = quantised_by_hand(model, frames[row, places])
        both = own_vectors + (other_vectors if "view" in targets else [])
        points = [functional.normalize(vector, dim=0).double().numpy() for vector in both]
        starts = [start for start in targets["starts"][row].tolist() if start >= 0]
        assert len(set(starts)) == len(starts) == max(2, length // own.cluster_factor)
        size = targets["places"].shape[1]
        starts = [start if start < size else start - size + count for start in starts]
        labels = clusters_by_hand(points, starts, own.cluster_passes)
        negatives = targets["negatives"][row, :count].tolist()
        context, wanted = (model.project_context(z[row, places]) for z in (student, teacher))
        found["student"] += term_by_hand(own, context, own_codes, own_vectors, labels[:count], negatives)
        found["teacher"] += term_by_hand(own, wanted, other_codes, other_vectors, labels[-count:], negatives)
        found["alike"] += sum(np.mean([labels[i] == labels[j] for j in js]) for i, js in enumerate(negatives))
        error = (model.project(student[row, places]) - teacher[row, places]).square().sum() * 32**-0.5
        found["regression"] += float(error)
        mean = soft.mean(0)
        found["diversity"] += (SIZE - float((-(mean * mean.log()).sum(-1)).exp().sum())) / SIZE * count
        found["penalty"] += float(heard[row, :length].square().mean()) * count
    return found


@torch.no_grad()
@pytest.mark.parametrize("views", ["none", "student", "both"])
def test_the_loss_is_the_released_one(corpus, batch, views: str) -> None:
    model, prepare = make(corpus, f"objective.views={views}", "objective.view_noise=1", "objective.cluster_factor=12")
    for parameter in model.backbone.encoder.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # the teacher must not be the student
    batch = drawn(prepare, batch)
    loss, expected = model(batch), by_hand(model, batch)
    names = {
        "loss": "regression",
        "contrast_student": "student",
        "contrast_teacher": "teacher",
        "diversity": "diversity",
        "features_penalty": "penalty",
        "same_cluster": "alike",
    }
    for name, one in names.items():
        value, count = loss.metrics[name]
        assert float(value) == pytest.approx(expected[one], rel=1e-4), name
        assert float(count) == batch.num_targets
    assert 0.05 < expected["alike"] / batch.num_targets < 0.95, "else clusters would not be tested"
    total = expected["regression"] + 0.5 * (expected["student"] + expected["teacher"])
    total += 0.1 * expected["diversity"] + 10.0 * expected["penalty"]
    assert float(loss.total) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_clusters_are_of_each_row_and_padding_is_in_none() -> None:
    rng = np.random.default_rng(4)
    sizes, starts = (9, 14), ([3, 0, 3], [1, 13])  # a point twice: its second cluster stays empty or takes others
    points, real, begin = torch.randn(2, 14, 5), torch.zeros(2, 14, dtype=torch.bool), torch.full((2, 3), -1)
    for row, size in enumerate(sizes):
        centres = rng.standard_normal((3, 5))
        own = centres[rng.integers(3, size=size)] + 0.4 * rng.standard_normal((size, 5))
        points[row, :size] = torch.from_numpy(own / np.linalg.norm(own, axis=1, keepdims=True)).float()
        real[row, :size] = True
        begin[row, : len(starts[row])] = torch.tensor(starts[row])
    for passes in (0, 1, 5):
        labels = cosine_clusters(points, real, begin, passes)
        for row, size in enumerate(sizes):
            expected = clusters_by_hand(list(points[row, :size].double().numpy()), starts[row], passes)
            assert labels[row, :size].tolist() == expected
            assert len(set(expected)) > 1


def test_without_its_terms_it_is_data2vec_step_by_step(train, tmp_path) -> None:
    more = ("log.every_steps=1", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    for name, changes in (("data2vec", ()), ("data2vec_aqc", ("objective.contrast_weight=0",))):
        status, _, error = train(name, *more, *changes, steps=4, exp=name)
        assert status == 0, error
    figures = []
    for name in ("data2vec", "data2vec_aqc"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        kept = ("loss", "target_deviation", "prediction_deviation", "teacher_decay", "gradient_norm")
        figures.append([[row[key] for key in kept] for row in rows if row["kind"] == "train"])
    assert len(figures[0]) == 4
    assert figures[0] == figures[1]
    checkpoints = sorted(path.name for path in (tmp_path / "data2vec/checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    for step in checkpoints:
        first, second = (
            load_file(tmp_path / name / "checkpoints" / step / "model.safetensors")
            for name in ("data2vec", "data2vec_aqc")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_its_terms_change_the_course_and_report_the_codebooks(corpus, train, tmp_path) -> None:
    more = ("log.every_steps=1", f"data.valid={corpus.valid}", "objective.views=both")
    status, _, error = train("data2vec_aqc", *more, steps=2)
    assert status == 0, error
    status, _, error = train("data2vec_aqc", *more, "objective.contrast_weight=0", steps=2, exp="without")
    assert status == 0, error
    rows, without = (
        [json.loads(line) for line in (tmp_path / f"{exp}/metrics.jsonl").read_text().splitlines()]
        for exp in ("exp", "without")
    )
    assert rows[0]["gradient_norm"] != pytest.approx(without[0]["gradient_norm"], rel=1e-3)
    assert {row["kind"] for row in rows} == {"train", "valid"}
    assert all(1.0 <= row["codebook_perplexity"] <= 6.0 for row in rows)
    assert all(0.0 < row["same_cluster"] < 1.0 for row in rows)


def test_views_leave_masks_and_negatives_as_they_were(corpus, batch) -> None:
    plain = drawn(make(corpus)[1], batch).targets
    for views, names in (("student", {"view"}), ("both", {"view", "target_view"})):
        config = corpus.config("data2vec_aqc", "filterbank", f"objective.views={views}", "objective.view_noise=1")
        spec = build_objective(config).backbone.spec
        viewed = drawn(build_prepare(config, spec, train=True), batch).targets
        assert set(viewed) - set(plain) == names
        same = ("mask", "masked", "counts", "places", "negatives")
        assert all(torch.equal(plain[name], viewed[name]) for name in same)
        audios = [batch.inputs, *(viewed[name] for name in names)]
        for row, length in enumerate(batch.lengths.tolist()):
            pairs = itertools.combinations((audio[row, :length] for audio in audios), 2)
            assert not any(torch.allclose(one, other, atol=1e-3) for one, other in pairs)
        assert not names & set(drawn(build_prepare(config, spec, train=False), batch).targets)


@torch.no_grad()
def test_a_frame_that_is_masked_alone_has_nothing_to_be_told_from(corpus) -> None:
    model, prepare = make(corpus)
    field, stride = model.backbone.spec.receptive_field, model.backbone.spec.stride
    wave = np.random.default_rng(0).standard_normal(field + stride).astype(np.float32)
    for rows, masked in (([Row("a", "", wave, 0)], 1.0), ([Row("b", "", wave[:field], 0)], 0.0)):
        short = drawn(prepare, collate(rows))
        assert short.num_targets == masked
        loss = model(short)
        assert torch.isfinite(loss.total)
        assert float(loss.metrics["contrast_student"][0]) == float(loss.metrics["contrast_teacher"][0]) == 0.0
        assert (float(loss.metrics["loss"][0]) > 0.0) == bool(masked)


def test_what_does_not_fit_is_refused(corpus) -> None:
    with pytest.raises(
        HarkenError, match=r"`objective.code_dim` must be divisible by `objective.groups`, got 16 and 3"
    ):
        make(corpus, "objective.groups=3")
    with pytest.raises(HarkenError, match=r"`objective.cluster_scale` must lie in 0..1, got 1.5"):
        make(corpus, "objective.cluster_scale=1.5")
