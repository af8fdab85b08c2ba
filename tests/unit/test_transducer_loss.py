"""The transducer's sums against k2's values, against all paths one by one, and against numerical gradients."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from harken.core.errors import HarkenError
from harken.nn.transducer.arcs import Labels, additive_arcs, joined_arcs, kept_positions, prune_starts
from harken.nn.transducer.k2_lattice import lattice_sums
from harken.nn.transducer.lattice import Arcs, Sums, sum_paths

GOLDEN = Path(__file__).resolve().parents[1] / "golden/icefall/k2_rnnt.npz"
HAS_K2 = importlib.util.find_spec("k2") is not None
BACKENDS = ["harken", pytest.param("k2", marks=pytest.mark.skipif(not HAS_K2, reason="k2 is not installed"))]
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    return request.param


@pytest.fixture
def golden(device: str) -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}


def labels_of(golden: dict[str, Tensor]) -> Labels:
    return Labels(tokens=golden["symbols"], lengths=golden["boundary"][:, 2], frames=golden["boundary"][:, 3])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def random_arcs(seed: int, tokens: list[int], frames: list[int], dtype: torch.dtype = torch.float64) -> Arcs:
    """Arcs of what a softmax over three classes gives, so that they are log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    size, rows, columns = len(tokens), max(tokens), max(frames)
    logits = 2 * torch.randn(size, rows + 1, columns, 3, generator=generator, dtype=dtype)
    log_probs = logits.log_softmax(-1)
    lengths = torch.tensor(tokens), torch.tensor(frames)
    return Arcs(emit=log_probs[:, :-1, :, 1], blank=log_probs[..., 0], tokens=lengths[0], frames=lengths[1])


def enumerate_paths(arcs: Arcs, row: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the score and the occupations of one utterance from all its paths, one by one."""
    tokens, frames = int(arcs.tokens[row]), int(arcs.frames[row])
    emit, blank = arcs.emit[row].numpy(), arcs.blank[row].numpy()
    total, emits, blanks = 0.0, np.zeros_like(emit), np.zeros_like(blank)
    for places in itertools.combinations_with_replacement(range(frames), tokens):  # the frame of each token
        before = [sum(place < frame for place in places) + places.count(frame) for frame in range(frames)]
        log_prob = sum(emit[token, frame] for token, frame in enumerate(places))
        log_prob += sum(blank[before[frame], frame] for frame in range(frames))
        prob = math.exp(log_prob)
        total += prob
        for token, frame in enumerate(places):
            emits[token, frame] += prob
        for frame in range(frames):
            blanks[before[frame], frame] += prob
    return math.log(total), emits / total, blanks / total


# Against k2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_simple_loss_is_k2s(golden, backend) -> None:
    sums = lattice_sums(additive_arcs(golden["am"], golden["lm"], labels_of(golden)), backend)
    close(-sums.scores, golden["simple"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smoothed_loss_its_gradients_and_occupations_are_k2s(golden, backend) -> None:
    am, lm = golden["am"].requires_grad_(), golden["lm"].requires_grad_()
    sums = lattice_sums(additive_arcs(am, lm, labels_of(golden), lm_scale=0.25, am_scale=0.1), backend)
    close(-sums.scores.detach(), golden["smoothed"])
    close(sums.emit, golden["px_grad"][:, :, :-1])
    close(sums.blank, golden["py_grad"])
    (-sums.scores).sum().backward()
    close(am.grad, golden["smoothed_grad_am"])
    close(lm.grad, golden["smoothed_grad_lm"])


def test_the_ranges_are_k2s(golden) -> None:
    labels = labels_of(golden)
    sums = lattice_sums(additive_arcs(golden["am"], golden["lm"], labels, lm_scale=0.25, am_scale=0.1))
    starts = prune_starts(sums, labels, 4)
    assert torch.equal(kept_positions(starts, 8, 4), golden["ranges"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pruned_loss_and_its_gradients_are_k2s(golden, backend) -> None:
    am, lm, positions = golden["enc_am"].requires_grad_(), golden["enc_lm"].requires_grad_(), golden["ranges"]
    rows = torch.arange(len(lm), device=lm.device)[:, None, None]
    logits = torch.tanh(am[:, :, None] + lm[rows, positions]) @ golden["joiner"].T
    loss = -lattice_sums(joined_arcs(logits, positions, labels_of(golden)), backend).scores
    close(loss.detach(), golden["pruned_regular"])
    loss.sum().backward()
    close(am.grad, golden["pruned_regular_grad_am"])
    close(lm.grad, golden["pruned_regular_grad_lm"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_full_loss_and_its_gradient_are_k2s(golden, backend) -> None:
    logits = golden["full_logits"].requires_grad_()
    everywhere = kept_positions(torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device), 8, 8)
    loss = -lattice_sums(joined_arcs(logits, everywhere, labels_of(golden)), backend).scores
    close(loss.detach(), golden["full"])
    loss.sum().backward()
    close(logits.grad, golden["full_grad"])


# Against all paths, and numerically


@pytest.mark.parametrize("shape", [([0], [1]), ([1], [1]), ([3], [1]), ([3, 1, 0], [4, 2, 4]), ([2, 4], [5, 3])])
def test_scores_and_occupations_are_those_of_all_paths(shape) -> None:
    for seed in range(3):
        arcs = random_arcs(seed, *shape)
        sums = sum_paths(arcs)
        for row in range(len(arcs.tokens)):
            score, emit, blank = enumerate_paths(arcs, row)
            assert float(sums.scores[row]) == pytest.approx(score, abs=1e-12)
            np.testing.assert_allclose(sums.emit[row], emit, atol=1e-12)
            np.testing.assert_allclose(sums.blank[row], blank, atol=1e-12)


def test_what_lies_behind_an_utterances_end_is_not_looked_at() -> None:
    arcs = random_arcs(0, [5, 2], [6, 3])
    garbage = Arcs(emit=arcs.emit.clone(), blank=arcs.blank.clone(), tokens=arcs.tokens, frames=arcs.frames)
    garbage.emit[1, :, 3:], garbage.blank[1, :, 3:], garbage.emit[1, 2:], garbage.blank[1, 3:] = 9.0, 9.0, 9.0, 9.0
    alone = Arcs(
        emit=arcs.emit[1:, :2, :3], blank=arcs.blank[1:, :3, :3], tokens=arcs.tokens[1:], frames=arcs.frames[1:]
    )
    sums, expected = sum_paths(garbage), sum_paths(alone)
    assert float(sums.scores[1]) == float(expected.scores[0])
    assert torch.equal(sums.emit[1, :2, :3], expected.emit[0])
    assert not sums.emit[1, :, 3:].any()
    assert not sums.emit[1, 2:].any()
    assert not sums.blank[1, :, 3:].any()


def test_a_lattice_without_a_path_has_no_score_and_no_gradient() -> None:
    arcs = random_arcs(0, [2, 2], [3, 3])
    arcs.emit[0, 1] = -math.inf
    arcs.emit.requires_grad_()
    sums = sum_paths(arcs)
    assert sums.scores[0] == -math.inf
    assert torch.isfinite(sums.scores[1])
    sums.scores.sum().backward()
    assert not arcs.emit.grad[0].any()
    assert arcs.emit.grad[1].any()


def gradcheck(function, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, [x.double().requires_grad_() for x in inputs])


def test_gradients_are_the_numerical_ones_in_float64() -> None:
    torch.manual_seed(0)
    labels = Labels(
        tokens=torch.tensor([[1, 2, 2, 3], [3, 1, 0, 0]]), lengths=torch.tensor([4, 2]), frames=torch.tensor([5, 3])
    )
    am, lm = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    for scales in ((0.0, 0.0), (0.3, 0.0), (0.2, 0.3)):
        smoothed = functools.partial(additive_arcs, labels=labels, lm_scale=scales[0], am_scale=scales[1])
        gradcheck(lambda am, lm, arcs=smoothed: sum_paths(arcs(am, lm)).scores, am, lm)
    positions = kept_positions(torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]), 5, 3)
    gradcheck(lambda logits: sum_paths(joined_arcs(logits, positions, labels)).scores, torch.randn(2, 5, 3, 4))


def test_float32_and_autocast_are_as_exact_as_float64() -> None:
    """Scores near -1300: sums in float32 would be off by 1e-4 and more, products in bfloat16 by more than 1."""
    torch.manual_seed(0)
    labels = Labels(
        tokens=torch.randint(1, 50, (2, 60)), lengths=torch.tensor([60, 33]), frames=torch.tensor([400, 222])
    )
    am, lm = 3 * torch.randn(2, 400, 50), 3 * torch.randn(2, 61, 50)
    exact = sum_paths(additive_arcs(am.double(), lm.double(), labels))
    assert exact.scores.max() < -1000
    plain = sum_paths(additive_arcs(am, lm, labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sum_paths(additive_arcs(am, lm, labels))
    assert cast.scores.dtype == torch.float32
    assert torch.equal(cast.scores, plain.scores)
    torch.testing.assert_close(plain.scores.double(), exact.scores, atol=0, rtol=1e-6)
    torch.testing.assert_close(plain.emit.double(), exact.emit, atol=2e-5, rtol=0)


# Pruning


@pytest.mark.parametrize("width", [2, 3, 5, 40])
def test_a_path_goes_through_the_kept_positions(width: int) -> None:
    """Whatever the occupation: the full probability where all is kept, and some of it elsewhere."""
    tokens, frames = [12, 12, 1, 0, 7], [12, 30, 30, 9, 8]
    for seed in range(5):
        arcs = random_arcs(seed, tokens, frames)
        sums = sum_paths(arcs)
        labels = Labels(tokens=torch.zeros(5, 12, dtype=torch.int64), lengths=arcs.tokens, frames=arcs.frames)
        starts = prune_starts(sums, labels, width)
        positions = kept_positions(starts, 13, width)
        assert positions.max() <= 12
        steps = starts.diff(dim=1)
        assert not starts[:, 0].any()
        assert steps.min() >= 0
        assert steps.max() < width
        for row, (count, length) in enumerate(zip(tokens, frames, strict=True)):
            assert count in positions[row, length - 1]
        kept = torch.zeros(5, 30, 13, dtype=torch.bool).scatter(2, positions, True).transpose(1, 2)
        pruned = Arcs(
            emit=arcs.emit.masked_fill(~kept[:, :-1], -math.inf),
            blank=arcs.blank.masked_fill(~kept, -math.inf),
            tokens=arcs.tokens,
            frames=arcs.frames,
        )
        scores = sum_paths(pruned).scores
        assert torch.isfinite(scores).all()
        assert (scores <= sums.scores + 1e-9).all()
        if width > 12:
            torch.testing.assert_close(scores, sums.scores)


# Mistakes


def test_a_width_no_path_goes_through_is_refused() -> None:
    arcs = random_arcs(0, [2], [3])
    labels = Labels(tokens=torch.ones(1, 2, dtype=torch.int64), lengths=arcs.tokens, frames=arcs.frames)
    with pytest.raises(HarkenError, match="at least 2 token positions must be kept at each frame, got 1"):
        prune_starts(sum_paths(arcs), labels, 1)


def test_arcs_that_do_not_fit_are_refused() -> None:
    arcs = random_arcs(0, [2], [3])
    with pytest.raises(HarkenError, match=r"expected arcs .*, got \(1, 2, 3\), \(1, 2, 3\), \(1,\) and \(1,\)"):
        Arcs(emit=arcs.emit, blank=arcs.blank[:, 1:], tokens=arcs.tokens, frames=arcs.frames)


@pytest.mark.skipif(HAS_K2, reason="k2 is installed")
def test_k2_where_it_is_missing_is_named() -> None:
    arcs = random_arcs(0, [2], [3])
    with pytest.raises(
        HarkenError, match=r"`objective.backend: k2` needs k2, and it does not import .*`harken doctor`"
    ):
        lattice_sums(arcs, "k2")
    sums: Sums = lattice_sums(arcs, "auto")
    assert torch.equal(sums.scores, sum_paths(arcs).scores)
