"""What every frontend, encoder, objective, optimiser and schedule of the registry promises, in every combination."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harken.config.load import from_dict, load, to_yaml
from harken.config.registry import available, build, find
from harken.config.saved import save_model
from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.draws import Draws, begin_micro_batch, key
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.objectives.base import Objective
from harken.objectives.saved import build_objective, build_prepare
from harken.optim.groups import parameter_groups, set_rates

# of two blocks: in the first one masked tokens are zeros, and so are their queries before the first step
DECODER = {"decoder_layers": 2, "decoder_dim": 16, "decoder_heads": 2, "decoder_ffn_dim": 16, "decoder_dropout": 0.0}
DECODER |= {"decoder_position_kernel": 5}
# The smallest useful settings of each part: a part that is new to the registry needs a line here to be tested.
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "frontend": {
        "convnext": {
            "bands": 20,
            "channels": 24,
            "maps": [2, 4, 8],
            "dropout": 0.0,
            "start_dropout": 0.0,
            "random_skips": False,
            "gradient_limits": False,
        },
        "filterbank": {"bands": 20, "channels": 24, "subsampling": 2},
        "patches": {"bands": 16, "channels": 12, "patch_frames": 4, "patch_bands": 8},
        "waveform": {"channels": 16},
    },
    "encoder": {
        "causal_convolution": {"dim": 32, "kernels": [2, 3]},
        "conformer": {
            "dim": 32,
            "layers": 2,
            "heads": 4,
            "ffn_dim": 32,
            "kernel": 7,
            "position_kernel": 16,
            "position_groups": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "input_dropout": 0.0,
        },
        "e_branchformer": {
            "dim": 32,
            "layers": 2,
            "heads": 4,
            "ffn_dim": 32,
            "gate_dim": 48,
            "kernel": 7,
            "merge_kernel": 5,
            "position_kernel": 16,
            "position_groups": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "input_dropout": 0.0,
        },
        "multi_resolution": {
            "dim": 32,
            "layers": 3,
            "stages": [1, 1, 1],
            "heads": 4,
            "ffn_dim": 64,
            "position_kernel": 16,
            "position_groups": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "input_dropout": 0.0,
            "layer_drop": 0.0,
        },
        "recurrent": {"dim": 32, "layers": 2},
        "transformer": {
            "dim": 32,
            "layers": 2,
            "heads": 4,
            "ffn_dim": 64,
            "position_kernel": 16,
            "position_groups": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "input_dropout": 0.0,
            "layer_drop": 0.0,
        },
        "wavlm": {
            "dim": 32,
            "layers": 2,
            "heads": 4,
            "ffn_dim": 64,
            "position_kernel": 16,
            "position_groups": 4,
            "position_buckets": 16,
            "position_max_distance": 40,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "input_dropout": 0.0,
            "layer_drop": 0.0,
        },
        "zipformer": {
            "downsampling": [1, 2, 4],
            "layers": [1, 2, 1],
            "dims": [16, 32, 24],
            "unmasked_dims": [16],
            "ffn_dims": [32],
            "heads": [4],
            "kernels": [7],
            "query_dims": [8],
            "value_dims": [6],
            "position_dim": 16,
            "dropout": 0.0,
            "start_dropout": 0.0,
            "position_dropout": 0.0,
            "random_skips": False,
            "gradient_limits": False,
        },
    },
    "objective": {
        "beats": {"classes": 12, "code_dim": 8, "bands": 20, **DECODER},
        "beats_tokenizer": {"teacher": "TEACHER", "codes": 12, "code_dim": 8, **DECODER},
        "bestrq": {"codes": 16, "code_dim": 8, "bands": 20, "mask_length": 4},
        "cpc": {"steps": 3, "negatives": 8, "heads": 4, "ffn_dim": 32, "dropout": 0.0},
        "ctc": {
            "tokenizer": "TOKENS",
            "mask_length": 4,
            "mask_channel_probability": 0.2,
            "mask_channel_length": 4,
            "band_masks": 1,
        },
        "data2vec": {"mask_length": 4, "top_layers": 2},
        "data2vec2": {
            "mask_length": 2,
            "top_layers": 2,
            "clones": 2,
            "decoder_dim": 16,
            "decoder_layers": 2,
            "decoder_kernel": 3,
            "decoder_groups": 2,
        },
        "data2vec_aqc": {
            "mask_length": 4,
            "top_layers": 2,
            "negatives": 8,
            "entries": 6,
            "code_dim": 16,
            "cluster_factor": 4,
        },
        "hubert": {"classes": "CLASSES", "code_dim": 16, "mask_length": 4, "unmasked_weight": 0.5},
        "transducer": {
            "tokenizer": "TOKENS",
            "mask_length": 4,
            "band_masks": 1,
            "predictor_dim": 16,
            "joiner_dim": 16,
        },
        "unispeech_sat": {
            "classes": "CLASSES",
            "code_dim": 16,
            "mask_length": 4,
            "contrast_layer": 1,
            "instances": 8,
            "entries": 6,
        },
        "wav2vec": {"steps": 3, "negatives": 4},
        "wav2vec2": {"mask_length": 4, "negatives": 8, "entries": 6, "code_dim": 16},
    },
    "optimizer": {"adamw": {}, "scaled_adam": {}},
    "schedule": {
        "constant": {"rate": 1e-3, "warmup_steps": 3},
        "cosine": {"peak": 1e-3, "warmup_steps": 3},
        "eden": {"rate": 1e-3, "lr_steps": 1e6, "lr_hours": 1e6, "warmup_steps": 3},
        "infinite": {"peak": 1e-3, "constant": 4e-4, "warmup_steps": 3, "cooldown_steps": 20},
        "linear": {"peak": 1e-3, "warmup_steps": 3},
        "tri_stage": {"peak": 1e-3},
        "warmup_stable_decay": {"peak": 1e-3, "warmup_steps": 3},
    },
}
# Settings beside the default ones that change what a part computes.
VARIANTS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("frontend", "filterbank"): [
        {},
        {"convolution": "time_frequency", "subsampling": 4, "maps": 4},
        {"subsampling": 1},
    ],
    ("frontend", "waveform"): [{}, {"norm": "layer", "bias": True, "normalize": True}],
    ("encoder", "causal_convolution"): [{}, {"skip": False}],
    ("encoder", "multi_resolution"): [
        {},
        {"layers": 5, "stages": [1, 1, 1, 1, 1], "factors": [2, 3], "kernel": 3, "norm_first": True},
    ],
    ("encoder", "recurrent"): [{}, {"cell": "gru"}],
    ("encoder", "transformer"): [
        {},
        {"norm_first": True, "position_kernel": 15},
        {"position_kernel": 14, "position_depth": 3},
        {"rows": 2, "positions": "grid"},
    ],
    ("encoder", "wavlm"): [{}, {"norm_first": True}, {"rows": 2, "deep_norm": True, "gate_on": "query"}],
    ("encoder", "zipformer"): [
        {},
        {"causal": True},
        {"causal": True, "chunk_frames": [8], "left_frames": [16], "eval_chunk_frames": 8, "eval_left_frames": 16},
    ],
    ("objective", "beats"): [{}, {"targets": "labels", "mask_length": 2}],
    ("objective", "bestrq"): [{}, {"codebooks": 3}],
    ("objective", "cpc"): [{}, {"predictor": "linear", "mean_product": False, "first_step": 2}],
    ("objective", "ctc"): [{}, {"head_upsampling": 2, "intermediate_layers": [1]}],
    ("objective", "data2vec"): [{}, {"beta": 0.5, "loss_scale": 2.0, "targets": "block"}],
    ("objective", "data2vec2"): [{}, {"inverse_mask": True, "normalize_targets": True, "utterance_weight": 1.0}],
    ("objective", "data2vec_aqc"): [{}, {"views": "both", "beta": 0.5}, {"contrast_weight": 0.0}],
    ("objective", "hubert"): [
        {},
        {"head": "linear"},
        {"predict_layers": [1, 2], "head": "linear"},
        {"predict_layers": [1, 2], "swap_layers": [1]},
    ],
    ("objective", "transducer"): [{}, {"ctc_weight": 0.2, "prune_range": 2, "context": 1}],
    ("objective", "unispeech_sat"): [{}, {"contrast_layer": 2, "contrast_norm": True, "predict_layers": [1, 2]}],
    ("objective", "wav2vec"): [{}, {"first_step": 3, "negative_weight": 0.5}],
    ("objective", "wav2vec2"): [
        {},
        {"quantizer_dim": 24, "groups": 3, "mask_probability": 0.3},
        {"views": "context"},
        {"views": "both", "projection": "mlp"},
    ],
}


def tiny(slot: str, name: str) -> dict[str, Any]:
    if name not in TINY[slot]:
        pytest.fail(f"add settings for the {slot} `{name}` to TINY in {__file__}, so that it is tested")
    return {"name": name, **TINY[slot][name]}


Variant = tuple[str, dict[str, Any]]  # a name of a slot and changes to its tiny configuration


def variants(slot: str) -> list[Variant]:
    return [(name, changes) for name in available(slot) for changes in VARIANTS.get((slot, name), [{}])]


def label_of(variant: tuple[str, dict[str, Any]]) -> str:
    name, changes = variant
    return "+".join([name, *(f"{key}={value}" for key, value in changes.items())])


def make_config(
    corpus, objective, frontend, encoder, optimizer: str = "adamw", schedule: str = "constant"
) -> RunConfig:
    from harken.units.store import LabelStore

    settings = corpus.settings("hubert", "filterbank")
    for slot, (name, changes) in (("objective", objective), ("frontend", frontend), ("encoder", encoder)):
        settings[slot] = {**tiny(slot, name), **changes}
    settings["optimizer"], settings["schedule"] = tiny("optimizer", optimizer), tiny("schedule", schedule)
    for field, value in settings["objective"].items():
        if value == "TOKENS":
            settings["objective"][field] = str(corpus.tokens)
        elif value == "CLASSES":
            settings["objective"][field] = [LabelStore(corpus.labels).card.clusters]
        elif value == "TEACHER":
            settings["objective"][field] = str(save_teacher(corpus, settings))
    return from_dict(settings)


def save_teacher(corpus, settings: dict[str, Any]) -> Path:
    """Save a fresh backbone of the same frames and rows."""
    backbone = {"frontend": settings["frontend"], "encoder": settings["encoder"]}
    folder = corpus.root / f"teacher-{key(json.dumps(backbone)):x}"
    if not folder.is_dir():
        config = from_dict({**corpus.settings("hubert", "filterbank"), **backbone})
        folder.mkdir()
        save_model(folder, config, build_objective(config).state_dict())
    return folder


@pytest.fixture(scope="module")
def rows(corpus) -> list[Row]:
    """Six utterances of 0.6 s to 2 s."""
    manifest = Manifest(corpus.train)
    places = np.argsort(np.asarray(manifest.seconds))[:48:8]
    cuts = [manifest[int(place)] for place in places]
    return [Row(cut.id, cut.supervisions[0].text, read_cut(cut, 16000), 0) for cut in cuts]


def agree(objective: str, encoder: str) -> bool:
    """An objective that predicts the future is for encoders that do not see it."""
    return find("encoder", encoder).build.causal or not find("objective", objective).build.needs_causal


def encoder_for(objective: str) -> str:
    """The encoder of a test over objectives."""
    return "transformer" if agree(objective, "transformer") else "causal_convolution"


NOTHING_DRAWN = {"beats_tokenizer"}
"""Objectives that see the audio as it is."""
EVERYTHING = {"hubert", "ctc"}
"""Objectives that are tested with every frontend under every encoder: one of masks, one of transcripts."""


def is_tested(objective: str, frontend: Variant, encoder: Variant) -> bool:
    """Whether the three are tested together: every objective with every frontend, and with every encoder."""
    if not agree(objective, encoder[0]):
        return False
    return objective in EVERYTHING or frontend == ("filterbank", {}) or encoder == (encoder_for(objective), {})


COMBINATIONS = [
    *(
        ((objective, {}), frontend, encoder)
        for objective, frontend, encoder in itertools.product(
            available("objective"), variants("frontend"), variants("encoder")
        )
        if is_tested(objective, frontend, encoder)
    ),
    *(
        (objective, ("filterbank", {}), (encoder_for(objective[0]), {}))
        for objective in variants("objective")
        if objective[1]
    ),
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda parts: "-".join(map(label_of, parts)))
def combination(request, corpus) -> tuple[RunConfig, Objective, Any]:
    """A configuration, its objective with fresh weights, and its Prepare."""
    config = make_config(corpus, *request.param)
    torch.manual_seed(3)
    model = build_objective(config)
    return config, model, build_prepare(config, model.backbone.spec, train=True)


DRAWS = Draws(5, 2)


def drawn(prepare, batch: Batch, draws: Draws = DRAWS) -> Batch:
    """Prepare a batch whose rows are of one epoch."""
    return prepare(batch, [draws] * len(batch.ids))


def total(model: Objective, batch: Batch) -> float:
    with torch.no_grad():
        return float(model(batch).total)


def pad(batch: Batch, samples: int) -> Batch:
    return replace(batch, inputs=torch.nn.functional.pad(batch.inputs, (0, samples)))


def test_the_loss_is_finite_and_every_trainable_parameter_gets_a_gradient(combination, rows) -> None:
    _, model, prepare = combination
    model.train()
    model.zero_grad()
    batch = drawn(prepare, collate(rows))
    assert batch.num_targets > 0
    loss = model(batch)
    assert loss.total.shape == ()
    assert torch.isfinite(loss.total)
    assert "loss" in loss.metrics
    for name, (value, weight) in loss.metrics.items():
        assert value.shape == weight.shape == (), name
        assert not value.requires_grad, name
        assert torch.isfinite(value), name
    (loss.total / batch.num_targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, f"{name}: freezing is the business of `rate_scale`"
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if any(model.rate_scale(name, step) for step in (0, 10**9)):
            assert parameter.grad.any(), f"{name} has a gradient of zeros"


def test_gradients_come_in_one_order_whatever_the_batch(combination, rows) -> None:
    """ZeRO 2 adds up ranks' gradients in the order in which they come; ranks have different batches."""
    _, model, prepare = combination
    model.train()
    arrived: list[str] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
        for name, parameter in model.named_parameters()
    ]
    orders = {}
    for kind, batch in {
        "ragged": collate(rows),
        "one row": collate(rows[:1]),
        "equal rows": collate([rows[0], rows[0]]),
        "padded row": pad(collate(rows[1:2]), 8000),
    }.items():
        arrived.clear()
        begin_micro_batch(1, 0, 0)
        model.zero_grad()
        model(drawn(prepare, batch)).total.backward()
        orders[kind] = list(arrived)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    for kind, order in orders.items():
        assert order == orders["ragged"], (
            f"{kind}: {[a for a, b in zip(order, orders['ragged'], strict=True) if a != b]}"
        )


def test_nothing_in_a_pass_waits_for_the_device(combination, rows, waits) -> None:
    _, model, prepare = combination
    model.train()
    model.zero_grad()
    begin_micro_batch(1, 0, 0)
    batch = drawn(prepare, collate(rows))
    targets = {name: value.clone() for name, value in batch.targets.items()}
    batch = replace(batch, inputs=batch.inputs.clone(), targets=targets)
    waits.begin([*model.parameters(), *model.buffers(), batch.inputs, *targets.values()])
    with waits:
        model(batch).total.backward()
    model.zero_grad()
    assert not waits.found


def test_padding_does_not_change_an_utterances_loss(combination, rows) -> None:
    _, model, prepare = combination
    model.eval()
    for row in rows[:3]:
        alone = drawn(prepare, collate([row]))
        padded = drawn(prepare, pad(collate([row]), 16000))
        assert padded.num_targets == alone.num_targets
        assert total(model, padded) == pytest.approx(total(model, alone), rel=1e-4), row.cut


def test_a_batch_is_the_sum_of_its_utterances(combination, rows) -> None:
    _, model, prepare = combination
    model.eval()
    whole = drawn(prepare, collate(rows))
    for size in (1, 3):
        parts = [drawn(prepare, collate(rows[start : start + size])) for start in range(0, len(rows), size)]
        assert sum(part.num_targets for part in parts) == whole.num_targets
        summed = sum(total(model, part) for part in parts)
        assert (summed == pytest.approx(total(model, whole), rel=1e-4)) is not model.compares_utterances


def test_prepare_is_pure_and_can_be_pickled(combination, rows) -> None:
    config, _, prepare = combination
    batch = collate(rows)
    before = (batch.inputs.clone(), batch.lengths.clone(), dict(batch.targets))
    first, second = drawn(prepare, batch), drawn(pickle.loads(pickle.dumps(prepare)), batch, Draws(5, 2))
    assert len(pickle.dumps(prepare)) < 100_000, "it travels to every worker"
    assert torch.equal(batch.inputs, before[0])
    assert torch.equal(batch.lengths, before[1])
    assert batch.targets == before[2]
    assert first.targets.keys() == second.targets.keys()
    assert all(torch.equal(value, second.targets[name]) for name, value in first.targets.items())
    assert first.num_targets == second.num_targets
    other = drawn(prepare, batch, Draws(5, 3))
    assert config.objective.name in NOTHING_DRAWN or any(
        value.shape != other.targets[name].shape or not torch.equal(value, other.targets[name])
        for name, value in first.targets.items()
    ), "another epoch draws other masks"


def test_validation_draws_the_same_at_every_pass(combination, rows) -> None:
    config, model, _ = combination
    prepare = build_prepare(config, model.backbone.spec, train=False)
    first, second = (drawn(prepare, collate(rows), Draws(0, 0)) for _ in range(2))
    assert all(torch.equal(value, second.targets[name]) for name, value in first.targets.items())


def test_rate_scale_knows_every_parameter(combination) -> None:
    _, model, _ = combination
    for name, _ in model.named_parameters():
        assert 0 <= model.rate_scale(name, 0) < math.inf, name


def test_the_configuration_survives_the_round_trip(combination, tmp_path) -> None:
    config, _, _ = combination
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load([tmp_path / "run.yaml"]).config == config


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
