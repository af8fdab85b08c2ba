"""The page: one HTML file that refers to nothing outside itself."""

from __future__ import annotations

import math
import platform
import re
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from harken import __version__
from harken.core.files import write_text_atomic
from harken.evaluate.tables import MIN_SPEAKER_WORDS, SPEAKER_NOTE
from harken.report.collect import Experiment, Result, Run
from harken.report.plots import curves, throughput, units
from harken.report.utterance_plot import ERROR_MARKS, utterance
from harken.report.utterances import View

NOTHING = "\N{EN DASH}"
SPEAKERS_SHOWN = 12


def write_page(experiment: Experiment, out: Path, views: Sequence[View] = (), how_chosen: str = "") -> int:
    """Write the page of an experiment and return its size in bytes.

    views: utterances to show; how_chosen: a sentence on how they were.
    """
    text = render(experiment, views, how_chosen)
    write_text_atomic(out, text)
    return len(text.encode())


def render(experiment: Experiment, views: Sequence[View] = (), how_chosen: str = "") -> str:
    """Return the page as text."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, wall=wall, number=number, clock=clock, marked=marked, known=_known)
    logged = [run for run in experiment.runs if run.metrics.train]
    return environment.get_template("page.html").render(
        experiment=experiment,
        missing=experiment.missing,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),  # noqa: S704 (a file of this package)
        made=time.time(),
        summary=summary(experiment),
        logged=[(run, run_figures(run), _drawn(curves, run)) for run in logged],
        throughput=_drawn(throughput, logged) if logged else "",
        stores=[(store, _drawn(units, store)) for store in experiment.stores],
        speakers=[(result, speaker_rows(result)) for result in experiment.results],
        speakers_shown=SPEAKERS_SHOWN,
        speaker_note=SPEAKER_NOTE,
        min_speaker_words=MIN_SPEAKER_WORDS,
        views=[(view, _drawn(utterance, view)) for view in views],
        how_chosen=how_chosen,
        marks=ERROR_MARKS,
        slowest=max((_known(stage.seconds) for stage in experiment.stages), default=0.0) or 1.0,
        stage_seconds=sum(_known(stage.seconds) for stage in experiment.stages),
        versions=version_rows(experiment),
    )


def _drawn(draw: Callable[[Any], str], of: Any) -> Markup:
    return Markup(draw(of))  # noqa: S704 (figures escape what they quote)


def _known(seconds: float | None) -> float:
    return seconds if seconds is not None and math.isfinite(seconds) else 0.0


def summary(experiment: Experiment) -> str:
    """Return a sentence that says what was reached and what it cost."""
    parts = [
        f"{result.name}: {percent(result.score['wer']['rate'])} % WER, {percent(result.score['cer']['rate'])} % CER"
        for result in experiment.results
    ]
    cost = sum(_known(stage.seconds) for stage in experiment.stages)
    trained = sum(float(run.metrics.train[-1].get("wall", 0.0)) for run in experiment.runs if run.metrics.train)
    if cost:
        parts.append(f"{wall(cost)} in all stages")
    if trained:
        parts.append(
            f"{wall(trained)} of training in {len(experiment.runs)} run{'s' if len(experiment.runs) != 1 else ''}"
        )
    return "; ".join(parts)


def run_figures(run: Run) -> dict[str, Any]:
    """Return what the table of runs says of one: its last records, best validation and medians of its speed."""
    last, metrics = run.metrics.train[-1], run.metrics
    metric = str(run.setting("checkpoint.metric") or "loss")
    return {
        "objective": run.setting("objective.name") or NOTHING,
        "encoder": run.setting("encoder.name") or NOTHING,
        "step": last["step"],
        "steps": run.setting("train.steps"),
        "hours": float(last["hours"]),
        "wall": float(last.get("wall", math.nan)),
        "loss": float(last.get("loss", math.nan)),
        "best": metrics.best(metric, higher=bool(run.setting("checkpoint.higher_is_better"))),
        "metric": metric,
        "speed": metrics.median("audio_seconds_per_second"),
        "padding": metrics.median("padding_percent"),
        "waiting": metrics.median("data_wait_percent"),
        "mfu": metrics.median("mfu_percent"),
        "memory": max((float(record.get("memory_gib", 0.0)) for record in metrics.train), default=math.nan),
    }


def speaker_rows(result: Result) -> list[dict[str, Any]]:
    """Return a test set's speakers, those with the most reference words first."""
    rows = [{"name": name, **one} for name, one in result.score["speakers"].items()]
    return sorted(rows, key=lambda row: (-row["wer"]["ref"], row["name"]))


def version_rows(experiment: Experiment) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the names of the columns (this page, then runs) and each package's versions in them."""
    here = {"harken": __version__, "python": platform.python_version()}
    for package in ("torch", "deepspeed", "lhotse", "matplotlib"):
        try:
            here[package] = version(package)
        except PackageNotFoundError:
            continue
    columns = [("this page", here), *((run.name, run.versions) for run in experiment.runs if run.versions)]
    packages = list(dict.fromkeys(package for _, versions in columns for package in versions))
    return [name for name, _ in columns], [
        (package, [versions.get(package, NOTHING) for _, versions in columns]) for package in packages
    ]


def percent(rate: float | None, digits: int = 1) -> str:
    """Return a share in percent, without the sign."""
    return NOTHING if rate is None or not math.isfinite(rate) else f"{100 * rate:.{digits}f}"


def number(value: float | None, digits: int = 1) -> str:
    """Return a number with thousands set apart."""
    return (
        NOTHING
        if value is None or not math.isfinite(value)
        else f"{value:,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    )


def wall(seconds: float | None) -> str:
    """Return a duration as `1 h 02 min`, `4.5 min` or `12 s`."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        return f"{seconds / 60:.1f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def marked(text: str) -> Markup:
    """Return a text with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 (escaped just before)


def clock(seconds: float) -> str:
    """Return a time since 1970 as a local date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
