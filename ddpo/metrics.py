"""Intervals over prompts."""

import numpy as np


def paired_bootstrap(before, after, seed: int = 0, num_resamples: int = 10_000) -> tuple[float, float, float]:
    """Mean difference after - before over prompts, with its 95 % bootstrap interval (percentiles 2.5 and 97.5).

    Args: before, after: (R,), one value a prompt, the same prompts in the same order.
    Returns: (mean difference, low, high).
    Raises: ValueError where the shapes differ or are empty.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"paired_bootstrap: want two equal (R,), R >= 1, got {before.shape} and {after.shape}")
    difference = after - before
    draws = np.random.default_rng(seed).integers(0, len(difference), (num_resamples, len(difference)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)
