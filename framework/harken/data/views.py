"""Other views of an utterance, in which every frame stays where it was: pitch, reverberation, noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harken.core.draws import Draws
from harken.data.augment import change_speed, mix
from harken.data.read import Samples
from harken.data.reverberation import convolve

_WINDOW, _HOP = 512, 256  # samples of what is laid side by side to stretch time, half over the next
_SEARCH = 200  # samples by which it is moved at most: the periods of all voices above 80 Hz at 16 kHz
_DECAY = 3.0  # powers of ten by which amplitude falls in the reverberation time: 60 dB


@dataclass(frozen=True, kw_only=True)
class Views:
    """How often and how far a view departs from what was recorded.

    pitch, reverberation, noise: the share of views that get each. cents: by which a pitch moves at most, up or down.
    seconds: the longest reverberation time. direct_db: lowest and highest ratio of direct to reverberant power.
    snr_db: lowest and highest ratio of an utterance to white noise.
    Source: which three, arXiv 2007.00991 (its noises are recorded); the ranges are harken's.
    """

    pitch: float
    reverberation: float
    noise: float
    sample_rate: int
    cents: float = 300.0
    seconds: float = 0.5
    direct_db: tuple[float, float] = (0.0, 15.0)
    snr_db: tuple[float, float] = (5.0, 20.0)

    def __call__(self, samples: Samples, cut: str, draws: Draws, purpose: str) -> Samples:
        """Return a view of `samples` `(S,)`, by the draws of this cut, epoch and purpose."""
        rng = draws.generator(purpose, cut)
        pitch, reverberation, noise = rng.random(3) < (self.pitch, self.reverberation, self.noise)
        if pitch:
            samples = shift_pitch(samples, float(rng.uniform(-self.cents, self.cents)))
        if reverberation:
            time, ratio = rng.uniform(0.1 * self.seconds, self.seconds), rng.uniform(*self.direct_db)
            samples = reverberate(samples, int(time * self.sample_rate), float(ratio), rng)
        if noise:
            white = rng.standard_normal(len(samples), dtype=np.float32)
            samples = mix(samples, white, float(rng.uniform(*self.snr_db)))
        return samples


def shift_pitch(samples: Samples, cents: float) -> Samples:
    """Return `(S,)` higher by so many hundredths of a semitone, as long as before: stretched, then played faster."""
    factor = 2.0 ** (cents / 1200.0)
    shifted = np.zeros_like(samples)
    if len(samples) <= _WINDOW:  # a click has no pitch
        return samples.copy()
    played = change_speed(stretch(samples, factor), factor)[: len(samples)]
    shifted[: len(played)] = played
    return shifted


def stretch(samples: Samples, factor: float) -> Samples:
    """Return `(S,)` as `(S * factor,)` with every pitch where it was: windows laid at other places, each moved a little
    to where it goes on best from the one before.

    factor: 0.5 to 2. Source: WSOLA, Verhelst and Roelands 1993. A phase vocoder lost half of a tone's level.
    """
    size = round(len(samples) * factor)
    front = 2 * _HOP + _SEARCH
    padded = np.pad(samples, (front, 2 * _WINDOW + front)).astype(np.float64)
    power = np.concatenate([[0.0], np.square(padded).cumsum()])
    window = np.hanning(_WINDOW + 1)[:-1]
    count = size // _HOP + 2
    made = np.zeros((count + 1) * _HOP)
    place = front - _HOP
    for index in range(count):
        first = front + round((index - 1) * _HOP / factor) - _SEARCH
        if index:
            natural = padded[place + _HOP : place + _HOP + _WINDOW]
            starts = np.arange(first, first + 2 * _SEARCH + 1)
            likeness = np.correlate(padded[first : first + 2 * _SEARCH + _WINDOW], natural, "valid")
            likeness /= np.sqrt(np.maximum(power[starts + _WINDOW] - power[starts], 1e-9))
            place = first + (int(likeness.argmax()) if likeness.any() else _SEARCH)
        made[index * _HOP : index * _HOP + _WINDOW] += window * padded[place : place + _WINDOW]
    return made[_HOP : _HOP + size].astype(np.float32)


def reverberate(samples: Samples, size: int, direct_db: float, rng: np.random.Generator) -> Samples:
    """Return `(S,)` as a room gives it back: itself, in place, and a tail of `size` samples, at the power it had.

    The tail is noise that falls by 60 dB. Source: Polack 1988.
    """
    tail = rng.standard_normal(max(2, size)) * 10.0 ** (-_DECAY * np.arange(max(2, size)) / max(2, size))
    tail[0] = 0.0
    tail *= np.sqrt(10.0 ** (-direct_db / 10.0) / np.square(tail).sum())
    tail[0] = 1.0
    return convolve(samples, tail)
