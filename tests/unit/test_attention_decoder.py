"""The attention decoder beside CTC and the transducer, against one written out for one sentence and one token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.nn.attention_decoder import AttentionDecoder, attention_loss
from harken.objectives.saved import build_objective, build_prepare

HEADS = 4
SMALL = (
    "objective.attention_weight=0.5",
    "objective.attention_layers=2",
    "objective.attention_dim=16",
    "objective.attention_heads=4",
    "objective.attention_ffn_dim=24",
    "encoder.layer_drop=0",
)


def make() -> AttentionDecoder:
    torch.manual_seed(1)
    return AttentionDecoder(6, 5, dim=16, layers=2, heads=HEADS, ffn_dim=24, dropout=0.1).double().eval()


def attend(layer: torch.nn.MultiheadAttention, query: Tensor, memory: Tensor) -> Tensor:
    """Attend from one query (D,) to memory (N, D), a head at a time."""
    parts = zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), (query[None], memory, memory), strict=True)
    q, k, v = (functional.linear(x, weight, bias) for weight, bias, x in parts)
    size = len(query) // HEADS
    heads = []
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        shares = (k[:, own] @ q[0, own] / math.sqrt(size)).softmax(0)
        heads.append(shares @ v[:, own])
    return layer.out_proj(torch.cat(heads))


def by_hand(decoder: AttentionDecoder, tokens: list[int], frames: Tensor) -> Tensor:
    """Return the scores (V,) of what follows tokens; frames are the real ones alone."""
    rows = []
    for place, token in enumerate([0, *tokens]):
        angles = [place / 10000 ** (2 * pair / decoder.dim) for pair in range(decoder.dim // 2)]
        position = torch.tensor([value for angle in angles for value in (math.sin(angle), math.cos(angle))])
        rows.append(decoder.embedding.weight[token] * math.sqrt(decoder.dim) + position)
    memory = decoder.frames(frames)
    for block in decoder.blocks:
        normed = [block.norm1(row) for row in rows]
        rows = [row + attend(block.self_attn, normed[n], torch.stack(normed[: n + 1])) for n, row in enumerate(rows)]
        rows = [row + attend(block.multihead_attn, block.norm2(row), memory) for row in rows]
        rows = [row + block.linear2(block.linear1(block.norm3(row)).relu()) for row in rows]
    return decoder.output(decoder.norm(rows[-1]))


def test_scores_are_those_of_a_decoder_written_out() -> None:
    decoder, generator = make(), torch.Generator().manual_seed(2)
    frames = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)
    tokens, lengths = torch.tensor([[3, 1, 4], [2, 2, 0]]), torch.tensor([9, 5])
    with torch.no_grad():
        scores = decoder(tokens, frames, lengths)
        for row, place in ((0, 0), (0, 3), (1, 0), (1, 2)):
            expected = by_hand(decoder, tokens[row, :place].tolist(), frames[row, : lengths[row]])
            torch.testing.assert_close(scores[row, place], expected, rtol=1e-6, atol=1e-6)


def test_the_loss_is_the_smoothed_cross_entropy_of_sentences_and_their_ends() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(3, 4, 5, generator=generator)
    tokens, lengths = torch.tensor([[3, 1, 4], [2, 0, 0], [1, 1, 0]]), torch.tensor([3, 1, 2])
    expected = 0.0
    for row, sentence in ((0, [3, 1, 4, 0]), (1, [2, 0])):  # the third does not count
        for place, target in enumerate(sentence):
            log_probs = scores[row, place].log_softmax(0)
            expected -= 0.9 * float(log_probs[target]) + 0.1 * float(log_probs.mean())
    loss = attention_loss(scores, tokens, lengths, torch.tensor([1.0, 1.0, 0.0]), 0.1)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", ["ctc", "transducer"])
def test_an_objective_adds_its_weighted_loss_and_trains_it(corpus, objective: str) -> None:
    manifest = Manifest(corpus.train)
    cuts = [manifest[place] for place in (0, 5, 9)]
    batch = collate([Row(cut.id, cut.supervisions[0].text, read_cut(cut, 16000), 0) for cut in cuts])
    found = {}
    for name, overrides in (("with", SMALL), ("without", SMALL[-1:])):
        config = corpus.config(objective, "filterbank", *overrides)
        torch.manual_seed(3)
        model = build_objective(config).eval()
        prepare = build_prepare(config, model.backbone.spec, train=False)
        found[name] = model, model(prepare(batch, [Draws(1, 0)] * len(batch.ids)))
    (model, loss), (_, plain) = found["with"], found["without"]
    auxiliary, count = loss.metrics["loss_attention"]
    assert float(loss.total.detach()) == pytest.approx(float(plain.total.detach()) + 0.5 * float(auxiliary), rel=1e-5)
    assert float(count) == sum(len(cut.supervisions[0].text) for cut in cuts)
    assert "loss_attention" not in plain.metrics
    loss.total.backward()
    assert all(bool(parameter.grad.any()) for parameter in model.attention.parameters())
    alone = [
        float(
            model(
                prepare(collate([Row(cut.id, cut.supervisions[0].text, read_cut(cut, 16000), 0)]), [Draws(1, 0)])
            ).total
        )
        for cut in cuts
    ]
    assert sum(alone) == pytest.approx(float(loss.total), rel=1e-4), "padding reaches nothing"


def test_a_width_that_heads_cannot_share_is_refused(corpus) -> None:
    with pytest.raises(HarkenError, match=r"`objective.attention_dim` must be even and divisible by .* got 18 and 4"):
        build_objective(corpus.config("ctc", "filterbank", *SMALL, "objective.attention_dim=18"))
