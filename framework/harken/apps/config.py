"""`harken config`: the resolved values and where each came from."""

from __future__ import annotations

import argparse

HELP = "Print every resolved value of a configuration and where it came from."
EXAMPLE = "harken config conf/pretrain.yaml encoder.layers=6"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config", nargs="*", help="YAML files or presets, merged left to right, then key=value overrides"
    )
    parser.add_argument("--yaml", action="store_true", help="print YAML that `harken train` reads back instead")
    parser.add_argument("--presets", action="store_true", help="list the configurations that harken ships")


def run(args: argparse.Namespace) -> int:
    """Print; a mistake in the configuration gives status 2."""
    from harken.apps.train import split_arguments
    from harken.config.load import load, presets, to_yaml

    if args.presets:
        print("\n".join(presets()))
        return 0
    files, overrides = split_arguments(args.config)
    loaded = load(files, overrides)
    print(to_yaml(loaded.config) if args.yaml else loaded.table())
    return 0
