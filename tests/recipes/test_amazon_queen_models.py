"""The models of the default corpus: their numbers of parameters, and that each method's configuration is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from harken.config.load import load
from harken.data.tokens import Characters
from harken.objectives.saved import build_objective

CONF = Path(__file__).resolve().parents[2] / "egs/amazon_queen/conf"
OF_STAGE = {
    "pretrain": ("data.labels=[units]", "objective.classes=[200]"),
    "finetune": ("objective.tokenizer=tokens.txt",),
}
METHODS = sorted(path.stem for path in (CONF / "methods").glob("*.yaml"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the characters of the corpus, to work in."""
    Characters(list(" 'abcdefghijklmnopqrstuvwxyz")).save(tmp_path / "tokens.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parameters(*files: Path, overrides: tuple[str, ...]) -> int:
    """Return how many parameters the model of merged configurations has."""
    config = load(list(files), ["data.train=train.jsonl", *overrides]).config
    return sum(parameter.numel() for parameter in build_objective(config).parameters())


@pytest.mark.parametrize("encoder", ["transformer", "zipformer"])
@pytest.mark.parametrize("mode", ["full", "short", "compare"])
@pytest.mark.parametrize(("stage", "transducer"), [("pretrain", False), ("finetune", False), ("finetune", True)])
def test_other_encoders_have_as_many_parameters_as_the_default(
    mode: str, stage: str, transducer: bool, encoder: str, here: Path
) -> None:
    more = [CONF / "transducer.yaml"] if transducer else []
    base = CONF / mode / f"{stage}.yaml"
    counts = [parameters(base, *files, *more, overrides=OF_STAGE[stage]) for files in ([], [CONF / f"{encoder}.yaml"])]
    print(f"{mode} {stage} transducer={transducer} {encoder}: default {counts[0]:,}, this {counts[1]:,}")
    assert abs(counts[1] / counts[0] - 1) < 0.03, counts


@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_of_a_method_is_whole_and_of_the_default_models_size(method: str, here: Path) -> None:
    path = CONF / f"methods/{method}.yaml"
    config = load([path], ["data.train=train.jsonl", "data.labels=[units]"]).config
    assert path.read_text().startswith("# ")
    count = sum(parameter.numel() for parameter in build_objective(config).backbone.parameters())
    print(f"{method}: backbone {count:,}")
    assert 5.6e6 < count < 7.0e6
