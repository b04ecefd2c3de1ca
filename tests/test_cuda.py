"""What the CUDA paths rest on, as far as a CPU can tell: PyTorch's flash operators emulated behind their own signatures, what
each version of PyTorch calls them, and the settings of a GPU run."""

import flash_emulation
import numpy as np
import pytest
import torch
from test_model import CORE, MIXED, assert_same_gradients, gradients, make, random_pairs, stream

import model as models
from extras.decoder import generate, towers
from parts import varlen
from parts.varlen import VarlenPlan, plan_varlen


@pytest.fixture
def flash(monkeypatch):
    """The CUDA path of attention, on the CPU."""
    library = flash_emulation.register()
    for place in (models, towers, generate):
        monkeypatch.setattr(place, "has_flash", lambda *kind, **more: True)
    yield
    library._destroy()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("shared", [True, False])
def test_varlen_plan_attends_as_the_plain_path(name, shared, monkeypatch, request):
    """Values and gradients, in float64: what the kernel is given, with its arithmetic emulated."""
    model = make(CORE[name])
    plain = model(models.Stream(*stream(MIXED, shared))).logps
    expected = gradients(model, plain.sum())
    request.getfixturevalue("flash")
    fast = model(models.Stream(*stream(MIXED, shared))).logps
    assert (fast - plain).abs().max() < 1e-10
    assert_same_gradients(gradients(model, fast.sum()), expected, 1e-10)


def test_varlen_plan_joins_prompt_and_chosen_and_copies_a_prompt_once():
    """Two pairs, (3, 2, 1) tokens and one of unequal prompts: each prompt key is copied for the rejected answer alone."""
    spans = torch.tensor([(0, 3, 0, 0), (3, 5, 0, 3), (5, 6, 0, 3), (6, 8, 0, 0), (8, 11, 0, 0)], dtype=torch.int32)
    plan = plan_varlen(make(CORE["llama"]).config, spans, torch.device("cpu"))[None]
    assert plan.cu_queries.tolist() == [0, 5, 6, 8, 11] and plan.cu_keys.tolist() == [0, 5, 9, 11, 14]
    assert plan.index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10] and (plan.max_queries, plan.max_keys) == (5, 4 + 1)
    assert plan.own.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13]
    assert plan.again.tolist() == [5, 6, 7] and plan.source.tolist() == [0, 1, 2]
    x = torch.randn(11, 2, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(14, 2, 4, dtype=torch.float64)
    expected, = torch.autograd.grad(x[plan.index.long()], x, grad)
    torch.testing.assert_close(plan.collected(grad), expected)


def test_varlen_plan_copies_no_key_where_no_prompt_is_shared():
    plan = plan_varlen(make(CORE["llama"]).config, torch.tensor([(0, 3, 0, 0), (3, 7, 0, 0)]), torch.device("cpu"))[None]
    assert plan.index is None and torch.equal(plan.cu_queries, plan.cu_keys)


@pytest.mark.parametrize("seed", range(4))
def test_varlen_plan_has_each_spans_prefix_and_self_as_keys(seed):
    """Against one arange per span, for shared and unshared pairs in any order."""
    random = np.random.default_rng(seed)
    pairs = random_pairs(random.integers(1, 9, (6, 3)).tolist(), seed=seed)
    spans = torch.cat([stream(pairs, shared)[2] for shared in (True, False)])
    size = int(spans[: 3 * len(pairs), 1].max())
    spans[3 * len(pairs):, :2] += size
    plan = plan_varlen(make(CORE["llama"]).config, spans, torch.device("cpu"))[None]
    own = [list(range(c, d)) + list(range(a, b)) for a, b, c, d in spans.tolist()]
    seen = {}
    for i in range(len(plan.cu_keys) - 1):
        keys = plan.index[plan.cu_keys[i]: plan.cu_keys[i + 1]].tolist()
        queries = plan.cu_queries[i + 1] - plan.cu_queries[i]
        for back in range(int(queries)):
            seen[keys[-1 - back]] = keys[: len(keys) - back]  # bottom-right: a query sees what comes before it
    expected = {key: keys[: len(keys) - back] for (a, b, *_), keys in zip(spans.tolist(), own)
                for back, key in enumerate(range(b - 1, a - 1, -1))}
    assert seen == expected


def test_image_encoders_attend_in_both_directions_through_the_flash_operators(request):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 8, dtype=torch.float64, requires_grad=True).unbind(0)
    lengths = [4, 2, 3]
    plain = towers.attend_within(q, k, v, lengths)
    expected = torch.autograd.grad(plain.square().sum(), (q, k, v))
    request.getfixturevalue("flash")
    fast = towers.attend_within(q, k, v, lengths)
    torch.testing.assert_close(fast, plain)
    for a, b in zip(torch.autograd.grad(fast.square().sum(), (q, k, v)), expected):
        torch.testing.assert_close(a, b)


def test_generation_through_the_flash_operators_writes_what_the_plain_path_writes(request):
    """Queries that are the last tokens of their spans, keys that lie anywhere in the cache."""
    model = make(CORE["mistral"]).eval()
    options = generate.Sampling(max_new_tokens=6, temperature=0.0)
    prompts = [[5, 6, 7, 8], [9, 4]]
    plain = [generate.complete(model, prompts, options, samples=n) for n in (1, 2)]
    request.getfixturevalue("flash")
    assert [generate.complete(model, prompts, options, samples=n) for n in (1, 2)] == plain


# The flash operators' arguments: (positional, by name), as each version of PyTorch prints their schemas

FORWARD = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
BACKWARD = ("grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused")
NAMED = "scale window_size_left window_size_right"
OLD = NAMED + " seqused_k alibi_slopes"
NEW = OLD + " block_table num_splits"
SIGNATURES = {
    "2.10": {"forward": (FORWARD, OLD), "backward": (BACKWARD, NAMED)},
    "2.11": {"forward": (FORWARD, OLD), "backward": (BACKWARD, NAMED)},
    "2.13": {"forward": (FORWARD, NEW), "backward": (BACKWARD, NAMED)},
    "2.14": {"forward": (FORWARD, NEW), "backward": (BACKWARD, NAMED)}}


class Recorded:
    """In place of torch.ops.aten: notes the arguments of both operators, and answers."""

    def __init__(self):
        self.calls = {}

    def _flash_attention_forward(self, *args, **named):
        self.calls["forward"] = args, named
        return args[0], args[0], args[0], args[0], args[0]

    def _flash_attention_backward(self, *args, **named):
        self.calls["backward"] = args, named
        return args[1], args[2], args[3]


@pytest.mark.parametrize("version", SIGNATURES)
def test_the_calls_of_the_flash_operators_bind_to_each_versions_signature(version, monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(varlen.torch.ops, "aten", recorded)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    plan = VarlenPlan(ends, ends, 3, 3, scale=0.5, window=2)
    q, k, v = torch.randn(3, 3, 2, 8, requires_grad=True).unbind(0)
    plan(q, k, v).sum().backward()
    for name, (args, named) in recorded.calls.items():
        positional, by_name = (words.split() for words in SIGNATURES[version][name])
        assert len(args) == len(positional) and set(named) <= set(by_name)
        given = dict(zip(positional, args)) | named
        assert given["cum_seq_q"] is ends and given["cum_seq_k"] is ends and given["max_q"] == given["max_k"] == 3
        assert (given["dropout_p"], given["is_causal"], given["scale"]) == (0.0, True, 0.5)
        assert (given["window_size_left"], given["window_size_right"]) == (1, 0)
        assert all(torch.equal(given[n], t) for n, t in zip(("query", "key", "value"), (q, k, v)))
    assert recorded.calls["forward"][0][-1] is False  # return_debug_mask


def test_the_signatures_are_those_of_the_pytorch_that_is_installed():
    version = ".".join(torch.__version__.split(".")[:2])
    expected = SIGNATURES.get(version, SIGNATURES["2.14"])  # a newer one fails here if it calls them otherwise
    for name, (positional, by_name) in expected.items():
        arguments = getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema.arguments
        assert [a.name for a in arguments if not a.kwarg_only] == positional.split()
        named = [a.name for a in arguments if a.kwarg_only]
        assert named[:len(by_name.split())] == by_name.split()
