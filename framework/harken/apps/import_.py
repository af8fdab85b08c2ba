"""`harken import`: another toolkit's checkpoint as a harken model."""

from __future__ import annotations

import argparse
from pathlib import Path

from harken.interop import FORMATS

HELP = "Read another toolkit's checkpoint into a harken model. Nothing that the checkpoint holds is run."
EXAMPLE = "harken import hubert_base_ls960.pt --from fairseq --out models/hubert-base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="file to read; several of icefall: their mean",
    )
    parser.add_argument("--from", dest="source", required=True, choices=FORMATS, help="the toolkit that wrote it")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the model")
    parser.add_argument(
        "--running-average",
        action="store_true",
        help="of icefall: the average that training kept (`model_avg`), over all steps, or between two checkpoints",
    )


def run(args: argparse.Namespace) -> int:
    """Write the model folder and say what is in it."""
    import importlib

    import torch

    from harken.core.errors import HarkenError
    from harken.encoders.backbone import build_backbone

    importer = importlib.import_module(f"harken.interop.{args.source}")
    average = len(args.checkpoints) > 1 or args.running_average
    if average and args.source != "icefall":
        raise HarkenError(f"averages are made of icefall's checkpoints alone, not of `--from {args.source}`: name one")
    if average:
        imported = importer.import_average(args.checkpoints, args.out, running=args.running_average)
    else:
        imported = importer.import_checkpoint(args.checkpoints[0], args.out)
    config, objective = imported.config, imported.config.objective
    millions = sum(weight.numel() for weight in imported.weights.values()) / 1e6
    with torch.device("meta"):
        backbone = build_backbone(config)
    headless = all(name.startswith("backbone.") for name in imported.weights)
    layers = f"{backbone.encoder.num_layers} {config.encoder.name} layers of {backbone.dim}"
    print(f"{args.out}: {'a backbone of' if headless else f'{objective.name} on'} {layers}")
    rate = f"{backbone.spec.rate:g} frames a second of {config.data.sample_rate} Hz audio"
    print(f"{millions:.1f} million parameters, {rate}")
    print(f"{imported.targets}; updates it was trained for: {imported.updates or 'not recorded'}")
    for note in imported.notes:
        print(f"not carried over: {note}")
    print(f"Start from it with `harken train CONFIG --exp EXP train.init_from={args.out}`")
    return 0
