"""`harken launch`: a command as a job of a Slurm cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harken.cluster.settings import ClusterConfig

PIECED = (("data", "scan"), ("data", "verify"), ("units", "label"), ("decode",), ("features",), ("align",))
"""Verbs that know `--piece`."""
HELP = (
    "Write a readable sbatch file for a command and submit it. A job that trains saves before the end of its time, "
    "is requeued and continues exactly. Where no cluster is, --dry-run prints the file."
)
EXAMPLE = (
    "harken launch --nodes 4 --gpus 8 --time 24:00:00 -- train hubert_base --exp exp/base data.train=train.jsonl\n"
    "  harken launch --exp exp/base --after 4711 -- bash local/labels.sh\n"
    "  harken launch --exp exp/base --pieces 20 -- data verify data/train.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from harken.cluster.settings import FOLDER

    parser.add_argument(
        "--exp", type=Path, help="folder of the experiment, for the job's file, logs and record; that of a verb"
    )
    parser.add_argument("--name", help="of the job (default: the verb or program)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default: 1)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each node, one process each (default: 0)")
    parser.add_argument("--processes", type=int, default=1, help="processes of each node without GPUs (default: 1)")
    parser.add_argument("--partition", help="Slurm's partition (default: that of the cluster's file)")
    parser.add_argument("--time", help="limit of a start, as sbatch reads it (default: that of the cluster's file)")
    parser.add_argument(
        "--after", default="", help="ids of jobs that must succeed first, separated by commas (default: none)"
    )
    parser.add_argument(
        "--resumes",
        type=Path,
        help="folder of the run that the command continues when it is started again; `train` has it",
    )
    parser.add_argument(
        "--cluster",
        type=Path,
        default=FOLDER / "cluster.yaml",
        help=f"your cluster's file (default: {FOLDER}/cluster.yaml)",
    )
    parser.add_argument(
        "--pieces",
        default="0",
        metavar="N",
        help="do a command that has --piece as an array of so many tasks, and behind it a job that puts them together; "
        "`cluster` takes the number of the cluster's file (default: 0, no array)",
    )
    parser.add_argument(
        "--begin",
        action="store_true",
        help="before the array, a job of the command with `--piece begin`, which makes what pieces need",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the file and submit nothing")
    parser.add_argument("--parsable", action="store_true", help="print the job's id alone")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="after `--`: a verb of harken or a program, with its arguments"
    )


def run(args: argparse.Namespace) -> int:
    """Print or submit the job."""
    from harken.cluster.script import JobRequest, jobs_of, printed, submit
    from harken.cluster.settings import load_cluster

    command, exp, resumes = _command(args)
    cluster = load_cluster(args.cluster)
    request = JobRequest(
        name=args.name or Path(_words(args)[0]).stem,
        exp=exp.resolve(),
        command=tuple(command),
        folder=Path.cwd(),
        resumes=resumes.resolve() if resumes is not None else None,
        nodes=args.nodes,
        gpus=args.gpus,
        processes=args.processes,
        after=tuple(filter(None, args.after.split(","))),
        partition=args.partition,
        time=args.time,
        pieces=_pieces(args.pieces, cluster),
    )
    jobs, templates = jobs_of(request, begin=args.begin), args.cluster.resolve().parent
    if args.dry_run:
        print(printed(jobs, cluster, templates), end="")
        return 0
    *before, job = submit(jobs, cluster, templates)
    for other in before:
        words = f", {other.pieces} pieces" if other.pieces else ""
        print(f"submitted job {other.id} ({other.name}){words}", file=sys.stderr)
    if args.parsable:
        print(job.id)
    else:
        print(f"submitted job {job.id} ({job.name}); its log: {job.log}; `harken status {exp}` tells how it goes")
    return 0


def _pieces(text: str, cluster: ClusterConfig) -> int:
    from harken.core.errors import HarkenError

    if text == "cluster":
        return cluster.pieces if cluster.pieces > 1 else 0
    if not text.isdecimal():
        raise HarkenError(f"`--pieces` must be 0 (no array) or more, or `cluster`, got {text}")
    return int(text)


def _words(args: argparse.Namespace) -> list[str]:
    from harken.core.errors import HarkenError

    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        raise HarkenError(
            "a command must follow after `--`, found none: harken launch --nodes 2 -- train CONFIG --exp EXP"
        )
    return list(words)


def _command(args: argparse.Namespace) -> tuple[list[str], Path, Path | None]:
    """Return what the job runs, the experiment's folder, and the run that a new start continues."""
    from harken.apps.main import VERBS
    from harken.core.errors import HarkenError

    words, folder, harken = _words(args), None, [sys.executable, "-m", "harken.apps.main"]
    if words[0] in VERBS:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--exp", type=Path)
        folder = parser.parse_known_args(words[1:])[0].exp
    exp = args.exp or folder
    if exp is None:
        raise HarkenError("`--exp` must name the folder of the experiment, found none before `--`")
    resumes = args.resumes
    if words[0] == "train":
        resumes = resumes or folder
        cluster = ["--cluster", str(args.cluster.resolve())]
        words = ["parallel", "--processes", str(args.processes), *cluster, "--preflight", str(exp), "--", *words]
        words.append("--fail-when-stopped")
    elif words[0] not in VERBS:
        harken = []
    if args.pieces != "0" and harken and tuple(words[:1]) not in PIECED and tuple(words[:2]) not in PIECED:
        known = ", ".join(f"`{' '.join(verb)}`" for verb in PIECED)
        raise HarkenError(f"`--pieces` is for {known}, got `{' '.join(words[:2])}`")
    if args.pieces != "0" and resumes is not None:
        raise HarkenError("`--pieces` is for work that does not train: leave `--resumes` out")
    if args.begin and (harken or args.pieces == "0"):
        raise HarkenError("`--begin` is for a program that knows `--piece begin`, with `--pieces N`")
    if resumes is None and (args.nodes > 1 or args.gpus):
        raise HarkenError("`--nodes` and `--gpus` are for jobs that train: give `train ...`, or `--resumes FOLDER`")
    return [*harken, *words], exp, resumes
