"""Every kind of adapter goes to PEFT's files and stock `peft`, and comes back; merged it is the same model."""

import json

import pytest
import torch
from conftest import write
from safetensors.torch import load_file, save_file
from test_families import attention, peft_and_back, random_model
from test_families import our_logits as own_logits
from test_model import put_lora

import model as models
from extras.lora import adapters, peft_files
from extras.lora.merging import merge_lora
from extras.lora.peft_files import save_adapter
from extras.lora.targets import add_lora
from extras.models.opening import load_adapted, load_model

peft = pytest.importorskip("peft", reason="needs peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")

LLAMA = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
EXPERTS = LLAMA | dict(num_hidden_layers=2, num_experts_per_tok=2)
BASES = {
    "llama": ("LlamaConfig", LLAMA), "tied": ("LlamaConfig", LLAMA | dict(tie_word_embeddings=True)),
    "qwen2": ("Qwen2Config", LLAMA),
    "gpt2": ("GPT2Config", dict(vocab_size=61, n_embd=32, n_head=4, n_layer=3, n_positions=64)),
    "mixtral": ("MixtralConfig", EXPERTS | dict(num_local_experts=4)),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | dict(
        num_experts=4, moe_intermediate_size=24, head_dim=8, mlp_only_layers=[1]))}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "v_proj"]
KINDS = {  # name: (base, PEFT's settings)
    "plain": ("llama", dict(target_modules=ATTENTION)),
    "all-linear": ("llama", dict(target_modules="all-linear")),
    "a pattern": ("llama", dict(target_modules=r".*\.(0|2)\..*(q|up)_proj")),
    "rslora": ("llama", dict(target_modules=ATTENTION, use_rslora=True)),
    "dora": ("llama", dict(target_modules=["q_proj", "down_proj"], use_dora=True)),
    "dora, biases": ("qwen2", dict(target_modules=["q_proj", "o_proj"], use_dora=True)),
    "dora, gpt2": ("gpt2", dict(target_modules=["c_attn", "c_fc"], use_dora=True)),
    "dora, head and embedding": ("llama", dict(target_modules=["lm_head", "embed_tokens"], use_dora=True)),
    "dora, rslora, tied": ("tied", dict(target_modules=["q_proj", "lm_head"], use_dora=True, use_rslora=True)),
    "head and embedding": ("llama", dict(target_modules=["lm_head", "embed_tokens"])),
    "tied head": ("tied", dict(target_modules=["lm_head"])),
    "tied embedding": ("tied", dict(target_modules=["embed_tokens"])),
    "tied head and embedding": ("tied", dict(target_modules=["lm_head", "embed_tokens", "q_proj"])),
    "modules to save": ("llama", dict(target_modules=ATTENTION, modules_to_save=["lm_head", "norm"])),
    "modules to save, tied": ("tied", dict(target_modules=ATTENTION, modules_to_save=["lm_head"])),
    "modules to save, tied twice": ("tied", dict(
        target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"])),
    "modules to save, whole mlp": ("llama", dict(target_modules=["q_proj", "up_proj"], modules_to_save=["1.mlp"])),
    "modules to save, gpt2": ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["0.mlp.c_fc", "ln_f"])),
    "rank and alpha patterns": ("llama", dict(
        target_modules=ATTENTION, rank_pattern={"0.self_attn.q_proj": 2, "v_proj": 6},
        alpha_pattern={r"layers\.[12]\.self_attn\.q_proj": 3})),
    "patterns, rslora, dora": ("llama", dict(
        target_modules=ATTENTION, rank_pattern={"q_proj": 2}, use_rslora=True, use_dora=True)),
    "layers": ("llama", dict(target_modules=ATTENTION, layers_to_transform=[0, 2])),
    "one layer": ("llama", dict(target_modules=ATTENTION, layers_to_transform=1, layers_pattern="layers")),
    "excluded": ("llama", dict(target_modules=ATTENTION, exclude_modules=["layers.1.self_attn.v_proj"])),
    "experts": ("mixtral", dict(target_modules=["q_proj"], target_parameters=STACKS)),
    "one stack": ("mixtral", dict(target_modules=["q_proj"], target_parameters=STACKS[1:])),
    "experts, rslora, patterns": ("mixtral", dict(
        target_modules=["q_proj"], target_parameters=STACKS, use_rslora=True,
        rank_pattern={r".*\.down_proj": 2}, alpha_pattern={r".*\.gate_up_proj": 5})),
    "router": ("mixtral", dict(target_modules=["q_proj"], target_parameters=["gate.weight"])),
    "former names": ("mixtral", dict(target_modules=["q_proj", "w1", "w2", "w3", "gate"])),
    "some layers dense": ("qwen3_moe", dict(target_modules=["q_proj", "v_proj"], target_parameters=STACKS)),
}
IDS = torch.tensor([3, 17, 5, 44, 60, 1, 9, 12, 30, 31, 8, 2])


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """{name: directory of a random model}"""
    directories = {}
    for name, (kind, options) in BASES.items():
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(torch.randn_like(p) * 0.2)
        directories[name] = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(directories[name])
    return directories


def load_theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")


def their_logits(theirs):
    with torch.no_grad():
        return theirs.eval()(IDS[None]).logits[0]


def our_logits(ours):
    n = len(IDS)
    with torch.no_grad():
        return ours.eval().logits(IDS, torch.arange(n), torch.tensor([[0, n, 0, 0]]))


def randomize(model) -> None:
    """Move everything that the adapter trains; a length stays positive."""
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * (0.05 if "magnitude" in n or "norm" in n else 0.15))


def our_adapter(base, settings, out=None):
    """A model with a random adapter of these settings, also written to `out`."""
    ours, settings = models.load_model(base), dict(r=4, lora_alpha=8, lora_dropout=0.0) | settings
    add_lora(ours, settings)
    randomize(ours)
    if out:
        save_adapter(ours, out, settings | dict(base_model_name_or_path=str(base)))
    return ours


@pytest.mark.parametrize("name", KINDS)
def test_ours_load_in_peft(bases, name, tmp_path):
    base, settings = KINDS[name]
    ours = our_adapter(bases[base], settings, tmp_path)
    expected = our_logits(ours)
    theirs = peft.PeftModel.from_pretrained(load_theirs(bases[base]), tmp_path)
    assert (their_logits(theirs) - expected).abs().max() < 1e-5
    assert (our_logits(models.load_model(bases[base])) - expected).abs().max() > 0.01
    written = {n for n in load_file(tmp_path / "adapter_model.safetensors")}
    held = {n for n in peft.get_peft_model_state_dict(theirs) if not n.endswith("base_layer.weight")}
    assert written == held  # nothing was ignored on the way


@pytest.mark.parametrize("name", KINDS)
def test_pefts_load_in_ours_and_are_written_back(bases, name, tmp_path):
    base, settings = KINDS[name]
    theirs = load_theirs(bases[base])
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    theirs.peft_config["default"].base_model_name_or_path = str(bases[base])
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs)
    ours, read = load_adapted(tmp_path / "theirs", torch.float32)
    assert (our_logits(ours) - expected).abs().max() < 1e-5
    save_adapter(ours, tmp_path / "ours", read)
    again = peft.PeftModel.from_pretrained(load_theirs(bases[base]), tmp_path / "ours")
    assert (their_logits(again) - expected).abs().max() < 1e-5
    once, twice = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("theirs", "ours"))
    for key in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform",
                "layers_pattern", "exclude_modules", "modules_to_save"):
        assert once[key] == twice[key], key
    with models.adapters_disabled(ours):
        assert torch.equal(our_logits(ours), our_logits(models.load_model(bases[base])))


@pytest.mark.parametrize("name", KINDS)
def test_merged_equals_unmerged_and_loads_in_transformers(bases, name, tmp_path):
    base, settings = KINDS[name]
    ours = our_adapter(bases[base], settings)
    expected = our_logits(ours)
    merge_lora(ours)
    assert not models.lora_modules(ours)
    assert (our_logits(ours) - expected).abs().max() < 1e-5
    models.save_model(ours, tmp_path)
    assert (our_logits(models.load_model(tmp_path)) - expected).abs().max() < 1e-5
    assert (their_logits(load_theirs(tmp_path)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_starts_at_its_base_and_all_of_it_learns(bases, name):
    base, settings = KINDS[name]
    ours = models.load_model(bases[base], torch.float64)
    start, n = our_logits(ours), len(IDS)
    add_lora(ours, dict(r=4, lora_alpha=8) | settings)
    assert torch.allclose(our_logits(ours), start, atol=1e-12)
    randomize(ours.double())
    inputs = (IDS, torch.arange(n), torch.tensor([[0, n, 0, 0]]), torch.arange(n - 1), IDS[1:])
    ours(models.Stream(*inputs)).logps.sum().backward()
    for parameter, p in ours.named_parameters():
        assert p.requires_grad == ("lora_" in parameter), parameter
        assert not p.requires_grad or p.grad.abs().max() > 0, parameter
    dense = adapters.dense_adapter(models.lora_modules(ours), {})
    moved = our_logits(ours)
    adapters.move_towards(dense, models.lora_modules(ours), 1.0)
    with adapters.swapped_in(ours, dense):  # the deltas, written out, are the same model
        assert torch.allclose(our_logits(ours), moved, atol=1e-12)
    with adapters.swapped_in(ours, {}):
        assert torch.allclose(our_logits(ours), start, atol=1e-12)
    assert torch.equal(our_logits(ours), moved)


@pytest.mark.parametrize("name", ["dora", "dora, biases", "dora, head and embedding"])
def test_dora_has_pefts_gradients(bases, name, tmp_path):
    """The length of the direction is a constant there (section 4.3 of the paper)."""
    base, settings = KINDS[name]
    ours = our_adapter(bases[base], settings, tmp_path)
    theirs = peft.PeftModel.from_pretrained(load_theirs(bases[base]), tmp_path, is_trainable=True)
    n = len(IDS)
    inputs = (IDS, torch.arange(n), torch.tensor([[0, n, 0, 0]]), torch.arange(n - 1), IDS[1:])
    ours(models.Stream(*inputs)).logps.sum().backward()
    logps = theirs(IDS[None]).logits[0].log_softmax(-1)
    logps[torch.arange(n - 1), IDS[1:]].sum().backward()
    named = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    grads = {n.replace(".default", "").removesuffix(".weight"): p.grad for n, p in named.items()}
    for key, p in peft_files.adapter_tensors(ours).items():
        expected = grads[key.removesuffix(".weight")]
        assert torch.allclose(p.grad, expected, atol=1e-4 * expected.abs().max()), key


@pytest.mark.parametrize("stacks", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"], ["router.weight"]], ids=str)
@pytest.mark.parametrize("name", ["granite_h experts", "llama4", "gpt_oss"])
def test_experts_and_routers_with_names_of_their_own_go_to_peft_and_back(name, stacks, tmp_path):
    """Of Llama 4's stacks, (experts, in, out), PEFT has A on the side of the outputs: transformers does not say how they lie."""
    random_model(name).save_pretrained(tmp_path / "base")
    ours = models.load_model(tmp_path / "base")
    add_lora(ours, dict(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj"], target_parameters=stacks))
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", experts_implementation="eager", attn_implementation=attention(name))
    there, changed, back = peft_and_back(ours, load, dict(target_modules=["q_proj"], target_parameters=stacks), tmp_path)
    assert there < 2e-5 < 1e-3 < changed and back < 2e-5
    with torch.no_grad():
        expected = own_logits(ours.double())
        merge_lora(ours)
        assert (own_logits(ours) - expected).abs().max() < 1e-10


def test_stacks_and_routers_that_are_not_there_are_named_as_the_family_names_them(tmp_path):
    random_model("granite_h experts").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gates.weight: .*; this model has experts.down_proj experts.gate_up_proj router.weight"):
        add_lora(models.load_model(tmp_path), dict(r=2, lora_alpha=4, target_parameters=["gates.weight"]))


# Files from before transformers 5: every expert a linear layer with its own LoRA


@pytest.mark.parametrize("base, layer, halves, down", [
    ("mixtral", "block_sparse_moe", ("w1", "w3"), "w2"), ("qwen3_moe", "mlp", ("gate_proj", "up_proj"), "down_proj")])
def test_adapters_of_single_experts_are_stacked_as_peft_does(bases, base, layer, halves, down, tmp_path):
    torch.manual_seed(2)
    size = 24 if base == "qwen3_moe" else 48
    sizes = {**dict.fromkeys(halves, (size, 32)), down: (32, size)}
    state = {}
    for i in range(1 if base == "qwen3_moe" else 2):
        for e in range(4):
            for name, (rows, columns) in sizes.items():
                path = f"base_model.model.model.layers.{i}.{layer}.experts.{e}.{name}"
                state[f"{path}.lora_A.weight"] = torch.randn(4, columns) * 0.3
                state[f"{path}.lora_B.weight"] = torch.randn(rows, 4) * 0.3
    if base == "qwen3_moe":  # its dense layer has the names too
        for name in sizes:
            rows, columns = (32, 48) if name == down else (48, 32)
            path = f"base_model.model.model.layers.1.mlp.{name}"
            state |= {f"{path}.lora_A.weight": torch.zeros(4, columns), f"{path}.lora_B.weight": torch.zeros(rows, 4)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    write(tmp_path / "adapter_config.json", dict(
        peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=[*halves, down],
        base_model_name_or_path=str(bases[base])))
    ours, settings = load_adapted(tmp_path, torch.float32)
    theirs = peft.PeftModel.from_pretrained(load_theirs(bases[base]), tmp_path)
    expected = their_logits(theirs)
    assert (our_logits(models.load_model(bases[base])) - expected).abs().max() > 0.01
    assert (our_logits(ours) - expected).abs().max() < 1e-5
    save_adapter(ours, tmp_path / "stacked", settings)
    again = peft.PeftModel.from_pretrained(load_theirs(bases[base]), tmp_path / "stacked")
    assert (their_logits(again) - expected).abs().max() < 1e-5


# What is refused


@pytest.mark.parametrize("name, shape, message", [
    ("model.layers.0.self_attn.q_proj.lora_C.weight", (1,), "lora_C"), ("lm_head.weight", (1,), "lm_head.weight"),
    ("model.embed_tokens.lora_embedding_A", None, "lora_embedding_A"),
    ("model.embed_tokens.base_layer.weight", (61, 32), "other weights"),
    ("model.embed_tokens.base_layer.weight", (64, 32), "resized")])
def test_a_tensor_that_is_not_understood_is_refused_by_name(bases, name, shape, message, tmp_path):
    our_adapter(bases["llama"], dict(target_modules=["q_proj", "embed_tokens"]), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    state = {n: t for n, t in state.items() if n != f"base_model.model.{name}"}
    state |= {} if shape is None else {f"base_model.model.{name}": torch.ones(shape)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_adapted(tmp_path, torch.float32)


@pytest.mark.parametrize("change, message", [
    (dict(r=0), "ranks are whole numbers above 0"), (dict(r="4"), "r = '4' has no meaning"), (dict(r=True), "r = True"),
    (dict(lora_alpha=None), "lora_alpha: missing"), (dict(rank_pattern={"q_proj": 1.5}), "ranks are whole numbers"),
    (dict(target_modules=["("]), r"'\(' is no name or pattern"), (dict(target_modules=[5]), "5 is no name"),
    (dict(use_dora=True, target_parameters=["x"]), "target_parameters x: no such parameter"),
    (dict(modules_to_save=["nothing"]), "modules_to_save nothing: no such module"),
    (dict(base_model_name_or_path=""), "base_model_name_or_path is missing"),
    (dict(loftq_config={"loftq_bits": 4}), "loftq_config"), (dict(layer_replication=[[0, 1]]), "layer_replication"),
    (dict(ensure_weight_tying=True), "ensure_weight_tying"), (dict(lora_bias=True), "lora_bias")])
def test_a_setting_that_is_not_understood_is_refused_by_name(bases, change, message, tmp_path):
    our_adapter(bases["llama"], dict(target_modules=["q_proj"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    write(tmp_path / "adapter_config.json", config | change)
    with pytest.raises(ValueError, match=message):
        load_adapted(tmp_path, torch.float32)


def test_half_of_a_stack_is_refused(bases):
    ours = models.load_model(bases["mixtral"])
    with pytest.raises(ValueError, match="w1: the experts' w1 and w3 are one matrix; name both"):
        put_lora(ours, 2, 4, 0.0, ["w1"])
    with pytest.raises(ValueError, match="--use_dora: it is for linear layers and embeddings"):
        put_lora(ours, 2, 4, 0.0, ["q_proj"], use_dora=True, target_parameters=STACKS)


def test_lora_on_experts_in_4_bits_is_that_on_them_made_wide(bases, tmp_path):
    from extras.models.nf4 import dequantize_linears

    settings = dict(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=STACKS)
    narrow = load_model(bases["mixtral"], four_bit=dict(quant_type="nf4", nested=False, compute_dtype=None))
    add_lora(narrow, settings)
    randomize(narrow)
    expected, state = our_logits(narrow), peft_files.adapter_tensors(narrow)
    wide = load_model(bases["mixtral"], four_bit=dict(quant_type="nf4", nested=False, compute_dtype=None))
    dequantize_linears(wide, torch.float32)
    add_lora(wide, settings)
    with torch.no_grad():
        for name, p in peft_files.adapter_tensors(wide).items():
            p.copy_(state[name])
    assert (our_logits(wide) - expected).abs().max() < 1e-5
