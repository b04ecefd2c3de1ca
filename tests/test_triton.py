"""The Triton kernels against the plain forms beside them: on a GPU, or on the CPU in Triton's interpreter (see conftest.py)."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_model import LLAMA, MIXED, assert_same_gradients, gradients, make, stream

import model as models
from parts import head, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_head(monkeypatch):
    """The leaf, taken by the head whatever the device is."""
    pytest.importorskip("triton")
    from parts import triton_head

    monkeypatch.setattr(triton_head, "BLOCK", 32)
    monkeypatch.setattr(head, "has_triton", lambda device: True)
    return triton_head


def logits_and_targets(dtype, rows=7, vocabulary=75):
    torch.manual_seed(0)
    logits = (4 * torch.randn(rows, vocabulary)).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[0] = logits[0].argmax()
    logits[1] += 300  # no overflow
    return logits.to(DEVICE), targets.to(DEVICE)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.float16, 1e-3)])
def test_the_kernel_equals_the_plain_scores_and_slopes(triton_head, monkeypatch, dtype, limit, statistics, softcap):
    how = head.How(softcap, dtype, chunk=2**24, keep=8, statistics=statistics)
    logits, targets = logits_and_targets(dtype)
    logits = logits if softcap is None else logits.clamp(-29, 29)
    (fast,), slopes = triton_head.score_chunk(mine := logits.clone(), targets, how, slopes=True), mine
    (untouched,) = triton_head.score_chunk(again := logits.clone(), targets, how, slopes=False)
    monkeypatch.undo()
    (plain,) = head.score_chunk(expected := logits.clone(), targets, how, slopes=True)
    assert len(fast) == len(plain) == (5 if statistics else 1)
    for a, b, c in zip(fast, plain, untouched, strict=True):
        assert a.dtype == b.dtype and (a.double() - b.double()).abs().max() <= limit and torch.equal(a, c)
    assert (slopes.double() - expected.double()).abs().max() <= limit and slopes.abs().max() > 0.5
    assert torch.equal(again, logits)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("keep", [8, 1])
def test_the_head_through_the_kernel_has_the_plain_heads_gradients(triton_head, monkeypatch, keep, learns):
    torch.manual_seed(0)
    x, w, slope = (torch.randn(*shape, dtype=torch.float64).to(DEVICE) for shape in ((50, 8), (61, 8), (50,)))
    targets = torch.randint(0, 61, (50,)).to(DEVICE)
    x.requires_grad_(), w.requires_grad_(learns)
    leaves = [x, w] if learns else [x]
    monkeypatch.setattr(models, "HEAD_CHUNK", 20 * 61)

    def found():
        out = models.token_logps([(x, w)], targets, 2.0, keep)
        return [*out[:5], *torch.autograd.grad((out.logps * slope).sum(), leaves)]

    fast = found()
    monkeypatch.setattr(head, "has_triton", lambda device: False)
    for a, b in zip(fast, found(), strict=True):
        assert (a.double() - b.double()).abs().max() < 1e-11


def test_no_row_needs_no_kernel(triton_head):
    out = models.token_logps([(torch.zeros(0, 8).to(DEVICE), torch.zeros(61, 8).to(DEVICE))], torch.zeros(0, dtype=torch.long).to(DEVICE))
    assert [len(column) for column in out[:5]] == [0] * 5


@pytest.mark.parametrize("first", [True, False])
def test_the_product_that_sums_in_float32_is_called_as_torch_declares_it(first, monkeypatch):
    """It exists on CUDA alone: here its dispatcher says so, where a wrong argument would be a TypeError."""
    a, b, total = torch.zeros(4, 5, dtype=torch.bfloat16), torch.zeros(5, 6, dtype=torch.bfloat16), torch.zeros(4, 6)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(NotImplementedError, match="addmm.dtype_out"):
        head.add_product(total, a, b, first)


@pytest.fixture
def triton_layers(monkeypatch):
    pytest.importorskip("triton")
    from parts import triton_layers

    monkeypatch.setattr(triton_layers, "TILE", 32)
    monkeypatch.setattr(triton_layers, "PROGRAMS", 3)
    monkeypatch.setattr(kernels, "has_triton", lambda device: True)
    return triton_layers


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def assert_as_plain(fast, plain, inputs, limit):
    """Value, and gradients of a random sum, of what is computed in the inputs' types; relative to the largest."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    expected = plain(*exact)
    slope = drawn(*expected.shape)
    found = fast(*inputs)
    assert found.shape == expected.shape and found.dtype == inputs[0].dtype
    given = torch.autograd.grad(found, [x for x in inputs if x.requires_grad], slope.to(found.dtype))
    wanted = torch.autograd.grad(expected, [x for x in exact if x.requires_grad], slope.to(found.dtype).double())
    for a, b in zip((found, *given), (expected, *wanted), strict=True):
        assert (a.double() - b).abs().max() <= limit * b.abs().max(), (a, b)


# to the nearest, 1/256; Triton's interpreter rounds bfloat16 towards zero, 1/128
TYPES = [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 0.004 if DEVICE == "cuda" else 0.008)]


@pytest.mark.parametrize("dtype, limit", TYPES)
@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 10), (3, 70)])
def test_the_norm_kernels_equal_the_plain_norm(triton_layers, shape, dtype, limit):
    """Rows of an uneven size, several in a tile or one, also rows that lie apart; the weight is float32 beside a 16-bit x."""
    torch.manual_seed(0)
    x, weight = drawn(*shape, dtype=dtype).requires_grad_(), drawn(shape[-1]).to(torch.promote_types(dtype, torch.float32))
    weight.requires_grad_()
    fast = lambda x, w: kernels.rms_norm(x, w, 1e-5, x.dtype)
    plain = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
    assert_as_plain(fast, plain, (x, weight), limit)
    apart = torch.cat([x, x], -1).detach().requires_grad_()
    cut = lambda norm: lambda x, w: norm(x[..., : shape[-1]], w)
    assert_as_plain(cut(fast), cut(plain), (apart, weight.detach()), limit)


@pytest.mark.parametrize("dtype, limit", TYPES)
@pytest.mark.parametrize("fused", [False, True])
def test_the_swiglu_kernels_equal_the_plain_product(triton_layers, fused, dtype, limit):
    torch.manual_seed(0)
    plain = lambda gate, up: F.silu(gate) * up
    if fused:
        halves = lambda product: lambda x: product(*x.chunk(2, -1))
        assert_as_plain(halves(kernels.swiglu), halves(plain), (3 * drawn(5, 2 * 11, dtype=dtype).requires_grad_(),), limit)
    else:
        assert_as_plain(kernels.swiglu, plain, (3 * drawn(3, 1030, dtype=dtype).requires_grad_(), drawn(3, 1030, dtype=dtype).requires_grad_()), limit)


@pytest.mark.parametrize("dtype, limit", TYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_rotation_kernel_turns_as_the_plain_form_and_its_gradient_back(triton_layers, interleaved, dtype, limit):
    """The first 6 of 8 dims, of 3 heads; tables wider than x, as under autocast."""
    torch.manual_seed(0)
    rope = models.Rope((1.0, 0.1, 0.02))
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = (t.to(DEVICE) for t in models.rotary_tables({"": rope}, torch.arange(5), wide)[""][:2])

    def plain(x):
        a, b = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
        turned = torch.cat([a, b], -1) * cos.double() + torch.cat([-b, a], -1) * sin.double()
        return torch.cat([turned, x[..., 6:]], -1)

    assert_as_plain(lambda x: models.rotate(x, cos, sin, interleaved), plain, (drawn(5, 3, 8, dtype=dtype).requires_grad_(),), limit)


MODELS = {
    "llama": LLAMA,
    "phi3": LLAMA | dict(model_type="phi3", original_max_position_embeddings=256, pad_token_id=0),
    "gemma3": LLAMA | dict(model_type="gemma3_text", head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
    "pythia": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | dict(model_type="gpt_neox", layer_norm_eps=1e-5, rotary_pct=0.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_through_the_kernels_has_the_plain_models_gradients(triton_layers, triton_head, name, monkeypatch):
    """In float64: fused projections, norms of heads with an offset, a partial rotation."""
    monkeypatch.setattr(triton_layers, "TILE", 512)
    model = make(MODELS[name]).to(DEVICE)
    parts = [part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in stream(MIXED, True)]
    launched = []
    monkeypatch.setattr(triton_layers, "launch", lambda kernel, *a, launch=triton_layers.launch, **k: launched.append(kernel) or launch(kernel, *a, **k))
    fast = model(models.Stream(*parts)).logps
    found = gradients(model, fast.sum())
    used = {kernel.fn.__name__ for kernel in launched}
    monkeypatch.undo()
    plain = model(models.Stream(*parts)).logps
    assert (fast - plain).abs().max() < 1e-10
    assert_same_gradients(found, gradients(model, plain.sum()), 1e-10)
    others = {"norm_kernel", "norm_grad_kernel", "swiglu_kernel", "swiglu_grad_kernel"}  # pythia has LayerNorm and no gate
    assert used == {"rotation_kernel"} | (set() if name == "pythia" else others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("quant_type, nested", [("nf4", False), ("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("shape", [(3, 128), (5, 13)])
def test_four_bits_made_wide_by_the_kernel_are_those_of_the_plain_form_bit_for_bit(monkeypatch, shape, quant_type, nested, dtype):
    """An incomplete last block too, and an odd number of values. Not bfloat16 here, which Triton's interpreter truncates."""
    pytest.importorskip("triton")
    from extras.models import nf4, triton_nf4

    monkeypatch.setattr(triton_nf4, "BLOCK", 64)
    torch.manual_seed(0)
    state = nf4.on_device(nf4.quantize(torch.randn(shape), quant_type, nested=nested), DEVICE)
    monkeypatch.setattr(nf4, "takes_triton", lambda device: False)
    plain = nf4.dequantize(state, dtype)
    monkeypatch.setattr(nf4, "takes_triton", lambda device: True)
    fast = nf4.dequantize(state, dtype)
    assert fast.dtype == dtype and fast.shape == plain.shape == shape and torch.equal(fast, plain)


COMPILES = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

class Compiler:
    "In place of a kernel: compiles it for what it is called with."
    def __init__(self, kernel):
        self.kernel, self.done = kernel, set()
    def __getitem__(self, grid):
        return self
    def __call__(self, *args, num_warps=4, **constants):
        names = {torch.bool: "*i1", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float16: "*fp16",
                 torch.bfloat16: "*bf16", torch.float32: "*fp32"}
        kinds = [names[a.dtype] if isinstance(a, torch.Tensor) else "fp32" if isinstance(a, float) else "i32" for a in args]
        key = (*kinds, *constants.items())
        if key not in self.done:
            self.done.add(key)
            signature = dict(zip(self.kernel.arg_names, kinds)) | dict.fromkeys(constants, "constexpr")
            for capability in (80, 90):
                made = triton.compile(ASTSource(self.kernel, signature, constants), target=GPUTarget("cuda", capability, 32),
                                      options={"num_warps": num_warps})
                assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024, made.metadata

import model as models
from extras.models import nf4, triton_nf4
from parts import head, kernels, triton_head, triton_layers
from test_model import MIXED, make, stream
from test_triton import MODELS
compilers = []
for module in (triton_head, triton_layers, triton_nf4):
    for name in [n for n in vars(module) if n.endswith("_kernel")]:
        compilers.append(Compiler(getattr(module, name)))
        setattr(module, name, compilers[-1])
head.has_triton = kernels.has_triton = lambda device: True
for name in ("llama", "phi3"):
    for dtype in (torch.bfloat16, torch.float32):
        model = make(MODELS[name]).to(dtype)
        model(models.Stream(*stream(MIXED, True))).logps.sum().backward()
wide = torch.randn(4, 8192, dtype=torch.bfloat16, requires_grad=True)
kernels.rms_norm(wide, torch.ones(8192, requires_grad=True), 1e-5, wide.dtype).sum().backward()
nf4.takes_triton = lambda device: True
for dtype in (torch.bfloat16, torch.float32):
    nf4.dequantize(nf4.quantize(torch.randn(5, 64)), dtype)
assert all(compiler.done for compiler in compilers), [c.kernel for c in compilers if not c.done]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_every_kernel_compiles_for_an_a100_and_an_h100(tmp_path):
    """To machine code, by Triton and the assembler that it brings; that needs no GPU. The interpreter takes what they refuse."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import os, conftest; os.environ.pop('TRITON_INTERPRET', None)\n" + COMPILES
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
