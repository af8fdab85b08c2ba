"""Collect the scores of a comparison into rows with command, machine and commit, and write the table of a README.

Example:
  python tools/results_table.py exp/compare --results egs/amazon_queen/results --readme egs/amazon_queen/README.md
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic, write_text_atomic

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
STARTS = {"scratch": "from scratch", "pretrain1": "HuBERT iteration 1", "pretrain2": "HuBERT iteration 2"}
SETS = ("test", "test-unseen")


def main() -> int:
    """Write the rows and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compare", type=Path, help="folder with one folder a row, named MINUTES-START-SEED")
    parser.add_argument("--results", type=Path, required=True, help="folder for one JSON a row")
    parser.add_argument("--readme", type=Path, required=True, help=f"file with the markers {BEGIN} and {END}")
    args = parser.parse_args()
    try:
        folders = [path for path in sorted(args.compare.iterdir()) if (path / "test-score/wer.json").is_file()]
        rows = [collect(folder) for folder in folders]
        if not rows:
            raise HarkenError(f"no scored rows in {args.compare}: run compare.sh first")
        for row in rows:
            write_json_atomic(args.results / f"{row['minutes']}-{row['start']}-{row['seed']}.json", row)
        insert(args.readme, table(rows))
    except HarkenError as error:
        print(f"results_table: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def collect(folder: Path) -> dict[str, Any]:
    """Return one row: what was run, where, and what came out."""
    minutes, start, seed = folder.name.split("-")
    scores = {name: json.loads((folder / f"{name}-score/wer.json").read_text()) for name in SETS}
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line][-1]
    return {
        "minutes": int(minutes),
        "start": start,
        "seed": int(seed),
        "scores": {name: {kind: score[kind] for kind in ("wer", "cer")} for name, score in scores.items()},
        "train_seconds": last["wall"],
        "audio_hours_seen": last["hours"],
        "command": "egs/amazon_queen/run.sh && egs/amazon_queen/compare.sh",
        "machine": machine(),
        "commit": commit(),
    }


def machine() -> str:
    """Return the processor's name and the number of its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0] if names else platform.processor()}"


def commit() -> str:
    """Return the commit that is checked out."""
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table: mean over seeds, and the sample deviation where there are several."""
    cells: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["minutes"], row["start"]].append(row)
    lines = [
        (
            "| labels | start | test CER % | test WER % | test-unseen CER % | test-unseen WER % | seeds "
            "| minutes of training |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for minutes, start in sorted(cells, key=lambda cell: (cell[0], list(STARTS).index(cell[1]))):
        group = cells[minutes, start]
        cuts = [(name, kind) for name in SETS for kind in ("cer", "wer")]
        figures = [figure([100 * row["scores"][name][kind]["rate"] for row in group]) for name, kind in cuts]
        spent = statistics.mean(row["train_seconds"] for row in group) / 60
        lines.append(f"| {minutes} min | {STARTS[start]} | {' | '.join(figures)} | {len(group)} | {spent:.1f} |")
    first = rows[0]
    lines += [
        "",
        f"Made by `{first['command']}` on {first['machine']}, commit {first['commit']}; one JSON a row in `results/`.",
    ]
    return "\n".join(lines)


def figure(values: list[float]) -> str:
    """Return a mean, with the sample standard deviation where there are several values."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def insert(readme: Path, text: str) -> None:
    """Put a text between the markers of a file.

    Raises HarkenError when they are not there.
    """
    content = readme.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        raise HarkenError(f"{readme} must hold the markers {BEGIN} and {END}")
    head, rest = content.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    write_text_atomic(readme, f"{head}{BEGIN}\n{text}\n{END}{tail}")


if __name__ == "__main__":
    sys.exit(main())
