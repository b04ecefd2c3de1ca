"""Llama 4's attention in chunks of positions: spans cut at chunks see what a mask over positions lets them see."""

import math

import pytest
import torch
from test_families import CASES, PUBLISHED
from test_gated_delta import GREEDY, alone
from test_mamba import assert_same_tensors
from test_model import make, random_pairs, stream

import model as models
from extras.decoder.chunked import cut_spans, temperature
from extras.decoder.generate import complete

SMALL = CASES["llama4"][1] | dict(model_type="llama4_text", rms_norm_eps=1e-5)


def seen_by(spans, tokens: int) -> torch.Tensor:
    """(T, T) bool: what each token of a stream sees, where spans see all of their prefix and themselves causally."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, a, b in spans.tolist():
        seen[start:end, a:b] = True
        seen[start:end, start:end] |= torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return seen


@pytest.mark.parametrize("size", [1, 3, 5, 8, 100])
@pytest.mark.parametrize("shared", [True, False])
def test_cut_spans_see_their_chunk_of_positions_and_no_more(size, shared):
    _, positions, spans, *_ = stream(random_pairs([(7, 5, 9), (1, 1, 12), (8, 8, 1), (16, 3, 20)]), shared)
    chunk = positions // size
    expected = seen_by(spans, len(positions)) & (chunk[:, None] == chunk[None, :])
    assert torch.equal(seen_by(cut_spans(spans, size), len(positions)), expected)


@pytest.mark.parametrize("size", [3, 5, 100])
def test_of_new_tokens_alone_the_pieces_are_those_that_hold_them(size):
    """A span of a prefix of 7 and 6 own tokens, the last 4 of them new: queries and keys as for the whole span."""
    spans = torch.tensor([[20, 26, 3, 10, 4]])
    position = lambda at: at - 3 if at < 20 else at - 20 + 7
    queries = []
    for start, end, a, b, new in cut_spans(spans, size).tolist():
        for q in range(end - new, end):
            keys = [*range(a, b), *range(start, q + 1)]
            every = [*range(3, 10), *range(20, q + 1)]
            assert keys == [k for k in every if position(k) // size == position(q) // size]
            queries.append(q)
    assert queries == [22, 23, 24, 25]


def test_queries_grow_with_the_logarithm_of_the_position():
    got = temperature(torch.tensor([0, 8190, 8191, 16383, 81919]), 8192.0, 0.1).flatten()
    assert got.tolist() == pytest.approx([1, 1, *(1 + 0.1 * math.log(n) for n in (2, 3, 11))], abs=1e-6)


def test_a_token_beyond_its_chunk_moves_only_layers_that_do_not_rotate():
    """With every layer in chunks, the first chunk's tokens do not reach the logits of the next one; with one that sees
    all, they do."""
    def moved(no_rope_layers):
        model = make(SMALL | dict(no_rope_layers=no_rope_layers))
        ids, n = torch.arange(1, 9), 8
        span = torch.tensor([[0, n, 0, 0]])
        other = ids.clone()
        other[1] = 33
        with torch.no_grad():
            a, b = (model.logits(x, torch.arange(n), span, torch.tensor([n - 1])) for x in (ids, other))
        return (a - b).abs().max() > 1e-8

    assert SMALL["attention_chunk_size"] == 5
    assert not moved([1] * 4) and moved([1, 0, 1, 1])


def test_samples_of_a_prompt_that_crosses_chunks():
    model = make(SMALL)
    prompts = [[5, 17, 3, 42, 8, 11, 29], [9], [4, 4, 30, 2, 7]]
    with torch.no_grad():
        expected = [alone(model, prompt) for prompt in prompts]
    assert complete(model, prompts, GREEDY) == expected
    assert complete(model, prompts, GREEDY, samples=2) == [e for e in expected for _ in range(2)]


@pytest.mark.parametrize("name, experts", [("Scout", 48), ("Maverick", 24)])
def test_published_configurations_make_the_tensors_of_transformers(name, experts):
    raw = next(raw for n, raw in PUBLISHED.items() if name in n)
    config = models.read_config(raw)
    assert sum(config.moe["sparse"]) == experts and config.windows[:5] == (-8192, -8192, -8192, None, -8192)
    assert round(assert_same_tensors(raw) / 1e9) == {"Scout": 108, "Maverick": 401}[name]


def test_layers_in_chunks_must_be_those_that_rotate():
    with pytest.raises(ValueError, match="chunked attention in other layers than those that rotate"):
        models.read_config(SMALL | dict(layer_types=["chunked_attention"] * 4))
