"""Noise and speed: as strong as asked, the same for the same seed, epoch and cut, and no good cut lost for a noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording

from harken.config.schema import DataConfig
from harken.core.batch import Note
from harken.core.draws import Draws
from harken.data.augment import Augmentation, change_speed, mix

RATE = 16000


def tone(hertz: float, seconds: float) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def level_db(samples: np.ndarray) -> float:
    return 10 * float(np.log10(np.square(samples.astype(np.float64)).mean()))


@pytest.fixture
def noises(tmp_path: Path) -> Path:
    """Four noises of 0.3 to 2 s, shorter and longer than what they are mixed into."""
    rng = np.random.default_rng(0)
    cuts = []
    for number, seconds in enumerate((0.3, 0.9, 1.5, 2.0)):
        path = tmp_path / f"noise-{number}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * RATE)), RATE)
        recording = Recording.from_file(path)
        cuts.append(MonoCut(f"noise-{number}", 0.0, recording.duration, 0, recording=recording))
    CutSet.from_cuts(cuts).to_jsonl(tmp_path / "noises.jsonl")
    return tmp_path / "noises.jsonl"


def augment(samples: np.ndarray, cut: str = "a", *, seed: int = 1, epoch: int = 0, **options) -> np.ndarray:
    notes: list[Note] = []
    augmented = Augmentation.build(DataConfig(train="none", **options), None)(samples, cut, Draws(seed, epoch), notes)
    assert notes == []
    return augmented


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5])
@pytest.mark.parametrize("seconds", [0.3, 4.0])
def test_noise_has_the_ratio_that_was_asked_for(snr_db: float, seconds: float) -> None:
    samples, noise = tone(300, 1.0), np.random.default_rng(1).standard_normal(int(seconds * RATE)).astype(np.float32)
    mixed = mix(samples, noise, snr_db)
    assert mixed.shape == samples.shape
    assert mixed.dtype == np.float32
    assert level_db(samples) - level_db(mixed - samples) == pytest.approx(snr_db, abs=0.05)


def test_silence_is_mixed_with_nothing() -> None:
    samples, silence = tone(300, 0.5), np.zeros(RATE, dtype=np.float32)
    assert np.array_equal(mix(samples, silence, 10.0), samples)
    assert np.array_equal(mix(silence, samples, 10.0), silence)


def test_ratios_are_drawn_between_the_two_that_are_given(noises: Path) -> None:
    samples = tone(300, 1.0)
    options = {"noise": str(noises), "noise_probability": 1.0, "noise_snr_db": (3.0, 9.0)}
    mixed = [augment(samples, f"cut-{number}", **options) for number in range(40)]
    ratios = [level_db(samples) - level_db(one - samples) for one in mixed]
    assert 2.9 <= min(ratios) < 4.5
    assert 7.5 < max(ratios) <= 9.1


def test_noise_comes_as_often_as_asked(noises: Path) -> None:
    samples = tone(300, 0.2)
    for probability in (0.0, 0.3, 1.0):
        options = {"noise": str(noises), "noise_probability": probability}
        noisy = [not np.array_equal(augment(samples, f"cut-{n}", **options), samples) for n in range(200)]
        assert np.mean(noisy) == pytest.approx(probability, abs=0.1 if 0 < probability < 1 else 0)


def test_augmentation_follows_from_seed_epoch_and_cut(noises: Path) -> None:
    samples = tone(300, 1.0)
    options = {"noise": str(noises), "noise_probability": 1.0, "speed": (0.9, 1.0, 1.1)}
    first = augment(samples, **options)
    augment(tone(500, 0.4), "another", **options)
    assert np.array_equal(augment(samples, **options), first)
    for change in ({"seed": 2}, {"epoch": 1}, {"cut": "b"}):
        assert not np.array_equal(augment(samples, **{**options, **change}), first), change


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_speed_moves_duration_and_pitch(factor: float) -> None:
    changed = change_speed(tone(400, 2.0), factor)
    assert len(changed) == pytest.approx(2 * RATE / factor, abs=1)
    loudest = np.abs(np.fft.rfft(changed)).argmax() * RATE / len(changed)
    assert loudest == pytest.approx(400 * factor, abs=1)


def test_each_speed_is_drawn(corpus) -> None:
    samples = tone(400, 1.0)
    lengths = [len(augment(samples, f"cut-{n}", speed=(0.8, 1.0, 1.25))) for n in range(60)]
    assert {round(length / RATE, 2) for length in lengths} == {1.25, 1.0, 0.8}


def test_a_noise_that_cannot_be_read_is_named_and_its_cut_stays_as_it_is(noises: Path) -> None:
    for number in range(4):
        noises.with_name(f"noise-{number}.wav").write_bytes(b"")
    options = {"noise": str(noises), "noise_probability": 1.0}
    notes: list[Note] = []
    samples = tone(300, 1.0)
    augmentation = Augmentation.build(DataConfig(train="none", **options), None)
    assert np.array_equal(augmentation(samples, "good", Draws(1, 0), notes), samples)
    (note,) = notes
    assert note.kind == "noise left out"
    assert note.cut.startswith("noise-")
    file = noises.with_name(f"{note.cut}.wav")
    assert note.reason == (
        f"cut `{note.cut}` ({file}) cannot be read: empty file (0 bytes); cuts that draw it stay without noise: "
        f"run `harken data verify {noises}`"
    )
