"""The two models of hubert_step.py, each of which takes training steps on batches that depend on the step alone.

usage: hubert_peers.py {harken,harken_fasthubert,hugging_face} OPTIONS.json, and then requests as in lockstep.py
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from lockstep import Answer, serve
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from harken.config.schema import RunConfig
from harken.core import draws
from harken.core.batch import Batch
from harken.core.frames import FrameSpec, Window
from harken.data.masking import SpanMask
from harken.frontends.waveform import WaveformConfig

CLASSES = 504
CODE_DIM = 256
TEMPERATURE = 0.1
CLIP_NORM = 10.0
RATE = 1e-5  # any small rate costs the same; HuBERT's peak without its warm-up would end in numbers that are not finite
CHECK = 1 << 20  # the batch that outputs are compared on: no training step has it


@dataclass(frozen=True)
class Options:
    """What both models share."""

    layers: int
    seconds: float
    batch: int
    threads: int
    precision: str
    attention: str
    layer_drop: float
    seed: int
    compiled: bool = False
    device: str = "cpu"


class Peer(Protocol):
    """A model that takes steps, built after its imports; see `ComparedPeer` for `folder`."""

    def build(self, folder: Path) -> int:
        """Make the model and its optimiser; return the number of parameters."""
        ...

    def step(self, batch: Batch, step: int) -> tuple[float, float]:
        """Take a training step; return its seconds and mean loss."""
        ...


class ComparedPeer(Peer, Protocol):
    """One of the two of hubert_step.py: built from one set of weights (`folder/weights.safetensors`)."""

    def encode(self, batch: Batch) -> tuple[Tensor, float]:
        """Return the last hidden states `(B, T, D)` of unmasked audio, and the mean loss, without dropout."""
        ...


def random_targets(
    rng: np.random.Generator, span: SpanMask, rows: int, frames: int, classes: int
) -> tuple[dict[str, Tensor], float]:
    """Return masks and labels `(rows, frames)` as HuBERT's `prepare` makes them, and the number of masked frames."""
    mask = np.stack([span.draw(frames, rng) for _ in range(rows)])
    targets = {
        "labels": rng.integers(0, classes, (rows, frames, 1)),
        "counted": mask.sum(1),
        "mask": mask,
        "masked": np.flatnonzero(mask),
        "unmasked": np.flatnonzero(~mask),
    }
    return {name: torch.from_numpy(values) for name, values in targets.items()}, float(mask.sum())


def make_batch(options: Options, step: int) -> Batch:
    """Return the noise, masks and labels of a step; HuBERT Base's masks, no padding."""
    own = WaveformConfig(name="waveform")
    windows = tuple(Window(k, s) for k, s in zip(own.kernels, own.strides, strict=True))
    samples = round(options.seconds * own.sample_rate)
    frames = int(FrameSpec(windows, own.sample_rate).num_frames(samples))
    rng = draws.Draws(options.seed, step).generator("benchmark")
    inputs = rng.standard_normal((options.batch, samples), dtype=np.float32) * 0.1
    targets, count = random_targets(rng, SpanMask(), options.batch, frames, CLASSES)
    return Batch(
        ids=tuple(f"noise-{row}" for row in range(options.batch)),
        inputs=torch.from_numpy(inputs),
        lengths=torch.full((options.batch,), samples),
        targets=targets,
        num_targets=count,
    )


def digest(batch: Batch) -> str:
    """Return a hash of everything in a batch, by which the parent sees that both models had the same."""
    found = hashlib.blake2b(batch.inputs.numpy().tobytes(), digest_size=8)
    for name in sorted(batch.targets):
        found.update(batch.targets[name].numpy().tobytes())
    return found.hexdigest()


def configuration(options: Options, preset: str = "hubert_base") -> RunConfig:
    """Return that of a preset of HuBERT Base's size with the sizes of a benchmark."""
    from harken.config.load import load

    changes = ["data.train=none", f"objective.classes=[{CLASSES}]", f"encoder.layers={options.layers}"]
    changes += [f"encoder.layer_drop={options.layer_drop}", f"train.clip_norm={CLIP_NORM}"]
    changes += [f"engine.precision={options.precision}", f"engine.threads={options.threads}"]
    if preset == "fasthubert_base":  # a middle layer and the last, as the preset has
        changes += [f"objective.predict_layers={sorted({-(-options.layers // 3), options.layers})}"]
    return load([preset], changes).config


class Harken:
    """harken as it trains: its objective, its DeepSpeed engine, its AdamW."""

    preset, shares_weights = "hubert_base", True

    def __init__(self, options: Options) -> None:
        from harken.engine.deepspeed import DeepSpeedEngine, start_processes
        from harken.interop import hugging_face  # noqa: F401  imported before memory is first read

        self.options = options
        self.config = configuration(options, self.preset)
        start_processes(self.config.engine)
        # DeepSpeed imports much of itself and of torch when it is first used: that is no memory of the model's
        DeepSpeedEngine(nn.Linear(1, 1), self._optimizer, self.config.engine, self.config.train)

    def build(self, folder: Path) -> int:
        """Build the model from Hugging Face's weights; see `Peer`."""
        from harken.config.registry import build
        from harken.config.saved import load_into
        from harken.encoders.backbone import build_backbone
        from harken.engine.deepspeed import DeepSpeedEngine
        from harken.interop.hugging_face import weights_from_hugging_face

        model = build("objective", self.config.objective, run=self.config, backbone=build_backbone(self.config))
        # train_step.py runs without Hugging Face too
        if self.shares_weights and (folder / "weights.safetensors").is_file():
            theirs = load_file(folder / "weights.safetensors")
            head = {name: theirs.pop(name) for name in ("project.weight", "project.bias", "codes.embeddings")}
            load_into(model, {**weights_from_hugging_face(theirs), **head}, folder / "weights.safetensors")
        if self.options.compiled:
            model.compile_blocks()
        self.engine = DeepSpeedEngine(model, self._optimizer, self.config.engine, self.config.train)
        self.model = model
        return parameters_of(model)

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        from harken.config.registry import build
        from harken.optim.groups import parameter_groups

        groups = parameter_groups(module, lambda *_: 1.0)
        optimizer: torch.optim.Optimizer = build("optimizer", self.config.optimizer, groups=groups)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        return optimizer

    def encode(self, batch: Batch) -> tuple[Tensor, float]:
        """See `ComparedPeer`."""
        with _evaluating(self.model):
            total, count = self.model(batch).metrics["loss"]
            return self.model.backbone(batch.inputs, batch.lengths).last, float(total / count)

    def step(self, batch: Batch, step: int) -> tuple[float, float]:
        """See `Peer`."""
        draws.begin_micro_batch(self.options.seed, step, 0)
        batch = batch.to(torch.device(self.options.device))
        started = clock(self.options.device)
        loss = self.engine(batch)
        self.engine.backward(loss.total / batch.num_targets, last=True)
        self.engine.reduce()
        self.engine.step()
        seconds = clock(self.options.device) - started
        total, count = loss.metrics["loss"]
        return seconds, float(total / count)


class FastHubert(Harken):
    """harken's Fast-HuBERT: the same encoder behind a filterbank at half the frames, two layers predicted."""

    preset, shares_weights = "fasthubert_base", False

    def step(self, batch: Batch, step: int) -> tuple[float, float]:
        """Take a step on the same audio with masks and labels of its own frames; see `Peer`."""
        own, frames = cast(Any, self.config.objective), int(self.model.backbone.spec.num_frames(batch.inputs.shape[1]))
        rng = draws.Draws(self.options.seed, step).generator("fast")
        span = SpanMask(probability=own.mask_probability, length=own.mask_length)
        targets, count = random_targets(rng, span, len(batch.ids), frames, CLASSES)
        return super().step(replace(batch, targets=targets, num_targets=count), step)


class Codes(nn.Module):
    """HuBERT's code embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.rand(CLASSES, CODE_DIM))


class HuggingFaceHubert(nn.Module):
    """HubertModel under a head whose cost is linear in frames: the same projection and cosine logits as harken's."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        from transformers import HubertConfig, HubertModel

        config = HubertConfig(
            num_hidden_layers=options.layers,
            hidden_dropout=0.1,
            attention_dropout=0.1,
            activation_dropout=0.0,
            feat_proj_dropout=0.1,
            layerdrop=options.layer_drop,
            attn_implementation=options.attention,
        )
        self.hubert = HubertModel(config)
        self.project = nn.Linear(config.hidden_size, CODE_DIM)
        self.codes = Codes()

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean cross entropy of the masked frames."""
        index = batch.targets["masked"]
        hidden = self.hubert(batch.inputs, mask_time_indices=batch.targets["mask"]).last_hidden_state
        x = functional.normalize(self.project(hidden.flatten(0, 1)[index]).float(), dim=-1)
        codes = functional.normalize(self.codes.embeddings, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            logits = x @ codes.T / TEMPERATURE
        return functional.cross_entropy(logits, batch.targets["labels"].flatten()[index])


class PlainLoop:
    """A model in a plain torch loop, with the optimiser and the clipping that harken has.

    A model maps a batch to the mean loss of its masked frames and is made by `make`.
    """

    def __init__(self, options: Options, make: Callable[[Options], nn.Module]) -> None:
        torch.set_num_threads(options.threads)
        self.options, self.make = options, make

    def build(self, folder: Path) -> int:
        """Build the model with random weights; see `Peer`."""
        torch.manual_seed(self.options.seed)
        self.model = self.make(self.options).train().to(self.options.device)
        if self.options.compiled:
            self.model.compile()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
        )
        return parameters_of(self.model)

    def step(self, batch: Batch, step: int) -> tuple[float, float]:
        """See `Peer`."""
        torch.manual_seed(draws.key(self.options.seed, step) & (2**63 - 1))
        device = self.options.device
        batch = batch.to(torch.device(device))
        context: AbstractContextManager[Any] = nullcontext()
        if self.options.precision == "bf16":
            context = torch.autocast(device, dtype=torch.bfloat16)
        started = clock(device)
        with context:
            loss = self.model(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return clock(device) - started, float(loss.detach())


class HuggingFace(PlainLoop):
    """transformers.HubertModel, whose weights harken begins with."""

    def __init__(self, options: Options) -> None:
        from transformers import HubertModel  # noqa: F401  imported before memory is first read

        super().__init__(options, HuggingFaceHubert)

    def build(self, folder: Path) -> int:
        """Build the model with random weights and write them; see `Peer`."""
        count = super().build(folder)
        weights = {name.removeprefix("hubert."): value for name, value in self.model.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        return count

    def encode(self, batch: Batch) -> tuple[Tensor, float]:
        """See `ComparedPeer`."""
        with _evaluating(self.model):
            hubert = cast(nn.Module, self.model.hubert)
            return hubert(batch.inputs).last_hidden_state, float(self.model(batch))


def clock(device: str) -> float:
    """Return the seconds of a clock, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def parameters_of(model: nn.Module) -> int:
    """Return how many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def _memory_now() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PEERS: dict[str, Callable[[Options], Peer]] = {
    "harken": Harken,
    "harken_fasthubert": FastHubert,
    "hugging_face": HuggingFace,
}


def answer_for(peer: Peer, options: Options) -> Answer:
    """Return what answers `build`, `step`, `memory` and, of a `ComparedPeer`, `encode`; its imports are made."""
    on_gpu = options.device == "cuda"
    after_imports = 0 if on_gpu else _memory_now()

    def answer(request: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if request == "build":
            return {"parameters": peer.build(Path(arguments["folder"]))}
        if request == "encode":
            hidden, loss = cast(ComparedPeer, peer).encode(make_batch(options, CHECK))
            np.save(arguments["out"], hidden.numpy())
            return {"loss": loss}
        if request == "step":
            batch = make_batch(options, arguments["step"])
            before = time.process_time()
            seconds, loss = peer.step(batch, arguments["step"])
            cpu = time.process_time() - before
            return {"seconds": seconds, "cpu_seconds": cpu, "loss": loss, "batch": digest(batch)}
        return {"after_imports": after_imports, "peak": torch.cuda.max_memory_allocated() if on_gpu else _peak_memory()}

    return answer


def begin(name: str, text: str) -> Answer:
    """Return what answers the requests of hubert_step.py."""
    options = Options(**json.loads(text))
    return answer_for(PEERS[name](options), options)


if __name__ == "__main__":
    serve(lambda: begin(sys.argv[1], sys.argv[2]))
