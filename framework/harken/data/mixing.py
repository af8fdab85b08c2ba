"""WavLM's mixing: over a part of an utterance, another utterance or a noise, while the targets stay the first one's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harken.config.schema import DataConfig
from harken.core.batch import Note
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.manifest import Manifest
from harken.data.read import Samples, UnreadableAudioError, read_cut

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from harken.data.mixture import Joined


@dataclass(frozen=True)
class Mixing:
    """What `data.mixing_*` asks for.

    The original mixes the utterances of a batch. Here another utterance is drawn from the whole manifest and read for
    it, so that what a cut is mixed with follows from (seed, epoch, cut id), whatever it shares its batch with.
    Source: arXiv 2110.13900 algorithm 1.
    """

    config: DataConfig
    speech: Manifest | Joined
    noises: Manifest | None

    @classmethod
    def build(cls, config: DataConfig, cuts: Manifest | Joined | None) -> Mixing | None:
        """Open what is mixed in: `data.mixing_speech`, else the training data `cuts`. None when nothing is mixed.

        Raises HarkenError when the training data are a stream, which has no cut at a place, and nothing else is given.
        """
        if not config.mixing_probability:
            return None
        speech = Manifest.filled(config.mixing_speech) if config.mixing_speech else cuts
        if speech is None:
            raise HarkenError(
                "`data.mixing_probability` draws utterances from an indexed manifest, and `data.train` is a stream: "
                "give one as `data.mixing_speech`"
            )
        return cls(config, speech, Manifest.filled(config.mixing_noise) if config.mixing_noise else None)

    def __call__(self, samples: Samples, cut: str, draws: Draws, notes: list[Note]) -> Samples:
        """Return `samples` `(S,)`, mixed in the share of the cuts that `data.mixing_probability` is.

        What cannot be read is noted under its own id, and `samples` stay as they are.
        """
        rng, config = draws.generator("mixing", cut), self.config
        if rng.random() >= config.mixing_probability:
            return samples
        noisy = self.noises is not None and rng.random() < config.mixing_noise_probability
        source = self.noises if self.noises is not None and noisy else self.speech
        chosen = source[int(rng.integers(len(source)))]
        try:
            other = self._read(chosen, len(samples), rng)
        except UnreadableAudioError as error:
            again = f"run `harken data verify {source.path}`"
            notes.append(Note("mixing left out", chosen.id, f"{error}; cuts that draw it stay unmixed: {again}"))
            return samples
        low, high = config.mixing_noise_snr_db if noisy else config.mixing_speech_snr_db
        longest = int(config.mixing_max_share * len(samples))
        return overlay(samples, other, float(rng.uniform(low, high)), longest, rng)

    def _read(self, cut: Cut, most: int, rng: np.random.Generator) -> Samples:
        """Read at most `most` samples, at a drawn place: as long as what it is mixed into, as in a batch of crops."""
        rate = self.config.sample_rate
        surplus = int(cut.duration * rate) - most
        if surplus > 0:
            cut = cut.truncate(offset=int(rng.integers(0, surplus + 1)) / rate, duration=most / rate, preserve_id=True)
        return read_cut(cut, rate)


def overlay(samples: Samples, other: Samples, ratio_db: float, longest: int, rng: np.random.Generator) -> Samples:
    """Add a drawn part of `other`, of 1 to `longest` samples, at a drawn place of `samples`.

    ratio_db: of the mean power of all of `samples` to that of all of `other`, in dB.
    """
    size = min(int(rng.integers(1, max(1, longest) + 1)), len(samples), len(other))
    start = int(rng.integers(0, len(samples) - size + 1))
    begin = int(rng.integers(0, len(other) - size + 1))
    mixed = samples.copy()
    mixed[start : start + size] += gain(samples, other, ratio_db) * other[begin : begin + size]
    return mixed


def gain(samples: Samples, other: Samples, ratio_db: float) -> np.float32:
    """Return the factor on `other` that makes `samples` stronger by `ratio_db`; 0 where one of them is silent."""
    power, other_power = float(np.square(samples).mean()), float(np.square(other).mean())
    return np.float32(np.sqrt(power / other_power / 10 ** (ratio_db / 10)) if other_power > 0 else 0.0)
