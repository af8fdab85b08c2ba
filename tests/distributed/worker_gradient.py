"""Takes the first step of several runs and writes the gradients that the optimiser was given; started by torchrun.

usage: worker_gradient.py OUT CONFIG...: each configuration runs with ZeRO 0 and 2; rank 0 writes OUT/CONFIG-zero.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from harken.config.load import load
from harken.core import distributed
from harken.engine.deepspeed import DeepSpeedEngine, start_processes
from harken.objectives.saved import build_objective, preparers
from harken.train.loop import take_step
from harken.train.run import build_run


def gradients_before_step(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Make the engine note its reduced gradients when it is asked to step."""
    found: dict[str, torch.Tensor] = {}
    own_step = engine.step

    def step() -> bool:
        for name, parameter in engine.model.named_parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                found[name] = gradient.detach().double().clone()
        return own_step()

    engine.step = step  # type: ignore[method-assign]
    return found


def main(out: Path, configs: list[Path]) -> None:
    for path in configs:
        for stage in (0, 2):
            changes = [f"engine.zero_stage={stage}", *(["engine.bucket_elements=1000"] if stage == 0 else [])]
            config = load([path], changes).config
            start_processes(config.engine)
            prepare, spec = preparers(config)
            folder = out / f"run-{path.stem}-{stage}"
            folder.mkdir(exist_ok=True)
            run = build_run(config, folder, build_objective, prepare, spec)
            gradients = gradients_before_step(run.engine)
            data = next(run.loader.steps(run.state.position))
            applied = take_step(run, data)
            run.log.close()
            if distributed.is_main():
                record = {
                    "gradients": gradients,
                    "norm": run.engine.grad_norm,
                    "applied": applied,
                    "names": [name for name, _ in run.engine.model.named_parameters()],
                    "lengths": [batch.lengths.tolist() for batch in data.batches],
                }
                torch.save(record, out / f"{path.stem}-{stage}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
