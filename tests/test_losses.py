"""Losses of sequence log-probs against the reference, their identities and their switches."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_fused_trainers import dpo_self, need, trl_self
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


# --- neighbours of DPO ------------------------------------------------------------------------------------


def test_neighbours_against_reference():
    logp, ref_logp, n, w = batch()
    lm, ref_lm = logp / n, ref_logp / n
    given = (logp[C], logp[R], ref_logp[C], ref_logp[R])
    by_token = (lm[C], lm[R], ref_lm[C], ref_lm[R])
    smoothed = losses.dpo(logp, ref_logp, PAIRS, beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, reference.cdpo(*given, 0.3, 0.2))
    torch.testing.assert_close(losses.ddpo(logp, ref_logp, PAIRS, w, beta=0.3, label_smoothing=0.2), w * smoothed)
    torch.testing.assert_close(losses.spl(logp, ref_logp, PAIRS, alpha=0.7, beta=0.3), reference.spl(*given, 0.7, 0.3))
    torch.testing.assert_close(losses.ipo(logp, ref_logp, PAIRS, beta=0.3), reference.ipo(*given, 0.3))
    torch.testing.assert_close(losses.ipo(logp, ref_logp, PAIRS, beta=0.3, num_tokens=n), reference.ipo(*by_token, 0.3))
    torch.testing.assert_close(
        losses.simpo(logp, n, PAIRS, beta=2.5, gamma=0.3), reference.simpo(lm[C], lm[R], 2.5, 0.3)
    )


GROUPS = torch.tensor([0, 2, 5, 9])


def groups():
    g = torch.Generator().manual_seed(1)
    logp, off, scores = (torch.randn(9, generator=g, dtype=f64) for _ in range(3))
    return 10 * logp, 10 * logp + off, 3 * scores


@pytest.mark.parametrize("norm", ["1", "n-1"])
def test_gvpo_against_reference(norm):
    logp, ref_logp, scores = groups()
    found = losses.gvpo(logp, ref_logp, scores, GROUPS, beta=0.3, norm=norm)
    parts = [slice(a, b) for a, b in itertools.pairwise(GROUPS.tolist())]
    expected = [reference.gvpo(logp[i], ref_logp[i], scores[i], 0.3, norm) for i in parts]
    torch.testing.assert_close(found, torch.stack(expected))
    with pytest.raises(ValueError, match="norm must be '1' or 'n-1', got 'n'"):
        losses.gvpo(logp, ref_logp, scores, GROUPS, norm="n")


def test_gradients_of_the_neighbours():
    logp, ref_logp, n, _ = batch()
    logp.requires_grad_()
    assert gradcheck(lambda x: losses.dpo(x, ref_logp, PAIRS, label_smoothing=0.2), logp)
    assert gradcheck(lambda x: losses.spl(x, ref_logp, PAIRS, alpha=0.4), logp)
    assert gradcheck(lambda x: losses.ipo(x, ref_logp, PAIRS), logp)
    assert gradcheck(lambda x: losses.ipo(x, ref_logp, PAIRS, num_tokens=n), logp)
    assert gradcheck(lambda x: losses.simpo(x, n, PAIRS), logp)
    logp, ref_logp, scores = groups()
    assert gradcheck(lambda x: losses.gvpo(x, ref_logp, scores, GROUPS, norm="n-1"), logp.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_identities_of_the_neighbours(dtype):
    logp, ref_logp, n, _ = batch(dtype)
    dpo = losses.dpo(logp, ref_logp, PAIRS, beta=0.3)
    assert torch.equal(losses.dpo(logp, ref_logp, PAIRS, beta=0.3, label_smoothing=0.0), dpo)
    torch.testing.assert_close(losses.spl(logp, ref_logp, PAIRS, alpha=0.3, beta=0.3), dpo)
    flipped = losses.dpo(logp, ref_logp, PAIRS.flip(1), beta=0.3)
    smoothed = losses.dpo(logp, ref_logp, PAIRS, beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(smoothed, 0.9 * dpo + 0.1 * flipped)
    assert losses.ipo(logp, logp, PAIRS, beta=0.1).tolist() == pytest.approx([25.0] * 3)  # margin 0, wanted 5 nats
    one = torch.ones_like(n)
    no_reference = losses.dpo(logp, torch.zeros_like(logp), PAIRS, beta=0.3)
    torch.testing.assert_close(losses.simpo(logp, one, PAIRS, beta=0.3, gamma=0.0), no_reference)


def test_gvpo_identities():
    """A constant added to a group's scores or log-probs changes nothing; at the optimum loss and gradient are 0; of two
    responses it is a quarter of the squared distance of their margins (IPO's target from scores)."""
    logp, ref_logp, scores = groups()
    shift = torch.tensor([3.0, -1.0, 7.0], dtype=f64).repeat_interleave(GROUPS.diff())
    value = losses.gvpo(logp, ref_logp, scores, GROUPS)
    torch.testing.assert_close(losses.gvpo(logp, ref_logp, scores + shift, GROUPS), value)
    torch.testing.assert_close(losses.gvpo(logp + shift, ref_logp, scores, GROUPS), value)
    best = (ref_logp + scores / 0.1 + shift).requires_grad_()
    at_best = losses.gvpo(best, ref_logp, scores, GROUPS)
    assert at_best.abs().max() < 1e-20 and torch.autograd.grad(at_best.sum(), best)[0].abs().max() < 1e-12
    margin = 0.1 * ((logp[0] - ref_logp[0]) - (logp[1] - ref_logp[1]))
    assert value[0].item() == pytest.approx(((margin - (scores[0] - scores[1])) ** 2 / 4).item())


def test_gvpo_of_no_group_has_a_gradient():
    """A process that has no group of a step takes part in its backward all the same."""
    x = torch.randn(3, dtype=f64, requires_grad=True)
    none = x[:0]
    losses.gvpo(none, none.detach(), none.detach(), torch.tensor([0])).sum().backward()
    assert x.grad.tolist() == [0, 0, 0]


# --- TRL --------------------------------------------------------------------------------------------------


@need("trl")
def test_trls_orpo_and_simpo():
    """Its loss methods on our log-probs: ORPO's odds-ratio term, SimPO with a margin."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    logp, _, n, _ = batch()
    lm = logp / n
    theirs, *_ = ORPOTrainer.odds_ratio_loss(
        trl_self(beta=0.25), lm[C], lm[R]
    )  # beta * log sigmoid; theirs is in float32
    ours = losses.orpo(logp, n, PAIRS, beta=0.25) - losses.nll(logp, n, PAIRS)
    torch.testing.assert_close(ours.float(), -theirs)
    settings = {"alpha": 0.0, "loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": 0.0}
    theirs, chosen, _ = CPOTrainer.cpo_loss(trl_self(**settings), lm[C], lm[R])
    torch.testing.assert_close(losses.simpo(logp, n, PAIRS, beta=2.0, gamma=0.7), theirs)
    torch.testing.assert_close(2.0 * lm[C], chosen)


@need("trl")
def test_trls_smoothed_labels():
    """cDPO is what its CPO's sigmoid makes of log-ratios."""
    from trl.experimental.cpo import CPOTrainer

    logp, ref_logp, _, _ = batch()
    ratio = logp - ref_logp
    settings = {"alpha": 0.0, "loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1}
    theirs, *_ = CPOTrainer.cpo_loss(trl_self(**settings), ratio[C], ratio[R])
    torch.testing.assert_close(losses.dpo(logp, ref_logp, PAIRS, beta=0.3, label_smoothing=0.1), theirs)


@need("trl")
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_trls_dpo_and_ipo(loss_type):
    """Its trainer's loss of token log-probs, mean over three pairs, and the gradient. Its IPO has means per token."""
    from trl.trainer.dpo_trainer import DPOTrainer

    g = torch.Generator().manual_seed(0)
    n = torch.tensor([5, 9, 7, 3, 8, 6])  # of three chosen, then three rejected
    mask = torch.arange(9) < n[:, None]  # (6, 9)
    token = (-3 * torch.rand(6, 9, generator=g)).where(mask, 0.0).requires_grad_()
    ref_logp = token.detach().sum(1) + torch.randn(6, generator=g)

    def model(**_):
        zero = torch.zeros_like(token)
        return SimpleNamespace(log_probs=token, entropy=zero, mean_logits=zero, is_top1=zero.bool())

    ids = torch.zeros(6, 10, dtype=torch.int64)  # a prompt of one token
    inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": F.pad(mask, (1, 0)).long()}
    chosen, rejected = ref_logp.chunk(2)
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    theirs = DPOTrainer._compute_loss(dpo_self(loss_type, 0.0), model, inputs, return_outputs=False)
    pairs = torch.tensor([[0, 3], [1, 4], [2, 5]])
    if loss_type == "ipo":
        ours = losses.ipo(token.sum(1), ref_logp, pairs, num_tokens=n).mean()
    else:
        ours = losses.dpo(token.sum(1), ref_logp, pairs).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, token)[0] for loss in (ours, theirs)))
