"""`harken units fit | label | check | purity`: clusters and labels for masked prediction."""

from __future__ import annotations

import argparse
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harken.apps.subverbs import add_sub_verb

if TYPE_CHECKING:
    from harken.units.features import Features

HELP = "Fit clusters on features, label audio with them, check labels. Features are never written to disk."
EXAMPLE = (
    "harken units fit train.jsonl --out units/km --clusters 100\n"
    "  harken units label train.jsonl dev.jsonl --clusterer units/km --out units/labels --jobs 8\n"
    "  harken units fit --help"
)
FIT = (
    "harken units fit train.jsonl --out units/km --clusters 100\n"
    "  harken units fit train.jsonl --out units2/km --features hidden --model exp/pretrain1 --layer 6 --clusters 500"
)
PURITY = (
    "harken units purity units/labels exp/alignment/cuts.jsonl\n"
    "  harken units purity units/labels exp/alignment/cuts.jsonl --tier word --out purity.json"
)
LABEL = (
    "harken units label train.jsonl dev.jsonl --clusterer units/km --out units/labels --jobs 8\n"
    "  harken units label train.jsonl dev.jsonl --tokenizer exp/tokenizer --out units2/labels --jobs 8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    verbs = parser.add_subparsers(dest="units_verb", required=True, metavar="fit|label|check|purity")
    fit = add_sub_verb(verbs, "fit", "k-means on a sample of a manifest's frames", FIT)
    fit.add_argument("manifest", metavar="MANIFEST", help="indexed manifest")
    fit.add_argument("--out", required=True, type=Path, metavar="DIR", help="clusterer to write, or to replace")
    fit.add_argument("--clusters", type=int, default=100, metavar="K", help="clusters (default: 100)")
    fit.add_argument(
        "--max-frames", type=int, default=500_000, metavar="N", help="frames kept in memory (default: 500000)"
    )
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample and of k-means (default: 0)")
    _feature_arguments(fit, "threads of k-means")
    label = add_sub_verb(verbs, "label", "write the packed label store of one or more manifests", LABEL)
    label.add_argument("manifest", nargs="+", metavar="MANIFEST", help="indexed manifests that share the store")
    named = label.add_mutually_exclusive_group(required=True)
    named.add_argument("--clusterer", metavar="DIR", help="folder that `units fit` wrote")
    named.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="a saved tokenizer (`objective.name: beats_tokenizer`), which has its own codes",
    )
    label.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new label store, or an unfinished one to continue"
    )
    label.add_argument(
        "--piece",
        metavar="I/N",
        help="do the I-th of N pieces; the same command without this does what is left and finishes the store",
    )
    _feature_arguments(label, "processes that label")
    check = add_sub_verb(
        verbs, "check", "judge label stores; status 1 when something is wrong", "harken units check units/labels"
    )
    check.add_argument("store", nargs="+", type=Path, metavar="STORE", help="folder that `units label` wrote")
    purity = add_sub_verb(verbs, "purity", "say how well labels follow an alignment of text or phones", PURITY)
    purity.add_argument("store", type=Path, metavar="STORE", help="folder that `units label` wrote")
    purity.add_argument("alignment", metavar="MANIFEST", help="with Lhotse alignments, as `harken align` writes")
    purity.add_argument("--tier", default="token", metavar="NAME", help="alignment compared with (default: token)")
    purity.add_argument("--out", type=Path, metavar="FILE", help="JSON to write the figures to (default: none)")


def _feature_arguments(parser: argparse.ArgumentParser, jobs: str) -> None:
    parser.add_argument(
        "--features", choices=("mfcc", "hidden"), default="mfcc", help="what is clustered (default: mfcc)"
    )
    parser.add_argument("--model", metavar="DIR", help="saved model or experiment, for hidden features")
    parser.add_argument(
        "--layer", type=int, metavar="N", help="block whose output is clustered, from 1; 0 is the encoder's input"
    )
    parser.add_argument("--subtract-mean", action="store_true", help="take the mean of each utterance's MFCC away")
    parser.add_argument(
        "--average", type=int, default=1, metavar="N", help="average MFCC over N frames; 4 suits 40 ms (default: 1)"
    )
    parser.add_argument(
        "--sample-rate", type=int, default=16000, metavar="HZ", help="audio is resampled to it (default: 16000)"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help=f"{jobs} (default: one a core, {cores})")


def run(args: argparse.Namespace) -> int:
    """Run the sub-verb."""
    return {"fit": _fit, "label": _label, "check": _check, "purity": _purity}[args.units_verb](args)


def _features(args: argparse.Namespace) -> functools.partial[Features]:
    from harken.units.features import make_features

    return functools.partial(
        make_features,
        args.features,
        model=args.model,
        layer=args.layer,
        subtract_mean=args.subtract_mean,
        average=args.average,
        sample_rate=args.sample_rate,
    )


def _fit(args: argparse.Namespace) -> int:
    import torch

    from harken.config.schema import DataConfig
    from harken.units.clusterer import fit_clusterer
    from harken.units.kmeans import KMeansConfig

    started = time.perf_counter()
    torch.set_num_threads(max(1, args.jobs))
    data = DataConfig(train=args.manifest, sample_rate=args.sample_rate)
    config = KMeansConfig(clusters=args.clusters, seed=args.seed)
    fit_clusterer(args.out, args.manifest, _features(args)(), data, config, max_frames=args.max_frames, say=_say)
    _say(f"wrote {args.out} in {time.perf_counter() - started:.0f} s")
    return 0


def _label(args: argparse.Namespace) -> int:
    from harken.core.errors import HarkenError
    from harken.core.pieces import Piece
    from harken.units.label import Job, label
    from harken.units.tokenizer import open_tokenizer

    started = time.perf_counter()
    features: functools.partial[Features] = _features(args)
    if args.tokenizer:
        if args.model or args.layer is not None or args.subtract_mean or args.average != 1 or args.features != "mfcc":
            raise HarkenError(
                "`--tokenizer` has features of its own: leave out --features, --model, --layer, --average and "
                "--subtract-mean"
            )
        features = functools.partial(open_tokenizer, args.tokenizer, args.sample_rate)
    job = Job(args.out, tuple(args.manifest), args.clusterer, features, args.sample_rate, max_seconds=60.0)
    piece = Piece.parse(args.piece) if args.piece else None
    card = label(job, args.jobs, _say, piece)
    _say(f"{f'piece {piece}' if piece else card.labels} labels in {args.out}, {time.perf_counter() - started:.0f} s")
    return 0


def _check(args: argparse.Namespace) -> int:
    from harken.units.check import check_units
    from harken.units.store import LabelStore

    status = 0
    for folder in args.store:
        store = LabelStore(folder)
        report = check_units(store)
        print(
            f"{folder}: {store.card.cuts} cuts, {store.card.labels} labels at {store.card.rate:g} Hz"
            f"{f' in {store.card.rows} rows' if store.card.rows > 1 else ''}, "
            f"{report.used} of {store.card.clusters} clusters used, perplexity {report.perplexity:.1f}, "
            f"mean run {report.mean_run:.2f} labels; {store.card.features}"
        )
        for text in report.problems:
            print(f"  WRONG {text}")
        for text in report.warnings:
            print(f"  warning {text}")
        status |= bool(report.problems)
    return status


def _purity(args: argparse.Namespace) -> int:
    from harken.core.files import write_json_atomic
    from harken.data.alignments import Alignment
    from harken.evaluate.purity import store_purity
    from harken.units.store import LabelStore

    found = store_purity(LabelStore(args.store), Alignment(args.alignment, args.tier))
    print(f"{args.store} against `{args.tier}` of {args.alignment}: {found.describe()}")
    if args.out is not None:
        write_json_atomic(args.out, found.plain())
    return 0


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
