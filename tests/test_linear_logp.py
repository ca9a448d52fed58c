"""linear_logp against the float64 reference, and the traps that broke its peers."""

import itertools
import sys

import pytest
import torch
from conftest import DTYPES, case, close_to_truth, gradients, impls, in_opmath, need_cpp, relative

from ddpo import reference
from ddpo.ops import chunked, cpp, linear_logp, sequence_sum


@impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("N, D, V", [(1, 1, 1), (5, 3, 31), (33, 16, 1000), (64, 32, 5003), (1030, 7, 5003)], ids=str)
def test_matches_reference(impl, dtype, trained, softcap, N, D, V):
    tensors, targets, upstream = case(N, D, V, dtype)
    common = {"scale": 0.7, "softcap": softcap}
    ours = gradients(linear_logp, tensors, targets, upstream, dtype, trained, **common, impl=impl)
    plain = gradients(in_opmath, tensors, targets, upstream, dtype, trained, **common)
    truth = gradients(reference.linear_logp, tensors, targets, upstream, torch.float64, trained, **common)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for o, p, t in zip(ours, plain, truth, strict=True):
        close_to_truth(o, p, t)


def test_chunks_do_not_matter(monkeypatch):
    """Many chunks, the last one ragged, agree with one chunk; no chunk is a single row."""
    tensors, targets, upstream = case(101, 8, 300, torch.float64)
    whole = gradients(linear_logp, tensors, targets, upstream, torch.float64, True, impl="torch")
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 300 * 8 * 10)
    sizes = [c.stop - c.start for c in chunked.chunks(101, tensors[1])]
    assert len(sizes) == 10 and min(sizes) >= 2 and sum(sizes) == 101
    for a, b in zip(
        gradients(linear_logp, tensors, targets, upstream, torch.float64, True, impl="torch"), whole, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@impls
def test_empty(impl):
    (hidden, head, _), targets, _ = case(0, 4, 9, torch.float32)
    logp = linear_logp(hidden.requires_grad_(), head, targets, impl=impl)
    logp.sum().backward()
    assert logp.shape == (0,) and hidden.grad.shape == (0, 4)


@impls
def test_bitwise_reruns_and_threads(impl):
    tensors, targets, upstream = case(40, 16, 2001, torch.float32)
    first = gradients(linear_logp, tensors, targets, upstream, torch.float32, True, impl=impl)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = gradients(linear_logp, tensors, targets, upstream, torch.float32, True, impl=impl)
    finally:
        torch.set_num_threads(before)
    rerun = gradients(linear_logp, tensors, targets, upstream, torch.float32, True, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(first, rerun, strict=True))
    assert torch.equal(first[0], again[0])


def test_frozen_head_keeps_nothing_of_size_v():
    """Deferred scale: what autograd keeps beside the targets is the rows' gradient, (N, D)."""
    (hidden, head, _), targets, _ = case(64, 8, 4096, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        linear_logp(hidden.requires_grad_(), head, targets)
    assert saved == [(64,), (64, 8)]


def test_no_gradient_wanted_forms_no_rows(monkeypatch):
    (hidden, head, _), targets, _ = case(64, 8, 4096, torch.float32)
    asked, forward = [], chunked.forward
    monkeypatch.setattr(chunked, "forward", lambda call, wants: asked.append(wants) or forward(call, wants))
    with torch.no_grad():
        assert not linear_logp(hidden.requires_grad_(), head, targets, impl="torch").requires_grad
    linear_logp(hidden, head, targets, impl="torch")
    assert asked == [(False, False, False), (True, False, False)]


@impls
@pytest.mark.parametrize("drop_below", [0.0, 1e-12])
@pytest.mark.parametrize("wants", [w for w in itertools.product((False, True), repeat=3) if any(w)], ids=str)
def test_any_gradients(impl, drop_below, wants):
    """Of whatever is wanted, twice over one graph with different upstreams, of inputs that are not contiguous."""
    if drop_below and impl == "torch":
        pytest.skip("drop_below is impl cpp's")
    (hidden, head, bias), targets, upstream = case(40, 8, 1030, torch.float64)
    spec, ours = (
        [x.clone().requires_grad_(want) for x, want in zip((hidden, head, bias), wants, strict=True)] for _ in range(2)
    )

    def inputs(h, w, b):
        return h.T.contiguous().T, w.T.contiguous().T, targets, b

    h, w, y, b = inputs(*spec)
    truth = reference.linear_logp(h, w, y, b)
    h, w, y, b = inputs(*ours)
    logp = linear_logp(h, w, y, bias=b, impl=impl, drop_below=drop_below)
    for c in (upstream.double(), torch.ones(1, dtype=torch.float64).expand(40)):
        found, wanted = (
            torch.autograd.grad(out, [x for x in leaves if x.requires_grad], c, retain_graph=True)
            for out, leaves in ((logp, ours), (truth, spec))
        )
        for a, b in zip(found, wanted, strict=True):
            assert relative(a, b) < 1e-10


@impls
def test_strided_targets(impl):
    (hidden, head, _), _, _ = case(5, 4, 9, torch.float32)
    targets = torch.randint(0, 9, (5, 2))[:, 0]
    torch.testing.assert_close(
        linear_logp(hidden, head, targets, impl=impl), reference.linear_logp(hidden, head, targets)
    )


@impls
def test_values_at_the_edges(impl):
    """Huge logits, a certain target, targets first and last in the vocabulary, log-probs near 0 with all digits."""
    head = torch.eye(50)[:, :5] * 1000
    hidden = torch.eye(5) * 10
    targets = torch.tensor([9, 0, 4, 2, 3, 49])[1:]  # not 16-byte aligned
    truth = reference.linear_logp(hidden.double(), head.double(), targets)
    assert truth.min() == -10000 and truth.max() == 0
    torch.testing.assert_close(linear_logp(hidden, head, targets, impl=impl).double(), truth, rtol=1e-6, atol=0)
    near = torch.full((1, 1), 1000.0)
    head = torch.cat([torch.ones(1, 1), torch.full((40, 1), 0.9905)])
    truth = reference.linear_logp(near.double(), head.double(), torch.tensor([0]))
    torch.testing.assert_close(linear_logp(near, head, torch.tensor([0]), impl=impl).double(), truth, rtol=1e-3, atol=0)


@impls
@pytest.mark.parametrize("options", [{}, {"drop_below": 1e-4}], ids=str)
def test_impossible_and_broken_logits(impl, options):
    """A logit of -inf has no probability and no gradient; one that is not a number breaks its rows, never silently."""
    if options and impl == "torch":
        pytest.skip("drop_below is impl cpp's")
    (hidden, head, bias), targets, upstream = case(20, 8, 3000, torch.float32)
    targets = targets % 1000
    bias[1500:1510] = -torch.inf
    h = hidden.clone().requires_grad_()
    logp = linear_logp(h, head, targets, bias=bias, impl=impl, **options)
    (grad,) = torch.autograd.grad(logp, h, upstream)
    keep = torch.cat([torch.arange(1500), torch.arange(1510, 3000)])
    plain = hidden.double().requires_grad_()
    truth = reference.linear_logp(plain, head.double()[keep], targets, bias.double()[keep])
    torch.testing.assert_close(logp.double(), truth, rtol=1e-5, atol=1e-5)
    assert relative(grad, torch.autograd.grad(truth, plain, upstream.double())[0]) < (0.1 if options else 1e-5)
    for row in (0, 2990):
        broken = head.clone()
        broken[row] = torch.nan
        assert linear_logp(hidden.requires_grad_(), broken, targets + 1, impl=impl, **options).isnan().all()


@pytest.mark.parametrize("options", [{}, pytest.param({"drop_below": 1e-5}, marks=need_cpp)], ids=str)
def test_autocast(options):
    (hidden, head, _), targets, upstream = case(12, 16, 100, torch.float32)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logp = linear_logp(hidden, head, targets, **options)
    (grad,) = torch.autograd.grad(logp, hidden, upstream)
    plain = (hidden.detach(), head, torch.zeros(100))
    truth = gradients(reference.linear_logp, plain, targets, upstream, torch.float64, False)
    assert logp.dtype == torch.float32 and relative(logp.detach(), truth[0]) < 1e-2 and relative(grad, truth[1]) < 2e-2


@impls
@pytest.mark.parametrize("drop_below", [0.0, 2**-10])
def test_head_gradient_of_bfloat16_is_summed_in_float32(impl, drop_below):
    """2,000 equal terms: a bfloat16 sum would stand still after some 256 of them."""
    if drop_below and impl == "torch":
        pytest.skip("drop_below is impl cpp's")
    (hidden, head, _), _, _ = case(1, 16, 300, torch.bfloat16)
    hidden, targets = hidden.expand(2000, 16).contiguous(), torch.full((2000,), 7)
    grads = []
    for dtype, f, options in (
        (torch.bfloat16, linear_logp, {"impl": impl, "drop_below": drop_below}),
        (torch.float64, reference.linear_logp, {}),
    ):
        w = head.to(dtype, copy=True).requires_grad_()
        grads += torch.autograd.grad(f(hidden.to(dtype), w, targets, **options).sum(), w)
    assert relative(*grads) < 4e-3


def test_float16_head_on_a_cpu():
    (hidden, head, _), targets, _ = case(6, 16, 100, torch.float16)
    truth = reference.linear_logp(hidden.double(), head.double(), targets)
    torch.testing.assert_close(linear_logp(hidden, head, targets).double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(3, 4, 1)}, r"hidden must be floating point \(N, D\), got torch.float32 \(3, 4, 1\)"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, "hidden must be floating point"),
        ({"head": torch.zeros(7, 5)}, r"head must be torch.float32 \(V, 4\) with V >= 1, got torch.float32 \(7, 5\)"),
        ({"head": torch.zeros(7, 4, dtype=torch.float64)}, "head must be torch.float32"),
        (
            {"targets": torch.zeros(2, dtype=torch.int64)},
            r"must be int64 \(N,\) = \(3,\), got torch.int64 \(2,\)",
        ),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.tensor([0, -100, 1])}, r"must lie in \[0, V\) = \[0, 7\), got -100 to 1"),
        ({"targets": torch.tensor([0, 7, 1])}, r"targets must lie in"),
        ({"bias": torch.zeros(4)}, r"bias must be torch.float32 \(V,\) = \(7,\)"),
        ({"softcap": 0.0}, "softcap must be positive or None, got 0.0"),
        ({"scale": -1.0}, "scale must be positive, got -1.0"),
        ({"impl": "cuda"}, "impl must be 'auto' or one of torch, cpp, triton, .* got 'cuda'"),
    ],
)
def test_bad_input(change, message):
    good = {"hidden": torch.zeros(3, 4), "head": torch.zeros(7, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logp(**{**good, **change})


def test_cpp_missing_is_said(monkeypatch):
    monkeypatch.setattr(cpp, "is_built", False)
    (hidden, head, _), targets, _ = case(2, 4, 9, torch.float32)
    linear_logp(hidden, head, targets)  # auto goes on in PyTorch
    with pytest.raises(RuntimeError, match=r"was not built.*DDPO_BUILD_CPP=1"):
        linear_logp(hidden, head, targets, impl="cpp")


@need_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    (hidden, head, bias), targets, upstream = case(5, 8, 40, dtype)
    call = (hidden, head, targets, bias, 0.7, 3.0)
    torch.library.opcheck(torch.ops.ddpo.linear_logp_fwd.default, (*call, True))
    torch.library.opcheck(torch.ops.ddpo.linear_logp_fwd.default, (*call, False))
    segments = torch.tensor([0, 2, 5])
    for trained in (False, True):
        torch.library.opcheck(torch.ops.ddpo.linear_logp_sparse_fwd.default, (*call, segments, 0.01, trained))
    _, _, *kept, _ = torch.ops.ddpo.linear_logp_sparse_fwd(*call, segments, 0.01, True)
    sparse = (hidden, targets, segments, upstream.to(kept[0]), 0.7, *kept, True, True)
    torch.library.opcheck(torch.ops.ddpo.linear_logp_sparse_bwd.default, sparse)
    _, lse, _ = torch.ops.ddpo.linear_logp_fwd(*call, False)
    torch.library.opcheck(torch.ops.ddpo.linear_logp_bwd.default, (*call, lse, upstream.to(lse), True, True, True))
    with pytest.raises(RuntimeError, match=r"lse and upstream must be \(N,\) = \(5,\)"):
        torch.ops.ddpo.linear_logp_bwd(*call, lse[:1], upstream.to(lse), True, True, True)
    with pytest.raises(RuntimeError, match="segments must be contiguous int64"):
        torch.ops.ddpo.linear_logp_sparse_fwd(*call, torch.tensor([3, 5]), 0.01, False)
    with pytest.raises(RuntimeError, match=r"targets must be a contiguous int64 \(5,\)"):
        torch.ops.ddpo.linear_logp_fwd(hidden, head, targets.int(), None, 1.0, None, False)
    with pytest.raises(RuntimeError, match=r"targets must lie in \[0, 40\), got 40"):
        torch.ops.ddpo.linear_logp_fwd(hidden, head, torch.full((5,), 40), None, 1.0, None, False)


@impls
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_opcheck_of_the_whole(impl, trained):
    (hidden, head, bias), targets, _ = case(20, 8, 40, torch.float32)
    inputs = [hidden.requires_grad_(), head.requires_grad_(trained), targets, bias.requires_grad_(trained)]
    wants = [True, trained, trained]
    torch.library.opcheck(torch.ops.ddpo.linear_logp.default, (*inputs, 0.7, 3.0, None, 0.0, impl, wants))
    logp = linear_logp(hidden, head, targets, impl=impl)
    (grad,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula was registered|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "options",
    [{"impl": "torch"}, *(pytest.param({"impl": "cpp", "drop_below": d}, marks=need_cpp) for d in (0.0, 1e-3))],
)
def test_compiles_without_a_break(options, trained):
    """Under torch.compile of what is around it, the same values and gradients, and no graph break."""
    (hidden, head, _), targets, upstream = case(40, 16, 300, torch.float32)
    segments = torch.tensor([0, 20, 40])

    def f(h, w):  # transposed: inductor holds the layout of what comes back against what was announced
        h, w = torch.tanh(h.T.contiguous().T), (w.T * 1).T
        return linear_logp(h, w, targets, segments=segments, **options) * upstream

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="inductor")):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(trained)
        out = g(h, w)
        results.append((out, *torch.autograd.grad(out.sum(), (h, w) if trained else (h,))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@need_cpp
def test_threads_are_in_use():
    """The extension was built with OpenMP: without it at::parallel_for would run on one core."""
    import ddpo._C

    with open(ddpo._C.__file__, "rb") as library:
        assert b"GOMP_parallel" in library.read() or sys.platform != "linux"


def test_sequence_sum():
    values = torch.arange(6.0, requires_grad=True)
    out = sequence_sum(values, torch.tensor([0, 2, 2, 6]))
    assert out.tolist() == [1.0, 0.0, 14.0]
    out.backward(torch.tensor([1.0, 5.0, 2.0]))
    assert values.grad.tolist() == [1, 1, 2, 2, 2, 2]
    assert sequence_sum(values[:0], torch.tensor([0])).shape == (0,)
    with pytest.raises(ValueError, match="row offsets"):
        sequence_sum(values, torch.tensor([0, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"segments must rise from 0 to N = 6, got \[0, 7\]"):
        sequence_sum(values, torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="floating point"):
        sequence_sum(torch.arange(3), torch.tensor([0, 3]))
