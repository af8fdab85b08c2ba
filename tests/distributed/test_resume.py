"""2N steps equal N, a restart, and N more, bit for bit; whatever ended the first part."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from omegaconf import OmegaConf

from harken.apps.main import main
from harken.data.streams.convert import convert

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("worker_train.py")
STEPS = 4
HALF = 2
# processes, objective, frontend, ZeRO stage, and the numbers of loader workers
CASES = [
    ((1, "hubert", "filterbank", 0), (0, 2)),
    ((1, "ctc", "filterbank", 2), (2,)),
    ((1, "ctc", "waveform", 0), (0,)),
    ((2, "hubert", "filterbank", 2), (2,)),
    ((2, "ctc", "filterbank", 0), (0,)),
    ((1, "wav2vec2", "waveform", 1), (2,)),
    ((1, "data2vec", "filterbank", 0), (0,)),
    ((2, "data2vec", "filterbank", 2), (0,)),
]


def write_config(corpus, path: Path, objective: str, frontend: str, **changes: dict[str, Any]) -> Path:
    """Dropout, layer drop, an average of the weights and validation are on; an epoch has three steps."""
    settings = corpus.settings(objective, frontend)
    settings["data"]["valid"] = str(corpus.valid)
    settings["train"].update(steps=STEPS, valid_every_steps=3, ema_decay=0.9)
    if objective == "ctc":
        settings["objective"].update(freeze_steps=1, layer_decay=0.8)
    for group, values in changes.items():
        settings[group].update(values)
    OmegaConf.save(OmegaConf.create(settings), path)
    return path


def with_long_transcripts(corpus, path: Path) -> Path:
    """Copy the training manifest; every eighth transcript is longer than its audio allows."""
    lines = [json.loads(line) for line in corpus.train.read_text().splitlines()]
    for data in lines[::8]:
        data["supervisions"][0]["text"] = "abcd" * 100
    path.write_text("".join(json.dumps(data) + "\n" for data in lines))
    return path


def write_plan(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(entries, default=str))
    return path


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return where two nested values differ; tensors must be equal to the bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if hasattr(a, "__dict__") and type(a) is type(b):
        return differences(vars(a), vars(b), path)
    return [] if a == b else [path]


def final_state(exp: Path, steps: int) -> dict[str, Any]:
    """Return everything the last checkpoint holds, the clock left out, and which samples each micro-batch had."""
    from safetensors.torch import load_file

    folder = exp / "checkpoints" / f"step-{steps:08d}"
    state = json.loads((folder / "state.json").read_text())
    del state["wall_seconds"]
    optimizer = load_file(folder / "optimizer.safetensors")
    assert {name.partition("/")[0] for name in optimizer} == {"exp_avg", "exp_avg_sq", "step"}
    samples: dict[tuple[int, int], dict[str, Any]] = {}
    for path in exp.glob("samples.rank*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            samples[row["step"], row["micro_batch"]] = row  # steps after the last checkpoint are written again
    return {
        "weights": load_file(folder / "model.safetensors"),
        "average": load_file(folder / "average.safetensors"),
        "optimizer": optimizer,
        "details": json.loads((folder / "optimizer.json").read_text()),
        "state": state,
        "samples": {key: samples[key] for key in sorted(samples)},
    }


def assert_equal_runs(a: Path, b: Path, steps: int) -> None:
    first, second = final_state(a, steps), final_state(b, steps)
    assert len(first["samples"]) >= steps * 8, "eight micro-batches a step, of one part or two"
    assert differences(first, second) == []


@pytest.fixture(scope="module")
def runs(corpus, run_python, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case run through, and run to half, stopped by SIGTERM and continued by new processes."""
    folder = tmp_path_factory.mktemp("resume")
    whole: dict[int, list[Any]] = {1: [], 2: []}
    first: dict[int, list[Any]] = {1: [], 2: []}
    second: dict[int, list[Any]] = {1: [], 2: []}
    manifest = with_long_transcripts(corpus, folder / "long.jsonl")
    for case, numbers in CASES:
        processes, objective, frontend, zero_stage = case
        engine, data = (
            {"zero_stage": zero_stage},
            {"train": str(manifest), "max_bad_share": 0.5} if objective == "ctc" else {},
        )
        path = folder / f"{run_name(case)}.yaml"
        config = write_config(corpus, path, objective, frontend, data=data, engine=engine)
        whole[processes].append((config, folder / f"{run_name(case)}-whole", 0))
        for workers in numbers:
            path = folder / f"{run_name(case)}-{workers}.yaml"
            config = write_config(corpus, path, objective, frontend, data={**data, "workers": workers}, engine=engine)
            first[processes].append((config, folder / path.stem, HALF))
            second[processes].append((config, folder / path.stem, 0))
    parts = [whole, first, second]
    entries = [{"processes": processes, "jobs": part[processes]} for part in parts for processes in (1, 2)]
    run_python(WORKER, write_plan(folder / "plan.json", entries))
    return folder


def run_name(case: tuple[int, str, str, int]) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize(("case", "workers"), [(case, workers) for case, numbers in CASES for workers in numbers])
def test_a_restart_changes_no_bit(runs: Path, case, workers: int) -> None:
    """The whole run read its data without workers, so that their number is seen to change nothing either."""
    halves = runs / f"{run_name(case)}-{workers}"
    kinds = [json.loads(line)["kind"] for line in (halves / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["valid", "train", "valid"]
    assert {step for step, _ in final_state(halves, STEPS)["samples"]} == set(range(1, STEPS + 1))
    assert_equal_runs(runs / f"{run_name(case)}-whole", halves, STEPS)


def test_notes_of_all_ranks_are_counted(runs: Path) -> None:
    noted = final_state(runs / "2-ctc-filterbank-0-whole", STEPS)["state"]["noted"]
    assert sorted(noted["left out"]) == [f"train-{number:03}" for number in range(0, 64, 8)]
    assert "left out" not in final_state(runs / "2-hubert-filterbank-2-whole", STEPS)["state"]["noted"]


def test_two_processes_see_the_samples_of_one(runs: Path) -> None:
    alone, both = (
        final_state(runs / f"{name}-whole", STEPS) for name in ("1-hubert-filterbank-0", "2-hubert-filterbank-2")
    )
    assert both["samples"] == alone["samples"]
    for name, value in alone["weights"].items():
        assert torch.allclose(both["weights"][name], value, rtol=1e-3, atol=1e-5), name


@pytest.fixture
def start_training():
    """Start `harken train`, several processes under a launcher; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(config: Path, exp: Path, processes: int = 1, *, deepspeed: bool = False) -> subprocess.Popen[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
        if deepspeed:
            launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(processes)]
            launcher += ["--master_port", str(free_port()), "--module"]
        elif processes == 1:
            launcher = ["-m"]
        command = [sys.executable, *launcher, "harken.apps.main", "train", str(config), "--exp", str(exp)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def steps_logged(exp: Path) -> int:
    path = exp / "samples.rank0.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, (
            f"the run ended before its time: {process.stdout.read() if process.stdout else ''}"
        )
        assert time.monotonic() < limit, "the run made no progress"
        time.sleep(0.01)


def kill(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL a run, a launcher's ranks too, and return the processes it had started."""
    children = psutil.Process(process.pid).children(recursive=True)
    for rank in children:  # a launcher's ranks; a run's own workers must end by themselves
        if "--exp" in rank.cmdline() and "torch.distributed.run" in process.args:
            rank.kill()
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    return children


def test_killed_at_any_moment_it_continues_as_if_nothing_had_been(
    corpus, run_python, start_training, tmp_path: Path
) -> None:
    """SIGKILL at a random moment and while saving, SIGTERM, a checkpoint cut in half: one run survives them all."""
    steps, exp = 24, tmp_path / "killed"
    config = write_config(
        corpus,
        tmp_path / "killed.yaml",
        "hubert",
        "filterbank",
        data={"workers": 2},
        train={"steps": steps, "valid_every_steps": 1000},
        checkpoint={"every_steps": 1, "keep_last": 3},
    )
    orphans: list[psutil.Process] = []

    process = start_training(config, exp)
    wait_until(process, lambda: steps_logged(exp) >= 3)
    time.sleep(random.Random(5).uniform(0.0, 0.5))
    orphans += kill(process)
    assert len(orphans) >= 2, "the loader's workers were running"

    process = start_training(config, exp)
    before = steps_logged(exp)
    wait_until(process, lambda: steps_logged(exp) >= before + 2 and any((exp / "checkpoints").glob(".step-*.tmp")))
    orphans += kill(process)

    process = start_training(config, exp)
    before = steps_logged(exp)
    wait_until(process, lambda: steps_logged(exp) >= before + 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "asked to stop: saved step" in output

    folders = sorted((exp / "checkpoints").glob("step-*"))
    newest = folders[-1] / "model.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    process = start_training(config, exp)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"WARNING checkpoint {folders[-1]} is damaged (model.safetensors is not as it was written)" in output
    assert f"continuing from {folders[-2]}" in output

    run_python(
        WORKER, write_plan(tmp_path / "plan.json", [{"processes": 1, "jobs": [(config, tmp_path / "whole", 0)]}])
    )
    assert_equal_runs(tmp_path / "whole", exp, steps)
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert alive == [], "the loader's workers outlived their run"


def test_torchrun_killed_goes_on_and_lets_no_other_run_into_its_folder(
    corpus, run_python, start_training, tmp_path: Path, capsys
) -> None:
    """Two processes under torchrun that read without workers: killed, continued, and the same as never killed."""
    steps, exp = 8, tmp_path / "exp"
    config = write_config(
        corpus,
        tmp_path / "ctc.yaml",
        "ctc",
        "filterbank",
        data={"workers": 0},
        engine={"zero_stage": 1},
        train={"steps": steps, "valid_every_steps": 1000},
        checkpoint={"every_steps": 1, "keep_last": 3},
    )
    process = start_training(config, exp, processes=2)
    wait_until(process, lambda: steps_logged(exp) >= 2)
    refused(config, exp, process, capsys)
    for child in kill(process):
        with suppress(psutil.NoSuchProcess):
            child.wait(60)
    before = steps_logged(exp)
    assert before < steps, "it was killed under way"

    process = start_training(config, exp, processes=2)
    wait_until(process, lambda: steps_logged(exp) > before)
    refused(config, exp, process, capsys)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"continuing from {exp}/checkpoints/step-" in output
    assert f"finished {steps} steps" in output
    assert output.count("continuing from") == 1, "the main process alone speaks"

    entries = [{"processes": 2, "jobs": [(config, tmp_path / "whole", 0)]}]
    run_python(WORKER, write_plan(tmp_path / "plan.json", entries))
    assert_equal_runs(tmp_path / "whole", exp, steps)

    settings = OmegaConf.load(config)
    settings.train.steps, settings.engine.zero_stage = steps + 1, 2
    OmegaConf.save(settings, tmp_path / "alone.yaml")
    output, _ = start_training(tmp_path / "alone.yaml", exp).communicate(timeout=600)
    assert f"continuing from {exp}/checkpoints/step-{steps:08d}: step {steps}" in output, "one process and ZeRO 2"
    assert f"finished {steps + 1} steps" in output


def test_deepspeeds_launcher_is_stopped_and_killed_and_leaves_nobody_behind(
    corpus, run_python, start_training, tmp_path: Path
) -> None:
    """SIGTERM to `deepspeed`, which dies of it, then SIGKILL to the process below: ranks save, end, and go on later."""
    steps, exp = 16, tmp_path / "exp"
    config = write_config(
        corpus,
        tmp_path / "hubert.yaml",
        "hubert",
        "filterbank",
        data={"workers": 0},
        train={"steps": steps, "valid_every_steps": 1000},
        checkpoint={"every_steps": 1000, "keep_last": 3},
    )
    for number in (signal.SIGTERM, signal.SIGKILL):
        before, process = steps_logged(exp), start_training(config, exp, 2, deepspeed=True)
        wait_until(process, lambda before=before: steps_logged(exp) >= before + 2)
        below = psutil.Process(process.pid).children(recursive=True)
        ranks = [
            child
            for child in below
            if "--exp" in child.cmdline() and "deepspeed.launcher.launch" not in child.cmdline()
        ]
        (launch,) = (child for child in below if "deepspeed.launcher.launch" in child.cmdline())
        assert len(ranks) == 2
        os.kill(process.pid if number == signal.SIGTERM else launch.pid, number)
        output, _ = process.communicate(timeout=300)  # until nobody is left who writes
        _, alive = psutil.wait_procs(below, timeout=60)
        assert alive == []
        saved = re.search(r"asked to stop: saved step (\d+)", output)
        assert saved, output
        assert int(saved[1]) == steps_logged(exp) < steps
        if number == signal.SIGTERM:
            assert process.returncode == -signal.SIGTERM, "`deepspeed` itself does nothing about it"
    process = start_training(config, exp, 2, deepspeed=True)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"continuing from {exp}/checkpoints/step-{int(saved[1]):08d}" in output
    assert f"finished {steps} steps" in output
    entries = [{"processes": 2, "jobs": [(config, tmp_path / "whole", 0)]}]
    run_python(WORKER, write_plan(tmp_path / "plan.json", entries))
    assert_equal_runs(tmp_path / "whole", exp, steps)


@pytest.mark.parametrize("kind", ["shar", "webdataset"])
def test_a_stream_under_torchrun_killed_goes_on_exactly(
    corpus, run_python, start_training, tmp_path: Path, kind: str
) -> None:
    """Two processes with two readers each, SIGKILL over the end of an epoch: the same as never killed, to the bit."""
    steps, exp = 9, tmp_path / "exp"
    convert(str(corpus.train), tmp_path / "shards", kind, shard_cuts=9, shuffle=1, jobs=1)
    config = write_config(
        corpus,
        tmp_path / "hubert.yaml",
        "hubert",
        "filterbank",
        data={"train": str(tmp_path / "shards"), "workers": 2},
        train={"steps": steps, "valid_every_steps": 1000},
        checkpoint={"every_steps": 1, "keep_last": 3},
    )
    process = start_training(config, exp, processes=2)
    wait_until(process, lambda: steps_logged(exp) >= 3)
    for child in kill(process):
        with suppress(psutil.NoSuchProcess):
            child.wait(60)
    assert steps_logged(exp) < steps, "it was killed under way"

    process = start_training(config, exp, processes=2)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "for 4 readers" in output
    assert "the stream goes on exactly where its 4 readers were, " in output

    entries = [{"processes": 2, "jobs": [(config, tmp_path / "whole", 0)]}]
    run_python(WORKER, write_plan(tmp_path / "plan.json", entries))
    assert_equal_runs(tmp_path / "whole", exp, steps)
    assert final_state(exp, steps)["state"]["position"]["epoch"] > 0


def refused(config: Path, exp: Path, process: subprocess.Popen[str], capsys) -> None:
    """A second run in the folder of a running one ends before it touches anything, naming the process that is there."""
    before = steps_logged(exp)
    assert main(["train", str(config), "--exp", str(exp)]) == 2
    error = capsys.readouterr().err
    assert process.poll() is None, "the first run goes on"
    ranks = [rank.pid for rank in psutil.Process(process.pid).children() if "--exp" in rank.cmdline()]
    expected = f"harken train: {exp} is being trained by process {{}} on {socket.gethostname()}: stop that run or wait"
    assert any(error.startswith(expected.format(rank)) for rank in ranks), (error, ranks)
    assert len(error.splitlines()) == 1
    assert steps_logged(exp) >= before


# processes, loader workers and ZeRO stage of the lives of one run, in turn
LAYOUTS = [(2, 0, 0), (1, 1, 1), (4, 0, 2), (2, 3, 1), (1, 0, 2), (2, 1, 2), (4, 1, 0), (1, 3, 0)]
KILLS = int(os.environ.get("HARKEN_TEST_KILLS", "4"))


def test_killed_on_one_layout_it_goes_on_with_any_other(corpus, run_python, start_training, tmp_path: Path) -> None:
    """SIGKILL at random points; each life has other processes, workers and another ZeRO stage than the one before.

    Every (step, sample ids, crops, hash of masks) is that of an unbroken run, also of the steps that were taken twice.
    Weights differ by the order in which ranks' float32 sums are added alone: 1e-3 of each, and losses 1e-4 of theirs.
    HARKEN_TEST_KILLS sets how many lives there are.
    """
    exp, random_moments = tmp_path / "killed", random.Random(3)
    steps = 3 * (KILLS + 1)
    changes: dict[str, Any] = {
        "train": {"steps": steps, "valid_every_steps": 1000},
        "checkpoint": {"every_steps": 1, "keep_last": 3},
        "log": {"every_steps": 1},
        "encoder": {"dropout": 0.0, "layer_drop": 0.0},
    }
    for life in range(KILLS + 1):
        processes, workers, stage = LAYOUTS[life % len(LAYOUTS)]
        config = write_config(
            corpus,
            tmp_path / f"{life}.yaml",
            "hubert",
            "filterbank",
            **changes,
            data={"workers": workers, "crop_seconds": 1.5},
            engine={"zero_stage": stage},
        )
        before, process = steps_logged(exp), start_training(config, exp, processes)
        if life == KILLS:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
            assert f"finished {steps} steps" in output
            break
        wait_until(process, lambda before=before: steps_logged(exp) > before)
        time.sleep(random_moments.uniform(0.0, 0.3))
        for child in kill(process):
            with suppress(psutil.NoSuchProcess):
                child.wait(60)
        assert steps_logged(exp) < steps, "it was killed under way"
    whole = write_config(corpus, tmp_path / "whole.yaml", "hubert", "filterbank", **changes, data={"crop_seconds": 1.5})
    run_python(WORKER, write_plan(tmp_path / "plan.json", [{"processes": 1, "jobs": [(whole, tmp_path / "whole", 0)]}]))
    expected, found = rows_of(tmp_path / "whole"), rows_of(exp)
    assert found.keys() == expected.keys()
    assert {step for step, _ in found} == set(range(1, steps + 1))
    for place, rows in found.items():
        assert all(row == expected[place][0] for row in rows), place
    assert any(len(rows) > 1 for rows in found.values()), "a step was taken twice"
    first, second = final_state(tmp_path / "whole", steps), final_state(exp, steps)
    timed_or_summed = {name: first["state"][name] for name in ("seconds", "best_score")}
    assert first["state"] == {**second["state"], **timed_or_summed}
    assert second["state"]["best_score"] == pytest.approx(first["state"]["best_score"], rel=1e-4)
    for name, value in first["weights"].items():
        assert torch.allclose(second["weights"][name], value, rtol=1e-3, atol=1e-5), name
    for step, loss in losses_of(tmp_path / "whole").items():
        assert losses_of(exp)[step] == pytest.approx(loss, rel=1e-4), step


def rows_of(exp: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Return every row of the sample log, by step and place in the step."""
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for path in exp.glob("samples.rank*.jsonl"):
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # cut off by the kill; the step is taken again
                row = json.loads(line)
                rows.setdefault((row["step"], row["micro_batch"]), []).append(row)
    return rows


def losses_of(exp: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
