"""Weights of Hugging Face's HuBERT models (`transformers.HubertModel` and the models around it) as harken's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from harken.interop.names import rename_weights

_PART = r"(weight|bias)"
_BLOCK = r"encoder\.layers\.(\d+)\."
_NEW_BLOCK = r"backbone.encoder.blocks.\1."
_CONVOLUTION = r"feature_extractor\.conv_layers\.(\d+)\."
_POSITIONS = r"encoder\.pos_conv_embed\.conv\."
NAMES: tuple[tuple[str, str], ...] = (
    (r"masked_spec_embed", "backbone.mask_embedding"),
    (rf"{_CONVOLUTION}conv\.{_PART}", r"backbone.frontend.layers.\1.conv.\2"),
    (rf"{_CONVOLUTION}layer_norm\.{_PART}", r"backbone.frontend.layers.\1.norm.\2"),
    (rf"feature_projection\.layer_norm\.{_PART}", r"backbone.encoder.input_norm.\1"),
    (rf"feature_projection\.projection\.{_PART}", r"backbone.encoder.project.\1"),
    # files of released models keep the older names, models in memory have the newer ones
    (rf"{_POSITIONS}(weight_g|weight_v|bias)", r"backbone.encoder.positions.\1"),
    (rf"{_POSITIONS}parametrizations\.weight\.original0", "backbone.encoder.positions.weight_g"),
    (rf"{_POSITIONS}parametrizations\.weight\.original1", "backbone.encoder.positions.weight_v"),
    (rf"encoder\.layer_norm\.{_PART}", r"backbone.encoder.norm.\1"),
    (rf"{_BLOCK}attention\.out_proj\.{_PART}", rf"{_NEW_BLOCK}attention.out.\2"),
    (rf"{_BLOCK}layer_norm\.{_PART}", rf"{_NEW_BLOCK}attention_norm.\2"),
    (rf"{_BLOCK}feed_forward\.intermediate_dense\.{_PART}", rf"{_NEW_BLOCK}up.\2"),
    (rf"{_BLOCK}feed_forward\.output_dense\.{_PART}", rf"{_NEW_BLOCK}down.\2"),
    (rf"{_BLOCK}final_layer_norm\.{_PART}", rf"{_NEW_BLOCK}ffn_norm.\2"),
)
QUERY_KEY_VALUE = re.compile(rf"{_BLOCK}attention\.([qkv])_proj\.{_PART}")
PREFIX = "hubert."


def weights_from_hugging_face(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a backbone under harken's names (`backbone.*`), copied in float32.

    state_dict: of a `HubertModel`, or of a model that holds one as `hubert` (`HubertForCTC` and others), whose head is
        left behind. Layer norm after the block (Base) and before it (Large, `do_stable_layer_norm`) have equal names.
        A model that was made without masking has no `masked_spec_embed`, and the result then no `mask_embedding`.
    Raises HarkenError for weights that harken's model has no place for, such as adapters.
    """
    if any(name.startswith(PREFIX) for name in state_dict):
        state_dict = {name.removeprefix(PREFIX): value for name, value in state_dict.items() if name.startswith(PREFIX)}
    return rename_weights(state_dict, NAMES, QUERY_KEY_VALUE, "the state dict")
