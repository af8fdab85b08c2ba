"""What saved models give to those who use them: averaged weights, a start, the next best when one is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harken.apps.main import main
from harken.config.saved import find_model, load_weights
from harken.core.errors import HarkenError


@pytest.fixture
def averaged(train, tmp_path: Path) -> Path:
    """A pretraining run that kept an average of its weights, and its newest checkpoint."""
    assert train("hubert", "train.ema_decay=0.9", "schedule.rate=0.01", steps=3, exp="averaged")[0] == 0
    return tmp_path / "averaged"


def assert_averaged(state: dict[str, torch.Tensor], exp: Path) -> None:
    folder = find_model(exp)
    average, raw = load_file(folder / "average.safetensors"), load_file(folder / "model.safetensors")
    assert state
    for name, value in state.items():
        assert torch.allclose(value, average.get(name, raw[name]), rtol=0, atol=1e-20), name
    moved = [name for name in state if name in average and not torch.equal(average[name], raw[name])]
    assert len(moved) > len(state) / 2, "the average must differ from the weights"


def test_what_uses_a_model_takes_the_averaged_weights(averaged: Path) -> None:
    from harken.encoders.saved import load_backbone
    from harken.objectives.saved import load_objective
    from harken.units.features import make_features

    assert_averaged(load_objective(averaged)[0].state_dict(), averaged)
    for backbone in (load_backbone(averaged)[0], make_features("hidden", model=averaged, layer=1).backbone):
        assert_averaged({f"backbone.{name}": value for name, value in backbone.state_dict().items()}, averaged)


def test_init_from_gives_the_backbone_and_leaves_the_head(averaged: Path, train, tmp_path: Path) -> None:
    # the rate is too small to change a weight: it leaves the weights as they were when the run began
    status, _, error = train("ctc", f"train.init_from={averaged}", "schedule.rate=1e-30", steps=1)
    assert (status, error) == (0, "")
    assert train("ctc", "schedule.rate=1e-30", steps=1, exp="scratch")[0] == 0
    weights, scratch = (load_weights(find_model(tmp_path / name)) for name in ("exp", "scratch"))
    assert_averaged({name: value for name, value in weights.items() if name.startswith("backbone.")}, averaged)
    assert weights["head.weight"].shape == scratch["head.weight"].shape
    assert weights["head.weight"].std() > 0
    assert not torch.equal(weights["backbone.encoder.norm.weight"], torch.zeros(32))


def test_init_fresh_blocks_leaves_the_top_blocks(averaged: Path, train, tmp_path: Path) -> None:
    options = (f"train.init_from={averaged}", "encoder.layers=3", "schedule.rate=1e-30")
    status, _, error = train("ctc", *options, "train.init_fresh_blocks=2", steps=1)
    assert (status, error) == (0, "")
    assert train("ctc", "encoder.layers=3", "schedule.rate=1e-30", steps=1, exp="scratch")[0] == 0
    weights, scratch = (load_weights(find_model(tmp_path / name)) for name in ("exp", "scratch"))
    fresh = {name for name in weights if name.startswith(("backbone.encoder.blocks.1.", "backbone.encoder.blocks.2."))}
    assert len(fresh) > 10
    assert all(torch.allclose(weights[name], scratch[name], rtol=0, atol=1e-20) for name in fresh)
    kept = {name: value for name, value in weights.items() if name.startswith("backbone.") and name not in fresh}
    assert_averaged(kept, averaged)
    status, _, error = train("ctc", *options, "train.init_fresh_blocks=4", steps=1, exp="more")
    assert status == 2
    assert "`train.init_fresh_blocks` must be at most the encoder's 3 blocks, got 4" in error


def test_init_from_another_shape_is_refused(averaged: Path, train) -> None:
    status, _, error = train("ctc", f"train.init_from={averaged}", "encoder.dim=64", steps=1)
    assert status == 2
    assert f"the weights in {averaged}/checkpoints/step-00000003 do not fit the model: " in error


def test_an_average_is_the_mean_of_the_newest(train, tmp_path: Path) -> None:
    train("hubert", "checkpoint.every_steps=1", "checkpoint.keep_last=3", "schedule.rate=0.01", steps=3)
    exp, out = tmp_path / "exp", tmp_path / "mean"
    assert main(["average", str(exp), "--last", "2", "--out", str(out)]) == 0
    parts = [load_file(exp / f"checkpoints/step-0000000{step}/model.safetensors") for step in (2, 3)]
    mean = load_file(out / "model.safetensors")
    assert mean.keys() == parts[0].keys()
    for name, value in mean.items():
        expected = (parts[0][name].double() + parts[1][name].double()) / 2
        assert torch.equal(value, expected.float()), name
    assert find_model(out) == out


def flip(path: Path) -> None:
    """Change one byte in the middle of a file; its length stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def ranked(train, corpus, tmp_path: Path, scores) -> Path:
    """A CTC run whose second checkpoint of three is the best, the first the next best."""
    scores(2.0, 1.0, 3.0)
    keep = (
        f"data.valid={corpus.valid}",
        "train.valid_every_steps=1",
        "checkpoint.keep_best=2",
        "checkpoint.keep_last=1",
    )
    assert train("ctc", *keep, steps=3)[0] == 0
    return tmp_path / "exp"


def test_a_damaged_best_checkpoint_is_named_and_the_next_best_decodes(
    ranked: Path, corpus, tmp_path: Path, capsys
) -> None:
    best = ranked / "checkpoints/step-00000002"
    flip(best / "model.safetensors")
    assert main(["decode", str(ranked), str(corpus.valid), "--out", str(tmp_path / "decode"), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert (
        f"WARNING checkpoint {best} is damaged (model.safetensors is not as it was written): trying another one" in out
    )
    assert (tmp_path / "decode/valid.jsonl").is_file()
    assert find_model(ranked).name == "step-00000001"
    flip(ranked / "checkpoints/step-00000001/config.yaml")
    assert find_model(ranked).name == "step-00000003"
    flip(ranked / "checkpoints/step-00000003/model.safetensors")
    with pytest.raises(HarkenError, match=r"every checkpoint in .* is damaged: restore a copy, or train again"):
        find_model(ranked)


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(
    ranked: Path, train, corpus, tmp_path: Path, capsys
) -> None:
    best = ranked / "checkpoints/step-00000002"
    flip(best / "model.safetensors")
    message = (
        f"checkpoint {best} is damaged (model.safetensors is not as it was written): restore a copy, or name another"
    )
    assert main(["decode", str(best), str(corpus.valid), "--out", str(tmp_path / "decode")]) == 2
    assert message in capsys.readouterr().err
    status, _, error = train("ctc", f"train.init_from={best}", exp="new")
    assert status == 2
    assert message in error
    (best / "checksums.json").unlink()
    with pytest.raises(HarkenError, match=r"is damaged \(no readable checksums.json"):
        find_model(best)


def test_only_what_is_read_must_be_whole(ranked: Path) -> None:
    """A checkpoint copied without its optimiser decodes."""
    best = ranked / "checkpoints/step-00000002"
    flip(best / "optimizer.safetensors")
    assert find_model(best) == best
    flip(best / "config.yaml")
    with pytest.raises(HarkenError, match=r"config\.yaml is not as it was written"):
        find_model(best)


def test_a_damaged_checkpoint_is_not_averaged(train, tmp_path: Path, capsys) -> None:
    train("hubert", "checkpoint.every_steps=1", "checkpoint.keep_last=3", steps=3)
    flip(tmp_path / "exp/checkpoints/step-00000003/model.safetensors")
    assert main(["average", str(tmp_path / "exp"), "--last", "2", "--out", str(tmp_path / "mean")]) == 0
    out = capsys.readouterr().out
    assert "step-00000003 is damaged (model.safetensors is not as it was written): trying another one" in out
    assert "mean of 2 models: step-00000001, step-00000002" in out
