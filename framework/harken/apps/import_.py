"""`harken import`: another toolkit's checkpoint as a harken model."""

from __future__ import annotations

import argparse
from pathlib import Path

from harken.interop import FORMATS

HELP = "Read another toolkit's checkpoint into a harken model. Nothing that the checkpoint holds is run."
EXAMPLE = "harken import hubert_base_ls960.pt --from fairseq --out models/hubert-base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the file to read")
    parser.add_argument("--from", dest="source", required=True, choices=FORMATS, help="the toolkit that wrote it")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the model")


def run(args: argparse.Namespace) -> int:
    """Write the model folder and say what is in it."""
    import importlib

    from harken.config.registry import build

    imported = importlib.import_module(f"harken.interop.{args.source}").import_checkpoint(args.checkpoint, args.out)
    config = imported.config
    encoder, objective = config.encoder, config.objective
    millions = sum(weight.numel() for weight in imported.weights.values()) / 1e6
    rate = build("frontend", config.frontend).spec.rate
    classes = ", ".join(map(str, objective.classes))
    print(f"{args.out}: {objective.name} on {encoder.layers} {encoder.name} layers of {encoder.dim}")
    print(f"{millions:.1f} million parameters, {rate:g} frames a second of {config.data.sample_rate} Hz audio")
    print(f"classes: {classes}; updates it was trained for: {imported.updates or 'not recorded'}")
    for note in imported.notes:
        print(f"not carried over: {note}")
    print(f"Start from it with `harken train CONFIG --exp EXP train.init_from={args.out}`")
    return 0
