"""fairseq's models fine-tuned by CTC: the pretrained part is read as before, the head gives the letters it gave.

The checkpoints are made of the pretrained goldens, as fairseq's `Wav2VecEncoder` and `HubertEncoder` make theirs.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harken.apps.main import main
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.data.tokens import load_tokenizer
from harken.interop.fairseq import import_checkpoint, read_pretrained
from harken.interop.unpickle import plain, read_checkpoint
from harken.objectives.ctc import Ctc
from harken.objectives.saved import load_objective

GOLDEN = Path(__file__).resolve().parents[1] / "golden/fairseq"
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "T", "A"]
KEPT = [0, 4, 5, 6, 7]
HEADS = ("label_embs_concat", "final_proj", "quantizer", "project_q")


class Finetuned:
    """A checkpoint as fairseq writes one after CTC on letters; `state`, `model` and `symbols` may be changed."""

    def __init__(self, folder: Path, kind: str) -> None:
        pretrained = dict(read_checkpoint(GOLDEN / f"fairseq_{kind}_base.pt"))
        inner = plain(pretrained["cfg"])
        torch.manual_seed(2)
        weights = {name: value for name, value in pretrained["model"].items() if not name.startswith(HEADS)}
        width = inner["model"]["encoder_embed_dim"]
        self.head = torch.nn.Linear(width, len(SYMBOLS))
        self.symbols = list(SYMBOLS)
        self.path = folder / f"{kind}_ctc.pt"
        self.options: dict[str, Any] = {
            "_name": {"hubert": "hubert_ctc", "wav2vec2": "wav2vec_ctc"}[kind],
            "w2v_args": inner,
            "mask_prob": 0.65,
            "mask_channel_prob": 0.5,
            "layerdrop": 0.1,
            "final_dropout": 0.05,
            "freeze_finetune_updates": 10000,
        }
        self.weights = {f"w2v_encoder.w2v_model.{name}": value for name, value in weights.items()}
        self.weights |= {f"w2v_encoder.proj.{name}": value.detach() for name, value in self.head.named_parameters()}
        self.optimization = {"max_update": 13000, "lr": [5e-5]}

    def save(self) -> Path:
        module = types.ModuleType("fairseq_dictionary")
        module.Dictionary = type("Dictionary", (), {"__module__": module.__name__})
        dictionary = module.Dictionary()
        dictionary.symbols = self.symbols
        cfg = {"model": self.options, "task": {"sample_rate": 16000}, "optimization": self.optimization}
        sys.modules[module.__name__] = module
        try:
            torch.save({"cfg": cfg, "model": self.weights, "task_state": {"target_dictionary": dictionary}}, self.path)
        finally:
            del sys.modules[module.__name__]
        return self.path


@pytest.mark.parametrize(("kind", "samples"), [("hubert", [16000, 12000]), ("wav2vec2", [16000, 16000])])
@torch.no_grad()
def test_letters_have_the_scores_that_the_original_s_head_gives_them(
    tmp_path: Path, read_golden, kind: str, samples: list[int]
) -> None:
    finetuned = Finetuned(tmp_path, kind)
    import_checkpoint(finetuned.save(), tmp_path / "model")
    model, config = load_objective(tmp_path / "model")
    assert isinstance(model, Ctc)
    model.backbone.frontend.config = replace(model.backbone.frontend.config, normalize=False)
    golden = read_golden(GOLDEN / f"fairseq_{kind}_base.npz")
    wav, final = golden["wav"], golden["final"]
    batch = Batch(ids=("a", "b"), inputs=wav, lengths=torch.tensor(samples), targets={}, num_targets=1.0)
    found, lengths = model.log_probs(batch)
    expected = torch.log_softmax(finetuned.head(final)[..., KEPT], dim=-1)
    for row, length in enumerate(lengths.tolist()):
        assert float((found[row, :length] - expected[row, :length]).abs().max()) < 1e-4
    assert load_tokenizer(config.objective.tokenizer).decode([1, 2, 3, 4]) == " ETA"


def test_how_it_was_fine_tuned_is_in_the_configuration(tmp_path: Path, capsys) -> None:
    path = Finetuned(tmp_path, "hubert").save()
    assert main(["import", str(path), "--from", "fairseq", "--out", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "ctc on 3 transformer layers" in out
    assert "characters: 4, and the blank" in out
    assert "not carried over: classes <pad>, </s>, <unk>, which no text has" in out
    _, config = load_objective(tmp_path / "model")
    own = config.objective
    assert (own.mask_probability, own.mask_channel_probability, own.dropout) == (0.65, 0.5, 0.05)
    assert own.freeze_steps == 10000
    assert config.encoder.layer_drop == 0.1
    assert (config.schedule.name, config.schedule.peak, config.train.steps) == ("tri_stage", 5e-5, 13000)
    assert json.loads((tmp_path / "model/imported.json").read_text())["symbols"] == [SYMBOLS]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one.options.pop("w2v_args"), "has no `w2v_args`"),
        (lambda one: setattr(one, "symbols", []), "has no `target_dictionary`"),
        (lambda one: one.symbols.append("ing"), "harken reads models of letters, and .* has classes such as 'ing'"),
        (lambda one: one.symbols.append("X"), "must have a row for each of its 9 symbols"),
        (lambda one: one.weights.pop("w2v_encoder.proj.bias"), "`w2v_encoder.proj.bias` of .* must have a row"),
        (lambda one: one.options["w2v_args"]["model"].update(pos_enc_type="rel_pos"), "`pos_enc_type` must be 'abs'"),
        (lambda one: one.options.update(_name="wav2vec_seq2seq"), "those of them that were fine-tuned by CTC"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, change, said: str) -> None:
    finetuned = Finetuned(tmp_path, "hubert")
    change(finetuned)
    with pytest.raises(HarkenError, match=said):
        read_pretrained(finetuned.save())
