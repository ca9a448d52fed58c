"""What the trainer makes of each method and switch, against the specification."""

from types import SimpleNamespace

import pytest
import torch
from conftest import relative

from ddpo import reference as spec
from ddpo.config import TrainConfig
from ddpo.data.prepared import Prepared
from ddpo.objective import METHODS, objective
from ddpo.schedule import Schedule


def odds_term(x):
    return (spec.orpo(*x.means) + x.means[0]).mean()


def of_groups(x, norm):
    return torch.stack([spec.gvpo(x.logp[g], x.ref_logp[g], x.scores[g], norm=norm) for g in x.groups]).mean()


CASES = [  # settings, and the loss of a step
    ({"method": "sft"}, lambda x: spec.sft(x.logp, x.num_tokens)),
    ({"method": "dpo"}, lambda x: spec.dpo(*x.sums, *x.refs, 0.1).mean()),
    ({"method": "dpo", "beta": 0.3}, lambda x: spec.dpo(*x.sums, *x.refs, 0.3).mean()),
    ({"method": "dpo", "label_smoothing": 0.2}, lambda x: spec.cdpo(*x.sums, *x.refs, 0.1, 0.2).mean()),
    ({"method": "dpo", "weighted": True}, lambda x: spec.ddpo(*x.sums, *x.refs, x.weight).mean()),
    ({"method": "ddpo"}, lambda x: spec.ddpo(*x.sums, *x.refs, x.weight).mean()),
    ({"method": "ddpo", "label_smoothing": 0.2}, lambda x: (x.weight * spec.cdpo(*x.sums, *x.refs, 0.1, 0.2)).mean()),
    ({"method": "orpo"}, lambda x: spec.orpo(*x.means, 0.25).mean()),
    ({"method": "orpo", "nll_mean": "tokens"}, lambda x: x.nll_of_tokens + odds_term(x)),
    ({"method": "orpo", "nll_tokens": "all"}, lambda x: -x.mean_of_all.mean() + odds_term(x)),
    ({"method": "orpo", "nll_mean": "tokens", "nll_tokens": "all"}, lambda x: x.nll_of_all_tokens + odds_term(x)),
    ({"method": "dorpo"}, lambda x: spec.dorpo(*x.means, x.weight, 0.25).mean()),
    (
        {"method": "dorpo", "nll_tokens": "all"},
        lambda x: (x.weight * (spec.orpo(*x.means) + x.means[0] - x.mean_of_all)).mean(),
    ),
    (
        {"method": "dorpo", "dorpo_weight": "inside"},
        lambda x: spec.dorpo_release(*x.means, x.weight, -x.means[0].mean()).mean(),
    ),
    (
        {"method": "dorpo", "dorpo_weight": "inside", "nll_mean": "tokens", "nll_tokens": "all"},
        lambda x: spec.dorpo_release(*x.means, x.weight, x.nll_of_all_tokens).mean(),
    ),
    ({"method": "spl", "alpha": 0.3}, lambda x: spec.spl(*x.sums, *x.refs, 0.3, 0.1).mean()),
    ({"method": "ipo"}, lambda x: spec.ipo(*x.sums, *x.refs, 0.1).mean()),
    ({"method": "ipo", "ipo_logp": "mean"}, lambda x: spec.ipo(*x.means, *x.ref_means, 0.1).mean()),
    ({"method": "ipo", "weighted": True}, lambda x: (x.weight * spec.ipo(*x.sums, *x.refs, 0.1)).mean()),
    ({"method": "simpo"}, lambda x: spec.simpo(*x.means, 2.0, 1.0).mean()),
    ({"method": "simpo", "gamma": 0.3}, lambda x: spec.simpo(*x.means, 2.0, 0.3).mean()),
    ({"method": "gvpo"}, lambda x: of_groups(x, "1")),
    ({"method": "gvpo", "gvpo_norm": "n-1"}, lambda x: of_groups(x, "n-1")),
]


def test_every_method_has_a_case():
    assert {changes["method"] for changes, _ in CASES} == METHODS.keys()


@pytest.mark.parametrize("changes, expected", CASES, ids=["-".join(map(str, c.values())) for c, _ in CASES])
def test_against_reference(config, changes, expected):
    """float64, of random log-probs: a step's batches together have the loss that the step's items have by the formula,
    pairs of weight 0 counted, and sequences that fill up not."""
    cfg = config(batch_size=1000, micro_tokens=100, **changes)
    data = Prepared(cfg.data)
    x = step_of(data)
    schedule = Schedule(data, cfg)
    batches = schedule.batches(0)
    assert schedule.num_steps == 1 and len(batches) > 1 and (x.weight == 0).any()
    total = 0
    for batch in batches:
        kinds = torch.stack([x.logp, x.prompt_logp])[: len(batch.num_tokens), batch.responses]  # (k, S)
        logp = torch.cat([kinds, torch.full((len(kinds), 1), torch.nan)], 1)  # a filler's stands behind
        ref_logp = x.ref_logp[batch.responses] if METHODS[cfg.method].needs_reference else None
        share, _ = objective(cfg, logp, batch, ref_logp, schedule.totals(0))
        total += share
    assert relative(total, expected(x)) < 1e-12


def step_of(data):
    """Random log-probs of the folder's responses, and what formulas take of them: pairs' chosen and rejected."""
    g = torch.Generator().manual_seed(0)
    num_tokens, num_prompt = (torch.from_numpy(a.copy()) for a in (data.num_tokens, data.num_prompt_tokens - 1))
    logp, prompt_logp, ref_logp = (
        -n * (0.2 + torch.rand(len(n), generator=g, dtype=torch.float64)) for n in (num_tokens, num_prompt, num_tokens)
    )
    chosen, rejected = torch.from_numpy(data.pairs.copy()).unbind(1)
    means, ref_means, all_logp, all_tokens = (
        logp / num_tokens,
        ref_logp / num_tokens,
        logp + prompt_logp,
        num_tokens + num_prompt,
    )
    return SimpleNamespace(
        logp=logp,
        prompt_logp=prompt_logp,
        ref_logp=ref_logp,
        num_tokens=num_tokens,
        weight=torch.from_numpy(data.weight.copy()),
        scores=torch.from_numpy(data.scores.copy()).double(),
        groups=[torch.from_numpy(data.response_group == i).nonzero()[:, 0] for i in range(len(data.groups))],
        sums=(logp[chosen], logp[rejected]),
        refs=(ref_logp[chosen], ref_logp[rejected]),
        means=(means[chosen], means[rejected]),
        ref_means=(ref_means[chosen], ref_means[rejected]),
        nll_of_tokens=spec.sft(logp[chosen], num_tokens[chosen]),
        nll_of_all_tokens=spec.sft(all_logp[chosen], all_tokens[chosen]),
        mean_of_all=(all_logp / all_tokens)[chosen],
    )


# --- settings that a method does not read ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, way_out",
    [
        ({"method": "orpo", "label_smoothing": 0.1}, "it is for dpo, ddpo"),
        ({"method": "dpo", "alpha": 0.3}, "it is for spl"),
        ({"method": "sft", "weighted": True}, "it is for dpo, ddpo, orpo, dorpo, spl, ipo, simpo"),
        ({"method": "gvpo", "weighted": True}, "it is for dpo"),
        ({"method": "sft", "beta": 0.2}, "it is for dpo"),
        ({"method": "dpo", "gamma": 0.5}, "it is for simpo"),
        ({"method": "dpo", "ipo_logp": "mean"}, "it is for ipo"),
        ({"method": "dpo", "gvpo_norm": "n-1"}, "it is for gvpo"),
        ({"method": "simpo", "nll_mean": "tokens"}, "it is for orpo, dorpo"),
        ({"method": "ddpo", "nll_tokens": "all"}, "it is for orpo, dorpo"),
        ({"method": "orpo", "dorpo_weight": "inside"}, "it is for dorpo"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing(changes, way_out):
    *_, name = changes
    message = rf"{name} does nothing under method {changes['method']}, got .*; leave it out \({way_out}"
    with pytest.raises(ValueError, match=message):
        TrainConfig(data="", out="", **changes)
