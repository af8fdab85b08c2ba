"""The table of pretraining methods: what each costs, what its encoder knows before a label, and what it is worth after.

`layer` prints which block of a pretrained model to look at, two thirds of the way up; `table` gathers what methods.sh
left of each method, adds it to the results of earlier calls, and writes the table of a page.

Example:
  python tools/methods_table.py table exp/methods --results egs/amazon_queen/results/methods --page docs/methods.md
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

import harken
import results_table
from harken.config.registry import find
from harken.config.saved import load_config
from harken.config.schema import RunConfig
from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic
from harken.encoders.backbone import build_backbone
from harken.report.metrics import read_metrics

PACKAGE = Path(harken.__file__).parent
DEFAULTS = (("objective", "hubert"), ("encoder", "conformer"), ("frontend", "filterbank"))
PROBED = ("rank_encoder", "purity", "pnmi")
HEADS = (
    *("method", "objective", "lines", "files", "encoder", "steps", "speed / HuBERT's", "memory / HuBERT's"),
    *("RankMe", "purity", "PNMI"),
    *("test CER %", "test WER %", "test-unseen CER %"),
)

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run one of the two parts; a mistake is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    asked = parts.add_parser("layer", help="print the block to look at")
    asked.add_argument("run", type=Path)
    made = parts.add_parser("table", help="write the results and the table")
    made.add_argument("methods", type=Path, help="folder with models/, probes/ and rows/")
    made.add_argument("--results", type=Path, required=True, help="folder for one JSON a method, and speed.json")
    made.add_argument(
        "--page", type=Path, required=True, help="file with <!-- methods:begin --> and <!-- methods:end -->"
    )
    args = parser.parse_args(arguments)
    try:
        if args.part == "layer":
            print(-(-2 * build_backbone(load_config(args.run)).encoder.num_layers // 3))
        else:
            publish(args.methods, args.results, args.page)
    except HarkenError as error:
        print(f"methods_table: {error}", file=sys.stderr)
        return 2
    return 0


def publish(methods: Path, results: Path, page: Path) -> None:
    """Write what is known of each method, and the table of all that ever were.

    Raises HarkenError when nothing is finished, or the page has no place for the table.
    """
    for probed in sorted(methods.glob("probes/*.json")):
        folder = methods / "models" / probed.stem
        rows = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(methods.glob(f"rows/30-{folder.name}-*/result.json"))
            if results_table.ROW.fullmatch(path.parent.name)  # not what was put aside
        ]
        if rows:
            write_json_atomic(results / f"{folder.name}.json", collect(folder, probed, rows))
    known = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    speeds = {row["method"]: row for row in known.pop("speed", {"methods": []})["methods"]}
    if not known:
        raise HarkenError(f"no finished methods in {methods}: run the stages before first")
    shown = table(list(known.values()), speeds)
    where = os.path.relpath(results, page.parent)
    origins = results_table.origins([row for method in known.values() for row in method["rows"]], where)
    results_table.insert(page, f"{shown}\n\n{origins}", ("<!-- methods:begin -->", "<!-- methods:end -->"))
    print(shown)


def collect(folder: Path, probed: Path, rows: list[Row]) -> Row:
    """Return a pretrained and fine-tuned method: its size, cost, probes and rows."""
    config = load_config(folder)
    objective = config.objective.name
    records = read_metrics(folder / "metrics.jsonl").train
    probe = json.loads(probed.read_text(encoding="utf-8"))
    probe |= {name: results_table.relative(probe[name]) for name in ("model", "manifest", "alignment")}
    return results_table.portable(
        {
            "method": folder.name,
            "objective": objective,
            "lines": lines_of(objective),
            "files": files_of(config),
            "encoder": config.encoder.name,
            "steps": records[-1]["step"],
            "hours_of_audio": records[-1]["hours"],
            "minutes_of_training": records[-1]["wall"] / 60,
            "peak_gib": max(record.get("memory_gib", 0.0) for record in records),
            "probe": probe,
            "rows": [results_table.portable(row) for row in rows],
            "commands": results_table.lines_of(folder / "commands"),
        }
    )


def lines_of(objective: str) -> int:
    """Return the lines of an objective's file."""
    source = Path(inspect.getfile(find("objective", objective).build))
    return len(source.read_text(encoding="utf-8").splitlines())


def files_of(config: RunConfig) -> list[str]:
    """Return the files of the package that a method's parts import, and training HuBERT on the Conformer does not."""
    own = {_module(slot, getattr(config, slot).name) for slot, _ in DEFAULTS}
    return sorted(str(path.relative_to(PACKAGE)) for path in _imported(own) - _default_files())


@cache
def _default_files() -> set[Path]:
    return _imported({"harken.apps.train"} | {_module(*part) for part in DEFAULTS})


def _module(slot: str, name: str) -> str:
    return find(slot, name).build.__module__


def _imported(modules: set[str]) -> set[Path]:
    """Return the files of modules of the package, and of all of its modules that these import, anywhere in them."""
    left, found = set(modules), set[Path]()
    while left:
        name = left.pop()
        base = PACKAGE.parent / name.replace(".", "/")
        path = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
        if path is None or path in found or name.split(".")[0] != PACKAGE.name:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                left |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:  # what is imported may be a module or in one
                left |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {path for path in found if path.name != "__init__.py"}


def table(methods: list[Row], speeds: dict[str, Row]) -> str:
    """Return the Markdown table, HuBERT first."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for row in sorted(methods, key=lambda row: (row["method"] != "hubert", row["method"])):
        speed = speeds.get(row["method"], {})
        ratios = [f"{speed[key]:.2f}" if key in speed else "" for key in ("speed_over_hubert", "memory_over_hubert")]
        rank, purity, pnmi = (row["probe"][key] for key in PROBED)
        rates = [
            statistics.mean(100 * one["scores"][part][kind]["rate"] for one in row["rows"])
            for part, kind in (("test", "cer"), ("test", "wer"), ("test-unseen", "cer"))
        ]
        cells = [row["method"], f"`{row['objective']}`", str(row["lines"]), str(len(row["files"])), row["encoder"]]
        cells += [str(row["steps"]), *ratios]
        cells += [f"{rank:.0f}", f"{purity:.3f}", f"{pnmi:.3f}", *(f"{rate:.1f}" for rate in rates)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
