"""The layers in C against the plain forms of kernels.py, which test_model.py holds to the formulas."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_model import LLAMA, MIXED, gradients, make, stream

import model as models
from parts import c_layers, head, kernels

pytestmark = pytest.mark.skipif(c_layers.library() is None, reason="no C compiler, or another OpenMP than PyTorch's")
B, F = torch.bfloat16, torch.float32
LIMITS = {B: 2.0**-8, F: 1e-6}  # half a unit in the last place of bfloat16; sums of float32


def draw(*shape, dtype=F):
    return (2 * torch.randn(*shape)).to(dtype)


def wide(x):
    return x.detach().double().requires_grad_(x.requires_grad)


def assert_close(fast, exact):
    """Of the largest entry, or of each entry where that is rounded to bfloat16."""
    for a, b in zip(fast, exact, strict=True):
        bound = LIMITS[a.dtype] * (b.abs() if a.dtype == B else b.abs().max()) + 1e-6 * b.abs().max()
        assert ((a.double() - b).abs() <= bound).all(), (a.double() - b).abs().max()


def assert_as_plain(apply, plain, inputs, dtype):
    """`plain` computes in float64. Values, and gradients of all inputs, of a gradient of the result's type."""
    exact_inputs = [wide(x) for x in inputs]
    fast, exact = apply(*inputs), plain(*exact_inputs)
    assert fast.dtype == dtype
    slope = draw(*fast.shape, dtype=dtype)
    learns = [i for i, x in enumerate(inputs) if x.requires_grad]
    mine = torch.autograd.grad(fast, [inputs[i] for i in learns], slope)
    theirs = torch.autograd.grad(exact, [exact_inputs[i] for i in learns], slope.double())
    assert [g.dtype for g in mine] == [inputs[i].dtype for i in learns]
    assert_close([fast, *mine], [exact, *theirs])


@pytest.mark.parametrize("shape", [(1, 8), (7, 5), (65, 33), (130, 576), (9, 3, 64)], ids=str)
@pytest.mark.parametrize("x_type", [B, F])
def test_rms_norm(shape, x_type):
    torch.manual_seed(0)
    x, w = draw(*shape, dtype=x_type).requires_grad_(), draw(shape[-1]).requires_grad_()
    assert_as_plain(lambda x, w: c_layers.RMSNorm.apply(x, w, 1e-5),
                    lambda x, w: kernels.RMSNorm.apply(x, w, 1e-5, torch.float64), [x, w], B)


@pytest.mark.parametrize("shape", [(1, 8), (7, 5), (65, 33), (9, 3, 64)], ids=str)
def test_swiglu(shape):
    torch.manual_seed(0)
    gate, up = (draw(*shape, dtype=B).requires_grad_() for _ in range(2))
    assert_as_plain(c_layers.SwiGLU.apply, lambda a, b: kernels.SwiGLU.apply(a, b), [gate, up], B)


def test_rotation():
    torch.manual_seed(0)
    x, cos, sin = draw(5, 3, 10, dtype=B).requires_grad_(), draw(5, 1, 10), draw(5, 1, 5).repeat(1, 1, 2)
    assert_as_plain(c_layers.Rotation.apply, lambda x, c, s: kernels.Rotation.apply(x, c, s, False), [x, cos, sin], F)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("rows, vocabulary", [(7, 75), (1, 1), (3, 2500), (0, 8)])
def test_scores_of_the_head(statistics, softcap, rows, vocabulary):
    torch.manual_seed(0)
    logits, targets = draw(rows, vocabulary, dtype=B) * 2, torch.randint(0, vocabulary, (rows,))
    if rows == 7:
        targets[0] = logits[0].argmax()
        logits[1] += 300  # no overflow
    logits = logits if softcap is None else logits.clamp(-29, 29)
    how = head.How(softcap, B, chunk=2**24, keep=8, statistics=statistics)
    exact = logits.double()
    (fast,), slopes = c_layers.score_chunk(mine := logits.clone(), targets, how, slopes=True), mine
    (untouched,) = c_layers.score_chunk(again := logits.clone(), targets, how, slopes=False)
    plain = head.score_chunk(exact, targets, how._replace(compute=torch.float64), slopes=True)
    assert torch.equal(again, logits) and len(fast) == (5 if statistics else 1)
    for a, b, c in zip(fast, [torch.cat(column) for column in zip(*plain)], untouched, strict=True):
        assert torch.equal(a, c) and a.dtype == (b.dtype if b.dtype == torch.bool else F)
        assert ((a.double() - b.double()).abs() <= 2e-6 * (1 + b.double().abs())).all()
    assert_close([slopes], [exact]) if rows else None


def test_rows_that_lie_apart_are_read_where_they_are(monkeypatch):
    """Halves of a fused projection, and a gradient that is no tensor of its own."""
    torch.manual_seed(0)
    both = draw(6, 24, dtype=B)
    gate, up = both.chunk(2, -1)
    assert torch.equal(c_layers.SwiGLU.apply(gate, up), c_layers.SwiGLU.apply(gate.clone(), up.clone()))
    assert torch.equal(c_layers.SwiGLU.apply(gate, up.clone()), c_layers.SwiGLU.apply(gate.clone(), up.clone()))
    w = draw(12).requires_grad_()
    x = gate.clone().requires_grad_()
    assert torch.equal(c_layers.RMSNorm.apply(gate, w, 1e-5), c_layers.RMSNorm.apply(x, w, 1e-5))
    same = torch.autograd.grad(c_layers.RMSNorm.apply(x, w, 1e-5).sum(), (x, w))
    ones = torch.autograd.grad(c_layers.RMSNorm.apply(x, w, 1e-5), (x, w), torch.ones(6, 12, dtype=B))
    assert all(torch.equal(a, b) for a, b in zip(same, ones))
    heads = both.view(6, 4, 6)[:, 1:3]
    cos, sin = draw(6, 1, 6), draw(6, 1, 3).repeat(1, 1, 2)
    assert torch.equal(c_layers.Rotation.apply(heads, cos, sin), c_layers.Rotation.apply(heads.clone(), cos, sin))


def test_numbers_at_the_edges():
    """Not a number stays so; a large gate is itself, a small one 0; ties round to the even bfloat16."""
    gate = torch.tensor([[float("nan"), 2.0**13, -(2.0**13), 90.0, -90.0, 0.0]], dtype=B).requires_grad_()
    out = c_layers.SwiGLU.apply(gate, torch.ones(1, 6, dtype=B))
    assert out[0, 0].isnan() and out[0, 1:].tolist() == pytest.approx([2**13, 0, 90, 0, 0], abs=1e-30)
    slopes = torch.autograd.grad(out, gate, torch.ones(1, 6, dtype=B))[0]
    assert slopes[0, 0].isnan() and slopes[0, 1:].tolist() == pytest.approx([1, 0, 1, 0, 0.5], abs=1e-6)
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, float("nan"), float("inf"), 0, 0, 0, 0]).view(1, 1, 8)
    kept = c_layers.turn("rotation_backward", ties, torch.ones(1, 1, 8), torch.zeros(1, 1, 8), 1.0, B)[0, 0]
    assert torch.equal(kept[:4].nan_to_num(7), ties[0, 0, :4].to(B).nan_to_num(7)) and kept[2].isnan()


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(0)
    x, w, slope = draw(300, 48, dtype=B).requires_grad_(), draw(48).requires_grad_(), draw(300, 48, dtype=B)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y = c_layers.RMSNorm.apply(x, w, 1e-5)
        found.append([y, *torch.autograd.grad(y, (x, w), slope)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_model_takes_them_in_bfloat16_and_is_no_farther_from_float32_than_the_plain_one(monkeypatch):
    """In float32 it takes none: those digits are the same with any compiler."""
    taken = set()
    call, library = c_layers.call, c_layers.library
    monkeypatch.setattr(c_layers, "call", lambda name, *more: taken.add(name) or call(name, *more))
    model, batch = make(LLAMA, F), models.Stream(*stream(MIXED))
    exact = gradients(model, model(batch).logps.sum())
    assert not taken
    off = {}
    for name, found in (("in C", library), ("plain", lambda: None)):
        monkeypatch.setattr(c_layers, "library", found)
        with torch.autocast("cpu", B):
            loss = model(batch).logps.sum()
        off[name] = sum(float((g - exact[n]).norm() / exact[n].norm()) for n, g in gradients(model, loss).items())
    assert taken == {"norm_f", "norm_backward_f", "swiglu", "swiglu_backward", "rotation", "rotation_backward", "score"}
    assert 0 < off["in C"] < 1.2 * off["plain"]


def test_without_a_compiler_nothing_is_compiled(tmp_path):
    """Nor with one that fails; and a home that cannot be written is no error."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom parts import c_layers; print(c_layers.library())"
    for compiler, home in (("no-such-compiler", tmp_path), ("false", tmp_path), ("cc", ROOT / "README.md")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"CC": compiler, "HOME": str(home), "PATH": "/usr/bin:/bin"})
        assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
