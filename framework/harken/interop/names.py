"""Other toolkits' weights under harken's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harken.core.errors import HarkenError


def rename_weights(
    weights: Mapping[str, Any],
    names: Sequence[tuple[str, str]],
    query_key_value: re.Pattern[str],
    source: str | Path,
) -> dict[str, Tensor]:
    """Return weights under harken's names, copied in float32; queries, keys and values become one product.

    names: a pattern that matches a whole name, and what harken calls it (an expansion of the match).
    query_key_value: matches `weight` or `bias` of one of these projections, with groups for block, q, k or v, and kind.
    source: where the weights come from, for messages.
    Raises HarkenError for what is no tensor, for weights that harken's model has no place for, and for blocks without
    all three projections.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise HarkenError(f"`{name}` in {source} must be a tensor, found {value!r}")
        tensor = value.detach().to(torch.float32, copy=True).contiguous()
        if found := query_key_value.fullmatch(name):
            block, which, kind = found.groups()
            parts.setdefault(f"backbone.encoder.blocks.{block}.attention.qkv.{kind}", {})[which] = tensor
        elif new := _new_name(name, names):
            renamed[new] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise HarkenError(f"harken's model has no place for these weights of {source}: {', '.join(unknown[:5])}")
    for name, part in parts.items():
        if len(part) != len("qkv"):
            raise HarkenError(f"{source} has {', '.join(sorted(part))} of `{name}`, expected q, k and v")
        renamed[name] = torch.cat([part[which] for which in "qkv"])
    return renamed


def _new_name(name: str, names: Sequence[tuple[str, str]]) -> str | None:
    for pattern, template in names:
        if found := re.fullmatch(pattern, name):
            return found.expand(template)
    return None
