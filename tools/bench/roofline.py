"""What a second of audio costs each preset, and the least time it can take at a peak: arithmetic, no measurement."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from harken.config.load import load, presets
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.data.tokens import Characters
from harken.objectives.saved import build_objective


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Print parameters, operations of a second of audio and the floor that they set, for each preset.",
        epilog="example: python tools/bench/roofline.py --seconds 15.6 --peak-tflops 800",
    )
    parser.add_argument("--seconds", type=float, default=15.6, metavar="S", help="of an utterance (default: 15.6)")
    parser.add_argument("--peak-tflops", type=float, default=800.0, metavar="P", help="of the device (default: 800)")
    return parser.parse_args()


def row(preset: str, seconds: float, peak_tflops: float, tokenizer: Path) -> str:
    """Return a preset's line of the table. Raises HarkenError for one that needs a saved model to be built."""
    needed = f"objective.tokenizer={tokenizer}" if preset.startswith("zipformer_") else "data.labels=[none]"
    teacher = ["objective.teacher=none"] if preset.startswith("beats_tokenizer") else []
    config = load([preset], ["data.train=none", needed, *teacher]).config
    with torch.device("meta"):
        objective = build_objective(config)
        samples = round(seconds * config.data.sample_rate)
        inputs = torch.empty(1, samples)
    batch = Batch(ids=("a",), inputs=inputs, lengths=torch.tensor([samples]), targets={}, num_targets=1.0)
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    gflop = objective.flops(batch) / seconds / 1e9
    return (
        f"| `{preset}` | {config.encoder.name} | {parameters / 1e6:.1f} | {gflop:.1f} | {gflop / peak_tflops:.3f} | "
        f"{3.6 * gflop / peak_tflops:.2f} |"
    )


def main() -> None:
    """Print the table; a preset that cannot be built here is left out with the reason."""
    args = parse()
    print("| preset | encoder | million parameters | GFLOP / s of audio | ms / s of audio | s / h of audio |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokens.txt"
        Characters(list(" 'abcdefghijklmnopqrstuvwxyz")).save(tokenizer)
        for preset in presets():
            try:
                print(row(preset, args.seconds, args.peak_tflops, tokenizer), flush=True)
            except HarkenError as error:
                print(f"left out: {preset}: {str(error).splitlines()[0]}", file=sys.stderr)


if __name__ == "__main__":
    main()
