"""fairseq's HuBERT, wav2vec 2.0 and data2vec models that were fine-tuned by CTC on letters, as harken models.

A checkpoint holds the pretrained model behind `w2v_encoder.w2v_model.`, one linear map `w2v_encoder.proj` onto its
dictionary, and the options of the pretraining in `w2v_args`.
Source: fairseq `wav2vec2_asr.py` (`Wav2VecEncoder`), `hubert_asr.py` (`HubertEncoder`); the blank is class 0
(`criterions/ctc.py`), and `|` stands between words (its letter dictionaries).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harken.config.load import from_dict
from harken.config.saved import load_into
from harken.core.errors import HarkenError
from harken.encoders.backbone import build_backbone
from harken.interop.fairseq_options import (
    Options,
    backbone_config,
    check_supported,
    not_carried_over,
    read_options,
    training_config,
    tri_stage,
)
from harken.interop.imported import Imported
from harken.interop.names import rename_weights
from harken.interop.unpickle import Record, plain

FINETUNED = ("hubert_ctc", "wav2vec_ctc")
MODEL, HEAD = "w2v_encoder.w2v_model.", "w2v_encoder.proj."
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
WORD_END = "|"
# options of fine-tuning that take the place of the pretraining's; fairseq `arg_overrides`
OVERRIDES = {
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "input_dropout",
    "layerdrop": "layer_drop",
}
# of the pretraining alone; fairseq removes it before fine-tuning, and some checkpoints hold it all the same
PRETRAINING = ("label_embs_concat", "final_proj.", "quantizer.", "project_q.", "_ema")


def read_finetuned(
    state: Mapping[str, Any], groups: Mapping[str, Options], names: Any, query_key_value: Any, updates: int, path: Path
) -> Imported:
    """Read a fine-tuned checkpoint. names, query_key_value: those of the pretrained model's weights.

    Raises HarkenError when its dictionary or the options of its pretraining are missing, when it is of other units
    than letters, or when the model has an option that harken does not support.
    """
    outer = groups["model"]
    inner = _pretraining(outer, path)
    check_supported(inner["model"], path)
    symbols = _symbols(state, path)
    kept = [index for index, symbol in enumerate(symbols) if index and symbol not in SPECIALS]
    weights = _weights(state["model"], names, query_key_value, path)
    head = {kind: weights.pop(f"head.{kind}", None) for kind in ("weight", "bias")}
    for kind, rows in head.items():
        if rows is None or len(rows) != len(symbols):
            raise HarkenError(f"`{HEAD}{kind}` of {path} must have a row for each of its {len(symbols)} symbols")
        weights[f"head.{kind}"] = rows[[0, *kept]]
    slots = backbone_config(inner)
    slots["encoder"].update({ours: outer[theirs] for theirs, ours in OVERRIDES.items() if theirs in outer})
    slots["frontend"]["grad_scale"] = outer.get("feature_grad_mult", 0.0)
    training = training_config(groups, path.name, updates)
    training["schedule"] = tri_stage(groups) or {"name": "tri_stage", "peak": training["schedule"]["peak"]}
    try:
        config = from_dict({**slots, **training, "objective": _objective(outer)})
    except TypeError as error:
        raise HarkenError(f"{path} has an option of a wrong type: {error}") from error
    prefix = "backbone."
    model = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    load_into(build_backbone(config), model, path)
    unused = ", ".join(symbol for symbol in symbols[1:] if symbol in SPECIALS)
    lost = f"classes {unused}, which no text has: their share of the probability goes to the others"
    notes = (lost, *not_carried_over(groups))
    characters = tuple(" " if symbols[index] == WORD_END else symbols[index] for index in kept)
    targets = f"characters: {len(characters)}, and the blank"
    return Imported(config, weights, (tuple(symbols),), updates, notes, targets, characters)


def _pretraining(outer: Options, path: Path) -> dict[str, Options]:
    args = plain(outer.get("w2v_args"))
    if not isinstance(args, Mapping):
        raise HarkenError(f"{path} has no `w2v_args`: it does not say which pretrained model it was made of")
    return read_options({"cfg": args} if isinstance(args.get("model"), Mapping) else {"args": args}, path)


def _symbols(state: Mapping[str, Any], path: Path) -> list[str]:
    task = state.get("task_state")
    found = task.get("target_dictionary") if isinstance(task, Mapping) else None
    symbols = found.fields().get("symbols") if isinstance(found, Record) else None
    if not isinstance(symbols, list) or not symbols:
        raise HarkenError(f"{path} has no `target_dictionary`: it does not say which letter a class stands for")
    strange = [symbol for symbol in symbols[1:] if symbol not in SPECIALS and len(str(symbol)) != 1]
    if strange:
        raise HarkenError(f"harken reads models of letters, and {path} has classes such as {strange[0]!r}")
    return [str(symbol) for symbol in symbols]


def _weights(model: Mapping[str, Any], names: Any, query_key_value: Any, path: Path) -> dict[str, Tensor]:
    ours = [*names, (rf"{HEAD}(weight|bias)", r"head.\1")]
    inner = {name.removeprefix(MODEL): value for name, value in model.items()}
    kept = {name: value for name, value in inner.items() if not name.startswith(PRETRAINING)}
    return rename_weights(kept, ours, query_key_value, path)


def _objective(outer: Options) -> dict[str, Any]:
    """Return CTC's options; the tokenizer is the folder's own, which is named when it is written."""
    masked = outer.get("apply_mask", True)
    return {
        "name": "ctc",
        "tokenizer": "tokens.txt",
        "mask_probability": outer.get("mask_prob", 0.5) if masked else 0.0,
        "mask_length": outer.get("mask_length", 10),
        "mask_channel_probability": outer.get("mask_channel_prob", 0.0) if masked else 0.0,
        "mask_channel_length": outer.get("mask_channel_length", 64),
        "freeze_steps": outer.get("freeze_finetune_updates", 0),
        "freeze_frontend": not outer.get("feature_grad_mult", 0.0),
        "dropout": outer.get("final_dropout", 0.0),
    }
