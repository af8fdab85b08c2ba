"""BEST-RQ against a reference written here from the paper: quantiser, noise, stacking, loss."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from harken.apps.main import main
from harken.config.load import from_dict, load, to_yaml
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec, Window
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.frontends.base import InputNoise
from harken.nn.noise import normal_of
from harken.objectives.saved import build_objective, build_prepare
from harken.units.random_projection import RandomProjection, codebook_use

MASK = 2**64 - 1
TINY = {"name": "bestrq", "codes": 24, "code_dim": 8, "bands": 20, "mask_length": 4, "codebooks": 2}


def settings(corpus, *, seed: int = 7, **objective: Any) -> dict[str, Any]:
    made = corpus.settings("hubert", "filterbank")
    made.update(seed=seed, objective={**TINY, **objective})
    made["frontend"] = {**made["frontend"], "subsampling": 4}
    made["data"]["labels"] = []
    return made


def batch_of(corpus, config, count: int = 4) -> Batch:
    cuts = [cut for cut in Manifest(corpus.train) if cut.duration > 1.0][:count]
    rows = [Row(cut.id, "", read_cut(cut, 16000), 0) for cut in cuts]
    model = build_objective(config)
    batch = collate(rows)
    return build_prepare(config, model.backbone.spec, train=True)(batch, [Draws(config.seed, 1)] * len(rows))


def test_the_nearest_code_of_a_normalised_projection() -> None:
    quantiser = RandomProjection(12, 4, 9, 3, seed=1)
    x = np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    found = quantiser(torch.from_numpy(x))
    assert found.shape == (50, 3)
    for book in range(3):
        codes = quantiser.codes[book].numpy()
        assert np.allclose(np.linalg.norm(codes, axis=1), 1, atol=1e-6)
        for row in range(50):
            projected = x[row] @ quantiser.projections[book].numpy()
            projected /= np.linalg.norm(projected)
            distances = [np.linalg.norm(projected - code) for code in codes]
            assert int(found[row, book]) == int(np.argmin(distances))


def test_projection_and_codes_follow_from_the_seed_alone_and_start_as_published() -> None:
    torch.manual_seed(1)
    first = RandomProjection(320, 16, 512, 2, seed=3)
    torch.manual_seed(2)
    same, other = RandomProjection(320, 16, 512, 2, seed=3), RandomProjection(320, 16, 512, 2, seed=4)
    assert torch.equal(first.projections, same.projections)
    assert torch.equal(first.codes, same.codes)
    assert not torch.equal(first.projections, other.projections)
    assert not torch.equal(first.projections[0], first.projections[1])
    limit = math.sqrt(6 / (320 + 16))  # Glorot and Bengio 2010, equation 16
    assert 0.99 * limit < float(first.projections.abs().max()) <= limit
    assert float(first.projections.std()) == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert float(first.codes.mean()) == pytest.approx(0, abs=0.01)
    assert list(first.parameters()) == [], "nothing of it learns"


def test_the_quantiser_is_saved_with_the_model(corpus) -> None:
    model, other = (build_objective(from_dict(settings(corpus, seed=seed))) for seed in (7, 8))
    names = {name for name in model.state_dict() if name.startswith("quantiser.")}
    assert names == {"quantiser.projections", "quantiser.codes"}
    assert not torch.equal(model.quantiser.codes, other.quantiser.codes)
    other.load_state_dict(model.state_dict())
    inputs, lengths = torch.randn(1, 16000), torch.tensor([16000])
    assert torch.equal(model.quantiser.of_audio(inputs, lengths, 24), other.quantiser.of_audio(inputs, lengths, 24))


def splitmix(seed: int, count: int) -> list[int]:
    """The first numbers of Steele, Lea and Flood's generator, in Python's whole numbers."""
    numbers, state = [], seed & MASK
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        x = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        numbers.append(x ^ (x >> 31))
    return numbers


def normals(key: int, count: int) -> np.ndarray:
    numbers = splitmix(key, count)
    radius = [((n >> 40) + 1) / 2**24 for n in numbers]
    angle = [(n & 0xFFFFFF) / 2**24 for n in numbers]
    return np.array(
        [math.sqrt(-2 * math.log(r)) * math.cos(2 * math.pi * a) for r, a in zip(radius, angle, strict=True)]
    )


def test_noise_is_normal_and_follows_from_its_key() -> None:
    assert splitmix(0, 1) == [0xE220A8397B1DCDAF], "the published first number of seed 0"
    keys = torch.tensor([0, 5, 2**63 - 1, -(2**62)])
    found = normal_of(keys, 40000)
    for row, key in enumerate(keys.tolist()):
        assert np.allclose(found[row, :200].numpy(), normals(key, 200), atol=1e-4), key
    assert torch.isfinite(found).all()
    values = found.flatten().sort().values
    assert float(values.mean()) == pytest.approx(0, abs=0.01)
    assert float(values.std()) == pytest.approx(1, abs=0.01)
    share = torch.arange(1, len(values) + 1) / len(values)
    expected = torch.distributions.Normal(0.0, 1.0).cdf(values)
    assert float((share - expected).abs().max()) < 0.005, "Kolmogorov's distance"
    assert abs(float((found[0] * found[1]).mean())) < 0.02, "rows have nothing in common"
    assert torch.equal(normal_of(keys, 100), found[:, :100]), "a longer row begins alike"


@pytest.mark.parametrize(
    ("windows", "window", "expected"),
    [
        ([(400, 160), (3, 2), (3, 2)], (400, 160), (2, 4)),  # 7 frames of 10 ms are seen: 2 before, 1 behind
        ([(400, 160), (3, 2)], (400, 160), (1, 2)),
        ([(400, 160), (1, 1)], (400, 160), (0, 1)),
        ([(400, 320)], (400, 160), (0, 2)),  # the second of the two lies half behind the frame
        ([(400, 320)], (1, 1), (40, 320)),
    ],
)
def test_the_middle_of_a_frame(windows, window, expected) -> None:
    assert FrameSpec(tuple(Window(*item) for item in windows), 16000).middle(Window(*window)) == expected


def features(model, inputs: torch.Tensor, samples: int) -> np.ndarray:
    """Log-mel energies of one utterance with mean 0 and variance 1 in each band, float64."""
    x = model.quantiser.log_mel(inputs[None, :samples])[0].double().numpy()
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


@torch.no_grad()
def test_the_loss_from_waveform_to_cross_entropy(corpus) -> None:
    """Every step of section 3, one utterance after the other, in loops."""
    config = from_dict(settings(corpus))
    torch.manual_seed(0)
    model = build_objective(config).eval()
    batch = batch_of(corpus, config)
    total = hits = 0.0
    for row in range(len(batch.ids)):
        samples = int(batch.lengths[row])
        clean = features(model, batch.inputs[row], samples)
        frames = model.backbone.spec.num_frames(samples)
        mask = batch.targets["mask"][row, :frames].numpy()
        noisy, noise = (
            clean.copy(),
            0.1 * normals(int(batch.targets["noise_keys"][row]), clean.size).reshape(clean.shape),
        )
        stacks = np.zeros((frames, 4 * 20))
        for t in range(frames):
            for place in range(4):
                m = min(4 * t + 2 + place, len(clean) - 1)
                stacks[t, 20 * place : 20 * (place + 1)] = clean[m]
                if mask[t]:
                    noisy[m] = noise[m]
        frontend, encoder = model.backbone.frontend, model.backbone.encoder
        x = frontend.subsampling(torch.from_numpy(noisy).float()[None])
        last = encoder.encode(encoder.embed(x), torch.tensor([frames])).last[0]
        logits = model.head(last).double().numpy().reshape(frames, 2, 24)
        for book in range(2):
            projected = stacks @ model.quantiser.projections[book].double().numpy()
            projected /= np.linalg.norm(projected, axis=1, keepdims=True)
            distance = np.square(projected[:, None] - model.quantiser.codes[book].double().numpy()).sum(-1)
            labels = distance.argmin(-1)
            for t in np.flatnonzero(mask):
                z = logits[t, book]
                total += (np.log(np.exp(z).sum()) - z[labels[t]]) / 2
                hits += z.argmax() == labels[t]
    loss = model(batch)
    assert float(loss.total) == pytest.approx(total, rel=1e-4)
    assert float(loss.metrics["loss"][1]) == batch.num_targets == int(batch.targets["mask"].sum())
    value, weight = loss.metrics["accuracy_masked"]
    assert float(value / weight) == pytest.approx(hits / (2 * batch.num_targets), abs=0.02)


@torch.no_grad()
@pytest.mark.parametrize("frontend", ["filterbank", "waveform"])
def test_noise_replaces_what_masked_frames_see_and_nothing_else(corpus, frontend: str) -> None:
    """Audio in the middle of masked spans cannot be told from other audio; that of other frames can."""
    made = settings(corpus)
    made["frontend"] = {**corpus.settings("hubert", frontend)["frontend"]}
    if frontend == "filterbank":
        made["frontend"]["normalize"] = False  # or a change anywhere would change all
    else:
        made["frontend"]["norm"] = "layer"  # for the same reason
    config = from_dict(made)
    model = build_objective(config).eval()
    inputs, lengths = 0.1 * torch.randn(1, 32000), torch.tensor([32000])
    frames = model.backbone.spec.num_frames(32000)
    mask = torch.zeros(1, frames, dtype=torch.bool)
    mask[0, 30:60] = True

    def seen(audio: torch.Tensor) -> torch.Tensor:
        return model.backbone.frontend(audio, lengths, noise=InputNoise(mask, torch.tensor([3]), 0.1))[0]

    hop = model.backbone.spec.stride
    changed = inputs.clone()
    changed[:, 35 * hop : 55 * hop] = 0.1 * torch.randn(20 * hop)
    changed *= (
        inputs.square().mean() / changed.square().mean()
    ).sqrt()  # as loud: the waveform's noise follows the level
    middle = slice(33, 57)
    assert torch.allclose(seen(inputs)[:, middle], seen(changed)[:, middle], atol=1e-3)
    plain = model.backbone.frontend(inputs, lengths)[0]
    assert not torch.allclose(seen(inputs)[:, 31:59], plain[:, 31:59], atol=1e-2)
    if frontend == "filterbank":
        assert torch.equal(seen(inputs)[:, :28], plain[:, :28])
        assert torch.equal(seen(inputs)[:, 62:], plain[:, 62:])


def test_use_and_perplexity_of_codebooks() -> None:
    codes = torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.int64)], 1)
    use, perplexity = codebook_use(codes, 16)
    assert float(use) == pytest.approx((8 / 16 + 1 / 16) / 2)
    assert float(perplexity) == pytest.approx((8 + 1) / 2)
    skewed = torch.tensor([0, 0, 0, 1])[:, None]
    assert float(codebook_use(skewed, 4)[1]) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@torch.no_grad()
def test_a_collapse_of_the_codebook_shows_in_the_figures(corpus) -> None:
    """Silence, as of a broken reader: all frames fall to few codes."""
    config = from_dict(settings(corpus))
    model = build_objective(config).eval()
    batch = batch_of(corpus, config)

    def figures(batch: Batch) -> dict[str, float]:
        return {name: float(value / weight) for name, (value, weight) in model(batch).metrics.items()}

    healthy = figures(batch)
    assert healthy["codebook_use"] > 0.4
    assert healthy["codebook_perplexity"] > 6
    silent = figures(replace(batch, inputs=torch.zeros_like(batch.inputs)))
    assert silent["codebook_use"] < 0.15
    assert silent["codebook_perplexity"] < 2.5


def test_training_leaves_the_mask_embedding_alone(corpus) -> None:
    """Noise masks here; fine-tuning begins with the embedding as it started."""
    model = build_objective(from_dict(settings(corpus)))
    assert model.rate_scale("backbone.mask_embedding", 0) == 0
    assert model.rate_scale("head.weight", 0) == 1


def test_a_run_learns_logs_its_codebooks_and_resumes(corpus, tmp_path) -> None:
    made = settings(corpus)
    made["log"]["every_steps"] = 1
    (tmp_path / "run.yaml").write_text(to_yaml(from_dict(made)))

    def steps(folder, count: int) -> list[dict[str, float]]:
        assert main(["train", str(tmp_path / "run.yaml"), "--exp", str(folder), f"train.steps={count}"]) == 0
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [record for record in records if record["kind"] == "train"]

    whole = steps(tmp_path / "whole", 4)
    assert {"loss", "accuracy_masked", "codebook_use", "codebook_perplexity"} <= whole[-1].keys()
    assert whole[0]["loss"] == pytest.approx(math.log(24), rel=0.15)
    steps(tmp_path / "parts", 2)
    assert [record["loss"] for record in steps(tmp_path / "parts", 4)] == [record["loss"] for record in whole]


@torch.no_grad()
def test_the_preset_builds_and_starts_at_the_entropy_of_its_codes(corpus) -> None:
    given = [f"data.train={corpus.train}", "encoder.layers=2"]
    config = load(["bestrq_base"], given).config
    model = build_objective(config).eval()
    batch = batch_of(corpus, config, count=1)
    value, weight = model(batch).metrics["loss"]
    assert float(value / weight) == pytest.approx(math.log(8192), rel=0.1)
    assert model.backbone.spec.rate == 25
    assert model.quantiser.projections.shape == (1, 320, 16)


def test_frames_that_are_no_multiple_of_10_ms_are_refused(corpus) -> None:
    made = settings(corpus)
    made["frontend"] = {"name": "waveform", "channels": 16, "strides": [4, 2, 2, 2, 2, 2, 2]}
    with pytest.raises(HarkenError) as caught:
        build_objective(from_dict(made))
    assert str(caught.value) == (
        "codes of log-mel energies need frames of a multiple of 160 samples (10 ms), got 256 from the frontend"
    )
