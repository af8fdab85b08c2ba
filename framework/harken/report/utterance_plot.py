"""An utterance on one time axis: spectrogram, units, CTC posteriors, and the words of reference and hypothesis."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from harken.data.tokens import BLANK
from harken.report.svg import FAINT, INK, SERIES, WIDTH, page_style, to_svg
from harken.report.utterances import Times, UnitRow, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_INCHES = 0.115
LANE_INCHES = 0.3
MOST_ROWS = 40
# substituted, inserted and deleted words; marks tell them apart without colours
ERROR_COLORS = {"sub": SERIES[1], "ins": SERIES[3], "del": SERIES[0]}
ERROR_MARKS = {"sub": "S", "ins": "I", "del": "D"}


@dataclass(frozen=True)
class Word:
    """A word of a lane: its bar from `left` to `right` and its text from `start`, in seconds."""

    text: str
    color: str
    left: float
    right: float
    lane: int
    start: float


def utterance(view: View) -> str:
    """Draw a view."""
    rows = _rows(view)
    said = _lanes([(op.kind, op.ref) for op in view.ops if op.ref], view.ref_times, view.seconds)
    heard = _lanes([(op.kind, op.hyp) for op in view.ops if op.hyp], view.hyp_times, view.seconds)
    words = [LANE_INCHES * (1 + max((word.lane for word in lanes), default=0)) for lanes in (said, heard)]
    heights = [1.6, *(0.3 for _ in view.units), ROW_INCHES * len(rows) + 0.1, *words]
    with page_style({"axes.grid": False}):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.5))
        axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights).tolist()
        _spectrogram(axes[0], view)
        for ax, row in zip(axes[1:], view.units, strict=False):
            _unit_row(ax, row, view.seconds)
        _posteriors(axes[-3], view, rows)
        _words(axes[-2], "reference", said, view.ref)
        _words(axes[-1], "hypothesis", heard, view.hyp)
        for ax in axes[:-1]:
            ax.tick_params(axis="x", length=0)
        axes[-1].set(xlim=(0, view.seconds), xlabel="time (s)")
        figure.align_ylabels(axes)
        return to_svg(
            figure,
            f"utterance {view.id}",
            f"Spectrogram, units and CTC posteriors of {view.id}; said: {view.ref}; heard: {view.hyp}",
        )


def spectrogram(samples: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    """Return power in dB `(T, F)` below the loudest bin: 25 ms Hann windows every 10 ms, each centred on its time."""
    size, hop = sample_rate // 40, sample_rate // 100
    padded = np.pad(samples, (size // 2, size))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[: len(samples) : hop]
    power = np.abs(np.fft.rfft(windows * np.hanning(size), n=512 * max(1, round(size / 400)))) ** 2
    level = (10 * np.log10(power + 1e-10)).astype(np.float32)
    below: NDArray[np.float32] = level - level.max()
    return below


def _spectrogram(ax: Axes, view: View) -> None:
    level = spectrogram(view.samples, view.sample_rate)
    image = mpl.colormaps["magma"](np.clip(1 + level.T / 70, 0, 1), bytes=True)[:, :, :3]
    half = 0.005
    ax.imshow(
        image,
        origin="lower",
        aspect="auto",
        interpolation="none",
        extent=(-half, len(level) * 2 * half - half, 0, view.sample_rate / 2000),
    )
    ax.set_ylabel("frequency (kHz)")


def _unit_row(ax: Axes, row: UnitRow, seconds: float) -> None:
    """Draw units as coloured spans; the number stands where it has room."""
    starts = np.flatnonzero(np.diff(row.values, prepend=-1))
    edges = np.append(row.edges[starts], row.edges[-1])
    values = row.values[starts]
    colors = [_unit_color(int(value)) for value in values]
    ax.bar(edges[:-1], 1.0, width=np.diff(edges), align="edge", color=colors, linewidth=0)
    for left, right, value in zip(edges[:-1], edges[1:], values.tolist(), strict=True):
        if (right - left) / seconds * WIDTH * 72 > 5.0 * len(str(value)) + 1:
            ax.text(
                (left + right) / 2,
                0.5,
                str(value),
                ha="center",
                va="center",
                fontsize=6,
                color="#101010",
                clip_on=True,
            )
    ax.set(ylim=(0, 1), yticks=[])
    name = row.name.removesuffix("/labels").rsplit("/", 1)[-1]
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
    ax.spines[:].set_visible(False)


def _unit_color(unit: int) -> tuple[float, float, float]:
    """Give units of neighbouring numbers colours far apart, all light enough for dark text."""
    hue = unit * 0.61803398875 % 1.0
    return colorsys.hls_to_rgb(hue, (0.62, 0.74, 0.86)[unit % 3], 0.55)


def _rows(view: View) -> list[int]:
    """Return the tokens worth a row: those likely at some frame, at most `MOST_ROWS` of them; the blank comes first."""
    best = view.probabilities.max(axis=0, initial=0.0)  # audio too short for a frame has none
    best[BLANK] = 0.0
    likely = np.flatnonzero(best >= 0.2)
    likely = likely[np.argsort(-best[likely], kind="stable")][:MOST_ROWS]
    return [BLANK, *sorted(likely.tolist())]


def _posteriors(ax: Axes, view: View, rows: list[int]) -> None:
    shown = view.probabilities[:, rows].T[::-1]
    image = np.empty((*shown.shape, 4))
    image[..., :3] = to_rgb("#1688cf")  # tells itself from white and from black
    image[-1, :, :3] = 0.55  # the blank is grey: it is no token
    image[..., 3] = np.clip(shown, 0, 1)
    if len(shown.T):
        half = view.output_seconds / 2
        ax.imshow(
            image,
            origin="lower",
            aspect="auto",
            interpolation="none",
            extent=(view.output_times[0] - half, view.output_times[-1] + half, -0.5, len(rows) - 0.5),
        )
    names = [view.symbols[row].replace("<space>", "space").replace("<blank>", "blank") for row in reversed(rows)]
    ax.set_yticks(range(len(rows)), names, fontsize=6)
    ax.tick_params(axis="y", length=0, pad=2)
    ax.set_ylabel("CTC posterior")
    for line in range(len(rows)):
        ax.axhline(line - 0.5, color=FAINT, linewidth=0.3, alpha=0.35)


def _lanes(tokens: list[tuple[str, str]], times: Times, seconds: float) -> list[Word]:
    """Place words at their times, in a second lane where the one before leaves no room."""
    per_second = (WIDTH - 1.0) * 72 / seconds
    ends = [0.0, 0.0]
    placed = []
    for (kind, word), (left, right) in zip(tokens, times, strict=False):
        text = f"{word} ({ERROR_MARKS[kind]})" if kind in ERROR_MARKS else word
        lane = 0 if ends[0] <= left or ends[0] <= ends[1] else 1
        start = max(left, ends[lane])
        placed.append(Word(text, ERROR_COLORS.get(kind, INK), left, right, lane, start))
        ends[lane] = start + (len(text) * 4.7 + 4) / per_second
    return placed


def _words(ax: Axes, name: str, placed: list[Word], text: str) -> None:
    """Write words where they were placed, under bars from their first output to their last."""
    lanes = 1 + max((word.lane for word in placed), default=0)
    ax.set(ylim=(-lanes, 0), yticks=[-0.5])
    ax.set_yticklabels([name], fontsize=8)
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
    for word in placed:
        ax.plot(
            [word.left, word.right],
            [-word.lane - 0.12] * 2,
            color=word.color,
            linewidth=2.2,
            solid_capstyle="butt",
        )
        ax.text(word.start, -word.lane - 0.28, word.text, ha="left", va="top", color=word.color, fontsize=7.5)
    if not placed:
        ax.text(
            0.0,
            -0.5,
            f"{text} (no times: its tokens have no path through the frames)" if text else "(nothing)",
            va="center",
            fontsize=7.5,
        )
