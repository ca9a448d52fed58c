"""The Triton kernel of the pairs, and linear_preference, against float64. tests/test_kernels.py runs this file."""

import itertools
import math

import pytest
import torch
from interpreted_linear_logp import BF16, DEVICE, F32, F64, case, close

from ddpo import losses, reference
from ddpo.kernels import preference as kernels
from ddpo.ops import preference
from ddpo.ops.preference import linear_preference

LENGTHS = [3, 0, 9, 1, 4, 8, 5]  # an empty sequence; lengths that fill tiles and that do not
PAIRS = [(0, 2), (2, 3), (2, 0), (4, 2), (6, 2), (3, 6)]  # 2 in most of them, 1 and 5 in none


def pair_case(seed=0):
    g = torch.Generator().manual_seed(seed)
    segments = torch.tensor([0, *LENGTHS]).cumsum(0)
    N = int(segments[-1])
    return {
        "token_logp": -2 * torch.rand(N, generator=g),
        "segments": segments,
        "pairs": torch.tensor(PAIRS),
        "weight": torch.tensor([1.5, 0.0, 0.7, 1.0, 2.0, 0.3]),
        "ref_logp": -torch.rand(len(LENGTHS), generator=g) * torch.tensor(LENGTHS),
        "rows": torch.randn(N, 11, generator=g),
    }


def truth_of(token_logp, segments, pairs, weight, ref_logp, odds, smooth=0.0, tokens_per_pair=None, beta=0.3):
    """logp, losses and d (their sum / 5) / d token log-probs from ddpo.losses in float64."""
    token_logp = token_logp.double().requires_grad_()
    logp = torch.stack([token_logp[a:b].sum() for a, b in itertools.pairwise(segments)])
    weight = torch.ones(len(pairs)) if weight is None else weight
    if odds:
        num_tokens, options = segments.diff().clamp(min=1), {"beta": beta, "tokens_per_pair": tokens_per_pair}
        values = losses.dorpo(logp, num_tokens, pairs, weight.double(), **options)
    else:
        ref_logp = torch.zeros_like(logp) if ref_logp is None else ref_logp.double()
        same, swapped = (losses.dpo(logp, ref_logp, p, beta=beta) for p in (pairs, pairs.flip(1)))
        values = weight * ((1 - smooth) * same + smooth * swapped)
    (c,) = torch.autograd.grad(values.sum() / 5, token_logp)
    return logp.detach(), values.detach(), c


def fused_pairs(token_logp, segments, pairs, weight, ref_logp, odds, rows=None, smooth=0.0, tokens_per_pair=None):
    tensors = (token_logp, segments, pairs, weight, ref_logp, torch.tensor(5.0), tokens_per_pair)
    tensors = [None if x is None else x.to(DEVICE) for x in tensors]
    return [x.cpu() for x in kernels.fwd(*tensors, 0.3, smooth, odds, rows)]


@pytest.mark.parametrize("odds", [False, True], ids=["dpo", "orpo"])
@pytest.mark.parametrize("change", [{}, {"weight": None}, {"ref_logp": None}, {"option": True}], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_pairs(odds, change, dtype):
    inputs = {**pair_case(), **change}
    rows = inputs.pop("rows").to(DEVICE, dtype)
    before = rows.double().cpu()
    options = {}
    if inputs.pop("option", False):
        options = {"tokens_per_pair": torch.tensor(3.7)} if odds else {"smooth": 0.1}
    truth = truth_of(**inputs, odds=odds, **options)
    logp, values, c, row_c = fused_pairs(**inputs, odds=odds, rows=rows, **options)
    for o, t in zip((logp, values, row_c), truth, strict=True):
        torch.testing.assert_close(o.double(), t, rtol=2e-6, atol=1e-6)
    assert torch.equal(c.repeat_interleave(torch.tensor(LENGTHS)), row_c)
    assert not c[[1, 5]].any() and (odds or c[2] != 0)
    scaled = before * truth[2][:, None]
    torch.testing.assert_close(rows.double().cpu(), scaled, rtol=1e-5 if dtype == F32 else 2**-7, atol=1e-6)
    rows = before.to(DEVICE, dtype)
    again = fused_pairs(**inputs, odds=odds, rows=rows, **options)
    assert all(torch.equal(a, b) for a, b in zip(again, (logp, values, c, row_c), strict=True))


def test_pairs_without_rows_and_without_pairs():
    inputs = pair_case()
    del inputs["rows"]
    torch.testing.assert_close(fused_pairs(**inputs, odds=False)[3].double(), truth_of(**inputs, odds=False)[2])
    inputs |= {"pairs": torch.zeros(0, 2, dtype=torch.int64), "weight": None}
    rows = torch.ones(30, 11, device=DEVICE)
    logp, values, c, row_c = fused_pairs(**inputs, odds=True, rows=rows)
    assert values.shape == (0,) and not c.any() and not row_c.any() and not rows.any() and logp.isfinite().all()


@pytest.mark.parametrize("start", [0.0, -1e-9, -1e-6, -1e-3, -0.2, -0.69, -0.7, -5.0, -60.0, -400.0])
def test_orpo_at_the_ends(start):
    """Mean log-probs from exactly 0 to almost impossible: finite, and the gradient is ddpo.losses' own."""
    inputs = {
        "token_logp": torch.tensor([start, start, -1.0, -1.0]),
        "segments": torch.tensor([0, 2, 4, 4]),
        "pairs": torch.tensor([[0, 1], [1, 0]]),
        "weight": None,
        "ref_logp": None,
    }
    _, values, _, row_c = fused_pairs(**inputs, odds=True)
    truth = truth_of(**inputs, odds=True)
    torch.testing.assert_close(values.double(), truth[1], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(row_c.double(), truth[2], rtol=2e-6, atol=1e-7)
    inputs["pairs"] = torch.tensor([[2, 0], [0, 2]])  # an empty response, whatever that may mean
    assert all(x.isfinite().all() for x in fused_pairs(**inputs, odds=True))


@pytest.mark.parametrize("gap", [0.0, 1e-3, 40.0, 300.0, 5000.0])
@pytest.mark.parametrize("smooth", [0.0, 0.2])
def test_dpo_at_the_ends(gap, smooth):
    """Losses from e^-12 to 1500, with all their digits."""
    inputs = {
        "token_logp": torch.tensor([-gap, -1.0]),
        "segments": torch.tensor([0, 1, 2]),
        "pairs": torch.tensor([[0, 1], [1, 0]]),
        "weight": None,
        "ref_logp": None,
    }
    _, values, _, row_c = fused_pairs(**inputs, odds=False, smooth=smooth)
    truth = truth_of(**inputs, odds=False, smooth=smooth)
    torch.testing.assert_close(values.double(), truth[1], rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(row_c.double(), truth[2], rtol=2e-6, atol=1e-7)


# --- from hidden rows to the loss ---------------------------------------------------------------------------


def whole(tensors, targets, dtype, trained, loss, f, **options):
    """loss, logp, losses and the gradients of loss / 3."""
    hidden, head, bias = (x.to(dtype, copy=True) for x in tensors)
    inputs = [hidden.requires_grad_()]
    if trained:
        inputs += [head.requires_grad_(), bias.requires_grad_()]
    p = {k: v.to(DEVICE) for k, v in pair_case().items() if k not in ("rows", "token_logp")}
    ref = p.pop("ref_logp") if loss == "ddpo" else None
    p.pop("ref_logp", None)
    out = f(hidden, head, targets, **p, loss=loss, ref_logp=ref, beta=0.3, denominator=5, bias=bias, **options)
    return [*(x.detach() for x in out), *torch.autograd.grad(out[0] / 3, inputs)]


def composed(hidden, head, targets, segments, pairs, weight, *, loss, ref_logp, beta, denominator, bias):
    token = reference.linear_logp(hidden, head, targets, bias)
    logp = torch.stack([token[a:b].sum() for a, b in itertools.pairwise(segments)])
    weight = weight.to(logp.dtype)
    if loss == "ddpo":
        values = losses.ddpo(logp, ref_logp.to(logp.dtype), pairs, weight, beta=beta)
    else:
        values = losses.dorpo(logp, segments.diff().clamp(min=1), pairs, weight, beta=beta)
    return values.sum() / denominator, logp, values


@pytest.mark.parametrize("impl", ["triton", "triton-chunked", "triton-fused", "torch"])
@pytest.mark.parametrize("loss, trained", [("ddpo", False), ("dorpo", True)], ids=["ddpo-frozen", "dorpo-trained"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_linear_preference(impl, loss, trained, dtype):
    tensors, targets, _ = case(sum(LENGTHS), 7, 45, dtype)
    ours = whole(tensors, targets, dtype, trained, loss, linear_preference, impl=impl)
    truth = whole(tensors, targets, F64, trained, loss, composed)
    same = whole(tensors, targets, dtype, trained, loss, composed)
    same[:3] = whole(tensors, targets, F32, trained, loss, composed)[:3]
    for o, s, t in zip(ours, same, truth, strict=True):
        close(o, s, t)
    again = whole(tensors, targets, dtype, trained, loss, linear_preference, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_linear_preference_keeps_rows_alone():
    """Head frozen, chunked: what autograd keeps is the scaled rows, (N, D)."""
    tensors, targets, _ = case(sum(LENGTHS), 7, 45, F32)
    saved = []

    def kernels(*args, **options):
        saved.clear()
        return linear_preference(*args, **options, impl="triton-chunked")

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        whole(tensors, targets, F32, False, "ddpo", kernels)
    assert (30, 7) in saved and max(math.prod(s) for s in saved) <= 30 * 7


def test_linear_preference_without_gradient():
    tensors, targets, _ = case(sum(LENGTHS), 7, 45, F32)
    p = pair_case()
    with torch.no_grad():
        out = linear_preference(
            *tensors[:2], targets, p["segments"].to(DEVICE), p["pairs"].to(DEVICE), None, beta=0.1, impl="triton"
        )
    assert not out[0].requires_grad and all(x.isfinite().all() for x in out)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"segments": torch.zeros(0, dtype=torch.int64)}, r"segments must be int64 \(S\+1,\)"),
        ({"pairs": torch.zeros(2, 3, dtype=torch.int64)}, r"pairs must be int64 \(P, 2\), got torch.int64 \(2, 3\)"),
        ({"weight": torch.ones(3)}, r"weight must be floating point \(P,\) = \(6,\) or None, got torch.float32 \(3,\)"),
        ({"loss": "ipo"}, "loss must be 'ddpo' or 'dorpo', got 'ipo'"),
        ({"ref_logp": torch.ones(3)}, r"ref_logp must be \(S,\) = \(7,\)"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"impl": "best"}, "impl must be 'auto' or one of torch, cpp, triton, .* got 'best'"),
    ],
)
def test_bad_input(change, message):
    p = {k: v for k, v in pair_case().items() if k in ("segments", "pairs", "weight")}
    (hidden, head, _), targets, _ = case(30, 4, 9, F32)
    with pytest.raises(ValueError, match=message):
        linear_preference(hidden, head, targets, **{**p, "beta": 0.1, **change})


def test_both_pair_implementations_agree():
    inputs = pair_case()
    rows, order = inputs.pop("rows"), ("token_logp", "segments", "pairs", "weight", "ref_logp")
    tensors = [inputs[k].to(DEVICE) for k in order]
    rest = (torch.tensor(5.0, device=DEVICE), None, 0.3, 0.1, False)
    a, b = rows.to(DEVICE), rows.to(DEVICE, copy=True)
    both = preference._pairs_triton(*tensors, *rest, a), preference._pairs_torch(*tensors, *rest, b)
    for x, y in zip(*both, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
