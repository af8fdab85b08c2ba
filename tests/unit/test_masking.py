"""Span masks: how much they cover, what they never do, and that they are drawn from their generator alone."""

from __future__ import annotations

import numpy as np
import pytest

from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.masking import SpanMask


def draw(mask: SpanMask, frames: int, item: int = 0):
    return mask.draw(frames, Draws(1, 0).generator("mask", str(item)))


def test_a_mask_is_a_function_of_its_generator() -> None:
    mask = SpanMask()
    assert np.array_equal(draw(mask, 200), draw(mask, 200))
    assert not np.array_equal(draw(mask, 200), draw(mask, 200, item=1))


def test_hubert_masks_about_half_of_the_frames() -> None:
    """0.8 of the frames in spans of 10 that may overlap: 1 - exp(-0.8) = 55% are left covered."""
    shares = [draw(SpanMask(probability=0.8, length=10), 500, item).mean() for item in range(400)]
    assert np.mean(shares) == pytest.approx(1 - np.exp(-0.8), abs=0.02)
    assert np.std(shares) > 0.01


def test_the_number_of_spans_is_right_on_average() -> None:
    """One span in 25 frames on average, where 0.4 x 25 / 10 is no whole number."""
    mask = SpanMask(probability=0.42, length=10, at_least=0)
    covered = [draw(mask, 25, item).sum() for item in range(4000)]
    assert set(covered) <= set(range(10, 21))
    assert np.mean([count > 10 for count in covered]) == pytest.approx(0.05 * 14 / 15, abs=0.015)


@pytest.mark.parametrize("frames", [2, 3, 5, 9, 10, 11, 12, 30])
def test_short_sequences_keep_a_frame_to_see_and_one_to_predict(frames: int) -> None:
    for item in range(50):
        masked = draw(SpanMask(), frames, item)
        assert masked.shape == (frames,)
        assert 0 < masked.sum() < frames


@pytest.mark.parametrize("frames", [0, 1])
def test_nothing_is_masked_where_nothing_would_be_left(frames: int) -> None:
    assert not draw(SpanMask(), frames).any()


def test_masked_frames_come_in_whole_spans() -> None:
    for item in range(100):
        masked = draw(SpanMask(probability=0.3, length=7), 100, item).astype(int)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], masked, [0]])))
        assert ((edges[1::2] - edges[::2]) >= 7).all()


def test_no_place_is_left_out_but_the_last() -> None:
    """As in fairseq, a span ends before the last frame: `choice(frames - length)` excludes the last start."""
    masks = np.stack([draw(SpanMask(), 40, item) for item in range(500)])
    assert masks.mean(0)[:-1].min() > 0.02
    assert masks.mean(0)[5:34].min() > 0.3
    assert not masks[:, -1].any()


def test_probability_zero_masks_nothing() -> None:
    assert not draw(SpanMask(probability=0.0), 100).any()


@pytest.mark.parametrize("settings", [{"probability": 1.1}, {"probability": -0.1}, {"length": 0}])
def test_settings_without_sense_are_refused(settings) -> None:
    with pytest.raises(HarkenError, match=r"a probability in 0..1 and a length of at least 1"):
        SpanMask(**settings)
