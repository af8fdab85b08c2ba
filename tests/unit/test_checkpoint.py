"""Checkpoints are written beside the training: what is written, what waits, and what an error leaves behind."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from harken.config.load import load
from harken.config.saved import damaged
from harken.core.errors import HarkenError
from harken.engine.gather import Partitions
from harken.engine.state import OptimizerState, SavedOptimizer, Snapshot
from harken.optim.ema import WeightAverage
from harken.train import checkpoint
from harken.train.checkpoint import Checkpoints
from harken.train.state import TrainState
from harken.train.writer import Writer

SIZE = 100_000


class Engine:
    """A weight and one state, copied as an engine copies them."""

    def __init__(self) -> None:
        self.model = nn.Linear(SIZE, 1, bias=False)
        nn.init.zeros_(self.model.weight)

    def snapshot(self) -> Snapshot:
        weight = self.model.weight.detach().clone()
        state = OptimizerState("AdamW", {"weight": {"exp_avg": weight + 0.5}}, {"weight": {}}, {"weight": {}}, {}, {})
        return Snapshot({"weight": weight}, state)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    folder = tmp_path / "exp"
    folder.mkdir()
    overrides = ["data.train=x.jsonl", "data.labels=[y]", "checkpoint.keep_last=3"]
    found = Checkpoints(folder, load(["hubert_base"], overrides).config)
    yield found
    found.close()


@pytest.fixture
def gate(monkeypatch):
    """Hold the writer before its checksums until it is opened."""
    entered, opened = threading.Event(), threading.Event()
    checksums = checkpoint.checksums

    def wait(folder: Path) -> dict[str, str]:
        entered.set()
        assert opened.wait(60)
        return checksums(folder)

    monkeypatch.setattr(checkpoint, "checksums", wait)
    yield entered, opened
    opened.set()


@contextmanager
def small_disk(size: int):
    """Let no file of this process grow above a size, as a full disk does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.root.iterdir() if path.is_dir())


def test_the_moment_of_the_save_is_written_although_training_goes_on(checkpoints, gate) -> None:
    entered, opened = gate
    engine, state = Engine(), TrainState(step=1, noted={"replaced": {"a": "gone"}})
    average = WeightAverage(engine.model, 0.5)
    checkpoints.save(engine, state, average, score=1.0)
    assert entered.wait(60)
    state.step, state.noted["replaced"]["b"] = 2, "gone too"
    with torch.no_grad():
        engine.model.weight.fill_(7.0)
    average.update(engine.model)
    assert names(checkpoints) == [".step-00000001.tmp"]
    opened.set()
    checkpoints.wait()
    folder = checkpoints.root / "step-00000001"
    assert names(checkpoints) == [folder.name]
    assert damaged(folder) is None
    assert load_file(folder / "model.safetensors")["weight"].unique().tolist() == [0.0]
    assert load_file(folder / "average.safetensors")["weight"].unique().tolist() == [0.0]
    assert load_file(folder / "optimizer.safetensors")["exp_avg/weight"].unique().tolist() == [0.5]
    written = json.loads((folder / "state.json").read_text())
    assert (written["step"], list(written["noted"]["replaced"])) == (1, ["a"])
    assert [entry["folder"] for entry in json.loads((checkpoints.root / "best.json").read_text())] == [folder.name]


def test_a_checkpoint_holds_nothing_twice(checkpoints) -> None:
    checkpoints.save(Engine(), TrainState(step=1), None)
    checkpoints.wait()
    files = [path for path in (checkpoints.root / "step-00000001").iterdir() if path.suffix == ".safetensors"]
    assert sorted(path.name for path in files) == ["model.safetensors", "optimizer.safetensors"]
    assert sum(path.stat().st_size for path in files) == pytest.approx(2 * 4 * SIZE, rel=0.01)


def test_the_next_save_waits_for_the_one_before(checkpoints, gate) -> None:
    entered, opened = gate
    checkpoints.save(Engine(), TrainState(step=1), None)
    assert entered.wait(60)
    second = threading.Thread(target=checkpoints.save, args=(Engine(), TrainState(step=2), None))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "it waits"
    opened.set()
    second.join(60)
    checkpoints.wait()
    assert names(checkpoints) == ["step-00000001", "step-00000002"]


def test_a_full_disk_is_one_error_at_the_next_occasion_and_harms_nothing(checkpoints) -> None:
    checkpoints.save(Engine(), TrainState(step=1), None)
    checkpoints.wait()
    with small_disk(SIZE):
        checkpoints.save(Engine(), TrainState(step=2), None)
        checkpoints._writer._thread.join()
    assert checkpoints.failed
    message = r"checkpoint .*/step-00000002 could not be written \(.*File too large.*\): see that the folder is there"
    with pytest.raises(HarkenError, match=message):
        checkpoints.save(Engine(), TrainState(step=3), None)
    assert not checkpoints.failed
    assert names(checkpoints) == ["step-00000001"]
    assert checkpoints.newest() == checkpoints.root / "step-00000001"
    checkpoints.save(Engine(), TrainState(step=3), None)
    checkpoints.wait()
    assert names(checkpoints) == ["step-00000001", "step-00000003"]


def test_a_folder_that_vanished_is_one_error(checkpoints) -> None:
    shutil.rmtree(checkpoints.folder)
    checkpoints.save(Engine(), TrainState(step=1), None)
    with pytest.raises(HarkenError, match=r"could not be written \(No such file or directory: .*/exp/checkpoints\)"):
        checkpoints.wait()
    assert not checkpoints.folder.exists()


def test_a_run_that_ends_by_another_error_says_what_became_of_its_checkpoint(checkpoints, capsys) -> None:
    shutil.rmtree(checkpoints.folder)
    checkpoints.save(Engine(), TrainState(step=1), None)
    checkpoints.close()
    assert "WARNING checkpoint " in capsys.readouterr().out


def test_the_writer_hands_on_the_error_itself_once() -> None:
    writer, error = Writer(), ZeroDivisionError("as it was")

    def fail() -> None:
        raise error

    writer.start(fail)
    assert writer.finish() is error
    assert writer.finish() is None


def test_without_memory_for_a_thread_the_work_is_done_at_once(monkeypatch) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    writer, done = Writer(), []
    writer.start(lambda: done.append("written"))
    assert done == ["written"]
    assert writer.finish() is None


def test_a_run_ends_at_the_step_after_a_checkpoint_that_could_not_be_written(train, monkeypatch, tmp_path) -> None:
    write = Checkpoints._write_files

    def fail(self: Checkpoints, moment: checkpoint.Moment, temporary: Path) -> None:
        if moment.state["step"] == 2:
            raise OSError(28, "No space left on device", str(temporary))
        write(self, moment, temporary)

    monkeypatch.setattr(Checkpoints, "_write_files", fail)
    status, out, error = train("ctc", "checkpoint.every_steps=1", "train.valid_every_steps=1000", steps=6)
    assert status == 2
    assert error.startswith(
        f"harken train: checkpoint {tmp_path}/exp/checkpoints/step-00000002 could not be written (No"
    )
    assert "asked to stop" not in out
    monkeypatch.undo()
    status, out, _ = train("ctc", "checkpoint.every_steps=1", steps=3)
    assert status == 0
    assert "continuing from" in out
    assert "step-00000001: step 1" in out


def optimizer_of(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    optimizer = kind([parameter for parameter in model.parameters() if parameter.requires_grad])
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return optimizer


def saved(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    partitions = Partitions(model, optimizer)
    save_file(partitions.weights(), folder / "model.safetensors")
    state = partitions.state({}, {})
    assert state is not None
    state.write(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = nn.Linear(3, 2)
    return saved(tmp_path / "saved", model, optimizer_of(model))


def frozen_bias() -> nn.Module:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    return model


def test_another_set_of_trained_parameters_names_one(folder: Path, tmp_path: Path) -> None:
    model = frozen_bias()
    with pytest.raises(HarkenError, match=r"`bias` is not trained by this run and was in .*saved: train the same"):
        Partitions(model, optimizer_of(model)).restore(folder)
    other = saved(tmp_path / "other", model, optimizer_of(model))
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(HarkenError, match=r"`bias` is trained by this run and was not in .*other: train the same"):
        Partitions(model, torch.optim.AdamW(model.parameters())).restore(other)
    assert torch.equal(model.weight, before), "nothing was loaded"


def test_another_model_and_another_optimiser_are_named(folder: Path) -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(HarkenError, match=r"holds another model: `weight` has shape \(2, 3\), expected \(2, 4\); give"):
        Partitions(model, torch.optim.AdamW(model.parameters())).restore(folder)
    model = nn.Linear(3, 2)
    with pytest.raises(HarkenError, match=r"holds the state of the optimiser AdamW, and this run has SGD: give"):
        Partitions(model, torch.optim.SGD(model.parameters())).restore(folder)


@pytest.mark.parametrize(("value", "found"), [(None, "none"), (torch.zeros(3), r"\(3,\)")])
def test_a_missing_or_misshapen_state_names_its_parameter(folder: Path, value, found: str) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "optimizer.safetensors")
    del tensors["exp_avg/bias"]
    save_file(tensors | ({} if value is None else {"exp_avg/bias": value}), folder / "optimizer.safetensors")
    model = nn.Linear(3, 2)
    message = rf"the optimiser's `exp_avg` of `bias` in .* must have shape \(2,\), found {found}: use another"
    with pytest.raises(HarkenError, match=message):
        Partitions(model, torch.optim.AdamW(model.parameters())).restore(folder)


def test_parameters_of_one_partition_must_have_one_step_count(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "optimizer.safetensors")
    SavedOptimizer(folder).check_shared(["weight", "bias"])
    save_file(tensors | {"step/bias": torch.tensor(5.0)}, folder / "optimizer.safetensors")
    with pytest.raises(HarkenError, match=r"state of `bias` in .* has .*'step': 5.0.* ZeRO keeps one for both, so"):
        SavedOptimizer(folder).check_shared(["weight", "bias"])


def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = optimizer_of(model, torch.optim.Adafactor)
    with pytest.raises(HarkenError, match=r"the state `row_var` that Adafactor keeps of `weight` must be a number"):
        Partitions(model, optimizer).state({}, {})


@pytest.mark.parametrize("kind", ["AdamW", "NAdam", "RAdam", "Adagrad", "Rprop", "ASGD", "SGD"])
def test_torchs_optimisers_go_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = optimizer_of(model, getattr(torch.optim, kind))
    source = saved(tmp_path / "saved", model, optimizer)
    again = nn.Linear(3, 2)
    other = getattr(torch.optim, kind)(again.parameters())
    Partitions(again, other).restore(source)
    for one, its in ((model, optimizer), (again, other)):
        its.zero_grad()
        one(torch.ones(4, 3)).square().sum().backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_deepspeeds_shards_of_an_older_harken_are_one_error(folder: Path) -> None:
    (folder / "engine").mkdir()
    (folder / "optimizer.json").unlink()
    model = nn.Linear(3, 2)
    with pytest.raises(HarkenError, match=r"keeps the optimiser as DeepSpeed's shards in `engine/`, which this"):
        Partitions(model, torch.optim.AdamW(model.parameters())).restore(folder)
