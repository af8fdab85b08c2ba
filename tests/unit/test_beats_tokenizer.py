"""BEATs' tokenizer against formulas written out: the codebook that moves, the distillation loss, labels of patches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from harken.apps.main import main
from harken.config.saved import save_model
from harken.core.draws import Draws, begin_micro_batch
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec, Window
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.objectives.saved import build_objective, build_prepare
from harken.units.alignment import UnitReader
from harken.units.check import check_units
from harken.units.ema_codebook import EmaCodebook
from harken.units.store import LabelStore

PATCHES = ("frontend.name=patches", "frontend.bands=16", "frontend.channels=12", "frontend.patch_frames=4")
PATCHES += ("frontend.patch_bands=8", "encoder.rows=2", "encoder.layer_drop=0", "data.labels=[]")
DECODER = ("objective.decoder_layers=1", "objective.decoder_dim=16", "objective.decoder_heads=2")
DECODER += ("objective.decoder_ffn_dim=24", "objective.decoder_dropout=0")
TOKENIZER = ("objective.name=beats_tokenizer", "objective.codes=10", "objective.code_dim=6", *DECODER)


def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_codebook(codes: int = 5, dim: int = 7) -> EmaCodebook:
    torch.manual_seed(0)
    book = EmaCodebook(dim, 3, codes, decay=0.9, seed=2)
    with torch.no_grad():
        for parameter in book.project.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return book


def nearest(encoded: NDArray[np.float64], codes: NDArray[np.float64]) -> NDArray[np.int64]:
    """By distance, not by product."""
    return np.square(encoded[:, None] - codes).sum(-1).argmin(-1)


def encoded_by_hand(book: EmaCodebook, tokens: torch.Tensor) -> NDArray[np.float64]:
    first, second = book.project[0], book.project[2]
    hidden = np.tanh(tokens.double().numpy() @ first.weight.detach().double().numpy().T + first.bias.detach().numpy())
    return unit(hidden @ second.weight.detach().double().numpy().T + second.bias.detach().double().numpy())


def moved(codes: NDArray[np.float64], encoded: NDArray[np.float64], decay: float) -> NDArray[np.float64]:
    """The released quantiser's update, a code at a time."""
    labels, new = nearest(encoded, codes), codes.copy()
    for code in set(labels.tolist()):
        mean = unit(encoded[labels == code].mean(0))
        new[code] = unit(decay * codes[code] + (1 - decay) * mean)
    return new


def test_codes_follow_the_tokens_of_a_step_and_of_no_other() -> None:
    book = make_codebook()
    book.started.fill_(True)
    codes = book.codes.double().numpy()
    for step in (1, 2):
        book(5 * torch.randn(40, 7), remember=True)  # of passes that are repeated, or of a step that was not applied
        book.forget()
        parts = [torch.randn(6, 7), torch.randn(3, 7)]
        for part in parts:
            book(part, remember=True)
        book(torch.randn(8, 7), remember=False)
        codes = moved(codes, encoded_by_hand(book, torch.cat(parts)), 0.9)
        book.update()
        assert np.allclose(book.codes.numpy(), codes, atol=1e-5), step
        assert np.allclose(np.linalg.norm(book.codes.numpy(), axis=1), 1, atol=1e-5)
    before = book.codes.clone()
    book.update()  # of nothing
    assert torch.equal(book.codes, before)


def test_the_first_step_puts_codes_at_the_centres_of_its_tokens() -> None:
    book = make_codebook(codes=3)
    centres = torch.tensor([[4.0] * 7, [-4.0] * 7, [4.0, -4.0, 4.0, -4.0, 4.0, -4.0, 4.0]])
    tokens = centres.repeat_interleave(20, 0) + 0.01 * torch.randn(60, 7)
    book(torch.randn(50, 7), remember=True)
    book.forget()
    order = torch.randperm(60)
    for part in order.split(25):  # as two ranks or micro-batches may divide them
        book(tokens[part], remember=True)
    book.update()
    assert bool(book.started)
    expected = unit(encoded_by_hand(book, tokens).reshape(3, 20, 3).mean(1))
    assert np.sort(nearest(expected, book.codes.double().numpy())).tolist() == [0, 1, 2]
    assert np.square(expected[:, None] - book.codes.numpy()).sum(-1).min(1).max() < 1e-5
    other = make_codebook(codes=3)
    other(tokens, remember=True)
    other.update()
    assert torch.allclose(other.codes, book.codes, atol=1e-5), "whoever had which tokens"


def test_fewer_tokens_than_codes_become_codes_themselves() -> None:
    book = make_codebook(codes=5)
    random = book.codes.clone()
    tokens = torch.randn(3, 7)
    book(tokens, remember=True)
    book.update()
    assert np.square(encoded_by_hand(book, tokens)[:, None] - book.codes.numpy()).sum(-1).min(1).max() < 1e-6
    assert torch.equal(book.codes[3:], random[3:])


def test_the_gradient_passes_the_codes_as_if_they_were_not_there() -> None:
    book = make_codebook()
    tokens = torch.randn(9, 7, requires_grad=True)
    weight = torch.randn(9, 3)
    coded = book(tokens, remember=False)
    assert torch.allclose(coded.vectors, book.codes[coded.codes], atol=1e-6)
    (found,) = torch.autograd.grad((coded.vectors * weight).sum(), tokens, retain_graph=True)
    (expected,) = torch.autograd.grad((book.encode(tokens) * weight).sum(), tokens)
    assert torch.allclose(found, expected, atol=1e-5)
    (found,) = torch.autograd.grad(coded.errors.sum(), tokens)
    (expected,) = torch.autograd.grad((book.encode(tokens) - book.codes[coded.codes]).square().mean(-1).sum(), tokens)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory) -> Path:
    """A saved model over the same patches, of another width."""
    config = corpus.config("hubert", "filterbank", *PATCHES, "encoder.dim=24", "encoder.heads=2")
    torch.manual_seed(8)
    folder = tmp_path_factory.mktemp("teacher")
    save_model(folder, config, build_objective(config).state_dict())
    return folder


def settings(teacher: Path, *overrides: str) -> list[str]:
    return [*PATCHES, *TOKENIZER, f"objective.teacher={teacher}", *overrides]


@torch.no_grad()
def test_the_distillation_loss_is_the_papers(corpus, batch, teacher) -> None:
    config = corpus.config("hubert", "filterbank", *settings(teacher, "objective.commitment=0.5"))
    torch.manual_seed(1)
    model = build_objective(config).eval()
    batch = build_prepare(config, model.backbone.spec, train=True)(batch, [Draws(1, 0)] * len(batch.ids))
    similarity = errors = count = 0.0
    codes = model.tokenizer.codes.double().numpy()
    theirs = build_objective(corpus.config("hubert", "filterbank", *PATCHES, "encoder.dim=24", "encoder.heads=2"))
    theirs.load_state_dict(load_file(teacher / "model.safetensors"))
    for row, samples in enumerate(batch.lengths.tolist()):
        audio, length = batch.inputs[row : row + 1, :samples], torch.tensor([samples])
        tokens = model.backbone(audio, length).last.reshape(-1, 32)
        encoded = encoded_by_hand(model.tokenizer, tokens)
        labels = nearest(encoded, codes)
        errors += np.square(encoded - codes[labels]).mean(1).sum()
        vectors = torch.from_numpy(codes[labels]).float()[None]
        predicted = model.decoder(vectors, torch.tensor([len(labels)]))[0].double().numpy()
        target = theirs.eval().backbone(audio, length).last.reshape(-1, 24).double().numpy()
        similarity += (unit(predicted) * unit(target)).sum()
        count += len(labels)
    loss = model(batch)
    assert batch.num_targets == count
    assert float(loss.total) == pytest.approx(count - similarity + 0.5 * errors, rel=1e-4)
    figures = {name: float(value / weight) for name, (value, weight) in loss.metrics.items()}
    assert figures["similarity"] == pytest.approx(similarity / count, abs=1e-4)
    assert figures["commitment_error"] == pytest.approx(errors / count, rel=1e-4)
    assert 1 / 10 <= figures["codebook_use"] <= 1
    assert 1 <= figures["codebook_perplexity"] <= 10
    names = set(model.state_dict())
    assert not any(name.startswith("teacher.") for name in names), "a checkpoint does not hold the teacher"
    assert {"tokenizer.codes", "tokenizer.started"} <= names
    assert not any(name.startswith("teacher.") for name, _ in model.named_parameters())


def test_a_pass_without_weight_and_validation_move_no_code(corpus, batch, teacher) -> None:
    config = corpus.config("hubert", "filterbank", *settings(teacher))
    model = build_objective(config)
    prepare = build_prepare(config, model.backbone.spec, train=True)
    batch = prepare(batch, [Draws(1, 0)] * len(batch.ids))
    model.tokenizer.started.fill_(True)
    before = model.tokenizer.codes.clone()
    begin_micro_batch(0, 5, 0)
    model.train()(replace(batch, num_targets=0.0))
    model.eval()(batch)
    model.after_step(6)
    assert torch.equal(model.tokenizer.codes, before)
    model.train()(batch)
    model.begin_passes()  # memory ran out in a pass behind this one, or it was a trial
    model.after_step(6)
    assert torch.equal(model.tokenizer.codes, before)
    model.train()(batch)
    model.after_step(6)
    assert not torch.equal(model.tokenizer.codes, before)


def test_a_teacher_of_other_frames_is_refused(corpus, teacher, tmp_path) -> None:
    changed = [*settings(teacher), "frontend.patch_frames=8"]
    with pytest.raises(HarkenError) as caught:
        build_objective(corpus.config("hubert", "filterbank", *changed))
    assert str(caught.value) == (
        "`objective.teacher` must have the frames and `encoder.rows` of this model, 12.5 a second and 2, and "
        f"{teacher} has 25 and 2"
    )


@pytest.fixture(scope="module")
def trained(corpus, teacher, tmp_path_factory) -> Path:
    """A tokenizer of three small steps, in which its codes stay apart, and the same with an interruption."""
    root = tmp_path_factory.mktemp("tokenizer")
    config = corpus.yaml(root, "hubert", "filterbank")
    for name, steps in (("exp", (3,)), ("parts", (1, 3))):
        for count in steps:
            overrides = [*settings(teacher), f"train.steps={count}", "log.every_steps=1", "schedule.rate=1e-5"]
            assert main(["train", str(config), "--exp", str(root / name), *overrides]) == 0
    return root


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max(folder.glob("checkpoints/step-*")) / "model.safetensors")


def test_a_tokenizer_learns_its_codes_and_continues_exactly(trained) -> None:
    whole, parts = last_weights(trained / "exp"), last_weights(trained / "parts")
    assert bool(whole["tokenizer.started"])
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    records = [json.loads(line) for line in (trained / "exp/metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["kind"] == "train"]
    assert {"similarity", "commitment_error", "codebook_use", "codebook_perplexity"} <= records[-1].keys()
    assert records[-1]["commitment_error"] < records[0]["commitment_error"], "centres are nearer than random codes"


def test_a_run_does_not_continue_with_another_teacher(corpus, teacher, trained, tmp_path, capsys) -> None:
    other = tmp_path / "other"
    config = corpus.config("hubert", "filterbank", *PATCHES, "encoder.dim=24", "encoder.heads=2")
    torch.manual_seed(9)
    other.mkdir()
    save_model(other, config, build_objective(config).state_dict())
    yaml = corpus.yaml(tmp_path, "hubert", "filterbank")
    overrides = [*settings(other), "train.steps=5"]
    assert main(["train", str(yaml), "--exp", str(trained / "parts"), *overrides]) != 0
    assert "objective.teacher" in capsys.readouterr().err


@pytest.fixture(scope="module")
def labels(corpus, trained) -> Path:
    out = trained / "labels"
    command = ["units", "label", str(corpus.train), str(corpus.valid), "--tokenizer", str(trained / "exp")]
    assert main([*command, "--out", str(out), "--jobs", "1"]) == 0
    assert main([*command, "--out", str(out), "--jobs", "1"]) == 0, "a second call finds it finished"
    return out


@torch.no_grad()
def test_labels_are_the_nearest_codes_of_patches(corpus, trained, teacher, labels, capsys) -> None:
    model = build_objective(corpus.config("hubert", "filterbank", *settings(teacher))).eval()
    model.load_state_dict(last_weights(trained / "exp"))
    store = LabelStore(labels)
    assert (store.card.rows, store.card.clusters, store.card.rate) == (2, 10, 25)
    assert store.card.features.startswith("tokens of tokenizer ")
    for place in (0, 7):
        cut = Manifest(corpus.train)[place]
        audio = torch.from_numpy(read_cut(cut, 16000))[None]
        tokens = model.backbone(audio, torch.tensor([audio.shape[1]])).last.reshape(-1, 32)
        expected = nearest(encoded_by_hand(model.tokenizer, tokens), model.tokenizer.codes.double().numpy())
        assert store[cut.id].tolist() == expected.tolist()
    assert main(["units", "check", str(labels)]) in (0, 1)
    assert "labels at 25 Hz in 2 rows, " in capsys.readouterr().out


def test_a_crop_reads_the_labels_of_its_patches(corpus, labels) -> None:
    store, cut = LabelStore(labels), Manifest(corpus.train)[0]
    spec = FrameSpec((Window(400, 160), Window(4, 4)), 16000)
    reader = UnitReader([str(labels)], spec, [10], rows=2)
    samples = read_cut(cut, 16000)
    whole = collate([Row(cut.id, "", samples, 0)])
    frames = spec.num_frames(len(samples))
    grid = store[cut.id].reshape(frames, 2)
    assert np.array_equal(reader.read(whole, frames)[0, :, 0], grid.ravel())
    crop = collate([Row(cut.id, "", samples[3 * 640 :], 3 * 640)])
    assert np.array_equal(reader.read(crop, frames - 3)[0, :, 0], grid[3:].ravel())


def test_runs_of_labels_are_counted_along_the_rows_of_the_grid(labels) -> None:
    store = LabelStore(labels)
    counts: dict[int, int] = {}
    for cut in store.ids:
        grid = store[cut].reshape(-1, 2)
        for row in range(2):
            run = 1
            for before, after in zip(grid[:-1, row], grid[1:, row], strict=True):
                if before == after:
                    run += 1
                else:
                    counts[min(run, 30)] = counts.get(min(run, 30), 0) + 1
                    run = 1
            if len(grid):
                counts[min(run, 30)] = counts.get(min(run, 30), 0) + 1
    report = check_units(store)
    assert report.run_lengths == [counts.get(length, 0) for length in range(1, 31)]
    assert sum(report.counts) == len(store.values)


def test_the_next_iteration_learns_these_labels(corpus, labels, tmp_path, capsys) -> None:
    beats = ["objective.name=beats", "objective.targets=labels", "objective.classes=10", *DECODER]
    overrides = [*PATCHES, *beats, f"data.labels=[{labels}]", f"data.valid={corpus.valid}", "log.every_steps=1"]
    config = corpus.yaml(tmp_path, "hubert", "filterbank")
    assert main(["train", str(config), "--exp", str(tmp_path / "exp"), *overrides, "train.steps=2"]) == 0
    records = [json.loads(line) for line in (tmp_path / "exp/metrics.jsonl").read_text().splitlines()]
    assert {"label_perplexity", "label_use", "accuracy_masked"} <= records[-1].keys()
    assert main(["train", str(config), "--exp", str(tmp_path / "no"), *overrides, "objective.classes=11"]) != 0
    assert "`objective.classes` must equal the clusters of" in capsys.readouterr().err


def test_a_model_without_a_codebook_labels_nothing(corpus, teacher, tmp_path, capsys) -> None:
    command = ["units", "label", str(corpus.train), "--tokenizer", str(teacher), "--out", str(tmp_path / "labels")]
    assert main([*command, "--jobs", "1"]) != 0
    expected = f"{teacher} is no tokenizer: `objective.name: beats_tokenizer` trains one"
    assert expected in capsys.readouterr().err
