"""Views of an utterance: pitches, rooms and noises are what was asked, and nothing moves in time."""

from __future__ import annotations

import numpy as np
import pytest

from harken.core.draws import Draws
from harken.data.views import Views, reverberate, shift_pitch, stretch

RATE = 16000


def tone(hertz: float, samples: int = RATE) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE)).astype(np.float32)


def pitch_of(samples: np.ndarray) -> float:
    inner = samples[2000:-2000] * np.hanning(len(samples) - 4000)
    return float(np.abs(np.fft.rfft(inner, 2**17)).argmax() * RATE / 2**17)


@pytest.mark.parametrize("cents", [-1200.0, -300.0, -37.0, 150.0, 700.0])
@pytest.mark.parametrize("hertz", [310.0, 1700.0])
def test_a_pitch_moves_by_what_is_asked(cents: float, hertz: float) -> None:
    shifted = shift_pitch(tone(hertz), cents)
    assert shifted.shape == (RATE,)
    assert shifted.dtype == np.float32
    assert pitch_of(shifted) == pytest.approx(hertz * 2 ** (cents / 1200), rel=2e-3)
    level = np.sqrt(np.square(shifted[2000:-2000]).mean())
    assert level == pytest.approx(0.3 / 2**0.5, rel=0.05)


@pytest.mark.parametrize("samples", [1025, 1279, 1280, 9600, 30001])
@pytest.mark.parametrize("factor", [0.84, 1.0, 1.19])
def test_stretched_audio_has_its_pitch_and_another_length(samples: int, factor: float) -> None:
    stretched = stretch(tone(500.0, samples), factor)
    assert len(stretched) == round(samples * factor)
    assert np.isfinite(stretched).all()
    if factor == 1.0:
        assert np.allclose(stretched[:-512], tone(500.0, samples)[:-512], atol=1e-4)
    if samples > 9000:
        assert pitch_of(stretched) == pytest.approx(500.0, rel=2e-3)


@pytest.mark.parametrize("samples", [1, 1024, 1500])
def test_a_short_utterance_keeps_its_length(samples: int) -> None:
    assert shift_pitch(tone(500.0, samples), 250.0).shape == (samples,)


def test_what_begins_in_a_view_begins_where_it_began() -> None:
    """A tone after half a second of silence: an onset moves by less than a frame of 20 ms."""
    samples = np.concatenate([np.zeros(RATE // 2, np.float32), tone(600.0)])
    for view in (shift_pitch(samples, 300.0), reverberate(samples, 4000, 10.0, np.random.default_rng(0))):
        level = np.sqrt(np.square(view[: len(view) // 80 * 80].reshape(-1, 80)).mean(1))
        onset = int((level > 0.3 * level.max()).argmax()) * 80
        assert abs(onset - RATE // 2) < 320


def test_a_room_keeps_the_power_and_has_the_ratio_asked() -> None:
    rng = np.random.default_rng(1)
    click = np.zeros(8000, np.float32)
    click[0] = 1.0
    for ratio in (0.0, 10.0):
        wet = reverberate(click, 6400, ratio, rng)
        direct, tail = float(wet[0] ** 2), float(np.square(wet[1:]).sum())
        assert 10 * np.log10(direct / tail) == pytest.approx(ratio, abs=1e-3)
        assert direct + tail == pytest.approx(1.0, rel=1e-5)
        early, late = (np.square(wet[start : start + 640]).sum() for start in (1, 1 + 3200))
        assert 10 * np.log10(early / late) == pytest.approx(30.0, abs=3.0), "half of the time is half of 60 dB"
    assert not reverberate(np.zeros(800, np.float32), 400, 3.0, rng).any()


def test_each_transformation_is_a_switch_and_follows_from_its_key() -> None:
    samples = tone(440.0)
    none = Views(pitch=0.0, reverberation=0.0, noise=0.0, sample_rate=RATE)
    assert none(samples, "a", Draws(1, 0), "view") is samples
    for name in ("pitch", "reverberation", "noise"):
        views = Views(**{"pitch": 0.0, "reverberation": 0.0, "noise": 0.0, name: 1.0}, sample_rate=RATE)
        first = views(samples, "a", Draws(1, 0), "view")
        assert not np.allclose(first, samples, atol=1e-2)
        assert np.array_equal(first, views(samples, "a", Draws(1, 0), "view"))
        for other in (("b", Draws(1, 0), "view"), ("a", Draws(1, 1), "view"), ("a", Draws(1, 0), "target_view")):
            assert not np.array_equal(first, views(samples, *other))
    noisy = Views(pitch=0.0, reverberation=0.0, noise=1.0, snr_db=(12.0, 12.0), sample_rate=RATE)
    added = noisy(samples, "a", Draws(1, 0), "view") - samples
    assert 10 * np.log10(np.square(samples).mean() / np.square(added).mean()) == pytest.approx(12.0, abs=0.01)
