"""HuBERT, wav2vec 2.0 and data2vec (speech) checkpoints of fairseq as harken models, without fairseq.

Layouts: `cfg` (a dict or OmegaConf containers, fairseq 0.12 and the released models) and `args` (a flat namespace,
before that), both with `model` as the state dict and `task_state` with a pickled dictionary for each codebook.

Outputs equal the original's: group norm counts the padding (`frontend.norm_over_padding`). The configuration describes
the model exactly and the training as far as the checkpoint tells: `data.train` says that the data must be given, and
what the checkpoint is silent about has HuBERT Base's published value. `imported.json` keeps the source, its hash, the
updates it was trained for and the unit that each class stands for: fairseq's first four classes are `<s>`, `<pad>`,
`</s>` and `<unk>`, which no label ever is, and class 4 + k is the k-th line of its `dict.km.txt`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harken.config.load import from_dict
from harken.config.registry import build
from harken.config.saved import load_into
from harken.core.errors import HarkenError
from harken.encoders.backbone import build_backbone
from harken.interop.fairseq_ctc import FINETUNED, read_finetuned
from harken.interop.fairseq_options import (
    check_supported,
    data2vec_config,
    hubert_config,
    kind_of,
    not_carried_over,
    read_options,
    training_config,
    wav2vec2_config,
)
from harken.interop.imported import Imported, classes_line, import_one
from harken.interop.names import rename_weights
from harken.interop.unpickle import Record, plain, read_checkpoint

_PART = r"(weight|bias)"
_BLOCK = r"encoder\.layers\.(\d+)\."
_NEW_BLOCK = r"backbone.encoder.blocks.\1."
NAMES: tuple[tuple[str, str], ...] = (
    (r"mask_emb", "backbone.mask_embedding"),
    (r"label_embs_concat", "codes.embeddings"),
    (r"quantizer\.vars", "quantizer.codebook"),
    (rf"quantizer\.weight_proj\.{_PART}", r"quantizer.logits.\1"),
    (rf"project_q\.{_PART}", r"project_target.\1"),
    (rf"final_proj\.{_PART}", r"project.\1"),
    (rf"layer_norm\.{_PART}", r"backbone.encoder.input_norm.\1"),
    (rf"post_extract_proj\.{_PART}", r"backbone.encoder.project.\1"),
    (rf"feature_extractor\.conv_layers\.(\d+)\.0\.{_PART}", r"backbone.frontend.layers.\1.conv.\2"),
    # the group norm itself, or a layer norm between two transpositions
    (rf"feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?{_PART}", r"backbone.frontend.layers.\1.norm.\2"),
    (r"encoder\.pos_conv\.0\.(weight_g|weight_v|bias)", r"backbone.encoder.positions.\1"),
    (rf"encoder\.pos_conv\.(\d+)\.0\.{_PART}", r"backbone.encoder.positions.layers.\1.\2"),
    (rf"encoder\.layer_norm\.{_PART}", r"backbone.encoder.norm.\1"),
    (rf"{_BLOCK}self_attn\.out_proj\.{_PART}", rf"{_NEW_BLOCK}attention.out.\2"),
    (rf"{_BLOCK}self_attn_layer_norm\.{_PART}", rf"{_NEW_BLOCK}attention_norm.\2"),
    (rf"{_BLOCK}fc1\.{_PART}", rf"{_NEW_BLOCK}up.\2"),
    (rf"{_BLOCK}fc2\.{_PART}", rf"{_NEW_BLOCK}down.\2"),
    (rf"{_BLOCK}final_layer_norm\.{_PART}", rf"{_NEW_BLOCK}ffn_norm.\2"),
)
QUERY_KEY_VALUE = re.compile(rf"{_BLOCK}self_attn\.([qkv])_proj\.{_PART}")
AVERAGE = "_ema"


def import_checkpoint(path: str | Path, folder: str | Path) -> Imported:
    """Read a checkpoint and write it as a model folder, which `load_objective` and `load_backbone` open.

    Raises HarkenError when the folder holds something already, when the checkpoint cannot be read, when it is of
    another model, or when it has an option that harken does not support.
    """
    return import_one(read_pretrained, "fairseq", path, folder)


def read_pretrained(path: str | Path) -> Imported:
    """Read a pretrained checkpoint; see `import_checkpoint` for what is raised."""
    path = Path(path)
    state = read_checkpoint(path)
    if not isinstance(state, Mapping) or not isinstance(state.get("model"), Mapping):
        raise HarkenError(f"{path} is no fairseq checkpoint: expected a `model` in it")
    groups = read_options(state, path)
    if kind_of(groups["model"]) in FINETUNED:
        return read_finetuned(state, groups, NAMES, QUERY_KEY_VALUE, _updates(state), path)
    check_supported(groups["model"], path)
    kind, model_weights = kind_of(groups["model"]), dict(state["model"])
    average = model_weights.pop(AVERAGE, None) if kind == "data2vec_audio" else None
    weights = convert_weights(model_weights, path)
    symbols: tuple[tuple[str, ...], ...] = ()
    notes = not_carried_over(groups)
    match kind:
        case "wav2vec2":
            slots = wav2vec2_config(groups)
            weights["quantizer.codebook"] = _codebook(weights, slots["objective"], path)
            targets = "codebooks: {groups} of {entries} entries".format(**slots["objective"])
        case "data2vec_audio":
            slots = data2vec_config(groups)
            weights |= _teacher(weights, average, path, notes)
            targets = "the teacher's last {top_layers} layers".format(**slots["objective"])
        case _:
            symbols = _symbols(state)
            classes = _classes(weights, symbols, path)
            slots, targets = hubert_config(groups, classes), classes_line(classes)
    updates = _updates(state)
    try:
        config = from_dict({**slots, **training_config(groups, path.name, updates)})
    except TypeError as error:
        raise HarkenError(f"{path} has an option of a wrong type: {error}") from error
    model = build("objective", config.objective, run=config, backbone=build_backbone(config))
    load_into(model, weights, path)
    return Imported(config, weights, symbols, updates, tuple(notes), targets)


def convert_weights(model: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return fairseq's weights under harken's names, in float32; queries, keys and values become one product.

    Raises HarkenError for weights that harken's model has no place for.
    """
    return rename_weights(model, NAMES, QUERY_KEY_VALUE, path)


def _symbols(state: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    task = state.get("task_state")
    dictionaries = task.get("dictionaries") if isinstance(task, Mapping) else None
    found = [item.fields().get("symbols") for item in dictionaries or [] if isinstance(item, Record)]
    return tuple(tuple(map(str, symbols)) for symbols in found if isinstance(symbols, list))


def _classes(weights: Mapping[str, Tensor], symbols: tuple[tuple[str, ...], ...], path: Path) -> list[int]:
    embeddings = weights.get("codes.embeddings")
    if embeddings is None:
        raise HarkenError(f"{path} has no `label_embs_concat`: the head of HuBERT's pretraining was removed from it")
    classes = [len(unit) for unit in symbols] or [len(embeddings)]
    if sum(classes) != len(embeddings):
        raise HarkenError(f"{path} embeds {len(embeddings)} classes, and its dictionaries have {classes}")
    return classes


def _codebook(weights: Mapping[str, Tensor], objective: Mapping[str, Any], path: Path) -> Tensor:
    """Return fairseq's `vars` `(1, G * V, D)` as harken's codebook `(G, V, D)`."""
    found = weights.get("quantizer.codebook")
    if found is None:
        raise HarkenError(f"{path} has no `quantizer.vars`: the head of wav2vec 2.0's pretraining was removed from it")
    groups, entries = objective["groups"], objective["entries"]
    if found.dim() != 3 or found.shape[1] != groups * entries:
        raise HarkenError(
            f"`quantizer.vars` in {path} must hold {groups} groups of {entries} entries, "
            f"found shape {tuple(found.shape)}"
        )
    return found.view(groups, entries, -1)


def _teacher(weights: Mapping[str, Tensor], average: Any, path: Path, notes: list[str]) -> dict[str, Tensor]:
    """Return the teacher's weights; what fairseq's average does not hold lies before the blocks and is the student's.

    average: fairseq's `_ema`, the weights of its encoder by name. Where it is missing, a note is added to `notes`.
    """
    student, own = "backbone.encoder.", "teacher.encoder."
    found: dict[str, Tensor] = {name: value.clone() for name, value in weights.items() if name.startswith(student)}
    if isinstance(average, Mapping):
        found |= convert_weights({f"encoder.{name}": value for name, value in average.items()}, path)
    else:
        notes.append(f"the teacher: there is no `{AVERAGE}`, so that it starts as a copy of the student")
    return {own + name.removeprefix(student): value for name, value in found.items()}


def _updates(state: Mapping[str, Any]) -> int:
    history = plain(state.get("optimizer_history"))
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates") if isinstance(last, Mapping) else None
    return updates if isinstance(updates, int) else 0
