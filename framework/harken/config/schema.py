"""The schema of a run: frozen dataclasses, units in the names, the source of each default beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from harken.config.agreement import check_agreement
from harken.config.registry import SlotConfig
from harken.config.rules import check_factors, check_numbers
from harken.core.errors import HarkenError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the audio is and how it is read."""

    train: str
    """Indexed manifest that is trained on (Lhotse cuts as JSONL, made by `harken data scan`), or a mixture of several:
    a `.yaml` that states their shares. Or a stream: a folder of Lhotse Shar or WebDataset, tars by brace expansion,
    URLs, `pipe:COMMAND`, a list of these in a `.txt`."""
    valid: str | None = None
    """Indexed manifest for validation, read whole: no crop, no augmentation. None validates never."""
    labels: tuple[str, ...] = ()
    """One label store (`harken units label`) for each codebook, with the cuts of `train` and of `valid`."""
    valid_labels: tuple[str, ...] = ()
    """The stores of `valid` where it was labelled apart, by the same clusterers; those of `labels` when empty."""
    sample_rate: int = 16000
    """Samples a second that audio is resampled to; equals `frontend.sample_rate`. fairseq task `sample_rate`."""
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
    """Share of the cuts that get noise, drawn anew each epoch."""
    noise_snr_db: tuple[float, ...] = (10.0, 20.0)
    """Lowest and highest signal-to-noise ratio in dB."""
    mixing_probability: float = 0.0
    """Share of the cuts over a part of which another utterance or a noise is mixed, drawn anew each epoch. 0.2 in WavLM
    (arXiv 2110.13900)."""
    mixing_speech: str | None = None
    """Manifest of the utterances to mix in; those of `train` when None."""
    mixing_noise: str | None = None
    """Manifest of noises to mix in; without one, utterances alone are."""
    mixing_noise_probability: float = 0.1
    """Share of the mixed cuts that get a noise, and no utterance. WavLM's p_n."""
    mixing_speech_snr_db: tuple[float, ...] = (-5.0, 5.0)
    """Lowest and highest ratio in dB to an utterance that is mixed in. WavLM, algorithm 1."""
    mixing_noise_snr_db: tuple[float, ...] = (-5.0, 20.0)
    """Lowest and highest ratio in dB to a noise that is mixed in. WavLM, algorithm 1."""
    mixing_max_share: float = 0.5
    """Largest share of a cut that is mixed, so that its own speaker stays the main one. WavLM, algorithm 1."""
    reverberation: str | None = None
    """Manifest of room impulse responses, recorded or of `harken data rooms`; labels stay those of the clean speech."""
    reverberation_probability: float = 0.3
    """Share of the cuts that sound in a room, drawn anew each epoch. XEUS's p_r (arXiv 2407.00837 section 4.2)."""
    workers: int = 1
    """Loader processes for each rank; 0 reads in the training process."""
    prefetch_batches: int = 8
    """Micro-batches that each loader process reads ahead."""
    max_bad_share: float = 0.01
    """The run stops when more than this share of the cuts read so far could not be read, and does not begin when more
    have no transcript, one longer than their frames, or no labels of their own."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "data",
            positive=("sample_rate", "max_seconds", "crop_seconds", "prefetch_batches"),
            not_negative=("min_seconds", "workers"),
            shares=(
                "noise_probability",
                "mixing_probability",
                "mixing_noise_probability",
                "mixing_max_share",
                "reverberation_probability",
                "max_bad_share",
            ),
        )
        if self.valid_labels and len(self.valid_labels) != len(self.labels):
            raise HarkenError(
                "`data.valid_labels` must name as many stores as `data.labels`, one for each codebook, "
                f"got {len(self.valid_labels)} and {len(self.labels)}"
            )
        if self.labels and self.speed:
            raise HarkenError("`data.speed` moves the frames away from `data.labels`: give one of the two, got both")
        if any(not 0.5 <= factor <= 2.0 for factor in self.speed):
            raise HarkenError(f"`data.speed` factors must lie in 0.5..2, got {list(self.speed)}")
        if self.min_seconds > self.max_seconds:
            raise HarkenError(
                f"`data.min_seconds` must be at most `data.max_seconds`, got {self.min_seconds} and {self.max_seconds}"
            )
        for name in ("noise_snr_db", "mixing_speech_snr_db", "mixing_noise_snr_db"):
            ratios = getattr(self, name)
            if len(ratios) != 2 or ratios[0] > ratios[1]:
                raise HarkenError(f"`data.{name}` is [lowest, highest], got {list(ratios)}")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much audio goes into a micro-batch and into a step."""

    max_seconds: float | Literal["auto"]
    """Padded audio of a micro-batch. fairseq HuBERT Base: `max_tokens: 1400000` samples = 87.5 s. `auto` measures what
    the device's memory holds, by the duration of cuts and the length of texts, before the first step."""
    seconds_per_step: float
    """Audio of an optimiser step over all ranks: a multiple of `max_seconds`, to which it is rounded when off by at
    most 10 %. HuBERT Base: 32 GPUs x 87.5 s = 2800 s (arXiv 2106.07447, IV-C)."""
    parts: int = 2
    """Rectangles of padded audio that a micro-batch may be made of. The first holds the longest cuts, further ones what
    fills the rest; they go through the model one after another. With one, a micro-batch stays 5 to 10 % emptier."""
    mixing: int = 8
    """From how many parts' worth of cuts of neighbouring durations the cuts of one part are drawn. More mixes epochs
    better, and pads more."""
    limits: tuple[tuple[float, ...], ...] = ()
    """What one part may hold, where that is less than `max_seconds`: a list of [seconds, padded seconds], for parts
    whose longest cut has up to that many seconds, or of [seconds, characters, padded seconds], for the longest text
    too. `harken tune-batch` prints it."""
    memory_share: float = 0.9
    """Share of the memory that `max_seconds: auto` fills; the rest is for what a long run adds."""
    memory_gib: float | None = None
    """On a CPU, memory that a rank may use in all, in GiB: more is refused to it, as a GPU does. None: with `auto`, a
    rank's share of what is free; else no limit."""

    def __post_init__(self) -> None:
        check_numbers(
            self, "batch", positive=("parts", "mixing", "memory_gib", "memory_share"), shares=("memory_share",)
        )
        if any(len(row) not in (2, 3) or min(row) <= 0 for row in self.limits):
            raise HarkenError(
                "`batch.limits` must be a list of [seconds, padded seconds] or [seconds, characters, padded seconds], "
                f"all positive, got {[list(row) for row in self.limits]}"
            )
        if self.max_seconds == "auto":
            if self.seconds_per_step <= 0:
                raise HarkenError(f"`batch.seconds_per_step` must be positive, got {self.seconds_per_step}")
            if self.limits:
                raise HarkenError(
                    "`batch.limits` is what `batch.max_seconds: auto` measures: give one of the two, got both"
                )
            return
        if self.max_seconds <= 0 or self.seconds_per_step < self.max_seconds:
            raise HarkenError(
                "`batch.seconds_per_step` must be at least `batch.max_seconds`, and both positive, "
                f"got {self.seconds_per_step} and {self.max_seconds}"
            )
        count = self.micro_batches_per_step
        if abs(count * self.max_seconds - self.seconds_per_step) > 0.1 * self.seconds_per_step:
            # rounding it in silence would train with another batch size than the paper's beside which it is set
            below = int(self.seconds_per_step / self.max_seconds)
            near = " or ".join(f"{self.max_seconds * times:g}" for times in (below, below + 1))
            raise HarkenError(
                "`batch.seconds_per_step` must be a multiple of `batch.max_seconds`, within 10 %, "
                f"got {self.seconds_per_step:g} and {self.max_seconds:g}: set it to {near}, or change "
                "`batch.max_seconds`"
            )

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of a step over all ranks."""
        return max(1, round(self.seconds_per_step / self.micro_batch_seconds))

    def times(self, reference_seconds: float | None) -> float:
        """Return how many times `reference_seconds` a step has, 1 when None: a moving average is scaled by it.

        A decay rho that is right for the reference becomes rho ** times, so that it forgets as fast over the audio.
        Source: How to Scale Your EMA, arXiv 2307.13813, definition 1.2; the learning rate has its optimiser's own rule.
        """
        return 1.0 if reference_seconds is None else self.seconds_per_step / reference_seconds

    @property
    def micro_batch_seconds(self) -> float:
        """`max_seconds` as a number; with `auto` it is known after measuring (`harken.train.tune`)."""
        if isinstance(self.max_seconds, str):
            raise HarkenError("`batch.max_seconds: auto` is for training alone: give a number of seconds here")
        return self.max_seconds


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train and what to watch."""

    steps: int
    """Optimiser steps of the whole run, resumed parts included. fairseq `max_update`: 400000 in HuBERT Base."""
    clip_norm: float = 10.0
    """Total gradient norm allowed; 0 switches clipping off. fairseq HuBERT: `clip_norm: 10.0`."""
    init_from: str | None = None
    """Checkpoint (or export) whose `backbone` weights start this run; the head starts afresh."""
    init_fresh_blocks: int = 0
    """Top blocks of the encoder that start afresh, too: those of a pretrained one hold its targets more than speech
    (arXiv 2107.04734, arXiv 2006.05987)."""
    rate_scales: dict[str, Any] = field(default_factory=dict)
    """Factors on the learning rate of parameters and modules by name, such as `backbone.frontend: 0.1`; a parameter has
    the product of those of all that it is in, and of the objective's own. 0 freezes. icefall: a module's `lr_scale`."""
    valid_every_steps: int = 500
    """Steps from one validation to the next; the last step is followed by one in any case."""
    patience: int = 0
    """Stop after this many validations without a better `checkpoint.metric`; 0 never stops."""
    max_skipped_steps: int = 20
    """Steps skipped in a row, their gradient not finite, after which the run goes back to the newest checkpoint from
    before them and on with the data after them; at once when a weight is not finite. 0 never goes back. More than the
    16 skipped steps in which fp16 halves its first loss scale, 65536, down to 1."""
    max_rollbacks: int = 3
    """Times that a run goes back so before it ends with an error."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, used for validation and saved beside them; 0 is off."""
    ema_reference_seconds: float | None = None
    """Audio of the step that `ema_decay` is right for: with another `batch.seconds_per_step` the decay is raised to the
    power of the quotient (arXiv 2307.13813). None takes it as it is."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "train",
            positive=("steps", "valid_every_steps", "ema_reference_seconds"),
            not_negative=("init_fresh_blocks", "clip_norm", "patience", "max_skipped_steps", "max_rollbacks"),
            shares=("ema_decay",),
        )
        check_factors(self.rate_scales, "train.rate_scales")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """DeepSpeed's typed settings; `deepspeed` is merged over what they make."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """What ranks divide among them instead of each keeping it whole: 1 the optimiser's state, 2 gradients too, 3
    weights too. Source: ZeRO, arXiv 1910.02054; DeepSpeed `zero_optimization.stage`. auto is the lowest of 0, 1 and 2,
    the fastest, whose weights, gradients and optimiser state take at most half of the device's memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run matrix products in half precision (autocast) over float32 weights; auto is bf16 where the
    device has instructions for it, else fp32."""
    activation_checkpointing: bool = False
    """Compute each encoder block again in the backward pass instead of keeping its activations: less memory, about a
    third more time. Source: arXiv 1604.06174; fairseq `checkpoint_activations`."""
    compile: bool = False
    """Compile the encoder's blocks (`torch.compile`), for sequences of every length; the first steps then take minutes.
    The log counts the graphs made since its last line, which are 0 after warm-up. Not with ZeRO 2 and 3, activation
    checkpointing and `batch.max_seconds: auto`."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the host's memory. DeepSpeed `zero_optimization.offload_optimizer`."""
    threads: int = 0
    """CPU threads of a rank; 0 divides the machine's cores among its ranks."""
    keep_memory: bool = True
    """On a CPU, keep memory that a step sets free for the next one instead of giving it back to the system, where the C
    library is glibc: 2 to 9 % less time for up to 4 % more memory. Nothing is kept under `batch.memory_gib`."""
    bucket_elements: int = 10_000_000
    """Numbers, of float32 four bytes each, that are reduced and gathered at a time: small enough that sending begins
    early in the backward pass, large enough to use the network. Under ZeRO 1 to 3 DeepSpeed's `reduce_bucket_size` and
    `allgather_bucket_size`."""
    timeout_seconds: int = 600
    """How long a run may make no progress before it is ended, its stacks are written and the rank is named that the
    others wait for; three times as long until the first step is over, while validating and while saving."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Keys of DeepSpeed's own configuration, merged over what harken makes of the fields above."""

    def __post_init__(self) -> None:
        check_numbers(self, "engine", positive=("bucket_elements", "timeout_seconds"), not_negative=("threads",))
        if self.compile and self.activation_checkpointing:
            raise HarkenError(
                "`engine.compile` must be false with `engine.activation_checkpointing`, whose second pass is compiled "
                "in another thread, with other settings"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int = 1000
    """Steps from one checkpoint to the next; one is saved after each validation and at the end in any case."""
    keep_last: int = 2
    """Newest checkpoints that are kept; at least 1, to resume from."""
    keep_best: int = 1
    """Checkpoints with the best `metric` that are kept besides."""
    metric: str = "loss"
    """Validation metric that decides which checkpoints are best."""
    higher_is_better: bool = False
    """Whether a larger `metric` is the better one: false for a loss, true for an accuracy."""

    def __post_init__(self) -> None:
        check_numbers(self, "checkpoint", positive=("every_steps",), not_negative=("keep_best",))
        if self.keep_last < 1:
            raise HarkenError(
                f"`checkpoint.keep_last` must be at least 1, got {self.keep_last}: "
                "a run that keeps nothing cannot resume"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = 50
    """Steps from one log line and record of `metrics.jsonl` to the next."""
    tensorboard: bool = True
    """Write the figures for TensorBoard too, into the run's `tensorboard/`."""
    profile: tuple[int, ...] = ()
    """First step and number of steps that torch.profiler traces on the main process into the run's `profile/`."""
    samples: bool = False
    """Write the ids and a hash of the masks of every micro-batch to samples.jsonl."""
    peak_tflops: float | None = None
    """Peak of the device for model FLOP/s utilisation; measured by a large matrix product when not given."""

    def __post_init__(self) -> None:
        check_numbers(self, "log", positive=("every_steps", "peak_tflops"))
        if self.profile and (len(self.profile) != 2 or min(self.profile) < 1):
            raise HarkenError(
                "`log.profile` must be [] or [first step, number of steps], each 1 or more, such as [100, 5], "
                f"got {list(self.profile)}"
            )


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When a run that goes on without an error is held to have failed (`harken.train.health`), and what then."""

    action: Literal["warn", "stop", "roll_back"] = "warn"
    """What an alarm does besides telling: nothing; end the run with an error; go back to the newest checkpoint from
    before it, on with the data after it, at most `train.max_rollbacks` times."""
    records: int = 3
    """Bad records of the log in a row, of training or of validation, at which an alarm rings."""
    after_steps: int = 1000
    """Steps before which only the labels are judged: CTC begins with blanks alone, fp16 by finding its loss scale."""
    min_perplexity: float = 2.0
    """Least perplexity of the codes or labels of a batch, a mean over codebooks; 1 is a single one."""
    min_rank: float = 1.5
    """Least effective rank of the frontend's and the encoder's outputs on the probe batch; 1 is a single direction."""
    max_skipped_share: float = 0.2
    """Largest share of the steps since the last record that were skipped because their gradient was not finite."""
    max_blank_share: float = 0.999
    """Largest share of frames whose most probable token is CTC's blank."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "health",
            positive=("records",),
            not_negative=("after_steps", "min_perplexity", "min_rank"),
            shares=("max_skipped_share", "max_blank_share"),
        )

    def all_judged(self, step: int) -> bool:
        """Whether every alarm judges a record of a step, not that of the labels alone."""
        return step > self.after_steps


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    seed: int = 1
    """Of the weights and of every draw: order, crops, masks, augmentation, dropout. fairseq `seed`."""
    frontend: SlotConfig
    """Raw audio to frames."""
    encoder: SlotConfig
    """Frames to representations."""
    objective: SlotConfig
    """What is learned: head, targets and loss."""
    optimizer: SlotConfig
    """How gradients change the weights."""
    schedule: SlotConfig
    """The learning rate of each step."""
    data: DataConfig
    """Where the audio is and how it is read."""
    batch: BatchConfig
    """How much audio goes into a micro-batch and into a step."""
    train: TrainConfig
    """How long to train and what to watch."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Precision, memory and processes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save and what to keep."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is written while training."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """When an alarm rings, and what it does."""

    def __post_init__(self) -> None:
        check_agreement(self)
