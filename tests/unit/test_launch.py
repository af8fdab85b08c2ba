"""Jobs without a Slurm: their files, the user's cluster file, what a job decides, its status, the check of nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harken.apps.main import main
from harken.cluster.preflight import Node, Preflight, Word, judge, judge_measured
from harken.cluster.settings import FOLDER, ClusterConfig, PreflightConfig, load_cluster
from harken.cluster.spread import Allocation, parallel_command

ROOT = Path(__file__).resolve().parents[2]


def dry_run(capsys, *arguments: str) -> list[str]:
    assert main(["launch", *arguments]) == 0
    text = capsys.readouterr().out
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return text.splitlines()


def test_four_nodes_of_eight_gpus(capsys, tmp_path: Path) -> None:
    exp = tmp_path / "100% new"
    lines = dry_run(
        capsys,
        *("--nodes", "4", "--gpus", "8", "--time", "1-00:00:00", "--partition", "gpu", "--after", "7,8", "--dry-run"),
        *("--", "train", "hubert_base", "--exp", str(exp), "data.train=a b"),
    )
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert directives == [
        "job-name=train",
        "nodes=4",
        "ntasks-per-node=1",
        "cpus-per-task=64",
        "gpus-per-node=8",
        "partition=gpu",
        "time=1-00:00:00",
        f'output="{tmp_path}/100%% new/logs/train.slurm.log"',
        "open-mode=append",
        "requeue",
        "signal=B:USR1@300",
        "dependency=afterok:7:8",
        "kill-on-invalid-dep=yes",
    ]
    assert lines[-2].startswith(f"exec {sys.executable} -m harken.apps.main job --exp '{exp}' --name train")
    assert f"--resumes '{exp}' -- \\" in lines[-2]
    assert lines[-1].endswith(f"-- train hubert_base --exp '{exp}' 'data.train=a b' --fail-when-stopped")
    assert "parallel --processes 1" in lines[-1]
    assert not exp.exists(), "a dry run leaves nothing"


def test_a_program_gets_one_node_and_the_lines_of_the_cluster(capsys, tmp_path: Path) -> None:
    for name in ("stage.sbatch", "train.sbatch"):
        (tmp_path / name).write_text((FOLDER / name).read_text())
    (tmp_path / "mine.yaml").write_text(
        "setup: |\n  module load cuda\n  export A=1\nstage: {memory: 64G, options: [--account=speech]}\n"
    )
    options = ["--exp", str(tmp_path / "exp"), "--cluster", str(tmp_path / "mine.yaml"), "--dry-run"]
    lines = dry_run(capsys, *options, "--", "bash", "local/labels.sh", "--jobs", "4")
    assert {"#SBATCH --nodes=1", "#SBATCH --mem=64G", "#SBATCH --account=speech"} < set(lines)
    assert lines.index("module load cuda") < lines.index("export A=1") < len(lines) - 1
    assert "#SBATCH --job-name=bash" in lines
    assert lines[-1].strip() == "bash local/labels.sh --jobs 4"
    assert not any("gpus" in line or "dependency" in line for line in lines)


def directives(lines: list[str], name: str) -> list[str]:
    return [line.removeprefix(f"#SBATCH --{name}=") for line in lines if line.startswith(f"#SBATCH --{name}=")]


def test_an_array_stands_between_what_it_needs_and_what_puts_it_together(capsys, tmp_path: Path) -> None:
    options = ["--exp", str(tmp_path / "exp"), "--name", "4-units", "--after", "7", "--begin", "--pieces"]
    command = ["--dry-run", "--", "bash", "run.sh"]
    lines = dry_run(capsys, *options, "3", *command)
    assert directives(lines, "job-name") == ["4-units-begin", "4-units-pieces", "4-units"]
    assert directives(lines, "array") == ["1-3"]
    assert directives(lines, "dependency") == [
        "afterok:7",
        "afterok:JOB_OF_4-units-begin",
        "afterok:JOB_OF_4-units-pieces",
    ]
    ran = [line.strip() for line in lines if line.startswith("  bash")]
    assert ran == [
        "bash run.sh --piece begin",
        'bash run.sh --piece "$SLURM_ARRAY_TASK_ID/3"',
        "bash run.sh",
    ]
    assert [" --retry " in line for line in lines if line.startswith("exec ")] == [False, True, False]

    for name in ("stage.sbatch", "train.sbatch"):
        (tmp_path / name).write_text((FOLDER / name).read_text())
    for number, arrays in ((5, ["1-5"]), (1, [])):
        (tmp_path / "mine.yaml").write_text(f"pieces: {number}\n")
        lines = dry_run(capsys, *options, "cluster", "--cluster", str(tmp_path / "mine.yaml"), *command)
        assert directives(lines, "array") == arrays
        assert len(directives(lines, "job-name")) == (3 if arrays else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exp", "e"], "a command must follow after `--`, found none"),
        (["--", "train", "c.yaml"], "`--exp` must name the folder of the experiment, found none before `--`"),
        (["--exp", "e", "--nodes", "2", "--", "true"], "`--nodes` and `--gpus` are for jobs that train"),
        (["--time", "soon", "--", "train", "--exp", "e"], "`--time` must be minutes, MINUTES:SECONDS"),
        (["--name", "a b", "--exp", "e", "--", "true"], "`--name` must be of letters, digits"),
        (["--exp", "e", "--cluster", "no.yaml", "--", "true"], "no.yaml must be a YAML file about your cluster"),
        (
            ["--exp", "e", "--pieces", "-1", "--", "true"],
            "`--pieces` must be 0 (no array) or more, or `cluster`, got -1",
        ),
        (["--exp", "e", "--pieces", "2", "--", "data", "stats"], "`--pieces` is for `data scan`, `data verify`"),
        (
            ["--exp", "e", "--pieces", "2", "--resumes", "r", "--", "bash", "p.sh"],
            "`--pieces` is for work that does not train: leave `--resumes` out",
        ),
        (["--exp", "e", "--begin", "--", "bash", "p.sh"], "`--begin` is for a program that knows `--piece begin`"),
        (["--exp", "e", "--begin", "--pieces", "2", "--", "units", "label"], "`--begin` is for a program that knows"),
        (["--nodes", "0", "--", "train", "--exp", "e"], "must be 1 or more and `--gpus` 0 or more, got 0, 1 and 0"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    arguments: list[str], message: str, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_it_says_what_to_do(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "--exp", str(tmp_path / "e"), "--", "true"]) == 2
    assert "`squeue` must be on the PATH, found none: run this on a machine of the cluster" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {time: 24:00:00}", '`train.time` must be in quotes, as in time: "24:00:00"'),
        ("trian: {}", "unknown key `trian`; did you mean `train`?"),
        ("train: {options: [account=x]}", "`options` must be options of sbatch, each beginning with `-`"),
        ("signal_seconds: 0", "`cluster.signal_seconds` must be positive, got 0"),
        ("- a", "must be a group of keys"),
        ("a: [", "must be a YAML file about your cluster"),
    ],
)
def test_a_mistake_in_the_cluster_file_is_named(text: str, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert main(["launch", "--exp", "e", "--cluster", str(path), "--", "true"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error


def test_the_file_that_is_shipped_says_the_defaults() -> None:
    assert load_cluster(ROOT / "slurm/cluster.yaml") == ClusterConfig()


def test_one_process_needs_no_srun_and_several_have_one_torchrun_a_node() -> None:
    alone = Allocation(["n1"], "10.0.0.1", 20007, 0, 4)
    assert parallel_command(alone, 1, ["train", "c"]) == [sys.executable, "-m", "harken.apps.main", "train", "c"]
    many = Allocation(["n1", "n2"], "10.0.0.1", 20007, 8, 64)
    words = " ".join(parallel_command(many, 1, ["train", "c"]))
    assert words.startswith("srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --cpus-per-task 64 --wait 60 bash -c ")
    torchrun = "--nnodes 2 --nproc-per-node 8 --master-addr 10.0.0.1 --master-port 20007 -m harken.apps.main train c"
    assert words.endswith(torchrun)


def start_job(tmp_path: Path, script: str, *options: str) -> subprocess.Popen[str]:
    """`harken job` as Slurm would start it, with a `scontrol` that keeps what it was asked."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nkill -TERM $PPID\n')
    scontrol.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "framework"),
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "n1",
    }
    command = [sys.executable, "-m", "harken.apps.main", "job", "--exp", str(tmp_path), "--name", "j", *options]
    (tmp_path / "logs").mkdir(exist_ok=True)
    with (tmp_path / "logs/j.slurm.log").open("a") as log:
        return subprocess.Popen(
            [*command, "--", "bash", "-c", script], env=environment, stdout=log, stderr=log, text=True
        )


def starts(tmp_path: Path) -> list[dict[str, object]]:
    return list(json.loads((tmp_path / "jobs/j.starts.json").read_text())["starts"])


SAVES = "trap 'mkdir -p {0}/checkpoints/step-7; exit 75' USR1; touch {0}/ready; while true; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("number", "status", "outcome", "asked"),
    [(signal.SIGUSR1, 75, "requeued", "requeue 12\n"), (signal.SIGTERM, 75, "stopped", None)],
)
def test_a_warning_saves_and_requeues_and_an_end_saves(
    number: signal.Signals, status: int, outcome: str, asked: str | None, tmp_path: Path
) -> None:
    job = start_job(tmp_path, SAVES.format(tmp_path), "--resumes", str(tmp_path))
    until = time.monotonic() + 120
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(120) == status
    (start,) = starts(tmp_path)
    assert (start["outcome"], start["checkpoint"], start["left"]) == (outcome, "", "step-7")
    assert ((tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else None) == asked


@pytest.mark.parametrize(
    ("script", "resumes", "outcome", "reason", "status"),
    [
        ("exit 0", False, "finished", "", 0),
        ("echo no disk; exit 5", False, "failed", "status 5: no disk", 5),
        ("echo unknown key; exit 2", True, "failed", "status 2, a mistake in what it was given", 2),
        ("exit 5", True, "requeued", "status 5", 75),
    ],
)
def test_how_a_command_ends_decides(
    script: str, resumes: bool, outcome: str, reason: str, status: int, tmp_path: Path
) -> None:
    options = ["--resumes", str(tmp_path)] if resumes else []
    assert start_job(tmp_path, script, *options).wait(120) == status
    (start,) = starts(tmp_path)
    assert start["outcome"] == outcome
    assert str(start["reason"]).startswith(reason)


def test_starts_without_a_new_checkpoint_are_counted_from_the_last_that_brought_one(tmp_path: Path) -> None:
    options = ["--resumes", str(tmp_path), "--max-starts-without-progress", "2"]
    script = f'n=$(ls {tmp_path}/checkpoints | wc -l); {{}}; echo "bad luck"; exit 1'
    (tmp_path / "checkpoints").mkdir()
    for body, status in (("true", 75), (f"mkdir {tmp_path}/checkpoints/step-$n", 75), ("true", 75), ("true", 1)):
        assert start_job(tmp_path, script.format(body), *options).wait(120) == status
    reason = "2 starts in a row ended without a new checkpoint, the last with status 1: bad luck"
    assert str(starts(tmp_path)[-1]["reason"]).startswith(reason)
    assert [start["outcome"] for start in starts(tmp_path)] == ["requeued"] * 3 + ["failed"]


def test_a_start_that_was_killed_counts_as_one_that_brought_nothing(tmp_path: Path) -> None:
    options = ["--resumes", str(tmp_path), "--max-starts-without-progress", "1"]
    job = start_job(tmp_path, f"touch {tmp_path}/ready; sleep 60 & wait; sleep 1", *options)
    until = time.monotonic() + 120
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    job.kill()
    job.wait()
    assert start_job(tmp_path, "exit 0", *options).wait(120) == 1
    (start,) = starts(tmp_path)
    assert "the last as it was killed, or a node of n1 died" in str(start["reason"])


def test_the_status_of_a_run_on_this_machine(tmp_path: Path, capsys) -> None:
    for folder in ("stages", "logs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "stages/1-check.done").touch()
    (tmp_path / "stages/10-train.begun").touch()
    (tmp_path / "stages/2-data.done").touch()
    log = "12:00:00 train 40/160  loss 4.1  eta 1h02m\n12:00:01 valid 40/160  loss 4.0\n"
    (tmp_path / "logs/10-train.log").write_text(log)
    assert main(["status", str(tmp_path)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in lines[:3]] == ["1-check", "2-data", "10-train"]
    assert lines[2].endswith("begun  step 40 of 160 (25 %), 1h02m to go")
    assert lines[3].strip() == "12:00:01 valid 40/160  loss 4.0"
    assert main(["status", str(tmp_path / "logs")]) == 2
    assert "must be the folder of a recipe's run or of `harken launch`, found no stages" in capsys.readouterr().err


def test_a_node_with_other_software_or_fewer_gpus_is_named() -> None:
    words = [Word(f"n{number}", "h", "torch 2", 8, 0.0) for number in (1, 2, 3)]

    assert judge(words, 8) == ""
    few = [*words[:2], Word("n3", "h", "torch 2", 7, 0.0)]
    assert judge(few, 8).startswith("node n3 must have 8 GPUs, torch sees 7")
    other = [words[0], Word("n2", "h", "torch 3", 8, 0.0), words[2]]
    assert "node n2 runs torch 3, node n1 torch 2: all must run the same environment" in judge(other, 8)


def test_a_node_with_another_clock_or_a_slow_link_is_named() -> None:
    names, expected = ["n1", "n2", "n3"], PreflightConfig(gigabytes_per_second=40.0)
    assert judge_measured(names, [0.0, 0.1, -0.2], [25.0, 30.0, 21.0], expected) == ""
    skewed = judge_measured(names, [0.0, 0.1, -7.0], [25.0, 30.0, 21.0], expected)
    assert skewed.startswith("the clock of node n3 is -7.0 s from that of node n1")
    slow = judge_measured(names, [0.0, 0.0, 0.0], [5.0, 30.0, 4.0], expected)
    assert slow.startswith("node n3 is slow: an all-reduce with n1 has, in GB/s, n3 4.00; expected are 40.0")
    first = judge_measured(names, [0.0, 0.0, 0.0], [5.0, 4.0, 4.0], expected)
    assert first.startswith("node n1 is slow with every other")


def test_a_node_that_does_not_come_is_named(tmp_path: Path, capsys) -> None:
    check = Preflight(Node(0, ["n1", "n2"], "7.0"), tmp_path, "127.0.0.1", 29500, 0, PreflightConfig(wait_seconds=1))
    assert check.run() == 69
    error = capsys.readouterr().err
    assert f"harken preflight: node n2 has not come within 1 s, or does not see {tmp_path}" in error
    assert "`--exclude=n2`" in error
