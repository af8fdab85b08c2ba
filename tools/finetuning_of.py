"""What a fine-tuning must take over from a pretrained model: its frontend and encoder, and outputs enough for its text.

Prints YAML to merge over a configuration of CTC: the frontend and encoder of the run, `objective.head_upsampling` that
gives --tokens-per-second outputs or more, and how many top blocks start afresh: --fresh-blocks, at most half of them.

Example:
  python tools/finetuning_of.py exp/methods/eat --tokens-per-second 50 --fresh-blocks 2 > model.yaml
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harken.config.saved import load_config
from harken.core.errors import HarkenError
from harken.encoders.backbone import build_backbone


def finetuning_of(run: Path, tokens_per_second: float, fresh_blocks: int) -> dict[str, Any]:
    """Return the configuration as nested plain data.

    Raises HarkenError when the folder holds no run.
    """
    config = load_config(run)
    backbone = build_backbone(config)
    return {
        "frontend": asdict(config.frontend),
        "encoder": asdict(config.encoder),
        "objective": {"head_upsampling": math.ceil(tokens_per_second / backbone.spec.rate)},
        "train": {"init_fresh_blocks": min(fresh_blocks, backbone.encoder.num_layers // 2)},
    }


def main() -> int:
    """Print the YAML; a mistake is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the pretraining")
    parser.add_argument("--tokens-per-second", type=float, default=50.0, metavar="N", help="(default: 50)")
    parser.add_argument("--fresh-blocks", type=int, default=0, metavar="N", help="(default: 0)")
    args = parser.parse_args()
    try:
        data = finetuning_of(args.run, args.tokens_per_second, args.fresh_blocks)
    except HarkenError as error:
        print(f"finetuning_of: {error}", file=sys.stderr)
        return 2
    print(OmegaConf.to_yaml(OmegaConf.create(data)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
