"""What one number of processes and ZeRO stage saved, every other holds to the bit, and goes on as the unbroken run."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("worker_layouts.py")
# processes, ZeRO stage
LAYOUTS = [(1, 0), (1, 3), (2, 1), (2, 3), (4, 0), (4, 2), (4, 3)]
FEW = [(1, 0), (2, 1), (4, 3)]
OPTIMIZERS = {"AdamW": LAYOUTS, "Counting": FEW}
# of a loss: float32 sums of at most 65 terms in another order, 65 x 2**-24 = 4e-6
TOLERANCE = 4e-6
RUNS = [(optimizer, layout) for optimizer, layouts in OPTIMIZERS.items() for layout in layouts]
PAIRS = [(a, b, optimizer) for optimizer, layouts in OPTIMIZERS.items() for a, b in product(layouts, layouts)]


def name_of(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def whole(folder: Path, layout: tuple[int, int], optimizer: str) -> Path:
    return folder / f"{optimizer}-{name_of(layout)}"


def continued(folder: Path, saved: tuple[int, int], layout: tuple[int, int], optimizer: str) -> Path:
    return folder / f"{optimizer}-{name_of(saved)}-on-{name_of(layout)}"


@pytest.fixture(scope="module")
def states(run_python, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout from the beginning, and every layout from what every other saved."""
    folder = tmp_path_factory.mktemp("layouts")
    plan = []
    for part, processes in product(("whole", "continued"), (1, 2, 4)):
        jobs = []
        for optimizer, layout in RUNS:
            offload = layout == (2, 1)
            if layout[0] == processes and part == "whole":
                jobs.append([layout[1], optimizer, offload, "", whole(folder, layout, optimizer)])
            elif layout[0] == processes:
                jobs += [
                    [layout[1], optimizer, offload, source / "next", continued(folder, saved, layout, optimizer)]
                    for saved in OPTIMIZERS[optimizer]
                    for source in [whole(folder, saved, optimizer)]
                ]
        plan.append({"processes": processes, "jobs": jobs})
    (folder / "plan.json").write_text(json.dumps(plan, default=str))
    run_python(WORKER, folder / "plan.json")
    return folder


@pytest.mark.parametrize(("saved", "layout", "optimizer"), PAIRS, ids=name_of)
def test_a_state_is_loaded_to_the_bit_under_any_layout(states: Path, saved, layout, optimizer: str) -> None:
    before = whole(states, saved, optimizer) / "next"
    after = continued(states, saved, layout, optimizer) / "state"
    for file in ("model.safetensors", "optimizer.safetensors"):
        expected, found = load_file(before / file), load_file(after / file)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
    assert json.loads((after / "optimizer.json").read_text()) == json.loads((before / "optimizer.json").read_text())


@pytest.mark.parametrize(("saved", "layout", "optimizer"), PAIRS, ids=name_of)
def test_losses_go_on_as_those_of_the_unbroken_run(states: Path, saved, layout, optimizer: str) -> None:
    """At the same layout to the bit, at another one up to the order of sums."""
    unbroken = json.loads((whole(states, saved, optimizer) / "losses.json").read_text())
    found = json.loads((continued(states, saved, layout, optimizer) / "losses.json").read_text())
    assert len(set(unbroken)) == 4
    if saved == layout:
        assert found == unbroken[2:]
    assert found == pytest.approx(unbroken[2:], rel=TOLERANCE)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_holds_every_trained_parameter_once(states: Path, optimizer: str) -> None:
    folder = whole(states, (4, 3), optimizer) / "next"
    trained = {
        "inner.weight": (7, 5),
        "inner.bias": (7,),
        "out.weight": (13, 7),
        "out.bias": (13,),
        "gain.weight": (1, 1),
    }
    tensors = load_file(folder / "optimizer.safetensors")
    shaped = {"AdamW": ("exp_avg", "exp_avg_sq"), "Counting": ("momentum",)}[optimizer]
    single = {"AdamW": ("step",), "Counting": ()}[optimizer]
    expected = {f"{key}/{name}": shape for key, (name, shape) in product(shaped, trained.items())}
    expected |= {f"{key}/{name}": () for key, name in product(single, trained)}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected
    details = json.loads((folder / "optimizer.json").read_text())["parameters"]
    assert details["out.bias"]["numbers"] == ({"count": 2} if optimizer == "Counting" else {})
    assert details["out.bias"]["group"] == ({"taken": 2} if optimizer == "Counting" else {})
