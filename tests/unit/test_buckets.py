"""Which gradients are sent together, in which order, and when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harken.config.load import load
from harken.core import distributed, draws
from harken.encoders.backbone import build_backbone
from harken.engine.buckets import SMALL, GradientBuckets, arrange

DIM, BLOCK = 256, 256 * 256


@pytest.fixture(autouse=True)
def sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Two ranks with equal gradients, whose sums arrive when they are waited for."""
    begun: list[Tensor] = []

    class Sum:
        def __init__(self, values: Tensor) -> None:
            self.values = values

        def wait(self) -> None:
            self.values.mul_(2.0)

    def begin_sum(values: Tensor) -> Sum:
        begun.append(values)
        return Sum(values)

    monkeypatch.setattr(distributed, "begin_sum", begin_sum)
    return begun


class Blocks(nn.Module):
    """Blocks in a row, any of which may be left out."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(DIM))
        self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(number))
        self.last = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor, without: int | None = None) -> Tensor:
        x = x + self.mask
        for place, block in enumerate(self.blocks):
            if place != without:
                x = block(x)
        return (x * self.last).sum()


def test_buckets_go_in_reverse_order_and_what_is_small_goes_last() -> None:
    model = Blocks(5)
    found = arrange(model.parameters(), 2 * BLOCK)
    weights = [block.weight for block in model.blocks]
    assert [bucket.parameters for bucket in found[:2]] == [[weights[4], weights[3]], [weights[2], weights[1]]]
    assert found[2].parameters[0] is weights[0]
    assert all(parameter.numel() <= SMALL for parameter in found[2].parameters[1:])
    assert [bucket.size for bucket in found] == [2 * BLOCK, 2 * BLOCK, BLOCK + 5 * DIM + 2 * DIM]


def test_a_parameter_larger_than_a_bucket_and_one_of_another_type_have_their_own() -> None:
    model = Blocks(4)
    model.blocks[1].double()
    found = arrange(model.parameters(), BLOCK // 2)
    assert [bucket.size for bucket in found[:4]] == [BLOCK] * 4
    assert all(len({parameter.dtype for parameter in bucket.parameters}) == 1 for bucket in found)


def test_frozen_parameters_are_not_sent() -> None:
    model = Blocks(2)
    model.blocks.requires_grad_(False)
    assert [bucket.size for bucket in arrange(model.parameters(), BLOCK)] == [2 * DIM]


def test_every_gradient_is_the_sum_also_of_earlier_passes_and_of_what_no_loss_reaches() -> None:
    torch.manual_seed(1)
    model, x = Blocks(3), torch.randn(2, DIM)
    model(x).backward()
    model(x, without=1).backward()
    expected = {name: 2 * parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.unused = nn.Parameter(torch.ones(3))
    expected["unused"] = torch.zeros(3)
    buckets = GradientBuckets(list(model.parameters()), BLOCK)
    model(x).backward()
    assert buckets.sent == 0, "only the last pass sends"
    total = model(x, without=1)
    buckets.watch(total)
    total.backward()
    buckets.finish()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ["hubert_base", "k2ssl_base", "wavlm_base"])
def test_a_presets_gradients_are_sent_while_the_backward_pass_goes_on(name: str) -> None:
    encoder = build_backbone(load([name], ["data.train=none"]).config)
    encoder.train()
    parameters = list(encoder.parameters())
    elements = sum(parameter.numel() for parameter in parameters)
    size = elements // 10
    buckets = GradientBuckets(parameters, size)
    arrived, most = 0, 0

    def count(parameter: Tensor) -> None:
        nonlocal arrived, most
        arrived += parameter.numel()
        most = max(most, arrived - sum(bucket.size for bucket in buckets._buckets[: buckets.sent]))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(count)
    draws.begin_micro_batch(1, 0, 0)
    total = encoder(torch.randn(1, 8000), torch.tensor([8000])).last.sum()
    buckets._reaches_few = True  # no frame is masked here, and blocks may be dropped
    buckets.watch(total)
    total.backward()
    assert most < 2 * size, "what has arrived and is not under way"


def test_a_block_that_is_left_out_holds_nothing_up_from_the_second_time_on() -> None:
    model, x = Blocks(6), torch.randn(2, DIM)
    buckets = GradientBuckets(list(model.parameters()), BLOCK)
    sent = []
    for _ in range(3):
        total = model(x, without=4)
        buckets.watch(total)
        total.backward()
        sent.append(buckets.sent)
        buckets.finish()
        buckets.forget()
    assert sent == [1, buckets.number, buckets.number]


def test_after_a_pass_that_broke_off_the_rest_is_sent_as_zeros(sums: list[Tensor]) -> None:
    model, x = Blocks(3), torch.randn(2, DIM)
    buckets = GradientBuckets(list(model.parameters()), BLOCK)
    stop = model.blocks[1].weight.register_hook(_run_out)
    total = model(x)
    buckets.watch(total)
    with pytest.raises(MemoryError):
        total.backward()
    assert buckets.sent == 1
    buckets.forget()
    assert buckets.sent == 1, "the others wait for the rest"
    buckets.send_rest()
    assert [bool(values.any()) for values in sums] == [True, *[False] * (buckets.number - 1)]
    buckets.forget()
    assert buckets.sent == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    stop.remove()
    model(x).backward()
    buckets.finish()
    assert all(parameter.grad is not None for parameter in model.parameters()), "the repeated step is sent after it"


def _run_out(gradient: Tensor) -> None:
    raise MemoryError


def test_a_gradient_has_the_layout_of_its_parameter() -> None:
    model = nn.Conv2d(160, 16, 3, bias=False).to(memory_format=torch.channels_last)
    buckets = GradientBuckets(list(model.parameters()), 10**6)
    total = model(torch.randn(1, 160, 5, 5)).sum()
    buckets.watch(total)
    total.backward()
    expected = 2 * model.weight.grad
    buckets.finish()
    assert model.weight.grad is not None
    assert model.weight.grad.stride() == model.weight.stride()
    assert torch.equal(model.weight.grad, expected)


def test_a_gradient_that_comes_twice_in_a_pass_is_refused_rather_than_lost() -> None:
    weight = nn.Parameter(torch.ones(3))
    buckets = GradientBuckets([weight], 10)
    total = (weight * 2).sum()
    buckets.watch(total)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice in one pass"):
        total.backward()
