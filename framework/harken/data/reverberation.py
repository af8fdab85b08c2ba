"""Reverberation: an utterance as it sounds in a room, while all of it stays where it is in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.config.schema import DataConfig
from harken.core.batch import Note
from harken.core.draws import Draws
from harken.data.manifest import Manifest
from harken.data.read import Samples, UnreadableAudioError, read_cut

_RISE = 8  # samples within which a band-limited impulse goes from half its height to its peak, at any rate


@dataclass(frozen=True)
class Reverberation:
    """What `data.reverberation` asks for.

    Labels are those of the clean speech, so that what predicts them learns to take the room away.
    Source: XEUS, arXiv 2407.00837 section 4.2; ESPnet's `HuBERTCollateFn`.
    """

    config: DataConfig
    responses: Manifest

    @classmethod
    def build(cls, config: DataConfig) -> Reverberation | None:
        """Open the impulse responses. None when none are given."""
        return cls(config, Manifest.filled(config.reverberation)) if config.reverberation else None

    def __call__(self, samples: Samples, cut: str, draws: Draws, notes: list[Note]) -> Samples:
        """Return `samples` `(S,)` in a room, in the share of the cuts that `data.reverberation_probability` is.

        A response that cannot be read, or is silent, is noted under its own id, and `samples` stay as they are.
        """
        rng = draws.generator("reverberation", cut)
        if rng.random() >= self.config.reverberation_probability:
            return samples
        chosen = self.responses[int(rng.integers(len(self.responses)))]
        try:
            response = read_cut(chosen, self.config.sample_rate)
            if not response.any():
                raise UnreadableAudioError(f"cut `{chosen.id}` is silent")
        except UnreadableAudioError as error:
            again = f"run `harken data verify {self.responses.path}`"
            notes.append(Note("room left out", chosen.id, f"{error}; cuts that draw it stay as they are: {again}"))
            return samples
        return in_room(samples, response)


def in_room(samples: Samples, response: Samples) -> Samples:
    """Return `(S,)` convolved with an impulse response `(R,)`, at the power it had and without the room's delay.

    So frames stay under their labels. Source: arXiv 2407.00837 section 4.2, where power is that of what is no silence.
    """
    return convolve(samples, response, direct_sound(response))


def direct_sound(response: Samples) -> int:
    """Return where in an impulse response `(R,)` the direct sound is: the first peak of half the largest one or more.

    XEUS takes the largest. Where reflections meet that is one of them: of 40 simulated rooms in nine, up to 8 ms late.
    """
    size = np.abs(response)
    first = int((size >= 0.5 * size.max()).argmax())
    return first + int(size[first : first + _RISE].argmax())


def convolve(samples: Samples, response: NDArray[np.floating[Any]], delay: int = 0) -> Samples:
    """Return S samples of `(S,)` convolved with `(R,)`, those behind the first `delay`, at the power of `(S,)`."""
    width = 1 << (len(samples) + len(response) - 2).bit_length()  # powers of two are the fastest, primes the slowest
    whole = np.fft.irfft(np.fft.rfft(samples, width) * np.fft.rfft(response, width), width)
    wet = whole[delay : delay + len(samples)]
    power, own = float(np.square(samples).mean()), float(np.square(wet).mean())
    result: Samples = (wet * (np.sqrt(power / own) if own > 0 else 1.0)).astype(np.float32)
    return result
