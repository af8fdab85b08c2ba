"""tools/results_table.py: the table, what a row says of itself, and rows that are not finished."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_table", ROOT / "tools/results_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def row(minutes: int, start: str, seed: int, cer: float, **other: Any) -> dict[str, Any]:
    scores = {
        part: {"cer": {"rate": cer + more}, "wer": {"rate": 2 * cer}}
        for part, more in (("test", 0.0), ("test-unseen", 0.1))
    }
    made = {
        "machine": "2 cores of A",
        "commit": "abc",
        "steps": 10,
        "rows_side_by_side": 2,
        "date": "2026-01-02 03:04:05",
    }
    about = {"minutes_of_training": 3.0, "commands": [f"harken train {ROOT}/conf.yaml seed={seed}"]}
    return {"minutes": minutes, "start": start, "seed": seed, "scores": scores, **made, **about, **other}


def test_the_table_has_means_deviations_and_gains_of_medians(tool: ModuleType) -> None:
    rows = [
        row(30, "pretrain1", 1, 0.2),
        row(30, "scratch", 1, 0.4),
        row(30, "scratch", 2, 0.5),
        row(30, "scratch", 3, 1.2),
        row(10, "pretrain2", 1, 0.7),
    ]
    lines = tool.table(rows, tool.Layout()).splitlines()
    assert lines[2:] == [
        "| 10 min | HuBERT iteration 2 | 70.0 | 140.0 | 80.0 | 140.0 |  | 1 | 3.0 |",
        "| 30 min | from scratch | 70.0 ± 43.6 | 140.0 ± 87.2 | 80.0 ± 43.6 | 140.0 ± 87.2 |  | 3 | 3.0 |",
        "| 30 min | HuBERT iteration 1 | 20.0 | 40.0 | 30.0 | 40.0 | 60 %, 50 % | 1 | 3.0 |",
    ]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_a_table_of_other_starts_has_costs_and_a_baseline_of_its_own(tool: ModuleType) -> None:
    layout = tool.Layout("encoders", {"a_ctc": "A, CTC", "b_ctc": "B, CTC"}, True)
    rows = [row(30, "b_ctc", 1, 0.3, peak_gib=1.25, seconds_a_step=1.5)]
    rows += [row(30, "a_ctc", 1, 0.4, peak_gib=2.0, seconds_a_step=2.0)]
    rows += [row(30, "a_ctc", 2, 0.4, peak_gib=3.0, seconds_a_step=3.0, minutes_of_training=6.0)]
    lines = tool.table(rows, layout).splitlines()
    assert "CER below A, CTC: test, test-unseen" in lines[0]
    assert lines[2:] == [
        "| 30 min | A, CTC | 40.0 ± 0.0 | 80.0 ± 0.0 | 50.0 ± 0.0 | 80.0 ± 0.0 |  | 2 | 4.5 | 2.00 | 3.00 |",
        "| 30 min | B, CTC | 30.0 | 60.0 | 40.0 | 60.0 | 25 %, 20 % | 1 | 3.0 | 1.50 | 1.25 |",
    ]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert layout.markers == ("<!-- encoders:begin -->", "<!-- encoders:end -->")


def test_rows_that_were_searched_with_an_ngram_have_columns_of_their_own(tool: ModuleType) -> None:
    def searched(cer: float) -> dict[str, Any]:
        return row(30, "x", 1, cer)["scores"]

    rows = [row(30, "scratch", 1, 0.5, beam=searched(0.4)), row(30, "pretrain1", 1, 0.4, beam=searched(0.3))]
    lines = tool.table([*rows, row(30, "pretrain2", 1, 0.3)], tool.Layout()).splitlines()
    assert "| 6-gram: test CER % | test WER % | test-unseen CER % | CER below: test, test-unseen | seeds |" in lines[0]
    assert [line.split(" | ")[6:11] for line in lines[2:]] == [
        ["", "40.0", "80.0", "50.0", ""],
        ["20 %, 17 %", "30.0", "60.0", "40.0", "25 %, 20 %"],
        ["40 %, 33 %", "", "", "", ""],
    ]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_rows_of_earlier_calls_stay_in_the_table(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "rows/10-scratch-1").mkdir(parents=True)
    (tmp_path / "rows/10-scratch-1/result.json").write_text(json.dumps(row(10, "scratch", 1, 0.5)))
    (tmp_path / "results").mkdir()
    (tmp_path / "results/10-scratch-2.json").write_text(json.dumps(row(10, "scratch", 2, 0.7)))
    (tmp_path / "results/10-other-1.json").write_text(json.dumps(row(10, "other", 1, 0.7)))
    (tmp_path / "page.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    tool.publish(tmp_path / "rows", tmp_path / "results", [tmp_path / "page.md"], tool.Layout())
    assert "| 10 min | from scratch | 60.0 ± 14.1 |" in (tmp_path / "page.md").read_text()
    assert len(list((tmp_path / "results").iterdir())) == 3


def test_rows_of_other_machines_and_commits_are_told_apart(tool: ModuleType) -> None:
    alike = tool.origins([row(10, "scratch", 1, 0.5), row(30, "scratch", 1, 0.5)], "results")
    assert "Trained on 2 cores of A, commit abc, 10 steps, 2 rows side by side, 2026-01-02: all rows." in alike
    assert "`harken train conf.yaml seed=1`" in alike
    mixed = tool.origins([row(10, "scratch", 1, 0.5), row(30, "scratch", 1, 0.5, commit="def+changes")], "results")
    assert "commit abc, 10 steps, 2 rows side by side, 2026-01-02: 10-scratch-1." in mixed
    assert "commit def+changes, 10 steps, 2 rows side by side, 2026-01-02: 30-scratch-1." in mixed


def test_a_commit_says_when_the_code_differs_from_it(tool: ModuleType, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    assert tool.commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "README.md").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = tool.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "README.md").write_text("a table\n")  # the table itself changes no code
    (tmp_path / "egs/a/results").mkdir(parents=True)
    (tmp_path / "egs/a/results/1.json").write_text("{}")
    assert tool.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2\n")
    assert tool.commit(tmp_path) == f"{clean}+changes"


def write_row(folder: Path, tool: ModuleType, steps: int) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {steps: 10, patience: 0}\n")
    record = {"kind": "train", "step": steps, "time": 1.0, "hours": 0.25, "wall": 120.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "commands").write_text("harken train x\nharken decode y\n")
    for part in tool.SETS:
        (folder / f"{part}-score").mkdir()
        (folder / f"{part}-score/wer.json").write_text('{"wer": {"rate": 0.5}, "cer": {"rate": 0.25}}')
    tool.begin(folder, 2)


def test_a_step_takes_what_it_takes_in_most_intervals(tool: ModuleType) -> None:
    walls = {10: 5.0, 20: 10.0, 30: 60.0, 40: 65.0, 30.5: 66.0}  # one interval beside other work, and steps done twice
    records = [{"step": step, "wall": wall} for step, wall in walls.items()]
    assert tool.seconds_a_step(records) == 0.5


def test_a_row_says_where_each_of_its_sessions_ran(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "commit", lambda root: "first")
    write_row(tmp_path / "30-scratch-2", tool, steps=10)
    monkeypatch.setattr(tool, "commit", lambda root: "second+changes")
    tool.begin(tmp_path / "30-scratch-2", 1)
    assert tool.main(["finish", str(tmp_path / "30-scratch-2")]) == 0
    made = json.loads((tmp_path / "30-scratch-2/result.json").read_text())
    assert made["commit"] == "first, second+changes"
    assert made["machine"] == tool.machine()
    assert (made["minutes"], made["start"], made["seed"], made["steps"]) == (30, "scratch", 2, 10)
    assert (made["hours_of_audio"], made["minutes_of_training"]) == (0.25, 2.0)
    assert made["seconds_a_step"] == 12.0
    assert made["commands"] == ["harken train x", "harken decode y"]
    assert made["date"]


def test_a_row_whose_training_was_stopped_is_refused(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    write_row(tmp_path / "30-scratch-1", tool, steps=4)
    assert tool.main(["finish", str(tmp_path / "30-scratch-1")]) == 2
    assert "30-scratch-1 must have taken 10 steps, found 4: its training was stopped" in capsys.readouterr().err
    assert not (tmp_path / "30-scratch-1/result.json").exists()


def test_the_table_takes_finished_rows_and_needs_its_place(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    compare = tmp_path / "compare"
    compare.mkdir()
    call = ["table", str(compare), "--results", str(tmp_path / "results"), "--readme", str(tmp_path / "page.md")]
    assert tool.main(call) == 2
    assert f"no finished rows in {compare}: run the stage before first" in capsys.readouterr().err
    for name in ("10-scratch-1", "10-scratch-1.old", "10-scratch-2"):
        (compare / name).mkdir()
    for name in ("10-scratch-1", "10-scratch-1.old"):
        (compare / name / "result.json").write_text(json.dumps(row(10, "scratch", 1, 0.5)))
    (tmp_path / "page.md").write_text("no place\n")
    assert tool.main(call) == 2
    assert "page.md must hold the markers <!-- results:begin --> and <!-- results:end -->" in capsys.readouterr().err
    (tmp_path / "page.md").write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n")
    assert tool.main(call) == 0
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert page.count("| 10 min |") == 1
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["10-scratch-1.json"]
