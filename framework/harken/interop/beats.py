"""Microsoft's BEATs checkpoints as harken models, without its code.

A checkpoint is one dict: `cfg`, the options of the model, and `model`, its state dict. The encoder is WavLM's
(`wavlm.py` reads its names) with deep norm, over patches. Neither head nor mask embedding nor training options are in
it: the folder holds a backbone, and its configuration has HuBERT Base's training and 500 units in their place.
Source: arXiv 2212.09058; `BEATs.py` and `backbone.py` of the released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harken.core.errors import HarkenError
from harken.interop import wavlm
from harken.interop.fairseq_options import GROUPS, backbone_config, check_supported, hubert_config, training_config
from harken.interop.imported import Imported, import_one

NAMES: tuple[tuple[str, str], ...] = (
    (r"patch_embedding\.(weight|bias)", r"backbone.frontend.project.\1"),
    *wavlm.NAMES,
)
BANDS = 128
"""Mel bands that the released code makes; no option has them."""
SAMPLE_RATE = 16000


def import_checkpoint(path: str | Path, folder: str | Path) -> Imported:
    """Read a checkpoint and write it as a model folder, which `load_backbone` and `train.init_from` open.

    Raises HarkenError when the folder holds something already, when the checkpoint cannot be read, when it is of
    another model, or when it has an option that harken does not support.
    """
    return import_one(read_beats, "beats", path, folder)


def read_beats(path: str | Path) -> Imported:
    """Read a checkpoint; see `import_checkpoint` for what is raised."""
    path = Path(path)
    options, model = wavlm.read_parts(path, "BEATs")
    head = {name: value for name, value in model.items() if name.startswith("predictor.")}
    weights = wavlm.rename({name: value for name, value in model.items() if name not in head}, NAMES, path)
    settings = _settings(options, path)
    # masked patches are left out in BEATs' pretraining, so nothing stands for one: zeros, which say nothing
    width = settings["encoder"]["rows"] * settings["encoder"]["dim"]
    weights["backbone.mask_embedding"] = torch.zeros(width)
    config = wavlm.checked(settings, weights, path)
    why = "harken has no audio tagging" if head else "BEATs' pretrained checkpoints hold none"
    return Imported(config, weights, (), 0, (f"the head: {why}",), "classes: none, it holds no head")


def _settings(options: Mapping[str, Any], path: Path) -> dict[str, Any]:
    patch = options.get("input_patch_size")
    if not isinstance(patch, int) or patch < 1 or BANDS % patch:
        raise HarkenError(f"BEATs' `input_patch_size` must divide its {BANDS} bands, {path} has {patch!r}")
    check_supported({**options, "_name": "hubert"}, path)
    groups = {name: options if name in ("model", "task") else {} for name in GROUPS}
    frontend = {
        "name": "patches",
        "sample_rate": SAMPLE_RATE,
        "bands": BANDS,
        "channels": options.get("embed_dim", 512),
        "patch_frames": patch,
        "patch_bands": patch,
        "bias": options.get("conv_bias", False),
    }
    encoder = {
        **backbone_config(groups)["encoder"],
        **wavlm.relative_positions(options, path, "BEATs"),
        "gate_on": "query",
        "rows": BANDS // patch,
        "deep_norm": options.get("deep_norm", False),
    }
    objective = hubert_config(groups, [wavlm.UNITS])["objective"]
    return {"frontend": frontend, "encoder": encoder, "objective": objective, **training_config(groups, path.name, 0)}
