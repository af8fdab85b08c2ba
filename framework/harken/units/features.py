"""Features that are clustered: MFCC for the first iteration, a hidden layer of a model for the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from harken.config.saved import find_model, weights_digest
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec, Window
from harken.encoders.backbone import hidden_rows
from harken.encoders.saved import load_backbone

Frames = NDArray[np.float32]


class Features(Protocol):
    """Turns a batch of waveforms into one matrix of frames for each."""

    spec: FrameSpec
    rows: int

    def describe(self) -> str:
        """Return what the features are, with the hash of the model if there is one: it goes into every card."""
        ...

    def __call__(self, batch: Batch) -> list[Frames]:
        """Return `(T * rows, D)` float32 for each row of the batch: of each frame `rows` tokens, 1 for most."""
        ...


@dataclass
class Mfcc:
    """13 MFCC with first and second differences, 39 values every 10 ms (HuBERT's first iteration).

    Source: arXiv 2106.07447 section IV-A; Kaldi's MFCC without energy and dither.
    subtract_mean: take each coefficient's mean over the utterance away, and with it much of speaker and channel.
    average: frames over which features are averaged before they are clustered, 1 for none; 4 suits encoders at 40 ms.
    """

    sample_rate: int = 16000
    subtract_mean: bool = False
    average: int = 1

    def __post_init__(self) -> None:
        self.rows = 1
        self.spec = FrameSpec((Window(self.sample_rate * 25 // 1000, self.sample_rate // 100),), self.sample_rate)

    def describe(self) -> str:
        """Return the name and settings."""
        text = f"mfcc39 {self.sample_rate} Hz"
        text += " without mean" if self.subtract_mean else ""
        return text + (f" averaged over {self.average}" if self.average > 1 else "")

    def __call__(self, batch: Batch) -> list[Frames]:
        """Return `(T, 39)` for each row."""
        return [self._row(batch.inputs[row, :length].numpy()) for row, length in enumerate(batch.lengths.tolist())]

    def _row(self, samples: Frames) -> Frames:
        import kaldi_native_fbank

        options = kaldi_native_fbank.MfccOptions()
        options.frame_opts.samp_freq = self.sample_rate
        options.frame_opts.dither = 0.0
        options.use_energy = False
        options.num_ceps = 13
        mfcc = kaldi_native_fbank.OnlineMfcc(options)
        mfcc.accept_waveform(self.sample_rate, (samples * 32768.0).tolist())
        mfcc.input_finished()
        frames = [mfcc.get_frame(index) for index in range(mfcc.num_frames_ready)]
        static = np.asarray(frames, dtype=np.float32).reshape(len(frames), 13)
        if self.subtract_mean and len(static):
            static -= static.mean(0)
        first = differences(static)
        return moving_average(np.concatenate([static, first, differences(first)], axis=1), self.average)


def moving_average(x: Frames, width: int) -> Frames:
    """Return the mean of `width` frames around each of `x` `(T, D)`, edges repeated."""
    if width <= 1 or not len(x):
        return x
    padded = np.pad(x, ((width // 2, width - 1 - width // 2), (0, 0)), mode="edge")
    smooth: Frames = np.lib.stride_tricks.sliding_window_view(padded, width, axis=0).mean(-1, dtype=np.float32)
    return smooth


def differences(x: Frames) -> Frames:
    """Return Kaldi's deltas over two frames a side: `sum_n n (x[t+n] - x[t-n]) / (2 sum_n n^2)`, edges repeated."""
    if not len(x):
        return x
    padded = np.pad(x, ((2, 2), (0, 0)), mode="edge")
    size = len(x)
    rise = padded[3 : 3 + size] - padded[1 : 1 + size] + 2 * (padded[4 : 4 + size] - padded[:size])
    return (rise / np.float32(10)).astype(np.float32, copy=False)


class Hidden:
    """The output of one block of a saved model."""

    def __init__(self, model: str, layer: int) -> None:
        self.model, self.layer = model, layer
        self.backbone, self.config = load_backbone(model)
        if not 0 <= layer <= self.backbone.encoder.num_layers:
            raise HarkenError(f"`--layer` must lie in 0..{self.backbone.encoder.num_layers} for {model}, got {layer}")
        self.device = distributed.device()
        self.backbone.to(self.device)
        self.spec, self.rows = self.backbone.spec, 1  # all patches of a time are clustered as one

    def describe(self) -> str:
        """Return the layer and the hash of the weights."""
        return f"hidden layer {self.layer} of model {weights_digest(find_model(self.model))[:16]}"

    def __call__(self, batch: Batch) -> list[Frames]:
        """Return `(T, D)` for each row."""
        return hidden_rows(self.backbone, batch.to(self.device), (self.layer,))[self.layer]


def make_features(
    kind: str,
    *,
    model: str | Path | None = None,
    layer: int | None = None,
    subtract_mean: bool = False,
    average: int = 1,
    sample_rate: int = 16000,
) -> Features:
    """Make features by name: `mfcc`, or `hidden` of a model's layer.

    Raises HarkenError for settings that do not fit each other.
    """
    if sample_rate < 1000:  # Kaldi's filters do not fit below
        raise HarkenError(f"`--sample-rate` must be in Hz and at least 1000, got {sample_rate}")
    if average < 1:
        raise HarkenError(f"`--average` must be at least 1, got {average}")
    if kind == "mfcc":
        return Mfcc(sample_rate, subtract_mean=subtract_mean, average=average)
    if kind != "hidden":
        raise HarkenError(f"`--features` must be `mfcc` or `hidden`, got `{kind}`")
    if model is None or layer is None:
        raise HarkenError("`--features hidden` needs `--model` and `--layer`")
    if subtract_mean or average > 1:
        raise HarkenError("`--subtract-mean` and `--average` are for `--features mfcc`")
    features = Hidden(str(model), layer)
    if features.spec.sample_rate != sample_rate:
        raise HarkenError(
            f"`--sample-rate` must be the {features.spec.sample_rate} Hz that {model} was trained on, got {sample_rate}"
        )
    return features
