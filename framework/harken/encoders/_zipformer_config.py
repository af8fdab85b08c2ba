"""What `encoder:` may hold for a Zipformer."""

from __future__ import annotations

from dataclasses import dataclass

from harken.config.registry import SlotConfig
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError

_SIZES = ("layers", "dims", "ffn_dims", "heads", "kernels", "query_dims", "value_dims", "position_head_dims")
_STACKED = (*_SIZES, "unmasked_dims")


@dataclass(frozen=True, kw_only=True)
class ZipformerConfig(SlotConfig):
    """Defaults are those of k2SSL's pretraining recipe (arXiv 2411.17100; icefall `egs/librispeech/SSL/zipformer`): its
    stacks are those of Zipformer M (arXiv 2310.11230 table 5). Lists have an entry for each stack, or one for all.
    """

    downsampling: tuple[int, ...] = (1, 2, 4, 8, 4, 2)
    """Frames that one frame of each stack stands for; the list says how many stacks there are. icefall
    `downsampling_factor`."""
    layers: tuple[int, ...] = (2, 2, 3, 4, 3, 2)
    """Blocks. icefall `num_encoder_layers`."""
    dims: tuple[int, ...] = (192, 256, 384, 512, 384, 256)
    """Widths. The first is that of embedded frames, the largest that of a representation. icefall `encoder_dim`."""
    unmasked_dims: tuple[int, ...] = (192, 192, 256, 256, 256, 192)
    """Channels that are never masked; in training a sequence loses all above, or half of them, with probability 0.125
    each. icefall `encoder_unmasked_dim`."""
    ffn_dims: tuple[int, ...] = (512, 768, 1024, 1536, 1024, 768)
    """Inner width of the second of a block's three feed-forwards; the others have 3/4 and 5/4 of it. icefall
    `feedforward_dim`."""
    heads: tuple[int, ...] = (4, 4, 4, 8, 4, 4)
    """Attention heads. icefall `num_heads`."""
    kernels: tuple[int, ...] = (31, 31, 15, 15, 15, 31)
    """Frames, at the stack's rate, of the depthwise convolutions; odd. icefall `cnn_module_kernel`."""
    query_dims: tuple[int, ...] = (32,)
    """Width of a head's queries and keys. icefall `query_head_dim`."""
    value_dims: tuple[int, ...] = (12,)
    """Width of a head's values. icefall `value_head_dim`."""
    position_head_dims: tuple[int, ...] = (4,)
    """Width of a head's projected positions. icefall `pos_head_dim`."""
    position_dim: int = 48
    """Width of a vector of relative positions, even. icefall `pos_dim`."""
    input_norm: bool = True
    """Layer norm before the projection of the frontend's frames, as in HuBERT and k2SSL; false with a frontend that
    ends in a norm, as the ConvNeXt filterbank of the recogniser does."""
    input_dropout: float = 0.0
    """Of the projected frames. icefall SSL `dropout_input`."""
    dropout: float = 0.1
    """Of channels inside feed-forwards, from step 20000 on. icefall `dropout`."""
    start_dropout: float = 0.3
    """The same at step 0; it goes to `dropout` on a line."""
    position_dropout: float = 0.15
    """Of the vectors of relative positions. icefall `CompactRelPositionalEncoding`."""
    warmup_steps: int = 4000
    """Steps by which the blocks have come in, one stack after the other. icefall `warmup_batches`."""
    random_skips: bool = True
    """In training, sequences pass over attention, convolutions, feed-forwards, positions, channels and whole blocks at
    random, by icefall's schedules."""
    constant_attention: bool = False
    """In training, now and then give non-linear attention equal weights. Published k2SSL models: false, as a slip in
    that recipe (`not self.training`) keeps its `const_attention_rate` from ever acting. Published recognisers: true,
    what its authors meant. Needs `random_skips`."""
    gradient_limits: bool = True
    """Balancers, whiteners and limits of parameters and attention scores, which change gradients alone, in training."""
    attend_to_padding: bool = False
    """Let real frames see padded ones, as k2SSL does, which gives its encoder no padding mask: an utterance's output
    then depends on its batch."""
    schedule_start: float = 0.0
    """Step at which all schedules begin: 100000, behind them all, for fine-tuning as icefall does."""
    schedule_scale: float = 1.0
    """Steps of the schedules to one of the run. They are meant for 600 s of audio a step (icefall `ref_duration`)."""
    causal: bool = False
    """Convolutions that see their chunk and what is before it, so that the encoder can be used on streams. icefall
    `causal`."""
    chunk_frames: tuple[int, ...] = (0,)
    """Chunks, of frames at the encoder's input, one of which each micro-batch draws in training; 0 is no chunks.
    icefall `chunk_size`, with -1 for 0: 16, 32, 64, -1 in its streaming models."""
    left_frames: tuple[int, ...] = (0,)
    """Frames that chunks see of what is before them, drawn likewise, rounded down to chunks; 0 is all. icefall
    `left_context_frames`: 64, 128, 256, -1."""
    eval_chunk_frames: int = 0
    """The chunk outside training, and of streams."""
    eval_left_frames: int = 0
    """The left context outside training, and of streams."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "encoder",
            positive=(*_STACKED, "downsampling", "position_dim", "schedule_scale"),
            not_negative=(
                "warmup_steps",
                "schedule_start",
                "chunk_frames",
                "left_frames",
                "eval_chunk_frames",
                "eval_left_frames",
            ),
            shares=("input_dropout", "dropout", "start_dropout", "position_dropout"),
        )
        mistakes = [
            f"`encoder.{name}` must have 1 or {len(self.downsampling)} entries, as many as `encoder.downsampling`, "
            f"got {len(getattr(self, name))}"
            for name in _STACKED
            if len(getattr(self, name)) not in (1, len(self.downsampling))
        ]
        if self.position_dim % 2:
            mistakes.append(f"`encoder.position_dim` must be even, got {self.position_dim}")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            mistakes.append(f"`encoder.kernels` must be odd, got {list(self.kernels)}")
        if not self.chunk_frames or not self.left_frames or not self.downsampling:
            mistakes.append(
                "`encoder.downsampling`, `chunk_frames` and `left_frames` must have an entry, got an empty list"
            )
        if not mistakes:
            mistakes = self._across_fields()
        if mistakes:
            raise HarkenError("\n".join(mistakes))

    def _across_fields(self) -> list[str]:
        mistakes = []
        for unmasked, dim in zip(self.per_stack("unmasked_dims"), self.per_stack("dims"), strict=True):
            if unmasked > dim:
                mistakes.append(f"`encoder.unmasked_dims` must be at most `encoder.dims`, got {unmasked} and {dim}")
        chunks = {size for size in (*self.chunk_frames, self.eval_chunk_frames) if size}
        if chunks and not self.causal:
            mistakes.append(
                f"`encoder.causal` must be true to work in chunks, got chunks of {sorted(chunks)} and false"
            )
        mistakes += [
            "`encoder.chunk_frames` and `eval_chunk_frames` must be multiples of every `encoder.downsampling`, "
            f"got {size} and {list(self.downsampling)}"
            for size in sorted(chunks)
            if any(size % factor for factor in self.downsampling)
        ]
        return mistakes

    def per_stack(self, name: str) -> tuple[int, ...]:
        """Return the entries of a list, one for each stack."""
        values: tuple[int, ...] = getattr(self, name)
        return values * len(self.downsampling) if len(values) == 1 else values

    @property
    def embed_dim(self) -> int:
        """Width of embedded frames: what masks of channels cover."""
        return self.dims[0]
