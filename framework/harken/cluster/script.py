"""sbatch files: written from the templates in `slurm/`, kept in the experiment's folder, submitted."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harken.cluster.record import JobRecord, folder_of, load_jobs
from harken.cluster.settings import ClusterConfig, check_time
from harken.cluster.slurm import ask_slurm, queue
from harken.core.errors import HarkenError
from harken.core.files import write_text_atomic


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A job to submit.

    exp: folder of the experiment, whose `jobs/` and `logs/` it uses. command: what runs, in `folder`.
    resumes: folder of a training run that a new start continues; None for a job that does not train.
    processes: on each node, when there are no GPUs. after: ids of jobs that must succeed first.
    partition, time: win over the cluster's file. pieces: tasks of an array, each of which does one `--piece` of a
    verb's work and is started again when it fails; 0 for a job that is no array.
    """

    name: str
    exp: Path
    command: tuple[str, ...]
    folder: Path
    resumes: Path | None = None
    nodes: int = 1
    gpus: int = 0
    processes: int = 1
    after: tuple[str, ...] = ()
    partition: str | None = None
    time: str | None = None
    pieces: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise HarkenError(f"`--name` must be of letters, digits, `.`, `_` and `-`, got {self.name!r}")
        if self.nodes < 1 or self.gpus < 0 or self.processes < 1:
            raise HarkenError(
                "`--nodes` and `--processes` must be 1 or more and `--gpus` 0 or more, "
                f"got {self.nodes}, {self.processes} and {self.gpus}"
            )
        if self.time is not None:
            check_time(self.time, "--time")


def render(request: JobRequest, cluster: ClusterConfig, templates: Path) -> str:
    """Return the text of a job's sbatch file.

    Raises HarkenError when a template is not there or names something unknown.
    """
    kind = "stage" if request.resumes is None else "train"
    size = cluster.stage if request.resumes is None else cluster.train
    path = templates / f"{kind}.sbatch"
    if not path.is_file():
        raise HarkenError(f"templates of jobs must lie beside the cluster's file, found no {path}")
    environment = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  bash, not HTML
    )
    supervisor = [sys.executable, "-m", "harken.apps.main", "job", "--exp", str(request.exp), "--name", request.name]
    supervisor += ["--max-starts-without-progress", str(cluster.max_starts_without_progress)]
    words = shlex.join(request.command)
    if request.pieces:
        supervisor.append("--retry")
        words += f' --piece "$SLURM_ARRAY_TASK_ID/{request.pieces}"'
    if request.resumes is not None:
        supervisor += ["--resumes", str(request.resumes)]
    return environment.get_template(path.name).render(
        name=request.name,
        nodes=request.nodes,
        gpus=request.gpus,
        cpus=size.cpus_per_process * (request.gpus or request.processes if kind == "train" else 1),
        memory=size.memory,
        partition=request.partition or size.partition,
        time=request.time or size.time,
        log=_quoted(log_of(request.exp, request.name), array=request.pieces > 0),
        pieces=request.pieces,
        signal_seconds=cluster.signal_seconds,
        after=":".join(request.after),
        options=size.options,
        folder=shlex.quote(str(request.folder)),
        setup=cluster.setup.strip(),
        command=f"{shlex.join([*supervisor, '--'])} \\\n  {words}",
    )


def log_of(exp: Path, name: str) -> Path:
    """Return where Slurm writes what a job prints, `NAME-3` that of a third piece; every start adds to it."""
    return exp / "logs" / f"{name}.slurm.log"


def _quoted(path: Path, *, array: bool) -> str:
    text = str(path).replace("%", "%%")  # sbatch fills patterns such as %j in
    if array:
        text = text.removesuffix(".slurm.log") + "-%a.slurm.log"
    if '"' in text or "\n" in text:
        raise HarkenError(f"a folder of jobs must have neither quotes nor line ends in its name, got {text!r}")
    return f'"{text}"' if " " in text else text


def jobs_of(request: JobRequest, *, begin: bool = False) -> list[JobRequest]:
    """Return the jobs that do what is asked, each of which waits for the one before.

    An array is followed by the command without a piece, which puts all of them together. begin: it follows the command
    with `--piece begin`, which makes what pieces need.
    """
    if not request.pieces:
        return [request]
    array, merge = replace(request, name=f"{request.name}-pieces"), replace(request, pieces=0)
    first = replace(merge, name=f"{request.name}-begin", command=(*request.command, "--piece", "begin"))
    return [first, array, merge] if begin else [array, merge]


def printed(jobs: Sequence[JobRequest], cluster: ClusterConfig, templates: Path) -> str:
    """Return the texts of jobs that wait for each other, with words in place of the ids that Slurm would give."""
    waiting = [replace(job, after=(f"JOB_OF_{before.name}",)) for before, job in itertools.pairwise(jobs)]
    return "".join(render(job, cluster, templates) for job in (*jobs[:1], *waiting))


def submit(jobs: Sequence[JobRequest], cluster: ClusterConfig, templates: Path) -> list[JobRecord]:
    """Submit jobs of one experiment, each behind the one before.

    Raises HarkenError before any is submitted when a job of one of their names still waits or runs.
    """
    # work that is one job now may have been three the last time
    here, names = queue(), {job.name for job in jobs} | {f"{jobs[-1].name}-{part}" for part in ("begin", "pieces")}
    for job in load_jobs(jobs[0].exp):
        left = [entry for id, entry in here.items() if id.partition("_")[0] == job.id]
        if job.name in names and left:
            raise HarkenError(
                f"job {job.id} ({job.name}) of {jobs[0].exp} is still {left[0].state}: wait for it, or end it "
                f"with `scancel {job.id}` (with `--signal=USR1 --batch` it saves and goes on later)"
            )
    records: list[JobRecord] = []
    for request in jobs:
        after = (records[-1].id,) if records else request.after
        records.append(_submit(replace(request, after=after), cluster, templates))
    return records


def _submit(request: JobRequest, cluster: ClusterConfig, templates: Path) -> JobRecord:
    """Write a job's sbatch file, submit it and keep what was asked for; return that with the job's id.

    Raises HarkenError with sbatch's words when it refuses.
    """
    text = render(request, cluster, templates)
    script = folder_of(request.exp) / f"{request.name}.sbatch"
    write_text_atomic(script, text)
    log_of(request.exp, request.name).parent.mkdir(parents=True, exist_ok=True)
    done = ask_slurm("sbatch", "--parsable", str(script))
    record = JobRecord(
        name=request.name,
        id=done.strip().split(";")[0],
        after=list(request.after),
        log=str(log_of(request.exp, request.name)),
        nodes=request.nodes,
        gpus=request.gpus,
        pieces=request.pieces,
        submitted=time.time(),
    )
    record.save(request.exp)
    return record
