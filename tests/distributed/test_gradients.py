"""One step's gradient does not depend on how its micro-batches are divided over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("worker_gradient.py")
WORLDS = (1, 2, 4)
# objective, frontend, what differs in the encoder; the Zipformer with all that it draws at random early in training
ZIPFORMER = {
    "name": "zipformer",
    "downsampling": [1, 2],
    "layers": [1],
    "dims": [16, 24],
    "unmasked_dims": [8],
    "ffn_dims": [32],
    "heads": [4],
    "kernels": [7],
    "query_dims": [8],
    "value_dims": [6],
    "position_dim": 16,
    "constant_attention": True,
    "causal": True,
    "chunk_frames": [0, 8, 16],
    "left_frames": [0, 16],
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hubert": ("hubert", "waveform", {"layer_drop": 0.0}),
    "ctc": ("ctc", "filterbank", {"layer_drop": 0.0}),
    "wav2vec2": ("wav2vec2", "waveform", {"layer_drop": 0.0}),
    "data2vec": ("data2vec", "filterbank", {"layer_drop": 0.0}),
    "cpc": ("cpc", "waveform", {"name": "recurrent", "dim": 16}),
    "wav2vec": ("wav2vec", "filterbank", {"name": "causal_convolution", "dim": 16, "kernels": [2, 3], "dropout": 0.1}),
    "dropped-layer": ("hubert", "filterbank", {"layer_drop": 0.5}),
    "zipformer": ("hubert", "filterbank", ZIPFORMER),
}


@pytest.fixture(scope="module")
def steps(corpus, run_python, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The first step of every case on 1 process x 8 micro-batches, 2 x 4 and 4 x 2; dropout is on in all of them."""
    folder = tmp_path_factory.mktemp("gradients")
    configs = [folder / f"{case}.yaml" for case in CASES]
    for path in configs:
        objective, frontend, encoder = CASES[path.stem]
        settings = corpus.settings(objective, frontend)
        settings["encoder"] = encoder if "name" in encoder else {**settings["encoder"], **encoder}
        OmegaConf.save(OmegaConf.create(settings), path)
    for world in WORLDS:
        (folder / str(world)).mkdir()
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        run_python(*(torchrun if world > 1 else []), WORKER, folder / str(world), *configs)
    return {world: folder / str(world) for world in WORLDS}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_the_number_of_processes(steps, case: str, zero_stage: int) -> None:
    records = {world: torch.load(folder / f"{case}-{zero_stage}.pt") for world, folder in steps.items()}
    alone = records[1]
    assert alone["applied"]
    assert len(alone["lengths"]) > 8, "eight micro-batches, some of two parts"
    assert len({length for row in alone["lengths"] for length in row}) > 8, "the batch must be ragged"
    for world in WORLDS[1:]:
        record = records[world]
        assert 8 // world <= len(record["lengths"]) < len(alone["lengths"])
        assert record["gradients"].keys() == alone["gradients"].keys()
        flat, expected = (torch.cat([value.flatten() for value in r["gradients"].values()]) for r in (record, alone))
        error = relative_error(flat, expected)
        each = {
            name: relative_error(record["gradients"][name], value)
            for name, value in alone["gradients"].items()
            if value.norm() > 0
        }
        worst = max(each, key=lambda name: each[name])
        print(
            f"{case} ZeRO {zero_stage}, 1 x 8 against {world} x {8 // world}: {error:.1e}, "
            f"worst {worst} {each[worst]:.1e}"
        )
        assert error < 1e-5
        assert each[worst] < 1e-5, worst
        # clipping must see the same norm
        assert record["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        assert record["norm"] == pytest.approx(float(expected.norm()), rel=1e-5)


def test_zero_2_gives_the_gradient_of_zero_0(steps) -> None:
    for case in CASES:
        plain, partitioned = (torch.load(steps[1] / f"{case}-{stage}.pt")["gradients"] for stage in (0, 2))
        for name, value in plain.items():
            assert relative_error(partitioned[name], value) < 1e-6 or value.norm() == 0, (case, name)


def test_the_dropped_layer_has_no_gradient_on_any_rank(steps) -> None:
    for folder in steps.values():
        gradients = torch.load(folder / "dropped-layer-0.pt")["gradients"]
        reached = [
            any(f".blocks.{block}." in name and value.norm() > 0 for name, value in gradients.items())
            for block in (0, 1)
        ]
        assert sorted(reached) == [False, True], "choose a seed that drops one of the two layers in the first step"
