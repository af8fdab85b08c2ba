"""BEATs against formulas written out: codes of patches, what the encoder sees, the label predictor, the loss."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from harken.apps.main import main
from harken.config.load import load
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec, Window
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.nn.gated_position_bias import PositionBias
from harken.objectives.saved import build_objective, build_prepare
from harken.units.random_codes import RandomCodes

PATCHES = ("frontend.name=patches", "frontend.bands=16", "frontend.channels=12", "frontend.patch_frames=4")
PATCHES += ("frontend.patch_bands=8", "encoder.name=wavlm", "encoder.rows=2", "encoder.deep_norm=true")
PATCHES += ("encoder.gate_on=query", "encoder.position_buckets=16", "encoder.position_max_distance=20")
PATCHES += ("encoder.layer_drop=0", "encoder.dim=32", "encoder.layers=2", "encoder.heads=4", "encoder.ffn_dim=64")
PATCHES += ("encoder.position_kernel=8", "encoder.position_groups=4", "data.labels=[]")
DECODER = ("objective.decoder_layers=2", "objective.decoder_dim=16", "objective.decoder_heads=2")
DECODER += ("objective.decoder_ffn_dim=24",)
BEATS = (
    *PATCHES,
    "objective.name=beats",
    "objective.classes=24",
    "objective.code_dim=8",
    "objective.bands=20",
    *DECODER,
)


def configure(corpus, *overrides: str):
    return corpus.config("hubert", "filterbank", *overrides)


def make(corpus, *overrides: str):
    config = configure(corpus, *BEATS, *overrides)
    torch.manual_seed(3)
    model = build_objective(config).eval()
    with torch.no_grad():  # so that no bias is zero, and no two codes are alike
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, build_prepare(config, model.backbone.spec, train=True)


def prepared(prepare, batch):
    return prepare(batch, [Draws(1, 0)] * len(batch.ids))


def bucket(offset: int, buckets: int, far: int) -> int:
    """T5's bucket of a key so many places after its query, in Python's numbers."""
    half, exact = buckets // 2, buckets // 4
    first = half if offset > 0 else 0
    distance = abs(offset)
    if distance < exact:
        return first + distance
    return first + min(half - 1, exact + int(math.log(distance / exact) / math.log(far / exact) * (half - exact)))


def attend_by_hand(attention, x: torch.Tensor, table: torch.Tensor, far: int) -> torch.Tensor:
    """Gated attention of one utterance `(N, D)`, a head and a pair at a time."""
    heads, size = attention.heads, x.shape[1] // attention.heads
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(x.shape[1], 1)
    places = range(len(x))
    buckets = torch.tensor([[bucket(j - i, len(table), far) for j in places] for i in places])
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        gates = q[:, part] @ attention.gate.weight.T + attention.gate.bias
        u, r = gates[:, :4].sum(1).sigmoid(), gates[:, 4:].sum(1).sigmoid()
        gate = u * (r * attention.gate_scale[head] - 1) + 2
        scores = q[:, part] @ k[:, part].T / math.sqrt(size) + gate[:, None] * table[buckets, head]
        outputs.append(scores.softmax(-1) @ v[:, part])
    return torch.cat(outputs, 1) @ attention.out.weight.T + attention.out.bias


def places_by_hand(positions, x: torch.Tensor) -> torch.Tensor:
    """What a convolution of positions adds to the tokens `(N, D)` of one utterance, a token and a tap at a time."""
    norms = positions.weight_v.norm(dim=(0, 1), keepdim=True)
    weight = positions.weight_v * positions.weight_g / norms
    wide, around = weight.shape[1], weight.shape[2] // 2
    groups = len(weight) // wide
    sums = positions.bias.repeat(len(x), 1)
    for token in range(len(x)):
        for tap in range(weight.shape[2]):
            seen = token + tap - around
            if 0 <= seen < len(x):
                for group in range(groups):
                    part = slice(group * wide, (group + 1) * wide)
                    sums[token, part] += weight[part, :, tap] @ x[seen, part]
    return functional.gelu(sums)


def decode_by_hand(decoder, x: torch.Tensor) -> torch.Tensor:
    """The decoder of one utterance `(N, D)`."""
    x = decoder.enter(x)
    if decoder.positions is not None:
        x = x + places_by_hand(decoder.positions, x)
    alpha = (2 * len(decoder.blocks)) ** 0.25
    for block in decoder.blocks:
        y = attend_by_hand(block.attention, x, decoder.bias.table, 1280)
        x = functional.layer_norm(alpha * x + y, x.shape[1:], block.attention_norm.weight, block.attention_norm.bias)
        y = block.down(functional.gelu(block.up(x)))
        x = functional.layer_norm(alpha * x + y, x.shape[1:], block.ffn_norm.weight, block.ffn_norm.bias)
    return decoder.leave(x)


def codes_by_hand(quantiser, audio: torch.Tensor, frames: int, rows: int) -> list[int]:
    """The nearest code of each patch of one utterance, in loops and float64."""
    x = quantiser.log_mel(audio[None])[0].double().numpy()
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    wide = x.shape[1] // rows
    found = []
    for t in range(frames):
        for row in range(rows):
            patch = np.concatenate([x[4 * t + place, row * wide : (row + 1) * wide] for place in range(4)])
            projected = patch @ quantiser.projections[0].double().numpy()
            projected /= np.linalg.norm(projected)
            distances = [np.linalg.norm(projected - code) for code in quantiser.codes[0].double().numpy()]
            found.append(int(np.argmin(distances)))
    return found


@torch.no_grad()
@pytest.mark.parametrize("kernel", [0, 7])
def test_the_loss_from_waveform_to_cross_entropy(corpus, batch, kernel: int) -> None:
    model, prepare = make(corpus, "objective.decoder_dim=32", f"objective.decoder_position_kernel={kernel}")
    batch = prepared(prepare, batch)
    encoder, rows = model.backbone.encoder, 2
    total, hits, labels = 0.0, 0, []
    for row, samples in enumerate(batch.lengths.tolist()):
        audio = batch.inputs[row, :samples]
        frames, x, _ = model.backbone.embed(audio[None], torch.tensor([samples]), {})
        tokens = frames.shape[1] * rows
        mask = batch.targets["mask"][row, :tokens]
        assert int(mask.sum()) == tokens - max(1, tokens - int(tokens * 0.75))
        x = x.reshape(tokens, -1).masked_fill(mask[:, None], 0.0)[None]
        x = encoder.norm(x + encoder.positions(x))[0]
        seen = (~mask).nonzero().flatten().tolist()
        x = x[seen]
        for block in encoder.blocks:  # the bias is of the places that tokens had before others were left out
            scores = block.attention.gates(block.attention.project(x[None])[0].transpose(1, 2).flatten(2))
            table = encoder.bias.table
            bias = table[torch.tensor([[bucket(j - i, 16, 20) for j in seen] for i in seen])].permute(2, 0, 1)
            q, k, v = block.attention.project(x[None])
            y = block.attention.combine(q, k, v, scores * bias)[0]
            x = block.attention_norm(4**0.25 * x + y)
            x = block.ffn_norm(4**0.25 * x + block.down(functional.gelu(block.up(x))))
        given = torch.zeros(tokens, x.shape[1])
        given[seen] = x
        logits = decode_by_hand(model.decoder, given).double()
        codes = codes_by_hand(model.quantiser, audio, tokens // rows, rows)
        labels += codes
        for token in mask.nonzero().flatten().tolist():
            total += float(logits[token].logsumexp(-1) - logits[token, codes[token]])
            hits += int(logits[token].argmax()) == codes[token]
    loss = model(batch)
    count = float(batch.targets["mask"].sum())
    assert batch.num_targets == count
    assert float(loss.total) == pytest.approx(total, rel=1e-4)
    figures = {name: float(value / weight) for name, (value, weight) in loss.metrics.items()}
    assert figures["accuracy_masked"] == pytest.approx(hits / count, abs=0.02)
    shares = np.bincount(labels, minlength=24) / len(labels)
    entropy = -sum(share * math.log(share) for share in shares if share)
    assert figures["codebook_perplexity"] == pytest.approx(math.exp(entropy), rel=0.02)
    assert figures["codebook_use"] == pytest.approx((shares > 0).mean(), abs=1 / 24)


@torch.no_grad()
def test_biases_of_some_tokens_are_those_of_all(corpus) -> None:
    bias = PositionBias(3, 16, 20)
    places = torch.tensor([[-1, 0, 3, 4, 47], [-1, 2, 9, 30, 31]])
    everywhere = bias(49)  # of places -1 to 47
    for row in range(2):
        chosen = places[row] + 1
        assert torch.equal(bias.at(places)[row], everywhere[:, chosen][:, :, chosen])


@torch.no_grad()
@pytest.mark.parametrize("extra", [False, True])
def test_leaving_tokens_out_of_a_wavlm_is_hiding_them_from_attention(corpus, batch, extra: bool) -> None:
    model, prepare = make(corpus)
    batch = prepared(prepare, batch)
    encoder = model.backbone.encoder
    _, x, lengths = model.backbone.embed(batch.inputs, batch.lengths, {})
    given = (x, lengths, batch.targets["mask"], batch.targets["visible"], torch.randn(32) if extra else None)
    left_out = encoder.encode_visible(*given)
    encoder.omits = False
    hidden = encoder.encode_visible(*given)
    seen = batch.targets["visible"]
    for row in range(len(seen)):
        places = seen[row][seen[row] >= 0]
        first, second = (one.last[row].reshape(-1, 32)[places] for one in (left_out, hidden))
        assert torch.allclose(first, second, atol=1e-5)
    if extra:
        assert torch.allclose(left_out.summary, hidden.summary, atol=1e-5)
    whole = encoder.visible_flops(100, 0.25)
    del encoder.omits
    assert encoder.visible_flops(100, 0.25) < 0.4 * whole, "leaving out is why it is cheap"


@torch.no_grad()
def test_masks_are_of_single_patches_and_the_encoder_does_not_see_what_is_under_them(corpus, batch) -> None:
    model, prepare = make(corpus, "frontend.mean=0")
    batch = prepared(prepare, batch)
    row = int(batch.lengths.argmax())
    mask = batch.targets["mask"][row].view(-1, 2)
    assert (mask[:, 0] != mask[:, 1]).any(), "one patch of a time is masked without the other"
    _, x, lengths = model.backbone.embed(batch.inputs, batch.lengths, {})
    targets = (batch.targets["mask"], batch.targets["visible"])
    other = torch.where(
        batch.targets["mask"].view(*x.shape[:2], 2)[..., None],
        torch.randn(*x.shape[:2], 2, 32),
        x.unflatten(2, (2, -1)),
    )
    first, second = (
        model.backbone.encoder.encode_visible(one, lengths, *targets).last for one in (x, other.flatten(2))
    )
    assert torch.equal(first, second)


def test_random_codes_of_one_row_are_those_of_best_rq(corpus) -> None:
    spec = FrameSpec((Window(400, 160), Window(4, 4)), 16000)
    settings = {"bands": 20, "code_dim": 8, "codes": 24, "codebooks": 2, "seed": 3}
    whole, halves = RandomCodes(spec, **settings), RandomCodes(spec, **settings, rows=2)
    assert whole.projections.shape == (2, 80, 8)
    assert halves.projections.shape == (2, 40, 8)
    audio, lengths = 0.1 * torch.randn(2, 8000), torch.tensor([8000, 5000])
    assert whole.of_audio(audio, lengths, 12).shape == (2, 12, 2)
    assert halves.of_audio(audio, lengths, 12).shape == (2, 24, 2)
    assert [part[0] for part in halves.of_audio(audio, lengths, 12)[0].tolist()] == codes_by_hand(
        halves, audio[0], 12, 2
    )
    assert halves.of_audio(torch.zeros(1, 300), torch.tensor([300]), 1).shape == (1, 2, 2), "shorter than a window"


def test_what_does_not_fit_is_refused_by_name(corpus) -> None:
    with pytest.raises(HarkenError) as caught:
        make(corpus, "objective.bands=21")
    assert str(caught.value) == "`objective.bands` must be divisible by `encoder.rows`, got 21 and 2"
    with pytest.raises(HarkenError) as caught:
        make(corpus, "objective.decoder_heads=3")
    assert str(caught.value) == ("`objective.decoder_dim` must be divisible by `objective.decoder_heads`, got 16 and 3")
    with pytest.raises(HarkenError) as caught:
        make(corpus, "objective.decoder_dim=24", "objective.decoder_position_kernel=7")
    assert str(caught.value) == (
        "`objective.decoder_dim` must be divisible by 16 for the groups of a convolution of positions "
        "(`objective.decoder_position_kernel`), got 24"
    )
    with pytest.raises(HarkenError, match=r"`data.labels` must name a unit store for each codebook"):
        make(corpus, "objective.targets=labels")
    with pytest.raises(HarkenError) as caught:
        make(corpus, "objective.targets=labels", f"data.labels=[{corpus.labels}]", "objective.classes=12")
    assert str(caught.value) == (
        f"{corpus.labels} must have 2 labels of each time, one for each token of a frame, and has 1: label with a "
        "model of as many `encoder.rows`"
    )


@pytest.mark.parametrize(("name", "parameters"), [("beats_base", (88e6, 92e6)), ("beats_iteration2", (88e6, 92e6))])
def test_a_preset_builds(name: str, parameters: tuple[float, float]) -> None:
    config = load([name], ["data.train=train.jsonl", "data.labels=[labels]"]).config
    with torch.device("meta"):
        model = build_objective(config)
    size = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert parameters[0] < size < parameters[1], "the paper's 90 million"
    assert model.backbone.encoder.rows == 8
    assert model.backbone.spec.stride == 2560


def test_the_preset_of_the_tokenizer_builds(corpus, tmp_path) -> None:
    config = load(["beats_tokenizer_base"], ["data.train=train.jsonl", "objective.teacher=none"]).config
    with pytest.raises(HarkenError, match="no model at none"):
        build_objective(config)
    assert (config.objective.codes, config.objective.code_dim) == (1024, 256)


@torch.no_grad()
def test_a_fresh_model_starts_at_the_entropy_of_its_codes(corpus) -> None:
    config = configure(corpus, *BEATS, "objective.decoder_dropout=0")
    torch.manual_seed(0)
    model = build_objective(config).eval()
    cut = max(Manifest(corpus.train), key=lambda cut: cut.duration)
    batch = collate([Row(cut.id, "", read_cut(cut, 16000), 0)])
    value, weight = model(prepared(build_prepare(config, model.backbone.spec, train=True), batch)).metrics["loss"]
    assert float(value / weight) == pytest.approx(math.log(24), rel=0.15)


def test_a_run_learns(corpus, tmp_path, capsys) -> None:
    config = corpus.yaml(tmp_path, "hubert", "filterbank")
    overrides = [*BEATS, "train.steps=12", "log.every_steps=1", "schedule.rate=5e-3"]
    assert main(["train", str(config), "--exp", str(tmp_path / "exp"), *overrides]) == 0
    records = [json.loads(line) for line in (tmp_path / "exp/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
