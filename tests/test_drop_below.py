"""linear_logp with drop_below: exact log-probs, gradients whose small terms are taken together."""

import pytest
import torch
from conftest import DTYPES, case, close_to_truth, gradients, in_opmath, need_cpp, relative

from ddpo import reference
from ddpo.ops import linear_logp


def peaked(N, D, V, seed=0):
    """Hidden rows whose probabilities are as uneven as a language model's: a few large, a long tail."""
    (hidden, head, bias), targets, _ = case(N, D, V, torch.float32, seed)
    return 1.5 * hidden, head * torch.linspace(1.5, 0.3, V)[:, None], bias, targets


@need_cpp
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["", "softcap"])
@pytest.mark.parametrize("drop_below, bound", [(2**-10, 0.12), (2**-14, 0.04), (1e-30, 1e-5)])
def test_drop_below(drop_below, bound, softcap):
    """Log-probs stay exact; the gradient's error shrinks with the threshold, and vanishes with it."""
    hidden, head, bias, targets = peaked(300, 16, 5003)
    segments = torch.tensor([0, 100, 101, 300])
    c = torch.tensor([0.3, -1.0, 0.7]).repeat_interleave(segments.diff())
    options = {"bias": bias, "softcap": softcap}
    exact = linear_logp(hidden.double(), head.double(), targets, bias=bias.double(), softcap=softcap)
    h = hidden.requires_grad_()
    (truth,) = torch.autograd.grad(
        reference.linear_logp(h.double(), head.double(), targets, bias.double(), 1, softcap), h, c.double()
    )
    logp = linear_logp(h, head, targets, segments=segments, drop_below=drop_below, **options)
    (grad,) = torch.autograd.grad(logp, h, c)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-5)
    assert relative(grad, truth) < bound
    # one coefficient a segment: the sums of its tails nearly cancel, without the mean rows they do not
    z = hidden.detach().double() @ head.double().T + bias.double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    p = z.softmax(1) * (1 if softcap is None else 1 - (z / softcap) ** 2)
    dropped = torch.where(p > drop_below, 0.0, p) @ head.double() * c.double()[:, None]  # what is missing uncorrected
    for a, b in ((0, 100), (101, 300)):
        error, uncorrected = (grad.double() - truth)[a:b].sum(0).norm(), dropped[a:b].sum(0).norm()
        assert drop_below < 1e-20 or error < 0.35 * uncorrected


@need_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["", "softcap"])
@pytest.mark.parametrize("drop_below, bound", [(2**-10, 0.05), (2**-14, 0.02), (1e-30, None)])
def test_drop_below_with_a_trained_head(drop_below, bound, softcap, dtype):
    """Gradients of hidden, head and bias; coefficients of rows of a segment differ."""
    tensors = [x.to(dtype) for x in peaked(200, 16, 2051)[:3]]
    targets, upstream = peaked(200, 16, 2051)[3], torch.randn(200, generator=torch.Generator().manual_seed(1))
    common = {"scale": 0.7, "softcap": softcap}
    sparse = {"segments": torch.tensor([0, 70, 70, 71, 200]), "drop_below": drop_below}
    ours = gradients(linear_logp, tensors, targets, upstream, dtype, True, **common, **sparse)
    plain = gradients(in_opmath, tensors, targets, upstream, dtype, True, **common)
    truth = gradients(reference.linear_logp, tensors, targets, upstream, torch.float64, True, **common)
    close_to_truth(ours[0], plain[0], truth[0])
    for o, p, t in zip(ours[1:], plain[1:], truth[1:], strict=True):
        if bound is None:
            close_to_truth(o, p, t, factor=4)
        else:
            assert relative(o, t) < bound


@need_cpp
def test_drop_below_over_chunks_and_blocks():
    """A segment of more rows than a chunk, one of a single row behind it, more than one block of the vocabulary."""
    hidden, head, bias, targets = peaked(2049, 8, 2500)
    segments = torch.tensor([0, 1024, 1025, 2049])
    for offsets in (segments, torch.tensor([0, 2048, 2049])):
        c = torch.tensor([0.3, -1.0, 0.7])[: len(offsets) - 1].repeat_interleave(offsets.diff())
        tensors = (hidden, head, bias)
        truth = gradients(reference.linear_logp, tensors, targets, c, torch.float64, True)
        ours = gradients(linear_logp, tensors, targets, c, torch.float32, True, segments=offsets, drop_below=2**-14)
        for o, t in zip(ours[1:], truth[1:], strict=True):
            assert relative(o, t) < 0.02


@need_cpp
def test_a_segment_does_not_see_its_neighbours():
    hidden, head, _, targets = peaked(1500, 16, 3000)
    segments = torch.tensor([0, 700, 1200, 1500])
    grads = []
    for a, b, inner in ((0, 1500, segments), (700, 1200, torch.tensor([0, 500]))):
        h = hidden[a:b].clone().requires_grad_()
        logp = linear_logp(h, head, targets[a:b], segments=inner, drop_below=2**-9)
        grads.append(torch.autograd.grad(logp.sum(), h)[0])
    torch.testing.assert_close(grads[0][700:1200], grads[1], rtol=1e-4, atol=1e-5)


@need_cpp
def test_drop_below_is_bitwise_for_any_threads():
    hidden, head, _, targets = peaked(200, 16, 3000)
    segments, c = torch.tensor([0, 64, 200]), torch.randn(200, generator=torch.Generator().manual_seed(2))

    def passes():
        forward = torch.ops.ddpo.linear_logp_sparse_fwd(hidden, head, targets, None, 1.0, None, segments, 2**-9, True)
        backward = torch.ops.ddpo.linear_logp_sparse_bwd(hidden, targets, segments, c, 1.0, *forward[2:-1], True, True)
        return *forward, *backward

    two, before = passes(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = passes()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@need_cpp
def test_short_segments_are_exact():
    hidden, head, _, targets = peaked(60, 16, 3000)
    rows = []
    for options in ({}, {"drop_below": 0.01, "segments": torch.arange(0, 61, 12)}):
        h = hidden.clone().requires_grad_()
        rows.append(torch.autograd.grad(linear_logp(h, head, targets, **options).sum(), h)[0])
    assert torch.equal(*rows)


@need_cpp
def test_no_rows():
    (hidden, head, bias), targets, _ = case(0, 4, 9, torch.float32)
    grads = [x.requires_grad_() for x in (hidden, head, bias)]
    linear_logp(hidden, head, targets, bias=bias, drop_below=0.1).sum().backward()
    assert not any(x.grad.any() for x in grads)


@need_cpp
@pytest.mark.parametrize("what", ["impossible", "broken"])
def test_a_lost_row_loses_no_other(what):
    """A target of probability 0, or a hidden state that is not a number, in a segment of 40 rows."""
    (hidden, head, bias), targets, upstream = case(40, 8, 3000, torch.float32)
    upstream[3] = 0.0
    if what == "impossible":
        bias[:1024], targets = -torch.inf, targets.clamp(min=1024)
        targets[3] = 5
    else:
        hidden[3] = torch.nan
    h = hidden.requires_grad_()
    logp = linear_logp(h, head, targets, bias=bias, drop_below=1e-3)
    (grad,) = torch.autograd.grad(logp, h, upstream)
    others = torch.arange(40) != 3
    assert grad[others].isfinite().all() and logp[others].isfinite().all() and not logp[3].isfinite()


@need_cpp
def test_a_flat_softmax_is_recomputed():
    """Where nearly all probabilities would be kept, the head's gradient is the exact one."""
    (hidden, head, bias), targets, upstream = case(40, 8, 3000, torch.float32)
    tensors = (0.01 * hidden, head, 0.01 * bias)
    grads = [
        gradients(linear_logp, tensors, targets, upstream, torch.float32, True, impl="cpp", drop_below=d)
        for d in (0.0, 1e-4)
    ]
    for kept, exact in zip(grads[1][1:], grads[0][1:], strict=True):
        assert relative(kept, exact) < 1e-5
    call = (*tensors[:2], targets, tensors[2], 1.0, None, torch.tensor([0, 40]), 1e-4, True)
    _, _, _, ends, kept_rows, *_ = torch.ops.ddpo.linear_logp_sparse_fwd(*call)
    assert (ends == -1).all() and len(kept_rows) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"drop_below": 1.0}, r"drop_below must be in \[0, 1\), got 1.0"),
        ({"drop_below": -1.0, "segments": torch.arange(4)}, r"drop_below must be in \[0, 1\), got -1.0"),
        ({"drop_below": 0.1, "impl": "torch"}, "drop_below > 0 wants impl 'cpp'"),
        ({"segments": torch.tensor([0.0, 3.0])}, r"segments must be int64 \(S\+1,\) row offsets"),
        ({"drop_below": 0.1, "segments": torch.tensor([0, 2])}, "segments must rise from 0 to N = 3"),
    ],
)
def test_bad_drop_below(change, message):
    with pytest.raises(ValueError, match=message):
        linear_logp(torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64), **change)
