"""WavLM's positions and its mixing, against references written here from the paper and the released code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording

from harken.config.load import load
from harken.config.schema import DataConfig
from harken.core.batch import Note
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.augment import Augmentation
from harken.data.dataset import MicroBatches, Task
from harken.data.manifest import Manifest
from harken.data.mixing import overlay
from harken.encoders.wavlm import WavlmConfig
from harken.nn.gated_position_bias import GatedAttention, PositionBias, position_buckets
from harken.objectives.saved import build_objective, build_prepare

RATE = 16000


def bucket(offset: int, buckets: int, max_distance: int) -> int:
    """One offset at a time, in whole numbers where it can be: T5's buckets for both directions."""
    half = buckets // 2
    base = half if offset > 0 else 0
    distance, exact = abs(offset), half // 2
    if distance < exact:
        return base + distance
    grown = exact + math.floor(math.log(distance / exact) / math.log(max_distance / exact) * (half - exact) + 1e-6)
    return base + min(grown, half - 1)


@pytest.mark.parametrize(("buckets", "max_distance"), [(320, 800), (32, 80), (16, 40)])
def test_buckets(buckets: int, max_distance: int) -> None:
    offsets = torch.arange(-1000, 1001)
    found = position_buckets(offsets, buckets, max_distance)
    assert found.tolist() == [bucket(offset, buckets, max_distance) for offset in offsets.tolist()]
    assert set(found.tolist()) <= set(range(buckets))


def test_the_bias_of_a_pair_is_that_of_its_offset() -> None:
    torch.manual_seed(0)
    module = PositionBias(3, 16, 40)
    bias = module(9)
    assert bias.shape == (3, 9, 9)
    for query in range(9):
        for key in range(9):
            assert torch.equal(bias[:, query, key], module.table[bucket(key - query, 16, 40)])


def reference(module: GatedAttention, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The gated bias of arXiv 2110.13900, a frame and a head at a time, for `(T, D)`.

    As released: from the layer's input, and with 1 - u for the paper's g_update, which only turns the sign of weights.
    """
    frames, dim = x.shape
    size = dim // module.heads
    q, k, v = (part.unflatten(-1, (module.heads, size)) for part in module.qkv(x).chunk(3, -1))
    inputs = x.unflatten(-1, (module.heads, size))
    y = torch.zeros(frames, module.heads, size)
    for head in range(module.heads):
        for i in range(frames):
            both = module.gate.weight @ inputs[i, head] + module.gate.bias
            update, reset = 1 - torch.sigmoid(both[:4].sum()), torch.sigmoid(both[4:].sum())
            scores = torch.zeros(frames)
            for j in range(frames):
                d = bias[head, i, j]
                candidate = module.gate_scale[head] * reset * d
                scores[j] = q[i, head] @ k[j, head] / math.sqrt(size) + d + update * d + (1 - update) * candidate
            y[i, head] = torch.softmax(scores, 0) @ v[:, head]
    return module.out(y.flatten(1))


@torch.no_grad()
def test_gated_attention() -> None:
    torch.manual_seed(1)
    module, bias = GatedAttention(12, 3), torch.randn(3, 7, 7)
    module.gate_scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x = torch.randn(1, 7, 12)
    assert torch.allclose(module(x, None, bias)[0], reference(module, x[0], bias), atol=1e-5)
    padded = torch.cat([x, torch.randn(1, 4, 12)], 1)
    attend = (torch.arange(11) < 7)[None, None, None, :]
    wide = torch.zeros(3, 11, 11)
    wide[:, :7, :7] = bias
    assert torch.allclose(module(padded, attend, wide)[:, :7], module(x, None, bias), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [40, 300])
def test_scores_beyond_half_precision_do_no_harm(frames: int) -> None:
    """The large model's overflow: products of queries and keys above 65504, the largest number of fp16."""
    torch.manual_seed(2)
    module, bias = GatedAttention(64, 1), torch.randn(1, frames, frames)
    module.qkv.weight.mul_(120)
    x = torch.randn(1, frames, 64)
    q, k, _ = module.qkv(x).chunk(3, -1)
    assert (q @ k.mT).abs().max() > 2 * 65504
    expected = module(x, None, bias)
    with torch.autocast("cpu", torch.float16):
        found = module(x, None, bias)
    assert torch.isfinite(found).all()
    # where two keys are nearly as good, half precision may choose another
    assert float(((found - expected).abs() < 0.05 * expected.abs().max()).float().mean()) > 0.9


@pytest.mark.parametrize(
    "settings",
    [{"position_buckets": 30}, {"position_max_distance": 80}, {"position_buckets": 8, "position_max_distance": 2}],
)
def test_buckets_that_do_not_fit_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(HarkenError, match=r"`encoder.position_buckets` must be a multiple of 4, and"):
        WavlmConfig(name="wavlm", **settings)


@pytest.mark.parametrize(("name", "millions"), [("wavlm_base", 94.70), ("wavlm_large", 316.62)])
def test_a_preset_has_as_many_parameters_as_the_paper_says(name: str, millions: float) -> None:
    """Source: arXiv 2110.13900, the head for 500 units included."""
    config = load([name], ["data.train=train.jsonl", "data.labels=[units]"]).config
    with torch.device("meta"):
        model = build_objective(config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


# Mixing


def tone(hertz: float, seconds: float) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def manifest(folder: Path, name: str, waves: list[np.ndarray]) -> Path:
    cuts = []
    for number, wave in enumerate(waves):
        path = folder / f"{name}-{number}.wav"
        soundfile.write(path, wave, RATE, subtype="FLOAT")
        recording = Recording.from_file(path)
        cuts.append(MonoCut(f"{name}-{number}", 0.0, recording.duration, 0, recording=recording))
    CutSet.from_cuts(cuts).to_jsonl(folder / f"{name}.jsonl")
    return folder / f"{name}.jsonl"


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Constant waves: what is left of one shows where it was mixed in, and how strongly."""
    return manifest(tmp_path, "speech", [np.full(int(s * RATE), 0.1, np.float32) for s in (0.2, 1.0, 3.0)])


@pytest.fixture
def noises(tmp_path: Path) -> Path:
    return manifest(tmp_path, "noise", [np.full(RATE, -0.1, np.float32)])


def mixed(speech: Path, samples: np.ndarray, cut: str = "a", *, seed: int = 1, epoch: int = 0, **options) -> np.ndarray:
    config = DataConfig(train=str(speech), **{"mixing_probability": 1.0, **options})
    notes: list[Note] = []
    result = Augmentation.build(config, Manifest(speech))(samples, cut, Draws(seed, epoch), notes)
    assert notes == []
    return result


def parts(speech: Path, samples: np.ndarray, count: int, **options) -> list[np.ndarray]:
    return [mixed(speech, samples, f"cut-{number}", **options) - samples for number in range(count)]


def test_as_many_cuts_are_mixed_and_as_many_with_noise_as_asked(speech: Path, noises: Path) -> None:
    samples = tone(300, 1.0)
    added = parts(speech, samples, 400, mixing_probability=0.2, mixing_noise=str(noises), mixing_noise_probability=0.25)
    touched = [part for part in added if part.any()]
    assert len(touched) / 400 == pytest.approx(0.2, abs=0.05)
    assert np.mean([part.sum() < 0 for part in touched]) == pytest.approx(0.25, abs=0.12)


def test_a_part_of_at_most_half_is_mixed_at_any_place(speech: Path) -> None:
    samples = tone(300, 1.0)
    places = [np.flatnonzero(part) for part in parts(speech, samples, 200)]
    sizes = [len(place) for place in places]
    assert all(place[-1] - place[0] + 1 == len(place) for place in places), "one stretch"
    assert 1 <= min(sizes) < 0.05 * RATE
    assert 0.45 * RATE < max(sizes) <= 0.5 * RATE
    assert np.mean(sizes) == pytest.approx(0.25 * RATE * (1 - 1 / 3 * 0.36), rel=0.2)  # a third have 0.2 s at most
    assert min(place[0] for place in places) < 0.1 * RATE
    assert max(place[-1] for place in places) > 0.9 * RATE


def test_ratios_are_of_whole_utterances_and_between_the_published_ones(speech: Path, noises: Path) -> None:
    samples = tone(300, 1.0)
    power = float(np.square(samples).mean())
    for options, low, high in (
        ({}, -5, 5),
        ({"mixing_noise": str(noises), "mixing_noise_probability": 1.0}, -5, 20),
    ):
        levels = [float(np.square(part[part != 0]).mean()) for part in parts(speech, samples, 150, **options)]
        ratios = 10 * np.log10(power / np.asarray(levels))
        assert low - 0.05 <= ratios.min() < low + 1.5
        assert high - 1.5 < ratios.max() <= high + 0.05


def test_overlay_is_algorithm_1_of_the_paper() -> None:
    """Energies of both whole utterances, a factor, a part: written out with the draws in their order."""
    first, second = np.random.default_rng(0).standard_normal((2, 500)).astype(np.float32)
    rng = np.random.default_rng(5)
    length = int(rng.integers(1, 251))
    start, begin = int(rng.integers(0, 500 - length + 1)), int(rng.integers(0, 500 - length + 1))
    energy, other = np.sum(first**2) / 500, np.sum(second**2) / 500
    expected = first.copy()
    expected[start : start + length] += np.sqrt(energy / (10 ** (3.0 / 10) * other)) * second[begin : begin + length]
    found = overlay(first, second, 3.0, 250, np.random.default_rng(5))
    assert np.allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


def test_what_is_mixed_follows_from_seed_epoch_and_cut(speech: Path) -> None:
    samples = tone(300, 1.0)
    first = mixed(speech, samples)
    mixed(speech, tone(500, 0.4), "another")
    assert np.array_equal(mixed(speech, samples), first)
    for change in ({"seed": 2}, {"epoch": 1}, {"cut": "b"}):
        assert not np.array_equal(mixed(speech, samples, **change), first), change


def test_a_cut_is_mixed_alike_in_every_batch_and_its_labels_stay_its_own(corpus) -> None:
    """Whatever ranks and workers: they change which cuts share a batch."""
    config = corpus.config("hubert", "filterbank", "data.mixing_probability=1.0")
    spec = build_objective(config).backbone.spec
    train = Manifest(config.data.train)

    def batch(augmentation, *places: int):
        prepare = build_prepare(config, spec, train=True)
        task = Task.of(np.asarray(places), epoch=3)
        return MicroBatches(train, config.data, prepare, 7, 160, augmentation)[task]

    augmentation = Augmentation.build(config.data, train)
    together, plain = batch(augmentation, 4, 9, 20), batch(None, 4, 9, 20)
    for row, place in enumerate((4, 9, 20)):
        alone = batch(augmentation, place)
        size = int(alone.lengths[0])
        assert torch.equal(together.inputs[row, :size], alone.inputs[0])
    assert not torch.equal(together.inputs, plain.inputs)
    assert torch.equal(together.lengths, plain.lengths)
    assert torch.equal(together.targets["labels"], plain.targets["labels"])


def test_what_cannot_be_read_is_named_and_its_cut_stays_as_it_is(speech: Path) -> None:
    for number in range(3):
        speech.with_name(f"speech-{number}.wav").write_bytes(b"")
    config = DataConfig(train=str(speech), mixing_probability=1.0)
    notes: list[Note] = []
    samples = tone(300, 1.0)
    assert np.array_equal(Augmentation.build(config, Manifest(speech))(samples, "good", Draws(1, 0), notes), samples)
    (note,) = notes
    assert note.kind == "mixing left out"
    file = speech.with_name(f"{note.cut}.wav")
    assert note.reason == (
        f"cut `{note.cut}` ({file}) cannot be read: empty file (0 bytes); cuts that draw it stay unmixed: "
        f"run `harken data verify {speech}`"
    )


def test_a_stream_needs_a_manifest_to_mix_from(speech: Path) -> None:
    config = DataConfig(train="shards", mixing_probability=0.2)
    with pytest.raises(HarkenError) as caught:
        Augmentation.build(config, None)
    assert str(caught.value) == (
        "`data.mixing_probability` draws utterances from an indexed manifest, and `data.train` is a stream: "
        "give one as `data.mixing_speech`"
    )
    config = DataConfig(train="shards", mixing_probability=1.0, mixing_speech=str(speech))
    samples = tone(300, 1.0)
    assert not np.array_equal(Augmentation.build(config, None)(samples, "a", Draws(1, 0), []), samples)


def test_silence_stays_silent(tmp_path: Path, speech: Path) -> None:
    silent = manifest(tmp_path, "silent", [np.zeros(RATE, np.float32)])
    samples = tone(300, 1.0)
    assert np.array_equal(mixed(silent, samples), samples)
    assert np.array_equal(mixed(speech, np.zeros(RATE, np.float32)), np.zeros(RATE, np.float32))
