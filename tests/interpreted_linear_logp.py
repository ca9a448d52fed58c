"""The Triton kernels of linear_logp against float64. tests/test_kernels.py runs this file."""

import mmap

import pytest
import torch
from conftest import close_to_truth

from ddpo import reference, tune
from ddpo.kernels import linear_logp as kernels
from ddpo.ops import linear_logp
from ddpo.ops import triton as backend
from ddpo.ops.implementation import Call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = [(1, 1, 1), (2, 3, 31), (17, 16, 64), (35, 19, 131)]
paths = pytest.mark.parametrize("path", [backend.Path("chunked"), backend.Path("fused")], ids=lambda p: p.path)


INTERPRETER_ULPS = {
    BF16: 1,
    F32: 6,
}  # it truncates to bfloat16; NumPy's exp and log err by up to 3 units, PyTorch's 0.6


def close(ours, same_dtype, truth):
    """close_to_truth; what the interpreter's own arithmetic errs by is granted on top."""
    ours, same_dtype, truth = ours.cpu(), same_dtype.cpu(), truth.cpu()
    if DEVICE == "cpu" and ours.dtype in INTERPRETER_ULPS:
        granted = INTERPRETER_ULPS[ours.dtype] * torch.finfo(ours.dtype).eps * truth.abs().max()
        ours = ours.float() + (truth - ours.double()).clamp(-granted, granted).float()
    close_to_truth(ours, same_dtype, truth)


def case(N, D, V, dtype, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*s, generator=g).to(DEVICE, dtype) for s in ((N, D), (V, D), (V,))]
    tensors[2] = tensors[2] if bias else None
    targets = torch.randint(0, V, (N + 1,), generator=g).to(DEVICE)[1:]  # not 16-byte aligned
    return tensors, targets, torch.randn(N, generator=g).to(DEVICE)


def run(path, tensors, targets, upstream, wants, scale=0.7, softcap=None):
    """logp and the gradients wanted, asked for as linear_logp's autograd.Function does."""
    hidden, head, bias = tensors
    call = Call(hidden, head, targets, bias, scale, softcap, None, 0.0)
    logp, saved = path.forward(call, wants)
    fakes = path.fake(call, wants)
    assert saved[0].shape == fakes[1][0].shape and saved[0].dtype == fakes[1][0].dtype and logp.shape == fakes[0].shape
    if wants == (True, False, False) and path.path == "chunked":
        call = call._replace(hidden=None, head=None, bias=None)  # the rows are enough
    return [logp, *(g for g in path.backward(call, saved, upstream, wants) if g is not None)]


def plain(tensors, targets, upstream, wants, dtype, scale=0.7, softcap=None):
    """The same from the reference, in dtype."""
    tensors = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in tensors]
    logp = reference.linear_logp(*tensors[:2], targets, tensors[2], scale, softcap)
    inputs = [x for x, want in zip(tensors, wants, strict=True) if want]
    return [logp.detach(), *torch.autograd.grad(logp, inputs, upstream.to(logp.dtype))]


def compare(path, tensors, targets, upstream, wants, **options):
    ours = run(path, tensors, targets, upstream, wants, **options)
    truth = plain(tensors, targets, upstream, wants, F64, **options)
    same = plain(tensors, targets, upstream, wants, tensors[0].dtype, **options)
    same[0] = plain(tensors, targets, upstream, wants, F32, **options)[0]  # logits are float32 whatever the input
    assert ours[0].dtype == F32
    for o, s, t in zip(ours, same, truth, strict=True):
        close(o, s, t)
    return ours


@paths
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_logp(path, dtype, trained, softcap, shape):
    compare(path, *case(*shape, dtype), (True, trained, trained), softcap=softcap)


@paths
def test_without_bias_and_one_gradient_at_a_time(path):
    tensors, targets, upstream = case(18, 8, 70, F32, bias=False)
    for wants in ((True, True, False), (False, True, False)):
        compare(path, tensors, targets, upstream, wants)
    tensors, targets, upstream = case(18, 8, 70, F32)
    compare(path, tensors, targets, upstream, (False, False, True))


@paths
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_many_chunks_and_panels(path, trained, monkeypatch):
    monkeypatch.setattr(kernels, "PANEL_BYTES", 4 * 36 * 70)
    path = path._replace(chunk_mib=4 * 192 * 5 / 2**20)
    tensors, targets, upstream = case(36, 10, 150, F32)
    sizes = [chunk.stop - chunk.start for chunk, _, _ in path.buffers(*tensors[:2])]
    assert sizes == [5, 5, 5, 5, 5, 5, 6]  # never a single row at the end
    assert kernels.panel_size(36, 150, 4, 64, 4 * 192 * 5) == 64  # trained: by columns
    assert DEVICE == "cuda" or kernels.panel_size(36, 150, 4, 32, kernels.PANEL_BYTES) == 64  # panels of 64, 64 and 22
    ours = compare(path, tensors, targets, upstream, (True, trained, trained))
    again = run(path, tensors, targets, upstream, (True, trained, trained))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@paths
def test_empty(path):
    tensors, targets, upstream = case(0, 4, 9, F32)
    logp, dh, dw, db = run(path, tensors, targets, upstream, (True, True, True))
    assert logp.shape == (0,) and dh.shape == (0, 4) and not dw.any() and not db.any()
    assert run(path, tensors, targets, upstream, (True, False, False))[1].shape == (0, 4)


@paths
def test_a_target_outside_the_vocabulary_is_loud(path):
    tensors, targets, upstream = case(3, 4, 9, F32)
    targets = torch.tensor([-100, 4, 9], device=DEVICE)
    logp = run(path, tensors, targets, upstream, (True, False, False))[0]
    assert logp.isnan().tolist() == [True, False, True]


@paths
def test_impossible_and_broken_logits(path):
    """A logit of -inf has no probability and no gradient; one that is not a number breaks its rows."""
    (hidden, head, bias), targets, upstream = case(6, 5, 200, F32)
    targets %= 60
    bias[64:180] = -torch.inf  # whole tiles of them
    ours = run(path, (hidden, head, bias), targets, upstream, (True, False, False), scale=1.0)
    keep = torch.cat([torch.arange(64), torch.arange(180, 200)])
    truth = plain((hidden, head[keep], bias[keep]), targets, upstream, (True, False, False), F64, scale=1.0)
    for o, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(o.double(), t, rtol=1e-5, atol=1e-5)
    head[199] = torch.nan
    assert run(path, (hidden, head, bias), targets, upstream, (True, False, False))[0].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
def test_slopes_in_place_over_many_blocks(dtype, softcap):
    """dz overwrites the logits that it is made from, block by block; with the log-sum-exp known or not."""
    V = 9001
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, V, generator=g) * 3
    targets, upstream = torch.tensor([0, 8999]), torch.tensor([0.3, -2.0])
    zd = z.double().requires_grad_()
    capped = 0.7 * zd if softcap is None else softcap * torch.tanh(0.7 * zd / softcap)
    truth = torch.log_softmax(capped, 1).gather(1, targets[:, None])[:, 0]
    logp, lse = torch.full((2, 2), torch.nan, device=DEVICE)
    for g in (None, upstream):
        (grad,) = torch.autograd.grad(truth, zd, torch.ones(2).double() if g is None else g.double(), retain_graph=True)
        buffer = torch.full((2, 9024), torch.nan, device=DEVICE)
        buffer[:, :V] = z
        device_g = None if g is None else g.to(DEVICE)
        dz = kernels.slopes(buffer, V, dtype, targets.to(DEVICE), None, 0.7, softcap, logp, lse, device_g)
        assert dz.dtype == dtype and dz.data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(dz.double().cpu(), grad, rtol=1e-5 if dtype == F32 else 2**-7, atol=1e-9)
    torch.testing.assert_close(logp.double().cpu(), truth.detach(), rtol=1e-6, atol=1e-6)


def spread_out(x, stride=2**22):
    """x (N, D) with its rows 2^22 apart: from row 512 on, 32 bits would not hold an offset. The memory is never touched
    elsewhere, and x lies in its middle: an offset that wraps still lies in it."""
    N, size = len(x), 2 * len(x) * stride
    if DEVICE == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux' MAP_NORESERVE, unnamed before Python 3.13
        memory = torch.frombuffer(mmap.mmap(-1, size * x.itemsize, flags), dtype=x.dtype)
    else:
        memory = torch.zeros(size, dtype=x.dtype, device=DEVICE)
    far = memory.as_strided(x.shape, (stride, 1), N * stride)
    return far.copy_(x)


def test_offsets_past_2_31_in_the_row_pass():
    (hidden, head, _), targets, _ = case(515, 3, 20, F32)
    found = []
    for move in (torch.clone, spread_out):
        z = move(hidden @ head.T)
        logp, lse = (torch.full((515,), torch.nan, device=DEVICE) for _ in range(2))
        found.append((kernels.slopes(z, 20, F32, targets, None, 1.0, None, logp, lse).clone(), logp, lse))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_offsets_past_2_31():
    N, D, V = 515, 3, 20
    (hidden, head, bias), targets, upstream = case(N, D, V, BF16)
    far = spread_out(hidden)
    logp, lse = kernels.fwd(far, head, targets, bias, 1.0, None)
    truth = reference.linear_logp(hidden.double(), head.double(), targets, bias.double())
    torch.testing.assert_close(logp.double(), truth, rtol=1e-4, atol=1e-4)
    near = kernels.bwd(hidden, head, targets, bias, 1.0, None, lse, upstream, (True, True, False))
    distant = kernels.bwd(far, head, targets, bias, 1.0, None, lse, upstream, (True, True, False))
    assert torch.equal(near[0], distant[0]) and torch.equal(near[1], distant[1])


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("impl", ["triton", "triton-chunked", "triton-fused"])
def test_the_public_op(impl, trained):
    """The kernels behind linear_logp: as the reference, and one node without a break under torch.compile."""
    (hidden, head, _), targets, upstream = case(17, 16, 64, F32)

    def f(h, w):
        return linear_logp(torch.tanh(h), w, targets, impl=impl) * upstream

    def truth(h, w):
        return reference.linear_logp(torch.tanh(h), w, targets) * upstream

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager"), truth):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(trained)
        out = g(h, w)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), (h, w) if trained else (h,))))
    eager, compiled, spec = results
    for a, b, c in zip(eager, compiled, spec, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_every_choice_of_tune_runs(trained):
    (hidden, head, _), targets, _ = case(17, 16, 64, F32)
    for choice in tune.CHOICES:
        tune.run(Call(hidden, head, targets, None, 1.0, None, None, 0.0), choice, trained)
