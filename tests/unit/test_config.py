"""Configurations: what is refused and how it is said, what overrides what, and where each value came from."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from harken.apps.main import main
from harken.config.load import flatten, from_dict, load, presets, to_yaml
from harken.config.registry import SLOTS, available, find
from harken.config.schema import RunConfig
from harken.core.errors import HarkenError

SMALL: dict[str, Any] = {
    "frontend": {"name": "filterbank", "subsampling": 2},
    "encoder": {"name": "transformer", "dim": 64, "heads": 4},
    "objective": {"name": "ctc", "tokenizer": "tokens.txt"},
    "optimizer": {"name": "adamw"},
    "schedule": {"name": "linear", "peak": 1e-3, "warmup_steps": 10},
    "data": {"train": "train.jsonl"},
    "batch": {"max_seconds": 60, "seconds_per_step": 120},
    "train": {"steps": 100},
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    OmegaConf.save(OmegaConf.create(SMALL), tmp_path / "small.yaml")
    return tmp_path / "small.yaml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(small: Path, *overrides: str) -> str:
    with pytest.raises(HarkenError) as caught:
        load([small], overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys, with the nearest name
        ("encoder.layer=6", "unknown key `encoder.layer`; did you mean `layers`?"),
        ("train.step=6", "unknown key `train.step`; did you mean `steps`?"),
        ("sead=6", "unknown key `sead`; did you mean `seed`?"),
        (
            "log.qqqqqqqq=1",
            "unknown key `log.qqqqqqqq`; known: every_steps, peak_tflops, profile, samples, tensorboard",
        ),
        ("schedule.hold_share=0.5", "unknown key `schedule.hold_share`"),
        ("encoder.name=transfomer", "got `transfomer`; did you mean `transformer`?"),
        (
            "optimizer.name=lion",
            "`optimizer.name` must be one of harken's optimizers or a module path, got `lion`; known: adamw",
        ),
        (
            "encoder.name=nowhere.to.be",
            "`encoder.name` is `nowhere.to.be`, and importing the module `nowhere.to.be` failed",
        ),
        ("encoder.name=json.decoder", "module `json.decoder` registers no encoder"),
        # types
        ("encoder.layers=many", "`encoder.layers` must be int, got 'many'"),
        ("encoder.layers=2.5", "`encoder.layers` must be int, got 2.5"),
        ("encoder.layers=true", "`encoder.layers` must be int, got True"),
        ("encoder.dropout=much", "`encoder.dropout` must be float, got 'much'"),
        ("encoder.dropout=true", "`encoder.dropout` must be float, got True"),
        ("encoder.norm_first=1", "`encoder.norm_first` must be bool, got 1"),
        ("encoder=6", "`encoder` must be a group of keys, got 6"),
        ("data.speed=0.9", "`data.speed` must be list of float, got 0.9"),
        ("data.speed=[0.9,fast]", "`data.speed[1]` must be float, got 'fast'"),
        ("engine.zero_stage=4", "`engine.zero_stage` must be one of 'auto', 0, 1, 2, 3, got 4"),
        ("engine.precision=fp8", "`engine.precision` must be one of 'auto', 'fp32', 'bf16', 'fp16', got 'fp8'"),
        ("engine.deepspeed=7", "`engine.deepspeed` must be dict"),
        # rules
        ("encoder.heads=7", "`encoder.dim` must be divisible by `encoder.heads`, got 64 and 7"),
        ("batch.seconds_per_step=30", "`batch.seconds_per_step` must be at least `batch.max_seconds`"),
        ("data.max_seconds=61", "`batch.max_seconds` must hold the longest cut"),
        ("data.min_seconds=31", "`data.min_seconds` must be at most `data.max_seconds`, got 31.0 and 30.0"),
        ("data.speed=[3.0]", "`data.speed` factors must lie in 0.5..2, got [3.0]"),
        ("checkpoint.keep_last=0", "`checkpoint.keep_last` must be at least 1, got 0"),
        ("log.every_steps=0", "`log.every_steps` must be positive, got 0"),
        ("log.peak_tflops=-1", "`log.peak_tflops` must be positive, got -1.0"),
        ("checkpoint.every_steps=-5", "`checkpoint.every_steps` must be positive, got -5"),
        ("checkpoint.keep_best=-1", "`checkpoint.keep_best` must be at least 0, got -1"),
        ("train.valid_every_steps=0", "`train.valid_every_steps` must be positive, got 0"),
        ("train.steps=0", "`train.steps` must be positive, got 0"),
        ("train.ema_decay=1.5", "`train.ema_decay` must lie in 0..1, got 1.5"),
        ("engine.threads=-1", "`engine.threads` must be at least 0, got -1"),
        ("engine.timeout_seconds=0", "`engine.timeout_seconds` must be positive, got 0"),
        ("batch.parts=0", "`batch.parts` must be positive, got 0"),
        ("batch.max_seconds=much", "`batch.max_seconds` must be float or auto, got 'much'"),
        ("batch.memory_share=1.5", "`batch.memory_share` must lie in 0..1, got 1.5"),
        ("batch.memory_gib=0", "`batch.memory_gib` must be positive, got 0.0"),
        ("batch.limits=[[30]]", "`batch.limits` must be a list of [seconds, padded seconds]"),
        ("data.crop_seconds=0", "`data.crop_seconds` must be positive, got 0.0"),
        ("data.max_seconds=.nan", "`data.max_seconds` must be positive, got nan"),
        ("data.prefetch_batches=0", "`data.prefetch_batches` must be positive, got 0"),
        ("data.workers=-1", "`data.workers` must be at least 0, got -1"),
        ("data.noise_probability=2", "`data.noise_probability` must lie in 0..1, got 2.0"),
        ("data.noise_snr_db=[20,10]", "`data.noise_snr_db` is [lowest, highest], got [20.0, 10.0]"),
        ("encoder.heads=0", "`encoder.heads` must be positive, got 0"),
        ("encoder.dropout=-0.1", "`encoder.dropout` must lie in 0..1, got -0.1"),
        ("frontend.bands=0", "`frontend.bands` must be positive, got 0"),
        ("objective.head_upsampling=0", "`objective.head_upsampling` must be positive, got 0"),
        ("optimizer.betas=[0.9,1.1]", "`optimizer.betas` must lie in 0..1, got [0.9, 1.1]"),
        ("schedule.peak=0", "`schedule.peak` must be positive, got 0.0"),
        (
            "batch.seconds_per_step=90",
            (
                "`batch.seconds_per_step` must be a multiple of `batch.max_seconds`, within 10 %, got 90 and 60: "
                "set it to 60 or 120, or change `batch.max_seconds`"
            ),
        ),
        (
            "data.sample_rate=8000",
            (
                "`data.sample_rate` must equal `frontend.sample_rate`, so that audio is heard at the rate "
                "that it is read at, got 8000 and 16000"
            ),
        ),
        (
            "data.crop_seconds=15",
            (
                "`data.crop_seconds` must be null with `objective.name: ctc`, whose targets belong to whole cuts, "
                "got 15: leave longer cuts out with `data.max_seconds`"
            ),
        ),
        ("frontend.subsampling=3", "`frontend.subsampling` must be 1, 2, 4 or 8, got 3"),
        # what is no override
        ("", "an override is `key=value`, got ``"),
        ("data.train=${nowhere}", "cannot resolve the configuration"),
        (
            "data.labels=[a",
            "the value of an override must be YAML, got `data.labels=[a`: did not find expected ',' or ']'",
        ),
    ],
)
def test_a_mistake_is_named(small: Path, override: str, message: str) -> None:
    assert message in refusal(small, override)


def test_missing_values_are_named_with_their_type(tmp_path: Path) -> None:
    settings = {key: value for key, value in SMALL.items() if key != "batch"}
    settings["train"] = {}
    with pytest.raises(HarkenError) as caught:
        from_dict(settings)
    assert str(caught.value).splitlines() == [
        "missing value for `batch` (BatchConfig)",
        "missing value for `train.steps` (int)",
    ]


def test_all_mistakes_are_told_at_once(small: Path) -> None:
    text = refusal(small, "encoder.layer=6", "train.steps=often", "encoder.heads=7")
    assert "`encoder.layer`" in text
    assert "`train.steps`" in text


def test_every_wrong_number_of_a_group_is_told(small: Path) -> None:
    text = refusal(small, "train.steps=0", "train.patience=-1", "log.every_steps=0")
    assert text.splitlines() == [
        "`train.steps` must be positive, got 0",
        "`train.patience` must be at least 0, got -1",
        "`log.every_steps` must be positive, got 0",
    ]


def test_a_step_may_be_off_a_multiple_by_a_tenth(small: Path) -> None:
    assert load([small], ["batch.seconds_per_step=130"]).config.batch.micro_batches_per_step == 2
    assert "set it to 120 or 180" in refusal(small, "batch.seconds_per_step=135")


def test_crops_are_for_objectives_that_do_not_need_whole_cuts(small: Path) -> None:
    config = load([small], ["objective.name=hubert", "objective.classes=[7]", "data.crop_seconds=15"]).config
    assert config.data.crop_seconds == 15.0


def test_labels_and_speed_exclude_each_other(small: Path) -> None:
    assert "give one of the two" in refusal(small, "data.labels=[units]", "data.speed=[0.9,1.1]")


def test_a_mistake_stops_the_command_before_any_data_is_read(small: Path, tmp_path: Path, capsys) -> None:
    assert main(["train", str(small), "encoder.layer=6", "--exp", str(tmp_path / "exp")]) == 2
    error = capsys.readouterr().err
    assert error == "harken train: unknown key `encoder.layer`; did you mean `layers`?\n"
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001"])
def test_every_spelling_of_a_number_is_a_number(small: Path, tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "rate.yaml", f"schedule: {{peak: {text}}}\n")
    assert load([small, file]).config.schedule.peak == 0.001
    assert load([small], [f"schedule.peak={text}"]).config.schedule.peak == 0.001


def test_whole_numbers_serve_as_floats_and_digits_as_names(small: Path) -> None:
    config = load([small], ["encoder.dropout=1", "data.train=1234"]).config
    assert config.encoder.dropout == 1.0
    assert isinstance(config.encoder.dropout, float)
    assert config.data.train == "1234"


def test_later_files_and_arguments_win_and_the_origin_is_known(small: Path, tmp_path: Path) -> None:
    second = write(tmp_path / "second.yaml", "encoder: {layers: 3, heads: 8}\n")
    loaded = load([small, second], ["encoder.heads=2", "seed=9"])
    assert (loaded.config.encoder.layers, loaded.config.encoder.heads, loaded.config.encoder.dim) == (3, 2, 64)
    assert loaded.origin["encoder.dim"] == str(small)
    assert loaded.origin["encoder.layers"] == str(second)
    assert loaded.origin["encoder.heads"] == "argument encoder.heads=2"
    assert "encoder.dropout" not in loaded.origin
    rows = {line.split()[0]: line.split("# ")[-1] for line in loaded.table().splitlines()}
    assert rows["encoder.heads"] == "argument encoder.heads=2"
    assert rows["encoder.dropout"] == "default"
    assert rows.keys() >= flatten(asdict(loaded.config)).keys()


def test_base_files_are_found_beside_the_file_and_merged_before_it(small: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner/first.yaml", "base: ../small.yaml\nencoder: {layers: 5, heads: 2}\n")
    write(tmp_path / "inner/second.yaml", "seed: 5\n")
    file = write(tmp_path / "run.yaml", "base: [inner/first.yaml, inner/second.yaml]\nencoder: {heads: 8}\n")
    loaded = load([file])
    assert (loaded.config.encoder.layers, loaded.config.encoder.heads, loaded.config.seed) == (5, 8, 5)
    assert loaded.origin["encoder.layers"] == str(tmp_path / "inner/first.yaml")


def test_another_part_in_a_slot_drops_what_was_said_of_the_old_one(small: Path) -> None:
    loaded = load([small], ["schedule.name=tri_stage", "schedule.peak=2e-3"])
    assert (loaded.config.schedule.name, loaded.config.schedule.peak) == ("tri_stage", 2e-3)
    assert "schedule.warmup_steps" not in loaded.origin
    same = load([small], ["schedule.name=linear"])
    assert same.config.schedule.warmup_steps == 10, "the same part keeps its keys"


def test_files_that_cannot_be_used_are_named(small: Path, tmp_path: Path) -> None:
    with pytest.raises(HarkenError, match=r"no configuration file or preset `hubert_bas`; did you mean `hubert_base`?"):
        load(["hubert_bas"])
    with pytest.raises(HarkenError, match="is not valid YAML"):
        load([write(tmp_path / "broken.yaml", "a: [1, 2\nb: }")])
    with pytest.raises(HarkenError, match="must hold a group of keys, got list"):
        load([write(tmp_path / "list.yaml", "- 1\n- 2\n")])


def every_key() -> list[tuple[str, str]]:
    """Return the dotted names of all fields, those of each part of each slot too, with the slot's override."""
    keys = [(key, "") for key in flatten(asdict(from_dict(SMALL))) if key.split(".")[0] not in SLOTS]
    for slot in SLOTS:
        for name in available(slot):
            keys += [(f"{slot}.{item.name}", name) for item in fields(find(slot, name).config) if item.name != "name"]
    return keys


WARMED = ("cosine", "infinite", "linear", "warmup_stable_decay")


@pytest.mark.parametrize(("key", "part"), every_key())
def test_every_field_can_be_overridden(small: Path, tmp_path: Path, key: str, part: str) -> None:
    """Each value is given once more as an argument, and comes back as it was, by that argument."""
    slot = key.split(".", maxsplit=1)[0]
    required = {
        "hubert": ["objective.classes=[7]"],
        "unispeech_sat": ["objective.classes=[7]"],
        "beats_tokenizer": ["objective.teacher=t"],
        "constant": ["schedule.rate=1e-3"],
        "eden": ["schedule.lr_hours=10"],
        "ctc": ["objective.tokenizer=t"],
        "transducer": ["objective.tokenizer=t"],
        "infinite": [
            "schedule.constant=1e-4",
            "schedule.cooldown_steps=5",
            "schedule.anneal_steps=5",
            "schedule.end=1e-5",
        ],
    }
    peak = ["schedule.peak=1e-3", "schedule.warmup_steps=5"]
    base = [f"{slot}.name={part}", *required.get(part, [])] if part else []
    base += peak[: {"tri_stage": 1}.get(part, 2 if part in WARMED else 0)]
    before = load([small], base).config
    value = flatten(asdict(before)).get(key, {})
    text = OmegaConf.to_yaml(OmegaConf.create({"v": value}), resolve=True).strip()[2:].strip() if value != () else "[]"
    if isinstance(value, tuple | dict):
        text = str(list(value) if isinstance(value, tuple) else value).replace("'", "")
    argument = f"{key}={text}"
    loaded = load([small], [*base, argument])
    assert loaded.config == before
    assert loaded.origin.get(key, f"argument {argument}" if value == {} else None) == f"argument {argument}"


@pytest.mark.parametrize("name", presets())
def test_presets_are_whole_but_for_the_data(name: str) -> None:
    kind = "recogniser" if name.startswith("zipformer_") else name
    needed = {"recogniser": "objective.tokenizer=tokens.txt", "beats_tokenizer_base": "objective.teacher=exp/beats1"}
    given = ["data.train=train.jsonl", needed.get(kind, "data.labels=[units]")]
    config = load([name], given).config
    assert from_dict(asdict(config)) == config


def test_yaml_survives_the_round_trip(small: Path, tmp_path: Path) -> None:
    config = load(
        [small], ["data.speed=[0.9, 1.0]", "engine.deepspeed.comms_logger.enabled=true", "schedule.peak=1e-5"]
    ).config
    assert load([write(tmp_path / "again.yaml", to_yaml(config))]).config == config
    assert isinstance(config, RunConfig)


def test_harken_config_prints_values_and_origins(small: Path, tmp_path: Path, capsys) -> None:
    assert main(["config", str(small), "seed=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        (line.startswith("seed ") and line.endswith("4  # argument seed=4")) or "# argument seed=4" in line
        for line in lines
    )
    assert main(["config", str(small), "seed=4", "--yaml"]) == 0
    assert load([write(tmp_path / "printed.yaml", capsys.readouterr().out)]).config.seed == 4
    assert main(["config", str(small), "sead=4"]) == 2
