"""What an experiment's folder holds: runs, label stores, results and stages, and what is missing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harken.config.load import read_yaml
from harken.core.errors import HarkenError
from harken.report.metrics import Metrics, read_metrics
from harken.units.check import UnitReport, check_units
from harken.units.store import Card, LabelStore


@dataclass(frozen=True)
class Missing:
    """A piece that is not shown: why, and the command that makes it ("" when there is none)."""

    what: str
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder. config: the text of config.yaml; settings: the same, read; versions: of its newest checkpoint."""

    name: str
    folder: Path
    config: str
    settings: dict[str, Any]
    versions: dict[str, str]
    metrics: Metrics

    def setting(self, path: str) -> Any:
        """Return the value at a dotted key of the configuration, None where it has none."""
        value: Any = self.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


@dataclass(frozen=True, kw_only=True)
class Store:
    """A label store and what is in it."""

    name: str
    folder: Path
    card: Card
    report: UnitReport


@dataclass(frozen=True, kw_only=True)
class Result:
    """A scored test set: the contents of its wer.json."""

    name: str
    folder: Path
    score: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a recipe; `seconds` is None when it has begun and not finished, NaN when its marker does not tell.

    commands: what it ran, one a line.
    """

    number: int
    name: str
    seconds: float | None = None
    finished: str = ""
    commands: str = ""
    log: Path | None = None


@dataclass(kw_only=True)
class Experiment:
    """Everything the page shows; `missing` has the pieces left out, by section of the page."""

    folder: Path
    runs: list[Run] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    hypotheses: list[Path] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    missing: dict[str, list[Missing]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the experiment: that of its folder, with its parent's where it says little by itself."""
        folder = self.folder.resolve()
        return f"{folder.parent.name}/{folder.name}" if folder.parent.name else folder.name

    def lacks(self, section: str, what: str, command: str = "") -> None:
        """Note a piece that is missing from a section."""
        self.missing.setdefault(section, []).append(Missing(what, command))

    def last_run_of(self, objective: str) -> Run | None:
        """Return the run of an objective that trained last, None when there is none."""
        found = [run for run in self.runs if run.setting("objective.name") == objective]
        return max(found, key=lambda run: run.metrics.last_time, default=None)


def collect(folder: str | Path) -> Experiment:
    """Read an experiment's folder; a piece that is missing or broken is noted, never an error.

    Raises HarkenError when there is no such folder, or nothing in it that a page could show.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HarkenError(
            f"no experiment at {folder}: expected the folder that a recipe's run.sh or `harken train --exp` wrote"
        )
    experiment = Experiment(folder=folder)
    _runs(experiment)
    _stores(experiment)
    _results(experiment)
    _stages(experiment)
    if not (experiment.runs or experiment.stores or experiment.results or experiment.stages):
        raise HarkenError(
            f"{folder} holds nothing to report: expected run folders (metrics.jsonl), label stores (labels/card.json), "
            "scores (decode/*-score/wer.json) or stages (stages/*.done)"
        )
    return experiment


def _find(folder: Path, *patterns: str) -> list[Path]:
    # Globs of a few levels follow links, which a recursive one does not, and stay out of checkpoints. What a recipe put
    # aside before a forced run is no part of the experiment.
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if not any(part.endswith(".old") for part in path.relative_to(folder).parts))


def _name(experiment: Experiment, folder: Path) -> str:
    relative = folder.relative_to(experiment.folder) if folder.is_relative_to(experiment.folder) else folder
    return str(relative) if relative.parts else experiment.folder.resolve().name


def _runs(experiment: Experiment) -> None:
    folder = experiment.folder
    for path in _find(folder, "metrics.jsonl", "*/metrics.jsonl"):
        name = _name(experiment, path.parent)
        config = path.parent / "config.yaml"
        text = config.read_text(encoding="utf-8") if config.is_file() else ""
        if not text:
            experiment.lacks("runs", f"{name} has no config.yaml", f"harken train CONFIG --exp {path.parent}")
        metrics = read_metrics(path)
        if not metrics.train:
            experiment.lacks("runs", f"{name} has logged no step yet", f"harken train CONFIG --exp {path.parent}")
        if metrics.unreadable:
            experiment.lacks("runs", f"{metrics.unreadable} line(s) of {path} are no records and are left out")
        settings: dict[str, Any] = {}
        try:
            settings = read_yaml(config) if text else {}
        except HarkenError as error:
            experiment.lacks("runs", f"what {name} was: {error}")
        versions = _versions(experiment, path.parent)
        run = Run(name=name, folder=path.parent, config=text, settings=settings, versions=versions, metrics=metrics)
        experiment.runs.append(run)
    experiment.runs.sort(key=lambda run: run.metrics.first_time)
    if not experiment.runs:
        experiment.lacks(
            "runs", f"no training run (metrics.jsonl) in {folder}", f"harken train CONFIG --exp {folder}/NAME"
        )


def _versions(experiment: Experiment, run: Path) -> dict[str, str]:
    found = _find(run, "checkpoints/step-*/versions.json")
    try:
        return dict(json.loads(found[-1].read_text(encoding="utf-8"))) if found else {}
    except (ValueError, TypeError) as error:
        experiment.lacks("runs", f"{found[-1]} cannot be read: {error}")
        return {}


def _stores(experiment: Experiment) -> None:
    folder = experiment.folder
    cards = _find(folder, "labels/card.json", "*/labels/card.json", "*/*/labels/card.json")
    folders = [path.parent for path in cards]
    for run in experiment.runs:
        for named in map(Path, run.setting("data.labels") or ()):
            if named.resolve() not in {known.resolve() for known in folders}:
                folders.append(named)
    for place in folders:
        try:
            store = LabelStore(place)
            report = check_units(store)
        except HarkenError as error:
            experiment.lacks("units", f"label store {place} cannot be shown: {error}")
            continue
        experiment.stores.append(Store(name=_name(experiment, place), folder=place, card=store.card, report=report))
    if not folders:
        experiment.lacks(
            "units",
            f"no label store (labels/card.json) in {folder}",
            f"harken units label MANIFEST --clusterer {folder}/units1/km --out {folder}/units1/labels",
        )


def _results(experiment: Experiment) -> None:
    folder = experiment.folder
    experiment.hypotheses = _find(folder, "decode/*.jsonl", "decode/*/*.jsonl", "*/decode/*.jsonl")
    scores = ("decode/*-score/wer.json", "decode/*/*-score/wer.json", "*/decode/*-score/wer.json")
    for path in _find(folder, *scores):
        parts = _name(experiment, path.parent).removesuffix("-score").split("/")
        name = "/".join(part for part in parts if part != "decode")
        try:
            score = json.loads(path.read_text(encoding="utf-8"))
            _check_score(score)
        except (ValueError, KeyError, TypeError) as error:
            experiment.lacks(
                "results", f"{path} is not a score: {error!r}", f"harken score HYP.jsonl --out {path.parent}"
            )
            continue
        experiment.results.append(Result(name=name, folder=path.parent, score=score))
    scored = {result.folder for result in experiment.results}
    for path in experiment.hypotheses:
        out = path.with_name(f"{path.stem}-score")
        if out not in scored:
            experiment.lacks("results", f"{path} is not scored", f"harken score {path} --out {out}")
    if not experiment.results and not experiment.hypotheses:
        run = experiment.last_run_of("ctc")
        model, out = run.folder if run else f"{folder}/RUN", folder / "decode"
        experiment.lacks(
            "results",
            f"no scored test set (decode/*-score/wer.json) in {folder}",
            f"harken decode {model} NAME.jsonl --out {out} && harken score {out}/NAME.jsonl",
        )


def _check_score(score: dict[str, Any]) -> None:
    for rate in ("wer", "cer"):
        for key in ("rate", "ci95", "sub", "ins", "del", "ref"):
            score[rate][key]
    for one in score["speakers"].values():
        one["utterances"], one["seconds"], one["wer"]["rate"], one["wer"]["ref"], one["cer"]["rate"]


def _stages(experiment: Experiment) -> None:
    folder = experiment.folder
    stages = {path.stem: _stage(path, folder) for path in _find(folder, "stages/*.done")}
    for path in _find(folder, "logs/*.log"):
        number, _, name = path.stem.partition("-")
        # `.slurm`: what the job of a stage printed, beside what the stage did
        if number.isdigit() and path.stem not in stages and not path.stem.endswith(".slurm"):
            stages[path.stem] = Stage(number=int(number), name=name, commands=_commands(folder, path.stem), log=path)
    experiment.stages = sorted(
        (stage for stage in stages.values() if stage), key=lambda stage: (stage.number, stage.name)
    )
    if not experiment.stages:
        experiment.lacks(
            "stages",
            f"no stages (stages/*.done) in {folder}: a recipe's run.sh writes them",
            f"egs/RECIPE/run.sh --exp {folder}",
        )


def _stage(marker: Path, folder: Path) -> Stage | None:
    number, _, name = marker.stem.partition("-")
    if not number.isdigit():
        return None
    text = marker.read_text(encoding="utf-8", errors="replace")
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    seconds = values.get("seconds", "").strip()
    log = folder / "logs" / f"{marker.stem}.log"
    return Stage(
        number=int(number),
        name=name,
        seconds=float(seconds) if seconds.replace(".", "", 1).isdecimal() else math.nan,
        finished=values.get("finished", ""),
        commands=_commands(folder, marker.stem),
        log=log if log.is_file() else None,
    )


def _commands(folder: Path, stage: str) -> str:
    path = folder / "stages" / f"{stage}.commands"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""
