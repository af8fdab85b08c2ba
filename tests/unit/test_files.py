"""Writes are whole or absent, and nothing that the user put somewhere is written over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harken.apps.main import main
from harken.config.saved import CHECKSUMS, checksums, find_model, save_model
from harken.core.errors import HarkenError
from harken.core.files import atomic_folder, atomic_path, check_replaceable, write_text_atomic
from harken.data.index import build_index
from harken.objectives.saved import build_objective
from harken.train.checkpoint import Checkpoints

FILES = ("card.json", "values.npy")


def write(folder: Path, text: str) -> None:
    with atomic_folder(folder, kind="clusterer", files=FILES) as temporary:
        for name in FILES:
            (temporary / name).write_text(text)


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its contents, hidden and temporary ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_replaces_nothing_an_empty_one_and_one_of_its_kind(tmp_path: Path) -> None:
    write(tmp_path / "a/b", "1")
    write(tmp_path / "a/b", "2")
    assert tree(tmp_path) == {"a/b/card.json": b"2", "a/b/values.npy": b"2"}
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "3")
    assert (tmp_path / "empty/card.json").read_text() == "3"


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (["thesis.tex"], r"holds `thesis\.tex`"),
        (["card.json", "values.npy", "thesis.tex"], r"holds `thesis\.tex`"),
        (["a", "b", "c", "d"], "holds `a`, `b`, `c` and 1 more"),
        (["card.json"], r"lacks `values\.npy`"),
    ],
)
def test_any_other_folder_is_left_as_it_is(tmp_path: Path, there: list[str], why: str) -> None:
    (tmp_path / "mine").mkdir()
    for name in there:
        (tmp_path / "mine" / name).write_text("precious")
    before = tree(tmp_path)
    message = rf"mine exists already and {why}, so it is no clusterer that may be replaced; nothing was changed: name"
    with pytest.raises(HarkenError, match=message):
        write(tmp_path / "mine", "2")
    assert tree(tmp_path) == before


def test_what_is_put_there_during_the_work_is_left_too(tmp_path: Path) -> None:
    def work() -> None:
        with atomic_folder(tmp_path / "new", kind="clusterer", files=FILES) as temporary:
            (temporary / "card.json").write_text("1")
            (tmp_path / "new").mkdir()
            (tmp_path / "new/thesis.tex").write_text("precious")

    with pytest.raises(HarkenError, match=r"holds `thesis\.tex`"):
        work()
    assert tree(tmp_path) == {"new/thesis.tex": b"precious"}


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    with (
        pytest.raises(ZeroDivisionError),
        atomic_folder(tmp_path / "a", kind="clusterer", files=FILES) as temporary,
    ):
        (temporary / "card.json").write_text(str(1 / 0))
    assert tree(tmp_path) == {"a/card.json": b"1", "a/values.npy": b"1"}


def test_files_and_folders_do_not_take_each_other_s_place(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(HarkenError, match="folder is a folder and cannot be written as a file: name a file in it"):
        write_text_atomic(tmp_path / "folder", "x")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(HarkenError, match=r"file is a file where a folder \(clusterer\) is to be written"):
        write(tmp_path / "file", "x")
    with (
        pytest.raises(HarkenError, match=r"cannot write .*file/below: File exists: .*file"),
        atomic_path(tmp_path / "file/below"),
    ):
        pass
    assert tree(tmp_path) == {"file": b"precious"}
    check_replaceable(tmp_path / "folder", kind="clusterer")


# Every verb and function that writes a folder


@pytest.fixture
def models(corpus, tmp_path: Path) -> Path:
    """An experiment of two checkpoints whose weights are 1 and 3, with files of its own beside them."""
    run = tmp_path / "exp/ft"
    config = corpus.config("hubert", "filterbank")
    weights = build_objective(config).state_dict()
    for step in (1, 2):
        folder = run / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        save_model(folder, config, {name: torch.full_like(value, 2 * step - 1) for name, value in weights.items()})
        (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))
    (run / "metrics.jsonl").write_text("precious")
    return run


def test_what_a_user_calls_a_checkpoint_is_not_the_newest(models: Path, tmp_path: Path) -> None:
    root = models / "checkpoints"
    shutil.copytree(root / "step-00000001", root / "step-best")
    assert find_model(models) == root / "step-00000002"
    assert main(["average", str(models), "--last", "1", "--out", str(tmp_path / "mean")]) == 0
    assert all(bool((value == 3).all()) for value in load_file(tmp_path / "mean/model.safetensors").values())


def test_average_writes_a_model_and_replaces_its_own_only(models: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "mean"
    assert main(["average", str(models), "--out", str(out)]) == 0
    assert all(bool((value == 2).all()) for value in load_file(out / "model.safetensors").values())
    assert main(["average", str(models), "--last", "1", "--out", str(out)]) == 0
    assert all(bool((value == 3).all()) for value in load_file(out / "model.safetensors").values())
    (source,) = json.loads((out / "averaged.json").read_text())["models"]
    assert source["model"] == str(models / "checkpoints/step-00000002")
    before = tree(models)
    for target, found in ((models, "checkpoints"), (models / "checkpoints", "step-00000001")):
        assert main(["average", str(models), "--out", str(target)]) == 2
        assert f"{target} exists already and holds `{found}`" in capsys.readouterr().err
    assert main(["average", str(models), "--out", str(models / "checkpoints/step-00000001")]) == 2
    assert "holds `checksums.json`, so it is no averaged model that may be replaced" in capsys.readouterr().err
    assert tree(models) == before


def test_average_says_what_last_may_be(models: Path, tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "mean")]
    assert main(["average", str(models), "--last", "-1", *out]) == 2
    assert "`--last` must be 0 (all) or a number of checkpoints, got -1" in capsys.readouterr().err
    assert main(["average", str(models / "checkpoints/step-00000001"), "--last", "1", *out]) == 2
    assert "`--last` takes checkpoints of one experiment" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


def test_fit_leaves_a_folder_of_the_user_s(corpus, tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "card.json").write_text("precious")
    before = tree(tmp_path)
    assert main(["units", "fit", str(corpus.train), "--out", str(tmp_path), "--clusters", "4"]) == 2
    out, error = capsys.readouterr()
    assert f"{tmp_path} exists already and holds `thesis.tex`, so it is no clusterer that may be replaced" in error
    assert out == "", "it is told before the work"
    assert tree(tmp_path) == before
    assert main(["units", "fit", str(corpus.train), "--out", str(corpus.labels), "--clusters", "4"]) == 2
    assert "holds `ids.txt`, `index.npy`, `labels.bin` and 3 more" in capsys.readouterr().err


def test_an_index_leaves_a_folder_of_the_user_s(tmp_path: Path) -> None:
    manifest = tmp_path / "train.jsonl"
    manifest.write_text('{"id": "a", "duration": 1.0}\n')
    assert build_index(manifest) == 1
    assert build_index(manifest) == 1
    (tmp_path / "train.jsonl.idx/thesis.tex").write_text("precious")
    with pytest.raises(HarkenError, match=r"holds `thesis\.tex`, so it is no index of a manifest that may be replaced"):
        build_index(manifest)
    assert (tmp_path / "train.jsonl.idx/thesis.tex").read_text() == "precious"


@pytest.fixture
def save(corpus, tmp_path: Path) -> Callable[[int], None]:
    """Save the checkpoint of a step, without an engine's state; the newest two are kept."""
    from harken.engine.state import OptimizerState, Snapshot
    from harken.train.state import TrainState

    config = corpus.config("hubert", "filterbank", "checkpoint.keep_last=2")

    class NoEngine:
        def snapshot(self) -> Snapshot:
            return Snapshot({"a": torch.zeros(1)}, OptimizerState("none", {}, {}, {}, {}, {}))

    checkpoints = Checkpoints(tmp_path, config)

    def save_and_wait(step: int) -> None:
        checkpoints.save(NoEngine(), TrainState(step=step), None)  # type: ignore[arg-type]
        checkpoints.wait()

    return save_and_wait


def test_pruning_leaves_what_the_user_put_among_the_checkpoints(save, tmp_path: Path, capsys) -> None:
    root = tmp_path / "checkpoints"
    save(1)
    (root / "step-00000001/decode").mkdir()
    (root / "step-00000001/decode/test.jsonl").write_text("precious")
    (root / "step-mine").mkdir()
    for step in (2, 3, 4):
        save(step)
    kept = ["best.json", "step-00000001", "step-00000003", "step-00000004", "step-mine"]
    assert sorted(path.name for path in root.iterdir()) == kept
    assert "step-00000001 is kept: `decode` in it is none of harken's" in capsys.readouterr().out


def test_a_step_saved_anew_leaves_what_the_user_put_into_the_old(save, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(1)
    (root / "step-00000001/notes.txt").write_text("precious")
    save(1)
    (kept,) = root.glob("kept-step-00000001-*")
    assert (kept / "notes.txt").read_text() == "precious"
    assert not (root / "step-00000001/notes.txt").exists()
