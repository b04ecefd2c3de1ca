"""The decoder: equal to transformers, to padded sequences, to itself under every saving trick; files in and out."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import model as models
from extras.lora.peft_files import load_adapter, save_adapter
from extras.lora.targets import add_lora
from parts import kernels
from parts.activations import recompute
from parts.configs import check_length
from parts.varlen import VarlenPlan

LLAMA = dict(model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
             hidden_act="silu", tie_word_embeddings=False, rope_theta=10000.0)
CORE = {
    "llama": LLAMA | dict(attention_bias=True, mlp_bias=True),
    "llama tied": LLAMA | dict(tie_word_embeddings=True),
    "llama 3": LLAMA | dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                              high_freq_factor=4.0, original_max_position_embeddings=16)),
    "mistral": LLAMA | dict(model_type="mistral", sliding_window=5),
    "qwen2": LLAMA | dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": LLAMA | dict(model_type="qwen3", head_dim=16),
}


def make(config: dict, dtype: torch.dtype = torch.float64, seed: int = 0) -> models.Decoder:
    """A random model; norms and biases random too, so that nothing hides behind ones and zeros."""
    torch.manual_seed(seed)
    model = models.Decoder(models.read_config(config)).to(dtype)
    model.raw_config = config
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3) + (p.dim() == 1))
    return model


def write(model: models.Decoder, directory, **extra) -> None:
    """A checkpoint as Hugging Face would have it, without using save_model."""
    state = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state | extra, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(model.raw_config))


def random_pairs(lengths, vocab_size: int = 61, seed: int = 0) -> list[tuple[list[int], ...]]:
    """[(prompt, chosen, rejected)] of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(3, vocab_size, (n,), generator=generator).tolist()
    return [tuple(map(ids, three)) for three in lengths]


def stream(pairs, shared: bool = True) -> tuple[torch.Tensor, ...]:
    """(input_ids, position_ids, spans, score_index, targets); scored are chosen, then rejected, of each pair."""
    ids, positions, spans, score, targets = [], [], [], [], []

    def add(tokens, prefix=(0, 0)):
        start, first = len(ids), prefix[1] - prefix[0]
        ids.extend(tokens)
        positions.extend(range(first, first + len(tokens)))
        spans.append((start, len(ids), *prefix))
        return start

    for prompt, *completions in pairs:
        place = (add(prompt), len(ids)) if shared else None
        for completion in completions:
            start = add(completion, place) if shared else add(prompt + completion) + len(prompt)
            last = place[1] - 1 if shared else start - 1
            score += [last, *range(start, start + len(completion) - 1)]
            targets += completion
    return tuple(map(torch.tensor, (ids, positions, spans, score, targets)))


def padded(pairs, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded sequences and their mask, (2B, L), rows as `stream` orders completions."""
    rows = [prompt + completion for prompt, *completions in pairs for completion in completions]
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def completion_positions(pairs) -> list[tuple[int, int]]:
    """(row, column) in `padded` of the logits that predict the scored tokens."""
    rows = [(len(prompt), len(c)) for prompt, *completions in pairs for c in completions]
    return [(i, p - 1 + t) for i, (p, n) in enumerate(rows) for t in range(n)]


def gradients(model, loss) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, named.values(), materialize_grads=True)))


def assert_same_gradients(got: dict, expected: dict, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        error = (got[name] - g).abs().max().item()
        assert error <= tolerance * max(1.0, g.abs().max().item()), f"{name}: off by {error}"


MIXED = random_pairs([(7, 5, 9), (1, 1, 12), (12, 3, 1)])


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers")


# Values


@pytest.mark.parametrize("name", CORE)
def test_logits_equal_transformers(name, tmp_path, transformers):
    model = make(CORE[name], torch.float32)
    write(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, mask = padded(MIXED)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        input_ids, position_ids, spans, score, _ = stream(MIXED)
        got = models.load_model(tmp_path).logits(input_ids, position_ids, spans)[score]
    for logits, (row, column) in zip(got, completion_positions(MIXED), strict=True):
        assert (logits - expected[row, column]).abs().max() < 1e-5


def test_logits_of_stories260k_equal_transformers(shared, transformers):
    """To 1e-6 of the largest logit, 17: a unit in its last place is 1e-6, and each CPU sums in an order of its own."""
    directory = shared / "models/stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    pairs = random_pairs([(30, 20, 25), (5, 40, 1)], 500)
    ids, mask = padded(pairs)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        input_ids, position_ids, spans, score, _ = stream(pairs)
        got = models.load_model(directory).logits(input_ids, position_ids, spans)[score]
    rows, columns = zip(*completion_positions(pairs))
    assert (got - expected[list(rows), list(columns)]).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", CORE)
def test_stream_equals_padded_sequences_and_one_by_one(name):
    """Values and gradients of every parameter, float64; "padded" here is the same model on right-padded rows."""
    model = make(CORE[name])
    weights = torch.randn(sum(len(c) for _, *cs in MIXED for c in cs), dtype=torch.float64)
    shared = model(models.Stream(*stream(MIXED))).logps
    unshared = model(models.Stream(*stream(MIXED, shared=False))).logps
    single = torch.cat([model(models.Stream(*stream([(p, c)], False))).logps for p, *cs in MIXED for c in cs])
    ids, _ = padded(MIXED)
    rows, length = ids.shape
    spans = torch.tensor([(i * length, (i + 1) * length, 0, 0) for i in range(rows)])
    logits = model.logits(ids.flatten(), torch.arange(length).repeat(rows), spans).view(rows, length, -1)
    r, c = map(list, zip(*completion_positions(MIXED)))
    dense = logits[r, c].log_softmax(-1).gather(-1, stream(MIXED)[4][:, None])[:, 0]
    expected = gradients(model, (dense * weights).sum())
    for logps in (shared, unshared, single):
        assert (logps - dense).abs().max() < 1e-10
        assert_same_gradients(gradients(model, (logps * weights).sum()), expected, 1e-10)


def test_a_window_changes_the_result():
    """So that the tests above cross it: the same weights without a window differ."""
    config = CORE["mistral"]
    windowed, full = make(config), make(config | dict(sliding_window=None))
    assert (windowed(models.Stream(*stream(MIXED))).logps - full(models.Stream(*stream(MIXED))).logps).abs().max() > 1e-3


def test_prompt_tokens_get_no_gradient_from_their_own_logits():
    model = make(LLAMA)
    kept = []
    model.model.norm.register_forward_hook(lambda m, i, out: kept.append(out) or out.retain_grad())
    input_ids, position_ids, spans, score, targets = stream(MIXED)
    model(models.Stream(input_ids, position_ids, spans, score, targets)).logps.sum().backward()
    unscored = torch.ones(len(input_ids), dtype=torch.bool)
    unscored[score] = False
    assert unscored.sum() > 15 and (kept[0].grad[unscored] == 0).all() and (kept[0].grad[score] != 0).any()


# The head in chunks


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lora", [False, True])
def test_chunked_head_equals_dense(softcap, lora, monkeypatch):
    torch.manual_seed(0)
    N, C, V = 75, 8, 61
    targets, weights = torch.randint(0, V, (N,)), torch.randn(N, dtype=torch.float64)
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((N, C), (V, C))]
    if lora:
        tensors += [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((N, 3), (V, 3))]
    logits = sum(x @ w.T for x, w in zip(tensors[0::2], tensors[1::2]))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(-1)
    dense = log_p.gather(-1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((dense * weights).sum(), tensors)
    for chunk, keep in ((2**24, 8), (20 * V, 8), (20 * V, 2), (20 * V, 0)):  # one chunk; four, the last one ragged
        monkeypatch.setattr(models, "HEAD_CHUNK", chunk)
        got = models.token_logps(list(zip(tensors[0::2], tensors[1::2])), targets, softcap, keep)
        assert (got.logps - dense).abs().max() < 1e-10
        assert (got.entropy + (log_p.exp() * log_p).sum(-1)).abs().max() < 1e-10
        assert (got.log_sum_sq_probs - (2 * log_p).logsumexp(-1)).abs().max() < 1e-10
        assert (got.mean_logits - logits.mean(-1)).abs().max() < 1e-10
        assert (got.is_top1 == (logits.argmax(-1) == targets)).all()
        for g, e in zip(torch.autograd.grad((got.logps * weights).sum(), tensors), expected, strict=True):
            assert (g - e).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kept_chunks_of_the_head_equal_those_computed_again_to_the_bit(dtype, monkeypatch):
    torch.manual_seed(0)
    targets = torch.randint(0, 61, (75,))
    x, w = torch.randn(75, 8, dtype=dtype, requires_grad=True), torch.randn(61, 8, dtype=dtype, requires_grad=True)
    monkeypatch.setattr(models, "HEAD_CHUNK", 20 * 61)
    found = []
    for keep in (8, 2, 0):
        logps = models.token_logps([(x, w)], targets, 3.0, keep).logps
        saved = [t for t in logps.grad_fn.saved_tensors if t.shape[-1:] == (61,) and t.dim() == 2]
        assert len(saved) == min(keep, 4)
        found.append((logps, *torch.autograd.grad(logps.square().sum(), (x, w))))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("keep", [2, 0])  # 0 with checkpointing
def test_a_frozen_head_computes_its_gradient_in_forward_and_keeps_no_logits(keep, softcap, monkeypatch):
    torch.manual_seed(0)
    targets, slope = torch.randint(0, 61, (75,)), torch.randn(75, dtype=torch.float64)
    terms = [(torch.randn(75, n, dtype=torch.float64, requires_grad=True), torch.randn(61, n, dtype=torch.float64)) for n in (8, 3)]
    inputs = [x for x, _ in terms]
    monkeypatch.setattr(models, "HEAD_CHUNK", 20 * 61)
    frozen = models.token_logps(terms, targets, softcap, keep).logps
    assert [tuple(t.shape) for t in frozen.grad_fn.saved_tensors] == [(75, 8), (75, 3)]
    learning = models.token_logps([(x, w.requires_grad_()) for x, w in terms], targets, softcap, keep).logps
    assert torch.equal(frozen, learning)
    for a, b in zip(*(torch.autograd.grad((logps * slope).sum(), inputs) for logps in (frozen, learning)), strict=True):
        assert (a - b).abs().max() < 1e-12 and a.abs().max() > 0.1


def test_the_head_without_statistics_gives_the_same_log_probs_and_no_more():
    model = make(LLAMA)
    whole = model(models.Stream(*stream(MIXED)))
    lean = model(models.Stream(*stream(MIXED)), statistics=False)
    assert torch.equal(lean.logps, whole.logps)
    assert lean[1:] == (None,) * 5 and all(t is not None for t in whole[1:5])


def test_chunk_size_does_not_show_in_bf16_weight_gradients(monkeypatch):
    """They are summed over the chunks in float32: 128 chunks are no worse than one."""
    torch.manual_seed(0)
    x, w = torch.randn(2048, 16), torch.randn(61, 16, requires_grad=True)
    targets = torch.randint(0, 61, (2048,))

    def weight_gradient(chunk, autocast):
        monkeypatch.setattr(models, "HEAD_CHUNK", chunk)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return torch.autograd.grad(models.token_logps([(x, w)], targets).logps.sum(), w)[0]

    exact = weight_gradient(2**24, False)
    error = lambda chunk: ((weight_gradient(chunk, True) - exact).norm() / exact.norm()).item()
    assert error(16 * 61) < 1.2 * error(2**24) + 1e-4


def test_no_scored_token_gives_empty_log_probs():
    model = make(LLAMA)
    empty = torch.zeros(0, dtype=torch.long)
    out = model(models.Stream(torch.tensor([5]), torch.tensor([0]), torch.tensor([[0, 1, 0, 0]]), empty, empty))
    assert out.logps.shape == (0,) and out.is_top1.shape == (0,)
    assert all((g == 0).all() for g in gradients(model, out.logps.sum()).values())


def test_gradient_checkpointing_is_bitwise():
    model = make(CORE["qwen2"], torch.float32)
    plain = model(models.Stream(*stream(MIXED))).logps
    expected = gradients(model, plain.sum())
    model.model.run_block = recompute
    again = model(models.Stream(*stream(MIXED))).logps
    assert torch.equal(plain, again)
    assert all(torch.equal(g, expected[n]) for n, g in gradients(model, again.sum()).items())


# Attention plans


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_varlen_kernel_equals_the_plain_path(name):
    """On the GPU in bf16: as far from float32 as the plain path in bf16 is, values and gradients."""
    model = make(CORE[name], torch.float32).cuda()
    batch = [t if i == 2 else t.cuda() for i, t in enumerate(stream(MIXED))]
    exact = model(models.Stream(*batch)).logps
    exact_gradients = gradients(model, exact.sum())
    half = make(CORE[name], torch.float32).cuda().bfloat16()
    plan = models.plan_attention(half.config, batch[2], batch[1], torch.bfloat16)
    assert all(isinstance(p, VarlenPlan) for p in plan.values())
    fast = half(models.Stream(*batch)).logps
    assert (fast - exact).abs().max() < 0.15
    for name, g in gradients(half, fast.sum()).items():
        assert torch.cosine_similarity(g.float().flatten(), exact_gradients[name].flatten(), dim=0) > 0.99, name


# Files


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2"])
def test_saved_model_is_the_same_to_transformers_and_to_us(name, tmp_path, transformers, monkeypatch):
    write(make(CORE[name], torch.float32), tmp_path / "a")
    (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    model = models.load_model(tmp_path / "a")
    models.save_model(model, tmp_path / "b")
    monkeypatch.setattr(models, "SHARD_BYTES", 9000)
    models.save_model(model, tmp_path / "c")
    assert not (tmp_path / "c/model.safetensors").exists() and len(list(tmp_path.glob("c/*.safetensors"))) > 2
    state = load_file(tmp_path / "a/model.safetensors")
    ids = torch.tensor([MIXED[0][0]])
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()(ids).logits
        for directory in (tmp_path / "b", tmp_path / "c"):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
            assert torch.equal(theirs(ids).logits, expected)
            assert theirs.generation_config.eos_token_id == [1, 2]
            again = dict(models.load_model(directory).named_parameters())
            assert again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)


def test_weights_are_cast_on_the_way_in_and_out(tmp_path):
    model = make(LLAMA | dict(torch_dtype="float32"), torch.float32)
    write(model, tmp_path / "a")
    half = models.load_model(tmp_path / "a", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    models.save_model(models.load_model(tmp_path / "a"), tmp_path / "b", torch.bfloat16)
    assert json.loads((tmp_path / "b/config.json").read_text())["torch_dtype"] == "bfloat16"
    state = load_file(tmp_path / "b/model.safetensors")
    assert all(torch.equal(p, state[n]) for n, p in half.named_parameters())


def test_loaded_weights_do_not_hang_on_the_file(tmp_path):
    """They are copied out of the mapping: writing over the checkpoint that was read is safe."""
    model = make(LLAMA, torch.float32)
    write(model, tmp_path)
    loaded = models.load_model(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(4096)
        file.write(bytes(8192))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))


def test_tied_head_in_the_file_is_kept_there(tmp_path):
    model = make(CORE["llama tied"], torch.float32)
    write(model, tmp_path / "a", **{"lm_head.weight": model.lm_head.weight.detach().clone()})
    models.save_model(models.load_model(tmp_path / "a"), tmp_path / "b")
    saved = load_file(tmp_path / "b/model.safetensors")
    assert torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])
    write(model, tmp_path / "c", **{"lm_head.weight": model.lm_head.weight.detach() + 1})
    with pytest.raises(ValueError, match="ties the head to the embedding, but .* differs"):
        models.load_model(tmp_path / "c")


def drop(name):
    return lambda directory, state: state.pop(name)


def put(name, shape, dtype=torch.float32):
    return lambda directory, state: state.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize("spoil, message", [
    (drop("model.norm.weight"), "missing model.norm.weight"),
    (drop("lm_head.weight"), "missing lm_head.weight"),
    (put("model.layers.0.self_attn.q_proj.bias", 32), "unexpected .*.0.self_attn.q_proj.bias .* in model.safetensors"),
    (put("model.layers.2.mlp.up_proj.weight", (48, 32)), "unexpected model.layers.2.mlp.up_proj.weight"),
    (put("model.layers.1.mlp.up_proj.weight", (32, 48)),
     r"model.layers.1.mlp.up_proj.weight in model.safetensors is \(32, 48\), config.json says \(48, 32\)"),
    (put("model.layers.1.mlp.up_proj.weight", (48, 32), torch.int8), "weight in model.safetensors is quantized .I8"),
    (put("model.layers.0.mlp.up_proj.SCB", 48), "quantized .it has model.layers.0.mlp.up_proj.SCB"),
    (put("model.layers.0.mlp.up_proj.qweight", 48), "quantized"),
])
def test_files_that_do_not_fit_are_refused_by_tensor_name(spoil, message, tmp_path):
    model = make(LLAMA, torch.float32)
    write(model, tmp_path)
    state = {n: p.detach() for n, p in model.named_parameters()}
    spoil(tmp_path, state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        models.load_model(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_broken_directories_are_refused_by_file(tmp_path, monkeypatch):
    model = make(LLAMA, torch.float32)
    write(model, tmp_path / "a")
    monkeypatch.setattr(models, "SHARD_BYTES", 9000)
    models.save_model(models.load_model(tmp_path / "a"), tmp_path / "b")
    shard = sorted((tmp_path / "b").glob("*.safetensors"))[1]

    def refused(match):
        with pytest.raises(ValueError, match=match):
            models.load_model(tmp_path / "b")

    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(f"{shard.name}: not a complete safetensors file")
    shard.unlink()
    refused(f"names {shard.name}, which the directory lacks")
    index = tmp_path / "b/model.safetensors.index.json"
    index.write_text("{}")
    refused("no \"weight_map\"")
    index.unlink()
    refused("no model.safetensors and no model.safetensors.index.json")
    (tmp_path / "b/config.json").write_text("[1]")
    refused("config.json: expected a JSON object")
    (tmp_path / "b/config.json").unlink()
    refused("config.json: no such file")
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        models.load_model(tmp_path / "nowhere")


def test_a_tensor_that_the_index_places_elsewhere_is_reported(tmp_path, monkeypatch):
    write(make(LLAMA, torch.float32), tmp_path / "a")
    monkeypatch.setattr(models, "SHARD_BYTES", 9000)
    models.save_model(models.load_model(tmp_path / "a"), tmp_path / "b")
    path = tmp_path / "b/model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"missing model.norm.weight in {files[0]}, where the index says it is"):
        models.load_model(tmp_path / "b")


def test_core_families_load_train_and_save_without_extras(tmp_path):
    """model.py and parts/ alone in a directory."""
    shutil.copy(ROOT / "model.py", tmp_path / "model.py")
    shutil.copytree(ROOT / "parts", tmp_path / "parts")
    for name, config in CORE.items():
        write(make(config, torch.float32), tmp_path / name)
    script = """
import sys, torch, model
for name in sys.argv[1:]:
    m = model.load_model(name)
    assert name != "llama" or "torch._dynamo" not in sys.modules  # which would take seconds to import
    m.lm_head = model.LoraLinear(m.lm_head, 2, 4, 0.0)
    ids = torch.arange(3, 9)
    spans = torch.tensor([[0, 6, 0, 0]])
    m(model.Stream(ids, torch.arange(6), spans, torch.arange(5), ids[1:])).logps.sum().backward()
    model.save_model(m, name + " saved")
    model.load_model(name + " saved")
assert "extras" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, *CORE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Configurations


@pytest.mark.parametrize("change, message", [
    (dict(model_type="mamba"), "model_type 'mamba' is not supported; supported are llama, mistral"),
    (dict(model_type=None), "model_type None is not supported"),
    (dict(model_type="t5", is_encoder_decoder=True), "'t5' is an encoder-decoder model"),
    (dict(model_type="deepseek_v32", kv_lora_rank=512), "model_type 'deepseek_v32' is not supported"),
    (dict(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}), "needs remote code"),
    (dict(auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}), "auto_map names code of its own"),
    (dict(model_type="paligemma", vision_config={}), "'paligemma' reads images or sound"),
    (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized .gptq."),
    (dict(quantization_config={"quant_method": "fp8"}), "quantized .fp8."),
    (dict(new_scale=3.0), "new_scale = 3.0: not understood for model_type 'llama'"),
    (dict(sliding_window=4096), "sliding_window = 4096: not understood"),
    (dict(use_bidirectional_attention=True), "use_bidirectional_attention = True: not understood"),
    (dict(hidden_act="mish"), "hidden_act = 'mish'; known are silu"),
    (dict(rms_norm_eps=None), "rms_norm_eps: missing"),
    (dict(rope_scaling={"type": "mrope", "mrope_section": [1, 2]}), "rope_type 'mrope' with mrope_section is not"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "odd": 1}), "'linear' with odd is not supported"),
    (dict(rope_scaling={"rope_type": "linear"}), "rope_type 'linear' needs 'factor'"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "rope_type 'llama3' needs 'low_freq_factor'"),
])
def test_configurations_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        models.read_config(LLAMA | change)


def test_a_key_that_says_nothing_is_accepted():
    silent = dict(sliding_window=None, new_flag=False, new_list=[])
    assert models.read_config(LLAMA | silent) == models.read_config(LLAMA)


def test_dynamic_rope_is_plain_up_to_its_limit_and_refused_beyond():
    config = models.read_config(LLAMA | dict(rope_scaling={"type": "dynamic", "factor": 2.0}))
    plain = models.read_config(LLAMA)
    assert config.ropes["full_attention"].frequencies == plain.ropes["full_attention"].frequencies
    check_length(config, 64)
    with pytest.raises(ValueError, match="a sequence of 65 tokens: .* reach 64"):
        check_length(config, 65)
    check_length(plain, 10**6)


# LoRA


def put_lora(model: models.Decoder, rank: int, alpha: float, dropout: float, target_modules, **more) -> list[str]:
    """The wrapped modules' names."""
    settings = dict(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules)
    return add_lora(model, more | settings)


TARGETS = [["q_proj", "v_proj"], ["all-linear"], ["lm_head"], ["embed_tokens"], ["o_proj", "lm_head", "embed_tokens"]]


def randomize_lora(model) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn_like(p) * 0.3)


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_adapters_go_to_peft_and_come_back(name, targets, tmp_path, transformers):
    peft = pytest.importorskip("peft", reason="needs peft")
    write(make(CORE[name], torch.float32), tmp_path / "base")
    ours = models.load_model(tmp_path / "base")
    put_lora(ours, 4, 8, 0.0, targets)
    randomize_lora(ours)
    save_adapter(ours, tmp_path / "a", dict(r=4, lora_alpha=8, lora_dropout=0.0, base_model_name_or_path="base"))
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "a").eval()
    input_ids, position_ids, spans, *_ = stream([MIXED[0][:2]], False)
    with torch.no_grad():
        expected = theirs(input_ids[None]).logits[0]
        assert (ours.logits(input_ids, position_ids, spans) - expected).abs().max() < 1e-5
        base = models.load_model(tmp_path / "base")
        assert (base.logits(input_ids, position_ids, spans) - expected).abs().max() > 0.1
        fresh = "all-linear" if targets == ["all-linear"] else targets
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=fresh, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(load(tmp_path / "base"), config).eval()
        randomize_lora(theirs)
        theirs.save_pretrained(tmp_path / "b")
        load_adapter(ours, tmp_path / "b")
        assert (ours.logits(input_ids, position_ids, spans) - theirs(input_ids[None]).logits[0]).abs().max() < 1e-5


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_lora_starts_at_the_base_and_the_base_is_still_there(targets):
    model = make(CORE["llama tied"])
    base = model(models.Stream(*stream(MIXED))).logps
    put_lora(model, 4, 8, 0.0, targets)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n}
    start = model.double()(models.Stream(*stream(MIXED))).logps
    assert torch.equal(start, base)
    moving = {n for n, g in gradients(model, start.sum()).items() if g.abs().max() > 0}
    for name, module in models.lora_modules(model).items():
        assert any(n.startswith(name + ".") for n in moving), f"{name} would never learn"
        if isinstance(module, models.LoraLinear):
            bound = module.base_layer.in_features ** -0.5
            assert 0.5 * bound < module.lora_A.weight.abs().max() <= bound
    randomize_lora(model)
    moved = model(models.Stream(*stream(MIXED))).logps
    assert (moved - base).abs().max() > 0.01
    with models.adapters_disabled(model):
        assert torch.equal(model(models.Stream(*stream(MIXED))).logps, base)
    assert torch.equal(model(models.Stream(*stream(MIXED))).logps, moved)


def test_merged_lora_is_the_same_model():
    model, merged = make(CORE["llama"]), make(CORE["llama"])
    put_lora(model, 4, 8, 0.0, ["all-linear", "lm_head", "embed_tokens"])
    randomize_lora(model.double())
    with torch.no_grad():
        for name, module in models.lora_modules(model).items():
            merged.get_submodule(name).weight += module.delta()
    assert (model(models.Stream(*stream(MIXED))).logps - merged(models.Stream(*stream(MIXED))).logps).abs().max() < 1e-10


def test_lora_over_a_bf16_base_trains_in_float32(monkeypatch):
    """Adapters are float32, activations stay bf16, and the head with its LoRA scores in both modes."""
    monkeypatch.setattr(models, "HEAD_CHUNK", 16 * 61)
    config = CORE["llama"] | dict(num_hidden_layers=1)
    model = make(config, torch.bfloat16)
    put_lora(model, 4, 8, 0.1, ["all-linear", "lm_head", "embed_tokens"])
    randomize_lora(model)
    seen = set()
    model.model.layers[0].register_forward_hook(lambda m, i, out: seen.add(out[0].dtype))
    logps = model.eval()(models.Stream(*stream(MIXED))).logps
    trained = gradients(model, logps.sum())
    assert seen == {torch.bfloat16} and logps.dtype == torch.float32
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in trained.values())
    exact = make(config, torch.bfloat16).float()
    put_lora(exact, 4, 8, 0.1, ["all-linear", "lm_head", "embed_tokens"])
    randomize_lora(exact)
    wide = gradients(exact, exact.eval()(models.Stream(*stream(MIXED))).logps.sum())
    for n, g in trained.items():
        assert torch.cosine_similarity(g.flatten(), wide[n].flatten(), dim=0) > 0.95, n


def lora_product(dtype, adapter_dtype, seed=0):
    """The inputs of LowRank: what the base gave, its input, A, B."""
    torch.manual_seed(seed)
    shapes = ((9, 12), (9, 8), (3, 8), (12, 3))
    kinds = (dtype, dtype, adapter_dtype, adapter_dtype)
    return [torch.randn(*shape, dtype=kind, requires_grad=True) for shape, kind in zip(shapes, kinds)]


def test_the_lora_product_equals_its_formula_in_value_and_gradient():
    tensors = lora_product(torch.float64, torch.float64)
    out, x, a, b = tensors
    slope = torch.randn(9, 12, dtype=torch.float64)
    plain = out + 0.7 * (x @ a.T) @ b.T
    fast = kernels.add_low_rank(out * 1, x, a, b, 0.7)
    assert (plain - fast).abs().max() < 1e-12
    grads = [torch.autograd.grad((y * slope).sum(), tensors) for y in (plain, fast)]
    assert all((g - e).abs().max() < 1e-12 for g, e in zip(*grads, strict=True))


def test_the_lora_product_keeps_the_input_itself_and_gives_float32_gradients():
    """In bfloat16, beside the formula in float32: no worse than rounding, and no wide copy of the input."""
    tensors = lora_product(torch.bfloat16, torch.float32)
    out, x, a, b = tensors
    slope = torch.randn(9, 12)
    fast = kernels.add_low_rank(out * 1, x, a, b, 0.7)
    kept = fast.grad_fn.saved_tensors
    assert kept[0].data_ptr() == x.data_ptr() and kept[1].shape == (9, 3) and kept[2] is a and kept[3] is b
    plain = out.float() + 0.7 * (x.float() @ a.T) @ b.T
    grads = [torch.autograd.grad((y * slope).sum(), tensors) for y in (plain, fast)]
    assert [g.dtype for g in grads[1]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for e, g in ((plain, fast), *zip(*grads, strict=True)):
        assert (g.float() - e.float()).norm() < 0.01 * e.float().norm()


def test_lora_dropout_acts_in_training_only():
    model = make(CORE["llama"])
    put_lora(model, 4, 8, 0.5, ["q_proj"])
    randomize_lora(model.double())
    run = lambda: model(models.Stream(*stream(MIXED))).logps
    assert not torch.equal(run(), run())
    model.eval()
    assert torch.equal(run(), run())


@pytest.mark.parametrize("target", ["c_attn", "proj"])
def test_lora_targets_that_match_nothing_are_refused(target):
    with pytest.raises(ValueError, match=f"--lora_target_modules {target}: no such module; this model has .*q_proj"):
        put_lora(make(LLAMA), 4, 8, 0.0, ["q_proj", target])


@pytest.mark.parametrize("change, message", [
    (dict(use_dora=0), "use_dora = 0 has no meaning"),
    (dict(bias="all"), "bias = 'all': not understood"),
    (dict(use_qalora=True), "use_qalora = True: not understood"),
    (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa': not understood"),
    (dict(trainable_token_indices=[1]), r"trainable_token_indices = \[1\]: not understood"),
    (dict(a_setting_of_tomorrow=1), "a_setting_of_tomorrow = 1: not understood"),
    (dict(peft_type="IA3"), "peft_type = 'IA3': not understood"),
    (dict(lora_alpha=4), "its LoRA on .*q_proj is scaled by 1, this one by 2"),
    (dict(r=None), "r: missing"),
])
def test_other_adapters_are_refused(change, message, tmp_path):
    model = make(LLAMA)
    put_lora(model, 4, 8, 0.0, ["q_proj"])
    save_adapter(model, tmp_path, dict(r=4, lora_alpha=8, lora_dropout=0.0))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)


def test_adapter_config_names_modules_as_short_as_is_unambiguous(tmp_path):
    for targets, expected in ((["q_proj", "all-linear"], 7), (["layers.0.self_attn.q_proj"], 1)):
        model = make(LLAMA)
        names = put_lora(model, 4, 8, 0.0, targets)
        save_adapter(model, tmp_path, dict(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
        written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        assert len(written) == expected and all(any(n.endswith(w) for w in written) for n in names)
    assert written == ["model.layers.0.self_attn.q_proj"]


def test_an_adapter_of_other_modules_or_rank_is_refused(tmp_path):
    model, other, wide = make(LLAMA), make(LLAMA), make(LLAMA)
    put_lora(model, 4, 8, 0.0, ["q_proj"])
    put_lora(other, 4, 8, 0.0, ["k_proj"])
    put_lora(wide, 8, 16, 0.0, ["q_proj"])
    save_adapter(model, tmp_path, dict(r=4, lora_alpha=8, lora_dropout=0.0))
    with pytest.raises(ValueError, match="not those of this LoRA; first difference: base_model.model.model.layers.0"):
        load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is \(4, 32\), this LoRA has \(8, 32\)"):
        load_adapter(wide, tmp_path)
