"""Preference losses as pure functions of sequence log-probs: (S,) in, one value per pair (P,), group (G,) or sequence
(S,) out.

Letters: S sequences (unique responses), P pairs, G groups. `logp` (S,) is the sum over a response's tokens, in nats;
`pairs` (P, 2) int64 holds rows of `logp`: chosen, rejected; `weight` (P,) is the chosen response's weight, mean
one in its group. Nothing is averaged here: the caller divides by the pairs (groups) of the whole optimiser step, pairs
of weight 0 included. Any pair loss times `weight` is its diversified form. Spec: ddpo.reference. Source: arXiv
2503.17126 and where said.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpo.ops.sequence_sum import sequence_sum


def margin(logp: Tensor, ref_logp: Tensor, pairs: Tensor) -> Tensor:
    """(logp_c - ref_c) - (logp_r - ref_r): (P,) nats."""
    rewards = logp - ref_logp  # (S,)
    return rewards[pairs[:, 0]] - rewards[pairs[:, 1]]


def dpo(logp: Tensor, ref_logp: Tensor, pairs: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290): -log sigmoid(beta * margin).

    With label_smoothing e it is conservative DPO (cDPO, Mitchell 2023, ericmitchell.ai/cdpo.pdf, eq. 3):
    -(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin), for labels of which a share e is wrong.

    Args:
        logp, ref_logp: (S,) nats, of the policy and of the reference policy.
        pairs: (P, 2) int64, chosen and rejected.
        beta: strength of the pull to the reference, unitless, > 0.
        label_smoothing: in [0, 0.5).
    Returns: (P,) nats.
    """
    scaled = beta * margin(logp, ref_logp, pairs)
    if not label_smoothing:
        return -F.logsigmoid(scaled)
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def ddpo(
    logp: Tensor,
    ref_logp: Tensor,
    pairs: Tensor,
    weight: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Diversified DPO: weight * dpo. weight (P,); the other arguments as in `dpo`. Returns (P,)."""
    return weight * dpo(logp, ref_logp, pairs, beta=beta, label_smoothing=label_smoothing)


def spl(logp: Tensor, ref_logp: Tensor, pairs: Tensor, *, alpha: float, beta: float = 0.1) -> Tensor:
    """Soft preference learning (arXiv 2511.08594): -log sigmoid(alpha (lp_c - lp_r) - beta (ref_c - ref_r)).

    KL's two halves have a strength each: alpha the policy's entropy (more is more diverse), beta the cross-entropy to
    the reference. alpha = beta is DPO.

    Args: as `dpo`; alpha: unitless, > 0.
    Returns: (P,) nats.
    """
    rewards = alpha * logp - beta * ref_logp  # (S,)
    return -F.logsigmoid(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])


def ipo(
    logp: Tensor, ref_logp: Tensor, pairs: Tensor, *, beta: float = 0.1, num_tokens: Tensor | None = None
) -> Tensor:
    """Identity preference optimisation (arXiv 2310.12036, eq. 17): (margin - 1 / (2 beta))^2.

    Args: as `dpo`; beta: the paper's tau;
        num_tokens: (S,) tokens of each response: log-probs are then means per token. None: sums, as the paper has it.
            TRL divides, and says that the paper's authors told it so.
    Returns: (P,), squared nats.
    """
    if num_tokens is not None:
        logp, ref_logp = logp / num_tokens, ref_logp / num_tokens
    return (margin(logp, ref_logp, pairs) - 1 / (2 * beta)).square()


def simpo(logp: Tensor, num_tokens: Tensor, pairs: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Simple preference optimisation (arXiv 2405.14734, eq. 6): -log sigmoid(beta (lm_c - lm_r) - gamma), of the mean
    token log-probs lm = logp / num_tokens; without a reference policy.

    Args:
        logp: (S,) nats. num_tokens: (S,) tokens of each response, >= 1. pairs: (P, 2) int64.
        beta: scale of the rewards, > 0. gamma: margin that the chosen's reward should have, >= 0.
    Returns: (P,) nats.
    """
    rewards = beta * logp / num_tokens  # (S,)
    return -F.logsigmoid(rewards[pairs[:, 0]] - rewards[pairs[:, 1]] - gamma)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, with finite gradients at both ends."""
    near_zero = x > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))  # the -1 keeps the branch not taken finite
    large = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, small, large)


def log_odds(logp: Tensor, num_tokens: Tensor, pairs: Tensor) -> Tensor:
    """Log odds ratio of the mean token log-probs lm = logp / num_tokens: (P,). lm is kept under -2^-24."""
    lm = (logp / num_tokens).clamp(max=-(2.0**-24))  # (S,)
    logit = lm - log1mexp(lm)
    return logit[pairs[:, 0]] - logit[pairs[:, 1]]


def nll(logp: Tensor, num_tokens: Tensor, pairs: Tensor, tokens_per_pair: Tensor | float | None = None) -> Tensor:
    """Negative log-likelihood of the chosen: (P,) nats per token.

    tokens_per_pair None: each pair its own token mean (the paper). Else the number of chosen tokens per pair over
    the whole step, so that the mean over pairs is the mean over the step's tokens (TRL, Liger, the release).
    """
    chosen = pairs[:, 0]
    return -logp[chosen] / (num_tokens[chosen] if tokens_per_pair is None else tokens_per_pair)


def orpo(
    logp: Tensor,
    num_tokens: Tensor,
    pairs: Tensor,
    *,
    beta: float = 0.25,
    nll_logp: Tensor | None = None,
    nll_num_tokens: Tensor | None = None,
    tokens_per_pair: Tensor | float | None = None,
) -> Tensor:
    """Odds-ratio preference optimisation (arXiv 2403.07691): NLL_c - beta * log sigmoid(log_odds).

    Args:
        logp: (S,) nats. num_tokens: (S,) tokens of each response, >= 1. pairs: (P, 2) int64.
        beta: weight of the odds-ratio term (the paper's lambda).
        nll_logp, nll_num_tokens: (S,) where the NLL covers other tokens than the response's (prompt tokens too).
        tokens_per_pair: see `nll`.
    Returns: (P,).
    """
    likelihood = nll(
        logp if nll_logp is None else nll_logp,
        num_tokens if nll_num_tokens is None else nll_num_tokens,
        pairs,
        tokens_per_pair,
    )
    return likelihood - beta * F.logsigmoid(log_odds(logp, num_tokens, pairs))


def dorpo(
    logp: Tensor,
    num_tokens: Tensor,
    pairs: Tensor,
    weight: Tensor,
    *,
    beta: float = 0.25,
    dorpo_weight: str = "outside",
    mean_weight: Tensor | float | None = None,
    **nll_options,
) -> Tensor:
    """Diversified ORPO: weight * orpo, both terms.

    Args: as `orpo`, and
        weight: (P,).
        dorpo_weight: 'outside' (paper) | 'inside' (released code: log sigmoid(w * log_odds), and the NLL times the
            mean weight of the batch).
        mean_weight: for 'inside', of the whole batch where only some of its pairs are given (the release's batch is
            one process's micro-batch, the trainer's the whole step); None: of the pairs given.
    Returns: (P,).
    Raises: ValueError for another dorpo_weight.
    """
    if dorpo_weight == "outside":
        return weight * orpo(logp, num_tokens, pairs, beta=beta, **nll_options)
    if dorpo_weight == "inside":
        likelihood = orpo(logp, num_tokens, pairs, beta=0.0, **nll_options)  # beta 0: its likelihood term alone
        mean = weight.mean() if mean_weight is None else mean_weight
        return mean * likelihood - beta * F.logsigmoid(weight * log_odds(logp, num_tokens, pairs))
    raise ValueError(f"dorpo: dorpo_weight must be 'outside' or 'inside', got {dorpo_weight!r}")


def sft(logp: Tensor) -> Tensor:
    """Supervised fine-tuning: -logp, (S,) nats; the caller divides by the tokens of the whole step."""
    return -logp


def centred(values: Tensor, groups: Tensor) -> Tensor:
    """Each value less its group's mean: (S,). groups: (G+1,) int64 row offsets. The means count as constants in
    backward, which changes nothing where the result is squared and summed over its group."""
    size = groups.diff()
    mean = sequence_sum(values.detach(), groups) / size  # (G,)
    return values - mean.repeat_interleave(size, output_size=len(values))


def gvpo(
    logp: Tensor, ref_logp: Tensor, scores: Tensor, groups: Tensor, *, beta: float = 0.1, norm: str = "1"
) -> Tensor:
    """Group variance policy optimisation (arXiv 2504.19599): 1/2 sum over the group of
    ((R_i - mean R) - (S_i - mean S))^2, with R_i = beta * (logp_i - ref_i) and S_i the score.

    Args:
        logp, ref_logp: (S,) nats, group after group.
        scores: (S,), in units of R: at the optimum the policy is the reference times exp(score / beta).
        groups: (G+1,) int64 row offsets of the groups' responses, each group of n >= 2.
        beta: unitless, > 0.
        norm: '1' (paper), or 'n-1': divided by that (the authors' code).
    Returns: (G,).
    Raises: ValueError for another norm.
    """
    if norm not in ("1", "n-1"):
        raise ValueError(f"gvpo: norm must be '1' or 'n-1', got {norm!r}")
    off = centred(beta * (logp - ref_logp) - scores, groups)  # (S,), the difference of both centred
    value = sequence_sum(off.square(), groups) / 2
    return value if norm == "1" else value / (groups.diff() - 1)
