"""egs/librispeech on a miniature laid out as the original is: preparation, every configuration, and all stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from harken.config.load import load

RECIPE = Path(__file__).parents[2] / "egs" / "librispeech"
LABELS = ("10min", "1h", "10h", "100h", "960h")
OBJECTIVES = ("ctc", "transducer")
TESTS = ("dev-clean", "dev-other", "test-clean", "test-other")
# what makes every training a matter of seconds; everything else is as published
SMALL = """\
frontend: {channels: 16}
data: {min_seconds: 0.5, max_seconds: 15, workers: 0}
batch: {max_seconds: 16, seconds_per_step: 32}
train: {steps: 3, valid_every_steps: 3}
checkpoint: {every_steps: 3}
engine: {precision: fp32, threads: 1}
log: {every_steps: 1, tensorboard: false, peak_tflops: 1.0}
"""
HUBERT = SMALL + "encoder: {dim: 32, layers: 2, heads: 4, ffn_dim: 64, position_kernel: 8, position_groups: 4}\n"
ZIPFORMER = """\
encoder:
  {downsampling: [1, 2], layers: [1], dims: [32, 48], unmasked_dims: [32], ffn_dims: [64], heads: [4], kernels: [15, 7]}
"""


@pytest.fixture(scope="module")
def prepare(load_module: Callable[[Path, str], ModuleType]) -> ModuleType:
    return load_module(RECIPE / "local/prepare.py", "librispeech_prepare")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_list_holds_the_utterances_of_its_folders(prepare: ModuleType, librispeech: Path, tmp_path: Path) -> None:
    assert prepare.main(["--out", str(tmp_path), "--corpus", str(librispeech), "--jobs", "1"]) == 0
    ids = {path.stem: [line["id"] for line in lines(path)] for path in tmp_path.glob("*.jsonl")}
    assert sorted(ids) == sorted([*TESTS, *(f"train-{label}" for label in LABELS)])
    flac = {part: {path.stem for path in (librispeech / part).rglob("*.flac")} for part in (
        "LibriSpeech/train-clean-100", "LibriSpeech/train-clean-360", "LibriSpeech/train-other-500",
        "LibriSpeech/dev-other", "librispeech_finetuning/1h/0", "librispeech_finetuning/1h",
        "librispeech_finetuning",
    )}  # fmt: skip
    corpus = [flac[f"LibriSpeech/train-{part}"] for part in ("clean-100", "clean-360", "other-500")]
    assert set(ids["train-960h"]) == set.union(*corpus)
    assert {name: len(found) for name, found in ids.items() if name.startswith("train")} == {
        "train-960h": 52,
        "train-100h": 24,
        "train-10h": 30,
        "train-1h": 24,
        "train-10min": 4,
    }
    assert set(ids["train-100h"]) == corpus[0]
    assert set(ids["dev-other"]) == flac["LibriSpeech/dev-other"]
    assert set(ids["train-10min"]) == flac["librispeech_finetuning/1h/0"] < set(ids["train-1h"])
    assert set(ids["train-1h"]) == flac["librispeech_finetuning/1h"] < set(ids["train-10h"])
    assert set(ids["train-10h"]) == flac["librispeech_finetuning"]
    first = lines(tmp_path / "dev-other.jsonl")[0]
    told = first["supervisions"][0]  # type: ignore[index]
    speaker, chapter, _ = str(first["id"]).split("-")
    written = librispeech / f"LibriSpeech/dev-other/{speaker}/{chapter}/{speaker}-{chapter}.trans.txt"
    assert f"{first['id']} {told['text']}\n" in written.read_text()
    assert told["speaker"] == speaker


def test_without_the_labelled_sets_it_says_so_and_the_recipe_asks_for_them(
    prepare: ModuleType,
    librispeech: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run_stub: Callable[..., str],
) -> None:
    data = tmp_path / "data"
    alone = tmp_path / "alone/LibriSpeech"
    shutil.copytree(librispeech / "LibriSpeech", alone)
    assert prepare.main(["--out", str(data), "--corpus", str(alone), "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"no librispeech_finetuning beside {alone}: the sets of 10 min, 1 h and 10 h are left out. --finetuning"
        in printed
    )
    assert sorted(path.stem for path in data.glob("train*.jsonl")) == ["train-100h", "train-960h"]
    told = run_stub("librispeech", "--data", data, "--exp", tmp_path / "exp", "--stage", "8", code=2)
    assert f"--labels asks for {data}/train-10min.jsonl, which is not there: run stage 2 with --finetuning DIR" in told


def test_a_corpus_that_is_not_whole_is_refused(
    prepare: ModuleType, librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora = tmp_path / "corpora"
    shutil.copytree(librispeech, corpora)
    call = ["--out", str(tmp_path / "data"), "--corpus", str(corpora), "--jobs", "1"]
    gone = next((corpora / "LibriSpeech/dev-clean").rglob("*.flac"))
    sound = gone.read_bytes()
    gone.unlink()
    assert prepare.main(call) == 1
    assert (
        f"1 of 4 transcripts in {corpora}/LibriSpeech/dev-clean have no audio, the first {gone}"
        in capsys.readouterr().err
    )
    gone.write_bytes(sound)
    shutil.rmtree(corpora / "librispeech_finetuning/9h/other")
    assert prepare.main(call) == 1
    assert "each with clean and other, and lacks 9h/other: unpack" in capsys.readouterr().err
    shutil.rmtree(corpora / "LibriSpeech/test-other")
    assert prepare.main(call) == 1
    assert "must hold the seven splits of LibriSpeech, and lacks test-other: unpack them" in capsys.readouterr().err
    assert not list((tmp_path / "data").glob("*.jsonl"))


def test_training_speech_that_is_tested_on_is_refused(
    prepare: ModuleType, librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora = tmp_path / "corpora"
    shutil.copytree(librispeech, corpora)
    speaker = next((corpora / "LibriSpeech/test-clean").iterdir())
    shutil.copytree(speaker, corpora / "librispeech_finetuning/1h/3/clean" / speaker.name)
    assert prepare.main(["--out", str(tmp_path / "data"), "--corpus", str(corpora), "--jobs", "1"]) == 1
    assert (
        "train-1h must share no utterance with dev-clean, dev-other, test-clean, test-other, and"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["hubert", "zipformer", "hubert_large"])
def test_every_fine_tuning_configuration_is_whole(method: str, objective: str, label: str) -> None:
    conf = RECIPE / "conf"
    files = [conf / method / "finetune.yaml", conf / f"{objective}.yaml", conf / method / f"{label}.yaml"]
    loaded = load(files, ["data.train=t", "objective.tokenizer=t"])
    config = loaded.config
    assert config.objective.name == objective
    assert loaded.origin["train.steps"] == str(files[2])
    assert loaded.origin["objective.mask_probability"].startswith(str(conf / method))
    if method == "zipformer":  # the schedules of the model count steps of 600 s, those of the rate hours of audio
        seconds = config.batch.seconds_per_step
        assert config.encoder.schedule_scale == pytest.approx(seconds / 600, rel=1e-3)  # type: ignore[attr-defined]
        share = config.schedule.lr_hours * 3600 / seconds / config.train.steps  # type: ignore[attr-defined]
        assert 0.2 < share < 0.55


@pytest.mark.parametrize("name", ["hubert/iteration1", "hubert/pretrain", "zipformer/pretrain"])
def test_every_pretraining_configuration_is_whole(name: str) -> None:
    config = load([RECIPE / f"conf/{name}.yaml"], ["data.train=t", "objective.classes=[500]"]).config
    assert config.batch.seconds_per_step == 2800
    assert config.train.steps == {"hubert/iteration1": 250000, "hubert/pretrain": 400000}.get(name, 493000)


def test_mistakes_are_told_before_anything_runs(tmp_path: Path, run_stub: Callable[..., str]) -> None:
    for arguments, told in {
        ("--mode", "short"): "--mode has only full here: --conf FILE makes every training smaller, got 'short'",
        ("--method", "wavlm"): "--method must be hubert, zipformer or hubert_large, got 'wavlm'",
        ("--method", "hubert_large"): "--method hubert_large fine-tunes a model that --pretrained DIR names",
        ("--objectives", "ctc rnnt"): "--objectives are ctc and transducer, got 'rnnt'",
        ("--labels", "10min 2h"): "--labels are 10min, 1h, 10h, 100h and 960h, got '2h'",
        ("--layer", "six"): "--layer must be a whole number, got 'six'",
        ("--pretrained", "nowhere"): "--pretrained must be a folder of a model, found none at nowhere",
    }.items():
        assert told in run_stub("librispeech", *arguments, "--exp", tmp_path / "exp", code=2)
    assert not (tmp_path / "exp").exists()


@pytest.mark.slow
def test_every_stage_runs_on_the_miniature(librispeech: Path, tmp_path: Path, run_recipe: Callable[..., str]) -> None:
    hubert, zipformer = tmp_path / "hubert.yaml", tmp_path / "zipformer.yaml"
    hubert.write_text(HUBERT)
    zipformer.write_text(SMALL + ZIPFORMER)
    exp, data = tmp_path / "exp", tmp_path / "data"
    sizes = ("--clusters1", "8", "--clusters2", "12", "--layer", "1", "--bpe", "60", "--max-frames", "20000")
    shared = ("--corpus", librispeech, "--data", data, "--exp", exp, "--jobs", "1", *sizes)

    printed = run_recipe("librispeech", *shared, "--conf", hubert)
    assert "== stages 1 to 10 finished" in printed
    # every amount and objective was trained on its own labels, from the second iteration, and decoded by both searches
    for objective in OBJECTIVES:
        for label in LABELS:
            name = f"hubert-{objective}-{label}"
            commands = (exp / f"stages/8-{name}.commands").read_text()
            assert f"data.train={data}/train-{label}.jsonl" in commands
            assert f"train.init_from={exp}/hubert " in commands
            for search in ("greedy", "beam"):
                scores = sorted((exp / "decode" / f"{name}-{search}").glob("*-score/wer.json"))
                assert [path.parent.name for path in scores] == [f"{test}-score" for test in TESTS]
                assert all(json.loads(path.read_text())["wer"]["ref"] > 0 for path in scores)
    assert json.loads((exp / "units1/labels/card.json").read_text())["clusters"] == 8
    assert json.loads((exp / "units2/labels/card.json").read_text())["clusters"] == 12
    assert "hubert-transducer-960h" in (exp / "report.html").read_text()

    again = run_recipe("librispeech", *shared, "--conf", hubert)
    assert "runs again" not in again
    assert again.count("skipped") >= 2 * (7 + 10 + 21 + 1)  # where it stands, and in the table at the end

    few = ("--conf", zipformer, "--method", "zipformer", "--labels", "10min", "--stage", "7", "--stop-stage", "9")
    printed = run_recipe("librispeech", *shared, *few)
    assert f"reads:   {data}/train-960h.jsonl {exp}/units2/labels/" in printed
    for objective in OBJECTIVES:
        assert (exp / f"decode/zipformer-{objective}-10min-beam/test-other-score/wer.json").is_file()
