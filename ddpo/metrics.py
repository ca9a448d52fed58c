"""Means, differences and win rates with their intervals and p-values, over prompts.

Prompts are what is resampled: responses to one prompt are not independent of each other.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
CHUNK = 1 << 22  # draws held at a time


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; p: of the hypothesis that it is 0 (None: not tested)."""

    mean: float
    low: float
    high: float
    p: float | None = None


def bootstrap(values, seed: int = 0, num_resamples: int = RESAMPLES) -> Estimate:
    """Mean over prompts with its 95 % bootstrap interval (percentiles 2.5 and 97.5 of resampled means).

    Args: values: (R,), one a prompt, R >= 1, finite. One prompt gives an interval without width.
    Raises: ValueError.
    """
    values = _rows("bootstrap", values)
    return Estimate(float(values.mean()), *_interval(values, np.ones_like(values), seed, num_resamples))


def paired_bootstrap(before, after, seed: int = 0, num_resamples: int = RESAMPLES) -> Estimate:
    """Mean difference after - before over prompts with its 95 % bootstrap interval; p by sign_flip_test.

    Args: before, after: (R,), one value a prompt, the same prompts in the same order, R >= 1, finite.
    Raises: ValueError.
    """
    before, after = (_rows("paired_bootstrap", values) for values in (before, after))
    if before.shape != after.shape:
        raise ValueError(f"paired_bootstrap: want two equal (R,), got {before.shape} and {after.shape}")
    difference = after - before
    found = bootstrap(difference, seed, num_resamples)
    return Estimate(found.mean, found.low, found.high, sign_flip_test(difference, seed))


def sign_flip_test(differences, seed: int = 0, num_resamples: int = RESAMPLES) -> float:
    """Two-sided p of a mean difference, if before and after could be exchanged in each prompt.

    The share of sign patterns that give a mean as far from 0 as the observed: of all 2^R where these are at most
    num_resamples (exact), else of so many random ones and the observed.
    Args: differences: (R,), R >= 1, finite.
    Returns: above 0, at most 1.
    Raises: ValueError.
    Source: Fisher's paired randomisation test, by scipy.stats.permutation_test.
    """
    differences = _rows("sign_flip_test", differences)
    if len(differences) == 1 or not differences.any():
        return 1.0  # all sign patterns give a mean as far from 0; scipy wants two values
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": num_resamples}
    found = stats.permutation_test(
        (differences,), np.mean, **options, batch=max(1, CHUNK // len(differences)), rng=np.random.default_rng(seed)
    )
    return float(found.pvalue)


def win_rate(wins, losses, seed: int = 0, num_resamples: int = RESAMPLES) -> Estimate:
    """Wins over wins and losses, with its 95 % interval; p of the hypothesis that it is one half.

    With at most one answer a prompt: Wilson's interval and the binomial test. With several, which are not independent:
    a bootstrap over prompts and sign_flip_test of wins - losses.
    Args: wins, losses: (R,) counts of each prompt, ties left out; at least one in all.
    Raises: ValueError.
    """
    wins, losses = (_rows("win_rate", counts) for counts in (wins, losses))
    total = wins + losses
    if not total.any():
        raise ValueError("win_rate: there is neither a win nor a loss")
    rate = float(wins.sum() / total.sum())
    if total.max() <= 1:
        test = stats.binomtest(int(wins.sum()), int(total.sum()))
        low, high = map(float, test.proportion_ci(0.95, "wilson"))
        return Estimate(rate, low, high, float(test.pvalue))
    decided = total > 0
    low, high = _interval(wins[decided], total[decided], seed, num_resamples)
    return Estimate(rate, low, high, sign_flip_test((wins - losses)[decided], seed))


def p_value(p: float) -> str:
    """As tables show it."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _interval(values, sizes, seed, num_resamples) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of sum(values) / sum(sizes) over resampled prompts; values, sizes (R,)."""
    rng, n, found = np.random.default_rng(seed), len(values), []
    step = max(1, CHUNK // n)
    for start in range(0, num_resamples, step):
        draws = rng.integers(0, n, (min(step, num_resamples - start), n))
        found.append(values[draws].sum(1) / sizes[draws].sum(1))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def _rows(where, values) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{where}: want finite values (R,), R >= 1, got {values.shape}: {values.ravel()[:4]}")
    return values
