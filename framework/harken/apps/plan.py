"""`harken plan`: what a run will take, computed before it begins."""

from __future__ import annotations

import argparse

HELP = "Compute, from a configuration alone, how long a run trains, what it stores and how much memory it needs."
EXAMPLE = "harken plan hubert_base --hours 960 --gpus 8 --tflops 120 data.train=train.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config", nargs="+", help="YAML files or presets, merged left to right, then key=value overrides"
    )
    parser.add_argument("--hours", type=float, required=True, help="of training audio in the corpus")
    parser.add_argument("--gpus", type=int, required=True, help="that train together, on all nodes")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that each GPU reaches in training (MFU times its peak)")
    parser.add_argument(
        "--cut-seconds", type=float, default=12.3, help="length of a typical cut (default: 12.3, LibriSpeech's mean)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    import torch

    from harken.apps.train import split_arguments
    from harken.cluster.plan import describe, make_plan
    from harken.config.load import load
    from harken.core.errors import HarkenError
    from harken.encoders.backbone import build_backbone

    files, overrides = split_arguments(args.config)
    config = load(files, overrides).config
    if args.cut_seconds <= 0:
        raise HarkenError(f"`--cut-seconds` must be positive, got {args.cut_seconds:g}")
    with torch.device("meta"):  # sizes without memory: a model of billions costs nothing
        backbone = build_backbone(config)
    samples = round(args.cut_seconds * config.data.sample_rate)
    forward = backbone.frontend.flops(samples) + backbone.encoder.flops(backbone.spec.num_frames(samples))
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    plan = make_plan(
        config,
        corpus_hours=args.hours,
        gpus=args.gpus,
        parameters=parameters,
        flops=3 * forward / args.cut_seconds,  # the backward pass costs two forward ones
        tflops=args.tflops,
    )
    print(describe(plan, corpus_hours=args.hours, gpus=args.gpus, parameters=parameters, tflops=args.tflops))
    return 0
