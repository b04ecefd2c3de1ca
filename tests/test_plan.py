"""Predicted memory against counted tensors, and what --dry_run says."""

import itertools
import weakref

import numpy as np
import pytest
import torch
from test_model import put_lora
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import dpo
import model as models
from extras import plan
from extras.decoder.in_stream import Pictures, find_runs
from extras.decoder.memory import save_memory
from extras.decoder.vision import freeze
from extras.lora.targets import usual_targets
from extras.models.opening import build
from extras.run import forecast
from parts.activations import keep_all, recompute


class Counting(TorchDispatchMode):
    """Within, `peak` is the most bytes of tensors that were alive at once: every storage, until it is freed."""

    def __init__(self, *tensors):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live and tensor.device.type != "meta":
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, key)

    def freed(self, key):
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


def config_of(**sizes):
    base = dict(model_type="llama", hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, vocab_size=320, max_position_embeddings=4096, rms_norm_eps=1e-5,
                rope_theta=1e4, tie_word_embeddings=False, hidden_act="silu")
    return models.read_config(base | sizes)


def batches_of(count, forwards, vocab_size):
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, vocab_size, n).astype(np.int32)
    pairs = [data.Pair(ids(60), ids(60), ids(40)) for _ in range(count)]
    return [data.collate(pairs) for _ in range(forwards)]


def counted_peak(config, run, batches):
    """The most bytes alive in a second step: by then the optimizer has its moments."""
    model = build(config).to(getattr(torch, run.weights))
    model.requires_grad_(True)
    if config.vision is not None:
        freeze(model, not run.tower_learns)
    if run.four_bit:
        from extras.models.nf4 import quantize_linears

        quantize_linears(model, nested=run.four_bit == "nested")
    if run.rank:
        usual = run.targets == plan.Run._field_defaults["targets"]
        put_lora(model, run.rank, run.rank, 0.0, usual_targets(config) if usual else list(run.targets))
    model.model.run_block = recompute if run.checkpointing is True else keep_all
    if run.checkpointing == "selective":
        save_memory(model, "selective", False, torch.device("cpu"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    reference = [p.detach().clone() for p in model.parameters()] if run.live_ref else []
    for _ in range(2):
        state = [t for s in optimizer.state.values() for t in s.values()]
        buffers = [t for m in model.modules() for t in m.buffers(recurse=False)]
        counting = Counting(*model.parameters(), *buffers, *reference, *state)
        with counting:
            for b in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=run.bf16):
                    out = model(b)
                (-out.logps.sum()).backward()
                del out
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return counting.peak


GEMMA4 = dict(
    model_type="gemma4_text", hidden_activation="gelu_pytorch_tanh", num_hidden_layers=6, sliding_window=32, global_head_dim=32,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2, num_kv_shared_layers=3,
    hidden_size_per_layer_input=16, vocab_size_per_layer_input=320, tie_word_embeddings=True)
SHAPES = {"square": {}, "deep": dict(num_hidden_layers=12), "wide": dict(hidden_size=192, intermediate_size=512),
          "vocabulary": dict(vocab_size=5000), "tied": dict(vocab_size=2000, tie_word_embeddings=True),
          "tied, nearly all": dict(vocab_size=20000, tie_word_embeddings=True),
          "all kv heads": dict(num_key_value_heads=4, head_dim=32),
          "gated delta": dict(model_type="qwen3_5_text", num_hidden_layers=8, linear_num_key_heads=2,
                              linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16),
          "mamba": dict(model_type="granitemoehybrid", num_hidden_layers=8, shared_intermediate_size=352, mamba_n_heads=4,
                        mamba_d_head=32, mamba_d_state=32, layer_types=(["attention"] + ["mamba"] * 3) * 2),
          "mamba beside attention": dict(model_type="falcon_h1", num_hidden_layers=6, mamba_d_ssm=256, mamba_n_heads=4,
                                         mamba_d_head=64, mamba_d_state=32),
          "layers of their own": GEMMA4, "experts beside": GEMMA4 | dict(
              num_kv_shared_layers=0, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=8,
              top_k_experts=2, moe_intermediate_size=32, attention_k_eq_v=True, num_global_key_value_heads=1)}
SHAPES |= {"latent": dict(
    model_type="deepseek_v3", num_hidden_layers=6, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
    topk_group=1, moe_intermediate_size=48, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16), "experts": dict(
    model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)}
NEMOTRON = dict(
    model_type="nemotron_h", num_hidden_layers=9, hybrid_override_pattern="M-M-*-M-*", mamba_num_heads=4, mamba_head_dim=32,
    ssm_state_size=32, n_groups=2)
SHAPES |= {"one residual": NEMOTRON, "one residual, experts": NEMOTRON | dict(
    hybrid_override_pattern="MEME*EME*", n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=96), "one residual, experts inside": NEMOTRON | dict(
    hybrid_override_pattern="MEME*EME*", n_routed_experts=8, num_experts_per_tok=4, moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=96, moe_latent_size=32)}
MODES = {"float32": {}, "bf16": dict(bf16=True), "accumulated": dict(forwards=2), "checkpointing": dict(checkpointing=True),
         "selective": dict(checkpointing="selective"), "selective, bf16": dict(checkpointing="selective", bf16=True),
         "live reference": dict(live_ref=True), "LoRA": dict(rank=4), "LoRA on all": dict(rank=4, targets=("all-linear",)),
         "QLoRA": dict(rank=4, targets=("all-linear",), four_bit="plain")}


@pytest.mark.parametrize("shape,mode", itertools.product(SHAPES, MODES))
def test_predicted_memory_is_within_15_percent_of_the_tensors_counted(shape, mode):
    config = config_of(**SHAPES[shape])
    batches = batches_of(4, MODES[mode].get("forwards", 1), config.vocab_size)
    run = plan.Run(len(batches[0].input_ids), len(batches[0].targets), **MODES[mode])
    predicted, counted = plan.memory(config, run), counted_peak(config, run, batches)
    assert predicted["total"] == pytest.approx(counted, rel=0.15), predicted


def with_images(layers: int, inner: int):
    """A Gemma 3 whose encoder reads 256 patches for 16 tokens, and four pairs with an image each."""
    text = dict(model_type="gemma3_text", hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, vocab_size=320, max_position_embeddings=4096, sliding_window=50)
    tower = dict(hidden_size=96, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4, image_size=112,
                 patch_size=7)
    config = models.read_config(dict(
        model_type="gemma3", text_config=text, vision_config=tower, mm_tokens_per_image=16, tie_word_embeddings=False))
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, 300, n).astype(np.int32)
    image = np.full(16, 310, np.int32)
    batch = data.collate([data.Pair(np.concatenate([ids(30), image, ids(30)]), ids(60), ids(40)) for _ in range(4)])
    place = (batch.input_ids == 310).nonzero().flatten()
    runs = torch.from_numpy(find_runs(batch.input_ids.numpy(), 310))
    pictures = Pictures(torch.randn(4, 3, 112, 112), torch.zeros(4, 2).long(), place, torch.arange(64), runs=runs)
    return config, batch._replace(pictures=pictures)


def with_images_of_gemma_4(layers: int, inner: int):
    """The same of a Gemma 4, its decoder and its encoder as in E2B."""
    config, batch = with_images(layers, inner)
    text = GEMMA4 | dict(hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=16, vocab_size=320, max_position_embeddings=4096, sliding_window=50, num_kv_shared_layers=1,
                         layer_types=["sliding_attention", "full_attention"] * 2, use_bidirectional_attention="vision", rms_norm_eps=1e-6)
    tower = dict(hidden_size=96, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
                 head_dim=24, patch_size=7, pooling_kernel_size=4, position_embedding_size=280, use_clipped_linears=True)
    config = models.read_config(dict(model_type="gemma4", text_config=text, vision_config=tower, image_token_id=310))
    patches = torch.rand(4 * 256, 3 * 7 * 7)
    return config, batch._replace(pictures=batch.pictures._replace(pixels=patches, grids=torch.full((4, 2), 16)))


@pytest.mark.parametrize("made", [with_images, with_images_of_gemma_4])
@pytest.mark.parametrize("layers, inner", [(2, 256), (8, 128)])
@pytest.mark.parametrize("mode", [{}, dict(tower_learns=True), dict(rank=4), dict(bf16=True), dict(bf16=True, tower_learns=True),
                                  dict(checkpointing=True, tower_learns=True)], ids=str)
def test_predicted_memory_knows_the_image_encoder(made, layers, inner, mode):
    config, batch = made(layers, inner)
    run = plan.Run(len(batch.input_ids), len(batch.targets), patches=4 * 256, masked=4 * (136**2 + 40 * 116), **mode)
    predicted, counted = plan.memory(config, run), counted_peak(config, run, [batch])
    assert predicted["total"] == pytest.approx(counted, rel=0.15), predicted


@pytest.mark.parametrize("more, width", [({}, 4), (dict(bf16=True), 2), (dict(weights="bfloat16"), 2)])
def test_fsdp_exchanges_blocks_in_the_width_they_are_gathered_in(more, width):
    config = config_of(num_hidden_layers=2)
    run = plan.Run(100, 50, world=4, fsdp=True, **more)
    block = sum(p.numel() for p in models.Decoder(config).model.layers[0].parameters())
    assert plan.memory(config, run)["exchange"] == 2 * 2 * width * block  # two blocks, weights and gradients
    assert plan.memory(config, run._replace(rank=4))["exchange"] < 1.2 * 2 * width * block  # gradients of the LoRA alone


def test_a_dry_run_says_steps_tokens_memory_and_time_and_trains_nothing(tiny, pairs_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dpo.DPOTrainer, "train", lambda self: pytest.fail("training began"))
    assert dpo.main(["--model_name_or_path", str(tiny), "--dataset_name", str(pairs_file), "--output_dir", str(tmp_path / "o"),
                     "--cache_dir", str(tmp_path / "c"), "--use_cpu", "--dry_run", "--num_train_epochs", "2",
                     "--use_peft", "--lora_target_modules", "all-linear"]) == 0
    said = capsys.readouterr().out
    assert "23 pairs of" in said and "6 steps of 8 pairs, 2 epochs" in said
    assert "memory per rank: " in said and "time: " in said and "FLOP/s" in said


def test_of_experts_those_that_a_token_is_sent_to_are_counted():
    """DeepSeek-V3 activates 37 of its 671 billion parameters, as its card says; the embedding multiplies nothing. Gemma 4
    26B-A4B, whose experts are beside its MLPs, 3.8 of 25.2 billion; its tower has 0.55 more."""
    from test_latent import PUBLISHED
    from test_wrapped import gemma4

    config = models.read_config(PUBLISHED["DeepSeek-V3"])
    head = config.vocab_size * config.hidden_size
    counted = forecast.count(config, plan.Run(1, 1))
    assert 36e9 < counted["matrices"] + head < 38e9 and counted["weights"] == 4 * 671_026_404_352
    config = models.read_config(gemma4("26B-A4B")[0])
    head, counted = config.vocab_size * config.hidden_size, forecast.count(config, plan.Run(1, 1))
    assert 3.75e9 < counted["matrices"] + head < 3.85e9 and 25.75e9 < counted["weights"] / 4 < 25.85e9


REAL = {  # configurations as published, and their parameters
    "0.5B": (dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                  num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True), 494_032_768),
    "7B": (dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32), 6_738_415_616),
    "70B": (dict(model_type="llama", vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                 num_attention_heads=64, num_key_value_heads=8), 68_976_648_192)}


@pytest.mark.parametrize("name", REAL)
def test_of_real_sizes_weights_are_counted_exactly_and_the_modes_are_in_order(name):
    raw, parameters = REAL[name]
    config = models.read_config(raw | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5})
    run = plan.Run(4096, 2048, world=8, bf16=True, checkpointing=True)
    lora = run._replace(rank=16, targets=("all-linear",), weights="bfloat16")
    ddp, fsdp, low_rank, four_bit = (plan.memory(config, r) for r in (
        run, run._replace(fsdp=True), lora, lora._replace(four_bit="nested")))
    assert ddp["weights"] == 4 * parameters and ddp["moments"] == 8 * parameters
    assert fsdp["weights"] == parameters // 2
    assert ddp["total"] > fsdp["total"] and ddp["total"] > low_rank["total"] > four_bit["total"]
