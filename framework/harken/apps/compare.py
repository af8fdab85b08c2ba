"""`harken compare`: a run's curves beside those of a stored reference."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Tell whether a run's curves are within the band of a reference; exit status 1 when one is not."
EXAMPLE = "harken compare exp/pretrain --make reference.json && harken compare exp/again reference.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("paths", nargs="+", type=Path, help="RUN REFERENCE; with --make, the runs to make one of")
    parser.add_argument("--make", type=Path, metavar="REFERENCE", help="write the band of the runs to this JSON file")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.05,
        help="what the band is widened by to both sides, as a share of its middle (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Make a reference, or compare with one."""
    from harken.core.errors import HarkenError
    from harken.report.compare import compare, make_reference, read_reference

    if args.make is not None:
        bands = make_reference(args.paths, args.make)
        print(f"{args.make}: {', '.join(bands)} of {len(args.paths)} run(s)")
        return 0
    if len(args.paths) != 2:
        raise HarkenError(
            f"`harken compare` takes RUN and REFERENCE, or runs with `--make`, got {len(args.paths)} path(s)"
        )
    if not args.margin >= 0:
        raise HarkenError(f"`--margin` must be at least 0, got {args.margin}")
    found = compare(args.paths[0], read_reference(args.paths[1]), args.margin)
    for curve in found:
        if curve.share:
            print(
                f"OUT {curve.name}: outside at {100 * curve.share:.0f}% of the steps, by {curve.excess:.3g} at step "
                f"{curve.step}, where it is {curve.value:.4g} and the band {curve.low:.4g} to {curve.high:.4g}"
            )
        else:
            print(f"in  {curve.name}")
    return int(any(curve.share for curve in found))
