"""egs/librilight on a miniature laid out as the original is: stretches of speech, and all stages."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from harken.config.load import load

RECIPE = Path(__file__).parents[2] / "egs" / "librilight"
SMALL = """\
frontend: {channels: 16}
encoder: {dim: 32, layers: 2, heads: 4, ffn_dim: 64, position_kernel: 8, position_groups: 4}
data: {min_seconds: 0.5, max_seconds: 15, workers: 0}
batch: {max_seconds: 16, seconds_per_step: 32}
train: {steps: 3, valid_every_steps: 3}
checkpoint: {every_steps: 3}
engine: {precision: fp32, threads: 1}
log: {every_steps: 1, tensorboard: false, peak_tflops: 1.0}
"""


@pytest.fixture(scope="module")
def prepare(load_module: Callable[[Path, str], ModuleType]) -> ModuleType:
    return load_module(RECIPE / "local/prepare.py", "librilight_prepare")


@pytest.mark.parametrize(
    ("speech", "expected"),
    [
        ([(0.0, 2.0), (2.5, 4.0)], [(0.0, 4.0)]),  # joined with the pause between them
        ([(0.0, 6.0), (6.5, 12.0)], [(0.0, 6.0), (6.5, 12.0)]),  # would be 12 s together
        ([(1.0, 26.0)], [(1.0, 9.333333), (9.333333, 17.666667), (17.666667, 26.0)]),  # divided evenly
        ([(0.0, 21.0), (21.0, 22.0)], [(0.0, 7.0), (7.0, 14.0), (14.0, 22.0)]),  # its last piece takes the next in
        ([(0.0, 5.0), (4.0, 9.0)], [(0.0, 9.0)]),  # told twice, heard once
        ([(28.0, 40.0)], [(28.0, 30.0)]),  # the file is shorter than told
        ([(3.0, 3.0)], []),
    ],
)
def test_stretches_cover_the_speech_and_stay_short(
    prepare: ModuleType, speech: list[tuple[float, float]], expected: list[tuple[float, float]]
) -> None:
    found = list(prepare.stretches(speech, 10.0, 30.0))
    assert [tuple(round(time, 6) for time in pair) for pair in found] == expected


def test_files_that_cannot_be_used_are_named(
    prepare: ModuleType, librilight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    subprocess.run(["cp", "-r", librilight, corpus], check=True)
    no_json, broken, quiet, *_ = sorted((corpus / "small").rglob("*.flac"))
    no_json.with_suffix(".json").unlink()
    broken.write_bytes(b"no audio")
    quiet.with_suffix(".json").write_text('{"speaker": "7", "voice_activity": []}')
    out = tmp_path / "data"
    call = ["--out", str(out), "--corpus", str(corpus), "--jobs", "1", "--seconds", "6"]
    assert prepare.main([*call, "--parts", "small"]) == 0
    dropped = dict(line.split("\t") for line in (out / "dropped.tsv").read_text().splitlines()[1:])
    assert dropped[str(no_json)].startswith("its .json gives no speaker and voice_activity: FileNotFoundError")
    assert dropped[str(broken)].startswith("cannot be read: ")
    assert dropped[str(quiet)] == "its voice_activity is empty"
    cuts = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len({cut["id"] for cut in cuts}) == len(cuts) > 3
    assert all(0 < cut["duration"] <= 6 for cut in cuts)
    assert {cut["custom"]["speaker"] for cut in cuts} == {"51", "52"}
    assert prepare.main([*call, "--parts", "medium"]) == 1
    told = f"{corpus}/medium must hold SPEAKER/BOOK/*.flac, and holds none: unpack medium.tar of Libri-light there"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("name", "seconds"), [("hubert_large", 7200), ("zipformer", 5200)])
def test_every_configuration_is_whole(name: str, seconds: int) -> None:
    config = load([RECIPE / f"conf/{name}.yaml"], ["data.train=t", "objective.classes=[500]"]).config
    assert config.batch.seconds_per_step == seconds


def test_what_is_missing_is_told_before_anything_runs(tmp_path: Path, run_stub: Callable[..., str]) -> None:
    told = run_stub("librilight", "--exp", tmp_path / "exp", "--stop-stage", "2", code=2)
    assert (
        "--corpus must name the folder that holds small/, medium/ and large/ of Libri-light, which nothing fetches"
        in told
    )
    places = ("--librispeech", tmp_path, "--teacher", tmp_path / "gone", "--exp", tmp_path / "exp", "--stage", "4")
    assert f"{tmp_path}/dev-other.jsonl is not there: run stages 2 and 3" in run_stub("librilight", *places, code=2)
    (tmp_path / "dev-other.jsonl").touch()
    assert f"{tmp_path}/train-960h.jsonl is not there: run stages 2 and 3" in run_stub("librilight", *places, code=2)
    (tmp_path / "train-960h.jsonl").touch()
    assert f"no teacher at {tmp_path}/gone: run egs/librispeech/run.sh" in run_stub("librilight", *places, code=2)
    assert not (tmp_path / "exp").exists()


@pytest.mark.slow
def test_every_stage_runs_on_the_miniature(
    corpus, librilight: Path, tmp_path: Path, python: Path, run_recipe: Callable[..., str]
) -> None:
    conf, teacher, exp, data = (tmp_path / name for name in ("small.yaml", "teacher", "exp", "data"))
    conf.write_text(SMALL)
    labelled = tmp_path / "librispeech"
    labelled.mkdir()
    (labelled / "train-960h.jsonl").write_bytes(corpus.train.read_bytes())
    (labelled / "dev-other.jsonl").write_bytes(corpus.valid.read_bytes())
    base = corpus.yaml(tmp_path, "hubert", "waveform")
    train = ["-m", "harken.apps.main", "train", str(base), "--exp", str(teacher), "train.steps=1"]
    subprocess.run([str(python), *train], check=True, capture_output=True)
    printed = run_recipe(
        "librilight", "--corpus", librilight, "--parts", "small", "--seconds", "6", "--data", data, "--exp", exp,
        "--teacher", teacher, "--layer", "1", "--clusters", "8", "--max-frames", "20000", "--jobs", "1",
        "--librispeech", labelled, "--shard-cuts", "6", "--conf", conf,
    )  # fmt: skip
    assert "== stages 1 to 7 finished" in printed
    shards = sorted(path.name for path in (data / "shar").glob("cuts.*.jsonl.gz"))
    cuts = json.loads((data / "summary.json").read_text())["cuts"]
    assert len(shards) == -(-cuts // 6) > 1
    log = (exp / "logs/6-pretrain-hubert_large.log").read_text()
    assert f"{len(shards)} shards (Lhotse Shar) for 1 readers" in log
    assert (exp / "hubert_large/checkpoints").is_dir()
    assert (exp / "report.html").is_file()
