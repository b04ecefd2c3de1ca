"""Weights in FP8 with a scale for each block, as DeepSeek-V3, Kimi K2 and Qwen3's -FP8 files are published."""

import json

import pytest
import torch
from conftest import make_rows
from safetensors.torch import load_file, save_file
from test_families import LATENT, our_logits, their_logits
from test_latent import PUBLISHED, bare, further_layer, with_further_layer

import dpo
import model as models
from extras.models import fp8, opening
from parts.configs import check_supported, packed_in

transformers = pytest.importorskip("transformers", reason="needs transformers")

WAY = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[8, 8])
PACKED = ("_proj.weight", "kv_a_proj_with_mqa.weight")


def packed(state: dict, side: int = 8) -> dict:
    """The tensors as published: FP8 with scales for all linear layers but routers, head and the further layer's own."""
    found = dict(state)
    for name, t in state.items():
        if name.endswith(PACKED) and "eh_proj" not in name:
            shape = [-(-size // side) for size in t.shape]
            padded = torch.zeros(shape[0] * side, shape[1] * side)
            padded[: t.shape[0], : t.shape[1]] = t
            blocks = padded.view(shape[0], side, shape[1], side)
            scale = blocks.abs().amax((1, 3)).clamp(min=1e-9) / 448
            values = (blocks / scale[:, None, :, None]).view_as(padded)[: t.shape[0], : t.shape[1]]
            found |= {name: values.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scale}
        elif "e_score" not in name:
            found[name] = t.bfloat16()
    return found


@pytest.fixture(scope="module", params=[24, 20])
def published(request, tmp_path_factory):
    """A small checkpoint as published, with a further layer, in two files; of rank 20 a block is not full."""
    directory = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("deepseek_v3", **LATENT | dict(q_lora_rank=request.param, moe_intermediate_size=16, v_head_dim=8))
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.model.layers[1].mlp.gate.e_score_correction_bias, std=0.1)
    model.save_pretrained(directory)
    with_further_layer(directory, directory)
    state = packed(load_file(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()
    files = {n: f"model-0000{1 + n.endswith('scale_inv')}-of-00002.safetensors" for n in state}
    for file in set(files.values()):
        save_file({n: state[n] for n in files if files[n] == file}, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    raw = json.loads((directory / "config.json").read_text()) | dict(quantization_config=WAY, dtype="bfloat16")
    (directory / "config.json").write_text(json.dumps(raw))
    return request.param, state, directory


def test_every_value_is_itself_times_its_scale():
    """All 254 numbers that a float8 has, under scales of several sizes; the last blocks are not full."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[values.float().isfinite()].repeat(2)[:500].view(20, 25)
    scales = torch.rand(3, 4) + torch.tensor([1e-3, 1.0, 30.0])[:, None]
    got = fp8.dequantize(values, scales, (8, 8))
    assert got.shape == (20, 25) and got.dtype == torch.bfloat16
    for i in range(20):
        for j in range(25):
            assert got[i, j] == (values[i, j].float() * scales[i // 8, j // 8]).bfloat16()


def test_published_files_are_read_as_numbers_and_saved_in_bfloat16(published, tmp_path):
    rank, state, directory = published
    ours = opening.load_model(directory)
    assert len(ours.read.digest()) == 16  # what ranks compare reads slices too
    wide = {}
    for name, t in state.items():
        if f"{name}_scale_inv" in state:
            wide[name] = fp8.dequantize(t, state[f"{name}_scale_inv"], (8, 8))
        elif not name.endswith("_scale_inv"):
            wide[name] = t
    models.save_model(ours, tmp_path, torch.bfloat16)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == wide.keys() and len(wide) < len(state)
    assert all(torch.equal(saved[n], wide[n]) for n in wide)  # the further layer's too
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in raw and raw["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (our_logits(ours) - their_logits(again)[0]).abs().max() < 1e-5
        assert torch.equal(our_logits(models.load_model(tmp_path)), our_logits(ours))  # a plain checkpoint now


def test_transformers_reads_the_same_numbers_where_all_blocks_are_full(published):
    """It refuses others, as of the size 576 that DeepSeek-V3's kv_a_proj_with_mqa has in blocks of 128."""
    rank, _, directory = published
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8)))
    if rank % 8:
        with pytest.raises(RuntimeError, match="not divisible|conversion|convert"):
            load()
        return
    with torch.no_grad():
        expected = their_logits(load().float().eval())[0]
        # it does not round to bfloat16
        assert (our_logits(opening.load_model(directory)) - expected).abs().max() < 0.05


def test_published_files_train_from_the_command_line_and_in_4_bits(published, tiny, tmp_path):
    _, state, directory = published
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((tiny / file).read_bytes())
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(8, seed=1)), encoding="utf-8")
    flags = f"""--model_name_or_path {directory} --dataset_name {tmp_path}/pairs.jsonl --cache_dir {tmp_path}/cache
        --max_steps 2 --learning_rate 1e-3"""
    assert dpo.main([*flags.split(), "--output_dir", f"{tmp_path}/out", "--dtype", "auto"]) == 0
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved["model.layers.1.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert (our_logits(models.load_model(tmp_path / "out")) - our_logits(opening.load_model(directory))).abs().max() > 1e-4
    assert dpo.main([*flags.split(), "--output_dir", f"{tmp_path}/lora", "--use_peft", "--load_in_4bit"]) == 0


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("model.layers.1.self_attn.o_proj.weight"), "o_proj.weight_scale_inv is there, but .*o_proj.weight is missing"),
    (lambda s: s.pop("model.layers.1.self_attn.o_proj.weight_scale_inv"), r"o_proj.weight in .* is quantized .F8_E4M3."),
    (lambda s: s.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.zeros(6, 3)}),
     r"up_proj.weight: F8_E4M3 .48, 32. with scales F32 .6, 3.; expected F8_E4M3 .out, in. with a scale, a float, for each block of 8 x 8"),
    (lambda s: s.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(6, 4, dtype=torch.int8)}), "with scales I8 .6, 4."),
    (lambda s: s.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}), "up_proj.weight: F32 .48, 32. with scales")])
def test_damaged_files_are_named(change, message, published, tmp_path):
    state = dict(published[1])
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((published[2] / "config.json").read_text())
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{message}"):
        opening.load_model(tmp_path)


@pytest.mark.parametrize("change", [
    dict(fmt="e5m2"), dict(weight_block_size=None), dict(weight_block_size=[128]), dict(weight_block_size=[0, 8]), dict(quant_method="fbgemm_fp8")])
def test_other_kinds_of_fp8_are_refused(change, published):
    raw = json.loads((published[2] / "config.json").read_text())
    check_supported(raw)
    raw["quantization_config"] = WAY | change
    assert packed_in(raw) == ""
    with pytest.raises(ValueError, match="the checkpoint is quantized"):
        check_supported(raw)


def test_deepseek_v3_has_as_many_values_as_its_files():
    """684,531,386,000 with the scales, in 91,991 tensors."""
    model = bare(models.read_config(PUBLISHED["DeepSeek-V3"]))
    count = tensors = 0
    for name, t in [*model.named_parameters(), *model.named_buffers(), *further_layer(model).items()]:
        matrices = [t.shape[1:]] * t.shape[0] if t.dim() == 3 else [t.shape]
        if name.endswith("gate_up_proj"):  # gate and up of each expert
            matrices = [(rows // 2, columns) for rows, columns in matrices for _ in range(2)]
        is_packed = t.dim() == 3 or name.endswith(PACKED) and "eh_proj" not in name
        scales = [-(-m[0] // 128) * -(-m[1] // 128) for m in matrices] if is_packed else []
        count += t.numel() + sum(scales)
        tensors += len(matrices) + len(scales)
    assert (count, tensors) == (684_531_386_000, 91_991)
