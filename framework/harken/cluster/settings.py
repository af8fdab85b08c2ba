"""What is particular to a user's cluster: `slurm/cluster.yaml`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from harken.config.rules import check_numbers
from harken.config.structure import structure
from harken.core.errors import HarkenError

FOLDER = Path(__file__).resolve().parents[3] / "slurm"
"""Of the checkout: the default `cluster.yaml` and the templates of jobs."""
TIME = re.compile(r"(\d+-\d+|\d+)(:\d+){0,2}")


def check_time(text: str, name: str) -> str:
    """Return a limit of time as Slurm reads it.

    Raises HarkenError for other texts. Source: sbatch(1), `--time`.
    """
    if not TIME.fullmatch(text):
        raise HarkenError(
            f"`{name}` must be minutes, MINUTES:SECONDS, HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]], "
            f"got {text!r}"
        )
    return text


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """What jobs of one kind ask for."""

    partition: str | None = None
    """Slurm's partition; None is the cluster's default."""
    time: str = "12:00:00"
    """Limit of a start, as sbatch reads it."""
    cpus_per_process: int = 1
    """CPUs of each process on a node: its threads and its loader's processes."""
    memory: str | None = None
    """Memory of a node, as sbatch's `--mem` reads it; None is the cluster's default."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, each as it would stand on its command line."""

    def __post_init__(self) -> None:
        check_numbers(self, "cluster", positive=("cpus_per_process",))
        check_time(self.time, "time")
        wrong = [option for option in self.options if not option.startswith("-") or "\n" in option]
        if wrong:
            raise HarkenError(f"`options` must be options of sbatch, each beginning with `-`, got {wrong[0]!r}")


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What several nodes must show before they train."""

    wait_seconds: int = 180
    """How long the first node waits for the others."""
    max_clock_skew_seconds: float = 2.0
    """Largest difference of a node's clock from the first node's."""
    gigabytes_per_second: float | None = None
    """Bus bandwidth of an all-reduce between two nodes that is expected; less than half of it is refused. None
    measures without judging."""

    def __post_init__(self) -> None:
        check_numbers(self, "preflight", positive=("wait_seconds", "max_clock_skew_seconds", "gigabytes_per_second"))


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Everything of `slurm/cluster.yaml`."""

    setup: str = ""
    """Lines of bash that every job runs first."""
    train: SizeConfig = field(default_factory=lambda: SizeConfig(time="24:00:00", cpus_per_process=8))
    """Jobs that train."""
    stage: SizeConfig = field(default_factory=lambda: SizeConfig(cpus_per_process=16))
    """All other jobs."""
    pieces: int = 4
    """Tasks of the array that does a stage of a recipe which divides; 1 makes none."""
    signal_seconds: int = 300
    """How long before its limit a job is told to save."""
    max_starts_without_progress: int = 3
    """Starts in a row that may end without a new checkpoint."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """Checks before training on several nodes."""

    def __post_init__(self) -> None:
        check_numbers(self, "cluster", positive=("pieces", "signal_seconds", "max_starts_without_progress"))


def load_cluster(path: Path) -> ClusterConfig:
    """Read a cluster's file.

    Raises HarkenError that names the file and each key that is wrong.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise HarkenError(
            f"{path} must be a YAML file about your cluster, such as slurm/cluster.yaml: {error}"
        ) from error
    for kind in ("train", "stage"):
        size = (data or {}).get(kind) if isinstance(data or {}, dict) else None
        if isinstance(size, dict) and isinstance(size.get("time"), int):  # YAML 1.1 reads 24:00:00 as 86400
            raise HarkenError(
                f'{path}: `{kind}.time` must be in quotes, as in time: "24:00:00"; YAML reads it as a number'
            )
    try:
        return structure(ClusterConfig, data or {})
    except HarkenError as error:
        raise HarkenError(f"{path}: {error}") from error
