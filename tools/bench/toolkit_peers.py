"""HuBERT Base of other toolkits for train_step.py, each with its own head and loss as its own training uses them.

usage: toolkit_peers.py PEER OPTIONS.json, PEER being a name of train_step.py --peers; see lockstep.py

minimal_hubert is made of the layers of spidr, so its row is that of both. Masks and labels are the batch's wherever the
toolkit takes them from outside; fairseq and torchaudio draw masks of the same law themselves, of which the number of
masked frames differs a little.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from hubert_peers import CLASSES, PEERS, Options, Peer, PlainLoop, answer_for
from lockstep import Answer, serve
from torch import Tensor, nn
from torch.nn import functional

from harken.core.batch import Batch


class Fairseq(nn.Module):
    """fairseq's HubertModel with the published options. Source: `hubert_base_librispeech.yaml`."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        from fairseq.models.hubert.hubert import HubertConfig, HubertModel

        config = HubertConfig(
            label_rate=50,
            encoder_layers=options.layers,
            encoder_layerdrop=options.layer_drop,
            dropout_input=0.1,
            dropout_features=0.1,
            feature_grad_mult=0.1,
            final_dim=256,
            untie_final_proj=True,
            skip_nomask=False,
            mask_prob=0.8,
        )
        task = SimpleNamespace(sample_rate=16000)
        self.hubert = HubertModel(config, task, [range(CLASSES)])

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean cross entropy of the masked frames, plus the penalty; unmasked logits are made too."""
        padding = torch.zeros_like(batch.inputs, dtype=torch.bool)
        found = self.hubert(batch.inputs, target_list=[batch.targets["labels"][..., 0]], padding_mask=padding)
        (logits,) = self.hubert.get_logits(found, True)
        (targets,) = self.hubert.get_targets(found, True)
        loss: Tensor = functional.cross_entropy(logits, targets) + 10.0 * found["features_pen"]
        return loss


class MinimalHubert(nn.Module):
    """minimal_hubert's HuBERTPretrain; it is of 12 layers and LayerDrop 0.05 and has no options for them."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        from minimal_hubert.model import HuBERTPretrain

        self.hubert = HuBERTPretrain(CLASSES)
        transformer = self.hubert.encoder
        transformer.layers = transformer.layers[: options.layers]
        transformer.layer_drop = options.layer_drop

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean of its loss, which has the penalty in it."""
        labels, mask = batch.targets["labels"][..., 0], batch.targets["mask"]
        loss: Tensor = self.hubert(batch.inputs, labels, mask=mask, attention_mask=None)[0]
        return loss.mean()


class Torchaudio(nn.Module):
    """torchaudio's hubert_pretrain_base, whose logits are those of fairseq."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        from torchaudio.models import hubert_pretrain_base

        self.hubert = hubert_pretrain_base(
            encoder_layer_drop=options.layer_drop, num_classes=CLASSES, feature_grad_mult=0.1
        )
        transformer = self.hubert.wav2vec2.encoder.transformer
        transformer.layers = transformer.layers[: options.layers]

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean cross entropy of the masked frames, plus the penalty; see `Fairseq`."""
        logits, _, penalty = self.hubert(batch.inputs, batch.targets["labels"][..., 0])
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss: Tensor = functional.cross_entropy(logits, target) + 10.0 * penalty
        return loss


MODELS: dict[str, tuple[str, Callable[[Options], nn.Module]]] = {
    "fairseq": ("fairseq.models.hubert.hubert", Fairseq),
    "minimal_hubert": ("minimal_hubert.model", MinimalHubert),
    "torchaudio": ("torchaudio.models", Torchaudio),
}


def begin(name: str, text: str) -> Answer:
    """Return what answers the requests of train_step.py."""
    options = Options(**json.loads(text))
    if name in PEERS:
        return answer_for(PEERS[name](options), options)
    module, make = MODELS[name]
    __import__(module)  # before memory is first read
    peer: Peer = PlainLoop(options, make)
    return answer_for(peer, options)


def main(arguments: list[str]) -> Any:
    """Serve one peer."""
    serve(lambda: begin(arguments[0], arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
