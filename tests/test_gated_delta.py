"""The gated delta rule: chunks over spans equal its definition, token by token, on each sequence alone; in float64."""

import pytest
import torch
import torch.nn.functional as F
from test_families import DELTA, EXPERTS, PAIRS, our_logits, random_model, their_logits
from test_model import LLAMA, assert_same_gradients, make, random_pairs, stream

import model as models
from extras.decoder.chunks import CHUNK, plan_chunks
from extras.decoder.gated_delta import GatedDelta, delta_rule
from extras.decoder.generate import Cache, Sampling, complete, generate
from extras.models.opening import load_model

SMALL = LLAMA | DELTA | dict(model_type="qwen3_5_text", num_hidden_layers=3)
SPARSE = EXPERTS | DELTA | dict(model_type="qwen3_next", rms_norm_eps=1e-6, moe_intermediate_size=16,
                                shared_expert_intermediate_size=24)
# shorter than the convolution, than a chunk, exactly chunks, and much longer
LONG = random_pairs([(1, 1, 2), (2, 9, 1), (8, 8, 16), (30, 21, 5), (13, 1, 40)], seed=3)


def definition(q, k, v, g, beta):
    """Token by token: S = exp(g) S; S = S + beta k (v - S^T k)^T; o = S^T q. Of one sequence, (T, H, ...) each."""
    state = torch.zeros(k.shape[1], k.shape[2], v.shape[2], dtype=k.dtype)
    out = []
    for t in range(len(k)):
        state = state * g[t].exp()[:, None, None]
        read = torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - read))
        out.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(out)


def sequences(pairs, shared: bool):
    """For every span of the stream: the positions of the whole sequence that ends in it, and how many are its own."""
    for start, end, a, b in stream(pairs, shared)[2].tolist():
        yield [*range(a, b), *range(start, end)], end - start


def layer_alone(layer: GatedDelta, x: torch.Tensor) -> torch.Tensor:
    """The layer on one sequence x (T, C), written out from the paper and the published layers, without any chunk."""
    c = layer
    (K, H), (dk, dv) = c.heads, c.sizes
    if c.fused:  # q, k, v, z of one key head after another
        mixed = c.in_proj_qkvz(x).view(len(x), K, -1)
        q, k, v, z = mixed.split([dk, dk, H // K * dv, H // K * dv], -1)
        b, a = c.in_proj_ba(x).view(len(x), K, -1).chunk(2, -1)
        q, k, v, z, b, a = (t.reshape(len(x), -1) for t in (q, k, v, z, b, a))
    else:
        q, k, v = c.in_proj_qkv(x).split([K * dk, K * dk, H * dv], -1)
        z, b, a = c.in_proj_z(x), c.in_proj_b(x), c.in_proj_a(x)
    mixed = torch.cat([q, k, v], -1).T[None]
    width = c.conv1d.weight.shape[-1]
    mixed = F.silu(F.conv1d(F.pad(mixed, (width - 1, 0)), c.conv1d.weight, groups=mixed.shape[1]))[0].T
    q, k, v = mixed.split([K * dk, K * dk, H * dv], -1)
    q, k = (t.view(-1, K, dk) / (t.view(-1, K, dk).square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    q, k = ((t.repeat_interleave(H // K, 1)) for t in (q * dk**-0.5, k))
    g = -c.A_log.exp() * F.softplus(a + c.dt_bias)
    out = definition(q, k, v.view(-1, H, dv), g, b.sigmoid())
    out = F.rms_norm(out, (dv,), c.norm.weight, c.norm.eps) * F.silu(z.view(-1, H, dv))
    return c.out_proj(out.flatten(1))


def beside_the_definition(layer, alone, shared: bool, chunk: int) -> tuple[torch.Tensor, list[dict]]:
    """How far a layer over spans is from `alone` on every sequence, and the gradients of both: of x and of the weights."""
    spans = stream(LONG, shared)[2]
    x = torch.randn(int(spans[-1, 1]), 32, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(x), 32, dtype=torch.float64)
    got = layer(x, {}, {"mixer": (plan_chunks(spans, 4, x.device, chunk), None)})
    expected = torch.cat([alone(layer, x[rows])[len(rows) - own :] for rows, own in sequences(LONG, shared)])
    named = {"x": x} | dict(layer.named_parameters())
    grads = [dict(zip(named, torch.autograd.grad((out * weights).sum(), named.values()))) for out in (got, expected)]
    return (got - expected).abs().max(), grads


@pytest.mark.parametrize("config", [SMALL, SPARSE], ids=["separate", "fused"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chunk", [1, 8, CHUNK])
def test_a_layer_over_spans_equals_the_definition_on_every_sequence(config, shared, chunk):
    """Values and gradients, of the input and of every weight."""
    layer = make(config).model.layers[0].linear_attn
    torch.manual_seed(1)
    apart, grads = beside_the_definition(layer, layer_alone, shared, chunk)
    assert apart < 1e-10
    assert_same_gradients(*grads, 1e-9)
    assert all(g.abs().max() > 1e-4 for g in grads[0].values())


def test_a_prompt_is_computed_once_and_its_state_forks():
    """A pair of 30 + 21 + 5 tokens is 56 tokens of chunks, not 86; both completions go on from one chunk."""
    plan = plan_chunks(stream(random_pairs([(30, 21, 5)]))[2], 4, torch.device("cpu"), 10)
    assert plan.steps == [1, 1, 1, 2, 1, 1]
    assert [p.tolist() for p in plan.parents] == [[0], [0], [0, 0], [0], [0]]
    assert len(plan.place) == len(plan.place.unique()) == 56


def test_spans_of_a_stream_run_side_by_side():
    """As many steps as the longest sequence has chunks, however many pairs there are."""
    pairs = random_pairs([(100, 70, 10)] * 8)
    plan = plan_chunks(stream(pairs)[2], 4, torch.device("cpu"))
    assert plan.steps == [8, 8, 16, 8]


def test_strong_and_weak_decays_stay_finite():
    """exp of differences of sums, never of a sum with its sign turned: 64 tokens of g = -20 underflow to 0, not to nan."""
    spans = torch.tensor([[0, 150, 0, 0]])
    plan = plan_chunks(spans, 4, torch.device("cpu"))
    torch.manual_seed(0)
    for g in (-20.0, -1e-7):
        q, k = (F.normalize(torch.randn(150, 1, 8), dim=-1) for _ in range(2))
        v, beta = torch.randn(150, 2, 4), torch.full((150, 2), 0.999)
        inputs = [t.requires_grad_() for t in (q, k, v, torch.full((150, 2), g), beta)]
        out, _ = delta_rule(*inputs, plan)
        wide = [t.double() for t in inputs]
        exact = definition(*(t.repeat_interleave(2, 1) for t in wide[:2]), *wide[2:])
        assert (out - exact).abs().max() < 1e-5
        assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum(), inputs))


def test_a_prefix_that_is_no_span_of_the_stream_is_refused():
    with pytest.raises(ValueError, match="prefix"):
        plan_chunks(torch.tensor([[0, 4, 0, 0], [4, 6, 1, 3]]), 4, torch.device("cpu"))


# Generation


GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


def alone(model, prompt: list[int]) -> list[int]:
    """Greedy, with the whole sequence read anew for every token."""
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        n = len(ids)
        logits = model.logits(torch.tensor(ids), torch.arange(n), torch.tensor([[0, n, 0, 0]]), torch.tensor([n - 1]))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("config", [SMALL, SPARSE], ids=["dense", "experts"])
def test_samples_of_a_prompt_go_on_from_its_state(config):
    """Several prompts, several samples of each: all as if each sequence were read alone."""
    model = make(config)
    prompts = [[5, 17, 3, 42, 8, 11, 29], [9], [4, 4, 30, 2]]
    with torch.no_grad():
        expected = [alone(model, prompt) for prompt in prompts]
    assert len({*map(tuple, expected)}) == 3
    assert complete(model, prompts, GREEDY) == expected
    assert complete(model, prompts, GREEDY, samples=2) == [e for e in expected for _ in range(2)]


def test_a_conversation_goes_on_from_its_state_and_a_changed_one_is_read_again():
    model = make(SMALL)
    read = []
    model.model.register_forward_pre_hook(lambda module, args: read.append(len(args[0].input_ids)))

    def turn(prompt: list[int]) -> list[int]:
        return [token for step in generate(model, [prompt], GREEDY, cache=cache) for token in step.values()]

    cache = Cache(0)
    first = [5, 17, 3, 42]
    answer = turn(first)
    second = first + answer + [7, 8]
    changed = first + [1] + answer + [7, 8]
    later = turn(second)
    assert read[12] == 3  # the answer's last token, which was not read in its own turn, and two more
    other = turn(changed)
    assert read[24] == len(changed)
    with torch.no_grad():
        assert [answer, later, other] == [alone(model, prompt) for prompt in (first, second, changed)]


# 4 bits


def test_four_bits_are_those_of_bitsandbytes(tmp_path):
    """Every linear layer, those of the rule too; the convolution, A_log and dt_bias stay wide."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from test_nf4 import WHOLE_ROWS, their_config

    theirs = random_model("qwen3_5", **WHOLE_ROWS, linear_value_head_dim=16)
    theirs.save_pretrained(tmp_path)
    settings = dict(quant_type="nf4", nested=False)
    ours = load_model(tmp_path, torch.float32, four_bit=settings)
    quantized = {n for n, m in ours.named_modules() if type(m).__name__ == "Linear4bit"}
    assert {f"model.layers.0.linear_attn.{n}" for n in ("in_proj_qkv", "in_proj_a", "out_proj")} < quantized
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=their_config(transformers, "nf4", False), dtype=torch.float32).train()
    with torch.no_grad():
        assert (our_logits(ours) - their_logits(theirs)[0]).abs().max() < 2e-5


@pytest.mark.parametrize("config", [SMALL, SPARSE], ids=["dense", "experts"])
def test_under_autocast_the_rule_itself_runs_in_float32(config):
    model = make(config, torch.float32)
    batch = models.Stream(*stream(PAIRS))
    layer = model.model.layers[0].linear_attn
    seen = []
    layer.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
    assert seen == [torch.float32]
