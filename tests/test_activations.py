"""What blocks keep for their backward: less of it, or in another place, and the same values and gradients to the bit."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import read_metrics
from test_model import CORE, LLAMA, MIXED, gradients, make, put_lora, randomize_lora, stream
from test_plan import config_of

import dpo
import model as models
from extras.decoder import memory
from extras.decoder.blocks import change_blocks
from extras.decoder.memory import Host, keeping_less, save_memory
from parts.activations import keep_all, recompute

FAMILIES = {name: CORE[name] for name in ("llama", "qwen2", "qwen3")} | {
    "fused, LayerNorm, no gate": LLAMA | dict(model_type="gpt_neox", num_key_value_heads=4, hidden_act="gelu", layer_norm_eps=1e-5, rotary_pct=0.5),
    "gelu with a gate, four norms": LLAMA | dict(model_type="gemma2", hidden_activation="gelu_pytorch_tanh", head_dim=8,
                                                 query_pre_attn_scalar=8),
    "experts": LLAMA | dict(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)}
PLACES = {"float64": (torch.float64, False), "float32": (torch.float32, False), "bf16 autocast": (torch.float32, True),
          "bfloat16": (torch.bfloat16, False)}


def selective(model):
    save_memory(model, "selective", False, torch.device("cpu"))


def on_host(model):
    model.model.run_block = keeping_less(model.model.run_block, Host(torch.device("cpu")))


def both(model):
    selective(model)
    model.model.run_block = keeping_less(keep_all, Host(torch.device("cpu")))


def checkpointed_on_host(model):
    model.model.run_block = keeping_less(recompute, Host(torch.device("cpu")))


WAYS = {f.__name__: f for f in (selective, on_host, both, checkpointed_on_host)}


@pytest.fixture
def everything_is_worth_a_copy(monkeypatch):
    monkeypatch.setattr(memory, "LEAST", 1)


def results(model, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = model(models.Stream(*stream(MIXED))).logps
    return logps, gradients(model, logps.sum())


def assert_equal_to_the_bit(model, way, autocast=False):
    expected, expected_gradients = results(model, autocast)
    other = copy.deepcopy(model)
    way(other)
    for _ in range(2):
        got, got_gradients = results(other, autocast)
        assert torch.equal(got, expected)
        assert all(torch.equal(g, expected_gradients[n]) for n, g in got_gradients.items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_the_same_to_the_bit(family, way, everything_is_worth_a_copy):
    for dtype, autocast in PLACES.values():
        assert_equal_to_the_bit(make(FAMILIES[family], dtype), WAYS[way], autocast)


@pytest.mark.parametrize("way", WAYS)
def test_with_adapters_too(way, everything_is_worth_a_copy):
    for targets in (["q_proj", "v_proj"], ["all-linear"]):
        model = make(CORE["llama"], torch.float32)
        put_lora(model, 3, 6, 0.0, targets)
        randomize_lora(model)
        assert_equal_to_the_bit(model, WAYS[way])


def bytes_saved(model, autocast):
    """Bytes of the storages that a forward leaves behind for its backward, without the weights."""
    kept = {}

    def see(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    def saved_in(run, layer, *args):
        with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            return run(layer, *args)

    own = {p.untyped_storage()._cdata for p in model.parameters()}
    ids = torch.arange(200) % 61
    pack = memory.pack

    def seen(t, shelf):
        held = pack(t, shelf)
        return see(held) if isinstance(held, torch.Tensor) else held

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        patch.setattr(memory, "pack", seen)
        model.model.run_block = (lambda layer, *a: saved_in(keep_all, layer, *a)) if model.model.run_block is keep_all else keeping_less(
            keep_all, None)
        out = model.model(models.Stream(ids, ids, torch.tensor([[0, 200, 0, 0]])))
        del out
    return sum(s.nbytes() for key, s in kept.items() if key not in own)


@pytest.mark.parametrize("autocast", [False, True])
def test_selective_saves_what_the_formula_says(autocast):
    """Of a block of Llama's proportions: two norms of C and one product of I, of 16 C + 12 HD + 12 KD + 12 I bytes."""
    config = config_of(hidden_size=128, intermediate_size=448, num_attention_heads=4, num_key_value_heads=1, head_dim=32)
    whole, less = (models.Decoder(config) for _ in range(2))
    selective(less)
    before, after = bytes_saved(whole, autocast), bytes_saved(less, autocast)
    width = 2 if autocast else 4
    expected = config.num_hidden_layers * 200 * width * (2 * config.hidden_size + config.intermediate_size)
    print(f"autocast {autocast}: {before:,} bytes a step, selective {after:,}")
    assert before - after == expected


def test_what_is_offloaded_leaves_the_device_and_comes_back_a_block_ahead(everything_is_worth_a_copy):
    model = models.Decoder(config_of(num_hidden_layers=6))
    host = Host(torch.device("cpu"))
    model.model.run_block = keeping_less(keep_all, host)
    ids = torch.arange(50)
    out, _ = model.model(models.Stream(ids, ids, torch.tensor([[0, 50, 0, 0]])))
    shelves = [host.last]
    while shelves[-1].before is not None:
        shelves.append(shelves[-1].before)
    on_device = lambda: [any(parked.there is not None for parked in shelf.entries()) for shelf in shelves]
    assert len(shelves) == 6 and all(len(shelf.entries()) > 8 for shelf in shelves)
    assert on_device() == [True, True, False, False, False, False]  # the last two blocks' copies may still run
    seen = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.register_hook(lambda grad: seen.append(on_device()))
    out.sum().backward()
    assert [sum(s) for s in seen] == [2, 2, 2, 2, 2, 1]  # the block in its backward, and the one before it
    assert not any(on_device())


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_held_after_the_backward_or_where_there_is_none(way, everything_is_worth_a_copy):
    model = make(CORE["llama"], torch.float32)
    WAYS[way](model)
    alive = []
    run = model.model.run_block

    def watched(layer, *args):
        alive.extend(weakref.ref(t) for t in run(layer, *args)[:1])
        return run(layer, *args)

    model.model.run_block = watched
    for leave in (lambda out: out.logps.sum().backward(), lambda out: None):
        gc.disable()  # what only the collector frees would pile up on a GPU
        out = model(models.Stream(*stream(MIXED)))
        leave(out)
        del out
        assert not any(ref() is not None for ref in alive)
        gc.enable()


def test_offloading_on_a_cpu_is_refused(tiny, pairs_file, tmp_path):
    with pytest.raises(ValueError, match="--activation_offloading on cpu: activations are in the host's memory already"):
        dpo.DPOTrainer(args=dpo.DPOConfig(str(tmp_path), model_name_or_path=str(tiny), dataset_name=str(pairs_file),
                                          use_cpu=True, cache_dir=str(tmp_path / "c"), activation_offloading=True))


def test_selective_with_compiled_blocks_is_refused():
    with pytest.raises(ValueError, match="--torch_compile"):
        dpo.parse_config(["--gradient_checkpointing", "selective", "--torch_compile", "--model_name_or_path", "m",
                          "--dataset_name", "d", "--output_dir", "o"])
        dpo.checks.check_config(dpo.DPOConfig("o", model_name_or_path="m", dataset_name="d", torch_compile=True,
                                              gradient_checkpointing="selective"))


@pytest.mark.parametrize("words,value", [([], False), (["--gradient_checkpointing"], True), (["--gradient_checkpointing", "false"], False),
                                         (["--no_gradient_checkpointing"], False), (["--gradient_checkpointing", "selective"], "selective")])
def test_the_flag_is_trls_with_one_word_more(words, value):
    c = dpo.parse_config([*words, "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"])
    assert c.gradient_checkpointing == value
    dpo.checks.check_config(c)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="--gradient_checkpointing full: expected one of true, false, selective"):
        dpo.checks.check_config(dpo.DPOConfig("o", model_name_or_path="m", dataset_name="d", gradient_checkpointing="full"))


def test_a_run_is_the_same_to_the_bit(tiny, pairs_file, tmp_path):
    found = []
    for name, level in (("off", False), ("selective", "selective"), ("true", True)):
        dpo.DPOTrainer(args=dpo.DPOConfig(
            str(tmp_path / name), model_name_or_path=str(tiny), dataset_name=str(pairs_file), use_cpu=True, bf16=True,
            cache_dir=str(tmp_path / "c"), gradient_checkpointing=level, learning_rate=1e-3, num_train_epochs=1.0, logging_steps=1,
            disable_tqdm=True)).train()
        found.append([(m["loss"], m["grad_norm"]) for m in read_metrics(tmp_path / name) if "loss" in m])
    assert found[0] == found[1] == found[2]


def test_change_blocks_compiles_and_offloads_only_what_is_asked(monkeypatch):
    model = make(CORE["llama"])
    change_blocks(model, dpo.DPOConfig("o", gradient_checkpointing="selective"), torch.device("cpu"))
    assert model.model.run_block is not keep_all
    assert all(m._compiled_call_impl is None for m in model.modules())
