"""XEUS: rooms against convolutions written out, labels that stay under their frames, simulated rooms, sizes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording

from harken.apps.main import main
from harken.config.load import load
from harken.config.schema import DataConfig
from harken.core.batch import Note
from harken.core.draws import Draws
from harken.data import rooms
from harken.data.augment import Augmentation
from harken.data.dataset import MicroBatches, Task
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.data.reverberation import direct_sound, in_room
from harken.objectives.saved import build_objective, build_prepare

RATE = 16000
CONF = Path(__file__).resolve().parents[2] / "egs/amazon_queen/conf"
needs_rooms = pytest.mark.skipif(importlib.util.find_spec("pyroomacoustics") is None, reason="needs pyroomacoustics")


def room(delay: int, size: int = 3000, seed: int = 0, peak: float = 1.0) -> np.ndarray:
    """A direct sound after `delay` samples, behind it noise that falls by 60 dB."""
    rng = np.random.default_rng(seed)
    response = np.zeros(delay + size)
    tail = 0.2 * rng.standard_normal(size - 1) * 10 ** (-3 * np.arange(1, size) / size)
    response[delay], response[delay + 1 :] = peak, np.clip(tail, -0.45, 0.45)
    return response.astype(np.float32)


def manifest(folder: Path, responses: list[np.ndarray]) -> Path:
    cuts = []
    for number, response in enumerate(responses):
        path = folder / f"room-{number}.wav"
        soundfile.write(path, response, RATE, subtype="FLOAT")
        recording = Recording.from_file(path)
        cuts.append(MonoCut(f"room-{number}", 0.0, recording.duration, 0, recording=recording))
    CutSet.from_cuts(cuts).to_jsonl(folder / "rooms.jsonl")
    return folder / "rooms.jsonl"


def heard(path: Path, samples: np.ndarray, cut: str = "a", *, seed: int = 1, epoch: int = 0, share: float = 1.0):
    config = DataConfig(train="none", reverberation=str(path), reverberation_probability=share)
    notes: list[Note] = []
    result = Augmentation.build(config, None)(samples, cut, Draws(seed, epoch), notes)
    assert notes == []
    return result


@pytest.mark.parametrize(
    ("delay", "peak", "samples"), [(0, 1.0, 900), (137, 1.0, 900), (137, -0.7, 900), (40, 1.0, 90)]
)
def test_a_room_is_a_convolution_without_its_delay_at_the_power_that_was(delay: int, peak: float, samples: int) -> None:
    """Sample by sample: what arrives at t left at t and before, the direct sound at t itself."""
    response = room(delay, 500, peak=peak)
    speech = np.random.default_rng(1).standard_normal(samples).astype(np.float32)
    expected = np.zeros(samples)
    for t in range(samples):
        for s in range(t + 1):
            if t - s + delay < len(response):
                expected[t] += float(speech[s]) * float(response[t - s + delay])
    expected *= np.sqrt(np.square(speech).sum() / np.square(expected).sum())
    found = in_room(speech, response)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_direct_sound_is_the_first_large_peak_and_not_a_louder_reflection() -> None:
    response = room(200)
    assert direct_sound(response) == 200
    response[320:322] = 0.9, 1.4  # two reflections that arrive together
    assert direct_sound(response) == 200
    response[:200] = 0.3  # what precedes it is less than half as large
    assert direct_sound(response) == 200
    assert direct_sound(-response) == 200
    # band-limited and between two samples: it begins before its peak
    times = np.arange(400) - 200.4
    assert direct_sound((np.sinc(times) * np.hanning(400)).astype(np.float32)) == 200


def test_speech_stays_under_its_labels() -> None:
    """Clicks come out where they went in, and the whole is most alike at no shift; with the delay it would not be."""
    response = room(800)  # 50 ms, more than two frames
    clicks = np.zeros(RATE, np.float32)
    clicks[[1000, 6000, 11000]] = 1.0
    wet = in_room(clicks, response)
    for place in (1000, 6000, 11000):
        assert np.abs(wet[place - 900 : place + 4000]).argmax() == 900
    speech = np.random.default_rng(2).standard_normal(RATE).astype(np.float32)
    likeness = np.correlate(in_room(speech, response), speech[1000:-1000], "valid")
    assert np.abs(likeness).argmax() == 1000


def test_as_many_cuts_as_asked_each_in_a_room_of_its_own(tmp_path: Path) -> None:
    path = manifest(tmp_path, [room(100, seed=seed) for seed in range(3)])
    speech = np.random.default_rng(3).standard_normal(2000).astype(np.float32)
    each = [in_room(speech, room(100, seed=seed)) for seed in range(3)]
    found = [heard(path, speech, f"cut-{number}", share=0.3) for number in range(400)]
    wet = [one for one in found if not np.array_equal(one, speech)]
    assert len(wet) / 400 == pytest.approx(0.3, abs=0.06)
    counts = [sum(np.allclose(one, made, atol=1e-5) for one in wet) for made in each]
    assert sum(counts) == len(wet)
    assert min(counts) > len(wet) / 6


def test_the_room_follows_from_seed_epoch_and_cut(tmp_path: Path) -> None:
    path = manifest(tmp_path, [room(100, seed=seed) for seed in range(64)])
    speech = np.random.default_rng(3).standard_normal(2000).astype(np.float32)
    first = heard(path, speech)
    heard(path, speech[:900], "another")
    assert np.array_equal(heard(path, speech), first)
    for change in ({"seed": 2}, {"epoch": 1}, {"cut": "b"}):
        assert not np.array_equal(heard(path, speech, **change), first), change


def test_what_is_mixed_in_is_in_the_same_room(tmp_path: Path) -> None:
    """ESPnet's order: noise first, then the room over all."""
    path = manifest(tmp_path, [room(100)])
    other = tmp_path / "other"
    other.mkdir()
    voices = manifest(other, [np.full(4000, 0.1, np.float32)])
    speech = np.random.default_rng(3).standard_normal(2000).astype(np.float32)
    mixing = {"train": "none", "mixing_probability": 1.0, "mixing_speech": str(voices)}
    mixed = Augmentation.build(DataConfig(**mixing), None)(speech, "a", Draws(1, 0), [])
    config = DataConfig(**mixing, reverberation=str(path), reverberation_probability=1.0)
    both = Augmentation.build(config, None)(speech, "a", Draws(1, 0), [])
    assert np.array_equal(both, in_room(mixed, room(100)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(b""), "cut `room-0` ({file}) cannot be read: empty file (0 bytes)"),
        (lambda path: soundfile.write(path, np.zeros(500), RATE), "cut `room-0` is silent"),
    ],
)
def test_a_room_that_is_none_is_named_and_its_cut_stays_as_it_is(tmp_path: Path, damage, said: str) -> None:
    path = manifest(tmp_path, [room(100, 400)])
    damage(tmp_path / "room-0.wav")
    config = DataConfig(train="none", reverberation=str(path), reverberation_probability=1.0)
    speech, notes = np.ones(800, np.float32), list[Note]()
    assert np.array_equal(Augmentation.build(config, None)(speech, "good", Draws(1, 0), notes), speech)
    said = said.format(file=tmp_path / "room-0.wav")
    again = f"{said}; cuts that draw it stay as they are: run `harken data verify {path}`"
    assert notes == [Note("room left out", "room-0", again)]


def test_a_run_hears_rooms_and_learns_the_labels_of_the_clean_speech(corpus, tmp_path: Path) -> None:
    path = manifest(tmp_path, [room(800, seed=seed) for seed in range(5)])
    wet = ("data.reverberation_probability=1.0", f"data.reverberation={path}")
    config = corpus.config("hubert", "filterbank", *wet)
    prepare = build_prepare(config, build_objective(config).backbone.spec, train=True)
    train = Manifest(config.data.train)

    def batch(augmentation: Augmentation | None, *places: int):
        task = Task.of(np.asarray(places), epoch=3)
        return MicroBatches(train, config.data, prepare, 7, 160, augmentation)[task]

    augmentation = Augmentation.build(config.data, train)
    together, clean = batch(augmentation, 4, 9, 20), batch(None, 4, 9, 20)
    assert not torch.equal(together.inputs, clean.inputs)
    assert torch.equal(together.lengths, clean.lengths)
    for name, value in clean.targets.items():
        assert torch.equal(together.targets[name], value), name
    for row, place in enumerate((4, 9, 20)):
        alone = batch(augmentation, place)
        assert torch.equal(together.inputs[row, : int(alone.lengths[0])], alone.inputs[0])


# Simulated rooms


@needs_rooms
def test_simulated_rooms_are_what_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rooms.jsonl"
    assert main(["data", "rooms", "--out", str(out), "--count", "3", "--seed", "5"]) == 0
    assert "rooms.jsonl: 3 rooms, impulse responses of " in capsys.readouterr().out
    found = [read_cut(cut, RATE) for cut in Manifest(out)]
    assert len(found) == 3
    for number, response in enumerate(found):
        name = f"room-{number:05d}.wav"
        assert np.array_equal(response, rooms.simulated(name, 5, RATE)), "of (seed, number) alone"
        rng = Draws(5, 0).generator("room", name)
        size = np.array([*rng.uniform(*rooms.LENGTH, 2), rng.uniform(*rooms.HEIGHT)])
        seconds = float(rng.uniform(*rooms.SECONDS))
        speaker, microphone = rooms._places(size, rng)
        assert ((speaker >= 0.5) & (speaker <= size - 0.5)).all()
        # sound takes the straight way at 343 m/s; the filters that give fractions of a sample begin 40 samples before
        straight = np.linalg.norm(speaker - microphone) / 343.0 * RATE + 40
        assert abs(direct_sound(response) - straight) <= 1
        # energy that is still to come, Schroeder 1965: the slope between 5 and 25 dB below the whole
        falling = np.cumsum(np.square(response[::-1], dtype=np.float64))[::-1]
        level = 10 * np.log10(falling / falling[0] + 1e-12)
        time = 3 * float((level < -25).argmax() - (level < -5).argmax()) / RATE
        assert time == pytest.approx(seconds, rel=0.6), "Sabine's formula is rough in small, dry rooms"


def test_without_the_library_it_is_named(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pyroomacoustics", None)
    assert main(["data", "rooms", "--out", str(tmp_path / "rooms.jsonl")]) != 0
    error = capsys.readouterr().err
    assert "simulating rooms needs pyroomacoustics, which does not import" in error
    assert "`pip install pyroomacoustics` brings it" in error
    assert main(["data", "rooms", "--out", str(tmp_path / "rooms"), "--count", "4"]) != 0
    assert "--out must end in .jsonl and --count be at least 1" in capsys.readouterr().err


# Sizes


def test_the_preset_is_the_published_model() -> None:
    """577 million parameters, arXiv 2407.00837 section 4.3."""
    config = load(["xeus"], ["data.train=train.jsonl", "data.labels=[units]"]).config
    with torch.device("meta"):
        model = build_objective(config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(577, rel=0.01)


def test_the_recipes_model_is_as_large_as_the_default() -> None:
    needed = ["data.train=t", "data.labels=[units]", "objective.classes=[100]"]
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in build_objective(load([CONF / name], needed).config).parameters())
            for name in ("pretrain.yaml", "methods/xeus.yaml")
        ]
    assert sizes[1] / sizes[0] == pytest.approx(1.0, abs=0.03), sizes
