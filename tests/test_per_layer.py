"""Layers that differ in size and share keys and values (Gemma 4): what the table of families does not show."""

import json

import pytest
import torch
from test_families import FULL, GEMMA4, GEMMA4_EXPERTS, PAIRS, SLIDING
from test_model import stream

import model as models
from extras.decoder.generate import Cache
from extras.run.context import join
from parts.varlen import VarlenPlan

REST = dict(model_type="gemma4_text", rms_norm_eps=1e-6)


def decoder(**changes) -> models.Decoder:
    torch.manual_seed(0)
    return models.Decoder(models.read_config(GEMMA4 | REST | changes)).requires_grad_(True)


def test_flash_attention_computes_the_layers_whose_heads_it_knows(monkeypatch):
    """Its kernel has head dims up to 256; layers without a window have 512."""
    config = models.read_config(GEMMA4 | REST | dict(head_dim=256, global_head_dim=512))
    asked = []
    monkeypatch.setattr(models, "has_flash", lambda device, dtype, size, cap: asked.append(size) or size <= 256)
    _, position_ids, spans, *_ = stream(PAIRS)
    plans = models.plan_attention(config, spans, position_ids, torch.bfloat16)
    assert sorted(asked) == [256, 512]
    assert {window: type(plan) for window, plan in plans.items()} == {5: VarlenPlan, None: models.CallPlan}


def test_a_layers_scale_never_learns():
    model = decoder()
    scales = {n for n, _ in model.named_parameters() if n.endswith("layer_scalar")}
    assert len(scales) == 6
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == scales
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())


def test_layers_that_read_others_have_no_keys_and_cache_none():
    model = decoder()
    names = {n for n, _ in model.named_parameters()}
    assert [f"model.layers.{i}.self_attn.k_proj.weight" in names for i in range(6)] == [True] * 4 + [False] * 2
    cache = Cache(8)
    cache.allocate(model.config, torch.float32, torch.device("cpu"))
    for _ in range(2):
        assert cache.layers[4] is cache.layers[2] and cache.layers[5] is cache.layers[3]
        assert cache.layers[2][0].shape == (cache.size, 2, 12) and cache.layers[3][0].shape == (cache.size, 2, 20)
        cache.grow(16)


def test_both_ways_of_saying_that_layers_differ_mean_the_same():
    """`global_head_dim` as published; `per_layer_config` as transformers saves it now."""
    published = models.read_config(GEMMA4_EXPERTS | REST)
    plain = {k: v for k, v in GEMMA4_EXPERTS.items() if k not in ("global_head_dim", "num_global_key_value_heads")}
    own = {"01": dict(head_dim=20, num_key_value_heads=1), "3": dict(head_dim=20, num_key_value_heads=1)}
    assert models.read_config(json.loads(json.dumps(plain | REST | dict(per_layer_config=own)))) == published
    assert published.per_layer["sizes"] == ({}, own["3"], {}, own["3"])


@pytest.mark.parametrize("changes, said", [
    (dict(per_layer_config={"1": dict(head_dim=20)}), "per_layer_config says more"),
    (dict(per_layer_config={str(i): dict(hidden_size=20) for i in (1, 3, 5)}), "per_layer_config says more"),
    (dict(use_bidirectional_attention="all"), "use_bidirectional_attention = 'all' is not supported"),
    (dict(num_kv_shared_layers=5), "num_kv_shared_layers = 5 of 6: no layer before them"),
    (dict(layer_types=["chunked_attention"] + [SLIDING] * 4 + [FULL]), "layer_types names chunked_attention"),
    (dict(enable_moe_block=True), "enable_moe_block needs num_experts"),
    (dict(some_new_key=3), "some_new_key = 3: not understood")])
def test_configurations_that_mean_something_else_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        models.read_config(GEMMA4 | REST | changes)


def test_the_last_layer_never_has_a_window():
    """As in transformers, whatever the file says."""
    config = models.read_config(GEMMA4 | REST | dict(layer_types=[SLIDING] * 6, num_kv_shared_layers=0))
    assert config.windows == (5,) * 5 + (None,) and config.per_layer["sizes"][5] == dict(head_dim=20)


def test_ranks_do_not_share_streams_of_layers_that_read_others():
    with pytest.raises(ValueError, match="--context_parallel_size 2: not for layers that read others' keys"):
        join(decoder(), 2)
