"""The specification against numbers worked out by hand and against itself."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from ddpo import reference as ref

f64 = torch.float64


def test_linear_logp_by_hand():
    hidden = torch.tensor([[1.0, 2.0]], dtype=f64)
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=f64)  # logits 1, 2, 3
    total = math.log(math.e + math.e**2 + math.e**3)
    assert ref.linear_logp(hidden, head, torch.tensor([1])).item() == pytest.approx(2 - total, abs=1e-14)
    capped = [2 * math.tanh(0.5 * (z + b) / 2) for z, b in ((1, 1), (2, 0), (3, -1))]
    expected = capped[0] - math.log(sum(map(math.exp, capped)))
    bias = torch.tensor([1.0, 0.0, -1.0], dtype=f64)
    assert ref.linear_logp(hidden, head, torch.tensor([0]), bias, 0.5, 2.0).item() == pytest.approx(expected, abs=1e-14)


def test_linear_logp_gradcheck():
    torch.manual_seed(0)
    inputs = [torch.randn(3, 4, dtype=f64), torch.randn(7, 4, dtype=f64), torch.randn(7, dtype=f64)]
    inputs = [x.requires_grad_() for x in inputs]
    targets = torch.tensor([0, 6, 3])
    assert gradcheck(lambda h, w, b: ref.linear_logp(h, w, targets, b, 0.7, 3.0), inputs)


def test_log1mexp():
    x = torch.tensor([-1e-10, -1e-3, -0.5, -math.log(2), -5.0, -50.0], dtype=f64)
    expected = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()]
    torch.testing.assert_close(ref.log1mexp(x), torch.tensor(expected, dtype=f64), rtol=1e-14, atol=0)
    assert gradcheck(ref.log1mexp, x[1:5].clone().requires_grad_())


def test_losses_by_hand():
    c, r, ref_c, ref_r, w = (torch.tensor(v, dtype=f64) for v in (-10.0, -12.0, -11.0, -11.5, 1.5))
    assert ref.dpo(c, r, ref_c, ref_r, beta=0.1).item() == pytest.approx(math.log1p(math.exp(-0.15)), abs=1e-14)
    assert ref.ddpo(c, r, ref_c, ref_r, w).item() == pytest.approx(1.5 * math.log1p(math.exp(-0.15)), abs=1e-14)
    p, q = 0.6, 0.2  # mean token probabilities
    odds = math.log(p / (1 - p) / (q / (1 - q)))
    lm = torch.tensor([math.log(p), math.log(q)], dtype=f64)
    assert ref.log_odds(*lm).item() == pytest.approx(odds, abs=1e-13)
    expected = -math.log(p) + 0.25 * math.log1p(math.exp(-odds))
    assert ref.orpo(*lm).item() == pytest.approx(expected, abs=1e-13)
    assert ref.dorpo(*lm, w).item() == pytest.approx(1.5 * expected, abs=1e-13)
    assert ref.sft(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2])).item() == 2.0


def test_neighbours_by_hand():
    """Of margin 1.5, h = 0.15: log-probs -10 and -12, the reference's -11 and -11.5."""
    c, r, *_ = given = [torch.tensor(v, dtype=f64) for v in (-10.0, -12.0, -11.0, -11.5)]
    right, wrong = math.log1p(math.exp(-0.15)), math.log1p(math.exp(0.15))
    assert ref.cdpo(*given, label_smoothing=0.2).item() == pytest.approx(0.8 * right + 0.2 * wrong, abs=1e-14)
    assert ref.spl(*given, alpha=0.3).item() == pytest.approx(math.log1p(math.exp(-(0.3 * 2 - 0.05))), abs=1e-14)
    assert ref.ipo(*given).item() == pytest.approx((1.5 - 5) ** 2, abs=1e-13)
    simpo = ref.simpo(c / 20, r / 30, beta=2.5, gamma=0.3)  # means -0.5 and -0.4
    assert simpo.item() == pytest.approx(math.log1p(math.exp(0.25 + 0.3)), abs=1e-14)
    ratio, scores = torch.tensor([1.0, 2.0, 6.0], dtype=f64), torch.tensor([0.0, 0.0, 3.0], dtype=f64)
    value = ref.gvpo(ratio - 7, torch.full((3,), -7.0, dtype=f64), scores, beta=0.5)
    assert value.item() == pytest.approx(0.5 * (0**2 + 0.5**2 + 0.5**2), abs=1e-14)  # R: -1 -.5 1.5; S: -1 -1 2
    half = ref.gvpo(ratio, torch.zeros(3, dtype=f64), scores, 0.5, "n-1")
    assert half.item() == pytest.approx(value.item() / 2, abs=1e-14)


def test_losses_gradcheck():
    values = [torch.tensor([v], dtype=f64, requires_grad=True) for v in (-1.0, -1.4, -1.1, -1.2)]
    w = torch.tensor([1.3], dtype=f64)
    assert gradcheck(lambda *v: ref.ddpo(*v, w), values)
    assert gradcheck(lambda c, r: ref.dorpo(c, r, w), values[:2])


def test_mean_distance_closed_form():
    torch.manual_seed(1)
    e = torch.randn(9, 5, dtype=f64)
    torch.testing.assert_close(ref.mean_cosine_distance_closed(e), ref.mean_distance(e), rtol=0, atol=1e-14)
    one = torch.randn(1, 5, dtype=f64)
    assert ref.mean_distance(one).item() == ref.mean_cosine_distance_closed(one).item() == 0


def test_distances_by_hand():
    e = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], dtype=f64)
    torch.testing.assert_close(ref.mean_distance(e), torch.tensor([0.5, 1.0, 0.5], dtype=f64))
    euclid = torch.tensor([[0.0, 5**0.5, 2.0], [5**0.5, 0.0, 13**0.5], [2.0, 13**0.5, 0.0]], dtype=f64)
    torch.testing.assert_close(ref.pairwise_distance(e, "euclidean"), euclid)
    with pytest.raises(ValueError, match="'cosine' or 'euclidean'"):
        ref.pairwise_distance(e, "manhattan")


def test_deviation_and_weights_by_hand():
    semantic, style = torch.tensor([0.2, 0.4, 0.6], dtype=f64), torch.tensor([1.0, 3.0, 2.0], dtype=f64)
    g = ref.deviation([semantic, style])  # u: (0, .5, 1) and (0, 1, .5)
    torch.testing.assert_close(g, torch.tensor([0.0, 0.5**0.5, 0.5**0.5], dtype=f64))
    torch.testing.assert_close(ref.weights(g), torch.tensor([0.0, 1.5, 1.5], dtype=f64))
    torch.testing.assert_close(ref.weights(g, release_floor=True), torch.tensor([0.2, 1.5, 1.5], dtype=f64))
    arithmetic = ref.deviation([semantic, style], "arithmetic", min_deviation=0.1)
    torch.testing.assert_close(arithmetic, torch.tensor([0.1, 0.75, 0.75], dtype=f64))
    constant = torch.full((4,), 0.3, dtype=f64) + 1e-8 * torch.arange(4)
    assert ref.deviation([constant]).tolist() == [1, 1, 1, 1] == ref.weights(ref.deviation([constant])).tolist()


def test_crpo_by_hand():
    chosen, rejected = torch.tensor([0.9, 0.2], dtype=f64), torch.tensor([0.4, 0.7], dtype=f64)
    assert ref.crpo(chosen, rejected, torch.tensor([0.5, 0.5], dtype=f64)).item() == pytest.approx(0.25, abs=1e-15)
    assert ref.crpo(rejected, chosen, torch.tensor([1.0, 3.0], dtype=f64)).item() == pytest.approx(1.5, abs=1e-15)
