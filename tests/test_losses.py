"""Losses of sequence log-probs against the reference, their identities and their switches."""

import pytest
import torch
from torch.autograd import gradcheck

from ddpo import losses, reference

f64 = torch.float64
PAIRS = torch.tensor([[0, 1], [2, 1], [3, 0]])  # response 0 is chosen once and rejected once, 1 is shared
C, R = PAIRS.unbind(1)


def batch(dtype=f64, seed=0):
    g = torch.Generator().manual_seed(seed)
    num_tokens = torch.tensor([5, 9, 7, 3])
    logp = -(0.2 + 3 * torch.rand(4, generator=g, dtype=f64)) * num_tokens
    ref_logp = logp + torch.randn(4, generator=g, dtype=f64)
    return logp.to(dtype), ref_logp.to(dtype), num_tokens, torch.tensor([0.0, 1.7, 1.3], dtype=dtype)


def test_against_reference():
    logp, ref_logp, n, w = batch()
    lm = logp / n
    expected = reference.dpo(logp[C], logp[R], ref_logp[C], ref_logp[R], 0.3)
    torch.testing.assert_close(losses.dpo(logp, ref_logp, PAIRS, beta=0.3), expected)
    torch.testing.assert_close(losses.ddpo(logp, ref_logp, PAIRS, w, beta=0.3), w * expected)
    torch.testing.assert_close(losses.orpo(logp, n, PAIRS, beta=0.4), reference.orpo(lm[C], lm[R], 0.4))
    torch.testing.assert_close(losses.dorpo(logp, n, PAIRS, w), reference.dorpo(lm[C], lm[R], w))
    torch.testing.assert_close(losses.sft(logp).sum() / n.sum(), reference.sft(logp, n))


def test_gradients():
    logp, ref_logp, n, w = batch()
    logp.requires_grad_()
    assert gradcheck(lambda x: losses.ddpo(x, ref_logp, PAIRS, w), logp)
    assert gradcheck(lambda x: losses.dorpo(x, n, PAIRS, w), logp)
    assert gradcheck(lambda x: losses.dorpo(x, n, PAIRS, w, dorpo_weight="inside"), logp)


@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_weight_one_is_the_unweighted_loss_bit_for_bit(dtype):
    logp, ref_logp, n, _ = batch(dtype)
    one = torch.ones(3, dtype=dtype)
    assert torch.equal(losses.ddpo(logp, ref_logp, PAIRS, one), losses.dpo(logp, ref_logp, PAIRS))
    assert torch.equal(losses.dorpo(logp, n, PAIRS, one), losses.orpo(logp, n, PAIRS))


def test_weight_zero_moves_nothing():
    logp, ref_logp, n, _ = batch()
    w = torch.tensor([0.0, 1.0, 1.0], dtype=f64)
    for f in (lambda x, p, w: losses.ddpo(x, ref_logp, p, w), lambda x, p, w: losses.dorpo(x, n, p, w)):
        grads = []
        for pairs, weight in ((PAIRS, w), (PAIRS[1:], w[1:])):
            x = logp.clone().requires_grad_()
            grads.append(torch.autograd.grad(f(x, pairs, weight).sum(), x)[0])
        assert torch.equal(*grads)


def test_policy_at_the_reference():
    """Loss ln 2 times the mean weight, over all pairs."""
    logp, _, _, w = batch()
    assert losses.ddpo(logp, logp, PAIRS, w).mean().item() == pytest.approx(0.6931471805599453 * w.mean().item())


def test_release_switches():
    logp, _, n, w = batch()
    lm = logp / n
    tokens_per_pair = n[C].sum() / 3
    nll = -logp[C].sum() / n[C].sum()  # mean over the batch's tokens
    ours = losses.orpo(logp, n, PAIRS, tokens_per_pair=tokens_per_pair)
    odds = reference.orpo(lm[C], lm[R]) + lm[C]
    torch.testing.assert_close(ours.mean(), nll + odds.mean())
    inside = losses.dorpo(logp, n, PAIRS, w, dorpo_weight="inside", tokens_per_pair=tokens_per_pair)
    torch.testing.assert_close(inside.mean(), reference.dorpo_release(lm[C], lm[R], w, nll).mean())
    prompt = torch.tensor([-4.0, -5.0, -6.0, -7.0], dtype=f64)
    with_prompt = losses.orpo(logp, n, PAIRS, nll_logp=logp + prompt, nll_num_tokens=n + 2)
    torch.testing.assert_close(with_prompt, -(logp + prompt)[C] / (n + 2)[C] + odds)
    with pytest.raises(ValueError, match="'outside' or 'inside', got 'middle'"):
        losses.dorpo(logp, n, PAIRS, w, dorpo_weight="middle")


@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_orpo_is_finite_at_both_ends(dtype):
    """Log-probs of 0 (certain), tiny and huge: value and gradient stay finite."""
    logp = torch.tensor([0.0, -1e-12, -1e5, -1.0], dtype=dtype, requires_grad=True)
    n = torch.ones(4, dtype=torch.int64)
    pairs = torch.tensor([[0, 1], [0, 2], [2, 0], [3, 0], [1, 3]])
    value = losses.orpo(logp, n, pairs)
    assert torch.isfinite(value).all()
    assert torch.isfinite(torch.autograd.grad(value.sum(), logp)[0]).all()


def test_log1mexp_matches_reference_in_float32():
    x = -torch.logspace(-7, 2, 200)
    truth = reference.log1mexp(x.double())
    assert ((losses.log1mexp(x).double() - truth).abs() / truth.abs().clamp(min=1e-30))[
        truth.abs() > 1e-37
    ].max() < 1e-6
