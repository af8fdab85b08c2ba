"""Log-mel bands against kaldi-native-fbank, and MFCC with their differences."""

from __future__ import annotations

import kaldi_native_fbank
import numpy as np
import pytest
import torch

from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.frontends.filterbank import Filterbank, FilterbankConfig, LogMel
from harken.units.features import Hidden, Mfcc, differences, make_features


def signal(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A sweep from 50 Hz upwards and noise, with an offset that Kaldi takes out of each frame."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    sweep = np.sin(2 * np.pi * (50 * time + 0.4 * rate / seconds / 2 * time**2))
    return (0.4 * sweep + 0.05 * rng.standard_normal(len(time)) + 0.1).astype(np.float32)


def kaldi(samples: np.ndarray, rate: int, bands: int, low: float, high: float) -> np.ndarray:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = bands
    options.mel_opts.low_freq = low
    options.mel_opts.high_freq = high
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(rate, (samples * 32768).tolist())
    fbank.input_finished()
    return np.stack([fbank.get_frame(index) for index in range(fbank.num_frames_ready)])


@pytest.mark.parametrize(
    ("rate", "bands", "low", "high"), [(16000, 80, 20.0, 0.0), (16000, 40, 20.0, -400.0), (8000, 23, 60.0, 3800.0)]
)
def test_log_mel_bands_are_kaldis(rate: int, bands: int, low: float, high: float) -> None:
    samples = signal(1.7, rate)
    config = FilterbankConfig(name="filterbank", sample_rate=rate, bands=bands, low_hz=low, high_hz=high)
    own = LogMel(config)(torch.from_numpy(samples)[None])[0].numpy()
    expected = kaldi(samples, rate, bands, low, high)
    assert own.shape == expected.shape
    assert np.abs(own - expected).max() < 1e-3


def test_silence_has_the_floor_of_float32_and_no_infinity() -> None:
    own = LogMel(FilterbankConfig(name="filterbank"))(torch.zeros(1, 4000))
    assert torch.isfinite(own).all()
    assert own[0, 0, 0] == pytest.approx(np.log(np.finfo(np.float32).eps))


def test_bands_beyond_the_audio_are_refused() -> None:
    with pytest.raises(
        HarkenError, match=r"`frontend.low_hz` < `frontend.high_hz` <= 8000.0 must hold, got 20.0 and 9000.0"
    ):
        LogMel(FilterbankConfig(name="filterbank", high_hz=9000.0))


def test_masked_bands_take_their_mean() -> None:
    frontend = Filterbank(FilterbankConfig(name="filterbank", bands=20, channels=8, subsampling=1)).eval()
    inputs, lengths = torch.from_numpy(signal(1.0))[None], torch.tensor([16000])
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, 3:6] = True
    kernel = frontend.subsampling.layers[0].weight
    with torch.no_grad():
        kernel[:, [index for index in range(20) if not 3 <= index < 6]] = 0  # the masked bands alone reach the output
        masked, _ = frontend(inputs, lengths, mask)
        plain, _ = frontend(inputs, lengths)
    assert masked.std(1).max() < 1e-6
    assert plain.std(1).max() > 1e-2


def batch_of(*waves: np.ndarray) -> Batch:
    return collate([Row(f"cut{index}", "", wave, 0) for index, wave in enumerate(waves)])


def test_mfcc_have_their_differences_beside_them() -> None:
    (frames,) = Mfcc()(batch_of(signal(1.0)))
    static, first, second = frames[:, :13], frames[:, 13:26], frames[:, 26:]
    assert frames.shape == (Mfcc().spec.num_frames(16000), 39)
    count = len(static)
    for source, result in ((static, first), (first, second)):
        for t in (0, 1, 2, 40, count - 2, count - 1):
            at = [source[min(max(t + n, 0), count - 1)] for n in (-2, -1, 1, 2)]
            expected = (2 * (at[3] - at[0]) + (at[2] - at[1])) / 10
            assert np.allclose(result[t], expected, atol=1e-4)


def test_the_difference_of_a_line_is_its_slope() -> None:
    line = np.arange(20, dtype=np.float32)[:, None] * np.float32([1, -3])
    assert np.allclose(differences(line)[2:-2], [1, -3])
    assert differences(line[:0]).shape == (0, 2)


def test_padding_does_not_reach_mfcc() -> None:
    long, short = signal(1.0), signal(0.6, seed=1)
    together, alone = Mfcc()(batch_of(long, short))[1], Mfcc()(batch_of(short))[0]
    assert np.array_equal(together, alone)


def test_mean_subtracted_mfcc_have_zero_mean() -> None:
    (frames,) = Mfcc(subtract_mean=True)(batch_of(signal(1.0)))
    assert np.allclose(frames[:, :13].mean(0), 0, atol=1e-4)
    assert Mfcc(subtract_mean=True).describe() != Mfcc().describe()


def test_averaged_mfcc_are_the_mean_of_their_neighbours() -> None:
    (plain,), (smooth,) = Mfcc()(batch_of(signal(1.0))), Mfcc(average=4)(batch_of(signal(1.0)))
    assert smooth.shape == plain.shape
    assert np.allclose(smooth[10], plain[8:12].mean(0), atol=1e-4)


def test_audio_shorter_than_a_window_gives_no_frame() -> None:
    (frames,) = Mfcc()(batch_of(signal(0.02)))
    assert frames.shape == (0, 39)


def test_features_are_made_by_name(corpus, tmp_path) -> None:
    from harken.config.saved import save_model
    from harken.objectives.saved import build_objective

    config = corpus.config("hubert", "waveform")
    save_model(tmp_path, config, build_objective(config).state_dict())
    hidden = make_features("hidden", model=tmp_path, layer=2)
    assert isinstance(hidden, Hidden)
    wave = signal(1.0)
    assert [frames.shape for frames in hidden(batch_of(wave, wave[:9000]))] == [
        (hidden.spec.num_frames(16000), 32),
        (hidden.spec.num_frames(9000), 32),
    ]
    assert hidden.describe().startswith("hidden layer 2 of model ")
    with pytest.raises(HarkenError, match=r"`--layer` must lie in 0\.\.2 for .*, got 3"):
        make_features("hidden", model=tmp_path, layer=3)
    with pytest.raises(HarkenError, match="needs `--model` and `--layer`"):
        make_features("hidden")
    with pytest.raises(HarkenError, match="must be `mfcc` or `hidden`, got `fbank`"):
        make_features("fbank")
    with pytest.raises(HarkenError, match=r"no model at .*nothing"):
        make_features("hidden", model=tmp_path / "nothing", layer=1)
