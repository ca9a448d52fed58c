"""Measures of a set of outputs, and intervals over prompts. Tensor and array maths: no files, no models."""

import itertools

import numpy as np
import torch

from ddpo.deviation import mean_distance


def diversity(embeddings: torch.Tensor, groups: torch.Tensor, metric: str = "cosine") -> torch.Tensor:
    """Mean pairwise distance of each group's outputs.

    Args:
        embeddings: (n, D) floating point.
        groups: (R+1,) int64 row offsets of the groups.
    Returns: (R,) float64; 0 for a group of one.
    """
    d = mean_distance(embeddings, metric, groups).double()  # (n,)
    return torch.segment_reduce(d, "mean", offsets=groups)


def distinct_k(embeddings: torch.Tensor, groups: torch.Tensor, threshold: float) -> torch.Tensor:
    """Number of different outputs in each group (NoveltyBench, arXiv 2504.05228, with its own equivalence).

    Two outputs count as equivalent when their cosine distance is under `threshold`; in order, an output joins the
    first class that holds an equivalent of it, else it opens a class.
    Args: embeddings (n, D), groups (R+1,) int64 row offsets, threshold in cosine distance, 0 to 2.
    Returns: (R,) int64, from 1 to the group's size.
    """
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    return torch.tensor([_num_classes(unit[a:b], threshold) for a, b in itertools.pairwise(groups)])


def _num_classes(unit, threshold):
    equivalent = (1 - unit @ unit.T < threshold).tolist()
    classes: list[list[int]] = []
    for i in range(len(unit)):
        home = next((c for c in classes if any(equivalent[i][j] for j in c)), None)
        if home is None:
            classes.append([i])
        else:
            home.append(i)
    return len(classes)


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
