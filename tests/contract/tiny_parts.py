"""The smallest useful settings of every part of the registry, and how contract tests combine them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harken.config.load import from_dict
from harken.config.registry import available, find
from harken.config.saved import save_model
from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.draws import Draws, key
from harken.objectives.saved import build_objective

# of two blocks: in the first one masked tokens are zeros, and so are their queries before the first step
DECODER = {"decoder_layers": 2, "decoder_dim": 16, "decoder_heads": 2, "decoder_ffn_dim": 16, "decoder_dropout": 0.0}
DECODER |= {"decoder_position_kernel": 5}
# what encoders of self-attention have in common
BLOCKS = {"dim": 32, "layers": 2, "heads": 4, "position_kernel": 16, "position_groups": 4}
BLOCKS |= {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0}
TRANSFORMER = {**BLOCKS, "ffn_dim": 64, "layer_drop": 0.0}
# The smallest useful settings of each part: a part that is new to the registry needs a line here to be tested.
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "frontend": {
        "convnext": {
            "bands": 20,
            "channels": 24,
            "maps": [2, 4, 8],
            "dropout": 0.0,
            "start_dropout": 0.0,
            "random_skips": False,
            "gradient_limits": False,
        },
        "filterbank": {"bands": 20, "channels": 24, "subsampling": 2},
        "patches": {"bands": 16, "channels": 12, "patch_frames": 4, "patch_bands": 8},
        "waveform": {"channels": 16},
    },
    "encoder": {
        "causal_convolution": {"dim": 32, "kernels": [2, 3]},
        "conformer": {**BLOCKS, "ffn_dim": 32, "kernel": 7},
        "e_branchformer": {**BLOCKS, "ffn_dim": 32, "gate_dim": 48, "kernel": 7, "merge_kernel": 5},
        "multi_resolution": {**TRANSFORMER, "layers": 3, "stages": [1, 1, 1]},
        "recurrent": {"dim": 32, "layers": 2},
        "transformer": TRANSFORMER,
        "wavlm": {**TRANSFORMER, "position_buckets": 16, "position_max_distance": 40},
        "zipformer": {
            "downsampling": [1, 2, 4],
            "layers": [1, 2, 1],
            "dims": [16, 32, 24],
            "unmasked_dims": [16],
            "ffn_dims": [32],
            "heads": [4],
            "kernels": [7],
            "query_dims": [8],
            "value_dims": [6],
            "position_dim": 16,
            "dropout": 0.0,
            "start_dropout": 0.0,
            "position_dropout": 0.0,
            "random_skips": False,
            "gradient_limits": False,
        },
    },
    "objective": {
        "beats": {"classes": 12, "code_dim": 8, "bands": 20, **DECODER},
        "beats_tokenizer": {"teacher": "TEACHER", "codes": 12, "code_dim": 8, **DECODER},
        "bestrq": {"codes": 16, "code_dim": 8, "bands": 20, "mask_length": 4},
        "cpc": {"steps": 3, "negatives": 8, "heads": 4, "ffn_dim": 32, "dropout": 0.0},
        "ctc": {
            "tokenizer": "TOKENS",
            "mask_length": 4,
            "mask_channel_probability": 0.2,
            "mask_channel_length": 4,
            "band_masks": 1,
        },
        "data2vec": {"mask_length": 4, "top_layers": 2},
        "data2vec2": {
            "mask_length": 2,
            "top_layers": 2,
            "clones": 2,
            "decoder_dim": 16,
            "decoder_layers": 2,
            "decoder_kernel": 3,
            "decoder_groups": 2,
        },
        "data2vec_aqc": {
            "mask_length": 4,
            "top_layers": 2,
            "negatives": 8,
            "entries": 6,
            "code_dim": 16,
            "cluster_factor": 4,
        },
        "hubert": {"classes": "CLASSES", "code_dim": 16, "mask_length": 4, "unmasked_weight": 0.5},
        "transducer": {
            "tokenizer": "TOKENS",
            "mask_length": 4,
            "band_masks": 1,
            "predictor_dim": 16,
            "joiner_dim": 16,
        },
        "unispeech_sat": {
            "classes": "CLASSES",
            "code_dim": 16,
            "mask_length": 4,
            "contrast_layer": 1,
            "instances": 8,
            "entries": 6,
        },
        "wav2vec": {"steps": 3, "negatives": 4},
        "wav2vec2": {"mask_length": 4, "negatives": 8, "entries": 6, "code_dim": 16},
    },
    "optimizer": {"adamw": {}, "scaled_adam": {}},
    "schedule": {
        "constant": {"rate": 1e-3, "warmup_steps": 3},
        "cosine": {"peak": 1e-3, "warmup_steps": 3},
        "eden": {"rate": 1e-3, "lr_steps": 1e6, "lr_hours": 1e6, "warmup_steps": 3},
        "infinite": {"peak": 1e-3, "constant": 4e-4, "warmup_steps": 3, "cooldown_steps": 20},
        "linear": {"peak": 1e-3, "warmup_steps": 3},
        "tri_stage": {"peak": 1e-3},
        "warmup_stable_decay": {"peak": 1e-3, "warmup_steps": 3},
    },
}
# Settings beside the default ones that change what a part computes.
VARIANTS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("frontend", "filterbank"): [
        {},
        {"convolution": "time_frequency", "subsampling": 4, "maps": 4},
        {"subsampling": 1},
    ],
    ("frontend", "waveform"): [{}, {"norm": "layer", "bias": True, "normalize": True}],
    ("encoder", "causal_convolution"): [{}, {"skip": False}],
    ("encoder", "multi_resolution"): [
        {},
        {"layers": 5, "stages": [1, 1, 1, 1, 1], "factors": [2, 3], "kernel": 3, "norm_first": True},
    ],
    ("encoder", "recurrent"): [{}, {"cell": "gru"}],
    ("encoder", "transformer"): [
        {},
        {"norm_first": True, "position_kernel": 15},
        {"position_kernel": 14, "position_depth": 3},
        {"rows": 2, "positions": "grid"},
    ],
    ("encoder", "wavlm"): [{}, {"norm_first": True}, {"rows": 2, "deep_norm": True, "gate_on": "query"}],
    ("encoder", "zipformer"): [
        {},
        {"causal": True},
        {"causal": True, "chunk_frames": [8], "left_frames": [16], "eval_chunk_frames": 8, "eval_left_frames": 16},
    ],
    ("objective", "beats"): [{}, {"targets": "labels", "mask_length": 2}],
    ("objective", "bestrq"): [{}, {"codebooks": 3}],
    ("objective", "cpc"): [{}, {"predictor": "linear", "mean_product": False, "first_step": 2}],
    ("objective", "ctc"): [{}, {"head_upsampling": 2, "intermediate_layers": [1]}],
    ("objective", "data2vec"): [{}, {"beta": 0.5, "loss_scale": 2.0, "targets": "block"}],
    ("objective", "data2vec2"): [{}, {"inverse_mask": True, "normalize_targets": True, "utterance_weight": 1.0}],
    ("objective", "data2vec_aqc"): [{}, {"views": "both", "beta": 0.5}, {"contrast_weight": 0.0}],
    ("objective", "hubert"): [
        {},
        {"head": "linear"},
        {"predict_layers": [1, 2], "head": "linear"},
        {"predict_layers": [1, 2], "swap_layers": [1]},
    ],
    ("objective", "transducer"): [{}, {"ctc_weight": 0.2, "prune_range": 2, "context": 1}],
    ("objective", "unispeech_sat"): [{}, {"contrast_layer": 2, "contrast_norm": True, "predict_layers": [1, 2]}],
    ("objective", "wav2vec"): [{}, {"first_step": 3, "negative_weight": 0.5}],
    ("objective", "wav2vec2"): [
        {},
        {"quantizer_dim": 24, "groups": 3, "mask_probability": 0.3},
        {"views": "context"},
        {"views": "both", "projection": "mlp"},
    ],
}


def tiny(slot: str, name: str) -> dict[str, Any]:
    if name not in TINY[slot]:
        pytest.fail(f"add settings for the {slot} `{name}` to TINY in {__file__}, so that it is tested")
    return {"name": name, **TINY[slot][name]}


Variant = tuple[str, dict[str, Any]]  # a name of a slot and changes to its tiny configuration


def variants(slot: str) -> list[Variant]:
    return [(name, changes) for name in available(slot) for changes in VARIANTS.get((slot, name), [{}])]


def label_of(variant: tuple[str, dict[str, Any]]) -> str:
    name, changes = variant
    return "+".join([name, *(f"{key}={value}" for key, value in changes.items())])


def make_config(
    corpus, objective, frontend, encoder, optimizer: str = "adamw", schedule: str = "constant"
) -> RunConfig:
    from harken.units.store import LabelStore

    settings = corpus.settings("hubert", "filterbank")
    for slot, (name, changes) in (("objective", objective), ("frontend", frontend), ("encoder", encoder)):
        settings[slot] = {**tiny(slot, name), **changes}
    settings["optimizer"], settings["schedule"] = tiny("optimizer", optimizer), tiny("schedule", schedule)
    for field, value in settings["objective"].items():
        if value == "TOKENS":
            settings["objective"][field] = str(corpus.tokens)
        elif value == "CLASSES":
            settings["objective"][field] = [LabelStore(corpus.labels).card.clusters]
        elif value == "TEACHER":
            settings["objective"][field] = str(save_teacher(corpus, settings))
    return from_dict(settings)


def save_teacher(corpus, settings: dict[str, Any]) -> Path:
    """Save a fresh backbone of the same frames and rows."""
    backbone = {"frontend": settings["frontend"], "encoder": settings["encoder"]}
    folder = corpus.root / f"teacher-{key(json.dumps(backbone)):x}"
    if not folder.is_dir():
        config = from_dict({**corpus.settings("hubert", "filterbank"), **backbone})
        folder.mkdir()
        save_model(folder, config, build_objective(config).state_dict())
    return folder


def agree(objective: str, encoder: str) -> bool:
    """An objective that predicts the future is for encoders that do not see it."""
    return find("encoder", encoder).build.causal or not find("objective", objective).build.needs_causal


def encoder_for(objective: str) -> str:
    """The encoder of a test over objectives."""
    return "transformer" if agree(objective, "transformer") else "causal_convolution"


DRAWS = Draws(5, 2)


def drawn(prepare, batch: Batch, draws: Draws = DRAWS) -> Batch:
    """Prepare a batch whose rows are of one epoch."""
    return prepare(batch, [draws] * len(batch.ids))
