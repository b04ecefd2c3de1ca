"""Mamba-2: chunks over spans equal its definition, token by token, on each sequence alone; in float64."""

import pytest
import torch
import torch.nn.functional as F
from test_families import MAMBA, PAIRS, PUBLISHED
from test_gated_delta import GREEDY, alone, beside_the_definition
from test_model import LLAMA, assert_same_gradients, make, stream

import model as models
from extras.decoder.chunks import CHUNK, plan_chunks
from extras.decoder.generate import complete
from extras.decoder.mamba import Mamba, scan
from extras.decoder.mixers import attends, recurs
from parts.names import find_places

transformers = pytest.importorskip("transformers", reason="needs transformers")

GRANITE_H = LLAMA | MAMBA | dict(
    model_type="granitemoehybrid", num_hidden_layers=3, shared_intermediate_size=24, layer_types=["mamba", "attention", "mamba"])
FALCON_H1 = LLAMA | MAMBA | dict(
    model_type="falcon_h1", mamba_d_ssm=64, ssm_multipliers=[0.9, 1.3, 0.5, 1.7, 0.4], ssm_in_multiplier=1.25,
    ssm_out_multiplier=0.6, mlp_multipliers=[0.9, 0.6], attention_in_multiplier=1.3, attention_out_multiplier=0.9)
CASES = {
    "granite": GRANITE_H, "falcon": FALCON_H1, "norm": FALCON_H1 | dict(mamba_rms_norm=True, mamba_norm_before_gate=False),
    "norm first": FALCON_H1 | dict(mamba_rms_norm=True, time_step_limit=[0.1, 1.2])}


def definition(x, g, b, c):
    """Token by token: S = exp(g) S + b x^T; y = S^T c. Of one sequence, (T, H, ...) each."""
    state = torch.zeros(x.shape[1], b.shape[2], x.shape[2], dtype=x.dtype)
    out = []
    for t in range(len(x)):
        state = state * g[t].exp()[:, None, None] + torch.einsum("hs,hp->hsp", b[t], x[t])
        out.append(torch.einsum("hsp,hs->hp", state, c[t]))
    return torch.stack(out)


def layer_alone(layer: Mamba, x: torch.Tensor) -> torch.Tensor:
    """The layer on one sequence x (T, C), written out from the paper and the published layers, without any chunk."""
    c = layer.c
    H, G, p, s = c["heads"], c["groups"], c["head_size"], c["state_size"]
    sizes = [H * p, H * p, G * s, G * s, H]
    parts = layer.in_proj(x).split(sizes, -1)
    if c["scales"]:
        parts = [part * scale for part, scale in zip(parts, c["scales"])]
    gate, *mixed, dt = parts
    mixed = torch.cat(mixed, -1).T[None]
    width = layer.conv1d.weight.shape[-1]
    mixed = F.conv1d(F.pad(mixed, (width - 1, 0)), layer.conv1d.weight, layer.conv1d.bias, groups=mixed.shape[1])
    v, b, k = F.silu(mixed)[0].T.split(sizes[1:4], -1)
    v = v.reshape(-1, H, p)
    b, k = (t.reshape(-1, G, s).repeat_interleave(H // G, 1) for t in (b, k))
    dt = F.softplus(dt + layer.dt_bias).clamp(*c["dt_limit"])
    out = definition(v * dt[..., None], -layer.A_log.exp() * dt, b, k) + layer.D[:, None] * v
    out = out.flatten(1)
    norm = lambda t: F.rms_norm(t.unflatten(1, (G, -1)), (H * p // G,), None, layer.norm.eps).flatten(1) * layer.norm.weight
    if c["norm"] == "first":
        out = norm(out) * F.silu(gate)
    else:
        out = out * F.silu(gate)
        out = norm(out) if c["norm"] else out
    return layer.out_proj(out * c.get("out_scale", 1.0))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chunk", [1, 8, CHUNK])
def test_a_layer_over_spans_equals_the_definition_on_every_sequence(name, shared, chunk):
    """Values and gradients, of the input and of every weight."""
    layer = make(CASES[name]).model.layers[0].mamba
    torch.manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p += torch.randn_like(p) * 0.2
    apart, grads = beside_the_definition(layer, layer_alone, shared, chunk)
    assert apart < 1e-10
    assert_same_gradients(*grads, 1e-9)
    assert all(g.abs().max() > 1e-6 for g in grads[0].values())


def test_strong_and_weak_decays_stay_finite():
    """exp of differences of sums, never of a sum with its sign turned: 64 tokens of g = -20 underflow to 0, not to nan."""
    plan = plan_chunks(torch.tensor([[0, 150, 0, 0]]), 4, torch.device("cpu"))
    torch.manual_seed(0)
    for g in (-20.0, -1e-7):
        inputs = [torch.randn(150, 2, 4), torch.full((150, 2), g), torch.randn(150, 1, 8), torch.randn(150, 1, 8)]
        inputs = [t.requires_grad_() for t in inputs]
        out, _ = scan(*inputs, plan)
        x, g, *more = (t.double() for t in inputs)
        exact = definition(x, g, *(t.repeat_interleave(2, 1) for t in more))
        assert (out - exact).abs().max() < 1e-5 * exact.abs().max()
        assert all(torch.isfinite(t).all() for t in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("name", ["granite", "falcon"])
def test_samples_of_a_prompt_go_on_from_its_state(name):
    """Several prompts, several samples of each: all as if each sequence were read alone."""
    model = make(CASES[name])
    prompts = [[5, 17, 3, 42, 8, 11, 29], [9], [4, 4, 30, 2]]
    with torch.no_grad():
        expected = [alone(model, prompt) for prompt in prompts]
    assert len({*map(tuple, expected)}) == 3
    assert complete(model, prompts, GREEDY) == expected
    assert complete(model, prompts, GREEDY, samples=2) == [e for e in expected for _ in range(2)]


def test_layers_say_what_they_have():
    granite, falcon = (models.read_config(CASES[n]) for n in ("granite", "falcon"))
    assert (recurs(granite), attends(granite)) == ((True, False, True), (False, True, False))
    assert recurs(falcon) == attends(falcon) == (True,) * falcon.num_hidden_layers
    assert models.read_config(GRANITE_H | dict(layer_types=["attention"] * 3)).mixer is None


def test_under_autocast_the_states_are_float32(monkeypatch):
    seen = []
    monkeypatch.setattr("extras.decoder.mamba.scan", lambda x, *more: seen.append(x.dtype) or scan(x, *more))
    with torch.autocast("cpu", torch.bfloat16):
        make(GRANITE_H, torch.float32)(models.Stream(*stream(PAIRS)))
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize("name, layers", [("granite-4.0-h-micro", (36, 4)), ("Falcon-H1-0.5B-Instruct", (36, 36))])
def test_published_configurations_make_the_tensors_of_transformers(name, layers):
    config = models.read_config(PUBLISHED[name])
    assert (sum(recurs(config)), sum(attends(config))) == layers
    count = assert_same_tensors(PUBLISHED[name])
    assert "Falcon" not in name or count == 521_411_104  # as published


def assert_same_tensors(raw: dict) -> int:
    """Names and shapes, each covered once; how many numbers they hold."""
    config = models.read_config(raw)
    with torch.device("meta"):
        ours = dict(models.Decoder(config).named_parameters())
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    shapes = {n: p.shape for n, p in theirs.named_parameters()}
    places = find_places(shapes, config)
    assert {n: place.view(ours[place.name]).shape for n, place in places.items()} == shapes
    assert len({p.name for p in places.values()}) == len(ours)
    return sum(p.numel() for p in ours.values())


@pytest.mark.parametrize("change, message", [
    (dict(mamba_d_head=7), "8 mamba_n_heads of 7 in 2 mamba_n_groups do not make 64 channels"),
    (dict(mamba_n_groups=3), "in 3 mamba_n_groups do not make"),
    (dict(mamba_proj_bias=True), "mamba_proj_bias = True is not supported"),
    (dict(layer_types=["mamba", "attention", "rwkv"]), "layer_types names rwkv"),
    (dict(mamba_d_state=0), "mamba_d_state = 0: expected a whole number from 1"),
    (dict(time_step_limit=[1.0, 0.5]), "time_step_limit = .1.0, 0.5.: expected two numbers"),
    (dict(time_step_limit="x"), "time_step_limit = 'x': expected two numbers"),
])
def test_numbers_that_make_no_layer_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        models.read_config(GRANITE_H | change)
