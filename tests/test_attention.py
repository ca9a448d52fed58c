"""packed_attention against the float64 reference; the calls of flash-attn and torch's varlen kernel by stand-ins."""

import inspect
import itertools
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import close_to_truth, need_cpp, relative, tiny_model
from test_model import sequences

from ddpo import attention, reference
from ddpo.data.batches import pack
from ddpo.model import Policy
from ddpo.ops import attention as op
from ddpo.ops import packed_attention

paths = pytest.mark.parametrize("path", ["torch", pytest.param("cpp", marks=need_cpp)])
RAGGED = (40, 1, 0, 333, 96, 32)  # over a block's 96 rows and 256 keys, one token, none, whole blocks


@pytest.fixture
def on(monkeypatch):
    """(path) -> that path runs."""

    def choose(path):
        if path == "torch":
            monkeypatch.setattr(op, "runs_cpp", lambda q, dropout: False)
        else:
            monkeypatch.setattr(op, "runs_cpp", lambda q, dropout: True)

    return choose


def case(lengths, H=3, Hkv=1, d=8, dv=None, dtype=torch.float64, seed=0):
    """q, k, v, an upstream gradient, offsets."""
    g = torch.Generator().manual_seed(seed)
    T, dv = sum(lengths), dv or d
    shapes = (T, H, d), (T, Hkv, d), (T, Hkv, dv), (T, H, dv)
    q, k, v, upstream = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, v, upstream, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def run(f, q, k, v, upstream, cu_seqlens, dtype=None, **options):
    """The output and the gradients of q, k and v."""
    inputs = [x.to(dtype or x.dtype).detach().requires_grad_() for x in (q, k, v)]
    out = f(*inputs, cu_seqlens, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def by_sdpa(q, k, v, cu_seqlens, scale=None, window=None, softcap=None):
    """PyTorch's own attention, a sequence at a time; the reference where that lacks a softcap or is what is tested."""
    if softcap is not None or not op.runs_cpp(q, 0.0):
        return reference.packed_attention(q, k, v, cu_seqlens, scale, window, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return op._in_pytorch(q, k, v, cu_seqlens.tolist(), scale, window, None, 0.0)


def check(tensors, **options):
    """Ours against the reference in float64, beside PyTorch's own in our dtype."""
    truth = run(reference.packed_attention, *tensors, dtype=torch.float64, **options)
    for o, p, t in zip(
        run(packed_attention, *tensors, **options), run(by_sdpa, *tensors, **options), truth, strict=True
    ):
        assert o.dtype == tensors[0].dtype
        close_to_truth(o, p, t)


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("window", [None, 2, 7, 300, 1000])
@pytest.mark.parametrize("lengths", [(96, 256), RAGGED], ids=["aligned", "ragged"])
def test_matches_reference(path, on, dtype, softcap, window, lengths):
    on(path)
    check(case(lengths, dtype=dtype), window=window, softcap=softcap, scale=0.4)


@paths
@pytest.mark.parametrize(
    "H, Hkv, d, dv", [(9, 3, 64, 64), (2, 2, 4, 4), (4, 2, 80, 80), (8, 1, 128, 128), (3, 3, 5, 9)]
)
def test_heads(path, on, H, Hkv, d, dv):
    on(path)
    check(case((130, 300), H, Hkv, d, dv, torch.float32))


@need_cpp
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
def test_bfloat16(on, softcap):
    """Sums in float32: the output is that of float32, rounded; gradients see the rounded output once more."""
    on("cpp")
    tensors = case(RAGGED, 4, 2, 16, dtype=torch.bfloat16)
    ours = run(packed_attention, *tensors, softcap=softcap)
    truth = run(reference.packed_attention, *tensors, dtype=torch.float64, softcap=softcap)
    close_to_truth(ours[0], truth[0].bfloat16(), truth[0], factor=1.01)
    for o, t in zip(ours[1:], truth[1:], strict=True):
        assert o.dtype == torch.bfloat16 and relative(o, t) < 0.006


@paths
@pytest.mark.parametrize("lengths, window", [((1,), None), ((0, 1, 0), 3), ((0,), None), ((), None), ((110,), 1)])
def test_one_token_and_none(path, on, lengths, window):
    """A position that sees itself alone gets its value, and no gradient through the scores."""
    on(path)
    q, k, v, upstream, cu_seqlens = case(lengths)
    out, dq, dk, dv = run(packed_attention, q, k, v, upstream, cu_seqlens, window=window)
    torch.testing.assert_close(out, v.expand(-1, 3, -1))
    torch.testing.assert_close(dv, upstream.sum(1, keepdim=True))
    for grad in (dq, dk):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-14)


@paths
def test_any_strides(path, on):
    """Views as transformers hands them, a row stride of 0, a last stride that is not 1, and such upstreams."""
    on(path)
    q, k, v, upstream, cu_seqlens = case((70, 31), 4, 2)
    expected = run(packed_attention, q, k, v, upstream, cu_seqlens)
    views = (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], 2)[..., : x.shape[2]],
        lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
        lambda x: torch.cat([x[:1], x])[1:],
    )
    for view in views:
        for a, b in zip(run(packed_attention, *map(view, (q, k, v, upstream)), cu_seqlens), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    flat = [x[:1].expand_as(x) for x in (q, k, v, upstream)]
    whole = [x.contiguous() for x in flat]
    for a, b in zip(
        run(packed_attention, *flat, cu_seqlens.long()), run(packed_attention, *whole, cu_seqlens), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@need_cpp
@pytest.mark.parametrize("lengths", [RAGGED, (700,)], ids=str)
def test_bitwise_reruns_and_threads(on, lengths):
    on("cpp")
    tensors = case(lengths, 6, 2, 32, dtype=torch.float32)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (2, 1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run(packed_attention, *tensors, window=200))
    finally:
        torch.set_num_threads(before)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@paths
def test_a_sequence_does_not_see_another(path, on):
    """One full of what is not a number leaves its neighbours alone, and is not hidden itself."""
    on(path)
    q, k, v, upstream, cu_seqlens = case((20, 9, 30))
    clean = run(packed_attention, q, k, v, upstream, cu_seqlens)
    k[20:29] = torch.nan
    for a, b in zip(run(packed_attention, q, k, v, upstream, cu_seqlens), clean, strict=True):
        assert torch.equal(a[:20], b[:20]) and torch.equal(a[29:], b[29:])
        assert a[20:29].isnan().all()


@need_cpp
def test_large_scores():
    """Maxima that rise from block to block, and fall: the sums are rescaled."""
    q, k, v, upstream, cu_seqlens = case((600,), 2, 1, 4, dtype=torch.float32)
    for ramp in (torch.linspace(-60, 60, 600), torch.linspace(60, -60, 600)):
        check((torch.ones_like(q), k + ramp[:, None, None], v, upstream, cu_seqlens))


@need_cpp
def test_keeps_the_log_sum_exp_only():
    tensors = case((400,), 3, 1, 8, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        packed_attention(*(x.requires_grad_() for x in tensors[:3]), tensors[4])
    assert sorted(saved) == sorted([(400, 3, 8), (400, 1, 8), (400, 1, 8), (400, 3, 8), (2,), (3, 400)])


def test_the_capped_path_holds_a_block_of_scores(on):
    on("torch")
    tensors = case((900,), 1, 1, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        packed_attention(*(x.requires_grad_() for x in tensors[:3]), tensors[4], softcap=3.0)
    assert max(saved) <= op.CAPPED_BLOCK * 900


def test_dropout_runs_in_pytorch(monkeypatch):
    asked = []
    plain = op._plain
    monkeypatch.setattr(op, "_plain", lambda *args: asked.append(args[-1]) or plain(*args))
    q, k, v, _, cu_seqlens = case((5, 3))
    packed_attention(q, k, v, cu_seqlens, dropout=0.5)
    assert asked == [0.5, 0.5]


@need_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    q, k, v, upstream, cu_seqlens = case((5, 0, 4), dtype=dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    fwd, bwd = torch.ops.ddpo.packed_attention_fwd, torch.ops.ddpo.packed_attention_bwd
    for window, softcap in ((None, None), (3, 2.0)):
        torch.library.opcheck(fwd.default, (*inputs, cu_seqlens, 0.3, window, softcap))
        out, lse = fwd(*(x.detach() for x in inputs), cu_seqlens, 0.3, window, softcap)
        plain = [x.detach() for x in inputs]
        torch.library.opcheck(bwd.default, (upstream, *plain, out, lse, cu_seqlens, 0.3, window, softcap))


@need_cpp
def test_autocast_casts_and_second_derivatives_are_refused():
    q, k, v, _, cu_seqlens = case((6,), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_attention(q, k, v.bfloat16(), cu_seqlens)
    assert out.dtype == torch.bfloat16
    out = packed_attention(q.requires_grad_(), k, v, cu_seqlens)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


def test_errors():
    q, k, v, _, cu_seqlens = case((3, 2))
    for changes, message in (
        ({"q": q[0]}, r"q must be floating point \(T, H, d\), got torch.float64 \(3, 8\)"),
        ({"q": q.long()}, "q must be floating point"),
        ({"k": k[:4]}, r"k must be \(T, Hkv, d\) = \(5, a divisor of 3, 8\), got torch.float64 \(4, 1, 8\)"),
        ({"k": k.expand(-1, 2, -1), "v": v.expand(-1, 2, -1)}, "k must be .* a divisor of 3"),
        ({"v": v.expand(-1, 3, -1)}, r"v must be \(T, Hkv, dv\) = \(5, 1, any\)"),
        ({"v": v.float()}, "v must be torch.float64 on cpu, as q"),
        ({"cu_seqlens": cu_seqlens.double()}, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": cu_seqlens.to("meta")}, "offsets on the host, got .* on meta"),
        ({"cu_seqlens": cu_seqlens[:-1]}, r"must rise from 0 to T = 5, got \[0, 3\]"),
        ({"cu_seqlens": cu_seqlens[[0, 2, 1, 2]]}, r"must rise from 0 to T = 5, got \[0, 5, 3, 5\]"),
        ({"window": 0}, "window must be positive or None, got 0"),
        ({"softcap": -1.0}, "softcap must be positive or None, got -1.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_attention(**{"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, **changes})


@need_cpp
def test_the_kernels_check_for_themselves():
    q, k, v, upstream, cu_seqlens = case((3, 2))
    fwd, bwd = torch.ops.ddpo.packed_attention_fwd, torch.ops.ddpo.packed_attention_bwd
    out, lse = fwd(q, k, v, cu_seqlens, 1.0, None, None)
    for f, args in (
        (fwd, (q, k[:4], v, cu_seqlens, 1.0, None, None)),
        (fwd, (q, k.float(), v, cu_seqlens, 1.0, None, None)),
        (fwd, (q, k, v, cu_seqlens + 1, 1.0, None, None)),
        (fwd, (q, k, v, cu_seqlens, 1.0, 0, None)),
        (bwd, (upstream[:, :2], q, k, v, out, lse, cu_seqlens, 1.0, None, None)),
        (bwd, (upstream, q, k, v, out, lse.float(), cu_seqlens, 1.0, None, None)),
    ):
        with pytest.raises(RuntimeError, match="packed_attention: "):
            f(*args)


# --- the libraries' kernels, which run on GPUs alone: stand-ins with their signatures -----------------------


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2's, by the reference."""
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert causal and deterministic == torch.are_deterministic_algorithms_enabled() and dropout_p == 0
    left, right = window_size
    assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
    window = None if left < 0 else left + 1
    return reference.packed_attention(q, k, v, cu_seqlens_q, softmax_scale, window, softcap or None)


def varlen_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """torch's, by the reference."""
    check_packed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert options.get("enable_gqa", False) or query.shape[1] == key.shape[1]
    left, right = options["window_size"]
    assert right == 0 and isinstance(options["window_size"], tuple)
    return reference.packed_attention(query, key, value, cu_seq_q, options["scale"], None if left < 0 else left + 1)


def check_packed(q, k, v, cu_q, cu_k, max_q, max_k):
    assert q.dim() == k.dim() == v.dim() == 3 and len(q) == len(k) == len(v) and k.shape == v.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and torch.equal(cu_q, cu_k)
    assert type(max_q) is type(max_k) is int and max_q == max_k == int(cu_q.diff().max()) and cu_q[-1] == len(q)


GEMMA2 = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "attn_logit_softcapping": 3.0}


@pytest.mark.parametrize(
    "library, family, changes",
    [
        ("flash-attn", "mistral", {"sliding_window": 7}),
        ("flash-attn", "gemma2", GEMMA2),
        ("torch", "mistral", {"sliding_window": 7}),
        ("torch", "starcoder2", {}),
    ],
)
def test_libraries_get_what_they_want(library, family, changes, monkeypatch):
    policy = Policy(tiny_model(family, **changes))
    batch = pack(sequences(), np.arange(4))
    expected = policy(batch)
    called = []

    def kernel(*args, **kwargs):
        called.append(inspect.signature(real).bind(*args, **kwargs))
        return stand_in(*args, **kwargs)

    real, stand_in = attention.varlen_attn, varlen_kernel
    if library == "flash-attn":
        real = stand_in = flash_attn_varlen_func
        module = ModuleType("flash_attn")
        module.flash_attn_varlen_func = kernel
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    else:
        monkeypatch.setattr(attention, "varlen_attn", kernel)
    attention._flash_attn.cache_clear()
    monkeypatch.setattr(attention, "pick_library", lambda *args: library)
    try:
        assert relative(policy(batch).detach(), expected.detach()) < 1e-12
        assert len(called) == 2  # layers
    finally:
        attention._flash_attn.cache_clear()


class OnGpu:
    """What pick_library asks of a tensor."""

    is_cuda, device = True, "cuda"

    def __init__(self, d, dtype=torch.bfloat16):
        self.shape, self.dtype = (7, 2, d), dtype


@pytest.mark.parametrize("installed", [True, False], ids=["flash-attn", "without"])
def test_pick_library(installed, monkeypatch):
    monkeypatch.setattr(attention, "_flash_attn", lambda: flash_attn_varlen_func if installed else None)
    monkeypatch.setattr(attention, "_is_ampere", lambda device: True)
    best = "flash-attn" if installed else "torch"
    only_flash = "flash-attn" if installed else None
    for d, dv, dtype, softcap, dropout, picked in (
        (64, 64, torch.bfloat16, None, 0.0, best),
        (256, 256, torch.float16, None, 0.0, best),
        (64, 64, torch.bfloat16, 50.0, 0.0, only_flash),
        (64, 64, torch.bfloat16, None, 0.1, only_flash),
        (60, 60, torch.bfloat16, None, 0.0, only_flash),
        (264, 264, torch.bfloat16, None, 0.0, None),
        (192, 128, torch.bfloat16, None, 0.0, None),
        (64, 64, torch.float32, None, 0.0, None),
    ):
        assert attention.pick_library(OnGpu(d, dtype), OnGpu(dv, dtype), softcap, dropout) == picked
    on_cpu = torch.zeros(7, 2, 64, dtype=torch.bfloat16)
    assert attention.pick_library(on_cpu, on_cpu, None, 0.0) is None
    monkeypatch.setattr(attention, "_is_ampere", lambda device: False)
    assert attention.pick_library(OnGpu(64), OnGpu(64), None, 0.0) is None


def test_says_which_once(capsys):
    attention._say.cache_clear()
    for _ in range(2):
        attention._say("C++")
    assert capsys.readouterr().out == "attention: C++\n"
