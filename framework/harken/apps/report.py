"""`harken report`: one HTML page about an experiment."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harken.report.collect import Experiment
    from harken.report.utterances import View

HELP = "Write one self-contained HTML page: results, curves, units, speakers, some utterances, stages, configurations."
EXAMPLE = (
    "harken report egs/amazon_queen/exp/full\n"
    "  harken report exp --out /tmp/page.html --model exp/finetune --cuts data/test.jsonl --utterances 5"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("experiment", type=Path, metavar="EXP", help="folder of a recipe's experiment, or of one run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: EXP/report.html)")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="CTC model of the utterance view (default: the last CTC run in EXP)",
    )
    parser.add_argument(
        "--cuts",
        action="append",
        metavar="MANIFEST",
        help="where utterances come from; may be given again (default: data.valid of the model)",
    )
    parser.add_argument(
        "--utterances", type=int, default=3, metavar="N", help="utterances shown; 0 loads no model (default: 3)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and print what it lacks."""
    from harken.report.collect import collect
    from harken.report.page import write_page

    started = time.perf_counter()
    experiment = collect(args.experiment)
    views, how = _views(experiment, args) if args.utterances > 0 else ([], "")
    out = args.out or args.experiment / "report.html"
    size = write_page(experiment, out, views, how)
    for gaps in experiment.missing.values():
        for gap in gaps:
            print(f"missing: {gap.what}" + (f"; make it: {gap.command}" if gap.command else ""))
    counts = {
        "test sets": len(experiment.results),
        "runs": len(experiment.runs),
        "label stores": len(experiment.stores),
        "utterances": len(views),
        "stages": len(experiment.stages),
    }
    shown = ", ".join(f"{number} {name}" for name, number in counts.items())
    print(f"{out}: {shown}; {size / 1e6:.1f} MB in {time.perf_counter() - started:.0f} s")
    return 0


def _views(experiment: Experiment, args: argparse.Namespace) -> tuple[list[View], str]:
    """Look at some utterances; what is missing for it is noted, unless the user asked for it by an option."""
    from harken.core.errors import HarkenError
    from harken.evaluate.ctc_model import load_ctc
    from harken.report.utterances import show_utterances

    last = experiment.last_run_of("ctc")
    model = args.model or (last.folder if last else None)
    if model is None:
        experiment.lacks(
            "utterances",
            "no CTC run for the utterance view",
            f"harken report {args.experiment} --model FOLDER",
        )
        return [], ""
    try:
        ctc, config = load_ctc(model)
        cuts = args.cuts or ([config.data.valid] if config.data.valid else [])
        if not cuts:
            experiment.lacks(
                "utterances",
                f"{model} names no validation manifest",
                f"harken report {args.experiment} --cuts MANIFEST",
            )
            return [], ""
        views, how = show_utterances(ctc, cuts, experiment.hypotheses, experiment.stores, args.utterances)
    except HarkenError as error:
        if args.model or args.cuts:
            raise
        experiment.lacks("utterances", str(error), f"harken report {args.experiment} --model FOLDER --cuts MANIFEST")
        return [], ""
    bare = [view.id for view in views if not view.units]
    if experiment.stores and bare:
        command = f"harken units label {' '.join(cuts)} --clusterer KM --out {args.experiment}/more/labels"
        experiment.lacks("utterances", f"no label store holds the units of {', '.join(bare)}", command)
    return views, how
