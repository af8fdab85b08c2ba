"""The report page: made from an experiment written by harken's own parts, and read as a browser would."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from harken.apps.main import main
from harken.config.load import from_dict, to_yaml
from harken.config.saved import CHECKSUMS, checksums, load_config, save_model
from harken.config.schema import DataConfig
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec, Window
from harken.data.tokens import Characters
from harken.evaluate.ctc_model import CtcModel, load_ctc
from harken.evaluate.hypotheses import Utterance, write_hypotheses
from harken.objectives.saved import build_objective
from harken.report.collect import collect
from harken.report.metrics import Curve, read_metrics, smooth, thin
from harken.report.page import number, percent, wall
from harken.report.plots import curves
from harken.report.utterances import show_utterances
from harken.train.log import RunLog
from harken.units.clusterer import fit_clusterer
from harken.units.features import Mfcc
from harken.units.kmeans import KMeansConfig
from harken.units.label import Job, label

ROOT = Path(__file__).resolve().parents[2]
RATE = 16000
TEXTS = ("we are going to the river", "the queen is here", "where are we", "no we are not", "he went in there")
DASH = "\N{EN DASH}"
VOID = {"meta", "link", "br", "img", "hr", "input"}


def write_audio(folder: Path) -> str:
    """Write five utterances of noise bursts and their manifest; return its path."""
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.serialization import save_to_jsonl

    rng = np.random.default_rng(0)
    cuts = []
    for place, text in enumerate(TEXTS):
        seconds = 2.1 + 0.3 * place
        envelope = np.repeat(rng.random(16), math.ceil(seconds * RATE / 16))[: int(seconds * RATE)]
        path = folder / f"u{place}.wav"
        soundfile.write(path, 0.2 * envelope * rng.standard_normal(len(envelope)), RATE)
        recording = Recording.from_file(path)
        name, length = f"u{place}", recording.duration
        said = SupervisionSegment(name, name, 0.0, length, text=text, speaker=("<b>JOE", "FAYE")[place % 2])
        cuts.append(MonoCut(name, 0.0, length, 0, supervisions=[said], recording=recording))
    save_to_jsonl([cut.to_dict() for cut in cuts], folder / "dev.jsonl")
    return str(folder / "dev.jsonl")


def run_config(folder: Path, manifest: str, objective: dict):
    return from_dict(
        {
            "frontend": {"name": "filterbank", "sample_rate": RATE, "bands": 40, "channels": 16},
            "encoder": {"name": "transformer", "dim": 32, "layers": 1, "heads": 2, "ffn_dim": 32},
            "objective": objective,
            "optimizer": {"name": "adamw"},
            "schedule": {"name": "constant", "rate": 1e-3},
            "data": {"train": manifest, "valid": manifest, "labels": [str(folder / "units1/labels")]},
            "batch": {"max_seconds": 30.0, "seconds_per_step": 30.0},
            "train": {"steps": 40},
        }
    )


def write_run(folder: Path, config, metrics: dict[str, float]) -> None:
    """Write what a run of 40 steps leaves behind, with fresh weights."""
    torch.manual_seed(0)
    checkpoint = folder / "checkpoints/step-00000040"
    checkpoint.mkdir(parents=True)
    save_model(checkpoint, config, build_objective(config).state_dict())
    (checkpoint / "versions.json").write_text(json.dumps({"harken": "0.0.7", "torch": "9.8.7"}))
    (checkpoint / CHECKSUMS).write_text(json.dumps(checksums(checkpoint)))
    (folder / "config.yaml").write_text(to_yaml(config))
    speed = {"audio_seconds_per_second": 50.0, "padding_percent": 4.0, "data_wait_percent": 1.0, "mfu_percent": 20.0}
    log = RunLog(folder, total_steps=40, tensorboard=False, samples=False, start_step=0)
    for step in range(10, 41, 10):
        figures = {name: value / step for name, value in metrics.items()}
        log.write("train", step, {**figures, **speed, "memory_gib": 0.5}, epoch=0, hours=step / 100, wall=step * 30.0)
    log.write("valid", 40, {name: value / 50 for name, value in metrics.items()})
    log.close()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    audio, folder = tmp_path_factory.mktemp("audio"), tmp_path_factory.mktemp("trial")
    manifest = write_audio(audio)
    Characters.train(TEXTS).save(audio / "tokens.txt")
    features = Mfcc()
    settings = KMeansConfig(clusters=8)
    fit_clusterer(
        folder / "units1/km",
        manifest,
        features,
        DataConfig(train=manifest, workers=0),
        settings,
        max_frames=10**6,
        say=str,
    )
    label(Job(folder / "units1/labels", (manifest,), str(folder / "units1/km"), Mfcc, RATE, 60.0), 1, str)
    ctc = run_config(folder, manifest, {"name": "ctc", "tokenizer": str(audio / "tokens.txt")})
    write_run(folder / "finetune", ctc, {"loss": 80.0, "blank_share": 9.0, "gradient_norm": 3.0, "learning_rate": 1.0})
    hubert = run_config(folder, manifest, {"name": "hubert", "classes": [8], "code_dim": 16})
    write_run(folder / "pretrain1", hubert, {"loss": 90.0, "loss_unmasked": 70.0, "accuracy_masked": 1.0})
    heard = ["we are going in the river", "the queen is <i>here</i>", "where are we", "we not", "he went in there now"]
    rows = [
        Utterance(id=f"u{place}", speaker=("<b>JOE", "FAYE")[place % 2], ref=ref, hyp=hyp, seconds=2.1 + 0.3 * place)
        for place, (ref, hyp) in enumerate(zip(TEXTS, heard, strict=True))
    ]
    write_hypotheses(folder / "decode/test.jsonl", rows)
    assert main(["score", str(folder / "decode/test.jsonl")]) == 0
    (folder / "stages").mkdir()
    marker = 'write_marker "$1/stages/8-finetune.done" abc 3723 "$1/finetune"'
    note = (
        'stage_commands="$1/stages/8-finetune.commands"; note_command harken train "$1/a b" "data.labels=[x]" --exp y'
    )
    script = f'. "{ROOT}/egs/shared/stages.sh"; {marker}; {note}'
    subprocess.run(["bash", "-euc", f"exp=$1 force=0 last_stage=9; {script}", "_", folder], check=True)
    (folder / "logs").mkdir()
    (folder / "logs/9-decode.log").write_text("still going\n")
    return folder


@pytest.fixture(scope="module")
def page(experiment: Path) -> str:
    assert main(["report", str(experiment)]) == 0
    return (experiment / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects ids, references and the text of each section; fails where tags do not pair."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.texts: dict[str, str] = {}
        self.open: list[str] = []
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in {"src", "href", "xlink:href", "srcset", "data", "action"}:
                self.references.append(value)
        self.section = dict(attrs).get("id", self.section) if tag == "section" else self.section

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts[self.section] = " ".join(f"{self.texts.get(self.section, '')} {data}".split())


def test_the_page_refers_to_nothing_outside_and_is_well_formed(page: str) -> None:
    reader = Reader(page)
    assert reader.references
    assert [one for one in reader.references if not one.startswith(("#", "data:"))] == []
    assert [one for one in re.findall(r"url\(([^)]*)\)", page) if not one.startswith("#")] == []
    assert "@import" not in page
    assert "<script" not in page
    assert [name for name, times in Counter(reader.ids).items() if times > 1] == []
    inside = {one[1:] for one in reader.references if one.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert inside <= set(reader.ids), "a reference within the page must lead somewhere"


def test_the_page_shows_every_part_of_the_experiment(experiment: Path, page: str) -> None:
    texts = Reader(page).texts
    score = json.loads((experiment / "decode/test-score/wer.json").read_text())
    low, high = score["wer"]["ci95"]
    interval = f"({100 * low:.1f} {DASH} {100 * high:.1f})"
    assert f"test {100 * score['wer']['rate']:.1f} {interval}" in texts["results"]
    assert "finetune ctc 40 0.4 h 20.0 min 2.000 loss 1.600 (40) 50 4.0 1.0 20.0 0.50" in texts["runs"]
    assert "accuracy (%)" in texts["runs"]
    assert "waiting for data (% of time)" in texts["speed"]
    assert "mfcc39 16000 Hz: 8 of 8 units used" in texts["units"]
    assert "one actor may play several" in texts["speakers"]
    assert "<b>JOE 3" in texts["speakers"]
    assert "8 finetune 1 h 02 min" in texts["stages"]
    assert f"9 decode {DASH} not finished" in texts["stages"]
    assert f"harken train '{experiment}/a b' 'data.labels=[x]' --exp y" in texts["commands"]
    assert "mask_probability" in texts["configuration"]
    assert "torch" in texts["versions"]
    assert "9.8.7" in texts["versions"]
    assert len(re.findall(r"<h3>u\d, ", page)) == 3
    assert 'class="missing"' not in page


def test_text_of_the_data_is_never_markup(page: str) -> None:
    assert "&lt;b&gt;JOE" in page
    assert "<b>JOE" not in page
    assert "<i>" not in page


def test_figures_take_the_colours_of_the_page(experiment: Path) -> None:
    (run,) = [run for run in collect(experiment).runs if run.name == "finetune"]
    svg = curves(run)
    assert "var(--s0)" in svg
    assert "var(--ink)" in svg
    assert re.findall(r"#(?:0a0b0[cd]|0072b2|d55e00)", svg) == []
    assert svg == curves(run), "the same run must give the same figure"


def test_hypotheses_are_aligned_and_a_text_outside_the_alphabet_has_no_times(experiment: Path, page: str) -> None:
    model, run = load_ctc(experiment / "finetune")
    found = collect(experiment)
    views, how = show_utterances(model, [str(run.data.valid)], found.hypotheses, found.stores, 5)
    assert "5 decoded utterances" in how
    assert [view.words.rate for view in views] == sorted(view.words.rate for view in views)
    for view in views:
        np.testing.assert_allclose(view.probabilities.sum(axis=1), 1.0, atol=1e-5)
        assert len(view.ref_times) == len(view.ref.split())
        flat = [edge for span in view.ref_times for edge in span]
        assert flat == sorted(flat)
        assert flat[0] >= 0
        assert flat[-1] <= view.seconds
        (row,) = view.units
        assert len(row.edges) == len(row.values) + 1
        assert row.edges[-1] <= view.seconds + 0.01
    (odd,) = [view for view in views if "<i>" in view.hyp]
    assert odd.hyp_times == []
    assert "no times" in page


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_words_stand_where_they_are_said_whatever_the_outputs_of_a_frame(tmp_path: Path, outputs: int) -> None:
    """A model that hears loudness: of its frames of 1200 samples, each output sees a share, without overlap."""
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.serialization import save_to_jsonl

    spoken = [(0.6, 0.9), (1.2, 1.8), (2.25, 2.7)]
    wave = np.zeros(3 * RATE)
    for start, end in spoken:
        wave[round(start * RATE) : round(end * RATE)] = 0.5
    soundfile.write(tmp_path / "a.wav", wave, RATE)
    recording = Recording.from_file(tmp_path / "a.wav")
    said = SupervisionSegment("a", "a", 0.0, 3.0, text="a a a")
    cut = MonoCut("a", 0.0, 3.0, 0, supervisions=[said], recording=recording)
    save_to_jsonl([cut.to_dict()], tmp_path / "dev.jsonl")
    spec = FrameSpec((Window(1200, 1200),), RATE)

    def log_probs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        loud = batch.inputs.unflatten(1, (-1, 1200 // outputs)).abs().mean(-1) > 0.2
        found = torch.stack([~loud, loud, ~loud], dim=-1).float() * 20
        return found.log_softmax(-1), spec.num_frames(batch.lengths) * outputs

    tokenizer = Characters(["a", " "])
    model = CtcModel(name="m", log_probs=log_probs, spec=spec, tokenizer=tokenizer, outputs_per_frame=outputs)
    ((view,), _) = show_utterances(model, [str(tmp_path / "dev.jsonl")], [], [], 1)
    assert np.array(view.ref_times) == pytest.approx(np.array(spoken), abs=1e-3)
    half = view.output_seconds / 2
    assert (view.output_times[0] - half, view.output_times[-1] + half) == pytest.approx((0.0, 3.0), abs=1e-3)


def test_outputs_of_a_model_with_two_a_frame_span_the_audio(experiment: Path, tmp_path: Path) -> None:
    views = {}
    for factor in (1, 2):
        plain, run = load_ctc(experiment / "finetune")
        (source,) = (experiment / "finetune/checkpoints").glob("step-*")
        config = load_config(source)
        config = replace(config, objective=replace(config.objective, head_upsampling=factor))
        (tmp_path / str(factor)).mkdir()
        save_model(tmp_path / str(factor), config, build_objective(config).state_dict())
        model, _ = load_ctc(tmp_path / str(factor))
        assert model.spec == plain.spec
        (views[factor],), _ = show_utterances(model, [str(run.data.valid)], [], [], 1)
    one, two = views[1], views[2]
    assert len(two.output_times) == 2 * len(one.output_times)
    assert two.output_times.reshape(-1, 2).mean(1) == pytest.approx(one.output_times)
    assert two.output_times[-1] < two.seconds
    assert two.ref_times[-1][1] <= two.seconds


def test_utterances_without_hypotheses_are_decoded(experiment: Path, tmp_path: Path) -> None:
    run = tmp_path / "alone"
    run.symlink_to(experiment / "finetune")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html"), "--utterances", "2"]) == 0
    texts = Reader((tmp_path / "page.html").read_text(encoding="utf-8")).texts
    assert "2" in texts["utterances"]
    assert texts["utterances"].count("hypothesis from greedy search") == 2
    assert "5 utterances ordered by duration" in texts["utterances"]


def test_each_missing_piece_has_a_line_and_a_command(experiment: Path, tmp_path: Path, capsys) -> None:
    log = RunLog(tmp_path, total_steps=9, tensorboard=False, samples=False, start_step=0)
    log.write("train", 5, {"loss": 1.0}, epoch=0, hours=0.1, wall=9.0)
    log.close()
    assert main(["report", str(tmp_path)]) == 0
    texts = Reader((tmp_path / "report.html").read_text(encoding="utf-8")).texts
    assert f"has no config.yaml. Make it: harken train CONFIG --exp {tmp_path}" in texts["runs"]
    assert "no label store" in texts["units"]
    assert "harken units label" in texts["units"]
    assert "no scored test set" in texts["results"]
    assert "harken decode" in texts["results"]
    assert "harken score" in texts["speakers"]
    assert "no CTC run" in texts["utterances"]
    assert "run.sh" in texts["stages"]
    assert "missing: no label store" in capsys.readouterr().out


def test_a_damaged_piece_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    store = tmp_path / "units1/labels"
    store.mkdir(parents=True)
    (store / "card.json").write_text('{"clusters": 3}')
    (tmp_path / "decode/test-score").mkdir(parents=True)
    (tmp_path / "decode/test-score/wer.json").write_text('{"wer": {}}')
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/1-check.done").write_text("hash=1\nseconds=2\n")
    assert main(["report", str(tmp_path)]) == 0
    texts = Reader((tmp_path / "report.html").read_text(encoding="utf-8")).texts
    assert f"label store {store} cannot be shown" in texts["units"]
    assert "wer.json is not a score" in texts["results"]
    assert "1 check 2 s" in texts["stages"]


def test_what_a_forced_run_put_aside_is_left_out(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "finetune").symlink_to(experiment / "finetune")
    (tmp_path / "finetune.old").symlink_to(experiment / "finetune")
    assert [run.name for run in collect(tmp_path).runs] == ["finetune"]


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_an_experiment_is_an_error(tmp_path: Path, capsys, make: bool) -> None:
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    with pytest.raises(HarkenError, match="expected"):
        collect(folder)
    assert main(["report", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err


def test_an_option_that_cannot_be_followed_is_an_error(experiment: Path, tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "page.html")]
    assert main(["report", str(experiment), *out, "--model", str(experiment / "pretrain1")]) == 2
    assert "was trained with `hubert`" in capsys.readouterr().err
    assert main(["report", str(experiment), *out, "--cuts", str(tmp_path / "no.jsonl")]) == 2
    assert "no manifest at" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def record(kind: str, step: int, **more: float) -> str:
    hours = {"hours": step / 10} if kind == "train" else {}
    return json.dumps({"kind": kind, "step": step, "time": float(step), **hours, **more})


def test_records_of_a_continued_run_replace_those_it_took_back(tmp_path: Path) -> None:
    first = [record("train", 10, loss=5.0), record("valid", 15, loss=4.5), record("train", 20, loss=4.0)]
    second = [record("valid", 25, loss=9.0), record("train", 30, loss=9.0), record("valid", 30, loss=9.0)]
    again = [record("train", 20, loss=3.0), record("valid", 25, loss=2.9), record("train", 30, loss=2.0)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*first, *second, *again, record("valid", 30, loss=1.9), '{"kind": "tra']))
    metrics = read_metrics(path)
    assert metrics.curve("train", "loss").values.tolist() == [5.0, 3.0, 2.0]
    assert metrics.curve("valid", "loss").values.tolist() == [4.5, 2.9, 1.9]
    assert metrics.curve("valid", "loss").hours.tolist() == [1.5, 2.5, 3.0]
    assert metrics.best("loss") == (1.9, 30)
    assert metrics.unreadable == 0, "a last line cut off is a run that is writing"
    assert metrics.steps_at(np.array([0.0, 0.5, 6.0])).tolist() == [0.0, 5.0, 60.0]


def test_lines_that_are_no_records_are_counted_and_nan_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ["[]", "nonsense", record("train", 1, loss=math.nan), '{"kind": "train", "step": 2}', record("train", 3)]
    path.write_text("\n".join(lines) + "\n")
    metrics = read_metrics(path)
    assert metrics.unreadable == 3
    assert [row["step"] for row in metrics.train] == [1, 3]
    assert math.isnan(metrics.curve("train", "loss").values[0])
    assert smooth(np.array([1.0, math.nan, 3.0, 5.0, 7.0]), 3).tolist() == [1.0, 2.0, 4.0, 5.0, 6.0]


def test_a_long_curve_keeps_its_peaks_and_gaps_do_not_matter() -> None:
    values = np.sin(np.arange(100_000) / 3.0)
    values[[5_000, 70_001]] = [9.0, -9.0]
    values[50_000:50_500] = math.nan
    few = thin(Curve(np.arange(100_000.0), values), 1000)
    assert len(few.values) <= 1000
    assert (few.values.max(), few.values.min()) == (9.0, -9.0)
    assert few.hours.tolist() == sorted(few.hours)
    assert thin(few, 1000) is few


def test_times_and_numbers_are_written_for_people() -> None:
    assert [wall(value) for value in (None, 3.2, 59.9, 270, 3599, 3723)] == [
        DASH,
        "3 s",
        "1.0 min",
        "4.5 min",
        "1 h 00 min",
        "1 h 02 min",
    ]
    assert (percent(0.1234), percent(None), percent(math.nan)) == ("12.3", DASH, DASH)
    assert number(1234567.0, 0) == "1\u202f234\u202f567"


@pytest.mark.parametrize(
    ("name", "content", "section", "words"),
    [
        ("finetune/config.yaml", b"a: [b\n", "runs", "finetune/config.yaml is not valid YAML"),
        ("finetune/checkpoints/step-00000040/versions.json", b"{", "runs", "versions.json cannot be read: Expecting"),
        ("units1/labels/index.npy", None, "units", "index.npy cannot be read: [Errno 2]"),
        ("units1/labels/index.npy", b"xx", "units", "index.npy cannot be read: This file contains pickled"),
        ("stages/8-finetune.done", b"seconds=abc\n\xff\n", "stages", f"8 finetune {DASH}"),
        ("decode/test.jsonl", b"{\n", "utterances", "decode/test.jsonl, line 1: expected one JSON object a line"),
        ("decode/test-score/wer.json", b"[]", "results", "wer.json is not a score"),
    ],
)
def test_each_damaged_piece_is_named(experiment: Path, tmp_path: Path, name, content, section, words, damage) -> None:
    shutil.copytree(experiment, tmp_path / "trial")
    damage(tmp_path / "trial", name, content)
    shown = "1" if section == "utterances" else "0"
    assert main(["report", str(tmp_path / "trial"), "--utterances", shown]) == 0
    assert words in Reader((tmp_path / "trial/report.html").read_text(encoding="utf-8")).texts[section]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(supervisions=[]), "no utterance with a transcript in"),
        (lambda data: data["recording"]["sources"][0].update(source="/nowhere.wav"), "cannot be read: no such file"),
    ],
)
def test_manifests_without_texts_or_audio_are_one_error(
    experiment: Path, tmp_path: Path, capsys, change, words
) -> None:
    valid = collect(experiment).last_run_of("ctc").setting("data.valid")
    lines = [json.loads(line) for line in Path(valid).read_text().splitlines()]
    for data in lines:
        change(data)
    (tmp_path / "cuts.jsonl").write_text("".join(json.dumps(data) + "\n" for data in lines))
    arguments = [
        "report",
        str(experiment),
        "--out",
        str(tmp_path / "page.html"),
        "--cuts",
        str(tmp_path / "cuts.jsonl"),
    ]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "page.html").exists()


def test_audio_too_short_for_a_frame_is_shown_without_posteriors(experiment: Path, tmp_path: Path) -> None:
    valid = collect(experiment).last_run_of("ctc").setting("data.valid")
    lines = [json.loads(line) for line in Path(valid).read_text().splitlines()]
    text = "".join(json.dumps({**data, "duration": 0.01}) + "\n" for data in lines)
    (tmp_path / "short.jsonl").write_text(text)
    out = tmp_path / "page.html"
    arguments = ["--out", str(out), "--cuts", str(tmp_path / "short.jsonl"), "--utterances", "1"]
    assert main(["report", str(experiment), *arguments]) == 0
    assert "no times: its tokens have no path" in out.read_text(encoding="utf-8")
