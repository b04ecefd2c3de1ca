"""4-bit weights: bit for bit bitsandbytes', equal to the wide layers they stand for, wide for one product at a time.

`golden/nf4.json` holds what bitsandbytes gives; `python tests/test_nf4.py` writes it again where that is installed
(`pip install bitsandbytes==0.50.2`), and then the tests against the package itself run too.
"""

import copy
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: E402, F401  puts the repository on the path
from safetensors.torch import load_file, save_file  # noqa: E402
from test_model import (  # noqa: E402
    LLAMA,
    gradients,
    make,
    padded,
    put_lora,  # noqa: E402
    random_pairs,
    stream,
    write,
)
from torch import nn  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

import model as models  # noqa: E402
from extras.decoder import moe  # noqa: E402
from extras.lora import targets as lora_targets  # noqa: E402
from extras.lora.merging import (
    merge_4bit,  # noqa: E402
    merge_lora,  # noqa: E402
)
from extras.models import nf4  # noqa: E402
from extras.models.opening import load_model  # noqa: E402
from parts.activations import recompute  # noqa: E402
from parts.names import (
    Place,  # noqa: E402
    file_name,  # noqa: E402
)
from parts.weights import (
    open_checkpoint,  # noqa: E402
    read_tensors,  # noqa: E402
)

GOLDEN = Path(__file__).parent / "golden" / "nf4.json"
TYPES = [(quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (False, True)]
PAIRS = random_pairs([(7, 5, 9), (1, 1, 12)])
WIDE = LLAMA | dict(hidden_size=64, intermediate_size=128)
CONFIGS = {
    "llama": WIDE | dict(attention_bias=True, mlp_bias=True),
    "llama tied": LLAMA | dict(tie_word_embeddings=True),
    "gpt2": dict(model_type="gpt2", vocab_size=61, n_embd=64, n_layer=2, n_head=4, n_positions=64,
                 layer_norm_epsilon=1e-5, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "phi3": LLAMA | dict(model_type="phi3"),  # rows of 32 and 48 values: blocks run over their ends
    "mixtral": LLAMA | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}


@pytest.fixture(scope="module")
def bnb():
    package = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes 0.50")
    if not package.__version__.startswith("0.50."):
        pytest.skip(f"needs bitsandbytes 0.50, found {package.__version__}, which may round otherwise")
    with torch.compiler.set_stance("force_eager"):  # it compiles its fallbacks, which takes half a minute
        yield package.functional


# Codes and scales


def random_tensors() -> dict[str, torch.Tensor]:
    """117 tensors: 13 distributions, of 3 shapes each (most with an incomplete last block), in 3 types."""
    torch.manual_seed(0)
    distributions = {
        "normal": torch.randn, "uniform": lambda *s: torch.rand(*s) - 0.5, "zeros": torch.zeros,
        "heavy": lambda *s: torch.randn(*s) ** 5, "constant": lambda *s: torch.full(s, 0.37),
        "negative": lambda *s: torch.full(s, -2.0), "small": lambda *s: torch.randn(*s) * 1e-6,
        "sparse": lambda *s: torch.randn(*s) * (torch.rand(*s) > 0.95), "huge": lambda *s: torch.randn(*s) * 1e4,
        "subnormal": lambda *s: torch.randn(*s) * 1e-39, "grid": lambda *s: torch.randint(-8, 9, s) / 8,
        "near one": lambda *s: 1 - torch.rand(*s) * 1e-4,
        "mixed": lambda *s: torch.randn(*s) * 10 ** (torch.rand(*s) * 7 - 4)}
    shapes = [[(96, 200), (7, 9)], [(64, 64), (1, 1)], [(257, 67), (2, 33)]]
    return {f"{name} {shape} {dtype}": draw(*shape).to(dtype) for i, (name, draw) in enumerate(distributions.items())
            for shape in [*shapes[i % 3], (40, 40)] for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.mark.parametrize("quant_type, nested", TYPES)
def test_codes_and_scales_are_bitsandbytes_bit_for_bit(bnb, quant_type, nested):
    tensors = random_tensors()
    assert len(tensors) == 117
    for name, tensor in tensors.items():
        packed, state = bnb.quantize_4bit(tensor, quant_type=quant_type, compress_statistics=nested)
        expected = dict(packed=packed.flatten(), absmax=state.absmax, code=state.code)
        if nested:
            inner = state.state2
            expected |= dict(nested_absmax=inner.absmax, nested_code=inner.code, nested_offset=state.offset)
        got = nf4.quantize(tensor, quant_type, nested=nested)._asdict()
        for field, value in expected.items():
            assert torch.equal(got[field], value), f"{name}: {field}"
        assert (got["nested_offset"] is not None) == nested


@pytest.mark.parametrize("quant_type, nested", TYPES)
def test_wide_weights_are_bitsandbytes_bit_for_bit(bnb, quant_type, nested):
    for name, tensor in random_tensors().items():
        if "subnormal" in name:  # its conversion to bfloat16 flushes them to zero
            continue
        packed, state = bnb.quantize_4bit(tensor, quant_type=quant_type, compress_statistics=nested)
        got = nf4.quantize(tensor, quant_type, nested=nested)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            state.dtype = dtype
            assert torch.equal(nf4.dequantize(got, dtype), bnb.dequantize_4bit(packed, state)), f"{name} to {dtype}"


@pytest.mark.parametrize("width", [16, 32, 48, 96, 160])
def test_blocks_run_over_the_ends_of_rows(bnb, width):
    """bitsandbytes 0.50 takes wrong scales for such rows on CPUs with AVX-512; as one long row it gets them right."""
    weight = torch.randn(64, width)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    state.shape = torch.Size([1, weight.numel()])
    assert torch.equal(nf4.dequantize(nf4.quantize(weight)).view(1, -1), bnb.dequantize_4bit(packed, state))


def golden_values(case: dict) -> torch.Tensor:
    """The input, as the file's `about` tells."""
    values, shape = torch.tensor(case["values"]), torch.Size(case["shape"])
    if len(values) < shape.numel():
        values = F.pad(values[:, None], (0, 63))
    return values.to(getattr(torch, case["dtype"])).view(shape)


def golden_cases() -> list[dict]:
    return json.loads(GOLDEN.read_text())["cases"]


@pytest.mark.parametrize("number", range(18))
def test_golden_vectors(number):
    case = golden_cases()[number]
    state = nf4.quantize(golden_values(case), case["quant_type"], nested=case["nested"])
    got = outcome(state.packed, state.absmax, state.nested_absmax, state.nested_offset)
    assert got == case["expected"], case["name"]


def test_golden_nested_levels():
    assert nf4.dynamic_levels().tolist() == json.loads(GOLDEN.read_text())["nested_code"]


def test_golden_file_has_the_cases_that_are_tested():
    assert [c["name"] for c in golden_cases()] == [c["name"] for c in golden_inputs()] and len(golden_cases()) == 18


def test_golden_file_is_what_bitsandbytes_gives(bnb):
    assert golden_file() == json.loads(GOLDEN.read_text())


def textbook(values: list[float], levels: list[float], size: int = 64) -> list[float]:
    """Dequantized values, as the paper tells it, in float64."""
    out = []
    for start in range(0, len(values), size):
        block = values[start : start + size]
        absmax = max(map(abs, block))
        out += [absmax * min(levels, key=lambda q: abs(q - x / absmax)) for x in block]
    return out


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_value_becomes_the_nearest_level(quant_type):
    torch.manual_seed(1)
    x = torch.randn(5, 63)
    state = nf4.quantize(x, quant_type)
    expected = torch.tensor(textbook(x.flatten().tolist(), state.code.tolist()))
    assert torch.allclose(nf4.dequantize(state).flatten(), expected, rtol=1e-6, atol=0)


def test_thresholds_are_those_of_the_cuda_kernel():
    """Its decision tree sends x > threshold up; the numbers stand in its source."""
    tree = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
            -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
            0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011]
    at = torch.tensor(tree)
    above = torch.nextafter(at, torch.tensor(2.0))
    block = torch.cat([at, above, torch.tensor([1.0]), torch.zeros(33)])  # absmax 1: values are what is compared
    packed = nf4.quantize(block).packed
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
    assert codes[:15].tolist() == list(range(15)) and codes[15:30].tolist() == list(range(1, 16))


@pytest.mark.parametrize("quant_type, nested", TYPES)
def test_zeros_and_odd_sizes_come_back(quant_type, nested):
    for tensor in (torch.zeros(3, 65), torch.zeros(1, 64), torch.tensor([[2.5]]), torch.full((3, 3), -7.0)):
        back = nf4.dequantize(nf4.quantize(tensor, quant_type, nested=nested))
        assert back.shape == tensor.shape and (back - tensor).abs().max() < 1e-6


def test_memory_per_weight_is_as_documented():
    weight = torch.randn(1024, 1024)
    bits = lambda state: 8 * sum(getattr(state, f).nbytes for f in ("packed", "absmax", "nested_absmax")
                                 if getattr(state, f) is not None) / weight.numel()
    assert bits(nf4.quantize(weight)) == 4.5
    assert bits(nf4.quantize(weight, nested=True)) == 4 + 8 / 64 + 32 / (64 * 256)


def test_nested_scales_are_off_by_no_more_than_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(512, 512) * 0.02
    plain, nested = nf4.quantize(weight), nf4.quantize(weight, nested=True)
    assert torch.equal(plain.packed, nested.packed)
    error = (nf4.block_scales(nested) - plain.absmax).abs().max()
    widest = nested.nested_code.diff().max() * nested.nested_absmax.max()
    assert 0 < error <= widest * 0.51


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("nested", [False, True])
def test_values_that_are_not_finite_are_refused(bad, nested):
    weight = torch.randn(4, 100)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match="not-a-number"):
        nf4.quantize(weight, nested=nested)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="int4"):
        nf4.quantize(torch.ones(4), "int4")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_count_below_is_bucketize(quant_type):
    torch.manual_seed(0)
    levels = nf4.quantize(torch.ones(1), quant_type).code.sort().values
    at = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([torch.rand(100000) * 2 - 1, at, torch.nextafter(at, at + 1), torch.nextafter(at, at - 1),
                   torch.arange(-1024, 1025) / 1024, torch.tensor([-1.0, 1.0, -0.0])])
    assert torch.equal(nf4.count_below(x, at), torch.bucketize(x, at, out_int32=True))


def test_chunks_do_not_show(monkeypatch):
    weight = torch.randn(40, 129)
    state = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "CPU_CHUNK", 4096)
    chunked = nf4.quantize(weight)
    assert torch.equal(chunked.packed, state.packed) and torch.equal(chunked.absmax, state.absmax)
    wide = nf4.dequantize(state)
    monkeypatch.undo()
    assert torch.equal(wide, nf4.dequantize(state))


# Merging


def test_merging_dequantizes_then_adds_then_rounds_once():
    wide, model = make(CONFIGS["llama"], torch.float32), make(CONFIGS["llama"], torch.float32)
    nf4.quantize_linears(model, nested=True)
    with_lora(model, ["q_proj", "lm_head"])
    name = "model.layers.0.self_attn.q_proj"
    module = model.get_submodule(name)
    expected, delta = nf4.dequantize(module.base_layer.state).double() + module.delta().double(), module.delta()
    head = (model.lm_head.weight + model.lm_head.delta()).to(torch.bfloat16)
    merge_lora(model)
    merged = model.get_submodule(name).weight
    assert torch.allclose(merged.double(), expected, rtol=1.001 * 2**-8, atol=0)  # half a step of bfloat16
    assert torch.equal(model.lm_head.weight, head) and model.four_bit is None
    assert not torch.equal(merged, (wide.get_submodule(name).weight + delta).to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not list(model.buffers())


@pytest.mark.parametrize("name, settings", [
    ("llama", dict(target_modules="all-linear", use_dora=True)),
    ("llama tied", dict(target_modules=["q_proj", "lm_head"])),
    ("llama", dict(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])),
    ("mixtral", dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
], ids=str)
def test_every_kind_of_adapter_merges_over_4_bits(name, settings):
    model = four_bit_pair(name)[0]
    lora_targets.add_lora(model, settings | dict(r=4, lora_alpha=8))
    torch.manual_seed(3)
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.add_(torch.randn_like(p) * 0.05)
    expected, wide = logps(model), copy.deepcopy(model)
    merge_4bit(wide, dtype=torch.float32)
    assert not models.lora_modules(wide) and wide.four_bit is None
    assert (logps(wide) - expected).abs().max() < 1e-5
    merge_4bit(model, again=True)
    nf4.quantize_linears(wide)
    assert model.four_bit and states(model).keys() == states(wide).keys()
    assert (logps(model) - logps(wide)).abs().max() < 1e-5 < (logps(model) - expected).abs().max()


def test_quantizing_the_merged_weights_again_leaves_the_others_as_they_are():
    model = with_lora(four_bit_pair("llama", nested=True)[0], ["q_proj"])
    module = model.model.layers[1].self_attn.q_proj
    wanted = nf4.quantize(nf4.dequantize(module.base_layer.state) + module.delta(), nested=True)
    other = model.model.layers[1].self_attn.k_proj.state
    merge_4bit(model, again=True)
    assert same_state(model.model.layers[1].self_attn.q_proj.state, wanted) and not models.lora_modules(model)
    assert same_state(model.model.layers[1].self_attn.k_proj.state, other) and model.four_bit


@pytest.mark.parametrize("quant_type, nested", TYPES)
def test_quantizing_again_keeps_the_format(quant_type, nested):
    weight = torch.randn(16, 24).bfloat16()
    state = nf4.quantize(weight, quant_type, 128, nested)
    again = nf4.requantize(state, weight.float())
    for field in nf4.Quantized._fields:
        one, other = getattr(state, field), getattr(again, field)
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other, field


# bitsandbytes' tensors


@pytest.mark.parametrize("quant_type, nested", TYPES)
def test_file_tensors_are_bitsandbytes_byte_for_byte(bnb, quant_type, nested):
    weight = torch.randn(24, 35).bfloat16()
    packed, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    expected = {"w": packed} | {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}
    got = nf4.to_bnb_tensors("w", nf4.quantize(weight, quant_type, nested=nested))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def test_settings_are_json_as_transformers_reads_it():
    torch.manual_seed(0)
    state = nf4.quantize(torch.ones(2, 64).bfloat16(), "fp4", nested=True)
    tensor = nf4.to_bnb_tensors("w", state)["w.quant_state.bitsandbytes__fp4"]
    assert tensor.dtype == torch.uint8
    assert bytes(tensor.tolist()).decode() == (
        '{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64], "nested_blocksize": 256, '
        '"nested_dtype": "float32", "nested_offset": 1.0}')


def same_state(one: nf4.Quantized, other: nf4.Quantized) -> bool:
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(one, other))


@pytest.mark.parametrize("quant_type, nested", TYPES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_what_is_written_is_read_back(quant_type, nested, storage):
    state = nf4.quantize(torch.randn(24, 32).half(), quant_type, nested=nested)
    tensors = nf4.to_bnb_tensors("a.weight", state)
    tensors["a.weight"] = tensors["a.weight"].view(-1).view(storage)[:, None]
    assert same_state(nf4.from_bnb_tensors("a.weight", tensors), state)


STATE = "w.quant_state.bitsandbytes__nf4"


def as_bytes(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize("spoil, says", [
    (lambda t: t.pop("w.absmax"), "not a 4-bit weight"),
    (lambda t: t.pop("w.nested_quant_map"), "not a 4-bit weight"),
    (lambda t: t.pop("w.quant_state.bitsandbytes__nf4"), "not a 4-bit weight"),
    (lambda t: t.update({"w": t["w"][:-1]}), "packed has 383 values"),
    (lambda t: t.update({"w.absmax": t["w.absmax"][:5]}), "absmax has 5 values"),
    (lambda t: t.update({"w.absmax": t["w.absmax"].to(torch.int8)}), "absmax is int8; expected uint8"),
    (lambda t: t.update({"w.quant_map": t["w.quant_map"].to(torch.int8)}), "code is int8; expected a type of floats"),
    (lambda t: t.update({STATE: t[STATE][:-9]}), "not the settings of a 4-bit weight"),
    (lambda t: t.update({STATE: t[STATE][:0]}), "not the settings of a 4-bit weight"),
    (lambda t: t.update({STATE: t[STATE].float()}), "not the settings of a 4-bit weight"),
    (lambda t: t.update({STATE: as_bytes(b'{"quant_type": "nf4"}')}), "not the settings of a 4-bit weight"),
    (lambda t: t.update({STATE: as_bytes(b"[]")}), "not the settings of a 4-bit weight"),
    (lambda t: t.update({STATE: as_bytes(t[STATE].numpy().tobytes().replace(b"[24, 32]", b"[24, 32, 1]"))}), "not the settings"),
    (lambda t: t.update({STATE: as_bytes(t[STATE].numpy().tobytes().replace(b'"float32", "shape', b'"nn", "shape'))}), "not the settings"),
])
def test_incomplete_tensors_are_refused(spoil, says):
    tensors = nf4.to_bnb_tensors("w", nf4.quantize(torch.randn(24, 32), nested=True))
    spoil(tensors)
    with pytest.raises(ValueError, match=f"w.*: {says}|w: .*{says}"):
        nf4.from_bnb_tensors("w", tensors)


def test_the_files_own_nested_map_is_used():
    """Older CPU builds wrote -1 for its first level."""
    state = nf4.quantize(torch.randn(64, 64), nested=True)
    tensors = nf4.to_bnb_tensors("w", state)
    tensors["w.nested_quant_map"] = tensors["w.nested_quant_map"] * 2
    got = nf4.block_scales(nf4.from_bnb_tensors("w", tensors)) - state.nested_offset
    assert torch.allclose(got, 2 * (nf4.block_scales(state) - state.nested_offset), atol=1e-6)


# A linear layer


def linear_pair(dtype: torch.dtype, bias: bool, compute_dtype=None) -> tuple[nn.Linear, nf4.Linear4bit]:
    """A wide layer with dequantized weights, and the one in 4 bits."""
    torch.manual_seed(0)
    wide = nn.Linear(48, 40, bias=bias).to(dtype)
    state = nf4.quantize(wide.weight, nested=True)
    wide.weight.data = nf4.dequantize(state)
    narrow = nf4.Linear4bit(state, copy.deepcopy(wide.bias), compute_dtype)
    return wide, narrow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_wide_layer_forward_and_backward(dtype, bias):
    wide, narrow = linear_pair(dtype, bias)
    x = torch.randn(7, 48, dtype=dtype)
    results = []
    for layer in (wide, narrow):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        inputs = [leaf] + ([layer.bias] if bias else [])
        results.append([out, *torch.autograd.grad((out * torch.arange(40)).sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_gradients_pass_gradcheck():
    _, narrow = linear_pair(torch.float64, True)
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: nf4.linear4bit(x, narrow.state, b, None), (x, narrow.bias))


def test_under_autocast_it_is_the_wide_layer():
    wide, narrow = linear_pair(torch.float32, True)
    x = torch.randn(7, 48)
    results = []
    for layer in (wide, narrow):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(leaf)
            results.append((out, *torch.autograd.grad(out.sum(), leaf)))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*results))
    assert results[0][0].dtype == torch.bfloat16


def test_compute_dtype_is_that_of_the_product_alone():
    wide, narrow = linear_pair(torch.float32, False, torch.bfloat16)
    x = torch.randn(7, 48)
    out = narrow(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, F.linear(x.bfloat16(), wide.weight.bfloat16()).float())


def test_no_wide_weight_outlives_a_product(monkeypatch):
    made, dequantize = [], nf4.dequantize

    def watched(*arguments):
        wide = dequantize(*arguments)
        made.append(StorageWeakRef(wide.untyped_storage()))
        return wide

    layers = [linear_pair(torch.float32, True)[1] for _ in range(2)]
    monkeypatch.setattr(nf4, "dequantize", watched)
    x = torch.randn(7, 48, requires_grad=True)
    out = layers[1](torch.cat([layers[0](x), x[:, :8]], 1)).sum()
    assert len(made) == 2 and all(ref.expired() for ref in made)
    out.backward()
    assert len(made) == 4 and all(ref.expired() for ref in made)


def test_moving_to_another_type_rounds_no_scale():
    _, narrow = linear_pair(torch.float32, True)
    before = [t.clone() for t in narrow.state if torch.is_tensor(t)]
    for moved in (copy.deepcopy(narrow), copy.deepcopy(narrow).to(torch.bfloat16), copy.deepcopy(narrow).double()):
        after = [t for t in moved.state if torch.is_tensor(t)]
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert narrow.to(torch.bfloat16).bias.dtype == torch.bfloat16


# Models


def logps(model) -> torch.Tensor:
    return model(models.Stream(*stream(PAIRS))).logps


def four_bit_pair(name: str, **settings) -> tuple[models.Decoder, models.Decoder]:
    """(a model in 4 bits, the wide model with the same weights)."""
    narrow = make(CONFIGS[name], torch.float32)
    nf4.quantize_linears(narrow, **settings)
    wide = copy.deepcopy(narrow)
    nf4.dequantize_linears(wide, torch.float32)
    return narrow, wide


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_in_4_bits_is_the_wide_one_with_these_weights(name):
    narrow, wide = four_bit_pair(name, nested=True)
    assert any(isinstance(m, nf4.Linear4bit) for m in narrow.modules())
    assert not any(isinstance(m, (nf4.Linear4bit, nf4.Experts4bit)) for m in wide.modules())
    assert (logps(narrow) - logps(wide)).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(logps(narrow), logps(wide), atol=0.02)
    assert (logps(narrow) - logps(make(CONFIGS[name], torch.float32))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_embeddings_head_norms_and_router_stay(name):
    plain, narrow = make(CONFIGS[name], torch.float32), make(CONFIGS[name], torch.float32)
    done = nf4.quantize_linears(narrow)
    expected = [n for n, m in plain.named_modules() if isinstance(m, (nn.Linear, moe.Experts)) and n != "lm_head"]
    assert sorted(done) == sorted(expected) and done
    left = dict(narrow.named_parameters())
    same = [n for n, p in plain.named_parameters() if n in left and torch.equal(left[n], p)]
    assert len(same) == len(left) and "model.embed_tokens.weight" in same and "lm_head.weight" in same


def test_skip_takes_any_part_of_a_name():
    narrow = make(LLAMA, torch.float32)
    done = nf4.quantize_linears(narrow, skip=("lm_head", "layers.1", "down_proj"))
    assert all(n.startswith("model.layers.0.") and "down_proj" not in n for n in done) and len(done) == 6


def with_lora(model: models.Decoder, targets) -> models.Decoder:
    put_lora(model, 4, 8, 0.0, targets)
    torch.manual_seed(3)
    for module in models.lora_modules(model).values():
        for p in (module.lora_A.weight, module.lora_B.weight):
            nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_over_4_bits_is_lora_over_the_wide_weights(name):
    narrow, wide = (with_lora(m, ["all-linear"]) for m in four_bit_pair(name))
    assert models.lora_modules(narrow).keys() == models.lora_modules(wide).keys()
    results = [(logps(m), gradients(m, logps(m).square().sum())) for m in (narrow, wide)]
    (got, got_grads), (expected, expected_grads) = results
    assert (got - expected).abs().max() < 1e-5 and got_grads.keys() == expected_grads.keys()
    for parameter, g in expected_grads.items():
        assert (got_grads[parameter] - g).abs().max() <= 1e-5 * max(1, g.abs().max()), parameter


def test_gradient_checkpointing_changes_nothing():
    narrow = with_lora(four_bit_pair("llama", compute_dtype=torch.float32)[0], ["q_proj", "down_proj"])
    plain = gradients(narrow, logps(narrow).sum())
    narrow.model.run_block = recompute
    again = gradients(narrow, logps(narrow).sum())
    assert all(torch.equal(plain[n], again[n]) for n in plain)


def test_merging_an_adapter_into_dequantized_weights_gives_its_log_probs():
    narrow = with_lora(four_bit_pair("llama")[0], ["q_proj", "down_proj"])
    expected = logps(narrow)
    merge_4bit(narrow, dtype=torch.float32)
    assert (logps(narrow) - expected).abs().max() < 1e-5


def test_the_reverse_gives_one_type_throughout():
    narrow = make(CONFIGS["llama"], torch.float32)
    nf4.quantize_linears(narrow)
    nf4.dequantize_linears(narrow, torch.bfloat16)
    assert {p.dtype for n, p in narrow.named_parameters() if "_proj." in n} == {torch.bfloat16}


# Experts


def make_experts() -> moe.Experts:
    torch.manual_seed(0)
    experts = moe.Experts(40, dict(experts=3, size=24), F.silu)  # matrices of 15 blocks
    for p in experts.parameters():
        nn.init.normal_(p, std=0.2)
    return experts


@pytest.mark.parametrize("quant_type, nested", TYPES)
def test_stacked_experts_are_linear_layers_one_by_one(quant_type, nested):
    """Nested scales too: an expert's absmax never share a mean, or a block, with another's."""
    experts = make_experts()
    packed = nf4.in_4bit("experts", experts, dict(experts.named_parameters()), quant_type, nested, None)
    counts, x = torch.tensor([4, 0, 5]), torch.randn(9, 40, requires_grad=True)
    layer = lambda weight: nf4.Linear4bit(nf4.quantize(weight, quant_type, nested=nested))
    expected = []
    for e, rows in enumerate(x.split(counts.tolist())):
        gate, up = (layer(w) for w in experts.gate_up_proj[e].chunk(2))
        expected.append(layer(experts.down_proj[e])(F.silu(gate(rows)) * up(rows)))
    out, expected = packed(x, counts), torch.cat(expected)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected)))


def test_experts_without_tokens_are_not_made_wide(monkeypatch):
    experts, made, dequantize = make_experts(), [], nf4.dequantize
    packed = nf4.in_4bit("experts", experts, dict(experts.named_parameters()), "nf4", False, None)
    monkeypatch.setattr(nf4, "dequantize", lambda *state: made.append(state) or dequantize(*state))
    assert packed(torch.randn(5, 40), torch.tensor([0, 5, 0])).shape == (5, 40) and len(made) == 3
    assert packed(torch.randn(0, 40), torch.tensor([0, 0, 0])).shape == (0, 40) and len(made) == 3


# Loading


def file_of(name: str, directory: Path) -> Path:
    """A wide checkpoint of the configuration, as its family's own files have it."""
    write(make(CONFIGS[name], torch.float32), directory)
    if name not in ("gpt2", "mixtral"):
        return directory
    state = load_file(directory / "model.safetensors")
    if name == "gpt2":
        state = {file_name(n, models.read_config(CONFIGS[name])): t for n, t in state.items()}
        turned = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
        state = {n: t.T.contiguous() if n.endswith(turned) else t for n, t in state.items()}
    else:
        state = {n: t for whole, tensor in state.items() for n, t in expert_files(whole, tensor)}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def expert_files(name: str, tensor: torch.Tensor):
    """Mixtral's own files: one tensor per expert and matrix."""
    stem = name.replace(".mlp.", ".block_sparse_moe.")
    matrices = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(name.rpartition(".")[2])
    if matrices is None:
        return [(stem, tensor)]
    stem = stem.rpartition(".")[0]
    return [(f"{stem}.{e}.{n}.weight", part.clone()) for e, expert in enumerate(tensor)
            for n, part in zip(matrices, expert.chunk(len(matrices)))]


def states(model) -> dict[str, nf4.Quantized]:
    return {f"{n}.{i}": m[i] for n, m in model.named_modules() if isinstance(m, nf4.Stack4bit) for i in range(len(m))}


def assert_same_model(one, other) -> None:
    left, right = states(one), states(other)
    assert left.keys() == right.keys() and left
    assert all(same_state(left[n], right[n]) for n in left)
    parameters = dict(other.named_parameters())
    assert all(torch.equal(p, parameters.pop(n)) for n, p in one.named_parameters()) and not parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_in_4_bits_is_loading_then_quantizing(name, tmp_path):
    directory = file_of(name, tmp_path)
    settings = dict(quant_type="nf4", nested=True, compute_dtype=torch.float32)
    got = nf4.load_4bit(open_checkpoint(directory), settings, torch.bfloat16, "cpu")
    expected = models.load_model(directory, torch.bfloat16)
    nf4.quantize_linears(expected, **settings)
    assert_same_model(got, expected)
    assert not any(t.is_meta for t in (*got.parameters(), *got.buffers()))
    assert got.model.embed_tokens.weight.requires_grad and got.model.norm.weight.requires_grad
    assert torch.equal(logps(got), logps(expected))


def test_loading_holds_one_wide_block_at_a_time(tmp_path):
    directory = file_of("llama", tmp_path)
    checkpoint = open_checkpoint(directory)
    config = models.read_config(CONFIGS["llama"])
    with torch.device("meta"):
        model = models.Decoder(config)
    parameters, asked, alive = dict(model.named_parameters()), [], []

    def read(names):
        assert all(ref.expired() for ref in alive), "weights of the block before are still there"
        place = {n: Place(n) for n in names}
        values = read_tensors(checkpoint, place, {n: parameters[n] for n in names}, torch.float32, "cpu")
        # norms and biases are not quantized and stay
        alive[:] = [StorageWeakRef(t.untyped_storage()) for n, t in values.items() if n.endswith("proj.weight")]
        asked.append(names)
        return values

    nf4.quantize_linears(model, read=read)
    assert sorted(n for names in asked for n in names) == sorted(parameters)
    blocks = [{".".join(n.split(".")[:3]) for n in names if ".layers." in n} for names in asked]
    assert sorted(map(len, blocks)) == [0] * (len(blocks) - 2) + [1, 1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("quant_type, nested", TYPES)
def test_a_4_bit_checkpoint_is_read_as_it_was_written(name, quant_type, nested, tmp_path):
    directory = file_of(name, tmp_path / "wide")
    settings = dict(quant_type=quant_type, nested=nested, compute_dtype=torch.bfloat16)
    model = nf4.load_4bit(open_checkpoint(directory), settings, torch.float32, "cpu")
    nf4.save_4bit(with_lora(model, ["all-linear"]), tmp_path / "narrow", torch.bfloat16)
    opened = open_checkpoint(tmp_path / "narrow")
    again = nf4.load_4bit(opened, None, torch.float32, "cpu")
    model = nf4.load_4bit(open_checkpoint(directory), settings, torch.float32, "cpu")
    assert_same_model(again, model)
    assert torch.equal(logps(again), logps(model))
    assert "quantization_config" in opened.raw_config and "quantization_config" not in again.raw_config


def test_what_a_4_bit_checkpoint_leaves_wide_stays_wide(tmp_path):
    directory = file_of("llama", tmp_path / "wide")
    settings = dict(quant_type="nf4", skip=("lm_head", "layers.0"))
    nf4.save_4bit(nf4.load_4bit(open_checkpoint(directory), settings, torch.float32, "cpu"), tmp_path / "narrow")
    again = nf4.load_4bit(open_checkpoint(tmp_path / "narrow"), {}, torch.float32, "cpu")
    assert {n.split(".")[2] for n in states(again)} == {"1"}
    assert {s.quant_type for s in states(again).values()} == {"nf4"}


def test_a_router_that_other_code_had_in_4_bits_is_made_wide(tmp_path):
    directory = file_of("mixtral", tmp_path / "wide")
    model = nf4.load_4bit(open_checkpoint(directory), {}, torch.float32, "cpu")
    nf4.save_4bit(model, tmp_path / "narrow")
    path = tmp_path / "narrow" / "model.safetensors"
    tensors, name = load_file(path), "model.layers.0.block_sparse_moe.gate.weight"
    state = nf4.quantize(tensors[name])
    save_file(tensors | nf4.to_bnb_tensors(name, state), path, metadata={"format": "pt"})
    again = nf4.load_4bit(open_checkpoint(tmp_path / "narrow"), {}, torch.float32, "cpu")
    assert torch.equal(again.model.layers[0].mlp.gate.weight, nf4.dequantize(state))


def test_a_4_bit_checkpoint_in_shards_is_read(tmp_path):
    directory = file_of("llama", tmp_path / "wide")
    model = nf4.load_4bit(open_checkpoint(directory), dict(nested=True), torch.float32, "cpu")
    nf4.save_4bit(model, tmp_path / "narrow")
    tensors = load_file(tmp_path / "narrow" / "model.safetensors")
    files = {n: f"model-{i % 3}.safetensors" for i, n in enumerate(tensors)}  # a weight's tensors in different files
    for file in set(files.values()):
        save_file({n: tensors[n] for n in files if files[n] == file}, tmp_path / "narrow" / file)
    (tmp_path / "narrow" / "model.safetensors").unlink()
    (tmp_path / "narrow" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same_model(nf4.load_4bit(open_checkpoint(tmp_path / "narrow"), {}, torch.float32, "cpu"), model)


@pytest.mark.parametrize("config, says", [
    (dict(quant_method="gptq", bits=4), "gptq"),
    (dict(quant_method="other", load_in_4bit=True), "other"),
    (dict(quant_method="bitsandbytes", load_in_8bit=True, load_in_4bit=False), "8 bits"),
])
def test_other_quantizations_are_refused_by_name(config, says, tmp_path):
    file_of("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(quantization_config=config)))
    with pytest.raises(ValueError, match=says):
        nf4.load_4bit(open_checkpoint(tmp_path), {}, torch.float32, "cpu")


@pytest.mark.parametrize("asked", [dict(quant_type="fp4"), dict(nested=True)], ids=str)
def test_another_kind_than_a_4_bit_checkpoint_has_is_refused(asked, tmp_path):
    directory = file_of("llama", tmp_path / "wide")
    nf4.save_4bit(nf4.load_4bit(open_checkpoint(directory), {}, torch.float32, "cpu"), tmp_path / "narrow")
    with pytest.raises(ValueError, match="narrow: the checkpoint is in 4 bits already .nf4.;"):
        load_model(tmp_path / "narrow", four_bit=asked)


@pytest.mark.parametrize("name, drop, says", [
    ("llama", "model.layers.1.mlp.up_proj.weight", "missing model.layers.1.mlp.up_proj.weight"),
    ("llama", "model.norm.weight", "missing model.norm.weight"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight", "gate_up_proj: 7 x"),
])
def test_a_4_bit_checkpoint_that_lacks_a_weight_is_refused(name, drop, says, tmp_path):
    directory = file_of(name, tmp_path / "wide")
    nf4.save_4bit(nf4.load_4bit(open_checkpoint(directory), {}, torch.float32, "cpu"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert drop in tensors
    tensors = {n: t for n, t in tensors.items() if n != drop and not n.startswith(drop + ".")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=says):
        nf4.load_4bit(open_checkpoint(tmp_path), {}, torch.float32, "cpu")


@pytest.mark.parametrize("lost, says", [("", "is there, but .*o_proj.weight is missing"), (".absmax", "not a 4-bit weight")])
def test_a_piece_of_a_4_bit_weight_that_is_missing_is_told_with_the_directory(lost, says, tmp_path):
    directory = file_of("llama", tmp_path / "wide")
    nf4.save_4bit(nf4.load_4bit(open_checkpoint(directory), {}, torch.float32, "cpu"), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.0.self_attn.o_proj.weight{lost}"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: .*{says}"):
        load_model(tmp_path)


@pytest.mark.parametrize("shape", [(16, 64), (64, 32)])
def test_a_4_bit_weight_of_another_shape_is_refused(shape, tmp_path):
    directory = file_of("llama", tmp_path / "wide")
    nf4.save_4bit(nf4.load_4bit(open_checkpoint(directory), {}, torch.float32, "cpu"), tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.self_attn.o_proj.weight"
    save_file(load_file(path) | nf4.to_bnb_tensors(name, nf4.quantize(torch.randn(shape))), path)
    with pytest.raises(ValueError, match=re.escape(f"o_proj.weight: 1 x {shape}; config.json says (64, 64)")):
        nf4.load_4bit(open_checkpoint(tmp_path), {}, torch.float32, "cpu")


def test_stacked_files_of_experts_cannot_be_written(tmp_path):
    model = make(CONFIGS["mixtral"], torch.float32)
    model.layout = {n: Place(n) for n, _ in model.named_parameters()}
    nf4.quantize_linears(model)
    with pytest.raises(ValueError, match="stacked experts"):
        nf4.save_4bit(model, tmp_path)


# Beside transformers, PEFT and bitsandbytes


@pytest.fixture(scope="module")
def transformers(bnb):
    package = pytest.importorskip("transformers", reason="needs transformers")
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


def load_theirs(transformers, directory: Path, **settings):
    """In training mode: otherwise bitsandbytes repacks the weights for a kernel with bfloat16 scales."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings).train()


# a model whose rows are whole blocks, which bitsandbytes reads rightly on every CPU: see
# test_blocks_run_over_the_ends_of_rows
WHOLE_ROWS = dict(hidden_size=64, intermediate_size=64, head_dim=16)


def their_config(transformers, quant_type: str, nested: bool):
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32)


def their_logps(model) -> torch.Tensor:
    """Of the completions' tokens, in the order of `stream`."""
    ids, mask = padded(PAIRS)
    wide = model(ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    rows = [(prompt, c) for prompt, *completions in PAIRS for c in completions]
    return torch.cat([wide[i, len(p) - 1 : len(p) - 1 + len(c)] for i, (p, c) in enumerate(rows)])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("quant_type, nested", TYPES)
def test_transformers_reads_what_is_written_and_writes_what_is_read(name, quant_type, nested, tmp_path, transformers):
    directory = file_of(name, tmp_path / "wide")
    settings = dict(quant_type=quant_type, nested=nested)
    ours = nf4.load_4bit(open_checkpoint(directory), settings, torch.float32, "cpu")
    nf4.save_4bit(ours, tmp_path / "ours", torch.float32)
    with torch.no_grad():
        assert (their_logps(load_theirs(transformers, tmp_path / "ours")) - logps(ours)).abs().max() < 1e-5
    theirs = load_theirs(transformers, directory, quantization_config=their_config(transformers, quant_type, nested))
    theirs.save_pretrained(tmp_path / "theirs")
    again = nf4.load_4bit(open_checkpoint(tmp_path / "theirs"), {}, torch.float32, "cpu")
    left, right = states(again), states(ours)
    assert left.keys() == right.keys() and all(same_state(left[n], right[n]) for n in right)
    with torch.no_grad():
        assert (their_logps(theirs) - logps(again)).abs().max() < 1e-5


@pytest.mark.parametrize("name, more", [
    ("granite_h", dict(shared_intermediate_size=64, mamba_d_head=16)), ("falcon_h1", dict(mamba_d_ssm=64)),
    ("granite_h experts", dict(shared_intermediate_size=64, mamba_d_head=16)), ("llama4", dict(intermediate_size_mlp=64)),
    ("gemma4", dict(global_head_dim=16, hidden_size_per_layer_input=64))])
def test_families_with_layers_of_other_kinds_have_the_4_bits_of_bitsandbytes(name, more, tmp_path, transformers):
    """The same linear layers, to the same numbers. Stacked experts bitsandbytes leaves wide: they get its numbers by hand,
    Llama 4's, which are (experts, in, out), along their inputs."""
    import bitsandbytes
    from test_families import our_logits, random_model, their_logits

    random_model(name, **WHOLE_ROWS, **more).save_pretrained(tmp_path)
    ours = load_model(tmp_path, torch.float32, four_bit=dict(quant_type="nf4", nested=False))
    theirs = load_theirs(transformers, tmp_path, quantization_config=their_config(transformers, "nf4", False))
    narrow = [{n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"} for model in (ours, theirs)]
    assert {file_name(n, ours.config) for n in narrow[0]} == narrow[1] and len(narrow[1]) > 10
    bnb = bitsandbytes.functional
    rounded = lambda w: bnb.dequantize_4bit(*bnb.quantize_4bit(w.contiguous(), quant_type="nf4"))
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if ".experts." in n:
                p.copy_(torch.stack([rounded(w.mT).mT if name == "llama4" else rounded(w) for w in p]))
        assert (our_logits(ours) - their_logits(theirs)[0]).abs().max() < 1e-5


def dpo_loss(logps: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    lengths = [len(c) for _, *completions in PAIRS for c in completions]
    ratios = torch.stack([part.sum() for part in (logps - ref).split(lengths)]).view(-1, 2)
    return -F.logsigmoid(0.5 * (ratios[:, 0] - ratios[:, 1])).mean()


def test_a_qlora_step_is_that_of_transformers_peft_and_bitsandbytes(tmp_path, transformers):
    peft = pytest.importorskip("peft", reason="needs peft")
    directory = file_of("llama", tmp_path)
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = load_theirs(transformers, directory, quantization_config=their_config(transformers, "nf4", True))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
    settings = dict(quant_type="nf4", nested=True, compute_dtype=torch.float32)
    ours = with_lora(nf4.load_4bit(open_checkpoint(directory), settings, torch.float32, "cpu"), targets)
    pairs = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    name = lambda n: n.removeprefix("base_model.model.").replace(".default", "")
    for n, p in pairs.items():
        p.data.copy_(trained[name(n)])
    with torch.no_grad(), theirs.disable_adapter():
        their_loss = partial(dpo_loss, ref=their_logps(theirs))
    with torch.no_grad(), models.adapters_disabled(ours):
        our_loss = partial(dpo_loss, ref=logps(ours))
    expected, got = their_loss(their_logps(theirs)), our_loss(logps(ours))
    assert abs(got - expected) < 1e-5 * expected and abs(expected - 0.6931) > 1e-3
    got_grads = gradients(ours, got)
    assert len(pairs) == len(got_grads) == 12
    for n, g in zip(pairs, torch.autograd.grad(expected, list(pairs.values()))):
        assert (got_grads[name(n)] - g).norm() < 1e-4 * g.norm(), n


# The golden file


def outcome(packed, absmax, nested_absmax, nested_offset) -> dict:
    """As the file has it: bytes in hexadecimal, floats in full."""
    found = dict(packed=bytes(packed.flatten().tolist()).hex())
    if nested_offset is None:
        return found | dict(absmax=absmax.tolist())
    return found | dict(absmax=bytes(absmax.tolist()).hex(), nested_absmax=nested_absmax.tolist(),
                        nested_offset=nested_offset.item())


def golden_inputs() -> list[dict]:
    torch.manual_seed(7)
    steps = torch.cat([torch.zeros(64), torch.full((64,), -0.3), torch.arange(-8, 9) / 8])
    inputs = [("normal", torch.randn(3, 43), TYPES), ("bfloat16", (torch.randn(2, 64) * 0.02).bfloat16(), TYPES),
              ("steps", steps, TYPES), ("zeros last", torch.cat([torch.ones(64), torch.zeros(9)]), TYPES[::2]),
              ("one block", torch.randn(40), TYPES[1:2]), ("half-way", half_way(), TYPES[::2])]
    cases = [dict(name=f"{name}, {t}{', nested' * nested}", quant_type=t, nested=nested,
                  dtype=nf4.dtype_name(x.dtype), shape=list(x.shape), values=x.flatten().tolist())
             for name, x, ways in inputs for t, nested in ways]
    torch.manual_seed(164)  # scales which one rounding, two roundings and none put into different bins
    scales = (torch.rand(258) + 0.5).tolist()
    return cases + [dict(name="scales, nf4, nested", quant_type="nf4", nested=True, dtype="float32", shape=[258, 64],
                         values=scales)]


def half_way() -> torch.Tensor:
    """Thresholds of both types times an absmax, and the floats below: in a whole block and in an incomplete one."""
    torch.manual_seed(2)  # to divide by this absmax is not to multiply by its reciprocal
    absmax = torch.rand(1) + 0.5
    at = torch.cat([codes.sort().values.unfold(0, 2, 1).mean(1) for codes in (
        torch.tensor(nf4.NF4), torch.tensor(nf4.FP4) / 12)]) * absmax
    block = torch.cat([at, torch.nextafter(at, torch.zeros(1)), absmax])
    return torch.cat([block, torch.zeros(64 - len(block)), block])


ABOUT = """4-bit weights as bitsandbytes gives them: quantize_4bit, with compress_statistics where nested. values: the
flattened input, exact in dtype, in blocks of 64; fewer of them than the shape has are the first of each block, and the
others are 0. packed, and absmax where nested: bytes in hexadecimal; of two values in a byte of packed the
first is the high half. nested_code: the 256 levels of nested absmax. Floats are float32, in full."""


def golden_file() -> dict:
    import bitsandbytes

    functional, cases = bitsandbytes.functional, golden_inputs()
    for case in cases:
        packed, state = functional.quantize_4bit(golden_values(case), quant_type=case["quant_type"],
                                                 compress_statistics=case["nested"])
        case["expected"] = outcome(packed, state.absmax, state.state2 and state.state2.absmax, state.offset)
    return dict(format=1, made_with=f"bitsandbytes {bitsandbytes.__version__}, CPU build",
                about=" ".join(ABOUT.split()), nested_code=functional.create_dynamic_map().tolist(), cases=cases)


if __name__ == "__main__":
    whole = golden_file()
    lines = ",\n ".join(json.dumps(case) for case in whole.pop("cases"))
    GOLDEN.write_text(f'{json.dumps(whole)[:-1]}, "cases": [\n {lines}\n]}}\n')
