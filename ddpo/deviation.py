"""From embeddings to weights: mean distances, deviations and weights of groups of responses.

    d_i = 1/(n-1) * sum_{j != i} distance(i, j)      mean distance, per measure
    u_i = (d_i - min d) / (max d - min d)            a constant measure gives 1 for all
    g_i = prod over measures of u_i^(1/k)            deviation (or the arithmetic mean of u)
    w_i = g_i / mean(g)                              weight, mean one in the group

Many groups at a time: the rows of group r are groups[r] to groups[r + 1], groups (R+1,) int64.
Spec: ddpo.reference. Source: arXiv 2503.17126, section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CONSTANT = 1e-6  # a measure whose spread is at most this times max(1, max d) is constant


def mean_distance(embeddings: Tensor, metric: str = "cosine", groups: Tensor | None = None) -> Tensor:
    """Mean distance of each response to the others of its group.

    cosine in O(n D) by the closed form: with unit vectors e and s their sum, d_i = (n - e_i.s) / (n - 1).
    Args:
        embeddings: (n, D) floating point, finite; cosine: no zero vector.
        metric: 'cosine' (0 to 2) | 'euclidean' (units of the embedding).
        groups: (R+1,) int64 row offsets; None: one group.
    Returns: (n,) float32 (float64 for float64); 0 in a group of one.
    Raises: ValueError for other shapes or metrics, for values that are not finite and for zero vectors.
    """
    if embeddings.dim() != 2 or not embeddings.is_floating_point():
        got = f"{embeddings.dtype} {tuple(embeddings.shape)}"
        raise ValueError(f"mean_distance: embeddings must be floating point (n, D), got {got}")
    n = len(embeddings)
    groups = _check_groups("mean_distance", groups, n)
    if not torch.isfinite(embeddings).all():
        row = int((~torch.isfinite(embeddings)).any(1).nonzero()[0])
        raise ValueError(f"mean_distance: embeddings must be finite, row {row} is not")
    out_dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    if metric == "cosine":
        return _mean_cosine(embeddings, groups).to(out_dtype)
    if metric == "euclidean":
        return _mean_euclidean(embeddings.to(out_dtype), groups)
    raise ValueError(f"mean_distance: metric must be 'cosine' or 'euclidean', got {metric!r}")


def _mean_cosine(embeddings, groups):
    unit = embeddings.double()
    norm = unit.norm(dim=1, keepdim=True)
    if len(norm) and not norm.min() > 0:
        row = int((norm == 0).nonzero()[0, 0])
        raise ValueError(f"mean_distance: cosine distance of a zero vector is not defined, row {row}")
    unit = unit / norm
    size, row_group = _sizes(groups)
    total = unit.new_zeros(len(size), unit.shape[1]).index_add_(0, row_group, unit)  # (R, D) s of each group
    n = size[row_group].double()  # (n,)
    d = (n - (unit * total[row_group]).sum(1)) / (n - 1).clamp(min=1)
    return d.clamp_(min=0).masked_fill_(n == 1, 0)


def _mean_euclidean(embeddings, groups):
    d = embeddings.new_zeros(len(embeddings))
    for a, b in zip(groups[:-1].tolist(), groups[1:].tolist(), strict=True):
        group = embeddings[a:b]
        if b - a > 1:
            distance = torch.cdist(group, group, compute_mode="donot_use_mm_for_euclid_dist")
            d[a:b] = distance.sum(1, dtype=torch.float64) / (b - a - 1)
    return d


@dataclass(frozen=True)
class Weights:
    """deviation (n,) in [0, 1] and weight (n,), mean one in each group, float64; report: what to print."""

    deviation: Tensor
    weight: Tensor
    report: dict


def weights(
    distances: Mapping[str, Tensor],
    groups: Tensor | None = None,
    *,
    combine: str = "geometric",
    min_deviation: float = 0.0,
    release_floor: bool = False,
) -> Weights:
    """Deviations and weights from the mean distances of one or several measures.

    Args:
        distances: name of the measure -> (n,) mean distances.
        groups: (R+1,) int64 row offsets; None: one group.
        combine: 'geometric' (paper) | 'arithmetic' mean over the measures.
        min_deviation: deviations are raised to at least this, 0 to 1, before normalising.
        release_floor: weights are raised to at least 0.2, after normalising (the mean then exceeds one).
    Returns: Weights.
    Raises: ValueError for no measure, unequal lengths, values that are not finite or options out of range.
    """
    if not distances:
        raise ValueError("weights: wants the distances of at least one measure, got none")
    if combine not in ("geometric", "arithmetic"):
        raise ValueError(f"weights: combine must be 'geometric' or 'arithmetic', got {combine!r}")
    if not 0 <= min_deviation <= 1:
        raise ValueError(f"weights: min_deviation must lie in [0, 1], got {min_deviation}")
    n = len(next(iter(distances.values())))
    groups = _check_groups("weights", groups, n)
    size, row_group = _sizes(groups)
    relative = []
    for name, d in distances.items():
        if d.shape != (n,) or not torch.isfinite(d).all():
            raise ValueError(f"weights: distances[{name!r}] must be finite (n,) = ({n},), got {tuple(d.shape)}")
        relative.append(_relative(d.double(), row_group, len(size)))
    u = torch.stack(relative)  # (k, n)
    g = u.log().mean(0).exp() if combine == "geometric" else u.mean(0)
    g = g.clamp(min=min_deviation)
    low, high = _extremes(g, row_group, len(size))
    mean = g.new_zeros(len(size)).index_add_(0, row_group, g) / size
    w = torch.where((low == high)[row_group], 1.0, g / mean[row_group])
    if release_floor:
        w = w.clamp(min=0.2)
    return Weights(g, w, report(w))


def _relative(d, row_group, num_groups):
    low, high = (x[row_group] for x in _extremes(d, row_group, num_groups))
    constant = high - low <= CONSTANT * high.clamp(min=1)
    return torch.where(constant, 1.0, (d - low) / (high - low))


def report(w: Tensor) -> dict:
    """Of the weights (m,) in use: how many, mean (a factor on the learning rate), share of zeros, effective sample
    size (sum w)^2 / sum w^2."""
    total, squares = float(w.sum()), float((w * w).sum())
    return {
        "count": len(w),
        "mean": total / len(w) if len(w) else 0.0,
        "zero_share": float((w == 0).double().mean()) if len(w) else 0.0,
        "effective_sample_size": total**2 / squares if squares else 0.0,
    }


def _check_groups(where, groups, n):
    if groups is None:
        return torch.tensor([0, n]) if n else torch.tensor([0])
    if groups.dim() != 1 or groups.dtype != torch.int64 or len(groups) < 1:
        got = f"{groups.dtype} {tuple(groups.shape)}"
        raise ValueError(f"{where}: groups must be int64 (R+1,) row offsets, got {got}")
    if groups[0] != 0 or groups[-1] != n or (groups.diff() < 1).any():
        raise ValueError(f"{where}: groups must rise from 0 to n = {n} without empty groups")
    return groups


def _sizes(groups):
    """Rows of each group (R,) and each row's group (n,)."""
    size = groups.diff()
    return size, torch.repeat_interleave(torch.arange(len(size), device=groups.device), size)


def _extremes(x, row_group, num_groups):
    empty = x.new_zeros(num_groups)
    return (empty.scatter_reduce(0, row_group, x, how, include_self=False) for how in ("amin", "amax"))
