"""Figures of runs and label stores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from harken.report.collect import Run, Store
from harken.report.metrics import Curve, Floats, Metrics, smooth, thin
from harken.report.svg import SERIES, WIDTH, page_style, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {
    "loss": "loss (nats per target)",
    "accuracy": "accuracy (%)",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    "audio_seconds_per_second": "speed (s of audio per s)",
    "padding_percent": "padding (% of samples)",
    "data_wait_percent": "waiting for data (% of time)",
    "mfu_percent": "FLOP/s utilisation (% of peak)",
    "memory_gib": "memory (GiB)",
}
THROUGHPUT = ("audio_seconds_per_second", "padding_percent", "data_wait_percent", "mfu_percent")
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_ALONE = (*THROUGHPUT, "memory_gib")


def curves(run: Run) -> str:
    """Draw the loss, the accuracy and every other figure of a run but its speed, each family in a panel."""
    metrics = run.metrics
    families: dict[str, list[str]] = {}
    for name in metrics.names():
        if name not in _ALONE:
            families.setdefault(_family(name), []).append(name)
    order = sorted(
        families,
        key=lambda family: (
            family != "loss",
            family != "accuracy",
            family in {"gradient_norm", "learning_rate"},
        ),
    )
    with page_style():
        rows = math.ceil(len(order) / 2)
        figure = Figure(figsize=(WIDTH, 2.5 * rows))
        axes = figure.subplots(rows, 2, squeeze=False).flatten().tolist()
        for place, (ax, family) in enumerate(zip(axes, order, strict=False)):
            _curve_panel(ax, metrics, family, families[family])
            if place < 2:
                _step_axis(ax, metrics)
        for ax in axes[len(order) :]:
            ax.set_axis_off()
        return to_svg(figure, f"curves of {run.name}", f"Training curves of {run.name}: {', '.join(order)}")


def throughput(runs: Sequence[Run]) -> str:
    """Draw speed, padding, waiting and utilisation of all runs, each run in its colour."""
    with page_style():
        figure = Figure(figsize=(WIDTH, 4.4))
        axes = figure.subplots(2, 2).flatten().tolist()
        for ax, name in zip(axes, THROUGHPUT, strict=True):
            for place, run in enumerate(runs):
                curve = run.metrics.curve("train", name)
                if not len(curve.values):
                    continue
                style = ("-", "--", ":")[place // len(SERIES) % 3]
                _line(ax, curve.hours, curve.values, SERIES[place % len(SERIES)], run.name, style)
            ax.set_ylim(bottom=0)
            _label(ax, _LABELS[name])
        if len(runs) > 1:
            axes[0].legend(loc="best")
        return to_svg(figure, "throughput", "Speed, padding, waiting for data and utilisation of the training runs")


def units(store: Store) -> str:
    """Draw the sorted shares of a store's units and the lengths of its runs."""
    counts = np.sort(np.asarray(store.report.counts, dtype=np.float64))[::-1]
    lengths = np.asarray(store.report.run_lengths, dtype=np.float64)
    period = 1000 / store.card.rate
    with page_style():
        figure = Figure(figsize=(WIDTH, 2.5))
        left, right = figure.subplots(1, 2)
        ranks = np.arange(1, len(counts) + 1)
        left.fill_between(
            np.append(ranks, len(counts) + 1) - 0.5,
            np.append(counts, 0.0) / max(1, counts.sum()),
            step="post",
            color=SERIES[0],
            linewidth=0,
        )
        left.axhline(
            1 / store.card.clusters,
            color=SERIES[1],
            linestyle="--",
            linewidth=1,
            label="all units equally often",
        )
        left.legend(loc="upper right")
        left.yaxis.set_major_formatter(_PERCENT)
        left.set(
            xlabel="unit, the most frequent first",
            ylabel="share of the labels",
            xlim=(0.5, len(counts) + 0.5),
            ylim=(0, None),
        )
        right.bar(np.arange(1, len(lengths) + 1), lengths / max(1, lengths.sum()), width=0.85, color=SERIES[0])
        right.yaxis.set_major_formatter(_PERCENT)
        right.set(
            xlabel=f"labels in a row that are equal (1 label = {period:g} ms; the last bar: {len(lengths)} or more)",
            ylabel="share of the runs",
            xlim=(0.4, len(lengths) + 0.6),
        )
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(figure, f"units of {store.name}", f"Unit shares and run lengths of {store.name}")


def _family(name: str) -> str:
    for family in ("loss", "accuracy"):
        if name == family or name.startswith(f"{family}_"):
            return family
    return name


def _curve_panel(ax: Axes, metrics: Metrics, family: str, names: Sequence[str]) -> None:
    scale = 100.0 if family == "accuracy" or family.endswith("_share") else 1.0
    lows: list[float] = []
    highs: list[float] = []
    for place, name in enumerate(names):
        short = name.removeprefix(family).strip("_")
        for kind in ("train", "valid"):
            curve = metrics.curve(kind, name)
            if not len(curve.values):
                continue
            color = SERIES[place % len(SERIES)] if len(names) > 1 else SERIES[kind == "valid"]
            label = f"{kind} {short}".strip() if len(names) > 1 or metrics.curve("valid", name).values.size else None
            values = curve.values * scale
            if kind == "train":
                _line(ax, curve.hours, values, color, label, smoothed=family != "learning_rate")
            else:
                ax.plot(curve.hours, values, color=color, linestyle="--", marker="o", markersize=3.5, label=label)
            finite = values[np.isfinite(values)]
            # the first few records are far off and would flatten the rest
            settled = finite[len(finite) // 20 :] if kind == "train" else finite
            lows += [finite.min()] if len(finite) else []
            highs += [settled.max()] if len(settled) else []
    if family == "gradient_norm":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(_PLAIN)
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif lows and max(highs) > min(lows):
        margin = 0.06 * (max(highs) - min(lows))
        ax.set_ylim(min(lows) - margin, max(highs) + margin)
    if family == "learning_rate":
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best")
    _label(ax, _LABELS.get(family, family.replace("_", " ").replace("share", "share (%)")))


def _line(
    ax: Axes,
    hours: Floats,
    values: Floats,
    color: str,
    label: str | None,
    style: str = "-",
    *,
    smoothed: bool = True,
) -> None:
    """Draw a curve: as logged, faint, and its running mean over about a 25th of it."""
    width = max(1, len(values) // 25) | 1 if smoothed else 1
    if width > 1:
        raw = thin(Curve(hours, values))
        ax.plot(raw.hours, raw.values, color=color, alpha=0.25, linewidth=0.8)
    mean = thin(Curve(hours, smooth(values, width)))
    marker = "o" if len(values) == 1 else None
    ax.plot(mean.hours, mean.values, color=color, label=label, linestyle=style, marker=marker, markersize=3.5)


def _label(ax: Axes, label: str) -> None:
    ax.set_xlabel("audio seen (h)")
    ax.set_ylabel(label)
    ax.set_xlim(left=0)


def _step_axis(ax: Axes, metrics: Metrics) -> None:
    maps: Any = (metrics.steps_at, metrics.hours_at)
    top = ax.secondary_xaxis("top", functions=maps)
    top.set_xlabel("step")
    top.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    top.spines["top"].set_visible(False)
    top.tick_params(length=0)
