"""From embeddings to weights: how far each response of a group lies from the others, and what that makes it weigh.

    d_i = 1/(n-1) * sum_{j != i} distance(i, j)      mean distance, per measure
    u_i = (d_i - min d) / (max d - min d)            a constant measure gives 1 for all
    g_i = prod over measures of u_i^(1/k)            deviation (or the arithmetic mean of u)
    w_i = g_i / mean(g)                              weight, mean one in the group

Many groups at a time: the rows of group r are groups[r] to groups[r + 1], groups (R+1,) int64. Embeddings are torch
tensors or NumPy arrays, memory-mapped ones too; they are not copied.
Spec: ddpo.reference. Source: arXiv 2503.17126, section 3.
"""

from ddpo.deviation.distance import mean_distance, pick_backend
from ddpo.deviation.nearest import nearest_distance
from ddpo.deviation.sets import distinct_k, diversity, log_det, vendi_score
from ddpo.deviation.weights import Weights, crpo_weights, relative_distances, report, weights

__all__ = [
    "Weights",
    "crpo_weights",
    "distinct_k",
    "diversity",
    "log_det",
    "mean_distance",
    "nearest_distance",
    "pick_backend",
    "relative_distances",
    "report",
    "vendi_score",
    "weights",
]
