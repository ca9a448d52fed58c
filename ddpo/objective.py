"""From a batch's log-probs to the chosen method's losses and metrics (TRL's names)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ddpo import losses
from ddpo.config import TrainConfig
from ddpo.data.batches import Batch

BETA = {"dpo": 0.1, "ddpo": 0.1, "orpo": 0.25, "dorpo": 0.25}
PAIR_METRICS = (
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "weight",
)
ORPO_METRICS = (*PAIR_METRICS, "nll_loss", "log_odds_chosen", "log_odds_ratio")
METRICS = {"sft": (), "dpo": PAIR_METRICS, "ddpo": PAIR_METRICS, "orpo": ORPO_METRICS, "dorpo": ORPO_METRICS}


class Totals(NamedTuple):
    """Of the whole optimiser step: all micro-batches, all processes, pairs of weight 0 included."""

    num_pairs: int  # SFT: 0
    num_tokens: int  # of the chosen (SFT: of all)
    mean_weight: float  # of the pairs (SFT: 1)


def needs_reference(method: str) -> bool:
    return method in ("dpo", "ddpo")


def weight_zero_is_zero(cfg: TrainConfig) -> bool:
    """Whether a pair of weight 0 has loss and gradient exactly 0."""
    return cfg.method == "ddpo" or (cfg.method == "dorpo" and cfg.dorpo_weight == "outside")


def objective(
    cfg: TrainConfig, logp: Tensor, batch: Batch, ref_logp: Tensor | None, totals: Totals
) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's share of the step's loss (a scalar: shares add up over batches and processes), and metrics, a value
    per pair each.

    logp (k, S or more): responses, then prompts; ref_logp (S,) or None.
    """
    logp = logp[:, : len(batch.responses)]  # (k, S)
    sequence, num_tokens = logp[0], batch.num_tokens[0]  # (S,)
    if cfg.method == "sft":
        return losses.sft(sequence).sum() / totals.num_tokens, {}
    pairs, weight = batch.pairs, batch.weight.to(logp.dtype)
    beta = BETA[cfg.method] if cfg.beta is None else cfg.beta
    chosen, rejected = pairs.unbind(1)
    metrics = {"logps/chosen": sequence[chosen], "logps/rejected": sequence[rejected]}
    if needs_reference(cfg.method):
        ref_logp = ref_logp.to(logp.dtype)
        values = losses.dpo(sequence, ref_logp, pairs, beta=beta)
        if cfg.method == "ddpo":
            values = weight * values
        rewards = beta * (sequence - ref_logp)
    else:
        nll = {}
        if cfg.nll_tokens == "all":
            nll = {"nll_logp": logp.sum(0), "nll_num_tokens": batch.num_tokens.sum(0)}
        if cfg.nll_mean == "tokens":
            nll["tokens_per_pair"] = totals.num_tokens / totals.num_pairs
        if cfg.method == "orpo":
            values = losses.orpo(sequence, num_tokens, pairs, beta=beta, **nll)
        else:
            inside = {"dorpo_weight": cfg.dorpo_weight, "mean_weight": totals.mean_weight}
            values = losses.dorpo(sequence, num_tokens, pairs, weight, beta=beta, **inside, **nll)
        log_odds = losses.log_odds(sequence, num_tokens, pairs)
        rewards = beta * sequence / num_tokens
        metrics |= {
            "nll_loss": losses.nll(sequence, num_tokens, pairs),
            "log_odds_chosen": log_odds,
            "log_odds_ratio": torch.nn.functional.logsigmoid(log_odds),
        }
    margin = rewards[chosen] - rewards[rejected]
    metrics |= {
        "rewards/chosen": rewards[chosen],
        "rewards/rejected": rewards[rejected],
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).to(margin.dtype),
        "weight": weight,
    }
    return values.sum() / totals.num_pairs, {name: value.detach() for name, value in metrics.items()}
