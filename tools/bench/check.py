"""Compare a run of train_step.py or ablation.py with stored ratios, and fail where harken lost more than 10 %.

Ratios, not times: another machine, or a busier one, changes both sides of a ratio. See README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic

STORED = Path(__file__).resolve().parent / "ratios.json"
LOSS = 0.10
SAME = ("layers", "seconds", "batch", "precision", "device", "threads")  # what ratios depend on


def ratios_of(result: dict[str, Any]) -> dict[str, float]:
    """Return the ratios of a tool's JSON, larger is better; raises HarkenError when there are none."""
    if "slower_without" in result:
        return {f"without {name}": ratio for name, ratio in result["slower_without"].items() if name != "all"}
    found = {}
    for name, figures in result.get("figures", {}).items():
        if not name.startswith("harken"):  # its other models and compiled blocks are no peers
            found[f"speed beside {name}"] = figures["harken_is_faster_cpu"]
            found[f"memory beside {name}"] = 1 / figures["harken_takes_memory"]
    if not found:
        raise HarkenError("expected the JSON of train_step.py with a peer, or of ablation.py, and found no ratio in it")
    return found


def key_of(result: dict[str, Any]) -> str:
    """Return the settings under which the ratios of a result are stored."""
    settings = result["settings"]
    tool = "ablation" if "slower_without" in result else "train_step"
    return " ".join([tool, *(f"{name}={settings[name]}" for name in SAME if name in settings)])


def losses(found: dict[str, float], stored: dict[str, float], allowed: float = LOSS) -> list[str]:
    """Return a line for each ratio that fell by more than `allowed` of what is stored; others are passed over."""
    return [
        f"{name}: {found[name]:.3f}, stored {ratio:.3f}: lost {100 * (1 - found[name] / ratio):.0f} %"
        for name, ratio in stored.items()
        if name in found and found[name] < ratio * (1 - allowed)
    ]


def check(file: Path, stored_file: Path, *, store: bool) -> int:
    """Compare, or store; return the exit status. Raises HarkenError when there is nothing to compare with."""
    result = json.loads(file.read_text(encoding="utf-8"))
    found, key = ratios_of(result), key_of(result)
    every = json.loads(stored_file.read_text(encoding="utf-8")) if stored_file.is_file() else {}
    if store:
        write_json_atomic(stored_file, {**every, key: {name: round(ratio, 3) for name, ratio in found.items()}})
        print(f"{len(found)} ratios of `{key}` are stored in {stored_file}")
        return 0
    common = set(every.get(key, {})) & set(found)
    if not common:
        raise HarkenError(f"{stored_file} must have ratios of `{key}`, found {sorted(every)}: store them with --store")
    lost = losses(found, every[key])
    for line in lost:
        print(line, file=sys.stderr)
    print(f"{len(common) - len(lost)} of {len(common)} ratios are within {100 * LOSS:.0f} % of what is stored")
    return 1 if lost else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and check."""
    parser = argparse.ArgumentParser(
        description="Fail where a ratio of train_step.py or ablation.py is more than 10 % below the stored one.",
        epilog="example: python tools/bench/check.py step.json",
    )
    parser.add_argument("result", type=Path, help="what --json of train_step.py or ablation.py wrote")
    parser.add_argument("--stored", type=Path, default=STORED, help=f"default: {STORED.name} beside this file")
    parser.add_argument("--store", action="store_true", help="keep these ratios as those to compare with")
    args = parser.parse_args(arguments)
    try:
        return check(args.result, args.stored, store=args.store)
    except (HarkenError, OSError) as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
