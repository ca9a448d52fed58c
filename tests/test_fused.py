"""The fused losses against the specification: weights, rows, heads, and what they refuse."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from torch import nn

from ddpo import (
    FusedLinearDDPOLoss,
    FusedLinearDORPOLoss,
    head_of,
    linear_logp,
    losses,
    preference_loss,
    reference,
    sequence_logp,
    sequence_sum,
)
from ddpo.ops import linear_preference

f64 = torch.float64
B, S, D, V = 3, 9, 8, 31


def batch(dtype=torch.float32, seed=0):
    """B pairs, chosen over rejected, with a prompt before and padding behind, and those of a reference policy."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"input": (2 * B, S, D), "head": (V, D), "bias": (V,)}
    x = SimpleNamespace(**{k: torch.randn(*size, generator=g).to(dtype) for k, size in sizes.items()})
    x.ref = [torch.randn(*size, generator=g).to(dtype) for size in sizes.values()]
    x.tokens = torch.randint(0, V, (2 * B, S), generator=g)
    x.start, x.end = torch.tensor([3, 2, 4, 3, 2, 4]), torch.tensor([9, 6, 8, 7, 9, 5])  # of the responses
    at = torch.arange(S)
    x.mask = (at >= x.start[:, None]) & (at < x.end[:, None])
    x.target = x.tokens.where(x.mask, -100)
    x.nll_target = x.tokens.where(at < x.end[:, None], -100)  # the prompt's tokens too
    x.rows = x.mask.flatten().nonzero().squeeze(1)
    x.weight = torch.tensor([0.0, 1.9, 1.1], dtype=dtype)
    return x


def run(loss, x, *args, upstream=1.7, **options):
    """Loss, outputs, and the gradients of hidden states, head and bias."""
    inputs = [t.detach().clone().requires_grad_() for t in (x.input, x.head, x.bias)]
    value, outputs = loss(inputs[1], inputs[0], x.target, inputs[2], *args, **options)
    assert not any(o.requires_grad for o in outputs)
    return [value.detach(), *outputs, *torch.autograd.grad(value * upstream, inputs)]


def logps(x, dtype=f64):
    """By the specification: summed log-probs (2B,) of the policy and of the reference, and tokens (2B,)."""
    out = []
    for hidden, head, bias in ((x.input, x.head, x.bias), x.ref):
        rows = hidden.flatten(0, 1)[x.rows].to(dtype)
        token = reference.linear_logp(rows, head.to(dtype), x.target.flatten()[x.rows], bias.to(dtype))
        out.append(torch.stack([t.sum() for t in token.split(x.mask.sum(1).tolist())]))
    return (*out, x.mask.sum(1))


# --- weights, against the specification -------------------------------------------------------------------


def test_weighted_losses_are_the_specifications():
    x = batch(f64)
    inputs = [t.clone().requires_grad_() for t in (x.input, x.head, x.bias)]
    x.input, x.head, x.bias = inputs
    logp, ref_logp, n = logps(x)
    (lp_c, lp_r), (ref_c, ref_r) = logp.chunk(2), ref_logp.chunk(2)
    lm_c, lm_r = (logp / n).chunk(2)
    ddpo = reference.ddpo(lp_c, lp_r, ref_c, ref_r, x.weight, beta=0.3).mean()
    odds = reference.orpo(lm_c, lm_r, beta=0.3) + lm_c
    dorpo = (x.weight * (odds - lp_c * B / n[:B].sum())).mean()  # the NLL's mean is over the batch's tokens
    for module, args, expected in (
        (FusedLinearDDPOLoss(beta=0.3), x.ref, ddpo),
        (FusedLinearDORPOLoss(beta=0.3), (), dorpo),
    ):
        ours = run(module, x, *args, weight=x.weight, upstream=1.0)
        truth = torch.autograd.grad(expected, inputs, retain_graph=True)
        torch.testing.assert_close(ours[0], expected.detach())
        for a, b in zip(ours[-3:], truth, strict=True):
            assert relative(a, b) < 1e-12
        assert not ours[-3][[0, 3]].any(), "the pair of weight 0 moved something"


def test_the_reference_gets_no_gradient():
    """Its log-probs given or computed are the same loss, and nothing is kept for a backward pass through it."""
    x = batch(f64)
    x.ref = [t.requires_grad_() for t in x.ref]
    computed, _ = FusedLinearDDPOLoss(average_log_prob=True)(x.head.requires_grad_(), x.input, x.target, None, *x.ref)
    computed.backward()
    assert x.head.grad.any() and not any(t.grad is not None for t in x.ref)
    chosen, rejected = logps(x)[1].chunk(2)
    given, _ = FusedLinearDDPOLoss(average_log_prob=True)(
        x.head, x.input, x.target, ref_chosen_logps=chosen, ref_rejected_logps=rejected
    )
    torch.testing.assert_close(given, computed)
    assert torch.autograd.grad(given, x.ref[0], allow_unused=True) == (None,)


@pytest.mark.parametrize("module", [FusedLinearDDPOLoss(compute_nll_loss=True), FusedLinearDORPOLoss()])
def test_weight_one_changes_no_bit(module):
    x = batch()
    args = x.ref if isinstance(module, FusedLinearDDPOLoss) else ()
    plain, one = run(module, x, *args), run(module, x, *args, weight=torch.ones(B, dtype=f64))
    assert all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))


def test_sequence_logp_and_preference_loss():
    """Pairs that share responses, a loss of one's own, micro-batches that add up, and no pairs at all."""
    x = batch(f64)
    segments = F.pad(x.mask.sum(1).cumsum(0), (1, 0))
    head = nn.Linear(D, V).double()
    logp = sequence_logp(x.input[x.mask], head, x.target[x.mask], segments, softcap=20.0)
    spec = reference.linear_logp(x.input[x.mask], head.weight, x.target[x.mask], head.bias, 1.0, 20.0)
    torch.testing.assert_close(logp, sequence_sum(spec, segments))

    pairs, w = torch.tensor([[0, 1], [0, 2], [5, 0]]), torch.tensor([0.5, 1.0, 2.0], dtype=f64)
    num_tokens = x.mask.sum(1)
    for loss, options in (
        (losses.dpo, {"ref_logp": torch.zeros(6, dtype=f64), "beta": 0.3}),
        (losses.orpo, {"num_tokens": num_tokens}),
        (lambda logp, pairs: (1 - logp[pairs[:, 0]] + logp[pairs[:, 1]]).relu(), {}),
    ):
        whole = preference_loss(logp, pairs, w, loss=loss, **options)
        torch.testing.assert_close(whole, (w * loss(logp, pairs=pairs, **options)).mean())
        parts = [(slice(2), 3), (slice(2, 3), torch.tensor(3))]
        sums = [preference_loss(logp, pairs[i], w[i], loss=loss, num_pairs=n, **options) for i, n in parts]
        torch.testing.assert_close(sum(sums), whole)
    assert preference_loss(logp, pairs[:0], w[:0], loss=losses.orpo, num_tokens=num_tokens).item() == 0


def test_token_losses_go_through_linear_logp():
    """A loss of token log-probs: another upstream gradient on each row."""
    x = batch(f64)
    out = []
    for f in (linear_logp, reference.linear_logp):
        hidden = x.input[x.mask].requires_grad_()
        token = f(hidden, x.head, x.target[x.mask], bias=x.bias)
        out.append(torch.autograd.grad((token.exp() * torch.arange(1, len(token) + 1)).sum(), hidden)[0])
    assert relative(*out) < 1e-12


# --- rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [FusedLinearDDPOLoss(), FusedLinearDORPOLoss()])
def test_given_rows_are_the_found_ones(module):
    x = batch()
    args = x.ref if isinstance(module, FusedLinearDDPOLoss) else ()
    found, given = run(module, x, *args), run(module, x, *args, rows=x.rows)
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    for wrong in (x.rows[1:], x.rows.flip(0), x.rows[:0]):
        with pytest.raises(ValueError, match="rows must be the flattened positions with a target, rising"):
            run(module, x, *args, rows=wrong)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_ignored_rows_never_reach_the_head(garbage, monkeypatch):
    """Nor do labels in a slice that no vector load could take whole, and hidden states that are not contiguous."""
    x = batch()
    rows = []
    for op in (linear_logp, linear_preference):
        counted = lambda h, *a, op=op, **k: rows.append(len(h)) or op(h, *a, **k)  # noqa: E731
        monkeypatch.setattr(f"ddpo.fused.{op.__name__}", counted)
    clean = run(FusedLinearDDPOLoss(), x, *x.ref)
    stack = F.pad(x.input, (0, 0, 1, 2), value=garbage)[:, 1:-2]
    x.input = stack.masked_fill(~x.mask[..., None], garbage)
    x.ref[0] = x.ref[0].masked_fill(~x.mask[..., None], garbage)
    x.target = F.pad(x.target, (1, 0))[:, 1:]  # 8 bytes off
    dirty = run(FusedLinearDDPOLoss(), x, *x.ref)
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(clean, dirty, strict=True)) if i not in (3, 4))
    assert rows == [x.mask.sum()] * 4
    assert not dirty[-3][~x.mask].any()
    FusedLinearDORPOLoss()(x.head, x.input, x.target, None, x.nll_target)
    assert rows[-1] == x.mask.sum() + x.start[:B].sum(), "the chosen's prompts are more rows, its responses are not"


@pytest.mark.parametrize("which", [[1], [4], [1, 4], range(6)], ids=str)
@pytest.mark.parametrize(
    "module",
    [FusedLinearDDPOLoss(), FusedLinearDDPOLoss(average_log_prob=True, compute_nll_loss=True), FusedLinearDORPOLoss()],
)
def test_sequences_without_a_target(module, which):
    """Log-prob 0, no gradient of their own, and nothing that is not a number; the other pairs do not notice."""
    x = batch()
    args = x.ref if isinstance(module, FusedLinearDDPOLoss) else ()
    whole = run(module, x, *args)
    x.target[list(which)] = -100
    out = run(module, x, *args)
    assert all(torch.isfinite(o).all() for o in out)
    assert not torch.cat(out[1:3])[list(which)].any() and not out[-3][list(which)].any()
    others = [i for i in range(2 * B) if i % B != 1]
    if len(which) < 6:
        torch.testing.assert_close(torch.cat(out[1:3])[others], torch.cat(whole[1:3])[others])


def test_orpo_of_certain_responses_is_finite():
    """Log-probs of 0, and just under: Liger's log(1 - e^x) is -inf there."""
    x = batch()
    x.head = torch.eye(V, D) * 60.0
    x.input = F.one_hot(x.tokens % D, D).float()
    x.bias, x.target = torch.zeros(V), (x.tokens % D).where(x.mask, -100)
    out = run(FusedLinearDORPOLoss(), x)
    assert out[1].max() == 0 and all(torch.isfinite(o).all() for o in out)


# --- heads ------------------------------------------------------------------------------------------------


@pytest.fixture
def peft_model():
    """(options of LoraConfig) -> a body and an lm_head that peft wrapped, and the wrapped head."""
    from peft import LoraConfig, get_peft_model

    def make(**options):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("body", nn.Linear(D, D))
        model.add_module("lm_head", nn.Linear(D, V, bias=False))
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
        return model, model.base_model.model.lm_head

    return make


def test_head_of_plain_layers():
    layer = nn.Linear(D, V)
    assert head_of(layer)[0] is layer.weight and head_of(layer)[1] is layer.bias
    assert head_of(layer.weight, layer.bias) == (layer.weight, layer.bias)
    bare, bias = nn.Linear(D, V, bias=False), torch.zeros(V)
    assert head_of(bare, bias)[1] is bias and head_of(bare)[1] is None
    with pytest.raises(ValueError, match="bias must be None for a head that has one"):
        head_of(layer, bias)
    with pytest.raises(ValueError, match=r"must be nn.Linear or a \(V, D\) tensor, got torch.nn.modules.sparse.Embed"):
        head_of(nn.Embedding(V, D))
    with pytest.raises(ValueError, match="Doubled"):
        head_of(type("Doubled", (nn.Linear,), {"forward": lambda self, h: 2 * h})(D, V))


def test_lora_on_the_head_is_refused(peft_model):
    model, head = peft_model(target_modules=["body", "lm_head"])
    x = batch()
    with pytest.raises(ValueError, match=r"got peft.tuners.lora.layer.Linear, whose adapter would be left out; take"):
        FusedLinearDORPOLoss()(head, x.input, x.target)
    with model.disable_adapter():
        assert head_of(head)[0] is head.base_layer.weight
    model.merge_adapter()
    torch.testing.assert_close(x.input @ head_of(head)[0].T, head(x.input))
    with model.disable_adapter(), pytest.raises(ValueError, match="would be left out"):
        head_of(head)  # its weight holds the adapter, its forward takes it out


def test_a_head_trained_whole_is_the_active_copy(peft_model):
    model, head = peft_model(target_modules=["body"], modules_to_save=["lm_head"])
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    x = batch()
    torch.testing.assert_close(x.input @ head_of(head)[0].T, head(x.input))
    loss, _ = FusedLinearDORPOLoss()(head, model.base_model.model.body(x.input), x.target)
    loss.backward()
    assert head.modules_to_save["default"].weight.grad.any() and head.original_module.weight.grad is None
    with model.disable_adapter():
        torch.testing.assert_close(x.input @ head_of(head)[0].T, head(x.input))
        assert head_of(head)[0] is head.original_module.weight


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"target": torch.zeros(6, 9, dtype=torch.int32)},
            r"DDPOLoss: target must be torch.int64 \(2B, S\), got torch.int32",
        ),
        (
            {"target": torch.zeros(5, 9, dtype=torch.int64), "_input": torch.zeros(5, 9, 8)},
            "B rejected sequences, got 5",
        ),
        ({"_input": torch.zeros(6, 8, 8)}, r"_input must be floating point \(6, 9, D\), got torch.float32 \(6, 8, 8\)"),
        ({"weight": torch.ones(6)}, r"weight must be floating point \(P,\) = \(3,\) or None, got torch.float32 \(6,\)"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, "weight must be floating point"),
        ({"rows": torch.zeros(6, 9, dtype=torch.int64)}, r"rows must be torch.int64 \(N\)"),
        ({"ref_chosen_logps": None}, "the reference must be ref_input and ref_weight, or ref_chosen_logps and"),
        ({"ref_chosen_logps": None, "ref_rejected_logps": None}, "or, with use_ref_model=False, left out"),
        ({"ref_input": torch.zeros(6, 9, 8), "ref_weight": torch.zeros(V, D)}, "the reference must be"),
        ({"ref_rejected_logps": torch.zeros(6)}, r"ref_rejected_logps must be floating point \(3\), got"),
        ({"lin_weight": torch.zeros(V, D + 1)}, r"head must be torch.float32 \(V, 8\)"),
        ({"target": torch.full((6, 9), V)}, r"targets must lie in \[0, V\)"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    x = batch()
    good = {"lin_weight": x.head, "_input": x.input, "target": x.target}
    good |= {"ref_chosen_logps": torch.zeros(B), "ref_rejected_logps": torch.zeros(B)}
    FusedLinearDDPOLoss()(**good)
    with pytest.raises(ValueError, match=message):
        FusedLinearDDPOLoss()(**{**good, **change})


def test_bad_options():
    x = batch()
    with pytest.raises(ValueError, match=r"loss_type must be one of sigmoid, hinge, .*, got 'ipo'"):
        FusedLinearDDPOLoss(loss_type="ipo")
    for loss_type, smoothing in (("sigmoid", 0.1), ("exo_pair", 0.0), ("robust", 0.5)):
        with pytest.raises(ValueError, match=rf"label_smoothing must be .*; got {smoothing} for '{loss_type}'"):
            FusedLinearDDPOLoss(loss_type=loss_type, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="the reference must be"):
        FusedLinearDDPOLoss(use_ref_model=False)(
            x.head, x.input, x.target, ref_chosen_logps=torch.zeros(B), ref_rejected_logps=torch.zeros(B)
        )
    FusedLinearDDPOLoss(use_ref_model=False)(x.head, x.input, x.target, None, *x.ref)  # Liger's arguments, not read
    with pytest.raises(ValueError, match="rows must be None beside nll_target"):
        FusedLinearDORPOLoss()(x.head, x.input, x.target, None, x.nll_target, rows=x.rows)
    with pytest.raises(ValueError, match=r"nll_target must be torch.int64 \(6, 9\)"):
        FusedLinearDORPOLoss()(x.head, x.input, x.target, None, x.nll_target[:B])
    with pytest.raises(ValueError, match=r"the value of loss must be floating point \(2\), got torch.float32 \(\)"):
        preference_loss(torch.zeros(3), torch.tensor([[0, 1], [2, 1]]), loss=lambda logp, pairs: logp.sum())
    with pytest.raises(ValueError, match=r"pairs must be torch.int64 \(P, 2\)"):
        preference_loss(torch.zeros(3), torch.tensor([0, 1]), loss=losses.sft)
