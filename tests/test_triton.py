"""The Triton kernels against the plain forms beside them: on a GPU, or on the CPU in Triton's interpreter (see conftest.py)."""

import pytest
import torch

import model as models
from parts import head

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


def test_the_product_that_sums_in_float32_is_called_as_torch_declares_it():
    """It exists on CUDA alone: here its dispatcher says so, where a wrong argument would be a TypeError."""
    a, b, total = torch.zeros(4, 5, dtype=torch.bfloat16), torch.zeros(5, 6, dtype=torch.bfloat16), torch.zeros(4, 6)
    with pytest.raises(NotImplementedError, match="addmm.dtype_out"):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0, out=total)
