"""compare.sh of the default recipe on a copy of it: what is redone, what is kept, what runs side by side.

`harken` is a stub that trains nothing: a run's folder gets what training, decoding and scoring would leave in it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# `python -m harken.apps.main VERB ...`; anything else goes to the real one. `config` is what a configuration stands on:
# the text of all files and the overrides.
STUB = r"""#!{python}
import json, os, pathlib, signal, sys, time
arguments = sys.argv[1:]
if arguments[:2] != ["-m", "harken.apps.main"]:
    os.execv("{python}", ["{python}", *arguments]) if arguments[0] != "-c" or "json" in arguments[1] else sys.exit()
verb, rest = arguments[2], arguments[3:]
trace = pathlib.Path(os.environ["TRACE"])
def note(text):
    with trace.open("a") as stream:
        stream.write(text + "\n")
if verb == "config":
    for path in sorted(pathlib.Path("{conf}").rglob("*.yaml")):
        print(path.read_text())
    print("\n".join(rest))
elif verb == "train":
    out = pathlib.Path(rest[rest.index("--exp") + 1])
    kept = out / "checkpoints/step-00000004"
    step = (kept / "state.json").read_text() if (kept / "state.json").exists() else "0"
    threads = [a for a in rest if "threads" in a] + [os.environ.get("OMP_NUM_THREADS", "all")]
    note(f"train {{out.name}} from {{step}} on {{threads}}")
    kept.mkdir(parents=True, exist_ok=True)
    if os.environ.get("FAIL") == out.name:
        print("no luck")
        sys.exit(3)
    if os.environ.get("SLOW") and "-" in out.name:
        def save(*_):
            time.sleep(0.3)
            (kept / "state.json").write_text("2")
            note(f"saved {{out.name}}")
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        note(f"waits {{out.name}}")
        time.sleep(30)
    begun = time.time()
    time.sleep(0.2)
    (kept / "checksums.json").write_text(out.name)
    (out / "config.yaml").write_text("train: {{steps: 4, patience: 0}}\n")
    record = {{"kind": "train", "step": 4, "time": 1, "hours": 0.5, "wall": 90}}
    (out / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    note(f"took {{out.name}} {{begun}} {{time.time()}}")
elif verb == "units" and rest[0] != "check":
    pathlib.Path(rest[rest.index("--out") + 1]).mkdir(parents=True)
elif verb == "ngram":
    pathlib.Path(rest[rest.index("--out") + 1]).write_text("")
elif verb == "score":
    out = pathlib.Path(rest[rest.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    start, seed = (out.parent.parent if out.parent.name == "beam" else out.parent).name.split("-")[1:]
    seed = int(seed) - 20 * (out.parent.name == "beam")
    rate = {{"scratch": 0.5, "pretrain1": 0.4, "pretrain2": 0.3}}[start] + 0.01 * int(seed)
    (out / "wer.json").write_text(json.dumps({{"wer": {{"rate": 2 * rate}}, "cer": {{"rate": rate}}}}))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the recipe with manifests of a line, units, and a `python` that is the stub."""
    recipe = tmp_path / "egs/amazon_queen"
    recipe.mkdir(parents=True)
    for name in ("compare.sh", "README.md"):
        shutil.copy(ROOT / "egs/amazon_queen" / name, recipe / name)
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    for name in ("conf", "local"):
        shutil.copytree(ROOT / "egs/amazon_queen" / name, recipe / name)
    shutil.copytree(ROOT / "egs/shared", tmp_path / "egs/shared")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/results_table.py", tmp_path / "tools/results_table.py")
    (tmp_path / "framework").symlink_to(ROOT / "framework")
    (recipe / "data").mkdir()
    for name in ("train-10min", "train-30min", "dev", "test", "test-unseen"):
        (recipe / f"data/{name}.jsonl").write_text(name)
    (recipe / "data/tokens.txt").write_text("a")
    (tmp_path / "exp/units1/labels").mkdir(parents=True)
    (tmp_path / "exp/units1/labels/card.json").write_text('{"clusters": 7}')
    (tmp_path / "python").write_text(STUB.format(python=sys.executable, conf=recipe / "conf"))
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "trace").touch()
    return tmp_path


def command(copy: Path, *arguments: str) -> list[str]:
    script = str(copy / "egs/amazon_queen/compare.sh")
    return ["bash", script, "--python", str(copy / "python"), "--exp", str(copy / "exp"), *arguments]


def environment(copy: Path, **extra: str) -> dict[str, str]:
    return {**os.environ, "TRACE": str(copy / "trace"), **extra}


def compare(copy: Path, *arguments: str, code: int = 0, **extra: str) -> str:
    """Run 10 minutes of labels with one seed unless told otherwise; return what it printed. The trace begins anew."""
    (copy / "trace").write_text("")
    done = subprocess.run(
        command(copy, "--minutes", "10", *arguments),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(copy, **extra),
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def trained(copy: Path) -> list[str]:
    """Return the rows that were trained."""
    lines = (copy / "trace").read_text().splitlines()
    names = (line.split()[1] for line in lines if line.startswith("train "))
    return sorted(name for name in names if "-" in name)


ALL = ["10-pretrain1-1", "10-pretrain2-1", "10-scratch-1"]


@pytest.mark.slow
def test_rows_are_trained_once_and_redone_when_what_they_are_made_of_changed(copy: Path) -> None:
    compare(copy)
    assert trained(copy) == ALL
    trace = (copy / "trace").read_text()
    assert trace.count("on ['engine.threads=1', '1']") == 3
    assert compare(copy).count("skipped: finished on") == 6
    assert trained(copy) == []

    (copy / "exp/compare/pretrain2/checkpoints/step-00000004/checksums.json").write_text("trained again")
    output = compare(copy, "--stage", "4", "--jobs", "1", "--minutes", "10 ")  # another text, the same rows
    assert "10-pretrain2-1: begins anew (changed since: model)" in output
    assert "10-scratch-1: done before" in output
    assert trained(copy) == ["10-pretrain2-1"]

    (copy / "egs/amazon_queen/data/train-10min.jsonl").write_text("other labels")
    assert "10-scratch-1: begins anew (changed since: labels)" in compare(copy, "--seeds", "1")
    assert trained(copy) == ALL

    base = copy / "egs/amazon_queen/conf/model.yaml"
    base.write_text(base.read_text().replace("layers: 6", "layers: 5"))
    output = compare(copy, "--seeds", "1")
    assert "runs again: its command or a file it names has changed" in output
    assert "10-scratch-1: begins anew (changed since: configuration)" in output
    assert trained(copy) == ALL

    (copy / "wide.yaml").write_text("encoder:\n  dim: 512\n")
    conf = ("--seeds", "1", "--conf", str(copy / "wide.yaml"))
    assert compare(copy, *conf).count("(changed since: configuration)") == 3
    assert f" {copy}/wide.yaml " in (copy / "exp/compare/rows/10-scratch-1/commands").read_text()

    assert "10-scratch-1: begins anew (--force)" in compare(copy, *conf, "--force")
    assert trained(copy) == ALL


@pytest.mark.slow
def test_a_failed_row_names_its_log_and_stops_no_other(copy: Path) -> None:
    output = compare(copy, code=1, FAIL="10-scratch-1")
    assert f"10-scratch-1: FAILED with exit code 3; log: {copy}/exp/logs/compare/10-scratch-1.log" in output
    assert "no luck" in output
    assert "1 rows failed; the same command goes on with them" in output
    assert trained(copy) == ALL
    assert not (copy / "exp/compare/rows/10-scratch-1/result.json").exists()
    assert "stage 4 rows FAILED" in output
    again = compare(copy)
    assert trained(copy) == ["10-scratch-1"]
    assert "10-scratch-1: continues" in again


@pytest.mark.slow
def test_rows_run_side_by_side_as_many_as_asked(copy: Path) -> None:
    def most() -> int:
        trace = (copy / "trace").read_text().splitlines()
        spans = [line.split()[2:] for line in trace if line.startswith("took 10-")]
        times = [(float(begin), float(end)) for begin, end in spans]
        assert len(times) == 3
        return max(sum(begin <= moment < end for begin, end in times) for moment, _ in times)

    compare(copy, "--jobs", "1")
    assert most() == 1
    compare(copy, "--jobs", "3", "--force")
    assert most() >= 2
    assert "--jobs must be 1 or more, got '0'" in compare(copy, "--jobs", "0", code=2)


@pytest.mark.slow
def test_an_interrupted_comparison_saves_and_continues(copy: Path) -> None:
    process = subprocess.Popen(
        command(copy, "--minutes", "10", "--jobs", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(copy, SLOW="1"),
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while (copy / "trace").read_text().count("waits") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    trace = (copy / "trace").read_text()
    assert trace.count("saved") == 2, "run.sh must end after the rows have saved"
    assert "FAILED" not in output
    assert len(trained(copy)) == 2, "no row may begin after the signal"
    assert not (copy / "exp/compare/rows/10-scratch-1/test-score").exists(), "an unfinished row must not be scored"
    assert "continues" in compare(copy)
    assert len(trained(copy)) == 3
    assert (copy / "trace").read_text().count("from 2") == 2


@pytest.mark.slow
def test_what_a_row_was_made_with_is_kept_beside_its_scores(copy: Path) -> None:
    compare(copy, "--minutes", "30", "--seeds", "1 2", "--jobs", "2")
    row = json.loads((copy / "egs/amazon_queen/results/30-pretrain2-2.json").read_text())
    made = [shlex.split(line) for line in row["commands"]]
    verbs = "train units units units train train decode score score"
    assert [words[1] for words in made] == verbs.split()
    assert [shlex.split(line)[1] for line in row["search_commands"]] == ["decode", "score", "score"]
    assert "--ngram" in row["search_commands"][0]
    assert made[0][2:4] == ["egs/amazon_queen/conf/compare/pretrain.yaml", "objective.classes=[7]"]
    train = row["commands"][5]
    assert train.startswith("harken train egs/amazon_queen/conf/compare/finetune.yaml objective.tokenizer=")
    assert "train.init_from=exp/compare/pretrain2 train.init_fresh_blocks=2" in train
    assert "seed=2" in train
    assert (row["steps"], row["hours_of_audio"], row["minutes_of_training"]) == (4, 0.5, 1.5)
    assert (row["seed"], row["rows_side_by_side"]) == (2, 2)
    assert "cores of" in row["machine"]
    assert row["commit"] == "unknown"  # the copy is no repository
    page = (copy / "egs/amazon_queen/README.md").read_text()
    assert (
        "| 30 min | HuBERT iteration 2 | 31.5 ± 0.7 | 63.0 ± 1.4 | 31.5 ± 0.7 | 63.0 ± 1.4 | 39 %, 39 % "
        "| 11.5 ± 0.7 | 23.0 ± 1.4 | 11.5 ± 0.7 | 63 %, 63 % | 2 | 1.5 |" in page
    )
    assert "`harken train egs/amazon_queen/conf/compare/finetune.yaml" in page
    assert "(egs/amazon_queen/results)" in (copy / "README.md").read_text()
    shown = (copy / "exp/stages/4-rows.commands").read_text()
    assert shown.count("harken train") == 6


def test_rows_need_finished_models(copy: Path) -> None:
    output = compare(copy, "--stage", "4", code=2)
    assert f"{copy}/exp/compare/pretrain1 holds no pretrained model: run this again from --stage 1" in output
    assert trained(copy) == []


def test_a_comparison_needs_units(copy: Path) -> None:
    shutil.rmtree(copy / "exp/units1")
    output = compare(copy, code=2)
    assert f"{copy}/exp/units1/labels holds no units: run run.sh --exp {copy}/exp --stop-stage 4 first" in output
