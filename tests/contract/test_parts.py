"""What every frontend, encoder, optimiser and schedule of the registry promises by itself, and draws."""

from __future__ import annotations

import pickle

import pytest
import torch
from tiny_parts import drawn, encoder_for, label_of, make_config, tiny, variants
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harken.config.registry import available, build, find
from harken.core.draws import Draws
from harken.data.dataset import collate
from harken.objectives.saved import build_objective, build_prepare
from harken.optim.groups import parameter_groups, set_rates

# Frontends and encoders


@pytest.mark.parametrize("variant", variants("frontend"), ids=label_of)
def test_a_frontend_gives_exactly_the_frames_its_spec_promises(corpus, variant) -> None:
    config = make_config(corpus, ("hubert", {}), variant, ("transformer", {}))
    frontend = build("frontend", config.frontend)
    spec = frontend.spec
    boundaries = [spec.receptive_field + count * spec.stride for count in (0, 1, 2, 7, 50)]
    for boundary in boundaries:
        for samples in (boundary - 1, boundary, boundary + 1):
            expected = spec.num_frames(samples)
            assert expected == (samples - spec.receptive_field) // spec.stride + 1
            if expected == 0:
                continue  # `data.min_seconds` keeps such audio out
            lengths = torch.tensor([samples, min(samples, spec.receptive_field)])
            with torch.no_grad():
                frames, frame_lengths = frontend(torch.randn(2, samples), lengths)
            assert frames.shape == (2, expected, frontend.dim)
            assert frame_lengths.tolist() == [expected, 1]
            assert torch.equal(spec.num_frames(lengths), frame_lengths)
            assert torch.isfinite(frames).all()


@pytest.mark.parametrize("variant", variants("encoder"), ids=label_of)
def test_an_encoder_returns_the_layers_it_is_asked_for(corpus, variant) -> None:
    config = make_config(corpus, ("hubert", {}), ("filterbank", {}), variant)
    encoder = build("encoder", config.encoder, input_dim=24).eval()
    layers = range(encoder.num_layers + 1)
    x = encoder.embed(torch.randn(2, 30, 24))
    encoded = encoder.encode(x, torch.tensor([30, 21]), layers)
    assert encoded.last.shape == (2, 30, encoder.dim)
    assert sorted(encoded.hidden) == list(layers)
    assert all(value.shape == (2, 30, encoder.dim) for value in encoded.hidden.values())
    assert encoder.encode(x, torch.tensor([30, 21])).hidden == {}
    depths = [encoder.depth(name) for name, _ in encoder.named_parameters()]
    assert set(depths) == set(layers)


@pytest.mark.parametrize("variant", variants("encoder"), ids=label_of)
def test_a_causal_encoder_looks_back_only(corpus, variant) -> None:
    config = make_config(corpus, ("hubert", {}), ("filterbank", {}), variant)
    encoder = build("encoder", config.encoder, input_dim=24).eval()
    frames, lengths, layers = torch.randn(2, 30, 24), torch.tensor([30, 30]), range(1, encoder.num_layers + 1)
    later = torch.cat([frames[:, :20], torch.randn(2, 10, 24)], 1)
    first, second = (encoder.encode(encoder.embed(x), lengths, layers).hidden for x in (frames, later))
    same = all(torch.allclose(first[layer][:, :20], second[layer][:, :20], atol=1e-6) for layer in layers)
    assert same == encoder.causal
    assert not torch.allclose(first[1][:, 20], second[1][:, 20], atol=1e-3)


@pytest.mark.parametrize("variant", variants("encoder"), ids=label_of)
def test_recomputing_activations_changes_nothing(corpus, variant) -> None:
    config = make_config(corpus, ("hubert", {}), ("filterbank", {}), variant)
    encoder = build("encoder", config.encoder, input_dim=24).train()
    frames, results = torch.randn(2, 30, 24), []
    for checkpoint in (False, True):
        encoder.checkpoint_blocks = checkpoint
        encoder.zero_grad()
        last = encoder.encode(encoder.embed(frames), torch.tensor([30, 21])).last
        last.square().sum().backward()
        results.append([last.detach(), *(parameter.grad.clone() for parameter in encoder.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch says it when the kernels below are switched
@pytest.mark.parametrize("encoder", variants("encoder"), ids=label_of)
@pytest.mark.parametrize("frontend", variants("frontend"), ids=label_of)
def test_flops_agree_with_torchs_counter(corpus, frontend, encoder) -> None:
    backbone = build_objective(make_config(corpus, ("hubert", {}), frontend, encoder)).backbone.eval()
    samples = 48000
    # torch counts the fused attention of GPUs only, and no fused LSTM, and so the plain products
    plain = (sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False))
    with torch.no_grad(), plain[0], plain[1], FlopCounterMode(display=False) as counter:
        backbone(torch.randn(1, samples), torch.tensor([samples]))
    own = backbone.frontend.flops(samples) + backbone.encoder.flops(backbone.spec.num_frames(samples))
    assert own == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("objective", available("objective"))
def test_a_steps_flops_are_three_forward_passes(corpus, rows, objective: str) -> None:
    encoder = (encoder_for(objective), {})
    config = make_config(corpus, (objective, {}), ("waveform", {"grad_scale": 1.0}), encoder)
    model = build_objective(config)
    prepare = build_prepare(config, model.backbone.spec, train=True)
    batch = drawn(prepare, collate(rows[-1:]))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).total.backward()
    # the head sees the masked frames alone, or all of them: it is small
    assert model.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.1)


# Optimisers, schedules, draws


@pytest.mark.parametrize("name", available("optimizer"))
def test_an_optimizer_lowers_a_loss_and_its_state_can_be_restored(name: str) -> None:
    torch.manual_seed(0)
    settings = tiny("optimizer", name)
    config = find("optimizer", name).config(**settings)

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, list[str]]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
        groups = parameter_groups(model, lambda parameter, step: 0.5 if parameter.startswith("1.") else 1.0)
        optimizer = build("optimizer", config, groups=groups)
        return model, optimizer, [str(group["names"][0]) for group in groups]

    x, y = torch.randn(16, 8), torch.randn(16, 8)

    def step(model, optimizer, names) -> float:
        set_rates(optimizer, names, 1e-2, lambda parameter, step: 1.0, 0)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    first = make()
    losses = [step(*first) for _ in range(20)]
    assert losses[-1] < losses[0]
    second = make()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(pickle.loads(pickle.dumps(first[1].state_dict())))
    assert step(*first) == step(*second)
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))


@pytest.mark.parametrize("name", available("schedule"))
def test_a_schedule_is_a_function_of_steps_and_hours(name: str) -> None:
    config = find("schedule", name).config(**tiny("schedule", name))
    schedule, again = build("schedule", config, steps=100), build("schedule", config, steps=100)
    rates = [schedule(step, step / 10) for step in range(101)]
    assert all(0 <= rate <= 1e-3 * (1 + 1e-9) for rate in rates)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[0] < 1e-3, "it warms up"
    assert [again(step, step / 10) for step in reversed(range(101))] == rates[::-1]


def test_draws_are_a_pure_function_of_their_key() -> None:
    def draw(*, seed: int = 1, epoch: int = 2, purpose: str = "mask", item: str = "a") -> list[int]:
        return Draws(seed, epoch).generator(purpose, item).integers(0, 2**62, 4).tolist()

    draws = Draws(1, 2)
    draws.generator("mask", "b").random(100)
    assert draws.generator("mask", "a").integers(0, 2**62, 4).tolist() == draw()
    # fixed for ever: another value would change the data of every run that is continued
    assert draw()[0] == 1313212647532231370
    others = [draw(seed=2), draw(epoch=3), draw(purpose="crop"), draw(item="b")]
    assert len({tuple(values) for values in [draw(), *others]}) == 5
