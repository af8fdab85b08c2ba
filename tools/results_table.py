"""The rows of a comparison: what each was trained with, what came out, and the table of a README.

A row is a folder MINUTES-START-SEED that holds a run, its scores and the commands that made them. `begin` notes where
and from what code a row is trained, each time it begins or continues; `finish` gathers everything into its result.json;
`table` adds the results to those of earlier calls and writes the table. The comparisons of a recipe call all three.

Example:
  python tools/results_table.py table exp/compare --results egs/amazon_queen/results --readme egs/amazon_queen/README.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic, write_text_atomic
from harken.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
STARTS = {"scratch": "from scratch", "pretrain1": "HuBERT iteration 1", "pretrain2": "HuBERT iteration 2"}
SETS = ("test", "test-unseen")
ROW = re.compile(r"(\d+)-([a-z0-9_]+)-(\d+)")
BEAM_HEADS = ("6-gram: test CER %", "test WER %", "test-unseen CER %", "CER below: test, test-unseen")
SESSIONS = "sessions.jsonl"
COMMANDS = ("pretraining-commands", "commands")  # the first where a row starts from a pretrained model
# what a result does not depend on, or what making the table itself changes
NO_CODE = (":!*.md", ":!egs/*/results/*", ":!egs/*/data", ":!egs/*/data/*")

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run one of the three parts; a mistake is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    started = parts.add_parser("begin", help="note the machine and the commit that a row is trained with from now on")
    started.add_argument("row", type=Path)
    started.add_argument("--jobs", type=int, default=1, help="rows that run side by side")
    ended = parts.add_parser("finish", help="write the row's result.json")
    ended.add_argument("row", type=Path)
    made = parts.add_parser("table", help="write the results and the table")
    made.add_argument("compare", type=Path, help="folder with one folder a row, named MINUTES-START-SEED")
    made.add_argument("--results", type=Path, required=True, help="folder for one JSON a row")
    made.add_argument("--readme", type=Path, required=True, action="append", help="file with the table's markers")
    made.add_argument("--name", default="results", help="of the markers, <!-- NAME:begin --> and <!-- NAME:end -->")
    made.add_argument(
        "--start",
        action="append",
        metavar="START=TITLE",
        help="a start and its name in the table, the one that others are held against first (default: HuBERT's)",
    )
    made.add_argument("--costs", action="store_true", help="show seconds a step and peak memory too")
    args = parser.parse_args(arguments)
    try:
        if args.part == "begin":
            begin(args.row, args.jobs)
        elif args.part == "finish":
            write_json_atomic(args.row / "result.json", collect(args.row))
        else:
            starts = dict(item.split("=", 1) for item in args.start) if args.start else STARTS
            publish(args.compare, args.results, args.readme, Layout(args.name, starts, args.costs))
    except HarkenError as error:
        print(f"results_table: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Layout:
    """What a table shows. name: of its markers. starts: `{start: title}`, baseline first. costs: time and memory."""

    name: str = "results"
    starts: dict[str, str] = field(default_factory=lambda: dict(STARTS))
    costs: bool = False

    @property
    def markers(self) -> tuple[str, str]:
        """The lines that the table stands between."""
        return f"<!-- {self.name}:begin -->", f"<!-- {self.name}:end -->"

    @property
    def baseline(self) -> str:
        """The start that the others are held against."""
        return next(iter(self.starts))


def begin(folder: Path, jobs: int) -> None:
    """Add a session to a row: a row that is continued elsewhere, or after a change of the code, says so."""
    session = {
        "date": time.strftime("%F %T"),
        "machine": machine(),
        "commit": commit(ROOT),
        "rows_side_by_side": jobs,
    }
    with (folder / SESSIONS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(session) + "\n")


def collect(folder: Path) -> Row:
    """Return a finished row: what was run, where, and what came out.

    Raises HarkenError when the folder is no row, or its training did not take all of its steps.
    """
    name = ROW.fullmatch(folder.resolve().name)
    if name is None:
        raise HarkenError(f"a row's folder is named MINUTES-START-SEED, got {folder.name}")
    records = read_metrics(folder / "metrics.jsonl").train
    steps = records[-1]["step"] if records else 0
    config = OmegaConf.load(folder / "config.yaml")
    if steps < config.train.steps and not config.train.patience:
        raise HarkenError(
            f"{folder} must have taken {config.train.steps} steps, found {steps}: its training was stopped; "
            "run the same command again to continue it"
        )
    sessions = [json.loads(line) for line in (folder / SESSIONS).read_text(encoding="utf-8").splitlines()]
    return {
        "minutes": int(name[1]),
        "start": name[2],
        "seed": int(name[3]),
        "scores": scores_of(folder),
        "steps": steps,
        "hours_of_audio": records[-1]["hours"],
        "minutes_of_training": records[-1]["wall"] / 60,
        "seconds_a_step": seconds_a_step(records),
        "peak_gib": max(record.get("memory_gib", 0.0) for record in records),
        "date": time.strftime("%F %T"),
        "machine": joined(session["machine"] for session in sessions),
        "commit": joined(session["commit"] for session in sessions),
        "rows_side_by_side": max(session["rows_side_by_side"] for session in sessions),
        "commands": [line for name in COMMANDS for line in lines_of(folder / name)],
        **searched(folder),
    }


def seconds_a_step(records: list[dict[str, Any]]) -> float:
    """Return the median over log intervals: what else the machine did for a while, and validations, do not move it."""
    spent = [
        (end["wall"] - start["wall"]) / (end["step"] - start["step"])
        for start, end in itertools.pairwise([{"step": 0, "wall": 0.0}, *records])
        if end["step"] > start["step"]  # a run that was continued has some steps twice
    ]
    return float(statistics.median(spent))


def scores_of(folder: Path) -> dict[str, Any]:
    """Return the error rates of both test sets."""
    scores = {part: json.loads((folder / f"{part}-score/wer.json").read_text(encoding="utf-8")) for part in SETS}
    return {part: {kind: score[kind] for kind in ("wer", "cer")} for part, score in scores.items()}


def searched(folder: Path) -> Row:
    """Return what a search with an n-gram found, and by which code and commands; nothing where there was none yet."""
    if not (folder / "search-commands").is_file():
        return {}
    about = {"search_commit": commit(ROOT), "search_commands": lines_of(folder / "search-commands")}
    return {"beam": scores_of(folder / "beam"), **about}


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file, none where there is no file."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def joined(values: Any) -> str:
    """Return the different values in their order as one text."""
    return ", ".join(dict.fromkeys(values))


def machine() -> str:
    """Return the processor's name and the number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def commit(root: Path) -> str:
    """Return the commit that is checked out, `+changes` behind it when the code differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    if not (found := git("rev-parse", "--short=12", "HEAD")):
        return "unknown"
    return found + ("+changes" if git("status", "--porcelain", "--untracked-files=all", "--", ".", *NO_CODE) else "")


def publish(compare: Path, results: Path, readmes: list[Path], layout: Layout) -> None:
    """Add the result of each row to those that are kept, and write the table of all into the READMEs.

    Raises HarkenError when there is no finished row, or a README has no place for the table.
    """
    for path in sorted(compare.iterdir()):
        if ROW.fullmatch(path.name) and (path / "result.json").is_file():
            row = json.loads((path / "result.json").read_text(encoding="utf-8"))
            write_json_atomic(results / f"{row['minutes']}-{row['start']}-{row['seed']}.json", portable(row))
    kept: list[Row] = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    rows = [row for row in kept if row["start"] in layout.starts]
    if not rows:
        raise HarkenError(f"no finished rows in {compare}: run the stage before first")
    shown = table(rows, layout)
    for readme in readmes:
        where = os.path.relpath(results, readme.parent)
        insert(readme, f"{shown}\n\n{origins(rows, where)}", layout.markers)
    print(shown)


def table(rows: list[Row], layout: Layout) -> str:
    """Return the Markdown table: mean over seeds, and the sample deviation where there are several."""
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["minutes"], row["start"]].append(row)
    first = layout.starts[layout.baseline].removeprefix("from ")
    with_beam = any("beam" in row for row in rows)
    heads = [
        *("labels", "start", "test CER %", "test WER %", "test-unseen CER %", "test-unseen WER %"),
        f"CER below {first}: test, test-unseen",
        *(BEAM_HEADS if with_beam else ()),
        *("seeds", "minutes of training"),
        *(("seconds a step", "peak GiB") if layout.costs else ()),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    order = list(layout.starts)
    for minutes, start in sorted(groups, key=lambda group: (group[0], order.index(group[1]))):
        group = groups[minutes, start]
        others = [] if start == layout.baseline else groups.get((minutes, layout.baseline), [])
        figures = [figure(rates(group, part, kind)) for part in SETS for kind in ("cer", "wer")]
        figures.append(gains(group, others))
        if with_beam:
            figures += beam_figures(group, others)
        spent = statistics.mean(row["minutes_of_training"] for row in group)
        cells = [f"{minutes} min", layout.starts[start], *figures, str(len(group)), f"{spent:.1f}"]
        lines.append(f"| {' | '.join(cells + (costs(group) if layout.costs else []))} |")
    return "\n".join(lines)


def costs(group: list[Row]) -> list[str]:
    """Return the seconds of a step of the seed that other work slowed least, and the largest memory."""
    seconds = min(row["seconds_a_step"] for row in group)
    return [f"{seconds:.2f}", f"{max(row['peak_gib'] for row in group):.2f}"]


def beam_figures(group: list[Row], others: list[Row]) -> list[str]:
    """Return the cells of a search with an n-gram, over the rows that have been searched."""
    group, others = ([row for row in some if "beam" in row] for some in (group, others))
    if not group:
        return [""] * len(BEAM_HEADS)
    parts = (("test", "cer"), ("test", "wer"), ("test-unseen", "cer"))
    found = [figure(rates(group, part, kind, "beam")) for part, kind in parts]
    return [*found, gains(group, others, "beam")]


def rates(group: list[Row], part: str, kind: str, search: str = "scores") -> list[float]:
    """Return an error rate of each row in percent."""
    return [100 * row[search][part][kind]["rate"] for row in group]


def figure(values: list[float]) -> str:
    """Return a mean, with the sample standard deviation where there are several values."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def gains(group: list[Row], others: list[Row], search: str = "scores") -> str:
    """Return by how much the median CER is below that of others, relative to it, on both test sets.

    The median over seeds: a training that failed to learn moves a mean by more than what is compared. Nothing without
    rows to compare.
    """
    bases = [statistics.median(rates(others, part, "cer", search)) for part in SETS] if others else [0.0]
    if not all(bases):
        return ""
    own = [statistics.median(rates(group, part, "cer", search)) for part in SETS]
    return ", ".join(f"{100 * (1 - median / base):.0f} %" for median, base in zip(own, bases, strict=True))


def origins(rows: list[Row], results: str) -> str:
    """Return who made which rows: one line for each machine, commit and budget, so that unequal rows show."""
    groups: dict[tuple[str, str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["machine"], row["commit"], row["steps"], row["rows_side_by_side"]].append(row)
    lines = [f"The commands of each row stand in its file in [{results}]({results})."]
    for (where, code, steps, beside), group in groups.items():
        names = "all rows" if len(groups) == 1 else ", ".join(f"{r['minutes']}-{r['start']}-{r['seed']}" for r in group)
        days = sorted({row["date"].split()[0] for row in group})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        lines.append(f"Trained on {where}, commit {code}, {steps} steps, {beside} rows side by side, {when}: {names}.")
    example = next((line for line in reversed(rows[0]["commands"]) if " train " in line), "")  # pretraining first
    if example:
        lines.append(f"The first: `{relative(example)}`")
    return "\n".join(lines)


def portable(row: Row) -> Row:
    """Return a row whose commands are as they are given at the root of any copy of this repository."""
    kept = ("commands", "search_commands")
    return {**row, **{name: [relative(line) for line in row[name]] for name in kept if name in row}}


def relative(command: str) -> str:
    """Return a command with the paths of this repository as they are seen from its root."""
    words = (word.replace(f"{ROOT}/", "") for word in shlex.split(command))
    return shlex.join([re.sub(r"(^|[=\[,])/[^,\]=]*?/(?=egs/\w+/)", r"\1", word) for word in words])


def insert(readme: Path, text: str, markers: tuple[str, str]) -> None:
    """Put a text between two markers of a file.

    Raises HarkenError when they are not there.
    """
    begin, end = markers
    content = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if begin not in content or end not in content:
        raise HarkenError(f"{readme} must hold the markers {begin} and {end}")
    head, rest = content.split(begin, 1)
    tail = rest.split(end, 1)[1]
    write_text_atomic(readme, f"{head}{begin}\n{text}\n{end}{tail}")


if __name__ == "__main__":
    sys.exit(main())
