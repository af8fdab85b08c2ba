"""What objectives that learn transcripts share: their configuration, tokens and masks, freezing, the CTC loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from harken.config.registry import SlotConfig
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch, Note
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.files import sha256_file
from harken.core.frames import FrameSpec
from harken.data.check import Cuts, Doubt
from harken.data.masking import SpanMask
from harken.data.tokens import BLANK, Tokenizer, load_tokenizer
from harken.data.transcripts import check_transcripts
from harken.encoders.base import Encoded
from harken.nn.attention_decoder import AttentionDecoder, attention_loss
from harken.objectives.base import Objective

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class TranscriptConfig(SlotConfig):
    """Fine-tuning on transcripts. The masks are wav2vec 2.0's form of SpecAugment (arXiv 2006.11477, section 4.3)."""

    whole_cuts: ClassVar[bool] = True

    tokenizer: str
    """List of characters, or a sentencepiece `.model`."""
    mask_probability: float = 0.5
    """Time masks; fairseq `mask_prob`: 0.65 to 0.75 for 10 minutes to 1 hour, 0.5 for 100 hours and more."""
    mask_length: int = 10
    """In frames. fairseq `mask_length`."""
    mask_channel_probability: float = 0.0
    """Share of the encoder's input channels set to zero in spans; fairseq `mask_channel_prob`: 0.25 to 0.75."""
    mask_channel_length: int = 64
    """fairseq `mask_channel_length`."""
    mask_from_epoch: int = 0
    """Epoch, from 0, in which time, channel and band masks begin: CTC leaves its first plateau, where all is blank,
    much sooner without them (docs/LOG.md)."""
    band_masks: int = 0
    """Frequency masks of SpecAugment (arXiv 1904.08779) for frontends with bands; 2 in its LibriSpeech policies."""
    band_mask_width: int = 27
    """Largest width of a frequency mask in bands (F of SpecAugment)."""
    freeze_steps: int = 0
    """Steps in which only the head is trained; fairseq `freeze_finetune_updates`: 10000 for 1 h, 0 for 100 h."""
    freeze_frontend: bool = True
    """fairseq `feature_grad_mult: 0.0` in fine-tuning."""
    layer_decay: float = 1.0
    """Each block below the last has its learning rate multiplied by this once more."""
    head_rate: float = 1.0
    """Factor on the learning rate of what is not the backbone."""
    attention_weight: float = 0.0
    """Weight of the loss of an attention decoder beside the others; 0 has none. It is not searched. icefall
    `attention-decoder-loss-scale`: its CTC/AED results have 0.9 beside 0.1 of CTC (ASR/RESULTS.md), which is 9 here."""
    attention_layers: int = 6
    """Blocks of that decoder. icefall `attention-decoder-num-layers`."""
    attention_dim: int = 512
    """icefall `attention-decoder-dim`."""
    attention_heads: int = 8
    """icefall `attention-decoder-num-heads`."""
    attention_ffn_dim: int = 2048
    """icefall `attention-decoder-feedforward-dim`."""
    attention_dropout: float = 0.1
    """icefall's `AttentionDecoderModel`."""
    label_smoothing: float = 0.1
    """Share of the decoder's targets spread over all classes. icefall `label-smoothing`."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "objective",
            positive=(
                "mask_length",
                "mask_channel_length",
                "attention_layers",
                "attention_dim",
                "attention_heads",
                "attention_ffn_dim",
            ),
            not_negative=(
                "attention_weight",
                "band_masks",
                "band_mask_width",
                "freeze_steps",
                "layer_decay",
                "head_rate",
            ),
            shares=("mask_probability", "mask_channel_probability", "attention_dropout", "label_smoothing"),
        )

    def attention_decoder(self, frame_dim: int, classes: int) -> AttentionDecoder | None:
        """Return the decoder of the auxiliary loss, which is built last so that the other weights do not change."""
        if not self.attention_weight:
            return None
        return AttentionDecoder(
            frame_dim,
            classes,
            dim=self.attention_dim,
            layers=self.attention_layers,
            heads=self.attention_heads,
            ffn_dim=self.attention_ffn_dim,
            dropout=self.attention_dropout,
        )


@dataclass
class TranscriptPrepare:
    """Encodes transcripts and draws the augmentation masks.

    dim, bands: channels of the encoder's input and bands of the frontend, None where it has none. places: outputs for
    each frame. needed: how many of them a transcript needs.
    """

    spec: FrameSpec
    config: TranscriptConfig
    dim: int
    bands: int | None
    train: bool
    places: int = 1
    needed: Callable[[Sequence[int]], int] = len

    def __post_init__(self) -> None:
        self._tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tokenizer": None}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, opened at first use in each process."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config.tokenizer)
        return self._tokenizer

    def check(self, cuts: Cuts) -> Iterator[Doubt]:
        """Yield what is wrong with the transcripts of cuts."""

        def room(samples: int) -> int:
            return self.spec.num_frames(samples) * self.places

        return check_transcripts(cuts, self.tokenizer, room, self.needed)

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `tokens` `(B, U)`, `token_lengths` and `weight` `(B,)`, and in training the masks.

        A transcript that is empty, has characters that the tokenizer lacks or needs more frames than there are gets
        weight 0 and a note.
        """
        sequences, unfit = self._encoded(batch)
        frames = self.spec.num_frames(batch.lengths).tolist()
        places = [count * self.places for count in frames]
        for cut, sequence, have in zip(batch.ids, sequences, places, strict=True):
            if (need := self.needed(sequence)) > have:
                unfit[cut] = Note(
                    "left out",
                    cut,
                    f"the transcript of cut `{cut}` has {len(sequence)} tokens and needs {need} frames, the "
                    f"model gives {have}",
                )
        notes = [unfit[cut] for cut in batch.ids if cut in unfit]
        fits = [cut not in unfit for cut in batch.ids]
        tokens = torch.zeros(len(sequences), max(1, *map(len, sequences)), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        targets = {
            "tokens": tokens,
            "token_lengths": torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64),
            "weight": torch.tensor(fits, dtype=torch.float32),
        }
        if self.train:
            targets.update(self._masks(batch, frames, draws))
        count = float(sum(len(sequence) for sequence, fit in zip(sequences, fits, strict=True) if fit))
        return replace(batch, targets={**batch.targets, **targets}, num_targets=count, notes=(*batch.notes, *notes))

    def _encoded(self, batch: Batch) -> tuple[list[list[int]], dict[str, Note]]:
        """Return the tokens of each cut, none of those that cannot be had, and why not by the cuts' ids."""
        sequences: list[list[int]] = []
        unfit: dict[str, Note] = {}
        for cut, text in zip(batch.ids, batch.texts, strict=True):
            try:
                tokens = self.tokenizer.encode(text)
            except HarkenError as error:
                tokens = []
                unfit[cut] = Note("left out", cut, f"the transcript of cut `{cut}` cannot be encoded: {error}")
            if not tokens:
                unfit.setdefault(cut, Note("left out", cut, f"cut `{cut}` has no transcript"))
            sequences.append(tokens)
        return sequences, unfit

    def _masks(self, batch: Batch, frames: list[int], draws: Sequence[Draws]) -> dict[str, Tensor]:
        """Draw each row's masks; a row of an epoch before `mask_from_epoch` stays whole."""
        own, size = self.config, int(self.spec.num_frames(batch.inputs.shape[1]))
        masked = [own.mask_from_epoch <= drawn.epoch for drawn in draws]
        if not any(masked):
            return {}

        def of_rows(width: int, purpose: str, draw: Callable[[int, np.random.Generator], Mask]) -> Tensor:
            mask = torch.zeros(len(batch.ids), width, dtype=torch.bool)
            for row in np.flatnonzero(masked).tolist():
                drawn = draw(row, draws[row].generator(purpose, batch.ids[row]))
                mask[row, : len(drawn)] = torch.from_numpy(drawn)
            return mask

        masks: dict[str, Tensor] = {}
        if own.mask_probability:
            spans = SpanMask(probability=own.mask_probability, length=own.mask_length)
            masks["mask"] = of_rows(size, "mask", lambda row, rng: spans.draw(frames[row], rng))
        if own.mask_channel_probability:
            few = SpanMask(probability=own.mask_channel_probability, length=own.mask_channel_length, at_least=0)
            masks["channel_mask"] = of_rows(self.dim, "channel mask", lambda _, rng: few.draw(self.dim, rng))
        if own.band_masks and self.bands:
            masks["band_mask"] = of_rows(self.bands, "band mask", lambda _, rng: self._band_mask(rng))
        return masks

    def _band_mask(self, rng: np.random.Generator) -> Mask:
        mask = np.zeros(self.bands or 0, dtype=np.bool_)
        for _ in range(self.config.band_masks):
            width = int(rng.integers(0, self.config.band_mask_width + 1))
            start = int(rng.integers(0, max(1, len(mask) - width)))
            mask[start : start + width] = True
        return mask


def frames_needed(tokens: Sequence[int]) -> int:
    """Return the fewest frames a CTC path needs: one a token, and a blank between two equal neighbours."""
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def ctc_loss(log_probs: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
    """Return the CTC loss of `(B, T, V)` log probabilities summed over the utterances that count.

    Source: Graves et al. 2006.
    """
    losses = functional.ctc_loss(
        log_probs.transpose(0, 1),
        batch.targets["tokens"],
        lengths,
        batch.targets["token_lengths"],
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return (losses * batch.targets["weight"]).sum()


class Recogniser(Objective):
    """An objective that learns transcripts, whose model `harken decode` searches."""

    config: TranscriptConfig
    attention: AttentionDecoder | None

    def attend(self, encoded: Encoded, batch: Batch) -> tuple[Tensor | float, dict[str, tuple[Tensor, Tensor]]]:
        """Return the weighted loss of the attention decoder, and its metric; 0 and none without one."""
        if self.attention is None:
            return 0.0, {}
        tokens, lengths = batch.targets["tokens"], batch.targets["token_lengths"]
        scores = self.attention(tokens, encoded.last, encoded.lengths)
        loss = attention_loss(scores, tokens, lengths, batch.targets["weight"], self.config.label_smoothing)
        return self.config.attention_weight * loss, {
            "loss_attention": (loss.detach(), loss.new_full((), batch.num_targets))
        }

    def attention_flops(self, frames: int) -> float:
        """Count what the attention decoder does for each frame; its part for each token is small beside it."""
        if self.attention is None:
            return 0.0
        width, blocks = self.attention.dim, len(self.attention.blocks)
        return 2.0 * frames * (self.attention.frames.weight.numel() + blocks * 2 * width * width)

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> TranscriptPrepare:
        """Return the transcript encoder; masks are drawn in training only."""
        dim = getattr(config.encoder, "embed_dim", getattr(config.encoder, "dim", 0))
        bands = getattr(config.frontend, "bands", None)
        return TranscriptPrepare(spec, cast(TranscriptConfig, config.objective), dim, bands, train)

    @staticmethod
    def fingerprint(config: RunConfig) -> dict[str, str]:
        """Return the hash of the tokenizer's file."""
        own = cast(TranscriptConfig, config.objective)
        return {"objective.tokenizer": f"sha256 {sha256_file(own.tokenizer)[:16]}"}

    def encode(self, batch: Batch, layers: tuple[int, ...] = ()) -> Encoded:
        """Encode a batch under its masks; layers: which hidden layers to return besides the last."""
        _, x, lengths = self.backbone.embed(batch.inputs, batch.lengths, batch.targets)
        if self.training and self.config.mask_probability and "mask" not in batch.targets:
            x = x + self.backbone.unused_mask().to(x.dtype)  # another rank may be in an epoch that has masks
        return self.backbone.encoder.encode(x, lengths, layers)

    def search_input(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what a search reads, `(B, T, X)` in float32, and the lengths `(B,)` of its utterances in T."""
        raise NotImplementedError

    def rate_scale(self, parameter: str, step: int) -> float:
        """Freeze the backbone for `freeze_steps`, the frontend throughout if so configured; decay rates downwards."""
        own, encoder = self.config, self.backbone.encoder
        if not parameter.startswith("backbone."):
            return own.head_rate
        if step < own.freeze_steps:
            return 0.0
        if parameter.startswith("backbone.frontend."):
            return 0.0 if own.freeze_frontend else own.layer_decay ** (encoder.num_layers + 1)
        return own.layer_decay ** (encoder.num_layers - encoder.depth(parameter.removeprefix("backbone.encoder.")))
