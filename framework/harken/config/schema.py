"""The schema of a run: frozen dataclasses, units in the names, the source of each default beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from harken.config.registry import SlotConfig
from harken.core.errors import HarkenError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the audio is and how it is read.

    train, valid: indexed manifests (Lhotse cuts as JSONL). labels: one packed store for each codebook.
    """

    train: str
    valid: str | None = None
    labels: tuple[str, ...] = ()
    sample_rate: int = 16000
    min_seconds: float = 0.5
    """Shorter cuts are left out and counted. fairseq `min_sample_size` is 32000 (2 s) for LibriSpeech."""
    max_seconds: float = 30.0
    """Longer cuts are left out and counted, unless `crop_seconds` shortens them."""
    crop_seconds: float | None = None
    """Cuts longer than this give a random crop each epoch. fairseq `max_sample_size: 250000` is 15.625 s."""
    speed: tuple[float, ...] = ()
    """Speed factors drawn for each cut and epoch, e.g. [0.9, 1.0, 1.1]. Source: Ko et al. 2015."""
    noise: str | None = None
    """Manifest of noises to mix in."""
    noise_probability: float = 0.5
    noise_snr_db: tuple[float, ...] = (10.0, 20.0)
    """Lowest and highest signal-to-noise ratio in dB."""
    workers: int = 1
    """Loader processes for each rank; 0 reads in the training process."""
    prefetch_batches: int = 8
    max_bad_share: float = 0.01
    """The run stops when more than this share of the cuts read so far could not be read."""

    def __post_init__(self) -> None:
        if self.labels and self.speed:
            raise HarkenError("`data.speed` moves the frames away from `data.labels`: give one of the two, got both")
        if any(not 0.5 <= factor <= 2.0 for factor in self.speed):
            raise HarkenError(f"`data.speed` factors must lie in 0.5..2, got {list(self.speed)}")
        if self.min_seconds > self.max_seconds:
            raise HarkenError(
                f"`data.min_seconds` must be at most `data.max_seconds`, got {self.min_seconds} and {self.max_seconds}"
            )
        if len(self.noise_snr_db) != 2:
            raise HarkenError(f"`data.noise_snr_db` is [lowest, highest], got {list(self.noise_snr_db)}")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much audio goes into a micro-batch and into a step."""

    max_seconds: float
    """Padded audio of a micro-batch. fairseq HuBERT Base: `max_tokens: 1400000` samples = 87.5 s."""
    seconds_per_step: float
    """Audio of an optimiser step over all ranks. HuBERT Base: 32 GPUs x 87.5 s = 2800 s (arXiv 2106.07447, IV-C)."""
    buckets: int = 30
    """Duration buckets; cuts of one micro-batch come from one bucket."""

    def __post_init__(self) -> None:
        if self.max_seconds <= 0 or self.seconds_per_step < self.max_seconds:
            raise HarkenError(
                "`batch.seconds_per_step` must be at least `batch.max_seconds`, and both positive, "
                f"got {self.seconds_per_step} and {self.max_seconds}"
            )

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of a step over all ranks."""
        return max(1, round(self.seconds_per_step / self.max_seconds))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train and what to watch."""

    steps: int
    clip_norm: float = 10.0
    """Total gradient norm allowed; 0 switches clipping off. fairseq HuBERT: `clip_norm: 10.0`."""
    init_from: str | None = None
    """Checkpoint (or export) whose `backbone` weights start this run; the head starts afresh."""
    valid_every_steps: int = 500
    patience: int = 0
    """Stop after this many validations without a better `checkpoint.metric`; 0 never stops."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, used for validation and saved beside them; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """DeepSpeed's typed settings; `deepspeed` is merged over what they make."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run matrix products in half precision (autocast) over float32 weights; auto is bf16 where the
    device has instructions for it, else fp32."""
    activation_checkpointing: bool = False
    offload_optimizer: bool = False
    threads: int = 0
    """CPU threads of a rank; 0 divides the machine's cores among its ranks."""
    bucket_bytes: int = 50_000_000
    timeout_seconds: int = 600
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int = 1000
    keep_last: int = 2
    keep_best: int = 1
    metric: str = "loss"
    """Validation metric that decides which checkpoints are best."""
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise HarkenError(
                f"`checkpoint.keep_last` must be at least 1, got {self.keep_last}: "
                "a run that keeps nothing cannot resume"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = 50
    tensorboard: bool = True
    samples: bool = False
    """Write the ids and a hash of the masks of every micro-batch to samples.jsonl."""
    peak_tflops: float | None = None
    """Peak of the device for model FLOP/s utilisation; measured by a large matrix product when not given."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    seed: int = 1
    frontend: SlotConfig
    encoder: SlotConfig
    objective: SlotConfig
    optimizer: SlotConfig
    schedule: SlotConfig
    data: DataConfig
    batch: BatchConfig
    train: TrainConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.train.patience and self.data.valid is None:
            raise HarkenError("`train.patience` counts validations: it needs `data.valid`, which is not given")
        longest = self.data.crop_seconds or self.data.max_seconds
        if longest > self.batch.max_seconds:
            raise HarkenError(
                "`batch.max_seconds` must hold the longest cut (`data.crop_seconds` or `data.max_seconds`), "
                f"got {self.batch.max_seconds} and {longest}"
            )
