"""Local novelty: the mean distance to the nearest responses of the group."""

import torch
from torch import Tensor

from ddpo.deviation.by_faiss import Index
from ddpo.deviation.distance import METRICS
from ddpo.deviation.rows import as_rows, check_groups, larger, out_dtype, real, same_size, square_sums, unit

DIRECT = 256  # rows of a group whose distances are all computed


def nearest_distance(
    embeddings, k: int, metric: str = "cosine", groups: Tensor | None = None, *, buffer_mib: float = 64
) -> Tensor:
    """Mean distance of each response to the k nearest others of its group; to all others where there are fewer.

    A response is not its own neighbour, a duplicate of it is one. In groups of up to 256 all distances are computed; in
    larger ones FAISS's flat index says who is near (in float32), and the distances to those are computed.
    Args: as mean_distance; k: at least 1 (GPU FAISS takes up to 2,047). buffer_mib: about the most memory beside input
        and output, of a large group also three copies in float32.
    Returns: (n,) as mean_distance.
    Raises: ValueError as mean_distance.
    """
    x = as_rows("nearest_distance", embeddings)
    groups = check_groups("nearest_distance", groups, len(x))
    if metric not in METRICS:
        raise ValueError(f"nearest_distance: metric must be 'cosine' or 'euclidean', got {metric!r}")
    if k < 1:
        raise ValueError(f"nearest_distance: k must be at least 1, got {k}")
    D, item, buffer = x.shape[1], 8 if x.dtype == torch.float64 else 4, int(buffer_mib * 2**20)

    def ready(rows, index):
        rows = real(rows)
        if metric == "cosine":
            return unit("nearest_distance", rows, index)
        square_sums("nearest_distance", rows, index)
        return rows

    def mean(squared):
        """(..., k) squared distances -> (...); of unit vectors half of it is the cosine distance."""
        return (squared / 2 if metric == "cosine" else squared.sqrt()).mean(-1)

    d = torch.zeros(len(x), dtype=out_dtype(x), device=x.device)
    for _, rows in same_size(groups, buffer, lambda m: item * m * (3 * D + 3 * m), DIRECT):
        m = rows.shape[1]
        e = ready(x[rows.to(x.device)], rows)  # (G, m, D)
        if m > 1:
            squared = torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist").square_()
            squared.diagonal(dim1=1, dim2=2).fill_(torch.inf)
            d[rows.to(x.device)] = mean(squared.topk(min(k, m - 1), largest=False).values).to(d.dtype)
    for a, b in larger(groups, DIRECT):
        e, near = ready(x[a:b], torch.arange(a, b)), min(k, b - a - 1)
        e = e - e.mean(0)  # distances stay; FAISS's products cancel less
        index, part = Index(e), max(1, buffer // (3 * item * D * (near + 1)))
        for i in range(0, b - a, part):
            own = e[i : i + part]
            found = index.search(own, near + 1)  # (p, near + 1), itself among them or left behind by duplicates
            squared = (own[:, None] - e[found]).square_().sum(-1)
            itself = found == torch.arange(i, i + len(own), device=x.device)[:, None]
            squared.masked_fill_(itself, torch.inf)
            d[a + i : a + i + len(own)] = mean(squared.topk(near, largest=False).values).to(d.dtype)
    return d
