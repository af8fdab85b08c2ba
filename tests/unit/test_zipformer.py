"""The Zipformer: streams equal chunk-masked encoding, padding changes nothing, training is a function of its seed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from harken.config.load import load
from harken.config.registry import find
from harken.core import draws
from harken.core.errors import HarkenError
from harken.encoders.backbone import build_backbone
from harken.encoders.zipformer import StreamState, Zipformer, layer_skips

SIZES: dict[str, Any] = {
    "downsampling": (1, 2, 4, 2),
    "layers": (1, 2, 1, 1),
    "dims": (24, 32, 48, 32),
    "unmasked_dims": (24, 24, 32, 24),
    "ffn_dims": (32,),
    "heads": (4,),
    "kernels": (15, 7, 7, 9),
    "query_dims": (8,),
    "value_dims": (6,),
    "position_dim": 16,
}


def zipformer(**changes: Any) -> Zipformer:
    """Return an encoder whose every parameter is away from where it starts, so that each matters."""
    torch.manual_seed(1)
    encoder = Zipformer(find("encoder", "zipformer").config(name="zipformer", **{**SIZES, **changes}), 24)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.eval()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("frames", [64, 61, 5])
@pytest.mark.parametrize(("chunk", "left"), [(4, 0), (4, 8), (8, 8), (16, 0), (16, 48), (32, 16)])
def test_a_stream_equals_the_whole(chunk: int, left: int, frames: int) -> None:
    encoder = zipformer(causal=True, eval_chunk_frames=chunk, eval_left_frames=left)
    x = torch.randn(2, frames, 24)
    with torch.no_grad():
        whole = encoder.encode(x, torch.tensor([frames, frames])).last
    pieces, state = [], StreamState()
    for start in range(0, frames, chunk):
        piece, state = encoder.stream(x[:, start : start + chunk], state)
        pieces.append(piece)
    assert difference(torch.cat(pieces, 1), whole) < 1e-4
    if (
        left and max(left, chunk) < frames - chunk
    ):  # and the left context is what limits it, so that the state is trimmed as it must be
        unlimited = zipformer(causal=True, eval_chunk_frames=chunk)
        with torch.no_grad():
            assert difference(unlimited.encode(x, torch.tensor([frames, frames])).last, whole) > 1e-3


@torch.no_grad()
def test_later_frames_do_not_reach_earlier_chunks() -> None:
    encoder = zipformer(causal=True, eval_chunk_frames=8)
    x = torch.randn(1, 40, 24)
    other = x.clone()
    other[:, 24:] = torch.randn(1, 16, 24)
    first, second = (encoder.encode(value, torch.tensor([40])).last for value in (x, other))
    assert torch.equal(first[:, :24], second[:, :24])
    assert difference(first[:, 24:], second[:, 24:]) > 1e-2


def test_a_stream_refuses_what_it_cannot_take() -> None:
    x = torch.randn(1, 8, 24)
    with pytest.raises(HarkenError, match=r"`encoder\.eval_chunk_frames` must be positive"):
        zipformer(causal=True).stream(x)
    encoder = zipformer(causal=True, eval_chunk_frames=4)
    with pytest.raises(HarkenError, match=r"chunks of `encoder\.eval_chunk_frames` 4 frames, got one of 8 frames"):
        encoder.stream(x)
    _, state = encoder.stream(x[:, :3])
    with pytest.raises(HarkenError, match="got one after a shorter one, which ends a stream"):
        encoder.stream(x[:, :4], state)


@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"causal": True, "eval_chunk_frames": 8}])
@torch.no_grad()
def test_padding_changes_nothing(changes: dict[str, Any]) -> None:
    encoder = zipformer(**changes)
    lengths = torch.tensor([50, 33, 30, 1])
    x = torch.randn(4, 50, 24)
    together = encoder.encode(x, lengths, range(encoder.num_layers + 1))
    for row, length in enumerate(lengths.tolist()):
        alone = encoder.encode(x[row : row + 1, :length], lengths[row : row + 1], range(encoder.num_layers + 1))
        assert difference(together.last[row, :length], alone.last[0]) < 1e-4, length
        for layer, value in alone.hidden.items():
            assert difference(together.hidden[layer][row, :length], value[0]) < 1e-4, (length, layer)
    original = zipformer(**changes, attend_to_padding=True).encode(x, lengths)
    assert difference(original.last[1, :33], together.last[1, :33]) > 1e-3, "else the test above says nothing"


@torch.no_grad()
def test_the_last_layer_is_the_result() -> None:
    encoder = zipformer()
    encoded = encoder.encode(torch.randn(1, 20, 24), torch.tensor([20]), [0, encoder.num_layers])
    assert torch.equal(encoded.hidden[encoder.num_layers], encoded.last)
    assert not encoded.hidden[0][..., 24:].any()


def step(encoder: Zipformer, number: int, micro_batch: int, *, rows: int = 4) -> list[Tensor]:
    """Return the loss and gradients of a micro-batch of a training step."""
    draws.begin_micro_batch(3, number, micro_batch)
    x = torch.linspace(-1, 1, rows * 32 * 24).sin().mul(3).reshape(rows, 32, 24)
    encoder.train().zero_grad()
    encoded = encoder.encode(x, torch.tensor([32] * (rows - 1) + [21]))
    loss = encoded.penalised(encoded.last.square().sum())
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in encoder.parameters()]
    return [loss.detach(), *grads]


def test_training_depends_on_seed_step_and_place_alone() -> None:
    encoder = zipformer(constant_attention=True, causal=True, chunk_frames=(0, 4, 8), left_frames=(0, 8))
    first = step(encoder, 100, 1)
    step(encoder, 7, 0)
    again = step(encoder, 100, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    fresh = step(zipformer(constant_attention=True, causal=True, chunk_frames=(0, 4, 8), left_frames=(0, 8)), 100, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, fresh, strict=True)), "a resumed run has nothing to restore"
    assert not torch.equal(first[0], step(encoder, 100, 2)[0])
    assert not torch.equal(first[0], step(encoder, 101, 1)[0])


def test_recomputed_activations_give_the_same_gradients() -> None:
    encoder = zipformer(constant_attention=True)
    results = []
    for encoder.checkpoint_blocks in (False, True):
        results.append(step(encoder, 5, 1))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_limits_change_gradients_and_no_values() -> None:
    plain = {"random_skips": False, "dropout": 0.0, "start_dropout": 0.0, "position_dropout": 0.0}
    free, limited = (step(zipformer(**plain, gradient_limits=limits), 0, 1) for limits in (False, True))
    encoder = zipformer(**plain)
    with torch.no_grad():
        x = torch.linspace(-1, 1, 4 * 32 * 24).sin().mul(3).reshape(4, 32, 24)
        value = encoder.encode(x, torch.tensor([32, 32, 32, 21])).last.square().sum()
    assert float(free[0]) == pytest.approx(float(value), rel=1e-5)
    assert float(limited[0]) == pytest.approx(float(value), rel=1e-3)  # the penalty of large scores alone
    assert difference(torch.cat([g.flatten() for g in free[1:]]), torch.cat([g.flatten() for g in limited[1:]])) > 1e-3


def test_constant_attention_acts_when_it_is_on() -> None:
    quiet = {"gradient_limits": False, "dropout": 0.0, "start_dropout": 0.0, "position_dropout": 0.0}
    late = 10**6  # most skips have ended; const_attention_rate stays at 0.025
    losses = {
        on: [float(step(zipformer(**quiet, constant_attention=on), late, place)[0]) for place in range(12)]
        for on in (False, True)
    }
    assert losses[False] != losses[True]


def test_blocks_come_in_one_after_the_other() -> None:
    config = find("encoder", "zipformer").config(name="zipformer")
    points = [point for stack in range(6) for point in layer_skips(config, stack)]
    assert len(points) == 16
    assert points[0] == ((4000 / 7, 0.5), (4000 * 1.5 / 7, 0.035))
    assert points[-1][1] == (4000.0, pytest.approx(0.035 * 2**0.5))
    assert all(a[1][0] == pytest.approx(b[0][0]) for a, b in pairwise(points))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (4, 4)}, r"`encoder.heads` must have 1 or 4 entries, as many as `encoder.downsampling`, got 2"),
        ({"position_dim": 15}, "`encoder.position_dim` must be even, got 15"),
        ({"kernels": (8,)}, r"`encoder.kernels` must be odd, got \[8\]"),
        ({"unmasked_dims": (32,)}, "`encoder.unmasked_dims` must be at most `encoder.dims`, got 32 and 24"),
        ({"chunk_frames": (8, 0)}, r"`encoder.causal` must be true to work in chunks, got chunks of \[8\] and false"),
        (
            {"causal": True, "eval_chunk_frames": 6},
            r"multiples of every `encoder.downsampling`, got 6 and \[1, 2, 4, 2\]",
        ),
        ({"chunk_frames": ()}, "must have an entry, got an empty list"),
        ({"layers": (1, 0, 1, 1)}, r"`encoder.layers` must be positive, got \[1, 0, 1, 1\]"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HarkenError, match=message):
        zipformer(**changes)


# parameters of icefall's CTC models with 500 BPE pieces (egs/librispeech/ASR/RESULTS.md), which are not tied to harken
PUBLISHED = {"zipformer_small": 22118279, "zipformer_medium": 64250603, "zipformer_large": 147010094}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_exactly_the_published_number_of_parameters(name: str) -> None:
    config = load([name], ["data.train=t.jsonl", "objective.tokenizer=none"]).config
    backbone = build_backbone(config)
    head = 500 * (backbone.dim + 1)
    layers = config.encoder.layers  # type: ignore[attr-defined]
    unused = sum(count * dim for count, dim in zip(layers, config.encoder.dims, strict=True))  # type: ignore[attr-defined]
    halving = 2  # icefall halves the rate of the output
    own = sum(parameter.numel() for parameter in backbone.parameters()) - backbone.encoder.embed_dim
    assert own + head + unused + halving == PUBLISHED[name]


@torch.no_grad()
def test_the_k2ssl_preset_is_the_default_encoder() -> None:
    config = load(["k2ssl_base"], ["data.train=t.jsonl"]).config
    default = find("encoder", "zipformer").config(name="zipformer", schedule_scale=4.667)
    assert config.encoder == default
    assert config.objective.head == "linear"  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_block_compiles_whole_and_agrees(training: bool) -> None:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # the other mode was compiled from the same code
    encoder = zipformer(causal=True, constant_attention=True).train(training)
    stack = encoder.stacks[1]
    block, positions = stack.blocks[0], stack._positions(16, 0, torch.zeros(1))
    padding = encoder._padding(torch.zeros(3, 32, 24), torch.tensor([32, 32, 9]))
    view = encoder._view(padding, 2, 32, 8, 1, torch.device("cpu"))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager" if training else "inductor")
    x = torch.randn(3, 16, 32)

    def run(function) -> Tensor:
        block.zero_grad()
        value = x.clone().requires_grad_(training)
        y, _ = function(value, positions, view)
        if not training:
            return y.detach()
        y.square().sum().backward()
        grads = [value.grad, *(parameter.grad for parameter in block.parameters())]
        return torch.cat([y.detach().flatten(), *(grad.flatten() for grad in grads)])

    # torch's own random numbers, which eager code draws; other values of every schedule compile nothing anew
    with inductor.patch(fallback_random=True), dynamo.patch(error_on_recompile=True):
        for number in (0, 3000, 9000):
            draws.begin_micro_batch(1, number, 0)
            expected = run(block)
            draws.begin_micro_batch(1, number, 0)
            found = run(compiled)
            assert difference(found, expected) < 1e-4 * float(expected.abs().max())
