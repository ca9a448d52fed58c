"""From a batch's log-probs to the chosen method's losses and metrics (TRL's names).

A method is a row of METHODS: what its loss is a mean over, whether it needs a reference policy, whether pairs are
weighted, the default of beta, and a function from Inputs to its losses. A new loss is a function in ddpo.losses, one
here, and a row; or the user's own (ddpo.own_loss).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ddpo import losses
from ddpo.config import TrainConfig
from ddpo.data.batches import Batch
from ddpo.ops import sequence_sum
from ddpo.own_loss import OwnLoss, own_loss


class Totals(NamedTuple):
    """Of the whole optimiser step: all micro-batches, all processes, pairs of weight 0 included."""

    num_items: int  # pairs, or responses (SFT), or groups (GVPO)
    num_tokens: int  # of the chosen (SFT: of all)
    mean_weight: float  # of the pairs; of other items 1


@dataclass(frozen=True)
class Inputs:
    """What a loss may use."""

    cfg: TrainConfig
    beta: float
    totals: Totals
    batch: Batch
    logp: Tensor  # (k, S) nats: responses, then their prompts where those are scored
    ref_logp: Tensor | None  # (S,) nats
    weight: Tensor  # (I,)

    @property
    def sequence(self) -> Tensor:
        """(S,) nats: the responses' log-probs."""
        return self.logp[0]

    @property
    def reference(self) -> Tensor:
        """(S,) nats: `sequence` under the reference, of a method that needs one."""
        assert self.ref_logp is not None
        return self.ref_logp

    @property
    def num_tokens(self) -> Tensor:
        """(S,) tokens of the responses."""
        return self.batch.num_tokens[0]


class Found(NamedTuple):
    values: Tensor  # the loss of each item, before a weight stands outside of it
    rewards: Tensor | None  # (S,) what the method takes a response's reward to be; None: no pairs, no metrics of pairs
    metrics: dict[str, Tensor]  # further ones, a value per item each, the same names and order in every batch


@dataclass(frozen=True)
class Method:
    loss: Callable[[Inputs], Found]
    item: str = "pair"  # what a step's loss is the mean over: pair, group or response (there: over their tokens)
    needs_reference: bool = False
    weighted: bool = False  # whether pairs are weighted without being asked to
    beta: float = 0.1


# --- methods ----------------------------------------------------------------------------------------------


def _sft(x: Inputs) -> Found:
    return Found(losses.sft(x.sequence), None, {})


def _dpo(x: Inputs) -> Found:
    beta, smoothing = x.beta, x.cfg.label_smoothing
    values = losses.dpo(x.sequence, x.reference, x.batch.pairs, beta=beta, label_smoothing=smoothing)
    return Found(values, x.beta * (x.sequence - x.reference), {})


def _spl(x: Inputs) -> Found:
    assert x.cfg.alpha is not None
    values = losses.spl(x.sequence, x.reference, x.batch.pairs, alpha=x.cfg.alpha, beta=x.beta)
    return Found(values, x.cfg.alpha * x.sequence - x.beta * x.reference, {})


def _ipo(x: Inputs) -> Found:
    num_tokens = x.num_tokens if x.cfg.ipo_logp == "mean" else None
    values = losses.ipo(x.sequence, x.reference, x.batch.pairs, beta=x.beta, num_tokens=num_tokens)
    return Found(values, x.beta * (x.sequence - x.reference), {})


def _simpo(x: Inputs) -> Found:
    values = losses.simpo(x.sequence, x.num_tokens, x.batch.pairs, beta=x.beta, gamma=x.cfg.gamma)
    return Found(values, x.beta * x.sequence / x.num_tokens, {})


def _orpo(x: Inputs) -> Found:
    given = (x.sequence, x.num_tokens, x.batch.pairs)
    options: dict[str, Any] = {}
    if x.cfg.nll_tokens == "all":
        options = {"nll_logp": x.logp.sum(0), "nll_num_tokens": x.batch.num_tokens.sum(0)}
    if x.cfg.nll_mean == "tokens":
        options["tokens_per_pair"] = x.totals.num_tokens / x.totals.num_items
    if is_weighted(x.cfg) and not weight_is_a_factor(x.cfg):
        options |= {"dorpo_weight": "inside", "mean_weight": x.totals.mean_weight}
        values = losses.dorpo(*given, weight=x.weight, beta=x.beta, **options)
    else:
        values = losses.orpo(*given, beta=x.beta, **options)
    log_odds = losses.log_odds(*given)
    metrics = {
        "nll_loss": losses.nll(*given),
        "log_odds_chosen": log_odds,
        "log_odds_ratio": F.logsigmoid(log_odds),
    }
    return Found(values, x.beta * x.sequence / x.num_tokens, metrics)


def _gvpo(x: Inputs) -> Found:
    members, groups = x.batch.members, x.batch.offsets
    logp, ref_logp = x.sequence[members], x.reference[members]  # (M,) group after group
    scores, size = x.batch.scores.to(logp.dtype), groups.diff()
    values = losses.gvpo(logp, ref_logp, scores, groups, beta=x.beta, norm=x.cfg.gvpo_norm)
    r, s = (losses.centred(v, groups) for v in (x.beta * (logp - ref_logp), scores))
    metrics = {"rewards/variance": r * r, "rewards/score_covariance": r * s, "score_variance": s * s}
    return Found(values, None, {name: sequence_sum(v.detach(), groups) / size for name, v in metrics.items()})


def _own(own: OwnLoss, x: Inputs) -> Found:
    given = {"logp": x.sequence, "ref_logp": x.ref_logp, "pairs": x.batch.pairs, "num_tokens": x.num_tokens}
    values = own(len(x.batch.pairs), beta=x.beta, **given)
    return Found(values, x.beta * (x.sequence if x.ref_logp is None else x.sequence - x.ref_logp), {})


METHODS = {
    "sft": Method(_sft, item="response"),
    "dpo": Method(_dpo, needs_reference=True),
    "ddpo": Method(_dpo, needs_reference=True, weighted=True),
    "orpo": Method(_orpo, beta=0.25),
    "dorpo": Method(_orpo, weighted=True, beta=0.25),
    "spl": Method(_spl, needs_reference=True),
    "ipo": Method(_ipo, needs_reference=True),
    "simpo": Method(_simpo, beta=2.0),
    "gvpo": Method(_gvpo, item="group", needs_reference=True),
}


# --- what the settings come to ----------------------------------------------------------------------------


def method_of(cfg: TrainConfig) -> Method:
    """The method's row of METHODS, or one of the user's own loss. Raises ValueError for a function that is no loss."""
    if cfg.method in METHODS:
        return METHODS[cfg.method]
    own = own_loss(cfg.method, cfg.method_sha256)
    if cfg.beta is not None and "beta" not in own.names:
        raise ValueError(f"config: beta does nothing under method {cfg.method}: the function has no parameter 'beta'")
    return Method(partial(_own, own), needs_reference="ref_logp" in own.names, beta=own.beta)


def is_weighted(cfg: TrainConfig) -> bool:
    method = method_of(cfg)
    return method.item == "pair" and (method.weighted or cfg.weighted)


def weight_is_a_factor(cfg: TrainConfig) -> bool:
    """Whether a pair's loss is its weight times another loss: one of weight 0 has loss and gradient exactly 0."""
    inside = cfg.method in ("orpo", "dorpo") and cfg.dorpo_weight == "inside"
    return is_weighted(cfg) and not inside


def scores_prompts(cfg: TrainConfig) -> bool:
    """Whether the prompts' tokens enter the loss too."""
    return cfg.method in ("orpo", "dorpo") and cfg.nll_tokens == "all"


# --- a batch ----------------------------------------------------------------------------------------------


def objective(
    cfg: TrainConfig, logp: Tensor, batch: Batch, ref_logp: Tensor | None, totals: Totals
) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's share of the step's loss (a scalar: shares add up over batches and processes), and metrics, a value
    per item each.

    logp (k, S or more): responses, then prompts; ref_logp (S,) or None.
    """
    method = method_of(cfg)
    x = Inputs(
        cfg=cfg,
        beta=method.beta if cfg.beta is None else cfg.beta,
        totals=totals,
        batch=batch,
        logp=logp[:, : len(batch.responses)],
        ref_logp=None if ref_logp is None else ref_logp.to(logp.dtype),
        weight=batch.weight.to(logp.dtype),
    )
    found = method.loss(x)
    values = x.weight * found.values if weight_is_a_factor(cfg) else found.values
    metrics = found.metrics | ({} if found.rewards is None else _pair_metrics(x, found.rewards))
    num = totals.num_tokens if method.item == "response" else totals.num_items
    return values.sum() / num, {name: value.detach() for name, value in metrics.items()}


def _pair_metrics(x: Inputs, rewards: Tensor) -> dict[str, Tensor]:
    chosen, rejected = x.batch.pairs.unbind(1)
    margin = rewards[chosen] - rewards[rejected]
    return {
        "logps/chosen": x.sequence[chosen],
        "logps/rejected": x.sequence[rejected],
        "rewards/chosen": rewards[chosen],
        "rewards/rejected": rewards[rejected],
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).to(margin.dtype),
        "weight": x.weight,
    }
