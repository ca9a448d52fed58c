"""From distances to deviations and weights, all groups at a time. Spec: ddpo.reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.deviation.rows import check_groups, sizes

CONSTANT = 1e-6  # a measure whose spread is at most this times max(1, max d) is constant
BINS = 10  # of the histogram


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
    if combine not in ("geometric", "arithmetic"):
        raise ValueError(f"weights: combine must be 'geometric' or 'arithmetic', got {combine!r}")
    if not 0 <= min_deviation <= 1:
        raise ValueError(f"weights: min_deviation must lie in [0, 1], got {min_deviation}")
    u = relative_distances(distances, groups)  # (k, n)
    size, row_group = sizes(check_groups("weights", groups, u.shape[1]).to(u.device))
    g = u.log().mean(0).exp() if combine == "geometric" else u.mean(0)
    g = g.clamp(min=min_deviation)
    low, high = _extremes(g, row_group, len(size))
    mean = g.new_zeros(len(size)).index_add_(0, row_group, g) / size
    w = torch.where((low == high)[row_group], 1.0, g / mean[row_group])
    if release_floor:
        w = w.clamp(min=0.2)
    return Weights(g, w, report(w))


def relative_distances(distances: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
    """u_i = (d_i - min d) / (max d - min d) in each group, (k, n) float64 of k measures; see weights."""
    if not distances:
        raise ValueError("weights: wants the distances of at least one measure, got none")
    n = len(next(iter(distances.values())))
    groups = check_groups("weights", groups, n).to(next(iter(distances.values())).device)
    size, row_group = sizes(groups)
    relative = []
    for name, d in distances.items():
        if d.shape != (n,) or not torch.isfinite(d).all():
            raise ValueError(f"weights: distances[{name!r}] must be finite (n,) = ({n},), got {tuple(d.shape)}")
        relative.append(_relative(d.double(), row_group, len(size)))
    return torch.stack(relative)


def crpo_weights(relative: Tensor, pairs: Tensor, scales: Sequence[float] = ()) -> Tensor:
    """CrPO's weight of each pair: c = sum over the k measures of scale * max(0, u_chosen - u_rejected). Not mean one.

    Args:
        relative: (k, n) of relative_distances.
        pairs: (P, 2) int64 columns of it: chosen, rejected.
        scales: one for each measure; none: 1/k each.
    Returns: (P,) float64, at least 0.
    Raises: ValueError where the scales are not as many as the measures.
    Source: arXiv 2505.14442.
    """
    if scales and len(scales) != len(relative):
        raise ValueError(f"crpo_weights: wants a scale for each of {len(relative)} measures, got {list(scales)}")
    scale = relative.new_tensor(list(scales) or [1 / len(relative)] * len(relative))  # (k,)
    chosen, rejected = pairs.T
    return scale @ (relative[:, chosen] - relative[:, rejected]).clamp(min=0)


def _relative(d, row_group, num_groups):
    low, high = (x[row_group] for x in _extremes(d, row_group, num_groups))
    constant = high - low <= CONSTANT * high.clamp(min=1)
    return torch.where(constant, 1.0, (d - low) / (high - low))


def report(w: Tensor) -> dict:
    """Of the weights (m,) in use: how many, mean (a factor on the learning rate), share of zeros, effective sample
    size (sum w)^2 / sum w^2, and a histogram of ten bins from 0 to the largest: their `edges` and `counts`."""
    total, squares = float(w.sum()), float((w * w).sum())
    most = float(w.max()) if len(w) else 0.0
    counts = torch.histc(w.double(), BINS, 0, most or 1.0).long().tolist()
    return {
        "count": len(w),
        "mean": total / len(w) if len(w) else 0.0,
        "zero_share": float((w == 0).double().mean()) if len(w) else 0.0,
        "effective_sample_size": total**2 / squares if squares else 0.0,
        "histogram": {"edges": [(most or 1.0) * i / BINS for i in range(BINS + 1)], "counts": counts},
    }


def _extremes(x, row_group, num_groups):
    empty = x.new_zeros(num_groups)
    return (empty.scatter_reduce(0, row_group, x, how, include_self=False) for how in ("amin", "amax"))
