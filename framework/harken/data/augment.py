"""Augmentation of waveforms, seeded for each cut and epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harken.config.schema import DataConfig
from harken.core.batch import Note
from harken.core.draws import Draws
from harken.data.manifest import Manifest
from harken.data.mixing import Mixing, gain
from harken.data.read import Samples, UnreadableAudioError, read_cut, resample
from harken.data.reverberation import Reverberation

if TYPE_CHECKING:
    from harken.data.mixture import Joined


@dataclass(frozen=True)
class Augmentation:
    """What `data.speed`, `data.mixing_*`, `data.reverberation` and `data.noise` ask for; validation gets none."""

    config: DataConfig
    noises: Manifest | None
    mixing: Mixing | None
    reverberation: Reverberation | None

    @classmethod
    def build(cls, config: DataConfig, cuts: Manifest | Joined | None) -> Augmentation:
        """Open the manifests that it takes from.

        cuts: the training data, None where they are a stream.
        """
        noises = Manifest.filled(config.noise) if config.noise else None
        return cls(config, noises, Mixing.build(config, cuts), Reverberation.build(config))

    def __call__(self, samples: Samples, cut: str, draws: Draws, notes: list[Note]) -> Samples:
        """Return `samples` `(S,)` at another speed, mixed, in a room, with noise, by the draws of this cut and epoch.

        A room is that of all that is mixed, as in XEUS.

        A noise that cannot be read is noted under its own id, and `samples` stay without noise.
        """
        if self.config.speed:
            rng = draws.generator("speed", cut)
            samples = change_speed(samples, self.config.speed[int(rng.integers(len(self.config.speed)))])
        if self.mixing is not None:
            samples = self.mixing(samples, cut, draws, notes)
        if self.reverberation is not None:
            samples = self.reverberation(samples, cut, draws, notes)
        if self.noises is not None:
            samples = self._add_noise(samples, self.noises, draws.generator("noise", cut), notes)
        return samples

    def _add_noise(self, samples: Samples, noises: Manifest, rng: np.random.Generator, notes: list[Note]) -> Samples:
        if rng.random() >= self.config.noise_probability:
            return samples
        chosen = noises[int(rng.integers(len(noises)))]
        try:
            noise = read_cut(chosen, self.config.sample_rate)
        except UnreadableAudioError as error:
            again = f"run `harken data verify {noises.path}`"
            notes.append(Note("noise left out", chosen.id, f"{error}; cuts that draw it stay without noise: {again}"))
            return samples
        start = int(rng.integers(0, max(1, len(noise) - len(samples))))
        low, high = self.config.noise_snr_db
        return mix(samples, noise[start:], float(rng.uniform(low, high)))


def change_speed(samples: Samples, factor: float) -> Samples:
    """Play `(S,)` faster by `factor`, pitch and all: the result has S / factor samples. Source: Ko et al. 2015."""
    return resample(samples, factor, 1.0)


def mix(samples: Samples, noise: Samples, snr_db: float) -> Samples:
    """Add noise, repeated to the length of `samples`, at a signal-to-noise ratio in dB."""
    noise = np.resize(noise, len(samples))
    mixed: Samples = samples + gain(samples, noise, snr_db) * noise
    return mixed
